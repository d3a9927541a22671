//! The tokenizer in a GGUF file, rebuilt for the `tokenizers` crate.

use std::fmt::Display;

use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::processors::template::{SpecialToken, TemplateProcessing};
use tokenizers::{AddedToken, Tokenizer};

use super::pre_tokenizer::{self, Stages, byte_level};
use super::reader::GgufFile;
use super::sentence_piece;
use crate::error::{Error, ErrorKind, Result};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TOKEN_TYPE: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const SCORES: &str = "tokenizer.ggml.scores";
const SPACE_PREFIX: &str = "tokenizer.ggml.add_space_prefix";
const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
const ADD_EOS: &str = "tokenizer.ggml.add_eos_token";
const BOS: &str = "tokenizer.ggml.bos_token_id";
const EOS: &str = "tokenizer.ggml.eos_token_id";
const UNKNOWN_ID: &str = "tokenizer.ggml.unknown_token_id";
const TEMPLATE: &str = "tokenizer.chat_template";

/// The values of `tokenizer.ggml.token_type` that count here, and the largest that llama.cpp has.
const UNKNOWN: u32 = 2;
/// Marks the structure of a text (`<|im_end|>`), is no text itself.
const CONTROL: u32 = 3;
/// One piece of text that the merges must not split.
const USER_DEFINED: u32 = 4;
const MAX_TYPE: u32 = 6;

// Limits far above any real vocabulary, for what takes more time or memory than its bytes in the file.
/// Bytes of all tokens that are found in a text before it is cut.
const MAX_ADDED_BYTES: usize = 1 << 20;
/// Bytes of a token whose merges are to be found: each of its halves is looked up.
const MAX_SCORED_BYTES: usize = 1 << 10;
/// Merges that follow from scores.
const MAX_MERGES: usize = 4 << 20;

/// What a GGUF file knows of turning text into tokens.
#[derive(Debug, Clone)]
pub struct TokenizerParts {
    /// Encodes and decodes. Its post-processor adds what goes around every text, as `add_bos_token` and
    /// `add_eos_token` say; where the file does not say, bos with `llama` and Llama 3's `llama-bpe`.
    pub tokenizer: Tokenizer,
    /// Jinja source that lays out a conversation, where the file has one.
    pub chat_template: Option<String>,
    /// Token that begins a text, where the file names one.
    pub bos_token: Option<String>,
    /// Token that ends a text, where the file names one.
    pub eos_token: Option<String>,
}

impl GgufFile {
    /// The tokenizer, with what belongs to it. Ids are those of the tokenizer in the Hugging Face checkpoint
    /// from which the file was made.
    ///
    /// Two kinds are known, by `tokenizer.ggml.model`: `gpt2`, a byte-level BPE with one of the ways of
    /// cutting text named `llama-bpe`, `qwen2`, `smollm`, `gpt-2` and `default`; and `llama`,
    /// SentencePiece's BPE, whose merges follow from the tokens' scores where the file lists none. Before
    /// each stretch of text between control tokens the latter puts a space, as Llama 2, TinyLlama and
    /// llama.cpp do, unless `add_space_prefix` is false; a checkpoint whose `tokenizer.json` puts one
    /// before a whole text alone (Mistral 0.3) gives other ids after a control token.
    ///
    /// # Errors
    /// When the tokenizer is of another kind, or when its keys are missing or do not fit each other.
    pub fn tokenizer_parts(&self) -> Result<TokenizerParts> {
        let stages = match self.required(MODEL, self.string(MODEL)?)? {
            "gpt2" => Some(self.stages()?),
            "llama" => None,
            model => return Err(Error::unsupported(self.file_path(), MODEL, model, "gpt2, llama")),
        };
        let tokens = self.required(TOKENS, self.strings(TOKENS)?)?;
        let types = self.token_types(tokens.len())?;
        let (adds_bos, mut tokenizer) = match stages {
            Some(stages) => (stages.adds_bos, self.byte_level(&tokens, stages)?),
            None => (true, self.sentence_piece(&tokens, &types)?),
        };
        tokenizer.add_tokens(&self.added_tokens(&tokens, &types)?);
        tokenizer.with_post_processor(self.around(&tokens, adds_bos)?);
        // An empty template would render every conversation as nothing.
        let template = self.string(TEMPLATE)?.filter(|template| !template.trim().is_empty());
        Ok(TokenizerParts {
            tokenizer,
            chat_template: template.map(str::to_owned),
            bos_token: self.token(BOS, &tokens)?.map(|(_, token)| token.to_owned()),
            eos_token: self.token(EOS, &tokens)?.map(|(_, token)| token.to_owned()),
        })
    }

    fn stages(&self) -> Result<Stages> {
        let name = self.required(PRE, self.string(PRE)?)?;
        let stages = pre_tokenizer::named(name)
            .ok_or_else(|| Error::unsupported(self.file_path(), PRE, name, pre_tokenizer::NAMES))?;
        self.built(PRE, stages)
    }

    fn byte_level(&self, tokens: &[&str], stages: Stages) -> Result<Tokenizer> {
        let vocab = self.vocab(tokens)?;
        let merges = self.required(MERGES, self.merges(&vocab)?)?;
        let model =
            BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(stages.ignore_merges);
        let mut tokenizer = Tokenizer::new(self.built(MERGES, model.build())?);
        tokenizer.with_normalizer(stages.normalizer);
        tokenizer.with_pre_tokenizer(Some(stages.pre_tokenizer));
        tokenizer.with_decoder(Some(byte_level(true)));
        Ok(tokenizer)
    }

    fn sentence_piece(&self, tokens: &[&str], types: &[u32]) -> Result<Tokenizer> {
        let vocab = self.vocab(tokens)?;
        let merges = match self.merges(&vocab)? {
            Some(merges) => merges,
            None => self.scored_merges(tokens, &vocab)?,
        };
        let unknown = match self.token(UNKNOWN_ID, tokens)? {
            Some((_, token)) => Some(token),
            None => types.iter().position(|&kind| kind == UNKNOWN).map(|id| tokens[id]),
        };
        let unknown = unknown.filter(|token| !token.is_empty()); // the vocabulary has no empty one
        // Else a character without a token would vanish from the text.
        let lacking =
            (0..=255).map(sentence_piece::byte_token).find(|byte| !vocab.contains_key(byte));
        if let (None, Some(byte)) = (unknown, lacking) {
            let expected = "a token for every byte, or an unknown token";
            return Err(self.malformed_key(TOKENS, expected, format!("no '{byte}', none unknown")));
        }
        let mut model =
            BPE::builder().vocab_and_merges(vocab, merges).fuse_unk(true).byte_fallback(true);
        if let Some(unknown) = unknown {
            model = model.unk_token(unknown.to_owned());
        }
        let space_prefix = self.bool(SPACE_PREFIX)?.unwrap_or(true);
        let mut tokenizer = Tokenizer::new(self.built(MERGES, model.build())?);
        let normalizer = sentence_piece::normalizer(space_prefix);
        tokenizer.with_normalizer(Some(self.built(SPACE_PREFIX, normalizer)?));
        let decoder = sentence_piece::decoder(space_prefix);
        tokenizer.with_decoder(Some(self.built(SPACE_PREFIX, decoder)?));
        Ok(tokenizer)
    }

    fn vocab(&self, tokens: &[&str]) -> Result<Vocab> {
        let mut vocab = Vocab::with_capacity(tokens.len());
        for (id, token) in (0_u32..).zip(tokens) {
            // Some files have several empty tokens, which no text becomes.
            if token.is_empty() {
                continue;
            }
            if let Some(first) = vocab.insert((*token).to_owned(), id) {
                let found = format!("'{token}' at {first} and at {id}");
                return Err(self.malformed_key(TOKENS, "each token once", found));
            }
        }
        Ok(vocab)
    }

    /// The merges that the file lists, if it lists any.
    fn merges(&self, vocab: &Vocab) -> Result<Option<Merges>> {
        let Some(merges) = self.strings(MERGES)? else {
            return Ok(None);
        };
        let expected = "two tokens that make a third, with a space between them";
        let halves = |merge: &str| match merge.split_once(' ') {
            Some((left, right)) if !right.contains(' ') => {
                let made = [left, right].concat();
                match [left, right, &made].into_iter().find(|&token| !vocab.contains_key(token)) {
                    None => Ok((left.to_owned(), right.to_owned())),
                    Some(token) => {
                        let found = format!("'{merge}', but no token '{token}'");
                        Err(self.malformed_key(MERGES, expected, found))
                    }
                }
            }
            _ => Err(self.malformed_key(MERGES, expected, format!("'{merge}'"))),
        };
        merges.into_iter().map(halves).collect::<Result<_>>().map(Some)
    }

    /// The merges that the tokens' scores stand for.
    fn scored_merges(&self, tokens: &[&str], vocab: &Vocab) -> Result<Merges> {
        let scores = self.required(SCORES, self.f32s(SCORES)?)?;
        if scores.len() != tokens.len() {
            let expected = format!("one score for each of {} tokens", tokens.len());
            return Err(self.malformed_key(SCORES, expected, scores.len().to_string()));
        }
        if let Some(id) = scores.iter().position(|score| !score.is_finite()) {
            let found = format!("{} for token {id}", scores[id]);
            return Err(self.malformed_key(SCORES, "finite scores", found));
        }
        if let Some(id) = tokens.iter().position(|token| token.len() > MAX_SCORED_BYTES) {
            let expected = format!("tokens of at most {MAX_SCORED_BYTES} bytes");
            let found = format!("{} in token {id}", tokens[id].len());
            return Err(self.malformed_key(TOKENS, expected, found));
        }
        sentence_piece::merges(vocab, tokens, &scores, MAX_MERGES).ok_or_else(|| {
            let expected = format!("tokens that {MAX_MERGES} merges can make");
            self.malformed_key(TOKENS, expected, "more merges")
        })
    }

    /// What each token is. Without it a chat template's markers would be cut into letters.
    fn token_types(&self, n_tokens: usize) -> Result<Vec<u32>> {
        let types = self.required(TOKEN_TYPE, self.u32s(TOKEN_TYPE)?)?;
        if types.len() != n_tokens {
            let expected = format!("one type for each of {n_tokens} tokens");
            return Err(self.malformed_key(TOKEN_TYPE, expected, types.len().to_string()));
        }
        match types.iter().position(|&kind| kind > MAX_TYPE) {
            Some(id) => {
                let expected = format!("types from 0 to {MAX_TYPE}");
                let found = format!("{} for token {id}", types[id]);
                Err(self.malformed_key(TOKEN_TYPE, expected, found))
            }
            None => Ok(types),
        }
    }

    /// The tokens that are found in a text before it is cut; their ids are those of the vocabulary, which
    /// has them too. None of them is normalised: a space put before a control token would hide it.
    fn added_tokens(&self, tokens: &[&str], types: &[u32]) -> Result<Vec<AddedToken>> {
        let added: Vec<_> = tokens
            .iter()
            .zip(types)
            .filter(|&(_, kind)| [UNKNOWN, CONTROL, USER_DEFINED].contains(kind))
            .map(|(&token, &kind)| AddedToken::from(token, kind != USER_DEFINED).normalized(false))
            .collect();
        let n_bytes: usize = added.iter().map(|token| token.content.len()).sum();
        if n_bytes > MAX_ADDED_BYTES {
            let expected = format!("at most {MAX_ADDED_BYTES} bytes of tokens that are not normal");
            return Err(self.malformed_key(TOKEN_TYPE, expected, n_bytes.to_string()));
        }
        Ok(added)
    }

    /// What goes before and after every text. `adds_bos` holds where the file does not say.
    fn around(&self, tokens: &[&str], adds_bos: bool) -> Result<Option<TemplateProcessing>> {
        let bos = self.added_around(ADD_BOS, adds_bos, BOS, tokens)?;
        let eos = self.added_around(ADD_EOS, false, EOS, tokens)?;
        let named: Vec<_> = [("bos", bos), ("eos", eos)]
            .into_iter()
            .filter_map(|(name, token)| Some((name, token?)))
            .collect();
        if named.is_empty() {
            return Ok(None);
        }
        // The template's names are ours: a token's text may have a sign that means something in it.
        let part = |sequence: &str, kind: u32| {
            let bos = bos.map(|_| format!("bos:{kind}"));
            let eos = eos.map(|_| format!("eos:{kind}"));
            [bos, Some(format!("{sequence}:{kind}")), eos].into_iter().flatten().collect::<Vec<_>>()
        };
        let special: Result<Vec<_>, _> = named
            .into_iter()
            .map(|(name, (id, token))| {
                SpecialToken::new(name.to_owned(), vec![id], vec![token.to_owned()])
            })
            .collect();
        let special = self.built(ADD_BOS, special)?;
        let mut builder = TemplateProcessing::builder();
        self.built(ADD_BOS, builder.try_single(part("$A", 0)))?;
        self.built(ADD_BOS, builder.try_pair([part("$A", 0), part("$B", 1)].concat()))?;
        self.built(ADD_BOS, builder.special_tokens(special).build()).map(Some)
    }

    /// The token under `id_key`, if the file says under `add_key`, or else `default`, that it goes around
    /// every text.
    fn added_around<'a>(
        &self,
        add_key: &str,
        default: bool,
        id_key: &str,
        tokens: &[&'a str],
    ) -> Result<Option<(u32, &'a str)>> {
        let token = self.token(id_key, tokens)?;
        match (self.bool(add_key)?, token) {
            (Some(true), None) => {
                Err(self.malformed_key(id_key, format!("a token, since {add_key} is true"), "none"))
            }
            (Some(false), _) => Ok(None),
            (None, _) if !default => Ok(None),
            (_, token) => Ok(token),
        }
    }

    /// The id under `key`, with its token.
    fn token<'a>(&self, key: &str, tokens: &[&'a str]) -> Result<Option<(u32, &'a str)>> {
        let Some(id) = self.u32(key)? else {
            return Ok(None);
        };
        match tokens.get(id as usize) {
            Some(&token) => Ok(Some((id, token))),
            None => {
                let expected = format!("one of {} tokens", tokens.len());
                Err(self.malformed_key(key, expected, id.to_string()))
            }
        }
    }

    /// What the `tokenizers` crate made from the value under `key`, or why it did not.
    fn built<T>(&self, key: &str, result: Result<T, impl Display>) -> Result<T> {
        result.map_err(|reason| {
            let place = format!("{}: key '{key}'", self.file_path().display());
            ErrorKind::Tokenizer { place, reason: reason.to_string() }.into()
        })
    }
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
    fn llama_bpe_takes_a_word_that_is_a_token_and_three_digits() {
        let words = || {
            Writer::new()
                .key(MODEL, "gpt2")
                .key(TOKENS, ["<s>", "a", "b", "c", "ab", "abc", "1", "2", "12", "\u{120}"])
                .key(TOKEN_TYPE, [3_i32, 1, 1, 1, 1, 1, 1, 1, 1, 1])
                .key(MERGES, ["a b", "1 2"])
                .key(BOS, 0_u32)
        };
        let text = "abc 12121";
        // No merge makes abc. 121 and 21 are words of their own.
        let llama = parts(words().key(PRE, "llama-bpe")).unwrap().tokenizer;
        assert_eq!(ids(&llama, text), [5, 9, 8, 6, 7, 6]);
        let qwen = parts(words().key(PRE, "qwen2")).unwrap().tokenizer;
        assert_eq!(ids(&qwen, text), [4, 3, 9, 6, 7, 6, 7, 6]);
    }

    #[test]
    fn qwen2_composes_accents() {
        // é is the bytes C3 A9, which are written as these two letters.
        let writer = Writer::new()
            .key(MODEL, "gpt2")
            .key(PRE, "qwen2")
            .key(TOKENS, ["\u{c3}", "\u{a9}", "e", "\u{c3}\u{a9}"])
            .key(TOKEN_TYPE, [1_i32; 4])
            .key(MERGES, ["\u{c3} \u{a9}"]);
        assert_eq!(ids(&parts(writer).unwrap().tokenizer, "e\u{301}"), [3]);
    }

    #[test]
    fn what_goes_around_a_text_is_the_files_word_or_the_models_custom() {
        let whole = |writer: Writer| {
            let tokenizer = parts(writer).unwrap().tokenizer;
            assert_eq!(ids(&tokenizer, "ab"), [4]);
            tokenizer.encode("ab", true).unwrap().get_ids().to_vec()
        };
        let named = |pre: &str| small(pre).key(BOS, 1_u32);
        assert_eq!(whole(named("gpt-2")), [4]);
        assert_eq!(whole(named("gpt-2").key(ADD_BOS, true)), [1, 4]);
        assert_eq!(whole(named("gpt-2").key(ADD_BOS, true).key(ADD_EOS, true)), [1, 4, 0]);
        assert_eq!(whole(named("gpt-2").key(ADD_EOS, true)), [4, 0]);
        assert_eq!(whole(named("llama-bpe")), [1, 4]);
        assert_eq!(whole(named("llama-bpe").key(ADD_BOS, false)), [4]);
        assert_eq!(whole(small("llama-bpe")), [4]); // it has none
        refused(small("gpt-2").key(ADD_BOS, true), "a token, since tokenizer.ggml.add_bos_token");
        refused(named("gpt-2").key(ADD_BOS, 1_u32), "true or false");
    }

    #[test]
    fn a_token_with_signs_of_the_template_language_can_go_around() {
        let writer = Writer::new()
            .key(MODEL, "gpt2")
            .key(PRE, "gpt-2")
            .key(TOKENS, ["$A:1 $B", "a"])
            .key(TOKEN_TYPE, [3_i32, 1])
            .key(MERGES, [""; 0])
            .key(BOS, 0_u32)
            .key(ADD_BOS, true);
        let tokenizer = parts(writer).unwrap().tokenizer;
        assert_eq!(tokenizer.encode("a", true).unwrap().get_ids(), [0, 1]);
        assert_eq!(tokenizer.encode(("a", "aa"), true).unwrap().get_ids(), [0, 1, 0, 1, 1]);
    }

    #[test]
    fn an_empty_template_is_none() {
        let writer = keys("gpt-2").key(TOKEN_TYPE, [1_i32; 10]).key(MERGES, ["a b"]);
        assert_eq!(parts(writer.key(TEMPLATE, " \n")).unwrap().chat_template, None);
    }

    /// SentencePiece: unknown, bos, eos, 256 bytes, and pieces from 259 on.
    fn pieces(pieces: &[(&str, f32)]) -> Writer {
        let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
        tokens.extend((0..=255).map(sentence_piece::byte_token));
        let mut scores = vec![0.0; tokens.len()];
        tokens.extend(pieces.iter().map(|(piece, _)| (*piece).to_owned()));
        scores.extend(pieces.iter().map(|(_, score)| score));
        let kinds = [&[2, 3, 3][..], &[6; 256], &vec![1; pieces.len()]].concat();
        Writer::new()
            .key(MODEL, "llama")
            .key(TOKENS, tokens)
            .key(TOKEN_TYPE, kinds)
            .key(SCORES, scores)
            .key(BOS, 1_u32)
            .key(EOS, 2_u32)
    }

    const PIECES: [(&str, f32); 6] = [
        ("\u{2581}a", -1.0),
        ("ab", -2.0),
        ("\u{2581}ab", -3.0),
        ("\u{2581}", -4.0),
        ("a", -5.0),
        ("b", -6.0),
    ];

    #[test]
    fn sentence_piece_merges_by_score_and_falls_back_to_bytes() {
        let tokenizer = parts(pieces(&PIECES)).unwrap().tokenizer;
        // The best score makes _a, of which b makes _ab; then bytes of é; _ and ab for " ab" in a word.
        assert_eq!(ids(&tokenizer, "abé"), [261, 3 + 0xc3, 3 + 0xa9]);
        assert_eq!(ids(&tokenizer, " ab"), [262, 261]);
        assert_eq!(ids(&tokenizer, "bab"), [262, 264, 260]);
        assert!(ids(&tokenizer, "").is_empty());
        assert_eq!(tokenizer.encode("ab", true).unwrap().get_ids(), [1, 261]);
        let around = ids(&tokenizer, "<s>ab</s>\n<unk>");
        assert_eq!(around, [1, 261, 2, 262, 3 + 0x0a, 0]);
        assert_eq!(tokenizer.decode(&around, true).unwrap(), "ab \n");
    }

    #[test]
    fn a_space_goes_before_a_text_unless_the_file_says_no() {
        let tokenizer = parts(pieces(&PIECES).key(SPACE_PREFIX, false)).unwrap().tokenizer;
        assert_eq!(ids(&tokenizer, "ab"), [260]);
        assert_eq!(ids(&tokenizer, " ab"), [261]);
        assert_eq!(tokenizer.decode(&[261], true).unwrap(), " ab");
    }

    #[test]
    fn listed_merges_go_before_scores() {
        let writer = pieces(&PIECES).key(MERGES, ["a b", "\u{2581} ab"]);
        assert_eq!(ids(&parts(writer).unwrap().tokenizer, "aab"), [262, 263, 260]);
    }

    #[test]
    fn without_bytes_a_character_is_unknown() {
        let words = || {
            Writer::new()
                .key(MODEL, "llama")
                .key(TOKENS, ["?", "a", "\u{2581}"])
                .key(SCORES, [0_f32; 3])
        };
        let tokenizer = parts(words().key(TOKEN_TYPE, [2_i32, 1, 1])).unwrap().tokenizer;
        assert_eq!(ids(&tokenizer, "aéü"), [2, 1, 0]);
        let named = words().key(TOKEN_TYPE, [1_i32; 3]).key(UNKNOWN_ID, 0_u32);
        assert_eq!(ids(&parts(named).unwrap().tokenizer, "aé"), [2, 1, 0]);
        refused(words().key(TOKEN_TYPE, [1_i32; 3]), "no '<0x00>', none unknown");
        let empty =
            Writer::new().key(MODEL, "llama").key(TOKENS, ["", "a"]).key(SCORES, [0_f32; 2]);
        refused(empty.key(TOKEN_TYPE, [2_i32, 1]), "none unknown");
    }

    #[test]
    fn empty_tokens_are_passed_over() {
        let tokenizer = parts(pieces(&[("", 0.0), ("", 0.0), ("ab", -1.0)])).unwrap().tokenizer;
        assert_eq!(tokenizer.token_to_id("ab"), Some(261));
        assert_eq!(tokenizer.token_to_id(""), None);
    }

    #[test]
    fn other_tokenizers_are_unsupported() {
        refused(Writer::new().key(MODEL, "bert"), "supported: gpt2, llama");
        refused(small("tekken"), "qwen2, smollm, gpt-2, default");
    }

    #[test]
    fn a_missing_key_is_named() {
        refused(Writer::new(), MODEL);
        refused(Writer::new().key(MODEL, "gpt2"), PRE);
        refused(Writer::new().key(MODEL, "gpt2").key(PRE, "gpt-2"), TOKENS);
        refused(keys("gpt-2"), TOKEN_TYPE);
        refused(keys("gpt-2").key(TOKEN_TYPE, [1_i32; 10]), MERGES);
        let llama = Writer::new().key(MODEL, "llama").key(TOKENS, ["a"]);
        refused(llama.key(TOKEN_TYPE, [2_i32]), SCORES);
    }

    #[test]
    fn keys_that_do_not_fit_each_other_are_malformed() {
        let typed = || keys("gpt-2").key(TOKEN_TYPE, [1_i32; 10]);
        for merge in ["ab", "a b c", "a  b", ""] {
            refused(typed().key(MERGES, [merge]), &format!("found '{merge}'"));
        }
        refused(typed().key(MERGES, ["b a"]), "'b a', but no token 'ba'");
        refused(typed().key(MERGES, ["a x"]), "'a x', but no token 'x'");
        refused(typed().key(MERGES, [" a"]), "' a', but no token ''");
        refused(keys("gpt-2").key(TOKEN_TYPE, [1_i32]), "one type for each of 10 tokens");
        refused(keys("gpt-2").key(TOKEN_TYPE, [-1_i32; 10]), "integers from 0");
        let mut types = [1_u32; 10];
        types[4] = 7;
        refused(keys("gpt-2").key(TOKEN_TYPE, types), "found 7 for token 4");
        for key in [BOS, EOS] {
            refused(typed().key(MERGES, ["a b"]).key(key, 10_u32), "one of 10 tokens");
        }
        let twice = Writer::new().key(MODEL, "gpt2").key(PRE, "gpt-2").key(TOKENS, ["a", "a"]);
        refused(twice.key(TOKEN_TYPE, [1_i32; 2]), "'a' at 0 and at 1");
    }

    #[test]
    fn scores_must_be_numbers_one_for_each_token() {
        let scored = |scores: &[f32]| {
            let tokens = Writer::new().key(MODEL, "llama").key(TOKENS, ["?", "a"]);
            tokens.key(TOKEN_TYPE, [2_i32, 1]).key(SCORES, scores.to_vec())
        };
        refused(scored(&[0.0]), "one score for each of 2 tokens, found 1");
        refused(scored(&[0.0, f32::NAN]), "finite scores, found NaN for token 1");
        refused(scored(&[f32::INFINITY, 0.0]), "found inf for token 0");
        let long = "a".repeat(MAX_SCORED_BYTES + 1);
        let tokens = Writer::new().key(MODEL, "llama").key(TOKENS, ["?", &long]);
        refused(tokens.key(TOKEN_TYPE, [2_i32, 1]).key(SCORES, [0_f32; 2]), "1025 in token 1");
    }

    #[test]
    fn tokens_to_be_found_in_texts_have_a_limit_together() {
        let long = "a".repeat(MAX_ADDED_BYTES + 1);
        let writer = Writer::new().key(MODEL, "gpt2").key(PRE, "gpt-2").key(TOKENS, [long]);
        refused(writer.key(TOKEN_TYPE, [3_i32]).key(MERGES, [""; 0]), "at most 1048576 bytes");
    }
}
