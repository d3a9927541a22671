//! The trainable low-rank pair of one layer.

use burn::module::{Module, Param};
use burn::tensor::{DType, Tensor};

use crate::config::AdapterConfig;
use crate::error::{Error, Result};
use crate::scaling::Scaling;

/// A, B and the factor on their product; not the layer that they adapt.
#[derive(Module, Debug)]
pub struct LoraAdapter {
    /// The down matrix, `[d_input, rank]`: x meets it first.
    pub lora_a: Param<Tensor<2>>,
    /// The up matrix, `[rank, d_output]`.
    pub lora_b: Param<Tensor<2>>,
    #[module(skip)]
    alpha: f64,
    #[module(skip)]
    rule: Scaling,
}

impl LoraAdapter {
    /// A new adapter for a layer with this weight, `[d_input, d_output]`: on its device, in its dtype,
    /// with starting values by `config.init`.
    ///
    /// # Errors
    /// When the rank is 0, alpha or a standard deviation is not a finite number above 0, or the weight
    /// is quantised.
    pub fn new(weight: &Tensor<2>, config: &AdapterConfig) -> Result<Self> {
        config.check()?;
        let [d_input, d_output] = weight.dims();
        let dtype = float_dtype(weight)?;
        let options = (&weight.device(), dtype);
        let (a, b) = config.init.draw([d_input, config.rank, d_output], config.seed, options);
        Ok(Self::from_tensors(a, b, config))
    }

    /// An adapter from given values: A `[d_input, rank]`, B `[rank, d_output]`.
    pub(crate) fn from_tensors(a: Tensor<2>, b: Tensor<2>, config: &AdapterConfig) -> Self {
        Self {
            lora_a: Param::from_tensor(a),
            lora_b: Param::from_tensor(b),
            alpha: config.alpha,
            rule: config.scaling,
        }
    }

    /// Columns of A and rows of B.
    pub fn rank(&self) -> usize {
        self.lora_b.dims()[0]
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

    /// Values in A and B together.
    pub fn num_parameters(&self) -> usize {
        let ([d_input, rank], [_, d_output]) = (self.lora_a.dims(), self.lora_b.dims());
        rank * (d_input + d_output)
    }

    /// The dense update, scaling · A·B, `[d_input, d_output]` in f32 and without autodiff.
    ///
    /// Only merging needs it: no forward or backward pass ever forms it.
    pub fn delta_weight(&self) -> Tensor<2> {
        let a = self.lora_a.val().without_autodiff().cast(DType::F32);
        let b = self.lora_b.val().without_autodiff().cast(DType::F32);
        // The factor goes onto the small matrix: rank × d_output products instead of d_input × d_output.
        a.matmul(b.mul_scalar(self.scaling()))
    }
}

/// The dtype of a weight that an adapter can stand beside.
pub(crate) fn float_dtype(weight: &Tensor<2>) -> Result<DType> {
    match weight.dtype() {
        dtype if dtype.is_float() => Ok(dtype),
        other => Err(Error::setting("weight", "f64, f32, f16 or bf16", format!("{other:?}"))),
    }
}
