//! What is written otherwise in a chat template before minijinja reads it.
//!
//! Four things that Jinja has and minijinja lacks can be said in other words:
//!
//! - `{% generation %}` … `{% endgeneration %}` is a call block in Hugging Face's extension, so it
//!   becomes one: `{% call __generation__() %}` … `{% endcall %}`;
//! - `{% for x in xs %}` ends in an error when `xs` is none, so `xs` becomes `(xs)|__each__`;
//! - `{% set ns.x = y %}` in a macro or call block does not find `ns` there unless it is read, too, so
//!   `y` becomes `((y), ns)[0]`;
//! - escapes in strings are Python's, so `'\/'` becomes `'\\/'`.
//!
//! Nothing is added or taken away around the tags, so that white space is trimmed as it was written, and
//! lines keep their numbers.

use std::ops::Range;

/// The function that stands for `{% generation %}`.
pub(super) const GENERATION: &str = "__generation__";
/// The filter that what is looped over goes through.
pub(super) const EACH: &str = "__each__";

/// A template that minijinja can read.
pub(super) struct Source {
    pub(super) text: String,
    /// Whether it marks what the model is to say.
    pub(super) has_generation: bool,
}

impl Source {
    pub(super) fn new(text: &str) -> Self {
        // Jinja knows one line break only.
        let text = text.replace("\r\n", "\n").replace('\r', "\n");
        let mut edits = Edits::default();
        edits.find(&text);
        Self { text: edits.apply(&text), has_generation: edits.has_generation }
    }
}

/// What stands where in its place, in order.
#[derive(Default)]
struct Edits {
    edits: Vec<(Range<usize>, String)>,
    has_generation: bool,
}

impl Edits {
    fn apply(&self, text: &str) -> String {
        let mut edited = String::with_capacity(text.len() + 64);
        let mut done = 0;
        for (place, new) in &self.edits {
            edited.push_str(&text[done..place.start]);
            edited.push_str(new);
            done = place.end;
        }
        edited + &text[done..]
    }

    fn find(&mut self, text: &str) {
        let mut at = 0;
        while let Some(found) = text[at..].find('{') {
            let start = at + found;
            at = match text.as_bytes().get(start + 1) {
                Some(b'#') => after(text, start + 2, "#}"),
                Some(b'{') => {
                    let code = Code::new(text, start + 2, "}}");
                    self.strings(text, &code);
                    code.end
                }
                Some(b'%') => {
                    let word = tag_word(text, start + 2);
                    let code = Code::new(text, word.end, "%}");
                    self.tag(text, word, &code)
                }
                _ => start + 1,
            };
        }
        self.edits.sort_by_key(|(place, _)| place.start);
    }

    /// A tag; returns the offset behind it.
    fn tag(&mut self, text: &str, word: Range<usize>, code: &Code) -> usize {
        match &text[word.clone()] {
            "raw" => return end_of_raw(text, code.end),
            "generation" => {
                self.has_generation = true;
                self.edits.push((word, format!("call {GENERATION}()")));
            }
            "endgeneration" => self.edits.push((word, "endcall".to_owned())),
            "for" => {
                if let Some(Range { start, end }) = iterable(text, code) {
                    self.edits.push((start..start, " (".to_owned()));
                    self.edits.push((end..end, format!(")|{EACH} ")));
                }
            }
            "set" => {
                if let Some((namespace, value)) = attribute_set(text, word.end, code) {
                    self.edits.push((value..value, " ((".to_owned()));
                    self.edits.push((code.code_end..code.code_end, format!("), {namespace})[0] ")));
                }
            }
            _ => {}
        }
        self.strings(text, code);
        code.end
    }

    fn strings(&mut self, text: &str, code: &Code) {
        for place in &code.strings {
            if let Some(new) = as_rust_escapes(&text[place.clone()]) {
                self.edits.push((place.clone(), new));
            }
        }
    }
}

/// What is between the delimiters of a tag or an expression.
struct Code {
    /// String literals with their quotes.
    strings: Vec<Range<usize>>,
    /// Names, numbers and words that are in no bracket.
    words: Vec<Range<usize>>,
    /// Where the code ends, before a sign that trims white space.
    code_end: usize,
    /// The offset behind the delimiter.
    end: usize,
}

impl Code {
    /// Reads up to `delimiter`: the one that is in no string and, as in Jinja, in no bracket.
    fn new(text: &str, start: usize, delimiter: &str) -> Self {
        let bytes = text.as_bytes();
        let mut code = Self { strings: Vec::new(), words: Vec::new(), code_end: 0, end: 0 };
        let mut depth = 0_usize;
        let mut at = start;
        while at < bytes.len() && !(depth == 0 && bytes[at..].starts_with(delimiter.as_bytes())) {
            let from = at;
            at += 1;
            match bytes[from] {
                b'(' | b'[' | b'{' => depth += 1,
                b')' | b']' | b'}' => depth = depth.saturating_sub(1),
                quote @ (b'"' | b'\'') => {
                    while at < bytes.len() && bytes[at] != quote {
                        at += if bytes[at] == b'\\' { 2 } else { 1 };
                    }
                    at += 1;
                    if at <= bytes.len() {
                        code.strings.push(from..at);
                    }
                }
                byte if is_word(byte) => {
                    while at < bytes.len() && is_word(bytes[at]) {
                        at += 1;
                    }
                    if depth == 0 {
                        code.words.push(from..at);
                    }
                }
                _ => {}
            }
        }
        let at = at.min(bytes.len());
        code.code_end = at - usize::from(text[start..at].ends_with(['-', '+']));
        code.end = (at + delimiter.len()).min(bytes.len());
        code
    }
}

/// Bytes of characters beyond ASCII count as letters, so that no range begins within one.
fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || !byte.is_ascii()
}

/// What a loop is over: between `in` and a condition, `recursive` or the end.
fn iterable(text: &str, code: &Code) -> Option<Range<usize>> {
    let mut words = code.words.iter();
    let start = words.find(|word| &text[(*word).clone()] == "in")?.end;
    let end = words.find(|word| matches!(&text[(*word).clone()], "if" | "recursive"));
    Some(start..end.map_or(code.code_end, |word| word.start))
}

/// Of a tag that sets a namespace's attribute: the namespace's name, and where the value begins.
fn attribute_set<'a>(text: &'a str, start: usize, code: &Code) -> Option<(&'a str, usize)> {
    // A target has no string and no bracket, so that its end is the first sign of equality.
    let target = &text[start..start + text[start..code.code_end].find('=')?];
    let (namespace, attribute) = target.split_once('.')?;
    let names = [namespace.trim(), attribute.trim()];
    let are_names = names.iter().all(|name| !name.is_empty() && name.bytes().all(is_word));
    are_names.then_some((names[0], start + target.len() + 1))
}

/// The first word at or after `at`, behind the sign that trims white space.
fn tag_word(text: &str, at: usize) -> Range<usize> {
    let rest = &text[at..];
    let word = rest.strip_prefix(['-', '+']).unwrap_or(rest).trim_start();
    let start = text.len() - word.len();
    let length = word.bytes().position(|byte| !is_word(byte)).unwrap_or(word.len());
    start..start + length
}

/// The offset behind the next `end`, or the end of the text.
fn after(text: &str, at: usize, end: &str) -> usize {
    text[at..].find(end).map_or(text.len(), |found| at + found + end.len())
}

fn end_of_raw(text: &str, at: usize) -> usize {
    let mut at = at;
    while let Some(found) = text[at..].find("{%") {
        let word = tag_word(text, at + found + 2);
        at = word.end;
        if &text[word] == "endraw" {
            return after(text, at, "%}");
        }
    }
    text.len()
}

/// A string literal of Python as minijinja reads it; `None` when it is the same.
fn as_rust_escapes(literal: &str) -> Option<String> {
    let mut text = String::with_capacity(literal.len());
    let mut rest = literal.chars();
    while let Some(c) = rest.next() {
        if c != '\\' {
            text.push(c);
            continue;
        }
        match rest.next() {
            Some('/') => text.push_str("\\\\/"),
            Some('a') => text.push_str("\\x07"),
            Some('v') => text.push_str("\\x0b"),
            Some('\n') => {}
            Some('U') => match escaped_character(&mut rest) {
                Some(c) => text.push(c),
                None => text.push_str(NO_ESCAPE),
            },
            // By the name of a character, of which no table is here.
            Some('N') => text.push_str(NO_ESCAPE),
            other => {
                text.push('\\');
                text.extend(other);
            }
        }
    }
    (text != literal).then_some(text)
}

/// An escape that is an error.
const NO_ESCAPE: &str = "\\u????";

fn escaped_character(rest: &mut std::str::Chars) -> Option<char> {
    let digits = rest.as_str().get(..8)?;
    let character = char::from_u32(u32::from_str_radix(digits, 16).ok()?)?;
    *rest = rest.as_str()[8..].chars();
    (character != '\\' && character != '\'' && character != '"').then_some(character)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever the text, it is read to its end, and what is no template's code stays.
        #[test]
        fn any_text_is_taken(pieces in proptest::collection::vec(
            prop_oneof![
                Just("{{"), Just("}}"), Just("{%"), Just("%}"), Just("{#"), Just("#}"), Just("-"),
                Just("for x in"), Just("if"), Just("raw"), Just("endraw"), Just("generation"),
                Just("'"), Just("\""), Just("\\"), Just("\\U0001F600"), Just("\\N"), Just("("),
                Just("]"), Just("}"), Just("{"), Just(" "), Just("\r\n"), Just("é"), Just("in"),
            ],
            0..20,
        )) {
            let text = pieces.concat();
            let source = Source::new(&text);
            if !["{{", "{%", "{#", "\r"].iter().any(|mark| text.contains(mark)) {
                prop_assert_eq!(&source.text, &text);
            }
            let _ = crate::template::ChatTemplates::default().with_default(text);
        }
    }

    fn rewritten(text: &str) -> String {
        Source::new(text).text
    }

    #[test]
    fn of_generation_only_the_words_are_replaced() {
        let source = Source::new(
            "a{% generation %}b{%- endgeneration -%}\n{%+generation+%}{%endgeneration%}",
        );
        assert!(source.has_generation);
        assert_eq!(
            source.text,
            "a{% call __generation__() %}b{%- endcall -%}\n{%+call __generation__()+%}{%endcall%}"
        );
    }

    #[test]
    fn what_is_no_tag_stays() {
        for text in [
            "",
            "generation {generation} {",
            "{# {% generation %} #}",
            "{{ '{% generation %}' }}",
            "{{ \"\\\"{% for x in y %}\" }}",
            "{% raw %}{% generation %}{% for x in y %}{{ '\\/' }}{% endraw %}",
            "{%- raw -%}{% generation %}{%- endraw -%}",
            "{% if generation %}{% set generation = 1 %}{% generations %}{% endfor %}",
            "{{ {'a': {'{% generation %}': 1}} }}",
            "{% raw %}{% generation %}",
            "{% set a = '{% generation %}",
            "{% set a = 'é\\",
            "{{ é",
            "{%",
            "{{",
            "{#",
        ] {
            let source = Source::new(text);
            assert_eq!(source.text, text);
            assert!(!source.has_generation);
        }
    }

    #[test]
    fn a_tag_after_what_is_none_is_found() {
        for before in [
            "{# {% #}",
            "{{ '}}' }}",
            "{{ {'a': {}} }}",
            "{% raw %}{{{% endraw %}",
            "{ { {% set x = '\\'' %}",
            "é{{ 'ü' }}",
        ] {
            assert_eq!(
                rewritten(&format!("{before}{{% generation %}}x{{% endgeneration %}}")),
                format!("{before}{{% call __generation__() %}}x{{% endcall %}}")
            );
        }
    }

    #[test]
    fn what_is_looped_over_goes_through_a_filter() {
        for (text, expected) in [
            ("{% for x in xs %}", "{% for x in ( xs )|__each__ %}"),
            ("{%- for x in xs -%}", "{%- for x in ( xs )|__each__ -%}"),
            ("{%for x in xs%}", "{%for x in ( xs)|__each__ %}"),
            (
                "{% for k, v in d.items() if v in [1] %}",
                "{% for k, v in ( d.items() )|__each__ if v in [1] %}",
            ),
            ("{% for x in xs recursive %}", "{% for x in ( xs )|__each__ recursive %}"),
            ("{% for x in (a if b else c) %}", "{% for x in ( (a if b else c) )|__each__ %}"),
            ("{% for x in 'a if b' %}", "{% for x in ( 'a if b' )|__each__ %}"),
            ("{% for x in '\\/' %}", "{% for x in ( '\\\\/' )|__each__ %}"),
            ("{% for in in xs %}", "{% for in ( in xs )|__each__ %}"),
            ("{% for x %}", "{% for x %}"),
        ] {
            assert_eq!(rewritten(text), expected);
        }
    }

    #[test]
    fn a_namespace_that_is_set_is_read() {
        for (text, expected) in [
            ("{% set ns.x = 1 %}", "{% set ns.x = (( 1 ), ns)[0] %}"),
            ("{%- set ns.x=y if z else '='-%}", "{%- set ns.x= ((y if z else '='), ns)[0] -%}"),
            ("{% set ns . x = 'a' %}", "{% set ns . x = (( 'a' ), ns)[0] %}"),
            ("{% set x = ns.y %}", "{% set x = ns.y %}"),
            ("{% set a, b = ns.y, 1 %}", "{% set a, b = ns.y, 1 %}"),
            ("{% set ns.x %}", "{% set ns.x %}"),
            ("{% set x.y.z = 1 %}", "{% set x.y.z = 1 %}"),
            ("{% set x %}=.{% endset %}", "{% set x %}=.{% endset %}"),
        ] {
            assert_eq!(rewritten(text), expected);
        }
    }

    #[test]
    fn escapes_are_pythons() {
        for (text, expected) in [
            (r"{{ '\/\a\v' }}", r"{{ '\\/\x07\x0b' }}"),
            (r"{{ '\U0001F600\U00000041' }}", "{{ '😀A' }}"),
            (r"{{ '\U00110000' }}", r"{{ '\u????00110000' }}"),
            (r"{{ '\N{BULLET}' }}", r"{{ '\u????{BULLET}' }}"),
            ("{% if x == 'a\\\nb' %}", "{% if x == 'ab' %}"),
            (r"{{ '\\/' ~ '\n\d\'' }}", r"{{ '\\/' ~ '\n\d\'' }}"),
            (r"\/{# '\/' #}", r"\/{# '\/' #}"),
        ] {
            assert_eq!(rewritten(text), expected);
        }
    }

    #[test]
    fn line_breaks_are_of_one_kind() {
        assert_eq!(rewritten("a\r\nb\rc\n\r"), "a\nb\nc\n\n");
    }
}
