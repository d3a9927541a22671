//! Folding every adapter of a model into its weights, and taking them out again.

use std::fmt;

use crate::error::{ErrorKind, Result};
use crate::frozen::LayerKind;
use crate::layer::{AdaptableLayer, Adaptation, Rounding};
use crate::visit::VisitLora;

/// What [`merge`] did. Prints as one line, and others where a tie was parted or files were left out.
///
/// ```text
/// merged 169 layers (168 linear, 1 embedding); rounding lost at most 0.31 % of an update, in model.layers.2.mlp.up_proj
/// the output keeps the frozen weight of model.embed_tokens: the two are tied no more
/// ```
#[derive(Debug, Clone, PartialEq, Default)]
pub struct MergeReport {
    /// The merged layers, in the model's order.
    pub layers: Vec<MergedLayer>,
    /// The embedding that was merged while the output, which shares its weight, keeps the frozen one.
    /// A model that is written out needs a head of its own then.
    pub parted: Option<String>,
    /// Of [`merge_checkpoint`](crate::merge_checkpoint): what of the base was not copied, the names of folders
    /// and of those files that hold weights, by their endings, and are none of the model's own.
    pub left_out: Vec<String>,
}

impl fmt::Display for MergeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.layers.len() == 1 { "" } else { "s" };
        write!(f, "merged {} layer{plural}", self.layers.len())?;
        let mut kinds: Vec<(&str, usize)> = Vec::new();
        for layer in &self.layers {
            match kinds.iter_mut().find(|(name, _)| *name == layer.kind.name()) {
                Some((_, count)) => *count += 1,
                None => kinds.push((layer.kind.name(), 1)),
            }
        }
        if kinds.len() > 1 {
            let kinds: Vec<String> =
                kinds.iter().map(|(name, count)| format!("{count} {name}")).collect();
            write!(f, " ({})", kinds.join(", "))?;
        }
        let lost = |layer: &&MergedLayer| layer.rounding.lost;
        let worst = self.layers.iter().max_by(|one, other| lost(one).total_cmp(&lost(other)));
        if let Some(worst) = worst.filter(|worst| worst.rounding.lost > 0.0) {
            let percent = 100.0 * worst.rounding.lost;
            write!(f, "; rounding lost at most {percent:.2} % of an update, in {}", worst.path)?;
        }
        if let Some(embedding) = &self.parted {
            write!(
                f,
                "\nthe output keeps the frozen weight of {embedding}: the two are tied no more"
            )?;
        }
        if !self.left_out.is_empty() {
            let files = self.left_out.join(", ");
            write!(f, "\nnot copied, being folders or weights that are not merged: {files}")?;
        }
        Ok(())
    }
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
/// When a layer is merged already, is a grouped convolution with an adapter or of a mixed batch, or a merged
/// weight would be NaN or infinite; then nothing has changed in the whole model.
pub fn merge<M: VisitLora>(model: &mut M) -> Result<MergeReport> {
    let mut report = MergeReport::default();
    let mut merged = Vec::new();
    let mut failure = None;
    let mut has_output = false;
    model.visit_lora("", &mut |path, layer| {
        has_output |= model.output_layer() == Some(path);
        if failure.is_some() {
            return;
        }
        if model.tied_embedding() == Some(path) && changes_embedding_only(layer) {
            report.parted = Some(path.to_owned());
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
    if has_output {
        report.parted = None; // an output layer of its own
    }
    let mut merged = merged.into_iter();
    model.visit_lora_mut("", &mut |_, layer| {
        if layer.adaptation().is_some() {
            layer.set_merged(merged.next());
        }
    });
    Ok(report)
}

/// Whether what adapts an embedding acts on it, and not on the output that shares its weight.
fn changes_embedding_only(layer: &dyn AdaptableLayer) -> bool {
    match layer.adaptation() {
        Some(Adaptation::LowRank(_)) => true,
        Some(Adaptation::Replacement(replacement)) => replacement.weight.is_some(),
        None => false,
    }
}

/// Takes every adapter out of the weights again, all or none; the bases' very bits are back.
///
/// # Errors
/// When a layer with an adapter is not merged, or no layer is; then nothing has changed.
pub fn unmerge<M: VisitLora>(model: &mut M) -> Result<()> {
    let (mut unmerged, mut any) = (None, false);
    model.visit_lora("", &mut |path, layer| {
        any |= layer.is_merged();
        if layer.adaptation().is_some() && !layer.is_merged() {
            unmerged.get_or_insert_with(|| path.to_owned());
        }
    });
    if !any {
        unmerged.get_or_insert_default();
    }
    if let Some(path) = unmerged {
        return Err(ErrorKind::NotMerged { path }.into());
    }
    model.visit_lora_mut("", &mut |_, layer| {
        layer.set_merged(None);
    });
    Ok(())
}
