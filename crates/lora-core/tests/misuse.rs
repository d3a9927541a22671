//! Unusual orders, mixtures and files: what was silent or a panic once.
#![cfg(feature = "flex")]

use std::fs;
use std::path::Path;

use burn::module::{Module, Param};
use burn::nn::conv::Conv1dConfig;
use burn::nn::{EmbeddingConfig, LinearConfig};
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{DType, Device, Distribution, Tensor};
use lora_core::*;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

fn device() -> Device {
    Device::flex().autodiff()
}

fn linear(d_input: usize, d_output: usize) -> AdaptableLinear {
    LinearConfig::new(d_input, d_output).init(&device()).into()
}

fn targets(names: &[&str]) -> LoraConfig {
    LoraConfig {
        target_modules: TargetModules::names(names.iter().copied()),
        ..LoraConfig::new(2, 4.0)
    }
}

/// Random values for all factors, which train.
fn randomise<M: VisitLora>(model: &mut M) {
    model.visit_lora_mut("", &mut |_, layer| {
        let Some(adapter) = layer.adapter_mut() else { return };
        for factor in [&mut adapter.lora_a, &mut adapter.lora_b] {
            *factor = Param::from_tensor(factor.val().random_like(Distribution::Default));
        }
    });
}

fn sentence<T>(result: Result<T>) -> String {
    result.map(|_| ()).unwrap_err().to_string()
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
    let device = Device::flex().autodiff().gradient_checkpointing();
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
    let plain = Device::flex();
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
        assert!(matches!(error.kind(), ErrorKind::NonFinite { path } if path == "x"), "{error}");
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
fn nothing_to_unmerge_is_an_error() {
    let mut model = vec![linear(6, 4)];
    assert!(matches!(unmerge(&mut model).unwrap_err().kind(), ErrorKind::NotMerged { .. }));
}

#[test]
#[should_panic = "matmul"]
fn a_grouped_convolution_has_no_dense_update() {
    let layer = Conv1dConfig::new(4, 4, 3).with_groups(2).init(&Device::flex());
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

/// Of a checkpoint or an adapter: name, shape, values in f32.
type Named<'a> = (&'a str, &'a [usize], Vec<f32>);

/// What comes of an adapter over a checkpoint of this dtype.
fn merged(config: Value, adapter: &[Named], base: &[Named], dtype: Dtype) -> Result<MergeReport> {
    merged_as(&MergeOptions::default(), config, adapter, base, dtype).map(|(report, _)| report)
}

/// The same as the options say, and the bytes of the new weights' file.
fn merged_as(
    options: &MergeOptions,
    config: Value,
    adapter: &[Named],
    base: &[Named],
    dtype: Dtype,
) -> Result<(MergeReport, Vec<u8>)> {
    let temp = tempfile::tempdir().unwrap();
    let [base_folder, adapter_folder, output] =
        ["base", "adapter", "output"].map(|name| temp.path().join(name));
    let write = |path: &Path, tensors: &[Named], dtype: Dtype| {
        let bytes: Vec<Vec<u8>> = tensors
            .iter()
            .map(|(_, _, values)| match dtype {
                Dtype::F16 => values
                    .iter()
                    .flat_map(|value| half::f16::from_f32(*value).to_le_bytes())
                    .collect(),
                _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            })
            .collect();
        let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
            (*name, TensorView::new(dtype, shape.to_vec(), bytes).unwrap())
        });
        fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    };
    fs::create_dir(&base_folder).unwrap();
    fs::create_dir(&adapter_folder).unwrap();
    write(&base_folder.join("model.safetensors"), base, dtype);
    fs::write(base_folder.join("config.json"), r#"{"tie_word_embeddings": true}"#).unwrap();
    write(&adapter_folder.join("adapter_model.safetensors"), adapter, Dtype::F32);
    fs::write(adapter_folder.join("adapter_config.json"), config.to_string()).unwrap();
    let device = Device::flex();
    let report = merge_checkpoint_with(&base_folder, &adapter_folder, &output, &device, options);
    assert_eq!(report.is_ok(), output.exists());
    report.map(|report| (report, fs::read(output.join("model.safetensors")).unwrap()))
}

/// The values of an f32 tensor of such a file.
fn values(file: &[u8], name: &str) -> Vec<f32> {
    let tensors = safetensors::SafeTensors::deserialize(file).unwrap();
    let (four, _) = tensors.tensor(name).unwrap().data().as_chunks::<4>();
    four.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

fn config(extra: Value) -> Value {
    let mut config = json!({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"]});
    config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    config
}

fn factors() -> [Named<'static>; 2] {
    [
        ("base_model.model.q.lora_A.weight", &[1, 4], vec![1.0; 4]),
        ("base_model.model.q.lora_B.weight", &[4, 1], vec![1.0; 4]),
    ]
}

fn q() -> Named<'static> {
    ("q.weight", &[4, 4], vec![0.0; 16])
}

#[test]
fn a_checkpoint_takes_all_of_an_adapter_or_nothing() {
    merged(config(json!({})), &factors(), &[q()], Dtype::F32).unwrap();
    merged(config(json!({"lora_alpha": -1})), &factors(), &[q()], Dtype::F32).unwrap();

    for (name, shape) in [
        ("q.lora_magnitude_vector", &[4][..]),
        ("q.lora_B.bias", &[4]),
        ("q.base_layer.bias", &[4]),
        ("q.weight", &[4, 4]),
        ("v.lora_magnitude_vector", &[4]),
        ("v.base_layer.bias", &[4]),
    ] {
        let name = format!("base_model.model.{name}");
        let count = shape.iter().product();
        let [a, b] = factors();
        let adapter = [a, b, (name.as_str(), shape, vec![3.0; count])];
        let base = [q(), ("q.bias", &[4], vec![0.0; 4]), ("v.weight", &[4, 4], vec![0.0; 16])];
        let error = sentence(merged(config(json!({})), &adapter, &base, Dtype::F32));
        assert!(error.contains("is in the file, but belongs to no target"), "{name}: {error}");
    }

    let base = [q(), ("v.weight", &[4, 4], vec![0.0; 16])];
    let two = config(json!({"target_modules": ["q", "v"]}));
    let error = sentence(merged(two, &factors(), &base, Dtype::F32));
    assert!(error.contains("v is a target, and the file has nothing for it"), "{error}");
}

/// With what PEFT adds for a head, its frozen weight, and a bias that trained.
#[test]
fn weight_and_bias_of_a_layer_are_merged_each_for_itself() {
    let weight: Vec<f32> = (0..16).map(|value| value as f32).collect();
    let [a, b] = factors();
    let adapter = [
        a,
        b,
        ("base_model.model.q.base_layer.weight", &[4, 4][..], weight.clone()),
        ("base_model.model.q.base_layer.bias", &[4], vec![7.0; 4]),
    ];
    let base = [("q.weight", &[4, 4][..], weight.clone()), ("q.bias", &[4], vec![1.0; 4])];
    let options = MergeOptions::default();
    let config = config(json!({"bias": "lora_only"}));
    let (_, file) = merged_as(&options, config, &adapter, &base, Dtype::F32).unwrap();
    let expected: Vec<f32> = weight.iter().map(|value| value + 1.0).collect();
    assert_eq!(values(&file, "q.weight"), expected);
    assert_eq!(values(&file, "q.bias"), [7.0; 4]);
}

#[test]
fn over_what_a_start_left_the_update_is_added_as_it_is() {
    let mut weight = vec![0.0; 16];
    weight[0] = 3.0; // the largest singular value, [0][0] in either order
    weight[5] = 2.0;
    let base = [("q.weight", &[4, 4][..], weight.clone())];
    let merged = |residual_base: bool| {
        let options = MergeOptions { residual_base, ..MergeOptions::default() };
        let config = config(json!({"init_lora_weights": "pissa"}));
        let (_, file) = merged_as(&options, config, &factors(), &base, Dtype::F32).unwrap();
        values(&file, "q.weight")
    };
    let mut expected: Vec<f32> = weight.iter().map(|value| value + 1.0).collect();
    assert_eq!(merged(true), expected);
    // Over the original weight, the start is taken out: 3 at [0][0].
    expected[0] -= 3.0;
    for (found, expected) in merged(false).iter().zip(&expected) {
        assert!((found - expected).abs() < 1e-5, "{found} {expected}");
    }
}

#[test]
fn a_checkpoint_whose_weights_are_the_other_way_round_is_refused() {
    let transposed = config(json!({"fan_in_fan_out": true}));
    let error = sentence(merged(transposed, &factors(), &[q()], Dtype::F32));
    assert!(error.contains("fan_in_fan_out: expected false"), "{error}");
}

#[test]
fn a_tied_embedding_that_trained_as_a_whole_is_not_merged_into_files() {
    let saved = config(json!({"modules_to_save": ["embed_tokens"]}));
    let [a, b] = factors();
    let name = "base_model.model.model.embed_tokens.weight";
    let adapter = [a, b, (name, &[3, 4][..], vec![9.0; 12])];
    let base = [q(), ("model.embed_tokens.weight", &[3, 4], vec![1.0; 12])];
    let error = sentence(merged(saved, &adapter, &base, Dtype::F32));
    assert!(error.contains("tied to the embedding"), "{error}");
}

#[test]
fn a_value_that_the_checkpoint_cannot_hold_is_an_error() {
    for (part, shape, config) in [
        ("v.weight", &[4, 4][..], config(json!({"modules_to_save": ["v"]}))),
        ("q.base_layer.bias", &[4], config(json!({"bias": "lora_only"}))),
        ("v.bias", &[4], config(json!({"bias": "all"}))),
    ] {
        let name = format!("base_model.model.{part}");
        let [a, b] = factors();
        let count = shape.iter().product();
        let adapter = [a, b, (name.as_str(), shape, vec![1e6; count])];
        // Of the biases, the one that the adapter has.
        let bias = part.replace(".base_layer", "").replace(".weight", ".bias");
        let base = [q(), ("v.weight", &[4, 4], vec![0.0; 16]), (&bias, &[4], vec![0.0; 4])];
        let base = if part == "v.weight" { &base[..2] } else { &base[..] };
        let error = merged(config, &adapter, base, Dtype::F16).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::NonFinite { .. }), "{part}: {error}");
    }
}

#[derive(Module, Debug, VisitLora)]
struct Pair {
    v: AdaptableLinear, // [4, 4]
    q: AdaptableLinear,
}

#[test]
fn a_checkpoint_must_be_the_base_of_the_adapter_unless_it_is_wanted() {
    let base = Pair { v: linear(4, 4), q: linear(4, 4) };
    let (mut model, _) = inject(base, &LoraConfig::new(2, 4.0)).unwrap();
    randomise(&mut model);
    let temp = tempfile::tempdir().unwrap();
    let adapter = temp.path().join("adapter");
    save_adapter(&model, &adapter, &AdapterInfo::default()).unwrap();

    let merge = |name: &str, scale: f32, options: &MergeOptions| {
        let [base, output] =
            ["base", "output"].map(|kind| temp.path().join(format!("{name}-{kind}")));
        fs::create_dir(&base).unwrap();
        // In torch's order, v in another file than q.
        for (name, layer) in [("q", &model.q), ("v", &model.v)] {
            let weight = layer.weight().without_autodiff().mul_scalar(scale).transpose();
            let bytes = weight.into_data().into_bytes().to_vec();
            let view = TensorView::new(Dtype::F32, vec![4, 4], &bytes).unwrap();
            let file = safetensors::serialize([(format!("{name}.weight"), view)], None).unwrap();
            fs::write(base.join(format!("{name}.safetensors")), file).unwrap();
        }
        merge_checkpoint_with(base, &adapter, output, &Device::flex(), options)
    };
    let strict = MergeOptions::default();
    assert_eq!(merge("same", 1.0, &strict).unwrap().layers.len(), 2);
    let error = merge("other", 2.0, &strict).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::OtherBase { .. }), "{error}");
    let options = MergeOptions { check_base: false, ..strict };
    assert_eq!(merge("wanted", 2.0, &options).unwrap().layers.len(), 2);
}

#[test]
fn a_weight_without_values_is_refused() {
    for shape in [[0, 4], [4, 0]] {
        let adapter: [Named; 2] = [
            ("base_model.model.q.lora_A.weight", &[1, shape[1]], vec![1.0; shape[1]]),
            ("base_model.model.q.lora_B.weight", &[shape[0], 1], vec![1.0; shape[0]]),
        ];
        let error = sentence(merged(
            config(json!({})),
            &adapter,
            &[("q.weight", &shape, vec![])],
            Dtype::F32,
        ));
        assert!(error.contains("no layer has the shape"), "{error}");
    }
}
