//! Verifies weights while they are read, with one shard of the file in memory at a time.
//!
//! One pass computes the hashes of shards and tensors, on two threads if shards are large. Invariant: a header is parsed only
//! after the shards that hold it were verified.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::ops::Range;
use std::thread;

use muster_protocol::id::ContentHash;
use muster_protocol::message::version::{Object, Version};

use super::{
    HEADER_BYTES_MAX, LENGTH_BYTES, StateError, TensorSpan, by_table, header_spans, verify_root,
};
use crate::store::object::{ObjectError, shard_count, shard_range, verify_shard};

/// Smaller shards are hashed on one thread: starting a second takes tens of microseconds.
const ALONGSIDE_BYTES_MIN: usize = 256 << 10;

/// Why a stream does not hold the weights of a version.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    #[error("{0}")]
    State(#[from] StateError),
    #[error("cannot read the weights: {0}")]
    Read(#[from] io::Error),
}

/// The parts of verified weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Checked {
    /// The file's first bytes: the header's length and the header.
    pub head: Vec<u8>,
    /// Hashes of the tensors' bytes, in the order of the version's table.
    pub hashes: Vec<ContentHash>,
}

/// Reads a safetensors file to its end. Checks that it matches the description in `anchor` and holds exactly the weights of
/// `version`.
///
/// # Errors
/// At the first difference, or when the reader fails.
pub(crate) fn verify_stream(
    reader: &mut impl Read,
    version: &Version,
    anchor: &Object,
) -> Result<Checked, StreamError> {
    let mut pass = Pass::new(version, anchor);
    // A shard of a validated description has at most 16 MiB, so the casts hold.
    let mut buffer = vec![0; u64::from(anchor.shard_bytes).min(anchor.bytes) as usize];
    for shard in 0..shard_count(anchor) {
        let range = shard_range(anchor, shard).map_err(|error| pass.explained(error))?;
        let bytes = &mut buffer[..(range.end - range.start) as usize];
        reader.read_exact(bytes)?;
        pass.check(shard, bytes)?;
    }
    Ok(pass.finish()?)
}

/// The state of one pass over a file.
struct Pass<'a> {
    version: &'a Version,
    anchor: &'a Object,
    head: Vec<u8>,
    /// In the order of their bytes; empty until the header is complete.
    spans: Vec<TensorSpan>,
    /// One for each complete tensor, in the order of `spans`.
    hashes: Vec<ContentHash>,
    /// Bytes of the file read so far.
    taken: usize,
    hasher: blake3::Hasher,
}

impl<'a> Pass<'a> {
    fn new(version: &'a Version, anchor: &'a Object) -> Self {
        Self {
            version,
            anchor,
            head: Vec::new(),
            spans: Vec::new(),
            hashes: Vec::new(),
            taken: 0,
            hasher: blake3::Hasher::new(),
        }
    }

    fn check(&mut self, shard: u32, bytes: &[u8]) -> Result<(), StateError> {
        let anchor = self.anchor;
        let verify = || verify_shard(anchor, shard, bytes);
        if self.spans.is_empty() || bytes.len() < ALONGSIDE_BYTES_MIN {
            verify().map_err(|error| self.explained(error))?;
            return self.take(bytes);
        }
        let (taken, verified) = thread::scope(|scope| {
            let other = thread::Builder::new().spawn_scoped(scope, verify);
            let taken = self.take(bytes);
            // If the thread cannot start, this one does its work.
            let verified = match other.map(thread::ScopedJoinHandle::join) {
                Ok(Ok(verified)) => verified,
                Ok(Err(_)) | Err(_) => verify(),
            };
            (taken, verified)
        });
        verified.map_err(|error| self.explained(error))?;
        taken
    }

    /// Hashes the next bytes of the file.
    fn take(&mut self, mut bytes: &[u8]) -> Result<(), StateError> {
        while self.spans.is_empty() && !bytes.is_empty() {
            let lacking = self.head_bytes()?.saturating_sub(self.head.len());
            let (now, rest) = bytes.split_at(lacking.min(bytes.len()));
            self.head.extend_from_slice(now);
            self.taken += now.len();
            bytes = rest;
            if self.head.len() >= LENGTH_BYTES && self.head.len() == self.head_bytes()? {
                self.open_header()?;
            }
        }
        while !bytes.is_empty() {
            // The tensors tile the file, so a byte after the header lies in one of them.
            let span = self.spans.get(self.hashes.len());
            let end = span.map_or(usize::MAX, |span| span.range.end);
            let (now, rest) = bytes.split_at((end - self.taken).min(bytes.len()));
            self.hasher.update(now);
            self.taken += now.len();
            bytes = rest;
            if self.taken == end {
                self.hashes
                    .push(ContentHash(*self.hasher.finalize().as_bytes()));
                self.hasher.reset();
            }
        }
        Ok(())
    }

    /// Where the header ends; before its length is known, the bytes that hold the length.
    fn head_bytes(&self) -> Result<usize, StateError> {
        let Some(length) = self.head.first_chunk::<LENGTH_BYTES>() else {
            return Ok(LENGTH_BYTES);
        };
        let length = u64::from_le_bytes(*length);
        if length > HEADER_BYTES_MAX {
            let problem = format!("its length is {length}, at most {HEADER_BYTES_MAX} is allowed");
            return Err(StateError::Header { problem });
        }
        Ok(LENGTH_BYTES + length as usize)
    }

    fn open_header(&mut self) -> Result<(), StateError> {
        self.spans = image_spans(&self.head, self.version, self.anchor)?;
        Ok(())
    }

    fn finish(self) -> Result<Checked, StateError> {
        if self.spans.is_empty() {
            let (needed, found) = (self.head_bytes()? as u64, self.taken as u64);
            return Err(StateError::Length { needed, found });
        }
        let names = self.spans.into_iter().map(|span| span.parameter.name);
        let mut by_name: BTreeMap<String, ContentHash> = names.zip(self.hashes).collect();
        let rows = self.version.parameters.iter();
        let hashes: Vec<ContentHash> = rows.filter_map(|row| by_name.remove(&row.name)).collect();
        verify_root(&hashes, self.version)?;
        let head = self.head;
        Ok(Checked { head, hashes })
    }

    fn explained(&self, error: ObjectError) -> StateError {
        match error {
            ObjectError::Differs { range, .. } => {
                let place = self.place(&range);
                StateError::Differs { range, place }
            }
            error => StateError::Header {
                problem: error.to_string(),
            },
        }
    }

    /// The first tensor in a range of the file.
    fn place(&self, range: &Range<u64>) -> String {
        let in_header = range.start < self.head.len() as u64;
        let mut spans = self.spans.iter();
        let here = spans.find(|span| span.range.end as u64 > range.start);
        match here.filter(|_| !in_header) {
            Some(span) => format!("tensor `{}`", span.parameter.name),
            None => "header".to_owned(),
        }
    }
}

/// The tensors of a file that begins with `head`, in the order of their bytes. Checks that they are those of `version`.
///
/// # Errors
/// When the header cannot be read, or lists other tensors or other sizes than the version and the description.
pub(crate) fn image_spans(
    head: &[u8],
    version: &Version,
    anchor: &Object,
) -> Result<Vec<TensorSpan>, StateError> {
    let short = StateError::Length {
        needed: head.len() as u64,
        found: anchor.bytes,
    };
    let data_bytes = anchor.bytes.checked_sub(head.len() as u64).ok_or(short)?;
    let header = head.get(LENGTH_BYTES..).unwrap_or_default();
    let spans = header_spans(header, data_bytes)?;
    let mut spans = by_table(spans, &version.parameters)?;
    spans.sort_by_key(|span| span.range.start);
    Ok(spans)
}

#[cfg(test)]
mod tests;
