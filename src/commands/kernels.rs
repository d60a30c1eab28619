//! `--kernels`: the operations that compute, and the numeric class of their answers.

use anyhow::{Result, bail};
use clap::ValueEnum;

use muster_policy::{Device, KernelSet};
use muster_protocol::message::lease::NumericClass;

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
    /// The fastest kernels of the device that do not round weights.
    pub(super) fn for_device(device: &Device) -> Self {
        match device.is_cpu() {
            true => Self::Fused,
            false => Self::Candle,
        }
    }

    pub(super) fn set(self) -> KernelSet {
        match self {
            Self::Fused => KernelSet::Fused,
            Self::Int8 => KernelSet::Int8,
            Self::Candle => KernelSet::Candle,
        }
    }

    /// The class of answers computed with these kernels on `device`.
    ///
    /// # Errors
    /// The kernels do not run on `device`.
    pub(super) fn class(self, device: &Device) -> Result<NumericClass> {
        Ok(match (self, device.is_cpu()) {
            (Self::Fused | Self::Candle, true) => NumericClass::F32Cpu,
            (Self::Int8, true) => NumericClass::Int8Cpu,
            (Self::Candle, false) => NumericClass::F32Cuda,
            (Self::Fused | Self::Int8, false) => {
                bail!(
                    "`--kernels fused` and `int8` run on the CPU only: leave out `--kernels` on this device"
                )
            }
        })
    }
}
