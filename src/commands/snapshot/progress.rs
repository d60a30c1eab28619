//! Shows the progress of a transfer: a bar on a terminal, lines now and then elsewhere.

use std::io::IsTerminal as _;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::{Instant, MissedTickBehavior, interval};

use muster_monitor::text::{duration, percent, short};

/// Interval between updates of the bar.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Interval between lines without a terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);
/// Template of the bar: bytes, rate, and the remaining time at that rate.
const TEMPLATE: &str = "{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left";

/// Does `work` and shows how many of `total` bytes have arrived; `received` counts from the start.
///
/// # Cancel safety
/// That of `work`.
pub(super) async fn watch<T>(
    what: &str,
    total: u64,
    received: impl Fn() -> u64,
    work: impl Future<Output = T>,
) -> T {
    let bar = bar(what, total);
    let (started, mut said) = (Instant::now(), Instant::now());
    let mut look = interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            biased;
            done = &mut work => {
                match &bar {
                    Some(bar) => bar.finish_and_clear(),
                    // Bytes that were here before are not fetched, so the received ones are all that were missing.
                    None => {
                        let all = received();
                        eprintln!("{}", line(what, all, all, started.elapsed()));
                    }
                }
                return done;
            }
            _ = look.tick() => match &bar {
                Some(bar) => bar.set_position(received()),
                None if said.elapsed() >= LINE_EVERY => {
                    said = Instant::now();
                    eprintln!("{}", line(what, received(), total, started.elapsed()));
                }
                None => {}
            }
        }
    }
}

fn bar(what: &str, total: u64) -> Option<ProgressBar> {
    if !std::io::stderr().is_terminal() {
        return None;
    }
    // The template is a constant and parses; if not, lines show the same.
    let style = ProgressStyle::with_template(TEMPLATE).ok()?;
    Some(
        ProgressBar::new(total)
            .with_style(style)
            .with_message(what.to_owned()),
    )
}

fn line(what: &str, received: u64, total: u64, elapsed: Duration) -> String {
    let seconds = elapsed.as_secs_f64();
    let rate = received as f64 / seconds.max(1e-3);
    let (received_text, total_text) = (short(received as f64), short(total as f64));
    let so_far = format!(
        "{what}: {received_text}B of {total_text}B, {}B/s",
        short(rate)
    );
    if received >= total {
        return format!("{so_far}, in {}", duration(seconds));
    }
    let share = percent(received as f64 / total.max(1) as f64);
    let left = if received > 0 {
        duration((total - received) as f64 / rate)
    } else {
        "unknown time".to_owned()
    };
    format!("{so_far}, {share}, {left} left")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_much_how_fast_and_how_long_yet() {
        let said = |received, total, seconds| {
            line("version 3", received, total, Duration::from_secs(seconds))
        };
        assert_eq!(
            said(2_500_000, 10_000_000, 5),
            "version 3: 2.50MB of 10.0MB, 500kB/s, 25.0 %, 0:15 left"
        );
        assert_eq!(
            said(0, 10_000_000, 5),
            "version 3: 0B of 10.0MB, 0B/s, 0.0 %, unknown time left"
        );
        assert_eq!(
            said(10_000_000, 10_000_000, 20),
            "version 3: 10.0MB of 10.0MB, 500kB/s, in 0:20"
        );
        assert_eq!(said(0, 0, 0), "version 3: 0B of 0B, 0B/s, in 0:00");
    }

    #[tokio::test]
    async fn what_the_work_gives_is_given_back() {
        assert_eq!(watch("nothing", 0, || 0, async { 7 }).await, 7);
    }
}
