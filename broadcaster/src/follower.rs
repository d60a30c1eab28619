//! Following a run's versions: hear of them, check who signed them, fetch their bytes from peers, check the bytes against
//! the signed root, and only then hand them to whoever uses them. Every member that needs weights follows this way.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use muster_protocol::bus::{BusError, Subscription};
use muster_protocol::dispatch_client::{DispatchClient, DispatchClientError};
use muster_protocol::envelope::{Signed, open};
use muster_protocol::id::PolicyVersion;
use muster_protocol::message::ask::{Ask, Reply};
use muster_protocol::message::version::{Announcement, Content, Object, SQUASH_STRIDES};
use muster_protocol::subject::Log;

use crate::swarm::ObjectSource;

pub use crate::adopt::{
    FollowError, Held, Opened, fetch, fetch_file, off_loop_if_large, open_announcement,
};

/// News may be missed, so the newest version is also asked for: when nothing was heard for several times as long as it
/// usually takes, and ever more rarely while there is none. Shortest and longest of these times.
const PATIENCE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// How many usual gaps between versions are waited out. Missing one is no harm where the next is on its way.
const PATIENCE_GAPS: u32 = 4;
/// Pause after a fetch that failed.
const RETRY: Duration = Duration::from_millis(500);
/// Versions that a follower of every version may be behind before it skips the oldest.
const BACKLOG_MAX: usize = 16;
/// Deltas remembered from earlier announcements: whoever is a few versions behind may need those of each.
const DELTAS_KNOWN_MAX: usize = 32;

/// Which versions a member needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Follow {
    /// The newest; older ones are skipped.
    Newest,
    /// Each, in order: critics judge groups of any recent version.
    Every,
}

/// Asks for the newest version until there is one.
///
/// # Errors
/// When asking again cannot help, or what was announced is not the learner's.
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

/// The deltas that members made and described, from version `from` on. None when dispatch does not say.
pub async fn squashed_deltas(client: &DispatchClient, from: PolicyVersion) -> Vec<Signed<Object>> {
    let described = match client.deltas(from, None).await {
        Ok(described) => described,
        Err(error) => {
            debug!(%error, "squashed deltas are not known");
            return Vec::new();
        }
    };
    let mut deltas = Vec::new();
    for bytes in described {
        match open::<Object>(bytes, client.run()) {
            Ok(delta) => deltas.push(delta),
            Err(error) => warn!(%error, "a squashed delta's description cannot be used"),
        }
    }
    deltas
}

/// A handle to a member's verified versions.
#[derive(Debug)]
pub struct Follower {
    newest: watch::Receiver<Option<Arc<Held>>>,
    each: mpsc::Receiver<Arc<Held>>,
}

impl Follower {
    /// Starts following on `tracker` until `shutdown`.
    ///
    /// # Errors
    /// When these credentials may not hear the news.
    pub async fn start(
        client: DispatchClient,
        source: Arc<dyn ObjectSource>,
        follow: Follow,
        tracker: &TaskTracker,
        shutdown: CancellationToken,
    ) -> Result<Self, BusError> {
        let news = client
            .bus()
            .subscribe(&client.subjects().news(Log::Versions))
            .await?;
        let (newest_sender, newest) = watch::channel(None);
        let (each_sender, each) = mpsc::channel(BACKLOG_MAX);
        let task = Task {
            client,
            source,
            follow,
            news,
            newest_sender,
            each_sender,
            backlog: VecDeque::new(),
            deltas: VecDeque::new(),
            newest: None,
            patience: PATIENCE.0,
            usual_gap: Duration::ZERO,
            heard: Instant::now(),
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

    /// The newest version that is here.
    pub fn latest(&mut self) -> Option<Arc<Held>> {
        self.newest.borrow_and_update().clone()
    }

    /// The newest version that is here, for those who look on.
    pub fn watch(&self) -> watch::Receiver<Option<Arc<Held>>> {
        self.newest.clone()
    }

    /// Waits until another version is here than [`Follower::latest`] gave last.
    ///
    /// # Cancel safety
    /// A cancelled call misses nothing.
    pub async fn changed(&mut self) {
        if self.newest.changed().await.is_err() {
            std::future::pending::<()>().await; // the follower has ended: nothing will change any more
        }
    }

    /// With [`Follow::Every`], the next version in order that is here and was not taken yet.
    pub fn take_next(&mut self) -> Option<Arc<Held>> {
        self.each.try_recv().ok()
    }
}

struct Task {
    client: DispatchClient,
    source: Arc<dyn ObjectSource>,
    follow: Follow,
    news: Subscription,
    newest_sender: watch::Sender<Option<Arc<Held>>>,
    each_sender: mpsc::Sender<Arc<Held>>,
    backlog: VecDeque<Opened>,
    /// Deltas of the last announcements.
    deltas: VecDeque<Signed<Object>>,
    /// Version and generation of the newest announcement that was taken in.
    newest: Option<(PolicyVersion, u64)>,
    /// How long to hear nothing before asking.
    patience: Duration,
    /// How long the next version takes to come, from the last ones: the longest, halved with each that comes sooner.
    usual_gap: Duration,
    /// When the newest version was heard of.
    heard: Instant,
}

impl Task {
    async fn run(mut self) {
        self.ask().await;
        loop {
            let pause = match self.backlog.pop_front() {
                Some(opened) => self.take_over(opened).await,
                None => self.patience,
            };
            if pause.is_zero() {
                continue;
            }
            tokio::select! {
                biased;
                heard = self.news.next() => match heard {
                    Some(heard) => self.on_announcement(&heard.payload).await,
                    None => return,
                },
                () = tokio::time::sleep(pause) => self.ask().await,
            }
        }
    }

    async fn ask(&mut self) {
        self.patience = (self.patience * 2).min(PATIENCE.1);
        match self.client.latest().await {
            Ok(Some(announcement)) => self.take_in(&announcement).await,
            Ok(None) => {}
            Err(error) => debug!(%error, "the newest version is not known"),
        }
    }

    async fn on_announcement(&mut self, bytes: &[u8]) {
        match Announcement::decode(bytes) {
            Ok(announcement) => self.take_in(&announcement).await,
            Err(error) => warn!(%error, "news of a version cannot be used"),
        }
    }

    async fn take_in(&mut self, announcement: &Announcement) {
        let opened = match open_announcement(&self.client, announcement) {
            Ok(opened) => opened,
            Err(error) => return warn!(%error, "news of a version cannot be used"),
        };
        let body = &opened.version.body;
        let place = (body.version, body.generation.0);
        let supersedes = |(version, generation): (PolicyVersion, u64)| {
            place.0 > version || (place.0 == version && place.1 > generation)
        };
        if !self.newest.is_none_or(supersedes) {
            return;
        }
        let before = self.newest.replace(place);
        self.usual_gap = self.heard.elapsed().max(self.usual_gap / 2);
        self.patience = (self.usual_gap * PATIENCE_GAPS).clamp(PATIENCE.0, PATIENCE.1);
        self.heard = Instant::now();
        match (self.follow, before) {
            (Follow::Newest, _) => self.backlog.clear(),
            (Follow::Every, Some((last, _))) => self.ask_between(last, place.0).await,
            (Follow::Every, None) => {}
        }
        self.queue(opened);
    }

    /// Asks for the versions after `last` and before `newest`, whose news did not come.
    async fn ask_between(&mut self, last: PolicyVersion, newest: PolicyVersion) {
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
                    debug!(%version, "a version is not announced any more");
                    continue;
                }
                Err(error) => Err(error.into()),
            };
            match opened {
                Ok(opened) => self.queue(opened),
                Err(error) => warn!(%version, %error, "a version was missed"),
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
        let opened = self.with_known_deltas(opened);
        self.backlog.push_back(opened);
        if self.backlog.len() > BACKLOG_MAX {
            self.backlog.pop_front();
        }
    }

    /// For who comes late, adds deltas that lead over several versions at once: what members have made of them, and the
    /// learner's single steps to where the first begins.
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

    /// The objects by which an earlier version was announced.
    async fn announced_with(&self, version: PolicyVersion) -> Vec<Signed<Object>> {
        let version = Some(version);
        match self.client.ask(Ask::Latest { version }).await {
            Ok(Reply::Version(Some(announcement))) => {
                open_announcement(&self.client, &announcement).map_or_else(
                    |error| {
                        warn!(%error, "an earlier announcement cannot be used");
                        Vec::new()
                    },
                    |opened| opened.objects,
                )
            }
            Ok(_) => Vec::new(),
            Err(error) => {
                debug!(%error, "an earlier version is not known");
                Vec::new()
            }
        }
    }

    /// Fetches a version; newer ones that are announced meanwhile wait their turn, unless nobody within reach holds this one:
    /// the peer that made it may have gone before others had it. Returns how long to wait before going on.
    async fn take_over(&mut self, opened: Opened) -> Duration {
        let number = opened.version.body.version;
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
            while let Ok(Some(heard)) = tokio::time::timeout(Duration::ZERO, self.news.next()).await
            {
                self.on_announcement(&heard.payload).await;
            }
            if !self.backlog.is_empty() {
                warn!(version = %number, "nobody within reach holds these weights: going on with newer ones");
                return Duration::ZERO;
            }
        };
        match fetched {
            Ok(held) => {
                debug!(version = %number, "weights are here");
                let held = Arc::new(held);
                self.newest_sender.send_replace(Some(held.clone()));
                if self.follow == Follow::Every && self.each_sender.send(held).await.is_err() {
                    debug!("nobody takes the versions any more");
                }
                Duration::ZERO
            }
            Err(error) => {
                warn!(version = %number, %error, "the weights did not come");
                if self.backlog.is_empty() {
                    self.backlog.push_front(opened);
                }
                RETRY
            }
        }
    }
}
