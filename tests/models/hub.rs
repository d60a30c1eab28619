//! A hub on this machine: the part of Hugging Face's protocol that a pull speaks, with the faults that a real one has.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};

/// The commit that the branch points to.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Headers of one request end here at the latest.
const LINES_MAX: usize = 100;

/// How the hub behaves.
#[derive(Debug, Clone, Default)]
pub struct Behaviour {
    /// Files of the model `lab/tiny`.
    pub files: BTreeMap<String, Vec<u8>>,
    /// A transfer of weights ends after so many bytes, the first so many times.
    pub breaks: Option<(usize, usize)>,
    /// The token without which everything is refused.
    pub token: Option<String>,
    /// Transfers begin at the first byte whatever was asked for.
    pub knows_no_ranges: bool,
    /// Weights come with other bytes than were announced.
    pub lies: bool,
    /// What stands for a name of bytes, where it is not their hash.
    pub etag: Option<String>,
}

/// A running hub.
pub struct Hub {
    address: String,
    state: Arc<Mutex<State>>,
}

struct State {
    behaviour: Behaviour,
    broken: usize,
    requests: Vec<String>,
}

impl Hub {
    /// Starts one on a free port; it ends with the test's process.
    pub fn start(behaviour: Behaviour) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(Mutex::new(State {
            behaviour,
            broken: 0,
            requests: Vec::new(),
        }));
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, shared) = (stream.unwrap(), Arc::clone(&shared));
                // A client that goes away is one of the faults.
                std::thread::spawn(move || answer(stream, &shared).ok());
            }
        });
        Self { address, state }
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// Lines like `GET /lab/tiny/resolve/main/config.json bytes=0-0`, in the order in which they came.
    pub fn requests(&self) -> Vec<String> {
        self.state.lock().unwrap().requests.clone()
    }
}

/// What was asked.
struct Request {
    path: String,
    range: Option<usize>,
    token: Option<String>,
}

fn read_request(stream: &TcpStream) -> std::io::Result<Request> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let (mut range, mut token) = (None, None);
    for line in lines.take(LINES_MAX) {
        let line = line?;
        let Some((key, value)) = line.split_once(": ") else {
            break;
        };
        match key.to_ascii_lowercase().as_str() {
            "range" => {
                range = value
                    .trim_start_matches("bytes=")
                    .split('-')
                    .next()
                    .and_then(|at| at.parse().ok())
            }
            "authorization" => token = value.strip_prefix("Bearer ").map(str::to_owned),
            _ => {}
        }
    }
    Ok(Request { path, range, token })
}

fn answer(mut stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let request = read_request(&stream)?;
    let (behaviour, breaks) = {
        let mut state = state.lock().unwrap();
        let range = request
            .range
            .map_or(String::new(), |at| format!(" bytes={at}-"));
        state.requests.push(format!("{}{range}", request.path));
        let breaks = state
            .behaviour
            .breaks
            .filter(|(_, times)| state.broken < *times && request.path.starts_with("/store/"));
        let is_first_byte = request.path.starts_with("/store/") && breaks.is_some();
        state.broken += usize::from(is_first_byte);
        (state.behaviour.clone(), breaks.map(|(bytes, _)| bytes))
    };
    if behaviour.token.is_some()
        && request.token != behaviour.token
        && !request.path.starts_with("/store/")
    {
        return refuse(&mut stream, "401 Unauthorized", "GatedRepo");
    }
    if let Some(name) = request.path.strip_prefix("/store/") {
        return send(&mut stream, &behaviour, name, &request, breaks, "");
    }
    let Some(rest) = request.path.strip_prefix("/lab/tiny/resolve/") else {
        return refuse(&mut stream, "404 Not Found", "RepoNotFound");
    };
    let name = match rest.split_once('/') {
        Some(("main" | COMMIT, name)) => name,
        _ => return refuse(&mut stream, "404 Not Found", "RevisionNotFound"),
    };
    let Some(bytes) = behaviour.files.get(name) else {
        return refuse(&mut stream, "404 Not Found", "EntryNotFound");
    };
    let facts = format!("X-Repo-Commit: {COMMIT}\r\n");
    if !name.ends_with(".safetensors") {
        return send(&mut stream, &behaviour, name, &request, None, &facts);
    }
    // Large files lie in a store of their own, and the hub says what they are.
    let hash = behaviour
        .etag
        .clone()
        .unwrap_or_else(|| hex::encode(Sha256::digest(bytes)));
    write!(
        stream,
        "HTTP/1.1 302 Found\r\nLocation: /store/{name}\r\n{facts}X-Linked-Etag: \"{hash}\"\r\nX-Linked-Size: {}\r\n\
         Content-Length: 0\r\nConnection: close\r\n\r\n",
        bytes.len()
    )
}

fn refuse(stream: &mut TcpStream, status: &str, code: &str) -> std::io::Result<()> {
    write!(
        stream,
        "HTTP/1.1 {status}\r\nX-Error-Code: {code}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    )
}

fn send(
    stream: &mut TcpStream,
    behaviour: &Behaviour,
    name: &str,
    request: &Request,
    breaks: Option<usize>,
    facts: &str,
) -> std::io::Result<()> {
    let mut bytes = behaviour.files[name].clone();
    if behaviour.lies && name.ends_with(".safetensors") {
        bytes[0] ^= 1;
    }
    let from = request
        .range
        .filter(|_| !behaviour.knows_no_ranges)
        .unwrap_or(0)
        .min(bytes.len());
    let status = if request.range.is_some() && !behaviour.knows_no_ranges {
        "206 Partial Content"
    } else {
        "200 OK"
    };
    let rest = &bytes[from..];
    write!(
        stream,
        "HTTP/1.1 {status}\r\n{facts}ETag: \"{:040x}\"\r\nContent-Length: {}\r\nContent-Range: bytes {from}-{}/{}\r\n\
         Connection: close\r\n\r\n",
        bytes.len(),
        rest.len(),
        bytes.len().max(1) - 1,
        bytes.len()
    )?;
    stream.write_all(&rest[..breaks.unwrap_or(rest.len()).min(rest.len())])?;
    stream.flush()
}
