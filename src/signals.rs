//! Ctrl-C and SIGTERM: the first drains, the second stops at once. A child is sent SIGTERM when its parent dies, and must
//! not outlive it by more than a moment.

use std::os::unix::process::parent_id;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How long a process drains whose parent is gone: nobody is left to end it, and what it waits for may have gone as well.
const ORPHAN_DRAIN: Duration = Duration::from_secs(3);
/// How often it is looked whether the parent is still there.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Exit code of a process that was told twice to stop, as shells count it.
const EXIT_INTERRUPTED: i32 = 130;

/// Cancels `shutdown` at the first Ctrl-C or SIGTERM; ends the process at the second, or when its parent is gone and it has
/// had its time.
pub fn cancel_on_signal(tracker: &TaskTracker, shutdown: &CancellationToken) {
    let shutdown = shutdown.clone();
    let (interrupt, terminate) = (
        signal(SignalKind::interrupt()),
        signal(SignalKind::terminate()),
    );
    let (Ok(mut interrupt), Ok(mut terminate)) = (interrupt, terminate) else {
        tracing::warn!("signals cannot be heard: stop this process with SIGKILL");
        return;
    };
    let parent = parent_id();
    // Not on the tracker: it waits for a second signal while the tracker's tasks end.
    let watch = async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        shutdown.cancel();
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            () = orphaned(parent) => {}
        }
        exit_now();
    };
    drop(tracker.clone());
    tokio::spawn(watch);
}

/// Returns when a process whose parent was `parent` has outlived it long enough.
async fn orphaned(parent: u32) {
    while parent_id() == parent {
        tokio::time::sleep(LOOK_EVERY).await;
    }
    tokio::time::sleep(ORPHAN_DRAIN).await;
}

#[allow(clippy::exit)]
fn exit_now() {
    std::process::exit(EXIT_INTERRUPTED);
}
