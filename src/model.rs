//! Which model a program works with, and how it is fetched.

use std::path::{Path, PathBuf};

use lora_core::{LoadOptions, load_adapter_with};
use lora_models::{Decoder, HubModel};

use crate::{Error, Result, resource};

/// The options that name a model and an adapter for it.
#[derive(Debug, clap::Args)]
pub struct ModelOptions {
    /// Model: a Hugging Face folder, a GGUF file, or a model of the Hugging Face Hub as owner/name,
    /// owner/name@revision or owner/name/file.gguf [default: the repository's own]
    #[arg(long, value_name = "MODEL")]
    pub model: Option<PathBuf>,
    /// Adapter: a folder in PEFT's format, such as runs/1/adapter
    #[arg(long, value_name = "FOLDER")]
    pub adapter: Option<PathBuf>,
    /// Use the adapter though it was made over other weights, such as another quantisation or type of them
    #[arg(long, requires = "adapter")]
    pub any_base: bool,
}

impl ModelOptions {
    /// Where the model lies, after it was fetched if need be.
    pub fn path(&self) -> Result<PathBuf> {
        match &self.model {
            Some(model) => model_path(model),
            None => Ok(resource("examples/tiny_world")),
        }
    }

    /// The model with the adapter; `None` without one.
    pub fn adapted(&self, decoder: Decoder) -> Result<Option<Decoder>> {
        let Some(folder) = &self.adapter else { return Ok(None) };
        let load = LoadOptions { check_base: !self.any_base, ..LoadOptions::default() };
        Ok(Some(load_adapter_with(decoder, folder, &load)?.0))
    }
}

/// A model as a user names it: a path that exists, or a model of the Hugging Face Hub, which is fetched
/// into the cache with a bar for each large file where standard error is a terminal.
pub fn model_path(model: &Path) -> Result<PathBuf> {
    match model.exists() {
        true => Ok(model.to_owned()),
        false => fetch(&model.to_string_lossy().parse()?),
    }
}

/// What names a model's weights to other programs: the repository on the Hub, or the path.
pub fn base_model(model: &Path) -> String {
    match model.to_string_lossy().parse::<HubModel>() {
        Ok(name) if !model.exists() => name.repository().to_owned(),
        _ => model.display().to_string(),
    }
}

#[cfg(feature = "hub")]
fn fetch(model: &HubModel) -> Result<PathBuf> {
    use lora_models::{ErrorKind, HubProblem};

    let mut bar = DownloadBar::default();
    let folder = lora_models::Hub::from_env()?
        .fetch_with(&model.to_string(), |download| bar.show(download))
        .map_err(|error| match error.kind() {
            // Perhaps it was meant as a path.
            ErrorKind::Hub {
                problem: HubProblem::NotFound { .. } | HubProblem::Unreachable { .. },
                ..
            } => {
                let Error { message, exit_code } = error.into();
                Error {
                    message: format!("{message}; no file or folder has this name either"),
                    exit_code,
                }
            }
            _ => error.into(),
        })?;
    Ok(folder)
}

#[cfg(not(feature = "hub"))]
fn fetch(model: &HubModel) -> Result<PathBuf> {
    Err(Error::user(format!(
        "{model}: there is no such file or folder, and a model of the Hugging Face Hub needs this program \
         built with --features hub"
    )))
}

/// A bar for the file that is being fetched, if that takes long.
#[cfg(feature = "hub")]
#[derive(Default)]
struct DownloadBar {
    file: String,
    bar: Option<indicatif::ProgressBar>,
}

#[cfg(feature = "hub")]
impl DownloadBar {
    fn show(&mut self, download: &lora_models::Download<'_>) {
        const LARGE: u64 = 1 << 20;
        if self.file != download.file {
            download.file.clone_into(&mut self.file);
            self.bar = (download.total >= LARGE).then(|| {
                let style = indicatif::ProgressStyle::with_template(
                    "{msg}  {bar:32} {bytes}/{total_bytes}  {binary_bytes_per_sec}  {eta} left",
                );
                indicatif::ProgressBar::new(download.total)
                    .with_style(style.expect("the template is well-formed"))
                    .with_message(self.file.clone())
                    .with_position(download.done)
            });
        }
        if let Some(bar) = &self.bar {
            bar.set_position(download.done);
            if download.done == download.total {
                bar.finish();
            }
        }
    }
}
