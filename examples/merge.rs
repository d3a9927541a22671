//! Write a model, with an adapter merged into it or without, as a Hugging Face folder.
//!
//! `cargo run --release --example merge -- --model MODEL --adapter runs/2/adapter --output merged`

use std::path::PathBuf;
use std::process::ExitCode;

use burn_lora::{ModelOptions, Result, say, tell_of_kernels};
use clap::Parser;
use lora_core::merge;
use lora_models::{Checkpoint, SaveOptions, WeightDtype};

/// Write a model, with an adapter merged into it or without, as a Hugging Face folder.
///
/// The folder has the weights, the config, the tokenizer and its chat template. So a GGUF file becomes a
/// model that transformers and others load. Merging is in f32, and each weight is rounded once.
#[derive(Debug, Parser)]
struct Options {
    #[command(flatten)]
    model: ModelOptions,
    /// New folder
    #[arg(long, value_name = "FOLDER")]
    output: PathBuf,
    /// Type of the weights in the folder: f32, bf16, f16
    #[arg(long, value_name = "TYPE", default_value = "bf16")]
    dtype: WeightDtype,
    /// Largest file of weights, in megabytes; a larger model gets several files and an index
    #[arg(long, value_name = "MB", default_value_t = 5000)]
    max_shard: u64,
}

fn main() -> ExitCode {
    burn_lora::run(|| write(&Options::parse()))
}

fn write(options: &Options) -> Result<()> {
    let path = options.model.path()?;
    let checkpoint = Checkpoint::open(&path)?;
    let device = burn_lora::open_device(None)?;
    // Merged in f32.
    let dtype = if options.model.adapter.is_some() { WeightDtype::F32 } else { options.dtype };
    tell_of_kernels(&device);
    let mut decoder = checkpoint.decoder_as(dtype, &device)?;
    if let Some(adapted) = options.model.adapted(decoder.clone())? {
        decoder = adapted;
        say(merge(&mut decoder)?);
    }
    let options_of_files = SaveOptions {
        dtype: options.dtype,
        max_shard_bytes: options.max_shard.saturating_mul(1_000_000),
    };
    checkpoint.save(&decoder, &options.output, &options_of_files)?;
    say(format!("written    {}", options.output.display()));
    Ok(())
}
