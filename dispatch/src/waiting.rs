//! How long members with nothing to do wait before they ask again. Waits are spread so that all members of a kind together
//! ask at a steady rate. Workers and critics are counted apart: a thousand idle workers must not delay a few critics.

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
/// Up to this many waiting members ask at the shortest interval.
const FEW: u64 = 2;
/// Members that asked within this time count as waiting: twice the longest wait.
const WAITING_MS: u64 = 2 * RETRY_MS_MAX;

/// A reason to wait, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wait {
    /// Time until the member asks again.
    pub(crate) retry_ms: u64,
    pub(crate) reason: WaitReason,
}

impl Wait {
    /// A wait until `until`, however many members wait.
    pub(crate) fn until(until: UnixMillis, now: UnixMillis, reason: WaitReason) -> Self {
        let retry_ms = until.0.saturating_sub(now.0).max(RETRY_MS_MIN);
        Self { retry_ms, reason }
    }
}

/// The waiting members of one kind, with the time of each one's last request.
#[derive(Debug, Default)]
pub(crate) struct WaitingMembers {
    asked: BTreeMap<PeerId, UnixMillis>,
}

impl WaitingMembers {
    /// Records that a member asked in vain; returns how long it waits.
    pub(crate) fn wait(&mut self, member: PeerId, reason: WaitReason, now: UnixMillis) -> Wait {
        self.asked.insert(member, now);
        self.asked.retain(|_, asked| asked.0 + WAITING_MS > now.0);
        let others = (self.asked.len() as u64).saturating_sub(FEW);
        let spread_ms = others * 1_000 / ASKS_PER_SECOND;
        Wait {
            retry_ms: spread_ms.clamp(RETRY_MS_MIN, RETRY_MS_MAX),
            reason,
        }
    }

    /// Records that a member has something to do.
    pub(crate) fn leave(&mut self, member: &PeerId) {
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

    fn last_of(waiting: &mut WaitingMembers, members: u64, now: u64) -> u64 {
        let waits = (0..members)
            .map(|number| waiting.wait(member(number), WaitReason::NothingOpen, UnixMillis(now)));
        waits.map(|wait| wait.retry_ms).last().unwrap()
    }

    #[test]
    fn a_few_ask_often_and_many_together_no_more_often() {
        let mut waiting = WaitingMembers::default();
        assert_eq!(last_of(&mut waiting, 2, 0), RETRY_MS_MIN);
        assert_eq!(last_of(&mut waiting, 502, 0), 10_000);
        assert_eq!(last_of(&mut waiting, 5_000, 0), RETRY_MS_MAX);
    }

    #[test]
    fn a_member_with_work_or_gone_does_not_make_others_wait() {
        let mut waiting = WaitingMembers::default();
        last_of(&mut waiting, 502, 0);
        waiting.leave(&member(7));
        assert_eq!(
            waiting
                .wait(member(8), WaitReason::NothingOpen, UnixMillis(1))
                .retry_ms,
            9_980
        );
        assert_eq!(last_of(&mut waiting, 1, WAITING_MS + 1), RETRY_MS_MIN);
    }
}
