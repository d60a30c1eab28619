//! Chooses how many rows a worker decodes together, from timings of short decodes. Pure: timings in, a number out.
//!
//! More rows use the processor better, up to a point, and each row takes longer. A worker takes the fewest rows that reach
//! almost the best speed, and no more than it can answer in time and has memory for.

/// Share of the best speed that counts as the best: timings vary by as much from one moment to the next.
const NEARLY: f64 = 0.9;

/// How long a step over some rows took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Timing {
    pub rows: u32,
    /// Time of one step, which draws a token for each row.
    pub step_seconds: f64,
}

impl Timing {
    fn tokens_per_second(&self) -> f64 {
        f64::from(self.rows) / self.step_seconds.max(f64::MIN_POSITIVE)
    }
}

/// The limits of a worker.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bounds {
    /// Rows, as configured.
    pub rows_max: u32,
    /// Rows of full length that the memory for keys and values holds.
    pub rows_in_memory: u32,
    /// Tokens of the longest answer.
    pub tokens_max: u32,
    /// Time in which an answer is to be complete.
    pub answer_seconds: f64,
}

/// The number of rows to decode together, at least 1.
pub fn rows(timings: &[Timing], bounds: &Bounds) -> u32 {
    let in_time = |timing: &&Timing| {
        f64::from(bounds.tokens_max) * timing.step_seconds <= bounds.answer_seconds
    };
    let fitting: Vec<&Timing> = timings.iter().filter(in_time).collect();
    let speeds = fitting.iter().map(|timing| timing.tokens_per_second());
    let best = speeds.fold(0.0, f64::max);
    let enough = fitting
        .iter()
        .filter(|timing| timing.tokens_per_second() >= NEARLY * best)
        .map(|timing| timing.rows);
    let rows = enough.min().unwrap_or(1);
    rows.min(bounds.rows_max).min(bounds.rows_in_memory).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds {
        rows_max: 64,
        rows_in_memory: 1_000,
        tokens_max: 100,
        answer_seconds: 10.0,
    };

    fn timings(seconds: [f64; 4]) -> Vec<Timing> {
        let rows = [1, 8, 32, 64];
        rows.into_iter()
            .zip(seconds)
            .map(|(rows, step_seconds)| Timing { rows, step_seconds })
            .collect()
    }

    #[test]
    fn rows_that_cost_nothing_are_taken_and_rows_that_gain_nothing_are_not() {
        assert_eq!(rows(&timings([0.01, 0.01, 0.01, 0.01]), &BOUNDS), 64);
        assert_eq!(rows(&timings([0.01, 0.01, 0.04, 0.08]), &BOUNDS), 8);
    }

    #[test]
    fn a_slow_machine_takes_no_more_than_it_answers_in_time() {
        let slow = timings([0.05, 0.06, 0.11, 0.2]);
        assert_eq!(rows(&slow, &BOUNDS), 8);
        assert_eq!(rows(&timings([1.0, 1.0, 1.0, 1.0]), &BOUNDS), 1);
        assert_eq!(rows(&[], &BOUNDS), 1);
    }

    #[test]
    fn configuration_and_memory_bound_the_rows() {
        let fast = timings([0.01, 0.01, 0.01, 0.01]);
        let few = Bounds {
            rows_max: 16,
            ..BOUNDS
        };
        assert_eq!(rows(&fast, &few), 16);
        let small = Bounds {
            rows_in_memory: 0,
            ..BOUNDS
        };
        assert_eq!(rows(&fast, &small), 1);
    }
}
