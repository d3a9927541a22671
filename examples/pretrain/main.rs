//! Train the repository's own small model from scratch, on text that this program makes.
//!
//! `cargo run --release --example pretrain` writes a Hugging Face folder with the model, its
//! tokenizer, its fine-tuning set and a card that says how it was made. The loop is the one that
//! trains adapters; here every weight trains.

mod world;

use std::path::PathBuf;
use std::process::ExitCode;

use burn::module::Module;
use burn_lora::{DeviceOption, Error, Result};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use lora_core::ParameterCount;
use lora_models::{
    AttentionBias, Decoder, DecoderConfig, FAMILIES, Message, RandomWeights, RopeScaling, Sampling,
    Tokenizer, WeightDtype, save_folder,
};
use lora_train::{Sample, Schedule, SplitData, TrainConfig, evaluate, train};
use rand::SeedableRng;
use rand::rngs::Xoshiro256PlusPlus;
use serde_json::json;
use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, TokenizerBuilder};
use world::Exchange;

/// Train the repository's own small model from scratch.
#[derive(Debug, Parser)]
struct Options {
    /// Folder to write
    #[arg(long, value_name = "FOLDER", default_value = "examples/tiny_world")]
    output: PathBuf,
    /// Optimiser steps
    #[arg(long, value_name = "NUMBER", default_value_t = 3000)]
    steps: usize,
    /// Samples a step, each of several conversations, up to 160 tokens
    #[arg(long, value_name = "ROWS", default_value_t = 16)]
    batch: usize,
    /// Peak learning rate of AdamW
    #[arg(long, value_name = "NUMBER", default_value_t = 3e-3)]
    lr: f64,
    /// Conversations in the corpus
    #[arg(long, value_name = "ROWS", default_value_t = 100_000)]
    corpus: usize,
    /// Seed of text, weights and order
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    device: DeviceOption,
}

const HELD_OUT: usize = 200;
const BLOCK: usize = 160;
const VOCABULARY: usize = 768;
const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
const END_OF_TURN: u32 = 2;

/// ChatML without a system turn.
const CHAT_TEMPLATE: &str = "{% for message in messages %}\
    {{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

fn main() -> ExitCode {
    burn_lora::run(|| pretrain(&Options::parse()))
}

fn pretrain(options: &Options) -> Result<()> {
    if options.output.exists() {
        let path = options.output.display();
        return Err(Error::user(format!(
            "--output: expected a new folder, found {path}; remove it"
        )));
    }
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(options.seed);
    let corpus = world::corpus(&mut rng, options.corpus);
    let adaptation = world::adaptation(&mut rng);
    let vocabulary = train_tokenizer(&corpus)?;
    let tokenizer = Tokenizer::new(
        vocabulary.clone(),
        Some(CHAT_TEMPLATE.to_owned()),
        None,
        Some(SPECIAL[2].to_owned()),
    )?;
    let mut samples = pack(encode(&corpus, &tokenizer)?);
    let held_out = samples.split_off(samples.len().saturating_sub(HELD_OUT));
    let held_out_rows = (samples.len()..samples.len() + held_out.len()).collect();
    let data = SplitData { train: samples, held_out, held_out_rows, truncated: 0, skipped: 0 };

    let config = decoder_config(&tokenizer);
    let device = options.device.open()?.autodiff();
    let decoder =
        Decoder::from_weights(&config, &RandomWeights::new(&config, options.seed)?, &device)?;
    let parameters = ParameterCount::of(&decoder);
    let tokens: usize = data.train.iter().map(|sample| sample.ids.len()).sum();
    println!("{} parameters, {} samples, {tokens} tokens", parameters.total, data.train.len());
    burn_lora::tell_of_kernels(&device);

    let training = TrainConfig {
        steps: options.steps,
        batch: options.batch,
        learning_rate: options.lr,
        schedule: Schedule::Cosine,
        warmup: (options.steps / 50).max(1),
        lora_plus_ratio: 1.0,
        weight_decay: 0.01,
        eval_every: 500,
        seed: options.seed,
    };
    let bar = ProgressBar::new(options.steps as u64);
    let style = ProgressStyle::with_template("{bar:32} {pos}/{len}  {msg}  {eta} left");
    bar.set_style(style.expect("the template is well-formed"));
    let decoder = train(decoder, &data, &training, |step| {
        bar.set_message(format!("loss {:.4}  lr {:.1e}", step.loss, step.learning_rate));
        bar.inc(1);
        if let Some(loss) = step.held_out_loss {
            bar.suspend(|| println!("step {}: held-out loss {loss:.4}", step.step));
        }
        Ok(())
    })?;
    bar.finish();

    let decoder = decoder.valid();
    let loss = evaluate(&decoder, &data.held_out, options.batch)?;
    let texts = [
        ("tokenizer.json", vocabulary.to_string(true).map_err(other)?),
        ("tokenizer_config.json", tokenizer_config()),
        ("pirate.jsonl", world::jsonl(&adaptation)),
        ("README.md", card(options, parameters.total, tokens, loss)),
    ];
    let texts = texts.each_ref().map(|(name, text)| (*name, text.as_bytes()));
    save_folder(&decoder, &options.output, WeightDtype::F16, &texts)?;
    println!("held-out loss {loss:.4} nats per token");
    for prompt in world::held_back_prompts() {
        let text = tokenizer.render(&[Message::user(*prompt)], true)?;
        let ids = decoder.generate(&tokenizer.encode(&text)?, 100, Sampling::greedy(), |_| {})?;
        println!("{prompt} -> {}", tokenizer.decode(&ids)?);
    }
    Ok(())
}

fn decoder_config(tokenizer: &Tokenizer) -> DecoderConfig {
    DecoderConfig {
        family: &FAMILIES[0],
        vocab_size: tokenizer.vocab_size(),
        hidden_size: 96,
        intermediate_size: 256,
        num_hidden_layers: 4,
        num_attention_heads: 6,
        num_key_value_heads: 3,
        head_dim: 16,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        max_position_embeddings: 256,
        attention_bias: AttentionBias::None,
        mlp_bias: false,
        qk_norm: false,
        sliding_window: None,
        experts: None,
        tie_word_embeddings: true,
        initializer_range: 0.02,
        bos_token_id: None,
        eos_token_ids: vec![END_OF_TURN],
    }
}

/// A byte-level BPE vocabulary of the corpus: any text can be written in it.
fn train_tokenizer(corpus: &[Vec<Exchange>]) -> Result<tokenizers::Tokenizer> {
    let byte_level = ByteLevel::new(false, true, true);
    let special = SPECIAL.map(|token| AddedToken::from(token, true)).to_vec();
    let mut trainer = BpeTrainer::builder()
        .vocab_size(VOCABULARY)
        .special_tokens(special.clone())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .show_progress(false)
        .build();
    let mut tokenizer = TokenizerBuilder::<
        BPE,
        tokenizers::NormalizerWrapper,
        _,
        tokenizers::PostProcessorWrapper,
        _,
    >::default()
    .with_model(BPE::default())
    .with_pre_tokenizer(Some(byte_level))
    .with_decoder(Some(ByteLevelDecoder::default()))
    .build()
    .map_err(other)?;
    let texts = corpus.iter().flatten().flat_map(|exchange| [&exchange.user, &exchange.assistant]);
    tokenizer.train(&mut trainer, texts.map(|text| text.as_str())).map_err(other)?;
    tokenizer.add_special_tokens(&special);
    // Through its file form, as every reader will meet it.
    tokenizer.to_string(false).map_err(other)?.parse().map_err(other)
}

/// Puts conversations one after the other into samples of up to [`BLOCK`] tokens, so that little of
/// a batch is padding.
fn pack(conversations: Vec<Sample>) -> Vec<Sample> {
    let mut blocks: Vec<Sample> = Vec::new();
    for conversation in conversations {
        match blocks.last_mut() {
            Some(block) if block.ids.len() + conversation.ids.len() <= BLOCK => {
                block.ids.extend(conversation.ids);
                block.trained.extend(conversation.trained);
            }
            _ => blocks.push(conversation),
        }
    }
    blocks
}

/// Whole conversations, every token of which is trained.
fn encode(corpus: &[Vec<Exchange>], tokenizer: &Tokenizer) -> Result<Vec<Sample>> {
    corpus
        .iter()
        .map(|conversation| {
            let messages: Vec<Message> = conversation
                .iter()
                .flat_map(|exchange| {
                    [Message::user(&exchange.user), Message::assistant(&exchange.assistant)]
                })
                .collect();
            let ids = tokenizer.encode(&tokenizer.render(&messages, false)?)?;
            let trained = vec![true; ids.len()];
            Ok(Sample { ids, trained, truncated: false })
        })
        .collect()
}

fn tokenizer_config() -> String {
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0],
        "chat_template": CHAT_TEMPLATE,
    });
    format!("{config:#}\n")
}

fn card(options: &Options, parameters: usize, tokens: usize, loss: f64) -> String {
    format!(
        "# Tiny World\n\n\
        A Llama of {parameters} parameters that speaks about a small world of twenty-four \
        inhabitants. Text, tokenizer and weights were made by `examples/pretrain`:\n\n\
        ```\n\
        cargo run --release --example pretrain -- --steps {} --batch {} --lr {} --corpus {} --seed {}\n\
        ```\n\n\
        Corpus: {} conversations, {tokens} tokens to train on. Held-out loss after training: {loss:.4} \
        nats per token, over {HELD_OUT} samples from the same generator, which repeats its shorter \
        sentences. Weights are stored as f16.\n\n\
        `pirate.jsonl` is the fine-tuning set of the main job: questions about two thirds of the \
        inhabitants, answered by a pirate.\n",
        options.steps, options.batch, options.lr, options.corpus, options.seed, options.corpus,
    )
}

fn other(error: impl std::fmt::Display) -> Error {
    Error::other(error.to_string())
}
