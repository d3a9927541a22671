//! The frozen layers behind adapters: what every kind has in common, and the linear one.

use burn::module::{Module, ModuleDisplay, Param};
use burn::nn::Linear;
use burn::tensor::Tensor;

use crate::ops::{fold_rows, linear, product};

/// Which kind a layer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum LayerKind {
    /// y = x W + b.
    Linear,
    /// y = the rows of W that are asked for.
    Embedding,
    /// A convolution over one axis.
    Conv1d,
    /// A convolution over two axes.
    Conv2d,
}

impl LayerKind {
    /// The kind's name in reports and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::Embedding => "embedding",
            Self::Conv1d => "conv1d",
            Self::Conv2d => "conv2d",
        }
    }
}

/// A layer that never trains, of any kind. That it is frozen is known from its type, so that other
/// forms of a weight (packed, quantised) can stand behind the same name.
///
/// Whatever the kind, the weight is seen as one matrix W `[d_input, d_output]`, so that adapters,
/// merging and files need no case for each.
pub trait FrozenLayer: Module + ModuleDisplay {
    /// Burn's layer of this kind.
    type Plain: Module + ModuleDisplay;

    /// The kind.
    const KIND: LayerKind;

    /// Freezes a layer.
    fn from_plain(layer: Self::Plain) -> Self;

    /// Thaws the layer: the same weight and bias, trainable again.
    fn into_plain(self) -> Self::Plain;

    /// W as a matrix, `[d_input, d_output]`.
    fn weight(&self) -> Tensor<2>;

    /// b, `[d_output]`, where the layer has one.
    fn bias(&self) -> Option<Tensor<1>>;

    /// The weight's own shape, in its own order of axes.
    fn shape(&self) -> Vec<usize>;

    /// The groups of a convolution's channels; 1 elsewhere.
    fn groups(&self) -> usize {
        1
    }

    /// The same layer with another weight matrix and bias.
    fn with(self, weights: Weights) -> Self;
}

/// A weight matrix `[d_input, d_output]` with its bias `[d_output]`.
#[derive(Module, Debug)]
pub struct Weights {
    /// W.
    pub weight: Tensor<2>,
    /// b.
    pub bias: Option<Tensor<1>>,
}

/// Freezes a module.
///
/// A parameter that was never read is a recipe, shared by the clones of its module: freezing it would
/// freeze them too. Reading it first makes this module's value its own.
pub(crate) fn frozen<M: Module>(layer: M) -> M {
    layer.visit(&mut ReadAll);
    layer.no_grad()
}

struct ReadAll;

impl burn::module::ModuleVisitor for ReadAll {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let _ = param.val();
    }
}

/// A frozen tensor as a parameter that trains no more.
pub(crate) fn frozen_param<const D: usize>(tensor: Tensor<D>) -> Param<Tensor<D>> {
    Param::from_tensor(tensor).set_require_grad(false)
}

/// A linear layer that never trains: y = x W + b.
///
/// # Shapes
/// - input `[..., d_input]`, output `[..., d_output]`
#[derive(Module, Debug)]
pub struct FrozenLinear {
    weight: Param<Tensor<2>>,       // [d_input, d_output]
    bias: Option<Param<Tensor<1>>>, // [d_output]
}

impl FrozenLayer for FrozenLinear {
    type Plain = Linear;

    const KIND: LayerKind = LayerKind::Linear;

    fn from_plain(layer: Linear) -> Self {
        let Linear { weight, bias } = frozen(layer);
        Self { weight, bias }
    }

    fn into_plain(self) -> Linear {
        Linear { weight: self.weight, bias: self.bias }.set_require_grad(true)
    }

    fn weight(&self) -> Tensor<2> {
        self.weight.val()
    }

    fn bias(&self) -> Option<Tensor<1>> {
        self.bias.as_ref().map(Param::val)
    }

    fn shape(&self) -> Vec<usize> {
        self.weight.dims().to_vec()
    }

    fn with(self, weights: Weights) -> Self {
        Self { weight: frozen_param(weights.weight), bias: weights.bias.map(frozen_param) }
    }
}

impl FrozenLinear {
    /// Freezes a linear layer.
    pub fn new(layer: Linear) -> Self {
        Self::from_plain(layer)
    }

    /// W, `[d_input, d_output]`.
    pub fn weight(&self) -> Tensor<2> {
        self.weight.val()
    }

    /// b, `[d_output]`, where the layer has one.
    pub fn bias(&self) -> Option<Tensor<1>> {
        self.bias.as_ref().map(Param::val)
    }

    /// `[d_input, d_output]`.
    pub fn dims(&self) -> [usize; 2] {
        self.weight.dims()
    }

    /// y = x W + b.
    ///
    /// # Panics
    /// When the last axis of `input` is not `d_input`.
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        apply(input, self.weight(), self.bias())
    }

    /// Thaws the layer: the same weight and bias, trainable again.
    pub fn into_linear(self) -> Linear {
        self.into_plain()
    }
}

/// y = x W + b for an input of any rank.
pub(crate) fn apply<const D: usize>(
    input: Tensor<D>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
) -> Tensor<D> {
    fold_rows(input, |rows| match bias {
        Some(bias) => linear(rows, weight, bias),
        None => product(rows, weight),
    })
}
