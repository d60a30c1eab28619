//! The envelope: every statement is signed over the bytes that travel, bounded before it is decoded, and decoded only
//! after its signature holds.
//!
//! On the wire (postcard): protocol version, kind, run, author, sequence, payload, signature. The signature covers a
//! domain label, every header field and BLAKE3 of the payload bytes as received, which are never re-serialised to be
//! verified. The payload is one byte of codec, the raw size (u32 LE), then the raw or zstd bytes of the message.

use std::cell::RefCell;
use std::io;

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use zstd::bulk::{Compressor, Decompressor};

use crate::id::{ContentHash, PeerId, RunId};
use crate::identity::{Identity, is_signed_by};
use crate::limits::{INFLATION_MAX, PROTOCOL_VERSIONS};

const DOMAIN: &[u8] = b"muster-statement-v1\0";
const PROTOCOL_VERSION: u16 = 2;
/// Below this many bytes a zstd frame is larger than what it holds.
const COMPRESS_BYTES_MIN: usize = 256;
const ZSTD_LEVEL: i32 = 1;
const CODEC_RAW: u8 = 0;
const CODEC_ZSTD: u8 = 1;
const PAYLOAD_HEADER_BYTES: usize = 5;
/// Envelopes of which each thread remembers that their signature holds: a lease or a group is opened again within
/// seconds by the same process (submission, intake, verdict), and verifying costs twenty times what hashing does.
const VERIFIED_MAX: usize = 4_096;

thread_local! {
    /// Hashes of whole envelopes, each in the place that its first bytes say: a newer one takes an older one's.
    static VERIFIED: RefCell<Vec<ContentHash>> = const { RefCell::new(Vec::new()) };
    /// Made once per thread: making one costs more than a small message does.
    static ZSTD: RefCell<Option<Zstd>> = const { RefCell::new(None) };
}

struct Zstd {
    compressor: Compressor<'static>,
    decompressor: Decompressor<'static>,
}

impl Zstd {
    /// Lends this thread's contexts to `work`.
    fn lend<T>(work: impl FnOnce(&mut Self) -> io::Result<T>) -> Result<T, EnvelopeError> {
        let lent = ZSTD.with_borrow_mut(|zstd| match zstd {
            Some(zstd) => work(zstd),
            None => {
                let made = zstd.insert(Self {
                    compressor: Compressor::new(ZSTD_LEVEL)?,
                    decompressor: Decompressor::new()?,
                });
                work(made)
            }
        });
        lent.map_err(malformed)
    }
}

/// What a message is: its number on the wire. Numbers are never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u8)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum Kind {
    Ask = 1,
    Reply = 2,
    Ticket = 3,
    Lease = 4,
    Group = 5,
    CritiqueLease = 6,
    Verdict = 7,
    Joined = 8,
    Receipt = 9,
    Batch = 10,
    Version = 11,
    Fate = 12,
    Control = 13,
    Descriptor = 14,
    Object = 15,
    Admitted = 16,
    Peer = 17,
}

/// Why a message was not accepted as a statement. Displayed to the sender, so it names the number and the bound.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    /// Larger than its kind may be.
    #[error(
        "message of {bytes} bytes is over the limit of {limit} bytes for {kind:?}: send a smaller one"
    )]
    TooLarge {
        /// Kind that was expected.
        kind: Kind,
        /// Size as received.
        bytes: usize,
        /// The bound of the kind.
        limit: usize,
    },
    /// Another protocol version.
    #[error("protocol version {found} is not served here (served: {served:?}): upgrade muster")]
    UpgradeRequired {
        /// Version as received.
        found: u16,
        /// Versions served.
        served: &'static [u16],
    },
    /// Another kind than the subject carries.
    #[error("message kind {found} came where {expected:?} is expected: upgrade muster")]
    WrongKind {
        /// Kind that was expected.
        expected: Kind,
        /// Kind as received.
        found: u8,
    },
    /// Another run's message.
    #[error("message of run `{found}` came to run `{expected}`")]
    WrongRun {
        /// The run served here.
        expected: RunId,
        /// The run named in the message.
        found: RunId,
    },
    /// The bytes are not an envelope.
    #[error("message cannot be decoded: {0}")]
    Malformed(String),
    /// The signature is not the author's.
    #[error("signature of {author} does not verify")]
    BadSignature {
        /// Who the message says wrote it.
        author: PeerId,
    },
    /// Decoded, but its content breaks a rule.
    #[error("{0}")]
    Invalid(#[from] Invalid),
}

/// A rule that a decoded message breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} {problem}")]
pub struct Invalid {
    /// Which field, in the message's own words.
    pub field: &'static str,
    /// What is wrong with it, with the number and the bound.
    pub problem: String,
}

impl Invalid {
    /// A broken rule.
    pub fn new(field: &'static str, problem: impl Into<String>) -> Self {
        Self {
            field,
            problem: problem.into(),
        }
    }
}

/// Something that can be said: a message with a number, a bound and rules.
pub trait Statement: Serialize + DeserializeOwned {
    /// Its number on the wire.
    const KIND: Kind;
    /// Largest envelope, in bytes.
    const BYTES_MAX: usize;

    /// Checks lengths, bounds and finiteness.
    ///
    /// # Errors
    /// Names the first field that breaks a rule.
    fn validate(&self) -> Result<(), Invalid>;
}

#[derive(Serialize, Deserialize)]
struct Wire<'a> {
    protocol_version: u16,
    kind: u8,
    run: RunId,
    author: PeerId,
    sequence: u64,
    #[serde(with = "serde_bytes")]
    payload: &'a [u8],
    #[serde(with = "serde_bytes")]
    signature: &'a [u8],
}

/// A statement whose signature was verified (or made here), with the bytes as they travel.
#[derive(Debug, Clone)]
pub struct Signed<T> {
    /// What was said.
    pub body: T,
    /// Who signed it.
    pub author: PeerId,
    /// The author's own counter.
    pub sequence: u64,
    /// The envelope exactly as signed.
    pub bytes: Bytes,
}

impl<T> Signed<T> {
    /// BLAKE3 of the envelope.
    pub fn hash(&self) -> ContentHash {
        ContentHash::of(&self.bytes)
    }
}

/// Signs `body` as `identity`'s statement in `run`.
///
/// # Errors
/// When the body breaks its own rules or its bound.
pub fn seal<T: Statement>(
    identity: &Identity,
    run: &RunId,
    sequence: u64,
    body: T,
) -> Result<Signed<T>, EnvelopeError> {
    body.validate()?;
    let message = postcard::to_stdvec(&body).map_err(malformed)?;
    let payload = pack(&message)?;
    let author = identity.peer_id();
    let kind = T::KIND as u8;
    let signature = identity.sign_statement(&signed_bytes(
        PROTOCOL_VERSION,
        kind,
        run,
        &author,
        sequence,
        &payload,
    ));
    let wire = Wire {
        protocol_version: PROTOCOL_VERSION,
        kind,
        run: run.clone(),
        author,
        sequence,
        payload: &payload,
        signature: &signature,
    };
    let bytes = Bytes::from(postcard::to_stdvec(&wire).map_err(malformed)?);
    check_size::<T>(bytes.len())?;
    remember_verified(&ContentHash::of(&bytes));
    Ok(Signed {
        body,
        author,
        sequence,
        bytes,
    })
}

/// Opens a statement: size, version, kind, run, signature, then content, in this order.
///
/// Whether the author may say this is for the caller to decide.
///
/// # Errors
/// The first check that fails.
pub fn open<T: Statement>(bytes: Bytes, run: &RunId) -> Result<Signed<T>, EnvelopeError> {
    check_size::<T>(bytes.len())?;
    let (found, _) = postcard::take_from_bytes::<u16>(&bytes).map_err(malformed)?;
    if !PROTOCOL_VERSIONS.contains(&found) {
        return Err(EnvelopeError::UpgradeRequired {
            found,
            served: PROTOCOL_VERSIONS,
        });
    }
    let (wire, rest) = postcard::take_from_bytes::<Wire<'_>>(&bytes).map_err(malformed)?;
    if !rest.is_empty() {
        return Err(EnvelopeError::Malformed(format!(
            "{} bytes follow the envelope",
            rest.len()
        )));
    }
    if wire.kind != T::KIND as u8 {
        return Err(EnvelopeError::WrongKind {
            expected: T::KIND,
            found: wire.kind,
        });
    }
    if wire.run != *run {
        return Err(EnvelopeError::WrongRun {
            expected: run.clone(),
            found: wire.run,
        });
    }
    let bad_signature = EnvelopeError::BadSignature {
        author: wire.author,
    };
    let Ok(signature) = <[u8; 64]>::try_from(wire.signature) else {
        return Err(bad_signature);
    };
    let envelope = ContentHash::of(&bytes);
    if !is_verified(&envelope) {
        let signed = signed_bytes(
            wire.protocol_version,
            wire.kind,
            &wire.run,
            &wire.author,
            wire.sequence,
            wire.payload,
        );
        if !is_signed_by(&wire.author, &signed, &signature) {
            return Err(bad_signature);
        }
        remember_verified(&envelope);
    }
    let message = unpack(wire.payload, T::BYTES_MAX * INFLATION_MAX)?;
    let body: T = postcard::from_bytes(&message).map_err(malformed)?;
    body.validate()?;
    let (author, sequence) = (wire.author, wire.sequence);
    Ok(Signed {
        body,
        author,
        sequence,
        bytes,
    })
}

fn verified_place(envelope: &ContentHash) -> usize {
    usize::from(u16::from_le_bytes([envelope.0[0], envelope.0[1]])) % VERIFIED_MAX
}

fn is_verified(envelope: &ContentHash) -> bool {
    let place = verified_place(envelope);
    VERIFIED.with_borrow(|verified| verified.get(place) == Some(envelope))
}

fn remember_verified(envelope: &ContentHash) {
    VERIFIED.with_borrow_mut(|verified| {
        verified.resize(VERIFIED_MAX, ContentHash([0; 32]));
        verified[verified_place(envelope)] = *envelope;
    });
}

fn check_size<T: Statement>(bytes: usize) -> Result<(), EnvelopeError> {
    if bytes > T::BYTES_MAX {
        return Err(EnvelopeError::TooLarge {
            kind: T::KIND,
            bytes,
            limit: T::BYTES_MAX,
        });
    }
    Ok(())
}

fn malformed(error: impl std::fmt::Display) -> EnvelopeError {
    EnvelopeError::Malformed(error.to_string())
}

fn signed_bytes(
    version: u16,
    kind: u8,
    run: &RunId,
    author: &PeerId,
    sequence: u64,
    payload: &[u8],
) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(160);
    bytes.extend_from_slice(DOMAIN);
    bytes.extend_from_slice(&version.to_le_bytes());
    bytes.push(kind);
    bytes.extend_from_slice(run.as_str().as_bytes());
    bytes.push(0);
    bytes.extend_from_slice(&author.0);
    bytes.extend_from_slice(&sequence.to_le_bytes());
    bytes.extend_from_slice(blake3::hash(payload).as_bytes());
    bytes
}

fn pack(message: &[u8]) -> Result<Vec<u8>, EnvelopeError> {
    let raw_size = u32::try_from(message.len()).map_err(malformed)?;
    let compressed = (message.len() >= COMPRESS_BYTES_MIN)
        .then(|| Zstd::lend(|zstd| zstd.compressor.compress(message)))
        .transpose()?
        .filter(|frame| frame.len() < message.len() && frame.len() * INFLATION_MAX > message.len());
    let (codec, data) = match &compressed {
        Some(frame) => (CODEC_ZSTD, frame.as_slice()),
        None => (CODEC_RAW, message),
    };
    let mut payload = Vec::with_capacity(PAYLOAD_HEADER_BYTES + data.len());
    payload.push(codec);
    payload.extend_from_slice(&raw_size.to_le_bytes());
    payload.extend_from_slice(data);
    Ok(payload)
}

fn unpack(payload: &[u8], bytes_max: usize) -> Result<Vec<u8>, EnvelopeError> {
    let (header, data) = payload
        .split_first_chunk::<PAYLOAD_HEADER_BYTES>()
        .ok_or_else(|| malformed("payload is shorter than its header"))?;
    let raw_size = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
    if raw_size > bytes_max || raw_size > data.len().saturating_mul(INFLATION_MAX) {
        return Err(malformed(format!(
            "declared size {raw_size} is over its bound"
        )));
    }
    let message = match header[0] {
        CODEC_RAW => data.to_vec(),
        CODEC_ZSTD => Zstd::lend(|zstd| zstd.decompressor.decompress(data, raw_size))?,
        other => return Err(malformed(format!("unknown codec {other}"))),
    };
    if message.len() != raw_size {
        return Err(malformed(format!(
            "declared size {raw_size}, found {}",
            message.len()
        )));
    }
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    struct Words(Vec<String>);

    impl Statement for Words {
        const KIND: Kind = Kind::Ask;
        const BYTES_MAX: usize = 2_000;

        fn validate(&self) -> Result<(), Invalid> {
            if self.0.len() > 100 {
                return Err(Invalid::new(
                    "words",
                    format!("are {} of at most 100", self.0.len()),
                ));
            }
            Ok(())
        }
    }

    fn run() -> RunId {
        "test".parse().unwrap()
    }

    fn sealed() -> Signed<Words> {
        let words = Words(vec!["weights".to_owned(); 60]);
        seal(&Identity::generate(), &run(), 9, words).unwrap()
    }

    #[test]
    fn what_is_sealed_opens_with_author_and_sequence() {
        let sealed = sealed();
        let opened = open::<Words>(sealed.bytes.clone(), &run()).unwrap();
        assert_eq!(
            (opened.body, opened.author, opened.sequence),
            (sealed.body, sealed.author, 9)
        );
    }

    #[test]
    fn another_run_is_refused() {
        let error = open::<Words>(sealed().bytes, &"other".parse().unwrap()).unwrap_err();
        assert!(matches!(error, EnvelopeError::WrongRun { .. }));
    }

    #[test]
    fn another_version_is_answered_with_the_versions_served() {
        let mut bytes = sealed().bytes.to_vec();
        bytes[0] = 1;
        let error = open::<Words>(bytes.into(), &run()).unwrap_err();
        assert_eq!(
            error,
            EnvelopeError::UpgradeRequired {
                found: 1,
                served: PROTOCOL_VERSIONS
            }
        );
    }

    #[test]
    fn a_message_over_its_limit_is_refused_by_its_size() {
        let error = open::<Words>(Bytes::from(vec![1; 2_001]), &run()).unwrap_err();
        assert_eq!(
            error,
            EnvelopeError::TooLarge {
                kind: Kind::Ask,
                bytes: 2_001,
                limit: 2_000
            }
        );
    }

    #[test]
    fn a_zip_bomb_is_refused_before_it_is_inflated() {
        let frame = zstd::bulk::compress(&vec![0; 1 << 20], 1).unwrap();
        let mut payload = vec![CODEC_ZSTD];
        payload.extend_from_slice(&(1u32 << 20).to_le_bytes());
        payload.extend_from_slice(&frame);
        assert!(unpack(&payload, 2_000 * INFLATION_MAX).is_err());
    }

    proptest! {
        #[test]
        fn no_flipped_bit_survives(position in 0usize..4096, bit in 0u8..8) {
            let sealed = sealed();
            let mut bytes = sealed.bytes.to_vec();
            let position = position % bytes.len();
            bytes[position] ^= 1 << bit;
            prop_assert!(open::<Words>(bytes.into(), &run()).is_err());
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            prop_assert!(open::<Words>(bytes.into(), &run()).is_err());
        }
    }
}
