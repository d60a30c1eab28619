//! The kinds of attention layers.

use super::error::ModelConfigError;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerType {
    /// Attends to every earlier position.
    Full,
    /// Attends to the last `sliding_window` positions.
    Sliding,
}

impl LayerType {
    /// Full attention in every `period`-th of `layers`, sliding windows in the others.
    pub fn every(period: usize, layers: usize) -> Vec<Self> {
        let layer_type = |layer: usize| {
            if (layer + 1).is_multiple_of(period) {
                Self::Full
            } else {
                Self::Sliding
            }
        };
        (0..layers).map(layer_type).collect()
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Full => "full_attention",
            Self::Sliding => "sliding_attention",
        }
    }

    pub(super) fn from_name(name: &str) -> Result<Self, ModelConfigError> {
        [Self::Full, Self::Sliding]
            .into_iter()
            .find(|layer_type| layer_type.name() == name)
            .ok_or_else(|| ModelConfigError::Unsupported {
                key: "layer_types",
                value: name.chars().take(80).collect(),
                supported: "full_attention or sliding_attention",
            })
    }
}
