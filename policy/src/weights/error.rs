//! Why files are not the weights of a configuration.

use crate::disk::DiskError;

#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error("weights are not a safetensors file ({0}); fetch them again")]
    Header(String),
    /// `tensor` is the first tensor that the file ends before or within.
    #[error(
        "weights are truncated: tensor `{tensor}` ends at byte {expected}, but the file has {found} bytes; fetch them again"
    )]
    Truncated {
        tensor: String,
        expected: usize,
        found: usize,
    },
    #[error("weights have {extra} bytes after their last tensor; fetch them again")]
    Trailing { extra: usize },
    #[error(
        "weights lack tensor `{tensor}`, which config.json requires; use weights and config.json of the same model"
    )]
    Missing { tensor: String },
    #[error(
        "weights hold tensor `{tensor}`, which config.json does not describe; use weights and config.json of the same model"
    )]
    Unexpected { tensor: String },
    #[error("weights hold tensor `{tensor}` twice, or under two names; fetch them again")]
    Duplicate { tensor: String },
    #[error(
        "tensor `{tensor}` differs from the embedding, but config.json ties the two; set tie_word_embeddings to false there"
    )]
    Untied { tensor: &'static str },
    #[error(
        "tensor `{tensor}` has shape {found:?}, but config.json requires {expected:?}; use weights and config.json of the same \
         model"
    )]
    Shape {
        tensor: String,
        expected: Vec<usize>,
        found: Vec<usize>,
    },
    #[error(
        "tensor `{tensor}` is stored as {found}, but only BF16, F16 and F32 can be read; convert the model to one of these"
    )]
    Dtype { tensor: String, found: String },
    #[error(
        "tensor `{tensor}` is not finite at element {element}; fetch the weights again or go back a version"
    )]
    NotFinite { tensor: String, element: usize },
    #[error("model.safetensors.index.json cannot be read: {0}; fetch it again")]
    Index(String),
    /// The name would lead out of the folder, or is not that of a weight file.
    #[error(
        "model.safetensors.index.json names the file `{file}`, but only `.safetensors` files of its own folder are allowed; \
         fetch it again"
    )]
    FileName { file: String },
    /// The index and the file's own header disagree about which tensors the file holds.
    #[error(
        "model.safetensors.index.json and {file} disagree on whether {file} holds tensor `{tensor}`; fetch both again"
    )]
    Misplaced { tensor: String, file: String },
    #[error("{found} values were given for a model of {expected} parameters")]
    Length { expected: usize, found: usize },
}
