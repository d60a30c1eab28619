use muster_protocol::envelope::seal;
use muster_protocol::id::{DescriptorHash, StateRoot};
use muster_protocol::identity::{Identity, MachineSeed};
use muster_protocol::message::group::{FinishReason, Rollout};
use muster_protocol::message::lease::WeightsRule;
use muster_protocol::message::ticket::SamplingRules;

use super::*;

const ASYNC_LEVEL: u64 = 2;
const DEADLINE: UnixMillis = UnixMillis(60_000);

fn version(number: u64) -> VersionRef {
    VersionRef {
        version: PolicyVersion(number),
        root: StateRoot([number as u8; 32]),
    }
}

fn group_of(lease: &Lease) -> Group {
    let rollout = Rollout::single_turn(
        lease.ticket.prompt.clone(),
        vec![0],
        lease.version.version,
        vec![-1.0],
        FinishReason::Stop,
    );
    Group {
        lease: lease.id,
        ticket: lease.ticket.id,
        version: lease.version,
        class: lease.class,
        rollouts: vec![rollout; lease.rollouts.count as usize],
        commitments: Vec::new(),
    }
}

#[test]
fn a_group_of_several_versions_is_audited_and_only_by_a_critic_that_holds_them_all() {
    let mut dispatch = with_a_group_to_judge();
    dispatch.version_made(version(1));
    let worker = PeerId([1; 32]);
    dispatch.trust([worker].into());
    let sampling = SamplingRules {
        temperature: 1.0,
        tokens_max: 2,
        stop_ids: vec![0],
        stop_strings: Vec::new(),
    };
    dispatch.ticket_issued(Ticket {
        id: TicketId(2),
        descriptor: DescriptorHash([0; 32]),
        item: 1,
        prompt: vec![1],
        group_size: 1,
        sampling,
        oldest_version: PolicyVersion(0),
        deadline: DEADLINE,
    });
    let class = NumericClass::F32Cpu;
    let leased = dispatch.lease(worker, version(0), class, UnixMillis(0), [4; 32]);
    let leased = leased.unwrap();
    assert_eq!(leased.weights, WeightsRule::InFlight);
    let spans = [(PolicyVersion(0), 1), (PolicyVersion(1), 1)];
    let finish = FinishReason::Length;
    let mixed = Rollout::of_versions(vec![1], &[2, 3], &[-1.0; 2], &spans, finish);
    let mut body = group_of(&leased);
    body.rollouts = vec![mixed];
    let identity = Identity::from_seed(&MachineSeed::from_bytes([9; 32]));
    let run: RunId = "r".parse().unwrap();
    let lease = seal(&identity, &run, 1, leased.clone()).unwrap();
    let mut group = seal(&identity, &run, 2, body).unwrap();
    group.author = worker;
    assert_eq!(
        dispatch.admit(&leased, &group),
        Admission::Admit { audit: true }
    );
    dispatch.review_only(&lease, &group);
    let critic = PeerId([2; 32]);
    let held = |versions: &[u64]| versions.iter().map(|v| version(*v)).collect::<Vec<_>>();
    assert!(dispatch.assign(critic, &held(&[0]), UnixMillis(1)).is_err());
    assert!(
        dispatch
            .assign(critic, &held(&[0, 1]), UnixMillis(1))
            .is_ok()
    );
}

impl Dispatch {
    /// Leaves the given group as the only one with the critics.
    fn review_only(&mut self, lease: &Signed<Lease>, group: &Signed<Group>) {
        self.reviews.close(TicketId(1));
        self.admitted(lease, group, true);
    }
}

/// A dispatch at version 0 whose one ticket has been answered and waits for an audit.
fn with_a_group_to_judge() -> Dispatch {
    let run: RunId = "r".parse().unwrap();
    let config = DispatchConfig {
        run: run.clone(),
        budget: Budget {
            batch_groups: 1,
            async_level: ASYNC_LEVEL,
            steps: 10,
        },
        lease_ms: 1_000,
        vocabulary: 8,
        classes: vec![NumericClass::F32Cpu],
        audit: AuditConfig::default(),
        critique: CritiqueConfig::default(),
        conduct: ConductConfig::default(),
    };
    let mut dispatch = Dispatch::new(config, 1, [7; 32]);
    dispatch.version_made(version(0));
    dispatch.ticket_issued(Ticket {
        id: TicketId(1),
        descriptor: DescriptorHash([0; 32]),
        item: 0,
        prompt: vec![1],
        group_size: 2,
        sampling: SamplingRules {
            temperature: 1.0,
            tokens_max: 4,
            stop_ids: vec![0],
            stop_strings: Vec::new(),
        },
        oldest_version: PolicyVersion(0),
        deadline: DEADLINE,
    });
    let worker = PeerId([1; 32]);
    let class = NumericClass::F32Cpu;
    let leased = dispatch.lease(worker, version(0), class, UnixMillis(0), [3; 32]);
    let identity = Identity::from_seed(&MachineSeed::from_bytes([9; 32]));
    let lease = seal(&identity, &run, 1, leased.unwrap()).unwrap();
    let group = seal(&identity, &run, 2, group_of(&lease.body)).unwrap();
    dispatch.admitted(&lease, &group, true);
    dispatch
}

#[test]
fn a_group_that_no_critic_can_judge_ends_when_it_is_too_old_to_be_trained() {
    let mut dispatch = with_a_group_to_judge();
    dispatch.version_made(version(ASYNC_LEVEL));
    assert_eq!(dispatch.overdue_reviews(UnixMillis(1)), []);
    dispatch.version_made(version(ASYNC_LEVEL + 1));
    let [record] = &dispatch.overdue_reviews(UnixMillis(1))[..] else {
        panic!("not one group ends")
    };
    assert_eq!((record.ticket, record.fate), (TicketId(1), Fate::Stale));
    let reason = &record.reason;
    assert!(reason.contains("3 steps stale, at most 2"), "{reason}");
}

#[test]
fn a_group_that_no_critic_can_judge_ends_with_its_tickets_deadline() {
    let dispatch = with_a_group_to_judge();
    assert_eq!(dispatch.overdue_reviews(UnixMillis(DEADLINE.0 - 1)), []);
    let ended = dispatch.overdue_reviews(DEADLINE);
    assert!(
        matches!(&ended[..], [record] if record.ticket == TicketId(1) && record.fate == Fate::Expired),
        "{ended:?}"
    );
}

#[test]
fn a_ticket_whose_fate_is_on_its_way_to_the_log_takes_no_group_and_no_verdict() {
    let mut dispatch = with_a_group_to_judge();
    dispatch.ending(TicketId(1));
    assert!(dispatch.is_settled(TicketId(1)));
    assert_eq!(dispatch.overdue_reviews(DEADLINE), []);
    assert!(dispatch.tick(DEADLINE).is_empty());
    let critic = PeerId([2; 32]);
    assert!(
        dispatch
            .assign(critic, &[version(0)], UnixMillis(1))
            .is_err()
    );
}

/// The way to the queue may fail, and the author's record may change before the group is submitted again.
#[test]
fn the_first_draw_of_a_lease_holds_when_its_group_is_submitted_again() {
    let mut dispatch = with_a_group_to_judge();
    let lease = dispatch.reviews.get(TicketId(1)).unwrap().lease.clone();
    let run: RunId = "r".parse().unwrap();
    let author = lease.body.worker;
    dispatch.reviews.close(TicketId(1));
    let leased = TicketStage::Leased {
        lease: lease.body.id,
        worker: author,
        deadline: DEADLINE,
    };
    dispatch.tickets.advance(TicketId(1), leased);
    let identity = Identity::from_seed(&MachineSeed::from_bytes([9; 32]));
    let mut group = seal(&identity, &run, 2, group_of(&lease.body)).unwrap();
    group.author = author;
    let drawn = Admission::Admit { audit: true };
    assert_eq!(dispatch.admit(&lease.body, &group), drawn, "a newcomer's");
    let config = AuditConfig::default();
    for _ in 0..10_000 {
        dispatch.conduct.worker(author).audits.record(true, &config);
    }
    assert_eq!(
        dispatch.admit(&lease.body, &group),
        drawn,
        "submitted again"
    );
    dispatch.draws.forget(TicketId(1));
    let anew = Admission::Admit { audit: false };
    assert_eq!(dispatch.admit(&lease.body, &group), anew, "a veteran's");
}

/// A worker that answers late takes the ticket from the worker that holds it by then.
#[test]
fn a_lease_overtaken_by_a_late_answer_no_longer_counts_as_held() {
    let mut dispatch = with_a_group_to_judge();
    let late = dispatch.reviews.get(TicketId(1)).unwrap().lease.clone();
    let group = seal(
        &Identity::from_seed(&MachineSeed::from_bytes([9; 32])),
        &"r".parse().unwrap(),
        2,
        group_of(&late.body),
    );
    let mut ticket = late.body.ticket.clone();
    ticket.id = TicketId(2);
    let class = NumericClass::F32Cpu;
    dispatch.ticket_issued(ticket);
    let first = PeerId([1; 32]);
    let lease = dispatch.lease(first, version(0), class, UnixMillis(0), [5; 32]);
    let mut overdue = late;
    overdue.body = lease.unwrap();
    assert!(dispatch.tick(UnixMillis(1_000)).is_empty());
    let second = PeerId([3; 32]);
    let again = dispatch.lease(second, version(0), class, UnixMillis(1_000), [6; 32]);
    assert_eq!(again.unwrap().ticket.id, TicketId(2));
    assert_eq!(dispatch.conduct.leases_held(), 1);
    dispatch.admitted(&overdue, &group.unwrap(), true);
    assert_eq!(dispatch.conduct.leases_held(), 0);
}
