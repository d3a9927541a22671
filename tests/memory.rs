//! What an adapter costs in memory: forward and backward of one layer, each in a process of its own.
//!
//! Linux only: the peak is read from `/proc/self`.
#![cfg(target_os = "linux")]

use std::env;
use std::fs;
use std::process::Command;

use burn::module::{Lora, Module};
use burn::nn::LinearConfig;
use burn::tensor::{Device, Distribution, Tensor};
use lora_core::LoraLinear;

const D: usize = 4096;
const RANK: usize = 16;
const ROWS: usize = 512;
const CASE: &str = "LORA_MEMORY_CASE";

/// Resident memory in MiB: `VmRSS` now, `VmHWM` at most since the last reset.
fn resident(field: &str) -> f64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
}

/// The work of one process; does nothing when the test runner starts it by itself.
#[test]
fn child() {
    let Ok(case) = env::var(CASE) else { return };
    let device = Device::flex().autodiff();
    let x = Tensor::<2>::random([ROWS, D], Distribution::Normal(0.0, 1.0), &device).require_grad();
    let base = LinearConfig::new(D, D).with_bias(false).init(&device);
    let _ = base.weight.val();
    let base = base.no_grad();

    let forward: Box<dyn Fn(Tensor<2>) -> Tensor<2>> = match case.as_str() {
        "frozen" => Box::new(move |x| base.forward(x)),
        "lora-core" => {
            let layer = LoraLinear::wrap(base, RANK, 32.0).unwrap();
            Box::new(move |x| layer.forward(x))
        }
        "burn" => {
            let layer = base.apply_lora(Lora::new(RANK, 32.0));
            Box::new(move |x| layer.forward(x))
        }
        other => panic!("{other}"),
    };
    fs::write("/proc/self/clear_refs", "5").unwrap(); // resets VmHWM
    let gradients = forward(x.clone()).sum().backward();
    let dx = x.grad(&gradients).unwrap();
    assert_eq!(dx.dims(), [ROWS, D]);
    println!("peak {}", resident("VmHWM"));
}

fn peak(case: &str) -> f64 {
    let output = Command::new(env::current_exe().unwrap())
        .args(["child", "--exact", "--nocapture"])
        .env(CASE, case)
        // glibc otherwise keeps freed blocks, which would count as used.
        .env("MALLOC_MMAP_THRESHOLD_", "65536")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let peak = text.split("peak ").nth(1).and_then(|rest| rest.split_whitespace().next());
    peak.unwrap_or_else(|| panic!("{case}: {text}")).parse().unwrap()
}

#[test]
fn an_adapter_adds_at_most_8_mb_to_a_frozen_layer() {
    let [frozen, ours, burn] = ["frozen", "lora-core", "burn"].map(peak);
    println!(
        "peak MiB at d = {D}, rank {RANK}, {ROWS} rows: frozen {frozen:.1}, lora-core {ours:.1}, Burn's apply_lora {burn:.1}"
    );
    assert!(ours - frozen <= 8.0, "lora-core {ours:.1} MiB, frozen {frozen:.1} MiB");
    // The yardstick works: a dense update is seen.
    assert!(burn - frozen > 40.0, "Burn's apply_lora {burn:.1} MiB, frozen {frozen:.1} MiB");
}
