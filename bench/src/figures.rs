//! The figures of a finished run, and whether runs meet their bars. Pure: records in, figures out.
//!
//! Seconds of RL are the sum of `time/step`: from the trainer's start to a version's announcement, with its waiting.
//! Evaluations run beside the steps on the same cores, so they slow the steps down, but no step waits for one.

use serde::Serialize;

use muster_monitor::record::RunRecord;
use muster_monitor::text::{duration, percent, short, sparkline};
use muster_protocol::message::fate::Fate;

/// Accuracy that a run must reach.
pub(super) const ACCURACY_MIN: f64 = 0.9;
/// Largest accuracy after warm-up, so that RL has something to improve.
const WARMUP_ACCURACY_MAX: f64 = 0.65;
/// Least gain of accuracy by RL.
const GAIN_MIN: f64 = 0.25;
/// Longest time of RL to that accuracy.
const SECONDS_MAX: f64 = 180.0;
/// Longest warm-up.
const WARMUP_SECONDS_MAX: f64 = 90.0;
/// Largest gain of a control, by chance.
const CONTROL_GAIN_MAX: f64 = 0.05;
/// Columns of a curve in the table.
const CURVE_WIDTH: usize = 24;

/// Facts of a run that are not in its directory.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Conditions {
    pub(super) objective: String,
    pub(super) control: Option<String>,
    pub(super) seed: u64,
    /// Configured steps.
    pub(super) steps: u64,
    /// Seconds from the command's start to a complete starting policy.
    pub(super) warmup_seconds: f64,
    /// Seconds from the command's start to its end.
    pub(super) wall_seconds: f64,
    /// Load average of the minute before it started.
    pub(super) load_average: Option<f64>,
    /// Share of the machine's time during the run that a hypervisor gave to other machines.
    pub(super) steal: Option<f64>,
}

/// A point of a run's curve.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Point {
    /// The version evaluated.
    pub(super) policy_version: u64,
    /// Seconds of RL until it was announced.
    pub(super) seconds: f64,
    /// Greedy accuracy on the held-out set.
    pub(super) accuracy: f64,
}

/// A run's figures.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Figures {
    #[serde(flatten)]
    pub(super) conditions: Conditions,
    /// Held-out accuracy before any step.
    pub(super) accuracy_warmup: f64,
    /// Held-out accuracy of the last version.
    pub(super) accuracy: f64,
    /// The difference.
    pub(super) gain: f64,
    /// Seconds of RL until the first version with 90 %.
    pub(super) seconds_to_90: Option<f64>,
    /// Seconds of RL.
    pub(super) rl_seconds: f64,
    /// Mean age of the trained groups, in steps.
    pub(super) staleness_mean: f64,
    /// Rejected groups.
    pub(super) groups_rejected: u64,
    pub(super) curve: Vec<Point>,
}

impl Figures {
    /// The figures of a run; `None` if it was not evaluated before and after its steps.
    pub(super) fn of(conditions: Conditions, record: &RunRecord) -> Option<Self> {
        let curve: Vec<Point> = record
            .evals
            .iter()
            .map(|eval| Point {
                policy_version: eval.policy_version.0,
                seconds: seconds_until(record, eval.policy_version.0),
                accuracy: eval.accuracy,
            })
            .collect();
        let first = curve.iter().find(|point| point.policy_version == 0)?;
        let last = curve
            .iter()
            .find(|point| point.policy_version == conditions.steps)?;
        let reached = curve.iter().find(|point| point.accuracy >= ACCURACY_MIN);
        let stale: f64 = record.steps.iter().map(|line| line.staleness_mean).sum();
        Some(Self {
            accuracy_warmup: first.accuracy,
            accuracy: last.accuracy,
            gain: last.accuracy - first.accuracy,
            seconds_to_90: reached.map(|point| point.seconds),
            rl_seconds: record.seconds(),
            staleness_mean: stale / record.steps.len().max(1) as f64,
            groups_rejected: record.fates.of(Fate::Rejected),
            curve,
            conditions,
        })
    }

    /// The bars that the run misses, each in a few words.
    pub(super) fn missed(&self) -> Vec<String> {
        let mut missed = Vec::new();
        if self.conditions.control.is_some() {
            if self.gain >= CONTROL_GAIN_MAX {
                let gain = percent(self.gain);
                missed.push(format!("a control gained {gain}, limit 5 points"));
            }
            return missed;
        }
        if self.accuracy_warmup > WARMUP_ACCURACY_MAX {
            let found = percent(self.accuracy_warmup);
            missed.push(format!("{found} after warm-up, limit 65 %"));
        }
        if self.accuracy < ACCURACY_MIN {
            missed.push(format!("{} at the end, bar 90 %", percent(self.accuracy)));
        }
        if self.gain < GAIN_MIN {
            missed.push(format!("a gain of {}, bar 25 points", percent(self.gain)));
        }
        match self.seconds_to_90 {
            None => missed.push("90 % was never reached".to_owned()),
            Some(seconds) if seconds > SECONDS_MAX => {
                missed.push(format!("90 % after {seconds:.0} s of RL, limit 180 s"));
            }
            Some(_) => {}
        }
        if self.conditions.warmup_seconds > WARMUP_SECONDS_MAX {
            let seconds = self.conditions.warmup_seconds;
            missed.push(format!("a warm-up of {seconds:.0} s, limit 90 s"));
        }
        missed
    }

    /// The figures as a line under [`HEADER`].
    pub(super) fn row(&self) -> String {
        let Conditions {
            objective,
            control,
            seed,
            warmup_seconds,
            load_average,
            steal,
            ..
        } = &self.conditions;
        let name = match control {
            Some(control) => format!("{objective}, {control}"),
            None => objective.clone(),
        };
        let seconds = |value: Option<f64>| {
            value.map_or_else(|| "never".to_owned(), |value| format!("{value:.1} s"))
        };
        let curve: Vec<f64> = self.curve.iter().map(|point| point.accuracy).collect();
        format!(
            "{name:<18}{seed:>5}{warmup:>9}{before:>9}{after:>9}{gain:>8}{reached:>10}{rl:>10}{stale:>7}\
             {rejected:>9}{load:>7}{steal:>8}  {curve}",
            warmup = format!("{warmup_seconds:.1} s"),
            before = percent(self.accuracy_warmup),
            after = percent(self.accuracy),
            gain = format!("{:+.1}", 100.0 * self.gain),
            reached = seconds(self.seconds_to_90),
            rl = seconds(Some(self.rl_seconds)),
            stale = format!("{:.2}", self.staleness_mean),
            rejected = self.groups_rejected,
            load = load_average.map_or_else(|| "-".to_owned(), short),
            steal = steal.map_or_else(|| "-".to_owned(), percent),
            curve = sparkline(&curve, CURVE_WIDTH),
        )
    }

    /// The run's curve as one line: seconds of RL and accuracy of each evaluation.
    pub(super) fn curve_line(&self) -> String {
        let points = self
            .curve
            .iter()
            .map(|point| format!("{} {}", duration(point.seconds), percent(point.accuracy)));
        points.collect::<Vec<_>>().join(" · ")
    }
}

/// Headings of the columns of [`Figures::row`].
pub(super) fn header() -> String {
    format!(
        "{:<18}{:>5}{:>9}{:>9}{:>9}{:>8}{:>10}{:>10}{:>7}{:>9}{:>7}{:>8}  {}",
        "objective",
        "seed",
        "warm-up",
        "before",
        "after",
        "gain",
        "to 90 %",
        "RL",
        "stale",
        "rejected",
        "load",
        "steal",
        "accuracy"
    )
}

/// The run closest to missing its bar, or that misses it most: of controls the one with the largest gain, of other runs the last
/// to reach 90 %, and of runs that never did the one with the lowest accuracy.
pub(super) fn worst(figures: &[Figures]) -> Option<&Figures> {
    let badness = |run: &Figures| match (&run.conditions.control, run.seconds_to_90) {
        (Some(_), _) => (0.0, run.gain),
        (None, Some(seconds)) => (seconds, -run.accuracy),
        (None, None) => (f64::INFINITY, -run.accuracy),
    };
    figures.iter().max_by(|a, b| {
        let (a, b) = (badness(a), badness(b));
        a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1))
    })
}

fn seconds_until(record: &RunRecord, version: u64) -> f64 {
    let before = record.steps.iter().filter(|line| line.step <= version);
    // `sum` of no numbers is −0.0 and prints as such.
    before.fold(0.0, |seconds, line| seconds + line.time_step)
}

#[cfg(test)]
mod tests {
    use super::*;
    use muster_protocol::id::PolicyVersion;
    use muster_protocol::record::{EvalLine, StepMetrics};

    /// A run of 40 steps of 2 s, evaluated before, in the middle and after.
    fn figures(accuracies: [f64; 3], control: Option<&str>) -> Figures {
        let eval = |(number, accuracy): (usize, f64)| EvalLine {
            policy_version: PolicyVersion(20 * number as u64),
            accuracy,
            samples: 1_000,
            seconds: 1.0,
        };
        let record = RunRecord {
            evals: accuracies.into_iter().enumerate().map(eval).collect(),
            steps: (1..=40)
                .map(|step| StepMetrics {
                    step,
                    time_step: 2.0,
                    staleness_mean: 0.5,
                    ..Default::default()
                })
                .collect(),
            ..RunRecord::default()
        };
        let conditions = Conditions {
            objective: "chosen".to_owned(),
            control: control.map(str::to_owned),
            seed: 1,
            steps: 40,
            warmup_seconds: 20.0,
            wall_seconds: 105.0,
            load_average: Some(0.25),
            steal: None,
        };
        Figures::of(conditions, &record).unwrap()
    }

    #[test]
    fn the_time_to_90_percent_is_that_of_the_first_version_that_has_it() {
        let run = figures([0.55, 0.91, 0.96], None);
        assert_eq!(run.seconds_to_90, Some(40.0));
        assert_eq!((run.rl_seconds, run.staleness_mean), (80.0, 0.5));
        assert!(run.missed().is_empty(), "{:?}", run.missed());
        assert_eq!(run.curve_line(), "0:00 55.0 % · 0:40 91.0 % · 1:20 96.0 %");
        assert_eq!(run.row().chars().count(), header().chars().count() - 5);
    }

    #[test]
    fn each_missed_bar_is_named_with_its_number() {
        let missed = figures([0.7, 0.72, 0.8], None).missed().join("; ");
        assert_eq!(
            missed,
            "70.0 % after warm-up, limit 65 %; 80.0 % at the end, bar 90 %; a gain of 10.0 %, bar 25 points; \
             90 % was never reached"
        );
    }

    #[test]
    fn a_control_is_held_to_gaining_nothing() {
        assert!(figures([0.55, 0.56, 0.54], Some("lr0")).missed().is_empty());
        let missed = figures([0.55, 0.6, 0.62], Some("lr0")).missed();
        assert_eq!(missed, ["a control gained 7.0 %, limit 5 points"]);
    }

    #[test]
    fn the_worst_run_is_the_last_to_reach_the_bar_or_the_one_that_never_did() {
        let runs = [
            figures([0.5, 0.91, 0.95], None),
            figures([0.5, 0.6, 0.7], None),
            figures([0.5, 0.6, 0.92], None),
        ];
        assert_eq!(worst(&runs).unwrap().accuracy, 0.7);
        assert_eq!(worst(&runs[2..]).unwrap().accuracy, 0.92);
        assert!(worst(&[]).is_none());
    }

    #[test]
    fn a_run_without_its_last_evaluation_has_no_figures() {
        let mut conditions = figures([0.5, 0.6, 0.7], None).conditions;
        conditions.steps = 50;
        assert!(Figures::of(conditions, &RunRecord::default()).is_none());
    }
}
