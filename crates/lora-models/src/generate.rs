//! Writing text, one token after the other.

use burn::module::Module;
use burn::tensor::DType;
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};

use crate::cache::KvCache;
use crate::decoder::Decoder;
use crate::error::{ErrorKind, Result};

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Sampling {
    /// The most likely one.
    Greedy,
    /// Drawn from softmax(logits / temperature).
    Temperature {
        /// Above 0: below 1 is safer than the model, above 1 wilder.
        temperature: f64,
        /// The same seed gives the same text.
        seed: u64,
    },
}

impl Decoder {
    /// Continues `prompt` until a token that ends a text, `max_new_tokens`, or the longest sequence
    /// that the model was made for. The ending token is not part of the answer. `on_token` is
    /// told every token as soon as it is chosen.
    ///
    /// # Errors
    /// When the prompt is empty, longer than the model's longest sequence, or has an id that the
    /// model does not know; when the temperature is not a finite number above 0.
    pub fn generate(
        &self,
        prompt: &[u32],
        max_new_tokens: usize,
        sampling: Sampling,
        mut on_token: impl FnMut(u32),
    ) -> Result<Vec<u32>> {
        let config = self.config();
        check(prompt, sampling, config.vocab_size, config.max_position_embeddings)?;
        let mut rng = match sampling {
            Sampling::Greedy => None,
            Sampling::Temperature { temperature, seed } => {
                Some((temperature, Xoshiro256PlusPlus::seed_from_u64(seed)))
            }
        };

        let model = self.valid();
        let limit = max_new_tokens.min(config.max_position_embeddings - prompt.len());
        let mut cache = KvCache::with_capacity(prompt.len() + limit);
        let mut next: Vec<i32> = prompt.iter().map(|id| *id as i32).collect();
        let mut written = Vec::new();
        while written.len() < limit {
            let hidden = model.hidden_states(model.token_tensor(&next, 1), Some(&mut cache));
            let [_, length, width] = hidden.dims();
            let last = hidden.narrow(1, length - 1, 1).reshape([1, width]);
            let logits = model.logits(last).cast(DType::F32).into_data();
            let logits: Vec<f32> = logits.try_to_vec().expect("the logits were just cast to f32");
            let id = match &mut rng {
                None => most_likely(&logits),
                Some((temperature, rng)) => draw(&logits, *temperature, rng.random()),
            };
            if config.eos_token_ids.contains(&id) {
                break;
            }
            on_token(id);
            written.push(id);
            next = vec![id as i32];
        }
        Ok(written)
    }
}

fn check(prompt: &[u32], sampling: Sampling, vocab: usize, longest: usize) -> Result<()> {
    let argument = |what, expected: String, found: String| {
        Err(ErrorKind::Argument { what, expected, found }.into())
    };
    if prompt.is_empty() || prompt.len() > longest {
        return argument("prompt", format!("1 to {longest} tokens"), prompt.len().to_string());
    }
    if let Some(id) = prompt.iter().find(|id| **id as usize >= vocab) {
        return argument("prompt", format!("token ids below {vocab}"), id.to_string());
    }
    if let Sampling::Temperature { temperature, .. } = sampling
        && !(temperature.is_finite() && temperature > 0.0)
    {
        return argument(
            "temperature",
            "a finite number above 0".to_owned(),
            temperature.to_string(),
        );
    }
    Ok(())
}

/// The first of the largest.
fn most_likely(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (index, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = index;
        }
    }
    best as u32
}

/// The token at which the running sum of probabilities passes `point`, 0 to 1.
fn draw(logits: &[f32], temperature: f64, point: f64) -> u32 {
    let largest = logits.iter().fold(f32::NEG_INFINITY, |largest, logit| largest.max(*logit));
    let weights: Vec<f64> =
        logits.iter().map(|logit| (f64::from(logit - largest) / temperature).exp()).collect();
    let mut left = point * weights.iter().sum::<f64>();
    for (index, weight) in weights.iter().enumerate() {
        left -= weight;
        if left < 0.0 {
            return index as u32;
        }
    }
    // Rounding can leave a rest at the very end.
    most_likely(logits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_equal_logits_is_the_most_likely() {
        assert_eq!(most_likely(&[0.0, 3.0, 3.0, -1.0]), 1);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [0.0, (3f32).ln(), f32::NEG_INFINITY]; // 1/4, 3/4, 0
        assert_eq!(draw(&logits, 1.0, 0.2), 0);
        assert_eq!(draw(&logits, 1.0, 0.26), 1);
        assert_eq!(draw(&logits, 1.0, 0.999_999), 1);
        // Half the temperature squares the odds: 1/10, 9/10.
        assert_eq!(draw(&logits, 0.5, 0.09), 0);
        assert_eq!(draw(&logits, 0.5, 0.11), 1);
    }

    #[test]
    fn unusable_prompts_and_temperatures_are_errors() {
        let at = |temperature| Sampling::Temperature { temperature, seed: 0 };
        assert!(check(&[], Sampling::Greedy, 10, 5).is_err());
        assert!(check(&[1; 6], Sampling::Greedy, 10, 5).is_err());
        assert!(check(&[10], Sampling::Greedy, 10, 5).is_err());
        assert!(check(&[1], at(0.0), 10, 5).is_err());
        assert!(check(&[1], at(f64::NAN), 10, 5).is_err());
        assert!(check(&[1], at(0.7), 10, 5).is_ok());
    }
}
