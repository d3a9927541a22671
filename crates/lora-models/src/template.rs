//! The chat template: messages to the one text that a model was trained to see.

mod date;
mod files;
mod namespace;
mod python;
mod source;

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{AutoEscape, Environment, State, UndefinedBehavior, Value};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use crate::error::{Error, ErrorKind, Result};
pub use date::Date;

/// The name of the template for plain chat.
const DEFAULT: &str = "default";
/// The name of the template that is taken where tools are given.
const TOOL_USE: &str = "tool_use";
/// The names by which the options themselves reach a template.
const RESERVED: [&str; 4] = ["messages", "tools", "documents", "add_generation_prompt"];
/// Stands at the end of a message that is to be continued, to find that place in the text. A text
/// that is trimmed loses the space, which tells whether white space after it is the template's.
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";
/// Stand around an answer while it is rendered to be found. Unicode keeps these two out of texts.
const OPEN: char = '\u{fdd0}';
const CLOSE: char = '\u{fdd1}';

/// What a chat template is told beside the messages.
///
/// ```
/// use lora_models::RenderOptions;
/// use serde_json::json;
///
/// let mut options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
/// options.variables.insert("enable_thinking".to_owned(), json!(false));
/// options.date = Some("2026-10-03".parse()?);
/// # Ok::<(), lora_models::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct RenderOptions {
    /// Whether the text ends where the assistant's answer begins.
    pub add_generation_prompt: bool,
    /// Whether the text ends where the last message's content ends, for the model to go on with it.
    pub continue_final_message: bool,
    /// The tools that the model may call, each as a JSON schema. `Some` of an empty list is not
    /// `None`: templates may tell them apart.
    pub tools: Option<Vec<Json>>,
    /// Documents that the answer may be taken from.
    pub documents: Option<Vec<Json>>,
    /// More variables of the template, such as `enable_thinking`.
    pub variables: Map<String, Json>,
    /// The date that the template is told when it asks for today's by `strftime_now`.
    ///
    /// Hugging Face answers with the clock, so that the same row trains on other tokens tomorrow.
    /// Here a template without a given date finds `strftime_now` undefined: those that test for it
    /// write a fixed date or none, and those that do not fail with a message that names this field.
    pub date: Option<Date>,
    /// The name of the template, for a model that has several. Without one it is `tool_use` where
    /// that is there and tools are given, else `default`.
    pub template: Option<String>,
}

/// A rendered conversation, and where in it the model speaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MarkedText {
    /// What [`ChatTemplates::render`] gives.
    pub text: String,
    /// The byte ranges in `text` that the template has between `{% generation %}` and
    /// `{% endgeneration %}`, in order of their beginning; `None` when it has no such tags.
    pub answers: Option<Vec<Range<usize>>>,
}

/// The chat templates of a model, by name, with the special tokens that they print.
///
/// Most models have one template, some none. They render as Hugging Face's
/// `apply_chat_template(..., tokenize=False)` does in transformers 5.23, and refuse what it refuses.
///
/// What is known to differ is in no template that we have seen but the first, of one model:
///
/// - joined by `+` to a text that is marked by `|safe`, another text loses no `<` to HTML's escapes;
/// - an order of values of different types, such as `'a' < 1`, is no error;
/// - an integer beyond 64 bits in a message is a float by the time it is here, as in serde_json;
/// - what Python makes one by one (`range`, `d.keys()`, `d.items()`, ...) prints as a list, macros
///   print in minijinja's words, and `'{}'.format(1e20)` and `1e20 | upper` have no exponent;
/// - a namespace can hold no other one, nor more than 200 levels;
/// - what needs Python itself or is rare ends in an error that names it: `cycler`, `lipsum`,
///   `dict` of pairs, the formats of `'%s' % x`, unary `+`, arithmetic on booleans, integers beyond 128 bits, a
///   macro's `varargs` and `kwargs`, some filters (`center`, `truncate`, `wordcount`, `striptags`,
///   ...) and methods (`ljust`, and `index` and `copy` of lists and dicts, ...);
/// - a tag of more than 300 operators and a template of more than 100 `elif` are refused.
///
/// ```
/// use lora_models::{ChatTemplates, Message, RenderOptions};
///
/// let template = "{{ bos_token }}{% for message in messages %}[{{ message.role }}] \
///                 {{ message.content | trim }}{% endfor %}";
/// let templates =
///     ChatTemplates::default().with_default(template)?.with_special_token("bos_token", "<s>");
/// let text = templates.render(&[Message::user(" Hi! ")], &RenderOptions::default())?;
/// assert_eq!(text, "<s>[user] Hi!");
/// # Ok::<(), lora_models::Error>(())
/// ```
#[derive(Clone)]
pub struct ChatTemplates {
    /// The templates as they are rendered.
    environment: Environment<'static>,
    /// The same templates, with marks around what is the model's to say.
    marking: Environment<'static>,
    templates: BTreeMap<String, Facts>,
    special_tokens: BTreeMap<String, String>,
}

/// What is known of one template beside its code.
#[derive(Clone)]
struct Facts {
    /// Where it was read, for messages.
    place: String,
    has_generation: bool,
    mentions_content: bool,
    mentions_date: bool,
}

impl Default for ChatTemplates {
    fn default() -> Self {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.expect("only whitespace was set; no delimiter can clash"));
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_debug(true); // so that a message names what is undefined
        // By default the name decides, and a template may be named "plain.html".
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        python::add_to(&mut environment);
        let mut marking = environment.clone();
        environment.add_function(source::GENERATION, answer);
        marking.add_function(source::GENERATION, marked_answer);
        Self { environment, marking, templates: BTreeMap::new(), special_tokens: BTreeMap::new() }
    }
}

impl fmt::Debug for ChatTemplates {
    // By hand, because the templates are pages long.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplates")
            .field("names", &self.names().collect::<Vec<_>>())
            .field("special_tokens", &self.special_tokens)
            .finish_non_exhaustive()
    }
}

impl ChatTemplates {
    /// Adds the template for plain chat, which most models have alone.
    ///
    /// # Errors
    /// When it does not parse.
    pub fn with_default(self, source: impl Into<String>) -> Result<Self> {
        self.with_template(DEFAULT, source)
    }

    /// Adds a template by name, or replaces the one of that name.
    ///
    /// # Errors
    /// When it does not parse.
    pub fn with_template(self, name: impl Into<String>, source: impl Into<String>) -> Result<Self> {
        let name = name.into();
        let place = format!("chat template {name:?}");
        self.with_template_of(name, source.into(), place)
    }

    /// As [`with_template`](Self::with_template), with where the template was read.
    pub(crate) fn with_template_of(
        mut self,
        name: String,
        source: String,
        place: String,
    ) -> Result<Self> {
        let mentions_content = source.contains("content");
        let mentions_date = source.contains("strftime_now");
        let source::Source { text, has_generation } = source::Source::new(&source)
            .map_err(|reason| ErrorKind::Template { place: place.clone(), reason, source: None })?;
        for environment in [&mut self.environment, &mut self.marking] {
            let added = environment.add_template_owned(name.clone(), text.clone());
            added.map_err(|source| syntax_error(&place, &source))?;
        }
        let facts = Facts { place, has_generation, mentions_content, mentions_date };
        self.templates.insert(name, facts);
        Ok(self)
    }

    /// Adds a token that templates print by name: `bos_token`, `eos_token`, `unk_token`, ...
    pub fn with_special_token(mut self, name: impl Into<String>, token: impl Into<String>) -> Self {
        self.special_tokens.insert(name.into(), token.into());
        self
    }

    /// The names of the templates.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.templates.keys().map(String::as_str)
    }

    /// Whether there is no template at all.
    pub fn is_empty(&self) -> bool {
        self.templates.is_empty()
    }

    /// A special token, by the name that templates know it by.
    pub fn special_token(&self, name: &str) -> Option<&str> {
        self.special_tokens.get(name).map(String::as_str)
    }

    /// Renders a conversation: [`Message`](crate::Message)s, or whatever else serializes to objects
    /// such as `{"role": "user", "content": "Hi!"}`.
    ///
    /// As in Hugging Face's function, a field that is null is left out, and reasoning is told as
    /// `reasoning_content` and `thinking`, whichever of the two or `reasoning` the message has.
    ///
    /// # Errors
    /// When there is no message, no such template, a message, tool or document is no object, the
    /// options contradict each other, or the template refuses the conversation.
    pub fn render<M: Serialize>(&self, messages: &[M], options: &RenderOptions) -> Result<String> {
        let mut call = self.call(messages, options)?;
        if !options.continue_final_message {
            return call.render(&self.environment);
        }
        let content = call.tag_final_message(options)?;
        let text = call.render(&self.environment)?;
        cut_at_tag(&text, &content)
    }

    /// Renders a conversation as [`render`](Self::render) does, and says which parts of the text a
    /// template with `{% generation %}` marks as the assistant's: those that a loss may count.
    ///
    /// # Errors
    /// As [`render`](Self::render); when a template changes the text of its marked parts after they
    /// were written, so that they cannot be found; with
    /// [`continue_final_message`](RenderOptions::continue_final_message).
    pub fn render_marked<M: Serialize>(
        &self,
        messages: &[M],
        options: &RenderOptions,
    ) -> Result<MarkedText> {
        if options.continue_final_message {
            return Err(argument(
                "continue_final_message",
                "false where answers are marked",
                "true",
            ));
        }
        let call = self.call(messages, options)?;
        let text = call.render(&self.environment)?;
        if !call.facts.has_generation {
            return Ok(MarkedText { text, answers: None });
        }
        // The marks could change what a template does with a text, such as trimming it, so the text
        // comes from a rendering without them, and must be the same once they are taken out.
        let (unmarked, answers) = take_marks_out(&call.render(&self.marking)?);
        if unmarked != text {
            return Err(ErrorKind::Template {
                place: call.facts.place.clone(),
                reason: "expected answers that are written once and stay as they are, found some \
                         that the template changes after {% generation %}; render without marks"
                    .to_owned(),
                source: None,
            }
            .into());
        }
        Ok(MarkedText { text, answers: Some(answers) })
    }

    /// What is to be rendered, checked.
    fn call<'a, M: Serialize>(
        &'a self,
        messages: &[M],
        options: &RenderOptions,
    ) -> Result<Call<'a>> {
        let (name, facts) = self.choose(options)?;
        if messages.is_empty() {
            return Err(argument("messages", "at least one message", "none"));
        }
        let messages =
            messages.iter().enumerate().map(|(index, message)| {
                match serde_json::to_value(message) {
                    Ok(Json::Object(fields)) => Ok(plain_fields(fields)),
                    Ok(other) => Err(not_an_object("messages", index, &other)),
                    Err(error) => Err(argument(
                        "messages",
                        "what can be written as JSON",
                        format!("entry {}, of which serde says: {error}", index + 1),
                    )),
                }
            });
        let messages = messages.collect::<Result<_>>()?;
        for (what, entries) in [("tools", &options.tools), ("documents", &options.documents)] {
            let mut entries = entries.iter().flatten().enumerate();
            if let Some((index, other)) = entries.find(|(_, entry)| !entry.is_object()) {
                return Err(not_an_object(what, index, other));
            }
        }
        if let Some(name) = RESERVED.iter().find(|name| options.variables.contains_key(**name)) {
            return Err(argument(
                "variables",
                "names that are no options or messages themselves",
                format!("{name:?}; give it in its own place"),
            ));
        }

        let mut context: BTreeMap<String, Value> = BTreeMap::new();
        for (name, token) in &self.special_tokens {
            context.insert(name.clone(), Value::from(token));
        }
        if let Some(date) = options.date {
            let strftime_now = Value::from_function(move |format: &str| {
                date.strftime(format).ok_or_else(|| {
                    let detail = format!("strftime_now: {format:?} is no format that is known");
                    minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, detail)
                })
            });
            context.insert("strftime_now".to_owned(), strftime_now);
        }
        for (name, variable) in &options.variables {
            context.insert(name.clone(), value(variable));
        }
        let list = |entries: &Option<Vec<Json>>| match entries {
            Some(entries) => entries.iter().map(value).collect(),
            None => Value::from(()), // templates ask `tools is not none`
        };
        context.insert("tools".to_owned(), list(&options.tools));
        context.insert("documents".to_owned(), list(&options.documents));
        let prompt = Value::from(options.add_generation_prompt);
        context.insert("add_generation_prompt".to_owned(), prompt);
        Ok(Call { name, facts, messages, context })
    }

    fn choose(&self, options: &RenderOptions) -> Result<(&str, &Facts)> {
        let get = |name: &str| {
            self.templates.get_key_value(name).map(|(name, facts)| (name.as_str(), facts))
        };
        let chosen = match &options.template {
            Some(name) => get(name),
            None if options.tools.is_some() => get(TOOL_USE).or_else(|| get(DEFAULT)),
            None => get(DEFAULT),
        };
        chosen.ok_or_else(|| {
            if self.is_empty() {
                return argument(
                    "chat template",
                    "chat_template.jinja, or chat_template in tokenizer_config.json, beside the \
                     model's tokenizer.json (copy it from the instruction-tuned model of the same \
                     family)",
                    "neither",
                );
            }
            let names: Vec<String> = self.names().map(|name| format!("{name:?}")).collect();
            let wanted = options.template.as_deref().unwrap_or(DEFAULT);
            argument(
                "chat template",
                format!("one named {wanted:?}, or another name in RenderOptions::template"),
                names.join(", "),
            )
        })
    }
}

/// One rendering: a template and what it is told.
struct Call<'a> {
    name: &'a str,
    facts: &'a Facts,
    messages: Vec<Map<String, Json>>,
    context: BTreeMap<String, Value>,
}

impl Call<'_> {
    fn render(&self, environment: &Environment<'static>) -> Result<String> {
        let mut context = self.context.clone();
        context.insert("messages".to_owned(), self.messages.iter().map(object).collect());
        let template = environment.get_template(self.name);
        let text = template.and_then(|template| template.render(Value::from_pairs(context)));
        text.map_err(|error| self.explain(error))
    }

    fn explain(&self, error: minijinja::Error) -> Error {
        // The refusal may lie below the errors of a macro or a block that called it.
        let mut cause: Option<&dyn std::error::Error> = Some(&error);
        while let Some(inner) = cause {
            if let Some(python::Refusal(reason)) = inner.downcast_ref() {
                return ErrorKind::Refused { reason: reason.clone() }.into();
            }
            cause = inner.source();
        }
        use minijinja::ErrorKind as Kind;
        let place = self.facts.place.clone();
        // Within a macro the engine does not name what it cannot call.
        let asks_for_date = self.facts.mentions_date
            && !self.context.contains_key("strftime_now")
            && error.detail().is_some_and(|detail| {
                detail.contains("strftime_now") || detail.contains("undefined is not callable")
            });
        let reason = match error.kind() {
            _ if asks_for_date => format!(
                "{}expected a date for strftime_now, found none; give one in RenderOptions::date",
                line(&error)
            ),
            Kind::UnknownFilter
            | Kind::UnknownFunction
            | Kind::UnknownMethod
            | Kind::UnknownTest
            | Kind::TooManyArguments => format!(
                "{}, which is not supported here; let the template do without",
                describe(&error)
            ),
            _ => format!(
                "{}; the messages, tools or variables may lack what the template needs",
                describe(&error)
            ),
        };
        template_error(place, reason, &error)
    }

    /// Marks the end of the last message's content, which is returned as it was.
    fn tag_final_message(&mut self, options: &RenderOptions) -> Result<String> {
        let refused =
            |expected: &str, found: &str| Err(argument("continue_final_message", expected, found));
        if options.add_generation_prompt {
            return refused("no add_generation_prompt beside it", "both");
        }
        if !self.facts.mentions_content {
            return refused("a template that prints \"content\"", "one without that word");
        }
        let content = self.messages.last_mut().and_then(|message| message.get_mut("content"));
        let text = match content {
            Some(Json::Array(parts)) => {
                parts.iter_mut().rev().find_map(|part| part.get_mut("text"))
            }
            content => content,
        };
        match text {
            Some(Json::String(text)) => {
                let content = text.clone();
                text.push_str(CONTINUE_TAG);
                Ok(content)
            }
            _ => refused("text in the last message's content", "none"),
        }
    }
}

/// The text up to where the tag stands after `content`.
fn cut_at_tag(text: &str, content: &str) -> Result<String> {
    let place = text.rfind(CONTINUE_TAG.trim_end());
    let Some(place) = place.filter(|_| text.contains(content.trim_matches(python::is_space)))
    else {
        return Err(argument(
            "continue_final_message",
            "a template that prints the last message's content as it is",
            "one that changes it",
        ));
    };
    let continued = &text[..place];
    Ok(match text[place..].starts_with(CONTINUE_TAG) {
        true => continued,
        // The template trims the content, so it would trim the content without the tag, too.
        false => continued.trim_end_matches(python::is_space),
    }
    .to_owned())
}

/// The text without marks, and the byte ranges in it that they were around.
fn take_marks_out(marked: &str) -> (String, Vec<Range<usize>>) {
    let mut text = String::with_capacity(marked.len());
    let mut open = Vec::new();
    let mut ranges = Vec::new();
    for c in marked.chars() {
        match c {
            OPEN => open.push(text.len()),
            CLOSE => ranges.extend(open.pop().map(|start| start..text.len())),
            c => text.push(c),
        }
    }
    ranges.sort_by_key(|range| (range.start, range.end));
    (text, ranges)
}

/// What a call block of `{% generation %}` writes: its content.
fn answer(state: &mut State, named: Kwargs) -> Result<Value, minijinja::Error> {
    named.get::<Value>("caller")?.call(state, &[])
}

fn marked_answer(state: &mut State, named: Kwargs) -> Result<String, minijinja::Error> {
    Ok(format!("{OPEN}{}{CLOSE}", answer(state, named)?))
}

/// The fields of a message as Hugging Face gives them to a template.
fn plain_fields(fields: Map<String, Json>) -> Map<String, Json> {
    let mut fields: Map<String, Json> =
        fields.into_iter().filter(|(_, field)| !field.is_null()).collect();
    let names = ["reasoning_content", "thinking", "reasoning"];
    let reasoning = names.iter().find_map(|name| fields.get(*name).cloned());
    if let Some(reasoning) = reasoning {
        let thinking = fields.shift_remove("thinking").unwrap_or_else(|| reasoning.clone());
        fields.shift_insert(0, "thinking".to_owned(), thinking);
        fields.insert("reasoning_content".to_owned(), reasoning);
    }
    fields
}

/// JSON as a template's value, with the order of keys.
fn value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(flag) => Value::from(*flag),
        Json::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(number), _, _) => Value::from(number),
            (_, Some(number), _) => Value::from(number),
            (_, _, Some(number)) => Value::from(number),
            _ => Value::from(number.to_string()),
        },
        Json::String(text) => Value::from(text),
        Json::Array(items) => items.iter().map(value).collect(),
        Json::Object(fields) => object(fields),
    }
}

fn object(fields: &Map<String, Json>) -> Value {
    python::dict(fields.iter().map(|(name, field)| (name.clone(), value(field))).collect())
}

fn argument(what: &'static str, expected: impl Into<String>, found: impl Into<String>) -> Error {
    ErrorKind::Argument { what, expected: expected.into(), found: found.into() }.into()
}

fn not_an_object(what: &'static str, index: usize, found: &Json) -> Error {
    argument(what, "JSON objects", format!("{} as entry {}", describe_json(found), index + 1))
}

/// What kind of JSON it is, for messages.
pub(crate) fn describe_json(value: &Json) -> &'static str {
    match value {
        Json::Null => "null",
        Json::Bool(_) => "a boolean",
        Json::Number(_) => "a number",
        Json::String(_) => "a string",
        Json::Array(_) => "an array",
        Json::Object(_) => "an object",
    }
}

fn syntax_error(place: &str, source: &minijinja::Error) -> Error {
    let reason = format!("{}; mend the template, or download it again", describe(source));
    template_error(place.to_owned(), reason, source)
}

fn template_error(place: String, reason: String, source: &minijinja::Error) -> Error {
    // Anew, because minijinja's own holds all that the template was told, and prints it with {:?}.
    let detail = source.detail().unwrap_or_default().to_owned();
    let source = Some(minijinja::Error::new(source.kind(), detail));
    ErrorKind::Template { place, reason, source }.into()
}

/// minijinja's message without the name that the template has inside.
fn describe(error: &minijinja::Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}{}: {detail}", line(error), error.kind()),
        None => format!("{}{}", line(error), error.kind()),
    }
}

fn line(error: &minijinja::Error) -> String {
    error.line().map_or_else(String::new, |line| format!("line {line}: "))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::message::Message;

    fn templates(source: &str) -> ChatTemplates {
        let templates = ChatTemplates::default().with_default(source).unwrap();
        templates.with_special_token("bos_token", "<s>").with_special_token("eos_token", "</s>")
    }

    /// One question, rendered.
    fn ask(source: &str, options: &RenderOptions) -> Result<String> {
        templates(source).render(&[Message::user("hi")], options)
    }

    fn plain(source: &str) -> Result<String> {
        ask(source, &RenderOptions::default())
    }

    fn with_date() -> RenderOptions {
        RenderOptions { date: Some("2026-03-07".parse().unwrap()), ..RenderOptions::default() }
    }

    /// `error` as text, which must hold all of `parts`.
    #[track_caller]
    fn assert_says<T: fmt::Debug>(answer: Result<T>, parts: &[&str]) {
        let text = answer.unwrap_err().to_string();
        for part in parts {
            assert!(text.contains(part), "expected {part:?} in: {text}");
        }
    }

    // What a template is told.

    #[test]
    fn without_options_there_is_nothing_but_the_messages() {
        let template = "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}\
                        {{ strftime_now is defined }}{{ unk_token is defined }}{{ unk_token }}";
        assert_eq!(plain(template).unwrap(), "TrueTrueFalseFalseFalse");
    }

    #[test]
    fn tools_and_documents_keep_the_order_of_their_keys() {
        let options = RenderOptions {
            tools: Some(vec![json!({"z": 1, "a": {"y": [1.5, null], "b": "é"}})]),
            documents: Some(vec![json!({"title": "t", "a": 0})]),
            ..RenderOptions::default()
        };
        assert_eq!(
            ask("{{ tools | tojson }}{{ documents[0] }}", &options).unwrap(),
            r#"[{"z": 1, "a": {"y": [1.5, null], "b": "é"}}]{'title': 't', 'a': 0}"#
        );
        let options = RenderOptions { tools: Some(Vec::new()), ..RenderOptions::default() };
        assert_eq!(ask("{{ tools }}{{ tools is none }}", &options).unwrap(), "[]False");
    }

    #[test]
    fn variables_come_before_special_tokens() {
        let options = RenderOptions {
            variables: json!({"bos_token": "<b>", "x": null}).as_object().unwrap().clone(),
            ..RenderOptions::default()
        };
        let text = ask("{{ bos_token }}{{ eos_token }}{{ x is none }}", &options).unwrap();
        assert_eq!(text, "<b></s>True");
    }

    #[test]
    fn a_date_is_told_only_where_one_is_given() {
        let tests = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}then{% endif %}";
        assert_eq!(plain(tests).unwrap(), "then");
        assert_eq!(ask(tests, &with_date()).unwrap(), "07 Mar 2026");
        let asks = "\n{% macro f() %}{{ strftime_now('%Y') }}{% endmacro %}{{ f() }}";
        assert_eq!(ask(asks, &with_date()).unwrap(), "\n2026");
        assert_says(
            plain(asks),
            &["\"default\"", "line 2: expected a date", "RenderOptions::date"],
        );
        assert_says(ask("{{ strftime_now('%Q') }}", &with_date()), &["\"%Q\" is no format"]);
    }

    #[test]
    fn a_message_is_any_object() {
        let template = "{% for m in messages %}{{ m }}{% endfor %}";
        let text = templates(template).render(
            &[json!({"b": 1, "role": "x", "a": null, "c": {"d": null}}), json!({})],
            &RenderOptions::default(),
        );
        assert_eq!(text.unwrap(), "{'b': 1, 'role': 'x', 'c': {'d': None}}{}");
        let message = Message::assistant("x").with("tool_calls", json!([{"id": 1}]));
        let text = templates(template).render(&[message], &RenderOptions::default());
        assert_eq!(
            text.unwrap(),
            "{'role': 'assistant', 'content': 'x', 'tool_calls': [{'id': 1}]}"
        );
    }

    #[test]
    fn reasoning_has_all_its_names() {
        let template = "{{ messages[0] }}";
        let text =
            |message| templates(template).render(&[message], &RenderOptions::default()).unwrap();
        assert_eq!(
            text(json!({"role": "a", "reasoning": "r", "thinking": null})),
            "{'thinking': 'r', 'role': 'a', 'reasoning': 'r', 'reasoning_content': 'r'}"
        );
        assert_eq!(
            text(json!({"role": "a", "thinking": "t", "reasoning_content": "c"})),
            "{'thinking': 't', 'role': 'a', 'reasoning_content': 'c'}"
        );
    }

    // Several templates.

    #[test]
    fn the_template_for_tools_is_taken_where_tools_are_given() {
        let both = templates("plain").with_template("tool_use", "tools").unwrap();
        let both = both.with_template("rag", "rag").unwrap();
        assert_eq!(both.names().collect::<Vec<_>>(), ["default", "rag", "tool_use"]);
        let text = |template: Option<&str>, tools: Option<Vec<Json>>| {
            let template = template.map(str::to_owned);
            let options = RenderOptions { template, tools, ..RenderOptions::default() };
            both.render(&[Message::user("")], &options)
        };
        assert_eq!(text(None, None).unwrap(), "plain");
        assert_eq!(text(None, Some(Vec::new())).unwrap(), "tools");
        assert_eq!(text(Some("rag"), Some(Vec::new())).unwrap(), "rag");
        assert_says(
            text(Some("rug"), None),
            &["named \"rug\"", "\"default\", \"rag\", \"tool_use\""],
        );
        let none = ChatTemplates::default().with_template("rag", "rag").unwrap();
        assert_says(
            none.render(&[Message::user("")], &RenderOptions::default()),
            &["one named \"default\"", "RenderOptions::template, found \"rag\""],
        );
    }

    #[test]
    fn without_a_template_the_message_says_what_to_do() {
        let none = ChatTemplates::default();
        assert!(none.is_empty() && !templates("").is_empty());
        assert_says(
            none.render(&[Message::user("")], &RenderOptions::default()),
            &["chat_template.jinja", "tokenizer_config.json", "copy it", "found neither"],
        );
    }

    #[test]
    fn a_name_like_a_page_escapes_nothing() {
        let page =
            ChatTemplates::default().with_template("a.html", "{{ messages[0].content }}").unwrap();
        let options = RenderOptions { template: Some("a.html".into()), ..RenderOptions::default() };
        assert_eq!(page.render(&[Message::user("<&>")], &options).unwrap(), "<&>");
    }

    // Refusals.

    #[test]
    fn a_refusal_by_the_template_is_in_its_own_words() {
        let template = "{% macro no() %}{{ raise_exception('roles must <alternate>') }}{% endmacro %}{{ no() }}";
        let error = plain(template).unwrap_err();
        assert!(
            matches!(error.kind(), ErrorKind::Refused { reason } if reason == "roles must <alternate>")
        );
        assert_says(
            Err::<(), _>(error),
            &["the chat template refuses this conversation: roles must"],
        );
    }

    #[test]
    fn an_error_names_template_and_line() {
        for (template, parts) in [
            ("\n{{ messages[0].x.y }}", ["line 2", "`messages[0].x` is undefined", "may lack"]),
            ("{{ 'a' + 1 }}", ["line 1", "+ operator", "may lack"]),
            ("{% for x in none %}{% endfor %}", ["line 1", "None cannot be looped over", ""]),
            ("{{ x | tojson }}", ["line 1", "tojson cannot write a value of type undefined", ""]),
            ("{{ 'a' | wrap }}", ["line 1", "filter wrap is unknown", "not supported here"]),
            ("{{ 'a'.wrap() }}", ["line 1", "no method named wrap", "not supported here"]),
            ("{{ wrap() }}", ["line 1", "wrap is unknown", "not supported here"]),
            ("{% include 'x' %}", ["line 1", "non-existing template 'x'", ""]),
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", ["line 1", "recursion limit", ""]),
        ] {
            let error = plain(template).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::Template { .. }));
            assert_says(Err::<(), _>(error), &parts);
        }
    }

    #[test]
    fn a_template_that_does_not_parse_is_refused_at_once() {
        for (template, reason) in [
            ("{% if x %}", "unexpected end of input"),
            ("a\n\n{{ 'x }}", "line 3: syntax error: unexpected end of string"),
            ("{% endfor %}", "unknown statement endfor"),
            ("{% generation %}", "unexpected end of input"),
            ("{% generation x %}{% endgeneration %}", "syntax error"),
            ("{% endgeneration %}", "unknown statement endcall"),
            ("{{ '\\N{BULLET}' }}", "bad string escape"),
            ("{# {{ x }}", "unexpected end of comment"),
        ] {
            let templates = ChatTemplates::default().with_default(template);
            assert_says(
                templates,
                &["chat template \"default\": line", reason, "mend the template"],
            );
        }
    }

    #[test]
    fn arguments_that_cannot_be_rendered_are_refused() {
        let render =
            |messages: &[Json], options: &RenderOptions| templates("x").render(messages, options);
        let options = RenderOptions::default();
        let message = json!({"role": "user"});
        assert_says(
            render(&[], &options),
            &["messages: expected at least one message, found none"],
        );
        let messages = [message.clone(), json!("hi")];
        assert_says(
            render(&messages, &options),
            &["expected JSON objects, found a string as entry 2"],
        );
        let tools = RenderOptions { tools: Some(vec![json!("f")]), ..options.clone() };
        assert_says(render(&messages[..1], &tools), &["tools: expected JSON objects", "entry 1"]);
        let documents = RenderOptions { documents: Some(vec![json!(1)]), ..options.clone() };
        assert_says(render(&messages[..1], &documents), &["documents: expected JSON objects"]);
        for name in RESERVED {
            let variables = [(name.to_owned(), json!(1))].into_iter().collect();
            let options = RenderOptions { variables, ..options.clone() };
            assert_says(render(&messages[..1], &options), &["variables", name, "own place"]);
        }
        let no_json = [std::collections::BTreeMap::from([((1, 2), 3)])];
        assert_says(templates("x").render(&no_json, &options), &["entry 1", "serde says"]);
    }

    // Continued messages.

    fn go_on(template: &str, message: Message) -> Result<String> {
        let options = RenderOptions { continue_final_message: true, ..RenderOptions::default() };
        templates(template).render(&[Message::user("q"), message], &options)
    }

    #[test]
    fn a_continued_message_ends_where_its_content_ends() {
        let template = "{% for m in messages %}[{{ m.content }}]{% endfor %}.";
        assert_eq!(go_on(template, Message::assistant("a b ")).unwrap(), "[q][a b ");
        let trims = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}.";
        assert_eq!(go_on(trims, Message::assistant("a b ")).unwrap(), "[q][a b");
        let parts = "{{ messages[1].content[0].text }}{{ messages[1].content[1].text }}!";
        let message = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        assert_eq!(go_on(parts, Message::new("assistant", message)).unwrap(), "ab");
    }

    #[test]
    fn a_message_that_cannot_be_continued_is_refused() {
        let template = "{% for m in messages %}{{ m.content }}{% endfor %}";
        for (template, message, expected) in [
            (template, Message::new("assistant", Json::Null), "text in the last message's content"),
            (template, Message::new("assistant", 3), "text in the last message's content"),
            (template, Message::new("assistant", json!([{"type": "image"}])), "text in the last"),
            ("{{ messages }}", Message::assistant("a"), "a template that prints \"content\""),
            (
                "{{ 'content' }}",
                Message::assistant("a"),
                "prints the last message's content as it is",
            ),
            (
                "{{ messages[1].content | upper }}CONTINUE_FINAL_MESSAGE_TAG",
                Message::assistant("a"),
                "prints the last message's content as it is",
            ),
        ] {
            assert_says(go_on(template, message), &["continue_final_message: expected", expected]);
        }
        let both = RenderOptions {
            continue_final_message: true,
            add_generation_prompt: true,
            ..RenderOptions::default()
        };
        assert_says(ask(template, &both), &["no add_generation_prompt", "found both"]);
        let options = RenderOptions { continue_final_message: true, ..RenderOptions::default() };
        let marked = templates(template).render_marked(&[Message::user("")], &options);
        assert_says(marked, &["continue_final_message", "marked"]);
    }

    // Marked answers.

    fn marked(template: &str) -> Result<MarkedText> {
        let messages = [Message::user("é"), Message::assistant("yes"), Message::assistant("no")];
        templates(template).render_marked(&messages, &RenderOptions::default())
    }

    /// The marked parts themselves.
    fn answers(template: &str) -> Vec<String> {
        let marked = marked(template).unwrap();
        let answers = marked.answers.unwrap();
        answers.into_iter().map(|range| marked.text[range].to_owned()).collect()
    }

    #[test]
    fn answers_are_found_wherever_they_are_written() {
        let turn = "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}.{% endgeneration %}{% else %}{{ m.content }}{% endif %}";
        let looped = format!("{{% for m in messages %}}{turn}|{{% endfor %}}");
        assert_eq!(answers(&looped), ["yes.", "no."]);
        // Where transformers gives wrong places, since it counts what was written at the top only.
        let in_macro = format!(
            "{{% macro f(m) %}}<{turn}>{{% endmacro %}}é{{% for m in messages %}}{{{{ f(m) }}}}{{% endfor %}}"
        );
        assert_eq!(answers(&in_macro), ["yes.", "no."]);
        let in_set = format!("{{% set x %}} {looped} {{% endset %}}{{{{ x | trim }}}}");
        assert_eq!(answers(&in_set), ["yes.", "no."]);
        assert_eq!(
            answers("{% if false %}{% generation %}x{% endgeneration %}{% endif %}"),
            [""; 0]
        );
        let nested = "{% generation %}a{% generation %}b{% endgeneration %}c{% endgeneration %}";
        assert_eq!(answers(nested), ["abc", "b"]);
    }

    #[test]
    fn a_template_without_marks_has_none() {
        let found = marked("{{ messages[1].content }}{# {% generation %} #}").unwrap();
        assert_eq!(found, MarkedText { text: "yes".to_owned(), answers: None });
    }

    #[test]
    fn answers_that_change_later_are_refused() {
        let answer =
            "{% set x %}{% generation %} {{ messages[1].content }}{% endgeneration %}{% endset %}";
        for change in ["x | trim", "x | length", "x[1:]"] {
            let template = format!("{answer}{{{{ {change} }}}}");
            assert!(
                templates(&template)
                    .render(&[Message::user("")], &RenderOptions::default())
                    .is_err()
            );
            assert_says(
                marked(&template),
                &["expected answers that are written once", "without marks"],
            );
        }
    }

    #[test]
    fn marks_in_a_message_are_told_from_our_own() {
        let template =
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}";
        let forged = [Message::assistant(format!("a{CLOSE}b{OPEN}"))];
        let found = templates(template).render_marked(&forged, &RenderOptions::default());
        assert_says(found, &["expected answers that are written once"]);
    }

    // Python.

    #[test]
    fn generation_has_a_scope_of_its_own() {
        let template =
            "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}";
        assert_eq!(plain(template).unwrap(), "21");
    }

    #[test]
    fn integers_of_64_bits_and_floats_are_exact() {
        let options = RenderOptions {
            variables: json!({"a": u64::MAX, "b": i64::MIN, "c": 0.1, "d": 1e16, "e": -2.5e-7})
                .as_object()
                .unwrap()
                .clone(),
            ..RenderOptions::default()
        };
        assert_eq!(
            ask("{{ a }} {{ b }} {{ [c, d, e] }} {{ 'x' ~ d }}{{ [a, d] | tojson }}", &options)
                .unwrap(),
            "18446744073709551615 -9223372036854775808 [0.1, 1e+16, -2.5e-07] x1e+16[18446744073709551615, 1e+16]"
        );
    }

    #[test]
    fn a_float_with_an_exponent_is_a_number() {
        let variables = json!({"scores": [1e-5, 0.001, 1e20], "tiny": 1e-7, "big": 1e20});
        let options = RenderOptions {
            variables: variables.as_object().unwrap().clone(),
            ..RenderOptions::default()
        };
        for (template, expected) in [
            (
                "{% for s in scores %}{% if s < 0.5 %}low{% else %}high{% endif %}{% endfor %}",
                "lowlowhigh",
            ),
            ("{{ tiny == 1e-7 }} {{ big == 1e20 }} {{ tiny in [1e-7] }}", "True True True"),
            ("{{ [big, tiny, 1] | sort }}", "[1e-07, 1, 1e+20]"),
            ("{{ [big, tiny] | max }} {{ [big, tiny] | min }}", "1e+20 1e-07"),
            ("{{ tiny + big }} {{ tiny * 2 }} {{ tiny | abs }}", "1e+20 2e-07 1e-07"),
            ("{{ tiny | round(2) }} {{ '%.3f' | format(tiny) }}", "0.0 0.000"),
            ("{{ tiny ~ big ~ 1e20 ~ [1e20] }}", "1e-071e+201e+20[1e+20]"),
            ("{{ [big, tiny] | join(' ') }} {{ big | string }}", "1e+20 1e-07 1e+20"),
            ("{{ [tiny, big * 10] | tojson }}", "[1e-07, 1e+21]"),
        ] {
            assert_eq!(ask(template, &options).unwrap(), expected, "{template}");
        }
    }

    /// As jinja2 renders them with the settings of transformers.
    #[test]
    fn raw_text_and_loops_over_a_text_are_jinjas() {
        for (template, expected) in [
            ("{% raw %}\na\n{% endraw %}\nb", "\na\nb"),
            ("{% raw -%}\na{%- endraw %}", "a"),
            ("x {%- raw %}\n{% endraw %}y", "x\ny"),
            ("{% for c in 'aé' %}{{ c }}{% if not loop.last %}, {% endif %}{% endfor %}", "a, é"),
            ("{% for c in 'ab' %}{{ loop.length }}{{ loop.revindex }}{% endfor %}", "2221"),
        ] {
            assert_eq!(plain(template).unwrap(), expected, "{template}");
        }
    }

    #[test]
    fn joined_values_are_written_as_python_writes_them() {
        for (template, expected) in [
            ("{{ 'n' ~ none ~ [none, 'é'] ~ x ~ true }}", "nNone[None, 'é']True"),
            ("{{ 1 ~ -2 * 3 ~ ('a' ~ 'b')|upper }}", "1-6AB"),
            ("{{ ('<' | safe ~ '>') | e }}{{ ('<' | safe ~ '>' | safe) | e }}", "&lt;&gt;<>"),
            ("{% autoescape true %}{{ '<' | safe ~ '>' ~ [1] }}{% endautoescape %}", "<&gt;[1]"),
        ] {
            assert_eq!(plain(template).unwrap(), expected, "{template}");
        }
        assert_says(plain("{{ 'a' ~ ('b' + 1) }}"), &["line 1", "+ operator"]);
        for template in ["{{ a ~ }}", "{{ ~ a }}", "{{ a ~ ~ b }}"] {
            assert_says(ChatTemplates::default().with_default(template), &["line 1: syntax error"]);
        }
    }

    #[test]
    fn a_namespace_never_holds_itself() {
        for value in [
            "ns",
            "[ns]",
            "{'a': [ns]}",
            "(1, ns)",
            "[ns] | list",
            "[[ns]] | map('first')",
            "[1] + [ns]",
        ] {
            let template =
                format!("{{% set ns = namespace(x=1) %}}\n{{% set ns.x = {value} %}}{{{{ ns }}}}");
            assert_says(
                plain(&template),
                &["line 2", "namespace attribute x: expected a value without a namespace in it"],
            );
        }
        assert_says(
            plain("{% set a = namespace(x=namespace()) %}"),
            &["attribute x: expected a value"],
        );
        let deep = "{% set ns = namespace(x=1) %}{% for i in range(99999) %}{% set ns.x = WITHIN %}{% endfor %}";
        for within in ["[ns.x]", "{'a': ns.x}", "[ns.x, ns.x]", "[[ns.x]] | map('list')"] {
            assert_says(
                plain(&deep.replace("WITHIN", within)),
                &["namespace attribute x: expected at most"],
            );
        }
        let text = "{{ ns ~ 'a' }}{{ ns | upper }}{{ '{}'.format(ns) }}{{ ns }}{{ [ns] }}{{ 'a'.join([ns]) }}";
        assert_eq!(
            plain(&format!("{{% set ns = namespace(x=1) %}}{text}")).unwrap(),
            "<Namespace {'x': 1}>a<NAMESPACE {'X': 1}><Namespace {'x': 1}><Namespace {'x': 1}>\
             [<Namespace {'x': 1}>]<Namespace {'x': 1}>"
        );
        assert_says(plain("{{ namespace(a=1) | tojson }}"), &["tojson cannot write"]);
        assert_says(
            plain("{% set x = 1 %}{% set x.y = 1 %}"),
            &["expected a namespace before the point"],
        );
    }

    #[test]
    fn a_namespace_holds_what_a_template_sets() {
        let start = "{% set ns = namespace({'a': 1}, b=[2]) %}";
        for (template, expected) in [
            ("{{ ns.a }}{{ ns['b'] }}{{ ns.c is defined }}", "1[2]False"),
            ("{% set ns.c = none %}{% set ns.a = x %}{{ ns.c }}{{ ns.a is defined }}", "NoneFalse"),
            ("{% set ns.a %}x{{ ns.a }}{% endset %}{{ ns.a }}", "x1"),
            (
                "{% macro f() %}{% set ns.a = ns.a + 1 %}{% endmacro %}{{ f() }}{{ f() }}{{ ns.a }}",
                "3",
            ),
            ("{% macro f(x) %}<{{ x }}>{% endmacro %}{% set ns.f = f %}{{ ns.f(1) }}", "<1>"),
            ("{% set ns.a = 1, 2 %}{{ ns.a }}", "(1, 2)"),
            ("{% set ns.a = [1, 2] | map('string') %}{{ ns.a | list }}", "['1', '2']"),
            ("{% set d = {'k': 'v'} %}{% set ns.a = d.items() %}{{ ns.a | list }}", "[('k', 'v')]"),
            ("{% set d = {'k': 'v'} %}{% set ns.a = d | items %}{{ ns.a | list }}", "[('k', 'v')]"),
            ("{% set ns.a = ([1, 2, 3] | reverse | list)[1:] + [4] %}{{ ns.a }}", "[2, 1, 4]"),
            ("{% set ns.a = [1, 2, 3] | batch(2) %}{{ ns.a | list }}", "[[1, 2], [3]]"),
            (
                "{% set ns.a = range(3) %}{% set ns.b = [0] * 2 %}{{ ns.a | list }}{{ ns.b }}",
                "[0, 1, 2][0, 0]",
            ),
            ("{% set ns.a = messages | reverse %}{{ ns.a | list | length }}", "1"),
        ] {
            assert_eq!(plain(&format!("{start}{template}")).unwrap(), expected, "{template}");
        }
    }

    #[test]
    fn a_long_tag_is_refused_where_the_stack_is_small() {
        let expression = |of: &str, times: usize| match of {
            "+1" | "|abs" | ".b" | "()" => format!("{{{{ a{} }}}}", of.repeat(times)),
            "(" => format!("{{% set {}a{} = 1 %}}", of.repeat(times), ")".repeat(times)),
            "elif" => format!("{{% if a %}}{}{{% endif %}}", "{% elif b %}".repeat(times)),
            prefix => format!("{{{{ {}1 }}}}", prefix.repeat(times)),
        };
        let threads = std::thread::Builder::new().stack_size(2 << 20);
        let test = move || {
            for of in ["+1", "|abs", ".b", "()", "(", "not ", "-", "1 if 1 else ", "elif"] {
                let most = if of == "elif" {
                    100
                } else if of.contains("if") {
                    150
                } else {
                    290
                };
                let most = ChatTemplates::default().with_default(expression(of, most)).unwrap();
                let _ = most.render(&[Message::user("hi")], &RenderOptions::default());
                for times in [24_000, 50_000] {
                    let found = ChatTemplates::default().with_default(expression(of, times));
                    assert_says(found, &["chat template \"default\": line 1: expected at most"]);
                }
            }
        };
        threads.spawn(test).unwrap().join().unwrap();
    }

    #[test]
    fn json_that_is_nested_too_deep_is_refused() {
        let deep = (0..300).fold(json!(1), |inner, _| json!([inner]));
        let message = json!({"role": "user", "content": deep});
        let render = |template| templates(template).render(&[&message], &RenderOptions::default());
        assert_says(render("{{ messages | tojson }}"), &["more than 200 levels"]);
        assert!(render("{{ messages }}").unwrap().contains("[...]"));
    }

    #[test]
    fn debug_does_not_print_the_templates() {
        let text = format!("{:?}", templates("a long template"));
        assert!(
            text.contains("default") && text.contains("<s>") && !text.contains("long"),
            "{text}"
        );
        // Nor the conversation, where an error is printed by a program that ends.
        let error = templates("{{ messages[0].content.x.y }}")
            .render(&[Message::user("secret")], &RenderOptions::default())
            .unwrap_err();
        assert!(!format!("{error:?}").contains("secret"), "{error:?}");
    }
}
