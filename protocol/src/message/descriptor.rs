//! A run's descriptor: everything that two machines must agree on before they can trust each other's numbers, signed by
//! the learner and named by its hash in every ticket, verdict and manifest.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::lease::NumericClass;
use super::ticket::SamplingRules;
use super::{at_most, short_text};
use crate::envelope::{Invalid, Kind, Statement};
use crate::id::{ContentHash, DescriptorHash, PeerId, PolicyVersion};
use crate::limits::{GROUP_SIZE_MAX, STATEMENT_BYTES_MAX};

/// Longest reward configuration in a descriptor.
pub const REWARDS_BYTES_MAX: usize = 32 << 10;

/// How far an honest answer of one class may stray under a verifier of the same or another class.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Thresholds {
    /// Largest cumulative-distribution error of a position, accepted.
    pub draw_error_max: f64,
    /// Mean cumulative-distribution error of a rollout, accepted.
    pub draw_error_mean: f64,
    /// Above this largest error a group is rejected; between the two it is grey.
    pub draw_error_reject: f64,
    /// Largest |difference| of a log-prob in nats, accepted.
    pub logprob_error_max: f64,
}

impl Thresholds {
    /// Within one class: decode and teacher-forced forward agree to f32 rounding (measured 4e-6 in nats).
    pub const SAME_CLASS: Self = Self {
        draw_error_max: 1e-4,
        draw_error_mean: 1e-4,
        draw_error_reject: 1e-4,
        logprob_error_max: 1e-3,
    };

    /// Between classes, to start from: `research/verification-incentives.md` §1.9.
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
    /// BLAKE3 of the chat template, where there is one.
    pub chat_template: Option<ContentHash>,
    /// BLAKE3 of the task's configuration and data.
    pub task: ContentHash,
    /// The reward configuration (JSON) that critics compute with.
    pub rewards: String,
    /// How answers are drawn.
    pub sampling: SamplingRules,
    /// Rollouts per group.
    pub group_size: u32,
    /// Largest staleness admitted, in steps.
    pub async_level: u64,
    /// Thresholds where worker and critic are of one class.
    pub same_class: Thresholds,
    /// Thresholds where they are not.
    pub cross_class: Thresholds,
    /// Size of the vocabulary: every token id is below it.
    pub vocabulary: u32,
    /// Classes that may answer.
    pub classes: Vec<NumericClass>,
    /// Who signs descriptors, versions and batches.
    pub learner: PeerId,
    /// Who signs tickets and leases.
    pub dispatch: PeerId,
    /// The step from which it holds.
    pub from_step: PolicyVersion,
    /// Free labels for people (model name, task name).
    pub labels: BTreeMap<String, String>,
}

impl Statement for Descriptor {
    const KIND: Kind = Kind::Descriptor;
    const BYTES_MAX: usize = STATEMENT_BYTES_MAX;

    fn validate(&self) -> Result<(), Invalid> {
        at_most("rewards", self.rewards.len(), REWARDS_BYTES_MAX)?;
        at_most(
            "group_size",
            self.group_size as usize,
            GROUP_SIZE_MAX as usize,
        )?;
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
