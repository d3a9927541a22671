//! Writing an adapter's folder, whole or not at all.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use burn::module::Param;
use burn::tensor::{DType, Tensor};
use safetensors::tensor::{Dtype, TensorView};

use super::config::{AdapterInfo, to_json};
use super::fingerprint::fingerprint;
use super::keys::{Part, Slot, key, parse};
use super::{CONFIG_FILE, FINGERPRINT, WEIGHTS_FILE};
use crate::adapter::LoraAdapter;
use crate::config::{LoraConfig, TrainedBias};
use crate::error::{Error, ErrorKind, Result};
use crate::init::fresh_seed;
use crate::layer::Adaptation;
use crate::problem::ConfigProblem;
use crate::replacement::TokenRows;
use crate::target::{Saved, TargetModules, containers, ends_as, is_named, trains_whole};
use crate::visit::{VisitLora, first_path};

/// Writes the model's adapters, and nothing else of the model, as a new folder in PEFT's format.
///
/// Rank, alpha, targets and variants are read off the adapters themselves, so that the config cannot
/// disagree with the tensors. An adapter with an offset is written in its plain form, of twice the rank.
/// The folder is written under another name beside it and renamed when it is complete.
///
/// # Errors
/// When the folder exists already or cannot be written; when a value is NaN or infinite; when the model
/// is that of a mixed batch; when a part put on by hand does not fit its layer; when it has no adapter, or
/// what the format cannot express: both scaling rules, some layers with and some without DoRA or adapter
/// biases, different dropout, trained tokens or whole layers by names that mean other layers too, or a path
/// that a reader would take for another (one with `_orig_mod` in it).
pub fn save_adapter<M: VisitLora>(
    model: &M,
    folder: impl AsRef<Path>,
    info: &AdapterInfo,
) -> Result<()> {
    let files = adapter_files(model, info, Ok)?;
    let files: Vec<(&str, &[u8])> =
        files.iter().map(|(name, bytes)| (*name, bytes.as_slice())).collect();
    write_folder(folder.as_ref(), &files)
}

/// A mixed batch is no adapter of its own.
pub(crate) fn check_unmixed<M: VisitLora>(model: &M) -> Result<()> {
    let mixed = first_path(model, |_, layer| layer.is_mixed());
    mixed.map_or(Ok(()), |path| Err(ErrorKind::MixedBatch { path }.into()))
}

/// The two files of an adapter's folder, each low-rank adapter in its plain form and then in the one
/// that `form` gives it.
pub(crate) fn adapter_files<M: VisitLora>(
    model: &M,
    info: &AdapterInfo,
    form: impl Fn(LoraAdapter) -> Result<LoraAdapter>,
) -> Result<[(&'static str, Vec<u8>); 2]> {
    check_unmixed(model)?;
    let layers = layers(model, form)?;
    let mut paths = BTreeSet::new();
    let mut adapted = layers.iter().filter(|layer| layer.adaptation.is_some());
    if let Some(layer) = adapted.find(|layer| !paths.insert(&layer.path)) {
        let found = format!("'{}' twice", layer.path);
        return Err(Error::setting("model", "a path of its own for each layer", found));
    }
    let config = describe(&layers)?;
    check_names(&layers, &config)?;
    let json = serde_json::to_string_pretty(&to_json(&config, info))
        .expect("a value of strings and finite numbers is always JSON");
    let tensors = tensors(&layers)?;
    let adapted = layers.iter().filter(|layer| layer.adaptation.is_some());
    let paths: Vec<&str> = adapted.map(|layer| layer.path.as_str()).collect();
    let metadata = HashMap::from([
        ("format".to_owned(), "pt".to_owned()),
        (FINGERPRINT.to_owned(), fingerprint(model, &paths)),
    ]);
    Ok([(CONFIG_FILE, json.into_bytes()), (WEIGHTS_FILE, safetensors_file(&tensors, metadata))])
}

/// The bytes of a safetensors file of f32 tensors.
pub(crate) fn safetensors_file(
    tensors: &[NamedBytes],
    metadata: HashMap<String, String>,
) -> Vec<u8> {
    let views = tensors.iter().map(|(key, shape, bytes)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes);
        (key, view.expect("the bytes were made for the shape"))
    });
    safetensors::serialize(views, Some(metadata))
        .expect("keys are distinct and lengths fit their shapes")
}

/// A layer as the file sees it.
struct Layer {
    path: String,
    slot: Slot,
    adaptation: Option<Adaptation>,
}

fn layers<M: VisitLora>(
    model: &M,
    form: impl Fn(LoraAdapter) -> Result<LoraAdapter>,
) -> Result<Vec<Layer>> {
    let (mut layers, mut failure) = (Vec::new(), None);
    model.visit_lora("", &mut |path, layer| {
        let formed = layer.adaptation().map(|adaptation| -> Result<Adaptation> {
            layer.check_shapes(&adaptation)?; // its parts can be changed by hand
            Ok(match adaptation {
                Adaptation::LowRank(adapter) => Adaptation::LowRank(form(adapter.into_plain())?),
                other => other,
            })
        });
        match formed.transpose() {
            Ok(adaptation) => {
                layers.push(Layer { path: path.to_owned(), slot: Slot::of(layer), adaptation });
            }
            Err(error) => {
                failure.get_or_insert_with(|| error.at(path));
            }
        }
    });
    failure.map_or(Ok(layers), Err)
}

/// The config that describes the adapters that the model has.
fn describe(layers: &[Layer]) -> Result<LoraConfig> {
    let adapted = layers.iter().filter_map(|layer| match &layer.adaptation {
        Some(Adaptation::LowRank(adapter)) => Some((layer.path.as_str(), adapter)),
        _ => None,
    });
    let adapted: Vec<(&str, &LoraAdapter)> = adapted.collect();
    let Some((_, first)) = adapted.first() else {
        return Err(Error::setting("adapter", "a model with adapters", "a model without"));
    };
    fn same<T: PartialEq>(
        adapted: &[(&str, &LoraAdapter)],
        setting: &'static str,
        of: impl Fn(&LoraAdapter) -> T,
    ) -> Result<T> {
        let first = of(adapted[0].1);
        match adapted.iter().find(|(_, adapter)| of(adapter) != first) {
            None => Ok(first),
            Some((path, _)) => {
                let (expected, found) = ("one choice for all layers", format!("another at {path}"));
                Err(Error::setting(setting, expected, found))
            }
        }
    }
    let mut config = LoraConfig::new(
        most_common(adapted.iter().map(|(_, adapter)| adapter.rank())),
        most_common(adapted.iter().map(|(_, adapter)| adapter.alpha())),
    );
    config.scaling = first.scaling_rule();
    same(&adapted, "scaling", LoraAdapter::scaling_rule)?;
    config.dora = same(&adapted, "dora", |adapter| adapter.magnitude.is_some())?;
    config.lora_bias = same(&adapted, "lora_bias", |adapter| adapter.lora_bias.is_some())?;
    config.dropout = same(&adapted, "dropout", LoraAdapter::dropout)?;
    // A pattern's key is a regular expression for the end of the path; this one means one path only.
    let exactly = |path: &str| format!("^{}", regex::escape(path));
    for (path, adapter) in &adapted {
        if adapter.rank() != config.rank {
            config.rank_pattern.push((exactly(path), adapter.rank()));
        }
        if adapter.alpha() != config.alpha {
            config.alpha_pattern.push((exactly(path), adapter.alpha()));
        }
    }
    if adapted.iter().any(|(_, adapter)| adapter.base_bias.is_some()) {
        config.bias = TrainedBias::LoraOnly;
    }
    config.target_modules = match is_beyond_names(layers) {
        true => pattern(layers),
        false => TargetModules::Names(target_names(layers)),
    };
    let is_saved = |layer: &Layer| matches!(&layer.adaptation, Some(Adaptation::Replacement(part)) if part.weight.is_some());
    let is_beyond = |layer: &Layer, name: &str| !is_saved(layer) && trains_whole(&layer.path, name);
    config.modules_to_save = names(layers, is_saved, is_beyond);
    for layer in layers {
        let Some(Adaptation::Replacement(part)) = &layer.adaptation else { continue };
        match (&part.weight, &part.tokens, &part.bias) {
            (None, Some(tokens), _) => {
                // A path that ends with another's is named by that one.
                let entry = (layer.path.clone(), tokens.ids());
                let names = |path: &str, (name, ids): &(String, Vec<usize>)| {
                    ends_as(path, name) && *ids == entry.1
                };
                if !config.trainable_tokens.iter().any(|other| names(&entry.0, other)) {
                    config.trainable_tokens.retain(|other| !names(&other.0, &entry));
                    config.trainable_tokens.push(entry);
                }
            }
            (None, None, Some(_)) => config.bias = TrainedBias::All,
            _ => {}
        }
    }
    check_biases(layers, config.bias)?;
    Ok(config)
}

/// A reader expects a bias for every layer that has one, of those that `bias` means.
fn check_biases(layers: &[Layer], bias: TrainedBias) -> Result<()> {
    let lacks = layers.iter().filter(|layer| layer.slot.has_bias()).find(|layer| {
        let trained = match &layer.adaptation {
            Some(Adaptation::LowRank(adapter)) => adapter.base_bias.is_some(),
            Some(Adaptation::Replacement(part)) => part.bias.is_some(),
            None => bias != TrainedBias::All,
        };
        bias != TrainedBias::None && !trained
    });
    match lacks {
        None => Ok(()),
        Some(layer) => {
            let found = format!("none at {}", layer.path);
            Err(Error::setting("bias", "a trained bias for every layer that has one", found))
        }
    }
}

fn is_target(layer: &Layer) -> bool {
    matches!(layer.adaptation, Some(Adaptation::LowRank(_)))
}

fn target_names(layers: &[Layer]) -> Vec<String> {
    names(layers, is_target, |layer, name| is_beyond(layer, |path| is_named(path, name)))
}

/// Whether names of targets, which `is_named` knows, mean more at this layer than a target: a layer that is
/// none, or a module that holds layers, which PEFT refuses.
fn is_beyond(layer: &Layer, is_named: impl Fn(&str) -> bool) -> bool {
    (!is_target(layer) && is_named(&layer.path)) || containers(&layer.path).any(is_named)
}

/// Whether a list of the targets' names would mean more than the targets, since paths end alike.
fn is_beyond_names(layers: &[Layer]) -> bool {
    let names: BTreeSet<String> = target_names(layers).into_iter().collect();
    let is_named = |path: &str| {
        let mut ends = path.match_indices('.').map(|(dot, _)| &path[dot + 1..]).chain([path]);
        ends.any(|end| names.contains(end))
    };
    layers.iter().any(|layer| is_beyond(layer, is_named))
}

/// The targets by their whole paths, and nothing else.
fn pattern(layers: &[Layer]) -> TargetModules {
    let paths = layers.iter().filter(|layer| is_target(layer));
    let paths: Vec<String> = paths.map(|layer| regex::escape(&layer.path)).collect();
    TargetModules::Pattern(format!("(?:{})", paths.join("|")))
}

/// Whether a reader finds in the config what each layer has. For what trains as a whole and for tokens the
/// format has names alone, which may mean another layer too.
fn check_names(layers: &[Layer], config: &LoraConfig) -> Result<()> {
    let paths: Vec<&str> = layers.iter().map(|layer| layer.path.as_str()).collect();
    let selection = config.select(&paths, None);
    // One too large, or a path to save that is none.
    if let Some(problem) = selection.problems.into_iter().find(ConfigProblem::is_no_regex) {
        return Err(Error::config(vec![problem]));
    }
    let selected = selection.selected;
    let saved = Saved::new(&config.modules_to_save, &mut Vec::new());
    for (layer, selected) in layers.iter().zip(selected) {
        let replacement = match &layer.adaptation {
            Some(Adaptation::Replacement(replacement)) => Some(replacement),
            _ => None,
        };
        let is_saved = replacement.is_some_and(|part| part.weight.is_some());
        let ids = replacement.and_then(|part| part.tokens.as_ref()).map(TokenRows::ids);
        let entries = config.trainable_tokens.iter();
        let meant = entries.filter(|(name, _)| ends_as(&layer.path, name)).map(|(_, ids)| ids);
        let wrong = [
            ("modules_to_save", saved.trains(&layer.path).is_some() != is_saved),
            ("trainable_tokens", !meant.eq(ids.iter())),
            ("target_modules", selected != is_target(layer)),
        ];
        if let Some((setting, _)) = wrong.iter().find(|(_, wrong)| *wrong) {
            let expected = "layers that names can tell from all others";
            let found = format!("'{}', of which they say something else", layer.path);
            return Err(Error::setting(setting, expected, found));
        }
    }
    Ok(())
}

/// The last names of the layers that are meant where they mean nothing else, whole paths elsewhere.
/// `is_beyond` says whether a name means at a layer what it should not.
fn names(
    layers: &[Layer],
    is_meant: impl Fn(&Layer) -> bool,
    is_beyond: impl Fn(&Layer, &str) -> bool,
) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    let mut known = BTreeMap::new();
    for layer in layers.iter().filter(|layer| is_meant(layer)) {
        let name = layer.path.rsplit('.').next().unwrap_or(&layer.path);
        // A digit at the end is a place in a list, which names nothing elsewhere.
        let is_enough = *known.entry(name).or_insert_with(|| {
            let means_more = layers.iter().any(|other| is_beyond(other, name));
            let is_enough = name.parse::<usize>().is_err() && !means_more;
            names.extend(is_enough.then(|| name.to_owned()));
            is_enough
        });
        if !is_enough {
            names.push(layer.path.clone());
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

/// A tensor's key, shape and bytes.
pub(crate) type NamedBytes = (String, Vec<usize>, Vec<u8>);

fn tensors(layers: &[Layer]) -> Result<Vec<NamedBytes>> {
    let mut tensors = Vec::new();
    for Layer { path, slot, adaptation } in layers {
        let mut add = |part: Part, size: usize, values: Vec<f32>| -> Result<()> {
            if values.iter().any(|value| !value.is_finite()) {
                return Err(ErrorKind::NonFiniteAdapter { path: path.clone() }.into());
            }
            let key = key(path, slot.kind, part);
            if parse(&key).is_none_or(|read| read != (path.clone(), part)) {
                let expected = "paths without the words of the format";
                return Err(Error::setting("model", expected, format!("'{path}'")));
            }
            let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            tensors.push((key, slot.torch_shape(part, size), bytes));
            Ok(())
        };
        let matrix = |part, matrix: &Param<Tensor<2>>| {
            to_host(slot.in_torch_order(part, matrix.val().without_autodiff()))
        };
        let vector = |vector: &Param<Tensor<1>>| to_host(vector.val());
        match adaptation {
            None => {}
            Some(Adaptation::LowRank(adapter)) => {
                let rank = adapter.rank();
                add(Part::A, rank, matrix(Part::A, &adapter.lora_a))?;
                add(Part::B, rank, matrix(Part::B, &adapter.lora_b))?;
                let vectors = [
                    (Part::LoraBias, &adapter.lora_bias),
                    (Part::Magnitude, &adapter.magnitude),
                    (Part::BaseBias, &adapter.base_bias),
                ];
                for (part, values) in vectors {
                    if let Some(values) = values {
                        add(part, rank, vector(values))?;
                    }
                }
            }
            Some(Adaptation::Replacement(replacement)) => {
                if let Some(weight) = &replacement.weight {
                    add(Part::Weight, 0, matrix(Part::Weight, weight))?;
                }
                if let Some(bias) = &replacement.bias {
                    add(Part::Bias, 0, vector(bias))?;
                }
                if let Some(tokens) = &replacement.tokens {
                    let rows = matrix(Part::Tokens, &tokens.rows);
                    add(Part::Tokens, tokens.count(), rows)?;
                }
            }
        }
    }
    Ok(tensors)
}

pub(crate) fn to_host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    let data = tensor.without_autodiff().cast(DType::F32).into_data();
    data.try_to_vec().expect("the tensor was just cast to f32")
}

/// Writes a new folder, all files of it or nothing: into a hidden sibling folder, synced, then renamed.
/// A file's name may hold a folder's: `mlx/adapters.safetensors`.
///
/// # Errors
/// When the folder exists already or cannot be written.
pub fn write_folder(folder: &Path, files: &[(&str, &[u8])]) -> Result<()> {
    write_folder_with(folder, |sibling| {
        files.iter().try_for_each(|(name, bytes)| write(&sibling.join(name), bytes))
    })
}

/// The same for files that `fill` writes into the folder that it is given, and syncs itself; for what is
/// too large to be held in memory whole.
///
/// # Errors
/// When the folder exists already or cannot be written, and what `fill` answers.
pub fn write_folder_with<E: From<Error>>(
    folder: &Path,
    fill: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    if folder.exists() {
        return Err(Error::from(ErrorKind::Exists { path: folder.to_owned() }).into());
    }
    let sibling = sibling(folder);
    create_parent(folder)?;
    fs::create_dir(&sibling).map_err(|source| Error::io(&sibling, source))?;
    let written = fill(&sibling).and_then(|()| {
        fs::rename(&sibling, folder).map_err(|source| Error::io(folder, source).into())
    });
    if written.is_err() {
        // The first failure is what the caller must see; a folder that stays behind is named .tmp.
        let _ = fs::remove_dir_all(&sibling);
    }
    written
}

/// Writes a new file, whole or not at all: beside it under a hidden name, synced, then renamed.
///
/// # Errors
/// When the file exists already or cannot be written.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    if path.exists() {
        return Err(ErrorKind::Exists { path: path.to_owned() }.into());
    }
    let sibling = sibling(path);
    let written = write(&sibling, bytes).and_then(|()| {
        // A link never takes another file's name, as a rename would; not every file system has them.
        match fs::hard_link(&sibling, path) {
            Ok(()) => fs::remove_file(&sibling).map_err(|source| Error::io(&sibling, source)),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                Err(ErrorKind::Exists { path: path.to_owned() }.into())
            }
            Err(_) => fs::rename(&sibling, path).map_err(|source| Error::io(path, source)),
        }
    });
    if written.is_err() {
        let _ = fs::remove_file(&sibling); // the first failure is what the caller must see
    }
    written
}

/// A hidden name beside `path` that no other save has, of this process or of one with the same number.
fn sibling(path: &Path) -> PathBuf {
    const SHOWN: usize = 32; // characters of the name, which may be as long as names can be
    let name: String =
        path.file_name().unwrap_or_default().to_string_lossy().chars().take(SHOWN).collect();
    path.with_file_name(format!(".{name}.{:016x}.tmp", fresh_seed()))
}

fn create_parent(path: &Path) -> Result<()> {
    match path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        Some(folder) => fs::create_dir_all(folder).map_err(|source| Error::io(folder, source)),
        None => Ok(()),
    }
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    create_parent(path)?;
    let mut file = File::create(path).map_err(|source| Error::io(path, source))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(|source| Error::io(path, source))
}
