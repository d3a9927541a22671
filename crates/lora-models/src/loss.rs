//! The loss of a language model.

use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Int, Tensor};

use crate::kernels;

/// How surprised logits are by the tokens that came: `l = -ln softmax(logits)[target]` of each row, in nats, in f32
/// (f64 for f64) whatever the type of the logits.
///
/// On Flex the logits themselves become their gradient in the backward pass, where nobody else holds them: nothing
/// of their size is kept beside them.
///
/// # Shapes
/// - logits `[rows, vocab_size]`, targets `[rows]`, output `[rows]`
///
/// # Panics
/// When the shapes do not fit each other. When a target is no class, too, but on wgpu, Vulkan, Metal and CUDA, which
/// cannot say so while they compute: the loss of that row is NaN there.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::{Device, Int, Tensor};
///
/// let device = Device::flex();
/// let logits = Tensor::<2>::zeros([3, 4], &device);
/// let losses = lora_models::cross_entropy(logits, Tensor::<1, Int>::from_data([0, 1, 3], &device));
/// assert!((losses.mean().into_scalar::<f32>() - 4f32.ln()).abs() < 1e-6); // of four equals
/// # }
/// ```
pub fn cross_entropy(logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    let ([rows, _], [count]) = (logits.dims(), targets.dims());
    assert_eq!(rows, count, "cross_entropy: expected a target for each row of logits");
    kernels::cross_entropy(&logits, &targets).unwrap_or_else(|| by_operations(logits, targets))
}

/// The same by Burn's operations.
pub(crate) fn by_operations(logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    let rows = logits.dims()[0];
    let logits = match logits.dtype() {
        DType::F32 | DType::F64 => logits,
        _ => logits.cast(DType::F32),
    };
    let looks = lora_core::checks_indices(&logits.device());
    let classes = logits.dims()[1] as i64;
    let of = |targets: Tensor<1, Int>| {
        log_softmax(logits, 1).gather(1, targets.unsqueeze_dim(1)).neg().reshape([rows])
    };
    if looks || classes == 0 {
        return of(targets);
    }
    let is_beyond =
        targets.clone().lower_elem(0).bool_or(targets.clone().greater_elem(classes - 1));
    of(targets.clamp(0, classes - 1)).mask_fill(is_beyond, f32::NAN)
}
