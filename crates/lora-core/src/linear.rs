//! A linear layer with a low-rank adapter, and the slot that a model keeps for it.

use burn::nn::Linear;
use burn::tensor::Tensor;

use crate::adapter::{finished, in_full, updated};
use crate::config::{AdapterConfig, LoraConfig};
use crate::error::Result;
use crate::frozen::{FrozenLinear, apply};
use crate::init::fresh_seed;
use crate::layer::{Adaptable, LoraLayer};
use crate::ops::{as_rows, check_shapes, fold_rows, lora_linear_over, unfolded};
use crate::samples::for_each_row;

/// A frozen linear layer with a trainable low-rank update.
///
/// y = x W + b + scaling (x A) B, with W and b frozen, scaling = alpha / rank.
///
/// # Shapes
/// - input `[..., d_input]`, output `[..., d_output]`
/// - A `[d_input, rank]` (down), B `[rank, d_output]` (up); by default B is Gaussian and A is zero,
///   so that the new layer equals its base
///
/// What every kind of adapted layer has, such as `merge`, is at [`LoraLayer`].
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
pub type LoraLinear = LoraLayer<FrozenLinear>;

impl LoraLayer<FrozenLinear> {
    /// Wraps a linear layer: freezes it and adds a new adapter with scaling alpha / rank.
    ///
    /// A model whose adapters are to be saved, loaded or merged together keeps its layers as
    /// [`AdaptableLinear`], into which a wrapped layer converts.
    ///
    /// # Errors
    /// When `rank` is 0 or above both of the layer's sizes, `alpha` is not a finite number above 0, or the weight is
    /// quantised or in a type that its device does not compute in.
    pub fn wrap(layer: Linear, rank: usize, alpha: f64) -> Result<Self> {
        let config = LoraConfig { seed: fresh_seed(), ..LoraConfig::new(rank, alpha) };
        Self::with_config(layer, &config.resolve("")?)
    }

    /// Wraps a linear layer with an adapter as `config` says.
    ///
    /// # Errors
    /// As [`LoraAdapter::new`](crate::LoraAdapter::new).
    pub fn with_config(layer: Linear, config: &AdapterConfig) -> Result<Self> {
        Self::adapt(layer, config)
    }

    /// y = x W + b + scaling (x A) B; with DoRA, y = (x W + scaling (x A) B) m / ‖W + scaling A·B‖ + b
    /// by column; while merged, y = x W' + b' with the adapted weight, and the adapter gets no gradient.
    ///
    /// # Shapes
    /// - input `[..., d_input]`, output `[..., d_output]`
    ///
    /// # Panics
    /// When the last axis of `input` is not `d_input`; in a mixed batch, when its leading axis is not
    /// the batch.
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        if !self.is_enabled() {
            return self.base.forward(input);
        }
        if let Some(merged) = self.merged() {
            return apply(input, merged.weight.clone(), merged.bias.clone());
        }
        let weight = self.base.weight();
        let [joined, added] = self.biases();
        if let Some(samples) = &self.samples {
            let (a, b, scaling) = self.factors();
            samples.check(&input.dims());
            return fold_rows(input, |rows| {
                let each = |values| for_each_row(values, rows.dims()[0]);
                let down = in_full(rows.clone()).matmul(a).mul_scalar(scaling);
                let update = (down * each(&samples.ranks)).matmul(b);
                let [scale, bias] =
                    [&samples.scale, &samples.bias].map(|own| own.as_ref().map(each));
                let bias = bias.or(added.map(|bias| bias.unsqueeze()));
                updated(apply(rows.clone(), weight, joined), update, scale, bias)
            });
        }
        unfolded(input, |input| {
            if let Some(dropped) = self.adapter.dropped(&input) {
                let (a, b, scaling) = self.factors();
                let update = as_rows(dropped).matmul(a).mul_scalar(scaling).matmul(b);
                let [scale, bias] =
                    [self.column_scale(), added].map(|own| own.map(|values| values.unsqueeze()));
                return updated(apply(as_rows(input), weight, joined), update, scale, bias);
            }
            let rows = as_rows(input.clone().without_autodiff());
            let ((a, b), scaling, dtype) =
                (self.adapter.factors(), self.adapter.scaling(), rows.dtype());
            check_shapes(&rows, &weight, &a, &b);
            // Beside x W as a constant, a bias would get no gradient.
            let (joined, trained) = match joined {
                Some(bias) if bias.is_require_grad() => (None, Some(bias)),
                joined => (joined.map(|bias| bias.without_autodiff()), None),
            };
            let (product, scale) = match self.product_and_column_scale(&rows) {
                Some((product, scale)) => (product, Some(scale)),
                None => {
                    let weight = weight.clone().without_autodiff();
                    (apply(rows.clone(), weight, joined), self.column_scale())
                }
            };
            let output = lora_linear_over(product, input, rows, weight, a, b, scaling);
            let [scale, bias] =
                [scale, trained.or(added)].map(|own| own.map(|values| values.unsqueeze()));
            finished(output, scale, bias, dtype)
        })
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
pub type AdaptableLinear = Adaptable<FrozenLinear>;

impl From<Linear> for Adaptable<FrozenLinear> {
    fn from(layer: Linear) -> Self {
        Self::Dense(layer)
    }
}

impl Adaptable<FrozenLinear> {
    /// The layer's output, `[..., d_input]` to `[..., d_output]`, with the adapter where it has one.
    ///
    /// # Panics
    /// When the last axis of `input` is not `d_input`.
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Dense(layer) => {
                apply(input, layer.weight.val(), layer.bias.as_ref().map(|bias| bias.val()))
            }
            Self::Lora(layer) => layer.forward(input),
            Self::Replaced(layer) => apply(input, layer.weight(), layer.bias()),
        }
    }
}
