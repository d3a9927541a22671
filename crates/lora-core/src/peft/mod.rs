//! Adapters on disk, in PEFT's format. PEFT's names stand nowhere else.
//!
//! A folder holds `adapter_config.json` and `adapter_model.safetensors`.
//!
//! - A tensor's key MUST be `base_model.model.<module path>.lora_A.weight`, `[rank, d_input]`, or
//!   `….lora_B.weight`, `[d_output, rank]`: torch's layout, transposed to ours.
//! - The config MUST hold `peft_type` = `"LORA"`, `r`, `lora_alpha` and `target_modules`. A field
//!   that is not known here MUST be at its default, since it may change the mathematics.
//! - `exclude_modules`, `layers_to_transform` and `layers_pattern` MAY narrow the targets. They are
//!   read and applied; what is written here names its targets without them.
//! - An entry of a list MAY match nothing in the model, as long as something is a target: files are
//!   made for several kinds of model, and the tensors MUST fit the targets one to one.
//! - Adapter tensors are written as f32; f16 and bf16 MAY be read.
//!
//! Source: files that PEFT 0.21.2 wrote.

mod config;
mod keys;
mod load;
mod save;

pub use config::{AdapterInfo, read_adapter_config};
pub use load::load_adapter;
pub use save::{save_adapter, write_folder};

const CONFIG_FILE: &str = "adapter_config.json";
const WEIGHTS_FILE: &str = "adapter_model.safetensors";
