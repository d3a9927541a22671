//! What has no layer to adapt: numbers, tensors, and Burn's modules without weights that LoRA knows.
//!
//! Burn's other layers (`Linear`, `Embedding`, convolutions, attention, recurrent cells, `SwiGlu` and
//! the `Activation` that may hold it) are missing on purpose: that the compiler then asks for
//! `#[lora(skip)]` keeps a layer from being left out unnoticed.

use std::marker::PhantomData;

use burn::module::{Param, RunningState};
use burn::nn::{activation, interpolate, loss, norm, pool};
use burn::tensor::{Bool, Int, Tensor};

use super::{VisitLayer, VisitLayerMut, VisitLora};

macro_rules! shows_nothing {
    () => {
        fn visit_lora<'a>(&'a self, _path: &str, _visit: &mut VisitLayer<'_, 'a>) {}

        fn visit_lora_mut(&mut self, _path: &str, _visit: &mut VisitLayerMut<'_>) {}
    };
    ($($type:ty),+ $(,)?) => {
        $(impl VisitLora for $type {
            shows_nothing!();
        })+
    };
}

shows_nothing!(bool, char, String, f32, f64, half::f16, half::bf16, ());
shows_nothing!(u8, u16, u32, u64, u128, usize, i8, i16, i32, i64, i128, isize);

impl<T: ?Sized> VisitLora for PhantomData<T> {
    shows_nothing!();
}

impl<const D: usize> VisitLora for Tensor<D> {
    shows_nothing!();
}

impl<const D: usize> VisitLora for Tensor<D, Int> {
    shows_nothing!();
}

impl<const D: usize> VisitLora for Tensor<D, Bool> {
    shows_nothing!();
}

impl<const D: usize> VisitLora for Param<Tensor<D>> {
    shows_nothing!();
}

impl<const D: usize> VisitLora for Param<Tensor<D, Int>> {
    shows_nothing!();
}

impl<const D: usize> VisitLora for Param<Tensor<D, Bool>> {
    shows_nothing!();
}

impl<const D: usize> VisitLora for RunningState<Tensor<D>> {
    shows_nothing!();
}

shows_nothing!(
    norm::BatchNorm,
    norm::GroupNorm,
    norm::InstanceNorm,
    norm::LayerNorm,
    norm::LocalResponseNorm,
    norm::Normalization,
    norm::RmsNorm,
);

shows_nothing!(
    activation::Celu,
    activation::Elu,
    activation::GLU,
    activation::Gelu,
    activation::HardShrink,
    activation::HardSigmoid,
    activation::HardSwish,
    activation::Hardtanh,
    activation::LeakyRelu,
    activation::LogSigmoid,
    activation::Mish,
    activation::PRelu,
    activation::RRelu,
    activation::Relu,
    activation::Relu6,
    activation::Selu,
    activation::Shrink,
    activation::SiLU,
    activation::Sigmoid,
    activation::SoftShrink,
    activation::Softplus,
    activation::Softsign,
    activation::Tanh,
    activation::Tanhshrink,
    activation::Threshold,
    activation::ThresholdedRelu,
);

shows_nothing!(
    pool::AdaptiveAvgPool1d,
    pool::AdaptiveAvgPool2d,
    pool::AdaptiveAvgPool3d,
    pool::AvgPool1d,
    pool::AvgPool2d,
    pool::MaxPool1d,
    pool::MaxPool2d,
);

shows_nothing!(
    burn::nn::CosineSimilarity,
    burn::nn::Dropout,
    burn::nn::Fold4d,
    burn::nn::GaussianNoise,
    burn::nn::Identity,
    burn::nn::PairwiseDistance,
    burn::nn::PixelShuffle,
    burn::nn::PixelUnshuffle,
    burn::nn::PositionalEncoding,
    burn::nn::RotaryEncoding,
    burn::nn::Unfold4d,
    interpolate::Interpolate1d,
    interpolate::Interpolate2d,
);

shows_nothing!(
    loss::BinaryCrossEntropyLoss,
    loss::CTCLoss,
    loss::CosineEmbeddingLoss,
    loss::CrossEntropyLoss,
    loss::GaussianNLLLoss,
    loss::HingeEmbeddingLoss,
    loss::HuberLoss,
    loss::KLDivLoss,
    loss::LpLoss,
    loss::MarginRankingLoss,
    loss::MseLoss,
    loss::MultiMarginLoss,
    loss::PoissonNllLoss,
    loss::RNNTLoss,
    loss::SmoothL1Loss,
    loss::SoftMarginLoss,
    loss::TripletMarginLoss,
);

#[cfg(test)]
mod tests {
    use std::marker::PhantomData;

    use burn::nn::norm;

    use crate::VisitLora; // the trait and the derive

    #[test]
    fn what_cannot_be_adapted_shows_nothing() {
        #[derive(VisitLora)]
        struct Settings {
            _count: usize,
            _name: Option<String>,
            _sizes: [u32; 2],
            _pair: (f32, bool),
            _norm: Option<norm::RmsNorm>,
            _marker: PhantomData<str>,
        }
        let mut settings = Settings {
            _count: 3,
            _name: Some("net".to_owned()),
            _sizes: [1, 2],
            _pair: (0.5, true),
            _norm: None,
            _marker: PhantomData,
        };
        settings.visit_lora("", &mut |path, _| panic!("{path}"));
        settings.visit_lora_mut("", &mut |path, _| panic!("{path}"));
        assert_eq!(settings.output_layer(), None);
    }
}
