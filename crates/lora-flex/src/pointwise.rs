//! What stands between the products of a decoder, each in one pass over its input.
//!
//! The results are those of Burn's operations one after the other, rounded where these round, but for the
//! order of a sum and the last place of an exponential.

use burn::backend::TensorMetadata;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::FlexTensor;
use crate::exponential::exp_of_negative;
use crate::weight::{Weight, by_dtype, tensor_of, values_of};

/// Values of a tensor's rows that are worth a second thread.
const PARALLEL_FROM: usize = 1 << 16;

/// Values that one thread takes at a time, about.
const CHUNK: usize = 1 << 14;

/// gamma · x / sqrt(mean(x²) + epsilon) over the last axis; in half precision the quotient is rounded, and
/// then its product with gamma.
///
/// # Shapes
/// - x `[..., width]`, contiguous; gamma `[width]`; output as x, contiguous
///
/// `None` for tensors of another form, of unequal or other dtypes than f32, bf16 and f16, or without values.
pub fn rms_norm(x: &FlexTensor, gamma: &FlexTensor, epsilon: f64) -> Option<FlexTensor> {
    by_dtype!(x.dtype(), rms_norm_in(x, gamma, epsilon))
}

fn rms_norm_in<T: Weight>(x: &FlexTensor, gamma: &FlexTensor, epsilon: f64) -> Option<FlexTensor> {
    let (values, gamma) = (values_of::<T>(x)?, values_of::<T>(gamma)?);
    let width = *x.layout().shape().last()?;
    if values.is_empty() || gamma.len() != width {
        return None;
    }
    let gamma: Vec<f32> = gamma.iter().map(|value| value.widen()).collect();
    let output = by_rows([values], width, |[x], output| {
        Arch::new().dispatch(Norm { x, gamma: &gamma, epsilon: epsilon as f32, output });
    });
    Some(tensor_of(output, x.shape()))
}

struct Norm<'a, T> {
    x: &'a [T],
    gamma: &'a [f32],
    epsilon: f32,
    output: &'a mut [T],
}

impl<T: Weight> WithSimd for Norm<'_, T> {
    type Output = ();

    #[inline(always)] // so that it is compiled for S
    fn with_simd<S: Simd>(self, _: S) {
        let width = self.gamma.len();
        for (x, output) in self.x.chunks_exact(width).zip(self.output.chunks_exact_mut(width)) {
            const LANES: usize = 16; // sums side by side, which a vector can hold
            let mut sums = [0.0; LANES];
            let mut chunks = x.chunks_exact(LANES);
            for chunk in &mut chunks {
                sums.iter_mut().zip(chunk).for_each(|(sum, x)| *sum += x.widen() * x.widen());
            }
            let rest: f32 = chunks.remainder().iter().map(|x| x.widen() * x.widen()).sum();
            let mean = (sums.iter().sum::<f32>() + rest) / width as f32;
            let root = (mean + self.epsilon).sqrt();
            for ((x, gamma), output) in x.iter().zip(self.gamma).zip(output) {
                *output = T::round(T::round(x.widen() / root).widen() * gamma);
            }
        }
    }
}

/// Splits x into heads and rotates each: with [x1, x2] the halves of a head, x cos + [-x2, x1] sin.
///
/// # Shapes
/// - x `[batch, length, heads * head_dim]`, contiguous
/// - cos, sin `[1 or batch, 1, length, head_dim]`, contiguous
/// - output `[batch, heads, length, head_dim]`, contiguous
///
/// `None` for tensors of another form, of unequal or other dtypes than f32, bf16 and f16, or without values.
///
/// Source: "RoFormer", [arXiv:2104.09864](https://arxiv.org/abs/2104.09864).
pub fn rotate(x: &FlexTensor, cos: &FlexTensor, sin: &FlexTensor) -> Option<FlexTensor> {
    if [x, cos, sin].map(|tensor| tensor.layout().num_dims()) != [3, 4, 4] {
        return None;
    }
    by_dtype!(x.dtype(), rotate_in(x, cos, sin))
}

fn rotate_in<T: Weight>(x: &FlexTensor, cos: &FlexTensor, sin: &FlexTensor) -> Option<FlexTensor> {
    let [batch, length, width] = x.layout().shape().dims::<3>();
    let [rows, one, positions, head_dim] = cos.layout().shape().dims::<4>();
    let fits = cos.shape() == sin.shape()
        && (rows == 1 || rows == batch)
        && (one, positions) == (1, length)
        && head_dim > 0
        && width.is_multiple_of(head_dim)
        && head_dim.is_multiple_of(2);
    let values = values_of::<T>(x)?;
    let (cos, sin) = (values_of::<T>(cos)?, values_of::<T>(sin)?);
    if !fits || values.is_empty() {
        return None;
    }
    let heads = width / head_dim;
    let mut output = vec![T::round(0.0); values.len()];
    let turn = |(number, output): (usize, &mut [T])| {
        let (sample, head) = (number / heads, number % heads);
        for (position, output) in output.chunks_exact_mut(head_dim).enumerate() {
            let x = &values[((sample * length + position) * heads + head) * head_dim..][..head_dim];
            let angle = (sample % rows * length + position) * head_dim;
            let (cos, sin) = (&cos[angle..][..head_dim], &sin[angle..][..head_dim]);
            Arch::new().dispatch(Turn { x, cos, sin, output });
        }
    };
    if values.len() < PARALLEL_FROM {
        output.chunks_exact_mut(length * head_dim).enumerate().for_each(turn);
    } else {
        output.par_chunks_exact_mut(length * head_dim).enumerate().for_each(turn);
    }
    Some(tensor_of(output, [batch, heads, length, head_dim]))
}

struct Turn<'a, T> {
    x: &'a [T],
    cos: &'a [T],
    sin: &'a [T],
    output: &'a mut [T],
}

impl<T: Weight> WithSimd for Turn<'_, T> {
    type Output = ();

    #[inline(always)] // so that it is compiled for S
    fn with_simd<S: Simd>(self, _: S) {
        let half = self.x.len() / 2;
        let times = |a: T, b: T| T::round(a.widen() * b.widen()).widen();
        let (first, second) = self.x.split_at(half);
        let (first_cos, second_cos) = self.cos.split_at(half);
        let (first_sin, second_sin) = self.sin.split_at(half);
        let (first_output, second_output) = self.output.split_at_mut(half);
        for i in 0..half {
            let turned = times(first[i], first_cos[i]) - times(second[i], first_sin[i]);
            first_output[i] = T::round(turned);
            let turned = times(second[i], second_cos[i]) + times(first[i], second_sin[i]);
            second_output[i] = T::round(turned);
        }
    }
}

/// silu(gate) · up, with silu(x) = x / (1 + e^-x); in half precision silu is rounded, and then the product.
///
/// # Shapes
/// - gate, up and output of one shape, contiguous
///
/// `None` for tensors of another form, of unequal or other dtypes than f32, bf16 and f16, or without values.
///
/// Source: "GLU Variants Improve Transformer", [arXiv:2002.05202](https://arxiv.org/abs/2002.05202).
pub fn gated(gate: &FlexTensor, up: &FlexTensor) -> Option<FlexTensor> {
    by_dtype!(gate.dtype(), gated_in(gate, up))
}

fn gated_in<T: Weight>(gate: &FlexTensor, up: &FlexTensor) -> Option<FlexTensor> {
    let (gates, ups) = (values_of::<T>(gate)?, values_of::<T>(up)?);
    let width = *gate.layout().shape().last()?;
    if gates.is_empty() || gate.shape() != up.shape() {
        return None;
    }
    let output = by_rows([gates, ups], width, |[gate, up], output| {
        Arch::new().dispatch(Gate { gate, up, output });
    });
    Some(tensor_of(output, gate.shape()))
}

struct Gate<'a, T> {
    gate: &'a [T],
    up: &'a [T],
    output: &'a mut [T],
}

impl<T: Weight> WithSimd for Gate<'_, T> {
    type Output = ();

    #[inline(always)] // so that it is compiled for S
    fn with_simd<S: Simd>(self, _: S) {
        for ((gate, up), output) in self.gate.iter().zip(self.up).zip(self.output) {
            let x = gate.widen();
            // sigmoid from e^-|x|, which does not overflow.
            let e = exp_of_negative(-x.abs());
            let numerator = if x < 0.0 { e } else { 1.0 };
            let silu = T::round(x * (numerator / (1.0 + e)));
            *output = T::round(silu.widen() * up.widen());
        }
    }
}

/// `work` on rows of several inputs at a time, in the pool's threads where there are many.
fn by_rows<T: Weight, const N: usize>(
    inputs: [&[T]; N],
    width: usize,
    work: impl Fn([&[T]; N], &mut [T]) + Sync,
) -> Vec<T> {
    let mut output = vec![T::round(0.0); inputs[0].len()];
    if inputs[0].len() < PARALLEL_FROM {
        work(inputs, &mut output);
        return output;
    }
    let some = (CHUNK / width).max(1); // rows
    output.par_chunks_mut(some * width).enumerate().for_each(|(number, output)| {
        let start = number * some * width;
        work(inputs.map(|input| &input[start..][..output.len()]), output);
    });
    output
}

#[cfg(test)]
mod tests {
    use burn::backend::Flex;
    use burn::backend::ops::FloatTensorOps;
    use burn::tensor::{DType, FloatDType};

    use super::*;
    use crate::samples::{TYPES, check, in_dtype, shaped, transposed, values};

    #[test]
    fn rms_norm_is_its_definition() {
        for (dtype, bound) in TYPES {
            for shape in [[1, 1, 576], [2, 3, 33], [3, 40, 576], [1, 5, 1]] {
                let (x, gamma) = (shaped(shape, 1, dtype), shaped([shape[2]], 2, dtype));
                let gammas = values(&gamma);
                let rows = values(&x);
                let rows = rows.chunks_exact(shape[2]).flat_map(|row| {
                    let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
                    let root = (mean + 1e-5).sqrt();
                    row.iter().zip(&gammas).map(move |(x, gamma)| x / root * gamma)
                });
                let found = rms_norm(&x, &gamma, 1e-5).expect("it has a kernel");
                check(&found, &rows.collect::<Vec<_>>(), bound);
            }
        }
    }

    #[test]
    fn rotate_is_its_definition_for_one_row_of_angles_and_for_several() {
        for (dtype, bound) in TYPES {
            for (rows, [batch, length, heads, width]) in [
                (1, [1, 1, 9, 64]),
                (1, [2, 3, 2, 6]),
                (2, [2, 3, 2, 6]),
                (3, [3, 1, 1, 2]),
                (2, [2, 70, 9, 64]), // in several threads
            ] {
                let x = shaped([batch, length, heads * width], 1, dtype);
                let [cos, sin] = [2, 3].map(|seed| shaped([rows, 1, length, width], seed, dtype));
                let given = [values(&x), values(&cos), values(&sin)];
                let mut expected = Vec::new();
                for sample in 0..batch {
                    for head in 0..heads {
                        for position in 0..length {
                            let x =
                                &given[0][((sample * length + position) * heads + head) * width..];
                            let angle = (sample % rows * length + position) * width;
                            for i in 0..width {
                                let half = width / 2;
                                let other = if i < half { -x[i + half] } else { x[i - half] };
                                expected
                                    .push(x[i] * given[1][angle + i] + other * given[2][angle + i]);
                            }
                        }
                    }
                }
                let found = rotate(&x, &cos, &sin).expect("it has a kernel");
                assert_eq!(found.shape(), [batch, heads, length, width].into());
                check(&found, &expected, 10.0 * bound); // of a difference
            }
        }
    }

    #[test]
    fn gated_is_its_definition() {
        for (dtype, bound) in TYPES {
            for shape in [[1, 1, 1536], [2, 3, 7], [3, 50, 600]] {
                let scaled =
                    |seed, by: f64| Flex::float_mul_scalar(shaped(shape, seed, dtype), by.into());
                let (gate, up) = (scaled(1, 20.0), scaled(2, 3.0));
                let pairs = values(&gate).into_iter().zip(values(&up));
                let expected = pairs.map(|(x, up)| x / (1.0 + (-x).exp()) * up);
                let found = gated(&gate, &up).expect("it has a kernel");
                check(&found, &expected.collect::<Vec<_>>(), 2.0 * bound);
            }
        }
        let of = |gate: f32| {
            let [gate, up] = [gate, 1.0].map(|value| tensor_of(vec![value], [1]));
            values(&gated(&gate, &up).expect("it has a kernel"))[0]
        };
        assert_eq!(of(1e30), 1e30f32 as f64);
        assert_eq!(of(-1e30), 0.0);
        assert!(of(f32::NAN).is_nan());
    }

    #[test]
    fn other_forms_have_no_kernel() {
        let x = || shaped([1, 2, 8], 1, DType::F32);
        let gamma = |width| shaped([width], 1, DType::F32);
        assert!(rms_norm(&x(), &gamma(8), 1e-5).is_some());
        assert!(rms_norm(&x(), &gamma(7), 1e-5).is_none());
        assert!(rms_norm(&x(), &in_dtype(gamma(8), DType::BF16), 1e-5).is_none());
        assert!(rms_norm(&transposed([8, 8], 1), &gamma(8), 1e-5).is_none());
        let wide = |tensor| Flex::float_cast(tensor, FloatDType::F64);
        assert!(gated(&wide(x()), &wide(x())).is_none());
        assert!(gated(&x(), &shaped([2, 8], 1, DType::F32)).is_none());
        let angles = |shape: [usize; 4]| shaped(shape, 1, DType::F32);
        assert!(rotate(&x(), &angles([1, 1, 2, 4]), &angles([1, 1, 2, 4])).is_some());
        for other in [[1, 1, 2, 3], [1, 1, 1, 4], [2, 1, 2, 4], [1, 1, 2, 16], [1, 2, 2, 4]] {
            assert!(rotate(&x(), &angles(other), &angles(other)).is_none(), "{other:?}");
        }
    }
}
