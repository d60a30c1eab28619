//! Which tensors of published files are the text decoder's, and which parameters of the table they are.

use std::collections::HashMap;

use safetensors::tensor::{Dtype, SafeTensors};

use super::{WeightsError, explained};
use crate::config::Config;

/// What a tied head is called where a file holds it all the same.
const HEAD: &str = "lm_head.weight";

/// What it is tied to.
const EMBEDDING: &str = "model.embed_tokens.weight";

/// A tensor as it lies in a file.
#[derive(Debug, PartialEq)]
pub(super) struct Stored<'a> {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) data: &'a [u8],
}

/// The text decoder's tensors by their names in the table, from the one file or the several of a model.
///
/// A tied head that is a copy of the embedding is left out, as transformers does; one that differs would be lost.
pub(super) fn tensors<'a>(
    config: &Config,
    files: &[&'a [u8]],
) -> Result<HashMap<String, Stored<'a>>, WeightsError> {
    let mut tensors = HashMap::new();
    for &bytes in files {
        let (header_bytes, metadata) =
            SafeTensors::read_metadata(bytes).map_err(|error| explained(error, bytes))?;
        let data = &bytes[header_bytes + 8..];
        for (name, info) in metadata.tensors() {
            let Some(parameter) = config.parameter_name(&name) else {
                continue;
            };
            let tensor = Stored {
                dtype: info.dtype,
                shape: info.shape.clone(),
                data: &data[info.data_offsets.0..info.data_offsets.1],
            };
            if tensors.insert(parameter, tensor).is_some() {
                return Err(WeightsError::Twice { tensor: name });
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
