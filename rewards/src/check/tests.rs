//! Hacks are flagged on rewards that invite them, and only on those.

use std::path::Path;

use super::*;
use crate::config::{Prepared, RewardConfig};

const RUNNING_SUMS: &str = "[task]\ntype = 'running_sums'\n";

fn report(text: &str) -> CheckReport {
    let Prepared { task, reward } = RewardConfig::from_toml(text)
        .unwrap()
        .prepare(Path::new("."))
        .unwrap();
    check(&task, &reward).unwrap()
}

fn report_on_file(lines: &str, rewards: &str) -> CheckReport {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("task.jsonl"), lines).unwrap();
    let text = format!(
        "[task]\ntype = 'jsonl'\nfile = 'task.jsonl'\nheld_out_fraction = 0.2\ndev_fraction = 0\n{rewards}"
    );
    let prepared = RewardConfig::from_toml(&text)
        .unwrap()
        .prepare(folder.path())
        .unwrap();
    check(&prepared.task, &prepared.reward).unwrap()
}

fn flagged(report: &CheckReport) -> Vec<Hack> {
    report.flagged().map(|probe| probe.hack).collect()
}

/// Whether the report has neither a warning nor a flagged hack.
fn is_clean(report: &CheckReport) -> bool {
    report.warnings.is_empty() && report.flagged().next().is_none()
}

#[test]
fn the_quickstart_reward_pays_the_honest_answer_and_no_hack() {
    let report = report(&format!(
        "{RUNNING_SUMS}[[reward]]\ntype = 'numeric_match'\nname = 'correct'\nextract = {{ after_last = ',' }}\nterminator = '.'\nnumber = 'whole'"
    ));
    assert_eq!(report.honest, 1.0);
    assert!(is_clean(&report), "{report}");
    insta::assert_snapshot!(report, @r#"
    task: 9024 prompts to train on, 662 for development, 1314 held out
    correct (weight 1, range 0 to 1): pays 1 if the text after the last `,` (the text must end with `.`) equals the gold number exactly
    the total is the weighted sum and lies in 0 to 1

    honest answer, mean of 256 items: 1.000   `9,9,9.`
    ok   empty answer          0.000   ``
    ok   prompt echo           0.000   `9+0+0+0=`
    ok   gold's prefix         0.000   ``
    ok   one answer for all    0.082   `,17.`
    ok   overly long answer    0.000   `aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa…`
    ok   gold repeated         0.000   `9 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9 …`
    ok   digit spam            0.000   `0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 2…`
    "#);
}

#[test]
fn a_pattern_that_ignores_the_gold_answer_is_flagged() {
    let report = report(&format!(
        "{RUNNING_SUMS}[[reward]]\ntype = 'regex'\npattern = '[0-9]'"
    ));
    assert_eq!(
        flagged(&report),
        [
            Hack::PromptEcho,
            Hack::GoldPrefix,
            Hack::OneAnswerForAll,
            Hack::GoldRepeated,
            Hack::DigitSpam
        ]
    );
}

#[test]
fn a_reward_for_short_answers_is_flagged() {
    let report = report(&format!(
        "{RUNNING_SUMS}[[reward]]\ntype = 'numeric_match'\nweight = 0.1\n[[reward]]\ntype = 'length'\nunit = 'chars'\nmax = 4\nramp = 5"
    ));
    assert!(
        !report.warnings.is_empty(),
        "the demonstration earns less than nothing: {report}"
    );
    assert!(
        flagged(&report).contains(&Hack::OneAnswerForAll),
        "{report}"
    );
}

#[test]
fn one_answer_for_all_is_flagged_on_yes_or_no_questions() {
    let lines: String = (0..100)
        .map(|n| {
            format!(
                "{{\"prompt\": \"is {n} even?\", \"gold\": \"{}\"}}\n",
                if n % 2 == 0 { "yes" } else { "no" }
            )
        })
        .collect();
    let report = report_on_file(&lines, "[[reward]]\ntype = 'exact_match'");
    assert_eq!(flagged(&report), [Hack::OneAnswerForAll]);
    assert!(
        report.to_string().contains("one answer for all earns 0.5"),
        "{report}"
    );
}

#[test]
fn the_honest_answer_is_the_gold_answer_in_the_tags_that_pay() {
    let lines: String = (0..100)
        .map(|n| format!("{{\"prompt\": \"{n} squared?\", \"gold\": {}}}\n", n * n))
        .collect();
    let rewards = "[[reward]]\ntype = 'numeric_match'\nextract = { inside_tag = 'answer' }\nnumber = 'whole'\n[[reward]]\ntype = 'format'\ntags = ['think', 'answer']\nweight = 0.2";
    let report = report_on_file(&lines, rewards);
    assert!((report.honest - 1.2).abs() < 1e-9, "{}", report.honest);
    assert!(
        report.honest_example.starts_with("<think>"),
        "{}",
        report.honest_example
    );
    assert!(is_clean(&report), "{report}");
}

#[test]
fn repeating_the_gold_answer_is_flagged_if_a_number_may_be_anywhere() {
    let report = report(&format!("{RUNNING_SUMS}[[reward]]\ntype = 'numeric_match'"));
    assert_eq!(flagged(&report), [Hack::GoldRepeated]);
}

#[test]
fn an_extraction_that_no_answer_fits_gives_a_warning() {
    let report = report(&format!(
        "{RUNNING_SUMS}[[reward]]\ntype = 'numeric_match'\nextract = {{ inside_tag = 'answer' }}"
    ));
    assert_eq!(report.honest, 0.0);
    insta::assert_snapshot!(report.warnings.join("\n"), @"the honest answer earns 0.000 of 1: check that `extract`, `terminator` and `tags` fit the form of the answers");
    let only_penalty = self::report(&format!(
        "{RUNNING_SUMS}[[reward]]\ntype = 'length'\nmax = 20"
    ));
    insta::assert_snapshot!(only_penalty.warnings.join("\n"), @"no answer can earn more than 0: add a reward that pays for a right answer");
}

#[test]
fn a_prefix_that_is_the_same_number_is_not_tested() {
    assert_eq!(prefix("26.0"), "");
    assert_eq!(prefix("2600"), "26");
    assert_eq!(prefix("7"), "");
    assert_eq!(prefix("größe"), "gr");
}
