#![doc = include_str!("../README.md")]

mod device;
mod model;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use lora_models::HubProblem;

pub use device::{DeviceOption, kernels_note, open_device, tell_of_kernels};
pub use model::{ModelOptions, base_model, model_path};

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
