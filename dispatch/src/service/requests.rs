//! What members ask of dispatch and what they are told.
//!
//! Requests that came together are decided together: what they store goes to the bus at once, and none is answered before
//! all of it is durable. A group costs a round trip to the server then only when it comes alone.

use bytes::Bytes;
use futures_util::future::join_all;
use serde_bytes::ByteBuf;
use tracing::{debug, info, warn};

use muster_protocol::bus::{BusError, Request};
use muster_protocol::credentials::Member;
use muster_protocol::envelope::{EnvelopeError, Signed, open};
use muster_protocol::id::{ContentHash, GroupHash, PeerId, TicketId, UnixMillis};
use muster_protocol::life;
use muster_protocol::limits::{GROUP_BYTES_MAX, TEXT_BYTES_MAX};
use muster_protocol::message::ask::{Ask, LEASES_MAX, Reply, WaitReason};
use muster_protocol::message::control::Phase;
use muster_protocol::message::critique::{Admitted, CritiqueLease, Joined};
use muster_protocol::message::fate::Fate;
use muster_protocol::message::group::Group;
use muster_protocol::message::lease::{Lease, NumericClass, class_names};
use muster_protocol::message::verdict::{Decision, Verdict};
use muster_protocol::message::version::VersionRef;
use muster_protocol::subject::Queue;

use super::outgoing::Outgoing;
use super::{DispatchError, DispatchService, Submission};
use crate::reviews::{PendingReview, ReviewOutcome};
use crate::state::{Admission, fate_of};
use crate::waiting::Wait;

/// How long a member waits when the bus did not take what its request would have stored.
const BUS_RETRY_MS: u64 = 500;

/// What becomes of a request.
enum Decided {
    /// This is said.
    Reply(Reply),
    /// The group is stored first; then it is accepted.
    Store {
        /// Its key in the intake queue.
        key: String,
        /// As it is stored.
        admitted: Bytes,
        submission: Box<Submission>,
    },
}

impl DispatchService {
    /// Decides requests in their order, makes durable what they decide, then answers all.
    pub(super) async fn on_requests(
        &mut self,
        requests: Vec<Request>,
    ) -> Result<(), DispatchError> {
        let mut decided = Vec::with_capacity(requests.len());
        for request in &requests {
            decided.push(self.decide(request)?);
        }
        self.flush().await?;
        let answers = self.stored(decided).await?;
        let mut sealed = Vec::with_capacity(answers.len());
        for answer in answers {
            sealed.push(self.seal(answer)?.bytes);
        }
        join_all(
            requests
                .into_iter()
                .zip(sealed)
                .map(|(request, answer)| request.reply(answer)),
        )
        .await;
        Ok(())
    }

    /// Stores the groups among what was decided; returns the answers, in order.
    async fn stored(&mut self, decided: Vec<Decided>) -> Result<Vec<Reply>, DispatchError> {
        let any = decided
            .iter()
            .any(|decided| matches!(decided, Decided::Store { .. }));
        let bus = &self.bus;
        let storing = decided.into_iter().map(|decided| async move {
            match decided {
                Decided::Reply(answer) => Ok((answer, None)),
                Decided::Store {
                    key,
                    admitted,
                    submission,
                } => {
                    let group = GroupHash::of(&submission.group.bytes);
                    let message = ContentHash::of(&admitted);
                    match bus.enqueue(Queue::Intake, &key, admitted).await {
                        Ok(_) => Ok((Reply::Accepted { group }, Some((message, *submission)))),
                        Err(error) => Ok((wait_for_bus(error)?, None)),
                    }
                }
            }
        });
        let stored: Vec<Result<_, DispatchError>> = join_all(storing).await;
        let mut answers = Vec::with_capacity(stored.len());
        for stored in stored {
            let (answer, submission) = stored?;
            answers.push(answer);
            self.opened.extend(submission);
        }
        if any {
            match self.take_intake().await {
                Err(DispatchError::Bus(error)) if error.is_transient() => {
                    debug!(%error, "what was stored is taken in at the next tick");
                }
                Err(error) => return Err(error),
                Ok(_) => {}
            }
            self.opened.clear();
        }
        Ok(answers)
    }

    /// What to say to one request, once what it decides is durable.
    fn decide(&mut self, request: &Request) -> Result<Decided, DispatchError> {
        let ask = match open::<Ask>(request.payload.clone(), &self.run) {
            Ok(ask) => ask,
            Err(EnvelopeError::UpgradeRequired { served, .. }) => {
                return Ok(Decided::Reply(Reply::UpgradeRequired {
                    served: served.to_vec(),
                }));
            }
            Err(error) => return Ok(Decided::Reply(refused(error))),
        };
        let verb = ask.body.verb();
        let Some(member) = self.roster.by_user(request.user()).cloned() else {
            return Ok(Decided::Reply(refused(
                "this user is not a member of the run",
            )));
        };
        if member.peer != ask.author {
            let reason = "the message is signed by another key than the member's";
            return Ok(Decided::Reply(refused(reason)));
        }
        let expected = self.subjects.ask(verb, request.user());
        if expected != request.subject || !member.role.verbs().contains(&verb) {
            let reason = format!("the role {} may not ask for {}", member.role, verb.token());
            return Ok(Decided::Reply(refused(reason)));
        }
        let answer = match ask.body {
            Ask::Submit { lease, group } => return self.on_submit(&member, lease, group),
            Ask::Lease {
                held,
                class,
                rollouts_max,
            } => self.on_lease(&member, held, class, rollouts_max)?,
            Ask::Critique {
                held, groups_max, ..
            } => self.on_critique(&member, &held, groups_max)?,
            Ask::Verdict { verdicts } => self.on_verdicts(&member, verdicts)?,
            Ask::Latest { version } => self.on_latest(version),
            Ask::Peers { mine } => self.on_peers(&member, mine),
            Ask::Receipt { leases } => self.on_receipt(&leases),
            Ask::Control => Reply::Control(self.control.clone()),
            Ask::Descriptor => Reply::Descriptor(ByteBuf::from(self.descriptor.bytes.to_vec())),
            Ask::Deltas { from, mine } => self.on_deltas(&member, from, mine),
        };
        Ok(Decided::Reply(answer))
    }

    fn on_lease(
        &mut self,
        member: &Member,
        held: VersionRef,
        class: NumericClass,
        rollouts_max: u32,
    ) -> Result<Reply, DispatchError> {
        if self.control.phase == Phase::Finished {
            return Ok(Reply::Finished);
        }
        if let Some(classes) = self.core.refuses(class) {
            let classes = class_names(classes);
            let reason = format!("this run takes answers of class {classes}, not {class}");
            return Ok(refused(reason));
        }
        let groups_max = (rollouts_max / self.descriptor.body.group_size.max(1)).max(1) as usize;
        let mut leases = Vec::new();
        while leases.len() < groups_max.min(LEASES_MAX) {
            let nonce = self.nonces.next();
            match self
                .core
                .lease(member.peer, held, class, self.clock.now(), nonce)
            {
                Ok(lease) => {
                    self.metrics.leases_given += 1;
                    debug!(
                        target: life::TARGET,
                        ticket = %lease.ticket.id,
                        lease = %lease.id,
                        worker = member.name,
                        version = %lease.version.version,
                        "leased"
                    );
                    leases.push(ByteBuf::from(self.seal(lease)?.bytes.to_vec()));
                }
                Err(wait) if leases.is_empty() => return Ok(waiting(wait)),
                Err(_) => break,
            }
        }
        Ok(Reply::Leases(leases))
    }

    fn on_submit(
        &mut self,
        member: &Member,
        lease: ByteBuf,
        group: ByteBuf,
    ) -> Result<Decided, DispatchError> {
        let answer = match self.opened_submission(lease, group) {
            Ok((lease, group)) => return self.on_group(member, lease, group),
            Err(reason) => refused(reason),
        };
        Ok(Decided::Reply(answer))
    }

    fn opened_submission(
        &self,
        lease: ByteBuf,
        group: ByteBuf,
    ) -> Result<(Signed<Lease>, Signed<Group>), String> {
        let lease = open::<Lease>(lease.into_vec().into(), &self.run);
        let lease = lease.map_err(|error| error.to_string())?;
        if lease.author != self.identity.peer_id() {
            return Err("the lease is not signed by this run's dispatch".to_owned());
        }
        let group = open::<Group>(group.into_vec().into(), &self.run);
        Ok((lease, group.map_err(|error| error.to_string())?))
    }

    fn on_group(
        &mut self,
        member: &Member,
        lease: Signed<Lease>,
        group: Signed<Group>,
    ) -> Result<Decided, DispatchError> {
        let hash = GroupHash::of(&group.bytes);
        let accepted = Reply::Accepted { group: hash };
        if self.accepted.entries.get(&lease.body.id) == Some(&hash) {
            return Ok(Decided::Reply(accepted));
        }
        let answer = match self.core.admit(&lease.body, &group) {
            Admission::Admit { audit } => {
                self.metrics.groups_admitted += 1;
                debug!(
                    target: life::TARGET,
                    ticket = %lease.body.ticket.id,
                    lease = %lease.body.id,
                    group = %hash.short(),
                    worker = member.name,
                    audit,
                    "admitted"
                );
                let admitted = Admitted {
                    lease: lease.bytes.to_vec(),
                    group: group.bytes.to_vec(),
                    audit,
                    admitted: self.clock.now(),
                };
                return Ok(Decided::Store {
                    key: format!("i-{}", lease.body.id),
                    admitted: self.seal(admitted)?.bytes,
                    submission: Box::new(Submission {
                        lease,
                        group,
                        audit,
                    }),
                });
            }
            Admission::Repeated => accepted,
            Admission::Reject(record) => {
                let reason = record.reason.clone();
                info!(worker = member.name, %reason, "group rejected at admission");
                let fault = self.core.submission_rejected(&lease.body);
                self.log_fault(fault)?;
                self.end_ticket(record)?;
                refused(reason)
            }
            Admission::TooLate(record) => {
                let reason = record.reason.clone();
                self.end_ticket(record)?;
                refused(reason)
            }
            Admission::Refuse(mismatch) => refused(mismatch),
        };
        Ok(Decided::Reply(answer))
    }

    fn on_critique(
        &mut self,
        member: &Member,
        held: &[VersionRef],
        groups_max: u32,
    ) -> Result<Reply, DispatchError> {
        if self.control.phase == Phase::Finished && self.core.reviews().len() == 0 {
            return Ok(Reply::Finished);
        }
        self.core.critic_asks(&member.peer);
        let mut leases = Vec::new();
        let mut bytes = 0;
        while leases.len() < (groups_max.max(1) as usize).min(LEASES_MAX) && bytes < GROUP_BYTES_MAX
        {
            let now = self.clock.now();
            let (ticket, deadline) = match self.core.assign(member.peer, held, now) {
                Ok(assigned) => assigned,
                Err(wait) if leases.is_empty() => return Ok(waiting(wait)),
                Err(_) => break,
            };
            let Some(lease) = self.critique_lease(ticket, member.peer, deadline) else {
                warn!(%ticket, "no gold answer for the ticket's item");
                break;
            };
            self.metrics.reviews_assigned += 1;
            debug!(target: life::TARGET, %ticket, critic = member.name, "given to a critic");
            let signed = self.seal(lease)?;
            bytes += signed.bytes.len();
            if bytes > GROUP_BYTES_MAX && !leases.is_empty() {
                break; // it is given again when this critic's time is over
            }
            leases.push(ByteBuf::from(signed.bytes.to_vec()));
        }
        Ok(Reply::CritiqueLeases(leases))
    }

    fn critique_lease(
        &self,
        ticket: TicketId,
        critic: PeerId,
        deadline: UnixMillis,
    ) -> Option<CritiqueLease> {
        let review = self.core.reviews().get(ticket)?;
        let reference = self.prompts.reference(review.lease.body.ticket.item)?;
        Some(CritiqueLease {
            lease: review.lease.bytes.to_vec(),
            group: review.envelope.to_vec(),
            critic,
            prompt: reference.prompt,
            gold: reference.gold,
            audit: review.audit,
            deadline,
        })
    }

    fn on_verdicts(
        &mut self,
        member: &Member,
        verdicts: Vec<ByteBuf>,
    ) -> Result<Reply, DispatchError> {
        let mut refused = Vec::new();
        for bytes in verdicts {
            match open::<Verdict>(bytes.into_vec().into(), &self.run) {
                Ok(verdict) if verdict.author == member.peer => {
                    refused.extend(self.on_verdict(verdict)?);
                }
                Ok(_) => refused
                    .push("the verdict is signed by another key than the critic's".to_owned()),
                Err(error) => refused.push(error.to_string()),
            }
        }
        Ok(Reply::Recorded { refused })
    }

    /// Records one verdict; returns why it was refused, if it was.
    fn on_verdict(&mut self, verdict: Signed<Verdict>) -> Result<Option<String>, DispatchError> {
        let (ticket, group) = (verdict.body.ticket, verdict.body.group);
        let (critic, decision) = (verdict.author, verdict.body.decision);
        let (outcome, faults) = self.core.record_verdict(verdict);
        for fault in faults {
            self.log_fault(fault)?;
        }
        let refusal = outcome.as_ref().err().map(ToString::to_string);
        match refusal {
            Some(_) => self.metrics.verdicts_refused += 1,
            None => self.metrics.verdicts_recorded += 1,
        }
        debug!(
            target: life::TARGET,
            %ticket,
            group = %group.short(),
            critic = %critic.short(),
            ?decision,
            refusal,
            "verdict"
        );
        match outcome {
            Ok(ReviewOutcome::Pending) | Err(_) => {}
            Ok(ReviewOutcome::Settled {
                review,
                decision,
                verdicts,
                ..
            }) => self.on_settled(&review, decision, &verdicts)?,
            Ok(ReviewOutcome::Undecided(review)) => {
                let reason = "the critics asked did not agree".to_owned();
                self.reject(&review, reason)?;
            }
        }
        Ok(refusal)
    }

    fn on_settled(
        &mut self,
        review: &PendingReview,
        decision: Decision,
        verdicts: &[Signed<Verdict>],
    ) -> Result<(), DispatchError> {
        if decision == Decision::Reject {
            let finding = verdicts
                .iter()
                .find_map(|verdict| verdict.body.findings.first());
            let reason = finding.map_or_else(|| "rejected".to_owned(), ToString::to_string);
            return self.reject(review, reason);
        }
        let joined = Joined {
            lease: review.lease.bytes.to_vec(),
            group: review.envelope.to_vec(),
            verdicts: verdicts
                .iter()
                .map(|v| ByteBuf::from(v.bytes.to_vec()))
                .collect(),
            audited: verdicts.iter().all(|verdict| verdict.body.audited),
        };
        let joined = self.seal(joined)?.bytes;
        let ticket = review.lease.body.ticket.id;
        self.core.ending(ticket);
        self.outgoing.push_back(Outgoing::Ready { ticket, joined });
        Ok(())
    }

    fn reject(&mut self, review: &PendingReview, reason: String) -> Result<(), DispatchError> {
        let shown: String = reason.chars().take(TEXT_BYTES_MAX / 4).collect();
        info!(worker = %review.author().short(), reason = %shown, "group rejected");
        let lease = &review.lease.body;
        let mut record = fate_of(lease, Some(review.group), Fate::Rejected, shown);
        record.audited = review.audit;
        self.end_ticket(record)
    }
}

/// What to say when the bus does not answer for a moment.
fn wait_for_bus(error: BusError) -> Result<Reply, DispatchError> {
    if !error.is_transient() {
        return Err(error.into());
    }
    debug!(%error, "an answer waits for the bus");
    Ok(Reply::Wait {
        retry_ms: BUS_RETRY_MS,
        reason: WaitReason::Starting,
    })
}

fn waiting(wait: Wait) -> Reply {
    Reply::Wait {
        retry_ms: wait.retry_ms,
        reason: wait.reason,
    }
}

pub(super) fn refused(reason: impl ToString) -> Reply {
    Reply::Refused {
        reason: reason
            .to_string()
            .chars()
            .take(TEXT_BYTES_MAX / 4)
            .collect(),
    }
}
