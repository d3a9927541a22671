//! Reading an adapter's folder for a model.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::Path;

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Tensor, TensorData};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use super::checkpoint::Layers;
use super::config::{field_of, read_config};
use super::fingerprint::fingerprint;
use super::keys::{self, Part, Slot};
use super::{CONFIG_FILE, FINGERPRINT, PICKLE_FILE, WEIGHTS_FILE};
use crate::adapter::{
    LoraAdapter, adapter_dtype, check_grouped, column_squares, in_dtype, in_full,
};
use crate::config::AdapterConfig;
use crate::error::{Error, ErrorKind, Result, first_few};
use crate::frozen::LayerKind;
use crate::init::Init;
use crate::inject::{self, InjectReport, Plan, check_unmerged};
use crate::layer::Adaptation;
use crate::linalg::to_host;
use crate::replacement::{Replacement, TokenRows};
use crate::set::AdapterSet;
use crate::visit::VisitLora;

/// How an adapter's folder is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadOptions {
    /// Whether a tensor that is missing, or in the file and belongs to nothing, is an error; else it is
    /// reported only, and a layer of which a tensor is missing gets no adapter.
    pub strict: bool,
    /// Whether the adapter must have been made over this very base, as far as its file says which.
    pub check_base: bool,
    /// Whether the model holds the weights that a PiSSA, OLoRA or similar start left over, and not the
    /// original ones. Over the original ones, what the start took out of them is computed again, which
    /// exact PiSSA and OLoRA allow.
    pub residual_base: bool,
}

impl Default for LoadOptions {
    /// Strict, over the original base that the file names.
    fn default() -> Self {
        Self { strict: true, check_base: true, residual_base: false }
    }
}

/// What reading an adapter found. Prints as the table of what was applied, and a line for each of the
/// rest that is not empty.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LoadReport {
    /// What was applied, and what of the model has no adapter.
    pub applied: InjectReport,
    /// Keys that the config asks for and the file lacks.
    pub missing: Vec<String>,
    /// Keys of the file that belong to nothing.
    pub unused: Vec<String>,
    /// Layers that the adapter leaves as they are.
    pub unchanged: Vec<String>,
    /// Whether the base is the one that the adapter was made over; `None` where the file does not say.
    pub same_base: Option<bool>,
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.applied)?;
        for (what, names) in [
            ("missing", &self.missing),
            ("unused", &self.unused),
            ("changes nothing", &self.unchanged),
        ] {
            if !names.is_empty() {
                write!(f, "\n{what}: {}", first_few(names, ", "))?;
            }
        }
        let adapted = self.applied.adapted.len() + self.applied.replaced.len();
        if adapted > 0 && self.unchanged.len() == adapted {
            write!(f, "\nevery layer stays as it is: was the adapter trained?")?;
        }
        if self.same_base == Some(false) {
            write!(f, "\nmade over another base")?;
        }
        Ok(())
    }
}

/// Freezes the model and attaches the adapter in `folder`, written by PEFT or by
/// [`save_adapter`](crate::save_adapter), strictly; [`load_adapter_with`] reads in other ways.
///
/// # Errors
/// When a file cannot be read or is damaged; when the config asks for something unknown here; when
/// a tensor is missing, unused, of the wrong shape or not finite (all of them are named); when the
/// adapter was made over another base; when a layer is in a type that its device does not compute in; when the
/// model is merged. All of it is checked before anything is attached.
pub fn load_adapter<M: Module + VisitLora>(
    model: M,
    folder: impl AsRef<Path>,
) -> Result<(M, LoadReport)> {
    load_adapter_with(model, folder, &LoadOptions::default())
}

/// As [`load_adapter`], but as `options` say.
///
/// # Errors
/// As [`load_adapter`], less what the options allow.
pub fn load_adapter_with<M: Module + VisitLora>(
    model: M,
    folder: impl AsRef<Path>,
    options: &LoadOptions,
) -> Result<(M, LoadReport)> {
    check_unmerged(&model)?;
    let (set, mut report) = read_adapter(&model, folder, options)?;
    let (model, applied) = set.attach(model)?;
    report.applied = applied;
    Ok((model, report))
}

/// Reads the adapter in `folder` for the model, without putting it on. `applied` of the report is empty.
///
/// # Errors
/// As [`load_adapter`], less what the model's state bars.
pub fn read_adapter<M: VisitLora>(
    model: &M,
    folder: impl AsRef<Path>,
    options: &LoadOptions,
) -> Result<(AdapterSet, LoadReport)> {
    let folder = folder.as_ref();
    let config = read_config(folder, options.residual_base)?;
    let bytes = read_weights(folder)?;
    let (tensors, made_over) = parse_weights(folder, &bytes)?;

    let plan = Plan::new(model, &config, |selection, others| {
        let others = others.into_iter().filter(|problem| problem.bars_loading());
        let others: Vec<_> = others.collect();
        if !others.is_empty() {
            return Err(Error::config(others));
        }
        selection.into_result_for_loading()
    })
    .map_err(|error| error.in_config(folder.join(CONFIG_FILE), field_of))?;
    // Of all the layers that the file means, whether or not their tensors are there.
    let paths: Vec<String> = plan.parts.iter().map(|(path, _)| path.clone()).collect();
    let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
    let here = made_over.as_ref().map(|_| fingerprint(model, &paths));
    let same_base = made_over.as_ref().map(|made_over| Some(made_over) == here.as_ref());
    let reader = Reader::new(&tensors);
    let (entries, report) = reader.read(model, plan, options.strict).map_err(|problems| {
        Error::from(ErrorKind::AdapterMismatch { path: folder.to_owned(), problems })
    })?;
    let entries = entries.map_err(|error| error.in_config(folder.join(CONFIG_FILE), field_of))?;
    let set = AdapterSet::from_entries(entries);
    if let (Some(false), true) = (same_base, options.check_base) {
        return Err(ErrorKind::OtherBase { path: folder.to_owned() }.into());
    }
    Ok((set, LoadReport { same_base, ..report }))
}

/// The weights' file of the adapter in `folder`.
pub(super) fn read_weights(folder: &Path) -> Result<Vec<u8>> {
    let path = folder.join(WEIGHTS_FILE);
    if !path.exists() && folder.join(PICKLE_FILE).exists() {
        let found = format!("{PICKLE_FILE}; convert it, with PEFT for instance");
        return Err(Error::malformed(folder, "the weights", WEIGHTS_FILE, found));
    }
    fs::read(&path).map_err(|source| Error::io(&path, source))
}

/// The tensors in it, and the fingerprint of the base where it has one.
pub(super) fn parse_weights<'a>(
    folder: &Path,
    bytes: &'a [u8],
) -> Result<(SafeTensors<'a>, Option<String>)> {
    let malformed = |source: safetensors::SafeTensorError| {
        let found = format!("an error: {source}");
        Error::malformed(folder.join(WEIGHTS_FILE), "the file", "a safetensors file", found)
    };
    let tensors = SafeTensors::deserialize(bytes).map_err(malformed)?;
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(malformed)?;
    let made_over = metadata.metadata().as_ref().and_then(|entries| entries.get(FINGERPRINT));
    Ok((tensors, made_over.cloned()))
}

/// What a reader makes of a file, or one line for each tensor that does not fit.
type Read = Result<(Result<Vec<(String, Adaptation)>>, LoadReport), Vec<String>>;

pub(super) struct Reader<'a> {
    tensors: &'a SafeTensors<'a>,
    keys: BTreeMap<(String, Part), String>,
    problems: Vec<String>,
    missing: Vec<String>,
    unused: Vec<String>,
    unchanged: Vec<String>,
    /// The base's own, and trained rows: what embedding and head may share.
    shared: Vec<String>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(tensors: &'a SafeTensors<'a>) -> Self {
        let mut names = tensors.names();
        names.sort_unstable();
        let (mut keys, mut unused, mut problems) = (BTreeMap::new(), Vec::new(), Vec::new());
        for name in names {
            match keys::parse(name) {
                // It acts nowhere.
                Some((_, Part::Replaced)) => {}
                Some(key) => {
                    // PEFT writes some biases twice.
                    if let Some(other) = keys.insert(key, name.to_owned())
                        && !is_copy(tensors, &other, name)
                    {
                        problems.push(format!("{other} and {name} mean the same tensor"));
                    }
                }
                None => unused.push(name.to_owned()),
            }
        }
        let (missing, unchanged, shared) = (Vec::new(), Vec::new(), Vec::new());
        Self { tensors, keys, problems, missing, unused, unchanged, shared }
    }

    fn read<M: VisitLora>(mut self, model: &M, plan: Plan, strict: bool) -> Read {
        let mut entries = Vec::new();
        let mut parts = plan.parts.into_iter().peekable();
        let mut failure = None;
        let (mut embedding, mut paths) = (None, BTreeSet::new());
        model.visit_lora("", &mut |path, layer| {
            let slot = Slot::of(layer);
            let weight = layer.weight();
            let bias = layer.bias();
            paths.insert(path.to_owned());
            if model.tied_embedding() == Some(path) {
                embedding = Some((slot.clone(), weight.clone()));
            }
            let Some((_, part)) = parts.next_if(|(planned, _)| planned == path) else {
                // PEFT writes embedding and head also where their number of tokens was changed.
                self.check_frozen(path, &slot, Part::Weight, &weight);
                return self.check_frozen_bias(path, &slot, Part::Bias, bias.as_ref());
            };
            let fits = |adaptation| layer.check(&adaptation).map(|()| adaptation);
            let adaptation = self.part(path, &slot, &part, &weight, bias.as_ref()).transpose();
            match adaptation.map(|adaptation| adaptation.and_then(fits)) {
                Some(Ok(adaptation)) => {
                    if changes_nothing(&adaptation, &weight, layer.bias()) {
                        self.unchanged.push(path.to_owned());
                    }
                    entries.push((path.to_owned(), adaptation));
                }
                Some(Err(error)) => failure = failure.take().or(Some(error.at(path))),
                None => {}
            }
        });
        // PEFT may write the weight of a tied embedding as the head's too, whatever trains of the embedding.
        let head = model.output_layer().filter(|head| !paths.contains(*head));
        if let (Some((slot, weight)), Some(head)) = (embedding, head)
            && self.has_frozen(head, &slot, &weight)
        {
            self.skip(head, Part::Weight);
        }
        let left = std::mem::take(&mut self.keys).into_iter();
        let of_no_layer = |path: &str| !paths.contains(path);
        let left: Vec<String> = left
            .filter(|((path, part), name)| !(of_no_layer(path) && self.is_second(*part, name)))
            .map(|(_, name)| name)
            .collect();
        self.unused.extend(left);
        if strict {
            let missing = self.missing.iter().map(|key| format!("{key} is missing"));
            self.problems.extend(missing);
            let unused = self.unused.iter();
            self.problems.extend(
                unused.map(|key| format!("{key} is in the file, but belongs to no target")),
            );
        }
        // A setting that cannot be followed comes first: the tensors may only be wrong because of it.
        if failure.is_none() && !self.problems.is_empty() {
            return Err(self.problems);
        }
        let report = LoadReport {
            missing: self.missing,
            unused: self.unused,
            unchanged: self.unchanged,
            ..LoadReport::default()
        };
        Ok((failure.map_or(Ok(entries), Err), report))
    }

    fn part(
        &mut self,
        path: &str,
        slot: &Slot,
        part: &inject::Part,
        weight: &Tensor<2>,
        bias: Option<&Tensor<1>>,
    ) -> Result<Option<Adaptation>> {
        match part {
            inject::Part::LowRank(config) => self.low_rank(path, slot, config, weight, bias),
            inject::Part::Whole => self.whole(path, slot, weight),
            inject::Part::Bias => self.bias(path, slot, weight),
            inject::Part::Tokens(ids) => self.tokens(path, slot, ids, weight),
        }
    }

    /// One layer's adaptation alone, for a reader that looks at no other and has compared its bias.
    pub(super) fn adaptation(
        &mut self,
        path: &str,
        slot: &Slot,
        part: &inject::Part,
        weight: &Tensor<2>,
    ) -> Result<Adaptation> {
        let read = self.part(path, slot, part, weight, None)?;
        let missing = self.missing.drain(..).map(|key| format!("{key} is missing"));
        let mut problems: Vec<String> = missing.collect();
        problems.append(&mut self.problems);
        read.filter(|_| problems.is_empty()).ok_or_else(|| {
            ErrorKind::AdapterMismatch { path: WEIGHTS_FILE.into(), problems }.into()
        })
    }

    /// What is wrong with this part of a layer, which is looked at no more.
    pub(super) fn unfit(
        &mut self,
        path: &str,
        slot: &Slot,
        part: Part,
        size: usize,
    ) -> Option<String> {
        let known = self.problems.len();
        self.take(path, slot, part, size);
        let missing = self.missing.pop().map(|key| format!("{key} is missing"));
        missing.or_else(|| self.problems.drain(known..).next())
    }

    /// What is wrong with this part of a layer, which should be the frozen value `here`.
    pub(super) fn unlike(
        &mut self,
        path: &str,
        slot: &Slot,
        part: Part,
        here: &Tensor<2>,
    ) -> Option<String> {
        let known = self.problems.len();
        self.check_frozen(path, slot, part, here);
        self.problems.drain(known..).next()
    }

    /// Whether a tensor is one again that embedding and head share: PEFT writes it under the names of both.
    fn is_second(&self, part: Part, name: &str) -> bool {
        matches!(part, Part::Weight | Part::BaseWeight | Part::Tokens)
            && self.shared.iter().any(|other| is_copy(self.tensors, other, name))
    }

    /// Whether all that the file has of these parts of a layer is such.
    pub(super) fn are_second(&self, path: &str, parts: &BTreeSet<Part>) -> bool {
        let name = |part: &Part| self.keys.get(&(path.to_owned(), *part));
        parts.iter().all(|part| name(part).is_none_or(|name| self.is_second(*part, name)))
    }

    /// Takes this part of a layer, which is read elsewhere, for one that embedding and head may share.
    pub(super) fn note_shared(&mut self, path: &str, part: Part) {
        self.shared.extend(self.keys.get(&(path.to_owned(), part)).cloned());
    }

    /// Looks at this part no more.
    pub(super) fn skip(&mut self, path: &str, part: Part) {
        self.keys.remove(&(path.to_owned(), part));
    }

    /// The paths that the file has tensors for, with the parts of each.
    pub(super) fn layers(&self) -> Layers {
        let mut layers = Layers::new();
        for (path, part) in self.keys.keys() {
            layers.entry(path.clone()).or_default().insert(*part);
        }
        layers
    }

    /// What is wrong with the names of the file's tensors.
    pub(super) fn problems(&self) -> Vec<String> {
        let unknown = self.unused.iter().map(|key| format!("{key} is no adapter's tensor"));
        self.problems.iter().cloned().chain(unknown).collect()
    }

    /// The shape of a tensor of the file.
    pub(super) fn shape(&self, path: &str, part: Part) -> Option<Vec<usize>> {
        let name = self.keys.get(&(path.to_owned(), part))?;
        self.tensors.tensor(name).ok().map(|tensor| tensor.shape().to_vec())
    }

    /// Whether the file adapts the layer as an embedding.
    pub(super) fn is_embedding(&self, path: &str) -> bool {
        let name = self.keys.get(&(path.to_owned(), Part::A));
        name.is_some_and(|name| name.contains("lora_embedding_A"))
    }

    fn low_rank(
        &mut self,
        path: &str,
        slot: &Slot,
        config: &AdapterConfig,
        weight: &Tensor<2>,
        bias: Option<&Tensor<1>>,
    ) -> Result<Option<Adaptation>> {
        let (device, dtype) = (weight.device(), adapter_dtype(weight.dtype(), config.dtype)?);
        // Of other layers PEFT starts at zero whatever the config says.
        let starts_from_weight = config.init.starts_from_weight() && slot.kind == LayerKind::Linear;
        if slot.groups() > 1 {
            check_grouped(slot.groups(), &AdapterConfig { init: Init::default(), ..*config })?;
        }
        let rank = config.rank;
        // All are read before any is judged, so that all that are missing are told.
        let a = self.take(path, slot, Part::A, rank);
        let b = self.take(path, slot, Part::B, rank);
        let lora_bias = config.lora_bias.then(|| self.take(path, slot, Part::LoraBias, rank));
        let magnitude = config.dora.then(|| self.take(path, slot, Part::Magnitude, rank));
        let trains_bias = config.train_bias && slot.has_bias();
        let base_bias = trains_bias.then(|| self.take(path, slot, Part::BaseBias, rank));
        if !trains_bias {
            self.check_frozen_bias(path, slot, Part::BaseBias, bias);
        }
        if !starts_from_weight {
            self.check_frozen(path, slot, Part::BaseWeight, weight);
        }
        let optional = [lora_bias, magnitude, base_bias];
        let is_whole = !optional.iter().any(|read| matches!(read, Some(None)));
        let (Some(a), Some(b), true) = (a, b, is_whole) else {
            self.skip(path, Part::BaseWeight); // of a start that is not computed
            return Ok(None);
        };
        // What stands in for the layer's own values is not rounded with A and B.
        let of_layer = adapter_dtype(weight.dtype(), None)?;
        let vector = |read: Option<Option<HostTensor>>, dtype| {
            Some(Param::from_tensor(read??.vector(&device, dtype)))
        };
        let [lora_bias, magnitude, base_bias] = optional;
        let lora_bias = vector(lora_bias, dtype);
        let [magnitude, base_bias] = [magnitude, base_bias].map(|read| vector(read, of_layer));

        let [lora_a, lora_b] = [a, b].map(|matrix| matrix.matrix(&device, dtype));
        let mut adapter =
            LoraAdapter::from_tensors_grouped(lora_a, lora_b, config.alpha, config.scaling)?;
        adapter.set_dropout(config.dropout);
        adapter.lora_bias = lora_bias;
        adapter.magnitude = magnitude;
        adapter.base_bias = base_bias;
        if starts_from_weight {
            if !matches!(config.init, Init::Pissa { iterations: None } | Init::Olora) {
                return Err(Error::setting(
                    "init_lora_weights",
                    "a start that can be computed again (pissa, olora), or a model with the weights \
                     that the start left over",
                    "one with random numbers in it; convert the adapter to plain LoRA",
                ));
            }
            adapter.start_at(weight, config)?;
            self.check_residual(path, slot, &adapter, weight);
        }
        Ok(Some(Adaptation::LowRank(adapter)))
    }

    fn whole(&mut self, path: &str, slot: &Slot, weight: &Tensor<2>) -> Result<Option<Adaptation>> {
        let (device, dtype) = (weight.device(), adapter_dtype(weight.dtype(), None)?);
        let read = self.take(path, slot, Part::Weight, 0);
        let bias = slot.has_bias().then(|| self.take(path, slot, Part::Bias, 0));
        let (Some(weight), false) = (read, matches!(bias, Some(None))) else { return Ok(None) };
        let bias = bias.flatten().map(|bias| Param::from_tensor(bias.vector(&device, dtype)));
        let weight = Some(Param::from_tensor(weight.matrix(&device, dtype)));
        Ok(Some(Adaptation::Replacement(Replacement { weight, bias, tokens: None })))
    }

    fn bias(&mut self, path: &str, slot: &Slot, weight: &Tensor<2>) -> Result<Option<Adaptation>> {
        let (device, dtype) = (weight.device(), adapter_dtype(weight.dtype(), None)?);
        self.check_frozen(path, slot, Part::Weight, weight);
        let read = self.take(path, slot, Part::Bias, 0);
        Ok(read.map(|bias| {
            let bias = Some(Param::from_tensor(bias.vector(&device, dtype)));
            Adaptation::Replacement(Replacement { weight: None, bias, tokens: None })
        }))
    }

    fn tokens(
        &mut self,
        path: &str,
        slot: &Slot,
        ids: &[usize],
        weight: &Tensor<2>,
    ) -> Result<Option<Adaptation>> {
        let dtype = adapter_dtype(weight.dtype(), None)?;
        self.check_frozen(path, slot, Part::BaseWeight, weight);
        self.note_shared(path, Part::Tokens);
        let Some(read) = self.take(path, slot, Part::Tokens, ids.len()) else { return Ok(None) };
        let rows = read.matrix(&weight.device(), dtype);
        let tokens = Some(TokenRows::from_rows(weight, ids, rows)?);
        Ok(Some(Adaptation::Replacement(Replacement { weight: None, bias: None, tokens })))
    }

    /// PEFT writes the frozen weight and bias of an adapted embedding or head into the file. They must be
    /// this model's: others mean other tokens.
    fn check_frozen(&mut self, path: &str, slot: &Slot, part: Part, here: &Tensor<2>) {
        let Some(name) = self.keys.get(&(path.to_owned(), part)).cloned() else { return };
        let Some(read) = self.take(path, slot, part, 0) else { return };
        let (apart, is_same) = compare(read, here);
        if is_same {
            self.shared.push(name);
        } else {
            let what = match part {
                Part::BaseWeight => "is not this model's weight",
                Part::Weight => {
                    "is in the file, but belongs to no target, and is not this model's weight"
                }
                _ => "is in the file, but belongs to no target, and is not this model's bias",
            };
            self.problems.push(format!("{name} {what}: they differ by {apart}"));
        }
    }

    /// Whether the file has the weight of a layer, and it is `here`.
    fn has_frozen(&self, path: &str, slot: &Slot, here: &Tensor<2>) -> bool {
        let name = self.keys.get(&(path.to_owned(), Part::Weight));
        let read = name.map(|name| HostTensor::read(self.tensors, name, slot, Part::Weight, 0));
        read.and_then(Result::ok).is_some_and(|read| compare(read, here).1)
    }

    fn check_frozen_bias(&mut self, path: &str, slot: &Slot, part: Part, here: Option<&Tensor<1>>) {
        if let Some(here) = here {
            self.check_frozen(path, slot, part, &here.clone().unsqueeze_dim(1));
        }
    }

    /// The same for a weight from which a start was taken off, `adapter`'s: what was left is in the file.
    fn check_residual(
        &mut self,
        path: &str,
        slot: &Slot,
        adapter: &LoraAdapter,
        weight: &Tensor<2>,
    ) {
        let is_there = self.keys.contains_key(&(path.to_owned(), Part::BaseWeight));
        if let (Some((a, b)), true) = (adapter.offset(), is_there) {
            let start = a.matmul(b).mul_scalar(adapter.scaling()).cast(DType::F32);
            let weight = weight.clone().without_autodiff().cast(DType::F32);
            self.check_frozen(path, slot, Part::BaseWeight, &(weight - start.without_autodiff()));
        }
    }

    /// The part of the layer, which is noted as missing or unfit where it is.
    fn take(&mut self, path: &str, slot: &Slot, part: Part, size: usize) -> Option<HostTensor> {
        let Some(name) = self.keys.remove(&(path.to_owned(), part)) else {
            self.missing.push(keys::key(path, slot.kind, part));
            return None;
        };
        let read = HostTensor::read(self.tensors, &name, slot, part, size);
        read.map_err(|problem| self.problems.push(problem)).ok()
    }
}

/// A tensor's values in torch's order, as a matrix.
struct HostTensor {
    rows: usize,
    columns: usize,
    values: Vec<f32>,
    transposed: bool,
}

impl HostTensor {
    /// A part of a layer, or one line about what is wrong with it.
    fn read(
        tensors: &SafeTensors<'_>,
        name: &str,
        slot: &Slot,
        part: Part,
        size: usize,
    ) -> Result<Self, String> {
        let expected = slot.torch_shape(part, size);
        let values = read_tensor(tensors, name, &expected)?;
        let (rows, columns) = match expected.split_first() {
            Some((rows, others)) => (*rows, others.iter().product()),
            None => (0, 0),
        };
        Ok(Self { rows, columns, values, transposed: slot.is_transposed(part) })
    }

    /// In our layout, once and for all: every forward pass reads it.
    fn matrix(self, device: &Device, dtype: DType) -> Tensor<2> {
        let (rows, columns) = (self.rows, self.columns);
        if !self.transposed {
            let data = TensorData::new(self.values, [rows, columns]);
            return Tensor::from_data(data, (device, dtype));
        }
        let values: Vec<f32> = (0..columns)
            .flat_map(|column| (0..rows).map(move |row| row * columns + column))
            .map(|index| self.values[index])
            .collect();
        Tensor::from_data(TensorData::new(values, [columns, rows]), (device, dtype))
    }

    fn vector(self, device: &Device, dtype: DType) -> Tensor<1> {
        let length = self.values.len();
        Tensor::from_data(TensorData::new(self.values, [length]), (device, dtype))
    }
}

/// By how much two differ, and whether that is less than the rounding of a copy.
fn compare(there: HostTensor, here: &Tensor<2>) -> (f32, bool) {
    let here = here.clone().without_autodiff();
    let there = there.matrix(&here.device(), DType::F32);
    let apart = (there.clone() - here.cast(DType::F32)).abs().max().into_scalar::<f32>();
    let largest = there.abs().max().into_scalar::<f32>();
    (apart, apart <= largest * 0.01)
}

/// Whether a layer with this weight and bias stays as it is, but for rounding.
fn changes_nothing(adaptation: &Adaptation, weight: &Tensor<2>, bias: Option<Tensor<1>>) -> bool {
    let weight = weight.clone().without_autodiff();
    match adaptation {
        Adaptation::LowRank(adapter) => {
            is_no_update(adapter)
                && adapter
                    .lora_bias
                    .iter()
                    .all(|own| own.val().abs().max().into_scalar::<f32>() == 0.0)
                && adapter.base_bias.iter().all(|own| is_same(own, bias.clone()))
                && adapter
                    .magnitude
                    .iter()
                    .all(|own| is_same(own, Some(column_squares(&weight).sqrt())))
        }
        Adaptation::Replacement(part) => {
            part.weight.iter().all(|own| is_same(own, Some(weight.clone())))
                && part.bias.iter().all(|own| is_same(own, bias.clone()))
                && part
                    .tokens
                    .iter()
                    .all(|tokens| is_same(&tokens.rows, Some(tokens.rows_of(&weight))))
        }
    }
}

/// Whether they differ by rounding to f32 only.
fn is_same<const D: usize>(own: &Param<Tensor<D>>, other: Option<Tensor<D>>) -> bool {
    const ROUNDING: f32 = 1e-6;

    /// Values that are compared at a time: of a layer that trained, the first are enough.
    const BLOCK: usize = 1 << 20;

    let Some(other) = other else { return false };
    let (own, other) = (own.val().without_autodiff(), other.without_autodiff());
    let rows = own.dims()[0];
    let block = (BLOCK * rows / own.shape().num_elements().max(1)).max(1);
    (0..rows).step_by(block).all(|start| {
        let [own, other] = [&own, &other]
            .map(|whole| in_full(whole.clone().slice(start..rows.min(start + block))));
        let other = in_dtype(other, own.dtype());
        let largest = other.clone().abs().max().into_scalar::<f32>();
        (own - other).abs().max().into_scalar::<f32>() <= ROUNDING * largest
    })
}

/// Whether A·B is zero. That of a start which is not is taken off again by further ranks, which cancels but for
/// rounding: with the Gram matrices of A and B, ‖A·B‖² = tr(AᵀA BBᵀ), in f64.
fn is_no_update(adapter: &LoraAdapter) -> bool {
    const ROUNDING: f64 = 1e-6;

    let (a, b) = adapter.factors();
    let [a, b] = [a, b].map(|factor| in_full(factor.without_autodiff()));
    if a.dims()[1] == b.dims()[0] {
        // What it does to one vector tells nearly every update that is one.
        let largest = |matrix: Tensor<2>| matrix.abs().max().into_scalar::<f32>();
        let down = b.clone().sum_dim(1); // [rank, 1]
        let most = largest(a.clone()) * largest(down.clone());
        if largest(a.clone().matmul(down)) > 1e-3 * most {
            return false;
        }
    }
    let [a, b] = [a, b].map(|factor| to_host(&factor));
    let scale = a.norm_l2() * b.norm_l2();
    if scale == 0.0 || a.ncols() != b.nrows() {
        return scale == 0.0; // in groups, B has the ranks of one
    }
    let (down, up) = (a.transpose() * &a, &b * b.transpose());
    let squared: f64 = (0..down.ncols())
        .flat_map(|column| (0..down.nrows()).map(move |row| (row, column)))
        .map(|(row, column)| down[(row, column)] * up[(column, row)])
        .sum();
    squared.max(0.0).sqrt() <= ROUNDING * scale
}

/// Whether two tensors of a file are equal to the bit.
fn is_copy(tensors: &SafeTensors<'_>, one: &str, other: &str) -> bool {
    match (tensors.tensor(one), tensors.tensor(other)) {
        (Ok(one), Ok(other)) => one == other,
        _ => false,
    }
}

/// A tensor of a file in f32, or one line about what is wrong with it.
pub(crate) fn read_tensor(
    tensors: &SafeTensors<'_>,
    key: &str,
    shape: &[usize],
) -> Result<Vec<f32>, String> {
    let tensor = tensors.tensor(key).map_err(|_| format!("{key} is missing"))?;
    if tensor.shape() != shape {
        return Err(format!("{key}: expected shape {shape:?}, found {:?}", tensor.shape()));
    }
    let values = to_f32(&tensor)
        .ok_or_else(|| format!("{key}: expected F32, F16 or BF16, found {:?}", tensor.dtype()))?;
    if values.iter().any(|value| !value.is_finite()) {
        return Err(format!("{key}: expected finite values, found NaN or infinity"));
    }
    Ok(values)
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
