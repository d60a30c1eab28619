//! A request for a model of a hub, and the model that answers it.

use std::path::PathBuf;

/// What is to be pulled, and from where.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// `OWNER/NAME`
    pub id: String,
    /// A branch, a tag or a commit.
    pub revision: String,
    /// Where the hub is.
    pub endpoint: String,
    /// Where files are kept; the place of Hugging Face's own tools by default.
    pub cache: Option<PathBuf>,
    /// Whether the hub is asked even if the cache has the model.
    pub ask: Ask,
}

/// When the hub is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// Not if the cache has everything.
    IfNeeded,
    /// In any case: a branch may have moved.
    Always,
}

/// A model in the cache.
#[derive(Debug, Clone)]
pub struct Pulled {
    /// Names and where their bytes are; weights last.
    pub files: Vec<(String, PathBuf)>,
    /// The commit that they belong to.
    pub commit: String,
    /// Bytes that came from the hub this time.
    pub received: u64,
}
