//! Text to tokens and back: the tokenizer, the chat template and the bytes of each token.
//!
//! Knows no weights.

pub use chat::{ChatError, ChatTemplate, Message, Rendering, Speaker};
pub use token_bytes::TokenBytes;
pub(crate) use tokenizer::CHAT_FILE;
pub use tokenizer::{Tokenizer, TokenizerError, character_tokenizer};

mod chat;
mod token_bytes;
mod tokenizer;
