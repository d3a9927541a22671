//! An embedding with a low-rank adapter.

use burn::module::{Module, Param};
use burn::nn::Embedding;
use burn::tensor::{Int, Tensor, module::embedding};

use crate::adapter::{full_of, in_dtype, updated};
use crate::config::{AdapterConfig, LoraConfig};
use crate::error::Result;
use crate::frozen::{FrozenLayer, LayerKind, Weights, frozen, frozen_param};
use crate::init::fresh_seed;
use crate::layer::{Adaptable, LoraLayer};
use crate::ops::{fold_rows, product};

/// An embedding that never trains: y = the rows of W that are asked for.
///
/// # Shapes
/// - input `[batch, length]`, output `[batch, length, d_output]`; W `[vocabulary, d_output]`
#[derive(Module, Debug)]
pub struct FrozenEmbedding {
    weight: Param<Tensor<2>>, // [vocabulary, d_output]
}

impl FrozenLayer for FrozenEmbedding {
    type Plain = Embedding;

    const KIND: LayerKind = LayerKind::Embedding;

    fn from_plain(layer: Embedding) -> Self {
        Self { weight: frozen(layer).weight }
    }

    fn into_plain(self) -> Embedding {
        Embedding { weight: self.weight }.set_require_grad(true)
    }

    fn weight(&self) -> Tensor<2> {
        self.weight.val()
    }

    fn bias(&self) -> Option<Tensor<1>> {
        None
    }

    fn shape(&self) -> Vec<usize> {
        self.weight.dims().to_vec()
    }

    fn with(self, weights: Weights) -> Self {
        Self { weight: frozen_param(weights.weight) }
    }
}

/// A frozen embedding with a trainable low-rank update.
///
/// y = W\[ids\] + scaling A\[ids\] B
///
/// # Shapes
/// - input `[batch, length]`, output `[batch, length, d_output]`
/// - W `[vocabulary, d_output]`, A `[vocabulary, rank]` (down), B `[rank, d_output]` (up)
///
/// By default B is Gaussian and A is zero, which for embeddings is PEFT's choice too. Dropout does not
/// act: there is no input to drop values of.
///
/// What every kind of adapted layer has, such as `merge`, is at [`LoraLayer`].
///
/// # Example
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::nn::EmbeddingConfig;
/// use burn::tensor::{Device, Int, Tensor};
/// use lora_core::LoraEmbedding;
///
/// let device = Device::flex().autodiff();
/// let layer = LoraEmbedding::wrap(EmbeddingConfig::new(10, 4).init(&device), 2, 4.0)?;
/// let ids = Tensor::<2, Int>::from_ints([[3, 1, 4]], &device);
/// assert_eq!(layer.forward(ids).dims(), [1, 3, 4]);
/// # }
/// # Ok::<(), lora_core::Error>(())
/// ```
///
/// Source: "LoRA", [arXiv:2106.09685](https://arxiv.org/abs/2106.09685); PEFT's `Embedding`.
pub type LoraEmbedding = LoraLayer<FrozenEmbedding>;

impl LoraLayer<FrozenEmbedding> {
    /// Wraps an embedding: freezes it and adds a new adapter with scaling alpha / rank.
    ///
    /// # Errors
    /// As [`LoraLinear`](crate::LoraLinear)'s `wrap`.
    pub fn wrap(layer: Embedding, rank: usize, alpha: f64) -> Result<Self> {
        let config = LoraConfig { seed: fresh_seed(), ..LoraConfig::new(rank, alpha) };
        Self::with_config(layer, &config.resolve("")?)
    }

    /// Wraps an embedding with an adapter as `config` says.
    ///
    /// # Errors
    /// As [`LoraLinear::with_config`](crate::LoraLinear::with_config), and with `lora_bias`.
    pub fn with_config(layer: Embedding, config: &AdapterConfig) -> Result<Self> {
        Self::adapt(layer, config)
    }

    /// The rows of the adapted weight: `[batch, length]` to `[batch, length, d_output]`.
    ///
    /// # Panics
    /// In a mixed batch, when the leading axis of `ids` is not the batch.
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        if !self.is_enabled() {
            return embedding(self.base.weight(), ids);
        }
        if let Some(merged) = self.merged() {
            return embedding(merged.weight.clone(), ids);
        }
        let ((a, b), scaling) = (self.adapter.factors(), self.adapter.scaling());
        if let Some(samples) = &self.samples {
            samples.check(&ids.dims());
        }
        let for_sample = |values: &Tensor<2>| values.clone().unsqueeze_dim::<3>(1);
        let frozen = embedding(self.base.weight(), ids.clone());
        let dtype = full_of([frozen.dtype()]);
        let b = in_dtype(b, dtype);
        let down = in_dtype(embedding(a, ids), dtype).mul_scalar(scaling); // [batch, length, rank]
        let down = match &self.samples {
            Some(samples) => down * for_sample(&samples.ranks),
            None => down,
        };
        let scale = match &self.samples {
            Some(samples) => samples.scale.as_ref().map(for_sample),
            None => self.column_scale().map(|scale| scale.unsqueeze()),
        };
        updated(frozen, fold_rows(down, |down| down.matmul(b)), scale, None)
    }
}

/// A model's field for an embedding that may be adapted later.
pub type AdaptableEmbedding = Adaptable<FrozenEmbedding>;

impl From<Embedding> for Adaptable<FrozenEmbedding> {
    fn from(layer: Embedding) -> Self {
        Self::Dense(layer)
    }
}

impl Adaptable<FrozenEmbedding> {
    /// The rows that are asked for, as what adapts the embedding has them: `[batch, length]` to
    /// `[batch, length, d_output]`.
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        match self {
            Self::Dense(layer) => layer.forward(ids),
            Self::Lora(layer) => layer.forward(ids),
            Self::Replaced(layer) => {
                let [batch, length] = ids.dims();
                let looked_up = embedding(layer.weight(), ids.clone());
                match layer.tokens() {
                    Some(tokens) if batch * length > 0 => {
                        let ids = ids.reshape([batch * length]);
                        fold_rows(looked_up, |rows| tokens.put_over(rows, ids))
                    }
                    _ => looked_up,
                }
            }
        }
    }

    /// The logits of a head that is tied to this embedding, h Wᵀ: `[rows, d_output]` to
    /// `[rows, vocabulary]`.
    ///
    /// As in PEFT, the head shares the frozen weight and the trained token rows; a low-rank update or a
    /// trained copy of the embedding is the embedding's alone, merged or not.
    pub fn tied_logits(&self, hidden: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Dense(layer) => product(hidden, layer.weight.val().transpose()),
            Self::Lora(layer) => product(hidden, layer.base.weight().transpose()),
            Self::Replaced(layer) => {
                let logits = product(hidden.clone(), layer.base.weight().transpose());
                match layer.tokens() {
                    Some(tokens) => tokens.put_over_logits(logits, hidden),
                    None => logits,
                }
            }
        }
    }
}
