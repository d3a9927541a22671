//! The gated feed-forward part of a block.

use burn::module::Module;
use burn::tensor::{Tensor, activation::silu};
use lora_core::{AdaptableLinear, VisitLora};

/// SwiGLU: down(silu(gate(x)) * up(x)).
///
/// # Shapes
/// - input and output `[batch, length, hidden_size]`
///
/// Source: "GLU Variants Improve Transformer", [arXiv:2002.05202](https://arxiv.org/abs/2002.05202).
#[derive(Module, Debug, VisitLora)]
pub struct Mlp {
    pub(crate) gate_proj: AdaptableLinear, // [hidden, intermediate]
    pub(crate) up_proj: AdaptableLinear,   // [hidden, intermediate]
    pub(crate) down_proj: AdaptableLinear, // [intermediate, hidden]
}

impl Mlp {
    pub(crate) fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let gate = silu(self.gate_proj.forward(x.clone()));
        self.down_proj.forward(gate * self.up_proj.forward(x))
    }
}
