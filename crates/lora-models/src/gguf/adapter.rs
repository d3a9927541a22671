//! A decoder's adapters as llama.cpp's adapter file, out and in.
//!
//! # Format
//!
//! A GGUF file whose keys are `general.architecture` (the base's), `general.type` = `adapter`,
//! `adapter.type` = `lora` and `adapter.lora.alpha` (f32), with two tensors for each adapted weight,
//! named after it, shapes outermost first:
//!
//! ```text
//! blk.0.attn_q.weight.lora_a   [rank, d_input]       blk.0.attn_q.weight.lora_b   [d_output, rank]
//! token_embd.weight.lora_a     [vocabulary, rank]    token_embd.weight.lora_b     [d_output, rank]
//! ```
//!
//! llama.cpp's factor is alpha / (the tensor's own rank), or 1 for alpha = 0. The rows of `lora_b` of q
//! and k are in the order in which llama.cpp has those of the weight; `lora_a` has no such rows.
//!
//! Source: llama.cpp's `convert_lora_to_gguf.py`, `src/llama-adapter.cpp`, `src/llama-adapter.h`
//! (`get_scale`) and `src/llama-graph.cpp` (`build_inp_embd`), 2026.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{DType, Device, Tensor, TensorData};
use lora_core::{
    AdaptableLayer, Adaptation, AdapterSet, LayerKind, LoraAdapter, Reader, Scaling, VisitLora,
    check_written_for, write_file,
};

use super::names::{self, Naming, Rows};
use super::reader::GgufFile;
use super::weights::{halved_rows, paired_rows};
use super::writer::Writer;
use crate::config::DecoderConfig;
use crate::decoder::Decoder;
use crate::error::{Error, ErrorKind, Result};
use crate::weights::WeightSource;

const ARCHITECTURE: &str = "general.architecture";
const TYPE: &str = "general.type";
const ADAPTER_TYPE: &str = "adapter.type";
const ALPHA: &str = "adapter.lora.alpha";
const ALORA: &str = "adapter.alora.invocation_tokens";
const FILE_TYPE: &str = "general.file_type";
const ALL_F32: u32 = 0;

/// Writes the decoder's adapters, and nothing else of it, as a new file for llama.cpp's `--lora`, in f32.
///
/// The file has one alpha. Where the adapters' factors do not follow from it (rsLoRA, other alphas of some
/// layers), they are folded into B in f32; ranks may differ, since llama.cpp divides by each
/// tensor's own. An adapter with an offset is written in its plain form.
///
/// # Errors
/// When the file exists already or cannot be written; when the decoder has no adapter, one that is not
/// finite, or something that llama.cpp cannot read (DoRA, trained biases, layers or tokens, an embedding
/// that is the head too), with every rule that is broken.
pub fn save_gguf_adapter(decoder: &Decoder, path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    check_written_for(decoder, &[Reader::LlamaCpp])?;
    let mut layers = Vec::new();
    decoder.visit_lora("", &mut |path, layer| {
        if let Some(Adaptation::LowRank(adapter)) = layer.adaptation() {
            layers.push((path.to_owned(), layer.kind(), adapter.into_plain()));
        }
    });
    let Some((_, _, first)) = layers.first() else {
        return Err(argument("adapter", "a decoder with adapters", "one without"));
    };
    // The number that, divided by the first layer's rank, is its factor: the alpha that it was
    // trained with, where the rule is alpha / rank.
    let alpha = match first.scaling_rule() {
        Scaling::AlphaOverRank => first.alpha(),
        Scaling::AlphaOverSqrtRank => first.scaling() * first.rank() as f64,
    };
    let mut writer = Writer::new()
        .key(ARCHITECTURE, architecture(decoder.config())?)
        .key(TYPE, "adapter")
        .key(ADAPTER_TYPE, "lora")
        .key(ALPHA, alpha as f32)
        .key(FILE_TYPE, ALL_F32);
    // The factor as llama.cpp computes it, in f32, from the alpha that it reads.
    let theirs = |rank: usize| f64::from(alpha as f32) / rank as f64;
    for (path, kind, adapter) in &layers {
        let naming = names::llama_cpp(&format!("{path}.weight")).ok_or_else(|| {
            argument("adapter", "adapters on layers that llama.cpp has a name for", path)
        })?;
        let [a, b] = [&adapter.lora_a, &adapter.lora_b]
            .map(|factor| factor.val().without_autodiff().cast(DType::F32));
        let ratio = adapter.scaling() / theirs(adapter.rank());
        let b = if ratio == 1.0 { b } else { b.mul_scalar(ratio) };
        let a = if *kind == LayerKind::Embedding { a } else { a.transpose() };
        let (a, mut b) = (to_host(a), to_host(b.transpose()));
        if a.data.iter().chain(&b.data).any(|value| !value.is_finite()) {
            return Err(argument(
                "adapter",
                "finite values in A and B",
                format!("others at {path}"),
            ));
        }
        if let Some(head_dim) = head_rows(decoder.config(), naming.rows) {
            b.data = paired_rows(&b.data, b.shape[0] as usize, head_dim);
        }
        for (factor, tensor) in [("lora_a", a), ("lora_b", b)] {
            writer = writer.f32s(&format!("{}.{factor}", naming.name), &tensor.shape, &tensor.data);
        }
    }
    Ok(write_file(path, &writer.finish_padded())?)
}

/// Reads an adapter file of llama.cpp's for the decoder, without putting it on
/// ([`AdapterSet::attach`] does).
///
/// # Errors
/// When the file cannot be read or is damaged; when it is no LoRA adapter, one for another architecture, or an aLoRA; when a
/// tensor belongs to no layer of the decoder, lacks its other half, has another shape or is not finite
/// (all of them are named).
pub fn read_gguf_adapter(decoder: &Decoder, path: impl AsRef<Path>) -> Result<AdapterSet> {
    let path = path.as_ref();
    let file = GgufFile::open(path)?;
    let architecture = architecture(decoder.config())?;
    for (key, expected) in [(TYPE, "adapter"), (ADAPTER_TYPE, "lora"), (ARCHITECTURE, architecture)]
    {
        let found = file.required(key, file.string(key)?)?;
        if found != expected {
            return Err(Error::unsupported(path, key, found, expected));
        }
    }
    if file.metadata().contains_key(ALORA) {
        return Err(Error::unsupported(path, ALORA, "an activated LoRA", "LoRA"));
    }
    let alpha = file.required(ALPHA, file.f64(ALPHA)?)?;
    let (mut pairs, mut problems) = (BTreeMap::<Naming, [Option<String>; 2]>::new(), Vec::new());
    for name in file.names() {
        let parts = name.rsplit_once('.').and_then(|(base, factor)| {
            let place = ["lora_a", "lora_b"].iter().position(|known| *known == factor)?;
            Some((names::hugging_face(base)?, place))
        });
        match parts {
            Some((naming, place)) => pairs.entry(naming).or_default()[place] = Some(name),
            None => problems.push(format!("'{name}' is unused")),
        }
    }
    let mut entries = Vec::new();
    decoder.visit_lora("", &mut |layer_path, layer| {
        let weight = format!("{layer_path}.weight");
        let Some(naming) = pairs.keys().find(|naming| naming.name == weight).cloned() else {
            return;
        };
        let pair = pairs.remove(&naming).unwrap_or_default();
        match read_pair(&file, layer, pair, alpha, head_rows(decoder.config(), naming.rows)) {
            Ok(adapter) => entries.push((layer_path.to_owned(), adapter)),
            Err(problem) => problems.push(problem),
        }
    });
    for name in pairs.into_values().flatten().flatten() {
        problems.push(format!("'{name}' belongs to no layer of the model"));
    }
    if problems.is_empty() {
        return Ok(AdapterSet::from_adapters(entries));
    }
    Err(ErrorKind::Weights { path: path.to_owned(), problems }.into())
}

/// A layer's adapter, or one line about what is wrong with it.
fn read_pair(
    file: &GgufFile,
    layer: &dyn AdaptableLayer,
    pair: [Option<String>; 2],
    alpha: f64,
    head_dim: Option<usize>,
) -> Result<LoraAdapter, String> {
    let [a_name, b_name] = match pair {
        [Some(a), Some(b)] => [a, b],
        [a, b] => {
            let name = a.or(b).unwrap_or_default();
            return Err(format!("'{name}' is there without its other half"));
        }
    };
    let is_embedding = layer.kind() == LayerKind::Embedding;
    let read = |name: &str| file.read(name).map_err(|error| error.to_string());
    let (a, mut b) = (read(&a_name)?, read(&b_name)?);
    let [d_input, d_output] = layer.dims();
    let rank = b.shape.get(1).copied().unwrap_or_default();
    let shape = if is_embedding { [d_input, rank] } else { [rank, d_input] };
    for (name, found, expected) in [(a_name, &a, shape), (b_name, &b, [d_output, rank])] {
        if found.shape != expected || rank == 0 {
            return Err(format!("'{name}': expected shape {expected:?}, found {:?}", found.shape));
        }
        if !found.values.is_finite() {
            return Err(format!("'{name}': expected finite values, found NaN or infinity"));
        }
    }
    if let Some(head_dim) = head_dim {
        b.values = halved_rows(&b.values.to_f32(), d_output, head_dim).into();
    }
    let device = layer.weight().device();
    let a = on_device(a.values.to_f32(), shape, &device);
    let a = if is_embedding { a } else { transposed(a) };
    let b = transposed(on_device(b.values.to_f32(), [d_output, rank], &device));
    let alpha = if alpha == 0.0 { rank as f64 } else { alpha };
    LoraAdapter::from_tensors(a, b, alpha, Scaling::AlphaOverRank)
        .map_err(|error| error.to_string())
}

/// The width of the heads whose rows llama.cpp has in an order of its own, which it has for Llamas only.
fn head_rows(config: &DecoderConfig, rows: Rows) -> Option<usize> {
    let reordered = rows != Rows::Other && config.family.gguf_architecture == Some("llama");
    reordered.then_some(config.head_dim)
}

fn architecture(config: &DecoderConfig) -> Result<&'static str> {
    config.family.gguf_architecture.ok_or_else(|| {
        let expected = "a decoder of a family whose tensors in GGUF files are known here";
        argument("adapter", expected, config.family.name)
    })
}

fn on_device(data: Vec<f32>, shape: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(data, shape), (device, DType::F32))
}

/// Transposed in memory too: every forward pass reads it.
fn transposed(tensor: Tensor<2>) -> Tensor<2> {
    let device = tensor.device();
    let tensor = to_host(tensor.transpose());
    let shape = [tensor.shape[0] as usize, tensor.shape[1] as usize];
    on_device(tensor.data, shape, &device)
}

struct Host {
    shape: Vec<u64>,
    data: Vec<f32>,
}

fn to_host(tensor: Tensor<2>) -> Host {
    let shape = tensor.dims().map(|size| size as u64).to_vec();
    let data = tensor.without_autodiff().into_data();
    Host { shape, data: data.try_to_vec().expect("the tensor is f32") }
}

fn argument(what: &'static str, expected: &str, found: impl ToString) -> Error {
    ErrorKind::Argument { what, expected: expected.to_owned(), found: found.to_string() }.into()
}
