//! Published weights: every parameter of a policy in one canonical safetensors file, which Hugging Face transformers loads
//! as it is.
//!
//! Invariant: an [`Image`] holds exactly the parameters of its configuration, each with the right shape, bf16 or f32, all
//! values finite; equal values in equal storage give equal bytes.

use std::cmp::Reverse;
use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};

use super::error::WeightsError;
use super::header::{HeaderTensor, write_header};
use super::published::find_parameters;
use super::storage::{Format, Storage, StoredTensor};
use crate::config::Config;
use crate::layout::Layout;

/// One tensor of an image: enough to hash it without knowing anything else about weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// Hugging Face name.
    pub name: String,
    /// `[out, in]` or `[width]`.
    pub shape: Vec<usize>,
    pub storage: Storage,
    /// Its place within [`Image::bytes`].
    pub bytes: Range<usize>,
}

/// Published weights as the canonical bytes of a safetensors file.
///
/// Canonical means: header keys and tensors in the order of the parameter table (f32 tensors before bf16 ones, so that
/// every tensor is aligned to its element), the header padded with spaces to a multiple of eight, `format` = `pt`.
#[derive(Debug, Clone)]
pub struct Image {
    bytes: ImageBytes,
    /// In the order of the parameter table.
    tensors: Arc<[TensorEntry]>,
}

/// The shared bytes of an image. Not an `Arc<[u8]>`: making one from a `Vec` would copy all weights once more.
#[derive(Debug, Clone)]
pub struct ImageBytes(Arc<Vec<u8>>);

impl AsRef<[u8]> for ImageBytes {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Image {
    /// Reads any safetensors file that holds exactly the parameters of `config`, and brings it to canonical form. F16 is
    /// widened to F32, which loses nothing.
    ///
    /// # Errors
    /// Names the first tensor that is missing, unexpected, truncated, of a wrong shape or type, or not finite.
    pub fn parse(config: &Config, bytes: &[u8]) -> Result<Self, WeightsError> {
        Self::from_files(config, &[bytes])
    }

    /// Like [`Image::parse`], for a model split over several files.
    pub(crate) fn from_files(config: &Config, files: &[&[u8]]) -> Result<Self, WeightsError> {
        let layout = Layout::new(config);
        let found = find_parameters(config, &layout, files)?;
        let storages: Vec<Storage> = found.iter().map(|s| s.format.storage()).collect();
        Ok(Self::build(&layout, &storages, |index, out| {
            let StoredTensor { format, bytes } = found[index];
            match format {
                Format::F16 => {
                    for value in bytes.as_chunks().0 {
                        out.extend_from_slice(&f16::from_le_bytes(*value).to_f32().to_le_bytes());
                    }
                }
                Format::Bf16 | Format::F32 => out.extend_from_slice(bytes),
            }
        }))
    }

    /// Publishes the flat vector of all parameters in one storage.
    ///
    /// # Errors
    /// When the length is wrong, or a value is not finite once stored.
    pub fn from_values(
        layout: &Layout,
        values: &[f32],
        storage: Storage,
    ) -> Result<Self, WeightsError> {
        if values.len() != layout.len() {
            return Err(WeightsError::Length {
                expected: layout.len(),
                found: values.len(),
            });
        }
        for parameter in layout.parameters() {
            if let Some(element) = storage.first_not_finite(&values[parameter.range()]) {
                return Err(WeightsError::NotFinite {
                    tensor: parameter.name.clone(),
                    element,
                });
            }
        }
        let storages = vec![storage; layout.parameters().len()];
        Ok(Self::build(layout, &storages, |index, out| {
            storage.encode(&values[layout.parameters()[index].range()], out);
        }))
    }

    /// Writes the header and calls `write` to append the bytes of each parameter.
    fn build(
        layout: &Layout,
        storages: &[Storage],
        mut write: impl FnMut(usize, &mut Vec<u8>),
    ) -> Self {
        let order = file_order(storages);
        let mut tensors: Vec<TensorEntry> = layout
            .parameters()
            .iter()
            .zip(storages)
            .map(|(parameter, &storage)| TensorEntry {
                name: parameter.name.clone(),
                shape: parameter.shape.clone(),
                storage,
                bytes: 0..parameter.len() * storage.width(),
            })
            .collect();
        let mut end = 0;
        for &index in &order {
            let entry = &mut tensors[index];
            entry.bytes = end..end + entry.bytes.end;
            end = entry.bytes.end;
        }
        let header = write_header(
            &[("format", "pt")],
            order.iter().map(|&index| HeaderTensor {
                name: &tensors[index].name,
                storage: tensors[index].storage,
                shape: &tensors[index].shape,
                offsets: tensors[index].bytes.clone(),
            }),
        );
        let mut bytes = Vec::with_capacity(header.len() + end);
        bytes.extend_from_slice(&header);
        for &index in &order {
            write(index, &mut bytes);
        }
        debug_assert_eq!(
            bytes.len(),
            header.len() + end,
            "tensors fill the file that the header announces"
        );
        for entry in &mut tensors {
            entry.bytes = entry.bytes.start + header.len()..entry.bytes.end + header.len();
        }
        Self {
            bytes: ImageBytes(Arc::new(bytes)),
            tensors: tensors.into(),
        }
    }

    /// The whole safetensors file.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.as_ref()
    }

    /// The whole safetensors file, without a copy.
    pub fn shared_bytes(&self) -> ImageBytes {
        self.bytes.clone()
    }

    /// In the order of the parameter table.
    pub fn tensors(&self) -> &[TensorEntry] {
        &self.tensors
    }

    /// The bytes of all parameters, in the order of the parameter table.
    pub(crate) fn stored(&self) -> Vec<StoredTensor<'_>> {
        let entries = self.tensors.iter().map(|entry| StoredTensor {
            format: entry.storage.into(),
            bytes: &self.bytes()[entry.bytes.clone()],
        });
        entries.collect()
    }

    /// Storage of the widest tensor, which `config.json` names as the model's type.
    pub fn storage(&self) -> Storage {
        let mut storages = self.tensors.iter().map(|entry| entry.storage);
        if storages.any(|storage| storage == Storage::F32) {
            Storage::F32
        } else {
            Storage::Bf16
        }
    }

    /// All parameters widened to f32, flat, in the order of the parameter table.
    pub fn values(&self) -> Vec<f32> {
        let elements = self
            .tensors
            .iter()
            .map(|entry| entry.bytes.len() / entry.storage.width());
        let mut values = Vec::with_capacity(elements.sum());
        for entry in self.tensors.iter() {
            let bytes = &self.bytes()[entry.bytes.clone()];
            match entry.storage {
                Storage::Bf16 => {
                    let elements = bytes.as_chunks().0.iter();
                    values.extend(elements.map(|&value| bf16::from_le_bytes(value).to_f32()));
                }
                Storage::F32 => {
                    let elements = bytes.as_chunks().0.iter();
                    values.extend(elements.map(|&value| f32::from_le_bytes(value)));
                }
            }
        }
        values
    }

    /// Refuses a layout whose parameters are not exactly those of this image.
    pub(crate) fn check_fits(&self, layout: &Layout) -> Result<(), WeightsError> {
        let mut entries = self.tensors.iter();
        for parameter in layout.parameters() {
            let entry = entries
                .next()
                .filter(|entry| entry.name == parameter.name)
                .ok_or_else(|| WeightsError::Missing {
                    tensor: parameter.name.clone(),
                })?;
            if entry.shape != parameter.shape {
                return Err(WeightsError::Shape {
                    tensor: parameter.name.clone(),
                    expected: parameter.shape.clone(),
                    found: entry.shape.clone(),
                });
            }
        }
        match entries.next() {
            None => Ok(()),
            Some(entry) => Err(WeightsError::Unexpected {
                tensor: entry.name.clone(),
            }),
        }
    }
}

/// Indices of the parameter table in the order of the file: wider elements first, then the table's order.
fn file_order(storages: &[Storage]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..storages.len()).collect();
    order.sort_by_key(|&index| Reverse(storages[index].width()));
    order
}

#[cfg(test)]
mod tests;
