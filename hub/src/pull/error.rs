//! The reasons why a model was not pulled, each with the way out.

use std::path::PathBuf;

use hf_hub::api::sync::ApiError;

use muster_policy::{ModelConfigError, WeightsError};

/// Why a model was not pulled.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    #[error("{what} `{found}` is not valid on a hub: {expected}")]
    Name {
        /// `the id` or `the revision`.
        what: &'static str,
        found: String,
        /// The form of valid ones.
        expected: &'static str,
    },
    #[error(
        "the endpoint `{found}` is not an address: give one that begins with https:// or http://"
    )]
    Endpoint { found: String },
    /// No home folder is known, and no cache was named.
    #[error("there is no home folder for the cache: name a folder with --cache")]
    NoCache,
    /// The hub does not know the repository.
    #[error(
        "{endpoint} has no model `{id}` that you may read: correct the id, or set HF_TOKEN if the model is private"
    )]
    NoModel { endpoint: String, id: String },
    /// The hub does not know the revision.
    #[error("model `{id}` has no revision `{revision}`: name a branch, a tag or a commit")]
    NoRevision { id: String, revision: String },
    /// A file that the model needs is not there.
    #[error(
        "model `{id}` has no {file}: choose a model published as safetensors with a tokenizer.json"
    )]
    NoFile { id: String, file: String },
    /// The hub asks for credentials.
    #[error(
        "{endpoint} refuses {file} (status {status}): set HF_TOKEN to a token that may read the model"
    )]
    Denied {
        endpoint: String,
        file: String,
        /// 401 or 403.
        status: u16,
    },
    /// Any other refusal.
    #[error("{endpoint} answers {status} for {file}: try again later")]
    Status {
        endpoint: String,
        file: String,
        status: u16,
    },
    /// The hub is unreachable, or the connection broke.
    #[error("{file} was not received whole: {reason}; run the same command again to continue")]
    Broken { file: String, reason: String },
    /// The server's answer breaks the hub's protocol.
    #[error("{endpoint} does not speak the hub's protocol: {problem}; correct the endpoint")]
    Protocol { endpoint: String, problem: String },
    /// The file has another hash than the hub announced.
    #[error(
        "{file} has the SHA-256 {found}, but the hub announced {expected}: the file was deleted; run the same command again"
    )]
    Hash {
        file: String,
        /// Hash of the received bytes.
        found: String,
        /// Hash that the hub announced.
        expected: String,
    },
    /// Another process is fetching the same file.
    #[error(
        "{file} is being fetched by another process: wait for it, then run the same command again"
    )]
    Busy { file: String },
    /// The model does not run here.
    #[error("model `{id}` does not run here: {reason}")]
    Config {
        id: String,
        reason: ModelConfigError,
    },
    /// The list of weight files cannot be read.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The `hf-hub` crate could not be set up.
    #[error("the hub's client cannot be set up: {0}")]
    Client(#[from] ApiError),
    #[error("{} cannot be written or read: {source}; check its permissions and the free space", path.display())]
    Disk {
        path: PathBuf,
        source: std::io::Error,
    },
}
