//! To and from the LoRA that Burn has built in, which hangs on a parameter.
//!
//! Burn's [`apply_lora`](burn::module::Module::apply_lora) puts A, B and a factor on a weight's `Param`,
//! whose `val()` is then W + scale A·B, formed at every forward pass. The function is this library's, so
//! the factors can move either way.
//!
//! - A parameter that was never read is a recipe; reading it here gives it its value, which its
//!   clones share. A, B and the weight keep their ids, so that an optimiser's state stays theirs.
//! - `val()` of an adapted parameter is the composed weight, `base()` the frozen one; `consume`, `map`
//!   and what is built on them drop the adapter in silence.

use burn::module::{LoraAdapter as BurnAdapter, Module, Param, Reparameterizer};
use burn::nn::Linear;
use burn::tensor::Tensor;

use crate::adapter::{LoraAdapter, check_weight};
use crate::device::check_dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::frozen::{FrozenLayer, FrozenLinear};
use crate::layer::{LoraLayer, check_adapter};
use crate::scaling::Scaling;

impl LoraAdapter {
    /// Burn's adapter as one of this library's: alpha = scale · rank, by the rule alpha / rank.
    ///
    /// # Errors
    /// When A's columns are not B's rows, the rank is 0, or the scale is 0 or not finite.
    pub fn from_burn(adapter: &BurnAdapter) -> Result<Self> {
        let (a, b) = (adapter.a.val(), adapter.b.val());
        let alpha = adapter.scale * a.dims()[1] as f64;
        let mut ours = Self::from_tensors(a, b, alpha, Scaling::AlphaOverRank)?;
        ours.lora_a = adapter.a.clone();
        ours.lora_b = adapter.b.clone();
        Ok(ours)
    }

    /// The adapter as Burn's own; one with an offset in its plain form.
    ///
    /// # Errors
    /// When it has what Burn's cannot express: DoRA's magnitudes, a bias of the up matrix, a trained bias
    /// of the layer, dropout, or groups.
    pub fn to_burn(&self) -> Result<BurnAdapter> {
        let own = |setting, has: bool, found: &str| match has {
            true => {
                Err(Error::setting(setting, "nothing that Burn's own LoRA does not have", found))
            }
            false => Ok(()),
        };
        own("dora", self.magnitude.is_some(), "DoRA; merge it instead")?;
        own("lora_bias", self.lora_bias.is_some(), "a bias of the up matrix")?;
        own("bias", self.base_bias.is_some(), "a trained bias")?;
        own(
            "dropout",
            self.dropout() != 0.0,
            "dropout; train with 0, or save and load the adapter",
        )?;
        let plain = self.clone().into_plain();
        let ([_, rank], [rows, _]) = (plain.lora_a.dims(), plain.lora_b.dims());
        own("target_modules", rank != rows, "a grouped convolution's adapter")?;
        let scale = plain.scaling();
        Ok(BurnAdapter { a: plain.lora_a, b: plain.lora_b, scale })
    }
}

impl LoraLayer<FrozenLinear> {
    /// A linear layer that Burn's `apply_lora` has adapted, as a layer of this library, which never forms
    /// A·B.
    ///
    /// # Errors
    /// When the weight has no adapter of Burn's or is quantised; when it or the adapter is in a type that its
    /// device does not compute in; when A's rows or B's columns are not the weight's; as
    /// [`LoraAdapter::from_burn`].
    ///
    /// # Example
    /// ```
    /// # #[cfg(feature = "flex")] {
    /// use burn::module::{Lora, Module};
    /// use burn::nn::LinearConfig;
    /// use burn::tensor::Device;
    /// use lora_core::LoraLinear;
    ///
    /// let layer = LinearConfig::new(6, 4).init(&Device::flex()).apply_lora(Lora::new(2, 4.0));
    /// let layer = LoraLinear::from_burn(layer)?;
    /// assert_eq!((layer.adapter().rank(), layer.adapter().scaling()), (2, 2.0));
    /// let back = layer.into_burn()?;
    /// assert_eq!(back.weight.adapter().unwrap().scale, 2.0);
    /// # }
    /// # Ok::<(), lora_core::Error>(())
    /// ```
    pub fn from_burn(layer: Linear) -> Result<Self> {
        let Some(adapter) = layer.weight.adapter() else {
            let found = "one without";
            return Err(Error::setting("weight", "a parameter with Burn's LoRA adapter", found));
        };
        let base = layer.weight.base();
        if !base.dtype().is_float() {
            let found = format!("{:?}; dequantise the layer first", base.dtype());
            return Err(Error::setting("weight", "f64, f32, f16 or bf16", found));
        }
        check_weight(&base)?;
        let adapter = LoraAdapter::from_burn(adapter)?;
        check_dtype(&base.device(), adapter.lora_a.dtype())?; // B has the same
        let weight = Param::initialized(layer.weight.id, base);
        let base = FrozenLinear::new(Linear { weight, bias: layer.bias });
        check_adapter(&base, &adapter)?;
        Ok(Self::over(base, adapter))
    }

    /// The layer with Burn's own adapter on its weight; the weight and the bias stay frozen.
    ///
    /// # Errors
    /// When the layer is merged; as [`LoraAdapter::to_burn`].
    pub fn into_burn(self) -> Result<Linear> {
        if self.is_merged() {
            return Err(ErrorKind::AlreadyMerged { path: String::new() }.into());
        }
        let adapter = self.adapter.to_burn()?;
        let layer = self.base.into_plain().no_grad();
        Ok(layer.apply_reparameterization(Attach(Some(adapter))))
    }
}

/// Puts one adapter on the first matrix of a module.
struct Attach(Option<BurnAdapter>);

impl Reparameterizer for Attach {
    type Reparam = BurnAdapter;

    fn reparameterize<const D: usize>(
        &mut self,
        _path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<BurnAdapter>) {
        let adapter = if D == 2 { self.0.take() } else { None };
        (param, adapter)
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::module::Lora;
    use burn::nn::LinearConfig;
    use burn::tensor::{Device, Distribution};

    use super::*;
    use crate::config::LoraConfig;
    use crate::init::Init;
    use crate::linear::LoraLinear;

    fn input(device: &Device) -> Tensor<2> {
        Tensor::random([5, 6], Distribution::Normal(0.0, 1.0), device)
    }

    /// The largest difference, relative to the largest value of `y`; NaN where anything is.
    fn apart<const D: usize>(x: Tensor<D>, y: Tensor<D>) -> f32 {
        let largest = y.clone().abs().max().into_scalar::<f32>();
        let (x, y) = (x.into_data(), y.into_data());
        let differences = x.iter::<f32>().zip(y.iter::<f32>()).map(|(x, y)| (x - y).abs());
        differences.fold(0.0, |worst, one| if one > worst || one.is_nan() { one } else { worst })
            / largest
    }

    fn random(tensor: &Tensor<2>) -> Param<Tensor<2>> {
        Param::from_tensor(tensor.random_like(Distribution::Normal(0.0, 1.0)))
    }

    /// A layer as Burn's `apply_lora` leaves it after some training.
    fn burns(device: &Device) -> Linear {
        with_rows_of_a(6, device)
    }

    fn with_rows_of_a(rows: usize, device: &Device) -> Linear {
        let layer = LinearConfig::new(6, 4).init(device);
        let adapter = BurnAdapter {
            a: random(&Tensor::zeros([rows, 3], device)),
            b: random(&Tensor::zeros([3, 4], device)),
            scale: 1.7,
        };
        layer.no_grad().apply_reparameterization(Attach(Some(adapter)))
    }

    /// A layer of this library after some training.
    fn ours(config: &LoraConfig, device: &Device) -> LoraLinear {
        let layer = LinearConfig::new(6, 4).init(device);
        let mut layer = LoraLinear::with_config(layer, &config.resolve("x").unwrap()).unwrap();
        layer.adapter.lora_a = random(&layer.adapter.lora_a.val());
        layer.adapter.lora_b = random(&layer.adapter.lora_b.val());
        layer
    }

    #[test]
    fn burns_layer_has_the_same_outputs_and_gradients_here() {
        let device = crate::device_from_env().unwrap().autodiff();
        let theirs = burns(&device);
        let layer = LoraLinear::from_burn(theirs.clone()).unwrap();
        let x = input(&device);
        let (expected, found) = (theirs.forward(x.clone()), layer.forward(x));
        assert!(apart(found.clone(), expected.clone()) <= 1e-6);

        let (theirs_grads, grads) =
            (expected.square().sum().backward(), found.square().sum().backward());
        let adapter = theirs.weight.adapter().unwrap();
        for (ours, theirs) in
            [(&layer.adapter.lora_a, &adapter.a), (&layer.adapter.lora_b, &adapter.b)]
        {
            assert_eq!(ours.id, theirs.id);
            let ours = ours.val().grad(&grads).unwrap();
            assert!(apart(ours, theirs.val().grad(&theirs_grads).unwrap()) <= 1e-5);
        }
        assert!(layer.base().weight().grad(&grads).is_none());
    }

    #[test]
    fn our_layer_has_the_same_outputs_in_burns_form_and_comes_back() {
        let device = crate::device_from_env().unwrap();
        let plain = LoraConfig::new(3, 5.0);
        let rslora = LoraConfig { scaling: Scaling::AlphaOverSqrtRank, ..plain.clone() };
        let pissa = LoraConfig { init: Init::Pissa { iterations: None }, ..rslora.clone() };
        for config in [plain, rslora, pissa] {
            let layer = ours(&config, &device);
            let x = input(&device);
            let expected = layer.forward(x.clone());
            let theirs = layer.into_burn().unwrap();
            assert!(apart(theirs.forward(x.clone()), expected.clone()) <= 1e-6, "{config:?}");
            let back = LoraLinear::from_burn(theirs).unwrap();
            assert!(apart(back.forward(x), expected) <= 1e-6, "{config:?}");
        }
    }

    #[test]
    fn a_layer_stays_frozen_in_burns_form() {
        let device = crate::device_from_env().unwrap().autodiff();
        let theirs = ours(&LoraConfig::new(2, 4.0), &device).into_burn().unwrap();
        let grads = theirs.forward(input(&device)).square().sum().backward();
        let adapter = theirs.weight.adapter().unwrap();
        assert!(adapter.a.val().grad(&grads).is_some() && adapter.b.val().grad(&grads).is_some());
        assert!(theirs.weight.base().grad(&grads).is_none());
        assert!(theirs.bias.unwrap().val().grad(&grads).is_none());
    }

    #[test]
    fn what_apply_lora_leaves_is_taken_over() {
        let device = crate::device_from_env().unwrap();
        // Never read before: the parameters are still recipes.
        let theirs = LinearConfig::new(6, 4).init(&device).apply_lora(Lora::new(2, 8.0));
        let layer = LoraLinear::from_burn(theirs.clone()).unwrap();
        let x = input(&device);
        assert!(apart(layer.forward(x.clone()), theirs.forward(x)) <= 1e-6);
        assert_eq!((layer.adapter.rank(), layer.adapter.alpha()), (2, 8.0));
    }

    #[test]
    fn an_adapter_of_another_size_is_refused() {
        let layer = with_rows_of_a(5, &crate::device_from_env().unwrap());
        let error = LoraLinear::from_burn(layer).unwrap_err().to_string();
        let expected = "adapter: expected A [6, 3] and B [3, 4], found A [5, 3] and B [3, 4]";
        assert_eq!(error, expected);
    }

    #[test]
    fn what_burn_cannot_express_is_refused_by_name() {
        let device = crate::device_from_env().unwrap();
        let config = LoraConfig::new(2, 4.0);
        for (config, name) in [
            (LoraConfig { dora: true, ..config.clone() }, "dora"),
            (LoraConfig { lora_bias: true, ..config.clone() }, "lora_bias"),
            (LoraConfig { dropout: 0.1, ..config.clone() }, "dropout"),
            (LoraConfig { bias: crate::TrainedBias::LoraOnly, ..config.clone() }, "bias"),
        ] {
            let error = ours(&config, &device).into_burn().unwrap_err().to_string();
            assert!(error.starts_with(&format!("{name}: ")), "{error}");
        }
        let mut merged = ours(&config, &device);
        merged.merge().unwrap();
        assert!(merged.into_burn().is_err());
        let plain = LinearConfig::new(6, 4).init(&device);
        let error = LoraLinear::from_burn(plain).unwrap_err().to_string();
        assert!(error.contains("Burn's LoRA adapter"), "{error}");
    }
}
