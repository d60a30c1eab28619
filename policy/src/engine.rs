//! Generation by continuous batching: callers submit groups of requests at any time, rows of different lengths, prompts and
//! versions decode together, and the next request takes the slot of a finished row.
//!
//! [`scheduler`] decides (pure), [`executor`] computes, this file draws tokens and collects completions. Knows nothing of
//! rewards or leases. Invariant: a completion depends only on its own request and the versions it ran under, up to the
//! rounding of products it shares with other rows; keys and values belong to one version.

use std::collections::BTreeMap;
use std::num::{NonZeroU64, NonZeroUsize};
use std::sync::Arc;

use crate::config::Config;
use crate::device::free_bytes;
use crate::error::PolicyError;
use crate::kernels::BLOCK;
use crate::kernels::threads::Threads;
use crate::policy::{Policy, Prepared, check_temperature};
use crate::sampling::{Sampling, uniform};

use draws::{Draw, Drawn};
use executor::candle::CandleExecutor;
use executor::fused::FusedExecutor;
use executor::{Executor, Outcome};
pub use plan::ScheduleStats;
use plan::{Feed, Sequence, WeightsId};
use scheduler::{Limits, Scheduler};
use stops::StopWatch;
pub use stops::{StopAt, StopStrings};

mod blocks;
mod draws;
mod executor;
mod plan;
mod scheduler;
mod stops;

/// Without a configured budget, keys and values take the free memory divided by this.
const FREE_SHARE: u64 = 2;

/// Limits of generation on this machine.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EngineConfig {
    /// Rows that decode together. More rows use the processor better and take more memory for keys and values.
    pub slots: NonZeroUsize,
    /// Memory for keys and values, in bytes; by default half of the device's free memory. Rows are preempted when it runs
    /// out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_bytes: Option<NonZeroU64>,
    /// Tokens of prompts read in one step beside the rows that decode. More tokens read long prompts faster; fewer delay the
    /// decoding rows less.
    pub chunk_tokens: NonZeroUsize,
}

impl Default for EngineConfig {
    fn default() -> Self {
        // Products of fewer rows are bound by reading the weights.
        const SLOTS: NonZeroUsize = NonZeroUsize::new(64).unwrap();
        const CHUNK: NonZeroUsize = NonZeroUsize::new(512).unwrap();
        Self {
            slots: SLOTS,
            kv_bytes: None,
            chunk_tokens: CHUNK,
        }
    }
}

/// Weights under which an unfinished answer continues after a swap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightsRule {
    /// The answer finishes under the weights it was submitted under.
    #[default]
    Drain,
    /// The answer continues under the new weights from its next token; its text is read again under them.
    InFlight,
}

/// A request for one completion.
#[derive(Debug, Clone)]
pub struct GenerationRequest {
    /// At least one token. Requests that share a prompt read it once.
    pub prompt: Arc<[u32]>,
    /// Most tokens of the completion, stop token included.
    pub max_tokens: usize,
    /// Tokens that end the completion.
    pub stop_ids: Arc<[u32]>,
    /// Texts that end the completion.
    pub stop_strings: Option<StopStrings>,
    pub sampling: Sampling,
    pub weights: WeightsRule,
}

impl GenerationRequest {
    /// A request without stop strings that finishes under the weights it was submitted under.
    pub fn new(
        prompt: Arc<[u32]>,
        max_tokens: usize,
        stop_ids: Arc<[u32]>,
        sampling: Sampling,
    ) -> Self {
        Self {
            prompt,
            max_tokens,
            stop_ids,
            stop_strings: None,
            sampling,
            weights: WeightsRule::Drain,
        }
    }
}

/// Consecutive tokens of a completion drawn under one version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Version that the caller gave the weights.
    pub version: u64,
    /// Number of tokens.
    pub tokens: usize,
}

/// A generated answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// Tokens in order, the stop token included.
    pub tokens: Vec<u32>,
    /// Log-probability of each under the sampling temperature, in nats.
    pub logprobs: Vec<f32>,
    /// Versions that drew the tokens, in order; their lengths add up to the number of tokens.
    pub spans: Vec<Span>,
    pub finish: Finish,
}

/// Why a completion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// At this stop token.
    Stop(u32),
    /// At the token that completed the stop string of this index.
    StopString(usize),
    /// At the limit of `max_tokens`.
    Length,
}

/// Id of the requests of one [`Engine::submit`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(u64);

/// A completed group.
#[derive(Debug, Clone, PartialEq)]
pub struct Answered {
    /// Id returned by [`Engine::submit`].
    pub group: GroupId,
    /// In the order of its requests.
    pub completions: Vec<Completion>,
}

/// Generates a completion for every request, in the order of the requests.
///
/// # Errors
/// If a request cannot be answered (empty prompt, unknown token, too long, bad temperature, too little memory for its keys
/// and values), before generation starts; or if the policy's logits are not finite.
pub fn generate(
    policy: &Policy,
    config: &EngineConfig,
    requests: Vec<GenerationRequest>,
) -> Result<Vec<Completion>, PolicyError> {
    let slots = config.slots.get().min(requests.len()).max(1);
    let longest = requests.iter().map(positions).max().unwrap_or(0);
    // As many as these rows can use: their own blocks, those of their prompts, and one each to copy to.
    let wanted = (longest.div_ceil(BLOCK) + 1).saturating_mul(2 * slots);
    let mut engine = Engine::with_blocks_max(policy.clone(), 0, config, wanted)?;
    if requests.is_empty() {
        return Ok(Vec::new());
    }
    engine.submit(requests)?;
    let mut answered = Vec::new();
    while !engine.is_idle() {
        answered.extend(engine.step()?);
    }
    let completions = answered.into_iter().flat_map(|group| group.completions);
    Ok(completions.collect())
}

/// Most positions that a request takes; its last token is never fed.
fn positions(request: &GenerationRequest) -> usize {
    let answer = request.max_tokens.saturating_sub(1);
    request.prompt.len().saturating_add(answer)
}

/// Bytes of one block in all layers.
fn block_bytes(config: &Config) -> u64 {
    let position = 2 * config.num_hidden_layers * config.kv_width() * size_of::<f32>();
    (position * BLOCK) as u64
}

/// Weights that requests run under.
#[derive(Debug)]
struct Live {
    policy: Policy,
    version: u64,
}

/// An unfinished request.
struct Underway {
    group: GroupId,
    /// Index in the group.
    place: usize,
    request: GenerationRequest,
    watch: StopWatch,
    completion: Completion,
}

/// An unfinished group.
struct Gathering {
    completions: Vec<Option<Completion>>,
    missing: usize,
}

/// A long-lived generator on one thread.
pub struct Engine {
    scheduler: Scheduler,
    executor: Box<dyn Executor>,
    live: BTreeMap<WeightsId, Live>,
    underway: BTreeMap<Sequence, Underway>,
    groups: BTreeMap<GroupId, Gathering>,
    submitted: Sequence,
    groups_made: u64,
    finished: Vec<Answered>,
    /// Threads that draw tokens.
    threads: Threads,
    budget_bytes: u64,
}

impl Engine {
    /// An engine that starts with the weights of `policy`; spans name them `version`.
    ///
    /// # Errors
    /// If the budget is smaller than one block of keys and values, or the device fails.
    pub fn new(policy: Policy, version: u64, config: &EngineConfig) -> Result<Self, PolicyError> {
        let longest = policy.config().max_position_embeddings.div_ceil(BLOCK) + 1;
        let useful = longest.saturating_mul(config.slots.get().saturating_mul(2));
        Self::with_blocks_max(policy, version, config, useful)
    }

    fn with_blocks_max(
        policy: Policy,
        version: u64,
        config: &EngineConfig,
        blocks_max: usize,
    ) -> Result<Self, PolicyError> {
        let budget_bytes = match config.kv_bytes {
            Some(bytes) => bytes.get(),
            None => free_bytes(policy.device()) / FREE_SHARE,
        };
        let block_bytes = block_bytes(policy.config());
        let fitting = usize::try_from(budget_bytes / block_bytes).unwrap_or(usize::MAX);
        let blocks = fitting.min(blocks_max).min(u32::MAX as usize);
        if blocks == 0 {
            return Err(PolicyError::NoKvMemory {
                budget_bytes,
                block_bytes,
            });
        }
        let limits = Limits {
            slots: config.slots.get(),
            chunk_tokens: config.chunk_tokens.get(),
            blocks,
            block: BLOCK,
        };
        let mut executor: Box<dyn Executor> = match policy.prepared() {
            Prepared::Fused(weights) => Box::new(FusedExecutor::new(&policy, weights, blocks)?),
            Prepared::Candle(weights) => Box::new(CandleExecutor::new(&policy, weights, blocks)?),
        };
        executor.adopt(0, &policy);
        let threads = policy.threads().clone();
        Ok(Self {
            scheduler: Scheduler::new(limits),
            executor,
            live: BTreeMap::from([(0, Live { policy, version })]),
            underway: BTreeMap::new(),
            groups: BTreeMap::new(),
            submitted: 0,
            groups_made: 0,
            finished: Vec::new(),
            threads,
            budget_bytes: blocks as u64 * block_bytes,
        })
    }

    /// Version under which newly submitted requests run.
    pub fn version(&self) -> u64 {
        self.live
            .last_key_value()
            .map_or(0, |(_, live)| live.version)
    }

    /// Whether no request is unfinished and no group waits to be returned.
    pub fn is_idle(&self) -> bool {
        self.groups.is_empty() && self.finished.is_empty()
    }

    /// Requests without a slot.
    pub fn queued(&self) -> usize {
        self.scheduler.queued()
    }

    /// Requests with a slot.
    pub fn running(&self) -> usize {
        self.scheduler.running()
    }

    /// Rows of `positions` positions that fit into the memory at the same time, without shared prompts.
    pub fn rows_in_memory(&self, positions: usize) -> u32 {
        let blocks = self.scheduler.blocks() / positions.div_ceil(BLOCK).max(1);
        u32::try_from(blocks).unwrap_or(u32::MAX)
    }

    /// Bytes reserved for keys and values.
    pub fn kv_bytes(&self) -> u64 {
        self.budget_bytes
    }

    /// Counters since the engine started.
    pub fn stats(&self) -> ScheduleStats {
        self.scheduler.stats()
    }

    /// Submits a group of requests; all of them or none.
    ///
    /// # Errors
    /// If a request can never be answered: empty prompt, unknown token, too long, bad temperature, or more keys and values
    /// than the budget holds.
    pub fn submit(&mut self, requests: Vec<GenerationRequest>) -> Result<GroupId, PolicyError> {
        for (row, request) in requests.iter().enumerate() {
            self.check(row, request)?;
        }
        let weights_id = self
            .live
            .last_key_value()
            .map_or(0, |(weights_id, _)| *weights_id);
        self.groups_made += 1;
        let group = GroupId(self.groups_made);
        let count = requests.len();
        self.groups.insert(
            group,
            Gathering {
                completions: vec![None; count],
                missing: count,
            },
        );
        for (place, request) in requests.into_iter().enumerate() {
            if request.max_tokens == 0 {
                self.complete(group, place, Completion::empty());
                continue;
            }
            self.submitted += 1;
            self.scheduler
                .submit(self.submitted, weights_id, Arc::clone(&request.prompt));
            let underway = Underway {
                group,
                place,
                request,
                watch: StopWatch::default(),
                completion: Completion::empty(),
            };
            self.underway.insert(self.submitted, underway);
        }
        if count == 0 {
            self.return_group(group);
        }
        Ok(group)
    }

    fn check(&self, row: usize, request: &GenerationRequest) -> Result<(), PolicyError> {
        if request.prompt.is_empty() {
            return Err(PolicyError::Empty { row });
        }
        let Some((_, Live { policy, .. })) = self.live.last_key_value() else {
            return Ok(());
        };
        let all = request.prompt.len().saturating_add(request.max_tokens);
        policy.check_row(row, &request.prompt, all)?;
        if let Sampling::Prescribed { temperature, .. } = request.sampling {
            check_temperature(temperature)?;
        }
        let needed = positions(request);
        if !self.scheduler.fits(needed) {
            return Err(PolicyError::NeverFits {
                row,
                needed_bytes: needed.div_ceil(BLOCK) as u64 * block_bytes(policy.config()),
                budget_bytes: self.budget_bytes,
            });
        }
        Ok(())
    }

    /// Swaps in new weights for every request submitted from now on and for running [`WeightsRule::InFlight`] requests.
    ///
    /// # Errors
    /// If the weights have another shape or kernel set than those in use.
    pub fn swap(&mut self, policy: Policy, version: u64) -> Result<(), PolicyError> {
        let Some((&newest, live)) = self.live.last_key_value() else {
            return Ok(());
        };
        let (old, new) = (&live.policy, &policy);
        if old.config() != new.config() || old.kernels() != new.kernels() {
            return Err(PolicyError::OtherShape { version });
        }
        let weights_id = newest + 1;
        self.executor.adopt(weights_id, &policy);
        self.live.insert(weights_id, Live { policy, version });
        for (sequence, underway) in &self.underway {
            if underway.request.weights == WeightsRule::InFlight {
                self.scheduler.change_weights(*sequence, weights_id);
            }
        }
        self.forget_unused();
        Ok(())
    }

    /// Drops weights that no request uses, except the newest.
    fn forget_unused(&mut self) {
        let Some((&newest, _)) = self.live.last_key_value() else {
            return;
        };
        let scheduler = &mut self.scheduler;
        let executor = &mut self.executor;
        self.live.retain(|&weights_id, _| {
            let used = weights_id == newest || scheduler.uses_weights(weights_id);
            if !used {
                scheduler.forget_weights(weights_id);
                executor.forget(weights_id);
            }
            used
        });
    }

    /// Runs one forward pass and draws one token for every row that has read its text. Returns the groups it completed.
    ///
    /// # Errors
    /// If the device fails or logits are not finite; the engine must not be used after that.
    pub fn step(&mut self) -> Result<Vec<Answered>, PolicyError> {
        let plan = self.scheduler.plan();
        let Self {
            executor,
            underway,
            threads,
            live,
            ..
        } = self;
        let outcomes = executor.run(&plan, &|feeds, logits| {
            let weights_id = feeds.first().map_or(0, |feed| feed.weights_id); // the same for all feeds of a batch
            let version = live.get(&weights_id).map_or(0, |live| live.version);
            let draws: Vec<Draw> = draws_of(feeds, underway).collect();
            let vocab = logits.len() / feeds.len().max(1);
            let drawn = draws::draw(threads, (logits, vocab), &draws);
            let outcome = |(draw, drawn): (&Draw, _)| Outcome {
                sequence: draw.sequence,
                version,
                drawn,
            };
            draws.iter().zip(drawn).map(outcome).collect()
        })?;
        let mut drawn: Vec<(Sequence, u32, bool)> = Vec::with_capacity(outcomes.len());
        for outcome in outcomes {
            if let Some(underway) = underway.get_mut(&outcome.sequence) {
                let row = underway.place;
                let token = outcome.drawn.ok_or(PolicyError::NotFinite { row })?;
                let done = underway.take(token, outcome.version);
                drawn.push((outcome.sequence, token.token, done));
            }
        }
        for (sequence, token, done) in drawn {
            if done {
                self.finish(sequence);
            } else {
                self.scheduler.drew(sequence, token);
            }
        }
        if self.live.len() > 1 {
            self.forget_unused();
        }
        Ok(std::mem::take(&mut self.finished))
    }

    fn finish(&mut self, sequence: Sequence) {
        self.scheduler.end(sequence);
        if let Some(done) = self.underway.remove(&sequence) {
            self.complete(done.group, done.place, done.completion);
        }
    }

    fn complete(&mut self, group: GroupId, place: usize, completion: Completion) {
        if let Some(gathering) = self.groups.get_mut(&group) {
            gathering.completions[place] = Some(completion);
            gathering.missing -= 1;
            if gathering.missing == 0 {
                self.return_group(group);
            }
        }
    }

    fn return_group(&mut self, group: GroupId) {
        if let Some(gathering) = self.groups.remove(&group) {
            let completions = gathering.completions.into_iter().flatten().collect();
            self.finished.push(Answered { group, completions });
        }
    }
}

/// The draws that some feeds ask for, each from the row of logits at the feed's index.
fn draws_of<'a>(
    feeds: &'a [&Feed],
    underway: &'a BTreeMap<Sequence, Underway>,
) -> impl Iterator<Item = Draw> + 'a {
    let all = feeds.iter().enumerate();
    let all = all.flat_map(|(row, feed)| feed.draws.iter().map(move |sequence| (row, *sequence)));
    all.filter_map(|(row, sequence)| Some(underway.get(&sequence)?.draw(row, sequence)))
}

impl Underway {
    /// The draw of the next token from a row of the logits.
    fn draw(&self, row: usize, sequence: Sequence) -> Draw {
        let place = self.completion.tokens.len() as u64;
        let (temperature, uniform) = match self.request.sampling {
            Sampling::Greedy => (1.0, None),
            Sampling::Prescribed {
                seed,
                rollout,
                temperature,
            } => (temperature, Some(uniform(&seed, rollout, place))),
        };
        Draw {
            sequence,
            row,
            temperature,
            uniform,
        }
    }

    /// Appends a token. True if it completes the answer.
    fn take(&mut self, Drawn { token, logprob }: Drawn, version: u64) -> bool {
        let (request, completion) = (&self.request, &mut self.completion);
        completion.tokens.push(token);
        completion.logprobs.push(logprob);
        match completion.spans.last_mut() {
            Some(span) if span.version == version => span.tokens += 1,
            _ => completion.spans.push(Span { version, tokens: 1 }),
        }
        let completed = match &request.stop_strings {
            Some(strings) => self.watch.push(strings, token),
            None => None,
        };
        let finish = match completed {
            _ if request.stop_ids.contains(&token) => Some(Finish::Stop(token)),
            Some(string) => Some(Finish::StopString(string)),
            None if completion.tokens.len() >= request.max_tokens => Some(Finish::Length),
            None => None,
        };
        completion.finish = finish.unwrap_or(Finish::Length);
        finish.is_some()
    }
}

impl Completion {
    /// A completion before its first token.
    fn empty() -> Self {
        Self {
            tokens: Vec::new(),
            logprobs: Vec::new(),
            spans: Vec::new(),
            finish: Finish::Length,
        }
    }
}

#[cfg(test)]
mod tests;
