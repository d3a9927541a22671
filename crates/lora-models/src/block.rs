//! One transformer block.

use burn::module::Module;
use burn::nn::RmsNorm;
use burn::tensor::Tensor;
use lora_core::{VisitLayer, VisitLayerMut, VisitLora, join_path};

use crate::attention::{Attention, Places};
use crate::cache::KvCache;
use crate::experts::Experts;
use crate::mlp::Mlp;
use crate::norm::rms_norm;

/// x + attention(norm(x)), then the same with the MLP or the experts.
#[derive(Module, Debug)]
pub struct Block {
    pub(crate) input_layernorm: RmsNorm,
    pub(crate) self_attn: Attention,
    pub(crate) post_attention_layernorm: RmsNorm,
    pub(crate) feed_forward: FeedForward,
}

/// What a block does to each token by itself.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "nearly every block is of the larger one")]
pub enum FeedForward {
    /// One MLP for all tokens.
    Dense(Mlp),
    /// Few of many MLPs for each token.
    Experts(Experts),
}

impl Block {
    pub(crate) fn forward(
        &self,
        x: Tensor<3>,
        places: &Places<'_>,
        seen: Option<(&mut KvCache, usize)>,
    ) -> Tensor<3> {
        let normed = rms_norm(&self.input_layernorm, x.clone());
        let x = x + self.self_attn.forward(normed, places, seen);
        let normed = rms_norm(&self.post_attention_layernorm, x.clone());
        x + match &self.feed_forward {
            FeedForward::Dense(mlp) => mlp.forward(normed),
            FeedForward::Experts(experts) => experts.forward(normed),
        }
    }
}

impl FeedForward {
    /// Its name in a checkpoint.
    fn name(&self) -> &'static str {
        match self {
            Self::Dense(_) => "mlp",
            Self::Experts(experts) => experts.names.part,
        }
    }
}

// By hand, since the name of the second part differs by family.
impl VisitLora for Block {
    fn visit_lora<'a>(&'a self, path: &str, visit: &mut VisitLayer<'_, 'a>) {
        self.self_attn.visit_lora(&join_path(path, "self_attn"), visit);
        let path = join_path(path, self.feed_forward.name());
        match &self.feed_forward {
            FeedForward::Dense(mlp) => mlp.visit_lora(&path, visit),
            FeedForward::Experts(experts) => experts.visit_lora(&path, visit),
        }
    }

    fn visit_lora_mut(&mut self, path: &str, visit: &mut VisitLayerMut<'_>) {
        self.self_attn.visit_lora_mut(&join_path(path, "self_attn"), visit);
        let path = join_path(path, self.feed_forward.name());
        match &mut self.feed_forward {
            FeedForward::Dense(mlp) => mlp.visit_lora_mut(&path, visit),
            FeedForward::Experts(experts) => experts.visit_lora_mut(&path, visit),
        }
    }
}
