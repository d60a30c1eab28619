//! Lays weights out in several files with an index, as Hugging Face libraries do for large models: which tensor lies in which file,
//! and every byte of the files that is not a weight. Pure.
//!
//! Tensors keep the order of the one signed file. Invariant: the same tensors and cuts always give the same bytes, so that
//! verification can generate them again.

use std::collections::BTreeMap;
use std::ops::Range;

use muster_protocol::id::ContentHash;
use muster_protocol::message::version::{Dtype, Object, Parameter, Version};
use serde::Serialize;

use super::names::WEIGHTS_FILE;
use crate::version::state::stream::{Checked, image_spans};
use crate::version::state::{LENGTH_BYTES, StateError, TensorSpan, verify_root};

/// Most files of weights: a seeder that serves the folder holds each open. At the default size they hold more than the largest
/// object.
pub const FOLDER_FILES_MAX: usize = 100;
/// A header's length is a multiple of this, so that tensors are aligned.
const ALIGNMENT: usize = 8;
/// The first bytes of a header; libraries reject files without this format note.
const HEADER_START: &str = r#"{"__metadata__":{"format":"pt"}"#;

/// A file of weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct WeightFile {
    pub(super) name: String,
    /// The file's first bytes: the header's length and the header. Empty if the file is the whole image.
    pub(super) head: Vec<u8>,
    /// The range of the image that follows.
    pub(super) data: Range<u64>,
    /// Number of tensors in that range.
    pub(super) tensors: usize,
}

impl WeightFile {
    /// A file that is the whole image.
    pub(super) fn whole(bytes: u64) -> Self {
        Self {
            name: WEIGHTS_FILE.to_owned(),
            head: Vec::new(),
            data: 0..bytes,
            tensors: 0,
        }
    }
    pub(super) fn bytes(&self) -> u64 {
        self.head.len() as u64 + (self.data.end - self.data.start)
    }

    /// The place in this file of a range of the image.
    pub(super) fn place(&self, image: &Range<u64>) -> Range<u64> {
        let shift = |at: u64| self.head.len() as u64 + at.saturating_sub(self.data.start);
        shift(image.start)..shift(image.end)
    }
}

/// The layout of weights in several files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Split {
    /// The image's first bytes, which no file holds: the header's length and the header.
    pub(super) head: Vec<u8>,
    /// Hashes of the tensors' bytes, in the order of the version's table.
    pub(super) hashes: Vec<ContentHash>,
    /// In the order of their bytes.
    pub(super) spans: Vec<TensorSpan>,
    /// In the order of their bytes.
    pub(super) files: Vec<WeightFile>,
    /// The bytes of the index file.
    pub(super) index: Vec<u8>,
}

/// Why weights cannot be laid out in several files.
#[derive(Debug, thiserror::Error)]
pub(super) enum LayoutError {
    #[error("{0}")]
    State(#[from] StateError),
    #[error("its files do not hold all tensors in 2 to {FOLDER_FILES_MAX} files")]
    Cuts,
    #[error("they need more than {FOLDER_FILES_MAX} files")]
    TooMany,
    #[error("the index cannot be written: {0}")]
    Index(#[from] serde_json::Error),
}

impl Split {
    /// Lays verified weights out in files of at most `bytes_max` bytes; a tensor larger than that has a larger file. `None` if one
    /// file is enough.
    pub(super) fn plan(
        checked: &Checked,
        version: &Version,
        anchor: &Object,
        bytes_max: u64,
    ) -> Result<Option<Self>, LayoutError> {
        if anchor.bytes <= bytes_max {
            return Ok(None);
        }
        let spans = image_spans(&checked.head, version, anchor)?;
        let counts = cut(&spans, bytes_max);
        if counts.len() < 2 {
            return Ok(None);
        }
        if counts.len() > FOLDER_FILES_MAX {
            return Err(LayoutError::TooMany);
        }
        let Checked { head, hashes } = checked.clone();
        Self::open(head, hashes, &counts, version, anchor).map(Some)
    }

    /// The layout in files of `counts` tensors. Checks that the tensors are those of the version.
    pub(super) fn open(
        head: Vec<u8>,
        hashes: Vec<ContentHash>,
        counts: &[usize],
        version: &Version,
        anchor: &Object,
    ) -> Result<Self, LayoutError> {
        let spans = image_spans(&head, version, anchor)?;
        verify_root(&hashes, version)?;
        let total = counts
            .iter()
            .try_fold(0, |sum: usize, n| sum.checked_add(*n));
        let fits = hashes.len() == spans.len() && total == Some(spans.len());
        if !fits || counts.contains(&0) || !(2..=FOLDER_FILES_MAX).contains(&counts.len()) {
            return Err(LayoutError::Cuts);
        }
        let mut files = Vec::with_capacity(counts.len());
        let mut rest = spans.as_slice();
        for (at, count) in counts.iter().enumerate() {
            let (here, others) = rest.split_at(*count);
            rest = others;
            files.push(weight_file(here, at + 1, counts.len()));
        }
        let index = index(&files, &spans)?;
        Ok(Self {
            head,
            hashes,
            spans,
            files,
            index,
        })
    }

    /// The file that holds a tensor.
    pub(super) fn file_of(&self, span: &TensorSpan) -> Option<&WeightFile> {
        let start = span.range.start as u64;
        self.files.iter().find(|file| file.data.contains(&start))
    }
}

/// How many tensors go in each file: as many as fit, one after the other.
fn cut(spans: &[TensorSpan], bytes_max: u64) -> Vec<usize> {
    let mut counts: Vec<usize> = Vec::new();
    let mut file = Header::default();
    for span in spans {
        let fits = file.file_bytes_with(span) <= bytes_max;
        match counts.last_mut().filter(|_| fits) {
            Some(count) => *count += 1,
            None => {
                counts.push(1);
                file = Header::default();
            }
        }
        file.push(span);
    }
    counts
}

fn weight_file(spans: &[TensorSpan], number: usize, of: usize) -> WeightFile {
    let mut header = Header::default();
    spans.iter().for_each(|span| header.push(span));
    let start = spans.first().map_or(0, |span| span.range.start as u64);
    WeightFile {
        name: format!("model-{number:05}-of-{of:05}.safetensors"),
        data: start..start + header.data_bytes,
        head: header.finish(),
        tensors: spans.len(),
    }
}

/// A header that is being written.
struct Header {
    text: String,
    data_bytes: u64,
}

impl Default for Header {
    fn default() -> Self {
        Self {
            text: HEADER_START.to_owned(),
            data_bytes: 0,
        }
    }
}

impl Header {
    fn push(&mut self, span: &TensorSpan) {
        self.text.push_str(&self.entry(span));
        self.data_bytes += span.range.len() as u64;
    }

    /// Size of the file if `span` were its last tensor.
    fn file_bytes_with(&self, span: &TensorSpan) -> u64 {
        let text = self.text.len() + self.entry(span).len() + "}".len();
        (LENGTH_BYTES + text.next_multiple_of(ALIGNMENT)) as u64
            + self.data_bytes
            + span.range.len() as u64
    }

    fn entry(&self, span: &TensorSpan) -> String {
        let Parameter {
            name, dtype, shape, ..
        } = &span.parameter;
        let dtype = match dtype {
            Dtype::Bf16 => "BF16",
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
        };
        let shape: Vec<String> = shape.iter().map(u64::to_string).collect();
        let (start, end) = (self.data_bytes, self.data_bytes + span.range.len() as u64);
        format!(
            r#",{}:{{"dtype":"{dtype}","shape":[{}],"data_offsets":[{start},{end}]}}"#,
            serde_json::Value::from(name.as_str()),
            shape.join(",")
        )
    }

    /// The header's length and the header, padded with spaces.
    fn finish(mut self) -> Vec<u8> {
        self.text.push('}');
        let length = self.text.len().next_multiple_of(ALIGNMENT);
        let spaces = " ".repeat(length - self.text.len());
        [
            &(length as u64).to_le_bytes()[..],
            self.text.as_bytes(),
            spaces.as_bytes(),
        ]
        .concat()
    }
}

#[derive(Serialize)]
struct Index<'a> {
    metadata: Metadata,
    weight_map: BTreeMap<&'a str, &'a str>,
}

#[derive(Serialize)]
struct Metadata {
    total_size: u64,
}

fn index(files: &[WeightFile], spans: &[TensorSpan]) -> Result<Vec<u8>, serde_json::Error> {
    let names = files
        .iter()
        .flat_map(|file| std::iter::repeat_n(file.name.as_str(), file.tensors));
    let tensors = spans.iter().map(|span| span.parameter.name.as_str());
    let index = Index {
        metadata: Metadata {
            total_size: spans.iter().map(|span| span.range.len() as u64).sum(),
        },
        weight_map: tensors.zip(names).collect(),
    };
    let mut bytes = serde_json::to_vec_pretty(&index)?;
    bytes.push(b'\n');
    Ok(bytes)
}

#[cfg(test)]
mod tests;
