//! What can go wrong between a data file and a finished run.

use std::path::{Path, PathBuf};

/// The result of this crate's fallible functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of this crate: opaque, so that kinds can be added; look into it with [`Error::kind`].
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct Error(Box<ErrorKind>);

impl Error {
    /// What went wrong.
    pub fn kind(&self) -> &ErrorKind {
        &self.0
    }

    pub(crate) fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        ErrorKind::Io { path: path.as_ref().to_owned(), source }.into()
    }

    pub(crate) fn no_data(path: impl AsRef<Path>, reason: impl Into<String>) -> Self {
        ErrorKind::NoData { path: path.as_ref().to_owned(), reason: reason.into() }.into()
    }

    pub(crate) fn settings(
        name: impl Into<String>,
        expected: impl Into<String>,
        found: impl ToString,
    ) -> Self {
        ErrorKind::Settings {
            name: name.into(),
            expected: expected.into(),
            found: found.to_string(),
        }
        .into()
    }
}

impl From<ErrorKind> for Error {
    fn from(kind: ErrorKind) -> Self {
        Self(Box::new(kind))
    }
}

impl From<lora_models::Error> for Error {
    fn from(source: lora_models::Error) -> Self {
        ErrorKind::from(source).into()
    }
}

impl From<lora_core::Error> for Error {
    fn from(source: lora_core::Error) -> Self {
        ErrorKind::from(source).into()
    }
}

/// The kinds of [`Error`]. Each says where, what was expected and what was found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A file or folder could not be read or written.
    #[error("{path}: cannot be read or written: {source}; check the path", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system answered.
        source: std::io::Error,
    },
    /// A row of a data file cannot be trained on.
    #[error("{path}: {unit} {row}: {reason}", path = path.display())]
    Data {
        /// The data file.
        path: PathBuf,
        /// Which line or row, counted from 1.
        row: usize,
        /// What `row` counts: `line` in JSONL, `row` in a JSON array.
        unit: &'static str,
        /// What was expected there, what was found, and what to do.
        reason: String,
    },
    /// A row of a data file is well-formed, but this model's chat template or tokenizer refuses it.
    #[error("{path}: {unit} {row}: {source}", path = path.display())]
    Encode {
        /// The data file.
        path: PathBuf,
        /// Which line or row, counted from 1.
        row: usize,
        /// What `row` counts: `line` in JSONL, `row` in a JSON array.
        unit: &'static str,
        /// What the template or the tokenizer answered.
        source: lora_models::Error,
    },
    /// A data file holds nothing to train on.
    #[error("{path}: expected rows to train on, found none: {reason}", path = path.display())]
    NoData {
        /// The data file.
        path: PathBuf,
        /// Why nothing is left, and what to do.
        reason: String,
    },
    /// A setting has a value that cannot be used.
    #[error("{name}: expected {expected}, found {found}")]
    Settings {
        /// The setting, as it is written in the settings file.
        name: String,
        /// What it may be.
        expected: String,
        /// What was given.
        found: String,
    },
    /// A complete run could not be given its name; nothing of it is lost.
    #[error(
        "{path}: {source}; the run is complete and kept as {kept}: rename it",
        path = path.display(),
        kept = kept.display()
    )]
    NotRenamed {
        /// The output folder.
        path: PathBuf,
        /// Where the run is.
        kept: PathBuf,
        /// What the operating system answered.
        source: std::io::Error,
    },
    /// The output folder belongs to an earlier run, which is not overwritten.
    #[error("{path} holds a run already; choose another --output or remove it", path = path.display())]
    RunExists {
        /// The output folder.
        path: PathBuf,
    },
    /// Training left the finite numbers, after which every later step is lost.
    #[error(
        "step {step}: expected a finite {what}, found NaN or infinity; lower the learning rate"
    )]
    Diverged {
        /// The optimiser step, counted from 1.
        step: usize,
        /// What is not finite: `loss`, `held-out loss`.
        what: &'static str,
    },
    /// The loss curve could not be drawn.
    #[error("{path}: the loss curve could not be drawn: {reason}", path = path.display())]
    Picture {
        /// The picture's file.
        path: PathBuf,
        /// What the drawing library answered.
        reason: String,
    },
    /// The model could not be read, written or spoken to.
    #[error(transparent)]
    Model(#[from] lora_models::Error),
    /// An adapter could not be attached, read, written or merged.
    #[error(transparent)]
    Lora(#[from] lora_core::Error),
}
