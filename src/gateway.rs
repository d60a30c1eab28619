//! Snapshots over HTTP: read-only, under the addresses of a model hub, so that the hub's own tools and plain `curl` fetch
//! versions of a run as they fetch any model.
//!
//! Nothing is sent of a version before every byte of it was checked against the run's learner. Connections are bounded, and
//! each holds one piece of a file in memory, however slow its client; the bounds of a request are in [`http`].

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use muster_protocol::id::RunId;

use self::address::{Address, Revision};
use self::edition::Edition;
use self::http::{Answer, Conversation, HttpError, Method, Request, Status};
use self::shelf::{Absent, Shelf};
use self::span::Span;

mod address;
pub(crate) mod edition;
mod http;
pub(crate) mod shelf;
mod span;
pub(crate) mod stock;

/// Pause after the system gave no connection, as when it has no more files to give.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// After how many seconds to ask again for a version that is being made ready.
const RETRY_SECONDS: &str = "5";
/// What stands for the size of a pointer file, which hubs have for large files and we do not.
const POINTER_BYTES: u64 = 134;

/// What is served.
#[derive(Debug, Clone)]
pub(crate) struct Gateway {
    pub(crate) run: RunId,
    pub(crate) shelf: Shelf,
}

impl Gateway {
    /// Answers on `listener`, to at most so many connections at once, until `shutdown`; others wait their turn in the
    /// system's queue.
    pub(crate) async fn serve(
        self,
        listener: TcpListener,
        connections_max: usize,
        shutdown: CancellationToken,
    ) {
        let gateway = Arc::new(self);
        let places = Arc::new(Semaphore::new(connections_max));
        let tracker = TaskTracker::new();
        loop {
            let admitted = tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                admitted = admit(&listener, &places) => admitted,
            };
            match admitted {
                Ok((stream, place)) => {
                    let talk = Arc::clone(&gateway).converse(stream);
                    let ended = shutdown.clone().cancelled_owned();
                    tracker.spawn(async move {
                        tokio::select! {
                            talked = talk => if let Err(error) = talked {
                                tracing::debug!(%error, "a connection ended");
                            },
                            () = ended => {}
                        }
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(error = format!("{error:#}"), "no connection can be taken");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            }
        }
        tracker.close();
        tracker.wait().await;
    }

    async fn converse(self: Arc<Self>, stream: TcpStream) -> Result<(), HttpError> {
        stream.set_nodelay(true)?;
        let mut client = Conversation::new(stream);
        while let Some(request) = client.next().await? {
            let reply = self.reply(&request).await;
            let reply = reply.unwrap_or_else(|refusal| refusal.reply());
            client.start(&reply.answer, reply.body.bytes()).await?;
            match reply.body {
                Body::Text(text) => client.send(text.into()).await?,
                Body::File {
                    edition,
                    file,
                    range,
                } if request.method == Method::Get => {
                    let mut at = range.start;
                    while at < range.end {
                        let piece = read(&edition, &file, at..range.end).await?;
                        at += piece.len() as u64;
                        client.send(piece).await?;
                    }
                }
                Body::File { .. } | Body::None => {}
            }
        }
        Ok(())
    }

    async fn reply(&self, request: &Request) -> Result<Reply, Refusal> {
        match Address::parse(&request.path) {
            None => Err(Refusal::NoFile),
            Some(Address::Home) => Ok(self.home()),
            Some(Address::Model { run, revision }) => self.model(run, revision).await,
            Some(Address::Tree { run, revision }) => self.tree(run, revision).await,
            Some(Address::File {
                run,
                revision,
                file,
            }) => {
                let edition = self.find(run, revision).await?;
                file_reply(request, edition, revision, file)
            }
        }
    }

    /// The run, and the versions that can be had.
    fn home(&self) -> Reply {
        let inventory = self.shelf.inventory();
        let versions = inventory.listed.iter().map(|listed| {
            json!({
                "policy_version": listed.version,
                "root": listed.root,
                "commit": listed.commit,
            })
        });
        say(&json!({
            "run": self.run,
            "versions": versions.collect::<Vec<Value>>(),
        }))
    }

    async fn find(&self, run: &str, revision: &str) -> Result<Arc<Edition>, Refusal> {
        if run != self.run.as_str() {
            return Err(Refusal::OtherRun);
        }
        let revision: Revision = revision.parse().map_err(|()| Absent::Unknown)?;
        Ok(self.shelf.find(revision).await?)
    }

    async fn model(&self, run: &str, revision: &str) -> Result<Reply, Refusal> {
        let edition = self.find(run, revision).await?;
        let report = &edition.report;
        let siblings = edition.leaves.iter();
        let siblings =
            siblings.map(|(name, leaf)| json!({ "rfilename": name, "size": leaf.bytes }));
        Ok(say(&json!({
            "id": run,
            "modelId": run,
            "sha": edition.commit(),
            "private": false,
            "gated": false,
            "disabled": false,
            "tags": ["safetensors", "muster"],
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "siblings": siblings.collect::<Vec<Value>>(),
            "policy_version": report.version.version,
            "root": report.version.root,
            "learner": report.learner,
        })))
    }

    async fn tree(&self, run: &str, revision: &str) -> Result<Reply, Refusal> {
        let edition = self.find(run, revision).await?;
        let entries = edition.leaves.iter().map(|(name, leaf)| {
            json!({
                "type": "file",
                "path": name,
                "size": leaf.bytes,
                "oid": leaf.sha256.get(..40),
                "lfs": { "oid": leaf.sha256, "size": leaf.bytes, "pointerSize": POINTER_BYTES },
            })
        });
        Ok(say(&Value::Array(entries.collect())))
    }
}

/// # Cancel safety
/// A cancelled call drops at most a connection that nobody has answered.
async fn admit(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> Result<(TcpStream, OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await?;
    let (stream, _) = listener.accept().await.context("accept")?;
    Ok((stream, place))
}

/// What is answered.
struct Reply {
    answer: Answer,
    body: Body,
}

enum Body {
    /// Not even a length of its own.
    None,
    Text(String),
    /// A part of a file, read as the client takes it.
    File {
        edition: Arc<Edition>,
        file: String,
        range: Range<u64>,
    },
}

impl Body {
    fn bytes(&self) -> u64 {
        match self {
            Self::None => 0,
            Self::Text(text) => text.len() as u64,
            Self::File { range, .. } => range.end - range.start,
        }
    }
}

/// Why a request gets nothing, with the codes by which hubs' clients tell one from another.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("this gateway serves another run: see /")]
    OtherRun,
    #[error(transparent)]
    Absent(#[from] Absent),
    #[error("the version has no such file")]
    NoFile,
}

impl Refusal {
    fn reply(&self) -> Reply {
        let (status, code) = match self {
            Self::OtherRun => (Status::NotFound, "RepoNotFound"),
            Self::Absent(Absent::Unknown) => (Status::NotFound, "RevisionNotFound"),
            Self::Absent(Absent::NotYet) => (Status::ServiceUnavailable, "NotYet"),
            Self::Absent(Absent::Refused(_)) => (Status::BadGateway, "Refused"),
            Self::NoFile => (Status::NotFound, "EntryNotFound"),
        };
        let said = self.to_string();
        let mut answer = Answer::new(status)
            .with("X-Error-Code", code)
            .with("X-Error-Message", said.clone())
            .with("Content-Type", "application/json");
        if status == Status::ServiceUnavailable {
            answer = answer.with("Retry-After", RETRY_SECONDS);
        }
        let body = Body::Text(json!({ "error": said }).to_string());
        Reply { answer, body }
    }
}

/// A file or a part of it, by what the client asked for and has already.
fn file_reply(
    request: &Request,
    edition: Arc<Edition>,
    revision: &str,
    file: &str,
) -> Result<Reply, Refusal> {
    let leaf = edition.leaves.get(file).ok_or(Refusal::NoFile)?;
    // A commit names the same bytes for ever; what another revision names may change.
    let lasting = if revision == edition.commit() {
        "public, max-age=31536000, immutable"
    } else {
        "no-cache"
    };
    let kind = if file.ends_with(".json") {
        "application/json"
    } else {
        "application/octet-stream"
    };
    let (etag, bytes) = (format!("\"{}\"", leaf.sha256), leaf.bytes);
    let describe = |status| {
        Answer::new(status)
            .with("ETag", etag.clone())
            .with("X-Linked-Etag", etag.clone())
            .with("X-Linked-Size", bytes.to_string())
            .with("X-Repo-Commit", edition.commit())
            .with("Accept-Ranges", "bytes")
            .with("Cache-Control", lasting)
            .with("Content-Type", kind)
    };
    let body = Body::None;
    if is_known(request, &etag) {
        let answer = describe(Status::NotModified);
        return Ok(Reply { answer, body });
    }
    // Bytes of another content than the client has the rest of would be joined to it.
    let is_same = |known: &str| known == etag;
    let range = request.field("range");
    let range = range.filter(|_| request.field("if-range").is_none_or(is_same));
    let (answer, range) = match Span::asked(range, bytes) {
        Span::Whole => (describe(Status::Ok), 0..bytes),
        Span::Part(part) => {
            let shown = format!("bytes {}-{}/{bytes}", part.start, part.end - 1);
            let answer = describe(Status::PartialContent);
            (answer.with("Content-Range", shown), part)
        }
        Span::Beyond => {
            let answer = describe(Status::RangeNotSatisfiable);
            let answer = answer.with("Content-Range", format!("bytes */{bytes}"));
            return Ok(Reply { answer, body });
        }
    };
    let file = file.to_owned();
    let body = Body::File {
        edition,
        file,
        range,
    };
    Ok(Reply { answer, body })
}

/// The next bytes of a file, read on a thread that may block.
async fn read(edition: &Arc<Edition>, file: &str, range: Range<u64>) -> std::io::Result<Bytes> {
    let (edition, file) = (Arc::clone(edition), file.to_owned());
    let read = move || match edition.leaves.get(&file) {
        Some(leaf) => leaf.read_piece(&range),
        None => Err(std::io::Error::other("the version has no such file")),
    };
    let piece = tokio::task::spawn_blocking(read).await;
    let piece = piece.map_err(std::io::Error::other)?;
    piece.inspect_err(|error| tracing::warn!(%error, "a transfer is broken off"))
}

fn say(value: &Value) -> Reply {
    let answer = Answer::new(Status::Ok)
        .with("Content-Type", "application/json")
        .with("Cache-Control", "no-cache");
    let body = Body::Text(value.to_string());
    Reply { answer, body }
}

/// Whether the client has this content already.
fn is_known(request: &Request, etag: &str) -> bool {
    let known = request.field("if-none-match").unwrap_or_default();
    known
        .split(',')
        .map(|known| known.trim().trim_start_matches("W/"))
        .any(|known| known == etag || known == "*")
}
