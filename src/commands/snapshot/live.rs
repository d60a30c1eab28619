//! A live run as an evaluator sees it: lists its versions and pulls one as a folder.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;

use muster_broadcaster::SwarmConfig;
use muster_broadcaster::follower::{
    Held, Opened, fetch, fetch_file, open_announcement, squashed_deltas,
};
use muster_broadcaster::snapshot::{Contents, FOLDER_FILES_MAX, write};
use muster_broadcaster::store::disk::{DiskError, Existing};
use muster_broadcaster::store::object::describe_object;
use muster_broadcaster::swarm::survey::Holdings;
use muster_broadcaster::transport::nat::NatConfig;
use muster_broadcaster::version::route::cheapest;
use muster_protocol::dispatch_client::DispatchClientError;
use muster_protocol::envelope::open;
use muster_protocol::id::PolicyVersion;
use muster_protocol::message::ask::{Ask, Reply};
use muster_protocol::message::peer::PeerRecord;
use muster_protocol::message::version::{Content, Object};
use muster_protocol::subject::Role;

use super::progress::watch;
use crate::member::Member;

/// Longest wait for an answer of a live run.
const ANSWER_WAIT: Duration = Duration::from_secs(20);
/// Most versions requested one by one, more than dispatch remembers.
const VERSIONS_ASKED_MAX: u64 = 128;

/// A live run.
pub(crate) struct LiveRun {
    pub(crate) member: Member,
    /// Known versions.
    heard: BTreeMap<PolicyVersion, Opened>,
}

impl LiveRun {
    /// Joins under an evaluator's credentials. `nats` replaces the server's address in them.
    pub(crate) async fn join(
        creds: &Path,
        nats: Option<&str>,
        nat: Option<NatConfig>,
    ) -> Result<Self> {
        let mut swarm = SwarmConfig::default();
        if nat.is_some() {
            // Peers cannot reach a TCP address behind a router.
            swarm.listen = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        }
        swarm.nat = nat;
        let member = Member::join(creds, Role::Evaluator, nats, swarm).await?;
        // The descriptor names the dispatch that the client trusts from here on.
        answered(async { Ok(member.client.descriptor().await?) }).await?;
        let heard = BTreeMap::new();
        Ok(Self { member, heard })
    }

    /// The known versions, in order.
    pub(crate) fn heard(&self) -> impl Iterator<Item = &Opened> {
        self.heard.values()
    }

    /// Asks dispatch for its versions, from the newest back to the first that it has forgotten.
    pub(crate) async fn refresh(&mut self) -> Result<()> {
        if let Some(newest) = self.ask(None).await? {
            let (last, generation) = (newest.version.body.version, newest.version.body.generation);
            // A learner that restarted may announce the same numbers again.
            let is_current = |opened: &Opened| opened.version.body.generation == generation;
            self.heard.retain(|_, opened| is_current(opened));
            self.heard.insert(last, newest);
            let first = last.0.saturating_sub(VERSIONS_ASKED_MAX);
            for number in (first..last.0).rev().map(PolicyVersion) {
                if self.heard.contains_key(&number) {
                    break;
                }
                match self.ask(Some(number)).await? {
                    Some(opened) => self.heard.insert(number, opened),
                    None => break,
                };
            }
            self.heard = self.heard.split_off(&PolicyVersion(first));
        }
        Ok(())
    }

    /// Requests one version, or the newest, and returns its number.
    pub(crate) async fn hear_of(
        &mut self,
        version: Option<PolicyVersion>,
    ) -> Result<PolicyVersion> {
        let opened = self.ask(version).await?.with_context(|| {
            "the run has no such version to give: see `muster snapshot list --creds FILE` for those it has"
        })?;
        let number = opened.version.body.version;
        self.heard.insert(number, opened);
        Ok(number)
    }

    /// Fetches a known version from the peers and writes it as a folder, whole or not at all, with files of weights of at most
    /// `file_bytes_max` bytes.
    pub(crate) async fn pull(
        &self,
        version: PolicyVersion,
        out: &Path,
        file_bytes_max: u64,
    ) -> Result<()> {
        if out.symlink_metadata().is_ok() {
            let path = out.to_owned();
            bail!(DiskError::Exists { path });
        }
        let source = self.member.source();
        let opened = self.heard.get(&version).cloned();
        let mut opened =
            opened.with_context(|| format!("nothing was heard of version {version}"))?;
        refuse_tiny_files(opened.version.body.parameter_bytes(), file_bytes_max)?;
        // The announced way is an anchor and single steps; members may have made shorter ones.
        let squashed = squashed_deltas(&self.member.client, PolicyVersion(0)).await;
        opened.add_squashed(source.as_ref(), squashed);
        let holdings = self.survey([&opened].into_iter()).await?;
        if !opened.keep_held(&holdings) {
            bail!(
                "no peer within reach holds version {version} any more: choose one that `muster snapshot list --creds FILE` shows as held"
            );
        }
        let before = self.member.swarm.metrics().total.bytes_downloaded;
        let received = || {
            self.member
                .swarm
                .metrics()
                .total
                .bytes_downloaded
                .saturating_sub(before)
        };
        let (what, total) = (format!("version {version}"), bytes_to_fetch(&opened));
        let fetched = Box::pin(self.fetch(opened));
        let (files, held) = watch(&what, total, received, fetched).await?;
        let run = self.member.credentials.run.clone();
        let anchor = match held.anchor {
            Some(anchor) => anchor,
            None => {
                // The version came as an older anchor and deltas. This description lets `verify` check the folder shard by shard.
                let body = &held.version.body;
                let content = Content::Anchor { root: body.root };
                self.member
                    .client
                    .sign(describe_object(content, body.version, &held.image)?)?
            }
        };
        let (out, version, image) = (out.to_owned(), held.version, held.image);
        let written = tokio::task::spawn_blocking(move || {
            let contents = Contents {
                run: &run,
                version: &version,
                anchor: &anchor,
                weights: &image,
                files: &files,
                file_bytes_max,
            };
            write(&out, &contents, Existing::Refuse)
        });
        Ok(written.await.context("the folder was not written")??)
    }

    /// The known versions, in order, each with whether peers hold the objects to pull it.
    pub(crate) async fn held(&self) -> Result<Vec<(&Opened, bool)>> {
        let holdings = self.survey(self.heard.values()).await?;
        let judged = self
            .heard
            .values()
            .map(|opened| (opened, opened.clone().keep_held(&holdings)));
        Ok(judged.collect())
    }

    /// Asks dispatch's list of peers which objects of these versions they hold.
    async fn survey(&self, versions: impl Iterator<Item = &Opened>) -> Result<Holdings> {
        let mut peers = Vec::new();
        for bytes in answered(async { Ok(self.member.client.peers(None).await?) }).await? {
            match open::<PeerRecord>(bytes, self.member.client.run()) {
                Ok(record) => peers.push(record.body),
                Err(error) => tracing::debug!(%error, "a peer's record cannot be used"),
            }
        }
        let objects = versions.flat_map(|opened| opened.objects.iter().chain(&opened.files));
        let objects: Vec<Object> = objects.map(|object| object.body.clone()).collect();
        Ok(self.member.swarm.survey(peers, &objects).await)
    }

    async fn fetch(&self, opened: Opened) -> Result<(BTreeMap<String, Bytes>, Held)> {
        let source = self.member.source();
        let mut files = BTreeMap::new();
        for entry in &opened.version.body.files {
            let bytes = fetch_file(source.as_ref(), &opened, &entry.name).await?;
            files.insert(entry.name.clone(), bytes);
        }
        Ok((files, fetch(source.as_ref(), opened, None).await?))
    }

    async fn ask(&self, version: Option<PolicyVersion>) -> Result<Option<Opened>> {
        let client = &self.member.client;
        answered(async {
            match client.ask_until_answered(Ask::Latest { version }).await? {
                Reply::Version(Some(told)) => Ok(Some(open_announcement(client, &told)?)),
                Reply::Version(None) => Ok(None),
                _ => Err(DispatchClientError::Unexpected.into()),
            }
        })
        .await
    }
}

/// Refuses, before anything is fetched, a folder that cannot be written.
fn refuse_tiny_files(bytes: u64, file_bytes_max: u64) -> Result<()> {
    let files = bytes.div_ceil(file_bytes_max.max(1));
    if files > FOLDER_FILES_MAX as u64 {
        bail!(
            "files of {file_bytes_max} bytes would be {files} for weights of {bytes} bytes, at most {FOLDER_FILES_MAX} are written: give a larger --file-bytes-max"
        );
    }
    Ok(())
}

/// Bytes of the objects that lead to a version from nothing, and of its other files.
fn bytes_to_fetch(opened: &Opened) -> u64 {
    let objects: Vec<&Object> = opened.objects.iter().map(|object| &object.body).collect();
    let route = cheapest(&objects, None, opened.version.body.root).unwrap_or_default();
    let files = opened.version.body.files.iter().map(|file| file.bytes);
    files.chain(route.iter().map(|object| object.bytes)).sum()
}

/// The answer of a live run, or an error after [`ANSWER_WAIT`].
async fn answered<T>(answer: impl Future<Output = Result<T>>) -> Result<T> {
    let seconds = ANSWER_WAIT.as_secs();
    tokio::time::timeout(ANSWER_WAIT, answer)
        .await
        .with_context(|| {
            format!(
                "dispatch did not answer within {seconds} s: start the run, or wait until it is up"
            )
        })?
}
