//! The tokenizer in a GGUF file, rebuilt for the `tokenizers` crate.

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, PreTokenizerWrapper, Tokenizer};

use super::reader::GgufFile;
use crate::error::{Error, ErrorKind, Result};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TOKEN_TYPE: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";

/// Of `tokenizer.ggml.token_type`: marks the structure of a text (`<|im_end|>`), is no text itself.
const CONTROL: u32 = 3;
/// Of `tokenizer.ggml.token_type`: one piece of text that the merges must not split.
const USER_DEFINED: u32 = 4;

/// What a GGUF file knows of turning text into tokens.
#[derive(Debug, Clone)]
pub struct TokenizerParts {
    /// Encodes and decodes.
    pub tokenizer: Tokenizer,
    /// Jinja source that lays out a conversation, where the file has one.
    pub chat_template: Option<String>,
    /// Token that begins a text, where the file names one.
    pub bos_token: Option<String>,
    /// Token that ends a text, where the file names one.
    pub eos_token: Option<String>,
}

impl GgufFile {
    /// The tokenizer, with what belongs to it.
    ///
    /// # Errors
    /// When the tokenizer is not a byte-level BPE (`gpt2`) with a known way of splitting text, or
    /// when its keys are missing or do not fit each other.
    pub fn tokenizer_parts(&self) -> Result<TokenizerParts> {
        self.refuse_other_models()?;
        let pre_tokenizer = self.pre_tokenizer()?;
        let tokens = self.required(TOKENS, self.strings(TOKENS)?)?;

        let model = self.bpe(&tokens)?;
        let mut tokenizer = Tokenizer::new(model);
        tokenizer.with_pre_tokenizer(Some(pre_tokenizer));
        tokenizer.with_decoder(Some(byte_level()));
        let (control, user_defined) = self.added_tokens(&tokens)?;
        tokenizer.add_special_tokens(&control);
        tokenizer.add_tokens(&user_defined);

        Ok(TokenizerParts {
            tokenizer,
            chat_template: self.string("tokenizer.chat_template")?.map(str::to_owned),
            bos_token: self.token_text("tokenizer.ggml.bos_token_id", &tokens)?,
            eos_token: self.token_text("tokenizer.ggml.eos_token_id", &tokens)?,
        })
    }

    fn refuse_other_models(&self) -> Result<()> {
        let model = self.required(MODEL, self.string(MODEL)?)?;
        if model != "gpt2" {
            return Err(Error::unsupported(self.file_path(), MODEL, model, "gpt2"));
        }
        // Each adds a token to every text. Passed over, prompts would differ from the training's.
        for key in ["tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token"] {
            if self.bool(key)? == Some(true) {
                return Err(Error::unsupported(self.file_path(), key, "true", "false"));
            }
        }
        Ok(())
    }

    /// How text is cut into words before the merges, by llama.cpp's name for it. The file does not
    /// hold the rule itself, so an unknown name cannot be guessed.
    fn pre_tokenizer(&self) -> Result<PreTokenizerWrapper> {
        match self.required(PRE, self.string(PRE)?)? {
            "smollm" => {
                let digits = Digits::new(true);
                Ok(Sequence::new(vec![digits.into(), byte_level().into()]).into())
            }
            "gpt-2" => Ok(byte_level().into()),
            pre => {
                let supported = "smollm, gpt-2";
                Err(Error::unsupported(self.file_path(), PRE, pre, supported))
            }
        }
    }

    fn bpe(&self, tokens: &[&str]) -> Result<BPE> {
        let mut vocab = Vocab::with_capacity(tokens.len());
        for (id, token) in (0_u32..).zip(tokens) {
            if let Some(first) = vocab.insert((*token).to_owned(), id) {
                let found = format!("'{token}' at {first} and at {id}");
                return Err(self.malformed_key(TOKENS, "each token once", found));
            }
        }
        let merges = self
            .required(MERGES, self.strings(MERGES)?)?
            .into_iter()
            .map(|merge| match merge.split_once(' ') {
                Some((left, right))
                    if !left.is_empty() && !right.is_empty() && !right.contains(' ') =>
                {
                    Ok((left.to_owned(), right.to_owned()))
                }
                _ => {
                    let expected = "two tokens with a space between them";
                    Err(self.malformed_key(MERGES, expected, format!("'{merge}'")))
                }
            })
            .collect::<Result<Vec<_>>>()?;

        BPE::builder().vocab_and_merges(vocab, merges).build().map_err(|reason| {
            let place = format!("{}: key '{MERGES}'", self.file_path().display());
            ErrorKind::Tokenizer { place, reason: reason.to_string() }.into()
        })
    }

    /// The control tokens and the user-defined tokens: both are found in a text before it is cut.
    /// Their ids are those of the vocabulary, which has them too.
    fn added_tokens(&self, tokens: &[&str]) -> Result<(Vec<AddedToken>, Vec<AddedToken>)> {
        // Without the types a chat template's markers would be cut into letters.
        let types = self.required(TOKEN_TYPE, self.u32s(TOKEN_TYPE)?)?;
        if types.len() != tokens.len() {
            let expected = format!("one type for each of {} tokens", tokens.len());
            return Err(self.malformed_key(TOKEN_TYPE, expected, types.len().to_string()));
        }
        let of_type = |wanted: u32| {
            let special = wanted == CONTROL;
            tokens
                .iter()
                .zip(&types)
                .filter(move |&(_, &token_type)| token_type == wanted)
                .map(move |(&token, _)| AddedToken::from(token, special))
                .collect()
        };
        Ok((of_type(CONTROL), of_type(USER_DEFINED)))
    }

    fn token_text(&self, key: &str, tokens: &[&str]) -> Result<Option<String>> {
        let Some(id) = self.u32(key)? else {
            return Ok(None);
        };
        match tokens.get(id as usize) {
            Some(&token) => Ok(Some(token.to_owned())),
            None => {
                let expected = format!("one of {} tokens", tokens.len());
                Err(self.malformed_key(key, expected, id.to_string()))
            }
        }
    }
}

/// Bytes as printable characters, a space belonging to the word after it, as GPT-2 began it.
fn byte_level() -> ByteLevel {
    let (add_prefix_space, trim_offsets, use_regex) = (false, true, true);
    ByteLevel::new(add_prefix_space, trim_offsets, use_regex)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::writer::Writer;

    const WORDS: [&str; 10] =
        ["<|end|>", "<think>", "a", "b", "ab", "1", "2", "12", "\u{120}", "\u{120}a"];

    fn keys(pre: &str) -> Writer {
        Writer::new().key(MODEL, "gpt2").key(PRE, pre).key(TOKENS, WORDS)
    }

    fn small(pre: &str) -> Writer {
        keys(pre)
            .key(TOKEN_TYPE, [3_i32, 4, 1, 1, 1, 1, 1, 1, 1, 1])
            .key(MERGES, ["a b", "1 2", "\u{120} a"])
            .key("tokenizer.ggml.eos_token_id", 0_u32)
            .key("tokenizer.chat_template", "{{ messages }}")
    }

    fn parts(writer: Writer) -> Result<TokenizerParts> {
        GgufFile::open(writer.write().path())?.tokenizer_parts()
    }

    fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
        tokenizer.encode(text, false).unwrap().get_ids().to_vec()
    }

    fn refused(writer: Writer, part: &str) {
        let error = parts(writer).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }

    #[test]
    fn merges_added_tokens_and_spaces() {
        let parts = parts(small("gpt-2")).unwrap();
        assert_eq!(ids(&parts.tokenizer, "ab a12<|end|><think>b"), [4, 9, 7, 0, 1, 3]);
        assert_eq!(parts.chat_template.as_deref(), Some("{{ messages }}"));
        assert_eq!((parts.bos_token, parts.eos_token.as_deref()), (None, Some("<|end|>")));
    }

    #[test]
    fn smollm_takes_digits_apart() {
        let parts = parts(small("smollm")).unwrap();
        assert_eq!(ids(&parts.tokenizer, "ab12"), [4, 5, 6]);
    }

    #[test]
    fn decoding_gives_the_text_back_and_can_skip_control_tokens() {
        let tokenizer = parts(small("smollm")).unwrap().tokenizer;
        let ids = ids(&tokenizer, "ab a12<think><|end|>");
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), "ab a12<think><|end|>");
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), "ab a12<think>");
    }

    #[test]
    fn other_tokenizers_are_unsupported() {
        refused(Writer::new().key(MODEL, "llama"), "supported: gpt2");
        refused(small("llama-bpe"), "supported: smollm, gpt-2");
        // llama.cpp's rule of that name is another one.
        refused(small("default"), "supported: smollm, gpt-2");
        refused(small("gpt-2").key("tokenizer.ggml.add_bos_token", true), "add_bos_token");
    }

    #[test]
    fn a_missing_key_is_named() {
        refused(Writer::new(), MODEL);
        refused(Writer::new().key(MODEL, "gpt2"), PRE);
        refused(Writer::new().key(MODEL, "gpt2").key(PRE, "gpt-2"), TOKENS);
        refused(keys("gpt-2"), MERGES);
        refused(keys("gpt-2").key(MERGES, ["a b"]), TOKEN_TYPE);
    }

    #[test]
    fn keys_that_do_not_fit_each_other_are_malformed() {
        refused(keys("gpt-2").key(MERGES, ["ab"]), "found 'ab'");
        refused(keys("gpt-2").key(MERGES, ["a b c"]), "found 'a b c'");
        refused(keys("gpt-2").key(MERGES, ["b a"]), "out of vocabulary");
        let merged = || keys("gpt-2").key(MERGES, ["a b"]);
        refused(merged().key(TOKEN_TYPE, [1_i32]), "one type for each of 10 tokens");
        let typed = merged().key(TOKEN_TYPE, [1_i32; 10]);
        refused(typed.key("tokenizer.ggml.eos_token_id", 10_u32), "one of 10 tokens");
        let twice = Writer::new().key(MODEL, "gpt2").key(PRE, "gpt-2").key(TOKENS, ["a", "a"]);
        refused(twice, "'a' at 0 and at 1");
    }
}
