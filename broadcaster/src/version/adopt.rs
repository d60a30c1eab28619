//! Taking over one version: open what was announced, fetch its bytes by the cheapest objects, check them against the root that
//! the learner signed. Weights that are held are left as they are: deltas are applied to a copy, which is checked before
//! anybody sees it.

use std::num::NonZeroUsize;
use std::time::Duration;

use bytes::Bytes;
use tracing::{debug, warn};

use muster_protocol::dispatch_client::{DispatchClient, DispatchClientError};
use muster_protocol::envelope::{EnvelopeError, Signed, open};
use muster_protocol::id::{ContentHash, ObjectId, PeerId, PolicyVersion, StateRoot};
use muster_protocol::limits::SQUASHED_MAX;
use muster_protocol::message::version::{
    Announcement, Content, FileEntry, Object, Version, state_root,
};

use crate::blocking::off_loop_if_large;
use crate::codec::delta::apply;
use crate::swarm::survey::Holdings;
use crate::swarm::{FetchError, ObjectSource};
use crate::version::adoptions::Adoptions;
use crate::version::route::cheapest;
use crate::version::state::{HEADER_BYTES_MAX, describe_state, verify_state};

/// Most threads that apply a delta: the machine has other work, and eight keep up with any network.
const APPLY_THREADS_MAX: usize = 8;
/// How often it is looked whether somebody holds what a member described.
const FORSAKEN_LOOK: Duration = Duration::from_millis(500);

/// A version whose bytes are here and were checked against the signed root.
#[derive(Debug, Clone)]
pub struct Held {
    /// What the learner signed.
    pub version: Signed<Version>,
    /// The description of the bytes as a whole, when one was announced.
    pub anchor: Option<Signed<Object>>,
    /// Descriptions of the objects that were known to lead here.
    pub objects: Vec<Signed<Object>>,
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
    #[error("version {0} was announced without objects that lead to it from nothing")]
    NoRoute(PolicyVersion),
    /// The version names no file of this name, or it was announced without a description.
    #[error("version {version} has no file {name}")]
    NoFile {
        /// Which version.
        version: PolicyVersion,
        /// Which file.
        name: String,
    },
    /// Nobody within reach holds an object that a member described.
    #[error("object {} was described by a member and nobody holds it: another route is tried", object.short())]
    Forsaken {
        /// Which.
        object: ObjectId,
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
    Dispatch(#[from] DispatchClientError),
}

/// An announcement whose signatures and authors were checked.
#[derive(Debug, Clone)]
pub struct Opened {
    /// What the learner signed.
    pub version: Signed<Version>,
    /// Descriptions of anchors and deltas, by which the weights are reached.
    pub objects: Vec<Signed<Object>>,
    /// Descriptions of the files beside the weights.
    pub files: Vec<Signed<Object>>,
}

impl Opened {
    /// The description of the weights as a whole, when one was announced.
    pub fn anchor(&self) -> Option<&Signed<Object>> {
        let content = Content::Anchor {
            root: self.version.body.root,
        };
        self.objects
            .iter()
            .find(|object| object.body.content == content)
    }

    /// Leaves out the objects that no peer holds whole. Whether the version can be had from the rest: by some route to its
    /// weights, with the files beside them.
    pub fn keep_held(&mut self, holdings: &Holdings) -> bool {
        let is_held = |object: &Signed<Object>| holdings.are_whole(&object.body.id());
        self.objects.retain(is_held);
        self.files.retain(is_held);
        let has_file = |entry: &FileEntry| {
            let content = Content::File { hash: entry.hash };
            self.files.iter().any(|file| file.body.content == content)
        };
        self.version.body.files.iter().all(has_file) && self.route(None).is_some()
    }

    /// The objects that lead here with the fewest bytes, from nothing or from a state that is held.
    pub(crate) fn route(&self, held: Option<StateRoot>) -> Option<Vec<&Signed<Object>>> {
        let objects: Vec<&Object> = self.objects.iter().map(|object| &object.body).collect();
        let route = cheapest(&objects, held, self.version.body.root)?;
        let signed = |object: &Object| {
            let mut objects = self.objects.iter();
            objects.find(|signed| std::ptr::eq(&raw const signed.body, object))
        };
        route.into_iter().map(signed).collect()
    }

    /// Adds deltas that members described, by which a shorter route may lead here. Nothing is believed of them; those of
    /// `source`'s struck members, and what is larger than the weights, are left out.
    pub fn add_squashed(&mut self, source: &dyn ObjectSource, deltas: Vec<Signed<Object>>) {
        let version = &self.version.body;
        let whole = version.parameter_bytes().saturating_add(HEADER_BYTES_MAX);
        for delta in deltas.into_iter().take(SQUASHED_MAX) {
            let is_usable = delta.body.delta().is_some()
                && delta.body.version <= version.version
                && delta.body.bytes <= whole
                && !source.is_distrusted(&delta.author);
            let mut known = self.objects.iter();
            if is_usable && !known.any(|known| known.body == delta.body) {
                self.objects.push(delta);
            }
        }
    }

    /// Leaves an object out, and with it all by a member who described what is not so.
    fn leave_out(&mut self, source: &dyn ObjectSource, culprit: &Signed<Object>, stray: &Stray) {
        let author = culprit.author;
        let is_liar = stray.is_untrue && author != self.version.author;
        if is_liar {
            source.distrust(author, &culprit.body, &stray.error.to_string());
        }
        self.objects
            .retain(|object| object.body != culprit.body && !(is_liar && object.author == author));
    }
}

/// Opens an announcement, believing only `client`'s learner about the version. Objects may be described by anybody: their
/// bytes are checked against what the learner signed.
///
/// # Errors
/// When it is not the learner's, or a newcomer could not reach the version by what is in it.
pub fn open_announcement(
    client: &DispatchClient,
    announcement: &Announcement,
) -> Result<Opened, FollowError> {
    let version = open::<Version>(announcement.version.clone().into(), client.run())?;
    let number = version.body.version;
    if version.author != client.learner() {
        return Err(FollowError::NotTheLearner(number));
    }
    // Objects are described by anybody: what is larger than the weights and a header leads nowhere faster.
    let whole = version
        .body
        .parameter_bytes()
        .saturating_add(HEADER_BYTES_MAX);
    let mut opened = Opened {
        version,
        objects: Vec::new(),
        files: Vec::new(),
    };
    for bytes in &announcement.objects {
        let object = open::<Object>(bytes.to_vec().into(), client.run())?;
        match object.body.content {
            Content::File { .. } => opened.files.push(object),
            Content::Anchor { .. } | Content::Delta { .. } if object.body.bytes <= whole => {
                opened.objects.push(object);
            }
            Content::Anchor { .. } | Content::Delta { .. } => {
                warn!(author = %object.author, bytes = object.body.bytes, "an object larger than the weights is ignored");
            }
        }
    }
    if opened.route(None).is_none() {
        return Err(FollowError::NoRoute(number));
    }
    Ok(opened)
}

/// Fetches a version's bytes and checks them against its root, by the objects that take the fewest bytes: from nothing, or
/// from the weights of `parent`, which are left as they are. An object that does not come, or leads elsewhere than it says, is
/// left out and the next best route taken; a member whose description was not true is struck.
///
/// # Errors
/// When the bytes do not come or are not what was signed.
pub async fn fetch(
    source: &dyn ObjectSource,
    mut opened: Opened,
    parent: Option<&Held>,
) -> Result<Held, FollowError> {
    let number = opened.version.body.version;
    let anchor = opened.anchor().cloned();
    let held = parent.map(|parent| (parent.version.body.root, parent.image.clone()));
    let root = held.as_ref().map(|(root, _)| *root);
    loop {
        let route = opened.route(root).ok_or(FollowError::NoRoute(number))?;
        let route: Vec<Signed<Object>> = route.into_iter().cloned().collect();
        let stray = match travel(source, &opened.version, &route, held.as_ref()).await {
            Ok(image) => {
                let is_whole = matches!(&route[..], [only] if only.body.delta().is_none());
                if let Some(anchor) = anchor.as_ref().filter(|_| !is_whole) {
                    pass_on(source, &anchor.body, &image).await;
                }
                for object in &opened.objects {
                    source.keep_for(&object.body, number);
                }
                debug_assert!(
                    verify_state(&image, &opened.version.body, None).is_ok(),
                    "weights verified before use"
                );
                return Ok(Held {
                    anchor,
                    version: opened.version,
                    objects: opened.objects,
                    files: opened.files,
                    image,
                });
            }
            Err(stray) => stray,
        };
        // An empty route leads from the weights that are held to themselves: nothing can be left out of it.
        let Some(culprit) = route.get(stray.at) else {
            return Err(stray.error);
        };
        opened.leave_out(source, culprit, &stray);
        if opened.route(root).is_none() {
            return Err(stray.error);
        }
        warn!(version = %number, error = %stray.error, "an object did not lead to the weights: going on without it");
    }
}

/// Where a route did not lead on.
struct Stray {
    /// By which of its objects.
    at: usize,
    /// Whether all of that object came, so that its description is not true.
    is_untrue: bool,
    error: FollowError,
}

/// Goes by the objects of a route, and checks where it led.
async fn travel(
    source: &dyn ObjectSource,
    version: &Signed<Version>,
    route: &[Signed<Object>],
    held: Option<&(StateRoot, Bytes)>,
) -> Result<Bytes, Stray> {
    let number = version.body.version;
    let adoptions = source.adoptions();
    let mut image = held.map(|(_, image)| image.clone()).unwrap_or_default();
    let mut failure = None;
    for (at, object) in route.iter().enumerate() {
        let bytes = come_by(source, object, version.author).await;
        let bytes = bytes.map_err(|error| Stray {
            at,
            is_untrue: false,
            error,
        })?;
        match step(&adoptions, image.clone(), bytes, &object.body).await {
            Ok(next) => image = next,
            Err(problem) => {
                failure = Some((at, problem));
                break;
            }
        }
    }
    let (at, problem) = match failure {
        Some(failure) => failure,
        None => match arrive(&adoptions, &image, version, route).await {
            Ok(()) => return Ok(image),
            Err(problem) => (route.len().saturating_sub(1), problem),
        },
    };
    // What is wrong may have become so before it was seen.
    let earlier = match at {
        0 => None,
        at => first_untrue(source, &route[..at], held).await,
    };
    let error = FollowError::Bytes {
        version: number,
        problem,
    };
    Err(Stray {
        at: earlier.unwrap_or(at),
        is_untrue: true,
        error,
    })
}

/// An object's bytes. What the learner described is waited for; what others did only while somebody holds it.
async fn come_by(
    source: &dyn ObjectSource,
    object: &Signed<Object>,
    learner: PeerId,
) -> Result<Bytes, FollowError> {
    let mut fetched = std::pin::pin!(source.fetch(&object.body));
    loop {
        tokio::select! {
            biased;
            fetched = &mut fetched => return Ok(fetched?),
            () = tokio::time::sleep(FORSAKEN_LOOK) => {}
        }
        if object.author != learner && source.is_unreachable(&object.body) {
            return Err(FollowError::Forsaken {
                object: object.body.id(),
            });
        }
    }
}

/// Where an object leads from `image`; a problem in words when it leads nowhere.
async fn step(
    adoptions: &Adoptions,
    image: Bytes,
    bytes: Bytes,
    object: &Object,
) -> Result<Bytes, String> {
    if object.delta().is_none() {
        return Ok(bytes);
    }
    let adoption = adoptions.begin();
    let applied = off_loop_if_large(image.len(), move || {
        let _adoption = adoption;
        apply(&image, &bytes, apply_threads()).map(Bytes::from)
    });
    let applied = applied.await.map_err(|error| error.to_string())?;
    applied.map_err(|error| error.to_string())
}

/// Whether `image`, to which `route` led, is what the learner signed.
async fn arrive(
    adoptions: &Adoptions,
    image: &Bytes,
    version: &Signed<Version>,
    route: &[Signed<Object>],
) -> Result<(), String> {
    // Shard hashes say where a whole file is wrong. What a delta made has only its root.
    let object = match route {
        [only] if only.body.delta().is_none() => Some(only.body.clone()),
        _ => None,
    };
    let (signed, bytes, adoption) = (version.body.clone(), image.clone(), adoptions.begin());
    let verify = move || {
        let _adoption = adoption;
        verify_state(&bytes, &signed, object.as_ref())
    };
    off_loop_if_large(image.len(), verify)
        .await
        .map_err(|error| error.to_string())?
        .map_err(|error| error.to_string())
}

/// Goes by a route again, looking at every step where it led: the first object whose description is not true.
async fn first_untrue(
    source: &dyn ObjectSource,
    route: &[Signed<Object>],
    held: Option<&(StateRoot, Bytes)>,
) -> Option<usize> {
    let adoptions = source.adoptions();
    let mut image = held.map(|(_, image)| image.clone()).unwrap_or_default();
    for (at, object) in route.iter().enumerate() {
        let bytes = source.fetch(&object.body).await.ok()?;
        image = match step(&adoptions, image, bytes, &object.body).await {
            Ok(next) => next,
            Err(_) => return Some(at),
        };
        let hashed = image.clone();
        let described = off_loop_if_large(image.len(), move || describe_state(&hashed)).await;
        let found = match described.ok()? {
            Ok((_, part)) => Some(state_root(&[part])),
            Err(_) => None,
        };
        let said = match object.body.content {
            Content::Anchor { root } | Content::Delta { to: root, .. } => Some(root),
            Content::File { .. } => None,
        };
        if found.is_none() || found != said {
            return Some(at);
        }
    }
    None
}

fn apply_threads() -> NonZeroUsize {
    let most = NonZeroUsize::MIN.saturating_add(APPLY_THREADS_MAX - 1);
    std::thread::available_parallelism().map_or(NonZeroUsize::MIN, |threads| threads.min(most))
}

/// Whoever got a version by deltas can serve it as a whole, where it was described so.
async fn pass_on(source: &dyn ObjectSource, anchor: &Object, image: &Bytes) {
    if let Err(error) = source.offer(anchor, image.clone()).await {
        debug!(%error, "the weights are not passed on as a whole");
    }
}

/// Fetches one of the files that a version names.
///
/// # Errors
/// When the version has no such file, or its bytes do not come.
pub async fn fetch_file(
    source: &dyn ObjectSource,
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

#[cfg(test)]
mod tests;
