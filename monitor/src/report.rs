//! `report.html`: a run's curves and tables on one page without external files. [`render`] is pure; [`RunRecord::load`] reads
//! the run directory. Invariant: text that a peer may have written is escaped.

mod chart;

use std::path::{Path, PathBuf};

use muster_protocol::message::fate::Fate;
use muster_protocol::record::StepMetrics;

use crate::record::{RecordError, RunRecord, WorkerTally};
use crate::summary;
use crate::text::{count, duration, percent, short};
use chart::{Chart, Kind, Series};

/// Most workers listed: those with the most trained groups.
const WORKERS_SHOWN: usize = 200;
/// The page's style, light and dark.
const STYLE: &str = include_str!("report/style.css");

#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("{} cannot be written: {source}; check its permissions and the free space", path.display())]
    Write {
        path: PathBuf,
        source: std::io::Error,
    },
}

/// Writes `report.html` into a run directory and returns its path.
///
/// # Errors
/// The directory cannot be read, or the page cannot be written.
pub fn write(dir: &Path) -> Result<PathBuf, ReportError> {
    let page = render(&RunRecord::load(dir)?);
    let path = dir.join("report.html");
    // Whole or not at all: somebody may be looking at the one before.
    let unfinished = dir.join("report.html.partial");
    let written =
        std::fs::write(&unfinished, page).and_then(|()| std::fs::rename(&unfinished, &path));
    match written {
        Ok(()) => Ok(path),
        Err(source) => Err(ReportError::Write { path, source }),
    }
}

/// The page.
pub fn render(record: &RunRecord) -> String {
    let name = escaped(&record.name);
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>{name}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n\
         <header>\n<h1>{name}</h1>\n<p class=\"lede\">{}</p>\n</header>\n",
        escaped(&summary::headline(record))
    );
    page.push_str(&tiles(record));
    page.push_str(&charts(record));
    page.push_str(&fates_table(record));
    page.push_str(&workers_table(record));
    page.push_str(&evals_table(record));
    page.push_str(&configuration(record));
    page.push_str("</main>\n</body>\n</html>\n");
    page
}

/// Escapes text for use between tags and in attributes.
fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            _ => safe.push(c),
        }
    }
    safe
}

fn tiles(record: &RunRecord) -> String {
    let accuracy = match record.evals.last() {
        Some(eval) => percent(eval.accuracy),
        None => "–".to_owned(),
    };
    let tiles = [
        ("held-out accuracy", accuracy),
        ("steps", count(record.steps_taken())),
        ("time of training", duration(record.seconds())),
        ("tokens trained", short(record.tokens_trained() as f64)),
        ("groups trained", count(record.fates.of(Fate::Trained))),
        ("groups rejected", count(record.fates.of(Fate::Rejected))),
    ];
    let tile = |(name, value): (&str, String)| {
        format!("<div class=\"tile\"><b>{value}</b><span>{name}</span></div>\n")
    };
    format!(
        "<section class=\"tiles\">\n{}</section>\n",
        tiles.map(tile).concat()
    )
}

/// A named value of a step.
type Value = (&'static str, fn(&StepMetrics) -> f64);

/// A chart over the steps: title, explanation, kind, values.
type StepChart = (&'static str, &'static str, Kind, &'static [Value]);

const STEP_CHARTS: &[StepChart] = &[
    (
        "Reward",
        "Mean over the rollouts trained in each step, and their standard deviation.",
        Kind::Lines,
        &[("mean", |s| s.reward_mean), ("deviation", |s| s.reward_std)],
    ),
    (
        "Staleness",
        "Age in steps of the groups trained, their time in the queue included.",
        Kind::Lines,
        &[
            ("mean", |s| s.staleness_mean),
            ("largest", |s| s.staleness_max as f64),
        ],
    ),
    (
        "Mismatch",
        "k3 estimate, in nats, of the divergence between the policy that sampled and the policy trained.",
        Kind::Logarithmic,
        &[("mismatch_kl", |s| s.mismatch_kl_mean)],
    ),
    (
        "Entropy",
        "Of the policy at the trained positions, in nats.",
        Kind::Lines,
        &[("entropy", |s| s.entropy_mean)],
    ),
    (
        "Gradient norm",
        "Before clipping.",
        Kind::Lines,
        &[("gradient norm", |s| s.grad_norm)],
    ),
    (
        "Clipped tokens",
        "Share of the trained tokens that the objective masked, clipped or capped.",
        Kind::Lines,
        &[("clip fraction", |s| s.clip_fraction_mean)],
    ),
    (
        "Throughput",
        "Tokens per second: completions submitted by workers, and tokens trained by the learner.",
        Kind::Lines,
        &[
            ("rollout", |s| s.rollout_tokens_per_second),
            ("learner", |s| s.learner_tokens_per_second),
        ],
    ),
    (
        "Time per step",
        "Seconds: training, waiting for a batch, and making and announcing the new version.",
        Kind::Stacked,
        &[
            ("training", |s| {
                (s.time_step - s.time_wait_for_batch - s.time_broadcast).max(0.0)
            }),
            ("waiting", |s| s.time_wait_for_batch),
            ("broadcast", |s| s.time_broadcast),
        ],
    ),
    (
        "Completion length",
        "Mean number of tokens.",
        Kind::Lines,
        &[("tokens", |s| s.seq_len_mean)],
    ),
    (
        "Learning rate",
        "Of each step.",
        Kind::Lines,
        &[("learning rate", |s| s.lr)],
    ),
    (
        "Weights sent",
        "Bytes that a peer fetches per version, and the size of the whole version.",
        Kind::Lines,
        &[
            ("fetched", |s| s.broadcast_bytes as f64),
            ("whole", |s| s.broadcast_full_bytes as f64),
        ],
    ),
];

fn charts(record: &RunRecord) -> String {
    let accuracy = Chart {
        kind: Kind::Share,
        series: vec![Series {
            name: "accuracy",
            points: record
                .evals
                .iter()
                .map(|e| (e.policy_version.0 as f64, e.accuracy))
                .collect(),
        }],
    };
    let told = "Greedy answers to prompts that are never trained on, by policy version.";
    let mut figures = figure("Held-out accuracy", told, &accuracy);
    for (title, told, kind, values) in STEP_CHARTS {
        let series = |&(name, value): &Value| Series {
            name,
            points: record
                .steps
                .iter()
                .map(|step| (step.step as f64, value(step)))
                .collect(),
        };
        let chart = Chart {
            kind: *kind,
            series: values.iter().map(series).collect(),
        };
        figures.push_str(&figure(title, told, &chart));
    }
    format!("<section class=\"charts\">\n{figures}</section>\n")
}

fn figure(title: &str, told: &str, chart: &Chart) -> String {
    let drawing = chart
        .svg()
        .unwrap_or_else(|| "<p class=\"none\">no data yet</p>".to_owned());
    let entry = |(colour, series): (usize, &Series)| {
        let last = series.points.last().map(|&(_, value)| chart.label(value));
        format!(
            "<span><i class=\"s{colour}\"></i>{} <b>{}</b></span>",
            series.name,
            last.unwrap_or_default()
        )
    };
    let legend: String = chart.series.iter().enumerate().map(entry).collect();
    format!(
        "<figure>\n<figcaption><h2>{title}</h2><p>{told}</p><div class=\"legend\">{legend}</div>\
         </figcaption>\n{drawing}\n</figure>\n"
    )
}

fn fates_table(record: &RunRecord) -> String {
    let total: u64 = record.fates.counts.values().sum();
    let mut rows = String::new();
    for fate in Fate::ALL {
        let number = record.fates.of(fate);
        let share = if total > 0 {
            percent(number as f64 / total as f64)
        } else {
            "–".to_owned()
        };
        rows.push_str(&format!(
            "<tr class=\"fate\"><th scope=\"row\">{fate}</th><td>{}</td><td>{share}</td>\
             <td class=\"words\">{}</td></tr>\n",
            count(number),
            meaning(fate)
        ));
        for reason in record.fates.reasons_of(fate) {
            rows.push_str(&format!(
                "<tr><th></th><td>{}</td><td></td><td class=\"words\">{}</td></tr>\n",
                count(reason.count),
                escaped(&reason.example)
            ));
        }
    }
    let head = "<th>fate</th><th>groups</th><th>share</th><th class=\"words\">reason, the newest of its kind</th>";
    table("How groups ended", head, &rows)
}

fn meaning(fate: Fate) -> &'static str {
    match fate {
        Fate::Trained => "in a batch",
        Fate::Rejected => "a check found them bad",
        Fate::Stale => "older than the async level when their turn came",
        Fate::NoSignal => "all rewards equal, nothing to learn",
        Fate::Expired => "not answered before the ticket's deadline",
        Fate::Superseded => "no longer wanted",
        Fate::Duplicate => "a second group for a ticket that had one",
    }
}

fn workers_table(record: &RunRecord) -> String {
    let of = |tally: &WorkerTally, fate| tally.counts.get(&fate).copied().unwrap_or(0);
    let mut workers: Vec<_> = record.workers.iter().collect();
    workers.sort_by_key(|(_, tally)| std::cmp::Reverse(of(tally, Fate::Trained)));
    let others = |tally: &WorkerTally| {
        tally.counts.values().sum::<u64>() - of(tally, Fate::Trained) - of(tally, Fate::Rejected)
    };
    let row = |(worker, tally): &(&muster_protocol::id::PeerId, &WorkerTally)| {
        format!(
            "<tr><th scope=\"row\"><code title=\"{worker}\">{}</code></th><td>{}</td><td>{}</td>\
             <td>{}</td><td>{}</td><td>{}</td></tr>\n",
            worker.short(),
            count(of(tally, Fate::Trained)),
            count(of(tally, Fate::Rejected)),
            count(others(tally)),
            count(tally.audited),
            count(tally.tokens)
        )
    };
    let mut rows: String = workers.iter().take(WORKERS_SHOWN).map(row).collect();
    if let Some(more) = workers
        .len()
        .checked_sub(WORKERS_SHOWN)
        .filter(|&more| more > 0)
    {
        rows.push_str(&format!(
            "<tr><th>and {} more</th></tr>\n",
            count(more as u64)
        ));
    }
    let head = "<th>worker</th><th>groups trained</th><th>rejected</th><th>other fates</th>\
                <th>audited</th><th>tokens trained</th>";
    table("Workers", head, &rows)
}

fn evals_table(record: &RunRecord) -> String {
    let row = |eval: &muster_protocol::record::EvalLine| {
        format!(
            "<tr><th scope=\"row\">{}</th><td>{}</td><td>{}</td><td>{}</td></tr>\n",
            eval.policy_version,
            percent(eval.accuracy),
            count(eval.samples),
            short(eval.seconds)
        )
    };
    // First, best and last tell the run; the curve has the rest.
    let ends = [
        record.evals.first(),
        record.best_eval(),
        record.evals.last(),
    ];
    let mut shown: Vec<_> = ends.into_iter().flatten().collect();
    shown.dedup_by_key(|eval| eval.policy_version);
    let rows: String = shown.into_iter().map(row).collect();
    let head = "<th>version</th><th>accuracy</th><th>prompts</th><th>seconds</th>";
    table("Evaluations: first, best, last", head, &rows)
}

fn table(title: &str, head: &str, rows: &str) -> String {
    let body = if rows.is_empty() {
        "<p class=\"none\">none yet</p>\n".to_owned()
    } else {
        format!(
            "<div class=\"wide\"><table>\n<thead><tr>{head}</tr></thead>\n\
             <tbody>\n{rows}</tbody>\n</table></div>\n"
        )
    };
    format!("<section>\n<h2>{title}</h2>\n{body}</section>\n")
}

fn configuration(record: &RunRecord) -> String {
    format!(
        "<section>\n<h2>Configuration</h2>\n<p>config.toml as the run resolved it, every default \
         written out.</p>\n<pre>{}</pre>\n</section>\n",
        escaped(&record.config)
    )
}

#[cfg(test)]
mod tests;
