//! Downloads one model's files: the headers of each file, then its bytes, from the end of an earlier transfer on.
//!
//! Headers are not trusted: sizes are bounded, and values that become paths are checked, before anything is written. Invariant:
//! all files of a pull belong to the commit that the first response named.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::api::sync::Api;
use hf_hub::{Cache, Repo, RepoType};
use sha2::{Digest, Sha256};
use ureq::Agent;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{HeaderMap, StatusCode, Uri};

use super::error::HubError;
use super::request::PullRequest;

/// Longest wait for a connection, and for the next bytes of a server.
const CONNECT_WAIT: Duration = Duration::from_secs(20);
const READ_WAIT: Duration = Duration::from_secs(60);

/// Most resumptions of a broken transfer in one command.
const TRIES: u32 = 5;

/// Pause before the first resumption; each further one doubles it.
const RETRY_WAIT: Duration = Duration::from_millis(200);

/// Most relative redirects followed for a file's headers; a renamed model has one.
const REDIRECTS_MAX: usize = 5;

/// Bytes between two reports on a transfer.
const REPORT_BYTES: u64 = 64 << 20;

/// Fetches the files of one model.
pub(super) struct Client {
    endpoint: String,
    cache: Cache,
    api: Api,
    repo: Repo,
    id: String,
    token: Option<String>,
    agent: Agent,
    /// For headers. It follows no redirect, since the hub's own response has them and its store's has not.
    asking: Agent,
    commit: Option<String>,
    pub(super) received: u64,
}

/// A file's headers.
struct Facts {
    /// SHA-256 of a large file, the id of the git object of others.
    etag: String,
    size: u64,
}

impl Client {
    pub(super) fn new(request: &PullRequest, cache: Cache, api: Api, repo: Repo) -> Self {
        let named = std::env::var("HF_TOKEN")
            .ok()
            .filter(|token| !token.is_empty());
        let settings = || {
            Agent::config_builder()
                .http_status_as_error(false)
                // An https hub must not redirect to an http store.
                .https_only(request.endpoint.starts_with("https://"))
                .redirect_auth_headers(RedirectAuthHeaders::SameHost)
                .timeout_connect(Some(CONNECT_WAIT))
                .timeout_per_read(Some(READ_WAIT))
        };
        let asking = settings().max_redirects(0).max_redirects_will_error(false);
        Self {
            endpoint: request.endpoint.clone(),
            token: named.or_else(|| cache.token()),
            cache,
            api,
            repo,
            id: request.id.clone(),
            agent: settings().build().into(),
            asking: asking.build().into(),
            commit: None,
            received: 0,
        }
    }

    /// The commit that the files belong to; empty before the first file.
    pub(super) fn commit(&self) -> &str {
        self.commit.as_deref().unwrap_or_default()
    }

    pub(super) fn no_file(&self, file: &str) -> HubError {
        HubError::NoFile {
            id: self.id.clone(),
            file: file.to_owned(),
        }
    }

    /// The cached path of a file, downloaded first if it is missing; `None` if the model has no such file.
    pub(super) fn file(
        &mut self,
        name: &str,
        bytes_max: u64,
        tell: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<Option<PathBuf>, HubError> {
        let Some(facts) = self.facts(name)? else {
            return Ok(None);
        };
        if facts.size > bytes_max {
            let size = facts.size;
            return Err(self.protocol(format!(
                "{name} has {size} bytes, above the limit of {bytes_max}"
            )));
        }
        let place = self.cache.repo(self.repo.clone());
        let blob = place.blob_path(&facts.etag);
        let pointer = place.pointer_path(self.commit()).join(name);
        for path in [&blob, &pointer] {
            let folder = path.parent().unwrap_or(path);
            std::fs::create_dir_all(folder).map_err(|source| disk(folder, source))?;
        }
        let is_there = blob
            .metadata()
            .is_ok_and(|found| found.is_file() && found.len() == facts.size);
        if !is_there {
            self.fetch(name, &facts, &blob, tell)?;
        }
        let target = Path::new("../../blobs").join(&facts.etag);
        match std::os::unix::fs::symlink(&target, &pointer) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(disk(&pointer, error));
            }
            _ => {}
        }
        Ok(Some(pointer))
    }

    /// Records in the cache which commit the revision names.
    pub(super) fn keep_revision(&self) -> Result<(), HubError> {
        let asked = self.cache.repo(self.asked());
        asked
            .create_ref(self.commit())
            .map_err(|source| disk(self.cache.path(), source))
    }

    /// The model at the requested revision.
    fn asked(&self) -> Repo {
        self.repo.clone()
    }

    /// The address of a file, at the commit if it is known yet.
    fn address(&self, name: &str) -> String {
        let repo = match &self.commit {
            None => self.asked(),
            Some(commit) => Repo::with_revision(self.id.clone(), RepoType::Model, commit.clone()),
        };
        self.api.repo(repo).url(name)
    }

    fn request(
        &self,
        agent: &Agent,
        address: &str,
        range: &str,
    ) -> ureq::RequestBuilder<ureq::typestate::WithoutBody> {
        let request = agent
            .get(address)
            .header("Range", range)
            .header("Accept-Encoding", "identity");
        match &self.token {
            Some(token) => request.header("Authorization", format!("Bearer {token}")),
            None => request,
        }
    }

    fn facts(&mut self, name: &str) -> Result<Option<Facts>, HubError> {
        let mut address = self.address(name);
        for _ in 0..=REDIRECTS_MAX {
            let answer = self
                .request(&self.asking, &address, "bytes=0-0")
                .call()
                .map_err(|error| broken(name, &error))?;
            let (status, headers) = (answer.status(), answer.headers());
            if status.is_redirection() && header(headers, "x-linked-size").is_none() {
                address = self.redirected(&address, header(headers, "location"))?;
                continue;
            }
            if status == StatusCode::NOT_FOUND {
                return self.absent(headers, name);
            }
            self.refuse_status(
                status,
                name,
                &[
                    StatusCode::OK,
                    StatusCode::PARTIAL_CONTENT,
                    StatusCode::FOUND,
                    StatusCode::TEMPORARY_REDIRECT,
                    StatusCode::RANGE_NOT_SATISFIABLE,
                ],
            )?;
            return self.told(headers, name).map(Some);
        }
        Err(self.protocol(format!(
            "{name} is redirected more than {REDIRECTS_MAX} times"
        )))
    }

    /// The address on the same hub that a relative redirect names.
    fn redirected(&self, from: &str, location: Option<&str>) -> Result<String, HubError> {
        let refused = || self.protocol("it redirects to no address of its own".to_owned());
        let from: Uri = from.parse().map_err(|_| refused())?;
        let location = location
            .filter(|location| location.starts_with('/'))
            .ok_or_else(refused)?;
        let scheme = from.scheme_str().ok_or_else(refused)?;
        let authority = from.authority().ok_or_else(refused)?;
        Ok(format!("{scheme}://{authority}{location}"))
    }

    fn absent(&self, headers: &HeaderMap, name: &str) -> Result<Option<Facts>, HubError> {
        match (header(headers, "x-error-code"), &self.commit) {
            (Some("RepoNotFound"), _) => Err(HubError::NoModel {
                endpoint: self.endpoint.clone(),
                id: self.id.clone(),
            }),
            (Some("RevisionNotFound"), _) => Err(HubError::NoRevision {
                id: self.id.clone(),
                revision: self.repo.revision().to_owned(),
            }),
            // This hub does not say which of the three is missing.
            (Some("EntryNotFound"), _) | (_, Some(_)) => Ok(None),
            (_, None) => Err(HubError::Status {
                endpoint: self.endpoint.clone(),
                file: name.to_owned(),
                status: 404,
            }),
        }
    }

    fn refuse_status(
        &self,
        status: StatusCode,
        name: &str,
        good: &[StatusCode],
    ) -> Result<(), HubError> {
        if good.contains(&status) {
            return Ok(());
        }
        let (endpoint, file, status) = (self.endpoint.clone(), name.to_owned(), status.as_u16());
        Err(match status {
            401 | 403 => HubError::Denied {
                endpoint,
                file,
                status,
            },
            _ => HubError::Status {
                endpoint,
                file,
                status,
            },
        })
    }

    /// Reads size, name and commit from the headers.
    fn told(&mut self, headers: &HeaderMap, name: &str) -> Result<Facts, HubError> {
        let etag = header(headers, "x-linked-etag").or_else(|| header(headers, "etag"));
        let etag = etag
            .unwrap_or_default()
            .trim_start_matches("W/")
            .trim_matches('"');
        let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if etag.is_empty() || etag.len() > 128 || !etag.chars().all(is_plain) {
            return Err(self.protocol(format!("{name} comes without a usable ETag")));
        }
        let size = header(headers, "x-linked-size").or_else(|| {
            let range = header(headers, "content-range")?;
            range.rsplit_once('/').map(|(_, size)| size)
        });
        // A whole response to a request for one byte: the server does not support ranges, or the file is empty.
        let size = size.or_else(|| header(headers, "content-length"));
        let Some(size) = size.and_then(|size| size.parse().ok()) else {
            return Err(self.protocol(format!("{name} comes without its size")));
        };
        let commit = header(headers, "x-repo-commit").unwrap_or_default();
        match &self.commit {
            Some(first) if first != commit => {
                return Err(self.protocol(format!(
                    "{name} is of commit `{commit}`, asked for was {first}"
                )));
            }
            None if !is_commit(commit) => {
                return Err(self.protocol(format!(
                    "{name} comes without the commit that it belongs to"
                )));
            }
            _ => self.commit = Some(commit.to_owned()),
        }
        Ok(Facts {
            etag: etag.to_owned(),
            size,
        })
    }

    /// Downloads a file's bytes into the cache, with resumptions.
    fn fetch(
        &mut self,
        name: &str,
        facts: &Facts,
        blob: &Path,
        tell: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<(), HubError> {
        let path = blob.with_extension("part");
        let failed = |source| disk(&path, source);
        let mut part = OpenOptions::new()
            .create(true)
            .read(true)
            .write(true)
            .truncate(false)
            .open(&path)
            .map_err(failed)?;
        if part.try_lock().is_err() {
            return Err(HubError::Busy {
                file: name.to_owned(),
            });
        }
        let (mut wait, mut tries) = (RETRY_WAIT, 0);
        loop {
            tries += 1;
            match self.go_on(name, facts, &mut part, &path, tell) {
                Ok(()) => break,
                Err(HubError::Broken { .. }) if tries < TRIES => {
                    std::thread::sleep(wait);
                    wait *= 2;
                }
                Err(error) => return Err(error),
            }
        }
        part.sync_all().map_err(failed)?;
        if let Err(error) = verify(name, facts, &mut part, &path) {
            std::fs::remove_file(&path).map_err(failed)?;
            return Err(error);
        }
        std::fs::rename(&path, blob).map_err(|source| disk(blob, source))
    }

    /// One transfer, from the end of the partial file on.
    fn go_on(
        &mut self,
        name: &str,
        facts: &Facts,
        part: &mut File,
        path: &Path,
        tell: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<(), HubError> {
        let failed = |source| disk(path, source);
        let mut at = part.seek(SeekFrom::End(0)).map_err(failed)?;
        if at == facts.size {
            return Ok(());
        }
        if at > facts.size {
            at = restart(part).map_err(failed)?;
        }
        let request = self.request(&self.agent, &self.address(name), &format!("bytes={at}-"));
        let answer = request.call().map_err(|error| broken(name, &error))?;
        self.refuse_status(
            answer.status(),
            name,
            &[StatusCode::OK, StatusCode::PARTIAL_CONTENT],
        )?;
        // Any other range would be appended in the wrong place.
        let is_rest = answer.status() == StatusCode::PARTIAL_CONTENT
            && header(answer.headers(), "content-range")
                .is_some_and(|range| range.starts_with(&format!("bytes {at}-")));
        if !is_rest && at > 0 {
            at = restart(part).map_err(failed)?;
        }
        // One byte beyond the announced size shows that it is wrong.
        let mut body = answer.into_body().into_reader().take(facts.size - at + 1);
        let mut buffer = vec![0; 1 << 18];
        let mut reported = at;
        loop {
            let count = body.read(&mut buffer).map_err(|error| HubError::Broken {
                file: name.to_owned(),
                reason: error.to_string(),
            })?;
            if count == 0 {
                break;
            }
            part.write_all(&buffer[..count]).map_err(failed)?;
            at += count as u64;
            self.received += count as u64;
            if at - reported >= REPORT_BYTES {
                tell(name, at, facts.size);
                reported = at;
            }
        }
        if at > facts.size {
            restart(part).map_err(failed)?;
            return Err(self.protocol(format!("{name} has more bytes than were announced")));
        }
        if at < facts.size {
            let size = facts.size;
            return Err(HubError::Broken {
                file: name.to_owned(),
                reason: format!("the connection ended after {at} of {size} bytes"),
            });
        }
        tell(name, at, facts.size);
        Ok(())
    }

    fn protocol(&self, problem: String) -> HubError {
        HubError::Protocol {
            endpoint: self.endpoint.clone(),
            problem,
        }
    }
}

/// Whether a text is the id of a commit.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.chars().all(|c| matches!(c, '0'..='9' | 'a'..='f'))
}

/// Checks the bytes against their SHA-256, if their name is one.
fn verify(name: &str, facts: &Facts, part: &mut File, path: &Path) -> Result<(), HubError> {
    if facts.etag.len() != 64 {
        return Ok(());
    }
    let mut digest = Sha256::new();
    part.seek(SeekFrom::Start(0))
        .and_then(|_| io::copy(part, &mut digest))
        .map_err(|source| disk(path, source))?;
    let found = hex::encode(digest.finalize());
    if found == facts.etag {
        return Ok(());
    }
    Err(HubError::Hash {
        file: name.to_owned(),
        found,
        expected: facts.etag.clone(),
    })
}

fn restart(part: &mut File) -> io::Result<u64> {
    part.set_len(0)?;
    part.seek(SeekFrom::Start(0))
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

fn broken(name: &str, error: &ureq::Error) -> HubError {
    HubError::Broken {
        file: name.to_owned(),
        reason: error.to_string(),
    }
}

fn disk(path: &Path, source: io::Error) -> HubError {
    HubError::Disk {
        path: path.to_owned(),
        source,
    }
}
