//! Seconds and memory to load a model, in a process of its own each time.
//!
//! ```text
//! cargo bench --bench load -- MODEL f32 bf16
//! ```
//!
//! MODEL is a GGUF file or a Hugging Face folder, which needs no tokenizer here. Memory is what the
//! process holds at most beyond its start, read from `/proc/self/status`; Linux only.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use burn::tensor::Device;
use lora_models::{Decoder, GgufFile, WeightDtype, WeightSource, open_weights, read_config};

const CHILD: &str = "LORA_LOAD_DTYPE";
const ROUNDS: usize = 3;

type Answer<T> = Result<T, Box<dyn std::error::Error>>;

fn main() {
    let arguments: Vec<String> =
        std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let Some((path, dtypes)) = arguments.split_first() else {
        println!("load: expected a model's folder or GGUF file, found none; nothing was measured");
        return;
    };
    let answer = match std::env::var(CHILD) {
        Ok(dtype) => load(path, &dtype),
        Err(_) => table(path, dtypes),
    };
    if let Err(error) = answer {
        eprintln!("load: {error}");
        std::process::exit(1);
    }
}

fn table(path: &str, dtypes: &[String]) -> Answer<()> {
    let size = file_bytes(Path::new(path))? as f64 / 1e6;
    println!("{path}: {size:.1} MB of files, best of {ROUNDS}\n");
    println!("{:<8}{:>10}{:>14}{:>22}", "type", "seconds", "peak MB", "peak / files");
    let all = ["f32".to_owned(), "bf16".to_owned()];
    for dtype in if dtypes.is_empty() { &all[..] } else { dtypes } {
        let (mut seconds, mut peak) = (f64::MAX, f64::MAX);
        for _ in 0..ROUNDS {
            let output =
                Command::new(std::env::current_exe()?).arg(path).env(CHILD, dtype).output()?;
            let text = String::from_utf8_lossy(&output.stdout);
            let numbers: Vec<f64> = text.split_whitespace().flat_map(str::parse).collect();
            let [took, held] = numbers[..] else {
                return Err(String::from_utf8_lossy(&output.stderr).trim().into());
            };
            (seconds, peak) = (seconds.min(took), peak.min(held));
        }
        println!("{dtype:<8}{seconds:>10.2}{peak:>14.1}{:>22.3}", peak / size);
    }
    Ok(())
}

fn file_bytes(path: &Path) -> Answer<u64> {
    if path.is_file() {
        return Ok(path.metadata()?.len());
    }
    let mut bytes = 0;
    for file in std::fs::read_dir(path)? {
        let file = file?;
        if file.path().extension().is_some_and(|end| end == "safetensors") {
            bytes += file.metadata()?.len();
        }
    }
    Ok(bytes)
}

/// Memory in MB: `VmRSS` now, `VmHWM` at most.
fn resident(field: &str) -> Answer<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with(field)).ok_or("no such field")?;
    let kib = line.split_whitespace().nth(1).ok_or("no number")?;
    Ok(kib.parse::<f64>()? * 1024.0 / 1e6)
}

fn load(path: &str, dtype: &str) -> Answer<()> {
    let dtype: WeightDtype = dtype.parse()?;
    let path = Path::new(path);
    let before = resident("VmRSS")?;
    let start = Instant::now();
    let (config, source): (_, Box<dyn WeightSource>) = match path.is_dir() {
        true => (read_config(path)?, open_weights(path)?),
        false => {
            let file = GgufFile::open(path)?;
            (file.config()?, Box::new(file))
        }
    };
    let decoder = Decoder::from_weights_as(&config, &*source, dtype, &Device::flex())?;
    let seconds = start.elapsed().as_secs_f64();
    println!("{seconds} {}", resident("VmHWM")? - before);
    drop(decoder);
    Ok(())
}
