//! Adapters for other programs: the same function in every file, and refused where it cannot be.

use std::fs;
use std::path::{Path, PathBuf};

use burn::module::Param;
use burn::tensor::{Distribution, Tensor, TensorData};
use lora_core::{
    AdapterInfo, AdapterSet, ErrorKind, Init, LoraConfig, PortabilityRule, Reader, Scaling,
    TargetModules, TrainedBias, VisitLora, check_config_for, check_model_for, inject, load_adapter,
    read_adapter_config, read_mlx_adapter, save_mlx_adapter, save_portable,
};
use lora_models::{Decoder, SafetensorsFile, read_config, read_gguf_adapter, save_gguf_adapter};
use safetensors::SafeTensors;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn decoder(name: &str) -> Decoder {
    let weights = SafetensorsFile::open(golden(name).join("model.safetensors")).unwrap();
    Decoder::from_weights(
        &read_config(golden(name)).unwrap(),
        &weights,
        &lora_core::device_from_env().unwrap(),
    )
    .unwrap()
}

fn base() -> Decoder {
    decoder("tiny_llama")
}

/// Logits of some tokens.
fn logits(decoder: &Decoder) -> Vec<f32> {
    let ids: Vec<i32> = (0..24).map(|index| (index * 37 + 5) % 128).collect();
    decoder.forward(decoder.token_tensor(&ids, 2)).into_data().iter::<f32>().collect()
}

/// Logits of the golden file's tokens, and PEFT's.
fn logits_and_pefts(decoder: &Decoder, name: &str) -> (Vec<f32>, Vec<f32>) {
    let bytes = fs::read(golden(name).join("golden.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let ids = file.tensor("input_ids").unwrap();
    let shape = [ids.shape()[0], ids.shape()[1]];
    let values: Vec<i64> =
        ids.data().as_chunks().0.iter().copied().map(i64::from_le_bytes).collect();
    let ids = Tensor::from_data(TensorData::new(values, shape), &decoder.device());
    let expected = file.tensor("logits").unwrap();
    let expected = expected.data().as_chunks().0.iter().copied().map(f32::from_le_bytes).collect();
    (decoder.forward(ids).into_data().iter::<f32>().collect(), expected)
}

/// The largest difference, relative to the largest value expected; NaN where anything is.
fn apart(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    let differences = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    differences.fold(0f32, |worst, one| if one > worst || one.is_nan() { one } else { worst })
        / largest
}

/// A decoder with adapters as `config` says, moved off their start.
fn adapted(name: &str, config: &LoraConfig) -> Decoder {
    let (mut model, _) = inject(decoder(name), config).unwrap();
    model.visit_lora_mut("", &mut |_, layer| {
        let Some(adapter) = layer.adapter_mut() else { return };
        for factor in [&mut adapter.lora_a, &mut adapter.lora_b] {
            let value = factor.val();
            let noise = value.random_like(Distribution::Normal(0.0, 0.05));
            *factor = Param::from_tensor(value + noise);
        }
    });
    model
}

/// rsLoRA with other ranks and alphas of some layers.
fn mixed() -> LoraConfig {
    let mut config = LoraConfig::new(4, 6.0);
    config.scaling = Scaling::AlphaOverSqrtRank;
    config.rank_pattern = vec![("q_proj".into(), 6), ("1.mlp.up_proj".into(), 3)];
    config.alpha_pattern = vec![("v_proj".into(), 2.5)];
    config
}

fn attached(set: AdapterSet) -> Decoder {
    set.attach(base()).unwrap().0
}

const PEFT_CASES: [&str; 3] = ["peft_plain", "peft_patterns_rslora", "peft_gaussian_regex"];

#[test]
fn a_portable_folder_has_the_logits_of_peft_in_every_form() {
    for name in PEFT_CASES {
        let (model, _) = load_adapter(base(), golden(name)).unwrap();
        let temp = tempfile::tempdir().unwrap();
        let folder = temp.path().join("adapter");
        let report = save_portable(&model, &folder, &AdapterInfo::default(), &Reader::ALL).unwrap();
        assert_eq!(report.rank, 8, "{name}");

        let config = read_adapter_config(&folder).unwrap();
        assert_eq!((config.rank, config.alpha, config.scaling), (8, 8.0, Scaling::AlphaOverRank));
        assert!(config.rank_pattern.is_empty() && config.alpha_pattern.is_empty());
        assert!(matches!(config.target_modules, TargetModules::Names(_)));

        let (again, loaded) = load_adapter(base(), &folder).unwrap();
        assert_eq!((loaded.same_base, loaded.applied.adapted.len()), (Some(true), report.layers));
        check_model_for(&again, &Reader::ALL).unwrap();
        let mlx = attached(read_mlx_adapter(&base(), folder.join("mlx")).unwrap());
        for (form, model) in [("PEFT", &again), ("mlx", &mlx)] {
            let (found, expected) = logits_and_pefts(model, name);
            let difference = apart(&found, &expected);
            println!("{name} as {form}: {difference:.2e}");
            assert!(difference <= 1e-5, "{name} as {form}: {difference:e}");
        }
    }
}

#[test]
fn starts_from_the_weight_fold_into_plain_adapters() {
    for init in [Init::Pissa { iterations: None }, Init::Olora] {
        let config = LoraConfig { init, ..mixed() };
        let model = adapted("tiny_llama", &config);
        let temp = tempfile::tempdir().unwrap();
        let folder = temp.path().join("adapter");
        let info = AdapterInfo::default();
        let report = save_portable(&model, &folder, &info, &[Reader::Vllm]).unwrap();
        assert_eq!(report.rank, 16, "twice 6, and the next that vLLM takes");
        let difference = apart(&logits(&load_adapter(base(), &folder).unwrap().0), &logits(&model));
        assert!(difference <= 1e-5, "{init:?}: {difference:e}");
        assert!(!folder.join("mlx").exists());
    }
}

#[test]
fn without_vllm_the_rank_is_the_largest_one() {
    let model = adapted("tiny_llama", &mixed());
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("adapter");
    let info = AdapterInfo::default();
    let report = save_portable(&model, &folder, &info, &[Reader::MistralRs]).unwrap();
    assert_eq!(report.rank, 6);
    let difference = apart(&logits(&load_adapter(base(), &folder).unwrap().0), &logits(&model));
    assert!(difference <= 1e-5, "{difference:e}");
}

#[test]
fn an_mlx_adapter_comes_back() {
    let mut config = mixed();
    config.target_modules = TargetModules::names(["q_proj", "1.mlp.up_proj", "v_proj", "lm_head"]);
    let model = adapted("tiny_llama", &config);
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("mlx");
    save_mlx_adapter(&model, &folder, &AdapterInfo::default()).unwrap();
    let set = read_mlx_adapter(&base(), &folder).unwrap();
    assert_eq!(set.paths().collect::<Vec<_>>(), AdapterSet::of(&model).paths().collect::<Vec<_>>());
    let difference = apart(&logits(&attached(set)), &logits(&model));
    assert!(difference <= 1e-5, "{difference:e}");

    let text = fs::read_to_string(folder.join("adapter_config.json")).unwrap();
    let written: serde_json::Value = serde_json::from_str(&text).unwrap();
    let parameters = &written["lora_parameters"];
    assert_eq!((&written["fine_tune_type"], &written["num_layers"]), (&"lora".into(), &2.into()));
    assert_eq!((&parameters["rank"], &parameters["scale"]), (&6.into(), &1.0.into()));
    assert!(parameters["keys"].as_array().unwrap().contains(&"lm_head".into()));

    // A scale of its own, as mlx-lm writes it.
    fs::write(
        folder.join("adapter_config.json"),
        text.replace("\"scale\": 1.0", "\"scale\": 20.0"),
    )
    .unwrap();
    let set = read_mlx_adapter(&base(), &folder).unwrap();
    for (path, adaptation) in set.iter() {
        let lora_core::Adaptation::LowRank(adapter) = adaptation else { panic!("{path}") };
        assert_eq!(adapter.scaling(), 20.0, "{path}");
    }

    for (from, to, part) in [
        ("\"lora\"", "\"dora\"", "fine_tune_type"),
        ("\"rank\": 6", "\"rank\": 5", "expected shape"),
        ("\"rank\": 6", "\"rank\": 0", "lora_parameters.rank"),
        ("\"scale\"", "\"alpha\"", "lora_parameters.scale"),
    ] {
        assert!(text.contains(from));
        fs::write(folder.join("adapter_config.json"), text.replace(from, to)).unwrap();
        let error = read_mlx_adapter(&base(), &folder).unwrap_err().to_string();
        assert!(error.contains(part), "{part}: {error}");
    }
}

#[test]
fn an_mlx_adapter_for_another_model_names_every_tensor() {
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("mlx");
    let mut config = LoraConfig::new(2, 4.0);
    config.target_modules = TargetModules::names(["lm_head", "0.self_attn.q_proj"]);
    save_mlx_adapter(&adapted("tiny_llama", &config), &folder, &AdapterInfo::default()).unwrap();
    // The tied model has no lm_head, and is narrower.
    let error = read_mlx_adapter(&decoder("tiny_llama_tied"), &folder).unwrap_err().to_string();
    for part in ["lm_head.lora_a belongs to no layer", "lm_head.lora_b belongs to no layer"] {
        assert!(error.contains(part), "{part}: {error}");
    }
}

/// tests/golden/make_gguf_adapter.py wrote the file with ggml's own package.
#[test]
fn a_gguf_adapter_has_the_bytes_of_ggmls_own_writer() {
    let (model, _) = load_adapter(base(), golden("peft_gaussian_regex")).unwrap();
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("adapter.gguf");
    save_gguf_adapter(&model, &file).unwrap();
    let expected = fs::read(golden("gguf_adapter/adapter.gguf")).unwrap();
    assert!(fs::read(&file).unwrap() == expected);
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1);
    let error = save_gguf_adapter(&model, &file).unwrap_err().to_string();
    assert!(error.contains("exists already"), "{error}");

    let set = read_gguf_adapter(&base(), &file).unwrap();
    assert_eq!(logits(&attached(set)), logits(&model));
}

#[test]
fn a_gguf_adapter_comes_back() {
    let mut with_embedding = LoraConfig::new(3, 5.0);
    with_embedding.target_modules = TargetModules::names(["embed_tokens", "lm_head", "k_proj"]);
    let pissa = LoraConfig { init: Init::Pissa { iterations: None }, ..LoraConfig::new(2, 3.0) };
    for config in [mixed(), with_embedding, pissa] {
        let model = adapted("tiny_llama", &config);
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("adapter.gguf");
        save_gguf_adapter(&model, &file).unwrap();
        let set = read_gguf_adapter(&base(), &file).unwrap();
        assert_eq!(set.paths().count(), AdapterSet::of(&model).paths().count());
        let difference = apart(&logits(&attached(set)), &logits(&model));
        assert!(difference <= 1e-5, "{config:?}: {difference:e}");
    }
}

/// Experts share a tensor in llama.cpp's format: other ranks and experts without an adapter are filled up.
#[test]
fn a_gguf_adapter_of_experts_has_the_bytes_of_ggmls_own_writer() {
    for (family, layers) in [("mixtral", 7), ("qwen3_moe", 9)] {
        let case = if family == "mixtral" { "mixtral_no_window" } else { "qwen3_moe_all_layers" };
        let base = || decoder(&format!("families/{case}"));
        let folder = golden("gguf_adapter").join(family);
        let (model, report) = load_adapter(base(), &folder).unwrap();
        assert_eq!(report.applied.adapted.len(), layers, "{family}");
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("adapter.gguf");
        save_gguf_adapter(&model, &file).unwrap();
        let expected = fs::read(folder.join("adapter.gguf")).unwrap();
        assert!(fs::read(&file).unwrap() == expected, "{family}");

        let ids: Vec<i32> = (0..24).map(|index| (index * 37 + 5) % 48).collect();
        let logits = |decoder: &Decoder| -> Vec<f32> {
            decoder.forward(decoder.token_tensor(&ids, 2)).into_data().iter::<f32>().collect()
        };
        let set = read_gguf_adapter(&base(), &file).unwrap();
        let paths: Vec<_> = set.paths().map(str::to_owned).collect();
        assert!(paths.iter().map(String::as_str).eq(AdapterSet::of(&model).paths()), "{paths:?}");
        let again = set.attach(base()).unwrap().0;
        let difference = apart(&logits(&again), &logits(&model));
        assert!(difference <= 1e-6, "{family}: {difference:e}");
        assert!(apart(&logits(&base()), &logits(&model)) > 1e-3, "{family}: the adapter acts");

        // Each expert's part is looked at: the last one's has a NaN.
        let (expert, stack) = match family {
            "mixtral" => ("1.block_sparse_moe.experts.2.w2", "blk.1.ffn_down_exps"),
            _ => ("0.mlp.experts.5.gate_proj", "blk.0.ffn_gate_exps"),
        };
        let set = AdapterSet::of(&model);
        let Some(lora_core::Adaptation::LowRank(adapter)) =
            set.get(&format!("model.layers.{expert}"))
        else {
            panic!("{expert}")
        };
        let value: f32 = adapter.lora_a.val().into_data().iter::<f32>().next().unwrap();
        let mut bytes = expected;
        let place = bytes.windows(4).position(|four| *four == value.to_le_bytes()).unwrap();
        bytes[place..place + 4].copy_from_slice(&f32::NAN.to_le_bytes());
        fs::write(&file, bytes).unwrap();
        let error = read_gguf_adapter(&base(), &file).unwrap_err().to_string();
        let part = format!("'{stack}.weight.lora_a': expected finite values");
        assert_eq!(error.matches(&part).count(), 1, "{family}: {error}");
    }
    // A factor of 1 for alpha = 0, a missing half, and other sizes.
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("adapter.gguf");
    let bytes = fs::read(golden("gguf_adapter/mixtral/adapter.gguf")).unwrap();
    let replaced = |from: &[u8], to: &[u8]| {
        let place = bytes.windows(from.len()).position(|window| window == from).unwrap();
        [&bytes[..place], to, &bytes[place + from.len()..]].concat()
    };
    let base = || decoder("families/mixtral_no_window");
    fs::write(&file, replaced(&3f32.to_le_bytes(), &0f32.to_le_bytes())).unwrap();
    for (path, adaptation) in read_gguf_adapter(&base(), &file).unwrap().iter() {
        let lora_core::Adaptation::LowRank(adapter) = adaptation else { panic!("{path}") };
        assert_eq!(adapter.scaling(), 1.0, "{path}");
    }
    fs::write(&file, replaced(b"ffn_up_exps.weight.lora_a", b"ffn_up_exps.weight.lora_c")).unwrap();
    let error = read_gguf_adapter(&base(), &file).unwrap_err().to_string();
    for part in ["'blk.1.ffn_up_exps.weight.lora_c' is unused", "without its other half"] {
        assert_eq!(error.matches(part).count(), 1, "{part}: {error}");
    }
    // What is wrong with a stack is told once.
    let other = golden("gguf_adapter/qwen3_moe/adapter.gguf");
    let error = read_gguf_adapter(&decoder("families/qwen3_moe"), other).unwrap_err().to_string();
    let parts = [
        "'blk.0.ffn_gate_exps.weight.lora_a' belongs to no layer",
        "'blk.1.ffn_up_exps.weight.lora_a': expected shape [5, 2, 24], found [6, 2, 24]",
    ];
    for part in parts {
        assert_eq!(error.matches(part).count(), 1, "{part}: {error}");
    }
}

#[test]
fn an_adapter_on_experts_is_refused_by_a_reader_that_has_them_in_one_tensor() {
    let (model, _) =
        load_adapter(decoder("families/mixtral_no_window"), golden("gguf_adapter/mixtral"))
            .unwrap();
    let error = check_model_for(&model, &[Reader::Mlx]).unwrap_err();
    let ErrorKind::NotPortable { problems } = error.kind() else { panic!("{error}") };
    let [problem] = &problems[..] else { panic!("{error}") };
    assert_eq!((problem.rule, problem.places.len()), (PortabilityRule::Expert, 5));
    println!("{error}");
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("mlx");
    assert!(save_mlx_adapter(&model, &folder, &AdapterInfo::default()).is_err());
    assert!(!folder.exists());
}

/// vLLM and llama.cpp's converter stack the experts of a block, and stop where one has no adapter.
#[test]
fn experts_of_a_block_are_adapted_together_for_those_that_stack_them() {
    let rules = |model: &Decoder, reader| match check_model_for(model, &[reader]) {
        Ok(()) => vec![],
        Err(error) => {
            println!("{error}");
            let ErrorKind::NotPortable { problems } = error.kind() else { panic!("{error}") };
            problems.iter().map(|problem| (problem.rule, problem.places.len())).collect()
        }
    };
    use PortabilityRule as Rule;
    let (some, _) =
        load_adapter(decoder("families/mixtral_no_window"), golden("gguf_adapter/mixtral"))
            .unwrap();
    // Five of the nine projections of one block.
    assert_eq!(rules(&some, Reader::Vllm), [(Rule::OneScaling, 2), (Rule::AllExperts, 4)]);
    assert_eq!(rules(&some, Reader::LlamaCpp), [(Rule::OneExpertRank, 2), (Rule::AllExperts, 4)]);
    let temp = tempfile::tempdir().unwrap();
    let save = |model: &Decoder, name: &str| {
        let readers = [Reader::Vllm, Reader::LlamaCpp];
        save_portable(model, temp.path().join(name), &AdapterInfo::default(), &readers)
    };
    let error = save(&some, "some").unwrap_err().to_string();
    assert!(error.contains("or on none, found none at model.layers.1.block_sparse_moe"), "{error}");

    let mut config = LoraConfig::new(2, 3.0);
    config.target_modules = TargetModules::AllLinear;
    config.rank_pattern = vec![("experts.1.w2".into(), 4)];
    let all = adapted("families/mixtral_no_window", &config);
    assert_eq!(rules(&all, Reader::LlamaCpp), [(Rule::OneExpertRank, 2)]);
    assert_eq!(save(&all, "all").unwrap().rank, 8);
    let mut folded = load_adapter(decoder("families/mixtral_no_window"), temp.path().join("all"));
    assert_eq!(rules(&folded.as_mut().unwrap().0, Reader::LlamaCpp), []);
}

#[test]
fn a_gguf_file_that_is_no_adapter_of_the_model_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("adapter.gguf");
    let mut config = LoraConfig::new(2, 4.0);
    config.target_modules = TargetModules::names(["lm_head", "0.self_attn.q_proj"]);
    save_gguf_adapter(&adapted("tiny_llama", &config), &file).unwrap();
    let refused = |bytes: &[u8], parts: &[&str]| {
        let path = temp.path().join("damaged.gguf");
        fs::write(&path, bytes).unwrap();
        let error = read_gguf_adapter(&base(), &path).unwrap_err().to_string();
        for part in parts {
            assert!(error.contains(part), "{part}: {error}");
        }
    };
    let bytes = fs::read(&file).unwrap();
    let changed = |from: &str, to: &str| {
        let place = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
        [&bytes[..place], to.as_bytes(), &bytes[place + from.len()..]].concat()
    };
    refused(&changed("adapter.lora.alpha", "adapter.lora.alphx"), &["adapter.lora.alpha"]);
    refused(&changed("lora\u{12}", "lorx\u{12}"), &["adapter.type", "lorx", "lora"]);
    refused(&changed("llama", "llamb"), &["general.architecture", "llamb"]);
    refused(&changed("weight.lora_a", "weight.lora_c"), &["unused", "without its other half"]);
    refused(&changed("blk.0.attn_q", "blk.7.attn_q"), &["belongs to no layer", "other half"]);
    refused(&bytes[..bytes.len() - 40], &["is the file complete?"]);
    let model = golden("gguf_adapter/adapter.gguf");
    let error = read_gguf_adapter(&decoder("tiny_llama_tied"), model).unwrap_err().to_string();
    assert!(error.contains("blk.1.attn_q"), "{error}");
}

#[test]
fn an_embedding_that_is_the_head_too_is_refused_by_those_that_would_read_it_wrongly() {
    let mut config = LoraConfig::new(2, 4.0);
    config.target_modules = TargetModules::names(["embed_tokens"]);
    let model = adapted("tiny_llama_tied", &config);
    let temp = tempfile::tempdir().unwrap();
    let info = AdapterInfo::default();
    let folder = temp.path().join("adapter");
    let error = save_portable(&model, &folder, &info, &Reader::ALL).unwrap_err();
    let ErrorKind::NotPortable { problems } = error.kind() else { panic!("{error}") };
    assert_eq!(problems.len(), 4, "{error}");
    assert!(problems.iter().all(|problem| problem.rule == PortabilityRule::Embedding));
    let error = save_gguf_adapter(&model, temp.path().join("adapter.gguf")).unwrap_err();
    assert!(error.to_string().contains("is the head too"), "{error}");
    assert!(save_mlx_adapter(&model, temp.path().join("mlx"), &info).is_err());
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 0);

    // With a head of its own, two of them read it.
    let model = adapted("tiny_llama", &config);
    save_portable(&model, &folder, &info, &[Reader::Mlx, Reader::LlamaCpp]).unwrap();
    let difference = apart(&logits(&load_adapter(base(), &folder).unwrap().0), &logits(&model));
    assert!(difference <= 1e-5, "{difference:e}");
}

#[test]
fn every_broken_rule_of_a_configuration_is_told() {
    let mut config = mixed();
    config.rank = 24;
    config.dora = true;
    config.lora_bias = true;
    config.bias = TrainedBias::All;
    config.modules_to_save = vec!["norm".into()];
    config.trainable_tokens = vec![("embed_tokens".into(), vec![1, 2])];
    config.target_modules = TargetModules::names(["q_proj", "lm_head"]);
    for (reader, sentences) in [
        (
            Reader::Vllm,
            &[
                "vLLM: expected no DoRA, found true at dora; train without DoRA",
                "vLLM: expected no bias of the up matrix (lora_bias), found true at lora_bias",
                "vLLM: expected no trained biases (bias = none), found all at bias",
                "vLLM: expected no layer that trains as a whole (modules_to_save), found norm",
                "vLLM: expected no trained token rows (trainable_tokens), found 2 tokens",
                "vLLM: expected one rank and one alpha (it ignores rank_pattern and alpha_pattern in \
                 the scaling), found several at rank_pattern; save with save_portable",
                "vLLM: expected a rank of at most 16, its --max-lora-rank unless set, found rank 24 \
                 at rank; start it with --max-lora-rank 32, or train with a lower rank",
            ][..],
        ),
        (
            Reader::LlamaCpp,
            &[
                "llama.cpp: expected one alpha (its converter ignores alpha_pattern), found several",
                "llama.cpp: expected the scaling alpha / rank, found alpha / sqrt(rank) at scaling",
            ],
        ),
        (Reader::MistralRs, &["mistral.rs: expected no adapter on lm_head, found lm_head"]),
        (Reader::Mlx, &["mlx-lm: expected no DoRA"]),
    ] {
        let error = check_config_for(&config, &[reader]).unwrap_err().to_string();
        println!("{error}\n");
        for sentence in sentences {
            assert!(error.contains(sentence), "{sentence}\nis not in\n{error}");
        }
    }

    let wide = LoraConfig { rank: 300, init: Init::Olora, ..LoraConfig::new(1, 1.0) };
    let error = check_config_for(&wide, &[Reader::Vllm]).unwrap_err().to_string();
    assert_eq!(
        error,
        "vLLM: expected a rank of at most 512, found rank 600 at rank; train with a lower rank"
    );
}

#[test]
fn every_broken_rule_of_a_model_is_told_and_nothing_is_written() {
    let mut config = mixed();
    config.dora = true;
    config.target_modules = TargetModules::names(["q_proj", "up_proj", "v_proj", "embed_tokens"]);
    config.modules_to_save = vec!["lm_head".into()];
    let model = adapted("tiny_llama", &config);
    let error = check_model_for(&model, &Reader::ALL).unwrap_err();
    let ErrorKind::NotPortable { problems } = error.kind() else { panic!("{error}") };
    use PortabilityRule as Rule;
    let rules = |reader| -> Vec<Rule> {
        problems.iter().filter(|p| p.reader == reader).map(|p| p.rule).collect()
    };
    let everywhere = [Rule::Dora, Rule::ModulesToSave];
    assert_eq!(
        rules(Reader::Vllm),
        [&everywhere[..], &[Rule::Embedding, Rule::OneScaling]].concat()
    );
    assert_eq!(
        rules(Reader::LlamaCpp),
        [&everywhere[..], &[Rule::OneAlpha, Rule::AlphaOverRank]].concat()
    );
    assert_eq!(rules(Reader::Mlx), everywhere);
    assert_eq!(rules(Reader::MistralRs), [&everywhere[..], &[Rule::Embedding]].concat());
    let text = error.to_string();
    assert!(text.starts_with("13 problems with the readers of this adapter: (1) vLLM:"), "{text}");
    assert!(text.contains("model.layers.0.self_attn.q_proj"), "{text}");

    let temp = tempfile::tempdir().unwrap();
    let info = AdapterInfo::default();
    let error = save_portable(&model, temp.path().join("a"), &info, &Reader::ALL).unwrap_err();
    let ErrorKind::NotPortable { problems } = error.kind() else { panic!("{error}") };
    assert!(problems.iter().all(|problem| !problem.is_folded()), "{error}");
    assert_eq!(problems.len(), 10, "{error}");
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 0);
    let none = save_portable(&base(), temp.path().join("a"), &info, &Reader::ALL).unwrap_err();
    assert!(none.to_string().contains("a model with adapters"), "{none}");
}

/// Whatever happened to a file, reading it answers, and what it takes is finite.
#[test]
fn damaged_adapter_files_are_answered_without_panic() {
    let model = base();
    let temp = tempfile::tempdir().unwrap();
    let finite = |set: AdapterSet| {
        for (path, adaptation) in set.iter() {
            let lora_core::Adaptation::LowRank(adapter) = adaptation else { panic!("{path}") };
            for factor in [&adapter.lora_a, &adapter.lora_b] {
                assert!(factor.val().is_finite().all().into_scalar::<bool>(), "{path}");
            }
        }
    };
    let file = temp.path().join("adapter.gguf");
    let bytes = fs::read(golden("gguf_adapter/adapter.gguf")).unwrap();
    for place in (0..700).step_by(3).chain((700..bytes.len()).step_by(97)) {
        for flip in [0x01, 0x80, 0xff] {
            let mut damaged = bytes.clone();
            damaged[place] ^= flip;
            fs::write(&file, damaged).unwrap();
            let _ = read_gguf_adapter(&model, &file).map(finite);
        }
        fs::write(&file, &bytes[..place]).unwrap();
        assert!(read_gguf_adapter(&model, &file).is_err(), "cut at {place}");
    }

    let folder = temp.path().join("mlx");
    let (small, _) = load_adapter(base(), golden("peft_gaussian_regex")).unwrap();
    save_mlx_adapter(&small, &folder, &AdapterInfo::default()).unwrap();
    for name in ["adapters.safetensors", "adapter_config.json"] {
        let bytes = fs::read(folder.join(name)).unwrap();
        for place in (0..bytes.len()).step_by(if name.ends_with("json") { 1 } else { 13 }) {
            let mut damaged = bytes.clone();
            damaged[place] ^= 0x80;
            fs::write(folder.join(name), damaged).unwrap();
            let _ = read_mlx_adapter(&model, &folder).map(finite);
            fs::write(folder.join(name), &bytes[..place]).unwrap();
            assert!(read_mlx_adapter(&model, &folder).is_err(), "{name} cut at {place}");
        }
        fs::write(folder.join(name), &bytes).unwrap();
    }
    let set = read_mlx_adapter(&model, &folder).unwrap();
    assert!(apart(&logits(&attached(set)), &logits(&small)) <= 1e-5);
}
