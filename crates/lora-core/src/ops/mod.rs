//! Differentiable operations with a hand-written backward, one file each.

mod lora_linear;

use burn::tensor::Tensor;

pub use lora_linear::lora_linear;
pub(crate) use lora_linear::{check_shapes, linear, lora_linear_over, product, transposed_product};

/// Applies `f` to `input` with all axes but the last folded into rows.
///
/// A weight's gradient over unfolded batches would be formed once per batch and then summed.
///
/// # Shapes
/// - input `[..., d_input]`, given to `f` as `[rows, d_input]`
/// - output of `f` `[rows, d_output]`, given back as `[..., d_output]`
pub(crate) fn fold_rows<const D: usize>(
    input: Tensor<D>,
    f: impl FnOnce(Tensor<2>) -> Tensor<2>,
) -> Tensor<D> {
    unfolded(input, |input| f(as_rows(input)))
}

/// The same for an `f` that folds its input itself. It never gets an input without rows; the last axis may be empty.
pub(crate) fn unfolded<const D: usize>(
    input: Tensor<D>,
    f: impl FnOnce(Tensor<D>) -> Tensor<2>,
) -> Tensor<D> {
    let mut dims = input.dims();
    let (device, dtype) = (input.device(), input.dtype());
    // In a shape that is asked of `reshape`, Burn takes a 0 as "the size that was there", and ndarray panics where it
    // multiplies nothing: instead of no rows some are computed, one along each axis without any, for width and dtype.
    let mut some = dims;
    some[..D - 1].iter_mut().for_each(|size| *size = (*size).max(1));
    let is_empty = some != dims;
    let output = f(if is_empty { Tensor::zeros(some, (&device, dtype)) } else { input });
    dims[D - 1] = output.dims()[1];
    match is_empty {
        true => Tensor::zeros(dims, (&device, output.dtype())),
        false => output.reshape(dims),
    }
}

/// `[..., columns]` as `[rows, columns]`.
pub(crate) fn as_rows<const D: usize>(input: Tensor<D>) -> Tensor<2> {
    let dims = input.dims();
    input.reshape([dims[..D - 1].iter().product(), dims[D - 1]])
}
