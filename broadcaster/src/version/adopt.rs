//! Adopts one version: opens its announcement, fetches its bytes by the cheapest objects, and verifies them against the root that
//! the learner signed. Deltas are applied to a copy of the parent's weights, and the copy is verified before it is used.

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

/// Most threads that apply a delta. Eight keep up with any network, and the machine has other work.
const APPLY_THREADS_MAX: NonZeroUsize = NonZeroUsize::new(8).unwrap();
/// How often [`fetch`] checks that some peer holds an object that a member described.
const FORSAKEN_LOOK: Duration = Duration::from_millis(500);

/// A version whose weights were verified against the signed root.
#[derive(Debug, Clone)]
pub struct Held {
    pub version: Signed<Version>,
    /// The description of the weights as a whole, if one was announced.
    pub anchor: Option<Signed<Object>>,
    /// The known objects that lead to this version.
    pub objects: Vec<Signed<Object>>,
    /// Descriptions of the files beside the weights.
    pub files: Vec<Signed<Object>>,
    /// The weights: a safetensors file in canonical layout.
    pub image: Bytes,
}

/// Why a version could not be adopted.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    #[error("cannot open an announcement: {0}")]
    Envelope(#[from] EnvelopeError),
    #[error("version {0} is not signed by the run's learner")]
    NotTheLearner(PolicyVersion),
    #[error(
        "version {0} was announced without an anchor, or without the deltas from an anchor to it"
    )]
    NoRoute(PolicyVersion),
    /// The version names no such file, or the announcement does not describe it.
    #[error("version {version} has no file {name}")]
    NoFile {
        version: PolicyVersion,
        name: String,
    },
    /// No reachable peer holds an object that a member described.
    #[error("object {} was described by a member, but no reachable peer holds it", object.short())]
    Forsaken { object: ObjectId },
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error("the bytes of version {version} differ from what the learner signed: {problem}")]
    Bytes {
        version: PolicyVersion,
        problem: String,
    },
    #[error(transparent)]
    Dispatch(#[from] DispatchClientError),
}

/// An announcement whose signatures and authors were verified.
#[derive(Debug, Clone)]
pub struct Opened {
    pub version: Signed<Version>,
    /// Descriptions of anchors and deltas that lead to the weights.
    pub objects: Vec<Signed<Object>>,
    /// Descriptions of the files beside the weights.
    pub files: Vec<Signed<Object>>,
}

impl Opened {
    /// The description of the weights as a whole, if one was announced.
    pub fn anchor(&self) -> Option<&Signed<Object>> {
        let content = Content::Anchor {
            root: self.version.body.root,
        };
        self.objects
            .iter()
            .find(|object| object.body.content == content)
    }

    /// Removes the objects that no peer holds whole. Returns whether the other objects suffice: a route to the weights, and the
    /// files beside them.
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

    /// The objects that lead to this version with the fewest bytes, from nothing or from `held`.
    pub(crate) fn route(&self, held: Option<StateRoot>) -> Option<Vec<&Signed<Object>>> {
        let objects: Vec<&Object> = self.objects.iter().map(|object| &object.body).collect();
        let route = cheapest(&objects, held, self.version.body.root)?;
        let signed = |object: &Object| {
            let mut objects = self.objects.iter();
            objects.find(|signed| std::ptr::eq(&raw const signed.body, object))
        };
        route.into_iter().map(signed).collect()
    }

    /// Adds deltas that members described, since they may shorten the route. Ignores deltas of members that `source` distrusts, and
    /// deltas larger than the weights.
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

    /// Removes an object; if its description is false, removes all objects of its author.
    fn leave_out(
        &mut self,
        source: &dyn ObjectSource,
        culprit: &Signed<Object>,
        failure: &RouteFailure,
    ) {
        let author = culprit.author;
        let is_liar = failure.is_false && author != self.version.author;
        if is_liar {
            source.distrust(author, &culprit.body, &failure.error.to_string());
        }
        self.objects
            .retain(|object| object.body != culprit.body && !(is_liar && object.author == author));
    }
}

/// Opens an announcement. Only the learner of `client`'s run may sign the version. Any member may describe objects: their bytes are
/// verified against the learner's root.
///
/// # Errors
/// When the learner did not sign it, or its objects do not lead from nothing to the version.
pub fn open_announcement(
    client: &DispatchClient,
    announcement: &Announcement,
) -> Result<Opened, FollowError> {
    let version = open::<Version>(announcement.version.clone().into(), client.run())?;
    let number = version.body.version;
    if version.author != client.learner() {
        return Err(FollowError::NotTheLearner(number));
    }
    // Any member may describe objects. An object larger than the weights and a header is never useful.
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
                warn!(author = %object.author, bytes = object.body.bytes, "ignored an object larger than the weights");
            }
        }
    }
    if opened.route(None).is_none() {
        return Err(FollowError::NoRoute(number));
    }
    Ok(opened)
}

/// Fetches a version by the objects with the fewest bytes, from nothing or from the weights of `parent`, and verifies it. If an
/// object cannot be fetched, or does not lead where its description says, the next best route without it is taken; a member whose
/// description was false is distrusted.
///
/// # Errors
/// When no route is left, or the bytes are not what the learner signed.
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
        let failure = match follow_route(source, &opened.version, &route, held.as_ref()).await {
            Ok(image) => {
                let is_whole = matches!(&route[..], [only] if only.body.delta().is_none());
                if let Some(anchor) = anchor.as_ref().filter(|_| !is_whole) {
                    offer_anchor(source, &anchor.body, &image).await;
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
            Err(failure) => failure,
        };
        // The parent has the version's root already: its empty route has no object to leave out.
        let Some(culprit) = route.get(failure.at) else {
            return Err(failure.error);
        };
        opened.leave_out(source, culprit, &failure);
        if opened.route(root).is_none() {
            return Err(failure.error);
        }
        warn!(version = %number, error = %failure.error, "an object did not lead to the weights; continuing without it");
    }
}

/// The object of a route that failed.
struct RouteFailure {
    /// Index in the route.
    at: usize,
    /// Whether the object was fetched whole, so that its description is false.
    is_false: bool,
    error: FollowError,
}

/// Fetches and applies the objects of a route, and verifies the result.
async fn follow_route(
    source: &dyn ObjectSource,
    version: &Signed<Version>,
    route: &[Signed<Object>],
    held: Option<&(StateRoot, Bytes)>,
) -> Result<Bytes, RouteFailure> {
    let number = version.body.version;
    let adoptions = source.adoptions();
    let mut image = held.map(|(_, image)| image.clone()).unwrap_or_default();
    let mut problem_at = None;
    for (at, object) in route.iter().enumerate() {
        let bytes = fetch_object(source, object, version.author).await;
        let bytes = bytes.map_err(|error| RouteFailure {
            at,
            is_false: false,
            error,
        })?;
        match apply_object(&adoptions, image.clone(), bytes, &object.body).await {
            Ok(next) => image = next,
            Err(problem) => {
                problem_at = Some((at, problem));
                break;
            }
        }
    }
    let (at, problem) = match problem_at {
        Some(problem_at) => problem_at,
        None => match verify_result(&adoptions, &image, version, route).await {
            Ok(()) => return Ok(image),
            Err(problem) => (route.len().saturating_sub(1), problem),
        },
    };
    // An earlier object may have caused a failure that shows only now.
    let earlier = match at {
        0 => None,
        at => first_untrue(source, &route[..at], held).await,
    };
    let error = FollowError::Bytes {
        version: number,
        problem,
    };
    Err(RouteFailure {
        at: earlier.unwrap_or(at),
        is_false: true,
        error,
    })
}

/// Fetches an object. Waits for the learner's objects; gives a member's object up if no reachable peer holds it.
async fn fetch_object(
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

/// Applies an object to `image`. The error is a sentence.
async fn apply_object(
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

/// Checks that `image`, the result of `route`, is what the learner signed.
async fn verify_result(
    adoptions: &Adoptions,
    image: &Bytes,
    version: &Signed<Version>,
    route: &[Signed<Object>],
) -> Result<(), String> {
    // An anchor's shard hashes tell where the file is wrong. The result of a delta has only a root.
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

/// Applies a route again, and compares the root after every object: finds the first false description.
async fn first_untrue(
    source: &dyn ObjectSource,
    route: &[Signed<Object>],
    held: Option<&(StateRoot, Bytes)>,
) -> Option<usize> {
    let adoptions = source.adoptions();
    let mut image = held.map(|(_, image)| image.clone()).unwrap_or_default();
    for (at, object) in route.iter().enumerate() {
        let bytes = source.fetch(&object.body).await.ok()?;
        image = match apply_object(&adoptions, image, bytes, &object.body).await {
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
    let threads = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    threads.min(APPLY_THREADS_MAX)
}

/// Offers the weights that deltas led to as the announced anchor.
async fn offer_anchor(source: &dyn ObjectSource, anchor: &Object, image: &Bytes) {
    if let Err(error) = source.offer(anchor, image.clone()).await {
        debug!(%error, "could not offer the weights as a whole");
    }
}

/// Fetches one of the files that a version names.
///
/// # Errors
/// When the version has no such file, or it cannot be fetched.
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
        let problem = format!("{name} has another hash than the signed one");
        return Err(FollowError::Bytes { version, problem });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests;
