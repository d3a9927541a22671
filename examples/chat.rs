//! Talk with a model in the terminal, with an adapter that a command puts on and takes off.
//!
//! `cargo run --release --example chat -- --model MODEL --adapter runs/2/adapter`

use std::io::{BufRead, IsTerminal, Write, stdin, stdout};
use std::process::ExitCode;
use std::time::Instant;

use burn_lora::{DeviceOption, Error, ModelOptions, Result, say};
use clap::Parser;
use lora_models::{
    Checkpoint, Decoder, GenerationConfig, KvCache, Message, Sampling, Tokenizer, WeightDtype,
};

/// Talk with a model.
///
/// What is typed is said to the model, but for the commands: /adapter on, /adapter off, /system TEXT,
/// /reset, /help and /exit. An empty line says nothing.
#[derive(Debug, Parser)]
#[command(allow_negative_numbers = true)]
struct Options {
    #[command(flatten)]
    model: ModelOptions,
    /// What the model is told about its task
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Longest answer, in tokens
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    max_new_tokens: usize,
    /// Draw each token from softmax(logits / NUMBER); 0 takes the most likely token always [default: as
    /// the model's makers recommend it, else 0]
    #[arg(long, value_name = "NUMBER")]
    temperature: Option<f64>,
    /// Seed of the draws
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    seed: u64,
    /// Type of the weights: f32, or bf16 or f16, which take half the memory and are read faster
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    dtype: WeightDtype,
    #[command(flatten)]
    device: DeviceOption,
}

fn main() -> ExitCode {
    burn_lora::run(|| chat(&Options::parse()))
}

fn chat(options: &Options) -> Result<()> {
    let device = options.device.open()?;
    let path = options.model.path()?;
    let checkpoint = Checkpoint::open(&path)?;
    if !checkpoint.tokenizer.has_chat_template() {
        let path = path.display();
        return Err(Error::user(format!(
            "{path}: expected a chat template, found none; choose a model that was trained to answer"
        )));
    }
    let mut sampling = GenerationConfig::read(&path)?.sampling().seed(options.seed);
    if let Some(temperature) = options.temperature {
        sampling = sampling.temperature(temperature);
    }
    sampling.check()?;

    let base = checkpoint.decoder_as(options.dtype, &device)?;
    // Both share the weights: a clone copies handles.
    let adapted = options.model.adapted(base.clone())?;
    let tokenizer = checkpoint.tokenizer.clone();
    burn_lora::tell_of_kernels(&device);
    let mut talk = Talk {
        on: adapted.is_some(),
        base,
        adapted,
        tokenizer,
        sampling,
        seed: options.seed,
        limit: options.max_new_tokens,
        system: options.system.clone(),
        messages: Vec::new(),
        cache: KvCache::new(),
        seen: Vec::new(),
    };
    if stdin().is_terminal() {
        say(format!("{}; /help lists the commands", talk.who()));
    }
    let mut unanswered = 0;
    loop {
        if stdin().is_terminal() {
            show("> ");
        }
        let mut line = Vec::new();
        let read = stdin().lock().read_until(b'\n', &mut line);
        if read.map_err(|error| Error::other(format!("standard input: {error}")))? == 0 {
            // The end of the input. Nobody may have looked at what a script was told.
            return match unanswered {
                1.. if !stdin().is_terminal() => {
                    Err(Error::other(format!("{unanswered} of the messages had no answer")))
                }
                _ => Ok(()),
            };
        }
        let Ok(line) = String::from_utf8(line) else {
            unanswered += 1;
            eprintln!("expected a line of UTF-8 text, found other bytes; type it again");
            continue;
        };
        match line.trim() {
            "" => {}
            "/exit" | "/quit" => return Ok(()),
            command if command.starts_with('/') => say(talk.obey(command)),
            said => {
                if let Err(error) = talk.answer(said) {
                    unanswered += 1;
                    talk.messages.pop(); // what was said is not part of the conversation
                    talk.forget_cache(); // it may have seen a part of the answer
                    eprintln!("{}; /reset begins a new conversation", error);
                }
            }
        }
    }
}

fn show(text: &str) {
    // A closed pipe is no reason to stop.
    let _ = write!(stdout(), "{text}").and_then(|()| stdout().flush());
}

/// A conversation, and who leads it.
struct Talk {
    base: Decoder,
    adapted: Option<Decoder>,
    on: bool,
    tokenizer: Tokenizer,
    sampling: Sampling,
    seed: u64,
    limit: usize,
    system: Option<String>,
    messages: Vec<Message>,
    cache: KvCache,
    /// The tokens that the cache has seen.
    seen: Vec<u32>,
}

impl Talk {
    fn who(&self) -> &'static str {
        match (&self.adapted, self.on) {
            (None, _) => "the model as it is",
            (Some(_), true) => "the model with its adapter",
            (Some(_), false) => "the model without its adapter",
        }
    }

    fn obey(&mut self, command: &str) -> String {
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        match (name, rest.trim()) {
            ("/adapter", "on" | "off") if self.adapted.is_none() => {
                "there is no adapter; start with --adapter FOLDER".to_owned()
            }
            ("/adapter", "on") => self.switch(true),
            ("/adapter", "off") => self.switch(false),
            ("/system", text) => {
                self.system = (!text.is_empty()).then(|| text.to_owned());
                self.forget();
                match text {
                    "" => "a new conversation, without a system message".to_owned(),
                    _ => "a new conversation, with this system message".to_owned(),
                }
            }
            ("/reset", "") => {
                self.forget();
                "a new conversation".to_owned()
            }
            ("/help", _) => "/adapter on, /adapter off, /system TEXT, /reset, /exit".to_owned(),
            _ => format!("'{command}' is no command; /help lists them"),
        }
    }

    /// The conversation goes on; what the other saw of it has to be computed anew.
    fn switch(&mut self, on: bool) -> String {
        if self.on != on {
            self.on = on;
            self.forget_cache();
        }
        self.who().to_owned()
    }

    fn forget(&mut self) {
        self.messages.clear();
        self.forget_cache();
    }

    fn forget_cache(&mut self) {
        self.seen.clear();
        self.cache = KvCache::new();
    }

    fn answer(&mut self, said: &str) -> Result<()> {
        self.messages.push(Message::user(said));
        let system = self.system.iter().map(Message::system);
        let messages: Vec<Message> = system.chain(self.messages.iter().cloned()).collect();
        let prompt = self.tokenizer.encode(&self.tokenizer.render(&messages, true)?)?;

        // What the template renders as before is not computed again.
        let same = self.seen.iter().zip(&prompt).take_while(|(a, b)| a == b).count();
        self.cache.truncate(same.min(prompt.len().saturating_sub(1)));
        let computed = prompt.len() - self.cache.seen();

        let model = self.adapted.as_ref().filter(|_| self.on).unwrap_or(&self.base);
        let start = Instant::now();
        let mut stream = self.tokenizer.stream()?;
        let mut text = String::new();
        let turn = self.messages.len() as u64;
        let sampling = self.sampling.seed(self.seed.wrapping_add(turn));
        let mut tokens = model.continuation(&prompt, sampling, &mut self.cache)?;
        let (mut written, mut first) = (0, None);
        for id in tokens.by_ref().take(self.limit) {
            let piece = stream.push(id?)?;
            first.get_or_insert_with(|| start.elapsed().as_secs_f64());
            written += 1;
            show(&piece);
            text += &piece;
        }
        let rest = stream.finish()?;
        say(&rest);
        text += &rest;
        let longest = model.config().longest_text();
        if tokens.tokens().len() >= longest {
            eprintln!(
                "[cut: the conversation has {longest} tokens, as many as the model can see; /reset \
                 begins a new one]"
            );
        }
        self.seen = tokens.tokens().to_vec();
        self.seen.truncate(self.cache.seen());
        if stdin().is_terminal() {
            let first = first.unwrap_or_default();
            let rate = (written as f64 - 1.0).max(0.0) / (start.elapsed().as_secs_f64() - first);
            let rate = if rate.is_finite() { rate } else { 0.0 };
            eprintln!(
                "[{computed} tokens read in {first:.2} s, {written} written at {rate:.1} tokens/s]"
            );
        }
        self.messages.push(Message::assistant(text));
        Ok(())
    }
}
