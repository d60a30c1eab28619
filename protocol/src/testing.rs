//! Messages for tests, in one place: a test takes one and changes the fields that it is about, so that a new field of a
//! message is added to one fixture.

use crate::id::{DescriptorHash, LeaseId, PeerId, PolicyVersion, StateRoot, TicketId, UnixMillis};
use crate::message::lease::{Lease, NumericClass, RolloutRange, WeightsRule};
use crate::message::ticket::{SamplingRules, Ticket};
use crate::message::version::VersionRef;

/// Temperature 1, up to eight tokens, ended by id 0.
pub fn sampling() -> SamplingRules {
    SamplingRules {
        temperature: 1.0,
        tokens_max: 8,
        stop_ids: vec![0],
        stop_strings: Vec::new(),
    }
}

/// Ticket 1: four rollouts of a prompt of one token, from version 0 on.
pub fn ticket() -> Ticket {
    Ticket {
        id: TicketId(1),
        descriptor: DescriptorHash([0; 32]),
        item: 0,
        prompt: vec![1],
        group_size: 4,
        sampling: sampling(),
        oldest_version: PolicyVersion(0),
        deadline: UnixMillis(0),
    }
}

/// A lease of all rollouts of `ticket` under version 0. Its seed is not the prescribed one.
pub fn lease(ticket: Ticket) -> Lease {
    Lease {
        id: LeaseId([0; 16]),
        worker: PeerId([0; 32]),
        version: VersionRef {
            version: PolicyVersion(0),
            root: StateRoot([0; 32]),
        },
        weights: WeightsRule::Drain,
        class: NumericClass::F32Cpu,
        rollouts: RolloutRange {
            first: 0,
            count: ticket.group_size,
        },
        ticket,
        epoch: 0,
        submission: 0,
        nonce: [0; 32],
        seed: [0; 32],
        deadline: UnixMillis(0),
    }
}
