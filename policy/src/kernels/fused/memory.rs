//! Memory that several threads write at once, each its own part of it.
//!
//! Knows nothing of what lies in it. The system lends it as it is first reached: what nobody needed costs nothing.

use std::cell::UnsafeCell;
use std::ops::Range;

/// Elements, of which those that were reached are in use.
#[derive(Debug)]
pub(super) struct Memory {
    values: Vec<UnsafeCell<f32>>,
}

// Safety: elements are used through `unsafe` calls only, whose callers promise that none is written while another uses it.
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
    /// Nobody may write any of them as long as the result is in use.
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
    /// Nobody else may use any of them as long as the result is in use.
    #[inline(always)]
    #[allow(unsafe_code, clippy::mut_from_ref)]
    pub(super) unsafe fn write(&self, range: Range<usize>) -> &mut [f32] {
        let cells = &self.values[range];
        // Safety: cells may be written through a shared reference; the caller keeps others away.
        unsafe { std::slice::from_raw_parts_mut(UnsafeCell::raw_get(cells.as_ptr()), cells.len()) }
    }
}
