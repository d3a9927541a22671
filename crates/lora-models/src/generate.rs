//! Writing text, one token after the other.

use burn::module::Module;
use burn::tensor::DType;

use crate::cache::KvCache;
use crate::decoder::Decoder;
use crate::error::{ErrorKind, Result};
use crate::sampling::{Sampler, Sampling};

impl Decoder {
    /// Continues `prompt` until a token that ends a text, `max_new_tokens`, or the longest sequence
    /// that the model was made for. The ending token is not part of the answer. `on_token` is
    /// told every token as soon as it is chosen.
    ///
    /// # Errors
    /// When the prompt is empty, longer than the model's longest sequence, or has an id that the
    /// model does not know; when a setting of `sampling` is out of its range; when the model's logits
    /// are not numbers.
    pub fn generate(
        &self,
        prompt: &[u32],
        max_new_tokens: usize,
        sampling: Sampling,
        mut on_token: impl FnMut(u32),
    ) -> Result<Vec<u32>> {
        let config = self.config();
        check(prompt, config.vocab_size, config.max_position_embeddings)?;
        let mut sampler = Sampler::new(sampling)?;

        let model = self.valid();
        let limit = max_new_tokens.min(config.max_position_embeddings - prompt.len());
        let mut cache = KvCache::with_capacity(prompt.len() + limit);
        let mut next: Vec<i32> = prompt.iter().map(|id| *id as i32).collect();
        let mut tokens = prompt.to_vec(); // and what is written
        while tokens.len() - prompt.len() < limit {
            let hidden = model.hidden_states(model.token_tensor(&next, 1), Some(&mut cache));
            let [_, length, width] = hidden.dims();
            let last = hidden.narrow(1, length - 1, 1).reshape([1, width]);
            let logits = model.logits(last).cast(DType::F32).into_data();
            let logits: Vec<f32> = logits.try_to_vec().expect("the logits were just cast to f32");
            let id = sampler.next_token(&logits, &tokens)?;
            if config.eos_token_ids.contains(&id) {
                break;
            }
            on_token(id);
            tokens.push(id);
            next = vec![id as i32];
        }
        Ok(tokens.split_off(prompt.len()))
    }
}

fn check(prompt: &[u32], vocab: usize, longest: usize) -> Result<()> {
    let argument = |expected: String, found: String| {
        Err(ErrorKind::Argument { what: "prompt", expected, found }.into())
    };
    if prompt.is_empty() || prompt.len() > longest {
        return argument(format!("1 to {longest} tokens"), prompt.len().to_string());
    }
    if let Some(id) = prompt.iter().find(|id| **id as usize >= vocab) {
        return argument(format!("token ids below {vocab}"), id.to_string());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unusable_prompts_are_errors() {
        assert!(check(&[], 10, 5).is_err());
        assert!(check(&[1; 6], 10, 5).is_err());
        assert!(check(&[10], 10, 5).is_err());
        assert!(check(&[1], 10, 5).is_ok());
    }
}
