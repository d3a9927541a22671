//! Reading an adapter's folder onto a model.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use burn::module::Module;
use burn::tensor::{DType, Device, Tensor, TensorData};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use super::WEIGHTS_FILE;
use super::config::read_adapter_config;
use super::keys::{Factor, key};
use crate::adapter::{LoraAdapter, adapter_dtype};
use crate::config::AdapterConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::inject::{InjectReport, attach, resolve_targets};
use crate::target::Selection;
use crate::visit::VisitLora;

/// Freezes the model and attaches the adapter in `folder`, written by PEFT or by
/// [`save_adapter`](crate::save_adapter).
///
/// # Errors
/// When a file cannot be read or is damaged; when the config asks for something unknown here; when
/// a tensor is missing, unused, of the wrong shape or not finite (all of them are named). All of it
/// is checked before anything is attached.
pub fn load_adapter<M: Module + VisitLora>(
    model: M,
    folder: impl AsRef<Path>,
) -> Result<(M, InjectReport)> {
    let folder = folder.as_ref();
    let config = read_adapter_config(folder)?;
    let targets = resolve_targets(&model, &config, Selection::into_result_for_loading)?;

    let path = folder.join(WEIGHTS_FILE);
    let bytes = fs::read(&path).map_err(|source| Error::io(&path, source))?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|source| {
        Error::malformed(&path, "the file", "a safetensors file", format!("an error: {source}"))
    })?;
    let pairs = match_tensors(&model, &targets, &tensors).map_err(|problems| {
        Error::from(ErrorKind::AdapterMismatch { path: folder.to_owned(), problems })
    })?;

    let mut pairs = pairs.into_iter();
    attach(model, targets, |config, layer| {
        let weight = layer.weight();
        let (device, dtype) = (weight.device(), adapter_dtype(&weight)?);
        let (a, b) = pairs.next().expect("one pair was matched for each target");
        let [a, b] = [a, b].map(|matrix| matrix.into_tensor(&device, dtype));
        Ok(LoraAdapter::from_tensors(a, b, config))
    })
}

/// One matrix in torch's layout.
struct HostMatrix {
    shape: [usize; 2],
    values: Vec<f32>,
}

impl HostMatrix {
    /// Transposed to our layout, once and for all: every forward pass reads it.
    fn into_tensor(self, device: &Device, dtype: DType) -> Tensor<2> {
        let [rows, columns] = self.shape;
        let values: Vec<f32> = (0..columns)
            .flat_map(|column| (0..rows).map(move |row| row * columns + column))
            .map(|index| self.values[index])
            .collect();
        Tensor::from_data(TensorData::new(values, [columns, rows]), (device, dtype))
    }
}

/// A and B for every target, or one line for each tensor that does not fit.
fn match_tensors<M: VisitLora>(
    model: &M,
    targets: &[(String, AdapterConfig)],
    tensors: &SafeTensors<'_>,
) -> Result<Vec<(HostMatrix, HostMatrix)>, Vec<String>> {
    let mut dims = Vec::new();
    let mut wanted = targets.iter().map(|(path, _)| path.as_str()).peekable();
    model.visit_lora("", &mut |path, layer| {
        if wanted.next_if_eq(&path).is_some() {
            dims.push(layer.dims());
        }
    });

    let mut problems = Vec::new();
    let mut unused: BTreeSet<String> =
        tensors.names().iter().map(|name| name.to_string()).collect();
    let mut pairs = Vec::new();
    for ((path, config), [d_input, d_output]) in targets.iter().zip(dims) {
        let mut read = |factor, expected| {
            let key = key(path, factor);
            unused.remove(&key);
            read_matrix(tensors, &key, expected).map_err(|problem| problems.push(problem)).ok()
        };
        let a = read(Factor::A, [config.rank, d_input]);
        let b = read(Factor::B, [d_output, config.rank]);
        pairs.extend(a.zip(b));
    }
    problems
        .extend(unused.iter().map(|key| format!("{key} is in the file, but belongs to no target")));
    if problems.is_empty() { Ok(pairs) } else { Err(problems) }
}

fn read_matrix(
    tensors: &SafeTensors<'_>,
    key: &str,
    shape: [usize; 2],
) -> Result<HostMatrix, String> {
    let tensor = tensors.tensor(key).map_err(|_| format!("{key} is missing"))?;
    if tensor.shape() != shape {
        return Err(format!("{key}: expected shape {shape:?}, found {:?}", tensor.shape()));
    }
    let values = to_f32(&tensor)
        .ok_or_else(|| format!("{key}: expected F32, F16 or BF16, found {:?}", tensor.dtype()))?;
    if values.iter().any(|value| !value.is_finite()) {
        return Err(format!("{key}: expected finite values, found NaN or infinity"));
    }
    Ok(HostMatrix { shape, values })
}

fn to_f32(tensor: &TensorView<'_>) -> Option<Vec<f32>> {
    let (two, _) = tensor.data().as_chunks::<2>();
    Some(match tensor.dtype() {
        Dtype::F32 => {
            let (four, _) = tensor.data().as_chunks::<4>();
            four.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
        }
        Dtype::F16 => two.iter().map(|bytes| half::f16::from_le_bytes(*bytes).to_f32()).collect(),
        Dtype::BF16 => two.iter().map(|bytes| half::bf16::from_le_bytes(*bytes).to_f32()).collect(),
        _ => return None,
    })
}
