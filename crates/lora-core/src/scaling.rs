//! The factor on the low-rank update.

/// How the factor on the update follows from alpha and rank.
///
/// This is the only place where the factor is computed; an adapter carries the result.
///
/// ```
/// use lora_core::Scaling;
///
/// assert_eq!(Scaling::AlphaOverRank.factor(16.0, 8), 2.0);
/// assert_eq!(Scaling::AlphaOverSqrtRank.factor(16.0, 4), 8.0);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Scaling {
    /// `alpha / rank`, from "LoRA: Low-Rank Adaptation of Large Language Models"
    /// ([arXiv:2106.09685](https://arxiv.org/abs/2106.09685), section 4.1).
    #[default]
    AlphaOverRank,
    /// `alpha / sqrt(rank)`, rank-stabilised LoRA
    /// ([arXiv:2312.03732](https://arxiv.org/abs/2312.03732)).
    AlphaOverSqrtRank,
}

impl Scaling {
    /// The factor for one layer.
    pub fn factor(self, alpha: f64, rank: usize) -> f64 {
        match self {
            Self::AlphaOverRank => alpha / rank as f64,
            Self::AlphaOverSqrtRank => alpha / (rank as f64).sqrt(),
        }
    }
}
