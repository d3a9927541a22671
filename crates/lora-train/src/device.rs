//! Devices by name.

// burn-ndarray and burn-tch are deprecated in Burn 0.22, and the features that name them are opt-in.
#![allow(deprecated)]

use burn::tensor::Device;

use crate::error::{Error, Result};

/// The device with this name: `flex`, `ndarray`, `tch:cpu`, `tch:cuda:N`, `wgpu`, `vulkan`, `metal` or
/// `cuda:N`. Each is there when its Cargo feature (the part before the colon) is on.
///
/// # Errors
/// When there is no such name, or its feature is off in this build.
pub fn device_by_name(name: &str) -> Result<Device> {
    let (backend, rest) = name.split_once(':').unwrap_or((name, ""));
    let device = match (backend, rest) {
        #[cfg(feature = "flex")]
        ("flex", "") => Some(Device::flex()),
        #[cfg(feature = "ndarray")]
        ("ndarray", "") => Some(Device::ndarray()),
        #[cfg(feature = "tch")]
        ("tch", "" | "cpu") => Some(Device::libtorch()),
        #[cfg(feature = "tch")]
        ("tch", rest) => rest
            .strip_prefix("cuda:")
            .and_then(|index| index.parse::<usize>().ok())
            .map(Device::libtorch_cuda),
        #[cfg(feature = "wgpu")]
        ("wgpu", "" | "0") => Some(Device::wgpu(burn::tensor::DeviceKind::DefaultDevice)),
        #[cfg(feature = "vulkan")]
        ("vulkan", "" | "0") => Some(Device::vulkan(burn::tensor::DeviceKind::DefaultDevice)),
        #[cfg(feature = "metal")]
        ("metal", "" | "0") => Some(Device::metal(burn::tensor::DeviceKind::DefaultDevice)),
        #[cfg(feature = "cuda")]
        ("cuda", index) => index.parse::<usize>().ok().map(Device::cuda),
        _ => None,
    };
    device.ok_or_else(|| {
        let expected = format!(
            "one of {} (more with the Cargo features flex, ndarray, tch, wgpu, vulkan, metal, cuda)",
            device_names().join(", ")
        );
        Error::settings("device", expected, format!("'{name}'"))
    })
}

/// The names that this build understands.
pub fn device_names() -> Vec<&'static str> {
    let all = [
        (cfg!(feature = "flex"), "flex"),
        (cfg!(feature = "ndarray"), "ndarray"),
        (cfg!(feature = "tch"), "tch:cpu"),
        (cfg!(feature = "tch"), "tch:cuda:0"),
        (cfg!(feature = "wgpu"), "wgpu"),
        (cfg!(feature = "vulkan"), "vulkan"),
        (cfg!(feature = "metal"), "metal"),
        (cfg!(feature = "cuda"), "cuda:0"),
    ];
    all.into_iter().filter(|(on, _)| *on).map(|(_, name)| name).collect()
}
