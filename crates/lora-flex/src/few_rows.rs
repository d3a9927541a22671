//! x · W for an x with few rows, as in decoding, where a row is a token.

use std::marker::PhantomData;

use burn::backend::Flex;
use burn::backend::ops::FloatTensorOps;
use burn::tensor::{DType, Element, TensorData};
use half::{bf16, f16};
use pulp::{Arch, Simd, WithSimd};

use crate::FlexTensor;

/// x · W for an x with few rows.
///
/// Every weight is used so few times that the product is bound by how fast W is read. So it is read once,
/// in the order in which it is stored, by rows or by columns, each thread its own stretch; half
/// precision is widened in registers, where Burn's product makes an f32 copy of W at each call. Sums are
/// in f32 and rounded once. That is for a W without gaps; other tensors, and many rows, take Burn's product.
///
/// # Shapes
/// - x `[rows, d_input]`, weight `[d_input, d_output]`, output `[rows, d_output]`, contiguous
///
/// # Panics
/// When the shapes do not fit each other, or the dtypes differ.
pub fn product_of_few_rows(x: FlexTensor, weight: FlexTensor) -> FlexTensor {
    let [rows, d_input] = dims(&x);
    let product = match x.dtype() {
        dtype if dtype != weight.dtype() || d_input != dims(&weight)[0] => None,
        DType::F32 if rows <= MOST_ROWS => multiply::<f32>(&x, &weight),
        DType::BF16 if rows <= MOST_ROWS_OF_HALVES => multiply::<bf16>(&x, &weight),
        DType::F16 if rows <= MOST_ROWS_OF_HALVES => multiply::<f16>(&x, &weight),
        _ => None,
    };
    product.unwrap_or_else(|| Flex::float_matmul(x, weight))
}

/// Beyond these, a product that keeps tiles of W in the cache for many rows is faster.
const MOST_ROWS: usize = 4;
const MOST_ROWS_OF_HALVES: usize = 16;

/// Rows of W that are added to the output at a time: one pass over it for so many rows.
const BLOCK: usize = 8;

/// Vectors of a dot product that are worked on side by side, enough to hide how long one addition takes.
const UNROLLED: usize = 4;

/// Words of W in one thread's stretch, at least: to read so many takes several times as long as to wake a
/// thread.
const STRETCH: usize = 1 << 15;

fn dims(tensor: &FlexTensor) -> [usize; 2] {
    let shape = tensor.layout().shape();
    [shape[0], shape[1]]
}

/// A type of weights, as the kernels read it: in words of one f32 or of two halves.
///
/// A vector of words becomes two vectors of f32, of the first and of the second value in each word, so that
/// nothing has to be moved between lanes; an f32 word has no second. Outputs and x are in the same
/// order meanwhile, first values before second ones.
trait Weight: Element + Copy + Send + Sync + bytemuck::Pod {
    /// 1 or 2.
    const PER_WORD: usize;

    fn widen(self) -> f32;
    fn round(value: f32) -> Self;
    fn split<S: Simd>(simd: S, words: S::u32s) -> [S::f32s; 2];
}

impl Weight for f32 {
    const PER_WORD: usize = 1;

    fn widen(self) -> f32 {
        self
    }

    fn round(value: f32) -> Self {
        value
    }

    #[inline(always)]
    fn split<S: Simd>(simd: S, words: S::u32s) -> [S::f32s; 2] {
        [simd.transmute_f32s_u32s(words), simd.splat_f32s(0.0)]
    }
}

impl Weight for bf16 {
    const PER_WORD: usize = 2;

    fn widen(self) -> f32 {
        self.to_f32()
    }

    fn round(value: f32) -> Self {
        Self::from_f32(value)
    }

    /// bf16 is the upper half of an f32.
    #[inline(always)]
    fn split<S: Simd>(simd: S, words: S::u32s) -> [S::f32s; 2] {
        let first = simd.wrapping_dyn_shl_u32s(words, simd.splat_u32s(16));
        let second = simd.and_u32s(words, simd.splat_u32s(0xffff_0000));
        [simd.transmute_f32s_u32s(first), simd.transmute_f32s_u32s(second)]
    }
}

impl Weight for f16 {
    const PER_WORD: usize = 2;

    fn widen(self) -> f32 {
        self.to_f32()
    }

    fn round(value: f32) -> Self {
        Self::from_f32(value)
    }

    #[inline(always)]
    fn split<S: Simd>(simd: S, words: S::u32s) -> [S::f32s; 2] {
        let second = simd.wrapping_dyn_shr_u32s(words, simd.splat_u32s(16));
        [widened_halves(simd, words), widened_halves(simd, second)]
    }
}

/// The f16 in the lower half of each word.
#[inline(always)]
fn widened_halves<S: Simd>(simd: S, words: S::u32s) -> S::f32s {
    let masked = |mask| simd.and_u32s(words, simd.splat_u32s(mask));
    let shifted = |words, by| simd.wrapping_dyn_shl_u32s(words, simd.splat_u32s(by));
    let magnitude = simd.transmute_f32s_u32s(shifted(masked(0x7fff), 13));
    // 2^112 moves the exponent from f16's place to f32's, and makes normal numbers of the subnormal.
    let scaled = simd.mul_f32s(magnitude, simd.splat_f32s(f32::from_bits(0x7780_0000)));
    // The largest exponent stands for infinity and NaN, here as there.
    let exponent = simd.splat_u32s(0x7c00);
    let is_special = simd.equal_u32s(masked(0x7c00), exponent);
    let special = simd.select_u32s(is_special, simd.splat_u32s(0x7f80_0000), simd.splat_u32s(0));
    let sign = shifted(masked(0x8000), 16);
    let bits = simd.or_u32s(simd.transmute_u32s_f32s(scaled), simd.or_u32s(special, sign));
    simd.transmute_f32s_u32s(bits)
}

/// `None` for tensors of another form, or without values.
fn multiply<T: Weight>(x: &FlexTensor, weight: &FlexTensor) -> Option<FlexTensor> {
    let ([rows, d_input], [_, d_output]) = (dims(x), dims(weight));
    let strides = weight.layout().strides();
    let by_rows = strides == [d_output as isize, 1];
    // A line is what lies together in memory: a row of W, or a column.
    let line = if by_rows { d_output } else { d_input };
    let fits = by_rows || strides == [1, d_input as isize];
    if !fits || rows * d_input * d_output == 0 || !line.is_multiple_of(T::PER_WORD) {
        return None;
    }
    let start = weight.layout().start_offset();
    let values = weight.storage::<T>().get(start..)?.get(..d_input * d_output)?;
    let words: &[u32] = bytemuck::try_cast_slice(values).ok()?; // fails where a view begins within a word
    let line = line / T::PER_WORD;

    let x = x.to_contiguous();
    let first = x.layout().start_offset();
    let x: Vec<f32> =
        x.storage::<T>()[first..first + rows * d_input].iter().map(|value| value.widen()).collect();
    let output = match by_rows {
        true => by_rows_of::<T>(&x, d_input, words, line),
        false => by_columns_of::<T>(&x, d_input, words, line),
    };
    let data = TensorData::new(output, [rows, d_output]);
    Some(Flex::float_from_data(data, &Default::default()))
}

/// x · W from the rows of W, each thread its own, whose sums are added up.
fn by_rows_of<T: Weight>(x: &[f32], d_input: usize, words: &[u32], line: usize) -> Vec<T> {
    let rows = x.len() / d_input;
    let arch = Arch::new();
    let stretch = stretch(words.len(), line);
    let sums = |(at, words): (usize, &[u32])| {
        let mut sums = vec![0.0; rows * T::PER_WORD * line]; // [rows, PER_WORD, line]
        let (first, phantom) = (at * (stretch / line), PhantomData::<T>);
        arch.dispatch(AddRows { x, d_input, first, line, words, sums: &mut sums, phantom });
        sums
    };
    let mut parts = vec![Vec::new(); words.len().div_ceil(stretch)];
    side_by_side(words.chunks(stretch).enumerate().zip(&mut parts), |(words, part)| {
        *part = sums(words);
    });
    let sums = total(parts);
    let mut output = Vec::with_capacity(sums.len());
    for sums in sums.chunks_exact(T::PER_WORD * line) {
        let (first, second) = sums.split_at(line);
        match T::PER_WORD {
            1 => output.extend(first.iter().map(|value| T::round(*value))),
            _ => output
                .extend(first.iter().zip(second).flat_map(|(a, b)| [T::round(*a), T::round(*b)])),
        }
    }
    output
}

/// x · W from the columns of W, each thread its own.
fn by_columns_of<T: Weight>(x: &[f32], d_input: usize, words: &[u32], line: usize) -> Vec<T> {
    let rows = x.len() / d_input;
    let arch = Arch::new();
    let x = match T::PER_WORD {
        1 => x.to_vec(),
        _ => {
            let halves = |row: &[f32]| {
                let every_second = |from| row.iter().skip(from).step_by(2).copied();
                every_second(0).chain(every_second(1)).collect::<Vec<_>>()
            };
            x.chunks_exact(d_input).flat_map(halves).collect()
        }
    };
    let stretch = stretch(words.len(), line);
    let mut columns = vec![0.0; words.len() / line * rows]; // [columns, rows]
    let dots = |(words, output): (&[u32], &mut [f32])| {
        arch.dispatch(Dots { x: &x, line, words, output, phantom: PhantomData::<T> });
    };
    side_by_side(words.chunks(stretch).zip(columns.chunks_mut(stretch / line * rows)), dots);
    let row = |row| columns.iter().skip(row).step_by(rows).map(|value| T::round(*value));
    (0..rows).flat_map(row).collect()
}

/// How many words one thread takes: whole lines.
fn stretch(words: usize, line: usize) -> usize {
    let threads = rayon::current_num_threads();
    words.div_ceil(threads).max(STRETCH).div_ceil(line) * line
}

/// Does the first part on this thread, and the others on those of the pool meanwhile. (A parallel iterator
/// would put this thread to sleep, and it is woken as often as there are products.)
fn side_by_side<T: Send>(parts: impl Iterator<Item = T>, work: impl Fn(T) + Sync) {
    let work = &work;
    rayon::in_place_scope(|scope| {
        let mut parts = parts;
        let first = parts.next();
        for part in parts {
            scope.spawn(move |_| work(part));
        }
        first.into_iter().for_each(work);
    });
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
struct AddRows<'a, T> {
    x: &'a [f32], // [rows, d_input]
    d_input: usize,
    first: usize,
    line: usize,
    words: &'a [u32],
    sums: &'a mut [f32],
    phantom: PhantomData<T>,
}

impl<T: Weight> WithSimd for AddRows<'_, T> {
    type Output = ();

    #[inline(always)] // so that it is compiled for S
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, d_input, first, line, words, sums, .. } = self;
        for (block, row) in words.chunks(BLOCK * line).zip((first..).step_by(BLOCK)) {
            let sums = sums.chunks_exact_mut(T::PER_WORD * line);
            for (x, sums) in x.chunks_exact(d_input).zip(sums) {
                if block.len() == BLOCK * line {
                    add_lines::<S, T, BLOCK>(simd, &x[row..], block, sums);
                } else {
                    for (x, words) in x[row..].iter().zip(block.chunks_exact(line)) {
                        add_lines::<S, T, 1>(simd, std::slice::from_ref(x), words, sums);
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
struct Dots<'a, T> {
    x: &'a [f32], // [rows, PER_WORD, line]
    line: usize,
    words: &'a [u32],
    output: &'a mut [f32],
    phantom: PhantomData<T>,
}

impl<T: Weight> WithSimd for Dots<'_, T> {
    type Output = ();

    #[inline(always)] // so that it is compiled for S
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, line, words, output, .. } = self;
        let rows = x.len() / (T::PER_WORD * line);
        for (column, output) in words.chunks_exact(line).zip(output.chunks_exact_mut(rows)) {
            for (x, output) in x.chunks_exact(T::PER_WORD * line).zip(output) {
                *output = dot::<S, T>(simd, x, column);
            }
        }
    }
}

#[inline(always)]
#[allow(clippy::needless_range_loop)] // by index: over iterators, the sums are not kept in registers
fn dot<S: Simd, T: Weight>(simd: S, x: &[f32], column: &[u32]) -> f32 {
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
    use burn::tensor::{FloatDType, Slice};

    use super::*;
    use crate::samples::{assert_close, tensor, transposed, values, without_first};

    fn in_dtype(tensor: FlexTensor, dtype: DType) -> FlexTensor {
        match dtype {
            DType::F32 => tensor,
            DType::F16 => Flex::float_cast(tensor, FloatDType::F16),
            _ => Flex::float_cast(tensor, FloatDType::BF16),
        }
    }

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
        let found = product_of_few_rows(x, weight);
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
            DType::F32 => multiply::<f32>(x, weight),
            DType::F16 => multiply::<f16>(x, weight),
            _ => multiply::<bf16>(x, weight),
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
            assert_close(&product_of_few_rows(x, weight), &expected);
        };
        // Columns with gaps between them.
        let columns = [Slice::from(0..), Slice::from(1..)];
        apart(tensor([2, 8], 1), Flex::float_slice(tensor([8, 6], 2), &columns));
    }

    #[test]
    fn many_rows_take_the_general_product() {
        let (x, weight) = (tensor([40, 64], 1), tensor([64, 32], 2));
        let expected = Flex::float_matmul(x.clone(), weight.clone());
        assert_eq!(values(&product_of_few_rows(x, weight)), values(&expected));
    }

    #[test]
    fn odd_lines_of_halves_take_the_general_product() {
        for shape in [[3, 5], [4, 5]] {
            let weight = in_dtype(tensor(shape, 2), DType::BF16);
            let x = in_dtype(tensor([2, shape[0]], 1), DType::BF16);
            let columns = Flex::float_transpose(in_dtype(tensor([6, shape[0]], 2), DType::BF16));
            assert!(multiply_of(&x, &weight).is_none());
            assert_eq!(multiply_of(&x, &columns).is_some(), shape[0] % 2 == 0);
            let expected = Flex::float_matmul(x.clone(), weight.clone());
            assert_eq!(values(&product_of_few_rows(x, weight)), values(&expected));
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
