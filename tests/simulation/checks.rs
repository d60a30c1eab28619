//! What must hold after a run, checked against its logs and the observations.

use std::collections::{BTreeMap, BTreeSet};

use muster_protocol::bus::memory::MemoryCounters;
use muster_protocol::id::{GroupHash, TicketId};
use muster_protocol::message::batch::Batch;
use muster_protocol::message::fate::{Fate, FateRecord};

use crate::observer::{Observations, Quality};

/// The logs and counters of a finished run.
pub struct RunRecord {
    pub fates: Vec<FateRecord>,
    pub batches: Vec<Batch>,
    pub counters: MemoryCounters,
    /// Most messages seen in each queue.
    pub depths: BTreeMap<&'static str, u64>,
}

/// Every rule that the run broke.
pub fn check(seen: &Observations, record: &RunRecord) -> Vec<String> {
    let mut broken = seen.violations.clone();
    broken.extend(fates(seen, record));
    broken.extend(batches(seen, record));
    broken.extend(verdicts(seen, record));
    broken.extend(lies_were_caught(seen, record));
    broken.extend(bounds(seen, record));
    broken
}

/// Every ticket has exactly one fate on record, and no other was decided for it.
fn fates(seen: &Observations, record: &RunRecord) -> Vec<String> {
    let mut broken = Vec::new();
    let mut ended: BTreeMap<TicketId, Vec<Fate>> = BTreeMap::new();
    for fate in record
        .fates
        .iter()
        .filter(|fate| fate.fate != Fate::Duplicate)
    {
        ended.entry(fate.ticket).or_default().push(fate.fate);
    }
    for ticket in (1..=seen.issued).map(TicketId) {
        match ended.get(&ticket).map(Vec::as_slice) {
            Some([_]) => {}
            None => broken.push(format!("fate: ticket {ticket} has none")),
            Some(many) => broken.push(format!("fate: ticket {ticket} has {many:?}")),
        }
        let decided = seen.decided.get(&ticket).into_iter().flatten();
        let decided: Vec<&Fate> = decided.filter(|fate| **fate != Fate::Duplicate).collect();
        if decided.len() > 1 {
            broken.push(format!("fate: ticket {ticket} was decided as {decided:?}"));
        }
    }
    broken
}

/// Each step is closed once; no ticket or group is trained twice; no group is too stale; the manifests hold exactly the
/// groups with the fate trained.
fn batches(seen: &Observations, record: &RunRecord) -> Vec<String> {
    let mut broken = Vec::new();
    let steps: Vec<u64> = record.batches.iter().map(|batch| batch.step.0).collect();
    let expected: Vec<u64> = (1..=seen.rules.steps).collect();
    if steps != expected {
        broken.push(format!("batches: the steps closed are {steps:?}"));
    }
    let mut tickets = BTreeSet::new();
    let mut groups: BTreeSet<GroupHash> = BTreeSet::new();
    for batch in &record.batches {
        for entry in &batch.groups {
            if !tickets.insert(entry.ticket) || !groups.insert(entry.group) {
                broken.push(format!(
                    "twice: ticket {} is trained again in step {}",
                    entry.ticket, batch.step
                ));
            }
            let staleness = (batch.step.0 - 1).saturating_sub(entry.version.0);
            if staleness > seen.rules.async_level {
                let most = seen.rules.async_level;
                broken.push(format!(
                    "staleness: step {} holds a group {staleness} steps old, at most {most} may be",
                    batch.step
                ));
            }
        }
        if batch.groups.len() as u64 != seen.rules.batch_groups {
            broken.push(format!(
                "batches: step {} has {} groups",
                batch.step,
                batch.groups.len()
            ));
        }
    }
    let trained: BTreeSet<TicketId> = record
        .fates
        .iter()
        .filter(|fate| fate.fate == Fate::Trained)
        .map(|fate| fate.ticket)
        .collect();
    if let Some(ticket) = trained.symmetric_difference(&tickets).next() {
        broken.push(format!(
            "fate: ticket {ticket} is in a manifest or has the fate trained, not both"
        ));
    }
    broken
}

/// Every audited bad group is rejected, and no honest group is.
fn verdicts(seen: &Observations, record: &RunRecord) -> Vec<String> {
    let mut broken = Vec::new();
    for fate in record
        .fates
        .iter()
        .filter(|fate| fate.fate == Fate::Rejected)
    {
        let answer = fate.lease.and_then(|lease| seen.answers.get(&lease));
        if answer != Some(&Quality::Bad) {
            broken.push(format!(
                "liars: an honest group of ticket {} was rejected: {}",
                fate.ticket, fate.reason
            ));
        }
    }
    for (group, audited) in &seen.accepted {
        let Some(admission) = seen.admitted.get(group) else {
            broken.push(format!(
                "liars: group {} was accepted and never admitted",
                group.short()
            ));
            continue;
        };
        if admission.audit && !audited {
            broken.push(format!(
                "liars: ticket {} was drawn for an audit and accepted without",
                admission.ticket
            ));
        }
        if *audited && admission.quality == Quality::Bad {
            broken.push(format!(
                "liars: a bad group of ticket {} passed its audit",
                admission.ticket
            ));
        }
    }
    broken
}

/// The run admitted bad groups and rejected some: otherwise it would show nothing.
fn lies_were_caught(seen: &Observations, record: &RunRecord) -> Vec<String> {
    let caught = record.fates.iter().any(|fate| fate.fate == Fate::Rejected);
    match caught
        && seen
            .admitted
            .values()
            .any(|group| group.quality == Quality::Bad)
    {
        true => Vec::new(),
        false => vec!["liars: none was caught".to_owned()],
    }
}

fn bounds(seen: &Observations, record: &RunRecord) -> Vec<String> {
    let mut broken = Vec::new();
    if record.counters.overflowed > 0 {
        broken.push(format!(
            "bounds: {} messages found an inbox full",
            record.counters.overflowed
        ));
    }
    // Every message of a queue belongs to a ticket that has not ended, but for acknowledgements on their way.
    let limit = (seen.rules.async_level + 2) * seen.rules.batch_groups;
    for (queue, depth) in &record.depths {
        if *depth > limit {
            broken.push(format!(
                "bounds: queue {queue} held {depth} messages, at most {limit} may be"
            ));
        }
    }
    broken
}
