//! A server on this machine that answers as the Hugging Face Hub does, as far as it is asked here.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};
use serde_json::{Value, json};

/// The repository is `owner/name`.
pub const NAME: &str = "owner/name";

/// What a request says.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    pub path: String,
    pub from: Option<usize>,
    pub authorization: Option<String>,
}

/// What is answered. `ends_after` closes the connection early; a pause comes before the last byte.
#[derive(Debug, Clone, Default)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
    pub ends_after: Option<usize>,
    pub pause: Option<Duration>,
}

impl Reply {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, body: body.into(), ..Self::default() }
    }

    /// An error in the Hub's manner.
    pub fn refusal(status: u16, code: &str, message: &str) -> Self {
        let headers =
            vec![("X-Error-Code", code.to_owned()), ("X-Error-Message", message.to_owned())];
        Self { status, headers, ..Self::default() }
    }
}

/// Answers a request in another way than the Hub does, where it has an answer. It is given the Hub's.
pub type Fault = Box<dyn Fn(&Request, &Reply) -> Option<Reply> + Send>;

/// A repository at one commit, which tests change.
pub struct Repository {
    pub commit: String,
    pub files: BTreeMap<String, Vec<u8>>,
    pub fault: Fault,
    pub requests: Vec<Request>,
}

pub struct Server {
    address: String,
    repository: Arc<Mutex<Repository>>,
}

impl Server {
    pub fn new(files: impl IntoIterator<Item = (String, Vec<u8>)>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let repository = Arc::new(Mutex::new(Repository {
            commit: "a".repeat(40),
            files: files.into_iter().collect(),
            fault: Box::new(|_, _| None),
            requests: Vec::new(),
        }));
        let (shared, host) = (Arc::clone(&repository), address.clone());
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (shared, host) = (Arc::clone(&shared), host.clone());
                thread::spawn(move || {
                    let mut stream = stream.unwrap();
                    if let Some(request) = read(&stream) {
                        let reply = answer(&mut shared.lock().unwrap(), &host, request);
                        // Who asked may have gone.
                        let _ = write(&mut stream, &reply);
                        let _ = stream.shutdown(Shutdown::Both);
                    }
                });
            }
        });
        Self { address, repository }
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn change<T>(&self, change: impl FnOnce(&mut Repository) -> T) -> T {
        change(&mut self.repository.lock().unwrap())
    }

    pub fn fault(&self, fault: impl Fn(&Request, &Reply) -> Option<Reply> + Send + 'static) {
        self.change(|repository| repository.fault = Box::new(fault));
    }

    /// What was asked for since the last call.
    pub fn requests(&self) -> Vec<Request> {
        self.change(|repository| std::mem::take(&mut repository.requests))
    }
}

fn read(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let first = lines.next()?;
    let mut request =
        Request { path: first.split(' ').nth(1)?.to_owned(), from: None, authorization: None };
    for line in lines.take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(": ")?;
        match name.to_ascii_lowercase().as_str() {
            "range" => request.from = value.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok(),
            "authorization" => request.authorization = Some(value.to_owned()),
            _ => {}
        }
    }
    Some(request)
}

fn write(stream: &mut TcpStream, reply: &Reply) -> std::io::Result<()> {
    let mut head = format!("HTTP/1.1 {} Status\r\nConnection: close\r\n", reply.status);
    let _ = write!(head, "Content-Length: {}\r\n", reply.body.len());
    for (name, value) in &reply.headers {
        let _ = write!(head, "{name}: {value}\r\n");
    }
    stream.write_all(format!("{head}\r\n").as_bytes())?;
    let end = reply.ends_after.unwrap_or(reply.body.len()).min(reply.body.len());
    match (reply.pause, end) {
        (Some(pause), 1..) => {
            stream.write_all(&reply.body[..end - 1])?;
            stream.flush()?;
            // Until the other side has had enough, at most.
            stream.set_read_timeout(Some(pause))?;
            let _ = stream.read(&mut [0]);
            stream.write_all(&reply.body[end - 1..end])
        }
        _ => stream.write_all(&reply.body[..end]),
    }
}

fn answer(repository: &mut Repository, host: &str, request: Request) -> Reply {
    let usual = usual_answer(repository, host, &request);
    let reply = (repository.fault)(&request, &usual).unwrap_or(usual);
    repository.requests.push(request);
    reply
}

/// Large files are elsewhere, as the Hub's are.
pub fn is_large(path: &str) -> bool {
    path.ends_with(".safetensors") || path.ends_with(".gguf")
}

fn usual_answer(repository: &Repository, host: &str, request: &Request) -> Reply {
    let file_after = |start: &str| {
        let path = request.path.strip_prefix(start)?;
        repository.files.get_key_value(path)
    };
    if request.path.starts_with(&format!("/api/models/{NAME}/revision/")) {
        let siblings: Vec<Value> =
            repository.files.iter().map(|(path, content)| listed(path, content)).collect();
        let list = json!({"id": NAME, "sha": repository.commit, "siblings": siblings});
        return Reply::new(200, list.to_string());
    }
    if let Some((path, content)) = file_after(&format!("/{NAME}/resolve/{}/", repository.commit)) {
        if !is_large(path) {
            return part(content, request.from);
        }
        let port = host.rsplit(':').next().unwrap();
        let location = format!("http://localhost:{port}/store/{path}");
        return Reply { status: 302, headers: vec![("Location", location)], ..Reply::default() };
    }
    match file_after("/store/") {
        Some((_, content)) => part(content, request.from),
        None => Reply::refusal(404, "EntryNotFound", "Entry not found"),
    }
}

fn part(content: &[u8], from: Option<usize>) -> Reply {
    match from {
        None => Reply::new(200, content),
        Some(from) if from < content.len() => {
            let range = format!("bytes {from}-{}/{}", content.len() - 1, content.len());
            let headers = vec![("Content-Range", range)];
            Reply { headers, ..Reply::new(206, &content[from..]) }
        }
        Some(_) => Reply::new(416, ""),
    }
}

fn listed(path: &str, content: &[u8]) -> Value {
    match is_large(path) {
        true => json!({
            "rfilename": path,
            "size": content.len(),
            "blobId": "0".repeat(40),
            "lfs": {"sha256": digest(path, content), "size": content.len(), "pointerSize": 130},
        }),
        false => json!({
            "rfilename": path, "size": content.len(), "blobId": digest(path, content),
        }),
    }
}

/// The name of a file's content in the cache.
pub fn digest(path: &str, content: &[u8]) -> String {
    let mut context = match is_large(path) {
        true => Context::new(&SHA256),
        false => {
            let mut context = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
            context.update(format!("blob {}\0", content.len()).as_bytes());
            context
        }
    };
    context.update(content);
    context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}
