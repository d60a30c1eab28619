//! The run's logs as dispatch reads them: control events, announced versions, fates.

use futures_util::future::join_all;
use tracing::{debug, warn};

use muster_protocol::bus::Record;
use muster_protocol::envelope::{EnvelopeError, open};
use muster_protocol::message::control::ControlEvent;
use muster_protocol::message::fate::{Fate, FateRecord};
use muster_protocol::message::version::{Announcement, Version};
use muster_protocol::subject::Log;

use super::{ANNOUNCEMENTS_KEPT, CHUNK, DispatchError, DispatchService};

impl DispatchService {
    /// Reads what was appended to the logs since.
    pub(super) async fn read_logs(&mut self) -> Result<(), DispatchError> {
        for log in [Log::Control, Log::Versions, Log::Fates] {
            loop {
                let after = self.read.get(&log).copied().unwrap_or(0);
                let records = self.bus.read(log, after, CHUNK).await?;
                if records.is_empty() {
                    break;
                }
                let last = records.last().map_or(after, |record| record.sequence);
                match log {
                    Log::Fates => self.on_fates(records).await?,
                    _ => self.on_records(log, records)?,
                }
                self.read.insert(log, last);
            }
        }
        Ok(())
    }

    fn on_records(&mut self, log: Log, records: Vec<Record>) -> Result<(), DispatchError> {
        for record in records {
            match log {
                Log::Control => {
                    let event = open::<ControlEvent>(record.payload, &self.run)?;
                    if let ControlEvent::Fault(fault) = &event.body
                        && event.author == self.identity.peer_id()
                    {
                        self.core.count_fault(fault);
                    }
                    self.control.apply(record.sequence, event.body);
                    self.core.set_phase(self.control.phase);
                }
                _ => self.on_version(&record.payload)?,
            }
        }
        if self.control.dispatch.0 > self.generation {
            return Err(DispatchError::Replaced);
        }
        Ok(())
    }

    fn on_version(&mut self, bytes: &[u8]) -> Result<(), DispatchError> {
        let announcement = Announcement::decode(bytes).map_err(EnvelopeError::from)?;
        let version = open::<Version>(announcement.version.clone().into(), &self.run)?;
        if version.author != self.learner {
            warn!(author = %version.author, "a version that the learner did not sign was ignored");
            return Ok(());
        }
        let reference = version.body.reference();
        self.core.version_made(reference);
        let place = self
            .announcements
            .partition_point(|(known, _)| known.version < reference.version);
        match self.announcements.get(place) {
            // The same weights, offered anew by a learner that has started again: what came after them still holds.
            Some((known, _)) if *known == reference => {
                self.announcements[place] = (reference, announcement);
            }
            _ => {
                self.announcements.truncate(place);
                self.announcements.push_back((reference, announcement));
            }
        }
        if self.announcements.len() > ANNOUNCEMENTS_KEPT {
            self.announcements.pop_front();
        }
        let remembered = self.announcements.iter().map(|(known, _)| *known);
        self.squashed.retain(&remembered.collect::<Vec<_>>());
        Ok(())
    }

    /// Takes in fates, lets go of their tickets and tells the authors.
    async fn on_fates(&mut self, records: Vec<Record>) -> Result<(), DispatchError> {
        let (mut ended, mut notes) = (Vec::new(), Vec::new());
        for Record { payload, .. } in records {
            let record = open::<FateRecord>(payload.clone(), &self.run)?.body;
            if record.fate != Fate::Duplicate && self.fated.insert(record.ticket) {
                self.core.ended(&record);
                ended.push(record.ticket);
            }
            if let (Some(lease), Some(group)) = (record.lease, record.group) {
                self.accepted.insert(lease, group);
                self.receipts.insert(lease, payload.clone());
            }
            let author = record.worker;
            if let Some(member) = author.and_then(|worker| self.roster.by_peer(&worker)) {
                notes.push((self.subjects.note(&member.user), payload));
            }
        }
        self.release(&ended).await;
        let telling = notes
            .iter()
            .map(|(note, receipt)| self.bus.publish(note, receipt.clone()));
        for told in join_all(telling).await {
            if let Err(error) = told {
                debug!(%error, "a receipt was not sent: it can be asked for");
            }
        }
        Ok(())
    }
}
