//! The tables, and the page that holds them.

use std::path::Path;
use std::process::Command;

use crate::Answer;
use crate::peers::{Group, Line, Program, apart, peer_trains_in_bf16};
use crate::workload::Job;

pub fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => values[count / 2],
        count => (values[count / 2 - 1] + values[count / 2]) / 2.0,
    }
}

/// How far apart the slowest and the fastest are, over the median, in percent.
fn spread(values: &[f64]) -> f64 {
    let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    100.0 * (most - least) / median(values)
}

/// The seconds of each step, or of each round.
pub fn seconds(line: &Line) -> Vec<f64> {
    let measured = &line.measured;
    if !measured.seconds.is_empty() {
        return measured.seconds.clone();
    }
    let steps = measured.forward.iter().zip(&measured.backward).zip(&measured.optimizer);
    steps.map(|((forward, backward), optimizer)| forward + backward + optimizer).collect()
}

/// The line that the others are compared with: the first of the peer's, or the first.
fn reference(group: &Group) -> Option<&Line> {
    group.lines.iter().find(|line| line.program == Program::Peer).or(group.lines.first())
}

/// A group as a table in Markdown.
pub fn table(group: &Group) -> String {
    let trains = matches!(group.lines.first().map(|line| &line.job), Some(Job::Train { .. }));
    let first = group.lines.first();
    let one = reference(group).map_or("", |line| &line.name);
    let reference = reference(group).map_or(f64::NAN, |line| median(&seconds(line)));
    let columns = match first.map(|line| &line.job) {
        Some(Job::Train { .. }) => format!(
            "tokens/s | spread | speed ({one} = 1) | forward / backward / optimizer, ms | peak MB | \
             peak MB, freed memory given back | last loss | losses apart"
        ),
        Some(Job::Linear { .. }) => format!(
            "ms | spread | time ({one} = 1) | forward / backward, ms | peak MB beyond the start"
        ),
        Some(Job::Decode { .. }) => {
            format!("tokens/s | spread | speed ({one} = 1) | prompt, tokens/s | peak MB")
        }
        _ => {
            format!(
                "seconds, first | again | spread | speed ({one} = 1) | peak MB beyond the start"
            )
        }
    };
    let rule = "|---".repeat(columns.split(" | ").count() + 1);
    let mut text = format!("### {}\n\n| program | {columns} |\n{rule}|\n", group.what);
    for line in &group.lines {
        let (measured, seconds) = (&line.measured, seconds(line));
        let middle = median(&seconds);
        let spread = spread(&seconds);
        let (name, speed) = (&line.name, reference / middle);
        let ms = |values: &[f64]| format!("{:.0}", 1e3 * median(values));
        let (peak, fair) = (measured.peak_bytes / 1e6, line.fair_peak / 1e6);
        let beyond = (line.fair_peak - measured.start_bytes) / 1e6;
        let rate = group.tokens as f64 / middle;
        text.push_str(&match &line.job {
            Job::Train { .. } => format!(
                "| {name} | {rate:.0} | {spread:.0} % | {speed:.2} | {} / {} / {} | {peak:.0} | {fair:.0} | {:.4} | {:.1e} |\n",
                ms(&measured.forward),
                ms(&measured.backward),
                ms(&measured.optimizer),
                measured.losses.last().copied().unwrap_or(f64::NAN),
                first.map_or(f64::NAN, |first| apart(&measured.losses, &first.measured.losses)),
            ),
            Job::Linear { .. } => format!(
                "| {name} | {:.1} | {spread:.0} % | {:.2} | {:.1} / {:.1} | {beyond:.0} |\n",
                1e3 * middle,
                middle / reference,
                1e3 * median(&measured.forward),
                1e3 * median(&measured.backward),
            ),
            Job::Decode { prompt, .. } => format!(
                "| {name} | {rate:.1} | {spread:.0} % | {speed:.2} | {:.0} | {fair:.0} |\n",
                *prompt as f64 / median(&measured.prompt_seconds),
            ),
            Job::Load { .. } | Job::Merge { .. } => {
                let first = median(&measured.first_seconds);
                format!(
                    "| {name} | {first:.3} | {middle:.3} | {spread:.0} % | {speed:.2} | {beyond:.0} |\n"
                )
            }
        });
    }
    if trains {
        text.push_str(&format!("\nA step is {} tokens, all of which are trained.\n", group.tokens));
    }
    text
}

/// The whole page.
pub fn page(groups: &[Group], picture: &Path, rounds: usize) -> Answer<String> {
    let picture = picture.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut text = format!(
        "# Performance\n\n\
         Written by `cargo bench --bench yardstick`, never by hand; `benches/yardstick/` says what is measured and how. \
         Every number is from one run on one machine, the programs taking turns {rounds} times; medians over all steps, and \
         as spread the slowest less the fastest over the median. A shared machine's speed wanders: ratios count, single \
         figures do not.\n\n\
         Machine: {}. Commit {}, {}.\n\n",
        machine(),
        says("git", &["describe", "--always", "--dirty"])?,
        says("rustc", &["--version"])?,
    );
    for program in [Program::Here, Program::Peer] {
        let lines = groups.iter().flat_map(|group| &group.lines);
        if let Some(line) = lines.into_iter().find(|line| line.program == program) {
            text.push_str(&format!("- {}\n", line.measured.versions));
        }
    }
    text.push_str(&format!(
        "\n![Training speed and peak memory]({picture})\n\n\
         Training steps are LoRA of rank 8, alpha 16, on all seven projections, without dropout, with AdamW, over random \
         weights in bf16 precision and made-up tokens; both programs read the same model, adapter and tokens, and their \
         losses are compared at every step: \"losses apart\" is the largest relative difference to the first line. Of one \
         layer the mean squares of output and gradients are compared, of loading and merging those of a weight, of \
         writing those of the prompt's last logits, and in f32 the tokens. \
         PEFT's \"medium\" is `torch.set_float32_matmul_precision(\"medium\")`; its attention is `sdpa`. Peaks are resident \
         memory of the processor; the last of them with `MALLOC_MMAP_THRESHOLD_=131072`, since glibc otherwise keeps freed blocks. \
         Loading and merging are done four times in a process: the first apart, which touches new memory, and the median \
         of the others. Weights that torch leaves in their file, mapped, are touched once, page by page. New memory is \
         dear in a virtual machine that gives unused memory back to its host, large pages of it (docs/adr/0029) the most.\n\n"
    ));
    if !peer_trains_in_bf16() {
        text.push_str(
            "This processor has no instructions for bf16, without which torch needs tens of times as long for a training \
             step in bf16 as for one in f32: PEFT's training in bf16 is left out.\n\n",
        );
    }
    for group in groups {
        text.push_str(&table(group));
        text.push('\n');
    }
    Ok(text)
}

/// The first line of what a program prints.
fn says(program: &str, arguments: &[&str]) -> Answer<String> {
    let output =
        Command::new(program).args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or("unknown").to_owned())
}

fn machine() -> String {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = cpu.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split(':').nth(1)).unwrap_or_default().trim().to_owned()
    };
    let flags = field("flags");
    let has = |flag: &str| flags.split(' ').any(|one| one == flag);
    let vectors = match (has("avx512_bf16"), has("avx512f"), has("avx2")) {
        (true, ..) => "AVX-512 with bf16",
        (_, true, _) => "AVX-512",
        (.., true) => "AVX2",
        _ => "no AVX2",
    };
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = memory.split_whitespace().nth(1).and_then(|kib| kib.parse::<f64>().ok());
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!(
        "{} cores of {}, {vectors}, {:.0} GB, {}",
        cores,
        field("model name"),
        kib.unwrap_or(f64::NAN) * 1024.0 / 1e9,
        std::env::consts::OS,
    )
}
