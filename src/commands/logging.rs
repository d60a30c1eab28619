//! The logs of a process: where they go and which of them are kept.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

/// Logs on stderr. `MUSTER_LOG` chooses what; the default is `info` of our own crates and, if stderr is a file, the life of each
/// group.
pub(super) fn to_stderr() {
    let filter = EnvFilter::try_from_env("MUSTER_LOG").unwrap_or_else(|_| {
        let mut filter = LOG_FILTER.to_owned();
        if !std::io::stderr().is_terminal() {
            filter += &format!(",{}=debug", muster_protocol::life::TARGET);
        }
        EnvFilter::new(filter)
    });
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false);
    if subscriber.try_init().is_err() {
        eprintln!("muster: logs were set up twice");
    }
}

/// Logs above the display, so that lines do not tear it.
pub(super) fn to_screen(screen: &muster_monitor::screen::Screen) {
    let filter =
        EnvFilter::try_from_env("MUSTER_LOG").unwrap_or_else(|_| EnvFilter::new(LOG_FILTER));
    let writer = screen.log_writer();
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(move || writer.clone())
        .with_ansi(false);
    if subscriber.try_init().is_err() {
        eprintln!("muster: logs were set up twice");
    }
}

/// The filter of logs unless `MUSTER_LOG` is set.
const LOG_FILTER: &str = "warn,muster=info,muster_protocol=info,muster_rollout=info,muster_rewards=info,\
                          muster_dispatch=info,muster_learner=info,muster_broadcaster=info";
