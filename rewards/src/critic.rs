//! The critic: leases groups from dispatch, scores each answer with the run's own reward, re-checks the audited groups with
//! one forward pass, and signs a verdict for each group.
//!
//! [`findings`] decides (pure), [`scorer`] is the model behind the audit, and this file talks to dispatch. A critic that is
//! killed loses nothing: dispatch leases its open groups to another critic.

mod findings;
pub mod scorer;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serde_bytes::ByteBuf;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use muster_broadcaster::follower::Follower;
use muster_policy::{StopAt, TokenScore};
use muster_protocol::dispatch_client::{DispatchClient, DispatchClientError};
use muster_protocol::envelope::{EnvelopeError, Signed, open};
use muster_protocol::id::{GroupHash, LeaseId, PolicyVersion};
use muster_protocol::life;
use muster_protocol::limits::FINDINGS_MAX;
use muster_protocol::message::ask::{Ask, Reply, WaitReason};
use muster_protocol::message::critique::CritiqueLease;
use muster_protocol::message::descriptor::{Descriptor, Thresholds};
use muster_protocol::message::group::{Group, Rollout, Segment};
use muster_protocol::message::lease::{Lease, NumericClass};
use muster_protocol::message::verdict::{Decision, Finding, RolloutReward, Verdict};
use muster_protocol::message::version::VersionRef;

use crate::config::RewardConfig;
use crate::function::Answer;
use crate::reward::{GoldError, Reward};
use findings::{
    COINCIDENCE_LOGPROB, RolloutScores, audit, audit_endings, draws_digest, total_logprob,
};
use scorer::{ScoreRequest, Scorer, ScorerError};

/// Pause after a request that the bus lost.
const ASK_RETRY: Duration = Duration::from_millis(250);
/// Groups whose draws are remembered, to recognise repeated answers; about 5 MB.
const REMEMBERED_MAX: usize = 65_536;

/// Why a critic ended.
#[derive(Debug, thiserror::Error)]
pub enum CriticError {
    #[error("the critic cannot go on: {0}")]
    Dispatch(#[from] DispatchClientError),
    #[error("the model failed: {0}")]
    Scorer(#[from] ScorerError),
    #[error("the run's reward configuration cannot be used: {0}")]
    Rewards(serde_json::Error),
    #[error("a gold answer cannot be used: {0}")]
    Gold(#[from] GoldError),
    #[error("a verdict could not be signed: {0}")]
    Envelope(#[from] EnvelopeError),
}

/// The parts of a critic.
pub struct CriticParts {
    pub client: DispatchClient,
    pub scorer: Box<dyn Scorer>,
    /// Must follow every version.
    pub follower: Follower,
    /// The arithmetic of the scorer.
    pub class: NumericClass,
    /// Most groups in one request to dispatch.
    pub groups_max: u32,
}

/// A critic that has joined its run.
pub struct Critic {
    parts: CriticParts,
    descriptor: Signed<Descriptor>,
    reward: Reward,
    seen: SeenDraws,
}

/// Digests of the draws of earlier groups, the newest [`REMEMBERED_MAX`] of them.
#[derive(Debug, Default)]
struct SeenDraws {
    order: VecDeque<[u8; 32]>,
    leases: BTreeMap<[u8; 32], LeaseId>,
}

impl SeenDraws {
    /// Remembers a group's draws. Returns the other lease under which the same draws came before.
    fn remember(&mut self, group: &Group) -> Option<LeaseId> {
        let digest = draws_digest(group);
        if let Some(lease) = self.leases.get(&digest) {
            return Some(*lease).filter(|lease| *lease != group.lease);
        }
        self.leases.insert(digest, group.lease);
        self.order.push_back(digest);
        if self.order.len() > REMEMBERED_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.leases.remove(&oldest);
        }
        debug_assert!(
            self.order.len() == self.leases.len() && self.order.len() <= REMEMBERED_MAX,
            "every remembered digest is in the queue, once"
        );
        None
    }
}

/// A verified critique lease.
struct Critique {
    lease: Lease,
    group: Signed<Group>,
    prompt: String,
    gold: String,
    audit: bool,
}

/// What a critic does after one request to dispatch.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    AskAgain,
    Wait(Duration),
    RunIsOver,
}

impl Critic {
    /// Joins the run: reads its descriptor and the reward in it.
    ///
    /// # Errors
    /// Dispatch refuses the request, or the descriptor cannot be used.
    pub async fn start(parts: CriticParts) -> Result<Self, CriticError> {
        let descriptor = parts.client.descriptor().await?;
        let config: RewardConfig =
            serde_json::from_str(&descriptor.body.rewards).map_err(CriticError::Rewards)?;
        Ok(Self {
            parts,
            descriptor,
            reward: config.reward,
            seen: SeenDraws::default(),
        })
    }

    /// Critiques groups until the run is over or `shutdown`.
    ///
    /// # Errors
    /// The model fails, the bus closes, or dispatch refuses this critic.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), CriticError> {
        loop {
            let next = tokio::select! {
                biased;
                () = shutdown.cancelled() => return Ok(()),
                next = self.ask_and_critique() => next?,
            };
            match next {
                Next::AskAgain => {}
                Next::Wait(pause) => self.pause(pause, &shutdown).await,
                Next::RunIsOver => {
                    info!("the run is over");
                    return Ok(());
                }
            }
        }
    }

    async fn ask_and_critique(&mut self) -> Result<Next, CriticError> {
        while let Some(held) = self.parts.follower.take_next() {
            self.parts.scorer.adopt(&held).await?;
        }
        let ask = Ask::Critique {
            held: self.parts.scorer.held(),
            class: self.parts.class,
            groups_max: self.parts.groups_max,
        };
        match self.parts.client.ask(ask).await {
            Ok(Reply::CritiqueLeases(leases)) => {
                let opened = leases.into_iter().filter_map(|lease| self.open(lease));
                let opened = opened.collect();
                self.critique(opened).await?;
                Ok(Next::AskAgain)
            }
            Ok(Reply::Wait { retry_ms, reason }) => {
                if reason == WaitReason::CoolDown {
                    warn!(
                        "dispatch leases no groups to this critic for a while: its verdicts contradicted other critics"
                    );
                }
                Ok(Next::Wait(Duration::from_millis(retry_ms)))
            }
            Ok(Reply::Finished) => Ok(Next::RunIsOver),
            Ok(_) => Err(DispatchClientError::Unexpected.into()),
            Err(error) if error.is_transient() => Ok(Next::Wait(ASK_RETRY)),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until the pause, a new version, or `shutdown` ends it.
    async fn pause(&mut self, pause: Duration, shutdown: &CancellationToken) {
        tokio::select! {
            biased;
            () = shutdown.cancelled() => {}
            () = self.parts.follower.changed() => {
                // Marks the version as seen; the next request adopts it.
                self.parts.follower.latest();
            }
            () = tokio::time::sleep(pause) => {}
        }
    }

    /// Opens a critique lease; logs and drops one that dispatch did not sign.
    fn open(&self, bytes: ByteBuf) -> Option<Critique> {
        let run = self.parts.client.run();
        let opened = || -> Result<_, EnvelopeError> {
            let critique = open::<CritiqueLease>(bytes.into_vec().into(), run)?;
            let lease = open::<Lease>(critique.body.lease.into(), run)?;
            let group = open::<Group>(critique.body.group.into(), run)?;
            let authors = [critique.author, lease.author];
            let opened = Critique {
                lease: lease.body,
                group,
                prompt: critique.body.prompt,
                gold: critique.body.gold,
                audit: critique.body.audit,
            };
            Ok((authors, opened))
        };
        match opened() {
            Ok((authors, opened)) => {
                let dispatch = self.descriptor.body.dispatch;
                if let Some(author) = authors.iter().find(|author| **author != dispatch) {
                    warn!(author = %author.short(), "critique lease dropped: dispatch did not sign it");
                    return None;
                }
                Some(opened)
            }
            Err(error) => {
                warn!(%error, "critique lease dropped: it cannot be opened");
                None
            }
        }
    }

    async fn critique(&mut self, critiques: Vec<Critique>) -> Result<(), CriticError> {
        let held = self.parts.scorer.held();
        let audited = critiques.iter().filter(|critique| critique.audit);
        let requests: Vec<ScoreRequest> = audited
            .flat_map(|critique| score_requests(&critique.lease, &critique.group.body, &held))
            .collect();
        let mut scores = self.parts.scorer.score(requests).await?.into_iter();
        let mut verdicts = Vec::with_capacity(critiques.len());
        for critique in &critiques {
            let scored = critique
                .audit
                .then(|| scores_of(&critique.group.body, &mut scores));
            let verdict = self.verdict(critique, scored.as_deref())?;
            verdicts.push(ByteBuf::from(
                self.parts.client.sign(verdict)?.bytes.to_vec(),
            ));
        }
        debug_assert_eq!(
            scores.len(),
            0,
            "every score belongs to a segment of an audited group"
        );
        self.report(verdicts).await
    }

    fn verdict(
        &mut self,
        critique: &Critique,
        scored: Option<&[RolloutScores]>,
    ) -> Result<Verdict, CriticError> {
        let (lease, group) = (&critique.lease, &critique.group.body);
        let rewards = group.rollouts.iter();
        let rewards = rewards.map(|rollout| self.reward(critique, rollout));
        let rewards = rewards.collect::<Result<Vec<_>, _>>()?;
        let (mut decision, mut findings) = match scored {
            Some(scores) => audit(lease, group, scores, self.thresholds(group.class)),
            None => (Decision::Accept, Vec::new()),
        };
        let strings = &lease.ticket.sampling.stop_strings;
        let scorer = &mut self.parts.scorer;
        let rollouts = group.rollouts.iter();
        let stopped: Vec<Option<StopAt>> = rollouts
            .map(|rollout| scorer.stopped(&rollout.drawn().0, strings))
            .collect();
        let endings = audit_endings(lease, group, &stopped);
        if !endings.is_empty() {
            findings.extend(endings);
            decision = Decision::Reject;
        }
        if let Some(earlier) = self.seen.remember(group)
            && total_logprob(group) < COINCIDENCE_LOGPROB
        {
            let of = format!("the answers to lease {earlier}");
            findings.push(Finding::Duplicate { rollout: 0, of });
            decision = Decision::Reject;
        }
        findings.truncate(FINDINGS_MAX);
        debug_assert_eq!(
            decision == Decision::Accept,
            findings.is_empty(),
            "an accepted group has no finding, and any other decision has one"
        );
        let name = GroupHash::of(&critique.group.bytes);
        let finding = findings.first().map(tracing::field::display);
        debug!(
            target: life::TARGET, ticket = %group.ticket, lease = %group.lease, group = %name.short(),
            version = %group.version.version, audited = scored.is_some(), ?decision, finding, "critiqued"
        );
        Ok(Verdict {
            group: name,
            lease: group.lease,
            ticket: group.ticket,
            audited: scored.is_some(),
            rewards,
            findings,
            decision,
        })
    }

    fn reward(&self, critique: &Critique, rollout: &Rollout) -> Result<RolloutReward, CriticError> {
        let (tokens, _) = rollout.drawn();
        let text = self.parts.scorer.text(&tokens)?;
        let answer = Answer {
            prompt: &critique.prompt,
            text: &text,
            finished: rollout.finish.is_stop(),
            tokens: tokens.len(),
        };
        let score = self.reward.score(&answer, &critique.gold)?;
        let components = score.components.into_iter();
        Ok(RolloutReward {
            total: score.total as f32,
            components: components
                .map(|part| (part.name, part.value as f32))
                .collect(),
        })
    }

    fn thresholds(&self, class: NumericClass) -> &Thresholds {
        let descriptor = &self.descriptor.body;
        // Every critic scores int8 answers in int8, so they are of one class with any critic.
        if class == self.parts.class || class == NumericClass::Int8Cpu {
            &descriptor.same_class
        } else {
            &descriptor.cross_class
        }
    }

    async fn report(&self, verdicts: Vec<ByteBuf>) -> Result<(), CriticError> {
        if verdicts.is_empty() {
            return Ok(());
        }
        let ask = Ask::Verdict { verdicts };
        match self.parts.client.ask_until_answered(ask).await? {
            Reply::Recorded { refused } => {
                for reason in refused {
                    debug!(%reason, "verdict not recorded");
                }
                Ok(())
            }
            Reply::Wait { retry_ms, .. } => {
                // Dispatch lost its bus for a moment. It leases the groups again after their deadline.
                tokio::time::sleep(Duration::from_millis(retry_ms)).await;
                Ok(())
            }
            _ => Err(DispatchClientError::Unexpected.into()),
        }
    }
}

/// One request for each policy segment: its tokens after everything before them, under the version that drew them.
fn score_requests(lease: &Lease, group: &Group, held: &[VersionRef]) -> Vec<ScoreRequest> {
    let mut requests = Vec::new();
    for rollout in &group.rollouts {
        let mut tokens = Vec::new();
        for segment in &rollout.segments {
            let first = tokens.len();
            tokens.extend_from_slice(segment.tokens());
            let Segment::Policy { version, .. } = segment else {
                continue;
            };
            requests.push(ScoreRequest {
                version: version_of(*version, lease, held),
                tokens: tokens.clone(),
                first,
                temperature: lease.ticket.sampling.temperature,
                class: group.class,
            });
        }
    }
    requests
}

/// The held version of this number. If there is none, the lease's version, whose weights do not confirm tokens that another
/// version drew.
fn version_of(number: PolicyVersion, lease: &Lease, held: &[VersionRef]) -> VersionRef {
    let newer = held.iter().find(|known| known.version == number);
    match newer {
        Some(known) if number != lease.version.version => *known,
        _ => lease.version,
    }
}

/// Takes the scores of a group's policy segments and joins them to one list per rollout.
fn scores_of(
    group: &Group,
    scores: &mut impl Iterator<Item = Vec<TokenScore>>,
) -> Vec<RolloutScores> {
    let drawn = |rollout: &Rollout| {
        let policy = |segment: &&Segment| matches!(segment, Segment::Policy { .. });
        rollout.segments.iter().filter(policy).count()
    };
    let rollouts = group.rollouts.iter();
    rollouts
        .map(|rollout| scores.by_ref().take(drawn(rollout)).flatten().collect())
        .collect()
}

#[cfg(test)]
mod tests;
