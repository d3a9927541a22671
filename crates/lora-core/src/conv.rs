//! Convolutions with a low-rank adapter.

use burn::module::{Module, Param, ParamId};
use burn::nn::conv::{Conv1d, Conv2d};
use burn::tensor::Tensor;
use burn::tensor::module::{conv1d, conv2d};
use burn::tensor::ops::ConvOptions;

use crate::adapter::{in_full, updated};
use crate::config::{AdapterConfig, LoraConfig};
use crate::error::Result;
use crate::frozen::{FrozenLayer, LayerKind, Weights, frozen, frozen_param};
use crate::init::fresh_seed;
use crate::layer::{Adaptable, LoraLayer};

/// A convolution over one axis that never trains.
///
/// # Shapes
/// - input `[batch, channels_in, length]`, output `[batch, channels_out, length_out]`
#[derive(Module, Debug)]
pub struct FrozenConv1d {
    layer: Conv1d,
}

/// A convolution over two axes that never trains.
///
/// # Shapes
/// - input `[batch, channels_in, height, width]`, output `[batch, channels_out, height_out, width_out]`
#[derive(Module, Debug)]
pub struct FrozenConv2d {
    layer: Conv2d,
}

/// What the convolutions share; D is 2 more than the axes of the kernel.
trait Convolution<const D: usize>: FrozenLayer {
    /// The convolution of this layer with another weight, `[channels_out, channels_in / groups,
    /// kernel...]`.
    fn convolve(
        &self,
        input: Tensor<D>,
        weight: Tensor<D>,
        bias: Option<Tensor<1>>,
        groups: usize,
    ) -> Tensor<D>;

    /// A convolution whose kernel is one point, `[channels_out, channels_in / groups, 1...]`.
    fn pointwise(input: Tensor<D>, weight: Tensor<D>, groups: usize) -> Tensor<D>;

    /// The weight matrix `[channels_in × kernel, channels_out]` as a kernel of this layer's size.
    fn kernel(&self, matrix: Tensor<2>) -> Tensor<D> {
        let mut shape = [1; D];
        shape.copy_from_slice(&self.shape());
        let kernel: usize = shape[2..].iter().product();
        let [d_input, channels_out] = matrix.dims();
        shape[0] = channels_out;
        shape[1] = d_input / kernel;
        matrix.transpose().reshape(shape)
    }

    /// The layer with its weight and bias as given, in matrix form.
    fn apply(&self, input: Tensor<D>, weights: Weights) -> Tensor<D> {
        self.convolve(input, self.kernel(weights.weight), weights.bias, self.groups())
    }
}

/// `[channels_in, channels_out]` as a kernel of one point.
fn point<const D: usize>(matrix: Tensor<2>) -> Tensor<D> {
    let [channels_in, channels_out] = matrix.dims();
    let mut shape = [1; D];
    shape[0] = channels_out;
    shape[1] = channels_in;
    matrix.transpose().reshape(shape)
}

/// A value for each channel, as it stands beside an output.
fn for_channels<const D: usize>(values: Tensor<1>) -> Tensor<D> {
    let mut shape = [1; D];
    shape[1] = values.dims()[0];
    values.reshape(shape)
}

/// Values of each sample and channel, `[batch, channels]`, as they stand beside an output.
fn for_samples<const D: usize>(values: &Tensor<2>) -> Tensor<D> {
    let mut shape = [1; D];
    shape[..2].copy_from_slice(&values.dims());
    values.clone().reshape(shape)
}

/// W as a matrix `[channels_in / groups × kernel, channels_out]`.
fn matrix<const D: usize>(weight: Tensor<D>) -> Tensor<2> {
    let dims = weight.dims();
    let d_input: usize = dims[1..].iter().product();
    weight.reshape([dims[0], d_input]).transpose()
}

/// A tensor in the place of a parameter for one call, as it is: with the gradient that it has.
fn passing<const D: usize>(tensor: Tensor<D>) -> Param<Tensor<D>> {
    Param::initialized(ParamId::new(), tensor)
}

fn forward<const D: usize, F: Convolution<D>>(layer: &LoraLayer<F>, input: Tensor<D>) -> Tensor<D> {
    let base = &layer.base;
    let own = Weights { weight: base.weight(), bias: base.bias() };
    if !layer.is_enabled() {
        return base.apply(input, own);
    }
    if let Some(merged) = layer.merged() {
        return base.apply(input, merged.clone());
    }
    let (a, b, scaling) = layer.factors();
    let own_input = layer.adapter.dropped(&input).unwrap_or_else(|| in_full(input.clone()));
    let down = base.convolve(own_input, base.kernel(a), None, 1).mul_scalar(scaling);
    let down = match &layer.samples {
        Some(samples) => {
            samples.check(&input.dims());
            down * for_samples(&samples.ranks)
        }
        None => down,
    };
    let [joined, added] = layer.biases();
    let frozen = base.apply(input, Weights { bias: joined, ..own });
    let samples = layer.samples.as_ref();
    let scale = match samples {
        Some(samples) => samples.scale.as_ref().map(for_samples),
        None => layer.column_scale().map(for_channels),
    };
    let bias = match samples.and_then(|samples| samples.bias.as_ref()) {
        Some(bias) => Some(for_samples(bias)),
        None => added.map(for_channels),
    };
    updated(frozen, F::pointwise(down, point(b), base.groups()), scale, bias)
}

fn config_for(rank: usize, alpha: f64) -> Result<AdapterConfig> {
    LoraConfig { seed: fresh_seed(), ..LoraConfig::new(rank, alpha) }.resolve("")
}

/// `$dims` is 2 more than `$axes`, those of the kernel.
macro_rules! frozen_convolution {
    ($frozen:ident, $plain:ident, $axes:literal, $dims:literal, $convolution:ident) => {
        impl FrozenLayer for $frozen {
            type Plain = $plain;

            const KIND: LayerKind = LayerKind::$plain;

            fn from_plain(layer: $plain) -> Self {
                Self { layer: frozen(layer) }
            }

            fn into_plain(self) -> $plain {
                self.layer.set_require_grad(true)
            }

            fn weight(&self) -> Tensor<2> {
                matrix(self.layer.weight.val())
            }

            fn bias(&self) -> Option<Tensor<1>> {
                self.layer.bias.as_ref().map(|bias| bias.val())
            }

            fn shape(&self) -> Vec<usize> {
                self.layer.weight.dims().to_vec()
            }

            fn groups(&self) -> usize {
                self.layer.groups
            }

            fn with(self, weights: Weights) -> Self {
                let weight = frozen_param(self.kernel(weights.weight));
                let bias = weights.bias.map(frozen_param);
                Self { layer: $plain { weight, bias, ..self.layer } }
            }
        }

        impl Convolution<$dims> for $frozen {
            fn convolve(
                &self,
                input: Tensor<$dims>,
                weight: Tensor<$dims>,
                bias: Option<Tensor<1>>,
                groups: usize,
            ) -> Tensor<$dims> {
                let (weight, bias) = (passing(weight), bias.map(passing));
                $plain { weight, bias, groups, ..self.layer.clone() }.forward(input)
            }

            fn pointwise(
                input: Tensor<$dims>,
                weight: Tensor<$dims>,
                groups: usize,
            ) -> Tensor<$dims> {
                let options = ConvOptions::new([1; $axes], [0; $axes], [1; $axes], groups);
                $convolution(input, weight, None, options)
            }
        }

        impl From<$plain> for Adaptable<$frozen> {
            fn from(layer: $plain) -> Self {
                Self::Dense(layer)
            }
        }
    };
}

frozen_convolution!(FrozenConv1d, Conv1d, 1, 3, conv1d);
frozen_convolution!(FrozenConv2d, Conv2d, 2, 4, conv2d);

/// A frozen convolution over one axis with a trainable low-rank update.
///
/// y = conv(x, W) + b + scaling conv₁(conv(x, A), B): A is a convolution like the layer's own into
/// `rank` channels, B one of a single point. Their product is an update of W.
///
/// # Shapes
/// - input `[batch, channels_in, length]`, output `[batch, channels_out, length_out]`
/// - A `[channels_in × kernel, rank]` (down), B `[rank, channels_out]` (up); for a grouped
///   convolution, B `[rank / groups, channels_out]`, and such a layer cannot be merged: A sees the
///   channels of all groups, as in PEFT
///
/// What every kind of adapted layer has, such as `merge`, is at [`LoraLayer`].
///
/// # Example
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::nn::conv::Conv1dConfig;
/// use burn::tensor::{Device, Tensor};
/// use lora_core::LoraConv1d;
///
/// let device = Device::flex().autodiff();
/// let layer = LoraConv1d::wrap(Conv1dConfig::new(3, 8, 5).init(&device), 2, 4.0)?;
/// assert_eq!(layer.adapter().lora_a.dims(), [3 * 5, 2]);
/// assert_eq!(layer.forward(Tensor::ones([1, 3, 20], &device)).dims(), [1, 8, 16]);
/// # }
/// # Ok::<(), lora_core::Error>(())
/// ```
///
/// Source: "LoRA", [arXiv:2106.09685](https://arxiv.org/abs/2106.09685); PEFT's `Conv1d`, but with the
/// dilation of the layer, which PEFT leaves out.
pub type LoraConv1d = LoraLayer<FrozenConv1d>;

impl LoraLayer<FrozenConv1d> {
    /// Wraps a convolution: freezes it and adds a new adapter with scaling alpha / rank.
    ///
    /// # Errors
    /// As [`LoraLinear`](crate::LoraLinear)'s `wrap`, and for a grouped convolution when the groups
    /// do not divide the rank.
    pub fn wrap(layer: Conv1d, rank: usize, alpha: f64) -> Result<Self> {
        Self::with_config(layer, &config_for(rank, alpha)?)
    }

    /// Wraps a convolution with an adapter as `config` says.
    ///
    /// # Errors
    /// As [`wrap`](Self::wrap); for a grouped convolution also with DoRA, and with a start where
    /// neither A nor B is zero.
    pub fn with_config(layer: Conv1d, config: &AdapterConfig) -> Result<Self> {
        Self::adapt(layer, config)
    }

    /// The adapted convolution.
    ///
    /// # Panics
    /// When the input has other channels than the layer; in a mixed batch, when its leading axis is
    /// not the batch.
    pub fn forward(&self, input: Tensor<3>) -> Tensor<3> {
        forward(self, input)
    }
}

/// A frozen convolution over two axes with a trainable low-rank update.
///
/// y = conv(x, W) + b + scaling conv₁(conv(x, A), B): A is a convolution like the layer's own into
/// `rank` channels, B one of a single point. Their product is an update of W.
///
/// # Shapes
/// - input `[batch, channels_in, height, width]`, output `[batch, channels_out, height_out, width_out]`
/// - A `[channels_in × kernel, rank]` (down), B `[rank, channels_out]` (up); for a grouped
///   convolution, B `[rank / groups, channels_out]`, and such a layer cannot be merged: A sees the
///   channels of all groups, as in PEFT
///
/// What every kind of adapted layer has, such as `merge`, is at [`LoraLayer`].
///
/// # Example
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::nn::conv::Conv2dConfig;
/// use burn::tensor::{Device, Tensor};
/// use lora_core::LoraConv2d;
///
/// let device = Device::flex().autodiff();
/// let layer = LoraConv2d::wrap(Conv2dConfig::new([3, 8], [3, 3]).init(&device), 2, 4.0)?;
/// assert_eq!(layer.adapter().lora_a.dims(), [3 * 3 * 3, 2]);
/// assert_eq!(layer.forward(Tensor::ones([1, 3, 10, 10], &device)).dims(), [1, 8, 8, 8]);
/// # }
/// # Ok::<(), lora_core::Error>(())
/// ```
///
/// Source: "LoRA", [arXiv:2106.09685](https://arxiv.org/abs/2106.09685); PEFT's `Conv2d`, but with the
/// dilation of the layer, which PEFT leaves out.
pub type LoraConv2d = LoraLayer<FrozenConv2d>;

impl LoraLayer<FrozenConv2d> {
    /// Wraps a convolution: freezes it and adds a new adapter with scaling alpha / rank.
    ///
    /// # Errors
    /// As [`LoraConv1d`]'s.
    pub fn wrap(layer: Conv2d, rank: usize, alpha: f64) -> Result<Self> {
        Self::with_config(layer, &config_for(rank, alpha)?)
    }

    /// Wraps a convolution with an adapter as `config` says.
    ///
    /// # Errors
    /// As [`LoraConv1d::with_config`].
    pub fn with_config(layer: Conv2d, config: &AdapterConfig) -> Result<Self> {
        Self::adapt(layer, config)
    }

    /// The adapted convolution.
    ///
    /// # Panics
    /// When the input has other channels than the layer; in a mixed batch, when its leading axis is
    /// not the batch.
    pub fn forward(&self, input: Tensor<4>) -> Tensor<4> {
        forward(self, input)
    }
}

/// A model's field for a `Conv1d` that may be adapted later.
pub type AdaptableConv1d = Adaptable<FrozenConv1d>;

/// A model's field for a `Conv2d` that may be adapted later.
pub type AdaptableConv2d = Adaptable<FrozenConv2d>;

impl Adaptable<FrozenConv1d> {
    /// The convolution, `[batch, channels_in, length]` to `[batch, channels_out, length_out]`, with
    /// what adapts it.
    ///
    /// # Panics
    /// When the input has other channels than the layer.
    pub fn forward(&self, input: Tensor<3>) -> Tensor<3> {
        match self {
            Self::Dense(layer) => layer.forward(input),
            Self::Lora(layer) => layer.forward(input),
            Self::Replaced(layer) => layer.base.apply(input, layer.weights()),
        }
    }
}

impl Adaptable<FrozenConv2d> {
    /// The convolution, `[batch, channels_in, height, width]` to `[batch, channels_out, height_out,
    /// width_out]`, with what adapts it.
    ///
    /// # Panics
    /// When the input has other channels than the layer.
    pub fn forward(&self, input: Tensor<4>) -> Tensor<4> {
        match self {
            Self::Dense(layer) => layer.forward(input),
            Self::Lora(layer) => layer.forward(input),
            Self::Replaced(layer) => layer.base.apply(input, layer.weights()),
        }
    }
}
