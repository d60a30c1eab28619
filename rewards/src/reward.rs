//! The reward: a weighted list of functions over one answer. A [`Reward`] is compiled while it is read and carries its
//! configuration along, so every value of this type is checked and no process compiles it twice. The total is the sum of
//! weight times value in the list's order, so that every machine computes the same bits. Invariant: the total is finite
//! and within the declared range, whatever the text.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize};
use toml::Table;

use muster_protocol::limits::{REWARD_COMPONENTS_MAX, TEXT_BYTES_MAX};

use crate::function::{Answer, Function, Range};
use crate::functions::FunctionConfig;
use crate::tagged::{self, ConfigError, shortened};

/// Most functions in one reward: each is a column on the screen and in every verdict.
const COMPONENTS_MAX: usize = 32;

/// Largest weight: the sum of 32 such values stays far below the largest f32, in which rewards travel.
const WEIGHT_MAX: f64 = 1e6;

/// Longest component name, in bytes: it is a metric's label.
const NAME_BYTES_MAX: usize = 64;

const _: () = assert!(COMPONENTS_MAX <= REWARD_COMPONENTS_MAX && NAME_BYTES_MAX <= TEXT_BYTES_MAX);

/// The keys that every `[[reward]]` may have besides those of its type.
const SHARED_KEYS: &[&str] = &["name", "weight", "finished"];

/// The value of an answer that ran out of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Finished {
    /// Such an answer is scored like any other.
    #[default]
    Any,
    /// Such an answer gets the lowest value of the function's range.
    Required,
}

/// One `[[reward]]`, compiled. Serializes as its configuration, with every default written out.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Component {
    /// Label in metrics and verdicts; the function's type unless given.
    name: String,
    /// Contribution of a value of 1 to the total, from 0; at 0 the component is reported only.
    weight: f64,
    finished: Finished,
    #[serde(flatten)]
    config: FunctionConfig,
    #[serde(skip)]
    function: Arc<dyn Function>,
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

impl<'de> Deserialize<'de> for Component {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let table = Table::deserialize(deserializer)?;
        Self::from_table(table).map_err(serde::de::Error::custom)
    }
}

impl Component {
    /// Reads and compiles one `[[reward]]` table.
    ///
    /// # Errors
    /// An unknown type or key, a value of the wrong type or outside its limits.
    pub(crate) fn from_table(mut table: Table) -> Result<Self, ConfigError> {
        let named = match table.get("name") {
            Some(toml::Value::String(name)) => format!("reward {}", shortened(name)),
            _ => "a reward".to_owned(),
        };
        let kind = tagged::take_type(&mut table, &named, FunctionConfig::TYPES)?;
        let section = format!("reward {}", kind.name);
        let mut shared = Table::new();
        for key in SHARED_KEYS {
            if let Some(value) = table.remove(*key) {
                shared.insert((*key).to_owned(), value);
            }
        }
        let shared: Shared = tagged::read(shared, &section, &[])?;
        let config = (kind.read)(table, &section, SHARED_KEYS)?;
        let name = shared.name.unwrap_or_else(|| kind.name.to_owned());
        let section = format!("reward {}", shortened(&name));
        let compiled = validate_name(&name)
            .and_then(|()| validate_weight(shared.weight))
            .and_then(|()| config.config().compile());
        Ok(Self {
            function: compiled.map_err(|error| error.in_section(&section))?,
            name,
            weight: shared.weight,
            finished: shared.finished,
            config,
        })
    }

    pub(crate) fn function(&self) -> &dyn Function {
        &*self.function
    }

    fn value(&self, answer: &Answer<'_>, gold: &str) -> Result<f64, GoldError> {
        if self.finished == Finished::Required && !answer.finished {
            return Ok(self.function.range().min);
        }
        let value = self.function.value(answer, gold);
        value.map_err(|unfit| GoldError {
            gold: shortened(gold),
            name: self.name.clone(),
            found: unfit.found,
            way_out: unfit.way_out,
        })
    }

    fn explain(&self) -> String {
        let weight = if self.weight == 0.0 {
            "reported only (weight 0)".to_owned()
        } else {
            format!("weight {}", self.weight)
        };
        let finished = match self.finished {
            Finished::Any => "",
            Finished::Required => "; an answer that ran out of tokens gets the lowest value",
        };
        let (name, range, pays) = (&self.name, self.function.range(), self.function.explain());
        format!("{name} ({weight}, range {range}): {pays}{finished}")
    }
}

fn validate_name(name: &str) -> Result<(), ConfigError> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    if (1..=NAME_BYTES_MAX).contains(&name.len()) && name.chars().all(plain) {
        return Ok(());
    }
    Err(ConfigError::bad_value(
        "name",
        format!("`{}`", shortened(name)),
        format!("but it must be 1 to {NAME_BYTES_MAX} of a-z, 0-9 and _, since it labels a metric"),
    ))
}

fn validate_weight(weight: f64) -> Result<(), ConfigError> {
    if (0.0..=WEIGHT_MAX).contains(&weight) {
        return Ok(());
    }
    let rule = if weight < 0.0 {
        "but a weight must not be negative: to punish, use a function whose range is below 0, such as `length`"
    } else {
        "but a weight must be a number from 0 to 1000000"
    };
    Err(ConfigError::bad_value("weight", weight, rule))
}

/// The value of one function.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ComponentScore {
    pub name: String,
    /// Before the weight, in the function's range.
    pub value: f64,
}

/// The reward of one answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Score {
    /// Sum of weight times value; finite, within [`Reward::range`].
    pub total: f64,
    /// In the configuration's order.
    pub components: Vec<ComponentScore>,
}

/// A gold answer that a function cannot compare with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the gold answer `{gold}` is {found}, so reward {name} cannot compare with it: {way_out}")]
pub struct GoldError {
    gold: String,
    name: String,
    found: &'static str,
    way_out: &'static str,
}

/// A configured reward, compiled; clones share the compiled functions. Reads and writes as the list of `[[reward]]`.
#[derive(Debug, Clone, Serialize)]
#[serde(transparent)]
pub struct Reward {
    components: Vec<Component>,
}

impl<'de> Deserialize<'de> for Reward {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let components = Vec::deserialize(deserializer)?;
        Self::of(components).map_err(serde::de::Error::custom)
    }
}

impl Reward {
    /// Checks the rules between components.
    ///
    /// # Errors
    /// An empty list, too many components, two of one name, no weight above 0.
    pub(crate) fn of(components: Vec<Component>) -> Result<Self, ConfigError> {
        if components.is_empty() {
            return Err(ConfigError::MissingSection {
                section: "[[reward]]",
                example: "type = \"exact_match\"",
            });
        }
        if components.len() > COMPONENTS_MAX {
            return Err(ConfigError::bad_value(
                "reward",
                format!("a list of {}", components.len()),
                format!("but at most {COMPONENTS_MAX} can be composed: merge some"),
            )
            .in_section("the configuration"));
        }
        let mut names = BTreeSet::new();
        if let Some(twin) = components.iter().find(|part| !names.insert(&part.name)) {
            let name = twin.name.clone();
            return Err(ConfigError::DuplicateName { name });
        }
        if components.iter().all(|component| component.weight == 0.0) {
            return Err(ConfigError::NoWeight);
        }
        Ok(Self { components })
    }

    /// The interval that every total lies in.
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

    /// Scores one answer.
    ///
    /// # Errors
    /// A function cannot compare with this gold answer; [`Reward::check_gold`] finds that out ahead of time.
    pub fn score(&self, answer: &Answer<'_>, gold: &str) -> Result<Score, GoldError> {
        let mut total = 0.0;
        let mut components = Vec::with_capacity(self.components.len());
        for component in &self.components {
            let value = component.value(answer, gold)?;
            debug_assert!(
                component.function.range().contains(value),
                "a value lies in its function's range: {} gave {value}",
                component.name
            );
            total += component.weight * value;
            components.push(ComponentScore {
                name: component.name.clone(),
                value,
            });
        }
        debug_assert!(
            self.range().contains(total) && (total as f32).is_finite(),
            "a total is finite and lies in the declared range: {total}"
        );
        Ok(Score { total, components })
    }

    /// Checks that every function can compare with this gold answer.
    ///
    /// # Errors
    /// The first function that cannot.
    pub(crate) fn check_gold(&self, gold: &str) -> Result<(), GoldError> {
        // Functions check the gold answer before they look at the text, so an empty text is enough.
        let empty = Answer {
            prompt: "",
            text: "",
            finished: true,
            tokens: 0,
        };
        self.score(&empty, gold).map(drop)
    }

    /// Whether a function counts tokens, so that an answer of unknown length in tokens cannot be scored.
    pub(crate) fn counts_tokens(&self) -> bool {
        let mut functions = self.components.iter().map(Component::function);
        functions.any(|function| function.counts_tokens())
    }

    /// The configuration in plain sentences, one for each component and one for the total.
    pub(crate) fn explain(&self) -> Vec<String> {
        let mut sentences: Vec<String> = self.components.iter().map(Component::explain).collect();
        let range = self.range();
        sentences.push(format!("the total is the weighted sum and lies in {range}"));
        sentences
    }

    pub(crate) fn components(&self) -> &[Component] {
        &self.components
    }
}

#[cfg(test)]
mod tests;
