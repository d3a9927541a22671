//! What the user asks for, and what one layer gets of it. No tensors, no PEFT names.

use burn::tensor::DType;

use crate::error::{Error, Result};
use crate::init::Init;
use crate::problem::ConfigProblem;
use crate::scaling::Scaling;
use crate::target::{ExcludeModules, Keys, Rules, Selection, TargetModules};

/// Which layers of a model are adapted, and how.
///
/// The rules and what their messages mean: [`guide::targets`](crate::guide::targets). What else can train,
/// with equations: [`guide::variants`](crate::guide::variants).
///
/// ```
/// use lora_core::{LoraConfig, TargetModules};
///
/// let mut config = LoraConfig::new(8, 16.0);
/// config.target_modules = TargetModules::names(["q_proj", "v_proj"]);
/// config.rank_pattern = vec![("layers.0.q_proj".to_owned(), 4)];
///
/// let first = config.resolve("model.layers.0.q_proj")?;
/// assert_eq!((first.rank, first.scaling()), (4, 4.0));
/// # Ok::<(), lora_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// Columns of A and rows of B, at least 1.
    pub rank: usize,
    /// Numerator of the scaling factor, above 0.
    pub alpha: f64,
    /// How the factor follows from alpha and rank.
    pub scaling: Scaling,
    /// Starting values of A and B.
    pub init: Init,
    /// Which layers are adapted.
    pub target_modules: TargetModules,
    /// Which of them are not, after all.
    pub exclude_modules: Option<ExcludeModules>,
    /// The layers of the model, by index, in which there are targets; empty for all. Only with targets
    /// by name; a target that is a whole path is taken whatever its index.
    pub layers_to_transform: Vec<usize>,
    /// What the list that holds the layers is called, such as `layers` or `h`: the first of these that
    /// a number follows gives a layer's index. Each is a regular expression. Empty: the first number
    /// in the path with at least two names before it. Only with `layers_to_transform`.
    pub layers_pattern: Vec<String>,
    /// Modules that train as a whole instead, with all that is in them: those whose paths end with the letters
    /// of a name, so that `head` means `xhead` too. Neither they nor what is in them is a target; there a name
    /// is a regular expression for some dotted parts of a path. Both as in PEFT.
    pub modules_to_save: Vec<String>,
    /// Other ranks for some layers: the first key that matches a layer's path counts. A key is a
    /// regular expression for the end of the path, from its start or from after a dot: in `q_proj`
    /// all is literal, in `0.q_proj` the dot is any character. Every key must count for some target.
    pub rank_pattern: Vec<(String, usize)>,
    /// Other alphas for some layers, by the same rule.
    pub alpha_pattern: Vec<(String, f64)>,
    /// The probability, in `[0, 1)`, with which a value of an adapter's input is set to zero while
    /// the adapter trains. The frozen layer's input is never touched.
    pub dropout: f64,
    /// Whether each adapted weight also trains its columns' norms (DoRA,
    /// [arXiv:2402.09353](https://arxiv.org/abs/2402.09353)).
    pub dora: bool,
    /// Whether the up matrix has a bias, which trains.
    pub lora_bias: bool,
    /// Which of the layers' own biases train.
    pub bias: TrainedBias,
    /// Embeddings of which some rows train in full: the name of the embedding (as in target lists)
    /// and the rows, which are token ids.
    pub trainable_tokens: Vec<(String, Vec<usize>)>,
    /// The dtype of A and B; f32 (f64 beside f64 weights) where none is given. One that the layer's device does not
    /// compute in is an error ([`check_dtype`](crate::check_dtype)).
    pub dtype: Option<DType>,
    /// Seed of the starting values; each layer's follow from it and from the layer's path.
    pub seed: u64,
}

impl LoraConfig {
    /// All linear layers, `alpha / rank`, Gaussian B and zero A, seed 0.
    pub fn new(rank: usize, alpha: f64) -> Self {
        Self {
            rank,
            alpha,
            scaling: Scaling::default(),
            init: Init::default(),
            target_modules: TargetModules::AllLinear,
            exclude_modules: None,
            layers_to_transform: Vec::new(),
            layers_pattern: Vec::new(),
            modules_to_save: Vec::new(),
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            dropout: 0.0,
            dora: false,
            lora_bias: false,
            bias: TrainedBias::None,
            trainable_tokens: Vec::new(),
            dtype: None,
            seed: 0,
        }
    }

    /// Which of `paths`, all of a model's linear layers, are targets, and all that is wrong with this
    /// configuration for such a model; `output_layer` is the path that [`TargetModules::AllLinear`]
    /// leaves out.
    ///
    /// ```
    /// use lora_core::{ExcludeModules, LoraConfig, TargetModules};
    ///
    /// let paths = ["layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj", "layers.1.v_proj"];
    /// let mut config = LoraConfig::new(8, 16.0);
    /// config.target_modules = TargetModules::names(["q_proj"]);
    /// config.exclude_modules = Some(ExcludeModules::names(["layers.1.q_proj"]));
    /// assert_eq!(config.select(&paths, None).into_result()?, [true, false, false, false]);
    /// # Ok::<(), lora_core::Error>(())
    /// ```
    pub fn select<P: AsRef<str>>(&self, paths: &[P], output_layer: Option<&str>) -> Selection {
        let paths: Vec<&str> = paths.iter().map(AsRef::as_ref).collect();
        let rules = Rules {
            target_modules: &self.target_modules,
            exclude_modules: self.exclude_modules.as_ref(),
            layers_to_transform: &self.layers_to_transform,
            layers_pattern: &self.layers_pattern,
            modules_to_save: &self.modules_to_save,
        };
        let mut selection = rules.select(&paths, output_layer);
        let problems = &mut selection.problems;
        let patterns = Patterns::new(self, problems);
        for keys in [&patterns.ranks, &patterns.alphas] {
            keys.check(&paths, &selection.selected, problems);
        }
        problems.extend(self.unusable_numbers());
        selection
    }

    /// What the layer at `path` gets, if it is a target.
    ///
    /// # Errors
    /// When a number cannot be used (rank, alpha, dropout, a standard deviation), with `lora_bias` beside
    /// DoRA, or when a pattern's key is no regular expression.
    pub fn resolve(&self, path: &str) -> Result<AdapterConfig> {
        let mut problems = Vec::new();
        let config = Patterns::new(self, &mut problems).resolve(path);
        problems.extend(config.problems());
        if problems.is_empty() { Ok(config) } else { Err(Error::config(problems)) }
    }

    fn unusable_numbers(&self) -> Vec<ConfigProblem> {
        let mut problems = self.with(self.rank, self.alpha, 0).problems();
        for (key, rank) in &self.rank_pattern {
            let own = rank_problem("rank_pattern", *rank);
            problems.extend(own.map(|problem| problem.found_at(key)));
        }
        for (key, alpha) in &self.alpha_pattern {
            let own = alpha_problem("alpha_pattern", *alpha);
            problems.extend(own.map(|problem| problem.found_at(key)));
        }
        problems
    }

    fn with(&self, rank: usize, alpha: f64, seed: u64) -> AdapterConfig {
        AdapterConfig {
            rank,
            alpha,
            scaling: self.scaling,
            init: self.init,
            dropout: self.dropout,
            dora: self.dora,
            lora_bias: self.lora_bias,
            train_bias: self.bias != TrainedBias::None,
            dtype: self.dtype,
            seed,
        }
    }
}

/// A configuration with its keys compiled, once for all layers.
pub(crate) struct Patterns<'a> {
    config: &'a LoraConfig,
    ranks: Keys<'a>,
    alphas: Keys<'a>,
}

impl<'a> Patterns<'a> {
    pub(crate) fn new(config: &'a LoraConfig, problems: &mut Vec<ConfigProblem>) -> Self {
        let ranks = config.rank_pattern.iter().map(|(key, _)| key.as_str());
        let alphas = config.alpha_pattern.iter().map(|(key, _)| key.as_str());
        Self {
            config,
            ranks: Keys::new("rank_pattern", ranks, problems),
            alphas: Keys::new("alpha_pattern", alphas, problems),
        }
    }

    pub(crate) fn resolve(&self, path: &str) -> AdapterConfig {
        let config = self.config;
        let rank = self.ranks.first(path).map_or(config.rank, |key| config.rank_pattern[key].1);
        let alpha = self.alphas.first(path).map_or(config.alpha, |key| config.alpha_pattern[key].1);
        config.with(rank, alpha, config.seed ^ path_hash(path))
    }
}

/// Which of the layers' own biases train.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TrainedBias {
    /// None of them.
    #[default]
    None,
    /// Those of all adaptable layers, adapted or not.
    All,
    /// Those of the adapted layers.
    LoraOnly,
}

/// What one layer gets: flat values, resolved before any tensor exists.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdapterConfig {
    /// Columns of A and rows of B, at least 1.
    pub rank: usize,
    /// Numerator of the scaling factor, above 0.
    pub alpha: f64,
    /// How the factor follows from alpha and rank.
    pub scaling: Scaling,
    /// Starting values of A and B.
    pub init: Init,
    /// The probability with which a value of the adapter's input is set to zero in training.
    pub dropout: f64,
    /// Whether the norms of the weight's columns train.
    pub dora: bool,
    /// Whether the up matrix has a bias.
    pub lora_bias: bool,
    /// Whether the layer's own bias trains.
    pub train_bias: bool,
    /// The dtype of A and B; f32 (f64 beside an f64 weight) where none is given.
    pub dtype: Option<DType>,
    /// Seed of the starting values.
    pub seed: u64,
}

impl AdapterConfig {
    /// The factor on this layer's update.
    pub fn scaling(&self) -> f64 {
        self.scaling.factor(self.alpha, self.rank)
    }

    pub(crate) fn check(&self) -> Result<()> {
        let problems = self.problems();
        if problems.is_empty() { Ok(()) } else { Err(Error::config(problems)) }
    }

    fn problems(&self) -> Vec<ConfigProblem> {
        let rank = rank_problem("rank", self.rank);
        let alpha = alpha_problem("alpha", self.alpha);
        let dropout = (!(0.0..1.0).contains(&self.dropout))
            .then(|| ConfigProblem::setting("dropout", "a number from 0 to below 1", self.dropout));
        let bias = (self.lora_bias && self.dora)
            .then(|| ConfigProblem::setting("lora_bias", "false with DoRA", true));
        let numbers = rank.into_iter().chain(alpha).chain(dropout).chain(bias);
        numbers.chain(self.init.problem(self.rank)).collect()
    }
}

fn rank_problem(setting: &'static str, rank: usize) -> Option<ConfigProblem> {
    (rank == 0).then(|| ConfigProblem::setting(setting, "at least 1", rank))
}

fn alpha_problem(setting: &'static str, alpha: f64) -> Option<ConfigProblem> {
    // Tensors hold f32: a number that only f64 can hold would become infinite there, or 0.
    let usable = alpha as f32 > 0.0 && (alpha as f32).is_finite();
    (!usable).then(|| ConfigProblem::setting(setting, "a finite number above 0", alpha))
}

/// FNV-1a: short, and the same on every machine and in every version of Rust, so that a seed keeps
/// its meaning.
pub(crate) fn path_hash(path: &str) -> u64 {
    path.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_take_the_first_key_that_matches() {
        let mut config = LoraConfig::new(8, 16.0);
        config.rank_pattern = vec![
            ("layers.1.q_proj".to_owned(), 2),
            ("q_proj".to_owned(), 4),
            (".*".to_owned(), 32),
        ];
        config.alpha_pattern = vec![("k_proj".to_owned(), 3.0)];
        let rank = |path: &str| config.resolve(path).unwrap().rank;
        assert_eq!(rank("layers.1.q_proj"), 2);
        assert_eq!(rank("layers.0.q_proj"), 4);
        assert_eq!(rank("layers.0.xq_proj"), 32);
        assert_eq!(config.resolve("k_proj").unwrap().alpha, 3.0);
        assert_eq!(config.resolve("xk_proj").unwrap().alpha, 16.0);
    }

    #[test]
    fn unusable_numbers_are_errors() {
        assert!(LoraConfig::new(0, 16.0).resolve("x").is_err());
        for alpha in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(LoraConfig::new(8, alpha).resolve("x").is_err(), "{alpha}");
        }
        let mut config = LoraConfig::new(8, 16.0);
        config.init = Init::GaussianB { std: Some(f64::NAN) };
        assert!(config.resolve("x").is_err());
    }

    #[test]
    fn layers_differ_and_seeds_differ() {
        let mut config = LoraConfig::new(8, 16.0);
        let (a, b) = (config.resolve("a").unwrap().seed, config.resolve("b").unwrap().seed);
        assert_ne!(a, b);
        config.seed = 1;
        assert_ne!(config.resolve("a").unwrap().seed, a);
    }
}
