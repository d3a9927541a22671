//! Low-rank adaptation (LoRA) of the layers of any [Burn](https://burn.dev) model.
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
//! [`VisitLora`](trait@VisitLora), attaches a [`LoraAdapter`] to each and freezes the rest; the model
//! trains as any Burn module; [`save_adapter`] writes A and B in PEFT's format and [`load_adapter`]
//! reads them; [`merge`] folds them into the weights. One layer alone: `wrap` of [`LoraLinear`],
//! [`LoraEmbedding`], [`LoraConv1d`] and [`LoraConv2d`]. Several adapters for one model: [`AdapterSets`]
//! switches, adds up and mixes them, [`combine`] makes one of them.
//!
//! The pages of the [`guide`] say more: a model of one's own, target rules and their messages, variants,
//! starting values, merging, files.
//!
//! No backend is compiled in by default: turn on `flex` (pure Rust, CPU), `ndarray`, `tch`, `wgpu`,
//! `vulkan`, `metal` or `cuda`, and choose the device at run time, by name if need be ([`device_by_name`]).

#![doc(test(attr(deny(warnings))))]

// The derive's code says `lora_core`, in this crate's own tests too.
#[cfg(test)]
extern crate self as lora_core;

mod adapter;
mod audit;
mod burn_lora;
mod combination;
mod combine;
mod config;
mod conv;
mod device;
mod disabled;
mod embedding;
mod error;
mod frozen;
#[cfg(any(doc, doctest))]
pub mod guide;
mod init;
mod inject;
mod layer;
mod learning_rates;
mod linalg;
mod linear;
mod merge;
mod ops;
mod peft;
mod portable;
mod problem;
mod replacement;
mod samples;
mod scaling;
mod set;
mod sets;
mod target;
mod trainable;
mod visit;

pub use adapter::LoraAdapter;
pub use audit::audit_gradients;
pub use combination::{Combination, CombineReport, CombinedLayer, combine};
pub use config::{AdapterConfig, LoraConfig, TrainedBias};
pub use conv::{
    AdaptableConv1d, AdaptableConv2d, FrozenConv1d, FrozenConv2d, LoraConv1d, LoraConv2d,
};
pub use device::{
    BackendInfo, BackendName, DeviceInfo, DeviceProblem, backends, check_dtype, checks_indices,
    compiles_kernels, default_device_name, device_by_name, device_from_env, device_name_from_env,
    supports_dtype,
};
pub use disabled::{Disabled, disable};
pub use embedding::{AdaptableEmbedding, FrozenEmbedding, LoraEmbedding};
pub use error::{Error, ErrorKind, Result};
pub use frozen::{FrozenLayer, FrozenLinear, LayerKind, Weights};
pub use init::Init;
pub use inject::{AdaptedLayer, InjectReport, ReplacedValues, UnadaptedLayer, inject};
pub use layer::{Adaptable, AdaptableLayer, Adaptation, LoraLayer, ReplacedLayer, Rounding};
pub use learning_rates::LearningRates;
pub use linear::{AdaptableLinear, LoraLinear};
pub use lora_derive::VisitLora;
pub use merge::{MergeReport, MergedLayer, merge, unmerge};
pub use ops::lora_linear;
pub use peft::{
    AdapterInfo, LoadOptions, LoadReport, MergeOptions, load_adapter, load_adapter_with,
    merge_checkpoint, merge_checkpoint_with, read_adapter, read_adapter_config, read_adapter_info,
    save_adapter, write_file, write_folder, write_folder_with,
};
pub use portable::{
    PortabilityProblem, PortabilityRule, PortableReport, Reader, check_config_for, check_model_for,
    check_written_for, read_mlx_adapter, save_mlx_adapter, save_portable,
};
pub use problem::ConfigProblem;
pub use replacement::{Replacement, TokenRows};
pub use scaling::Scaling;
pub use set::AdapterSet;
pub use sets::{AdapterSets, Mixed};
pub use target::{ExcludeModules, Selection, TargetModules};
pub use trainable::ParameterCount;
pub use visit::{VisitLayer, VisitLayerMut, VisitLora, join_path};

/// Its example is a test.
#[cfg(all(doctest, feature = "flex"))]
#[doc = include_str!("../README.md")]
struct Readme;
