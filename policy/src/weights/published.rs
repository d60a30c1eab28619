//! Which tensors of a published file are the text decoder's, and which parameters of the table they are.

use std::collections::HashMap;

use safetensors::tensor::{Metadata, TensorInfo};

use super::WeightsError;
use crate::config::Config;

/// What a tied head is called where a file holds it all the same.
const HEAD: &str = "lm_head.weight";

/// What it is tied to.
const EMBEDDING: &str = "model.embed_tokens.weight";

/// The text decoder's tensors by their names in the table; `data` is what follows the header.
///
/// A tied head that is a copy of the embedding is left out, as transformers does; one that differs would be lost.
pub(super) fn tensors<'a>(
    config: &Config,
    metadata: &'a Metadata,
    data: &[u8],
) -> Result<HashMap<String, &'a TensorInfo>, WeightsError> {
    let mut infos: HashMap<String, &TensorInfo> = HashMap::new();
    for (name, info) in metadata.tensors() {
        if let Some(parameter) = config.parameter_name(&name)
            && infos.insert(parameter, info).is_some()
        {
            return Err(WeightsError::Twice { tensor: name });
        }
    }
    if config.tie_word_embeddings
        && let (Some(head), Some(embedding)) = (infos.get(HEAD), infos.get(EMBEDDING))
    {
        let content = |info: &TensorInfo| data.get(info.data_offsets.0..info.data_offsets.1);
        let same = head.dtype == embedding.dtype
            && head.shape == embedding.shape
            && content(head) == content(embedding);
        if !same {
            return Err(WeightsError::Untied { tensor: HEAD });
        }
        infos.remove(HEAD);
    }
    Ok(infos)
}
