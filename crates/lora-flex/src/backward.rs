//! The gradients of what stands between the products of a decoder, each in one pass over its input.

use burn::backend::TensorMetadata;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::FlexTensor;
use crate::exponential::exp_of_negative;
use crate::weight::{Weight, by_dtype, tensor_of, values_of};

/// Values that one thread takes at a time, about.
const CHUNK: usize = 1 << 14;

/// The gradients of [`gated`](crate::gated) with respect to gate and up, from `g`, that of its output.
///
/// With s = 1 / (1 + e^-gate): dgate = g up s (1 + gate (1 - s)), dup = g gate s.
///
/// # Shapes
/// - gate, up, g and outputs of one shape; gate and up contiguous
///
/// `None` for tensors of another form, of unequal or other dtypes than f32, bf16 and f16, or without values.
pub fn gated_backward(
    gate: &FlexTensor,
    up: &FlexTensor,
    g: &FlexTensor,
) -> Option<(FlexTensor, FlexTensor)> {
    by_dtype!(gate.dtype(), gated_backward_in(gate, up, g))
}

fn gated_backward_in<T: Weight>(
    gate: &FlexTensor,
    up: &FlexTensor,
    g: &FlexTensor,
) -> Option<(FlexTensor, FlexTensor)> {
    let g = g.to_contiguous();
    let (gates, ups, gs) = (values_of::<T>(gate)?, values_of::<T>(up)?, values_of::<T>(&g)?);
    if gates.is_empty() || gates.len() != ups.len() || gates.len() != gs.len() {
        return None;
    }
    let [mut to_gate, mut to_up] = [0; 2].map(|_| vec![T::round(0.0); gates.len()]);
    let inputs = gates.par_chunks(CHUNK).zip(ups.par_chunks(CHUNK)).zip(gs.par_chunks(CHUNK));
    let outputs = to_gate.par_chunks_mut(CHUNK).zip(to_up.par_chunks_mut(CHUNK));
    inputs.zip(outputs).for_each(|(((gate, up), g), (to_gate, to_up))| {
        Arch::new().dispatch(GateBackward { gate, up, g, to_gate, to_up });
    });
    Some((tensor_of(to_gate, gate.shape()), tensor_of(to_up, up.shape())))
}

struct GateBackward<'a, T> {
    gate: &'a [T],
    up: &'a [T],
    g: &'a [T],
    to_gate: &'a mut [T],
    to_up: &'a mut [T],
}

impl<T: Weight> WithSimd for GateBackward<'_, T> {
    type Output = ();

    #[inline(always)] // so that it is compiled for S
    fn with_simd<S: Simd>(self, _: S) {
        let inputs = self.gate.iter().zip(self.up).zip(self.g);
        for (((gate, up), g), (to_gate, to_up)) in
            inputs.zip(self.to_gate.iter_mut().zip(self.to_up))
        {
            let (x, up, g) = (gate.widen(), up.widen(), g.widen());
            // sigmoid from e^-|x|, which does not overflow.
            let e = exp_of_negative(-x.abs());
            let sigmoid = (if x < 0.0 { e } else { 1.0 }) / (1.0 + e);
            *to_gate = T::round(g * up * sigmoid * (1.0 + x * (1.0 - sigmoid)));
            *to_up = T::round(g * x * sigmoid);
        }
    }
}

/// The gradients of [`rms_norm`](crate::rms_norm) with respect to x and gamma, from `g`, that of its output.
///
/// With n = x / sqrt(mean(x²) + epsilon), of each row: dx = (g gamma - n mean(g gamma n)) / sqrt(mean(x²) + epsilon);
/// dgamma is the sum of g n over the rows.
///
/// # Shapes
/// - x and g `[..., width]`, x contiguous; gamma `[width]`; outputs as x and gamma
///
/// `None` for tensors of another form, of unequal or other dtypes than f32, bf16 and f16, or without values.
pub fn rms_norm_backward(
    x: &FlexTensor,
    gamma: &FlexTensor,
    epsilon: f64,
    g: &FlexTensor,
) -> Option<(FlexTensor, FlexTensor)> {
    by_dtype!(x.dtype(), rms_norm_backward_in(x, gamma, epsilon, g))
}

fn rms_norm_backward_in<T: Weight>(
    x: &FlexTensor,
    gamma: &FlexTensor,
    epsilon: f64,
    g: &FlexTensor,
) -> Option<(FlexTensor, FlexTensor)> {
    let g = g.to_contiguous();
    let (values, gammas, gs) = (values_of::<T>(x)?, values_of::<T>(gamma)?, values_of::<T>(&g)?);
    let width = *x.layout().shape().last()?;
    if values.is_empty() || gammas.len() != width || gs.len() != values.len() {
        return None;
    }
    let wide: Vec<f32> = gammas.iter().map(|value| value.widen()).collect();
    let mut to_x = vec![T::round(0.0); values.len()];
    let some = (CHUNK / width).max(1) * width;
    let parts = values.par_chunks(some).zip(gs.par_chunks(some)).zip(to_x.par_chunks_mut(some));
    let sums: Vec<Vec<f32>> = parts
        .map(|((x, g), to_x)| {
            let mut to_gamma = vec![0.0; width];
            let (gamma, epsilon) = (&wide[..], epsilon as f32);
            Arch::new().dispatch(NormBackward {
                x,
                g,
                gamma,
                epsilon,
                to_x,
                to_gamma: &mut to_gamma,
            });
            to_gamma
        })
        .collect();
    let mut to_gamma = vec![0.0; width];
    for sums in sums {
        to_gamma.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
    }
    let to_gamma = to_gamma.into_iter().map(T::round).collect();
    Some((tensor_of::<T>(to_x, x.shape()), tensor_of::<T>(to_gamma, [width])))
}

struct NormBackward<'a, T> {
    x: &'a [T],
    g: &'a [T],
    gamma: &'a [f32],
    epsilon: f32,
    to_x: &'a mut [T],
    to_gamma: &'a mut [f32],
}

impl<T: Weight> WithSimd for NormBackward<'_, T> {
    type Output = ();

    #[inline(always)] // so that it is compiled for S
    fn with_simd<S: Simd>(self, _: S) {
        let Self { x, g, gamma, epsilon, to_x, to_gamma } = self;
        let width = gamma.len();
        let [mut wide, mut scaled] = [0; 2].map(|_| vec![0.0; width]); // x and g gamma of a row
        let rows = x.chunks_exact(width).zip(g.chunks_exact(width));
        for ((x, g), to_x) in rows.zip(to_x.chunks_exact_mut(width)) {
            wide.iter_mut().zip(x).for_each(|(wide, x)| *wide = x.widen());
            for ((scaled, g), gamma) in scaled.iter_mut().zip(g).zip(gamma) {
                *scaled = g.widen() * gamma;
            }
            let mean = dot(&wide, &wide) / width as f32;
            let inverse = 1.0 / (mean + epsilon).sqrt();
            let along = dot(&scaled, &wide) * inverse * inverse / width as f32;
            for (((wide, scaled), to_x), (to_gamma, g)) in
                wide.iter().zip(&scaled).zip(to_x).zip(to_gamma.iter_mut().zip(g))
            {
                *to_x = T::round(inverse * (scaled - wide * along));
                *to_gamma += g.widen() * wide * inverse;
            }
        }
    }
}

/// The sum of the products of two rows.
#[inline(always)]
pub(crate) fn dot(left: &[f32], right: &[f32]) -> f32 {
    const LANES: usize = 16; // sums side by side, which a vector can hold
    let mut sums = [0.0; LANES];
    let (lefts, rights) = (left.chunks_exact(LANES), right.chunks_exact(LANES));
    let rest = lefts.remainder().iter().zip(rights.remainder()).map(|(a, b)| a * b).sum::<f32>();
    for (left, right) in lefts.zip(rights) {
        sums.iter_mut().zip(left.iter().zip(right)).for_each(|(sum, (a, b))| *sum += a * b);
    }
    sums.iter().sum::<f32>() + rest
}

/// The gradient of [`rotate`](crate::rotate) with respect to x, from `g`, that of its output: each head turned back,
/// and the heads of a position next to each other again.
///
/// # Shapes
/// - g `[batch, heads, length, head_dim]`, cos and sin `[1 or batch, 1, length, head_dim]`, these contiguous
/// - output `[batch, length, heads * head_dim]`, contiguous
///
/// `None` for tensors of another form, of unequal or other dtypes than f32, bf16 and f16, or without values.
pub fn rotate_backward(g: &FlexTensor, cos: &FlexTensor, sin: &FlexTensor) -> Option<FlexTensor> {
    if [g, cos, sin].map(|tensor| tensor.layout().num_dims()) != [4, 4, 4] {
        return None;
    }
    by_dtype!(g.dtype(), rotate_backward_in(g, cos, sin))
}

fn rotate_backward_in<T: Weight>(
    g: &FlexTensor,
    cos: &FlexTensor,
    sin: &FlexTensor,
) -> Option<FlexTensor> {
    let [batch, heads, length, head_dim] = g.layout().shape().dims::<4>();
    let [rows, ..] = cos.layout().shape().dims::<4>();
    let fits = cos.shape() == sin.shape()
        && **cos.layout().shape() == [rows, 1, length, head_dim]
        && (rows == 1 || rows == batch)
        && head_dim.is_multiple_of(2);
    let g = g.to_contiguous();
    let (gs, cos, sin) = (values_of::<T>(&g)?, values_of::<T>(cos)?, values_of::<T>(sin)?);
    if !fits || gs.is_empty() {
        return None;
    }
    let width = heads * head_dim;
    let mut output = vec![T::round(0.0); gs.len()];
    output.par_chunks_exact_mut(width).enumerate().for_each(|(number, output)| {
        let (sample, position) = (number / length, number % length);
        let angle = (sample % rows * length + position) * head_dim;
        let (cos, sin) = (&cos[angle..][..head_dim], &sin[angle..][..head_dim]);
        for (head, output) in output.chunks_exact_mut(head_dim).enumerate() {
            let g = &gs[((sample * heads + head) * length + position) * head_dim..][..head_dim];
            Arch::new().dispatch(TurnBack { g, cos, sin, output });
        }
    });
    Some(tensor_of(output, [batch, length, width]))
}

struct TurnBack<'a, T> {
    g: &'a [T],
    cos: &'a [T],
    sin: &'a [T],
    output: &'a mut [T],
}

impl<T: Weight> WithSimd for TurnBack<'_, T> {
    type Output = ();

    #[inline(always)] // so that it is compiled for S
    fn with_simd<S: Simd>(self, _: S) {
        let half = self.g.len() / 2;
        let (first, second) = self.g.split_at(half);
        let (first_cos, second_cos) = self.cos.split_at(half);
        let (first_sin, second_sin) = self.sin.split_at(half);
        let (first_output, second_output) = self.output.split_at_mut(half);
        for i in 0..half {
            let [g, h] = [first[i].widen(), second[i].widen()];
            first_output[i] = T::round(g * first_cos[i].widen() + h * second_sin[i].widen());
            second_output[i] = T::round(h * second_cos[i].widen() - g * first_sin[i].widen());
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Flex;
    use burn::backend::ops::FloatTensorOps;
    use burn::tensor::DType;

    use super::*;
    use crate::samples::{TYPES, check, in_dtype, shaped, values};
    use crate::{gated, rms_norm, rotate};

    #[test]
    fn gated_backward_is_its_definition() {
        for (dtype, bound) in TYPES {
            for shape in [[1, 1, 8], [2, 3, 7], [3, 50, 600]] {
                let scaled =
                    |seed, by: f64| Flex::float_mul_scalar(shaped(shape, seed, dtype), by.into());
                let (gate, up, g) = (scaled(1, 10.0), scaled(2, 3.0), scaled(3, 1.0));
                let given = values(&gate).into_iter().zip(values(&up)).zip(values(&g));
                let expected = given.map(|((x, up), g)| {
                    let s = 1.0 / (1.0 + (-x).exp());
                    (g * up * s * (1.0 + x * (1.0 - s)), g * x * s)
                });
                let (to_gate, to_up): (Vec<f64>, Vec<f64>) = expected.unzip();
                let found = gated_backward(&gate, &up, &g).expect("it has a kernel");
                check(&found.0, &to_gate, 2.0 * bound);
                check(&found.1, &to_up, 2.0 * bound);
                assert_eq!(found.0.dtype(), dtype);
            }
        }
    }

    #[test]
    fn rms_norm_backward_is_its_definition() {
        const EPSILON: f64 = 1e-3;
        for (dtype, bound) in TYPES {
            for shape in [[1, 1, 5], [2, 3, 33], [3, 40, 576]] {
                let (x, gamma) = (shaped(shape, 1, dtype), shaped([shape[2]], 2, dtype));
                let g = shaped(shape, 3, dtype);
                let (xs, gammas, gs) = (values(&x), values(&gamma), values(&g));
                let (mut to_x, mut to_gamma) = (Vec::new(), vec![0.0; shape[2]]);
                for (x, g) in xs.chunks_exact(shape[2]).zip(gs.chunks_exact(shape[2])) {
                    let width = shape[2] as f64;
                    let root = (x.iter().map(|x| x * x).sum::<f64>() / width + EPSILON).sqrt();
                    let h: Vec<f64> = g.iter().zip(&gammas).map(|(g, gamma)| g * gamma).collect();
                    let along = h.iter().zip(x).map(|(h, x)| h * x / root).sum::<f64>() / width;
                    for i in 0..shape[2] {
                        to_x.push((h[i] - x[i] / root * along) / root);
                        to_gamma[i] += g[i] * x[i] / root;
                    }
                }
                let found = rms_norm_backward(&x, &gamma, EPSILON, &g).expect("it has a kernel");
                check(&found.0, &to_x, 4.0 * bound);
                // Sums of up to 120 numbers of about 1, formed in f32 and rounded once.
                check(&found.1, &to_gamma, 12.0 * bound);
            }
        }
    }

    /// What is linear has one gradient: the sum of g · rotate(x) is that of rotate_backward(g) · x.
    #[test]
    fn rotate_backward_is_the_transpose_of_rotate() {
        for (rows, [batch, length, heads, width]) in
            [(1, [1, 1, 9, 64]), (1, [2, 3, 2, 6]), (2, [2, 3, 2, 6]), (3, [3, 1, 1, 2])]
        {
            let x = shaped([batch, length, heads * width], 1, DType::F32);
            let [cos, sin] = [2, 3].map(|seed| shaped([rows, 1, length, width], seed, DType::F32));
            let g = shaped([batch, heads, length, width], 4, DType::F32);
            let y = values(&rotate(&x, &cos, &sin).unwrap());
            let back = rotate_backward(&g, &cos, &sin).expect("it has a kernel");
            assert_eq!(back.shape(), x.shape());
            let sum = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let (there, here) = (sum(&values(&g), &y), sum(&values(&back), &values(&x)));
            assert!((there - here).abs() <= 1e-5 * there.abs().max(1.0), "{there} and {here}");
            // And value by value where one of g is not zero.
            for at in 0..batch * heads * length * width {
                let mut one = vec![0.0f32; batch * heads * length * width];
                one[at] = 1.0;
                let one = tensor_of(one, [batch, heads, length, width]);
                let back = values(&rotate_backward(&one, &cos, &sin).unwrap());
                let found = sum(&back, &values(&x));
                assert!((found - y[at]).abs() <= 1e-5, "{at}: {found} for {}", y[at]);
            }
        }
    }

    #[test]
    fn other_forms_have_no_kernel() {
        let x = || shaped([1, 2, 8], 1, DType::F32);
        assert!(gated_backward(&x(), &x(), &x()).is_some());
        assert!(gated_backward(&x(), &x(), &shaped([1, 2, 7], 1, DType::F32)).is_none());
        assert!(gated_backward(&x(), &x(), &in_dtype(x(), DType::BF16)).is_none());
        let gamma = |width| shaped([width], 1, DType::F32);
        assert!(rms_norm_backward(&x(), &gamma(8), 1e-5, &x()).is_some());
        assert!(rms_norm_backward(&x(), &gamma(7), 1e-5, &x()).is_none());
        assert!(rms_norm(&x(), &gamma(7), 1e-5).is_none() && gated(&x(), &gamma(16)).is_none());
        let angles = |shape: [usize; 4]| shaped(shape, 1, DType::F32);
        let g = angles([1, 2, 2, 4]);
        assert!(rotate_backward(&g, &angles([1, 1, 2, 4]), &angles([1, 1, 2, 4])).is_some());
        for other in [[1, 1, 2, 3], [1, 1, 1, 4], [2, 1, 2, 4], [1, 2, 2, 4]] {
            assert!(rotate_backward(&g, &angles(other), &angles(other)).is_none(), "{other:?}");
        }
    }
}
