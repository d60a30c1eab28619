//! Workers that lie, each in one way. What they send is well-formed, so that only a forward pass can tell.

use async_trait::async_trait;
use rand::Rng;
use rand::rngs::StdRng;

use muster_broadcaster::follower::Held;
use muster_protocol::id::StateRoot;
use muster_protocol::message::group::{Rollout, Segment};
use muster_protocol::message::lease::Lease;
use muster_rollout::answerer::AnswerError;

use crate::in_turn::BatchAnswerer;
use crate::ledger::Ledger;
use crate::table::{Draw, honest, rollout, think};

/// A way to lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lie {
    /// One token is not the one drawn; its log-prob is that of the token sent.
    EditedToken,
    /// Half the temperature: likelier answers.
    Temperature,
    /// The weights before the newest, claimed to be those of the lease.
    StaleWeights,
    /// The draws of an own earlier group.
    Replay,
}

impl Lie {
    pub const ALL: [Lie; 4] = [
        Lie::EditedToken,
        Lie::Temperature,
        Lie::StaleWeights,
        Lie::Replay,
    ];
}

/// A lying worker's model.
pub struct LyingAnswerer {
    pub lie: Lie,
    pub chance: StdRng,
    pub ledger: Ledger,
    /// Roots held: the newest last.
    pub roots: Vec<StateRoot>,
    pub earlier: Option<Vec<Rollout>>,
}

impl LyingAnswerer {
    fn draw(&mut self, lease: &Lease) -> Vec<Rollout> {
        let mut draw = Draw {
            root: &lease.version.root,
            temperature: lease.ticket.sampling.temperature,
            edited: None,
        };
        match self.lie {
            Lie::EditedToken => draw.edited = Some(self.chance.random_range(0..2)),
            Lie::Temperature => draw.temperature *= 0.5,
            Lie::StaleWeights => draw.root = self.roots.first().unwrap_or(&lease.version.root),
            Lie::Replay => return self.replay(lease),
        }
        let bent = self.chance.random_range(0..lease.rollouts.count);
        let numbers = lease.rollouts.first..lease.rollouts.first + lease.rollouts.count;
        let straight = honest(lease);
        let drawn = numbers.map(|number| match self.lie {
            Lie::EditedToken if number != lease.rollouts.first + bent => {
                straight[(number - lease.rollouts.first) as usize].clone()
            }
            _ => rollout(lease, number, &draw),
        });
        drawn.collect()
    }

    /// The first group is honest and remembered; its draws answer every later lease.
    fn replay(&mut self, lease: &Lease) -> Vec<Rollout> {
        let Some(earlier) = &self.earlier else {
            let first = honest(lease);
            self.earlier = Some(first.clone());
            return first;
        };
        let again = earlier.iter().map(|rollout| {
            let mut rollout = rollout.clone();
            for segment in &mut rollout.segments {
                match segment {
                    Segment::Prompt { tokens } => tokens.clone_from(&lease.ticket.prompt),
                    Segment::Policy { version, .. } => *version = lease.version.version,
                    Segment::Environment { .. } => {}
                }
            }
            rollout
        });
        again.collect()
    }
}

#[async_trait]
impl BatchAnswerer for LyingAnswerer {
    async fn adopt(&mut self, held: &Held) -> Result<(), AnswerError> {
        self.roots.push(held.version.body.root);
        if self.roots.len() > 2 {
            self.roots.remove(0);
        }
        Ok(())
    }

    async fn answer(&mut self, leases: &[Lease]) -> Result<Vec<Vec<Rollout>>, AnswerError> {
        self.ledger.leased(leases);
        think(&mut self.chance).await;
        let groups: Vec<Vec<Rollout>> = leases.iter().map(|lease| self.draw(lease)).collect();
        self.ledger.answered(leases, &groups);
        Ok(groups)
    }
}
