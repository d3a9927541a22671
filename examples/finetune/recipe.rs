//! The settings of a fine-tuning run: from the command line, a recipe file, or defaults.

use std::path::{Path, PathBuf};

use burn_lora::{Error, Result};
use clap::Parser;
use lora_core::{ExcludeModules, Init, LoraConfig, Scaling, TargetModules};
use lora_models::WeightDtype;
use lora_train::{Schedule, TrainConfig};
use serde::{Deserialize, Serialize};

/// Fine-tune a language model with LoRA.
///
/// Without arguments: the small model that this repository holds learns to talk like a pirate.
///
/// A recipe is a TOML file with these options as keys (`max_len = 512`); its paths are relative to
/// the current folder. `settings.toml` in a run's folder is one. An option on the command line overrides the recipe.
#[derive(Debug, Default, Clone, PartialEq, Parser, Serialize, Deserialize)]
#[command(allow_negative_numbers = true)] // so that the message about them is ours
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Recipe file [default: examples/recipes/tiny_world.toml when there is no --model]
    #[arg(long = "recipe", value_name = "FILE.toml")]
    #[serde(skip)]
    pub file: Option<PathBuf>,
    /// Model: a Hugging Face folder, a GGUF file, or a model of the Hugging Face Hub as owner/name,
    /// owner/name@revision or owner/name/file.gguf [default: the repository's own]
    #[arg(long, value_name = "MODEL")]
    pub model: Option<PathBuf>,
    /// Data: JSONL or a JSON array of {instruction, input, output} or {messages}
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// Rank of the adapters: columns of A, rows of B [default: 8]
    #[arg(long, value_name = "NUMBER")]
    pub rank: Option<usize>,
    /// Numerator of the factor alpha / rank on the update [default: 16]
    #[arg(long, value_name = "NUMBER")]
    pub alpha: Option<f64>,
    /// Layers to adapt: names separated by commas, "all-linear", or "re:" and a regular expression
    /// for the whole path [default: all-linear]
    #[arg(long, value_name = "NAMES")]
    pub targets: Option<String>,
    /// Targets to leave out: names separated by commas, or "re:" and a regular expression
    #[arg(long, value_name = "NAMES")]
    pub exclude: Option<String>,
    /// Adapt these layers of the model only, numbers separated by commas
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',')]
    pub layers: Option<Vec<usize>>,
    /// Modules that train in full, names separated by commas, such as lm_head
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub save_modules: Option<Vec<String>>,
    /// How A and B start: gaussian-b, gaussian-a, kaiming, orthogonal, pissa, pissa:ITERATIONS or
    /// olora [default: gaussian-b]
    #[arg(long, value_name = "NAME")]
    pub init: Option<String>,
    /// Factor alpha / sqrt(rank) on the update (rsLoRA)
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub rslora: Option<bool>,
    /// Train the norms of the adapted weights' columns too (DoRA)
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub dora: Option<bool>,
    /// Probability of setting a value of an adapter's input to zero in training [default: 0]
    #[arg(long, value_name = "NUMBER")]
    pub dropout: Option<f64>,
    /// Optimiser steps [default: 40; 400 with the repository's own model]
    #[arg(long, value_name = "NUMBER")]
    pub steps: Option<usize>,
    /// Rows of data a step [default: 4]
    #[arg(long, value_name = "ROWS")]
    pub batch: Option<usize>,
    /// Peak learning rate of AdamW [default: 2e-4; 5e-4 with the repository's own model]
    #[arg(long, value_name = "NUMBER")]
    pub lr: Option<f64>,
    /// LoRA+: the up matrix B learns so many times as fast as the down matrix A; 16 is a good ratio for
    /// hard tasks [default: 1]
    #[arg(long, value_name = "NUMBER")]
    pub lora_plus_ratio: Option<f64>,
    /// Learning rate after the warm-up: constant, linear or cosine [default: constant; cosine
    /// with the repository's own model]
    #[arg(long, value_name = "NAME", value_parser = parse_schedule)]
    pub schedule: Option<Schedule>,
    /// Steps in which the learning rate rises to its peak [default: 0; 10 with the repository's own model]
    #[arg(long, value_name = "STEPS")]
    pub warmup: Option<usize>,
    /// Longest row, in tokens; longer ones are cut on the right [default: 512]
    #[arg(long, value_name = "TOKENS")]
    pub max_len: Option<usize>,
    /// Rows held out to measure the loss with [default: 64; 32 with the repository's own model]
    #[arg(long, value_name = "ROWS")]
    pub held_out: Option<usize>,
    /// Steps between two measurements of the held-out loss; 0: before and after only [default: 0;
    /// 50 with the repository's own model]
    #[arg(long, value_name = "STEPS")]
    pub eval_every: Option<usize>,
    /// Seed of the split, the order of the data and the adapters' starting values [default: 0]
    #[arg(long, value_name = "NUMBER")]
    pub seed: Option<u64>,
    /// Prompt answered before and after [default: the first held-out question]
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// Type of the frozen weights: f32, f16 or bf16; adapters train in f32 in any case [default: f32]
    #[arg(long, value_name = "TYPE")]
    pub dtype: Option<WeightDtype>,
    /// Device: flex, ndarray, tch:cpu, tch:cuda:N, wgpu:N, vulkan:N, metal:N, cuda:N, as far as built in; the
    /// example `devices` lists them [default: the variable LORA_DEVICE, else the build's first backend]
    #[arg(long, value_name = "NAME")]
    pub device: Option<String>,
    /// Folder for the adapter, settings, metrics and loss curve; must be new or empty [default:
    /// runs/1, or the first free number]
    #[arg(long, value_name = "FOLDER")]
    pub output: Option<PathBuf>,
}

/// The recipe of a run without a model.
const OWN_RECIPE: &str = "examples/recipes/tiny_world.toml";

fn parse_schedule(name: &str) -> Result<Schedule, String> {
    serde_json::from_value(name.into()).map_err(|_| "expected constant, linear or cosine".into())
}

impl Recipe {
    /// The command line over the recipe file over the defaults; every option has a value then,
    /// except the prompt and the device, which may be the variable's.
    pub fn from_command_line() -> Result<Self> {
        let mut options = Self::parse();
        let given_warmup = options.warmup;
        let own = options.file.is_none() && options.model.is_none();
        if let Some(file) = options.file.take().or(own.then(|| burn_lora::resource(OWN_RECIPE))) {
            let text = std::fs::read_to_string(&file).map_err(|error| {
                Error::user(format!("{}: cannot be read: {error}; check the path", file.display()))
            })?;
            let mut recipe: Self =
                toml::from_str(&text).map_err(|error| wrong_recipe(&file, &text, &error))?;
            if own {
                recipe.model = recipe.model.map(burn_lora::resource);
                recipe.data = recipe.data.map(burn_lora::resource);
                // A recipe's prompt belongs to its model and its data.
                if options.data.is_some() {
                    recipe.prompt = None;
                }
            }
            options = options.over(recipe);
        }
        let mut options = options.over(Self::defaults());
        // A recipe's warm-up is meant for its own number of steps.
        if given_warmup.is_none() {
            options.warmup = options.warmup.min(options.steps);
        }
        Ok(options)
    }

    fn defaults() -> Self {
        Self {
            rank: Some(8),
            alpha: Some(16.0),
            targets: Some("all-linear".to_owned()),
            init: Some("gaussian-b".to_owned()),
            rslora: Some(false),
            dora: Some(false),
            dropout: Some(0.0),
            steps: Some(40),
            batch: Some(4),
            lr: Some(2e-4),
            lora_plus_ratio: Some(1.0),
            schedule: Some(Schedule::Constant),
            warmup: Some(0),
            max_len: Some(512),
            held_out: Some(64),
            eval_every: Some(0),
            seed: Some(0),
            dtype: Some(WeightDtype::F32),
            output: (1..)
                .map(|number| PathBuf::from(format!("runs/{number}")))
                .find(|p| !p.exists()),
            ..Self::default()
        }
    }

    /// What is set here, and what is set in `other` for the rest.
    fn over(self, other: Self) -> Self {
        Self {
            file: self.file.or(other.file),
            model: self.model.or(other.model),
            data: self.data.or(other.data),
            rank: self.rank.or(other.rank),
            alpha: self.alpha.or(other.alpha),
            targets: self.targets.or(other.targets),
            exclude: self.exclude.or(other.exclude),
            layers: self.layers.or(other.layers),
            save_modules: self.save_modules.or(other.save_modules),
            init: self.init.or(other.init),
            rslora: self.rslora.or(other.rslora),
            dora: self.dora.or(other.dora),
            dropout: self.dropout.or(other.dropout),
            steps: self.steps.or(other.steps),
            batch: self.batch.or(other.batch),
            lr: self.lr.or(other.lr),
            lora_plus_ratio: self.lora_plus_ratio.or(other.lora_plus_ratio),
            schedule: self.schedule.or(other.schedule),
            warmup: self.warmup.or(other.warmup),
            max_len: self.max_len.or(other.max_len),
            held_out: self.held_out.or(other.held_out),
            eval_every: self.eval_every.or(other.eval_every),
            seed: self.seed.or(other.seed),
            prompt: self.prompt.or(other.prompt),
            dtype: self.dtype.or(other.dtype),
            device: self.device.or(other.device),
            output: self.output.or(other.output),
        }
    }

    /// The settings of the adapters.
    pub fn lora(&self) -> Result<LoraConfig> {
        let mut config =
            LoraConfig::new(self.rank.unwrap_or_default(), self.alpha.unwrap_or_default());
        config.target_modules = targets(self.targets.as_deref().unwrap_or_default());
        config.exclude_modules = self.exclude.as_deref().map(excluded);
        config.layers_to_transform = self.layers.clone().unwrap_or_default();
        config.modules_to_save = self.save_modules.clone().unwrap_or_default();
        config.init = init(self.init.as_deref().unwrap_or_default())?;
        if self.rslora.unwrap_or_default() {
            config.scaling = Scaling::AlphaOverSqrtRank;
        }
        config.dora = self.dora.unwrap_or_default();
        config.dropout = self.dropout.unwrap_or_default();
        config.seed = self.seed.unwrap_or_default();
        Ok(config)
    }

    /// The settings of the loop.
    pub fn training(&self) -> TrainConfig {
        TrainConfig {
            steps: self.steps.unwrap_or_default(),
            batch: self.batch.unwrap_or_default(),
            learning_rate: self.lr.unwrap_or_default(),
            schedule: self.schedule.unwrap_or_default(),
            warmup: self.warmup.unwrap_or_default(),
            lora_plus_ratio: self.lora_plus_ratio.unwrap_or(1.0),
            weight_decay: 0.0,
            eval_every: self.eval_every.unwrap_or_default(),
            seed: self.seed.unwrap_or_default(),
        }
    }

    /// The settings as a recipe for another run, which needs a folder of its own.
    pub fn to_toml(&self) -> Result<String> {
        let device = self.device.clone().unwrap_or_else(lora_core::device_name_from_env);
        toml::to_string(&Self { output: None, device: Some(device), ..self.clone() })
            .map_err(|error| Error::user(format!("settings: {error}")))
    }
}

fn targets(text: &str) -> TargetModules {
    match text.trim().strip_prefix("re:") {
        Some(pattern) => TargetModules::Pattern(pattern.to_owned()),
        None if text.trim() == "all-linear" => TargetModules::AllLinear,
        None => TargetModules::names(names(text)),
    }
}

fn excluded(text: &str) -> ExcludeModules {
    match text.trim().strip_prefix("re:") {
        Some(pattern) => ExcludeModules::Pattern(pattern.to_owned()),
        None => ExcludeModules::names(names(text)),
    }
}

fn names(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|name| !name.is_empty())
}

fn init(name: &str) -> Result<Init> {
    let iterations = name.strip_prefix("pissa:").map(str::parse);
    match (name, iterations) {
        ("gaussian-b", _) => Ok(Init::GaussianB { std: None }),
        ("gaussian-a", _) => Ok(Init::GaussianA { std: None }),
        ("kaiming", _) => Ok(Init::KaimingUniformA),
        ("orthogonal", _) => Ok(Init::Orthogonal),
        ("olora", _) => Ok(Init::Olora),
        ("pissa", _) => Ok(Init::Pissa { iterations: None }),
        (_, Some(Ok(iterations))) => Ok(Init::Pissa { iterations: Some(iterations) }),
        _ => Err(Error::user(format!(
            "init: expected gaussian-b, gaussian-a, kaiming, orthogonal, pissa, pissa:ITERATIONS or \
             olora, found '{name}'"
        ))),
    }
}

/// TOML's message with its line, without the picture of it.
fn wrong_recipe(file: &Path, text: &str, error: &toml::de::Error) -> Error {
    let start = error.span().map_or(0, |span| span.start.min(text.len()));
    let line = text.as_bytes()[..start].iter().filter(|byte| **byte == b'\n').count() + 1;
    let message = error.message().replace('\n', " ");
    Error::user(format!("{}: line {line}: {message}; see --help", file.display()))
}
