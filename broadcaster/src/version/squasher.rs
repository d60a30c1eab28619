//! Makes squashed deltas of the versions that this member holds, and tells dispatch of them: while the machine has nothing
//! better to do, on one thread, when it is this member's turn ([`crate::version::squash`]) and nobody has done it yet.
//!
//! Knows only versions that were checked against the learner's root. Invariants: at most one delta is being made; of older
//! weights at most those are kept that `bytes_max` has room for; at most [`MADE_MAX`] deltas are offered.

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

/// Most deltas of this member's own that are offered at once, the newest.
const MADE_MAX: usize = 8;
/// How long work waits before it looks again whether a version is being taken over.
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
    #[error("the thread that made it ended: {0}")]
    Thread(#[from] tokio::task::JoinError),
    #[error("it has {bytes} bytes where the single steps have {chain}")]
    NotSmaller { bytes: u64, chain: u64 },
}

/// Weights that a delta begins or ends with.
#[derive(Debug, Clone)]
struct Weights {
    version: PolicyVersion,
    root: StateRoot,
    image: Bytes,
}

/// A delta to be made.
#[derive(Debug)]
struct Job {
    from: Weights,
    to: Weights,
    /// Bytes of the single steps.
    chain: u64,
    /// When this member's turn begins.
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
    /// Where the next deltas begin: the newest version of each stride.
    kept: Vec<Weights>,
    /// What to make of the newest version that ends a stride.
    jobs: VecDeque<Job>,
    /// What was made, oldest first.
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

    /// Takes note of a version: what ends with it, and that it begins the next.
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
        // A version that came again begins anew; an older turn that was not used is another's by now.
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

    /// The delta over `stride` versions to `to`, if its beginning is here, the learner went there by deltas and there is a turn.
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
            return debug!(%from, %to, "somebody else has made this delta");
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
            Err(error) => debug!(%from, %to, %error, "a squashed delta was not made"),
        }
    }

    /// A dispatch that has started again knows nothing of what was described before.
    async fn tell_again(&self, known: &[Signed<Object>]) {
        let is_known = |delta: &&Signed<Object>| known.iter().any(|known| known.body == delta.body);
        for delta in self.made.iter().filter(|delta| !is_known(delta)) {
            if let Err(error) = self
                .client
                .deltas(PolicyVersion(0), Some(&delta.bytes))
                .await
            {
                debug!(%error, "an earlier squashed delta is not wanted any more");
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
        // Offered before it is described, so that whoever hears of it finds it.
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
