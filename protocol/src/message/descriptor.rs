//! A run's descriptor: everything that two machines must agree on before they can compare their numbers. The learner signs
//! it; every ticket, version and batch names its hash.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::lease::NumericClass;
use super::ticket::SamplingRules;
use super::{at_most, bytes_at_most, number_at_most, short_text};
use crate::envelope::{Invalid, Kind, Statement};
use crate::id::{ContentHash, DescriptorHash, PeerId, PolicyVersion};
use crate::limits::{GROUP_SIZE_MAX, STATEMENT_BYTES_MAX};

/// Longest reward configuration, in bytes.
pub(crate) const REWARDS_BYTES_MAX: usize = 32 << 10;

/// How far a check of an honest answer may be off, where the critic computes in the worker's class or in another.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Thresholds {
    /// Largest cumulative-distribution error of a position, accepted.
    pub draw_error_max: f64,
    /// Mean cumulative-distribution error of a rollout, accepted.
    pub draw_error_mean: f64,
    /// Above this error a critic rejects the group; between the two bounds the group is grey.
    pub draw_error_reject: f64,
    /// Largest |difference| of a log-prob in nats, accepted.
    pub logprob_error_max: f64,
}

impl Thresholds {
    /// Within one class: decoding and a teacher-forced forward pass agree to f32 rounding (measured 4e-6 nats).
    pub const SAME_CLASS: Self = Self {
        draw_error_max: 1e-4,
        draw_error_mean: 1e-4,
        draw_error_reject: 1e-4,
        logprob_error_max: 1e-3,
    };

    /// Between classes: a first value, to calibrate from a run's own audits.
    pub const CROSS_CLASS: Self = Self {
        draw_error_max: 0.02,
        draw_error_mean: 0.001,
        draw_error_reject: 0.05,
        logprob_error_max: 0.1,
    };
}

/// Everything that a run's machines agree on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Descriptor {
    /// BLAKE3 of `config.json`.
    pub architecture: ContentHash,
    /// BLAKE3 of `tokenizer.json`.
    pub tokenizer: ContentHash,
    /// BLAKE3 of the chat template, if the model has one.
    pub chat_template: Option<ContentHash>,
    /// BLAKE3 of the task's configuration and data.
    pub task: ContentHash,
    /// The reward configuration (JSON) that critics compute with.
    pub rewards: String,
    pub sampling: SamplingRules,
    pub group_size: u32,
    /// Largest staleness admitted, in steps.
    pub async_level: u64,
    /// Where worker and critic compute in one class.
    pub same_class: Thresholds,
    /// Where they compute in two classes.
    pub cross_class: Thresholds,
    /// Every token id is below it.
    pub vocabulary: u32,
    /// The classes that a worker may compute in.
    pub classes: Vec<NumericClass>,
    /// Signs descriptors, versions and batches.
    pub learner: PeerId,
    /// Signs tickets and leases.
    pub dispatch: PeerId,
    /// The first step under this descriptor.
    pub from_step: PolicyVersion,
    /// Labels for people, such as the names of model and task.
    pub labels: BTreeMap<String, String>,
}

impl Statement for Descriptor {
    const KIND: Kind = Kind::Descriptor;
    const BYTES_MAX: usize = STATEMENT_BYTES_MAX;

    fn validate(&self) -> Result<(), Invalid> {
        bytes_at_most("rewards", self.rewards.len(), REWARDS_BYTES_MAX)?;
        number_at_most("group_size", self.group_size, GROUP_SIZE_MAX)?;
        at_most("classes", self.classes.len(), 16)?;
        at_most("labels", self.labels.len(), 32)?;
        for (key, value) in &self.labels {
            short_text("labels", key)?;
            short_text("labels", value)?;
        }
        self.sampling.validate()
    }
}

/// A descriptor's name: BLAKE3 of its signed envelope.
pub fn descriptor_hash(envelope: &[u8]) -> DescriptorHash {
    DescriptorHash(*blake3::hash(envelope).as_bytes())
}
