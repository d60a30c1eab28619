//! The header of a safetensors file: written in one fixed order, read with errors that name the damaged tensor.

use std::fmt::Write as _;
use std::ops::Range;

use safetensors::SafeTensors;
use safetensors::tensor::{Metadata, SafeTensorError};

use super::error::WeightsError;
use super::storage::Storage;

/// A tensor in a safetensors header; `offsets` count from the end of the header.
pub(crate) struct HeaderTensor<'a> {
    pub(crate) name: &'a str,
    pub(crate) storage: Storage,
    pub(crate) shape: &'a [usize],
    pub(crate) offsets: Range<usize>,
}

/// A safetensors header with its length in front, padded so that the data starts at a multiple of eight.
///
/// Written by hand because the library reorders tensors, and these bytes are hashed and signed.
pub(crate) fn write_header<'a>(
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
            tensor.storage.safetensors_name(),
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

/// The header of a whole file, and the data behind it.
pub(super) fn read_header(file: &[u8]) -> Result<(Metadata, &[u8]), WeightsError> {
    match SafeTensors::read_metadata(file) {
        Ok((header_bytes, metadata)) => Ok((metadata, &file[header_bytes + 8..])),
        Err(SafeTensorError::MetadataIncompleteBuffer) => Err(wrong_length(file)),
        Err(error) => Err(WeightsError::Header(error.to_string())),
    }
}

/// The library says only that a file's length is wrong; this error names the first tensor that is not whole.
fn wrong_length(file: &[u8]) -> WeightsError {
    let Some((header_bytes, metadata)) = readable_header(file) else {
        return WeightsError::Header(SafeTensorError::MetadataIncompleteBuffer.to_string());
    };
    let data_start = 8 + header_bytes;
    let found = file.len();
    for tensor in metadata.offset_keys() {
        let end = metadata.info(&tensor).map_or(0, |info| info.data_offsets.1);
        let expected = data_start.saturating_add(end);
        if expected > found {
            return WeightsError::Truncated {
                tensor,
                expected,
                found,
            };
        }
    }
    let data_end = data_start.saturating_add(metadata.data_len());
    WeightsError::Trailing {
        extra: found.saturating_sub(data_end),
    }
}

fn readable_header(file: &[u8]) -> Option<(usize, Metadata)> {
    let (length, rest) = file.split_first_chunk()?;
    let header = rest.get(..usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
    Some((header.len(), serde_json::from_slice(header).ok()?))
}
