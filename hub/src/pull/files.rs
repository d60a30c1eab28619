//! The files of a model: their names, and how one is read from the cache.

use std::path::Path;

use super::error::HubError;

/// The one weight file of a model that is not split, and the list of files of one that is.
pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// Files that a model cannot do without, besides its weights.
pub(super) const NEEDED: [&str; 2] = ["config.json", "tokenizer.json"];

/// Files that are taken along when they are there.
pub(super) const OPTIONAL: [&str; 4] = [
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];

/// Reads a whole file.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, HubError> {
    std::fs::read(path).map_err(|source| HubError::Disk {
        path: path.to_owned(),
        source,
    })
}
