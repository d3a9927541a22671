//! What can go wrong when adapters are configured, attached, merged, read or written.

use std::path::{Path, PathBuf};

use burn::tensor::DType;

use crate::device::DeviceProblem;
use crate::portable::{PortabilityProblem, sentences as portability_sentences};
use crate::problem::{ConfigProblem, sentences};

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

    pub(crate) fn setting(
        name: &'static str,
        expected: impl Into<String>,
        found: impl ToString,
    ) -> Self {
        ErrorKind::Setting { name, expected: expected.into(), found: found.to_string() }.into()
    }

    /// A lone number that cannot be used is [`ErrorKind::Setting`], as where one layer is wrapped.
    pub(crate) fn config(mut problems: Vec<ConfigProblem>) -> Self {
        match problems.pop() {
            Some(ConfigProblem::Setting { setting, expected, found }) if problems.is_empty() => {
                ErrorKind::Setting { name: setting, expected, found }.into()
            }
            last => {
                problems.extend(last);
                ErrorKind::Config { problems }.into()
            }
        }
    }

    pub(crate) fn malformed(
        path: impl AsRef<Path>,
        place: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Self {
        ErrorKind::Malformed {
            path: path.as_ref().to_owned(),
            place: place.into(),
            expected: expected.into(),
            found: found.into(),
        }
        .into()
    }
}

impl Error {
    /// The same error, about the settings in an adapter's config; `field_of` gives a setting's name there.
    pub(crate) fn in_config(
        self,
        path: impl AsRef<Path>,
        field_of: fn(&'static str) -> &'static str,
    ) -> Self {
        match *self.0 {
            ErrorKind::Setting { name, expected, found } => {
                Self::malformed(path, field_of(name), expected, found)
            }
            ErrorKind::Config { problems } => {
                let problems = problems.into_iter().map(|problem| problem.renamed(field_of));
                let (path, problems) = (path.as_ref().to_owned(), problems.collect());
                ErrorKind::AdapterConfig { path, problems }.into()
            }
            kind => kind.into(),
        }
    }

    /// The same error, with the layer's path where it has a place for one.
    pub(crate) fn at(mut self, layer: &str) -> Self {
        match self.0.as_mut() {
            ErrorKind::Setting { found, .. } => found.push_str(&format!(" for {layer}")),
            ErrorKind::AlreadyAdapted { path } | ErrorKind::DeviceDtype { path, .. }
                if path.is_empty() =>
            {
                *path = layer.to_owned();
            }
            _ => {}
        }
        self
    }
}

impl From<ErrorKind> for Error {
    fn from(kind: ErrorKind) -> Self {
        Self(Box::new(kind))
    }
}

/// The kinds of [`Error`]. Each says where, what was expected and what was found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A setting has a value that cannot be used.
    #[error("{name}: expected {expected}, found {found}")]
    Setting {
        /// The setting, in [`LoraConfig`](crate::LoraConfig)'s words.
        name: &'static str,
        /// What it may be.
        expected: String,
        /// What was given.
        found: String,
    },
    /// A configuration does not fit the model, or contradicts itself; nothing was changed.
    #[error("{}", sentences(problems))]
    Config {
        /// All that is wrong with it.
        problems: Vec<ConfigProblem>,
    },
    /// A layer that should get an adapter has one already.
    #[error(
        "{}: expected a layer without an adapter, found one with an adapter; take it off first",
        place(path)
    )]
    AlreadyAdapted {
        /// The layer.
        path: String,
    },
    /// A layer is merged and should not be.
    #[error("{}: expected an unmerged layer, found a merged one; unmerge it first", place(path))]
    AlreadyMerged {
        /// The layer; empty for a layer that stands alone.
        path: String,
    },
    /// A layer is not merged and should be.
    #[error(
        "{}: expected a merged layer, found one that is not merged; merge it first",
        place(path)
    )]
    NotMerged {
        /// The layer; empty for a layer that stands alone, and for a model without a merged one.
        path: String,
    },
    /// A layer is prepared for a mixed batch, and has no one update; nothing was changed or written.
    #[error(
        "{}: expected one adapter for all samples, found those of a mixed batch; drop the guard of `mixed` first",
        place(path)
    )]
    MixedBatch {
        /// The layer; empty for a layer that stands alone.
        path: String,
    },
    /// A merge would have written NaN or infinity; nothing was changed.
    #[error(
        "{}: expected finite merged weights, found NaN or infinity; nothing was merged",
        place(path)
    )]
    NonFinite {
        /// The layer; empty for a layer that stands alone.
        path: String,
    },
    /// What is to be combined, or what would come of it, is beyond the numbers of f32.
    #[error("{path}: expected adapters and a combination that are finite, found NaN or infinity")]
    NonFiniteCombination {
        /// The layer.
        path: String,
    },
    /// A grouped convolution's adapter cannot be merged; nothing was changed.
    #[error(
        "{}: expected a layer whose update fits its weight, found a grouped convolution, which cannot be merged; nothing was merged",
        place(path)
    )]
    GroupedConvolution {
        /// The layer; empty for a layer that stands alone.
        path: String,
    },
    /// Something that adapts the model does not train.
    #[error(
        "expected a gradient for all that adapts the model: {}; is every adapted layer part of the loss?",
        first_few(problems, "; ")
    )]
    NoGradient {
        /// One line for each tensor without a usable gradient.
        problems: Vec<String>,
    },
    /// A name that no set of the registry has.
    #[error("expected the name of a set, found '{name}'; {}", known(names))]
    UnknownSet {
        /// The name.
        name: String,
        /// Names that there are, the most similar first.
        names: Vec<String>,
    },
    /// A name that another set of the registry has already.
    #[error("expected a new name, found '{name}', which is taken; remove or rename that set first")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// A model is adapted by something that is in no set of the registry; nothing was changed.
    #[error(
        "{path}: expected an adapter of this registry, found another one; insert AdapterSet::of(&model) or take it off with AdapterSet::detach first"
    )]
    ForeignAdapter {
        /// The first such layer.
        path: String,
    },
    /// What is in some layers cannot be combined; nothing was changed.
    #[error("expected updates that can be combined, found {}", first_few(problems, "; "))]
    NotCombinable {
        /// One line for each such layer, its path first.
        problems: Vec<String>,
    },
    /// An adapter that is to be saved holds NaN or infinity; nothing was written.
    #[error(
        "{path}: expected finite values in what adapts it, found NaN or infinity; nothing was saved"
    )]
    NonFiniteAdapter {
        /// The layer.
        path: String,
    },
    /// The singular values of a matrix were not found.
    #[error(
        "expected the singular values of a {rows} x {columns} matrix, found no convergence; are its values finite?"
    )]
    NoConvergence {
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        columns: usize,
    },
    /// A file or folder could not be read or written.
    #[error("{path}: cannot be read or written: {source}; check the path", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system answered.
        source: std::io::Error,
    },
    /// A folder that should be new is there already.
    #[error("{path} exists already; choose another folder or remove it", path = path.display())]
    Exists {
        /// The folder.
        path: PathBuf,
    },
    /// A device's name gives no device.
    #[error("device '{name}'{}: {problem}", variable.map_or_else(String::new, |name| format!(" of the variable {name}")))]
    Device {
        /// The name, as it was given.
        name: String,
        /// The environment variable that held it, where it came from one.
        variable: Option<&'static str>,
        /// What is wrong with it.
        problem: DeviceProblem,
    },
    /// A device cannot compute in a floating-point type.
    #[error(
        "device {device}: expected weights in {}, found {}{}; choose one of those, or another device",
        supported.iter().map(|dtype| dtype.name()).collect::<Vec<_>>().join(" or "),
        dtype.name(),
        if path.is_empty() { String::new() } else { format!(" for {path}") }
    )]
    DeviceDtype {
        /// The layer; empty where none is meant, or one that stands alone.
        path: String,
        /// The device's name.
        device: String,
        /// The type that was asked for.
        dtype: DType,
        /// The types that it has.
        supported: Vec<DType>,
    },
    /// An adapter file is damaged, or is not what its name says.
    #[error("{path}: {place}: expected {expected}, found {found}", path = path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where in it: a field, a tensor.
        place: String,
        /// What the format asks for there.
        expected: String,
        /// What stands there.
        found: String,
    },
    /// An adapter's config asks for something that would change the mathematics and is not known here.
    #[error("{path}: {field} = {found} is not supported; {supported}", path = path.display())]
    UnsupportedField {
        /// The file.
        path: PathBuf,
        /// The field.
        field: String,
        /// Its value.
        found: String,
        /// What would work.
        supported: String,
    },
    /// An adapter's config does not fit the model, or contradicts itself; nothing was changed.
    #[error("{path}: {}; was it made for another model?", sentences(problems), path = path.display())]
    AdapterConfig {
        /// The file.
        path: PathBuf,
        /// All that is wrong with it.
        problems: Vec<ConfigProblem>,
    },
    /// An adapter's file says that it was made over other weights; nothing was changed.
    #[error("{path}: expected an adapter for this base, found one that was made over other weights (another model, or another quantisation or dtype of it); to use it all the same, load it without checking the base", path = path.display())]
    OtherBase {
        /// The adapter's folder.
        path: PathBuf,
    },
    /// Adapters that some readers of their files cannot read, or would read as another function; nothing
    /// was written.
    #[error("{}", portability_sentences(problems))]
    NotPortable {
        /// Every rule that is broken.
        problems: Vec<PortabilityProblem>,
    },
    /// An adapter's tensors do not fit the model; nothing was changed.
    #[error("{path}: the adapter does not fit the model: {}; was it made for another?", first_few(problems, "; "), path = path.display())]
    AdapterMismatch {
        /// The adapter's folder.
        path: PathBuf,
        /// One line for each missing, unused or mis-shaped tensor.
        problems: Vec<String>,
    },
}

/// A layer's path, or what stands for one that has none.
fn place(path: &str) -> &str {
    if path.is_empty() { "this layer or model" } else { path }
}

fn known(names: &[String]) -> String {
    match names {
        [] => "there are none yet".to_owned(),
        names => format!("there are '{}'", names.join("', '")),
    }
}

/// A wrong model makes hundreds of problems, of which a few tell the story.
pub(crate) fn first_few(problems: &[String], between: &str) -> String {
    const SHOWN: usize = 4;
    let mut text = problems[..problems.len().min(SHOWN)].join(between);
    if problems.len() > SHOWN {
        text.push_str(&format!("{between}and {} more", problems.len() - SHOWN));
    }
    text
}
