//! The table of the guide's page about merging, measured again: what a merge into half precision costs.
#![cfg(any(
    feature = "flex",
    feature = "ndarray",
    feature = "tch",
    feature = "wgpu",
    feature = "cuda"
))]

mod types;

use burn::module::Param;
use burn::nn::Linear;
use burn::tensor::{DType, Tensor, TensorData};
use lora_core::{
    AdaptableLayer, AdaptableLinear, Adaptation, LoraAdapter, Scaling, merge, unmerge,
};
use rand::SeedableRng;
use rand::rngs::Xoshiro256PlusPlus;
use rand_distr::{Distribution, Normal};
use types::{has, in_f64};

const SIZE: usize = 512;
const RANK: usize = 8;

fn normal<const D: usize>(shape: [usize; D], std: f32, seed: u64) -> Tensor<D> {
    let rng = Xoshiro256PlusPlus::seed_from_u64(seed);
    let values = Normal::new(0.0, std).unwrap().sample_iter(rng);
    let values: Vec<f32> = values.take(shape.iter().product()).collect();
    Tensor::from_data(TensorData::new(values, shape), &lora_core::device_from_env().unwrap())
}

fn norm(tensor: Tensor<2>) -> f64 {
    tensor.cast(DType::F32).square().sum().sqrt().into_scalar()
}

/// What one way of merging loses of an update of norm `ratio · ‖W‖`, and the share of W's values that
/// are others after it was undone.
struct Cost {
    lost: f64,
    not_restored: f64,
}

fn layer(dtype: DType, ratio: f64) -> (AdaptableLinear, Tensor<2>, LoraAdapter) {
    let weight = normal([SIZE, SIZE], 0.02, 1).cast(dtype);
    let (a, b) = (normal([SIZE, RANK], 1.0, 2), normal([RANK, SIZE], 1.0, 3));
    let factor = ratio * norm(weight.clone()) / norm(a.clone().matmul(b.clone()));
    let b = b.mul_scalar(factor);
    let adapter = LoraAdapter::from_tensors(a, b, RANK as f64, Scaling::AlphaOverRank).unwrap();
    let plain = Linear { weight: Param::from_tensor(weight.clone()), bias: None };
    let mut slot = AdaptableLinear::from(plain);
    slot.attach(Adaptation::LowRank(adapter.clone())).unwrap();
    (slot, weight, adapter)
}

/// As this crate does it.
fn rounded_once(dtype: DType, ratio: f64) -> Cost {
    let (mut slot, weight, _) = layer(dtype, ratio);
    let report = merge(&mut slot).unwrap();
    unmerge(&mut slot).unwrap();
    Cost { lost: report.layers[0].rounding.lost, not_restored: differing(slot.weight(), weight) }
}

/// The product rounded, added in the weight's dtype, and subtracted again.
fn added_in_dtype(dtype: DType, ratio: f64) -> Cost {
    let (_, weight, adapter) = layer(dtype, ratio);
    let [a, b] = [&adapter.lora_a, &adapter.lora_b].map(|factor| in_f64(&factor.val()));
    // How many values come back depends on the last bits of the product, which a device leaves as it happens to add.
    let update = a.matmul(b).mul_scalar(adapter.scaling()).cast(DType::F32).into_data();
    let update = Tensor::<2>::from_data(update, &weight.device());
    let rounded = update.clone().cast(dtype);
    let merged = weight.clone() + rounded.clone();
    let exact = weight.clone().cast(DType::F32) + update.clone();
    let lost = norm(merged.clone().cast(DType::F32) - exact) / norm(update);
    Cost { lost, not_restored: differing(merged - rounded, weight) }
}

fn differing(found: Tensor<2>, expected: Tensor<2>) -> f64 {
    let differ: f64 = found.not_equal(expected).int().sum().into_scalar();
    differ / (SIZE * SIZE) as f64
}

/// Two significant digits.
fn percent(share: f64) -> String {
    match 100.0 * share {
        0.0 => "0 %".to_owned(),
        percent if percent < 0.995 => format!("{percent:.2} %"),
        percent if percent < 9.95 => format!("{percent:.1} %"),
        percent => format!("{percent:.0} %"),
    }
}

/// The cells of the page's row for this dtype and ratio, in percent, each with the worth of its last digit.
fn row_of_the_page(name: &str, ratio: f64) -> Vec<(f64, f64)> {
    let start = format!("| {name} | {} |", percent(ratio));
    let page = include_str!("../docs/merging.md");
    let row = page.lines().find_map(|line| line.strip_prefix(&start));
    let row = row.unwrap_or_else(|| panic!("docs/merging.md has no row that begins with {start}"));
    let cells = row.split('|').filter_map(|cell| cell.trim().strip_suffix(" %"));
    let digits = |cell: &str| cell.split_once('.').map_or(0, |(_, digits)| digits.len() as i32);
    cells.map(|cell| (cell.parse().unwrap(), 10_f64.powi(-digits(cell)))).collect()
}

#[test]
fn the_page_about_merging_has_these_figures() {
    for (name, dtype) in [("f32", DType::F32), ("f16", DType::F16), ("bf16", DType::BF16)] {
        if !has(dtype) {
            continue;
        }
        for ratio in [0.1, 0.01, 0.001] {
            let (once, added) = (rounded_once(dtype, ratio), added_in_dtype(dtype, ratio));
            let shares = [once.lost, once.not_restored, added.lost, added.not_restored];
            let row = shares.map(percent).join(" | ");
            println!("| {name} | {} | {row} |", percent(ratio));
            let page = row_of_the_page(name, ratio);
            assert_eq!(page.len(), shares.len());
            for (share, (written, digit)) in shares.into_iter().zip(page) {
                let found = 100.0 * share;
                // By one in the last digit, which depends on the order in which a processor adds; a
                // zero is one.
                let near = match written {
                    0.0 => found == 0.0,
                    _ => (found - written).abs() <= 1.5 * digit,
                };
                assert!(near, "{name}, {}: found {row}, the page has {written} %", percent(ratio));
            }
        }
    }
}
