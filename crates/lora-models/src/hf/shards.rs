//! Weights in several files, and the index that lists them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::SHARDS_FILE;
use super::config::read_text;
use super::safetensors::SafetensorsFile;
use crate::error::{Error, Result};
use crate::weights::{HostTensor, WeightDtype, WeightSource};

/// The shards of a model, as `model.safetensors.index.json` lists them.
#[derive(Debug)]
pub struct SafetensorsShards {
    index: PathBuf,
    files: Vec<SafetensorsFile>,
    /// The file of each tensor.
    places: BTreeMap<String, usize>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl SafetensorsShards {
    /// Opens the index of `folder` and every file that it names.
    ///
    /// # Errors
    /// When the index or a file is missing or damaged, the index names a file outside the folder, or index
    /// and files disagree about which tensor is where.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let index = folder.join(SHARDS_FILE);
        let expected = "an object with weight_map, from tensors to files";
        let text = read_text(&index, expected)?;
        let Index { weight_map } = serde_json::from_str(&text).map_err(|source| {
            Error::malformed(&index, "the file", expected, format!("an error: {source}"))
        })?;

        let mut names: Vec<&String> = weight_map.values().collect();
        names.sort_unstable();
        names.dedup();
        let mut files = Vec::new();
        for name in &names {
            // A file of an index that someone else wrote must not lead out of the folder, nor write on a
            // terminal from the path in a message.
            let is_outside = Path::new(name).file_name().is_none_or(|file| file != name.as_str());
            if is_outside || name.contains(char::is_control) {
                let expected = "the names of files beside the index";
                return Err(Error::malformed(&index, "weight_map", expected, format!("'{name}'")));
            }
            files.push(SafetensorsFile::open(folder.join(name))?);
        }
        let places: BTreeMap<String, usize> = weight_map
            .iter()
            .map(|(tensor, file)| {
                (tensor.clone(), names.binary_search(&file).expect("all files were collected"))
            })
            .collect();
        let opened = Self { index, files, places };
        opened.compare()?;
        Ok(opened)
    }

    /// Names every tensor about whose place the index and the files disagree.
    fn compare(&self) -> Result<()> {
        let name_of = |file: &SafetensorsFile| {
            file.path().file_name().unwrap_or_default().to_string_lossy().into_owned()
        };
        let mut problems = Vec::new();
        for (tensor, file) in &self.places {
            if self.files[*file].shape(tensor).is_none() {
                let file = name_of(&self.files[*file]);
                problems.push(format!("'{tensor}' is not in {file}, where the index has it"));
            }
        }
        for (number, file) in self.files.iter().enumerate() {
            for tensor in file.names() {
                if self.places.get(&tensor) != Some(&number) {
                    problems.push(format!("'{tensor}' is in {}, unlike the index", name_of(file)));
                }
            }
        }
        match problems.is_empty() {
            true => Ok(()),
            false => Err(Error::weights(&self.index, problems)),
        }
    }
}

impl WeightSource for SafetensorsShards {
    fn path(&self) -> &Path {
        &self.index
    }

    fn names(&self) -> Vec<String> {
        self.places.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.files[*self.places.get(name)?].shape(name)
    }

    fn read_as(&self, name: &str, dtype: WeightDtype) -> Result<HostTensor> {
        match self.places.get(name) {
            Some(file) => self.files[*file].read_as(name, dtype),
            None => {
                let place = format!("tensor '{name}'");
                Err(Error::malformed(&self.index, place, "a tensor", "no such tensor"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use safetensors::tensor::{Dtype, TensorView};

    /// A folder with two shards, `a` in the first and `b` in the second, and this index.
    fn folder(index: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (file, tensor, value) in [("1.safetensors", "a", 1.0_f32), ("2.safetensors", "b", 2.0)]
        {
            let bytes = value.to_le_bytes();
            let view = TensorView::new(Dtype::F32, vec![1], &bytes).unwrap();
            let bytes = safetensors::serialize([(tensor, view)], None).unwrap();
            fs::write(folder.path().join(file), bytes).unwrap();
        }
        fs::write(folder.path().join(SHARDS_FILE), index).unwrap();
        folder
    }

    const GOOD: &str = r#"{"metadata": {"total_size": 8},
        "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#;

    #[track_caller]
    fn refused(index: &str, part: &str) {
        let error = SafetensorsShards::open(folder(index).path()).unwrap_err().to_string();
        assert!(error.contains(part), "'{part}' in: {error}");
    }

    #[test]
    fn tensors_come_from_their_files() {
        let folder = folder(GOOD);
        let shards = SafetensorsShards::open(folder.path()).unwrap();
        assert_eq!(shards.names(), ["a", "b"]);
        assert_eq!(shards.shape("b"), Some(vec![1]));
        let read = |name| shards.read(name).map(|tensor| tensor.values.to_f32());
        assert_eq!((read("a").unwrap(), read("b").unwrap()), (vec![1.0], vec![2.0]));
        assert!(read("c").is_err());
    }

    #[test]
    fn an_index_that_is_wrong_is_named() {
        refused("", "an object with weight_map");
        refused("{}", "missing field `weight_map`");
        refused(r#"{"weight_map": {"a": 1}}"#, "weight_map, from tensors to files");
        refused(r#"{"weight_map": {"a": "1.safetensors", "b": "3.safetensors"}}"#, "3.safetensors");
        for outside in ["../1.safetensors", "/1.safetensors", "x/1.safetensors", "..", "", "\\n"] {
            let index = format!(r#"{{"weight_map": {{"a": "{outside}"}}}}"#);
            refused(&index, "the names of files beside the index");
        }
    }

    #[test]
    fn an_index_and_files_that_disagree_are_told_at_once() {
        let swapped = r#"{"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}}"#;
        refused(swapped, "'a' is not in 2.safetensors");
        refused(swapped, "'b' is in 2.safetensors, unlike the index");
        let more =
            r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"}}"#;
        refused(more, "'c' is not in 2.safetensors");
    }

    #[test]
    fn a_truncated_shard_is_an_error() {
        let folder = folder(GOOD);
        let shard = folder.path().join("2.safetensors");
        let bytes = fs::read(&shard).unwrap();
        fs::write(&shard, &bytes[..bytes.len() - 1]).unwrap();
        let error = SafetensorsShards::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("2.safetensors") && error.contains("complete"), "{error}");
    }
}
