//! The names of an adapter's tensors.

const PREFIX: &str = "base_model.model.";

/// Which of a layer's two matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Factor {
    A,
    B,
}

impl Factor {
    pub(super) const BOTH: [Self; 2] = [Self::A, Self::B];

    fn suffix(self) -> &'static str {
        match self {
            Self::A => ".lora_A.weight",
            Self::B => ".lora_B.weight",
        }
    }
}

/// The key of one matrix of the layer at `path`.
pub(super) fn key(path: &str, factor: Factor) -> String {
    format!("{PREFIX}{path}{}", factor.suffix())
}
