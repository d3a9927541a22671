//! From a data file to batches of token ids: read, encode, split, shuffle, pad.
//!
//! **file** ([`read_conversations`]) -> **conversations** ([`Conversation::encode`]) -> **samples**
//! ([`split`]) -> **indices** ([`Batches`]) -> **batch** ([`Batch::collate`]).

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use lora_models::{Message, Tokenizer};
use rand::rngs::Xoshiro256PlusPlus;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Map, Value};

use crate::error::{Error, ErrorKind, Result};

const ROLES: [&str; 4] = ["system", "user", "assistant", "tool"];

/// Content that no template changes: digits have no case, no white space and no markup.
const STAND_IN: &str = "730591826447";

/// Where a conversation was read: `data.jsonl: line 3`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The data file.
    pub path: Arc<Path>,
    /// What `number` counts: `line` in JSONL, `row` in a JSON array.
    pub unit: &'static str,
    /// Which line or row, counted from 1.
    pub number: usize,
}

impl Place {
    fn error(&self, reason: impl Into<String>) -> Error {
        ErrorKind::Data {
            path: self.path.to_path_buf(),
            row: self.number,
            unit: self.unit,
            reason: reason.into(),
        }
        .into()
    }

    fn encode_error(&self, source: lora_models::Error) -> Error {
        ErrorKind::Encode {
            path: self.path.to_path_buf(),
            row: self.number,
            unit: self.unit,
            source,
        }
        .into()
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} {}", self.path.display(), self.unit, self.number)
    }
}

/// One row of a data file, as turns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conversation {
    /// The turns, in order; at least one is the assistant's and has content.
    pub messages: Vec<Message>,
    /// Where it was read.
    pub place: Place,
}

/// Reads a data file: a JSON array of rows, or JSONL with one row a line.
///
/// A row is an object with `instruction`, `output` and perhaps `input`, or with `messages`, a list
/// of `{"role", "content"}`. Other fields are ignored, and blank lines are skipped. A row that has
/// an instruction becomes one question and one answer; `input` follows the instruction after a
/// blank line.
///
/// # Errors
/// When the file cannot be read or has no rows, and at the first row that cannot be trained on; the
/// message says how many more there are, since a file with one bad row often has many.
pub fn read_conversations(path: &Path) -> Result<Vec<Conversation>> {
    let bytes = std::fs::read(path).map_err(|source| Error::io(path, source))?;
    let file: Arc<Path> = path.into();
    let text = utf8(&file, &bytes)?;
    // Windows editors put a byte order mark at the beginning; JSON has no place for it.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);

    let mut rows = Rows::default();
    match text.trim_start().chars().next() {
        None => return Err(Error::no_data(path, "the file is empty; write one JSON row a line")),
        Some('[') => read_array(&file, text, &mut rows)?,
        Some(_) => read_lines(&file, text, &mut rows),
    }
    rows.finish(path)
}

/// The rows so far; of the bad ones, the first with its reason.
#[derive(Default)]
struct Rows {
    good: Vec<Conversation>,
    first_bad: Option<(Place, String)>,
    bad: usize,
}

impl Rows {
    fn push(&mut self, place: Place, row: Result<Value, String>) {
        match row.and_then(|row| messages_of(&row)) {
            Ok(messages) => self.good.push(Conversation { messages, place }),
            Err(reason) => {
                self.bad += 1;
                self.first_bad.get_or_insert((place, reason));
            }
        }
    }

    fn finish(self, path: &Path) -> Result<Vec<Conversation>> {
        match self.first_bad {
            Some((place, reason)) => Err(match self.bad - 1 {
                0 => place.error(reason),
                1 => place.error(format!("{reason} (1 more row cannot be used)")),
                more => place.error(format!("{reason} ({more} more rows cannot be used)")),
            }),
            None if self.good.is_empty() => {
                Err(Error::no_data(path, "the array is empty; put rows into it"))
            }
            None => Ok(self.good),
        }
    }
}

fn read_lines(file: &Arc<Path>, text: &str, rows: &mut Rows) {
    for (index, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let place = Place { path: file.clone(), unit: "line", number: index + 1 };
        let row = serde_json::from_str(line).map_err(|error| {
            // serde's own "line 1" would contradict the line that the message begins with.
            let full = error.to_string();
            let tail = format!(" at line {} column {}", error.line(), error.column());
            let reason = full.strip_suffix(&tail).unwrap_or(&full);
            format!(
                "expected one whole JSON object, found broken JSON at column {} ({reason}); \
                 write each row on a line of its own, or all of them as an array in [ ]",
                error.column()
            )
        });
        rows.push(place, row);
    }
}

fn read_array(file: &Arc<Path>, text: &str, rows: &mut Rows) -> Result<()> {
    let values: Vec<Value> = serde_json::from_str(text).map_err(|error| {
        Place { path: file.clone(), unit: "line", number: error.line() }.error(format!(
            "expected one JSON array of rows, since the file begins with \"[\", found broken JSON \
             at column {} ({error}); repair it, or write one JSON object a line without the array",
            error.column()
        ))
    })?;
    for (index, value) in values.into_iter().enumerate() {
        rows.push(Place { path: file.clone(), unit: "row", number: index + 1 }, Ok(value));
    }
    Ok(())
}

fn utf8<'a>(file: &Arc<Path>, bytes: &'a [u8]) -> Result<&'a str> {
    std::str::from_utf8(bytes).map_err(|error| {
        let at = error.valid_up_to();
        let number = 1 + bytes[..at].iter().filter(|&&byte| byte == b'\n').count();
        Place { path: file.clone(), unit: "line", number }.error(format!(
            "expected UTF-8 text, found the byte 0x{:02x} at offset {at}; save the file as UTF-8",
            bytes[at]
        ))
    })
}

fn messages_of(row: &Value) -> Result<Vec<Message>, String> {
    let Value::Object(fields) = row else {
        return Err(format!(
            "expected a JSON object, found {}; write {{\"instruction\": ..., \"output\": ...}} or \
             remove the row",
            describe(row)
        ));
    };
    refuse_fields(fields, &["system", "history", "tools"])?;
    let has = |name| fields.get(name).is_some_and(|value| !value.is_null());
    let (instruction, output) = (has("instruction"), has("output"));
    // Of a row that has both forms, the one that is whole is taken.
    if has("messages") && !(instruction && output) {
        chat_row(&fields["messages"])
    } else if instruction || output {
        instruction_row(fields)
    } else if let Some(null) = fields.get("messages") {
        chat_row(null)
    } else {
        Err(format!(
            "expected the fields \"instruction\" and \"output\", or \"messages\", found {}; rename \
             the fields or remove the row",
            names_of(fields)
        ))
    }
}

fn instruction_row(fields: &Map<String, Value>) -> Result<Vec<Message>, String> {
    let instruction = text_field(fields, "instruction")?;
    let input = match fields.get("input") {
        None | Some(Value::Null) => "",
        Some(Value::String(input)) => input,
        Some(other) => return Err(wrong_type("input", other)),
    };
    let output = text_field(fields, "output")?;
    let question = match input.trim() {
        "" => instruction.to_owned(),
        _ => format!("{instruction}\n\n{input}"),
    };
    Ok(vec![Message::user(question), Message::assistant(output)])
}

/// A text that must be there and hold more than white space.
fn text_field<'a>(fields: &'a Map<String, Value>, name: &str) -> Result<&'a str, String> {
    match fields.get(name) {
        None => Err(format!(
            "expected the field \"{name}\", found {}; add it or remove the row",
            names_of(fields)
        )),
        Some(Value::String(text)) if text.trim().is_empty() => Err(format!(
            "expected text in \"{name}\", found an empty string; fill it in or remove the row"
        )),
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(wrong_type(name, other)),
    }
}

fn chat_row(messages: &Value) -> Result<Vec<Message>, String> {
    let Value::Array(entries) = messages else {
        return Err(wrong_kind("messages", "a list of messages", messages));
    };
    let messages: Vec<Message> = entries
        .iter()
        .enumerate()
        .map(|(index, entry)| {
            chat_message(entry).map_err(|reason| format!("message {}: {reason}", index + 1))
        })
        .collect::<Result<_, _>>()?;
    if messages.first().is_some_and(|message| message.role == "assistant") {
        return Err(
            "message 1: expected a system or user turn, found role \"assistant\"; put the \
                    question before the answer or remove the row"
                .to_owned(),
        );
    }
    if !messages.iter().any(is_answer) {
        return Err(format!(
            "expected at least one assistant message with content in \"messages\", found none in \
             {}; add one or remove the row",
            messages.len()
        ));
    }
    Ok(messages)
}

fn chat_message(entry: &Value) -> Result<Message, String> {
    let Value::Object(fields) = entry else {
        return Err(format!(
            "expected an object with \"role\" and \"content\", found {}; rewrite the message or \
             remove the row",
            describe(entry)
        ));
    };
    let text = |name: &str| match fields.get(name) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => Err(wrong_type(name, other)),
        None => Err(format!(
            "expected the field \"{name}\", found {}; add it or remove the row",
            names_of(fields)
        )),
    };
    let role = text("role")?;
    if !ROLES.contains(&role.as_str()) {
        return Err(format!(
            "expected the role {}, found \"{role}\"; rename the role or remove the row",
            ROLES.join(", ")
        ));
    }
    refuse_fields(fields, &["weight", "tool_calls"])?;
    Ok(Message::new(role, text("content")?))
}

/// Refuses fields that other programs give a meaning that would be lost here. Fields of any other name
/// are notes, and ignored.
fn refuse_fields(fields: &Map<String, Value>, names: &[&str]) -> Result<(), String> {
    let holds = |value: &Value| match value {
        Value::Null => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(entries) => !entries.is_empty(),
        Value::Number(number) => number.as_f64() != Some(1.0), // the weight of every turn
        _ => true,
    };
    match names.iter().find(|name| fields.get(**name).is_some_and(holds)) {
        Some(name) => Err(format!(
            "expected no field \"{name}\", which has a meaning that is not supported here, found one; \
             put it into \"messages\" or remove it"
        )),
        None => Ok(()),
    }
}

/// Whether the loss counts this turn. An empty one is context only: it would teach the model to
/// answer with nothing.
fn is_answer(message: &Message) -> bool {
    message.role == "assistant"
        && message.content.as_str().is_some_and(|content| !content.trim().is_empty())
}

fn wrong_type(name: &str, found: &Value) -> String {
    wrong_kind(name, "a string", found)
}

fn wrong_kind(name: &str, expected: &str, found: &Value) -> String {
    let found = describe(found);
    format!("expected {expected} in \"{name}\", found {found}; rewrite it or remove the row")
}

fn describe(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// The names of the fields, for a message; a wide table is cut short.
fn names_of(fields: &Map<String, Value>) -> String {
    const SHOWN: usize = 8;
    let names: Vec<String> = fields.keys().take(SHOWN).map(|name| format!("\"{name}\"")).collect();
    match fields.len() {
        0 => "no fields".to_owned(),
        count if count > SHOWN => format!("{} and {} more", names.join(", "), count - SHOWN),
        _ => names.join(", "),
    }
}

/// One conversation as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// The tokens, in order.
    pub ids: Vec<u32>,
    /// For each token, whether the loss counts the prediction *of* it, made one position earlier.
    pub trained: Vec<bool>,
    /// Whether tokens were cut off to keep within the maximum length.
    pub truncated: bool,
}

impl Sample {
    fn push(&mut self, ids: Vec<u32>, trained: bool) {
        self.trained.resize(self.trained.len() + ids.len(), trained);
        self.ids.extend(ids);
    }

    fn cut(&mut self, length: usize) {
        self.ids.truncate(length);
        self.trained.truncate(length);
    }
}

impl Conversation {
    /// Turns the conversation into tokens and marks those that are trained: of every assistant turn
    /// with content, all that the model has to write itself, up to and including the token that
    /// ends the turn. Without that token trained, the model would never learn to stop.
    ///
    /// What the template writes after the end of a turn (a line break, in ChatML) is not trained.
    /// It is kept where another turn follows, and left out at the end.
    ///
    /// Prompt and answer are tokenised apart and then joined. A joint text could be cut into tokens
    /// across the boundary, but at inference the model continues a prompt that was tokenised
    /// without the answer, and that is what it must be trained on.
    ///
    /// A sample longer than `max_len` keeps its first `max_len` tokens. When nothing trained is
    /// left, there is no sample.
    ///
    /// # Errors
    /// When the template refuses the messages, rewrites earlier turns once later ones follow, or
    /// does not mark the end of a turn with a token; and when the tokenizer refuses the text.
    pub fn encode(&self, tokenizer: &Tokenizer, max_len: usize) -> Result<Option<Sample>> {
        let mut sample = Sample { ids: Vec::new(), trained: Vec::new(), truncated: false };
        let mut done = String::new(); // the text that `sample` holds as tokens
        for (turn, message) in self.messages.iter().enumerate() {
            if message.role != "assistant" {
                continue;
            }
            let before = &self.messages[..turn];
            let prompt = self.render(tokenizer, before, true)?;
            let full = self.render(tokenizer, &self.messages[..=turn], false)?;
            let (Some(context), Some(response)) =
                (prompt.strip_prefix(&done), full.strip_prefix(&prompt))
            else {
                return Err(self.place.error(format!(
                    "message {}: expected a chat template that only appends, found one that \
                     rewrites earlier turns or its own generation prompt, so that no single text \
                     shows what the model meets at each turn; keep one assistant turn a row, or \
                     use another template",
                    turn + 1
                )));
            };
            let response = &response[..self.end_of_turn(tokenizer, before, response, turn)?];
            sample.push(self.tokens(tokenizer, context)?, false);
            sample.push(self.tokens(tokenizer, response)?, is_answer(message));
            done = prompt + response;
        }

        // Turns after the last trained one would cost time and teach nothing.
        let end = sample.trained.iter().rposition(|&trained| trained).map_or(0, |last| last + 1);
        sample.cut(end);
        sample.truncated = sample.ids.len() > max_len;
        sample.cut(max_len);
        // Nothing comes before the first token, so nothing can predict it.
        let any_trained = sample.trained.iter().skip(1).any(|&trained| trained);
        Ok(any_trained.then_some(sample))
    }

    /// Where in `response` the token ends that ends the assistant's turn.
    ///
    /// The text after the content is what the template writes after *any* content, so the same turn
    /// is rendered again with a stand-in for its content. Searching for the content itself would
    /// fail where a template trims it, and mislead where it is as short as a piece of the markup.
    fn end_of_turn(
        &self,
        tokenizer: &Tokenizer,
        before: &[Message],
        response: &str,
        turn: usize,
    ) -> Result<usize> {
        let mut messages = before.to_vec();
        messages.push(Message::assistant(STAND_IN));
        let rendered = self.render(tokenizer, &messages, false)?;
        let suffix = rendered.rsplit_once(STAND_IN).map(|(_, suffix)| suffix);
        let start = suffix.and_then(|suffix| Some(response.strip_suffix(suffix)?.len()));
        let (Some(suffix), Some(start)) = (suffix, start) else {
            return Err(self.place.error(format!(
                "message {}: expected a chat template that writes the same text after every \
                 answer, found one where it depends on the answer; use another template",
                turn + 1
            )));
        };
        let marker = tokenizer
            .first_added_token(suffix)
            .map_err(|source| self.place.encode_error(source))?;
        match marker {
            Some(marker) => Ok(start + marker.end),
            None => Err(self.place.error(format!(
                "message {}: expected a special token after the answer, found {suffix:?}, from \
                 which the model cannot learn where to stop; let the chat template write {} there",
                turn + 1,
                tokenizer.eos_token().unwrap_or("the end-of-text token")
            ))),
        }
    }

    fn render(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String> {
        tokenizer.render(messages, add_generation_prompt).map_err(|source| {
            if tokenizer.has_chat_template() {
                self.place.encode_error(source)
            } else {
                source.into() // the model's fault, not this row's
            }
        })
    }

    fn tokens(&self, tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
        tokenizer.encode(text).map_err(|source| self.place.encode_error(source))
    }
}

/// The samples of a run, divided into those that train and those that measure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SplitData {
    /// What is trained on.
    pub train: Vec<Sample>,
    /// What is never trained on, to measure the loss with.
    pub held_out: Vec<Sample>,
    /// Which of the samples that were given to [`split`] each one of `held_out` is.
    pub held_out_rows: Vec<usize>,
    /// How many of both were cut to the maximum length.
    pub truncated: usize,
    /// How many rows had no trained token within the maximum length, and are in neither.
    pub skipped: usize,
}

/// Shuffles the samples and holds `held_out` of them back.
///
/// `samples` are the results of [`Conversation::encode`] for the rows of `path`, which is here for
/// the messages. The order comes from [`Xoshiro256PlusPlus`] seeded with `seed`: a generator with a
/// name, so that neither the platform nor a new `StdRng` in `rand` changes who is held out.
///
/// # Errors
/// When there is no sample, or none would be left to train on.
pub fn split(
    path: &Path,
    samples: Vec<Option<Sample>>,
    held_out: usize,
    seed: u64,
) -> Result<SplitData> {
    let rows = samples.len();
    let mut train: Vec<(usize, Sample)> =
        samples.into_iter().enumerate().filter_map(|(row, sample)| Some((row, sample?))).collect();
    let skipped = rows - train.len();
    if train.is_empty() {
        let reason = match rows {
            0 => "the file has no rows; add some".to_owned(),
            _ => format!(
                "the answers of all {rows} rows begin beyond the maximum length; raise it or \
                 shorten the questions"
            ),
        };
        return Err(Error::no_data(path, reason));
    }
    if held_out >= train.len() {
        let expected = format!("fewer than the {} usable rows of {}", train.len(), path.display());
        return Err(Error::settings("held_out", expected, held_out));
    }

    let truncated = train.iter().filter(|(_, sample)| sample.truncated).count();
    train.shuffle(&mut Xoshiro256PlusPlus::seed_from_u64(seed));
    let rest = train.split_off(held_out);
    let (held_out_rows, held_out) = train.into_iter().unzip();
    let train = rest.into_iter().map(|(_, sample)| sample).collect();
    Ok(SplitData { train, held_out, held_out_rows, truncated, skipped })
}

/// An endless iterator over the indices of training batches.
///
/// Every epoch goes over all samples in an order of its own, which depends on nothing but the seed
/// and the number of the epoch; so a run that is taken up again skips the batches it has had and
/// meets the same ones. Every batch is full: where an epoch ends within one, the next epoch fills
/// it, and a sample may then be in it twice.
#[derive(Debug, Clone)]
pub struct Batches {
    batch_size: usize,
    seed: u64,
    epoch: u64,
    order: Vec<usize>,
    next: usize,
}

impl Batches {
    /// Batches of `batch_size` out of `samples` samples.
    ///
    /// # Errors
    /// When either number is zero.
    pub fn new(samples: usize, batch_size: usize, seed: u64) -> Result<Self> {
        for (name, value) in [("samples", samples), ("batch_size", batch_size)] {
            if value == 0 {
                return Err(Error::settings(name, "at least 1", value));
            }
        }
        let order = epoch_order(samples, seed, 0);
        Ok(Self { batch_size, seed, epoch: 0, order, next: 0 })
    }
}

impl Iterator for Batches {
    type Item = Vec<usize>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut batch = Vec::with_capacity(self.batch_size);
        while batch.len() < self.batch_size {
            if self.next == self.order.len() {
                self.epoch += 1;
                self.order = epoch_order(self.order.len(), self.seed, self.epoch);
                self.next = 0;
            }
            let end = self.order.len().min(self.next + self.batch_size - batch.len());
            batch.extend_from_slice(&self.order[self.next..end]);
            self.next = end;
        }
        Some(batch)
    }
}

fn epoch_order(samples: usize, seed: u64, epoch: u64) -> Vec<usize> {
    // Through a generator first: with `seed + epoch`, seed 1 would repeat the epochs of seed 0.
    let mixed = Xoshiro256PlusPlus::seed_from_u64(seed).next_u64() ^ epoch;
    let mut order: Vec<usize> = (0..samples).collect();
    order.shuffle(&mut Xoshiro256PlusPlus::seed_from_u64(mixed));
    order
}

/// Samples side by side, as the model takes them.
///
/// Rows shorter than the longest are padded on the right. That needs no mask: under causal
/// attention a token looks only at earlier ones, so no real token ever sees the padding, and what
/// the padding itself computes is in no loss.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Token ids, `[rows, length]`, row-major.
    pub ids: Vec<i32>,
    /// Number of samples.
    pub rows: usize,
    /// Tokens of the longest sample.
    pub length: usize,
    /// Where the model's prediction counts: `row * length + t` for every trained token at `t + 1`.
    pub positions: Vec<i32>,
    /// The token that is to be predicted at each of `positions`.
    pub targets: Vec<i32>,
    /// Tokens without the padding.
    pub tokens: usize,
}

impl Batch {
    /// Puts samples side by side and pads them with `pad_id`, which may be any token of the model.
    pub fn collate(samples: &[&Sample], pad_id: u32) -> Self {
        let rows = samples.len();
        let length = samples.iter().map(|sample| sample.ids.len()).max().unwrap_or(0);
        // Burn's integer tensors are signed; no vocabulary and no batch comes near 2^31.
        let mut batch = Self {
            ids: vec![pad_id as i32; rows * length],
            rows,
            length,
            positions: Vec::new(),
            targets: Vec::new(),
            tokens: samples.iter().map(|sample| sample.ids.len()).sum(),
        };
        for (row, sample) in samples.iter().enumerate() {
            let start = row * length;
            for (t, (&id, &trained)) in sample.ids.iter().zip(&sample.trained).enumerate() {
                batch.ids[start + t] = id as i32;
                if trained && t > 0 {
                    batch.positions.push((start + t - 1) as i32);
                    batch.targets.push(id as i32);
                }
            }
        }
        batch
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    use super::*;

    const CHATML: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nS<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    const LLAMA3: &str = "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}";

    const MISTRAL: &str = "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}{% else %}{{ ' ' + message['content'].strip() + eos_token }}{% endif %}{% endfor %}";

    const SPECIAL: [&str; 9] = [
        "<s>",
        "</s>",
        "<|im_start|>",
        "<|im_end|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<think>",
        "</think>",
    ];

    /// One token for each byte, then `SPECIAL`, then the merges; white space does not stop a merge.
    fn vocabulary(merges: &[(&str, &str)]) -> tokenizers::Tokenizer {
        let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
        alphabet.sort_unstable();
        let mut vocab: Map<String, Value> =
            alphabet.iter().enumerate().map(|(id, c)| (c.to_string(), json!(id))).collect();
        // The crate ignores the ids below for tokens that the model's own vocabulary lacks.
        vocab.extend((256..).zip(SPECIAL).map(|(id, token)| (token.to_owned(), json!(id))));
        for (i, (left, right)) in merges.iter().enumerate() {
            vocab.insert(format!("{left}{right}"), json!(256 + SPECIAL.len() + i));
        }
        let added: Vec<Value> = (256..)
            .zip(SPECIAL)
            .map(|(id, content)| {
                json!({
                    "id": id, "content": content, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": true,
                })
            })
            .collect();
        let json = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
            "normalizer": null, "post_processor": null, "decoder": null,
            "pre_tokenizer": {
                "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                "use_regex": false,
            },
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null,
                "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
                "byte_fallback": false, "vocab": vocab, "merges": merges,
            },
        });
        tokenizers::Tokenizer::from_bytes(json.to_string()).unwrap()
    }

    fn tokenizer(template: &str) -> Tokenizer {
        let text = |text: &str| Some(text.to_owned());
        Tokenizer::new(vocabulary(&[]), text(template), text("<s>"), text("</s>")).unwrap()
    }

    fn conversation(messages: &[(&str, &str)]) -> Conversation {
        let message = |&(role, content): &(&str, &str)| Message::new(role, content);
        Conversation {
            messages: messages.iter().map(message).collect(),
            place: Place { path: Path::new("data.jsonl").into(), unit: "line", number: 3 },
        }
    }

    /// The sample's tokens as text, with what is trained between `⟦` and `⟧`.
    fn shown(sample: &Sample) -> String {
        assert_eq!(sample.ids.len(), sample.trained.len());
        let vocabulary = vocabulary(&[]);
        let mut text = String::new();
        let mut inside = false;
        for (&id, &trained) in sample.ids.iter().zip(&sample.trained) {
            if trained != inside {
                text.push(if trained { '⟦' } else { '⟧' });
                inside = trained;
            }
            let token = vocabulary.id_to_token(id).unwrap();
            text.push_str(&token.replace('Ġ', " ").replace('Ċ', "\n"));
        }
        if inside {
            text.push('⟧');
        }
        text
    }

    fn encoded(template: &str, messages: &[(&str, &str)]) -> String {
        let sample = conversation(messages).encode(&tokenizer(template), 10_000).unwrap();
        shown(&sample.unwrap())
    }

    fn refused(template: &str, messages: &[(&str, &str)]) -> Error {
        conversation(messages).encode(&tokenizer(template), 10_000).unwrap_err()
    }

    fn read(bytes: impl AsRef<[u8]>) -> Result<Vec<Conversation>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.jsonl");
        std::fs::write(&path, bytes).unwrap();
        read_conversations(&path)
    }

    /// What the message says after the path.
    #[track_caller]
    fn bad(bytes: impl AsRef<[u8]>) -> String {
        let text = read(bytes).unwrap_err().to_string();
        let (_, said) = text.split_once("data.jsonl: ").expect(&text);
        said.to_owned()
    }

    #[track_caller]
    fn assert_says(text: &str, parts: &[&str]) {
        for part in parts {
            assert!(text.contains(part), "expected {part:?} in: {text}");
        }
    }

    fn turns(conversation: &Conversation) -> Vec<(&str, &str)> {
        conversation
            .messages
            .iter()
            .map(|message| (message.role.as_str(), message.content.as_str().unwrap()))
            .collect()
    }

    // Reading: what is accepted.

    #[test]
    fn reads_jsonl_with_blank_lines_and_windows_line_ends() {
        let rows = read(
            "\r\n{\"instruction\": \"add\", \"input\": \"1 2\", \"output\": \"3\"}\r\n  \r\n{\"instruction\": \"hi\", \"output\": \" yes\\n\"}",
        )
        .unwrap();
        assert_eq!(turns(&rows[0]), [("user", "add\n\n1 2"), ("assistant", "3")]);
        assert_eq!(turns(&rows[1]), [("user", "hi"), ("assistant", " yes\n")]);
        assert_eq!((rows[0].place.unit, rows[0].place.number), ("line", 2));
        assert_eq!(rows[1].place.number, 4);
        assert!(rows[1].place.to_string().ends_with("data.jsonl: line 4"));
    }

    #[test]
    fn reads_an_array_and_counts_rows() {
        let rows = read(
            r#"
            [{"instruction": "a", "output": "b"},
             {"instruction": "c", "input": "", "output": "d"}]"#,
        )
        .unwrap();
        assert_eq!(turns(&rows[1]), [("user", "c"), ("assistant", "d")]);
        assert!(rows[1].place.to_string().ends_with("data.jsonl: row 2"));
    }

    #[test]
    fn tolerates_a_byte_order_mark() {
        for text in [
            "\u{feff}{\"instruction\": \"a\", \"output\": \"b\"}",
            "\u{feff}[{\"instruction\": \"a\", \"output\": \"b\"}]",
        ] {
            assert_eq!(read(text).unwrap().len(), 1);
        }
    }

    #[test]
    fn ignores_extra_fields_and_an_input_of_null_or_white_space() {
        let row = json!({"instruction": "a", "input": null, "output": "b", "id": 7});
        assert_eq!(turns(&read(row.to_string()).unwrap()[0])[0], ("user", "a"));
        let row = json!({"instruction": "a", "input": " \n", "output": "b", "messages": null});
        assert_eq!(turns(&read(row.to_string()).unwrap()[0])[0], ("user", "a"));
    }

    #[test]
    fn reads_chat_messages() {
        let messages = [("system", "s"), ("user", ""), ("assistant", "a"), ("tool", "t")];
        let list: Vec<Value> = messages
            .iter()
            .map(|(role, content)| json!({"role": role, "content": content, "weight": 1}))
            .collect();
        let row = json!({"messages": list, "instruction": "beside it, without an output"});
        assert_eq!(turns(&read(row.to_string()).unwrap()[0]), messages);
    }

    #[test]
    fn a_field_whose_meaning_would_be_lost_is_refused() {
        let chat = |extra: (&str, Value)| {
            let mut answer = json!({"role": "assistant", "content": "b"});
            answer[extra.0] = extra.1;
            json!({"messages": [{"role": "user", "content": "a"}, answer]})
        };
        let row = |extra: (&str, Value)| {
            let mut row = json!({"instruction": "a", "output": "b"});
            row[extra.0] = extra.1;
            row
        };
        for (row, name) in [
            (chat(("weight", json!(0))), "weight"),
            (chat(("tool_calls", json!([{}]))), "tool_calls"),
            (row(("system", json!("Be brief."))), "system"),
            (row(("history", json!([["a", "b"]]))), "history"),
            (row(("tools", json!([{}]))), "tools"),
        ] {
            let message = read(row.to_string()).unwrap_err().to_string();
            assert!(message.contains(name), "{message}");
        }
        for row in [row(("system", json!(""))), row(("history", json!([])))] {
            assert!(read(row.to_string()).is_ok(), "{row}");
        }
    }

    #[test]
    fn of_two_whole_forms_the_instruction_is_taken() {
        let row = json!({"instruction": "a", "output": "b", "messages": [3]});
        assert_eq!(turns(&read(row.to_string()).unwrap()[0])[1], ("assistant", "b"));
    }

    // Reading: one test for each thing that can be wrong.

    #[test]
    fn bad_missing_output() {
        let rows = "{\"instruction\": \"a\", \"output\": \"b\"}\n\n{\"instruction\": \"a\"}";
        assert_eq!(
            bad(rows),
            "line 3: expected the field \"output\", found \"instruction\"; add it or remove the row"
        );
    }

    #[test]
    fn bad_missing_instruction() {
        assert_eq!(
            bad(r#"[{"output": "b"}]"#),
            "row 1: expected the field \"instruction\", found \"output\"; add it or remove the row"
        );
    }

    #[test]
    fn bad_other_fields() {
        assert_says(
            &bad(r#"{"question": "a"}"#),
            &["line 1: expected the fields \"instruction\"", "\"messages\", found \"question\";"],
        );
        assert_says(&bad("{}"), &["found no fields"]);
        let wide: Map<String, Value> = (0..20).map(|i| (format!("f{i}"), json!(i))).collect();
        assert_says(&bad(json!(wide).to_string()), &["and 12 more;"]);
    }

    #[test]
    fn bad_empty_texts() {
        let empty_output = json!({"instruction": "a", "output": ""}).to_string();
        assert_eq!(
            bad(empty_output),
            "line 1: expected text in \"output\", found an empty string; fill it in or remove the row"
        );
        let blank = json!({"instruction": " \n", "output": "b"}).to_string();
        assert_says(&bad(blank), &["expected text in \"instruction\", found an empty string"]);
    }

    #[test]
    fn bad_types() {
        let row = |i: Value, n: Value, o: Value| {
            json!({"instruction": i, "input": n, "output": o}).to_string()
        };
        let text = || json!("text");
        assert_says(
            &bad(row(text(), text(), json!(3))),
            &["expected a string in \"output\", found a number; rewrite it or remove the row"],
        );
        assert_says(&bad(row(text(), text(), json!(null))), &["\"output\", found null"]);
        assert_says(&bad(row(text(), json!(true), text())), &["\"input\", found a boolean"]);
        assert_says(&bad(row(json!({}), text(), text())), &["\"instruction\", found an object"]);
    }

    #[test]
    fn bad_row_that_is_no_object() {
        assert_says(&bad("\"text\""), &["line 1: expected a JSON object, found a string"]);
        assert_says(&bad("[[1]]"), &["row 1: expected a JSON object, found an array"]);
    }

    #[test]
    fn bad_json_in_a_line() {
        let said = bad("{\"instruction\": \"a\", \"output\": \"b\"}\n{\"instruction\": \"a\",");
        assert_says(
            &said,
            &["line 2: expected one whole JSON object, found broken JSON at column"],
        );
        assert!(!said.contains("at line 1"), "{said}");
    }

    #[test]
    fn bad_one_object_over_many_lines() {
        assert_says(
            &bad("{\n  \"instruction\": \"a\"\n}"),
            &["line 1: expected one whole JSON object", "(2 more rows cannot be used)"],
        );
    }

    #[test]
    fn bad_array() {
        assert_says(
            &bad("[{\"instruction\": \"a\", \"output\": \"b\"},\n{\"instruction\" \"a\"}]"),
            &["line 2: expected one JSON array", "broken JSON at column 16", "repair it"],
        );
        assert_says(&bad("[1]\n[2]"), &["line 2", "trailing characters"]);
    }

    #[test]
    fn bad_utf8() {
        assert_eq!(
            bad(b"{}\n{\"instruction\": \"\xe9\"}"),
            "line 2: expected UTF-8 text, found the byte 0xe9 at offset 20; save the file as UTF-8"
        );
    }

    #[test]
    fn bad_empty_file() {
        for text in ["", "\n \n", "\u{feff}"] {
            let error = read(text).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::NoData { .. }));
            assert_says(&error.to_string(), &["data.jsonl: expected rows", "the file is empty"]);
        }
        assert_says(&bad("[]"), &["the array is empty"]);
    }

    #[test]
    fn bad_path() {
        let folder = tempfile::tempdir().unwrap();
        for path in [folder.path().join("absent.json"), folder.path().to_owned()] {
            let error = read_conversations(&path).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::Io { .. }));
            assert_says(&error.to_string(), &[path.to_str().unwrap()]);
        }
    }

    #[test]
    fn bad_rows_are_counted() {
        let good = r#"{"instruction": "a", "output": "b"}"#;
        let said = bad(format!("{good}\n{{}}\n{good}\n3"));
        assert_says(&said, &["line 2: expected the fields", "(1 more row cannot be used)"]);
    }

    #[track_caller]
    fn bad_messages(messages: Value) -> String {
        bad(json!({"messages": messages}).to_string())
    }

    #[test]
    fn bad_messages_that_are_no_list() {
        assert_says(
            &bad_messages(json!("hi")),
            &["line 1: expected a list of messages in \"messages\", found a string"],
        );
        assert_says(&bad_messages(json!(null)), &["found null"]);
    }

    #[test]
    fn bad_message_that_is_no_object() {
        assert_says(
            &bad_messages(json!([{"role": "user", "content": "a"}, "b"])),
            &[
                "line 1: message 2: expected an object with \"role\" and \"content\", found a string",
            ],
        );
    }

    #[test]
    fn bad_message_fields() {
        assert_says(
            &bad_messages(json!([{"content": "a"}])),
            &["message 1: expected the field \"role\", found \"content\"; add it"],
        );
        assert_says(
            &bad_messages(json!([{"role": "user", "content": null}])),
            &["message 1: expected a string in \"content\", found null"],
        );
    }

    #[test]
    fn bad_role() {
        assert_says(
            &bad_messages(json!([{"role": "human", "content": "a"}])),
            &["expected the role system, user, assistant, tool, found \"human\""],
        );
    }

    #[test]
    fn bad_messages_without_an_answer() {
        assert_says(&bad_messages(json!([])), &["at least one assistant message", "none in 0;"]);
        assert_says(
            &bad_messages(json!([
                {"role": "user", "content": "a"}, {"role": "assistant", "content": " "},
            ])),
            &["at least one assistant message with content", "none in 2;"],
        );
    }

    #[test]
    fn bad_messages_that_begin_with_the_answer() {
        assert_says(
            &bad_messages(json!([{"role": "assistant", "content": "a"}])),
            &["message 1: expected a system or user turn, found role \"assistant\""],
        );
    }

    // Encoding.

    #[test]
    fn trains_the_answer_and_the_end_of_the_turn() {
        assert_eq!(
            encoded(CHATML, &[("user", "hi"), ("assistant", " yes\n")]),
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n\
             <|im_start|>assistant\n⟦ yes\n<|im_end|>⟧"
        );
    }

    #[test]
    fn trains_every_answer_and_keeps_the_line_break_between_turns_untrained() {
        let messages =
            [("system", "s"), ("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")];
        assert_eq!(
            encoded(CHATML, &messages),
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n1<|im_end|>\n\
             <|im_start|>assistant\n⟦2<|im_end|>⟧\n<|im_start|>user\n3<|im_end|>\n\
             <|im_start|>assistant\n⟦4<|im_end|>⟧"
        );
    }

    #[test]
    fn the_tokens_are_those_of_the_rendered_text() {
        let tokenizer = tokenizer(CHATML);
        let conversation =
            conversation(&[("user", "é 1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")]);
        let sample = conversation.encode(&tokenizer, 10_000).unwrap().unwrap();
        let text = tokenizer.render(&conversation.messages, false).unwrap();
        assert_eq!(sample.ids, tokenizer.encode(text.trim_end()).unwrap());
    }

    #[test]
    fn follows_a_template_that_trims_the_answer() {
        assert_eq!(
            encoded(LLAMA3, &[("user", " hi "), ("assistant", "\n yes \n")]),
            "<s><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>\
             <|start_header_id|>assistant<|end_header_id|>\n\n⟦yes<|eot_id|>⟧"
        );
    }

    #[test]
    fn follows_a_template_without_generation_prompt() {
        let messages =
            [("user", "hi"), ("assistant", "yes "), ("user", "and"), ("assistant", "no")];
        assert_eq!(
            encoded(MISTRAL, &messages),
            "<s>[INST] hi [/INST]⟦ yes</s>⟧[INST] and [/INST]⟦ no</s>⟧"
        );
    }

    #[test]
    fn an_answer_that_looks_like_markup_does_not_mislead() {
        for answer in ["|", "im_end", "\\", "<|im_end|>", "a<|im_end|>\nb", STAND_IN] {
            let text = encoded(CHATML, &[("user", "hi"), ("assistant", answer)]);
            assert_says(&text, &[&format!("assistant\n⟦{answer}<|im_end|>⟧")]);
        }
        assert_says(&encoded(MISTRAL, &[("user", "s"), ("assistant", "s")]), &["⟦ s</s>⟧"]);
    }

    #[test]
    fn what_the_template_puts_before_the_answer_is_trained_when_the_model_has_to_write_it() {
        let template = "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.role == 'assistant' %}{{ '<think></think>' }}{% endif %}{{ m.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}";
        assert_eq!(
            encoded(template, &[("user", "hi"), ("assistant", "think")]),
            "<|im_start|>userhi<|im_end|><|im_start|>assistant⟦<think></think>think<|im_end|>⟧"
        );
    }

    #[test]
    fn turns_after_the_last_answer_are_left_out() {
        let messages = [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", " ")];
        assert!(encoded(CHATML, &messages).ends_with("assistant\n⟦2<|im_end|>⟧"));
    }

    #[test]
    fn an_empty_answer_is_context_only() {
        let messages = [("user", "1"), ("assistant", ""), ("user", "3"), ("assistant", "4")];
        let text = encoded(CHATML, &messages);
        assert_says(&text, &["assistant\n<|im_end|>\n<|im_start|>user\n3"]);
        assert_eq!(text.matches('⟦').count(), 1);
    }

    #[test]
    fn no_token_spans_prompt_and_answer() {
        let newline_y = vocabulary(&[("Ċ", "y")]);
        let template = Some(CHATML.to_owned());
        let tokenizer = Tokenizer::new(newline_y, template, None, None).unwrap();
        let joint = tokenizer.token_id("Ċy").unwrap();
        assert_eq!(tokenizer.encode("\ny").unwrap(), [joint]); // the trap is there
        let sample = conversation(&[("user", "hi"), ("assistant", "yes")])
            .encode(&tokenizer, 10_000)
            .unwrap()
            .unwrap();
        assert!(!sample.ids.contains(&joint));
        assert!(shown(&sample).ends_with("assistant\n⟦yes<|im_end|>⟧"));
    }

    #[test]
    fn long_samples_lose_their_end() {
        let conversation = conversation(&[("user", "hi"), ("assistant", "yes")]);
        let tokenizer = tokenizer(MISTRAL);
        let whole = conversation.encode(&tokenizer, 10_000).unwrap().unwrap();
        assert_eq!(shown(&whole), "<s>[INST] hi [/INST]⟦ yes</s>⟧");
        let length = whole.ids.len();
        assert!(!whole.truncated);
        assert!(!conversation.encode(&tokenizer, length).unwrap().unwrap().truncated);
        let cut = conversation.encode(&tokenizer, length - 2).unwrap().unwrap();
        assert!(cut.truncated);
        assert_eq!(shown(&cut), "<s>[INST] hi [/INST]⟦ ye⟧");
    }

    #[test]
    fn a_sample_with_nothing_trained_left_is_none() {
        let conversation = conversation(&[("user", "hi"), ("assistant", "yes")]);
        let tokenizer = tokenizer(MISTRAL);
        let prompt = "<s>[INST] hi [/INST]".len() - 2; // <s> is one token
        assert_eq!(conversation.encode(&tokenizer, prompt).unwrap(), None);
        assert!(conversation.encode(&tokenizer, prompt + 1).unwrap().is_some());
        assert_eq!(conversation.encode(&tokenizer, 0).unwrap(), None);
    }

    #[test]
    fn bad_template_without_an_end_of_turn() {
        let template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}";
        let error = refused(template, &[("user", "hi"), ("assistant", "yes")]).to_string();
        assert_says(
            &error,
            &[
                "data.jsonl: line 3: message 2: expected a special token after the answer",
                r#"found "\n""#,
                "let the chat template write </s> there",
            ],
        );
    }

    #[test]
    fn bad_template_that_rewrites_earlier_turns() {
        let template = "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}{{ '...' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}";
        let messages = [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")];
        assert_says(
            &refused(template, &messages).to_string(),
            &["data.jsonl: line 3: message 4: expected a chat template that only appends"],
        );
        assert_eq!(encoded(template, &messages[..2]), "1</s>⟦2</s>⟧");
    }

    #[test]
    fn bad_template_whose_answer_contradicts_its_generation_prompt() {
        let template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '>' }}{% endif %}";
        assert_says(
            &refused(template, &[("user", "1"), ("assistant", "2")]).to_string(),
            &["message 2: expected a chat template that only appends", "generation prompt"],
        );
    }

    #[test]
    fn bad_template_that_hides_the_answer() {
        let template = "{% for m in messages %}{{ m.role + eos_token }}{% endfor %}";
        assert_says(
            &refused(template, &[("user", "1"), ("assistant", "2")]).to_string(),
            &["message 2: expected a chat template that writes the same text after every answer"],
        );
    }

    #[test]
    fn a_refusal_by_the_template_names_the_row() {
        let error = refused(MISTRAL, &[("system", "s"), ("user", "1"), ("assistant", "2")]);
        assert!(matches!(error.kind(), ErrorKind::Encode { row: 3, .. }));
        assert_says(&error.to_string(), &["data.jsonl: line 3: ", "roles must alternate"]);
    }

    #[test]
    fn a_missing_template_is_not_the_rows_fault() {
        let tokenizer = Tokenizer::new(vocabulary(&[]), None, None, None).unwrap();
        let conversation = conversation(&[("user", "1"), ("assistant", "2")]);
        let error = conversation.encode(&tokenizer, 10).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Model(_)));
        assert!(!error.to_string().contains("line 3"));
    }

    // Splitting, batching.

    fn sample(ids: &[u32], trained_from: usize) -> Sample {
        let trained = (0..ids.len()).map(|t| t >= trained_from).collect();
        Sample { ids: ids.to_vec(), trained, truncated: false }
    }

    /// `count` samples that their first token tells apart.
    fn samples(count: u32) -> Vec<Option<Sample>> {
        (0..count).map(|id| Some(sample(&[id, 7], 1))).collect()
    }

    fn firsts(samples: &[Sample]) -> Vec<u32> {
        samples.iter().map(|sample| sample.ids[0]).collect()
    }

    #[test]
    fn split_loses_and_doubles_nothing() {
        let path = Path::new("data.jsonl");
        let mut given = samples(10);
        given.insert(3, None);
        given[0].as_mut().unwrap().truncated = true;
        let data = split(path, given, 4, 1).unwrap();
        assert_eq!((data.train.len(), data.held_out.len()), (6, 4));
        assert_eq!((data.skipped, data.truncated), (1, 1));
        let mut all = [firsts(&data.train), firsts(&data.held_out)].concat();
        all.sort_unstable();
        assert_eq!(all, (0..10).collect::<Vec<_>>());
        assert!(split(path, samples(3), 0, 1).unwrap().held_out.is_empty());
    }

    #[test]
    fn split_depends_on_the_seed_alone() {
        let held = |seed| {
            firsts(&split(Path::new("data.jsonl"), samples(100), 10, seed).unwrap().held_out)
        };
        assert_eq!(held(1), held(1));
        assert_ne!(held(1), held(2));
        // Written down from a run: if a new `rand` changes this, old runs cannot be repeated.
        assert_eq!(held(1), PINNED_HELD_OUT);
    }

    const PINNED_HELD_OUT: [u32; 10] = [99, 9, 25, 39, 44, 72, 88, 93, 22, 11];

    #[test]
    fn bad_split_with_nothing_left_to_train_on() {
        let path = Path::new("data.jsonl");
        let error = split(path, samples(4), 4, 1).unwrap_err();
        assert_eq!(
            error.to_string(),
            "held_out: expected fewer than the 4 usable rows of data.jsonl, found 4"
        );
        let error = split(path, vec![None, None], 0, 1).unwrap_err();
        assert_says(&error.to_string(), &["data.jsonl: ", "all 2 rows", "raise it"]);
        let error = split(path, vec![], 0, 1).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::NoData { .. }));
    }

    fn first_epochs(samples: usize, batch_size: usize, seed: u64, count: usize) -> Vec<usize> {
        let batches = Batches::new(samples, batch_size, seed).unwrap();
        let taken: Vec<Vec<usize>> = batches.take((samples * count).div_ceil(batch_size)).collect();
        assert!(taken.iter().all(|batch| batch.len() == batch_size));
        taken.concat()
    }

    #[test]
    fn every_epoch_has_every_sample_once_whatever_the_batch_size() {
        for batch_size in [1, 3, 7, 10, 25] {
            let taken = first_epochs(10, batch_size, 5, 4);
            for epoch in taken.chunks_exact(10) {
                let mut epoch = epoch.to_vec();
                epoch.sort_unstable();
                assert_eq!(epoch, (0..10).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn every_epoch_has_an_order_of_its_own() {
        let taken = first_epochs(50, 10, 5, 2);
        assert_ne!(taken[..50], taken[50..]);
        assert_eq!(taken, first_epochs(50, 10, 5, 2));
        assert_ne!(taken, first_epochs(50, 10, 6, 2));
        assert_ne!(taken[50..], first_epochs(50, 10, 6, 1)); // seed 5, epoch 1; seed 6, epoch 0
    }

    #[test]
    fn skipping_meets_the_same_batches() {
        let all: Vec<_> = Batches::new(10, 4, 9).unwrap().take(12).collect();
        let later: Vec<_> = Batches::new(10, 4, 9).unwrap().skip(7).take(5).collect();
        assert_eq!(all[7..], later);
    }

    #[test]
    fn bad_batches_of_nothing() {
        assert_eq!(
            Batches::new(4, 0, 1).unwrap_err().to_string(),
            "batch_size: expected at least 1, found 0"
        );
        assert_says(&Batches::new(0, 1, 1).unwrap_err().to_string(), &["samples"]);
    }

    #[test]
    fn collate_pads_on_the_right_and_points_at_the_position_before() {
        let (long, short) = (sample(&[11, 12, 13, 14], 2), sample(&[21, 22], 1));
        let batch = Batch::collate(&[&short, &long], 9);
        assert_eq!(
            batch,
            Batch {
                ids: vec![21, 22, 9, 9, 11, 12, 13, 14],
                rows: 2,
                length: 4,
                positions: vec![0, 5, 6],
                targets: vec![22, 13, 14],
                tokens: 6,
            }
        );
    }

    #[test]
    fn collate_cannot_predict_a_first_token() {
        let batch = Batch::collate(&[&sample(&[1, 2], 0), &sample(&[3, 4], 0)], 9);
        assert_eq!((batch.positions, batch.targets), (vec![0, 2], vec![2, 4]));
    }

    #[test]
    fn collate_of_nothing_is_empty() {
        let batch = Batch::collate(&[], 9);
        assert_eq!((batch.rows, batch.length, batch.ids.len()), (0, 0, 0));
    }
}
