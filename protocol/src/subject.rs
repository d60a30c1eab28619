//! Every subject, queue and log of a run, and the permissions of each role.
//!
//! A user name stands at a fixed token of a subject, so that the server's permissions pin it and the subject identifies the
//! sender. Volunteers hold no JetStream, key-value or ack subject: with one they could read, acknowledge or delete the work of
//! others.

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

/// A kind of request to dispatch. The sender's user name follows as the last token of the subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
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

/// The part that a machine plays in a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Dispatch,
    Trainer,
    Worker,
    Critic,
    Seeder,
    Evaluator,
}

impl Role {
    /// Whether the role is the lab's. Only the lab's roles read and write queues and logs.
    pub fn is_lab(self) -> bool {
        matches!(self, Role::Dispatch | Role::Trainer)
    }

    /// Whether the role makes squashed deltas. The trainer spends its time on steps, and an evaluator leaves soon.
    pub fn squashes(self) -> bool {
        matches!(self, Role::Worker | Role::Critic | Role::Seeder)
    }

    /// The requests that the role may send to dispatch.
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
    /// Tickets, from dispatch to itself. A ticket's id is its sequence number here.
    Tickets,
    /// Groups that are admitted and not yet judged, from dispatch to itself.
    Intake,
    /// Groups joined with their verdicts, from dispatch to the trainer.
    Ready,
}

/// A durable log: append-only, numbered from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Log {
    /// Batch manifests, one per step and generation, by the trainer.
    Batches,
    /// Signed versions, by the trainer.
    Versions,
    /// The fate of every ticket, by dispatch or the trainer.
    Fates,
    /// Pauses, resumptions, the end, and the starts of dispatch and trainer (their generations).
    Control,
}

/// The bounds of a queue or log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamLimits {
    /// Most messages held. `None`: only `bytes_max` bounds the stream.
    pub messages_max: Option<u64>,
    /// Most bytes held.
    pub bytes_max: u64,
    /// Most bytes of one message.
    pub message_bytes_max: usize,
    /// How long a delivery may stay unacknowledged before the message is delivered again.
    pub ack_wait: Duration,
    /// How long a key is remembered: a second message with it is not stored.
    pub duplicate_window: Duration,
}

/// Tickets that may be open at once: far above (η + 1)·B of any configuration that validates.
const TICKETS_OPEN_MAX: u64 = 65_536;
/// A queue's share of the disk. 16,384 groups of 256 KiB.
const QUEUE_BYTES_MAX: u64 = 4 << 30;
/// A log's share of the disk. A fate is about 300 bytes: 3.5 million tickets.
const LOG_BYTES_MAX: u64 = 1 << 30;
/// Longer than any message can wait for redelivery, so that a replay after a crash is recognised.
const DUPLICATE_WINDOW: Duration = Duration::from_secs(600);

impl Queue {
    pub const ALL: [Queue; 3] = [Queue::Tickets, Queue::Intake, Queue::Ready];

    pub fn token(self) -> &'static str {
        match self {
            Queue::Tickets => "tickets",
            Queue::Intake => "intake",
            Queue::Ready => "ready",
        }
    }

    /// Readers renew their deliveries, so `ack_wait` only bounds the delay after a reader has died.
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
    pub const ALL: [Log; 4] = [Log::Batches, Log::Versions, Log::Fates, Log::Control];

    pub fn token(self) -> &'static str {
        match self {
            Log::Batches => "batches",
            Log::Versions => "versions",
            Log::Fates => "fates",
            Log::Control => "control",
        }
    }

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
    pub fn of(run: &RunId) -> Self {
        Self { run: run.clone() }
    }

    /// The subject of `user`'s requests for `verb`.
    pub fn ask(&self, verb: Verb, user: &str) -> Subject {
        Subject(format!("muster.{}.ask.{}.{user}", self.run, verb.token()))
    }

    /// The pattern of all requests for `verb`.
    pub fn asks(&self, verb: Verb) -> Subject {
        Subject(format!("muster.{}.ask.{}.*", self.run, verb.token()))
    }

    /// The pattern of all requests.
    pub fn all_asks(&self) -> Subject {
        Subject(format!("muster.{}.ask.*.*", self.run))
    }

    /// The pattern of all news.
    pub fn all_news(&self) -> Subject {
        Subject(format!("muster.{}.news.*", self.run))
    }

    /// News for every member: a new version, or a change of control. A message carries the log's record.
    pub fn news(&self, log: Log) -> Subject {
        Subject(format!("muster.{}.news.{}", self.run, log.token()))
    }

    /// News for one member: receipts.
    pub fn note(&self, user: &str) -> Subject {
        Subject(format!("muster.{}.note.{user}", self.run))
    }

    pub fn queue(&self, queue: Queue) -> Subject {
        Subject(format!("muster.{}.queue.{}", self.run, queue.token()))
    }

    pub fn log(&self, log: Log) -> Subject {
        Subject(format!("muster.{}.log.{}", self.run, log.token()))
    }

    /// The name of a queue's or log's JetStream stream.
    pub fn stream(&self, token: &str) -> String {
        format!(
            "MUSTER_{}_{}",
            self.run.as_str().to_uppercase(),
            token.to_uppercase()
        )
    }

    /// Prefix of `user`'s reply inboxes. The name is a token of its own: a `*` inside a token is not a wildcard, and dispatch
    /// needs the permission to write to every inbox.
    pub(crate) fn inbox_prefix(user: &str) -> String {
        format!("_INBOX.{user}")
    }

    /// Whether `address` is in the inbox of `user`, whose name is one token.
    pub(crate) fn is_inbox_of(user: &str, address: &str) -> bool {
        let within = address
            .strip_prefix("_INBOX.")
            .and_then(|rest| rest.strip_prefix(user));
        !user.is_empty() && within.is_some_and(|rest| rest.len() > 1 && rest.starts_with('.'))
    }

    /// A subject on which `user` may request and no member may listen. The server's refusal arrives in order, after its
    /// refusals of earlier messages.
    pub fn sync(user: &str) -> Subject {
        Subject(format!("_SYNC.{user}"))
    }
}

/// The subject patterns that a member may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Permissions {
    pub publish: Vec<String>,
    pub subscribe: Vec<String>,
}

impl Permissions {
    /// The permissions of `role` under the name `user`. The lab's roles may use every subject of their run and JetStream.
    /// The others may send requests, listen to news and read their own notes.
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
