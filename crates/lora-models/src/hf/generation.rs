//! `generation_config.json`: how a model's makers want its text to be written.

use std::fs;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::GENERATION_CONFIG_FILE;
use crate::error::{Error, ErrorKind, Result};
use crate::sampling::Sampling;

/// What `generation_config.json` says of sampling and length; `None` is what it does not say.
///
/// Nothing here acts by itself: [`GenerationConfig::sampling`] makes it settings to generate with. The
/// tokens that end a text are in [`DecoderConfig`](crate::DecoderConfig) already.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct GenerationConfig {
    /// Whether tokens are to be drawn; where it is absent the likeliest is taken.
    pub do_sample: Option<bool>,
    /// Divides the logits.
    pub temperature: Option<f64>,
    /// How many of the likeliest tokens stay; 0 is all.
    pub top_k: Option<usize>,
    /// How much of the probability stays.
    pub top_p: Option<f64>,
    /// How likely a token must be as a part of the likeliest.
    pub min_p: Option<f64>,
    /// Above 1, what was written before becomes less likely.
    pub repetition_penalty: Option<f64>,
    /// Longest answer, in tokens.
    pub max_new_tokens: Option<usize>,
}

impl GenerationConfig {
    /// Reads the file of a Hugging Face folder. A folder without it, and a GGUF file, say nothing.
    ///
    /// # Errors
    /// When the file cannot be read, is no JSON object, or has a value of another type or out of its
    /// range.
    ///
    /// ```
    /// use lora_models::{GenerationConfig, Sampling};
    ///
    /// # let folder = tempfile::tempdir()?;
    /// let file = r#"{"do_sample": true, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}"#;
    /// std::fs::write(folder.path().join("generation_config.json"), file)?;
    /// let config = GenerationConfig::read(folder.path())?;
    /// assert_eq!(config.sampling(), Sampling::default().temperature(0.6).top_p(0.9));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn read(model: impl AsRef<Path>) -> Result<Self> {
        let path = model.as_ref().join(GENERATION_CONFIG_FILE);
        if !path.exists() {
            return Ok(Self::default());
        }
        let text = fs::read_to_string(&path).map_err(|source| Error::io(&path, source))?;
        let value: Value = serde_json::from_str(&text).map_err(|source| {
            Error::malformed(&path, "the file", "a JSON object", format!("an error: {source}"))
        })?;
        if !value.is_object() {
            return Err(Error::malformed(&path, "the file", "a JSON object", value.to_string()));
        }
        let (number, count) = ("a number", "a whole number of at least 0");
        let config = Self {
            do_sample: field(&path, &value, "do_sample", "true or false")?,
            temperature: field(&path, &value, "temperature", number)?,
            top_k: field(&path, &value, "top_k", count)?,
            top_p: field(&path, &value, "top_p", number)?,
            min_p: field(&path, &value, "min_p", number)?,
            repetition_penalty: field(&path, &value, "repetition_penalty", number)?,
            max_new_tokens: field(&path, &value, "max_new_tokens", count)?,
        };
        config.sampling().check().map_err(|error| match error.kind() {
            ErrorKind::Argument { what, expected, found } => {
                Error::malformed(&path, *what, expected, found)
            }
            _ => error,
        })?;
        Ok(config)
    }

    /// The settings as the makers want them: greedy unless `do_sample` is true, as in transformers, and
    /// nothing that the file does not say (transformers would add `top_k` = 50 to what is drawn).
    pub fn sampling(&self) -> Sampling {
        let mut sampling = Sampling::greedy();
        if let Some(penalty) = self.repetition_penalty {
            sampling = sampling.repetition_penalty(penalty);
        }
        if self.do_sample != Some(true) {
            return sampling;
        }
        sampling = sampling.temperature(self.temperature.unwrap_or(1.0));
        if let Some(top_k) = self.top_k {
            sampling = sampling.top_k(top_k);
        }
        if let Some(top_p) = self.top_p {
            sampling = sampling.top_p(top_p);
        }
        if let Some(min_p) = self.min_p {
            sampling = sampling.min_p(min_p);
        }
        sampling
    }
}

fn field<'a, T: Deserialize<'a>>(
    path: &Path,
    file: &'a Value,
    name: &str,
    expected: &str,
) -> Result<Option<T>> {
    let value = file.get(name).unwrap_or(&Value::Null);
    Option::deserialize(value)
        .map_err(|_| Error::malformed(path, name, expected, value.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<GenerationConfig> {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(GENERATION_CONFIG_FILE), text).unwrap();
        GenerationConfig::read(folder.path())
    }

    #[test]
    fn a_model_without_the_file_says_nothing() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(GenerationConfig::read(folder.path()).unwrap(), GenerationConfig::default());
        let file = folder.path().join("model.gguf");
        fs::write(&file, "").unwrap();
        assert_eq!(GenerationConfig::read(file).unwrap(), GenerationConfig::default());
        assert_eq!(GenerationConfig::default().sampling(), Sampling::greedy());
    }

    #[test]
    fn nothing_is_drawn_unless_the_file_says_so() {
        let file = r#"{"temperature": 0.7, "top_k": null, "repetition_penalty": 1.05}"#;
        let config = read(file).unwrap();
        assert_eq!((config.temperature, config.top_k), (Some(0.7), None));
        assert_eq!(config.sampling(), Sampling::greedy().repetition_penalty(1.05));
        let config = read(r#"{"do_sample": true, "top_k": 20, "min_p": 0.1, "max_new_tokens": 9}"#);
        let config = config.unwrap();
        assert_eq!(config.max_new_tokens, Some(9));
        assert_eq!(config.sampling(), Sampling::default().temperature(1.0).top_k(20).min_p(0.1));
    }

    #[test]
    fn wrong_values_are_named() {
        for (file, parts) in [
            ("[]", ["the file", "a JSON object"]),
            ("{", ["the file", "a JSON object"]),
            (r#"{"do_sample": 1}"#, ["do_sample", "expected true or false, found 1"]),
            (r#"{"top_k": -1}"#, ["top_k", "found -1"]),
            (r#"{"temperature": "warm"}"#, ["temperature", "expected a number, found \"warm\""]),
            (r#"{"do_sample": true, "top_p": 90}"#, ["top_p", "0 to 1, found 90"]),
        ] {
            let message = read(file).unwrap_err().to_string();
            assert!(message.contains(GENERATION_CONFIG_FILE), "{message}");
            assert!(parts.iter().all(|part| message.contains(part)), "{message}");
        }
    }
}
