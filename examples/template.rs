//! Show conversations as a model meets them: rendered with its chat template.
//!
//! `cargo run --release --example template -- --model FOLDER-OR-FILE conversations.jsonl`
//!
//! Each line of the file is a conversation: a list of messages, or an object with `messages` and what
//! else the template is told: `{"messages": [...], "tools": [...], "add_generation_prompt": true,
//! "date": "2026-10-03", "variables": {"enable_thinking": false}}`.

use std::io::{BufRead, BufReader, Read, stdin};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use burn_lora::{Error, Result, io_error, say};
use clap::Parser;
use lora_models::{ChatTemplates, Checkpoint, MarkedText, RenderOptions};
use serde::Deserialize;
use serde_json::{Value, json};

/// Show conversations as a model meets them.
#[derive(Debug, Parser)]
struct Options {
    /// Conversations, one a line in JSON; - reads standard input
    conversations: PathBuf,
    /// Model, or its template alone: a Hugging Face folder, a GGUF file or a .jinja file [default: the
    /// repository's own]
    #[arg(long, value_name = "FOLDER-OR-FILE")]
    model: Option<PathBuf>,
    /// A special token that the template prints, such as bos_token=<s>
    #[arg(long = "token", value_name = "NAME=TOKEN")]
    tokens: Vec<String>,
    /// Answer each line with one of JSON: {"text"} or {"error"}, and {"answers"} where "marked" is true
    #[arg(long)]
    json: bool,
}

/// A conversation, and what its template is told beside it.
#[derive(Debug, Deserialize)]
struct Row {
    messages: Vec<Value>,
    #[serde(default)]
    marked: bool,
    #[serde(flatten)]
    options: RenderOptions,
}

fn main() -> ExitCode {
    burn_lora::run(|| show(&Options::parse()))
}

fn show(options: &Options) -> Result<()> {
    let path = options.model.clone().unwrap_or_else(|| burn_lora::resource("examples/tiny_world"));
    let templates = templates(&path, &options.tokens);
    if !options.json {
        templates.as_ref().map_err(|error| Error::user(error.to_string()))?;
    }
    let file = &options.conversations;
    let reader: Box<dyn Read> = if file.as_os_str() == "-" {
        Box::new(stdin())
    } else {
        Box::new(std::fs::File::open(file).map_err(|source| io_error(file, &source))?)
    };
    for (index, line) in BufReader::new(reader).lines().enumerate() {
        let line = line.map_err(|source| io_error(file, &source))?;
        let rendered = templates.as_ref().map_err(ToString::to_string).and_then(|templates| {
            render(templates, &line).map_err(|reason| format!("line {}: {reason}", index + 1))
        });
        match rendered {
            Ok(marked) if options.json => say(json!({
                "text": marked.text,
                "answers": marked.answers.map(|answers| {
                    answers.iter().map(|range| [range.start, range.end]).collect::<Vec<_>>()
                }),
            })),
            Ok(marked) => say(marked.text),
            Err(error) if options.json => say(json!({ "error": error })),
            Err(error) => return Err(Error::user(error)),
        }
    }
    Ok(())
}

fn templates(path: &Path, tokens: &[String]) -> Result<ChatTemplates, lora_models::Error> {
    let mut templates = if path.extension().is_some_and(|extension| extension == "jinja") {
        ChatTemplates::from_file(path)?
    } else if path.is_dir() {
        ChatTemplates::from_folder(path)?
    } else {
        Checkpoint::open(path)?.tokenizer.chat_templates().clone()
    };
    for token in tokens {
        let (name, token) = token.split_once('=').unwrap_or((token, ""));
        templates = templates.with_special_token(name, token);
    }
    Ok(templates)
}

fn render(templates: &ChatTemplates, line: &str) -> Result<MarkedText, String> {
    let row: Value = serde_json::from_str(line).map_err(|error| error.to_string())?;
    let row = if row.is_array() { json!({ "messages": row }) } else { row };
    let row: Row = serde_json::from_value(row).map_err(|error| error.to_string())?;
    let rendered = match row.marked {
        true => templates.render_marked(&row.messages, &row.options),
        false => templates
            .render(&row.messages, &row.options)
            .map(|text| MarkedText { text, answers: None }),
    };
    rendered.map_err(|error| error.to_string())
}
