//! From a model's name to a folder that holds it.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::cache::{CachedRepository, is_commit, missing_files, shards};
use super::client::{Client, Listing, Refusal, RemoteFile, TIMEOUT};
use super::{HubModel, HubProblem};
use crate::error::{Error, ErrorKind, Result};
use crate::hf::{CONFIG_FILE, GENERATION_CONFIG_FILE, SHARDS_FILE, WEIGHTS_FILE};
use crate::tokenizer::TOKENIZER_FILE;

/// What is fetched beside the weights where the repository has it. Weights come last, so that a folder
/// with weights is whole.
const SMALL_FILES: [&str; 6] = [
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];

/// Where models are fetched from, and where they are kept. Only with the feature `hub`.
///
/// The cache is that of Python's `huggingface_hub`, and each uses what the other has fetched.
///
/// A branch or tag is asked for with one request, whether it is still at the same commit; where the
/// server cannot be reached, the commit that was fetched last is used. A commit that is in the cache needs no
/// request. Files that hold programs (pickled weights) are never fetched. Each file is checked
/// against the digest in the server's list, and what was broken off goes on where it ended.
///
/// ```no_run
/// use lora_models::{Checkpoint, Hub};
///
/// let folder = Hub::from_env()?.fetch("HuggingFaceTB/SmolLM2-135M-Instruct")?;
/// println!("{:?}", Checkpoint::open(folder)?.config);
/// # Ok::<(), lora_models::Error>(())
/// ```
#[derive(Clone)]
#[non_exhaustive]
pub struct Hub {
    /// The server's address, `https://huggingface.co` or one that answers like it.
    pub endpoint: String,
    /// The folder in which models are kept.
    pub cache: PathBuf,
    /// Who asks, for private and gated models. It is sent to `endpoint` only.
    pub token: Option<String>,
    /// Whether only the cache is to be used.
    pub offline: bool,
    /// How long the server may be silent.
    pub timeout: Duration,
    /// A file with the certificates to trust, in PEM format, instead of those that browsers do.
    pub certificates: Option<PathBuf>,
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub")
            .field("endpoint", &self.endpoint)
            .field("cache", &self.cache)
            .field("token", &self.token.as_ref().map(|_| "..."))
            .field("offline", &self.offline)
            .finish_non_exhaustive()
    }
}

/// How far the download of one file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Download<'a> {
    /// The file, by its path in the repository.
    pub file: &'a str,
    /// Bytes that are here.
    pub done: u64,
    /// Bytes of the file.
    pub total: u64,
}

impl Hub {
    /// The public Hub, without a token.
    pub fn new(cache: impl Into<PathBuf>) -> Self {
        Self {
            endpoint: "https://huggingface.co".to_owned(),
            cache: cache.into(),
            token: None,
            offline: false,
            timeout: TIMEOUT,
            certificates: None,
        }
    }

    /// The Hub as the environment describes it, in the variables of `huggingface_hub`:
    ///
    /// | variable | for | else |
    /// |---|---|---|
    /// | `HF_ENDPOINT` | the server | `https://huggingface.co` |
    /// | `HF_HUB_CACHE` | the cache | `hub` in `HF_HOME` |
    /// | `HF_HOME` | the cache and the token's file | `huggingface` in `XDG_CACHE_HOME` or `~/.cache` |
    /// | `HF_TOKEN` | the token | the file `HF_TOKEN_PATH`, or `token` in `HF_HOME` |
    /// | `HF_HUB_OFFLINE` | `1`, `true`, `yes` or `on`: use the cache only | the network is used |
    /// | `HF_HUB_DOWNLOAD_TIMEOUT` | seconds of silence before a server is given up | 10 |
    ///
    /// and in `SSL_CERT_FILE` (certificates to trust). Proxies are taken from `HTTPS_PROXY`, `HTTP_PROXY`,
    /// `ALL_PROXY` and `NO_PROXY`.
    ///
    /// # Errors
    /// When there is no home folder to keep models in; when the timeout is no number.
    pub fn from_env() -> Result<Self> {
        Self::from_variables(|name| std::env::var_os(name), std::env::home_dir())
    }

    fn from_variables(
        variable: impl Fn(&str) -> Option<OsString>,
        home: Option<PathBuf>,
    ) -> Result<Self> {
        let argument = |what, expected: &str, found: &str| {
            Error::from(ErrorKind::Argument {
                what,
                expected: expected.to_owned(),
                found: found.to_owned(),
            })
        };
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let path = |name: &str| set(name).map(PathBuf::from);
        let text = |name: &str| set(name).map(|value| value.to_string_lossy().trim().to_owned());

        let hf_home = path("HF_HOME").or_else(|| {
            let caches = path("XDG_CACHE_HOME").or_else(|| home.map(|home| home.join(".cache")))?;
            Some(caches.join("huggingface"))
        });
        let cache = path("HF_HUB_CACHE").or_else(|| Some(hf_home.as_ref()?.join("hub")));
        let Some(cache) = cache else {
            return Err(argument("HF_HOME", "a folder for models", "none, and no home folder"));
        };
        let token_file = path("HF_TOKEN_PATH").or_else(|| Some(hf_home.as_ref()?.join("token")));
        let token = text("HF_TOKEN").or_else(|| std::fs::read_to_string(token_file?).ok());
        let mut hub = Self::new(cache);
        hub.token = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        if let Some(endpoint) = text("HF_ENDPOINT") {
            hub.endpoint = endpoint;
        }
        hub.offline = text("HF_HUB_OFFLINE").is_some_and(|value| {
            ["1", "true", "yes", "on"].contains(&value.to_ascii_lowercase().as_str())
        });
        if let Some(value) = text("HF_HUB_DOWNLOAD_TIMEOUT") {
            let seconds = value.parse().ok().filter(|seconds| (1..=86_400).contains(seconds));
            hub.timeout = Duration::from_secs(seconds.ok_or_else(|| {
                argument("HF_HUB_DOWNLOAD_TIMEOUT", "seconds, 1 to 86400", &value)
            })?);
        }
        hub.certificates = path("SSL_CERT_FILE");
        Ok(hub)
    }

    /// Fetches what is not in the cache of a model: `owner/name`, perhaps with `@revision`, or
    /// `owner/name/file.gguf`. Gives the folder, or the GGUF file, for
    /// [`Checkpoint::open`](crate::Checkpoint::open).
    ///
    /// Of a repository these files are taken: `config.json`, `generation_config.json`, `tokenizer.json`,
    /// `tokenizer_config.json`, `special_tokens_map.json`, `chat_template.jinja`, and `model.safetensors` or the
    /// files that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// [`ErrorKind::Hub`] says what is wrong with the model or with the way to it. When the cache cannot
    /// be written; when an address, a token or the file of certificates is none.
    pub fn fetch(&self, model: &str) -> Result<PathBuf> {
        self.fetch_with(model, |_| {})
    }

    /// [`Hub::fetch`], telling how far each download is: at its start, and with every piece.
    ///
    /// # Errors
    /// As [`Hub::fetch`].
    pub fn fetch_with(
        &self,
        model: &str,
        mut on_progress: impl FnMut(&Download<'_>),
    ) -> Result<PathBuf> {
        let model: HubModel = model.parse()?;
        let cached = CachedRepository::new(&self.cache, model.repository());
        let path = |commit: &str| match model.file() {
            Some(file) => cached.snapshot(commit).join(file),
            None => cached.snapshot(commit),
        };
        let problem = |problem| Error::from(ErrorKind::Hub { model: model.to_string(), problem });
        // What is there of the commit that the revision had last.
        let last = || {
            // Without a commit nothing is there.
            let commit = cached.commit(model.revision()).unwrap_or_default();
            match missing_files(&cached.snapshot(&commit), model.file()) {
                missing if missing.is_empty() => Ok(path(&commit)),
                missing => Err(missing),
            }
        };
        if self.offline {
            let cache = self.cache.clone();
            return last().map_err(|missing| problem(HubProblem::Offline { cache, missing }));
        }
        if is_commit(model.revision())
            && let Ok(path) = last()
        {
            return Ok(path);
        }

        let client = Client::new(self)?;
        let listing = match client.listing(&model) {
            Ok(listing) => listing,
            Err(Refusal::Outage(reason)) => {
                let endpoint = self.endpoint.clone();
                return last().map_err(|missing| {
                    problem(HubProblem::Unreachable { endpoint, reason, missing })
                });
            }
            Err(Refusal::Problem(refused)) => return Err(problem(refused)),
        };
        let commit = listing.commit.as_str();
        let mut add = |file: &RemoteFile| {
            cached.add(commit, file, |part, path| {
                client.complete(&model, commit, file, (part, path), &mut on_progress)
            })
        };
        for file in wanted(&listing, &model).map_err(problem)? {
            add(&file)?;
            if file.path == SHARDS_FILE {
                let names = shards(&cached.snapshot(commit).join(SHARDS_FILE))?;
                for file in listed(&listing, &names).map_err(problem)? {
                    add(&file)?;
                }
            }
        }
        cached.set_commit(model.revision(), commit)?;
        Ok(path(commit))
    }
}

/// The files of a model; those that the shards' index names are not known yet.
fn wanted(listing: &Listing, model: &HubModel) -> Result<Vec<RemoteFile>, HubProblem> {
    let ggufs = || {
        let names = listing.names().filter(|name| name.to_ascii_lowercase().ends_with(".gguf"));
        names.map(str::to_owned).collect::<Vec<_>>()
    };
    if let Some(name) = model.file() {
        return match listing.file(name)? {
            Some(file) => Ok(vec![file]),
            None => Err(HubProblem::Files {
                missing: vec![name.to_owned()],
                advice: match ggufs() {
                    none if none.is_empty() => "it has no GGUF file at all".to_owned(),
                    names => format!("its GGUF files are {}", names.join(", ")),
                },
            }),
        };
    }
    let mut files = Vec::new();
    let mut missing = Vec::new();
    for name in SMALL_FILES {
        match listing.file(name)? {
            Some(file) => files.push(file),
            None if [CONFIG_FILE, TOKENIZER_FILE].contains(&name) => missing.push(name.to_owned()),
            None => {}
        }
    }
    match (listing.file(WEIGHTS_FILE)?, listing.file(SHARDS_FILE)?) {
        (Some(file), _) | (None, Some(file)) => files.push(file),
        (None, None) => missing.push(format!("{WEIGHTS_FILE} or {SHARDS_FILE}")),
    }
    if missing.is_empty() {
        return Ok(files);
    }
    let pickled = [".bin", ".pt", ".pth", ".ckpt"];
    let advice = match ggufs().first() {
        Some(file) => {
            format!("name one of its GGUF files, such as {}/{file}", model.repository())
        }
        None if listing.names().any(|name| pickled.iter().any(|end| name.ends_with(end))) => {
            "its pickled weights can hold programs and are not read; have them converted to safetensors"
                .to_owned()
        }
        None => "choose a repository with the whole model".to_owned(),
    };
    Err(HubProblem::Files { missing, advice })
}

fn listed(listing: &Listing, names: &BTreeSet<String>) -> Result<Vec<RemoteFile>, HubProblem> {
    let mut files = Vec::new();
    let mut missing = Vec::new();
    for name in names {
        match listing.file(name)? {
            Some(file) => files.push(file),
            None => missing.push(name.clone()),
        }
    }
    match missing.is_empty() {
        true => Ok(files),
        false => Err(HubProblem::Files { missing, advice: format!("{SHARDS_FILE} names them") }),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn hub(variables: &[(&str, &str)]) -> Result<Hub> {
        let find = |name: &str| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into())
        };
        Hub::from_variables(find, Some(Path::new("/home/me").to_owned()))
    }

    #[test]
    fn variables_are_those_of_huggingface_hub() {
        let plain = hub(&[]).unwrap();
        assert_eq!(plain.endpoint, "https://huggingface.co");
        assert_eq!(plain.cache, Path::new("/home/me/.cache/huggingface/hub"));
        assert_eq!((plain.token.as_deref(), plain.offline), (None, false));
        for (variables, cache) in [
            (&[("XDG_CACHE_HOME", "/x")][..], "/x/huggingface/hub"),
            (&[("XDG_CACHE_HOME", "/x"), ("HF_HOME", "/h")], "/h/hub"),
            (&[("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")], "/c"),
            (&[("HF_HOME", ""), ("HF_HUB_CACHE", "")], "/home/me/.cache/huggingface/hub"),
        ] {
            assert_eq!(hub(variables).unwrap().cache, Path::new(cache));
        }
        let other = hub(&[
            ("HF_ENDPOINT", "https://mirror.example/"),
            ("HF_HUB_OFFLINE", "TRUE"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "60"),
            ("SSL_CERT_FILE", "/certificates.pem"),
        ])
        .unwrap();
        assert_eq!((other.endpoint.as_str(), other.offline), ("https://mirror.example/", true));
        assert_eq!(other.timeout, Duration::from_secs(60));
        assert_eq!(other.certificates.as_deref(), Some(Path::new("/certificates.pem")));
        let error = hub(&[("HF_HUB_DOWNLOAD_TIMEOUT", "soon")]).unwrap_err().to_string();
        assert!(error.contains("HF_HUB_DOWNLOAD_TIMEOUT: expected seconds"), "{error}");
        let error = Hub::from_variables(|_| None, None).unwrap_err().to_string();
        assert!(error.contains("HF_HOME"), "{error}");
    }

    #[test]
    fn the_token_is_that_of_the_variable_or_of_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().to_str().unwrap();
        let file = folder.path().join("other");
        std::fs::write(folder.path().join("token"), "hf_file\n").unwrap();
        std::fs::write(&file, " hf_other ").unwrap();
        let token = |more: &[(&str, &str)]| {
            hub(&[&[("HF_HOME", home)], more].concat()).unwrap().token.unwrap()
        };
        assert_eq!(token(&[]), "hf_file");
        assert_eq!(token(&[("HF_TOKEN_PATH", file.to_str().unwrap())]), "hf_other");
        assert_eq!(token(&[("HF_TOKEN", "hf_variable")]), "hf_variable");

        let hub = hub(&[("HF_TOKEN", "hf_secret")]).unwrap();
        assert!(!format!("{hub:?}").contains("secret"));
    }
}
