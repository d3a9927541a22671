//! Devices by name, and what this build and this machine have of them.

// burn-ndarray and burn-tch are deprecated in Burn 0.22, and the features that name them are opt-in.
#![allow(deprecated)]

use std::fmt;

use burn::tensor::{DType, Device};

use crate::error::{ErrorKind, Result};

/// The environment variable that names a device where a program was given none.
const VARIABLE: &str = "LORA_DEVICE";

/// A backend: what stands before the colon of a device's name, and its Cargo feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum BackendName {
    /// Burn's pure-Rust backend for processors.
    Flex,
    /// ndarray, on processors; deprecated by Burn.
    NdArray,
    /// libtorch, on processors and NVIDIA GPUs; deprecated by Burn.
    Tch,
    /// The machine's graphics interface (Vulkan, Metal, DirectX 12, OpenGL), through wgpu.
    Wgpu,
    /// Vulkan through wgpu, with kernels in SPIR-V.
    Vulkan,
    /// Metal through wgpu, with kernels in its own language.
    Metal,
    /// NVIDIA's CUDA, through CubeCL.
    Cuda,
}

impl BackendName {
    /// All of them, in the order in which one is chosen when none is named.
    pub const ALL: [Self; 7] =
        [Self::Flex, Self::Cuda, Self::Metal, Self::Vulkan, Self::Wgpu, Self::Tch, Self::NdArray];

    /// The name, which is the Cargo feature's too.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Flex => "flex",
            Self::NdArray => "ndarray",
            Self::Tch => "tch",
            Self::Wgpu => "wgpu",
            Self::Vulkan => "vulkan",
            Self::Metal => "metal",
            Self::Cuda => "cuda",
        }
    }

    /// Whether its feature is on in this build.
    pub fn is_compiled(self) -> bool {
        match self {
            Self::Flex => cfg!(feature = "flex"),
            Self::NdArray => cfg!(feature = "ndarray"),
            Self::Tch => cfg!(feature = "tch"),
            Self::Wgpu => cfg!(feature = "wgpu"),
            Self::Vulkan => cfg!(feature = "vulkan"),
            Self::Metal => cfg!(feature = "metal"),
            Self::Cuda => cfg!(feature = "cuda"),
        }
    }

    /// How its devices are named.
    fn pattern(self) -> &'static str {
        match self {
            Self::Flex => "flex",
            Self::NdArray => "ndarray",
            Self::Tch => "tch:cpu, tch:cuda:N",
            Self::Wgpu => "wgpu:N",
            Self::Vulkan => "vulkan:N",
            Self::Metal => "metal:N",
            Self::Cuda => "cuda:N",
        }
    }

    fn compiled() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|backend| backend.is_compiled())
    }
}

impl fmt::Display for BackendName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a device's name gives none.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceProblem {
    /// No device is named so anywhere.
    Unknown,
    /// The backend's Cargo feature is off.
    FeatureOff {
        /// The backend.
        backend: BackendName,
    },
    /// The machine has no device of the backend.
    Absent {
        /// What is missing, and how it is got.
        reason: String,
    },
    /// The machine has devices of the backend, but not so many.
    NoSuchIndex {
        /// Those that there are.
        names: Vec<String>,
    },
    /// The driver refuses the device.
    Refused {
        /// What the driver said.
        reason: String,
    },
}

impl fmt::Display for DeviceProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => {
                let patterns = BackendName::ALL.map(BackendName::pattern).join(", ");
                write!(f, "expected a device's name ({patterns}; N counts from 0), found another")
            }
            Self::FeatureOff { backend } => {
                let compiled: Vec<_> = BackendName::compiled().map(BackendName::as_str).collect();
                let has = match compiled[..] {
                    [] => "no backend".to_owned(),
                    _ => compiled.join(", "),
                };
                write!(
                    f,
                    "this build has no {backend} (it has {has}); build it with the Cargo feature {backend}"
                )
            }
            Self::Absent { reason } => write!(f, "this machine has no such device: {reason}"),
            Self::NoSuchIndex { names } => {
                write!(f, "this machine has no such device; it has {}", names.join(", "))
            }
            Self::Refused { reason } => write!(
                f,
                "the driver refuses this device: {reason}; update the driver, or choose another device"
            ),
        }
    }
}

/// The device with this name:
///
/// | name | device | Cargo feature |
/// |---|---|---|
/// | `flex` | the processor, Burn's pure-Rust backend | `flex` |
/// | `ndarray` | the processor, ndarray | `ndarray`, with OpenBLAS `openblas` |
/// | `tch:cpu`, or `tch` | the processor, libtorch | `tch` |
/// | `tch:cuda:N` | the N-th NVIDIA GPU, libtorch | `tch` |
/// | `wgpu:N` | the N-th adapter that wgpu finds | `wgpu` |
/// | `vulkan:N`, `metal:N` | the same of one interface | `vulkan`, `metal` |
/// | `cuda:N` | the N-th NVIDIA GPU, CubeCL | `cuda` |
///
/// N counts from 0 and may be left out for the first, which is a GPU where there is one. GPUs of all features but
/// `tch` are opened, so that what the driver says against one is an error here.
///
/// # Errors
/// When no device is named so, its feature is off in this build, the machine has none, or the driver refuses it.
///
/// ```
/// # #[cfg(feature = "flex")]
/// # {
/// let device = lora_core::device_by_name("flex")?.autodiff();
/// # assert!(device.is_autodiff());
/// # }
/// # Ok::<(), lora_core::Error>(())
/// ```
pub fn device_by_name(name: &str) -> Result<Device> {
    found(name).map_err(|problem| {
        ErrorKind::Device { name: name.to_owned(), variable: None, problem }.into()
    })
}

/// The device that the environment variable `LORA_DEVICE` names, or the first of
/// [`BackendName::ALL`] that this build has.
///
/// # Errors
/// As [`device_by_name`], and when this build has no backend.
pub fn device_from_env() -> Result<Device> {
    let name = device_name_from_env();
    found(&name).map_err(|problem| {
        let is_set = std::env::var_os(VARIABLE).is_some_and(|value| !value.is_empty());
        ErrorKind::Device { name, variable: is_set.then_some(VARIABLE), problem }.into()
    })
}

/// The name that [`device_from_env`] opens.
pub fn device_name_from_env() -> String {
    match std::env::var_os(VARIABLE) {
        Some(name) if !name.is_empty() => name.to_string_lossy().into_owned(),
        _ => default_device_name().to_owned(),
    }
}

/// The name of the device that is meant where none is named: the first of [`BackendName::ALL`] that this build has.
pub fn default_device_name() -> &'static str {
    BackendName::compiled().next().unwrap_or(BackendName::Flex).as_str()
}

/// Which backend a name means, and which of its devices.
fn parse(name: &str) -> Option<(BackendName, Place)> {
    let (backend, rest) = match name.split_once(':') {
        Some((backend, rest)) => (backend, Some(rest)),
        None => (name, None),
    };
    let backend = BackendName::ALL.into_iter().find(|known| known.as_str() == backend)?;
    let index = |text: &str| match text.bytes().all(|byte| byte.is_ascii_digit()) {
        true => text.parse().ok().map(Place::Gpu),
        false => None,
    };
    let place = match (backend, rest) {
        (BackendName::Flex | BackendName::NdArray, None) => Place::Processor,
        (BackendName::Flex | BackendName::NdArray, Some(_)) => return None,
        (BackendName::Tch, None | Some("cpu")) => Place::Processor,
        (BackendName::Tch, Some("cuda")) => Place::Gpu(0),
        (BackendName::Tch, Some(rest)) => index(rest.strip_prefix("cuda:")?)?,
        (_, None) => Place::Gpu(0),
        (_, Some(rest)) => index(rest)?,
    };
    Some((backend, place))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Processor,
    Gpu(usize),
}

fn found(name: &str) -> Result<Device, DeviceProblem> {
    let (backend, place) = parse(name).ok_or(DeviceProblem::Unknown)?;
    if !backend.is_compiled() {
        return Err(DeviceProblem::FeatureOff { backend });
    }
    let Place::Gpu(index) = place else {
        return processor(backend).ok_or(DeviceProblem::FeatureOff { backend });
    };
    let devices = gpus(backend);
    if devices.is_empty() {
        return Err(DeviceProblem::Absent { reason: absence(backend).to_owned() });
    }
    let Some(device) = devices.get(index) else {
        let names = (0..devices.len()).map(|index| gpu_name(backend, index)).collect();
        return Err(DeviceProblem::NoSuchIndex { names });
    };
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    lora_cube::open(device)
        .map_err(|error| DeviceProblem::Refused { reason: error.to_string() })?;
    Ok(device.clone())
}

fn gpu_name(backend: BackendName, index: usize) -> String {
    match backend {
        BackendName::Tch => format!("tch:cuda:{index}"),
        _ => format!("{backend}:{index}"),
    }
}

/// The processor as a device of this backend, where it is one and is compiled.
fn processor(backend: BackendName) -> Option<Device> {
    match backend {
        #[cfg(feature = "flex")]
        BackendName::Flex => Some(Device::flex()),
        #[cfg(feature = "ndarray")]
        BackendName::NdArray => Some(Device::ndarray()),
        #[cfg(feature = "tch")]
        BackendName::Tch => Some(Device::libtorch()),
        _ => None,
    }
}

/// The GPUs that this backend sees, where it is compiled.
fn gpus(backend: BackendName) -> Vec<Device> {
    match backend {
        #[cfg(feature = "tch")]
        BackendName::Tch => (0..lora_tch::cuda_devices()).map(Device::libtorch_cuda).collect(),
        #[cfg(feature = "wgpu")]
        BackendName::Wgpu => lora_cube::devices(lora_cube::Runtime::Wgpu),
        #[cfg(feature = "vulkan")]
        BackendName::Vulkan => lora_cube::devices(lora_cube::Runtime::Vulkan),
        #[cfg(feature = "metal")]
        BackendName::Metal => lora_cube::devices(lora_cube::Runtime::Metal),
        #[cfg(feature = "cuda")]
        BackendName::Cuda => lora_cube::devices(lora_cube::Runtime::Cuda),
        _ => Vec::new(),
    }
}

/// What a machine without any GPU of this backend lacks.
fn absence(backend: BackendName) -> &'static str {
    match backend {
        BackendName::Wgpu => {
            "no adapter answers; install a driver for Vulkan (on Debian mesa-vulkan-drivers and libvulkan1, which \
             computes on the processor without a GPU), Metal or DirectX 12"
        }
        BackendName::Vulkan => {
            "no Vulkan adapter answers; install the GPU's Vulkan driver and the loader (on Debian libvulkan1)"
        }
        BackendName::Metal => "no Metal adapter answers; Metal is there on macOS only",
        BackendName::Cuda => {
            "no CUDA device answers; install NVIDIA's driver (libcuda), and see that `nvidia-smi` lists the GPU"
        }
        BackendName::Tch => {
            #[cfg(feature = "tch")]
            if !lora_tch::is_built_with_cuda() {
                return "this libtorch was built for the processor alone; build against one with CUDA";
            }
            "libtorch sees no CUDA device; install NVIDIA's driver, and see that `nvidia-smi` lists the GPU"
        }
        BackendName::Flex | BackendName::NdArray => "the processor is always there",
    }
}

/// What a backend offers here.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct BackendInfo {
    /// The backend.
    pub backend: BackendName,
    /// Its devices, in the order of their names.
    pub devices: Vec<DeviceInfo>,
    /// Why there is none of its own kind on this machine, or none in this build.
    pub missing: Option<DeviceProblem>,
}

/// A device of this machine.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct DeviceInfo {
    /// Its name, as [`device_by_name`] takes it.
    pub name: String,
    /// What the part calls itself, and what its kernels are compiled for, where the backend says so.
    pub description: Option<String>,
    /// The bytes that it can hold, where the backend says so.
    pub memory: Option<u64>,
    /// The types of weights that a model can have there.
    pub dtypes: Vec<DType>,
    /// What the driver says against it.
    pub refused: Option<DeviceProblem>,
}

/// Every backend, with what this build and this machine have of it. GPUs of all features but `tch` are opened.
pub fn backends() -> Vec<BackendInfo> {
    BackendName::ALL.into_iter().map(info).collect()
}

fn info(backend: BackendName) -> BackendInfo {
    if !backend.is_compiled() {
        let missing = Some(DeviceProblem::FeatureOff { backend });
        return BackendInfo { backend, devices: Vec::new(), missing };
    }
    let mut devices = Vec::new();
    if let Some(device) = processor(backend) {
        let name = match backend {
            BackendName::Tch => "tch:cpu".to_owned(),
            backend => backend.to_string(),
        };
        devices.push(DeviceInfo {
            name,
            description: Some("the processor".to_owned()),
            memory: None,
            dtypes: dtypes(&device),
            refused: None,
        });
    }
    let gpus = gpus(backend);
    let has_gpus = !matches!(backend, BackendName::Flex | BackendName::NdArray);
    let missing = (has_gpus && gpus.is_empty())
        .then(|| DeviceProblem::Absent { reason: absence(backend).to_owned() });
    devices.extend(
        gpus.iter().enumerate().map(|(index, device)| gpu_info(gpu_name(backend, index), device)),
    );
    BackendInfo { backend, devices, missing }
}

fn gpu_info(name: String, device: &Device) -> DeviceInfo {
    let mut info =
        DeviceInfo { name, description: None, memory: None, dtypes: Vec::new(), refused: None };
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    match lora_cube::open(device) {
        Ok(Some(facts)) => {
            let kind = if facts.is_software { ", computes on the processor" } else { "" };
            info.description = Some(format!("{}, {}{kind}", facts.name, facts.runtime));
            info.memory = facts.memory;
        }
        Ok(None) => {}
        Err(error) => {
            info.refused = Some(DeviceProblem::Refused { reason: error.to_string() });
            return info;
        }
    }
    info.dtypes = dtypes(device);
    info
}

fn dtypes(device: &Device) -> Vec<DType> {
    [DType::F32, DType::BF16, DType::F16]
        .into_iter()
        .filter(|dtype| supports_dtype(device, *dtype))
        .collect()
}

/// Whether a model with weights of this floating-point type can be trained and run on `device`.
///
/// Stricter than Burn's own answer where that does not hold: libtorch has no usable product in f16 on processors, and
/// through graphics interfaces not all of f64's operations are right, where an adapter says that it has them.
pub fn supports_dtype(device: &Device, dtype: DType) -> bool {
    #[cfg(feature = "wgpu")]
    if dtype == DType::F64 && lora_cube::is_graphics(device) {
        return false;
    }
    #[cfg(feature = "tch")]
    if dtype == DType::F16 && *device == Device::libtorch() {
        return false;
    }
    device.supports_dtype(dtype)
}

/// Whether a device compiles its kernels while a program runs, each where it is first needed: wgpu, Vulkan, Metal
/// and CUDA through CubeCL.
pub fn compiles_kernels(device: &Device) -> bool {
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    {
        lora_cube::is_cube(device)
    }
    #[cfg(not(any(feature = "wgpu", feature = "cuda")))]
    {
        let _ = device;
        false
    }
}

/// Whether a device says so when an index is beyond a tensor: Flex, ndarray and libtorch's processor do, with a panic.
/// GPUs, and drivers that stand in for one, read something else or end the program.
pub fn checks_indices(device: &Device) -> bool {
    let device = device.clone().without_autodiff();
    BackendName::compiled().any(|backend| processor(backend).as_ref() == Some(&device))
}

/// Says what is wrong with weights of this type on `device`.
///
/// # Errors
/// When [`supports_dtype`] says no.
pub fn check_dtype(device: &Device, dtype: DType) -> Result<()> {
    if supports_dtype(device, dtype) {
        return Ok(());
    }
    let (path, device, supported) = (String::new(), device_name(device), dtypes(device));
    Err(ErrorKind::DeviceDtype { path, device, dtype, supported }.into())
}

/// A device for messages, in the words of [`device_by_name`] as far as Burn tells it.
fn device_name(device: &Device) -> String {
    let device = device.clone().without_autodiff();
    for backend in BackendName::compiled() {
        if processor(backend).is_some_and(|processor| processor == device) {
            return match backend {
                BackendName::Tch => "tch:cpu".to_owned(),
                backend => backend.to_string(),
            };
        }
        let of_backend = gpus(backend);
        if let Some(index) = of_backend.iter().position(|gpu| *gpu == device) {
            return gpu_name(backend, index);
        }
    }
    format!("{device:?}")
}
