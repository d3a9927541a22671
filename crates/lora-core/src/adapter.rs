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
    /// A new adapter for a layer with this weight, `[d_input, d_output]`: on its device, in f32 (f64
    /// beside an f64 weight), with starting values by `config.init`.
    ///
    /// # Errors
    /// When the rank is 0 or above both of the layer's sizes, alpha or a standard deviation is not a
    /// finite number above 0, the weight is quantised, or `config.init` cannot start from it.
    pub fn new(weight: &Tensor<2>, config: &AdapterConfig) -> Result<Self> {
        config.check()?;
        let [d_input, d_output] = weight.dims();
        let largest = d_input.max(d_output);
        if config.rank > largest {
            let expected = format!("at most {largest} for a layer of {d_input} x {d_output}");
            return Err(Error::setting("rank", expected, config.rank));
        }
        let options = (&weight.device(), adapter_dtype(weight)?);
        let (rank, scaling) = (config.rank, config.scaling());
        let start = config.init.start(weight, rank, scaling, config.seed, options)?;
        if start.offset.is_some() {
            let expected = "a start at zero, until an adapter can subtract another";
            return Err(Error::setting("init", expected, format!("{:?}", config.init)));
        }
        Ok(Self::from_tensors(start.a, start.b, config))
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

    /// The dense update, scaling · A·B, `[d_input, d_output]` in f32 (f64 for an f64 adapter) and
    /// without autodiff.
    ///
    /// Only merging needs it: no forward or backward pass ever forms it.
    pub fn delta_weight(&self) -> Tensor<2> {
        let [a, b] = [&self.lora_a, &self.lora_b].map(|factor| {
            let factor = factor.val().without_autodiff();
            if factor.dtype() == DType::F64 { factor } else { factor.cast(DType::F32) }
        });
        // The factor goes onto the small matrix: rank × d_output products instead of d_input × d_output.
        a.matmul(b.mul_scalar(self.scaling()))
    }
}

/// The dtype of the adapter beside a weight: f32 beside a half-precision one too, since a step of the
/// optimiser is smaller than what 8 or 11 bits can hold, and A and B would never move.
pub(crate) fn adapter_dtype(weight: &Tensor<2>) -> Result<DType> {
    match weight.dtype() {
        DType::F64 => Ok(DType::F64),
        dtype if dtype.is_float() => Ok(DType::F32),
        other => Err(Error::setting("weight", "f64, f32, f16 or bf16", format!("{other:?}"))),
    }
}
