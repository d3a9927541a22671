//! `adapter_config.json`.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::CONFIG_FILE;
use crate::config::{LoraConfig, TrainedBias};
use crate::error::{Error, ErrorKind, Result};
use crate::init::Init;
use crate::scaling::Scaling;
use crate::target::{ExcludeModules, TargetModules};

/// What an adapter's config says beside the adapter's mathematics.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AdapterInfo {
    /// The model that the adapter belongs to: a name on a hub, or a folder.
    pub base_model: Option<String>,
    /// Which kind of model PEFT should load, such as `CAUSAL_LM`.
    pub task_type: Option<String>,
}

/// Fields that say where an adapter comes from, or how PEFT should hold it: any value will do.
const IRRELEVANT: [&str; 13] = [
    "auto_mapping",
    "base_model_name_or_path",
    // How a start was computed; whether it changed the base, init_lora_weights says.
    "corda_config",
    "eva_config",
    "loftq_config",
    "lora_ga_config",
    "fan_in_fan_out", // says how the base stores its weights, not the adapter
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size", // used with use_qalora only
    "revision",
    "task_type",
];

/// Fields that are read by [`parse`].
const READ: [&str; 17] = [
    "peft_type",
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "init_lora_weights",
    "use_dora",
    "lora_bias",
    "lora_dropout",
    "bias",
    "modules_to_save",
    "trainable_token_indices",
];

/// Reads the config of an adapter's folder. The starting values that it names are not taken over:
/// the adapter's tensors replace them.
///
/// # Errors
/// When the file cannot be read, is no JSON object, lacks `peft_type`, `r`, `lora_alpha` or
/// `target_modules`, or has a field that would change the mathematics in a way not known here.
pub fn read_adapter_config(folder: impl AsRef<Path>) -> Result<LoraConfig> {
    read_config(folder.as_ref(), false)
}

/// The config of `folder`. With `any_start`, what the adapter started from does not matter, since the
/// model holds what that start left over, and `init` of the config says nothing.
pub(super) fn read_config(folder: &Path, any_start: bool) -> Result<LoraConfig> {
    let (path, mut fields) = read_fields(folder)?;
    if any_start {
        fields.shift_remove("init_lora_weights");
    }
    parse(&path, &fields)
}

const RANK: &str = "a whole number above 0";
/// Below 0 too: an adapter that is subtracted is one that PEFT reads.
const ALPHA: &str = "a finite number other than 0";

fn parse(path: &Path, fields: &Map<String, Value>) -> Result<LoraConfig> {
    check_known(path, fields)?;
    let rank = require(path, fields, "r", RANK, as_rank)?;
    let alpha = require(path, fields, "lora_alpha", ALPHA, as_alpha)?;
    let mut config = LoraConfig::new(rank, alpha);
    config.target_modules =
        require(path, fields, "target_modules", "a list of names or a pattern", target_modules)?;
    config.exclude_modules = optional(
        path,
        fields,
        "exclude_modules",
        "null, a list of names or a pattern",
        exclude_modules,
    )?;
    config.layers_to_transform =
        optional(path, fields, "layers_to_transform", "null, an index or a list of them", indices)?
            .unwrap_or_default();
    config.layers_pattern =
        optional(path, fields, "layers_pattern", "null, a name or a list of them", |value| {
            // An empty name is PEFT's default, as no name is.
            match value.as_str() {
                Some("") => Some(Vec::new()),
                Some(name) => Some(vec![name.to_owned()]),
                None => strings(value),
            }
        })?
        .unwrap_or_default();
    config.rank_pattern = pattern(path, fields, "rank_pattern", RANK, as_rank)?;
    config.alpha_pattern = pattern(path, fields, "alpha_pattern", ALPHA, as_alpha)?;
    let flag = |field| optional(path, fields, field, "true or false", Value::as_bool);
    if flag("use_rslora")?.unwrap_or_default() {
        config.scaling = Scaling::AlphaOverSqrtRank;
    }
    config.dora = flag("use_dora")?.unwrap_or_default();
    config.lora_bias = flag("lora_bias")?.unwrap_or_default();
    config.dropout =
        optional(path, fields, "lora_dropout", "a number from 0 to below 1", |value| {
            value.as_f64().filter(|dropout| (0.0..1.0).contains(dropout))
        })?
        .unwrap_or_default();
    config.bias = optional(path, fields, "bias", "\"none\", \"all\" or \"lora_only\"", bias)?
        .unwrap_or_default();
    config.modules_to_save =
        optional(path, fields, "modules_to_save", "null or a list of names", strings)?
            .unwrap_or_default();
    config.trainable_tokens = optional(
        path,
        fields,
        "trainable_token_indices",
        "null, a list of token ids, or names with such lists",
        tokens,
    )?
    .unwrap_or_default();
    config.init = match fields.get("init_lora_weights") {
        None => Init::default(),
        Some(value) => init(value).ok_or_else(|| {
            let supported = "true, false, gaussian, orthogonal, eva, mica, pissa and olora are; \
                             convert the adapter to plain LoRA, or read it over the weights that its \
                             start left over";
            unsupported(path, "init_lora_weights", value, supported)
        })?,
    };
    Ok(config)
}

fn bias(value: &Value) -> Option<TrainedBias> {
    match value.as_str()? {
        "none" => Some(TrainedBias::None),
        "all" => Some(TrainedBias::All),
        "lora_only" => Some(TrainedBias::LoraOnly),
        _ => None,
    }
}

/// PEFT means the model's input embedding by a list without a name.
fn tokens(value: &Value) -> Option<Vec<(String, Vec<usize>)>> {
    match value {
        Value::Array(_) => Some(vec![("embed_tokens".to_owned(), indices(value)?)]),
        Value::Object(entries) => {
            entries.iter().map(|(name, ids)| Some((name.clone(), indices(ids)?))).collect()
        }
        _ => None,
    }
}

/// What an adapter's start did to the base. The starting values themselves do not matter: the file's
/// tensors are in their places.
fn init(value: &Value) -> Option<Init> {
    match value {
        Value::Null | Value::Bool(_) => Some(Init::default()),
        Value::String(name) => match name.to_ascii_lowercase().as_str() {
            "gaussian" | "orthogonal" | "eva" | "mica" => Some(Init::default()),
            "pissa" => Some(Init::Pissa { iterations: None }),
            "olora" => Some(Init::Olora),
            name => {
                let iterations = name.strip_prefix("pissa_niter_")?.parse().ok()?;
                Some(Init::Pissa { iterations: Some(iterations) })
            }
        },
        _ => None,
    }
}

/// What `folder`'s config says beside the mathematics.
///
/// # Errors
/// When the file cannot be read or is no JSON object.
pub fn read_adapter_info(folder: impl AsRef<Path>) -> Result<AdapterInfo> {
    let (_, fields) = read_fields(folder.as_ref())?;
    let text = |field| fields.get(field).and_then(Value::as_str).map(str::to_owned);
    Ok(AdapterInfo { base_model: text("base_model_name_or_path"), task_type: text("task_type") })
}

pub(super) fn read_fields(folder: &Path) -> Result<(PathBuf, Map<String, Value>)> {
    let path = folder.join(CONFIG_FILE);
    let text = fs::read_to_string(&path).map_err(|source| Error::io(&path, source))?;
    let fields = serde_json::from_str(&text).map_err(|source| {
        Error::malformed(&path, "the file", "a JSON object", format!("an error: {source}"))
    })?;
    Ok((path, fields))
}

/// What a setting of [`LoraConfig`] is called in the file.
pub(super) fn field_of(setting: &'static str) -> &'static str {
    match setting {
        "rank" => "r",
        "alpha" => "lora_alpha",
        "dropout" => "lora_dropout",
        "dora" => "use_dora",
        "trainable_tokens" => "trainable_token_indices",
        setting => setting,
    }
}

fn unsupported(path: &Path, field: &str, found: &Value, supported: &str) -> Error {
    ErrorKind::UnsupportedField {
        path: path.to_owned(),
        field: field.to_owned(),
        found: found.to_string(),
        supported: supported.to_owned(),
    }
    .into()
}

/// Refuses every field that this crate neither reads nor knows to be harmless.
fn check_known(path: &Path, fields: &Map<String, Value>) -> Result<()> {
    match fields.get("peft_type") {
        Some(Value::String(kind)) if kind == "LORA" => {}
        Some(other) => return Err(unsupported(path, "peft_type", other, "only \"LORA\" is")),
        None => {
            return Err(Error::malformed(path, "peft_type", "\"LORA\"", "no such field"));
        }
    }
    for (field, value) in fields {
        match field.as_str() {
            field if READ.contains(&field) || IRRELEVANT.contains(&field) => {}
            _ if is_default(value) => {}
            field => {
                let supported = "only its default is; export the adapter without it";
                return Err(unsupported(path, field, value, supported));
            }
        }
    }
    Ok(())
}

/// Whether a field that is not read here is as PEFT leaves it.
fn is_default(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Object(entries) => entries.is_empty(),
        Value::Array(entries) => entries.is_empty(),
        _ => false,
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

/// A field that may be absent or null.
fn optional<T>(
    path: &Path,
    fields: &Map<String, Value>,
    field: &'static str,
    expected: &'static str,
    read: impl Fn(&Value) -> Option<T>,
) -> Result<Option<T>> {
    match fields.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(_) => require(path, fields, field, expected, read).map(Some),
    }
}

fn target_modules(value: &Value) -> Option<TargetModules> {
    match value {
        Value::String(name) if name.eq_ignore_ascii_case("all-linear") => {
            Some(TargetModules::AllLinear)
        }
        Value::String(pattern) => Some(TargetModules::Pattern(pattern.clone())),
        names => strings(names).map(TargetModules::Names),
    }
}

fn exclude_modules(value: &Value) -> Option<ExcludeModules> {
    match value {
        // PEFT takes an empty pattern for none.
        Value::String(pattern) if pattern.is_empty() => Some(ExcludeModules::Names(Vec::new())),
        Value::String(pattern) => Some(ExcludeModules::Pattern(pattern.clone())),
        names => strings(names).map(ExcludeModules::Names),
    }
}

fn as_rank(value: &Value) -> Option<usize> {
    usize::try_from(value.as_u64()?).ok().filter(|rank| *rank > 0)
}

fn as_alpha(value: &Value) -> Option<f64> {
    // Tensors hold f32: a number that only f64 can hold would become infinite there.
    value.as_f64().filter(|alpha| *alpha != 0.0 && (*alpha as f32).is_finite())
}

fn strings(value: &Value) -> Option<Vec<String>> {
    value.as_array()?.iter().map(|entry| entry.as_str().map(str::to_owned)).collect()
}

fn indices(value: &Value) -> Option<Vec<usize>> {
    let index = |value: &Value| usize::try_from(value.as_u64()?).ok();
    match value {
        Value::Array(entries) => entries.iter().map(index).collect(),
        one => Some(vec![index(one)?]),
    }
}

fn pattern<T>(
    path: &Path,
    fields: &Map<String, Value>,
    field: &'static str,
    expected: &'static str,
    read: impl Fn(&Value) -> Option<T>,
) -> Result<Vec<(String, T)>> {
    let entries = match fields.get(field) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(entries)) => entries,
        Some(other) => return Err(Error::malformed(path, field, "an object", other.to_string())),
    };
    let entry = |(key, value): (&String, &Value)| match read(value) {
        Some(value) => Ok((key.clone(), value)),
        None => Err(Error::malformed(path, format!("{field}.{key}"), expected, value.to_string())),
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
    let excluded = match &config.exclude_modules {
        None => Value::Null,
        Some(ExcludeModules::Names(names)) => json!(names),
        Some(ExcludeModules::Pattern(pattern)) => json!(pattern),
    };
    let bias = match config.bias {
        TrainedBias::None => "none",
        TrainedBias::All => "all",
        TrainedBias::LoraOnly => "lora_only",
    };
    let tokens: Map<String, Value> =
        config.trainable_tokens.iter().map(|(name, ids)| (name.clone(), json!(ids))).collect();
    let tokens = if tokens.is_empty() { Value::Null } else { Value::Object(tokens) };
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
        "lora_dropout": config.dropout,
        "target_modules": targets,
        "exclude_modules": excluded,
        "layers_to_transform": or_null(&config.layers_to_transform),
        "layers_pattern": or_null(&config.layers_pattern),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "use_rslora": config.scaling == Scaling::AlphaOverSqrtRank,
        "use_dora": config.dora,
        "lora_bias": config.lora_bias,
        "bias": bias,
        "trainable_token_indices": tokens,
        "modules_to_save": or_null(&config.modules_to_save),
        "fan_in_fan_out": false,
        "init_lora_weights": true, // the weight is as it always was
    })
}

/// PEFT tells an empty list from none in places where it means none.
fn or_null<T: Clone + Into<Value>>(list: &[T]) -> Value {
    if list.is_empty() { Value::Null } else { Value::from(list) }
}

/// A whole number without a point: several readers of the format take `lora_alpha` as an integer.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 { json!(value as i64) } else { json!(value) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(fields: Value) -> Result<LoraConfig> {
        let mut all =
            json!({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"]});
        let all = all.as_object_mut().expect("an object");
        all.extend(fields.as_object().expect("an object").clone());
        parse(Path::new(CONFIG_FILE), all)
    }

    #[test]
    fn target_rules_come_back_as_they_were_written() {
        let mut config = LoraConfig::new(4, 8.0);
        for targets in [
            TargetModules::AllLinear,
            TargetModules::Pattern(".*q".to_owned()),
            TargetModules::names(["q", "k"]),
        ] {
            for excluded in [
                None,
                Some(ExcludeModules::Pattern(".*q".to_owned())),
                Some(ExcludeModules::names(["0.q"])),
            ] {
                config.target_modules = targets.clone();
                config.exclude_modules = excluded;
                let json = to_json(&config, &AdapterInfo::default());
                assert_eq!(read(json).unwrap(), config);
            }
        }
        config.layers_to_transform = vec![2, 0];
        config.layers_pattern = vec!["h".to_owned(), "layers".to_owned()];
        assert_eq!(read(to_json(&config, &AdapterInfo::default())).unwrap(), config);
    }

    #[test]
    fn target_rules_in_every_form_that_peft_writes() {
        let config = read(json!({
            "target_modules": "ALL-linear",
            "exclude_modules": "",
            "layers_to_transform": 3,
            "layers_pattern": "h",
        }));
        let config = config.unwrap();
        assert_eq!(config.target_modules, TargetModules::AllLinear);
        assert_eq!(config.exclude_modules, Some(ExcludeModules::Names(Vec::new())));
        assert_eq!(
            (config.layers_to_transform, config.layers_pattern),
            (vec![3], vec!["h".into()])
        );
        let none =
            json!({"exclude_modules": null, "layers_to_transform": null, "layers_pattern": ""});
        let config = read(none).unwrap();
        assert_eq!(config.exclude_modules, None);
        assert!(config.layers_to_transform.is_empty() && config.layers_pattern.is_empty());
        for (field, value) in [
            ("exclude_modules", json!([1])),
            ("layers_to_transform", json!([0, -1])),
            ("layers_to_transform", json!(1.5)),
            ("layers_pattern", json!(0)),
        ] {
            let message = read(json!({field: value})).unwrap_err().to_string();
            assert!(message.contains(field) && message.contains("null, "), "{message}");
        }
    }
}
