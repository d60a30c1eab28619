//! The response with a file of a version, whole or a range, read as the client receives it.

use std::ops::Range;
use std::sync::Arc;

use axum::body::Body;
use axum::http::StatusCode;
use axum::http::header::{
    ACCEPT_RANGES, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, HeaderMap,
    HeaderName, IF_NONE_MATCH, IF_RANGE, RANGE,
};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::Stream;
use futures_util::stream::try_unfold;

use super::edition::{Edition, Leaf};
use super::refusal::Refusal;
use super::span::Span;

const LINKED_ETAG: HeaderName = HeaderName::from_static("x-linked-etag");
const LINKED_SIZE: HeaderName = HeaderName::from_static("x-linked-size");
const REPO_COMMIT: HeaderName = HeaderName::from_static("x-repo-commit");

/// The response for a file, by the request's range and conditional headers.
pub(super) fn answer(
    asked: &HeaderMap,
    edition: Arc<Edition>,
    revision: &str,
    file: String,
) -> Result<Response, Refusal> {
    let leaf = edition.leaves.get(&file).ok_or(Refusal::NoFile)?;
    let (etag, bytes) = (etag(leaf), leaf.bytes);
    let described = describe(&edition, leaf, revision, &file);
    if is_known(asked, &etag) {
        return Ok((StatusCode::NOT_MODIFIED, described).into_response());
    }
    // With another ETag the client would join parts of different files.
    let is_same = field(asked, &IF_RANGE).is_none_or(|known| known == etag);
    let range = field(asked, &RANGE).filter(|_| is_same);
    let (status, range) = match Span::asked(range, bytes) {
        Span::Whole => (StatusCode::OK, 0..bytes),
        Span::Part(part) => (StatusCode::PARTIAL_CONTENT, part),
        Span::Beyond => {
            let shown = [(CONTENT_RANGE, format!("bytes */{bytes}"))];
            return Ok((StatusCode::RANGE_NOT_SATISFIABLE, described, shown).into_response());
        }
    };
    let length = [(CONTENT_LENGTH, (range.end - range.start).to_string())];
    let shown = format!(
        "bytes {}-{}/{bytes}",
        range.start,
        range.end.saturating_sub(1)
    );
    let body = Body::from_stream(pieces(edition, file, range));
    let whole = (status, described, length, body).into_response();
    Ok(match status {
        StatusCode::PARTIAL_CONTENT => ([(CONTENT_RANGE, shown)], whole).into_response(),
        _ => whole,
    })
}

fn describe(
    edition: &Edition,
    leaf: &Leaf,
    revision: &str,
    file: &str,
) -> [(HeaderName, String); 7] {
    // A commit always names the same bytes; other revisions may move.
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
    let etag = etag(leaf);
    [
        (LINKED_ETAG, etag.clone()),
        (ETAG, etag),
        (LINKED_SIZE, leaf.bytes.to_string()),
        (REPO_COMMIT, edition.commit()),
        (ACCEPT_RANGES, "bytes".to_owned()),
        (CACHE_CONTROL, lasting.to_owned()),
        (CONTENT_TYPE, kind.to_owned()),
    ]
}

fn etag(leaf: &Leaf) -> String {
    format!("\"{}\"", leaf.sha256)
}

/// A header's value; one that is not ASCII is ignored.
fn field<'a>(fields: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    fields.get(name)?.to_str().ok()
}

/// Whether the client has this content already.
fn is_known(asked: &HeaderMap, etag: &str) -> bool {
    let known = field(asked, &IF_NONE_MATCH).unwrap_or_default();
    known
        .split(',')
        .map(|known| known.trim().trim_start_matches("W/"))
        .any(|known| known == etag || known == "*")
}

/// Streams a part of a file; each piece is read after the one before was sent.
fn pieces(
    edition: Arc<Edition>,
    file: String,
    range: Range<u64>,
) -> impl Stream<Item = std::io::Result<Bytes>> + Send + 'static {
    try_unfold((edition, file, range), async |(edition, file, range)| {
        if range.is_empty() {
            return Ok(None);
        }
        let piece = read(&edition, &file, range.clone()).await?;
        let rest = range.start + piece.len() as u64..range.end;
        Ok(Some((piece, (edition, file, rest))))
    })
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
