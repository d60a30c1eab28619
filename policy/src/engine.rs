//! Generation: rows of different lengths decode together, and a finished row's slot is taken by the next request at once.
//!
//! A prompt is read in one step, not token by token, and a prompt that a slot has already read is copied from there. Knows
//! nothing of rewards or leases. Invariant: a completion depends on its own request only, up to the rounding of the
//! products it shares with other rows.

use std::num::NonZeroUsize;
use std::rc::Rc;
use std::sync::Arc;

use crate::decoder;
use crate::kernels::candle::Candle;
use crate::kernels::fused::Fused;
use crate::kernels::{Batch, Kernels, Row};
use crate::policy::{Policy, PolicyError, Prepared, check_temperature};
use crate::sampling::{Distribution, Sampling, uniform};

/// Elements of logits held at once; a step over more rows asks the head several times.
const LOGITS_MAX: usize = 1 << 22;

/// How generation shares the machine.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EngineConfig {
    /// Rows that decode together. More use the processor better and take more memory for keys and values.
    pub slots: NonZeroUsize,
}

impl Default for EngineConfig {
    fn default() -> Self {
        // Products of fewer rows are bound by reading the weights.
        const SLOTS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(63);
        Self { slots: SLOTS }
    }
}

/// One answer to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationRequest {
    /// At least one token. Requests that share a prompt have it read once.
    pub prompt: Arc<[u32]>,
    /// Most tokens of the answer, a stop token included.
    pub max_tokens: usize,
    /// Tokens that end the answer.
    pub stop_ids: Arc<[u32]>,
    /// How tokens are chosen.
    pub sampling: Sampling,
}

/// One answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// Tokens in order, the stop token included.
    pub tokens: Vec<u32>,
    /// Log-probability of each under the sampling temperature, in nats.
    pub logprobs: Vec<f32>,
    /// Why it ended.
    pub finish: Finish,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// With this stop token.
    Stop(u32),
    /// At the largest number of tokens.
    Length,
}

/// Generates an answer to every request, in the order of the requests.
///
/// # Errors
/// When a request cannot be answered (empty prompt, unknown token, too long, bad temperature), before any is; or when
/// the policy's logits are not finite.
pub fn generate(
    policy: &Policy,
    config: &EngineConfig,
    requests: Vec<GenerationRequest>,
) -> Result<Vec<Completion>, PolicyError> {
    let mut capacity = 0;
    for (row, request) in requests.iter().enumerate() {
        if request.prompt.is_empty() {
            return Err(PolicyError::Empty { row });
        }
        let positions = request.prompt.len().saturating_add(request.max_tokens);
        policy.check_row(row, &request.prompt, positions)?;
        if let Sampling::Prescribed { temperature, .. } = request.sampling {
            check_temperature(temperature)?;
        }
        capacity = capacity.max(positions);
    }
    let slots = config.slots.get().min(requests.len());
    match policy.prepared() {
        Prepared::Fused(weights) => Engine::new(
            Fused::inference(weights),
            policy,
            &requests,
            slots,
            capacity,
        )?
        .run(),
        Prepared::Candle(weights) => Engine::new(
            Candle::inference(weights),
            policy,
            &requests,
            slots,
            capacity,
        )?
        .run(),
    }
}

/// A place in the cache and who uses it.
#[derive(Debug, Default)]
struct Slot {
    /// Prompt whose keys and values lie at the start of the slot, whole once it has been read.
    prompt: Option<Arc<[u32]>>,
    occupant: Option<Occupant>,
}

/// A request that is being answered.
#[derive(Debug)]
struct Occupant {
    request: usize,
    /// Positions that the cache holds.
    position: usize,
    next: Next,
    completion: Completion,
}

/// What an occupant feeds to the next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// The whole prompt.
    Prompt,
    /// Nothing: another slot is reading the same prompt in this step.
    Wait(usize),
    /// One token.
    Token(u32),
}

struct Engine<'a, K: Kernels> {
    kernels: K,
    policy: &'a Policy,
    requests: &'a [GenerationRequest],
    cache: K::Cache,
    slots: Vec<Slot>,
    queued: usize,
    finished: Vec<Option<Completion>>,
    distribution: Distribution,
    logits: Vec<f32>,
}

impl<'a, K: Kernels> Engine<'a, K> {
    fn new(
        kernels: K,
        policy: &'a Policy,
        requests: &'a [GenerationRequest],
        slots: usize,
        capacity: usize,
    ) -> Result<Self, PolicyError> {
        let cache = kernels.cache(slots, capacity)?;
        Ok(Self {
            kernels,
            policy,
            requests,
            cache,
            slots: (0..slots).map(|_| Slot::default()).collect(),
            queued: 0,
            finished: vec![None; requests.len()],
            distribution: Distribution::default(),
            logits: Vec::new(),
        })
    }

    fn run(mut self) -> Result<Vec<Completion>, PolicyError> {
        while self.admit()? {
            self.step()?;
        }
        Ok(self.finished.into_iter().flatten().collect())
    }

    /// Fills free slots; false when nothing is left to do.
    fn admit(&mut self) -> Result<bool, PolicyError> {
        for index in 0..self.slots.len() {
            if self.slots[index].occupant.is_none()
                && let Some(request) = self.next_request()
            {
                self.occupy(index, request)?;
            }
        }
        Ok(self.slots.iter().any(|slot| slot.occupant.is_some()))
    }

    fn next_request(&mut self) -> Option<usize> {
        while self.queued < self.requests.len() {
            let request = self.queued;
            self.queued += 1;
            if self.requests[request].max_tokens > 0 {
                return Some(request);
            }
            self.finished[request] = Some(Completion::empty());
        }
        None
    }

    fn occupy(&mut self, index: usize, request: usize) -> Result<(), PolicyError> {
        let prompt = &self.requests[request].prompt;
        let mut occupant = Occupant {
            request,
            position: 0,
            next: Next::Prompt,
            completion: Completion::empty(),
        };
        if let Some(source) = self.holder(index, prompt) {
            let reading = self.slots[source]
                .occupant
                .as_ref()
                .is_some_and(|other| matches!(other.next, Next::Prompt | Next::Wait(_)));
            if reading && source != index {
                occupant.next = Next::Wait(source);
            } else {
                self.take_prompt(source, index, &mut occupant)?;
            }
        }
        let slot = &mut self.slots[index];
        slot.prompt = Some(Arc::clone(prompt));
        slot.occupant = Some(occupant);
        Ok(())
    }

    /// A slot that holds this prompt, or is about to; `index` itself if it does.
    fn holder(&self, index: usize, prompt: &Arc<[u32]>) -> Option<usize> {
        let holds = |slot: &Slot| {
            slot.prompt
                .as_ref()
                .is_some_and(|held| Arc::ptr_eq(held, prompt) || held == prompt)
        };
        if holds(&self.slots[index]) {
            return Some(index);
        }
        // A slot that waits will hold the prompt no sooner than the one that it waits for.
        let waits = |slot: &Slot| {
            slot.occupant
                .as_ref()
                .is_some_and(|other| matches!(other.next, Next::Wait(_)))
        };
        self.slots
            .iter()
            .position(|slot| holds(slot) && !waits(slot))
    }

    /// Takes all of a prompt but its last token from a slot that has read it: the last one is fed as an ordinary token,
    /// since its logits are wanted.
    fn take_prompt(
        &mut self,
        source: usize,
        index: usize,
        occupant: &mut Occupant,
    ) -> Result<(), PolicyError> {
        let prompt = &self.requests[occupant.request].prompt;
        if let [rest @ .., last] = &prompt[..] {
            if source != index && !rest.is_empty() {
                self.kernels
                    .copy_prefix(&mut self.cache, source, index, rest.len())?;
            }
            occupant.position = rest.len();
            occupant.next = Next::Token(*last);
        }
        Ok(())
    }

    /// One forward pass and one token for every occupant that does not wait.
    fn step(&mut self) -> Result<(), PolicyError> {
        let (batch, members) = self.batch();
        let wanted: Rc<[usize]> = batch
            .rows
            .iter()
            .map(|row| row.start + row.len - 1)
            .collect();
        let layout = Arc::clone(self.policy.layout());
        let cache = Some(&mut self.cache);
        let hidden = decoder::hidden(&mut self.kernels, &layout, &batch, &wanted, cache)?;
        for (row, &index) in batch.rows.iter().zip(&members) {
            if let Some(occupant) = &mut self.slots[index].occupant {
                occupant.position += row.len;
            }
        }
        // Before any slot is freed: those who waited copy from those who read.
        self.release_waiting()?;
        let vocab = layout.head.rows;
        let rows_at_once = (LOGITS_MAX / vocab).max(1);
        for first in (0..members.len()).step_by(rows_at_once) {
            let range = first..(first + rows_at_once).min(members.len());
            let mut logits = std::mem::take(&mut self.logits);
            self.kernels
                .logits(&hidden, &layout.head, range.clone(), &mut logits)?;
            for (row, &index) in logits.chunks_exact(vocab).zip(&members[range]) {
                self.emit(index, row)?;
            }
            self.logits = logits;
        }
        Ok(())
    }

    /// What every occupant feeds, and the slots in the order of the rows.
    fn batch(&self) -> (Batch, Vec<usize>) {
        let (mut tokens, mut rows, mut members) = (Vec::new(), Vec::new(), Vec::new());
        for (slot, occupant) in self
            .slots
            .iter()
            .enumerate()
            .filter_map(|(i, slot)| Some((i, slot.occupant.as_ref()?)))
        {
            let start = tokens.len();
            match occupant.next {
                Next::Wait(_) => continue,
                Next::Prompt => tokens.extend_from_slice(&self.requests[occupant.request].prompt),
                Next::Token(token) => tokens.push(token),
            }
            let len = tokens.len() - start;
            rows.push(Row {
                start,
                len,
                position: occupant.position,
                slot,
            });
            members.push(slot);
        }
        (
            Batch {
                tokens,
                rows: rows.into(),
            },
            members,
        )
    }

    fn release_waiting(&mut self) -> Result<(), PolicyError> {
        for index in 0..self.slots.len() {
            let waiting = |occupant: &mut Occupant| matches!(occupant.next, Next::Wait(_));
            if let Some(mut occupant) = self.slots[index].occupant.take_if(waiting) {
                if let Next::Wait(source) = occupant.next {
                    self.take_prompt(source, index, &mut occupant)?;
                }
                self.slots[index].occupant = Some(occupant);
            }
        }
        Ok(())
    }

    /// Chooses a token for one slot and ends its occupancy if the answer is complete.
    fn emit(&mut self, index: usize, logits: &[f32]) -> Result<(), PolicyError> {
        let Some(occupant) = &mut self.slots[index].occupant else {
            return Ok(());
        };
        let request = &self.requests[occupant.request];
        let completion = &mut occupant.completion;
        let temperature = match request.sampling {
            Sampling::Greedy => 1.0,
            Sampling::Prescribed { temperature, .. } => temperature,
        };
        if !self.distribution.load(logits, temperature) {
            return Err(PolicyError::NotFinite {
                row: occupant.request,
            });
        }
        let token = match request.sampling {
            Sampling::Greedy => self.distribution.likeliest(),
            Sampling::Prescribed { seed, rollout, .. } => {
                self.distribution
                    .draw(uniform(&seed, rollout, completion.tokens.len() as u64))
            }
        };
        completion.tokens.push(token);
        completion.logprobs.push(self.distribution.logprob(token));
        occupant.next = Next::Token(token);
        let stopped = request.stop_ids.contains(&token);
        if stopped {
            completion.finish = Finish::Stop(token);
        }
        if (stopped || completion.tokens.len() >= request.max_tokens)
            && let Some(done) = self.slots[index].occupant.take()
        {
            self.finished[done.request] = Some(done.completion);
        }
        Ok(())
    }
}

impl Completion {
    /// An answer of no tokens, as it stands before the first.
    fn empty() -> Self {
        Self {
            tokens: Vec::new(),
            logprobs: Vec::new(),
            finish: Finish::Length,
        }
    }
}

#[cfg(test)]
mod tests;
