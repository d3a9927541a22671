//! What is measured: shapes, seeds and batches, the same for every program.

use std::path::Path;

use lora_models::{AttentionBias, DecoderConfig, read_config};
use serde::{Deserialize, Serialize};

/// The rank and alpha of every adapter here.
pub const RANK: usize = 8;
pub const ALPHA: f64 = 16.0;

/// A decoder's shape and the batch it trains on.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub name: &'static str,
    pub what: &'static str,
    hidden_size: usize,
    intermediate_size: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    vocab_size: usize,
    qwen: bool,
    tied: bool,
    pub rows: usize,
    pub length: usize,
    pub steps: usize,
}

pub const SHAPES: [Shape; 3] = [
    Shape {
        name: "S",
        what: "512 wide, 8 layers",
        hidden_size: 512,
        intermediate_size: 1376,
        layers: 8,
        heads: 8,
        kv_heads: 4,
        vocab_size: 8192,
        qwen: false,
        tied: false,
        rows: 4,
        length: 256,
        steps: 4,
    },
    Shape {
        name: "M",
        what: "SmolLM2-135M's shape",
        hidden_size: 576,
        intermediate_size: 1536,
        layers: 30,
        heads: 9,
        kv_heads: 3,
        vocab_size: 49152,
        qwen: false,
        tied: true,
        rows: 4,
        length: 256,
        steps: 3,
    },
    Shape {
        name: "L",
        what: "Qwen2.5-0.5B's shape",
        hidden_size: 896,
        intermediate_size: 4864,
        layers: 24,
        heads: 14,
        kv_heads: 2,
        vocab_size: 151_936,
        qwen: true,
        tied: true,
        rows: 1,
        length: 256,
        steps: 3,
    },
];

impl Shape {
    pub fn named(name: &str) -> Option<Self> {
        SHAPES.into_iter().find(|shape| shape.name == name)
    }

    /// The decoder's configuration, from one of the repository's for what the shape does not say.
    pub fn config(&self, root: &Path) -> lora_models::Result<DecoderConfig> {
        let family = if self.qwen { "families/qwen2" } else { "tiny_llama" };
        let base = read_config(root.join("tests/golden").join(family))?;
        Ok(DecoderConfig {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_hidden_layers: self.layers,
            num_attention_heads: self.heads,
            num_key_value_heads: self.kv_heads,
            head_dim: self.hidden_size / self.heads,
            max_position_embeddings: 2048,
            attention_bias: match self.qwen {
                true => AttentionBias::QueryKeyValue,
                false => AttentionBias::None,
            },
            sliding_window: None,
            tie_word_embeddings: self.tied,
            eos_token_ids: vec![2],
            ..base
        })
    }

    pub fn tokens(&self) -> usize {
        self.rows * self.length
    }
}

/// The tokens of a batch, `rows` times `length` + 1: all but the last are read, all but the first are
/// to be predicted. Training has the batch of step 0 in every step, so that its loss falls, and a program that trained
/// something else would show. `peer.py` has the same formula.
pub fn batch_ids(step: usize, rows: usize, length: usize, vocab_size: usize) -> Vec<Vec<u32>> {
    let id = |row, place| (7919 * (row * 1009 + place * place + 31 * step + 1)) % vocab_size;
    (0..rows).map(|row| (0..=length).map(|place| id(row, place) as u32).collect()).collect()
}

/// One program's work in one process. `peer.py` reads the same words.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Job {
    /// Training steps of a decoder, the first of them not timed.
    Train {
        model: String,
        adapter: String,
        rows: usize,
        length: usize,
        steps: usize,
        dtype: String,
        medium: bool,
        checkpointing: bool,
    },
    /// Forward and backward of one linear layer `[512, d]` to d.
    Linear { layer: String, d: usize, rows: usize, rank: usize, rounds: usize },
    /// Reading a prompt and writing after it.
    Decode {
        model: String,
        adapter: String,
        merged: bool,
        dtype: String,
        prompt: usize,
        written: usize,
    },
    /// From a folder into memory, and again `rounds` times.
    Load { model: String, dtype: String, rounds: usize },
    /// An adapter into a model in memory, and again `rounds` times.
    Merge { model: String, adapter: String, rounds: usize },
}

/// What a process measured, in seconds and bytes.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Measured {
    /// Of each timed step.
    pub forward: Vec<f64>,
    pub backward: Vec<f64>,
    pub optimizer: Vec<f64>,
    /// Of each step, the first included.
    pub losses: Vec<f64>,
    /// Of a job without steps: each round's time.
    pub seconds: Vec<f64>,
    /// The first time in each process, of `Job::Load` and `Job::Merge`.
    pub first_seconds: Vec<f64>,
    /// Reading a prompt, of `Job::Decode`.
    pub prompt_seconds: Vec<f64>,
    /// The most that was held.
    pub peak_bytes: f64,
    /// What was held before the work: of Python, its imports.
    pub start_bytes: f64,
    /// Program and versions.
    pub versions: String,
    /// What was written, of `Job::Decode`.
    pub tokens: Vec<i64>,
}
