//! left^T · right, of which one has few columns.

use burn::backend::Flex;
use burn::backend::ops::FloatTensorOps;
use burn::tensor::TensorData;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::FlexTensor;
use crate::product::{PARALLEL_FROM, in_one_dtype};
use crate::weight::{Weight, by_dtype, values_of};

/// Columns of the wide matrix that are worked on at a time; a multiple of every vector's length.
const TILE: usize = 64;

/// Rows of the wide matrix that are worked on at a time: as many streams as the processor's prefetching
/// follows.
const BLOCK: usize = 16;

/// Columns of one thread at a time: their part of the product, `rank` times as many values, stays in
/// an L2 cache.
const CHUNK: usize = 2048;

/// left^T · right, of which one has few columns, as the gradients of both factors have.
///
/// A product with so few multiplications for each value of the wide matrix is bound by how that is
/// read. A general matrix product walks down a strip of its columns, a new page of memory at every row;
/// this one walks over blocks of whole rows and keeps the output in the cache. That is for tensors without
/// gaps, one of them in f32 with up to 64 columns; the wide one may be in half precision, and is widened
/// where it is read. Others take `transposed_product_by_matmul`.
///
/// # Shapes
/// - left `[rows, m]`, right `[rows, n]`, output `[m, n]`, contiguous; in f32 where one of them is
///
/// # Panics
/// When the shapes do not fit each other, or the dtypes differ other than f32 beside half precision.
pub fn transposed_product(left: FlexTensor, right: FlexTensor) -> FlexTensor {
    in_tiles(&left, &right).unwrap_or_else(|| transposed_product_by_matmul(left, right))
}

/// The product by the kernel; `None` for what it is not made for.
fn in_tiles(left: &FlexTensor, right: &FlexTensor) -> Option<FlexTensor> {
    /// About where the output leaves the cache, and the general product is faster.
    const LARGEST_RANK: usize = 64;

    let columns = |tensor: &FlexTensor| tensor.layout().shape()[1];
    let is_left_wide = columns(left) > columns(right);
    let (narrow, wide) = if is_left_wide { (right, left) } else { (left, right) };
    let narrow = Rows::<f32>::view(narrow).filter(|narrow| narrow.columns <= LARGEST_RANK)?;
    by_dtype!(wide.dtype(), multiply(narrow, wide, is_left_wide))
}

/// left^T · right by Burn's own operations; for a right that is stored by columns as
/// (right^T · left)^T, which reads it in its order.
///
/// # Shapes
/// - left `[rows, m]`, right `[rows, n]`, output `[m, n]`, contiguous; in f32 where one of them is
///
/// # Panics
/// When the shapes do not fit each other, or the dtypes differ other than f32 beside half precision.
fn transposed_product_by_matmul(left: FlexTensor, right: FlexTensor) -> FlexTensor {
    let (left, right) = in_one_dtype(left, right);
    if right.layout().strides()[0] == 1 {
        let product = Flex::float_matmul(Flex::float_transpose(right), left); // [columns, rank]
        return Flex::float_transpose(product).to_contiguous();
    }
    Flex::float_matmul(Flex::float_transpose(left), right)
}

/// A matrix whose rows follow each other without gaps.
#[derive(Clone, Copy)]
struct Rows<'a, T> {
    values: &'a [T],
    columns: usize,
}

impl<'a, T: Weight> Rows<'a, T> {
    /// `None` for a tensor of another form, or without values.
    fn view(tensor: &'a FlexTensor) -> Option<Self> {
        let values = values_of::<T>(tensor).filter(|values| !values.is_empty())?;
        Some(Self { values, columns: tensor.layout().shape()[1] })
    }

    fn count(self) -> usize {
        self.values.len() / self.columns
    }
}

/// narrow^T · wide, or where the left of the two is the wide one, wide^T · narrow.
fn multiply<T: Weight>(
    narrow: Rows<f32>,
    wide: &FlexTensor,
    is_left_wide: bool,
) -> Option<FlexTensor> {
    let wide = Rows::<T>::view(wide)?;
    assert!(
        narrow.count() == wide.count(),
        "transposed_product: [{}, {}] and [{}, {}] do not fit",
        narrow.count(),
        narrow.columns,
        wide.count(),
        wide.columns
    );
    let (rank, columns) = (narrow.columns, wide.columns);
    let mut product = vec![0.0; rank * columns];
    if !is_left_wide {
        for_each_tile(narrow, wide, |from, tile| {
            for (row, values) in product.chunks_exact_mut(columns).zip(tile) {
                row[from..][..values.len()].copy_from_slice(values);
            }
        });
    } else {
        for_each_tile(narrow, wide, |from, tile| {
            for (column, values) in tile.enumerate() {
                let rows = product.chunks_exact_mut(rank).skip(from);
                rows.zip(values).for_each(|(row, value)| row[column] = *value);
            }
        });
    }
    let shape = if is_left_wide { [columns, rank] } else { [rank, columns] };
    Some(Flex::float_from_data(TensorData::new(product, shape), &Default::default()))
}

/// Gives narrow^T · wide to `take` in tiles: the first column of each, and its rows.
fn for_each_tile<T: Weight>(
    narrow: Rows<f32>,
    wide: Rows<T>,
    mut take: impl FnMut(usize, &mut dyn Iterator<Item = &[f32]>),
) {
    let (rows, rank, columns) = (narrow.count(), narrow.columns, wide.columns);
    let arch = Arch::new();
    let chunk = |chunk: usize, from: usize| {
        let columns = from..columns.min(from + chunk);
        let mut output = vec![0.0; columns.len().next_multiple_of(TILE) * rank];
        arch.dispatch(Chunk { narrow, wide, columns, output: &mut output });
        (from, output)
    };
    let chunks: Vec<_> = match rows.saturating_mul(columns).saturating_mul(rank) {
        0..PARALLEL_FROM => vec![chunk(columns, 0)],
        _ => {
            let share = columns.div_ceil(rayon::current_num_threads());
            let size = share.next_multiple_of(TILE).min(CHUNK);
            (0..columns).into_par_iter().step_by(size).map(|from| chunk(size, from)).collect()
        }
    };
    for (from, output) in chunks {
        for (tile, start) in output.chunks_exact(rank * TILE).zip((from..).step_by(TILE)) {
            let width = TILE.min(columns - start);
            take(start, &mut tile.chunks_exact(TILE).map(|row| &row[..width]));
        }
    }
}

/// The product for a range of the columns; `output` is zero before, and holds tiles
/// `[rank, TILE]`, the last one filled up.
struct Chunk<'a, T> {
    narrow: Rows<'a, f32>,
    wide: Rows<'a, T>,
    columns: std::ops::Range<usize>,
    output: &'a mut [f32],
}

impl<T: Weight> WithSimd for Chunk<'_, T> {
    type Output = ();

    #[inline(always)] // so that it is compiled for S
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { narrow, wide, columns, output } = self;
        let (rank, width) = (narrow.columns, wide.columns);
        let mut packed = [0.0; BLOCK * TILE];
        let blocks = narrow.values.chunks(BLOCK * rank);
        for (narrow, wide) in blocks.zip(wide.values.chunks(BLOCK * width)) {
            let count = narrow.len() / rank;
            let tiles = columns.clone().step_by(TILE).zip(output.chunks_exact_mut(rank * TILE));
            for (start, output) in tiles {
                // Rows that are a power of two apart share few places of the cache; packed, they do not.
                let end = columns.end.min(start + TILE);
                for (to, from) in packed.chunks_exact_mut(TILE).zip(wide.chunks_exact(width)) {
                    let from = from[start..end].iter();
                    to.iter_mut().zip(from).for_each(|(to, from)| *to = from.widen());
                }
                let (packed, _) = S::as_simd_f32s(&packed[..count * TILE]);
                let (output, _) = S::as_mut_simd_f32s(output);
                let strips = rank / STRIP * STRIP;
                for k in (0..strips).step_by(STRIP) {
                    add_strip::<S, STRIP>(simd, (narrow, rank, k), packed, output);
                }
                for k in strips..rank {
                    add_strip::<S, 1>(simd, (narrow, rank, k), packed, output);
                }
            }
        }
    }
}

/// Rows of the output that are held in registers: with two vectors of each, eight sums, which are
/// enough to hide how long one addition takes.
const STRIP: usize = 4;

/// Adds to rows `k..k + K` of a tile what a block of rows gives: `narrow` `[rows, rank]`, `packed`
/// `[rows, TILE]`, `output` `[rank, TILE]`.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // by index: over iterators, the sums are not kept in registers
fn add_strip<S: Simd, const K: usize>(
    simd: S,
    (narrow, rank, k): (&[f32], usize, usize),
    packed: &[S::f32s],
    output: &mut [S::f32s],
) {
    let vectors = TILE / S::F32_LANES;
    for v in (0..vectors).step_by(2) {
        let mut sums = [[simd.splat_f32s(0.0); 2]; K];
        for (narrow, wide) in narrow.chunks_exact(rank).zip(packed.chunks_exact(vectors)) {
            let (narrow, wide) = (&narrow[k..k + K], [wide[v], wide[v + 1]]);
            for n in 0..K {
                let factor = simd.splat_f32s(narrow[n]);
                for i in 0..2 {
                    sums[n][i] = simd.mul_add_e_f32s(factor, wide[i], sums[n][i]);
                }
            }
        }
        for n in 0..K {
            let output = &mut output[(k + n) * vectors + v..][..2];
            for i in 0..2 {
                output[i] = simd.add_f32s(output[i], sums[n][i]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::TensorMetadata;
    use burn::tensor::{DType, FloatDType};

    use super::*;
    use crate::samples::*;

    fn f64s(tensor: &FlexTensor) -> FlexTensor {
        Flex::float_cast(tensor.clone(), FloatDType::F64)
    }

    /// By Burn's matmul in f64.
    fn exact(left: &FlexTensor, right: &FlexTensor) -> FlexTensor {
        Flex::float_matmul(Flex::float_transpose(f64s(left)), f64s(right))
    }

    #[test]
    fn the_product_in_tiles_is_the_product_of_the_transposed() {
        // [rows, columns, rank]: below, at and beyond a strip, a tile, a block and a chunk; with threads
        // and without.
        let sizes = [
            [1, 1, 1],
            [5, 7, 3],
            [16, 64, 4],
            [17, 65, 5],
            [33, 127, 64],
            [1, 2049, 8],
            [600, 700, 17],
            [40, 4500, 48],
        ];
        for [rows, columns, rank] in sizes {
            let lefts = [tensor([rows, rank], 2), without_first(tensor([rows + 1, rank], 2))];
            let rights =
                [tensor([rows, columns], 3), without_first(tensor([rows + 1, columns], 3))];
            for left in &lefts {
                for right in &rights {
                    let expected = exact(left, right);
                    for (found, expected) in [
                        (in_tiles(left, right), expected.clone()),
                        (in_tiles(right, left), Flex::float_transpose(expected.clone())),
                    ] {
                        let found = found.expect("it is made for these");
                        assert!(found.is_contiguous());
                        assert_close(&found, &expected);
                    }
                    assert_close(&transposed_product(left.clone(), right.clone()), &expected);
                }
            }
        }
    }

    #[test]
    fn one_side_or_the_other_may_be_wide_for_the_kernel() {
        let (few, wide) = (tensor([60, 64], 2), tensor([60, 70], 3));
        for (left, right) in [(&few, &wide), (&wide, &few)] {
            let by_kernel = in_tiles(left, right).expect("it is made for these");
            let found = transposed_product(left.clone(), right.clone());
            assert_eq!(values(&found), values(&by_kernel)); // the general product sums in another order
        }
    }

    #[test]
    fn a_side_in_half_precision_is_multiplied_as_it_is() {
        for dtype in [DType::BF16, DType::F16] {
            for [rows, columns, rank] in [[5, 7, 3], [33, 127, 64], [600, 700, 17], [40, 70, 69]] {
                let narrow = tensor([rows, rank], 2);
                let wide = in_dtype(without_first(tensor([rows + 1, columns], 3)), dtype);
                for (left, right) in [(&narrow, &wide), (&wide, &narrow)] {
                    assert_eq!(in_tiles(left, right).is_some(), rank <= 64);
                    let found = transposed_product(left.clone(), right.clone());
                    assert_eq!(found.dtype(), DType::F32);
                    assert_close(&found, &exact(left, right));
                }
            }
        }
    }

    #[test]
    fn other_layouts_dtypes_and_ranks_get_the_same_product() {
        let (left, right) = (tensor([60, 5], 2), tensor([60, 70], 3));
        assert!(in_tiles(&f64s(&left), &f64s(&right)).is_none());
        assert_close(&transposed_product(f64s(&left), f64s(&right)), &exact(&left, &right));

        let (left, right) = (transposed([60, 5], 2), transposed([60, 70], 3));
        assert!(in_tiles(&left, &right).is_none());
        let expected = exact(&left, &right);
        let found = transposed_product(left, right);
        assert!(found.is_contiguous());
        assert_close(&found, &expected);

        let (left, right) = (tensor([60, 65], 2), tensor([60, 70], 3));
        let expected = exact(&left, &right);
        assert_close(&transposed_product(left, right), &expected);
    }

    #[test]
    fn no_rows_or_columns_give_zeros() {
        for [rows, columns] in [[0, 7], [5, 0], [0, 0]] {
            let product = transposed_product(tensor([rows, 3], 2), tensor([rows, columns], 3));
            assert_eq!(product.shape(), [3, columns].into());
            assert!(values(&product).iter().all(|value| *value == 0.0));
        }
    }

    #[test]
    fn a_value_that_is_not_finite_reaches_its_own_column_only() {
        let right = tensor([20, 70], 3);
        let mut data: Vec<f32> = right.to_contiguous().into_data().iter().collect();
        data[3 * 70 + 69] = f32::NAN;
        let right = Flex::float_from_data(TensorData::new(data, [20, 70]), &Default::default());
        let few = || tensor([20, 6], 2);
        let product = values(&transposed_product(few(), right.clone()));
        for (place, value) in product.iter().enumerate() {
            assert_eq!(value.is_nan(), place % 70 == 69, "at {place}");
        }
        let product = values(&transposed_product(right, few()));
        for (place, value) in product.iter().enumerate() {
            assert_eq!(value.is_nan(), place / 6 == 69, "at {place}");
        }
    }

    #[test]
    #[should_panic = "do not fit"]
    fn rows_that_differ_are_refused() {
        transposed_product(tensor([5, 3], 2), tensor([4, 7], 3));
    }
}
