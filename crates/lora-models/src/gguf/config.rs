//! The sizes of the decoder in a GGUF file, from its keys.

use super::reader::{GgufFile, ROPE_FREQS};
use crate::config::DecoderConfig;
use crate::error::{Error, Result};

const ARCHITECTURE: &str = "general.architecture";
const HEADS: &str = "llama.attention.head_count";
const KEY_HEADS: &str = "llama.attention.head_count_kv";

/// llama.cpp's value where the key is absent.
const DEFAULT_ROPE_THETA: f64 = 10_000.0;
/// GGUF does not store it; every Llama's `config.json` has this one.
const INITIALIZER_RANGE: f64 = 0.02;
/// Far above any real size, and low enough that the product of two sizes does not overflow.
const MAX_SIZE: u32 = 1 << 30;

/// Tokens that end a text: of the text, of a turn, of a message that calls a tool.
const END_KEYS: [&str; 3] =
    ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

impl GgufFile {
    /// The sizes and switches of the model in this file.
    ///
    /// # Errors
    /// When the architecture is not `llama`, when the model needs something that this crate's
    /// decoder does not have (scaled RoPE, experts, several files), or when a key is missing or
    /// does not fit the others.
    pub fn config(&self) -> Result<DecoderConfig> {
        self.refuse_what_the_decoder_lacks()?;

        let hidden_size = self.size("llama.embedding_length")?;
        let num_attention_heads = self.query_heads()?;
        let num_key_value_heads = self.key_heads()?;
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            let expected = format!("a divisor of {HEADS}, {num_attention_heads}");
            let found = num_key_value_heads.to_string();
            return Err(self.malformed_key(KEY_HEADS, expected, found));
        }
        let vocab_size = self.vocab_size(hidden_size)?;

        Ok(DecoderConfig {
            vocab_size,
            hidden_size,
            intermediate_size: self.size("llama.feed_forward_length")?,
            num_hidden_layers: self.blocks()?,
            num_attention_heads,
            num_key_value_heads,
            head_dim: self.head_dim(hidden_size, num_attention_heads)?,
            rms_norm_eps: self.positive("llama.attention.layer_norm_rms_epsilon", None)?,
            rope_theta: self.positive("llama.rope.freq_base", Some(DEFAULT_ROPE_THETA))?,
            max_position_embeddings: self.size("llama.context_length")?,
            attention_bias: self.has_bias(&["q_proj", "k_proj", "v_proj", "o_proj"]),
            mlp_bias: self.has_bias(&["gate_proj", "up_proj", "down_proj"]),
            tie_word_embeddings: !self.tensors().contains_key("lm_head.weight"),
            initializer_range: INITIALIZER_RANGE,
            bos_token_id: self.token_id("tokenizer.ggml.bos_token_id", vocab_size)?,
            eos_token_ids: self.end_tokens(vocab_size)?,
        })
    }

    pub(super) fn architecture(&self) -> Result<Option<&str>> {
        self.string(ARCHITECTURE)
    }

    pub(super) fn query_heads(&self) -> Result<usize> {
        self.size(HEADS)
    }

    pub(super) fn key_heads(&self) -> Result<usize> {
        if self.metadata().contains_key(KEY_HEADS) {
            self.size(KEY_HEADS)
        } else {
            self.size(HEADS)
        }
    }

    /// Each of these would run and give wrong numbers if it were passed over.
    fn refuse_what_the_decoder_lacks(&self) -> Result<()> {
        let unsupported = |what: &str, found: String, supported: &str| {
            Err(Error::unsupported(self.file_path(), what, found, supported))
        };
        let architecture = self.required(ARCHITECTURE, self.architecture()?)?;
        if architecture != "llama" {
            return unsupported(ARCHITECTURE, architecture.to_owned(), "llama");
        }
        let key = "split.count";
        if let Some(files) = self.u32(key)?.filter(|&files| files > 1) {
            let supported = "one file; join the parts with llama-gguf-split --merge";
            return unsupported(key, files.to_string(), supported);
        }
        // Mixtral is a 'llama' too.
        let key = "llama.expert_count";
        if let Some(experts) = self.u32(key)?.filter(|&experts| experts > 0) {
            return unsupported(key, experts.to_string(), "0, a dense MLP");
        }
        let key = "llama.rope.scaling.type";
        if let Some(scaling) = self.string(key)?.filter(|&scaling| scaling != "none") {
            return unsupported(key, scaling.to_owned(), "none");
        }
        // The older spelling of linear scaling.
        let key = "llama.rope.scale_linear";
        if let Some(scale) = self.f64(key)?.filter(|&scale| scale != 1.0) {
            return unsupported(key, scale.to_string(), "1, no scaling");
        }
        // llama.cpp takes a factor without a type as linear scaling.
        let key = "llama.rope.scaling.factor";
        if let Some(factor) = self.f64(key)?.filter(|&factor| factor != 1.0 && factor != 0.0) {
            return unsupported(key, factor.to_string(), "1, no scaling");
        }
        // Factors of one were left out when the file was opened.
        if self.tensors().contains_key(ROPE_FREQS) {
            let supported = "unscaled RoPE: no such tensor, or all of it 1";
            return unsupported("tensor", ROPE_FREQS.to_owned(), supported);
        }
        Ok(())
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
        let key = "llama.block_count";
        let blocks = self.size(key)?;
        // A loader lists every tensor of every block, so an absurd number must not reach it.
        if blocks > self.tensors().len() {
            let expected =
                format!("at most one block for each of {} tensors", self.tensors().len());
            return Err(self.malformed_key(key, expected, blocks.to_string()));
        }
        Ok(blocks)
    }

    /// The width of a head; the decoder rotates all of it, so RoPE's width must be the same.
    fn head_dim(&self, hidden_size: usize, heads: usize) -> Result<usize> {
        const KEY_LENGTH: &str = "llama.attention.key_length";
        const VALUE_LENGTH: &str = "llama.attention.value_length";
        const ROPE_LENGTH: &str = "llama.rope.dimension_count";
        let optional = |key: &str| self.u32(key)?.map(|_| self.size(key)).transpose();

        let (key, head_dim) = match (optional(KEY_LENGTH)?, optional(ROPE_LENGTH)?) {
            (Some(width), _) => (KEY_LENGTH, width),
            (None, Some(width)) => (ROPE_LENGTH, width),
            (None, None) if hidden_size.is_multiple_of(heads) => (HEADS, hidden_size / heads),
            (None, None) => {
                let expected = format!("a divisor of llama.embedding_length, {hidden_size}");
                return Err(self.malformed_key(HEADS, expected, heads.to_string()));
            }
        };
        for other in [VALUE_LENGTH, ROPE_LENGTH] {
            if let Some(width) = optional(other)?.filter(|&width| width != head_dim) {
                let supported = format!("{head_dim}, the width of a head by {key}");
                let found = width.to_string();
                return Err(Error::unsupported(self.file_path(), other, found, supported));
            }
        }
        if !head_dim.is_multiple_of(2) {
            let expected = "an even width of a head, for RoPE";
            return Err(self.malformed_key(key, expected, head_dim.to_string()));
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
        Ok(ids)
    }
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
            vocab_size: 5,
            hidden_size: 12,
            intermediate_size: 20,
            num_hidden_layers: 2,
            num_attention_heads: 6,
            num_key_value_heads: 6,
            head_dim: 2,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            max_position_embeddings: 64,
            attention_bias: false,
            mlp_bias: false,
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
                .key(KEY_HEADS, 3_u32)
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
        assert!(!config.tie_word_embeddings && config.attention_bias && config.mlp_bias);
    }

    #[test]
    fn a_norms_bias_is_no_projections_bias() {
        let config = config(model().f32s("output_norm.bias", &[12], &[0.0; 12])).unwrap();
        assert!(!config.attention_bias && !config.mlp_bias);
    }

    #[test]
    fn rope_factors_of_one_are_left_out() {
        assert!(config(model().f32s(ROPE_FREQS, &[1], &[1.0])).is_ok());
        unsupported(model().f32s(ROPE_FREQS, &[2], &[1.0, 8.0]), ROPE_FREQS);
    }

    #[test]
    fn what_the_decoder_lacks_is_refused() {
        unsupported(model().key("split.count", 2_u16), "split.count");
        unsupported(model().key("llama.expert_count", 8_u32), "llama.expert_count");
        unsupported(model().key("llama.rope.scaling.type", "linear"), "'linear'");
        unsupported(model().key("llama.rope.scale_linear", 4_f32), "'4'");
        unsupported(
            model()
                .key("llama.rope.dimension_count", 4_u32)
                .key("llama.attention.key_length", 2_u32),
            "'4'",
        );
        unsupported(model().key("llama.attention.value_length", 4_u32), "value_length");
        unsupported(Writer::new().key(ARCHITECTURE, "qwen2"), "supported: llama");
    }

    #[test]
    fn sizes_that_do_not_fit_each_other_are_malformed() {
        malformed(model().key(KEY_HEADS, 4_u32), "a divisor of llama.attention.head_count, 6");
        malformed(model().key(KEY_HEADS, 0_u32), "a size from 1");
        malformed(model().key(KEY_HEADS, u64::MAX), "an integer from 0");
        malformed(model().key(KEY_HEADS, [3_u32, 3]), "an array of 2");
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
            .key("llama.block_count", 1_000_000_000_u32)
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
