//! Announces versions: describes and signs the weights, appends to the versions log and publishes the record. The weights
//! travel from peer to peer; NATS carries only the signed descriptions.
//!
//! A version is described as a delta from the one before it, as an anchor, or as both ([`super::objects`]). Invariant: the
//! objects announced with a version begin with an anchor and lead to the version, and this process offers all of them.

use bytes::Bytes;
use serde_bytes::ByteBuf;

use muster_broadcaster::ObjectSource;
use muster_broadcaster::blocking::off_loop_if_large;
use muster_broadcaster::store::object::describe_object;
use muster_protocol::dispatch_client::DispatchClient;
use muster_protocol::envelope::Signed;
use muster_protocol::id::{ContentHash, DescriptorHash, Generation, PolicyVersion, StateRoot};
use muster_protocol::message::version::{
    Announcement, Content, FileEntry, Object, Version, state_root,
};
use muster_protocol::subject::Log;

use super::error::TrainerError;
use super::objects::{BroadcastConfig, Described, describe_weights};

/// A file that travels with every version.
#[derive(Debug, Clone)]
pub struct RunFile {
    pub name: String,
    pub bytes: Bytes,
}

/// A version with the descriptions that are announced with it.
#[derive(Debug, Clone)]
pub struct Announced {
    pub version: Signed<Version>,
    pub anchor: Option<Signed<Object>>,
    /// An anchor and the deltas that lead from it to the version.
    pub objects: Vec<Signed<Object>>,
    /// Bytes that a holder of the parent fetches.
    pub bytes: u64,
}

/// Describes, offers and announces versions.
pub struct Announcer {
    client: DispatchClient,
    swarm: std::sync::Arc<dyn ObjectSource>,
    descriptor: DescriptorHash,
    generation: Generation,
    files: Vec<FileEntry>,
    file_objects: Vec<Signed<Object>>,
    config: BroadcastConfig,
    /// Root and weights of the newest described version; the weights are empty if the next one cannot be a delta.
    parent: Option<(StateRoot, Bytes)>,
    /// The last anchor and the deltas since, which lead to the newest version.
    trail: Vec<Signed<Object>>,
}

fn failed(error: impl std::fmt::Display) -> TrainerError {
    TrainerError::Announce(error.to_string())
}

impl Announcer {
    /// An announcer that offers the run's files to the swarm.
    ///
    /// # Errors
    /// When a file cannot be described or held.
    pub async fn new(
        client: DispatchClient,
        swarm: std::sync::Arc<dyn ObjectSource>,
        descriptor: DescriptorHash,
        generation: Generation,
        files: &[RunFile],
        config: BroadcastConfig,
    ) -> Result<Self, TrainerError> {
        let mut entries = Vec::new();
        let mut file_objects = Vec::new();
        for file in files {
            let hash = ContentHash::of(&file.bytes);
            let object = describe_object(Content::File { hash }, PolicyVersion(0), &file.bytes);
            let object = client.sign(object.map_err(failed)?)?;
            swarm
                .offer(&object.body, file.bytes.clone())
                .await
                .map_err(failed)?;
            file_objects.push(object);
            let (name, bytes) = (file.name.clone(), file.bytes.len() as u64);
            entries.push(FileEntry { name, bytes, hash });
        }
        Ok(Self {
            client,
            swarm,
            descriptor,
            generation,
            files: entries,
            file_objects,
            config,
            parent: None,
            trail: Vec::new(),
        })
    }

    /// The root of the newest version that was described.
    pub fn parent(&self) -> Option<StateRoot> {
        self.parent.as_ref().map(|(root, _)| *root)
    }

    /// Whether weights of this size may be announced by deltas. A log record with deltas names objects that only the process
    /// that wrote it offers, so a restarted trainer announces the version again.
    pub fn makes_deltas(&self, image: &Bytes) -> bool {
        image.len() as u64 >= self.config.delta_image_bytes_min
    }

    /// Describes and offers a version's weights without announcing it. Large weights are hashed on a blocking thread.
    ///
    /// # Errors
    /// When the image cannot be described or held.
    pub async fn describe(
        &mut self,
        version: PolicyVersion,
        image: Bytes,
    ) -> Result<Announced, TrainerError> {
        let (weights, config) = (image.clone(), self.config);
        let parent = self.parent.clone();
        let since_anchor = self.trail.len() as u64;
        let described = off_loop_if_large(image.len(), move || {
            describe_weights(version, &weights, parent, since_anchor, config)
        });
        let described = described.await??;
        let Described {
            parameters,
            part,
            anchor,
            delta,
        } = described;
        let root = state_root(&[part]);
        let anchor = self.offer(anchor).await?;
        let delta = self.offer(delta).await?;
        let step = delta.clone().or_else(|| anchor.clone());
        let bytes = step.map_or(image.len() as u64, |object| object.body.bytes);
        if let Some(anchor) = &anchor {
            self.trail = vec![anchor.clone()];
        } else {
            self.trail.extend(delta.clone());
        }
        debug_assert!(
            (self.trail.first()).is_some_and(|o| matches!(o.body.content, Content::Anchor { .. })),
            "the objects announced with a version begin with an anchor"
        );
        for object in &self.trail {
            self.swarm.keep_for(&object.body, version);
        }
        let mut objects = self.trail.clone();
        objects.extend(delta.filter(|_| anchor.is_some()));
        let body = Version {
            descriptor: self.descriptor,
            generation: self.generation,
            version,
            parent: self.parent(),
            parameters,
            parts: vec![part],
            root,
            files: self.files.clone(),
        };
        let kept = if self.makes_deltas(&image) {
            image
        } else {
            Bytes::new()
        };
        self.parent = Some((root, kept));
        Ok(Announced {
            version: self.client.sign(body)?,
            anchor,
            objects,
            bytes,
        })
    }

    /// Describes weights as an anchor for a checkpoint folder. Nothing is offered.
    ///
    /// # Errors
    /// When the image cannot be described.
    pub async fn anchor(
        &self,
        version: PolicyVersion,
        image: &Bytes,
    ) -> Result<Signed<Object>, TrainerError> {
        let root = self
            .parent()
            .ok_or_else(|| failed("no version was described yet"))?;
        let hashed = image.clone();
        let object = off_loop_if_large(image.len(), move || {
            describe_object(Content::Anchor { root }, version, &hashed)
        });
        let object = object.await?.map_err(failed)?;
        Ok(self.client.sign(object)?)
    }

    async fn offer(
        &self,
        made: Option<(Object, Bytes)>,
    ) -> Result<Option<Signed<Object>>, TrainerError> {
        let Some((object, bytes)) = made else {
            return Ok(None);
        };
        self.swarm.offer(&object, bytes).await.map_err(failed)?;
        Ok(Some(self.client.sign(object)?))
    }

    /// Appends a version to the log and publishes it to the members.
    ///
    /// # Errors
    /// When the bus refuses.
    pub async fn announce(&self, announced: &Announced) -> Result<(), TrainerError> {
        let objects = announced.objects.iter().chain(&self.file_objects);
        let announcement = Announcement {
            version: announced.version.bytes.to_vec(),
            objects: objects
                .map(|object| ByteBuf::from(object.bytes.to_vec()))
                .collect(),
        };
        let record = Bytes::from(announcement.encode().map_err(failed)?);
        let number = announced.version.body.version;
        let key = format!("v-{}-{number}", self.generation);
        self.client
            .bus()
            .append(Log::Versions, &key, None, record.clone())
            .await?;
        self.client
            .bus()
            .publish(&self.client.subjects().news(Log::Versions), record)
            .await?;
        Ok(())
    }
}
