//! Text to token ids and back, and the chat template that turns messages into a prompt.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{Environment, UndefinedBehavior, Value};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::error::{Error, ErrorKind, Result};

pub(crate) const TOKENIZER_FILE: &str = "tokenizer.json";
const CONFIG_FILE: &str = "tokenizer_config.json";
const TEMPLATE_FILE: &str = "chat_template.jinja";

/// The name under which the template is kept, and which its error messages show.
const TEMPLATE_NAME: &str = "chat_template";

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, or what else the model's chat template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// What the model is told about its task.
    pub fn system(content: impl Into<String>) -> Self {
        Self { role: "system".to_owned(), content: content.into() }
    }

    /// What a person says.
    pub fn user(content: impl Into<String>) -> Self {
        Self { role: "user".to_owned(), content: content.into() }
    }

    /// What the model says.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self { role: "assistant".to_owned(), content: content.into() }
    }
}

/// A model's vocabulary together with its chat template. Cloning it copies a handle.
///
/// Nothing is added to a text behind the caller's back: a beginning-of-text token is there only if
/// the text, or the template that rendered it, has one. Special tokens that stand in a text are
/// recognised, also in what a user typed; whoever serves strangers has to filter those out first.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    tokenizer: tokenizers::Tokenizer,
    environment: Environment<'static>,
    has_chat_template: bool,
    bos_token: Option<String>,
    eos_token: Option<String>,
    vocab_size: usize,
}

impl fmt::Debug for Tokenizer {
    // By hand, because the derived form would print the whole vocabulary.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.0.vocab_size)
            .field("has_chat_template", &self.0.has_chat_template)
            .field("bos_token", &self.0.bos_token)
            .field("eos_token", &self.0.eos_token)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads the tokenizer of a Hugging Face model folder.
    ///
    /// `tokenizer.json` must be there. The chat template is taken from `chat_template.jinja`, else
    /// from `tokenizer_config.json`, which also names the bos and eos tokens; both may be absent.
    ///
    /// # Errors
    /// When a file cannot be read, is damaged, or holds a template that does not parse.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let path = folder.join(TOKENIZER_FILE);
        let bytes = std::fs::read(&path).map_err(|source| Error::io(&path, source))?;
        let tokenizer =
            tokenizers::Tokenizer::from_bytes(bytes).map_err(|source| ErrorKind::Tokenizer {
                place: path.display().to_string(),
                reason: format!(
                    "expected a tokenizer.json of Hugging Face's tokenizers library, found one \
                     that it cannot read ({source}); download the file again"
                ),
            })?;

        let config = read_config(&folder.join(CONFIG_FILE))?;
        let template = match read_if_there(&folder.join(TEMPLATE_FILE))? {
            Some(template) => Some(template),
            None => config.chat_template,
        };
        Self::new(tokenizer, template, config.bos_token, config.eos_token)
    }

    /// Puts a tokenizer together from its parts, as a GGUF file gives them.
    ///
    /// Truncation and padding that are stored in `tokenizer` are switched off: they belong to the
    /// program that saved it, and would cut training rows without a word.
    ///
    /// # Errors
    /// When the template does not parse, so that a broken one is met here and not at the first row.
    pub fn new(
        mut tokenizer: tokenizers::Tokenizer,
        chat_template: Option<String>,
        bos_token: Option<String>,
        eos_token: Option<String>,
    ) -> Result<Self> {
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|source| failed("switching off truncation", source))?;
        tokenizer.set_encode_special_tokens(false); // "false" means: recognise them in a text

        // The largest id counts, not the number of entries: a vocabulary may have holes.
        let largest = tokenizer.get_vocab(true).into_values().max();
        let vocab_size = largest.map_or(0, |id| id as usize + 1);

        let mut environment = chat_environment();
        let has_chat_template = chat_template.is_some();
        if let Some(template) = chat_template {
            environment.add_template_owned(TEMPLATE_NAME, template).map_err(ErrorKind::Template)?;
        }
        Ok(Self(Arc::new(Inner {
            tokenizer,
            environment,
            has_chat_template,
            bos_token,
            eos_token,
            vocab_size,
        })))
    }

    /// Turns a text into token ids. Special tokens in the text are recognised; none are added.
    ///
    /// # Errors
    /// When the vocabulary has no token for a piece of the text, and none that stands for unknown.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.0.tokenizer.encode_fast(text, false);
        Ok(encoding.map_err(|source| failed("encoding a text", source))?.get_ids().to_vec())
    }

    /// Turns a text into token ids with the tokens that the tokenizer puts around a text by itself, such
    /// as one that begins every text. For a model without a chat template.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_whole_text(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.0.tokenizer.encode_fast(text, true);
        Ok(encoding.map_err(|source| failed("encoding a text", source))?.get_ids().to_vec())
    }

    /// Turns token ids into a text, leaving special tokens out.
    ///
    /// # Errors
    /// When the model's decoder refuses the tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.0.tokenizer.decode(ids, true).map_err(|source| failed("decoding tokens", source))
    }

    /// Renders a conversation as the model was trained to see it, as Hugging Face's
    /// `apply_chat_template(..., tokenize=False)` does.
    ///
    /// With `add_generation_prompt` the text ends where the assistant's answer begins.
    ///
    /// # Errors
    /// When the model has no chat template, or the template refuses these messages.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        if !self.0.has_chat_template {
            return Err(ErrorKind::Argument {
                what: "chat template",
                expected: format!(
                    "{TEMPLATE_FILE}, or chat_template in {CONFIG_FILE}, beside the model's \
                     {TOKENIZER_FILE} (copy it from the instruction-tuned model of the same family)"
                ),
                found: "neither".to_owned(),
            }
            .into());
        }

        let messages: Value = messages.iter().map(message_value).collect();
        // Hugging Face passes these two as None, and templates ask `tools is not none`.
        let mut context = BTreeMap::from([
            ("messages", messages),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ]);
        // A token that the model lacks stays undefined, which templates test for and print as "".
        if let Some(token) = &self.0.bos_token {
            context.insert("bos_token", Value::from(token));
        }
        if let Some(token) = &self.0.eos_token {
            context.insert("eos_token", Value::from(token));
        }

        let template = self.0.environment.get_template(TEMPLATE_NAME);
        let text = template.and_then(|template| template.render(context));
        Ok(text.map_err(ErrorKind::Template)?)
    }

    /// Whether [`render`](Self::render) has a template to work with.
    pub fn has_chat_template(&self) -> bool {
        self.0.has_chat_template
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
        let encoding = self.0.tokenizer.encode(text, false);
        let encoding = encoding.map_err(|source| failed("encoding a text", source))?;
        let added = self.0.tokenizer.get_added_vocabulary().get_added_tokens_decoder();
        let named = |id: &u32| added.get(id).is_some_and(|token| !token.content.trim().is_empty());
        let place = encoding.get_ids().iter().position(named);
        Ok(place.map(|place| {
            let (start, end) = encoding.get_offsets()[place]; // bytes of the text as it was given
            start..end
        }))
    }

    /// The id of one token, written as in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.0.tokenizer.token_to_id(token)
    }

    /// One more than the largest token id: the least number of rows that an embedding needs.
    pub fn vocab_size(&self) -> usize {
        self.0.vocab_size
    }

    /// The token that begins a text, where the model names one.
    pub fn bos_token(&self) -> Option<&str> {
        self.0.bos_token.as_deref()
    }

    /// The token that ends a text, where the model names one.
    pub fn eos_token(&self) -> Option<&str> {
        self.0.eos_token.as_deref()
    }
}

fn failed(operation: &str, source: tokenizers::Error) -> Error {
    let place = format!("tokenizer, {operation}");
    ErrorKind::Tokenizer { place, reason: source.to_string() }.into()
}

fn message_value(message: &Message) -> Value {
    Value::from(BTreeMap::from([
        ("role", Value::from(&message.role)),
        ("content", Value::from(&message.content)),
    ]))
}

/// Jinja as Hugging Face sets it up in `transformers/utils/chat_template_utils.py`.
///
/// `strftime_now` is left undefined on purpose: the templates that use it test for it and fall back
/// to a fixed date, and with today's date the same row would train on other tokens tomorrow.
fn chat_environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("only whitespace was set; no delimiter can clash"));
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", tojson);
    environment.add_function("raise_exception", raise_exception);
    environment
}

fn raise_exception(message: &str) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, message.to_owned()))
}

/// `tojson` without the HTML escapes that Jinja adds: Hugging Face replaces the filter likewise,
/// and a model has never seen `\u003c` where it was trained on `<`.
fn tojson(
    value: &Value,
    indent: Option<Value>,
    options: Kwargs,
) -> Result<String, minijinja::Error> {
    let escaped = minijinja::filters::tojson(value, indent, options)?.to_string();
    let mut text = String::with_capacity(escaped.len());
    let mut rest = escaped.as_str();
    while let Some(at) = rest.find('\\') {
        text.push_str(&rest[..at]);
        let escape = &rest[at..];
        let (plain, length) = match escape.get(..6) {
            Some("\\u003c") => ("<", 6),
            Some("\\u003e") => (">", 6),
            Some("\\u0026") => ("&", 6),
            Some("\\u0027") => ("'", 6),
            // Any other escape stays. Two bytes at once, so that in `\\u003c`, an escaped
            // backslash before plain letters, the second backslash does not start an escape.
            _ => (&escape[..2], 2),
        };
        text.push_str(plain);
        rest = &escape[length..];
    }
    text.push_str(rest);
    Ok(text)
}

/// What is used of `tokenizer_config.json`.
#[derive(Default)]
struct Config {
    chat_template: Option<String>,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

fn read_config(path: &Path) -> Result<Config> {
    let Some(text) = read_if_there(path)? else { return Ok(Config::default()) };
    let fields: serde_json::Map<String, Json> = serde_json::from_str(&text).map_err(|source| {
        let place = format!("line {}, column {}", source.line(), source.column());
        Error::malformed(path, place, "a JSON object", source.to_string())
    })?;
    Ok(Config {
        chat_template: template_field(path, fields.get("chat_template"))?,
        bos_token: token_field(path, &fields, "bos_token")?,
        eos_token: token_field(path, &fields, "eos_token")?,
    })
}

/// A template, or a list of named ones of which `default` is meant for plain chat.
fn template_field(path: &Path, field: Option<&Json>) -> Result<Option<String>> {
    let malformed = |expected, found| Error::malformed(path, "chat_template", expected, found);
    match field {
        None | Some(Json::Null) => Ok(None),
        Some(Json::String(template)) => Ok(Some(template.clone())),
        Some(Json::Array(entries)) => {
            let mut names = Vec::new();
            for entry in entries {
                let text = |name| entry.get(name).and_then(Json::as_str);
                let (Some(name), Some(template)) = (text("name"), text("template")) else {
                    let expected = "entries with the strings \"name\" and \"template\"";
                    return Err(malformed(expected, format!("the entry {entry}")));
                };
                if name == "default" {
                    return Ok(Some(template.to_owned()));
                }
                names.push(format!("\"{name}\""));
            }
            let found = match names.as_slice() {
                [] => "an empty list".to_owned(),
                names => names.join(", "),
            };
            Err(malformed("a template named \"default\"", found))
        }
        Some(other) => {
            Err(malformed("a string or a list of named templates", describe(other).to_owned()))
        }
    }
}

/// A token, as a string or as an object whose `content` is that string.
fn token_field(
    path: &Path,
    fields: &serde_json::Map<String, Json>,
    name: &str,
) -> Result<Option<String>> {
    let token = match fields.get(name) {
        None | Some(Json::Null) => return Ok(None),
        Some(Json::Object(token)) => token.get("content").unwrap_or(&Json::Null),
        Some(token) => token,
    };
    match token {
        Json::String(token) => Ok(Some(token.clone())),
        other => {
            let expected = "a string, or an object whose \"content\" is one";
            Err(Error::malformed(path, name, expected, describe(other)))
        }
    }
}

fn describe(value: &Json) -> &'static str {
    match value {
        Json::Null => "null",
        Json::Bool(_) => "a boolean",
        Json::Number(_) => "a number",
        Json::String(_) => "a string",
        Json::Array(_) => "an array",
        Json::Object(_) => "an object",
    }
}

fn read_if_there(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(path, error)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    use super::*;

    const CHATML: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    const LLAMA3: &str = "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}";

    // Of Mistral's shape: it has blocks on lines of their own, refuses odd orders and strips.
    const MISTRAL: &str = "{{ bos_token }}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
{{ ' ' + message['content'].strip() + eos_token }}
    {%- endif %}
{% endfor %}
";

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

    fn load(config: Json) -> Result<Tokenizer> {
        let tokenizer = bytes_json(&["<s>", "</s>"]).to_string();
        let folder = folder(&[(TOKENIZER_FILE, &tokenizer), (CONFIG_FILE, &config.to_string())]);
        Tokenizer::from_folder(folder.path())
    }

    /// `error` as text, which must hold all of `parts`.
    #[track_caller]
    fn assert_says(error: Error, parts: &[&str]) {
        let text = error.to_string();
        for part in parts {
            assert!(text.contains(part), "expected {part:?} in: {text}");
        }
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
        assert!(format!("{:?}", with_template(CHATML)).len() < 200);
    }

    #[test]
    fn renders_chatml_with_the_default_system_turn() {
        let tokenizer = with_template(CHATML);
        let system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n";
        let question = [Message::user("hi ")];
        assert_eq!(
            tokenizer.render(&question, true).unwrap(),
            format!("{system}<|im_start|>user\nhi <|im_end|>\n<|im_start|>assistant\n")
        );
        let answered = [Message::user("hi "), Message::assistant("yes")];
        assert_eq!(
            tokenizer.render(&answered, false).unwrap(),
            format!(
                "{system}<|im_start|>user\nhi <|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
            )
        );
    }

    #[test]
    fn renders_chatml_with_its_own_system_turn() {
        let messages = [Message::system("be <brief> & 'kind'"), Message::user("hi")];
        assert_eq!(
            with_template(CHATML).render(&messages, false).unwrap(),
            "<|im_start|>system\nbe <brief> & 'kind'<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        );
    }

    #[test]
    fn renders_llama3_with_the_trim_filter() {
        let messages = [Message::user("  hi\n"), Message::assistant(" yes ")];
        let text = "<s><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nyes<|eot_id|>";
        let tokenizer = with_template(LLAMA3);
        assert_eq!(tokenizer.render(&messages, false).unwrap(), text);
        assert_eq!(
            tokenizer.render(&messages, true).unwrap(),
            format!("{text}<|start_header_id|>assistant<|end_header_id|>\n\n")
        );
    }

    #[test]
    fn renders_mistral_with_the_strip_method_and_blocks_on_their_own_lines() {
        let messages = [Message::user(" hi "), Message::assistant("yes\n"), Message::user("and?")];
        // What Python's Jinja2 3.1.6 makes of it, with trim_blocks and lstrip_blocks.
        let text = "<s>\n[INST] hi [/INST] yes</s>[INST] and? [/INST]";
        assert_eq!(with_template(MISTRAL).render(&messages, true).unwrap(), text);
    }

    #[test]
    fn a_token_that_the_model_lacks_prints_as_nothing() {
        let template =
            "{{ bos_token }}{{ messages[0].content }}{% if eos_token is defined %}!{% endif %}"
                .to_owned();
        let tokenizer = Tokenizer::new(bytes(&[]), Some(template), None, None).unwrap();
        assert_eq!(tokenizer.render(&[Message::user("hi")], false).unwrap(), "hi");
    }

    #[test]
    fn tools_and_dates_are_absent_as_templates_expect() {
        let template = "{% if tools is not none %}tools{% endif %}{% if strftime_now is defined %}today{% else %}26 Jul 2024{% endif %}";
        assert_eq!(with_template(template).render(&[], false).unwrap(), "26 Jul 2024");
    }

    #[test]
    fn tojson_writes_what_pythons_json_dumps_writes() {
        let tokenizer = with_template("{{ messages[0].content | tojson }}{{ [1, 'a'] | tojson }}");
        let message = Message::user("<a href='x'> & \\u003c é\n\"");
        assert_eq!(
            tokenizer.render(&[message], false).unwrap(),
            r#""<a href='x'> & \\u003c é\n\""[1, "a"]"#
        );
    }

    #[test]
    fn a_refusal_by_the_template_says_why() {
        let error = with_template(MISTRAL).render(&[Message::assistant("hi")], false).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Template(_)));
        assert_says(error, &["Conversation roles must alternate user/assistant", "chat template"]);
    }

    #[test]
    fn a_missing_template_says_what_to_do() {
        let tokenizer = Tokenizer::new(bytes(&[]), None, None, None).unwrap();
        assert!(!tokenizer.has_chat_template());
        let error = tokenizer.render(&[Message::user("hi")], true).unwrap_err();
        assert_says(error, &["chat template", TEMPLATE_FILE, CONFIG_FILE, "copy it"]);
    }

    #[test]
    fn a_broken_template_fails_at_load() {
        let error = load(json!({"chat_template": "{% for m in messages %}"})).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Template(_)));
        assert_says(error, &["syntax error", "check chat_template"]);
    }

    #[test]
    fn a_folder_with_the_tokenizer_alone_is_enough() {
        let folder = folder(&[(TOKENIZER_FILE, &bytes_json(&[]).to_string())]);
        let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
        assert!(!tokenizer.has_chat_template());
        assert_eq!((tokenizer.bos_token(), tokenizer.eos_token()), (None, None));
    }

    #[test]
    fn the_config_gives_tokens_and_template() {
        let tokenizer = load(json!({
            "bos_token": {"content": "<s>", "special": true}, "eos_token": "</s>",
            "chat_template": "{{ bos_token }}{{ eos_token }}", "other": [1],
        }))
        .unwrap();
        assert_eq!((tokenizer.bos_token(), tokenizer.eos_token()), (Some("<s>"), Some("</s>")));
        assert_eq!(tokenizer.render(&[], false).unwrap(), "<s></s>");
        let absent = load(json!({"bos_token": null, "chat_template": null})).unwrap();
        assert!(absent.bos_token().is_none() && !absent.has_chat_template());
    }

    #[test]
    fn of_named_templates_the_default_is_taken() {
        let tokenizer = load(json!({"chat_template": [
            {"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"},
        ]}))
        .unwrap();
        assert_eq!(tokenizer.render(&[], false).unwrap(), "plain");
    }

    #[test]
    fn the_jinja_file_wins_over_the_config() {
        let folder = folder(&[
            (TOKENIZER_FILE, &bytes_json(&[]).to_string()),
            (CONFIG_FILE, r#"{"chat_template": "config"}"#),
            (TEMPLATE_FILE, "file"),
        ]);
        let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
        assert_eq!(tokenizer.render(&[], false).unwrap(), "file");
    }

    #[test]
    fn named_templates_without_a_default_are_refused() {
        let error = load(json!({"chat_template": [{"name": "rag", "template": ""}]})).unwrap_err();
        assert_says(error, &[CONFIG_FILE, "chat_template", "named \"default\"", "\"rag\""]);
        let error = load(json!({"chat_template": []})).unwrap_err();
        assert_says(error, &["an empty list"]);
        let error = load(json!({"chat_template": [{"name": "default"}]})).unwrap_err();
        assert_says(error, &["\"template\"", "the entry {"]);
    }

    #[test]
    fn a_template_of_the_wrong_type_is_refused() {
        assert_says(load(json!({"chat_template": 3})).unwrap_err(), &["found a number"]);
    }

    #[test]
    fn a_token_of_the_wrong_type_is_refused() {
        let error = load(json!({"eos_token": [2]})).unwrap_err();
        assert_says(error, &[CONFIG_FILE, "eos_token", "expected a string", "found an array"]);
        let error = load(json!({"bos_token": {"lstrip": false}})).unwrap_err();
        assert_says(error, &["bos_token", "\"content\"", "found null"]);
    }

    #[test]
    fn a_damaged_config_says_where() {
        let folder = folder(&[
            (TOKENIZER_FILE, &bytes_json(&[]).to_string()),
            (CONFIG_FILE, "{\n  \"bos_token\": \n}"),
        ]);
        let error = Tokenizer::from_folder(folder.path()).unwrap_err();
        assert_says(error, &[CONFIG_FILE, "line 3", "expected a JSON object"]);
    }

    #[test]
    fn a_missing_tokenizer_names_the_file() {
        let folder = folder(&[]);
        let error = Tokenizer::from_folder(folder.path()).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Io { .. }));
        assert_says(error, &[TOKENIZER_FILE]);
    }

    #[test]
    fn a_damaged_tokenizer_names_the_file() {
        let whole = bytes_json(&["<s>"]).to_string();
        for text in ["", "{}", "[]", &whole[..200]] {
            let folder = folder(&[(TOKENIZER_FILE, text)]);
            let error = Tokenizer::from_folder(folder.path()).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::Tokenizer { .. }));
            assert_says(error, &[TOKENIZER_FILE, "download the file again"]);
        }
    }
}
