//! Memory that several threads write at the same time, each its own part.
//!
//! Knows nothing of its contents. The system provides pages when they are first reached, so unused capacity costs nothing.

use std::cell::UnsafeCell;
use std::ops::Range;

/// Elements; those up to the reached length are usable.
#[derive(Debug)]
pub(super) struct Memory {
    values: Vec<UnsafeCell<f32>>,
}

// Safety: elements are accessed by `unsafe` calls alone, whose callers promise that no element is written while it is in use.
#[allow(unsafe_code)]
unsafe impl Sync for Memory {}

impl Memory {
    pub(super) fn with_capacity(len: usize) -> Self {
        Self {
            values: Vec::with_capacity(len),
        }
    }

    /// Makes the first `len` elements usable; new ones are zero.
    pub(super) fn reach(&mut self, len: usize) {
        if self.values.len() < len {
            self.values.resize_with(len, UnsafeCell::default);
        }
    }

    /// Elements to read.
    ///
    /// # Safety
    /// No thread may write one of them while the result exists.
    #[inline(always)]
    #[allow(unsafe_code)]
    pub(super) unsafe fn read(&self, range: Range<usize>) -> &[f32] {
        let cells = &self.values[range];
        // Safety: a cell has the layout of what it holds; the caller keeps writers away.
        unsafe { std::slice::from_raw_parts(cells.as_ptr().cast(), cells.len()) }
    }

    /// Elements to write.
    ///
    /// # Safety
    /// No other reference to one of them may exist while the result does.
    #[inline(always)]
    #[allow(unsafe_code, clippy::mut_from_ref)]
    pub(super) unsafe fn write(&self, range: Range<usize>) -> &mut [f32] {
        let cells = &self.values[range];
        // Safety: cells may be written through a shared reference; the caller keeps others away.
        unsafe { std::slice::from_raw_parts_mut(UnsafeCell::raw_get(cells.as_ptr()), cells.len()) }
    }
}
