//! Text to tokens and back: the tokenizer, the chat template and the bytes of each token.
//!
//! Knows no weights.

pub use characters::{AlphabetError, character_tokenizer};
pub use chat::{ChatError, ChatRole, ChatTemplate, Message, Rendering};
pub use token_bytes::TokenBytes;
pub(crate) use tokenizer::CHAT_FILE;
pub use tokenizer::{Tokenizer, TokenizerError};

mod byte_level;
mod characters;
mod chat;
mod token_bytes;
mod tokenizer;
