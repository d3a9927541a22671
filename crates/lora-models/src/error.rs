//! What can go wrong when a model is read, written or spoken to.

use std::path::{Path, PathBuf};

use crate::hub::HubProblem;

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

    pub(crate) fn malformed(
        path: impl AsRef<Path>,
        place: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Self {
        ErrorKind::Malformed {
            path: path.as_ref().to_owned(),
            place: shown(&place.into()),
            expected: expected.into(),
            found: shown(&found.into()),
        }
        .into()
    }

    /// The tensors that are not as they should be; few of them are shown, for a wrong config can make
    /// hundreds.
    pub(crate) fn weights(path: impl AsRef<Path>, mut problems: Vec<String>) -> Self {
        const SHOWN: usize = 4;
        let more = problems.len().saturating_sub(SHOWN);
        problems.truncate(SHOWN);
        problems.iter_mut().for_each(|problem| *problem = shown(problem));
        if more > 0 {
            problems.push(format!("and {more} more"));
        }
        ErrorKind::Weights { path: path.as_ref().to_owned(), problems }.into()
    }

    pub(crate) fn unsupported(
        path: impl AsRef<Path>,
        what: impl Into<String>,
        found: impl Into<String>,
        supported: impl Into<String>,
    ) -> Self {
        ErrorKind::Unsupported {
            path: path.as_ref().to_owned(),
            what: shown(&what.into()),
            found: shown(&found.into()),
            supported: supported.into(),
        }
        .into()
    }
}

/// What stands in a file as a message may have it: a name that someone else wrote must not begin a new
/// line, colour a terminal or fill it.
///
/// Of a long text the end is kept too, for there stand the line and the column of a damaged file.
pub(crate) fn shown(text: &str) -> String {
    const START: usize = 200;
    const END: usize = 100;
    // Beside the control characters those that end a line or turn the direction of what follows.
    let is_hidden =
        |c: char| c.is_control() || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let escaped = |text: &str| -> String {
        text.chars()
            .map(|c| match is_hidden(c) {
                true => c.escape_default().to_string(),
                false => c.to_string(),
            })
            .collect()
    };
    let place = |count: usize| text.char_indices().nth(count).map(|(place, _)| place);
    let tail = text.char_indices().rev().nth(END - 1).map(|(place, _)| place);
    match (place(START), place(START + END), tail) {
        (Some(start), Some(_), Some(end)) => {
            format!("{}...{}", escaped(&text[..start]), escaped(&text[end..]))
        }
        _ => escaped(text),
    }
}

impl From<lora_core::Error> for Error {
    fn from(source: lora_core::Error) -> Self {
        ErrorKind::Lora(source).into()
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
    /// A file or folder could not be read or written.
    #[error("{path}: cannot be read or written: {source}; check the path", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system answered.
        source: std::io::Error,
    },
    /// What should be a model is none.
    #[error(
        "{path}: expected a Hugging Face folder (config.json, model.safetensors, tokenizer.json) or a \
         GGUF file, found {found}; check the path",
        path = path.display()
    )]
    NotAModel {
        /// The path.
        path: PathBuf,
        /// What is there.
        found: String,
    },
    /// A file is damaged, or is not what its name says.
    #[error("{path}: {place}: expected {expected}, found {found}", path = path.display())]
    Malformed {
        /// The file or folder.
        path: PathBuf,
        /// Where in it: a key, a tensor, a byte offset.
        place: String,
        /// What the format asks for there.
        expected: String,
        /// What stands there.
        found: String,
    },
    /// A file is well-formed, but asks for something that this crate does not have.
    #[error("{path}: {what} '{found}' is not supported; supported: {supported}", path = path.display())]
    Unsupported {
        /// The file or folder.
        path: PathBuf,
        /// What kind of thing: `model_type`, a tensor type, an activation.
        what: String,
        /// What the file asks for.
        found: String,
        /// What would work.
        supported: String,
    },
    /// The tensors of a checkpoint are not those of the model that its config describes.
    #[error("{path}: the tensors do not fit the model that its config describes: {problems}", path = path.display(), problems = problems.join("; "))]
    Weights {
        /// The file or folder.
        path: PathBuf,
        /// One line for each missing, unused or mis-shaped tensor.
        problems: Vec<String>,
    },
    /// The tokenizer could not be built, or could not encode or decode.
    #[error("{place}: {reason}")]
    Tokenizer {
        /// The file, or the operation.
        place: String,
        /// What the `tokenizers` crate answered.
        reason: String,
    },
    /// A chat template could not be parsed or rendered.
    #[error("{place}: {reason}")]
    Template {
        /// The template, and the file that holds it where there is one.
        place: String,
        /// The line, what is wrong there, and what to do.
        reason: String,
        /// What the template engine answered, where it was asked.
        source: Option<minijinja::Error>,
    },
    /// A chat template is well, but does not take these messages, and says so itself.
    #[error("the chat template refuses this conversation: {reason}")]
    Refused {
        /// The template's own words.
        reason: String,
    },
    /// A folder could not be written.
    #[error(transparent)]
    Lora(lora_core::Error),
    /// A model of the Hugging Face Hub has no such name, or cannot be fetched.
    #[error("{model}: {problem}")]
    Hub {
        /// The name, as it was given.
        model: String,
        /// What is wrong with it.
        problem: HubProblem,
    },
    /// A prompt or a setting cannot be used with this model.
    #[error("{what}: expected {expected}, found {found}")]
    Argument {
        /// The argument.
        what: &'static str,
        /// What it may be.
        expected: String,
        /// What was given.
        found: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_files_hold_is_shown_on_one_line_and_not_at_length() {
        assert_eq!(shown("llama\nx\u{1b}[31m\u{202e}"), r"llama\nx\u{1b}[31m\u{202e}");
        assert_eq!(shown(r#"'é' "a\b""#), r#"'é' "a\b""#); // as it was
        let whole = "é".repeat(300);
        assert_eq!(shown(&whole), whole);
        let long = format!("{}at line 3", "é".repeat(10_000));
        let short = shown(&long);
        assert!(short.ends_with("at line 3") && short.starts_with("éé"), "{short}");
        assert_eq!(short.chars().count(), 303);
    }

    #[test]
    fn errors_show_what_files_hold_on_one_line() {
        let bad = "a\nb\u{1b}[31m";
        for error in [
            Error::malformed("config.json", bad, "a name", bad),
            Error::unsupported("config.json", bad, bad, "llama"),
            Error::weights("model.safetensors", vec![bad.to_owned()]),
        ] {
            let message = error.to_string();
            assert!(!message.contains(char::is_control), "{message:?}");
            assert!(message.contains(r"a\nb\u{1b}[31m"), "{message}");
        }
    }
}
