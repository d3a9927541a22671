//! Where a chat template means Python: `tojson`, tests and filters, and the methods of strings.
//!
//! minijinja and its `pycompat` have most of it. Here is what they lack or do otherwise than
//! Jinja2 3.1 on CPython, as far as chat templates can meet it.

use std::borrow::Cow;
use std::fmt::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use minijinja::value::{
    ArgType, DynObject, Enumerator, Kwargs, Object, ObjectRepr, Rest, Tuple, ValueKind,
    ValueOrKwargs, from_args,
};
use minijinja::{
    AutoEscape, Environment, Error, ErrorKind, Output, State, Value, escape_formatter, filters,
};
use minijinja_contrib::{globals, pycompat};

use super::namespace::{self, Namespace};
use super::source;

/// Jinja as Hugging Face sets it up in `transformers/utils/chat_template_utils.py`, but for what
/// belongs to a conversation.
pub(super) fn add_to(environment: &mut Environment<'static>) {
    environment.set_formatter(format);
    environment.set_unknown_method_callback(method);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("joiner", globals::joiner);
    environment.add_function("namespace", namespace::namespace);
    environment.add_function(source::SET, namespace::set);
    environment.add_function(source::CONCATENATE, concatenate);
    environment.add_filter(source::EACH, each);
    environment.add_filter("tojson", tojson);
    environment.add_filter("string", string);
    environment.add_filter("join", join);
    environment.add_filter("list", list);
    environment.add_filter("trim", trim);
    environment.add_filter("int", int);
    environment.add_filter("float", float_filter);
    environment.add_filter("map", map);
    environment.add_filter("select", select);
    environment.add_filter("reject", reject);
    environment.add_filter("selectattr", selectattr);
    environment.add_filter("rejectattr", rejectattr);
    environment.add_test("sequence", is_sequence);
    environment.add_test("iterable", is_iterable);
    environment.add_test("callable", is_callable);
    environment.add_test("number", is_number);
    environment.add_test("float", is_float);
    // What Jinja does not have, or has otherwise (pprint), is refused and not made up.
    for filter in ["bool", "chain", "lines", "pprint", "split", "zip"] {
        environment.remove_filter(filter);
    }
    for test in ["endingwith", "int", "safe", "startingwith"] {
        environment.remove_test(test);
    }
    environment.remove_global("debug");
}

/// What a template says by `raise_exception`, as the source of minijinja's error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Refusal(pub(super) String);

fn raise_exception(message: &str) -> Result<Value, Error> {
    let refusal = Refusal(message.to_owned());
    Err(Error::new(ErrorKind::InvalidOperation, message.to_owned()).with_source(refusal))
}

/// In Python, strings and mappings have a length and can be indexed, too.
fn is_sequence(value: &Value) -> bool {
    use ValueKind::{Iterable, Map, Seq, String, Undefined};
    // A slice of a list is a list in Python, and an iterable of known length here.
    matches!(value.kind(), Seq | String | Map | Undefined)
        || value.kind() == Iterable && value.len().is_some()
}

/// None is no iterable in Python, though an undefined value is.
fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

fn is_callable(value: &Value) -> bool {
    value.kind() == ValueKind::Plain && value.downcast_object_ref::<Namespace>().is_none()
}

fn is_number(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Number | ValueKind::Bool)
}

fn is_float(value: &Value) -> bool {
    value.kind() == ValueKind::Number && !value.is_integer()
}

fn each(value: Value) -> Result<Value, Error> {
    if value.is_none() {
        return Err(Error::new(ErrorKind::InvalidOperation, "None cannot be looped over"));
    }
    // A list of a text's characters, since `loop.last` needs to know how many there are.
    Ok(match value.as_str() {
        Some(text) => text.chars().map(|character| Value::from(character.to_string())).collect(),
        None => value,
    })
}

fn items(value: Value) -> Result<Vec<Value>, Error> {
    let mut items = Vec::new();
    for item in each(value)?.try_iter()?.checked() {
        items.push(item?);
    }
    Ok(items)
}

fn list(value: Value) -> Result<Value, Error> {
    items(value).map(Value::from)
}

/// Jinja answers 0, or the default, for a text that is no number.
fn int(
    state: &State,
    value: &Value,
    default: Option<Value>,
    base: Option<u32>,
    named: Kwargs,
) -> Result<Value, Error> {
    let default = argument(default, &named, "default")?;
    let base = argument(base, &named, "base")?;
    named.assert_all_used()?;
    let none = std::iter::empty::<(&str, Value)>();
    let number = filters::int(state, value, default.clone(), base, none.collect());
    match (number, value.kind()) {
        (Err(_), ValueKind::String) => Ok(default.unwrap_or(Value::from(0))),
        (number, _) => number,
    }
}

fn float_filter(value: &Value, default: Option<Value>, named: Kwargs) -> Result<Value, Error> {
    let default = argument(default, &named, "default")?;
    named.assert_all_used()?;
    let number = match value.as_str() {
        Some(text) => text.trim_matches(is_space).parse().ok(),
        None => f64::try_from(value.clone()).ok(),
    };
    Ok(number.map_or_else(|| default.unwrap_or(Value::from(0.0)), Value::from))
}

/// What Python gives out one item after the other, and once: it has no length, counts as true even
/// without items, and is empty when it is looped over again.
#[derive(Debug)]
pub(super) struct Generator(Mutex<std::vec::IntoIter<Value>>);

impl Generator {
    fn value(items: Vec<Value>) -> Value {
        Value::from_object(Self(Mutex::new(items.into_iter())))
    }

    fn items(&self) -> MutexGuard<'_, std::vec::IntoIter<Value>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The items that it has not given out, which it still will.
    pub(super) fn rest(&self) -> Vec<Value> {
        self.items().as_slice().to_vec()
    }
}

impl Object for Generator {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn get_value(self: &Arc<Self>, _key: &Value) -> Option<Value> {
        Some(Value::UNDEFINED) // it cannot be indexed
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Iter(Box::new(Items(self.clone())))
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        None
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<generator object>")
    }
}

struct Items(Arc<Generator>);

impl Iterator for Items {
    type Item = Value;

    fn next(&mut self) -> Option<Value> {
        self.0.items().next()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.0.items().size_hint() // for `loop.length`
    }
}

fn map(state: &mut State, value: Value, options: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    filters::map(state, each(value)?, options).map(Generator::value)
}

fn select(
    state: &mut State,
    value: Value,
    test: Option<Cow<'_, str>>,
    options: Rest<ValueOrKwargs>,
) -> Result<Value, Error> {
    filters::select(state, value, test, options).map(Generator::value)
}

fn reject(
    state: &mut State,
    value: Value,
    test: Option<Cow<'_, str>>,
    options: Rest<ValueOrKwargs>,
) -> Result<Value, Error> {
    filters::reject(state, value, test, options).map(Generator::value)
}

fn selectattr(
    state: &mut State,
    value: Value,
    name: Cow<'_, str>,
    test: Option<Cow<'_, str>>,
    options: Rest<ValueOrKwargs>,
) -> Result<Value, Error> {
    filters::selectattr(state, value, name, test, options).map(Generator::value)
}

fn rejectattr(
    state: &mut State,
    value: Value,
    name: Cow<'_, str>,
    test: Option<Cow<'_, str>>,
    options: Rest<ValueOrKwargs>,
) -> Result<Value, Error> {
    filters::rejectattr(state, value, name, test, options).map(Generator::value)
}

/// A dict of Python, where a method comes before a key of the same name: `schema.items` is a method,
/// `schema['items']` a value.
pub(super) fn dict(fields: Vec<(String, Value)>) -> Value {
    Value::from_object(Dict(Value::from_pairs(fields)))
}

#[derive(Debug)]
struct Dict(Value);

impl Dict {
    const METHODS: [&str; 11] = [
        "clear",
        "copy",
        "fromkeys",
        "get",
        "items",
        "keys",
        "pop",
        "popitem",
        "setdefault",
        "update",
        "values",
    ];

    fn fields(&self) -> Option<&DynObject> {
        self.0.as_object()
    }
}

impl Object for Dict {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.fields()?.get_value(key)
    }

    // minijinja asks this way for `dict.name` alone.
    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<Value> {
        match Self::METHODS.iter().find(|name| **name == key) {
            Some(name) => Some(Value::from_object(Method { of: self.0.clone(), name })),
            None => self.fields()?.get_value_by_str(key),
        }
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        self.fields().map_or(Enumerator::Empty, DynObject::enumerate)
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        self.fields()?.enumerator_len()
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&repr(&self.0))
    }
}

/// A method that is not called yet.
#[derive(Debug)]
struct Method {
    of: Value,
    name: &'static str,
}

impl Object for Method {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, state: &mut State<'_, '_>, args: &[Value]) -> Result<Value, Error> {
        method(state, &self.of, self.name, args)
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<built-in method {} of dict object>", self.name)
    }
}

/// What `{{ value }}` writes.
fn format(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Number | ValueKind::Seq | ValueKind::Map | ValueKind::Iterable => {
            Ok(out.write_str(&str(value))?)
        }
        _ => escape_formatter(out, state, value),
    }
}

/// What `a ~ b ~ c` gives. minijinja's operator writes values in its own way: `1e20` with all of its
/// zeros.
fn concatenate(state: &mut State, parts: Rest<Value>) -> Result<Value, Error> {
    if matches!(state.auto_escape(), AutoEscape::None) || !parts.iter().any(Value::is_safe) {
        let text = parts.iter().map(str).collect::<String>();
        return Ok(match parts.iter().all(Value::is_safe) {
            true => Value::from_safe_string(text),
            false => Value::from(text),
        });
    }
    let mut text = String::new();
    for part in parts.iter() {
        let part = if part.is_safe() { part.clone() } else { Value::from(str(part)) };
        text.push_str(&str(&state.apply_filter("escape", &[part])?));
    }
    Ok(Value::from_safe_string(text))
}

/// Python's `str`.
pub(super) fn str(value: &Value) -> String {
    match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::String => value.to_string(),
        _ => repr(value),
    }
}

/// Python's `repr`.
fn repr(value: &Value) -> String {
    let mut text = String::new();
    write_repr(value, 0, &mut text);
    text
}

fn write_repr(value: &Value, depth: usize, text: &mut String) {
    let entries = |text: &mut String, depth| {
        for (index, item) in value.try_iter().into_iter().flatten().enumerate() {
            text.push_str(if index > 0 { ", " } else { "" });
            write_repr(&item, depth, text);
        }
    };
    match value.kind() {
        ValueKind::Undefined => text.push_str("Undefined"),
        ValueKind::Number => text.push_str(&number(value, ["nan", "inf", "-inf"])),
        ValueKind::String => write_literal(value.as_str().unwrap_or_default(), text),
        // Deeper than anything that is printed for a reason, and the stack has an end.
        _ if depth == MAX_DEPTH => text.push_str("..."),
        ValueKind::Seq if value.is_tuple() => {
            text.push('(');
            entries(text, depth + 1);
            text.push_str(if value.len() == Some(1) { ",)" } else { ")" });
        }
        ValueKind::Seq => {
            text.push('[');
            entries(text, depth + 1);
            text.push(']');
        }
        ValueKind::Iterable if value.len().is_some() => {
            text.push('[');
            entries(text, depth + 1);
            text.push(']');
        }
        ValueKind::Map => {
            text.push('{');
            for (index, key) in value.try_iter().into_iter().flatten().enumerate() {
                text.push_str(if index > 0 { ", " } else { "" });
                write_repr(&key, depth + 1, text);
                text.push_str(": ");
                write_repr(&value.get_item(&key).unwrap_or_default(), depth + 1, text);
            }
            text.push('}');
        }
        _ => text.push_str(&value.to_string()),
    }
}

/// A string with quotes. What Python does not print is escaped, as what Rust does not print.
fn write_literal(string: &str, text: &mut String) {
    let quote = if string.contains('\'') && !string.contains('"') { '"' } else { '\'' };
    text.push(quote);
    for c in string.chars() {
        match c {
            '\\' => text.push_str("\\\\"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            c if c == quote => text.extend(['\\', c]),
            c if is_printable(c) => text.push(c),
            c => {
                let code = u32::from(c);
                let _ = match code {
                    // cannot fail on a String
                    0..=0xff => write!(text, "\\x{code:02x}"),
                    0x100..=0xffff => write!(text, "\\u{code:04x}"),
                    _ => write!(text, "\\U{code:08x}"),
                };
            }
        }
    }
    text.push(quote);
}

/// Python's `str.isprintable`. The standard library escapes by the same rule, but for a combining mark,
/// which it escapes at the beginning only.
fn is_printable(c: char) -> bool {
    matches!(c, '\'' | '"') || format!("x{c}").escape_debug().eq(['x', c])
}

fn string(value: &Value) -> Value {
    match value.kind() {
        ValueKind::String => value.clone(), // which may be marked as safe
        _ => Value::from(str(value)),
    }
}

fn join(
    state: &mut State,
    value: Value,
    separator: Option<Value>,
    attribute: Option<Value>,
    named: Kwargs,
) -> Result<String, Error> {
    let separator: Option<Value> = argument(separator, &named, "d")?;
    let attribute: Option<Value> = argument(attribute, &named, "attribute")?;
    named.assert_all_used()?;
    let value = match attribute {
        Some(attribute) => {
            let options = Kwargs::from_iter([("attribute", attribute)]);
            state.apply_filter("map", &[value, Value::from(options)])?
        }
        None => value,
    };
    let parts: Vec<String> = items(value)?.iter().map(str).collect();
    Ok(parts.join(&separator.as_ref().map_or_else(String::new, str)))
}

fn trim(value: &Value, chars: Option<&str>) -> String {
    let text = str(value);
    match chars {
        Some(chars) => text.trim_matches(|c| chars.contains(c)).to_owned(),
        None => text.trim_matches(is_space).to_owned(),
    }
}

/// Python's `str.isspace` for one character: Unicode's white space and four separators of ASCII.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\u{1c}'..='\u{1f}')
}

/// The methods that `pycompat` lacks or has otherwise, and then its own.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str()
        && let Some(answer) = string_method(text, name, args)?
    {
        return Ok(answer);
    }
    pycompat::unknown_method_callback(state, value, name, args)
}

fn string_method(text: &str, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let list = |parts: Vec<&str>| parts.into_iter().collect::<Value>();
    Ok(Some(match name {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            let strips = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
            let text = if name == "rstrip" { text } else { text.trim_start_matches(strips) };
            Value::from(if name == "lstrip" { text } else { text.trim_end_matches(strips) })
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "split" | "rsplit" => {
            let (separator, limit) = split_arguments(args)?;
            let limit = limit.unwrap_or(usize::MAX);
            list(match (&separator, name) {
                (Some(separator), "split") => {
                    text.splitn(limit.saturating_add(1), separator.as_str()).collect()
                }
                (Some(separator), _) => {
                    let pieces = text.rsplitn(limit.saturating_add(1), separator.as_str());
                    let mut parts: Vec<_> = pieces.collect();
                    parts.reverse();
                    parts
                }
                (None, "split") => words(text, limit),
                (None, _) => words_from_the_end(text, limit),
            })
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            not_empty(separator)?;
            let found = match name {
                "partition" => text.split_once(separator),
                _ => text.rsplit_once(separator),
            };
            let parts = match (found, name) {
                (Some((before, behind)), _) => [before, separator, behind],
                (None, "partition") => [text, "", ""],
                (None, _) => ["", "", text],
            };
            Value::from(Tuple::from(parts.map(Value::from)))
        }
        "splitlines" => {
            let (keep_ends, named): (Option<bool>, Kwargs) = from_args(args)?;
            let keep_ends = argument(keep_ends, &named, "keepends")?;
            named.assert_all_used()?;
            list(lines(text, keep_ends.unwrap_or(false)))
        }
        "title" => {
            let () = from_args(args)?;
            Value::from(title(text))
        }
        _ => return Ok(None),
    }))
}

/// `split(sep=None, maxsplit=-1)`; a negative limit is none.
fn split_arguments(args: &[Value]) -> Result<(Option<String>, Option<usize>), Error> {
    let (separator, limit, named): (Option<String>, Option<i64>, Kwargs) = from_args(args)?;
    let separator = argument(separator, &named, "sep")?;
    let limit: Option<i64> = argument(limit, &named, "maxsplit")?;
    named.assert_all_used()?;
    if let Some(separator) = &separator {
        not_empty(separator)?;
    }
    Ok((separator, limit.and_then(|limit| usize::try_from(limit).ok())))
}

/// An argument that may be given by its place or by its name; `None` of Python is none.
fn argument<'a, T>(given: Option<T>, named: &'a Kwargs, name: &'a str) -> Result<Option<T>, Error>
where
    Option<T>: ArgType<'a, Output = Option<T>>,
{
    match given {
        Some(given) => Ok(Some(given)),
        None => named.get(name),
    }
}

fn not_empty(separator: &str) -> Result<(), Error> {
    match separator {
        "" => Err(Error::new(ErrorKind::InvalidOperation, "the separator is empty")),
        _ => Ok(()),
    }
}

/// The words of a text, at most `limit` of them parted from the rest.
fn words(text: &str, limit: usize) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text.trim_start_matches(is_space);
    while parts.len() < limit
        && let Some(end) = rest.find(is_space)
    {
        parts.push(&rest[..end]);
        rest = rest[end..].trim_start_matches(is_space);
    }
    // Python leaves white space at the end of the rest, unless that is all there is.
    if !rest.is_empty() {
        parts.push(rest);
    }
    parts
}

fn words_from_the_end(text: &str, limit: usize) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text.trim_end_matches(is_space);
    while parts.len() < limit
        && let Some((at, c)) = rest.char_indices().rfind(|(_, c)| is_space(*c))
    {
        parts.push(&rest[at + c.len_utf8()..]);
        rest = rest[..at].trim_end_matches(is_space);
    }
    if !rest.is_empty() {
        parts.push(rest);
    }
    parts.reverse();
    parts
}

/// Python ends a line at more characters than Rust; `\r\n` is one end.
fn lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let ends = |c: char| matches!(c, '\n'..='\r' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(ends) {
        let end = match rest[at..].starts_with("\r\n") {
            true => at + 2,
            false => at + rest[at..].chars().next().map_or(0, char::len_utf8),
        };
        lines.push(&rest[..if keep_ends { end } else { at }]);
        rest = &rest[end..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

/// Python's method, which begins a word after anything that has no case; Jinja's filter of the same
/// name does so after white space and brackets only.
fn title(text: &str) -> String {
    let mut titled = String::with_capacity(text.len());
    let mut in_word = false;
    for c in text.chars() {
        if in_word {
            titled.extend(c.to_lowercase());
        } else {
            titled.extend(c.to_uppercase());
        }
        in_word = c.is_lowercase() || c.is_uppercase();
    }
    titled
}

/// `json.dumps(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`, as
/// Hugging Face defines the filter: a model has never seen the `\u003c` that Jinja's own would write
/// for `<`.
fn tojson(value: &Value, options: Rest<ValueOrKwargs>) -> Result<String, Error> {
    let options: Vec<Value> = options.0.into_iter().map(ValueOrKwargs::into_value).collect();
    type Options = (Option<Value>, Option<Value>, Option<Value>, Option<Value>, Kwargs);
    let (ascii, indent, separators, sorted, named): Options = from_args(&options)?;
    let ascii = argument(ascii, &named, "ensure_ascii")?.is_some_and(|value| value.is_true());
    let indent = argument(indent, &named, "indent")?;
    let separators = argument(separators, &named, "separators")?;
    let sorted = argument(sorted, &named, "sort_keys")?.is_some_and(|value| value.is_true());
    named.assert_all_used()?;

    let indent = match indent {
        None => None,
        Some(indent) => Some(match indent.as_str() {
            Some(text) => text.to_owned(),
            None => match i64::try_from(indent)? {
                ..0 => String::new(),
                width if width <= MAX_INDENT => " ".repeat(width as usize),
                _ => return Err(not_json(&format!("an indent of more than {MAX_INDENT}"))),
            },
        }),
    };
    let (item, key) = match separators {
        Some(separators) => {
            let parts: Vec<Value> = separators.try_iter()?.collect();
            match &parts[..] {
                [item, key] if item.as_str().is_some() && key.as_str().is_some() => {
                    (item.to_string(), key.to_string())
                }
                _ => return Err(not_json("separators other than two strings")),
            }
        }
        // Python leaves the space at a line's end out.
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let mut json = JsonWriter { ascii, indent, item, key, sorted, depth: 0, text: String::new() };
    json.value(value)?;
    Ok(json.text)
}

/// No model was trained on wider ones, and a template may come from anybody.
const MAX_INDENT: i64 = 1000;

fn not_json(found: &str) -> Error {
    Error::new(ErrorKind::BadSerialization, format!("tojson cannot write {found}"))
}

struct JsonWriter {
    ascii: bool,
    indent: Option<String>,
    item: String,
    key: String,
    sorted: bool,
    depth: usize,
    text: String,
}

impl JsonWriter {
    fn value(&mut self, value: &Value) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => self.text.push_str("null"),
            ValueKind::Bool => self.text.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.text.push_str(&number(value, JSON_NUMBERS)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Iterable if value.len().is_none() => {
                return Err(not_json("what gives out items once; make it a list by |list"));
            }
            ValueKind::Seq | ValueKind::Iterable => {
                let items = items(value.clone())?;
                self.enclosed('[', ']', &items, Self::value)?;
            }
            ValueKind::Map => {
                let mut entries = Vec::new();
                for key in value.try_iter()? {
                    entries.push((json_key(&key)?, value.get_item(&key)?));
                }
                if self.sorted {
                    entries.sort_by(|(a, _), (b, _)| a.cmp(b));
                }
                self.enclosed('{', '}', &entries, |json, (key, value)| {
                    json.string(key);
                    let separator = json.key.clone();
                    json.text.push_str(&separator);
                    json.value(value)
                })?;
            }
            kind => return Err(not_json(&format!("a value of type {kind}"))),
        }
        Ok(())
    }

    fn enclosed<T>(
        &mut self,
        open: char,
        close: char,
        items: &[T],
        write: impl Fn(&mut Self, &T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        if self.depth == MAX_DEPTH {
            return Err(not_json(&format!("more than {MAX_DEPTH} levels")));
        }
        self.text.push(open);
        self.depth += 1;
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                let separator = self.item.clone();
                self.text.push_str(&separator);
            }
            self.new_line();
            write(self, item)?;
        }
        self.depth -= 1;
        if !items.is_empty() {
            self.new_line();
        }
        self.text.push(close);
        Ok(())
    }

    fn new_line(&mut self) {
        if let Some(indent) = &self.indent {
            self.text.push('\n');
            self.text.push_str(&indent.repeat(self.depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.text.push('"');
        for c in text.chars() {
            match c {
                '"' => self.text.push_str("\\\""),
                '\\' => self.text.push_str("\\\\"),
                '\n' => self.text.push_str("\\n"),
                '\r' => self.text.push_str("\\r"),
                '\t' => self.text.push_str("\\t"),
                '\u{8}' => self.text.push_str("\\b"),
                '\u{c}' => self.text.push_str("\\f"),
                c if c < ' ' || self.ascii && !(' '..='~').contains(&c) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(self.text, "\\u{unit:04x}"); // cannot fail on a String
                    }
                }
                c => self.text.push(c),
            }
        }
        self.text.push('"');
    }
}

/// Python refuses at about a thousand levels, too; without a limit the stack would end first.
pub(super) const MAX_DEPTH: usize = 200;

/// A key of an object: strings, and what Python writes as one.
fn json_key(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.to_string()),
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.to_owned()),
        ValueKind::Number => Ok(number(key, JSON_NUMBERS)),
        kind => Err(not_json(&format!("a key of type {kind}"))),
    }
}

/// How JSON writes what is no number, and the infinities.
const JSON_NUMBERS: [&str; 3] = ["NaN", "Infinity", "-Infinity"];

/// A number, or one of the `special` ones.
fn number(value: &Value, special: [&str; 3]) -> String {
    match f64::try_from(value.clone()) {
        _ if value.is_integer() => value.to_string(),
        Ok(x) if x.is_nan() => special[0].to_owned(),
        Ok(x) if x.is_infinite() => special[if x > 0.0 { 1 } else { 2 }].to_owned(),
        Ok(x) => float(x),
        Err(_) => value.to_string(),
    }
}

/// Python's `repr` of a finite number: the fewest digits that give it back, with an exponent below
/// 1e-4 and from 1e16 on.
fn float(x: f64) -> String {
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(exponent) if !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.unsigned_abs())
        }
        _ => {
            let fixed = x.to_string();
            if fixed.contains('.') { fixed } else { fixed + ".0" }
        }
    }
}
