//! Where a Hugging Face folder keeps its chat templates and special tokens.
//!
//! As transformers 5 reads them. Templates, the first of these that is there:
//!
//! 1. `chat_template.jinja`, and by name `additional_chat_templates/*.jinja`;
//! 2. `chat_template` in `tokenizer_config.json`: one, or a list of `{"name", "template"}`;
//! 3. `chat_template` in `chat_template.json`, a legacy of multimodal models.
//!
//! Special tokens: the fields of `tokenizer_config.json` whose names end in `_token`, and those in its
//! `extra_special_tokens` where that is an object. Where the config has no `added_tokens_decoder`, it
//! was written by an old program, and `special_tokens_map.json` comes before it.

use std::path::Path;

use serde_json::{Map, Value as Json};

use super::{ChatTemplates, DEFAULT, describe_json};
use crate::error::{Error, Result};

const CONFIG_FILE: &str = "tokenizer_config.json";
const TOKENS_FILE: &str = "special_tokens_map.json";
const TEMPLATE_FILE: &str = "chat_template.jinja";
const TEMPLATES_FOLDER: &str = "additional_chat_templates";
const LEGACY_TEMPLATE_FILE: &str = "chat_template.json";

/// The tokens that have a name in every tokenizer; a value that is no token is an error there. Other
/// fields, such as `add_bos_token`, may end in `_token` and be something else.
const NAMED_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

impl ChatTemplates {
    /// Reads the templates and special tokens of a Hugging Face model folder: `chat_template.jinja`
    /// with `additional_chat_templates/`, else what stands in `tokenizer_config.json`, else
    /// `chat_template.json`; tokens from `tokenizer_config.json` and `special_tokens_map.json`.
    /// All of these may be absent.
    ///
    /// # Errors
    /// When a file cannot be read, is damaged, or holds a template that does not parse.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let config_path = folder.join(CONFIG_FILE);
        let config = read_object(&config_path)?.unwrap_or_default();
        let mut templates = Self::default();
        for (name, token) in special_tokens(folder, &config_path, &config)? {
            templates = templates.with_special_token(name, token);
        }

        let mut found = jinja_files(folder)?;
        if found.is_empty() {
            found = template_field(&config_path, config.get("chat_template"))?;
        }
        if found.is_empty() {
            let path = folder.join(LEGACY_TEMPLATE_FILE);
            let fields = read_object(&path)?.unwrap_or_default();
            found = template_field(&path, fields.get("chat_template"))?;
        }
        for found in found {
            templates = templates.with_found(found)?;
        }
        Ok(templates)
    }

    /// Reads one template from a file of its own, as the one for plain chat.
    ///
    /// # Errors
    /// When the file cannot be read, is no UTF-8, or the template does not parse.
    pub fn from_file(path: &Path) -> Result<Self> {
        let missing = || Error::io(path, std::io::ErrorKind::NotFound.into());
        let source = read_if_there(path)?.ok_or_else(missing)?;
        let place = path.display().to_string();
        Self::default().with_found(Found { name: DEFAULT.to_owned(), source, place })
    }

    fn with_found(self, found: Found) -> Result<Self> {
        let Found { name, source, place } = found;
        let place = format!("{place}: chat template {name:?}");
        self.with_template_of(name, source, place)
    }
}

/// A template as it was read.
struct Found {
    name: String,
    source: String,
    place: String,
}

fn jinja_files(folder: &Path) -> Result<Vec<Found>> {
    let mut found = Vec::new();
    let path = folder.join(TEMPLATE_FILE);
    if let Some(source) = read_if_there(&path)? {
        found.push(Found { name: DEFAULT.to_owned(), source, place: path.display().to_string() });
    }
    let path = folder.join(TEMPLATES_FOLDER);
    let entries = match std::fs::read_dir(&path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(found),
        Err(error) => return Err(Error::io(&path, error)),
    };
    for entry in entries {
        let file = entry.map_err(|error| Error::io(&path, error))?.path();
        // A name that is no Unicode could not be asked for.
        let Some(name) = file.file_name().and_then(|name| name.to_str()?.strip_suffix(".jinja"))
        else {
            continue;
        };
        let (name, place) = (name.to_owned(), file.display().to_string());
        if let Some(source) = read_if_there(&file)? {
            found.push(Found { name, source, place });
        }
    }
    Ok(found)
}

/// A template, or a list of named ones.
fn template_field(path: &Path, field: Option<&Json>) -> Result<Vec<Found>> {
    let place = path.display().to_string();
    let one = |name: &str, source: &str| Found {
        name: name.to_owned(),
        source: source.to_owned(),
        place: place.clone(),
    };
    let malformed =
        |expected, found: String| Err(Error::malformed(path, "chat_template", expected, found));
    match field {
        None | Some(Json::Null) => Ok(Vec::new()),
        Some(Json::String(template)) => Ok(vec![one(DEFAULT, template)]),
        Some(Json::Array(entries)) if entries.is_empty() => {
            malformed("at least one template", "an empty list".to_owned())
        }
        Some(Json::Array(entries)) => {
            let mut found = Vec::new();
            for (index, entry) in entries.iter().enumerate() {
                let text = |name| entry.get(name).and_then(Json::as_str);
                let (Some(name), Some(template)) = (text("name"), text("template")) else {
                    let expected = "entries with the strings \"name\" and \"template\"";
                    return malformed(expected, describe_entry(index, entry));
                };
                found.push(one(name, template));
            }
            Ok(found)
        }
        Some(other) => {
            malformed("a string or a list of named templates", describe_json(other).to_owned())
        }
    }
}

fn describe_entry(index: usize, entry: &Json) -> String {
    match entry.as_object() {
        Some(fields) => {
            let names: Vec<String> = fields.keys().map(|name| format!("{name:?}")).collect();
            format!("as entry {} one with the fields [{}]", index + 1, names.join(", "))
        }
        None => format!("as entry {} {}", index + 1, describe_json(entry)),
    }
}

fn special_tokens(
    folder: &Path,
    config_path: &Path,
    config: &Map<String, Json>,
) -> Result<Vec<(String, String)>> {
    let mut tokens = Vec::new();
    collect_tokens(config_path, config, &mut tokens)?;
    if !config.contains_key("added_tokens_decoder") {
        let path = folder.join(TOKENS_FILE);
        let fields = read_object(&path)?.unwrap_or_default();
        // A null there takes away what the config has.
        tokens.retain(|(name, _): &(String, String)| fields.get(name) != Some(&Json::Null));
        collect_tokens(&path, &fields, &mut tokens)?;
    }
    Ok(tokens)
}

fn collect_tokens(
    path: &Path,
    fields: &Map<String, Json>,
    tokens: &mut Vec<(String, String)>,
) -> Result<()> {
    let extra = fields.get("extra_special_tokens").and_then(Json::as_object);
    for (name, value) in fields {
        let named = NAMED_TOKENS.contains(&name.as_str());
        if !(named || name.ends_with("_token")) || value.is_null() {
            continue;
        }
        match token(value) {
            Some(token) => tokens.push((name.clone(), token.to_owned())),
            None if named => return Err(not_a_token(path, name, value)),
            None => {}
        }
    }
    for (name, value) in extra.into_iter().flatten() {
        match token(value) {
            Some(token) => tokens.push((name.clone(), token.to_owned())),
            None => return Err(not_a_token(path, &format!("extra_special_tokens.{name}"), value)),
        }
    }
    Ok(())
}

/// A token, as a string or as an object whose `content` is that string.
fn token(value: &Json) -> Option<&str> {
    value.get("content").unwrap_or(value).as_str()
}

fn not_a_token(path: &Path, name: &str, value: &Json) -> Error {
    let expected = "a string, or an object whose \"content\" is one";
    let found = match value.get("content") {
        Some(content) => format!("an object whose \"content\" is {}", describe_json(content)),
        None => describe_json(value).to_owned(),
    };
    Error::malformed(path, name, expected, found)
}

fn read_object(path: &Path) -> Result<Option<Map<String, Json>>> {
    let Some(text) = read_if_there(path)? else { return Ok(None) };
    serde_json::from_str(&text).map(Some).map_err(|source| {
        let place = format!("line {}, column {}", source.line(), source.column());
        Error::malformed(path, place, "a JSON object", source.to_string())
    })
}

fn read_if_there(path: &Path) -> Result<Option<String>> {
    use std::io::ErrorKind;
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) if error.kind() == ErrorKind::InvalidData => {
            let found = "bytes that are no UTF-8; save the file as UTF-8";
            Err(Error::malformed(path, "its text", "UTF-8", found))
        }
        Err(error) => Err(Error::io(path, error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::message::Message;
    use crate::template::RenderOptions;

    /// What a folder with these files gives.
    fn read(files: &[(&str, &str)]) -> Result<ChatTemplates> {
        let bytes: Vec<_> = files.iter().map(|(name, text)| (*name, text.as_bytes())).collect();
        read_bytes(&bytes)
    }

    fn read_bytes(files: &[(&str, &[u8])]) -> Result<ChatTemplates> {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }
        ChatTemplates::from_folder(folder.path())
    }

    /// The message of a folder with these files, which must hold all of `parts`.
    #[track_caller]
    fn refused(files: &[(&str, &str)], parts: &[&str]) {
        let error = read(files).unwrap_err();
        for part in parts {
            assert!(error.to_string().contains(part), "expected {part:?} in: {error}");
        }
    }

    #[test]
    fn an_empty_folder_has_nothing() {
        let templates = read(&[]).unwrap();
        assert!(templates.is_empty());
        assert_eq!(templates.special_token("bos_token"), None);
        let templates = read(&[(CONFIG_FILE, r#"{"bos_token": null, "chat_template": null}"#)]);
        assert!(templates.unwrap().is_empty());
    }

    #[test]
    fn the_legacy_file_comes_last() {
        let legacy = (LEGACY_TEMPLATE_FILE, r#"{"chat_template": "legacy"}"#);
        let text = |files: &[(&str, &str)]| {
            let templates = read(files).unwrap();
            templates.render(&[Message::user("")], &RenderOptions::default()).unwrap()
        };
        assert_eq!(text(&[legacy]), "legacy");
        assert_eq!(text(&[legacy, (CONFIG_FILE, r#"{"chat_template": "config"}"#)]), "config");
        assert_eq!(text(&[legacy, (TEMPLATE_FILE, "file")]), "file");
        assert!(read(&[(LEGACY_TEMPLATE_FILE, "{}")]).unwrap().is_empty());
    }

    #[test]
    fn a_template_alone_is_read_from_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jinja");
        let missing = ChatTemplates::from_file(&path).unwrap_err();
        assert!(matches!(missing.kind(), ErrorKind::Io { .. }), "{missing}");
        std::fs::write(&path, "file\r\n").unwrap();
        let templates = ChatTemplates::from_file(&path).unwrap();
        let text = templates.render(&[Message::user("")], &RenderOptions::default());
        assert_eq!(text.unwrap(), "file");
    }

    // Damaged files.

    #[test]
    fn json_that_is_cut_off_says_where() {
        refused(
            &[(CONFIG_FILE, "{\n  \"bos_token\": \n}")],
            &[CONFIG_FILE, "line 3, column 1: expected a JSON object, found"],
        );
        refused(&[(CONFIG_FILE, "")], &[CONFIG_FILE, "line 1, column 0", "expected a JSON object"]);
        refused(&[(CONFIG_FILE, "[]")], &[CONFIG_FILE, "expected a JSON object"]);
        refused(&[(TOKENS_FILE, "{")], &[TOKENS_FILE, "line 1", "expected a JSON object"]);
        refused(&[(LEGACY_TEMPLATE_FILE, "\"x\"")], &[LEGACY_TEMPLATE_FILE, "a JSON object"]);
    }

    #[test]
    fn text_that_is_no_utf_8_names_the_file() {
        let rag = "additional_chat_templates/rag.jinja";
        for name in [CONFIG_FILE, TOKENS_FILE, TEMPLATE_FILE, rag] {
            let error = read_bytes(&[(name, b"\xff{}")]).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::Malformed { .. }));
            let text = error.to_string();
            assert!(text.contains(name) && text.contains("save the file as UTF-8"), "{text}");
        }
    }

    #[test]
    fn a_folder_in_the_place_of_a_file_is_named() {
        for name in [CONFIG_FILE, TEMPLATE_FILE] {
            let error = read(&[(&format!("{name}/x"), "")]).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::Io { .. }));
            assert!(error.to_string().contains(name), "{error}");
        }
        let error = read(&[(TEMPLATES_FOLDER, "")]).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Io { .. }));
        assert!(error.to_string().contains(TEMPLATES_FOLDER), "{error}");
    }

    #[test]
    fn a_template_of_the_wrong_type_is_refused() {
        for (field, found) in [
            ("3", "found a number"),
            ("{}", "found an object"),
            ("[]", "expected at least one template, found an empty list"),
            ("[\"x\"]", "found as entry 1 a string"),
            (
                r#"[{"name": "a", "template": ""}, {"name": "default"}]"#,
                "strings \"name\" and \"template\", found as entry 2 one with the fields [\"name\"]",
            ),
            (r#"[{"name": 1, "template": "x"}]"#, "as entry 1 one with the fields"),
        ] {
            let config = format!(r#"{{"chat_template": {field}}}"#);
            refused(&[(CONFIG_FILE, &config)], &[CONFIG_FILE, "chat_template: expected", found]);
        }
    }

    #[test]
    fn a_token_of_the_wrong_type_is_refused() {
        for (fields, place, found) in [
            (r#"{"eos_token": [2]}"#, "eos_token", "found an array"),
            (r#"{"pad_token": 0}"#, "pad_token", "found a number"),
            (r#"{"bos_token": {"lstrip": false}}"#, "bos_token", "found an object"),
            (r#"{"bos_token": {"content": null}}"#, "bos_token", "\"content\" is null"),
            (
                r#"{"extra_special_tokens": {"image_token": true}}"#,
                "extra_special_tokens.image_token",
                "found a boolean",
            ),
        ] {
            for file in [CONFIG_FILE, TOKENS_FILE] {
                let place = format!("{place}: expected a string, or an object whose");
                refused(&[(file, fields)], &[file, &place, found]);
            }
        }
    }

    #[test]
    fn a_template_that_does_not_parse_names_file_name_and_line() {
        let broken = "a\n{% for m in messages %}";
        let config = serde_json::json!({"chat_template": [{"name": "rag", "template": broken}]});
        for (file, text, name) in [
            (TEMPLATE_FILE, broken, "default"),
            ("additional_chat_templates/tool_use.jinja", broken, "tool_use"),
            (CONFIG_FILE, &config.to_string(), "rag"),
        ] {
            let error = read(&[(file, text)]).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::Template { .. }));
            let message = error.to_string();
            let name = format!("{file}: chat template {name:?}: line 2: syntax error");
            assert!(message.contains(&name) && message.contains("download it again"), "{message}");
        }
    }
}
