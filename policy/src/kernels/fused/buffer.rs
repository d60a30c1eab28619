//! Vectors that return to a pool when the last user lets go, so that a decode step or a layer's derivative allocates
//! nothing after the first.

use std::cell::RefCell;
use std::rc::Rc;

/// Vectors waiting for their next use.
pub(crate) type Pool = Rc<RefCell<Vec<Vec<f32>>>>;

/// A vector on loan from a pool.
#[derive(Debug)]
pub(crate) struct Buffer {
    values: Vec<f32>,
    pool: Pool,
}

impl Buffer {
    /// A vector of `len` elements of unspecified finite or stale value: the caller overwrites all of them.
    pub(crate) fn stale(pool: &Pool, len: usize) -> Self {
        let mut waiting = pool.borrow_mut();
        // The smallest that is large enough, else the largest, which then grows.
        let best = (0..waiting.len()).min_by_key(|&index| {
            let capacity = waiting[index].capacity();
            if capacity >= len {
                (0, capacity)
            } else {
                (1, usize::MAX - capacity)
            }
        });
        let mut values = best
            .map(|index| waiting.swap_remove(index))
            .unwrap_or_default();
        drop(waiting);
        values.resize(len, 0.0);
        Self {
            values,
            pool: Rc::clone(pool),
        }
    }

    /// A vector of `len` zeros.
    pub(crate) fn zeros(pool: &Pool, len: usize) -> Self {
        let mut buffer = Self::stale(pool, len);
        buffer.fill(0.0);
        buffer
    }

    /// A copy of `values`.
    pub(crate) fn copied(pool: &Pool, values: &[f32]) -> Self {
        let mut buffer = Self::stale(pool, values.len());
        buffer.copy_from_slice(values);
        buffer
    }
}

impl std::ops::Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.values
    }
}

impl std::ops::DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.pool
            .borrow_mut()
            .push(std::mem::take(&mut self.values));
    }
}
