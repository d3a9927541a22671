//! Low-rank adaptation (LoRA) of any linear layer of any [Burn](https://burn.dev) model.
//!
//! The one equation, with rows of x as samples:
//!
//! ```text
//! y = x W + b + scaling (x A) B        scaling = alpha / rank
//!
//! x [.., d_input]   W [d_input, d_output] frozen   A [d_input, rank]   B [rank, d_output]
//! ```
//!
//! x meets A first: A is the *down* matrix and starts at zero, B is the *up* matrix and starts
//! Gaussian, unless [`Init`] says otherwise. (PEFT and the paper start the other way round.) Only A
//! and B train. No matrix of W's shape other than W exists while training: not its gradient, not its
//! moments, not A·B.
//!
//! The flow: [`LoraConfig`] says what is asked for; [`inject`] finds the targets through
//! [`VisitLora`], attaches a [`LoraAdapter`] to each and freezes the rest; the model trains as any
//! Burn module; [`save_adapter`] writes A and B in PEFT's format and [`load_adapter`] reads them;
//! [`merge`] folds them into the weights. One layer alone: [`LoraLinear::wrap`].
//!
//! No backend is compiled in by default: turn on `flex` (pure Rust, CPU), `ndarray`, `tch`, `wgpu`,
//! `vulkan`, `metal` or `cuda`, and choose the device at run time.

#![doc(test(attr(deny(warnings))))]

mod adapter;
#[allow(dead_code, reason = "the public functions over whole models are still to come")]
mod combine;
mod config;
mod error;
mod frozen;
mod init;
mod inject;
mod linalg;
mod linear;
mod merge;
mod ops;
mod peft;
mod scaling;
mod target;
mod trainable;
mod visit;

pub use adapter::LoraAdapter;
pub use config::{AdapterConfig, LoraConfig};
pub use error::{Error, ErrorKind, Result};
pub use frozen::FrozenLinear;
pub use init::Init;
pub use inject::{AdaptedLayer, InjectReport, inject};
pub use linear::{AdaptableLinear, LoraLinear};
pub use merge::{merge, unmerge};
pub use ops::lora_linear;
pub use peft::{AdapterInfo, load_adapter, read_adapter_config, save_adapter, write_folder};
pub use scaling::Scaling;
pub use target::TargetModules;
pub use trainable::ParameterCount;
pub use visit::{VisitLora, join_path};
