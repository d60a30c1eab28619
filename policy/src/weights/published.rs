//! The parameters of a configuration within the safetensors files that a model was published as.
//!
//! Invariant: all parameters are found, with the right shape and finite values, and the files hold no other tensor of the
//! text decoder.

use std::collections::HashMap;

use safetensors::tensor::{Dtype, TensorInfo};

use super::error::WeightsError;
use super::header::read_header;
use super::storage::{Format, StoredTensor};
use crate::config::Config;
use crate::layout::Layout;

/// Some files hold the head although it is tied to the embedding.
const HEAD: &str = "lm_head.weight";

const EMBEDDING: &str = "model.embed_tokens.weight";

/// A tensor within a file.
#[derive(Debug, PartialEq)]
struct FileTensor<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: &'a [u8],
}

/// Finds the parameters of `layout`, the table of `config`, in the files of a model.
///
/// Returns them in the order of the table.
pub(crate) fn find_parameters<'a>(
    config: &Config,
    layout: &Layout,
    files: &[&'a [u8]],
) -> Result<Vec<StoredTensor<'a>>, WeightsError> {
    let mut tensors = text_decoder(config, files)?;
    let mut found = Vec::with_capacity(layout.parameters().len());
    for parameter in layout.parameters() {
        let name = &parameter.name;
        let tensor = tensors.remove(name).ok_or_else(|| WeightsError::Missing {
            tensor: name.clone(),
        })?;
        if tensor.shape != parameter.shape {
            return Err(WeightsError::Shape {
                tensor: name.clone(),
                expected: parameter.shape.clone(),
                found: tensor.shape,
            });
        }
        let stored = StoredTensor {
            format: format_of(name, tensor.dtype)?,
            bytes: tensor.bytes,
        };
        if let Some(element) = first_not_finite(stored) {
            return Err(WeightsError::NotFinite {
                tensor: name.clone(),
                element,
            });
        }
        debug_assert_eq!(
            stored.bytes.len(),
            parameter.len() * stored.format.width(),
            "a tensor has the bytes of its shape"
        );
        found.push(stored);
    }
    match tensors.into_keys().min() {
        None => Ok(found),
        Some(tensor) => Err(WeightsError::Unexpected { tensor }),
    }
}

/// The text decoder's tensors by their names in the parameter table.
///
/// A tied head that equals the embedding is left out, as in transformers. A head that differs is an error, because it would
/// be lost.
fn text_decoder<'a>(
    config: &Config,
    files: &[&'a [u8]],
) -> Result<HashMap<String, FileTensor<'a>>, WeightsError> {
    let mut tensors = HashMap::new();
    for &file in files {
        let (metadata, data) = read_header(file)?;
        for (name, info) in metadata.tensors() {
            let Some(parameter) = config.parameter_name(&name) else {
                continue;
            };
            if tensors.insert(parameter, tensor(info, data)).is_some() {
                return Err(WeightsError::Duplicate { tensor: name });
            }
        }
    }
    if config.tie_word_embeddings
        && let Some(head) = tensors.remove(HEAD)
        && tensors.get(EMBEDDING) != Some(&head)
    {
        return Err(WeightsError::Untied { tensor: HEAD });
    }
    Ok(tensors)
}

fn tensor<'a>(info: &TensorInfo, data: &'a [u8]) -> FileTensor<'a> {
    FileTensor {
        dtype: info.dtype,
        shape: info.shape.clone(),
        bytes: &data[info.data_offsets.0..info.data_offsets.1],
    }
}

fn format_of(tensor: &str, dtype: Dtype) -> Result<Format, WeightsError> {
    match dtype {
        Dtype::F32 => Ok(Format::F32),
        Dtype::F16 => Ok(Format::F16),
        Dtype::BF16 => Ok(Format::Bf16),
        other => Err(WeightsError::Dtype {
            tensor: tensor.to_owned(),
            found: format!("{other:?}"),
        }),
    }
}

/// In NaN and infinity, and in no other number, all bits of the exponent are set.
fn first_not_finite(tensor: StoredTensor<'_>) -> Option<usize> {
    match tensor.format {
        Format::F32 => first_with_bits::<4>(tensor.bytes, [0, 0, 0x80, 0x7F]),
        Format::Bf16 => first_with_bits::<2>(tensor.bytes, [0x80, 0x7F]),
        Format::F16 => first_with_bits::<2>(tensor.bytes, [0x00, 0x7C]),
    }
}

/// Index of the first element that has all of `bits` set. Each piece is read to its end, without an early exit, so that
/// the compiler can test many elements with one instruction.
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
