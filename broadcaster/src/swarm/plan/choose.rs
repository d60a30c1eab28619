//! Chooses the next request to a peer: the rarest shard, an overdue one, or any shard of the peer's choice.
//!
//! Invariant: a request that this module returns keeps within the bounds of requests in flight, per peer and in all.

use std::collections::BTreeSet;

use muster_protocol::id::PeerId;
use rand::Rng;

use super::peer_state::PeerState;
use super::requests::Asked;
use super::{FetchPlan, PeerRequest, Turn, WINDOW_MAX, WINDOW_MIN, WINDOWS_SUM};
use crate::store::bitmap::Bitmap;
use crate::transport::wire::Chooser;

impl FetchPlan {
    pub(super) fn next_request(&mut self, peer: &PeerId, turn: &Turn) -> Option<PeerRequest> {
        let now_ms = turn.now_ms;
        let source = self.sources.get(peer)?;
        if !source.is_polled && !source.held.is_full() && source.poll_at_ms <= now_ms {
            return Some(PeerRequest::Have);
        }
        let chooser = source.chooser?;
        let no_room = source.pending >= self.window(peer, source)
            || turn.fresh >= WINDOWS_SUM
            || self.requests_in_flight() >= self.requests_max();
        if no_room || source.busy_until_ms > now_ms {
            return None;
        }
        match chooser {
            Chooser::Asker => self
                .rarest(peer)
                .or_else(|| turn.is_any_overdue.then(|| self.overdue(peer, turn))?)
                .map(PeerRequest::Shard),
            Chooser::Holder => self.any_but(turn).map(PeerRequest::AnyBut),
        }
    }

    fn window(&self, peer: &PeerId, source: &PeerState) -> usize {
        match self.slow.contains(peer) {
            true => 1,
            false => {
                let share = (WINDOWS_SUM / self.sources.len().max(1)).clamp(WINDOW_MIN, WINDOW_MAX);
                (WINDOW_MIN + source.delivered).min(share)
            }
        }
    }

    /// Of the shards that this peer holds and that are not requested, the one that the fewest peers hold. A draw decides among
    /// several, so that peers which start together do not all fetch the same shard.
    fn rarest(&mut self, peer: &PeerId) -> Option<u32> {
        let source = self.sources.get(peer)?;
        let (mut best, mut fewest, mut ties) = (None, u16::MAX, 0u32);
        for shard in source.held.iter_both(&self.open) {
            let holders = self.holders[shard as usize];
            if holders > fewest {
                continue;
            }
            ties = if holders < fewest { 1 } else { ties + 1 };
            fewest = holders;
            if self.rng.random_range(0..ties) == 0 {
                best = Some(shard);
            }
        }
        best
    }

    /// A shard that is overdue at another peer, requested once, and held by this one.
    fn overdue(&self, peer: &PeerId, turn: &Turn) -> Option<u32> {
        let source = self.sources.get(peer)?;
        let overdue = self
            .requests
            .iter()
            .filter_map(|pending| match pending.asked {
                Asked::Shard(shard)
                    if pending.source != *peer
                        && pending.is_older_than(turn.hedge_ms, turn.now_ms)
                        && self.requests.copies(shard) == 1
                        && !self.held.contains(shard)
                        && source.held.contains(shard) =>
                {
                    Some((pending.asked_at_ms, shard))
                }
                _ => None,
            });
        overdue.min().map(|(_, shard)| shard)
    }

    /// The shards that are not needed from a peer that chooses; `None` if it can bring no other.
    fn any_but(&self, turn: &Turn) -> Option<Bitmap> {
        let overdue: BTreeSet<PeerId> = self
            .requests
            .iter()
            .filter(|pending| pending.is_older_than(turn.hedge_ms, turn.now_ms))
            .map(|pending| pending.source)
            .collect();
        let mut except = self.held.clone();
        let quick = self.sources.iter().filter(|(peer, source)| {
            let is_proven = source.delivered > 0 && source.chooser == Some(Chooser::Asker);
            is_proven && !overdue.contains(peer) && !self.slow.contains(peer)
        });
        quick.for_each(|(_, source)| except.insert_all(&source.held));
        let mut asked_any = 0;
        for pending in self
            .requests
            .iter()
            .filter(|pending| !overdue.contains(&pending.source))
        {
            match pending.asked {
                Asked::Shard(shard) => {
                    except.insert(shard);
                }
                Asked::Any => asked_any += 1,
                Asked::Have => {}
            }
        }
        // Each request in flight for any shard brings one of the rest.
        (except.length() - except.count() > asked_any).then_some(except)
    }
}
