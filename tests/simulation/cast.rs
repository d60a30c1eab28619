//! Who takes part: identities made once, since keys cost more than a run's messages.

use std::sync::OnceLock;

use muster_protocol::credentials::{Member, Roster};
use muster_protocol::identity::{Identity, MachineSeed};
use muster_protocol::subject::Role;

use crate::liar::Lie;

/// Workers that a run may have at once.
pub const WORKERS_MAX: usize = 1_000;
/// Identities that dead workers come back under.
pub const SPARES: usize = 200;
pub const CRITICS: usize = 6;
/// Every so many-th worker lies.
const LIAR_EVERY: usize = 10;

/// A member and its keys.
#[derive(Debug, Clone)]
pub struct Player {
    pub number: usize,
    pub identity: Identity,
    pub user: String,
}

pub struct Cast {
    pub dispatch: Player,
    pub trainer: Player,
    pub critics: Vec<Player>,
    /// Workers, then their spares.
    pub workers: Vec<Player>,
    pub roster: Roster,
}

impl Cast {
    /// The lie that a worker lives by, if it does.
    pub fn lie(worker: usize) -> Option<Lie> {
        (worker % LIAR_EVERY == 3).then(|| Lie::ALL[worker / LIAR_EVERY % Lie::ALL.len()])
    }
}

/// The cast of every run.
pub fn cast() -> &'static Cast {
    static CAST: OnceLock<Cast> = OnceLock::new();
    CAST.get_or_init(|| {
        let mut roster = Roster::default();
        let mut players = |role: Role, count: usize| -> Vec<Player> {
            let numbers = 0..count;
            let player = |number: usize| {
                let mut seed = [role as u8 + 1; 32];
                seed[..8].copy_from_slice(&(number as u64).to_le_bytes());
                let identity = Identity::from_seed(&MachineSeed::from_bytes(seed));
                let name = format!("{role}-{number}");
                roster.members.push(Member::of(&name, role, &identity));
                let user = identity.login_user();
                Player {
                    number,
                    identity,
                    user,
                }
            };
            numbers.map(player).collect()
        };
        let dispatch = players(Role::Dispatch, 1).remove(0);
        let trainer = players(Role::Trainer, 1).remove(0);
        let critics = players(Role::Critic, CRITICS);
        let workers = players(Role::Worker, WORKERS_MAX + SPARES);
        Cast {
            dispatch,
            trainer,
            critics,
            workers,
            roster,
        }
    })
}
