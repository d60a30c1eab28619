//! Workers that lie, each in one way. Their groups are well-formed, so that only a forward pass detects the lie.

use async_trait::async_trait;
use rand::Rng;
use rand::rngs::StdRng;

use muster_broadcaster::follower::Held;
use muster_protocol::id::StateRoot;
use muster_protocol::message::group::{Rollout, Segment};
use muster_protocol::message::lease::Lease;
use muster_rollout::answerer::AnswerError;

use crate::in_turn::BatchAnswerer;
use crate::observer::Observer;
use crate::table::{Draw, honest, rollout, spend_answer_time};

/// A way to lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lie {
    /// Replaces one drawn token, with the log-prob of the replacement.
    EditedToken,
    /// Draws at half the temperature, which gives likelier answers.
    Temperature,
    /// Draws with the weights before the newest and claims the version of the lease.
    StaleWeights,
    /// Submits the draws of its first group again.
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
    pub rng: StdRng,
    pub observer: Observer,
    /// Roots of the versions held, the newest last.
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
            Lie::EditedToken => draw.edited = Some(self.rng.random_range(0..2)),
            Lie::Temperature => draw.temperature *= 0.5,
            Lie::StaleWeights => draw.root = self.roots.first().unwrap_or(&lease.version.root),
            Lie::Replay => return self.replay(lease),
        }
        let edited = self.rng.random_range(0..lease.rollouts.count);
        let numbers = lease.rollouts.first..lease.rollouts.first + lease.rollouts.count;
        let unchanged = honest(lease);
        let drawn = numbers.map(|number| match self.lie {
            Lie::EditedToken if number != lease.rollouts.first + edited => {
                unchanged[(number - lease.rollouts.first) as usize].clone()
            }
            _ => rollout(lease, number, &draw),
        });
        drawn.collect()
    }

    /// Answers the first lease honestly, and every later one with the draws of the first.
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
        self.observer.leased(leases);
        spend_answer_time(&mut self.rng).await;
        let groups: Vec<Vec<Rollout>> = leases.iter().map(|lease| self.draw(lease)).collect();
        self.observer.answered(leases, &groups);
        Ok(groups)
    }
}
