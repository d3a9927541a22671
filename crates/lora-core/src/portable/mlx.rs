//! mlx-lm's adapter format, out and in.
//!
//! A folder holds `adapter_config.json` and `adapters.safetensors`.
//!
//! - A tensor's key is `<module path>.lora_a`, `[d_input, rank]`, or `<module path>.lora_b`,
//!   `[rank, d_output]`: this library's own layout.
//! - The config holds `fine_tune_type` (`"lora"`; MAY be absent), `num_layers` and `lora_parameters`
//!   with `rank`, `scale`, `dropout` and `keys`. `scale` is the factor itself.
//! - `keys` MUST name the adapted modules: mlx-lm adapts every module that `keys` names inside the last
//!   `num_layers` blocks (names within a block) and in the whole model (whole paths), with one rank
//!   and one scale, and then refuses a tensor for which there is no such module or another shape.
//!
//! Source: mlx-lm 0.32.2, `tuner/utils.py` (`load_adapters`, `linear_to_lora_layers`) and
//! `tuner/lora.py` (`LoRALinear`, `LoRAEmbedding`).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::Path;

use burn::tensor::{Tensor, TensorData};
use safetensors::SafeTensors;
use serde_json::{Map, Value, json};

use super::rules::{Reader, check_written_for};
use super::save::plain_ranks;
use crate::adapter::{LoraAdapter, adapter_dtype};
use crate::error::{Error, ErrorKind, Result};
use crate::layer::Adaptation;
use crate::peft::{AdapterInfo, NamedBytes, read_tensor, safetensors_file, to_host, write_folder};
use crate::scaling::Scaling;
use crate::set::AdapterSet;
use crate::visit::VisitLora;

/// Where [`save_portable`](crate::save_portable) puts these files.
pub(super) const MLX_FOLDER: &str = "mlx";
const CONFIG_FILE: &str = "adapter_config.json";
const WEIGHTS_FILE: &str = "adapters.safetensors";

/// Writes the model's adapters as a new folder in mlx-lm's format, to be used as its `--adapter-path`.
///
/// Scalings are folded into B in f32 and ranks are padded to the largest with zeros, since the format
/// has one of each; `scale` is 1. The layers' paths must be those of mlx-lm's model, which for Llama and
/// Qwen are Hugging Face's.
///
/// # Errors
/// [`ErrorKind::NotPortable`] where the adapters cannot be expressed; as
/// [`save_adapter`](crate::save_adapter) besides. Nothing is written then.
pub fn save_mlx_adapter<M: VisitLora>(
    model: &M,
    folder: impl AsRef<Path>,
    info: &AdapterInfo,
) -> Result<()> {
    let files = mlx_files(model, info)?;
    let files: Vec<(&str, &[u8])> =
        files.iter().map(|(name, bytes)| (*name, bytes.as_slice())).collect();
    write_folder(folder.as_ref(), &files)
}

pub(super) fn mlx_files<M: VisitLora>(
    model: &M,
    info: &AdapterInfo,
) -> Result<[(&'static str, Vec<u8>); 2]> {
    check_written_for(model, &[Reader::Mlx])?;
    let Some(rank) = plain_ranks(model).into_iter().max() else {
        return Err(Error::setting("adapter", "a model with adapters", "a model without"));
    };
    let (mut tensors, mut failure) = (Vec::<NamedBytes>::new(), None);
    let (mut paths, mut adapted) = (Vec::new(), Vec::new());
    model.visit_lora("", &mut |path, layer| {
        paths.push(path.to_owned());
        let Some(Adaptation::LowRank(adapter)) = layer.adaptation() else { return };
        adapted.push(path.to_owned());
        match adapter.into_folded(rank) {
            Ok(adapter) => {
                for (name, factor) in [("lora_a", &adapter.lora_a), ("lora_b", &adapter.lora_b)] {
                    let values = to_host(factor.val());
                    if values.iter().any(|value| !value.is_finite()) {
                        let path = path.to_owned();
                        failure.get_or_insert_with(|| ErrorKind::NonFiniteAdapter { path }.into());
                    }
                    let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                    tensors.push((format!("{path}.{name}"), factor.dims().to_vec(), bytes));
                }
            }
            Err(error) => {
                failure.get_or_insert_with(|| error.at(path));
            }
        }
    });
    if let Some(error) = failure {
        return Err(error);
    }
    let (num_layers, keys) = keys(&paths, &adapted);
    let config = json!({
        "model": info.base_model,
        "fine_tune_type": "lora",
        "num_layers": num_layers,
        "lora_parameters": { "rank": rank, "scale": 1.0, "dropout": 0.0, "keys": keys },
    });
    let config = serde_json::to_string_pretty(&config)
        .expect("a value of strings and finite numbers is always JSON");
    let metadata = HashMap::from([("format".to_owned(), "mlx".to_owned())]);
    let weights = safetensors_file(&tensors, metadata);
    Ok([(CONFIG_FILE, config.into_bytes()), (WEIGHTS_FILE, weights)])
}

/// The number of blocks and the names in them where the last blocks are adapted alike, as mlx-lm writes
/// it; all blocks and whole paths elsewhere.
fn keys(paths: &[String], adapted: &[String]) -> (usize, Vec<String>) {
    let in_lists = || paths.iter().filter_map(|path| block(path));
    let lists: BTreeSet<&str> = in_lists().map(|(list, ..)| list).collect();
    let blocks = in_lists().map(|(_, index, _)| index + 1).max().unwrap_or_default();
    let mut by_block: BTreeMap<usize, BTreeSet<&str>> = BTreeMap::new();
    let mut outside = BTreeSet::new();
    for path in adapted {
        match block(path) {
            Some((_, index, name)) => {
                by_block.entry(index).or_default().insert(name);
            }
            None => {
                outside.insert(path.as_str());
            }
        }
    }
    let first = by_block.values().next().cloned().unwrap_or_default();
    let are_last = by_block.keys().rev().zip((0..blocks).rev()).all(|(index, last)| *index == last);
    let owned = |names: BTreeSet<&str>| names.into_iter().map(str::to_owned).collect();
    // Of several lists, as of a model with an image encoder, names do not say which.
    if lists.len() == 1
        && are_last
        && !first.is_empty()
        && by_block.values().all(|names| *names == first)
    {
        return (by_block.len(), owned(&first | &outside));
    }
    (blocks, owned(adapted.iter().map(String::as_str).collect()))
}

/// The list of a block, its index and the name within it: `model.`, 3 and `self_attn.q_proj` of
/// `model.layers.3.self_attn.q_proj`.
fn block(path: &str) -> Option<(&str, usize, &str)> {
    let (list, rest) = path.split_once("layers.")?;
    let (index, name) = rest.split_once('.')?;
    Some((list, index.parse().ok()?, name))
}

/// Reads an adapter's folder that mlx-lm or [`save_mlx_adapter`] wrote, for the model, without putting
/// it on ([`AdapterSet::attach`] does).
///
/// # Errors
/// When a file cannot be read or is damaged; when the adapter is no LoRA (`dora`, `full`); when a tensor
/// belongs to no layer of the model, lacks its other half, has another shape or is not finite (all of
/// them are named).
pub fn read_mlx_adapter<M: VisitLora>(model: &M, folder: impl AsRef<Path>) -> Result<AdapterSet> {
    let folder = folder.as_ref();
    let (rank, scale) = read_parameters(&folder.join(CONFIG_FILE))?;
    let path = folder.join(WEIGHTS_FILE);
    let bytes = fs::read(&path).map_err(|source| Error::io(&path, source))?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|source| {
        Error::malformed(&path, "the file", "a safetensors file", format!("an error: {source}"))
    })?;
    let mut left: BTreeSet<&str> = tensors.names().into_iter().collect();
    let (mut entries, mut problems, mut failure) = (Vec::new(), Vec::new(), None);
    model.visit_lora("", &mut |layer_path, layer| {
        let keys = ["lora_a", "lora_b"].map(|factor| format!("{layer_path}.{factor}"));
        let found = keys.each_ref().map(|key| left.remove(key.as_str()));
        if found == [false, false] {
            return;
        }
        let weight = layer.weight();
        let [d_input, d_output] = [weight.dims()[0] * layer.groups(), weight.dims()[1]];
        let mut read = |key: &str, shape: [usize; 2]| {
            read_tensor(&tensors, key, &shape).map_err(|problem| problems.push(problem)).ok()
        };
        let a = read(&keys[0], [d_input, rank]);
        let b = read(&keys[1], [rank, d_output]);
        let (Some(a), Some(b)) = (a, b) else { return };
        let adapter = adapter_dtype(weight.dtype(), None).and_then(|dtype| {
            let options = (&weight.device(), dtype);
            let a = Tensor::from_data(TensorData::new(a, [d_input, rank]), options);
            let b = Tensor::from_data(TensorData::new(b, [rank, d_output]), options);
            LoraAdapter::from_tensors(a, b, scale * rank as f64, Scaling::AlphaOverRank)
        });
        match adapter {
            Ok(adapter) => entries.push((layer_path.to_owned(), adapter)),
            Err(error) => failure = failure.take().or(Some(error.at(layer_path))),
        }
    });
    problems.extend(left.into_iter().map(|key| format!("{key} belongs to no layer of the model")));
    if !problems.is_empty() {
        return Err(ErrorKind::AdapterMismatch { path: folder.to_owned(), problems }.into());
    }
    failure.map_or_else(|| Ok(AdapterSet::from_adapters(entries)), Err)
}

/// Rank and scale.
fn read_parameters(path: &Path) -> Result<(usize, f64)> {
    let text = fs::read_to_string(path).map_err(|source| Error::io(path, source))?;
    let fields: Map<String, Value> = serde_json::from_str(&text).map_err(|source| {
        Error::malformed(path, "the file", "a JSON object", format!("an error: {source}"))
    })?;
    let kind = fields.get("fine_tune_type").unwrap_or(&Value::Null);
    if !kind.is_null() && kind != "lora" {
        return Err(ErrorKind::UnsupportedField {
            path: path.to_owned(),
            field: "fine_tune_type".to_owned(),
            found: kind.to_string(),
            supported: "\"lora\" is".to_owned(),
        }
        .into());
    }
    let parameter = |name| fields.get("lora_parameters").and_then(|inner| inner.get(name));
    let malformed = |name: &str, expected: &str, found: Option<&Value>| {
        let found = found.map_or("nothing".to_owned(), Value::to_string);
        Error::malformed(path, format!("lora_parameters.{name}"), expected, found)
    };
    let rank = parameter("rank");
    let rank = rank
        .and_then(Value::as_u64)
        .filter(|rank| *rank > 0)
        .ok_or_else(|| malformed("rank", "a whole number of at least 1", rank))?;
    let scale = parameter("scale");
    let scale =
        scale.and_then(Value::as_f64).ok_or_else(|| malformed("scale", "a number", scale))?;
    Ok((rank as usize, scale))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn last_blocks_that_are_alike_are_named_once() {
        let paths = names(&[
            "e",
            "model.layers.0.q",
            "model.layers.0.k",
            "model.layers.1.q",
            "model.layers.1.k",
            "lm_head",
        ]);
        for (adapted, expected) in [
            (&["model.layers.0.q", "model.layers.1.q"][..], (2, &["q"][..])),
            (&["model.layers.1.q", "model.layers.1.k", "lm_head"], (1, &["k", "lm_head", "q"])),
            (&["model.layers.0.q"], (2, &["model.layers.0.q"])),
            (
                &["model.layers.0.q", "model.layers.1.k"],
                (2, &["model.layers.0.q", "model.layers.1.k"]),
            ),
            (&["lm_head"], (2, &["lm_head"])),
        ] {
            let found = keys(&paths, &names(adapted));
            assert_eq!(found, (expected.0, names(expected.1)), "{adapted:?}");
        }
        let two = names(&["model.layers.0.q", "vision.layers.0.q"]);
        assert_eq!(keys(&two, &two[1..]), (1, names(&["vision.layers.0.q"])));
    }
}
