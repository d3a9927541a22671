//! The programs that are measured, and their turns.

use std::path::Path;
use std::process::Command;

use burn::module::Param;
use burn::tensor::DType;
use lora_core::{
    AdapterInfo, Init, LoraConfig, VisitLora, device_from_env, device_name_from_env, inject,
    save_adapter, supports_dtype,
};
use lora_models::{Decoder, RandomWeights, WeightDtype, open_weights, save_folder};

use crate::worker::numbers;
use crate::workload::{ALPHA, Job, Measured, RANK, SHAPES, Shape};
use crate::{Answer, Options};

/// Keeps glibc from holding what was freed, for a fair peak of memory.
const FAIR: (&str, &str) = ("MALLOC_MMAP_THRESHOLD_", "131072");

/// Who does a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    Here,
    Peer,
}

/// One line of a table.
#[derive(Debug)]
pub struct Line {
    pub name: String,
    pub program: Program,
    pub job: Job,
    pub measured: Measured,
    /// Largest resident memory of a run that gives freed memory back at once.
    pub fair_peak: f64,
}

impl Line {
    fn new(program: Program, name: &str, job: Job) -> Self {
        let name = match program {
            Program::Here => format!("here, {name}"),
            Program::Peer => format!("PEFT, {name}"),
        };
        Self { name, program, job, measured: Measured::default(), fair_peak: f64::NAN }
    }
}

/// Lines that are compared.
#[derive(Debug)]
pub struct Group {
    pub name: &'static str,
    pub what: String,
    /// Tokens of a step, for speeds.
    pub tokens: usize,
    pub lines: Vec<Line>,
}

/// Measures what is asked for.
pub fn measure(options: &Options) -> Answer<Vec<Group>> {
    if let Some(python) = &options.python {
        if peer_device().is_none() {
            let name = device_name_from_env();
            return Err(format!(
                "LORA_DEVICE: expected the processor or CUDA beside --python, where PEFT can compute too, found '{name}'"
            )
            .into());
        }
        let found = Command::new(python).args(["-c", "import peft"]).output();
        let problem = match &found {
            Ok(output) if output.status.success() => None,
            Ok(output) => Some(last_line(&output.stderr)),
            Err(error) => Some(error.to_string()),
        };
        if let Some(problem) = problem {
            let python = python.display();
            return Err(format!(
                "--python {python}: expected a Python with PEFT, as scripts/peers_env.sh makes it: {problem}"
            )
            .into());
        }
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/yardstick");
    let names = options.only.split(',').map(str::trim);
    let mut groups = names.map(|name| group(name, &folder)).collect::<Answer<Vec<_>>>()?;
    let has_bf16 = supports_dtype(&device_from_env()?, DType::BF16);
    for group in &mut groups {
        group.lines.retain(|line| match line.program {
            Program::Here => has_bf16 || !line.name.contains("bf16"),
            Program::Peer => options.python.is_some(),
        });
        take_turns(group, options)?;
    }
    Ok(groups)
}

fn take_turns(group: &mut Group, options: &Options) -> Answer<()> {
    for round in 1..=options.rounds {
        // Back and forth, since whoever comes first reads files that nobody has read yet.
        let mut lines: Vec<_> = group.lines.iter_mut().collect();
        if round % 2 == 0 {
            lines.reverse();
        }
        for line in lines {
            eprintln!("{}: {}, round {round} of {}", group.name, line.name, options.rounds);
            let measured = run(line, &line.job, options.python.as_deref(), false)?;
            check_repeated(line, &measured)?;
            add(&mut line.measured, measured);
        }
    }
    for line in &mut group.lines {
        eprintln!("{}: {}, memory", group.name, line.name);
        let mut job = line.job.clone();
        if let Job::Train { steps, .. } = &mut job {
            *steps = 1;
        }
        let measured = run(line, &job, options.python.as_deref(), true)?;
        line.fair_peak = measured.peak_bytes;
    }
    Ok(())
}

fn add(all: &mut Measured, one: Measured) {
    all.forward.extend(one.forward);
    all.backward.extend(one.backward);
    all.optimizer.extend(one.optimizer);
    all.seconds.extend(one.seconds);
    all.first_seconds.extend(one.first_seconds);
    all.prompt_seconds.extend(one.prompt_seconds);
    all.peak_bytes = all.peak_bytes.max(one.peak_bytes);
    (all.losses, all.tokens) = (one.losses, one.tokens);
    (all.versions, all.start_bytes) = (one.versions, one.start_bytes);
}

/// A program computes the same in every round.
fn check_repeated(line: &Line, now: &Measured) -> Answer<()> {
    if !line.measured.tokens.is_empty() && line.measured.tokens != now.tokens {
        return Err(format!("{}: wrote other tokens in this round", line.name).into());
    }
    let before = &line.measured.losses;
    if !before.is_empty() && (apart(&now.losses, before) > 1e-5 || now.losses.len() != before.len())
    {
        let name = &line.name;
        return Err(format!(
            "{name}: the losses of this round, {:?}, were {before:?} before",
            now.losses
        )
        .into());
    }
    Ok(())
}

fn last_line(text: &[u8]) -> String {
    String::from_utf8_lossy(text).lines().last().unwrap_or("it said nothing").to_owned()
}

fn run(line: &Line, job: &Job, python: Option<&Path>, fair: bool) -> Answer<Measured> {
    let text = serde_json::to_string(job)?;
    let mut command = match (line.program, python) {
        (Program::Here, _) => {
            let mut command = Command::new(std::env::current_exe()?);
            command.arg("--job");
            command
        }
        (Program::Peer, Some(python)) => {
            let mut command = Command::new(python);
            command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/yardstick/peer.py"));
            command
        }
        (Program::Peer, None) => return Err("no Python for a peer".into()),
    };
    let threads = std::thread::available_parallelism()?.to_string();
    command.env("RAYON_NUM_THREADS", &threads).env("OMP_NUM_THREADS", &threads);
    // Where it is not set, a peer does not know this build's own.
    command.env("LORA_DEVICE", device_name_from_env());
    if fair {
        command.env(FAIR.0, FAIR.1);
    }
    let output = command.arg(text).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.lines().last().map(serde_json::from_str) {
        Some(Ok(measured)) if output.status.success() => Ok(measured),
        _ => {
            let last = last_line(&output.stderr);
            Err(format!("{}: did not do its job ({}): {last}", line.name, output.status).into())
        }
    }
}

fn group(name: &str, folder: &Path) -> Answer<Group> {
    use Program::{Here, Peer};

    if let Some(shape) = Shape::named(name) {
        let Files { model, adapter, .. } = files(&shape, folder)?;
        let job = |dtype: &str, medium, checkpointing| Job::Train {
            model: model.clone(),
            adapter: adapter.clone(),
            rows: shape.rows,
            length: shape.length,
            steps: shape.steps,
            dtype: dtype.to_owned(),
            medium,
            checkpointing,
        };
        let mut lines = vec![
            Line::new(Here, "f32", job("f32", false, false)),
            Line::new(Peer, "f32", job("f32", false, false)),
            Line::new(Peer, "f32 \"medium\"", job("f32", true, false)),
            Line::new(Peer, "f32, checkpointing", job("f32", false, true)),
            Line::new(Here, "bf16", job("bf16", false, false)),
        ];
        if peer_trains_in_bf16() {
            lines.push(Line::new(Peer, "bf16", job("bf16", false, false)));
        }
        let (rows, length) = (shape.rows, shape.length);
        let what = format!("{}: {}, batch {rows} x {length}", shape.name, shape.what);
        return Ok(Group { name: shape.name, what, tokens: shape.tokens(), lines });
    }
    let made = |name: &str| files(&Shape::named(name).unwrap_or(SHAPES[1]), folder);
    let (name, what, tokens, lines) = match name {
        "linear" => {
            let job = |layer: &str| Job::Linear {
                layer: layer.to_owned(),
                d: 2048,
                rows: 512,
                rank: 16,
                rounds: 15,
            };
            let lines = vec![
                Line::new(Here, "frozen", job("frozen")),
                Line::new(Here, "LoraLinear", job("lora")),
                Line::new(Here, "Burn's apply_lora", job("burn")),
                Line::new(Peer, "torch's frozen", job("frozen")),
                Line::new(Peer, "adapted", job("lora")),
            ];
            (
                "linear",
                "One linear layer, 2048 to 2048, rank 16, 512 rows, f32".to_owned(),
                512,
                lines,
            )
        }
        "decode" => {
            let Files { model, trained: adapter, .. } = made("M")?;
            let job = |dtype: &str, merged| Job::Decode {
                model: model.clone(),
                adapter: adapter.clone(),
                merged,
                dtype: dtype.to_owned(),
                prompt: 256,
                written: 64,
            };
            let mut lines = Vec::new();
            for dtype in ["f32", "bf16"] {
                for (name, merged) in [("adapter", false), ("merged", true)] {
                    for program in [Here, Peer] {
                        let name = format!("{dtype}, {name}");
                        lines.push(Line::new(program, &name, job(dtype, merged)));
                    }
                }
            }
            ("decode", "Writing with M, 64 tokens after a prompt of 256".to_owned(), 64, lines)
        }
        "load" => {
            let Files { model, .. } = made("L")?;
            let job = |dtype: &str| Job::Load {
                model: model.clone(),
                dtype: dtype.to_owned(),
                rounds: 3,
            };
            let lines = ["f32", "bf16"]
                .into_iter()
                .flat_map(|dtype| [Here, Peer].map(|program| Line::new(program, dtype, job(dtype))))
                .collect();
            ("load", "Loading L from a bf16 safetensors file".to_owned(), 1, lines)
        }
        "merge" => {
            let Files { model, trained: adapter, .. } = made("M")?;
            let job = || Job::Merge { model: model.clone(), adapter: adapter.clone(), rounds: 3 };
            let lines = [Here, Peer].map(|program| Line::new(program, "f32", job())).into();
            ("merge", "Merging an adapter of rank 8 into M".to_owned(), 1, lines)
        }
        other => {
            return Err(format!(
                "--only: expected S, M, L, linear, decode, load or merge, found '{other}'"
            )
            .into());
        }
    };
    Ok(Group { name, what, tokens, lines })
}

/// What the peer computes on, where it has what LORA_DEVICE names.
fn peer_device() -> Option<&'static str> {
    let name = device_name_from_env();
    match name.strip_prefix("tch:").unwrap_or(&name) {
        "flex" | "ndarray" | "tch" | "cpu" => Some("cpu"),
        name if name.starts_with("cuda") => Some("cuda"),
        _ => None,
    }
}

/// Whether torch has fast products in bf16. Without them, on a processor, a step of training takes it tens of times as
/// long as in f32.
pub fn peer_trains_in_bf16() -> bool {
    if peer_device() != Some("cpu") {
        return true;
    }
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    // On ARM it is called bf16 alone.
    cpu.split_whitespace().any(|flag| ["avx512_bf16", "amx_bf16", "bf16"].contains(&flag))
}

/// A shape's folders.
struct Files {
    model: String,
    /// As training begins: B is zero.
    adapter: String,
    /// With another B, so that whoever leaves it out computes something else.
    trained: String,
}

/// A shape's model and adapters as files, made once.
fn files(shape: &Shape, folder: &Path) -> Answer<Files> {
    let folder = folder.join(shape.name);
    let path = |name: &str| folder.join(name);
    let (what, described) = (format!("{shape:?}, rank {RANK}, alpha {ALPHA}\n"), path("made.txt"));
    if std::fs::read_to_string(&described).ok().as_ref() != Some(&what) {
        eprintln!("{}: making the model", shape.name);
        if folder.exists() {
            std::fs::remove_dir_all(&folder)?;
        }
        std::fs::create_dir_all(&folder)?;
        let config = shape.config(Path::new(env!("CARGO_MANIFEST_DIR")))?;
        let device = device_from_env()?;
        let weights = RandomWeights::new(&config, 1)?;
        let decoder = Decoder::from_weights_as(&config, &weights, WeightDtype::F32, &device)?;
        save_folder(&decoder, path("model"), WeightDtype::BF16, &[])?;
        let weights = open_weights(path("model"))?; // rounded
        let decoder = Decoder::from_weights_as(&config, &*weights, WeightDtype::F32, &device)?;
        let mut config = LoraConfig::new(RANK, ALPHA);
        config.init = Init::KaimingUniformA;
        let (mut decoder, _) = inject(decoder, &config)?;
        save_adapter(&decoder, path("adapter"), &AdapterInfo::default())?;
        let mut seed = 0;
        decoder.visit_lora_mut("", &mut |_, layer| {
            if let Some(adapter) = layer.adapter_mut() {
                seed += 1;
                let b = numbers(adapter.lora_b.dims(), seed, &device) * 0.05;
                adapter.lora_b = Param::from_tensor(b);
            }
        });
        save_adapter(&decoder, path("trained"), &AdapterInfo::default())?;
        std::fs::write(&described, what)?;
    }
    let text = |name| path(name).to_string_lossy().into_owned();
    Ok(Files { model: text("model"), adapter: text("adapter"), trained: text("trained") })
}

/// Lines whose losses, or written tokens, are not those of the group's first.
pub fn disagreements(group: &Group) -> Vec<String> {
    let Some(first) = group.lines.first() else { return Vec::new() };
    let mut found = Vec::new();
    if matches!(first.job, Job::Linear { .. }) {
        return of_layers(group);
    }
    for line in
        group.lines.iter().filter(|line| line.name.contains("f32") && !line.name.contains("bf16"))
    {
        if line.measured.tokens != first.measured.tokens {
            let (group, name) = (group.name, &line.name);
            found.push(format!(
                "{group}, {name}: expected the tokens that {} wrote, found others",
                first.name
            ));
        }
    }
    if first.measured.losses.is_empty() {
        return found;
    }
    for line in &group.lines {
        let apart = apart(&line.measured.losses, &first.measured.losses);
        // Half precision rounds each of thousands of values to 0.4 %, and "medium" may do so within products.
        let is_rounded = line.name.contains("bf16") || line.name.contains("medium");
        let bound = if is_rounded { 2e-3 } else { 1e-5 };
        if apart.is_nan() || apart > bound {
            let (group, name) = (group.name, &line.name);
            found.push(format!(
                "{group}, {name}: expected the losses of {} within {bound}, found {apart:.1e}",
                first.name
            ));
        }
    }
    found
}

/// Layers with an adapter are compared with each other, and those without.
fn of_layers(group: &Group) -> Vec<String> {
    let (frozen, adapted): (Vec<_>, Vec<_>) = group
        .lines
        .iter()
        .partition(|line| matches!(&line.job, Job::Linear { layer, .. } if layer == "frozen"));
    let mut found = Vec::new();
    for lines in [frozen, adapted] {
        let Some((first, others)) = lines.split_first() else { continue };
        for line in others {
            let apart = apart(&line.measured.losses, &first.measured.losses);
            if apart.is_nan() || apart > 1e-5 {
                found.push(format!(
                    "{}, {}: expected the mean squares of {} within 1e-5, found {apart:.1e}",
                    group.name, line.name, first.name
                ));
            }
        }
    }
    found
}

/// The largest relative difference; NaN where there is nothing to compare.
pub fn apart(found: &[f64], expected: &[f64]) -> f64 {
    if found.len() != expected.len() || found.is_empty() {
        return f64::NAN;
    }
    let apart = found.iter().zip(expected).map(|(a, b)| ((a - b) / b).abs());
    apart.fold(0.0, |most, one| if one > most || one.is_nan() { one } else { most })
}
