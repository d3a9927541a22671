//! Token ids to text, one id after the other.

use std::fmt;

use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::strip::Strip;
use tokenizers::{Decoder, Error as Cause};

use crate::error::{ErrorKind, Result};
use crate::tokenizer::{Tokenizer, failed};

/// Turns token ids into text as they come, made by [`Tokenizer::stream`].
///
/// The pieces, with the one of [`finish`](Self::finish) at the end, are together what
/// [`Tokenizer::decode`] makes of all ids, for any ids, valid text or not. A piece is there as soon
/// as no id to come can change it, and never ends within a character. A token costs the same at the
/// end of a long text as at its beginning.
///
/// A model of the SentencePiece family writes rare characters as single bytes and decodes a whole run
/// of these at once, valid or not; the text of such a run is given when the run has ended.
///
/// ```no_run
/// let tokenizer = lora_models::Tokenizer::from_folder("SmolLM2-135M-Instruct".as_ref())?;
/// let ids = tokenizer.encode("Where does the owl live?")?;
/// let mut stream = tokenizer.stream()?;
/// for id in ids {
///     print!("{}", stream.push(id)?);
/// }
/// println!("{}", stream.finish()?);
/// # Ok::<(), lora_models::Error>(())
/// ```
//
// The `DecodeStream` of `tokenizers` 0.22 decodes a window of tokens twice and compares the ends of the
// texts. It fails where a later byte token turns a character that was given out into U+FFFD, and has no
// end at which it would give out what it holds back.
pub struct TokenStream {
    tokenizer: Tokenizer,
    stages: Vec<Stage>,
}

impl fmt::Debug for TokenStream {
    // By hand, because a stage holds a decoder of the library, which prints pages.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenStream").field("tokenizer", &self.tokenizer).finish_non_exhaustive()
    }
}

impl TokenStream {
    pub(crate) fn new(tokenizer: Tokenizer, decoder: Option<&DecoderWrapper>) -> Result<Self> {
        let mut stages = Vec::new();
        match decoder {
            Some(decoder) => add_stages(decoder, &mut stages)?,
            None => stages.push(Stage::Spaces { first: true }),
        }
        Ok(Self { tokenizer, stages })
    }

    /// Takes the next id and gives the text that is certain by now, which may be empty.
    ///
    /// # Errors
    /// When the model's decoder refuses the token.
    pub fn push(&mut self, id: u32) -> Result<String> {
        match self.tokenizer.visible_token(id) {
            Some(token) => self.run(vec![token], 0),
            None => Ok(String::new()),
        }
    }

    /// Ends the text and gives what was held back. The stream can be used again, for a new text.
    ///
    /// # Errors
    /// When the model's decoder refuses a token.
    pub fn finish(&mut self) -> Result<String> {
        let mut text = String::new();
        for stage in 0..self.stages.len() {
            let rest = self.stages[stage].finish();
            let rest = rest.map_err(|cause| failed("decoding tokens", cause))?;
            text += &self.run(rest, stage + 1)?;
        }
        Ok(text)
    }

    /// Sends pieces through the stages from the one at `first` on.
    fn run(&mut self, mut pieces: Vec<String>, first: usize) -> Result<String> {
        for stage in &mut self.stages[first..] {
            let mut next = Vec::with_capacity(pieces.len());
            for piece in pieces {
                stage.push(piece, &mut next).map_err(|cause| failed("decoding tokens", cause))?;
            }
            pieces = next;
        }
        Ok(pieces.concat())
    }
}

/// One of the decoders that work on tokens one after the other, with what it holds back.
enum Stage {
    /// Changes each token by itself.
    Each(DecoderWrapper),
    /// Changes the first token otherwise than the others.
    FirstOtherwise { decoder: DecoderWrapper, first: bool },
    /// Changes the last token otherwise than the others, so that one is held back.
    LastOtherwise { decoder: DecoderWrapper, held: Option<String> },
    /// Without a decoder tokens are joined by spaces.
    Spaces { first: bool },
    /// Tokens such as `<0xC3>` are bytes; a run of them is decoded as one.
    Bytes { run: Vec<String> },
    /// The characters of tokens stand for bytes.
    Characters { pending: Vec<u8> },
    /// Takes the given character away from the beginning of the whole text, at most `left` times.
    StripStart { content: char, at_most: usize, left: usize },
}

/// The stages of a decoder. Once tokens were fused, a decoder sees the text as one token, which here
/// comes in pieces, so that few have a meaning there.
fn add_stages(decoder: &DecoderWrapper, stages: &mut Vec<Stage>) -> Result<()> {
    let mut chain = Vec::new();
    flatten(decoder, &mut chain);
    let mut fused = false;
    for decoder in chain {
        let stage = match decoder {
            DecoderWrapper::Fuse(_) => {
                fused = true;
                continue;
            }
            DecoderWrapper::Strip(Strip { content, start, stop: 0, .. }) if fused => {
                Stage::StripStart { content: *content, at_most: *start, left: *start }
            }
            other if fused => return Err(unsupported(other, "after Fuse or ByteLevel")),
            DecoderWrapper::ByteLevel(_) => {
                fused = true; // it joins the tokens, since a character may be cut by two of them
                Stage::Characters { pending: Vec::new() }
            }
            DecoderWrapper::ByteFallback(_) => Stage::Bytes { run: Vec::new() },
            DecoderWrapper::Replace(_) | DecoderWrapper::Strip(Strip { stop: 0, .. }) => {
                Stage::Each(decoder.clone())
            }
            DecoderWrapper::Metaspace(_) | DecoderWrapper::WordPiece(_) => {
                Stage::FirstOtherwise { decoder: decoder.clone(), first: true }
            }
            DecoderWrapper::BPE(_) => Stage::LastOtherwise { decoder: decoder.clone(), held: None },
            DecoderWrapper::CTC(_) | DecoderWrapper::Strip(_) | DecoderWrapper::Sequence(_) => {
                return Err(unsupported(decoder, "in a stream"));
            }
        };
        stages.push(stage);
    }
    Ok(())
}

fn flatten<'a>(decoder: &'a DecoderWrapper, chain: &mut Vec<&'a DecoderWrapper>) {
    match decoder {
        DecoderWrapper::Sequence(sequence) => {
            sequence.get_decoders().iter().for_each(|decoder| flatten(decoder, chain));
        }
        decoder => chain.push(decoder),
    }
}

fn unsupported(decoder: &DecoderWrapper, place: &str) -> crate::error::Error {
    let name = format!("{decoder:?}");
    let name = name.split(['(', ' ']).next().unwrap_or_default();
    ErrorKind::Tokenizer {
        place: "tokenizer.json, decoder".to_owned(),
        reason: format!(
            "{name} cannot be decoded {place}, since what it writes depends on tokens to come; \
             decode all tokens at once"
        ),
    }
    .into()
}

impl Stage {
    fn push(&mut self, token: String, out: &mut Vec<String>) -> Result<(), Cause> {
        match self {
            Self::Each(decoder) => out.extend(decoder.decode_chain(vec![token])?),
            Self::FirstOtherwise { decoder, first } => {
                if std::mem::take(first) {
                    out.extend(decoder.decode_chain(vec![token])?);
                } else {
                    // The token after some other one.
                    out.extend(decoder.decode_chain(vec![String::new(), token])?.pop());
                }
            }
            Self::LastOtherwise { decoder, held } => {
                if let Some(before) = held.replace(token) {
                    // The token before some other one.
                    let mut decoded = decoder.decode_chain(vec![before, String::new()])?;
                    out.push(decoded.swap_remove(0));
                }
            }
            Self::Spaces { first } => {
                let space = if std::mem::take(first) { "" } else { " " };
                out.push(format!("{space}{token}"));
            }
            Self::Bytes { run } if is_byte(&token) => run.push(token),
            Self::Bytes { run } => {
                out.extend(ByteFallback::new().decode_chain(std::mem::take(run))?);
                out.push(token);
            }
            Self::Characters { pending } => {
                let byte = |c: char| BYTE_OF_CHARACTER.get(c as usize).copied().flatten();
                // As in the library: a token with any other character stands for itself.
                match token.chars().map(byte).collect::<Option<Vec<u8>>>() {
                    Some(bytes) => pending.extend(bytes),
                    None => pending.extend(token.as_bytes()),
                }
                let end = pending.len() - unfinished(pending);
                out.push(String::from_utf8_lossy(&pending[..end]).into_owned());
                pending.drain(..end);
            }
            Self::StripStart { content, left, .. } => {
                let mut text = token.as_str();
                while *left > 0
                    && let Some(rest) = text.strip_prefix(*content)
                {
                    text = rest;
                    *left -= 1;
                }
                if !text.is_empty() {
                    *left = 0;
                }
                out.push(text.to_owned());
            }
        }
        Ok(())
    }

    /// What was held back, as the next stage takes it; this one is then as new.
    fn finish(&mut self) -> Result<Vec<String>, Cause> {
        match self {
            Self::Each(_) => {}
            Self::FirstOtherwise { first, .. } | Self::Spaces { first } => *first = true,
            Self::LastOtherwise { decoder, held } => {
                if let Some(last) = held.take() {
                    return decoder.decode_chain(vec![last]);
                }
            }
            Self::Bytes { run } => return ByteFallback::new().decode_chain(std::mem::take(run)),
            Self::Characters { pending } => {
                let rest = String::from_utf8_lossy(pending).into_owned();
                pending.clear();
                return Ok(vec![rest]);
            }
            Self::StripStart { at_most, left, .. } => *left = *at_most,
        }
        Ok(Vec::new())
    }
}

/// Whether [`ByteFallback`] takes the token for a byte.
fn is_byte(token: &str) -> bool {
    let digits = token.strip_prefix("<0x").and_then(|token| token.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
}

/// How many bytes at the end begin a character that is not yet whole.
fn unfinished(bytes: &[u8]) -> usize {
    let mut rest = bytes;
    while let Err(error) = std::str::from_utf8(rest) {
        match error.error_len() {
            Some(length) => rest = &rest[error.valid_up_to() + length..],
            None => return rest.len() - error.valid_up_to(),
        }
    }
    0
}

/// One more than the last character that stands for a byte.
const ALPHABET: usize = 0x144;

/// Which byte a character stands for in the vocabularies of GPT-2 and its kin: those of Latin-1 that
/// can be seen stand for themselves, the other bytes in their order for the characters from U+0100 on.
static BYTE_OF_CHARACTER: [Option<u8>; ALPHABET] = {
    let mut bytes = [None; ALPHABET];
    let mut hidden = 0x100;
    let mut byte = 0;
    while byte <= 0xff {
        let character = match byte {
            0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => byte,
            _ => {
                hidden += 1;
                hidden - 1
            }
        };
        bytes[character] = Some(byte as u8);
        byte += 1;
    }
    bytes
};

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;
    use serde_json::{Value as Json, json};

    use super::*;
    use crate::template::ChatTemplates;

    static ALL: LazyLock<Vec<(&str, Tokenizer)>> = LazyLock::new(all);

    /// A tokenizer with the given tokens from id 0 on, and one special one after them.
    fn tokenizer(tokens: &[String], decoder: Json) -> Tokenizer {
        let vocab: serde_json::Map<String, Json> =
            tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
        let special = json!({
            "id": tokens.len(), "content": "<end>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true,
        });
        let json = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [special],
            "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": decoder,
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null,
                "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
                "byte_fallback": true, "vocab": vocab, "merges": [],
            },
        });
        let tokenizer = tokenizers::Tokenizer::from_bytes(json.to_string()).unwrap();
        Tokenizer::with_templates(tokenizer, ChatTemplates::default()).unwrap()
    }

    fn byte_level_decoder() -> Json {
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true})
    }

    /// All bytes, some pieces of several bytes that cut characters, and one that is no such piece.
    fn byte_level() -> Tokenizer {
        let character = |byte: u8| {
            let place = BYTE_OF_CHARACTER.iter().position(|found| *found == Some(byte)).unwrap();
            char::from_u32(place as u32).unwrap()
        };
        let piece = |bytes: &[u8]| bytes.iter().map(|byte| character(*byte)).collect::<String>();
        let mut tokens: Vec<String> = (0..=255).map(|byte| piece(&[byte])).collect();
        let pieces: [&[u8]; 5] =
            [b" the", b"\xc3\xa9\xf0\x9f", b"\x98\x80!", b"\xe6\x97\xa5\xe6", b"\x9c\xac"];
        tokens.extend(pieces.map(piece));
        tokens.push("日本".to_owned());
        tokenizer(&tokens, byte_level_decoder())
    }

    /// The decoder of Llama 2 and its kin.
    fn sentence_piece_decoder() -> Json {
        json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]})
    }

    fn sentence_piece(decoder: Json) -> Tokenizer {
        let mut tokens: Vec<String> = (0..=255).map(|byte| format!("<0x{byte:02X}>")).collect();
        let pieces =
            ["▁", "▁▁", "▁the", "é", "a", "", "日本", "<0x+5>", "<0xé>", "##x", ".", "</w>"];
        tokens.extend(pieces.map(str::to_owned));
        tokenizer(&tokens, decoder)
    }

    /// Every decoder that streams, by name.
    fn all() -> Vec<(&'static str, Tokenizer)> {
        let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
        let sequence = |decoders: Json| json!({"type": "Sequence", "decoders": decoders});
        let replace = json!({"type": "Replace", "pattern": {"Regex": "▁+"}, "content": " "});
        let fallback = json!({"type": "ByteFallback"});
        let strip = json!({"type": "Strip", "content": "▁", "start": 2, "stop": 0});
        let strip_spaces = json!({"type": "Strip", "content": " ", "start": 3, "stop": 0});
        vec![
            ("byte level", byte_level()),
            ("SentencePiece", sentence_piece(sentence_piece_decoder())),
            ("Gemma", sentence_piece(sequence(json!([replace, fallback, {"type": "Fuse"}])))),
            ("Metaspace", sentence_piece(metaspace.clone())),
            ("fallback and Metaspace", sentence_piece(sequence(json!([fallback, metaspace])))),
            ("stripped tokens", sentence_piece(sequence(json!([strip, fallback])))),
            (
                "byte level, stripped",
                sentence_piece(sequence(json!([byte_level_decoder(), strip_spaces]))),
            ),
            (
                "WordPiece",
                sentence_piece(json!({"type": "WordPiece", "prefix": "##", "cleanup": true})),
            ),
            ("BPE", sentence_piece(json!({"type": "BPEDecoder", "suffix": "</w>"}))),
            ("none", sentence_piece(Json::Null)),
        ]
    }

    fn streamed(stream: &mut TokenStream, ids: &[u32]) -> String {
        let mut text = String::new();
        for id in ids {
            text += &stream.push(*id).unwrap();
        }
        text + &stream.finish().unwrap()
    }

    /// Ids with a preference for bytes that make and break characters, and for white space.
    fn ids() -> impl Strategy<Value = Vec<u32>> {
        let bytes = "é日😀 a".bytes().map(u32::from).collect::<Vec<_>>();
        let id = prop_oneof![
            4 => proptest::sample::select(bytes),
            4 => 256_u32..272, // pieces, the special token and ids that there are not
            2 => 0_u32..256,
        ];
        proptest::collection::vec(id, 0..24)
    }

    proptest! {
        #[test]
        fn pieces_are_together_what_decode_gives(ids in ids(), again in ids()) {
            for (name, tokenizer) in ALL.iter() {
                let mut stream = tokenizer.stream().unwrap();
                prop_assert_eq!(streamed(&mut stream, &ids), tokenizer.decode(&ids).unwrap(), "{}", name);
                prop_assert_eq!(streamed(&mut stream, &again), tokenizer.decode(&again).unwrap(), "{}, again", name);
            }
        }
    }

    #[test]
    fn characters_are_given_when_they_are_whole() {
        let mut stream = byte_level().stream().unwrap();
        let mut push = |byte: u8| stream.push(byte.into()).unwrap();
        assert_eq!(push(b'a'), "a");
        let pieces: Vec<String> = "😀é".bytes().map(&mut push).collect();
        assert_eq!(pieces, ["", "", "", "😀", "", "é"]);
        // A beginning that a byte does not continue is one replacement, given with what follows.
        assert_eq!([push(0xf0), push(0x9f), push(b'b')], ["", "", "\u{fffd}b"]);
        assert_eq!([push(0xff), push(0xc3)], ["\u{fffd}", ""]);
        assert_eq!(stream.finish().unwrap(), "\u{fffd}");
        assert_eq!(stream.finish().unwrap(), "");
    }

    #[test]
    fn a_run_of_byte_tokens_is_given_at_its_end() {
        let tokenizer = sentence_piece(sentence_piece_decoder());
        let mut stream = tokenizer.stream().unwrap();
        let mut push = |token: &str| stream.push(tokenizer.token_id(token).unwrap()).unwrap();
        assert_eq!([push("▁the"), push("▁")], ["the", " "]);
        assert_eq!([push("<0xC3>"), push("<0xA9>"), push("a")], ["", "", "éa"]);
        // One bad byte spoils the whole run, so that nothing of it could have been given before.
        assert_eq!([push("<0xC3>"), push("<0xA9>"), push("<0xFF>")], ["", "", ""]);
        assert_eq!(stream.finish().unwrap(), "\u{fffd}\u{fffd}\u{fffd}");
    }

    #[test]
    fn special_tokens_and_unknown_ids_give_nothing() {
        let tokenizer = sentence_piece(sentence_piece_decoder());
        let mut stream = tokenizer.stream().unwrap();
        let end = tokenizer.token_id("<end>").unwrap();
        assert_eq!(streamed(&mut stream, &[end, end + 1, u32::MAX]), "");
        // The space is taken away from the first text, not from the special token before it.
        let the = tokenizer.token_id("▁the").unwrap();
        assert_eq!(streamed(&mut stream, &[end, the, the]), "the the");
    }

    #[test]
    fn what_is_held_back_does_not_grow() {
        let mut stream = byte_level().stream().unwrap();
        for byte in std::iter::repeat_n(*b"\xf0\x9f\x98\x80\xf0\x9f", 1000).flatten() {
            stream.push(byte.into()).unwrap();
            let [Stage::Characters { pending }] = &stream.stages[..] else { panic!() };
            assert!(pending.len() < 4);
        }
    }

    #[test]
    fn the_alphabet_is_that_of_the_library() {
        let characters: Vec<char> = (0..ALPHABET)
            .filter(|place| BYTE_OF_CHARACTER[*place].is_some())
            .filter_map(|place| char::from_u32(place as u32))
            .collect();
        let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        assert_eq!(characters.len(), 256);
        assert!(characters.iter().all(|c| alphabet.contains(c)));
        assert_eq!(byte_level().decode(&[b'\n'.into(), b'~'.into(), 0xad]).unwrap(), "\n~\u{fffd}");
    }

    #[test]
    fn decoders_that_need_the_whole_text_are_refused() {
        let sequence = |decoders: Json| json!({"type": "Sequence", "decoders": decoders});
        let fuse = json!({"type": "Fuse"});
        let replace = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "b"});
        let strip =
            |stop: usize| json!({"type": "Strip", "content": " ", "start": 0, "stop": stop});
        let ctc =
            json!({"type": "CTC", "pad_token": "", "word_delimiter_token": "|", "cleanup": true});
        for (decoder, name) in [
            (ctc, "CTC cannot be decoded in a stream"),
            (strip(1), "Strip cannot be decoded in a stream"),
            (sequence(json!([fuse, strip(1)])), "Strip cannot be decoded after Fuse"),
            (sequence(json!([fuse, replace])), "Replace cannot be decoded after Fuse"),
            (sequence(json!([byte_level_decoder(), replace])), "Replace cannot be decoded after"),
        ] {
            let error = sentence_piece(decoder).stream().unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::Tokenizer { .. }));
            let text = error.to_string();
            assert!(text.contains(name) && text.contains("decode all tokens at once"), "{text}");
        }
    }

    #[test]
    fn a_text_without_a_token_is_empty_with_every_decoder() {
        for (name, tokenizer) in ALL.iter() {
            let end = tokenizer.token_id("<end>").unwrap();
            for ids in [vec![], vec![end]] {
                assert_eq!(tokenizer.decode(&ids).unwrap(), "", "{name}");
                assert_eq!(streamed(&mut tokenizer.stream().unwrap(), &ids), "", "{name}");
            }
        }
    }

    #[test]
    fn debug_is_short() {
        assert!(format!("{:?}", byte_level().stream().unwrap()).len() < 300);
    }
}
