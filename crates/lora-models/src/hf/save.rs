//! A decoder out to a Hugging Face folder.

use std::collections::HashMap;
use std::path::Path;

use lora_core::{VisitLora, write_folder};
use safetensors::tensor::{Dtype, TensorView};

use super::{CONFIG_FILE, WEIGHTS_FILE, config_to_json};
use crate::decoder::Decoder;
use crate::error::{ErrorKind, Result};

/// The type in which weights are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SaveDtype {
    /// 4 bytes a value, exact.
    F32,
    /// 2 bytes a value, 11 bits of precision, at most 65,504.
    F16,
    /// 2 bytes a value, 8 bits of precision, the range of f32.
    BF16,
}

impl SaveDtype {
    fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
        }
    }

    fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::BF16 => Dtype::BF16,
        }
    }

    fn bytes(self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            Self::F16 => {
                values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect()
            }
            Self::BF16 => {
                values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect()
            }
        }
    }
}

/// Writes `config.json`, `model.safetensors` and `others` (names and contents: the tokenizer's files)
/// as a new folder, complete or not at all. Adapters must be merged first.
///
/// # Errors
/// When a layer has an adapter that is not merged, or the folder exists already or cannot be written.
pub fn save_folder(
    decoder: &Decoder,
    folder: impl AsRef<Path>,
    dtype: SaveDtype,
    others: &[(&str, &[u8])],
) -> Result<()> {
    let mut beside = None;
    decoder.visit_lora("", &mut |path, layer| {
        if layer.plain_weights().is_none() {
            beside.get_or_insert_with(|| path.to_owned());
        }
    });
    if let Some(path) = beside {
        return Err(ErrorKind::Argument {
            what: "model",
            expected: "merged adapters, since a model's folder holds none".to_owned(),
            found: format!("an adapter that is not merged on {path}; merge the model first"),
        }
        .into());
    }

    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = decoder
        .named_tensors()
        .map(|(name, tensor)| (name, tensor.shape, dtype.bytes(&tensor.data)))
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view = TensorView::new(dtype.dtype(), shape.clone(), bytes);
        (name, view.expect("the bytes were made for the shape"))
    });
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let weights = safetensors::serialize(views, Some(metadata))
        .expect("names are distinct and lengths fit their shapes");
    let config =
        serde_json::to_string_pretty(&config_to_json(&decoder.saved_config(), dtype.name()))
            .expect("a value of strings and numbers is always JSON");

    let mut files: Vec<(&str, &[u8])> =
        vec![(WEIGHTS_FILE, &weights), (CONFIG_FILE, config.as_bytes())];
    files.extend(others);
    Ok(write_folder(folder.as_ref(), &files)?)
}
