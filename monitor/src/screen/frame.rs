//! The text of the display, made of a run's record and its processes. Pure.

use muster_protocol::record::{EvalLine, StepMetrics};

use super::status::{Process, ProcessState, Status};
use crate::record::RunRecord;
use crate::summary;
use crate::text::{duration, percent, plural, short, sparkline};

/// Columns of the progress bar.
const BAR_WIDTH: u64 = 28;
/// Columns of a sparkline.
const SPARKLINE_WIDTH: usize = 32;
/// Newest steps whose mean time gives the remaining time: enough for a steady value, few enough to follow changes.
const PACE_STEPS: usize = 20;

/// The lines of the live display. Their number is constant, so that the display does not jump.
///
/// * `elapsed` — seconds since this process started
pub(super) fn live(record: &RunRecord, status: &Status, elapsed: f64) -> Vec<String> {
    let last = record.steps.last();
    let rejected = record.fates.newest_rejection.as_deref().unwrap_or("none");
    [
        (
            "run",
            format!("{}  {}", record.name, progress(record, status, elapsed)),
        ),
        ("held-out", held_out(record)),
        ("reward", reward(record)),
        ("policy", last.map_or_else(nothing_yet, policy)),
        ("speed", last.map_or_else(nothing_yet, speed)),
        ("groups", summary::fates(record)),
        ("rejected", rejected.to_owned()),
        ("processes", processes(&status.processes)),
    ]
    .into_iter()
    .map(|(label, words)| format!("{label:<10} {words}"))
    .collect()
}

/// A step in one line, for plain output.
pub(super) fn step_line(record: &RunRecord, status: &Status) -> String {
    let Some(last) = record.steps.last() else {
        return status.phase.clone();
    };
    let mut parts = vec![
        steps_of(last.step, status.steps_total),
        format!("reward {}", short(last.reward_mean)),
        format!("staleness {}", short(last.staleness_mean)),
        format!("{} rollout tokens/s", short(last.rollout_tokens_per_second)),
        summary::fates(record),
    ];
    parts.extend(time_left(record, status).map(|left| format!("about {} left", duration(left))));
    parts.join(", ")
}

/// An evaluation in one line.
pub(super) fn eval_line(eval: &EvalLine) -> String {
    format!(
        "held-out accuracy {} at version {} ({}, {} s)",
        percent(eval.accuracy),
        eval.policy_version,
        plural(eval.samples, "prompt"),
        short(eval.seconds)
    )
}

/// A restart of a process in one line.
pub(super) fn restart_line(process: &Process) -> String {
    format!(
        "{} ended and was started again ({})",
        process.name,
        plural(process.restarts, "restart")
    )
}

fn nothing_yet() -> String {
    "–".to_owned()
}

fn steps_of(step: u64, total: Option<u64>) -> String {
    match total {
        Some(total) => format!("step {step}/{total}"),
        None => format!("step {step}"),
    }
}

fn progress(record: &RunRecord, status: &Status, elapsed: f64) -> String {
    let taken = record.steps_taken();
    let mut parts = vec![steps_of(taken, status.steps_total)];
    if let Some(total) = status.steps_total {
        debug_assert!(total > 0, "a run takes at least one step");
        let done = taken.min(total);
        let filled = (done as f64 / total as f64 * BAR_WIDTH as f64) as usize;
        let bar = "━".repeat(filled) + &"─".repeat(BAR_WIDTH as usize - filled);
        parts.push(bar);
    }
    parts.push(format!("{} elapsed", duration(elapsed)));
    parts.extend(time_left(record, status).map(|left| format!("about {} left", duration(left))));
    if !status.phase.is_empty() {
        parts.push(status.phase.clone());
    }
    parts.join("  ")
}

/// Seconds until the last step at the pace of the newest steps; `None` before the first step and after the last.
fn time_left(record: &RunRecord, status: &Status) -> Option<f64> {
    let steps_left = status
        .steps_total?
        .checked_sub(record.steps_taken())
        .filter(|&left| left > 0)?;
    let recent = &record.steps[record.steps.len().saturating_sub(PACE_STEPS)..];
    if recent.is_empty() {
        return None;
    }
    let seconds: f64 = recent.iter().map(|step| step.time_step).sum();
    Some(seconds / recent.len() as f64 * steps_left as f64)
}

fn held_out(record: &RunRecord) -> String {
    let (Some(first), Some(last)) = (record.evals.first(), record.evals.last()) else {
        return "not evaluated yet".to_owned();
    };
    let now = format!(
        "{} at version {}",
        percent(last.accuracy),
        last.policy_version
    );
    if record.evals.len() == 1 {
        return now;
    }
    let curve: Vec<f64> = record.evals.iter().map(|eval| eval.accuracy).collect();
    let curve = sparkline(&curve, SPARKLINE_WIDTH);
    format!("{now}, from {}  {curve}", percent(first.accuracy))
}

fn reward(record: &RunRecord) -> String {
    let Some(last) = record.steps.last() else {
        return nothing_yet();
    };
    let curve: Vec<f64> = record.steps.iter().map(|step| step.reward_mean).collect();
    format!(
        "{}  {}",
        short(last.reward_mean),
        sparkline(&curve, SPARKLINE_WIDTH)
    )
}

fn policy(step: &StepMetrics) -> String {
    format!(
        "staleness {} (largest {})  mismatch_kl {}  entropy {}  grad norm {}",
        short(step.staleness_mean),
        step.staleness_max,
        short(step.mismatch_kl_mean),
        short(step.entropy_mean),
        short(step.grad_norm)
    )
}

fn speed(step: &StepMetrics) -> String {
    let waiting = if step.time_step > 0.0 {
        step.time_wait_for_batch / step.time_step
    } else {
        0.0
    };
    format!(
        "{} rollout tokens/s  {} learner tokens/s  {} s per step, {} of it waiting",
        short(step.rollout_tokens_per_second),
        short(step.learner_tokens_per_second),
        short(step.time_step),
        percent(waiting)
    )
}

fn processes(processes: &[Process]) -> String {
    if processes.is_empty() {
        return "this one".to_owned();
    }
    let named = |state| -> Vec<&str> {
        let of_state = processes.iter().filter(|process| process.state == state);
        of_state.map(|process| process.name.as_str()).collect()
    };
    let mut parts = vec![format!("{} up", named(ProcessState::Up).len())];
    for (state, word) in [
        (ProcessState::Restarting, "restarting"),
        (ProcessState::Ended, "ended"),
    ] {
        let names = named(state);
        if !names.is_empty() {
            parts.push(format!("{word}: {}", names.join(" ")));
        }
    }
    let restarts: u64 = processes.iter().map(|process| process.restarts).sum();
    if restarts > 0 {
        parts.push(plural(restarts, "restart"));
    }
    parts.join(", ")
}

/// A run in its 35th step, for the tests here and of the plain lines.
#[cfg(test)]
pub(super) fn some_record() -> RunRecord {
    use muster_protocol::id::PolicyVersion;
    use muster_protocol::message::fate::Fate;
    let eval = |version, accuracy| EvalLine {
        policy_version: PolicyVersion(version),
        accuracy,
        samples: 1_000,
        seconds: 0.41,
    };
    let step = |step: u64| StepMetrics {
        step,
        reward_mean: 0.4 + 0.01 * step as f64,
        staleness_mean: 0.75,
        staleness_max: 2,
        mismatch_kl_mean: 5.7e-4,
        entropy_mean: 0.41,
        grad_norm: 0.62,
        rollout_tokens_per_second: 9_210.0,
        learner_tokens_per_second: 21_000.0,
        time_step: 0.6,
        time_wait_for_batch: 0.09,
        ..StepMetrics::default()
    };
    let mut record = RunRecord {
        name: "quickstart".to_owned(),
        steps: (1..=35).map(step).collect(),
        evals: vec![
            eval(0, 0.543),
            eval(10, 0.66),
            eval(20, 0.74),
            eval(30, 0.812),
        ],
        ..RunRecord::default()
    };
    record.fates.counts = [
        (Fate::Trained, 1_120),
        (Fate::Rejected, 3),
        (Fate::NoSignal, 88),
    ]
    .into();
    record.fates.newest_rejection = Some("draws of rollout 3 are off by 0.41".to_owned());
    record
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(name: &str, state: ProcessState, restarts: u64) -> Process {
        Process {
            name: name.to_owned(),
            state,
            restarts,
        }
    }

    #[test]
    fn the_display_tells_how_the_run_goes() {
        let status = Status {
            steps_total: Some(140),
            phase: String::new(),
            processes: vec![
                process("nats", ProcessState::Up, 0),
                process("rollout-1", ProcessState::Up, 1),
                process("rollout-2", ProcessState::Restarting, 2),
            ],
        };
        let shown = live(&some_record(), &status, 24.0).join("\n");
        assert_eq!(
            shown,
            "run        quickstart  step 35/140  ━━━━━━━─────────────────────  0:24 elapsed  about 1:03 left\n\
             held-out   81.2 % at version 30, from 54.3 %  ▁▄▆█\n\
             reward     0.750  ▁▁▁▂▂▂▂▂▃▃▃▄▄▄▄▄▅▅▅▅▅▆▆▆▆▇▇▇▇▇██\n\
             policy     staleness 0.750 (largest 2)  mismatch_kl 5.7e-4  entropy 0.410  grad norm 0.620\n\
             speed      9.21k rollout tokens/s  21.0k learner tokens/s  0.600 s per step, 15.0 % of it waiting\n\
             groups     1,120 trained, 3 rejected, 88 no_signal\n\
             rejected   draws of rollout 3 are off by 0.41\n\
             processes  2 up, restarting: rollout-2, 3 restarts"
        );
    }

    #[test]
    fn before_the_first_step_the_display_has_as_many_lines_and_says_what_goes_on() {
        let status = Status {
            steps_total: Some(140),
            phase: "warm-up: development accuracy 31 %".to_owned(),
            processes: vec![],
        };
        let record = RunRecord {
            name: "quickstart".to_owned(),
            ..RunRecord::default()
        };
        let shown = live(&record, &status, 3.0);
        assert_eq!(shown.len(), live(&some_record(), &status, 3.0).len());
        assert!(
            shown[0].ends_with("0:03 elapsed  warm-up: development accuracy 31 %"),
            "{}",
            shown[0]
        );
        assert!(shown[1].ends_with("not evaluated yet"));
    }

    #[test]
    fn a_run_without_an_end_or_at_its_end_has_no_time_left() {
        let endless = Status::default();
        assert_eq!(time_left(&some_record(), &endless), None);
        let done = Status {
            steps_total: Some(35),
            ..Status::default()
        };
        assert_eq!(time_left(&some_record(), &done), None);
        assert!(progress(&some_record(), &done, 1.0).contains(&"━".repeat(BAR_WIDTH as usize)));
        let fewer = Status {
            steps_total: Some(10),
            ..Status::default()
        };
        assert!(progress(&some_record(), &fewer, 1.0).contains(&"━".repeat(BAR_WIDTH as usize)));
    }

    #[test]
    fn a_step_and_an_evaluation_fit_one_line_each() {
        let record = some_record();
        let status = Status {
            steps_total: Some(140),
            ..Status::default()
        };
        assert_eq!(
            step_line(&record, &status),
            "step 35/140, reward 0.750, staleness 0.750, 9.21k rollout tokens/s, \
             1,120 trained, 3 rejected, 88 no_signal, about 1:03 left"
        );
        assert_eq!(
            eval_line(&record.evals[3]),
            "held-out accuracy 81.2 % at version 30 (1,000 prompts, 0.410 s)"
        );
    }
}
