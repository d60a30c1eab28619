//! Chooses the objects that carry a version's weights: a delta from the version before while it is much smaller than the
//! weights, and the whole weights (an anchor) every few versions, so that a newcomer fetches few objects.

use std::num::{NonZeroU64, NonZeroUsize};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use muster_broadcaster::codec::delta;
use muster_broadcaster::store::object::describe_object;
use muster_broadcaster::version::state::describe_state;
use muster_protocol::id::{PolicyVersion, StateRoot};
use muster_protocol::message::version::{Content, Object, Parameter, Part, state_root};

use super::error::TrainerError;

/// Most versions from one anchor to the next: a version is announced with all objects since the anchor, and an announcement
/// holds at most sixteen, the files included.
const ANCHOR_EVERY_MAX: u64 = 10;

const ANCHOR_EVERY: NonZeroU64 = NonZeroU64::new(8).unwrap();

/// `[learner.broadcast]`: how versions are offered.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BroadcastConfig {
    /// Versions from one anchor to the next, at most 10. 8: a newcomer fetches the anchor and seven deltas at most, which
    /// together are a few percent of it.
    pub anchor_every: NonZeroU64,
    /// A delta larger than this share of the weights is replaced by an anchor. 0.25: a chain of such deltas would cost a
    /// newcomer as much as another anchor.
    pub delta_fraction_max: f64,
    /// Weights of fewer bytes have no deltas. 4 MiB: they are sent in less time than a delta saves.
    pub delta_image_bytes_min: u64,
}

impl Default for BroadcastConfig {
    fn default() -> Self {
        Self {
            anchor_every: ANCHOR_EVERY,
            delta_fraction_max: 0.25,
            delta_image_bytes_min: 4 << 20,
        }
    }
}

/// Why `[learner.broadcast]` is refused.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum BroadcastConfigError {
    #[error(
        "`anchor_every` is {0}, at most {ANCHOR_EVERY_MAX} is possible: choose a smaller number"
    )]
    AnchorEvery(NonZeroU64),
    #[error("`delta_fraction_max` is {0}, outside 0 to 1: choose a share of the weights' size")]
    DeltaFraction(f64),
}

impl BroadcastConfig {
    /// Checks the values.
    ///
    /// # Errors
    /// Names the first value out of range.
    pub fn validate(&self) -> Result<(), BroadcastConfigError> {
        if self.anchor_every.get() > ANCHOR_EVERY_MAX {
            return Err(BroadcastConfigError::AnchorEvery(self.anchor_every));
        }
        if !(0.0..=1.0).contains(&self.delta_fraction_max) {
            return Err(BroadcastConfigError::DeltaFraction(self.delta_fraction_max));
        }
        Ok(())
    }
}

/// The objects of a version's weights, with their bytes.
#[derive(Debug)]
pub(super) struct Described {
    pub(super) parameters: Vec<Parameter>,
    pub(super) part: Part,
    pub(super) anchor: Option<(Object, Bytes)>,
    pub(super) delta: Option<(Object, Bytes)>,
}

/// Describes `weights`, a safetensors file, as a delta from `parent` if that is small enough, and as an anchor if it is not
/// or `since_anchor` has reached the configured number.
pub(super) fn describe_weights(
    version: PolicyVersion,
    weights: &Bytes,
    parent: Option<(StateRoot, Bytes)>,
    since_anchor: u64,
    config: BroadcastConfig,
) -> Result<Described, TrainerError> {
    let failed = |error: &dyn std::fmt::Display| TrainerError::Announce(error.to_string());
    let (parameters, part) = describe_state(weights).map_err(|error| failed(&error))?;
    let to = state_root(&[part]);
    let described = |content, bytes: Bytes| {
        let object = describe_object(content, version, &bytes).map_err(|error| failed(&error))?;
        Ok::<_, TrainerError>((object, bytes))
    };
    let delta = match parent {
        Some((from, parent)) if from != to => {
            let content = Content::Delta { from, to };
            let bytes = delta_from(&parent, weights, config);
            bytes.map(|bytes| described(content, bytes)).transpose()?
        }
        _ => None,
    };
    let anchor = if delta.is_none() || since_anchor >= config.anchor_every.get() {
        Some(described(Content::Anchor { root: to }, weights.clone())?)
    } else {
        None
    };
    Ok(Described {
        parameters,
        part,
        anchor,
        delta,
    })
}

/// A delta, if it is small enough to save bytes.
fn delta_from(parent: &Bytes, weights: &Bytes, config: BroadcastConfig) -> Option<Bytes> {
    if parent.is_empty() || (weights.len() as u64) < config.delta_image_bytes_min {
        return None;
    }
    let threads = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    match delta::encode(parent, weights, threads) {
        Ok(delta) => {
            let share = delta.bytes.len() as f64 / weights.len() as f64;
            (share <= config.delta_fraction_max).then(|| delta.bytes.into())
        }
        Err(error) => {
            tracing::warn!(%error, "no delta could be made");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of one tensor of 4,096 bf16 weights, of which `moved` differ from an older file's.
    fn weights(moved: usize) -> Bytes {
        let header = br#"{"w":{"dtype":"BF16","shape":[4096],"data_offsets":[0,8192]}}"#;
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header);
        let weight = |i: usize| 0x3c00 + (i * 31 % 700) as u16 + u16::from(i < moved);
        file.extend((0..4_096).flat_map(|i| weight(i).to_le_bytes()));
        file.into()
    }

    fn described(parent: Option<usize>, moved: usize, since: u64) -> (bool, bool) {
        let config = BroadcastConfig {
            delta_image_bytes_min: 0,
            ..BroadcastConfig::default()
        };
        let parent = parent.map(|moved| {
            let (_, part) = describe_state(&weights(moved)).unwrap();
            (state_root(&[part]), weights(moved))
        });
        let made = describe_weights(PolicyVersion(3), &weights(moved), parent, since, config);
        let made = made.unwrap();
        (made.anchor.is_some(), made.delta.is_some())
    }

    #[test]
    fn the_first_version_is_an_anchor_and_the_next_ones_deltas_until_the_next_anchor() {
        assert_eq!(described(None, 0, 0), (true, false));
        assert_eq!(described(Some(0), 40, 1), (false, true));
        assert_eq!(described(Some(0), 40, 7), (false, true));
        assert_eq!(described(Some(0), 40, 8), (true, true));
    }

    #[test]
    fn weights_that_did_not_change_are_an_anchor_since_no_delta_leads_from_a_state_to_itself() {
        assert_eq!(described(Some(0), 0, 1), (true, false));
    }

    #[test]
    fn small_weights_and_large_deltas_are_sent_as_anchors() {
        let delta = |config| delta_from(&weights(0), &weights(2_000), config).is_some();
        let config = BroadcastConfig::default();
        assert!(!delta(config));
        let config = BroadcastConfig {
            delta_image_bytes_min: 0,
            ..config
        };
        assert!(delta(config));
        let config = BroadcastConfig {
            delta_fraction_max: 0.001,
            ..config
        };
        assert!(!delta(config));
    }

    #[test]
    fn a_configuration_that_cannot_be_announced_is_refused() {
        let mut config = BroadcastConfig::default();
        config.validate().unwrap();
        config.anchor_every = NonZeroU64::new(11).unwrap();
        let refused = config.validate().unwrap_err().to_string();
        assert!(
            refused.contains("11") && refused.contains("10"),
            "{refused}"
        );
        config = BroadcastConfig {
            delta_fraction_max: f64::NAN,
            ..BroadcastConfig::default()
        };
        assert!(config.validate().is_err());
    }
}
