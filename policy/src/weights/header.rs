//! The header of a safetensors file, written in one fixed order.

use std::fmt::Write as _;
use std::ops::Range;

use super::{Storage, TensorEntry};

/// A tensor as a safetensors header lists it; offsets count from the end of the header.
pub(crate) struct HeaderTensor<'a> {
    pub(crate) name: &'a str,
    pub(crate) storage: Storage,
    pub(crate) shape: &'a [usize],
    pub(crate) offsets: Range<usize>,
}

impl<'a> From<&'a TensorEntry> for HeaderTensor<'a> {
    fn from(entry: &'a TensorEntry) -> Self {
        Self {
            name: &entry.name,
            storage: entry.storage,
            shape: &entry.shape,
            offsets: entry.bytes.clone(),
        }
    }
}

/// A safetensors header with its length in front, padded so that the data starts at a multiple of eight.
///
/// Written by hand since the library sorts tensors its own way, and these bytes are hashed and signed.
pub(crate) fn header<'a>(
    metadata: &[(&str, &str)],
    tensors: impl Iterator<Item = HeaderTensor<'a>>,
) -> Vec<u8> {
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let pairs: Vec<String> = metadata
        .iter()
        .map(|(key, value)| format!("{}:{}", quoted(key), quoted(value)))
        .collect();
    let mut text = format!("{{\"__metadata__\":{{{}}}", pairs.join(","));
    for tensor in tensors {
        let shape: Vec<String> = tensor.shape.iter().map(usize::to_string).collect();
        // Writing to a string cannot fail.
        write!(
            text,
            ",{}:{{\"dtype\":\"{}\",\"shape\":[{}],\"data_offsets\":[{},{}]}}",
            quoted(tensor.name),
            tensor.storage.tag(),
            shape.join(","),
            tensor.offsets.start,
            tensor.offsets.end
        )
        .ok();
    }
    text.push('}');
    while !text.len().is_multiple_of(8) {
        text.push(' ');
    }
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}
