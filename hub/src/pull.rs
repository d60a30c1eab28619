//! Downloads a model from a hub with Hugging Face's protocol, by id and revision, into the cache of Hugging Face's tools, and from
//! there into a folder.
//!
//! The `hf-hub` crate gives the layout of the cache and the addresses. Its transfers are not used: they check neither sizes nor
//! hashes, and panic on unexpected headers. Invariant: a file in the cache has the announced size and, if the hub announced one,
//! the announced SHA-256.

use std::path::{Path, PathBuf};

use hf_hub::api::sync::ApiBuilder;
use hf_hub::{Cache, Repo, RepoType};

use muster_policy::{Config, weight_file_names};

use self::client::Client;

mod cached;
mod client;
mod error;
mod files;
mod request;

pub use self::error::HubError;
pub use self::request::{CachePolicy, PullRequest, Pulled};

use self::files::{INDEX, NEEDED, OPTIONAL, SINGLE, read};

/// The default hub.
pub const ENDPOINT: &str = "https://huggingface.co";

/// Largest file that is not weights: the longest tokenizers have about 35 MB.
const TEXT_BYTES_MAX: u64 = 256 << 20;

/// Largest weight file that a server may announce, 1 TiB.
const WEIGHTS_BYTES_MAX: u64 = 1 << 40;

/// Longest id or revision, somewhat longer than the hub allows.
const NAME_BYTES_MAX: usize = 200;

/// Downloads a model into the cache. `tell` receives each file's progress: name, received bytes, all bytes.
///
/// # Errors
/// The hub, the connection or the disk fails; the error says how to mend it.
pub fn pull(
    request: &PullRequest,
    tell: &mut dyn FnMut(&str, u64, u64),
) -> Result<Pulled, HubError> {
    check_name("the id", &request.id)?;
    check_name("the revision", &request.revision)?;
    let is_address = |scheme: &str| {
        request
            .endpoint
            .strip_prefix(scheme)
            .is_some_and(|rest| !rest.is_empty())
    };
    if !(is_address("https://") || is_address("http://")) {
        return Err(HubError::Endpoint {
            found: request.endpoint.clone(),
        });
    }
    let cache = cache(request.cache.clone())?;
    let repo = Repo::with_revision(
        request.id.clone(),
        RepoType::Model,
        request.revision.clone(),
    );
    if request.cache_policy == CachePolicy::Trust
        && let Some(pulled) = cached::whole(&cache, &repo)?
    {
        return Ok(pulled);
    }
    let api = ApiBuilder::from_cache(cache.clone())
        .with_endpoint(request.endpoint.trim_end_matches('/').to_owned())
        .with_progress(false)
        .build()?;
    let mut client = Client::new(request, cache, api, repo);
    let mut files = Vec::new();
    // The configuration comes first: a model that does not run here fails before its weights are downloaded.
    let config = client.file("config.json", TEXT_BYTES_MAX, tell)?;
    let config = config.ok_or_else(|| client.no_file("config.json"))?;
    let text = read(&config)?;
    Config::parse(&String::from_utf8_lossy(&text)).map_err(|reason| HubError::Config {
        id: request.id.clone(),
        reason,
    })?;
    files.push(("config.json".to_owned(), config));
    for name in NEEDED.into_iter().skip(1) {
        let path = client.file(name, TEXT_BYTES_MAX, tell)?;
        files.push((name.to_owned(), path.ok_or_else(|| client.no_file(name))?));
    }
    for name in OPTIONAL {
        if let Some(path) = client.file(name, TEXT_BYTES_MAX, tell)? {
            files.push((name.to_owned(), path));
        }
    }
    files.extend(weights(&mut client, tell)?);
    client.keep_revision()?;
    Ok(Pulled {
        files,
        commit: client.commit().to_owned(),
        received: client.received,
    })
}

/// The weight files: the single one, else those of the index.
fn weights(
    client: &mut Client,
    tell: &mut dyn FnMut(&str, u64, u64),
) -> Result<Vec<(String, PathBuf)>, HubError> {
    if let Some(path) = client.file(SINGLE, WEIGHTS_BYTES_MAX, tell)? {
        return Ok(vec![(SINGLE.to_owned(), path)]);
    }
    let index = client.file(INDEX, TEXT_BYTES_MAX, tell)?;
    let index = index.ok_or_else(|| client.no_file(SINGLE))?;
    let mut files = Vec::new();
    for name in weight_file_names(&read(&index)?)? {
        let path = client.file(&name, WEIGHTS_BYTES_MAX, tell)?;
        let path = path.ok_or_else(|| client.no_file(&name))?;
        files.push((name, path));
    }
    files.push((INDEX.to_owned(), index));
    Ok(files)
}

/// Puts a pulled model into a folder. Weights are hard links if the file system permits it, so that they take no more space.
///
/// # Errors
/// A file cannot be read or written.
pub fn place(pulled: &Pulled, folder: &Path) -> Result<(), HubError> {
    let refused = |path: &Path| {
        let path = path.to_owned();
        move |source| HubError::Disk { path, source }
    };
    std::fs::create_dir_all(folder).map_err(refused(folder))?;
    for (name, from) in &pulled.files {
        let from = std::fs::canonicalize(from).map_err(refused(from))?;
        let (to, partial) = (folder.join(name), folder.join(format!(".{name}.partial")));
        let linked = name.ends_with(".safetensors") && std::fs::hard_link(&from, &partial).is_ok();
        if !linked {
            std::fs::copy(&from, &partial).map_err(refused(&partial))?;
        }
        std::fs::rename(&partial, &to).map_err(refused(&to))?;
    }
    Ok(())
}

fn cache(named: Option<PathBuf>) -> Result<Cache, HubError> {
    let is_set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    match named {
        Some(path) => Ok(Cache::new(path)),
        // `from_env` panics if neither is set.
        None if is_set("HF_HOME") || is_set("HOME") => Ok(Cache::from_env()),
        None => Err(HubError::NoCache),
    }
}

/// Checks a name, since it becomes a part of addresses and paths.
fn check_name(what: &'static str, name: &str) -> Result<(), HubError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let part = |part: &str| {
        !part.is_empty()
            && part.chars().all(allowed)
            && !part.starts_with(['.', '-'])
            && !part.contains("..")
    };
    let parts = name.split('/').count();
    let parts_max = if what == "the id" { 2 } else { 4 };
    if name.len() <= NAME_BYTES_MAX && parts <= parts_max && name.split('/').all(part) {
        return Ok(());
    }
    Err(HubError::Name {
        what,
        found: name.chars().take(80).collect(),
        expected: "letters, digits, `-`, `_` and `.`, with a `/` after the owner",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_leave_its_place_in_an_address_or_in_the_cache() {
        for good in ["gpt2", "Qwen/Qwen2.5-0.5B", "a_b/c-d.e"] {
            check_name("the id", good).unwrap();
        }
        check_name("the revision", "refs/pr/1").unwrap();
        let long = "a".repeat(201);
        for bad in [
            "", "/", "a//b", "../a", "a/..", "a/b/c", ".a", "-a", "a b", "a?b", "a%2Fb", "é",
            "a\\b", &long,
        ] {
            assert!(check_name("the id", bad).is_err(), "{bad}");
        }
        assert!(check_name("the revision", "refs/../main").is_err());
    }

    #[test]
    fn an_endpoint_without_a_scheme_is_refused() {
        let request = PullRequest {
            id: "a/b".to_owned(),
            revision: "main".to_owned(),
            endpoint: "localhost:80".to_owned(),
            cache: Some("nowhere".into()),
            cache_policy: CachePolicy::Revalidate,
        };
        let error = pull(&request, &mut |_, _, _| ()).unwrap_err();
        assert!(matches!(error, HubError::Endpoint { .. }));
    }
}
