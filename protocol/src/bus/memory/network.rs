//! The simulated network: it delays, loses and duplicates messages, all drawn from one seed. And the trace of the messages that
//! moved, by which two runs are compared.

use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The faults of a simulated network.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NetworkFaults {
    /// Shortest and longest delay of one hop; drawn uniformly.
    pub delay: (Duration, Duration),
    /// Share of news, requests and replies that are lost, per hop.
    pub loss: f64,
    /// Share of news, requests and replies that arrive twice.
    pub duplication: f64,
    /// Share of durable calls whose request is lost; the same share of confirmations is lost.
    pub durable_loss: f64,
}

impl Default for NetworkFaults {
    /// A perfect network: it loses no message and takes no time.
    fn default() -> Self {
        Self {
            delay: (Duration::ZERO, Duration::ZERO),
            loss: 0.0,
            duplication: 0.0,
            durable_loss: 0.0,
        }
    }
}

/// The only source of randomness.
#[derive(Debug)]
pub(super) struct Network {
    rng: ChaCha8Rng,
    faults: NetworkFaults,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hop {
    Arrives(Duration),
    Lost,
}

impl Network {
    pub(super) fn new(seed: u64, faults: NetworkFaults) -> Self {
        Self {
            rng: ChaCha8Rng::seed_from_u64(seed),
            faults,
        }
    }

    pub(super) fn set_faults(&mut self, faults: NetworkFaults) {
        self.faults = faults;
    }

    /// The delay of each copy of a message: no copy if it is lost, two if it is duplicated.
    pub(super) fn copies(&mut self) -> Vec<Duration> {
        if self.happens(self.faults.loss) {
            return Vec::new();
        }
        let copies = if self.happens(self.faults.duplication) {
            2
        } else {
            1
        };
        (0..copies).map(|_| self.delay()).collect()
    }

    /// One message of a durable call.
    pub(super) fn durable_hop(&mut self) -> Hop {
        if self.happens(self.faults.durable_loss) {
            return Hop::Lost;
        }
        Hop::Arrives(self.delay())
    }

    /// A number below `count`, to choose the server of a request.
    pub(super) fn choose(&mut self, count: usize) -> usize {
        if count < 2 {
            0
        } else {
            self.rng.random_range(0..count)
        }
    }

    fn delay(&mut self) -> Duration {
        let (shortest, longest) = self.faults.delay;
        if longest <= shortest {
            shortest
        } else {
            self.rng.random_range(shortest..=longest)
        }
    }

    fn happens(&mut self, share: f64) -> bool {
        share > 0.0 && self.rng.random::<f64>() < share
    }
}

/// What happened to a message, as the trace records it.
#[derive(Debug, Clone, Copy)]
pub(super) enum Moved {
    News = 1,
    Request = 2,
    Reply = 3,
    Stored = 4,
    Taken = 5,
    Acked = 6,
    Appended = 7,
}

/// A running BLAKE3 over every message that moved.
#[derive(Debug, Default)]
pub(super) struct Trace {
    hasher: blake3::Hasher,
    line: Vec<u8>,
}

impl Trace {
    /// * `number` — the listener, request or sequence number that the message concerns
    /// * `hash` — of the message's bytes
    /// * `at` — virtual time since the start
    pub(super) fn record(
        &mut self,
        moved: Moved,
        subject: &str,
        number: u64,
        hash: &blake3::Hash,
        at: Duration,
    ) {
        self.line.clear();
        self.line.push(moved as u8);
        self.line
            .extend_from_slice(&(subject.len() as u32).to_le_bytes());
        self.line.extend_from_slice(subject.as_bytes());
        self.line.extend_from_slice(&number.to_le_bytes());
        self.line.extend_from_slice(hash.as_bytes());
        self.line.extend_from_slice(&at.as_nanos().to_le_bytes());
        self.hasher.update(&self.line);
    }

    pub(super) fn hash(&self) -> blake3::Hash {
        self.hasher.finalize()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shares_of_lost_and_doubled_messages_are_the_configured_ones() {
        let faults = NetworkFaults {
            loss: 0.05,
            duplication: 0.1,
            ..NetworkFaults::default()
        };
        let mut network = Network::new(7, faults);
        let mut counts = [0u32; 3];
        for _ in 0..100_000 {
            counts[network.copies().len()] += 1;
        }
        assert!((4_700..5_300).contains(&counts[0]), "{counts:?}");
        assert!((9_100..9_900).contains(&counts[2]), "{counts:?}");
    }

    #[test]
    fn delays_stay_between_their_bounds() {
        let delay = (Duration::from_millis(2), Duration::from_millis(5));
        let mut network = Network::new(
            7,
            NetworkFaults {
                delay,
                ..NetworkFaults::default()
            },
        );
        for _ in 0..1_000 {
            assert!(
                network
                    .copies()
                    .iter()
                    .all(|drawn| (delay.0..=delay.1).contains(drawn))
            );
        }
    }
}
