//! Being known to the other peers, and knowing them: tells dispatch where this peer can be reached, and meets those that
//! dispatch names. Often at first, when everybody starts at once, and when nobody within reach holds what is wanted, as after
//! the restart of a peer; rarely otherwise.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::debug;

use muster_protocol::dispatch_client::DispatchClient;
use muster_protocol::envelope::open;
use muster_protocol::message::peer::PeerRecord;

use crate::swarm::Swarm;

/// First pause between two asks.
const PAUSE_MIN: Duration = Duration::from_millis(200);
/// Longest pause: well within the time after which dispatch forgets a silent peer.
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// Keeps `swarm` known to the run's peers on `tracker` until `shutdown`.
pub fn keep(
    client: DispatchClient,
    swarm: Swarm,
    tracker: &TaskTracker,
    shutdown: CancellationToken,
) {
    tracker.spawn(async move {
        let mut pause = PAUSE_MIN;
        loop {
            match meet_all(&client, &swarm).await {
                Ok(met) => debug!(met, "peers"),
                Err(error) => debug!(%error, "peers are not known"),
            }
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(pause) => pause = (pause * 3 / 2).min(PAUSE_MAX),
                () = peers_wanted(&swarm) => pause = PAUSE_MIN,
            }
        }
    });
}

/// Returns when other peers are wanted; not more often than everybody asks at the start.
///
/// # Cancel safety
/// A cancelled call may miss one wish; the next pause is not long.
async fn peers_wanted(swarm: &Swarm) {
    tokio::time::sleep(PAUSE_MIN).await;
    swarm.peers_wanted().await;
}

/// Tells dispatch of this peer and meets those that it names. Returns how many.
async fn meet_all(
    client: &DispatchClient,
    swarm: &Swarm,
) -> Result<usize, muster_protocol::dispatch_client::DispatchClientError> {
    let mine = client.sign(swarm.peer_record())?;
    let mut met = 0;
    for bytes in client.peers(Some(&mine.bytes)).await? {
        let record = open::<PeerRecord>(bytes, client.run())?;
        swarm.meet(record.author, record.body);
        met += 1;
    }
    Ok(met)
}
