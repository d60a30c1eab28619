//! The members of a simulated swarm. Their keys are generated once, since that takes longer than a run.

use std::sync::OnceLock;

use muster_protocol::credentials::{Member, Roster};
use muster_protocol::identity::{Identity, MachineSeed};
use muster_protocol::subject::Role;

use crate::liar::Lie;

/// Workers that a run may have at once.
pub const WORKERS_MAX: usize = 1_000;
/// Identities that restarted workers may take.
pub const SPARE_IDENTITIES: usize = 200;
pub const CRITICS: usize = 6;
/// One worker in so many lies.
const LIAR_EVERY: usize = 10;

/// A member and its keys.
#[derive(Debug, Clone)]
pub struct SwarmMember {
    pub number: usize,
    pub identity: Identity,
    pub user: String,
}

pub struct Members {
    pub dispatch: SwarmMember,
    pub trainer: SwarmMember,
    pub critics: Vec<SwarmMember>,
    /// Workers, then the spare identities.
    pub workers: Vec<SwarmMember>,
    pub roster: Roster,
}

impl Members {
    /// The lie of a worker; `None` if it is honest.
    pub fn lie(worker: usize) -> Option<Lie> {
        (worker % LIAR_EVERY == 3).then(|| Lie::ALL[worker / LIAR_EVERY % Lie::ALL.len()])
    }
}

/// The members of every run.
pub fn members() -> &'static Members {
    static MEMBERS: OnceLock<Members> = OnceLock::new();
    MEMBERS.get_or_init(|| {
        let mut roster = Roster::default();
        let mut enroll = |role: Role, count: usize| -> Vec<SwarmMember> {
            let numbers = 0..count;
            let member = |number: usize| {
                let mut seed = [role as u8 + 1; 32];
                seed[..8].copy_from_slice(&(number as u64).to_le_bytes());
                let identity = Identity::from_seed(&MachineSeed::from_bytes(seed));
                let name = format!("{role}-{number}");
                roster.members.push(Member::of(&name, role, &identity));
                let user = identity.login_user();
                SwarmMember {
                    number,
                    identity,
                    user,
                }
            };
            numbers.map(member).collect()
        };
        let dispatch = enroll(Role::Dispatch, 1).remove(0);
        let trainer = enroll(Role::Trainer, 1).remove(0);
        let critics = enroll(Role::Critic, CRITICS);
        let workers = enroll(Role::Worker, WORKERS_MAX + SPARE_IDENTITIES);
        Members {
            dispatch,
            trainer,
            critics,
            workers,
            roster,
        }
    })
}
