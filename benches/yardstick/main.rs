//! The yardstick: this project and its peers on the same shapes, seeds and batches, by turns.
//!
//! ```text
//! scripts/peers_env.sh target/peers                     # PEFT and what it needs, once
//! cargo bench --bench yardstick -- --python target/peers/bin/python --page docs/performance.md
//! cargo bench --bench yardstick -- --python target/peers/bin/python --only M --rounds 1
//! ```
//!
//! Each measurement is a process of its own, so that its peak of memory is its own; the programs take turns,
//! round after round. It is an error when the losses do not agree, for then the programs do not do the same. The page
//! and its picture are written by this program alone.

#[path = "../next_token/mod.rs"]
mod next_token;
mod page;
mod peers;
mod picture;
mod worker;
mod workload;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use workload::Job;

const ALL: &str = "S,M,L,linear,decode,load,merge";

type Answer<T> = Result<T, Box<dyn std::error::Error>>;

/// Measure this project beside its peers.
#[derive(Debug, Parser)]
struct Options {
    /// Python with PEFT, as scripts/peers_env.sh makes it; without it this project is measured alone
    #[arg(long, value_name = "PATH")]
    python: Option<PathBuf>,
    /// What to measure, separated by commas: S, M, L, linear, decode, load, merge
    #[arg(long, value_name = "NAMES", default_value = ALL)]
    only: String,
    /// How often the programs take turns
    #[arg(long, value_name = "NUMBER", default_value_t = 2)]
    rounds: usize,
    /// Page to write, with its picture beside it
    #[arg(long, value_name = "FILE.md")]
    page: Option<PathBuf>,
    /// Do this job alone and print what was measured
    #[arg(long, value_name = "JSON", hide = true)]
    job: Option<String>,
    /// Cargo says so
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("yardstick: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Answer<()> {
    if let Some(job) = &options.job {
        let job: Job = serde_json::from_str(job)?;
        println!("{}", serde_json::to_string(&worker::work(&job)?)?);
        return Ok(());
    }
    if !options.bench {
        println!("yardstick: nothing was measured; it is for cargo bench");
        return Ok(());
    }
    if options.page.is_some() && (options.python.is_none() || options.rounds == 0) {
        return Err("--page: expected --python too, and a round: the page compares".into());
    }
    if options.page.is_some() && options.only != ALL {
        return Err("--page: expected no --only beside it: the page holds all".into());
    }
    let groups = peers::measure(options)?;
    for group in &groups {
        println!("\n{}", page::table(group));
    }
    let disagreeing: Vec<_> = groups.iter().flat_map(peers::disagreements).collect();
    if !disagreeing.is_empty() {
        return Err(disagreeing.join("; ").into()); // and what was written before stays
    }
    if let Some(path) = &options.page {
        let name = path.with_extension("png");
        let page = page::page(&groups, &name, options.rounds)?; // it names the commit, which a picture changes
        picture::draw(&name, &groups)?;
        std::fs::write(path, page)?;
        println!("written {} and {}", path.display(), name.display());
    }
    Ok(())
}
