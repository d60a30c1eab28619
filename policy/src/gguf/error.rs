//! Why a GGUF file was not imported.

use crate::config::ModelConfigError;
use crate::disk::DiskError;
use crate::text::TokenizerError;

#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    #[error("the file is not a readable GGUF file: {0}")]
    Malformed(String),
    #[error(
        "the file's metadata has no usable `{key}`: it must be {expected}; convert the model again"
    )]
    Metadata { key: String, expected: &'static str },
    #[error(
        "the file holds a model of architecture `{found}`, but only these can be imported: {supported}"
    )]
    Architecture { found: String, supported: String },
    /// `key` is a key of the metadata, or a tensor that stands for one.
    #[error(
        "the file sets `{key}` to a value that this program cannot run; choose another model of the family"
    )]
    Unsupported { key: String },
    #[error(
        "tensor `{tensor}` is stored as {found}, but only F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and Q2_K to Q6_K can be \
         read; choose a file with these types"
    )]
    Type { tensor: String, found: String },
    #[error("the file lacks tensor `{tensor}`, which its metadata requires; fetch it again")]
    Missing { tensor: String },
    #[error(
        "the file holds tensor `{tensor}`, which its metadata does not describe; choose another model of the family"
    )]
    Unexpected { tensor: String },
    /// Shapes have their rows first.
    #[error(
        "tensor `{tensor}` has shape {found:?}, but the metadata requires {expected:?}; fetch the file again"
    )]
    Shape {
        tensor: String,
        expected: Vec<usize>,
        found: Vec<usize>,
    },
    #[error("tensor `{tensor}` is not finite at element {element}; fetch the file again")]
    NotFinite { tensor: String, element: usize },
    #[error(
        "the file's tokenizer has {key} = `{found}`, but only these can be rebuilt: {supported}"
    )]
    TokenizerKind {
        key: &'static str,
        found: String,
        supported: &'static str,
    },
    /// The rebuilt tokenizer does not load, or does not fit the model.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error("the file describes a model that this program cannot run: {0}")]
    Config(#[from] ModelConfigError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error("the tensor library failed: {0}; check the free memory")]
    Tensor(#[from] candle_core::Error),
}

impl GgufError {
    pub(super) fn metadata(key: &str, expected: &'static str) -> Self {
        Self::Metadata {
            key: key.to_owned(),
            expected,
        }
    }
}
