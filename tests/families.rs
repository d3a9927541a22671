//! A tiny random model of each family against transformers: logits, loss and gradients.
//!
//! The files under `tests/golden/families` were made by `make_families.py` beside that folder.

mod tiny;

use std::fs;
use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Device, Gradients, Int, Tensor, TensorData};
use lora_core::{
    AdapterSet, AdapterSets, Init, LoraConfig, TargetModules, VisitLora, inject, merge,
};
use lora_models::{
    Decoder, DecoderConfig, Error, GgufFile, HostTensor, KvCache, Packing, RopeScaling, Sampling,
    SaveOptions, WeightDtype, WeightSource, open_weights, read_config, save_folder_with,
};
use tiny::{difference, golden, has, largest_difference, logits, tensor};

fn families() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> =
        fs::read_dir(golden("families")).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    assert!(folders.len() >= 16, "{folders:?}");
    folders
}

fn name(folder: &Path) -> &str {
    folder.file_name().unwrap().to_str().unwrap()
}

fn load(folder: &Path, dtype: WeightDtype, device: &Device) -> Decoder {
    let weights = open_weights(folder).unwrap();
    Decoder::from_weights_as(&read_config(folder).unwrap(), &*weights, dtype, device).unwrap()
}

fn ids(folder: &Path, device: &Device) -> Tensor<2, Int> {
    let (ids, shape) = tensor(&folder.join("golden.safetensors"), "input_ids", i64::from_le_bytes);
    Tensor::from_data(TensorData::new(ids, [shape[0], shape[1]]), device)
}

fn f32s(folder: &Path, name: &str) -> Vec<f32> {
    tensor(&folder.join("golden.safetensors"), name, f32::from_le_bytes).0
}

#[test]
fn logits_in_f32_are_those_of_transformers() {
    for folder in families() {
        let decoder = load(&folder, WeightDtype::F32, &lora_core::device_from_env().unwrap());
        let path = folder.join("golden.safetensors");
        let apart = difference(&logits(&decoder, &path), &path);
        println!("{:<22} f32 {apart:.2e}", name(&folder));
        assert!(apart <= 1e-5, "{}: {apart:e}", name(&folder));
    }
}

/// In bf16 rounding alone moves these logits by 1 to 8 % in transformers itself: all of them are as near as this
/// only where operations round where those of transformers' eager attention do.
#[test]
fn logits_in_bf16_are_those_of_transformers() {
    if !has(WeightDtype::BF16) {
        return;
    }
    for folder in families() {
        let decoder = load(&folder, WeightDtype::BF16, &lora_core::device_from_env().unwrap())
            .with_eager_rounding();
        let found = logits(&decoder, &folder.join("golden.safetensors"));
        let apart = largest_difference(&found, &f32s(&folder, "logits_bf16"));
        println!("{:<22} bf16 {apart:.2e}", name(&folder));
        assert!(apart <= 1e-2, "{}: {apart:e}", name(&folder));
    }
}

/// The weights of another source, with the biases of queries and keys made large, as Qwen2's are.
struct LargeBiases(Box<dyn WeightSource>, f32);

impl WeightSource for LargeBiases {
    fn path(&self) -> &Path {
        self.0.path()
    }

    fn names(&self) -> Vec<String> {
        self.0.names()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.shape(name)
    }

    fn read_as(&self, name: &str, dtype: WeightDtype) -> Result<HostTensor, Error> {
        let tensor = self.0.read_as(name, WeightDtype::F32)?;
        let large = name.ends_with("q_proj.bias") || name.ends_with("k_proj.bias");
        let factor = if large { self.1 } else { 1.0 };
        let values = tensor.values.to_f32().iter().map(|value| value * factor).collect::<Vec<_>>();
        Ok(HostTensor::new(tensor.shape, values).cast(dtype))
    }
}

/// Products of queries and keys beyond the largest number of f16, whole and step by step, with gradients and
/// without: infinite where they are rounded before they are scaled, and differences of infinities are not numbers.
#[test]
fn large_scores_are_not_rounded() {
    if !has(WeightDtype::F16) {
        return;
    }
    let folder = golden("families").join("qwen2_tied");
    let path = folder.join("golden.safetensors");
    let config = read_config(&folder).unwrap();
    let source = LargeBiases(open_weights(&folder).unwrap(), 2000.0);
    let load = |device: &Device| {
        Decoder::from_weights_as(&config, &source, WeightDtype::F16, device).unwrap()
    };
    let are_numbers = |logits: &[f32]| logits.iter().all(|value| value.is_finite());
    let decoder = load(&lora_core::device_from_env().unwrap());
    assert!(are_numbers(&logits(&decoder, &path)));
    assert!(are_numbers(&logits(&load(&lora_core::device_from_env().unwrap().autodiff()), &path)));
    let ids = ids(&folder, &lora_core::device_from_env().unwrap());
    let mut cache = KvCache::new();
    for at in 0..24 {
        let step = decoder.hidden_states(ids.clone().narrow(1, at, 1), Some(&mut cache));
        assert!(are_numbers(&host(step)), "step {at}");
    }
    assert!(!are_numbers(&logits(&decoder.with_eager_rounding(), &path)));
}

/// `make_gguf_families.py` wrote the files with ggml's own package.
#[test]
fn a_gguf_file_is_the_model_that_it_was_made_of() {
    let mut seen = Vec::new();
    for folder in families() {
        let Ok(file) = GgufFile::open(folder.join("model.gguf")) else { continue };
        let (config, expected) = (file.config().unwrap(), read_config(&folder).unwrap());
        let sizes = |config: &DecoderConfig| {
            (config.tensor_shapes(), config.experts.clone(), config.longest_text())
        };
        assert_eq!(sizes(&config), sizes(&expected), "{}", name(&folder));
        seen.push((name(&folder).to_owned(), config.family.name));
        for (dtype, bound) in [(WeightDtype::F32, 1e-5), (WeightDtype::BF16, 1e-2)] {
            if !has(dtype) {
                continue;
            }
            let device = lora_core::device_from_env().unwrap();
            let decoder = Decoder::from_weights_as(&config, &file, dtype, &device).unwrap();
            let decoder = decoder.with_eager_rounding();
            let found = logits(&decoder, &folder.join("golden.safetensors"));
            let golden = if dtype == WeightDtype::F32 { "logits" } else { "logits_bf16" };
            let apart = largest_difference(&found, &f32s(&folder, golden));
            println!("{:<22} as {} {dtype:?} {apart:.2e}", name(&folder), config.family.name);
            assert!(apart <= bound, "{}: {apart:e}", name(&folder));
        }
    }
    // llama.cpp's format does not tell a Mistral from a Llama.
    let expected = [
        ("llama_linear", "llama"),
        ("llama_llama3", "llama"),
        ("llama_yarn", "llama"),
        ("mistral_no_window", "llama"),
        ("mixtral_no_window", "mixtral"),
        ("qwen2_tied", "qwen2"),
        ("qwen3_moe_all_layers", "qwen3_moe"),
        ("qwen3_tied", "qwen3"),
    ];
    assert_eq!(seen, expected.map(|(folder, family)| (folder.to_owned(), family)));
}

#[test]
fn a_cache_changes_nothing_whatever_the_pieces() {
    for folder in families() {
        let decoder = load(&folder, WeightDtype::F32, &lora_core::device_from_env().unwrap());
        let ids = ids(&folder, &lora_core::device_from_env().unwrap());
        // Dynamic scaling turns earlier keys by the theta of their own time, here as in transformers.
        if matches!(decoder.config().rope_scaling, RopeScaling::Dynamic { .. }) {
            continue;
        }
        let whole = decoder.hidden_states(ids.clone(), None);
        for (capacity, pieces) in [(24, [1; 24].to_vec()), (0, vec![7, 1, 1, 12, 3]), (5, vec![24])]
        {
            let mut cache = KvCache::with_capacity(capacity);
            let mut start = 0;
            let mut parts = Vec::new();
            for length in pieces {
                let piece = ids.clone().narrow(1, start, length);
                parts.push(decoder.hidden_states(piece, Some(&mut cache)));
                start += length;
            }
            assert_eq!(cache.seen(), 24);
            let apart = largest_difference(&host(Tensor::cat(parts, 1)), &host(whole.clone()));
            assert!(apart <= 2e-6, "{}, capacity {capacity}: {apart:e}", name(&folder));
        }
    }
}

/// On Flex a single token takes Burn's operations where gradients are recorded, and kernels of its own where not.
#[test]
fn with_gradients_a_decoder_is_the_same_function() {
    for (dtype, bound) in [(WeightDtype::F32, 2e-6), (WeightDtype::BF16, 6e-2)] {
        if !has(dtype) {
            continue;
        }
        for folder in families() {
            let run = |device: &Device| {
                let decoder = load(&folder, dtype, device);
                let ids = ids(&folder, device);
                let mut cache = KvCache::new();
                let pieces = [(0, 20), (20, 1), (21, 1)].map(|(start, length)| {
                    let piece = ids.clone().narrow(1, start, length);
                    decoder.hidden_states(piece, Some(&mut cache)).inner()
                });
                host(Tensor::cat(pieces.to_vec(), 1).cast(DType::F32))
            };
            let (plain, composed) = (
                run(&lora_core::device_from_env().unwrap()),
                run(&lora_core::device_from_env().unwrap().autodiff()),
            );
            let apart = largest_difference(&plain, &composed);
            println!("{:<22} {dtype:?} {apart:.2e}", name(&folder));
            assert!(apart <= bound, "{}: {apart:e}", name(&folder));
        }
    }
}

#[test]
fn a_cache_that_forgets_goes_another_way() {
    let folder = golden("families").join("qwen2");
    let decoder = load(&folder, WeightDtype::F32, &lora_core::device_from_env().unwrap());
    let ids = ids(&folder, &lora_core::device_from_env().unwrap());
    let mut cache = KvCache::new();
    let run = |start, length, cache: &mut KvCache| {
        decoder.hidden_states(ids.clone().narrow(1, start, length), Some(cache))
    };
    run(0, 10, &mut cache);
    let expected = host(run(10, 4, &mut cache));
    cache.truncate(10);
    run(3, 6, &mut cache);
    cache.truncate(10);
    assert_eq!(host(run(10, 4, &mut cache)), expected);
}

#[test]
fn texts_in_one_row_are_as_if_alone() {
    let device = lora_core::device_from_env().unwrap();
    for folder in families() {
        let decoder = load(&folder, WeightDtype::F32, &device);
        if matches!(decoder.config().rope_scaling, RopeScaling::Dynamic { .. }) {
            continue;
        }
        let ids = ids(&folder, &device);
        let rows = [vec![9, 1, 12], vec![17]];
        let packing = Packing::new(&rows, 24).unwrap();
        let packed = decoder.forward_packed(ids.clone(), &packing);
        for (row, texts) in rows.iter().enumerate() {
            let mut start = 0;
            for &length in texts {
                let range = |ids: Tensor<2, Int>| ids.narrow(0, row, 1).narrow(1, start, length);
                let alone = host(decoder.forward(range(ids.clone())));
                let found = host(packed.clone().narrow(0, row, 1).narrow(1, start, length));
                let apart = largest_difference(&found, &alone);
                assert!(apart <= 2e-6, "{} at {start} of row {row}: {apart:e}", name(&folder));
                start += length;
            }
        }
    }
}

#[test]
fn gradients_of_packed_texts_are_those_of_the_texts() {
    let device = lora_core::device_from_env().unwrap().autodiff();
    let folder = golden("families").join("qwen3");
    let ids = ids(&folder, &device).narrow(0, 0, 1);
    let gradient = |packed: bool| {
        let decoder = load(&folder, WeightDtype::F32, &device);
        let packing = Packing::new(&[vec![10, 14]], 24).unwrap();
        let logits = match packed {
            true => decoder.forward_packed(ids.clone(), &packing),
            false => {
                let part = |start, length| decoder.forward(ids.clone().narrow(1, start, length));
                Tensor::cat(vec![part(0, 10), part(10, 14)], 1)
            }
        };
        let gradients = log_softmax(logits, 2).square().mean().backward();
        let family = decoder.config().family.name;
        let mut named =
            NamedGradients { family, gradients: &gradients, path: vec![], found: vec![] };
        decoder.visit(&mut named);
        named.found
    };
    for ((name, packed), (_, alone)) in gradient(true).into_iter().zip(gradient(false)) {
        let apart = largest_difference(&packed.unwrap(), &alone.unwrap());
        assert!(apart <= 5e-6, "{name}: {apart:e}");
    }
}

#[test]
fn what_is_saved_is_read_again_in_shards_too() {
    if !has(WeightDtype::BF16) {
        return;
    }
    for folder in families() {
        let decoder = load(&folder, WeightDtype::BF16, &lora_core::device_from_env().unwrap());
        let path = folder.join("golden.safetensors");
        let expected = logits(&decoder, &path);
        let temp = tempfile::tempdir().unwrap();
        for (copy, max_shard_bytes) in [("whole", u64::MAX), ("shards", 9000)] {
            let copy = temp.path().join(copy);
            let options = SaveOptions { dtype: WeightDtype::BF16, max_shard_bytes };
            save_folder_with(&decoder, &copy, &options, &[]).unwrap();
            assert_eq!(copy.join("model.safetensors").exists(), max_shard_bytes == u64::MAX);
            assert_eq!(read_config(&copy).unwrap(), *decoder.config(), "{}", name(&folder));
            let again = load(&copy, WeightDtype::BF16, &lora_core::device_from_env().unwrap());
            assert_eq!(logits(&again, &path), expected, "{}", name(&folder));
        }
    }
}

#[test]
fn experts_are_adapted_by_the_same_rules_and_merged() {
    for (case, target) in [("mixtral", "w2"), ("qwen3_moe", "gate_proj")] {
        let folder = golden("families").join(case);
        let device = lora_core::device_from_env().unwrap().autodiff();
        let path = folder.join("golden.safetensors");
        let mut config = LoraConfig::new(2, 4.0);
        config.target_modules = TargetModules::names([target, "gate"]);
        config.init = Init::GaussianA { std: None };
        let (mut model, report) =
            inject(load(&folder, WeightDtype::F32, &device), &config).unwrap();
        let (experts, dense) = match case {
            "mixtral" => (2 * 4, 0),
            _ => (5, 1),
        };
        let routers = if case == "mixtral" { 2 } else { 1 };
        assert_eq!(report.adapted.len(), experts + dense + routers, "{report}");

        // After a step the update is not zero.
        let gradients = loss(&model, ids(&folder, &device)).backward();
        model.visit_lora_mut("", &mut |_, layer| {
            if let Some(adapter) = layer.adapter_mut() {
                let b = adapter.lora_b.val();
                let step = b.grad(&gradients).map(|step| Tensor::from_inner(step).mul_scalar(-3.0));
                let b = step.map_or(b.clone(), |step| b.detach() + step);
                adapter.lora_b = Param::from_tensor(b.detach());
            }
        });
        let before = logits(&load(&folder, WeightDtype::F32, &device), &path);
        let adapted = logits(&model, &path);
        assert!(largest_difference(&adapted, &before) > 1e-3, "{case}: the adapter acts");
        merge(&mut model).unwrap();
        let apart = largest_difference(&logits(&model, &path), &adapted);
        assert!(apart <= 1e-5, "{case}: {apart:e}");
    }
}

/// The base and two adapters, of which one is of DoRA and on few experts only, in one batch.
#[test]
fn a_mixed_batch_has_adapters_on_experts() {
    for case in ["mixtral", "qwen3_moe", "qwen3_moe_all_layers"] {
        let folder = golden("families").join(case);
        let device = lora_core::device_from_env().unwrap();
        let load = || load(&folder, WeightDtype::F32, &device);
        let adapters = |targets, dora| {
            let mut config = LoraConfig::new(3, 5.0);
            config.target_modules = targets;
            config.dora = dora;
            let (mut model, _) = inject(load(), &config).unwrap();
            model.visit_lora_mut("", &mut |_, layer| {
                let Some(adapter) = layer.adapter_mut() else { return };
                for (turn, factor) in
                    [&mut adapter.lora_a, &mut adapter.lora_b].into_iter().enumerate()
                {
                    let [rows, columns] = factor.dims();
                    // The same each time: a near tie between two experts may go either way.
                    let value = |index| ((index * (turn + 12)) as f32 * 1.7).sin() * 0.3;
                    let values: Vec<f32> = (0..rows * columns).map(value).collect();
                    let values = TensorData::new(values, [rows, columns]);
                    *factor = Param::from_tensor(Tensor::from_data(values, &device));
                }
            });
            AdapterSet::of(&model)
        };
        let few = match case {
            "mixtral" => ["1.block_sparse_moe.experts.2.w1", "1.block_sparse_moe.experts.0.w2"],
            _ => ["1.mlp.experts.1.up_proj", "1.mlp.experts.3.down_proj"],
        };
        let mut sets = AdapterSets::new();
        sets.insert("all", adapters(TargetModules::AllLinear, false)).unwrap();
        sets.insert("few", adapters(TargetModules::names(few), true)).unwrap();

        let ids = ids(&folder, &device); // [2, 24]
        let ids = Tensor::cat(vec![ids.clone(), ids.clone().flip([1]), ids], 0).narrow(0, 0, 5);
        let names = [Some("all"), None, Some("few"), Some("all"), Some("few")];
        let mut model = load();
        let mixed = host(sets.mixed(&mut model, &names).unwrap().forward(ids.clone()));
        let each = mixed.len() / names.len();
        for (sample, name) in names.iter().enumerate() {
            match name {
                Some(name) => sets.activate(&mut model, name).unwrap(),
                None => sets.deactivate(&mut model).unwrap(),
            }
            let alone = host(model.forward(ids.clone().narrow(0, sample, 1)));
            let apart = largest_difference(&mixed[sample * each..][..each], &alone);
            assert!(apart <= 2e-6, "{case}, sample {sample}: {apart:e}");
            sets.deactivate(&mut model).unwrap();
            let base = host(model.forward(ids.clone().narrow(0, sample, 1)));
            assert_eq!(largest_difference(&alone, &base) > 1e-4, name.is_some(), "{case} {sample}");
        }
    }
}

fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// The mean cross-entropy of each next token.
fn loss(decoder: &Decoder, ids: Tensor<2, Int>) -> Tensor<1> {
    let [batch, length] = ids.dims();
    let logits = decoder.forward(ids.clone()).narrow(1, 0, length - 1);
    let targets = ids.narrow(1, 1, length - 1).unsqueeze_dim(2);
    let chosen = log_softmax(logits, 2).gather(2, targets);
    chosen.sum().neg() / (batch * (length - 1)) as f64
}

/// Every parameter's gradient under its name in the checkpoint, in the file's layout.
struct NamedGradients<'a> {
    family: &'a str,
    gradients: &'a Gradients,
    path: Vec<String>,
    found: Vec<(String, Option<Vec<f32>>)>,
}

/// The name of the tensor that stands at a path of Rust fields and variants.
fn checkpoint_name(path: &str, family: &str) -> String {
    let path = path.replace(".Dense", "").replace(".gamma", ".weight");
    if family != "mixtral" {
        return path.replace("feed_forward.Experts", "mlp").replace("feed_forward", "mlp");
    }
    [
        ("feed_forward.Experts", "block_sparse_moe"),
        ("gate_proj", "w1"),
        ("up_proj", "w3"),
        ("down_proj", "w2"),
    ]
    .iter()
    .fold(path, |path, (ours, theirs)| path.replace(ours, theirs))
}

impl ModuleVisitor for NamedGradients<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let name = checkpoint_name(&self.path.join("."), self.family);
        let linear = D == 2 && !name.starts_with("model.embed_tokens");
        let gradient = param.val().grad(self.gradients);
        let gradient = if linear { gradient.map(Tensor::transpose) } else { gradient };
        let values = gradient.map(|gradient| gradient.into_data().iter::<f32>().collect());
        self.found.push((name, values));
    }
}

#[test]
fn loss_and_gradients_are_those_of_torch() {
    for folder in families() {
        compare_with_torch(&folder, &lora_core::device_from_env().unwrap().autodiff());
    }
}

/// What a backend computes again anyway, and what Burn does besides, go together.
#[test]
fn with_gradient_checkpointing_they_are_too() {
    for family in ["mistral", "qwen3", "qwen3_moe"] {
        let device = lora_core::device_from_env().unwrap().autodiff().gradient_checkpointing();
        compare_with_torch(&golden("families").join(family), &device);
    }
}

fn compare_with_torch(folder: &Path, device: &Device) {
    let decoder = load(folder, WeightDtype::F32, device);
    let loss = loss(&decoder, ids(folder, device));
    let value: f32 = loss.clone().into_scalar();
    let expected = f32s(folder, "loss")[0];
    let loss_apart = (value - expected).abs() / expected;
    let gradients = loss.backward();

    let mut worst = (0f32, String::new());
    let mut seen = 0;
    let family = decoder.config().family.name;
    let mut named = NamedGradients { family, gradients: &gradients, path: vec![], found: vec![] };
    decoder.visit(&mut named);
    for (name, found) in named.found {
        let expected = f32s(folder, &format!("grad.{name}"));
        let found = found.unwrap_or_else(|| vec![0.0; expected.len()]); // an expert without tokens
        let apart = match expected.iter().all(|value| *value == 0.0) {
            true => found.iter().map(|value| value.abs()).sum(), // NaN too is not 0
            false => largest_difference(&found, &expected),
        };
        if apart > worst.0 || apart.is_nan() {
            worst = (apart, name);
        }
        seen += 1;
    }
    assert_eq!(seen, decoder.config().tensor_shapes().len());
    println!(
        "{:<22} loss {loss_apart:.1e}, {seen} gradients {:.1e} ({})",
        name(folder),
        worst.0,
        worst.1
    );
    assert!(loss_apart <= 1e-5, "{}: {value} for {expected}", name(folder));
    assert!(worst.0 <= 1e-5, "{}: {worst:?}", name(folder));
}

/// Gradients of adapters on every linear layer over frozen weights, by layer and factor.
fn adapter_gradients(folder: &Path, device: &Device) -> Vec<(String, Vec<f32>)> {
    let config = LoraConfig { init: Init::GaussianA { std: None }, ..LoraConfig::new(2, 4.0) };
    let decoder = load(folder, WeightDtype::F32, device);
    let (mut model, _) = inject(decoder, &config).unwrap();
    model.visit_lora_mut("", &mut |_, layer| {
        if let Some(adapter) = layer.adapter_mut() {
            let b = adapter.lora_b.val();
            // Not zero, so that A gets a gradient too.
            adapter.lora_b = Param::from_tensor(b.ones_like().mul_scalar(0.1));
        }
    });
    let gradients = loss(&model, ids(folder, device)).backward();
    let mut found = vec![];
    model.visit_lora("", &mut |path, layer| {
        let Some(adapter) = layer.adapter() else { return };
        for (factor, values) in [("A", &adapter.lora_a), ("B", &adapter.lora_b)] {
            if let Some(gradient) = values.val().grad(&gradients) {
                found.push((format!("{path}.{factor}"), gradient.into_data().iter().collect()));
            }
        }
    });
    found
}

/// Over frozen weights; in the tests above everything trains.
#[test]
fn gradient_checkpointing_changes_no_gradient_of_an_adapter() {
    let device = lora_core::device_from_env().unwrap().autodiff();
    for family in ["mistral", "qwen3"] {
        let folder = golden("families").join(family);
        let plain = adapter_gradients(&folder, &device);
        let again = adapter_gradients(&folder, &device.clone().gradient_checkpointing());
        assert_eq!((plain.len(), again.len()), (28, 28), "{family}"); // 2 blocks of 7 layers
        for ((name, plain), (_, again)) in plain.iter().zip(&again) {
            let apart = largest_difference(again, plain);
            assert!(apart <= 2e-6, "{family} {name}: {apart:e}");
        }
    }
}

/// As often as asked, or until the model's end.
fn greedy(decoder: &Decoder, prompt: &[u32], count: usize) -> Vec<u32> {
    decoder.generate(prompt, count, Sampling::greedy(), |_| {}).unwrap()
}

#[test]
fn prompts_of_unequal_length_are_continued_as_if_alone() {
    for folder in families() {
        let decoder = load(&folder, WeightDtype::F32, &lora_core::device_from_env().unwrap());
        if matches!(decoder.config().rope_scaling, RopeScaling::Dynamic { .. }) {
            continue;
        }
        let ids: Vec<u32> = host(ids(&folder, &lora_core::device_from_env().unwrap()).float())
            .iter()
            .map(|id| *id as u32)
            .collect();
        let prompts = [ids[..9].to_vec(), ids[9..10].to_vec(), ids[10..24].to_vec()];
        let mut told = vec![Vec::new(); 3];
        let together = decoder
            .generate_batch(&prompts, 12, Sampling::greedy(), |row, id| told[row].push(id))
            .unwrap();
        let alone: Vec<Vec<u32>> =
            prompts.iter().map(|prompt| greedy(&decoder, prompt, 12)).collect();
        assert_eq!(together, alone, "{}", name(&folder));
        assert_eq!(told, together);

        let warm = Sampling::default().temperature(1.5).seed(3);
        let first = decoder.generate_batch(&prompts[..2], 8, warm, |_, _| {}).unwrap();
        assert_eq!(first[0], decoder.generate(&prompts[0], 8, warm, |_| {}).unwrap());
    }
}

#[test]
fn a_batch_without_a_prompt_or_with_a_bad_one_is_an_error() {
    let decoder = load(
        &golden("families").join("qwen3"),
        WeightDtype::F32,
        &lora_core::device_from_env().unwrap(),
    );
    for prompts in [vec![], vec![vec![1], vec![]], vec![vec![1], vec![48]], vec![vec![1; 65]]] {
        assert!(decoder.generate_batch(&prompts, 1, Sampling::greedy(), |_, _| {}).is_err());
    }
    // One at its longest writes nothing; the other goes on.
    let rows = decoder.generate_batch(&[vec![1; 64], vec![5]], 3, Sampling::greedy(), |_, _| {});
    let rows = rows.unwrap();
    assert_eq!((rows[0].len(), &rows[1]), (0, &greedy(&decoder, &[5], 3)));
}

#[test]
fn a_cache_of_another_batch_or_model_is_refused() {
    let decoder = load(
        &golden("families").join("qwen3"),
        WeightDtype::F32,
        &lora_core::device_from_env().unwrap(),
    );
    let other = load(
        &golden("families").join("qwen2"),
        WeightDtype::F32,
        &lora_core::device_from_env().unwrap(),
    );
    let mut batch = KvCache::new();
    decoder.hidden_states(decoder.token_tensor(&[1, 2], 2), Some(&mut batch));
    let mut others = KvCache::new();
    other.hidden_states(other.token_tensor(&[1], 1), Some(&mut others));
    let mut caches = vec![batch, others];
    if has(WeightDtype::BF16) {
        let device = lora_core::device_from_env().unwrap();
        let rounded = load(&golden("families").join("qwen3"), WeightDtype::BF16, &device);
        let mut type_of_another = KvCache::new();
        rounded.hidden_states(rounded.token_tensor(&[1], 1), Some(&mut type_of_another));
        caches.push(type_of_another);
    }
    for cache in &mut caches {
        let error = decoder.continuation(&[1, 2], Sampling::greedy(), cache).unwrap_err();
        assert!(error.to_string().contains("of this model"), "{error}");
    }
}

#[test]
fn more_tokens_than_can_be_are_as_many_as_can_be() {
    let decoder = load(
        &golden("families").join("qwen3_tied"),
        WeightDtype::F32,
        &lora_core::device_from_env().unwrap(),
    );
    let prompts = [vec![1; 60], vec![1; 62]];
    let rows = decoder.generate_batch(&prompts, usize::MAX, Sampling::greedy(), |_, _| {}).unwrap();
    assert!(rows[0].len() <= 4 && rows[1].len() <= 2, "{rows:?}");
}

#[test]
fn a_text_may_be_as_long_as_rope_is_stretched() {
    for (case, longest) in [("llama_dynamic", 16), ("llama_linear", 256), ("llama_yarn", 64)] {
        let config = read_config(golden("families").join(case)).unwrap();
        assert_eq!(config.longest_text(), longest, "{case}");
    }
    let decoder = load(
        &golden("families").join("llama_dynamic"),
        WeightDtype::F32,
        &lora_core::device_from_env().unwrap(),
    );
    let prompt: Vec<u32> = (0..10).collect();
    assert!(greedy(&decoder, &prompt, 100).len() <= 6);
}

/// A tied config beside a head that is another, as transformers 5 reads it.
#[test]
fn a_head_of_its_own_is_not_lost_to_a_tied_config() {
    let device = lora_core::device_from_env().unwrap();
    let folder = golden("families").join("qwen3");
    let path = folder.join("golden.safetensors");
    let untied = read_config(&folder).unwrap();
    let tied = DecoderConfig { tie_word_embeddings: true, ..untied.clone() };
    let weights = open_weights(&folder).unwrap();
    let decoder = Decoder::from_weights(&tied, &*weights, &device).unwrap();
    assert_eq!(*decoder.config(), untied);
    assert!(difference(&logits(&decoder, &path), &path) <= 1e-5);
}

#[test]
fn a_continuation_goes_on_where_a_cache_has_been() {
    let decoder = load(
        &golden("families").join("mistral"),
        WeightDtype::F32,
        &lora_core::device_from_env().unwrap(),
    );
    let prompt = [3, 14, 15, 9, 26];
    let expected = greedy(&decoder, &prompt, 10);
    let mut cache = KvCache::new();
    let written = |prompt: &[u32], count, cache: &mut KvCache| -> Vec<u32> {
        let tokens = decoder.continuation(prompt, Sampling::greedy(), cache).unwrap();
        tokens.take(count).collect::<Result<_, _>>().unwrap()
    };
    assert_eq!(written(&prompt, 4, &mut cache), expected[..4]);
    assert_eq!(cache.seen(), 8, "the newest token is not computed before it is needed");
    let longer = [&prompt[..], &expected[..4]].concat();
    assert_eq!(written(&longer, 6, &mut cache), expected[4..]);
    // Another turn from the middle.
    cache.truncate(5);
    assert_eq!(written(&longer, 6, &mut cache), expected[4..]);
    assert!(decoder.continuation(&prompt, Sampling::greedy(), &mut cache).is_err());
}

#[test]
fn a_long_prompt_is_read_in_pieces() {
    let folder = golden("families").join("qwen2");
    let decoder = load(&folder, WeightDtype::F32, &lora_core::device_from_env().unwrap());
    let mut config = decoder.config().clone();
    config.max_position_embeddings = 2000;
    let weights = open_weights(&folder).unwrap();
    let decoder =
        Decoder::from_weights(&config, &*weights, &lora_core::device_from_env().unwrap()).unwrap();
    let prompt: Vec<u32> = (0..1300).map(|token| token * 7 % 48).collect();
    let ids: Vec<i32> = prompt.iter().map(|id| *id as i32).collect();
    let logits = host(decoder.forward(decoder.token_tensor(&ids, 1)));
    let last = &logits[logits.len() - 48..];
    let best = (0..48).max_by(|a, b| last[*a].total_cmp(&last[*b])).unwrap() as u32;
    assert_eq!(greedy(&decoder, &prompt, 1), [best]);
}
