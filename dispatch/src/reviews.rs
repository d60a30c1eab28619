//! Groups with the critics: who judges what, and what their verdicts come to.
//!
//! A group needs `verdicts` agreeing verdicts of different critics, none of them its author. Verdicts that disagree call
//! for one more critic, up to a bound. A group that was drawn for an audit goes only to critics who hold its version.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use bytes::Bytes;
use muster_protocol::envelope::Signed;
use muster_protocol::id::{GroupHash, PeerId, PolicyVersion, TicketId, UnixMillis};
use muster_protocol::message::verdict::{Decision, Verdict};
use muster_protocol::message::version::VersionRef;

/// How groups are judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CritiqueConfig {
    /// Agreeing verdicts that a group needs: 1 where the critics are the lab's, 2 or more where they are not.
    pub verdicts: u32,
    /// Most critics asked about one group before it is rejected as undecided.
    pub critics_max: u32,
    /// How long a critic may take, in milliseconds.
    pub lease_ms: u64,
}

impl Default for CritiqueConfig {
    fn default() -> Self {
        Self {
            verdicts: 1,
            critics_max: 5,
            lease_ms: 30_000,
        }
    }
}

/// A group with the critics.
#[derive(Debug, Clone)]
pub struct Case {
    /// The group's name.
    pub group: GroupHash,
    /// Who answered.
    pub author: PeerId,
    /// Under which weights, oldest first; one unless they changed in flight.
    pub versions: Vec<VersionRef>,
    /// The prompt's place in the training split.
    pub item: u64,
    /// Whether a forward pass is to check it.
    pub audit: bool,
    /// The signed lease.
    pub lease: Bytes,
    /// The signed group.
    pub body: Bytes,
    asked: BTreeMap<PeerId, UnixMillis>,
    verdicts: Vec<Signed<Verdict>>,
}

impl Case {
    /// A case that nobody has judged.
    pub fn new(
        group: GroupHash,
        author: PeerId,
        versions: Vec<VersionRef>,
        item: u64,
        audit: bool,
        envelopes: (Bytes, Bytes),
    ) -> Self {
        let (lease, body) = envelopes;
        let (asked, verdicts) = (BTreeMap::new(), Vec::new());
        Self {
            group,
            author,
            versions,
            item,
            audit,
            lease,
            body,
            asked,
            verdicts,
        }
    }

    fn judged_by(&self, critic: &PeerId) -> bool {
        self.verdicts
            .iter()
            .any(|verdict| verdict.author == *critic)
    }

    /// The largest set of verdicts that say the same.
    fn agreement(&self) -> Vec<&Signed<Verdict>> {
        let sets = self.verdicts.iter().map(|one| -> Vec<&Signed<Verdict>> {
            self.verdicts
                .iter()
                .filter(|other| other.body.agrees_with(&one.body))
                .collect()
        });
        sets.fold(Vec::new(), |largest, set| {
            if set.len() > largest.len() {
                set
            } else {
                largest
            }
        })
    }
}

/// What a verdict led to.
#[derive(Debug)]
pub enum Outcome {
    /// More verdicts are needed.
    Pending,
    /// Enough critics agree; the case is closed.
    Settled {
        /// The case.
        case: Box<Case>,
        /// Accept or reject, as the agreeing verdicts have it.
        decision: Decision,
        /// The agreeing verdicts.
        verdicts: Vec<Signed<Verdict>>,
        /// Critics who said otherwise.
        dissenters: Vec<PeerId>,
    },
    /// As many critics as allowed were asked and too few agree; the case is closed.
    Undecided(Box<Case>),
}

/// Why a verdict was not recorded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VerdictRefusal {
    /// Settled before, or never opened.
    #[error("no group {0} is with the critics: it was settled, or another critic answered first")]
    NoSuchCase(GroupHash),
    /// Nobody asked this critic.
    #[error("group {0} was not given to this critic")]
    NotAsked(GroupHash),
    /// The group was drawn for an audit and the verdict says that none was made.
    #[error("group {0} was drawn for an audit, the verdict has none")]
    NotAudited(GroupHash),
    /// The verdict names another lease, ticket or number of rollouts.
    #[error("the verdict does not fit group {0}")]
    Misfit(GroupHash),
}

/// The cases, oldest ticket first.
#[derive(Debug)]
pub struct Court {
    config: CritiqueConfig,
    cases: BTreeMap<TicketId, Case>,
}

impl Court {
    /// No cases.
    pub fn new(config: CritiqueConfig) -> Self {
        Self {
            config,
            cases: BTreeMap::new(),
        }
    }

    /// Takes in a group.
    pub fn open(&mut self, ticket: TicketId, case: Case) {
        self.cases.entry(ticket).or_insert(case);
    }

    /// Drops a case whose ticket ended otherwise.
    pub fn close(&mut self, ticket: TicketId) -> Option<Case> {
        self.cases.remove(&ticket)
    }

    /// Groups with the critics.
    pub fn len(&self) -> usize {
        self.cases.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.cases.is_empty()
    }

    /// The group with this name.
    pub fn case_of(&self, ticket: TicketId) -> Option<&Case> {
        self.cases.get(&ticket)
    }

    /// A critic asks for groups, so it holds none: what it was given and has not judged was lost on the way, or with an
    /// earlier life of it, and need not wait for its time to be over.
    pub fn asks_again(&mut self, critic: &PeerId) {
        for case in self.cases.values_mut() {
            case.asked.remove(critic);
        }
    }

    /// Gives `critic`, who holds the versions `held`, the oldest group that needs one more verdict.
    pub fn assign(
        &mut self,
        critic: PeerId,
        held: &[VersionRef],
        now: UnixMillis,
    ) -> Option<(TicketId, &Case, UnixMillis)> {
        let config = self.config;
        let fits = |case: &Case| {
            let pending = case
                .asked
                .values()
                .filter(|deadline| **deadline > now)
                .count();
            let asked_now = case
                .asked
                .get(&critic)
                .is_some_and(|deadline| *deadline > now);
            case.author != critic
                && !case.judged_by(&critic)
                && !asked_now
                && pending < missing(case, &config)
                && (!case.audit || case.versions.iter().all(|version| held.contains(version)))
        };
        let ticket = self
            .cases
            .iter()
            .find(|(_, case)| fits(case))
            .map(|(ticket, _)| *ticket)?;
        let deadline = now.plus(config.lease_ms);
        let case = self.cases.get_mut(&ticket)?;
        case.asked.insert(critic, deadline);
        Some((ticket, case, deadline))
    }

    /// Takes in a verdict.
    ///
    /// # Errors
    /// When it answers no open case of this critic.
    pub fn record(&mut self, verdict: Signed<Verdict>) -> Result<Outcome, VerdictRefusal> {
        let ticket = verdict.body.ticket;
        let group = verdict.body.group;
        let case = self
            .cases
            .get_mut(&ticket)
            .filter(|case| case.group == group)
            .ok_or(VerdictRefusal::NoSuchCase(group))?;
        if case.judged_by(&verdict.author) {
            return Ok(Outcome::Pending);
        }
        if case.asked.remove(&verdict.author).is_none() {
            return Err(VerdictRefusal::NotAsked(group));
        }
        let skipped = case.audit && !verdict.body.audited;
        if skipped && verdict.body.decision != Decision::Reject {
            return Err(VerdictRefusal::NotAudited(group));
        }
        case.verdicts.push(verdict);
        Ok(self.settle(ticket))
    }

    /// The cases whose group is of a version before `oldest`, with that version.
    pub fn older_than(&self, oldest: PolicyVersion) -> Vec<(TicketId, PolicyVersion)> {
        let versions = self
            .cases
            .iter()
            .filter_map(|(ticket, case)| Some((*ticket, case.versions.first()?.version)));
        versions.filter(|(_, version)| *version < oldest).collect()
    }

    fn settle(&mut self, ticket: TicketId) -> Outcome {
        let config = self.config;
        let Some(case) = self.cases.get(&ticket) else {
            return Outcome::Pending;
        };
        let agreeing: Vec<Signed<Verdict>> = case.agreement().into_iter().cloned().collect();
        let decision = agreeing.first().map(|verdict| verdict.body.decision);
        let settled =
            agreeing.len() >= config.verdicts as usize && decision != Some(Decision::Grey);
        if !settled && case.verdicts.len() < config.critics_max as usize {
            return Outcome::Pending;
        }
        let Some(case) = self.cases.remove(&ticket) else {
            return Outcome::Pending;
        };
        let case = Box::new(case);
        let Some(decision) = decision.filter(|_| settled) else {
            return Outcome::Undecided(case);
        };
        let agrees = |peer: &PeerId| agreeing.iter().any(|verdict| verdict.author == *peer);
        let dissenters = case
            .verdicts
            .iter()
            .map(|v| v.author)
            .filter(|peer| !agrees(peer))
            .collect();
        Outcome::Settled {
            case,
            decision,
            verdicts: agreeing,
            dissenters,
        }
    }
}

/// How many more verdicts the case needs, at best.
fn missing(case: &Case, config: &CritiqueConfig) -> usize {
    let best = case.agreement();
    let grey = best
        .first()
        .is_some_and(|verdict| verdict.body.decision == Decision::Grey);
    let agreeing = if grey { 0 } else { best.len() };
    let room = (config.critics_max as usize).saturating_sub(case.verdicts.len());
    (config.verdicts as usize)
        .saturating_sub(agreeing)
        .min(room)
}

#[cfg(test)]
mod tests {
    use super::*;
    use muster_protocol::envelope::seal;
    use muster_protocol::id::{LeaseId, RunId, StateRoot};
    use muster_protocol::identity::{Identity, MachineSeed};
    use muster_protocol::message::verdict::{Finding, RolloutReward};

    const TICKET: TicketId = TicketId(1);
    const NOW: UnixMillis = UnixMillis(0);

    fn critic(n: u8) -> Identity {
        Identity::from_seed(&MachineSeed::from_bytes([n; 32]))
    }

    fn version() -> VersionRef {
        VersionRef {
            version: PolicyVersion(2),
            root: StateRoot([2; 32]),
        }
    }

    fn court(verdicts: u32, audit: bool) -> Court {
        let mut court = Court::new(CritiqueConfig {
            verdicts,
            ..Default::default()
        });
        let envelopes = (Bytes::new(), Bytes::new());
        let group = GroupHash([1; 32]);
        court.open(
            TICKET,
            Case::new(
                group,
                critic(9).peer_id(),
                vec![version()],
                0,
                audit,
                envelopes,
            ),
        );
        court
    }

    fn verdict(n: u8, reward: f32, decision: Decision) -> Signed<Verdict> {
        let findings = match decision {
            Decision::Accept => Vec::new(),
            Decision::Grey | Decision::Reject => {
                vec![Finding::Mismatch {
                    problem: "bad".to_owned(),
                }]
            }
        };
        let body = Verdict {
            group: GroupHash([1; 32]),
            lease: LeaseId([0; 16]),
            ticket: TICKET,
            audited: true,
            rewards: vec![RolloutReward {
                total: reward,
                components: Vec::new(),
            }],
            findings,
            decision,
        };
        let run: RunId = "r".parse().unwrap();
        seal(&critic(n), &run, 0, body).unwrap()
    }

    fn judge(court: &mut Court, n: u8, reward: f32, decision: Decision) -> Outcome {
        assert!(
            court
                .assign(critic(n).peer_id(), &[version()], NOW)
                .is_some(),
            "critic {n}"
        );
        court.record(verdict(n, reward, decision)).unwrap()
    }

    #[test]
    fn one_verdict_settles_a_case_where_one_is_asked_for() {
        let outcome = judge(&mut court(1, false), 1, 1.0, Decision::Accept);
        assert!(matches!(
            outcome,
            Outcome::Settled {
                decision: Decision::Accept,
                ..
            }
        ));
    }

    #[test]
    fn an_inflated_reward_is_outvoted_and_its_critic_named() {
        let mut court = court(2, false);
        assert!(matches!(
            judge(&mut court, 1, 5.0, Decision::Accept),
            Outcome::Pending
        ));
        assert!(matches!(
            judge(&mut court, 2, 1.0, Decision::Accept),
            Outcome::Pending
        ));
        let Outcome::Settled {
            verdicts,
            dissenters,
            ..
        } = judge(&mut court, 3, 1.0, Decision::Accept)
        else {
            panic!("not settled")
        };
        assert_eq!(dissenters, [critic(1).peer_id()]);
        assert!(
            verdicts
                .iter()
                .all(|verdict| verdict.body.rewards[0].total == 1.0)
        );
    }

    #[test]
    fn critics_who_never_agree_leave_a_group_undecided() {
        let mut court = court(2, false);
        for n in 1..5 {
            assert!(matches!(
                judge(&mut court, n, f32::from(n), Decision::Accept),
                Outcome::Pending
            ));
        }
        let outcome = judge(&mut court, 5, 5.0, Decision::Accept);
        assert!(matches!(outcome, Outcome::Undecided(_)));
    }

    #[test]
    fn an_author_never_judges_its_own_group_and_nobody_judges_twice() {
        let mut court = court(2, false);
        assert!(
            court
                .assign(critic(9).peer_id(), &[version()], NOW)
                .is_none()
        );
        judge(&mut court, 1, 1.0, Decision::Accept);
        assert!(
            court
                .assign(critic(1).peer_id(), &[version()], NOW)
                .is_none()
        );
    }

    #[test]
    fn an_audit_goes_to_a_critic_who_holds_the_version_and_must_be_made() {
        let mut court = court(1, true);
        assert!(court.assign(critic(1).peer_id(), &[], NOW).is_none());
        assert!(
            court
                .assign(critic(1).peer_id(), &[version()], NOW)
                .is_some()
        );
        let mut lazy = verdict(1, 1.0, Decision::Accept);
        lazy.body.audited = false;
        assert!(matches!(
            court.record(lazy),
            Err(VerdictRefusal::NotAudited(_))
        ));
    }

    #[test]
    fn a_verdict_that_nobody_asked_for_is_refused() {
        let refused = court(1, false).record(verdict(1, 1.0, Decision::Accept));
        assert!(matches!(refused, Err(VerdictRefusal::NotAsked(_))));
    }

    #[test]
    fn a_critic_that_asks_again_is_given_what_it_lost() {
        let mut court = court(1, false);
        let one = critic(1).peer_id();
        assert!(court.assign(one, &[], NOW).is_some());
        assert!(
            court.assign(one, &[], NOW).is_none(),
            "not twice in one answer"
        );
        court.asks_again(&one);
        assert!(court.assign(one, &[], NOW).is_some());
    }

    #[test]
    fn a_critic_that_does_not_answer_is_replaced_after_its_time() {
        let mut court = court(1, false);
        assert!(court.assign(critic(1).peer_id(), &[], NOW).is_some());
        assert!(court.assign(critic(2).peer_id(), &[], NOW).is_none());
        assert!(
            court
                .assign(critic(2).peer_id(), &[], UnixMillis(30_000))
                .is_some()
        );
    }
}
