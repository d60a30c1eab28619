//! Making a version known: describe its weights, sign, append to the versions log, tell everybody. The bytes themselves
//! travel from peer to peer; NATS carries only what is signed here.

use async_trait::async_trait;
use bytes::Bytes;
use serde_bytes::ByteBuf;

use muster_broadcaster::follower::off_loop_if_large;
use muster_broadcaster::object::describe_object;
use muster_broadcaster::state::describe_state;
use muster_broadcaster::swarm::Swarm;
use muster_protocol::desk::Desk;
use muster_protocol::envelope::Signed;
use muster_protocol::id::{ContentHash, DescriptorHash, Generation, PolicyVersion, StateRoot};
use muster_protocol::message::version::{
    Announcement, Content, FileEntry, Object, Version, state_root,
};
use muster_protocol::subject::Log;

use super::TrainerError;

/// Where a version's bytes are handed to the swarm.
#[async_trait]
pub trait Outlet: Send + Sync {
    /// Offers an object to the peers.
    ///
    /// # Errors
    /// When it cannot be held.
    async fn offer(&self, object: &Object, bytes: Bytes) -> Result<(), String>;

    /// Bytes uploaded to peers so far.
    fn uploaded(&self) -> u64;
}

#[async_trait]
impl Outlet for Swarm {
    async fn offer(&self, object: &Object, bytes: Bytes) -> Result<(), String> {
        Swarm::offer(self, object, bytes)
            .await
            .map(drop)
            .map_err(|error| error.to_string())
    }

    fn uploaded(&self) -> u64 {
        self.stats().total.bytes_up
    }
}

/// A file that travels with every version.
#[derive(Debug, Clone)]
pub struct RunFile {
    /// Its name in the folder.
    pub name: String,
    /// Its content.
    pub bytes: Bytes,
}

/// A version made known.
#[derive(Debug, Clone)]
pub struct Announced {
    /// The signed version.
    pub version: Signed<Version>,
    /// The signed description of its anchor.
    pub anchor: Signed<Object>,
}

/// Makes versions known.
pub struct Announcer {
    desk: Desk,
    outlet: std::sync::Arc<dyn Outlet>,
    descriptor: DescriptorHash,
    generation: Generation,
    files: Vec<FileEntry>,
    file_objects: Vec<Signed<Object>>,
    parent: Option<StateRoot>,
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
        desk: Desk,
        outlet: std::sync::Arc<dyn Outlet>,
        descriptor: DescriptorHash,
        generation: Generation,
        files: &[RunFile],
    ) -> Result<Self, TrainerError> {
        let mut entries = Vec::new();
        let mut file_objects = Vec::new();
        for file in files {
            let hash = ContentHash::of(&file.bytes);
            let object = describe_object(Content::File { hash }, PolicyVersion(0), &file.bytes);
            let object = desk.sign(object.map_err(failed)?)?;
            outlet
                .offer(&object.body, file.bytes.clone())
                .await
                .map_err(failed)?;
            file_objects.push(object);
            let (name, bytes) = (file.name.clone(), file.bytes.len() as u64);
            entries.push(FileEntry { name, bytes, hash });
        }
        Ok(Self {
            desk,
            outlet,
            descriptor,
            generation,
            files: entries,
            file_objects,
            parent: None,
        })
    }

    /// The root of the newest version that was described.
    pub fn parent(&self) -> Option<StateRoot> {
        self.parent
    }

    /// Describes and offers a version's weights, without telling anybody. Hashes on a thread that may block.
    ///
    /// # Errors
    /// When the image cannot be described or held.
    pub async fn describe(
        &mut self,
        version: PolicyVersion,
        image: Bytes,
    ) -> Result<Announced, TrainerError> {
        let hashed = image.clone();
        let (state, object) = off_loop_if_large(image.len(), move || {
            let (parameters, part) = describe_state(&hashed).map_err(failed)?;
            let root = state_root(&[part]);
            let object =
                describe_object(Content::Anchor { root }, version, &hashed).map_err(failed)?;
            Ok::<_, TrainerError>(((parameters, part, root), object))
        })
        .await
        .map_err(failed)??;
        let (parameters, part, root) = state;
        self.outlet.offer(&object, image).await.map_err(failed)?;
        let body = Version {
            descriptor: self.descriptor,
            generation: self.generation,
            version,
            parent: self.parent,
            parameters,
            parts: vec![part],
            root,
            files: self.files.clone(),
        };
        self.parent = Some(root);
        Ok(Announced {
            version: self.desk.sign(body)?,
            anchor: self.desk.sign(object)?,
        })
    }

    /// Appends a version to the log and tells everybody.
    ///
    /// # Errors
    /// When the bus refuses.
    pub async fn announce(&self, announced: &Announced) -> Result<(), TrainerError> {
        let objects = std::iter::once(&announced.anchor).chain(&self.file_objects);
        let announcement = Announcement {
            version: announced.version.bytes.to_vec(),
            objects: objects
                .map(|object| ByteBuf::from(object.bytes.to_vec()))
                .collect(),
        };
        let record = Bytes::from(announcement.encode().map_err(failed)?);
        let number = announced.version.body.version;
        let key = format!("v-{}-{number}", self.generation);
        self.desk
            .bus()
            .append(Log::Versions, &key, None, record.clone())
            .await?;
        self.desk
            .bus()
            .publish(&self.desk.subjects().news(Log::Versions), record)
            .await?;
        Ok(())
    }
}
