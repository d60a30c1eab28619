//! Lossless deltas between two versions of the same weights: bytes close to the entropy of what changed.
//!
//! * [`delta`] is the object: every tensor in slices, each slice by the method that takes the fewest bytes.
//! * [`patch`] codes where 16-bit weights changed, by how much; [`planes`] is XOR in byte planes under zstd, for the rest.
//! * `rans`, `token` and `bits` are the entropy coder; `block` looks at 64 weights at a time.
//!
//! Pure: bytes in, bytes out. A delta is hostile until the root of what it leads to was compared with the signed one; here it
//! may fail, but neither panic nor take more memory than the parent's own size asks for.

mod bits;
mod block;
mod classes;
pub mod delta;
pub mod patch;
pub mod planes;
mod rans;
mod token;
mod wide;

/// Elements of a slice: the unit of parallel work, and what bounds the memory of a thread (32 MiB while encoding). Smaller
/// slices would pay for their tables: these cost some 300 bytes, where a slice of a fine-tuning step has 30 KB.
pub const SLICE_ELEMENTS: usize = 4 << 20;

/// What is wrong with the coded bytes of one slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SliceError {
    /// The bytes end too early.
    #[error("ends too early")]
    Truncated,
    /// Bytes are left over, or the coder's last state is not its first.
    #[error("does not end where its content does")]
    Trailing,
    /// A table of frequencies, or the range of classes, breaks a rule.
    #[error("has an impossible table")]
    Table,
    /// A change is said to lie behind the last weight.
    #[error("changes weights behind the end of the slice")]
    Beyond,
    /// A step that no pair of weights has.
    #[error("has a step that no weight can take")]
    Step,
    /// A compressed plane is not one of this slice.
    #[error("has a plane that cannot be decompressed")]
    Plane,
}
