//! Plans each step: which rows feed which tokens, where their keys and values lie, and which row is preempted when memory
//! runs out.
//!
//! Pure: requests and drawn tokens in, plans out; knows no weights and no logits. A prompt is read once per version, in
//! chunks, and all its requests share its blocks. A row that writes into a shared block copies it first (copy on write, as
//! in PagedAttention, arXiv:2309.06180). When blocks run out, the scheduler drops idle prefixes first and then preempts the
//! youngest row, whose tokens are read again later. Invariants: a row reads keys and values of its own text under its own
//! weights only; the oldest request advances with every plan, so no request starves.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::blocks::{BlockId, Blocks};
use super::plan::{Feed, Plan, ScheduleStats, Sequence, WeightsId};

mod memory;

/// Bounds of a plan.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Rows that run at the same time.
    pub(crate) slots: usize,
    /// Tokens of texts read in one plan, not counting the rows that decode.
    pub(crate) chunk_tokens: usize,
    /// Blocks of the memory.
    pub(crate) blocks: usize,
    /// Positions of a block.
    pub(crate) block: usize,
}

/// A request and the tokens it has drawn.
#[derive(Debug)]
struct Request {
    weights_id: WeightsId,
    prompt: Arc<[u32]>,
    /// Prompt and drawn tokens.
    text: Vec<u32>,
}

/// A request in a slot.
#[derive(Debug)]
struct Row {
    request: Request,
    /// Positions whose keys and values lie in `table`.
    position: usize,
    table: Vec<BlockId>,
    /// The prefix that the row waits for.
    waits_for: Option<u64>,
}

/// A prompt whose keys and values are cached, or being read.
#[derive(Debug)]
struct Prefix {
    weights_id: WeightsId,
    tokens: Arc<[u32]>,
    /// Tokens whose keys and values lie in `table`.
    read: usize,
    /// Tokens to read: all of them, until a row takes the last block over.
    len: usize,
    table: Vec<BlockId>,
    /// The step that last used it.
    used: u64,
}

impl Prefix {
    fn is_read(&self) -> bool {
        self.read == self.len
    }
}

/// A source of tokens: a row, or a prefix that rows wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Feeder {
    Row(Sequence),
    Prefix(u64),
}

/// All requests and the memory they share.
#[derive(Debug)]
pub(crate) struct Scheduler {
    limits: Limits,
    blocks: Blocks,
    queue: BTreeMap<Sequence, Request>,
    rows: BTreeMap<Sequence, Row>,
    prefixes: BTreeMap<u64, Prefix>,
    prefixes_made: u64,
    stats: ScheduleStats,
}

impl Scheduler {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            blocks: Blocks::new(limits.blocks),
            queue: BTreeMap::new(),
            rows: BTreeMap::new(),
            prefixes: BTreeMap::new(),
            prefixes_made: 0,
            stats: ScheduleStats::default(),
        }
    }

    /// Whether a text of `positions` positions fits into an empty memory.
    pub(crate) fn fits(&self, positions: usize) -> bool {
        positions.div_ceil(self.limits.block) <= self.blocks.count()
    }

    /// Queues a request. Its text must fit, and its sequence must be new.
    pub(crate) fn submit(&mut self, sequence: Sequence, weights_id: WeightsId, prompt: Arc<[u32]>) {
        let text = prompt.to_vec();
        let request = Request {
            weights_id,
            prompt,
            text,
        };
        self.queue.insert(sequence, request);
    }

    /// Appends the token that a request drew, queued or running.
    pub(crate) fn drew(&mut self, sequence: Sequence, token: u32) {
        let row = self.rows.get_mut(&sequence).map(|row| &mut row.request);
        if let Some(request) = row.or_else(|| self.queue.get_mut(&sequence)) {
            request.text.push(token);
        }
    }

    /// Ends a request, queued or running.
    pub(crate) fn end(&mut self, sequence: Sequence) {
        self.queue.remove(&sequence);
        if let Some(row) = self.rows.remove(&sequence) {
            self.release(&row.table);
        }
    }

    /// Moves a request to other weights; its text is read again under them.
    pub(crate) fn change_weights(&mut self, sequence: Sequence, weights_id: WeightsId) {
        if self.rows.contains_key(&sequence) {
            self.put_back(sequence);
        }
        if let Some(request) = self.queue.get_mut(&sequence) {
            request.weights_id = weights_id;
        }
        self.drop_unwanted_reading();
    }

    /// Drops the prefixes of weights that no request uses any more.
    pub(crate) fn forget_weights(&mut self, weights_id: WeightsId) {
        let of_weights =
            |(id, prefix): (&u64, &Prefix)| (prefix.weights_id == weights_id).then_some(*id);
        let dropped: Vec<u64> = self.prefixes.iter().filter_map(of_weights).collect();
        for id in dropped {
            self.drop_prefix(id);
        }
    }

    /// Whether a running or queued request uses these weights.
    pub(crate) fn uses_weights(&self, weights_id: WeightsId) -> bool {
        let rows = self.rows.values().map(|row| &row.request);
        rows.chain(self.queue.values())
            .any(|request| request.weights_id == weights_id)
    }

    /// Blocks of the memory, held or free.
    pub(crate) fn blocks(&self) -> usize {
        self.blocks.count()
    }

    /// Requests without a slot.
    pub(crate) fn queued(&self) -> usize {
        self.queue.len()
    }

    /// Requests with a slot.
    pub(crate) fn running(&self) -> usize {
        self.rows.len()
    }

    pub(crate) fn stats(&self) -> ScheduleStats {
        self.stats
    }

    /// Plans the next step and books it as done; the caller runs it before it asks for the next.
    pub(crate) fn plan(&mut self) -> Plan {
        self.drop_unwanted_reading();
        self.admit();
        let mut plan = Plan::default();
        let mut chunk_left = self.limits.chunk_tokens;
        let feeders = self.feeders();
        for (at, &(_, feeder)) in feeders.iter().enumerate() {
            self.plan_feeder(feeder, &feeders[at + 1..], &mut chunk_left, &mut plan);
        }
        plan.feeds.sort_by_key(|feed| feed.weights_id); // stable: by age under the same weights
        self.trim_prefixes();
        self.stats.steps += u64::from(!plan.feeds.is_empty());
        self.stats.busy_slots += self.rows.len() as u64;
        let held = (self.blocks.count() - self.blocks.free()) as u64;
        self.stats.blocks_peak = self.stats.blocks_peak.max(held);
        debug_assert!(self.blocks_are_counted(), "KV blocks counted");
        debug_assert!(
            self.rows.len() <= self.limits.slots,
            "rows within the slots"
        );
        plan
    }

    /// Gives free slots to the oldest requests whose blocks are free.
    fn admit(&mut self) {
        while self.rows.len() < self.limits.slots
            && let Some((&sequence, request)) = self.queue.first_key_value()
        {
            let wanted = self.blocks_wanted(request);
            if !self.rows.is_empty() && self.blocks.free() + self.idle_blocks() < wanted {
                return;
            }
            if let Some(request) = self.queue.remove(&sequence) {
                let row = self.place(request);
                self.rows.insert(sequence, row);
            }
        }
    }

    /// Blocks that a request takes soon: the unshared ones of its text, and one to continue in.
    fn blocks_wanted(&self, request: &Request) -> usize {
        let all = request.text.len() / self.limits.block + 1;
        match self.prefix_of(request.weights_id, &request.prompt) {
            Some(_) => all - request.prompt.len() / self.limits.block,
            None => all,
        }
    }

    /// Makes a row of a request: on top of its prompt's prefix if that is read, else waiting for it.
    fn place(&mut self, request: Request) -> Row {
        let found = self.prefix_of(request.weights_id, &request.prompt);
        let id = found.unwrap_or_else(|| self.open_prefix(request.weights_id, &request.prompt));
        let mut row = Row {
            request,
            position: 0,
            table: Vec::new(),
            waits_for: Some(id),
        };
        if found.is_some() {
            self.stats.prefix_hits += 1;
        }
        // The last token of a text is fed again, since the row draws from its logits.
        let position_max = row.request.text.len() - 1;
        if let Some(prefix) = self.prefixes.get_mut(&id)
            && prefix.is_read()
        {
            prefix.used = self.stats.steps;
            row.waits_for = None;
            row.position = prefix.len.min(position_max);
            let blocks = row.position.div_ceil(self.limits.block);
            row.table = prefix.table[..blocks].to_vec();
            for block in &row.table {
                self.blocks.share(*block);
            }
        }
        row
    }

    /// The prefix that equals this prompt.
    fn prefix_of(&self, weights_id: WeightsId, prompt: &Arc<[u32]>) -> Option<u64> {
        let same = |prefix: &Prefix| {
            prefix.weights_id == weights_id
                && prefix.len == prompt.len()
                && (Arc::ptr_eq(&prefix.tokens, prompt) || prefix.tokens[..prefix.len] == **prompt)
        };
        let mut found = self.prefixes.iter().filter(|(_, prefix)| same(prefix));
        found.next_back().map(|(id, _)| *id)
    }

    /// Opens a prefix for a prompt. It shares the whole blocks that another prefix has in common with it.
    fn open_prefix(&mut self, weights_id: WeightsId, prompt: &Arc<[u32]>) -> u64 {
        let block = self.limits.block;
        let mut best: (usize, &[BlockId]) = (0, &[]);
        for prefix in self
            .prefixes
            .values()
            .filter(|p| p.weights_id == weights_id)
        {
            let known = prefix.tokens[..prefix.read].iter().zip(prompt.iter());
            let equal = known.take_while(|(one, other)| one == other).count();
            // At least one token is left to read, since rows draw from its logits.
            let blocks = equal.min(prompt.len() - 1) / block;
            if blocks > best.0 {
                best = (blocks, &prefix.table[..blocks]);
            }
        }
        let table = best.1.to_vec();
        for shared in &table {
            self.blocks.share(*shared);
        }
        self.stats.prefix_hits += u64::from(!table.is_empty());
        self.prefixes_made += 1;
        let prefix = Prefix {
            weights_id,
            tokens: Arc::clone(prompt),
            read: table.len() * block,
            len: prompt.len(),
            table,
            used: self.stats.steps,
        };
        self.prefixes.insert(self.prefixes_made, prefix);
        self.prefixes_made
    }

    /// Feeders with tokens to feed, oldest first. A prefix is as old as the oldest row that waits for it.
    fn feeders(&self) -> Vec<(Sequence, Feeder)> {
        let mut feeders = Vec::with_capacity(self.rows.len());
        let mut seen = Vec::new();
        for (&sequence, row) in &self.rows {
            match row.waits_for {
                None => feeders.push((sequence, Feeder::Row(sequence))),
                Some(id) if seen.contains(&id) => {}
                Some(id) => {
                    seen.push(id);
                    feeders.push((sequence, Feeder::Prefix(id)));
                }
            }
        }
        feeders
    }

    /// * `younger` — feeders that may still be preempted: the plan holds nothing of theirs yet
    fn plan_feeder(
        &mut self,
        feeder: Feeder,
        younger: &[(Sequence, Feeder)],
        chunk_left: &mut usize,
        plan: &mut Plan,
    ) {
        let Some((position, pending)) = self.pending(feeder) else {
            return; // an older feeder preempted it
        };
        let take = if pending == 1 {
            1
        } else {
            pending.min(*chunk_left)
        };
        if take == 0 || !self.make_room(feeder, younger, position + take) {
            return;
        }
        self.own_tail(feeder, position, position + take, plan);
        if take == 1 && self.decodes(feeder) {
            self.stats.decoded_tokens += 1;
        } else {
            self.stats.read_tokens += take as u64;
            *chunk_left = chunk_left.saturating_sub(take);
        }
        plan.feeds.extend(self.feed(feeder, take));
    }

    /// A feeder's position and the number of tokens it has not fed.
    fn pending(&self, feeder: Feeder) -> Option<(usize, usize)> {
        match feeder {
            Feeder::Row(sequence) => {
                let row = self.rows.get(&sequence)?;
                Some((row.position, row.request.text.len() - row.position))
            }
            Feeder::Prefix(id) => {
                let prefix = self.prefixes.get(&id)?;
                Some((prefix.read, prefix.len - prefix.read))
            }
        }
    }

    /// Whether a feeder feeds a drawn token next.
    fn decodes(&self, feeder: Feeder) -> bool {
        match feeder {
            Feeder::Row(sequence) => self
                .rows
                .get(&sequence)
                .is_some_and(|row| row.position >= row.request.prompt.len()),
            Feeder::Prefix(_) => false,
        }
    }

    /// Books `take` tokens as fed.
    fn feed(&mut self, feeder: Feeder, take: usize) -> Option<Feed> {
        match feeder {
            Feeder::Row(sequence) => {
                let row = self.rows.get_mut(&sequence)?;
                let (position, text) = (row.position, &row.request.text);
                row.position += take;
                let complete = row.position == text.len();
                Some(Feed {
                    weights_id: row.request.weights_id,
                    position,
                    tokens: text[position..position + take].to_vec(),
                    table: row.table.clone(),
                    draws: if complete { vec![sequence] } else { Vec::new() },
                })
            }
            Feeder::Prefix(id) => {
                let prefix = self.prefixes.get_mut(&id)?;
                let position = prefix.read;
                prefix.read += take;
                let feed = Feed {
                    weights_id: prefix.weights_id,
                    position,
                    tokens: prefix.tokens[position..prefix.read].to_vec(),
                    table: prefix.table.clone(),
                    draws: Vec::new(),
                };
                let draws = if prefix.is_read() {
                    self.attach_waiting(id)
                } else {
                    Vec::new()
                };
                Some(Feed { draws, ..feed })
            }
        }
    }

    /// Places all rows that waited for a prefix on top of it. Returns those with nothing left to read.
    fn attach_waiting(&mut self, id: u64) -> Vec<Sequence> {
        let mut draws = Vec::new();
        let Some(prefix) = self.prefixes.get_mut(&id) else {
            return draws;
        };
        prefix.used = self.stats.steps;
        let waiting = |row: &Row| row.waits_for == Some(id);
        for (&sequence, row) in self.rows.iter_mut().filter(|(_, row)| waiting(row)) {
            row.waits_for = None;
            row.position = prefix.len;
            row.table.clone_from(&prefix.table);
            for block in &row.table {
                self.blocks.share(*block);
            }
            if row.position == row.request.text.len() {
                draws.push(sequence);
            }
        }
        draws
    }
}

#[cfg(test)]
mod tests;
