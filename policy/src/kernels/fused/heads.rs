//! Heads of an attention layer and their offsets within a token's q, k and v.

use std::ops::Range;

use crate::layout::{Block, HeadNorms};

/// Sizes of one attention layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    pub(crate) query: usize,
    pub(crate) key: usize,
    pub(crate) dim: usize,
}

impl Heads {
    /// Width of q, k and v of one token together.
    pub(crate) fn width(self) -> usize {
        (self.query + 2 * self.key) * self.dim
    }

    /// Query heads that share one key head.
    pub(super) fn group(self) -> usize {
        self.query / self.key
    }

    /// Offset of key head `j` within a token; its values start `key·dim` later.
    pub(super) fn key_offset(self, j: usize) -> usize {
        (self.query + j) * self.dim
    }

    pub(super) fn value_offset(self, j: usize) -> usize {
        (self.query + self.key + j) * self.dim
    }

    /// The norms of q and k, each with its columns of a token.
    pub(crate) fn normed(self, norms: &HeadNorms) -> [(&Block, Range<usize>); 2] {
        let (keys, values) = (self.key_offset(0), self.value_offset(0));
        [(&norms.query, 0..keys), (&norms.key, keys..values)]
    }
}
