//! What an adapter costs in memory, and what reading, writing and merging a model does: each in a
//! process of its own.
//!
//! Linux and Flex only: the peak is read from `/proc/self`, and what a device holds is not in it.
#![cfg(all(target_os = "linux", feature = "flex"))]

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;

use burn::module::{Lora, Module};
use burn::nn::{Initializer, LinearConfig};
use burn::tensor::{Device, Distribution, Tensor};
use lora_core::{AdaptableLinear, AdapterInfo, LoraConfig, LoraLinear, TargetModules, inject};
use lora_core::{merge_checkpoint, save_adapter};
use lora_models::{
    Decoder, DecoderConfig, RandomWeights, SaveOptions, WeightDtype, open_weights, read_config,
    save_folder_with,
};
use safetensors::tensor::{Dtype, TensorView};

const D: usize = 4096;
const RANK: usize = 16;
const ROWS: usize = 512;
const CASE: &str = "LORA_MEMORY_CASE";

/// Resident memory in MiB: `VmRSS` now, `VmHWM` at most since the last reset.
fn resident(field: &str) -> f64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
}

/// The work of one process; does nothing when the test runner starts it by itself.
#[test]
fn child() {
    let Ok(case) = env::var(CASE) else { return };
    if let Some(folder) = case.strip_prefix("merge ") {
        let folder = Path::new(folder);
        fs::write("/proc/self/clear_refs", "5").unwrap();
        let before = resident("VmRSS");
        let (base, adapter) = (folder.join("base"), folder.join("adapter"));
        merge_checkpoint(base, adapter, folder.join("merged"), &Device::flex()).unwrap();
        println!("peak {}", resident("VmHWM") - before);
        return;
    }
    if let Some(targets) = case.strip_prefix("activations ") {
        println!("peak {}", activations(targets));
        return;
    }
    if let Some(peak) = read_or_write(&case) {
        println!("peak {peak}");
        return;
    }
    let device = Device::flex().autodiff();
    let x = Tensor::<2>::random([ROWS, D], Distribution::Normal(0.0, 1.0), &device).require_grad();
    let base = LinearConfig::new(D, D).with_bias(false).init(&device);
    let _ = base.weight.val();
    let base = base.no_grad();

    let forward: Box<dyn Fn(Tensor<2>) -> Tensor<2>> = match case.as_str() {
        "frozen" => Box::new(move |x| base.forward(x)),
        "lora-core" => {
            let layer = LoraLinear::wrap(base, RANK, 32.0).unwrap();
            Box::new(move |x| layer.forward(x))
        }
        "burn" => {
            let layer = base.apply_lora(Lora::new(RANK, 32.0));
            Box::new(move |x| layer.forward(x))
        }
        other => panic!("{other}"),
    };
    fs::write("/proc/self/clear_refs", "5").unwrap(); // resets VmHWM
    let gradients = forward(x.clone()).sum().backward();
    let dx = x.grad(&gradients).unwrap();
    assert_eq!(dx.dims(), [ROWS, D]);
    println!("peak {}", resident("VmHWM"));
}

fn peak(case: &str) -> f64 {
    let output = Command::new(env::current_exe().unwrap())
        .args(["child", "--exact", "--nocapture"])
        .env(CASE, case)
        // glibc otherwise keeps freed blocks, which would count as used.
        .env("MALLOC_MMAP_THRESHOLD_", "65536")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let peak = text.split("peak ").nth(1).and_then(|rest| rest.split_whitespace().next());
    peak.unwrap_or_else(|| panic!("{case}: {text}")).parse().unwrap()
}

#[test]
fn an_adapter_adds_at_most_8_mb_to_a_frozen_layer() {
    let [frozen, ours, burn] = ["frozen", "lora-core", "burn"].map(peak);
    println!(
        "peak MiB at d = {D}, rank {RANK}, {ROWS} rows: frozen {frozen:.1}, lora-core {ours:.1}, Burn's apply_lora {burn:.1}"
    );
    assert!(ours - frozen <= 8.0, "lora-core {ours:.1} MiB, frozen {frozen:.1} MiB");
    // The yardstick works: a dense update is seen.
    assert!(burn - frozen > 40.0, "Burn's apply_lora {burn:.1} MiB, frozen {frozen:.1} MiB");
}

/// A decoder whose activations are most of what it needs.
const BLOCKS: usize = 8;
const HIDDEN: usize = 256;
const INTERMEDIATE: usize = 1024;
const KEYS: usize = 128; // 2 heads of 64
const BATCH: [usize; 2] = [4, 256];

/// What is held between the passes of a step in which these layers are adapted, in MiB.
fn activations(targets: &str) -> f64 {
    let config = DecoderConfig {
        vocab_size: 64,
        hidden_size: HIDDEN,
        intermediate_size: INTERMEDIATE,
        num_hidden_layers: BLOCKS,
        num_attention_heads: HIDDEN / 64,
        num_key_value_heads: KEYS / 64,
        head_dim: 64,
        sliding_window: None,
        ..read_config(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny_llama"))
            .unwrap()
    };
    let (weights, device) = (RandomWeights::new(&config, 1).unwrap(), Device::flex().autodiff());
    let decoder = Decoder::from_weights_as(&config, &weights, WeightDtype::F32, &device).unwrap();
    let target_modules = TargetModules::names(targets.split(' '));
    let lora = LoraConfig { target_modules, ..LoraConfig::new(4, 8.0) };
    let (decoder, _) = inject(decoder, &lora).unwrap();
    let [rows, length] = BATCH;
    let ids: Vec<i32> = (0..rows * length).map(|at| at as i32 % 64).collect();
    let mut held = 0.0;
    for _ in 0..2 {
        // the first time brings what the program keeps
        let ids = decoder.token_tensor(&ids, rows);
        let before = resident("VmRSS");
        let loss = decoder.forward(ids).mean();
        held = resident("VmRSS") - before;
        drop(loss.backward());
    }
    held
}

/// Of a block: what comes into its norms, q, k, v, gate and up; and what attention gives, where the layer after it is
/// adapted. What the norms and the gate give is computed again.
#[test]
fn a_step_keeps_no_output_of_a_norm_or_a_gate() {
    let least = 2 * HIDDEN + (HIDDEN + 2 * KEYS) + 2 * INTERMEDIATE;
    let all = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj";
    for (targets, each) in [(all, least + HIDDEN), ("q_proj v_proj", least)] {
        let tokens = BATCH[0] * BATCH[1];
        let expected = (BLOCKS * each * tokens * size_of::<f32>()) as f64 / 1024.0 / 1024.0;
        let held = peak(&format!("activations {targets}"));
        println!("{targets}: {held:.1} MiB between the passes, blocks keep {expected:.1}");
        assert!(held <= 1.05 * expected, "{targets}: {held:.1} MiB for {expected:.1} MiB");
        assert!(held >= 0.9 * expected, "{targets}: {held:.1} MiB: what is measured here?");
    }
}

/// A checkpoint of 16 tensors of 16 MiB is merged with a few of them in memory at a time.
#[test]
fn a_checkpoint_is_merged_without_holding_it() {
    const LAYERS: usize = 16;
    const SIZE: usize = 2048;
    let folder = tempfile::tempdir().unwrap();
    let device = Device::flex();
    let zeros = LinearConfig::new(SIZE, SIZE).with_bias(false).with_initializer(Initializer::Zeros);
    let layers: Vec<AdaptableLinear> = (0..LAYERS).map(|_| zeros.init(&device).into()).collect();
    let (model, _) = inject(layers, &LoraConfig::new(4, 8.0)).unwrap();
    save_adapter(&model, folder.path().join("adapter"), &AdapterInfo::default()).unwrap();
    drop(model);
    let bytes = vec![0; SIZE * SIZE * 4];
    let views = (0..LAYERS).map(|layer| {
        let view = TensorView::new(Dtype::F32, vec![SIZE, SIZE], &bytes).unwrap();
        (format!("{layer}.weight"), view)
    });
    fs::create_dir(folder.path().join("base")).unwrap();
    let file = folder.path().join("base/model.safetensors");
    safetensors::serialize_to_file(views, None, &file).unwrap();
    drop(bytes);

    let peak = peak(&format!("merge {}", folder.path().display()));
    let size = (LAYERS * SIZE * SIZE * 4) as f64 / 1024.0 / 1024.0;
    println!("merging {size:.0} MiB: {peak:.1} MiB");
    assert!(peak < 0.5 * size, "{peak:.1} MiB for a checkpoint of {size:.0} MiB");
    let merged = fs::metadata(folder.path().join("merged/model.safetensors")).unwrap();
    assert_eq!(merged.len(), fs::metadata(file).unwrap().len());
}

/// A random decoder's folder of about 8 MiB for each layer in bf16, in shards.
fn big_folder(folder: &Path, layers: usize) -> f64 {
    let config = DecoderConfig {
        vocab_size: 4096,
        hidden_size: 512,
        intermediate_size: 2048,
        num_hidden_layers: layers,
        num_attention_heads: 8,
        num_key_value_heads: 4,
        head_dim: 64,
        sliding_window: None,
        tie_word_embeddings: true,
        ..read_config(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/families/qwen3"))
            .unwrap()
    };
    let weights = RandomWeights::new(&config, 1).unwrap();
    let decoder =
        Decoder::from_weights_as(&config, &weights, WeightDtype::BF16, &Device::flex()).unwrap();
    let options = SaveOptions { dtype: WeightDtype::BF16, max_shard_bytes: 30 << 20 };
    save_folder_with(&decoder, folder, &options, &[]).unwrap();
    let files = fs::read_dir(folder).unwrap().map(|file| file.unwrap().metadata().unwrap().len());
    files.sum::<u64>() as f64 / 1024.0 / 1024.0
}

#[test]
fn a_model_is_read_and_written_without_a_second_copy() {
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("model");
    let size = big_folder(&folder, 7);
    for (case, bound) in [("read bf16", 1.1), ("read f32", 2.1), ("write", 0.25)] {
        let peak = peak(&format!("{case} {}", folder.display()));
        println!("{case}: {peak:.1} MiB for {size:.1} MiB of files");
        assert!(peak <= bound * size, "{case}: {peak:.1} MiB for {size:.1} MiB");
    }
}

/// From 128 MiB of weights on, they are put on large pages.
#[test]
fn a_large_model_is_read_without_a_second_copy() {
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("model");
    let size = big_folder(&folder, 18);
    // With the values of the file.
    let (config, weights) = (read_config(&folder).unwrap(), open_weights(&folder).unwrap());
    let dtype = WeightDtype::BF16;
    let decoder = Decoder::from_weights_as(&config, &*weights, dtype, &Device::flex()).unwrap();
    for (name, tensor) in decoder.named_tensors() {
        assert!(tensor == weights.read_as(&name, dtype).unwrap(), "{name}");
    }
    drop(decoder);
    for (case, bound) in [("read bf16", 1.1), ("read f32", 2.1)] {
        let peak = peak(&format!("{case} {}", folder.display()));
        println!("{case}: {peak:.1} MiB for {size:.1} MiB of files");
        assert!(peak <= bound * size, "{case}: {peak:.1} MiB for {size:.1} MiB");
    }
}

/// The work of a process that reads or writes `folder`, and what it took beyond the start.
fn read_or_write(case: &str) -> Option<f64> {
    let dtype = match case {
        case if case.starts_with("read f32 ") => WeightDtype::F32,
        case if case.starts_with("read bf16 ") || case.starts_with("write ") => WeightDtype::BF16,
        _ => return None,
    };
    let folder = Path::new(case.rsplit_once(' ')?.1);
    let (config, weights) = (read_config(folder).unwrap(), open_weights(folder).unwrap());
    let device = Device::flex();
    let read = || Decoder::from_weights_as(&config, &*weights, dtype, &device).unwrap();
    let kept = case.starts_with("write ").then(read);
    let work = |copy: &str| match &kept {
        None => drop(read()),
        Some(decoder) => {
            let options = SaveOptions { dtype, max_shard_bytes: u64::MAX };
            save_folder_with(decoder, folder.with_extension(copy), &options, &[]).unwrap();
        }
    };
    work("first"); // which also brings the program's own pages in, more of them the more backends it has
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = resident("VmRSS");
    work("second");
    Some(resident("VmHWM") - before)
}
