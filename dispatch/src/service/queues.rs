//! Tickets and groups as they come out of their queues: dispatch's memory of both is what stands there.

use std::time::Duration;

use bytes::Bytes;
use tracing::debug;

use muster_protocol::bus::{BusError, Delivery};
use muster_protocol::envelope::open;
use muster_protocol::id::{ContentHash, GroupHash, TicketId};
use muster_protocol::life;
use muster_protocol::message::critique::Admitted;
use muster_protocol::message::fate::Fate;
use muster_protocol::message::lease::Lease;
use muster_protocol::message::ticket::Ticket;
use muster_protocol::subject::Queue;

use super::outgoing::acknowledged;
use super::{CHUNK, DispatchError, DispatchService, Submission};
use crate::state::fate_of;

/// Messages that were taken and are of no use any more.
#[derive(Default)]
struct Spent {
    deliveries: Vec<Delivery>,
    /// Tickets whose group has come.
    answered: Vec<TicketId>,
}

impl DispatchService {
    /// Issues the tickets that may be open now. One after the other, so that each gets the number that is its id.
    pub(super) async fn issue_tickets(&mut self) -> Result<(), DispatchError> {
        let wanted = self.core.tickets_wanted();
        if wanted.is_empty() {
            return Ok(());
        }
        let deadline = self.clock.now().plus(self.settings.ticket_ms);
        for number in wanted {
            let id = TicketId(number);
            let prompt = self.prompts.prompt(id);
            let ticket = Ticket {
                id,
                descriptor: self.descriptor_hash(),
                item: prompt.item,
                prompt: prompt.tokens,
                group_size: self.descriptor.body.group_size,
                sampling: self.descriptor.body.sampling.clone(),
                oldest_version: self.core.oldest_version(),
                deadline,
            };
            let signed = self.seal(ticket)?;
            let key = format!("t-{id}");
            let enqueued = self.bus.enqueue(Queue::Tickets, &key, signed.bytes.clone());
            match enqueued.await {
                Ok(_) => {
                    self.metrics.tickets_issued += 1;
                    debug!(target: life::TARGET, ticket = %id, "issued");
                    self.issued
                        .insert(ContentHash::of(&signed.bytes), signed.body);
                }
                Err(BusError::Full { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.take_tickets().await?;
        self.issued.clear();
        Ok(())
    }

    /// Takes in the tickets of the queue.
    pub(super) async fn take_tickets(&mut self) -> Result<(), DispatchError> {
        loop {
            let deliveries = self.bus.take(Queue::Tickets, CHUNK, Duration::ZERO).await?;
            let last = deliveries.len() < CHUNK;
            let mut spent = Spent::default();
            for delivery in deliveries {
                let ticket = match self.issued.remove(&ContentHash::of(&delivery.payload)) {
                    Some(ticket) => ticket,
                    None => open::<Ticket>(delivery.payload.clone(), &self.run)?.body,
                };
                if self.fated.contains(&ticket.id) || self.intake.contains_key(&ticket.id) {
                    self.core.restore_issued(ticket.id.0);
                    spent.deliveries.push(delivery);
                    continue;
                }
                self.tickets.insert(ticket.id, delivery);
                self.core.ticket_issued(ticket);
            }
            self.discard(spent).await;
            if last {
                return Ok(());
            }
        }
    }

    /// Takes in groups of the intake queue, at most a chunk; returns how many came.
    pub(super) async fn take_intake(&mut self) -> Result<usize, DispatchError> {
        let taken = self.bus.take(Queue::Intake, CHUNK, Duration::ZERO).await?;
        let count = taken.len();
        self.arrived.extend(taken);
        let mut spent = Spent::default();
        while let Some(delivery) = self.arrived.pop_front() {
            self.on_intake(delivery, &mut spent)?;
        }
        self.flush().await?;
        self.discard(spent).await;
        Ok(count)
    }

    fn on_intake(&mut self, delivery: Delivery, spent: &mut Spent) -> Result<(), DispatchError> {
        let Submission {
            lease,
            group,
            audit,
        } = self.submission(&delivery.payload)?;
        let ticket = lease.body.ticket.id;
        let hash = GroupHash::of(&group.bytes);
        if self.fated.contains(&ticket) {
            spent.deliveries.push(delivery);
            return Ok(());
        }
        if let Some((held, _)) = self.intake.get(&ticket) {
            if *held == hash {
                self.intake.insert(ticket, (hash, delivery)); // its hold ran out before it was renewed
                return Ok(());
            }
            spent.deliveries.push(delivery);
            return self.on_second_group(&lease.body, hash);
        }
        if self.core.tickets().stage(ticket).is_some() && self.core.is_settled(ticket) {
            spent.deliveries.push(delivery);
            if self.accepted.entries.get(&lease.body.id) == Some(&hash) {
                return Ok(()); // handed on already: the server forgot our acknowledgement
            }
            return self.on_second_group(&lease.body, hash);
        }
        self.accepted.insert(lease.body.id, hash);
        self.core.admitted(&lease, &group, audit);
        self.intake.insert(ticket, (hash, delivery));
        spent.answered.push(ticket);
        Ok(())
    }

    /// The group of a message of the intake queue: as it was opened when it was submitted, or opened now if another start of
    /// dispatch stored it.
    fn submission(&mut self, payload: &Bytes) -> Result<Submission, DispatchError> {
        if let Some(submission) = self.opened.remove(&ContentHash::of(payload)) {
            return Ok(submission);
        }
        let admitted = open::<Admitted>(payload.clone(), &self.run)?.body;
        Ok(Submission {
            lease: open(admitted.lease.into(), &self.run)?,
            group: open(admitted.group.into(), &self.run)?,
            audit: admitted.audit,
        })
    }

    fn on_second_group(&mut self, lease: &Lease, group: GroupHash) -> Result<(), DispatchError> {
        let reason = format!("ticket {} has a group already", lease.ticket.id);
        self.end_ticket(fate_of(lease, Some(group), Fate::Duplicate, reason))
    }

    async fn discard(&mut self, spent: Spent) {
        let deliveries = spent.deliveries.iter().map(|delivery| ((), delivery));
        let confirmed = acknowledged(deliveries).await.len();
        if confirmed < spent.deliveries.len() {
            debug!(confirmed, "some messages that are spent will come again");
        }
        self.release_answered(&spent.answered).await;
    }
}
