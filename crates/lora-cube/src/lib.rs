//! Devices of Burn's CubeCL runtimes: which adapters a machine offers to wgpu, Vulkan, Metal and CUDA,
//! what each is called, and opening one with an error instead of a panic.
//!
//! `lora-core` uses this crate when one of its features `wgpu`, `vulkan`, `metal` and `cuda` is on;
//! nobody else needs it. Without a feature it is empty.

#![cfg(any(feature = "wgpu", feature = "cuda"))]

use std::fmt;
use std::sync::{Mutex, PoisonError};

use burn::backend::{CubeDevice, DispatchDevice};
use burn::tensor::{Device, DeviceType};

/// What CubeCL runs kernels through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    /// The graphics interface that the machine has: Vulkan, Metal, DirectX 12 or OpenGL.
    #[cfg(feature = "wgpu")]
    Wgpu,
    /// Vulkan, with kernels compiled to SPIR-V where the adapter allows that.
    #[cfg(feature = "vulkan")]
    Vulkan,
    /// Metal, with kernels compiled to its own language.
    #[cfg(feature = "metal")]
    Metal,
    /// NVIDIA's CUDA.
    #[cfg(feature = "cuda")]
    Cuda,
}

/// The devices of `runtime` on this machine: graphics cards of their own first, then those of the processor, then what
/// computes on the processor itself; of one kind as the system lists them. Empty where there is none. Opens none of them. The machine is asked once: that sets its drivers up, and takes a part of a second.
pub fn devices(runtime: Runtime) -> Vec<Device> {
    static FOUND: Mutex<Vec<(Runtime, Vec<Device>)>> = Mutex::new(Vec::new());
    let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, devices)) = found.iter().find(|(other, _)| *other == runtime) {
        return devices.clone();
    }
    let mut devices = enumerate(runtime);
    devices.sort_by_key(kind_order);
    found.push((runtime, devices.clone()));
    devices
}

fn enumerate(runtime: Runtime) -> Vec<Device> {
    match runtime {
        #[cfg(feature = "wgpu")]
        Runtime::Wgpu => Device::enumerate(DeviceType::Wgpu).into_iter().collect(),
        #[cfg(feature = "vulkan")]
        Runtime::Vulkan => Device::enumerate(DeviceType::Vulkan).into_iter().collect(),
        #[cfg(feature = "metal")]
        Runtime::Metal => Device::enumerate(DeviceType::Metal).into_iter().collect(),
        #[cfg(feature = "cuda")]
        Runtime::Cuda => Device::enumerate(DeviceType::Cuda).into_iter().collect(),
    }
}

/// Where a device's kind stands among the others; an adapter list of wgpu is in the order of the drivers.
fn kind_order(device: &Device) -> u8 {
    #[cfg(feature = "wgpu")]
    if let DispatchDevice::Cube(CubeDevice::Wgpu(device)) = device.as_dispatch() {
        use burn::backend::WgpuDeviceKind::{Cpu, DiscreteGpu, IntegratedGpu, VirtualGpu};
        return match device.kind {
            DiscreteGpu(_) => 0,
            IntegratedGpu(_) => 1,
            VirtualGpu(_) => 2,
            Cpu => 3,
            _ => 4,
        };
    }
    let _ = device;
    0
}

/// What an opened device says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// The part's own name.
    pub name: String,
    /// What the kernels are compiled for: `wgpu<wgsl>`, `wgpu<spirv>`, `cuda`.
    pub runtime: String,
    /// Whether it computes on the processor, as lavapipe and SwiftShader do.
    pub is_software: bool,
    /// Bytes that may be held at once, where the runtime says so.
    pub memory: Option<u64>,
}

/// Why a device that the machine lists cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenError(String);

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for OpenError {}

/// Whether a device is one of CubeCL's.
pub fn is_cube(device: &Device) -> bool {
    let device = device.clone().without_autodiff();
    matches!(device.as_dispatch(), DispatchDevice::Cube(_))
}

/// Whether a device is reached through a graphics interface: wgpu, Vulkan or Metal.
#[cfg(feature = "wgpu")]
pub fn is_graphics(device: &Device) -> bool {
    let device = device.clone().without_autodiff();
    matches!(device.as_dispatch(), DispatchDevice::Cube(CubeDevice::Wgpu(_)))
}

/// Opens a device of [`devices`], which stays open until the process ends; a second time nothing is done. `None` for
/// a device of another backend.
///
/// # Errors
/// When the driver refuses it.
pub fn open(device: &Device) -> Result<Option<Facts>, OpenError> {
    let device = device.clone().without_autodiff();
    match device.as_dispatch() {
        DispatchDevice::Cube(cube) => {
            #[cfg(feature = "wgpu")]
            if let CubeDevice::Wgpu(wgpu) = cube {
                wgpu::open(wgpu)?;
            }
            // Burn opens CUDA, and adapters for which it has no name, with a panic where they refuse.
            let facts = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| facts(cube)));
            facts.map(Some).map_err(|_| {
                OpenError("the driver refused it; what it said was printed before".to_owned())
            })
        }
        #[allow(unreachable_patterns)] // where CubeCL is the only backend
        _ => Ok(None),
    }
}

fn facts(device: &CubeDevice) -> Facts {
    let client = device.client();
    let properties = client.properties();
    Facts {
        name: properties.identity.name.clone(),
        runtime: client.name().to_owned(),
        is_software: is_software(device),
        memory: properties.memory.max_memory(),
    }
}

fn is_software(device: &CubeDevice) -> bool {
    #[cfg(feature = "wgpu")]
    if let CubeDevice::Wgpu(device) = device {
        return device.kind == burn::backend::WgpuDeviceKind::Cpu;
    }
    let _ = device;
    false
}

#[cfg(feature = "wgpu")]
mod wgpu {
    use std::sync::{Mutex, PoisonError};

    use burn::backend::{WgpuDevice, WgpuDeviceKind};
    use burn::tensor::wgpu::WgpuInitError;
    use burn::tensor::{Device, DeviceKind};

    use super::OpenError;

    /// Each device that was opened, with what the driver answered. A runtime can be set up once only, and a
    /// driver that refused is not asked again.
    static OPENED: Mutex<Vec<(WgpuDevice, Result<(), OpenError>)>> = Mutex::new(Vec::new());

    /// Sets the runtime up before its first use, where a refusal would be a panic.
    pub(super) fn open(device: &WgpuDevice) -> Result<(), OpenError> {
        let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, answer)) = opened.iter().find(|(other, _)| other == device) {
            return answer.clone();
        }
        let answer = set_up(device);
        opened.push((device.clone(), answer.clone()));
        answer
    }

    fn set_up(device: &WgpuDevice) -> Result<(), OpenError> {
        let kind = match device.kind {
            WgpuDeviceKind::DiscreteGpu(index) => DeviceKind::DiscreteGpu(index),
            WgpuDeviceKind::IntegratedGpu(index) => DeviceKind::IntegratedGpu(index),
            WgpuDeviceKind::VirtualGpu(index) => DeviceKind::VirtualGpu(index),
            WgpuDeviceKind::Cpu => DeviceKind::Cpu,
            WgpuDeviceKind::DefaultDevice => DeviceKind::DefaultDevice,
            // Burn has no name for the others; they are set up at their first use.
            WgpuDeviceKind::Existing(_) | WgpuDeviceKind::Other(_) => return Ok(()),
        };
        let options = Device::wgpu_options().device_kind(kind).graphics_api(device.backend);
        match options.init() {
            // Refused: somebody's tensor was there first, so it works.
            Ok(_) | Err(WgpuInitError::Registration { .. }) => Ok(()),
            Err(error) => Err(OpenError(error.to_string())),
        }
    }
}
