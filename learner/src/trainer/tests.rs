//! The trainer over the bus in memory: every joined group gets one fate, whatever is wrong with it.

use std::collections::BTreeMap;
use std::path::Path;

use async_trait::async_trait;
use serde_bytes::ByteBuf;

use super::objects::BroadcastConfig;
use super::state::CHUNK;
use super::*;
use crate::advantage::AdvantageConfig;
use crate::stepper::{StepError, StepInput, StepOutput, StepStats};
use muster_broadcaster::{FetchError, ObjectSource};
use muster_protocol::bus::memory::{MemoryBus, MemoryConfig};
use muster_protocol::credentials::Member;
use muster_protocol::envelope::{Signed, Statement, open, seal};
use muster_protocol::id::{
    ContentHash, DescriptorHash, GroupHash, LeaseId, RunId, TicketId, UnixMillis,
};
use muster_protocol::identity::{Identity, MachineSeed};
use muster_protocol::message::batch::{Batch, BatchEntry};
use muster_protocol::message::critique::Joined;
use muster_protocol::message::descriptor::Thresholds;
use muster_protocol::message::fate::{Fate, FateRecord};
use muster_protocol::message::group::{FinishReason, Rollout};
use muster_protocol::message::lease::{Lease, NumericClass, RolloutRange, WeightsRule};
use muster_protocol::message::ticket::{SamplingRules, Ticket};
use muster_protocol::message::verdict::{Decision, RolloutReward, Verdict};
use muster_protocol::message::version::{Object, VersionRef};
use muster_protocol::record::{StepMetrics, read_all};
use muster_protocol::subject::Queue;

const PROMPT: [u32; 2] = [2, 3];
/// The loss that the stepper reports.
const LOSS: f64 = 0.5;

/// A stepper whose weights are one bf16 parameter: the number of steps.
struct Counter {
    steps: u64,
}

#[async_trait]
impl Stepper for Counter {
    fn image(&self) -> Bytes {
        let header = br#"{"w":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}"#;
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header);
        file.extend((self.steps as u16).to_le_bytes());
        file.into()
    }

    async fn step(&mut self, input: StepInput) -> Result<StepOutput, StepError> {
        self.steps = input.step.0;
        let stats = StepStats {
            loss: LOSS,
            ..StepStats::default()
        };
        Ok(StepOutput {
            image: self.image(),
            stats,
        })
    }

    async fn save(&mut self, path: &Path) -> Result<(), StepError> {
        std::fs::write(path, self.steps.to_string()).map_err(|e| StepError(e.to_string()))
    }

    async fn restore(
        &mut self,
        path: &Path,
        _version: PolicyVersion,
        _images: Vec<(PolicyVersion, Bytes)>,
    ) -> Result<(), StepError> {
        let text = std::fs::read_to_string(path).map_err(|e| StepError(e.to_string()))?;
        self.steps = text.parse().unwrap();
        Ok(())
    }
}

/// Keeps no bytes: no peer fetches in these tests.
#[derive(Debug)]
struct NoPeers;

#[async_trait]
impl ObjectSource for NoPeers {
    async fn fetch(&self, _object: &Object) -> Result<Bytes, FetchError> {
        Err(FetchError::Stopped)
    }
}

/// A run's keys, its bus and its directory.
struct Run {
    id: RunId,
    bus: MemoryBus,
    learner: Identity,
    dispatch: Identity,
    worker: Identity,
    critic: Identity,
    dir: tempfile::TempDir,
}

impl Run {
    fn new() -> Self {
        let id = "test".parse::<RunId>().unwrap();
        let [learner, dispatch, worker, critic] =
            [1, 2, 3, 4].map(|n| Identity::from_seed(&MachineSeed::from_bytes([n; 32])));
        Self {
            bus: MemoryBus::new(&id, MemoryConfig::default()),
            id,
            learner,
            dispatch,
            worker,
            critic,
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn descriptor(&self) -> Descriptor {
        Descriptor {
            architecture: ContentHash([1; 32]),
            tokenizer: ContentHash([2; 32]),
            chat_template: None,
            task: ContentHash([3; 32]),
            rewards: "{}".to_owned(),
            sampling: sampling(),
            group_size: 2,
            async_level: 2,
            same_class: Thresholds::SAME_CLASS,
            cross_class: Thresholds::CROSS_CLASS,
            vocabulary: 16,
            classes: vec![NumericClass::F32Cpu],
            learner: self.learner.peer_id(),
            dispatch: self.dispatch.peer_id(),
            from_step: PolicyVersion(0),
            labels: BTreeMap::new(),
        }
    }

    async fn trainer(&self) -> Result<Trainer, TrainerError> {
        let members = vec![
            Member::of("worker", Role::Worker, &self.worker),
            Member::of("critic", Role::Critic, &self.critic),
        ];
        let bus = self.bus.connect("trainer", Role::Trainer);
        let learner = self.learner.peer_id();
        Trainer::start(TrainerParts {
            client: DispatchClient::new(bus, self.learner.clone(), self.id.clone(), learner),
            roster: Roster { members },
            dir: self.dir.path().to_owned(),
            stepper: Box::new(Counter { steps: 0 }),
            swarm: Arc::new(NoPeers),
            descriptor: self.descriptor(),
            files: Vec::new(),
            settings: TrainerSettings {
                batch_groups: 2,
                steps: 10,
                checkpoint_every: 10,
                advantage: AdvantageConfig::default(),
                broadcast: BroadcastConfig::default(),
            },
        })
        .await
    }

    fn signed<T: Statement>(&self, by: &Identity, body: T) -> Signed<T> {
        seal(by, &self.id, 1, body).unwrap()
    }

    fn lease(&self, ticket: u64) -> Lease {
        Lease {
            id: LeaseId([ticket as u8; 16]),
            ticket: Ticket {
                id: TicketId(ticket),
                descriptor: DescriptorHash([0; 32]),
                item: 0,
                prompt: PROMPT.to_vec(),
                group_size: 2,
                sampling: sampling(),
                oldest_version: PolicyVersion(0),
                deadline: UnixMillis(u64::MAX),
            },
            worker: self.worker.peer_id(),
            version: VersionRef {
                version: PolicyVersion(0),
                root: StateRoot([0; 32]),
            },
            weights: WeightsRule::Drain,
            class: NumericClass::F32Cpu,
            rollouts: RolloutRange { first: 0, count: 2 },
            epoch: 0,
            submission: 0,
            nonce: [0; 32],
            seed: [0; 32],
            deadline: UnixMillis(u64::MAX),
        }
    }

    /// A joined group of two rollouts whose critic gave these rewards.
    fn joined(&self, ticket: u64, rewards: &[f32]) -> Joined {
        let lease = self.lease(ticket);
        let rollout = || {
            let (version, logprobs) = (PolicyVersion(0), vec![-0.5]);
            Rollout::single_turn(
                PROMPT.to_vec(),
                vec![1],
                version,
                logprobs,
                FinishReason::Stop,
            )
        };
        let group = self.signed(
            &self.worker,
            Group {
                lease: lease.id,
                ticket: lease.ticket.id,
                version: lease.version,
                class: lease.class,
                rollouts: vec![rollout(), rollout()],
                commitments: Vec::new(),
            },
        );
        let reward = |total: &f32| RolloutReward {
            total: *total,
            components: Vec::new(),
        };
        let verdict = Verdict {
            group: GroupHash::of(&group.bytes),
            lease: lease.id,
            ticket: lease.ticket.id,
            audited: true,
            rewards: rewards.iter().map(reward).collect(),
            findings: Vec::new(),
            decision: Decision::Accept,
        };
        let verdict = self.signed(&self.critic, verdict);
        Joined {
            lease: self.signed(&self.dispatch, lease).bytes.to_vec(),
            group: group.bytes.to_vec(),
            verdicts: vec![ByteBuf::from(verdict.bytes.to_vec())],
            audited: true,
        }
    }

    async fn enqueue(&self, key: &str, joined: Joined) {
        let bytes = self.signed(&self.dispatch, joined).bytes;
        let bus = self.bus.connect("dispatch", Role::Dispatch);
        bus.enqueue(Queue::Ready, key, bytes).await.unwrap();
    }

    async fn fates(&self) -> Vec<(u64, Fate, String)> {
        let bus = self.bus.connect("trainer", Role::Trainer);
        let records = bus.read(Log::Fates, 0, CHUNK).await.unwrap();
        let fates = records.into_iter().map(|record| {
            let fate = open::<FateRecord>(record.payload, &self.id).unwrap().body;
            (fate.ticket.0, fate.fate, fate.reason)
        });
        fates.collect()
    }
}

fn sampling() -> SamplingRules {
    SamplingRules {
        temperature: 1.0,
        tokens_max: 4,
        stop_ids: vec![1],
        stop_strings: Vec::new(),
    }
}

#[tokio::test(start_paused = true)]
async fn a_verdict_with_a_wrong_number_of_rewards_ends_its_ticket_as_rejected() {
    let run = Run::new();
    let mut trainer = run.trainer().await.unwrap();
    run.enqueue("1", run.joined(1, &[0.0, 1.0, 1.0])).await;
    trainer.turn().await.unwrap();
    let [(1, Fate::Rejected, reason)] = &run.fates().await[..] else {
        panic!("{:?}", run.fates().await);
    };
    assert_eq!(reason, "a verdict has 3 rewards for 2 rollouts");
    assert_eq!(trainer.resolver.waiting(), 0);
}

#[tokio::test(start_paused = true)]
async fn every_joined_group_gets_one_fate() {
    let run = Run::new();
    let mut trainer = run.trainer().await.unwrap();
    run.enqueue("equal", run.joined(1, &[1.0, 1.0])).await;
    run.enqueue("first", run.joined(2, &[0.0, 1.0])).await;
    let mut other_worker = run.joined(3, &[0.0, 1.0]);
    other_worker.group = run.joined(4, &[0.0, 1.0]).group;
    run.enqueue("other-lease", other_worker).await;
    run.enqueue("second", run.joined(5, &[0.0, 1.0])).await;
    while trainer.resolver.version() == PolicyVersion(0) {
        trainer.turn().await.unwrap();
    }
    let mut fates = run.fates().await;
    fates.sort();
    let ended: Vec<(u64, Fate)> = fates
        .iter()
        .map(|(ticket, fate, _)| (*ticket, *fate))
        .collect();
    assert_eq!(
        ended,
        [
            (1, Fate::NoSignal),
            (2, Fate::Trained),
            (3, Fate::Rejected),
            (5, Fate::Trained)
        ]
    );
    let lines: Vec<StepMetrics> = read_all(&run.dir.path().join("metrics.jsonl")).unwrap();
    assert_eq!(lines.len(), 1);
    let line = &lines[0];
    assert_eq!((line.step, line.groups_trained, line.loss), (1, 2, LOSS));
}

#[tokio::test(start_paused = true)]
async fn a_bad_group_of_a_ticket_whose_other_group_waits_is_a_duplicate() {
    let run = Run::new();
    let mut trainer = run.trainer().await.unwrap();
    run.enqueue("good", run.joined(1, &[0.0, 1.0])).await;
    trainer.turn().await.unwrap();
    run.enqueue("bad", run.joined(1, &[0.0])).await;
    trainer.turn().await.unwrap();
    let fates = run.fates().await;
    assert!(matches!(fates[..], [(1, Fate::Duplicate, _)]), "{fates:?}");
    assert_eq!(trainer.resolver.waiting(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_manifest_without_a_signal_is_named_when_it_is_replayed() {
    let run = Run::new();
    let trainer = run.trainer().await.unwrap();
    let group = Bytes::from(run.joined(7, &[1.0, 1.0]).group);
    let hash = GroupHash::of(&group);
    trainer.archive.put_group(hash, &group).unwrap();
    let manifest = Batch {
        descriptor: descriptor_hash(&trainer.descriptor.bytes),
        generation: trainer.generation,
        step: PolicyVersion(1),
        parent: trainer.root,
        groups: vec![BatchEntry {
            ticket: TicketId(7),
            group: hash,
            worker: run.worker.peer_id(),
            version: PolicyVersion(0),
            audited: true,
            rewards: vec![1.0, 1.0],
        }],
    };
    let manifest = run.signed(&run.learner, manifest).bytes;
    let bus = trainer.client.bus().clone();
    bus.append(Log::Batches, "b", None, manifest).await.unwrap();
    drop(trainer);
    let error = run.trainer().await.err().unwrap().to_string();
    assert_eq!(
        error,
        "step 1 cannot be replayed: in its manifest, all 2 rewards are equal, so every advantage is zero (ticket 7)"
    );
}

#[tokio::test]
async fn a_thread_that_panicked_is_not_reported_as_a_version_that_was_not_announced() {
    let panicked = tokio::spawn(async { panic!("out of luck") }).await;
    let error = TrainerError::from(panicked.unwrap_err()).to_string();
    assert!(
        error.starts_with("a thread of the trainer failed"),
        "{error}"
    );
}
