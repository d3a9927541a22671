//! `config.json`, in the spellings of transformers 4 and 5.

use std::fs;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};

use super::{CONFIG_FILE, GENERATION_CONFIG_FILE};
use crate::config::{
    AttentionBias, ConfigProblem, DecoderConfig, ExpertsConfig, LARGEST, MOST_EXPERTS, MOST_LAYERS,
    RopeScaling, SlidingWindow,
};
use crate::error::{Error, Result};
use crate::family::{BiasRule, FAMILIES, Family, WindowRule};
use crate::rope::yarn_attention_factor;
use crate::weights::WeightDtype;

/// The fields that are read. What is absent has the default of transformers' class for the family,
/// except the sizes, which must be there.
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
    rope_theta: Option<f64>,        // transformers 4
    rope_scaling: Option<Value>,    // transformers 4
    rope_parameters: Option<Value>, // transformers 5
    original_max_position_embeddings: Option<usize>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    num_experts_per_tok: Option<usize>,
    norm_topk_prob: Option<bool>,
    decoder_sparse_step: Option<usize>,
    attention_dropout: Option<f64>,
    router_jitter_noise: Option<f64>,
    mlp_only_layers: Option<Vec<usize>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)] // each of the others would change the angles
struct RopeParameters {
    rope_theta: Option<f64>,
    rope_type: Option<String>,
    r#type: Option<String>, // the older name; many files have both
    factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    attention_factor: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    truncate: Option<bool>,
    partial_rotary_factor: Option<f64>,
}

/// Reads `config.json` of a folder, and the end tokens of `generation_config.json` where there is one.
///
/// # Errors
/// When the file is missing, is no JSON object, lacks a size, has sizes that do not fit each other,
/// or describes a model that this crate does not have (another `model_type`, activation or RoPE).
pub fn read_config(folder: impl AsRef<Path>) -> Result<DecoderConfig> {
    let path = folder.as_ref().join(CONFIG_FILE);
    let (text, fields) = read_json(&path)?;
    let family = match fields.get("model_type") {
        Some(Value::String(name)) => Family::named(name)
            .ok_or_else(|| Error::unsupported(&path, "model_type", name, Family::names()))?,
        _ => {
            return Err(Error::malformed(&path, "model_type", "a name such as \"llama\"", "none"));
        }
    };
    let file =
        File::deserialize(&fields).map_err(|source| type_error(&path, &text, &fields, source))?;
    let reader = Reader { path: &path, family, file, fields };
    let mut config = reader.config()?;
    if let Some(ConfigProblem { field, expected, found }) = config.problem() {
        return Err(Error::malformed(&path, field, expected, found));
    }
    add_generation_ends(folder.as_ref(), &mut config)?;
    Ok(config)
}

/// A file of JSON as text and as a value.
fn read_json(path: &Path) -> Result<(String, Value)> {
    let expected = "a JSON object";
    let text = read_text(path, expected)?;
    let value = serde_json::from_str(&text).map_err(|source| {
        Error::malformed(path, "the file", expected, format!("an error: {source}"))
    })?;
    Ok((text, value))
}

/// A file of text; `expected` says what kind.
pub(super) fn read_text(path: &Path, expected: &str) -> Result<String> {
    let bytes = fs::read(path).map_err(|source| Error::io(path, source))?;
    String::from_utf8(bytes).map_err(|source| {
        let place = source.utf8_error().valid_up_to();
        Error::malformed(path, "the file", expected, format!("no UTF-8 from byte {place} on"))
    })
}

/// A field that has another type, with its name and its line.
fn type_error(path: &Path, text: &str, fields: &Value, source: serde_json::Error) -> Error {
    // serde names no field, so each is read by itself until one has the same complaint; what is read
    // from a value has no line.
    let complaint = source.to_string();
    let is_wrong = |(name, value): &(&String, &Value)| {
        let alone = json!({ name.as_str(): value });
        File::deserialize(&alone).is_err_and(|error| error.to_string() == complaint)
    };
    let name = fields.as_object().and_then(|fields| fields.iter().find(is_wrong));
    let found = match serde_json::from_str::<File>(text) {
        Err(located) if located.to_string().starts_with(&complaint) => located.to_string(),
        _ => complaint.clone(),
    };
    match name.filter(|_| !complaint.starts_with("missing field")) {
        Some((name, _)) => Error::malformed(path, name, "a value of another type", found),
        None => Error::malformed(path, "the file", "the fields of a decoder", found),
    }
}

/// A config file on its way to a [`DecoderConfig`].
struct Reader<'a> {
    path: &'a Path,
    family: &'static Family,
    file: File,
    /// The same once more, for fields whose name depends on the family.
    fields: Value,
}

impl Reader<'_> {
    fn config(&self) -> Result<DecoderConfig> {
        let (file, defaults, path) = (&self.file, &self.family.defaults, self.path);
        self.check_supported()?;
        if !(1..=MOST_LAYERS).contains(&file.num_hidden_layers) {
            let (expected, found) = (format!("1 to {MOST_LAYERS}"), file.num_hidden_layers);
            return Err(Error::malformed(path, "num_hidden_layers", expected, found.to_string()));
        }
        let heads = file.num_attention_heads;
        let head_dim = file.head_dim.or(defaults.head_dim);
        let max_position_embeddings =
            file.max_position_embeddings.unwrap_or(defaults.max_position_embeddings);
        let (rope_theta, rope_scaling) = self.rope(max_position_embeddings)?;
        Ok(DecoderConfig {
            family: self.family,
            vocab_size: file.vocab_size,
            hidden_size: file.hidden_size,
            intermediate_size: file.intermediate_size,
            num_hidden_layers: file.num_hidden_layers,
            num_attention_heads: heads,
            num_key_value_heads: match self.is_absent("num_key_value_heads") {
                true => defaults.num_key_value_heads.unwrap_or(heads),
                false => file.num_key_value_heads.unwrap_or(heads), // null: as many as query heads
            },
            head_dim: head_dim.unwrap_or(file.hidden_size.checked_div(heads).unwrap_or(0)),
            rms_norm_eps: file.rms_norm_eps.unwrap_or(defaults.rms_norm_eps),
            rope_theta,
            rope_scaling,
            max_position_embeddings,
            attention_bias: match self.family.attention_bias {
                BiasRule::Always(bias) => bias,
                BiasRule::Asked if file.attention_bias == Some(true) => AttentionBias::All,
                BiasRule::Asked => AttentionBias::None,
            },
            mlp_bias: self.family.has_mlp_bias && file.mlp_bias.unwrap_or(false),
            qk_norm: self.family.qk_norm,
            sliding_window: self.window()?,
            experts: self.experts()?,
            tie_word_embeddings: file.tie_word_embeddings.unwrap_or(false),
            initializer_range: file.initializer_range.unwrap_or(0.02),
            bos_token_id: match self.is_absent("bos_token_id") {
                true => defaults.bos_and_eos.map(|(bos, _)| bos),
                false => token_ids(path, "bos_token_id", &file.bos_token_id)?.first().copied(),
            },
            eos_token_ids: match self.is_absent("eos_token_id") {
                true => defaults.bos_and_eos.map(|(_, eos)| eos).into_iter().collect(),
                false => token_ids(path, "eos_token_id", &file.eos_token_id)?,
            },
        })
    }

    /// Whether the file does not have the field; null is something else.
    fn is_absent(&self, name: &str) -> bool {
        self.fields.get(name).is_none()
    }

    fn check_supported(&self) -> Result<()> {
        let (file, path) = (&self.file, self.path);
        let is_silu = |name: &str| ["silu", "swish"].contains(&name); // one function, two names
        if let Some(activation) = file.hidden_act.as_deref().filter(|name| !is_silu(name)) {
            return Err(Error::unsupported(path, "hidden_act", activation, "silu"));
        }
        // Where it is false, transformers lets tokens see those after them.
        let is_causal = self.fields.get("is_causal").filter(|value| !value.is_null());
        if let Some(value) = is_causal.filter(|value| **value != json!(true)) {
            return Err(Error::unsupported(path, "is_causal", value.to_string(), "true"));
        }
        if file.quantization_config.as_ref().is_some_and(|value| !value.is_null()) {
            let supported = "none: f32, f16 or bf16 weights";
            return Err(Error::unsupported(path, "quantization_config", "of any kind", supported));
        }
        // Both act in training only, where their absence would go unnoticed.
        for (name, value) in [
            ("attention_dropout", file.attention_dropout),
            ("router_jitter_noise", file.router_jitter_noise),
        ] {
            if let Some(value) = value.filter(|value| *value != 0.0) {
                return Err(Error::unsupported(path, name, value.to_string(), "0"));
            }
        }
        if let Some(factor) = file.partial_rotary_factor.filter(|factor| *factor != 1.0) {
            let found = factor.to_string();
            return Err(Error::unsupported(path, "partial_rotary_factor", found, "1"));
        }
        Ok(())
    }

    /// The parameters and the field that has them. As transformers 5 does: the older field wins where a
    /// file has both, unless it is empty.
    fn rope_parameters(&self) -> Result<(&'static str, RopeParameters)> {
        let is_empty = |value: &&Value| value.as_object().is_some_and(serde_json::Map::is_empty);
        let older = self.file.rope_scaling.as_ref().filter(|value| !is_empty(value));
        let (field, value) = match (older, &self.file.rope_parameters) {
            (Some(value), _) => ("rope_scaling", value),
            (None, Some(value)) => ("rope_parameters", value),
            (None, None) => return Ok(("rope_scaling", RopeParameters::default())),
        };
        let Some(value) = value.as_object() else {
            return Err(Error::malformed(self.path, field, "an object", value.to_string()));
        };
        let mut value = value.clone();
        // What is null is absent, whatever its name. `finetuned` tells how a model was made.
        value.retain(|name, value| !value.is_null() && name != "finetuned");
        // Before the fields are looked at, which are others for other types.
        let kind = value.get("rope_type").or(value.get("type")).and_then(Value::as_str);
        if let Some(kind) = kind.filter(|kind| !ROPE_TYPES.contains(kind)) {
            let (what, supported) = (format!("rope_type of {field}"), ROPE_TYPES.join(", "));
            return Err(Error::unsupported(self.path, what, kind, supported));
        }
        let rope = RopeParameters::deserialize(Value::Object(value)).map_err(|source| {
            let found = format!("an error: {source}");
            Error::malformed(self.path, field, "the fields of its rope_type", found)
        })?;
        if let Some(factor) = rope.partial_rotary_factor.filter(|factor| *factor != 1.0) {
            let (what, found) = (format!("partial_rotary_factor of {field}"), factor.to_string());
            return Err(Error::unsupported(self.path, what, found, "1"));
        }
        Ok((field, rope))
    }

    /// theta, and what stretches the frequencies.
    fn rope(&self, longest: usize) -> Result<(f64, RopeScaling)> {
        let (field, rope) = self.rope_parameters()?;
        let theta = rope.rope_theta.or(self.file.rope_theta);
        let theta = theta.unwrap_or(self.family.defaults.rope_theta);
        let number = |name: &str, value: Option<f64>| match value {
            Some(value) if value.is_finite() && value > 0.0 => Ok(value),
            _ => {
                let expected = "a finite number above 0 for this rope_type";
                let found = value.map_or("none".to_owned(), |value| value.to_string());
                Err(Error::malformed(self.path, format!("{name} of {field}"), expected, found))
            }
        };
        // Below 1 too, which transformers warns of and computes.
        let factor = || number("factor", rope.factor);
        let original = self.file.original_max_position_embeddings;
        let original = original.or(rope.original_max_position_embeddings).unwrap_or(longest);
        if original == 0 {
            let name = "original_max_position_embeddings";
            return Err(Error::malformed(self.path, name, "a number above 0", "0"));
        }
        let kind = rope.rope_type.as_ref().or(rope.r#type.as_ref());
        let scaling = match kind.map_or("default", String::as_str) {
            "linear" => RopeScaling::Linear { factor: factor()? },
            "dynamic" => RopeScaling::Dynamic { factor: factor()? },
            "llama3" => {
                let low = number("low_freq_factor", rope.low_freq_factor)?;
                let high = number("high_freq_factor", rope.high_freq_factor)?;
                if high <= low {
                    let expected = format!("a number above low_freq_factor, {low}");
                    let found = high.to_string();
                    let place = format!("high_freq_factor of {field}");
                    return Err(Error::malformed(self.path, place, expected, found));
                }
                RopeScaling::Llama3 {
                    factor: factor()?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_max_position_embeddings: original,
                }
            }
            "yarn" => {
                let implied = longest as f64 / original as f64;
                let factor = number("factor", rope.factor.or(Some(implied)))?;
                let mscales = rope.mscale.zip(rope.mscale_all_dim);
                let mscales = mscales.filter(|(one, other)| *one != 0.0 && *other != 0.0);
                let attention = rope.attention_factor;
                let attention = attention.unwrap_or(yarn_attention_factor(factor, mscales));
                RopeScaling::Yarn {
                    factor,
                    original_max_position_embeddings: original,
                    beta_fast: number("beta_fast", rope.beta_fast.or(Some(32.0)))?,
                    beta_slow: number("beta_slow", rope.beta_slow.or(Some(1.0)))?,
                    attention_factor: number("attention_factor", Some(attention))?,
                    truncate: rope.truncate.unwrap_or(true),
                }
            }
            _ => RopeScaling::None, // "default": the others were refused
        };
        Ok((theta, scaling))
    }

    fn window(&self) -> Result<Option<SlidingWindow>> {
        let (file, layers) = (&self.file, self.file.num_hidden_layers);
        let used = file.use_sliding_window.unwrap_or(false);
        let first = match self.family.window {
            WindowRule::Never => return Ok(None),
            WindowRule::AllLayers => 0,
            WindowRule::AllLayersIfUsed if used => 0,
            WindowRule::UpperLayersIfUsed if used => file.max_window_layers.unwrap_or(28),
            _ => return Ok(None),
        };
        // Null is not the same as absent here.
        let width = match self.fields.get("sliding_window") {
            Some(Value::Null) => return Ok(None),
            Some(width) => width.as_u64().and_then(|width| usize::try_from(width).ok()),
            None => match self.family.defaults.sliding_window {
                Some(width) => Some(width),
                None => return Ok(None),
            },
        };
        let Some(width) = width.filter(|width| *width > 0) else {
            let found = self.fields["sliding_window"].to_string();
            let expected = "a number of positions above 0, or null";
            return Err(Error::malformed(self.path, "sliding_window", expected, found));
        };
        let upper = self.family.window == WindowRule::UpperLayersIfUsed;
        let layers: Vec<bool> = match file.layer_types.as_ref().filter(|_| upper) {
            None => (0..layers).map(|layer| layer >= first).collect(),
            Some(types) if types.len() != layers => {
                let expected = format!("one for each of {layers} layers");
                let found = types.len().to_string();
                return Err(Error::malformed(self.path, "layer_types", expected, found));
            }
            Some(types) => types
                .iter()
                .map(|kind| match kind.as_str() {
                    "sliding_attention" => Ok(true),
                    "full_attention" => Ok(false),
                    other => {
                        let supported = "full_attention, sliding_attention";
                        Err(Error::unsupported(self.path, "layer_types", other, supported))
                    }
                })
                .collect::<Result<_>>()?,
        };
        Ok(layers.contains(&true).then_some(SlidingWindow { width, layers }))
    }

    fn experts(&self) -> Result<Option<ExpertsConfig>> {
        let Some(names) = self.family.experts else { return Ok(None) };
        let (file, defaults) = (&self.file, &self.family.defaults);
        let size = |name: &str, default: Option<usize>| {
            let value = match self.fields.get(name) {
                None | Some(Value::Null) => default,
                Some(value) => value.as_u64().and_then(|value| usize::try_from(value).ok()),
            };
            value.filter(|value| (1..=LARGEST).contains(value)).ok_or_else(|| {
                let found = self.fields.get(name).map_or("none".to_owned(), Value::to_string);
                Error::malformed(self.path, name, format!("1 to {LARGEST}"), found)
            })
        };
        // Each family had a name of its own; transformers 5 writes one for all of them.
        let name = match self.fields.get(names.count) {
            None => ANY_COUNT,
            Some(_) => names.count,
        };
        let count = size(name, Some(defaults.num_experts))?;
        let per_token = file.num_experts_per_tok.unwrap_or(defaults.num_experts_per_tok);
        if !(1..=count).contains(&per_token) {
            let expected = format!("1 to {} = {count}", names.count);
            let found = per_token.to_string();
            return Err(Error::malformed(self.path, "num_experts_per_tok", expected, found));
        }
        if count.saturating_mul(file.num_hidden_layers) > MOST_EXPERTS {
            let expected = format!("at most {MOST_EXPERTS} experts in all layers");
            let found = format!("{count} in each of {}", file.num_hidden_layers);
            return Err(Error::malformed(self.path, names.count, expected, found));
        }
        let step = file.decoder_sparse_step.unwrap_or(1);
        if step == 0 {
            return Err(Error::malformed(self.path, "decoder_sparse_step", "above 0", "0"));
        }
        let dense = file.mlp_only_layers.as_deref().unwrap_or_default();
        let has_experts =
            |layer: usize| !dense.contains(&layer) && (layer + 1).is_multiple_of(step);
        let every_layer = names.always_normalised; // Mixtral asks for neither of the two
        let layers: Vec<bool> =
            (0..file.num_hidden_layers).map(|layer| every_layer || has_experts(layer)).collect();
        Ok(layers.contains(&true).then_some(ExpertsConfig {
            count,
            per_token,
            intermediate_size: size(names.intermediate_size, defaults.expert_intermediate_size)?,
            normalised: names.always_normalised || file.norm_topk_prob.unwrap_or(false),
            layers,
        }))
    }
}

const ROPE_TYPES: [&str; 5] = ["default", "linear", "dynamic", "llama3", "yarn"];
const ANY_COUNT: &str = "num_local_experts";

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
    let (_, value) = read_json(&path)?;
    for id in token_ids(&path, "eos_token_id", &value.get("eos_token_id").cloned())? {
        if !config.eos_token_ids.contains(&id) {
            config.eos_token_ids.push(id);
        }
    }
    Ok(())
}

/// The content of `config.json` for a decoder, in spellings that transformers 4 and 5 both read.
///
/// # Errors
/// When no family's `config.json` can say all that the config does: frequencies that are divided as a
/// GGUF file lists them, or switches that no family has together.
pub fn config_to_json(config: &DecoderConfig, dtype: WeightDtype) -> Result<Value> {
    let family = match config.family.suits(config) {
        true => config.family,
        false => FAMILIES.iter().find(|family| family.suits(config)).ok_or_else(|| {
            let found = format!("{config:?}");
            let supported = "the switches of one of the families together";
            Error::unsupported(CONFIG_FILE, "a decoder", found, supported)
        })?,
    };
    let mut json = json!({
        "architectures": [family.architecture],
        "model_type": family.name,
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
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        // As transformers writes it: its generate() takes the first of a list without a look.
        "eos_token_id": match config.eos_token_ids[..] {
            [] => Value::Null,
            [id] => id.into(),
            _ => config.eos_token_ids.clone().into(),
        },
        "torch_dtype": dtype.torch_name(),
    });
    let fields = json.as_object_mut().expect("it was just written as an object");
    if let Some(scaling) = scaling_to_json(&config.rope_scaling)? {
        fields.insert("rope_scaling".into(), scaling);
    }
    if family.attention_bias == BiasRule::Asked {
        let bias = config.attention_bias == AttentionBias::All;
        fields.insert("attention_bias".into(), bias.into());
    }
    if family.has_mlp_bias {
        fields.insert("mlp_bias".into(), config.mlp_bias.into());
    }
    let width = config.sliding_window.as_ref().map(|window| window.width);
    match family.window {
        WindowRule::Never => {}
        WindowRule::AllLayers => {
            fields.insert("sliding_window".into(), width.into());
        }
        WindowRule::AllLayersIfUsed | WindowRule::UpperLayersIfUsed => {
            fields.insert("use_sliding_window".into(), width.is_some().into());
            fields.insert("sliding_window".into(), width.into());
        }
    }
    if family.window == WindowRule::UpperLayersIfUsed {
        let kind = |layer| match config.window(layer) {
            Some(_) => "sliding_attention",
            None => "full_attention",
        };
        let kinds: Vec<_> = (0..config.num_hidden_layers).map(kind).collect();
        let first = (0..kinds.len()).find(|layer| config.window(*layer).is_some());
        fields.insert("layer_types".into(), kinds.into());
        fields.insert("max_window_layers".into(), first.unwrap_or(config.num_hidden_layers).into());
    }
    if let Some(names) = family.experts {
        if let Some(experts) = &config.experts {
            fields.insert(names.count.into(), experts.count.into());
            fields.insert(names.intermediate_size.into(), experts.intermediate_size.into());
            fields.insert("num_experts_per_tok".into(), experts.per_token.into());
        }
        if !names.always_normalised {
            let layers = 0..config.num_hidden_layers;
            let dense = layers.filter(|layer| config.experts(*layer).is_none());
            let normalised = config.experts.as_ref().is_some_and(|experts| experts.normalised);
            fields.insert("norm_topk_prob".into(), normalised.into());
            fields.insert("decoder_sparse_step".into(), 1.into());
            fields.insert("mlp_only_layers".into(), dense.collect::<Vec<_>>().into());
        }
    }
    Ok(json)
}

fn scaling_to_json(scaling: &RopeScaling) -> Result<Option<Value>> {
    Ok(Some(match scaling {
        RopeScaling::None => return Ok(None),
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Dynamic { factor } => json!({"rope_type": "dynamic", "factor": factor}),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_max_position_embeddings,
        }),
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            beta_fast,
            beta_slow,
            attention_factor,
            truncate,
        } => json!({
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original_max_position_embeddings,
            "beta_fast": beta_fast,
            "beta_slow": beta_slow,
            "attention_factor": attention_factor,
            "truncate": truncate,
        }),
        RopeScaling::Divided { .. } => {
            let found = "factors of each frequency, as a GGUF file lists them";
            let supported = "llama3's parameters, from which such factors are made";
            return Err(Error::unsupported(CONFIG_FILE, "rope_scaling", found, supported));
        }
    }))
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
        assert_eq!((config.bos_token_id, &config.eos_token_ids[..]), (Some(1), &[2][..]));
        let none = read(r#", "eos_token_id": null, "bos_token_id": null"#).unwrap();
        assert_eq!((none.bos_token_id, none.eos_token_ids), (None, vec![]));
    }

    #[test]
    fn both_spellings_of_theta_are_read() {
        assert_eq!(read(r#", "rope_theta": 5.0"#).unwrap().rope_theta, 5.0);
        let new = read(r#", "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}"#);
        assert_eq!(new.unwrap().rope_theta, 7.0);
    }

    #[test]
    fn both_names_of_the_type_of_scaling_may_be_there() {
        let linear = RopeScaling::Linear { factor: 4.0 };
        for names in [r#""type": "linear""#, r#""rope_type": "linear", "type": "linear""#] {
            let text = format!(r#", "rope_scaling": {{{names}, "factor": 4.0}}"#);
            assert_eq!(read(&text).unwrap().rope_scaling, linear);
        }
        assert_eq!(read(r#", "rope_scaling": null"#).unwrap().rope_scaling, RopeScaling::None);
    }

    #[test]
    fn what_says_nothing_about_the_angles_is_passed_over() {
        let mistral = r#", "rope_scaling": {"factor": 2.0, "finetuned": true, "type": "yarn",
            "rope_type": null, "long_factor": null, "original_max_position_embeddings": 1024}"#;
        let expected = mistral
            .replace(r#""finetuned": true, "#, "")
            .replace(r#""rope_type": null, "long_factor": null, "#, "");
        let rope = |text: &str| read(text).unwrap().rope_scaling;
        assert!(matches!(rope(mistral), RopeScaling::Yarn { factor: 2.0, .. }));
        assert_eq!(rope(mistral), rope(&expected));
    }

    #[test]
    fn an_empty_older_field_loses() {
        let linear = r#""rope_parameters": {"rope_type": "linear", "factor": 4.0}"#;
        let four = RopeScaling::Linear { factor: 4.0 };
        let two = RopeScaling::Linear { factor: 2.0 };
        for (older, expected) in
            [("{}", four.clone()), ("null", four), (r#"{"type": "linear", "factor": 2.0}"#, two)]
        {
            let text = format!(r#", "rope_scaling": {older}, {linear}"#);
            assert_eq!(read(&text).unwrap().rope_scaling, expected, "{older}");
        }
        assert_eq!(read(r#", "rope_scaling": {}"#).unwrap().rope_scaling, RopeScaling::None);
    }

    #[test]
    fn factors_below_one_are_read() {
        for kind in ["linear", "dynamic", "yarn"] {
            let text = format!(r#", "rope_scaling": {{"rope_type": "{kind}", "factor": 0.5}}"#);
            let scaling = read(&text).unwrap().rope_scaling;
            assert!(format!("{scaling:?}").contains("factor: 0.5"), "{scaling:?}");
        }
        let llama_3 = r#", "rope_scaling": {"rope_type": "llama3", "factor": 0.5,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0}"#;
        let scaling = read(llama_3).unwrap().rope_scaling;
        assert!(matches!(scaling, RopeScaling::Llama3 { factor: 0.5, .. }));
    }

    #[test]
    fn silu_has_two_names() {
        let other = read(r#", "hidden_act": "swish", "is_causal": null"#).unwrap();
        assert_eq!(other, read(r#", "hidden_act": "silu", "is_causal": true"#).unwrap());
    }

    #[test]
    fn end_tokens_are_written_as_transformers_reads_them() {
        for written in ["null", "2", "[2,5]"] {
            let config = read(&format!(r#", "eos_token_id": {written}"#)).unwrap();
            let json = config_to_json(&config, WeightDtype::F32).unwrap();
            assert_eq!(json["eos_token_id"].to_string(), written);
        }
    }

    #[test]
    fn null_key_heads_are_as_many_as_query_heads() {
        for family in ["llama", "qwen2", "mistral"] {
            let folder = tempfile::tempdir().unwrap();
            let text = LLAMA.replace("llama", family) + r#", "num_key_value_heads": null}"#;
            fs::write(folder.path().join(CONFIG_FILE), text).unwrap();
            assert_eq!(read_config(folder.path()).unwrap().num_key_value_heads, 6, "{family}");
        }
    }

    #[test]
    fn switches_that_a_family_cannot_say_are_written_under_another_or_refused() {
        let config = |family: &str, rest: &str| {
            let folder = tempfile::tempdir().unwrap();
            let sizes = r#", "num_key_value_heads": 3"#;
            let text = LLAMA.replace("llama", family) + sizes + rest + "}";
            fs::write(folder.path().join(CONFIG_FILE), text).unwrap();
            read_config(folder.path()).unwrap()
        };
        let written = |config: &DecoderConfig| config_to_json(config, WeightDtype::F32);
        let mut mistral = config("mistral", "");
        mistral.num_hidden_layers = 2;
        mistral.sliding_window = Some(SlidingWindow { width: 4, layers: vec![true, false] });
        assert!(written(&mistral).is_err(), "no family has windows in some layers without biases");
        let mut mixtral = config("mixtral", "");
        mixtral.experts.as_mut().unwrap().normalised = false;
        assert!(written(&mixtral).is_err());
        let mut dense = config("qwen3_moe", r#", "mlp_only_layers": [0]"#);
        assert_eq!(written(&dense).unwrap()["model_type"], "qwen3_moe");
        dense.experts = config("qwen3_moe", "").experts;
        dense.experts.as_mut().unwrap().layers.clear(); // too short: as if none had any
        assert_eq!(written(&dense).unwrap()["mlp_only_layers"], json!([0]));
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
            (r#", "rope_scaling": {"rope_type": "longrope"}"#, "longrope"),
            (r#", "rope_parameters": {"type": "proportional"}"#, "proportional"),
            (r#", "is_causal": false"#, "is_causal 'false'"),
            (r#", "partial_rotary_factor": 0.5"#, "0.5"),
            (r#", "attention_dropout": 0.1"#, "attention_dropout '0.1'"),
            (r#", "router_jitter_noise": 0.2"#, "router_jitter_noise '0.2'"),
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
        // Numbers to the last bit: a reader of JSON may take a shorter way that misses it.
        for eps in ["1e-45", "1.2345678901234567e-5", "0.1"] {
            let rest = r#", "eos_token_id": [2, 5], "tie_word_embeddings": true"#;
            let config = read(&format!(r#"{rest}, "rms_norm_eps": {eps}"#)).unwrap();
            assert_eq!(config.rms_norm_eps, eps.parse::<f64>().unwrap());
            let folder = tempfile::tempdir().unwrap();
            let json = config_to_json(&config, WeightDtype::F32).unwrap().to_string();
            fs::write(folder.path().join(CONFIG_FILE), json).unwrap();
            assert_eq!(read_config(folder.path()).unwrap(), config);
        }
    }
}
