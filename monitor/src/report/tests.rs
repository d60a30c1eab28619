//! The page is whole, needs nothing but itself, and is not at the mercy of what peers wrote.

use super::*;
use muster_protocol::id::{PeerId, PolicyVersion, TicketId};
use muster_protocol::record::{EvalLine, JsonLines, Line, SelectionLine};

const HOSTILE: &str = "</td><script src=//x.example/a.js></script><img onerror='x'> & \"q\"";

fn step(step: u64) -> StepMetrics {
    let progress = step as f64 / 140.0;
    StepMetrics {
        step,
        policy_version: PolicyVersion(step),
        reward_mean: 0.45 + 0.4 * progress,
        reward_std: 0.5 - 0.2 * progress,
        entropy_mean: 0.6 - 0.4 * progress,
        mismatch_kl_mean: if step == 1 {
            0.0
        } else {
            1e-4 * (1.0 + progress)
        },
        clip_fraction_mean: 0.01,
        grad_norm: 0.5,
        lr: 2e-4 * (1.0 - 0.95 * progress),
        staleness_mean: 0.8,
        staleness_max: 2,
        groups_trained: 32,
        tokens_trained: 3_600,
        seq_len_mean: 12.0 + (step % 5) as f64 / 10.0,
        rollout_tokens_per_second: 9_000.0 + 100.0 * (step % 11) as f64,
        learner_tokens_per_second: 21_000.0,
        broadcast_bytes: 90_000 + step * 10,
        broadcast_full_bytes: 617_000,
        time_step: 0.65,
        time_wait_for_batch: 0.1,
        time_broadcast: 0.05,
        ..StepMetrics::default()
    }
}

fn eval(version: u64, accuracy: f64) -> EvalLine {
    let policy_version = PolicyVersion(version);
    EvalLine {
        policy_version,
        accuracy,
        samples: 1_000,
        seconds: 0.41,
    }
}

fn write_run(dir: &Path, steps: u64, workers: u64) {
    std::fs::write(
        dir.join("config.toml"),
        format!("steps = 140\n# {HOSTILE}\n"),
    )
    .unwrap();
    let mut metrics = JsonLines::open(&dir.join(StepMetrics::FILE), |_| true).unwrap();
    (1..=steps).for_each(|number| metrics.append(&step(number)).unwrap());
    let mut evals = JsonLines::open(&dir.join(EvalLine::FILE), |_| true).unwrap();
    for at in 0..=14 {
        let gained = 0.4 * (1.0 - (-f64::from(at) / 4.0).exp());
        evals
            .append(&eval(u64::from(at as u32) * 10, 0.543 + gained))
            .unwrap();
    }
    let mut selections = JsonLines::open(&dir.join(SelectionLine::FILE), |_| true).unwrap();
    for ticket in 0..workers * 3 {
        let (fate, reason) = match ticket % 3 {
            0 => (Fate::Trained, ""),
            1 => (
                Fate::NoSignal,
                "all 8 rewards are equal, so every advantage is zero",
            ),
            _ => (Fate::Rejected, HOSTILE),
        };
        let mut worker = [0; 32];
        worker[..8].copy_from_slice(&(ticket / 3).to_be_bytes());
        selections
            .append(&SelectionLine {
                ticket: TicketId(ticket),
                group: None,
                worker: Some(PeerId(worker)),
                policy_version: Some(PolicyVersion(ticket)),
                fate,
                reason: reason.to_owned(),
                audited: ticket % 2 == 0,
                step: None,
            })
            .unwrap();
    }
}

fn page_of(steps: u64, workers: u64) -> String {
    let folder = tempfile::tempdir().unwrap();
    write_run(folder.path(), steps, workers);
    let path = write(folder.path()).unwrap();
    assert!(path.ends_with("report.html"));
    std::fs::read_to_string(path).unwrap()
}

/// Walks the tags: every one that is opened is closed in its turn. Returns how many there were.
fn tags(page: &str) -> usize {
    let mut open: Vec<&str> = Vec::new();
    let mut seen = 0;
    for part in page.split('<').skip(1) {
        let tag = part.split('>').next().unwrap();
        let name = tag.split([' ', '/']).next().unwrap();
        seen += 1;
        if let Some(closed) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(closed), "near {part:.60}");
        } else if !tag.ends_with('/') && !["!doctype", "meta"].contains(&name) {
            open.push(name);
        }
    }
    assert_eq!(open, [""; 0]);
    seen
}

#[test]
fn a_report_has_every_curve_and_table_and_needs_nothing_but_itself() {
    let page = page_of(140, 3);
    assert!(tags(&page) > 500);
    for title in STEP_CHARTS.iter().map(|chart| chart.0).chain([
        "Held-out accuracy",
        "How groups ended",
        "Workers",
        "Configuration",
    ]) {
        assert!(page.contains(&format!("<h2>{title}</h2>")), "{title}");
    }
    assert!(page.contains("held-out accuracy went from 54.3 % to 93.1 % in 140 steps and 1:31"));
    assert!(!page.contains("no data yet"));
    for outside in [
        "http:", "https:", "src=\"", "href=", "url(", "<script", "@import",
    ] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert!(!page.contains("NaN") && !page.contains("inf\""));
}

#[test]
fn what_peers_wrote_is_shown_and_not_obeyed() {
    let page = page_of(3, 2);
    assert!(!page.contains("<script") && !page.contains("<img"));
    assert_eq!(
        page.matches("&lt;script src=//x.example/a.js&gt;").count(),
        2,
        "reason and config"
    );
    tags(&page);
}

#[test]
fn a_run_that_has_not_begun_has_a_report_too() {
    let page = render(&RunRecord {
        name: "<b>".to_owned(),
        ..RunRecord::default()
    });
    assert!(page.contains("<h1>&lt;b&gt;</h1>"));
    assert_eq!(page.matches("no data yet").count(), STEP_CHARTS.len() + 1);
    tags(&page);
}

#[test]
fn the_page_of_a_long_run_with_many_workers_stays_small() {
    let page = page_of(20_000, 1_000);
    assert!(page.len() < 1 << 20, "{} bytes", page.len());
    assert!(page.contains("and 800 more"));
}
