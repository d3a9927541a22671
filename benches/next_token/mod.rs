//! One step of greedy decoding, as the benches measure it.

use burn::tensor::DType;
use lora_models::{Decoder, KvCache};

/// The most likely token after these.
pub fn next_token(decoder: &Decoder, tokens: &[i32], cache: &mut KvCache) -> i32 {
    let hidden = decoder.hidden_states(decoder.token_tensor(tokens, 1), Some(cache));
    let [_, length, width] = hidden.dims();
    let last = hidden.narrow(1, length - 1, 1).reshape([1, width]);
    let best = decoder.logits(last).cast(DType::F32).argmax(1);
    best.into_data().iter::<i64>().next().unwrap_or_default() as i32
}
