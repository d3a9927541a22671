//! Write a model's adapter for the programs that serve it.
//!
//! `cargo run --release --example export -- --adapter runs/1/adapter --for vllm --output served` writes a
//! folder that vLLM reads as the function that was trained; `--gguf FILE` writes llama.cpp's file.

use std::path::PathBuf;
use std::process::ExitCode;

use burn_lora::{Error, Result, say, tell_of_kernels};
use clap::Parser;
use lora_core::{Reader, load_adapter, read_adapter_info, save_portable};
use lora_models::{Checkpoint, Decoder, open_weights, read_config, save_gguf_adapter};

/// Write a model's adapter for the programs that serve it.
#[derive(Debug, Parser)]
struct Options {
    /// Model that the adapter belongs to: a Hugging Face folder (it needs no tokenizer here) or a GGUF
    /// file [default: the repository's own]
    #[arg(long, value_name = "FOLDER-OR-GGUF")]
    model: Option<PathBuf>,
    /// Adapter: a folder in PEFT's format
    #[arg(long, value_name = "FOLDER")]
    adapter: PathBuf,
    /// Programs that shall read it, separated by commas: vllm, llama.cpp, mlx, mistral.rs
    #[arg(long = "for", value_name = "NAMES", default_value = "vllm,llama.cpp,mlx,mistral.rs")]
    readers: String,
    /// New folder in PEFT's format, with mlx-lm's in its subfolder `mlx`
    #[arg(long, value_name = "FOLDER")]
    output: Option<PathBuf>,
    /// New file in llama.cpp's format
    #[arg(long, value_name = "FILE.gguf")]
    gguf: Option<PathBuf>,
}

fn main() -> ExitCode {
    burn_lora::run(|| export(&Options::parse()))
}

fn export(options: &Options) -> Result<()> {
    let readers: Vec<Reader> = options.readers.split(',').map(reader).collect::<Result<_>>()?;
    if options.output.is_none() && options.gguf.is_none() {
        return Err(Error::user(
            "expected --output or --gguf, found neither; see --help".to_owned(),
        ));
    }
    let path = options.model.clone().unwrap_or_else(|| burn_lora::resource("examples/tiny_world"));
    let device = burn_lora::open_device(None)?;
    let decoder = if path.is_dir() {
        Decoder::from_weights(&read_config(&path)?, &*open_weights(&path)?, &device)?
    } else {
        Checkpoint::open(&path)?.decoder(&device)?
    };
    tell_of_kernels(&device);
    let (decoder, report) = load_adapter(decoder, &options.adapter)?;
    say(format!(
        "read       {}: {} layers",
        options.adapter.display(),
        report.applied.adapted.len()
    ));

    if let Some(output) = &options.output {
        let info = read_adapter_info(&options.adapter)?;
        let report = save_portable(&decoder, output, &info, &readers)?;
        let hint = match readers.contains(&Reader::Vllm) && report.rank > 16 {
            true => format!("; start vLLM with --max-lora-rank {}", report.rank),
            false => String::new(),
        };
        say(format!("written    {}: rank {} everywhere{hint}", output.display(), report.rank));
    }
    if let Some(file) = &options.gguf {
        save_gguf_adapter(&decoder, file)?;
        say(format!("written    {}: for llama.cpp's --lora", file.display()));
    }
    Ok(())
}

fn reader(name: &str) -> Result<Reader> {
    Ok(match name.trim() {
        "vllm" => Reader::Vllm,
        "llama.cpp" => Reader::LlamaCpp,
        "mlx" => Reader::Mlx,
        "mistral.rs" => Reader::MistralRs,
        other => {
            return Err(Error::user(format!(
                "--for: expected vllm, llama.cpp, mlx or mistral.rs, found '{other}'"
            )));
        }
    })
}
