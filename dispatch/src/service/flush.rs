//! Makes decisions durable and lets go of the messages that they replace. A decision is kept until it is durable, so that a bus
//! that does not answer for a while loses none; a dispatch that is killed decides it again from the queues.

use futures_util::future::join_all;
use tracing::{debug, info, warn};

use muster_protocol::id::TicketId;
use muster_protocol::life;
use muster_protocol::message::control::{ControlEvent, MemberFault};
use muster_protocol::message::fate::{Fate, FateRecord};
use muster_protocol::subject::Log;

use super::outgoing::{Outgoing, acknowledged};
use super::{CHUNK, DispatchError, DispatchService};

impl DispatchService {
    /// Decides a ticket's fate; [`Self::flush`] writes it to the log, from where it is taken in.
    pub(super) fn end_ticket(&mut self, record: FateRecord) -> Result<(), DispatchError> {
        if record.fate == Fate::Rejected {
            self.metrics.groups_rejected += 1;
        }
        if record.fate != Fate::Duplicate {
            self.core.ending(record.ticket);
        }
        debug!(
            target: life::TARGET,
            ticket = %record.ticket,
            group = record.group.map(|group| group.short()),
            fate = %record.fate,
            reason = record.reason,
            "ended by dispatch"
        );
        let key = record.key();
        let record = self.seal(record)?.bytes;
        self.outgoing.push_back(Outgoing::Append {
            log: Log::Fates,
            key,
            record,
        });
        Ok(())
    }

    /// Sends a fault that was counted to the control log, from where the next start of dispatch counts it. A fault is queued
    /// before its ticket's fate: a dispatch that is killed between the two decides both again.
    pub(super) fn log_fault(&mut self, fault: MemberFault) -> Result<(), DispatchError> {
        self.metrics.faults += 1;
        info!(member = %fault.member.short(), ticket = %fault.ticket, kind = ?fault.kind, "fault counted");
        let key = format!("c-{}-{}", fault.ticket, fault.member.short());
        let record = self.seal(ControlEvent::Fault(fault))?.bytes;
        self.outgoing.push_back(Outgoing::Append {
            log: Log::Control,
            key,
            record,
        });
        Ok(())
    }

    /// Makes durable what was decided, all at once. What the bus does not take now is tried again at the next tick.
    pub(super) async fn flush(&mut self) -> Result<(), DispatchError> {
        while !self.outgoing.is_empty() {
            let count = self.outgoing.len().min(CHUNK);
            let batch: Vec<Outgoing> = self.outgoing.drain(..count).collect();
            let written = join_all(batch.iter().map(|outgoing| outgoing.write(&self.bus))).await;
            let mut handed_on = Vec::new();
            let mut kept = Vec::new();
            let mut failed = None;
            for (outgoing, written) in batch.into_iter().zip(written) {
                match (written, &outgoing) {
                    (Ok(_), Outgoing::Ready { ticket, .. }) => handed_on.push(*ticket),
                    (Ok(_), Outgoing::Append { .. }) => {}
                    (Err(error), _) if error.is_transient() => {
                        warn!(%error, "a decision is not durable yet: trying again");
                        kept.push(outgoing);
                    }
                    (Err(error), _) => failed = Some(error),
                }
            }
            for ticket in &handed_on {
                self.metrics.groups_ready += 1;
                debug!(target: life::TARGET, %ticket, "ready for the trainer");
                self.core.handed_on(*ticket);
            }
            self.release(&handed_on).await;
            if let Some(error) = failed {
                return Err(error.into());
            }
            if !kept.is_empty() {
                kept.extend(self.outgoing.drain(..));
                self.outgoing = kept.into();
                return Ok(());
            }
        }
        Ok(())
    }

    /// Lets go of the messages that held tickets. One whose acknowledgement is not confirmed is kept and tried again
    /// with the renewals.
    pub(super) async fn release(&mut self, tickets: &[TicketId]) {
        self.release_answered(tickets).await;
        let held = tickets
            .iter()
            .filter_map(|ticket| Some((*ticket, &self.intake.get(ticket)?.1)));
        for ticket in acknowledged(held).await {
            self.intake.remove(&ticket);
        }
    }

    /// Lets go of the ticket queue's messages alone: the tickets' groups are in the intake queue.
    pub(super) async fn release_answered(&mut self, tickets: &[TicketId]) {
        let held = tickets
            .iter()
            .filter_map(|ticket| Some((*ticket, self.tickets.get(ticket)?)));
        for ticket in acknowledged(held).await {
            self.tickets.remove(&ticket);
        }
    }
}
