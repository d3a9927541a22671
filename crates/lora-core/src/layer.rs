//! A frozen layer of any kind with what adapts it, and the slot that a model keeps for it.

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Tensor};

use crate::adapter::{LoraAdapter, check_weight, column_squares, full_of, in_dtype, in_full, on};
use crate::config::AdapterConfig;
use crate::device::check_dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::frozen::{FrozenLayer, LayerKind, Weights, frozen_param};
use crate::replacement::{Replacement, TokenRows};
use crate::samples::Samples;

/// A frozen layer with a trainable low-rank update; [`LoraLinear`](crate::LoraLinear),
/// [`LoraEmbedding`](crate::LoraEmbedding), [`LoraConv1d`](crate::LoraConv1d) and
/// [`LoraConv2d`](crate::LoraConv2d) are its kinds.
#[derive(Module, Debug)]
pub struct LoraLayer<F: FrozenLayer> {
    pub(crate) base: F,
    pub(crate) adapter: LoraAdapter,
    // With DoRA: the squared norms of W's columns, [d_output]. A parameter, so that a record that brings
    // another W brings them too.
    squares: Option<Param<Tensor<1>>>,
    merged: Option<Weights>,             // the adapted weights, while merged
    pub(crate) samples: Option<Samples>, // in mixed batches
    #[module(skip)]
    enabled: bool,
}

impl<F: FrozenLayer> LoraLayer<F> {
    pub(crate) fn adapt(layer: F::Plain, config: &AdapterConfig) -> Result<Self> {
        let base = F::from_plain(layer);
        let adapter = LoraAdapter::for_layer(&base, config)?;
        Ok(Self::over(base, adapter))
    }

    pub(crate) fn over(base: F, adapter: LoraAdapter) -> Self {
        let squares = adapter.magnitude.is_some().then(|| squares_of(&base));
        Self { base, adapter, squares, merged: None, samples: None, enabled: true }
    }

    /// Another adapter in place of this one. The norms of W are kept from one DoRA adapter to the next, and
    /// are there for no other, so that a record has them or not whatever was on before.
    fn exchange(&mut self, adapter: LoraAdapter) {
        let kept = self.squares.take();
        let needed = adapter.magnitude.is_some();
        self.squares = needed.then(|| kept.unwrap_or_else(|| squares_of(&self.base)));
        self.adapter = adapter;
        self.merged = None;
        self.samples = None;
        self.enabled = true;
    }

    /// The frozen layer.
    pub fn base(&self) -> &F {
        &self.base
    }

    /// What trains.
    pub fn adapter(&self) -> &LoraAdapter {
        &self.adapter
    }

    /// What trains, to be changed in place. While the layer is merged, a change shows only after it
    /// has been unmerged.
    pub fn adapter_mut(&mut self) -> &mut LoraAdapter {
        &mut self.adapter
    }

    /// The adapted weight and bias, while the layer is merged.
    pub fn merged(&self) -> Option<&Weights> {
        self.merged.as_ref()
    }

    /// Whether the adapter is folded into the weight at the moment.
    pub fn is_merged(&self) -> bool {
        self.merged.is_some()
    }

    /// Whether the adapter acts; else the layer is its base.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Lets the adapter act or not.
    pub fn set_enabled(&mut self, enabled: bool) {
        self.enabled = enabled;
    }

    /// Folds the adapter into the weight: computed in f32 (f64 for an f64 adapter), rounded once to the
    /// weight's dtype.
    ///
    /// The base's weight is kept, so that [`unmerge`](Self::unmerge) gives back its very bits; while
    /// merged, this layer's weights take twice the memory.
    ///
    /// # Errors
    /// When the layer is merged already, is in a mixed batch, is a grouped convolution, or a merged
    /// weight would be NaN or infinite; then nothing has changed.
    pub fn merge(&mut self) -> Result<Rounding> {
        let (weights, rounding) = self.merged_weights("")?;
        self.merged = Some(weights);
        Ok(rounding)
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

    /// A plain layer with the adapted weight; the base's weight is dropped.
    ///
    /// # Errors
    /// When a merged weight would be NaN or infinite, or the layer is a grouped convolution or of a mixed batch.
    pub fn into_merged(self) -> Result<F::Plain> {
        let weights = match self.merged {
            Some(weights) => weights,
            None => self.merged_weights("")?.0,
        };
        let device = self.base.weight().device();
        Ok(self.base.with(weights.on(&device)).into_plain())
    }

    /// The plain layer without the adapter.
    pub fn into_base(self) -> F::Plain {
        self.base.into_plain()
    }

    /// W + scaling A·B (its columns at DoRA's norms) and the bias, in the dtype of W; `path` names
    /// the layer in errors.
    pub(crate) fn merged_weights(&self, path: &str) -> Result<(Weights, Rounding)> {
        if self.is_merged() {
            return Err(ErrorKind::AlreadyMerged { path: path.to_owned() }.into());
        }
        if self.samples.is_some() {
            return Err(ErrorKind::MixedBatch { path: path.to_owned() }.into());
        }
        if self.base.groups() > 1 {
            return Err(ErrorKind::GroupedConvolution { path: path.to_owned() }.into());
        }
        merge_matrix(self.base.weight(), self.base.bias(), &self.adapter, path)
    }

    pub(crate) fn set_merged(&mut self, weights: Option<Weights>) {
        self.merged = weights;
    }

    /// DoRA's factor on each column, where the adapter has one, in f32 or f64.
    pub(crate) fn column_scale(&self) -> Option<Tensor<1>> {
        self.adapter.column_scale(&self.base.weight(), &self.squares()?)
    }

    /// The same with x W, where the two are formed together.
    pub(crate) fn product_and_column_scale(&self, x: &Tensor<2>) -> Option<(Tensor<2>, Tensor<1>)> {
        let weight = self.base.weight();
        self.adapter.product_and_column_scale(x, &weight, &self.squares()?)
    }

    /// The squared norms of W's columns, where the adapter has magnitudes. They are not kept where these were
    /// put on by hand, with [`adapter_mut`](Self::adapter_mut).
    fn squares(&self) -> Option<Tensor<1>> {
        self.adapter.magnitude.as_ref()?;
        Some(match &self.squares {
            Some(squares) => squares.val().without_autodiff(),
            None => column_squares(&self.base.weight().without_autodiff()),
        })
    }

    /// The bias of the output, in one of two places: with x W, so that in half precision these are rounded as in
    /// the frozen layer, where it is the layer's own; or at the end, after DoRA's factors, in f32 or f64.
    pub(crate) fn biases(&self) -> [Option<Tensor<1>>; 2] {
        let differ = |samples: &Samples| samples.scale.is_some() || samples.bias.is_some();
        if self.adapter.leaves_bias() && !self.samples.as_ref().is_some_and(differ) {
            return [self.base.bias(), None];
        }
        let dtype = full_of([self.base.weight().dtype()]);
        [None, self.adapter.output_bias(self.base.bias(), dtype)]
    }

    /// A, B and their factor as Burn's own products need them, whose other side is in f32, or f64 as the
    /// weight: in half precision neither the adapter nor what it adds is rounded before the sum.
    pub(crate) fn factors(&self) -> (Tensor<2>, Tensor<2>, f64) {
        let dtype = full_of([self.base.weight().dtype()]);
        let (a, b) = self.adapter.factors();
        (in_dtype(a, dtype), in_dtype(b, dtype), self.adapter.scaling())
    }
}

fn squares_of<F: FrozenLayer>(base: &F) -> Param<Tensor<1>> {
    let weight = base.weight();
    let device = weight.device();
    frozen_param(on(column_squares(&weight.without_autodiff()), &device))
}

/// W + scaling A·B (its columns at DoRA's norms) and the bias of the adapted layer, computed in f32 or
/// f64 and rounded once to the dtype of W; `path` names the layer in errors.
pub(crate) fn merge_matrix(
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    adapter: &LoraAdapter,
    path: &str,
) -> Result<(Weights, Rounding)> {
    let base = weight.without_autodiff();
    let dtype = base.dtype();
    let delta = adapter.delta_weight();
    let computed = if dtype == DType::F64 { dtype } else { delta.dtype() };
    let full = in_dtype(base.clone(), computed) + in_dtype(delta, computed);
    let scale = adapter.magnitude.as_ref().and_then(|_| {
        let base = in_full(base.clone());
        adapter.column_scale(&base, &column_squares(&base))
    });
    let full = match scale {
        Some(scale) => full * in_dtype(scale.without_autodiff(), computed).unsqueeze(),
        None => full,
    };
    let bias = bias.map(|bias| in_dtype(bias.without_autodiff(), computed));
    let bias = adapter.output_bias(bias, computed);
    rounded(&base, Weights { weight: full, bias }, path)
}

/// What replaces the weight and bias of a layer, rounded once to the dtype of W.
pub(crate) fn merge_replacement(
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    replacement: &Replacement,
    path: &str,
) -> Result<(Weights, Rounding)> {
    let base = weight.without_autodiff();
    let full = replacement.weights_over(in_full(base.clone()), bias.map(in_full));
    rounded(&base, full, path)
}

/// `full` in the dtype of `base`, the weight so far; an error where it is not finite there.
fn rounded(base: &Tensor<2>, full: Weights, path: &str) -> Result<(Weights, Rounding)> {
    let dtype = base.dtype();
    let weight = in_dtype(full.weight.clone(), dtype);
    let bias = full.bias.map(|bias| in_dtype(bias.without_autodiff(), dtype));
    // Checked after the rounding: a sum that is finite in f32 may not be in f16.
    let finite = |bias: &Tensor<1>| bias.clone().is_finite().all().into_scalar::<bool>();
    if !weight.clone().is_finite().all().into_scalar::<bool>() || !bias.iter().all(finite) {
        return Err(ErrorKind::NonFinite { path: path.to_owned() }.into());
    }
    let rounding = Rounding::between(base, full.weight, &weight);
    Ok((Weights { weight, bias }, rounding))
}

impl Weights {
    pub(crate) fn on(self, device: &burn::tensor::Device) -> Self {
        Self { weight: on(self.weight, device), bias: self.bias.map(|bias| on(bias, device)) }
    }
}

/// What one rounding to a weight's dtype cost a merge. All of it is 0 where the merge is computed in
/// the weight's own dtype.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Rounding {
    /// The largest change of one weight by the rounding.
    pub largest: f64,
    /// The mean change.
    pub mean: f64,
    /// The share of the update that was lost: the norm of the changes over the norm of the update
    /// (Frobenius).
    pub lost: f64,
}

impl Rounding {
    fn between(base: &Tensor<2>, exact: Tensor<2>, rounded: &Tensor<2>) -> Self {
        if exact.dtype() == rounded.dtype() {
            return Self::default();
        }
        let norm = |tensor: Tensor<2>| tensor.square().sum().sqrt().into_scalar::<f64>();
        let error = in_dtype(rounded.clone(), exact.dtype()) - exact.clone();
        let update = norm(exact.clone() - in_dtype(base.clone(), exact.dtype()));
        let absolute = error.clone().abs();
        Self {
            largest: absolute.clone().max().into_scalar::<f64>(),
            mean: absolute.mean().into_scalar::<f64>(),
            lost: if update == 0.0 { 0.0 } else { norm(error) / update },
        }
    }
}

/// A frozen layer with trainable copies of some of its values beside it.
#[derive(Module, Debug)]
pub struct ReplacedLayer<F: FrozenLayer> {
    pub(crate) base: F,
    pub(crate) replacement: Replacement,
    #[module(skip)]
    enabled: bool,
    #[module(skip)]
    merged: bool,
}

impl<F: FrozenLayer> ReplacedLayer<F> {
    /// The frozen layer.
    pub fn base(&self) -> &F {
        &self.base
    }

    /// What trains.
    pub fn replacement(&self) -> &Replacement {
        &self.replacement
    }

    /// The weight that acts, with the gradient where it trains: while merged, it does not.
    pub(crate) fn weight(&self) -> Tensor<2> {
        let own = self.base.weight();
        match &self.replacement.weight {
            Some(weight) if self.enabled => in_dtype(self.trained(weight), own.dtype()),
            _ => own,
        }
    }

    fn trained<const D: usize>(&self, param: &Param<Tensor<D>>) -> Tensor<D> {
        let value = param.val();
        match self.merged {
            true => on(value.clone().without_autodiff(), &value.device()),
            false => value,
        }
    }

    /// The bias that acts.
    pub(crate) fn bias(&self) -> Option<Tensor<1>> {
        match &self.replacement.bias {
            Some(bias) if self.enabled => {
                Some(in_dtype(self.trained(bias), self.base.weight().dtype()))
            }
            _ => self.base.bias(),
        }
    }

    /// Weight and bias that act.
    pub(crate) fn weights(&self) -> Weights {
        Weights { weight: self.weight(), bias: self.bias() }
    }

    /// The rows that act.
    pub(crate) fn tokens(&self) -> Option<TokenRows> {
        let tokens = self.replacement.tokens.as_ref().filter(|_| self.enabled)?;
        match self.merged {
            true => {
                let rows = frozen_param(self.trained(&tokens.rows));
                Some(tokens.with_rows(rows))
            }
            false => Some(tokens.clone()),
        }
    }
}

/// A model's field for a layer that may be adapted later: [`AdaptableLinear`](crate::AdaptableLinear),
/// [`AdaptableEmbedding`](crate::AdaptableEmbedding),
/// [`AdaptableConv1d`](crate::AdaptableConv1d), [`AdaptableConv2d`](crate::AdaptableConv2d).
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)] // a few hundred bytes a layer, beside its weights
pub enum Adaptable<F: FrozenLayer> {
    /// A plain layer.
    Dense(F::Plain),
    /// A frozen layer with a low-rank adapter.
    Lora(LoraLayer<F>),
    /// A frozen layer with trainable copies of some of its values.
    Replaced(ReplacedLayer<F>),
}

impl<F: FrozenLayer> From<LoraLayer<F>> for Adaptable<F> {
    fn from(layer: LoraLayer<F>) -> Self {
        Self::Lora(layer)
    }
}

impl<F: FrozenLayer> Adaptable<F> {
    /// The layer with its adapter, where it has one.
    pub fn as_lora(&self) -> Option<&LoraLayer<F>> {
        match self {
            Self::Lora(layer) => Some(layer),
            _ => None,
        }
    }

    /// The layer with its adapter, to be changed in place.
    pub fn as_lora_mut(&mut self) -> Option<&mut LoraLayer<F>> {
        match self {
            Self::Lora(layer) => Some(layer),
            _ => None,
        }
    }

    fn adapted(base: F, adaptation: Adaptation) -> Self {
        match adaptation {
            Adaptation::LowRank(adapter) => Self::Lora(LoraLayer::over(base, adapter)),
            Adaptation::Replacement(replacement) => {
                Self::Replaced(ReplacedLayer { base, replacement, enabled: true, merged: false })
            }
        }
    }

    /// The frozen form of the layer, whatever stands beside it: handles, no copies.
    fn frozen(&self) -> F {
        match self {
            Self::Dense(layer) => F::from_plain(layer.clone()),
            Self::Lora(layer) => layer.base.clone(),
            Self::Replaced(layer) => layer.base.clone(),
        }
    }
}

/// What adapts a layer: the one thing that is attached, taken off, saved and loaded.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)] // handles
pub enum Adaptation {
    /// A low-rank update.
    LowRank(LoraAdapter),
    /// Trainable copies of some of the layer's values.
    Replacement(Replacement),
}

impl Adaptation {
    /// Values that train.
    pub fn num_parameters(&self) -> usize {
        match self {
            Self::LowRank(adapter) => adapter.num_parameters(),
            Self::Replacement(replacement) => replacement.num_parameters(),
        }
    }

    /// The same values with autodiff or without; what trains is known in both forms.
    pub(crate) fn with_autodiff(self, autodiff: bool) -> Self {
        match (self.device().is_some_and(|device| device.is_autodiff()), autodiff) {
            (false, true) => self.train(),
            (true, false) => self.valid(),
            _ => self,
        }
    }

    pub(crate) fn device(&self) -> Option<Device> {
        match self {
            Self::LowRank(adapter) => Some(adapter.lora_a.val().device()),
            Self::Replacement(replacement) => {
                let tokens = replacement.tokens.as_ref().map(|tokens| &tokens.rows);
                let matrix = replacement.weight.as_ref().or(tokens);
                let matrix = matrix.map(|matrix| matrix.val().device());
                matrix.or_else(|| replacement.bias.as_ref().map(|bias| bias.val().device()))
            }
        }
    }
}

/// A layer of any kind in its slot, as [`VisitLora`](crate::VisitLora) shows it. Implemented by
/// [`Adaptable`] only.
pub trait AdaptableLayer: private::Sealed {
    /// The kind.
    fn kind(&self) -> LayerKind;

    /// The weight's own shape, in its own order of axes.
    fn shape(&self) -> Vec<usize>;

    /// The groups of a convolution's channels; 1 elsewhere.
    fn groups(&self) -> usize;

    /// W as a matrix `[d_input, d_output]`, without what adapts it.
    fn weight(&self) -> Tensor<2>;

    /// b, `[d_output]`, where the layer has one, without what adapts it.
    fn bias(&self) -> Option<Tensor<1>>;

    /// `[d_input, d_output]` of the matrix.
    fn dims(&self) -> [usize; 2] {
        self.weight().dims()
    }

    /// What adapts it, as handles.
    fn adaptation(&self) -> Option<Adaptation>;

    /// The low-rank adapter, where it has one.
    fn adapter(&self) -> Option<&LoraAdapter>;

    /// The low-rank adapter, to be changed in place.
    fn adapter_mut(&mut self) -> Option<&mut LoraAdapter>;

    /// The trainable copies, where it has some.
    fn replacement(&self) -> Option<&Replacement>;

    /// Whether what adapts it is folded into the weight.
    fn is_merged(&self) -> bool;

    /// Whether each sample of a batch has an adapter of its own, as
    /// [`AdapterSets::mixed`](crate::AdapterSets::mixed) has it, so that the leading axis of an input must be
    /// that of the samples.
    fn is_mixed(&self) -> bool;

    /// Whether what adapts it acts.
    fn is_enabled(&self) -> bool;

    /// Lets what adapts it act or not; nothing where nothing does.
    fn set_enabled(&mut self, enabled: bool);

    /// The weight and bias as they act at the moment: the merged ones where it is merged; else `None`
    /// where something not merged acts.
    fn plain_weights(&self) -> Option<Weights>;

    /// Whether `adaptation` fits the layer.
    ///
    /// # Errors
    /// When a shape does not fit, or the layer or `adaptation` is in a type that the layer's device does not
    /// compute in.
    fn check(&self, adaptation: &Adaptation) -> Result<()>;

    /// Freezes the layer and puts `adaptation` beside it.
    ///
    /// # Errors
    /// When something adapts it already, and as [`Self::check`].
    fn attach(&mut self, adaptation: Adaptation) -> Result<()>;

    /// Takes off what adapts it. The layer stays frozen.
    fn detach(&mut self) -> Option<Adaptation>;
}

pub(crate) mod private {
    use super::*;

    /// What only this crate does with a slot.
    pub trait Sealed {
        fn merged_weights(&self, path: &str) -> Result<Option<(Weights, Rounding)>>;
        fn set_merged(&mut self, weights: Option<Weights>);
        /// Puts on something that fits in place of what is there, enabled; `None` takes that off.
        fn exchange(&mut self, adaptation: Option<Adaptation>);
        /// Puts back what is there, as it was before it was frozen.
        fn restore(&mut self, adaptation: Adaptation);
        fn set_samples(&mut self, samples: Option<Samples>);
        fn copy_of_layer(&self) -> Replacement;
        fn new_adapter(&self, config: &AdapterConfig) -> Result<LoraAdapter>;
        fn frozen_squares(&self) -> Tensor<1>;
        /// Whether the sizes fit, without a look at what the device computes in: what it cannot compute with
        /// can be saved.
        fn check_shapes(&self, adaptation: &Adaptation) -> Result<()>;
    }
}

impl<F: FrozenLayer> private::Sealed for Adaptable<F> {
    fn merged_weights(&self, path: &str) -> Result<Option<(Weights, Rounding)>> {
        match self {
            Self::Dense(_) => Ok(None),
            Self::Lora(layer) => layer.merged_weights(path).map(Some),
            Self::Replaced(layer) if layer.merged => {
                Err(ErrorKind::AlreadyMerged { path: path.to_owned() }.into())
            }
            Self::Replaced(layer) => {
                let base = &layer.base;
                merge_replacement(base.weight(), base.bias(), &layer.replacement, path).map(Some)
            }
        }
    }

    fn set_merged(&mut self, weights: Option<Weights>) {
        match self {
            Self::Dense(_) => {}
            Self::Lora(layer) => layer.set_merged(weights),
            Self::Replaced(layer) => layer.merged = weights.is_some(),
        }
    }

    fn exchange(&mut self, adaptation: Option<Adaptation>) {
        match (&mut *self, adaptation) {
            (_, None) => {
                self.detach();
            }
            (Self::Lora(layer), Some(Adaptation::LowRank(adapter))) => layer.exchange(adapter),
            (slot, Some(adaptation)) => *slot = Self::adapted(slot.frozen(), adaptation),
        }
    }

    fn restore(&mut self, adaptation: Adaptation) {
        match (self, adaptation) {
            (Self::Lora(layer), Adaptation::LowRank(adapter)) => layer.adapter = adapter,
            (Self::Replaced(layer), Adaptation::Replacement(own)) => layer.replacement = own,
            _ => {}
        }
    }

    fn set_samples(&mut self, samples: Option<Samples>) {
        if let Self::Lora(layer) = self {
            layer.samples = samples;
        }
    }

    fn copy_of_layer(&self) -> Replacement {
        Replacement::of_layer(&self.frozen())
    }

    fn frozen_squares(&self) -> Tensor<1> {
        column_squares(&self.frozen().weight().without_autodiff())
    }

    fn new_adapter(&self, config: &AdapterConfig) -> Result<LoraAdapter> {
        LoraAdapter::for_layer(&self.frozen(), config)
    }

    fn check_shapes(&self, adaptation: &Adaptation) -> Result<()> {
        let base = self.frozen();
        match adaptation {
            Adaptation::LowRank(adapter) => check_adapter(&base, adapter),
            Adaptation::Replacement(replacement) => check_replacement(&base, replacement),
        }
    }
}

impl<F: FrozenLayer> AdaptableLayer for Adaptable<F> {
    fn kind(&self) -> LayerKind {
        F::KIND
    }

    fn shape(&self) -> Vec<usize> {
        self.frozen().shape()
    }

    fn groups(&self) -> usize {
        self.frozen().groups()
    }

    fn weight(&self) -> Tensor<2> {
        self.frozen().weight()
    }

    fn bias(&self) -> Option<Tensor<1>> {
        self.frozen().bias()
    }

    fn adaptation(&self) -> Option<Adaptation> {
        match self {
            Self::Dense(_) => None,
            Self::Lora(layer) => Some(Adaptation::LowRank(layer.adapter.clone())),
            Self::Replaced(layer) => Some(Adaptation::Replacement(layer.replacement.clone())),
        }
    }

    fn adapter(&self) -> Option<&LoraAdapter> {
        self.as_lora().map(LoraLayer::adapter)
    }

    fn adapter_mut(&mut self) -> Option<&mut LoraAdapter> {
        self.as_lora_mut().map(LoraLayer::adapter_mut)
    }

    fn replacement(&self) -> Option<&Replacement> {
        match self {
            Self::Replaced(layer) => Some(&layer.replacement),
            _ => None,
        }
    }

    fn is_merged(&self) -> bool {
        match self {
            Self::Dense(_) => false,
            Self::Lora(layer) => layer.is_merged(),
            Self::Replaced(layer) => layer.merged,
        }
    }

    fn is_mixed(&self) -> bool {
        self.as_lora().is_some_and(|layer| layer.samples.is_some())
    }

    fn is_enabled(&self) -> bool {
        match self {
            Self::Dense(_) => false,
            Self::Lora(layer) => layer.enabled,
            Self::Replaced(layer) => layer.enabled,
        }
    }

    fn set_enabled(&mut self, enabled: bool) {
        match self {
            Self::Dense(_) => {}
            Self::Lora(layer) => layer.enabled = enabled,
            Self::Replaced(layer) => layer.enabled = enabled,
        }
    }

    fn plain_weights(&self) -> Option<Weights> {
        let base = self.frozen();
        let own = Weights { weight: base.weight(), bias: base.bias() };
        match self {
            Self::Dense(_) => Some(own),
            Self::Lora(layer) if !layer.enabled => Some(own),
            Self::Lora(layer) => layer.merged.clone(),
            Self::Replaced(layer) if !layer.enabled => Some(own),
            Self::Replaced(layer) => layer.merged.then(|| layer.replacement.weights(&layer.base)),
        }
    }

    fn check(&self, adaptation: &Adaptation) -> Result<()> {
        use private::Sealed;
        let weight = self.frozen().weight();
        check_weight(&weight)?;
        for dtype in dtypes(adaptation) {
            check_dtype(&weight.device(), dtype)?;
        }
        self.check_shapes(adaptation)
    }

    fn attach(&mut self, adaptation: Adaptation) -> Result<()> {
        if self.adaptation().is_some() {
            return Err(ErrorKind::AlreadyAdapted { path: String::new() }.into());
        }
        self.check(&adaptation)?;
        *self = Self::adapted(self.frozen(), adaptation);
        Ok(())
    }

    fn detach(&mut self) -> Option<Adaptation> {
        let adaptation = self.adaptation()?;
        *self = Self::Dense(self.frozen().into_plain().no_grad());
        Some(adaptation)
    }
}

/// The types of all that trains in it.
fn dtypes(adaptation: &Adaptation) -> Vec<DType> {
    let (matrices, vectors) = match adaptation {
        Adaptation::LowRank(adapter) => (
            [Some(&adapter.lora_a), Some(&adapter.lora_b)],
            [&adapter.lora_bias, &adapter.magnitude, &adapter.base_bias],
        ),
        Adaptation::Replacement(Replacement { weight, bias, tokens }) => {
            ([weight.as_ref(), tokens.as_ref().map(|tokens| &tokens.rows)], [bias, &None, &None])
        }
    };
    let matrices = matrices.into_iter().flatten().map(|matrix| matrix.dtype());
    matrices.chain(vectors.into_iter().flatten().map(|vector| vector.dtype())).collect()
}

pub(crate) fn check_adapter<F: FrozenLayer>(base: &F, adapter: &LoraAdapter) -> Result<()> {
    let [group_input, d_output] = base.weight().dims();
    let (groups, rank) = (base.groups(), adapter.rank());
    let expected = ([group_input * groups, rank], [rank / groups, d_output]);
    let found = (adapter.lora_a.dims(), adapter.lora_b.dims());
    if expected != found {
        let text = |(a, b): ([usize; 2], [usize; 2])| format!("A {a:?} and B {b:?}");
        return Err(Error::setting("adapter", text(expected), text(found)));
    }
    if groups > 1 && (!rank.is_multiple_of(groups) || adapter.magnitude.is_some()) {
        let expected = format!("a rank in {groups} equal groups, and no DoRA");
        let found = if adapter.magnitude.is_some() { "DoRA".to_owned() } else { rank.to_string() };
        return Err(Error::setting("adapter", expected, found));
    }
    if F::KIND == LayerKind::Embedding && adapter.lora_bias.is_some() {
        return Err(Error::setting("lora_bias", "false for an embedding", true));
    }
    check_bias(base, adapter.base_bias.is_some(), false)?;
    check_vectors(d_output, [&adapter.lora_bias, &adapter.magnitude, &adapter.base_bias])
}

fn check_replacement<F: FrozenLayer>(base: &F, replacement: &Replacement) -> Result<()> {
    let [d_input, d_output] = base.weight().dims();
    if let Some(tokens) = &replacement.tokens {
        let found = match (F::KIND, tokens.vocabulary()) {
            (LayerKind::Embedding, vocabulary) if vocabulary == d_input => None,
            (LayerKind::Embedding, vocabulary) => {
                Some(format!("tokens of a vocabulary of {vocabulary}"))
            }
            (kind, _) => Some(format!("tokens on a {} layer", kind.name())),
        };
        if let Some(found) = found {
            let expected = format!("tokens on an embedding of {d_input} rows");
            return Err(Error::setting("adapter", expected, found));
        }
    }
    let matrices = [
        (replacement.weight.as_ref().map(|weight| weight.dims()), d_input),
        (
            replacement.tokens.as_ref().map(|tokens| tokens.rows.dims()),
            replacement.tokens.as_ref().map_or(0, |tokens| tokens.count()),
        ),
    ];
    for (found, rows) in matrices {
        if let Some(found) = found.filter(|found| *found != [rows, d_output]) {
            let expected = format!("a matrix of {rows} x {d_output}");
            return Err(Error::setting("adapter", expected, format!("{found:?}")));
        }
    }
    if replacement.num_parameters() == 0 {
        return Err(Error::setting("adapter", "values in place of the layer's own", "none"));
    }
    check_bias(base, replacement.bias.is_some(), replacement.weight.is_some())?;
    check_vectors(d_output, [&replacement.bias])
}

/// A trained bias acts in place of a layer's own; a layer that trains as a whole has both or none.
fn check_bias<F: FrozenLayer>(base: &F, trains: bool, is_whole: bool) -> Result<()> {
    let (expected, found) = match base.bias() {
        None if trains => ("no trained bias, as the layer has none", "one"),
        Some(_) if is_whole && !trains => {
            ("a bias beside the weight, as the layer has one", "none")
        }
        _ => return Ok(()),
    };
    Err(Error::setting("adapter", expected, found))
}

fn check_vectors<const N: usize>(
    d_output: usize,
    vectors: [&Option<Param<Tensor<1>>>; N],
) -> Result<()> {
    match vectors.into_iter().flatten().find(|vector| vector.dims()[0] != d_output) {
        Some(vector) => {
            let expected = format!("vectors of {d_output} values");
            Err(Error::setting("adapter", expected, vector.dims()[0]))
        }
        None => Ok(()),
    }
}
