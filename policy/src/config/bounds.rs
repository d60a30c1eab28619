//! Bounds on the numbers of a configuration, and checks whose errors name the key.

use std::ops::RangeInclusive;

use super::error::ModelConfigError;

/// Largest width or head count: far above any open model, and small enough that products of a few sizes fit 64 bits.
pub(super) const SIZE_MAX: usize = 1 << 20;

/// Largest vocabulary: sixteen times the largest published one.
pub(super) const VOCAB_MAX: usize = 1 << 22;

/// Most positions: twice the longest context of an open model.
pub(super) const POSITIONS_MAX: usize = 1 << 21;

/// Most layers: the deepest open decoders have about 130.
pub(crate) const LAYERS_MAX: usize = 1 << 10;

/// Most tokens that end an answer: published files have up to five.
pub(super) const EOS_IDS_MAX: usize = 1 << 10;

pub(super) fn check_size(
    key: &'static str,
    value: usize,
    max: usize,
) -> Result<(), ModelConfigError> {
    if (1..=max).contains(&value) {
        Ok(())
    } else {
        Err(ModelConfigError::Size { key, value, max })
    }
}

/// `expected` describes `range` in words.
pub(super) fn check_number(
    key: &'static str,
    value: f64,
    range: RangeInclusive<f64>,
    expected: &'static str,
) -> Result<(), ModelConfigError> {
    if range.contains(&value) {
        Ok(())
    } else {
        Err(ModelConfigError::Number {
            key,
            value,
            expected,
        })
    }
}

pub(super) fn check_divisible(
    key: &'static str,
    value: usize,
    divisor_key: &'static str,
    divisor: usize,
) -> Result<(), ModelConfigError> {
    if value.is_multiple_of(divisor) {
        Ok(())
    } else {
        Err(ModelConfigError::Indivisible {
            key,
            value,
            divisor_key,
            divisor,
        })
    }
}
