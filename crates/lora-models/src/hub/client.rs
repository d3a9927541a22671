//! What is asked of the Hub: a repository's list of files, and a file's bytes.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

use ring::digest;
use serde::Deserialize;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{Response, Uri};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

use super::cache::{is_commit, is_hex};
use super::{Download, Hub, HubModel, HubProblem};
use crate::error::{Error, ErrorKind, Result};

/// A file as the Hub lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RemoteFile {
    /// In the repository, with `/`.
    pub(super) path: String,
    pub(super) size: u64,
    pub(super) digest: Digest,
}

/// What identifies a file's content, in hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Digest {
    /// Of large files.
    Sha256(String),
    /// Of the others, which are kept in Git: SHA-1 of `blob SIZE\0` and the content.
    GitBlob(String),
}

impl Digest {
    pub(super) fn hex(&self) -> &str {
        match self {
            Self::Sha256(hex) | Self::GitBlob(hex) => hex,
        }
    }

    /// The digest of this kind of what a file holds.
    fn of(&self, file: &mut File) -> std::io::Result<String> {
        let mut context = match self {
            Self::Sha256(_) => digest::Context::new(&digest::SHA256),
            Self::GitBlob(_) => {
                let mut context = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
                context.update(format!("blob {}\0", file.metadata()?.len()).as_bytes());
                context
            }
        };
        file.seek(SeekFrom::Start(0))?;
        let mut buffer = vec![0; BUFFER];
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                count => context.update(&buffer[..count]),
            }
        }
        Ok(context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

/// A repository at a revision.
#[derive(Debug)]
pub(super) struct Listing {
    pub(super) commit: String,
    files: Vec<ListedFile>,
    url: String,
}

impl Listing {
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.files.iter().map(|file| file.path.as_str())
    }

    /// A file of the list, where it has it.
    pub(super) fn file(&self, path: &str) -> Result<Option<RemoteFile>, HubProblem> {
        let Some(file) = self.files.iter().find(|file| file.path == path) else {
            return Ok(None);
        };
        let lfs = file.lfs.as_ref();
        let digest = match (lfs, &file.blob_id) {
            (Some(lfs), _) if is_hex(&lfs.sha256, 64) => Some(Digest::Sha256(lfs.sha256.clone())),
            (None, Some(id)) if is_hex(id, 40) => Some(Digest::GitBlob(id.clone())),
            _ => None,
        };
        match (lfs.map(|lfs| lfs.size).or(file.size), digest) {
            (Some(size), Some(digest)) => {
                Ok(Some(RemoteFile { path: path.to_owned(), size, digest }))
            }
            _ => Err(HubProblem::Answer {
                url: self.url.clone(),
                expected: format!("the size and the digest of {path}"),
                found: "none".to_owned(),
            }),
        }
    }
}

#[derive(Deserialize)]
struct ListingAnswer {
    sha: String,
    siblings: Vec<ListedFile>,
}

#[derive(Debug, Deserialize)]
struct ListedFile {
    #[serde(rename = "rfilename")]
    path: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Debug, Deserialize)]
struct Lfs {
    sha256: String,
    size: u64,
}

/// Bytes read at once.
const BUFFER: usize = 1 << 16;

/// Far above any list of files.
const LONGEST_LISTING: u64 = 1 << 26;

/// What can be asked of one server.
pub(super) struct Client<'a> {
    agent: Agent,
    endpoint: &'a str,
    token: Option<&'a str>,
}

impl<'a> Client<'a> {
    pub(super) fn new(hub: &'a Hub) -> Result<Self> {
        let argument = |what, expected: &str, found: String| {
            Error::from(ErrorKind::Argument { what, expected: expected.to_owned(), found })
        };
        let endpoint = hub.endpoint.trim_end_matches('/');
        let uri: Option<Uri> = endpoint.parse().ok();
        let scheme = uri.as_ref().and_then(Uri::scheme_str);
        let (Some(host), Some("http" | "https")) = (uri.as_ref().and_then(Uri::host), scheme)
        else {
            let expected = "an address such as https://huggingface.co";
            return Err(argument("HF_ENDPOINT", expected, format!("'{endpoint}'")));
        };
        let token = hub.token.as_deref();
        if token.is_some_and(|token| !token.bytes().all(|byte| byte.is_ascii_graphic())) {
            let found = "a space or another character that cannot be sent".to_owned();
            return Err(argument("HF_TOKEN", "a token of visible ASCII characters", found));
        }

        let timeout = Some(hub.timeout);
        let mut settings = Agent::config_builder()
            .http_status_as_error(false)
            // A token goes to the server that it is for, and to no store of files behind it.
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .https_only(scheme == Some("https"))
            .user_agent(concat!("lora-models/", env!("CARGO_PKG_VERSION")))
            .timeout_resolve(timeout)
            .timeout_connect(timeout)
            .timeout_recv_response(timeout)
            .timeout_per_read(timeout)
            .timeout_per_write(timeout)
            .tls_config(TlsConfig::builder().root_certs(root_certs(hub)?).build());
        // A proxy leads away from this machine.
        if matches!(host, "localhost" | "127.0.0.1" | "[::1]") {
            settings = settings.proxy(None);
        }
        Ok(Self { agent: settings.build().into(), endpoint, token })
    }

    /// The files of a model's repository.
    pub(super) fn listing(&self, model: &HubModel) -> Result<Listing, Refusal> {
        let (repository, revision) = (model.repository(), escaped(model.revision(), false));
        let url =
            format!("{}/api/models/{repository}/revision/{revision}?blobs=true", self.endpoint);
        let mut response = self.get(&url, 0).map_err(Refusal::Outage)?;
        if response.status() != 200 {
            return Err(self.refusal(&url, &response, model));
        }
        let answer = |found: String| {
            let expected = "the list of a model's files".to_owned();
            Refusal::Problem(HubProblem::Answer { url: url.clone(), expected, found })
        };
        let text = response.body_mut().with_config().limit(LONGEST_LISTING).read_to_string();
        let text = text.map_err(|error| Refusal::Outage(error.to_string()))?;
        let ListingAnswer { sha, siblings } =
            serde_json::from_str(&text).map_err(|error| answer(error.to_string()))?;
        if !is_commit(&sha) {
            return Err(answer(format!("the commit '{sha}'")));
        }
        Ok(Listing { commit: sha, files: siblings, url })
    }

    /// Brings what is still missing of a file to the end of `part`, and checks the whole.
    ///
    /// A connection that breaks off is taken up again as long as each brings something.
    pub(super) fn complete(
        &self,
        model: &HubModel,
        commit: &str,
        file: &RemoteFile,
        (part, path): (&mut File, &Path),
        on_progress: &mut dyn FnMut(&Download<'_>),
    ) -> Result<()> {
        let on_disk = |source| Error::io(path, source);
        let problem = |problem| Error::from(ErrorKind::Hub { model: model.to_string(), problem });
        let damaged = |expected: String, found: String| {
            problem(HubProblem::Damaged { file: file.path.clone(), expected, found })
        };
        let escaped_path = escaped(&file.path, true);
        let url =
            format!("{}/{}/resolve/{commit}/{escaped_path}", self.endpoint, model.repository());
        let mut done = part.metadata().map_err(on_disk)?.len();
        if done > file.size {
            done = 0;
        }
        let mut most = done;
        while done < file.size {
            part.set_len(done).map_err(on_disk)?;
            part.seek(SeekFrom::Start(done)).map_err(on_disk)?;
            let end = self.append(&url, model, file, part, &mut done, on_progress);
            let reason = match end {
                Ok(()) => "the connection ended".to_owned(),
                Err(Broken::Connection(reason)) => reason,
                Err(Broken::Disk(source)) => return Err(on_disk(source)),
                Err(Broken::Refused(refusal)) => return Err(problem(refusal)),
            };
            if done < file.size && done <= most {
                let (file, total) = (file.path.clone(), file.size);
                return Err(problem(HubProblem::Interrupted { file, done, total, reason }));
            }
            most = done;
        }

        let found = file.digest.of(part).map_err(on_disk)?;
        if done > file.size || found != file.digest.hex() {
            part.set_len(0).map_err(on_disk)?;
            return Err(match done == file.size {
                true => damaged(format!("the digest {}", file.digest.hex()), found),
                false => damaged(format!("{} bytes", file.size), "more".to_owned()),
            });
        }
        Ok(())
    }

    fn append(
        &self,
        url: &str,
        model: &HubModel,
        file: &RemoteFile,
        part: &mut File,
        done: &mut u64,
        on_progress: &mut dyn FnMut(&Download<'_>),
    ) -> Result<(), Broken> {
        let mut response = self.get(url, *done).map_err(Broken::Connection)?;
        match response.status().as_u16() {
            206 => {}
            // The server sends the whole, whatever was asked for.
            200 => {
                *done = 0;
                part.set_len(0).and_then(|()| part.rewind()).map_err(Broken::Disk)?;
            }
            _ => {
                return Err(match self.refusal(url, &response, model) {
                    Refusal::Outage(reason) => Broken::Connection(reason),
                    Refusal::Problem(problem) => Broken::Refused(problem),
                });
            }
        }
        let mut report = |done| on_progress(&Download { file: &file.path, done, total: file.size });
        report(*done);
        let mut body = response.body_mut().as_reader().take(most_bytes(file.size, *done));
        let mut buffer = vec![0; BUFFER];
        loop {
            match body.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => {
                    part.write_all(&buffer[..count]).map_err(Broken::Disk)?;
                    *done += count as u64;
                    report(*done);
                }
                Err(error) => return Err(Broken::Connection(error.to_string())),
            }
        }
    }

    /// Asks for what is at an address, from byte `from` on. The error is why there is no answer.
    fn get(&self, url: &str, from: u64) -> Result<Response<Body>, String> {
        let mut request = self.agent.get(url);
        if let Some(token) = self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header("Range", format!("bytes={from}-"));
        }
        request.call().map_err(|error| error.to_string())
    }

    /// What an answer other than the one that was asked for means.
    fn refusal(&self, url: &str, response: &Response<Body>, model: &HubModel) -> Refusal {
        let header = |name: &str| {
            response.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
        };
        let (code, message) = (header("X-Error-Code"), header("X-Error-Message"));
        let status = response.status();
        let said = if message.is_empty() { status.to_string() } else { message.to_owned() };
        let (endpoint, with_token) = (self.endpoint.to_owned(), self.token.is_some());
        let problem = match (status.as_u16(), code) {
            (_, "GatedRepo") => {
                HubProblem::Gated { page: format!("{endpoint}/{}", model.repository()), with_token }
            }
            (_, "RevisionNotFound") => {
                HubProblem::Revision { revision: model.revision().to_owned() }
            }
            (_, "RepoNotFound") => HubProblem::NotFound { endpoint, with_token },
            (401, _) if message.contains("Invalid credentials") => {
                HubProblem::Denied { endpoint, reason: said }
            }
            // To who may not see private repositories, it does not tell which there are.
            (401, _) | (404, "") => HubProblem::NotFound { endpoint, with_token },
            (403, _) => HubProblem::Denied { endpoint, reason: said },
            (429 | 500..=599, _) => return Refusal::Outage(said),
            _ => {
                let expected = "200 OK".to_owned();
                HubProblem::Answer { url: url.to_owned(), expected, found: said }
            }
        };
        Refusal::Problem(problem)
    }
}

/// Bytes that are taken of an answer at most: one too many is enough to know, and a list may name any size.
fn most_bytes(size: u64, done: u64) -> u64 {
    size.saturating_sub(done).saturating_add(1)
}

/// Why what was asked for did not come.
pub(super) enum Refusal {
    /// The server is not there or not well; another time it may be.
    Outage(String),
    /// It would not come another time.
    Problem(HubProblem),
}

/// Why a file is not at its end.
enum Broken {
    Connection(String),
    Disk(std::io::Error),
    Refused(HubProblem),
}

/// The certificates to trust: Mozilla's, or those of a file, as a network that looks into connections
/// needs it.
fn root_certs(hub: &Hub) -> Result<RootCerts> {
    let Some(path) = &hub.certificates else { return Ok(RootCerts::WebPki) };
    let text = fs::read(path).map_err(|source| Error::io(path, source))?;
    let certificates: Vec<_> = parse_pem(&text)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if certificates.is_empty() {
        let expected = "certificates in PEM format (SSL_CERT_FILE)";
        return Err(Error::malformed(path, "the file", expected, "none"));
    }
    Ok(RootCerts::new_with_certs(&certificates))
}

/// Text as a part of an address; a path keeps its slashes.
fn escaped(text: &str, is_path: bool) -> String {
    let kept = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes()
        .map(|byte| match byte {
            byte if kept(byte) || (is_path && byte == b'/') => char::from(byte).to_string(),
            byte => format!("%{byte:02X}"),
        })
        .collect()
}

/// How long a server may be silent.
pub(super) const TIMEOUT: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_git_and_of_sha256sum() {
        // `git hash-object` and `sha256sum` of a file with these nine bytes.
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"a decoder").unwrap();
        let of = |digest: Digest, file: &mut File| digest.of(file).unwrap();
        let git = of(Digest::GitBlob(String::new()), &mut file);
        assert_eq!(git, "07fb12aa1205e57b7106d6d35da838dc6f46fa62");
        let sha = of(Digest::Sha256(String::new()), &mut file);
        assert_eq!(sha, "2c53fc58ffddfe679c455771d140f9a895e46d1fdfe817d7e8be57e40ae53fdb");
    }

    #[test]
    fn one_byte_more_than_is_missing_is_taken_of_any_size() {
        assert_eq!(most_bytes(9, 4), 6);
        assert_eq!(most_bytes(u64::MAX, 0), u64::MAX);
    }

    #[test]
    fn what_stands_in_an_address_is_escaped() {
        assert_eq!(escaped("refs/pr/1", false), "refs%2Fpr%2F1");
        assert_eq!(escaped("a folder/ü?.gguf", true), "a%20folder/%C3%BC%3F.gguf");
    }
}
