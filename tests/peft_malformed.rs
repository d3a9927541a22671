//! Files that are no adapters: one test for each way, with the sentence that a reader sees.

mod tiny;

use std::fs;
use std::path::Path;

use burn::module::Module;
use burn::nn::conv::Conv2dConfig;
use lora_core::{AdaptableConv2d, ErrorKind, VisitLora, load_adapter};
use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;
use tiny::{FileTensor, change_config, change_tensors, copy_adapter, decoder, golden};

const CASE: &str = "peft_gaussian_regex";
const A: &str = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"; // [3, 64]
const WEIGHTS: &str = "adapter_model.safetensors: ";
const CONFIG: &str = "adapter_config.json: ";

/// The sentence about the adapter in `folder`, without the folder.
fn sentence(folder: &Path, base: &str) -> String {
    let model = decoder(&golden(base), &lora_core::device_from_env().unwrap());
    let before = parameters(&model);
    let error = match load_adapter(model.clone(), folder) {
        Ok((_, report)) => panic!("it was read: {report}"),
        Err(error) => error.to_string(),
    };
    assert_eq!(parameters(&model), before, "nothing was attached");
    println!("{error}");
    error.replace(&format!("{}/", folder.display()), "").replace(&folder.display().to_string(), "")
}

fn parameters<M: Module>(model: &M) -> usize {
    model.num_params()
}

/// The sentence after a change of the weights' file.
fn with_bytes(change: impl FnOnce(&mut Vec<u8>)) -> String {
    let folder = copy_adapter(CASE);
    let path = folder.path().join("adapter_model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    change(&mut bytes);
    fs::write(&path, bytes).unwrap();
    sentence(folder.path(), "tiny_llama")
}

/// The sentence after a change of the tensor `A`.
fn with_a(change: impl FnOnce(&mut FileTensor)) -> String {
    let folder = copy_adapter(CASE);
    change_tensors(folder.path(), |tensors| {
        change(tensors.iter_mut().find(|tensor| tensor.name == A).unwrap());
    });
    sentence(folder.path(), "tiny_llama")
}

/// The sentence after one field of the config was set, or removed by null.
fn with_field(field: &str, value: Value) -> String {
    sentence(changed_field(CASE, field, value).path(), "tiny_llama")
}

fn changed_field(case: &str, field: &str, value: Value) -> TempDir {
    let folder = copy_adapter(case);
    change_config(folder.path(), |config| match value.is_null() {
        true => {
            config.shift_remove(field);
        }
        false => {
            config.insert(field.to_owned(), value);
        }
    });
    folder
}

fn is_no_safetensors(message: &str, reason: &str) {
    let expected =
        format!("{WEIGHTS}the file: expected a safetensors file, found an error: {reason}");
    assert!(message.starts_with(&expected), "{message}");
}

#[test]
fn no_folder() {
    let message = sentence(Path::new("/there/is/no/such"), "tiny_llama");
    assert_eq!(
        message,
        "adapter_config.json: cannot be read or written: No such file or directory (os error 2); \
         check the path"
    );
}

#[test]
fn no_weights() {
    let folder = copy_adapter(CASE);
    fs::remove_file(folder.path().join("adapter_model.safetensors")).unwrap();
    let message = sentence(folder.path(), "tiny_llama");
    assert!(message.starts_with("adapter_model.safetensors: cannot be read"), "{message}");
}

#[test]
fn weights_in_a_pickle_only() {
    let folder = copy_adapter(CASE);
    let safetensors = folder.path().join("adapter_model.safetensors");
    fs::rename(safetensors, folder.path().join("adapter_model.bin")).unwrap();
    assert_eq!(
        sentence(folder.path(), "tiny_llama"),
        ": the weights: expected adapter_model.safetensors, found adapter_model.bin; convert it, with \
         PEFT for instance"
    );
}

#[test]
fn an_empty_file() {
    is_no_safetensors(&with_bytes(Vec::clear), "header too small");
}

#[test]
fn a_file_cut_in_the_header() {
    is_no_safetensors(&with_bytes(|bytes| bytes.truncate(100)), "invalid header length");
}

#[test]
fn a_file_cut_in_the_values() {
    let message = with_bytes(|bytes| bytes.truncate(bytes.len() - 1));
    is_no_safetensors(&message, "incomplete metadata, file not fully covered");
}

#[test]
fn a_file_with_more_behind_it() {
    let message = with_bytes(|bytes| bytes.push(0));
    is_no_safetensors(&message, "incomplete metadata, file not fully covered");
}

#[test]
fn a_header_that_is_said_to_be_huge() {
    for length in [u64::MAX, u64::MAX / 2, 1 << 40, 200_000_000] {
        let message = with_bytes(|bytes| bytes[..8].copy_from_slice(&length.to_le_bytes()));
        is_no_safetensors(&message, "header too large");
    }
}

#[test]
fn a_header_that_is_said_to_be_a_little_longer_or_shorter() {
    for by in [-8_i64, -1, 1, 8] {
        let message = with_bytes(|bytes| {
            let (length, _) = bytes.split_first_chunk_mut::<8>().unwrap();
            *length = (i64::from_le_bytes(*length) + by).to_le_bytes();
        });
        is_no_safetensors(&message, "");
    }
}

#[test]
fn a_header_that_is_no_json() {
    let message = with_bytes(|bytes| bytes[8] = b'[');
    is_no_safetensors(&message, "invalid JSON in header");
}

#[test]
fn a_tensor_of_another_length_than_its_shape() {
    let message = with_bytes(|bytes| {
        let shape = b"[3,64]";
        let place = bytes.windows(shape.len()).position(|window| window == shape).unwrap();
        bytes[place + 1] = b'4';
    });
    is_no_safetensors(&message, "invalid shape, data type, or offset for tensor");
}

#[test]
fn a_tensor_of_another_type() {
    let message = with_a(|tensor| tensor.dtype = Dtype::I32);
    let expected = format!(
        ": the adapter does not fit the model: {A}: expected F32, F16 or BF16, found I32; was it made for another?"
    );
    assert_eq!(message, expected);
}

#[test]
fn a_tensor_of_another_shape() {
    let message = with_a(|tensor| tensor.shape = vec![64, 3]);
    assert!(message.contains(&format!("{A}: expected shape [3, 64], found [64, 3]")), "{message}");
    let message = with_a(|tensor| tensor.shape = vec![192]);
    assert!(message.contains(&format!("{A}: expected shape [3, 64], found [192]")), "{message}");
    let message = with_a(|tensor| {
        tensor.shape = vec![0, 64];
        tensor.bytes.clear();
    });
    assert!(message.contains(&format!("{A}: expected shape [3, 64], found [0, 64]")), "{message}");
}

#[test]
fn a_tensor_with_values_that_are_no_numbers() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let message = with_a(|tensor| tensor.bytes[8..12].copy_from_slice(&value.to_le_bytes()));
        let expected = format!("{A}: expected finite values, found NaN or infinity");
        assert!(message.contains(&expected), "{message}");
    }
}

#[test]
fn a_tensor_that_is_missing() {
    let folder = copy_adapter(CASE);
    change_tensors(folder.path(), |tensors| tensors.retain(|tensor| tensor.name != A));
    assert_eq!(
        sentence(folder.path(), "tiny_llama"),
        format!(": the adapter does not fit the model: {A} is missing; was it made for another?")
    );
}

#[test]
fn two_tensors_that_mean_the_same() {
    let folder = copy_adapter(CASE);
    let other = A.replace(".weight", ".default.weight");
    change_tensors(folder.path(), |tensors| {
        let mut copy = tensors.iter().find(|tensor| tensor.name == A).unwrap().clone();
        copy.name = other.clone();
        copy.bytes[0] ^= 1;
        tensors.push(copy);
    });
    let message = sentence(folder.path(), "tiny_llama");
    assert!(message.contains(&format!("{other} and {A} mean the same tensor")), "{message}");
}

#[test]
fn a_tensor_that_belongs_to_nothing() {
    for name in ["", ".", "weight", "../../etc/passwd", "base_model.model.lora_A.weight"] {
        let folder = copy_adapter(CASE);
        change_tensors(folder.path(), |tensors| {
            let mut copy = tensors[0].clone();
            name.clone_into(&mut copy.name);
            tensors.push(copy);
        });
        let message = sentence(folder.path(), "tiny_llama");
        let expected = format!("{name} is in the file, but belongs to no target");
        assert!(message.contains(&expected), "{message}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "nothing was written");
    }
}

#[test]
fn a_config_that_is_no_json_object() {
    for (text, reason) in [
        ("", "EOF while parsing"),
        ("[]", "invalid type: sequence, expected a map"),
        ("{\"r\": NaN}", "expected value"),
        ("{\"r\": 1e999}", "number out of range"),
        ("\u{feff}{}", "expected value"),
    ] {
        let folder = copy_adapter(CASE);
        fs::write(folder.path().join("adapter_config.json"), text).unwrap();
        let message = sentence(folder.path(), "tiny_llama");
        let expected =
            format!("{CONFIG}the file: expected a JSON object, found an error: {reason}");
        assert!(message.starts_with(&expected), "{message}");
    }
    let folder = copy_adapter(CASE);
    fs::write(folder.path().join("adapter_config.json"), [0xff, 0xfe]).unwrap();
    let message = sentence(folder.path(), "tiny_llama");
    assert!(message.contains("stream did not contain valid UTF-8"), "{message}");
}

#[test]
fn a_config_without_a_field_that_must_be_there() {
    for (field, expected) in [
        ("peft_type", "\"LORA\", found no such field"),
        ("r", "a whole number above 0, found nothing"),
        ("lora_alpha", "a finite number other than 0, found nothing"),
        ("target_modules", "a list of names or a pattern, found nothing"),
    ] {
        let expected = format!("{CONFIG}{field}: expected {expected}");
        assert_eq!(with_field(field, Value::Null), expected);
    }
}

#[test]
fn a_config_with_values_of_other_types_and_ranges() {
    for (field, value, expected) in [
        ("r", json!(0), "a whole number above 0, found 0"),
        ("r", json!(-3), "a whole number above 0, found -3"),
        ("r", json!(3.0), "a whole number above 0, found 3.0"),
        ("r", json!("3"), "a whole number above 0, found \"3\""),
        ("lora_alpha", json!(0), "a finite number other than 0, found 0"),
        ("lora_alpha", json!(1e300), "a finite number other than 0, found 1e+300"),
        ("lora_alpha", json!("16"), "a finite number other than 0, found \"16\""),
        ("target_modules", json!([1]), "a list of names or a pattern, found [1]"),
        ("target_modules", json!({}), "a list of names or a pattern, found {}"),
        ("rank_pattern", json!([]), "an object, found []"),
        ("lora_dropout", json!(1), "a number from 0 to below 1, found 1"),
        ("lora_dropout", json!(-0.5), "a number from 0 to below 1, found -0.5"),
        ("use_rslora", json!("yes"), "true or false, found \"yes\""),
        ("use_dora", json!(1), "true or false, found 1"),
        ("lora_bias", json!(0), "true or false, found 0"),
        ("bias", json!("some"), "\"none\", \"all\" or \"lora_only\", found \"some\""),
        ("modules_to_save", json!("lm_head"), "null or a list of names, found \"lm_head\""),
        (
            "trainable_token_indices",
            json!({"embed_tokens": [1.5]}),
            "null, a list of token ids, or names with such lists, found {\"embed_tokens\":[1.5]}",
        ),
    ] {
        let expected = format!("{CONFIG}{field}: expected {expected}");
        assert_eq!(with_field(field, value), expected);
    }
    for (field, value, expected) in [
        ("rank_pattern", json!({"q_proj": 0}), "a whole number above 0, found 0"),
        ("alpha_pattern", json!({"q_proj": 0.0}), "a finite number other than 0, found 0.0"),
    ] {
        let expected = format!("{CONFIG}{field}.q_proj: expected {expected}");
        assert_eq!(with_field(field, value), expected);
    }
}

#[test]
fn a_config_that_asks_for_what_is_not_known() {
    let only_default = "only its default is; export the adapter without it";
    for (field, value, supported) in [
        ("peft_type", json!("IA3"), "only \"LORA\" is"),
        ("layer_replication", json!([[0, 1]]), only_default),
        ("target_parameters", json!(["experts"]), only_default),
        ("alora_invocation_tokens", json!([1]), only_default),
        ("use_qalora", json!(true), only_default),
        ("megatron_config", json!({"a": 1}), only_default),
        ("ensure_weight_tying", json!(true), only_default),
        ("of_the_future", json!(1), only_default),
    ] {
        let expected = format!("{CONFIG}{field} = {value} is not supported; {supported}");
        assert_eq!(with_field(field, value), expected);
    }
    let message = with_field("init_lora_weights", json!("corda"));
    assert_eq!(
        message,
        format!(
            "{CONFIG}init_lora_weights = \"corda\" is not supported; true, false, gaussian, \
             orthogonal, eva, mica, pissa and olora are; convert the adapter to plain LoRA, or read \
             it over the weights that its start left over"
        )
    );
}

#[test]
fn a_config_whose_unknown_fields_are_at_their_defaults_is_read() {
    for (field, value) in [
        ("of_the_future", json!(false)),
        ("of_the_future", json!([])),
        ("qalora_group_size", json!(7)),
        ("eva_config", json!({"rho": 2.0})),
        ("init_lora_weights", json!("eva")),
        ("init_lora_weights", json!(false)),
        ("peft_version", json!("9.9.9")),
        ("base_model_name_or_path", json!("../../etc/passwd")),
    ] {
        let folder = changed_field(CASE, field, value);
        load_adapter(
            decoder(&golden("tiny_llama"), &lora_core::device_from_env().unwrap()),
            folder.path(),
        )
        .unwrap();
    }
}

#[test]
fn a_rank_that_no_memory_could_hold() {
    let message = with_field("r", json!(u64::MAX));
    let expected = format!("{A}: expected shape [{}, 64], found [3, 64]", u64::MAX);
    assert!(message.contains(&expected), "{message}");
}

#[test]
fn a_config_for_another_model() {
    let message = with_field("target_modules", json!(["query_key_value"]));
    let expected = format!(
        "{CONFIG}target_modules: 'query_key_value' matches no layer of this model; the nearest names are "
    );
    assert!(message.starts_with(&expected), "{message}");
    assert!(message.ends_with("; was it made for another model?"), "{message}");
    let message = with_field("target_modules", json!("("));
    let expected = format!("{CONFIG}target_modules: '(' cannot be used as a regular expression: ");
    assert!(message.starts_with(&expected), "{message}");
}

#[test]
fn tokens_that_are_not_there() {
    for (ids, expected) in [
        (json!([7, 90, 3, 128]), "ids below 128, the vocabulary, found 128 for model.embed_tokens"),
        (json!([7, 90, 3, 7]), "each id once, found 7 twice for model.embed_tokens"),
    ] {
        let folder = changed_field("peft_tokens", "trainable_token_indices", ids);
        let message = sentence(folder.path(), "tiny_llama");
        assert_eq!(message, format!("{CONFIG}trainable_token_indices: expected {expected}"));
    }
    let tokens = json!({"lm_head": [7, 90, 3, 127]});
    let folder = changed_field("peft_tokens", "trainable_token_indices", tokens);
    assert_eq!(
        sentence(folder.path(), "tiny_llama"),
        format!(
            "{CONFIG}trainable_token_indices: expected an embedding, found 'lm_head', a linear layer"
        )
    );
}

#[test]
fn a_pissa_start_that_cannot_be_computed_again() {
    let folder = changed_field("peft_pissa", "init_lora_weights", json!("pissa_niter_4"));
    assert_eq!(
        sentence(folder.path(), "tiny_llama"),
        format!(
            "{CONFIG}init_lora_weights: expected a start that can be computed again (pissa, olora), \
             or a model with the weights that the start left over, found one with random numbers in \
             it; convert the adapter to plain LoRA for model.layers.0.self_attn.q_proj"
        )
    );
    let folder = changed_field("peft_pissa", "lora_alpha", json!(-6));
    assert_eq!(
        sentence(folder.path(), "tiny_llama"),
        format!(
            "{CONFIG}lora_alpha: expected a finite number above 0, found -6 for \
             model.layers.0.self_attn.q_proj"
        )
    );
}

#[test]
fn dora_with_a_bias_of_the_up_matrix() {
    let folder = changed_field("peft_lora_bias", "use_dora", json!(true));
    assert_eq!(
        sentence(folder.path(), "tiny_llama_tied"),
        format!("{CONFIG}lora_bias: expected false with DoRA, found true")
    );
}

#[test]
fn a_bias_of_the_up_matrix_on_an_embedding() {
    let folder = changed_field("peft_embedding", "lora_bias", json!(true));
    assert_eq!(
        sentence(folder.path(), "tiny_llama"),
        format!(
            "{CONFIG}lora_bias: expected false for an embedding, found true at \
             'model.embed_tokens'"
        )
    );
}

#[derive(Module, Debug, VisitLora)]
struct Grouped {
    conv: AdaptableConv2d,
}

#[test]
fn a_grouped_convolution_with_dora_or_a_rank_that_its_groups_do_not_divide() {
    let conv = Conv2dConfig::new([4, 4], [3, 3]).with_groups(2);
    let model = || Grouped { conv: conv.init(&lora_core::device_from_env().unwrap()).into() };
    for (field, value, expected) in [
        (
            "use_dora",
            json!(true),
            "target_modules: expected no grouped convolution with DoRA, or with a start where \
             neither A nor B is zero, found one of 2 groups for conv",
        ),
        (
            "r",
            json!(3),
            "r: expected a multiple of 2, the groups of this convolution, found 3 for conv",
        ),
    ] {
        let folder = changed_field(CASE, "target_modules", json!(["conv"]));
        change_config(folder.path(), |config| {
            config["r"] = json!(4);
            config[field] = value;
        });
        let error = load_adapter(model(), folder.path()).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Malformed { .. }), "{error}");
        assert!(error.to_string().ends_with(expected), "{error}");
    }
}
