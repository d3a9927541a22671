//! Small layers and configurations, for tests of what users may do with them.

use burn::nn::LinearConfig;
use burn::tensor::Device;
use lora_core::{AdaptableLinear, LoraConfig, Result, TargetModules};

pub fn device() -> Device {
    lora_core::device_from_env().unwrap().autodiff()
}

pub fn linear(d_input: usize, d_output: usize) -> AdaptableLinear {
    LinearConfig::new(d_input, d_output).init(&device()).into()
}

/// Rank 2 and alpha 4 on the layers of these names.
pub fn targets(names: &[&str]) -> LoraConfig {
    LoraConfig {
        target_modules: TargetModules::names(names.iter().copied()),
        ..LoraConfig::new(2, 4.0)
    }
}

/// The error, as a user reads it.
pub fn sentence<T>(result: Result<T>) -> String {
    result.map(|_| ()).unwrap_err().to_string()
}
