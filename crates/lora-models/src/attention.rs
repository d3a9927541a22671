//! Self-attention with grouped queries.

use burn::module::Module;
use burn::tensor::{Tensor, activation::softmax};
use lora_core::{AdaptableLinear, VisitLora};

use crate::rope::Rope;

/// Causal self-attention in which several query heads share one key and value head.
///
/// softmax(q k^T / sqrt(head_dim)) v for each query head, with q and k rotated by their positions.
///
/// # Shapes
/// - input and output `[batch, length, hidden_size]`
///
/// Source: "GQA", [arXiv:2305.13245](https://arxiv.org/abs/2305.13245).
#[derive(Module, Debug, VisitLora)]
pub struct Attention {
    pub(crate) q_proj: AdaptableLinear, // [hidden, heads * head_dim]
    pub(crate) k_proj: AdaptableLinear, // [hidden, kv_heads * head_dim]
    pub(crate) v_proj: AdaptableLinear, // [hidden, kv_heads * head_dim]
    pub(crate) o_proj: AdaptableLinear, // [heads * head_dim, hidden]
    pub(crate) head_dim: usize,
}

/// Keys and values of the positions that one block has seen, each `[batch, kv_heads, seen, head_dim]`.
pub(crate) type SeenKeyValues = Option<(Tensor<4>, Tensor<4>)>;

impl Attention {
    /// `mask` is `[1, 1, length, seen]`, minus infinity where a query must not look.
    pub(crate) fn forward(
        &self,
        x: Tensor<3>,
        rope: &Rope,
        mask: Option<&Tensor<4>>,
        seen: Option<&mut SeenKeyValues>,
    ) -> Tensor<3> {
        let [batch, length, _] = x.dims();
        let q = rope.apply(self.split_heads(self.q_proj.forward(x.clone())));
        let mut k = rope.apply(self.split_heads(self.k_proj.forward(x.clone())));
        let mut v = self.split_heads(self.v_proj.forward(x));
        if let Some(seen) = seen {
            if let Some((seen_k, seen_v)) = seen.take() {
                k = Tensor::cat(vec![seen_k, k], 2);
                v = Tensor::cat(vec![seen_v, v], 2);
            }
            *seen = Some((k.clone(), v.clone()));
        }

        let [_, heads, _, head_dim] = q.dims();
        let [_, kv_heads, total, _] = k.dims();
        // The query heads of a group stand under each other as rows of one product, so that keys and
        // values need not be repeated.
        let rows = heads / kv_heads * length;
        let q = q.mul_scalar(1.0 / (head_dim as f64).sqrt());
        let scores = q.reshape([batch, kv_heads, rows, head_dim]).matmul(k.swap_dims(2, 3));
        let scores = scores.reshape([batch, heads, length, total]);
        let scores = match mask {
            Some(mask) => scores + mask.clone(),
            None => scores,
        };
        let weights = softmax(scores, 3).reshape([batch, kv_heads, rows, total]);
        let mixed = weights.matmul(v).reshape([batch, heads, length, head_dim]);
        self.o_proj.forward(mixed.swap_dims(1, 2).reshape([batch, length, heads * head_dim]))
    }

    /// `[batch, length, heads * head_dim]` to `[batch, heads, length, head_dim]`.
    fn split_heads(&self, x: Tensor<3>) -> Tensor<4> {
        let [batch, length, width] = x.dims();
        x.reshape([batch, length, width / self.head_dim, self.head_dim]).swap_dims(1, 2)
    }
}
