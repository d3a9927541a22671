//! Writing text, one token after the other.

use burn::module::Module;
use burn::tensor::DType;
use lora_core::AdaptableLayer;

use crate::cache::KvCache;
use crate::config::RopeScaling;
use crate::decoder::Decoder;
use crate::error::{ErrorKind, Result};
use crate::sampling::{Sampler, Sampling};

/// Prompt tokens that are read at once: enough to be quick, few enough that their attention scores stay
/// small beside the model.
const PIECE: usize = 512;

/// Most tokens to be written that a cache has room for from the start: a limit that nobody means to reach must not
/// fill the memory. Beyond them it doubles.
const RESERVED: usize = 4096;

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
        let longest = self.config().longest_text();
        let limit = max_new_tokens.min(longest.saturating_sub(prompt.len()));
        let mut cache = KvCache::with_capacity(prompt.len() + limit.min(RESERVED));
        let tokens = self.continuation(prompt, sampling, &mut cache)?.take(limit);
        tokens.inspect(|id| id.as_ref().into_iter().for_each(|id| on_token(*id))).collect()
    }

    /// The tokens after `prompt`, each computed when it is asked for, until one that ends a text or the
    /// longest sequence that the model was made for.
    ///
    /// What `cache` has seen already must be the beginning of the prompt, and is not computed again; so a
    /// conversation costs its newest turn only. It must leave at least one token.
    ///
    /// ```
    /// use lora_models::{Decoder, KvCache, Result, Sampling};
    ///
    /// fn first_hundred(decoder: &Decoder, prompt: &[u32]) -> Result<Vec<u32>> {
    ///     let mut cache = KvCache::new();
    ///     decoder.continuation(prompt, Sampling::greedy(), &mut cache)?.take(100).collect()
    /// }
    /// # let _ = first_hundred;
    /// ```
    ///
    /// # Errors
    /// As [`generate`](Self::generate), and when the cache has seen as much as the whole prompt, or is
    /// that of a batch or of another model.
    pub fn continuation<'a>(
        &self,
        prompt: &[u32],
        sampling: Sampling,
        cache: &'a mut KvCache,
    ) -> Result<Continuation<'a>> {
        let config = self.config();
        check(prompt, config.vocab_size, config.longest_text())?;
        if cache.seen() >= prompt.len() {
            let expected = format!("a cache that has seen less than the prompt's {}", prompt.len());
            let found = format!("{} tokens", cache.seen());
            return Err(ErrorKind::Argument { what: "cache", expected, found }.into());
        }
        let fitting = [1, config.num_key_value_heads, config.head_dim];
        let weight = self.model.embed_tokens.weight();
        let options = (weight.dtype(), &weight.device());
        if let Some(found) = cache.unlike(config.num_hidden_layers, fitting, options) {
            let expected = "a cache of one text and of this model".to_owned();
            return Err(ErrorKind::Argument { what: "cache", expected, found }.into());
        }
        let sampler = Sampler::new(sampling)?;
        let pending = cache.seen();
        let (model, tokens) = (self.valid(), prompt.to_vec());
        Ok(Continuation { model, sampler, tokens, pending, cache, ended: false })
    }

    /// Continues several prompts at once, which reads the weights once for all of them. Each row is what
    /// [`generate`](Self::generate) writes for its prompt alone, up to rounding; a row draws with the
    /// seed of `sampling` plus its number. (With [`RopeScaling::Dynamic`](crate::RopeScaling::Dynamic) the
    /// longest row stretches RoPE for all of them, as in transformers.) `on_token` is told the row and
    /// the token.
    ///
    /// # Errors
    /// As [`generate`](Self::generate), for any of the prompts; when there is none.
    pub fn generate_batch(
        &self,
        prompts: &[Vec<u32>],
        max_new_tokens: usize,
        sampling: Sampling,
        mut on_token: impl FnMut(usize, u32),
    ) -> Result<Vec<Vec<u32>>> {
        let config = self.config();
        for prompt in prompts {
            check(prompt, config.vocab_size, config.longest_text())?;
        }
        let Some(longest) = prompts.iter().map(Vec::len).max() else {
            let expected = "at least one".to_owned();
            let found = "none".to_owned();
            return Err(ErrorKind::Argument { what: "prompts", expected, found }.into());
        };
        let samplers = (0..prompts.len()).map(|row| Sampler::new(sampling.for_row(row)));
        let mut samplers: Vec<Sampler> = samplers.collect::<Result<_>>()?;

        let model = self.valid();
        let padding: Vec<usize> = prompts.iter().map(|prompt| longest - prompt.len()).collect();
        let mut rows = prompts.to_vec(); // and what is written
        let room = |prompt: &Vec<u32>| config.longest_text() - prompt.len();
        let limits: Vec<usize> =
            prompts.iter().map(|prompt| max_new_tokens.min(room(prompt))).collect();
        let most = limits.iter().copied().max().unwrap_or_default();
        let mut cache = KvCache::with_padding(longest + most.min(RESERVED), padding.clone());
        let mut running: Vec<bool> = limits.iter().map(|limit| *limit > 0).collect();
        // Any token will do before a text; none of the text's sees it.
        let padded =
            |(row, padding): (&Vec<u32>, &usize)| [vec![0; *padding], row.clone()].concat();
        let mut next: Vec<Vec<u32>> = rows.iter().zip(&padding).map(padded).collect();
        while running.contains(&true) {
            let logits = last_logits(&model, &next, &mut cache);
            for (row, logits) in logits.chunks_exact(config.vocab_size).enumerate() {
                next[row] = vec![0]; // what a row that has ended is fed
                if !running[row] {
                    continue;
                }
                let id = samplers[row].next_token(logits, &rows[row])?;
                if config.eos_token_ids.contains(&id) {
                    running[row] = false;
                    continue;
                }
                on_token(row, id);
                rows[row].push(id);
                next[row] = vec![id];
                running[row] = rows[row].len() - prompts[row].len() < limits[row];
            }
        }
        let written = rows.into_iter().zip(prompts);
        Ok(written.map(|(mut row, prompt)| row.split_off(prompt.len())).collect())
    }
}

/// The tokens after a prompt; see [`Decoder::continuation`].
#[derive(Debug)]
pub struct Continuation<'a> {
    model: Decoder,
    sampler: Sampler,
    /// The prompt, and what is written.
    tokens: Vec<u32>,
    /// From here on, the cache has not seen the tokens.
    pending: usize,
    cache: &'a mut KvCache,
    ended: bool,
}

impl Continuation<'_> {
    /// The prompt and what has been written after it.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    fn step(&mut self) -> Result<Option<u32>> {
        let config = self.model.config();
        if self.tokens.len() >= config.longest_text() {
            return Ok(None);
        }
        let next = [self.tokens[self.pending..].to_vec()];
        self.pending = self.tokens.len();
        let logits = last_logits(&self.model, &next, self.cache);
        let id = self.sampler.next_token(&logits, &self.tokens)?;
        if config.eos_token_ids.contains(&id) {
            return Ok(None);
        }
        self.tokens.push(id);
        Ok(Some(id))
    }
}

impl Iterator for Continuation<'_> {
    type Item = Result<u32>;

    fn next(&mut self) -> Option<Result<u32>> {
        if self.ended {
            return None;
        }
        let step = self.step().transpose();
        self.ended = !matches!(step, Some(Ok(_)));
        step
    }
}

/// The logits after each row, one row after the other, `[rows, vocab_size]`; the rows are as long as each
/// other.
fn last_logits(model: &Decoder, rows: &[Vec<u32>], cache: &mut KvCache) -> Vec<f32> {
    let length = rows[0].len();
    // Dynamic scaling turns a whole prompt by the theta of its length.
    let piece = match model.config().rope_scaling {
        RopeScaling::Dynamic { .. } => length,
        _ => PIECE,
    };
    let mut last = None;
    for start in (0..length).step_by(piece) {
        let piece = start..length.min(start + piece);
        let ids: Vec<i32> =
            rows.iter().flat_map(|row| &row[piece.clone()]).map(|id| *id as i32).collect();
        last = Some(model.hidden_states(model.token_tensor(&ids, rows.len()), Some(cache)));
    }
    let hidden = last.expect("a row has at least one token");
    let [_, length, _] = hidden.dims();
    // With its batch axis, which a mixed batch of adapters needs.
    let logits = model.all_logits(hidden.narrow(1, length - 1, 1));
    let logits = logits.cast(DType::F32).into_data();
    logits.try_to_vec().expect("the logits were just cast to f32")
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
