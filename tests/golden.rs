//! Logits of tiny random Llamas against transformers and PEFT.
//!
//! The files under `tests/golden` were made by `make_tiny_llama.py` and `make_peft_cases.py` there.

mod tiny;

use std::fs;

use lora_core::{
    AdapterInfo, ErrorKind, LoraConfig, Scaling, TargetModules, VisitLora, inject, load_adapter,
    merge, read_adapter_config, save_adapter, unmerge,
};
use lora_models::{
    Decoder, DecoderConfig, SafetensorsFile, Sampling, WeightDtype, read_config, save_folder,
};
use safetensors::SafeTensors;
use tiny::{copy_adapter, decoder, difference, golden, largest_difference, logits, tensor};

#[test]
fn a_difference_to_nan_is_no_small_difference() {
    for found in [[f32::NAN, 1.0], [1.0, f32::NAN], [f32::NAN; 2]] {
        assert!(largest_difference(&found, &[1.0, 1.0]).is_nan());
    }
    assert_eq!(largest_difference(&[1.0, 4.0], &[2.0, 4.0]), 0.25);
}

#[test]
fn logits_are_those_of_transformers() {
    for name in ["tiny_llama", "tiny_llama_tied", "tiny_llama_f16"] {
        let folder = golden(name);
        let found = logits(
            &decoder(&folder, &lora_core::device_from_env().unwrap()),
            &folder.join("golden.safetensors"),
        );
        let difference = difference(&found, &folder.join("golden.safetensors"));
        println!("{name}: largest relative difference {difference:.2e}");
        assert!(difference <= 1e-5, "{name}: {difference:e}");
    }
}

/// The tiny Llama with other end tokens.
fn decoder_ending_at(eos_token_ids: Vec<u32>) -> Decoder {
    let folder = golden("tiny_llama");
    let weights = SafetensorsFile::open(folder.join("model.safetensors")).unwrap();
    let config = DecoderConfig { eos_token_ids, ..read_config(&folder).unwrap() };
    Decoder::from_weights(&config, &weights, &lora_core::device_from_env().unwrap()).unwrap()
}

/// A prompt, and the tokens that transformers writes after it without a stop.
fn greedy_case() -> (Vec<u32>, Vec<u32>) {
    let path = golden("tiny_llama").join("golden.safetensors");
    let (ids, _) = tensor(&path, "input_ids", i64::from_le_bytes);
    let (greedy, _) = tensor(&path, "greedy", i64::from_le_bytes);
    let tokens = |ids: &[i64]| ids.iter().map(|id| *id as u32).collect();
    (tokens(&ids[..8]), tokens(&greedy))
}

#[test]
fn greedy_decoding_with_the_cache_writes_the_tokens_of_transformers() {
    let (prompt, greedy) = greedy_case();
    let decoder = decoder_ending_at(vec![]);
    let mut told = Vec::new();
    let written =
        decoder.generate(&prompt, greedy.len(), Sampling::greedy(), |id| told.push(id)).unwrap();
    assert_eq!(written, greedy);
    assert_eq!(told, written);
}

#[test]
fn generation_stops_at_an_end_token_and_at_the_longest_sequence() {
    let (prompt, greedy) = greedy_case();
    let before = greedy.iter().position(|id| *id == greedy[3]).unwrap();
    let decoder = decoder_ending_at(vec![greedy[3]]);
    let written = decoder.generate(&prompt, 50, Sampling::greedy(), |_| {}).unwrap();
    assert_eq!(written.len(), before);

    let decoder = decoder_ending_at(vec![]);
    let written = decoder.generate(&prompt, 1000, Sampling::greedy(), |_| {}).unwrap();
    assert_eq!(written.len() + prompt.len(), decoder.config().max_position_embeddings);

    let warm = |seed| {
        let sampling = Sampling::default().temperature(1.0).seed(seed);
        decoder.generate(&prompt, 20, sampling, |_| {}).unwrap()
    };
    assert_eq!(warm(1), warm(1));
    assert_ne!(warm(1), warm(2));
}

#[test]
fn a_decoder_that_is_saved_and_read_again_has_the_same_logits() {
    for name in ["tiny_llama", "tiny_llama_tied"] {
        let folder = golden(name);
        let original = decoder(&folder, &lora_core::device_from_env().unwrap());
        let temp = tempfile::tempdir().unwrap();
        let copy = temp.path().join("copy");
        save_folder(&original, &copy, WeightDtype::F32, &[("note.txt", b"x")]).unwrap();
        let path = folder.join("golden.safetensors");
        assert_eq!(
            logits(&decoder(&copy, &lora_core::device_from_env().unwrap()), &path),
            logits(&original, &path)
        );
        assert_eq!(fs::read(copy.join("note.txt")).unwrap(), b"x");
        assert!(save_folder(&original, &copy, WeightDtype::F32, &[]).is_err(), "it exists");
    }
}

#[test]
fn a_merged_model_is_saved_merged_and_an_unmerged_one_is_not_saved() {
    let path = golden("peft_plain").join("golden.safetensors");
    let base = decoder(&golden("tiny_llama"), &lora_core::device_from_env().unwrap());
    let (mut model, _) = load_adapter(base, golden("peft_plain")).unwrap();
    let temp = tempfile::tempdir().unwrap();
    let copy = temp.path().join("copy");
    let error = save_folder(&model, &copy, WeightDtype::F32, &[]).unwrap_err();
    assert!(error.to_string().contains("not merged"), "{error}");
    assert!(!copy.exists());
    merge(&mut model).unwrap();
    save_folder(&model, &copy, WeightDtype::F32, &[]).unwrap();
    let apart =
        difference(&logits(&decoder(&copy, &lora_core::device_from_env().unwrap()), &path), &path);
    assert!(apart <= 1e-5, "{apart:e}");
}

#[test]
fn an_adapter_that_is_not_finite_is_not_saved() {
    let base = decoder(&golden("tiny_llama"), &lora_core::device_from_env().unwrap());
    let (mut model, _) = load_adapter(base, golden("peft_plain")).unwrap();
    model.visit_lora_mut("", &mut |path, layer| {
        if path == "model.layers.0.mlp.up_proj" {
            let adapter = layer.adapter_mut().unwrap();
            let a = adapter.lora_a.val() * f32::INFINITY;
            adapter.lora_a = burn::module::Param::from_tensor(a);
        }
    });
    let temp = tempfile::tempdir().unwrap();
    let error = save_adapter(&model, temp.path().join("adapter"), &AdapterInfo::default());
    let error = error.unwrap_err();
    assert!(error.to_string().contains("model.layers.0.mlp.up_proj"), "{error}");
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 0);
}

#[test]
fn an_entry_of_an_adapters_targets_may_be_for_other_models() {
    let targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    let targets: Vec<&str> = targets.into_iter().chain(["query_key_value"]).collect();
    load_with("target_modules", serde_json::json!(targets)).unwrap();
    assert!(load_with("target_modules", serde_json::json!(["query_key_value"])).is_err());
}

#[test]
fn the_rules_of_an_adapters_file_choose_its_targets() {
    use serde_json::json;
    let unused = |field: &str, value| load_with(field, value).unwrap_err().to_string();
    for (field, value, layer) in [
        ("layers_to_transform", json!(0), "layers.1.mlp"),
        ("layers_to_transform", json!([1]), "layers.0.mlp"),
        ("exclude_modules", json!(["down_proj"]), "layers.0.mlp.down_proj"),
        ("exclude_modules", json!(".*0.mlp.down_proj"), "layers.0.mlp.down_proj"),
    ] {
        let message = unused(field, value);
        assert!(message.contains(layer) && message.contains("belongs to no target"), "{message}");
    }
    for (field, value) in [
        ("layers_to_transform", json!([0, 1, 5])),
        ("layers_to_transform", json!([])),
        ("layers_pattern", json!("")),
        ("exclude_modules", json!(["query_key_value"])),
        ("exclude_modules", json!("")),
    ] {
        load_with(field, value).unwrap();
    }
}

#[test]
fn injecting_does_not_freeze_a_clone_of_the_model() {
    use burn::module::Module;
    use burn::nn::LinearConfig;
    use lora_core::{AdaptableLinear, ParameterCount};

    let device = lora_core::device_from_env().unwrap().autodiff();
    let layer = LinearConfig::new(6, 4).init(&device);
    let model: Vec<AdaptableLinear> = vec![layer.into()];
    let copy = model.clone();
    let (adapted, report) = inject(model, &LoraConfig::new(2, 4.0)).unwrap();
    assert_eq!(report.parameters.trainable, 2 * (6 + 4));
    assert_eq!(adapted.num_params(), 6 * 4 + 4 + 2 * (6 + 4));
    assert_eq!(ParameterCount::of(&copy).trainable, 6 * 4 + 4);
}

const PEFT_CASES: [&str; 3] = ["peft_plain", "peft_patterns_rslora", "peft_gaussian_regex"];

#[test]
fn adapters_that_peft_wrote_have_the_logits_of_peft() {
    for name in PEFT_CASES {
        let path = golden(name).join("golden.safetensors");
        for device in [
            lora_core::device_from_env().unwrap(),
            lora_core::device_from_env().unwrap().autodiff(),
        ] {
            let base = decoder(&golden("tiny_llama"), &device);
            let (mut adapted, report) = load_adapter(base, golden(name)).unwrap();
            let found = logits(&adapted, &path);
            let apart = difference(&found, &path);
            println!("{name}: {} layers, difference {apart:.2e}", report.applied.adapted.len());
            assert!(apart <= 1e-5, "{name}: {apart:e}");

            merge(&mut adapted).unwrap();
            let apart = difference(&logits(&adapted, &path), &path);
            assert!(apart <= 1e-5, "{name} merged: {apart:e}");
            unmerge(&mut adapted).unwrap();
            assert_eq!(logits(&adapted, &path), found, "{name}: unmerged");
        }
    }
}

#[test]
fn an_adapter_that_is_saved_and_read_again_has_the_same_logits_and_config() {
    for name in PEFT_CASES {
        let path = golden(name).join("golden.safetensors");
        let base = || decoder(&golden("tiny_llama"), &lora_core::device_from_env().unwrap());
        let (adapted, report) = load_adapter(base(), golden(name)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let copy = folder.path().join("adapter");
        let info = AdapterInfo { task_type: Some("CAUSAL_LM".into()), ..AdapterInfo::default() };
        save_adapter(&adapted, &copy, &info).unwrap();
        let (again, again_report) = load_adapter(base(), &copy).unwrap();
        assert_eq!(logits(&again, &path), logits(&adapted, &path), "{name}");
        assert_eq!(again_report.applied, report.applied, "{name}");
        assert_eq!((report.same_base, again_report.same_base), (None, Some(true)), "{name}");

        let exists = save_adapter(&adapted, &copy, &info).unwrap_err();
        assert!(matches!(exists.kind(), ErrorKind::Exists { .. }), "{exists}");
        let files: Vec<_> = fs::read_dir(folder.path()).unwrap().collect();
        assert_eq!(files.len(), 1, "nothing but the adapter's folder is left");
    }
}

#[test]
fn the_config_of_an_adapter_is_read_off_its_layers() {
    let base = decoder(&golden("tiny_llama"), &lora_core::device_from_env().unwrap());
    let mut config = LoraConfig::new(4, 6.0);
    config.scaling = Scaling::AlphaOverSqrtRank;
    config.target_modules = TargetModules::names(["q_proj", "layers.1.mlp.up_proj"]);
    config.rank_pattern = vec![("layers.0.self_attn.q_proj".into(), 2)];
    config.alpha_pattern = vec![("up_proj".into(), 2.5)];
    let (adapted, report) = inject(base, &config).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter");
    save_adapter(&adapted, &path, &AdapterInfo::default()).unwrap();

    let read = read_adapter_config(&path).unwrap();
    assert_eq!(read.scaling, Scaling::AlphaOverSqrtRank);
    assert_eq!(read.target_modules, TargetModules::names(["q_proj", "model.layers.1.mlp.up_proj"]));
    let (_, again) =
        load_adapter(decoder(&golden("tiny_llama"), &lora_core::device_from_env().unwrap()), &path)
            .unwrap();
    assert_eq!(again.applied.adapted, report.adapted);
}

/// Loads `peft_plain` with one field of its config changed.
fn load_with(field: &str, value: serde_json::Value) -> lora_core::Result<()> {
    let folder = copy_adapter("peft_plain");
    let path = folder.path().join("adapter_config.json");
    let text = fs::read_to_string(&path).unwrap();
    let mut config: serde_json::Map<String, serde_json::Value> =
        serde_json::from_str(&text).unwrap();
    match value.is_null() {
        true => config.shift_remove(field),
        false => config.insert(field.to_owned(), value),
    };
    fs::write(&path, serde_json::to_string(&config).unwrap()).unwrap();
    let base = decoder(&golden("tiny_llama"), &lora_core::device_from_env().unwrap());
    load_adapter(base, folder.path()).map(|_| ())
}

#[test]
fn a_config_that_would_change_the_mathematics_is_refused_by_name() {
    use serde_json::json;
    for (field, value) in [
        ("bias", json!("some")),
        ("modules_to_save", json!("lm_head")),
        ("trainable_token_indices", json!([-1])),
        ("init_lora_weights", json!("corda")),
        ("init_lora_weights", json!("pissa_niter_4")),
        ("target_parameters", json!(["mlp.experts"])),
        ("layers_to_transform", json!([-1])),
        ("layers_to_transform", json!("first")),
        ("layers_pattern", json!(["layers", 1])),
        ("exclude_modules", json!({})),
        ("a_field_of_the_future", json!(3)),
        ("peft_type", json!("IA3")),
        ("r", json!(null)),
        ("lora_alpha", json!(null)),
        ("target_modules", json!(null)),
        ("peft_type", json!(null)),
        ("rank_pattern", json!({"q_proj": "many"})),
        ("r", json!(0)),
        ("use_rslora", json!("yes")),
    ] {
        let message = load_with(field, value.clone()).unwrap_err().to_string();
        assert!(message.contains(field), "{field} = {value}: {message}");
    }
    load_with("a_field_of_the_future", json!(false)).unwrap();
}

#[test]
fn every_tensor_that_does_not_fit_is_named_at_once() {
    let folder = copy_adapter("peft_plain");
    let path = folder.path().join("adapter_model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (gone, shape) = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj");
    let key = |path: &str, factor: &str| format!("base_model.model.{path}.lora_{factor}.weight");
    let tensors = file.tensors().into_iter().map(|(name, view)| {
        use safetensors::tensor::TensorView;
        if name == key(gone, "A") {
            return (key("model.layers.7.self_attn.q_proj", "A"), view);
        }
        if name == key(shape, "B") {
            let (rows, columns) = (view.shape()[1], view.shape()[0]);
            let view = TensorView::new(view.dtype(), vec![rows, columns], view.data());
            return (name, view.unwrap());
        }
        (name, view)
    });
    let changed = safetensors::serialize(tensors.collect::<Vec<_>>(), None).unwrap();
    fs::write(&path, changed).unwrap();

    let base = decoder(&golden("tiny_llama"), &lora_core::device_from_env().unwrap());
    let error = load_adapter(base, folder.path()).unwrap_err();
    let ErrorKind::AdapterMismatch { problems, .. } = error.kind() else { panic!("{error}") };
    assert_eq!(problems.len(), 3, "{error}");
    for part in [
        format!("{} is missing", key(gone, "A")),
        format!("{}: expected shape", key(shape, "B")),
        format!("{} is in the file", key("model.layers.7.self_attn.q_proj", "A")),
    ] {
        assert!(error.to_string().contains(&part), "{part}: {error}");
    }
}

#[test]
fn a_damaged_adapter_file_is_an_error() {
    let folder = copy_adapter("peft_plain");
    let path = folder.path().join("adapter_model.safetensors");
    let bytes = fs::read(&path).unwrap();
    for length in [0, 7, 100, bytes.len() / 2, bytes.len() - 1] {
        fs::write(&path, &bytes[..length]).unwrap();
        let base = decoder(&golden("tiny_llama"), &lora_core::device_from_env().unwrap());
        let error = load_adapter(base, folder.path()).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Malformed { .. }), "{length}: {error}");
    }
}

#[test]
fn all_linear_adapts_every_projection_and_not_the_head() {
    let base = decoder(&golden("tiny_llama"), &lora_core::device_from_env().unwrap().autodiff());
    let (adapted, report) = inject(base, &LoraConfig::new(4, 8.0)).unwrap();
    assert_eq!(report.adapted.len(), 2 * 7);
    let parameters: usize = report.adapted.iter().map(|layer| layer.parameters).sum();
    assert_eq!(report.parameters.trainable, parameters);
    let mut plain = Vec::new();
    adapted.visit_lora("", &mut |path, layer| {
        if layer.adapter().is_none() {
            plain.push(path.to_owned());
        }
    });
    assert_eq!(plain, ["model.embed_tokens", "lm_head"]);

    let twice = inject(adapted, &LoraConfig::new(4, 8.0)).unwrap_err();
    assert!(matches!(twice.kind(), ErrorKind::AlreadyAdapted { .. }), "{twice}");
}

#[test]
fn merging_a_model_is_all_or_nothing() {
    let path = golden("tiny_llama").join("golden.safetensors");
    let base = decoder(&golden("tiny_llama"), &lora_core::device_from_env().unwrap());
    let (mut model, _) = load_adapter(base, golden("peft_plain")).unwrap();
    let before = logits(&model, &path);
    // One layer in the middle cannot be merged.
    model.visit_lora_mut("", &mut |path, layer| {
        if path == "model.layers.1.mlp.gate_proj" {
            let adapter = layer.adapter_mut().unwrap();
            let b = adapter.lora_b.val() * f32::NAN;
            adapter.lora_b = burn::module::Param::from_tensor(b);
        }
    });
    let error = merge(&mut model).unwrap_err();
    assert!(error.to_string().contains("model.layers.1.mlp.gate_proj"), "{error}");
    model.visit_lora("", &mut |path, layer| {
        assert!(!layer.is_merged(), "{path}");
    });
    assert!(unmerge(&mut model).is_err());
    assert_eq!(before.len(), logits(&model, &path).len());
}
