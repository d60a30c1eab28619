//! The import: a GGUF file in, a Hugging Face folder out.
//!
//! Weights are converted a piece at a time, so that a model larger than memory can be imported. Invariant: every tensor of
//! the file ends up in the folder or is refused by name, and nothing is written before all names and shapes are checked.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use serde_json::json;

use super::blocks::ELEMENTS_AT_ONCE;
use super::description::{Description, ROPE_FACTORS, interleaved_row};
use super::error::GgufError;
use super::reader::{Container, Tensor};
use super::vocabulary::Vocabulary;
use crate::config::{Config, TokenIds};
use crate::disk::{WEIGHTS_BYTES_MAX, create_folder, write_atomically};
use crate::layout::{Layout, Parameter};
use crate::text::{CHAT_FILE, Tokenizer};
use crate::weights::{HeaderTensor, Mapping, Storage, write_header};

#[derive(Debug, Clone, PartialEq)]
pub struct GgufImport {
    pub config: Config,
    /// Elements of all parameters together.
    pub elements: usize,
    /// Number of tensors of each type in the file.
    pub types: BTreeMap<String, usize>,
}

/// Imports a GGUF file into a folder.
///
/// # Errors
/// Names the part of the file that is damaged or missing, or that this crate cannot run.
pub fn import_gguf(file: &Path, folder: &Path, storage: Storage) -> Result<GgufImport, GgufError> {
    let bytes = Mapping::open(file, WEIGHTS_BYTES_MAX, "name a GGUF file")?;
    let container = Container::parse(&bytes)?;
    let description = Description::new(&container)?;
    let mut config = description.config()?;
    let vocabulary = Vocabulary::new(&container, config.architecture)?;
    config.bos_token_id = vocabulary.bos;
    config.pad_token_id = vocabulary.pad;
    config.eos_token_ids.clone_from(&vocabulary.ends);
    config.validate()?;
    let (json, settings) = (vocabulary.tokenizer_json()?, vocabulary.settings(&config));
    Tokenizer::parse(&json, Some(&settings))?.check(&config)?;
    let layout = Layout::new(&config);
    let weights = Conversion {
        tensors: match_tensors(&container, &description, &config, &layout)?,
        layout: &layout,
        storage,
    };
    create_folder(folder)?;
    let generation = json!({
        "bos_token_id": config.bos_token_id,
        "eos_token_id": TokenIds::from_slice(&config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
    });
    let chat = container.text("tokenizer.chat_template")?;
    let texts = [
        ("config.json", Some(config.to_json(storage.torch_name()))),
        ("generation_config.json", Some(format!("{generation:#}\n"))),
        ("tokenizer.json", Some(json)),
        ("tokenizer_config.json", Some(settings)),
        (CHAT_FILE, chat.map(str::to_owned)),
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

/// A tensor of the file and how to make a parameter of it.
struct ConvertedTensor<'a> {
    /// Name in the file.
    name: String,
    tensor: &'a Tensor<'a>,
    /// Number of heads whose rows the file interleaves.
    interleaved_heads: Option<usize>,
    /// Subtracted from every element.
    norm_offset: f32,
}

/// The tensor of each parameter of the table, in the table's order.
fn match_tensors<'a>(
    container: &'a Container<'a>,
    description: &Description<'_>,
    config: &Config,
    layout: &Layout,
) -> Result<Vec<ConvertedTensor<'a>>, GgufError> {
    let mut left: BTreeMap<&str, &Tensor<'_>> = container
        .tensors
        .iter()
        .map(|(name, tensor)| (*name, tensor))
        .collect();
    left.remove(ROPE_FACTORS);
    let mut matched = Vec::with_capacity(layout.parameters().len());
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
        matched.push(ConvertedTensor {
            name,
            tensor,
            interleaved_heads: description.interleaved_heads(&parameter.name, config),
            norm_offset: description.norm_offset(&parameter.name),
        });
    }
    match left.into_keys().next() {
        None => Ok(matched),
        Some(tensor) => Err(GgufError::Unexpected {
            tensor: tensor.to_owned(),
        }),
    }
}

impl ConvertedTensor<'_> {
    /// Calls `out` with the elements in the order of the parameter, a piece at a time.
    fn for_each_piece(
        &self,
        parameter: &Parameter,
        out: &mut dyn FnMut(&[f32]) -> Result<(), WriteError>,
    ) -> Result<(), WriteError> {
        // A bias is one row; its heads interleave elements instead of rows.
        let (columns, rows) = match parameter.shape[..] {
            [rows, columns] => (columns, rows),
            _ => (parameter.len(), 1),
        };
        let row_bytes = self.tensor.block.row_bytes(columns);
        let rows_at_once = (ELEMENTS_AT_ONCE / columns).max(1);
        let mut gathered = Vec::new();
        let mut written = 0;
        for first in (0..rows).step_by(rows_at_once) {
            let last = rows.min(first + rows_at_once);
            let bytes = match self.interleaved_heads.filter(|_| rows > 1) {
                None => &self.tensor.bytes[first * row_bytes..last * row_bytes],
                Some(heads) => {
                    gathered.clear();
                    for row in first..last {
                        let at = interleaved_row(row, rows / heads) * row_bytes;
                        gathered.extend_from_slice(&self.tensor.bytes[at..at + row_bytes]);
                    }
                    &gathered
                }
            };
            let mut values = self.tensor.block.widen(bytes, columns)?;
            if let (Some(heads), 1) = (self.interleaved_heads, rows) {
                let dim = columns / heads;
                values = (0..columns)
                    .map(|index| values[interleaved_row(index, dim)])
                    .collect();
            }
            for value in &mut values {
                *value -= self.norm_offset;
            }
            out(&values)?;
            written += values.len();
        }
        debug_assert_eq!(written, parameter.len(), "a parameter is written whole");
        Ok(())
    }
}

/// Why writing the weights stopped.
#[derive(Debug, thiserror::Error)]
enum WriteError {
    #[error(transparent)]
    Disk(#[from] io::Error),
    #[error(transparent)]
    Tensor(#[from] GgufError),
}

/// The conversion of all tensors into one safetensors file.
struct Conversion<'a> {
    tensors: Vec<ConvertedTensor<'a>>,
    layout: &'a Layout,
    storage: Storage,
}

impl Conversion<'_> {
    fn write(&self, path: &Path) -> Result<(), GgufError> {
        // The writer passes on errors of the disk only, so an error of a tensor takes this way around it.
        let mut refusal = None;
        let written = write_atomically(path, |out| match self.write_to(out) {
            Ok(()) => Ok(()),
            Err(WriteError::Disk(error)) => Err(error),
            Err(WriteError::Tensor(error)) => {
                refusal = Some(error);
                Err(io::ErrorKind::InvalidData.into())
            }
        });
        match refusal {
            Some(error) => Err(error),
            None => Ok(written?),
        }
    }

    fn write_to(&self, out: &mut dyn Write) -> Result<(), WriteError> {
        out.write_all(&self.header())?;
        let mut bytes = Vec::new();
        for (source, parameter) in self.tensors.iter().zip(self.layout.parameters()) {
            let mut written = 0;
            source.for_each_piece(parameter, &mut |values| {
                if let Some(bad) = self.storage.first_not_finite(values) {
                    return Err(WriteError::Tensor(GgufError::NotFinite {
                        tensor: source.name.clone(),
                        element: written + bad,
                    }));
                }
                written += values.len();
                bytes.clear();
                self.storage.encode(values, &mut bytes);
                Ok(out.write_all(&bytes)?)
            })?;
        }
        Ok(())
    }

    fn header(&self) -> Vec<u8> {
        let width = self.storage.width();
        let parameters = self.layout.parameters().iter();
        let entries = parameters.map(|parameter| HeaderTensor {
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
