//! Attaching adapters to a model's targets and freezing the rest.

use std::fmt;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::Tensor;

use crate::adapter::LoraAdapter;
use crate::config::{AdapterConfig, LoraConfig, Patterns};
use crate::error::{Error, ErrorKind, Result};
use crate::linear::AdaptableLinear;
use crate::problem::{ConfigProblem, ranges};
use crate::target::Selection;
use crate::trainable::{ParameterCount, grouped};
use crate::visit::VisitLora;

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
    /// Values in A and B together.
    pub parameters: usize,
}

/// A linear layer that got no adapter.
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
#[derive(Debug, Clone, PartialEq)]
pub struct InjectReport {
    /// The adapted layers, in the model's order.
    pub adapted: Vec<AdaptedLayer>,
    /// The linear layers without an adapter, in the model's order.
    pub not_adapted: Vec<UnadaptedLayer>,
    /// The model's parameters afterwards.
    pub parameters: ParameterCount,
}

/// Freezes the model and attaches a new adapter to every target of `config`.
///
/// # Errors
/// When an entry of a list or a pattern of `config` matches nothing, the settings contradict each other,
/// a number cannot be used ([`ErrorKind::Config`] tells all of it at once), or a target has an adapter
/// already. All of it is checked before anything is attached.
pub fn inject<M: Module + VisitLora>(model: M, config: &LoraConfig) -> Result<(M, InjectReport)> {
    let targets = resolve_targets(&model, config, |mut selection| {
        if !config.modules_to_save.is_empty() {
            selection.problems.push(ConfigProblem::setting(
                "modules_to_save",
                "none, since whole modules cannot be trained yet",
                config.modules_to_save.join(", "),
            ));
        }
        selection.into_result()
    })?;
    attach(model, targets, |config, layer| LoraAdapter::new(&layer.weight(), config))
}

/// The targets of `config` in the model's order; `accept` decides about problems.
pub(crate) fn resolve_targets<M: VisitLora>(
    model: &M,
    config: &LoraConfig,
    accept: impl FnOnce(Selection) -> Result<Vec<bool>>,
) -> Result<Vec<(String, AdapterConfig)>> {
    let mut layers = Vec::new();
    model.visit_lora("", &mut |path, layer| layers.push((path.to_owned(), layer)));
    let paths: Vec<&str> = layers.iter().map(|(path, _)| path.as_str()).collect();
    let selected = accept(config.select(&paths, model.output_layer()))?;

    let mut problems = Vec::new();
    let patterns = Patterns::new(config, &mut problems);
    if !problems.is_empty() {
        return Err(Error::config(problems));
    }
    let mut targets = Vec::new();
    for ((path, layer), _) in layers.iter().zip(selected).filter(|(_, selected)| *selected) {
        if layer.as_lora().is_some() {
            return Err(ErrorKind::AlreadyAdapted { path: path.clone() }.into());
        }
        targets.push((path.clone(), patterns.resolve(path)));
    }
    Ok(targets)
}

/// Freezes the model and attaches what `make` gives for each target, which must be in the model's
/// order.
pub(crate) fn attach<M: Module + VisitLora>(
    model: M,
    targets: Vec<(String, AdapterConfig)>,
    mut make: impl FnMut(&AdapterConfig, &AdaptableLinear) -> Result<LoraAdapter>,
) -> Result<(M, InjectReport)> {
    // A parameter that was never read is a recipe, shared by the clones of the model: freezing it would
    // freeze them too. Reading it first makes this model's value its own.
    model.visit(&mut ReadAll);
    let mut model = model.no_grad();
    let mut adapted = Vec::with_capacity(targets.len());
    let mut not_adapted = Vec::new();
    let mut targets = targets.into_iter().peekable();
    let mut failure = None;
    model.visit_lora_mut("", &mut |path, layer| {
        let Some((_, config)) = targets.next_if(|(target, _)| target == path) else {
            if layer.as_lora().is_none() {
                not_adapted.push(UnadaptedLayer { path: path.to_owned(), dims: layer.dims() });
            }
            return;
        };
        match make(&config, layer) {
            Ok(adapter) => {
                adapted.push(AdaptedLayer {
                    path: path.to_owned(),
                    dims: layer.dims(),
                    rank: config.rank,
                    alpha: config.alpha,
                    scaling: config.scaling(),
                    parameters: adapter.num_parameters(),
                });
                layer.attach(adapter);
            }
            Err(error) => failure = failure.take().or(Some(error)),
        }
    });
    if let Some(error) = failure {
        return Err(error);
    }
    let parameters = ParameterCount::of(&model);
    Ok((model, InjectReport { adapted, not_adapted, parameters }))
}

struct ReadAll;

impl ModuleVisitor for ReadAll {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let _ = param.val();
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
        let others = self.not_adapted.iter().map(|other| (&other.path, other.dims));
        let name = last_name(&layer.path);
        adapted
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
