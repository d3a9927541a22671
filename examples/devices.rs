//! Which devices this build has, and which of them this machine offers.
//!
//! ```text
//! cargo run --release --example devices
//! cargo run --release --features tch,wgpu --example devices -- --device wgpu:1
//! ```

use std::process::ExitCode;

use burn_lora::{Result, say};
use clap::Parser;
use lora_core::{BackendInfo, DeviceInfo, DeviceProblem, backends, device_by_name};

/// List the devices that this build has, and what this machine offers of them.
///
/// A name in the first column is what --device and the variable LORA_DEVICE take.
#[derive(Debug, Parser)]
struct Options {
    /// Open this device alone, and say what is wrong with it if it cannot be used
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
}

fn main() -> ExitCode {
    burn_lora::run(|| list(&Options::parse()))
}

fn list(options: &Options) -> Result<()> {
    if let Some(name) = &options.device {
        device_by_name(name)?;
        say(format!("{name}: can be used"));
        return Ok(());
    }
    let backends = backends();
    say(row("device", "memory", "weights in", "what it is"));
    for device in backends.iter().flat_map(|backend| &backend.devices) {
        say(line(device));
    }
    say("");
    for backend in &backends {
        if let Some(reason) = reason(backend) {
            say(format!("{:<14}{reason}", backend.backend.as_str()));
        }
    }
    Ok(())
}

fn row(name: &str, memory: &str, dtypes: &str, description: &str) -> String {
    format!("{name:<14}{memory:>10}  {dtypes:<16}{description}")
}

fn line(device: &DeviceInfo) -> String {
    let memory = match device.memory {
        Some(bytes) => format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)),
        None => "-".to_owned(),
    };
    let dtypes: Vec<_> = device.dtypes.iter().map(|dtype| dtype.name()).collect();
    let description = match (&device.refused, &device.description) {
        (Some(problem), _) => problem.to_string(),
        (None, Some(description)) => description.clone(),
        (None, None) => String::new(),
    };
    row(&device.name, &memory, &dtypes.join(" "), &description)
}

/// Why a backend has no device, or none but the processor.
fn reason(backend: &BackendInfo) -> Option<String> {
    match backend.missing.as_ref()? {
        DeviceProblem::FeatureOff { backend } => {
            Some(format!("not in this build; it is with --features {backend}"))
        }
        problem => Some(problem.to_string()),
    }
}
