//! A ticket: a prompt and how to answer it. Dispatch writes it; it travels inside leases.

use serde::{Deserialize, Serialize};

use super::{at_most, bytes_at_most, finite, number_at_most, some_of};
use crate::envelope::{Invalid, Kind, Statement};
use crate::id::{DescriptorHash, PolicyVersion, TicketId, UnixMillis};
use crate::limits::{
    GROUP_SIZE_MAX, ROLLOUT_TOKENS_MAX, STATEMENT_BYTES_MAX, STOP_IDS_MAX, STOP_STRING_BYTES_MAX,
    STOP_STRINGS_MAX,
};

/// How tokens are sampled. Temperature only: under a top-k or top-p mask another machine's rounding may exclude an honest
/// token, so that a check would reject an honest worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SamplingRules {
    /// Divides the logits. In (0, 10].
    pub temperature: f32,
    /// Longest answer in tokens, the stop id included.
    pub tokens_max: u32,
    /// Token ids that end an answer.
    pub stop_ids: Vec<u32>,
    /// Texts that end an answer with the token that completes one of them, wherever token boundaries lie.
    pub stop_strings: Vec<String>,
}

impl SamplingRules {
    /// Checks ranges.
    ///
    /// # Errors
    /// Names the first field out of its range.
    pub fn validate(&self) -> Result<(), Invalid> {
        finite("temperature", self.temperature)?;
        if self.temperature <= 0.0 || self.temperature > 10.0 {
            return Err(Invalid::new(
                "temperature",
                format!("is {}, outside (0, 10]", self.temperature),
            ));
        }
        if self.tokens_max == 0 || self.tokens_max as usize > ROLLOUT_TOKENS_MAX {
            let problem = format!("is {}, outside 1..={ROLLOUT_TOKENS_MAX}", self.tokens_max);
            return Err(Invalid::new("tokens_max", problem));
        }
        at_most("stop_strings", self.stop_strings.len(), STOP_STRINGS_MAX)?;
        for string in &self.stop_strings {
            if string.is_empty() {
                return Err(Invalid::new("stop_strings", "hold an empty text"));
            }
            bytes_at_most("stop_strings", string.len(), STOP_STRING_BYTES_MAX)?;
        }
        at_most("stop_ids", self.stop_ids.len(), STOP_IDS_MAX)?;
        if self.stop_ids.is_empty() && self.stop_strings.is_empty() {
            return Err(Invalid::new(
                "stop_ids",
                "are empty, and so are stop_strings",
            ));
        }
        Ok(())
    }
}

/// A prompt for workers to answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ticket {
    pub id: TicketId,
    pub descriptor: DescriptorHash,
    /// Index of the prompt in the training split. The gold answer stays with dispatch.
    pub item: u64,
    /// The prompt as token ids.
    pub prompt: Vec<u32>,
    /// Number of rollouts.
    pub group_size: u32,
    pub sampling: SamplingRules,
    /// The oldest version that a lease may name.
    pub oldest_version: PolicyVersion,
    pub deadline: UnixMillis,
}

impl Ticket {
    /// Checks lengths and ranges.
    ///
    /// # Errors
    /// Names the first field out of its range.
    pub fn check(&self) -> Result<(), Invalid> {
        some_of("prompt", self.prompt.len(), ROLLOUT_TOKENS_MAX)?;
        number_at_most("group_size", self.group_size, GROUP_SIZE_MAX)?;
        if self.group_size == 0 {
            return Err(Invalid::new("group_size", "is zero"));
        }
        self.sampling.validate()
    }
}

impl Statement for Ticket {
    const KIND: Kind = Kind::Ticket;
    const BYTES_MAX: usize = STATEMENT_BYTES_MAX;

    fn validate(&self) -> Result<(), Invalid> {
        self.check()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn sampling_rules_without_an_end_or_with_too_long_stop_strings_are_refused() {
        let rules = SamplingRules {
            stop_ids: Vec::new(),
            stop_strings: vec!["###".to_owned()],
            ..testing::sampling()
        };
        assert_eq!(rules.validate(), Ok(()));
        for stop_strings in [
            Vec::new(),
            vec![String::new()],
            vec!["a".repeat(STOP_STRING_BYTES_MAX + 1)],
            vec!["a".to_owned(); STOP_STRINGS_MAX + 1],
        ] {
            let broken = SamplingRules {
                stop_strings,
                ..rules.clone()
            };
            assert!(broken.validate().is_err(), "{broken:?}");
        }
    }
}
