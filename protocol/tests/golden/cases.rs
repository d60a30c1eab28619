//! The golden messages: small, every variant once. Every id is different and incompressible, so that a payload travels
//! uncompressed and its bytes depend on this crate only.

mod versions;

use std::collections::BTreeMap;

use serde_bytes::ByteBuf;

use muster_protocol::id::{
    ContentHash, DescriptorHash, Generation, GroupHash, LeaseId, PeerId, PolicyVersion, StateRoot,
    TicketId, UnixMillis,
};
use muster_protocol::message::ask::{Ask, Reply, WaitReason};
use muster_protocol::message::batch::{Batch, BatchEntry};
use muster_protocol::message::control::{
    ControlEvent, ControlState, FaultKind, MemberFault, Phase,
};
use muster_protocol::message::critique::{Admitted, CritiqueLease, Joined};
use muster_protocol::message::descriptor::{Descriptor, Thresholds};
use muster_protocol::message::fate::{Fate, FateRecord};
use muster_protocol::message::group::{FinishReason, Group, Rollout, Segment};
use muster_protocol::message::lease::{Lease, NumericClass, RolloutRange, WeightsRule};
use muster_protocol::message::peer::PeerRecord;
use muster_protocol::message::ticket::{SamplingRules, Ticket};
use muster_protocol::message::verdict::{Decision, Finding, RolloutReward, Verdict};
use muster_protocol::message::version::VersionRef;
use muster_protocol::seed::{SeedBinding, lease_seed};
use muster_protocol::subject::Role;

use crate::run;

pub use versions::{announcement, objects, version};

/// 32 bytes that differ for every `name`.
fn bytes_of(name: &str) -> [u8; 32] {
    *blake3::hash(name.as_bytes()).as_bytes()
}

fn lease_id() -> LeaseId {
    let mut id = [0; 16];
    id.copy_from_slice(&bytes_of("lease")[..16]);
    LeaseId(id)
}

fn held() -> VersionRef {
    VersionRef {
        version: PolicyVersion(5),
        root: StateRoot(bytes_of("state")),
    }
}

/// Stands for a signed envelope inside a message, which does not decode it.
fn envelope(name: &str) -> ByteBuf {
    ByteBuf::from(bytes_of(name)[..12].to_vec())
}

pub fn asks() -> Vec<(&'static str, Ask)> {
    vec![
        (
            "lease",
            Ask::Lease {
                held: held(),
                class: NumericClass::F32Cpu,
                rollouts_max: 64,
            },
        ),
        (
            "submit",
            Ask::Submit {
                lease: envelope("lease"),
                group: envelope("group"),
            },
        ),
        (
            "critique",
            Ask::Critique {
                held: vec![held()],
                class: NumericClass::F32Cuda,
                groups_max: 4,
            },
        ),
        (
            "verdict",
            Ask::Verdict {
                verdicts: vec![envelope("verdict"), envelope("another verdict")],
            },
        ),
        ("latest", Ask::Latest { version: None }),
        (
            "latest_named",
            Ask::Latest {
                version: Some(PolicyVersion(4)),
            },
        ),
        (
            "peers",
            Ask::Peers {
                mine: Some(envelope("peer")),
            },
        ),
        ("peers_unserved", Ask::Peers { mine: None }),
        (
            "receipt",
            Ask::Receipt {
                leases: vec![lease_id()],
            },
        ),
        ("control", Ask::Control),
        ("descriptor", Ask::Descriptor),
        (
            "deltas",
            Ask::Deltas {
                from: PolicyVersion(4),
                mine: Some(envelope("delta")),
            },
        ),
        (
            "deltas_none_made",
            Ask::Deltas {
                from: PolicyVersion(4),
                mine: None,
            },
        ),
    ]
}

pub fn replies() -> Vec<(&'static str, Reply)> {
    let wait = |reason| Reply::Wait {
        retry_ms: 250,
        reason,
    };
    let state = ControlState {
        phase: Phase::Paused,
        dispatch: Generation(2),
        trainer: Generation(3),
        descriptor: envelope("descriptor").into_vec(),
    };
    vec![
        ("leases", Reply::Leases(vec![envelope("lease")])),
        (
            "critique_leases",
            Reply::CritiqueLeases(vec![envelope("critique lease")]),
        ),
        ("wait_nothing_open", wait(WaitReason::NothingOpen)),
        ("wait_backpressure", wait(WaitReason::Backpressure)),
        ("wait_version_too_old", wait(WaitReason::VersionTooOld)),
        ("wait_paused", wait(WaitReason::Paused)),
        ("wait_starting", wait(WaitReason::Starting)),
        ("wait_cool_down", wait(WaitReason::CoolDown)),
        (
            "accepted",
            Reply::Accepted {
                group: GroupHash(bytes_of("group")),
            },
        ),
        (
            "recorded",
            Reply::Recorded {
                refused: vec!["verdict 2 is late".to_owned()],
            },
        ),
        ("version_none", Reply::Version(None)),
        ("version", Reply::Version(Some(announcement()))),
        ("peers", Reply::Peers(vec![envelope("peer")])),
        ("receipts", Reply::Receipts(vec![envelope("fate")])),
        ("control", Reply::Control(state)),
        ("descriptor", Reply::Descriptor(envelope("descriptor"))),
        ("finished", Reply::Finished),
        (
            "refused",
            Reply::Refused {
                reason: "lease 7 is over".to_owned(),
            },
        ),
        (
            "upgrade_required",
            Reply::UpgradeRequired { served: vec![1, 2] },
        ),
        ("deltas", Reply::Deltas(vec![envelope("delta")])),
    ]
}

pub fn control_events() -> Vec<(&'static str, ControlEvent)> {
    let started = |role| ControlEvent::Started { role };
    let fault = |kind| {
        ControlEvent::Fault(MemberFault {
            member: PeerId([9; 32]),
            ticket: TicketId(7),
            kind,
        })
    };
    vec![
        (
            "opened",
            ControlEvent::Opened {
                descriptor: envelope("descriptor").into_vec(),
            },
        ),
        ("started_dispatch", started(Role::Dispatch)),
        ("started_trainer", started(Role::Trainer)),
        ("started_worker", started(Role::Worker)),
        ("started_critic", started(Role::Critic)),
        ("started_seeder", started(Role::Seeder)),
        ("started_evaluator", started(Role::Evaluator)),
        ("paused", ControlEvent::Paused),
        ("resumed", ControlEvent::Resumed),
        (
            "finished",
            ControlEvent::Finished {
                step: PolicyVersion(200),
            },
        ),
        ("fault_dissent", fault(FaultKind::Dissent)),
        ("fault_misfit_verdict", fault(FaultKind::MisfitVerdict)),
        ("fault_rejected_group", fault(FaultKind::RejectedGroup)),
    ]
}

fn sampling() -> SamplingRules {
    SamplingRules {
        temperature: 0.75,
        tokens_max: 12,
        stop_ids: vec![3, 14],
        stop_strings: vec!["\n\n".to_owned()],
    }
}

pub fn ticket() -> Ticket {
    Ticket {
        id: TicketId(71),
        descriptor: DescriptorHash(bytes_of("descriptor")),
        item: 1_234,
        prompt: vec![9, 130, 7],
        group_size: 8,
        sampling: sampling(),
        oldest_version: PolicyVersion(3),
        deadline: UnixMillis(1_800_000_000_000),
    }
}

pub fn lease() -> Lease {
    let worker = PeerId(bytes_of("worker"));
    let nonce = bytes_of("nonce");
    let run = run();
    let binding = SeedBinding {
        run: &run,
        epoch: 2,
        worker: &worker,
        version: held().version,
        submission: 17,
    };
    Lease {
        id: lease_id(),
        ticket: ticket(),
        worker,
        version: held(),
        weights: WeightsRule::InFlight,
        class: NumericClass::F32Cpu,
        rollouts: RolloutRange { first: 0, count: 8 },
        epoch: 2,
        submission: 17,
        nonce,
        seed: lease_seed(&binding, &nonce),
        deadline: UnixMillis(1_800_000_030_000),
    }
}

/// Three rollouts: of one turn, with a tool's output between two turns, and sampled from two versions.
pub fn group() -> Group {
    let single = Rollout::single_turn(
        vec![9, 130, 7],
        vec![1, 3],
        PolicyVersion(5),
        vec![-0.25, -1.5],
        FinishReason::Stop,
    );
    let drawn = |tokens: Vec<u32>, rollout_logprobs| Segment::Policy {
        tokens,
        version: PolicyVersion(5),
        rollout_logprobs,
    };
    let with_tool = Rollout {
        segments: vec![
            Segment::Prompt {
                tokens: vec![9, 130, 7],
            },
            drawn(vec![2], vec![-0.5]),
            Segment::Environment { tokens: vec![40] },
            drawn(vec![1], vec![-3.0]),
        ],
        finish: FinishReason::Length,
    };
    let in_flight = Rollout::of_versions(
        vec![9, 130, 7],
        &[4, 6, 8],
        &[-0.5, -1.0, -2.0],
        &[(PolicyVersion(5), 2), (PolicyVersion(6), 1)],
        FinishReason::StopString(0),
    );
    Group {
        lease: lease_id(),
        ticket: TicketId(71),
        version: held(),
        class: NumericClass::F32Cpu,
        rollouts: vec![single, with_tool, in_flight],
        commitments: Vec::new(),
    }
}

pub fn group_with_commitments() -> Group {
    let mut group = group();
    group.rollouts.truncate(1);
    group.commitments = vec![envelope("commitment")];
    group
}

/// A group that compresses, as real ones do: eight answers that have little in common.
pub fn long_group() -> Group {
    let draws = |number: usize| -> Vec<u8> {
        let names = (0..2).map(|half| bytes_of(&format!("rollout {number}.{half}")));
        names.flatten().collect()
    };
    let answer = |number| {
        Rollout::single_turn(
            (0..40).collect(),
            draws(number).iter().map(|byte| u32::from(*byte)).collect(),
            PolicyVersion(5),
            draws(number)
                .iter()
                .map(|byte| -f32::from(*byte) / 64.0)
                .collect(),
            FinishReason::Length,
        )
    };
    Group {
        rollouts: (0..8).map(answer).collect(),
        ..group()
    }
}

pub fn critique_lease() -> CritiqueLease {
    CritiqueLease {
        lease: envelope("lease").into_vec(),
        group: envelope("group").into_vec(),
        critic: PeerId(bytes_of("critic")),
        prompt: "9+8+7+2=".to_owned(),
        gold: "17,24,26.".to_owned(),
        audit: true,
        deadline: UnixMillis(1_800_000_060_000),
    }
}

pub fn admitted() -> Admitted {
    Admitted {
        lease: envelope("lease").into_vec(),
        group: envelope("group").into_vec(),
        audit: true,
        admitted: UnixMillis(1_800_000_005_000),
    }
}

pub fn joined() -> Joined {
    Joined {
        lease: envelope("lease").into_vec(),
        group: envelope("group").into_vec(),
        verdicts: vec![envelope("verdict"), envelope("another verdict")],
        audited: true,
    }
}

pub fn verdicts() -> Vec<(&'static str, Verdict)> {
    let reward = |total| RolloutReward {
        total,
        components: vec![("correct".to_owned(), total), ("length".to_owned(), -0.5)],
    };
    let accepted = Verdict {
        group: GroupHash(bytes_of("group")),
        lease: lease_id(),
        ticket: TicketId(71),
        audited: false,
        rewards: vec![reward(1.0), reward(0.0)],
        findings: Vec::new(),
        decision: Decision::Accept,
    };
    let rejected = |findings| Verdict {
        audited: true,
        rewards: vec![reward(1.0)],
        findings,
        decision: Decision::Reject,
        ..accepted.clone()
    };
    let draws = Finding::Draws {
        rollout: 1,
        mean: 0.125,
        max: 0.5,
        position: 3,
        limit: 1e-4,
    };
    let logprobs = Finding::Logprobs {
        rollout: 1,
        max: 0.25,
        position: 3,
        limit: 1e-3,
    };
    let termination = Finding::Termination {
        rollout: 2,
        problem: "ends without a stop id".to_owned(),
    };
    let duplicate = Finding::Duplicate {
        rollout: 0,
        of: "the answers to lease 8".to_owned(),
    };
    let mismatch = Finding::Mismatch {
        problem: "has 7 rollouts for 8".to_owned(),
    };
    let grey = Verdict {
        decision: Decision::Grey,
        ..rejected(vec![draws.clone()])
    };
    vec![
        ("rejected_draws", rejected(vec![draws])),
        ("rejected_logprobs", rejected(vec![logprobs])),
        (
            "rejected_termination_and_duplicate",
            rejected(vec![termination, duplicate]),
        ),
        ("rejected_mismatch", rejected(vec![mismatch])),
        ("grey", grey),
        ("accepted", accepted),
    ]
}

pub fn fates() -> Vec<(&'static str, FateRecord)> {
    let record = |fate, reason: &str| FateRecord {
        ticket: TicketId(71),
        group: Some(GroupHash(bytes_of("group"))),
        lease: Some(lease_id()),
        worker: Some(PeerId(bytes_of("worker"))),
        policy_version: Some(PolicyVersion(5)),
        fate,
        reason: reason.to_owned(),
        audited: true,
        step: None,
    };
    let trained = FateRecord {
        step: Some(PolicyVersion(6)),
        ..record(Fate::Trained, "")
    };
    let expired = FateRecord {
        group: None,
        lease: None,
        worker: None,
        policy_version: None,
        audited: false,
        ..record(Fate::Expired, "nobody answered before the deadline")
    };
    let stale = record(Fate::Stale, "group is 3 steps stale, limit 2");
    vec![
        ("trained", trained),
        ("rejected", record(Fate::Rejected, "rollout 1 repeats it")),
        ("stale", stale),
        ("no_signal", record(Fate::NoSignal, "all 8 are equal")),
        ("expired", expired),
        ("superseded", record(Fate::Superseded, "the run is over")),
        ("duplicate", record(Fate::Duplicate, "ticket 71 had one")),
    ]
}

pub fn batch() -> Batch {
    let entry = BatchEntry {
        ticket: TicketId(71),
        group: GroupHash(bytes_of("group")),
        worker: PeerId(bytes_of("worker")),
        version: PolicyVersion(5),
        audited: true,
        rewards: vec![1.0, 0.0, -0.5],
    };
    Batch {
        descriptor: DescriptorHash(bytes_of("descriptor")),
        generation: Generation(3),
        step: PolicyVersion(6),
        parent: StateRoot(bytes_of("state")),
        groups: vec![entry],
    }
}

pub fn peer() -> PeerRecord {
    PeerRecord {
        handshake: PeerId(bytes_of("handshake")),
        addresses: vec!["192.0.2.7:4433".to_owned(), "[2001:db8::7]:4433".to_owned()],
        issued: UnixMillis(1_800_000_000_000),
    }
}

/// Four different numbers.
fn thresholds(scale: f64) -> Thresholds {
    Thresholds {
        draw_error_max: scale * 1.1e-4,
        draw_error_mean: scale * 2.3e-5,
        draw_error_reject: scale * 3.7e-4,
        logprob_error_max: scale * 4.9e-3,
    }
}

pub fn descriptor() -> Descriptor {
    Descriptor {
        architecture: ContentHash(bytes_of("config.json")),
        tokenizer: ContentHash(bytes_of("tokenizer.json")),
        chat_template: Some(ContentHash(bytes_of("chat template"))),
        task: ContentHash(bytes_of("task")),
        rewards: "{}".to_owned(),
        sampling: sampling(),
        group_size: 8,
        async_level: 2,
        same_class: thresholds(1.0),
        cross_class: thresholds(300.0),
        vocabulary: 16,
        classes: vec![
            NumericClass::F32Cpu,
            NumericClass::F32Cuda,
            NumericClass::Bf16Cuda,
        ],
        learner: PeerId(bytes_of("learner")),
        dispatch: PeerId(bytes_of("dispatch")),
        from_step: PolicyVersion(0),
        labels: BTreeMap::from([("task".to_owned(), "running sums".to_owned())]),
    }
}

pub fn descriptor_with_int8() -> Descriptor {
    Descriptor {
        classes: vec![NumericClass::F32Cpu, NumericClass::Int8Cpu],
        ..descriptor()
    }
}
