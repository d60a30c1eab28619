//! The weights of a policy: the safetensors files of a model folder, and the one canonical image that is hashed, signed and
//! sent.
//!
//! Knows the parameter table, not how weights are used.

pub use error::WeightsError;
pub(crate) use files::WeightFiles;
pub use files::weight_file_names;
pub(crate) use header::{HeaderTensor, write_header};
pub use image::{Image, ImageBytes, TensorEntry};
pub(crate) use mapping::Mapping;
pub(crate) use published::find_parameters;
pub use storage::Storage;
pub(crate) use storage::{Format, StoredTensor};

mod error;
mod files;
mod header;
mod image;
mod mapping;
mod published;
mod storage;
