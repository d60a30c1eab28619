//! Import of a GGUF file into a Hugging Face folder: quantised blocks are widened, llama.cpp's changes to the weights are
//! reverted, and configuration, tokenizer and chat template are rebuilt from the metadata.

pub use error::GgufError;
pub use import::{GgufImport, import_gguf};

mod blocks;
mod description;
mod error;
mod import;
mod reader;
mod vocabulary;
