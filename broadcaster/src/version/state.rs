//! Computes the parameter table and the Merkle root that the learner signs from a safetensors file, and checks that a file holds
//! exactly the weights of a signed version.
//!
//! The tree has the shape of RFC 6962 §2.1 (the left subtree is the largest full one), with BLAKE3 and labels that keep
//! leaves and nodes apart. A leaf covers a tensor's name, type, shape and bytes. The table is in the order of the names,
//! so that the root depends on the weights and not on a file's layout. Does not know what a tensor means.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use muster_protocol::id::ContentHash;
use muster_protocol::message::version::{
    Dtype, Object, Parameter, Part, PartKind, TENSORS_MAX, Version,
};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use crate::store::object::{ObjectError, verify_object};

pub mod stream;

/// Largest header read: 16,384 tensors of under 512 bytes each.
pub const HEADER_BYTES_MAX: u64 = 8 << 20;
/// Most metadata entries in a header: `format` and a few notes.
const METADATA_ENTRIES_MAX: usize = 256;
/// Bytes of the header's length at the start of a file.
pub(crate) const LENGTH_BYTES: usize = 8;
/// Labels that keep leaves and inner nodes of the tree apart.
const LEAF_LABEL: &[u8] = b"muster-tensor-v1\0";
const NODE_LABEL: &[u8] = b"muster-node-v1\0";

/// Why a file holds no weights, or not those of a version.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// The file does not end where its header or tensors end.
    #[error("safetensors file has {found} bytes, but its header needs {needed}: fetch it again")]
    Length { needed: u64, found: u64 },
    #[error("cannot read safetensors header ({problem}): fetch the file again")]
    Header { problem: String },
    #[error("tensor `{name}` {problem}: write the file again")]
    Tensor { name: String, problem: String },
    #[error("tensor `{name}` of the version is missing: fetch the file again")]
    Missing { name: String },
    #[error("tensor `{name}` is not in the version: fetch the file again")]
    Unexpected { name: String },
    #[error("tensor `{name}` is {found}, but the version says {expected}: fetch the file again")]
    Shape {
        name: String,
        expected: String,
        found: String,
    },
    #[error("bytes {}..{} ({place}) differ from the signed description: fetch the file again", range.start, range.end)]
    Differs {
        range: Range<u64>,
        /// The first tensor in the range, or the header.
        place: String,
    },
    /// The root differs, although every shard matches the description if there is one.
    #[error(
        "weights have root {found}, but the version says {expected}: fetch the file from another peer"
    )]
    Root {
        expected: ContentHash,
        found: ContentHash,
    },
    /// The version has other parts than one base part.
    #[error("version has {parts} parts, but this muster reads only one base part: upgrade muster")]
    Parts { parts: usize },
}

/// A tensor's row of the parameter table, and the place of its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpan {
    pub parameter: Parameter,
    /// The tensor's bytes within the file.
    pub range: Range<usize>,
}

/// The parameter table and the base part of the state in a safetensors file. Hashes the whole file.
///
/// # Errors
/// When the file is not a valid safetensors file.
pub fn describe_state(bytes: &[u8]) -> Result<(Vec<Parameter>, Part), StateError> {
    let spans = tensor_spans(bytes)?;
    let leaves: Vec<ContentHash> = spans
        .iter()
        .map(|span| {
            leaf(
                &span.parameter,
                &ContentHash::of(&bytes[span.range.clone()]),
            )
        })
        .collect();
    let part = Part {
        kind: PartKind::Base,
        root: merkle_root(&leaves),
    };
    Ok((spans.into_iter().map(|span| span.parameter).collect(), part))
}

/// Checks that a safetensors file holds exactly the weights of `version`. `anchor`, if known, describes the same file: its
/// shard hashes tell where a wrong file differs, which the root alone cannot.
///
/// # Errors
/// Names the first difference.
pub(crate) fn verify_state(
    bytes: &[u8],
    version: &Version,
    anchor: Option<&Object>,
) -> Result<(), StateError> {
    if let Some(object) = anchor {
        verify_against_anchor(bytes, version, object)?;
    }
    let spans = by_table(tensor_spans(bytes)?, &version.parameters)?;
    let hashes = spans
        .into_iter()
        .map(|span| ContentHash::of(&bytes[span.range]));
    verify_root(&hashes.collect::<Vec<_>>(), version)
}

/// Checks that tensors with these hashes, in the order of the version's table, are the weights of `version`.
///
/// # Errors
/// When they are not.
pub(crate) fn verify_root(hashes: &[ContentHash], version: &Version) -> Result<(), StateError> {
    let [
        Part {
            kind: PartKind::Base,
            root: expected,
        },
    ] = version.parts[..]
    else {
        return Err(StateError::Parts {
            parts: version.parts.len(),
        });
    };
    if let Some(row) = version.parameters.get(hashes.len()) {
        let name = row.name.clone();
        return Err(StateError::Missing { name });
    }
    let rows = version.parameters.iter().zip(hashes);
    let leaves: Vec<ContentHash> = rows.map(|(row, hash)| leaf(row, hash)).collect();
    let found = merkle_root(&leaves);
    if found != expected {
        return Err(StateError::Root { expected, found });
    }
    Ok(())
}

/// The tensors of a safetensors file, in the order of their names.
///
/// # Errors
/// When the header cannot be read, or its tensors do not tile the file exactly.
pub fn tensor_spans(bytes: &[u8]) -> Result<Vec<TensorSpan>, StateError> {
    let found = bytes.len() as u64;
    let short = |needed| StateError::Length { needed, found };
    let (length, rest) = bytes
        .split_first_chunk::<LENGTH_BYTES>()
        .ok_or_else(|| short(LENGTH_BYTES as u64))?;
    let header_bytes = u64::from_le_bytes(*length);
    if header_bytes > HEADER_BYTES_MAX {
        let problem =
            format!("its length is {header_bytes}, at most {HEADER_BYTES_MAX} is allowed");
        return Err(StateError::Header { problem });
    }
    let needed = LENGTH_BYTES as u64 + header_bytes;
    // At most 8 MiB, so the cast holds on any machine.
    let (header, data) = rest
        .split_at_checked(header_bytes as usize)
        .ok_or_else(|| short(needed))?;
    header_spans(header, data.len() as u64)
}

/// The tensors that a file's header lists, in the order of their names, before `data_bytes` of data.
///
/// # Errors
/// When the header cannot be read, or its tensors do not tile the data exactly.
pub(crate) fn header_spans(header: &[u8], data_bytes: u64) -> Result<Vec<TensorSpan>, StateError> {
    let refused = |problem: String| StateError::Header { problem };
    let data_start = (LENGTH_BYTES + header.len()) as u64;
    let end = data_start.checked_add(data_bytes);
    if end.is_none_or(|end| usize::try_from(end).is_err()) {
        return Err(refused(format!("{data_bytes} bytes cannot be addressed")));
    }
    let header: Header =
        serde_json::from_slice(header).map_err(|error| refused(error.to_string()))?;
    tile(header, data_bytes, data_start)
}

/// The root over `leaves` (RFC 6962 §2.1): a single leaf is its own root; more leaves have the node over both parts, where the
/// left part is the largest power of two below their number. The root of no leaves is the hash of no bytes.
pub(crate) fn merkle_root(leaves: &[ContentHash]) -> ContentHash {
    match leaves {
        [] => ContentHash::of(b""),
        [leaf] => *leaf,
        _ => {
            let split = leaves.len().next_power_of_two() / 2;
            let (left, right) = leaves.split_at(split);
            node(&merkle_root(left), &merkle_root(right))
        }
    }
}

/// BLAKE3(label ‖ name length u32 LE ‖ name ‖ dtype ‖ rank u8 ‖ dimensions u64 LE ‖ BLAKE3(bytes)).
fn leaf(parameter: &Parameter, data: &ContentHash) -> ContentHash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(LEAF_LABEL);
    hasher.update(&(parameter.name.len() as u32).to_le_bytes());
    hasher.update(parameter.name.as_bytes());
    hasher.update(&[match parameter.dtype {
        Dtype::Bf16 => 0,
        Dtype::F32 => 1,
        Dtype::F16 => 2,
    }]);
    hasher.update(&[parameter.shape.len() as u8]);
    parameter.shape.iter().for_each(|dimension| {
        hasher.update(&dimension.to_le_bytes());
    });
    hasher.update(&data.0);
    ContentHash(*hasher.finalize().as_bytes())
}

fn node(left: &ContentHash, right: &ContentHash) -> ContentHash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(NODE_LABEL).update(&left.0).update(&right.0);
    ContentHash(*hasher.finalize().as_bytes())
}

/// Sorts the tensors by the version's table, and checks that both list the same tensors.
fn by_table(spans: Vec<TensorSpan>, table: &[Parameter]) -> Result<Vec<TensorSpan>, StateError> {
    let mut spans: BTreeMap<String, TensorSpan> = spans
        .into_iter()
        .map(|span| (span.parameter.name.clone(), span))
        .collect();
    let mut ordered = Vec::with_capacity(table.len());
    for expected in table {
        let name = || expected.name.clone();
        let span = spans
            .remove(&expected.name)
            .ok_or_else(|| StateError::Missing { name: name() })?;
        let found = &span.parameter;
        if (found.dtype, &found.shape) != (expected.dtype, &expected.shape) {
            let shown = |row: &Parameter| format!("{:?} {:?}", row.dtype, row.shape);
            let (expected, found) = (shown(expected), shown(found));
            return Err(StateError::Shape {
                name: name(),
                expected,
                found,
            });
        }
        ordered.push(span);
    }
    match spans.into_keys().next() {
        Some(name) => Err(StateError::Unexpected { name }),
        None => Ok(ordered),
    }
}

fn verify_against_anchor(
    bytes: &[u8],
    version: &Version,
    anchor: &Object,
) -> Result<(), StateError> {
    match verify_object(anchor, bytes) {
        Err(ObjectError::Differs { range, .. }) => {
            let place = place_of(bytes, version, &range);
            Err(StateError::Differs { range, place })
        }
        Err(ObjectError::Size { expected, found }) => Err(StateError::Length {
            needed: expected,
            found,
        }),
        Err(error) => Err(StateError::Header {
            problem: error.to_string(),
        }),
        Ok(()) => Ok(()),
    }
}

/// The first tensor in a byte range. The file is wrong somewhere, so the header's name is used only if the version has the
/// same tensor.
fn place_of(bytes: &[u8], version: &Version, range: &Range<u64>) -> String {
    let Ok(mut spans) = tensor_spans(bytes) else {
        return "header".to_owned();
    };
    spans.sort_by_key(|span| span.range.start);
    let in_header = spans
        .first()
        .is_none_or(|first| (range.start as usize) < first.range.start);
    let here = spans
        .iter()
        .find(|span| span.range.end as u64 > range.start);
    match here.filter(|span| !in_header && version.parameters.contains(&span.parameter)) {
        Some(span) => format!("tensor `{}`", span.parameter.name),
        None => "header".to_owned(),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// A header's tensors by name. A derived map would accept a name twice and keep the last.
struct Header(BTreeMap<String, Entry>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map from tensor names to their entries")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut entries = BTreeMap::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                let metadata: BTreeMap<String, String> = map.next_value()?;
                if metadata.len() > METADATA_ENTRIES_MAX {
                    return Err(A::Error::custom("too many metadata entries"));
                }
                continue;
            }
            let shown: String = name.chars().take(64).collect();
            if entries.insert(name, map.next_value()?).is_some() {
                return Err(A::Error::custom(format!("tensor {shown:?} appears twice")));
            }
            if entries.len() > TENSORS_MAX {
                return Err(A::Error::custom(format!("more than {TENSORS_MAX} tensors")));
            }
        }
        Ok(Header(entries))
    }
}

/// Checks every entry, and that the tensors cover the data without gap or overlap: no root would cover a byte outside the
/// tensors.
fn tile(header: Header, data_bytes: u64, data_start: u64) -> Result<Vec<TensorSpan>, StateError> {
    if header.0.is_empty() {
        return Err(StateError::Header {
            problem: "it lists no tensor".to_owned(),
        });
    }
    let mut spans = Vec::with_capacity(header.0.len());
    for (name, entry) in header.0 {
        let (start, end) = entry.data_offsets;
        let parameter = parameter(name, entry)?;
        spans.push((start, end, parameter));
    }
    spans.sort_by_key(|span| (span.0, span.1));
    let mut covered = 0;
    for (start, end, parameter) in &spans {
        if *start != covered {
            let problem = format!("starts at {start}, but the one before it ends at {covered}");
            return Err(StateError::Tensor {
                name: parameter.name.clone(),
                problem,
            });
        }
        covered = *end;
    }
    if covered != data_bytes {
        let (needed, found) = (
            data_start.saturating_add(covered),
            data_start.saturating_add(data_bytes),
        );
        return Err(StateError::Length { needed, found });
    }
    // The caller has checked that the file's size fits in a usize, and no offset is larger, so the casts hold.
    let mut spans: Vec<TensorSpan> = spans
        .into_iter()
        .map(|(start, end, parameter)| TensorSpan {
            parameter,
            range: (data_start + start) as usize..(data_start + end) as usize,
        })
        .collect();
    spans.sort_by(|a, b| a.parameter.name.cmp(&b.parameter.name));
    debug_assert_eq!(
        spans
            .iter()
            .map(|span| span.range.len() as u64)
            .sum::<u64>(),
        data_bytes,
        "tensors tile the file"
    );
    Ok(spans)
}

fn parameter(name: String, entry: Entry) -> Result<Parameter, StateError> {
    let Entry {
        dtype,
        shape,
        data_offsets: (start, end),
    } = entry;
    let refused = |problem: String| {
        let shown = name.chars().take(64).collect();
        Err(StateError::Tensor {
            name: shown,
            problem,
        })
    };
    let dtype = match dtype.as_str() {
        "BF16" => Dtype::Bf16,
        "F32" => Dtype::F32,
        "F16" => Dtype::F16,
        other => {
            let shown: String = other.chars().take(16).collect();
            return refused(format!("has type {shown:?}, not BF16, F16 or F32"));
        }
    };
    if name.is_empty() || name.len() > 256 {
        return refused(format!("has a name of {} bytes, not 1 to 256", name.len()));
    }
    let elements = shape
        .iter()
        .try_fold(1u64, |n, dimension| n.checked_mul(*dimension));
    let bytes = elements
        .and_then(|n| n.checked_mul(dtype.bytes()))
        .filter(|bytes| *bytes > 0);
    if shape.len() > 8 || bytes.is_none() {
        return refused(format!("has an impossible shape of rank {}", shape.len()));
    }
    if end.checked_sub(start) != bytes {
        return refused(format!(
            "lies at {start}..{end}, which is not the size of {shape:?}"
        ));
    }
    Ok(Parameter {
        name,
        shape,
        dtype,
        stage: 0,
    })
}

#[cfg(test)]
mod tests;
