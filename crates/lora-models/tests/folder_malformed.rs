//! Every way in which a model's folder can be wrong, and the one sentence that says so.
//!
//! `cargo test --workspace --test folder_malformed -- --nocapture --test-threads=1` prints them.
#![cfg(feature = "flex")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use lora_models::{
    Checkpoint, Decoder, Error, FAMILIES, SaveOptions, WeightDtype, open_weights, read_config,
    save_folder_with,
};
use serde_json::{Value, json};
use tempfile::TempDir;

const INDEX: &str = "model.safetensors.index.json";

/// The smallest folder of a family that Mixtral's config can describe: one block, two experts.
fn config() -> Value {
    json!({
        "model_type": "mixtral", "vocab_size": 6, "hidden_size": 4, "intermediate_size": 2,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2,
        "num_local_experts": 2, "num_experts_per_tok": 1, "max_position_embeddings": 8,
        "sliding_window": 3, "rope_theta": 100.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 4},
    })
}

/// A folder that loads, in shards or in one file.
fn folder(max_shard_bytes: u64) -> TempDir {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path();
    fs::write(path.join("config.json"), config().to_string()).unwrap();
    let described = read_config(path).unwrap();
    let weights = lora_models::RandomWeights::new(&described, 1).unwrap();
    let decoder =
        Decoder::from_weights(&described, &weights, &lora_core::device_from_env().unwrap())
            .unwrap();
    let options = SaveOptions { dtype: WeightDtype::F32, max_shard_bytes };
    let made = path.join("made");
    save_folder_with(&decoder, &made, &options, &[]).unwrap();
    for file in fs::read_dir(&made).unwrap() {
        let file = file.unwrap();
        if file.file_name() != "config.json" {
            fs::rename(file.path(), path.join(file.file_name())).unwrap();
        }
    }
    fs::remove_dir_all(made).unwrap();
    load(path).unwrap();
    temp
}

fn load(folder: &Path) -> Result<Decoder, Error> {
    let config = read_config(folder)?;
    Decoder::from_weights(&config, &*open_weights(folder)?, &lora_core::device_from_env().unwrap())
}

/// The error, which is one sentence with all of `parts` in it.
#[track_caller]
fn refused<T>(answer: Result<T, Error>, parts: &[&str]) {
    let Err(error) = answer else { panic!("taken, and not refused for {parts:?}") };
    let sentence = error.to_string();
    println!("{sentence}");
    assert!(!sentence.contains('\n'), "{sentence}");
    for part in parts {
        assert!(sentence.contains(part), "'{part}' in: {sentence}");
    }
}

/// The folder with some fields of its config changed; null takes a field out.
#[track_caller]
fn with_config(changes: Value, parts: &[&str]) {
    let folder = folder(u64::MAX);
    let mut fields = config();
    for (name, value) in changes.as_object().unwrap() {
        fields[name] = value.clone();
    }
    fields.as_object_mut().unwrap().retain(|_, value| *value != json!("absent"));
    fs::write(folder.path().join("config.json"), fields.to_string()).unwrap();
    refused(load(folder.path()), parts);
}

#[test]
fn a_config_that_is_no_config() {
    let folder = folder(u64::MAX);
    for text in ["", "{", "[]", "null", "\"llama\"", "{}", r#"{"model_type": 3}"#] {
        fs::write(folder.path().join("config.json"), text).unwrap();
        refused(load(folder.path()), &["config.json"]);
    }
    fs::write(folder.path().join("config.json"), b"\xff\xfe{}").unwrap();
    refused(load(folder.path()), &["config.json: the file", "a JSON object", "UTF-8 from byte 0"]);
    fs::remove_file(folder.path().join("config.json")).unwrap();
    refused(load(folder.path()), &["config.json"]);
}

#[test]
fn an_unknown_family_is_told_those_that_are_known() {
    let names: Vec<&str> = FAMILIES.iter().map(|family| family.name).collect();
    with_config(json!({"model_type": "mamba"}), &[&["'mamba'"], &names[..]].concat());
}

#[test]
fn a_name_cannot_write_on_a_terminal() {
    with_config(json!({"model_type": "llama\nx\u{1b}[31m"}), &[r"'llama\nx\u{1b}[31m'"]);
    with_config(json!({"model_type": "x".repeat(100_000)}), &["xxx...xxx"]);
}

#[test]
fn sizes_that_are_absurd_or_do_not_fit() {
    for (name, value) in [
        ("vocab_size", json!(0)),
        ("vocab_size", json!(-1)),
        ("vocab_size", json!(1.5)),
        ("vocab_size", json!("6")),
        ("hidden_size", json!(9_000_000_000_000_000_000_u64)),
        ("intermediate_size", json!(1e30)),
        ("num_hidden_layers", json!(0)),
        ("num_hidden_layers", json!(1_000_000_000)),
        ("num_attention_heads", json!(0)),
        ("num_key_value_heads", json!(0)),
        ("head_dim", json!(3)),
        ("head_dim", json!(1 << 20)),
        ("max_position_embeddings", json!(0)),
        ("num_local_experts", json!(0)),
        ("num_local_experts", json!(100_000)),
        ("num_experts_per_tok", json!(3)),
        ("num_experts_per_tok", json!(0)),
        ("sliding_window", json!(0)),
        ("sliding_window", json!(-4)),
        ("sliding_window", json!("wide")),
    ] {
        with_config(json!({name: value}), &[&format!("config.json: {name}: ")]);
    }
    let line = &["num_hidden_layers", "integer `-3`", "at line 1 column"];
    with_config(json!({"num_hidden_layers": -3}), line);
    with_config(json!({"num_attention_heads": 3, "num_key_value_heads": 2}), &["a divisor of"]);
    with_config(json!({"hidden_size": "absent"}), &["missing field `hidden_size`"]);
    with_config(json!({"rms_norm_eps": -1e-5}), &["rms_norm_eps", "above 0"]);
}

#[test]
fn rope_that_cannot_be() {
    let scaling = |change: Value| {
        let mut scaling = config()["rope_scaling"].clone();
        for (name, value) in change.as_object().unwrap() {
            scaling[name] = value.clone();
        }
        scaling.as_object_mut().unwrap().retain(|_, value| *value != json!("absent"));
        json!({"rope_scaling": scaling})
    };
    with_config(scaling(json!({"rope_type": "longrope"})), &["'longrope'", "default, linear"]);
    with_config(scaling(json!({"factor": "absent"})), &["factor of rope_scaling", "found none"]);
    with_config(scaling(json!({"factor": 0})), &["factor of rope_scaling", "above 0"]);
    with_config(scaling(json!({"factor": -2})), &["factor of rope_scaling", "found -2"]);
    with_config(json!({"rope_scaling": 3}), &["rope_scaling", "an object"]);
    with_config(scaling(json!({"low_freq_factor": "absent"})), &["low_freq_factor"]);
    with_config(scaling(json!({"high_freq_factor": 1.0})), &["above low_freq_factor, 1"]);
    with_config(scaling(json!({"original_max_position_embeddings": 0})), &["above 0"]);
    with_config(
        scaling(json!({"short_factor": [1.0]})),
        &["rope_scaling: ", "unknown field `short_factor`"],
    );
    let newer = json!({"rope_type": "linear", "factor": 2.0, "short_factor": [1.0]});
    with_config(json!({"rope_scaling": {}, "rope_parameters": newer}), &["rope_parameters: "]);
    with_config(scaling(json!({"rope_type": "longrope", "short_factor": [1.0]})), &["'longrope'"]);
    with_config(json!({"rope_theta": 0.0}), &["rope_theta", "above 0"]);
    let yarn = |factor: f64| json!({"rope_scaling": {"rope_type": "yarn", "factor": factor}});
    with_config(yarn(0.0), &["factor of rope_scaling", "above 0"]);
    with_config(json!({"partial_rotary_factor": 0.5}), &["partial_rotary_factor"]);
}

#[test]
fn what_is_not_supported_is_named() {
    with_config(json!({"hidden_act": "gelu"}), &["hidden_act 'gelu'", "silu"]);
    with_config(json!({"is_causal": false}), &["is_causal 'false'", "supported: true"]);
    with_config(json!({"quantization_config": {"bits": 4}}), &["quantization_config"]);
}

/// A safetensors file with this header and these data.
fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

#[test]
fn a_weights_file_that_is_damaged() {
    let folder = folder(u64::MAX);
    let path = folder.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    let refuse = |bytes: &[u8], parts: &[&str]| {
        fs::write(&path, bytes).unwrap();
        refused(load(folder.path()), &[&["model.safetensors"], parts].concat());
    };
    refuse(b"", &["8 bytes with its length"]);
    refuse(&whole[..7], &["7 bytes in all"]);
    refuse(&whole[..100], &["complete"]);
    refuse(&whole[..whole.len() - 1], &["complete"]);
    refuse(&[&whole[..], &[0]].concat(), &["complete"]);
    refuse(&u64::MAX.to_le_bytes(), &["a header inside the file"]);
    refuse(&file("", b""), &["a safetensors header"]);
    refuse(&file("{}", b""), &["missing"]);
    refuse(&file(r#"{"a": 3}"#, b""), &["a safetensors header"]);
    let tensor = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"a": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}}}"#)
    };
    refuse(&file(&tensor("F99", "[1]", "[0, 4]"), &[0; 4]), &["a safetensors header"]);
    refuse(&file(&tensor("F32", "[2]", "[0, 4]"), &[0; 4]), &["a safetensors header"]);
    refuse(&file(&tensor("F32", "[-1]", "[0, 4]"), &[0; 4]), &["a safetensors header"]);
    refuse(&file(&tensor("F32", "[1]", "[4, 0]"), &[0; 4]), &["a safetensors header"]);
    let huge = format!("[{0}, {0}]", u64::MAX / 2);
    refuse(&file(&tensor("F32", &huge, "[0, 4]"), &[0; 4]), &["a safetensors header"]);
    let overlapping = r#"{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]}}"#;
    refuse(&file(overlapping, &[0; 6]), &["a safetensors header"]);
}

/// The tensors of the folder's one file, changed.
fn with_tensors(
    change: impl FnOnce(&mut BTreeMap<String, (safetensors::Dtype, Vec<usize>, Vec<u8>)>),
) -> TempDir {
    let folder = folder(u64::MAX);
    let path = folder.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: BTreeMap<_, _> = file
        .tensors()
        .into_iter()
        .map(|(name, view)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec())))
        .collect();
    change(&mut tensors);
    let views = tensors.iter().map(|(name, (dtype, shape, data))| {
        (name, safetensors::tensor::TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    folder
}

#[test]
fn tensors_that_do_not_fit_the_config_are_told_together() {
    let folder = with_tensors(|tensors| {
        tensors.remove("model.norm.weight");
        let extra = tensors["lm_head.weight"].clone();
        tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), extra.clone());
        tensors.insert("model.layers.1.mlp.gate.weight".into(), extra);
        tensors.get_mut("lm_head.weight").unwrap().1.reverse();
    });
    refused(
        load(folder.path()),
        &[
            "'model.norm.weight' is missing",
            "'lm_head.weight': expected shape [6, 4], found [4, 6]",
            "'model.layers.1.mlp.gate.weight' is unused",
        ],
    );
}

#[test]
fn values_that_cannot_be_weights() {
    let expert = "model.layers.0.block_sparse_moe.experts.1.w2.weight";
    for bits in [f32::NAN, f32::INFINITY] {
        let folder = with_tensors(|tensors| {
            tensors.get_mut(expert).unwrap().2[..4].copy_from_slice(&bits.to_le_bytes());
        });
        refused(load(folder.path()), &[expert, "finite values"]);
    }
    let folder =
        with_tensors(|tensors| tensors.get_mut(expert).unwrap().0 = safetensors::Dtype::I32);
    refused(load(folder.path()), &[expert, "I32", "F32, F16, BF16"]);
    // In range for f32, and not for f16.
    let folder = with_tensors(|tensors| {
        tensors.get_mut(expert).unwrap().2[..4].copy_from_slice(&1e6_f32.to_le_bytes());
    });
    let (config, weights) =
        (read_config(folder.path()).unwrap(), open_weights(folder.path()).unwrap());
    let half = WeightDtype::F16;
    let device = lora_core::device_from_env().unwrap();
    let answer = Decoder::from_weights_as(&config, &*weights, half, &device);
    match lora_core::supports_dtype(&device, burn::tensor::DType::F16) {
        true => refused(answer, &[expert, "too large for the type"]),
        false => refused(answer, &["found f16"]),
    }
    let decoder = load(folder.path()).unwrap();
    let output = folder.path().join("half");
    let options = SaveOptions { dtype: half, ..SaveOptions::default() };
    refused(save_folder_with(&decoder, &output, &options, &[]), &[expert, "float16"]);
    assert!(!output.exists(), "nothing is left of it");
}

#[test]
fn shards_that_are_not_as_their_index_says() {
    let folder = folder(100);
    let path = folder.path();
    let index: Value =
        serde_json::from_str(&fs::read_to_string(path.join(INDEX)).unwrap()).unwrap();
    let write = |index: &Value| fs::write(path.join(INDEX), index.to_string()).unwrap();
    let shard = index["weight_map"]["model.norm.weight"].as_str().unwrap().to_owned();

    for text in ["", "[]", "{}", r#"{"weight_map": []}"#, r#"{"weight_map": {"a": 3}}"#] {
        fs::write(path.join(INDEX), text).unwrap();
        refused(load(path), &[INDEX, "weight_map"]);
    }
    fs::write(path.join(INDEX), b"\xff").unwrap();
    refused(load(path), &[INDEX, "weight_map", "UTF-8 from byte 0"]);
    for outside in ["../x.safetensors", "/x.safetensors", ".."] {
        let mut index = index.clone();
        index["weight_map"]["model.norm.weight"] = json!(outside);
        write(&index);
        refused(load(path), &[INDEX, "files beside the index", outside]);
    }
    let mut absent = index.clone();
    absent["weight_map"]["model.norm.weight"] = json!("model-00099-of-00099.safetensors");
    write(&absent);
    refused(load(path), &["model-00099-of-00099.safetensors"]);
    let mut wrong = index.clone();
    wrong["weight_map"]["model.norm.weight"] = index["weight_map"]["lm_head.weight"].clone();
    write(&wrong);
    refused(load(path), &["'model.norm.weight' is not in", "where the index has it"]);
    let mut short = index.clone();
    short["weight_map"].as_object_mut().unwrap().remove("model.norm.weight");
    write(&short);
    // Either the tensor is in a shard that nobody names, or in one that holds it unasked.
    refused(load(path), &["model.norm.weight"]);

    write(&index);
    let whole = fs::read(path.join(&shard)).unwrap();
    fs::write(path.join(&shard), &whole[..whole.len() - 2]).unwrap();
    refused(load(path), &[&shard, "complete"]);
    fs::remove_file(path.join(&shard)).unwrap();
    refused(load(path), &[&shard]);
}

#[test]
fn a_folder_that_lacks_a_file_says_which() {
    let folder = folder(u64::MAX);
    refused(Checkpoint::open(folder.path()), &["a folder without tokenizer.json"]);
    fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
    refused(Checkpoint::open(folder.path()), &["tokenizer.json"]);
    fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    refused(Checkpoint::open(folder.path()), &["a folder without model.safetensors; check"]);
    let pickled = folder.path().join("pytorch_model.bin");
    fs::write(&pickled, "").unwrap();
    let parts = ["a folder without model.safetensors", "(pytorch_model.bin)", "to safetensors"];
    refused(Checkpoint::open(folder.path()), &parts);
    fs::remove_file(pickled).unwrap();
    fs::remove_file(folder.path().join("config.json")).unwrap();
    refused(Checkpoint::open(folder.path()), &["a folder without config.json"]);
    refused(Checkpoint::open(folder.path().join("none")), &["found nothing"]);
}

/// Tokens 0, 1, .. of a vocabulary of whole words, and `<pad>` behind them.
fn tokenizer(words: usize) -> String {
    let vocab: serde_json::Map<String, Value> =
        (0..words).map(|id| (format!("w{id}"), json!(id))).collect();
    let pad = json!({
        "id": words, "content": "<pad>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true,
    });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [pad],
        "normalizer": null, "pre_tokenizer": { "type": "Whitespace" }, "post_processor": null,
        "decoder": null, "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "w0" },
    })
    .to_string()
}

#[test]
fn a_tokenizer_of_another_model() {
    let folder = folder(u64::MAX);
    let rows = read_config(folder.path()).unwrap().vocab_size;
    let open = |words| {
        fs::write(folder.path().join("tokenizer.json"), tokenizer(words)).unwrap();
        Checkpoint::open(folder.path())
    };
    // Somebody added a token to the tokenizer and not to the model, which works without it.
    let checkpoint = open(rows).unwrap();
    assert_eq!(checkpoint.tokenizer.encode("w1 w2").unwrap(), [1, 2]);
    let error = checkpoint.tokenizer.encode("w1 <pad>").unwrap_err().to_string();
    assert!(error.contains(&format!("found '<pad>' with the id {rows}")), "{error}");
    let parts = ["the tokenizer", &format!("at most {rows} tokens"), &format!("'w{rows}'")];
    refused(open(rows + 1), &parts);
}

#[test]
fn a_tokenizer_that_would_end_the_program() {
    let folder = folder(u64::MAX);
    let open = |change: &dyn Fn(&mut Value)| {
        let mut json: Value = serde_json::from_str(&tokenizer(3)).unwrap();
        change(&mut json);
        fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
        Checkpoint::open(folder.path())
    };
    let lacking = open(&|json| {
        let piece = json!({"SpecialToken": {"id": "<s>", "type_id": 0}});
        json["post_processor"] = json!({
            "type": "TemplateProcessing", "single": [piece], "pair": [], "special_tokens": {},
        });
    });
    refused(lacking, &["tokenizer.json", "'<s>'", "special_tokens"]);
    let short = open(&|json| {
        json["model"] = json!({
            "type": "BPE", "continuing_subword_prefix": "####", "vocab": {"a": 0, "b": 1, "ab": 2},
            "merges": ["a b"],
        });
    });
    refused(short, &["tokenizer.json", "continuing_subword_prefix '####'"]);
}

#[test]
fn a_generation_config_that_is_damaged() {
    let folder = folder(u64::MAX);
    for text in ["{", r#"{"eos_token_id": "two"}"#, r#"{"eos_token_id": -1}"#] {
        fs::write(folder.path().join("generation_config.json"), text).unwrap();
        refused(load(folder.path()), &["generation_config.json"]);
    }
}
