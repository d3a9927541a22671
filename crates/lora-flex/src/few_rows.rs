//! x · W for an x with few rows, as in decoding, where a row is a token.

use burn::backend::Flex;
use burn::backend::ops::FloatTensorOps;
use burn::tensor::{DType, Element, TensorData};
use half::{bf16, f16};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::FlexTensor;
use crate::product::PARALLEL_FROM;

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

/// Columns that are worked on at a time: the part of the output, and a block of W, stay in an L1 cache.
const TILE: usize = 1024;

/// Sums of a dot product that are held side by side: enough vectors to hide how long one addition takes.
const LANES: usize = 64;

/// Values of W in one thread's stretch, at least.
const STRETCH: usize = 1 << 15;

fn dims(tensor: &FlexTensor) -> [usize; 2] {
    let shape = tensor.layout().shape();
    [shape[0], shape[1]]
}

/// A type of weights, and how it becomes f32: by integer operations that a compiler turns into vectors.
trait Weight: Element + Copy + Send + Sync + bytemuck::Pod {
    fn widen(self) -> f32;
    fn round(value: f32) -> Self;
}

impl Weight for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
    #[inline(always)]
    fn round(value: f32) -> Self {
        value
    }
}

impl Weight for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn round(value: f32) -> Self {
        Self::from_f32(value)
    }
}

impl Weight for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        const LARGEST_EXPONENT: u32 = 0x7c00;
        let bits = u32::from(self.to_bits());
        let magnitude = f32::from_bits((bits & 0x7fff) << 13);
        // 2^112 moves the exponent from f16's place to f32's, and makes normal numbers of the others.
        let scaled = (magnitude * f32::from_bits(0x7780_0000)).to_bits();
        let special = if bits & LARGEST_EXPONENT == LARGEST_EXPONENT { 0x7f80_0000 } else { 0 };
        f32::from_bits(scaled | special | (bits & 0x8000) << 16)
    }
    #[inline(always)]
    fn round(value: f32) -> Self {
        Self::from_f32(value)
    }
}

/// `None` for tensors of another form, or without values.
fn multiply<T: Weight>(x: &FlexTensor, weight: &FlexTensor) -> Option<FlexTensor> {
    let ([rows, d_input], [_, d_output]) = (dims(x), dims(weight));
    if rows * d_input * d_output == 0 {
        return None;
    }
    let strides = weight.layout().strides();
    let start = weight.layout().start_offset();
    let values = weight.storage::<T>().get(start..)?.get(..d_input * d_output)?;
    let by_rows = strides == [d_output as isize, 1];
    if !by_rows && strides != [1, d_input as isize] {
        return None;
    }
    let x = x.to_contiguous();
    let first = x.layout().start_offset();
    let x: Vec<f32> =
        x.storage::<T>()[first..first + rows * d_input].iter().map(|value| value.widen()).collect();

    let arch = Arch::new();
    let output = match by_rows {
        true => {
            let stretch = stretch(values.len(), d_output);
            let sums = |(at, values): (usize, &[T])| {
                let mut sums = vec![0.0; rows * d_output];
                let first = at * (stretch / d_output);
                arch.dispatch(AddRows { x: &x, d_input, first, values, sums: &mut sums });
                sums
            };
            match values.len() <= stretch {
                true => sums((0, values)),
                false => {
                    let parts: Vec<Vec<f32>> =
                        values.par_chunks(stretch).enumerate().map(sums).collect();
                    total(parts)
                }
            }
        }
        false => {
            let stretch = stretch(values.len(), d_input);
            let mut columns = vec![0.0; d_output * rows]; // [d_output, rows]
            let dots = |(values, output): (&[T], &mut [f32])| {
                arch.dispatch(Dots { x: &x, d_input, values, output });
            };
            match values.len() <= stretch {
                true => dots((values, &mut columns)),
                false => values
                    .par_chunks(stretch)
                    .zip(columns.par_chunks_mut(stretch / d_input * rows))
                    .for_each(dots),
            }
            match rows {
                1 => columns,
                _ => transpose(&columns, rows),
            }
        }
    };
    let output: Vec<T> = output.into_iter().map(T::round).collect();
    let data = TensorData::new(output, [rows, d_output]);
    Some(Flex::float_from_data(data, &Default::default()))
}

/// How many values one thread takes: whole lines of `line` values, all of them for a small weight.
fn stretch(values: usize, line: usize) -> usize {
    if values < PARALLEL_FROM / 8 {
        return values;
    }
    let threads = rayon::current_num_threads();
    values.div_ceil(threads).max(STRETCH).div_ceil(line) * line
}

fn total(parts: Vec<Vec<f32>>) -> Vec<f32> {
    let mut parts = parts.into_iter();
    let mut total = parts.next().unwrap_or_default();
    for part in parts {
        total.iter_mut().zip(part).for_each(|(sum, value)| *sum += value);
    }
    total
}

fn transpose(columns: &[f32], rows: usize) -> Vec<f32> {
    (0..rows).flat_map(|row| columns.iter().skip(row).step_by(rows).copied()).collect()
}

/// a · b + c, in one step where the processor has it.
#[inline(always)]
fn multiply_add<S: Simd>(a: f32, b: f32, c: f32) -> f32 {
    // Every set of vector instructions that `pulp` knows has the step; without it, it would be a call.
    if S::F32_LANES > 1 { a.mul_add(b, c) } else { a * b + c }
}

/// Adds to `sums` `[rows, columns]` what the rows of W in `values`, from row `first`, give.
struct AddRows<'a, T> {
    x: &'a [f32], // [rows, d_input]
    d_input: usize,
    first: usize,
    values: &'a [T],
    sums: &'a mut [f32],
}

impl<T: Weight> WithSimd for AddRows<'_, T> {
    type Output = ();

    #[inline(always)] // so that it is compiled for S
    fn with_simd<S: Simd>(self, _: S) {
        let Self { x, d_input, first, values, sums } = self;
        let columns = sums.len() / (x.len() / d_input);
        for tile in (0..columns).step_by(TILE) {
            let width = TILE.min(columns - tile);
            let blocks = values.chunks(BLOCK * columns).zip((first..).step_by(BLOCK));
            for (block, row) in blocks {
                for (x, sums) in x.chunks_exact(d_input).zip(sums.chunks_exact_mut(columns)) {
                    let sums = &mut sums[tile..tile + width];
                    let line = |k: usize| &block[k * columns + tile..][..width];
                    if block.len() == BLOCK * columns {
                        let x = &x[row..row + BLOCK];
                        add_block::<S, T>(x, std::array::from_fn(line), sums);
                    } else {
                        for k in 0..block.len() / columns {
                            add_line::<S, T>(x[row + k], line(k), sums);
                        }
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn add_block<S: Simd, T: Weight>(x: &[f32], lines: [&[T]; BLOCK], sums: &mut [f32]) {
    let lines = lines.map(|line| &line[..sums.len()]);
    for (column, sum) in sums.iter_mut().enumerate() {
        let mut value = *sum;
        for k in 0..BLOCK {
            value = multiply_add::<S>(x[k], lines[k][column].widen(), value);
        }
        *sum = value;
    }
}

#[inline(always)]
fn add_line<S: Simd, T: Weight>(x: f32, line: &[T], sums: &mut [f32]) {
    for (sum, weight) in sums.iter_mut().zip(line) {
        *sum = multiply_add::<S>(x, weight.widen(), *sum);
    }
}

/// The dot products of all rows of x with the columns of W in `values`; `output` `[columns, rows]`.
struct Dots<'a, T> {
    x: &'a [f32], // [rows, d_input]
    d_input: usize,
    values: &'a [T],
    output: &'a mut [f32],
}

impl<T: Weight> WithSimd for Dots<'_, T> {
    type Output = ();

    #[inline(always)] // so that it is compiled for S
    fn with_simd<S: Simd>(self, _: S) {
        let Self { x, d_input, values, output } = self;
        let rows = x.len() / d_input;
        for (column, output) in values.chunks_exact(d_input).zip(output.chunks_exact_mut(rows)) {
            for (x, output) in x.chunks_exact(d_input).zip(output) {
                *output = dot::<S, T>(x, column);
            }
        }
    }
}

#[inline(always)]
fn dot<S: Simd, T: Weight>(x: &[f32], column: &[T]) -> f32 {
    let (x, x_rest) = x.as_chunks::<LANES>();
    let (column, column_rest) = column.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for (x, column) in x.iter().zip(column) {
        for lane in 0..LANES {
            sums[lane] = multiply_add::<S>(x[lane], column[lane].widen(), sums[lane]);
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    let rest = x_rest.iter().zip(column_rest);
    rest.fold(sums[0], |sum, (x, weight)| multiply_add::<S>(*x, weight.widen(), sum))
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
        let sizes =
            [[1, 1, 1], [1, 7, 5], [2, 65, 130], [3, 129, 1030], [4, 576, 192], [1, 1037, 2051]];
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
            check(without_first(tensor([3, 40], 1)), without_first(tensor([41, 33], 2)), dtype);
            check(transposed([2, 40], 1), tensor([40, 33], 2), dtype);
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
    fn every_half_is_widened_to_its_value() {
        for bits in 0..=u16::MAX {
            let value = f16::from_bits(bits);
            let (found, expected) = (value.widen(), value.to_f32());
            assert!(found == expected || (found.is_nan() && expected.is_nan()), "{bits:x}");
            assert_eq!(found.is_sign_negative(), expected.is_sign_negative(), "{bits:x}");
            let value = bf16::from_bits(bits);
            let (found, expected) = (value.widen(), value.to_f32());
            assert!(found == expected || (found.is_nan() && expected.is_nan()), "{bits:x}");
        }
    }
}
