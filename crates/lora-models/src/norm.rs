//! RMSNorm as the checkpoints were trained with it.

use burn::nn::RmsNorm;
use burn::tensor::{DType, Tensor};

use crate::kernels;

/// gamma · x / sqrt(mean(x²) + epsilon) over the last axis.
///
/// In half precision all but the last product is in f32 and rounded once, as in transformers; Burn's
/// own forward rounds the root too, which shifts a whole row by up to 0.4 % in bf16.
///
/// Source: "Root Mean Square Layer Normalization", [arXiv:1910.07467](https://arxiv.org/abs/1910.07467).
pub(crate) fn rms_norm<const D: usize>(norm: &RmsNorm, x: Tensor<D>) -> Tensor<D> {
    kernels::rms_norm(&x, &norm.gamma.val(), norm.epsilon).unwrap_or_else(|| by_operations(norm, x))
}

/// The same by Burn's operations.
pub(crate) fn by_operations<const D: usize>(norm: &RmsNorm, x: Tensor<D>) -> Tensor<D> {
    let dtype = x.dtype();
    if matches!(dtype, DType::F32 | DType::F64) {
        return norm.forward(x);
    }
    let x = x.cast(DType::F32);
    let rms = (x.clone().square().mean_dim(D - 1) + norm.epsilon).sqrt();
    (x / rms).cast(dtype) * norm.gamma.val().unsqueeze()
}
