//! The envelope around every statement. The signature covers the bytes that travel. A reader checks the size before it
//! decodes and the signature before it reads the content.
//!
//! On the wire (postcard): protocol version, kind, run, author, sequence, payload, signature. The signature covers a
//! domain label, every header field and BLAKE3 of the payload bytes as received, which are never serialised again for
//! verification. The payload is one byte of codec, the raw size (u32 LE), then the raw or zstd bytes of the message.
//!
//! Verifying costs twenty times what hashing does, so a process opens an envelope once and passes the [`Signed`] value on:
//! it holds the decoded message next to the bytes.

use std::cell::RefCell;
use std::io;

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use zstd::bulk::{Compressor, Decompressor};

use crate::id::{ContentHash, PeerId, RunId};
use crate::identity::{Identity, is_signed_by};
use crate::limits::{INFLATION_MAX, PROTOCOL_VERSION, PROTOCOL_VERSIONS};

const DOMAIN: &[u8] = b"muster-statement-v1\0";
/// A zstd frame of fewer bytes than this is larger than its content.
const COMPRESS_BYTES_MIN: usize = 256;
const ZSTD_LEVEL: i32 = 1;
const CODEC_RAW: u8 = 0;
const CODEC_ZSTD: u8 = 1;
const PAYLOAD_HEADER_BYTES: usize = 5;

thread_local! {
    /// Built once per thread: building one costs more than compressing a small message.
    static ZSTD: RefCell<Option<Zstd>> = const { RefCell::new(None) };
}

struct Zstd {
    compressor: Compressor<'static>,
    decompressor: Decompressor<'static>,
}

impl Zstd {
    /// Runs `work` with this thread's contexts.
    fn with<T>(work: impl FnOnce(&mut Self) -> io::Result<T>) -> Result<T, EnvelopeError> {
        let result = ZSTD.with_borrow_mut(|zstd| match zstd {
            Some(zstd) => work(zstd),
            None => {
                let made = zstd.insert(Self {
                    compressor: Compressor::new(ZSTD_LEVEL)?,
                    decompressor: Decompressor::new()?,
                });
                work(made)
            }
        });
        result.map_err(malformed)
    }
}

/// The kind of a message, by its number on the wire. A number is never reused; 9 was a receipt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u8)]
#[non_exhaustive]
pub enum Kind {
    Ask = 1,
    Reply = 2,
    Ticket = 3,
    Lease = 4,
    Group = 5,
    CritiqueLease = 6,
    Verdict = 7,
    Joined = 8,
    Batch = 10,
    Version = 11,
    Fate = 12,
    Control = 13,
    Descriptor = 14,
    Object = 15,
    Admitted = 16,
    Peer = 17,
}

/// Why a message was refused. The sender reads it, so it names the number and the bound.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    #[error(
        "message of {bytes} bytes is over the limit of {limit} bytes for {kind:?}: send a smaller one"
    )]
    TooLarge {
        kind: Kind,
        bytes: usize,
        limit: usize,
    },
    #[error("protocol version {found} is not served here (served: {served:?}): upgrade muster")]
    UpgradeRequired { found: u16, served: &'static [u16] },
    /// The subject carries another kind.
    #[error("message kind {found} arrived where {expected:?} is expected: upgrade muster")]
    WrongKind { expected: Kind, found: u8 },
    #[error(
        "message of run `{found}` arrived in run `{expected}`: use the credentials of that run"
    )]
    WrongRun { expected: RunId, found: RunId },
    #[error("message cannot be decoded: {0}")]
    Malformed(String),
    #[error("signature of {author} does not verify")]
    BadSignature {
        /// The author named in the message.
        author: PeerId,
    },
    /// Its content breaks a rule.
    #[error("{0}")]
    Invalid(#[from] Invalid),
}

/// A rule that a decoded message breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} {problem}")]
pub struct Invalid {
    pub field: &'static str,
    /// Continues the sentence after the field's name, with the number and the bound.
    pub problem: String,
}

impl Invalid {
    pub fn new(field: &'static str, problem: impl Into<String>) -> Self {
        Self {
            field,
            problem: problem.into(),
        }
    }
}

/// A message that can be signed: it has a number, a bound and rules.
pub trait Statement: Serialize + DeserializeOwned {
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

/// A statement whose signature was verified or made by this process, next to the bytes as they travel.
#[derive(Debug, Clone)]
pub struct Signed<T> {
    pub body: T,
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
    Ok(Signed {
        body,
        author,
        sequence,
        bytes,
    })
}

/// Opens a statement: size, version, kind, run, signature, then content, in this order.
///
/// The caller decides whether the author may say this.
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
        .then(|| Zstd::with(|zstd| zstd.compressor.compress(message)))
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
    debug_assert!(
        payload.len() <= PAYLOAD_HEADER_BYTES + message.len(),
        "packing never grows a message"
    );
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
        CODEC_ZSTD => Zstd::with(|zstd| zstd.decompressor.decompress(data, raw_size))?,
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
    fn a_sealed_message_opens_with_author_sequence_and_bytes() {
        let sealed = sealed();
        let opened = open::<Words>(sealed.bytes.clone(), &run()).unwrap();
        assert_eq!(
            (opened.body, opened.author, opened.sequence, opened.bytes),
            (sealed.body, sealed.author, 9, sealed.bytes)
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
    fn a_message_of_another_author_is_refused() {
        let (ours, theirs) = (sealed(), sealed());
        let author_at = ours
            .bytes
            .windows(32)
            .position(|bytes| bytes == ours.author.0)
            .unwrap();
        let mut forged = ours.bytes.to_vec();
        forged[author_at..author_at + 32].copy_from_slice(&theirs.author.0);
        let author = theirs.author;
        assert_eq!(
            open::<Words>(forged.clone().into(), &run()).unwrap_err(),
            EnvelopeError::BadSignature { author }
        );
        // Opening the honest envelope first does not help the forged one.
        open::<Words>(ours.bytes, &run()).unwrap();
        open::<Words>(theirs.bytes, &run()).unwrap();
        assert_eq!(
            open::<Words>(forged.into(), &run()).unwrap_err(),
            EnvelopeError::BadSignature { author }
        );
    }

    #[test]
    fn a_message_of_exactly_its_limit_is_not_too_large() {
        assert_eq!(check_size::<Words>(Words::BYTES_MAX), Ok(()));
        assert!(check_size::<Words>(Words::BYTES_MAX + 1).is_err());
    }

    #[test]
    fn a_declared_size_is_refused_only_above_its_bounds() {
        let declare = |raw_size: u32, data: &[u8]| {
            let mut payload = vec![CODEC_RAW];
            payload.extend_from_slice(&raw_size.to_le_bytes());
            payload.extend_from_slice(data);
            payload
        };
        let over = |raw_size| malformed(format!("declared size {raw_size} is over its bound"));
        assert_eq!(unpack(&declare(8, &[7; 8]), 8), Ok(vec![7; 8]));
        assert_eq!(unpack(&declare(9, &[7; 9]), 8), Err(over(9)));
        // Up to INFLATION_MAX times the data may be declared; here the data then falls short of it.
        let short = malformed("declared size 32, found 2");
        assert_eq!(unpack(&declare(32, &[7; 2]), 1_000), Err(short));
        assert_eq!(unpack(&declare(33, &[7; 2]), 1_000), Err(over(33)));
    }

    #[test]
    fn a_message_that_compresses_too_well_travels_raw() {
        for (zeros, codec) in [
            (COMPRESS_BYTES_MIN - 1, CODEC_RAW),
            (COMPRESS_BYTES_MIN, CODEC_ZSTD),
            (100_000, CODEC_RAW),
        ] {
            let message = vec![0; zeros];
            let payload = pack(&message).unwrap();
            assert_eq!(payload[0], codec, "{zeros} bytes");
            assert_eq!(unpack(&payload, zeros), Ok(message));
        }
        let message: Vec<u8> = (0..4_000u32)
            .map(|at| (at % 251 * at / 251) as u8 & 15)
            .collect();
        let payload = pack(&message).unwrap();
        assert_eq!(payload[0], CODEC_ZSTD);
        assert_eq!(unpack(&payload, message.len()), Ok(message));
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
        fn a_flipped_bit_is_refused(position in 0usize..4096, bit in 0u8..8) {
            let sealed = sealed();
            let mut bytes = sealed.bytes.to_vec();
            let position = position % bytes.len();
            bytes[position] ^= 1 << bit;
            prop_assert!(open::<Words>(bytes.into(), &run()).is_err());
        }

        #[test]
        fn random_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            prop_assert!(open::<Words>(bytes.into(), &run()).is_err());
        }
    }
}
