//! The gated feed-forward part of a block.

use burn::module::Module;
use burn::tensor::{DType, Tensor, activation::silu};
use lora_core::{AdaptableLinear, VisitLora};

use crate::kernels;

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
        let (gate, up) = (self.gate_proj.forward(x.clone()), self.up_proj.forward(x));
        let gated = kernels::gated(&gate, &up).unwrap_or_else(|| by_operations(gate, up));
        self.down_proj.forward(gated)
    }
}

/// silu(gate) · up by Burn's operations.
pub(crate) fn by_operations(gate: Tensor<3>, up: Tensor<3>) -> Tensor<3> {
    silu_in_f32(gate) * up
}

/// x · sigmoid(x), rounded once where x is in half precision.
fn silu_in_f32(x: Tensor<3>) -> Tensor<3> {
    let dtype = x.dtype();
    match dtype {
        DType::F32 | DType::F64 => silu(x),
        _ => silu(x.cast(DType::F32)).cast(dtype),
    }
}
