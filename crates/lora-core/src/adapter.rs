//! What trains beside one frozen layer: the low-rank pair and its variants.

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Distribution, Tensor};

use crate::config::AdapterConfig;
use crate::device::check_dtype;
use crate::error::{Error, Result};
use crate::frozen::{FrozenLayer, LayerKind, frozen_param};
use crate::init::Init;
use crate::ops::transposed_product;
use crate::scaling::Scaling;

/// A, B and the factor on their product; not the layer that they adapt.
///
/// Update of the weight: scaling A·B, or scaling (A·B - A0·B0) for an adapter whose starting values
/// were taken out of the weight's own directions ([`Init::Pissa`](crate::Init::Pissa),
/// [`Init::Olora`](crate::Init::Olora)).
///
/// The weight is seen as a matrix `[d_input, d_output]` for every kind of layer: an embedding's is
/// `[vocabulary, width]`, a convolution's `[channels_in × kernel, channels_out]`.
#[derive(Module, Debug)]
pub struct LoraAdapter {
    /// The down matrix, `[d_input, rank]`: x meets it first.
    pub lora_a: Param<Tensor<2>>,
    /// The up matrix, `[rank, d_output]` (`[rank / groups, d_output]` for a grouped convolution).
    pub lora_b: Param<Tensor<2>>,
    /// A bias of the up matrix, `[d_output]`, which is scaled as the update is.
    pub lora_bias: Option<Param<Tensor<1>>>,
    /// DoRA's magnitudes, `[d_output]`: the norms that the columns of the adapted weight have.
    pub magnitude: Option<Param<Tensor<1>>>,
    /// What stands in for the layer's own bias, `[d_output]`, where biases train.
    pub base_bias: Option<Param<Tensor<1>>>,
    offset: Option<Offset>,
    #[module(skip)]
    alpha: f64,
    #[module(skip)]
    rule: Scaling,
    #[module(skip)]
    dropout: f64,
}

/// The starting product with its sign turned, which a layer adds so that it begins as its base.
#[derive(Module, Debug)]
struct Offset {
    a: Param<Tensor<2>>, // A0, [d_input, rank]
    b: Param<Tensor<2>>, // -B0, [rank, d_output]
}

impl Offset {
    /// Of the starting factors: parameters that do not train, so that they are in the model's record, with
    /// the A and B that are meant beside them.
    fn new((a, b): (Tensor<2>, Tensor<2>), device: &Device) -> Self {
        let [a, b] = [a, b.neg()].map(|factor| frozen_param(on(factor, device)));
        Self { a, b }
    }

    fn factors(&self) -> [Tensor<2>; 2] {
        [&self.a, &self.b].map(|factor| factor.val().without_autodiff())
    }
}

impl LoraAdapter {
    /// A new adapter for a layer with this weight, `[d_input, d_output]`, and bias: on the weight's
    /// device, with starting values by `config.init`.
    ///
    /// # Errors
    /// When the rank is 0 or above both of the layer's sizes (above one of them, to start from the weight),
    /// or odd for the orthogonal start; when alpha or a standard deviation is not a finite number above 0, or
    /// dropout is not in `[0, 1)`; with `lora_bias` beside DoRA; when the weight is quantised, or holds NaN
    /// or infinity where the starting values follow from it; when the device does not compute in the dtype.
    pub fn new(
        weight: &Tensor<2>,
        bias: Option<&Tensor<1>>,
        config: &AdapterConfig,
    ) -> Result<Self> {
        Self::grouped(weight, bias, 1, config)
    }

    /// A new adapter for a layer of any kind. For a convolution whose channels are in groups it has
    /// PEFT's form: A sees all the input channels, B the ranks of its own group.
    ///
    /// # Errors
    /// As [`new`](Self::new), and when the kind of layer has no such variant.
    pub(crate) fn for_layer<F: FrozenLayer>(base: &F, config: &AdapterConfig) -> Result<Self> {
        if config.lora_bias && F::KIND == LayerKind::Embedding {
            return Err(Error::setting("lora_bias", "false for an embedding", true));
        }
        Self::grouped(&base.weight(), base.bias().as_ref(), base.groups(), config)
    }

    fn grouped(
        weight: &Tensor<2>,
        bias: Option<&Tensor<1>>,
        groups: usize,
        config: &AdapterConfig,
    ) -> Result<Self> {
        config.check()?;
        let device = weight.device();
        check_weight(weight)?;
        let weight = weight.clone().without_autodiff();
        let [group_input, d_output] = weight.dims();
        let d_input = group_input * groups;
        let rank = config.rank;
        let largest = d_input.max(d_output);
        if rank > largest {
            let expected = format!("at most {largest} for a layer of {d_input} x {d_output}");
            return Err(Error::setting("rank", expected, rank));
        }
        if groups > 1 {
            check_grouped(groups, config)?;
        }
        let dtype = adapter_dtype(weight.dtype(), config.dtype)?;
        check_dtype(&device, dtype)?;
        // What stands in for the layer's own values is not rounded: it starts as they are.
        let of_layer = adapter_dtype(weight.dtype(), None)?;
        // A grouped convolution's A is larger than its weight, which such a start does not look at.
        let shown = match groups {
            1 => weight.clone(),
            _ => Tensor::zeros([d_input, d_output], &weight.device()),
        };
        let options = (&device, dtype);
        let start = config.init.start(&shown, rank, config.scaling(), config.seed, options)?;
        let b = if groups > 1 { start.b.slice(0..rank / groups) } else { start.b };
        let mut adapter = Self::unchecked(start.a, b, config.alpha, config.scaling);
        adapter.dropout = config.dropout;
        adapter.offset = start.offset.map(|start| Offset::new(start, &device));
        if config.lora_bias {
            adapter.lora_bias =
                Some(Param::from_tensor(Tensor::zeros([d_output], (&device, dtype))));
        }
        if config.dora {
            let norms = column_squares(&weight).sqrt().cast(of_layer);
            adapter.magnitude = Some(Param::from_tensor(on(norms, &device)));
        }
        if config.train_bias
            && let Some(bias) = bias
        {
            // A copy of its own: the layer's bias keeps its values.
            let bias = bias.clone().without_autodiff().cast(of_layer);
            adapter.base_bias = Some(Param::from_tensor(on(bias, &device)));
        }
        Ok(adapter)
    }

    /// An adapter from given values: A `[d_input, rank]`, B `[rank, d_output]`.
    ///
    /// # Errors
    /// When A's columns are not B's rows, their dtypes differ, the rank is 0, or alpha is not finite or
    /// 0 in f32.
    ///
    /// # Example
    /// ```
    /// # #[cfg(feature = "flex")] {
    /// use burn::tensor::{Device, Tensor};
    /// use lora_core::{LoraAdapter, Scaling};
    ///
    /// let device = Device::flex();
    /// let (a, b) = (Tensor::ones([6, 2], &device), Tensor::ones([2, 4], &device));
    /// let adapter = LoraAdapter::from_tensors(a, b, 4.0, Scaling::AlphaOverRank)?;
    /// assert_eq!((adapter.rank(), adapter.scaling()), (2, 2.0));
    /// # }
    /// # Ok::<(), lora_core::Error>(())
    /// ```
    pub fn from_tensors(
        lora_a: Tensor<2>,
        lora_b: Tensor<2>,
        alpha: f64,
        rule: Scaling,
    ) -> Result<Self> {
        let ([_, rank], [rows, _]) = (lora_a.dims(), lora_b.dims());
        if rank != rows {
            let expected = format!("{rank} rows, as A has columns");
            return Err(Error::setting("lora_b", expected, rows));
        }
        Self::from_tensors_grouped(lora_a, lora_b, alpha, rule)
    }

    /// The same where B may belong to a grouped convolution.
    pub(crate) fn from_tensors_grouped(
        lora_a: Tensor<2>,
        lora_b: Tensor<2>,
        alpha: f64,
        rule: Scaling,
    ) -> Result<Self> {
        if lora_a.dims()[1] == 0 {
            return Err(Error::setting("rank", "at least 1", 0));
        }
        if lora_a.dtype() != lora_b.dtype() {
            let expected = format!("{:?}, the dtype of A", lora_a.dtype());
            return Err(Error::setting("lora_b", expected, format!("{:?}", lora_b.dtype())));
        }
        if alpha as f32 == 0.0 || !(alpha as f32).is_finite() {
            return Err(Error::setting("alpha", "a finite number other than 0", alpha));
        }
        Ok(Self::unchecked(lora_a, lora_b, alpha, rule))
    }

    /// Takes A and B for values that an adapter reached which started as `config` says over `weight`:
    /// the starting product is computed again, and subtracted from then on.
    pub(crate) fn start_at(&mut self, weight: &Tensor<2>, config: &AdapterConfig) -> Result<()> {
        if matches!(config.init, Init::Pissa { .. }) {
            // It divides the singular values by the scaling and takes the root.
            config.check()?;
        }
        let (weight, a) = (weight.clone().without_autodiff(), self.lora_a.val());
        let options = (&a.device(), a.dtype());
        let (rank, scaling) = (self.rank(), self.scaling());
        let start = config.init.start(&weight, rank, scaling, config.seed, options)?;
        self.offset = start.offset.map(|start| Offset::new(start, &a.device()));
        Ok(())
    }

    pub(crate) fn unchecked(
        lora_a: Tensor<2>,
        lora_b: Tensor<2>,
        alpha: f64,
        rule: Scaling,
    ) -> Self {
        Self {
            lora_a: Param::from_tensor(lora_a),
            lora_b: Param::from_tensor(lora_b),
            lora_bias: None,
            magnitude: None,
            base_bias: None,
            offset: None,
            alpha,
            rule,
            dropout: 0.0,
        }
    }

    /// Columns of A.
    pub fn rank(&self) -> usize {
        self.lora_a.dims()[1]
    }

    /// Numerator of the scaling factor.
    pub fn alpha(&self) -> f64 {
        self.alpha
    }

    /// How the factor follows from alpha and rank.
    pub fn scaling_rule(&self) -> Scaling {
        self.rule
    }

    /// The factor on the update.
    pub fn scaling(&self) -> f64 {
        self.rule.factor(self.alpha, self.rank())
    }

    /// The probability with which a value of the adapter's input is set to zero in training.
    pub fn dropout(&self) -> f64 {
        self.dropout
    }

    pub(crate) fn set_dropout(&mut self, dropout: f64) {
        self.dropout = dropout;
    }

    /// The starting product A0·B0 that is subtracted from the update, where there is one, as A0
    /// `[d_input, rank]` and B0 `[rank, d_output]`.
    pub fn offset(&self) -> Option<(Tensor<2>, Tensor<2>)> {
        let [a, b] = self.offset.as_ref()?.factors();
        Some((a, b.neg()))
    }

    /// Values that train.
    pub fn num_parameters(&self) -> usize {
        let vectors = [&self.lora_bias, &self.magnitude, &self.base_bias];
        let vectors: usize = vectors.into_iter().flatten().map(|vector| vector.dims()[0]).sum();
        let matrices: usize =
            [&self.lora_a, &self.lora_b].map(|factor| factor.shape().num_elements()).iter().sum();
        matrices + vectors
    }

    /// The same function without an offset: A' = `[A, A0]`, B' = `[B; -B0]`, of twice the rank and
    /// with the same scaling. An adapter without an offset comes back as it is.
    ///
    /// This is the form in which files hold it, valid over the weight as it always was.
    pub fn into_plain(self) -> Self {
        let Some(offset) = &self.offset else { return self };
        let [a, b] = offset.factors();
        let lora_a = Tensor::cat(vec![self.lora_a.val().without_autodiff(), a], 1);
        let lora_b = Tensor::cat(vec![self.lora_b.val().without_autodiff(), b], 0);
        // alpha / rank and alpha / sqrt(rank) keep their values at twice the rank.
        let alpha = match self.rule {
            Scaling::AlphaOverRank => 2.0 * self.alpha,
            Scaling::AlphaOverSqrtRank => std::f64::consts::SQRT_2 * self.alpha,
        };
        let device = self.lora_a.val().device();
        let [lora_a, lora_b] = [lora_a, lora_b].map(|factor| on(factor, &device));
        Self {
            lora_a: Param::from_tensor(lora_a),
            lora_b: Param::from_tensor(lora_b),
            offset: None,
            alpha,
            ..self
        }
    }

    /// The same function with alpha = `rank` and the scaling 1, in f32 (f64 for an f64 adapter) and
    /// without autodiff: the scaling is in B' = scaling · B, and the rank is reached with zeros, A' =
    /// `[A, 0]` and B' = `[scaling B; 0]`. An adapter with an offset takes its plain form before.
    ///
    /// Readers of files that know one scaling and one rank read this form right. What acts in
    /// training only, dropout, is left out.
    ///
    /// # Errors
    /// When `rank` is below that of the plain form, or the adapter belongs to a grouped convolution.
    ///
    /// # Example
    /// ```
    /// # #[cfg(feature = "flex")] {
    /// use burn::tensor::{Device, Tensor};
    /// use lora_core::{LoraAdapter, Scaling};
    ///
    /// let device = Device::flex();
    /// let (a, b) = (Tensor::ones([6, 2], &device), Tensor::ones([2, 4], &device));
    /// let adapter = LoraAdapter::from_tensors(a, b, 3.0, Scaling::AlphaOverSqrtRank)?;
    /// let folded = adapter.clone().into_folded(8)?;
    /// assert_eq!((folded.rank(), folded.alpha(), folded.scaling()), (8, 8.0, 1.0));
    /// let apart = (folded.delta_weight() - adapter.delta_weight()).abs().max();
    /// assert!(apart.into_scalar::<f32>() < 1e-6);
    /// # }
    /// # Ok::<(), lora_core::Error>(())
    /// ```
    pub fn into_folded(self, rank: usize) -> Result<Self> {
        let scaling = self.scaling();
        let plain = self.into_plain();
        let whole = |factor: &Param<Tensor<2>>| in_full(factor.val().without_autodiff());
        let (a, b) = (whole(&plain.lora_a), whole(&plain.lora_b).mul_scalar(scaling));
        let ([d_input, own], [rows, d_output]) = (a.dims(), b.dims());
        if own != rows {
            return Err(Error::setting(
                "adapter",
                "one whose B has a row for each column of A",
                format!("{own} columns and {rows} rows, as a grouped convolution has them"),
            ));
        }
        if rank < own {
            return Err(Error::setting("rank", format!("at least {own}, the adapter's own"), rank));
        }
        let zeros = |rows, columns| Tensor::zeros([rows, columns], (&a.device(), a.dtype()));
        let (lora_a, lora_b) = match rank - own {
            0 => (a, b),
            more => {
                let (beside, below) = (zeros(d_input, more), zeros(more, d_output));
                (Tensor::cat(vec![a, beside], 1), Tensor::cat(vec![b, below], 0))
            }
        };
        let bias = |bias: Param<Tensor<1>>| {
            Param::from_tensor(in_full(bias.val().without_autodiff()).mul_scalar(scaling))
        };
        Ok(Self {
            lora_bias: plain.lora_bias.map(bias),
            magnitude: plain.magnitude,
            base_bias: plain.base_bias,
            ..Self::unchecked(lora_a, lora_b, rank as f64, Scaling::AlphaOverRank)
        })
    }

    /// The dense update of the weight, scaling · A·B, `[d_input, d_output]` in f32 (f64 for an f64
    /// adapter) and without autodiff. DoRA's magnitudes are not in it: they act on the whole weight.
    ///
    /// Only merging needs it: no forward or backward pass ever forms it.
    ///
    /// # Panics
    /// For the adapter of a grouped convolution, whose update is no product of two matrices.
    pub fn delta_weight(&self) -> Tensor<2> {
        let (a, b) = self.factors();
        let [a, b] = [a, b].map(|factor| in_full(factor.without_autodiff()));
        // The factor goes onto the small matrix: rank × d_output products instead of d_input × d_output.
        a.matmul(b.mul_scalar(self.scaling()))
    }

    /// A and B as the products need them: beside them the offset's, where there is one.
    pub(crate) fn factors(&self) -> (Tensor<2>, Tensor<2>) {
        let (a, b) = (self.lora_a.val(), self.lora_b.val());
        match &self.offset {
            None => (a, b),
            Some(offset) => {
                let device = a.device();
                let [a0, b0] = offset.factors().map(|factor| on(factor, &device));
                (Tensor::cat(vec![a, a0], 1), Tensor::cat(vec![b, b0], 0))
            }
        }
    }

    /// The adapter's own input in f32 or f64, where it is another than the layer's: with some values dropped.
    pub(crate) fn dropped<const D: usize>(&self, input: &Tensor<D>) -> Option<Tensor<D>> {
        // Not by the input's device: one without autodiff may come to a model that trains.
        let trains = self.lora_a.val().is_require_grad();
        if self.dropout == 0.0 || !trains {
            return None;
        }
        let keep = 1.0 - self.dropout;
        let input = in_full(input.clone());
        let mask = input.random_like(Distribution::Bernoulli(keep));
        Some(input * mask.mul_scalar(1.0 / keep))
    }

    /// DoRA's factor on each column, m / ‖W + scaling A·B‖, `[d_output]`, given ‖W‖² of each column.
    ///
    /// ‖W + s A·B‖² = ‖W‖² + 2 s diag((Aᵀ W)ᵀ B) + s² diag(Bᵀ (Aᵀ A) B) by column: products of
    /// rank × d_output values and a rank × rank Gram matrix, never A·B. The norm is a constant for the
    /// gradient.
    ///
    /// Source: "DoRA", [arXiv:2402.09353](https://arxiv.org/abs/2402.09353), sections 4.1 and 4.3.
    pub(crate) fn column_scale(
        &self,
        weight: &Tensor<2>,
        squares: &Tensor<1>,
    ) -> Option<Tensor<1>> {
        self.magnitude.as_ref()?;
        let (a, _) = self.factors();
        let cross = cross_product(&a, weight);
        self.column_scale_from(cross, squares)
    }

    /// x W without autodiff, and DoRA's factor on each column; `None` where they are better formed apart.
    ///
    /// Aᵀ W reads all of W. Appended to x as further rows, Aᵀ goes along with the pass over W that x W
    /// makes anyway. That takes a copy of x, which should be small beside W, and is precise in full
    /// precision only; beside few rows of x, those of Aᵀ would make another product of it.
    pub(crate) fn product_and_column_scale(
        &self,
        x: &Tensor<2>,
        weight: &Tensor<2>,
        squares: &Tensor<1>,
    ) -> Option<(Tensor<2>, Tensor<1>)> {
        self.magnitude.as_ref()?;
        let (a, _) = self.factors();
        let ([rows, _], [_, rank], [_, d_output]) = (x.dims(), a.dims(), weight.dims());
        let full = matches!(weight.dtype(), DType::F32 | DType::F64);
        if !full || a.dtype() != weight.dtype() || rows < 4 * rank || rows > d_output / 2 {
            return None;
        }
        let [x, a, weight] = [x, &a, weight].map(|tensor| tensor.clone().without_autodiff());
        let product = Tensor::cat(vec![x, a.transpose()], 0).matmul(weight);
        let cross = product.clone().slice(rows..rows + rank);
        let scale = self.column_scale_from(cross, squares)?;
        Some((product.slice(0..rows), scale)) // the one that is left of the product
    }

    /// [`column_scale`](Self::column_scale) given Aᵀ W, `[rank, d_output]`, without autodiff.
    fn column_scale_from(&self, cross: Tensor<2>, squares: &Tensor<1>) -> Option<Tensor<1>> {
        let magnitude = self.magnitude.as_ref()?.val();
        let (a, b) = self.factors();
        let [a, b] = [a, b].map(|factor| factor.without_autodiff());
        let dtype = full_of([cross.dtype(), a.dtype(), squares.dtype()]);
        let [cross, a, b] = [cross, a, b].map(|matrix| in_dtype(matrix, dtype));
        let [squares, magnitude] = [squares.clone(), magnitude].map(|row| in_dtype(row, dtype));
        let s = self.scaling();
        let gram = a.clone().transpose().matmul(a); // [rank, rank]
        let inner = cross.mul_scalar(2.0 * s) + gram.matmul(b.clone()).mul_scalar(s * s);
        let squared = squares + (inner * b).sum_dim(0).squeeze_dim::<1>(0);
        let norm = squared.clamp_min(0.0).sqrt();
        // A column that is zero gives zero, whatever its factor is; 0 / 0 would make it NaN.
        let zero = norm.clone().equal_elem(0.0);
        Some(magnitude / norm.mask_fill(zero, 1.0))
    }

    /// Whether the layer's own bias is added as it is.
    pub(crate) fn leaves_bias(&self) -> bool {
        self.magnitude.is_none() && self.base_bias.is_none() && self.lora_bias.is_none()
    }

    /// The bias of the adapted layer in `dtype`, where it has one: the layer's own or its stand-in, with the
    /// adapter's.
    pub(crate) fn output_bias(&self, base: Option<Tensor<1>>, dtype: DType) -> Option<Tensor<1>> {
        let own = self.base_bias.as_ref().map(|bias| bias.val()).or(base);
        let own = own.map(|bias| in_dtype(bias, dtype));
        let scaled = self
            .lora_bias
            .as_ref()
            .map(|bias| in_dtype(in_full(bias.val()).mul_scalar(self.scaling()), dtype));
        match (own, scaled) {
            (Some(own), Some(scaled)) => Some(own + scaled),
            (own, scaled) => own.or(scaled),
        }
    }
}

/// `output` · `scale` + `bias`, computed in f32 or f64 and rounded once to `dtype`: near 1 the numbers of bf16 are
/// 0.4 to 0.8 % apart, and training moves DoRA's factors and biases by less.
pub(crate) fn finished<const D: usize>(
    output: Tensor<D>,
    scale: Option<Tensor<D>>,
    bias: Option<Tensor<D>>,
    dtype: DType,
) -> Tensor<D> {
    if scale.is_none() && bias.is_none() {
        return in_dtype(output, dtype);
    }
    let computed = full_of([dtype]);
    let output = in_dtype(output, computed);
    let output = match scale {
        Some(scale) => output * in_dtype(scale, computed),
        None => output,
    };
    let output = match bias {
        Some(bias) => output + in_dtype(bias, computed),
        None => output,
    };
    in_dtype(output, dtype)
}

/// (`product` + `update`) · `scale` + `bias`, rounded once to the dtype of the product; the update is in f32 or f64.
pub(crate) fn updated<const D: usize>(
    product: Tensor<D>,
    update: Tensor<D>,
    scale: Option<Tensor<D>>,
    bias: Option<Tensor<D>>,
) -> Tensor<D> {
    let (dtype, computed) = (product.dtype(), update.dtype());
    finished(in_dtype(product, computed) + update, scale, bias, dtype)
}

/// What an adapter of a grouped convolution cannot be.
pub(crate) fn check_grouped(groups: usize, config: &AdapterConfig) -> Result<()> {
    if !config.rank.is_multiple_of(groups) {
        let expected = format!("a multiple of {groups}, the groups of this convolution");
        return Err(Error::setting("rank", expected, config.rank));
    }
    // B has the rows of one group only, which parts a product that is zero as a whole.
    let starts_at_zero = !config.init.starts_from_weight() && config.init != Init::Orthogonal;
    if config.dora || !starts_at_zero {
        return Err(Error::setting(
            "target_modules",
            "no grouped convolution with DoRA, or with a start where neither A nor B is zero",
            format!("one of {groups} groups"),
        ));
    }
    Ok(())
}

/// ‖W‖² of each column, `[d_output]`, in f32 or f64.
pub(crate) fn column_squares(weight: &Tensor<2>) -> Tensor<1> {
    let sum = |part: Tensor<2>| in_full(part).square().sum_dim(0).squeeze_dim::<1>(0);
    in_row_blocks(weight, |block, _| sum(block))
}

/// Aᵀ W in f32, or in f64 where one of them is, `[rank, d_output]`, without autodiff.
fn cross_product(a: &Tensor<2>, weight: &Tensor<2>) -> Tensor<2> {
    let dtype = full_of([a.dtype(), weight.dtype()]);
    let [a, weight] = [a, weight].map(|matrix| matrix.clone().without_autodiff());
    let a = in_dtype(a, dtype);
    in_row_blocks(&weight, |block, rows| {
        transposed_product(a.clone().slice(rows), in_dtype(block, dtype))
    })
}

/// The sum of `f` over blocks of rows of a half-precision weight, so that no f32 copy of the whole
/// weight exists; in one piece over any other.
fn in_row_blocks<const D: usize>(
    weight: &Tensor<2>,
    f: impl Fn(Tensor<2>, std::ops::Range<usize>) -> Tensor<D>,
) -> Tensor<D> {
    const BLOCK_VALUES: usize = 1 << 20;

    let [rows, columns] = weight.dims();
    if matches!(weight.dtype(), DType::F32 | DType::F64) {
        return f(weight.clone(), 0..rows);
    }
    let block = (BLOCK_VALUES / columns.max(1)).max(1);
    let parts = (0..rows).step_by(block).map(|start| {
        let range = start..rows.min(start + block);
        f(weight.clone().slice(range.clone()), range)
    });
    parts.reduce(|sum, part| sum + part).expect("a layer has rows")
}

/// f32, or f64 where it is that already.
pub(crate) fn in_full<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    if tensor.dtype() == DType::F64 { tensor } else { in_dtype(tensor, DType::F32) }
}

/// What dtypes that meet are computed in: f64 where one of them is, else f32.
pub(crate) fn full_of<const N: usize>(dtypes: [DType; N]) -> DType {
    if dtypes.contains(&DType::F64) { DType::F64 } else { DType::F32 }
}

pub(crate) fn in_dtype<const D: usize>(tensor: Tensor<D>, dtype: DType) -> Tensor<D> {
    if tensor.dtype() == dtype { tensor } else { tensor.cast(dtype) }
}

/// With autodiff where the device has it, and its way of checkpointing; without where it has not.
pub(crate) fn on<const D: usize>(tensor: Tensor<D>, device: &Device) -> Tensor<D> {
    match device.gradient_checkpointing_strategy() {
        Some(strategy) => tensor.autodiff().with_gradient_checkpointing_strategy(strategy),
        None => tensor.without_autodiff(),
    }
}

/// Refuses a layer in a type that its device does not compute in. A quantised weight is in none.
pub(crate) fn check_weight(weight: &Tensor<2>) -> Result<()> {
    match weight.dtype() {
        DType::QFloat(_) => Ok(()),
        dtype => check_dtype(&weight.device(), dtype),
    }
}

/// The dtype of an adapter: as asked; else f32 beside a half-precision weight too, since a step of the
/// optimiser is smaller than what 8 or 11 bits can hold, and A and B would never move.
pub(crate) fn adapter_dtype(weight: DType, asked: Option<DType>) -> Result<DType> {
    match (weight, asked) {
        (weight, _) if !weight.is_float() => {
            Err(Error::setting("weight", "f64, f32, f16 or bf16", format!("{weight:?}")))
        }
        (_, Some(asked)) if !asked.is_float() => {
            Err(Error::setting("dtype", "f64, f32, f16 or bf16", format!("{asked:?}")))
        }
        (_, Some(asked)) => Ok(asked),
        (DType::F64, None) => Ok(DType::F64),
        _ => Ok(DType::F32),
    }
}
