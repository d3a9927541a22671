//! Ask a model a question, with or without an adapter.
//!
//! `cargo run --release --example generate -- --model FOLDER-OR-GGUF "What is the capital of France?"`

use std::io::{Write, stdout};
use std::path::PathBuf;
use std::process::ExitCode;

use burn_lora::{Result, say};
use clap::Parser;
use lora_core::{LoadOptions, load_adapter_with, merge};
use lora_models::{Checkpoint, Message, Sampling};
use lora_train::device_by_name;

/// Ask a model a question.
#[derive(Debug, Parser)]
#[command(allow_negative_numbers = true)]
struct Options {
    /// The question; a model with a chat template gets it as a user's turn
    question: String,
    /// Model: a Hugging Face folder or a GGUF file [default: the repository's own]
    #[arg(long, value_name = "FOLDER-OR-GGUF")]
    model: Option<PathBuf>,
    /// Adapter: a folder in PEFT's format, such as runs/1/adapter
    #[arg(long, value_name = "FOLDER")]
    adapter: Option<PathBuf>,
    /// Use the adapter though it was made over other weights, such as another quantisation of them
    #[arg(long)]
    any_base: bool,
    /// Longest answer
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    max_new_tokens: usize,
    /// Temperature of sampling; 0 takes the most likely token always
    #[arg(long, value_name = "NUMBER", default_value_t = 0.0)]
    temperature: f64,
    /// Seed of sampling
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    seed: u64,
    /// Device by name, as far as built in: flex, ndarray, tch:cpu, wgpu, ...
    #[arg(long, value_name = "NAME", default_value = "flex")]
    device: String,
}

fn main() -> ExitCode {
    burn_lora::run(|| generate(&Options::parse()))
}

fn generate(options: &Options) -> Result<()> {
    let path = options.model.clone().unwrap_or_else(|| burn_lora::resource("examples/tiny_world"));
    let checkpoint = Checkpoint::open(path)?;
    let mut decoder = checkpoint.decoder(&device_by_name(&options.device)?)?;
    if let Some(folder) = &options.adapter {
        let load = LoadOptions { check_base: !options.any_base, ..LoadOptions::default() };
        (decoder, _) = load_adapter_with(decoder, folder, &load)?;
        merge(&mut decoder)?;
    }

    let tokenizer = &checkpoint.tokenizer;
    let prompt = match tokenizer.has_chat_template() {
        true => tokenizer.encode(&tokenizer.render(&[Message::user(&options.question)], true)?)?,
        false => {
            eprintln!(
                "warning: the model has no chat template; it continues the question as a text"
            );
            tokenizer.encode_whole_text(&options.question)?
        }
    };
    let sampling = match options.temperature {
        0.0 => Sampling::Greedy,
        temperature => Sampling::Temperature { temperature, seed: options.seed },
    };
    // A closed pipe is no reason to stop.
    let show = |text: String| {
        let _ = write!(stdout(), "{text}").and_then(|()| stdout().flush());
    };
    let mut stream = tokenizer.stream()?;
    let mut refused = None;
    decoder.generate(&prompt, options.max_new_tokens, sampling, |id| match stream.push(id) {
        Ok(text) => show(text),
        Err(error) => refused = Some(error),
    })?;
    match refused {
        Some(error) => return Err(error.into()),
        None => show(stream.finish()?),
    }
    say("");
    Ok(())
}
