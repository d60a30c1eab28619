//! The critic: takes groups that dispatch gives it, computes each answer's reward with the run's own functions, re-checks
//! drawn ones with one forward pass, and signs what it finds.
//!
//! [`findings`] decides (pure), [`scorer`] is what it needs of a model; this file talks. It keeps no state that a kill could
//! lose: what was not answered is given to another critic.

pub mod findings;
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
use findings::{COINCIDENCE_LOGPROB, audit, audit_endings, draws_digest, total_logprob};
use scorer::{ScoreRequest, Scorer, ScorerError};

/// Pause after an ask that nobody answered.
const ASK_RETRY: Duration = Duration::from_millis(250);
/// Groups whose draws are remembered, to recognise answers that come again.
const REMEMBERED_MAX: usize = 65_536;

/// Why a critic ended.
#[derive(Debug, thiserror::Error)]
pub enum CriticError {
    /// Dispatch cannot be asked, or refuses this critic.
    #[error("the critic cannot go on: {0}")]
    Dispatch(#[from] DispatchClientError),
    /// The model failed.
    #[error("the model failed: {0}")]
    Scorer(#[from] ScorerError),
    /// The run's reward configuration cannot be used.
    #[error("the run's reward configuration cannot be used: {0}")]
    Rewards(String),
    /// A gold answer that the reward cannot read.
    #[error("a gold answer cannot be used: {0}")]
    Gold(#[from] GoldError),
    /// A verdict could not be signed.
    #[error("a verdict could not be written: {0}")]
    Envelope(#[from] EnvelopeError),
}

/// What a critic needs to start.
pub struct CriticParts {
    /// Its way to dispatch.
    pub client: DispatchClient,
    /// Its model.
    pub scorer: Box<dyn Scorer>,
    /// Where weights come from; follows every version.
    pub follower: Follower,
    /// The arithmetic of its model.
    pub class: NumericClass,
    /// Most groups at once.
    pub groups_max: u32,
}

/// A critic, connected.
pub struct Critic {
    parts: CriticParts,
    descriptor: Signed<Descriptor>,
    reward: Reward,
    seen: Seen,
}

/// Draws of earlier groups.
#[derive(Debug, Default)]
struct Seen {
    order: VecDeque<[u8; 32]>,
    leases: BTreeMap<[u8; 32], LeaseId>,
}

impl Seen {
    /// The other lease under which the same draws came before; remembers these.
    fn earlier(&mut self, group: &Group) -> Option<LeaseId> {
        let digest = draws_digest(group);
        match self.leases.get(&digest) {
            Some(lease) => Some(*lease).filter(|lease| *lease != group.lease),
            None => {
                self.leases.insert(digest, group.lease);
                self.order.push_back(digest);
                if self.order.len() > REMEMBERED_MAX
                    && let Some(oldest) = self.order.pop_front()
                {
                    self.leases.remove(&oldest);
                }
                None
            }
        }
    }
}

/// A group that was opened for judgement.
struct Opened {
    lease: Lease,
    group: Signed<Group>,
    prompt: String,
    gold: String,
    audit: bool,
}

impl Critic {
    /// Joins the run: reads its descriptor and the reward functions in it.
    ///
    /// # Errors
    /// When dispatch cannot be asked or the descriptor cannot be used.
    pub async fn start(parts: CriticParts) -> Result<Self, CriticError> {
        let descriptor = parts.client.descriptor().await?;
        let config: RewardConfig = serde_json::from_str(&descriptor.body.rewards)
            .map_err(|error| CriticError::Rewards(error.to_string()))?;
        Ok(Self {
            parts,
            descriptor,
            reward: config.reward,
            seen: Seen::default(),
        })
    }

    /// Judges until the run is over or `shutdown`.
    ///
    /// # Errors
    /// When the model fails, the bus is gone for good, or dispatch refuses this critic.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), CriticError> {
        loop {
            let turn = tokio::select! {
                biased;
                () = shutdown.cancelled() => return Ok(()),
                turn = self.turn() => turn?,
            };
            match turn {
                Some(pause) if pause.is_zero() => {}
                Some(pause) => self.pause(pause, &shutdown).await,
                None => {
                    info!("the run is over");
                    return Ok(());
                }
            }
        }
    }

    /// One round; returns how long to wait before the next, nothing when the run is over.
    async fn turn(&mut self) -> Result<Option<Duration>, CriticError> {
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
                let opened = leases
                    .into_iter()
                    .filter_map(|lease| self.open(lease))
                    .collect();
                self.judge(opened).await?;
                Ok(Some(Duration::ZERO))
            }
            Ok(Reply::Wait { retry_ms, reason }) => {
                if reason == WaitReason::CoolDown {
                    warn!("dispatch gives this critic no more groups: it contradicted the others");
                }
                Ok(Some(Duration::from_millis(retry_ms)))
            }
            Ok(Reply::Finished) => Ok(None),
            Ok(_) => Err(DispatchClientError::Unexpected.into()),
            Err(error) if error.is_transient() => Ok(Some(ASK_RETRY)),
            Err(error) => Err(error.into()),
        }
    }

    async fn pause(&mut self, pause: Duration, shutdown: &CancellationToken) {
        tokio::select! {
            biased;
            () = shutdown.cancelled() => {}
            () = self.parts.follower.changed() => {
                // The wait was for work as much as for weights: adopt at once, ask in the next round.
                self.parts.follower.latest();
            }
            () = tokio::time::sleep(pause) => {}
        }
    }

    fn open(&self, bytes: ByteBuf) -> Option<Opened> {
        let run = self.parts.client.run();
        let opened = || -> Result<Option<Opened>, EnvelopeError> {
            let case = open::<CritiqueLease>(bytes.into_vec().into(), run)?;
            let lease = open::<Lease>(case.body.lease.into(), run)?;
            let group = open::<Group>(case.body.group.into(), run)?;
            let dispatch = self.descriptor.body.dispatch;
            if case.author != dispatch || lease.author != dispatch {
                return Ok(None);
            }
            let CritiqueLease {
                prompt,
                gold,
                audit,
                ..
            } = CritiqueLease {
                lease: Vec::new(),
                group: Vec::new(),
                ..case.body
            };
            Ok(Some(Opened {
                lease: lease.body,
                group,
                prompt,
                gold,
                audit,
            }))
        };
        match opened() {
            Ok(opened) => opened,
            Err(error) => {
                warn!(%error, "a group to judge cannot be opened");
                None
            }
        }
    }

    async fn judge(&mut self, cases: Vec<Opened>) -> Result<(), CriticError> {
        let held = self.parts.scorer.held();
        let audited = cases.iter().filter(|case| case.audit);
        let requests: Vec<ScoreRequest> = audited
            .flat_map(|case| score_requests(&case.lease, &case.group.body, &held))
            .collect();
        let mut scores = self.parts.scorer.score(requests).await?.into_iter();
        let mut verdicts = Vec::with_capacity(cases.len());
        for case in &cases {
            let scored: Option<Vec<_>> =
                case.audit.then(|| scores_of(&case.group.body, &mut scores));
            let verdict = self.verdict(case, scored.as_deref())?;
            verdicts.push(ByteBuf::from(
                self.parts.client.sign(verdict)?.bytes.to_vec(),
            ));
        }
        self.report(verdicts).await
    }

    fn verdict(
        &mut self,
        case: &Opened,
        scored: Option<&[findings::RolloutScores]>,
    ) -> Result<Verdict, CriticError> {
        let group = &case.group.body;
        let rewards: Result<Vec<RolloutReward>, CriticError> = group
            .rollouts
            .iter()
            .map(|rollout| self.reward(case, rollout))
            .collect();
        let (mut decision, mut findings) = match scored {
            Some(scores) => audit(&case.lease, group, scores, self.thresholds(group.class)),
            None => (Decision::Accept, Vec::new()),
        };
        let strings = &case.lease.ticket.sampling.stop_strings;
        let scorer = &mut self.parts.scorer;
        let ended = group.rollouts.iter();
        let stopped: Vec<Option<StopAt>> = ended
            .map(|rollout| scorer.stopped(&rollout.drawn().0, strings))
            .collect();
        let endings = audit_endings(&case.lease, group, &stopped);
        if !endings.is_empty() {
            findings.extend(endings);
            decision = Decision::Reject;
        }
        if let Some(earlier) = self.seen.earlier(group)
            && total_logprob(group) < COINCIDENCE_LOGPROB
        {
            let of = format!("the answers to lease {earlier}");
            findings.push(Finding::Duplicate { rollout: 0, of });
            decision = Decision::Reject;
        }
        findings.truncate(FINDINGS_MAX);
        if let Some(finding) = findings.first() {
            debug!(ticket = %group.ticket, %finding, ?decision, "found");
        }
        Ok(Verdict {
            group: GroupHash::of(&case.group.bytes),
            lease: group.lease,
            ticket: group.ticket,
            audited: scored.is_some(),
            rewards: rewards?,
            findings,
            decision,
        })
    }

    fn reward(&self, case: &Opened, rollout: &Rollout) -> Result<RolloutReward, CriticError> {
        let (tokens, _) = rollout.drawn();
        let text = self.parts.scorer.text(&tokens)?;
        let answer = Answer {
            prompt: &case.prompt,
            text: &text,
            finished: rollout.finish.is_stop(),
            tokens: tokens.len(),
        };
        let score = self.reward.score(&answer, &case.gold)?;
        let components = score
            .components
            .into_iter()
            .map(|c| (c.name, c.value as f32))
            .collect();
        Ok(RolloutReward {
            total: score.total as f32,
            components,
        })
    }

    fn thresholds(&self, class: NumericClass) -> &Thresholds {
        let descriptor = &self.descriptor.body;
        // Answers in int8 are scored in int8, whatever this critic's own arithmetic is.
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
        match self
            .parts
            .client
            .ask_until_answered(Ask::Verdict { verdicts })
            .await
        {
            Ok(Reply::Recorded { refused }) => {
                for reason in refused {
                    debug!(%reason, "a verdict was not recorded");
                }
                Ok(())
            }
            Ok(Reply::Wait { retry_ms, .. }) => {
                // Dispatch lost its bus for a moment: the groups are given out again after their time.
                tokio::time::sleep(Duration::from_millis(retry_ms)).await;
                Ok(())
            }
            Ok(_) => Err(DispatchClientError::Unexpected.into()),
            Err(error) => Err(error.into()),
        }
    }
}

/// What to score of a group: each drawn segment after everything before it, under the version that drew it.
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

/// The lease's own version, or the one held under this number; the lease's where there is none, whose weights will not
/// confirm what others drew.
fn version_of(number: PolicyVersion, lease: &Lease, held: &[VersionRef]) -> VersionRef {
    let newer = held.iter().find(|known| known.version == number);
    match newer {
        Some(known) if number != lease.version.version => *known,
        _ => lease.version,
    }
}

/// The scores of a group, a list for every rollout, from those of its segments.
fn scores_of(
    group: &Group,
    scores: &mut impl Iterator<Item = Vec<TokenScore>>,
) -> Vec<findings::RolloutScores> {
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
