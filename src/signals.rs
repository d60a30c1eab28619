//! Ctrl-C and SIGTERM: the first signal makes the process finish its work and exit, the second ends it at once. The system
//! sends a child SIGTERM when its parent dies; the child then ends within [`ORPHAN_DRAIN`].

use std::os::unix::process::parent_id;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// An orphaned process ends after this time, since no parent is left to kill it and its peers may be gone too.
const ORPHAN_DRAIN: Duration = Duration::from_secs(3);
/// Interval between checks of the parent.
const CHECK_EVERY: Duration = Duration::from_millis(200);
/// Exit code after two signals, the shells' code for SIGINT.
const EXIT_INTERRUPTED: i32 = 130;

/// Cancels `shutdown` at the first Ctrl-C or SIGTERM. Ends the process at the second, or [`ORPHAN_DRAIN`] after its parent
/// died.
pub fn cancel_on_signal(shutdown: &CancellationToken) {
    let shutdown = shutdown.clone();
    let (interrupt, terminate) = (
        signal(SignalKind::interrupt()),
        signal(SignalKind::terminate()),
    );
    let (Ok(mut interrupt), Ok(mut terminate)) = (interrupt, terminate) else {
        tracing::warn!("this process cannot receive Ctrl-C or SIGTERM: stop it with SIGKILL");
        return;
    };
    let parent = parent_id();
    // On no tracker: this task waits for a second signal while tracked tasks end.
    tokio::spawn(async move {
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
    });
}

/// Returns [`ORPHAN_DRAIN`] after the death of the process `parent`.
async fn orphaned(parent: u32) {
    while parent_id() == parent {
        tokio::time::sleep(CHECK_EVERY).await;
    }
    tokio::time::sleep(ORPHAN_DRAIN).await;
}

#[allow(clippy::exit)]
fn exit_now() {
    std::process::exit(EXIT_INTERRUPTED);
}
