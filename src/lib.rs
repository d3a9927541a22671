#![doc = include_str!("../README.md")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use lora_models::{HubModel, HubProblem};

/// The result of an example program.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What ends an example program: one sentence, and whose fault it is.
#[derive(Debug)]
pub struct Error {
    message: String,
    exit_code: u8,
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error {
    /// The user's fault: a wrong option, file or folder.
    pub fn user(message: impl Into<String>) -> Self {
        Self { message: message.into(), exit_code: 2 }
    }

    /// Not the user's fault: a full disk, a loss that is no number any more.
    pub fn other(message: impl Into<String>) -> Self {
        Self { message: message.into(), exit_code: 1 }
    }
}

impl From<lora_core::Error> for Error {
    fn from(error: lora_core::Error) -> Self {
        use lora_core::ErrorKind;
        match error.kind() {
            ErrorKind::NonFinite { .. } => Self::other(error.to_string()),
            ErrorKind::Io { source, .. } => from_io(source, error.to_string()),
            _ => Self::user(error.to_string()),
        }
    }
}

impl From<lora_models::Error> for Error {
    fn from(error: lora_models::Error) -> Self {
        use lora_models::ErrorKind;
        match error.kind() {
            ErrorKind::Io { source, .. } => from_io(source, error.to_string()),
            ErrorKind::Hub {
                problem:
                    HubProblem::Unreachable { .. }
                    | HubProblem::Answer { .. }
                    | HubProblem::Interrupted { .. }
                    | HubProblem::Damaged { .. },
                ..
            } => Self::other(error.to_string()),
            _ => Self::user(error.to_string()),
        }
    }
}

impl From<lora_train::Error> for Error {
    fn from(error: lora_train::Error) -> Self {
        use lora_train::ErrorKind;
        match error.kind() {
            ErrorKind::Diverged { .. }
            | ErrorKind::Picture { .. }
            | ErrorKind::NotRenamed { .. } => Self::other(error.to_string()),
            ErrorKind::Io { source, .. } => from_io(source, error.to_string()),
            _ => Self::user(error.to_string()),
        }
    }
}

/// A path that is not there or not allowed is the user's to mend; a failing disk is not.
fn from_io(source: &std::io::Error, message: String) -> Error {
    use std::io::ErrorKind;
    match source.kind() {
        ErrorKind::NotFound
        | ErrorKind::PermissionDenied
        | ErrorKind::NotADirectory
        | ErrorKind::IsADirectory
        | ErrorKind::AlreadyExists
        | ErrorKind::InvalidInput => Error::user(message),
        _ => Error::other(message),
    }
}

/// Runs an example program: its error goes to standard error as one line, and into the exit code
/// (2: the user's fault, 1: another).
pub fn run(program: impl FnOnce() -> Result<()>) -> ExitCode {
    match program() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", error.message);
            ExitCode::from(error.exit_code)
        }
    }
}

/// An error of the operating system about a path.
pub fn io_error(path: &Path, source: &std::io::Error) -> Error {
    from_io(
        source,
        format!("{}: cannot be read or written: {source}; check the path", path.display()),
    )
}

/// Prints a line. That nobody reads on (a closed pipe) is no reason to end a run of hours.
pub fn say(line: impl std::fmt::Display) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// A file or folder of this repository, from wherever the program was started.
pub fn resource(path: impl AsRef<Path>) -> PathBuf {
    let path = path.as_ref();
    // A relative path where it will do: it is printed, and saved with an adapter that may be shared.
    if path.exists() {
        return path.to_owned();
    }
    // Cargo sets the variable for what it runs; a binary that was moved looks where it was started.
    match std::env::var_os("CARGO_MANIFEST_DIR") {
        Some(root) => Path::new(&root).join(path),
        None => path.to_owned(),
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
    let mut bar = DownloadBar::default();
    let folder = lora_models::Hub::from_env()?
        .fetch_with(&model.to_string(), |download| bar.show(download))
        .map_err(|error| match error.kind() {
            // Perhaps it was meant as a path.
            lora_models::ErrorKind::Hub {
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
