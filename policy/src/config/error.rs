//! Why a `config.json` cannot be used.

#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ModelConfigError {
    /// The text is not JSON, or a key is missing or has the wrong type.
    #[error("config.json cannot be read: {0}; use the file that came with the model")]
    Unreadable(String),
    #[error("config.json has model_type `{model_type}`, but only these can be run: {supported}")]
    Architecture {
        model_type: String,
        supported: &'static str,
    },
    #[error("config.json has {key} = {value}, but it must lie between 1 and {max}")]
    Size {
        key: &'static str,
        value: usize,
        max: usize,
    },
    #[error(
        "config.json has {key} = {value}, but it must be divisible by {divisor_key} = {divisor}"
    )]
    Indivisible {
        key: &'static str,
        value: usize,
        divisor_key: &'static str,
        divisor: usize,
    },
    #[error("config.json has {key} = {value}, but {other_key} = {other}; they must be equal")]
    Mismatch {
        key: &'static str,
        value: usize,
        other_key: &'static str,
        other: usize,
    },
    #[error("config.json has {key} = {value}, but it must be {expected}")]
    Number {
        key: &'static str,
        value: f64,
        expected: &'static str,
    },
    #[error(
        "config.json has the special token {id}, but vocab_size = {vocab_size}; use the file that came with the model"
    )]
    TokenId { id: u32, vocab_size: usize },
    /// A feature of the family that this crate does not run.
    #[error("config.json has {key} = {value}, which is not supported; supported is {supported}")]
    Unsupported {
        key: &'static str,
        value: String,
        supported: &'static str,
    },
}
