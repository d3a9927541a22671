//! Which floating-point types the device of the tests has, and what is exact where it may not have f64.

#![allow(dead_code, reason = "each test program uses some of it")]

use burn::tensor::{DType, Tensor};
use lora_core::{check_dtype, device_by_name, device_from_env, supports_dtype};

/// Whether it has this one; one that it has not must be refused by name.
pub fn has(dtype: DType) -> bool {
    let device = device_from_env().unwrap();
    if supports_dtype(&device, dtype) {
        return true;
    }
    let error = check_dtype(&device, dtype).unwrap_err().to_string();
    assert!(error.contains(&format!("found {}", dtype.name())), "{error}");
    false
}

/// The same numbers in f64 on the processor, which always has it.
pub fn in_f64<const D: usize>(tensor: &Tensor<D>) -> Tensor<D> {
    let data = tensor.to_data().convert::<f64>();
    let processor =
        ["flex", "ndarray", "tch:cpu"].iter().find_map(|name| device_by_name(name).ok());
    let processor = processor.expect("the feature flex, ndarray or tch");
    Tensor::from_data(data, (&processor.autodiff(), DType::F64))
}
