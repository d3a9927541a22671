//! x · W + b, as frozen layers have it.

use burn::backend::ops::FloatTensorOps;
use burn::backend::{Flex, TensorMetadata};
use rayon::prelude::*;

use crate::FlexTensor;
use crate::few_rows::product_of_few_rows;
use crate::halves::{product_of_halves, widened};
use crate::product::{Matrix, gemm_product};
use crate::weight::tensor_of;

/// Values that one thread takes at a time, at least.
const SHARE: usize = 1 << 14;

/// x · W + bias, in half precision rounded once.
///
/// For few rows, as in decoding, W is read once and as it is stored. In half precision many rows are multiplied
/// in f32, W block by block, where Burn's product of bf16 makes an f32 copy of all of W at each call, on one thread.
/// In f32 many rows take a general product, in memory that nobody fills with zeros before. Other tensors take Burn's
/// operations.
///
/// # Shapes
/// - x `[rows, d_input]`, weight `[d_input, d_output]`, bias `[d_output]`, output `[rows, d_output]`,
///   contiguous
///
/// # Panics
/// When the shapes do not fit each other, or the dtypes differ.
pub fn linear(x: FlexTensor, weight: FlexTensor, bias: Option<FlexTensor>) -> FlexTensor {
    let columns = weight.layout().shape()[1];
    let wide = bias.as_ref().filter(|bias| fits(bias, &x, columns)).map(|bias| {
        let wide = widened(bias.clone()).to_contiguous();
        wide.storage::<f32>()[wide.layout().start_offset()..][..columns].to_vec()
    });
    if bias.is_some() == wide.is_some() {
        let done = product_of_few_rows(&x, &weight, wide.as_deref())
            .or_else(|| product_of_halves(&x, &weight, wide.as_deref()))
            .or_else(|| product_of_many_rows(&x, &weight, wide.as_deref()));
        if let Some(done) = done {
            return done;
        }
    }
    let product = Flex::float_matmul(x, weight);
    match bias {
        Some(bias) => Flex::float_add(product, Flex::float_reshape(bias, [1, columns].into())),
        None => product,
    }
}

/// In f32; `None` for another type, no values, and shapes that do not fit.
fn product_of_many_rows(
    x: &FlexTensor,
    weight: &FlexTensor,
    bias: Option<&[f32]>,
) -> Option<FlexTensor> {
    let (x, weight) = (Matrix::view(x)?, Matrix::view(weight)?);
    let ([rows, _], [_, columns]) = (x.shape(), weight.shape());
    let mut product = gemm_product(x, weight)?;
    if let Some(bias) = bias {
        product.par_chunks_exact_mut(columns).with_min_len((SHARE / columns).max(1)).for_each(
            |row| {
                row.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
            },
        );
    }
    Some(tensor_of(product, [rows, columns]))
}

/// Whether a bias is one for so many columns, and of x's type, f32 or half precision.
fn fits(bias: &FlexTensor, x: &FlexTensor, columns: usize) -> bool {
    use burn::tensor::DType::{BF16, F16, F32};
    bias.dtype() == x.dtype()
        && [F32, F16, BF16].contains(&bias.dtype())
        && bias.shape() == [columns].into()
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, FloatDType, Slice};

    use super::*;
    use crate::samples::{in_dtype, tensor, transposed, values, without_first};

    fn f64s(tensor: &FlexTensor) -> FlexTensor {
        Flex::float_cast(tensor.clone(), FloatDType::F64)
    }

    /// Against the sum in f64: rounded once to the nearest number, or to its neighbour where f32's last place
    /// decides.
    #[track_caller]
    fn check(x: FlexTensor, weight: FlexTensor, bias: Option<FlexTensor>) {
        let exact = Flex::float_matmul(f64s(&x), f64s(&weight));
        let exact = match &bias {
            Some(bias) => {
                let columns = bias.shape()[0];
                Flex::float_add(exact, Flex::float_reshape(f64s(bias), [1, columns].into()))
            }
            None => exact,
        };
        let once = values(&in_dtype(Flex::float_cast(exact.clone(), FloatDType::F32), x.dtype()));
        let (dtype, shape) = (x.dtype(), exact.shape());
        let found = linear(x, weight, bias);
        assert_eq!((found.dtype(), found.shape()), (dtype, shape));
        let (found, exact) = (values(&found), values(&exact));
        let largest = exact.iter().fold(0.0_f64, |largest, value| largest.max(value.abs()));
        let bound = match dtype {
            DType::F32 => 3e-6,
            DType::F16 => 1.0 / 2048.0,
            _ => 1.0 / 256.0,
        };
        for (found, exact) in found.iter().zip(&exact) {
            assert!((found - exact).abs() <= bound * largest, "{found} for {exact}");
        }
        if dtype != DType::F32 {
            let other = found.iter().zip(&once).filter(|(found, once)| found != once).count();
            assert!(other * 50 <= found.len(), "{other} of {} rounded elsewhere", found.len());
        }
    }

    #[test]
    fn it_is_the_sum_for_every_layout_type_and_size_rounded_once() {
        // [rows, d_input, d_output]: few, many, more than one block of either layout, and odd ones.
        let sizes = [[1, 66, 130], [3, 5, 7], [20, 66, 130], [33, 700, 900], [17, 1030, 514]];
        for [rows, d_input, d_output] in sizes {
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let of = |tensor| in_dtype(tensor, dtype);
                let weights = [
                    of(tensor([d_input, d_output], 2)),
                    of(transposed([d_input, d_output], 2)),
                    without_first(of(tensor([d_input + 1, d_output], 2))),
                    // With gaps between its rows.
                    Flex::float_slice(
                        of(tensor([d_input, d_output + 1], 2)),
                        &[Slice::from(0..), Slice::from(1..)],
                    ),
                ];
                let bias = tensor([1, d_output], 3);
                let bias = of(Flex::float_reshape(bias, [d_output].into()));
                for weight in weights {
                    check(of(tensor([rows, d_input], 1)), weight.clone(), None);
                    check(of(transposed([rows, d_input], 1)), weight, Some(bias.clone()));
                }
            }
        }
    }

    /// What lora-core takes for granted of 64 rows and more, so that a disabled adapter changes no bit.
    #[test]
    fn many_rows_in_f32_have_the_bits_of_burns_product() {
        for [rows, d_input, d_output] in [[64, 33, 70], [200, 700, 300]] {
            let (x, weight) = (tensor([rows, d_input], 1), tensor([d_input, d_output], 2));
            let found = linear(x.clone(), weight.clone(), None);
            assert_eq!(values(&found), values(&Flex::float_matmul(x, weight)));
        }
    }

    #[test]
    fn other_types_and_no_values_take_burns_operations() {
        let bias = || Flex::float_reshape(tensor([1, 7], 3), [7].into());
        let expected = linear(tensor([5, 3], 1), tensor([3, 7], 2), Some(bias()));
        let found = linear(f64s(&tensor([5, 3], 1)), f64s(&tensor([3, 7], 2)), Some(f64s(&bias())));
        assert_eq!(found.dtype(), DType::F64);
        crate::samples::assert_close(&found, &expected);

        for [rows, d_output] in [[0, 7], [5, 0]] {
            let half = |shape| in_dtype(tensor(shape, 1), DType::BF16);
            let found = linear(half([rows, 3]), half([3, d_output]), None);
            assert_eq!(found.shape(), [rows, d_output].into());
        }
    }
}
