//! The names and shapes of an adapter's tensors.

use burn::tensor::Tensor;

use crate::frozen::LayerKind;
use crate::layer::AdaptableLayer;

const PREFIX: &str = "base_model.model.";

/// What a tensor of a file is to its layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// The down matrix.
    A,
    /// The up matrix.
    B,
    /// The up matrix's bias.
    LoraBias,
    /// DoRA's magnitudes.
    Magnitude,
    /// The trained bias of an adapted layer.
    BaseBias,
    /// The frozen weight of an embedding or head that is adapted or has trained rows, which PEFT adds.
    BaseWeight,
    /// The trained rows of an embedding.
    Tokens,
    /// The weight of a layer that trained as a whole.
    Weight,
    /// The bias of a layer that trained as a whole, or whose bias alone trained.
    Bias,
    /// The frozen weight or bias that a layer had before it trained as a whole, which acts nowhere. PEFT adds
    /// the bias with `bias: all`, and the weight where the number of tokens was changed.
    Replaced,
}

/// The key of one tensor of the layer at `path`.
pub(super) fn key(path: &str, kind: LayerKind, part: Part) -> String {
    let suffix = match (part, kind) {
        (Part::A, LayerKind::Embedding) => ".lora_embedding_A",
        (Part::B, LayerKind::Embedding) => ".lora_embedding_B",
        (Part::A, _) => ".lora_A.weight",
        (Part::B, _) => ".lora_B.weight",
        (Part::LoraBias, _) => ".lora_B.bias",
        (Part::Magnitude, _) => ".lora_magnitude_vector",
        (Part::BaseBias, _) => ".base_layer.bias",
        (Part::BaseWeight, _) => ".base_layer.weight",
        (Part::Tokens, _) => ".token_adapter.trainable_tokens_delta",
        (Part::Weight, _) => ".weight",
        (Part::Bias, _) => ".bias",
        (Part::Replaced, _) => ".original_module.bias",
    };
    format!("{PREFIX}{path}{suffix}")
}

/// The layer's path and the part that a key names; `None` for a key of another form.
///
/// Beside the form that PEFT writes today, these are read: keys with the adapter's name in them
/// (`lora_A.default.weight`), without `base_model.model.`, and with `_orig_mod.` of a compiled model.
pub(super) fn parse(key: &str) -> Option<(String, Part)> {
    const MARKERS: [&str; 9] = [
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
        "base_layer",
        "token_adapter",
        "modules_to_save",
        "original_module",
    ];
    let parts: Vec<&str> = key.split('.').filter(|part| *part != "_orig_mod").collect();
    let parts = parts.strip_prefix(["base_model", "model"].as_slice()).unwrap_or(&parts);
    let (path, part) = match parts.iter().rposition(|part| MARKERS.contains(part)) {
        Some(place) => {
            let part = match (parts[place], &parts[place + 1..]) {
                ("lora_A", ["weight"] | [_, "weight"]) => Part::A,
                ("lora_B", ["weight"] | [_, "weight"]) => Part::B,
                ("lora_B", ["bias"] | [_, "bias"]) => Part::LoraBias,
                ("lora_embedding_A", [] | [_]) => Part::A,
                ("lora_embedding_B", [] | [_]) => Part::B,
                ("lora_magnitude_vector", [] | [_] | [_, "weight"]) => Part::Magnitude,
                ("base_layer", ["weight"]) => Part::BaseWeight,
                ("base_layer", ["bias"]) => Part::BaseBias,
                ("token_adapter", ["trainable_tokens_delta"] | ["trainable_tokens_delta", _]) => {
                    Part::Tokens
                }
                ("modules_to_save", ["weight"] | [_, "weight"]) => Part::Weight,
                ("modules_to_save", ["bias"] | [_, "bias"]) => Part::Bias,
                ("original_module", ["weight" | "bias"]) => Part::Replaced,
                _ => return None,
            };
            let path = &parts[..place];
            // An embedding's frozen weight beside its trained rows.
            let path = match (parts[place], path) {
                ("base_layer", [path @ .., "token_adapter"]) => path,
                _ => path,
            };
            (path, part)
        }
        None => match parts {
            [path @ .., "weight"] => (path, Part::Weight),
            [path @ .., "bias"] => (path, Part::Bias),
            _ => return None,
        },
    };
    (!path.is_empty()).then(|| (path.join("."), part))
}

/// The size of a layer, as far as the shapes of its tensors in a file follow from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) kind: LayerKind,
    d_input: usize,
    d_output: usize,
    groups: usize,
    shape: Vec<usize>,
    bias: bool,
}

impl Slot {
    pub(super) fn of(layer: &dyn AdaptableLayer) -> Self {
        let ([group_input, d_output], groups) = (layer.dims(), layer.groups());
        Self {
            kind: layer.kind(),
            d_input: group_input * groups,
            d_output,
            groups,
            shape: layer.shape(),
            bias: layer.bias().is_some(),
        }
    }

    /// The layer behind a checkpoint's weight of this shape, in torch's order; `a` is the shape of its
    /// down matrix, which says the groups of a convolution.
    pub(super) fn of_checkpoint(
        is_embedding: bool,
        weight: &[usize],
        a: Option<&[usize]>,
        bias: bool,
    ) -> Option<Self> {
        if weight.contains(&0) {
            return None;
        }
        let (kind, shape) = match *weight {
            [vocabulary, width] if is_embedding => (LayerKind::Embedding, vec![vocabulary, width]),
            [d_output, d_input] => (LayerKind::Linear, vec![d_input, d_output]),
            [_, _, _] => (LayerKind::Conv1d, weight.to_vec()),
            [_, _, _, _] => (LayerKind::Conv2d, weight.to_vec()),
            _ => return None,
        };
        let (group_input, d_output, groups) = match kind {
            LayerKind::Linear | LayerKind::Embedding => (shape[0], shape[1], 1),
            _ => {
                let channels = a.map_or(shape[1], |a| a.get(1).copied().unwrap_or(shape[1]));
                let groups = (channels / shape[1].max(1)).max(1);
                (shape[1..].iter().product(), shape[0], groups)
            }
        };
        Some(Self { kind, d_input: group_input * groups, d_output, groups, shape, bias })
    }

    /// `[d_input, d_output]` of the weight as a matrix.
    pub(super) fn matrix_dims(&self) -> [usize; 2] {
        [self.d_input / self.groups, self.d_output]
    }

    pub(super) fn d_output(&self) -> usize {
        self.d_output
    }

    pub(super) fn groups(&self) -> usize {
        self.groups
    }

    /// Whether the layer has a bias.
    pub(super) fn has_bias(&self) -> bool {
        self.bias
    }

    /// Torch's shape of a part; `size` is the rank, or the number of tokens.
    pub(super) fn torch_shape(&self, part: Part, size: usize) -> Vec<usize> {
        let is_conv = matches!(self.kind, LayerKind::Conv1d | LayerKind::Conv2d);
        let ones = vec![1; self.shape.len() - 2];
        match part {
            Part::A if is_conv => {
                let kernel = &self.shape[2..];
                [&[size, self.shape[1] * self.groups], kernel].concat()
            }
            Part::B if is_conv => [vec![self.d_output, size / self.groups], ones].concat(),
            Part::A => vec![size, self.d_input],
            Part::B => vec![self.d_output, size],
            Part::Magnitude if is_conv => [vec![1, self.d_output], ones].concat(),
            Part::LoraBias | Part::Magnitude | Part::BaseBias | Part::Bias | Part::Replaced => {
                vec![self.d_output]
            }
            Part::Tokens => vec![size, self.d_output],
            // Burn's linear layer is [in, out], torch's is [out, in].
            Part::Weight | Part::BaseWeight if self.kind == LayerKind::Linear => {
                vec![self.d_output, self.d_input]
            }
            Part::Weight | Part::BaseWeight => self.shape.clone(),
        }
    }

    /// Whether torch's rows are our columns.
    pub(super) fn is_transposed(&self, part: Part) -> bool {
        match part {
            Part::A | Part::B => true,
            Part::Weight | Part::BaseWeight => self.kind != LayerKind::Embedding,
            _ => false,
        }
    }

    /// One of our matrices in torch's order of values.
    pub(super) fn in_torch_order(&self, part: Part, matrix: Tensor<2>) -> Tensor<2> {
        if self.is_transposed(part) { matrix.transpose() } else { matrix }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINEAR: LayerKind = LayerKind::Linear;

    #[test]
    fn every_key_that_is_written_is_read() {
        for kind in [LINEAR, LayerKind::Embedding, LayerKind::Conv1d, LayerKind::Conv2d] {
            for part in [
                Part::A,
                Part::B,
                Part::LoraBias,
                Part::Magnitude,
                Part::BaseBias,
                Part::BaseWeight,
                Part::Tokens,
                Part::Weight,
                Part::Bias,
                Part::Replaced,
            ] {
                let key = key("model.layers.0.q_proj", kind, part);
                assert_eq!(parse(&key), Some(("model.layers.0.q_proj".to_owned(), part)), "{key}");
            }
        }
    }

    #[test]
    fn older_forms_are_read() {
        for (key, path, part) in [
            ("base_model.model.q.lora_A.default.weight", "q", Part::A),
            ("model.layers.0.q.lora_B.weight", "model.layers.0.q", Part::B),
            ("base_model.model._orig_mod.model.q.lora_A.weight", "model.q", Part::A),
            ("_orig_mod.base_model.model.q.lora_B.bias", "q", Part::LoraBias),
            ("base_model.model.q.lora_magnitude_vector.default.weight", "q", Part::Magnitude),
            ("base_model.model.q.lora_magnitude_vector.weight", "q", Part::Magnitude),
            ("base_model.model.e.lora_embedding_A.default", "e", Part::A),
            ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head", Part::Weight),
            ("base_model.model.lm_head.original_module.weight", "lm_head", Part::Replaced),
            ("base_model.model.e.token_adapter.base_layer.weight", "e", Part::BaseWeight),
        ] {
            assert_eq!(parse(key), Some((path.to_owned(), part)), "{key}");
        }
    }

    #[test]
    fn other_keys_are_not() {
        for key in ["", "weight", "lora_A.weight", "base_model.model.weight", "q.lora_A", "q.x"] {
            assert_eq!(parse(key), None, "{key}");
        }
    }
}
