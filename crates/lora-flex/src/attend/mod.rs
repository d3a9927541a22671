//! Attention over keys and values as a cache holds them, of few queries as in decoding and of many as in a prompt.

mod backward;
mod blocks;

use std::marker::PhantomData;

use pulp::{Arch, Simd, WithSimd};

use crate::exponential::exp_of_negative;
use crate::few_rows::{AddRows, Dots, in_values, in_words};
use crate::weight::{Weight, by_dtype, tensor_of, values_of};
use crate::{FlexTensor, crew};
pub use backward::attend_backward;
use blocks::{Hidden, attend_in_blocks};

/// softmax(scale q k^T) v, without the keys that are hidden from a query.
///
/// Of few queries that see one run of keys, as in decoding, these and the values are read once and where they lie;
/// half precision is widened in registers, where Burn's products make f32 copies of a whole cache at each token.
/// Otherwise the scores of some queries are formed at a time, in half precision from f32 copies of the keys and
/// values. Scores, weights and sums are in f32 either way, and the output is rounded once, unless
/// [`Rounding::EachOperation`] is asked for.
///
/// # Shapes
/// - q `[batch, heads, rows, head_dim]`, contiguous; where query heads share keys, their queries stand under each
///   other
/// - k, v `[batch, heads, positions, head_dim]`
/// - hidden `[1 or batch, 1, length, positions]`, bool, contiguous: row r is of query r modulo length
/// - output `[batch, heads, rows, head_dim]`, contiguous
///
/// `None` for tensors of another form, of unequal or other dtypes than f32, bf16 and f16, and without values.
pub fn attend(
    q: &FlexTensor,
    k: &FlexTensor,
    v: &FlexTensor,
    scale: f32,
    hidden: Option<&FlexTensor>,
    rounding: Rounding,
) -> Option<FlexTensor> {
    if [q, k, v].iter().any(|tensor| tensor.layout().num_dims() != 4) {
        return None;
    }
    by_dtype!(q.dtype(), attend_in(q, k, v, scale, hidden, rounding))
}

/// Where attention in half precision is rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// The output, once.
    Output,
    /// The product of queries and keys, the scaled scores and the weights too, as operations one after the other
    /// round them: a product of hundreds is off by whole numbers then, and one beyond 65504 is infinite in f16. Not
    /// in attention of few queries that see one run of keys.
    EachOperation,
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
    hidden: Option<&FlexTensor>,
    rounding: Rounding,
) -> Option<FlexTensor> {
    let shape: [usize; 4] = q.layout().shape().dims();
    let [batch, heads, rows, head_dim] = shape;
    let positions = k.layout().shape().dims::<4>()[2];
    let fits = [k, v].iter().all(|seen| {
        seen.dtype() == T::dtype() && **seen.layout().shape() == [batch, heads, positions, head_dim]
    });
    let values = batch * heads * positions * head_dim * rows;
    if !fits || values == 0 {
        return None;
    }
    let hidden = Hidden::of(hidden, [batch, rows, positions])?;
    let fits = rows <= MOST_ROWS && head_dim.is_multiple_of(T::PER_WORD);
    let (true, Some(runs), Some(seen)) = (fits, hidden.runs(), Seen::<T>::of(k, v)) else {
        return attend_in_blocks::<T>(q, k, v, scale, &hidden, rounding);
    };
    let runs = runs.to_vec();
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
            let (run, line) = (&runs[batch % runs.len()], head_dim / T::PER_WORD);
            let [keys, values] =
                [keys, values].map(|words| &words[run.start * line..run.end * line]);
            let phantom = PhantomData::<T>;
            let mixed = Arch::new().dispatch(Head { queries, keys, values, head_dim, phantom });
            let mixed = in_values::<T>(mixed, line);
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
    use burn::backend::ops::{BoolTensorOps, FloatTensorOps};
    use burn::tensor::{DType, FloatDType, Shape, Slice, TensorData};

    use super::{attend as attend_rounding, *};
    use crate::samples::{in_dtype, tensor, values};

    fn attend(
        q: &FlexTensor,
        k: &FlexTensor,
        v: &FlexTensor,
        scale: f32,
        hidden: Option<&FlexTensor>,
    ) -> Option<FlexTensor> {
        attend_rounding(q, k, v, scale, hidden, Rounding::Output)
    }

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

    /// The definition in f64, one query after the other; `hides(text, row, key)`.
    fn defined(
        [batch, heads, rows, width]: [usize; 4],
        positions: usize,
        [q, k, v]: [&[f64]; 3],
        scale: f64,
        hides: impl Fn(usize, usize, usize) -> bool,
    ) -> Vec<f64> {
        let mut output = Vec::new();
        for (query, q) in q.chunks_exact(width).enumerate() {
            let head = query / rows;
            assert!(head < batch * heads);
            let lines = |seen: &[f64]| -> Vec<Vec<f64>> {
                let lines = seen.chunks_exact(width).skip(head * positions).take(positions);
                lines.map(<[f64]>::to_vec).collect()
            };
            let dot = |k: &Vec<f64>| q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() * scale;
            let weight = |(key, k)| match hides(head / heads, query % rows, key) {
                true => 0.0,
                false => dot(k).exp(),
            };
            let weights: Vec<f64> = lines(k).iter().enumerate().map(weight).collect();
            let total: f64 = weights.iter().sum();
            let mut mixed = vec![0.0; width];
            for (weight, v) in weights.iter().zip(lines(v)) {
                mixed.iter_mut().zip(v).for_each(|(sum, v)| *sum += weight / total * v);
            }
            output.extend(mixed);
        }
        output
    }

    /// `hides(text, query, key)` for `texts` texts of `length` queries.
    fn check(
        shape: [usize; 4],
        positions: usize,
        [texts, length]: [usize; 2],
        hides: Option<fn(usize, usize, usize) -> bool>,
    ) {
        let [batch, heads, _, width] = shape;
        let flags = hides.map(|hides| {
            let flag =
                |at: usize| hides(at / positions / length, at / positions % length, at % positions);
            let flags: Vec<bool> = (0..texts * length * positions).map(flag).collect();
            Flex::bool_from_data(
                TensorData::new(flags, [texts, 1, length, positions]),
                &Default::default(),
            )
        });
        for (dtype, bound) in [(DType::F32, 1e-6), (DType::F16, 6e-4), (DType::BF16, 5e-3)] {
            let q = in_dtype(of_heads(shape, 1), dtype);
            let k = seen([batch, heads, positions, width], 2, dtype);
            let v = seen([batch, heads, positions, width], 3, dtype);
            let found = attend(&q, &k, &v, 0.7, flags.as_ref()).expect("it has a kernel");
            assert_eq!((found.dtype(), found.layout().shape()), (dtype, &Shape::from(shape)));
            let given = [values(&q), values(&k), values(&v)];
            let given = [&given[0][..], &given[1], &given[2]];
            let exact = defined(shape, positions, given, 0.7, |text, row, key| {
                hides.is_some_and(|hides| hides(text % texts, row % length, key))
            });
            for (found, exact) in values(&found).iter().zip(exact) {
                assert!((found - exact).abs() <= bound, "{shape:?}: {found} for {exact}");
            }
        }
    }

    #[test]
    fn it_is_softmax_attention_for_every_type_and_size() {
        for (shape, positions) in [
            ([1, 1, 1, 2], 1),
            ([1, 3, 3, 64], 300),
            ([2, 2, 5, 34], 17),
            ([3, 1, 64, 16], 9),
            ([1, 2, 1, 128], 1000),
            ([2, 1, 65, 16], 9),
            ([1, 2, 3, 7], 4),
        ] {
            check(shape, positions, [1, 1], None);
        }
    }

    #[test]
    fn hidden_keys_are_not_seen() {
        // A prompt, whose query heads share keys, a part of one behind 30 positions, and within a window.
        check([2, 2, 3 * 70, 16], 70, [1, 70], Some(|_, query, key| key > query));
        check([1, 2, 2 * 20, 8], 50, [1, 20], Some(|_, query, key| key > query + 30));
        check(
            [1, 1, 150, 8],
            150,
            [1, 150],
            Some(|_, query, key| key > query || key + 20 <= query),
        );
        // Texts behind padding of their own, one step and a prompt of each.
        check([3, 2, 4, 8], 12, [3, 1], Some(|text, _, key| key < 2 * text));
        check(
            [3, 2, 2 * 9, 8],
            9,
            [3, 9],
            Some(|text, query, key| key > query || (key < text) != (query < text)),
        );
        check(
            [3, 2, 2 * 90, 8],
            90,
            [3, 90],
            Some(|text, query, key| key > query || key < 3 * text && query >= 3 * text),
        );
        // More heads for the same keys than are few.
        check([2, 1, 71, 8], 20, [2, 1], Some(|text, _, key| key < 2 + text));
        // What is hidden need not lie at the ends.
        check([1, 1, 90, 6], 80, [1, 90], Some(|_, query, key| (query + key) % 3 == 0));
    }

    #[test]
    fn scores_far_apart_and_infinite_ones() {
        let one = |values: &[f32], positions: usize| {
            tensor_of(values.to_vec(), [1, 1, positions, values.len() / positions])
        };
        let v = one(&[1.0, 2.0, 3.0, 4.0], 2);
        let of = |q: f32, k: [f32; 2]| {
            let k = one(&[k[0], 0.0, k[1], 0.0], 2);
            let found = attend(&one(&[q, 0.0], 1), &k, &v, 1.0, None);
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
        let of = |q: FlexTensor, k: FlexTensor, v: FlexTensor| attend(&q, &k, &v, 1.0, None);
        assert!(of(q(), k(), k()).is_some());
        assert!(of(q(), k(), of_heads([1, 2, 5, 8], 2)).is_none());
        assert!(of(q(), k(), in_dtype(k(), DType::BF16)).is_none());
        let wide = |tensor| Flex::float_cast(tensor, FloatDType::F64);
        assert!(of(wide(q()), wide(k()), wide(k())).is_none());
        let hidden = |shape: [usize; 4]| {
            let flags = TensorData::new(vec![false; shape.iter().product()], shape);
            let flags = Flex::bool_from_data(flags, &Default::default());
            attend(&q(), &k(), &k(), 1.0, Some(&flags)).is_some()
        };
        assert!(hidden([1, 1, 3, 4]) && hidden([1, 1, 1, 4]));
        for shape in [[1, 1, 2, 4], [1, 1, 3, 5], [2, 1, 3, 4], [1, 2, 3, 4], [1, 1, 0, 4]] {
            assert!(!hidden(shape), "{shape:?}");
        }
        assert!(attend(&q(), &k(), &k(), 1.0, Some(&of_heads([1, 1, 3, 4], 1))).is_none());
    }

    #[test]
    fn heads_may_stand_beside_each_other() {
        for dtype in [DType::F32, DType::BF16] {
            let q = in_dtype(of_heads([2, 3, 70, 8], 1), dtype);
            let beside = in_dtype(of_heads([2, 40, 3, 8], 2), dtype);
            let beside = Flex::float_swap_dims(beside, 1, 2);
            let found = attend(&q, &beside, &beside, 0.7, None).expect("it has a kernel");
            let apart = beside.to_contiguous();
            let expected = attend(&q, &apart, &apart, 0.7, None).expect("it has a kernel");
            assert_eq!(values(&found), values(&expected));
        }
    }

    #[test]
    fn a_query_without_keys_gives_no_numbers_and_leaves_the_others_alone() {
        let (q, k) = (of_heads([1, 1, 3, 8], 1), of_heads([1, 1, 4, 8], 2));
        let flags = |second: bool| {
            let flags =
                (0..12).map(|at| at / 4 == 1 && second || at % 4 == 3).collect::<Vec<bool>>();
            Flex::bool_from_data(TensorData::new(flags, [1, 1, 3, 4]), &Default::default())
        };
        let of = |flags: FlexTensor| values(&attend(&q, &k, &k, 1.0, Some(&flags)).unwrap());
        let (some, all) = (of(flags(true)), of(flags(false)));
        assert!(some[8..16].iter().all(|value| value.is_nan()));
        assert!(all.iter().all(|value| value.is_finite()));
        assert_eq!((&some[..8], &some[16..]), (&all[..8], &all[16..]));
    }

    /// Products beyond the largest number of f16, and between the steps of bf16.
    #[test]
    fn large_scores_are_not_rounded_unless_that_is_asked() {
        const SCALE: f64 = 0.0125;
        for (dtype, bias) in [(DType::F16, 90.0_f32), (DType::BF16, 20.0)] {
            let shape = [1, 1, 80, 16];
            let large = |seed, bias: f32| {
                let tensor = Flex::float_add_scalar(of_heads(shape, seed), bias.into());
                in_dtype(tensor, dtype)
            };
            let [q, k, v] = [large(1, bias), large(2, bias), large(3, 0.0)];
            let given = [values(&q), values(&k), values(&v)];
            let given = [&given[0][..], &given[1], &given[2]];
            // Relative to the first key's score, so that the exponentials of f64 stay finite.
            let first: Vec<f64> = given[1][..16].to_vec();
            let keys: Vec<f64> = given[1]
                .chunks(16)
                .flat_map(|key| {
                    key.iter().zip(&first).map(|(key, first)| key - first).collect::<Vec<_>>()
                })
                .collect();
            let exact = defined(shape, 80, [given[0], &keys, given[2]], SCALE, |_, _, _| false);
            let apart = |rounding| {
                let found = attend_rounding(&q, &k, &v, SCALE as f32, None, rounding);
                let found = values(&found.expect("it has a kernel"));
                let apart = found.iter().zip(&exact).map(|(found, exact)| (found - exact).abs());
                apart.fold(
                    0.0,
                    |worst: f64, one| if one > worst || one.is_nan() { one } else { worst },
                )
            };
            let (once, each) = (apart(Rounding::Output), apart(Rounding::EachOperation));
            assert!(once <= 5e-3, "{dtype:?}: {once}");
            assert!(each.is_nan() || each > 20.0 * once, "{dtype:?}: {each} and {once}");
        }
    }

    #[test]
    fn a_prompt_in_half_precision_is_rounded_as_burns_operations_round() {
        let shape = [1, 2, 100, 16];
        let [q, k, v] = [1, 2, 3].map(|seed| in_dtype(of_heads(shape, seed), DType::BF16));
        let found = attend_rounding(&q, &k, &v, 0.3, None, Rounding::EachOperation);
        let found = values(&found.expect("it has a kernel"));
        let wide = |tensor: FlexTensor| Flex::float_cast(tensor, FloatDType::F32);
        let half = |tensor: FlexTensor| Flex::float_cast(tensor, FloatDType::BF16);
        let scores = Flex::float_matmul(q, Flex::float_swap_dims(k, 2, 3));
        let scores = wide(half(Flex::float_mul_scalar(wide(scores), 0.3_f32.into())));
        let exponential = Flex::float_exp(scores);
        let total = Flex::float_sum_dim(exponential.clone(), 3);
        let weights = half(Flex::float_div(exponential, total));
        let expected = values(&Flex::float_matmul(weights, v));
        let other = found.iter().zip(&expected).filter(|(found, expected)| found != expected);
        // Where the last place in f32 decides.
        let (other, all) = (other.count(), expected.len());
        assert!(other * 50 <= all, "{other} of {all} are rounded elsewhere");
    }
}
