//! Models of the Hugging Face Hub, fetched from a server on this machine: what comes into the cache,
//! what is done about a bad connection, and what is said when a model cannot be had.

#![cfg(feature = "hub")]

mod server;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use lora_models::{Checkpoint, ErrorKind, Hub, HubProblem};
use server::{NAME, Reply, Request, Server, digest};
use tempfile::TempDir;

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The repository's own model, and what is beside a model on the Hub.
fn tiny_world() -> Vec<(String, Vec<u8>)> {
    let names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
    let read = |name: &str| fs::read(repository().join("examples/tiny_world").join(name)).unwrap();
    let mut files: Vec<_> = names.iter().map(|name| ((*name).to_owned(), read(name))).collect();
    for name in ["README.md", "pytorch_model.bin", ".gitattributes", "onnx/model.onnx"] {
        files.push((name.to_owned(), b"not wanted".to_vec()));
    }
    files
}

/// Files that only look like a model's, for what does not open them.
fn small(more: &[&str]) -> Vec<(String, Vec<u8>)> {
    let names = ["config.json", "tokenizer.json"].iter().chain(more);
    names
        .map(|name| ((*name).to_owned(), format!("{{\"file\": \"{name}\"}}").into_bytes()))
        .collect()
}

/// 200,000 bytes of which no two stretches are the same.
fn weights(seed: u32) -> Vec<u8> {
    (0..50_000u32).flat_map(|i| (i.wrapping_mul(2_654_435_761) ^ seed).to_le_bytes()).collect()
}

fn with_weights(seed: u32) -> Vec<(String, Vec<u8>)> {
    let mut files = small(&[]);
    files.push(("model.safetensors".to_owned(), weights(seed)));
    files
}

struct Cache {
    folder: TempDir,
}

impl Cache {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn hub(&self, server: &Server) -> Hub {
        let mut hub = Hub::new(self.folder.path());
        hub.endpoint = server.endpoint();
        hub
    }

    fn path(&self, path: &str) -> PathBuf {
        self.folder.path().join("models--owner--name").join(path)
    }

    fn blobs(&self) -> BTreeSet<String> {
        let Ok(entries) = fs::read_dir(self.path("blobs")) else { return BTreeSet::new() };
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

#[track_caller]
fn problem(answer: Result<PathBuf, lora_models::Error>, parts: &[&str]) -> HubProblem {
    let error = answer.unwrap_err();
    let message = error.to_string();
    println!("{message}");
    for part in parts {
        assert!(message.contains(part), "'{part}' is not in: {message}");
    }
    assert!(!message.contains('\n'), "{message}");
    match error.kind() {
        ErrorKind::Hub { problem, .. } => problem.clone(),
        other => panic!("another kind of error: {other:?}"),
    }
}

fn paths(requests: &[Request]) -> Vec<&str> {
    requests.iter().map(|request| request.path.as_str()).collect()
}

const LIST: &str = "/api/models/owner/name/revision/main?blobs=true";

// What is fetched.

#[test]
fn a_model_is_fetched_once_and_opens() {
    let server = Server::new(tiny_world());
    let cache = Cache::new();
    let hub = cache.hub(&server);
    let told = Mutex::new(Vec::new());
    let folder = hub
        .fetch_with(NAME, |download| {
            told.lock().unwrap().push((download.file.to_owned(), download.done, download.total));
        })
        .unwrap();
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let own = Checkpoint::open(repository().join("examples/tiny_world")).unwrap();
    assert_eq!(checkpoint.config, own.config);
    assert!(checkpoint.tokenizer.has_chat_template());
    checkpoint.decoder(&lora_core::device_from_env().unwrap()).unwrap();

    // Only what a model needs, the weights last, each from the commit that the list was of.
    let commit = "a".repeat(40);
    assert_eq!(folder, cache.path("snapshots").join(&commit));
    let files = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"];
    let resolved = files.map(|file| format!("/owner/name/resolve/{commit}/{file}"));
    let mut asked = vec![LIST];
    asked.extend(resolved.iter().map(String::as_str));
    asked.push("/store/model.safetensors");
    assert_eq!(paths(&server.requests()), asked);

    // Progress goes from nothing to all of each file.
    let told = told.into_inner().unwrap();
    for name in files {
        let size = fs::metadata(folder.join(name)).unwrap().len();
        let of_file: Vec<_> = told.iter().filter(|(file, ..)| file == name).collect();
        assert!(of_file.iter().all(|(_, _, total)| *total == size));
        assert!(of_file.is_sorted_by_key(|(_, done, _)| done));
        assert_eq!((of_file[0].1, of_file.last().unwrap().1), (0, size), "{name}");
    }

    // The layout is that of huggingface_hub.
    assert_eq!(fs::read_to_string(cache.path("refs/main")).unwrap(), commit);
    let contents = tiny_world();
    let content = |name: &str| &contents.iter().find(|(file, _)| file == name).unwrap().1;
    let blobs: BTreeSet<String> = files.iter().map(|name| digest(name, content(name))).collect();
    assert_eq!(cache.blobs(), blobs);
    for name in files {
        assert_eq!(fs::read(folder.join(name)).unwrap(), *content(name), "{name}");
        #[cfg(unix)]
        assert_eq!(
            fs::read_link(folder.join(name)).unwrap(),
            Path::new("../../blobs").join(digest(name, content(name)))
        );
    }

    // Again, there is nothing to fetch.
    assert_eq!(hub.fetch(NAME).unwrap(), folder);
    assert_eq!(paths(&server.requests()), [LIST]);
}

#[test]
fn a_cached_model_needs_no_network() {
    let server = Server::new(tiny_world());
    let cache = Cache::new();
    let mut hub = cache.hub(&server);
    let folder = hub.fetch(NAME).unwrap();
    server.requests();

    // A commit is always the same.
    let commit = format!("{NAME}@{}", "a".repeat(40));
    assert_eq!(hub.fetch(&commit).unwrap(), folder);
    assert_eq!(server.requests(), []);
    // The server is down.
    server.fault(|_, _| Some(Reply::new(503, "")));
    assert_eq!(hub.fetch(NAME).unwrap(), folder);
    // There is no server.
    hub.endpoint = NO_SERVER.to_owned();
    assert_eq!(hub.fetch(NAME).unwrap(), folder);
    Checkpoint::open(hub.fetch(NAME).unwrap()).unwrap();
    // It is not to be asked.
    hub.endpoint = server.endpoint();
    hub.offline = true;
    server.requests();
    assert_eq!(hub.fetch(NAME).unwrap(), folder);
    assert_eq!(server.requests(), []);
}

/// An address where nobody listens: a port that is given away to no program.
const NO_SERVER: &str = "http://127.0.0.1:1";

#[test]
fn a_model_in_several_files_is_fetched_whole() {
    let index = r#"{"metadata": {}, "weight_map": {"a": "model-1-of-2.safetensors",
        "b": "model-2-of-2.safetensors", "c": "model-1-of-2.safetensors"}}"#;
    let mut files = small(&["special_tokens_map.json", "chat_template.jinja"]);
    files.push(("model.safetensors.index.json".to_owned(), index.into()));
    files.push(("model-1-of-2.safetensors".to_owned(), weights(1)));
    files.push(("model-2-of-2.safetensors".to_owned(), weights(2)));
    files.push(("model-9-of-9.safetensors".to_owned(), weights(3)));
    let server = Server::new(files);
    let cache = Cache::new();
    let mut hub = cache.hub(&server);
    let folder = hub.fetch(NAME).unwrap();
    let found: BTreeSet<String> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let expected = [
        "chat_template.jinja",
        "config.json",
        "model-1-of-2.safetensors",
        "model-2-of-2.safetensors",
        "model.safetensors.index.json",
        "special_tokens_map.json",
        "tokenizer.json",
    ];
    assert_eq!(found, expected.map(str::to_owned).into());
    assert_eq!(fs::read(folder.join("model-2-of-2.safetensors")).unwrap(), weights(2));

    // Without one of them it is not whole.
    hub.offline = true;
    assert_eq!(hub.fetch(NAME).unwrap(), folder);
    fs::remove_file(folder.join("model-2-of-2.safetensors")).unwrap();
    problem(hub.fetch(NAME), &["lacks model-2-of-2.safetensors"]);
    hub.offline = false;
    hub.fetch(NAME).unwrap();
    assert!(folder.join("model-2-of-2.safetensors").exists());
}

#[test]
fn an_index_that_is_wrong_is_refused() {
    for (index, part) in [
        ("{", "an error"),
        (r#"{"weight_map": {}}"#, "found none"),
        (r#"{"weight_map": {"a": "../../../etc/x.safetensors"}}"#, "found \"../../../etc"),
        (r#"{"weight_map": {"a": "pytorch_model-1.bin"}}"#, "found \"pytorch_model-1.bin"),
        (r#"{"weight_map": {"a": 1}}"#, "found 1"),
    ] {
        let mut files = small(&[]);
        files.push(("model.safetensors.index.json".to_owned(), index.into()));
        let server = Server::new(files);
        let cache = Cache::new();
        let error = cache.hub(&server).fetch(NAME).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Malformed { .. }), "{error}");
        assert!(error.to_string().contains(part), "{error}");
        assert!(!cache.path("refs/main").exists());
    }
}

#[test]
fn a_gguf_file_is_fetched_by_its_name() {
    let bytes = fs::read(repository().join("crates/lora-models/tests/data/blocks.gguf")).unwrap();
    let server = Server::new([
        ("README.md".to_owned(), b"x".to_vec()),
        ("small/blocks F32.gguf".to_owned(), bytes.clone()),
    ]);
    server.fault(|request, _| {
        // As the real server, this one knows escaped names only.
        assert!(!request.path.contains(' '), "{}", request.path);
        None
    });
    let escaped = "small/blocks%20F32.gguf";
    server.change(|repository| repository.files.insert(escaped.to_owned(), bytes.clone()));
    let cache = Cache::new();
    let mut hub = cache.hub(&server);
    let file = hub.fetch("owner/name/small/blocks F32.gguf").unwrap();
    assert_eq!(file, cache.path("snapshots").join("a".repeat(40)).join("small/blocks F32.gguf"));
    assert_eq!(fs::read(&file).unwrap(), bytes);
    lora_models::GgufFile::open(&file).unwrap();
    hub.offline = true;
    assert_eq!(hub.fetch("owner/name/small/blocks F32.gguf").unwrap(), file);
    problem(hub.fetch(NAME), &["lacks config.json, tokenizer.json, model.safetensors"]);
}

#[test]
fn a_revision_is_asked_for_and_kept_by_its_name() {
    let server = Server::new(with_weights(1));
    let cache = Cache::new();
    let mut hub = cache.hub(&server);
    hub.fetch("owner/name@refs/pr/1").unwrap();
    let first = server.requests()[0].path.clone();
    assert_eq!(first, "/api/models/owner/name/revision/refs%2Fpr%2F1?blobs=true");
    assert_eq!(fs::read_to_string(cache.path("refs/refs/pr/1")).unwrap(), "a".repeat(40));
    hub.offline = true;
    hub.fetch("owner/name@refs/pr/1").unwrap();
    // What is not known is not guessed.
    problem(hub.fetch(NAME), &["owner/name: the cache", "lacks config.json", "HF_HUB_OFFLINE"]);
}

#[test]
fn a_branch_that_moved_on_is_fetched_anew_and_the_old_commit_stays() {
    let server = Server::new(with_weights(1));
    let cache = Cache::new();
    let mut hub = cache.hub(&server);
    let old = hub.fetch(NAME).unwrap();
    server.requests();

    server.change(|repository| {
        repository.commit = "b".repeat(40);
        repository.files.insert("model.safetensors".to_owned(), weights(2));
    });
    // It breaks off: the old commit is still what there is.
    server.fault(|request, _| request.path.starts_with("/store").then(|| Reply::new(503, "")));
    problem(hub.fetch(NAME), &["model.safetensors: expected 200000 bytes, found 0"]);
    hub.offline = true;
    assert_eq!(hub.fetch(NAME).unwrap(), old);
    hub.offline = false;

    server.fault(|_, _| None);
    server.requests();
    let new = hub.fetch(NAME).unwrap();
    assert_eq!(fs::read(new.join("model.safetensors")).unwrap(), weights(2));
    assert_eq!(fs::read(old.join("model.safetensors")).unwrap(), weights(1));
    // What did not change was there.
    let weights = format!("/owner/name/resolve/{}/model.safetensors", "b".repeat(40));
    assert_eq!(paths(&server.requests()), [LIST, &weights, "/store/model.safetensors"]);
}

#[test]
fn a_token_goes_to_the_hub_and_not_to_the_store_behind_it() {
    let server = Server::new(with_weights(1));
    server.fault(|request, usual| match &request.authorization {
        Some(token) if token == "Bearer hf_right" => None,
        _ if request.path.starts_with("/store") => Some(usual.clone()),
        _ => Some(Reply::refusal(401, "RepoNotFound", "Repository not found")),
    });
    let cache = Cache::new();
    let mut hub = cache.hub(&server);
    problem(hub.fetch(NAME), &["owner/name", &server.endpoint(), "no public model", "HF_TOKEN"]);
    hub.token = Some("hf_wrong".to_owned());
    problem(hub.fetch(NAME), &["that your token may read"]);
    hub.token = Some("hf_right".to_owned());
    server.requests();
    hub.fetch(NAME).unwrap();
    for request in server.requests() {
        assert_eq!(
            request.authorization.is_some(),
            !request.path.starts_with("/store"),
            "{request:?}"
        );
    }
}

// Bad connections.

#[test]
fn a_connection_that_breaks_off_is_taken_up_again() {
    let server = Server::new(with_weights(1));
    server.fault(|request, usual| {
        let broken = Reply { ends_after: Some(70_000), ..usual.clone() };
        request.path.starts_with("/store").then_some(broken)
    });
    let cache = Cache::new();
    let folder = cache.hub(&server).fetch(NAME).unwrap();
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights(1));
    let requests = server.requests();
    let from: Vec<_> = requests
        .iter()
        .filter(|request| request.path.starts_with("/store"))
        .map(|request| request.from.unwrap_or(0))
        .collect();
    assert_eq!(from, [0, 70_000, 140_000]);
}

#[test]
fn a_server_that_falls_silent_is_asked_again() {
    let server = Server::new(with_weights(1));
    server.fault(|request, usual| {
        let silent = Reply { pause: Some(Duration::from_secs(60)), ..usual.clone() };
        (request.path.starts_with("/store") && request.from.is_none()).then_some(silent)
    });
    let cache = Cache::new();
    let mut hub = cache.hub(&server);
    hub.timeout = Duration::from_secs(2);
    let folder = hub.fetch(NAME).unwrap();
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights(1));
    assert_eq!(server.requests().last().unwrap().from, Some(199_999));
}

#[test]
fn a_download_that_broke_off_goes_on_the_next_time() {
    let server = Server::new(with_weights(1));
    server.fault(|request, usual| {
        let end = if request.from.is_none() { 150_000 } else { 0 };
        let broken = Reply { ends_after: Some(end), ..usual.clone() };
        request.path.starts_with("/store").then_some(broken)
    });
    let cache = Cache::new();
    let mut hub = cache.hub(&server);
    let found =
        problem(hub.fetch(NAME), &["model.safetensors: expected 200000 bytes, found 150000"]);
    assert!(matches!(found, HubProblem::Interrupted { done: 150_000, total: 200_000, .. }));

    // Nothing passes for whole: no link, no ref, no content under its name.
    let name = digest("model.safetensors", &weights(1));
    assert!(cache.blobs().contains(&format!("{name}.part")) && !cache.blobs().contains(&name));
    let snapshot = cache.path("snapshots").join("a".repeat(40));
    assert!(snapshot.join("config.json").exists());
    assert!(fs::symlink_metadata(snapshot.join("model.safetensors")).is_err());
    assert!(!cache.path("refs").exists());
    hub.offline = true;
    problem(hub.fetch(NAME), &["lacks"]);
    let commit = format!("{NAME}@{}", "a".repeat(40));
    problem(hub.fetch(&commit), &["lacks model.safetensors,"]);
    hub.offline = false;

    server.fault(|_, _| None);
    server.requests();
    // A commit that is not whole is asked for, too.
    let folder = hub.fetch(&commit).unwrap();
    assert_eq!(server.requests().last().unwrap().from, Some(150_000));
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights(1));
    assert!(!cache.blobs().iter().any(|name| name.ends_with("part")));
}

#[test]
fn a_server_that_knows_no_ranges_sends_the_whole_again() {
    let server = Server::new(with_weights(1));
    let cut = AtomicUsize::new(150_000);
    server.fault(move |request, usual| {
        let body = match request.path.starts_with("/store") {
            true => weights(1),
            false => return None,
        };
        let ends_after = Some(cut.fetch_add(30_000, Ordering::Relaxed));
        let _ = usual;
        Some(Reply { ends_after, ..Reply::new(200, body) })
    });
    let cache = Cache::new();
    let folder = cache.hub(&server).fetch(NAME).unwrap();
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights(1));

    // One that always breaks off at the same place is given up.
    server.change(|repository| {
        repository.commit = "b".repeat(40);
        repository.files.insert("model.safetensors".to_owned(), weights(2));
    });
    server.fault(|request, _| {
        let broken = Reply { ends_after: Some(90_000), ..Reply::new(200, weights(2)) };
        request.path.starts_with("/store").then_some(broken)
    });
    problem(cache.hub(&server).fetch(NAME), &["expected 200000 bytes, found 90000"]);
}

#[test]
fn a_file_that_is_not_the_one_in_the_list_is_not_kept() {
    let wrong = || {
        let mut wrong = weights(1);
        wrong[123_456] ^= 1;
        wrong
    };
    let mut longer = weights(1);
    longer.push(0);
    for (content, part) in
        [(wrong(), "expected the digest"), (longer, "expected 200000 bytes, found more")]
    {
        let server = Server::new(with_weights(1));
        server.fault(move |request, _| {
            request.path.starts_with("/store").then(|| Reply::new(200, content.clone()))
        });
        let cache = Cache::new();
        let found = problem(cache.hub(&server).fetch(NAME), &["model.safetensors", part]);
        assert!(matches!(found, HubProblem::Damaged { .. }));
        assert!(!cache.blobs().contains(&digest("model.safetensors", &weights(1))));
        server.fault(|_, _| None);
        let folder = cache.hub(&server).fetch(NAME).unwrap();
        assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights(1));
    }

    // What another program left is checked with the rest.
    let server = Server::new(with_weights(1));
    let cache = Cache::new();
    let name = digest("model.safetensors", &weights(1));
    fs::create_dir_all(cache.path("blobs")).unwrap();
    fs::write(cache.path("blobs").join(format!("{name}.part")), [7; 1000]).unwrap();
    problem(cache.hub(&server).fetch(NAME), &["expected the digest"]);
    cache.hub(&server).fetch(NAME).unwrap();
    // A content that lost its end is fetched again.
    fs::write(cache.path("blobs").join(&name), &weights(1)[..1000]).unwrap();
    let folder = cache.hub(&server).fetch(NAME).unwrap();
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights(1));
}

#[test]
fn several_at_once_fetch_each_file_once() {
    let server = Server::new(with_weights(1));
    let cache = Cache::new();
    std::thread::scope(|scope| {
        let fetches: Vec<_> =
            (0..4).map(|_| scope.spawn(|| cache.hub(&server).fetch(NAME).unwrap())).collect();
        for fetch in fetches {
            let folder = fetch.join().unwrap();
            assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights(1));
        }
    });
    let requests = server.requests();
    assert_eq!(paths(&requests).iter().filter(|path| path.starts_with("/store")).count(), 1);
    assert_eq!(cache.blobs().len(), 3, "{:?}", cache.blobs());
}

// What is said when a model cannot be had.

#[test]
fn refusals_are_told_apart() {
    let server = Server::new(with_weights(1));
    let page = format!("{}/owner/name", server.endpoint());
    let with_token = |reply: Reply, token: Option<&str>, parts: &[&str]| {
        let cache = Cache::new();
        server.fault(move |_, _| Some(reply.clone()));
        let mut hub = cache.hub(&server);
        hub.token = token.map(str::to_owned);
        let found = problem(hub.fetch(NAME), parts);
        assert_eq!(fs::read_dir(cache.folder.path()).unwrap().count(), 0, "something was left");
        found
    };
    let refused = |reply: Reply, parts: &[&str]| with_token(reply, None, parts);

    let found = refused(Reply::refusal(404, "RepoNotFound", "no"), &["no public model"]);
    assert!(matches!(found, HubProblem::NotFound { with_token: false, .. }));
    refused(Reply::new(404, "page"), &["no public model"]);
    refused(Reply::refusal(401, "", "Invalid username or password."), &["no public model"]);
    let found = refused(Reply::refusal(404, "RevisionNotFound", ""), &["no revision 'main'"]);
    assert!(matches!(found, HubProblem::Revision { .. }));
    let gated = || Reply::refusal(401, "GatedRepo", "Access is restricted");
    let found = refused(gated(), &["gated: set HF_TOKEN", &page]);
    assert!(matches!(found, HubProblem::Gated { with_token: false, .. }));
    with_token(gated(), Some("hf_x"), &["gated: with the account of your token", &page]);
    let invalid = Reply::refusal(401, "", "Invalid credentials in Authorization header");
    let found = with_token(invalid, Some("hf_x"), &["refuses it: Invalid credentials", "HF_TOKEN"]);
    assert!(matches!(found, HubProblem::Denied { .. }));
    refused(Reply::refusal(403, "", "Blocked"), &["refuses it: Blocked"]);
    let found = refused(Reply::new(502, ""), &["cannot be reached (502", "lacks config.json"]);
    assert!(matches!(found, HubProblem::Unreachable { .. }));
    let limit = Reply::refusal(429, "", "Too many requests");
    refused(limit, &["cannot be reached (Too many requests)"]);
    for answer in [Reply::new(200, "<html>"), Reply::new(200, "{}"), Reply::new(418, "")] {
        let found = refused(answer, &["/api/models/owner/name", "expected", "HF_ENDPOINT"]);
        assert!(matches!(found, HubProblem::Answer { .. }));
    }
    // A commit and a digest are names of files here.
    let list = |sha: &str, id: &str| {
        let files = ["config.json", "tokenizer.json", "model.safetensors"]
            .map(|name| serde_json::json!({"rfilename": name, "size": 3, "blobId": id}));
        Reply::new(200, serde_json::json!({"sha": sha, "siblings": files}).to_string())
    };
    refused(list("../../x", &"0".repeat(40)), &["found the commit '../../x'"]);
    refused(list(&"a".repeat(40), "../../x"), &["expected the size and the digest of config.json"]);
}

#[test]
fn a_gated_models_files_are_refused_after_its_list() {
    let server = Server::new(with_weights(1));
    server.fault(|request, _| {
        let gated = Reply::refusal(403, "GatedRepo", "Access is restricted");
        request.path.contains("/resolve/").then_some(gated)
    });
    let cache = Cache::new();
    problem(cache.hub(&server).fetch(NAME), &["it is gated: set HF_TOKEN"]);
}

#[test]
fn no_network_and_no_copy_are_told_with_what_is_missing() {
    let cache = Cache::new();
    let mut hub = Hub::new(cache.folder.path());
    hub.endpoint = NO_SERVER.to_owned();
    let parts = ["cannot be reached", "refused", "lacks config.json, tokenizer.json", "network"];
    let found = problem(hub.fetch(NAME), &parts);
    assert!(matches!(found, HubProblem::Unreachable { .. }));
    hub.endpoint = "http://no-such-host.invalid".to_owned();
    problem(hub.fetch(NAME), &["http://no-such-host.invalid cannot be reached"]);
    hub.offline = true;
    let folder = cache.folder.path().to_str().unwrap();
    let found = problem(hub.fetch(NAME), &[folder, "lacks config.json", "HF_HUB_OFFLINE"]);
    assert!(matches!(found, HubProblem::Offline { .. }));

    // Some of the files, as another program may have fetched them.
    let commit = "c".repeat(40);
    fs::create_dir_all(cache.path("refs")).unwrap();
    fs::write(cache.path("refs/main"), &commit).unwrap();
    fs::create_dir_all(cache.path("snapshots").join(&commit)).unwrap();
    fs::write(cache.path("snapshots").join(&commit).join("config.json"), "{}").unwrap();
    problem(hub.fetch(NAME), &["lacks tokenizer.json, model.safetensors,"]);
}

#[test]
fn a_repository_without_a_model_is_told_with_what_it_has() {
    let fetch = |files: Vec<(String, Vec<u8>)>, name: &str, parts: &[&str]| {
        let (server, cache) = (Server::new(files), Cache::new());
        let found = problem(cache.hub(&server).fetch(name), parts);
        assert!(matches!(found, HubProblem::Files { .. }));
        assert_eq!(server.requests().len(), 1, "nothing is fetched in vain");
    };
    let none = "no model.safetensors or model.safetensors.index.json";
    fetch(small(&["pytorch_model.bin"]), NAME, &[none, "pickled", "safetensors"]);
    fetch(small(&[]), NAME, &[none, "choose a repository"]);
    let file = |name: &str| vec![(name.to_owned(), b"x".to_vec())];
    fetch(file("README.md"), NAME, &["no config.json and no tokenizer.json and no model.safeten"]);
    fetch(file("x-Q4_0.gguf"), NAME, &["such as owner/name/x-Q4_0.gguf"]);
    fetch(file("x-Q4_0.gguf"), "owner/name/y.gguf", &["no y.gguf", "GGUF files are x-Q4_0.gguf"]);
    fetch(file("README.md"), "owner/name/y.gguf", &["no y.gguf", "no GGUF file at all"]);

    let mut files = small(&[]);
    let index = r#"{"weight_map": {"a": "model-1-of-2.safetensors"}}"#;
    files.push(("model.safetensors.index.json".to_owned(), index.into()));
    let (server, cache) = (Server::new(files), Cache::new());
    let parts = ["no model-1-of-2.safetensors", "model.safetensors.index.json names"];
    problem(cache.hub(&server).fetch(NAME), &parts);
}

#[test]
fn names_addresses_tokens_and_certificates_that_are_none_are_refused() {
    let cache = Cache::new();
    let mut hub = Hub::new(cache.folder.path());
    let found = problem(hub.fetch("name"), &["name: expected", "owner/name@revision"]);
    assert!(matches!(found, HubProblem::Name));

    let argument = |hub: &Hub, part: &str| {
        let error = hub.fetch(NAME).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
        assert!(!error.contains("secret"), "{error}");
    };
    for endpoint in ["", "huggingface.co", "ftp://huggingface.co", "https://"] {
        hub.endpoint = endpoint.to_owned();
        argument(&hub, "HF_ENDPOINT: expected an address");
    }
    hub.endpoint = NO_SERVER.to_owned();
    hub.token = Some("a secret".to_owned());
    argument(&hub, "HF_TOKEN: expected a token");
    hub.token = None;
    let file = cache.folder.path().join("certificates.pem");
    hub.certificates = Some(file.clone());
    argument(&hub, "certificates.pem: cannot be read");
    fs::write(file, "none").unwrap();
    argument(&hub, "expected certificates in PEM format");
}

// The programs.

fn example(name: &str, server: &str, home: &Path, arguments: &[&str]) -> Output {
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().and_then(Path::parent).unwrap();
    let mut command = Command::new(profile.join("examples").join(name));
    for (variable, _) in std::env::vars_os() {
        if variable.to_string_lossy().starts_with("HF_") {
            command.env_remove(variable);
        }
    }
    command
        .current_dir(repository())
        .env("HF_ENDPOINT", server)
        .env("HF_HOME", home)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("example {name}: {error}; cargo test builds it"))
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn the_examples_take_a_models_name() {
    let server = Server::new(tiny_world());
    let temp = tempfile::tempdir().unwrap();
    let home = temp.path().join("home");
    let question = "Where does the fox live?";
    let output =
        example("generate", &server.endpoint(), &home, &["--model", "owner/name@main", question]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("barn"), "{}", text(&output.stdout));
    let note = burn_lora::kernels_note(&lora_core::device_from_env().unwrap());
    assert_eq!(
        text(&output.stderr).trim_end(),
        note.unwrap_or(""),
        "no bars where there is no terminal"
    );
    assert!(home.join("hub/models--owner--name/refs/main").exists());

    // From the cache; and the adapter says what it is for.
    let run = temp.path().join("run");
    let run = run.to_str().unwrap();
    let data = "examples/tiny_world/pirate.jsonl";
    let arguments = ["--model", "owner/name@main", "--data", data, "--steps", "1"];
    let arguments = [&arguments[..], &["--held-out", "8", "--output", run]].concat();
    let output = example("finetune", NO_SERVER, &home, &arguments);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("model      owner/name@main: Llama"));
    let config = fs::read_to_string(format!("{run}/adapter/adapter_config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["base_model_name_or_path"], "owner/name");
}

#[test]
fn the_examples_say_in_a_sentence_what_is_wrong_with_a_name() {
    let server = Server::new(tiny_world());
    server.fault(|_, _| Some(Reply::refusal(404, "RepoNotFound", "")));
    let temp = tempfile::tempdir().unwrap();
    let endpoint = server.endpoint();
    for (server, model, code, parts) in [
        (
            endpoint.as_str(),
            "runs/2",
            2,
            vec!["runs/2: ", "no public model", "no file or folder has"],
        ),
        (NO_SERVER, "owner/name", 1, vec!["cannot be reached", "no file or folder has this name"]),
        (NO_SERVER, "no-such-model", 2, vec!["found nothing of that name", "owner/name@revision"]),
        (NO_SERVER, "models/none.gguf", 2, vec!["models/none.gguf: expected", "found nothing"]),
    ] {
        let output = example("generate", server, temp.path(), &["--model", model, "Hello!"]);
        let stderr = text(&output.stderr);
        println!("{}", stderr.trim_end());
        assert_eq!(output.status.code(), Some(code), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        for part in parts {
            assert!(stderr.contains(part), "'{part}' is not in {stderr}");
        }
    }
}
