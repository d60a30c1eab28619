//! Peer discovery: registers this peer's addresses with dispatch and learns those of other peers.
//!
//! Asks often at first, while all peers start at once, and when no reachable peer holds what a fetch needs; otherwise rarely.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::debug;

use muster_protocol::dispatch_client::DispatchClient;
use muster_protocol::envelope::open;
use muster_protocol::message::peer::PeerRecord;

use crate::swarm::Swarm;

/// Pause after the first request.
const PAUSE_MIN: Duration = Duration::from_millis(200);
/// Longest pause: well within the time after which dispatch forgets a silent peer.
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// Runs peer discovery for `swarm` on `tracker` until `shutdown`.
pub fn keep(
    client: DispatchClient,
    swarm: Swarm,
    tracker: &TaskTracker,
    shutdown: CancellationToken,
) {
    tracker.spawn(async move {
        let mut pause = PAUSE_MIN;
        loop {
            match exchange_records(&client, &swarm).await {
                Ok(peers) => debug!(peers, "peer records received"),
                Err(error) => debug!(%error, "no peer records from dispatch"),
            }
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(pause) => pause = (pause * 3 / 2).min(PAUSE_MAX),
                () = wait_until_wanted(&swarm) => pause = PAUSE_MIN,
            }
        }
    });
}

/// Waits until a fetch wants more peers, at least [`PAUSE_MIN`].
///
/// # Cancel safety
/// A cancelled call may miss one notification; the next pause is short enough.
async fn wait_until_wanted(swarm: &Swarm) {
    tokio::time::sleep(PAUSE_MIN).await;
    swarm.wait_until_peers_wanted().await;
}

/// Registers this peer with dispatch and takes over the records that dispatch returns. Returns how many.
async fn exchange_records(
    client: &DispatchClient,
    swarm: &Swarm,
) -> Result<usize, muster_protocol::dispatch_client::DispatchClientError> {
    let own = client.sign(swarm.peer_record())?;
    let records = client.peers(Some(&own.bytes)).await?;
    let count = records.len();
    for bytes in records {
        let record = open::<PeerRecord>(bytes, client.run())?;
        swarm.add_peer(record.author, record.body);
    }
    Ok(count)
}
