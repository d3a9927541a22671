//! This project's part of each job, in a process of its own.

use std::ops::Range;
use std::path::Path;
use std::time::Instant;

use burn::module::{Module, Param};
use burn::nn::LinearConfig;
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{DType, Device, Tensor, TensorData};
use lora_core::{FrozenLinear, LoraLinear, load_adapter, merge};
use lora_models::{Decoder, KvCache, WeightDtype, open_weights, read_config};
use lora_train::{Batch, batch_loss};

use crate::Answer;
use crate::next_token::next_token;
use crate::workload::{Job, Measured, batch_ids};

pub fn work(job: &Job) -> Answer<Measured> {
    let device = lora_core::device_from_env()?;
    let mut measured = Measured { start_bytes: resident("VmRSS")?, ..Measured::default() };
    match job {
        Job::Train { model, adapter, rows, length, steps, dtype, .. } => {
            let decoder = decoder(model, dtype, &device.clone().autodiff())?;
            let (decoder, _) = load_adapter(decoder, adapter)?;
            train(decoder, [*rows, *length, *steps], &mut measured)?;
        }
        Job::Linear { layer, d, rows, rank, rounds } => {
            linear(layer, [*d, *rows, *rank, *rounds], &device.autodiff(), &mut measured)?;
        }
        Job::Decode { model, adapter, merged, dtype, prompt, written } => {
            let mut decoder = load_adapter(decoder(model, dtype, &device)?, adapter)?.0;
            if *merged {
                merge(&mut decoder)?;
            }
            decode(&decoder.valid(), *prompt, *written, &mut measured)?;
        }
        Job::Load { model, dtype, rounds } => {
            repeat(*rounds, &mut measured, || {
                let start = Instant::now();
                let decoder = decoder(model, dtype, &device)?;
                device.sync()?;
                Ok((start.elapsed().as_secs_f64(), decoder))
            })?;
        }
        Job::Merge { model, adapter, rounds } => {
            repeat(*rounds, &mut measured, || {
                let mut decoder = load_adapter(decoder(model, "f32", &device)?, adapter)?.0;
                let start = Instant::now();
                merge(&mut decoder)?;
                device.sync()?;
                Ok((start.elapsed().as_secs_f64(), decoder))
            })?;
            let before = of_a_weight(&decoder(model, "f32", &device)?)?;
            if (measured.losses[0] / before - 1.0).abs() < 1e-3 {
                return Err("merging changed nothing".into());
            }
        }
    }
    if measured.peak_bytes == 0.0 {
        measured.peak_bytes = resident("VmHWM")?;
    }
    let device = lora_core::device_name_from_env();
    let threads = std::env::var("RAYON_NUM_THREADS").unwrap_or_else(|_| "all".to_owned());
    let version = env!("CARGO_PKG_VERSION");
    measured.versions =
        format!("this project {version} on Burn 0.22.1, {threads} threads on {device}");
    Ok(measured)
}

/// Does a job once, and again `rounds` times, without what the time before made; then compares the last.
fn repeat(
    rounds: usize,
    measured: &mut Measured,
    once: impl Fn() -> Answer<(f64, Decoder)>,
) -> Answer<()> {
    let (seconds, mut made) = once()?;
    measured.first_seconds.push(seconds);
    for _ in 0..rounds {
        drop(made);
        let seconds;
        (seconds, made) = once()?;
        measured.seconds.push(seconds);
    }
    measured.peak_bytes = resident("VmHWM")?; // the rest is for the comparison
    measured.losses.push(of_a_weight(&made)?);
    Ok(())
}

/// The mean square of a weight that has an adapter.
fn of_a_weight(decoder: &Decoder) -> Answer<f64> {
    let name = "model.layers.0.self_attn.q_proj.weight";
    let found = decoder.named_tensors().find(|(found, _)| found == name);
    let (_, weight) = found.ok_or_else(|| format!("no {name}"))?;
    Ok(mean_square(weight.values.to_f32().into_iter().map(f64::from)))
}

fn decoder(folder: &str, dtype: &str, device: &Device) -> Answer<Decoder> {
    let folder = Path::new(folder);
    let dtype: WeightDtype = dtype.parse()?;
    let weights = open_weights(folder)?;
    Ok(Decoder::from_weights_as(&read_config(folder)?, &*weights, dtype, device)?)
}

fn train(
    mut decoder: Decoder,
    [rows, length, steps]: [usize; 3],
    measured: &mut Measured,
) -> Answer<()> {
    let device = decoder.device();
    let mut optimizer = AdamWConfig::new().with_epsilon(1e-8).with_weight_decay(0.0).init();
    for step in 0..=steps {
        let texts = batch_ids(0, rows, length, decoder.config().vocab_size);
        let of = |range: Range<usize>| -> Vec<i32> {
            texts.iter().flat_map(|ids| &ids[range.clone()]).map(|id| *id as i32).collect()
        };
        let batch = Batch {
            ids: of(0..length),
            rows,
            length,
            positions: (0..rows * length).map(|position| position as i32).collect(),
            targets: of(1..length + 1),
            tokens: rows * length,
        };
        let start = Instant::now();
        let loss = batch_loss(&decoder, &batch);
        let value = loss.clone().into_scalar::<f32>(); // waits for the device
        let forward = start.elapsed().as_secs_f64();
        let start = Instant::now();
        let gradients = GradientsParams::from_grads(loss.backward(), &decoder);
        device.sync()?;
        let backward = start.elapsed().as_secs_f64();
        let start = Instant::now();
        decoder = optimizer.step(1e-3, decoder, gradients);
        device.sync()?;
        let update = start.elapsed().as_secs_f64();
        measured.losses.push(value.into());
        if step > 0 {
            measured.forward.push(forward);
            measured.backward.push(backward);
            measured.optimizer.push(update);
        }
    }
    Ok(())
}

fn linear(
    layer: &str,
    [d, rows, rank, rounds]: [usize; 4],
    device: &Device,
    measured: &mut Measured,
) -> Answer<()> {
    let numbers = |shape, seed| numbers(shape, seed, device);
    let mut base = LinearConfig::new(d, d).with_bias(false).init(device);
    base.weight = Param::from_tensor(numbers([d, d], 1) / (d as f64).sqrt());
    let mut lora = LoraLinear::wrap(base.clone(), rank, 2.0 * rank as f64)?;
    let adapter = lora.adapter_mut();
    adapter.lora_a = Param::from_tensor(numbers([d, rank], 2) / (d as f64).sqrt());
    adapter.lora_b = Param::from_tensor(numbers([rank, d], 3) / (rank as f64).sqrt());
    let mut trained = vec![adapter.lora_a.val(), adapter.lora_b.val()];
    let forward: Box<dyn Fn(Tensor<2>) -> Tensor<2>> = match layer {
        "frozen" => {
            trained.clear();
            let layer = FrozenLinear::new(base);
            Box::new(move |x| layer.forward(x))
        }
        "lora" => Box::new(move |x| lora.forward(x)),
        "burn" => {
            let layer = lora.into_burn()?;
            Box::new(move |x| layer.forward(x))
        }
        other => return Err(format!("no layer '{other}'").into()),
    };
    let x = numbers([rows, d], 4).require_grad();
    trained.insert(0, x.clone());
    std::fs::write("/proc/self/clear_refs", "5")?; // VmHWM begins here: making the numbers does not count
    for round in 0..=rounds {
        let start = Instant::now();
        let y = forward(x.clone());
        device.sync()?;
        let to_y = start.elapsed().as_secs_f64();
        let gradients = y.clone().sum().backward();
        device.sync()?;
        let all = start.elapsed().as_secs_f64();
        if round == 0 {
            measured.peak_bytes = resident("VmHWM")?; // the rest is for the comparison
            measured.losses.push(mean_square(y.into_data().iter()));
            for leaf in &trained {
                let gradient = leaf.grad(&gradients).ok_or("no gradient")?;
                measured.losses.push(mean_square(gradient.into_data().iter()));
            }
        }
        drop(gradients);
        if round > 0 {
            measured.forward.push(to_y);
            measured.backward.push(all - to_y);
            measured.seconds.push(all);
        }
    }
    Ok(())
}

/// Numbers from -1 to 1 that are the same in every program.
pub fn numbers([rows, columns]: [usize; 2], seed: u64, device: &Device) -> Tensor<2> {
    let number = |i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.0 - 1.0;
    let values: Vec<f32> = (0..(rows * columns) as u64).map(number).collect();
    Tensor::from_data(TensorData::new(values, [rows, columns]), device)
}

fn mean_square(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) =
        values.fold((0.0, 0), |(sum, count), value| (sum + value * value, count + 1));
    sum / f64::from(count)
}

fn decode(decoder: &Decoder, prompt: usize, written: usize, measured: &mut Measured) -> Answer<()> {
    let vocab_size = decoder.config().vocab_size;
    let ids = &batch_ids(0, 1, prompt - 1, vocab_size)[0];
    let ids: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
    for round in 0..3 {
        let mut cache = KvCache::with_capacity(prompt + written);
        let start = Instant::now();
        let mut token = next_token(decoder, &ids, &mut cache);
        let read = start.elapsed().as_secs_f64();
        let mut tokens = vec![i64::from(token)];
        let start = Instant::now();
        for _ in 0..written {
            token = next_token(decoder, &[token], &mut cache);
            tokens.push(token.into());
        }
        if round > 0 {
            measured.prompt_seconds.push(read);
            measured.seconds.push(start.elapsed().as_secs_f64());
        }
        measured.tokens = tokens;
    }
    measured.peak_bytes = resident("VmHWM")?; // the rest is for the comparison
    let hidden = decoder.hidden_states(decoder.token_tensor(&ids, 1), None);
    let [_, length, width] = hidden.dims();
    let logits = decoder.logits(hidden.narrow(1, length - 1, 1).reshape([1, width]));
    measured.losses.push(mean_square(logits.cast(DType::F32).into_data().iter()));
    Ok(())
}

/// Bytes of this process: `VmRSS` now, `VmHWM` at most. Linux only.
fn resident(field: &str) -> Answer<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with(field)).ok_or("no such field")?;
    let kib = line.split_whitespace().nth(1).ok_or("no number")?;
    Ok(kib.parse::<f64>()? * 1024.0)
}
