//! Merging an adapter into a checkpoint's files, tensor by tensor.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Tensor, TensorData};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, Metadata};
use serde_json::Value;

use super::config::{read_config, read_fields};
use super::fingerprint::{Sample, of_samples};
use super::keys::{Part, Slot};
use super::load::{Reader, parse_weights, read_weights};
use super::meant::Meant;
use super::save::write_folder_with;
use crate::config::{AdapterConfig, LoraConfig};
use crate::device::check_dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::frozen::{LayerKind, Weights};
use crate::init::Init;
use crate::inject;
use crate::layer::{Adaptation, Rounding, merge_matrix, merge_replacement};
use crate::merge::{MergeReport, MergedLayer};

/// Merges the adapter in the folder `adapter` into the Hugging Face checkpoint in the folder `base`,
/// and writes the result to the new folder `output`: the same files with the adapted tensors changed,
/// each computed in f32 and rounded once to its own dtype.
///
/// A tensor or two are held at a time (with an f32 copy and the update), never the model: a checkpoint that
/// does not fit into memory can be merged. Files that hold no tensors (configs, tokenizer, chat templates)
/// are copied; weights that are none of the model's (those in another format, those that an index or a
/// `model.safetensors` stands beside), which would stay the base's, and other folders are left out and
/// named in the report.
///
/// # Errors
/// When a file cannot be read or is damaged; when the adapter has a tensor for which the checkpoint has
/// no weight of that shape (all of them are named); when it changes an embedding that is also the head
/// (merge the loaded model instead, which parts the two); when the adapter was made over another base;
/// when a weight is in a type that the device does not compute in; when a merged weight would be NaN or infinite;
/// when `output` exists. Then `output` is not there.
///
/// # Example
/// ```no_run
/// let device = burn::tensor::Device::default();
/// let report = lora_core::merge_checkpoint("Llama-3.2-1B", "adapter", "merged", &device)?;
/// println!("{} layers", report.layers.len());
/// # Ok::<(), lora_core::Error>(())
/// ```
pub fn merge_checkpoint(
    base: impl AsRef<Path>,
    adapter: impl AsRef<Path>,
    output: impl AsRef<Path>,
    device: &Device,
) -> Result<MergeReport> {
    merge_checkpoint_with(base, adapter, output, device, &MergeOptions::default())
}

/// What a merge of files asks of the base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MergeOptions {
    /// Whether the adapter must have been made over this very base, as far as its file says which.
    pub check_base: bool,
    /// Whether the checkpoint holds the weights that a PiSSA, OLoRA or similar start left over, and not
    /// the original ones.
    pub residual_base: bool,
}

impl Default for MergeOptions {
    /// Over the original base that the file names.
    fn default() -> Self {
        Self { check_base: true, residual_base: false }
    }
}

/// As [`merge_checkpoint`], but as `options` say.
///
/// # Errors
/// As [`merge_checkpoint`], less what the options allow.
pub fn merge_checkpoint_with(
    base: impl AsRef<Path>,
    adapter: impl AsRef<Path>,
    output: impl AsRef<Path>,
    device: &Device,
    options: &MergeOptions,
) -> Result<MergeReport> {
    let (base, adapter) = (base.as_ref(), adapter.as_ref());
    let device = device.clone().without_autodiff();
    let config = read_config(adapter, options.residual_base)?;
    refuse_other_order(adapter)?;
    let bytes = read_weights(adapter)?;
    let (tensors, made_over) = parse_weights(adapter, &bytes)?;

    let Files { shards, others, left_out } = Files::of(base)?;
    let shards = shards.into_iter().map(Shard::open).collect::<Result<Vec<_>>>()?;
    let plan = Plan::new(adapter, &config, &tensors, &shards, &device)?;
    if let (Some(made_over), true) = (made_over, options.check_base)
        && !plan.is_over(&made_over, &shards, &device)?
    {
        return Err(ErrorKind::OtherBase { path: adapter.to_owned() }.into());
    }
    if plan.changes_tied_embedding(base, &shards)? {
        return Err(Error::setting(
            "base",
            "a head of its own where the adapter changes the embedding",
            "one that is tied to the embedding; load the model and merge it, which parts the two",
        ));
    }

    let mut report = MergeReport { left_out, ..MergeReport::default() };
    write_folder_with::<Error>(output.as_ref(), |folder| {
        for other in &others {
            copy_file(&base.join(other), &folder.join(other))?;
        }
        for shard in &shards {
            plan.write(shard, folder, &tensors, &device, &mut report)?;
        }
        Ok(())
    })?;
    Ok(report)
}

/// An adapter that says `fan_in_fan_out` belongs to weights that are stored `[d_input, d_output]`. A model
/// that was loaded has them in its own order; a square one of a file gives no sign of it.
fn refuse_other_order(adapter: &Path) -> Result<()> {
    let (path, fields) = read_fields(adapter)?;
    match fields.get("fan_in_fan_out") {
        Some(Value::Bool(true)) => {
            let expected = "false, for weights in the order [d_output, d_input]";
            let found = "true; load the model and merge it";
            Err(Error::malformed(&path, "fan_in_fan_out", expected, found))
        }
        _ => Ok(()),
    }
}

/// A copy that is on the disk when this returns.
fn copy_file(from: &Path, to: &Path) -> Result<()> {
    let write_error = |source| Error::io(to, source);
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder).map_err(write_error)?;
    }
    let read_error = |source| Error::io(from, source);
    let mut source = File::open(from).map_err(read_error)?;
    let permissions = source.metadata().map_err(read_error)?.permissions();
    let mut copy = File::create(to).map_err(write_error)?;
    io::copy(&mut source, &mut copy).map_err(write_error)?;
    copy.set_permissions(permissions).map_err(write_error)?;
    copy.sync_all().map_err(write_error)
}

const MODEL_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";

/// The folder of a tokenizer's further chat templates, as transformers writes it.
const TEMPLATES: &str = "additional_chat_templates";

/// How the names of weights end, safetensors and other formats: torch's, TensorFlow's and Flax's, rust-bert's,
/// numpy's, ONNX, GGUF.
const WEIGHTS: [&str; 17] = [
    "safetensors",
    "bin",
    "pt",
    "pth",
    "ckpt",
    "pkl",
    "h5",
    "keras",
    "pb",
    "tflite",
    "msgpack",
    "ot",
    "npz",
    "onnx",
    "onnx_data",
    "gguf",
    "ggml",
];

/// Whether a file that is none of the model's shards holds weights, lists those that do, or makes an adapter
/// of the folder.
fn is_of_other_weights(name: &str) -> bool {
    let list = name.split_once(".index.").filter(|(_, end)| end.ends_with("json"));
    let end = Path::new(list.map_or(name, |(weights, _)| weights)).extension();
    let is_weights = end
        .and_then(|end| end.to_str())
        .is_some_and(|end| WEIGHTS.iter().any(|other| end.eq_ignore_ascii_case(other)));
    is_weights || name == "adapter_config.json"
}

/// What a checkpoint's folder holds.
#[derive(Default)]
struct Files {
    /// The weights.
    shards: Vec<PathBuf>,
    /// What is copied, from the folder on.
    others: Vec<PathBuf>,
    /// The names of what is not.
    left_out: Vec<String>,
}

/// What lies in a folder, by name.
#[derive(Default)]
struct Entries {
    files: Vec<OsString>,
    /// Links that lead nowhere, of weights.
    broken: Vec<OsString>,
    /// What is no file, as it is shown.
    others: Vec<String>,
}

fn entries_of(folder: &Path) -> Result<Entries> {
    let error = |source| Error::io(folder, source);
    let mut entries = Entries::default();
    let Entries { files, broken, others } = &mut entries;
    for entry in fs::read_dir(folder).map_err(error)? {
        let entry = entry.map_err(error)?;
        let name = entry.file_name();
        let shown = name.to_string_lossy().into_owned();
        match fs::metadata(entry.path()) {
            Ok(metadata) if metadata.is_file() => files.push(name),
            Ok(metadata) if metadata.is_dir() => others.push(format!("{shown}/")),
            Ok(_) => others.push(shown),
            // A link that leads nowhere: of what would not be copied anyway, or of a file that is missing.
            Err(_) if shown.starts_with('.') => others.push(shown),
            Err(_) if is_of_other_weights(&shown) => broken.push(name),
            Err(source) => return Err(Error::io(entry.path(), source)),
        }
    }
    files.sort();
    Ok(entries)
}

impl Files {
    fn of(base: &Path) -> Result<Self> {
        let Entries { files: names, broken, others: mut left_out } = entries_of(base)?;
        // One file wins where there are both, as it does where a model is loaded.
        let single = base.join(MODEL_FILE).is_file();
        let listed = match single {
            true => Some(BTreeSet::from([MODEL_FILE.to_owned()])),
            false => shards_of(base)?,
        };
        let mut files = Self::default();
        if let Some(place) = left_out.iter().position(|name| *name == format!("{TEMPLATES}/")) {
            let templates = entries_of(&base.join(TEMPLATES))?;
            files.others.extend(templates.files.iter().map(|name| Path::new(TEMPLATES).join(name)));
            left_out.swap_remove(place);
            let broken = templates.broken.iter().map(|name| name.to_string_lossy().into_owned());
            let others = templates.others.into_iter().chain(broken);
            left_out.extend(others.map(|name| format!("{TEMPLATES}/{name}")));
        }
        files.left_out = left_out;
        for link in broken {
            let name = link.to_string_lossy().into_owned();
            // With neither the one file nor an index, any may be a part of the model.
            if listed.is_none() && name.ends_with(".safetensors") {
                let path = base.join(link);
                fs::metadata(&path).map_err(|source| Error::io(&path, source))?;
            }
            files.left_out.push(name);
        }
        for file in names {
            let name = file.to_string_lossy().into_owned();
            let is_shard = match &listed {
                Some(listed) => listed.contains(&name),
                None => name.ends_with(".safetensors"),
            };
            if is_shard {
                files.shards.push(base.join(file));
            } else if is_of_other_weights(&name) && (single || name != INDEX_FILE) {
                files.left_out.push(name);
            } else {
                files.others.push(file.into());
            }
        }
        files.left_out.sort();
        // A file system may find a name that it writes in another way.
        if listed.is_some_and(|listed| !listed.is_empty() && files.shards.len() != listed.len()) {
            let (expected, found) = ("the files by the names that the index has", "others");
            return Err(Error::malformed(base, "the folder", expected, found));
        }
        if files.shards.is_empty() {
            let (expected, found) = ("a file that ends with .safetensors", "none");
            return Err(Error::malformed(base, "the folder", expected, found));
        }
        Ok(files)
    }
}

/// The names of the model's weight files, as its index lists them; nothing where any file may be one.
fn shards_of(base: &Path) -> Result<Option<BTreeSet<String>>> {
    let index = base.join(INDEX_FILE);
    if fs::symlink_metadata(&index).is_err() {
        return Ok(None);
    }
    let text = fs::read_to_string(&index).map_err(|source| Error::io(&index, source))?;
    let malformed = |place: &str, expected: &str, found: String| {
        Error::malformed(&index, place, expected, found)
    };
    let list: Value = serde_json::from_str(&text)
        .map_err(|source| malformed("the file", "a JSON object", format!("an error: {source}")))?;
    let expected = "an object, from tensors to the names of files beside the index";
    let map = list.get("weight_map").and_then(Value::as_object).ok_or_else(|| {
        let found = list.get("weight_map").map_or("nothing".to_owned(), Value::to_string);
        malformed("weight_map", expected, found)
    })?;
    let mut names = BTreeSet::new();
    for file in map.values() {
        let name = file.as_str().filter(|name| !name.contains(['/', '\\']));
        let name = name.ok_or_else(|| malformed("weight_map", expected, file.to_string()))?;
        if !base.join(name).is_file() {
            let expected = "files of the folder; download the missing one";
            return Err(malformed("weight_map", expected, format!("{name}, which is not there")));
        }
        names.insert(name.to_owned());
    }
    Ok(Some(names))
}

/// One weight file: its header, and where its tensors are.
struct Shard {
    path: PathBuf,
    header: Vec<u8>, // with the length in front
    metadata: Metadata,
}

impl Shard {
    fn open(path: PathBuf) -> Result<Self> {
        let io = |source| Error::io(&path, source);
        let malformed = |found: String| {
            Error::malformed(&path, "the header", "that of a safetensors file", found)
        };
        let mut file = File::open(&path).map_err(io)?;
        let size = file.metadata().map_err(io)?.len();
        let mut length = [0; 8];
        file.read_exact(&mut length).map_err(|_| malformed(format!("{size} bytes in all")))?;
        let length = u64::from_le_bytes(length);
        if length > size.saturating_sub(8) {
            return Err(malformed(format!("a length of {length} in a file of {size} bytes")));
        }
        let mut json = vec![0; length as usize];
        file.read_exact(&mut json).map_err(io)?;
        let metadata: Metadata = serde_json::from_slice(&json)
            .map_err(|source| malformed(format!("an error: {source}")))?;
        let expected = 8 + length + metadata.data_len() as u64;
        if size != expected {
            let (expected, found) = (format!("{expected} bytes"), format!("{size} bytes"));
            return Err(Error::malformed(&path, "the file", expected, found));
        }
        let header = [&length.to_le_bytes()[..], &json].concat();
        Ok(Self { path, header, metadata })
    }

    /// The tensors' names in the order of their bytes.
    fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    /// The bytes of a tensor of this file.
    fn read(&self, name: &str) -> Option<Result<(Vec<u8>, Dtype)>> {
        let info = self.metadata.info(name)?;
        let (start, end) = info.data_offsets;
        let mut bytes = vec![0; end - start];
        let place = SeekFrom::Start((self.header.len() + start) as u64);
        let read = File::open(&self.path)
            .and_then(|mut file| file.seek(place).and_then(|_| file.read_exact(&mut bytes)));
        let read = read.map_err(|source| Error::io(&self.path, source));
        Some(read.map(|()| (bytes, info.dtype)))
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.metadata.info(name).map(|info| info.shape.as_slice())
    }
}

/// What happens to each tensor of the checkpoint.
struct Plan {
    layers: BTreeMap<String, Layer>,
}

/// A layer that the adapter changes.
struct Layer {
    slot: Slot,
    part: inject::Part,
}

impl Plan {
    fn new(
        adapter: &Path,
        config: &LoraConfig,
        tensors: &SafeTensors<'_>,
        shards: &[Shard],
        device: &Device,
    ) -> Result<Self> {
        let find = |name: &str| shards.iter().find_map(|shard| shard.shape(name));
        let mut reader = Reader::new(tensors);
        let mut layers = BTreeMap::new();
        let mut problems = reader.problems();
        let matrices = matrices(shards);
        let meant = Meant::new(config, &matrices)?;
        let mut elsewhere = Vec::new();
        for (path, parts) in reader.layers() {
            let (weight, bias) = (find(&format!("{path}.weight")), find(&format!("{path}.bias")));
            let Some(weight) = weight else {
                elsewhere.push((path, parts));
                continue;
            };
            let a = reader.shape(&path, Part::A);
            // Of a layer that trained as a whole, only its name says that it is an embedding.
            let is_embedding = reader.is_embedding(&path)
                || parts.contains(&Part::Tokens)
                || (parts.contains(&Part::Weight) && bias.is_none() && is_named_so(&path));
            let Some(slot) =
                Slot::of_checkpoint(is_embedding, weight, a.as_deref(), bias.is_some())
            else {
                problems.push(format!("{path}.weight: no layer has the shape {weight:?}"));
                continue;
            };
            if let Some(bias) = bias.filter(|bias| **bias != [slot.d_output()]) {
                let expected = [slot.d_output()];
                problems.push(format!("{path}.bias: expected shape {expected:?}, found {bias:?}"));
                continue;
            }
            let (part, own) = meant.part(&path, &parts, &slot).unzip();
            let own = own.unwrap_or_default();
            let size = match &part {
                Some(inject::Part::LowRank(config)) => config.rank,
                Some(inject::Part::Tokens(ids)) => ids.len(),
                _ => 0,
            };
            // The weight that PEFT writes beside is compared when this layer is merged.
            let needed = own.iter().filter(|part| **part != Part::BaseWeight);
            for part in [Part::BaseWeight, Part::Tokens] {
                reader.note_shared(&path, part);
            }
            problems.extend(needed.flat_map(|part| reader.unfit(&path, &slot, *part, size)));
            for part in parts.iter().filter(|part| !own.contains(part)) {
                problems.extend(match frozen(&path, &slot, *part, shards, device)? {
                    Some(here) => reader.unlike(&path, &slot, *part, &here),
                    None => {
                        let key = super::keys::key(&path, slot.kind, *part);
                        Some(format!("{key} is in the file, but belongs to no target"))
                    }
                });
            }
            let Some(part) = part else { continue };
            let adds_bias = parts.contains(&Part::LoraBias) && bias.is_none();
            if adds_bias {
                problems.push(format!("{path}.bias is not in the checkpoint, and would be needed"));
            }
            layers.insert(path, Layer { slot, part });
        }
        elsewhere.retain(|(path, parts)| !reader.are_second(path, parts));
        let missing = |(path, _): &(String, _)| format!("{path}.weight is not in the checkpoint");
        problems.extend(elsewhere.iter().map(missing));
        let is_bias = |layer: &Layer| matches!(layer.part, inject::Part::Bias);
        let has_bias = |path: &str| find(&format!("{path}.bias")).is_some();
        problems.extend(meant.absent(&matrices, &layers, is_bias, has_bias));
        match problems.is_empty() {
            true => Ok(Self { layers }),
            false => Err(ErrorKind::AdapterMismatch { path: adapter.to_owned(), problems }.into()),
        }
    }

    /// Whether the checkpoint's weights that the adapter changes have this fingerprint. Of those that trained as
    /// a whole, the files do not say whether they are embeddings, which lie the other way round.
    fn is_over(&self, made_over: &str, shards: &[Shard], device: &Device) -> Result<bool> {
        const UNSURE: usize = 6;

        let (mut samples, mut unsure) = (Vec::new(), Vec::new());
        for (path, layer) in &self.layers {
            let name = format!("{path}.weight");
            let weight = read_from(shards, &name, device, |stored| stored.matrix(&layer.slot))?;
            let Some(weight) = weight else { continue };
            let is_matrix = matches!(layer.slot.kind, LayerKind::Linear | LayerKind::Embedding);
            if matches!(layer.part, inject::Part::Whole) && is_matrix && unsure.len() < UNSURE {
                let ways = [weight.clone(), weight.transpose()].map(Sample::of);
                unsure.push((path.clone(), ways));
            } else {
                samples.push((path.clone(), Sample::of(weight)));
            }
        }
        Ok((0..1_usize << unsure.len()).any(|turned| {
            let way = |place: usize| turned >> place & 1;
            let chosen = unsure.iter().enumerate();
            let chosen =
                chosen.map(|(place, (path, ways))| (path.clone(), ways[way(place)].clone()));
            of_samples(samples.iter().cloned().chain(chosen).collect()) == made_over
        }))
    }

    /// Whether the embedding is changed and is the head too, so that the files could not say what is meant:
    /// an adapter leaves the head as it was, and trained tokens change it. A head's weight of its own in the
    /// files parts the two, but for tokens where it is the same weight.
    fn changes_tied_embedding(&self, base: &Path, shards: &[Shard]) -> Result<bool> {
        const HEAD: &str = "lm_head.weight";
        let embeddings =
            self.layers.iter().filter(|(_, layer)| layer.slot.kind == LayerKind::Embedding);
        let is_tied = |(path, layer): (&String, &Layer)| -> Result<bool> {
            let of = |name: &str| shards.iter().find_map(|shard| shard.read(name)).transpose();
            match (&layer.part, shards.iter().any(|shard| shard.shape(HEAD).is_some())) {
                (inject::Part::Tokens(_), false) => Ok(false), // one weight, with its rows, for both
                (inject::Part::Tokens(_), true) => Ok(of(HEAD)? == of(&format!("{path}.weight"))?),
                (_, has_head) => Ok(!has_head),
            }
        };
        let mut changed = false;
        for embedding in embeddings {
            changed |= is_tied(embedding)?;
        }
        if !changed {
            return Ok(false);
        }
        let path = base.join("config.json");
        if !path.exists() {
            return Ok(false);
        }
        let text = fs::read_to_string(&path).map_err(|source| Error::io(&path, source))?;
        let config: serde_json::Value = serde_json::from_str(&text).map_err(|source| {
            Error::malformed(&path, "the file", "a JSON object", format!("an error: {source}"))
        })?;
        Ok(config.get("tie_word_embeddings") != Some(&serde_json::Value::Bool(false)))
    }

    /// Writes the shard with its adapted tensors changed. Sizes and order are those of the shard, so
    /// its header holds for the copy too.
    fn write(
        &self,
        shard: &Shard,
        folder: &Path,
        tensors: &SafeTensors<'_>,
        device: &Device,
        report: &mut MergeReport,
    ) -> Result<()> {
        let read_error = |source| Error::io(&shard.path, source);
        let target = folder.join(shard.path.file_name().unwrap_or_default());
        let write_error = |source| Error::io(&target, source);
        let mut source = File::open(&shard.path).map_err(read_error)?;
        let mut copy = BufWriter::new(File::create(&target).map_err(write_error)?);
        copy.write_all(&shard.header).map_err(write_error)?;
        source.seek(SeekFrom::Start(shard.header.len() as u64)).map_err(read_error)?;
        let mut bytes = Vec::new();
        for name in shard.names() {
            let info = shard.metadata.info(&name).expect("the name is the header's");
            let (start, end) = info.data_offsets;
            bytes.clear();
            bytes.resize(end - start, 0);
            source.read_exact(&mut bytes).map_err(read_error)?;
            let (path, of_layer) = name.rsplit_once('.').unwrap_or((&name, ""));
            if let Some(layer) = self.layers.get(path) {
                let stored = Stored {
                    file: &shard.path,
                    name: &name,
                    dtype: info.dtype,
                    bytes: &bytes,
                    device,
                };
                let changed = match of_layer {
                    "weight" => layer.weight(path, &stored, tensors, report)?,
                    "bias" => layer.bias(path, &stored, tensors)?,
                    _ => None,
                };
                bytes = changed.unwrap_or(bytes);
            }
            copy.write_all(&bytes).map_err(write_error)?;
        }
        let file = copy.into_inner().map_err(|error| write_error(error.into_error()))?;
        file.sync_all().map_err(write_error)
    }
}

/// The paths of the checkpoint's weights that may be layers'.
fn matrices(shards: &[Shard]) -> BTreeSet<String> {
    let weights = shards.iter().flat_map(|shard| {
        let is_matrix = |name: &String| shard.shape(name).is_some_and(|shape| shape.len() >= 2);
        shard.names().into_iter().filter(is_matrix)
    });
    weights.filter_map(|name| Some(name.strip_suffix(".weight")?.to_owned())).collect()
}

/// What `read` makes of the tensor of this name, where one of the files has it.
fn read_from<T>(
    shards: &[Shard],
    name: &str,
    device: &Device,
    read: impl FnOnce(&Stored<'_>) -> Result<T>,
) -> Result<Option<T>> {
    let found = shards.iter().find_map(|shard| Some((&shard.path, shard.read(name)?)));
    let Some((file, tensor)) = found else { return Ok(None) };
    let (bytes, dtype) = tensor?;
    read(&Stored { file, name, dtype, bytes: &bytes, device }).map(Some)
}

/// The checkpoint's weight or bias, as a column, that should stand in a file that has this part beside what
/// trained.
fn frozen(
    path: &str,
    slot: &Slot,
    part: Part,
    shards: &[Shard],
    device: &Device,
) -> Result<Option<Tensor<2>>> {
    match part {
        Part::Weight | Part::BaseWeight => {
            read_from(shards, &format!("{path}.weight"), device, |stored| stored.matrix(slot))
        }
        Part::Bias | Part::BaseBias => {
            let shape = [slot.d_output(), 1];
            read_from(shards, &format!("{path}.bias"), device, |stored| stored.read(shape))
        }
        _ => Ok(None),
    }
}

/// Whether a layer has an embedding's name. GPT-NeoX calls its head `embed_out`.
fn is_named_so(path: &str) -> bool {
    let name = path.rsplit('.').next().unwrap_or(path);
    (name.contains("embed") && name != "embed_out") || ["wte", "shared"].contains(&name)
}

/// A tensor of the checkpoint in its file's bytes.
struct Stored<'a> {
    file: &'a Path,
    name: &'a str,
    dtype: Dtype,
    bytes: &'a [u8],
    device: &'a Device,
}

impl Stored<'_> {
    /// The weight of a layer in our layout: a matrix `[d_input, d_output]`.
    fn matrix(&self, slot: &Slot) -> Result<Tensor<2>> {
        let [d_input, d_output] = slot.matrix_dims();
        match slot.is_transposed(Part::Weight) {
            true => Ok(self.read([d_output, d_input])?.transpose()),
            false => self.read([d_input, d_output]),
        }
    }

    /// The tensor, which has this shape, in its own dtype.
    fn read<const D: usize>(&self, shape: [usize; D]) -> Result<Tensor<D>> {
        let (two, _) = self.bytes.as_chunks::<2>();
        let (data, dtype) = match self.dtype {
            Dtype::F64 => {
                let (eight, _) = self.bytes.as_chunks::<8>();
                let values: Vec<f64> =
                    eight.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect();
                (TensorData::new(values, shape), DType::F64)
            }
            Dtype::F32 => {
                let (four, _) = self.bytes.as_chunks::<4>();
                let values: Vec<f32> =
                    four.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
                (TensorData::new(values, shape), DType::F32)
            }
            Dtype::F16 => {
                let values: Vec<half::f16> =
                    two.iter().map(|bytes| half::f16::from_le_bytes(*bytes)).collect();
                (TensorData::new(values, shape), DType::F16)
            }
            Dtype::BF16 => {
                let values: Vec<half::bf16> =
                    two.iter().map(|bytes| half::bf16::from_le_bytes(*bytes)).collect();
                (TensorData::new(values, shape), DType::BF16)
            }
            other => {
                let expected = "F64, F32, F16 or BF16";
                return Err(Error::malformed(self.file, self.name, expected, format!("{other:?}")));
            }
        };
        check_dtype(self.device, dtype)?;
        Ok(Tensor::from_data(data, (self.device, dtype)))
    }
}

impl Layer {
    /// The weight's new bytes, where the adapter changes it.
    fn weight(
        &self,
        path: &str,
        stored: &Stored<'_>,
        tensors: &SafeTensors<'_>,
        report: &mut MergeReport,
    ) -> Result<Option<Vec<u8>>> {
        if matches!(self.part, inject::Part::Bias) {
            return Ok(None);
        }
        let (weights, rounding) = self.merged(path, stored.matrix(&self.slot)?, tensors)?;
        report.layers.push(MergedLayer { path: path.to_owned(), kind: self.slot.kind, rounding });
        let weight = self.slot.in_torch_order(Part::Weight, weights.weight);
        to_bytes(weight, stored.dtype, path).map(Some)
    }

    /// The bias's new bytes, where the adapter changes it.
    fn bias(
        &self,
        path: &str,
        stored: &Stored<'_>,
        tensors: &SafeTensors<'_>,
    ) -> Result<Option<Vec<u8>>> {
        let bias: Tensor<1> = stored.read([self.slot.d_output()])?;
        // The weight has no part in the bias: it is not compared, nor does a start follow from it.
        let weight = Tensor::<2>::zeros(self.slot.matrix_dims(), (stored.device, bias.dtype()));
        let mut reader = Reader::new(tensors);
        reader.skip(path, Part::BaseWeight);
        if matches!(self.part, inject::Part::Bias) {
            reader.skip(path, Part::Weight);
        }
        let part = match &self.part {
            inject::Part::LowRank(config) => {
                inject::Part::LowRank(AdapterConfig { init: Init::default(), ..*config })
            }
            other => other.clone(),
        };
        let changed = match reader.adaptation(path, &self.slot, &part, &weight)? {
            Adaptation::LowRank(adapter) => {
                let bias = crate::adapter::in_full(bias);
                adapter.output_bias(Some(bias.clone()), bias.dtype())
            }
            Adaptation::Replacement(replacement) => replacement.bias.map(|bias| bias.val()),
        };
        changed.map(|bias| to_bytes(bias, stored.dtype, path)).transpose()
    }

    fn merged(
        &self,
        path: &str,
        weight: Tensor<2>,
        tensors: &SafeTensors<'_>,
    ) -> Result<(Weights, Rounding)> {
        if self.slot.groups() > 1 && matches!(self.part, inject::Part::LowRank(_)) {
            return Err(ErrorKind::GroupedConvolution { path: path.to_owned() }.into());
        }
        match Reader::new(tensors).adaptation(path, &self.slot, &self.part, &weight)? {
            Adaptation::LowRank(adapter) => merge_matrix(weight, None, &adapter, path),
            Adaptation::Replacement(replacement) => {
                merge_replacement(weight, None, &replacement, path)
            }
        }
    }
}

/// The values of a tensor, rounded to the file's dtype if they are not of it; an error where one is not
/// finite there.
fn to_bytes<const D: usize>(tensor: Tensor<D>, dtype: Dtype, path: &str) -> Result<Vec<u8>> {
    let cast = match dtype {
        Dtype::F64 => DType::F64,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        _ => DType::F32,
    };
    let rounded = tensor.cast(cast);
    match rounded.clone().is_finite().all().into_scalar::<bool>() {
        true => Ok(rounded.into_data().into_bytes().to_vec()),
        false => Err(ErrorKind::NonFinite { path: path.to_owned() }.into()),
    }
}

/// The paths that a set of keys names, each with its parts.
pub(super) type Layers = BTreeMap<String, BTreeSet<Part>>;
