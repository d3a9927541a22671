//! SentencePiece's BPE (Llama 1 and 2, TinyLlama, Mistral) in the terms of the `tokenizers` crate.

use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{Merges, Vocab};
use tokenizers::normalizers::{Prepend, Replace, Sequence as Normalizers};
use tokenizers::{DecoderWrapper, NormalizerWrapper, Result as TokenizersResult};

/// Stands for a space.
const SPACE: &str = "\u{2581}";

/// What happens to each stretch of text between control tokens: a space goes before it, with
/// `space_prefix`, and every space becomes the sign that stands for one.
///
/// Llama 2's `tokenizer.json` and llama.cpp do the same. Newer files of Hugging Face (Mistral 0.3) put
/// a space at the start of a whole text alone, and only where there is none; a GGUF file does not
/// tell the two apart.
pub(super) fn normalizer(space_prefix: bool) -> TokenizersResult<NormalizerWrapper> {
    let mut stages: Vec<NormalizerWrapper> = vec![Replace::new(" ", SPACE)?.into()];
    if space_prefix {
        stages.insert(0, Prepend::new(SPACE.to_owned()).into());
    }
    Ok(Normalizers::new(stages).into())
}

/// The way back: spaces, bytes, and without the space that went before the text.
pub(super) fn decoder(space_prefix: bool) -> TokenizersResult<DecoderWrapper> {
    let mut stages: Vec<DecoderWrapper> =
        vec![Replace::new(SPACE, " ")?.into(), ByteFallback::new().into(), Fuse::new().into()];
    if space_prefix {
        stages.push(Strip::new(' ', 1, 0).into());
    }
    Ok(Decoders::new(stages).into())
}

/// Name of the token of a byte that no other token covers.
pub(super) fn byte_token(byte: u8) -> String {
    format!("<0x{byte:02X}>")
}

/// Each way of making a token out of two others, the best first: the made token's score, then the longer
/// left half, as Hugging Face's `generate_merges` orders them. `None` where there are more than `max`.
///
/// SentencePiece itself goes by the score alone and takes the leftmost of equals; the two differ where
/// one token can be made in two ways that overlap in a text.
pub(super) fn merges(vocab: &Vocab, tokens: &[&str], scores: &[f32], max: usize) -> Option<Merges> {
    let mut merges = Vec::new();
    for (&token, &score) in tokens.iter().zip(scores) {
        let n_chars = token.chars().count();
        for (left_chars, (at, _)) in token.char_indices().enumerate().skip(1) {
            let (left, right) = token.split_at(at);
            if vocab.contains_key(left) && vocab.contains_key(right) {
                merges.push((score, left_chars, n_chars - left_chars, left, right));
            }
        }
        if merges.len() > max {
            return None;
        }
    }
    // Stable: of equals, those of the earlier token come first. Scores are finite.
    merges.sort_by(|one, other| {
        let key =
            |&(score, left, right, ..): &(f32, usize, usize, &str, &str)| (score, left, right);
        key(other).partial_cmp(&key(one)).unwrap_or(std::cmp::Ordering::Equal)
    });
    Some(merges.into_iter().map(|(.., left, right)| (left.to_owned(), right.to_owned())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(tokens: &[(&str, f32)]) -> Vec<String> {
        let (names, scores): (Vec<_>, Vec<_>) = tokens.iter().copied().unzip();
        let vocab: Vocab = (0..).zip(&names).map(|(id, name)| ((*name).to_owned(), id)).collect();
        let merges = merges(&vocab, &names, &scores, 100).unwrap();
        merges.into_iter().map(|(left, right)| format!("{left} {right}")).collect()
    }

    #[test]
    fn the_made_tokens_score_decides_then_the_longer_left_half() {
        let letters = [("a", 0.0), ("b", 0.0), ("é", 0.0)];
        let made = [("ab", -2.0), ("bé", -1.0), ("abé", -3.0)];
        assert_eq!(pairs(&[&letters[..], &made].concat()), ["b é", "a b", "ab é", "a bé"]);
    }

    #[test]
    fn of_equals_the_earlier_token_comes_first_and_minus_zero_is_zero() {
        let tokens = [("a", 0.0), ("b", 0.0), ("ba", -0.0), ("ab", 0.0)];
        assert_eq!(pairs(&tokens), ["b a", "a b"]);
    }

    #[test]
    fn too_many_are_none() {
        let vocab: Vocab =
            [("a".to_owned(), 0), ("aa".to_owned(), 1), ("aaa".to_owned(), 2)].into();
        assert_eq!(merges(&vocab, &["a", "aa", "aaa"], &[0.0; 3], 2), None);
        assert_eq!(merges(&vocab, &["a", "aa", "aaa"], &[0.0; 3], 3).map(|m| m.len()), Some(3));
    }

    #[test]
    fn a_byte_has_two_upper_case_digits() {
        assert_eq!((byte_token(10), byte_token(0xfe)), ("<0x0A>".to_owned(), "<0xFE>".to_owned()));
    }
}
