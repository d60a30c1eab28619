//! Observes a run: tickets issued, leases that reached a worker, groups admitted and whether they are what their lease
//! prescribes, and decisions before they are appended to a log. Rules that must hold at every moment are checked here.

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

/// The settings of the run that the rules refer to.
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
struct GivenLease {
    lease: LeaseId,
    epoch: u64,
    worker: PeerId,
    deadline: u64,
}

#[derive(Debug)]
pub struct Observations {
    pub rules: Rules,
    run: RunId,
    pub issued: u64,
    pub newest: u64,
    pub finished: bool,
    pub decided: BTreeMap<TicketId, BTreeSet<Fate>>,
    pub answers: BTreeMap<LeaseId, Quality>,
    pub admitted: BTreeMap<GroupHash, Admission>,
    /// Whether a group was drawn for an audit, by connection of dispatch and group.
    draws: BTreeMap<(u64, GroupHash), bool>,
    connections: u64,
    /// Groups that the critics accepted, with whether they were audited.
    pub accepted: BTreeMap<GroupHash, bool>,
    pub lessees: Vec<PeerId>,
    freed: BTreeSet<TicketId>,
    leases: BTreeMap<TicketId, Vec<GivenLease>>,
    pub violations: Vec<String>,
}

/// A handle to the seen.
#[derive(Debug, Clone)]
pub struct Observer {
    observations: Arc<Mutex<Observations>>,
}

impl Observer {
    pub fn new(run: RunId, rules: Rules) -> Self {
        let observations = Observations {
            rules,
            run,
            issued: 0,
            newest: 0,
            finished: false,
            decided: BTreeMap::new(),
            answers: BTreeMap::new(),
            admitted: BTreeMap::new(),
            draws: BTreeMap::new(),
            connections: 0,
            accepted: BTreeMap::new(),
            lessees: Vec::new(),
            freed: BTreeSet::new(),
            leases: BTreeMap::new(),
            violations: Vec::new(),
        };
        Self {
            observations: Arc::new(Mutex::new(observations)),
        }
    }

    pub fn observations(&self) -> MutexGuard<'_, Observations> {
        self.observations.lock().unwrap()
    }

    pub fn violation(&self, text: String) {
        self.observations().violations.push(text);
    }

    /// Notes leases that have reached a worker.
    pub fn leased(&self, leases: &[Lease]) {
        let mut seen = self.observations();
        for lease in leases {
            seen.leased(lease);
        }
    }

    /// Notes the groups that a worker is about to submit.
    pub fn answered(&self, leases: &[Lease], groups: &[Vec<Rollout>]) {
        let mut seen = self.observations();
        for (lease, rollouts) in leases.iter().zip(groups) {
            seen.answers.insert(lease.id, quality(lease, rollouts));
        }
    }

    /// Number of a new connection of a lab process.
    pub fn new_connection(&self) -> u64 {
        let mut seen = self.observations();
        seen.connections += 1;
        seen.connections
    }

    /// Notes a message that was taken from a queue, so that it had been stored.
    pub fn taken(&self, queue: Queue, payload: Bytes) {
        if queue == Queue::Intake {
            let mut seen = self.observations();
            let run = seen.run.clone();
            seen.admitted(&open::<Admitted>(payload, &run).unwrap().body);
        }
    }

    /// Notes a message that dispatch is about to store in a queue.
    pub fn enqueued(&self, queue: Queue, connection: u64, payload: Bytes) {
        let mut seen = self.observations();
        let run = seen.run.clone();
        match queue {
            Queue::Tickets => seen.issued(open::<Ticket>(payload, &run).unwrap().body.id),
            Queue::Intake => seen.drawn(connection, &open::<Admitted>(payload, &run).unwrap().body),
            Queue::Ready => {
                let joined = open::<Joined>(payload, &run).unwrap().body;
                seen.accepted
                    .insert(GroupHash::of(&joined.group), joined.audited);
            }
        }
    }

    /// Notes a record that dispatch or the trainer is about to append to a log.
    pub fn appended(&self, log: Log, payload: Bytes) {
        let mut seen = self.observations();
        let run = seen.run.clone();
        match log {
            Log::Fates => {
                let record = open::<FateRecord>(payload, &run).unwrap().body;
                seen.decided
                    .entry(record.ticket)
                    .or_default()
                    .insert(record.fate);
                if record.fate.frees_a_place() {
                    seen.freed.insert(record.ticket);
                }
            }
            Log::Versions => {
                let announcement = Announcement::decode(&payload).unwrap();
                let version = open::<Version>(announcement.version.into(), &run).unwrap();
                seen.newest = seen.newest.max(version.body.version.0);
            }
            Log::Control => {
                let event = open::<ControlEvent>(payload, &run).unwrap().body;
                seen.finished |= matches!(event, ControlEvent::Finished { .. });
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

impl Observations {
    /// Checks the budget of open tickets: issued − freed ≤ (v + η + 1)·B, and never more than the steps need.
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

    /// Checks that dispatch, between two restarts, never leases a ticket while an earlier lease of it runs.
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
        earlier.push(GivenLease {
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

    /// Checks that dispatch, between two restarts, draws the same audit for a group that is submitted again.
    fn drawn(&mut self, connection: u64, admitted: &Admitted) {
        let group = open::<Group>(admitted.group.clone().into(), &self.run).unwrap();
        let draw = (connection, GroupHash::of(&group.bytes));
        if *self.draws.entry(draw).or_insert(admitted.audit) != admitted.audit {
            let lease = group.body.lease;
            self.violations.push(format!(
                "audit: the group of lease {lease} got another draw"
            ));
        }
    }
}
