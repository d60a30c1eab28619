use bytes::Bytes;

use muster_protocol::envelope::seal;
use muster_protocol::id::{DescriptorHash, StateRoot};
use muster_protocol::identity::{Identity, MachineSeed};
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
        },
        oldest_version: PolicyVersion(0),
        deadline: DEADLINE,
    });
    let worker = PeerId([1; 32]);
    let class = NumericClass::F32Cpu;
    let leased = dispatch.lease(worker, version(0), class, UnixMillis(0), [3; 32]);
    let identity = Identity::from_seed(&MachineSeed::from_bytes([9; 32]));
    let lease = seal(&identity, &run, 1, leased.unwrap()).unwrap();
    dispatch.admitted(&lease, &Bytes::from_static(b"group"), true);
    dispatch
}

#[test]
fn a_group_that_no_critic_can_judge_ends_when_it_is_too_old_to_be_trained() {
    let mut dispatch = with_a_group_to_judge();
    dispatch.version_made(version(ASYNC_LEVEL));
    assert_eq!(dispatch.unjudged(UnixMillis(1)), []);
    dispatch.version_made(version(ASYNC_LEVEL + 1));
    let [(ticket, fate, reason)] = &dispatch.unjudged(UnixMillis(1))[..] else {
        panic!("not one group ends")
    };
    assert_eq!((*ticket, *fate), (TicketId(1), Fate::Stale));
    assert!(reason.contains("3 steps stale, at most 2"), "{reason}");
}

#[test]
fn a_group_that_no_critic_can_judge_ends_with_its_tickets_deadline() {
    let dispatch = with_a_group_to_judge();
    assert_eq!(dispatch.unjudged(UnixMillis(DEADLINE.0 - 1)), []);
    let ended = dispatch.unjudged(DEADLINE);
    assert!(
        matches!(ended[..], [(TicketId(1), Fate::Expired, _)]),
        "{ended:?}"
    );
}

#[test]
fn a_ticket_whose_fate_is_on_its_way_to_the_log_is_nobodys_any_more() {
    let mut dispatch = with_a_group_to_judge();
    dispatch.ending(TicketId(1));
    assert!(dispatch.is_settled(TicketId(1)));
    assert_eq!(dispatch.unjudged(DEADLINE), []);
    assert!(dispatch.tick(DEADLINE).is_empty());
    let critic = PeerId([2; 32]);
    assert!(
        dispatch
            .assign(critic, &[version(0)], UnixMillis(1))
            .is_err()
    );
}
