//! Which floating-point types the device of the tests has.

use burn::tensor::DType;
use lora_core::{check_dtype, device_from_env, supports_dtype};

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
