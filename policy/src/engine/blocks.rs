//! Blocks of the memory for keys and values, counted by reference.
//!
//! Knows no rows, prompts or versions. Invariant: a block is free exactly when it has no holder. The lowest free block is
//! handed out first, so memory that was never needed stays untouched.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Number of a block, below the count that the memory was made for.
pub(crate) type BlockId = u32;

/// All blocks of a memory.
#[derive(Debug)]
pub(crate) struct Blocks {
    /// Holders of each block that was ever handed out.
    holders: Vec<u32>,
    /// Blocks that were handed out and are free again.
    returned: BinaryHeap<Reverse<BlockId>>,
    count: usize,
}

impl Blocks {
    /// `count` free blocks.
    pub(crate) fn new(count: usize) -> Self {
        Self {
            holders: Vec::new(),
            returned: BinaryHeap::new(),
            count,
        }
    }

    /// All blocks, held or free.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Blocks without a holder.
    pub(crate) fn free(&self) -> usize {
        self.returned.len() + (self.count - self.holders.len())
    }

    /// Takes a free block; the caller is its only holder.
    pub(crate) fn take(&mut self) -> Option<BlockId> {
        if let Some(Reverse(block)) = self.returned.pop() {
            self.holders[block as usize] = 1;
            return Some(block);
        }
        let block = self.holders.len();
        if block == self.count {
            return None;
        }
        self.holders.push(1);
        Some(block as BlockId)
    }

    /// Adds a holder to a block that has one.
    pub(crate) fn share(&mut self, block: BlockId) {
        debug_assert!(self.holders[block as usize] > 0, "a free block is shared");
        self.holders[block as usize] += 1;
    }

    /// Takes a holder away.
    pub(crate) fn release(&mut self, block: BlockId) {
        let holders = &mut self.holders[block as usize];
        debug_assert!(*holders > 0, "a free block is released");
        *holders -= 1;
        if *holders == 0 {
            self.returned.push(Reverse(block));
        }
    }

    /// Holders of a block.
    pub(crate) fn holders(&self, block: BlockId) -> u32 {
        self.holders[block as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_free_again_when_its_last_holder_lets_go() {
        let mut blocks = Blocks::new(2);
        let (first, second) = (blocks.take().unwrap(), blocks.take().unwrap());
        assert_eq!((blocks.free(), blocks.take()), (0, None));
        blocks.share(first);
        blocks.release(first);
        assert_eq!((blocks.free(), blocks.holders(first)), (0, 1));
        blocks.release(first);
        assert_eq!(blocks.take(), Some(first));
        blocks.release(second);
        assert_eq!(blocks.free(), 1);
    }

    #[test]
    fn the_lowest_free_block_is_handed_out_first() {
        let mut blocks = Blocks::new(9);
        let taken: Vec<BlockId> = (0..4).filter_map(|_| blocks.take()).collect();
        for block in [taken[3], taken[1], taken[2]] {
            blocks.release(block);
        }
        let again: Vec<BlockId> = (0..4).filter_map(|_| blocks.take()).collect();
        assert_eq!(again, [1, 2, 3, 4]);
    }
}
