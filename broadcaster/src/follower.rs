//! Following a run's versions: hear of them, check who signed them, fetch their bytes from peers, check the bytes against
//! the signed root, and only then hand them to whoever uses them. Every member that needs weights follows this way.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use muster_protocol::bus::{BusError, Subscription};
use muster_protocol::desk::{Desk, DeskError};
use muster_protocol::envelope::{EnvelopeError, Signed, open};
use muster_protocol::id::{ContentHash, PolicyVersion};
use muster_protocol::message::ask::{Answer, Ask};
use muster_protocol::message::version::{Announcement, Content, Object, Version};
use muster_protocol::subject::Log;

use crate::state::verify_state;
use crate::swarm::{FetchError, Source};

/// News may be missed, so the newest version is also asked for: when nothing was heard for several times as long as it
/// usually takes, and ever more rarely while there is none. Shortest and longest of these times.
const PATIENCE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// How many usual gaps between versions are waited out. Missing one is no harm where the next is on its way.
const PATIENCE_GAPS: u32 = 4;
/// Pause after a fetch that failed.
const RETRY: Duration = Duration::from_millis(500);
/// Versions that a follower of every version may be behind before it skips the oldest.
const BACKLOG_MAX: usize = 16;
/// Bytes that are hashed where they are: below this a thread costs more than the work, which takes some 50 µs.
const IN_PLACE_BYTES_MAX: usize = 64 << 10;

/// Which versions a member needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Follow {
    /// The newest; older ones are skipped.
    Newest,
    /// Each, in order: critics judge groups of any recent version.
    Every,
}

/// A version whose bytes are here and were checked against the signed root.
#[derive(Debug, Clone)]
pub struct Held {
    /// What the learner signed.
    pub version: Signed<Version>,
    /// The object that the bytes came as.
    pub anchor: Signed<Object>,
    /// The files beside the weights that the version names, as descriptions.
    pub files: Vec<Signed<Object>>,
    /// The weights: a safetensors file in canonical layout.
    pub image: Bytes,
}

/// Why a version could not be taken over.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// The announcement is not one.
    #[error("an announcement cannot be used: {0}")]
    Envelope(#[from] EnvelopeError),
    /// Somebody else's version.
    #[error("version {0} is not signed by the run's learner")]
    NotTheLearner(PolicyVersion),
    /// No object leads to it.
    #[error("version {0} was announced without an anchor")]
    NoAnchor(PolicyVersion),
    /// The version names no file of this name, or it was announced without a description.
    #[error("version {version} has no file {name}")]
    NoFile {
        /// Which version.
        version: PolicyVersion,
        /// Which file.
        name: String,
    },
    /// The bytes did not come.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The bytes are not what was signed.
    #[error("the bytes of version {version} are not what the learner signed: {problem}")]
    Bytes {
        /// Which version.
        version: PolicyVersion,
        /// Where they differ.
        problem: String,
    },
    /// Dispatch cannot be asked.
    #[error(transparent)]
    Desk(#[from] DeskError),
}

/// An announcement whose signatures and authors were checked.
#[derive(Debug, Clone)]
pub struct Opened {
    /// What the learner signed.
    pub version: Signed<Version>,
    /// The anchor's description.
    pub anchor: Signed<Object>,
    /// Descriptions of the files beside the weights.
    pub files: Vec<Signed<Object>>,
}

/// Opens an announcement, believing only `desk`'s learner about the version. Objects may be described by anybody: their
/// bytes are checked against what the learner signed.
///
/// # Errors
/// When it is not the learner's, or no anchor of the version is in it.
pub fn open_announcement(desk: &Desk, announcement: &Announcement) -> Result<Opened, FollowError> {
    let version = open::<Version>(announcement.version.clone().into(), desk.run())?;
    let number = version.body.version;
    if version.author != desk.learner() {
        return Err(FollowError::NotTheLearner(number));
    }
    let mut anchor = None;
    let mut files = Vec::new();
    for bytes in &announcement.objects {
        let object = open::<Object>(bytes.to_vec().into(), desk.run())?;
        match object.body.content {
            Content::Anchor { root } if root == version.body.root => anchor = Some(object),
            Content::File { .. } => files.push(object),
            Content::Anchor { .. } | Content::Delta { .. } => {}
        }
    }
    let anchor = anchor.ok_or(FollowError::NoAnchor(number))?;
    Ok(Opened {
        version,
        anchor,
        files,
    })
}

/// Fetches a version's bytes and checks them against its root.
///
/// # Errors
/// When they do not come or are not what was signed.
pub async fn fetch(source: &dyn Source, opened: Opened) -> Result<Held, FollowError> {
    let Opened {
        version,
        anchor,
        files,
    } = opened;
    let image = source.fetch(&anchor.body).await?;
    let (signed, object, bytes) = (version.body.clone(), anchor.body.clone(), image.clone());
    let number = version.body.version;
    let bad = |problem: String| FollowError::Bytes {
        version: number,
        problem,
    };
    let verify = move || verify_state(&bytes, &signed, Some(&object));
    off_loop_if_large(image.len(), verify)
        .await
        .map_err(|error| bad(error.to_string()))?
        .map_err(|error| bad(error.to_string()))?;
    Ok(Held {
        version,
        anchor,
        files,
        image,
    })
}

/// Does `work` over so many bytes: here when they are few, on a thread that may block otherwise.
///
/// # Errors
/// When the work panicked on its thread.
pub async fn off_loop_if_large<T: Send + 'static>(
    bytes: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, tokio::task::JoinError> {
    if bytes <= IN_PLACE_BYTES_MAX {
        return Ok(work());
    }
    tokio::task::spawn_blocking(work).await
}

/// Fetches one of the files that a version names.
///
/// # Errors
/// When the version has no such file, or its bytes do not come.
pub async fn fetch_file(
    source: &dyn Source,
    opened: &Opened,
    name: &str,
) -> Result<Bytes, FollowError> {
    let version = opened.version.body.version;
    let missing = || FollowError::NoFile {
        version,
        name: name.to_owned(),
    };
    let mut entries = opened.version.body.files.iter();
    let entry = entries
        .find(|entry| entry.name == name)
        .ok_or_else(missing)?;
    let content = Content::File { hash: entry.hash };
    let mut files = opened.files.iter();
    let object = files
        .find(|object| object.body.content == content)
        .ok_or_else(missing)?;
    let bytes = source.fetch(&object.body).await?;
    if ContentHash::of(&bytes) != entry.hash {
        let problem = format!("{name} has another hash");
        return Err(FollowError::Bytes { version, problem });
    }
    Ok(bytes)
}

/// Asks for the newest version until there is one.
///
/// # Errors
/// When asking again cannot help, or what was announced is not the learner's.
pub async fn first_version(desk: &Desk) -> Result<Opened, FollowError> {
    loop {
        match desk
            .ask_until_answered(Ask::Latest { version: None })
            .await?
        {
            Answer::Version(Some(announcement)) => return open_announcement(desk, &announcement),
            Answer::Version(None) => tokio::time::sleep(RETRY).await,
            _ => return Err(DeskError::Unexpected.into()),
        }
    }
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
        desk: Desk,
        source: Arc<dyn Source>,
        follow: Follow,
        tracker: &TaskTracker,
        shutdown: CancellationToken,
    ) -> Result<Self, BusError> {
        let news = desk
            .bus()
            .subscribe(&desk.subjects().news(Log::Versions))
            .await?;
        let (newest_sender, newest) = watch::channel(None);
        let (each_sender, each) = mpsc::channel(BACKLOG_MAX);
        let task = Task {
            desk,
            source,
            follow,
            news,
            newest_sender,
            each_sender,
            backlog: VecDeque::new(),
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
    desk: Desk,
    source: Arc<dyn Source>,
    follow: Follow,
    news: Subscription,
    newest_sender: watch::Sender<Option<Arc<Held>>>,
    each_sender: mpsc::Sender<Arc<Held>>,
    backlog: VecDeque<Opened>,
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
        match self.desk.latest().await {
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
        let opened = match open_announcement(&self.desk, announcement) {
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
            let opened = match self.desk.ask_until_answered(ask).await {
                Ok(Answer::Version(Some(announcement))) => {
                    open_announcement(&self.desk, &announcement)
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

    fn queue(&mut self, opened: Opened) {
        self.backlog.push_back(opened);
        if self.backlog.len() > BACKLOG_MAX {
            self.backlog.pop_front();
        }
    }

    /// Fetches a version; newer ones that are announced meanwhile wait their turn, unless nobody within reach holds this one:
    /// the peer that made it may have gone before others had it. Returns how long to wait before going on.
    async fn take_over(&mut self, opened: Opened) -> Duration {
        let number = opened.version.body.version;
        let source = self.source.clone();
        let anchor = opened.anchor.body.clone();
        let mut fetched = std::pin::pin!(fetch(source.as_ref(), opened.clone()));
        let fetched = loop {
            tokio::select! {
                biased;
                fetched = &mut fetched => break fetched,
                () = tokio::time::sleep(RETRY) => {}
            }
            if !source.is_forsaken(&anchor) {
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
