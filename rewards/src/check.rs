//! Trying a reward before anybody trains on it: the configuration in plain sentences, what an honest answer earns, and
//! what cheap hacks earn on items of the task. A policy finds whatever pays, so a hack that earns a good share of the
//! honest reward is what training will end in.
//!
//! Knows nothing about policies: it judges texts that a person thought of, and cannot show that no other hack exists.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use crate::function::number::Number;
use crate::reward::{Answer, GoldError, Range, Reward};
use crate::tagged::shortened;
use crate::task::{Item, Split, Task};

/// Items tried: the mean of a 0/1 reward over 256 is known to about 0.03.
const ITEMS_MAX: usize = 256;

/// Share of the honest reward from which a hack is flagged. One fixed answer to a question of four choices earns
/// just that much and passes; to one of three it is flagged.
const SHARE_MAX: f64 = 0.25;

/// Share of the range's top that an honest answer should earn.
const HONEST_SHARE_MIN: f64 = 0.5;

/// Most of the task's own gold answers tried as the one answer for all, the most frequent first.
const GOLD_CONSTANTS_MAX: usize = 64;

/// Answers to try for all prompts whatever the task is.
const CONSTANTS: &[&str] = &[
    "0", "1", "2", "10", "-1", "yes", "no", "true", "false", "A", "B", "C", "D",
];

/// Characters of an overly long answer.
const LONG_CHARS: usize = 4096;

/// Times the gold answer is repeated.
const REPEATS: usize = 64;

/// One cheap way to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Hack {
    /// Says nothing.
    EmptyAnswer,
    /// Repeats the prompt.
    PromptEcho,
    /// Only begins the gold answer: a reward that pays for it would pay for cut answers.
    GoldPrefix,
    /// One text for every prompt, the best of many.
    OneAnswerForAll,
    /// Thousands of characters without meaning.
    OverlyLong,
    /// The right answer many times over: it shows that nothing asks for an answer's form or length.
    GoldRepeated,
    /// Every number from 0 to 99, in the hope that one of them is found.
    DigitSpam,
}

impl Hack {
    /// All of them, in the order of a report.
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
            Self::EmptyAnswer => "something pays for saying nothing: lower that weight",
            Self::PromptEcho => "extract the answer from a place that the prompt does not have",
            Self::GoldPrefix => {
                "compare the whole answer, or ask for a terminator, so that a cut answer earns nothing"
            }
            Self::OneAnswerForAll => {
                "too few different gold answers, or a pattern that anything matches: vary the task or compare with gold"
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

/// What one hack earns.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Probe {
    /// The hack.
    pub hack: Hack,
    /// Mean total over the items, of the form of it that earns most.
    pub mean: f64,
    /// Whether that is more than a quarter of what an honest answer earns.
    pub flagged: bool,
    /// One such text.
    pub example: String,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CheckReport {
    /// The configuration in plain sentences.
    pub sentences: Vec<String>,
    /// The declared range of the total.
    pub range: Range,
    /// Prompts of the train, development and held-out splits.
    pub prompts: [usize; 3],
    /// Items on which the answers were tried.
    pub items: usize,
    /// Mean total of the honest answer: the demonstration where the task has one, else the gold answer in the best form
    /// that the reward functions ask for.
    pub honest: f64,
    /// One honest text.
    pub honest_example: String,
    /// Every hack.
    pub probes: Vec<Probe>,
    /// What is doubtful about the configuration as a whole.
    pub warnings: Vec<String>,
}

impl CheckReport {
    /// Whether no hack is flagged and nothing is doubtful.
    pub fn is_clean(&self) -> bool {
        self.warnings.is_empty() && !self.probes.iter().any(|probe| probe.flagged)
    }

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

/// Explains the reward and tries hacks on it over items of the task's train split.
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
            // Where the honest answer earns nothing, any gain is too much.
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
            "the honest answer earns {honest:.3} of {}: check that extract, terminator and tags are what the answers use",
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

/// One text for each item.
type Texts = Vec<String>;

struct Trial<'a> {
    reward: &'a Reward,
    items: Vec<&'a Item>,
    gold_counts: Vec<String>,
}

impl Trial<'_> {
    /// Mean and an example of the best honest answer.
    fn honest(&self) -> Result<(f64, String), GoldError> {
        let gold: Texts = self.items.iter().map(|item| item.gold.clone()).collect();
        let best_gold = self.best_form(&[gold])?;
        let demonstrations: Option<Texts> = self
            .items
            .iter()
            .map(|item| item.demonstration.clone())
            .collect();
        // A demonstration is what the warm-up teaches, so it stands for honesty even where another form earns more.
        match demonstrations {
            Some(texts) => Ok((
                self.mean(&texts)?,
                texts.into_iter().next().unwrap_or_default(),
            )),
            None => Ok(best_gold),
        }
    }

    /// The candidate texts of a hack; the best of them counts.
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

    /// The largest mean among the candidates, each as it is and in every form that a function reads answers from.
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
            for component in self.reward.components() {
                let dressed: Option<Texts> = texts
                    .iter()
                    .map(|text| component.function.dress(text))
                    .collect();
                if let Some(dressed) = dressed {
                    consider(&dressed)?;
                }
            }
        }
        Ok(best.unwrap_or_default())
    }

    /// Mean total; an answer's characters stand for its tokens.
    fn mean(&self, texts: &[String]) -> Result<f64, GoldError> {
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

/// The first half of the gold answer; nothing where that is the same number ("26.0" begins with "26").
fn prefix(gold: &str) -> String {
    let half = gold.chars().count() / 2;
    let start: String = gold.chars().take(half).collect();
    match (Number::parse(&start), Number::parse(gold)) {
        (Some(start_number), Some(whole)) if start_number.is(&whole) => String::new(),
        _ => start,
    }
}

#[cfg(test)]
mod tests;
