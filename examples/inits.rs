//! Which starting values? The repository's own model, fine-tuned with each of them at several learning
//! rates and seeds, and the loss on the rows that were held out.
//!
//! `cargo run --release --example inits` prints the tables of the guide. Held-out rows are the same in all
//! runs; a seed gives the order of the data and, where a start is random, its values.

use std::process::ExitCode;

use burn::module::Module;
use burn::tensor::Device;
use burn_lora::{Result, resource, say, tell_of_kernels};
use clap::Parser;
use lora_core::{Init, LoraConfig, inject};
use lora_models::Checkpoint;
use lora_train::{
    ErrorKind, Schedule, SplitData, TrainConfig, evaluate, read_conversations, split, train,
};

/// Compare the starting values of adapters.
#[derive(Debug, Parser)]
struct Options {
    /// Optimiser steps of a run
    #[arg(long, default_value_t = 100)]
    steps: usize,
    /// Seeds for each start and learning rate
    #[arg(long, default_value_t = 5)]
    seeds: u64,
    /// Peak learning rates
    #[arg(long, value_delimiter = ',', default_values_t = [0.001, 0.002, 0.003, 0.01])]
    rates: Vec<f64>,
}

const RANK: usize = 8;
const ALPHA: f64 = 16.0;
const BATCH: usize = 4;

const INITS: [(&str, Init); 7] = [
    ("GaussianB", Init::GaussianB { std: None }),
    ("GaussianA", Init::GaussianA { std: None }),
    ("KaimingUniformA", Init::KaimingUniformA),
    ("Orthogonal", Init::Orthogonal),
    ("Pissa, exact", Init::Pissa { iterations: None }),
    ("Pissa, 4 iterations", Init::Pissa { iterations: Some(4) }),
    ("Olora", Init::Olora),
];

fn main() -> ExitCode {
    burn_lora::run(|| inits(&Options::parse()))
}

fn inits(options: &Options) -> Result<()> {
    let device = lora_core::device_from_env()?.autodiff();
    let checkpoint = Checkpoint::open(resource("examples/tiny_world"))?;
    let path = resource("examples/tiny_world/pirate.jsonl");
    let conversations = read_conversations(&path)?;
    let samples = conversations
        .iter()
        .map(|conversation| conversation.encode(&checkpoint.tokenizer, 256))
        .collect::<lora_train::Result<Vec<_>>>()?;
    let data = split(&path, samples, 32, 0)?;
    tell_of_kernels(&device);
    let before = evaluate(&checkpoint.decoder(&device)?.valid(), &data.held_out, BATCH)?;
    say(format!("Held-out loss before: {before:.4} nats per token."));

    // For each start and rate: the losses of its runs after a quarter of the steps, and after all.
    let mut losses = Vec::new();
    for (name, init) in INITS {
        for rate in &options.rates {
            let mut runs = Vec::new();
            for seed in 0..options.seeds {
                let run = losses_of_run(&checkpoint, &data, &device, init, *rate, seed, options)?;
                eprintln!("{name}, {rate}, seed {seed}: {:.4} {:.4}", run[0], run[1]);
                runs.push(run);
            }
            losses.push(runs);
        }
    }
    for (half, title) in ["a quarter of the steps", "all steps"].into_iter().enumerate() {
        let rates: Vec<String> = options.rates.iter().map(f64::to_string).collect();
        say(format!("\nAfter {title}, by peak learning rate:\n\n| | {} |", rates.join(" | ")));
        say(format!("|---|{}", "---|".repeat(rates.len())));
        for ((name, _), of_init) in INITS.iter().zip(losses.chunks(rates.len())) {
            let cells: Vec<String> = of_init
                .iter()
                .map(|runs| mean(&runs.iter().map(|run| run[half]).collect::<Vec<_>>()))
                .collect();
            say(format!("| {name} | {} |", cells.join(" | ")));
        }
    }
    Ok(())
}

/// The held-out loss after a quarter of the steps, and after all of them.
fn losses_of_run(
    checkpoint: &Checkpoint,
    data: &SplitData,
    device: &Device,
    init: Init,
    learning_rate: f64,
    seed: u64,
    &Options { steps, .. }: &Options,
) -> Result<[f64; 2]> {
    let config = LoraConfig { init, seed, ..LoraConfig::new(RANK, ALPHA) };
    let (model, _) = inject(checkpoint.decoder(device)?, &config)?;
    let training = TrainConfig {
        steps,
        batch: BATCH,
        learning_rate,
        schedule: Schedule::Cosine,
        warmup: steps / 20,
        weight_decay: 0.0,
        eval_every: (steps / 4).max(1),
        lora_plus_ratio: 1.0,
        seed,
    };
    let mut measured = Vec::new();
    let trained = train(model, data, &training, |step| {
        measured.extend(step.held_out_loss);
        Ok(())
    });
    match trained {
        Ok(_) => Ok([measured[0], measured[measured.len() - 1]]),
        Err(error) if matches!(error.kind(), ErrorKind::Diverged { .. }) => Ok([f64::NAN; 2]),
        Err(error) => Err(error.into()),
    }
}

/// `0.6254 ± 0.0120`: the mean and the standard deviation of a sample.
fn mean(values: &[f64]) -> String {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    match values {
        _ if !mean.is_finite() => "diverged".to_owned(),
        [_] => format!("{mean:.4}"),
        _ => format!("{mean:.4} ± {:.4}", (squares / (count - 1.0)).sqrt()),
    }
}
