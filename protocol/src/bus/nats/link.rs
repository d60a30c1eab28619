//! The state of a connection: up or down, denied permissions, refused credentials. The client library reports these only to
//! a callback, long after the call that they concern has returned. Here a call can wait for them.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_nats::{ClientError, Event, ServerError};
use rand::Rng;
use tokio::sync::{Notify, watch};

use crate::bus::BusError;
use crate::subject::Subjects;

/// Longest pause between two attempts to connect: ten thousand machines then make 700 attempts a second.
const RECONNECT_PAUSE_MAX: Duration = Duration::from_secs(30);
/// The same for a server on this machine, which its parent restarts within a second.
const LOCAL_PAUSE_MAX: Duration = Duration::from_secs(1);
/// Longest pause before the first attempt; it doubles with each. A local server is back within a third of a second.
const RECONNECT_PAUSE_FIRST: Duration = Duration::from_millis(50);
/// The pause of a closed connection: the library has no other way to stop its attempts.
const NEVER: Duration = Duration::from_secs(365 * 24 * 3_600);
/// Refusals in a row after which the credentials count as bad. Fewer may come from a server that reloads its users.
const REFUSALS_MAX: u32 = 3;
/// Denials remembered. A program with more has a bug; the oldest ones are forgotten.
const DENIALS_MAX: usize = 256;
/// Interval at which a waiting call checks the connection itself, in case the library dropped an event.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Whether calls can be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum LinkState {
    Up,
    /// The library is reconnecting.
    Down,
    /// Ended for good; the text says why.
    Closed(String),
}

/// The use that a permission is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    Publish,
    Subscribe,
}

/// The state of one connection, as the library's callback reports it.
#[derive(Debug)]
pub(super) struct Link {
    /// For error texts, as is `servers`.
    pub(super) user: String,
    pub(super) servers: String,
    pause_max: Duration,
    state: watch::Sender<LinkState>,
    denials: Mutex<VecDeque<(Use, String)>>,
    denied: Notify,
    refusals: AtomicU32,
    news_lost: AtomicU64,
}

impl Link {
    pub(super) fn new(user: String, servers: String) -> Self {
        let local = servers.contains("://127.0.0.1:") || servers.contains("://localhost:");
        Self {
            user,
            servers,
            pause_max: if local {
                LOCAL_PAUSE_MAX
            } else {
                RECONNECT_PAUSE_MAX
            },
            state: watch::Sender::new(LinkState::Up),
            denials: Mutex::new(VecDeque::new()),
            denied: Notify::new(),
            refusals: AtomicU32::new(0),
            news_lost: AtomicU64::new(0),
        }
    }

    /// Handles an event of the library.
    pub(super) fn on_event(&self, event: &Event) {
        match event {
            Event::Connected => {
                self.refusals.store(0, Ordering::Relaxed);
                // Denied uses may be permitted now.
                self.lock().clear();
                self.set(LinkState::Up);
            }
            Event::Disconnected => {
                tracing::warn!(servers = self.servers, "connection to the NATS server lost");
                self.set(LinkState::Down);
            }
            Event::ServerError(ServerError::AuthorizationViolation) => self.on_refusal(),
            Event::ServerError(ServerError::Other(text)) => self.on_error(text),
            Event::ServerError(ServerError::SlowConsumer(_)) | Event::SlowConsumer(_) => {
                self.on_lost_news("the client library's buffer was full");
            }
            Event::ClientError(ClientError::Other(text)) if is_refusal(text) => self.on_refusal(),
            Event::ClientError(error) => tracing::debug!(%error, "NATS client"),
            Event::LameDuckMode | Event::Draining | Event::Closed => {
                tracing::debug!(%event, "NATS client");
            }
        }
    }

    /// Counts a message that was dropped because its reader was slow.
    pub(super) fn on_lost_news(&self, reason: &str) {
        let lost = self.news_lost.fetch_add(1, Ordering::Relaxed) + 1;
        if lost.is_power_of_two() {
            tracing::warn!(
                lost,
                reason,
                "messages dropped so far because their readers are slow"
            );
        }
    }

    /// Messages dropped because their reader was slow.
    pub(super) fn news_lost(&self) -> u64 {
        self.news_lost.load(Ordering::Relaxed)
    }

    fn on_error(&self, text: &str) {
        if let Some((usage, subject)) = violation(text) {
            if subject != Subjects::sync(&self.user).as_str() {
                tracing::error!(
                    user = self.user,
                    ?usage,
                    subject,
                    "not permitted by the NATS server"
                );
            } // else the expected reply to `NatsBus::sync`
            let mut denials = self.lock();
            if denials.len() >= DENIALS_MAX {
                denials.pop_front();
            }
            denials.push_back((usage, subject.to_owned()));
            drop(denials);
            self.denied.notify_waiters();
        } else if is_refusal(text) {
            self.on_refusal();
        } else {
            tracing::warn!(text, "NATS server");
        }
    }

    fn on_refusal(&self) {
        let refusals = self.refusals.fetch_add(1, Ordering::Relaxed) + 1;
        if refusals >= REFUSALS_MAX {
            self.set(LinkState::Closed(refused_credentials(
                &self.user,
                &self.servers,
            )));
        }
    }

    /// Ends the connection: every later call fails.
    pub(super) fn close(&self) {
        self.set(LinkState::Closed(
            "this connection to the bus is closed: connect again".to_owned(),
        ));
    }

    /// A closed link stays closed.
    fn set(&self, state: LinkState) {
        self.state.send_if_modified(|current| {
            let changes = !matches!(current, LinkState::Closed(_)) && *current != state;
            if changes {
                *current = state;
            }
            changes
        });
    }

    /// The pause before attempt number `attempts`, from 1, to connect: random, below a bound that doubles.
    pub(super) fn reconnect_pause(&self, attempts: usize) -> Duration {
        if matches!(*self.state.borrow(), LinkState::Closed(_)) {
            return NEVER;
        }
        let doublings = u32::try_from(attempts.saturating_sub(1))
            .unwrap_or(u32::MAX)
            .min(16);
        let bound = (RECONNECT_PAUSE_FIRST * 2u32.pow(doublings)).min(self.pause_max);
        rand::rng().random_range(Duration::ZERO..=bound)
    }

    pub(super) fn is_up(&self) -> bool {
        *self.state.borrow() == LinkState::Up
    }

    /// Waits for the connection, so that no message piles up in the library's buffer. Returns a guard that tells when the
    /// connection is lost.
    pub(super) async fn ready(
        &self,
        client: &async_nats::Client,
        subject: &str,
        timeout: Duration,
    ) -> Result<ConnectionWatch<'_>, BusError> {
        let start = Instant::now();
        let mut state = self.state.subscribe();
        loop {
            match &*state.borrow_and_update() {
                LinkState::Up => break,
                LinkState::Closed(reason) => return Err(BusError::Closed(reason.clone())),
                LinkState::Down => {}
            }
            let Some(left) = timeout.checked_sub(start.elapsed()) else {
                return Err(timed_out(subject, start));
            };
            let look_again = tokio::time::timeout(LOOK_AGAIN.min(left), state.changed()).await;
            let connected = client.connection_state() == async_nats::connection::State::Connected;
            if look_again.is_err() && connected {
                self.set(LinkState::Up);
            }
        }
        Ok(ConnectionWatch {
            link: self,
            state,
            subject: subject.to_owned(),
            start,
        })
    }

    /// Waits until the server has denied this use of `subject` on this connection, before the call or during it.
    ///
    /// # Cancel safety
    /// Holds no state.
    pub(super) async fn denied(&self, usage: Use, subject: &str) -> BusError {
        loop {
            let mut denied = std::pin::pin!(self.denied.notified());
            denied.as_mut().enable();
            if self.was_denied(usage, subject) {
                return BusError::Denied {
                    subject: subject.to_owned(),
                };
            }
            denied.await;
        }
    }

    /// Whether the server has denied this use of `subject` on this connection.
    pub(super) fn was_denied(&self, usage: Use, subject: &str) -> bool {
        self.lock()
            .iter()
            .any(|(denied, about)| *denied == usage && about == subject)
    }

    /// No code panics while it holds the lock, so a poisoned one is still whole.
    fn lock(&self) -> MutexGuard<'_, VecDeque<(Use, String)>> {
        self.denials.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Watches the connection of one call.
pub(super) struct ConnectionWatch<'a> {
    link: &'a Link,
    state: watch::Receiver<LinkState>,
    subject: String,
    start: Instant,
}

impl ConnectionWatch<'_> {
    /// Waits until the connection is lost: no reply will come after that.
    pub(super) async fn lost(&mut self) -> BusError {
        loop {
            if self.state.changed().await.is_err() {
                return BusError::Closed(
                    "the connection to the bus is gone: connect again".to_owned(),
                );
            }
            match &*self.state.borrow_and_update() {
                LinkState::Up => {}
                LinkState::Down => return timed_out(&self.subject, self.start),
                LinkState::Closed(reason) => return BusError::Closed(reason.clone()),
            }
        }
    }

    /// Runs a call that uses `subject` until it ends, is denied, loses its connection or exceeds `timeout`, counted from
    /// [`Link::ready`].
    pub(super) async fn run<T>(
        mut self,
        usage: Use,
        timeout: Duration,
        call: impl Future<Output = Result<T, BusError>>,
    ) -> Result<T, BusError> {
        let (link, start) = (self.link, self.start);
        let subject = self.subject.clone();
        tokio::select! {
            biased;
            denied = link.denied(usage, &subject) => Err(denied),
            result = call => result,
            lost = self.lost() => Err(lost),
            () = tokio::time::sleep(timeout.saturating_sub(start.elapsed())) => {
                Err(timed_out(&subject, start))
            }
        }
    }
}

/// The error of a call that started at `start` and got no reply.
pub(super) fn timed_out(subject: &str, start: Instant) -> BusError {
    let waited_ms = start.elapsed().as_millis() as u64;
    BusError::Timeout {
        subject: subject.to_owned(),
        waited_ms,
    }
}

pub(super) fn refused_credentials(user: &str, servers: &str) -> String {
    format!(
        "the NATS server at {servers} refuses the credentials of {user}: ask the run's lab for valid ones"
    )
}

/// The use and the subject of an error such as `Permissions Violation for Publish to "a.b"`.
fn violation(text: &str) -> Option<(Use, &str)> {
    let lower = text.to_ascii_lowercase();
    let about = lower.find("permissions violation for ")?;
    let usage = &lower[about + "permissions violation for ".len()..];
    let usage = if usage.starts_with("subscription") {
        Use::Subscribe
    } else {
        Use::Publish
    };
    let subject = text.split('"').nth(1)?;
    Some((usage, subject))
}

/// Whether an error means that the server refuses the credentials.
fn is_refusal(text: &str) -> bool {
    let lower = text.to_ascii_lowercase();
    [
        "authorization violation",
        "authentication revoked",
        "authentication expired",
    ]
    .iter()
    .any(|phrase| lower.contains(phrase))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link() -> Link {
        Link::new("UA".to_owned(), "nats://127.0.0.1:1".to_owned())
    }

    #[test]
    fn the_subject_of_a_permission_error_is_found() {
        let publish = "Permissions Violation for Publish to \"muster.r.queue.ready\"";
        assert_eq!(
            violation(publish),
            Some((Use::Publish, "muster.r.queue.ready"))
        );
        let subscribe = "Permissions Violation for Subscription to \"A.b.>\" using queue \"q\"";
        assert_eq!(violation(subscribe), Some((Use::Subscribe, "A.b.>")));
        assert_eq!(violation("Permissions Violation for Publish to"), None);
        assert_eq!(violation("Maximum Payload Violation"), None);
    }

    #[test]
    fn reconnect_pauses_are_drawn_below_a_bound_that_grows() {
        let local = link();
        let remote = Link::new("UA".to_owned(), "nats://lab.example:4222".to_owned());
        for (link, most) in [(&local, LOCAL_PAUSE_MAX), (&remote, RECONNECT_PAUSE_MAX)] {
            for attempts in [0, 1, 2, 3, 40, usize::MAX] {
                let doublings = attempts.saturating_sub(1).min(16) as u32;
                let bound = (RECONNECT_PAUSE_FIRST * 2u32.pow(doublings)).min(most);
                for _ in 0..50 {
                    assert!(link.reconnect_pause(attempts) <= bound);
                }
            }
        }
        let link = local;
        link.close();
        assert_eq!(link.reconnect_pause(1), NEVER);
    }

    #[test]
    fn credentials_refused_several_times_close_the_connection_for_good() {
        let link = link();
        let refusal = Event::ClientError(ClientError::Other("authorization violation".to_owned()));
        for _ in 0..REFUSALS_MAX {
            assert!(link.is_up());
            link.on_event(&refusal);
        }
        link.on_event(&Event::Connected);
        assert!(!link.is_up());
    }

    #[tokio::test]
    async fn a_denial_reaches_the_call_that_it_concerns_and_no_other() {
        let link = link();
        let text = "Permissions Violation for Publish to \"a.b\"".to_owned();
        let (denied, ()) = tokio::join!(link.denied(Use::Publish, "a.b"), async {
            link.on_event(&Event::ServerError(ServerError::Other(text)));
        });
        assert_eq!(
            denied,
            BusError::Denied {
                subject: "a.b".to_owned()
            }
        );
        assert!(!link.was_denied(Use::Subscribe, "a.b") && !link.was_denied(Use::Publish, "a.c"));
        link.on_event(&Event::Connected);
        assert!(!link.was_denied(Use::Publish, "a.b"));
    }
}
