//! Conversions between half precision and f32, and products of many rows in half precision.

use burn::backend::TensorMetadata;
use burn::tensor::DType;
use rayon::prelude::*;

use crate::FlexTensor;
use crate::few_rows::dims;
use crate::product::{Matrix, check_fit, gemm_accumulate};
use crate::weight::{Weight, by_dtype, tensor_of, values_of};

/// Values that one thread converts at a time.
const CHUNK: usize = 1 << 14;

/// Values that are widened at a time: 1 MiB in f32, that they are multiplied while in the cache.
const BLOCK: usize = 1 << 18;

/// Lines that are multiplied at a time, at least, though long ones leave the cache: each time, all of x or of y
/// is gone over.
const FEWEST: usize = 256;

/// Half precision in f32, contiguous; a tensor of another type as it is.
pub(crate) fn widened(tensor: FlexTensor) -> FlexTensor {
    if !matches!(tensor.dtype(), DType::F16 | DType::BF16) {
        return tensor;
    }
    let shape = tensor.shape();
    let values = by_dtype!(tensor.dtype(), values_in_f32(&tensor));
    tensor_of(values.unwrap_or_default(), shape)
}

/// The values of a tensor in f32, in their order; of one with gaps, too.
fn values_in_f32<T: Weight>(tensor: &FlexTensor) -> Option<Vec<f32>> {
    let tensor = tensor.to_contiguous();
    let values = values_of::<T>(&tensor)?;
    let mut wide = vec![0.0; values.len()];
    widen(values, &mut wide);
    Some(wide)
}

fn widen<T: Weight>(values: &[T], wide: &mut [f32]) {
    if values.len() <= CHUNK {
        return T::widen_all(values, wide);
    }
    let chunks = wide.par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK));
    chunks.for_each(|(wide, values)| T::widen_all(values, wide));
}

fn round<T: Weight>(wide: &[f32], values: &mut [T]) {
    if wide.len() <= CHUNK {
        return T::round_all(wide, values);
    }
    let chunks = values.par_chunks_mut(CHUNK).zip(wide.par_chunks(CHUNK));
    chunks.for_each(|(values, wide)| T::round_all(wide, values));
}

/// x · W + bias in f32, rounded once, for x and W in one type of half precision and any number of rows: W is
/// widened block by block, as it is stored. `None` for other types, and without values.
///
/// # Shapes
/// - x `[rows, d_input]`, weight `[d_input, d_output]`, bias `[d_output]`
pub(crate) fn product_of_halves(
    x: &FlexTensor,
    weight: &FlexTensor,
    bias: Option<&[f32]>,
) -> Option<FlexTensor> {
    let is_half = [DType::F16, DType::BF16].contains(&x.dtype());
    (is_half && x.dtype() == weight.dtype()).then_some(())?;
    by_dtype!(x.dtype(), multiply(x, weight, bias))
}

fn multiply<T: Weight>(
    x: &FlexTensor,
    weight: &FlexTensor,
    bias: Option<&[f32]>,
) -> Option<FlexTensor> {
    let ([rows, d_input], [w_input, d_output]) = (dims(x), dims(weight));
    let turned = weight.transpose(0, 1);
    let by_rows = !turned.is_contiguous();
    let stored = if by_rows { weight.to_contiguous() } else { turned };
    let values = values_of::<T>(&stored)?;
    if [rows, d_input, d_output].contains(&0) || d_input != w_input {
        return None;
    }
    let x = values_in_f32::<T>(x)?;
    let mut y = match bias {
        Some(bias) => bias.repeat(rows),
        None => vec![0.0; rows * d_output],
    };
    // A line is what lies together in memory: a row of W, or a column.
    let line = if by_rows { d_output } else { d_input };
    let lines = (BLOCK / line).max(FEWEST);
    let mut wide = vec![0.0; values.len().min(lines * line)];
    for (block, first) in values.chunks(lines * line).zip((0..).step_by(lines)) {
        let count = block.len() / line;
        let wide = &mut wide[..block.len()];
        widen(block, wide);
        if by_rows {
            let x = Matrix::new(&x[first..], [rows, count], [d_input, 1])?;
            let w = Matrix::new(wide, [count, d_output], [d_output, 1])?;
            gemm_accumulate(&mut y, d_output, x, w);
        } else {
            let x = Matrix::new(&x, [rows, d_input], [d_input, 1])?;
            let w = Matrix::new(wide, [d_input, count], [1, d_input])?;
            gemm_accumulate(&mut y[first..], d_output, x, w);
        }
    }
    let mut output = vec![T::round(0.0); y.len()];
    round(&y, &mut output);
    Some(tensor_of(output, [rows, d_output]))
}

/// y + left · right, rounded once, for a y in half precision; left and right in that or in f32. The sum is formed
/// in f32, some rows at a time. `None` for other types and without values.
///
/// # Shapes
/// - y `[rows, columns]`, left `[rows, rank]`, right `[rank, columns]`
pub(crate) fn add_product_to_halves(
    y: &FlexTensor,
    left: &FlexTensor,
    right: &FlexTensor,
) -> Option<FlexTensor> {
    let is_half = [DType::F16, DType::BF16].contains(&y.dtype());
    let fit = [left, right].iter().all(|factor| [y.dtype(), DType::F32].contains(&factor.dtype()));
    (is_half && fit).then_some(())?;
    by_dtype!(y.dtype(), add(y, left, right))
}

fn add<T: Weight>(y: &FlexTensor, left: &FlexTensor, right: &FlexTensor) -> Option<FlexTensor> {
    let [rows, columns] = dims(y);
    check_fit([rows, columns], dims(left), dims(right));
    let (left, right) = (widened(left.clone()), widened(right.clone()));
    let (left, right) = (Matrix::view(&left)?, Matrix::view(&right)?);
    let y = y.to_contiguous();
    let values = values_of::<T>(&y)?;
    let mut sums = vec![T::round(0.0); values.len()];
    let some = (BLOCK / columns).max(1);
    let mut wide = vec![0.0; values.len().min(some * columns)];
    let blocks = values.chunks(some * columns).zip(sums.chunks_mut(some * columns));
    for ((values, sums), first) in blocks.zip((0..).step_by(some)) {
        let wide = &mut wide[..values.len()];
        widen(values, wide);
        gemm_accumulate(wide, columns, left.rows(first, values.len() / columns)?, right);
        round(wide, sums);
    }
    Some(tensor_of(sums, [rows, columns]))
}
