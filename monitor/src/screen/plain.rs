//! Chooses the lines of plain output, to a log file or a pipe. Pure: the caller gives the time. Invariant: all evaluations and
//! restarts are printed, steps and phases at most once per [`PAUSE`].

use std::time::{Duration, Instant};

use super::frame;
use super::status::Status;
use crate::record::{Added, RunRecord};

/// Shortest time between two lines about steps, so that an hour's output stays readable.
const PAUSE: Duration = Duration::from_secs(5);

/// The newest lines printed.
#[derive(Debug, Default)]
pub(super) struct Plain {
    last_step_line: Option<Instant>,
    unsaid_steps: usize,
    phase: String,
    restarts: Vec<(String, u64)>,
}

impl Plain {
    /// The lines to print now.
    pub(super) fn lines(
        &mut self,
        now: Instant,
        added: Added,
        record: &RunRecord,
        status: &Status,
    ) -> Vec<String> {
        let mut lines = self.restart_lines(status);
        let told = record.evals.len().saturating_sub(added.evals);
        lines.extend(record.evals[told..].iter().map(frame::eval_line));
        self.unsaid_steps += added.steps;
        let due = self
            .last_step_line
            .is_none_or(|last| now.saturating_duration_since(last) >= PAUSE);
        if due && self.unsaid_steps > 0 {
            lines.push(frame::step_line(record, status));
            (self.last_step_line, self.unsaid_steps) = (Some(now), 0);
        } else if due && self.phase != status.phase {
            if !status.phase.is_empty() {
                lines.push(status.phase.clone());
                self.last_step_line = Some(now);
            }
            self.phase.clone_from(&status.phase);
        }
        lines
    }

    fn restart_lines(&mut self, status: &Status) -> Vec<String> {
        let known = |name: &str| {
            self.restarts
                .iter()
                .find(|(known, _)| known == name)
                .map_or(0, |(_, number)| *number)
        };
        let more = status
            .processes
            .iter()
            .filter(|process| process.restarts > known(&process.name));
        let lines = more.map(frame::restart_line).collect();
        let restarts = status
            .processes
            .iter()
            .map(|process| (process.name.clone(), process.restarts));
        self.restarts = restarts.collect();
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::super::status::{Process, ProcessState};
    use super::*;

    fn status(phase: &str, restarts: u64) -> Status {
        let worker = Process {
            name: "rollout-1".to_owned(),
            state: ProcessState::Up,
            restarts,
        };
        Status {
            steps_total: Some(140),
            phase: phase.to_owned(),
            processes: vec![worker],
        }
    }

    #[test]
    fn steps_are_told_every_few_seconds_and_evaluations_at_once() {
        let (record, status) = (frame::some_record(), status("", 0));
        let start = Instant::now();
        let mut plain = Plain::default();
        let mut at = |millis, steps, evals| {
            let now = start + Duration::from_millis(millis);
            plain.lines(now, Added { steps, evals }, &record, &status)
        };
        assert!(at(0, 0, 0).is_empty(), "nothing happened");
        assert!(
            at(10, 1, 0)[0].starts_with("step 35/140"),
            "the first step is news"
        );
        assert!(at(600, 1, 0).is_empty(), "the next one can wait");
        let both = at(1_200, 1, 2);
        assert_eq!(both.len(), 2);
        assert!(both[0].contains("at version 20") && both[1].contains("at version 30"));
        assert_eq!(
            at(5_010, 0, 0).len(),
            1,
            "steps that waited are told when their time has come"
        );
        assert!(at(20_000, 0, 0).is_empty(), "silence while nothing happens");
    }

    #[test]
    fn a_phase_is_told_when_it_changes_and_a_restart_always() {
        let record = RunRecord::default();
        let start = Instant::now();
        let mut plain = Plain::default();
        let mut at = |millis, phase, restarts| {
            let now = start + Duration::from_millis(millis);
            plain.lines(now, Added::default(), &record, &status(phase, restarts))
        };
        assert_eq!(at(0, "warm-up: 0 steps", 0), ["warm-up: 0 steps"]);
        assert!(at(100, "warm-up: 5 steps", 0).is_empty());
        assert_eq!(
            at(200, "warm-up: 9 steps", 1),
            ["rollout-1 ended and was started again (1 restart)"]
        );
        assert_eq!(at(5_000, "warm-up: 50 steps", 1), ["warm-up: 50 steps"]);
        assert!(at(10_000, "", 1).is_empty());
    }
}
