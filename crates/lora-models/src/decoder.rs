//! The decoder: embedding, blocks, norm, head.

use burn::module::Module;
use burn::nn::RmsNorm;
use burn::tensor::{Device, Int, Tensor, TensorData};
use lora_core::{AdaptableEmbedding, AdaptableLinear, VisitLora};

use crate::attention::SeenKeyValues;
use crate::block::Block;
use crate::config::DecoderConfig;
use crate::rope::Rope;

/// A Llama-like causal language model, as its [`DecoderConfig`] says.
///
/// Its adaptable layers have the paths of the Hugging Face model: `model.layers.0.self_attn.q_proj`.
///
/// Source: "LLaMA", [arXiv:2302.13971](https://arxiv.org/abs/2302.13971).
#[derive(Module, Debug, VisitLora)]
#[lora(output = "lm_head", tied = "model.embed_tokens")]
pub struct Decoder {
    pub(crate) model: DecoderStack,
    pub(crate) lm_head: Option<AdaptableLinear>, // [hidden, vocab]; none when tied to the embedding
    #[module(skip)]
    pub(crate) config: DecoderConfig,
}

/// Everything but the head.
#[derive(Module, Debug, VisitLora)]
pub struct DecoderStack {
    pub(crate) embed_tokens: AdaptableEmbedding, // [vocab, hidden]
    pub(crate) layers: Vec<Block>,
    pub(crate) norm: RmsNorm,
}

/// Keys and values of the positions that a decoder has seen, so that each new token costs one
/// position only.
#[derive(Debug, Clone, Default)]
pub struct KvCache {
    blocks: Vec<SeenKeyValues>,
    seen: usize,
}

impl KvCache {
    /// A cache that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Positions seen so far.
    pub fn seen(&self) -> usize {
        self.seen
    }
}

impl Decoder {
    /// The sizes and switches of this decoder.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Where the weights are.
    pub fn device(&self) -> Device {
        self.model.norm.gamma.val().device()
    }

    /// Token ids on this decoder's device, from `batch` rows of equal length one after the other.
    ///
    /// # Panics
    /// When `ids` cannot be split into `batch` rows.
    pub fn token_tensor(&self, ids: &[i32], batch: usize) -> Tensor<2, Int> {
        let shape = [batch, ids.len() / batch];
        Tensor::from_data(TensorData::new(ids.to_vec(), shape), &self.device())
    }

    /// The logits of the next token at every position.
    ///
    /// # Shapes
    /// - `ids` `[batch, length]`, output `[batch, length, vocab_size]`
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let hidden = self.hidden_states(ids, None);
        match &self.lm_head {
            // With its batch axis, which a mixed batch of adapters needs.
            Some(head) => head.forward(hidden),
            None => {
                let [batch, length, width] = hidden.dims();
                let logits = self.logits(hidden.reshape([batch * length, width]));
                logits.reshape([batch, length, self.config.vocab_size])
            }
        }
    }

    /// The normalised state after the last block, which [`logits`](Self::logits) turns into logits.
    /// With a cache, `ids` continue what it has seen.
    ///
    /// # Shapes
    /// - `ids` `[batch, length]`, output `[batch, length, hidden_size]`
    pub fn hidden_states(&self, ids: Tensor<2, Int>, cache: Option<&mut KvCache>) -> Tensor<3> {
        let [_, length] = ids.dims();
        let device = self.device();
        let mut no_cache = KvCache::new();
        let keeps = cache.is_some();
        let cache = cache.unwrap_or(&mut no_cache);
        cache.blocks.resize(self.model.layers.len(), None);

        let config = &self.config;
        let rope = Rope::new(config.head_dim, config.rope_theta, cache.seen, length, &device);
        let mask = (length > 1).then(|| causal_mask(cache.seen, length, &device));
        let mut x = self.model.embed_tokens.forward(ids);
        for (block, seen) in self.model.layers.iter().zip(&mut cache.blocks) {
            x = block.forward(x, &rope, mask.as_ref(), keeps.then_some(seen));
        }
        cache.seen += length;
        self.model.norm.forward(x)
    }

    /// The head: states `[rows, hidden_size]` to logits `[rows, vocab_size]`.
    pub fn logits(&self, hidden: Tensor<2>) -> Tensor<2> {
        match &self.lm_head {
            Some(head) => head.forward(hidden),
            None => self.model.embed_tokens.tied_logits(hidden),
        }
    }
}

/// `[1, 1, length, seen + length]`: 0 where a position may look, minus infinity at later ones.
fn causal_mask(seen: usize, length: usize, device: &Device) -> Tensor<4> {
    let total = seen + length;
    let values: Vec<f32> = (0..length)
        .flat_map(|row| {
            (0..total).map(move |column| if column <= seen + row { 0.0 } else { f32::NEG_INFINITY })
        })
        .collect();
    Tensor::from_data(TensorData::new(values, [1, 1, length, total]), device)
}
