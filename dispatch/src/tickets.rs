//! The ticket table: which tickets are open, which worker holds each, and how many may be open at all.
//!
//! Bound: with batch size B and async level η, under version v,
//! `issued − freed ≤ (min(v + η + 1, steps))·B`, where freed counts the fates that train nothing. Ended tickets leave the
//! table. Knows nothing of workers' merits or of critics.

use std::collections::BTreeMap;

use muster_protocol::id::{LeaseId, PeerId, PolicyVersion, TicketId, UnixMillis};
use muster_protocol::message::fate::Fate;
use muster_protocol::message::ticket::Ticket;

/// What bounds the table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Budget {
    /// Groups per batch, B.
    pub(crate) batch_groups: u64,
    /// Largest staleness, η.
    pub(crate) async_level: u64,
    /// Steps of the run.
    pub(crate) steps: u64,
}

/// Where a ticket is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TicketStage {
    /// No worker holds it.
    Open,
    Leased {
        lease: LeaseId,
        worker: PeerId,
        deadline: UnixMillis,
    },
    /// Its group is with the critics.
    InReview,
    /// Its group is with the trainer.
    Ready,
    /// Its fate is decided and on its way to the log.
    Ending,
}

#[derive(Debug, Clone)]
struct Entry {
    ticket: Ticket,
    stage: TicketStage,
}

/// Open tickets in the order of their numbers.
#[derive(Debug)]
pub(crate) struct TicketTable {
    budget: Budget,
    entries: BTreeMap<TicketId, Entry>,
    issued: u64,
    freed: u64,
}

impl TicketTable {
    pub(crate) fn new(budget: Budget) -> Self {
        Self {
            budget,
            entries: BTreeMap::new(),
            issued: 0,
            freed: 0,
        }
    }

    /// How many tickets were ever issued: the last number.
    pub(crate) fn issued(&self) -> u64 {
        self.issued
    }

    /// Tells how many tickets were issued before, as the queue counts them.
    pub(crate) fn restore_issued(&mut self, issued: u64) {
        self.issued = self.issued.max(issued);
    }

    /// How many more tickets may be issued under `version`.
    pub(crate) fn wanted(&self, version: PolicyVersion) -> u64 {
        let Budget {
            batch_groups,
            async_level,
            steps,
        } = self.budget;
        let horizon = (version.0 + async_level + 1).min(steps);
        (horizon * batch_groups + self.freed).saturating_sub(self.issued)
    }

    /// Takes in a ticket that was issued.
    pub(crate) fn open(&mut self, ticket: Ticket) {
        self.issued = self.issued.max(ticket.id.0);
        self.entries.entry(ticket.id).or_insert(Entry {
            ticket,
            stage: TicketStage::Open,
        });
    }

    /// Takes in a ticket whose group is already with the critics.
    pub(crate) fn restore_in_review(&mut self, ticket: &Ticket) {
        self.entries.insert(
            ticket.id,
            Entry {
                ticket: ticket.clone(),
                stage: TicketStage::InReview,
            },
        );
    }

    /// Whether the ticket has not ended, as far as this table knows.
    pub(crate) fn stage(&self, ticket: TicketId) -> Option<&TicketStage> {
        self.entries.get(&ticket).map(|entry| &entry.stage)
    }

    /// The ticket that a worker that holds `held` should answer now under `version`, if there is one whose turn comes
    /// while that version is still admissible.
    ///
    /// The k-th ticket that has not ended is expected to be trained `k / B` steps from now.
    pub(crate) fn next_open(&self, held: PolicyVersion, version: PolicyVersion) -> Option<&Ticket> {
        for (ahead, entry) in (0..).zip(self.entries.values()) {
            let expected = version.0 + ahead / self.budget.batch_groups;
            if expected > held.0 + self.budget.async_level {
                return None;
            }
            if entry.stage == TicketStage::Open && held >= entry.ticket.oldest_version {
                return Some(&entry.ticket);
            }
        }
        None
    }

    /// Whether some ticket is open, under whatever version.
    pub(crate) fn any_open(&self) -> bool {
        self.entries
            .values()
            .any(|entry| entry.stage == TicketStage::Open)
    }

    /// Moves a ticket to another stage.
    pub(crate) fn advance(&mut self, ticket: TicketId, stage: TicketStage) {
        if let Some(entry) = self.entries.get_mut(&ticket) {
            entry.stage = stage;
        }
    }

    /// Ends a ticket.
    pub(crate) fn end(&mut self, ticket: TicketId, fate: Fate) {
        self.entries.remove(&ticket);
        if fate.frees_a_place() {
            self.freed += 1;
        }
        debug_assert!(
            self.freed <= self.issued,
            "budget of open tickets: {} places freed, {} tickets issued",
            self.freed,
            self.issued
        );
    }

    /// Opens the tickets again whose lease ran out by `now`; returns those leases.
    pub(crate) fn reopen_overdue(&mut self, now: UnixMillis) -> Vec<(TicketId, LeaseId, PeerId)> {
        let mut overdue = Vec::new();
        for (id, entry) in &mut self.entries {
            let TicketStage::Leased {
                lease,
                worker,
                deadline,
            } = entry.stage
            else {
                continue;
            };
            if deadline <= now {
                overdue.push((*id, lease, worker));
                entry.stage = TicketStage::Open;
            }
        }
        overdue
    }

    /// Tickets that a worker holds now.
    pub(crate) fn leased(&self) -> usize {
        let stages = self.entries.values().map(|entry| &entry.stage);
        stages
            .filter(|stage| matches!(stage, TicketStage::Leased { .. }))
            .count()
    }

    /// The tickets whose group is with the critics although their deadline has passed.
    pub(crate) fn overdue_reviews(&self, now: UnixMillis) -> Vec<TicketId> {
        let overdue =
            |entry: &&Entry| entry.stage == TicketStage::InReview && entry.ticket.deadline <= now;
        self.entries
            .values()
            .filter(overdue)
            .map(|entry| entry.ticket.id)
            .collect()
    }

    /// Tickets without an answer at their deadline.
    pub(crate) fn expired(&self, now: UnixMillis) -> Vec<TicketId> {
        let expired = |entry: &&Entry| {
            let unanswered = matches!(entry.stage, TicketStage::Open | TicketStage::Leased { .. });
            unanswered && entry.ticket.deadline <= now
        };
        self.entries
            .values()
            .filter(expired)
            .map(|entry| entry.ticket.id)
            .collect()
    }

    /// Tickets whose fate is dispatch's to decide and not decided: what a run that ends supersedes.
    pub(crate) fn unanswered(&self) -> Vec<TicketId> {
        let open =
            |entry: &&Entry| !matches!(entry.stage, TicketStage::Ready | TicketStage::Ending);
        self.entries
            .values()
            .filter(open)
            .map(|entry| entry.ticket.id)
            .collect()
    }

    /// Tickets that have not ended.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use muster_protocol::message::ticket::SamplingRules;
    use muster_protocol::testing;

    fn table() -> TicketTable {
        TicketTable::new(Budget {
            batch_groups: 2,
            async_level: 1,
            steps: 10,
        })
    }

    fn ticket(id: u64) -> Ticket {
        Ticket {
            id: TicketId(id),
            item: id,
            sampling: SamplingRules {
                temperature: 1.0,
                tokens_max: 8,
                stop_ids: vec![0],
                stop_strings: Vec::new(),
            },
            deadline: UnixMillis(1_000),
            ..testing::ticket()
        }
    }

    fn issue(table: &mut TicketTable, count: u64) {
        for id in table.issued() + 1..=table.issued() + count {
            table.open(ticket(id));
        }
    }

    #[test]
    fn open_tickets_are_bounded_by_version_and_async_level() {
        let mut table = table();
        assert_eq!(table.wanted(PolicyVersion(0)), 4);
        issue(&mut table, 4);
        assert_eq!(table.wanted(PolicyVersion(0)), 0);
        assert_eq!(table.wanted(PolicyVersion(1)), 2);
    }

    #[test]
    fn a_fate_that_trains_nothing_frees_its_place() {
        let mut table = table();
        issue(&mut table, 4);
        table.end(TicketId(1), Fate::NoSignal);
        assert_eq!(table.wanted(PolicyVersion(0)), 1);
        table.end(TicketId(2), Fate::Trained);
        assert_eq!(table.wanted(PolicyVersion(0)), 1);
    }

    #[test]
    fn no_more_tickets_are_issued_than_the_steps_need() {
        let mut table = table();
        issue(&mut table, 20);
        assert_eq!(table.wanted(PolicyVersion(9)), 0);
    }

    #[test]
    fn a_ticket_is_not_leased_under_a_version_that_will_be_too_old_in_its_turn() {
        let mut table = table();
        issue(&mut table, 4);
        let (old, new) = (PolicyVersion(3), PolicyVersion(4));
        for id in [1, 2] {
            assert_eq!(table.next_open(old, new).unwrap().id, TicketId(id));
            table.advance(TicketId(id), TicketStage::Ready);
        }
        assert!(table.next_open(old, new).is_none());
        assert_eq!(table.next_open(new, new).unwrap().id, TicketId(3));
    }

    #[test]
    fn an_overdue_lease_opens_its_ticket_again() {
        let mut table = table();
        issue(&mut table, 1);
        let lease = LeaseId([1; 16]);
        let worker = PeerId([2; 32]);
        let deadline = UnixMillis(50);
        table.advance(
            TicketId(1),
            TicketStage::Leased {
                lease,
                worker,
                deadline,
            },
        );
        assert!(table.reopen_overdue(UnixMillis(49)).is_empty());
        assert_eq!(
            table.reopen_overdue(UnixMillis(50)),
            [(TicketId(1), lease, worker)]
        );
        assert_eq!(table.stage(TicketId(1)), Some(&TicketStage::Open));
    }

    #[test]
    fn only_unanswered_tickets_expire() {
        let mut table = table();
        issue(&mut table, 2);
        table.advance(TicketId(2), TicketStage::InReview);
        assert_eq!(table.expired(UnixMillis(1_000)), [TicketId(1)]);
    }
}
