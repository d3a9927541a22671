//! `config.json`, in the spellings of transformers 4 and 5.

use std::fs;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};

use super::{CONFIG_FILE, GENERATION_CONFIG_FILE};
use crate::config::DecoderConfig;
use crate::error::{Error, Result};

/// The fields that are read. What is absent has the default of transformers' `LlamaConfig`, except
/// the sizes, which must be there.
#[derive(Deserialize)]
struct File {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    rms_norm_eps: Option<f64>,
    max_position_embeddings: Option<usize>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    tie_word_embeddings: Option<bool>,
    initializer_range: Option<f64>,
    hidden_act: Option<String>,
    bos_token_id: Option<Value>,
    eos_token_id: Option<Value>,
    quantization_config: Option<Value>,
    partial_rotary_factor: Option<f64>,
    rope_theta: Option<f64>,                 // transformers 4
    rope_scaling: Option<Value>,             // transformers 4
    rope_parameters: Option<RopeParameters>, // transformers 5
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)] // each of the others scales the angles
struct RopeParameters {
    rope_theta: Option<f64>,
    #[serde(alias = "type")]
    rope_type: Option<String>,
}

/// Reads `config.json` of a folder, and the end tokens of `generation_config.json` where there is one.
///
/// # Errors
/// When the file is missing, is no JSON object, lacks a size, has sizes that do not fit each other,
/// or describes a model that this crate does not have (another `model_type`, activation or RoPE).
pub fn read_config(folder: impl AsRef<Path>) -> Result<DecoderConfig> {
    let path = folder.as_ref().join(CONFIG_FILE);
    let value = read_json(&path)?;
    match value.get("model_type") {
        Some(Value::String(name)) if name == "llama" => {}
        Some(Value::String(name)) => {
            return Err(Error::unsupported(&path, "model_type", name, "llama"));
        }
        _ => {
            return Err(Error::malformed(&path, "model_type", "a name such as \"llama\"", "none"));
        }
    }
    let file: File = serde_json::from_value(value).map_err(|source| {
        Error::malformed(&path, "the file", "the fields of a Llama", source.to_string())
    })?;
    check_supported(&path, &file)?;

    let num_key_value_heads = file.num_key_value_heads.unwrap_or(file.num_attention_heads);
    let rope = file.rope_parameters.as_ref().and_then(|rope| rope.rope_theta);
    let mut config = DecoderConfig {
        vocab_size: file.vocab_size,
        hidden_size: file.hidden_size,
        intermediate_size: file.intermediate_size,
        num_hidden_layers: file.num_hidden_layers,
        num_attention_heads: file.num_attention_heads,
        num_key_value_heads,
        head_dim: file
            .head_dim
            .unwrap_or(file.hidden_size.checked_div(file.num_attention_heads).unwrap_or(0)),
        rms_norm_eps: file.rms_norm_eps.unwrap_or(1e-6),
        rope_theta: rope.or(file.rope_theta).unwrap_or(10_000.0),
        max_position_embeddings: file.max_position_embeddings.unwrap_or(2048),
        attention_bias: file.attention_bias.unwrap_or(false),
        mlp_bias: file.mlp_bias.unwrap_or(false),
        tie_word_embeddings: file.tie_word_embeddings.unwrap_or(false),
        initializer_range: file.initializer_range.unwrap_or(0.02),
        bos_token_id: token_ids(&path, "bos_token_id", &file.bos_token_id)?.first().copied(),
        eos_token_ids: token_ids(&path, "eos_token_id", &file.eos_token_id)?,
    };
    check_sizes(&path, &config)?;
    add_generation_ends(folder.as_ref(), &mut config)?;
    Ok(config)
}

fn read_json(path: &Path) -> Result<Value> {
    let text = fs::read_to_string(path).map_err(|source| Error::io(path, source))?;
    serde_json::from_str(&text).map_err(|source| {
        Error::malformed(path, "the file", "a JSON object", format!("an error: {source}"))
    })
}

fn check_supported(path: &Path, file: &File) -> Result<()> {
    if let Some(activation) = file.hidden_act.as_deref().filter(|name| *name != "silu") {
        return Err(Error::unsupported(path, "hidden_act", activation, "silu"));
    }
    let rope = file.rope_parameters.as_ref().and_then(|rope| rope.rope_type.as_deref());
    if let Some(kind) = rope.filter(|kind| *kind != "default") {
        return Err(Error::unsupported(path, "rope_type", kind, "default"));
    }
    if file.quantization_config.as_ref().is_some_and(|value| !value.is_null()) {
        let supported = "none: f32, f16 or bf16 weights";
        return Err(Error::unsupported(path, "quantization_config", "of any kind", supported));
    }
    if let Some(factor) = file.partial_rotary_factor.filter(|factor| *factor != 1.0) {
        let found = factor.to_string();
        return Err(Error::unsupported(path, "partial_rotary_factor", found, "1"));
    }
    match &file.rope_scaling {
        None | Some(Value::Null) => Ok(()),
        Some(scaling) => Err(Error::unsupported(path, "rope_scaling", scaling.to_string(), "null")),
    }
}

fn check_sizes(path: &Path, config: &DecoderConfig) -> Result<()> {
    let sizes = [
        ("vocab_size", config.vocab_size),
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("num_hidden_layers", config.num_hidden_layers),
        ("num_attention_heads", config.num_attention_heads),
        ("num_key_value_heads", config.num_key_value_heads),
        ("head_dim", config.head_dim),
        ("max_position_embeddings", config.max_position_embeddings),
    ];
    // Limits far above any model: products of two sizes cannot overflow, and the list of a model's
    // tensors cannot fill the memory.
    const LARGEST: usize = 1 << 28;
    const MOST_LAYERS: usize = 10_000;
    for (name, size) in sizes {
        let largest = if name == "num_hidden_layers" { MOST_LAYERS } else { LARGEST };
        if size == 0 || size > largest {
            let expected = format!("1 to {largest}");
            return Err(Error::malformed(path, name, expected, size.to_string()));
        }
    }
    for (name, value) in [("rms_norm_eps", config.rms_norm_eps), ("rope_theta", config.rope_theta)]
    {
        if !(value.is_finite() && value > 0.0) {
            let expected = "a finite number above 0";
            return Err(Error::malformed(path, name, expected, value.to_string()));
        }
    }
    let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
    if heads % kv_heads != 0 {
        let expected = format!("a divisor of num_attention_heads = {heads}");
        return Err(Error::malformed(path, "num_key_value_heads", expected, kv_heads.to_string()));
    }
    if !config.head_dim.is_multiple_of(2) {
        return Err(Error::malformed(
            path,
            "head_dim",
            "an even number",
            config.head_dim.to_string(),
        ));
    }
    Ok(())
}

/// One id, a list of ids, or nothing.
fn token_ids(path: &Path, field: &str, value: &Option<Value>) -> Result<Vec<u32>> {
    let one = |value: &Value| {
        value.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| {
            Error::malformed(path, field, "a token id or a list of them", value.to_string())
        })
    };
    match value {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(ids)) => ids.iter().map(one).collect(),
        Some(id) => Ok(vec![one(id)?]),
    }
}

fn add_generation_ends(folder: &Path, config: &mut DecoderConfig) -> Result<()> {
    let path = folder.join(GENERATION_CONFIG_FILE);
    if !path.exists() {
        return Ok(());
    }
    let value = read_json(&path)?;
    for id in token_ids(&path, "eos_token_id", &value.get("eos_token_id").cloned())? {
        if !config.eos_token_ids.contains(&id) {
            config.eos_token_ids.push(id);
        }
    }
    Ok(())
}

/// The content of `config.json` for a decoder, in spellings that transformers 4 and 5 both read.
pub fn config_to_json(config: &DecoderConfig, dtype: &str) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_ids,
        "torch_dtype": dtype,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA: &str = r#"{"model_type": "llama", "vocab_size": 8, "hidden_size": 12,
        "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 6"#;

    fn read(rest: &str) -> Result<DecoderConfig> {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(CONFIG_FILE), format!("{LLAMA}{rest}}}")).unwrap();
        read_config(folder.path())
    }

    #[test]
    fn absent_fields_have_the_defaults_of_transformers() {
        let config = read("").unwrap();
        assert_eq!((config.num_key_value_heads, config.head_dim), (6, 2));
        assert_eq!((config.rope_theta, config.rms_norm_eps), (10_000.0, 1e-6));
        assert!(config.eos_token_ids.is_empty());
    }

    #[test]
    fn both_spellings_of_theta_are_read() {
        assert_eq!(read(r#", "rope_theta": 5.0"#).unwrap().rope_theta, 5.0);
        let new = read(r#", "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}"#);
        assert_eq!(new.unwrap().rope_theta, 7.0);
    }

    #[test]
    fn one_end_token_or_several() {
        assert_eq!(read(r#", "eos_token_id": 2"#).unwrap().eos_token_ids, [2]);
        assert_eq!(read(r#", "eos_token_id": [2, 5]"#).unwrap().eos_token_ids, [2, 5]);
        assert!(read(r#", "eos_token_id": "two""#).is_err());
    }

    #[test]
    fn end_tokens_of_the_generation_config_are_added() {
        let folder = tempfile::tempdir().unwrap();
        let config = format!(r#"{LLAMA}, "eos_token_id": 2}}"#);
        fs::write(folder.path().join(CONFIG_FILE), config).unwrap();
        fs::write(folder.path().join(GENERATION_CONFIG_FILE), r#"{"eos_token_id": [2, 7]}"#)
            .unwrap();
        assert_eq!(read_config(folder.path()).unwrap().eos_token_ids, [2, 7]);
    }

    #[test]
    fn what_the_decoder_does_not_have_is_refused() {
        for (rest, name) in [
            (r#", "hidden_act": "gelu""#, "gelu"),
            (r#", "rope_scaling": {"rope_type": "yarn"}"#, "yarn"),
            (r#", "rope_parameters": {"rope_type": "llama3"}"#, "llama3"),
            (r#", "rope_parameters": {"type": "linear"}"#, "linear"),
            (r#", "partial_rotary_factor": 0.5"#, "0.5"),
            (r#", "quantization_config": {"bits": 4}"#, "quantization_config"),
        ] {
            let message = read(rest).unwrap_err().to_string();
            assert!(message.contains(name) && message.contains("not supported"), "{message}");
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        for rest in [
            r#", "num_key_value_heads": 4"#,
            r#", "num_key_value_heads": 0"#,
            r#", "head_dim": 3"#,
            r#", "max_position_embeddings": 99999999999"#,
            r#", "rms_norm_eps": -1e-5"#,
            r#", "rope_theta": 0"#,
        ] {
            assert!(read(rest).is_err(), "{rest}");
        }
    }

    #[test]
    fn what_is_written_is_read_again() {
        let config = read(r#", "eos_token_id": [2, 5], "tie_word_embeddings": true"#).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let json = config_to_json(&config, "float32").to_string();
        fs::write(folder.path().join(CONFIG_FILE), json).unwrap();
        assert_eq!(read_config(folder.path()).unwrap(), config);
    }
}
