//! Chat templates against transformers: tests/template_golden.py wrote tests/data/templates.json.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use lora_models::{ChatTemplates, RenderOptions};
use serde_json::Value as Json;

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

fn golden() -> Json {
    serde_json::from_slice(&fs::read(data().join("templates.json")).unwrap()).unwrap()
}

fn list(value: &Json) -> &Vec<Json> {
    value.as_array().unwrap()
}

fn options(value: &Json) -> RenderOptions {
    serde_json::from_value(value.clone()).unwrap()
}

fn with_tokens(golden: &Json, template: &str) -> Result<ChatTemplates, lora_models::Error> {
    let mut templates = ChatTemplates::default().with_default(template)?;
    for (name, token) in golden["tokens"].as_object().unwrap() {
        templates = templates.with_special_token(name, token.as_str().unwrap());
    }
    Ok(templates)
}

#[test]
fn templates_render_and_refuse_as_in_transformers() {
    let golden = golden();
    for (name, expected) in golden["templates"].as_object().unwrap() {
        let source = fs::read_to_string(data().join("templates").join(name)).unwrap();
        let templates = with_tokens(&golden, &source).unwrap();
        for (conversation, expected) in list(&golden["conversations"]).iter().zip(list(expected)) {
            let found = templates
                .render(list(&conversation["messages"]), &options(&conversation["options"]));
            let text = expected.get("text").unwrap_or(expected).as_str();
            assert_eq!(
                found.as_deref().ok(),
                text,
                "{name}, {}: {:?}",
                conversation["name"],
                found.as_ref().err()
            );
        }
    }
}

#[test]
fn answers_are_marked_where_transformers_marks_them() {
    let golden = golden();
    let source = fs::read_to_string(data().join("templates/marked_answers.jinja")).unwrap();
    let templates = with_tokens(&golden, &source).unwrap();
    let mut compared = 0;
    let expected = list(&golden["templates"]["marked_answers.jinja"]);
    for (conversation, expected) in list(&golden["conversations"]).iter().zip(expected) {
        let Some(answers) = expected.get("answers") else { continue };
        let answers: Vec<Range<usize>> = list(answers)
            .iter()
            .map(|range| range[0].as_u64().unwrap() as usize..range[1].as_u64().unwrap() as usize)
            .collect();
        let found = templates
            .render_marked(list(&conversation["messages"]), &options(&conversation["options"]))
            .unwrap();
        assert_eq!(found.text, expected["text"].as_str().unwrap());
        assert_eq!(found.answers, Some(answers), "{}", conversation["name"]);
        compared += 1;
    }
    assert_eq!(compared, 37);
}

/// What transformers renders and we refuse, rather than to render it in another way.
const REFUSED: &[&str] = &[
    "{{ '%s is %d' % ('a', 1) }}",
    "{{ '{!r}'.format('a') }}",
    "{{ s.swapcase() }}",
    "{{ s.casefold() }}",
    "{{ 'abc'.startswith('b', 1) }}",
    "{{ 'abc'.find('c', 1) }}",
    "{{ 'abc'.index('c') }}",
    "{{ 'a'.zfill(3) }}",
    "{{ 'a'.ljust(3) ~ '|' }}",
    "{{ 'a'.rjust(3) }}",
    "{{ 'a'.center(3) ~ '|' }}",
    "{{ 'a' | center(3) ~ '|' }}",
    "{{ '12'.isdecimal() }}",
    "{{ '²'.isdecimal() }}",
    "{{ 'Ab Cd'.istitle() }}",
    "{{ 'ab'.isidentifier() }}",
    "{{ 'a'.encode('utf-8') }}",
    "{{ 'abc'.translate({97: 'x'}) }}",
    r"{{ '\t'.expandtabs(2) ~ '|' }}",
    "{{ d.copy() }}",
    "{{ d.fromkeys(['a']) }}",
    "{{ lst.index(1) }}",
    "{{ lst.copy() }}",
    "{{ d | dictsort(false, 'value') }}",
    "{{ '<a>' | forceescape }}",
    "{{ 'a b' | urlencode }}",
    "{{ {'a': 'b c'} | urlencode }}",
    "{{ 'a b c' | wordcount }}",
    "{{ 'a b c d' | truncate(3) }}",
    "{{ 'a b c d' | truncate(3, true, '') }}",
    "{{ 'a b c d' | wordwrap(3) }}",
    "{{ '<b>x</b>' | striptags }}",
    "{{ v | center(9) }}",
    r"{{ 'a\nb' | indent('>>') }}",
    "{{ 1000000 | filesizeformat }}",
    "{{ d | xmlattr }}",
    "{{ d | pprint }}",
    "{{ v | pprint }}",
    "{{ [1,2] | pprint }}",
    "{{ dict([('a', 1)]) }}",
    "{{ cycler('a', 'b').next() }}",
    r"{{ '\N{BULLET}' }}",
    "{{ +1 }}",
    "{{ +num }}",
    "{{ self.x }}",
    "{{ 2**128 }}",
    "{% macro f(a) %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1, 2, x=3) }}",
    "{% set x = cycler('a', 'b') %}{{ x.next() }}{{ x.next() }}{{ x.current }}",
];

/// What we render in another way or transformers refuses, with our text. Templates that a model was
/// trained with do none of this, as far as those that we have seen.
const OTHERWISE: &[(&str, &str)] = &[
    ("{{ 'a' < 1 }}", "False"),
    ("{{ none < 1 }}", "True"),
    ("{{ 1 in 'abc' }}", "False"),
    ("{{ 'abc'.startswith(['x', 'a']) }}", "True"),
    ("{{ '½'.isdigit() }}", "True"),
    ("{{ ', '.join(lst) }}", "3, 1, 2"),
    ("{{ d.items() }}", "[('b', 2), ('a', 1), ('C', 3)]"),
    ("{{ d.keys() }}", "['b', 'a', 'C']"),
    ("{{ range(3) | tojson }}", "[0, 1, 2]"),
    ("{{ messages | map('attr', 'role') | list }}", "['system', 'user', 'assistant', 'user']"),
    ("{{ messages | sum(attribute='n') }}", "3"),
    ("{{ messages | last | attr('role') }}", "user"),
    ("{{ '<a>'|safe + '<b>' }}", "<a><b>"),
    ("{{ range(3) }}", "[0, 1, 2]"),
    ("{{ namespace(_a=1) }}", "<Namespace {'_a': 1}>"),
    ("{{ 1. }}", "1.0"),
    ("{{ 12.e1 }}", "120.0"),
    ("{{ messages[1.0] }}", "{'role': 'user', 'content': 'Hé \\'llo\\n\"x\" <b>&'}"),
    ("{{ v.upper is defined }}", "False"),
    ("{{ d['get'] is defined }}", "False"),
    ("{{ (messages | map(attribute='role')) | last }}", "user"),
    ("{{ (lst | reverse)[0] }}", "2"),
    ("{{ (d | items)[0] }}", "('b', 2)"),
    ("{{ d.items()[0] }}", "('b', 2)"),
    ("{{ d.items() is sequence }}", "True"),
    ("{{ d.keys() is sequence }}", "True"),
    ("{{ [1, 'a'] | sort }}", "[1, 'a']"),
];

#[test]
fn expressions_are_pythons_but_for_those_that_are_listed() {
    let golden = golden();
    let expressions = &golden["expressions"];
    let options = options(&expressions["options"]);
    let mut differences = Vec::new();
    let mut known_differences = 0;
    for pair in list(&expressions["found"]) {
        let template = pair[0].as_str().unwrap();
        let found = with_tokens(&golden, template)
            .and_then(|templates| templates.render(list(&expressions["messages"]), &options));
        if found.as_deref().ok() == pair[1].as_str() {
            continue;
        }
        let known = match &found {
            Err(_) => REFUSED.contains(&template),
            Ok(text) => OTHERWISE.contains(&(template, text)),
        };
        known_differences += usize::from(known);
        if !known {
            differences.push(format!("{template}\n  expected {}\n  found {found:?}", pair[1]));
        }
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    assert_eq!(known_differences, REFUSED.len() + OTHERWISE.len(), "a difference is no more");
}

#[test]
fn folders_are_read_as_in_transformers() {
    for case in list(&golden()["folders"]) {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in case["files"].as_object().unwrap() {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let text = content.as_str().map_or_else(|| content.to_string(), str::to_owned);
            fs::write(path, text).unwrap();
        }
        let templates = ChatTemplates::from_folder(folder.path()).unwrap();

        let names = ["bos", "eos", "unk", "sep", "pad", "cls", "mask", "image", "boi"];
        for name in names.map(|name| format!("{name}_token")) {
            assert_eq!(templates.special_token(&name), case["tokens"][&name].as_str(), "{case}");
        }
        let expected = case["templates"].as_object().unwrap();
        let mut names: Vec<&str> = expected.keys().map(String::as_str).collect();
        names.sort_unstable();
        assert_eq!(templates.names().collect::<Vec<_>>(), names, "{case}");
        for (name, source) in expected {
            let options =
                RenderOptions { template: Some(name.clone()), ..RenderOptions::default() };
            let message = serde_json::json!({"role": "user", "content": "hi"});
            let text = templates.render(&[message], &options).unwrap();
            assert_eq!(text, source.as_str().unwrap().trim_end_matches('\n'), "{case}");
        }
    }
}
