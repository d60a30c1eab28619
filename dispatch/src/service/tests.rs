//! Dispatch on the in-memory bus: members talk to it, and it is killed and started again.

use std::collections::BTreeMap;

use muster_protocol::bus::memory::{MemoryBus, MemoryConfig};
use muster_protocol::clock::TimerClock;
use muster_protocol::credentials::Member;
use muster_protocol::dispatch_client::{DispatchClient, DispatchClientError};
use muster_protocol::id::{ContentHash, Generation, PolicyVersion};
use muster_protocol::identity::MachineSeed;
use muster_protocol::message::ask::{Ask, Reply, WaitReason};
use muster_protocol::message::critique::CritiqueLease;
use muster_protocol::message::descriptor::Thresholds;
use muster_protocol::message::group::{FinishReason, Group, Rollout};
use muster_protocol::message::lease::NumericClass;
use muster_protocol::message::ticket::SamplingRules;
use muster_protocol::message::verdict::{Decision, RolloutReward, Verdict};
use muster_protocol::message::version::{Dtype, Parameter, Part, PartKind, Version, state_root};
use serde_bytes::ByteBuf;
use tokio::task::JoinHandle;

use super::*;
use crate::prompts::{Prompt, Reference};

const GROUP_SIZE: u32 = 2;
const STOP: u32 = 0;

struct OnePrompt;

impl PromptSource for OnePrompt {
    fn prompt(&self, _: TicketId) -> Prompt {
        Prompt {
            item: 0,
            tokens: vec![1],
        }
    }

    fn reference(&self, _: u64) -> Option<Reference> {
        Some(Reference {
            prompt: "1".to_owned(),
            gold: "2".to_owned(),
        })
    }
}

fn identity(number: u8) -> Identity {
    Identity::from_seed(&MachineSeed::from_bytes([number; 32]))
}

fn run_id() -> RunId {
    "r".parse().unwrap()
}

/// A run with a published version 0, two workers and two critics.
struct TestRun {
    bus: MemoryBus,
    clock: SharedClock,
    version: VersionRef,
    dispatch: Option<JoinHandle<Result<(), DispatchError>>>,
}

const TRAINER: u8 = 1;
const DISPATCH: u8 = 2;
const WORKERS: [u8; 2] = [11, 12];
const CRITICS: [u8; 2] = [21, 22];

fn roster() -> Roster {
    let workers = WORKERS.map(|number| (number, Role::Worker));
    let critics = CRITICS.map(|number| (number, Role::Critic));
    let members = workers.into_iter().chain(critics);
    Roster {
        members: members
            .map(|(number, role)| Member::of(&format!("m{number}"), role, &identity(number)))
            .collect(),
    }
}

fn descriptor() -> Descriptor {
    Descriptor {
        architecture: ContentHash([0; 32]),
        tokenizer: ContentHash([0; 32]),
        chat_template: None,
        task: ContentHash([0; 32]),
        rewards: "{}".to_owned(),
        sampling: SamplingRules {
            temperature: 1.0,
            tokens_max: 4,
            stop_ids: vec![STOP],
            stop_strings: Vec::new(),
        },
        group_size: GROUP_SIZE,
        async_level: 2,
        same_class: Thresholds::SAME_CLASS,
        cross_class: Thresholds::CROSS_CLASS,
        vocabulary: 8,
        classes: vec![NumericClass::F32Cpu],
        learner: identity(TRAINER).peer_id(),
        dispatch: identity(DISPATCH).peer_id(),
        from_step: PolicyVersion(0),
        labels: BTreeMap::new(),
    }
}

impl TestRun {
    async fn open() -> Self {
        let bus = MemoryBus::new(&run_id(), MemoryConfig::default());
        let clock: SharedClock = Arc::new(TimerClock::starting_at(UnixMillis(1_000_000)));
        let trainer = identity(TRAINER);
        let lab = bus.connect("trainer", Role::Trainer);
        lab.create_streams().await.unwrap();
        let descriptor = seal(&trainer, &run_id(), 1, descriptor()).unwrap();
        let opened = ControlEvent::Opened {
            descriptor: descriptor.bytes.to_vec(),
        };
        let opened = seal(&trainer, &run_id(), 2, opened).unwrap();
        lab.append(Log::Control, "o", None, opened.bytes)
            .await
            .unwrap();
        let parts = vec![Part {
            kind: PartKind::Base,
            root: ContentHash([1; 32]),
        }];
        let version = Version {
            descriptor: descriptor_hash(&descriptor.bytes),
            generation: Generation(1),
            version: PolicyVersion(0),
            parent: None,
            parameters: vec![Parameter {
                name: "w".to_owned(),
                shape: vec![1],
                dtype: Dtype::F32,
                stage: 0,
            }],
            root: state_root(&parts),
            parts,
            files: Vec::new(),
        };
        let reference = version.reference();
        let announcement = Announcement {
            version: seal(&trainer, &run_id(), 3, version)
                .unwrap()
                .bytes
                .to_vec(),
            objects: Vec::new(),
        };
        let announcement = announcement.encode().unwrap().into();
        lab.append(Log::Versions, "v", None, announcement)
            .await
            .unwrap();
        let mut run = Self {
            bus,
            clock,
            version: reference,
            dispatch: None,
        };
        run.start_dispatch().await;
        run
    }

    async fn start_dispatch(&mut self) {
        let service = DispatchService::start(DispatchParts {
            bus: self.bus.connect("dispatch", Role::Dispatch),
            identity: identity(DISPATCH),
            run: run_id(),
            learner: identity(TRAINER).peer_id(),
            roster: roster(),
            prompts: Arc::new(OnePrompt),
            clock: self.clock.clone(),
            settings: DispatchSettings {
                batch_groups: 8,
                steps: 10,
                ticket_ms: 60_000,
                lease_ms: 10_000,
                audit: Default::default(),
                critique: Default::default(),
                conduct: Default::default(),
            },
            secret: [7; 32],
        });
        let service = service.await.unwrap();
        self.dispatch = Some(tokio::spawn(service.run(CancellationToken::new())));
        tokio::time::sleep(2 * TICK).await; // tickets are issued at the first tick
    }

    /// Kills dispatch and starts another one, which has only what the bus holds.
    async fn restart_dispatch(&mut self) {
        let dispatch = self.dispatch.take().unwrap();
        dispatch.abort();
        assert!(dispatch.await.unwrap_err().is_cancelled());
        self.bus.disconnect("dispatch");
        self.start_dispatch().await;
    }

    fn client(&self, number: u8, role: Role) -> DispatchClient {
        let identity = identity(number);
        let bus = self.bus.connect(&identity.login_user(), role);
        let learner = crate::service::tests::identity(TRAINER).peer_id();
        DispatchClient::new(bus, identity, run_id(), learner)
    }

    fn worker(&self, number: u8) -> TestWorker {
        TestWorker {
            client: self.client(number, Role::Worker),
            held: self.version,
        }
    }

    fn critic(&self, number: u8) -> TestCritic {
        TestCritic {
            client: self.client(number, Role::Critic),
            held: self.version,
        }
    }

    async fn ready_groups(&self) -> u64 {
        let trainer = self.bus.connect("trainer", Role::Trainer);
        trainer.queue_state(Queue::Ready).await.unwrap().messages
    }
}

struct TestWorker {
    client: DispatchClient,
    held: VersionRef,
}

impl TestWorker {
    async fn ask_lease(&self) -> Reply {
        let ask = Ask::Lease {
            held: self.held,
            class: NumericClass::F32Cpu,
            rollouts_max: 1,
        };
        self.client.ask(ask).await.unwrap()
    }

    async fn lease(&self) -> Signed<Lease> {
        match self.ask_lease().await {
            Reply::Leases(mut leases) => {
                open(leases.remove(0).into_vec().into(), &run_id()).unwrap()
            }
            other => panic!("no lease: {other:?}"),
        }
    }

    /// Answers a lease with rollouts of these tokens.
    async fn submit(
        &self,
        lease: &Signed<Lease>,
        tokens: &[u32],
    ) -> Result<Reply, DispatchClientError> {
        let rollout = Rollout::single_turn(
            lease.body.ticket.prompt.clone(),
            tokens.to_vec(),
            lease.body.version.version,
            vec![-1.0; tokens.len()],
            FinishReason::Stop,
        );
        let group = Group {
            lease: lease.body.id,
            ticket: lease.body.ticket.id,
            version: lease.body.version,
            class: lease.body.class,
            rollouts: vec![rollout; GROUP_SIZE as usize],
            commitments: Vec::new(),
        };
        let group = self.client.sign(group).unwrap();
        let submission = Ask::Submit {
            lease: ByteBuf::from(lease.bytes.to_vec()),
            group: ByteBuf::from(group.bytes.to_vec()),
        };
        self.client.ask(submission).await
    }

    async fn answer(&self) -> TicketId {
        let lease = self.lease().await;
        let reply = self.submit(&lease, &[2, STOP]).await;
        assert!(matches!(reply, Ok(Reply::Accepted { .. })), "{reply:?}");
        lease.body.ticket.id
    }

    async fn is_quarantined(&self) -> bool {
        matches!(
            self.ask_lease().await,
            Reply::Wait {
                reason: WaitReason::CoolDown,
                ..
            }
        )
    }
}

struct TestCritic {
    client: DispatchClient,
    held: VersionRef,
}

impl TestCritic {
    async fn ask_groups(&self) -> Reply {
        let ask = Ask::Critique {
            held: vec![self.held],
            class: NumericClass::F32Cpu,
            groups_max: 1,
        };
        self.client.ask(ask).await.unwrap()
    }

    async fn group(&self) -> Signed<Group> {
        let Reply::CritiqueLeases(mut leases) = self.ask_groups().await else {
            panic!("no group")
        };
        let bytes = leases.remove(0).into_vec();
        let lease = open::<CritiqueLease>(bytes.into(), &run_id()).unwrap();
        open(lease.body.group.into(), &run_id()).unwrap()
    }

    /// Accepts a group with this many rewards; returns why dispatch refused the verdict.
    async fn accept(&self, group: &Signed<Group>, rewards: u32) -> Vec<String> {
        let reward = RolloutReward {
            total: 1.0,
            components: Vec::new(),
        };
        let verdict = Verdict {
            group: GroupHash::of(&group.bytes),
            lease: group.body.lease,
            ticket: group.body.ticket,
            audited: true,
            rewards: vec![reward; rewards as usize],
            findings: Vec::new(),
            decision: Decision::Accept,
        };
        let verdict = self.client.sign(verdict).unwrap();
        let verdicts = vec![ByteBuf::from(verdict.bytes.to_vec())];
        match self.client.ask(Ask::Verdict { verdicts }).await.unwrap() {
            Reply::Recorded { refused } => refused,
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_group_goes_from_ticket_to_the_ready_queue() {
    let run = TestRun::open().await;
    run.worker(WORKERS[0]).answer().await;
    let critic = run.critic(CRITICS[0]);
    let group = critic.group().await;
    assert_eq!(critic.accept(&group, GROUP_SIZE).await, [""; 0]);
    assert_eq!(run.ready_groups().await, 1);
}

#[tokio::test(start_paused = true)]
async fn a_verdict_with_a_wrong_number_of_rewards_is_refused_and_another_critic_is_asked() {
    let run = TestRun::open().await;
    let ticket = run.worker(WORKERS[0]).answer().await;
    let [liar, honest] = CRITICS.map(|number| run.critic(number));
    let group = liar.group().await;
    let refused = liar.accept(&group, GROUP_SIZE - 1).await;
    assert!(refused[0].contains("1 rewards"), "{refused:?}");
    assert_eq!(run.ready_groups().await, 0);
    assert!(matches!(liar.ask_groups().await, Reply::Wait { .. }));
    let again = honest.group().await;
    assert_eq!(again.body.ticket, ticket);
    assert_eq!(honest.accept(&again, GROUP_SIZE).await, [""; 0]);
    assert_eq!(run.ready_groups().await, 1);
}

#[tokio::test(start_paused = true)]
async fn a_critic_that_keeps_sending_misfit_verdicts_gets_no_more_groups_even_after_a_restart() {
    let mut run = TestRun::open().await;
    let liar = run.critic(CRITICS[0]);
    for _ in 0..3 {
        run.worker(WORKERS[0]).answer().await;
        let group = liar.group().await;
        liar.accept(&group, GROUP_SIZE + 1).await;
    }
    run.worker(WORKERS[0]).answer().await;
    run.restart_dispatch().await;
    let reply = run.critic(CRITICS[0]).ask_groups().await;
    let cool_down = WaitReason::CoolDown;
    assert!(
        matches!(reply, Reply::Wait { reason, .. } if reason == cool_down),
        "{reply:?}"
    );
    run.critic(CRITICS[1]).group().await;
}

#[tokio::test(start_paused = true)]
async fn a_quarantine_outlives_dispatch_and_honest_workers_are_served() {
    let mut run = TestRun::open().await;
    let [liar, honest] = WORKERS.map(|number| run.worker(number));
    for _ in 0..3 {
        let lease = liar.lease().await;
        let reply = liar.submit(&lease, &[2]).await; // has no stop token
        assert!(
            matches!(reply, Err(DispatchClientError::Refused(_))),
            "{reply:?}"
        );
    }
    assert!(liar.is_quarantined().await);
    honest.answer().await;
    run.restart_dispatch().await;
    assert!(
        run.worker(WORKERS[0]).is_quarantined().await,
        "after the restart"
    );
    run.worker(WORKERS[1]).answer().await;
    run.restart_dispatch().await;
    assert!(
        run.worker(WORKERS[0]).is_quarantined().await,
        "after the second"
    );
}
