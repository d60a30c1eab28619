//! Finds a model in the cache, so that the hub need not be asked.

use std::path::{Path, PathBuf};

use hf_hub::{Cache, Repo};

use muster_policy::weight_file_names;

use super::error::HubError;
use super::files::{INDEX, NEEDED, OPTIONAL, SINGLE, read};
use super::request::Pulled;

/// The files of a revision, if none is missing.
pub(super) fn whole(cache: &Cache, repo: &Repo) -> Result<Option<Pulled>, HubError> {
    let Some(snapshot) = snapshot(cache, repo) else {
        return Ok(None);
    };
    let file = |name: &str| {
        let path = snapshot.join(name);
        path.is_file().then(|| (name.to_owned(), path))
    };
    let mut files = Vec::new();
    for name in NEEDED {
        match file(name) {
            Some(found) => files.push(found),
            None => return Ok(None),
        }
    }
    files.extend(OPTIONAL.into_iter().filter_map(file));
    if let Some(single) = file(SINGLE) {
        files.push(single);
    } else {
        let Some(index) = file(INDEX) else {
            return Ok(None);
        };
        for name in weight_file_names(&read(&index.1)?)? {
            match file(&name) {
                Some(found) => files.push(found),
                None => return Ok(None),
            }
        }
        files.push(index);
    }
    let commit = snapshot.file_name().unwrap_or_default();
    Ok(Some(Pulled {
        files,
        commit: commit.to_string_lossy().into_owned(),
        received: 0,
    }))
}

/// The folder of the commit that a revision is or names.
fn snapshot(cache: &Cache, repo: &Repo) -> Option<PathBuf> {
    let of_branch = cache.repo(repo.clone()).get("config.json");
    let folder = of_branch
        .as_deref()
        .and_then(Path::parent)
        .map(Path::to_owned);
    folder.or_else(|| {
        let folder = cache.repo(repo.clone()).pointer_path(repo.revision());
        super::client::is_commit(repo.revision()).then_some(folder)
    })
}
