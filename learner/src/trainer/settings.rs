//! What the configuration tells the trainer.

use super::objects::BroadcastConfig;
use crate::advantage::AdvantageConfig;
use crate::resolver::ResolveConfig;

/// The part of the configuration that the trainer reads.
#[derive(Debug, Clone, Copy)]
pub struct TrainerSettings {
    /// Groups per batch, B.
    pub batch_groups: usize,
    /// Steps of the run.
    pub steps: u64,
    /// Steps between two full states, each with a checkpoint folder.
    pub checkpoint_every: u64,
    pub advantage: AdvantageConfig,
    pub broadcast: BroadcastConfig,
}

impl TrainerSettings {
    pub(super) fn resolve_config(&self, async_level: u64) -> ResolveConfig {
        ResolveConfig {
            batch_groups: self.batch_groups,
            async_level,
            advantage: self.advantage,
        }
    }
}
