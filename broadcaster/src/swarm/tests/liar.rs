//! Peers that misbehave, over real sockets.

use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::store::bitmap::Bitmap;
use crate::store::object::{shard_count, shard_range};
use crate::transport::connection::{Side, handshake, read_frame, write_message, write_shard};
use crate::transport::wire::{Frame, MESSAGE_BYTES_MAX, Message};

/// What it does with those who connect.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Lie {
    /// Says that it holds everything and sends other bytes.
    CorruptShards,
    /// Accepts and says nothing at all.
    Silence,
    /// Proves who it is, says that it holds everything, and sends nothing more.
    Promises,
    /// Announces a frame of a gibibyte.
    HugeFrame,
    /// Sends noise where a greeting should be.
    Noise,
}

/// Starts one; returns what others are told about it.
pub(super) async fn start(lie: Lie, object: &Object) -> (PeerId, PeerRecord) {
    let identity = Identity::generate();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let record = PeerRecord {
        handshake: identity.handshake_id(),
        addresses: vec![listener.local_addr().unwrap().to_string()],
        issued: UnixMillis(1),
    };
    let (peer, object) = (identity.peer_id(), object.clone());
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(serve(lie, stream, identity.clone(), object.clone()));
        }
    });
    (peer, record)
}

/// Lies until the other side has had enough.
async fn serve(lie: Lie, mut stream: TcpStream, identity: Identity, object: Object) {
    match lie {
        Lie::Silence => return std::future::pending().await,
        Lie::Noise => return stream.write_all(&[0xa5; 4_096]).await.unwrap_or_default(),
        Lie::CorruptShards | Lie::Promises | Lie::HugeFrame => {}
    }
    if handshake(&mut stream, &identity, Side::Acceptor)
        .await
        .is_err()
    {
        return;
    }
    if lie == Lie::HugeFrame {
        stream.write_all(&(1u32 << 30).to_le_bytes()).await.ok();
        return std::future::pending().await;
    }
    while let Ok(Frame::Message(message)) = read_frame(&mut stream, MESSAGE_BYTES_MAX).await {
        let done = match message {
            Message::Have { request, .. } => {
                let shards = Bitmap::full(shard_count(&object)).as_bytes().to_vec();
                let held = Message::Held {
                    request,
                    shards,
                    chooser: Chooser::Asker,
                };
                write_message(&mut stream, &held).await
            }
            Message::Want { request, shard, .. } if lie == Lie::CorruptShards => {
                let range = shard_range(&object, shard).unwrap();
                let bytes = Bytes::from(vec![7; (range.end - range.start) as usize]);
                write_shard(&mut stream, request, shard, bytes).await
            }
            _ => Ok(()),
        };
        if done.is_err() {
            return;
        }
    }
}
