//! A TOML table whose `type` says which keys it may hold (`[task]`, each `[[reward]]`), read so that a mistake is named
//! together with the way out. serde alone would say "unknown field" without the section, and cannot refuse unknown keys
//! in a table that shares some keys between types. Invariant: a table that is accepted had no key that was ignored.

use serde::de::value::Error as ValueError;
use serde::de::{DeserializeOwned, Deserializer, Error as _, Visitor};
use serde::forward_to_deserialize_any;
use toml::Table;

/// Why a task or reward configuration is refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ConfigError {
    /// The text is no TOML at all.
    #[error("the configuration is not TOML at line {line}: {reason}")]
    Syntax {
        /// Line of the mistake, from 1.
        line: usize,
        /// What the parser found.
        reason: String,
    },
    /// A whole section is absent.
    #[error("the configuration has no {section}: add it, for example with `{example}`")]
    MissingSection {
        /// The section as it is written in TOML.
        section: &'static str,
        /// A line of it that would do.
        example: &'static str,
    },
    /// A tagged table without its tag.
    #[error("{section} has no `type`: add one of {known}")]
    MissingType {
        /// The table, as a person would name it.
        section: String,
        /// The types there are.
        known: String,
    },
    /// A tag nobody knows.
    #[error("{section} has the unknown type `{found}`{hint}: the types are {known}")]
    UnknownType {
        /// The table.
        section: String,
        /// What was written.
        found: String,
        /// `, did you mean …` or nothing.
        hint: String,
        /// The types there are.
        known: String,
    },
    /// A key that would have been ignored.
    #[error("{section} has the unknown key `{key}`{hint}: its keys are {known}")]
    UnknownKey {
        /// The table.
        section: String,
        /// What was written.
        key: String,
        /// `, did you mean …` or nothing.
        hint: String,
        /// The keys there are.
        known: String,
    },
    /// A value of the wrong type, or a key that is missing.
    #[error("{section}: {reason}")]
    Mistyped {
        /// The table.
        section: String,
        /// What serde said, with the key.
        reason: String,
    },
    /// A value of the right type outside its limits.
    #[error("{section}: `{key}` is {value}, {rule}")]
    BadValue {
        /// The table.
        section: String,
        /// The key.
        key: &'static str,
        /// What was written.
        value: String,
        /// What it must be.
        rule: String,
    },
    /// Two components would report under one name.
    #[error("two rewards are named `{name}`: give one of them another `name`")]
    DuplicateName {
        /// The name both have.
        name: String,
    },
    /// Nothing would ever be paid.
    #[error("every reward has weight 0, so nothing is paid: give at least one a weight above 0")]
    NoWeight,
}

impl ConfigError {
    /// A value of the right type outside its limits.
    pub(crate) fn bad_value(
        key: &'static str,
        value: impl ToString,
        rule: impl Into<String>,
    ) -> Self {
        Self::BadValue {
            section: String::new(),
            key,
            value: value.to_string(),
            rule: rule.into(),
        }
    }

    /// The same error, said of `named`: a function's own checks do not know which table they sit in.
    pub(crate) fn in_section(self, named: &str) -> Self {
        match self {
            Self::BadValue {
                section,
                key,
                value,
                rule,
            } if section.is_empty() => Self::BadValue {
                section: named.to_owned(),
                key,
                value,
                rule,
            },
            other => other,
        }
    }
}

/// Takes `type` out of the table; it must be one of `known`.
pub(crate) fn take_type(
    table: &mut Table,
    section: &str,
    known: &[&'static str],
) -> Result<&'static str, ConfigError> {
    let found = match table.remove("type") {
        None => {
            return Err(ConfigError::MissingType {
                section: section.to_owned(),
                known: quoted(known),
            });
        }
        Some(toml::Value::String(text)) => text,
        Some(other) => other.to_string(),
    };
    match known.iter().find(|name| **name == found) {
        Some(name) => Ok(name),
        None => Err(ConfigError::UnknownType {
            section: section.to_owned(),
            hint: did_you_mean(&found, known),
            found: shortened(&found),
            known: quoted(known),
        }),
    }
}

/// Reads what is left of a table; keys that `T` does not have are refused.
pub(crate) fn read<T: DeserializeOwned>(
    table: Table,
    section: &str,
    shared_keys: &[&'static str],
) -> Result<T, ConfigError> {
    let own_keys = field_names::<T>();
    for key in table.keys() {
        if own_keys.contains(&key.as_str()) {
            continue;
        }
        let mut known: Vec<&'static str> = vec!["type"];
        known.extend(shared_keys);
        known.extend(own_keys);
        return Err(ConfigError::UnknownKey {
            section: section.to_owned(),
            key: shortened(key),
            hint: did_you_mean(key, &known),
            known: quoted(&known),
        });
    }
    table.try_into().map_err(|error| ConfigError::Mistyped {
        section: section.to_owned(),
        reason: one_sentence(&error),
    })
}

/// A `toml` error without its picture of the source, on one line, with the key it is about.
pub(crate) fn one_sentence(error: &toml::de::Error) -> String {
    let message = error.message().trim().replace('\n', " ");
    // Without a span, Display ends in a line "in `key`"; message() leaves it out.
    let shown = error.to_string();
    let key = shown
        .lines()
        .find_map(|line| line.strip_prefix("in `"))
        .map(|rest| rest.trim_end_matches('`'));
    if message.starts_with("missing field") {
        return format!("{message}, which has no default: add it");
    }
    match key {
        Some(key) => format!("`{key}` has an {message}"),
        None => message,
    }
}

/// The fields of a struct, asked from its own `Deserialize`, so that no list beside it can fall behind.
fn field_names<T: DeserializeOwned>() -> &'static [&'static str] {
    let mut fields: &'static [&'static str] = &[];
    // The visit stops on purpose at the first call, once the fields are known: the result is always that error.
    drop(T::deserialize(FieldNames(&mut fields)));
    fields
}

struct FieldNames<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for FieldNames<'_> {
    type Error = ValueError;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, ValueError> {
        Err(ValueError::custom("only the field names are asked for"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, ValueError> {
        *self.0 = fields;
        Err(ValueError::custom("only the field names are asked for"))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

/// `` `a`, `b`, `c` ``
pub(crate) fn quoted(names: &[&str]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    quoted.join(", ")
}

/// Text from a file, cut so that an error stays one line.
pub(crate) fn shortened(text: &str) -> String {
    const CHARS_MAX: usize = 60;
    let plain: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if plain.chars().count() <= CHARS_MAX {
        return plain;
    }
    let start: String = plain.chars().take(CHARS_MAX).collect();
    format!("{start}…")
}

/// `, did you mean …` for the nearest known word, or nothing when none is near.
fn did_you_mean(found: &str, known: &[&str]) -> String {
    // Beyond this, nothing is near and the distance would cost the product of both lengths.
    if found.is_empty() || found.len() > 64 {
        return String::new();
    }
    let near: Option<(usize, &str)> = known
        .iter()
        .filter_map(|name| closeness(found, name).map(|distance| (distance, *name)))
        .min();
    match near {
        Some((_, name)) => format!(", did you mean `{name}`"),
        None => String::new(),
    }
}

/// Edit distance if `found` could be a slip for `name`; a word that is part of the other is near as well.
fn closeness(found: &str, name: &str) -> Option<usize> {
    let distance = edit_distance(found, name);
    // Two slips are one transposition; every letter replaced is another word.
    let slips_max = (name.len() / 3).max(2).min(found.len() - 1);
    let contained = found.len() >= 3 && (name.contains(found) || found.contains(name));
    (distance <= slips_max || contained).then_some(distance)
}

/// Levenshtein distance in characters, one row at a time.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Sample {
        absolute_tolerance: f64,
        seed: u64,
    }

    impl Default for Sample {
        fn default() -> Self {
            Self {
                absolute_tolerance: 0.0,
                seed: 7,
            }
        }
    }

    fn refusal(text: &str) -> String {
        let table: Table = text.parse().unwrap();
        read::<Sample>(table, "reward sample", &["weight"])
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn an_unknown_key_is_named_with_the_nearest_known_one() {
        insta::assert_snapshot!(
            refusal("tolerance = 0.1"),
            @"reward sample has the unknown key `tolerance`, did you mean `absolute_tolerance`: its keys are `type`, `weight`, `absolute_tolerance`, `seed`"
        );
        insta::assert_snapshot!(
            refusal("sede = 1"),
            @"reward sample has the unknown key `sede`, did you mean `seed`: its keys are `type`, `weight`, `absolute_tolerance`, `seed`"
        );
        insta::assert_snapshot!(
            refusal("zzzz = 1"),
            @"reward sample has the unknown key `zzzz`: its keys are `type`, `weight`, `absolute_tolerance`, `seed`"
        );
    }

    #[test]
    fn a_mistyped_value_is_named_with_its_key() {
        insta::assert_snapshot!(
            refusal("seed = \"one\""),
            @r#"reward sample: `seed` has an invalid type: string "one", expected u64"#
        );
    }

    #[test]
    fn an_integer_is_accepted_where_a_float_is_expected() {
        let table: Table = "absolute_tolerance = 1".parse().unwrap();
        let sample: Sample = read(table, "reward sample", &[]).unwrap();
        assert_eq!((sample.absolute_tolerance, sample.seed), (1.0, 7));
    }
}
