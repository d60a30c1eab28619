//! Takes joined groups from the ready queue, has them opened and stored, and offers them to the resolver.
//!
//! Signatures and files take time, so a chunk of groups is opened off the runtime's threads; the groups of the next step are
//! opened while a step runs. Invariant: every joined message of this run's dispatch gets a fate.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{join_all, try_join_all};
use tracing::{debug, info, warn};

use muster_broadcaster::blocking::off_loop_if_large;
use muster_protocol::bus::Delivery;
use muster_protocol::life;
use muster_protocol::message::fate::{Fate, FateRecord};
use muster_protocol::message::group::{Group, Rollout};
use muster_protocol::subject::Queue;

use super::error::TrainerError;
use super::opener::Unusable;
use super::state::{CHUNK, Trainer, acknowledge, fate_of};
use crate::resolver::{Candidate, Refusal};

/// Groups that were looked at and need no place in the resolver.
#[derive(Default)]
struct Spent {
    fates: Vec<FateRecord>,
    deliveries: Vec<Delivery>,
}

impl Trainer {
    /// Takes groups of the ready queue, at most a chunk, and waits up to `wait` for the first.
    pub(super) async fn take_groups(&mut self, wait: Duration) -> Result<(), TrainerError> {
        let deliveries = self.client.bus().take(Queue::Ready, CHUNK, wait).await?;
        if deliveries.is_empty() {
            return Ok(());
        }
        let payloads: Vec<Bytes> = deliveries.iter().map(|d| d.payload.clone()).collect();
        let opener = Arc::clone(&self.opener);
        let bytes = payloads.iter().map(Bytes::len).sum();
        let opening = off_loop_if_large(bytes, move || {
            let opened = payloads.iter().map(|payload| opener.open(payload));
            opened.collect::<Vec<_>>()
        });
        let mut spent = Spent::default();
        for (delivery, opened) in deliveries.into_iter().zip(opening.await?) {
            self.on_group(delivery, opened, &mut spent)?;
        }
        try_join_all(spent.fates.into_iter().map(|fate| self.append_fate(fate))).await?;
        join_all(spent.deliveries.iter().map(acknowledge)).await;
        Ok(())
    }

    fn on_group(
        &mut self,
        delivery: Delivery,
        opened: Result<Candidate<Group>, Unusable>,
        spent: &mut Spent,
    ) -> Result<(), TrainerError> {
        match opened {
            Ok(candidate) => self.on_candidate(delivery, candidate, spent),
            Err(Unusable::Message(reason)) => {
                warn!(%reason, "a message of the ready queue is dropped");
                spent.deliveries.push(delivery);
            }
            Err(Unusable::Group(record)) => {
                warn!(ticket = %record.ticket, reason = %record.reason, "a joined group is rejected");
                spent.fates.extend(self.rejected(*record));
                spent.deliveries.push(delivery);
            }
            Err(Unusable::Disk(error)) => return Err(error.into()),
        }
        Ok(())
    }

    /// The fate of a group that breaks a rule; none if its ticket has one on record.
    fn rejected(&mut self, mut record: FateRecord) -> Option<FateRecord> {
        if self.logs.ended().contains(&record.ticket) {
            return None;
        }
        if !self.resolver.end(record.ticket) {
            record.fate = Fate::Duplicate; // another group of the ticket waits or is in a batch
        }
        Some(record)
    }

    fn on_candidate(&mut self, delivery: Delivery, candidate: Candidate<Group>, spent: &mut Spent) {
        let ticket = candidate.ticket;
        if self.trained.get(&ticket) == Some(&candidate.group) {
            spent.deliveries.push(delivery); // a kill came between the manifest and this acknowledgement
            return;
        }
        if self.resolver.holds(ticket, candidate.group) {
            self.held.insert(ticket, delivery); // a restarted server delivers again
            return;
        }
        let drawn = candidate.carried.rollouts.iter().map(Rollout::drawn_tokens);
        self.tokens_arrived += drawn.sum::<u64>();
        let (group, lease) = (candidate.group, candidate.carried.lease);
        match self.resolver.admit(candidate) {
            Ok(()) => {
                debug!(target: life::TARGET, %ticket, %lease, group = %group.short(), "waits for a step");
                self.held.insert(ticket, delivery);
                return;
            }
            Err((Refusal::Duplicate { .. }, candidate)) if self.logs.ended().contains(&ticket) => {
                // The log has the ticket's fate: this group's own, before a kill, or another group's.
                info!(%ticket, group = %candidate.group.short(), "a group of an ended ticket");
            }
            Err((refusal, candidate)) => {
                let reason = refusal.to_string();
                let fate = fate_of(&candidate, refusal.fate(), reason, None);
                spent.fates.push(fate);
            }
        }
        spent.deliveries.push(delivery);
    }
}
