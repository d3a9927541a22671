//! The loop on a tiny random Llama: what moves, what does not, and what the loss counts.

use std::path::Path;

use burn::module::Module;
use burn::optim::{AdamWConfig, GradientsParams};
use lora_core::{Init, LoraConfig, VisitLora, inject, merge};
use lora_models::{Decoder, SafetensorsFile, read_config};
use lora_train::{
    Batch, Batches, ErrorKind, Sample, Schedule, SplitData, StepReport, TrainConfig, batch_loss,
    evaluate, train,
};

fn decoder() -> Decoder {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny_llama");
    let weights = SafetensorsFile::open(folder.join("model.safetensors")).unwrap();
    let device = lora_core::device_from_env().unwrap().autodiff();
    Decoder::from_weights(&read_config(&folder).unwrap(), &weights, &device).unwrap()
}

/// Rows of different lengths that count upwards; the last half of each is trained.
fn data() -> SplitData {
    let sample = |start: u32| {
        let length = 6 + start % 5;
        let ids: Vec<u32> = (0..length).map(|index| (start + index) % 100).collect();
        let trained = (0..length).map(|index| index >= length / 2).collect();
        Sample { ids, trained, truncated: false }
    };
    SplitData {
        train: (0..24).map(sample).collect(),
        held_out: (30..37).map(sample).collect(),
        held_out_rows: (0..7).collect(),
        truncated: 0,
        skipped: 0,
    }
}

fn config() -> TrainConfig {
    TrainConfig {
        steps: 12,
        batch: 4,
        learning_rate: 5e-3,
        schedule: Schedule::Constant,
        warmup: 0,
        lora_plus_ratio: 1.0,
        weight_decay: 0.0,
        eval_every: 5,
        seed: 3,
    }
}

fn run(model: Decoder, config: &TrainConfig) -> lora_train::Result<(Decoder, Vec<StepReport>)> {
    let mut reports = Vec::new();
    let model = train(model, &data(), config, |report| {
        reports.push(*report);
        Ok(())
    })?;
    Ok((model, reports))
}

fn adapted() -> Decoder {
    inject(decoder(), &LoraConfig::new(4, 8.0)).unwrap().0
}

#[test]
fn adapters_learn_and_the_model_stays_as_it_was() {
    let model = adapted();
    let before = evaluate(&model.valid(), &data().held_out, 4).unwrap();
    let (model, reports) = run(model, &config()).unwrap();

    let losses: Vec<Option<f64>> = reports.iter().map(|report| report.held_out_loss).collect();
    let measured: Vec<usize> = (1..=12).filter(|step| losses[step - 1].is_some()).collect();
    assert_eq!(measured, [5, 10, 12]);
    let after = losses[11].unwrap();
    assert!(after < before - 0.5, "held-out loss {before} before, {after} after");
    assert_eq!(after, evaluate(&model.valid(), &data().held_out, 4).unwrap());

    let original = decoder();
    for ((name, tensor), (_, expected)) in model.named_tensors().zip(original.named_tensors()) {
        assert!(tensor == expected, "{name} has moved");
    }
    let largest = |tensor: burn::tensor::Tensor<2>| tensor.abs().max().into_scalar::<f32>();
    model.visit_lora("", &mut |path, layer| {
        if let Some(adapter) = layer.adapter() {
            assert!(largest(adapter.lora_a.val()) > 1e-4, "A of {path} has not moved");
        }
    });
}

#[test]
fn the_same_settings_give_the_same_steps_and_another_seed_does_not() {
    let losses = |config: &TrainConfig| -> Vec<f64> {
        let (_, reports) = run(adapted(), config).unwrap();
        reports.iter().map(|report| report.loss).collect()
    };
    assert_eq!(losses(&config()), losses(&config()));
    assert_ne!(losses(&config()), losses(&TrainConfig { seed: 4, ..config() }));
}

/// A or B of every adapter, one after the other.
fn factors(model: &Decoder, of_b: bool) -> Vec<f32> {
    let mut values = Vec::new();
    model.visit_lora("", &mut |_, layer| {
        if let Some(adapter) = layer.adapter() {
            let factor = if of_b { &adapter.lora_b } else { &adapter.lora_a };
            values.extend(factor.val().into_data().iter::<f32>());
        }
    });
    values
}

#[test]
fn without_a_ratio_the_steps_are_those_of_a_loop_with_one_rate() {
    let config = TrainConfig { steps: 4, weight_decay: 0.01, ..config() };
    let (model, reports) = run(adapted(), &config).unwrap();

    let data = data();
    let mut plain = adapted();
    let mut optimizer =
        AdamWConfig::new().with_epsilon(1e-8).with_weight_decay(config.weight_decay as f32).init();
    let mut batches = Batches::new(data.train.len(), config.batch, config.seed).unwrap();
    for report in &reports {
        let samples: Vec<&Sample> =
            batches.next().unwrap().into_iter().map(|index| &data.train[index]).collect();
        let loss = batch_loss(&plain, &Batch::collate(&samples, 0));
        assert_eq!(f64::from(loss.clone().into_scalar::<f32>()), report.loss);
        let gradients = GradientsParams::from_grads(loss.backward(), &plain);
        plain = optimizer.step(config.learning_rate, plain, gradients);
    }
    for of_b in [false, true] {
        assert_eq!(factors(&model, of_b), factors(&plain, of_b));
    }
}

#[test]
fn with_a_ratio_the_first_step_of_b_is_so_many_times_as_large() {
    // B starts at zero and A does not: B has a gradient in the first step.
    let start = || {
        let config = LoraConfig { init: Init::KaimingUniformA, ..LoraConfig::new(4, 8.0) };
        inject(decoder(), &config).unwrap().0
    };
    let step = |lora_plus_ratio| {
        let config = TrainConfig { steps: 1, lora_plus_ratio, ..config() };
        let (model, reports) = run(start(), &config).unwrap();
        assert_eq!(reports[0].learning_rate, config.learning_rate);
        (factors(&model, false), factors(&model, true))
    };
    let (a, b) = step(1.0);
    let largest = b.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    assert!(largest > 4e-3, "a first step of AdamW is the learning rate: {largest}");
    for ratio in [16.0, 5.0, 0.3] {
        let (same, scaled) = step(ratio);
        assert_eq!(same, a, "A is left alone at {ratio}");
        for (scaled, b) in scaled.iter().zip(&b) {
            let expected = *b * ratio as f32;
            assert!((scaled - expected).abs() <= 1e-6 * expected.abs(), "{scaled} {expected}");
        }
    }
}

#[test]
fn without_adapters_every_weight_trains() {
    let (model, _) = run(decoder(), &config()).unwrap();
    let original = decoder();
    for ((name, tensor), (_, before)) in model.named_tensors().zip(original.named_tensors()) {
        assert!(tensor != before, "{name} has not moved");
    }
}

#[test]
fn padding_and_batches_do_not_change_the_loss() {
    let model = adapted().valid();
    let samples = data().train;
    let sum = |samples: &[&Sample]| {
        let batch = Batch::collate(samples, 0);
        let mean = batch_loss(&model, &batch).into_scalar::<f32>();
        (f64::from(mean) * batch.targets.len() as f64, batch.targets.len())
    };
    let alone: Vec<(f64, usize)> = samples.iter().map(|sample| sum(&[sample])).collect();
    let (total, tokens) =
        alone.iter().fold((0.0, 0), |(loss, tokens), one| (loss + one.0, tokens + one.1));
    let (together, same_tokens) = sum(&samples.iter().collect::<Vec<_>>());
    assert_eq!(tokens, same_tokens);
    assert!((total - together).abs() < 1e-4 * total, "{total} {together}");
    for batch in [1, 5, 24] {
        let mean = evaluate(&model, &samples, batch).unwrap();
        assert!((mean - total / tokens as f64).abs() < 1e-5 * mean, "{batch}: {mean}");
    }
}

#[test]
fn the_loss_of_a_batch_is_that_of_the_whole_logits() {
    let model = adapted().valid();
    let sample = &data().train[3];
    let ids: Vec<i32> = sample.ids.iter().map(|id| *id as i32).collect();
    let logits: Vec<f32> =
        model.forward(model.token_tensor(&ids, 1)).into_data().iter::<f32>().collect();
    let vocab = model.config().vocab_size;
    let (mut sum, mut count) = (0.0, 0);
    for t in 1..ids.len() {
        if sample.trained[t] {
            let row = &logits[(t - 1) * vocab..t * vocab];
            let total: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
            sum += total.ln() - f64::from(row[ids[t] as usize]);
            count += 1;
        }
    }
    let expected = sum / f64::from(count);
    let found = evaluate(&model, std::slice::from_ref(sample), 1).unwrap();
    assert!((found - expected).abs() < 1e-5 * expected, "{found} {expected}");
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run() {
    let error = run(adapted(), &TrainConfig { learning_rate: 1e30, ..config() }).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Diverged { step: 2.., .. }), "{error}");
}

#[test]
fn a_merged_model_does_not_train_in_silence() {
    let mut model = adapted();
    merge(&mut model).unwrap();
    let error = run(model, &config()).unwrap_err();
    assert!(error.to_string().contains("trainable"), "{error}");
}

#[test]
fn settings_that_cannot_be_used_are_refused() {
    for (config, name) in [
        (TrainConfig { steps: 0, ..config() }, "steps"),
        (TrainConfig { batch: 0, ..config() }, "batch"),
        (TrainConfig { batch: 25, ..config() }, "batch"),
        (TrainConfig { learning_rate: f64::NAN, ..config() }, "learning rate"),
        (TrainConfig { weight_decay: -1.0, ..config() }, "weight decay"),
        (TrainConfig { lora_plus_ratio: 0.0, ..config() }, "lora_plus_ratio"),
        (TrainConfig { lora_plus_ratio: f64::NAN, ..config() }, "lora_plus_ratio"),
        (TrainConfig { warmup: 13, ..config() }, "warmup"),
    ] {
        let message = run(adapted(), &config).unwrap_err().to_string();
        assert!(message.contains(name), "{name}: {message}");
    }
}
