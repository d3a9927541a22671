//! Attention of few queries, as in decoding, over keys and values as a cache holds them.

use std::marker::PhantomData;

use pulp::{Arch, Simd, WithSimd};

use crate::exponential::exp_of_negative;
use crate::few_rows::{AddRows, Dots, in_values, in_words};
use crate::weight::{Weight, by_dtype, tensor_of, values_of};
use crate::{FlexTensor, crew};

/// softmax(scale q k^T) v for few queries, all of which see all keys.
///
/// Keys and values are read once and where they lie; half precision is widened in registers, where
/// Burn's products make f32 copies of a whole cache at each token. Scores and sums are in f32, rounded once.
///
/// # Shapes
/// - q `[batch, heads, rows, head_dim]`, contiguous
/// - k, v `[batch, heads, positions, head_dim]`, contiguous but for gaps between heads
/// - output `[batch, heads, rows, head_dim]`, contiguous
///
/// `None` for tensors of another form, of unequal or other dtypes than f32, bf16 and f16, for more than
/// 64 rows, and where nothing is seen.
pub fn attend(q: &FlexTensor, k: &FlexTensor, v: &FlexTensor, scale: f32) -> Option<FlexTensor> {
    if [q, k, v].iter().any(|tensor| tensor.layout().num_dims() != 4) {
        return None;
    }
    by_dtype!(q.dtype(), attend_in(q, k, v, scale))
}

/// Beyond these, products that keep tiles of the keys in the cache are faster.
const MOST_ROWS: usize = 64;

/// Values of keys in one thread's part, at least: to go through them takes longer than to hand them over.
const PART: usize = 1 << 12;

fn attend_in<T: Weight>(
    q: &FlexTensor,
    k: &FlexTensor,
    v: &FlexTensor,
    scale: f32,
) -> Option<FlexTensor> {
    let shape: [usize; 4] = q.layout().shape().dims();
    let [batch, heads, rows, head_dim] = shape;
    let positions = k.layout().shape().dims::<4>()[2];
    let fits = [k, v].iter().all(|seen| {
        seen.dtype() == T::dtype() && **seen.layout().shape() == [batch, heads, positions, head_dim]
    });
    let values = batch * heads * positions * head_dim * rows;
    if !fits || values == 0 || rows > MOST_ROWS || !head_dim.is_multiple_of(T::PER_WORD) {
        return None;
    }
    let seen = Seen::<T>::of(k, v)?;
    let mut queries: Vec<f32> =
        values_of::<T>(q)?.iter().map(|value| value.widen() * scale).collect();
    queries = in_words::<T>(&queries, head_dim);

    let all = batch * heads;
    let most = (all * positions * head_dim).div_ceil(PART).min(all);
    let each = all.div_ceil(crew::parts(most));
    let parts = crew::share(all.div_ceil(each), move |part| {
        let mut output = Vec::with_capacity(each * rows * head_dim);
        for head in (part * each)..all.min((part + 1) * each) {
            let queries = &queries[head * rows * head_dim..][..rows * head_dim];
            let (batch, head) = (head / heads, head % heads);
            let (keys, values) = seen.head(batch, head, positions * head_dim);
            let phantom = PhantomData::<T>;
            let mixed = Arch::new().dispatch(Head { queries, keys, values, head_dim, phantom });
            let mixed = in_values::<T>(mixed, head_dim / T::PER_WORD);
            output.extend(mixed.into_iter().map(T::round));
        }
        output
    });
    Some(tensor_of(parts.concat(), shape))
}

/// The keys and values of all heads, wherever each head's begin.
struct Seen<T> {
    tensors: [FlexTensor; 2],
    phantom: PhantomData<T>,
}

impl<T: Weight> Seen<T> {
    /// `None` where the rows of a head do not follow each other, or words would be cut.
    fn of(k: &FlexTensor, v: &FlexTensor) -> Option<Self> {
        for tensor in [k, v] {
            let [_, _, positions, head_dim] = tensor.layout().shape().dims::<4>();
            let [batch, head, row, column] = strides(tensor)?;
            let rows_follow = column == 1 && (row == head_dim || positions == 1);
            let even = [tensor.layout().start_offset(), batch, head]
                .iter()
                .all(|offset| offset.is_multiple_of(T::PER_WORD));
            let storage = tensor.storage::<T>();
            let whole = &storage[..storage.len() / T::PER_WORD * T::PER_WORD];
            if !rows_follow || !even || bytemuck::try_cast_slice::<_, u32>(whole).is_err() {
                return None;
            }
        }
        Some(Self { tensors: [k.clone(), v.clone()], phantom: PhantomData })
    }

    /// The first `count` values of one head's keys and of its values, as words.
    fn head(&self, batch: usize, head: usize, count: usize) -> (&[u32], &[u32]) {
        let [keys, values] = &self.tensors;
        let words = |tensor| {
            let [batches, heads, ..] = strides(tensor).unwrap_or_default();
            let start = tensor.layout().start_offset() + batch * batches + head * heads;
            bytemuck::cast_slice(&tensor.storage::<T>()[start..][..count])
        };
        (words(keys), words(values))
    }
}

/// `None` where one is negative.
fn strides(tensor: &FlexTensor) -> Option<[usize; 4]> {
    let strides = tensor.layout().strides();
    let mut found = [0; 4];
    for (found, stride) in found.iter_mut().zip(strides) {
        *found = usize::try_from(*stride).ok()?;
    }
    Some(found)
}

/// The attention of one head, `[rows, PER_WORD, head_dim / PER_WORD]`.
struct Head<'a, T> {
    queries: &'a [f32], // [rows, PER_WORD, head_dim / PER_WORD], scaled
    keys: &'a [u32],    // [positions, head_dim / PER_WORD]
    values: &'a [u32],  // [positions, head_dim / PER_WORD]
    head_dim: usize,
    phantom: PhantomData<T>,
}

impl<T: Weight> WithSimd for Head<'_, T> {
    type Output = Vec<f32>;

    #[inline(always)] // so that it is compiled for S
    fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
        let Self { queries, keys, values, head_dim, phantom } = self;
        let (rows, line) = (queries.len() / head_dim, head_dim / T::PER_WORD);
        let positions = keys.len() / line;
        let mut scores = vec![0.0; positions * rows]; // [positions, rows]
        let dots = Dots { x: queries, line, words: keys, output: &mut scores, phantom };
        dots.with_simd(simd);
        let mut weights = vec![0.0; rows * positions]; // [rows, positions]
        for (row, weights) in weights.chunks_exact_mut(positions).enumerate() {
            let scores = scores.iter().skip(row).step_by(rows);
            weights.iter_mut().zip(scores).for_each(|(weight, score)| *weight = *score);
            softmax(weights);
        }
        let mut sums = vec![0.0; rows * head_dim];
        let (x, d_input, first, sums_of) = (&weights[..], positions, 0, &mut sums[..]);
        AddRows { x, d_input, first, line, words: values, sums: sums_of, phantom }.with_simd(simd);
        sums
    }
}

/// Scores to weights that sum to 1, in place.
#[inline(always)]
fn softmax(scores: &mut [f32]) {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    scores.iter_mut().for_each(|score| *score = exp_of_negative(*score - largest));
    const LANES: usize = 16; // sums side by side, which a vector can hold
    let mut sums = [0.0; LANES];
    let mut chunks = scores.chunks_exact(LANES);
    for chunk in &mut chunks {
        sums.iter_mut().zip(chunk).for_each(|(sum, weight)| *sum += weight);
    }
    let total = sums.iter().sum::<f32>() + chunks.remainder().iter().sum::<f32>();
    scores.iter_mut().for_each(|weight| *weight /= total);
}

#[cfg(test)]
mod tests {
    use burn::backend::Flex;
    use burn::backend::ops::FloatTensorOps;
    use burn::tensor::{DType, FloatDType, Shape, Slice};

    use super::*;
    use crate::samples::{in_dtype, tensor, values};

    /// `[batch, heads, rows, width]`.
    fn of_heads(shape: [usize; 4], seed: u64) -> FlexTensor {
        let [batch, heads, rows, width] = shape;
        Flex::float_reshape(tensor([batch * heads * rows, width], seed), Shape::from(shape))
    }

    /// What a cache gives: the first positions of a longer buffer.
    fn seen(shape: [usize; 4], seed: u64, dtype: DType) -> FlexTensor {
        let [batch, heads, positions, width] = shape;
        let buffer = in_dtype(of_heads([batch, heads, positions + 5, width], seed), dtype);
        let all = Slice::from(0..);
        Flex::float_slice(buffer, &[all, all, Slice::from(0..positions)])
    }

    /// The definition in f64, one query after the other.
    fn defined(
        shape: [usize; 4],
        positions: usize,
        [q, k, v]: [&[f64]; 3],
        scale: f64,
    ) -> Vec<f64> {
        let [batch, heads, rows, width] = shape;
        let mut output = Vec::new();
        for (query, q) in q.chunks_exact(width).enumerate() {
            let head = query / rows;
            assert!(head < batch * heads);
            let lines = |seen: &[f64]| -> Vec<Vec<f64>> {
                let lines = seen.chunks_exact(width).skip(head * positions).take(positions);
                lines.map(<[f64]>::to_vec).collect()
            };
            let dot = |k: &Vec<f64>| q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() * scale;
            let weights: Vec<f64> = lines(k).iter().map(|k| dot(k).exp()).collect();
            let total: f64 = weights.iter().sum();
            let mut mixed = vec![0.0; width];
            for (weight, v) in weights.iter().zip(lines(v)) {
                mixed.iter_mut().zip(v).for_each(|(sum, v)| *sum += weight / total * v);
            }
            output.extend(mixed);
        }
        output
    }

    #[test]
    fn it_is_softmax_attention_for_every_type_and_size() {
        for (dtype, bound) in [(DType::F32, 1e-6), (DType::F16, 6e-4), (DType::BF16, 5e-3)] {
            for (shape, positions) in [
                ([1, 1, 1, 2], 1),
                ([1, 3, 3, 64], 300),
                ([2, 2, 5, 34], 17),
                ([3, 1, 64, 16], 9),
                ([1, 2, 1, 128], 1000),
            ] {
                let [batch, heads, _, width] = shape;
                let q = in_dtype(of_heads(shape, 1), dtype);
                let k = seen([batch, heads, positions, width], 2, dtype);
                let v = seen([batch, heads, positions, width], 3, dtype);
                let found = attend(&q, &k, &v, 0.7).expect("it has a kernel");
                assert_eq!((found.dtype(), found.layout().shape()), (dtype, &Shape::from(shape)));
                let given = [values(&q), values(&k), values(&v)];
                let given = [&given[0][..], &given[1], &given[2]];
                for (found, exact) in
                    values(&found).iter().zip(defined(shape, positions, given, 0.7))
                {
                    assert!((found - exact).abs() <= bound, "{shape:?}: {found} for {exact}");
                }
            }
        }
    }

    #[test]
    fn scores_far_apart_and_infinite_ones() {
        let one = |values: &[f32], positions: usize| {
            tensor_of(values.to_vec(), [1, 1, positions, values.len() / positions])
        };
        let v = one(&[1.0, 2.0, 3.0, 4.0], 2);
        let of = |q: f32, k: [f32; 2]| {
            let found = attend(&one(&[q, 0.0], 1), &one(&[k[0], 0.0, k[1], 0.0], 2), &v, 1.0);
            values(&found.expect("it has a kernel"))
        };
        assert_eq!(of(1e4, [1.0, -1.0]), [1.0, 2.0]);
        assert_eq!(of(-1e4, [1.0, -1.0]), [3.0, 4.0]);
        assert!(of(f32::INFINITY, [1.0, 1.0]).iter().all(|value| value.is_nan()));
        assert!(of(f32::NAN, [1.0, 1.0]).iter().all(|value| value.is_nan()));
    }

    #[test]
    fn other_forms_have_no_kernel() {
        let q = || of_heads([1, 2, 3, 8], 1);
        let k = || of_heads([1, 2, 4, 8], 2);
        assert!(attend(&q(), &k(), &k(), 1.0).is_some());
        assert!(attend(&q(), &k(), &of_heads([1, 2, 5, 8], 2), 1.0).is_none());
        assert!(attend(&q(), &k(), &in_dtype(k(), DType::BF16), 1.0).is_none());
        assert!(attend(&of_heads([1, 2, 65, 8], 1), &k(), &k(), 1.0).is_none());
        assert!(
            attend(&q(), &Flex::float_swap_dims(of_heads([1, 4, 2, 8], 1), 1, 2), &k(), 1.0)
                .is_none()
        );
        let wide = |tensor| Flex::float_cast(tensor, FloatDType::F64);
        assert!(attend(&wide(q()), &wide(k()), &wide(k()), 1.0).is_none());
        // An odd width has no whole words of halves.
        let odd = || in_dtype(of_heads([1, 1, 2, 7], 1), DType::BF16);
        assert!(attend(&odd(), &odd(), &odd(), 1.0).is_none());
    }
}
