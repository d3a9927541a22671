//! Write a model, with an adapter merged into it or without, as a Hugging Face folder.
//!
//! `cargo run --release --example merge -- --model MODEL --adapter runs/2/adapter --output merged`

use std::path::PathBuf;
use std::process::ExitCode;

use burn_lora::{Result, say};
use clap::Parser;
use lora_core::{LoadOptions, load_adapter_with, merge};
use lora_models::{Checkpoint, SaveOptions, WeightDtype};
use lora_train::device_by_name;

/// Write a model, with an adapter merged into it or without, as a Hugging Face folder.
///
/// The folder has the weights, the config, the tokenizer and its chat template. So a GGUF file becomes a
/// model that transformers and others load. Merging is in f32, and each weight is rounded once.
#[derive(Debug, Parser)]
struct Options {
    /// Model: a Hugging Face folder, a GGUF file, or a model of the Hugging Face Hub as owner/name
    /// [default: the repository's own]
    #[arg(long, value_name = "MODEL")]
    model: Option<PathBuf>,
    /// Adapter to merge: a folder in PEFT's format, such as runs/1/adapter
    #[arg(long, value_name = "FOLDER")]
    adapter: Option<PathBuf>,
    /// Use the adapter though it was made over other weights, such as another quantisation or type of them
    #[arg(long)]
    any_base: bool,
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
    let path = match &options.model {
        Some(model) => burn_lora::model_path(model)?,
        None => burn_lora::resource("examples/tiny_world"),
    };
    let checkpoint = Checkpoint::open(&path)?;
    let device = device_by_name("flex")?;
    let decoder = match &options.adapter {
        None => checkpoint.decoder_as(options.dtype, &device)?,
        Some(folder) => {
            let load = LoadOptions { check_base: !options.any_base, ..LoadOptions::default() };
            let (mut decoder, _) = load_adapter_with(checkpoint.decoder(&device)?, folder, &load)?;
            say(merge(&mut decoder)?);
            decoder
        }
    };
    let options_of_files = SaveOptions {
        dtype: options.dtype,
        max_shard_bytes: options.max_shard.saturating_mul(1_000_000),
    };
    checkpoint.save(&decoder, &options.output, &options_of_files)?;
    say(format!("written    {}", options.output.display()));
    Ok(())
}
