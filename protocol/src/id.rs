//! Ids. Each is a type of its own, so that a version is never passed where a ticket is meant.
//!
//! `Display` writes an id in full: a number, or all hexadecimal digits. Logs write [`short`](GroupHash::short) forms, the same in
//! every process; [`crate::span`] names the fields that carry them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Why a text is not the id that it was read as.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    #[error("run name `{0}` is not 1 to 32 characters of a-z, 0-9 and `-`: choose such a name")]
    Run(String),
    #[error("`{text}` is not {digits} hexadecimal digits")]
    Hex { text: String, digits: usize },
}

/// The name of a run: a slug that is safe as a subject token, a file name and a stream name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RunId(String);

impl RunId {
    /// Longest name, so that subjects and stream names stay short.
    pub const CHARS_MAX: usize = 32;

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for RunId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if text.is_empty() || text.len() > Self::CHARS_MAX || !text.chars().all(legal) {
            return Err(IdError::Run(text.chars().take(64).collect()));
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for RunId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for RunId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number! {
    /// A ticket, numbered from 1 in the order of issue: its sequence number in the ticket queue.
    TicketId
}
number! {
    /// Steps taken by the policy. The run starts from version 0.
    PolicyVersion
}
number! {
    /// A fencing token: the number of a process's newest start in the control log.
    Generation
}
number! {
    /// Milliseconds since the Unix epoch.
    UnixMillis
}

impl PolicyVersion {
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }

    /// Steps from `older` to `self`, 0 if `older` is newer.
    pub fn steps_since(self, older: Self) -> u64 {
        self.0.saturating_sub(older.0)
    }
}

impl UnixMillis {
    pub fn plus(self, millis: u64) -> Self {
        Self(self.0.saturating_add(millis))
    }
}

macro_rules! bytes_id {
    ($(#[$doc:meta])* $name:ident, $len:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub [u8; $len]);

        impl $name {
            /// The first eight hexadecimal digits, as logs show them: enough to tell two apart.
            pub fn short(&self) -> String {
                hex::encode(&self.0[..4])
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.short())
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                let mut bytes = [0u8; $len];
                hex::decode_to_slice(text, &mut bytes).map_err(|_| IdError::Hex {
                    text: text.chars().take(80).collect(),
                    digits: 2 * $len,
                })?;
                Ok(Self(bytes))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                if serializer.is_human_readable() {
                    serializer.serialize_str(&self.to_string())
                } else {
                    self.0.serialize(serializer)
                }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if deserializer.is_human_readable() {
                    let text = String::deserialize(deserializer)?;
                    text.parse().map_err(de::Error::custom)
                } else {
                    <[u8; $len]>::deserialize(deserializer).map(Self)
                }
            }
        }
    };
}

bytes_id! {
    /// The author of a statement: an ed25519 public key.
    PeerId, 32
}
bytes_id! {
    /// A lease; also the key under which its submission is idempotent.
    LeaseId, 16
}
bytes_id! {
    /// A group: BLAKE3 of its signed envelope as received.
    GroupHash, 32
}
bytes_id! {
    /// The weights of a version: the root over its parts.
    StateRoot, 32
}
bytes_id! {
    /// A run's signed descriptor: BLAKE3 of its canonical bytes.
    DescriptorHash, 32
}
bytes_id! {
    /// A transferable object (anchor, delta, file): BLAKE3 over its size, codec and shard hashes.
    ObjectId, 32
}
bytes_id! {
    /// BLAKE3 of a byte range or of a small file.
    ContentHash, 32
}

impl ContentHash {
    /// The hash of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
}

impl GroupHash {
    /// The hash of a group's signed envelope as received.
    pub fn of(envelope: &[u8]) -> Self {
        Self(*blake3::hash(envelope).as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_name_is_a_safe_subject_token() {
        for bad in ["", "a.b", "A", "a b", "*", ">", &"x".repeat(33)] {
            assert!(bad.parse::<RunId>().is_err(), "{bad}");
        }
        assert_eq!("run-7".parse::<RunId>().unwrap().as_str(), "run-7");
    }

    #[test]
    fn an_id_is_hex_in_json_and_raw_bytes_on_the_wire() {
        let id = LeaseId([7; 16]);
        let json = serde_json::to_string(&id).unwrap();
        assert_eq!(json, format!("\"{}\"", "07".repeat(16)));
        assert_eq!(serde_json::from_str::<LeaseId>(&json).unwrap(), id);
        let wire = postcard::to_stdvec(&id).unwrap();
        assert_eq!(wire, [7; 16]);
        assert_eq!(postcard::from_bytes::<LeaseId>(&wire).unwrap(), id);
    }
}
