//! Generation: an engine that lives as long as its worker. Groups of requests are submitted at any time, rows of
//! different lengths, prompts and versions decode together, and a finished row's slot is taken by the next request.
//!
//! [`scheduler`] decides (pure), [`executor`] computes, this file draws tokens and keeps the answers. Knows nothing of
//! rewards or leases. Invariant: a completion depends on its own request and the versions that it ran under only, up to
//! the rounding of the products it shares with other rows; keys and values belong to one version.

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

/// Share of the free memory that keys and values may take where the configuration names no budget.
const FREE_SHARE: u64 = 2;

/// How generation shares the machine.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EngineConfig {
    /// Rows that decode together. More use the processor better and take more memory for keys and values.
    pub slots: NonZeroUsize,
    /// Memory for keys and values in bytes; half of what the device has free when none is named. Rows give way when it
    /// runs out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_bytes: Option<NonZeroU64>,
    /// Tokens of prompts that are read in one step beside the rows that decode: more read long prompts faster, fewer
    /// hold the others up less.
    pub chunk_tokens: NonZeroUsize,
}

impl Default for EngineConfig {
    fn default() -> Self {
        // Products of fewer rows are bound by reading the weights.
        const SLOTS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(63);
        const CHUNK: NonZeroUsize = NonZeroUsize::MIN.saturating_add(511);
        Self {
            slots: SLOTS,
            kv_bytes: None,
            chunk_tokens: CHUNK,
        }
    }
}

/// What becomes of an answer that is not finished when new weights come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightsRule {
    /// It ends under the weights that it was submitted under.
    #[default]
    Drain,
    /// It goes on under the new ones from its next token: what it holds is read again under them.
    InFlight,
}

/// One answer to generate.
#[derive(Debug, Clone)]
pub struct GenerationRequest {
    /// At least one token. Requests that share a prompt have it read once.
    pub prompt: Arc<[u32]>,
    /// Most tokens of the answer, a stop token included.
    pub max_tokens: usize,
    /// Tokens that end the answer.
    pub stop_ids: Arc<[u32]>,
    /// Texts that end the answer.
    pub stop_strings: Option<StopStrings>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// What happens when new weights come.
    pub weights: WeightsRule,
}

impl GenerationRequest {
    /// A request that ends at stop tokens only and under the weights that it began with.
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

/// Consecutive tokens of an answer that one version drew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The version, as its weights were named to the engine.
    pub version: u64,
    /// How many tokens.
    pub tokens: usize,
}

/// One answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// Tokens in order, the stop token included.
    pub tokens: Vec<u32>,
    /// Log-probability of each under the sampling temperature, in nats.
    pub logprobs: Vec<f32>,
    /// Which versions drew them, in order; together as many as there are tokens.
    pub spans: Vec<Span>,
    /// Why it ended.
    pub finish: Finish,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// With this stop token.
    Stop(u32),
    /// With the token that completed the stop string of this index.
    StopString(usize),
    /// At the largest number of tokens.
    Length,
}

/// Names what was submitted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(u64);

/// A group that is complete.
#[derive(Debug, Clone, PartialEq)]
pub struct Answered {
    /// As submitted.
    pub group: GroupId,
    /// In the order of its requests.
    pub completions: Vec<Completion>,
}

/// Generates an answer to every request, in the order of the requests.
///
/// # Errors
/// When a request cannot be answered (empty prompt, unknown token, too long, bad temperature, more keys and values than
/// there is memory for), before any is; or when the policy's logits are not finite.
pub fn generate(
    policy: &Policy,
    config: &EngineConfig,
    requests: Vec<GenerationRequest>,
) -> Result<Vec<Completion>, PolicyError> {
    let slots = config.slots.get().min(requests.len()).max(1);
    let longest = requests.iter().map(positions).max().unwrap_or(0);
    // No more than these rows can use: their own blocks, their prompts' and one to copy to.
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

/// Positions that a request takes at most; its last token is never fed.
fn positions(request: &GenerationRequest) -> usize {
    let answer = request.max_tokens.saturating_sub(1);
    request.prompt.len().saturating_add(answer)
}

/// Bytes of one block in all layers.
fn block_bytes(config: &Config) -> u64 {
    let position = 2 * config.num_hidden_layers * config.kv_width() * size_of::<f32>();
    (position * BLOCK) as u64
}

/// Weights in use.
#[derive(Debug)]
struct Live {
    policy: Policy,
    version: u64,
}

/// A request on its way.
struct Underway {
    group: GroupId,
    /// Its place in the group.
    place: usize,
    request: GenerationRequest,
    watch: StopWatch,
    completion: Completion,
}

/// A group on its way.
struct Gathering {
    completions: Vec<Option<Completion>>,
    missing: usize,
}

/// A long-lived generator. It lives on one thread; [`Policy`]s come in and completions go out.
pub struct Engine {
    scheduler: Scheduler,
    executor: Box<dyn Executor>,
    live: BTreeMap<WeightsId, Live>,
    underway: BTreeMap<Sequence, Underway>,
    groups: BTreeMap<GroupId, Gathering>,
    submitted: Sequence,
    groups_made: u64,
    finished: Vec<Answered>,
    /// Tokens are drawn on them.
    threads: Threads,
    budget_bytes: u64,
}

impl Engine {
    /// An engine whose first weights are `policy`, named `version` in the spans of its answers.
    ///
    /// # Errors
    /// When the budget holds no block of keys and values, or the device refuses.
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

    /// The version that requests submitted now run under.
    pub fn version(&self) -> u64 {
        self.live
            .last_key_value()
            .map_or(0, |(_, live)| live.version)
    }

    /// Whether nothing is left to generate.
    pub fn is_idle(&self) -> bool {
        self.groups.is_empty() && self.finished.is_empty()
    }

    /// Requests that have no slot yet.
    pub fn queued(&self) -> usize {
        self.scheduler.queued()
    }

    /// Requests that have a slot.
    pub fn running(&self) -> usize {
        self.scheduler.running()
    }

    /// Texts of so many positions that the memory holds at once, prompts apart.
    pub fn rows_in_memory(&self, positions: usize) -> u32 {
        let blocks = self.scheduler.blocks() / positions.div_ceil(BLOCK).max(1);
        u32::try_from(blocks).unwrap_or(u32::MAX)
    }

    /// Most bytes that keys and values take.
    pub fn kv_bytes(&self) -> u64 {
        self.budget_bytes
    }

    /// What was done so far.
    pub fn stats(&self) -> ScheduleStats {
        self.scheduler.stats()
    }

    /// Takes a group of requests on; all of them or none.
    ///
    /// # Errors
    /// When a request can never be answered: empty prompt, unknown token, too long, bad temperature, or more keys and
    /// values than the budget holds.
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
            self.hand_out(group);
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

    /// Takes new weights on: for every request submitted from now on, and for those underway whose rule says so.
    ///
    /// # Errors
    /// When the weights are of another shape or kernel set than those in use.
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

    /// Lets weights go that nobody runs under, all but the newest.
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

    /// One forward pass and one token for every row that has read its text. Returns the groups that it completed.
    ///
    /// # Errors
    /// When the device fails or logits are not finite; the engine must not be used after that.
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
            let weights_id = feeds.first().map_or(0, |feed| feed.weights_id); // of all that are computed together
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
                self.hand_out(group);
            }
        }
    }

    fn hand_out(&mut self, group: GroupId) {
        if let Some(gathering) = self.groups.remove(&group) {
            let completions = gathering.completions.into_iter().flatten().collect();
            self.finished.push(Answered { group, completions });
        }
    }
}

/// What the requests of some feeds draw, each feed from the row of logits of its place.
fn draws_of<'a>(
    feeds: &'a [&Feed],
    underway: &'a BTreeMap<Sequence, Underway>,
) -> impl Iterator<Item = Draw> + 'a {
    let all = feeds.iter().enumerate();
    let all = all.flat_map(|(row, feed)| feed.draws.iter().map(move |sequence| (row, *sequence)));
    all.filter_map(|(row, sequence)| Some(underway.get(&sequence)?.draw(row, sequence)))
}

impl Underway {
    /// The next token, to be drawn from a row of the logits.
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

    /// Appends a token; true when the answer is complete with it.
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
    /// An answer of no tokens, as it stands before the first.
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
