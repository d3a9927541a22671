//! The sizes and switches of a decoder, in the names of Hugging Face's `config.json`.

/// Everything that distinguishes one Llama-like decoder from another.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    /// Number of tokens that the embedding knows.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of key and value heads; each serves `num_attention_heads / num_key_value_heads` query heads.
    pub num_key_value_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Added to the mean square under RMSNorm's root.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Longest sequence that the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Whether q, k, v and o projections have a bias.
    pub attention_bias: bool,
    /// Whether gate, up and down projections have a bias.
    pub mlp_bias: bool,
    /// Whether the head is the transposed embedding.
    pub tie_word_embeddings: bool,
    /// Standard deviation of a new weight; only a model trained from scratch uses it.
    pub initializer_range: f64,
    /// Token that begins a text, where the model has one.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
}

impl DecoderConfig {
    /// The name and shape of every tensor of a checkpoint of this decoder, in Hugging Face's names
    /// and layout, in the order of the model.
    pub fn tensor_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let (hidden, ffn) = (self.hidden_size, self.intermediate_size);
        let q = self.num_attention_heads * self.head_dim;
        let kv = self.num_key_value_heads * self.head_dim;
        let linears = [
            ("self_attn.q_proj", q, hidden, self.attention_bias),
            ("self_attn.k_proj", kv, hidden, self.attention_bias),
            ("self_attn.v_proj", kv, hidden, self.attention_bias),
            ("self_attn.o_proj", hidden, q, self.attention_bias),
            ("mlp.gate_proj", ffn, hidden, self.mlp_bias),
            ("mlp.up_proj", ffn, hidden, self.mlp_bias),
            ("mlp.down_proj", hidden, ffn, self.mlp_bias),
        ];
        let mut shapes = vec![(EMBEDDING.to_owned(), vec![self.vocab_size, hidden])];
        for layer in 0..self.num_hidden_layers {
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                shapes.push((format!("model.layers.{layer}.{norm}.weight"), vec![hidden]));
            }
            for (name, d_output, d_input, bias) in linears {
                let path = format!("model.layers.{layer}.{name}");
                shapes.push((format!("{path}.weight"), vec![d_output, d_input]));
                if bias {
                    shapes.push((format!("{path}.bias"), vec![d_output]));
                }
            }
        }
        shapes.push((NORM.to_owned(), vec![hidden]));
        if !self.tie_word_embeddings {
            shapes.push((HEAD.to_owned(), vec![self.vocab_size, hidden]));
        }
        shapes
    }
}

/// Names of the tensors outside the blocks.
pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(crate) const NORM: &str = "model.norm.weight";
pub(crate) const HEAD: &str = "lm_head.weight";
