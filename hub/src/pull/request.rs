//! A request for a model of a hub, and the model that answers it.

use std::path::PathBuf;

/// A model and the hub that has it.
#[derive(Debug, Clone)]
pub struct PullRequest {
    /// `OWNER/NAME`
    pub id: String,
    /// A branch, a tag or a commit.
    pub revision: String,
    /// The hub's address.
    pub endpoint: String,
    /// Folder of downloaded files; the cache of Hugging Face's tools by default.
    pub cache: Option<PathBuf>,
    pub cache_policy: CachePolicy,
}

/// Whether a model in the cache is used without asking the hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CachePolicy {
    /// Use the cache if it has every file.
    Trust,
    /// Ask the hub first, since a branch may have moved.
    Revalidate,
}

/// A model in the cache.
#[derive(Debug, Clone)]
pub struct Pulled {
    /// Names and paths; weights last.
    pub files: Vec<(String, PathBuf)>,
    /// The commit that they belong to.
    pub commit: String,
    /// Bytes that came from the hub this time.
    pub received: u64,
}
