//! Attaching adapters to a model's targets and freezing the rest.

use std::fmt;

use burn::module::Module;

use crate::adapter::LoraAdapter;
use crate::config::{AdapterConfig, LoraConfig};
use crate::error::{ErrorKind, Result};
use crate::frozen::{LayerKind, frozen};
use crate::layer::{AdaptableLayer, Adaptation};
use crate::target::{TargetModules, Unmatched};
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

/// What [`inject`] did. Prints as a table, one line for each name and shape.
#[derive(Debug, Clone, PartialEq)]
pub struct InjectReport {
    /// The adapted layers, in the model's order.
    pub adapted: Vec<AdaptedLayer>,
    /// The model's parameters afterwards.
    pub parameters: ParameterCount,
}

/// Freezes the model and attaches a new adapter to every target of `config`.
///
/// # Errors
/// When an entry of the targets matches no layer, a number in `config` cannot be used, or a target
/// has an adapter already. All of it is checked before anything is attached.
pub fn inject<M: Module + VisitLora>(model: M, config: &LoraConfig) -> Result<(M, InjectReport)> {
    let targets = resolve_targets(&model, config, Unmatched::IsError)?;
    attach(model, targets, |config, layer| {
        LoraAdapter::grouped(&layer.weight(), layer.bias().as_ref(), layer.groups(), config)
            .map(Adaptation::LowRank)
    })
}

/// The targets of `config` in the model's order.
pub(crate) fn resolve_targets<M: VisitLora>(
    model: &M,
    config: &LoraConfig,
    unmatched: Unmatched,
) -> Result<Vec<(String, AdapterConfig)>> {
    let mut layers = Vec::new();
    model.visit_lora("", &mut |path, layer| layers.push((path.to_owned(), layer)));
    if config.target_modules == TargetModules::AllLinear {
        layers.retain(|(_, layer)| layer.kind() == LayerKind::Linear);
    }
    let paths: Vec<&str> = layers.iter().map(|(path, _)| path.as_str()).collect();
    let selected = config.target_modules.select_with(&paths, model.output_layer(), unmatched)?;

    let mut targets = Vec::new();
    for ((path, layer), _) in layers.iter().zip(selected).filter(|(_, selected)| *selected) {
        if layer.adaptation().is_some() {
            return Err(ErrorKind::AlreadyAdapted { path: path.clone() }.into());
        }
        targets.push((path.clone(), config.resolve(path)?));
    }
    Ok(targets)
}

/// Freezes the model and attaches what `make` gives for each target, which must be in the model's
/// order.
pub(crate) fn attach<M: Module + VisitLora>(
    model: M,
    targets: Vec<(String, AdapterConfig)>,
    mut make: impl FnMut(&AdapterConfig, &dyn AdaptableLayer) -> Result<Adaptation>,
) -> Result<(M, InjectReport)> {
    let mut model = frozen(model);
    let mut adapted = Vec::with_capacity(targets.len());
    let mut targets = targets.into_iter().peekable();
    let mut failure = None;
    model.visit_lora_mut("", &mut |path, layer| {
        let Some((_, config)) = targets.next_if(|(target, _)| target == path) else { return };
        let made = make(&config, layer).and_then(|adaptation| {
            let parameters = adaptation.num_parameters();
            layer.attach(adaptation).map(|()| parameters)
        });
        match made {
            Ok(parameters) => {
                adapted.push(AdaptedLayer {
                    path: path.to_owned(),
                    dims: layer.dims(),
                    rank: config.rank,
                    alpha: config.alpha,
                    scaling: config.scaling(),
                    parameters,
                });
            }
            Err(error) => failure = failure.take().or(Some(error)),
        }
    });
    if let Some(error) = failure {
        return Err(error);
    }
    let parameters = ParameterCount::of(&model);
    Ok((model, InjectReport { adapted, parameters }))
}

impl fmt::Display for InjectReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<16} {:>7} {:>13} {:>5} {:>7} {:>8} {:>12}",
            "module", "layers", "shape", "rank", "alpha", "scaling", "parameters"
        )?;
        for (name, layers) in self.by_name() {
            let first = layers[0];
            let [d_input, d_output] = first.dims;
            writeln!(
                f,
                "{:<16} {:>7} {:>13} {:>5} {:>7} {:>8.4} {:>12}",
                name,
                layers.len(),
                format!("{d_input} x {d_output}"),
                first.rank,
                first.alpha,
                first.scaling,
                grouped(layers.iter().map(|layer| layer.parameters).sum()),
            )?;
        }
        write!(f, "trainable: {}", self.parameters)
    }
}

impl InjectReport {
    /// The layers that share their last name, shape, rank and alpha, in the order of the first.
    fn by_name(&self) -> Vec<(&str, Vec<&AdaptedLayer>)> {
        let mut groups: Vec<(&str, Vec<&AdaptedLayer>)> = Vec::new();
        for layer in &self.adapted {
            let name = layer.path.rsplit('.').next().unwrap_or(&layer.path);
            let same = |group: &&mut (&str, Vec<&AdaptedLayer>)| {
                let first = group.1[0];
                group.0 == name
                    && (first.dims, first.rank) == (layer.dims, layer.rank)
                    && (first.alpha, first.scaling) == (layer.alpha, layer.scaling)
            };
            match groups.iter_mut().find(same) {
                Some(group) => group.1.push(layer),
                None => groups.push((name, vec![layer])),
            }
        }
        groups
    }
}
