//! The reasons why a model was not pulled, each with the way out.

use std::path::PathBuf;

use hf_hub::api::sync::ApiError;

use muster_policy::{ModelConfigError, WeightsError};

/// Why a model was not pulled.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// Not an id or a revision.
    #[error("{what} `{found}` is none of a hub: {expected}")]
    Name {
        /// `the id` or `the revision`.
        what: &'static str,
        /// What was given.
        found: String,
        /// What would be accepted.
        expected: &'static str,
    },
    /// Not an address.
    #[error("the endpoint `{found}` is no address: give one that begins with https:// or http://")]
    Endpoint {
        /// What was given.
        found: String,
    },
    /// The cache has no place.
    #[error("there is no home folder to keep the cache in: name one with --cache")]
    NoCache,
    /// The hub does not know the repository.
    #[error(
        "{endpoint} has no model `{id}` that you may see: correct the id, or set HF_TOKEN if the model is private"
    )]
    NoModel {
        /// Who was asked.
        endpoint: String,
        /// What for.
        id: String,
    },
    /// The hub does not know the revision.
    #[error("model `{id}` has no revision `{revision}`: name a branch, a tag or a commit")]
    NoRevision {
        /// Of which model.
        id: String,
        /// What was asked for.
        revision: String,
    },
    /// A file that the model needs is not there.
    #[error(
        "model `{id}` has no {file}: take one that is published as safetensors with a tokenizer.json"
    )]
    NoFile {
        /// Of which model.
        id: String,
        /// Which.
        file: String,
    },
    /// The hub wants to know who asks.
    #[error(
        "{endpoint} refuses {file} (status {status}): set HF_TOKEN to a token that may read the model"
    )]
    Denied {
        /// Who was asked.
        endpoint: String,
        /// What for.
        file: String,
        /// 401 or 403.
        status: u16,
    },
    /// Any other refusal.
    #[error("{endpoint} answers {status} for {file}: try again later")]
    Status {
        /// Who was asked.
        endpoint: String,
        /// What for.
        file: String,
        /// As it came.
        status: u16,
    },
    /// The hub was not reached, or broke off.
    #[error(
        "{file} was not received: {reason}; what has come is kept, so run the same command again"
    )]
    Broken {
        /// What was asked for.
        file: String,
        /// What the connection said.
        reason: String,
    },
    /// An answer that is not the hub's.
    #[error("{endpoint} does not speak the hub's protocol: {problem}; correct the endpoint")]
    Protocol {
        /// Who was asked.
        endpoint: String,
        /// What was wrong.
        problem: String,
    },
    /// Bytes that are not those announced.
    #[error(
        "{file} came with the SHA-256 {found}, announced was {expected}: it was dropped, run the same command again"
    )]
    Hash {
        /// Which.
        file: String,
        /// Of what came.
        found: String,
        /// What the hub said.
        expected: String,
    },
    /// Someone else is fetching the same file.
    #[error(
        "{file} is being fetched by another process: wait for it, then run the same command again"
    )]
    Busy {
        /// Which.
        file: String,
    },
    /// The model does not run here.
    #[error("model `{id}` does not run here: {reason}")]
    Config {
        /// Which.
        id: String,
        /// Why.
        reason: ModelConfigError,
    },
    /// The list of weight files is none.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The `hf-hub` crate could not be set up.
    #[error("the hub's client cannot be set up: {0}")]
    Client(#[from] ApiError),
    /// The disk refused.
    #[error("{} cannot be written or read: {source}; check its permissions and the free space", path.display())]
    Disk {
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}
