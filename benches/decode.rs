//! Tokens per second of a real model: reading a prompt, and writing after it.
//!
//! ```text
//! cargo bench --bench decode -- models/SmolLM2-135M-Instruct.Q4_1.gguf
//! ```
//!
//! Each line is one way of holding the model: merged (no adapter beside the weights) or with a live
//! adapter of rank 8 on every linear layer, in f32 or in bf16. `scripts/decode_baseline.py` is the same
//! for transformers and PEFT. Without a model there is nothing to measure, and the program says so.

#[path = "next_token/mod.rs"]
mod next_token;

use std::time::Instant;

use burn::module::Module;
use burn::tensor::Device;
use lora_core::{Init, LoraConfig, inject};
use lora_models::{Checkpoint, Decoder, KvCache, WeightDtype};
use next_token::next_token;

const PROMPT: usize = 256;
const WRITTEN: usize = 128;
const ROUNDS: usize = 3;

fn main() {
    // Cargo's own arguments begin with dashes.
    let Some(path) = std::env::args().skip(1).find(|argument| !argument.starts_with('-')) else {
        println!(
            "decode: expected a model's folder or GGUF file, found none; nothing was measured"
        );
        return;
    };
    if let Err(error) = measure(&path) {
        eprintln!("decode: {error}");
        std::process::exit(1);
    }
}

fn measure(path: &str) -> Result<(), Box<dyn std::error::Error>> {
    let checkpoint = Checkpoint::open(path)?;
    println!("{path}: prompt of {PROMPT} tokens, {WRITTEN} written, best of {ROUNDS}\n");
    println!("{:<14}{:>16}{:>16}", "", "prompt tokens/s", "decode tokens/s");
    for (name, dtype) in [("f32", WeightDtype::F32), ("bf16", WeightDtype::BF16)] {
        let merged = checkpoint.decoder_as(dtype, &Device::flex())?;
        report(&format!("{name}, merged"), &merged);
        let mut config = LoraConfig::new(8, 16.0);
        config.init = Init::GaussianA { std: None };
        let (adapted, _) = inject(merged, &config)?;
        report(&format!("{name}, adapter"), &adapted);
    }
    Ok(())
}

fn report(name: &str, decoder: &Decoder) {
    let decoder = decoder.valid();
    let vocabulary = decoder.config().vocab_size as i32;
    let prompt: Vec<i32> = (0..PROMPT as i32).map(|token| token * 37 % vocabulary).collect();
    let (mut read, mut written) = (f64::MAX, f64::MAX);
    for _ in 0..ROUNDS {
        let mut cache = KvCache::with_capacity(PROMPT + WRITTEN);
        let start = Instant::now();
        let mut token = next_token(&decoder, &prompt, &mut cache);
        read = read.min(start.elapsed().as_secs_f64());
        let start = Instant::now();
        for _ in 0..WRITTEN {
            token = next_token(&decoder, &[token], &mut cache);
        }
        written = written.min(start.elapsed().as_secs_f64());
    }
    println!("{name:<14}{:>16.1}{:>16.1}", PROMPT as f64 / read, WRITTEN as f64 / written);
}
