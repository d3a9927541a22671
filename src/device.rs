//! Which device a program works on, and what to expect of its first steps.

use burn::tensor::Device;
use lora_core::{device_by_name, device_from_env};

use crate::Result;

/// The option that names a device.
#[derive(Debug, clap::Args)]
pub struct DeviceOption {
    /// Device: flex, ndarray, tch:cpu, tch:cuda:N, wgpu:N, vulkan:N, metal:N, cuda:N, as far as built in; the
    /// example `devices` lists them [default: the variable LORA_DEVICE, else the build's first backend]
    #[arg(long, value_name = "NAME")]
    pub device: Option<String>,
}

impl DeviceOption {
    /// The device.
    pub fn open(&self) -> Result<Device> {
        open_device(self.device.as_deref())
    }
}

/// The device of this name, or the one that `LORA_DEVICE` names, or the build's first.
pub fn open_device(name: Option<&str>) -> Result<Device> {
    Ok(match name {
        Some(name) => device_by_name(name)?,
        None => device_from_env()?,
    })
}

/// Says on standard error that a device compiles its kernels as they are needed, where it does: nothing else is heard of
/// it for a while. For when all that a user gave was seen to be right.
pub fn tell_of_kernels(device: &Device) {
    if let Some(note) = kernels_note(device) {
        eprintln!("{note}");
    }
}

/// What [`tell_of_kernels`] says.
pub fn kernels_note(device: &Device) -> Option<&'static str> {
    let note = match cfg!(feature = "autotune") {
        true => {
            "note: kernels are compiled for this device, and timed against each other, where they are first needed; the \
             first steps take longer"
        }
        false => {
            "note: kernels are compiled for this device where they are first needed; the first steps take longer"
        }
    };
    lora_core::compiles_kernels(device).then_some(note)
}
