//! The objects that this peer holds, shard by shard, for many threads to read and serve.
//!
//! Objects lie in memory. With a directory they lie on disk too, one file per shard (`<object>/<shard>`, beside the description
//! in `<object>/object.json`), so that a restart continues with them. A shard read from disk is verified by its hash; a torn
//! file is removed, and the shard fetched again. The store keeps the newest versions and pinned objects, and drops others to
//! make room. Invariants: shards are verified before use; declared sizes never exceed the bound. Methods that write may block.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use dashmap::DashMap;
use muster_protocol::envelope::{Invalid, Statement};
use muster_protocol::id::{ObjectId, PolicyVersion};
use muster_protocol::message::version::{Content, Object};

use self::bitmap::Bitmap;
use self::disk::{DiskError, Durability};
use self::object::{ObjectError, assemble, shard_count, shard_range, verify_object, verify_shard};

pub mod bitmap;
pub mod disk;
pub mod object;

/// Most objects held: a few versions, each of at most sixteen objects.
const OBJECTS_MAX: usize = 1_024;
/// Most folders read when a directory is opened.
const FOLDERS_MAX: usize = 4 * OBJECTS_MAX;
/// The file that describes an object, in JSON so that people can read it.
const DESCRIPTION: &str = "object.json";
/// Largest description read: 65,536 shards of 67 characters each, and other fields.
const DESCRIPTION_BYTES_MAX: u64 = 8 << 20;

/// Why the store does not take or hold an object.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("object description is not valid: {0}")]
    Description(#[from] Invalid),
    #[error("{0}")]
    Content(#[from] ObjectError),
    /// The store has not admitted the object.
    #[error("object {} is not held here: fetch or offer it first", object.short())]
    Unknown { object: ObjectId },
    /// There is no room, and no object may be dropped.
    #[error(
        "object of {needed} bytes does not fit: {pinned} of {bytes_max} bytes are in use and must stay; raise store.bytes_max"
    )]
    NoRoom {
        needed: u64,
        /// Bytes that must stay.
        pinned: u64,
        bytes_max: u64,
    },
    #[error("{0}")]
    Disk(#[from] DiskError),
}

/// `[store]`: how much a peer holds, and where.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StoreConfig {
    /// Directory in which shards outlive the process. None by default: a worker fetches the newest version anyway.
    pub directory: Option<PathBuf>,
    /// Most bytes of objects held at once. 8 GiB: an anchor of 1.5 billion bf16 parameters, its predecessor and a delta.
    pub bytes_max: u64,
    /// How many of the newest versions are kept. 4: the newest, its predecessor that other peers still fetch, and two on which
    /// rollouts in flight depend.
    pub versions_kept: usize,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            directory: None,
            bytes_max: 8 << 30,
            versions_kept: 4,
        }
    }
}

/// Whether an inserted shard was new.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inserted {
    New,
    Duplicate,
}

#[derive(Debug)]
struct Entry {
    object: Arc<Object>,
    /// The newest version that needs the object: equal bytes of two versions are one object.
    version: PolicyVersion,
    held: Bitmap,
    shards: Vec<Bytes>,
    whole: Option<Bytes>,
    /// How many fetches need the object to stay.
    pins: usize,
}

impl Entry {
    fn new(object: Arc<Object>) -> Self {
        let shards = shard_count(&object);
        Self {
            version: object.version,
            held: Bitmap::empty(shards),
            shards: vec![Bytes::new(); shards as usize],
            whole: None,
            pins: 0,
            object,
        }
    }

    fn put(&mut self, shard: u32, bytes: Bytes) -> Inserted {
        if !self.held.insert(shard) {
            return Inserted::Duplicate;
        }
        debug_assert!(
            verify_shard(&self.object, shard, &bytes).is_ok(),
            "shards verified before use"
        );
        self.shards[shard as usize] = bytes;
        Inserted::New
    }

    /// Shards become slices of the whole, so that the object is not held twice.
    fn put_whole(&mut self, whole: Bytes) {
        debug_assert!(
            verify_object(&self.object, &whole).is_ok(),
            "shards verified before use"
        );
        for shard in 0..shard_count(&self.object) {
            if let Ok(range) = shard_range(&self.object, shard) {
                self.shards[shard as usize] = whole.slice(range.start as usize..range.end as usize);
                self.held.insert(shard);
            }
        }
        self.whole = Some(whole);
    }
}

/// The objects held.
#[derive(Debug)]
pub struct Store {
    config: StoreConfig,
    entries: DashMap<ObjectId, Entry>,
    /// Serialises admissions and removals, so that the size bound holds. Reads do not take it.
    admission: Mutex<()>,
}

impl Store {
    /// Opens a store with the objects of its directory, if it has one.
    ///
    /// # Errors
    /// When the directory cannot be created or read. A damaged object is no error; it is removed.
    pub fn open(config: StoreConfig) -> Result<Self, StoreError> {
        let store = Self {
            config,
            entries: DashMap::new(),
            admission: Mutex::new(()),
        };
        if let Some(directory) = &store.config.directory {
            disk::create_directory(directory)?;
            for folder in disk::list_folder(directory, FOLDERS_MAX)? {
                store.load(&folder.name)?;
            }
        }
        Ok(store)
    }

    /// Makes room for an object and adds it, without shards. The caller has checked that the learner signed its version: newer
    /// versions push out older ones.
    ///
    /// # Errors
    /// When its description is not valid, or there is no room.
    pub fn admit(&self, object: &Object) -> Result<ObjectId, StoreError> {
        self.admit_with(object, 0)
    }

    /// [`Self::admit`], and pins the object before another admission can push it out.
    ///
    /// # Errors
    /// As [`Self::admit`].
    pub(crate) fn admit_pinned(&self, object: &Object) -> Result<ObjectId, StoreError> {
        self.admit_with(object, 1)
    }

    fn admit_with(&self, object: &Object, pins: usize) -> Result<ObjectId, StoreError> {
        object.validate()?;
        let id = object.id();
        let _one_at_a_time = self
            .admission
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(mut entry) = self.entries.get_mut(&id) {
            entry.version = entry.version.max(object.version);
            entry.pins += pins;
            return Ok(id);
        }
        self.make_room(object)?;
        if let Some(folder) = self.folder(&id) {
            disk::create_directory(&folder)?;
            let description = serde_json::to_vec(object)
                .map_err(|error| Invalid::new("object", error.to_string()))?;
            disk::write_file(&folder.join(DESCRIPTION), &description, Durability::Cache)?;
        }
        self.entries
            .insert(id, Entry::new(Arc::new(object.clone())));
        debug_assert!(
            self.bytes() <= self.config.bytes_max,
            "declared sizes never exceed the bound"
        );
        Ok(id)
    }

    /// Verifies and adds a shard.
    ///
    /// # Errors
    /// When the bytes are not that shard, the object is not admitted, or the disk fails.
    pub fn insert(&self, id: &ObjectId, shard: u32, bytes: Bytes) -> Result<Inserted, StoreError> {
        let (object, held) = self
            .entries
            .get(id)
            .map(|entry| (Arc::clone(&entry.object), entry.held.contains(shard)))
            .ok_or(StoreError::Unknown { object: *id })?;
        if held {
            return Ok(Inserted::Duplicate);
        }
        verify_shard(&object, shard, &bytes)?;
        if let Some(folder) = self.folder(id) {
            disk::write_file(&folder.join(shard.to_string()), &bytes, Durability::Cache)?;
        }
        let mut entry = self
            .entries
            .get_mut(id)
            .ok_or(StoreError::Unknown { object: *id })?;
        Ok(entry.put(shard, bytes))
    }

    /// Verifies and adds a whole object, without a copy.
    ///
    /// # Errors
    /// When the bytes are not the object, there is no room, or the disk fails.
    pub fn offer(&self, object: &Object, bytes: Bytes) -> Result<ObjectId, StoreError> {
        object.validate()?;
        verify_object(object, &bytes)?;
        let id = self.admit(object)?;
        if let Some(folder) = self.folder(&id) {
            for (shard, chunk) in bytes.chunks(object.shard_bytes as usize).enumerate() {
                disk::write_file(&folder.join(shard.to_string()), chunk, Durability::Cache)?;
            }
        }
        let mut entry = self
            .entries
            .get_mut(&id)
            .ok_or(StoreError::Unknown { object: id })?;
        entry.put_whole(bytes);
        Ok(id)
    }

    /// The description of an object that is held, at least in part.
    pub fn object(&self, id: &ObjectId) -> Option<Arc<Object>> {
        self.entries.get(id).map(|entry| Arc::clone(&entry.object))
    }

    /// The set of an object's shards that are held.
    pub fn held(&self, id: &ObjectId) -> Option<Bitmap> {
        self.entries.get(id).map(|entry| entry.held.clone())
    }

    /// One shard, if it is held.
    pub fn shard(&self, id: &ObjectId, shard: u32) -> Option<Bytes> {
        let entry = self.entries.get(id)?;
        entry
            .held
            .contains(shard)
            .then(|| entry.shards[shard as usize].clone())
    }

    /// The whole object, if every shard is held. The first call concatenates the shards.
    pub fn whole(&self, id: &ObjectId) -> Option<Bytes> {
        let shards = {
            let entry = self.entries.get(id)?;
            match &entry.whole {
                Some(whole) => return Some(whole.clone()),
                None if entry.held.is_full() => entry.shards.clone(),
                None => return None,
            }
        };
        // Outside the lock: copying a large object takes long.
        let whole = assemble(&shards);
        if let Some(mut entry) = self.entries.get_mut(id) {
            entry.put_whole(whole.clone());
        }
        Some(whole)
    }

    /// Keeps an object as long as `version` is kept. False if the object is not held.
    pub fn keep_for(&self, id: &ObjectId, version: PolicyVersion) -> bool {
        self.entries.get_mut(id).is_some_and(|mut entry| {
            entry.version = entry.version.max(version);
            true
        })
    }

    /// Keeps an object until it is unpinned as often. False if the object is not held.
    pub fn pin(&self, id: &ObjectId) -> bool {
        self.entries.get_mut(id).is_some_and(|mut entry| {
            entry.pins += 1;
            true
        })
    }

    /// Removes one pin.
    pub(crate) fn unpin(&self, id: &ObjectId) {
        if let Some(mut entry) = self.entries.get_mut(id) {
            entry.pins = entry.pins.saturating_sub(1);
        }
    }

    /// Whether shards are written to a disk.
    pub(crate) fn is_persistent(&self) -> bool {
        self.config.directory.is_some()
    }

    /// Whether an object is held, at least in part.
    pub fn contains(&self, id: &ObjectId) -> bool {
        self.entries.contains_key(id)
    }

    /// The sum of the declared sizes of the objects held.
    pub fn bytes(&self) -> u64 {
        self.entries.iter().map(|entry| entry.object.bytes).sum()
    }

    /// The ids of the objects held, sorted.
    pub fn objects(&self) -> Vec<ObjectId> {
        let mut ids: Vec<ObjectId> = self.entries.iter().map(|entry| *entry.key()).collect();
        ids.sort();
        ids
    }

    fn folder(&self, id: &ObjectId) -> Option<PathBuf> {
        self.config
            .directory
            .as_ref()
            .map(|directory| directory.join(id.to_string()))
    }

    /// Drops objects of versions that are not kept, then the oldest objects until the newcomer fits.
    fn make_room(&self, newcomer: &Object) -> Result<(), StoreError> {
        let rows = self.entries.iter().map(|entry| Retention {
            id: *entry.key(),
            version: entry.version,
            bytes: entry.object.bytes,
            is_file: matches!(entry.object.content, Content::File { .. }),
            is_pinned: entry.pins > 0,
        });
        let rows: Vec<Retention> = rows.collect();
        for id in to_drop(rows, newcomer, &self.config)? {
            self.entries.remove(&id);
            tracing::debug!(object = %id.short(), "object dropped");
            if let Some(folder) = self.folder(&id) {
                disk::remove(&folder)?;
            }
        }
        Ok(())
    }

    /// Loads an object from its folder, and removes damaged shards.
    fn load(&self, name: &str) -> Result<(), StoreError> {
        let Some(directory) = &self.config.directory else {
            return Ok(());
        };
        let folder = directory.join(name);
        let Some(object) = described(&folder, name) else {
            tracing::warn!(folder = %folder.display(), "not an object: removed");
            return Ok(disk::remove(&folder)?);
        };
        match self.admit(&object) {
            Err(StoreError::NoRoom { .. }) => return Ok(disk::remove(&folder)?),
            admitted => admitted?,
        };
        let id = object.id();
        for shard in 0..shard_count(&object) {
            let path = folder.join(shard.to_string());
            let Some(bytes) = disk::read_file(&path, u64::from(object.shard_bytes))? else {
                continue;
            };
            if let Err(error) = verify_shard(&object, shard, &bytes) {
                tracing::warn!(%error, path = %path.display(), "damaged shard removed");
                disk::remove(&path)?;
            } else if let Some(mut entry) = self.entries.get_mut(&id) {
                entry.put(shard, bytes.into());
            }
        }
        Ok(())
    }
}

/// The description in a folder, if it is valid and the folder is named after it.
fn described(folder: &std::path::Path, name: &str) -> Option<Object> {
    let bytes = disk::read_file(&folder.join(DESCRIPTION), DESCRIPTION_BYTES_MAX).ok()??;
    let object: Object = serde_json::from_slice(&bytes).ok()?;
    object.validate().ok()?;
    (object.id().to_string() == name).then_some(object)
}

/// The facts about a held object that decide whether it is dropped.
#[derive(Debug, Clone)]
struct Retention {
    id: ObjectId,
    version: PolicyVersion,
    bytes: u64,
    is_file: bool,
    is_pinned: bool,
}

/// Chooses the objects to drop so that `newcomer` fits: first those of versions that are not kept, then the oldest. Files beside
/// the weights are dropped last, whatever their version: a tokenizer of version 0 serves all versions.
fn to_drop(
    mut rows: Vec<Retention>,
    newcomer: &Object,
    config: &StoreConfig,
) -> Result<Vec<ObjectId>, StoreError> {
    let mut versions: BTreeSet<PolicyVersion> = rows
        .iter()
        .filter(|row| !row.is_file)
        .map(|row| row.version)
        .collect();
    if !matches!(newcomer.content, Content::File { .. }) {
        versions.insert(newcomer.version);
    }
    let oldest_kept = versions
        .iter()
        .rev()
        .take(config.versions_kept.max(1))
        .next_back()
        .copied();
    let outlived = |row: &Retention| !row.is_file && Some(row.version) < oldest_kept;
    rows.sort_by_key(|row| (!outlived(row), row.is_file, row.version, row.id));
    let mut bytes: u64 = rows.iter().map(|row| row.bytes).sum();
    let mut count = rows.len();
    let mut dropped = Vec::new();
    for row in &rows {
        let fits = bytes.saturating_add(newcomer.bytes) <= config.bytes_max && count < OBJECTS_MAX;
        if row.is_pinned || (fits && !outlived(row)) {
            continue;
        }
        bytes -= row.bytes;
        count -= 1;
        dropped.push(row.id);
    }
    if bytes.saturating_add(newcomer.bytes) > config.bytes_max || count >= OBJECTS_MAX {
        let (needed, bytes_max) = (newcomer.bytes, config.bytes_max);
        return Err(StoreError::NoRoom {
            needed,
            pinned: bytes,
            bytes_max,
        });
    }
    Ok(dropped)
}

#[cfg(test)]
mod tests;
