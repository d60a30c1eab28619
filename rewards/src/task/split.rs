//! The split of a prompt, from a hash of its own text: adding prompts to a task never moves one from training into the
//! held-out split.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::tagged::ConfigError;

/// The use of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// Warm-up and RL.
    Train,
    /// Decisions along the way, such as the end of the warm-up.
    Development,
    /// The reported accuracy; no decision uses it.
    HeldOut,
}

impl Split {
    pub const ALL: [Self; 3] = [Self::Train, Self::Development, Self::HeldOut];
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Train => "train",
            Self::Development => "development",
            Self::HeldOut => "held-out",
        })
    }
}

/// How a task's prompts are divided into splits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Partition {
    /// Share of all prompts, from 0, below 1.
    pub(crate) held_out_fraction: f64,
    /// Share of all prompts, from 0, below 1.
    pub(crate) development_fraction: f64,
    pub(crate) seed: u64,
}

impl Partition {
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        for (key, value) in [
            ("held_out_fraction", self.held_out_fraction),
            ("dev_fraction", self.development_fraction),
        ] {
            if !(0.0..1.0).contains(&value) {
                return Err(ConfigError::bad_value(
                    key,
                    value,
                    "but a share must be at least 0 and below 1",
                ));
            }
        }
        if self.held_out_fraction + self.development_fraction >= 1.0 {
            return Err(ConfigError::bad_value(
                "held_out_fraction",
                self.held_out_fraction,
                format!(
                    "which with dev_fraction {} leaves nothing to train on: lower one of them",
                    self.development_fraction
                ),
            ));
        }
        Ok(())
    }

    /// The split of a prompt. Runs of white space count as one space: two prompts that differ in nothing else must not end
    /// up on both sides of the held-out border.
    pub(crate) fn split(&self, prompt: &str) -> Split {
        let words: Vec<&str> = prompt.split_whitespace().collect();
        let text = words.join(" ");
        let draw = hash_u64("muster task split v1", self.seed, text.as_bytes());
        let held_out_below = threshold(self.held_out_fraction);
        let development_below = threshold(self.held_out_fraction + self.development_fraction);
        if draw < held_out_below {
            Split::HeldOut
        } else if draw < development_below {
            Split::Development
        } else {
            Split::Train
        }
    }

    /// The sort key of a prompt within its split.
    pub(crate) fn order(&self, prompt: &str) -> u64 {
        hash_u64("muster task order v1", self.seed, prompt.as_bytes())
    }

    /// The share of a split, and the keys of `[task]` that set it.
    pub(crate) fn share(&self, split: Split) -> (f64, &'static str) {
        match split {
            Split::Train => (
                1.0 - (self.held_out_fraction + self.development_fraction),
                "`held_out_fraction` or `dev_fraction`",
            ),
            Split::Development => (
                self.development_fraction,
                "`dev_fraction` (0 leaves the split out) or `seed`",
            ),
            Split::HeldOut => (self.held_out_fraction, "`held_out_fraction` or `seed`"),
        }
    }
}

/// `share` of the range of a u64.
fn threshold(share: f64) -> u64 {
    // 2^64 is exact in f64 and the cast saturates, so every machine computes the same number.
    (share * 18_446_744_073_709_551_616.0) as u64
}

fn hash_u64(context: &'static str, seed: u64, bytes: &[u8]) -> u64 {
    let mut hasher = blake3::Hasher::new_derive_key(context);
    hasher.update(&seed.to_le_bytes());
    hasher.update(bytes);
    let mut first = [0; 8];
    hasher.finalize_xof().fill(&mut first);
    u64::from_le_bytes(first)
}
