//! Ctrl-C and SIGTERM: the first drains, the second stops at once.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Exit code of a process that was told twice to stop, as shells count it.
const EXIT_INTERRUPTED: i32 = 130;

/// Cancels `shutdown` at the first Ctrl-C or SIGTERM; ends the process at the second.
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
        }
        exit_now();
    };
    drop(tracker.clone());
    tokio::spawn(watch);
}

#[allow(clippy::exit)]
fn exit_now() {
    std::process::exit(EXIT_INTERRUPTED);
}
