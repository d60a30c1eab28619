//! Published weights: one image of every parameter as the bytes of a safetensors file, always the same bytes for the same
//! values, loadable by Hugging Face transformers as it is.
//!
//! Knows the parameter table, not how weights are used. Invariant: an [`Image`] holds exactly the parameters of its
//! configuration, each with the right shape, bf16 or f32, every value finite.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata, SafeTensorError};

use crate::config::Config;
use crate::layout::{Layout, Parameter};

pub(crate) use files::Shards;
pub use files::shard_names;
pub(crate) use header::{HeaderTensor, header};
pub(crate) use mapping::Mapping;

mod files;
mod header;
mod mapping;
mod published;

/// How a parameter is stored; it is computed with in float32 either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Storage {
    /// Upper half of a float32: what is published by default, since it halves every transfer.
    Bf16,
    /// Exactly what the optimizer holds.
    F32,
}

impl Storage {
    /// Bytes of one element.
    pub fn width(self) -> usize {
        match self {
            Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }

    /// Name in a safetensors header.
    pub fn tag(self) -> &'static str {
        match self {
            Self::Bf16 => "BF16",
            Self::F32 => "F32",
        }
    }

    /// Name in `config.json`.
    pub fn torch_name(self) -> &'static str {
        match self {
            Self::Bf16 => "bfloat16",
            Self::F32 => "float32",
        }
    }
}

/// How a tensor of a file is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Bf16,
    F16,
    F32,
}

impl From<Storage> for Format {
    fn from(storage: Storage) -> Self {
        match storage {
            Storage::Bf16 => Self::Bf16,
            Storage::F32 => Self::F32,
        }
    }
}

impl Format {
    /// Bytes of one element.
    pub(crate) fn width(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    /// What holds it without loss.
    fn storage(self) -> Storage {
        match self {
            Self::Bf16 => Storage::Bf16,
            Self::F16 | Self::F32 => Storage::F32,
        }
    }
}

/// A parameter where it lies, in a file or an image, little-endian.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StoredTensor<'a> {
    pub(crate) format: Format,
    /// One row after another.
    pub(crate) bytes: &'a [u8],
}

/// Why bytes are not the weights of a configuration.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum WeightsError {
    /// The header does not parse.
    #[error("weights are not a safetensors file ({0}); fetch them again")]
    Header(String),
    /// Fewer bytes than the header announces.
    #[error(
        "weights are truncated: tensor `{tensor}` needs {expected} bytes in the file, which has {found}; fetch them again"
    )]
    Truncated {
        /// First tensor that is not whole.
        tensor: String,
        /// Bytes needed from the start of the file.
        expected: usize,
        /// Bytes there are.
        found: usize,
    },
    /// More bytes than the header announces.
    #[error("weights have {extra} bytes after their last tensor; fetch them again")]
    Trailing {
        /// Bytes too many.
        extra: usize,
    },
    /// A parameter of the configuration is not in the file.
    #[error(
        "weights lack tensor `{tensor}`, which config.json calls for; use the pair that belongs together"
    )]
    Missing {
        /// Its name.
        tensor: String,
    },
    /// A tensor that the configuration does not have.
    #[error(
        "weights hold tensor `{tensor}`, which config.json does not call for; use the pair that belongs together"
    )]
    Unexpected {
        /// Its name.
        tensor: String,
    },
    /// The same parameter under two names.
    #[error(
        "weights hold the parameter of tensor `{tensor}` under another name too; fetch them again"
    )]
    Twice {
        /// One of the names.
        tensor: String,
    },
    /// A head of its own, where the configuration ties it to the embedding.
    #[error(
        "tensor `{tensor}` differs from the embedding that config.json ties it to; set tie_word_embeddings to false there"
    )]
    Untied {
        /// Its name.
        tensor: &'static str,
    },
    /// A shape that contradicts the configuration.
    #[error(
        "tensor `{tensor}` has shape {found:?}, but config.json calls for {expected:?}; use the pair that belongs together"
    )]
    Shape {
        /// Its name.
        tensor: String,
        /// Shape by the configuration.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },
    /// A storage type that is not read.
    #[error("tensor `{tensor}` is stored as {found}, but BF16, F16 and F32 are what is read")]
    Dtype {
        /// Its name.
        tensor: String,
        /// Type in the file.
        found: String,
    },
    /// NaN or infinity.
    #[error(
        "tensor `{tensor}` holds a value that is not finite at element {element}; fetch the weights again or go back a version"
    )]
    NotFinite {
        /// Its name.
        tensor: String,
        /// First bad element.
        element: usize,
    },
    /// The list of files does not parse.
    #[error("model.safetensors.index.json cannot be read: {0}; fetch it again")]
    Index(String),
    /// A file name that is not one of the folder's own.
    #[error(
        "model.safetensors.index.json names the file `{file}`, which is no plain name of a safetensors file; fetch it again"
    )]
    ShardName {
        /// What stands there.
        file: String,
    },
    /// A tensor that is not where the index says, or is where it does not.
    #[error(
        "tensor `{tensor}` is in {file} or in its place of the index, but not in both; fetch the files again"
    )]
    Misplaced {
        /// Its name.
        tensor: String,
        /// The file.
        file: String,
    },
    /// A flat vector of the wrong length was to be published.
    #[error("{found} values were given for {expected} parameters")]
    Length {
        /// Elements of the table.
        expected: usize,
        /// Elements given.
        found: usize,
    },
}

/// One tensor of an image, so that it can be hashed without knowing anything else about weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// Hugging Face name.
    pub name: String,
    /// `[out, in]` or `[width]`.
    pub shape: Vec<usize>,
    /// How its elements are stored, little-endian.
    pub storage: Storage,
    /// Its bytes within [`Image::bytes`].
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

/// The file that an image is, shared. Not a slice behind a count of its own: making one would copy all weights once more.
#[derive(Debug, Clone)]
pub struct ImageBytes(Arc<Vec<u8>>);

impl AsRef<[u8]> for ImageBytes {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Image {
    /// Reads the bytes of any safetensors file that holds exactly the parameters of `config`, and brings them to
    /// canonical form. F16 is widened to F32, which loses nothing.
    ///
    /// # Errors
    /// Names the first tensor that is missing, unexpected, truncated, of a wrong shape or type, or not finite.
    pub fn parse(config: &Config, bytes: &[u8]) -> Result<Self, WeightsError> {
        Self::gather(config, &[bytes])
    }

    /// The same of several files.
    pub(crate) fn gather(config: &Config, files: &[&[u8]]) -> Result<Self, WeightsError> {
        let layout = Layout::new(config);
        let sources = checked(config, &layout, files)?;
        let storages: Vec<Storage> = sources.iter().map(|s| s.format.storage()).collect();
        Ok(Self::build(&layout, &storages, |index, out| {
            let StoredTensor { format, bytes } = sources[index];
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

    /// Publishes a flat vector of every parameter, all stored alike.
    ///
    /// # Errors
    /// When the length is wrong or a value is not finite (or is not once stored: bf16 keeps the range of f32, but
    /// rounding its largest values up overflows).
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
            let bad = values[parameter.range()]
                .iter()
                .position(|&value| match storage {
                    Storage::F32 => !value.is_finite(),
                    Storage::Bf16 => !bf16::from_f32(value).is_finite(),
                });
            if let Some(element) = bad {
                return Err(WeightsError::NotFinite {
                    tensor: parameter.name.clone(),
                    element,
                });
            }
        }
        let storages = vec![storage; layout.parameters().len()];
        Ok(Self::build(layout, &storages, |index, out| {
            let values = &values[layout.parameters()[index].range()];
            match storage {
                Storage::F32 => {
                    out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
                }
                Storage::Bf16 => {
                    out.extend(
                        values
                            .iter()
                            .flat_map(|&value| bf16::from_f32(value).to_le_bytes()),
                    );
                }
            }
        }))
    }

    /// Lays the file out and has `write` append the bytes of each parameter.
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
        let header = header(
            &[("format", "pt")],
            order
                .iter()
                .map(|&index| HeaderTensor::from(&tensors[index])),
        );
        let mut bytes = Vec::with_capacity(header.len() + end);
        bytes.extend_from_slice(&header);
        for &index in &order {
            write(index, &mut bytes);
        }
        for entry in &mut tensors {
            entry.bytes = entry.bytes.start + header.len()..entry.bytes.end + header.len();
        }
        Self {
            bytes: ImageBytes(Arc::new(bytes)),
            tensors: tensors.into(),
        }
    }

    /// The file.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.as_ref()
    }

    /// The file, shared.
    pub fn shared_bytes(&self) -> ImageBytes {
        self.bytes.clone()
    }

    /// Every tensor, in the order of the parameter table.
    pub fn tensors(&self) -> &[TensorEntry] {
        &self.tensors
    }

    /// Every parameter where it lies, in the order of the parameter table.
    pub(crate) fn stored(&self) -> Vec<StoredTensor<'_>> {
        let entries = self.tensors.iter().map(|entry| StoredTensor {
            format: entry.storage.into(),
            bytes: &self.bytes()[entry.bytes.clone()],
        });
        entries.collect()
    }

    /// Storage of the widest tensor: what `config.json` names as the model's type.
    pub fn storage(&self) -> Storage {
        let any_f32 = self
            .tensors
            .iter()
            .any(|entry| entry.storage == Storage::F32);
        if any_f32 { Storage::F32 } else { Storage::Bf16 }
    }

    /// Every parameter widened to f32, flat, in the order of the parameter table.
    pub fn values(&self) -> Vec<f32> {
        let elements = self
            .tensors
            .iter()
            .map(|entry| entry.bytes.len() / entry.storage.width());
        let mut values = Vec::with_capacity(elements.sum());
        for entry in self.tensors.iter() {
            let data = &self.bytes()[entry.bytes.clone()];
            match entry.storage {
                Storage::Bf16 => values.extend(
                    data.as_chunks()
                        .0
                        .iter()
                        .map(|&value| bf16::from_le_bytes(value).to_f32()),
                ),
                Storage::F32 => {
                    values.extend(
                        data.as_chunks()
                            .0
                            .iter()
                            .map(|&value| f32::from_le_bytes(value)),
                    );
                }
            }
        }
        values
    }

    /// Whether this image holds exactly the parameters of `layout`.
    pub(crate) fn fits(&self, layout: &Layout) -> Result<(), WeightsError> {
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

/// The parameters of `layout`, which is `config`'s, where they lie in the files of a model, in the order of the table; there
/// are no others in them, and every value is finite.
pub(crate) fn checked<'a>(
    config: &Config,
    layout: &Layout,
    files: &[&'a [u8]],
) -> Result<Vec<StoredTensor<'a>>, WeightsError> {
    let mut stored = published::tensors(config, files)?;
    let mut sources = Vec::with_capacity(layout.parameters().len());
    for parameter in layout.parameters() {
        let tensor = stored
            .remove(&parameter.name)
            .ok_or_else(|| WeightsError::Missing {
                tensor: parameter.name.clone(),
            })?;
        if tensor.shape != parameter.shape {
            return Err(WeightsError::Shape {
                tensor: parameter.name.clone(),
                expected: parameter.shape.clone(),
                found: tensor.shape,
            });
        }
        let source = StoredTensor {
            format: format_of(parameter, tensor.dtype)?,
            bytes: tensor.data,
        };
        refuse_not_finite(parameter, source)?;
        sources.push(source);
    }
    match stored.into_keys().min() {
        None => Ok(sources),
        Some(tensor) => Err(WeightsError::Unexpected { tensor }),
    }
}

/// Table indices in the order of the file: wider elements first, the table's order within a width.
fn file_order(storages: &[Storage]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..storages.len()).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(storages[index].width()));
    order
}

/// The library's error, or, where it says only that the length is wrong, the first tensor that is not whole.
fn explained(error: SafeTensorError, bytes: &[u8]) -> WeightsError {
    let unexplained = WeightsError::Header(error.to_string());
    if !matches!(error, SafeTensorError::MetadataIncompleteBuffer) {
        return unexplained;
    }
    let Some((length, rest)) = bytes.split_first_chunk() else {
        return unexplained;
    };
    let header = usize::try_from(u64::from_le_bytes(*length))
        .ok()
        .and_then(|len| rest.get(..len));
    let Some(metadata) = header.and_then(|header| serde_json::from_slice::<Metadata>(header).ok())
    else {
        return unexplained;
    };
    let data_start = 8 + header.map_or(0, <[u8]>::len);
    let found = bytes.len();
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

fn format_of(parameter: &Parameter, dtype: Dtype) -> Result<Format, WeightsError> {
    match dtype {
        Dtype::F32 => Ok(Format::F32),
        Dtype::F16 => Ok(Format::F16),
        Dtype::BF16 => Ok(Format::Bf16),
        other => Err(WeightsError::Dtype {
            tensor: parameter.name.clone(),
            found: format!("{other:?}"),
        }),
    }
}

fn refuse_not_finite(parameter: &Parameter, tensor: StoredTensor<'_>) -> Result<(), WeightsError> {
    // NaN and infinity are what has every bit of the exponent.
    let bad = match tensor.format {
        Format::F32 => first_with_bits::<4>(tensor.bytes, [0, 0, 0x80, 0x7F]),
        Format::Bf16 => first_with_bits::<2>(tensor.bytes, [0x80, 0x7F]),
        Format::F16 => first_with_bits::<2>(tensor.bytes, [0x00, 0x7C]),
    };
    match bad {
        None => Ok(()),
        Some(element) => Err(WeightsError::NotFinite {
            tensor: parameter.name.clone(),
            element,
        }),
    }
}

/// The first element of which all of `bits` are set. Whole pieces are looked at without stopping within, so that the
/// compiler looks at many elements at once.
fn first_with_bits<const N: usize>(bytes: &[u8], bits: [u8; N]) -> Option<usize> {
    const PIECE: usize = 4096;
    let word = |element: [u8; N]| {
        let mut word = [0; 4];
        word[..N].copy_from_slice(&element);
        u32::from_le_bytes(word)
    };
    let bits = word(bits);
    let found = |element: &[u8; N]| word(*element) & bits == bits;
    let elements = bytes.as_chunks::<N>().0;
    for (piece, elements) in elements.chunks(PIECE).enumerate() {
        if elements
            .iter()
            .fold(false, |any, element| any | found(element))
        {
            let at = elements.iter().position(found)?;
            return Some(piece * PIECE + at);
        }
    }
    None
}

#[cfg(test)]
mod tests;
