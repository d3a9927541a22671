//! The main job: fine-tune a language model with LoRA.
//!
//! `cargo run --release --example finetune` adapts the repository's own small model; with
//! `--model MODEL --data FILE` it does the same to a real one. `--help` lists the options.

mod recipe;

use std::io::{IsTerminal, stderr};
use std::path::PathBuf;
use std::process::ExitCode;

use burn::module::Module;
use burn_lora::{Error, Result, say};
use indicatif::{ProgressBar, ProgressStyle};
use lora_core::{AdapterInfo, ParameterCount, inject};
use lora_models::{Checkpoint, Decoder, Message, Sampling, Tokenizer, WeightDtype};
use lora_train::{
    Conversation, RunFolder, Sample, StepReport, evaluate, read_conversations, split, train,
};
use recipe::Recipe;

fn main() -> ExitCode {
    burn_lora::run(|| finetune(&Recipe::from_command_line()?))
}

fn finetune(recipe: &Recipe) -> Result<()> {
    let [model_path, data_path, output] =
        [("model", &recipe.model), ("data", &recipe.data), ("output", &recipe.output)]
            .map(required);
    let (model_path, data_path, output) = (model_path?, data_path?, output?);
    RunFolder::check_free(&output)?;
    let training = recipe.training();
    let settings = recipe.to_toml()?;

    // The data and the model, which may have to be fetched.
    let device = burn_lora::open_device(recipe.device.as_deref())?.autodiff();
    let conversations = read_conversations(&data_path)?;
    let checkpoint = Checkpoint::open(burn_lora::model_path(&model_path)?)?;
    let tokenizer = &checkpoint.tokenizer;
    let max_len = recipe.max_len.unwrap_or_default().min(checkpoint.config.max_position_embeddings);
    let samples = conversations
        .iter()
        .map(|conversation| conversation.encode(tokenizer, max_len))
        .collect::<lora_train::Result<Vec<_>>>()?;
    warn_of_endless_answers(&samples, &checkpoint);
    let data = split(&data_path, samples, recipe.held_out.unwrap_or_default(), training.seed)?;
    training.check(data.train.len())?;
    let mut run = RunFolder::create(&output, &settings)?;
    let decoder = checkpoint.decoder_as(recipe.dtype.unwrap_or(WeightDtype::F32), &device)?;
    say(format!(
        "model      {}: Llama, {} blocks, {} wide, {} parameters",
        model_path.display(),
        checkpoint.config.num_hidden_layers,
        checkpoint.config.hidden_size,
        ParameterCount::of(&decoder).total,
    ));
    say(format!(
        "data       {}: {} rows to train on, {} held out, {} cut to {max_len} tokens, {} skipped",
        data_path.display(),
        data.train.len(),
        data.held_out.len(),
        data.truncated,
        data.skipped,
    ));

    // The adapters.
    let (decoder, report) = inject(decoder, &recipe.lora()?)?;
    say(format!("\n{report}\n"));
    burn_lora::tell_of_kernels(&device);

    // Before.
    let prompt = match &recipe.prompt {
        Some(prompt) => prompt.clone(),
        None => first_question(&conversations[*data.held_out_rows.first().unwrap_or(&0)]),
    };
    let answer_before = answer(&decoder, tokenizer, &prompt)?;
    let before = evaluate_held_out(&decoder, &data.held_out, training.batch)?;

    // The steps.
    if let Some(loss) = before {
        run.start(loss, &data.held_out_rows)?;
    }
    let progress = Progress::new(training.steps);
    let mut last = None;
    let mut speed = Speed::default();
    let decoder = train(decoder, &data, &training, |step| {
        speed.add(step);
        progress.show(step, speed);
        last = step.held_out_loss.or(last);
        run.step(step)
    })?;
    progress.finish();

    // After.
    say(format!("trained    {} steps, {:.0} tokens/s", training.steps, speed.tokens_per_second()));
    if let (Some(before), Some(after)) = (before, last) {
        say(format!("held-out   loss {before:.4} before, {after:.4} after (nats per token)"));
    }
    say(format!("\nprompt     {prompt}"));
    say(format!("before     {answer_before}"));
    say(format!("after      {}\n", answer(&decoder, tokenizer, &prompt)?));
    let info = AdapterInfo {
        base_model: Some(burn_lora::base_model(&model_path)),
        task_type: Some("CAUSAL_LM".to_owned()),
    };
    let title = format!("{} on {}", name_of(&model_path), name_of(&data_path));
    run.finish(&decoder, &info, &title)?;
    say(format!(
        "written    {}: adapter/, settings.toml, metrics.jsonl, loss.png",
        output.display()
    ));
    Ok(())
}

fn required((name, value): (&str, &Option<PathBuf>)) -> Result<PathBuf> {
    value
        .clone()
        .ok_or_else(|| Error::user(format!("--{name}: expected a path, found none; see --help")))
}

fn first_question(conversation: &Conversation) -> String {
    let user = conversation.messages.iter().find(|message| message.role == "user");
    user.and_then(|message| message.content.as_str()).unwrap_or_default().to_owned()
}

/// The token that the rows teach the model to end a turn with must be one that ends its text.
fn warn_of_endless_answers(samples: &[Option<Sample>], checkpoint: &Checkpoint) {
    let whole = samples.iter().flatten().find(|sample| !sample.truncated);
    let ends = &checkpoint.config.eos_token_ids;
    if let Some(end) = whole.and_then(|sample| sample.ids.last()).filter(|end| !ends.contains(end))
    {
        eprintln!(
            "warning: {}: the chat template ends an answer with token {end}, but the model's text ends at \
             {ends:?}; answers will run on until eos_token_id in config.json lists it",
            checkpoint.path().display()
        );
    }
}

fn name_of(path: &std::path::Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

fn evaluate_held_out(decoder: &Decoder, held_out: &[Sample], batch: usize) -> Result<Option<f64>> {
    match held_out {
        [] => Ok(None),
        samples => Ok(Some(evaluate(&decoder.valid(), samples, batch)?)),
    }
}

/// The model's own answer to a question, at most 64 tokens of it, most likely tokens first.
fn answer(decoder: &Decoder, tokenizer: &Tokenizer, question: &str) -> Result<String> {
    let prompt = tokenizer.encode(&tokenizer.render(&[Message::user(question)], true)?)?;
    let ids = decoder.generate(&prompt, 64, Sampling::greedy(), |_| {})?;
    Ok(tokenizer.decode(&ids)?.trim().replace('\n', "\n           "))
}

/// Tokens and time since the start.
#[derive(Debug, Clone, Copy, Default)]
struct Speed {
    tokens: usize,
    seconds: f64,
}

impl Speed {
    fn add(&mut self, step: &StepReport) {
        self.tokens += step.tokens;
        self.seconds += step.seconds;
    }

    fn tokens_per_second(self) -> f64 {
        self.tokens as f64 / self.seconds
    }
}

/// A bar on a terminal, a line now and then in a log.
struct Progress {
    bar: ProgressBar,
    every: u64,
}

impl Progress {
    fn new(steps: usize) -> Self {
        let bar = ProgressBar::new(steps as u64);
        let style = ProgressStyle::with_template("{bar:32} {pos}/{len}  {msg}  {eta} left");
        bar.set_style(style.expect("the template is well-formed"));
        Self { bar, every: (steps as u64 / 10).max(1) }
    }

    fn show(&self, step: &StepReport, speed: Speed) {
        let message = format!(
            "loss {:.4}  lr {:.2e}  {:.0} tokens/s",
            step.loss,
            step.learning_rate,
            speed.tokens_per_second()
        );
        if !stderr().is_terminal() && (step.step as u64).is_multiple_of(self.every) {
            eprintln!("step {}/{}  {message}", step.step, self.bar.length().unwrap_or_default());
        }
        self.bar.set_message(message);
        self.bar.inc(1);
    }

    fn finish(&self) {
        self.bar.finish();
    }
}
