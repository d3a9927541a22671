//! What is written otherwise in a chat template before minijinja reads it.
//!
//! Some things that Jinja has and minijinja lacks can be said in other words:
//!
//! - `{% generation %}` … `{% endgeneration %}` is a call block in Hugging Face's extension, so it
//!   becomes one: `{% call __generation__() %}` … `{% endcall %}`;
//! - `{% for x in xs %}` ends in an error when `xs` is none, so `xs` becomes `(xs)|__each__`;
//! - `{% set ns.x = y %}` knows a namespace that may hold itself and is not found in a macro unless it
//!   is read, so that it becomes `{% do __set__(ns, 'x', (y)) %}`, and `{% set ns.x %}` a call block;
//! - `a ~ b` writes floats in its own way, so it becomes `__concatenate__(a, b)`;
//! - escapes in strings are Python's, so `'\/'` becomes `'\\/'`;
//! - the line end behind `{% raw %}` is kept, and so stands there twice.
//!
//! Else nothing is added or taken away around the tags, so that white space is trimmed as it was written, and
//! lines keep their numbers.
//!
//! minijinja also recurses as deep as a tag is long. A tag that could end the stack is refused here.

use std::ops::Range;

/// The function that stands for `{% generation %}`.
pub(super) const GENERATION: &str = "__generation__";
/// The filter that what is looped over goes through.
pub(super) const EACH: &str = "__each__";

/// The function that stands for an assignment to a namespace's attribute.
pub(super) const SET: &str = "__set__";
/// The function that stands for the operator `~`.
pub(super) const CONCATENATE: &str = "__concatenate__";

/// Each may be a level of minijinja's recursion. A thread of Rust has 2 MiB of stack, where a debug
/// build holds these beside `MAX_ELIFS` and the brackets and blocks that minijinja allows. The tags of
/// models' templates have some dozens at most.
const MAX_OPERATORS: usize = 300;
/// Each is a level, too, within the one before it.
const MAX_ELIFS: usize = 100;

/// A template that minijinja can read.
pub(super) struct Source {
    pub(super) text: String,
    /// Whether it marks what the model is to say.
    pub(super) has_generation: bool,
}

impl Source {
    /// The template, or why it is refused.
    pub(super) fn new(text: &str) -> Result<Self, String> {
        // Jinja knows one line break only.
        let text = text.replace("\r\n", "\n").replace('\r', "\n");
        let mut edits = Edits::default();
        edits.find(&text)?;
        Ok(Self { text: edits.apply(&text), has_generation: edits.has_generation })
    }
}

/// What stands where in its place, in order.
#[derive(Default)]
struct Edits {
    edits: Vec<(Range<usize>, String)>,
    has_generation: bool,
    elifs: usize,
    /// Of each `{% set %}` with a block that is open: whether it became a call block.
    set_blocks: Vec<bool>,
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

    fn find(&mut self, text: &str) -> Result<(), String> {
        let mut at = 0;
        while let Some(found) = text[at..].find('{') {
            let start = at + found;
            at = match text.as_bytes().get(start + 1) {
                Some(b'#') => after(text, start + 2, "#}"),
                Some(b'{') => {
                    let trims = text[start + 2..].starts_with(['-', '+']);
                    let code = Code::new(text, start + 2 + usize::from(trims), "}}");
                    code.check(text)?;
                    self.expressions(text, &code);
                    code.end
                }
                Some(b'%') => {
                    let word = tag_word(text, start + 2);
                    let code = Code::new(text, word.end, "%}");
                    self.tag(text, word, &code)?
                }
                _ => start + 1,
            };
        }
        self.edits.sort_by_key(|(place, _)| place.start);
        Ok(())
    }

    /// A tag; returns the offset behind it.
    fn tag(&mut self, text: &str, word: Range<usize>, code: &Code) -> Result<usize, String> {
        let mut at_end = None; // which comes behind what the expressions insert at the same place
        match &text[word.clone()] {
            "raw" => {
                // Jinja keeps the line end behind this tag, minijinja trims it as behind any other.
                let trims = text[..code.end].ends_with("-%}");
                if !trims && text[code.end..].starts_with('\n') {
                    self.edits.push((code.end..code.end, "\n".to_owned()));
                }
                return Ok(end_of_raw(text, code.end));
            }
            "generation" => {
                self.has_generation = true;
                self.edits.push((word, format!("call {GENERATION}()")));
            }
            "endgeneration" => self.edits.push((word, "endcall".to_owned())),
            "for" => {
                if let Some(Range { start, end }) = iterable(text, code) {
                    self.edits.push((start..start, " (".to_owned()));
                    at_end = Some((end..end, format!(")|{EACH} ")));
                }
            }
            "set" => at_end = self.set(text, word, code),
            "endset" if self.set_blocks.pop() == Some(true) => {
                self.edits.push((word, "endcall".to_owned()));
            }
            "elif" => {
                self.elifs += 1;
                if self.elifs > MAX_ELIFS {
                    let what = format!("at most {MAX_ELIFS} elif in a template");
                    return Err(too_much(text, word.start, &what, "more"));
                }
            }
            _ => {}
        }
        code.check(text)?;
        self.expressions(text, code);
        self.edits.extend(at_end);
        Ok(code.end)
    }

    /// An assignment; returns the edit at its end.
    fn set(
        &mut self,
        text: &str,
        word: Range<usize>,
        code: &Code,
    ) -> Option<(Range<usize>, String)> {
        let in_target = |token: &&Range<usize>| {
            is_word(text.as_bytes()[token.start])
                || matches!(&text[(*token).clone()], "." | "," | "(" | ")")
        };
        let target = code.tokens.iter().take_while(in_target).count();
        let equals = code.tokens.get(target).filter(|token| &text[(*token).clone()] == "=");
        let end = code.code_end..code.code_end;
        let (head, at_end) = match equals {
            Some(equals) if !text[equals.end..code.code_end].trim().is_empty() => {
                (format!("do {SET}("), (end, ")) ".to_owned()))
            }
            Some(_) => return None,
            None => (format!("call {SET}("), (end, ") ".to_owned())),
        };
        let is_attribute = match &code.tokens[..target] {
            [namespace, point, attribute] if &text[point.clone()] == "." => {
                is_word(text.as_bytes()[namespace.start])
                    && is_word(text.as_bytes()[attribute.start])
                    && (equals.is_some() || target == code.tokens.len())
            }
            _ => false,
        };
        if equals.is_none() {
            self.set_blocks.push(is_attribute);
        }
        if !is_attribute {
            return None;
        }
        let attribute = &code.tokens[2];
        self.edits.push((word, head));
        self.edits.push((code.tokens[1].clone(), ",".to_owned()));
        self.edits.push((attribute.clone(), format!("'{}'", &text[attribute.clone()])));
        self.edits.extend(equals.map(|equals| (equals.clone(), ", (".to_owned())));
        Some(at_end)
    }

    fn expressions(&mut self, text: &str, code: &Code) {
        for chain in chains(text, &code.tokens) {
            self.edits.push((chain.start..chain.start, format!("{CONCATENATE}(")));
            self.edits.extend(chain.signs.into_iter().map(|sign| (sign, ",".to_owned())));
            self.edits.push((chain.end..chain.end, ")".to_owned()));
        }
        self.strings(text, code);
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
    /// Where it begins.
    start: usize,
    /// Names and numbers, string literals that are closed, and other characters one by one.
    tokens: Vec<Range<usize>>,
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
        let (tokens, strings, words) = (Vec::new(), Vec::new(), Vec::new());
        let mut code = Self { start, tokens, strings, words, code_end: 0, end: 0 };
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
                    at = match byte {
                        b'0'..=b'9' => end_of_number(bytes, from),
                        _ => end_of_word(bytes, from),
                    };
                    if depth == 0 {
                        code.words.push(from..at);
                    }
                }
                _ => {}
            }
            if at <= bytes.len() && !bytes[from].is_ascii_whitespace() {
                code.tokens.push(from..at);
            }
        }
        let at = at.min(bytes.len());
        code.code_end = at - usize::from(text[start..at].ends_with(['-', '+']));
        code.tokens.retain(|token| token.end <= code.code_end);
        code.end = (at + delimiter.len()).min(bytes.len());
        code
    }

    fn check(&self, text: &str) -> Result<(), String> {
        let is_operator = |token: &&Range<usize>| match text.as_bytes()[token.start] {
            b',' | b':' | b')' | b']' | b'}' | b'"' | b'\'' => false,
            byte if is_word(byte) => KEYWORDS.contains(&&text[(*token).clone()]),
            _ => true,
        };
        let found = self.tokens.iter().filter(is_operator).count();
        if found > MAX_OPERATORS {
            let what = format!("at most {MAX_OPERATORS} operators in one tag");
            return Err(too_much(text, self.start, &what, &found.to_string()));
        }
        Ok(())
    }
}

fn too_much(text: &str, at: usize, expected: &str, found: &str) -> String {
    let line = text[..at].matches('\n').count() + 1;
    format!(
        "line {line}: expected {expected}, found {found}; set parts of it to names of their own"
    )
}

/// Words that are operators.
const KEYWORDS: [&str; 7] = ["and", "else", "if", "in", "is", "not", "or"];

fn end_of_word(bytes: &[u8], at: usize) -> usize {
    at + bytes[at..].iter().take_while(|byte| is_word(**byte)).count()
}

/// The end of a number whose sign in an exponent is no operator.
fn end_of_number(bytes: &[u8], start: usize) -> usize {
    let is_digit = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_digit);
    let mut end = end_of_word(bytes, start);
    if bytes.get(end) == Some(&b'.') && is_digit(end + 1) {
        end = end_of_word(bytes, end + 1);
    }
    let has_exponent = matches!(bytes[end - 1], b'e' | b'E') && !bytes[start..].starts_with(b"0x");
    if has_exponent && matches!(bytes.get(end), Some(b'+' | b'-')) && is_digit(end + 1) {
        end = end_of_word(bytes, end + 1);
    }
    end
}

/// Values that are joined by `~`: from where to where, and the signs.
#[derive(Default)]
struct Chain {
    start: usize,
    end: usize,
    signs: Vec<Range<usize>>,
}

impl Chain {
    fn add(&mut self, token: &Range<usize>) {
        if self.end == 0 {
            self.start = token.start;
        }
        self.end = token.end;
    }
}

/// What is joined by `~`, each between brackets or operators that bind less.
fn chains(text: &str, tokens: &[Range<usize>]) -> Vec<Chain> {
    let mut found = Vec::new();
    let mut close = |chain: Chain| {
        // Where a value is missing, minijinja says so.
        let is_whole = |sign: &Range<usize>| chain.start < sign.start && sign.end < chain.end;
        if chain.end > 0 && !chain.signs.is_empty() && chain.signs.iter().all(is_whole) {
            found.push(chain);
        }
    };
    let mut enclosing = Vec::new();
    let mut chain = Chain::default();
    let mut before = ["", ""];
    for token in tokens {
        let word = &text[token.clone()];
        match word {
            "~" => chain.signs.push(token.clone()),
            "(" | "[" | "{" => {
                chain.add(token);
                enclosing.push(std::mem::take(&mut chain));
            }
            ")" | "]" | "}" => {
                close(std::mem::replace(&mut chain, enclosing.pop().unwrap_or_default()));
                chain.add(token);
            }
            _ if binds_less(before, word) => close(std::mem::take(&mut chain)),
            "*" if chain.end == 0 => {} // before an argument, it spreads it
            _ => chain.add(token),
        }
        before = [before[1], word];
    }
    close(chain);
    found
}

/// Whether a token ends what `~` joins, with the two tokens before it.
fn binds_less(before: [&str; 2], word: &str) -> bool {
    match word {
        "," | ":" | "=" | "<" | ">" | "!" => true,
        "and" | "or" | "if" | "else" | "recursive" => !matches!(before[1], "." | "|"),
        "not" => before[1] != "is",
        "in" => !matches!(before, [_, "is"] | ["is", "not"]),
        // Otherwise it is a sign of one value.
        "+" | "-" => {
            let ends_value =
                |c: char| !c.is_ascii() || c.is_alphanumeric() || "_)]}\"'".contains(c);
            before[1].ends_with(ends_value) && !KEYWORDS.contains(&before[1])
        }
        _ => false,
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
            let Ok(source) = Source::new(&text) else { return Ok(()) };
            if !["{{", "{%", "{#", "\r"].iter().any(|mark| text.contains(mark)) {
                prop_assert_eq!(&source.text, &text);
            }
            let _ = crate::template::ChatTemplates::default().with_default(text);
        }
    }

    fn rewritten(text: &str) -> String {
        Source::new(text).unwrap().text
    }

    #[test]
    fn of_generation_only_the_words_are_replaced() {
        let source = Source::new(
            "a{% generation %}b{%- endgeneration -%}\n{%+generation+%}{%endgeneration%}",
        )
        .unwrap();
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
            let source = Source::new(text).unwrap();
            assert_eq!(source.text, text);
            assert!(!source.has_generation);
        }
    }

    #[test]
    fn a_line_end_behind_raw_is_doubled() {
        let raw = |text: &str| Source::new(text).unwrap().text;
        assert_eq!(raw("{% raw %}\na{% endraw %}\n"), "{% raw %}\n\na{% endraw %}\n");
        for text in ["{% raw -%}\na{% endraw %}", "{% raw %} \na{% endraw %}", "{% raw %}a\n"] {
            assert_eq!(raw(text), text);
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
    fn a_namespace_is_set_by_a_function() {
        for (text, expected) in [
            ("{% set ns.x = 1 %}", "{% do __set__( ns,'x' , ( 1 )) %}"),
            ("{%- set ns.x=y if z else '='-%}", "{%- do __set__( ns,'x', (y if z else '=')) -%}"),
            ("{% set ns . x = 'a' %}", "{% do __set__( ns , 'x' , ( 'a' )) %}"),
            ("{%set ns.x=a~b%}", "{%do __set__( ns,'x', (__concatenate__(a,b))) %}"),
            ("{% set ns.x = 1, 2 %}", "{% do __set__( ns,'x' , ( 1, 2 )) %}"),
            (
                "{% set ns.x %}{% set y | replace('=', '') %}{% set z = 1 %}{% endset %}{% endset %}",
                "{% call __set__( ns,'x' ) %}{% set y | replace('=', '') %}{% set z = 1 %}{% endset %}{% endcall %}",
            ),
            ("{% set x = ns.y %}", "{% set x = ns.y %}"),
            ("{% set a, b = ns.y, 1 %}", "{% set a, b = ns.y, 1 %}"),
            ("{% set ns.x = %}", "{% set ns.x = %}"),
            ("{% set x.y.z = 1 %}", "{% set x.y.z = 1 %}"),
            ("{% set x %}=.{% endset %}", "{% set x %}=.{% endset %}"),
        ] {
            assert_eq!(rewritten(text), expected);
        }
    }

    #[test]
    fn what_is_joined_goes_through_a_function() {
        for (text, expected) in [
            ("{{- a ~ 'b' -}}", "{{- __concatenate__(a , 'b') -}}"),
            ("{{ a + b ~ c * d - e }}", "{{ a + __concatenate__(b , c * d) - e }}"),
            ("{{ -1e-5 ~ -x.y[1:2] ~ 1 }}", "{{ __concatenate__(-1e-5 , -x.y[1:2] , 1) }}"),
            (
                "{{ a ~ (b ~ c)|upper }}",
                "{{ __concatenate__(a , (__concatenate__(b , c))|upper) }}",
            ),
            (
                "{{ f(*a ~ b, c=d ~ e) }}",
                "{{ f(*__concatenate__(a , b), c=__concatenate__(d , e)) }}",
            ),
            (
                "{{ a ~ b if not c ~ d in e ~ f else g }}",
                "{{ __concatenate__(a , b) if not __concatenate__(c , d) in __concatenate__(e , f) else g }}",
            ),
            ("{{ a ~ b is not in c == d }}", "{{ __concatenate__(a , b is not in c) == d }}"),
            ("{% for x in'a'~b%}", "{% for x in (__concatenate__('a',b))|__each__ %}"),
            (
                "{% for x in a ~ b recursive %}",
                "{% for x in ( __concatenate__(a , b) )|__each__ recursive %}",
            ),
            ("{{ '\\/' ~ 1 }}", "{{ __concatenate__('\\\\/' , 1) }}"),
            ("{{ a ~ }}{{ ~ a }}{{ a ~ ~ b }}", "{{ a ~ }}{{ ~ a }}{{ __concatenate__(a , , b) }}"),
            (
                "{{ '~' }}{# a ~ b #}~{% raw %}{{ a ~ b }}{% endraw %}",
                "{{ '~' }}{# a ~ b #}~{% raw %}{{ a ~ b }}{% endraw %}",
            ),
        ] {
            assert_eq!(rewritten(text), expected);
        }
    }

    #[test]
    fn only_operators_of_one_tag_are_counted() {
        let many = MAX_OPERATORS + 1;
        let refused = |text: String| Source::new(&text).err();
        let sum = "+1".repeat(many);
        assert_eq!(
            refused(format!("a\n{{{{ 1{sum} }}}}")).unwrap(),
            "line 2: expected at most 300 operators in one tag, found 301; \
             set parts of it to names of their own"
        );
        for text in [
            format!("{sum}{{# {sum} #}}{{{{ '{sum}' }}}}{{% raw %}}{{{{ 1{sum} }}}}{{% endraw %}}"),
            format!("{{{{ [{}] }}}}", "1.5e-3, 'a', ".repeat(many)),
            "{{ a + 1 }}{% if a > 1 %}{% endif %}".repeat(many),
        ] {
            assert_eq!(refused(text), None);
        }
        let chain =
            |length| format!("{{% if a %}}\n{}{{% endif %}}", "{% elif b %}".repeat(length));
        assert_eq!(refused(chain(MAX_ELIFS)), None);
        assert!(
            refused(chain(MAX_ELIFS + 1)).unwrap().starts_with("line 2: expected at most 100 elif")
        );
    }

    #[test]
    fn escapes_are_pythons() {
        for (text, expected) in [
            (r"{{ '\/\a\v' }}", r"{{ '\\/\x07\x0b' }}"),
            (r"{{ '\U0001F600\U00000041' }}", "{{ '😀A' }}"),
            (r"{{ '\U00110000' }}", r"{{ '\u????00110000' }}"),
            (r"{{ '\N{BULLET}' }}", r"{{ '\u????{BULLET}' }}"),
            ("{% if x == 'a\\\nb' %}", "{% if x == 'ab' %}"),
            (r"{{ '\\/' + '\n\d\'' }}", r"{{ '\\/' + '\n\d\'' }}"),
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
