//! Hugging Face folders: `config.json`, `model.safetensors` or its shards, `tokenizer.json`.

mod config;
mod generation;
mod safetensors;
mod save;
mod shards;

use std::path::Path;

pub use config::{config_to_json, read_config};
pub use generation::GenerationConfig;
pub use safetensors::SafetensorsFile;
pub use save::{SaveOptions, save_folder, save_folder_with};
pub use shards::SafetensorsShards;

use crate::error::Result;
use crate::weights::WeightSource;

pub(crate) const CONFIG_FILE: &str = "config.json";
pub(crate) const GENERATION_CONFIG_FILE: &str = "generation_config.json";
pub(crate) const SHARDS_FILE: &str = "model.safetensors.index.json";
pub(crate) const WEIGHTS_FILE: &str = "model.safetensors";

/// Opens the weights of a folder, in one file or in shards; one file wins where there are both, as in
/// transformers.
///
/// # Errors
/// As [`SafetensorsFile::open`] and [`SafetensorsShards::open`].
pub fn open_weights(folder: impl AsRef<Path>) -> Result<Box<dyn WeightSource>> {
    let folder = folder.as_ref();
    let file = folder.join(WEIGHTS_FILE);
    Ok(match file.exists() || !folder.join(SHARDS_FILE).exists() {
        true => Box::new(SafetensorsFile::open(file)?),
        false => Box::new(SafetensorsShards::open(folder)?),
    })
}
