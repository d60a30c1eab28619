//! A version of the policy, signed by the learner, and the objects in which its bytes travel. The peer that made an object
//! signs its description. A peer checks the resulting weights against the version's signed root, so any seeder may make deltas.

use serde::{Deserialize, Serialize};

use super::{at_most, some_of};
use crate::envelope::{Invalid, Kind, Statement};
use crate::id::{ContentHash, DescriptorHash, Generation, ObjectId, PolicyVersion, StateRoot};
use crate::limits::VERSION_BYTES_MAX;

/// Most tensors of a version.
pub const TENSORS_MAX: usize = 16_384;
/// Most shards of an object: 1 TiB in shards of 16 MiB.
pub const SHARDS_MAX: usize = 65_536;
/// Smallest shard, except the last: the cost per frame shows below it.
pub const SHARD_BYTES_MIN: u32 = 4 << 10;
/// Largest shard: a peer holds one in memory for a partner that it does not trust yet.
pub const SHARD_BYTES_MAX: u32 = 16 << 20;
/// Most small files that travel with a version (tokenizer, configuration).
pub const FILES_MAX: usize = 32;
/// Most parts of a state: the base and adapters.
pub const PARTS_MAX: usize = 64;
/// Most objects announced with a version.
pub const OBJECTS_MAX: usize = 16;

/// Numbers of versions that a squashed delta leads over. The delta ends at a version divisible by its stride and starts one
/// stride before. Each stride is four of the next smaller, so the number of objects on a path grows with the logarithm of its
/// length.
pub const SQUASH_STRIDES: [u64; 2] = [4, 16];

/// The strides of the squashed deltas that lead to `version`.
pub fn squash_strides(version: PolicyVersion) -> impl Iterator<Item = u64> {
    let ends_here = move |stride: &u64| version.0 > 0 && version.0.is_multiple_of(*stride);
    SQUASH_STRIDES.into_iter().filter(ends_here)
}

/// How a parameter is stored on the wire and on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    Bf16,
    F32,
    F16,
}

impl Dtype {
    /// Bytes of one element.
    pub fn bytes(self) -> u64 {
        match self {
            Dtype::Bf16 | Dtype::F16 => 2,
            Dtype::F32 => 4,
        }
    }
}

/// A row of the canonical parameter table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parameter {
    /// Hugging Face tensor name.
    pub name: String,
    pub shape: Vec<u64>,
    pub dtype: Dtype,
    /// The part of a model split over machines that holds it. 0: the model is not split.
    pub stage: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PartKind {
    Base,
    Adapter,
}

/// One part of the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    pub kind: PartKind,
    /// Merkle root over its tensors, in the parameter table's order.
    pub root: ContentHash,
}

/// A small file of the checkpoint folder beside the weights, such as `config.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// File name without any directory.
    pub name: String,
    pub bytes: u64,
    /// BLAKE3 of its content.
    pub hash: ContentHash,
}

/// A version of the policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    pub descriptor: DescriptorHash,
    /// The learner's fencing token.
    pub generation: Generation,
    /// Number of training steps that led to it.
    pub version: PolicyVersion,
    /// The weights that the step started from. `None` for version 0.
    pub parent: Option<StateRoot>,
    /// The canonical parameter table.
    pub parameters: Vec<Parameter>,
    pub parts: Vec<Part>,
    /// Root over the parts.
    pub root: StateRoot,
    pub files: Vec<FileEntry>,
}

/// A version by its number and its weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct VersionRef {
    /// Number of training steps that led to it.
    pub version: PolicyVersion,
    pub root: StateRoot,
}

impl Version {
    /// Size of all parameters in their storage types.
    pub fn parameter_bytes(&self) -> u64 {
        let bytes = |parameter: &Parameter| {
            let elements = parameter
                .shape
                .iter()
                .fold(1, |n: u64, d| n.saturating_mul(*d));
            elements.saturating_mul(parameter.dtype.bytes())
        };
        self.parameters.iter().fold(0, |sum: u64, parameter| {
            sum.saturating_add(bytes(parameter))
        })
    }

    pub fn reference(&self) -> VersionRef {
        VersionRef {
            version: self.version,
            root: self.root,
        }
    }
}

/// Root over parts: BLAKE3("muster-state-v1\0" ‖ per part: kind ‖ root).
pub fn state_root(parts: &[Part]) -> StateRoot {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"muster-state-v1\0");
    for part in parts {
        hasher.update(&[match part.kind {
            PartKind::Base => 0,
            PartKind::Adapter => 1,
        }]);
        hasher.update(&part.root.0);
    }
    StateRoot(*hasher.finalize().as_bytes())
}

impl Statement for Version {
    const KIND: Kind = Kind::Version;
    const BYTES_MAX: usize = VERSION_BYTES_MAX;

    fn validate(&self) -> Result<(), Invalid> {
        some_of("parameters", self.parameters.len(), TENSORS_MAX)?;
        some_of("parts", self.parts.len(), PARTS_MAX)?;
        at_most("files", self.files.len(), FILES_MAX)?;
        for parameter in &self.parameters {
            check_parameter(parameter)?;
        }
        for file in &self.files {
            check_file_name(&file.name)?;
        }
        if state_root(&self.parts) != self.root {
            return Err(Invalid::new("root", "is not the root over the parts"));
        }
        Ok(())
    }
}

fn check_parameter(parameter: &Parameter) -> Result<(), Invalid> {
    if parameter.name.is_empty() || parameter.name.len() > 256 {
        return Err(Invalid::new(
            "parameters",
            "have a name that is empty or over 256 bytes",
        ));
    }
    let elements = parameter
        .shape
        .iter()
        .try_fold(1u64, |n, d| n.checked_mul(*d));
    if parameter.shape.len() > 8 || elements.is_none_or(|n| n == 0 || n > 1 << 40) {
        let problem = format!(
            "have an impossible shape {:?} for {}",
            parameter.shape, parameter.name
        );
        return Err(Invalid::new("parameters", problem));
    }
    Ok(())
}

/// Checks that a file of this name stays inside the folder that it is written to.
///
/// # Errors
/// When it is empty, over 128 bytes, begins with a dot or holds anything but letters, digits, `.`, `_` and `-`.
pub(crate) fn check_file_name(name: &str) -> Result<(), Invalid> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.len() > 128 || name.starts_with('.') || !name.chars().all(plain) {
        let shown: String = name.chars().take(64).collect();
        return Err(Invalid::new(
            "files",
            format!("have an unsafe name {shown:?}"),
        ));
    }
    Ok(())
}

/// The content of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Content {
    /// The whole state.
    Anchor { root: StateRoot },
    /// Turns one state into another.
    Delta { from: StateRoot, to: StateRoot },
    /// A file beside the weights.
    File { hash: ContentHash },
}

/// How to read an object's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Codec {
    /// The bytes of a file, or of a safetensors file in canonical layout.
    Raw,
    /// Turns one safetensors file into another, slice by slice, each by the method that takes the fewest bytes.
    Delta,
}

/// An object for transfer, described by the peer that made it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Object {
    pub content: Content,
    /// The version that it leads to. Its holders drop it when the version is too old.
    pub version: PolicyVersion,
    pub bytes: u64,
    pub codec: Codec,
    /// Size of every shard except the last.
    pub shard_bytes: u32,
    /// BLAKE3 of each shard, in order.
    pub shards: Vec<ContentHash>,
}

impl Object {
    /// The states that a delta leads from and to; `None` for other objects.
    pub fn delta(&self) -> Option<(StateRoot, StateRoot)> {
        match self.content {
            Content::Delta { from, to } => Some((from, to)),
            Content::Anchor { .. } | Content::File { .. } => None,
        }
    }

    /// The object's name: BLAKE3("muster-object-v1\0" ‖ size ‖ codec ‖ shard size ‖ shard hashes). Two peers
    /// that cut the same bytes in the same way name the same object.
    pub fn id(&self) -> ObjectId {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"muster-object-v1\0");
        hasher.update(&self.bytes.to_le_bytes());
        hasher.update(&[match self.codec {
            Codec::Raw => 0,
            Codec::Delta => 1,
        }]);
        hasher.update(&self.shard_bytes.to_le_bytes());
        for shard in &self.shards {
            hasher.update(&shard.0);
        }
        ObjectId(*hasher.finalize().as_bytes())
    }
}

impl Statement for Object {
    const KIND: Kind = Kind::Object;
    const BYTES_MAX: usize = VERSION_BYTES_MAX;

    fn validate(&self) -> Result<(), Invalid> {
        some_of("shards", self.shards.len(), SHARDS_MAX)?;
        let is_delta = matches!(self.content, Content::Delta { .. });
        if is_delta != (self.codec == Codec::Delta) {
            let problem = format!("is {:?}, which {:?} cannot be in", self.codec, self.content);
            return Err(Invalid::new("codec", problem));
        }
        if !(SHARD_BYTES_MIN..=SHARD_BYTES_MAX).contains(&self.shard_bytes) {
            let problem = format!(
                "is {}, outside {SHARD_BYTES_MIN}..={SHARD_BYTES_MAX}",
                self.shard_bytes
            );
            return Err(Invalid::new("shard_bytes", problem));
        }
        let needed = self.bytes.div_ceil(u64::from(self.shard_bytes));
        if self.bytes == 0 || needed != self.shards.len() as u64 {
            let problem = format!(
                "are {} where {} bytes need {needed}",
                self.shards.len(),
                self.bytes
            );
            return Err(Invalid::new("shards", problem));
        }
        Ok(())
    }
}

/// A signed version with signed descriptions of objects that lead to it. A record of the versions log, and the reply to
/// `latest`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announcement {
    /// The signed [`Version`].
    #[serde(with = "serde_bytes")]
    pub version: Vec<u8>,
    /// Signed [`Object`]s.
    pub objects: Vec<serde_bytes::ByteBuf>,
}

impl Announcement {
    /// Decodes a record of the versions log. The envelopes inside are not opened.
    ///
    /// # Errors
    /// When the bytes are not an announcement or exceed their bound.
    pub fn decode(bytes: &[u8]) -> Result<Self, Invalid> {
        if bytes.len() > VERSION_BYTES_MAX {
            return Err(Invalid::new(
                "announcement",
                format!("has {} bytes", bytes.len()),
            ));
        }
        let announcement: Self = postcard::from_bytes(bytes)
            .map_err(|error| Invalid::new("announcement", format!("cannot be decoded: {error}")))?;
        at_most("objects", announcement.objects.len(), OBJECTS_MAX)?;
        Ok(announcement)
    }

    /// The bytes of a record.
    ///
    /// # Errors
    /// Never for a well-formed announcement; the encoder's own error otherwise.
    pub fn encode(&self) -> Result<Vec<u8>, Invalid> {
        postcard::to_stdvec(self).map_err(|error| Invalid::new("announcement", error.to_string()))
    }
}
