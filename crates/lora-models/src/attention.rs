//! Self-attention with grouped queries.

use burn::module::Module;
use burn::nn::RmsNorm;
use burn::tensor::{Bool, DType, Tensor, activation::softmax};
use lora_core::{AdaptableLinear, VisitLora};

use crate::cache::KvCache;
use crate::kernels;
use crate::norm::rms_norm;
use crate::rope::Rope;

/// Causal self-attention in which several query heads share one key and value head.
///
/// softmax(q k^T / sqrt(head_dim)) v for each query head, with q and k rotated by their positions and,
/// in Qwen3, each head of them normalised before.
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
    pub(crate) q_norm: Option<RmsNorm>, // [head_dim]
    pub(crate) k_norm: Option<RmsNorm>, // [head_dim]
    pub(crate) head_dim: usize,
    #[module(skip)]
    pub(crate) window: Option<usize>,
    /// Whether scores are rounded to the type of the activations; in f32 they are not, whatever it says.
    #[module(skip)]
    pub(crate) rounds_scores: bool,
}

/// What all blocks of one forward share.
pub(crate) struct Places<'a> {
    pub(crate) rope: &'a Rope,
    /// The keys that a query must not look at, `[1 or batch, 1, length, seen + length]`.
    pub(crate) hidden: Option<&'a Tensor<4, Bool>>,
}

impl Attention {
    pub(crate) fn forward(
        &self,
        x: Tensor<3>,
        places: &Places<'_>,
        seen: Option<(&mut KvCache, usize)>,
    ) -> Tensor<3> {
        let [batch, length, _] = x.dims();
        let q = self.rotated(self.q_proj.forward(x.clone()), self.q_norm.as_ref(), places.rope);
        let mut k = self.rotated(self.k_proj.forward(x.clone()), self.k_norm.as_ref(), places.rope);
        let mut v = self.split_heads(self.v_proj.forward(x)).swap_dims(1, 2);
        if let Some((cache, block)) = seen {
            (k, v) = cache.extend(block, k, v);
        }
        if let (Some(window), None) = (self.window, places.hidden) {
            // A single query: what the window hides need not be multiplied at all.
            let kept = k.dims()[2].min(window);
            let first = k.dims()[2] - kept;
            (k, v) = (k.narrow(2, first, kept), v.narrow(2, first, kept));
        }

        let [_, heads, _, head_dim] = q.dims();
        let kv_heads = k.dims()[1];
        // The query heads of a group stand under each other as rows of one product, so that keys and
        // values need not be repeated.
        let rows = heads / kv_heads * length;
        let q = q.reshape([batch, kv_heads, rows, head_dim]);
        let scale = 1.0 / (head_dim as f64).sqrt();
        let rounds = self.rounds_scores;
        let mixed = kernels::attend(&q, &k, &v, scale, places.hidden, rounds)
            .unwrap_or_else(|| by_operations(q, k, v, scale, places.hidden, rounds));
        let mixed = mixed.reshape([batch, heads, length, head_dim]);
        self.o_proj.forward(mixed.swap_dims(1, 2).reshape([batch, length, heads * head_dim]))
    }

    /// `[batch, length, heads * head_dim]` to `[batch, heads, length, head_dim]`, normalised where that is
    /// asked for, and rotated.
    fn rotated(&self, x: Tensor<3>, norm: Option<&RmsNorm>, rope: &Rope) -> Tensor<4> {
        let x = match norm {
            Some(norm) => rms_norm(norm, self.split_heads(x.clone())).reshape(x.dims()),
            None => x,
        };
        kernels::rotate(&x, &rope.cos, &rope.sin)
            .unwrap_or_else(|| rope.apply(self.split_heads(x).swap_dims(1, 2)))
    }

    /// `[batch, length, heads * head_dim]` to `[batch, length, heads, head_dim]`.
    fn split_heads(&self, x: Tensor<3>) -> Tensor<4> {
        let [batch, length, width] = x.dims();
        x.reshape([batch, length, width / self.head_dim, self.head_dim])
    }
}

/// softmax(scale q k^T) v by Burn's operations: q `[batch, kv_heads, rows, head_dim]`, k and v `[batch, kv_heads, total,
/// head_dim]`; row r does not see the keys that `hidden` `[1 or batch, 1, length, total]` has for query r modulo length.
pub(crate) fn by_operations(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    scale: f64,
    hidden: Option<&Tensor<4, Bool>>,
    rounds: bool,
) -> Tensor<4> {
    let dtype = v.dtype();
    let [q, k, v] = if rounds { [q, k, v] } else { [q, k, v].map(in_full) };
    let [batch, kv_heads, rows, _] = q.dims();
    let total = k.dims()[2];
    let length = hidden.map_or(rows, |hidden| hidden.dims()[2]);
    let scores = q.matmul(k.swap_dims(2, 3));
    let scores =
        scaled_in_f32(scores.reshape([batch, kv_heads * rows / length, length, total]), scale);
    let scores = match hidden {
        Some(hidden) => scores.mask_fill(hidden.clone(), f32::NEG_INFINITY),
        None => scores,
    };
    let weights = softmax_in_f32(scores).reshape([batch, kv_heads, rows, total]);
    weights.matmul(v).cast(dtype)
}

/// In f32 where it is in half precision.
fn in_full(tensor: Tensor<4>) -> Tensor<4> {
    match tensor.dtype() {
        DType::F32 | DType::F64 => tensor,
        _ => tensor.cast(DType::F32),
    }
}

/// scale · scores, rounded once where the scores are in half precision: Burn rounds the factor to their type
/// too, which is 0.2 % of a 1 / sqrt(head_dim) that is no power of two.
fn scaled_in_f32(scores: Tensor<4>, scale: f64) -> Tensor<4> {
    let dtype = scores.dtype();
    match dtype {
        DType::F32 | DType::F64 => scores.mul_scalar(scale),
        _ => scores.cast(DType::F32).mul_scalar(scale).cast(dtype),
    }
}

/// Softmax over the last axis, rounded once where the scores are in half precision.
fn softmax_in_f32(scores: Tensor<4>) -> Tensor<4> {
    let dtype = scores.dtype();
    match dtype {
        DType::F32 | DType::F64 => softmax(scores, 3),
        _ => softmax(scores.cast(DType::F32), 3).cast(dtype),
    }
}
