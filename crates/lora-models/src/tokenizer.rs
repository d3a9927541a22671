//! Text to token ids and back.

use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result, shown};
use crate::message::Message;
use crate::template::{ChatTemplates, MarkedText, RenderOptions};
use crate::token_stream::TokenStream;

pub(crate) const TOKENIZER_FILE: &str = "tokenizer.json";
/// For messages.
const ENCODING: &str = "encoding a text";

/// A model's vocabulary together with its chat templates. Cloning it copies handles.
///
/// Nothing is added to a text behind the caller's back: a beginning-of-text token is there only if
/// the text, or the template that rendered it, has one. Special tokens that stand in a text are
/// recognised, also in what a user typed; whoever serves strangers has to filter those out first.
#[derive(Clone)]
pub struct Tokenizer {
    tokenizer: Arc<tokenizers::Tokenizer>,
    templates: Arc<ChatTemplates>,
    render_options: Arc<RenderOptions>,
    vocab_size: usize,
    /// Ids from here on are none of the model's.
    embedding_rows: usize,
}

impl fmt::Debug for Tokenizer {
    // By hand, because the derived form would print the whole vocabulary.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size)
            .field("templates", &self.templates)
            .field("render_options", &self.render_options)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads the tokenizer of a Hugging Face model folder.
    ///
    /// `tokenizer.json` must be there. Chat templates and special tokens are read as
    /// [`ChatTemplates::from_folder`] says; they may be absent.
    ///
    /// # Errors
    /// When a file cannot be read, is damaged, or holds a template that does not parse.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let path = folder.join(TOKENIZER_FILE);
        let bytes = std::fs::read(&path).map_err(|source| Error::io(&path, source))?;
        let refused = |problem: String| ErrorKind::Tokenizer {
            place: path.display().to_string(),
            reason: format!(
                "expected a tokenizer.json of Hugging Face's tokenizers library, found one that it \
                 cannot read ({}); download the file again",
                shown(&problem)
            ),
        };
        check_merges(&bytes).map_err(refused)?;
        let tokenizer = tokenizers::Tokenizer::from_bytes(bytes)
            .map_err(|source| refused(source.to_string()))?;
        if let Some(post_processor) = tokenizer.get_post_processor() {
            // As the library itself writes it, it has one form.
            serde_json::to_value(post_processor)
                .and_then(Around::deserialize)
                .map_err(|source| source.to_string())
                .and_then(|around| around.check())
                .map_err(refused)?;
        }
        Self::with_templates(tokenizer, ChatTemplates::from_folder(folder)?)
    }

    /// Puts a tokenizer together from its parts, as a GGUF file gives them.
    ///
    /// # Errors
    /// When the template does not parse, so that a broken one is met here and not at the first row.
    pub fn new(
        tokenizer: tokenizers::Tokenizer,
        chat_template: Option<String>,
        bos_token: Option<String>,
        eos_token: Option<String>,
    ) -> Result<Self> {
        let mut templates = ChatTemplates::default();
        if let Some(template) = chat_template {
            templates = templates.with_default(template)?;
        }
        for (name, token) in [("bos_token", bos_token), ("eos_token", eos_token)] {
            if let Some(token) = token {
                templates = templates.with_special_token(name, token);
            }
        }
        Self::with_templates(tokenizer, templates)
    }

    /// Puts a tokenizer together with chat templates and special tokens of any number.
    ///
    /// Truncation and padding that are stored in `tokenizer` are switched off: they belong to the
    /// program that saved it, and would cut training rows without a word.
    ///
    /// # Errors
    /// When the truncation cannot be switched off.
    pub fn with_templates(
        mut tokenizer: tokenizers::Tokenizer,
        templates: ChatTemplates,
    ) -> Result<Self> {
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|source| failed("switching off truncation", source))?;
        tokenizer.set_encode_special_tokens(false); // "false" means: recognise them in a text

        // The largest id counts, not the number of entries: a vocabulary may have holes.
        let largest = tokenizer.get_vocab(true).into_values().max();
        let vocab_size = largest.map_or(0, |id| id as usize + 1);
        Ok(Self {
            tokenizer: Arc::new(tokenizer),
            templates: Arc::new(templates),
            render_options: Arc::default(),
            vocab_size,
            embedding_rows: usize::MAX,
        })
    }

    /// The same tokenizer for a model whose embedding has `rows` rows.
    ///
    /// Tokens that were added to the vocabulary by name may have ids beyond them, as a `<pad>` that
    /// somebody added to a tokenizer and not to the model: models like that work until the token stands in a
    /// text, which is an error of [`encode`](Self::encode).
    ///
    /// # Errors
    /// When the vocabulary itself has such ids, and so is another model's.
    pub fn for_embedding(mut self, rows: usize) -> Result<Self> {
        let vocabulary = self.tokenizer.get_vocab(false).into_iter();
        match vocabulary.max_by_key(|(_, id)| *id).filter(|(_, id)| *id as usize >= rows) {
            None => {
                self.embedding_rows = rows;
                Ok(self)
            }
            Some((token, id)) => Err(ErrorKind::Argument {
                what: "the tokenizer",
                expected: format!(
                    "a vocabulary of at most {rows} tokens, as the model's embedding has"
                ),
                found: format!("'{token}' with the id {id}; take the tokenizer of this model"),
            }
            .into()),
        }
    }

    /// The same tokenizer, whose [`render`](Self::render) takes these options but for
    /// `add_generation_prompt`: a date, or a variable such as `enable_thinking`, for all that a
    /// program renders, training rows too.
    pub fn with_render_options(mut self, options: RenderOptions) -> Self {
        self.render_options = Arc::new(options);
        self
    }

    /// Turns a text into token ids. Special tokens in the text are recognised; none are added.
    ///
    /// # Errors
    /// When the vocabulary has no token for a piece of the text, and none that stands for unknown; when a
    /// token is none of the model's ([`for_embedding`](Self::for_embedding)).
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.ids(text, false)
    }

    fn ids(&self, text: &str, adds_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, adds_special_tokens);
        let encoding = encoding.map_err(|source| failed(ENCODING, source))?;
        let ids = encoding.get_ids();
        match ids.iter().find(|id| **id as usize >= self.embedding_rows) {
            None => Ok(ids.to_vec()),
            Some(id) => {
                let token = self.tokenizer.id_to_token(*id).unwrap_or_default();
                let rows = self.embedding_rows;
                let reason = format!(
                    "expected ids below {rows}, the rows of the model's embedding, found '{token}' with \
                     the id {id}; leave it out of the text, or give the model a row for it"
                );
                Err(ErrorKind::Tokenizer { place: format!("tokenizer, {ENCODING}"), reason }.into())
            }
        }
    }

    /// Turns a text into token ids with the tokens that the tokenizer puts around a text by itself, such
    /// as one that begins every text. For a model without a chat template.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_whole_text(&self, text: &str) -> Result<Vec<u32>> {
        self.ids(text, true)
    }

    /// Turns token ids into a text, leaving special tokens out, and ids that the vocabulary lacks.
    ///
    /// # Errors
    /// When the model's decoder refuses the tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        // Some decoders of the library count from the last token and so end the program without one.
        if !ids.iter().any(|id| self.visible_token(*id).is_some()) {
            return Ok(String::new());
        }
        self.tokenizer.decode(ids, true).map_err(|source| failed("decoding tokens", source))
    }

    /// Turns token ids into text as they come, one after the other.
    ///
    /// # Errors
    /// When the model's decoder cannot work on a part of a text, as those of speech models.
    pub fn stream(&self) -> Result<TokenStream> {
        TokenStream::new(self.clone(), self.tokenizer.get_decoder())
    }

    /// The token of an id, unless it is special or there is none.
    pub(crate) fn visible_token(&self, id: u32) -> Option<String> {
        let token = self.tokenizer.id_to_token(id)?;
        let special = self.tokenizer.get_added_vocabulary().is_special_token(&token);
        (!special).then_some(token)
    }

    /// Renders a conversation as the model was trained to see it, as Hugging Face's
    /// `apply_chat_template(..., tokenize=False)` does.
    ///
    /// With `add_generation_prompt` the text ends where the assistant's answer begins. Tools, a date
    /// and all else go through [`render_with`](Self::render_with) or
    /// [`with_render_options`](Self::with_render_options).
    ///
    /// # Errors
    /// When the model has no chat template, or the template refuses these messages.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        if self.render_options.add_generation_prompt == add_generation_prompt {
            return self.render_with(messages, &self.render_options);
        }
        let options = RenderOptions { add_generation_prompt, ..(*self.render_options).clone() };
        self.render_with(messages, &options)
    }

    /// As [`ChatTemplates::render`], with the model's templates.
    ///
    /// # Errors
    /// As there.
    pub fn render_with<M: Serialize>(
        &self,
        messages: &[M],
        options: &RenderOptions,
    ) -> Result<String> {
        self.templates.render(messages, options)
    }

    /// As [`ChatTemplates::render_marked`], with the model's templates.
    ///
    /// # Errors
    /// As there.
    pub fn render_marked<M: Serialize>(
        &self,
        messages: &[M],
        options: &RenderOptions,
    ) -> Result<MarkedText> {
        self.templates.render_marked(messages, options)
    }

    /// Whether [`render`](Self::render) has a template to work with.
    pub fn has_chat_template(&self) -> bool {
        !self.templates.is_empty()
    }

    /// The model's chat templates and special tokens.
    pub fn chat_templates(&self) -> &ChatTemplates {
        &self.templates
    }

    /// The byte range in `text` of the first token that was added to the vocabulary by name, such
    /// as `<|im_end|>`, or `None` when there is none.
    ///
    /// Tokens that are nothing but white space do not count: some vocabularies add runs of spaces
    /// and line breaks, and those mark no place in a conversation.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn first_added_token(&self, text: &str) -> Result<Option<Range<usize>>> {
        let encoding = self.tokenizer.encode(text, false);
        let encoding = encoding.map_err(|source| failed(ENCODING, source))?;
        let added = self.tokenizer.get_added_vocabulary().get_added_tokens_decoder();
        let named = |id: &u32| added.get(id).is_some_and(|token| !token.content.trim().is_empty());
        let place = encoding.get_ids().iter().position(named);
        Ok(place.map(|place| {
            let (start, end) = encoding.get_offsets()[place]; // bytes of the text as it was given
            start..end
        }))
    }

    /// The id of one token, written as in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// One more than the largest token id: the least number of rows that an embedding for all tokens needs.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The token that begins a text, where the model names one.
    pub fn bos_token(&self) -> Option<&str> {
        self.templates.special_token("bos_token")
    }

    /// The token that ends a text, where the model names one.
    pub fn eos_token(&self) -> Option<&str> {
        self.templates.special_token("eos_token")
    }
}

pub(crate) fn failed(operation: &str, source: tokenizers::Error) -> Error {
    let place = format!("tokenizer, {operation}");
    ErrorKind::Tokenizer { place, reason: shown(&source.to_string()) }.into()
}

/// Says which merge the library would end the program over: it takes the prefix off the second part of
/// each without a look.
fn check_merges(bytes: &[u8]) -> Result<(), String> {
    #[derive(Deserialize)]
    struct File<M> {
        model: M,
    }
    #[derive(Deserialize)]
    struct Prefix {
        continuing_subword_prefix: Option<String>,
    }
    #[derive(Deserialize)]
    struct Merges {
        #[serde(default)]
        merges: Vec<Merge>,
    }
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Merge {
        Line(String),
        Pair(IgnoredAny, String),
    }
    let error = |source: serde_json::Error| source.to_string();
    let File { model } = serde_json::from_slice::<File<Prefix>>(bytes).map_err(error)?;
    let Some(prefix) = model.continuing_subword_prefix.filter(|prefix| !prefix.is_empty()) else {
        return Ok(()); // as nearly always, and the merges, many as they are, need not be looked at
    };
    let File { model } = serde_json::from_slice::<File<Merges>>(bytes).map_err(error)?;
    for merge in &model.merges {
        let second = match merge {
            Merge::Line(line) => line.split_once(' ').map_or("", |(_, second)| second),
            Merge::Pair(_, second) => second,
        };
        let is_version = matches!(merge, Merge::Line(line) if line.starts_with("#version"));
        if second.get(prefix.len()..).is_none() && !is_version {
            return Err(format!(
                "a merge with '{second}', from which continuing_subword_prefix '{prefix}' cannot be taken"
            ));
        }
    }
    Ok(())
}

/// What is put around a text, as far as the library would end the program over it.
#[derive(Deserialize)]
struct Around {
    #[serde(default)]
    processors: Vec<Around>,
    #[serde(default)]
    single: Vec<Piece>,
    #[serde(default)]
    pair: Vec<Piece>,
    special_tokens: Option<serde_json::Map<String, serde_json::Value>>,
}

#[derive(Deserialize)]
enum Piece {
    Sequence { id: String },
    SpecialToken { id: String },
}

impl Around {
    /// The library looks tokens up without asking whether they are there.
    fn check(&self) -> Result<(), String> {
        for piece in self.single.iter().chain(&self.pair) {
            if let Piece::SpecialToken { id } = piece
                && !self.special_tokens.as_ref().is_some_and(|tokens| tokens.contains_key(id))
            {
                return Err(format!(
                    "a post_processor with the token '{id}', which its special_tokens lack"
                ));
            }
        }
        for piece in &self.single {
            if let Piece::Sequence { id } = piece
                && id != "A"
            {
                return Err(format!("a post_processor for one text with a second, '{id}'"));
            }
        }
        self.processors.iter().try_for_each(Self::check)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value as Json, json};
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    use super::*;

    /// A tokenizer.json with one token for each byte (ids 0 to 255), then the named ones.
    fn bytes_json(named: &[&str]) -> Json {
        let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
        alphabet.sort_unstable();
        let vocab: serde_json::Map<String, Json> =
            alphabet.iter().enumerate().map(|(id, c)| (c.to_string(), json!(id))).collect();
        let added: Vec<Json> = named
            .iter()
            .enumerate()
            .map(|(i, content)| {
                json!({
                    "id": 256 + i, "content": content, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": true,
                })
            })
            .collect();
        let byte_level = json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
        });
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
            "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null,
            "decoder": byte_level,
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null,
                "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
                "byte_fallback": false, "vocab": vocab, "merges": [],
            },
        })
    }

    fn bytes(named: &[&str]) -> tokenizers::Tokenizer {
        tokenizers::Tokenizer::from_bytes(bytes_json(named).to_string()).unwrap()
    }

    fn with_template(template: &str) -> Tokenizer {
        let token = |token: &str| Some(token.to_owned());
        Tokenizer::new(bytes(&[]), token(template), token("<s>"), token("</s>")).unwrap()
    }

    /// A model folder with these files.
    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        folder
    }

    #[test]
    fn encodes_without_adding_and_decodes_without_special_tokens() {
        let tokenizer =
            Tokenizer::new(bytes(&["<s>", "</s>"]), None, Some("<s>".into()), None).unwrap();
        let ids = tokenizer.encode("<s>né</s>").unwrap();
        assert_eq!(ids.len(), 5); // one for each tag, one for n, two bytes of é
        assert_eq!((ids[0], ids[4]), (256, 257));
        assert_eq!(tokenizer.decode(&ids).unwrap(), "né");
        assert_eq!(tokenizer.encode("").unwrap(), Vec::<u32>::new());
        assert_eq!(tokenizer.token_id("</s>"), Some(257));
        assert_eq!(tokenizer.token_id("<pad>"), None);
        assert_eq!((tokenizer.bos_token(), tokenizer.eos_token()), (Some("<s>"), None));
        assert_eq!(tokenizer.clone().vocab_size(), 258);
    }

    #[test]
    fn a_token_beyond_the_embedding_is_an_error_where_it_stands_in_a_text() {
        let tokenizer = || Tokenizer::new(bytes(&["<s>", "<pad>"]), None, None, None).unwrap();
        let narrow = tokenizer().for_embedding(257).unwrap();
        assert_eq!(narrow.encode("<s>a").unwrap(), tokenizer().encode("<s>a").unwrap());
        for error in [narrow.encode("a<pad>b"), narrow.encode_whole_text("<pad>")] {
            let error = error.unwrap_err().to_string();
            let part =
                "ids below 257, the rows of the model's embedding, found '<pad>' with the id 257";
            assert!(error.contains(part), "{error}");
        }
        assert_eq!(tokenizer().for_embedding(258).unwrap().encode("<pad>").unwrap(), [257]);
        let error = tokenizer().for_embedding(200).unwrap_err().to_string();
        assert!(error.contains("a vocabulary of at most 200 tokens"), "{error}");
        assert!(error.contains("with the id 255"), "{error}");
    }

    #[test]
    fn vocab_size_counts_holes() {
        let mut json = bytes_json(&[]);
        json["model"]["vocab"]["hole before this"] = json!(999);
        let tokenizer = tokenizers::Tokenizer::from_bytes(json.to_string()).unwrap();
        assert_eq!(Tokenizer::new(tokenizer, None, None, None).unwrap().vocab_size(), 1000);
    }

    #[test]
    fn stored_truncation_and_padding_are_switched_off() {
        let mut json = bytes_json(&["<pad>"]);
        json["truncation"] = json!({
            "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0,
        });
        json["padding"] = json!({
            "strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 256, "pad_type_id": 0, "pad_token": "<pad>",
        });
        let folder = folder(&[(TOKENIZER_FILE, &json.to_string())]);
        let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
        assert_eq!(tokenizer.encode("sixteen or less").unwrap().len(), 15);
        assert_eq!(tokenizer.encode("hi").unwrap().len(), 2);
    }

    #[test]
    fn first_added_token_is_a_byte_range() {
        let tokenizer = Tokenizer::new(bytes(&["<end>", "  ", "<two>"]), None, None, None).unwrap();
        assert_eq!(tokenizer.first_added_token("é  <end>\n<two>").unwrap(), Some(4..9));
        assert_eq!(tokenizer.first_added_token("é  nothing").unwrap(), None);
        assert_eq!(tokenizer.first_added_token("").unwrap(), None);
    }

    #[test]
    fn debug_does_not_print_the_vocabulary() {
        let text = format!("{:?}", with_template("a long template"));
        assert!(text.len() < 400 && !text.contains("long"), "{text}");
    }

    #[test]
    fn renders_with_the_models_template_and_tokens() {
        let tokenizer = with_template(
            "{{ bos_token }}{% for m in messages %}{{ m.role[0] + m.content }}{% endfor %}\
             {{ eos_token if not add_generation_prompt }}",
        );
        let messages = [Message::user("hi"), Message::assistant("yes")];
        assert_eq!(tokenizer.render(&messages, false).unwrap(), "<s>uhiayes</s>");
        assert_eq!(tokenizer.render(&messages, true).unwrap(), "<s>uhiayes");
        assert!(tokenizer.has_chat_template());
    }

    #[test]
    fn its_own_options_hold_for_every_rendering() {
        let options = RenderOptions {
            date: Some("2026-10-03".parse().unwrap()),
            variables: json!({"x": "y"}).as_object().unwrap().clone(),
            ..RenderOptions::default()
        };
        let tokenizer = with_template("{{ x }}{{ strftime_now('%d') }}{{ add_generation_prompt }}");
        let message = [Message::user("hi")];
        let error = tokenizer.render(&message, true).unwrap_err().to_string();
        assert!(error.contains("RenderOptions::date"), "{error}");
        let tokenizer = tokenizer.with_render_options(options);
        assert_eq!(tokenizer.render(&message, true).unwrap(), "y03True");
        assert_eq!(tokenizer.render(&message, false).unwrap(), "y03False");
        assert_eq!(tokenizer.clone().render(&message, false).unwrap(), "y03False");
    }

    #[test]
    fn marked_answers_come_through() {
        let tokenizer = with_template(
            "{% for m in messages %}é{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        );
        let marked = tokenizer
            .render_marked(&[Message::assistant("hi")], &RenderOptions::default())
            .unwrap();
        let answers = marked.answers.unwrap();
        assert_eq!(marked.text, "éhi");
        assert_eq!((answers.len(), &answers[0]), (1, &(2..4)));
    }

    #[test]
    fn a_folder_with_the_tokenizer_alone_is_enough() {
        let folder = folder(&[(TOKENIZER_FILE, &bytes_json(&[]).to_string())]);
        let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
        assert!(!tokenizer.has_chat_template());
        assert_eq!((tokenizer.bos_token(), tokenizer.eos_token()), (None, None));
    }

    #[test]
    fn a_folder_gives_tokens_and_template() {
        let folder = folder(&[
            (TOKENIZER_FILE, &bytes_json(&["<s>", "</s>"]).to_string()),
            ("tokenizer_config.json", r#"{"bos_token": "<s>", "eos_token": {"content": "</s>"}}"#),
            ("chat_template.jinja", "{{ bos_token }}{{ eos_token }}"),
        ]);
        let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
        assert_eq!((tokenizer.bos_token(), tokenizer.eos_token()), (Some("<s>"), Some("</s>")));
        assert_eq!(tokenizer.render(&[Message::user("")], false).unwrap(), "<s></s>");
        assert_eq!(tokenizer.chat_templates().special_token("unk_token"), None);
    }

    #[test]
    fn a_missing_tokenizer_names_the_file() {
        let error = Tokenizer::from_folder(folder(&[]).path()).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Io { .. }));
        assert!(error.to_string().contains(TOKENIZER_FILE), "{error}");
    }

    #[test]
    fn a_token_that_goes_around_a_text_must_be_there() {
        let start = json!({"SpecialToken": {"id": "<s>", "type_id": 0}});
        let text = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
        let template = |single: &Json, pair: &Json, tokens: Json| json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens});
        let (plain, both) = (json!([text("A")]), json!([text("A"), text("B")]));
        let (started, none) = (json!([start, text("A")]), json!({}));
        let tokens = json!({"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}});
        let open = |post_processor: Json| {
            let mut json = bytes_json(&["<s>"]);
            json["post_processor"] = post_processor;
            Tokenizer::from_folder(folder(&[(TOKENIZER_FILE, &json.to_string())]).path())
        };
        let bad = [
            (template(&started, &both, none.clone()), "the token '<s>'"),
            (
                template(&plain, &json!([start, text("A"), text("B")]), none.clone()),
                "the token '<s>'",
            ),
            (template(&json!([text("B")]), &both, none), "one text with a second"),
        ];
        for (template, part) in bad {
            let sequence = json!({"type": "Sequence", "processors": [template]});
            for processor in [template, sequence] {
                let message = open(processor).unwrap_err().to_string();
                assert!(message.contains(TOKENIZER_FILE) && message.contains(part), "{message}");
            }
        }
        let good = template(&started, &both, tokens);
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true});
        let sequence = json!({"type": "Sequence", "processors": [byte_level, good]});
        for processor in [good, sequence] {
            assert_eq!(open(processor).unwrap().encode_whole_text("").unwrap(), [256]);
        }
    }

    #[test]
    fn a_merge_must_have_the_prefix_that_is_taken_off_it() {
        let open = |prefix: &str, merges: Json| {
            let mut json = bytes_json(&[]);
            json["model"]["continuing_subword_prefix"] = json!(prefix);
            json["model"]["vocab"] = json!({"a": 0, "##b": 1, "ab": 2, "é": 3});
            json["model"]["merges"] = merges;
            Tokenizer::from_folder(folder(&[(TOKENIZER_FILE, &json.to_string())]).path())
        };
        for (prefix, merges) in [
            ("####", json!(["a ##b"])),
            ("####", json!([["a", "##b"]])),
            ("#", json!([["a", "é"]])), // in the middle of a letter
        ] {
            let message = open(prefix, merges).unwrap_err().to_string();
            assert!(message.contains(&format!("'{prefix}' cannot be taken")), "{message}");
        }
        open("##", json!(["#version: 0.2", "a ##b"])).unwrap();
        open("##", json!([["a", "##b"]])).unwrap();
        open("", json!([])).unwrap();
    }

    #[test]
    fn a_damaged_tokenizer_names_the_file() {
        let whole = bytes_json(&["<s>"]);
        let with = |path: &str, value: Json| {
            let mut json = whole.clone();
            *json.pointer_mut(path).unwrap() = value;
            json.to_string()
        };
        for text in [
            String::new(),
            "{}".to_owned(),
            "[]".to_owned(),
            whole.to_string()[..200].to_owned(),
            "\u{feff}".to_owned() + &whole.to_string(),
            with("/model/type", json!("Abacus")),
            with("/model/vocab", json!([])),
            with("/model/vocab", json!({"a": -1})),
            with("/model/merges", json!(["a"])),
            with("/model/merges", json!([["no", "token"]])),
            with("/decoder/type", json!("Abacus")),
            with("/pre_tokenizer", json!({"type": "Split", "pattern": {"Regex": "("}})),
            with("/normalizer", json!(3)),
            with("/added_tokens/0/content", json!(null)),
        ] {
            let folder = folder(&[(TOKENIZER_FILE, &text)]);
            let error = Tokenizer::from_folder(folder.path()).expect_err(&text);
            assert!(matches!(error.kind(), ErrorKind::Tokenizer { .. }));
            let message = error.to_string();
            for part in [TOKENIZER_FILE, "expected a tokenizer.json of", "download the file again"]
            {
                assert!(message.contains(part), "expected {part:?} in: {message}");
            }
        }
    }
}
