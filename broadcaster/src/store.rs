//! What this machine holds of the objects of a run, shard by shard, for many threads to read and serve from.
//!
//! Held in memory; with a directory also on disk, one file per shard (`<object>/<shard>`, beside the description in
//! `<object>/object.json`), so that a restart goes on with what was there: files are named by number but trusted by hash, and a
//! torn one is a shard to fetch again. The last versions are kept, and what is pinned; the rest makes room. Invariants:
//! every shard held is verified; declared sizes never exceed the bound. Methods that write may block.

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
/// Most folders looked at when a directory is opened.
const FOLDERS_MAX: usize = 4 * OBJECTS_MAX;
/// The file that describes an object, in JSON for whoever looks into the directory.
const DESCRIPTION: &str = "object.json";
/// Largest description read: 65,536 shards of 67 characters each, and the rest.
const DESCRIPTION_BYTES_MAX: u64 = 8 << 20;

/// Why the store does not take or keep something.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The description breaks a rule.
    #[error("object description is not valid: {0}")]
    Description(#[from] Invalid),
    /// The bytes are not the object's.
    #[error("{0}")]
    Content(#[from] ObjectError),
    /// The object is not one that the store has admitted.
    #[error("object {} is not held here: fetch or offer it first", object.short())]
    Unknown {
        /// Which.
        object: ObjectId,
    },
    /// No room, and nothing that may go.
    #[error(
        "object of {needed} bytes does not fit: {pinned} of at most {bytes_max} bytes are in use and must stay: raise the store's `bytes_max`"
    )]
    NoRoom {
        /// Size of the object.
        needed: u64,
        /// What must stay.
        pinned: u64,
        /// The bound.
        bytes_max: u64,
    },
    /// The disk failed.
    #[error("{0}")]
    Disk(#[from] DiskError),
}

/// How much is held, and where.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StoreConfig {
    /// Where shards outlive the process; nowhere by default, since a worker fetches the newest version anyway.
    pub directory: Option<PathBuf>,
    /// Most bytes of objects held at once. 8 GiB: an anchor of 1.5 billion bf16 parameters, its predecessor and a delta.
    pub bytes_max: u64,
    /// How many of the newest versions are kept. 4: the newest, the one before that others still fetch, and two on which
    /// rollouts in flight still depend.
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

/// What became of a shard that was handed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inserted {
    /// It is held now.
    New,
    /// It was held already.
    Duplicate,
}

#[derive(Debug)]
struct Entry {
    object: Arc<Object>,
    /// The newest version that needs it: equal bytes of two versions are one object.
    version: PolicyVersion,
    held: Bitmap,
    shards: Vec<Bytes>,
    whole: Option<Bytes>,
    /// How many fetches or users need it to stay.
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
    /// Admissions and removals are one at a time, so that the bound holds; reads never take it.
    admission: Mutex<()>,
}

impl Store {
    /// An empty store, or one with what its directory holds.
    ///
    /// # Errors
    /// When the directory cannot be made or read. What is damaged in it is removed instead.
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

    /// Makes room for an object and begins to hold it, with no shard yet. The caller has checked that its version is one
    /// that the learner signed: newer versions push out older ones.
    ///
    /// # Errors
    /// When its description is not valid, or there is no room.
    pub fn admit(&self, object: &Object) -> Result<ObjectId, StoreError> {
        self.admit_with(object, 0)
    }

    /// [`Self::admit`], and pins it before anything else can push it out.
    ///
    /// # Errors
    /// As [`Self::admit`].
    pub fn admit_pinned(&self, object: &Object) -> Result<ObjectId, StoreError> {
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

    /// Verifies a shard and holds it.
    ///
    /// # Errors
    /// When it is not that shard, the object is not admitted, or the disk fails.
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

    /// Verifies a whole object and holds it, without a copy.
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

    /// What an object's description says, if it is held.
    pub fn object(&self, id: &ObjectId) -> Option<Arc<Object>> {
        self.entries.get(id).map(|entry| Arc::clone(&entry.object))
    }

    /// Which shards of an object are held.
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

    /// The whole object, if every shard is held. The first call puts it together.
    pub fn whole(&self, id: &ObjectId) -> Option<Bytes> {
        let shards = {
            let entry = self.entries.get(id)?;
            match &entry.whole {
                Some(whole) => return Some(whole.clone()),
                None if entry.held.is_full() => entry.shards.clone(),
                None => return None,
            }
        };
        // Put together outside the lock: for a large object this takes as long as copying it does.
        let whole = assemble(&shards);
        if let Some(mut entry) = self.entries.get_mut(id) {
            entry.put_whole(whole.clone());
        }
        Some(whole)
    }

    /// Says that `version` needs an object, which is then kept as long as that version is. False when it is not held.
    pub fn keep_for(&self, id: &ObjectId, version: PolicyVersion) -> bool {
        self.entries.get_mut(id).is_some_and(|mut entry| {
            entry.version = entry.version.max(version);
            true
        })
    }

    /// Keeps an object until it is unpinned as often. False when it is not held.
    pub fn pin(&self, id: &ObjectId) -> bool {
        self.entries.get_mut(id).is_some_and(|mut entry| {
            entry.pins += 1;
            true
        })
    }

    /// Takes one pin away.
    pub fn unpin(&self, id: &ObjectId) {
        if let Some(mut entry) = self.entries.get_mut(id) {
            entry.pins = entry.pins.saturating_sub(1);
        }
    }

    /// Whether shards are written to a disk.
    pub fn is_persistent(&self) -> bool {
        self.config.directory.is_some()
    }

    /// Whether an object is held, if only in part.
    pub fn contains(&self, id: &ObjectId) -> bool {
        self.entries.contains_key(id)
    }

    /// Declared sizes of all that is held.
    pub fn bytes(&self) -> u64 {
        self.entries.iter().map(|entry| entry.object.bytes).sum()
    }

    /// Names of all that is held, in order.
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

    /// Lets go of what retention does not keep, then of the oldest until the newcomer fits.
    fn make_room(&self, newcomer: &Object) -> Result<(), StoreError> {
        let rows = self.entries.iter().map(|entry| Row {
            id: *entry.key(),
            version: entry.version,
            bytes: entry.object.bytes,
            is_file: matches!(entry.object.content, Content::File { .. }),
            is_pinned: entry.pins > 0,
        });
        let rows: Vec<Row> = rows.collect();
        for id in to_drop(rows, newcomer, &self.config)? {
            self.entries.remove(&id);
            tracing::debug!(object = %id.short(), "object dropped");
            if let Some(folder) = self.folder(&id) {
                disk::remove(&folder)?;
            }
        }
        Ok(())
    }

    /// Takes back what a folder holds, and removes what is not whole.
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

/// The description in a folder, when it is one and the folder is named after it.
fn described(folder: &std::path::Path, name: &str) -> Option<Object> {
    let bytes = disk::read_file(&folder.join(DESCRIPTION), DESCRIPTION_BYTES_MAX).ok()??;
    let object: Object = serde_json::from_slice(&bytes).ok()?;
    object.validate().ok()?;
    (object.id().to_string() == name).then_some(object)
}

/// What retention needs to know of an object held.
#[derive(Debug, Clone)]
struct Row {
    id: ObjectId,
    version: PolicyVersion,
    bytes: u64,
    is_file: bool,
    is_pinned: bool,
}

/// Which objects to let go so that `newcomer` fits: first those of versions that are not kept, then the oldest. Small
/// files stay whatever version they came with, since a tokenizer of version 0 serves them all, and go last.
fn to_drop(
    mut rows: Vec<Row>,
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
    let outlived = |row: &Row| !row.is_file && Some(row.version) < oldest_kept;
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
