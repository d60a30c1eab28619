use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const SHARD_BYTES: u32 = 4 << 10;

fn peer(number: u8) -> PeerId {
    PeerId([number; 32])
}

fn plan(shards: u32) -> FetchPlan {
    FetchPlan::new(SHARD_BYTES, Bitmap::empty(shards), Patience::default(), 1)
}

/// The requests of this peer among the actions.
fn asks(actions: &[Action], of: PeerId) -> Vec<(RequestId, PeerRequest)> {
    let ask = |action: &Action| match action {
        Action::Send { peer, id, request } if *peer == of => Some((*id, request.clone())),
        _ => None,
    };
    actions.iter().filter_map(ask).collect()
}

/// Adds a peer, has it say what it holds, and returns what it is asked then.
fn join(
    plan: &mut FetchPlan,
    number: u8,
    held: &Bitmap,
    chooser: Chooser,
    now_ms: u64,
) -> Vec<(RequestId, PeerRequest)> {
    assert!(plan.add_source(peer(number), now_ms));
    let actions = plan.decide(now_ms);
    let request = match asks(&actions, peer(number))[..] {
        [(request, PeerRequest::Have)] => request,
        ref other => panic!("a new peer was asked {other:?}"),
    };
    let answer = PeerReply::Held {
        request,
        shards: held.as_bytes().to_vec(),
        chooser,
    };
    plan.on_reply(peer(number), answer, now_ms);
    asks(&plan.decide(now_ms), peer(number))
}

fn shard_numbers(asks: &[(RequestId, PeerRequest)]) -> Vec<u32> {
    let number = |ask: &(RequestId, PeerRequest)| match ask.1 {
        PeerRequest::Shard(shard) => Some(shard),
        PeerRequest::Have | PeerRequest::AnyBut(_) => None,
    };
    asks.iter().filter_map(number).collect()
}

#[test]
fn two_peers_are_asked_for_different_shards() {
    let mut plan = plan(8);
    let first = shard_numbers(&join(&mut plan, 1, &Bitmap::full(8), Chooser::Asker, 0));
    let second = shard_numbers(&join(&mut plan, 2, &Bitmap::full(8), Chooser::Asker, 0));
    assert_eq!((first.len(), second.len()), (WINDOW_MIN, WINDOW_MIN));
    assert!(first.iter().all(|shard| !second.contains(shard)));
}

#[test]
fn the_rarest_shard_is_asked_for_first() {
    let mut plan = plan(8);
    let mut common = Bitmap::full(8);
    common.remove(5);
    plan.add_source(peer(2), 0);
    let actions = plan.decide(0);
    let request = asks(&actions, peer(2))[0].0;
    // A peer that says what it holds and is then busy, so that it only makes shards less rare.
    let shards = common.as_bytes().to_vec();
    plan.on_reply(
        peer(2),
        PeerReply::Held {
            request,
            shards,
            chooser: Chooser::Asker,
        },
        0,
    );
    let first = shard_numbers(&join(&mut plan, 1, &Bitmap::full(8), Chooser::Asker, 0));
    assert_eq!(first[0], 5);
}

#[test]
fn a_bad_shard_bans_and_its_requests_go_to_others() {
    let mut plan = plan(4);
    let asked = join(&mut plan, 1, &Bitmap::full(4), Chooser::Asker, 0);
    let (request, PeerRequest::Shard(shard)) = asked[0].clone() else {
        panic!("{asked:?}")
    };
    plan.on_reply(
        peer(1),
        PeerReply::Shard {
            request,
            shard,
            verdict: ShardVerdict::Bad,
        },
        5,
    );
    let actions = plan.decide(5);
    assert_eq!(
        actions,
        [Action::Disconnect {
            peer: peer(1),
            fault: Fault::BadShard { shard }
        }]
    );
    assert!(!plan.add_source(peer(1), 6), "a banned peer came back");
    assert_eq!(plan.requests_in_flight(), 0);
    assert_eq!(
        join(&mut plan, 2, &Bitmap::full(4), Chooser::Asker, 6).len(),
        WINDOW_MIN
    );
}

#[test]
fn an_overdue_shard_is_asked_of_another_peer_too() {
    let mut plan = plan(1);
    assert_eq!(
        join(&mut plan, 1, &Bitmap::full(1), Chooser::Asker, 0).len(),
        1
    );
    assert_eq!(join(&mut plan, 2, &Bitmap::full(1), Chooser::Asker, 0), []);
    let overdue_ms = plan.hedge_ms();
    assert_eq!(plan.wake_at_ms(0), Some(overdue_ms));
    let again = shard_numbers(&asks(&plan.decide(overdue_ms), peer(2)));
    assert_eq!(again, [0]);
    assert_eq!(plan.decide(overdue_ms), [], "asked a third time");
}

#[test]
fn a_peer_that_never_answers_is_dropped_and_asked_less_when_it_returns() {
    let mut plan = plan(8);
    join(&mut plan, 1, &Bitmap::full(8), Chooser::Asker, 0);
    let late_ms = plan.timeout_ms();
    let dropped = plan.decide(late_ms);
    let fault = Fault::Slow { waited_ms: late_ms };
    assert_eq!(
        dropped,
        [Action::Disconnect {
            peer: peer(1),
            fault
        }]
    );
    assert_eq!(
        join(&mut plan, 1, &Bitmap::full(8), Chooser::Asker, late_ms).len(),
        1
    );
}

#[test]
fn a_peer_that_chooses_is_not_asked_for_what_a_quick_peer_has() {
    let mut plan = plan(4);
    let mut two = Bitmap::empty(4);
    two.insert(0);
    two.insert(1);
    let asked = join(&mut plan, 1, &two, Chooser::Asker, 0);
    let (request, PeerRequest::Shard(shard)) = asked[0].clone() else {
        panic!("{asked:?}")
    };
    plan.on_reply(
        peer(1),
        PeerReply::Shard {
            request,
            shard,
            verdict: ShardVerdict::Good,
        },
        1,
    );
    let any = join(&mut plan, 2, &Bitmap::full(4), Chooser::Holder, 1);
    let [(busy, PeerRequest::AnyBut(except))] = &any[..] else {
        panic!("{any:?}")
    };
    assert_eq!(except.iter().collect::<Vec<_>>(), [0, 1]);
    plan.on_reply(
        peer(2),
        PeerReply::Busy {
            request: *busy,
            retry_ms: 100,
            holders: vec![],
        },
        2,
    );
    assert_eq!(asks(&plan.decide(50), peer(2)), []);
    assert_eq!(asks(&plan.decide(102), peer(2)).len(), 1);
}

#[test]
fn answers_to_nothing_and_bitmaps_of_another_length_end_a_connection() {
    let stray = PeerReply::Missing {
        request: RequestId(77),
    };
    let wrong = |request| PeerReply::Held {
        request,
        shards: vec![0; 9],
        chooser: Chooser::Asker,
    };
    for answer in [stray, wrong(RequestId(0))] {
        let mut plan = plan(4);
        plan.add_source(peer(1), 0);
        plan.decide(0);
        plan.on_reply(peer(1), answer, 1);
        let [
            Action::Disconnect {
                fault: Fault::Protocol { .. },
                ..
            },
        ] = plan.decide(1)[..]
        else {
            panic!("it stays connected")
        };
    }
}

#[test]
fn requests_in_flight_are_bounded_by_their_bytes() {
    for (shard_bytes, expected) in [
        (4 << 10, REQUESTS_MAX),
        (2 << 20, 32),
        (16 << 20, REQUESTS_MIN),
    ] {
        let plan = FetchPlan::new(shard_bytes, Bitmap::empty(9), Patience::default(), 1);
        assert_eq!(plan.requests_max(), expected);
    }
}

/// How a peer of the simulation behaves.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Manner {
    Honest,
    /// Honest, and chooses what to send, with a wait between two shards.
    Chooses,
    ServesRubbish,
    Silent,
    /// Says that it holds everything and then that it does not.
    ClaimsAndLacks,
    /// Delivers one shard and is busy ever after.
    AlwaysBusy,
    /// Answers requests that were never made.
    Babbles,
    Leaves,
}

fn answer_of(
    manner: Manner,
    nth: u64,
    shards: u32,
    request: RequestId,
    ask: &PeerRequest,
) -> Vec<PeerReply> {
    let good = |shard| PeerReply::Shard {
        request,
        shard,
        verdict: ShardVerdict::Good,
    };
    let missing = |except: &Bitmap| (0..shards).find(|shard| !except.contains(*shard));
    let chooser = if manner == Manner::Chooses {
        Chooser::Holder
    } else {
        Chooser::Asker
    };
    let full = Bitmap::full(shards).as_bytes().to_vec();
    match (manner, ask) {
        (Manner::Silent, _) => vec![],
        (Manner::Babbles, _) if nth > 3 => vec![PeerReply::Missing {
            request: RequestId(u32::MAX),
        }],
        (_, PeerRequest::Have) => vec![PeerReply::Held {
            request,
            shards: full,
            chooser,
        }],
        (Manner::ServesRubbish, PeerRequest::Shard(shard)) => {
            vec![PeerReply::Shard {
                request,
                shard: *shard,
                verdict: ShardVerdict::Bad,
            }]
        }
        (Manner::ClaimsAndLacks, PeerRequest::Shard(_)) => vec![PeerReply::Missing { request }],
        (Manner::AlwaysBusy, PeerRequest::Shard(_)) if nth > 1 => {
            vec![PeerReply::Busy {
                request,
                retry_ms: 1,
                holders: vec![peer(0)],
            }]
        }
        (_, PeerRequest::Shard(shard)) => vec![good(*shard)],
        (Manner::Chooses, PeerRequest::AnyBut(_)) if nth.is_multiple_of(3) => {
            vec![PeerReply::Busy {
                request,
                retry_ms: 300,
                holders: vec![peer(3)],
            }]
        }
        (_, PeerRequest::AnyBut(except)) => missing(except).map(good).into_iter().collect(),
    }
}

fn manner() -> impl Strategy<Value = Manner> {
    prop::sample::select(vec![
        Manner::Honest,
        Manner::Chooses,
        Manner::ServesRubbish,
        Manner::Silent,
        Manner::ClaimsAndLacks,
        Manner::AlwaysBusy,
        Manner::Babbles,
        Manner::Leaves,
    ])
}

proptest! {
    #[test]
    fn one_peer_that_holds_everything_is_enough(
        shards in 1u32..120,
        others in proptest::collection::vec((manner(), 1u64..400), 0..8),
        honest in prop::sample::select(vec![Manner::Honest, Manner::Chooses]),
        seed: u64,
    ) {
        let mut plan = FetchPlan::new(SHARD_BYTES, Bitmap::empty(shards), Patience::default(), seed);
        let mut manners: BTreeMap<PeerId, (Manner, u64)> =
            others.iter().zip(1..).map(|(other, number)| (peer(number), *other)).collect();
        manners.insert(peer(100), (honest, 40));
        let mut gone = BTreeSet::new();
        let mut banned = BTreeSet::new();
        let mut counts: BTreeMap<PeerId, u64> = BTreeMap::new();
        // Answers on their way, by the time at which they arrive.
        let mut arriving: BTreeMap<(u64, u32), (PeerId, Vec<PeerReply>)> = BTreeMap::new();
        let (mut now_ms, mut sequence, mut steps) = (0, 0, 0);
        while !plan.is_finished() {
            for peer in manners.keys().filter(|peer| !gone.contains(*peer)) {
                let joined = plan.add_source(*peer, now_ms);
                prop_assert!(!(joined && banned.contains(peer)), "a banned peer came back");
            }
            for action in plan.decide(now_ms) {
                match action {
                    Action::Send { peer: source, id, request } => {
                        prop_assert!(!banned.contains(&source), "a banned peer is asked");
                        let (manner, delay_ms) = manners[&source];
                        let nth = counts.entry(source).and_modify(|n| *n += 1).or_insert(0);
                        if manner == Manner::Leaves && *nth == 2 {
                            plan.remove_source(&source);
                            gone.insert(source);
                            continue;
                        }
                        sequence += 1;
                        let answers = answer_of(manner, *nth, shards, id, &request);
                        arriving.insert((now_ms + delay_ms, sequence), (source, answers));
                    }
                    Action::Disconnect { peer: source, fault } => {
                        arriving.retain(|_, (from, _)| *from != source);
                        if matches!(fault, Fault::BadShard { .. }) {
                            banned.insert(source);
                        }
                    }
                }
            }
            prop_assert!(plan.requests_in_flight() <= plan.requests_max());
            let wake = plan.wake_at_ms(now_ms);
            let next = arriving.keys().next().map(|(at_ms, _)| *at_ms);
            now_ms = wake.into_iter().chain(next).min().expect("nothing will ever happen again").max(now_ms);
            while let Some(entry) = arriving.first_entry().filter(|entry| entry.key().0 <= now_ms) {
                let (source, answers) = entry.remove();
                answers.into_iter().for_each(|answer| plan.on_reply(source, answer, now_ms));
            }
            steps += 1;
            prop_assert!(steps < 100_000 && now_ms < 600_000, "not finished at {now_ms} ms");
        }
    }
}
