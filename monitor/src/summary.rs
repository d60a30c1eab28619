//! The summary of a run in a few sentences, at the end of the display and at the top of the report.

use std::path::Path;

use muster_protocol::message::fate::Fate;

use crate::record::RunRecord;
use crate::text::{count, duration, percent, plural, short};

/// Most reasons listed for the rejected groups.
const REASONS_SHOWN: usize = 3;

/// Held-out accuracy from the first evaluation to the last, with steps and time.
pub fn headline(record: &RunRecord) -> String {
    let took = format!(
        "{} and {}",
        plural(record.steps_taken(), "step"),
        duration(record.seconds())
    );
    let (Some(first), Some(last)) = (record.evals.first(), record.evals.last()) else {
        return format!("{took}, not evaluated yet");
    };
    if record.evals.len() == 1 {
        return format!(
            "held-out accuracy is {} after {took}",
            percent(first.accuracy)
        );
    }
    let mut line = format!(
        "held-out accuracy went from {} to {} in {took}",
        percent(first.accuracy),
        percent(last.accuracy)
    );
    if let Some(best) = record
        .best_eval()
        .filter(|best| best.accuracy > last.accuracy)
    {
        let (accuracy, version) = (percent(best.accuracy), best.policy_version);
        line.push_str(&format!(" (best: {accuracy} at version {version})"));
    }
    line
}

/// The fates of groups: `1,120 trained, 3 rejected, 12 stale`. Fates without groups are left out, except the first two.
pub fn fates(record: &RunRecord) -> String {
    let shown = Fate::ALL.into_iter().filter(|&fate| {
        matches!(fate, Fate::Trained | Fate::Rejected) || record.fates.of(fate) > 0
    });
    let parts = shown.map(|fate| format!("{} {fate}", count(record.fates.of(fate))));
    parts.collect::<Vec<_>>().join(", ")
}

/// The text that ends a run.
///
/// * `report`, `checkpoint` — their paths, if they exist
pub fn summary(record: &RunRecord, report: Option<&Path>, checkpoint: Option<&Path>) -> String {
    let mut lines = vec![
        headline(record),
        format!(
            "groups: {}; {} tokens trained",
            fates(record),
            short(record.tokens_trained() as f64)
        ),
    ];
    for reason in record
        .fates
        .reasons_of(Fate::Rejected)
        .into_iter()
        .take(REASONS_SHOWN)
    {
        lines.push(format!(
            "rejected {} ×: {}",
            count(reason.count),
            reason.example
        ));
    }
    if let Some(path) = report {
        lines.push(format!("report: {}", path.display()));
    }
    if let Some(path) = checkpoint {
        lines.push(format!("last checkpoint: {}", path.display()));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Reason;
    use muster_protocol::id::PolicyVersion;
    use muster_protocol::record::{EvalLine, StepMetrics};

    fn eval(version: u64, accuracy: f64) -> EvalLine {
        let policy_version = PolicyVersion(version);
        EvalLine {
            policy_version,
            accuracy,
            samples: 1_000,
            seconds: 0.4,
        }
    }

    #[test]
    fn a_run_ends_with_what_it_reached_what_it_took_and_where_to_look() {
        let step = StepMetrics {
            time_step: 0.65,
            tokens_trained: 3_500,
            ..Default::default()
        };
        let mut record = RunRecord {
            steps: (1..=140)
                .map(|number| StepMetrics {
                    step: number,
                    ..step.clone()
                })
                .collect(),
            evals: vec![eval(0, 0.543), eval(120, 0.95), eval(140, 0.941)],
            ..RunRecord::default()
        };
        record.fates.counts = [
            (Fate::Trained, 1_120),
            (Fate::Rejected, 2),
            (Fate::Stale, 12),
        ]
        .into();
        let reason = Reason {
            count: 2,
            example: "draws of rollout 3 are off by 0.41".to_owned(),
        };
        record.fates.reasons.insert(
            (Fate::Rejected, "draws of rollout # are off by #".to_owned()),
            reason,
        );
        let text = summary(
            &record,
            Some(Path::new("run/report.html")),
            Some(Path::new("run/checkpoints/140")),
        );
        assert_eq!(
            text,
            "held-out accuracy went from 54.3 % to 94.1 % in 140 steps and 1:31 \
             (best: 95.0 % at version 120)\n\
             groups: 1,120 trained, 2 rejected, 12 stale; 490k tokens trained\n\
             rejected 2 ×: draws of rollout 3 are off by 0.41\n\
             report: run/report.html\n\
             last checkpoint: run/checkpoints/140"
        );
    }

    #[test]
    fn a_run_that_ended_early_says_so() {
        let mut record = RunRecord::default();
        assert_eq!(headline(&record), "0 steps and 0:00, not evaluated yet");
        record.evals.push(eval(0, 0.5));
        assert_eq!(
            headline(&record),
            "held-out accuracy is 50.0 % after 0 steps and 0:00"
        );
        assert_eq!(fates(&record), "0 trained, 0 rejected");
    }
}
