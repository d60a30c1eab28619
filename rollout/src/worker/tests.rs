//! A worker over the bus in memory, in virtual time, against a dispatch that gives its leases once.

use std::collections::BTreeMap;
use std::sync::Mutex;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::task::JoinHandle;
use tokio_util::task::TaskTracker;

use muster_broadcaster::follower::Follow;
use muster_broadcaster::store::object::describe_object;
use muster_broadcaster::version::state::describe_state;
use muster_broadcaster::{FetchError, ObjectSource};
use muster_protocol::bus::Requests;
use muster_protocol::bus::memory::{MemoryBus, MemoryConfig};
use muster_protocol::clock::TimerClock;
use muster_protocol::envelope::seal;
use muster_protocol::id::{
    ContentHash, Generation, GroupHash, PolicyVersion, RunId, StateRoot, UnixMillis,
};
use muster_protocol::identity::Identity;
use muster_protocol::message::descriptor::Thresholds;
use muster_protocol::message::group::FinishReason;
use muster_protocol::message::version::{
    Announcement, Content, Object, Version, VersionRef, state_root,
};
use muster_protocol::seed::{SeedBinding, lease_seed};
use muster_protocol::subject::{Role, Subjects};
use muster_protocol::testing;

use super::*;

/// The published version.
const VERSION: PolicyVersion = PolicyVersion(3);
/// Tokens of each rollout.
const TOKENS: [u32; 2] = [1, 0];
/// Rollouts that the model takes at once.
const ROOM: u32 = 24;

/// One parameter of four bf16 zeros.
fn weights() -> Bytes {
    let header = br#"{"w":{"dtype":"BF16","shape":[4],"data_offsets":[0,8]}}"#;
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend([0; 8]);
    file.into()
}

#[derive(Debug)]
struct Weights;

#[async_trait]
impl ObjectSource for Weights {
    async fn fetch(&self, _: &Object) -> Result<Bytes, FetchError> {
        Ok(weights())
    }
}

/// A model that answers leases as soon as it takes them.
#[derive(Default)]
struct Model {
    answers: Vec<AnsweredLease>,
    taken: Arc<Mutex<Vec<LeaseId>>>,
}

fn rollouts(lease: &Lease) -> Vec<Rollout> {
    let rollout = |_| {
        let (tokens, version) = (TOKENS.to_vec(), lease.version.version);
        let logprobs = vec![-1.0; TOKENS.len()];
        let prompt = lease.ticket.prompt.clone();
        Rollout::single_turn(prompt, tokens, version, logprobs, FinishReason::Stop)
    };
    (0..lease.rollouts.count).map(rollout).collect()
}

#[async_trait]
impl Answerer for Model {
    async fn adopt(&mut self, _: &Arc<Held>) -> Result<(), AnswerError> {
        Ok(())
    }

    fn adopts(&self) -> bool {
        true
    }

    fn room(&self) -> u32 {
        ROOM
    }

    async fn take(&mut self, leases: Vec<Lease>) -> Result<(), AnswerError> {
        for lease in leases {
            self.taken.lock().unwrap().push(lease.id);
            self.answers.push((lease.id, rollouts(&lease)));
        }
        Ok(())
    }

    async fn answered(&mut self) -> Result<Vec<AnsweredLease>, AnswerError> {
        if self.answers.is_empty() {
            return std::future::pending().await;
        }
        Ok(std::mem::take(&mut self.answers))
    }
}

/// How dispatch replies to a submission.
#[derive(Clone, Copy)]
enum OnSubmission {
    Accept,
    Refuse,
}

/// The run's members and its signed descriptor.
struct Run {
    id: RunId,
    bus: MemoryBus,
    learner: Identity,
    dispatch: Identity,
    worker: Identity,
    descriptor: Signed<Descriptor>,
}

impl Run {
    fn new() -> Self {
        let id: RunId = "test".parse().unwrap();
        let [learner, dispatch, worker] = [(); 3].map(|()| Identity::generate());
        let hash = ContentHash([0; 32]);
        let descriptor = Descriptor {
            architecture: hash,
            tokenizer: hash,
            chat_template: None,
            task: hash,
            rewards: "{}".to_owned(),
            sampling: testing::sampling(),
            group_size: 4,
            async_level: 1,
            same_class: Thresholds::SAME_CLASS,
            cross_class: Thresholds::CROSS_CLASS,
            vocabulary: 16,
            classes: vec![NumericClass::F32Cpu],
            learner: learner.peer_id(),
            dispatch: dispatch.peer_id(),
            from_step: PolicyVersion(0),
            labels: BTreeMap::new(),
        };
        Self {
            bus: MemoryBus::new(&id, MemoryConfig::default()),
            descriptor: seal(&learner, &id, 1, descriptor).unwrap(),
            id,
            learner,
            dispatch,
            worker,
        }
    }

    fn version(&self) -> VersionRef {
        let (_, part) = describe_state(&weights()).unwrap();
        let (version, root) = (VERSION, state_root(&[part]));
        VersionRef { version, root }
    }

    fn announcement(&self) -> Announcement {
        let (parameters, part) = describe_state(&weights()).unwrap();
        let VersionRef { version, root } = self.version();
        let anchor = describe_object(Content::Anchor { root }, version, &weights()).unwrap();
        let body = Version {
            descriptor: descriptor_hash(&self.descriptor.bytes),
            generation: Generation(1),
            version,
            parent: None,
            parameters,
            parts: vec![part],
            root,
            files: Vec::new(),
        };
        let anchor = seal(&self.learner, &self.id, 1, anchor).unwrap();
        Announcement {
            version: seal(&self.learner, &self.id, 1, body)
                .unwrap()
                .bytes
                .to_vec(),
            objects: vec![ByteBuf::from(anchor.bytes.to_vec())],
        }
    }

    /// A lease that follows the run's rules.
    fn lease(&self, number: u8) -> Lease {
        let mut lease = testing::lease(testing::ticket());
        lease.id = LeaseId([number; 16]);
        lease.ticket.descriptor = descriptor_hash(&self.descriptor.bytes);
        lease.version = self.version();
        lease.deadline = UnixMillis(600_000);
        self.bound_to(lease, self.worker.peer_id())
    }

    /// The lease under the seed that its fields prescribe for this worker.
    fn bound_to(&self, mut lease: Lease, worker: PeerId) -> Lease {
        lease.worker = worker;
        let binding = SeedBinding {
            run: &self.id,
            epoch: lease.epoch,
            worker: &worker,
            version: lease.version.version,
            submission: lease.submission,
        };
        lease.seed = lease_seed(&binding, &lease.nonce);
        lease
    }

    fn signed(&self, lease: Lease) -> ByteBuf {
        let signed = seal(&self.dispatch, &self.id, 1, lease).unwrap();
        ByteBuf::from(signed.bytes.to_vec())
    }

    /// Serves as dispatch: gives `leases` once and ends the run when `submissions` have come. Returns the groups.
    async fn serve(
        self: Arc<Self>,
        mut requests: Requests,
        leases: Vec<ByteBuf>,
        submissions: usize,
        on_submission: OnSubmission,
    ) -> Vec<Signed<Group>> {
        let (mut leases, mut groups) = (Some(leases), Vec::new());
        while let Some(request) = requests.next().await {
            let ask = open::<Ask>(request.payload.clone(), &self.id).unwrap();
            let reply = match ask.body {
                Ask::Descriptor => Reply::Descriptor(ByteBuf::from(self.descriptor.bytes.to_vec())),
                Ask::Latest { .. } => Reply::Version(Some(self.announcement())),
                Ask::Lease {
                    held, rollouts_max, ..
                } => {
                    assert_eq!((held, rollouts_max), (self.version(), ROOM));
                    match leases.take() {
                        Some(leases) => Reply::Leases(leases),
                        None if groups.len() >= submissions => Reply::Finished,
                        None => Reply::Wait {
                            retry_ms: 10,
                            reason: WaitReason::NothingOpen,
                        },
                    }
                }
                Ask::Submit { group, .. } => {
                    let group = open::<Group>(group.into_vec().into(), &self.id).unwrap();
                    let hash = GroupHash::of(&group.bytes);
                    groups.push(group);
                    match on_submission {
                        OnSubmission::Accept => Reply::Accepted { group: hash },
                        OnSubmission::Refuse => Reply::Refused {
                            reason: "the ticket has ended".to_owned(),
                        },
                    }
                }
                other => panic!("a worker does not ask {other:?}"),
            };
            let ends = reply == Reply::Finished;
            let reply = seal(&self.dispatch, &self.id, 1, reply).unwrap();
            request.reply(reply.bytes).await;
            if ends {
                break;
            }
        }
        groups
    }

    async fn requests(&self) -> (muster_protocol::bus::SharedBus, Requests) {
        let bus = self.bus.connect("DISPATCH", Role::Dispatch);
        let requests = bus.serve(&Subjects::of(&self.id).all_asks()).await.unwrap();
        (bus, requests)
    }

    async fn worker(
        &self,
        model: Model,
        class: NumericClass,
        tracker: &TaskTracker,
        shutdown: &CancellationToken,
    ) -> Result<Worker, WorkerError> {
        let bus = self.bus.connect("WORKER", Role::Worker);
        let identity = self.worker.clone();
        let client = DispatchClient::new(bus, identity, self.id.clone(), self.learner.peer_id());
        let (source, stop) = (Arc::new(Weights), shutdown.child_token());
        let follower = Follower::start(client.clone(), source, Follow::Newest, tracker, stop);
        Worker::start(WorkerParts {
            client,
            clock: Arc::new(TimerClock::starting_at(UnixMillis(0))),
            answerer: Box::new(model),
            follower: follower.await.unwrap(),
            class,
        })
        .await
    }
}

/// What came of a run.
struct Outcome {
    metrics: Metrics,
    groups: Vec<Signed<Group>>,
    /// The leases that the model took.
    taken: Vec<LeaseId>,
}

/// Runs a worker to the end of a run that gives these leases.
async fn outcome_of(
    run: &Arc<Run>,
    leases: Vec<ByteBuf>,
    submissions: usize,
    on_submission: OnSubmission,
) -> Outcome {
    let (tracker, shutdown) = (TaskTracker::new(), CancellationToken::new());
    let (_connection, requests) = run.requests().await;
    let serving = Arc::clone(run).serve(requests, leases, submissions, on_submission);
    let serving: JoinHandle<Vec<Signed<Group>>> = tokio::spawn(serving);
    let model = Model::default();
    let taken = Arc::clone(&model.taken);
    let worker = run.worker(model, NumericClass::F32Cpu, &tracker, &shutdown);
    let metrics = worker.await.unwrap().run(shutdown.clone()).await.unwrap();
    shutdown.cancel();
    let groups = serving.await.unwrap();
    let taken = taken.lock().unwrap().clone();
    Outcome {
        metrics,
        groups,
        taken,
    }
}

#[tokio::test(start_paused = true)]
async fn a_worker_submits_an_answer_to_each_lease() {
    let run = Arc::new(Run::new());
    let leases = [1, 2].map(|number| run.signed(run.lease(number)));
    let outcome = outcome_of(&run, leases.to_vec(), 2, OnSubmission::Accept).await;
    let mut answered = Vec::new();
    for group in &outcome.groups {
        assert_eq!(group.author, run.worker.peer_id());
        let lease = run.lease(group.body.lease.0[0]);
        assert_eq!(group.body.version, lease.version);
        assert_eq!(group.body.rollouts, rollouts(&lease));
        answered.push(lease.id);
    }
    answered.sort();
    assert_eq!(answered, [LeaseId([1; 16]), LeaseId([2; 16])]);
    let expected = Metrics {
        submitted: 2,
        tokens: 2 * 4 * TOKENS.len() as u64,
        ..Metrics::default()
    };
    assert_eq!(outcome.metrics, expected);
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_breaks_a_rule_is_not_answered() {
    let run = Arc::new(Run::new());
    let other = Identity::generate();
    let forged = seal(&other, &run.id, 1, run.lease(1)).unwrap();
    let of_another_worker = run.bound_to(run.lease(2), other.peer_id());
    let [mut seed, mut root, mut descriptor] = [3, 4, 5].map(|number| run.lease(number));
    seed.seed[0] ^= 1;
    root.version.root = StateRoot([9; 32]);
    descriptor.ticket.descriptor = DescriptorHash([9; 32]);
    let mut leases: Vec<ByteBuf> = [of_another_worker, seed, root, descriptor, run.lease(6)]
        .map(|lease| run.signed(lease))
        .to_vec();
    leases.push(ByteBuf::from(forged.bytes.to_vec()));
    leases.push(ByteBuf::from(vec![1, 2, 3]));
    let outcome = outcome_of(&run, leases, 1, OnSubmission::Accept).await;
    assert_eq!(outcome.taken, [LeaseId([6; 16])]);
    assert_eq!(outcome.groups.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_group_that_dispatch_refuses_is_counted_and_not_submitted_again() {
    let run = Arc::new(Run::new());
    let leases = vec![run.signed(run.lease(1))];
    let outcome = outcome_of(&run, leases, 1, OnSubmission::Refuse).await;
    assert_eq!(outcome.groups.len(), 1);
    let expected = Metrics {
        refused: 1,
        ..Metrics::default()
    };
    assert_eq!(outcome.metrics, expected);
}

#[tokio::test(start_paused = true)]
async fn a_worker_without_weights_asks_for_no_lease() {
    let run = Run::new();
    let (_connection, mut requests) = run.requests().await;
    let (tracker, shutdown) = (TaskTracker::new(), CancellationToken::new());
    let stop = shutdown.clone();
    let (id, dispatch) = (run.id.clone(), run.dispatch.clone());
    let descriptor = ByteBuf::from(run.descriptor.bytes.to_vec());
    let serving = tokio::spawn(async move {
        let end = tokio::time::sleep(Duration::from_secs(60));
        tokio::pin!(end);
        let mut asked = Vec::new();
        loop {
            let request = tokio::select! {
                () = &mut end => break,
                request = requests.next() => request.unwrap(),
            };
            let ask = open::<Ask>(request.payload.clone(), &id).unwrap().body;
            let reply = match &ask {
                Ask::Descriptor => Reply::Descriptor(descriptor.clone()),
                _ => Reply::Version(None),
            };
            asked.push(ask);
            let reply = seal(&dispatch, &id, 1, reply).unwrap();
            request.reply(reply.bytes).await;
        }
        stop.cancel();
        asked
    });
    let worker = run.worker(Model::default(), NumericClass::F32Cpu, &tracker, &shutdown);
    let metrics = worker.await.unwrap().run(shutdown.clone()).await.unwrap();
    assert_eq!(metrics, Metrics::default());
    let asked = serving.await.unwrap();
    let latest = |ask: &Ask| matches!(ask, Ask::Latest { version: None });
    assert!(asked.iter().any(latest), "{asked:?}");
    let allowed = |ask: &Ask| latest(ask) || *ask == Ask::Descriptor;
    assert!(asked.iter().all(allowed), "{asked:?}");
}

#[tokio::test(start_paused = true)]
async fn a_worker_of_a_class_that_the_run_does_not_list_does_not_start() {
    let run = Arc::new(Run::new());
    let (tracker, shutdown) = (TaskTracker::new(), CancellationToken::new());
    let (_connection, requests) = run.requests().await;
    let serving = Arc::clone(&run).serve(requests, Vec::new(), 0, OnSubmission::Accept);
    let serving = tokio::spawn(serving);
    let worker = run.worker(Model::default(), NumericClass::Int8Cpu, &tracker, &shutdown);
    let refused = worker.await.err().unwrap();
    assert!(matches!(refused, WorkerError::Class { .. }), "{refused}");
    shutdown.cancel();
    serving.abort();
}
