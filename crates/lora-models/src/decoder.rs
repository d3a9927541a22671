//! The decoder: embedding, blocks, norm, head.

use burn::module::Module;
use burn::nn::RmsNorm;
use burn::tensor::{Device, Int, Tensor, TensorData};
use lora_core::{AdaptableEmbedding, AdaptableLinear, VisitLora};

use crate::attention::Places;
use crate::block::Block;
use crate::cache::KvCache;
use crate::config::DecoderConfig;
use crate::layout::{Packing, hidden_keys};
use crate::norm::rms_norm;
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

impl Decoder {
    /// The sizes and switches of this decoder.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The same decoder, whose attention rounds as transformers' `eager` does in half precision: the product of
    /// queries and keys, the scaled scores and the weights, each to the type of the activations. To compare logits
    /// with that; scores are in f32 otherwise, which is nearer to the exact ones, most of all in models with large
    /// biases of queries and keys, such as Qwen2. A step of decoding keeps them in f32 either way.
    pub fn with_eager_rounding(mut self) -> Self {
        for block in &mut self.model.layers {
            block.self_attn.rounds_scores = true;
        }
        self
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
    ///
    /// # Panics
    /// When there is no token, or an id is not below `vocab_size`, as far as the backend looks.
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        self.all_logits(self.hidden_states(ids, None))
    }

    /// The same for several texts in each row, which do not see each other.
    ///
    /// # Shapes
    /// - `ids` `[rows, row_length]` of the packing, output `[rows, row_length, vocab_size]`
    ///
    /// # Panics
    /// When `ids` has another shape than the packing.
    pub fn forward_packed(&self, ids: Tensor<2, Int>, packing: &Packing) -> Tensor<3> {
        self.all_logits(self.hidden_states_packed(ids, packing))
    }

    /// The normalised state after the last block, which [`logits`](Self::logits) turns into logits.
    /// With a cache, `ids` continue what it has seen.
    ///
    /// # Shapes
    /// - `ids` `[batch, length]`, output `[batch, length, hidden_size]`
    ///
    /// # Panics
    /// As [`forward`](Self::forward), and when the cache is that of another batch or model.
    pub fn hidden_states(&self, ids: Tensor<2, Int>, cache: Option<&mut KvCache>) -> Tensor<3> {
        let packing = cache.as_ref().and_then(|cache| cache.packing(ids.dims()[1]));
        self.run(ids, packing.as_ref(), cache)
    }

    /// The same for several texts in each row, which do not see each other.
    ///
    /// # Shapes
    /// - `ids` `[rows, row_length]` of the packing, output `[rows, row_length, hidden_size]`
    ///
    /// # Panics
    /// When `ids` has another shape than the packing.
    pub fn hidden_states_packed(&self, ids: Tensor<2, Int>, packing: &Packing) -> Tensor<3> {
        let expected = [packing.rows(), packing.row_length()];
        assert_eq!(ids.dims(), expected, "the packing describes other rows");
        self.run(ids, Some(packing), None)
    }

    fn run(
        &self,
        ids: Tensor<2, Int>,
        packing: Option<&Packing>,
        mut cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        let [batch, length] = ids.dims();
        assert!(batch * length > 0, "expected at least one token, found [{batch}, {length}]");
        let (config, device) = (&self.config, self.device());
        let seen = cache.as_ref().map_or(0, |cache| cache.seen());
        if let Some(cache) = &mut cache {
            cache.prepare(self.model.layers.len(), length);
        }

        let mut x = self.model.embed_tokens.forward(ids);
        let (rows, positions) = match packing {
            Some(packing) => (packing.rows(), packing.positions_from(seen)),
            None => (1, (seen as u32..(seen + length) as u32).collect()),
        };
        let rope = Rope::new(config, &positions, rows, x.dtype(), &device);
        let hidden = |window| hidden_keys(packing, window, seen, length, &device);
        let window = config.sliding_window.as_ref().map(|window| window.width);
        let windowed = |block: &Block| block.self_attn.window.is_some();
        let all_windowed = self.model.layers.iter().all(windowed);
        let everywhere = if all_windowed { None } else { hidden(None) };
        let in_window = window.and_then(|width| hidden(Some(width)));
        for (number, block) in self.model.layers.iter().enumerate() {
            let hidden = match block.self_attn.window {
                Some(_) => in_window.as_ref(),
                None => everywhere.as_ref(),
            };
            let places = Places { rope: &rope, hidden };
            x = block.forward(x, &places, cache.as_deref_mut().map(|cache| (cache, number)));
        }
        if let Some(cache) = cache {
            cache.advance(length);
        }
        rms_norm(&self.model.norm, x)
    }

    pub(crate) fn all_logits(&self, hidden: Tensor<3>) -> Tensor<3> {
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

    /// The head: states `[rows, hidden_size]` to logits `[rows, vocab_size]`.
    pub fn logits(&self, hidden: Tensor<2>) -> Tensor<2> {
        match &self.lm_head {
            Some(head) => head.forward(hidden),
            None => self.model.embed_tokens.tied_logits(hidden),
        }
    }
}
