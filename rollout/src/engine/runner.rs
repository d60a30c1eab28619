//! The engine's thread: it takes commands between two steps and sends answers when leases are complete.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TryRecvError;

use muster_policy::{
    Answered, Completion, Engine, EngineConfig, Finish, GenerationRequest, GroupId, Policy,
    Sampling, StopStrings, TokenBytes, WeightsRule as Rule,
};
use muster_protocol::id::PolicyVersion;
use muster_protocol::message::group::{FinishReason, Rollout};
use muster_protocol::message::lease::{Lease, WeightsRule};

use super::task::Task;
use crate::answerer::{AnswerError, AnsweredLease};
use crate::capacity::{Bounds, Timing, rows};

/// A measurement that takes this long is the last: a slower machine tries no larger batches. Long enough for a model of some
/// hundred million parameters on a busy laptop, which gains most from larger batches.
const MEASURE: Duration = Duration::from_secs(3);

/// Steps timed for each number of rows.
const MEASURED_STEPS: u32 = 4;

/// Half of a lease's default time: a worker that needs more would drop leases.
const ANSWER_SECONDS: f64 = 15.0;

#[derive(Debug)]
pub(super) enum Command {
    /// New weights and their version.
    Adopt(Policy, u64),
    Take(Vec<Lease>),
}

type Outbox = mpsc::Sender<Result<Vec<AnsweredLease>, AnswerError>>;

/// The engine and the leases that it answers.
pub(super) struct Runner {
    engine: Engine,
    leases: BTreeMap<GroupId, Lease>,
    task: Task,
    /// None before a lease names a stop string.
    bytes: Option<Arc<TokenBytes>>,
}

impl Runner {
    /// Measures how many rows this machine can decode together, and makes an engine with as many slots.
    pub(super) fn start(
        policy: Policy,
        version: u64,
        config: &EngineConfig,
        task: Task,
    ) -> Result<(Self, u32), AnswerError> {
        let carried = measure(&policy, config, task.tokens_max).map_err(AnswerError::new)?;
        let slots = NonZeroUsize::new(carried as usize).unwrap_or(NonZeroUsize::MIN);
        let config = EngineConfig {
            slots,
            ..config.clone()
        };
        let engine = Engine::new(policy, version, &config).map_err(AnswerError::new)?;
        tracing::info!(rows = carried, kv_bytes = engine.kv_bytes(), "measured");
        let runner = Self {
            engine,
            leases: BTreeMap::new(),
            task,
            bytes: None,
        };
        Ok((runner, carried))
    }

    /// Works until the handle is dropped.
    pub(super) fn run(mut self, mut inbox: mpsc::Receiver<Command>, outbox: &Outbox) {
        loop {
            let command = match self.engine.is_idle() {
                true => inbox.blocking_recv().ok_or(TryRecvError::Disconnected),
                false => inbox.try_recv(),
            };
            let done = match command {
                Ok(command) => self.obey(command).map(|()| Vec::new()),
                Err(TryRecvError::Empty) => self.step(),
                Err(TryRecvError::Disconnected) => return,
            };
            let failed = done.is_err();
            let empty = done.as_ref().is_ok_and(Vec::is_empty);
            if (!empty && outbox.blocking_send(done).is_err()) || failed {
                return;
            }
        }
    }

    fn obey(&mut self, command: Command) -> Result<(), AnswerError> {
        match command {
            Command::Adopt(policy, version) => {
                self.engine.swap(policy, version).map_err(AnswerError::new)
            }
            Command::Take(leases) => leases.into_iter().try_for_each(|lease| self.take(lease)),
        }
    }

    fn take(&mut self, lease: Lease) -> Result<(), AnswerError> {
        let requests = self.requests_of(&lease);
        let group = self.engine.submit(requests).map_err(AnswerError::new)?;
        self.leases.insert(group, lease);
        Ok(())
    }

    fn requests_of(&mut self, lease: &Lease) -> Vec<GenerationRequest> {
        let sampling = &lease.ticket.sampling;
        let prompt: Arc<[u32]> = lease.ticket.prompt.as_slice().into();
        let stop_ids: Arc<[u32]> = sampling.stop_ids.as_slice().into();
        let stop_strings = self.stop_strings(&sampling.stop_strings);
        let weights = match lease.weights {
            WeightsRule::Drain => Rule::Drain,
            WeightsRule::InFlight => Rule::InFlight,
        };
        let numbers = lease.rollouts.first..lease.rollouts.first + lease.rollouts.count;
        let request = |rollout| GenerationRequest {
            prompt: prompt.clone(),
            max_tokens: sampling.tokens_max as usize,
            stop_ids: stop_ids.clone(),
            stop_strings: stop_strings.clone(),
            sampling: Sampling::Prescribed {
                seed: lease.seed,
                rollout,
                temperature: sampling.temperature,
            },
            weights,
        };
        numbers.map(request).collect()
    }

    fn stop_strings(&mut self, strings: &[String]) -> Option<StopStrings> {
        if strings.is_empty() {
            return None;
        }
        let made = || Arc::new(TokenBytes::new(&self.task.tokenizer));
        let bytes = Arc::clone(self.bytes.get_or_insert_with(made));
        Some(StopStrings::new(strings, bytes))
    }

    fn step(&mut self) -> Result<Vec<AnsweredLease>, AnswerError> {
        let answered = self.engine.step().map_err(AnswerError::new)?;
        let lease_of = |Answered { group, completions }: Answered| {
            let lease = self.leases.remove(&group)?;
            let rollouts = completions
                .iter()
                .map(|completion| rollout_of(&lease, completion));
            Some((lease.id, rollouts.collect()))
        };
        Ok(answered.into_iter().filter_map(lease_of).collect())
    }
}

fn rollout_of(lease: &Lease, completion: &Completion) -> Rollout {
    let finish = match completion.finish {
        Finish::Stop(_) => FinishReason::Stop,
        // A lease has at most 16 of them.
        Finish::StopString(string) => FinishReason::StopString(string as u8),
        Finish::Length => FinishReason::Length,
    };
    let spans: Vec<(PolicyVersion, usize)> = completion
        .spans
        .iter()
        .map(|span| (PolicyVersion(span.version), span.tokens))
        .collect();
    let prompt = lease.ticket.prompt.clone();
    Rollout::of_versions(
        prompt,
        &completion.tokens,
        &completion.logprobs,
        &spans,
        finish,
    )
}

/// The number of rows that this machine can decode together, from short decodes of more and more rows.
fn measure(
    policy: &Policy,
    config: &EngineConfig,
    tokens_max: u32,
) -> Result<u32, muster_policy::PolicyError> {
    let rows_max = u32::try_from(config.slots.get()).unwrap_or(u32::MAX);
    let mut timings = Vec::new();
    let mut count = 1;
    loop {
        let timing = time(policy, config, count)?;
        timings.push(timing);
        // The first step is left out: its preparations take seconds in a large model and do not depend on the rows.
        let took = timing.step_seconds * f64::from(MEASURED_STEPS);
        if count == rows_max || took > MEASURE.as_secs_f64() {
            break;
        }
        count = count.saturating_mul(4).min(rows_max);
    }
    let engine = Engine::new(policy.clone(), 0, config)?;
    let bounds = Bounds {
        rows_max,
        rows_in_memory: engine.rows_in_memory(tokens_max as usize),
        tokens_max,
        answer_seconds: ANSWER_SECONDS,
    };
    Ok(rows(&timings, &bounds))
}

fn time(
    policy: &Policy,
    config: &EngineConfig,
    rows: u32,
) -> Result<Timing, muster_policy::PolicyError> {
    let config = EngineConfig {
        slots: NonZeroUsize::new(rows as usize).unwrap_or(NonZeroUsize::MIN),
        ..config.clone()
    };
    let mut engine = Engine::new(policy.clone(), 0, &config)?;
    let (prompt, stop_ids): (Arc<[u32]>, Arc<[u32]>) = ([0].into(), [].into());
    let room = policy.config().max_position_embeddings.saturating_sub(1);
    let tokens = (MEASURED_STEPS as usize + 1).min(room);
    let request = GenerationRequest::new(prompt, tokens, stop_ids, Sampling::Greedy);
    engine.submit(vec![request; rows as usize])?;
    // The first step reads the prompt for all rows and makes the one-time preparations.
    engine.step()?;
    let start = Instant::now();
    for _ in 0..MEASURED_STEPS {
        engine.step()?;
    }
    let step_seconds = start.elapsed().as_secs_f64() / f64::from(MEASURED_STEPS);
    Ok(Timing { rows, step_seconds })
}

#[cfg(test)]
mod tests {
    use super::*;
    use muster_policy::{Config, Device, KernelSet, Master, Storage, Tokenizer};
    use muster_protocol::id::{DescriptorHash, LeaseId, PeerId, StateRoot, TicketId, UnixMillis};
    use muster_protocol::message::lease::{NumericClass, RolloutRange};
    use muster_protocol::message::ticket::{SamplingRules, Ticket};
    use muster_protocol::message::version::VersionRef;

    const SHAPE: &str = r#"{"architectures":["Qwen2ForCausalLM"],"model_type":"qwen2","vocab_size":16,"hidden_size":16,
        "intermediate_size":32,"num_hidden_layers":1,"num_attention_heads":2,"num_key_value_heads":1,
        "max_position_embeddings":64,"rope_theta":10000.0,"rms_norm_eps":1e-6,"tie_word_embeddings":true}"#;

    fn policy(seed: u64) -> Policy {
        let config = Config::parse(SHAPE).unwrap();
        let image = Master::init(&config, seed)
            .unwrap()
            .image(Storage::F32)
            .unwrap();
        Policy::from_image(&config, &image, KernelSet::Fused, &Device::Cpu).unwrap()
    }

    fn runner() -> (Runner, u32) {
        let task = Task {
            tokens_max: 20,
            tokenizer: Tokenizer::characters("abcdefghijklmn").unwrap(),
        };
        let config = EngineConfig {
            slots: NonZeroUsize::new(6).unwrap(),
            ..EngineConfig::default()
        };
        Runner::start(policy(1), 3, &config, task).unwrap()
    }

    fn lease(number: u8, weights: WeightsRule) -> Lease {
        let ticket = Ticket {
            id: TicketId(u64::from(number)),
            descriptor: DescriptorHash([0; 32]),
            item: 0,
            prompt: vec![2, 3, u32::from(number)],
            group_size: 4,
            sampling: SamplingRules {
                temperature: 1.0,
                tokens_max: 20,
                stop_ids: vec![0],
                stop_strings: vec!["ab".to_owned()],
            },
            oldest_version: PolicyVersion(0),
            deadline: UnixMillis(0),
        };
        Lease {
            id: LeaseId([number; 16]),
            ticket,
            worker: PeerId([0; 32]),
            version: VersionRef {
                version: PolicyVersion(3),
                root: StateRoot([3; 32]),
            },
            weights,
            class: NumericClass::F32Cpu,
            rollouts: RolloutRange { first: 1, count: 3 },
            epoch: 0,
            submission: 0,
            nonce: [0; 32],
            seed: [number; 32],
            deadline: UnixMillis(0),
        }
    }

    fn answers(runner: &mut Runner) -> BTreeMap<LeaseId, Vec<Rollout>> {
        let mut answers = BTreeMap::new();
        while !runner.engine.is_idle() {
            answers.extend(runner.step().unwrap());
        }
        answers
    }

    #[test]
    fn every_lease_is_answered_alone_as_among_others() {
        let leases: Vec<Lease> = (4..9).map(|n| lease(n, WeightsRule::Drain)).collect();
        let (mut runner, rows) = self::runner();
        assert!((1..=6).contains(&rows));
        runner.obey(Command::Take(leases.clone())).unwrap();
        let together = answers(&mut runner);
        for lease in leases {
            runner.obey(Command::Take(vec![lease.clone()])).unwrap();
            let alone = answers(&mut runner).remove(&lease.id).unwrap();
            let tokens = |rollouts: &[Rollout]| -> Vec<_> {
                rollouts.iter().map(|r| (r.tokens(), r.finish)).collect()
            };
            assert_eq!(tokens(&alone), tokens(&together[&lease.id]));
            assert_eq!(alone.len(), 3);
        }
    }

    #[test]
    fn new_weights_change_what_their_leases_say_they_may() {
        let (mut runner, _) = self::runner();
        let leases = vec![
            lease(4, WeightsRule::Drain),
            lease(5, WeightsRule::InFlight),
        ];
        runner.obey(Command::Take(leases)).unwrap();
        assert!(runner.step().unwrap().is_empty());
        runner.obey(Command::Adopt(policy(2), 4)).unwrap();
        let answers = answers(&mut runner);
        let versions = |number: u8| {
            let rollouts = &answers[&LeaseId([number; 16])];
            let segments = rollouts.iter().flat_map(|rollout| &rollout.segments);
            let newest = segments.filter_map(|segment| match segment {
                muster_protocol::message::group::Segment::Policy { version, .. } => Some(version.0),
                _ => None,
            });
            newest.max()
        };
        assert_eq!((versions(4), versions(5)), (Some(3), Some(4)));
    }
}
