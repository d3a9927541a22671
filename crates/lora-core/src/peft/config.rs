//! `adapter_config.json`.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::CONFIG_FILE;
use crate::config::LoraConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::init::Init;
use crate::scaling::Scaling;
use crate::target::TargetModules;

/// What an adapter's config says beside the adapter's mathematics.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AdapterInfo {
    /// The model that the adapter belongs to: a name on a hub, or a folder.
    pub base_model: Option<String>,
    /// Which kind of model PEFT should load, such as `CAUSAL_LM`.
    pub task_type: Option<String>,
}

/// Fields that say where an adapter comes from, or how PEFT should hold it: any value will do.
const IRRELEVANT: [&str; 8] = [
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_dropout", // acts in training only
    "megatron_core",
    "peft_version",
    "revision",
    "task_type",
];

/// Fields that are read by [`parse`].
const READ: [&str; 8] = [
    "peft_type",
    "r",
    "lora_alpha",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "init_lora_weights",
];

/// Reads the config of an adapter's folder. The starting values that it names are not taken over:
/// the adapter's tensors replace them.
///
/// # Errors
/// When the file cannot be read, is no JSON object, lacks `peft_type`, `r`, `lora_alpha` or
/// `target_modules`, or has a field that would change the mathematics in a way not known here.
pub fn read_adapter_config(folder: impl AsRef<Path>) -> Result<LoraConfig> {
    let path = folder.as_ref().join(CONFIG_FILE);
    let text = fs::read_to_string(&path).map_err(|source| Error::io(&path, source))?;
    let fields: Map<String, Value> = serde_json::from_str(&text).map_err(|source| {
        Error::malformed(&path, "the file", "a JSON object", format!("an error: {source}"))
    })?;
    parse(&path, &fields)
}

fn parse(path: &Path, fields: &Map<String, Value>) -> Result<LoraConfig> {
    check_known(path, fields)?;
    let rank = require(path, fields, "r", "a whole number", Value::as_u64)?;
    let alpha = require(path, fields, "lora_alpha", "a number", Value::as_f64)?;
    let mut config = LoraConfig::new(rank as usize, alpha);
    config.target_modules =
        require(path, fields, "target_modules", "a list of names or a pattern", target_modules)?;
    config.rank_pattern =
        pattern(path, fields, "rank_pattern", |value| value.as_u64().map(|rank| rank as usize))?;
    config.alpha_pattern = pattern(path, fields, "alpha_pattern", Value::as_f64)?;
    if fields.get("use_rslora") == Some(&Value::Bool(true)) {
        config.scaling = Scaling::AlphaOverSqrtRank;
    }
    Ok(config)
}

/// Refuses every field that this crate neither reads nor knows to be harmless.
fn check_known(path: &Path, fields: &Map<String, Value>) -> Result<()> {
    let unsupported = |field: &str, found: &Value, supported: &str| -> Result<()> {
        Err(ErrorKind::UnsupportedField {
            path: path.to_owned(),
            field: field.to_owned(),
            found: found.to_string(),
            supported: supported.to_owned(),
        }
        .into())
    };
    match fields.get("peft_type") {
        Some(Value::String(kind)) if kind == "LORA" => {}
        Some(other) => return unsupported("peft_type", other, "only \"LORA\" is"),
        None => {
            return Err(Error::malformed(path, "peft_type", "\"LORA\"", "no such field"));
        }
    }
    for (field, value) in fields {
        match field.as_str() {
            // These change the base's weights, which a reader of the file cannot know.
            "init_lora_weights" => {
                let harmless = ["gaussian", "orthogonal", "kaiming"];
                if value.as_str().is_some_and(|name| !harmless.contains(&name)) {
                    return unsupported(
                        field,
                        value,
                        "it changes the base; convert it to plain LoRA",
                    );
                }
            }
            "use_rslora" if !(value.is_boolean() || value.is_null()) => {
                return Err(Error::malformed(path, field, "true or false", value.to_string()));
            }
            field if READ.contains(&field) || IRRELEVANT.contains(&field) => {}
            field if is_default(field, value) => {}
            field => {
                return unsupported(
                    field,
                    value,
                    "only its default is; export the adapter without it",
                );
            }
        }
    }
    Ok(())
}

/// Whether a field that is not read here is as PEFT leaves it.
fn is_default(field: &str, value: &Value) -> bool {
    match field {
        "bias" => value == "none",
        "qalora_group_size" => true, // used with use_qalora only
        _ => match value {
            Value::Null | Value::Bool(false) => true,
            Value::Object(entries) => entries.is_empty(),
            Value::Array(entries) => entries.is_empty(),
            _ => false,
        },
    }
}

fn require<T>(
    path: &Path,
    fields: &Map<String, Value>,
    field: &'static str,
    expected: &'static str,
    read: impl Fn(&Value) -> Option<T>,
) -> Result<T> {
    let value = fields.get(field).unwrap_or(&Value::Null);
    let found = || match value {
        Value::Null => "nothing".to_owned(),
        value => value.to_string(),
    };
    read(value).ok_or_else(|| Error::malformed(path, field, expected, found()))
}

fn target_modules(value: &Value) -> Option<TargetModules> {
    match value {
        Value::String(name) if name == "all-linear" => Some(TargetModules::AllLinear),
        Value::String(pattern) => Some(TargetModules::Pattern(pattern.clone())),
        Value::Array(entries) => {
            let names = entries.iter().map(|entry| entry.as_str().map(str::to_owned));
            Some(TargetModules::Names(names.collect::<Option<_>>()?))
        }
        _ => None,
    }
}

fn pattern<T>(
    path: &Path,
    fields: &Map<String, Value>,
    field: &'static str,
    read: impl Fn(&Value) -> Option<T>,
) -> Result<Vec<(String, T)>> {
    let entries = match fields.get(field) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(entries)) => entries,
        Some(other) => return Err(Error::malformed(path, field, "an object", other.to_string())),
    };
    let entry = |(key, value): (&String, &Value)| match read(value) {
        Some(value) => Ok((key.clone(), value)),
        None => {
            Err(Error::malformed(path, format!("{field}.{key}"), "a number", value.to_string()))
        }
    };
    entries.iter().map(entry).collect()
}

/// The file's content for an adapter with this config.
pub(super) fn to_json(config: &LoraConfig, info: &AdapterInfo) -> Value {
    let targets = match &config.target_modules {
        TargetModules::AllLinear => json!("all-linear"),
        TargetModules::Names(names) => json!(names),
        TargetModules::Pattern(pattern) => json!(pattern),
    };
    let init = match config.init {
        Init::GaussianA { .. } | Init::GaussianB { .. } => json!("gaussian"),
        Init::Orthogonal => json!("orthogonal"),
        Init::KaimingUniformA => json!(true),
        // PEFT would overwrite the base's weight on loading, and the adapter fits the base as it is.
        Init::Pissa { .. } | Init::Olora => json!(true),
    };
    let ranks: Map<String, Value> =
        config.rank_pattern.iter().map(|(key, rank)| (key.clone(), json!(rank))).collect();
    let alphas: Map<String, Value> =
        config.alpha_pattern.iter().map(|(key, alpha)| (key.clone(), number(*alpha))).collect();
    json!({
        "peft_type": "LORA",
        "task_type": info.task_type,
        "base_model_name_or_path": info.base_model,
        "inference_mode": true,
        "r": config.rank,
        "lora_alpha": number(config.alpha),
        "lora_dropout": 0.0,
        "target_modules": targets,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "use_rslora": config.scaling == Scaling::AlphaOverSqrtRank,
        "use_dora": false,
        "bias": "none",
        "modules_to_save": null,
        "fan_in_fan_out": false,
        "init_lora_weights": init,
    })
}

/// A whole number without a point: several readers of the format take `lora_alpha` as an integer.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 { json!(value as i64) } else { json!(value) }
}
