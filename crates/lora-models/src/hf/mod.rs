//! Hugging Face folders: `config.json`, `model.safetensors`, `tokenizer.json`.

mod config;
mod generation;
mod safetensors;
mod save;

pub use config::{config_to_json, read_config};
pub use generation::GenerationConfig;
pub use safetensors::SafetensorsFile;
pub use save::{SaveDtype, save_folder};

pub(crate) const CONFIG_FILE: &str = "config.json";
pub(crate) const GENERATION_CONFIG_FILE: &str = "generation_config.json";
pub(crate) const SHARDS_FILE: &str = "model.safetensors.index.json";
pub(crate) const WEIGHTS_FILE: &str = "model.safetensors";
