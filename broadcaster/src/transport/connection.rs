//! One connection between two peers: the handshake that proves both keys, and reading and writing whole frames.
//!
//! The dialler sends a greeting; the acceptor sends a greeting and a proof; the dialler sends a proof. A proof signs a label,
//! the side, both keys and both fresh nonces, so it is worthless on another connection, in the other direction, or as a
//! statement. Frames are not encrypted: weights are public and every shard is checked against a hash, so an attacker between
//! two peers can at worst make them disconnect. Knows nothing of objects. Invariant: no byte of a body is read before its
//! length was checked.

use std::io;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use muster_protocol::id::PeerId;
use muster_protocol::identity::{Identity, is_signed_by};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::transport::stream::{Reader, Streams, Writer};
use crate::transport::wire::{
    self, Frame, GREETING_BYTES_MAX, Message, Refusal, RequestId, WIRE_VERSIONS, WireError,
};

/// How long a handshake may take: three round trips over a slow link. It bounds how long a stranger occupies a connection.
pub(crate) const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);

/// The first bytes that a proof signs.
const HANDSHAKE_LABEL: &[u8] = b"muster-handshake-v1\0";

/// Which side signs a proof.
const DIALLER: u8 = 0;
const ACCEPTOR: u8 = 1;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectionError {
    /// The socket failed or was closed.
    #[error("connection failed ({0})")]
    Io(#[from] io::Error),
    /// The bytes received are not a frame.
    #[error("{0}")]
    Wire(#[from] WireError),
    /// The peer sent a refusal.
    #[error("peer refused the connection: {0}")]
    Refused(Refusal),
    /// The handshake, or another step, took too long.
    #[error("{step} took longer than {limit_ms} ms")]
    Late { step: &'static str, limit_ms: u64 },
    /// Another peer answers at this address.
    #[error("peer {found} answered where {expected} was expected: its record is out of date")]
    WrongPeer { expected: PeerId, found: PeerId },
    /// The proof is not signed by the key in the greeting.
    #[error("peer did not prove that it holds the key {claimed}")]
    BadProof { claimed: PeerId },
    /// The address is this peer's own.
    #[error("connected to itself")]
    Oneself,
    /// A frame of another kind than the protocol allows here.
    #[error("peer sent {found} where {expected} was expected")]
    Unexpected {
        expected: &'static str,
        found: &'static str,
    },
}

/// Which side of a connection this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The side that opened it; the peer must prove the key `expected`.
    Dialler {
        expected: PeerId,
    },
    Acceptor,
}

/// Streams to a peer that has proved its key.
pub(crate) struct Connection {
    pub(crate) peer: PeerId,
    pub(crate) reader: Reader,
    pub(crate) writer: Writer,
}

impl Connection {
    /// Does the handshake over new streams.
    ///
    /// # Errors
    /// When the peer proves no key, or another one than expected.
    pub(crate) async fn prove(
        mut streams: Streams,
        identity: &Identity,
        side: Side,
    ) -> Result<Self, ConnectionError> {
        let peer = handshake(&mut streams, identity, side).await?;
        let (reader, writer) = streams.into_inner();
        Ok(Self {
            peer,
            reader,
            writer,
        })
    }
}

struct Greeting {
    key: PeerId,
    nonce: [u8; 32],
}

/// Proves this peer's key to the other side and verifies the other side's proof, within [`HANDSHAKE_DEADLINE`]. Returns the
/// other side's key.
///
/// # Errors
/// When the other side proves no key, or another one than expected.
pub async fn handshake<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    identity: &Identity,
    side: Side,
) -> Result<PeerId, ConnectionError> {
    let limit_ms = HANDSHAKE_DEADLINE.as_millis() as u64;
    let proving = prove_both(stream, identity, side);
    let late = |_| ConnectionError::Late {
        step: "the handshake",
        limit_ms,
    };
    tokio::time::timeout(HANDSHAKE_DEADLINE, proving)
        .await
        .map_err(late)?
}

async fn prove_both<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    identity: &Identity,
    side: Side,
) -> Result<PeerId, ConnectionError> {
    let own = Greeting {
        key: identity.handshake_id(),
        nonce: rand::random(),
    };
    let theirs;
    match side {
        Side::Dialler { expected } => {
            greet(stream, &own).await?;
            theirs = read_greeting(stream, &own).await?;
            if theirs.key != expected {
                return Err(ConnectionError::WrongPeer {
                    expected,
                    found: theirs.key,
                });
            }
            check_proof(stream, &theirs, &transcript(ACCEPTOR, &own, &theirs)).await?;
            prove(stream, identity, &transcript(DIALLER, &own, &theirs)).await?;
        }
        Side::Acceptor => {
            theirs = read_greeting(stream, &own).await?;
            greet(stream, &own).await?;
            prove(stream, identity, &transcript(ACCEPTOR, &theirs, &own)).await?;
            check_proof(stream, &theirs, &transcript(DIALLER, &theirs, &own)).await?;
        }
    }
    Ok(theirs.key)
}

fn transcript(signer: u8, dialler: &Greeting, acceptor: &Greeting) -> Vec<u8> {
    let mut bytes = HANDSHAKE_LABEL.to_vec();
    bytes.push(signer);
    for greeting in [dialler, acceptor] {
        bytes.extend_from_slice(&greeting.key.0);
        bytes.extend_from_slice(&greeting.nonce);
    }
    bytes
}

async fn greet<S: AsyncWrite + Unpin>(
    stream: &mut S,
    own: &Greeting,
) -> Result<(), ConnectionError> {
    let versions = WIRE_VERSIONS.to_vec();
    write_message(
        stream,
        &Message::Hello {
            versions,
            key: own.key,
            nonce: own.nonce,
        },
    )
    .await
}

async fn read_greeting<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    own: &Greeting,
) -> Result<Greeting, ConnectionError> {
    let (versions, key, nonce) = match read_frame(stream, GREETING_BYTES_MAX).await? {
        Frame::Message(Message::Hello {
            versions,
            key,
            nonce,
        }) => (versions, key, nonce),
        other => return Err(unexpected("a greeting", &other)),
    };
    if !versions
        .iter()
        .any(|version| WIRE_VERSIONS.contains(version))
    {
        let refusal = Refusal::UpgradeRequired {
            served: WIRE_VERSIONS.to_vec(),
        };
        write_message(stream, &Message::Refused(refusal.clone())).await?;
        return Err(ConnectionError::Refused(refusal));
    }
    if key == own.key {
        return Err(ConnectionError::Oneself);
    }
    Ok(Greeting { key, nonce })
}

async fn prove<S: AsyncWrite + Unpin>(
    stream: &mut S,
    identity: &Identity,
    transcript: &[u8],
) -> Result<(), ConnectionError> {
    let signature = serde_bytes::ByteArray::new(identity.sign_handshake(transcript));
    write_message(stream, &Message::Proof { signature }).await
}

async fn check_proof<S: AsyncRead + Unpin>(
    stream: &mut S,
    theirs: &Greeting,
    transcript: &[u8],
) -> Result<(), ConnectionError> {
    match read_frame(stream, GREETING_BYTES_MAX).await? {
        Frame::Message(Message::Proof { signature })
            if is_signed_by(&theirs.key, transcript, &signature) =>
        {
            Ok(())
        }
        Frame::Message(Message::Proof { .. }) => Err(ConnectionError::BadProof {
            claimed: theirs.key,
        }),
        other => Err(unexpected("a proof", &other)),
    }
}

/// The error for a frame of the wrong kind; a refusal becomes [`ConnectionError::Refused`].
pub(crate) fn unexpected(expected: &'static str, found: &Frame) -> ConnectionError {
    let found = match found {
        Frame::Message(Message::Refused(refusal)) => {
            return ConnectionError::Refused(refusal.clone());
        }
        Frame::Message(Message::Hello { .. }) => "a greeting",
        Frame::Message(Message::Proof { .. }) => "a proof",
        Frame::Message(Message::Have { .. } | Message::Want { .. } | Message::WantAny { .. }) => {
            "a request"
        }
        Frame::Message(Message::Held { .. } | Message::Missing { .. } | Message::Busy { .. }) => {
            "a reply"
        }
        Frame::Shard { .. } => "a shard",
    };
    ConnectionError::Unexpected { expected, found }
}

/// Reads one frame of at most `frame_bytes_max` bytes.
///
/// # Cancel safety
/// Not safe: a frame read in part is lost, so the connection cannot be used any more.
///
/// # Errors
/// When the socket fails, or the bytes are not a frame, or are too many.
pub async fn read_frame<S: AsyncRead + Unpin>(
    stream: &mut S,
    frame_bytes_max: usize,
) -> Result<Frame, ConnectionError> {
    read_expecting(stream, frame_bytes_max, |_, _| {}).await
}

/// Like [`read_frame`], for connections that carry shards: the system wakes the reader only when much of a frame is there.
///
/// # Cancel safety
/// As [`read_frame`].
///
/// # Errors
/// As [`read_frame`].
pub(crate) async fn read_large_frame(
    reader: &mut Reader,
    frame_bytes_max: usize,
) -> Result<Frame, ConnectionError> {
    let frame = read_expecting(reader, frame_bytes_max, |reader, bytes| {
        reader.expect(bytes);
    });
    let frame = frame.await;
    // The next frame may be small.
    reader.expect(1);
    frame
}

async fn read_expecting<S: AsyncRead + Unpin>(
    stream: &mut S,
    frame_bytes_max: usize,
    expect: impl Fn(&mut S, usize),
) -> Result<Frame, ConnectionError> {
    let length = stream.read_u32_le().await?;
    let length = wire::check_length(length, frame_bytes_max)?;
    // `read_buf` fills uninitialised capacity, so that a shard is not first written over with zeros.
    let mut frame = BytesMut::with_capacity(length);
    while frame.len() < length {
        let missing = length - frame.len();
        expect(stream, missing);
        if stream.read_buf(&mut (&mut frame).limit(missing)).await? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
    }
    Ok(wire::decode(frame.freeze())?)
}

/// Writes one small message.
///
/// # Errors
/// When the socket fails.
pub async fn write_message<S: AsyncWrite + Unpin>(
    stream: &mut S,
    message: &Message,
) -> Result<(), ConnectionError> {
    stream.write_all(&wire::encode_message(message)?).await?;
    Ok(())
}

/// Writes one shard without copying it, header and bytes in one system call where the system allows.
///
/// # Errors
/// When the socket fails.
pub async fn write_shard<S: AsyncWrite + Unpin>(
    stream: &mut S,
    request: RequestId,
    shard: u32,
    bytes: Bytes,
) -> Result<(), ConnectionError> {
    let header = wire::shard_header(request, shard, bytes.len());
    stream
        .write_all_buf(&mut Buf::chain(&header[..], bytes))
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    async fn meet(
        dialler: &Identity,
        expected: PeerId,
        acceptor: &Identity,
    ) -> (
        Result<PeerId, ConnectionError>,
        Result<PeerId, ConnectionError>,
    ) {
        let (mut a, mut b) = duplex(4_096);
        let dialling = async {
            let proved = handshake(&mut a, dialler, Side::Dialler { expected }).await;
            drop(a);
            proved
        };
        let accepting = async {
            let proved = handshake(&mut b, acceptor, Side::Acceptor).await;
            drop(b);
            proved
        };
        tokio::join!(dialling, accepting)
    }

    #[tokio::test]
    async fn both_sides_learn_the_other_sides_key() {
        let (a, b) = (Identity::generate(), Identity::generate());
        let (dialled, accepted) = meet(&a, b.handshake_id(), &b).await;
        assert_eq!(dialled.unwrap(), b.handshake_id());
        assert_eq!(accepted.unwrap(), a.handshake_id());
    }

    #[tokio::test]
    async fn a_peer_with_another_key_than_expected_is_refused() {
        let (a, b, c) = (
            Identity::generate(),
            Identity::generate(),
            Identity::generate(),
        );
        let (dialled, accepted) = meet(&a, c.handshake_id(), &b).await;
        assert!(matches!(dialled, Err(ConnectionError::WrongPeer { .. })));
        assert!(accepted.is_err());
    }

    #[tokio::test]
    async fn a_claimed_key_without_its_secret_is_refused() {
        let (victim, liar, server) = (
            Identity::generate(),
            Identity::generate(),
            Identity::generate(),
        );
        let (mut a, mut b) = duplex(4_096);
        let lying = async {
            let own = Greeting {
                key: victim.handshake_id(),
                nonce: [1; 32],
            };
            greet(&mut a, &own).await?;
            let theirs = read_greeting(&mut a, &own).await?;
            check_proof(&mut a, &theirs, &transcript(ACCEPTOR, &own, &theirs)).await?;
            prove(&mut a, &liar, &transcript(DIALLER, &own, &theirs)).await
        };
        let (lied, served) = tokio::join!(lying, handshake(&mut b, &server, Side::Acceptor));
        lied.unwrap();
        let Err(ConnectionError::BadProof { claimed }) = served else {
            panic!("{served:?}")
        };
        assert_eq!(claimed, victim.handshake_id());
    }

    #[tokio::test]
    async fn a_reflected_proof_is_refused() {
        let server = Identity::generate();
        let (mut a, mut b) = duplex(4_096);
        let reflecting = async {
            let own = Greeting {
                key: Identity::generate().handshake_id(),
                nonce: [1; 32],
            };
            greet(&mut a, &own).await?;
            read_greeting(&mut a, &own).await?;
            let Frame::Message(proof) = read_frame(&mut a, GREETING_BYTES_MAX).await? else {
                panic!("a shard in the handshake")
            };
            write_message(&mut a, &proof).await
        };
        let (reflected, served) =
            tokio::join!(reflecting, handshake(&mut b, &server, Side::Acceptor));
        reflected.unwrap();
        assert!(matches!(served, Err(ConnectionError::BadProof { .. })));
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_peer_is_given_up_at_the_deadline() {
        let (_silent, mut stream) = duplex(64);
        let error = handshake(&mut stream, &Identity::generate(), Side::Acceptor)
            .await
            .unwrap_err();
        assert!(
            matches!(
                error,
                ConnectionError::Late {
                    limit_ms: 5_000,
                    ..
                }
            ),
            "{error}"
        );
    }

    #[tokio::test]
    async fn a_peer_with_another_version_is_told_which_are_served() {
        let (mut a, mut b) = duplex(4_096);
        let hello = Message::Hello {
            versions: vec![9],
            key: PeerId([1; 32]),
            nonce: [0; 32],
        };
        write_message(&mut a, &hello).await.unwrap();
        let refused = handshake(&mut b, &Identity::generate(), Side::Acceptor).await;
        assert!(matches!(
            refused,
            Err(ConnectionError::Refused(Refusal::UpgradeRequired { .. }))
        ));
        let told = read_frame(&mut a, GREETING_BYTES_MAX).await.unwrap();
        let served = WIRE_VERSIONS.to_vec();
        assert_eq!(
            told,
            Frame::Message(Message::Refused(Refusal::UpgradeRequired { served }))
        );
    }

    #[tokio::test]
    async fn a_frame_over_its_limit_ends_the_connection_unread() {
        let (mut a, mut b) = duplex(64);
        a.write_u32_le(1 << 30).await.unwrap();
        let error = read_frame(&mut b, GREETING_BYTES_MAX).await.unwrap_err();
        assert!(
            matches!(error, ConnectionError::Wire(WireError::TooLarge { .. })),
            "{error}"
        );
    }
}
