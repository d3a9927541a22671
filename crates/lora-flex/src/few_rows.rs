//! x · W for an x with few rows, as in decoding, where a row is a token.

use std::marker::PhantomData;

use burn::tensor::DType;
use half::{bf16, f16};
use pulp::{Arch, Simd, WithSimd};

use crate::prefetch::prefetch;
use crate::weight::{Weight, by_dtype, tensor_of, words_of};
use crate::{FlexTensor, crew};

/// x · W + bias for an x with few rows.
///
/// Every weight is used so few times that the product is bound by how fast W is read. So it is read once,
/// in the order in which it is stored, by rows or by columns, each thread some stretches; half
/// precision is widened in registers. Sums are in f32 and rounded once. `None` for many rows, a W with gaps,
/// and tensors of unequal or other dtypes.
///
/// # Shapes
/// - x `[rows, d_input]`, weight `[d_input, d_output]`, bias `[d_output]`
pub(crate) fn product_of_few_rows(
    x: &FlexTensor,
    weight: &FlexTensor,
    bias: Option<&[f32]>,
) -> Option<FlexTensor> {
    let [rows, d_input] = dims(x);
    match x.dtype() {
        dtype if dtype != weight.dtype() || d_input != dims(weight)[0] => None,
        DType::F32 if rows <= MOST_ROWS => multiply::<f32>(x, weight, bias),
        DType::BF16 if rows <= MOST_ROWS_OF_HALVES => multiply::<bf16>(x, weight, bias),
        DType::F16 if rows <= MOST_ROWS_OF_HALVES => multiply::<f16>(x, weight, bias),
        _ => None,
    }
}

/// Beyond these, a product that keeps tiles of W in the cache for many rows is faster.
const MOST_ROWS: usize = 4;
const MOST_ROWS_OF_HALVES: usize = 16;

/// Rows of W that are added to the output at a time: one pass over it for so many rows.
const BLOCK: usize = 8;

/// Vectors of a dot product that are worked on side by side, enough to hide how long one addition takes.
const UNROLLED: usize = 4;

/// Words of W in one stretch, at least: to read so many takes longer than to hand them over.
const STRETCH: usize = 1 << 14;

/// And about at most, where each part is small.
const LONGEST_STRETCH: usize = 1 << 17;

/// How many words ahead of those that are multiplied memory is asked for: more than a core reads while it waits
/// for one line.
const AHEAD: usize = 512;

/// Words of a block below which memory is asked for a whole block ahead: with what is at work, a first cache.
const SHORT_BLOCK: usize = 1 << 13;

/// Words for each sum of a part, at least.
const SUMS: usize = 16;

pub(crate) fn dims(tensor: &FlexTensor) -> [usize; 2] {
    let shape = tensor.layout().shape();
    [shape[0], shape[1]]
}

/// `None` for tensors of another form, or without values.
fn multiply<T: Weight>(
    x: &FlexTensor,
    weight: &FlexTensor,
    bias: Option<&[f32]>,
) -> Option<FlexTensor> {
    let mut sums = sums::<T>(&rows_of::<T>(x), weight)?;
    if let Some(bias) = bias {
        sums.iter_mut().zip(bias.iter().cycle()).for_each(|(sum, bias)| *sum += bias);
    }
    let output: Vec<T> = sums.into_iter().map(T::round).collect();
    Some(tensor_of(output, [dims(x)[0], dims(weight)[1]]))
}

/// y + left · right for few rows, rounded once; left and right in the dtype of y or in f32. `None` for
/// many rows and tensors of another form.
pub(crate) fn add_product_of_few_rows(
    y: &FlexTensor,
    left: &FlexTensor,
    right: &FlexTensor,
) -> Option<FlexTensor> {
    let few =
        dims(left)[0] <= if y.dtype() == DType::F32 { MOST_ROWS } else { MOST_ROWS_OF_HALVES };
    let same = left.dtype() == right.dtype() && [y.dtype(), DType::F32].contains(&left.dtype());
    let fits = dims(left)[1] == dims(right)[0] && dims(y) == [dims(left)[0], dims(right)[1]];
    if !few || !same || !fits {
        return None;
    }
    let sums = by_dtype!(right.dtype(), product_in_f32(left, right))?;
    by_dtype!(y.dtype(), add(y, sums))
}

fn product_in_f32<T: Weight>(left: &FlexTensor, right: &FlexTensor) -> Option<Vec<f32>> {
    sums::<T>(&rows_of::<T>(left), right)
}

fn add<T: Weight>(y: &FlexTensor, sums: Vec<f32>) -> Option<FlexTensor> {
    let output = rows_of::<T>(y).into_iter().zip(sums).map(|(y, sum)| T::round(y + sum)).collect();
    Some(tensor_of::<T>(output, dims(y)))
}

/// A tensor's values in f32, row by row.
fn rows_of<T: Weight>(x: &FlexTensor) -> Vec<f32> {
    let x = x.to_contiguous();
    let layout = x.layout();
    let values = &x.storage::<T>()[layout.start_offset()..][..layout.num_elements()];
    values.iter().map(|value| value.widen()).collect()
}

/// x · W in f32, `[rows, d_output]`, from x `[rows, d_input]`; `None` for a weight with gaps or whose lines
/// are no whole words, and without values.
fn sums<T: Weight>(x: &[f32], weight: &FlexTensor) -> Option<Vec<f32>> {
    let [d_input, d_output] = dims(weight);
    let strides = weight.layout().strides();
    let by_rows = strides == [d_output as isize, 1];
    // A line is what lies together in memory: a row of W, or a column.
    let line = if by_rows { d_output } else { d_input };
    let fits = by_rows || strides == [1, d_input as isize];
    if !fits || x.len() * d_output == 0 || !line.is_multiple_of(T::PER_WORD) {
        return None;
    }
    words_of::<T>(weight)?;
    let line = line / T::PER_WORD;
    Some(match by_rows {
        true => by_rows_of::<T>(x.to_vec(), weight.clone(), line),
        false => by_columns_of::<T>(x, weight.clone(), line),
    })
}

/// x · W from the rows of W, each thread its own, whose sums are added up.
fn by_rows_of<T: Weight>(x: Vec<f32>, weight: FlexTensor, line: usize) -> Vec<f32> {
    let [d_input, _] = dims(&weight);
    let rows = x.len() / d_input;
    let stretches = Stretches::of_rows(d_input, line, rows * T::PER_WORD * line);
    let parts = crew::share(stretches.parts, move |part| {
        let words = words_of::<T>(&weight).unwrap_or_default();
        let words = stretches.nth(words, line, part);
        let mut sums = vec![0.0; rows * T::PER_WORD * line]; // [rows, PER_WORD, line]
        let (first, x, phantom) = (part * stretches.lines, &x[..], PhantomData::<T>);
        let work = AddRows { x, d_input, first, line, words, sums: &mut sums, phantom };
        Arch::new().dispatch(work);
        sums
    });
    in_values::<T>(total(parts), line)
}

/// x · W from the columns of W, each thread its own.
fn by_columns_of<T: Weight>(x: &[f32], weight: FlexTensor, line: usize) -> Vec<f32> {
    let [d_input, d_output] = dims(&weight);
    let rows = x.len() / d_input;
    let x = in_words::<T>(x, d_input);
    let stretches = Stretches::of_columns(d_output, line);
    let parts = crew::share(stretches.parts, move |part| {
        let words = words_of::<T>(&weight).unwrap_or_default();
        let words = stretches.nth(words, line, part);
        let mut output = vec![0.0; words.len() / line * rows]; // [columns, rows]
        let (x, phantom) = (&x[..], PhantomData::<T>);
        Arch::new().dispatch(Dots { x, line, words, output: &mut output, phantom });
        output
    });
    let columns = parts.concat();
    if rows == 1 {
        return columns;
    }
    (0..rows).flat_map(|row| columns.iter().skip(row).step_by(rows).copied()).collect()
}

/// The rows of x, `[rows, d_input]`, in the order of words: `[rows, PER_WORD, d_input / PER_WORD]`.
pub(crate) fn in_words<T: Weight>(x: &[f32], d_input: usize) -> Vec<f32> {
    if T::PER_WORD == 1 {
        return x.to_vec();
    }
    let mut ordered = Vec::with_capacity(x.len());
    for row in x.chunks_exact(d_input) {
        ordered.extend(row.iter().step_by(2));
        ordered.extend(row.iter().skip(1).step_by(2));
    }
    ordered
}

/// Sums in the order of words, `[rows, PER_WORD, line]`, in that of values, `[rows, PER_WORD * line]`.
pub(crate) fn in_values<T: Weight>(sums: Vec<f32>, line: usize) -> Vec<f32> {
    if T::PER_WORD == 1 {
        return sums;
    }
    let mut ordered = Vec::with_capacity(sums.len());
    for sums in sums.chunks_exact(2 * line) {
        let (first, second) = sums.split_at(line);
        ordered.extend(first.iter().zip(second).flat_map(|(first, second)| [*first, *second]));
    }
    ordered
}

/// How the lines of W are shared among threads.
#[derive(Clone, Copy)]
struct Stretches {
    parts: usize,
    /// Lines of each part; the last may have fewer.
    lines: usize,
}

impl Stretches {
    /// Of columns: short ones, so that no thread waits long for the last of another.
    fn of_columns(lines: usize, line: usize) -> Self {
        let words = lines * line;
        let parts = crew::parts(words.div_ceil(STRETCH)).max(words / LONGEST_STRETCH);
        Self::of(lines, lines.div_ceil(parts.min(lines)))
    }

    /// Of rows, each part of which gives `width` sums: these must stay few beside the words.
    fn of_rows(lines: usize, line: usize, width: usize) -> Self {
        let most = (lines * line).div_ceil(STRETCH).min(lines * line / (SUMS * width)).max(1);
        Self::of(lines, lines.div_ceil(crew::parts(most)).next_multiple_of(BLOCK))
    }

    fn of(lines: usize, each: usize) -> Self {
        Self { parts: lines.div_ceil(each), lines: each }
    }

    fn nth<'a>(&self, words: &'a [u32], line: usize, part: usize) -> &'a [u32] {
        let stretch = self.lines * line;
        &words[part * stretch..][..stretch.min(words.len() - part * stretch)]
    }
}

fn total(parts: Vec<Vec<f32>>) -> Vec<f32> {
    let mut parts = parts.into_iter();
    let mut total = parts.next().unwrap_or_default();
    for part in parts {
        total.iter_mut().zip(part).for_each(|(sum, value)| *sum += value);
    }
    total
}

/// Adds to `sums` `[rows, PER_WORD, line]` what the rows of W in `words`, from row `first`, give.
pub(crate) struct AddRows<'a, T> {
    pub(crate) x: &'a [f32], // [rows, d_input]
    pub(crate) d_input: usize,
    pub(crate) first: usize,
    pub(crate) line: usize,
    pub(crate) words: &'a [u32],
    pub(crate) sums: &'a mut [f32],
    pub(crate) phantom: PhantomData<T>,
}

impl<T: Weight> WithSimd for AddRows<'_, T> {
    type Output = ();

    #[inline(always)] // so that it is compiled for S
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, d_input, first, line, words, sums, .. } = self;
        // To the same place in the next block, or further on in the same line.
        let distance = if BLOCK * line <= SHORT_BLOCK { BLOCK * line } else { AHEAD };
        for (number, block) in words.chunks(BLOCK * line).enumerate() {
            let row = first + number * BLOCK;
            let ahead = words.get(number * BLOCK * line + distance..).unwrap_or_default();
            let sums = sums.chunks_exact_mut(T::PER_WORD * line);
            for (x, sums) in x.chunks_exact(d_input).zip(sums) {
                if block.len() == BLOCK * line {
                    add_lines::<S, T, BLOCK>(simd, &x[row..], block, ahead, sums);
                } else {
                    for (x, words) in x[row..].iter().zip(block.chunks_exact(line)) {
                        add_lines::<S, T, 1>(simd, std::slice::from_ref(x), words, &[], sums);
                    }
                }
            }
        }
    }
}

/// Adds `K` rows of W, each times its value of x, to `sums` `[PER_WORD, line]`.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // by index: over iterators, the sums are not kept in registers
fn add_lines<S: Simd, T: Weight, const K: usize>(
    simd: S,
    x: &[f32],
    words: &[u32],
    ahead: &[u32],
    sums: &mut [f32],
) {
    let line = words.len() / K;
    let (first, second) = sums.split_at_mut(line);
    let (first, first_rest) = S::as_mut_simd_f32s(first);
    let (second, second_rest) = S::as_mut_simd_f32s(second);
    let count = first.len();
    let factors: [S::f32s; K] = std::array::from_fn(|k| simd.splat_f32s(x[k]));
    let lines: [&[S::u32s]; K] =
        std::array::from_fn(|k| &S::as_simd_u32s(&words[k * line..][..line]).0[..count]);
    for v in 0..count {
        let mut sum = [first[v], if T::PER_WORD == 2 { second[v] } else { first[v] }];
        for k in 0..K {
            prefetch(ahead, k * line + v * S::U32_LANES);
            let values = T::split(simd, lines[k][v]);
            for i in 0..T::PER_WORD {
                sum[i] = simd.mul_add_e_f32s(factors[k], values[i], sum[i]);
            }
        }
        first[v] = sum[0];
        if T::PER_WORD == 2 {
            second[v] = sum[1];
        }
    }
    // What is less than a vector is filled up with zeros to one.
    let rest = first_rest.len();
    if rest > 0 {
        for k in 0..K {
            let words = simd.partial_load_u32s(&words[k * line + line - rest..][..rest]);
            let values = T::split(simd, words);
            let add = |rest: &mut [f32], values| {
                let sum = simd.mul_add_e_f32s(factors[k], values, simd.partial_load_f32s(rest));
                simd.partial_store_f32s(rest, sum);
            };
            add(first_rest, values[0]);
            if T::PER_WORD == 2 {
                add(second_rest, values[1]);
            }
        }
    }
}

/// The dot products of all rows of x with the columns of W in `words`; `output` `[columns, rows]`.
pub(crate) struct Dots<'a, T> {
    pub(crate) x: &'a [f32], // [rows, PER_WORD, line]
    pub(crate) line: usize,
    pub(crate) words: &'a [u32],
    pub(crate) output: &'a mut [f32],
    pub(crate) phantom: PhantomData<T>,
}

impl<T: Weight> WithSimd for Dots<'_, T> {
    type Output = ();

    #[inline(always)] // so that it is compiled for S
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, line, words, output, .. } = self;
        let rows = x.len() / (T::PER_WORD * line);
        for (number, output) in output.chunks_exact_mut(rows).enumerate() {
            let column = &words[number * line..][..line];
            let ahead = words.get(number * line + AHEAD..).unwrap_or_default();
            for (x, output) in x.chunks_exact(T::PER_WORD * line).zip(output) {
                *output = dot::<S, T>(simd, x, column, ahead);
            }
        }
    }
}

#[inline(always)]
#[allow(clippy::needless_range_loop)] // by index: over iterators, the sums are not kept in registers
fn dot<S: Simd, T: Weight>(simd: S, x: &[f32], column: &[u32], ahead: &[u32]) -> f32 {
    let (words, words_rest) = S::as_simd_u32s(column);
    let (first, second) = x.split_at(column.len());
    let (first, first_rest) = S::as_simd_f32s(first);
    let (second, second_rest) = S::as_simd_f32s(second);
    let mut sums = [[simd.splat_f32s(0.0); 2]; UNROLLED];
    let add = |sum: &mut [S::f32s; 2], words, x: [S::f32s; 2]| {
        let values = T::split(simd, words);
        for i in 0..T::PER_WORD {
            sum[i] = simd.mul_add_e_f32s(x[i], values[i], sum[i]);
        }
    };
    let at = |v: usize| [first[v], if T::PER_WORD == 2 { second[v] } else { first[v] }];
    let whole = words.len() / UNROLLED * UNROLLED;
    for v in (0..whole).step_by(UNROLLED) {
        for n in 0..UNROLLED {
            prefetch(ahead, (v + n) * S::U32_LANES);
            add(&mut sums[n], words[v + n], at(v + n));
        }
    }
    for v in whole..words.len() {
        add(&mut sums[0], words[v], at(v));
    }
    let rest = [simd.partial_load_f32s(first_rest), simd.partial_load_f32s(second_rest)];
    add(&mut sums[1], simd.partial_load_u32s(words_rest), rest);
    let sums = sums.map(|[first, second]| simd.add_f32s(first, second));
    let sum = sums.into_iter().reduce(|a, b| simd.add_f32s(a, b));
    simd.reduce_sum_f32s(sum.unwrap_or(simd.splat_f32s(0.0)))
}

#[cfg(test)]
mod tests {
    use burn::backend::Flex;
    use burn::backend::ops::FloatTensorOps;
    use burn::tensor::{FloatDType, Slice};

    use super::*;
    use crate::linear;
    use crate::samples::{assert_close, in_dtype, tensor, transposed, values, without_first};

    /// Against Burn's product in f32 of the same, already rounded, values.
    #[track_caller]
    fn check(x: FlexTensor, weight: FlexTensor, dtype: DType) {
        let (x, weight) = (in_dtype(x, dtype), in_dtype(weight, dtype));
        assert_eq!(
            multiply_of(&x, &weight).map(|found| dims(&found)),
            Some([dims(&x)[0], dims(&weight)[1]])
        );
        let wide = |tensor: &FlexTensor| Flex::float_cast(tensor.clone(), FloatDType::F32);
        let exact = Flex::float_matmul(wide(&x), wide(&weight));
        let scale = values(&exact).iter().fold(0.0_f64, |largest, value| largest.max(value.abs()));
        let found = linear(x, weight, None);
        assert_eq!(found.dtype(), dtype);
        let bound = match dtype {
            DType::F32 => 3e-6,
            DType::F16 => 1.0 / 2048.0,
            _ => 1.0 / 256.0,
        };
        for (found, exact) in values(&found).iter().zip(values(&exact)) {
            let apart = (found - exact).abs() / scale;
            assert!(apart <= bound, "{found} for {exact}: {apart:e} of {scale}");
        }
    }

    fn multiply_of(x: &FlexTensor, weight: &FlexTensor) -> Option<FlexTensor> {
        match x.dtype() {
            DType::F32 => multiply::<f32>(x, weight, None),
            DType::F16 => multiply::<f16>(x, weight, None),
            _ => multiply::<bf16>(x, weight, None),
        }
    }

    #[test]
    fn it_is_the_product_for_every_layout_type_and_odd_size() {
        // [rows, d_input, d_output]: below, at and beyond a vector and a block, and with threads.
        let sizes =
            [[1, 2, 2], [1, 6, 10], [2, 66, 130], [3, 126, 1030], [4, 576, 192], [1, 1038, 2050]];
        for [rows, d_input, d_output] in sizes {
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let x = || tensor([rows, d_input], 3);
                check(x(), tensor([d_input, d_output], 5), dtype);
                check(x(), transposed([d_input, d_output], 5), dtype);
            }
        }
    }

    #[test]
    fn what_is_added_is_the_product_and_rounded_once() {
        for (dtype, bound) in [(DType::F32, 2e-6), (DType::F16, 6e-4), (DType::BF16, 4.5e-3)] {
            for [rows, rank, d_output] in [[1, 8, 192], [4, 2, 66], [3, 64, 6]] {
                let y = in_dtype(tensor([rows, d_output], 1), dtype);
                // Beside a y in half precision, the factors of an f32 adapter are multiplied as they are.
                for (form, factors) in [
                    (tensor as fn([usize; 2], u64) -> FlexTensor, dtype),
                    (transposed, dtype),
                    (tensor, DType::F32),
                    (transposed, DType::F32),
                ] {
                    let left = in_dtype(tensor([rows, rank], 2), factors);
                    let right = in_dtype(form([rank, d_output], 4), factors);
                    let wide =
                        |tensor: &FlexTensor| Flex::float_cast(tensor.clone(), FloatDType::F64);
                    let exact = Flex::float_matmul(wide(&left), wide(&right));
                    let exact = values(&Flex::float_add(wide(&y), exact));
                    let scale =
                        exact.iter().fold(0.0_f64, |largest, value| largest.max(value.abs()));
                    let found =
                        add_product_of_few_rows(&y, &left, &right).expect("it has a kernel");
                    assert_eq!(found.dtype(), dtype);
                    for (found, exact) in values(&found).iter().zip(exact) {
                        assert!((found - exact).abs() <= bound * scale, "{found} for {exact}");
                    }
                }
            }
        }
        let has_kernel = |y: FlexTensor, rows| {
            add_product_of_few_rows(&y, &tensor([rows, 2], 2), &tensor([2, 6], 4)).is_some()
        };
        assert!(has_kernel(tensor([3, 6], 1), 3));
        assert!(!has_kernel(tensor([3, 5], 1), 3));
        assert!(!has_kernel(tensor([5, 6], 1), 5));
        assert!(has_kernel(in_dtype(tensor([3, 6], 1), DType::BF16), 3));
        assert!(!has_kernel(Flex::float_cast(tensor([3, 6], 1), FloatDType::F64), 3));
        let halves = |tensor| in_dtype(tensor, DType::BF16);
        let (left, right) = (halves(tensor([3, 2], 2)), halves(tensor([2, 6], 4)));
        assert!(add_product_of_few_rows(&tensor([3, 6], 1), &left, &right).is_none());
    }

    #[test]
    fn views_that_begin_later_and_an_x_with_gaps() {
        for dtype in [DType::F32, DType::BF16] {
            check(without_first(tensor([3, 40], 1)), without_first(tensor([41, 34], 2)), dtype);
            check(transposed([2, 40], 1), tensor([40, 34], 2), dtype);
        }
    }

    #[test]
    fn other_forms_take_the_general_product() {
        let apart = |x: FlexTensor, weight: FlexTensor| {
            assert!(multiply_of(&x, &weight).is_none());
            let expected = Flex::float_matmul(x.clone(), weight.clone());
            assert_close(&linear(x, weight, None), &expected);
        };
        // Columns with gaps between them.
        let columns = [Slice::from(0..), Slice::from(1..)];
        apart(tensor([2, 8], 1), Flex::float_slice(tensor([8, 6], 2), &columns));
    }

    #[test]
    fn many_rows_take_the_general_product() {
        let (x, weight) = (tensor([40, 64], 1), tensor([64, 32], 2));
        let expected = Flex::float_matmul(x.clone(), weight.clone());
        assert_eq!(values(&linear(x, weight, None)), values(&expected));
    }

    #[test]
    fn odd_lines_of_halves_have_no_kernel() {
        for shape in [[3, 5], [4, 5]] {
            let weight = in_dtype(tensor(shape, 2), DType::BF16);
            let x = in_dtype(tensor([2, shape[0]], 1), DType::BF16);
            let columns = Flex::float_transpose(in_dtype(tensor([6, shape[0]], 2), DType::BF16));
            assert!(multiply_of(&x, &weight).is_none());
            assert_eq!(multiply_of(&x, &columns).is_some(), shape[0] % 2 == 0);
            let expected = Flex::float_matmul(x.clone(), weight.clone());
            assert_eq!(values(&linear(x, weight, None)), values(&expected));
        }
    }

    #[test]
    fn the_sums_of_all_parts_are_few_beside_the_words() {
        for (lines, line, rows) in [(4096, 64128, 1), (4096, 64128, 16), (576, 288, 1), (9, 3, 16)]
        {
            let width = rows * 2 * line;
            let Stretches { parts, lines: each } = Stretches::of_rows(lines, line, width);
            assert!(parts == 1 || SUMS * parts * width <= lines * line, "{parts}");
            assert!(parts * each >= lines && (parts - 1) * each < lines, "{parts} {each}");
            let Stretches { parts, lines: each } = Stretches::of_columns(lines, line);
            assert!(parts * each >= lines && (parts - 1) * each < lines, "{parts} {each}");
        }
    }

    struct Split<'a, T>(&'a [u32], PhantomData<T>);

    impl<T: Weight> WithSimd for Split<'_, T> {
        type Output = Vec<f32>;

        fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
            let (words, rest) = S::as_simd_u32s(self.0);
            assert!(rest.is_empty());
            let mut values = vec![0.0; 2 * self.0.len()];
            let (first, second) = values.split_at_mut(self.0.len());
            let (first, second) = (S::as_mut_simd_f32s(first).0, S::as_mut_simd_f32s(second).0);
            for (v, words) in words.iter().enumerate() {
                [first[v], second[v]] = T::split(simd, *words);
            }
            values
        }
    }

    #[test]
    fn every_half_is_widened_to_its_value() {
        fn check<T: Weight>(from_bits: fn(u16) -> T) {
            let all: Vec<u16> = (0..=u16::MAX).collect();
            let words: Vec<u32> =
                all.iter().map(|low| u32::from(*low) | u32::from(!*low) << 16).collect();
            let split = Arch::new().dispatch(Split(&words, PhantomData::<T>));
            let expected = all.iter().copied().chain(all.iter().map(|low| !*low));
            for (found, bits) in split.into_iter().zip(expected) {
                let expected = from_bits(bits).widen();
                assert!(
                    found == expected || (found.is_nan() && expected.is_nan()),
                    "{bits:x}: {found}"
                );
                assert_eq!(found.is_sign_negative(), expected.is_sign_negative(), "{bits:x}");
            }
        }
        check(f16::from_bits);
        check(bf16::from_bits);
    }
}
