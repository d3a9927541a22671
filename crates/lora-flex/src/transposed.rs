//! left^T · right for a left with few columns.

use burn::backend::Flex;
use burn::backend::ops::FloatTensorOps;
use burn::tensor::{DType, TensorData};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::FlexTensor;
use crate::product::PARALLEL_FROM;

/// Columns of `right` that are worked on at a time; a multiple of every vector's length.
const TILE: usize = 64;

/// Rows of `right` that are worked on at a time: as many streams as the processor's prefetching
/// follows.
const BLOCK: usize = 16;

/// Columns of one thread at a time: their part of the product, `rank` times as many values, stays in
/// an L2 cache.
const CHUNK: usize = 2048;

/// left^T · right for a left with few columns.
///
/// A product with so few multiplications for each value of `right` is bound by how that is read. A
/// general matrix product walks down a strip of its columns, a new page of memory at every row; this one
/// walks over blocks of whole rows and keeps the output in the cache. That is for f32 tensors without
/// gaps and up to 64 columns of `left`; others take [`transposed_product_by_matmul`].
///
/// # Shapes
/// - left `[rows, rank]`, right `[rows, columns]`, output `[rank, columns]`, contiguous
///
/// # Panics
/// When the shapes do not fit each other, or the dtypes differ.
pub fn transposed_product(left: FlexTensor, right: FlexTensor) -> FlexTensor {
    /// About where the output leaves the cache, and the general product is faster.
    const LARGEST_RANK: usize = 64;

    let product = match (Rows::view(&left), Rows::view(&right)) {
        (Some(left), Some(right)) if left.columns <= LARGEST_RANK => Some(multiply(left, right)),
        _ => None,
    };
    product.unwrap_or_else(|| transposed_product_by_matmul(left, right))
}

/// left^T · right by Burn's own operations; for a right that is stored by columns as
/// (right^T · left)^T, which reads it in its order.
///
/// # Shapes
/// - left `[rows, rank]`, right `[rows, columns]`, output `[rank, columns]`, contiguous
///
/// # Panics
/// When the shapes do not fit each other, or the dtypes differ.
pub fn transposed_product_by_matmul(left: FlexTensor, right: FlexTensor) -> FlexTensor {
    if right.layout().strides()[0] == 1 {
        let product = Flex::float_matmul(Flex::float_transpose(right), left); // [columns, rank]
        return Flex::float_transpose(product).to_contiguous();
    }
    Flex::float_matmul(Flex::float_transpose(left), right)
}

/// An f32 matrix whose rows follow each other without gaps.
#[derive(Clone, Copy)]
struct Rows<'a> {
    values: &'a [f32],
    columns: usize,
}

impl<'a> Rows<'a> {
    /// `None` for a tensor of another form, or without values.
    fn view(tensor: &'a FlexTensor) -> Option<Self> {
        let layout = tensor.layout();
        let fits = tensor.dtype() == DType::F32
            && layout.num_dims() == 2
            && layout.num_elements() > 0
            && tensor.is_contiguous();
        if !fits {
            return None;
        }
        let values = tensor.storage::<f32>().get(layout.start_offset()..)?;
        Some(Self { values: values.get(..layout.num_elements())?, columns: layout.shape()[1] })
    }

    fn count(self) -> usize {
        self.values.len() / self.columns
    }
}

fn multiply(left: Rows, right: Rows) -> FlexTensor {
    let (rows, rank, columns) = (left.count(), left.columns, right.columns);
    assert!(
        rows == right.count(),
        "transposed_product: left [{rows}, {rank}] and right [{}, {columns}] do not fit",
        right.count()
    );
    let arch = Arch::new();
    let chunk = |chunk: usize, from: usize| {
        let columns = from..columns.min(from + chunk);
        let mut output = vec![0.0; columns.len().next_multiple_of(TILE) * rank];
        arch.dispatch(Chunk { left, right, columns, output: &mut output });
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
    // From tiles to rows.
    let mut product = vec![0.0; rank * columns];
    for (from, output) in chunks {
        for (tile, start) in output.chunks_exact(rank * TILE).zip((from..).step_by(TILE)) {
            let columns_of_tile = start..columns.min(start + TILE);
            for (row, values) in product.chunks_exact_mut(columns).zip(tile.chunks_exact(TILE)) {
                let row = &mut row[columns_of_tile.clone()];
                row.copy_from_slice(&values[..row.len()]);
            }
        }
    }
    Flex::float_from_data(TensorData::new(product, [rank, columns]), &Default::default())
}

/// The product for a range of the columns; `output` is zero before, and holds tiles
/// `[rank, TILE]`, the last one filled up.
struct Chunk<'a> {
    left: Rows<'a>,
    right: Rows<'a>,
    columns: std::ops::Range<usize>,
    output: &'a mut [f32],
}

impl WithSimd for Chunk<'_> {
    type Output = ();

    #[inline(always)] // so that it is compiled for S
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { left, right, columns, output } = self;
        let rank = left.columns;
        let mut packed = [0.0; BLOCK * TILE];
        let blocks = left.values.chunks(BLOCK * rank);
        for (left, right) in blocks.zip(right.values.chunks(BLOCK * right.columns)) {
            let count = left.len() / rank;
            let width = right.len() / count;
            let tiles = columns.clone().step_by(TILE).zip(output.chunks_exact_mut(rank * TILE));
            for (start, output) in tiles {
                // Rows that are a power of two apart share few places of the cache; packed, they do not.
                let end = columns.end.min(start + TILE);
                for (to, from) in packed.chunks_exact_mut(TILE).zip(right.chunks_exact(width)) {
                    to[..end - start].copy_from_slice(&from[start..end]);
                }
                let (packed, _) = S::as_simd_f32s(&packed[..count * TILE]);
                let (output, _) = S::as_mut_simd_f32s(output);
                let strips = rank / STRIP * STRIP;
                for k in (0..strips).step_by(STRIP) {
                    add_strip::<S, STRIP>(simd, (left, rank, k), packed, output);
                }
                for k in strips..rank {
                    add_strip::<S, 1>(simd, (left, rank, k), packed, output);
                }
            }
        }
    }
}

/// Rows of the output that are held in registers: with two vectors of each, eight sums, which are
/// enough to hide how long one addition takes.
const STRIP: usize = 4;

/// Adds to rows `k..k + K` of a tile what a block of rows gives: `left` `[rows, rank]`, `packed`
/// `[rows, TILE]`, `output` `[rank, TILE]`.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // by index: over iterators, the sums are not kept in registers
fn add_strip<S: Simd, const K: usize>(
    simd: S,
    (left, rank, k): (&[f32], usize, usize),
    packed: &[S::f32s],
    output: &mut [S::f32s],
) {
    let vectors = TILE / S::F32_LANES;
    for v in (0..vectors).step_by(2) {
        let mut sums = [[simd.splat_f32s(0.0); 2]; K];
        for (left, right) in left.chunks_exact(rank).zip(packed.chunks_exact(vectors)) {
            let (left, right) = (&left[k..k + K], [right[v], right[v + 1]]);
            for n in 0..K {
                let left = simd.splat_f32s(left[n]);
                for i in 0..2 {
                    sums[n][i] = simd.mul_add_e_f32s(left, right[i], sums[n][i]);
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
    use burn::tensor::FloatDType;

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
                    let (a, b) = (Rows::view(left).unwrap(), Rows::view(right).unwrap());
                    let found = multiply(a, b);
                    let expected = exact(left, right);
                    assert!(found.is_contiguous());
                    assert_close(&found, &expected);
                    assert_close(&transposed_product(left.clone(), right.clone()), &expected);
                }
            }
        }
    }

    #[test]
    fn other_layouts_dtypes_and_ranks_get_the_same_product() {
        let (left, right) = (tensor([60, 5], 2), tensor([60, 70], 3));
        assert!(Rows::view(&f64s(&right)).is_none());
        assert_close(&transposed_product(f64s(&left), f64s(&right)), &exact(&left, &right));

        let (left, right) = (transposed([60, 5], 2), transposed([60, 70], 3));
        assert!(Rows::view(&left).is_none() && Rows::view(&right).is_none());
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
        let product = values(&transposed_product(tensor([20, 6], 2), right));
        for (place, value) in product.iter().enumerate() {
            assert_eq!(value.is_nan(), place % 70 == 69, "at {place}");
        }
    }

    #[test]
    #[should_panic = "do not fit"]
    fn rows_that_differ_are_refused() {
        transposed_product(tensor([5, 3], 2), tensor([4, 7], 3));
    }
}
