//! Makes squashed deltas of the versions that this member holds, and registers them with dispatch. A delta is made on one
//! thread, while the peer adopts no version, on this member's turn ([`crate::version::squash`]) if no other member has made it.
//!
//! Knows only verified versions. Invariants: it makes at most one delta at a time; it keeps at most `bytes_max` bytes of older
//! weights; it offers at most [`MADE_MAX`] deltas.

use std::collections::VecDeque;
use std::num::{NonZeroU64, NonZeroUsize};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info};

use muster_protocol::dispatch_client::DispatchClient;
use muster_protocol::envelope::Signed;
use muster_protocol::id::{PolicyVersion, StateRoot};
use muster_protocol::message::version::{Content, Object, SQUASH_STRIDES};

use crate::codec::delta::{DeltaError, encode_while};
use crate::follower::squashed_deltas;
use crate::store::StoreError;
use crate::store::object::{ObjectError, describe_object};
use crate::swarm::{ObjectSource as _, Swarm};
use crate::version::adopt::Held;
use crate::version::squash::{SquashConfig, chain_bytes, strides_kept, strides_to, turn_ms};

/// Most deltas that this member offers at once; the oldest is dropped.
const MADE_MAX: usize = 8;
/// Pause before the encoder checks again whether an adoption is under way.
const YIELD: Duration = Duration::from_millis(5);

/// Why a delta was not made.
#[derive(Debug, thiserror::Error)]
enum SquashError {
    #[error(transparent)]
    Delta(#[from] DeltaError),
    #[error(transparent)]
    Object(#[from] ObjectError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Dispatch(#[from] muster_protocol::dispatch_client::DispatchClientError),
    #[error(transparent)]
    Envelope(#[from] muster_protocol::envelope::EnvelopeError),
    #[error("the encoder's thread failed: {0}")]
    Thread(#[from] tokio::task::JoinError),
    #[error("it has {bytes} bytes, and the single steps have {chain}")]
    NotSmaller { bytes: u64, chain: u64 },
}

/// The weights at one end of a delta.
#[derive(Debug, Clone)]
struct Weights {
    version: PolicyVersion,
    root: StateRoot,
    image: Bytes,
}
#[derive(Debug)]
struct Job {
    from: Weights,
    to: Weights,
    /// Bytes of the learner's single steps.
    chain: u64,
    /// The start of this member's turn.
    due: Instant,
}

/// Makes squashed deltas of the versions in `newest` on `tracker` until `shutdown`.
pub fn keep(
    client: DispatchClient,
    swarm: Swarm,
    newest: watch::Receiver<Option<Arc<Held>>>,
    config: SquashConfig,
    tracker: &TaskTracker,
    shutdown: CancellationToken,
) {
    let squasher = Squasher {
        client,
        swarm,
        newest,
        config,
        kept: Vec::new(),
        jobs: VecDeque::new(),
        made: VecDeque::new(),
        shutdown: shutdown.clone(),
    };
    tracker.spawn(async move {
        tokio::select! {
            biased;
            () = shutdown.cancelled() => {}
            () = squasher.run() => {}
        }
    });
}

struct Squasher {
    client: DispatchClient,
    swarm: Swarm,
    newest: watch::Receiver<Option<Arc<Held>>>,
    config: SquashConfig,
    /// The newest version of each stride, at which the next deltas begin.
    kept: Vec<Weights>,
    /// Deltas that end at the newest version, by due time.
    jobs: VecDeque<Job>,
    /// Deltas that are on offer, oldest first.
    made: VecDeque<Signed<Object>>,
    shutdown: CancellationToken,
}

impl Squasher {
    async fn run(mut self) {
        loop {
            let due = self.jobs.front().map(|job| job.due);
            tokio::select! {
                biased;
                changed = self.newest.changed() => match changed {
                    Ok(()) => self.on_version(),
                    Err(_) => return, // the follower has ended
                },
                () = sleep_until(due) => {
                    if let Some(job) = self.jobs.pop_front() {
                        self.on_turn(job).await;
                    }
                }
            }
        }
    }

    /// Schedules the deltas that end at a new version, and keeps the version as the start of later ones.
    fn on_version(&mut self) {
        let Some(held) = self.newest.borrow_and_update().clone() else {
            return;
        };
        let body = &held.version.body;
        for delta in &self.made {
            self.swarm.keep_for(&delta.body.id(), body.version);
        }
        let Some(bytes) = NonZeroU64::new(held.image.len() as u64) else {
            return;
        };
        let kept = strides_kept(bytes, self.config).min(SQUASH_STRIDES.len());
        let [shortest, ..] = SQUASH_STRIDES;
        if kept == 0 || !body.version.0.is_multiple_of(shortest) {
            return;
        }
        let to = Weights {
            version: body.version,
            root: body.root,
            image: held.image.clone(),
        };
        // Unused turns at an older version have passed to other members by now.
        self.jobs.clear();
        for stride in strides_to(body.version, bytes, self.config) {
            self.jobs.extend(self.job(&held, &to, stride));
        }
        self.jobs.make_contiguous().sort_by_key(|job| job.due);
        self.kept.retain(|known| known.version < to.version);
        self.kept.push(to);
        let strides = &SQUASH_STRIDES[..kept];
        let ends = |stride: &u64, known: &Weights| known.version.0.is_multiple_of(*stride);
        let newest = |stride: &u64| self.kept.iter().rev().find(|known| ends(stride, known));
        let needed = strides.iter().filter_map(newest).map(|known| known.version);
        let needed: Vec<PolicyVersion> = needed.collect();
        self.kept.retain(|known| needed.contains(&known.version));
    }

    /// The delta over `stride` versions to `to`, if this member keeps its first version and has a turn, and the learner's steps are
    /// known.
    fn job(&self, held: &Held, to: &Weights, stride: u64) -> Option<Job> {
        let begins = to.version.0.checked_sub(stride)?;
        let mut kept = self.kept.iter();
        let from = kept.find(|known| known.version.0 == begins)?.clone();
        let objects: Vec<&Object> = held.objects.iter().map(|object| &object.body).collect();
        let chain = chain_bytes(&objects, from.root, to.root)?;
        let own = self.client.identity().peer_id();
        let learner = self.client.learner();
        let others = self.swarm.known_peers().into_iter();
        let others = others.filter(|other| *other != learner);
        let turn_ms = turn_ms(from.root, to.root, &own, others)?;
        Some(Job {
            from,
            to: to.clone(),
            chain,
            due: Instant::now() + Duration::from_millis(turn_ms),
        })
    }

    async fn on_turn(&mut self, job: Job) {
        let (from, to) = (job.from.version, job.to.version);
        let known = squashed_deltas(&self.client, PolicyVersion(0)).await;
        self.tell_again(&known).await;
        let content = Content::Delta {
            from: job.from.root,
            to: job.to.root,
        };
        if known.iter().any(|delta| delta.body.content == content) {
            return debug!(%from, %to, "another member has made this delta");
        }
        match self.make(job, content).await {
            Ok(delta) => {
                let bytes = delta.body.bytes;
                info!(%from, %to, bytes, "made a squashed delta");
                self.made.push_back(delta);
                if self.made.len() > MADE_MAX {
                    self.made.pop_front();
                }
            }
            Err(error) => debug!(%from, %to, %error, "could not make a squashed delta"),
        }
    }

    /// Registers earlier deltas again: a restarted dispatch has forgotten them.
    async fn tell_again(&self, known: &[Signed<Object>]) {
        let is_known = |delta: &&Signed<Object>| known.iter().any(|known| known.body == delta.body);
        for delta in self.made.iter().filter(|delta| !is_known(delta)) {
            if let Err(error) = self
                .client
                .deltas(PolicyVersion(0), Some(&delta.bytes))
                .await
            {
                debug!(%error, "dispatch refused an earlier squashed delta");
            }
        }
    }

    async fn make(&self, job: Job, content: Content) -> Result<Signed<Object>, SquashError> {
        let (chain, version, stop) = (job.chain, job.to.version, self.shutdown.clone());
        let adoptions = self.swarm.adoptions();
        let goes_on = move || {
            while !adoptions.is_idle() && !stop.is_cancelled() {
                std::thread::sleep(YIELD);
            }
            !stop.is_cancelled()
        };
        let coding = tokio::task::spawn_blocking(move || {
            let (from, to) = (job.from.image, job.to.image);
            encode_while(&from, &to, NonZeroUsize::MIN, goes_on)
        });
        let delta = Bytes::from(coding.await??.bytes);
        let bytes = delta.len() as u64;
        if bytes >= chain {
            return Err(SquashError::NotSmaller { bytes, chain });
        }
        let hashed = delta.clone();
        let describing =
            tokio::task::spawn_blocking(move || describe_object(content, version, &hashed));
        let object = describing.await??;
        // Offer before registering, so that a peer that hears of the delta can fetch it.
        self.swarm.offer(&object, delta).await?;
        let signed = self.client.sign(object)?;
        let from = PolicyVersion(0);
        self.client.deltas(from, Some(&signed.bytes)).await?;
        Ok(signed)
    }
}

async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
