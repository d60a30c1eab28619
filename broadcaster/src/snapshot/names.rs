//! Names of the files in a snapshot's folder.

/// The weights in one file, under the name that Hugging Face libraries look for.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// Which tensor is in which of several files, under the name that Hugging Face libraries look for.
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";
/// The signed statements about the folder.
pub const MANIFEST_FILE: &str = "manifest.json";
/// Where `huggingface_hub` keeps its notes in a folder that it downloaded. No library reads weights from there.
pub(super) const DOWNLOADER_FOLDER: &str = ".cache";
