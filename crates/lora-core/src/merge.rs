//! Folding every adapter of a model into its weights, and taking them out again.

use crate::error::{ErrorKind, Result};
use crate::visit::VisitLora;

/// Merges every adapted layer, all or none: W' = W + scaling A·B in f32, rounded once.
///
/// # Errors
/// When a layer is merged already or a merged weight would be NaN or infinite; then nothing has
/// changed in the whole model.
pub fn merge<M: VisitLora>(model: &mut M) -> Result<()> {
    let mut merged = Vec::new();
    let mut failure = None;
    model.visit_lora("", &mut |path, layer| {
        if let (Some(layer), None) = (layer.as_lora(), &failure) {
            match layer.merged_weight(path) {
                Ok(weight) => merged.push(weight),
                Err(error) => failure = Some(error),
            }
        }
    });
    if let Some(error) = failure {
        return Err(error);
    }
    let mut merged = merged.into_iter();
    model.visit_lora_mut("", &mut |_, layer| {
        if let Some(layer) = layer.as_lora_mut() {
            layer.set_merged(merged.next());
        }
    });
    Ok(())
}

/// Takes every adapter out of the weights again, all or none; the bases' very bits are back.
///
/// # Errors
/// When a layer with an adapter is not merged; then nothing has changed.
pub fn unmerge<M: VisitLora>(model: &mut M) -> Result<()> {
    let mut unmerged = None;
    model.visit_lora("", &mut |path, layer| {
        if layer.as_lora().is_some_and(|layer| !layer.is_merged()) {
            unmerged.get_or_insert_with(|| path.to_owned());
        }
    });
    if let Some(path) = unmerged {
        return Err(ErrorKind::NotMerged { path }.into());
    }
    model.visit_lora_mut("", &mut |_, layer| {
        if let Some(layer) = layer.as_lora_mut() {
            layer.set_merged(None);
        }
    });
    Ok(())
}
