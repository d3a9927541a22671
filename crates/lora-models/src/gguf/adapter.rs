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
//! blk.0.ffn_up_exps.weight.lora_a  [experts, rank, d_input]
//! blk.0.ffn_up_exps.weight.lora_b  [experts, d_output, rank]
//! ```
//!
//! A projection of all experts of a block has one pair of tensors, as its weight has one; an expert
//! without an adapter is zeros there, and a smaller rank than the largest is padded with zeros.
//!
//! llama.cpp's factor is alpha / (the tensor's own rank), or 1 for alpha = 0. The rows of `lora_b` of q
//! and k are in the order in which llama.cpp has those of the weight; `lora_a` has no such rows.
//!
//! Source: llama.cpp's `convert_lora_to_gguf.py`, `src/llama-adapter.cpp`, `src/llama-adapter.h`
//! (`get_scale`) and `src/llama-graph.cpp` (`build_inp_embd`, `build_lora_mm_id`), 2026.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use burn::tensor::{DType, Device, Tensor, TensorData};
use lora_core::{
    AdaptableLayer, Adaptation, AdapterSet, LayerKind, LoraAdapter, PortabilityProblem,
    PortabilityRule, Reader, Scaling, VisitLora, check_written_for, write_file,
};

use super::names::{self, Expert, Naming, Rows};
use super::reader::GgufFile;
use super::weights::{halved_rows, paired_rows};
use super::writer::Writer;
use crate::config::DecoderConfig;
use crate::decoder::Decoder;
use crate::error::{Error, ErrorKind, Result};
use crate::family::ExpertNames;
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
/// tensor's own. An adapter with an offset is written in its plain form. A mixture of experts has one
/// tensor for a projection of all experts of a block: those without an adapter get zeros.
///
/// # Errors
/// When the file exists already or cannot be written; when the decoder has no adapter, one that is not
/// finite, or something that llama.cpp cannot read (DoRA, trained biases, layers or tokens, an embedding
/// that is the head too), with every rule that is broken.
pub fn save_gguf_adapter(decoder: &Decoder, path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    check_portable(decoder)?;
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
    let experts = experts(decoder.config());
    // In the order of the model, a stack of experts where its first is.
    let (mut pairs, mut stacks) = (Vec::<Pair>::new(), BTreeMap::<String, usize>::new());
    for (path, kind, adapter) in &layers {
        let naming = names::llama_cpp(&format!("{path}.weight"), experts).ok_or_else(|| {
            argument("adapter", "adapters on layers that llama.cpp has a name for", path)
        })?;
        let head_dim = head_rows(decoder.config(), naming.rows);
        let factors = Factors::of(path, adapter, *kind, head_dim)?;
        let Expert::One(number) = naming.expert else {
            pairs.push(Pair { name: naming.name, stack: None, factors: vec![factors] });
            continue;
        };
        let place = *stacks.entry(naming.name.clone()).or_insert(pairs.len());
        if place == pairs.len() {
            let count = expert_count(decoder.config());
            let factors = (0..count).map(|_| factors.zeros()).collect();
            pairs.push(Pair { name: naming.name, stack: Some(count), factors });
        }
        pairs[place].factors[number] = factors;
    }
    for pair in pairs {
        for (name, shape, values) in pair.tensors(alpha as f32) {
            writer = writer.f32s(&name, &shape, &values);
        }
    }
    Ok(write_file(path, &writer.finish_padded())?)
}

/// Whether llama.cpp can have what the decoder has. That all experts of a block have adapters is asked by its
/// converter alone.
fn check_portable(decoder: &Decoder) -> Result<()> {
    let Err(error) = check_written_for(decoder, &[Reader::LlamaCpp]) else { return Ok(()) };
    let lora_core::ErrorKind::NotPortable { problems } = error.kind() else {
        return Err(error.into());
    };
    let is_ours = |problem: &&PortabilityProblem| problem.rule != PortabilityRule::AllExperts;
    let problems: Vec<_> = problems.iter().filter(is_ours).cloned().collect();
    match problems.is_empty() {
        true => Ok(()),
        false => Err(lora_core::Error::from(lora_core::ErrorKind::NotPortable { problems }).into()),
    }
}

/// One adapter's factors as llama.cpp has them, with its factor.
struct Factors {
    /// `[rank, d_input]`; of an embedding `[vocabulary, rank]`.
    a: Vec<f32>,
    /// `[d_output, rank]`.
    b: Vec<f32>,
    is_embedding: bool,
    /// d_input or the vocabulary, and d_output.
    dims: [usize; 2],
    rank: usize,
    scaling: f64,
}

impl Factors {
    fn of(
        path: &str,
        adapter: &LoraAdapter,
        kind: LayerKind,
        head_dim: Option<usize>,
    ) -> Result<Self> {
        let [a, b] = [&adapter.lora_a, &adapter.lora_b]
            .map(|factor| factor.val().without_autodiff().cast(DType::F32));
        let (dims, rank) = ([a.dims()[0], b.dims()[1]], adapter.rank());
        let is_embedding = kind == LayerKind::Embedding;
        let a = to_host(if is_embedding { a } else { a.transpose() });
        let mut b = to_host(b.transpose());
        if a.iter().chain(&b).any(|value| !value.is_finite()) {
            let found = format!("others at {path}");
            return Err(argument("adapter", "finite values in A and B", found));
        }
        if let Some(head_dim) = head_dim {
            b = paired_rows(&b, dims[1], head_dim);
        }
        Ok(Self { a, b, is_embedding, dims, rank, scaling: adapter.scaling() })
    }

    /// Those of no adapter beside this one.
    fn zeros(&self) -> Self {
        Self { a: vec![], b: vec![], rank: 0, ..*self }
    }

    /// The factors with `rank`, filled up with zeros, and B times what `theirs`, llama.cpp's factor, lacks.
    fn into_rank(mut self, rank: usize, theirs: f64) -> [Vec<f32>; 2] {
        let ratio = self.scaling / theirs;
        if ratio != 1.0 {
            self.b.iter_mut().for_each(|value| *value *= ratio as f32);
        }
        if self.rank == rank {
            return [self.a, self.b];
        }
        let [d_input, d_output] = self.dims;
        self.a.resize(rank * d_input, 0.0);
        let mut b = vec![0.0; d_output * rank];
        if self.rank > 0 {
            for (line, values) in b.chunks_exact_mut(rank).zip(self.b.chunks_exact(self.rank)) {
                line[..self.rank].copy_from_slice(values);
            }
        }
        [self.a, b]
    }
}

/// What belongs to one tensor of the base.
struct Pair {
    name: String,
    /// The number of experts, where the tensor has those of all.
    stack: Option<usize>,
    factors: Vec<Factors>,
}

impl Pair {
    /// The names, shapes and values of both tensors.
    fn tensors(self, alpha: f32) -> [(String, Vec<u64>, Vec<f32>); 2] {
        let rank = self.factors.iter().map(|factors| factors.rank).max().unwrap_or_default();
        let [d_input, d_output] = self.factors[0].dims;
        let a_shape = if self.factors[0].is_embedding { [d_input, rank] } else { [rank, d_input] };
        // The factor as llama.cpp computes it, in f32, from the alpha that it reads.
        let theirs = f64::from(alpha) / rank as f64;
        let (mut a, mut b) = (Vec::new(), Vec::new());
        for factors in self.factors {
            let [own_a, own_b] = factors.into_rank(rank, theirs);
            a.extend(own_a);
            b.extend(own_b);
        }
        [("lora_a", a_shape, a), ("lora_b", [d_output, rank], b)].map(|(factor, shape, values)| {
            let shape = self.stack.into_iter().chain(shape).map(|size| size as u64).collect();
            (format!("{}.{factor}", self.name), shape, values)
        })
    }
}

/// Reads an adapter file of llama.cpp's for the decoder, without putting it on
/// ([`AdapterSet::attach`] does). Of a stack of experts, those whose factors are all zeros have no adapter;
/// the others have the rank of the stack.
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
    let experts = experts(decoder.config());
    let (mut pairs, mut problems) = (BTreeMap::<String, [Option<String>; 2]>::new(), Vec::new());
    for name in file.names() {
        let parts = name.rsplit_once('.').and_then(|(base, factor)| {
            let place = ["lora_a", "lora_b"].iter().position(|known| *known == factor)?;
            names::hugging_face(base, experts)?;
            Some((base.to_owned(), place))
        });
        match parts {
            Some((base, place)) => pairs.entry(base).or_default()[place] = Some(name),
            None => problems.push(format!("'{name}' is unused")),
        }
    }
    let (mut entries, mut served) = (Vec::new(), BTreeSet::new());
    decoder.visit_lora("", &mut |layer_path, layer| {
        let Some(naming) = names::llama_cpp(&format!("{layer_path}.weight"), experts) else {
            return;
        };
        let Some(pair) = pairs.get(&naming.name) else { return };
        served.insert(naming.name.clone());
        match read_pair(&file, decoder.config(), layer, &naming, pair, alpha) {
            Ok(Some(adapter)) => entries.push((layer_path.to_owned(), adapter)),
            Ok(None) => {}
            // The experts of a stack share its names and shapes, and what is wrong with those.
            Err(problem) if problems.contains(&problem) => {}
            Err(problem) => problems.push(problem),
        }
    });
    pairs.retain(|base, _| !served.contains(base));
    for name in pairs.into_values().flatten().flatten() {
        problems.push(format!("'{name}' belongs to no layer of the model"));
    }
    if problems.is_empty() {
        return Ok(AdapterSet::from_adapters(entries));
    }
    Err(ErrorKind::Weights { path: path.to_owned(), problems }.into())
}

/// A layer's adapter, nothing for an expert whose part of a stack is zeros, or one line about what is wrong.
fn read_pair(
    file: &GgufFile,
    config: &DecoderConfig,
    layer: &dyn AdaptableLayer,
    naming: &Naming,
    pair: &[Option<String>; 2],
    alpha: f64,
) -> Result<Option<LoraAdapter>, String> {
    let [Some(a_name), Some(b_name)] = pair else {
        let name = pair.iter().flatten().next().map_or("", String::as_str);
        return Err(format!("'{name}' is there without its other half"));
    };
    let is_embedding = layer.kind() == LayerKind::Embedding;
    let [d_input, d_output] = layer.dims();
    let shape = |name: &str| file.shape(name).unwrap_or_default();
    let rank = shape(b_name).last().copied().unwrap_or_default();
    let a_shape = if is_embedding { [d_input, rank] } else { [rank, d_input] };
    let stack = (naming.expert != Expert::None).then(|| expert_count(config));
    let read = |name: &str, expected: [usize; 2]| {
        let expected: Vec<usize> = stack.into_iter().chain(expected).collect();
        let found = shape(name);
        if found != expected || rank == 0 {
            return Err(format!("'{name}': expected shape {expected:?}, found {found:?}"));
        }
        let values = match naming.expert {
            Expert::One(number) => file.part(name, number),
            _ => file.read(name).map(|tensor| tensor.values.to_f32()),
        };
        let values = values.map_err(|error| error.to_string())?;
        match values.iter().all(|value| value.is_finite()) {
            true => Ok(values),
            false => Err(format!("'{name}': expected finite values, found NaN or infinity")),
        }
    };
    let (a, mut b) = (read(a_name, a_shape)?, read(b_name, [d_output, rank])?);
    if stack.is_some() && a.iter().chain(&b).all(|value| *value == 0.0) {
        return Ok(None);
    }
    if let Some(head_dim) = head_rows(config, naming.rows) {
        b = halved_rows(&b, d_output, head_dim);
    }
    let device = layer.weight().device();
    let a = on_device(a, a_shape, &device);
    let a = if is_embedding { a } else { transposed(a) };
    let b = transposed(on_device(b, [d_output, rank], &device));
    let alpha = if alpha == 0.0 { rank as f64 } else { alpha };
    LoraAdapter::from_tensors(a, b, alpha, Scaling::AlphaOverRank)
        .map(Some)
        .map_err(|error| error.to_string())
}

/// How the names of a decoder's experts are made, where it has some.
fn experts(config: &DecoderConfig) -> Option<ExpertNames> {
    config.experts.is_some().then(|| config.expert_names())
}

fn expert_count(config: &DecoderConfig) -> usize {
    config.experts.as_ref().map_or(0, |experts| experts.count)
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
    let tensor = tensor.transpose();
    let shape = tensor.dims();
    on_device(to_host(tensor), shape, &device)
}

fn to_host(tensor: Tensor<2>) -> Vec<f32> {
    tensor.without_autodiff().into_data().try_to_vec().expect("the tensor is f32")
}

fn argument(what: &'static str, expected: &str, found: impl ToString) -> Error {
    ErrorKind::Argument { what, expected: expected.to_owned(), found: found.to_string() }.into()
}
