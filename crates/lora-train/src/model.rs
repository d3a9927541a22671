//! What the loop needs of a model.

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use lora_core::VisitLora;
use lora_models::Decoder;

/// A causal language model, as the training loop sees it.
pub trait CausalLm: Module + VisitLora {
    /// Where the weights are.
    fn device(&self) -> Device;

    /// The logits of the next token at some of the positions. The loss needs no others, and the
    /// head is the widest layer of a small model: leaving the rest out saves time and memory.
    ///
    /// # Shapes
    /// - `ids` `[rows, length]`
    /// - `positions` `[count]`, each row · length + t
    /// - output `[count, vocab_size]`
    fn next_token_logits(&self, ids: Tensor<2, Int>, positions: Tensor<1, Int>) -> Tensor<2>;
}

impl CausalLm for Decoder {
    fn device(&self) -> Device {
        Decoder::device(self)
    }

    fn next_token_logits(&self, ids: Tensor<2, Int>, positions: Tensor<1, Int>) -> Tensor<2> {
        let hidden = self.hidden_states(ids, None);
        let [rows, length, width] = hidden.dims();
        self.logits(hidden.reshape([rows * length, width]).select(0, positions))
    }
}
