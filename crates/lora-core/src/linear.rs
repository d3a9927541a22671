//! A linear layer with a low-rank adapter, and the slot that a model keeps for it.

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::Tensor;

use crate::adapter::LoraAdapter;
use crate::config::{AdapterConfig, LoraConfig};
use crate::error::{ErrorKind, Result};
use crate::frozen::FrozenLinear;
use crate::init::fresh_seed;
use crate::ops::{fold_rows, lora_linear};

/// A frozen linear layer with a trainable low-rank update.
///
/// y = x W + b + scaling (x A) B, with W and b frozen, scaling = alpha / rank.
///
/// # Shapes
/// - input `[..., d_input]`, output `[..., d_output]`
/// - A `[d_input, rank]` (down), B `[rank, d_output]` (up); by default B is Gaussian and A is zero,
///   so that the new layer equals its base
///
/// # Example
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::nn::LinearConfig;
/// use burn::tensor::{Device, Distribution, Tensor};
/// use lora_core::LoraLinear;
///
/// let device = Device::flex().autodiff();
/// let layer = LinearConfig::new(6, 4).init(&device);
/// let layer = LoraLinear::wrap(layer, 2, 4.0)?;
///
/// let x = Tensor::<3>::random([5, 3, 6], Distribution::Default, &device);
/// let y = layer.forward(x);
/// assert_eq!(y.dims(), [5, 3, 4]);
///
/// let gradients = y.sum().backward();
/// assert!(layer.adapter().lora_a.val().grad(&gradients).is_some());
/// assert!(layer.base().weight().grad(&gradients).is_none());
/// # }
/// # Ok::<(), lora_core::Error>(())
/// ```
///
/// Source: "LoRA: Low-Rank Adaptation of Large Language Models",
/// [arXiv:2106.09685](https://arxiv.org/abs/2106.09685).
#[derive(Module, Debug)]
pub struct LoraLinear {
    base: FrozenLinear,
    adapter: LoraAdapter,
    merged: Option<Tensor<2>>, // W + scaling A·B, [d_input, d_output], while merged
}

impl LoraLinear {
    /// Wraps a linear layer: freezes it and adds a new adapter with scaling alpha / rank.
    ///
    /// A model whose adapters are to be saved, loaded or merged together keeps its layers as
    /// [`AdaptableLinear`], into which a wrapped layer converts.
    ///
    /// # Errors
    /// When `rank` is 0 or above both of the layer's sizes, `alpha` is not a finite number above 0, or the weight is quantised.
    pub fn wrap(layer: Linear, rank: usize, alpha: f64) -> Result<Self> {
        let config = LoraConfig { seed: fresh_seed(), ..LoraConfig::new(rank, alpha) };
        Self::with_config(layer, &config.resolve("")?)
    }

    /// Wraps a linear layer with an adapter as `config` says.
    ///
    /// # Errors
    /// When the rank is 0 or above both of the layer's sizes, alpha or a standard deviation is not a finite number above 0, or the weight
    /// is quantised.
    pub fn with_config(layer: Linear, config: &AdapterConfig) -> Result<Self> {
        let adapter = LoraAdapter::new(&layer.weight.val(), config)?;
        Ok(Self::from_parts(layer, adapter))
    }

    pub(crate) fn from_parts(layer: Linear, adapter: LoraAdapter) -> Self {
        Self { base: FrozenLinear::new(layer), adapter, merged: None }
    }

    /// The frozen layer.
    pub fn base(&self) -> &FrozenLinear {
        &self.base
    }

    /// The trainable pair.
    pub fn adapter(&self) -> &LoraAdapter {
        &self.adapter
    }

    /// The trainable pair, to be changed in place.
    pub fn adapter_mut(&mut self) -> &mut LoraAdapter {
        &mut self.adapter
    }

    /// y = x W + b + scaling (x A) B; while merged, y = x W' + b with W' = W + scaling A·B, and the
    /// adapter gets no gradient.
    ///
    /// # Shapes
    /// - input `[..., d_input]`, output `[..., d_output]`
    ///
    /// # Panics
    /// When the last axis of `input` is not `d_input`.
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        if let Some(weight) = &self.merged {
            return self.base.forward_with(input, weight.clone());
        }
        // Beside a half-precision weight the f32 adapter is rounded for the products only.
        let dtype = self.base.weight().dtype();
        let [a, b] = [&self.adapter.lora_a, &self.adapter.lora_b].map(|factor| {
            let factor = factor.val();
            if factor.dtype() == dtype { factor } else { factor.cast(dtype) }
        });
        fold_rows(input, |rows| {
            let output = lora_linear(rows, self.base.weight(), a, b, self.adapter.scaling());
            match self.base.bias() {
                Some(bias) => output + bias.unsqueeze(),
                None => output,
            }
        })
    }

    /// W + scaling A·B, `[d_input, d_output]`, while the layer is merged.
    pub fn merged(&self) -> Option<Tensor<2>> {
        self.merged.clone()
    }

    /// Whether the adapter is folded into the weight at the moment.
    pub fn is_merged(&self) -> bool {
        self.merged.is_some()
    }

    /// Folds the adapter into the weight: computed in f32 (f64 for an f64 adapter), rounded once to the
    /// weight's dtype.
    ///
    /// The base's weight is kept, so that [`unmerge`](Self::unmerge) gives back its very bits; while
    /// merged, this layer's weights take twice the memory.
    ///
    /// # Errors
    /// When the layer is merged already, or a merged weight would be NaN or infinite; then nothing
    /// has changed.
    pub fn merge(&mut self) -> Result<()> {
        self.merged = Some(self.merged_weight("")?);
        Ok(())
    }

    /// Takes the adapter out of the weight again.
    ///
    /// # Errors
    /// When the layer is not merged.
    pub fn unmerge(&mut self) -> Result<()> {
        match self.merged.take() {
            Some(_) => Ok(()),
            None => Err(ErrorKind::NotMerged { path: String::new() }.into()),
        }
    }

    /// A plain layer with the weight W + scaling A·B; the base's weight is dropped.
    ///
    /// # Errors
    /// When a merged weight would be NaN or infinite.
    pub fn into_merged(self) -> Result<Linear> {
        let weight = match self.merged {
            Some(weight) => weight,
            None => self.merged_weight("")?,
        };
        Ok(self.base.into_linear_with(weight))
    }

    /// The plain layer without the adapter.
    pub fn into_base(self) -> Linear {
        self.base.into_linear()
    }

    /// W + scaling A·B in the dtype of W; `path` names the layer in errors.
    pub(crate) fn merged_weight(&self, path: &str) -> Result<Tensor<2>> {
        if self.is_merged() {
            return Err(ErrorKind::AlreadyMerged { path: path.to_owned() }.into());
        }
        let weight = self.base.weight().without_autodiff();
        let dtype = weight.dtype();
        let delta = self.adapter.delta_weight();
        let merged = (weight.cast(delta.dtype()) + delta).cast(dtype);
        // Checked after the rounding: a sum that is finite in f32 may not be in f16.
        if !merged.clone().is_finite().all().into_scalar::<bool>() {
            return Err(ErrorKind::NonFinite { path: path.to_owned() }.into());
        }
        Ok(merged)
    }

    pub(crate) fn set_merged(&mut self, weight: Option<Tensor<2>>) {
        self.merged = weight;
    }
}

/// A model's field for a linear layer that may get an adapter later.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::module::Module;
/// use burn::nn::LinearConfig;
/// use lora_core::{AdaptableLinear, LoraConfig, VisitLora, inject};
///
/// #[derive(Module, Debug, VisitLora)]
/// struct Mlp {
///     up: AdaptableLinear,
///     down: AdaptableLinear,
/// }
///
/// let device = burn::tensor::Device::flex().autodiff();
/// let mlp = Mlp {
///     up: LinearConfig::new(8, 32).init(&device).into(),
///     down: LinearConfig::new(32, 8).init(&device).into(),
/// };
/// let (mlp, report) = inject(mlp, &LoraConfig::new(4, 8.0))?;
/// assert_eq!(report.parameters.trainable, 2 * 4 * (8 + 32));
/// assert!(mlp.up.as_lora().is_some());
/// # }
/// # Ok::<(), lora_core::Error>(())
/// ```
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)] // a few hundred bytes a layer, beside its weights
pub enum AdaptableLinear {
    /// A plain layer.
    Dense(Linear),
    /// A frozen layer with an adapter.
    Lora(LoraLinear),
}

impl From<Linear> for AdaptableLinear {
    fn from(layer: Linear) -> Self {
        Self::Dense(layer)
    }
}

impl From<LoraLinear> for AdaptableLinear {
    fn from(layer: LoraLinear) -> Self {
        Self::Lora(layer)
    }
}

impl AdaptableLinear {
    /// The layer's output, `[..., d_input]` to `[..., d_output]`, with the adapter where it has one.
    ///
    /// # Panics
    /// When the last axis of `input` is not `d_input`.
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Dense(layer) => fold_rows(input, |rows| layer.forward(rows)),
            Self::Lora(layer) => layer.forward(input),
        }
    }

    /// `[d_input, d_output]`.
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Self::Dense(layer) => layer.weight.dims(),
            Self::Lora(layer) => layer.base.dims(),
        }
    }

    /// W, `[d_input, d_output]`, without the adapter.
    pub fn weight(&self) -> Tensor<2> {
        match self {
            Self::Dense(layer) => layer.weight.val(),
            Self::Lora(layer) => layer.base.weight(),
        }
    }

    /// b, `[d_output]`, where the layer has one.
    pub fn bias(&self) -> Option<Tensor<1>> {
        match self {
            Self::Dense(layer) => layer.bias.as_ref().map(|bias| bias.val()),
            Self::Lora(layer) => layer.base.bias(),
        }
    }

    /// The layer with its adapter, where it has one.
    pub fn as_lora(&self) -> Option<&LoraLinear> {
        match self {
            Self::Dense(_) => None,
            Self::Lora(layer) => Some(layer),
        }
    }

    /// The layer with its adapter, to be changed in place.
    pub fn as_lora_mut(&mut self) -> Option<&mut LoraLinear> {
        match self {
            Self::Dense(_) => None,
            Self::Lora(layer) => Some(layer),
        }
    }

    /// Puts an adapter onto a plain layer and freezes it; one that has an adapter keeps it, and the
    /// answer is `false`.
    pub(crate) fn attach(&mut self, adapter: LoraAdapter) -> bool {
        let Self::Dense(layer) = self else { return false };
        // Parameters are handles, so the clone copies no weights.
        *self = Self::Lora(LoraLinear::from_parts(layer.clone(), adapter));
        true
    }
}
