//! Attaching adapters to a model's targets and freezing the rest.

use std::collections::BTreeSet;
use std::fmt;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::Tensor;

use crate::config::{AdapterConfig, LoraConfig, Patterns, TrainedBias};
use crate::error::{ErrorKind, Result};
use crate::frozen::{LayerKind, frozen};
use crate::layer::{AdaptableLayer, Adaptation};
use crate::problem::{ConfigProblem, ranges};
use crate::replacement::{Replacement, TokenRows};
use crate::target::{Saved, Selection, TargetModules, ends_as, name_matches_nothing};
use crate::trainable::{ParameterCount, grouped};
use crate::visit::{VisitLora, first_path};

/// What one layer got.
#[derive(Debug, Clone, PartialEq)]
pub struct AdaptedLayer {
    /// The layer's dotted path.
    pub path: String,
    /// `[d_input, d_output]` of the layer.
    pub dims: [usize; 2],
    /// Columns of A and rows of B.
    pub rank: usize,
    /// Numerator of the scaling factor.
    pub alpha: f64,
    /// The factor on the update.
    pub scaling: f64,
    /// Values that train.
    pub parameters: usize,
}

/// Values of a layer that train in full.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplacedValues {
    /// The layer's dotted path.
    pub path: String,
    /// `[d_input, d_output]` of the layer.
    pub dims: [usize; 2],
    /// Which values: the whole layer, its bias, or how many tokens.
    pub what: String,
    /// Values that train.
    pub parameters: usize,
}

/// A layer that got no adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnadaptedLayer {
    /// The layer's dotted path.
    pub path: String,
    /// `[d_input, d_output]` of the layer.
    pub dims: [usize; 2],
}

/// What [`inject`] did. Prints as a table, one line for each name, shape, rank and alpha; then the
/// layers that were left out; then what trains.
///
/// ```text
/// module  layers          shape  rank  alpha  scaling  parameters  indices
/// q_proj  24 of 30    576 x 576     8     16        2     221,184     0-23
/// v_proj  24 of 30    576 x 192     8     16        2     147,456     0-23
/// not adapted: k_proj 30, q_proj 6, v_proj 6, lm_head 1
/// trainable: 368,640 of 134,883,648 (0.273 %)
/// ```
///
/// `24 of 30`: so many of the model's layers of this name and shape. `indices`, where any line is not
/// whole, is the first number in the layers' paths.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct InjectReport {
    /// The adapted layers, in the model's order.
    pub adapted: Vec<AdaptedLayer>,
    /// The layers of which values train in full, in the model's order.
    pub replaced: Vec<ReplacedValues>,
    /// The layers that nothing adapts, in the model's order: linear ones, and embeddings and convolutions where
    /// others of their kind have an adapter.
    pub not_adapted: Vec<UnadaptedLayer>,
    /// The model's parameters afterwards.
    pub parameters: ParameterCount,
}

/// The model with everything frozen but what adapts it already.
pub(crate) fn frozen_beside_adapters<M: Module + VisitLora>(model: M) -> M {
    let mut adaptations = Vec::new();
    model.visit_lora("", &mut |_, layer| adaptations.push(layer.adaptation()));
    let mut model = frozen(model);
    let mut adaptations = adaptations.into_iter();
    model.visit_lora_mut("", &mut |_, layer| {
        if let Some(adaptation) = adaptations.next().flatten() {
            layer.restore(adaptation);
        }
    });
    model
}

/// Freezes the model and attaches what `config` asks for to each layer.
///
/// # Errors
/// When an entry of a list or a pattern of `config` matches nothing, the settings contradict each other,
/// a number cannot be used ([`ErrorKind::Config`] tells all of it at once), a target has an adapter
/// already, or a layer is merged: all of it is checked before anything is attached. When a target or its adapter
/// is in a type that the device does not compute in.
pub fn inject<M: Module + VisitLora>(model: M, config: &LoraConfig) -> Result<(M, InjectReport)> {
    check_unmerged(&model)?;
    let plan = Plan::new(&model, config, |mut selection, problems| {
        selection.problems.extend(problems);
        selection.problems.extend(biases_elsewhere(&model, config));
        selection.into_result()
    })?;
    check_bare(&model, |path| plan.parts.iter().any(|(planned, _)| planned == path))?;
    attach(model, plan, |path, part, layer| match part {
        Part::LowRank(config) => {
            let adapter = layer.new_adapter(config).map_err(|error| error.at(path))?;
            Ok(Adaptation::LowRank(adapter))
        }
        Part::Whole => Ok(Adaptation::Replacement(layer.copy_of_layer())),
        Part::Bias => {
            let bias = layer.copy_of_layer().bias;
            Ok(Adaptation::Replacement(Replacement { weight: None, bias, tokens: None }))
        }
        Part::Tokens(ids) => {
            let tokens = TokenRows::new(&layer.weight(), ids).map_err(|error| error.at(path))?;
            let tokens = Some(tokens);
            Ok(Adaptation::Replacement(Replacement { weight: None, bias: None, tokens }))
        }
    })
}

/// A model of which some layers are merged and others not could be neither merged nor unmerged.
pub(crate) fn check_unmerged<M: VisitLora>(model: &M) -> Result<()> {
    let merged = first_path(model, |_, layer| layer.is_merged());
    merged.map_or(Ok(()), |path| Err(ErrorKind::AlreadyMerged { path }.into()))
}

/// What is to be adapted must not be so already.
pub(crate) fn check_bare<M: VisitLora>(model: &M, is_meant: impl Fn(&str) -> bool) -> Result<()> {
    let adapted = first_path(model, |path, layer| layer.adaptation().is_some() && is_meant(path));
    adapted.map_or(Ok(()), |path| Err(ErrorKind::AlreadyAdapted { path }.into()))
}

/// What one layer is to get.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Part {
    LowRank(AdapterConfig),
    Whole,
    Bias,
    Tokens(Vec<usize>),
}

/// What each layer is to get, in the model's order.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Plan {
    pub(crate) parts: Vec<(String, Part)>,
}

impl Plan {
    /// Follows `config`; `accept` decides about the problems of the targets and, apart, of the rest.
    pub(crate) fn new<M: VisitLora>(
        model: &M,
        config: &LoraConfig,
        accept: impl FnOnce(Selection, Vec<ConfigProblem>) -> Result<Vec<bool>>,
    ) -> Result<Self> {
        let mut layers = Vec::new();
        model.visit_lora("", &mut |path, layer| layers.push((path.to_owned(), layer)));
        let is_candidate = |layer: &&dyn AdaptableLayer| {
            config.target_modules != TargetModules::AllLinear || layer.kind() == LayerKind::Linear
        };
        let candidates = layers.iter().filter(|(_, layer)| is_candidate(layer));
        let candidates: Vec<&str> = candidates.map(|(path, _)| path.as_str()).collect();
        let selection = config.select(&candidates, model.output_layer());

        let mut problems = Vec::new();
        let patterns = Patterns::new(config, &mut problems);
        let saved = Saved::new(&config.modules_to_save, &mut problems);
        let targets = candidates.iter().zip(&selection.selected).filter(|(_, selected)| **selected);
        let targets: BTreeSet<&str> = targets.map(|(path, _)| *path).collect();
        problems.extend(saved.clashes(targets.iter().copied()));
        let mut parts = Vec::new();
        for (path, layer) in &layers {
            let tokens = config.trainable_tokens.iter().filter(|(name, _)| ends_as(path, name));
            let tokens: Vec<&(String, Vec<usize>)> = tokens.collect();
            let part = if saved.trains(path).is_some() {
                Part::Whole
            } else if targets.contains(path.as_str()) {
                Part::LowRank(patterns.resolve(path))
            } else if let Some((_, ids)) = tokens.first() {
                Part::Tokens(ids.clone())
            } else if config.bias == TrainedBias::All && layer.bias().is_some() {
                Part::Bias
            } else {
                continue;
            };
            if let (Some((name, _)), false) = (tokens.first(), matches!(part, Part::Tokens(_))) {
                problems.push(ConfigProblem::setting(
                    "trainable_tokens",
                    "an embedding that nothing else trains",
                    format!("'{name}', which another setting adapts too"),
                ));
            } else if matches!(part, Part::Tokens(_)) && layer.kind() != LayerKind::Embedding {
                let found = format!("'{path}', a {} layer", layer.kind().name());
                problems.push(ConfigProblem::setting("trainable_tokens", "an embedding", found));
            }
            problems.extend(second_entry(config, path));
            if let (Part::LowRank(AdapterConfig { lora_bias: true, .. }), LayerKind::Embedding) =
                (&part, layer.kind())
            {
                let found = format!("true at '{path}'");
                problems.push(ConfigProblem::setting("lora_bias", "false for an embedding", found));
            }
            parts.push((path.clone(), part));
        }
        let paths: Vec<&str> = layers.iter().map(|(path, _)| path.as_str()).collect();
        problems.extend(saved.unmatched(&paths));
        for (name, _) in &config.trainable_tokens {
            if !paths.iter().any(|path| ends_as(path, name)) {
                problems.push(name_matches_nothing("trainable_tokens", name, &paths));
            }
        }
        // A layer that trains as a whole does so without this setting.
        let trains_bias = |(path, part): &(String, Part)| {
            matches!(part, Part::LowRank(_) | Part::Bias)
                && layers.iter().any(|(other, layer)| other == path && layer.bias().is_some())
        };
        if config.bias != TrainedBias::None && !parts.iter().any(trains_bias) {
            let expected = "none where no layer that it means has a bias";
            let found = if config.bias == TrainedBias::All { "all" } else { "lora_only" };
            problems.push(ConfigProblem::setting("bias", expected, found));
        }
        accept(selection, problems)?;
        Ok(Self { parts })
    }
}

/// A problem where a layer is meant by more than one entry of trained tokens.
pub(crate) fn second_entry(config: &LoraConfig, path: &str) -> Option<ConfigProblem> {
    let mut entries = config.trainable_tokens.iter().filter(|(name, _)| ends_as(path, name));
    let (name, _) = entries.nth(1)?;
    Some(ConfigProblem::setting(
        "trainable_tokens",
        "one entry for an embedding",
        format!("'{name}', which means '{path}' again"),
    ))
}

/// With `bias: all`, biases of layers that have no slot cannot train, and that must not go unseen.
fn biases_elsewhere<M: Module + VisitLora>(
    model: &M,
    config: &LoraConfig,
) -> Option<ConfigProblem> {
    if config.bias != TrainedBias::All {
        return None;
    }
    let mut in_slots = 0;
    model.visit_lora("", &mut |_, layer| in_slots += usize::from(layer.bias().is_some()));
    let mut found = Biases::default();
    model.visit(&mut found);
    (found.names.len() > in_slots).then(|| {
        let elsewhere = found.names.len() - in_slots;
        let expected = "a model whose biases are all in adaptable layers";
        let names = found.names.join(", ");
        ConfigProblem::setting("bias", expected, format!("{elsewhere} elsewhere among {names}"))
    })
}

/// The paths of a model's biases, in Burn's names.
#[derive(Default)]
struct Biases {
    path: Vec<String>,
    names: Vec<String>,
}

impl ModuleVisitor for Biases {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, _param: &Param<Tensor<D>>) {
        if D == 1 && self.path.last().is_some_and(|name| name == "bias" || name == "beta") {
            self.names.push(self.path.join("."));
        }
    }
}

/// Freezes the model and attaches what `make` gives for each part of the plan. A failure changes
/// nothing.
pub(crate) fn attach<M: Module + VisitLora>(
    model: M,
    plan: Plan,
    mut make: impl FnMut(&str, &Part, &dyn AdaptableLayer) -> Result<Adaptation>,
) -> Result<(M, InjectReport)> {
    let mut model = frozen_beside_adapters(model);
    let mut parts = plan.parts.into_iter().peekable();
    let mut failure = None;
    model.visit_lora_mut("", &mut |path, layer| {
        if failure.is_some() {
            return;
        }
        let part = parts.next_if(|(planned, _)| planned == path);
        let attached = match &part {
            Some((_, part)) => make(path, part, layer)
                .and_then(|adaptation| layer.attach(adaptation).map_err(|error| error.at(path))),
            None => Ok(()),
        };
        failure = attached.err();
    });
    if let Some(error) = failure {
        return Err(error);
    }
    let report = InjectReport::of(&model);
    Ok((model, report))
}

impl InjectReport {
    /// What the model's layers have at the moment.
    pub fn of<M: Module + VisitLora>(model: &M) -> Self {
        let mut report = Self { parameters: ParameterCount::of(model), ..Self::default() };
        // Of an embedding or a convolution it says something that it has no adapter only where others have.
        let mut kinds = vec![LayerKind::Linear];
        model.visit_lora("", &mut |_, layer| {
            if matches!(layer.adaptation(), Some(Adaptation::LowRank(_))) {
                kinds.push(layer.kind());
            }
        });
        model.visit_lora("", &mut |path, layer| report.note(path, layer, &kinds));
        report
    }

    fn note(&mut self, path: &str, layer: &dyn AdaptableLayer, kinds: &[LayerKind]) {
        let (path, dims) = (path.to_owned(), layer.dims());
        match layer.adaptation() {
            Some(Adaptation::LowRank(adapter)) => self.adapted.push(AdaptedLayer {
                path,
                dims,
                rank: adapter.rank(),
                alpha: adapter.alpha(),
                scaling: adapter.scaling(),
                parameters: adapter.num_parameters(),
            }),
            Some(Adaptation::Replacement(replacement)) => self.replaced.push(ReplacedValues {
                path,
                dims,
                what: replacement.what(),
                parameters: replacement.num_parameters(),
            }),
            None if kinds.contains(&layer.kind()) => {
                self.not_adapted.push(UnadaptedLayer { path, dims });
            }
            None => {}
        }
    }
}

impl fmt::Display for InjectReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let groups = self.groups();
        let whole = groups.iter().all(|group| group.len() == self.total(group[0]));
        let head =
            ["module", "layers", "shape", "rank", "alpha", "scaling", "parameters", "indices"];
        let mut rows = vec![head.map(str::to_owned)];
        rows.extend(groups.iter().map(|group| self.row(group)));
        // Which layers they are is of interest only where some are missing.
        let columns = head.len() - usize::from(whole);
        let width =
            |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &rows {
            write!(f, "{:<width$}", row[0], width = widths[0])?;
            for (cell, width) in row.iter().zip(&widths).skip(1) {
                write!(f, "  {cell:>width$}")?;
            }
            writeln!(f)?;
        }
        for replaced in &self.replaced {
            let ReplacedValues { path, what, parameters, .. } = replaced;
            writeln!(f, "in full: {path}, {what}, {} parameters", grouped(*parameters))?;
        }
        if !self.not_adapted.is_empty() {
            writeln!(f, "not adapted: {}", self.left_out())?;
        }
        write!(f, "trainable: {}", self.parameters)
    }
}

impl InjectReport {
    /// The layers that share their last name, shape, rank and alpha, in the order of the first.
    fn groups(&self) -> Vec<Vec<&AdaptedLayer>> {
        let mut groups: Vec<Vec<&AdaptedLayer>> = Vec::new();
        for layer in &self.adapted {
            let same = |group: &&mut Vec<&AdaptedLayer>| {
                let first = group[0];
                last_name(&first.path) == last_name(&layer.path)
                    && (first.dims, first.rank) == (layer.dims, layer.rank)
                    && (first.alpha, first.scaling) == (layer.alpha, layer.scaling)
            };
            match groups.iter_mut().find(same) {
                Some(group) => group.push(layer),
                None => groups.push(vec![layer]),
            }
        }
        groups
    }

    /// How many layers of this name and shape the model has.
    fn total(&self, layer: &AdaptedLayer) -> usize {
        let adapted = self.adapted.iter().map(|other| (&other.path, other.dims));
        let replaced = self.replaced.iter().map(|other| (&other.path, other.dims));
        let others = self.not_adapted.iter().map(|other| (&other.path, other.dims));
        let name = last_name(&layer.path);
        adapted
            .chain(replaced)
            .chain(others)
            .filter(|(path, dims)| last_name(path) == name && *dims == layer.dims)
            .count()
    }

    fn row(&self, group: &[&AdaptedLayer]) -> [String; 8] {
        let first = group[0];
        let [d_input, d_output] = first.dims;
        let mut indices: Vec<usize> =
            group.iter().filter_map(|layer| first_index(&layer.path)).collect();
        indices.sort_unstable();
        indices.dedup();
        [
            last_name(&first.path).to_owned(),
            format!("{} of {}", group.len(), self.total(first)),
            format!("{d_input} x {d_output}"),
            first.rank.to_string(),
            first.alpha.to_string(),
            rounded(first.scaling),
            grouped(group.iter().map(|layer| layer.parameters).sum()),
            ranges(&indices),
        ]
    }

    /// `k_proj 30, lm_head 1`, in the model's order.
    fn left_out(&self) -> String {
        let mut counts: Vec<(&str, usize)> = Vec::new();
        for layer in &self.not_adapted {
            let name = last_name(&layer.path);
            match counts.iter_mut().find(|(other, _)| *other == name) {
                Some((_, count)) => *count += 1,
                None => counts.push((name, 1)),
            }
        }
        let counts: Vec<String> =
            counts.iter().map(|(name, count)| format!("{name} {count}")).collect();
        counts.join(", ")
    }
}

fn last_name(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

fn first_index(path: &str) -> Option<usize> {
    path.split('.').find_map(|part| part.parse().ok())
}

/// At most four decimals, and none that say nothing.
fn rounded(number: f64) -> String {
    let text = format!("{number:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(adapted: &[(&str, [usize; 2], usize, f64)], rest: &[&str]) -> InjectReport {
        let adapted = adapted.iter().map(|(path, dims, rank, alpha)| AdaptedLayer {
            path: (*path).to_owned(),
            dims: *dims,
            rank: *rank,
            alpha: *alpha,
            scaling: alpha / *rank as f64,
            parameters: rank * (dims[0] + dims[1]),
        });
        let rest =
            rest.iter().map(|path| UnadaptedLayer { path: (*path).to_owned(), dims: [96, 48] });
        InjectReport {
            replaced: Vec::new(),
            adapted: adapted.collect(),
            not_adapted: rest.collect(),
            parameters: ParameterCount { trainable: 10, total: 1000 },
        }
    }

    #[test]
    fn a_report_of_mixed_ranks_and_long_names() {
        let text = report(
            &[
                ("model.layers.0.self_attn.v_proj", [96, 48], 8, 16.0),
                ("model.layers.0.mlp.a_projection_with_a_long_name", [4096, 14336], 256, 0.5),
                ("model.layers.1.self_attn.v_proj", [96, 48], 8, 16.0),
                ("model.layers.3.self_attn.v_proj", [96, 48], 3, 16.0),
            ],
            &["model.layers.2.self_attn.v_proj", "lm_head"],
        )
        .to_string();
        let expected = "\
module                        layers         shape  rank  alpha  scaling  parameters  indices
v_proj                        2 of 4       96 x 48     8     16        2       2,304      0-1
a_projection_with_a_long_name 1 of 1  4096 x 14336   256    0.5    0.002   4,718,592        0
v_proj                        1 of 4       96 x 48     3     16   5.3333         432        3
not adapted: v_proj 1, lm_head 1
trainable: 10 of 1,000 (1.000 %)";
        let squeezed = |text: &str| -> Vec<String> {
            text.lines().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
        };
        assert_eq!(squeezed(&text), squeezed(expected), "{text}");
        let table = text.lines().take(4).map(|line| line.chars().count());
        assert_eq!(table.collect::<std::collections::BTreeSet<_>>().len(), 1, "{text}");
    }

    #[test]
    fn a_whole_report_has_no_indices() {
        let text = report(&[("layers.0.q", [4, 4], 2, 2.0), ("layers.1.q", [4, 4], 2, 2.0)], &[]);
        let text = text.to_string();
        assert!(text.contains("2 of 2") && !text.contains("indices"), "{text}");
        assert!(!text.contains("not adapted"), "{text}");
    }
}
