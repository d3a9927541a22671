//! The learning rates of A and B.

use burn::module::ParamGroup;

use crate::error::{Error, Result};
use crate::frozen::LayerKind;
use crate::visit::VisitLora;

/// LoRA+: B learns `ratio` times as fast as everything else.
///
/// B is the **up** matrix, `[rank, d_output]`. Which of the two starts at zero does not matter for the
/// ratio, since it comes from the lengths of the sums: an entry of x A adds up `d_input` terms, an entry
/// of (x A) B only `rank`. A step of A of a given size moves the output more, the wider the layer is,
/// and a step of B does not; at one rate for both, B learns too slowly in a wide model. The paper finds
/// ratios of about 16 good where the tasks are hard. With this library's default start, A = 0, B has no
/// gradient in the first step, and moves from the second on.
///
/// ```
/// use lora_core::LearningRates;
///
/// let rates = LearningRates::new(2e-4, 16.0)?;
/// assert_eq!((rates.base(), rates.lora_b()), (2e-4, 16.0 * 2e-4));
/// # Ok::<(), lora_core::Error>(())
/// ```
///
/// Source: "LoRA+: Efficient Low Rank Adaptation of Large Models",
/// [arXiv:2402.12354](https://arxiv.org/abs/2402.12354).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LearningRates {
    base: f64,
    ratio: f64,
}

impl LearningRates {
    /// A rate for everything that trains, and the factor on it for B; 1 is plain LoRA.
    ///
    /// # Errors
    /// When the rate is not a finite number of at least 0, or the ratio not a finite number above 0.
    pub fn new(base: f64, ratio: f64) -> Result<Self> {
        if !(base.is_finite() && base >= 0.0) {
            return Err(Error::setting("learning_rate", "a finite number of at least 0", base));
        }
        if !(ratio.is_finite() && ratio > 0.0) {
            return Err(Error::setting("lora_plus_ratio", "a finite number above 0", ratio));
        }
        Ok(Self { base, ratio })
    }

    /// The rate of everything but B.
    pub fn base(self) -> f64 {
        self.base
    }

    /// The rate of B.
    pub fn lora_b(self) -> f64 {
        self.base * self.ratio
    }

    /// The parameters that [`lora_b`](Self::lora_b) is for: the up matrices of the model's adapters,
    /// known by their ids and not by a part of a name.
    ///
    /// An embedding's is not among them: its x has a single one, and x A is no sum. Nor are biases and
    /// magnitudes.
    pub fn lora_b_parameters<M: VisitLora>(model: &M) -> ParamGroup {
        let mut ids = Vec::new();
        model.visit_lora("", &mut |_, layer| {
            if layer.kind() != LayerKind::Embedding {
                ids.extend(layer.adapter().map(|adapter| adapter.lora_b.id));
            }
        });
        ParamGroup::from_ids(ids)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_that_cannot_be_used_are_refused() {
        for (base, ratio, name) in [
            (-1.0, 1.0, "learning_rate"),
            (f64::NAN, 1.0, "learning_rate"),
            (1.0, 0.0, "lora_plus_ratio"),
            (1.0, f64::INFINITY, "lora_plus_ratio"),
        ] {
            let error = LearningRates::new(base, ratio).unwrap_err().to_string();
            assert!(error.starts_with(name), "{error}");
        }
    }

    #[test]
    #[cfg(feature = "flex")]
    fn only_the_up_matrices_are_meant() {
        use burn::nn::{EmbeddingConfig, LinearConfig};

        use crate::{AdaptableEmbedding, AdaptableLinear, LoraEmbedding, LoraLinear};

        let device = crate::device_from_env().unwrap();
        let linear = LoraLinear::wrap(LinearConfig::new(6, 4).init(&device), 2, 4.0).unwrap();
        let embedding =
            LoraEmbedding::wrap(EmbeddingConfig::new(9, 4).init(&device), 2, 4.0).unwrap();
        let adapters = [linear.adapter().clone(), embedding.adapter().clone()];
        let model: (AdaptableEmbedding, AdaptableLinear) = (embedding.into(), linear.into());
        let group = LearningRates::lora_b_parameters(&model);
        let is_meant = |id| group.matches(&id, None);
        assert!(is_meant(adapters[0].lora_b.id) && !is_meant(adapters[0].lora_a.id));
        assert!(!is_meant(adapters[1].lora_b.id) && !is_meant(adapters[1].lora_a.id));
    }
}
