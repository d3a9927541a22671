//! The folder in which models of the Hub are kept, as Python's `huggingface_hub` keeps them, so that each
//! finds what the other has fetched:
//!
//! ```text
//! models--OWNER--NAME/
//!     blobs/DIGEST                     the content of a file
//!     snapshots/COMMIT/PATH            a link to it
//!     refs/REVISION                    the commit that a branch or tag had when it was asked last
//! ```
//!
//! A content is written to `blobs/DIGEST.part` and becomes `blobs/DIGEST` once it is whole and its
//! digest is right; a link comes after its content, and a ref after all links. So whatever ends the
//! program, what is there under its name is whole.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::Value;

use super::client::RemoteFile;
use super::name::is_plain_path;
use crate::error::{Error, Result};
use crate::hf::{CONFIG_FILE, SHARDS_FILE, WEIGHTS_FILE};
use crate::tokenizer::TOKENIZER_FILE;

/// One repository's part of the cache.
#[derive(Debug)]
pub(super) struct CachedRepository {
    folder: PathBuf,
    /// How a link is made, from its target and its own path.
    symlink: fn(&str, &Path) -> io::Result<()>,
}

impl CachedRepository {
    /// Creates nothing.
    pub(super) fn new(cache: &Path, repository: &str) -> Self {
        let name = format!("models--{}", repository.replace('/', "--"));
        Self { folder: cache.join(name), symlink }
    }

    /// Where the files of a commit are.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// The commit that a revision had when it was asked last.
    pub(super) fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let text = fs::read_to_string(self.reference(revision)).ok()?;
        Some(text.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    /// Writes down the commit of a branch or tag.
    pub(super) fn set_commit(&self, revision: &str, commit: &str) -> Result<()> {
        // Nothing to write is no reason to need the right to.
        if self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.reference(revision);
        // Programs, and threads of one, may write the same at the same time.
        static WRITTEN: AtomicUsize = AtomicUsize::new(0);
        let count = WRITTEN.fetch_add(1, Ordering::Relaxed);
        let part = path.with_extension(format!("{}-{count}.part", std::process::id()));
        create_parent(&path)?;
        fs::write(&part, commit).map_err(|source| Error::io(&part, source))?;
        fs::rename(&part, &path).map_err(|source| Error::io(&path, source))
    }

    fn reference(&self, revision: &str) -> PathBuf {
        self.folder.join("refs").join(revision)
    }

    /// Puts a file into a commit's snapshot. `complete` is given what there is of its content, and
    /// leaves it whole or answers with an error; it is not called for a content that is there.
    pub(super) fn add(
        &self,
        commit: &str,
        file: &RemoteFile,
        complete: impl FnOnce(&mut File, &Path) -> Result<()>,
    ) -> Result<()> {
        let link = self.snapshot(commit).join(&file.path);
        if has_size(&link, file.size) {
            return Ok(());
        }
        let blob = self.folder.join("blobs").join(file.digest.hex());
        if !has_size(&blob, file.size) {
            let is_there = || has_size(&blob, file.size) || has_size(&link, file.size);
            add_blob(&blob, is_there, complete)?;
        }
        create_parent(&link)?;
        let up = "../".repeat(file.path.split('/').count() + 1);
        let target = format!("{up}blobs/{}", file.digest.hex());
        // Another program may have been faster, and its link is not to be taken away.
        let has_link = || (self.symlink)(&target, &link).is_ok() || has_size(&link, file.size);
        if has_link() {
            return Ok(());
        }
        // What is there under this name is a link to nothing, or to something else.
        match fs::remove_file(&link) {
            Ok(()) if has_link() => return Ok(()),
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io(&link, error));
            }
            _ => {}
        }
        // Without links (Windows asks for a right to make them) the snapshot has the file itself.
        fs::rename(&blob, &link).map_err(|source| Error::io(&link, source))
    }
}

fn add_blob(
    blob: &Path,
    is_there: impl FnOnce() -> bool,
    complete: impl FnOnce(&mut File, &Path) -> Result<()>,
) -> Result<()> {
    let path = blob.with_extension("part");
    create_parent(&path)?;
    let mut part = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(|source| Error::io(&path, source))?;
    // Of two programs that want the same file, one waits for the other. Some file systems have no
    // locks; there, both write the same bytes.
    match part.lock() {
        Err(error) if error.kind() != io::ErrorKind::Unsupported => {
            return Err(Error::io(&path, error));
        }
        _ => {}
    }
    if is_there() {
        let _ = fs::remove_file(&path); // the empty one that was just created
        return Ok(());
    }
    complete(&mut part, &path)?;
    part.sync_all().map_err(|source| Error::io(&path, source))?;
    fs::rename(&path, blob).map_err(|source| Error::io(blob, source))
}

/// A whole commit's name, which always means the same files.
pub(super) fn is_commit(text: &str) -> bool {
    is_hex(text, 40)
}

pub(super) fn is_hex(text: &str, length: usize) -> bool {
    text.len() == length && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// The files of a model that a snapshot does not have.
pub(super) fn missing_files(snapshot: &Path, file: Option<&str>) -> Vec<String> {
    let absent = |name: &&str| !snapshot.join(name).is_file();
    let Some(file) = file else {
        let mut missing: Vec<String> = [CONFIG_FILE, TOKENIZER_FILE]
            .iter()
            .copied()
            .filter(absent)
            .map(str::to_owned)
            .collect();
        if absent(&WEIGHTS_FILE) {
            match shards(&snapshot.join(SHARDS_FILE)) {
                Ok(names) => {
                    missing.extend(names.into_iter().filter(|name| absent(&name.as_str())))
                }
                Err(_) => missing.push(WEIGHTS_FILE.to_owned()),
            }
        }
        return missing;
    };
    [file].into_iter().filter(absent).map(str::to_owned).collect()
}

/// The files that `model.safetensors.index.json` names.
pub(super) fn shards(path: &Path) -> Result<BTreeSet<String>> {
    let text = fs::read_to_string(path).map_err(|source| Error::io(path, source))?;
    let malformed = |found: String| {
        let expected = "an object of tensors and the file beside it that holds each";
        Error::malformed(path, "weight_map", expected, found)
    };
    let index: Value =
        serde_json::from_str(&text).map_err(|source| malformed(format!("an error: {source}")))?;
    let map = index.get("weight_map").and_then(Value::as_object).filter(|map| !map.is_empty());
    let map = map.ok_or_else(|| malformed("none".to_owned()))?;
    map.iter()
        .map(|(_, name)| match name.as_str() {
            Some(name) if is_plain_path(name) && name.ends_with(".safetensors") => {
                Ok(name.to_owned())
            }
            _ => Err(malformed(name.to_string())),
        })
        .collect()
}

fn has_size(path: &Path, size: u64) -> bool {
    fs::metadata(path).is_ok_and(|found| found.is_file() && found.len() == size)
}

fn create_parent(path: &Path) -> Result<()> {
    match path.parent() {
        Some(folder) => fs::create_dir_all(folder).map_err(|source| Error::io(folder, source)),
        None => Ok(()),
    }
}

#[cfg(unix)]
fn symlink(target: &str, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(windows)]
fn symlink(target: &str, link: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_file(target.replace('/', "\\"), link)
}

#[cfg(not(any(unix, windows)))]
fn symlink(_target: &str, _link: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::client::Digest;
    use super::*;

    #[test]
    fn without_links_a_snapshot_has_the_files_themselves() {
        let cache = tempfile::tempdir().unwrap();
        let mut repository = CachedRepository::new(cache.path(), "owner/name");
        repository.symlink = |_, _| Err(io::ErrorKind::PermissionDenied.into());
        let file = RemoteFile {
            path: "folder/weights.gguf".to_owned(),
            size: 3,
            digest: Digest::Sha256("0".repeat(64)),
        };
        let mut calls = 0;
        for (commit, expected_calls) in [("a", 1), ("a", 1), ("b", 2)] {
            repository
                .add(commit, &file, |part, path| {
                    calls += 1;
                    part.write_all(b"abc").map_err(|source| Error::io(path, source))
                })
                .unwrap();
            let path = repository.snapshot(commit).join("folder/weights.gguf");
            assert!(fs::symlink_metadata(&path).unwrap().is_file());
            assert_eq!((fs::read(path).unwrap(), calls), (b"abc".to_vec(), expected_calls));
        }
        let blobs = repository.folder.join("blobs");
        assert_eq!(fs::read_dir(blobs).unwrap().count(), 0);
    }

    #[test]
    fn a_link_to_something_else_is_replaced() {
        let cache = tempfile::tempdir().unwrap();
        let repository = CachedRepository::new(cache.path(), "owner/name");
        let file = RemoteFile {
            path: "config.json".to_owned(),
            size: 2,
            digest: Digest::GitBlob("1".repeat(40)),
        };
        let path = repository.snapshot("a").join("config.json");
        create_parent(&path).unwrap();
        fs::write(&path, "of another size").unwrap();
        let complete = |part: &mut File, _: &Path| {
            part.write_all(b"{}").unwrap();
            Ok(())
        };
        repository.add("a", &file, complete).unwrap();
        assert_eq!(fs::read(path).unwrap(), b"{}");
    }
}
