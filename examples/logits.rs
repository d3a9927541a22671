//! Compute a model's logits for given tokens, to compare with another program's.
//!
//! `--input FILE.safetensors` holds `input_ids`, i64 `[batch, length]`; where it also holds `logits`,
//! f32 `[batch, length, vocab]`, the largest relative difference is printed. With `--output` the
//! logits are written with the ids, as `scripts/peft_check.py` reads them; with `--save-adapter` the
//! adapter is written again.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use burn::tensor::{Tensor, TensorData};
use burn_lora::{DeviceOption, Error, Result, say};
use clap::Parser;
use lora_core::{LoadOptions, load_adapter_with, read_adapter_info, save_adapter};
use lora_models::{
    Checkpoint, Decoder, HostTensor, SafetensorsFile, WeightDtype, WeightSource, open_weights,
    read_config,
};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

/// Compute a model's logits for given tokens.
#[derive(Debug, Parser)]
struct Options {
    /// Model: a Hugging Face folder (it needs no tokenizer here) or a GGUF file
    #[arg(long, value_name = "FOLDER-OR-GGUF")]
    model: PathBuf,
    /// Adapter: a folder in PEFT's format
    #[arg(long, value_name = "FOLDER")]
    adapter: Option<PathBuf>,
    /// File with the weights that a PiSSA or OLoRA start left over, which take the places of the model's
    #[arg(long, value_name = "FILE.safetensors", requires = "adapter")]
    residual_base: Option<PathBuf>,
    /// Read the adapter although its file says that it was made over another base
    #[arg(long, requires = "adapter")]
    any_base: bool,
    /// New folder to write the adapter to
    #[arg(long, value_name = "FOLDER", requires = "adapter")]
    save_adapter: Option<PathBuf>,
    /// File with `input_ids` and perhaps `logits`
    #[arg(long, value_name = "FILE.safetensors")]
    input: PathBuf,
    /// File to write `input_ids` and `logits` to
    #[arg(long, value_name = "FILE.safetensors")]
    output: Option<PathBuf>,
    /// Type of the weights: f32, f16 or bf16
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    dtype: WeightDtype,
    /// Round scores of attention in half precision as transformers' eager attention does, to compare with it
    #[arg(long)]
    eager: bool,
    #[command(flatten)]
    device: DeviceOption,
}

fn main() -> ExitCode {
    burn_lora::run(|| logits(&Options::parse()))
}

fn logits(options: &Options) -> Result<()> {
    let device = options.device.open()?;
    let mut decoder = if options.model.is_dir() {
        let weights = open_weights(&options.model)?;
        let residual = options.residual_base.as_ref().map(SafetensorsFile::open).transpose()?;
        let weights = Overlaid { weights, residual };
        let config = read_config(&options.model)?;
        Decoder::from_weights_as(&config, &weights, options.dtype, &device)?
    } else if options.residual_base.is_some() {
        return Err(Error::user("--residual-base: expected a model in a Hugging Face folder"));
    } else {
        Checkpoint::open(&options.model)?.decoder_as(options.dtype, &device)?
    };
    burn_lora::tell_of_kernels(&device);
    if options.eager {
        decoder = decoder.with_eager_rounding();
    }
    if let Some(folder) = &options.adapter {
        let report;
        let load = LoadOptions {
            check_base: !options.any_base,
            residual_base: options.residual_base.is_some(),
            ..LoadOptions::default()
        };
        (decoder, report) = load_adapter_with(decoder, folder, &load)?;
        say(report);
        if let Some(copy) = &options.save_adapter {
            save_adapter(&decoder, copy, &read_adapter_info(folder)?)?;
        }
    }

    let bytes =
        fs::read(&options.input).map_err(|error| burn_lora::io_error(&options.input, &error))?;
    let (ids, [batch, length], golden) = read_input(&bytes)
        .map_err(|problem| Error::user(format!("{}: {problem}", options.input.display())))?;
    let vocab = decoder.config().vocab_size;
    if let Some(id) = ids.iter().find(|id| !(0..vocab as i64).contains(id)) {
        let path = options.input.display();
        return Err(Error::user(format!(
            "{path}: input_ids: expected ids of 0 to {}, found {id}",
            vocab - 1
        )));
    }
    let ids_tensor = Tensor::from_data(TensorData::new(ids.clone(), [batch, length]), &device);
    let logits: Vec<f32> = decoder.forward(ids_tensor).into_data().iter::<f32>().collect();

    if let Some(golden) = golden {
        if golden.len() != logits.len() {
            let (expected, found) = (logits.len(), golden.len());
            return Err(Error::user(format!(
                "{}: logits: expected {expected} values for this model, found {found}",
                options.input.display()
            )));
        }
        let largest = golden.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        let difference = logits
            .iter()
            .zip(&golden)
            .map(|(found, expected)| (found - expected).abs())
            // `max` would pass over NaN.
            .fold(0f32, |worst, one| if one > worst || one.is_nan() { one } else { worst });
        say(format!("largest relative difference {:.3e}", difference / largest));
    }
    if let Some(path) = &options.output {
        let shape = vec![batch, length, logits.len() / (batch * length)];
        let ids: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        let logits: Vec<u8> = logits.iter().flat_map(|value| value.to_le_bytes()).collect();
        let view = |dtype, shape, bytes| TensorView::new(dtype, shape, bytes).map_err(other);
        let tensors = [
            ("input_ids", view(Dtype::I64, vec![batch, length], &ids)?),
            ("logits", view(Dtype::F32, shape, &logits)?),
        ];
        let file = safetensors::serialize(tensors, None).map_err(other)?;
        fs::write(path, file).map_err(|error| burn_lora::io_error(path, &error))?;
    }
    Ok(())
}

/// A checkpoint in which some tensors are taken from another file, under PEFT's names
/// (`model.layers.0.self_attn.q_proj.base_layer.weight`).
struct Overlaid {
    weights: Box<dyn WeightSource>,
    residual: Option<SafetensorsFile>,
}

impl Overlaid {
    fn residual(&self, name: &str) -> Option<(&SafetensorsFile, String)> {
        let (path, kind) = name.rsplit_once('.')?;
        let name = format!("{path}.base_layer.{kind}");
        self.residual.as_ref().filter(|file| file.shape(&name).is_some()).map(|file| (file, name))
    }
}

impl WeightSource for Overlaid {
    fn path(&self) -> &Path {
        self.weights.path()
    }

    fn names(&self) -> Vec<String> {
        self.weights.names()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        match self.residual(name) {
            Some((file, name)) => file.shape(&name),
            None => self.weights.shape(name),
        }
    }

    fn read_as(&self, name: &str, dtype: WeightDtype) -> lora_models::Result<HostTensor> {
        match self.residual(name) {
            Some((file, name)) => file.read_as(&name, dtype),
            None => self.weights.read_as(name, dtype),
        }
    }
}

fn other(error: impl std::fmt::Display) -> Error {
    Error::other(error.to_string())
}

type Input = (Vec<i64>, [usize; 2], Option<Vec<f32>>);

fn read_input(bytes: &[u8]) -> Result<Input, String> {
    let file = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
    let ids = file.tensor("input_ids").map_err(|_| "expected a tensor input_ids".to_owned())?;
    let (Dtype::I64, [batch, length]) = (ids.dtype(), ids.shape()) else {
        let (dtype, shape) = (ids.dtype(), ids.shape());
        return Err(format!("input_ids: expected i64 [batch, length], found {dtype:?} {shape:?}"));
    };
    if *batch == 0 || *length == 0 {
        return Err(format!("input_ids: expected at least one token, found {batch} x {length}"));
    }
    let (ids_bytes, _) = ids.data().as_chunks::<8>();
    let golden = match file.tensor("logits") {
        Err(_) => None,
        Ok(logits)
            if logits.dtype() == Dtype::F32 && logits.shape().starts_with(&[*batch, *length]) =>
        {
            let (values, _) = logits.data().as_chunks::<4>();
            Some(values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
        }
        Ok(logits) => {
            let (dtype, shape) = (logits.dtype(), logits.shape());
            return Err(format!(
                "logits: expected f32 [{batch}, {length}, vocab_size], found {dtype:?} {shape:?}"
            ));
        }
    };
    let ids = ids_bytes.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect();
    Ok((ids, [*batch, *length], golden))
}
