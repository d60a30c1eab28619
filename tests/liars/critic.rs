//! A critic that lies: it asks for groups as any critic does and signs verdicts with rewards of its own making. It claims
//! audits that it never makes.

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

/// The reward that it hands out.
const INFLATED: f32 = 1.0;
/// Versions that it says it holds.
const VERSIONS_CLAIMED: usize = 8;
/// Longest pause between two asks, whatever dispatch says.
const PAUSE: Duration = Duration::from_millis(50);

/// What it makes of a group's rewards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Making {
    /// Lifts that of every second wrong rollout to the largest one.
    Inflated,
    /// Hands each rollout's to another one of its group, drawn from the group's hash: what a group earns stays, which of
    /// its answers earned it is lost. The control run that must learn nothing.
    Permuted,
}

/// What it did.
#[derive(Debug, Clone, Copy, Default)]
pub struct Deeds {
    /// Groups that it was given.
    pub groups: u64,
    /// Rollouts whose reward it lifted.
    pub inflated: u64,
    /// Asks that dispatch answered with "no more for you".
    pub turned_away: u64,
    /// Groups that it was given after that.
    pub groups_after: u64,
}

pub struct Inflator {
    pub making: Making,
    pub client: DispatchClient,
    pub start: Arc<Start>,
    pub deeds: Arc<Mutex<Deeds>>,
}

impl Inflator {
    /// Judges until the run is over.
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
                Ok(Reply::CritiqueLeases(leases)) => self.judge(leases).await?,
                Ok(Reply::Wait { reason, .. }) => {
                    if reason == WaitReason::CoolDown {
                        self.deeds.lock().unwrap().turned_away += 1;
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

    async fn judge(&self, leases: Vec<ByteBuf>) -> Result<(), DispatchClientError> {
        let mut verdicts = Vec::new();
        for lease in leases {
            let case = open::<CritiqueLease>(lease.into_vec().into(), self.client.run())?.body;
            let verdict = self.client.sign(self.verdict(&case)?)?;
            verdicts.push(ByteBuf::from(verdict.bytes.to_vec()));
        }
        self.client.ask(Ask::Verdict { verdicts }).await?;
        Ok(())
    }

    fn verdict(&self, case: &CritiqueLease) -> Result<Verdict, DispatchClientError> {
        let group = open::<Group>(case.group.clone().into(), self.client.run())?;
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
        match self.making {
            Making::Inflated => totals.iter_mut().step_by(2).for_each(|total| {
                *total = total.max(INFLATED);
            }),
            Making::Permuted => shuffle(&mut totals, hash),
        }
        let lifted = honest.iter().zip(&totals);
        let inflated = lifted.filter(|(honest, total)| honest < total).count() as u64;
        let reward = |total: &f32| RolloutReward {
            total: *total,
            components: vec![("correct".to_owned(), *total)],
        };
        let rewards = totals.iter().map(reward).collect();
        let mut deeds = self.deeds.lock().unwrap();
        deeds.groups += 1;
        deeds.inflated += inflated;
        deeds.groups_after += u64::from(deeds.turned_away > 0);
        Ok(Verdict {
            group: hash,
            lease: group.body.lease,
            ticket: group.body.ticket,
            audited: case.audit,
            rewards,
            findings: Vec::new(),
            decision: Decision::Accept,
        })
    }
}

/// Fisher and Yates' shuffle with draws from a group's hash, so that every critic would shuffle it alike.
fn shuffle(totals: &mut [f32], group: GroupHash) {
    for last in (1..totals.len()).rev() {
        let drawn = ContentHash::of(format!("{group} {last}").as_bytes()).0;
        let drawn = u64::from_le_bytes(drawn[..8].try_into().unwrap());
        totals.swap(last, (drawn % (last as u64 + 1)) as usize);
    }
}
