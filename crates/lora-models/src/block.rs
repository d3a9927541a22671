//! One transformer block.

use burn::module::Module;
use burn::nn::RmsNorm;
use burn::tensor::Tensor;
use lora_core::VisitLora;

use crate::attention::{Attention, SeenKeyValues};
use crate::mlp::Mlp;
use crate::rope::Rope;

/// x + attention(norm(x)), then the same with the MLP.
#[derive(Module, Debug, VisitLora)]
pub struct Block {
    pub(crate) input_layernorm: RmsNorm,
    pub(crate) self_attn: Attention,
    pub(crate) post_attention_layernorm: RmsNorm,
    pub(crate) mlp: Mlp,
}

impl Block {
    pub(crate) fn forward(
        &self,
        x: Tensor<3>,
        rope: &Rope,
        mask: Option<&Tensor<4>>,
        seen: Option<&mut SeenKeyValues>,
    ) -> Tensor<3> {
        let attended =
            self.self_attn.forward(self.input_layernorm.forward(x.clone()), rope, mask, seen);
        let x = x + attended;
        let fed = self.mlp.forward(self.post_attention_layernorm.forward(x.clone()));
        x + fed
    }
}
