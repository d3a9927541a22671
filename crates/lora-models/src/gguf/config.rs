//! The sizes of the decoder in a GGUF file, from its keys.

use std::f64::consts::PI;

use super::names::{self, Expert};
use super::reader::{GgufFile, ROPE_FREQS};
use crate::config::{
    AttentionBias, ConfigProblem, DecoderConfig, ExpertsConfig, LARGEST, MOST_EXPERTS, RopeScaling,
    WIDEST_HEAD,
};
use crate::error::{Error, Result};
use crate::family::{DENSE_WIDTH, ExpertNames, FAMILIES, Family};
use crate::rope::yarn_attention_factor;

const ARCHITECTURE: &str = "general.architecture";
/// These behind the architecture's name.
const EXPERTS: &str = "expert_count";
const HEADS: &str = "attention.head_count";
const KEY_HEADS: &str = "attention.head_count_kv";
const WIDTH: &str = "feed_forward_length";
const QKV: [&str; 3] = ["q_proj", "k_proj", "v_proj"];

/// llama.cpp's value where the key is absent.
const DEFAULT_ROPE_THETA: f64 = 10_000.0;
/// GGUF does not store it; every Llama's `config.json` has this one.
const INITIALIZER_RANGE: f64 = 0.02;
const MAX_SIZE: u32 = LARGEST as u32;

/// Tokens that end a text: of the text, of a turn, of a message that calls a tool.
const END_KEYS: [&str; 3] =
    ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

const END_OF_TURN_KEY: &str = "tokenizer.ggml.eot_token_id";
/// How the families write the end of a turn.
const ENDS_OF_TURNS: [&str; 2] = ["<|eot_id|>", "<|im_end|>"];

impl GgufFile {
    /// The sizes and switches of the model in this file.
    ///
    /// # Errors
    /// When the architecture is none of `llama`, `qwen2`, `qwen3` and `qwen3moe`, when the model needs
    /// something that this crate does not have (several files, experts that all tokens share), or when a
    /// key is missing or does not fit the others.
    pub fn config(&self) -> Result<DecoderConfig> {
        let family = self.family()?;
        self.refuse_what_the_decoder_lacks()?;

        let hidden_size = self.size(&self.key("embedding_length"))?;
        let num_attention_heads = self.query_heads()?;
        let num_key_value_heads = self.key_heads()?;
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            let expected = format!("a divisor of {}, {num_attention_heads}", self.key(HEADS));
            let found = num_key_value_heads.to_string();
            return Err(self.malformed_key(&self.key(KEY_HEADS), expected, found));
        }
        let vocab_size = self.vocab_size(hidden_size)?;
        let head_dim = self.head_dim(hidden_size, num_attention_heads)?;
        let num_hidden_layers = self.blocks()?;
        let max_position_embeddings = self.size(&self.key("context_length"))?;
        let experts = self.experts(family, num_hidden_layers)?;

        let config = DecoderConfig {
            family,
            vocab_size,
            hidden_size,
            // Which nothing has where all blocks have experts.
            intermediate_size: match &experts {
                Some(experts) if !self.metadata().contains_key(&self.key(WIDTH)) => {
                    experts.intermediate_size
                }
                _ => self.size(&self.key(WIDTH))?,
            },
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            rms_norm_eps: self.positive(&self.key("attention.layer_norm_rms_epsilon"), None)?,
            rope_theta: self.positive(&self.key("rope.freq_base"), Some(DEFAULT_ROPE_THETA))?,
            rope_scaling: self.rope_scaling(head_dim, max_position_embeddings)?,
            max_position_embeddings,
            attention_bias: match (self.has_bias(&["o_proj"]), self.has_bias(&QKV)) {
                (true, _) => AttentionBias::All,
                (false, true) => AttentionBias::QueryKeyValue,
                (false, false) => AttentionBias::None,
            },
            mlp_bias: self.has_bias(&["gate_proj", "up_proj", "down_proj"]),
            qk_norm: family.qk_norm,
            sliding_window: None, // llama.cpp has none for these architectures
            experts,
            tie_word_embeddings: !self.tensors().contains_key("lm_head.weight"),
            initializer_range: INITIALIZER_RANGE,
            bos_token_id: self.token_id("tokenizer.ggml.bos_token_id", vocab_size)?,
            eos_token_ids: self.end_tokens(vocab_size)?,
        };
        match config.problem() {
            None => Ok(config),
            Some(ConfigProblem { field, expected, found }) => {
                Err(Error::malformed(self.file_path(), field, expected, found))
            }
        }
    }

    pub(super) fn architecture(&self) -> Result<Option<&str>> {
        self.string(ARCHITECTURE)
    }

    /// The family whose tensors and keys this file has.
    fn family(&self) -> Result<&'static Family> {
        let architecture = self.required(ARCHITECTURE, self.architecture()?)?;
        let has_experts = self.expert_count()? > 0;
        if let Some(family) = Family::in_gguf(architecture, has_experts) {
            return Ok(family);
        }
        let path = self.file_path();
        if Family::in_gguf(architecture, !has_experts).is_some() {
            let supported = if has_experts { "0, a dense MLP" } else { "experts, 1 or more" };
            let found = self.expert_count()?.to_string();
            return Err(Error::unsupported(path, self.key(EXPERTS), found, supported));
        }
        let mut names: Vec<&str> =
            FAMILIES.iter().filter_map(|family| family.gguf_architecture).collect();
        names.sort_unstable();
        names.dedup();
        Err(Error::unsupported(path, ARCHITECTURE, architecture, names.join(", ")))
    }

    /// How the family of this file writes its experts, if it is one with experts.
    pub(super) fn expert_names(&self) -> Option<ExpertNames> {
        let architecture = self.architecture().ok()??;
        Family::in_gguf(architecture, self.expert_count().ok()? > 0)?.experts
    }

    /// The number of experts in a layer; 0 without.
    pub(super) fn expert_count(&self) -> Result<usize> {
        Ok(self.u32(&self.key(EXPERTS))?.unwrap_or_default() as usize)
    }

    fn experts(&self, family: &Family, layers: usize) -> Result<Option<ExpertsConfig>> {
        let Some(names) = family.experts else { return Ok(None) };
        let count = self.expert_count()?;
        if count > MOST_EXPERTS / layers.max(1) {
            let expected = format!("at most {MOST_EXPERTS} experts in all layers");
            return Err(self.malformed_key(&self.key(EXPERTS), expected, count.to_string()));
        }
        let stacks = self.tensors().iter().map(|(name, tensor)| (name, &tensor.info.shape));
        for (name, shape) in stacks {
            let naming = names::hugging_face(name, Some(names));
            if naming.is_some_and(|naming| naming.expert == Expert::All) {
                return Err(Error::malformed(
                    self.file_path(),
                    format!("tensor '{name}'"),
                    format!("a part for each of {count} experts, as the keys say"),
                    format!("the shape {shape:?}"),
                ));
            }
        }
        let used = self.key("expert_used_count");
        let per_token = self.size(&used)?;
        if per_token > count {
            let expected = format!("at most {}, {count}", self.key(EXPERTS));
            return Err(self.malformed_key(&used, expected, per_token.to_string()));
        }
        // As llama.cpp: a family whose experts have a width of their own has a key for it, and else the
        // width of all that a token goes through.
        let own = self.key("expert_feed_forward_length");
        let intermediate_size = match names.intermediate_size {
            DENSE_WIDTH => self.size(&self.key(WIDTH))?,
            _ if self.metadata().contains_key(&own) => self.size(&own)?,
            _ => self.size(&self.key(WIDTH))? / per_token,
        };
        Ok(Some(ExpertsConfig {
            count,
            per_token,
            intermediate_size,
            normalised: true, // which llama.cpp does for both architectures, whatever was trained
            layers: vec![true; layers],
        }))
    }

    /// A key that begins with the architecture's name, as most of a model's keys do.
    fn key(&self, name: &str) -> String {
        let architecture = self.architecture().ok().flatten().unwrap_or("llama");
        format!("{architecture}.{name}")
    }

    pub(super) fn query_heads(&self) -> Result<usize> {
        self.size(&self.key(HEADS))
    }

    pub(super) fn key_heads(&self) -> Result<usize> {
        let key = self.key(KEY_HEADS);
        if self.metadata().contains_key(&key) { self.size(&key) } else { self.query_heads() }
    }

    /// Each of these would run and give wrong numbers if it were passed over.
    fn refuse_what_the_decoder_lacks(&self) -> Result<()> {
        let key = "split.count";
        if let Some(files) = self.u32(key)?.filter(|&files| files > 1) {
            let supported = "one file; join the parts with llama-gguf-split --merge";
            return Err(Error::unsupported(self.file_path(), key, files.to_string(), supported));
        }
        if self.expert_count()? > 0 {
            self.refuse_other_experts()?;
        }
        let key = self.key("attention.causal");
        if self.bool(&key)? == Some(false) {
            let supported = "true; a text is written from left to right";
            return Err(Error::unsupported(self.file_path(), key, "false", supported));
        }
        // What a family does without these keys is the value beside each. An extrapolation below 0 is none, too.
        const EXTRAPOLATION: &str = "rope.scaling.yarn_ext_factor";
        let is_yarn = self.string(&self.key("rope.scaling.type"))? == Some("yarn");
        for (name, usual) in [
            ("attention.scale", 0.0),
            (EXTRAPOLATION, f64::from(u8::from(is_yarn))),
            ("rope.scaling.yarn_attn_factor", 1.0),
            ("rope.scaling.yarn_log_multiplier", 0.0),
        ] {
            let key = self.key(name);
            let is_usual = |number: f64| number == usual || name == EXTRAPOLATION && number < 0.0;
            if let Some(number) = self.f64(&key)?.filter(|number| !is_usual(*number)) {
                let supported = format!("{usual}, or no such key");
                let found = number.to_string();
                return Err(Error::unsupported(self.file_path(), key, found, supported));
            }
        }
        Ok(())
    }

    /// Experts that all tokens share, or that are chosen or weighted in another way, and blocks that have none.
    fn refuse_other_experts(&self) -> Result<()> {
        const SOFTMAX: u32 = 1; // llama.cpp's number for it; 0 is none said
        for (name, usual) in [
            ("expert_shared_count", &[0][..]),
            ("expert_gating_func", &[0, SOFTMAX]),
            ("expert_group_count", &[0, 1]),
            ("leading_dense_block_count", &[0]),
            ("interleave_moe_layer_step", &[0, 1]),
        ] {
            let key = self.key(name);
            if let Some(found) = self.u32(&key)?.filter(|number| !usual.contains(number)) {
                let supported = format!("{}, or no such key", usual[usual.len() - 1]);
                return Err(Error::unsupported(
                    self.file_path(),
                    key,
                    found.to_string(),
                    supported,
                ));
            }
        }
        let key = self.key("expert_weights_norm");
        if self.bool(&key)? == Some(false) {
            let supported = "true, or no such key";
            return Err(Error::unsupported(self.file_path(), key, "false", supported));
        }
        let key = self.key("expert_weights_scale");
        // 0 is none, too.
        if let Some(scale) = self.f64(&key)?.filter(|scale| ![0.0, 1.0].contains(scale)) {
            let supported = "1, or no such key";
            return Err(Error::unsupported(self.file_path(), key, scale.to_string(), supported));
        }
        Ok(())
    }

    /// What the keys and the tensor of factors say about longer texts.
    fn rope_scaling(&self, head_dim: usize, longest: usize) -> Result<RopeScaling> {
        let factor_key = self.key("rope.scaling.factor");
        // The older spelling of linear scaling; and llama.cpp takes a factor without a type as linear.
        let old = self.f64(&self.key("rope.scale_linear"))?;
        let factor = self.f64(&factor_key)?.or(old).filter(|factor| *factor != 0.0).unwrap_or(1.0);
        if !(factor.is_finite() && factor > 0.0) {
            let expected = "a finite number above 0";
            return Err(self.malformed_key(&factor_key, expected, factor.to_string()));
        }
        let type_key = self.key("rope.scaling.type");
        let scaling = match self.string(&type_key)? {
            Some("none") => RopeScaling::None,
            None | Some("linear") if factor == 1.0 => RopeScaling::None,
            None | Some("linear") => RopeScaling::Linear { factor },
            Some("yarn") => {
                let original = self.key("rope.scaling.original_context_length");
                let original = match self.u32(&original)? {
                    Some(_) => self.size(&original)?,
                    None => longest,
                };
                let number = |name: &str, default: f64| {
                    self.positive(&self.key(&format!("rope.scaling.{name}")), Some(default))
                };
                // llama.cpp multiplies the key into its own 1 + 0.1 ln(factor).
                let attention = number("attn_factor", 1.0)? * yarn_attention_factor(factor, None);
                RopeScaling::Yarn {
                    factor,
                    original_max_position_embeddings: original,
                    beta_fast: number("yarn_beta_fast", 32.0)?,
                    beta_slow: number("yarn_beta_slow", 1.0)?,
                    attention_factor: attention,
                    truncate: true,
                }
            }
            Some(other) => {
                let supported = "none, linear, yarn";
                return Err(Error::unsupported(self.file_path(), type_key, other, supported));
            }
        };
        // Factors of one were left out when the file was opened.
        let Some(tensor) = self.tensors().get(ROPE_FREQS) else { return Ok(scaling) };
        if scaling != RopeScaling::None {
            let supported = "one of the two, not both";
            let what = "a scaling of RoPE beside the tensor";
            return Err(Error::unsupported(self.file_path(), what, ROPE_FREQS, supported));
        }
        let place = format!("tensor '{ROPE_FREQS}'");
        if tensor.info.shape != [head_dim / 2] {
            let expected = format!("one factor for each of {} pairs of a head", head_dim / 2);
            let found = format!("the shape {:?}", tensor.info.shape);
            return Err(Error::malformed(self.file_path(), place, expected, found));
        }
        let factors = self.values(ROPE_FREQS, &tensor.info)?;
        if let Some(factor) = factors.iter().find(|factor| !(factor.is_finite() && **factor > 0.0))
        {
            let expected = "finite factors above 0";
            return Err(Error::malformed(self.file_path(), place, expected, factor.to_string()));
        }
        let theta = self.positive(&self.key("rope.freq_base"), Some(DEFAULT_ROPE_THETA))?;
        Ok(llama3_parameters(&factors, theta).unwrap_or(RopeScaling::Divided { factors }))
    }

    /// The size under `key`, which must be there.
    fn size(&self, key: &str) -> Result<usize> {
        match self.required(key, self.u32(key)?)? {
            size @ 1..=MAX_SIZE => Ok(size as usize),
            size => Err(self.malformed_key(
                key,
                format!("a size from 1 to {MAX_SIZE}"),
                size.to_string(),
            )),
        }
    }

    /// The finite number above 0 under `key`, or `default` where the key is absent.
    fn positive(&self, key: &str, default: Option<f64>) -> Result<f64> {
        let number = self.required(key, self.f64(key)?.or(default))?;
        if number.is_finite() && number > 0.0 {
            Ok(number)
        } else {
            Err(self.malformed_key(key, "a finite number above 0", number.to_string()))
        }
    }

    fn blocks(&self) -> Result<usize> {
        let key = self.key("block_count");
        let blocks = self.size(&key)?;
        // A loader lists every tensor of every block, so an absurd number must not reach it.
        if blocks > self.tensors().len() {
            let expected =
                format!("at most one block for each of {} tensors", self.tensors().len());
            return Err(self.malformed_key(&key, expected, blocks.to_string()));
        }
        Ok(blocks)
    }

    /// The width of a head; the decoder rotates all of it, so RoPE's width must be the same.
    fn head_dim(&self, hidden_size: usize, heads: usize) -> Result<usize> {
        let heads_key = self.key(HEADS);
        let key_length = self.key("attention.key_length");
        let rope_length = self.key("rope.dimension_count");
        let optional = |key: &str| self.u32(key)?.map(|_| self.size(key)).transpose();

        let (key, head_dim) = match (optional(&key_length)?, optional(&rope_length)?) {
            (Some(width), _) => (key_length, width),
            (None, Some(width)) => (rope_length.clone(), width),
            (None, None) if hidden_size.is_multiple_of(heads) => (heads_key, hidden_size / heads),
            (None, None) => {
                let length = self.key("embedding_length");
                let expected = format!("a divisor of {length}, {hidden_size}");
                return Err(self.malformed_key(&heads_key, expected, heads.to_string()));
            }
        };
        for other in [self.key("attention.value_length"), rope_length] {
            if let Some(width) = optional(&other)?.filter(|&width| width != head_dim) {
                let supported = format!("{head_dim}, the width of a head by {key}");
                let found = width.to_string();
                return Err(Error::unsupported(self.file_path(), other, found, supported));
            }
        }
        if !head_dim.is_multiple_of(2) || head_dim > WIDEST_HEAD {
            let expected = format!("an even width of a head, for RoPE, of at most {WIDEST_HEAD}");
            return Err(self.malformed_key(&key, expected, head_dim.to_string()));
        }
        Ok(head_dim)
    }

    /// The rows of the embedding. `llama.vocab_size` is not asked: not every file has it.
    fn vocab_size(&self, hidden_size: usize) -> Result<usize> {
        let place = "tensor 'token_embd.weight'";
        let expected = format!("a tensor of the shape [vocab_size, {hidden_size}]");
        match self.tensors().get("model.embed_tokens.weight").map(|tensor| &tensor.info.shape[..]) {
            Some(&[vocab_size, width]) if width == hidden_size => Ok(vocab_size),
            Some(shape) => {
                Err(Error::malformed(self.file_path(), place, expected, format!("{shape:?}")))
            }
            None => Err(Error::malformed(self.file_path(), place, expected, "none")),
        }
    }

    fn has_bias(&self, projections: &[&str]) -> bool {
        self.tensors().keys().any(|name| {
            name.strip_suffix(".bias")
                .and_then(|module| module.rsplit('.').next())
                .is_some_and(|projection| projections.contains(&projection))
        })
    }

    fn token_id(&self, key: &str, vocab_size: usize) -> Result<Option<u32>> {
        let id = self.u32(key)?;
        match id {
            Some(id) if id as usize >= vocab_size => {
                let expected = format!("a token below the vocabulary's size, {vocab_size}");
                Err(self.malformed_key(key, expected, id.to_string()))
            }
            _ => Ok(id),
        }
    }

    fn end_tokens(&self, vocab_size: usize) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        for key in END_KEYS {
            if let Some(id) = self.token_id(key, vocab_size)?
                && !ids.contains(&id)
            {
                ids.push(id);
            }
        }
        // Files of chat models often name the end of the text only; llama.cpp knows the end of a turn by
        // its text then, and a model that never stops helps nobody.
        if !self.metadata().contains_key(END_OF_TURN_KEY)
            && let Some(tokens) = self.strings("tokenizer.ggml.tokens")?
        {
            let ends = tokens.iter().take(vocab_size).zip(0..);
            let ends = ends.filter(|(token, _)| ENDS_OF_TURNS.contains(token));
            ids.extend(ends.map(|(_, id)| id).filter(|id| !ids.contains(id)).collect::<Vec<_>>());
        }
        Ok(ids)
    }
}

/// The parameters of Llama 3.1's and 3.2's scaling, if the factors were made from them: a `config.json`
/// can say parameters, and no factors.
fn llama3_parameters(factors: &[f32], theta: f64) -> Option<RopeScaling> {
    // The longest wavelengths are stretched by the whole factor.
    let factor = f64::from(factors.iter().copied().fold(1.0, f32::max));
    let (low, high, original) = (1.0, 4.0, 8192);
    let made = (0..factors.len()).map(|pair| {
        let wavelength = 2.0 * PI * theta.powf(pair as f64 / factors.len() as f64);
        let turns = original as f64 / wavelength;
        let smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0);
        1.0 / ((1.0 - smooth) / factor + smooth)
    });
    let fits = factors.iter().zip(made).all(|(a, b)| (f64::from(*a) - b).abs() <= 1e-4 * b);
    fits.then_some(RopeScaling::Llama3 {
        factor,
        low_freq_factor: low,
        high_freq_factor: high,
        original_max_position_embeddings: original,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::gguf::writer::Writer;

    /// Two blocks' worth of tensors; vocabulary 5, hidden size 12, 6 heads over 3, heads of 2.
    fn model() -> Writer {
        Writer::new()
            .key("general.architecture", "llama")
            .key("llama.embedding_length", 12_u32)
            .key("llama.feed_forward_length", 20_u32)
            .key("llama.block_count", 2_u32)
            .key("llama.attention.head_count", 6_u32)
            .key("llama.attention.layer_norm_rms_epsilon", 1e-5_f32)
            .key("llama.context_length", 64_u64)
            .f32s("token_embd.weight", &[5, 12], &[0.0; 60])
            .f32s("output_norm.weight", &[12], &[1.0; 12])
    }

    fn config(writer: Writer) -> Result<DecoderConfig> {
        GgufFile::open(writer.write().path())?.config()
    }

    fn malformed(writer: Writer, part: &str) {
        let error = config(writer).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Malformed { .. }), "{error}");
        assert!(error.to_string().contains(part), "{error}");
    }

    fn unsupported(writer: Writer, part: &str) {
        let error = config(writer).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains(part), "{error}");
    }

    #[test]
    fn absent_keys_have_llama_cpps_defaults() {
        let expected = DecoderConfig {
            family: &FAMILIES[0],
            vocab_size: 5,
            hidden_size: 12,
            intermediate_size: 20,
            num_hidden_layers: 2,
            num_attention_heads: 6,
            num_key_value_heads: 6,
            head_dim: 2,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::None,
            max_position_embeddings: 64,
            attention_bias: AttentionBias::None,
            mlp_bias: false,
            qk_norm: false,
            sliding_window: None,
            experts: None,
            tie_word_embeddings: true,
            initializer_range: 0.02,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
        };
        assert_eq!(config(model()).unwrap(), expected);
    }

    #[test]
    fn present_keys_win() {
        let config = config(
            model()
                .key("llama.attention.head_count_kv", 3_u32)
                .key("llama.attention.key_length", 4_u32)
                .key("llama.rope.dimension_count", 4_u32)
                .key("llama.rope.freq_base", 5e5_f32)
                .key("llama.rope.scaling.type", "none")
                .key("tokenizer.ggml.bos_token_id", 1_u32)
                .key("tokenizer.ggml.eos_token_id", 2_u32)
                .key("tokenizer.ggml.eot_token_id", 4_u32)
                .key("tokenizer.ggml.eom_token_id", 2_u32)
                .f32s("output.weight", &[5, 12], &[0.0; 60])
                .f32s("blk.1.attn_k.bias", &[12], &[0.0; 12])
                .f32s("blk.1.ffn_up.bias", &[20], &[0.0; 20]),
        )
        .unwrap();
        assert_eq!((config.num_key_value_heads, config.head_dim), (3, 4));
        assert_eq!(config.rope_theta, 5e5);
        assert_eq!((config.bos_token_id, config.eos_token_ids), (Some(1), vec![2, 4]));
        assert!(!config.tie_word_embeddings && config.mlp_bias);
        assert_eq!(config.attention_bias, AttentionBias::QueryKeyValue);
    }

    #[test]
    fn a_norms_bias_is_no_projections_bias() {
        let config = config(model().f32s("output_norm.bias", &[12], &[0.0; 12])).unwrap();
        assert!(config.attention_bias == AttentionBias::None && !config.mlp_bias);
    }

    #[test]
    fn rope_factors_of_one_are_left_out() {
        let scaling =
            |factor| config(model().f32s(ROPE_FREQS, &[1], &[factor])).unwrap().rope_scaling;
        assert_eq!(scaling(1.0), RopeScaling::None);
        assert_eq!(scaling(8.0), RopeScaling::Divided { factors: vec![8.0] });
        malformed(model().f32s(ROPE_FREQS, &[2], &[1.0, 8.0]), "each of 1 pairs");
        malformed(model().f32s(ROPE_FREQS, &[1], &[0.0]), "finite factors above 0");
        let both = model().f32s(ROPE_FREQS, &[1], &[8.0]).key("llama.rope.scaling.factor", 2_f32);
        unsupported(both, ROPE_FREQS);
    }

    /// As llama.cpp's convert_hf_to_gguf.py makes them for Llama 3.1 (theta 500,000, heads of 128).
    #[test]
    fn factors_of_llama_3_1_are_known_for_what_they_are() {
        let factors = |theta: f64, factor: f64| -> Vec<f32> {
            let frequency = |pair: i32| theta.powf(-f64::from(pair) / 64.0);
            let factor = |pair| {
                let wavelength = 2.0 * PI / frequency(pair);
                match wavelength {
                    short if short < 8192.0 / 4.0 => 1.0,
                    long if long > 8192.0 => factor,
                    _ => {
                        let smooth = (8192.0 / wavelength - 1.0) / 3.0;
                        1.0 / ((1.0 - smooth) / factor + smooth)
                    }
                }
            };
            (0..64).map(|pair| factor(pair) as f32).collect()
        };
        for factor in [8.0, 32.0] {
            let found = llama3_parameters(&factors(5e5, factor), 5e5);
            assert_eq!(
                found,
                Some(RopeScaling::Llama3 {
                    factor,
                    low_freq_factor: 1.0,
                    high_freq_factor: 4.0,
                    original_max_position_embeddings: 8192
                })
            );
            assert_eq!(llama3_parameters(&factors(5e5, factor), 1e4), None);
        }
    }

    #[test]
    fn scaling_has_three_spellings() {
        let scaling = |writer: Writer| config(writer).unwrap().rope_scaling;
        let linear = RopeScaling::Linear { factor: 4.0 };
        assert_eq!(scaling(model().key("llama.rope.scale_linear", 4_f32)), linear);
        assert_eq!(scaling(model().key("llama.rope.scaling.factor", 4_f32)), linear);
        let typed = model().key("llama.rope.scaling.type", "linear");
        assert_eq!(scaling(typed.key("llama.rope.scaling.factor", 4_f32)), linear);
        let none = model().key("llama.rope.scaling.type", "none");
        assert_eq!(scaling(none.key("llama.rope.scaling.factor", 4_f32)), RopeScaling::None);
        let yarn = model()
            .key("llama.rope.scaling.type", "yarn")
            .key("llama.rope.scaling.factor", 4_f32)
            .key("llama.rope.scaling.original_context_length", 16_u32);
        let RopeScaling::Yarn {
            factor, original_max_position_embeddings, attention_factor, ..
        } = scaling(yarn)
        else {
            panic!("another scaling")
        };
        assert_eq!((factor, original_max_position_embeddings), (4.0, 16));
        assert!((attention_factor - (1.0 + 0.1 * 4_f64.ln())).abs() < 1e-12);
    }

    #[test]
    fn an_end_of_turn_without_a_key_is_known_by_its_text() {
        let tokens = ["a", "<|im_end|>", "b", "<|eot_id|>", "c"];
        let ends = |writer: Writer| config(writer).unwrap().eos_token_ids;
        let file = || {
            model().key("tokenizer.ggml.tokens", tokens).key("tokenizer.ggml.eos_token_id", 3_u32)
        };
        assert_eq!(ends(file()), [3, 1]);
        assert_eq!(ends(file().key(END_OF_TURN_KEY, 4_u32)), [3, 4]);
    }

    #[test]
    fn qwens_have_keys_and_switches_of_their_own() {
        let qwen = |architecture: &str| {
            let key = |name: &str| format!("{architecture}.{name}");
            Writer::new()
                .key(ARCHITECTURE, architecture)
                .key(&key("embedding_length"), 12_u32)
                .key(&key("feed_forward_length"), 20_u32)
                .key(&key("block_count"), 1_u32)
                .key(&key("attention.head_count"), 6_u32)
                .key(&key("attention.key_length"), 8_u32)
                .key(&key("attention.layer_norm_rms_epsilon"), 1e-6_f32)
                .key(&key("context_length"), 64_u32)
                .f32s("token_embd.weight", &[5, 12], &[0.0; 60])
        };
        let two = config(qwen("qwen2").f32s("blk.0.attn_q.bias", &[48], &[0.0; 48])).unwrap();
        assert_eq!((two.family.name, two.qk_norm, two.head_dim), ("qwen2", false, 8));
        assert_eq!(two.attention_bias, AttentionBias::QueryKeyValue);
        let three = config(qwen("qwen3")).unwrap();
        assert_eq!((three.family.name, three.qk_norm), ("qwen3", true));
    }

    #[test]
    fn what_the_decoder_lacks_is_refused() {
        unsupported(model().key("split.count", 2_u16), "split.count");
        unsupported(model().key("llama.rope.scaling.type", "longrope"), "'longrope'");
        unsupported(
            model()
                .key("llama.rope.dimension_count", 4_u32)
                .key("llama.attention.key_length", 2_u32),
            "'4'",
        );
        unsupported(model().key("llama.attention.value_length", 4_u32), "value_length");
        unsupported(model().key("llama.attention.causal", false), "llama.attention.causal");
        for (key, usual) in [
            ("llama.attention.scale", 0.0_f32),
            ("llama.rope.scaling.yarn_ext_factor", 0.0),
            ("llama.rope.scaling.yarn_attn_factor", 1.0),
            ("llama.rope.scaling.yarn_log_multiplier", 0.0),
        ] {
            unsupported(model().key(key, usual + 0.5), key);
            assert!(config(model().key(key, usual)).is_ok(), "{key}");
        }
        let yarn = |extrapolation: f32| {
            model()
                .key("llama.rope.scaling.type", "yarn")
                .key("llama.rope.scaling.factor", 4_f32)
                .key("llama.rope.scaling.original_context_length", 16_u32)
                .key("llama.rope.scaling.yarn_ext_factor", extrapolation)
        };
        assert!(config(yarn(1.0)).is_ok() && config(yarn(-1.0)).is_ok());
        unsupported(yarn(0.0), "llama.rope.scaling.yarn_ext_factor");
        unsupported(
            Writer::new().key(ARCHITECTURE, "gemma"),
            "supported: llama, qwen2, qwen3, qwen3moe",
        );
    }

    /// One block of three experts of the width 8, without the number of those that a token goes through.
    fn experts(architecture: &str) -> Writer {
        let key = |name: &str| format!("{architecture}.{name}");
        let writer = Writer::new()
            .key(ARCHITECTURE, architecture)
            .key(&key("embedding_length"), 4_u32)
            .key(&key("feed_forward_length"), 8_u32)
            .key(&key("block_count"), 1_u32)
            .key(&key("attention.head_count"), 2_u32)
            .key(&key("attention.layer_norm_rms_epsilon"), 1e-5_f32)
            .key(&key("context_length"), 64_u32)
            .key(&key("expert_count"), 3_u32)
            .f32s("token_embd.weight", &[5, 4], &[0.0; 20]);
        ["gate", "up"].iter().fold(writer, |writer, name| {
            writer.f32s(&format!("blk.0.ffn_{name}_exps.weight"), &[3, 8, 4], &[0.0; 96])
        })
    }

    #[test]
    fn experts_are_those_of_the_family_that_has_some() {
        let two = "expert_used_count";
        let mixtral = config(experts("llama").key(&format!("llama.{two}"), 2_u32)).unwrap();
        let expected = ExpertsConfig {
            count: 3,
            per_token: 2,
            intermediate_size: 8,
            normalised: true,
            layers: vec![true],
        };
        assert_eq!((mixtral.family.name, mixtral.experts), ("mixtral", Some(expected.clone())));
        let qwen = || experts("qwen3moe").key(&format!("qwen3moe.{two}"), 2_u32);
        let own = config(qwen().key("qwen3moe.expert_feed_forward_length", 6_u32)).unwrap();
        let narrow = ExpertsConfig { intermediate_size: 6, ..expected.clone() };
        assert_eq!((own.family.name, own.experts), ("qwen3_moe", Some(narrow)));
        // Without the key, the width of the two together.
        let shared = config(qwen()).unwrap();
        assert_eq!(shared.experts.unwrap().intermediate_size, 4);
        // A key of another architecture's.
        let zero = experts("llama").key(&format!("llama.{two}"), 2_u32);
        let zero = config(zero.key("llama.expert_feed_forward_length", 0_u32)).unwrap();
        assert_eq!(zero.experts, Some(expected));
    }

    #[test]
    fn experts_that_do_not_fit_or_are_of_another_kind_are_refused() {
        let three = || experts("llama").key("llama.expert_used_count", 2_u32);
        malformed(experts("llama"), "llama.expert_used_count");
        malformed(
            experts("llama").key("llama.expert_used_count", 4_u32),
            "at most llama.expert_count, 3",
        );
        malformed(experts("llama").key("llama.expert_used_count", 0_u32), "a size from 1");
        malformed(model().key("llama.expert_count", 1_u32 << 20), "at most 65536 experts");
        malformed(
            three().f32s("blk.1.ffn_up_exps.weight", &[2, 8, 4], &[0.0; 64]),
            "'blk.1.ffn_up_exps.weight': expected a part for each of 3 experts",
        );
        malformed(
            three().f32s("blk.1.ffn_up_exps.weight", &[8, 4], &[0.0; 32]),
            "found the shape [8, 4]",
        );
        for scale in [0.0_f32, 1.0] {
            assert!(config(three().key("llama.expert_weights_scale", scale)).is_ok(), "{scale}");
        }
        unsupported(three().key("llama.expert_weights_scale", 2.5_f32), "expert_weights_scale");
        // What a file without experts says of them means nothing.
        assert!(config(model().key("llama.expert_gating_func", 2_u32)).is_ok());
        for (key, number) in [
            ("llama.expert_shared_count", 1_u32),
            ("llama.expert_gating_func", 2),
            ("llama.expert_group_count", 4),
            ("llama.leading_dense_block_count", 1),
            ("llama.interleave_moe_layer_step", 2),
        ] {
            unsupported(three().key(key, number), key);
        }
        assert!(config(three().key("llama.expert_gating_func", 1_u32)).is_ok());
        unsupported(three().key("llama.expert_weights_norm", false), "llama.expert_weights_norm");
        let dense = Writer::new().key(ARCHITECTURE, "qwen3moe");
        unsupported(dense, "qwen3moe.expert_count '0'");
        let mixture = Writer::new().key(ARCHITECTURE, "qwen2").key("qwen2.expert_count", 4_u32);
        unsupported(mixture, "qwen2.expert_count '4'");
    }

    #[test]
    fn sizes_that_do_not_fit_each_other_are_malformed() {
        malformed(
            model().key("llama.attention.head_count_kv", 4_u32),
            "a divisor of llama.attention.head_count, 6",
        );
        malformed(model().key("llama.attention.head_count_kv", 0_u32), "a size from 1");
        malformed(model().key("llama.attention.head_count_kv", u64::MAX), "an integer from 0");
        malformed(model().key("llama.attention.head_count_kv", [3_u32, 3]), "an array of 2");
        malformed(model().key("llama.rope.dimension_count", 3_u32), "an even width");
        for number in [f32::NAN, f32::INFINITY, 0.0, -1.0] {
            malformed(model().key("llama.rope.freq_base", number), "a finite number above 0");
        }
        malformed(model().key("tokenizer.ggml.eos_token_id", 5_u32), "vocabulary's size, 5");
    }

    #[test]
    fn a_missing_or_mistyped_key_is_named() {
        malformed(Writer::new(), "key 'general.architecture': expected this key, found none");
        malformed(Writer::new().key(ARCHITECTURE, "llama"), "key 'llama.embedding_length'");
        malformed(Writer::new().key(ARCHITECTURE, 1_u32), "expected a string, found 1");
    }

    #[test]
    fn more_blocks_than_tensors_are_malformed() {
        let writer = Writer::new()
            .key(ARCHITECTURE, "llama")
            .key("llama.embedding_length", 2_u32)
            .key("llama.feed_forward_length", 2_u32)
            .key("llama.attention.head_count", 1_u32)
            .key("llama.block_count", MAX_SIZE)
            .f32s("token_embd.weight", &[1, 2], &[0.0; 2]);
        malformed(writer, "at most one block for each of 1 tensors");
    }

    #[test]
    fn an_embedding_of_another_width_is_malformed() {
        let writer = Writer::new()
            .key(ARCHITECTURE, "llama")
            .key("llama.embedding_length", 4_u32)
            .key("llama.attention.head_count", 1_u32);
        malformed(writer, "token_embd.weight");
        let writer = Writer::new()
            .key(ARCHITECTURE, "llama")
            .key("llama.embedding_length", 4_u32)
            .key("llama.attention.head_count", 1_u32)
            .f32s("token_embd.weight", &[1, 2], &[0.0; 2]);
        malformed(writer, "found [1, 2]");
    }
}
