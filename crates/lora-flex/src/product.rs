//! Products with the low-rank factors.

use burn::backend::ops::FloatTensorOps;
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::{DType, Slice};

use crate::FlexTensor;
use crate::few_rows::add_product_of_few_rows;
use crate::halves::{add_product_to_halves, widened};
use crate::linear;
use crate::memory::with_large_pages;

/// Multiplications from which a product is worth a second thread.
pub(crate) const PARALLEL_FROM: usize = 128 * 128 * 128;

/// scaling · x · factor, where one side is as small as the rank.
///
/// In half precision the product is formed in f32 from copies of x and the factor, and not rounded. Burn's product
/// of two in bf16 takes such copies too, and then rounds; its product with a number rounds the number.
///
/// # Shapes
/// - x `[rows, inner]`, factor `[inner, columns]`, output `[rows, columns]`, in f32 (f64 for f64)
///
/// # Panics
/// When the shapes do not fit each other, or the dtypes differ other than f32 beside half precision.
pub fn scaled_product(x: FlexTensor, factor: FlexTensor, scaling: f64) -> FlexTensor {
    Flex::float_mul_scalar(linear(widened(x), widened(factor), None), scaling.into())
}

/// Both in f32 where one is and the other is in half precision.
pub(crate) fn in_one_dtype(left: FlexTensor, right: FlexTensor) -> (FlexTensor, FlexTensor) {
    match [left.dtype(), right.dtype()] {
        [left_dtype, DType::F32] if left_dtype != DType::F32 => (widened(left), right),
        [DType::F32, right_dtype] if right_dtype != DType::F32 => (left, widened(right)),
        _ => (left, right),
    }
}

/// y + left · right, written over y where there are more than a few rows.
///
/// Burn's matmul gives every product memory of its own, and for a product as thin as this one, writing
/// it and adding it afterwards takes several times as long as computing it. So products are accumulated into
/// y directly; where y is in half precision, the sum is a tensor of its own, formed from an f32 copy of some
/// of y's rows at a time. Other dtypes, and a y in f32 that is shared or not contiguous, take
/// `add_product_in_blocks`. Few rows, as in decoding, take the kernel of [`linear`], in all three dtypes.
/// Beside a y in half precision, left and right may be in f32; the sum is rounded once.
///
/// # Shapes
/// - y `[rows, columns]`, left `[rows, rank]`, right `[rank, columns]`
///
/// # Panics
/// When the shapes do not fit each other, or the dtypes differ other than that.
pub fn add_product(mut y: FlexTensor, left: FlexTensor, right: FlexTensor) -> FlexTensor {
    if let Some(sum) = add_product_of_few_rows(&y, &left, &right) {
        return sum;
    }
    if accumulate(&mut y, &left, &right) {
        return y;
    }
    add_product_to_halves(&y, &left, &right)
        .unwrap_or_else(|| add_product_in_blocks(y, left, right))
}

/// y + left · right by Burn's own operations, in blocks of rows: a product as large as y would double
/// the memory of y, and would leave the cache before it is added. Beside a y in half precision, left and
/// right may be in f32; the sum is rounded once.
///
/// # Shapes
/// - y `[rows, columns]`, left `[rows, rank]`, right `[rank, columns]`
///
/// # Panics
/// When the shapes do not fit each other, or the dtypes differ other than that.
fn add_product_in_blocks(y: FlexTensor, left: FlexTensor, right: FlexTensor) -> FlexTensor {
    /// Values of the product that are formed at a time: 1 MiB of f32, about an L2 cache.
    const BLOCK_VALUES: usize = 256 * 1024;

    let [rows, columns] = [y.shape()[0], y.shape()[1]];
    let block = (BLOCK_VALUES / columns.max(1)).max(1);
    (0..rows).step_by(block).fold(y, |y, start| {
        let range = Slice::from(start..rows.min(start + block));
        let product = Flex::float_matmul(Flex::float_slice(left.clone(), &[range]), right.clone());
        // The view of y ends in the sum, so y has one owner again and is written in place.
        let (product, before) = in_one_dtype(product, Flex::float_slice(y.clone(), &[range]));
        let sum = Flex::float_add(product, before);
        let sum =
            if sum.dtype() == y.dtype() { sum } else { Flex::float_cast(sum, y.dtype().into()) };
        Flex::float_slice_assign(y, &[range], sum)
    })
}

/// y += left · right where that can be done in y's own memory; otherwise `false`, and y is as it was.
fn accumulate(y: &mut FlexTensor, left: &FlexTensor, right: &FlexTensor) -> bool {
    let in_place = y.dtype() == DType::F32
        && y.layout().num_dims() == 2
        && y.is_contiguous()
        && y.layout().start_offset() == 0;
    let (true, Some(left), Some(right)) = (in_place, Matrix::view(left), Matrix::view(right))
    else {
        return false;
    };
    let [rows, columns] = [y.shape()[0], y.shape()[1]];
    check_fit([rows, columns], left.shape, right.shape);
    match y.try_storage_mut::<f32>() {
        Some(values) => {
            gemm_accumulate(values, columns, left, right);
            true
        }
        None => false,
    }
}

/// A matrix inside a tensor's storage; every index below `shape` is inside `values`.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    values: &'a [f32],
    shape: [usize; 2],
    strides: [usize; 2],
}

impl<'a> Matrix<'a> {
    /// `None` for what is not an f32 matrix with values and without negative strides.
    pub(crate) fn view(tensor: &'a FlexTensor) -> Option<Self> {
        let layout = tensor.layout();
        if tensor.dtype() != DType::F32 || layout.num_dims() != 2 || layout.num_elements() == 0 {
            return None;
        }
        let shape = [layout.shape()[0], layout.shape()[1]];
        let stride = |axis: usize| usize::try_from(layout.strides()[axis]).ok();
        let strides = [stride(0)?, stride(1)?];
        Self::new(tensor.storage::<f32>().get(layout.start_offset()..)?, shape, strides)
    }

    /// `None` for no values, and where an index would be outside of them.
    pub(crate) fn new(values: &'a [f32], shape: [usize; 2], strides: [usize; 2]) -> Option<Self> {
        let last = |axis: usize| shape[axis].checked_sub(1)?.checked_mul(strides[axis]);
        let last = last(0)?.checked_add(last(1)?)?;
        (last < values.len()).then_some(Self { values, shape, strides })
    }

    /// Some of the rows, from `first` on.
    pub(crate) fn rows(self, first: usize, count: usize) -> Option<Self> {
        let values = self.values.get(first.checked_mul(self.strides[0])?..)?;
        Self::new(values, [count, self.shape[1]], self.strides)
    }

    pub(crate) fn shape(self) -> [usize; 2] {
        self.shape
    }

    pub(crate) fn transposed(self) -> Self {
        let ([rows, columns], [row, column]) = (self.shape, self.strides);
        Self { shape: [columns, rows], strides: [column, row], ..self }
    }

    fn strides(&self) -> [isize; 2] {
        self.strides.map(|stride| stride as isize) // of an isize, or a length in memory
    }
}

pub(crate) fn check_fit(y: [usize; 2], left: [usize; 2], right: [usize; 2]) {
    let fits = left == [y[0], left[1]] && right == [left[1], y[1]];
    assert!(fits, "add_product: y {y:?}, left {left:?} and right {right:?} do not fit");
}

/// left · right in memory of its own, a row after the other; a large product on all threads. `None` where they
/// do not fit each other.
///
/// Burn's matmul fills the product's memory with zeros first, on one thread, and for a product as wide as a
/// vocabulary that takes a tenth of the time of the product itself.
#[allow(unsafe_code)]
pub(crate) fn gemm_product(left: Matrix, right: Matrix) -> Option<Vec<f32>> {
    let ([rows, inner], [fitting, columns]) = (left.shape, right.shape);
    let count = rows.checked_mul(columns).filter(|_| inner == fitting)?;
    let mut product = with_large_pages(count);
    let y = &mut product.spare_capacity_mut()[..count];
    // SAFETY: y has a value for each row and column, and is not read; every one of them is written.
    unsafe {
        gemm(parallelism(left, right), false, y.as_mut_ptr().cast(), columns, left, right);
        product.set_len(count);
    }
    Some(product)
}

fn parallelism(left: Matrix, right: Matrix) -> gemm::Parallelism {
    let [rows, inner] = left.shape;
    match rows.saturating_mul(right.shape[1]).saturating_mul(inner) {
        0..PARALLEL_FROM => gemm::Parallelism::None,
        _ => gemm::Parallelism::Rayon(0),
    }
}

/// y += left · right, where a row of y begins `stride` values after the one before; a large product on all threads.
pub(crate) fn gemm_accumulate(y: &mut [f32], stride: usize, left: Matrix, right: Matrix) {
    gemm_accumulate_on(parallelism(left, right), y, stride, left, right);
}

#[allow(unsafe_code)]
pub(crate) fn gemm_accumulate_on(
    parallelism: gemm::Parallelism,
    y: &mut [f32],
    stride: usize,
    left: Matrix,
    right: Matrix,
) {
    let ([rows, rank], [inner, columns]) = (left.shape, right.shape);
    assert!(rank == inner && columns <= stride, "{rank} by {inner}, {columns} in {stride}");
    let last_row = (rows - 1).checked_mul(stride); // a Matrix has values
    assert!(last_row.is_some_and(|last| y.len() >= columns && last <= y.len() - columns));
    // SAFETY: y is a slice of values, and the assertions bound the last place by its length and keep rows apart.
    unsafe { gemm(parallelism, true, y.as_mut_ptr(), stride, left, right) }
}

/// Writes left · right to y, added to what is there where y is `read`.
///
/// # Safety
/// y can be written at row * stride + column for each row of left and column of right, no two of which are one place,
/// and holds values there where it is `read`; left has as many columns as right has rows.
#[allow(unsafe_code)]
unsafe fn gemm(
    parallelism: gemm::Parallelism,
    read: bool,
    y: *mut f32,
    stride: usize,
    left: Matrix,
    right: Matrix,
) {
    let ([rows, inner], [_, columns]) = (left.shape, right.shape);
    let ([left_rows, left_columns], [right_rows, right_columns]) =
        (left.strides(), right.strides());
    // SAFETY: gemm writes y at row * stride + column, as the caller allows, and reads left and right below their
    // shapes, which `Matrix::new` checked to be inside their slices. The caller holds y alone, so it overlaps neither.
    unsafe {
        gemm::gemm(
            rows,
            columns,
            inner,
            y,
            1,
            stride as isize,
            read, // times the 1.0 that comes first below
            left.values.as_ptr(),
            left_columns,
            left_rows,
            right.values.as_ptr(),
            right_columns,
            right_rows,
            1.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::FloatDType;

    use super::*;
    use crate::samples::*;

    #[test]
    fn the_product_in_place_is_the_product_in_blocks() {
        // [rows, columns, rank]; the last is large enough for threads and for several blocks.
        let sizes =
            [[1, 1, 1], [1, 7, 3], [5, 1, 2], [5, 7, 1], [5, 7, 2], [37, 53, 3], [600, 700, 17]];
        for [rows, columns, rank] in sizes {
            let y = || tensor([rows, columns], 1);
            let lefts = [tensor([rows, rank], 2), transposed([rows, rank], 2), {
                without_first(tensor([rows + 1, rank], 2))
            }];
            let rights = [tensor([rank, columns], 3), transposed([rank, columns], 3), {
                without_first(tensor([rank + 1, columns], 3))
            }];
            for left in &lefts {
                for right in &rights {
                    let mut found = y();
                    assert!(accumulate(&mut found, left, right), "took the other path");
                    let expected = add_product_in_blocks(y(), left.clone(), right.clone());
                    assert_close(&found, &expected);
                }
            }
        }
    }

    #[test]
    fn the_product_in_memory_of_its_own_is_burns_to_the_bit() {
        for [rows, inner, columns] in [[1, 1, 1], [5, 3, 7], [37, 53, 3], [600, 70, 700]] {
            for left in [tensor([rows, inner], 2), transposed([rows, inner], 2)] {
                for right in [tensor([inner, columns], 3), transposed([inner, columns], 3)] {
                    let view = Matrix::view;
                    let found = gemm_product(view(&left).unwrap(), view(&right).unwrap()).unwrap();
                    let expected = Flex::float_matmul(left.clone(), right);
                    let expected: Vec<f32> = expected.into_data().try_to_vec().unwrap();
                    assert_eq!(found, expected);
                }
            }
        }
        let (left, right) = (tensor([5, 3], 2), tensor([4, 7], 3));
        let [left, right] = [&left, &right].map(|tensor| Matrix::view(tensor).unwrap());
        assert!(gemm_product(left, right).is_none());
    }

    #[test]
    fn a_tensor_that_cannot_be_written_in_place_gets_the_same_product() {
        let (left, right) = (tensor([5, 3], 2), tensor([3, 7], 3));
        let shared = tensor([5, 7], 1);
        let before = values(&shared);
        for mut y in [shared.clone(), transposed([5, 7], 1), without_first(tensor([6, 7], 1))] {
            assert!(!accumulate(&mut y, &left, &right));
            let product = Flex::float_matmul(left.clone(), right.clone());
            let expected = Flex::float_add(y.clone(), product);
            assert_close(&add_product(y, left.clone(), right.clone()), &expected);
        }
        assert_eq!(values(&shared), before, "a tensor that others hold was changed");
    }

    #[test]
    fn other_layouts_and_dtypes_get_the_same_product() {
        let f64s = |tensor| Flex::float_cast(tensor, burn::tensor::FloatDType::F64);
        let (y, left, right) = (tensor([5, 7], 1), tensor([5, 3], 2), tensor([3, 7], 3));
        let expected = Flex::float_add(y.clone(), Flex::float_matmul(left.clone(), right.clone()));
        assert_close(&add_product(f64s(y), f64s(left.clone()), f64s(right.clone())), &expected);

        // Flipped twice along the inner axis: the same product, with negative strides.
        let (left, right) = (Flex::float_flip(left, &[1]), Flex::float_flip(right, &[0]));
        assert_close(&add_product(tensor([5, 7], 1), left, right), &expected);
    }

    #[test]
    fn f32_factors_beside_half_precision_are_not_rounded() {
        let f64s = |tensor: &FlexTensor| Flex::float_cast(tensor.clone(), FloatDType::F64);
        for dtype in [DType::BF16, DType::F16] {
            for [rows, columns, rank] in [[1, 70, 3], [5, 70, 3], [600, 700, 17]] {
                let (x, factor) = (in_dtype(tensor([rows, columns], 1), dtype), [columns, rank]);
                for factor in [tensor(factor, 2), transposed(factor, 2)] {
                    let found = scaled_product(x.clone(), factor.clone(), 0.25);
                    let exact = Flex::float_matmul(f64s(&x), f64s(&factor));
                    assert_eq!(found.dtype(), DType::F32);
                    assert_close(&found, &Flex::float_mul_scalar(exact, 0.25.into()));
                }
                let (left, right) = (tensor([rows, rank], 2), tensor([rank, columns], 3));
                let exact =
                    Flex::float_add(f64s(&x), Flex::float_matmul(f64s(&left), f64s(&right)));
                // Rounded once: to the nearest number, or to its neighbour where f32's last place decides.
                let once = in_dtype(Flex::float_cast(exact, FloatDType::F32), dtype);
                let found = add_product(x, left, right);
                assert_eq!(found.dtype(), dtype);
                let other =
                    values(&found).iter().zip(values(&once)).filter(|(a, b)| **a != *b).count();
                assert!(other * 100 <= rows * columns, "{other} of {}", rows * columns);
            }
        }
    }

    #[test]
    fn no_rows_or_columns_is_no_product() {
        for [rows, columns] in [[0, 7], [5, 0]] {
            let (left, right) = (tensor([rows, 3], 2), tensor([3, columns], 3));
            let y = add_product(tensor([rows, columns], 1), left, right);
            assert_eq!(y.shape(), [rows, columns].into());
        }
    }

    #[test]
    #[should_panic = "do not fit"]
    fn a_rank_that_differs_is_refused() {
        add_product(tensor([5, 7], 1), tensor([5, 3], 2), tensor([4, 7], 3));
    }

    #[test]
    #[should_panic = "do not fit"]
    fn rows_that_differ_are_refused() {
        add_product(tensor([6, 7], 1), tensor([5, 3], 2), tensor([3, 7], 3));
    }
}
