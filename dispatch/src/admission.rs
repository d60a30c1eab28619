//! Whether a submitted group answers its lease, as far as can be told without a model: worker, lease, version, prompt,
//! lengths, endings. What passes goes to the critics.

use muster_protocol::id::{PeerId, PolicyVersion};
use muster_protocol::message::group::{FinishReason, Group, Rollout, Segment};
use muster_protocol::message::lease::{Lease, WeightsRule};
use muster_protocol::message::ticket::SamplingRules;

/// Why a group does not answer its lease.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Mismatch {
    #[error("the group is signed by {author}, its lease belongs to {lessee}")]
    NotTheLessee { author: PeerId, lessee: PeerId },
    /// A field differs from what the lease says.
    #[error("the group's {field} is not its lease's")]
    Differs { field: &'static str },
    #[error("the group has {found} rollouts, its lease asks for {wanted}")]
    Count { found: usize, wanted: u32 },
    /// A rollout that does not follow the sampling rules.
    #[error("rollout {rollout} {problem}")]
    Rollout { rollout: usize, problem: String },
}

/// Checks `group`, signed by `author`, against its lease. `vocabulary` bounds the token ids.
///
/// # Errors
/// The first difference found.
pub(crate) fn check(
    group: &Group,
    author: &PeerId,
    lease: &Lease,
    vocabulary: u32,
) -> Result<(), Mismatch> {
    if *author != lease.worker {
        return Err(Mismatch::NotTheLessee {
            author: *author,
            lessee: lease.worker,
        });
    }
    let fields = [
        ("lease", group.lease == lease.id),
        ("ticket", group.ticket == lease.ticket.id),
        ("version", group.version == lease.version),
        ("numeric class", group.class == lease.class),
    ];
    if let Some((field, _)) = fields.into_iter().find(|(_, same)| !same) {
        return Err(Mismatch::Differs { field });
    }
    if group.rollouts.len() != lease.rollouts.count as usize {
        let found = group.rollouts.len();
        return Err(Mismatch::Count {
            found,
            wanted: lease.rollouts.count,
        });
    }
    for (number, rollout) in group.rollouts.iter().enumerate() {
        check_rollout(rollout, lease, vocabulary).map_err(|problem| Mismatch::Rollout {
            rollout: number,
            problem,
        })?;
    }
    Ok(())
}

fn check_rollout(rollout: &Rollout, lease: &Lease, vocabulary: u32) -> Result<(), String> {
    let [Segment::Prompt { tokens: prompt }, answer @ ..] = rollout.segments.as_slice() else {
        return Err("is not one prompt and one answer".to_owned());
    };
    let tokens = check_segments(answer, lease)?;
    if *prompt != lease.ticket.prompt {
        return Err("does not begin with the ticket's prompt".to_owned());
    }
    if let Some(token) = tokens.iter().find(|token| **token >= vocabulary) {
        return Err(format!(
            "holds token {token}, outside the vocabulary of {vocabulary}"
        ));
    }
    check_ending(&tokens, rollout.finish, &lease.ticket.sampling)
}

/// An answer is one segment of the lease's version or, where the lease lets weights change in flight, several whose
/// versions rise from there. Returns its tokens.
fn check_segments(answer: &[Segment], lease: &Lease) -> Result<Vec<u32>, String> {
    let leased = lease.version.version;
    let (mut drawn, mut newest) = (Vec::new(), None::<PolicyVersion>);
    for segment in answer {
        let Segment::Policy {
            tokens, version, ..
        } = segment
        else {
            return Err("is not one prompt and one answer".to_owned());
        };
        if lease.weights == WeightsRule::Drain && *version != leased {
            return Err(format!("was drawn under version {version}, not {leased}"));
        }
        if tokens.is_empty() || *version < leased || newest.is_some_and(|newest| *version <= newest)
        {
            return Err(format!(
                "has {} tokens of version {version} after version {}, where versions must rise",
                tokens.len(),
                newest.unwrap_or(leased)
            ));
        }
        newest = Some(*version);
        drawn.extend_from_slice(tokens);
    }
    match newest {
        Some(_) => Ok(drawn),
        None => Err("is not one prompt and one answer".to_owned()),
    }
}

/// An answer ends at its first stop id, with the token that completes a stop string, or at the longest length. Where
/// strings are complete only a critic can tell, since it knows the tokens' texts.
fn check_ending(tokens: &[u32], finish: FinishReason, rules: &SamplingRules) -> Result<(), String> {
    let length_max = rules.tokens_max as usize;
    if tokens.len() > length_max {
        return Err(format!(
            "has {} tokens, at most {length_max} are allowed",
            tokens.len()
        ));
    }
    let first_stop = tokens
        .iter()
        .position(|token| rules.stop_ids.contains(token));
    match (first_stop, finish) {
        (Some(at), FinishReason::Stop) if at + 1 == tokens.len() => Ok(()),
        (None, FinishReason::Length) if tokens.len() == length_max => Ok(()),
        (None, FinishReason::StopString(string))
            if usize::from(string) < rules.stop_strings.len() =>
        {
            Ok(())
        }
        (None, FinishReason::StopString(string)) => Err(format!(
            "claims stop string {string}, the lease has {}",
            rules.stop_strings.len()
        )),
        (Some(at), FinishReason::StopString(_)) => Err(format!(
            "claims a stop string but holds a stop id at token {at}"
        )),
        (Some(at), FinishReason::Stop) => Err(format!("goes on after its stop id at token {at}")),
        (None, FinishReason::Stop) => Err("claims a stop id that it does not end with".to_owned()),
        (Some(_), FinishReason::Length) => {
            Err("claims the longest length but holds a stop id".to_owned())
        }
        (None, FinishReason::Length) => Err(format!(
            "ends after {} tokens without a stop id",
            tokens.len()
        )),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use muster_protocol::id::{
        DescriptorHash, LeaseId, PolicyVersion, StateRoot, TicketId, UnixMillis,
    };
    use muster_protocol::message::lease::{NumericClass, RolloutRange};
    use muster_protocol::message::ticket::Ticket;
    use muster_protocol::message::version::VersionRef;

    const WORKER: PeerId = PeerId([1; 32]);
    const STOP: u32 = 9;

    fn lease() -> Lease {
        lease_of(TicketId(7), WORKER, 1)
    }

    /// A lease of version 3 for a group of `count` rollouts, with the prompt `[4, 5]`.
    pub(crate) fn lease_of(ticket: TicketId, worker: PeerId, count: u32) -> Lease {
        let sampling = SamplingRules {
            temperature: 1.0,
            tokens_max: 3,
            stop_ids: vec![STOP],
            stop_strings: Vec::new(),
        };
        let ticket = Ticket {
            id: ticket,
            descriptor: DescriptorHash([0; 32]),
            item: 0,
            prompt: vec![4, 5],
            group_size: count,
            sampling,
            oldest_version: PolicyVersion(0),
            deadline: UnixMillis(0),
        };
        Lease {
            id: LeaseId([2; 16]),
            ticket,
            worker,
            version: VersionRef {
                version: PolicyVersion(3),
                root: StateRoot([3; 32]),
            },
            weights: WeightsRule::Drain,
            class: NumericClass::F32Cpu,
            rollouts: RolloutRange { first: 0, count },
            epoch: 0,
            submission: 0,
            nonce: [0; 32],
            seed: [0; 32],
            deadline: UnixMillis(0),
        }
    }

    fn group(tokens: &[u32], finish: FinishReason) -> Group {
        let lease = lease();
        let rollout = Rollout::single_turn(
            lease.ticket.prompt.clone(),
            tokens.to_vec(),
            lease.version.version,
            vec![-1.0; tokens.len()],
            finish,
        );
        Group {
            lease: lease.id,
            ticket: lease.ticket.id,
            version: lease.version,
            class: lease.class,
            rollouts: vec![rollout],
            commitments: Vec::new(),
        }
    }

    fn verdict(group: &Group) -> Result<(), Mismatch> {
        check(group, &WORKER, &lease(), 32)
    }

    #[test]
    fn the_honest_group_is_admitted() {
        assert_eq!(verdict(&group(&[1, STOP], FinishReason::Stop)), Ok(()));
        assert_eq!(verdict(&group(&[1, 2, 3], FinishReason::Length)), Ok(()));
    }

    #[test]
    fn every_dishonest_ending_is_refused() {
        for (tokens, finish) in [
            (&[1, 2][..], FinishReason::Stop),
            (&[1, 2][..], FinishReason::Length),
            (&[STOP, 2][..], FinishReason::Stop),
            (&[1, 2, STOP][..], FinishReason::Length),
            (&[1, 2, 3, STOP][..], FinishReason::Stop),
        ] {
            let refused = verdict(&group(tokens, finish));
            assert!(
                matches!(refused, Err(Mismatch::Rollout { .. })),
                "{tokens:?} {finish:?}"
            );
        }
    }

    #[test]
    fn another_version_prompt_count_or_author_is_refused() {
        let honest = group(&[1, STOP], FinishReason::Stop);
        let mut other = honest.clone();
        other.version.version = PolicyVersion(4);
        assert_eq!(verdict(&other), Err(Mismatch::Differs { field: "version" }));
        let mut other = honest.clone();
        other.rollouts.push(honest.rollouts[0].clone());
        assert_eq!(
            verdict(&other),
            Err(Mismatch::Count {
                found: 2,
                wanted: 1
            })
        );
        let mut other = honest.clone();
        other.rollouts[0].segments[0] = Segment::Prompt { tokens: vec![4] };
        assert!(verdict(&other).is_err());
        let stranger = PeerId([8; 32]);
        let refused = check(&honest, &stranger, &lease(), 32);
        assert!(matches!(refused, Err(Mismatch::NotTheLessee { .. })));
    }

    #[test]
    fn an_answer_may_go_on_under_newer_weights_only_where_its_lease_says_so() {
        let of_versions = |spans: &[(u64, usize)]| {
            let spans: Vec<(PolicyVersion, usize)> = spans
                .iter()
                .map(|(version, count)| (PolicyVersion(*version), *count))
                .collect();
            let mut group = group(&[1, 2, 4], FinishReason::Length);
            group.rollouts = vec![Rollout::of_versions(
                vec![4, 5],
                &[1, 2, 4],
                &[-1.0; 3],
                &spans,
                FinishReason::Length,
            )];
            group
        };
        let in_flight = Lease {
            weights: WeightsRule::InFlight,
            ..lease()
        };
        let verdict_in_flight = |group: &Group| check(group, &WORKER, &in_flight, 32);
        for honest in [
            &[(3, 3)][..],
            &[(3, 1), (4, 2)],
            &[(4, 3)],
            &[(3, 1), (4, 1), (6, 1)],
        ] {
            assert_eq!(verdict_in_flight(&of_versions(honest)), Ok(()));
        }
        assert!(verdict(&of_versions(&[(3, 1), (4, 2)])).is_err());
        for dishonest in [
            &[(4, 1), (3, 2)][..],
            &[(3, 1), (3, 2)],
            &[(2, 3)],
            &[(3, 3), (4, 0)],
            &[],
        ] {
            assert!(
                verdict_in_flight(&of_versions(dishonest)).is_err(),
                "{dishonest:?}"
            );
        }
    }

    #[test]
    fn a_stop_string_that_the_lease_lacks_is_refused() {
        let mut with_string = lease();
        with_string.ticket.sampling.stop_strings = vec!["ab".to_owned()];
        let verdict = |tokens, string| {
            let group = group(tokens, FinishReason::StopString(string));
            check(&group, &WORKER, &with_string, 32)
        };
        assert_eq!(verdict(&[1, 2], 0), Ok(()));
        assert!(verdict(&[1, 2], 1).is_err());
        assert!(verdict(&[1, STOP], 0).is_err());
    }

    #[test]
    fn a_token_outside_the_vocabulary_is_refused() {
        let refused = verdict(&group(&[32, STOP], FinishReason::Stop)).unwrap_err();
        assert!(
            refused
                .to_string()
                .contains("token 32, outside the vocabulary of 32")
        );
    }
}
