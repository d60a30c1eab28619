//! Import of a GGUF file into a Hugging Face folder: quantised blocks are widened, llama.cpp's changes to the weights are
//! taken back, and configuration, tokenizer and chat template are rebuilt from the metadata.
//!
//! Weights go from the file to the folder a piece at a time, so that a model larger than memory can be imported. Invariant:
//! every tensor of the file ends up in the folder or is refused by name; a folder that was written is one that runs here.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use half::bf16;
use serde_json::json;

use crate::config::{Config, ConfigError, TokenIds};
use crate::disk::WEIGHTS_BYTES_MAX;
use crate::disk::{DiskError, create_folder, write_atomically};
use crate::gguf::blocks::ELEMENTS_AT_ONCE;
use crate::gguf::description::{Description, ROPE_FACTORS, turned};
use crate::gguf::reader::{Container, Tensor};
use crate::gguf::vocabulary::Vocabulary;
use crate::layout::{Layout, Parameter};
use crate::text::{CHAT_FILE, Tokenizer, TokenizerError};
use crate::weights::Mapping;
use crate::weights::{HeaderTensor, Storage, write_header};

mod blocks;
mod description;
mod reader;
mod vocabulary;

/// Why a GGUF file was not imported.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The container does not parse.
    #[error("the file is not a GGUF file that can be read: {0}")]
    Malformed(String),
    /// A value of the metadata is missing or not what it should be.
    #[error(
        "the file's metadata has no usable `{key}`: it must be {expected}; convert the model again"
    )]
    Metadata {
        /// Which.
        key: String,
        /// What would be accepted.
        expected: &'static str,
    },
    /// A family that is not imported.
    #[error("the file holds the architecture `{found}`, but those that are imported are: {read}")]
    Architecture {
        /// What the file says.
        found: String,
        /// What would be accepted.
        read: String,
    },
    /// Something that changes the function and does not run here.
    #[error(
        "the file sets `{key}` to something that does not run here; take another model of the family"
    )]
    Unsupported {
        /// The key, or the tensor that stands for one.
        key: String,
    },
    /// A quantisation that is not read.
    #[error(
        "tensor `{tensor}` is stored as {found}, but F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and Q2_K to Q6_K are what \
         is read; take a file with one of these"
    )]
    Type {
        /// Its name.
        tensor: String,
        /// Its type.
        found: String,
    },
    /// A parameter without a tensor.
    #[error("the file lacks tensor `{tensor}`, which its metadata calls for; fetch it again")]
    Missing {
        /// Name in the file.
        tensor: String,
    },
    /// A tensor without a parameter.
    #[error(
        "the file holds tensor `{tensor}`, which its metadata does not call for; take another model of the family"
    )]
    Unexpected {
        /// Name in the file.
        tensor: String,
    },
    /// A shape that contradicts the metadata.
    #[error(
        "tensor `{tensor}` has shape {found:?}, but the metadata calls for {expected:?}; fetch the file again"
    )]
    Shape {
        /// Name in the file.
        tensor: String,
        /// Shape by the metadata, rows first.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },
    /// NaN or infinity.
    #[error(
        "tensor `{tensor}` holds a value that is not finite at element {element}; fetch the file again"
    )]
    NotFinite {
        /// Name in the file.
        tensor: String,
        /// First bad element.
        element: usize,
    },
    /// A tokenizer that is not rebuilt.
    #[error("the file's tokenizer has {key} `{found}`, but what can be rebuilt is: {read}")]
    Pieces {
        /// Key of the metadata.
        key: &'static str,
        /// What the file says.
        found: String,
        /// What would be accepted.
        read: &'static str,
    },
    /// What was rebuilt is no tokenizer, or does not fit.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The metadata describes a model that does not run.
    #[error("the file describes a model that does not run here: {0}")]
    Config(#[from] ConfigError),
    /// A file was not read or written.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The tensor library refused.
    #[error("the tensor library failed: {0}; check the free memory")]
    Tensor(#[from] candle_core::Error),
}

/// What was imported.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufImport {
    /// Shape and special tokens.
    pub config: Config,
    /// Elements of all parameters together.
    pub elements: usize,
    /// Tensors of each type that the file had.
    pub types: BTreeMap<String, usize>,
}

/// Imports a GGUF file into a folder.
///
/// # Errors
/// Names what in the file is damaged, missing, or does not run here. Nothing is written unless the whole header is good.
pub fn import_gguf(file: &Path, folder: &Path, storage: Storage) -> Result<GgufImport, GgufError> {
    let bytes = Mapping::open(file, WEIGHTS_BYTES_MAX, "name a GGUF file")?;
    let container = Container::parse(&bytes)?;
    let description = Description::new(&container)?;
    let mut config = description.config()?;
    let vocabulary = Vocabulary::of(&container, config.architecture)?;
    config.bos_token_id = vocabulary.bos;
    config.pad_token_id = vocabulary.pad;
    config.eos_token_ids.clone_from(&vocabulary.ends);
    config.validate()?;
    let (json, settings) = (vocabulary.tokenizer_json()?, vocabulary.settings(&config));
    Tokenizer::parse(&json, Some(&settings))?.check(&config)?;
    let layout = Layout::new(&config);
    let weights = Weights {
        sources: sources(&container, &description, &config, &layout)?,
        layout: &layout,
        storage,
    };
    create_folder(folder)?;
    let generation = json!({
        "bos_token_id": config.bos_token_id,
        "eos_token_id": TokenIds::from_slice(&config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
    });
    let texts = [
        ("config.json", Some(config.to_json(storage.torch_name()))),
        ("generation_config.json", Some(format!("{generation:#}\n"))),
        ("tokenizer.json", Some(json)),
        ("tokenizer_config.json", Some(settings)),
        (
            CHAT_FILE,
            container
                .text("tokenizer.chat_template")?
                .map(str::to_owned),
        ),
    ];
    for (name, text) in texts {
        if let Some(text) = text {
            write_atomically(&folder.join(name), |out| out.write_all(text.as_bytes()))?;
        }
    }
    weights.write(&folder.join("model.safetensors"))?;
    let mut types = BTreeMap::new();
    for tensor in container.tensors.values() {
        *types.entry(tensor.block.name()).or_default() += 1;
    }
    Ok(GgufImport {
        elements: layout.len(),
        config,
        types,
    })
}

/// Where a parameter comes from.
struct Source<'a> {
    /// Name in the file.
    name: String,
    tensor: &'a Tensor<'a>,
    /// Heads whose rows are put back in order.
    heads: Option<usize>,
    /// Taken off every element.
    added: f32,
}

/// The tensor of each parameter of the table, in its order.
fn sources<'a>(
    container: &'a Container<'a>,
    description: &Description<'_>,
    config: &Config,
    layout: &Layout,
) -> Result<Vec<Source<'a>>, GgufError> {
    let mut left: BTreeMap<&str, &Tensor<'_>> = container
        .tensors
        .iter()
        .map(|(name, tensor)| (*name, tensor))
        .collect();
    left.remove(ROPE_FACTORS);
    let mut sources = Vec::with_capacity(layout.parameters().len());
    for parameter in layout.parameters() {
        let name = description
            .tensor_name(&parameter.name)
            .unwrap_or_else(|| parameter.name.clone());
        let Some(tensor) = left.remove(name.as_str()) else {
            return Err(GgufError::Missing { tensor: name });
        };
        if tensor.shape != parameter.shape {
            return Err(GgufError::Shape {
                tensor: name,
                expected: parameter.shape.clone(),
                found: tensor.shape.clone(),
            });
        }
        sources.push(Source {
            name,
            tensor,
            heads: description.turned_heads(&parameter.name, config),
            added: description.added(&parameter.name),
        });
    }
    match left.into_keys().next() {
        None => Ok(sources),
        Some(tensor) => Err(GgufError::Unexpected {
            tensor: tensor.to_owned(),
        }),
    }
}

impl Source<'_> {
    /// Gives `out` the elements in the order of the parameter, a piece at a time.
    fn pieces(
        &self,
        parameter: &Parameter,
        out: &mut dyn FnMut(&[f32]) -> Result<(), Stopped>,
    ) -> Result<(), Stopped> {
        // A bias is one row, and its elements are what its heads order.
        let (columns, rows) = match parameter.shape[..] {
            [rows, columns] => (columns, rows),
            _ => (parameter.len(), 1),
        };
        let row_bytes = self.tensor.block.row_bytes(columns);
        let rows_at_once = (ELEMENTS_AT_ONCE / columns).max(1);
        let mut gathered = Vec::new();
        let mut seen = 0;
        for first in (0..rows).step_by(rows_at_once) {
            let last = rows.min(first + rows_at_once);
            let bytes = match self.heads.filter(|_| rows > 1) {
                None => &self.tensor.bytes[first * row_bytes..last * row_bytes],
                Some(heads) => {
                    gathered.clear();
                    for row in first..last {
                        let at = turned(row, rows / heads) * row_bytes;
                        gathered.extend_from_slice(&self.tensor.bytes[at..at + row_bytes]);
                    }
                    &gathered
                }
            };
            let mut values = self.tensor.block.widen(bytes, columns)?;
            if let (Some(heads), 1) = (self.heads, rows) {
                let dim = columns / heads;
                values = (0..columns)
                    .map(|place| values[turned(place, dim)])
                    .collect();
            }
            for value in &mut values {
                *value -= self.added;
            }
            if let Some(bad) = values.iter().position(|value| !value.is_finite()) {
                return Err(not_finite(&self.name, seen + bad));
            }
            seen += values.len();
            out(&values)?;
        }
        Ok(())
    }
}

/// Why a file stopped being written.
enum Stopped {
    /// The disk refused.
    Disk(io::Error),
    /// The source did.
    Source(GgufError),
}

impl From<io::Error> for Stopped {
    fn from(error: io::Error) -> Self {
        Self::Disk(error)
    }
}

impl From<GgufError> for Stopped {
    fn from(error: GgufError) -> Self {
        Self::Source(error)
    }
}

fn not_finite(tensor: &str, element: usize) -> Stopped {
    Stopped::Source(GgufError::NotFinite {
        tensor: tensor.to_owned(),
        element,
    })
}

/// Weights on their way from a GGUF file into a safetensors file.
struct Weights<'a> {
    sources: Vec<Source<'a>>,
    layout: &'a Layout,
    storage: Storage,
}

impl Weights<'_> {
    fn write(&self, path: &Path) -> Result<(), GgufError> {
        // Kept beside, since errors of the disk are all that passes through the writer.
        let mut refusal = None;
        let written = write_atomically(path, |out| match self.write_to(out) {
            Ok(()) => Ok(()),
            Err(Stopped::Disk(error)) => Err(error),
            Err(Stopped::Source(error)) => {
                refusal = Some(error);
                Err(io::ErrorKind::InvalidData.into())
            }
        });
        match refusal {
            Some(error) => Err(error),
            None => Ok(written?),
        }
    }

    fn write_to(&self, out: &mut dyn Write) -> Result<(), Stopped> {
        out.write_all(&self.header())?;
        let mut bytes = Vec::new();
        for (source, parameter) in self.sources.iter().zip(self.layout.parameters()) {
            source.pieces(parameter, &mut |values| {
                bytes.clear();
                match self.storage {
                    Storage::F32 => {
                        bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()))
                    }
                    Storage::Bf16 => {
                        let rounded = values.iter().map(|&value| bf16::from_f32(value));
                        // The largest values of f32 round up to infinity.
                        if let Some(bad) = rounded.clone().position(|value| !value.is_finite()) {
                            return Err(not_finite(&source.name, bad));
                        }
                        bytes.extend(rounded.flat_map(bf16::to_le_bytes));
                    }
                }
                Ok(out.write_all(&bytes)?)
            })?;
        }
        Ok(())
    }

    fn header(&self) -> Vec<u8> {
        let width = self.storage.width();
        let entries = self
            .layout
            .parameters()
            .iter()
            .map(|parameter| HeaderTensor {
                name: &parameter.name,
                storage: self.storage,
                shape: &parameter.shape,
                offsets: parameter.range().start * width..parameter.range().end * width,
            });
        write_header(&[("format", "pt")], entries)
    }
}

#[cfg(test)]
mod tests;
