//! How GGUF stores numbers: blocks of 1 to 256 elements, widened to float32.
//!
//! Candle widens quantised blocks, in the same order of operations as the `gguf` package. Invariant: candle is
//! given exactly the bytes that it reads, because it does not check their number.

use candle_core::Device;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::ggml_file::qtensor_from_ggml;
use half::{bf16, f16};

use super::error::GgufError;

/// Elements widened at once: large enough to be fast, small enough not to copy a large tensor whole.
pub(super) const ELEMENTS_AT_ONCE: usize = 1 << 20;

/// Types that cannot be read, by number, so that errors can name them.
const UNREAD: [(u32, &str); 17] = [
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
];

/// How the elements of a tensor are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BlockType(GgmlDType);

impl BlockType {
    /// The type that has this number in the format.
    pub(super) fn from_number(number: u32, tensor: &str) -> Result<Self, GgufError> {
        Ok(Self(match number {
            0 => GgmlDType::F32,
            1 => GgmlDType::F16,
            2 => GgmlDType::Q4_0,
            3 => GgmlDType::Q4_1,
            6 => GgmlDType::Q5_0,
            7 => GgmlDType::Q5_1,
            8 => GgmlDType::Q8_0,
            10 => GgmlDType::Q2K,
            11 => GgmlDType::Q3K,
            12 => GgmlDType::Q4K,
            13 => GgmlDType::Q5K,
            14 => GgmlDType::Q6K,
            30 => GgmlDType::BF16,
            other => {
                let known = UNREAD.iter().find(|(number, _)| *number == other);
                return Err(GgufError::Type {
                    tensor: tensor.to_owned(),
                    found: known
                        .map_or_else(|| format!("number {other}"), |(_, name)| (*name).to_owned()),
                });
            }
        }))
    }

    /// The name in common use, such as `Q4_K`.
    pub(super) fn name(self) -> String {
        match self.0 {
            GgmlDType::Q2K => "Q2_K".to_owned(),
            GgmlDType::Q3K => "Q3_K".to_owned(),
            GgmlDType::Q4K => "Q4_K".to_owned(),
            GgmlDType::Q5K => "Q5_K".to_owned(),
            GgmlDType::Q6K => "Q6_K".to_owned(),
            other => format!("{other:?}"),
        }
    }

    /// Bytes of a tensor; `shape` has its fastest axis first, and its product does not overflow.
    pub(super) fn bytes_of(self, shape: &[u64], tensor: &str) -> Result<u64, GgufError> {
        let columns = shape.first().copied().unwrap_or(1);
        let rows: u64 = shape.iter().skip(1).product();
        let block = self.0.block_size() as u64;
        if columns % block != 0 {
            return Err(GgufError::Malformed(format!(
                "tensor `{tensor}` has rows of {columns} elements, which blocks of {block} ({}) do not divide",
                self.name()
            )));
        }
        Ok(rows * self.row_bytes(columns as usize) as u64)
    }

    /// Bytes of a row of `columns` elements.
    pub(super) fn row_bytes(self, columns: usize) -> usize {
        columns / self.0.block_size() * self.0.type_size()
    }

    /// Whole rows of `columns` elements, widened: `[rows · columns]`.
    pub(super) fn widen(self, bytes: &[u8], columns: usize) -> Result<Vec<f32>, GgufError> {
        debug_assert_eq!(
            bytes.len() % self.row_bytes(columns),
            0,
            "only whole rows are widened"
        );
        let values = match self.0 {
            GgmlDType::F32 => bytes
                .as_chunks()
                .0
                .iter()
                .map(|&v| f32::from_le_bytes(v))
                .collect(),
            GgmlDType::F16 => bytes
                .as_chunks()
                .0
                .iter()
                .map(|&v| f16::from_le_bytes(v).to_f32())
                .collect(),
            GgmlDType::BF16 => bytes
                .as_chunks()
                .0
                .iter()
                .map(|&v| bf16::from_le_bytes(v).to_f32())
                .collect(),
            quantised => {
                let rows = bytes.len() / self.row_bytes(columns);
                qtensor_from_ggml(quantised, bytes, vec![rows, columns], &Device::Cpu)?
                    .dequantize(&Device::Cpu)?
                    .flatten_all()?
                    .to_vec1()?
            }
        };
        Ok(values)
    }
}
