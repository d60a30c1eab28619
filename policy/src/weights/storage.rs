//! How the elements of a tensor are stored, little-endian. All are computed with in float32.

use half::bf16;

/// How a published parameter is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Storage {
    /// The default for publishing: half the bytes to transfer.
    Bf16,
    /// Exactly the optimizer's values.
    F32,
}

impl Storage {
    /// Bytes of one element.
    pub fn width(self) -> usize {
        Format::from(self).width()
    }

    /// Name in a safetensors header.
    pub(super) fn safetensors_name(self) -> &'static str {
        match self {
            Self::Bf16 => "BF16",
            Self::F32 => "F32",
        }
    }

    /// Name in `config.json`.
    pub fn torch_name(self) -> &'static str {
        match self {
            Self::Bf16 => "bfloat16",
            Self::F32 => "float32",
        }
    }

    /// Index of the first value that is NaN or infinite once stored: bf16 has the range of f32, but rounding up its largest
    /// values overflows.
    pub(crate) fn first_not_finite(self, values: &[f32]) -> Option<usize> {
        values.iter().position(|&value| match self {
            Self::F32 => !value.is_finite(),
            Self::Bf16 => !bf16::from_f32(value).is_finite(),
        })
    }

    /// Appends the stored form of `values` to `out`.
    pub(crate) fn encode(self, values: &[f32], out: &mut Vec<u8>) {
        match self {
            Self::F32 => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
            Self::Bf16 => {
                let rounded = values.iter().map(|&value| bf16::from_f32(value));
                out.extend(rounded.flat_map(bf16::to_le_bytes));
            }
        }
    }
}

/// How a tensor of a file is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Bf16,
    F16,
    F32,
}

impl From<Storage> for Format {
    fn from(storage: Storage) -> Self {
        match storage {
            Storage::Bf16 => Self::Bf16,
            Storage::F32 => Self::F32,
        }
    }
}

impl Format {
    /// Bytes of one element.
    pub(crate) fn width(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    /// The narrowest published form that loses nothing.
    pub(super) fn storage(self) -> Storage {
        match self {
            Self::Bf16 => Storage::Bf16,
            Self::F16 | Self::F32 => Storage::F32,
        }
    }
}

/// The bytes of a parameter within a file or an image.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StoredTensor<'a> {
    pub(crate) format: Format,
    /// Row by row.
    pub(crate) bytes: &'a [u8],
}
