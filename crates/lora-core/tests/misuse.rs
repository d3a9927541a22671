//! Unusual orders and mixtures of what users may do.
#![cfg(any(
    feature = "flex",
    feature = "ndarray",
    feature = "tch",
    feature = "wgpu",
    feature = "cuda"
))]

mod small;
mod types;

use std::fs;
use std::path::Path;

use burn::module::{Module, Param};
use burn::nn::conv::Conv1dConfig;
use burn::nn::{EmbeddingConfig, LinearConfig};
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{DType, Distribution, Tensor};
use lora_core::*;
use small::{device, linear, sentence, targets};
use types::has;

/// Random values for all factors, which train.
fn randomise<M: VisitLora>(model: &mut M) {
    model.visit_lora_mut("", &mut |_, layer| {
        let Some(adapter) = layer.adapter_mut() else { return };
        for factor in [&mut adapter.lora_a, &mut adapter.lora_b] {
            *factor = Param::from_tensor(factor.val().random_like(Distribution::Default));
        }
    });
}

#[derive(Module, Debug, VisitLora)]
#[lora(tied = "embed")]
struct Tied {
    embed: AdaptableEmbedding, // [10, 4]
    q: AdaptableLinear,
}

fn tied() -> Tied {
    Tied { embed: EmbeddingConfig::new(10, 4).init(&device()).into(), q: linear(4, 4) }
}

#[test]
fn dropout_comes_back_from_a_file() {
    let config = LoraConfig { dropout: 0.25, ..LoraConfig::new(2, 4.0) };
    let (model, _) = inject(vec![linear(6, 4)], &config).unwrap();
    let temp = tempfile::tempdir().unwrap();
    let [once, twice] = ["once", "twice"].map(|name| temp.path().join(name));
    save_adapter(&model, &once, &AdapterInfo::default()).unwrap();
    let mut base = model.clone();
    AdapterSet::detach(&mut base);
    let (model, _) = load_adapter(base, &once).unwrap();
    assert_eq!(model[0].as_lora().unwrap().adapter().dropout(), 0.25);
    save_adapter(&model, &twice, &AdapterInfo::default()).unwrap();
    let config = |folder: &Path| fs::read_to_string(folder.join("adapter_config.json")).unwrap();
    assert_eq!(config(&once), config(&twice));
}

#[test]
fn what_checkpoints_gradients_trains_with_every_variant() {
    let device = lora_core::device_from_env().unwrap().autodiff().gradient_checkpointing();
    let x = || Tensor::<2>::random([8, 6], Distribution::Default, &device);
    let plain = LoraConfig::new(2, 4.0);
    for config in [
        plain.clone(),
        LoraConfig { dora: true, ..plain.clone() },
        LoraConfig { dora: true, dropout: 0.5, ..plain.clone() },
        LoraConfig { bias: TrainedBias::All, lora_bias: true, ..plain.clone() },
        LoraConfig { init: Init::Pissa { iterations: None }, ..plain.clone() },
        LoraConfig { modules_to_save: vec!["1".to_owned()], ..targets(&["0"]) },
    ] {
        let layer = |d_input, d_output| -> AdaptableLinear {
            LinearConfig::new(d_input, d_output).init(&device).into()
        };
        let (mut model, _) = inject(vec![layer(6, 40), layer(40, 4)], &config).unwrap();
        randomise(&mut model);
        let y = model[1].forward(burn::tensor::activation::relu(model[0].forward(x())));
        audit_gradients(&model, &y.square().sum().backward()).unwrap();
    }
}

#[test]
fn adapters_that_are_there_train_on_beside_new_ones() {
    let model = vec![linear(6, 4), linear(4, 4), linear(4, 4)];
    let (model, _) = inject(model, &targets(&["0"])).unwrap();
    let (model, report) = inject(model, &targets(&["1"])).unwrap();
    assert_eq!(report.parameters.trainable, 2 * (6 + 4) + 2 * (4 + 4));
    let set = {
        let (other, _) =
            inject(vec![linear(6, 4), linear(4, 4), linear(4, 4)], &targets(&["2"])).unwrap();
        AdapterSet::of(&other)
    };
    let (model, report) = set.attach(model).unwrap();
    assert_eq!(report.parameters.trainable, 2 * (6 + 4) + 4 * (4 + 4));
    let x = Tensor::<2>::ones([2, 6], &device());
    let y = model.iter().fold(x, |x, layer| layer.forward(x));
    audit_gradients(&model, &y.sum().backward()).unwrap();
}

#[test]
fn an_older_copy_for_evaluation_does_not_undo_training() {
    let (mut model, _) = inject(vec![linear(6, 4)], &LoraConfig::new(2, 4.0)).unwrap();
    let mut sets = AdapterSets::new();
    sets.insert("a", AdapterSet::of(&model)).unwrap();
    let (other, _) = inject(vec![linear(6, 4)], &LoraConfig::new(2, 4.0)).unwrap();
    sets.insert("b", AdapterSet::of(&other)).unwrap();
    let mut copy = model.valid();
    let mut optimizer = AdamConfig::new().init();
    for _ in 0..3 {
        let x = Tensor::<2>::ones([2, 6], &device());
        let gradients = model[0].forward(x).square().sum().backward();
        let gradients = GradientsParams::from_grads(gradients, &model);
        model = optimizer.step(0.1, model, gradients);
    }
    let a = |model: &Vec<AdaptableLinear>| {
        model[0].as_lora().unwrap().adapter().lora_a.val().into_data()
    };
    let trained = a(&model);
    sets.activate(&mut model, "b").unwrap();
    sets.activate(&mut copy, "b").unwrap();
    sets.activate(&mut model, "a").unwrap();
    assert_eq!(a(&model), trained);
}

#[test]
fn a_set_alone_trains_however_the_model_came_to_it() {
    let bare = vec![linear(6, 4), linear(4, 4)];
    let mut sets = AdapterSets::new();
    for name in ["a", "b"] {
        let (model, _) = inject(vec![linear(6, 4), linear(4, 4)], &targets(&["0"])).unwrap();
        sets.insert(name, AdapterSet::of(&model)).unwrap();
    }
    let trainable = |model: &Vec<AdaptableLinear>| ParameterCount::of(model).trainable;
    let mut model = bare.clone();
    sets.activate_all(&mut model, &["a", "b"]).unwrap();
    assert_eq!(trainable(&model), 0);
    sets.activate(&mut model, "a").unwrap();
    assert_eq!(trainable(&model), 2 * (6 + 4));

    let mut model = bare.clone();
    drop(sets.mixed(&mut model, &[Some("a")]).unwrap());
    assert_eq!(trainable(&model), 0);
    assert_eq!(trainable(&bare), 6 * 4 + 4 + 4 * 4 + 4, "a clone was frozen too");
}

#[test]
fn a_trained_copy_is_merged_like_an_update() {
    if !has(DType::F16) {
        return;
    }
    let mut model = vec![linear(6, 4), linear(4, 4)];
    for layer in &mut model {
        let AdaptableLinear::Dense(plain) = layer else { unreachable!() };
        plain.weight = plain.weight.clone().map(|weight| weight.cast(DType::F16));
        plain.bias = plain.bias.take().map(|bias| bias.map(|bias| bias.cast(DType::F16)));
    }
    let config = LoraConfig { modules_to_save: vec!["1".to_owned()], ..targets(&["0"]) };
    let (model, _) = inject(model, &config).unwrap();
    let with = |value: f32| {
        let mut model = model.clone();
        let mut copy = AdapterSet::of(&model).get("1").unwrap().clone();
        let Adaptation::Replacement(own) = &mut copy else { unreachable!() };
        own.weight = Some(Param::from_tensor(Tensor::full([4, 4], value, &device())));
        model[1].detach();
        model[1].attach(copy).unwrap();
        model
    };
    for value in [f32::NAN, 1e30] {
        let mut model = with(value);
        assert!(
            matches!(merge(&mut model).unwrap_err().kind(), ErrorKind::NonFinite { path } if path == "1")
        );
        assert!(!model[0].is_merged());
    }
    let mut model = with(0.1);
    let report = merge(&mut model).unwrap();
    assert!(report.layers[1].rounding.largest > 0.0, "0.1 has no f16");

    // Merged, nothing trains.
    let x = Tensor::<2>::ones([2, 6], (&device(), DType::F16)).require_grad();
    let gradients = model[1].forward(model[0].forward(x)).sum().backward();
    let set = AdapterSet::of(&model);
    let Some(Adaptation::Replacement(own)) = set.get("1") else { unreachable!() };
    assert!(own.weight.as_ref().unwrap().val().grad(&gradients).is_none());
    assert!(own.bias.as_ref().unwrap().val().grad(&gradients).is_none());
}

#[test]
fn dtypes_that_differ_are_merged_or_refused() {
    if !has(DType::F64) {
        return;
    }
    let config = LoraConfig { dtype: Some(DType::F64), ..LoraConfig::new(2, 4.0) };
    let (mut model, _) = inject(vec![linear(6, 4)], &config).unwrap();
    randomise(&mut model);
    assert!(merge(&mut model).unwrap().layers[0].rounding.largest > 0.0);

    let a = Tensor::<2>::ones([6, 2], (&device(), DType::F64));
    let b = Tensor::<2>::ones([2, 4], &device());
    let error = sentence(LoraAdapter::from_tensors(a, b, 4.0, Scaling::AlphaOverRank));
    assert_eq!(error, "lora_b: expected F64, the dtype of A, found F32");
}

#[test]
fn token_ids_and_entries_are_checked_first() {
    let with = |tokens: &[(&str, &[usize])]| {
        let tokens = tokens.iter().map(|(name, ids)| ((*name).to_owned(), ids.to_vec()));
        let config = LoraConfig { trainable_tokens: tokens.collect(), ..targets(&["q"]) };
        sentence(inject(tied(), &config))
    };
    for (ids, expected) in [
        (&[10][..], "trainable_tokens: expected ids below 10, the vocabulary, found 10"),
        (&[usize::MAX], "trainable_tokens: expected ids below 10, the vocabulary, found"),
        (&[3, 3], "trainable_tokens: expected each id once, found 3 twice"),
        (&[], "trainable_tokens: expected at least one token id, found none"),
    ] {
        let found = with(&[("embed", ids)]);
        assert!(found.starts_with(expected), "{found}");
    }
    let found = with(&[("embed", &[1]), ("embed", &[2])]);
    assert!(found.contains("expected one entry for an embedding"), "{found}");
}

#[test]
fn readers_are_told_of_ties_and_of_mixed_batches() {
    let (model, _) = inject(tied(), &targets(&["embed", "q"])).unwrap();
    let error = sentence(check_written_for(&model, &[Reader::Mlx]));
    assert!(error.contains("no adapter on an embedding that is the head too"), "{error}");

    let (mut model, _) = inject(vec![linear(6, 4)], &LoraConfig::new(2, 4.0)).unwrap();
    let mut sets = AdapterSets::new();
    sets.insert("a", AdapterSet::of(&model)).unwrap();
    let mixed = sets.mixed(&mut model, &[Some("a"), None]).unwrap();
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("mlx");
    let error = save_mlx_adapter(&*mixed, &folder, &AdapterInfo::default()).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::MixedBatch { .. }));
    assert!(!folder.exists());

    let config = LoraConfig { init: Init::Olora, ..LoraConfig::new(usize::MAX, 4.0) };
    assert!(check_config_for(&config, &Reader::ALL).is_err());
}

#[test]
fn a_combination_checks_shapes_and_values_and_shares_nothing() {
    let plain = lora_core::device_from_env().unwrap();
    let set = |d_input: usize, value: f32| {
        let (a, b) = (Tensor::full([d_input, 2], value, &plain), Tensor::ones([2, 4], &plain));
        let adapter = LoraAdapter::from_tensors(a, b, 2.0, Scaling::AlphaOverRank).unwrap();
        AdapterSet::from_adapters([("x".to_owned(), adapter)])
    };
    let (density, seed, rank) = (0.5, 0, 1);
    let all = [
        Combination::Cat,
        Combination::Linear { rank },
        Combination::Ties { density, rank },
        Combination::Dare { density, seed, rank },
        Combination::DareTies { density, seed, rank },
    ];
    for how in all {
        for other in [5, 1] {
            let error = sentence(combine(&[(&set(6, 1.0), 1.0), (&set(other, 1.0), 1.0)], how));
            assert!(error.contains("of one shape") || error.contains("expected"), "{error}");
        }
        let error = combine(&[(&set(6, f32::NAN), 1.0)], how).unwrap_err();
        let is_told =
            matches!(error.kind(), ErrorKind::NonFiniteCombination { path } if path == "x");
        assert!(is_told && !error.to_string().contains("merge"), "{error}");
    }
    for how in [Combination::Cat, Combination::Linear { rank }] {
        let error = combine(&[(&set(6, 1.0), 1e300)], how).unwrap_err();
        assert!(!matches!(error.kind(), ErrorKind::NotCombinable { .. }), "{error}");
    }

    let config = LoraConfig { dora: true, ..LoraConfig::new(2, 4.0) };
    let (model, _) = inject(vec![linear(6, 4)], &config).unwrap();
    let one = AdapterSet::of(&model);
    let (combined, _) = combine(&[(&one, 1.0)], Combination::Cat).unwrap();
    let id = |set: &AdapterSet| match set.get("0") {
        Some(Adaptation::LowRank(adapter)) => adapter.lora_a.id,
        _ => unreachable!(),
    };
    assert_ne!(id(&one), id(&combined));
}

#[test]
fn what_is_no_order_of_merging_is_told_of_a_layer_without_a_path_too() {
    let mut model = vec![linear(6, 4)];
    let not_merged = "this layer or model: expected a merged layer, found one that is not merged; \
                      merge it first";
    assert_eq!(sentence(unmerge(&mut model)), not_merged);
    let layer = LinearConfig::new(6, 4).init(&device());
    let mut layer = LoraLinear::wrap(layer, 2, 4.0).unwrap();
    assert_eq!(sentence(layer.unmerge()), not_merged);
    layer.merge().unwrap();
    let merged =
        "this layer or model: expected an unmerged layer, found a merged one; unmerge it first";
    assert_eq!(sentence(layer.merge()), merged);
}

/// Merged in part, a model could be neither merged nor unmerged.
#[test]
fn nothing_is_attached_to_a_merged_model() {
    let (mut model, _) = inject(vec![linear(6, 4), linear(6, 4)], &targets(&["0"])).unwrap();
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("adapter");
    let (other, _) = inject(vec![linear(6, 4), linear(6, 4)], &targets(&["1"])).unwrap();
    save_adapter(&other, &folder, &AdapterInfo::default()).unwrap();
    merge(&mut model).unwrap();
    let expected = "0: expected an unmerged layer, found a merged one; unmerge it first";
    assert_eq!(sentence(inject(model.clone(), &targets(&["1"]))), expected);
    assert_eq!(sentence(load_adapter(model.clone(), &folder)), expected);
    assert_eq!(sentence(AdapterSet::of(&other).attach(model.clone())), expected);
    unmerge(&mut model).unwrap();
    inject(model, &targets(&["1"])).unwrap();
}

/// The layers that an adapter leaves as they are, once as it starts and once with one value changed.
#[test]
fn an_adapter_that_changes_nothing_is_told_in_every_variant() {
    #[derive(Module, Debug, VisitLora)]
    struct Net {
        q: AdaptableLinear,
        embed: AdaptableEmbedding,
    }
    let net = Net { q: linear(6, 4), embed: EmbeddingConfig::new(10, 4).init(&device()).into() };
    let q = || targets(&["q"]);
    let with_init = |init: Init| LoraConfig { init, ..q() };
    let mut saved = q();
    saved.modules_to_save = vec!["embed".to_owned()];
    let mut tokens = q();
    tokens.trainable_tokens = vec![("embed".to_owned(), vec![3, 1])];
    let configs = [
        q(),
        LoraConfig { lora_bias: true, ..q() },
        LoraConfig { dora: true, ..q() },
        LoraConfig { bias: TrainedBias::LoraOnly, ..q() },
        with_init(Init::Orthogonal),
        with_init(Init::Pissa { iterations: None }),
        with_init(Init::Pissa { iterations: Some(2) }),
        with_init(Init::Olora),
        saved,
        tokens,
    ];
    let temp = tempfile::tempdir().unwrap();
    for (number, config) in configs.into_iter().enumerate() {
        let (mut model, report) = inject(net.clone(), &config).unwrap();
        let adapted = report.adapted.len() + report.replaced.len();
        let load = |model: &Net, name: &str| {
            let folder = temp.path().join(format!("{name}{number}"));
            save_adapter(model, &folder, &AdapterInfo::default()).unwrap();
            load_adapter(net.clone(), &folder).unwrap().1
        };
        let loaded = load(&model, "fresh");
        assert_eq!(loaded.unchanged.len(), adapted, "{config:?}: {loaded}");
        assert!(loaded.to_string().contains("was the adapter trained?"), "{loaded}");

        let adapter = model.q.adapter_mut().unwrap();
        for vector in [&mut adapter.magnitude, &mut adapter.lora_bias, &mut adapter.base_bias] {
            let Some(param) = vector.take() else { continue };
            *vector = Some(param.map(|values| values.mul_scalar(1.001).add_scalar(1e-4)));
            break;
        }
        if !(config.dora || config.lora_bias || config.bias != TrainedBias::None) {
            let change = |param: Param<Tensor<2>>| param.map(|value| value.add_scalar(1e-3));
            adapter.lora_a = change(adapter.lora_a.clone());
            adapter.lora_b = change(adapter.lora_b.clone());
        }
        let loaded = load(&model, "changed");
        assert_eq!(loaded.unchanged.len(), adapted - 1, "{config:?}: {loaded}");
        assert!(!loaded.unchanged.contains(&"q".to_owned()));
    }
}

#[test]
fn a_number_that_is_zero_in_f32_is_refused_where_it_is_given() {
    let layer = || LinearConfig::new(6, 4).init(&device());
    assert!(sentence(LoraLinear::wrap(layer(), 2, 1e-46)).contains("expected a finite number"));
    assert!(sentence(inject(vec![linear(6, 4)], &LoraConfig::new(2, 1e-46))).contains("alpha"));
    let init = Init::GaussianB { std: Some(1e-46) };
    let error =
        sentence(inject(vec![linear(6, 4)], &LoraConfig { init, ..LoraConfig::new(2, 1.0) }));
    assert!(error.contains("init std: expected a finite number above 0"), "{error}");
}

#[test]
fn a_file_is_read_whatever_is_on_the_model() {
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("adapter");
    let base = vec![linear(6, 4)];
    let (mut model, _) = inject(base.clone(), &targets(&["0"])).unwrap();
    randomise(&mut model);
    save_adapter(&model, &folder, &AdapterInfo::default()).unwrap();
    let x = Tensor::<2>::random([3, 6], Distribution::Default, &device());
    let expected = model[0].forward(x.clone()).into_data();

    let options = LoadOptions::default();
    let (beside_live, _) = read_adapter(&model, &folder, &options).unwrap();
    merge(&mut model).unwrap();
    let (beside_merged, _) = read_adapter(&model, &folder, &options).unwrap();
    for set in [beside_live, beside_merged] {
        let (read, _) = set.attach(base.clone()).unwrap();
        assert_eq!(read[0].forward(x.clone()).into_data(), expected);
    }
    unmerge(&mut model).unwrap();
    let error = load_adapter(model, &folder).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::AlreadyAdapted { path } if path == "0"), "{error}");
}

#[test]
fn magnitudes_put_on_by_hand_act() {
    let plain = LinearConfig::new(6, 4).init(&device());
    let mut config = LoraConfig::new(2, 4.0);
    let new = |config: &LoraConfig| {
        LoraLinear::with_config(plain.clone(), &config.resolve("").unwrap()).unwrap()
    };
    let mut layer = new(&config);
    config.dora = true;
    let mut adapter = new(&config).adapter().clone();
    let doubled = |magnitude: Param<Tensor<1>>| magnitude.val().mul_scalar(2.0).detach();
    adapter.magnitude = adapter.magnitude.map(|magnitude| Param::from_tensor(doubled(magnitude)));
    *layer.adapter_mut() = adapter;
    let x = Tensor::<2>::random([3, 6], Distribution::Default, &device());
    let live = layer.forward(x.clone());
    let gradients = live.clone().sum().backward();
    let magnitude = layer.adapter().magnitude.as_ref().unwrap().val();
    assert!(magnitude.grad(&gradients).is_some());
    layer.merge().unwrap();
    let apart = (live - layer.forward(x)).abs().max().into_scalar::<f32>();
    assert!(apart < 1e-5, "{apart}");
}

#[test]
fn a_set_goes_over_to_autodiff_and_back_with_the_model() {
    let base = vec![linear(6, 4)];
    let (mut model, _) = inject(base.clone(), &LoraConfig::new(2, 4.0)).unwrap();
    randomise(&mut model);
    let x = || Tensor::<2>::ones([1, 6], &lora_core::device_from_env().unwrap());
    let (plain, _) = AdapterSet::of(&model).attach(base.valid()).unwrap();
    assert!(!plain[0].forward(x()).device().is_autodiff());
    let (trains, report) = AdapterSet::of(&plain).attach(base).unwrap();
    assert_eq!(report.parameters.trainable, 2 * (6 + 4));
    let gradients = trains[0].forward(x().autodiff()).sum().backward();
    audit_gradients(&trains, &gradients).unwrap();
}

#[test]
fn the_rest_of_a_sum_stays_switched_off() {
    let (mut model, _) =
        inject(vec![linear(6, 4), linear(4, 4)], &LoraConfig::new(2, 4.0)).unwrap();
    randomise(&mut model);
    let mut sets = AdapterSets::new();
    sets.insert("a", AdapterSet::of(&model)).unwrap();
    sets.insert("b", AdapterSet::of(&model)).unwrap();
    sets.activate_all(&mut model, &["a", "b"]).unwrap();
    model[0].set_enabled(false);
    sets.remove(&mut model, "b").unwrap();
    assert_eq!([model[0].is_enabled(), model[1].is_enabled()], [false, true]);
}

#[test]
fn tokens_belong_to_an_embedding_of_their_vocabulary() {
    let config =
        LoraConfig { trainable_tokens: vec![("embed".to_owned(), vec![1, 8])], ..targets(&["q"]) };
    let (mut model, _) = inject(tied(), &config).unwrap();
    let set = AdapterSet::detach(&mut model);
    let tokens = set.get("embed").unwrap().clone();
    let mut other = linear(10, 4);
    let error = sentence(AdaptableLayer::attach(&mut other, tokens));
    assert!(
        error.contains("tokens on an embedding of 10 rows, found tokens on a linear"),
        "{error}"
    );
    for vocabulary in [5, 12] {
        let embed = EmbeddingConfig::new(vocabulary, 4).init(&device()).into();
        let error = sentence(set.clone().attach(Tied { embed, q: linear(4, 4) }));
        assert!(error.contains("found tokens of a vocabulary of 10"), "{error}");
    }
    set.attach(tied()).unwrap();
}

#[derive(Module, Debug, VisitLora)]
#[lora(tied = "embed")]
struct Positions {
    embed: AdaptableEmbedding,
    positions: AdaptableEmbedding,
}

#[test]
fn of_two_embeddings_one_is_the_head_too() {
    let embedding = || EmbeddingConfig::new(10, 4).init(&device()).into();
    let base = Positions { embed: embedding(), positions: embedding() };
    let readers = [Reader::LlamaCpp, Reader::Mlx];
    let (model, _) = inject(base.clone(), &targets(&["positions"])).unwrap();
    check_model_for(&model, &readers).unwrap();
    let (model, _) = inject(base, &targets(&["positions", "embed"])).unwrap();
    let error = check_model_for(&model, &readers).unwrap_err();
    let ErrorKind::NotPortable { problems } = error.kind() else { panic!("{error}") };
    assert!(problems.iter().all(|problem| problem.places == ["embed"]), "{error}");
}

#[test]
fn a_path_twice_in_a_set_is_refused() {
    let (mut model, _) = inject(vec![linear(6, 4)], &LoraConfig::new(2, 4.0)).unwrap();
    let adapter = model[0].adapter_mut().unwrap().clone();
    let twice = || AdapterSet::from_adapters([0, 1].map(|_| ("0".to_owned(), adapter.clone())));
    let error = sentence(twice().attach(vec![linear(6, 4)]));
    assert_eq!(error, "adapter: expected one adapter for each layer, found two at 0");
    let mut sets = AdapterSets::new();
    sets.insert("twice", twice()).unwrap();
    assert!(sentence(sets.activate(&mut vec![linear(6, 4)], "twice")).contains("two at 0"));
}

#[test]
fn a_set_of_a_model_acts_there_beside_another_that_does() {
    let base = vec![linear(6, 4), linear(4, 4)];
    let mut sets = AdapterSets::new();
    let (model, _) = inject(base, &targets(&["0"])).unwrap();
    sets.insert("first", AdapterSet::of(&model)).unwrap();
    let (mut model, _) = inject(model, &targets(&["1"])).unwrap();
    sets.insert("both", AdapterSet::of(&model)).unwrap();
    assert_eq!(sets.active(&model).unwrap(), ["first", "both"]);
    sets.activate(&mut model, "both").unwrap();
    assert_eq!(adapted_layers(&model), 2);
    sets.activate(&mut model, "first").unwrap();
    assert_eq!(adapted_layers(&model), 1);
}

fn adapted_layers<M: VisitLora>(model: &M) -> usize {
    AdapterSet::of(model).paths().count()
}

#[test]
fn copies_of_a_model_may_have_other_sums() {
    let (mut model, _) = inject(vec![linear(6, 4)], &LoraConfig::new(2, 4.0)).unwrap();
    let mut sets = AdapterSets::new();
    for name in ["a", "b", "c"] {
        sets.insert(name, AdapterSet::of(&model)).unwrap();
    }
    sets.activate_all(&mut model, &["a", "b"]).unwrap();
    let mut copy = model.valid();
    sets.activate_all(&mut copy, &["b", "c"]).unwrap();
    assert_eq!(sets.active(&model).unwrap(), ["a", "b"]);
    assert_eq!(sets.active(&copy).unwrap(), ["b", "c"]);
    sets.rename("b", "d").unwrap();
    sets.remove(&mut model, "a").unwrap();
    assert_eq!(sets.active(&model).unwrap(), ["d"]);
    assert_eq!(sets.active(&copy).unwrap(), ["d", "c"]);
    sets.activate(&mut copy, "c").unwrap();
    assert_eq!(sets.active(&copy).unwrap(), ["c"]);
}

#[test]
fn a_bias_that_no_adapter_trains_is_told() {
    let (with, without) = (linear(6, 4), LinearConfig::new(6, 4).with_bias(false).init(&device()));
    let model = vec![without.into(), with];
    let mut config = LoraConfig { bias: TrainedBias::LoraOnly, ..targets(&["0"]) };
    config.modules_to_save = vec!["1".to_owned()];
    let error = sentence(inject(model, &config));
    assert!(error.contains("bias: expected none where no layer"), "{error}");
}

/// What no layer could have read is refused where it is put on, and where it is saved.
#[test]
fn a_trained_bias_belongs_to_a_layer_with_one() {
    let with = linear(6, 4);
    let without: AdaptableLinear = LinearConfig::new(6, 4).with_bias(false).init(&device()).into();
    let replacement = |layer: &dyn AdaptableLayer| layer.copy_of_layer();
    let mut bare = replacement(&with);
    bare.bias = None;
    let mut nothing = bare.clone();
    nothing.weight = None;
    for (mut layer, replacement, problem) in [
        (with.clone(), bare, "a bias beside the weight"),
        (without.clone(), replacement(&with), "no trained bias"),
        (with.clone(), nothing, "values in place of the layer's own"),
    ] {
        let error = sentence(layer.attach(Adaptation::Replacement(replacement)));
        assert!(error.contains(problem), "{error}");
    }

    let (mut model, _) = inject(vec![without], &LoraConfig::new(2, 4.0)).unwrap();
    let bias = Param::from_tensor(Tensor::zeros([4], &device()));
    model[0].as_lora_mut().unwrap().adapter_mut().base_bias = Some(bias);
    let temp = tempfile::tempdir().unwrap();
    let error =
        sentence(save_adapter(&model, temp.path().join("adapter"), &AdapterInfo::default()));
    assert!(error.contains("no trained bias") && error.ends_with(" for 0"), "{error}");
}

#[test]
#[should_panic = "matmul"]
fn a_grouped_convolution_has_no_dense_update() {
    let layer =
        Conv1dConfig::new(4, 4, 3).with_groups(2).init(&lora_core::device_from_env().unwrap());
    LoraConv1d::wrap(layer, 2, 4.0).unwrap().adapter().delta_weight();
}

#[test]
fn saves_to_one_place_leave_one_whole_folder() {
    let temp = tempfile::tempdir().unwrap();
    let bytes = vec![7; 100_000];
    for round in 0..20 {
        let folder = temp.path().join(format!("folder{round}"));
        let file = temp.path().join(format!("file{round}"));
        let save = || {
            let folder = write_folder(&folder, &[("a", &bytes), ("b/c", &bytes)]).is_ok();
            (folder, write_file(&file, &bytes).is_ok())
        };
        let saved: Vec<(bool, bool)> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(save)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(saved.iter().filter(|(folder, _)| *folder).count(), 1);
        assert_eq!(saved.iter().filter(|(_, file)| *file).count(), 1);
        for path in [folder.join("a"), folder.join("b/c"), file] {
            assert_eq!(fs::read(path).unwrap(), bytes);
        }
    }
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 40, "something was left behind");

    // Long names that begin alike do not meet under the hidden ones.
    let save = |round: usize| {
        let folder = temp.path().join(format!("{}{round}", "x".repeat(100)));
        write_folder(&folder, &[("a", &bytes)])
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|round| scope.spawn(move || save(round))).collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap().unwrap());
    });
    write_folder(&temp.path().join("y".repeat(250)), &[("a", b"1")]).unwrap();
}
