//! What LoRA needs of libtorch beyond Burn's own operations: a low-rank product that is added in
//! place, and which CUDA devices there are.
//!
//! `lora-core` uses this crate when its feature `tch` is on; nobody else needs it. Without the feature it
//! is empty. Burn 0.22 is the last release with libtorch.

#![cfg(feature = "tch")]
// burn-tch is deprecated in Burn 0.22, and the feature that brings it is opt-in.
#![allow(deprecated)]

use burn::backend::libtorch::TchTensor;

/// y + left · right in the dtype of y: y `[rows, columns]`, left `[rows, rank]`, right `[rank, columns]`, the two
/// latter of one dtype, which is y's or f32.
///
/// One operation of libtorch (`addmm`), in y's own memory where nobody else holds it: the product, of y's size, is
/// never a tensor of its own. A y in half precision is widened for it, and the sum is rounded once.
pub fn add_product(mut y: TchTensor, left: TchTensor, right: TchTensor) -> TchTensor {
    let (left, right) = (&left.tensor, &right.tensor);
    let kind = y.tensor.kind();
    if kind != left.kind() {
        return TchTensor::new(y.tensor.to_kind(left.kind()).addmm_(left, right).to_kind(kind));
    }
    let in_place = y.mut_ops(|y| y.addmm_(left, right));
    in_place.unwrap_or_else(|| TchTensor::new(y.tensor.addmm(left, right)))
}

/// x W + b: x `[rows, d_input]`, weight `[d_input, d_output]`, bias `[d_output]`, all of one dtype. One operation of
/// libtorch, which rounds half precision once.
pub fn linear(x: TchTensor, weight: TchTensor, bias: TchTensor) -> TchTensor {
    TchTensor::new(bias.tensor.addmm(&x.tensor, &weight.tensor))
}

/// How many CUDA devices this libtorch sees; none for one that was built without CUDA.
pub fn cuda_devices() -> usize {
    usize::try_from(tch::Cuda::device_count()).unwrap_or_default()
}

/// Whether this libtorch was built with CUDA, on whatever machine.
pub fn is_built_with_cuda() -> bool {
    tch::utils::has_cudart() // has_cuda() asks for a device too
}

#[cfg(test)]
mod tests {
    use burn::backend::LibTorch;
    use burn::tensor::{DType, Device, Distribution, Tensor, Tolerance};

    fn low_rank(y: &Tensor<2>, left: &Tensor<2>, right: &Tensor<2>) -> Tensor<2> {
        let [y, left, right] =
            [y, left, right].map(|tensor| tensor.clone().try_into_primitive::<LibTorch>().unwrap());
        Tensor::from_primitive::<LibTorch>(super::add_product(y, left, right))
    }

    #[test]
    fn a_product_is_added_in_place_only_where_nobody_else_sees_it() {
        let device = Device::libtorch();
        let random =
            |shape: [usize; 2]| Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), &device);
        let (y, left, right) = (random([5, 7]), random([5, 3]), random([3, 7]));
        let expected = (y.clone() + left.clone().matmul(right.clone())).into_data();
        let before = y.to_data();

        let shared = low_rank(&y, &left, &right);
        shared.into_data().assert_approx_eq::<f32>(&expected, Tolerance::absolute(1e-6));
        y.to_data().assert_eq(&before, true); // a handle was left behind

        let transposed = y.clone().transpose().mul_scalar(1.0).transpose(); // its own memory, columns first
        let left = left.try_into_primitive::<LibTorch>().unwrap();
        let right = right.try_into_primitive::<LibTorch>().unwrap();
        let own = transposed.try_into_primitive::<LibTorch>().unwrap();
        let place = own.tensor.data_ptr();
        let sum = super::add_product(own, left, right);
        assert_eq!(sum.tensor.data_ptr(), place);
        let sum = Tensor::<2>::from_primitive::<LibTorch>(sum);
        sum.into_data().assert_approx_eq::<f32>(&expected, Tolerance::absolute(1e-6));
    }

    #[test]
    fn half_precision_is_added_in_half_precision() {
        let device = Device::libtorch();
        let ones = |shape: [usize; 2]| Tensor::<2>::ones(shape, (&device, DType::BF16));
        let sum = low_rank(&ones([2, 3]), &ones([2, 4]), &ones([4, 3]));
        assert_eq!(sum.dtype(), DType::BF16);
        assert!(sum.into_data().iter::<f32>().all(|value| value == 5.0));
    }
}
