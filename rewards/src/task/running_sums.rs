//! The procedural task: the answer to `9+8+7+2=` is `17,24,26.`, every running total and a full stop. A model of 0.3M
//! parameters learns it in minutes.
//!
//! Why three terms at least: there are only 100 sums of two digits, and a policy that sees them in a third of its prompts
//! memorises them; its training reward rises while the held-out accuracy does not. Why addends 0 to 9 and three or four
//! terms: they give 11,000 prompts, and each step of the answer adds one digit to a total of at most 27.

use std::collections::BTreeSet;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::source::{Item, SourceItems, TaskError, TaskSource};
use super::split::Partition;
use crate::tagged::ConfigError;

/// All characters of prompts and answers.
const ALPHABET: &str = "0123456789+=,.";

/// Largest number of terms: longer answers need a longer context and teach nothing more.
const TERMS_MAX: u32 = 16;

/// Largest addend: with 16 terms every total stays below 16,000.
const ADDEND_MAX: u32 = 999;

/// Most prompts per number of terms: all items are held in memory.
const PROMPTS_PER_LENGTH_MAX: usize = 200_000;

/// `type = "running_sums"`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunningSumsConfig {
    /// Fewest terms of a prompt; at least 3, since two-term prompts are memorised.
    pub terms_min: u32,
    /// Most terms of a prompt.
    pub terms_max: u32,
    pub addend_min: u32,
    pub addend_max: u32,
    /// Most prompts of each number of terms, so that one length does not crowd out the others. If there are more, this many
    /// are drawn.
    pub prompts_per_length_max: usize,
    /// Share of the prompts in the held-out split.
    pub held_out_fraction: f64,
    /// Share of the prompts in the development split.
    pub dev_fraction: f64,
    /// Seed of the splits and of the order; independent of the run's seed, so that runs with different seeds have the same
    /// held-out split.
    pub seed: u64,
}

impl Default for RunningSumsConfig {
    fn default() -> Self {
        Self {
            terms_min: 3,
            terms_max: 4,
            addend_min: 0,
            addend_max: 9,
            prompts_per_length_max: 20_000,
            // Of 11,000 prompts about 1,300 are held out and 650 are for development.
            held_out_fraction: 0.12,
            dev_fraction: 0.06,
            seed: 0,
        }
    }
}

impl TaskSource for RunningSumsConfig {
    fn partition(&self) -> Partition {
        Partition {
            held_out_fraction: self.held_out_fraction,
            development_fraction: self.dev_fraction,
            seed: self.seed,
        }
    }

    fn validate(&self) -> Result<(), ConfigError> {
        if self.terms_min < 3 {
            return Err(ConfigError::bad_value(
                "terms_min",
                self.terms_min,
                "but it must be at least 3: shorter prompts are so few that they are memorised",
            ));
        }
        if !(self.terms_min..=TERMS_MAX).contains(&self.terms_max) {
            return Err(ConfigError::bad_value(
                "terms_max",
                self.terms_max,
                format!(
                    "but it must be from terms_min ({}) to {TERMS_MAX}",
                    self.terms_min
                ),
            ));
        }
        if !(self.addend_min.saturating_add(1)..=ADDEND_MAX).contains(&self.addend_max) {
            return Err(ConfigError::bad_value(
                "addend_max",
                self.addend_max,
                format!(
                    "but it must be above addend_min ({}) and at most {ADDEND_MAX}",
                    self.addend_min
                ),
            ));
        }
        if !(1..=PROMPTS_PER_LENGTH_MAX).contains(&self.prompts_per_length_max) {
            return Err(ConfigError::bad_value(
                "prompts_per_length_max",
                self.prompts_per_length_max,
                format!("but it must be from 1 to {PROMPTS_PER_LENGTH_MAX}"),
            ));
        }
        self.partition().validate()
    }

    fn items(&self, _: &Path) -> Result<SourceItems, TaskError> {
        let lengths = self.terms_min..=self.terms_max;
        let sums = lengths.flat_map(|terms| self.sums_of(terms));
        Ok(SourceItems {
            items: sums.map(|addends| item(&addends)).collect(),
            duplicates: 0,
            alphabet: ALPHABET,
        })
    }
}

impl RunningSumsConfig {
    /// The sums of one length: all of them, or as many as the cap allows.
    fn sums_of(&self, terms: u32) -> BTreeSet<Vec<u32>> {
        let choices = self.addend_max - self.addend_min + 1;
        let all = u64::from(choices).saturating_pow(terms);
        if all <= self.prompts_per_length_max as u64 {
            return (0..all).map(|index| self.addends(index, terms)).collect();
        }
        // There are more sums than the cap, so distinct draws cannot run out. The stream comes from the hash, so that no
        // library update changes it.
        let mut hasher = blake3::Hasher::new_derive_key("muster running sums draw v1");
        hasher.update(&self.seed.to_le_bytes());
        hasher.update(&terms.to_le_bytes());
        let mut stream = hasher.finalize_xof();
        let mut drawn = BTreeSet::new();
        while drawn.len() < self.prompts_per_length_max {
            let sum: Vec<u32> = (0..terms)
                .map(|_| {
                    let mut word = [0; 8];
                    stream.fill(&mut word);
                    let choice = u64::from_le_bytes(word) % u64::from(choices);
                    self.addend_min + choice as u32
                })
                .collect();
            drawn.insert(sum);
        }
        drawn
    }

    /// The digits of `index` in the base of the addends.
    fn addends(&self, index: u64, terms: u32) -> Vec<u32> {
        let choices = u64::from(self.addend_max - self.addend_min + 1);
        let mut rest = index;
        (0..terms)
            .map(|_| {
                let choice = rest % choices;
                rest /= choices;
                self.addend_min + choice as u32
            })
            .collect()
    }
}

fn item(addends: &[u32]) -> Item {
    let terms: Vec<String> = addends.iter().map(u32::to_string).collect();
    let mut total = 0;
    let totals: Vec<String> = addends
        .iter()
        .map(|addend| {
            total += addend;
            total.to_string()
        })
        .collect();
    // The first total is the first term itself, which the prompt shows already.
    let written = totals.get(1..).unwrap_or_default();
    Item {
        prompt: format!("{}=", terms.join("+")),
        gold: total.to_string(),
        demonstration: Some(format!("{}.", written.join(","))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_lists_the_running_totals_and_ends_with_a_full_stop() {
        let item = item(&[9, 8, 7, 2]);
        assert_eq!(item.prompt, "9+8+7+2=");
        assert_eq!(item.gold, "26");
        assert_eq!(item.demonstration.as_deref(), Some("17,24,26."));
    }

    #[test]
    fn distinct_sums_are_drawn_if_there_are_more_than_the_cap() {
        let config = RunningSumsConfig {
            terms_max: 5,
            addend_max: 12,
            prompts_per_length_max: 2_197,
            ..Default::default()
        };
        let prompts: BTreeSet<String> = config
            .items(Path::new(""))
            .unwrap()
            .items
            .into_iter()
            .map(|item| item.prompt)
            .collect();
        assert_eq!(
            prompts.len(),
            3 * 2_197,
            "13^3 = 2,197: all of them, then the cap twice"
        );
    }

    #[test]
    fn values_outside_their_limits_are_refused_with_the_limits() {
        let refusal = |config: RunningSumsConfig| {
            config
                .validate()
                .unwrap_err()
                .in_section("task")
                .to_string()
        };
        insta::assert_snapshot!(
            refusal(RunningSumsConfig { terms_min: 2, ..Default::default() }),
            @"task: `terms_min` is 2, but it must be at least 3: shorter prompts are so few that they are memorised"
        );
        insta::assert_snapshot!(
            refusal(RunningSumsConfig { terms_max: 99, ..Default::default() }),
            @"task: `terms_max` is 99, but it must be from terms_min (3) to 16"
        );
        insta::assert_snapshot!(
            refusal(RunningSumsConfig { addend_min: u32::MAX, ..Default::default() }),
            @"task: `addend_max` is 9, but it must be above addend_min (4294967295) and at most 999"
        );
        insta::assert_snapshot!(
            refusal(RunningSumsConfig { prompts_per_length_max: 0, ..Default::default() }),
            @"task: `prompts_per_length_max` is 0, but it must be from 1 to 200000"
        );
        insta::assert_snapshot!(
            refusal(RunningSumsConfig { held_out_fraction: f64::NAN, ..Default::default() }),
            @"task: `held_out_fraction` is NaN, but a share must be at least 0 and below 1"
        );
        insta::assert_snapshot!(
            refusal(RunningSumsConfig { held_out_fraction: 0.5, dev_fraction: 0.5, ..Default::default() }),
            @"task: `held_out_fraction` is 0.5, which with dev_fraction 0.5 leaves nothing to train on: lower one of them"
        );
    }
}
