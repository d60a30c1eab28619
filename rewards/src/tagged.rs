//! TOML tables whose `type` decides which keys they may hold: `[task]` and each `[[reward]]`. Errors name the section, the
//! key and the way out. serde's own tags (with or without `serde_path_to_error`) name no section, suggest no near key,
//! and cannot refuse unknown keys in a table that shares some keys between types. Invariant: no key of an accepted table
//! was ignored.

use serde::de::value::Error as ValueError;
use serde::de::{DeserializeOwned, Deserializer, Error as _, Visitor};
use serde::forward_to_deserialize_any;
use toml::Table;

/// Why a task or reward configuration is refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ConfigError {
    #[error("the configuration is not TOML at line {line}: {reason}")]
    Syntax { line: usize, reason: String },
    #[error("the configuration has no {section}: add it, for example with `{example}`")]
    MissingSection {
        section: &'static str,
        example: &'static str,
    },
    #[error("{section} has no `type`: add one of {known}")]
    MissingType { section: String, known: String },
    #[error("{section} has the unknown type `{found}`{hint}: the types are {known}")]
    UnknownType {
        section: String,
        found: String,
        /// `, did you mean …` or empty.
        hint: String,
        known: String,
    },
    #[error("{section} has the unknown key `{key}`{hint}: its keys are {known}")]
    UnknownKey {
        section: String,
        key: String,
        /// `, did you mean …` or empty.
        hint: String,
        known: String,
    },
    /// A value has the wrong type, or a key is missing.
    #[error("{section}: {reason}")]
    Mistyped { section: String, reason: String },
    /// A value has the right type and lies outside its limits.
    #[error("{section}: `{key}` is {value}, {rule}")]
    BadValue {
        section: String,
        key: &'static str,
        value: String,
        /// A clause with the limits.
        rule: String,
    },
    #[error("two rewards are named `{name}`: give one of them another `name`")]
    DuplicateName { name: String },
    #[error("every reward has weight 0, so nothing is paid: give at least one a weight above 0")]
    NoWeight,
}

impl ConfigError {
    /// A [`ConfigError::BadValue`]; the caller that knows the section adds it with [`ConfigError::in_section`].
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

    /// Fills in the section of a [`ConfigError::BadValue`] that has none.
    pub(crate) fn in_section(mut self, named: &str) -> Self {
        if let Self::BadValue { section, .. } = &mut self
            && section.is_empty()
        {
            named.clone_into(section);
        }
        self
    }
}

/// One value of `type` and the reader of the table's other keys.
pub(crate) struct TableType<T> {
    pub(crate) name: &'static str,
    pub(crate) read: ReadTable<T>,
}

/// Reads the keys of one type, given the section's name and the keys that are shared between types.
pub(crate) type ReadTable<T> = fn(Table, &str, &[&'static str]) -> Result<T, ConfigError>;

/// Declares an enum of configurations, one variant for each value of `type`. All that depends on the list of types is
/// generated from it: the enum, how it is read (`TYPES`) and written, and access through the trait that every
/// configuration implements.
macro_rules! tagged_enum {
    (
        $(#[$attribute:meta])*
        $visibility:vis enum $name:ident: $trait:path {
            $($(#[$doc:meta])* $type_name:literal => $variant:ident($config:ty),)+
        }
    ) => {
        $(#[$attribute])*
        #[derive(Debug, Clone, PartialEq, serde::Serialize)]
        #[serde(tag = "type")]
        $visibility enum $name {
            $($(#[$doc])* #[serde(rename = $type_name)] $variant($config),)+
        }

        impl $name {
            pub(crate) const TYPES: &'static [$crate::tagged::TableType<Self>] = &[
                $($crate::tagged::TableType {
                    name: $type_name,
                    read: |table, section, shared_keys| {
                        $crate::tagged::read(table, section, shared_keys).map(Self::$variant)
                    },
                },)+
            ];

            pub(crate) fn config(&self) -> &dyn $trait {
                match self {
                    $(Self::$variant(config) => config,)+
                }
            }
        }
    };
}
pub(crate) use tagged_enum;

/// Takes `type` out of the table and finds it among `types`.
pub(crate) fn take_type<T>(
    table: &mut Table,
    section: &str,
    types: &'static [TableType<T>],
) -> Result<&'static TableType<T>, ConfigError> {
    let names = || types.iter().map(|known| known.name);
    let found = match table.remove("type") {
        None => {
            return Err(ConfigError::MissingType {
                section: section.to_owned(),
                known: quoted(names()),
            });
        }
        Some(toml::Value::String(text)) => text,
        Some(other) => other.to_string(),
    };
    let known = types.iter().find(|known| known.name == found);
    known.ok_or_else(|| ConfigError::UnknownType {
        section: section.to_owned(),
        hint: did_you_mean(&found, names()),
        found: shortened(&found),
        known: quoted(names()),
    })
}

/// Reads the rest of a table; refuses keys that are neither fields of `T` nor in `shared_keys`.
pub(crate) fn read<T: DeserializeOwned>(
    table: Table,
    section: &str,
    shared_keys: &[&'static str],
) -> Result<T, ConfigError> {
    let own_keys = field_names::<T>();
    if let Some(key) = table.keys().find(|key| !own_keys.contains(&key.as_str())) {
        let known = || {
            let named = ["type"].iter().chain(shared_keys).chain(own_keys);
            named.copied()
        };
        return Err(ConfigError::UnknownKey {
            section: section.to_owned(),
            key: shortened(key),
            hint: did_you_mean(key, known()),
            known: quoted(known()),
        });
    }
    table.try_into().map_err(|error| ConfigError::Mistyped {
        section: section.to_owned(),
        reason: one_sentence(&error),
    })
}

/// A `toml` error on one line: its message and the key, without the excerpt of the source.
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

/// The fields of a struct, taken from its own `Deserialize`, so that no second list can fall behind.
fn field_names<T: DeserializeOwned>() -> &'static [&'static str] {
    let mut fields: &'static [&'static str] = &[];
    // FieldNames always stops the visit with an error, as soon as it knows the fields.
    let stopped = T::deserialize(FieldNames(&mut fields)).err();
    debug_assert!(
        stopped.is_some(),
        "a configuration is read as a struct with named fields"
    );
    fields
}

struct FieldNames<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for FieldNames<'_> {
    type Error = ValueError;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, ValueError> {
        Err(ValueError::custom("only the field names are needed"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, ValueError> {
        *self.0 = fields;
        Err(ValueError::custom("only the field names are needed"))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

/// `` `a`, `b`, `c` ``
pub(crate) fn quoted<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let quoted = names.into_iter().map(|name| format!("`{name}`"));
    quoted.collect::<Vec<_>>().join(", ")
}

/// Foreign text for an error message: at most 60 characters, on one line.
pub(crate) fn shortened(text: &str) -> String {
    const CHARS_MAX: usize = 60;
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    let mut short: String = text.chars().take(CHARS_MAX).map(plain).collect();
    if text.chars().nth(CHARS_MAX).is_some() {
        short.push('…');
    }
    short
}

/// `, did you mean …` for the nearest known word, or empty if no word is near.
fn did_you_mean<'a>(found: &str, known: impl Iterator<Item = &'a str>) -> String {
    // A longer word is near to no key, and the distance would cost the product of both lengths.
    if found.is_empty() || found.len() > 64 {
        return String::new();
    }
    let near = known
        .filter_map(|name| closeness(found, name).map(|distance| (distance, name)))
        .min();
    near.map_or_else(String::new, |(_, name)| format!(", did you mean `{name}`"))
}

/// The edit distance, if `found` may be a misspelling of `name` or one word contains the other.
fn closeness(found: &str, name: &str) -> Option<usize> {
    let distance = strsim::levenshtein(found, name);
    // A transposition costs 2. If every letter must change, it is another word.
    let slips_max = (name.len() / 3).max(2).min(found.len() - 1);
    let contained = found.len() >= 3 && (name.contains(found) || found.contains(name));
    (distance <= slips_max || contained).then_some(distance)
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
