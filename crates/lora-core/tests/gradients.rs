//! The mathematics of one layer: values, gradients, starting point, merging.
#![cfg(any(
    feature = "flex",
    feature = "ndarray",
    feature = "tch",
    feature = "wgpu",
    feature = "cuda"
))]

mod types;

use burn::module::{Module, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::{GradientsParams, SgdConfig};
use burn::tensor::{DType, Device, Distribution, Tensor, TensorData, Tolerance};
use lora_core::{AdapterConfig, ErrorKind, Init, LoraConfig, LoraLinear, lora_linear};
use types::{has, in_f64};

// Sizes that no mistake can hide behind: all unequal, alpha not rank.
const ROWS: usize = 5;
const D_INPUT: usize = 7;
const D_OUTPUT: usize = 4;
const RANK: usize = 3;
const ALPHA: f64 = 7.5;
const SCALING: f64 = 2.5;

fn device() -> Device {
    lora_core::device_from_env().unwrap().autodiff()
}

/// Deterministic values in -1..1, none of them zero.
fn values(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 33) as f64 / (1u64 << 31) as f64) * 2.0 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

struct Problem {
    x: Vec<f64>,
    w: Vec<f64>,
    a: Vec<f64>,
    b: Vec<f64>,
    g: Vec<f64>,
}

impl Problem {
    fn new() -> Self {
        Self {
            x: values(ROWS * D_INPUT, 1),
            w: values(D_INPUT * D_OUTPUT, 2),
            a: values(D_INPUT * RANK, 3),
            b: values(RANK * D_OUTPUT, 4),
            g: values(ROWS * D_OUTPUT, 5),
        }
    }

    /// sum(g * (x W + scaling x A B)) in f64, written out without any tensor library.
    fn loss(&self) -> f64 {
        let mut loss = 0.0;
        for row in 0..ROWS {
            for out in 0..D_OUTPUT {
                let mut y = 0.0;
                for i in 0..D_INPUT {
                    let x = self.x[row * D_INPUT + i];
                    y += x * self.w[i * D_OUTPUT + out];
                    for r in 0..RANK {
                        y += SCALING * x * self.a[i * RANK + r] * self.b[r * D_OUTPUT + out];
                    }
                }
                loss += self.g[row * D_OUTPUT + out] * y;
            }
        }
        loss
    }

    /// Central differences of [`loss`](Self::loss) by the values that `pick` chooses.
    fn differences(&mut self, pick: fn(&mut Self) -> &mut Vec<f64>) -> Vec<f64> {
        const STEP: f64 = 1e-5;
        (0..pick(self).len())
            .map(|index| {
                let value = pick(self)[index];
                pick(self)[index] = value + STEP;
                let above = self.loss();
                pick(self)[index] = value - STEP;
                let below = self.loss();
                pick(self)[index] = value;
                (above - below) / (2.0 * STEP)
            })
            .collect()
    }
}

fn tensor(values: &[f64], shape: [usize; 2], dtype: DType) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), (&device(), dtype))
}

fn assert_close(name: &str, found: Tensor<2>, expected: &[f64], tolerance: f64) {
    let found: Vec<f64> = found.into_data().iter::<f64>().collect();
    assert_eq!(found.len(), expected.len(), "{name}");
    let largest = expected.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
    // `max` passes over NaN.
    assert!(found.iter().all(|value| value.is_finite()), "{name}: NaN or infinity");
    let difference =
        found.iter().zip(expected).fold(0.0f64, |worst, (a, b)| worst.max((a - b).abs()));
    assert!(
        difference <= tolerance * largest,
        "{name}: largest relative difference {:e} is above {tolerance:e}",
        difference / largest
    );
}

#[test]
fn gradients_are_the_finite_differences_of_the_loss() {
    let mut problem = Problem::new();
    for (dtype, tolerance) in
        [(DType::F64, 1e-9), (DType::F32, 1e-5)].into_iter().filter(|(dtype, _)| has(*dtype))
    {
        let x = tensor(&problem.x, [ROWS, D_INPUT], dtype).require_grad();
        let w = tensor(&problem.w, [D_INPUT, D_OUTPUT], dtype).require_grad();
        let a = tensor(&problem.a, [D_INPUT, RANK], dtype).require_grad();
        let b = tensor(&problem.b, [RANK, D_OUTPUT], dtype).require_grad();
        let g = tensor(&problem.g, [ROWS, D_OUTPUT], dtype);

        let y = lora_linear(x.clone(), w.clone(), a.clone(), b.clone(), SCALING);
        let loss = (y * g).sum();
        assert_close("loss", loss.clone().unsqueeze(), &[problem.loss()], tolerance);

        let gradients = loss.backward();
        let dx = problem.differences(|problem| &mut problem.x);
        let da = problem.differences(|problem| &mut problem.a);
        let db = problem.differences(|problem| &mut problem.b);
        assert_close("dx", x.grad(&gradients).unwrap(), &dx, tolerance);
        assert_close("dA", a.grad(&gradients).unwrap(), &da, tolerance);
        assert_close("dB", b.grad(&gradients).unwrap(), &db, tolerance);
        assert!(w.grad(&gradients).is_none(), "W is frozen and must get no gradient");
    }
}

#[test]
fn gradients_are_those_of_the_composed_operations() {
    // Rows enough that the update is added in more than one block of rows.
    let (rows, d_input, d_output, rank) = (700, 48, 1024, 8);
    let device = device();
    let normal =
        |shape: [usize; 2]| Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), &device);
    let x = normal([rows, d_input]).require_grad();
    let w = normal([d_input, d_output]);
    let a = normal([d_input, rank]).require_grad();
    let b = normal([rank, d_output]).require_grad();
    let g = normal([rows, d_output]);

    let composed = x.clone().matmul(w.clone())
        + x.clone().matmul(a.clone()).matmul(b.clone()).mul_scalar(SCALING);
    let expected = (composed.clone() * g.clone()).sum().backward();
    let y = lora_linear(x.clone(), w, a.clone(), b.clone(), SCALING);
    let found = (y.clone() * g).sum().backward();

    let same = |name: &str, found: Tensor<2>, expected: Tensor<2>| {
        let expected: Vec<f64> = expected.into_data().iter::<f64>().collect();
        assert_close(name, found, &expected, 2e-6);
    };
    same("y", y, composed);
    for (name, leaf) in [("dx", x), ("dA", a), ("dB", b)] {
        same(name, leaf.grad(&found).unwrap(), leaf.grad(&expected).unwrap());
    }
}

/// An f32 adapter beside a base in half precision is multiplied as it is, and its gradients are not rounded.
#[test]
fn f32_factors_beside_half_precision_get_gradients_in_full() {
    let on =
        |shape: [usize; 2], seed, dtype| tensor(&values(shape[0] * shape[1], seed), shape, dtype);
    for dtype in [DType::BF16, DType::F16].into_iter().filter(|dtype| has(*dtype)) {
        for [rows, d_input, d_output, rank] in [[3, 64, 48, 4], [200, 64, 48, 4]] {
            let [x, w, g] = [([rows, d_input], 1), ([d_input, d_output], 2), ([rows, d_output], 3)]
                .map(|(shape, seed)| on(shape, seed, dtype));
            let [a, b] = [([d_input, rank], 4), ([rank, d_output], 5)]
                .map(|(shape, seed)| on(shape, seed, DType::F32));
            let run = |wide: bool| {
                let [x, w, g, a, b] =
                    [&x, &w, &g, &a, &b].map(|t| if wide { in_f64(t) } else { t.clone() });
                let [x, a, b] = [x, a, b].map(|t| t.detach().require_grad());
                let y = lora_linear(x.clone(), w, a.clone(), b.clone(), SCALING);
                let gradients = (y.clone() * g).sum().backward();
                let [dx, da, db] = [x, a, b].map(|leaf| leaf.grad(&gradients).unwrap());
                (y, dx, da, db)
            };
            let ((y, dx, da, db), (exact_y, exact_dx, exact_da, exact_db)) =
                (run(false), run(true));
            assert_eq!([y.dtype(), dx.dtype()], [dtype; 2]);
            // x W is rounded, and the sum with the update once more: seldom to another number than this.
            let product = in_f64(&x.clone().matmul(w.clone()));
            let update = exact_y.clone() - in_f64(&x).matmul(in_f64(&w));
            let once = in_f64(&(product + update).cast(dtype)).not_equal(in_f64(&y));
            let others = once.int().sum().into_scalar::<i64>() as usize;
            assert!(others * 50 <= rows * d_output, "{others} of {}", rows * d_output);
            assert_eq!([da.dtype(), db.dtype()], [DType::F32; 2]);
            for (name, found, exact, tolerance) in [
                ("y", y, exact_y, 1e-2),
                ("dx", dx, exact_dx, 1e-2),
                ("dA", da, exact_da, 2e-6),
                ("dB", db, exact_db, 2e-6),
            ] {
                let exact: Vec<f64> = exact.into_data().iter::<f64>().collect();
                assert_close(name, found, &exact, tolerance);
            }
        }
    }
}

#[test]
fn an_input_that_needs_no_gradient_gets_none() {
    let device = device();
    let x = Tensor::<2>::random([3, 6], Distribution::Default, &device);
    let layer = LoraLinear::wrap(LinearConfig::new(6, 4).init(&device), 2, 4.0).unwrap();
    let gradients = layer.forward(x.clone()).sum().backward();
    assert!(x.grad(&gradients).is_none());
    assert!(layer.adapter().lora_a.val().grad(&gradients).is_some());
}

fn linear(d_input: usize, d_output: usize) -> Linear {
    LinearConfig::new(d_input, d_output).init(&device())
}

fn plain(rank: usize, alpha: f64) -> AdapterConfig {
    LoraConfig::new(rank, alpha).resolve("").unwrap()
}

/// A layer whose adapter is not at its starting point.
fn trained_layer(dtype: DType) -> LoraLinear {
    let mut layer = linear(D_INPUT, D_OUTPUT);
    layer.weight = layer.weight.map(|weight| weight.without_autodiff().cast(dtype).autodiff());
    layer.bias =
        layer.bias.map(|bias| bias.map(|bias| bias.without_autodiff().cast(dtype).autodiff()));
    let mut layer = LoraLinear::wrap(layer, RANK, ALPHA).unwrap();
    let factor = |seed, shape: [usize; 2]| {
        Param::from_tensor(tensor(&values(shape[0] * shape[1], seed), shape, DType::F32))
    };
    layer.adapter_mut().lora_a = factor(6, [D_INPUT, RANK]);
    layer.adapter_mut().lora_b = factor(7, [RANK, D_OUTPUT]);
    layer
}

fn bits<const D: usize>(tensor: Tensor<D>) -> Vec<u32> {
    tensor.into_data().iter::<f32>().map(f32::to_bits).collect()
}

#[test]
fn a_new_layer_equals_its_base_to_the_bit() {
    let layer = linear(96, 160);
    for init in [Init::default(), Init::GaussianA { std: None }, Init::KaimingUniformA] {
        let config = AdapterConfig { init, seed: 3, ..plain(8, 16.0) };
        let adapted = LoraLinear::with_config(layer.clone(), &config).unwrap();
        let x = Tensor::<2>::random([70, 96], Distribution::Normal(0.0, 1.0), &device());
        assert_eq!(bits(adapted.forward(x.clone())), bits(layer.forward(x.clone())), "{init:?}");
        let x = x.reshape([2, 5, 7, 96]);
        assert_eq!(bits(adapted.forward(x.clone())), bits(layer.forward(x)), "{init:?}");
    }
}

#[test]
fn inputs_of_any_rank_give_the_same_rows() {
    let layer = trained_layer(DType::F32);
    let x = Tensor::<2>::random([12, D_INPUT], Distribution::Default, &device());
    let rows = bits(layer.forward(x.clone()));
    let y = layer.forward(x.clone().reshape([2, 3, 2, D_INPUT]));
    assert_eq!(y.dims(), [2, 3, 2, D_OUTPUT]);
    assert_eq!(bits(y), rows);
    let one = layer.forward(x.slice([0..1, 0..D_INPUT]).reshape([D_INPUT]));
    assert_eq!(one.dims(), [D_OUTPUT]);
    let one: Vec<f32> = one.into_data().iter::<f32>().collect();
    for (a, b) in one.iter().zip(rows.iter().map(|bits| f32::from_bits(*bits))) {
        assert!((a - b).abs() < 1e-5, "{a} {b}");
    }
    let none = Tensor::<2>::zeros([0, D_INPUT], &device());
    assert_eq!(layer.forward(none).dims(), [0, D_OUTPUT]);
    let none = Tensor::<3>::zeros([2, 0, D_INPUT], &device());
    assert_eq!(layer.forward(none).dims(), [2, 0, D_OUTPUT]);
}

/// Also of an input that is not in one piece, and of factors of which one does not train.
#[test]
fn inputs_of_any_rank_get_the_gradients_of_their_rows() {
    for [a_trains, b_trains] in [[true, true], [false, true], [true, false]] {
        let mut layer = trained_layer(DType::F32);
        let adapter = layer.adapter_mut();
        adapter.lora_a = adapter.lora_a.clone().set_require_grad(a_trains);
        adapter.lora_b = adapter.lora_b.clone().set_require_grad(b_trains);
        let (a, b) = (layer.adapter().lora_a.val(), layer.adapter().lora_b.val());
        let x = tensor(&values(12 * D_INPUT, 8), [12, D_INPUT], DType::F32).require_grad();
        let g = tensor(&values(12 * D_OUTPUT, 9), [12, D_OUTPUT], DType::F32);

        let swapped = || x.clone().reshape([4, 3, D_INPUT]).swap_dims(0, 1);
        let y = layer.forward(swapped());
        assert_eq!(y.dims(), [3, 4, D_OUTPUT]);
        let y = y.reshape([12, D_OUTPUT]);
        let found = (y.clone() * g.clone()).sum().backward();

        let rows = swapped().reshape([12, D_INPUT]);
        let update = rows.clone().matmul(a.clone()).matmul(b.clone()) * SCALING;
        let bias = layer.base().bias().unwrap().unsqueeze();
        let composed = rows.matmul(layer.base().weight()) + bias + update;
        let expected = (composed.clone() * g).sum().backward();

        let host = |tensor: Tensor<2>| tensor.into_data().iter::<f64>().collect::<Vec<_>>();
        assert_close("y", y, &host(composed), 2e-6);
        for (name, leaf, trains) in [("dx", x, true), ("dA", a, a_trains), ("dB", b, b_trains)] {
            match (leaf.grad(&found), leaf.grad(&expected)) {
                (Some(found), Some(expected)) if trains => {
                    assert_close(name, found, &host(expected), 2e-6);
                }
                (None, None) if !trains => {}
                (found, _) => panic!("{name}, A {a_trains}, B {b_trains}: {found:?}"),
            }
        }
    }
}

#[test]
fn the_first_step_moves_a_and_not_b() {
    let layer = LoraLinear::wrap(linear(D_INPUT, D_OUTPUT), RANK, ALPHA).unwrap();
    let (weight, bias) = (bits(layer.base().weight()), bits(layer.base().bias().unwrap()));
    let b = bits(layer.adapter().lora_b.val());
    assert!(bits(layer.adapter().lora_a.val()).iter().all(|bits| *bits == 0));

    let x = tensor(&values(ROWS * D_INPUT, 8), [ROWS, D_INPUT], DType::F32);
    let gradients = layer.forward(x).powi_scalar(2).sum().backward();
    let gradients = GradientsParams::from_grads(gradients, &layer);
    assert_eq!(gradients.len(), 2, "A and B, and neither W nor b");
    let layer = SgdConfig::new().init().step(0.1, layer, gradients);

    assert!(bits(layer.adapter().lora_a.val()).iter().all(|bits| *bits != 0));
    assert_eq!(bits(layer.adapter().lora_b.val()), b);
    assert_eq!(bits(layer.base().weight()), weight);
    assert_eq!(bits(layer.base().bias().unwrap()), bias);
}

#[test]
fn merged_equals_unmerged_and_unmerge_gives_back_the_bits() {
    let mut layer = trained_layer(DType::F32);
    let x = tensor(&values(ROWS * D_INPUT, 9), [ROWS, D_INPUT], DType::F32);
    let (weight, before) = (bits(layer.base().weight()), layer.forward(x.clone()));

    layer.merge().unwrap();
    assert!(layer.is_merged());
    assert!(matches!(layer.merge().unwrap_err().kind(), ErrorKind::AlreadyMerged { .. }));
    let merged = layer.forward(x.clone());
    merged
        .clone()
        .into_data()
        .assert_approx_eq::<f32>(&before.clone().into_data(), Tolerance::absolute(2e-5));
    assert_ne!(bits(merged.clone()), bits(layer.base().forward(x.clone())));

    layer.unmerge().unwrap();
    assert!(matches!(layer.unmerge().unwrap_err().kind(), ErrorKind::NotMerged { .. }));
    assert_eq!(bits(layer.base().weight()), weight);
    assert_eq!(bits(layer.forward(x.clone())), bits(before));

    let plain = layer.into_merged().unwrap();
    assert_eq!(bits(plain.forward(x)), bits(merged));
    assert!(plain.weight.is_require_grad());
}

#[test]
fn a_merge_rounds_once_to_the_dtype_of_the_weight() {
    if !has(DType::BF16) {
        return;
    }
    // 1 + 2.5 * 3 * 0.0044 = 1.033: bf16 has steps of 1/128 there. The update alone, 0.033, would round
    // to 0.03296, and that sum to another neighbour for some of these values.
    let (rows, columns) = (1, 200);
    let weights: Vec<f64> = (0..columns).map(|column| 1.0 + column as f64 / 128.0 / 4.0).collect();
    let weights: Vec<f32> =
        weights.iter().map(|weight| half::bf16::from_f64(*weight).to_f32()).collect();
    let updates: Vec<f64> = (0..columns).map(|column| 0.0044 + column as f64 * 1e-5).collect();

    let mut layer = LinearConfig::new(rows, columns).with_bias(false).init(&device());
    let data = TensorData::new(weights.clone(), [rows, columns]);
    layer.weight = Param::from_tensor(Tensor::from_data(data, (&device(), DType::BF16)));
    let mut layer = LoraLinear::wrap(layer, 1, 2.5).unwrap();
    layer.adapter_mut().lora_a = Param::from_tensor(tensor(&[3.0], [1, 1], DType::F32));
    layer.adapter_mut().lora_b = Param::from_tensor(tensor(&updates, [1, columns], DType::F32));
    layer.merge().unwrap();
    let merged = layer.merged().unwrap().weight.clone();
    assert_eq!(merged.dtype(), DType::BF16);

    let (mut once, mut twice) = (Vec::new(), Vec::new());
    for (weight, update) in weights.iter().zip(&updates) {
        let update = 3.0 * (2.5 * *update as f32);
        once.push(half::bf16::from_f32(weight + update).to_f32());
        let rounded = half::bf16::from_f32(update).to_f32();
        twice.push(half::bf16::from_f32(weight + rounded).to_f32());
    }
    assert_ne!(once, twice, "the values tell one rounding from two");
    assert_eq!(merged.into_data().iter::<f32>().collect::<Vec<_>>(), once);
}

#[test]
fn an_f64_layer_is_merged_in_f64() {
    if !has(DType::F64) {
        return;
    }
    let mut layer = trained_layer(DType::F64);
    let factor = |seed, shape: [usize; 2]| {
        Param::from_tensor(tensor(&values(shape[0] * shape[1], seed), shape, DType::F64))
    };
    layer.adapter_mut().lora_a = factor(6, [D_INPUT, RANK]);
    layer.adapter_mut().lora_b = factor(7, [RANK, D_OUTPUT]);
    let x = tensor(&values(ROWS * D_INPUT, 9), [ROWS, D_INPUT], DType::F64);
    let expected: Vec<f64> = layer.forward(x.clone()).into_data().iter::<f64>().collect();
    layer.merge().unwrap();
    assert_close("merged", layer.forward(x), &expected, 1e-14);
}

#[test]
fn an_adapter_beside_a_half_precision_weight_trains_in_f32() {
    if !has(DType::BF16) {
        return;
    }
    let layer = trained_layer(DType::BF16);
    let x = tensor(&values(ROWS * D_INPUT, 8), [ROWS, D_INPUT], DType::BF16);
    let y = layer.forward(x);
    assert_eq!(y.dtype(), DType::BF16);
    let before = bits(layer.adapter().lora_b.val());
    let gradients = GradientsParams::from_grads(y.sum().backward(), &layer);
    let layer = SgdConfig::new().init().step(1e-6, layer, gradients);
    assert_eq!(layer.adapter().lora_b.val().dtype(), DType::F32);
    assert_ne!(bits(layer.adapter().lora_b.val()), before, "a step that bf16 could not hold");
}

#[test]
fn a_merge_that_meets_nan_or_infinity_changes_nothing() {
    for value in [f32::NAN, f32::INFINITY, 1e38] {
        let mut layer = trained_layer(DType::F32);
        let a = Tensor::<2>::full([D_INPUT, RANK], value, &device());
        layer.adapter_mut().lora_a = Param::from_tensor(a);
        let b = Tensor::<2>::full([RANK, D_OUTPUT], 1e3, &device());
        layer.adapter_mut().lora_b = Param::from_tensor(b);
        assert!(matches!(layer.merge().unwrap_err().kind(), ErrorKind::NonFinite { .. }));
        assert!(!layer.is_merged());
    }
}

#[test]
fn unusable_settings_are_errors() {
    for (rank, alpha) in [(0, 1.0), (2, 0.0), (2, f64::NAN), (2, -4.0)] {
        assert!(LoraLinear::wrap(linear(4, 4), rank, alpha).is_err(), "{rank} {alpha}");
    }
}

#[test]
fn wrapping_does_not_freeze_a_clone_of_the_layer() {
    let original = linear(4, 4);
    let _ = LoraLinear::wrap(original.clone(), 2, 4.0).unwrap();
    assert!(original.weight.val().is_require_grad());
}

#[test]
fn starting_values_have_the_stated_spread_and_follow_the_seed() {
    let draw = |init, seed| {
        let config = AdapterConfig { init, seed, ..plain(64, 64.0) };
        let layer = LoraLinear::with_config(linear(256, 512), &config).unwrap();
        (layer.adapter().lora_a.val(), layer.adapter().lora_b.val())
    };
    let moments = |tensor: Tensor<2>| {
        let values: Vec<f64> = tensor.into_data().iter::<f64>().collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>();
        (mean, (variance / values.len() as f64).sqrt())
    };
    let expect = |tensor: Tensor<2>, std: f64| {
        let (mean, found) = moments(tensor);
        assert!(mean.abs() < 0.03 * std, "mean {mean}");
        assert!((found / std - 1.0).abs() < 0.02, "std {found}, expected {std}");
    };
    expect(draw(Init::default(), 1).1, 1.0 / 8.0);
    expect(draw(Init::GaussianB { std: Some(0.3) }, 1).1, 0.3);
    expect(draw(Init::GaussianA { std: None }, 1).0, 1.0 / 64.0);
    expect(draw(Init::KaimingUniformA, 1).0, 1.0 / 16.0 / 3f64.sqrt());

    assert_eq!(bits(draw(Init::default(), 1).1), bits(draw(Init::default(), 1).1));
    assert_ne!(bits(draw(Init::default(), 1).1), bits(draw(Init::default(), 2).1));
}

#[test]
fn validation_mode_gives_the_same_output() {
    let layer = trained_layer(DType::F32);
    let x = tensor(&values(ROWS * D_INPUT, 10), [ROWS, D_INPUT], DType::F32);
    let y = layer.valid().forward(x.clone().inner());
    assert_eq!(bits(y), bits(layer.forward(x)));
}
