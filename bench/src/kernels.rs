//! `--kernels`: the kernel set under measurement.

use clap::ValueEnum;
use muster_policy::KernelSet;

/// A kernel set as the command line names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Kernels {
    /// Weights as they are stored
    Fused,
    /// Weights rounded to eight bits
    Int8,
    /// Candle's operations
    Candle,
}

impl Kernels {
    pub(super) fn set(self) -> KernelSet {
        match self {
            Self::Fused => KernelSet::Fused,
            Self::Int8 => KernelSet::Int8,
            Self::Candle => KernelSet::Candle,
        }
    }
}
