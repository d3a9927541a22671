//! The tiny models and adapters under `tests/golden`, and comparisons with what is golden about them.

#![allow(dead_code, reason = "each test program uses some of it")]

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Tensor, TensorData};
use lora_models::{Decoder, SafetensorsFile, WeightDtype, read_config};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Map, Value};
use tempfile::TempDir;

/// Whether the device of the tests has weights of this type; one that it has not must be refused by name.
pub fn has(dtype: WeightDtype) -> bool {
    let dtype = match dtype {
        WeightDtype::F32 => DType::F32,
        WeightDtype::F16 => DType::F16,
        WeightDtype::BF16 => DType::BF16,
    };
    let device = lora_core::device_from_env().unwrap();
    if lora_core::supports_dtype(&device, dtype) {
        return true;
    }
    let error = lora_core::check_dtype(&device, dtype).unwrap_err().to_string();
    assert!(error.contains(&format!("found {}", dtype.name())), "{error}");
    false
}

pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

pub fn decoder(folder: &Path, device: &Device) -> Decoder {
    let weights = SafetensorsFile::open(folder.join("model.safetensors")).unwrap();
    Decoder::from_weights(&read_config(folder).unwrap(), &weights, device).unwrap()
}

pub fn tensor<const BYTES: usize, T>(
    path: &Path,
    name: &str,
    read: fn([u8; BYTES]) -> T,
) -> (Vec<T>, Vec<usize>) {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = file.tensor(name).unwrap();
    let (values, rest) = tensor.data().as_chunks::<BYTES>();
    assert!(rest.is_empty());
    (values.iter().map(|bytes| read(*bytes)).collect(), tensor.shape().to_vec())
}

pub fn logits(decoder: &Decoder, golden: &Path) -> Vec<f32> {
    let (ids, shape) = tensor(golden, "input_ids", i64::from_le_bytes);
    let ids = TensorData::new(ids, [shape[0], shape[1]]);
    let logits = decoder.forward(Tensor::from_data(ids, &decoder.device()));
    logits.into_data().iter::<f32>().collect()
}

/// The largest difference to the golden logits, relative to the largest of them.
pub fn difference(found: &[f32], golden: &Path) -> f32 {
    let (expected, _) = tensor(golden, "logits", f32::from_le_bytes);
    largest_difference(found, &expected)
}

pub fn largest_difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    let differences = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    // `max` would pass over NaN, and so would a comparison with a bound.
    differences.fold(0f32, |worst, one| if one > worst || one.is_nan() { one } else { worst })
        / largest
}

/// The config and the tensors of an adapter, in a folder of their own.
pub fn copy_adapter(name: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(golden(name).join(file), folder.path().join(file)).unwrap();
    }
    folder
}

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct FileTensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// The tensors of an adapter's folder, sorted by name.
pub fn file_tensors(folder: &Path) -> Vec<FileTensor> {
    tensors_of(&folder.join("adapter_model.safetensors"))
}

/// The tensors of a file, sorted by name.
pub fn tensors_of(path: &Path) -> Vec<FileTensor> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<FileTensor> = file
        .tensors()
        .into_iter()
        .map(|(name, view)| FileTensor {
            name,
            dtype: view.dtype(),
            shape: view.shape().to_vec(),
            bytes: view.data().to_vec(),
        })
        .collect();
    tensors.sort_by(|one, other| one.name.cmp(&other.name));
    tensors
}

/// Changes the tensors of an adapter's folder.
pub fn change_tensors(folder: &Path, change: impl FnOnce(&mut Vec<FileTensor>)) {
    let mut tensors = file_tensors(folder);
    change(&mut tensors);
    write_tensors(&folder.join("adapter_model.safetensors"), &tensors);
}

/// Writes a file of these tensors.
pub fn write_tensors(path: &Path, tensors: &[FileTensor]) {
    let views = tensors.iter().map(|tensor| {
        (&tensor.name, TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes).unwrap())
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    fs::write(path, bytes).unwrap();
}

/// Changes the config of an adapter's folder.
pub fn change_config(folder: &Path, change: impl FnOnce(&mut Map<String, Value>)) {
    let path = folder.join("adapter_config.json");
    let mut config = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    change(&mut config);
    fs::write(&path, serde_json::to_string(&config).unwrap()).unwrap();
}
