//! Differentiable operations with a hand-written backward, for what a backend does in one pass in both directions.

#[cfg(feature = "flex")]
pub(crate) mod training;
