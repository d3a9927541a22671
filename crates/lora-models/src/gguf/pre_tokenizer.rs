//! What a byte-level BPE does to a text before its merges, by llama.cpp's name for it.
//!
//! A GGUF file holds the name alone. The rules behind it are those of the model's `tokenizer.json`, for
//! `default` those of llama.cpp's `llama-vocab.cpp`.

use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    NormalizerWrapper, PreTokenizerWrapper, Result as TokenizersResult, SplitDelimiterBehavior,
};

/// Names that [`named`] knows, for messages; it knows other names for the same rules too.
pub(super) const NAMES: &str = "llama-bpe (llama3, llama-v3), qwen2, smollm, gpt-2, default";

/// Llama 3: words with the one mark before them, up to three digits, marks with the line ends after them.
const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen2: the same with single digits.
const QWEN_2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// llama.cpp's `default`, one after the other: marks, GPT-2's words, runs of digits, threes of them.
const DEFAULT: [&str; 4] = [
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
];

/// What happens to a text before the merges, and what else comes with a name.
pub(super) struct Stages {
    pub(super) normalizer: Option<NormalizerWrapper>,
    pub(super) pre_tokenizer: PreTokenizerWrapper,
    /// A word that is a token becomes that token, whatever the merges would make of it.
    pub(super) ignore_merges: bool,
    /// Whether bos goes before every text where the file does not say.
    pub(super) adds_bos: bool,
}

/// The stages that `name` stands for. The file does not hold the rules, so an unknown name cannot be
/// guessed: `None`.
pub(super) fn named(name: &str) -> Option<TokenizersResult<Stages>> {
    let plain = |pre_tokenizer: PreTokenizerWrapper| Stages {
        normalizer: None,
        pre_tokenizer,
        ignore_merges: false,
        adds_bos: false,
    };
    Some(match name {
        "llama-bpe" | "llama3" | "llama-v3" | "falcon3" => {
            splits(&[LLAMA_3]).map(|pre_tokenizer| Stages {
                ignore_merges: true,
                adds_bos: true,
                ..plain(pre_tokenizer)
            })
        }
        "qwen2" | "deepseek-r1-qwen" => splits(&[QWEN_2])
            .map(|pre_tokenizer| Stages { normalizer: Some(NFC.into()), ..plain(pre_tokenizer) }),
        "smollm" => {
            let stages = vec![Digits::new(true).into(), byte_level(true).into()];
            Ok(plain(Sequence::new(stages).into()))
        }
        "gpt-2" => Ok(plain(byte_level(true).into())),
        "default" => splits(&DEFAULT).map(plain),
        _ => return None,
    })
}

/// Cuts at each match of each expression, and keeps matches and rests.
fn splits(expressions: &[&str]) -> TokenizersResult<PreTokenizerWrapper> {
    let mut stages: Vec<PreTokenizerWrapper> = Vec::new();
    for &expression in expressions {
        let pattern = SplitPattern::Regex(expression.to_owned());
        stages.push(Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?.into());
    }
    stages.push(byte_level(false).into());
    Ok(Sequence::new(stages).into())
}

/// Bytes as printable characters; with `words`, text is cut into words as GPT-2 began it, a space belonging
/// to the word after it.
pub(super) fn byte_level(words: bool) -> ByteLevel {
    let (add_prefix_space, trim_offsets) = (false, true);
    ByteLevel::new(add_prefix_space, trim_offsets, words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_llama_cpp_reads_alike_have_the_same_stages() {
        let stages = |name: &str| {
            let stages = named(name).unwrap().unwrap();
            let pre_tokenizer = serde_json::to_string(&stages.pre_tokenizer).unwrap();
            let normalizer = serde_json::to_string(&stages.normalizer).unwrap();
            (pre_tokenizer, normalizer, stages.ignore_merges, stages.adds_bos)
        };
        for other in ["llama3", "llama-v3", "falcon3"] {
            assert_eq!(stages(other), stages("llama-bpe"));
        }
        assert_eq!(stages("deepseek-r1-qwen"), stages("qwen2"));
        assert!(named("deepseek-v3").is_none());
    }
}
