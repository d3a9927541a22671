//! The laws of an adapted layer, for every kind of layer, every variant and random sizes.
#![cfg(any(
    feature = "flex",
    feature = "ndarray",
    feature = "tch",
    feature = "wgpu",
    feature = "cuda"
))]

mod types;

use burn::module::{Module, Param};
use burn::nn::conv::{Conv1d, Conv1dConfig, Conv2d, Conv2dConfig};
use burn::nn::{
    Embedding, EmbeddingConfig, Linear, LinearConfig, PaddingConfig1d, PaddingConfig2d,
};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use lora_core::{
    AdaptableConv1d, AdaptableConv2d, AdaptableEmbedding, AdaptableLayer, AdaptableLinear,
    Adaptation, AdapterConfig, ErrorKind, Init, LoraAdapter, LoraConfig, LoraConv1d, LoraConv2d,
    LoraEmbedding, LoraLinear, Replacement, Scaling, TrainedBias, compiles_kernels,
};
use proptest::prelude::*;
use types::{has, in_f64};

/// Relative to the largest value, in f32.
const TOLERANCE: f64 = 1e-6;

fn device() -> Device {
    lora_core::device_from_env().unwrap().autodiff()
}

/// Values that are the same at every run and never zero.
fn fixed<const D: usize>(shape: [usize; D], seed: u64, dtype: DType) -> Tensor<D> {
    let count: usize = shape.iter().product();
    let values: Vec<f64> = (0..count as u64)
        .map(|i| {
            let mixed =
                (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15 ^ seed.wrapping_mul(0x2545_f491));
            let mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            (mixed >> 11) as f64 / (1u64 << 53) as f64 * 2.0 - 1.0 + 1e-3
        })
        .collect();
    Tensor::from_data(TensorData::new(values, shape), (&device(), dtype))
}

fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.without_autodiff().into_data().convert::<f64>().try_to_vec().unwrap()
}

/// The largest difference over the largest value.
fn apart<const D: usize>(found: Tensor<D>, expected: Tensor<D>) -> f64 {
    assert_eq!(found.dims(), expected.dims());
    let (found, expected) = (host(found), host(expected));
    let largest = expected.iter().fold(0.0, |most: f64, value| value.abs().max(most));
    let apart = found.iter().zip(&expected).fold(0.0, |most: f64, (a, b)| {
        let apart = (a - b).abs();
        if apart.is_nan() { f64::INFINITY } else { apart.max(most) }
    });
    apart / largest.max(f64::MIN_POSITIVE)
}

/// A layer of one kind, and an input for it.
#[derive(Debug, Clone)]
enum Case {
    Linear { layer: Linear, x: Tensor<3> },
    Embedding { layer: Embedding, ids: Tensor<2, Int> },
    Conv1d { layer: Conv1d, x: Tensor<3> },
    Conv2d { layer: Conv2d, x: Tensor<4> },
}

/// An adapted layer of one kind.
enum Adapted {
    Linear(LoraLinear),
    Embedding(LoraEmbedding),
    Conv1d(LoraConv1d),
    Conv2d(LoraConv2d),
}

macro_rules! each {
    ($adapted:expr, $layer:ident => $body:expr) => {
        match $adapted {
            Adapted::Linear($layer) => $body,
            Adapted::Embedding($layer) => $body,
            Adapted::Conv1d($layer) => $body,
            Adapted::Conv2d($layer) => $body,
        }
    };
}

impl Case {
    fn base(&self) -> Tensor<1> {
        match self.clone() {
            Self::Linear { layer, x } => flat(layer.forward(x)),
            Self::Embedding { layer, ids } => flat(layer.forward(ids)),
            Self::Conv1d { layer, x } => flat(layer.forward(x)),
            Self::Conv2d { layer, x } => flat(layer.forward(x)),
        }
    }

    fn wrap(&self, config: &AdapterConfig) -> Adapted {
        match self.clone() {
            Self::Linear { layer, .. } => {
                Adapted::Linear(LoraLinear::with_config(layer, config).unwrap())
            }
            Self::Embedding { layer, .. } => {
                let refused = LoraEmbedding::with_config(layer.clone(), config).is_err();
                assert_eq!(refused, config.lora_bias);
                let config = AdapterConfig { lora_bias: false, ..*config };
                Adapted::Embedding(LoraEmbedding::with_config(layer, &config).unwrap())
            }
            Self::Conv1d { layer, .. } => {
                Adapted::Conv1d(LoraConv1d::with_config(layer, config).unwrap())
            }
            Self::Conv2d { layer, .. } => {
                Adapted::Conv2d(LoraConv2d::with_config(layer, config).unwrap())
            }
        }
    }

    fn forward(&self, adapted: &Adapted) -> Tensor<1> {
        match (self.clone(), adapted) {
            (Self::Linear { x, .. }, Adapted::Linear(layer)) => flat(layer.forward(x)),
            (Self::Embedding { ids, .. }, Adapted::Embedding(layer)) => flat(layer.forward(ids)),
            (Self::Conv1d { x, .. }, Adapted::Conv1d(layer)) => flat(layer.forward(x)),
            (Self::Conv2d { x, .. }, Adapted::Conv2d(layer)) => flat(layer.forward(x)),
            _ => unreachable!("a case and its own layer"),
        }
    }

    /// The plain layer that `into_merged` or `into_base` gave, on this case's input.
    fn plain(&self, adapted: Adapted, merged: bool) -> Tensor<1> {
        match (self.clone(), adapted) {
            (Self::Linear { x, .. }, Adapted::Linear(layer)) => {
                let plain = if merged { layer.into_merged().unwrap() } else { layer.into_base() };
                flat(plain.forward(x))
            }
            (Self::Embedding { ids, .. }, Adapted::Embedding(layer)) => {
                let plain = if merged { layer.into_merged().unwrap() } else { layer.into_base() };
                flat(plain.forward(ids))
            }
            (Self::Conv1d { x, .. }, Adapted::Conv1d(layer)) => {
                let plain = if merged { layer.into_merged().unwrap() } else { layer.into_base() };
                flat(plain.forward(x))
            }
            (Self::Conv2d { x, .. }, Adapted::Conv2d(layer)) => {
                let plain = if merged { layer.into_merged().unwrap() } else { layer.into_base() };
                flat(plain.forward(x))
            }
            _ => unreachable!("a case and its own layer"),
        }
    }
}

impl Case {
    /// The same layer with other weights.
    fn with_other_weights(mut self, seed: u64) -> Self {
        fn change<const D: usize>(weight: &mut Param<Tensor<D>>, seed: u64) {
            let value = weight.val();
            *weight = param(value.dims(), seed, value.dtype());
        }
        match &mut self {
            Self::Linear { layer, .. } => change(&mut layer.weight, seed),
            Self::Embedding { layer, .. } => change(&mut layer.weight, seed),
            Self::Conv1d { layer, .. } => change(&mut layer.weight, seed),
            Self::Conv2d { layer, .. } => change(&mut layer.weight, seed),
        }
        self
    }
}

impl Adapted {
    /// With what another one's record holds.
    fn with_record_of(self, other: &Self) -> Self {
        match (self, other) {
            (Self::Linear(layer), Self::Linear(other)) => {
                Self::Linear(layer.load_record(other.clone().into_record()))
            }
            (Self::Embedding(layer), Self::Embedding(other)) => {
                Self::Embedding(layer.load_record(other.clone().into_record()))
            }
            (Self::Conv1d(layer), Self::Conv1d(other)) => {
                Self::Conv1d(layer.load_record(other.clone().into_record()))
            }
            (Self::Conv2d(layer), Self::Conv2d(other)) => {
                Self::Conv2d(layer.load_record(other.clone().into_record()))
            }
            _ => unreachable!("two layers of one kind"),
        }
    }
}

fn flat<const D: usize>(tensor: Tensor<D>) -> Tensor<1> {
    let count = tensor.shape().num_elements();
    tensor.reshape([count])
}

fn param<const D: usize>(shape: [usize; D], seed: u64, dtype: DType) -> Param<Tensor<D>> {
    Param::from_tensor(fixed(shape, seed, dtype))
}

fn cases(dtype: DType) -> impl Strategy<Value = Case> {
    let sizes = (1usize..5, 1usize..4, 2usize..9, 2usize..9, any::<bool>(), 0u64..1000);
    let linear = sizes.clone().prop_map(move |(batch, length, d_input, d_output, bias, seed)| {
        let mut layer = LinearConfig::new(d_input, d_output).with_bias(bias).init(&device());
        layer.weight = param([d_input, d_output], seed, dtype);
        layer.bias = layer.bias.map(|_| param([d_output], seed + 1, dtype));
        Case::Linear { layer, x: fixed([batch, length, d_input], seed + 2, dtype) }
    });
    let embedding = sizes.clone().prop_map(move |(batch, length, count, width, _, seed)| {
        let mut layer = EmbeddingConfig::new(count, width).init(&device());
        layer.weight = param([count, width], seed, dtype);
        let ids: Vec<i32> = (0..batch * length).map(|i| (i * 7 % count) as i32).collect();
        let ids = Tensor::from_data(TensorData::new(ids, [batch, length]), &device());
        Case::Embedding { layer, ids }
    });
    let conv1d = sizes.clone().prop_map(move |(batch, kernel, channels, out, bias, seed)| {
        let padding = if bias { PaddingConfig1d::Same } else { PaddingConfig1d::Valid };
        let config = Conv1dConfig::new(channels, out, kernel).with_padding(padding);
        let mut layer = config.with_bias(bias).with_dilation(2).init(&device());
        layer.weight = param([out, channels, kernel], seed, dtype);
        layer.bias = layer.bias.map(|_| param([out], seed + 1, dtype));
        Case::Conv1d { layer, x: fixed([batch, channels, 9], seed + 2, dtype) }
    });
    let conv2d = sizes.prop_map(move |(batch, kernel, channels, out, bias, seed)| {
        let padding = PaddingConfig2d::Explicit(1, 0, 2, 1);
        let config = Conv2dConfig::new([channels, out], [kernel, 2]).with_stride([1, 2]);
        let mut layer = config.with_padding(padding).with_bias(bias).init(&device());
        layer.weight = param([out, channels, kernel, 2], seed, dtype);
        layer.bias = layer.bias.map(|_| param([out], seed + 1, dtype));
        Case::Conv2d { layer, x: fixed([batch, channels, 5, 6], seed + 2, dtype) }
    });
    prop_oneof![linear, embedding, conv1d, conv2d]
}

/// Every variant that a layer may have; the rank fits the smallest of the cases.
fn variants() -> impl Strategy<Value = AdapterConfig> {
    let inits = prop_oneof![
        Just(Init::default()),
        Just(Init::GaussianA { std: Some(0.5) }),
        Just(Init::KaimingUniformA),
        Just(Init::Orthogonal),
        Just(Init::Pissa { iterations: None }),
        Just(Init::Pissa { iterations: Some(2) }),
        Just(Init::Olora),
    ];
    (inits, 0..4, any::<bool>(), any::<bool>(), 0u64..1000).prop_map(
        |(init, variant, root, train_bias, seed)| {
            let mut config = LoraConfig::new(2, 3.0);
            config.init = init;
            config.dora = variant == 1;
            config.lora_bias = variant == 2;
            config.seed = seed;
            if root {
                config.scaling = Scaling::AlphaOverSqrtRank;
            }
            AdapterConfig { train_bias, ..config.resolve("layer").unwrap() }
        },
    )
}

/// Whether a weight is at least of the rank that a start from it needs.
fn is_large_enough(case: &Case) -> bool {
    let dims = match case {
        Case::Linear { layer, .. } => layer.weight.dims(),
        Case::Embedding { layer, .. } => layer.weight.dims(),
        Case::Conv1d { layer, .. } => {
            let [out, channels, kernel] = layer.weight.dims();
            [channels * kernel, out]
        }
        Case::Conv2d { layer, .. } => {
            let [out, channels, height, width] = layer.weight.dims();
            [channels * height * width, out]
        }
    };
    dims.into_iter().all(|size| size >= 2)
}

/// Moves all that trains off its start.
fn train(adapter: &mut LoraAdapter, seed: u64) {
    fn moved<const D: usize>(param: &Param<Tensor<D>>, seed: u64) -> Param<Tensor<D>> {
        let value = param.val().without_autodiff();
        let change = fixed(value.dims(), seed, value.dtype()).without_autodiff() * 0.3;
        Param::from_tensor((value + change).autodiff())
    }
    adapter.lora_a = moved(&adapter.lora_a, seed);
    adapter.lora_b = moved(&adapter.lora_b, seed + 1);
    adapter.lora_bias = adapter.lora_bias.as_ref().map(|bias| moved(bias, seed + 2));
    adapter.base_bias = adapter.base_bias.as_ref().map(|bias| moved(bias, seed + 3));
    adapter.magnitude = adapter.magnitude.as_ref().map(|norms| moved(norms, seed + 4));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn a_new_layer_is_its_base(case in cases(DType::F32), config in variants()) {
        prop_assume!(is_large_enough(&case));
        let adapted = case.wrap(&config);
        let apart = apart(case.forward(&adapted), case.base());
        prop_assert!(apart <= 2.0 * TOLERANCE, "{apart:e}");
    }

    #[test]
    fn merged_equals_unmerged_equals_unloaded(case in cases(DType::F32), config in variants()) {
        prop_assume!(is_large_enough(&case));
        let mut adapted = case.wrap(&config);
        each!(&mut adapted, layer => train(layer.adapter_mut(), 5));
        let expected = case.forward(&adapted);
        let weight = each!(&adapted, layer => host(lora_core::FrozenLayer::weight(layer.base())));

        each!(&mut adapted, layer => layer.merge().unwrap());
        let apart_merged = apart(case.forward(&adapted), expected.clone());
        prop_assert!(apart_merged <= 4.0 * TOLERANCE, "merged {apart_merged:e}");
        let again = each!(&mut adapted, layer => layer.merge().unwrap_err());
        let merged_twice = matches!(again.kind(), ErrorKind::AlreadyMerged { .. });
        prop_assert!(merged_twice);

        each!(&mut adapted, layer => layer.unmerge().unwrap());
        prop_assert_eq!(host(case.forward(&adapted)), host(expected.clone()));
        let kept = each!(&adapted, layer => host(lora_core::FrozenLayer::weight(layer.base())));
        prop_assert_eq!(kept, weight);
        prop_assert!(each!(&mut adapted, layer => layer.unmerge()).is_err());

        let apart_unloaded = apart(case.plain(adapted, true), expected);
        prop_assert!(apart_unloaded <= 4.0 * TOLERANCE, "unloaded {apart_unloaded:e}");
    }

    #[test]
    fn a_record_brings_all_that_the_function_follows_from(
        case in cases(DType::F32), config in variants(), seed in 0u64..1000,
    ) {
        prop_assume!(!config.init.starts_from_weight() || is_large_enough(&case));
        let mut trained = case.wrap(&config);
        each!(&mut trained, layer => train(layer.adapter_mut(), seed));
        let fresh = case.clone().with_other_weights(seed + 7).wrap(&config);
        let loaded = fresh.with_record_of(&trained);
        prop_assert_eq!(host(case.forward(&loaded)), host(case.forward(&trained)));
        prop_assert_eq!(host(case.plain(loaded, true)), host(case.plain(trained, true)));
    }

    #[test]
    fn disabled_equals_base_to_the_bit(case in cases(DType::F32), config in variants()) {
        prop_assume!(is_large_enough(&case));
        let mut adapted = case.wrap(&config);
        each!(&mut adapted, layer => train(layer.adapter_mut(), 6));
        let enabled = host(case.forward(&adapted));
        each!(&mut adapted, layer => layer.set_enabled(false));
        prop_assert_eq!(host(case.forward(&adapted)), host(case.base()));
        each!(&mut adapted, layer => layer.set_enabled(true));
        prop_assert_eq!(host(case.forward(&adapted)), enabled);
        prop_assert_eq!(host(case.plain(adapted, false)), host(case.base()));
    }

    #[test]
    fn the_plain_form_of_an_offset_is_the_same_function(
        case in cases(DType::F32), config in variants(), niter in any::<bool>(),
    ) {
        prop_assume!(is_large_enough(&case));
        let iterations = niter.then_some(1);
        let config = AdapterConfig { init: Init::Pissa { iterations }, ..config };
        let mut adapted = case.wrap(&config);
        each!(&mut adapted, layer => train(layer.adapter_mut(), 7));
        let expected = case.forward(&adapted);
        each!(&mut adapted, layer => {
            prop_assert!(layer.adapter().offset().is_some());
            *layer.adapter_mut() = layer.adapter().clone().into_plain();
            prop_assert_eq!(layer.adapter().rank(), 4);
            prop_assert!(layer.adapter().offset().is_none());
        });
        let apart = apart(case.forward(&adapted), expected);
        prop_assert!(apart <= TOLERANCE, "{apart:e}");
    }

    #[test]
    fn all_that_trains_gets_a_gradient_and_the_base_none(
        case in cases(DType::F32), config in variants(),
    ) {
        prop_assume!(is_large_enough(&case));
        let mut adapted = case.wrap(&config);
        each!(&mut adapted, layer => train(layer.adapter_mut(), 8));
        let gradients = case.forward(&adapted).square().sum().backward();
        each!(&adapted, layer => {
            let adapter = layer.adapter();
            for factor in [&adapter.lora_a, &adapter.lora_b] {
                let gradient = factor.val().grad(&gradients);
                prop_assert!(gradient.is_some_and(|g| host(g).iter().all(|v| v.is_finite())));
            }
            let vectors = [&adapter.lora_bias, &adapter.magnitude, &adapter.base_bias];
            for vector in vectors.into_iter().flatten() {
                prop_assert!(vector.val().grad(&gradients).is_some());
            }
            let weight = lora_core::FrozenLayer::weight(layer.base());
            prop_assert!(!weight.is_require_grad());
        });
    }

    #[test]
    fn a_copy_for_evaluation_is_the_same_function(
        case in cases(DType::F32), config in variants(),
    ) {
        prop_assume!(is_large_enough(&case));
        let mut adapted = case.wrap(&config);
        each!(&mut adapted, layer => train(layer.adapter_mut(), 9));
        let expected = host(case.forward(&adapted));
        let off_the_tape = match case {
            Case::Linear { layer, x } => {
                Case::Linear { layer: layer.valid(), x: x.without_autodiff() }
            }
            Case::Embedding { layer, ids } => {
                Case::Embedding { layer: layer.valid(), ids: ids.without_autodiff() }
            }
            Case::Conv1d { layer, x } => {
                Case::Conv1d { layer: layer.valid(), x: x.without_autodiff() }
            }
            Case::Conv2d { layer, x } => {
                Case::Conv2d { layer: layer.valid(), x: x.without_autodiff() }
            }
        };
        let adapted = match adapted {
            Adapted::Linear(layer) => Adapted::Linear(layer.valid()),
            Adapted::Embedding(layer) => Adapted::Embedding(layer.valid()),
            Adapted::Conv1d(layer) => Adapted::Conv1d(layer.valid()),
            Adapted::Conv2d(layer) => Adapted::Conv2d(layer.valid()),
        };
        let found = off_the_tape.forward(&adapted);
        prop_assert!(!found.is_autodiff());
        prop_assert_eq!(host(found), expected);
    }

    /// DoRA's norms follow from small products; here they are taken of the whole matrix. With 8 rows
    /// or more, and no more than half of the outputs, Aᵀ W is formed along with x W.
    #[test]
    fn dora_equals_its_definition(
        batch in 1usize..20, d_input in 2usize..12, d_output in 2usize..40, seed in 0u64..1000,
    ) {
        for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 2.0 * TOLERANCE)] {
            if !has(dtype) {
                continue;
            }
            let layer = Linear {
                weight: param([d_input, d_output], seed, dtype),
                bias: Some(param([d_output], seed + 1, dtype)),
            };
            let mut config = LoraConfig::new(2, 3.0);
            config.dora = true;
            let mut adapted =
                LoraLinear::with_config(layer.clone(), &config.resolve("").unwrap()).unwrap();
            train(adapted.adapter_mut(), seed + 2);
            let x = fixed([batch, d_input], seed + 9, dtype);
            let adapter = adapted.adapter();
            let whole = layer.weight.val() + adapter.lora_a.val().matmul(adapter.lora_b.val()) * 1.5;
            let norms = whole.clone().square().sum_dim(0).sqrt();
            let m = adapter.magnitude.as_ref().unwrap().val().unsqueeze::<2>();
            let bias = layer.bias.as_ref().unwrap().val().unsqueeze::<2>();
            // Ours sums three terms for the square of a norm; where it is smaller than they are, their
            // rounding counts for so much more.
            let update = adapter.lora_a.val().matmul(adapter.lora_b.val()) * 1.5;
            let cross = (layer.weight.val() * update.clone()).sum_dim(0).abs() * 2.0;
            let terms = layer.weight.val().square().sum_dim(0) + cross + update.square().sum_dim(0);
            let cancelled = (terms / norms.clone().square()).max().into_scalar::<f64>();
            let expected = x.clone().matmul(whole * (m / norms)) + bias;
            let apart = apart(adapted.forward(x), expected);
            let bound = tolerance * cancelled.max(1.0);
            prop_assert!(apart <= bound, "{dtype:?} {apart:e}, terms {cancelled} times the square");
        }
    }
}

/// With the norm held constant, as in the paper: dm = sum g z / n; dA and dB as plain LoRA's for g m / n.
#[test]
fn the_gradients_of_dora_are_those_of_the_paper() {
    if !has(DType::F64) {
        return;
    }
    check_gradients_of_dora([5, 4], 3);
    check_gradients_of_dora([5, 40], 12); // Aᵀ W is formed along with x W
}

fn check_gradients_of_dora([d_input, d_output]: [usize; 2], rows: usize) {
    let rank = 2;
    let layer = Linear { weight: param([d_input, d_output], 1, DType::F64), bias: None };
    let mut config = LoraConfig::new(rank, 3.0);
    config.dora = true;
    let mut adapted = LoraLinear::with_config(layer.clone(), &config.resolve("").unwrap()).unwrap();
    train(adapted.adapter_mut(), 2);
    let x = fixed([rows, d_input], 3, DType::F64);
    let g = fixed([rows, d_output], 4, DType::F64);
    let gradients = (adapted.forward(x.clone()) * g.clone()).sum().backward();

    let plain = |tensor: Tensor<2>| tensor.without_autodiff();
    let adapter = adapted.adapter();
    let (a, b) = (plain(adapter.lora_a.val()), plain(adapter.lora_b.val()));
    let (w, x, g, s) = (plain(layer.weight.val()), plain(x), plain(g), 1.5);
    let whole = w + a.clone().matmul(b.clone()) * s;
    let norms = whole.clone().square().sum_dim(0).sqrt();
    let m = adapter.magnitude.as_ref().unwrap().val().without_autodiff().unsqueeze::<2>();
    let z = x.clone().matmul(whole);
    let dm = (g.clone() * z / norms.clone()).sum_dim(0);
    let g = g * (m / norms);
    let db = x.clone().matmul(a).transpose().matmul(g.clone()) * s;
    let da = x.transpose().matmul(g.matmul(b.transpose())) * s;

    let magnitude = adapter.magnitude.as_ref().unwrap().val().grad(&gradients).unwrap();
    for (name, found, expected) in [
        ("m", magnitude.unsqueeze::<2>(), dm),
        ("A", adapter.lora_a.val().grad(&gradients).unwrap(), da),
        ("B", adapter.lora_b.val().grad(&gradients).unwrap(), db),
    ] {
        let apart = apart(found, expected);
        assert!(apart <= 1e-12, "{name}: {apart:e}");
    }
}

/// Beside a bf16 weight a factor of DoRA is not rounded to 8 bits, where 1.003 would be 1.
#[test]
fn small_changes_of_magnitudes_act_beside_a_half_precision_weight() {
    if !has(DType::BF16) {
        return;
    }
    let config = LoraConfig { dora: true, ..LoraConfig::new(2, 4.0) }.resolve("").unwrap();
    let ratio = |found: Tensor<1>, base: Tensor<1>| {
        let [found, base] = [host(found), host(base)];
        let weighted = found.iter().zip(&base).map(|(found, base)| found * base).sum::<f64>();
        weighted / base.iter().map(|base| base * base).sum::<f64>()
    };
    let linear = Linear { weight: param([64, 48], 1, DType::BF16), bias: None };
    let embedding = Embedding { weight: param([40, 48], 2, DType::BF16) };
    let mut conv = Conv1dConfig::new(6, 48, 2).with_bias(false).init(&device());
    conv.weight = param([48, 6, 2], 3, DType::BF16);
    let ids = Tensor::from_data(TensorData::new((0..40).collect(), [1, 40]), &device());
    let cases = [
        Case::Linear { layer: linear, x: fixed([4, 10, 64], 4, DType::BF16) },
        Case::Embedding { layer: embedding, ids },
        Case::Conv1d { layer: conv, x: fixed([4, 6, 30], 5, DType::BF16) },
    ];
    for case in cases {
        for factor in [1.003, 0.9945, 1.006] {
            let mut adapted = case.wrap(&config);
            each!(&mut adapted, layer => {
                let norms = layer.adapter_mut().magnitude.as_mut().unwrap();
                *norms = norms.clone().map(|norms| norms.mul_scalar(factor));
            });
            let found = ratio(case.forward(&adapted), case.base());
            // The outputs are rounded to 8 bits, each by itself: a factor of 1 would be 3e-3 or more off.
            assert!((found - factor).abs() < 1.2e-3, "{found} for {factor} in {case:?}");
        }
    }
}

/// The same of a layer's bias that trains, and of the adapter's own.
#[test]
fn small_changes_of_biases_act_beside_a_half_precision_weight() {
    if !has(DType::BF16) {
        return;
    }
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let linear = |bias| Linear { weight: param([64, 48], 1, DType::BF16), bias };
    let conv = |bias| {
        let layer = Conv1dConfig::new(6, 48, 2).init(&device());
        Conv1d { weight: param([48, 6, 2], 3, DType::BF16), bias, ..layer }
    };
    // So that the products are small beside the biases, and have finer steps than the sums.
    let x = fixed([4, 10, 64], 4, DType::BF16).mul_scalar(0.125);
    let signal = fixed([4, 6, 30], 5, DType::BF16).mul_scalar(0.125);
    let of = |bias: Option<Param<Tensor<1>>>| {
        [
            Case::Linear { layer: linear(bias.clone()), x: x.clone() },
            Case::Conv1d { layer: conv(bias), x: signal.clone() },
        ]
    };
    let ones = Param::from_tensor(Tensor::ones([48], (&device(), DType::BF16)));
    for (case, without) in of(Some(ones)).into_iter().zip(of(None)) {
        for (bias, dropout) in
            [(TrainedBias::None, 0.0), (TrainedBias::LoraOnly, 0.0), (TrainedBias::LoraOnly, 0.5)]
        {
            let config = LoraConfig { lora_bias: true, bias, dropout, ..LoraConfig::new(2, 4.0) };
            let mut adapted = case.wrap(&config.resolve("").unwrap());
            each!(&mut adapted, layer => {
                let adapter = layer.adapter_mut();
                let own = adapter.lora_bias.as_mut().unwrap();
                *own = own.clone().map(|bias| bias.add_scalar(0.0015)); // times 2
                if let Some(bias) = &mut adapter.base_bias {
                    *bias = bias.clone().map(|bias| bias.add_scalar(0.004));
                }
            });
            let expected = if bias == TrainedBias::None { 1.003 } else { 1.007 };
            let found = mean(&host(case.forward(&adapted))) - mean(&host(without.base()));
            assert!((found - expected).abs() <= 6e-4, "{found} for {expected} in {case:?}");
        }
    }
}

/// 8/3 and 1/0.95 are both 0.2 % off in bf16.
#[test]
fn beside_a_half_precision_weight_scaling_and_dropout_are_as_precise_as_in_f32() {
    if !has(DType::BF16) {
        return;
    }
    let zeros = |shape| Param::from_tensor(Tensor::zeros(shape, (&device(), DType::BF16)));
    let mut conv = Conv1dConfig::new(1, 48, 1).with_bias(false).init(&device());
    conv.weight = Param::from_tensor(Tensor::zeros([48, 1, 1], (&device(), DType::BF16)));
    let ids = Tensor::from_data(TensorData::new((0..64).collect(), [1, 64]), &device());
    let x = fixed([64, 1, 1], 5, DType::BF16);
    let cases = [
        Case::Linear { layer: Linear { weight: zeros([1, 48]), bias: None }, x: x.clone() },
        Case::Conv1d { layer: conv, x: x.clone() },
        Case::Embedding { layer: Embedding { weight: zeros([64, 48]) }, ids },
    ];
    for case in cases {
        for (dtype, dropout) in [(None, 0.0), (Some(DType::BF16), 0.0), (None, 0.05)] {
            let settings = LoraConfig { dtype, dropout, ..LoraConfig::new(3, 8.0) };
            let mut adapted = case.wrap(&settings.resolve("").unwrap());
            let [a, b] = each!(&mut adapted, layer => {
                let adapter = layer.adapter_mut();
                train(adapter, 2);
                [&adapter.lora_a, &adapter.lora_b].map(|factor| in_f64(&factor.val()))
            });
            let (down, keep) = match &case {
                Case::Embedding { .. } => (a, 1.0),
                _ => (in_f64(&x).reshape([64, 1]).matmul(a), 1.0 - dropout),
            };
            let expected = host(down.matmul(b) * (8.0 / 3.0 / keep));
            let found = host(case.forward(&adapted));
            // Of one input, all or nothing is dropped.
            let rows = found.chunks(48).zip(expected.chunks(48));
            let kept = rows.filter(|(found, _)| found.iter().any(|value| *value != 0.0));
            let (mut product, mut square, mut count) = (0.0, 0.0, 0);
            for (found, expected) in kept {
                let products = found.iter().zip(expected).map(|(found, expected)| found * expected);
                product += products.sum::<f64>();
                square += expected.iter().map(|value| value * value).sum::<f64>();
                count += 1;
            }
            assert!(count >= 48, "{count} rows of 64 are there");
            let ratio = product / square;
            assert!((ratio - 1.0).abs() <= 6e-4, "{ratio} for {dtype:?}, {dropout} in {case:?}");
        }
    }
}

/// What is added is zero, and a bias is rounded as in the frozen layer: at once with x W, but where CubeCL compiles the
/// product.
#[test]
fn a_new_adapter_of_a_half_precision_layer_with_a_bias_changes_no_bit() {
    for dtype in [DType::BF16, DType::F16].into_iter().filter(|dtype| has(*dtype)) {
        let bias = Some(param([48], 3, dtype));
        let layer = Linear { weight: param([64, 48], 1, dtype), bias };
        let plain = |x: Tensor<2>| x.without_autodiff();
        let adapted = LoraLinear::wrap(layer, 3, 8.0).unwrap().valid();
        for rows in [1, 40] {
            let x = plain(fixed([rows, 64], 2, dtype));
            let [weight, bias] =
                [adapted.base().weight(), adapted.base().bias().unwrap().unsqueeze()];
            assert!(!weight.device().is_autodiff());
            let once = in_f64(&x).matmul(in_f64(&weight)) + in_f64(&bias);
            let found = adapted.forward(x.clone());
            assert_eq!(host(found.clone()), host(adapted.base().forward(x.clone())));
            let differ = |other: Tensor<2>| {
                let (found, other) = (host(found.clone()), host(other));
                found.iter().zip(&other).filter(|(found, other)| found != other).count()
            };
            let twice = x.matmul(weight) + bias;
            let (once, twice) = (differ(once.cast(DType::F32).cast(dtype)), differ(twice));
            if compiles_kernels(&device()) {
                assert_eq!(twice, 0, "of {rows}");
                continue;
            }
            assert!(
                once * 50 <= rows * 48 && twice * 20 > rows * 48,
                "{once} and {twice} of {rows}"
            );
        }
    }
}

#[test]
fn a_new_adapter_of_a_half_precision_convolution_with_a_bias_changes_no_bit() {
    if !has(DType::BF16) {
        return;
    }
    let mut layer = Conv1dConfig::new(6, 48, 2).init(&device());
    (layer.weight, layer.bias) =
        (param([48, 6, 2], 1, DType::BF16), Some(param([48], 2, DType::BF16)));
    let x = fixed([3, 6, 20], 3, DType::BF16);
    let adapted = LoraConv1d::wrap(layer.clone(), 3, 8.0).unwrap();
    assert_eq!(host(adapted.forward(x.clone())), host(layer.forward(x)));
}

#[test]
fn a_bias_that_trains_gets_its_gradient() {
    let layer =
        Linear { weight: param([4, 3], 1, DType::F32), bias: Some(param([3], 2, DType::F32)) };
    for dropout in [0.0, 0.5] {
        let config = LoraConfig { dropout, ..LoraConfig::new(2, 4.0) }.resolve("").unwrap();
        let adapted = LoraLinear::with_config(layer.clone(), &config).unwrap();
        let adapted = adapted.set_require_grad(true);
        let y = adapted.forward(fixed([5, 4], 3, DType::F32));
        let bias = adapted.base().bias().unwrap();
        assert_eq!(host(bias.grad(&y.sum().backward()).unwrap()), [5.0; 3], "{dropout}");
    }
}

#[test]
fn dora_may_have_another_dtype_than_the_weight() {
    let mut dtypes = vec![DType::F64, DType::F32, DType::BF16];
    dtypes.retain(|dtype| has(*dtype));
    let widest = dtypes[0];
    let x = fixed([12, 6], 3, widest);
    let mut outputs = Vec::new();
    for &weight in &dtypes {
        for &adapter in &dtypes {
            let values = fixed([6, 40], 1, widest).mul_scalar(64.0).round().div_scalar(64.0);
            let layer = Linear { weight: Param::from_tensor(values.cast(weight)), bias: None };
            let mut config = LoraConfig::new(2, 3.0);
            (config.dora, config.dtype) = (true, Some(adapter));
            let mut adapted = LoraLinear::with_config(layer, &config.resolve("").unwrap()).unwrap();
            train(adapted.adapter_mut(), 2);
            let y = adapted.forward(x.clone().cast(weight));
            assert_eq!(y.dtype(), weight);
            let coarse = weight == DType::BF16 || adapter == DType::BF16;
            outputs.push((y, if coarse { 2e-2 } else { 1e-6 }));
        }
    }
    for (y, tolerance) in &outputs[1..] {
        let apart = apart(y.clone(), outputs[0].0.clone());
        assert!(apart <= *tolerance, "{apart:e}");
    }
}

#[test]
fn a_column_of_zeros_stays_zero_with_dora() {
    let weight = Tensor::<2>::from_floats([[1.0, 0.0], [2.0, 0.0]], &device());
    let layer = Linear { weight: Param::from_tensor(weight), bias: None };
    let mut config = LoraConfig::new(1, 1.0);
    config.dora = true;
    let adapted = LoraLinear::with_config(layer, &config.resolve("").unwrap()).unwrap();
    let y = host(adapted.forward(Tensor::<2>::ones([1, 2], &device())));
    assert_eq!(y, [3.0, 0.0]);
}

#[test]
fn a_half_precision_base_is_merged_with_one_rounding_and_the_report_says_what_it_cost() {
    for dtype in [DType::F16, DType::BF16].into_iter().filter(|dtype| has(*dtype)) {
        for dora in [false, true] {
            let layer = Linear { weight: param([40, 30], 1, dtype), bias: None };
            let mut config = LoraConfig::new(4, 4.0);
            config.dora = dora;
            let mut adapted = LoraLinear::with_config(layer, &config.resolve("").unwrap()).unwrap();
            train(adapted.adapter_mut(), 2);
            assert_eq!(adapted.adapter().lora_a.val().dtype(), DType::F32);
            let adapter = adapted.adapter();
            let whole = adapted.base().weight().cast(DType::F32)
                + adapter.lora_a.val().matmul(adapter.lora_b.val());
            let whole = match &adapter.magnitude {
                Some(m) => {
                    let norms = whole.clone().square().sum_dim(0).sqrt();
                    whole * (m.val().unsqueeze::<2>() / norms)
                }
                None => whole,
            };
            let rounding = adapted.merge().unwrap();
            let merged = adapted.merged().unwrap().weight.clone();
            assert_eq!(merged.dtype(), dtype);
            let (merged, whole) = (host(merged), host(whole));
            let errors: Vec<f64> = merged.iter().zip(&whole).map(|(a, b)| (a - b).abs()).collect();
            let largest = errors.iter().fold(0.0, |most: f64, error| error.max(most));
            let mean = errors.iter().sum::<f64>() / errors.len() as f64;
            assert!((rounding.largest - largest).abs() <= 1e-6, "{rounding:?} {largest}");
            assert!((rounding.mean - mean).abs() <= 1e-6, "{rounding:?} {mean}");
            // Half a unit in the last place, of 11 or 8 bits.
            let unit = if dtype == DType::F16 { 2f64.powi(-11) } else { 2f64.powi(-8) };
            for (error, value) in errors.iter().zip(&whole) {
                assert!(*error <= value.abs() * unit + 1e-6, "{error} of {value}");
            }
            assert!(rounding.lost > 0.0 && rounding.lost < 0.1, "{rounding:?}");
        }
    }
}

#[test]
fn the_dtype_of_an_adapter_is_a_setting() {
    if !has(DType::BF16) {
        return;
    }
    let layer = || Linear { weight: param([6, 4], 1, DType::BF16), bias: None };
    let mut config = LoraConfig::new(2, 4.0);
    config.dora = true;
    for (asked, expected) in [(None, DType::F32), (Some(DType::BF16), DType::BF16)] {
        config.dtype = asked;
        let adapted = LoraLinear::with_config(layer(), &config.resolve("").unwrap()).unwrap();
        assert_eq!(adapted.adapter().lora_a.val().dtype(), expected);
        // Rounded, the magnitudes would not be the norms of W any more.
        assert_eq!(adapted.adapter().magnitude.as_ref().unwrap().val().dtype(), DType::F32);
        let y = adapted.forward(fixed([3, 6], 2, DType::BF16));
        assert_eq!(y.dtype(), DType::BF16);
    }
    config.dtype = Some(DType::I32);
    assert!(LoraLinear::with_config(layer(), &config.resolve("").unwrap()).is_err());
}

#[test]
fn a_half_precision_adapter_starts_as_its_base_does() {
    if !has(DType::BF16) {
        return;
    }
    let layer = Linear {
        weight: param([6, 4], 1, DType::F32),
        bias: Some(Param::from_tensor(fixed([4], 3, DType::F32))),
    };
    let mut config = LoraConfig::new(2, 4.0);
    config.dora = true;
    config.bias = TrainedBias::LoraOnly;
    config.dtype = Some(DType::BF16);
    let adapted = LoraLinear::with_config(layer.clone(), &config.resolve("").unwrap()).unwrap();
    let x = fixed([3, 6], 2, DType::F32);
    assert!(apart(adapted.forward(x.clone()), layer.forward(x)) <= TOLERANCE);
}

#[test]
fn dropout_acts_on_the_adapters_input_only_and_only_in_training() {
    let bias = Some(param([40], 4, DType::F32));
    let layer = Linear { weight: param([50, 40], 1, DType::F32), bias };
    let mut config = LoraConfig::new(4, 4.0);
    config.dropout = 0.5;
    let mut adapted = LoraLinear::with_config(layer.clone(), &config.resolve("").unwrap()).unwrap();
    let x = fixed([8, 50], 3, DType::F32);
    // B's partner A is zero: whatever is dropped, the layer is its base to the bit.
    assert_eq!(host(adapted.forward(x.clone())), host(layer.forward(x.clone())));

    train(adapted.adapter_mut(), 2);
    let (first, second) = (adapted.forward(x.clone()), adapted.forward(x.clone()));
    assert_ne!(host(first.clone()), host(second), "no two draws are the same");
    // An input without autodiff is a batch for training too, where A and B train.
    let plain = || adapted.forward(x.clone().without_autodiff());
    assert_ne!(host(plain()), host(plain()), "nothing was dropped");
    // The mean over many draws is what an adapter without dropout gives.
    let draws = 400;
    let mean = (0..draws).fold(Tensor::zeros([8, 40], &device()), |sum: Tensor<2>, _| {
        sum + adapted.forward(x.clone()).detach()
    }) / draws as f32;
    let valid = adapted.clone().valid();
    let exact = valid.forward(x.clone().without_autodiff());
    assert!(apart(mean, exact.clone().autodiff()) < 0.1);
    assert_eq!(host(valid.forward(x.clone().without_autodiff())), host(exact.clone()));
    // Frozen on the training device, it does not train either.
    let frozen = adapted.no_grad();
    assert!(apart(frozen.forward(x), exact.autodiff()) <= TOLERANCE);
}

#[test]
fn dropout_must_be_a_probability_below_one() {
    let mut config = LoraConfig::new(4, 4.0);
    for dropout in [-0.1, 1.0, f64::NAN] {
        config.dropout = dropout;
        let error = config.resolve("").unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("dropout: expected a number from 0 to below 1, found {dropout}")
        );
    }
}

#[test]
fn a_grouped_convolution_is_adapted_as_peft_does_and_not_merged() {
    let config = Conv2dConfig::new([4, 6], [3, 3]).with_groups(2).with_bias(false);
    let mut layer = config.init(&device());
    layer.weight = param([6, 2, 3, 3], 1, DType::F32);
    let x = fixed([2, 4, 5, 5], 2, DType::F32);
    let mut adapted = LoraConv2d::wrap(layer.clone(), 4, 8.0).unwrap();
    assert!(apart(adapted.forward(x.clone()), layer.forward(x.clone())) <= TOLERANCE);
    train(adapted.adapter_mut(), 3);
    let adapter = adapted.adapter();
    assert_eq!((adapter.lora_a.dims(), adapter.lora_b.dims()), ([4 * 9, 4], [2, 6]));

    // Output channel o of group q: its own channels through W, all channels through A's ranks of q.
    let a = Conv2dConfig::new([4, 4], [3, 3]).with_bias(false).init(&device());
    let kernel = adapter.lora_a.val().transpose().reshape([4, 4, 3, 3]);
    let a = Conv2d { weight: Param::from_tensor(kernel.detach()), ..a };
    let down = a.forward(x.clone());
    let b = host(adapter.lora_b.val());
    let up: Vec<Tensor<4>> = (0..6)
        .map(|o| {
            let group = o / 3;
            (0..2).fold(Tensor::zeros([2, 1, 3, 3], &device()), |sum, k| {
                let rank = group * 2 + k;
                sum + down.clone().slice([0..2, rank..rank + 1, 0..3, 0..3]) * b[k * 6 + o]
            })
        })
        .collect();
    let expected = layer.forward(x.clone()) + Tensor::cat(up, 1) * 2.0;
    let apart = apart(adapted.forward(x), expected);
    assert!(apart <= 2.0 * TOLERANCE, "{apart:e}");

    let error = adapted.merge().unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::GroupedConvolution { .. }), "{error}");
    assert!(!adapted.is_merged());
    assert!(LoraConv2d::wrap(layer.clone(), 3, 8.0).is_err(), "2 groups do not divide rank 3");
    for init in [Init::Orthogonal, Init::Olora] {
        let config = AdapterConfig { init, ..LoraConfig::new(4, 8.0).resolve("").unwrap() };
        assert!(LoraConv2d::with_config(layer.clone(), &config).is_err(), "{init:?}");
    }
}

#[test]
fn only_what_adapts_moves_over_three_steps() {
    use burn::optim::{AdamWConfig, GradientsParams};
    let layer =
        Linear { weight: param([6, 4], 1, DType::F32), bias: Some(param([4], 2, DType::F32)) };
    let mut config = LoraConfig::new(2, 4.0);
    config.lora_bias = true;
    let mut adapted = LoraLinear::with_config(layer.clone(), &config.resolve("").unwrap()).unwrap();
    let before = adapted.adapter().clone();
    let mut optimizer = AdamWConfig::new().init();
    let x = fixed([5, 6], 3, DType::F32);
    for _ in 0..3 {
        let gradients = adapted.forward(x.clone()).square().sum().backward();
        let gradients = GradientsParams::from_grads(gradients, &adapted);
        adapted = optimizer.step(1e-2, adapted, gradients);
    }
    assert_eq!(host(adapted.base().weight()), host(layer.weight.val()));
    assert_eq!(host(adapted.base().bias().unwrap()), host(layer.bias.as_ref().unwrap().val()));
    let after = adapted.adapter();
    assert_ne!(host(after.lora_a.val()), host(before.lora_a.val()));
    assert_ne!(host(after.lora_b.val()), host(before.lora_b.val()));
    let bias = |adapter: &LoraAdapter| host(adapter.lora_bias.as_ref().unwrap().val());
    assert_ne!(bias(after), bias(&before));
}

#[test]
fn an_offset_stays_where_the_adapter_started() {
    use burn::optim::{AdamWConfig, GradientsParams};
    for init in [Init::Pissa { iterations: None }, Init::Olora] {
        let layer = Linear { weight: param([6, 5], 1, DType::F32), bias: None };
        let config = AdapterConfig { init, ..LoraConfig::new(2, 4.0).resolve("").unwrap() };
        let mut adapted = LoraLinear::with_config(layer.clone(), &config).unwrap();
        let start = adapted.adapter().offset().unwrap();
        assert_eq!(host(start.0.clone()), host(adapted.adapter().lora_a.val()));
        let mut optimizer = AdamWConfig::new().init();
        let x = fixed([5, 6], 3, DType::F32);
        let gradients = adapted.forward(x).square().sum().backward();
        let gradients = GradientsParams::from_grads(gradients, &adapted);
        adapted = optimizer.step(1e-2, adapted, gradients);
        let offset = adapted.adapter().offset().unwrap();
        assert_eq!((host(offset.0), host(offset.1)), (host(start.0), host(start.1)));
        assert_ne!(
            host(adapted.adapter().lora_a.val()),
            host(adapted.adapter().offset().unwrap().0)
        );
        assert_eq!(host(adapted.base().weight()), host(layer.weight.val()), "W keeps its bits");
    }
}

#[test]
fn slots_take_and_give_what_adapts_them() {
    let layer = Linear { weight: param([6, 4], 1, DType::F32), bias: None };
    let x = fixed([2, 3, 6], 2, DType::F32);
    let lora = LoraLinear::wrap(layer.clone(), 2, 4.0).unwrap();
    let mut slot = AdaptableLinear::from(lora);
    slot.adapter_mut().map(|adapter| train(adapter, 3)).unwrap();
    let expected = host(slot.forward(x.clone()));
    assert!(slot.attach(slot.adaptation().unwrap()).is_err(), "one at a time");

    let adaptation = slot.detach().unwrap();
    assert!(slot.adaptation().is_none() && slot.detach().is_none());
    assert_eq!(host(slot.forward(x.clone())), host(layer.forward(x.clone())));
    slot.attach(adaptation).unwrap();
    assert_eq!(host(slot.forward(x)), expected);

    // Shapes are checked before anything changes.
    let other = Linear { weight: param([6, 5], 1, DType::F32), bias: None };
    let mut other = AdaptableLinear::from(other);
    let Some(Adaptation::LowRank(adapter)) = slot.adaptation() else { panic!() };
    let error = other.attach(Adaptation::LowRank(adapter)).unwrap_err();
    assert!(error.to_string().contains("[2, 5]"), "{error}");
    assert!(other.adaptation().is_none());
}

#[test]
fn token_rows_train_alone_and_the_tied_head_follows() {
    use lora_core::{VisitLora, inject};
    let layer = Embedding { weight: param([7, 4], 1, DType::F32) };
    let ids = Tensor::<2, Int>::from_ints([[1, 3, 5], [3, 0, 6]], &device());
    let hidden = fixed([2, 4], 2, DType::F32);
    let mut config = LoraConfig::new(2, 4.0);
    config.trainable_tokens = vec![("embedding".to_owned(), vec![5, 3])];
    let linear: AdaptableLinear =
        Linear { weight: param([4, 4], 3, DType::F32), bias: None }.into();

    #[derive(Module, Debug, VisitLora)]
    struct Net {
        linear: AdaptableLinear,
        embedding: AdaptableEmbedding,
    }
    let net = Net { linear, embedding: layer.clone().into() };
    let (mut net, report) = inject(net, &config).unwrap();
    assert_eq!(report.replaced[0].what, "2 tokens");
    assert_eq!(host(net.embedding.forward(ids.clone())), host(layer.forward(ids.clone())));

    let Adaptation::Replacement(mut replacement) = net.embedding.detach().unwrap() else {
        panic!()
    };
    let rows = replacement.tokens.as_mut().unwrap();
    rows.rows = Param::from_tensor(fixed([2, 4], 9, DType::F32));
    net.embedding.attach(Adaptation::Replacement(replacement)).unwrap();
    let mut expected = layer.clone();
    let rows = fixed([2, 4], 9, DType::F32).without_autodiff();
    let weight = layer.weight.val().without_autodiff();
    let weight = weight.slice_assign([5..6, 0..4], rows.clone().slice([0..1, 0..4]));
    let weight = weight.slice_assign([3..4, 0..4], rows.slice([1..2, 0..4]));
    expected.weight = Param::from_tensor(weight.clone().autodiff());
    assert_eq!(host(net.embedding.forward(ids.clone())), host(expected.forward(ids.clone())));
    let logits = net.embedding.tied_logits(hidden.clone());
    assert!(apart(logits, hidden.matmul(weight.transpose().autodiff())) <= TOLERANCE);
    let replacement = net.embedding.replacement().unwrap().clone();
    if has(DType::BF16) {
        trained_rows_have_logits_without_the_frozen_ones_rounding(layer.clone(), replacement);
    }

    // A record brings rows with their tokens.
    let other = Net { linear: net.linear.clone(), embedding: layer.clone().into() };
    let mut config = LoraConfig::new(2, 4.0);
    config.trainable_tokens = vec![("embedding".to_owned(), vec![0, 1])];
    let adapted = |mut net: Net, config: &LoraConfig| {
        net.linear.detach();
        inject(net, config).unwrap().0
    };
    let other = adapted(other, &config).load_record(net.clone().into_record());
    assert_eq!(
        host(other.embedding.forward(ids.clone())),
        host(net.embedding.forward(ids.clone()))
    );
    let tokens = other.embedding.replacement().unwrap().tokens.as_ref().unwrap();
    assert_eq!(tokens.ids(), [5, 3]);

    let gradients = net.embedding.forward(ids).square().sum().backward();
    let rows = net.embedding.replacement().unwrap().tokens.as_ref().unwrap().rows.val();
    assert!(rows.grad(&gradients).is_some());
    assert!(net.linear.adapter().is_some());
}

/// The frozen rows are a thousand times as large: a logit that was made from theirs would be wrong by all of
/// its size in bf16.
fn trained_rows_have_logits_without_the_frozen_ones_rounding(
    mut layer: Embedding,
    mut replacement: Replacement,
) {
    let large = layer.weight.val().without_autodiff().mul_scalar(1000.0).cast(DType::BF16);
    layer.weight = Param::from_tensor(large.autodiff());
    let mut slot: AdaptableEmbedding = layer.into();
    let rows = fixed([2, 4], 9, DType::BF16);
    replacement.tokens.as_mut().unwrap().rows = Param::from_tensor(rows.clone());
    slot.attach(Adaptation::Replacement(replacement)).unwrap();
    let hidden = fixed([3, 4], 4, DType::BF16);
    let found = slot.tied_logits(hidden.clone());
    let trained = Tensor::from_data(TensorData::from([5, 3]), &device());
    assert_eq!(host(found.select(1, trained)), host(hidden.matmul(rows.transpose())));
}

#[test]
fn whole_layers_train_beside_the_frozen_ones() {
    let layer = Conv1dConfig::new(3, 4, 2).init(&device());
    let x = fixed([2, 3, 6], 2, DType::F32);
    let expected = host(layer.forward(x.clone()));
    let mut slots: Vec<AdaptableConv1d> = vec![layer.clone().into(), layer.into()];
    let mut config = LoraConfig::new(2, 4.0);
    config.target_modules = lora_core::TargetModules::names(["0"]);
    config.modules_to_save = vec!["1".to_owned()];
    let (model, _) = lora_core::inject(slots, &config).unwrap();
    slots = model;
    assert_eq!(host(slots[1].forward(x.clone())), expected);
    let gradients = slots[1].forward(x.clone()).square().sum().backward();
    let replacement = slots[1].replacement().unwrap();
    assert!(replacement.weight.as_ref().unwrap().val().grad(&gradients).is_some());
    assert!(replacement.bias.as_ref().unwrap().val().grad(&gradients).is_some());

    let Adaptation::Replacement(mut replacement) = slots[1].detach().unwrap() else { panic!() };
    replacement.weight = replacement
        .weight
        .map(|weight| Param::from_tensor((weight.val().without_autodiff() * 2.0).autodiff()));
    slots[1].attach(Adaptation::Replacement(replacement)).unwrap();
    let changed = host(slots[1].forward(x.clone()));
    assert_ne!(changed, expected);
    slots[1].set_enabled(false);
    assert_eq!(host(slots[1].forward(x.clone())), expected);
    slots[1].set_enabled(true);
    let report = lora_core::merge(&mut slots).unwrap();
    assert_eq!(report.layers.len(), 2);
    assert_eq!(host(slots[1].forward(x.clone())), changed);
    lora_core::unmerge(&mut slots).unwrap();
    let _: AdaptableConv2d = Conv2dConfig::new([1, 1], [1, 1]).init(&device()).into();
}

mod audit {
    use super::*;
    use lora_core::{AdapterSet, VisitLora, audit_gradients, inject, merge};

    #[derive(Module, Debug, VisitLora)]
    struct Net {
        first: AdaptableLinear,
        second: AdaptableLinear,
    }

    fn net(config: &LoraConfig) -> Net {
        let layer = |seed| Linear { weight: param([4, 4], seed, DType::F32), bias: None }.into();
        inject(Net { first: layer(1), second: layer(2) }, config).unwrap().0
    }

    fn audit(net: &Net, x: Tensor<2>) -> Result<(), String> {
        let y = net.second.forward(net.first.forward(x));
        let gradients = y.square().sum().backward();
        audit_gradients(net, &gradients).map_err(|error| error.to_string())
    }

    #[test]
    fn every_start_passes_though_one_factor_has_a_gradient_of_zeros() {
        for init in [Init::default(), Init::GaussianA { std: None }, Init::Orthogonal, Init::Olora]
        {
            for dora in [false, true] {
                let config = LoraConfig { init, dora, ..LoraConfig::new(2, 4.0) };
                audit(&net(&config), fixed([3, 4], 3, DType::F32)).unwrap();
            }
        }
    }

    #[test]
    fn what_does_not_train_is_named() {
        let x = fixed([3, 4], 3, DType::F32);
        let mut model = net(&LoraConfig::new(2, 4.0));
        let gradients = model.first.forward(x.clone()).sum().backward();
        let error = audit_gradients(&model, &gradients).unwrap_err();
        assert_eq!(
            error.to_string(),
            "expected a gradient for all that adapts the model: second.lora_a got no gradient; \
             second.lora_b got no gradient; is every adapted layer part of the loss?"
        );

        let error = audit(&model, x.clone() * f32::NAN).unwrap_err();
        assert!(error.contains("first.lora_a got a gradient with NaN or infinity"), "{error}");

        // Both factors at zero never leave it.
        model.first.adapter_mut().unwrap().lora_b =
            Param::from_tensor(Tensor::zeros([2, 4], &device()));
        let gradients = model.second.forward(model.first.forward(x.clone())).sum().backward();
        audit_gradients(&model, &gradients).unwrap_err();

        model.first.set_enabled(false);
        let error = audit(&model, x.clone()).unwrap_err();
        assert!(error.contains("first is disabled, and does not train"), "{error}");
        model.first.set_enabled(true);

        let mut model = net(&LoraConfig::new(2, 4.0));
        merge(&mut model).unwrap();
        let y = model.second.forward(model.first.forward(x.clone().require_grad()));
        let error = audit_gradients(&model, &y.sum().backward()).unwrap_err();
        assert!(error.to_string().contains("first is merged, and does not train"), "{error}");

        AdapterSet::detach(&mut model);
        let y = model.second.forward(model.first.forward(x.require_grad()));
        audit_gradients(&model, &y.sum().backward()).unwrap();
    }
}
