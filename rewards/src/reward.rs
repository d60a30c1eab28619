//! The reward: a weighted list of functions over one answer. Each component is reported under its name; the total is the
//! sum of weight times value, taken in the list's order, so that every machine gets the same bits. Knows nothing about
//! where the answer came from. Invariant: the total is finite and within the declared range, whatever the text.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};
use toml::Table;

use crate::function::{Function, FunctionConfig};
use crate::tagged::{self, ConfigError, shortened};

/// Most functions in one reward: each is a column on the screen and in every verdict.
const ENTRIES_MAX: usize = 32;

/// Largest weight: 32 of these stay far from the end of f32, in which rewards travel.
const WEIGHT_MAX: f64 = 1e6;

/// Longest component name, in characters: it is a metric's label.
const NAME_CHARS_MAX: usize = 64;

/// The keys every `[[reward]]` may have beside its function's own.
const SHARED_KEYS: &[&str] = &["name", "weight", "finished"];

/// One answer, as a reward sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer<'a> {
    /// What was asked.
    pub prompt: &'a str,
    /// What was answered, without the prompt and without end markers.
    pub text: &'a str,
    /// Whether the policy ended the answer by itself; false when it ran out of tokens.
    pub finished: bool,
    /// Tokens of the answer.
    pub tokens: usize,
}

/// A closed interval that values never leave.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Range {
    /// Smallest value.
    pub min: f64,
    /// Largest value.
    pub max: f64,
}

impl Range {
    /// Right or wrong.
    pub const UNIT: Self = Self { min: 0.0, max: 1.0 };

    /// Whether `value` lies in the interval; NaN does not.
    pub fn contains(&self, value: f64) -> bool {
        value >= self.min && value <= self.max
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Shown to six places: 0.1 + 0.2 has more, and nobody wrote them.
        let rounded = |value: f64| (value * 1e6).round() / 1e6;
        write!(f, "{} to {}", rounded(self.min), rounded(self.max))
    }
}

/// What an answer that ran out of tokens is worth to a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finished {
    /// The same as any other.
    #[default]
    Any,
    /// The least the function pays.
    Required,
}

/// One `[[reward]]`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RewardEntry {
    /// Name of the component in metrics and verdicts; the function's type unless given.
    pub name: String,
    /// What a value of 1 adds to the total; 0 reports the component without paying for it.
    pub weight: f64,
    /// Whether an answer that ran out of tokens can earn.
    pub finished: Finished,
    /// The function, tagged by `type`.
    #[serde(flatten)]
    pub function: FunctionConfig,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Shared {
    name: Option<String>,
    #[serde(default = "default_weight")]
    weight: f64,
    #[serde(default)]
    finished: Finished,
}

fn default_weight() -> f64 {
    1.0
}

impl<'de> Deserialize<'de> for RewardEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let table = Table::deserialize(deserializer)?;
        Self::from_table(table).map_err(serde::de::Error::custom)
    }
}

impl RewardEntry {
    /// Reads one `[[reward]]` table.
    ///
    /// # Errors
    /// An unknown type or key, a value of the wrong type or outside its limits.
    pub fn from_table(mut table: Table) -> Result<Self, ConfigError> {
        let named = match table.get("name") {
            Some(toml::Value::String(name)) => format!("reward {}", shortened(name)),
            _ => "a reward".to_owned(),
        };
        let kind = tagged::take_type(&mut table, &named, FunctionConfig::TYPES)?;
        let section = format!("reward {kind}");
        let mut shared = Table::new();
        for key in SHARED_KEYS {
            if let Some(value) = table.remove(*key) {
                shared.insert((*key).to_owned(), value);
            }
        }
        let shared: Shared = tagged::read(shared, &section, &[])?;
        let entry = Self {
            name: shared.name.unwrap_or_else(|| kind.to_owned()),
            weight: shared.weight,
            finished: shared.finished,
            function: FunctionConfig::from_table(kind, table, &section, SHARED_KEYS)?,
        };
        entry.compile()?;
        Ok(entry)
    }

    fn compile(&self) -> Result<Component, ConfigError> {
        let section = format!("reward {}", shortened(&self.name));
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        if self.name.is_empty() || self.name.len() > NAME_CHARS_MAX || !self.name.chars().all(plain)
        {
            return Err(ConfigError::bad_value(
                "name",
                format!("`{}`", shortened(&self.name)),
                format!(
                    "but it must be 1 to {NAME_CHARS_MAX} of a-z, 0-9 and _, since it labels a metric"
                ),
            )
            .in_section(&section));
        }
        if !(0.0..=WEIGHT_MAX).contains(&self.weight) {
            let rule = if self.weight < 0.0 {
                "but a weight must not be negative: to punish, use a function whose range is below 0, such as `length`"
            } else {
                "but a weight must be a number from 0 to 1000000"
            };
            return Err(ConfigError::bad_value("weight", self.weight, rule).in_section(&section));
        }
        let function = self
            .function
            .compile()
            .map_err(|error| error.in_section(&section))?;
        Ok(Component {
            name: self.name.clone(),
            weight: self.weight,
            finished: self.finished,
            function,
        })
    }
}

/// The value of one function.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ComponentScore {
    /// The component's name.
    pub name: String,
    /// Its value before the weight, in its function's range.
    pub value: f64,
}

/// What an answer is worth.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Score {
    /// Sum of weight times value; finite, within [`Reward::range`].
    pub total: f64,
    /// Every component in the configuration's order.
    pub components: Vec<ComponentScore>,
}

/// A gold answer that a function cannot compare with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the gold answer `{gold}` is {found}, so reward {name} cannot compare with it: {way_out}")]
pub struct GoldError {
    /// The gold answer.
    pub gold: String,
    /// The component's name.
    pub name: String,
    /// What is wrong with it.
    pub found: &'static str,
    /// What to change.
    pub way_out: &'static str,
}

#[derive(Debug)]
pub(crate) struct Component {
    pub(crate) name: String,
    pub(crate) weight: f64,
    pub(crate) finished: Finished,
    pub(crate) function: Box<dyn Function>,
}

impl Component {
    fn value(&self, answer: &Answer<'_>, gold: &str) -> Result<f64, GoldError> {
        if self.finished == Finished::Required && !answer.finished {
            return Ok(self.function.range().min);
        }
        self.function
            .value(answer, gold)
            .map_err(|unfit| GoldError {
                gold: shortened(gold),
                name: self.name.clone(),
                found: unfit.found,
                way_out: unfit.way_out,
            })
    }
}

/// A configured reward, ready to be used from any thread.
#[derive(Debug)]
pub struct Reward {
    components: Vec<Component>,
}

impl Reward {
    /// Checks and compiles the list.
    ///
    /// # Errors
    /// An empty list, two components of one name, no weight above 0, a value outside its limits.
    pub fn compile(entries: &[RewardEntry]) -> Result<Self, ConfigError> {
        if entries.is_empty() {
            return Err(ConfigError::MissingSection {
                section: "[[reward]]",
                example: "type = \"exact_match\"",
            });
        }
        if entries.len() > ENTRIES_MAX {
            return Err(ConfigError::bad_value(
                "reward",
                format!("a list of {}", entries.len()),
                format!("but at most {ENTRIES_MAX} can be composed: merge some"),
            )
            .in_section("the configuration"));
        }
        let mut names = BTreeSet::new();
        let mut components = Vec::new();
        for entry in entries {
            let component = entry.compile()?;
            if !names.insert(component.name.clone()) {
                return Err(ConfigError::DuplicateName {
                    name: component.name,
                });
            }
            components.push(component);
        }
        if components.iter().all(|component| component.weight == 0.0) {
            return Err(ConfigError::NoWeight);
        }
        Ok(Self { components })
    }

    /// The interval that no total leaves.
    pub fn range(&self) -> Range {
        // Summed in the order of `score`: rounding is monotone, so the bound holds to the last bit.
        let mut range = Range { min: 0.0, max: 0.0 };
        for component in &self.components {
            let own = component.function.range();
            range.min += component.weight * own.min;
            range.max += component.weight * own.max;
        }
        range
    }

    /// What one answer is worth.
    ///
    /// # Errors
    /// A function cannot compare with this gold answer; [`Reward::check_gold`] says so ahead of time.
    pub fn score(&self, answer: &Answer<'_>, gold: &str) -> Result<Score, GoldError> {
        let mut total = 0.0;
        let mut components = Vec::with_capacity(self.components.len());
        for component in &self.components {
            let value = component.value(answer, gold)?;
            debug_assert!(
                component.function.range().contains(value),
                "{} left its range: {value}",
                component.name
            );
            total += component.weight * value;
            components.push(ComponentScore {
                name: component.name.clone(),
                value,
            });
        }
        Ok(Score { total, components })
    }

    /// Whether every function can compare with this gold answer.
    ///
    /// # Errors
    /// The first function that cannot.
    pub fn check_gold(&self, gold: &str) -> Result<(), GoldError> {
        // Functions look at the gold answer first, whatever the text, so that an empty one asks them all.
        let nothing = Answer {
            prompt: "",
            text: "",
            finished: true,
            tokens: 0,
        };
        self.score(&nothing, gold).map(drop)
    }

    /// Names of the components, in the order in which they are reported.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.components
            .iter()
            .map(|component| component.name.as_str())
    }

    /// Whether a function counts tokens, so that an answer without its number of tokens cannot be scored.
    pub fn counts_tokens(&self) -> bool {
        self.components
            .iter()
            .any(|component| component.function.counts_tokens())
    }

    /// The configuration in plain sentences, one for each component and one for the total.
    pub fn explain(&self) -> Vec<String> {
        let mut sentences: Vec<String> = self.components.iter().map(explain_component).collect();
        sentences.push(format!(
            "the total is the weighted sum and lies in {}",
            self.range()
        ));
        sentences
    }

    pub(crate) fn components(&self) -> &[Component] {
        &self.components
    }
}

fn explain_component(component: &Component) -> String {
    let finished = match component.finished {
        Finished::Any => "",
        Finished::Required => "; an answer that ran out of tokens gets the least",
    };
    let weight = if component.weight == 0.0 {
        "reported only (weight 0)".to_owned()
    } else {
        format!("weight {}", component.weight)
    };
    format!(
        "{} ({weight}, range {}): {}{finished}",
        component.name,
        component.function.range(),
        component.function.explain()
    )
}

#[cfg(test)]
mod tests;
