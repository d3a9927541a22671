//! Tensors for the tests.

use burn::backend::ops::FloatTensorOps;
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::{DType, FloatDType, Shape, Slice, TensorData};

use crate::FlexTensor;

/// Deterministic values in -1..1.
pub fn tensor(shape: [usize; 2], seed: u64) -> FlexTensor {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    let values: Vec<f32> = (0..shape[0] * shape[1]).map(|_| next()).collect();
    Flex::float_from_data(TensorData::new(values, shape), &Default::default())
}

pub fn transposed(shape: [usize; 2], seed: u64) -> FlexTensor {
    Flex::float_transpose(tensor([shape[1], shape[0]], seed))
}

/// The same in f32, f16 or bf16.
pub fn in_dtype(tensor: FlexTensor, dtype: DType) -> FlexTensor {
    match dtype {
        DType::F32 => tensor,
        DType::F16 => Flex::float_cast(tensor, FloatDType::F16),
        _ => Flex::float_cast(tensor, FloatDType::BF16),
    }
}

/// The types that the kernels have, and how far a value of about 1 may be from its definition.
pub const TYPES: [(DType, f64); 3] =
    [(DType::F32, 2e-6), (DType::F16, 2.0 / 2048.0), (DType::BF16, 2.0 / 256.0)];

pub fn shaped<const D: usize>(shape: [usize; D], seed: u64, dtype: DType) -> FlexTensor {
    let count = shape.iter().product();
    Flex::float_reshape(in_dtype(tensor([1, count], seed), dtype), Shape::from(shape))
}

/// Compares with a definition in f64, by value and relative to it from 0.1 on.
#[track_caller]
pub fn check(found: &FlexTensor, expected: &[f64], bound: f64) {
    let found = values(found);
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        let apart = (found - expected).abs();
        assert!(apart <= bound * expected.abs().max(0.1), "{found} for {expected}");
    }
}

/// All of `tensor` but its first row.
pub fn without_first(tensor: FlexTensor) -> FlexTensor {
    Flex::float_slice(tensor, &[Slice::from(1..)])
}

pub fn values(tensor: &FlexTensor) -> Vec<f64> {
    tensor.to_contiguous().into_data().iter::<f64>().collect()
}

pub fn assert_close(found: &FlexTensor, expected: &FlexTensor) {
    assert_eq!(found.shape(), expected.shape());
    let (found, expected) = (values(found), values(expected));
    assert!(found.iter().all(|value| value.is_finite()), "NaN or infinity");
    let differences = found.iter().zip(&expected).map(|(a, b)| (a - b).abs());
    let worst = differences.fold(0.0, f64::max);
    assert!(worst <= 1e-5, "largest difference {worst:e}");
}
