//! How a model of the Hub is named.

use std::fmt;
use std::str::FromStr;

use super::HubProblem;
use crate::error::{Error, ErrorKind};

/// A model of the Hugging Face Hub: `owner/name`, with `@revision` where it is not the branch `main`, and
/// with `/file.gguf` where it is one file of a repository of GGUF files.
///
/// ```
/// use lora_models::HubModel;
///
/// let model: HubModel = "HuggingFaceTB/SmolLM2-135M-Instruct@v1.0".parse()?;
/// assert_eq!((model.repository(), model.revision()), ("HuggingFaceTB/SmolLM2-135M-Instruct", "v1.0"));
/// let model: HubModel = "owner/name-GGUF/name-Q4_0.gguf".parse()?;
/// assert_eq!((model.file(), model.revision()), (Some("name-Q4_0.gguf"), "main"));
/// assert!("models/name.gguf".parse::<HubModel>().is_err(), "it is the path of a file");
/// # Ok::<(), lora_models::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HubModel {
    repository: String,
    revision: Option<String>,
    file: Option<String>,
}

impl HubModel {
    /// `owner/name`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// A branch, a tag or a commit; `main` where none was given.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }

    /// The one file that is meant, by its path in the repository.
    pub fn file(&self) -> Option<&str> {
        self.file.as_deref()
    }
}

impl fmt::Display for HubModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repository)?;
        if let Some(file) = &self.file {
            write!(f, "/{file}")?;
        }
        if let Some(revision) = &self.revision {
            write!(f, "@{revision}")?;
        }
        Ok(())
    }
}

impl FromStr for HubModel {
    type Err = Error;

    /// Tells by the form alone whether this can be a model's name; the Hub is not asked.
    fn from_str(text: &str) -> Result<Self, Error> {
        parse(text).ok_or_else(|| {
            ErrorKind::Hub { model: text.to_owned(), problem: HubProblem::Name }.into()
        })
    }
}

fn parse(text: &str) -> Option<HubModel> {
    let (path, revision) = match text.split_once('@') {
        Some((path, revision)) => (path, Some(revision)),
        None => (text, None),
    };
    let mut parts = path.splitn(3, '/');
    let (owner, name, file) = (parts.next()?, parts.next()?, parts.next());
    let is_gguf = |name: &str| name.to_ascii_lowercase().ends_with(".gguf");
    let fits = is_name(owner)
        && is_name(name)
        // A repository is not called so; it is a file's path that was misspelt.
        && !is_gguf(name)
        && file.is_none_or(|file| is_gguf(file) && is_plain_path(file))
        && revision.is_none_or(|revision| is_plain_path(revision) && revision.bytes().all(is_word));
    fits.then(|| HubModel {
        repository: format!("{owner}/{name}"),
        revision: revision.map(str::to_owned),
        file: file.map(str::to_owned),
    })
}

/// The Hub's rule for owners and repositories.
fn is_name(name: &str) -> bool {
    let ends = |byte: Option<&u8>| byte.is_some_and(|byte| !b"-.".contains(byte));
    (1..=96).contains(&name.len())
        && name.bytes().all(|byte| is_word(byte) && byte != b'/')
        && ends(name.as_bytes().first())
        && ends(name.as_bytes().last())
        && !name.contains("--")
        && !name.contains("..")
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-_./".contains(&byte)
}

/// Whether a path, joined to a folder, leads to something inside it on every system.
pub(super) fn is_plain_path(path: &str) -> bool {
    let forbidden = |byte: u8| byte.is_ascii_control() || b"\\:".contains(&byte);
    path.split('/').all(|part| !matches!(part, "" | "." | "..")) && !path.bytes().any(forbidden)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_print_as_they_were_written() {
        for text in [
            "owner/name",
            "0-1/Llama_3.2-1B",
            "owner/name@refs/pr/3",
            "owner/name@0123456789abcdef0123456789abcdef01234567",
            "owner/name/folder/file.Q4_0.gguf",
            "owner/name/file.GGUF@v1",
        ] {
            assert_eq!(text.parse::<HubModel>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for text in [
            "",
            "name",
            "/owner/name",
            "./name",
            "../name",
            "~/name",
            "owner/",
            "/name",
            "owner//name",
            "owner/name/",
            "C:\\models\\name",
            "models/file.gguf",
            "owner/name/config.json",
            "owner/name/../file.gguf",
            "owner/name/a\\b.gguf",
            "owner/-name",
            "owner/name.",
            "owner/na--me",
            "owner/a name",
            "owner/name@",
            "owner/name@..",
            "owner/name@/main",
            "owner/name@a b",
            "owner/name@a@b",
        ] {
            let error = text.parse::<HubModel>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("{text}: expected a")), "{error}");
        }
    }
}
