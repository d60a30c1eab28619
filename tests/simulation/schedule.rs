//! When the processes of a simulated run start, die and lose their connection.

use std::collections::BTreeMap;

use rand::Rng;

use crate::members::CRITICS;
use crate::run::Scenario;
use crate::table::seeded_rng;

/// Share of the workers that die during a run.
const CHURN: f64 = 0.2;
/// Milliseconds of a run between which processes die.
const DEATHS: std::ops::Range<u64> = 2_000..45_000;

#[derive(Debug, Clone, Copy)]
pub enum Event {
    Start(Node),
    Die(Node),
    /// The worker with the newest lease dies; without a lease, the worker of this slot.
    BusyWorkerDies {
        slot: usize,
    },
    CutOff(Node),
    Heal(Node),
}

/// A process of the run; workers are numbered by slot, whatever their identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Node {
    Dispatch,
    Trainer,
    Critic(usize),
    Worker(usize),
}

/// Pending events, by time in milliseconds and order of insertion.
#[derive(Default)]
pub struct Schedule {
    events: BTreeMap<(u64, u64), Event>,
    added: u64,
}

impl Schedule {
    pub fn add(&mut self, at_ms: u64, event: Event) {
        self.added += 1;
        self.events.insert((at_ms, self.added), event);
    }

    pub fn next_due(&mut self, now_ms: u64) -> Option<Event> {
        let first = self.events.first_entry()?;
        (first.key().0 <= now_ms).then(|| first.remove())
    }

    /// All processes start within four seconds; later some die and restart, and some critics lose their connection.
    pub fn of(scenario: &Scenario) -> Self {
        let mut rng = seeded_rng(scenario.seed, "schedule", 0);
        let mut schedule = Self::default();
        schedule.add(0, Event::Start(Node::Dispatch));
        schedule.add(100, Event::Start(Node::Trainer));
        for critic in 0..CRITICS {
            schedule.add(
                rng.random_range(0..2_000),
                Event::Start(Node::Critic(critic)),
            );
        }
        for slot in 0..scenario.workers {
            schedule.add(rng.random_range(0..4_000), Event::Start(Node::Worker(slot)));
        }
        for death in 0..(scenario.workers as f64 * CHURN) as usize {
            let slot = rng.random_range(0..scenario.workers);
            let event = match death % 4 {
                0 => Event::BusyWorkerDies { slot },
                _ => Event::Die(Node::Worker(slot)),
            };
            schedule.add(rng.random_range(DEATHS), event);
        }
        for (node, deaths) in [
            (Node::Dispatch, scenario.dispatch_deaths),
            (Node::Trainer, scenario.trainer_deaths),
        ] {
            for _ in 0..deaths {
                schedule.add(rng.random_range(DEATHS), Event::Die(node));
            }
        }
        for _ in 0..2 {
            let critic = Node::Critic(rng.random_range(0..CRITICS));
            schedule.add(rng.random_range(DEATHS), Event::Die(critic));
            let cut = rng.random_range(DEATHS);
            let node = Node::Critic(rng.random_range(0..CRITICS));
            schedule.add(cut, Event::CutOff(node));
            schedule.add(cut + 5_000, Event::Heal(node));
        }
        schedule
    }
}
