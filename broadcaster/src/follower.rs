//! Follows a run: hears of each new version, checks its signature, fetches its weights from peers, verifies them against the
//! signed root, and only then hands them to the caller. Workers, critics, seeders and evaluators all follow a run this way.
//!
//! Announcements may be lost, so the follower also asks dispatch for the newest version when it has heard nothing for a while.
//! Invariant: versions are taken in ascending order of (version, generation).

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{Instrument, debug, info_span, warn};

use muster_protocol::bus::{BusError, Subscription};
use muster_protocol::dispatch_client::{DispatchClient, DispatchClientError};
use muster_protocol::envelope::{Signed, open};
use muster_protocol::id::PolicyVersion;
use muster_protocol::message::ask::{Ask, Reply};
use muster_protocol::message::version::{Announcement, Content, Object, SQUASH_STRIDES};
use muster_protocol::subject::Log;

use crate::swarm::ObjectSource;

pub use crate::version::adopt::{FollowError, Held, Opened, fetch, fetch_file, open_announcement};

/// Shortest and longest silence after which the follower asks for the newest version. The silence doubles with each question
/// that brings nothing new.
const SILENCE_MIN: Duration = Duration::from_secs(1);
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// The follower asks after a silence of this many usual gaps between versions. It need not ask sooner: if one announcement is
/// lost, the next one usually arrives.
const SILENCE_GAPS: u32 = 4;
/// Pause after a fetch that failed.
const RETRY: Duration = Duration::from_millis(500);
/// Most versions that wait to be fetched, or to be taken by the caller; the oldest is skipped.
const BACKLOG_MAX: usize = 16;
/// Most deltas remembered from earlier announcements: a peer that is a few versions behind may need those of each.
const DELTAS_KNOWN_MAX: usize = 32;

/// Which versions a peer needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Follow {
    /// The newest; older ones are skipped.
    Newest,
    /// Each, in order: critics review groups of any recent version.
    Every,
}

/// Waits for the run's first version, and returns the newest.
///
/// # Errors
/// When asking again cannot help, or the announcement is not the learner's.
pub async fn first_version(client: &DispatchClient) -> Result<Opened, FollowError> {
    loop {
        match client
            .ask_until_answered(Ask::Latest { version: None })
            .await?
        {
            Reply::Version(Some(announcement)) => return open_announcement(client, &announcement),
            Reply::Version(None) => tokio::time::sleep(RETRY).await,
            _ => return Err(DispatchClientError::Unexpected.into()),
        }
    }
}

/// The squashed deltas that peers have made and described, from version `from` on. Empty if dispatch does not answer.
pub async fn squashed_deltas(client: &DispatchClient, from: PolicyVersion) -> Vec<Signed<Object>> {
    let described = match client.deltas(from, None).await {
        Ok(described) => described,
        Err(error) => {
            debug!(%error, "dispatch does not list squashed deltas");
            return Vec::new();
        }
    };
    let mut deltas = Vec::new();
    for bytes in described {
        match open::<Object>(bytes, client.run()) {
            Ok(delta) => deltas.push(delta),
            Err(error) => warn!(%error, "description of a squashed delta ignored"),
        }
    }
    deltas
}

/// A handle to the verified versions of a run.
#[derive(Debug)]
pub struct Follower {
    newest: watch::Receiver<Option<Arc<Held>>>,
    each: mpsc::Receiver<Arc<Held>>,
}

impl Follower {
    /// Starts following on `tracker` until `shutdown`.
    ///
    /// # Errors
    /// When these credentials may not subscribe to announcements.
    pub async fn start(
        client: DispatchClient,
        source: Arc<dyn ObjectSource>,
        follow: Follow,
        tracker: &TaskTracker,
        shutdown: CancellationToken,
    ) -> Result<Self, BusError> {
        let announcements = client
            .bus()
            .subscribe(&client.subjects().news(Log::Versions))
            .await?;
        let (newest_sender, newest) = watch::channel(None);
        let (each_sender, each) = mpsc::channel(BACKLOG_MAX);
        let task = Task {
            client,
            source,
            follow,
            announcements,
            newest_sender,
            each_sender,
            backlog: VecDeque::new(),
            deltas: VecDeque::new(),
            newest: None,
            silence: SILENCE_MIN,
            usual_gap: Duration::ZERO,
            heard_at: Instant::now(),
        };
        tracker.spawn(async move {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => {}
                () = task.run() => {}
            }
        });
        Ok(Self { newest, each })
    }

    /// The newest verified version.
    pub fn latest(&mut self) -> Option<Arc<Held>> {
        self.newest.borrow_and_update().clone()
    }

    /// A receiver of the newest verified version, for other tasks.
    pub fn watch(&self) -> watch::Receiver<Option<Arc<Held>>> {
        self.newest.clone()
    }

    /// Waits until [`Follower::latest`] would return another version than it did last.
    ///
    /// # Cancel safety
    /// A cancelled call misses nothing.
    pub async fn changed(&mut self) {
        if self.newest.changed().await.is_err() {
            std::future::pending::<()>().await; // the follower has ended: no other version will come
        }
    }

    /// With [`Follow::Every`], the next verified version in order that was not taken yet.
    pub fn take_next(&mut self) -> Option<Arc<Held>> {
        self.each.try_recv().ok()
    }
}

struct Task {
    client: DispatchClient,
    source: Arc<dyn ObjectSource>,
    follow: Follow,
    announcements: Subscription,
    newest_sender: watch::Sender<Option<Arc<Held>>>,
    each_sender: mpsc::Sender<Arc<Held>>,
    /// Versions to fetch, oldest first.
    backlog: VecDeque<Opened>,
    /// Deltas of the last announcements.
    deltas: VecDeque<Signed<Object>>,
    /// Version and generation of the newest announcement.
    newest: Option<(PolicyVersion, u64)>,
    /// How long to hear nothing before asking.
    silence: Duration,
    /// Usual time between two versions: the longest of the last ones, halved with each version that comes sooner.
    usual_gap: Duration,
    /// When the newest version was heard of.
    heard_at: Instant,
}

impl Task {
    async fn run(mut self) {
        self.ask_for_newest().await;
        loop {
            let pause = match self.backlog.pop_front() {
                Some(opened) => {
                    let body = &opened.version.body;
                    let span = info_span!("adopt", version = %body.version, generation = body.generation.0);
                    self.adopt(opened).instrument(span).await
                }
                None => self.silence,
            };
            if pause.is_zero() {
                continue;
            }
            tokio::select! {
                biased;
                heard = self.announcements.next() => match heard {
                    Some(heard) => self.on_announcement(&heard.payload).await,
                    None => return,
                },
                () = tokio::time::sleep(pause) => self.ask_for_newest().await,
            }
        }
    }

    async fn ask_for_newest(&mut self) {
        self.silence = (self.silence * 2).min(SILENCE_MAX);
        match self.client.latest().await {
            Ok(Some(announcement)) => self.on_decoded(&announcement).await,
            Ok(None) => {}
            Err(error) => debug!(%error, "dispatch does not tell the newest version"),
        }
    }

    async fn on_announcement(&mut self, bytes: &[u8]) {
        match Announcement::decode(bytes) {
            Ok(announcement) => self.on_decoded(&announcement).await,
            Err(error) => warn!(%error, "announcement of a version ignored"),
        }
    }

    async fn on_decoded(&mut self, announcement: &Announcement) {
        let opened = match open_announcement(&self.client, announcement) {
            Ok(opened) => opened,
            Err(error) => return warn!(%error, "announcement of a version ignored"),
        };
        let body = &opened.version.body;
        let announced = (body.version, body.generation.0);
        if self.newest.is_some_and(|newest| announced <= newest) {
            return;
        }
        let before = self.newest.replace(announced);
        self.usual_gap = self.heard_at.elapsed().max(self.usual_gap / 2);
        self.silence = (self.usual_gap * SILENCE_GAPS).clamp(SILENCE_MIN, SILENCE_MAX);
        self.heard_at = Instant::now();
        match (self.follow, before) {
            (Follow::Newest, _) => self.backlog.clear(),
            (Follow::Every, Some((last, _))) => self.ask_for_missed(last, announced.0).await,
            (Follow::Every, None) => {}
        }
        self.queue(opened);
    }

    /// Asks for the versions after `last` and before `newest`, whose announcements did not arrive.
    async fn ask_for_missed(&mut self, last: PolicyVersion, newest: PolicyVersion) {
        let first = (last.0 + 1).max(newest.0.saturating_sub(BACKLOG_MAX as u64 - 1));
        for version in (first..newest.0).map(PolicyVersion) {
            let ask = Ask::Latest {
                version: Some(version),
            };
            let opened = match self.client.ask_until_answered(ask).await {
                Ok(Reply::Version(Some(announcement))) => {
                    open_announcement(&self.client, &announcement)
                }
                Ok(_) => {
                    debug!(%version, "version skipped: dispatch has no announcement of it");
                    continue;
                }
                Err(error) => Err(error.into()),
            };
            match opened {
                Ok(opened) if opened.version.body.version == version => self.queue(opened),
                Ok(_) => warn!(%version, "version skipped: dispatch answered with another one"),
                Err(error) => warn!(%version, %error, "version skipped"),
            }
        }
    }

    /// Adds the deltas of earlier announcements to this one's, and remembers this one's.
    fn with_known_deltas(&mut self, mut opened: Opened) -> Opened {
        let is_in = |object: &Signed<Object>, known: &[Signed<Object>]| {
            known.iter().any(|known| known.body == object.body)
        };
        let is_delta =
            |object: &&Signed<Object>| matches!(object.body.content, Content::Delta { .. });
        let announced: Vec<_> = opened.objects.iter().filter(is_delta).cloned().collect();
        let earlier = self.deltas.iter().filter(|delta| !is_in(delta, &announced));
        opened.objects.extend(earlier.cloned());
        for delta in announced {
            if !is_in(&delta, self.deltas.make_contiguous()) {
                self.deltas.push_back(delta);
            }
        }
        let excess = self.deltas.len().saturating_sub(DELTAS_KNOWN_MAX);
        self.deltas.drain(..excess);
        opened
    }

    fn queue(&mut self, opened: Opened) {
        debug_assert!(
            self.backlog
                .back()
                .is_none_or(|last| last.version.body.version <= opened.version.body.version),
            "versions are taken in ascending order"
        );
        let opened = self.with_known_deltas(opened);
        self.backlog.push_back(opened);
        if self.backlog.len() > BACKLOG_MAX {
            self.backlog.pop_front();
        }
    }

    /// For a follower that is many versions behind, adds the deltas over several versions that peers have made, and the
    /// learner's single steps up to where the first of those begins.
    async fn with_squashed(&mut self, mut opened: Opened, parent: Option<&Held>) -> Opened {
        let held = parent.map(|parent| parent.version.body.reference());
        let steps = match held {
            Some(held) => opened.version.body.version.0.saturating_sub(held.version.0),
            None => opened.route(None).map_or(0, |route| route.len() as u64),
        };
        let [stride, ..] = SQUASH_STRIDES;
        if steps < stride {
            return opened;
        }
        let from = held.map_or(PolicyVersion(0), |held| held.version);
        if held.is_some() {
            let begins = from.0.next_multiple_of(stride);
            for version in (from.0 + 1..=begins).map(PolicyVersion) {
                let deltas = self.announced_with(version).await;
                opened.add_squashed(self.source.as_ref(), deltas);
            }
        }
        let deltas = squashed_deltas(&self.client, from).await;
        opened.add_squashed(self.source.as_ref(), deltas);
        opened
    }

    /// The objects in the announcement of an earlier version.
    async fn announced_with(&self, version: PolicyVersion) -> Vec<Signed<Object>> {
        let ask = Ask::Latest {
            version: Some(version),
        };
        match self.client.ask(ask).await {
            Ok(Reply::Version(Some(announcement))) => {
                match open_announcement(&self.client, &announcement) {
                    Ok(opened) => return opened.objects,
                    Err(error) => warn!(%version, %error, "earlier announcement ignored"),
                }
            }
            Ok(_) => {}
            Err(error) => debug!(%version, %error, "dispatch does not tell an earlier version"),
        }
        Vec::new()
    }

    /// Fetches and verifies a version, and hands it to the caller. Newer announcements wait meanwhile, unless no reachable
    /// peer holds this version: the learner may have gone before another peer had it. Returns how long to wait before the
    /// next version.
    async fn adopt(&mut self, opened: Opened) -> Duration {
        let source = self.source.clone();
        let parent = self.newest_sender.borrow().clone();
        let opened = self.with_squashed(opened, parent.as_deref()).await;
        let root = parent.as_ref().map(|parent| parent.version.body.root);
        let route: Vec<Object> = opened
            .route(root)
            .map(|route| route.iter().map(|object| object.body.clone()).collect())
            .unwrap_or_default();
        let mut fetched = std::pin::pin!(fetch(source.as_ref(), opened.clone(), parent.as_deref()));
        let fetched = loop {
            tokio::select! {
                biased;
                fetched = &mut fetched => break fetched,
                () = tokio::time::sleep(RETRY) => {}
            }
            if !route.iter().any(|object| source.is_unreachable(object)) {
                continue;
            }
            while let Ok(Some(heard)) =
                tokio::time::timeout(Duration::ZERO, self.announcements.next()).await
            {
                self.on_announcement(&heard.payload).await;
            }
            if !self.backlog.is_empty() {
                warn!("version skipped for a newer one: no reachable peer holds it");
                return Duration::ZERO;
            }
        };
        match fetched {
            Ok(held) => {
                debug!("version adopted");
                let held = Arc::new(held);
                self.newest_sender.send_replace(Some(held.clone()));
                if self.follow == Follow::Every && self.each_sender.send(held).await.is_err() {
                    debug!("version not handed on: the follower's handle is gone");
                }
                Duration::ZERO
            }
            Err(error) => {
                warn!(%error, "version not adopted yet");
                if self.backlog.is_empty() {
                    self.backlog.push_front(opened);
                }
                RETRY
            }
        }
    }
}

#[cfg(test)]
mod tests;
