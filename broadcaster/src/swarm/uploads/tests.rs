use proptest::prelude::*;

use super::*;

const OBJECT: ObjectId = ObjectId([9; 32]);

fn peer(number: u8) -> PeerId {
    PeerId([number; 32])
}

/// Asks and, if it is sent, finishes at once.
fn ask(uploads: &mut Uploads, now_ms: u64, number: u8, got: &mut Bitmap) -> UploadDecision {
    let held = Bitmap::full(got.length());
    let decision = uploads.decide(
        now_ms,
        peer(number),
        OBJECT,
        &held,
        WantedShard::AnyBut(got),
    );
    if let UploadDecision::Send { shard } = decision {
        uploads.finish(now_ms, &peer(number), &OBJECT, shard, SendOutcome::Sent);
        assert!(got.insert(shard));
    }
    decision
}

#[test]
fn the_first_pass_sends_every_shard_once_whoever_asks() {
    let mut uploads = Uploads::new(Sharing::FirstCopies);
    let mut got = [Bitmap::empty(10), Bitmap::empty(10), Bitmap::empty(10)];
    for turn in 0..10 {
        let who = turn % 3;
        let decision = ask(&mut uploads, 5, who as u8, &mut got[who]);
        assert!(matches!(decision, UploadDecision::Send { .. }));
    }
    assert_eq!(got.iter().map(Bitmap::count).sum::<u32>(), 10);
    let UploadDecision::Busy { retry_ms, holders } = ask(&mut uploads, 105, 0, &mut got[0]) else {
        panic!("a second copy before the grace has passed")
    };
    assert_eq!(retry_ms, GRACE_MS_MIN - 100);
    assert!(holders == [peer(1)] || holders == [peer(2)], "{holders:?}");
}

#[test]
fn a_peer_alone_among_the_dead_gets_everything_after_one_grace() {
    let mut uploads = Uploads::new(Sharing::FirstCopies);
    let (mut dead, mut alive) = (Bitmap::empty(10), Bitmap::empty(10));
    while !dead.is_full() {
        ask(&mut uploads, 0, 1, &mut dead);
    }
    assert!(matches!(
        ask(&mut uploads, 0, 2, &mut alive),
        UploadDecision::Busy { .. }
    ));
    for _ in 0..10 {
        assert!(matches!(
            ask(&mut uploads, GRACE_MS_MIN, 2, &mut alive),
            UploadDecision::Send { .. }
        ));
    }
    assert!(alive.is_full());
}

/// Peers 1 and 3 pass on to one another what they receive; peer 2 passes it on only if it is honest. Runs until the uploads
/// send no more at `now_ms`.
fn exchange(uploads: &mut Uploads, now_ms: u64, got: &mut [Bitmap; 3], is_honest: bool) {
    loop {
        let mut is_any_sent = false;
        for number in 1..=3 {
            let decision = ask(uploads, now_ms, number, &mut got[usize::from(number) - 1]);
            is_any_sent |= matches!(decision, UploadDecision::Send { .. });
        }
        let [one, two, three] = got;
        one.insert_all(three);
        three.insert_all(one);
        if is_honest {
            one.insert_all(two);
            three.insert_all(two);
        }
        if !is_any_sent {
            return;
        }
    }
}

#[test]
fn a_peer_that_passes_nothing_on_is_served_after_those_that_do() {
    let mut uploads = Uploads::new(Sharing::FirstCopies);
    let mut got = [const { 60 }; 3].map(Bitmap::empty);
    // They have been here for a while, with one shard each.
    for number in 1..=3 {
        ask(&mut uploads, 0, number, &mut got[usize::from(number) - 1]);
    }
    exchange(&mut uploads, GRACE_MS_MIN, &mut got, false);
    assert!(got[0].is_full() && got[2].is_full());
    assert!(got[1].count() <= KEPT_MAX + 1, "{}", got[1].count());
    // Once no other peer asks, it is served: perhaps no peer can connect to it.
    let later_ms = GRACE_MS_MIN + (ASKING_PATIENCES + 1) * GRACE_MS_MAX;
    assert!(matches!(
        ask(&mut uploads, later_ms, 2, &mut got[1]),
        UploadDecision::Send { .. }
    ));
}

#[test]
fn a_peer_that_passes_on_what_it_is_sent_is_sent_as_much_as_others() {
    let mut uploads = Uploads::new(Sharing::FirstCopies);
    let mut got = [const { 60 }; 3].map(Bitmap::empty);
    exchange(&mut uploads, 5, &mut got, true);
    assert!(got[0].is_full() && got[2].is_full());
    assert_eq!(got[1].count(), 20, "a third of the first copies");
}

#[test]
fn a_peer_that_gets_on_with_others_is_sent_no_second_copy_however_slowly_it_does() {
    let mut uploads = Uploads::new(Sharing::FirstCopies);
    let (mut first, mut second) = (Bitmap::empty(10), Bitmap::empty(10));
    while !first.is_full() {
        ask(&mut uploads, 0, 1, &mut first);
    }
    // One shard from the other peer within each grace: seven times as long as a stuck peer would wait.
    for shard in 0..7 {
        let now_ms = u64::from(shard) * (GRACE_MS_MIN - 1);
        let asked = ask(&mut uploads, now_ms, 2, &mut second);
        assert!(
            matches!(asked, UploadDecision::Busy { .. }),
            "at {now_ms} ms"
        );
        second.insert(shard);
    }
    // Then nothing more: it has waited for long enough when it is as long as for a stuck one.
    let stuck_ms = 7 * (GRACE_MS_MIN - 1);
    let asked = ask(&mut uploads, stuck_ms, 2, &mut second);
    assert!(matches!(asked, UploadDecision::Busy { .. }));
    let asked = ask(&mut uploads, stuck_ms + GRACE_MS_MIN, 2, &mut second);
    assert!(matches!(asked, UploadDecision::Send { .. }), "{asked:?}");
}

#[test]
fn a_peer_that_drips_cannot_hold_another_back_for_ever() {
    let mut uploads = Uploads::new(Sharing::FirstCopies);
    let (mut first, mut second) = (Bitmap::empty(40), Bitmap::empty(40));
    while !first.is_full() {
        ask(&mut uploads, 0, 1, &mut first);
    }
    let mut shard = 0;
    loop {
        let now_ms = u64::from(shard) * (GRACE_MS_MIN - 1);
        match ask(&mut uploads, now_ms, 2, &mut second) {
            UploadDecision::Busy { .. } => second.insert(shard),
            decided => {
                assert!(matches!(decided, UploadDecision::Send { .. }));
                break;
            }
        };
        shard += 1;
        assert!(now_ms <= PATIENCES_MAX * GRACE_MS_MIN);
    }
}

#[test]
fn the_grace_is_as_long_as_the_first_pass_took_less_the_time_in_which_nobody_asked() {
    for (second_at_ms, grace_ms) in [(4_500, 3_500), (3_600_000, PAUSE_MS_MAX)] {
        let mut uploads = Uploads::new(Sharing::FirstCopies);
        let mut first = Bitmap::empty(2);
        ask(&mut uploads, 1_000, 1, &mut first);
        ask(&mut uploads, second_at_ms, 1, &mut first);
        let waiting = ask(&mut uploads, second_at_ms + 1_000, 2, &mut Bitmap::empty(2));
        let UploadDecision::Busy { retry_ms, .. } = waiting else {
            panic!("{waiting:?}")
        };
        assert_eq!(retry_ms, grace_ms);
    }
}

#[test]
fn a_peer_that_asks_again_for_what_it_got_waits_longer_than_others() {
    let mut uploads = Uploads::new(Sharing::FirstCopies);
    let (held, nothing) = (Bitmap::full(1), Bitmap::empty(1));
    let mut decide = |now_ms, number| {
        uploads.decide(
            now_ms,
            peer(number),
            OBJECT,
            &held,
            WantedShard::AnyBut(&nothing),
        )
    };
    assert_eq!(decide(0, 1), UploadDecision::Send { shard: 0 });
    assert!(matches!(decide(0, 2), UploadDecision::Busy { .. }));
    assert!(matches!(
        decide(GRACE_MS_MIN, 1),
        UploadDecision::Busy { .. }
    ));
    assert_eq!(decide(GRACE_MS_MIN, 2), UploadDecision::Send { shard: 0 });
    assert_eq!(decide(10 * REPEAT_MS, 1), UploadDecision::Send { shard: 0 });
}

#[test]
fn a_shard_that_did_not_leave_counts_as_never_sent() {
    let mut uploads = Uploads::new(Sharing::FirstCopies);
    let held = Bitmap::full(1);
    let decision = uploads.decide(0, peer(1), OBJECT, &held, WantedShard::Shard(0));
    assert_eq!(decision, UploadDecision::Send { shard: 0 });
    uploads.finish(0, &peer(1), &OBJECT, 0, SendOutcome::Failed);
    for number in [1, 2] {
        let again = uploads.decide(1, peer(number), OBJECT, &held, WantedShard::Shard(0));
        assert_eq!(again, UploadDecision::Send { shard: 0 });
        uploads.finish(1, &peer(number), &OBJECT, 0, SendOutcome::Failed);
    }
}

#[test]
fn what_is_not_held_is_missing() {
    let mut uploads = Uploads::new(Sharing::OnDemand);
    let mut held = Bitmap::empty(4);
    held.insert(2);
    let mut decide = |wanted| uploads.decide(0, peer(1), OBJECT, &held, wanted);
    assert_eq!(decide(WantedShard::Shard(1)), UploadDecision::Missing);
    assert_eq!(decide(WantedShard::Shard(99)), UploadDecision::Missing);
    assert_eq!(decide(WantedShard::AnyBut(&held)), UploadDecision::Missing);
    assert_eq!(
        decide(WantedShard::AnyBut(&Bitmap::empty(4))),
        UploadDecision::Send { shard: 2 }
    );
}

proptest! {
    /// Peers that never pass anything on, some of which ask for everything again and again.
    #[test]
    fn every_peer_finishes_from_the_learner_alone(
        shards in 1u32..40,
        honest in 1u8..8,
        greedy in 0u8..4,
        step_ms in 1u64..200,
    ) {
        let mut uploads = Uploads::new(Sharing::FirstCopies);
        let held = Bitmap::full(shards);
        let nothing = Bitmap::empty(shards);
        let mut got: Vec<Bitmap> = (0..honest).map(|_| Bitmap::empty(shards)).collect();
        let (mut now_ms, mut sent) = (0, vec![0u64; shards as usize]);
        while got.iter().any(|bitmap| !bitmap.is_full()) {
            for number in 0..greedy {
                let who = peer(100 + number);
                let decision = uploads.decide(now_ms, who, OBJECT, &held, WantedShard::AnyBut(&nothing));
                if let UploadDecision::Send { shard } = decision {
                    uploads.finish(now_ms, &who, &OBJECT, shard, SendOutcome::Sent);
                    sent[shard as usize] += 1;
                }
            }
            for (number, bitmap) in got.iter_mut().enumerate() {
                if let UploadDecision::Send { shard } = ask(&mut uploads, now_ms, number as u8, bitmap) {
                    sent[shard as usize] += 1;
                }
            }
            if now_ms < GRACE_MS_MIN {
                prop_assert!(sent.iter().all(|copies| *copies <= 1), "a second copy within the grace");
            }
            now_ms += step_ms;
            // A greedy peer gets a pass each time its wait has doubled, so a handful of rounds each.
            let rounds = u64::from(honest) + 8 * u64::from(greedy) + 2;
            let bound_ms = rounds * GRACE_MS_MIN * 8 + step_ms * u64::from(shards) * rounds;
            prop_assert!(now_ms < 2 * bound_ms, "still not finished at {now_ms} ms");
        }
    }
}
