//! Tests a reward before training: the configuration in plain sentences, the reward of an honest answer, and the rewards of
//! cheap hacks on items of the task. Training converges to the cheapest text that pays, so a hack must earn far less than
//! an honest answer.
//!
//! Knows nothing about policies: it scores texts from a fixed list and cannot show that no other hack exists.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use crate::function::{Answer, Range};
use crate::functions::number::Number;
use crate::reward::{Component, GoldError, Reward};
use crate::tagged::shortened;
use crate::task::{Item, Split, Task};

/// Items in a test: the mean of a 0/1 reward over 256 items has a standard error of about 0.03.
const ITEMS_MAX: usize = 256;

/// Largest share of the honest reward that a hack may earn. One fixed answer to questions with four choices earns exactly
/// this share and passes; with three choices it is flagged.
const SHARE_MAX: f64 = 0.25;

/// Smallest share of the largest reward that an honest answer should earn.
const HONEST_SHARE_MIN: f64 = 0.5;

/// The number of gold answers of the task, most frequent first, that are tested as one answer for all prompts.
const GOLD_CONSTANTS_MAX: usize = 64;

/// Texts that are tested as one answer for all prompts of any task.
const CONSTANTS: &[&str] = &[
    "0", "1", "2", "10", "-1", "yes", "no", "true", "false", "A", "B", "C", "D",
];

/// Length of an overly long answer.
const LONG_CHARS: usize = 4096;

/// Copies of the gold answer in one text.
const REPEATS: usize = 64;

/// A cheap way to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Hack {
    EmptyAnswer,
    PromptEcho,
    /// The first half of the gold answer: a reward that pays for it pays for truncated answers.
    GoldPrefix,
    /// One text for every prompt: the best of many.
    OneAnswerForAll,
    OverlyLong,
    /// Many copies of the gold answer: it pays if the reward checks neither form nor length.
    GoldRepeated,
    /// Every number from 0 to 99: it pays if the reward searches the text for the gold answer.
    DigitSpam,
}

impl Hack {
    /// In the order of a report.
    pub const ALL: [Self; 7] = [
        Self::EmptyAnswer,
        Self::PromptEcho,
        Self::GoldPrefix,
        Self::OneAnswerForAll,
        Self::OverlyLong,
        Self::GoldRepeated,
        Self::DigitSpam,
    ];

    fn way_out(self) -> &'static str {
        match self {
            Self::EmptyAnswer => "a component pays for an empty answer: lower its weight",
            Self::PromptEcho => {
                "extract the answer from a place that the prompt lacks, such as a tag"
            }
            Self::GoldPrefix => {
                "compare the whole answer, or require a terminator, so that a truncated answer earns nothing"
            }
            Self::OneAnswerForAll => {
                "the gold answers are too few, or every text matches the pattern: vary the task or compare with gold"
            }
            Self::OverlyLong => "add a length reward, or compare with gold",
            Self::GoldRepeated => {
                "anchor the pattern, set number = \"whole\", or add a length reward"
            }
            Self::DigitSpam => "anchor the pattern, or extract the answer from one place",
        }
    }
}

impl fmt::Display for Hack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::EmptyAnswer => "empty answer",
            Self::PromptEcho => "prompt echo",
            Self::GoldPrefix => "gold's prefix",
            Self::OneAnswerForAll => "one answer for all",
            Self::OverlyLong => "overly long answer",
            Self::GoldRepeated => "gold repeated",
            Self::DigitSpam => "digit spam",
        })
    }
}

/// The result of one hack.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Probe {
    pub hack: Hack,
    /// Mean total over the items, in the form that earns most.
    pub mean: f64,
    /// Whether the mean exceeds a quarter of the mean of honest answers.
    pub flagged: bool,
    /// The text for the first item.
    pub example: String,
}

/// The result of [`check`].
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CheckReport {
    /// Explain the configuration.
    pub sentences: Vec<String>,
    pub range: Range,
    /// In the train, development and held-out splits.
    pub prompts: [usize; 3],
    /// The number of items that were tested.
    pub items: usize,
    /// Mean total of honest answers: the demonstrations if the task has them, else the gold answers in the form of the
    /// reward function that earns most.
    pub honest: f64,
    /// The honest answer to the first item.
    pub honest_example: String,
    pub probes: Vec<Probe>,
    /// Doubts about the configuration as a whole.
    pub warnings: Vec<String>,
}

impl CheckReport {
    /// The hacks that earn too much.
    pub fn flagged(&self) -> impl Iterator<Item = &Probe> {
        self.probes.iter().filter(|probe| probe.flagged)
    }
}

impl fmt::Display for CheckReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [train, development, held_out] = self.prompts;
        writeln!(
            f,
            "task: {train} prompts to train on, {development} for development, {held_out} held out"
        )?;
        for sentence in &self.sentences {
            writeln!(f, "{sentence}")?;
        }
        writeln!(
            f,
            "\nhonest answer, mean of {} items: {:.3}   `{}`",
            self.items,
            self.honest,
            shortened(&self.honest_example)
        )?;
        for probe in &self.probes {
            let mark = if probe.flagged { "PAYS" } else { "ok  " };
            writeln!(
                f,
                "{mark} {:<20}{:>7.3}   `{}`",
                probe.hack.to_string(),
                probe.mean,
                shortened(&probe.example)
            )?;
        }
        for probe in self.flagged() {
            writeln!(
                f,
                "\n{} earns {:.3} where an honest answer earns {:.3}: {}",
                probe.hack,
                probe.mean,
                self.honest,
                probe.hack.way_out()
            )?;
        }
        for warning in &self.warnings {
            writeln!(f, "\n{warning}")?;
        }
        Ok(())
    }
}

/// Explains the reward and scores honest answers and hacks on items of the task's train split.
///
/// # Errors
/// A gold answer that a function cannot compare with.
pub fn check(task: &Task, reward: &Reward) -> Result<CheckReport, GoldError> {
    let trial = Trial {
        reward,
        items: task.items(Split::Train).iter().take(ITEMS_MAX).collect(),
        gold_counts: gold_counts(task),
    };
    let (honest, honest_example) = trial.honest()?;
    let mut probes = Vec::new();
    for hack in Hack::ALL {
        let (mean, example) = trial.best_form(&trial.texts(hack))?;
        probes.push(Probe {
            hack,
            mean,
            // If honest answers earn nothing, any gain is too much.
            flagged: mean > SHARE_MAX * honest.max(0.0),
            example,
        });
    }
    let range = reward.range();
    Ok(CheckReport {
        sentences: reward.explain(),
        range,
        prompts: Split::ALL.map(|split| task.len(split)),
        items: trial.items.len(),
        warnings: warnings(honest, range, task.duplicates()),
        honest,
        honest_example,
        probes,
    })
}

fn warnings(honest: f64, range: Range, duplicates: usize) -> Vec<String> {
    let mut warnings = Vec::new();
    if range.max <= 0.0 {
        warnings.push(
            "no answer can earn more than 0: add a reward that pays for a right answer".to_owned(),
        );
    } else if honest < HONEST_SHARE_MIN * range.max {
        warnings.push(format!(
            "the honest answer earns {honest:.3} of {}: check that `extract`, `terminator` and `tags` fit the form of the answers",
            range.max
        ));
    }
    if duplicates > 0 {
        warnings.push(format!(
            "{duplicates} lines of the task file repeat an earlier prompt and were merged into it"
        ));
    }
    warnings
}

/// Gold answers of the train split, the most frequent first.
fn gold_counts(task: &Task) -> Vec<String> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for item in task.items(Split::Train) {
        *counts.entry(&item.gold).or_default() += 1;
    }
    let mut by_count: Vec<(&str, usize)> = counts.into_iter().collect();
    by_count.sort_by(|(a_gold, a), (b_gold, b)| (b, a_gold).cmp(&(a, b_gold)));
    by_count
        .into_iter()
        .take(GOLD_CONSTANTS_MAX)
        .map(|(gold, _)| gold.to_owned())
        .collect()
}

/// One text per item.
type Texts = Vec<String>;

struct Trial<'a> {
    reward: &'a Reward,
    items: Vec<&'a Item>,
    gold_counts: Vec<String>,
}

impl Trial<'_> {
    /// The mean of honest answers and the first of them.
    fn honest(&self) -> Result<(f64, String), GoldError> {
        let gold: Texts = self.items.iter().map(|item| item.gold.clone()).collect();
        let best_gold = self.best_form(&[gold])?;
        let demonstrations: Option<Texts> = self
            .items
            .iter()
            .map(|item| item.demonstration.clone())
            .collect();
        // The warm-up teaches the demonstrations, so they count as honest even if another form earns more.
        match demonstrations {
            Some(texts) => Ok((
                self.mean(&texts)?,
                texts.into_iter().next().unwrap_or_default(),
            )),
            None => Ok(best_gold),
        }
    }

    /// The candidate texts of a hack; the best candidate counts.
    fn texts(&self, hack: Hack) -> Vec<Texts> {
        let each = |text: &dyn Fn(&Item) -> String| -> Texts {
            self.items.iter().map(|item| text(item)).collect()
        };
        match hack {
            Hack::EmptyAnswer => vec![each(&|_| String::new())],
            Hack::PromptEcho => vec![each(&|item| item.prompt.clone())],
            Hack::GoldPrefix => vec![each(&|item| prefix(&item.gold))],
            Hack::OneAnswerForAll => self
                .gold_counts
                .iter()
                .map(String::as_str)
                .chain(CONSTANTS.iter().copied())
                .map(|constant| each(&|_| constant.to_owned()))
                .collect(),
            Hack::OverlyLong => vec![
                each(&|_| "a".repeat(LONG_CHARS)),
                each(&|_| "the answer ".repeat(LONG_CHARS / 11)),
            ],
            Hack::GoldRepeated => vec![each(&|item| vec![item.gold.as_str(); REPEATS].join(" "))],
            Hack::DigitSpam => {
                let numbers: Vec<String> = (0..100).map(|number: u32| number.to_string()).collect();
                vec![
                    each(&|_| numbers.join(" ")),
                    each(&|_| numbers.join(",")),
                    each(&|_| numbers.concat()),
                ]
            }
        }
    }

    /// The largest mean among the candidates, each as it is and dressed by every function, and its first text.
    fn best_form(&self, candidates: &[Texts]) -> Result<(f64, String), GoldError> {
        let mut best: Option<(f64, String)> = None;
        let mut consider = |texts: &Texts| -> Result<(), GoldError> {
            let mean = self.mean(texts)?;
            if best.as_ref().is_none_or(|(most, _)| mean > *most) {
                best = Some((mean, texts.first().cloned().unwrap_or_default()));
            }
            Ok(())
        };
        for texts in candidates {
            consider(texts)?;
            for function in self.reward.components().iter().map(Component::function) {
                let dressed: Option<Texts> =
                    texts.iter().map(|text| function.dress(text)).collect();
                if let Some(dressed) = dressed {
                    consider(&dressed)?;
                }
            }
        }
        Ok(best.unwrap_or_default())
    }

    /// Mean total; each character of an answer counts as one token.
    fn mean(&self, texts: &[String]) -> Result<f64, GoldError> {
        debug_assert_eq!(texts.len(), self.items.len(), "one text per item");
        let mut sum = 0.0;
        for (item, text) in self.items.iter().zip(texts) {
            let answer = Answer {
                prompt: &item.prompt,
                text,
                finished: true,
                tokens: text.chars().count(),
            };
            sum += self.reward.score(&answer, &item.gold)?.total;
        }
        Ok(sum / self.items.len().max(1) as f64)
    }
}

/// The first half of the gold answer, or an empty text if that half is the same number ("26.0" begins with "26").
fn prefix(gold: &str) -> String {
    let half = gold.chars().count() / 2;
    let start: String = gold.chars().take(half).collect();
    match (Number::parse(&start), Number::parse(gold)) {
        (Some(start_number), Some(whole)) if start_number.equals(&whole) => String::new(),
        _ => start,
    }
}

#[cfg(test)]
mod tests;
