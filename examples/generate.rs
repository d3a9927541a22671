//! Ask a model a question, with or without an adapter.
//!
//! `cargo run --release --example generate -- --model MODEL "What is the capital of France?"`

use std::io::{Write, stdout};
use std::process::ExitCode;

use burn_lora::{DeviceOption, ModelOptions, Result, say};
use clap::Parser;
use lora_core::merge;
use lora_models::{Checkpoint, GenerationConfig, Message, Sampling};

/// Ask a model a question.
///
/// The answer is written as the model's makers recommend it in its generation_config.json, which a line on
/// standard error shows; where they say nothing, the most likely token is taken always. An option
/// replaces the recommended value of the same name.
#[derive(Debug, Parser)]
#[command(allow_negative_numbers = true)]
struct Options {
    /// The question; a model with a chat template gets it as a user's turn
    question: String,
    #[command(flatten)]
    model: ModelOptions,
    /// Longest answer [default: as recommended, else 128]
    #[arg(long, value_name = "TOKENS")]
    max_new_tokens: Option<usize>,
    /// Draw each token from softmax(logits / NUMBER): below 1 is safer, above 1 wilder, and 0 takes the
    /// most likely token always [default: as recommended, else 0, or 1 with one of the next three options]
    #[arg(long, value_name = "NUMBER")]
    temperature: Option<f64>,
    /// Draw from the so many most likely tokens only; 0 is all [default: as recommended, else all]
    #[arg(long, value_name = "NUMBER")]
    top_k: Option<usize>,
    /// Draw from the most likely tokens that together have this probability, 0 to 1 [default: as
    /// recommended, else 1]
    #[arg(long, value_name = "NUMBER")]
    top_p: Option<f64>,
    /// Draw from the tokens that are at least so many times as likely as the most likely one, 0 to 1
    /// [default: as recommended, else 0]
    #[arg(long, value_name = "NUMBER")]
    min_p: Option<f64>,
    /// Divide the positive logits of all tokens so far by this, and multiply the negative ones: above 1
    /// repeats less, 0.01 to 100 [default: as recommended, else 1]
    #[arg(long, value_name = "NUMBER")]
    repetition_penalty: Option<f64>,
    /// Seed of the draws: the same seed gives the same answer
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    device: DeviceOption,
}

impl Options {
    /// The options over the recommended settings.
    fn sampling(&self, recommended: Sampling) -> Sampling {
        let mut sampling = recommended.seed(self.seed);
        if let Some(temperature) = self.temperature {
            sampling = sampling.temperature(temperature);
        }
        if let Some(top_k) = self.top_k {
            sampling = sampling.top_k(top_k);
        }
        if let Some(top_p) = self.top_p {
            sampling = sampling.top_p(top_p);
        }
        if let Some(min_p) = self.min_p {
            sampling = sampling.min_p(min_p);
        }
        if let Some(penalty) = self.repetition_penalty {
            sampling = sampling.repetition_penalty(penalty);
        }
        sampling
    }
}

fn main() -> ExitCode {
    burn_lora::run(|| generate(&Options::parse()))
}

fn generate(options: &Options) -> Result<()> {
    // Before a model is fetched for them.
    options.sampling(Sampling::greedy()).check()?;
    let device = options.device.open()?;
    let path = options.model.path()?;
    let checkpoint = Checkpoint::open(&path)?;
    let recommended = GenerationConfig::read(&path)?;
    let sampling = options.sampling(recommended.sampling());
    let max_new_tokens = options.max_new_tokens.or(recommended.max_new_tokens).unwrap_or(128);
    if recommended != GenerationConfig::default() {
        eprintln!("sampling: {sampling}, at most {max_new_tokens} tokens");
    }

    let mut decoder = checkpoint.decoder(&device)?;
    if let Some(adapted) = options.model.adapted(decoder.clone())? {
        decoder = adapted;
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
    burn_lora::tell_of_kernels(&device);
    // A closed pipe is no reason to stop.
    let show = |text: String| {
        let _ = write!(stdout(), "{text}").and_then(|()| stdout().flush());
    };
    let mut stream = tokenizer.stream()?;
    let mut refused = None;
    decoder.generate(&prompt, max_new_tokens, sampling, |id| match stream.push(id) {
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
