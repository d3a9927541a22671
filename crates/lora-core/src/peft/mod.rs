//! Adapters on disk, in PEFT's format. PEFT's names stand nowhere else.
//!
//! A folder holds `adapter_config.json` and `adapter_model.safetensors`.
//!
//! - A tensor's key is `base_model.model.<module path>` and an ending: `.lora_A.weight`,
//!   `[rank, d_input]`, and `.lora_B.weight`, `[d_output, rank]` (torch's layout, transposed to ours);
//!   of an embedding `.lora_embedding_A` and `.lora_embedding_B`; of a convolution
//!   `[rank, channels_in, kernel...]` and `[channels_out, rank / groups, 1...]`.
//! - Others are there where the config says so: `.lora_B.bias` (`lora_bias`), `.lora_magnitude_vector`
//!   (`use_dora`), `.base_layer.bias` and `.bias` (`bias`), `.weight` and `.bias` (`modules_to_save`),
//!   `.token_adapter.trainable_tokens_delta` (`trainable_token_indices`; the rows themselves).
//! - `.base_layer.weight` MAY be there, and is compared with the model's, as is the `.weight` of a layer
//!   that is nothing of the config's. `.original_module.bias` MAY be there, and acts nowhere.
//! - Older forms of keys MAY be read: with the adapter's name in them, without the prefix, with
//!   `_orig_mod.`.
//! - The config MUST hold `peft_type` = `"LORA"`, `r`, `lora_alpha` (not 0; PEFT allows numbers below)
//!   and `target_modules`: PEFT's defaults for them are not assumed. A field that is not known here MUST
//!   be at its default, since it may change the mathematics.
//! - `init_lora_weights` MAY be a start that leaves the weight as it is, or `pissa` or `olora`, which
//!   change the weight of linear layers and are computed again; any, over the weights that it left over.
//! - `exclude_modules`, `layers_to_transform` and `layers_pattern` MAY narrow the targets. They are
//!   read and applied; what is written here names its targets without them.
//! - An entry of a list MAY match nothing in the model, as long as something is a target: files are
//!   made for several kinds of model, and the tensors MUST fit the targets one to one.
//! - Adapter tensors are written as f32; f16 and bf16 MAY be read.
//! - The metadata holds `format` = `pt`, and MAY hold `base_fingerprint`, which PEFT ignores.
//!
//! Source: files that PEFT 0.21.2 wrote.

mod checkpoint;
mod config;
mod fingerprint;
mod keys;
mod load;
mod meant;
mod save;

pub use checkpoint::{MergeOptions, merge_checkpoint, merge_checkpoint_with};
pub use config::{AdapterInfo, read_adapter_config, read_adapter_info};
pub(crate) use load::read_tensor;
pub use load::{LoadOptions, LoadReport, load_adapter, load_adapter_with, read_adapter};
pub(crate) use save::{NamedBytes, adapter_files, check_unmixed, safetensors_file, to_host};
pub use save::{save_adapter, write_file, write_folder, write_folder_with};

pub(crate) const CONFIG_FILE: &str = "adapter_config.json";
const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// What PEFT wrote before, which can hold programs and is not read.
const PICKLE_FILE: &str = "adapter_model.bin";

/// The metadata entry that says over which weights the adapter was made.
const FINGERPRINT: &str = "base_fingerprint";
