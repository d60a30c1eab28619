//! Lossless deltas between two versions of the same weights, close to the entropy of the changes.
//!
//! * [`delta`] is the object's format: it cuts tensors into slices, and codes each slice by the method with the fewest bytes.
//! * [`patch`] codes which 16-bit weights changed and by how much; [`planes`] codes other slices as XOR in byte planes with zstd.
//! * `rans`, `token` and `bits` are the entropy coder; `block` and `classes` sort weights by how likely they change.
//!
//! Pure: bytes in, bytes out. A delta may come from a liar, so decoding may fail, but it neither panics nor takes more memory than
//! the parent's size and a bounded rest. The caller compares the result's root with the signed one.

mod bits;
mod block;
mod classes;
pub mod delta;
pub mod patch;
pub mod planes;
mod rans;
mod token;
mod wide;

/// Elements of a slice, the unit of parallel work; a thread takes up to 32 MiB for one while encoding. The tables of a slice cost
/// about 300 bytes, and the coded slice of a fine-tuning step 30 KB, so smaller slices would compress worse.
pub(crate) const SLICE_ELEMENTS: usize = 4 << 20;

/// Why the coded bytes of a slice cannot be decoded. The message completes "slice 3 of tensor `a` …".
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SliceError {
    /// The bytes end too early.
    #[error("ends too early")]
    Truncated,
    /// Bytes are left over, or the decoder does not end in the encoder's first state.
    #[error("has bytes after its end")]
    Trailing,
    /// A table of frequencies or the range of classes is invalid.
    #[error("has an invalid table")]
    Table,
    /// A change lies behind the last weight.
    #[error("changes weights after its end")]
    Beyond,
    /// No pair of weights differs by this step.
    #[error("has a step that is too large")]
    Step,
    /// A compressed plane does not decompress to the slice's length.
    #[error("has a plane that cannot be decompressed")]
    Plane,
}
