//! Writing an adapter's folder, whole or not at all.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use burn::tensor::{DType, Tensor};
use safetensors::tensor::{Dtype, TensorView};

use super::config::{AdapterInfo, to_json};
use super::keys::{Factor, key};
use super::{CONFIG_FILE, WEIGHTS_FILE};
use crate::adapter::LoraAdapter;
use crate::config::LoraConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::target::TargetModules;
use crate::visit::VisitLora;

/// Writes the model's adapters, and nothing else of the model, as a new folder in PEFT's format.
///
/// Rank, alpha and targets are read off the adapters themselves, so that the config cannot disagree
/// with the tensors. The folder is written under another name beside it and renamed when it is
/// complete.
///
/// # Errors
/// When the folder exists already or cannot be written; when A or B holds NaN or infinity; when the model has no adapter, or adapters
/// with both scaling rules, which the format cannot express.
pub fn save_adapter<M: VisitLora>(
    model: &M,
    folder: impl AsRef<Path>,
    info: &AdapterInfo,
) -> Result<()> {
    let folder = folder.as_ref();
    let config = describe(model)?;
    let json = serde_json::to_string_pretty(&to_json(&config, info))
        .expect("a value of strings and finite numbers is always JSON");
    let tensors = tensors(model)?;
    let views = tensors.iter().map(|(key, shape, bytes)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes);
        (key, view.expect("the bytes were made for the shape"))
    });
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let weights = safetensors::serialize(views, Some(metadata))
        .expect("keys are distinct and lengths fit their shapes");
    write_folder(folder, &[(CONFIG_FILE, json.as_bytes()), (WEIGHTS_FILE, &weights)])
}

/// The config that describes the adapters that the model has.
fn describe<M: VisitLora>(model: &M) -> Result<LoraConfig> {
    let mut layers: Vec<(String, Option<&LoraAdapter>)> = Vec::new();
    model.visit_lora("", &mut |path, layer| {
        layers.push((path.to_owned(), layer.adapter()));
    });
    let adapted: Vec<(&str, &LoraAdapter)> =
        layers.iter().filter_map(|(path, adapter)| Some((path.as_str(), (*adapter)?))).collect();
    let Some((_, first)) = adapted.first() else {
        return Err(Error::setting("adapter", "a model with adapters", "a model without"));
    };
    if adapted.iter().any(|(_, adapter)| adapter.scaling_rule() != first.scaling_rule()) {
        return Err(Error::setting("scaling", "one rule for all layers", "two rules"));
    }

    let mut config = LoraConfig::new(
        most_common(adapted.iter().map(|(_, adapter)| adapter.rank())),
        most_common(adapted.iter().map(|(_, adapter)| adapter.alpha())),
    );
    config.scaling = first.scaling_rule();
    // A pattern's key is a regular expression for the end of the path; this one means one path only.
    let exactly = |path: &str| format!("^{}", path.replace('.', r"\."));
    for (path, adapter) in &adapted {
        if adapter.rank() != config.rank {
            config.rank_pattern.push((exactly(path), adapter.rank()));
        }
        if adapter.alpha() != config.alpha {
            config.alpha_pattern.push((exactly(path), adapter.alpha()));
        }
    }
    config.target_modules = TargetModules::Names(target_names(&layers));
    Ok(config)
}

/// The last names of the adapted layers where every layer of that name is adapted, whole paths
/// elsewhere.
fn target_names(layers: &[(String, Option<&LoraAdapter>)]) -> Vec<String> {
    let last = |path: &str| path.rsplit('.').next().unwrap_or(path).to_owned();
    let mut names = Vec::new();
    for (path, _) in layers.iter().filter(|(_, adapter)| adapter.is_some()) {
        let whole =
            layers.iter().all(|(other, adapter)| last(other) != last(path) || adapter.is_some());
        let name = if whole { last(path) } else { path.clone() };
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

fn most_common<T: PartialEq + Copy>(values: impl Iterator<Item = T> + Clone) -> T {
    let count = |value: T| values.clone().filter(|other| *other == value).count();
    let mut best: Option<(T, usize)> = None;
    for value in values.clone() {
        let count = count(value);
        // The first of equals wins, so that the file is the same at every save.
        if best.is_none_or(|(_, most)| count > most) {
            best = Some((value, count));
        }
    }
    best.expect("the caller has at least one adapter").0
}

type NamedBytes = (String, Vec<usize>, Vec<u8>);

fn tensors<M: VisitLora>(model: &M) -> Result<Vec<NamedBytes>> {
    let mut tensors = Vec::new();
    let mut failure = None;
    model.visit_lora("", &mut |path, layer| {
        let Some(adapter) = layer.adapter() else { return };
        for factor in Factor::BOTH {
            let tensor = match factor {
                Factor::A => adapter.lora_a.val(),
                Factor::B => adapter.lora_b.val(),
            };
            let (key, shape, values) = in_torch_layout(key(path, factor), tensor);
            if values.iter().any(|value| !value.is_finite()) {
                failure.get_or_insert_with(|| path.to_owned());
            }
            let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            tensors.push((key, shape, bytes));
        }
    });
    match failure {
        Some(path) => Err(ErrorKind::NonFiniteAdapter { path }.into()),
        None => Ok(tensors),
    }
}

/// `[in, out]` here is `[out, in]` in torch.
fn in_torch_layout(key: String, tensor: Tensor<2>) -> (String, Vec<usize>, Vec<f32>) {
    let tensor = tensor.without_autodiff().cast(DType::F32).transpose();
    let shape = tensor.dims().to_vec();
    let values: Vec<f32> =
        tensor.into_data().try_to_vec().expect("the tensor was just cast to f32");
    (key, shape, values)
}

/// Writes a new folder, all files of it or nothing: into a hidden sibling folder, synced, then renamed.
///
/// # Errors
/// When the folder exists already or cannot be written.
pub fn write_folder(folder: &Path, files: &[(&str, &[u8])]) -> Result<()> {
    if folder.exists() {
        return Err(ErrorKind::Exists { path: folder.to_owned() }.into());
    }
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let sibling = folder.with_file_name(format!(".{name}.{}.tmp", std::process::id()));
    let written = fs::create_dir_all(&sibling)
        .map_err(|source| Error::io(&sibling, source))
        .and_then(|()| files.iter().try_for_each(|(name, bytes)| write(&sibling.join(name), bytes)))
        .and_then(|()| fs::rename(&sibling, folder).map_err(|source| Error::io(folder, source)));
    if written.is_err() {
        // The first failure is what the caller must see; a folder that stays behind is named .tmp.
        let _ = fs::remove_dir_all(&sibling);
    }
    written
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create(path).map_err(|source| Error::io(path, source))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(|source| Error::io(path, source))
}
