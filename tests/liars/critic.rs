//! A critic that lies: it requests groups as any critic does and signs verdicts with false rewards. It claims audits that
//! it never makes.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_bytes::ByteBuf;

use muster_broadcaster::follower::open_announcement;
use muster_protocol::dispatch_client::{DispatchClient, DispatchClientError};
use muster_protocol::envelope::open;
use muster_protocol::id::{ContentHash, GroupHash};
use muster_protocol::message::ask::{Ask, Reply, WaitReason};
use muster_protocol::message::critique::CritiqueLease;
use muster_protocol::message::group::Group;
use muster_protocol::message::lease::NumericClass;
use muster_protocol::message::verdict::{Decision, RolloutReward, Verdict};
use muster_protocol::message::version::VersionRef;

use super::start::Start;

/// The least reward of an inflated rollout.
const INFLATED: f32 = 1.0;
/// Versions that it claims to hold.
const VERSIONS_CLAIMED: usize = 8;
/// Pause between two requests, whatever dispatch tells it.
const PAUSE: Duration = Duration::from_millis(50);

/// How the critic falsifies the rewards of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RewardChange {
    /// Raises the reward of every second rollout to the largest reward.
    Inflated,
    /// Permutes the rewards within the group, by a draw from the group's hash. The sum of rewards stays, but not which answer
    /// earned them, so that a control run must learn nothing.
    Permuted,
}

/// What the critic did.
#[derive(Debug, Clone, Copy, Default)]
pub struct CriticCounts {
    /// Groups that it reviewed.
    pub groups: u64,
    /// Rollouts whose reward it raised.
    pub inflated: u64,
    /// Requests that dispatch refused with a cool-down.
    pub refusals: u64,
    /// Groups that it reviewed after the first refusal.
    pub groups_after_refusal: u64,
}

pub struct LyingCritic {
    pub change: RewardChange,
    pub client: DispatchClient,
    pub start: Arc<Start>,
    pub critic_counts: Arc<Mutex<CriticCounts>>,
}

impl LyingCritic {
    /// Reviews groups until the run is over.
    pub async fn run(self) -> Result<(), DispatchClientError> {
        self.client.descriptor().await?;
        let mut held: Vec<VersionRef> = Vec::new();
        loop {
            if let Ok(Some(announcement)) = self.client.latest().await {
                let newest = open_announcement(&self.client, &announcement).unwrap();
                let newest = newest.version.body.reference();
                if held.last() != Some(&newest) {
                    held.push(newest);
                }
                let excess = held.len().saturating_sub(VERSIONS_CLAIMED);
                held.drain(..excess);
            }
            let ask = Ask::Critique {
                held: held.clone(),
                class: NumericClass::F32Cpu,
                groups_max: 2,
            };
            match self.client.ask(ask).await {
                Ok(Reply::CritiqueLeases(leases)) => self.review(leases).await?,
                Ok(Reply::Wait { reason, .. }) => {
                    if reason == WaitReason::CoolDown {
                        self.critic_counts.lock().unwrap().refusals += 1;
                    }
                    tokio::time::sleep(PAUSE).await;
                }
                Ok(Reply::Finished) => return Ok(()),
                Ok(_) => return Err(DispatchClientError::Unexpected),
                Err(error) if error.is_transient() => tokio::time::sleep(PAUSE).await,
                Err(error) => return Err(error),
            }
        }
    }

    async fn review(&self, leases: Vec<ByteBuf>) -> Result<(), DispatchClientError> {
        let mut verdicts = Vec::new();
        for bytes in leases {
            let lease = open::<CritiqueLease>(bytes.into_vec().into(), self.client.run())?.body;
            let verdict = self.client.sign(self.verdict(&lease)?)?;
            verdicts.push(ByteBuf::from(verdict.bytes.to_vec()));
        }
        self.client.ask(Ask::Verdict { verdicts }).await?;
        Ok(())
    }

    fn verdict(&self, lease: &CritiqueLease) -> Result<Verdict, DispatchClientError> {
        let group = open::<Group>(lease.group.clone().into(), self.client.run())?;
        let hash = GroupHash::of(&group.bytes);
        let honest: Vec<f32> = group
            .body
            .rollouts
            .iter()
            .map(|rollout| {
                let prompt = rollout.segments[0].tokens();
                let (drawn, _) = rollout.drawn();
                self.start.reward(prompt, &drawn, rollout.finish)
            })
            .collect();
        let mut totals = honest.clone();
        match self.change {
            RewardChange::Inflated => totals.iter_mut().step_by(2).for_each(|total| {
                *total = total.max(INFLATED);
            }),
            RewardChange::Permuted => shuffle(&mut totals, hash),
        }
        let raised = honest.iter().zip(&totals);
        let inflated = raised.filter(|(honest, total)| honest < total).count() as u64;
        let reward = |total: &f32| RolloutReward {
            total: *total,
            components: vec![("correct".to_owned(), *total)],
        };
        let rewards = totals.iter().map(reward).collect();
        let mut critic_counts = self.critic_counts.lock().unwrap();
        critic_counts.groups += 1;
        critic_counts.inflated += inflated;
        critic_counts.groups_after_refusal += u64::from(critic_counts.refusals > 0);
        Ok(Verdict {
            group: hash,
            lease: group.body.lease,
            ticket: group.body.ticket,
            audited: lease.audit,
            rewards,
            findings: Vec::new(),
            decision: Decision::Accept,
        })
    }
}

/// The shuffle of Fisher and Yates with draws from the group's hash, so that every critic permutes a group in the same way.
fn shuffle(totals: &mut [f32], group: GroupHash) {
    for last in (1..totals.len()).rev() {
        let drawn = ContentHash::of(format!("{group} {last}").as_bytes()).0;
        let drawn = u64::from_le_bytes(drawn[..8].try_into().unwrap());
        totals.swap(last, (drawn % (last as u64 + 1)) as usize);
    }
}
