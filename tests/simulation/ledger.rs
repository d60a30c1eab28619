//! What the simulation saw while it ran: tickets issued, leases that reached a worker, groups admitted and whether they are
//! what their lease prescribes, decisions on their way to a log. Rules that hold at every moment are checked here.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;

use muster_protocol::envelope::open;
use muster_protocol::id::{GroupHash, LeaseId, PeerId, RunId, TicketId};
use muster_protocol::message::control::ControlEvent;
use muster_protocol::message::critique::{Admitted, Joined};
use muster_protocol::message::fate::{Fate, FateRecord};
use muster_protocol::message::group::{Group, Rollout};
use muster_protocol::message::lease::Lease;
use muster_protocol::message::ticket::Ticket;
use muster_protocol::message::version::{Announcement, Version};
use muster_protocol::subject::{Log, Queue};

use crate::table::honest;

/// The run's numbers that rules speak of.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    pub batch_groups: u64,
    pub async_level: u64,
    pub steps: u64,
    pub lease_ms: u64,
}

/// Whether an answer is what its lease prescribes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quality {
    Honest,
    Bad,
}

/// A group that dispatch admitted.
#[derive(Debug, Clone, Copy)]
pub struct Admission {
    pub ticket: TicketId,
    pub quality: Quality,
    pub audit: bool,
}

#[derive(Debug)]
struct Held {
    lease: LeaseId,
    epoch: u64,
    worker: PeerId,
    deadline: u64,
}

#[derive(Debug)]
pub struct Book {
    pub rules: Rules,
    run: RunId,
    pub issued: u64,
    pub newest: u64,
    pub finished: bool,
    pub decided: BTreeMap<TicketId, BTreeSet<Fate>>,
    pub answers: BTreeMap<LeaseId, Quality>,
    pub admitted: BTreeMap<GroupHash, Admission>,
    /// What each life of dispatch drew for a group it tried to store.
    draws: BTreeMap<(u64, GroupHash), bool>,
    lives: u64,
    /// Groups that the critics accepted, and whether a forward pass was made.
    pub accepted: BTreeMap<GroupHash, bool>,
    pub lessees: Vec<PeerId>,
    freed: BTreeSet<TicketId>,
    leases: BTreeMap<TicketId, Vec<Held>>,
    pub violations: Vec<String>,
}

/// A handle to the book.
#[derive(Debug, Clone)]
pub struct Ledger {
    book: Arc<Mutex<Book>>,
}

impl Ledger {
    pub fn new(run: RunId, rules: Rules) -> Self {
        let book = Book {
            rules,
            run,
            issued: 0,
            newest: 0,
            finished: false,
            decided: BTreeMap::new(),
            answers: BTreeMap::new(),
            admitted: BTreeMap::new(),
            draws: BTreeMap::new(),
            lives: 0,
            accepted: BTreeMap::new(),
            lessees: Vec::new(),
            freed: BTreeSet::new(),
            leases: BTreeMap::new(),
            violations: Vec::new(),
        };
        Self {
            book: Arc::new(Mutex::new(book)),
        }
    }

    pub fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap()
    }

    pub fn violation(&self, text: String) {
        self.book().violations.push(text);
    }

    /// Leases that have reached a worker.
    pub fn leased(&self, leases: &[Lease]) {
        let mut book = self.book();
        for lease in leases {
            book.leased(lease);
        }
    }

    /// What a worker is about to submit.
    pub fn answered(&self, leases: &[Lease], groups: &[Vec<Rollout>]) {
        let mut book = self.book();
        for (lease, rollouts) in leases.iter().zip(groups) {
            book.answers.insert(lease.id, quality(lease, rollouts));
        }
    }

    /// A number that no other life has.
    pub fn life_begins(&self) -> u64 {
        let mut book = self.book();
        book.lives += 1;
        book.lives
    }

    /// What came out of a queue: it was stored.
    pub fn taken(&self, queue: Queue, payload: Bytes) {
        if queue == Queue::Intake {
            let mut book = self.book();
            let run = book.run.clone();
            book.admitted(&open::<Admitted>(payload, &run).unwrap().body);
        }
    }

    /// What dispatch is about to store in a queue, in one of its lives.
    pub fn enqueued(&self, queue: Queue, life: u64, payload: Bytes) {
        let mut book = self.book();
        let run = book.run.clone();
        match queue {
            Queue::Tickets => book.issued(open::<Ticket>(payload, &run).unwrap().body.id),
            Queue::Intake => book.drawn(life, &open::<Admitted>(payload, &run).unwrap().body),
            Queue::Ready => {
                let joined = open::<Joined>(payload, &run).unwrap().body;
                book.accepted
                    .insert(GroupHash::of(&joined.group), joined.audited);
            }
        }
    }

    /// What dispatch or the trainer is about to append to a log.
    pub fn appended(&self, log: Log, payload: Bytes) {
        let mut book = self.book();
        let run = book.run.clone();
        match log {
            Log::Fates => {
                let record = open::<FateRecord>(payload, &run).unwrap().body;
                book.decided
                    .entry(record.ticket)
                    .or_default()
                    .insert(record.fate);
                if record.fate.frees_a_place() {
                    book.freed.insert(record.ticket);
                }
            }
            Log::Versions => {
                let announcement = Announcement::decode(&payload).unwrap();
                let version = open::<Version>(announcement.version.into(), &run).unwrap();
                book.newest = book.newest.max(version.body.version.0);
            }
            Log::Control => {
                let event = open::<ControlEvent>(payload, &run).unwrap().body;
                book.finished |= matches!(event, ControlEvent::Finished { .. });
            }
            Log::Batches => {}
        }
    }
}

fn quality(lease: &Lease, rollouts: &[Rollout]) -> Quality {
    match honest(lease) == rollouts {
        true => Quality::Honest,
        false => Quality::Bad,
    }
}

impl Book {
    /// The bound of design §4.1: issued − freed ≤ (v + η + 1)·B, and never more than the steps need.
    fn issued(&mut self, ticket: TicketId) {
        self.issued = self.issued.max(ticket.0);
        let Rules {
            batch_groups,
            async_level,
            steps,
            ..
        } = self.rules;
        let limit = (self.newest + async_level + 1).min(steps) * batch_groups;
        let open = self.issued - self.freed.len() as u64;
        if open > limit {
            let newest = self.newest;
            self.violations
                .push(format!("budget: {open} tickets are issued and not freed under version {newest}, at most {limit} may be"));
        }
    }

    /// Within one life of dispatch, nobody gets a ticket while another's lease of it runs.
    fn leased(&mut self, lease: &Lease) {
        self.lessees.push(lease.worker);
        let given = lease.deadline.0 - self.rules.lease_ms;
        let ticket = lease.ticket.id;
        let earlier = self.leases.entry(ticket).or_default();
        for held in earlier.iter() {
            let another = held.lease != lease.id && held.epoch == lease.epoch;
            if another && held.deadline > given {
                self.violations.push(format!(
                    "lease: ticket {ticket} was leased to {} while the lease of {} ran for another {} ms",
                    lease.worker.short(),
                    held.worker.short(),
                    held.deadline - given
                ));
            }
        }
        earlier.push(Held {
            lease: lease.id,
            epoch: lease.epoch,
            worker: lease.worker,
            deadline: lease.deadline.0,
        });
    }

    fn admitted(&mut self, admitted: &Admitted) {
        let lease = open::<Lease>(admitted.lease.clone().into(), &self.run)
            .unwrap()
            .body;
        let group = open::<Group>(admitted.group.clone().into(), &self.run).unwrap();
        let admission = Admission {
            ticket: lease.ticket.id,
            quality: quality(&lease, &group.body.rollouts),
            audit: admitted.audit,
        };
        let hash = GroupHash::of(&group.bytes);
        self.admitted.insert(hash, admission);
    }

    /// Within one life of dispatch, a group that is submitted again gets the draw that it had.
    fn drawn(&mut self, life: u64, admitted: &Admitted) {
        let group = open::<Group>(admitted.group.clone().into(), &self.run).unwrap();
        let draw = (life, GroupHash::of(&group.bytes));
        if *self.draws.entry(draw).or_insert(admitted.audit) != admitted.audit {
            let lease = group.body.lease;
            self.violations
                .push(format!("audit: the group of lease {lease} was drawn anew"));
        }
    }
}
