//! The wire format between peers: frames of a bounded size, each a small message or a shard.
//!
//! A frame is the length of the rest (u32 LE), one byte for its kind, and a body: a [`Message`] in postcard; or for a shard its
//! request (u32 LE), its number (u32 LE) and its bytes. Each request has a number that its reply repeats, so a peer may reply
//! out of order. Knows nothing of sockets; decoding never trusts a length.

use bytes::{Buf, Bytes};
use muster_protocol::id::{ObjectId, PeerId};
use muster_protocol::message::version::{SHARD_BYTES_MAX, SHARDS_MAX};
use serde::{Deserialize, Serialize};

/// The versions of the wire format that this build speaks, newest last.
pub(crate) const WIRE_VERSIONS: &[u16] = &[1];

/// Bytes in front of a shard in its frame: the kind, the request and the shard's number.
pub(crate) const SHARD_PREFIX_BYTES: usize = 9;

/// Largest frame without a shard: a bitmap of 65,536 shards and room for ids.
pub const MESSAGE_BYTES_MAX: usize = SHARDS_MAX / 8 + 512;

/// Largest frame during the handshake; a greeting has fewer than 120 bytes.
pub(crate) const GREETING_BYTES_MAX: usize = 256;

/// Largest frame with a shard.
pub const FRAME_BYTES_MAX: usize = SHARD_BYTES_MAX as usize + SHARD_PREFIX_BYTES;

/// Most holders named in one [`Message::Busy`]: enough to find one that answers.
pub(crate) const HOLDERS_MAX: usize = 4;

/// Most versions named in one message.
const VERSIONS_MAX: usize = 16;

const KIND_MESSAGE: u8 = 1;
const KIND_SHARD: u8 = 2;

/// The number of a request, repeated by its reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RequestId(pub u32);

/// The side that decides which shard is sent next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Chooser {
    /// The requester, by number.
    Asker,
    /// The sender. It knows which shards it has sent least often, and does not spend its uplink on shards that the swarm has.
    Holder,
}

/// Why a connection is refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// No version in common.
    #[error("no wire version in common (served: {served:?}): upgrade muster")]
    UpgradeRequired { served: Vec<u16> },
    /// The limit of connections is reached, in all or of this peer.
    #[error("all {connections_max} connections are taken: try again later")]
    Full { connections_max: u32 },
    /// The refused peer has served a bad shard.
    #[error("peer is banned here")]
    Banned,
}

/// A frame other than a shard. New variants go at the end: the position of a variant is its number on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// The first message of both sides.
    Hello {
        /// The wire versions that the sender speaks.
        versions: Vec<u16>,
        /// The key that the sender will prove.
        key: PeerId,
        /// Random bytes for the other side to sign, fresh for each connection.
        nonce: [u8; 32],
    },
    /// The signature over both nonces and keys.
    Proof {
        /// Made with the key in the greeting.
        signature: serde_bytes::ByteArray<64>,
    },
    /// The sender closes the connection.
    Refused(Refusal),
    /// Request: which shards do you hold?
    Have {
        request: RequestId,
        object: ObjectId,
    },
    /// Reply to [`Self::Have`].
    Held {
        request: RequestId,
        /// A bitmap, one bit per shard.
        #[serde(with = "serde_bytes")]
        shards: Vec<u8>,
        /// How to request them.
        chooser: Chooser,
    },
    /// Request: send this shard.
    Want {
        request: RequestId,
        object: ObjectId,
        shard: u32,
    },
    /// Request: send any shard except these.
    WantAny {
        request: RequestId,
        object: ObjectId,
        /// A bitmap of the shards that the sender of this request does not want.
        #[serde(with = "serde_bytes")]
        except: Vec<u8>,
    },
    /// Reply: the shard or object is not here.
    Missing { request: RequestId },
    /// Reply: other peers have the shard too; ask them first, or here again later.
    Busy {
        request: RequestId,
        /// When to ask again, from now.
        retry_ms: u32,
        /// Handshake keys of peers to whom the shard was sent.
        holders: Vec<PeerId>,
    },
}

/// A decoded frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    Message(Message),
    /// A shard, not yet verified.
    Shard {
        request: RequestId,
        shard: u32,
        bytes: Bytes,
    },
}

/// Why bytes are not a frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The announced length is over the limit.
    #[error("frame of {bytes} bytes is over the limit of {limit} bytes here: send a smaller one")]
    TooLarge { bytes: usize, limit: usize },
    #[error("frame is empty")]
    Empty,
    /// The kind is neither message nor shard.
    #[error("frame kind {kind} is unknown: upgrade muster")]
    UnknownKind { kind: u8 },
    /// The body does not decode.
    #[error("frame cannot be decoded: {0}")]
    Malformed(String),
    /// A list is longer than its bound.
    #[error("{field} has {found} entries, at most {limit} are allowed")]
    TooMany {
        field: &'static str,
        found: usize,
        limit: usize,
    },
}

/// Checks an announced length before anything is allocated for it.
///
/// # Errors
/// When it is over `limit`, or 0.
pub(crate) fn check_length(announced: u32, limit: usize) -> Result<usize, WireError> {
    let bytes = announced as usize;
    if bytes == 0 {
        return Err(WireError::Empty);
    }
    if bytes > limit {
        return Err(WireError::TooLarge { bytes, limit });
    }
    Ok(bytes)
}

/// Decodes a frame without its length. A shard's bytes are a slice of `frame`, not a copy.
///
/// # Errors
/// When the bytes are not a frame.
pub fn decode(mut frame: Bytes) -> Result<Frame, WireError> {
    if frame.is_empty() {
        return Err(WireError::Empty);
    }
    match frame.get_u8() {
        KIND_MESSAGE => decode_message(&frame).map(Frame::Message),
        KIND_SHARD if frame.len() < SHARD_PREFIX_BYTES - 1 => Err(WireError::Malformed(format!(
            "shard frame of {} bytes",
            frame.len() + 1
        ))),
        KIND_SHARD => {
            let (request, shard) = (RequestId(frame.get_u32_le()), frame.get_u32_le());
            Ok(Frame::Shard {
                request,
                shard,
                bytes: frame,
            })
        }
        kind => Err(WireError::UnknownKind { kind }),
    }
}

fn decode_message(body: &[u8]) -> Result<Message, WireError> {
    if body.len() > MESSAGE_BYTES_MAX {
        return Err(WireError::TooLarge {
            bytes: body.len(),
            limit: MESSAGE_BYTES_MAX,
        });
    }
    let (message, rest) = postcard::take_from_bytes::<Message>(body)
        .map_err(|error| WireError::Malformed(error.to_string()))?;
    if !rest.is_empty() {
        return Err(WireError::Malformed(format!(
            "{} bytes follow the message",
            rest.len()
        )));
    }
    let too_many = |field, found, limit| match found > limit {
        true => Err(WireError::TooMany {
            field,
            found,
            limit,
        }),
        false => Ok(()),
    };
    match &message {
        Message::Hello { versions, .. } => too_many("versions", versions.len(), VERSIONS_MAX)?,
        Message::Busy { holders, .. } => too_many("holders", holders.len(), HOLDERS_MAX)?,
        _ => {}
    }
    Ok(message)
}

/// The bytes of a message's frame, length included.
///
/// # Errors
/// When the message is over [`MESSAGE_BYTES_MAX`], a mistake of the caller.
pub(crate) fn encode_message(message: &Message) -> Result<Vec<u8>, WireError> {
    let malformed = |error: postcard::Error| WireError::Malformed(error.to_string());
    let frame = vec![0, 0, 0, 0, KIND_MESSAGE];
    let mut frame = postcard::to_extend(message, frame).map_err(malformed)?;
    let length = frame.len() - 4;
    if length > MESSAGE_BYTES_MAX {
        return Err(WireError::TooLarge {
            bytes: length,
            limit: MESSAGE_BYTES_MAX,
        });
    }
    frame[..4].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(frame)
}

/// The bytes in front of a shard of `bytes` bytes, length included.
pub(crate) fn shard_header(
    request: RequestId,
    shard: u32,
    bytes: usize,
) -> [u8; 4 + SHARD_PREFIX_BYTES] {
    let mut header = [0; 4 + SHARD_PREFIX_BYTES];
    header[..4].copy_from_slice(&((SHARD_PREFIX_BYTES + bytes) as u32).to_le_bytes());
    header[4] = KIND_SHARD;
    header[5..9].copy_from_slice(&request.0.to_le_bytes());
    header[9..].copy_from_slice(&shard.to_le_bytes());
    header
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn round_trip(message: &Message) -> Message {
        let frame = encode_message(message).unwrap();
        let length = u32::from_le_bytes(frame[..4].try_into().unwrap());
        assert_eq!(
            check_length(length, MESSAGE_BYTES_MAX).unwrap(),
            frame.len() - 4
        );
        match decode(Bytes::copy_from_slice(&frame[4..])).unwrap() {
            Frame::Message(message) => message,
            Frame::Shard { .. } => panic!("a message came back as a shard"),
        }
    }

    fn one_of_each() -> Vec<Message> {
        let (request, object) = (RequestId(7), ObjectId([2; 32]));
        vec![
            Message::Hello {
                versions: vec![1],
                key: PeerId([1; 32]),
                nonce: [3; 32],
            },
            Message::Proof {
                signature: serde_bytes::ByteArray::new([4; 64]),
            },
            Message::Refused(Refusal::Full { connections_max: 5 }),
            Message::Have { request, object },
            Message::Held {
                request,
                shards: vec![0b101],
                chooser: Chooser::Holder,
            },
            Message::Want {
                request,
                object,
                shard: 300,
            },
            Message::WantAny {
                request,
                object,
                except: vec![0b1],
            },
            Message::Missing { request },
            Message::Busy {
                request,
                retry_ms: 300,
                holders: vec![PeerId([6; 32])],
            },
        ]
    }

    #[test]
    fn every_message_has_these_bytes() {
        let hex = |byte: u8, times: usize| hex::encode(vec![byte; times]);
        let golden = [
            format!("44000000010001{}{}{}", "01", hex(1, 32), hex(3, 32)),
            format!("430000000101{}{}", "40", hex(4, 64)),
            "0400000001020105".to_owned(),
            format!("23000000010307{}", hex(2, 32)),
            "060000000104070105".to_owned() + "01",
            format!("25000000010507{}ac02", hex(2, 32)),
            format!("25000000010607{}0101", hex(2, 32)),
            "03000000010707".to_owned(),
            format!("26000000010807ac0201{}", hex(6, 32)),
        ];
        for (message, golden) in one_of_each().iter().zip(golden) {
            assert_eq!(
                hex::encode(encode_message(message).unwrap()),
                golden,
                "{message:?}"
            );
            assert_eq!(round_trip(message), *message);
        }
        assert_eq!(
            hex::encode(shard_header(RequestId(7), 300, 2)),
            "0b000000".to_owned() + "02070000002c010000"
        );
    }

    #[test]
    fn a_frame_over_the_limit_is_refused_before_it_is_read() {
        let error = check_length(u32::MAX, FRAME_BYTES_MAX).unwrap_err();
        assert_eq!(
            error,
            WireError::TooLarge {
                bytes: u32::MAX as usize,
                limit: FRAME_BYTES_MAX
            }
        );
        assert_eq!(check_length(0, 10), Err(WireError::Empty));
    }

    #[test]
    fn lists_over_their_bound_are_refused() {
        let holders = vec![PeerId([0; 32]); HOLDERS_MAX + 1];
        let message = Message::Busy {
            request: RequestId(1),
            retry_ms: 1,
            holders,
        };
        let frame = encode_message(&message).unwrap();
        let error = decode(Bytes::copy_from_slice(&frame[4..])).unwrap_err();
        assert!(matches!(
            error,
            WireError::TooMany {
                field: "holders",
                ..
            }
        ));
    }

    #[test]
    fn the_largest_bitmap_fits_in_a_message() {
        let except = vec![0xff; SHARDS_MAX / 8];
        let message = Message::WantAny {
            request: RequestId(u32::MAX),
            object: ObjectId([0; 32]),
            except,
        };
        assert_eq!(round_trip(&message), message);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            // Random bytes may be a message; then it must encode again.
            if let Ok(Frame::Message(message)) = decode(Bytes::from(bytes)) {
                prop_assert_eq!(round_trip(&message), message);
            }
        }

        #[test]
        fn no_flipped_or_cut_message_panics(which in 0usize..9, position in 0usize..80, byte in any::<u8>()) {
            let mut frame = encode_message(&one_of_each()[which]).unwrap();
            let position = position % frame.len();
            frame[position] ^= byte;
            drop(decode(Bytes::copy_from_slice(&frame[4..])));
            drop(decode(Bytes::copy_from_slice(&frame[4..position.max(4)])));
        }

        #[test]
        fn a_shard_comes_back_whole(bytes in proptest::collection::vec(any::<u8>(), 0..300), request: u32, shard: u32) {
            let header = shard_header(RequestId(request), shard, bytes.len());
            let frame: Bytes = [&header[4..], &bytes].concat().into();
            let expected = Frame::Shard { request: RequestId(request), shard, bytes: bytes.into() };
            prop_assert_eq!(decode(frame), Ok(expected));
        }
    }
}
