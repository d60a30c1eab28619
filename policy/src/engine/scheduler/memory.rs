//! Blocks of the scheduler's rows and prefixes: which blocks a row writes, and which rows and prefixes give theirs back.

use std::sync::Arc;

use super::{Feeder, Prefix, Request, Row, Scheduler};
use crate::engine::blocks::BlockId;
use crate::engine::plan::{Plan, Sequence};

/// Prefixes kept for future requests, beyond those being read.
const PREFIXES_MAX: usize = 256;

/// Queued requests searched for further users of a prompt: the requests of a group are neighbours.
const LOOK_AHEAD: usize = 8;

impl Scheduler {
    /// Whether every block has as many holders as tables that name it, and is free if no table does.
    pub(super) fn blocks_are_counted(&self) -> bool {
        let rows = self.rows.values().map(|row| &row.table);
        let prefixes = self.prefixes.values().map(|prefix| &prefix.table);
        let mut held: Vec<BlockId> = rows.chain(prefixes).flatten().copied().collect();
        held.sort_unstable();
        let named = |same: &[BlockId]| self.blocks.holders(same[0]) as usize == same.len();
        let counted = held.chunk_by(|one, other| one == other).all(named);
        held.dedup();
        counted && held.len() + self.blocks.free() == self.blocks.count()
    }

    /// Blocks that dropping all idle prefixes would free.
    pub(super) fn idle_blocks(&self) -> usize {
        let idle = self.prefixes.values().filter(|prefix| prefix.is_read());
        idle.flat_map(|prefix| &prefix.table)
            .filter(|block| self.blocks.holders(**block) == 1)
            .count()
    }

    fn table(&self, feeder: Feeder) -> &[BlockId] {
        let table = match feeder {
            Feeder::Row(sequence) => self.rows.get(&sequence).map(|row| &row.table),
            Feeder::Prefix(id) => self.prefixes.get(&id).map(|prefix| &prefix.table),
        };
        table.map_or(&[], Vec::as_slice)
    }

    fn table_mut(&mut self, feeder: Feeder) -> Option<&mut Vec<BlockId>> {
        match feeder {
            Feeder::Row(sequence) => self.rows.get_mut(&sequence).map(|row| &mut row.table),
            Feeder::Prefix(id) => self.prefixes.get_mut(&id).map(|prefix| &mut prefix.table),
        }
    }

    /// The block in which a text of `position` positions continues, if it has other holders.
    fn shared_tail(&self, feeder: Feeder, position: usize) -> Option<BlockId> {
        let block = self.table(feeder).get(position / self.limits.block)?;
        (self.blocks.holders(*block) > 1).then_some(*block)
    }

    /// Frees blocks until a feeder can write up to `end`. False if it feeds nothing in this step.
    pub(super) fn make_room(
        &mut self,
        feeder: Feeder,
        younger: &[(Sequence, Feeder)],
        end: usize,
    ) -> bool {
        loop {
            let Some((position, _)) = self.pending(feeder) else {
                return false;
            };
            self.take_over_tail(feeder, position);
            let copied = usize::from(self.shared_tail(feeder, position).is_some());
            let blocks = end.div_ceil(self.limits.block);
            let wanted = blocks.saturating_sub(self.table(feeder).len()) + copied;
            if self.blocks.free() >= wanted {
                return true;
            }
            if !self.drop_idle_prefix() && !self.preempt_youngest(younger) {
                self.wait_or_give_way(feeder);
                return false;
            }
        }
    }

    /// Handles a feeder that finds no room. A row placed on its prompt in this plan cannot be preempted before the next plan,
    /// so older feeders wait for it. The youngest feeder gives way itself.
    fn wait_or_give_way(&mut self, feeder: Feeder) {
        let of_feeder = |sequence: &Sequence, row: &Row| match feeder {
            Feeder::Row(own) => own == *sequence,
            Feeder::Prefix(id) => row.waits_for == Some(id),
        };
        let youngest = self.rows.last_key_value();
        if youngest.is_none_or(|(sequence, row)| of_feeder(sequence, row)) {
            self.give_way(feeder);
        }
    }

    /// Takes over the last block of a prefix instead of copying it, if no other request is about to need it.
    fn take_over_tail(&mut self, feeder: Feeder, position: usize) {
        let Feeder::Row(sequence) = feeder else {
            return;
        };
        let (Some(tail), Some(row)) =
            (self.shared_tail(feeder, position), self.rows.get(&sequence))
        else {
            return;
        };
        if self.blocks.holders(tail) > 2 {
            return;
        }
        let request = &row.request;
        let same = |other: &Request| {
            other.weights_id == request.weights_id && Arc::ptr_eq(&other.prompt, &request.prompt)
        };
        if self.queue.values().take(LOOK_AHEAD).any(same) {
            return;
        }
        let holds = |prefix: &Prefix| prefix.is_read() && prefix.table.last() == Some(&tail);
        let Some((&id, _)) = self.prefixes.iter().find(|(_, prefix)| holds(prefix)) else {
            return;
        };
        let block = self.limits.block;
        if let Some(prefix) = self.prefixes.get_mut(&id) {
            prefix.table.pop();
            prefix.len = prefix.table.len() * block;
            prefix.read = prefix.len;
            self.blocks.release(tail);
            if prefix.len == 0 {
                self.prefixes.remove(&id);
            }
        }
    }

    /// Makes the blocks from `position` to `end` a feeder's own. The caller has made room for them.
    pub(super) fn own_tail(
        &mut self,
        feeder: Feeder,
        position: usize,
        end: usize,
        plan: &mut Plan,
    ) {
        let mut table = match self.table_mut(feeder) {
            Some(table) => std::mem::take(table),
            None => return,
        };
        let first = position / self.limits.block;
        if let Some(&shared) = table.get(first)
            && self.blocks.holders(shared) > 1
            && let Some(own) = self.blocks.take()
        {
            plan.copies.push((shared, own));
            self.blocks.release(shared);
            table[first] = own;
        }
        while table.len() < end.div_ceil(self.limits.block)
            && let Some(block) = self.blocks.take()
        {
            table.push(block);
        }
        if let Some(place) = self.table_mut(feeder) {
            *place = table;
        }
    }

    /// Drops the least recently used prefix. False if every prefix is still being read.
    pub(super) fn drop_idle_prefix(&mut self) -> bool {
        let idle = self.prefixes.iter().filter(|(_, prefix)| prefix.is_read());
        let oldest = idle
            .min_by_key(|(id, prefix)| (prefix.used, **id))
            .map(|(id, _)| *id);
        if let Some(id) = oldest {
            self.drop_prefix(id);
        }
        oldest.is_some()
    }

    /// Preempts the youngest feeder that holds blocks. False if none does.
    fn preempt_youngest(&mut self, younger: &[(Sequence, Feeder)]) -> bool {
        let holding = |feeder: &&(Sequence, Feeder)| !self.table(feeder.1).is_empty();
        let youngest = younger.iter().rev().find(holding).copied();
        if let Some((_, feeder)) = youngest {
            self.give_way(feeder);
        }
        youngest.is_some()
    }

    /// Puts a row, or all rows that wait for a prefix, back into the queue.
    fn give_way(&mut self, feeder: Feeder) {
        self.stats.preemptions += 1;
        match feeder {
            Feeder::Row(sequence) => self.put_back(sequence),
            Feeder::Prefix(id) => {
                let waits = |(sequence, row): (&Sequence, &Row)| {
                    (row.waits_for == Some(id)).then_some(*sequence)
                };
                let waiting: Vec<Sequence> = self.rows.iter().filter_map(waits).collect();
                for sequence in waiting {
                    self.put_back(sequence);
                }
                self.drop_prefix(id);
            }
        }
    }

    pub(super) fn put_back(&mut self, sequence: Sequence) {
        if let Some(row) = self.rows.remove(&sequence) {
            self.release(&row.table);
            self.queue.insert(sequence, row.request);
        }
    }

    pub(super) fn drop_prefix(&mut self, id: u64) {
        if let Some(prefix) = self.prefixes.remove(&id) {
            self.release(&prefix.table);
        }
    }

    /// Drops unfinished prefixes that no row waits for any more.
    pub(super) fn drop_unwanted_reading(&mut self) {
        let reading = self.prefixes.iter().filter(|(_, prefix)| !prefix.is_read());
        let unwanted: Vec<u64> = reading
            .map(|(id, _)| *id)
            .filter(|id| self.rows.values().all(|row| row.waits_for != Some(*id)))
            .collect();
        for id in unwanted {
            self.drop_prefix(id);
        }
    }

    pub(super) fn trim_prefixes(&mut self) {
        while self.prefixes.len() > PREFIXES_MAX + self.limits.slots && self.drop_idle_prefix() {}
    }

    pub(super) fn release(&mut self, table: &[BlockId]) {
        for block in table {
            self.blocks.release(*block);
        }
    }
}
