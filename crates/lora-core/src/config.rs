//! What the user asks for, and what one layer gets of it. No tensors, no PEFT names.

use crate::error::{Error, Result};
use crate::init::Init;
use crate::scaling::Scaling;
use crate::target::{TargetModules, suffix_pattern};

/// Which layers of a model are adapted, and how.
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
    /// Other ranks for some layers: the first key that matches a layer's path counts. A key is a
    /// regular expression for the end of the path, from its start or from after a dot.
    pub rank_pattern: Vec<(String, usize)>,
    /// Other alphas for some layers, by the same rule.
    pub alpha_pattern: Vec<(String, f64)>,
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
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            seed: 0,
        }
    }

    /// What the layer at `path` gets, if it is a target.
    ///
    /// # Errors
    /// When rank or alpha cannot be used, or a pattern's key is no regular expression.
    pub fn resolve(&self, path: &str) -> Result<AdapterConfig> {
        let config = AdapterConfig {
            rank: first_match(&self.rank_pattern, path)?.unwrap_or(self.rank),
            alpha: first_match(&self.alpha_pattern, path)?.unwrap_or(self.alpha),
            scaling: self.scaling,
            init: self.init,
            seed: self.seed ^ path_hash(path),
        };
        config.check()?;
        Ok(config)
    }
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
    /// Seed of the starting values.
    pub seed: u64,
}

impl AdapterConfig {
    /// The factor on this layer's update.
    pub fn scaling(&self) -> f64 {
        self.scaling.factor(self.alpha, self.rank)
    }

    pub(crate) fn check(&self) -> Result<()> {
        if self.rank == 0 {
            return Err(Error::setting("rank", "at least 1", self.rank));
        }
        // Tensors hold f32: a number that only f64 can hold would become infinite there.
        if !(self.alpha > 0.0 && (self.alpha as f32).is_finite()) {
            return Err(Error::setting("alpha", "a finite number above 0", self.alpha));
        }
        self.init.check(self.rank)
    }
}

fn first_match<T: Copy>(patterns: &[(String, T)], path: &str) -> Result<Option<T>> {
    for (key, value) in patterns {
        if suffix_pattern(key)?.is_match(path) {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

/// FNV-1a: short, and the same on every machine and in every version of Rust, so that a seed keeps
/// its meaning.
fn path_hash(path: &str) -> u64 {
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
