//! The critic against a dispatch on the bus in memory: it is given leases once, and its verdicts are collected.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use tokio_util::task::TaskTracker;

use muster_broadcaster::follower::{Follow, Held};
use muster_broadcaster::{FetchError, ObjectSource};
use muster_protocol::bus::Requests;
use muster_protocol::bus::memory::{MemoryBus, MemoryConfig};
use muster_protocol::envelope::seal;
use muster_protocol::id::{ContentHash, RunId};
use muster_protocol::identity::Identity;
use muster_protocol::message::version::Object;
use muster_protocol::subject::{Role, Subjects};

use super::super::findings::tests::{P, drawn_mut, honest, lease};
use super::*;

const REWARD: &str = "[task]\ntype = 'running_sums'\n[[reward]]\ntype = 'exact_match'\n";

/// Four equally likely tokens, written as the letters a to d.
struct UniformScorer {
    held: Vec<VersionRef>,
}

#[async_trait]
impl Scorer for UniformScorer {
    async fn adopt(&mut self, _: &Held) -> Result<(), ScorerError> {
        Ok(())
    }

    fn held(&self) -> Vec<VersionRef> {
        self.held.clone()
    }

    async fn score(
        &mut self,
        requests: Vec<ScoreRequest>,
    ) -> Result<Vec<Vec<TokenScore>>, ScorerError> {
        let score = |token: &u32| TokenScore {
            logprob: P.ln() as f32,
            cdf_below: f64::from(*token) * P,
            cdf_through: f64::from(token + 1) * P,
        };
        let scored = |request: &ScoreRequest| match self.held.contains(&request.version) {
            true => request.tokens[request.first..].iter().map(score).collect(),
            false => Vec::new(),
        };
        Ok(requests.iter().map(scored).collect())
    }

    fn text(&self, tokens: &[u32]) -> Result<String, ScorerError> {
        Ok(letters(tokens))
    }

    fn stopped(&mut self, _: &[u32], _: &[String]) -> Option<StopAt> {
        None
    }
}

fn letters(tokens: &[u32]) -> String {
    let letter = |token: &u32| char::from(b'a' + u8::try_from(*token).unwrap());
    tokens.iter().map(letter).collect()
}

#[derive(Debug)]
struct NoObjects;

#[async_trait]
impl ObjectSource for NoObjects {
    async fn fetch(&self, _: &Object) -> Result<Bytes, FetchError> {
        std::future::pending().await
    }
}

/// A group that a worker submitted and dispatch leases to the critic.
struct Submitted {
    lease: Lease,
    group: Group,
    audit: bool,
}

impl Submitted {
    fn audited(group: Group) -> Self {
        let (lease, audit) = (lease(), true);
        Self {
            lease,
            group,
            audit,
        }
    }
}

/// The run's members other than the critic.
struct Members {
    run: RunId,
    dispatch: Identity,
    learner: Identity,
    worker: Identity,
}

impl Members {
    fn new() -> Self {
        let [dispatch, learner, worker] = [(); 3].map(|()| Identity::generate());
        Self {
            run: "test".parse().unwrap(),
            dispatch,
            learner,
            worker,
        }
    }

    fn descriptor(&self) -> Descriptor {
        let hash = ContentHash([0; 32]);
        let config = RewardConfig::from_toml(REWARD).unwrap();
        Descriptor {
            architecture: hash,
            tokenizer: hash,
            chat_template: None,
            task: hash,
            rewards: config.canonical_json().unwrap(),
            sampling: lease().ticket.sampling,
            group_size: 2,
            async_level: 1,
            same_class: Thresholds::SAME_CLASS,
            cross_class: Thresholds::CROSS_CLASS,
            vocabulary: 4,
            classes: vec![NumericClass::F32Cpu],
            learner: self.learner.peer_id(),
            dispatch: self.dispatch.peer_id(),
            from_step: PolicyVersion(0),
            labels: BTreeMap::new(),
        }
    }

    /// A critique lease whose gold answer is the first rollout's text.
    fn critique_lease(&self, submitted: &Submitted, signer: &Identity) -> ByteBuf {
        let Submitted {
            lease,
            group,
            audit,
        } = submitted;
        let lease = seal(signer, &self.run, 1, lease.clone()).unwrap();
        let body = CritiqueLease {
            lease: lease.bytes.to_vec(),
            group: seal(&self.worker, &self.run, 1, group.clone())
                .unwrap()
                .bytes
                .to_vec(),
            critic: self.worker.peer_id(),
            prompt: "b".to_owned(),
            gold: letters(&group.rollouts[0].drawn().0),
            audit: *audit,
            deadline: lease.body.deadline,
        };
        let sealed = seal(&self.dispatch, &self.run, 1, body).unwrap();
        ByteBuf::from(sealed.bytes.to_vec())
    }

    /// Serves the leases once, then ends the run. Returns the verdicts.
    async fn serve(self, mut requests: Requests, leases: Vec<ByteBuf>) -> Vec<Verdict> {
        let (mut leases, mut verdicts) = (Some(leases), Vec::new());
        while let Some(request) = requests.next().await {
            let ask = open::<Ask>(request.payload.clone(), &self.run).unwrap();
            let reply = match ask.body {
                Ask::Descriptor => {
                    let sealed = seal(&self.learner, &self.run, 1, self.descriptor()).unwrap();
                    Reply::Descriptor(ByteBuf::from(sealed.bytes.to_vec()))
                }
                Ask::Critique { .. } => {
                    leases.take().map_or(Reply::Finished, Reply::CritiqueLeases)
                }
                Ask::Verdict { verdicts: signed } => {
                    let opened = signed
                        .into_iter()
                        .map(|bytes| open::<Verdict>(bytes.into_vec().into(), &self.run).unwrap());
                    verdicts.extend(opened.map(|verdict| verdict.body));
                    let refused = Vec::new();
                    Reply::Recorded { refused }
                }
                _ => Reply::Version(None),
            };
            let ends = reply == Reply::Finished;
            let reply = seal(&self.dispatch, &self.run, 1, reply).unwrap();
            request.reply(reply.bytes).await;
            if ends {
                break;
            }
        }
        verdicts
    }
}

/// The verdicts of a critic that holds the lease's version only, on leases that `members` made.
async fn verdicts_on(members: Members, leases: Vec<ByteBuf>) -> Vec<Verdict> {
    let (run, learner) = (members.run.clone(), members.learner.peer_id());
    let (tracker, shutdown) = (TaskTracker::new(), CancellationToken::new());
    let bus = MemoryBus::new(&run, MemoryConfig::default());
    let connection = bus.connect("DISPATCH", Role::Dispatch);
    let asks = Subjects::of(&run).all_asks();
    let requests = connection.serve(&asks).await.unwrap();
    let serving = tokio::spawn(members.serve(requests, leases));
    let connected = bus.connect("CRITIC", Role::Critic);
    let client = DispatchClient::new(connected, Identity::generate(), run, learner);
    let source = Arc::new(NoObjects);
    let follower = Follower::start(
        client.clone(),
        source,
        Follow::Every,
        &tracker,
        shutdown.clone(),
    );
    let held = vec![lease().version];
    let critic = Critic::start(CriticParts {
        client,
        scorer: Box::new(UniformScorer { held }),
        follower: follower.await.unwrap(),
        class: NumericClass::F32Cpu,
        groups_max: 4,
    });
    let ran = critic.await.unwrap().run(shutdown.clone()).await;
    ran.unwrap();
    shutdown.cancel();
    serving.await.unwrap()
}

async fn verdicts_of(submitted: &[Submitted]) -> Vec<Verdict> {
    let members = Members::new();
    let leases = submitted.iter();
    let leases = leases.map(|one| members.critique_lease(one, &members.dispatch));
    let leases = leases.collect();
    verdicts_on(members, leases).await
}

#[tokio::test]
async fn an_honest_group_is_accepted_with_the_reward_of_each_rollout() {
    let verdicts = verdicts_of(&[Submitted::audited(honest())]).await;
    let [verdict] = &verdicts[..] else {
        panic!("{verdicts:?}")
    };
    assert_eq!(verdict.decision, Decision::Accept);
    assert!(verdict.audited);
    assert_eq!(verdict.findings, []);
    let totals: Vec<f32> = verdict.rewards.iter().map(|reward| reward.total).collect();
    assert_eq!(totals, [1.0, 0.0]);
    assert_eq!(
        verdict.rewards[0].components,
        [("exact_match".to_owned(), 1.0)]
    );
}

#[tokio::test]
async fn one_edited_token_and_one_shifted_log_prob_are_each_rejected() {
    let (mut edited, mut shifted) = (honest(), honest());
    let token = &mut drawn_mut(&mut edited, 1).0[3];
    *token = (*token + 1) % 4;
    drawn_mut(&mut shifted, 1).1[3] -= 2e-3;
    for group in [edited, shifted] {
        let verdicts = verdicts_of(&[Submitted::audited(group)]).await;
        assert_eq!(verdicts.len(), 1);
        assert_eq!(verdicts[0].decision, Decision::Reject, "{verdicts:?}");
    }
}

#[tokio::test]
async fn an_audit_under_a_version_that_the_critic_does_not_hold_never_accepts() {
    let (mut lease, mut group) = (lease(), honest());
    lease.version.root.0 = [9; 32];
    group.version = lease.version;
    let audit = true;
    let submitted = Submitted {
        lease,
        group,
        audit,
    };
    let verdicts = verdicts_of(&[submitted]).await;
    assert_eq!(verdicts.len(), 1);
    assert_eq!(verdicts[0].decision, Decision::Reject, "{verdicts:?}");
}

#[tokio::test]
async fn the_same_unlikely_answers_under_two_leases_are_rejected_the_second_time() {
    let submitted = [1, 2].map(|id| {
        let (mut lease, mut group) = (lease(), honest());
        lease.id = LeaseId([id; 16]);
        group.lease = lease.id;
        drawn_mut(&mut group, 0).1.fill(-11.0);
        let audit = false;
        Submitted {
            lease,
            group,
            audit,
        }
    });
    let verdicts = verdicts_of(&submitted).await;
    let decisions: Vec<Decision> = verdicts.iter().map(|verdict| verdict.decision).collect();
    assert_eq!(decisions, [Decision::Accept, Decision::Reject]);
    assert!(
        matches!(verdicts[1].findings[..], [Finding::Duplicate { .. }]),
        "{verdicts:?}"
    );
}

#[tokio::test]
async fn a_lease_that_dispatch_did_not_sign_gets_no_verdict() {
    let members = Members::new();
    let submitted = Submitted::audited(honest());
    let forged = members.critique_lease(&submitted, &members.worker);
    assert_eq!(verdicts_on(members, vec![forged]).await, []);
}
