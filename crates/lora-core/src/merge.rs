//! Folding every adapter of a model into its weights, and taking them out again.

use crate::error::{ErrorKind, Result};
use crate::frozen::LayerKind;
use crate::layer::Rounding;
use crate::visit::VisitLora;

/// What [`merge`] did. Prints as one line.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct MergeReport {
    /// The merged layers, in the model's order.
    pub layers: Vec<MergedLayer>,
}

/// One layer of a merge.
#[derive(Debug, Clone, PartialEq)]
pub struct MergedLayer {
    /// The layer's dotted path.
    pub path: String,
    /// Its kind.
    pub kind: LayerKind,
    /// What the rounding to the weight's dtype cost.
    pub rounding: Rounding,
}

/// Merges every adapted layer, all or none: W' = W + scaling A·B in f32, rounded once.
///
/// # Errors
/// When a layer is merged already or a merged weight would be NaN or infinite; then nothing has
/// changed in the whole model.
pub fn merge<M: VisitLora>(model: &mut M) -> Result<MergeReport> {
    let mut report = MergeReport::default();
    let mut merged = Vec::new();
    let mut failure = None;
    model.visit_lora("", &mut |path, layer| {
        if failure.is_some() {
            return;
        }
        match layer.merged_weights(path) {
            Ok(None) => {}
            Ok(Some((weights, rounding))) => {
                report.layers.push(MergedLayer {
                    path: path.to_owned(),
                    kind: layer.kind(),
                    rounding,
                });
                merged.push(weights);
            }
            Err(error) => failure = Some(error),
        }
    });
    if let Some(error) = failure {
        return Err(error);
    }
    let mut merged = merged.into_iter();
    model.visit_lora_mut("", &mut |_, layer| {
        if layer.adaptation().is_some() {
            layer.set_merged(merged.next());
        }
    });
    Ok(report)
}

/// Takes every adapter out of the weights again, all or none; the bases' very bits are back.
///
/// # Errors
/// When a layer with an adapter is not merged; then nothing has changed.
pub fn unmerge<M: VisitLora>(model: &mut M) -> Result<()> {
    let mut unmerged = None;
    model.visit_lora("", &mut |path, layer| {
        if layer.adaptation().is_some() && !layer.is_merged() {
            unmerged.get_or_insert_with(|| path.to_owned());
        }
    });
    if let Some(path) = unmerged {
        return Err(ErrorKind::NotMerged { path }.into());
    }
    model.visit_lora_mut("", &mut |_, layer| {
        layer.set_merged(None);
    });
    Ok(())
}
