//! The configuration of a policy, as in Hugging Face's `config.json`.
//!
//! Knows names and sizes only, never weights. Invariant: a [`Config`] that was parsed or validated describes a decoder that
//! this crate runs, with sizes that cannot overflow.

pub(crate) use bounds::LAYERS_MAX;
pub use error::ModelConfigError;
pub use family::Architecture;
pub(crate) use family::{Activation, Family};
pub use layers::LayerType;
pub use rope::{Rope, RopeScaling};
pub use shape::Config;
pub(crate) use shape::TokenIds;

mod bounds;
mod defaults;
mod error;
mod family;
mod layers;
mod reading;
mod rope;
mod shape;
mod tensor_names;
mod writing;

#[cfg(test)]
mod tests;
