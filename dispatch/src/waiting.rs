//! How long members with nothing to do wait before they ask again: spread so that all of a kind together ask at a steady
//! rate, however many they are. Workers and critics are counted apart: a thousand idle workers must not keep a handful of
//! critics from their work.

use std::collections::BTreeMap;

use muster_protocol::id::{PeerId, UnixMillis};
use muster_protocol::message::ask::WaitReason;

/// Shortest time after which a waiting member asks again.
const RETRY_MS_MIN: u64 = 20;
/// Longest time after which a waiting member asks again.
pub(crate) const RETRY_MS_MAX: u64 = 20_000;
/// Requests per second that dispatch wants to see from all waiting members of a kind together: a ticket that opens finds a
/// worker within 20 ms, and a thousand workers cost a hundredth of a core.
const ASKS_PER_SECOND: u64 = 50;
/// So few members ask as often as they may.
const FEW: u64 = 2;
/// Members that asked within this time count as waiting: twice the longest wait.
const WAITING_MS: u64 = 2 * RETRY_MS_MAX;

/// A reason to wait, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wait {
    /// When to ask again.
    pub retry_ms: u64,
    /// Why.
    pub reason: WaitReason,
}

impl Wait {
    /// A wait until `until`, whoever else waits.
    pub(crate) fn until(until: UnixMillis, now: UnixMillis, reason: WaitReason) -> Self {
        let retry_ms = until.0.saturating_sub(now.0).max(RETRY_MS_MIN);
        Self { retry_ms, reason }
    }
}

/// The waiting members of one kind, by when they asked last.
#[derive(Debug, Default)]
pub struct Crowd {
    asked: BTreeMap<PeerId, UnixMillis>,
}

impl Crowd {
    /// A member asked and there is nothing for it.
    pub fn wait(&mut self, member: PeerId, reason: WaitReason, now: UnixMillis) -> Wait {
        self.asked.insert(member, now);
        self.asked.retain(|_, asked| asked.0 + WAITING_MS > now.0);
        let others = (self.asked.len() as u64).saturating_sub(FEW);
        let spread_ms = others * 1_000 / ASKS_PER_SECOND;
        Wait {
            retry_ms: spread_ms.clamp(RETRY_MS_MIN, RETRY_MS_MAX),
            reason,
        }
    }

    /// A member has something to do.
    pub fn leave(&mut self, member: &PeerId) {
        self.asked.remove(member);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(number: u64) -> PeerId {
        let mut id = [0; 32];
        id[..8].copy_from_slice(&number.to_le_bytes());
        PeerId(id)
    }

    fn last_of(crowd: &mut Crowd, members: u64, now: u64) -> u64 {
        let waits = (0..members)
            .map(|number| crowd.wait(member(number), WaitReason::NothingOpen, UnixMillis(now)));
        waits.map(|wait| wait.retry_ms).last().unwrap()
    }

    #[test]
    fn a_few_ask_often_and_a_crowd_together_no_more_often() {
        let mut crowd = Crowd::default();
        assert_eq!(last_of(&mut crowd, 2, 0), RETRY_MS_MIN);
        assert_eq!(last_of(&mut crowd, 502, 0), 10_000);
        assert_eq!(last_of(&mut crowd, 5_000, 0), RETRY_MS_MAX);
    }

    #[test]
    fn who_has_work_or_has_gone_does_not_make_others_wait() {
        let mut crowd = Crowd::default();
        last_of(&mut crowd, 502, 0);
        crowd.leave(&member(7));
        assert_eq!(
            crowd
                .wait(member(8), WaitReason::NothingOpen, UnixMillis(1))
                .retry_ms,
            9_980
        );
        assert_eq!(last_of(&mut crowd, 1, WAITING_MS + 1), RETRY_MS_MIN);
    }
}
