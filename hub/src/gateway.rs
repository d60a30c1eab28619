//! Serves snapshots over HTTP, read-only, under the addresses of a model hub. A hub's tools and `curl` can download versions of a
//! run like any model.
//!
//! A version is served only after every byte was checked against the learner's signature. Connections are bounded ([`server`]),
//! and each keeps one piece of a file in memory ([`file`]).

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::header::{CACHE_CONTROL, HeaderMap, HeaderName};
use axum::response::Response;
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use muster_protocol::id::RunId;

use self::edition::Edition;
use self::refusal::Refusal;
use self::revision::Revision;
use self::version_cache::{Absent, VersionCache};

pub mod edition;
mod file;
mod refusal;
mod revision;
mod server;
pub mod source;
mod span;
pub mod version_cache;

/// Optional owner before the run's name, for tools that require one.
const OWNER: &str = "/muster";
/// The revision of requests that name none.
const NEWEST: &str = "main";
/// Size reported for pointer files. Hubs have them for large files; this gateway has none.
const POINTER_BYTES: u64 = 134;

/// The versions of one run, served over HTTP.
#[derive(Debug, Clone)]
pub struct Gateway {
    pub run: RunId,
    pub versions: VersionCache,
}

/// A reply that changes with each new version, so clients must not cache it.
type JsonReply = ([(HeaderName, &'static str); 1], Json<Value>);

impl Gateway {
    /// Serves at most `connections_max` connections at once on `listener`, until `shutdown`. Others wait in the system's queue.
    pub async fn serve(
        self,
        listener: TcpListener,
        connections_max: usize,
        shutdown: CancellationToken,
    ) {
        server::serve(self.router(), listener, connections_max, shutdown).await;
    }

    /// The hub's addresses, each with and without an owner before the run.
    fn router(self) -> Router {
        let models = Router::new()
            .route("/{run}", get(newest))
            .route("/{run}/revision/{revision}", get(model))
            .route("/{run}/tree/{revision}", get(tree));
        let files = Router::new().route("/{run}/resolve/{revision}/{file}", get(file));
        Router::new()
            .route("/", get(home))
            .nest("/api/models", models.clone().nest(OWNER, models))
            .merge(files.clone().nest(OWNER, files))
            .fallback(async || Refusal::NoFile)
            .with_state(Arc::new(self))
    }

    async fn find(&self, run: &str, revision: &str) -> Result<Arc<Edition>, Refusal> {
        if run != self.run.as_str() {
            return Err(Refusal::OtherRun);
        }
        let revision: Revision = revision.parse().map_err(|()| Absent::Unknown)?;
        Ok(self.versions.find(revision).await?)
    }

    async fn model(&self, run: &str, revision: &str) -> Result<JsonReply, Refusal> {
        let edition = self.find(run, revision).await?;
        let report = &edition.report;
        let siblings = edition.leaves.iter();
        let siblings =
            siblings.map(|(name, leaf)| json!({ "rfilename": name, "size": leaf.bytes }));
        Ok(uncached(json!({
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
}

/// The run and its available versions.
async fn home(State(gateway): State<Arc<Gateway>>) -> JsonReply {
    let inventory = gateway.versions.inventory();
    let versions = inventory.listed.iter().map(|listed| {
        json!({
            "policy_version": listed.version,
            "root": listed.root,
            "commit": listed.commit,
        })
    });
    uncached(json!({
        "run": gateway.run,
        "versions": versions.collect::<Vec<Value>>(),
    }))
}

/// The newest version and the names of its files.
async fn newest(
    State(gateway): State<Arc<Gateway>>,
    Path(run): Path<String>,
) -> Result<JsonReply, Refusal> {
    gateway.model(&run, NEWEST).await
}

/// A version and the names of its files.
async fn model(
    State(gateway): State<Arc<Gateway>>,
    Path((run, revision)): Path<(String, String)>,
) -> Result<JsonReply, Refusal> {
    gateway.model(&run, &revision).await
}

/// A version's files with their sizes and hashes.
async fn tree(
    State(gateway): State<Arc<Gateway>>,
    Path((run, revision)): Path<(String, String)>,
) -> Result<JsonReply, Refusal> {
    let edition = gateway.find(&run, &revision).await?;
    let entries = edition.leaves.iter().map(|(name, leaf)| {
        json!({
            "type": "file",
            "path": name,
            "size": leaf.bytes,
            "oid": leaf.sha256.get(..40),
            "lfs": { "oid": leaf.sha256, "size": leaf.bytes, "pointerSize": POINTER_BYTES },
        })
    });
    Ok(uncached(Value::Array(entries.collect())))
}

/// A file.
async fn file(
    State(gateway): State<Arc<Gateway>>,
    Path((run, revision, file)): Path<(String, String, String)>,
    asked: HeaderMap,
) -> Result<Response, Refusal> {
    let edition = gateway.find(&run, &revision).await?;
    file::answer(&asked, edition, &revision, file)
}

fn uncached(value: Value) -> JsonReply {
    ([(CACHE_CONTROL, "no-cache")], Json(value))
}
