//! A decoder out to a Hugging Face folder.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::path::Path;

use lora_core::{VisitLora, write_folder_with};
use safetensors::tensor::{Dtype, View};
use serde_json::json;

use super::{CONFIG_FILE, SHARDS_FILE, WEIGHTS_FILE, config_to_json};
use crate::decoder::Decoder;
use crate::error::{Error, ErrorKind, Result};
use crate::load::NamedTensors;
use crate::weights::WeightDtype;

/// How a folder is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SaveOptions {
    /// The type of the weights in the file.
    pub dtype: WeightDtype,
    /// Bytes of weights in one file; a larger model gets several files and an index. A tensor is never
    /// split, so that one that is larger has a file of its own.
    pub max_shard_bytes: u64,
}

impl Default for SaveOptions {
    /// f32, in files of 5 GB.
    fn default() -> Self {
        Self { dtype: WeightDtype::F32, max_shard_bytes: 5_000_000_000 }
    }
}

/// Writes `config.json`, `model.safetensors` and `others` (names and contents: the tokenizer's files)
/// as a new folder, complete or not at all. Adapters must be merged first.
///
/// # Errors
/// As [`save_folder_with`].
pub fn save_folder(
    decoder: &Decoder,
    folder: impl AsRef<Path>,
    dtype: WeightDtype,
    others: &[(&str, &[u8])],
) -> Result<()> {
    save_folder_with(decoder, folder, &SaveOptions { dtype, ..SaveOptions::default() }, others)
}

/// The same, sharded as `options` say. One tensor after the other is converted and written.
///
/// # Errors
/// When a layer has an adapter that is not merged, a value does not fit the type asked for, no
/// `config.json` can describe the decoder, or the folder exists already or cannot be written.
pub fn save_folder_with(
    decoder: &Decoder,
    folder: impl AsRef<Path>,
    options: &SaveOptions,
    others: &[(&str, &[u8])],
) -> Result<()> {
    check_merged(decoder)?;
    let config = decoder.saved_config();
    let json = serde_json::to_string_pretty(&config_to_json(&config, options.dtype)?)
        .expect("a value of strings and numbers is always JSON");
    let shards = shards(config.tensor_shapes(), options);
    let tensors = NamedTensors::of(decoder);

    write_folder_with(folder.as_ref(), |folder| {
        let write = |name: &str, bytes: &[u8]| {
            let path = folder.join(name);
            std::fs::write(&path, bytes)
                .and_then(|()| File::open(&path)?.sync_all())
                .map_err(|source| Error::io(&path, source))
        };
        for (name, shard) in &shards {
            write_shard(&folder.join(name), shard, &tensors, options.dtype)?;
        }
        if shards.len() > 1 {
            write(SHARDS_FILE, index(&shards, options.dtype).as_bytes())?;
        }
        write(CONFIG_FILE, json.as_bytes())?;
        others.iter().try_for_each(|(name, bytes)| write(name, bytes))
    })
}

fn check_merged(decoder: &Decoder) -> Result<()> {
    let mut beside = None;
    decoder.visit_lora("", &mut |path, layer| {
        if layer.plain_weights().is_none() {
            beside.get_or_insert_with(|| path.to_owned());
        }
    });
    match beside {
        None => Ok(()),
        Some(path) => Err(ErrorKind::Argument {
            what: "model",
            expected: "merged adapters, since a model's folder holds none".to_owned(),
            found: format!("an adapter that is not merged on {path}; merge the model first"),
        }
        .into()),
    }
}

type Shard = Vec<(String, Vec<usize>)>;

/// The tensors of each file, and the file's name.
fn shards(shapes: Vec<(String, Vec<usize>)>, options: &SaveOptions) -> Vec<(String, Shard)> {
    let mut shards: Vec<Shard> = vec![Vec::new()];
    let mut filled = 0;
    for (name, shape) in shapes {
        let bytes = n_bytes(&shape, options.dtype) as u64;
        let last = shards.last_mut().expect("there is one from the start");
        if !last.is_empty() && filled + bytes > options.max_shard_bytes {
            shards.push(vec![(name, shape)]);
            filled = bytes;
        } else {
            last.push((name, shape));
            filled += bytes;
        }
    }
    if let [_] = &shards[..] {
        return shards.into_iter().map(|shard| (WEIGHTS_FILE.to_owned(), shard)).collect();
    }
    let count = shards.len();
    let name = |number| format!("model-{number:05}-of-{count:05}.safetensors");
    (1..).zip(shards).map(|(number, shard)| (name(number), shard)).collect()
}

fn n_bytes(shape: &[usize], dtype: WeightDtype) -> usize {
    shape.iter().product::<usize>() * dtype.size()
}

fn index(shards: &[(String, Shard)], dtype: WeightDtype) -> String {
    let total: usize =
        shards.iter().flat_map(|(_, shard)| shard).map(|(_, shape)| n_bytes(shape, dtype)).sum();
    let places: serde_json::Map<String, serde_json::Value> = shards
        .iter()
        .flat_map(|(file, shard)| {
            shard.iter().map(|(tensor, _)| (tensor.clone(), file.as_str().into()))
        })
        .collect();
    let index = json!({"metadata": {"total_size": total}, "weight_map": places});
    serde_json::to_string_pretty(&index).expect("a value of strings and numbers is always JSON")
}

/// A tensor that is converted when its turn to be written comes.
struct Lazy<'a> {
    tensors: &'a NamedTensors<'a>,
    name: &'a str,
    shape: &'a [usize],
    dtype: WeightDtype,
    /// The first tensor that is not finite in the file, and whether it was before.
    unfit: &'a RefCell<Option<(String, bool)>>,
}

impl View for Lazy<'_> {
    fn dtype(&self) -> Dtype {
        match self.dtype {
            WeightDtype::F32 => Dtype::F32,
            WeightDtype::F16 => Dtype::F16,
            WeightDtype::BF16 => Dtype::BF16,
        }
    }

    fn shape(&self) -> &[usize] {
        self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let original = self.tensors.values(self.name);
        let was_finite = original.is_finite();
        let values = original.cast(self.dtype);
        if !values.is_finite() {
            self.unfit.borrow_mut().get_or_insert_with(|| (self.name.to_owned(), was_finite));
        }
        values.to_le_bytes().into()
    }

    fn data_len(&self) -> usize {
        n_bytes(self.shape, self.dtype)
    }
}

fn write_shard(
    path: &Path,
    shard: &Shard,
    tensors: &NamedTensors<'_>,
    dtype: WeightDtype,
) -> Result<()> {
    let unfit = RefCell::new(None);
    let views = shard
        .iter()
        .map(|(name, shape)| (name, Lazy { tensors, name, shape, dtype, unfit: &unfit }));
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(views, Some(metadata), path)
        .map_err(std::io::Error::other)
        .and_then(|()| File::open(path)?.sync_all())
        .map_err(|source| Error::io(path, source))?;
    let (what, expected, found) = match unfit.into_inner() {
        None => return Ok(()),
        Some((name, true)) => (
            "dtype",
            format!("a type that holds every value of '{name}'"),
            format!("{}; choose bfloat16 or float32", dtype.torch_name()),
        ),
        Some((name, false)) => {
            ("model", format!("finite values in '{name}'"), "NaN or infinity".to_owned())
        }
    };
    Err(ErrorKind::Argument { what, expected, found }.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_filled_in_order_and_no_tensor_is_split() {
        let shapes =
            || [("a", 4), ("b", 2), ("c", 9), ("d", 1)].map(|(n, len)| (n.to_owned(), vec![len]));
        let names = |max_shard_bytes| {
            let options = SaveOptions { dtype: WeightDtype::F16, max_shard_bytes };
            let shards = shards(shapes().to_vec(), &options);
            let tensors =
                |shard: &Shard| shard.iter().map(|(name, _)| name.as_str()).collect::<String>();
            shards.iter().map(|(file, shard)| (file.clone(), tensors(shard))).collect::<Vec<_>>()
        };
        let pair = |file: &str, tensors: &str| (file.to_owned(), tensors.to_owned());
        assert_eq!(names(1000), [pair("model.safetensors", "abcd")]);
        assert_eq!(
            names(12),
            [
                pair("model-00001-of-00003.safetensors", "ab"),
                pair("model-00002-of-00003.safetensors", "c"),
                pair("model-00003-of-00003.safetensors", "d"),
            ]
        );
        assert_eq!(names(0).len(), 4);
        let options = SaveOptions { dtype: WeightDtype::F16, max_shard_bytes: 12 };
        let index = index(&super::shards(shapes().to_vec(), &options), WeightDtype::F16);
        let index: serde_json::Value = serde_json::from_str(&index).unwrap();
        assert_eq!(index["metadata"]["total_size"], 32);
        assert_eq!(index["weight_map"]["d"], "model-00003-of-00003.safetensors");
    }
}
