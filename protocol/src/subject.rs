//! Every subject, queue and log of a run, in one place; and which role may use which.
//!
//! A volunteer's user name stands at a fixed token, so that the server's permissions pin it: a subject says who asks.
//! Volunteers hold no JetStream, key-value or ack subject at all (attacks that work otherwise:
//! `research/nats-backbone.md` §4).

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::id::RunId;
use crate::limits::{
    CARRIER_BYTES_MAX, MANIFEST_BYTES_MAX, STATEMENT_BYTES_MAX, VERSION_BYTES_MAX,
};

/// A subject: tokens joined by dots.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Subject(String);

impl Subject {
    /// The subject as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether `self`, a pattern with `*` for one token and `>` for the rest, covers `subject`, which may be a pattern.
    pub fn covers(&self, subject: &Subject) -> bool {
        let mut wanted = self.0.split('.');
        let mut found = subject.0.split('.');
        loop {
            match (wanted.next(), found.next()) {
                (Some(">"), Some(_)) => return true,
                (Some("*"), Some(f)) if f != ">" => {}
                (Some(w), Some(f)) if w == f => {}
                (None, None) => return true,
                _ => return false,
            }
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<String> for Subject {
    fn from(text: String) -> Self {
        Self(text)
    }
}

/// What can be asked of dispatch. The asker's user name follows as the last token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum Verb {
    Lease,
    Submit,
    Critique,
    Verdict,
    Latest,
    Peers,
    Receipt,
    Control,
    Descriptor,
    Deltas,
}

impl Verb {
    /// All of them.
    pub const ALL: [Verb; 10] = [
        Verb::Lease,
        Verb::Submit,
        Verb::Critique,
        Verb::Verdict,
        Verb::Latest,
        Verb::Peers,
        Verb::Receipt,
        Verb::Control,
        Verb::Descriptor,
        Verb::Deltas,
    ];

    /// Its subject token.
    pub fn token(self) -> &'static str {
        match self {
            Verb::Lease => "lease",
            Verb::Submit => "submit",
            Verb::Critique => "critique",
            Verb::Verdict => "verdict",
            Verb::Latest => "latest",
            Verb::Peers => "peers",
            Verb::Receipt => "receipt",
            Verb::Control => "control",
            Verb::Descriptor => "descriptor",
            Verb::Deltas => "deltas",
        }
    }
}

/// Which part a machine plays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Role {
    Dispatch,
    Trainer,
    Worker,
    Critic,
    Seeder,
    Evaluator,
}

impl Role {
    /// Whether the role is the lab's: it alone reads and writes queues and logs.
    pub fn is_lab(self) -> bool {
        matches!(self, Role::Dispatch | Role::Trainer)
    }

    /// Whether the role stays to pass weights on, so that it may describe squashed deltas. The learner's time is the step's,
    /// and an evaluator leaves with what it came for.
    pub fn squashes(self) -> bool {
        matches!(self, Role::Worker | Role::Critic | Role::Seeder)
    }

    /// What a role may ask of dispatch.
    pub fn verbs(self) -> &'static [Verb] {
        use Verb::{
            Control, Critique, Deltas, Descriptor, Latest, Lease, Peers, Receipt, Submit, Verdict,
        };
        match self {
            Role::Dispatch | Role::Trainer => &Verb::ALL,
            Role::Worker => &[
                Lease, Submit, Latest, Peers, Receipt, Control, Descriptor, Deltas,
            ],
            Role::Critic => &[
                Critique, Verdict, Latest, Peers, Control, Descriptor, Deltas,
            ],
            Role::Seeder | Role::Evaluator => &[Latest, Peers, Control, Descriptor, Deltas],
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Dispatch => "dispatch",
            Role::Trainer => "trainer",
            Role::Worker => "worker",
            Role::Critic => "critic",
            Role::Seeder => "seeder",
            Role::Evaluator => "evaluator",
        })
    }
}

/// A durable work queue: each message is taken by one reader and stays until it is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Queue {
    /// What to answer: dispatch to itself. A ticket's id is its sequence number here.
    Tickets,
    /// Groups admitted and not yet judged: dispatch to itself.
    Intake,
    /// Groups joined with their verdicts: dispatch to the trainer.
    Ready,
}

/// A durable log: appended, numbered from 1, never removed from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Log {
    /// Batch manifests, one per step and generation, by the trainer.
    Batches,
    /// Signed versions, by the trainer.
    Versions,
    /// Every ticket's fate, by whoever owned the ticket when it ended.
    Fates,
    /// Pause, resume, stop; starts of dispatch and trainer (their generations).
    Control,
}

/// The bounds of a queue or log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamLimits {
    /// Most messages held; a full queue refuses, a log is refused by its server's storage alone when `None`.
    pub messages_max: Option<u64>,
    /// Most bytes held.
    pub bytes_max: u64,
    /// Largest message.
    pub message_bytes_max: usize,
    /// How long a message that was taken may stay unacknowledged before it is handed out again.
    pub ack_wait: Duration,
    /// How long a key is remembered, so that a second message with it is not stored.
    pub duplicate_window: Duration,
}

/// Tickets that may be open at once: far above (η + 1)·B of any configuration that validates.
const TICKETS_OPEN_MAX: u64 = 65_536;
/// A queue's share of the disk. 16,384 groups of 256 KiB.
const QUEUE_BYTES_MAX: u64 = 4 << 30;
/// A log's share of the disk. A fate is about 300 bytes: 3.5 million tickets.
const LOG_BYTES_MAX: u64 = 1 << 30;
/// Longer than any redelivery horizon, so that a replay after a crash is recognised.
const DUPLICATE_WINDOW: Duration = Duration::from_secs(600);

impl Queue {
    /// All of them.
    pub const ALL: [Queue; 3] = [Queue::Tickets, Queue::Intake, Queue::Ready];

    /// Its token in subjects and stream names.
    pub fn token(self) -> &'static str {
        match self {
            Queue::Tickets => "tickets",
            Queue::Intake => "intake",
            Queue::Ready => "ready",
        }
    }

    /// Its bounds. Readers renew what they hold, so `ack_wait` only times how soon a dead reader's work is given on.
    pub fn limits(self) -> StreamLimits {
        let message_bytes_max = match self {
            Queue::Tickets => STATEMENT_BYTES_MAX,
            Queue::Intake | Queue::Ready => CARRIER_BYTES_MAX,
        };
        StreamLimits {
            messages_max: Some(TICKETS_OPEN_MAX),
            bytes_max: QUEUE_BYTES_MAX,
            message_bytes_max,
            ack_wait: Duration::from_secs(600),
            duplicate_window: DUPLICATE_WINDOW,
        }
    }
}

impl Log {
    /// All of them.
    pub const ALL: [Log; 4] = [Log::Batches, Log::Versions, Log::Fates, Log::Control];

    /// Its token in subjects and stream names.
    pub fn token(self) -> &'static str {
        match self {
            Log::Batches => "batches",
            Log::Versions => "versions",
            Log::Fates => "fates",
            Log::Control => "control",
        }
    }

    /// Its bounds.
    pub fn limits(self) -> StreamLimits {
        let message_bytes_max = match self {
            Log::Batches => MANIFEST_BYTES_MAX,
            Log::Versions => VERSION_BYTES_MAX,
            Log::Fates | Log::Control => STATEMENT_BYTES_MAX,
        };
        StreamLimits {
            messages_max: None,
            bytes_max: LOG_BYTES_MAX,
            message_bytes_max,
            ack_wait: Duration::from_secs(30),
            duplicate_window: DUPLICATE_WINDOW,
        }
    }
}

/// The subjects of one run.
#[derive(Debug, Clone)]
pub struct Subjects {
    run: RunId,
}

impl Subjects {
    /// The subjects of `run`.
    pub fn of(run: &RunId) -> Self {
        Self { run: run.clone() }
    }

    /// Where `user` asks dispatch for `verb`.
    pub fn ask(&self, verb: Verb, user: &str) -> Subject {
        Subject(format!("muster.{}.ask.{}.{user}", self.run, verb.token()))
    }

    /// Where everybody's requests for `verb` arrive.
    pub fn asks(&self, verb: Verb) -> Subject {
        Subject(format!("muster.{}.ask.{}.*", self.run, verb.token()))
    }

    /// Where everybody's requests for anything arrive.
    pub fn all_asks(&self) -> Subject {
        Subject(format!("muster.{}.ask.*.*", self.run))
    }

    /// All news of the run.
    pub fn all_news(&self) -> Subject {
        Subject(format!("muster.{}.news.*", self.run))
    }

    /// News for all: a new version was made, or control changed. Carries the log's record.
    pub fn news(&self, log: Log) -> Subject {
        Subject(format!("muster.{}.news.{}", self.run, log.token()))
    }

    /// News for one member: receipts.
    pub fn note(&self, user: &str) -> Subject {
        Subject(format!("muster.{}.note.{user}", self.run))
    }

    /// Where a queue's messages are published.
    pub fn queue(&self, queue: Queue) -> Subject {
        Subject(format!("muster.{}.queue.{}", self.run, queue.token()))
    }

    /// Where a log's records are published.
    pub fn log(&self, log: Log) -> Subject {
        Subject(format!("muster.{}.log.{}", self.run, log.token()))
    }

    /// The name of a queue's or log's stream: no dots, no spaces.
    pub fn stream(&self, token: &str) -> String {
        format!(
            "MUSTER_{}_{}",
            self.run.as_str().to_uppercase(),
            token.to_uppercase()
        )
    }

    /// Prefix of the inboxes that `user`'s replies come to. The name is a token of its own, since a `*` inside a token
    /// is no wildcard to the server, and who answers must be allowed to write to everybody's inbox.
    pub fn inbox_prefix(user: &str) -> String {
        format!("_INBOX.{user}")
    }

    /// Whether `address` is in the inbox of `user`, whose name is one token.
    pub fn is_inbox_of(user: &str, address: &str) -> bool {
        let within = address
            .strip_prefix("_INBOX.")
            .and_then(|rest| rest.strip_prefix(user));
        !user.is_empty() && within.is_some_and(|rest| rest.len() > 1 && rest.starts_with('.'))
    }

    /// Where `user` asks and nobody may listen: the server's refusal comes back in order, after the refusals of what
    /// was sent before.
    pub fn sync(user: &str) -> Subject {
        Subject(format!("_SYNC.{user}"))
    }
}

/// What a member may publish and subscribe to, as subject patterns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Permissions {
    /// Patterns it may publish on.
    pub publish: Vec<String>,
    /// Patterns it may subscribe to.
    pub subscribe: Vec<String>,
}

impl Permissions {
    /// What `role` under the name `user` may do in `run`. The lab's roles may do everything in their run and use
    /// JetStream; the rest ask, listen to news and read their own notes.
    pub fn of(role: Role, user: &str, run: &RunId) -> Self {
        let subjects = Subjects::of(run);
        let inbox = format!("{}.>", Subjects::inbox_prefix(user));
        if role.is_lab() {
            let publish = vec![
                format!("muster.{run}.>"),
                "$JS.API.>".to_owned(),
                "$JS.ACK.>".to_owned(),
                "_INBOX.*.>".to_owned(),
                Subjects::sync(user).0,
            ];
            return Self {
                publish,
                subscribe: vec![format!("muster.{run}.>"), inbox],
            };
        }
        let publish = role
            .verbs()
            .iter()
            .map(|verb| subjects.ask(*verb, user).0)
            .collect();
        let subscribe = vec![format!("muster.{run}.news.*"), subjects.note(user).0, inbox];
        Self { publish, subscribe }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject(text: &str) -> Subject {
        Subject(text.to_owned())
    }

    #[test]
    fn a_pattern_covers_one_token_per_star_and_the_rest_after_a_greater_sign() {
        assert!(subject("a.*.c").covers(&subject("a.b.c")));
        assert!(!subject("a.*").covers(&subject("a.b.c")));
        assert!(subject("a.>").covers(&subject("a.b.c")));
        assert!(!subject("a.>").covers(&subject("a")));
        assert!(!subject("a.*").covers(&subject("a.>")));
    }

    #[test]
    fn no_volunteer_holds_a_jetstream_right_or_anothers_subject() {
        let run: RunId = "r".parse().unwrap();
        for role in [Role::Worker, Role::Critic, Role::Seeder, Role::Evaluator] {
            let permissions = Permissions::of(role, "UA", &run);
            for pattern in permissions.publish.iter().chain(&permissions.subscribe) {
                assert!(
                    !pattern.starts_with('$') && pattern != ">",
                    "{role}: {pattern}"
                );
            }
            for forbidden in [
                "muster.r.ask.submit.UB",
                "muster.r.queue.ready",
                "muster.r.log.fates",
                "_INBOX.UB.x",
            ] {
                let covered = permissions
                    .publish
                    .iter()
                    .any(|p| subject(p).covers(&subject(forbidden)));
                assert!(!covered, "{role} may publish {forbidden}");
            }
        }
    }
}
