//! Laws of several adapters on one model, over random shapes, ranks and values in f32 and f64.
//!
//! Every layer kind is asked for its own output, so that a law about updates can be seen in it; `forward`
//! runs through layers one after the other.
#![cfg(any(
    feature = "flex",
    feature = "ndarray",
    feature = "tch",
    feature = "wgpu",
    feature = "cuda"
))]

mod types;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::LazyLock;

use burn::module::{Module, Param};
use burn::nn::conv::{Conv1d, Conv1dConfig};
use burn::nn::{Embedding, Linear};
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::activation::relu;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use lora_core::{
    Adaptable, AdaptableConv1d, AdaptableEmbedding, AdaptableLayer, AdaptableLinear, Adaptation,
    AdapterSet, AdapterSets, Combination, ErrorKind, Init, LoraAdapter, LoraConfig, ParameterCount,
    Scaling, VisitLora, combine, disable, inject, merge, unmerge,
};
use proptest::prelude::*;
use types::has;

#[derive(Module, Debug, VisitLora)]
struct Net {
    embed: AdaptableEmbedding,
    up: AdaptableLinear,
    down: AdaptableLinear,
    conv: AdaptableConv1d,
}

const LAYERS: [&str; 4] = ["embed", "up", "down", "conv"];
const BATCH: usize = 4;
const LENGTH: usize = 3;

/// What a net is made of.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    vocabulary: usize,
    width: usize,
    hidden: usize,
    channels: usize, // of each group, in and out
    groups: usize,
    dtype: DType,
    seed: u64,
}

fn sizes() -> impl Strategy<Value = Sizes> {
    let dtypes = [DType::F32, DType::F64].into_iter().filter(|dtype| has(*dtype));
    let dtype = proptest::sample::select(dtypes.collect::<Vec<_>>());
    (1usize..8, 1usize..8, 1usize..8, 1usize..3, 1usize..3, dtype, any::<u64>()).prop_map(
        |(vocabulary, width, hidden, channels, groups, dtype, seed)| Sizes {
            vocabulary,
            width,
            hidden,
            channels,
            groups,
            dtype,
            seed,
        },
    )
}

static FIXED: LazyLock<Sizes> = LazyLock::new(|| Sizes {
    vocabulary: 7,
    width: 5,
    hidden: 6,
    channels: 2,
    groups: 1,
    dtype: if has(DType::F64) { DType::F64 } else { DType::F32 },
    seed: 1,
});

/// Deterministic values in -1..1.
struct Values(u64);

impl Values {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 33) as f64 / (1u64 << 31) as f64) * 2.0 - 1.0
    }

    fn up_to(&mut self, largest: usize) -> usize {
        1 + ((self.next() + 1.0) / 2.0 * largest as f64) as usize
    }

    fn tensor<const D: usize>(&mut self, dims: [usize; D], dtype: DType) -> Tensor<D> {
        let values: Vec<f64> = (0..dims.iter().product()).map(|_| self.next()).collect();
        Tensor::from_data(TensorData::new(values, dims), (&device(), dtype))
    }
}

fn device() -> Device {
    lora_core::device_from_env().unwrap().autodiff()
}

impl Sizes {
    fn net(self) -> Net {
        let Self { vocabulary, width, hidden, channels, groups, dtype, seed } = self;
        let mut values = Values(seed);
        let device = device();
        let mut param = |dims: [usize; 2]| Param::from_tensor(values.tensor(dims, dtype));
        let embed = Embedding { weight: param([vocabulary, width]) };
        let up = Linear { weight: param([width, hidden]), bias: None };
        let down = Linear { weight: param([hidden, width]), bias: None };
        let up = Linear { bias: Some(Param::from_tensor(values.tensor([hidden], dtype))), ..up };
        let channels = channels * groups;
        let conv = Conv1dConfig::new(channels, channels, 2).with_groups(groups).init(&device);
        let weight = values.tensor([channels, channels / groups, 2], dtype);
        let bias = Some(Param::from_tensor(values.tensor([channels], dtype)));
        let conv = Conv1d { weight: Param::from_tensor(weight), bias, ..conv };
        Net { embed: embed.into(), up: up.into(), down: down.into(), conv: conv.into() }
    }

    /// A set of random ranks and values, where `layers` says so.
    fn set(self, seed: u64, layers: [bool; 4]) -> AdapterSet {
        let mut net = self.net();
        let mut values = Values(self.seed ^ seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let mut wanted = layers.into_iter();
        net.visit_lora_mut("", &mut |_, layer| {
            let (groups, [group_input, d_output]) = (layer.groups(), layer.dims());
            let rank = values.up_to(3) * groups;
            let a = values.tensor([group_input * groups, rank], self.dtype);
            let b = values.tensor([rank, d_output], self.dtype);
            let rule = [Scaling::AlphaOverRank, Scaling::AlphaOverSqrtRank][rank % 2];
            let alpha = 0.5 + values.next().abs() * 3.0;
            let mut adapter = LoraAdapter::from_tensors(a, b.clone(), alpha, rule).unwrap();
            adapter.lora_b = Param::from_tensor(b.slice(0..rank / groups));
            if wanted.next().unwrap() {
                layer.attach(Adaptation::LowRank(adapter)).unwrap();
            }
        });
        AdapterSet::detach(&mut net)
    }

    fn input(self) -> (Tensor<2, Int>, Tensor<3>) {
        let mut values = Values(self.seed ^ 5);
        let ids = (0..BATCH * LENGTH).map(|_| values.up_to(self.vocabulary) as i32 - 1);
        let ids = TensorData::new(ids.collect::<Vec<_>>(), [BATCH, LENGTH]);
        let x = values.tensor([BATCH, LENGTH, self.width], self.dtype);
        (Tensor::from_data(ids, &device()), x)
    }

    fn tolerance(self) -> f64 {
        if self.dtype == DType::F64 { 1e-13 } else { 1e-6 }
    }
}

impl Net {
    /// The output of each layer for inputs of its own, `[BATCH, ...]`.
    fn outputs(&self, sizes: Sizes) -> Vec<Vec<f64>> {
        self.outputs_of(sizes, 0..BATCH)
    }

    fn outputs_of(&self, sizes: Sizes, samples: std::ops::Range<usize>) -> Vec<Vec<f64>> {
        let (ids, x) = sizes.input();
        let mut values = Values(sizes.seed ^ 6);
        let wide = values.tensor([BATCH, LENGTH, sizes.hidden], sizes.dtype);
        let channels = sizes.channels * sizes.groups;
        let signal = values.tensor([BATCH, channels, LENGTH], sizes.dtype);
        let outputs = [
            self.embed.forward(ids.slice(samples.clone())),
            self.up.forward(x.slice(samples.clone())),
            self.down.forward(wide.slice(samples.clone())),
            self.conv.forward(signal.slice(samples)),
        ];
        outputs.map(numbers).into()
    }

    fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        self.through(ids).2
    }

    /// The outputs of three layers, each the input of the next.
    fn through(&self, ids: Tensor<2, Int>) -> (Tensor<3>, Tensor<3>, Tensor<3>) {
        let x = self.embed.forward(ids);
        let up = self.up.forward(x.clone());
        let down = self.down.forward(relu(up.clone()));
        (x, up, down)
    }
}

fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.into_data().iter::<f64>().collect()
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|value| value * value).sum::<f64>().sqrt()
}

fn minus(x: &[f64], y: &[f64]) -> Vec<f64> {
    assert_eq!(x.len(), y.len());
    x.iter().zip(y).map(|(x, y)| x - y).collect()
}

/// |found - expected| over `scale`, the norm of what was added up on the way.
fn close(what: &str, found: &[f64], expected: &[f64], scale: f64, tolerance: f64) {
    let error = norm(&minus(found, expected)) / scale.max(norm(expected)).max(1e-30);
    assert!(error <= tolerance, "{what}: {error:e} above {tolerance:e}");
}

/// The dense update of a layer in f64, on the host, as not every device has it; 0 where the set has none.
fn dense(set: &AdapterSet, path: &str, dims: [usize; 2]) -> Vec<f64> {
    let Some(Adaptation::LowRank(adapter)) = set.get(path) else {
        return vec![0.0; dims[0] * dims[1]];
    };
    let plain = adapter.clone().into_plain();
    let [a, b] = [&plain.lora_a, &plain.lora_b].map(|factor| numbers(factor.val()));
    let [rank, columns] = plain.lora_b.dims();
    let mut update = vec![0.0; plain.lora_a.dims()[0] * columns];
    for (row, sums) in update.chunks_mut(columns).enumerate() {
        for (down, b) in a[row * rank..][..rank].iter().zip(b.chunks(columns)) {
            let scaled = plain.scaling() * down;
            sums.iter_mut().zip(b).for_each(|(sum, b)| *sum += scaled * b);
        }
    }
    update
}

/// scaling ‖A‖ ‖B‖: A·B may cancel, but is rounded as its terms are.
fn of_terms(set: &AdapterSet, path: &str) -> f64 {
    let Some(Adaptation::LowRank(adapter)) = set.get(path) else { return 0.0 };
    let [a, b] = [&adapter.lora_a, &adapter.lora_b].map(|factor| norm(&numbers(factor.val())));
    adapter.scaling() * a * b
}

/// The bits of everything in a set.
fn bits(set: &AdapterSet) -> Vec<(String, TensorData, TensorData)> {
    let factors = |(path, adaptation): (&str, &Adaptation)| match adaptation {
        Adaptation::LowRank(adapter) => {
            let [a, b] = [&adapter.lora_a, &adapter.lora_b].map(|factor| factor.val().into_data());
            (path.to_owned(), a, b)
        }
        Adaptation::Replacement(_) => unreachable!("these sets are of low rank"),
    };
    set.iter().map(factors).collect()
}

/// A model's layers that can be seen as matrices, with their sizes.
fn matrices(sizes: Sizes) -> Vec<(String, [usize; 2])> {
    let mut layers = Vec::new();
    sizes.net().visit_lora("", &mut |path, layer| {
        if layer.groups() == 1 {
            layers.push((path.to_owned(), layer.dims()));
        }
    });
    layers
}

fn layers() -> impl Strategy<Value = [bool; 4]> {
    prop::array::uniform4(prop::bool::weighted(0.75))
}

fn registry(sizes: Sizes, layers: &[[bool; 4]]) -> AdapterSets {
    let mut sets = AdapterSets::new();
    for (place, layers) in layers.iter().enumerate() {
        sets.insert(place.to_string(), sizes.set(place as u64 + 1, *layers)).unwrap();
    }
    sets
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn a_sum_is_the_sum_of_the_updates(
        sizes in sizes(), layers in prop::collection::vec(layers(), 1..4),
    ) {
        let mut net = sizes.net();
        let base = net.outputs(sizes);
        let mut sets = registry(sizes, &layers);
        let names: Vec<String> = sets.names().map(str::to_owned).collect();
        let mut expected = base.clone();
        let mut scale: Vec<f64> = base.iter().map(|output| norm(output)).collect();
        for name in &names {
            sets.activate(&mut net, name).unwrap();
            for (layer, output) in net.outputs(sizes).iter().enumerate() {
                let update = minus(output, &base[layer]);
                scale[layer] += norm(&update);
                expected[layer].iter_mut().zip(update).for_each(|(sum, update)| *sum += update);
            }
        }
        sets.activate_all(&mut net, &names).unwrap();
        for (layer, output) in net.outputs(sizes).iter().enumerate() {
            close(LAYERS[layer], output, &expected[layer], scale[layer], sizes.tolerance());
        }
        prop_assert_eq!(ParameterCount::of(&net).trainable, 0);
        let active = sets.active(&net).unwrap();
        prop_assert!(active == names || layers.iter().flatten().all(|adapted| !adapted));
    }

    #[test]
    fn switching_and_renaming_give_the_same_bits(
        sizes in sizes(), layers in prop::collection::vec(layers(), 2..4),
    ) {
        let mut net = sizes.net();
        let base = net.outputs(sizes);
        let mut sets = registry(sizes, &layers);
        let names: Vec<String> = sets.names().map(str::to_owned).collect();
        let values = |sets: &AdapterSets, name: &str| bits(sets.get(name).unwrap());
        let before: Vec<_> = names.iter().map(|name| values(&sets, name)).collect();
        let mut first = Vec::new();
        for name in &names {
            sets.activate(&mut net, name).unwrap();
            first.push(net.outputs(sizes));
        }
        sets.activate_all(&mut net, &names).unwrap();
        drop(sets.mixed(&mut net, &[Some("0"), Some("1"), None, None]).unwrap());
        sets.rename("1", "renamed").unwrap();
        for (place, name) in names.iter().enumerate().rev() {
            let name = if place == 1 { "renamed" } else { name };
            sets.activate(&mut net, name).unwrap();
            prop_assert_eq!(&net.outputs(sizes), &first[place]);
            prop_assert_eq!(&values(&sets, name), &before[place]);
        }
        sets.deactivate(&mut net).unwrap();
        prop_assert_eq!(net.outputs(sizes), base);
        prop_assert!(sets.active(&net).unwrap().is_empty());
    }

    #[test]
    fn a_disabled_model_is_its_base(sizes in sizes(), layers in layers(), merged in any::<bool>()) {
        let mut net = sizes.net();
        let base = net.outputs(sizes);
        let mut sets = registry(sizes, &[layers]);
        sets.activate(&mut net, "0").unwrap();
        if merged && sizes.groups == 1 {
            merge(&mut net).unwrap();
        }
        let adapted = net.outputs(sizes);
        prop_assert_eq!(disable(&mut net).outputs(sizes), base);
        prop_assert_eq!(net.outputs(sizes), adapted);
    }

    #[test]
    fn a_mixed_batch_is_its_samples_one_by_one(
        sizes in sizes(),
        layers in prop::collection::vec(layers(), 3),
        batch in prop::collection::vec(prop::option::of(0usize..3), BATCH),
    ) {
        let mut net = sizes.net();
        let mut sets = registry(sizes, &layers);
        sets.activate(&mut net, "2").unwrap();
        let before = net.outputs(sizes);
        let names: Vec<Option<String>> =
            batch.iter().map(|place| place.map(|place| place.to_string())).collect();
        let names: Vec<Option<&str>> = names.iter().map(Option::as_deref).collect();
        let mixed = sets.mixed(&mut net, &names).unwrap();
        let found = mixed.outputs(sizes);
        let (x, up, down) = mixed.through(sizes.input().0);
        // What goes through layers may cancel to nearly nothing in the next one.
        let scale: f64 = [&x, &up, &down].map(|output| norm(&numbers(output.clone()))).iter().sum();
        let through = numbers(down);
        drop(mixed);
        prop_assert_eq!(&net.outputs(sizes), &before);
        prop_assert_eq!(sets.active(&net).unwrap().len(), usize::from(layers[2].contains(&true)));

        for (sample, name) in names.iter().enumerate() {
            match name {
                Some(name) => sets.activate(&mut net, name).unwrap(),
                None => sets.deactivate(&mut net).unwrap(),
            }
            let of_sample = sample..sample + 1;
            for (layer, expected) in net.outputs_of(sizes, of_sample.clone()).iter().enumerate() {
                let scale = norm(&found[layer]); // of the whole batch: a sample may nearly be zero
                let each = expected.len();
                let found = &found[layer][sample * each..][..each];
                close(LAYERS[layer], found, expected, scale, sizes.tolerance());
            }
            let expected = numbers(net.forward(sizes.input().0.slice(of_sample)));
            let found = &through[sample * expected.len()..][..expected.len()];
            close("forward", found, &expected, scale, sizes.tolerance());
        }
    }

    #[test]
    fn cat_and_linear_are_the_weighted_sum(
        mut sizes in sizes(),
        layers in prop::collection::vec(layers(), 1..4),
        weights in prop::array::uniform3(-2.0f64..2.0),
    ) {
        sizes.groups = 1;
        let sets: Vec<AdapterSet> =
            (0..layers.len()).map(|place| sizes.set(place as u64 + 1, layers[place])).collect();
        let parts: Vec<(&AdapterSet, f64)> = sets.iter().zip(weights).collect();
        let (whole, report) = combine(&parts, Combination::Cat).unwrap();
        prop_assert!(report.layers.iter().all(|layer| layer.error == 0.0));
        // 8 is at least the smaller size of every layer here.
        let (linear, exact) = combine(&parts, Combination::Linear { rank: 8 }).unwrap();
        prop_assert!(exact.layers.iter().all(|layer| layer.error <= 1e-13), "{exact}");
        for (path, dims) in matrices(sizes) {
            let mut expected = vec![0.0; dims[0] * dims[1]];
            let mut scale = 0.0;
            for (set, weight) in &parts {
                let update = dense(set, &path, dims);
                scale += weight.abs() * of_terms(set, &path);
                expected.iter_mut().zip(update).for_each(|(sum, update)| *sum += weight * update);
            }
            close(&path, &dense(&whole, &path, dims), &expected, scale, sizes.tolerance());
            close(&path, &dense(&linear, &path, dims), &expected, scale, sizes.tolerance());

            for rank in 1..4 {
                let (low, report) = whole.recompress(rank).unwrap();
                let Some(layer) = report.layers.iter().find(|layer| layer.path == path) else {
                    continue;
                };
                let measured = norm(&minus(&dense(&low, &path, dims), &expected));
                let difference = (measured - layer.error * norm(&expected)).abs();
                prop_assert!(layer.rank.unwrap() <= rank);
                prop_assert!(difference <= sizes.tolerance() * scale, "{path}: {difference:e}");
            }
        }
    }

    #[test]
    fn merged_is_unmerged_is_unloaded(
        mut sizes in sizes(), layers in prop::collection::vec(layers(), 2), together in any::<bool>(),
    ) {
        sizes.groups = 1;
        let mut net = sizes.net();
        let mut sets = registry(sizes, &layers);
        if together {
            sets.activate_all(&mut net, &["0", "1"]).unwrap();
        } else {
            sets.activate(&mut net, "0").unwrap();
        }
        let expected = net.outputs(sizes);
        let report = merge(&mut net).unwrap();
        let merged = net.outputs(sizes);
        // Sets may be drawn without any layer, and then there is nothing to unmerge.
        prop_assert_eq!(unmerge(&mut net).is_ok(), !report.layers.is_empty());
        prop_assert_eq!(&net.outputs(sizes), &expected);
        let unloaded = Net {
            embed: match net.embed { Adaptable::Lora(x) => x.into_merged().unwrap().into(), x => x },
            up: match net.up { Adaptable::Lora(x) => x.into_merged().unwrap().into(), x => x },
            down: match net.down { Adaptable::Lora(x) => x.into_merged().unwrap().into(), x => x },
            conv: match net.conv { Adaptable::Lora(x) => x.into_merged().unwrap().into(), x => x },
        };
        let unloaded = unloaded.outputs(sizes);
        for layer in 0..LAYERS.len() {
            // An output may nearly cancel; what was rounded is the terms.
            let scale = norm(&expected[layer]).max(1.0);
            close(LAYERS[layer], &merged[layer], &expected[layer], scale, 4.0 * sizes.tolerance());
            prop_assert_eq!(&unloaded[layer], &merged[layer]);
        }
    }
}

fn shared(set: &AdapterSet, path: &str) -> LoraAdapter {
    match set.get(path) {
        Some(Adaptation::LowRank(adapter)) => adapter.clone(),
        other => panic!("{path}: {other:?}"),
    }
}

const ALL: [bool; 4] = [true; 4];

/// A step of an optimiser on what trains.
fn step(net: Net, sizes: Sizes) -> Net {
    let loss = net.forward(sizes.input().0).square().mean();
    let gradients = GradientsParams::from_grads(loss.backward(), &net);
    AdamConfig::new().init().step(0.1, net, gradients)
}

#[test]
fn what_an_optimiser_changed_is_stored_first() {
    let mut sets = registry(*FIXED, &[ALL, ALL]);
    let mut net = FIXED.net();
    let start = bits(sets.get("0").unwrap());
    sets.activate(&mut net, "0").unwrap();
    // The model was not frozen before.
    assert_eq!(ParameterCount::of(&net).trainable, sets.get("0").unwrap().num_parameters());
    let trained = step(net, *FIXED);
    let outputs = trained.outputs(*FIXED);
    let values = bits(&AdapterSet::of(&trained));
    assert_ne!(values, start);

    // Each of these takes the model away from set 0 in its own way.
    type Leave = fn(&mut AdapterSets, &mut Net);
    let ways: [Leave; 5] = [
        |sets, net| sets.activate(net, "1").unwrap(),
        |sets, net| sets.activate_all(net, &["1", "0"]).unwrap(),
        |sets, net| sets.deactivate(net).unwrap(),
        |sets, net| drop(sets.mixed(net, &[Some("1")]).unwrap()),
        |sets, net| sets.store(net).unwrap(),
    ];
    for leave in ways {
        let mut sets = AdapterSets::new();
        let mut net = trained.clone();
        for (name, set) in [("0", AdapterSet::of(&net)), ("1", FIXED.set(2, ALL))] {
            sets.insert(name, set).unwrap();
        }
        net = step(net, *FIXED);
        let values = bits(&AdapterSet::of(&net));
        leave(&mut sets, &mut net);
        assert_eq!(bits(sets.get("0").unwrap()), values);
        sets.activate(&mut net, "0").unwrap();
        let moved = bits(&AdapterSet::of(&step(net, *FIXED)));
        assert_ne!(moved, values, "it trains on");
    }

    // A validation copy has the values without autodiff and gives nothing of that back.
    let mut copy = trained.valid();
    sets.activate(&mut copy, "1").unwrap();
    sets.activate_all(&mut copy, &["0", "1"]).unwrap();
    sets.activate(&mut copy, "0").unwrap();
    let found = copy.embed.as_lora().unwrap().adapter().lora_a.val();
    assert!(!found.device().is_autodiff());
    for name in ["0", "1"] {
        let stored = shared(sets.get(name).unwrap(), "up");
        assert!(stored.lora_a.val().is_require_grad(), "{name}");
    }
    let mut net = trained;
    sets.activate(&mut net, "0").unwrap();
    assert_eq!(net.outputs(*FIXED), outputs);
    let moved = step(net, *FIXED);
    assert_ne!(moved.outputs(*FIXED), outputs);
}

#[test]
fn an_active_set_can_be_renamed_and_removed() {
    let mut net = FIXED.net();
    let base = net.outputs(*FIXED);
    let mut sets = registry(*FIXED, &[ALL, [true, false, true, false], [false, true, true, true]]);
    let only = |net: &mut Net, sets: &mut AdapterSets, names: &[&str]| {
        sets.activate_all(net, names).unwrap();
        net.outputs(*FIXED)
    };
    let without = only(&mut net, &mut sets, &["0", "2"]);
    only(&mut net, &mut sets, &["0", "1", "2"]);
    sets.rename("2", "two").unwrap();
    assert_eq!(sets.active(&net).unwrap(), ["0", "1", "two"]);
    sets.remove(&mut net, "1").unwrap();
    assert_eq!(sets.active(&net).unwrap(), ["0", "two"]);
    assert_eq!(net.outputs(*FIXED), without);

    sets.activate(&mut net, "two").unwrap();
    let of_two = net.outputs(*FIXED);
    sets.rename("two", "2").unwrap();
    assert_eq!(sets.active(&net).unwrap(), ["2"]);
    assert!(!sets.remove(&mut net, "0").unwrap().is_empty());
    assert_eq!((net.outputs(*FIXED), sets.active(&net).unwrap()), (of_two.clone(), vec!["2"]));

    net = step(net, *FIXED);
    let trained = net.outputs(*FIXED);
    assert_ne!(trained, of_two);
    let set = sets.remove(&mut net, "2").unwrap();
    assert_eq!(net.outputs(*FIXED), base);
    assert_eq!(sets.names().count(), 0);
    let (net, _) = set.attach(net).unwrap();
    assert_eq!(net.outputs(*FIXED), trained);
}

#[test]
fn a_clone_of_a_set_becomes_a_set_of_its_own() {
    let mut net = FIXED.net();
    let mut sets = registry(*FIXED, &[ALL]);
    sets.activate(&mut net, "0").unwrap();
    sets.insert("before", AdapterSet::of(&net)).unwrap();
    let before = net.outputs(*FIXED);
    let mut net = step(net, *FIXED);
    let trained = net.outputs(*FIXED);
    assert_eq!(sets.active(&net).unwrap(), ["0"]);
    sets.activate(&mut net, "before").unwrap();
    assert_eq!(net.outputs(*FIXED), before);
    sets.activate(&mut net, "0").unwrap();
    assert_eq!(net.outputs(*FIXED), trained);
}

#[test]
fn names_and_models_that_do_not_fit_change_nothing() {
    let mut net = FIXED.net();
    let mut sets = AdapterSets::new();
    let message = sets.get("poet").unwrap_err().to_string();
    assert!(message.contains("there are none yet"), "{message}");
    for (seed, name) in ["critic", "poet", "translator"].into_iter().enumerate() {
        sets.insert(name, FIXED.set(seed as u64, ALL)).unwrap();
    }
    sets.activate(&mut net, "critic").unwrap();
    let outputs = net.outputs(*FIXED);
    let of = |error: lora_core::Error| format!("{:?}: {error}", error.kind());
    let unknown = of(sets.activate(&mut net, "peot").unwrap_err());
    assert!(unknown.contains("UnknownSet") && unknown.contains("'poet', "), "{unknown}");
    assert!(of(sets.activate_all(&mut net, &["poet", "x"]).unwrap_err()).contains("UnknownSet"));
    assert!(of(sets.activate_all(&mut net, &["poet", "poet"]).unwrap_err()).contains("twice"));
    assert!(of(sets.remove(&mut net, "x").unwrap_err()).contains("UnknownSet"));
    assert!(of(sets.rename("x", "y").unwrap_err()).contains("UnknownSet"));
    assert!(of(sets.rename("poet", "critic").unwrap_err()).contains("NameTaken"));
    assert!(of(sets.insert("poet", AdapterSet::default()).unwrap_err()).contains("NameTaken"));
    assert!(of(sets.mixed(&mut net, &[Some("x")]).unwrap_err()).contains("UnknownSet"));
    assert!(sets.mixed(&mut net, &[]).is_err());
    sets.rename("poet", "poet").unwrap();

    let other = Sizes { width: 3, ..*FIXED };
    sets.insert("small", other.set(1, [false, true, false, false])).unwrap();
    let misfit = of(sets.activate(&mut net, "small").unwrap_err());
    assert!(misfit.contains("for up"), "{misfit}");
    assert!(sets.mixed(&mut net, &[Some("small")]).is_err());

    merge(&mut net).unwrap();
    for found in [
        sets.activate(&mut net, "poet"),
        sets.activate_all(&mut net, &["poet"]),
        sets.deactivate(&mut net),
        sets.mixed(&mut net, &[Some("poet")]).map(drop),
        sets.remove(&mut net, "poet").map(drop),
    ] {
        assert!(of(found.unwrap_err()).contains("AlreadyMerged"));
    }
    unmerge(&mut net).unwrap();
    assert_eq!(sets.active(&net).unwrap(), ["critic"]);
    assert_eq!(net.outputs(*FIXED), outputs);

    sets.deactivate(&mut net).unwrap();
    let (mut net, _) = FIXED.set(9, [false, true, true, false]).attach(net).unwrap();
    for found in [
        sets.activate(&mut net, "poet"),
        sets.activate_all(&mut net, &["poet"]),
        sets.deactivate(&mut net),
        sets.store(&net),
        sets.mixed(&mut net, &[Some("poet")]).map(drop),
    ] {
        match found.unwrap_err().kind() {
            ErrorKind::ForeignAdapter { path } => assert_eq!(path, "up"),
            other => panic!("{other:?}"),
        }
    }
    sets.insert("ours now", AdapterSet::of(&net)).unwrap();
    assert_eq!(sets.active(&net).unwrap(), ["ours now"]);
}

#[test]
fn disabling_restores_irregular_states_after_a_panic_too() {
    let mut net = FIXED.net();
    let base = net.outputs(*FIXED);
    let mut sets = registry(*FIXED, &[[true, true, true, false], ALL]);
    sets.activate(&mut net, "0").unwrap();
    net.up.set_enabled(false);
    let states = |net: &Net| {
        let mut states = Vec::new();
        net.visit_lora("", &mut |_, layer| states.push(layer.is_enabled()));
        states
    };
    let (state, outputs) = (states(&net), net.outputs(*FIXED));
    assert_eq!(state, [true, false, true, false]);

    let disabled = disable(&mut net);
    assert_eq!(disabled.outputs(*FIXED), base);
    drop(disabled);
    assert_eq!((states(&net), net.outputs(*FIXED)), (state.clone(), outputs.clone()));

    let panicking = catch_unwind(AssertUnwindSafe(|| {
        let disabled = disable(&mut net);
        assert_eq!(disabled.outputs(*FIXED), base);
        panic!("inside");
    }));
    assert!(panicking.is_err());
    assert_eq!((states(&net), net.outputs(*FIXED)), (state.clone(), outputs.clone()));

    let mixed = sets.mixed(&mut net, &[Some("0"), None, Some("1"), None]).unwrap();
    assert_ne!(mixed.outputs(*FIXED), outputs);
    drop(mixed);
    assert_eq!((states(&net), net.outputs(*FIXED)), (state.clone(), outputs.clone()));
    let panicking = catch_unwind(AssertUnwindSafe(|| {
        let _mixed = sets.mixed(&mut net, &[Some("1")]).unwrap();
        panic!("inside");
    }));
    assert!(panicking.is_err());
    assert_eq!((states(&net), net.outputs(*FIXED)), (state, outputs));

    // What is activated acts.
    sets.activate(&mut net, "0").unwrap();
    assert_eq!(states(&net), [true, true, true, false]);
}

#[test]
fn another_leading_axis_than_the_batch_panics() {
    let mut net = FIXED.net();
    let mut sets = registry(*FIXED, &[ALL, ALL]);
    let mixed = sets.mixed(&mut net, &[Some("0"), Some("1")]).unwrap();
    let (ids, x) = FIXED.input(); // of 4 samples
    let panics = |run: &dyn Fn()| {
        let panic = catch_unwind(AssertUnwindSafe(run)).unwrap_err();
        let message = panic.downcast_ref::<String>().expect("a message").clone();
        assert!(message.contains("the 2 samples of the mixed batch"), "{message}");
    };
    panics(&|| drop(mixed.embed.forward(ids.clone())));
    panics(&|| drop(mixed.up.forward(x.clone())));
    let folded = x.clone().reshape([BATCH * LENGTH, FIXED.width]);
    panics(&|| drop(mixed.up.forward(folded.clone())));
    panics(&|| drop(mixed.up.forward(x.clone().slice(0..1))));
    panics(&|| drop(mixed.conv.forward(Tensor::ones([1, 2, 3], (&device(), FIXED.dtype)))));
    assert_eq!(mixed.up.forward(x.clone().slice(0..2)).dims(), [2, LENGTH, FIXED.hidden]);
    // Nor can what is many adapters be folded or saved as one.
    let of = |error: &lora_core::Error| format!("{:?}", error.kind());
    assert!(of(&merge(&mut mixed.clone()).unwrap_err()).contains("MixedBatch"));
    let folder = std::env::temp_dir().join("lora-core-mixed-batch-is-never-written");
    let saved = lora_core::save_adapter(&*mixed, &folder, &lora_core::AdapterInfo::default());
    assert!(of(&saved.unwrap_err()).contains("MixedBatch") && !folder.exists());
    let empty = Tensor::<3>::ones([2, 0, FIXED.width], (&device(), FIXED.dtype));
    assert_eq!(mixed.up.forward(empty).dims(), [2, 0, FIXED.hidden]);
}

/// A config's adapters, with values that are not those at the start.
fn configured(sizes: Sizes, config: &LoraConfig) -> AdapterSet {
    let mut net = inject(sizes.net(), config).unwrap().0;
    let mut values = Values(config.seed + 77);
    let mut moved = |param: Param<Tensor<2>>| {
        param.map(|value| value.clone() + values.tensor(value.dims(), value.dtype()))
    };
    net.visit_lora_mut("", &mut |_, layer| {
        if let Some(adapter) = layer.adapter_mut() {
            adapter.lora_a = moved(adapter.lora_a.clone());
            adapter.lora_b = moved(adapter.lora_b.clone());
            let vectors = [&mut adapter.lora_bias, &mut adapter.magnitude, &mut adapter.base_bias];
            for vector in vectors.into_iter().flatten() {
                *vector = vector.clone().map(|value| value.clone().cos() + value + 0.5);
            }
        }
    });
    AdapterSet::detach(&mut net)
}

fn config(seed: u64) -> LoraConfig {
    LoraConfig { seed, ..LoraConfig::new(2, 3.0) }
}

#[test]
fn biases_of_the_up_matrices_add_up() {
    let biased = configured(*FIXED, &LoraConfig { lora_bias: true, ..config(1) });
    let other = configured(*FIXED, &LoraConfig { lora_bias: true, ..config(2) });
    let plain = configured(*FIXED, &config(3));
    let mut net = FIXED.net();
    let base = net.outputs(*FIXED);
    let mut sets = AdapterSets::new();
    let mut expected = base.clone();
    for (name, set) in [("a", biased.clone()), ("b", other.clone()), ("c", plain)] {
        sets.insert(name, set).unwrap();
        sets.activate(&mut net, name).unwrap();
        for (layer, output) in net.outputs(*FIXED).iter().enumerate() {
            let update = minus(output, &base[layer]);
            expected[layer].iter_mut().zip(update).for_each(|(sum, update)| *sum += update);
        }
    }
    sets.activate_all(&mut net, &["a", "b", "c"]).unwrap();
    for (layer, output) in net.outputs(*FIXED).iter().enumerate() {
        close(LAYERS[layer], output, &expected[layer], 1.0, FIXED.tolerance());
    }
    let (sum, _) = combine(&[(&biased, 2.0), (&other, -1.0)], Combination::Cat).unwrap();
    let bias = |set: &AdapterSet| {
        let adapter = shared(set, "up");
        numbers(adapter.lora_bias.as_ref().unwrap().val() * adapter.scaling())
    };
    let expected: Vec<f64> =
        bias(&biased).iter().zip(bias(&other)).map(|(one, other)| 2.0 * one - other).collect();
    close("bias", &bias(&sum), &expected, 0.0, FIXED.tolerance() / 10.0);
}

#[test]
fn mixed_batches_have_each_sample_s_dora_and_biases() {
    use lora_core::{TargetModules, TrainedBias};
    let all = || TargetModules::Names(LAYERS.map(str::to_owned).into());
    let up = || TargetModules::Names(vec!["up".to_owned()]);
    let mut sets = AdapterSets::new();
    let dora = LoraConfig { dora: true, target_modules: all(), ..config(1) };
    // An embedding's adapter has no bias.
    let rest = || TargetModules::Names(LAYERS[1..].iter().map(|name| name.to_string()).collect());
    let biased = LoraConfig { lora_bias: true, target_modules: rest(), ..config(2) };
    let own_bias = LoraConfig { bias: TrainedBias::LoraOnly, target_modules: up(), ..config(3) };
    let every_bias = LoraConfig { bias: TrainedBias::All, target_modules: up(), ..config(4) };
    let pissa = LoraConfig { init: Init::Pissa { iterations: None }, ..config(5) };
    for (name, config) in [
        ("dora", dora),
        ("biased", biased),
        ("own", own_bias),
        ("every", every_bias),
        ("pissa", pissa),
    ] {
        sets.insert(name, configured(*FIXED, &config)).unwrap();
    }
    let mut net = FIXED.net();
    let batches = [
        [Some("dora"), None, Some("biased"), Some("own")],
        [Some("every"), Some("pissa"), Some("every"), None],
        [Some("every"), Some("dora"), Some("own"), Some("pissa")],
    ];
    for names in batches {
        let found = sets.mixed(&mut net, &names).unwrap().outputs(*FIXED);
        for (sample, name) in names.into_iter().enumerate() {
            match name {
                Some(name) => sets.activate(&mut net, name).unwrap(),
                None => sets.deactivate(&mut net).unwrap(),
            }
            let expected = net.outputs_of(*FIXED, sample..sample + 1);
            for (layer, expected) in expected.iter().enumerate() {
                let found = &found[layer][sample * expected.len()..][..expected.len()];
                close(LAYERS[layer], found, expected, 0.0, FIXED.tolerance());
            }
        }
    }
}

#[test]
fn in_half_precision_a_mixed_batch_is_rounded_as_each_sample_alone() {
    if !has(DType::BF16) {
        return;
    }
    let full =
        Sizes { vocabulary: 64, width: 60, hidden: 96, channels: 40, dtype: DType::F32, ..*FIXED };
    let halves = Sizes { dtype: DType::BF16, ..full };
    let mut net = halves.net().valid();
    let mut sets = AdapterSets::new();
    for (name, set) in [("0", full.set(3, [true; 4])), ("1", halves.set(4, [true; 4]))] {
        sets.insert(name, set).unwrap();
    }
    let names = [Some("0"), None, Some("1"), Some("0")];
    let outputs = |net: &Net, samples: std::ops::Range<usize>| {
        let mut values = Values(7);
        let mut input = |width: usize| {
            let x: Tensor<3> = values.tensor([BATCH, LENGTH, width], DType::BF16);
            x.without_autodiff().slice(samples.clone())
        };
        let ids = halves.input().0.without_autodiff().slice(samples.clone());
        let signal = input(40).swap_dims(1, 2);
        [
            net.embed.forward(ids),
            net.up.forward(input(60)),
            net.down.forward(input(96)),
            net.conv.forward(signal),
        ]
        .map(numbers)
    };
    let found = outputs(&sets.mixed(&mut net, &names).unwrap(), 0..BATCH);
    for (sample, name) in names.into_iter().enumerate() {
        match name {
            Some(name) => sets.activate(&mut net, name).unwrap(),
            None => sets.deactivate(&mut net).unwrap(),
        }
        for (layer, expected) in outputs(&net, sample..sample + 1).iter().enumerate() {
            let found = &found[layer][sample * expected.len()..][..expected.len()];
            let other = found.iter().zip(expected).filter(|(found, expected)| found != expected);
            // Where the last place in f32 decides; with A and B in bf16 it would be a third of the values.
            assert!(other.count() * 100 <= expected.len(), "{} of {name:?}", LAYERS[layer]);
        }
    }
}

#[test]
fn what_has_no_sum_is_refused_by_name() {
    use lora_core::{TargetModules, TrainedBias};
    let targets = |names: &[&str]| {
        TargetModules::Names(names.iter().map(|name| (*name).to_owned()).collect())
    };
    let mut net = FIXED.net();
    let mut sets = AdapterSets::new();
    let mut insert = |name: &str, config: LoraConfig| {
        sets.insert(name, configured(*FIXED, &config)).unwrap();
    };
    insert("plain", LoraConfig { target_modules: targets(&["up"]), ..config(1) });
    insert(
        "dora",
        LoraConfig { dora: true, target_modules: targets(&["up", "down"]), ..config(2) },
    );
    let whole = || vec!["down".to_owned()];
    let saved = LoraConfig { target_modules: targets(&["up"]), ..config(3) };
    insert("whole", LoraConfig { modules_to_save: whole(), ..saved.clone() });
    insert("whole too", LoraConfig { modules_to_save: whole(), seed: 4, ..saved });
    let biases = LoraConfig { target_modules: targets(&["up"]), ..config(5) };
    insert("bias", LoraConfig { bias: TrainedBias::LoraOnly, ..biases.clone() });
    insert("biases", LoraConfig { bias: TrainedBias::All, ..biases.clone() });
    let tokens = vec![("embed".to_owned(), vec![1, 2])];
    insert("tokens", LoraConfig { trainable_tokens: tokens, ..biases });

    let sum = |names: &[&str], sets: &mut AdapterSets, net: &mut Net| {
        sets.activate_all(net, names).map(|()| net.outputs(*FIXED))
    };
    let refused = |found: lora_core::Result<Vec<Vec<f64>>>, words: &[&str]| {
        let error = found.unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::NotCombinable { .. }), "{error}");
        let message = error.to_string();
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    };
    refused(sum(&["plain", "dora"], &mut sets, &mut net), &["up: ", "DoRA", "'dora'"]);
    refused(sum(&["whole", "whole too"], &mut sets, &mut net), &["down: ", "whole layer"]);
    refused(sum(&["bias", "biases"], &mut sets, &mut net), &["up: ", "bias", "'biases'"]);
    refused(sum(&["whole", "dora"], &mut sets, &mut net), &["up: ", "down: "]);
    let mixed = sets.mixed(&mut net, &[Some("plain"), Some("whole")]).map(|_| Vec::new());
    refused(mixed, &["down: ", "whole layer", "'whole'"]);
    let mixed = sets.mixed(&mut net, &[Some("tokens")]).map(|_| Vec::new());
    refused(mixed, &["embed: ", "2 tokens"]);
    assert!(sets.active(&net).unwrap().is_empty());

    // Where a set is alone in a layer, all of it acts.
    for name in ["dora", "whole", "tokens", "biases"] {
        sets.activate(&mut net, name).unwrap();
        let alone = net.outputs(*FIXED);
        let trains = ParameterCount::of(&net).trainable;
        for (layer, output) in sum(&[name], &mut sets, &mut net).unwrap().iter().enumerate() {
            close(name, output, &alone[layer], 0.0, FIXED.tolerance() / 10.0);
        }
        // The sum does not train; the set does, as before.
        assert_eq!(ParameterCount::of(&net).trainable, 0);
        sets.activate(&mut net, name).unwrap();
        assert_eq!(ParameterCount::of(&net).trainable, trains);
    }
    let base = {
        sets.deactivate(&mut net).unwrap();
        net.outputs(*FIXED)
    };
    let mut expected = base.clone();
    for name in ["plain", "biases", "tokens"] {
        sets.activate(&mut net, name).unwrap();
        for (layer, output) in net.outputs(*FIXED).iter().enumerate() {
            let update = minus(output, &base[layer]);
            expected[layer].iter_mut().zip(update).for_each(|(sum, update)| *sum += update);
        }
    }
    let found = sum(&["plain", "biases", "tokens"], &mut sets, &mut net).unwrap();
    for (layer, output) in found.iter().enumerate() {
        close(LAYERS[layer], output, &expected[layer], 1.0, FIXED.tolerance());
    }

    // Combinations of whole sets have the same limits, and closer ones where a rank is cut.
    let get = |name: &str| sets.get(name).unwrap();
    let (plain, dora, whole, bias) = (get("plain"), get("dora"), get("whole"), get("bias"));
    let none = |result: lora_core::Result<_>| result.map(|_: (AdapterSet, _)| Vec::new());
    refused(none(combine(&[(plain, 1.0), (dora, 1.0)], Combination::Cat)), &["up: ", "part 1"]);
    refused(none(combine(&[(dora, 0.5)], Combination::Cat)), &["up: ", "down: "]);
    refused(none(dora.recompress(1)), &["DoRA"]);
    refused(none(combine(&[(bias, 0.5)], Combination::Cat)), &["weight 0.5"]);
    let ties = Combination::Ties { density: 0.5, rank: 2 };
    refused(none(combine(&[(plain, 1.0), (whole, 1.0)], ties)), &["down: ", "whole layer"]);
    let (same, report) = combine(&[(whole, 1.0), (plain, 0.5)], Combination::Cat).unwrap();
    assert!(report.layers.iter().any(|layer| layer.path == "down" && layer.rank.is_none()));
    same.attach(FIXED.net()).unwrap();
    let grouped = Sizes { groups: 2, ..*FIXED }.set(1, ALL);
    refused(none(combine(&[(&grouped, 1.0)], ties)), &["conv: ", "2 groups"]);
}

#[test]
fn ties_and_dare_over_whole_sets() {
    let sets = [FIXED.set(1, ALL), FIXED.set(2, [true, true, false, false])];
    let parts = [(&sets[0], 1.0), (&sets[1], 0.5)];
    let path_dims = matrices(*FIXED);
    let same = |one: &AdapterSet, other: &AdapterSet| {
        for (path, dims) in &path_dims {
            let (one, other) = (dense(one, path, *dims), dense(other, path, *dims));
            close(path, &one, &other, 1.0, FIXED.tolerance());
        }
    };
    // Nothing is dropped at density 1, so that the sum is left.
    let dare = Combination::Dare { density: 1.0, seed: 3, rank: 8 };
    let (dropped, report) = combine(&parts, dare).unwrap();
    assert!(report.layers.iter().all(|layer| layer.error < 1e-13), "{report}");
    same(&dropped, &combine(&parts, Combination::Cat).unwrap().0);
    let ties = Combination::Ties { density: 1.0, rank: 8 };
    let dare_ties = Combination::DareTies { density: 1.0, seed: 3, rank: 8 };
    same(&combine(&parts, ties).unwrap().0, &combine(&parts, dare_ties).unwrap().0);
    // A missing update is zero: where one set is alone, its own mean is left, by weight.
    let (agreed, _) = combine(&[(&sets[1], 1.0), (&sets[0], 0.5)], ties).unwrap();
    let dims = path_dims.iter().find(|(path, _)| path == "down").unwrap().1;
    let half: Vec<f64> = dense(&sets[0], "down", dims).iter().map(|value| value / 2.0).collect();
    close("down", &dense(&agreed, "down", dims), &half, 0.0, FIXED.tolerance());

    // By hand for one entry: both updates there, with the sign of their sum.
    let dims = path_dims.iter().find(|(path, _)| path == "up").unwrap().1;
    let (one, other) = (dense(&sets[0], "up", dims), dense(&sets[1], "up", dims));
    let expected: Vec<f64> = one
        .iter()
        .zip(&other)
        .map(|(x, y)| match (x * y > 0.0, x.abs() > y.abs()) {
            (true, _) => (x + 0.5 * y) / 2.0,
            (false, true) => *x,
            (false, false) => 0.5 * y,
        })
        .collect();
    close(
        "up",
        &dense(&combine(&parts, ties).unwrap().0, "up", dims),
        &expected,
        0.0,
        FIXED.tolerance(),
    );

    let low = Combination::Dare { density: 0.5, seed: 3, rank: 1 };
    let (again, report) = combine(&parts, low).unwrap();
    assert_eq!(bits(&again), bits(&combine(&parts, low).unwrap().0), "the same seed");
    assert!(report.layers.iter().any(|layer| layer.error > 0.01 && layer.rank == Some(1)));
    assert!(report.to_string().starts_with("4 layers; the cut to the rank lost "), "{report}");

    assert!(combine(&[], Combination::Cat).is_err());
    assert!(combine(&[(&sets[0], f64::NAN)], Combination::Cat).is_err());
    assert!(combine(&parts, Combination::Linear { rank: 0 }).is_err());
    assert!(combine(&parts, Combination::Ties { density: 0.0, rank: 1 }).is_err());
}

#[test]
fn a_combination_trains_and_starting_products_go_in_first() {
    let pissa =
        configured(*FIXED, &LoraConfig { init: Init::Pissa { iterations: None }, ..config(5) });
    assert!(shared(&pissa, "up").offset().is_some());
    let plain = FIXED.set(3, ALL);
    let (both, report) = combine(&[(&pissa, 1.0), (&plain, -2.0)], Combination::Cat).unwrap();
    let layer = report.layers.iter().find(|layer| layer.path == "up").unwrap();
    assert_eq!(layer.rank, Some(4 + shared(&plain, "up").rank()));
    let dims = [FIXED.width, FIXED.hidden];
    let (one, other) = (dense(&pissa, "up", dims), dense(&plain, "up", dims));
    let expected: Vec<f64> = one.iter().zip(other).map(|(x, y)| x - 2.0 * y).collect();
    close("up", &dense(&both, "up", dims), &expected, 0.0, FIXED.tolerance());

    let (net, _) = both.attach(FIXED.net()).unwrap();
    let before = net.outputs(*FIXED);
    assert_ne!(step(net, *FIXED).outputs(*FIXED), before);
}

/// A record has what the set in use needs, whatever was in use before.
#[test]
fn the_record_of_a_switched_model_is_that_of_a_fresh_one() {
    let net = FIXED.net();
    let dora = configured(*FIXED, &LoraConfig { dora: true, ..config(1) });
    let plain = configured(*FIXED, &config(2));
    let mut sets = AdapterSets::new();
    sets.insert("dora", dora).unwrap();
    sets.insert("plain", plain).unwrap();
    let mut switched = net.clone();
    sets.activate(&mut switched, "dora").unwrap();
    sets.activate(&mut switched, "plain").unwrap();
    let mut fresh = net;
    sets.activate(&mut fresh, "plain").unwrap();
    let loaded = fresh.load_record(switched.clone().into_record());
    assert_eq!(loaded.outputs(*FIXED), switched.outputs(*FIXED));
}
