//! Vectors that return to a pool when they are dropped, so that decode steps and derivatives of layers allocate nothing after
//! the first.

use std::cell::RefCell;
use std::rc::Rc;

/// Most elements of a lent vector, as a multiple of the request. If short arrays took long vectors, long arrays would allocate
/// new ones until all vectors are long.
const WASTE_MAX: usize = 4;

/// Vectors waiting for their next use.
pub(crate) type Pool = Rc<RefCell<Vec<Vec<f32>>>>;

/// A vector on loan from a pool.
#[derive(Debug)]
pub(crate) struct Buffer {
    /// At least `len` elements: a vector keeps its length, since growing it again would fill it.
    values: Vec<f32>,
    len: usize,
    pool: Pool,
}

impl Buffer {
    /// A vector of `len` elements of unspecified value; the caller overwrites all of them.
    pub(crate) fn stale(pool: &Pool, len: usize) -> Self {
        let mut waiting = pool.borrow_mut();
        // A power of two, so that a step with a few more tokens can reuse the vectors of the step before.
        let class = len.next_power_of_two();
        let fitting = class..=class.saturating_mul(WASTE_MAX);
        let best = (0..waiting.len())
            .filter(|&index| fitting.contains(&waiting[index].len()))
            .min_by_key(|&index| waiting[index].len());
        let found = best.map(|index| waiting.swap_remove(index));
        drop(waiting);
        let values = found.unwrap_or_else(|| vec![0.0; class]);
        Self {
            values,
            len,
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
        &self.values[..self.len]
    }
}

impl std::ops::DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.values[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.pool
            .borrow_mut()
            .push(std::mem::take(&mut self.values));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vector_that_returns_is_lent_again_at_any_length_it_has_room_for() {
        let pool = Pool::default();
        let mut long = Buffer::zeros(&pool, 100);
        long[99] = 1.0;
        let place = long.as_ptr();
        drop(long);
        let short = Buffer::stale(&pool, 30);
        assert_eq!((short.len(), short.as_ptr()), (30, place));
        drop(short);
        let shorter = Buffer::stale(&pool, 3);
        assert_ne!(shorter.as_ptr(), place, "too long for so few");
        let long = Buffer::stale(&pool, 100);
        assert_eq!((long.len(), long.as_ptr(), long[99]), (100, place, 1.0));
        assert_eq!(*Buffer::copied(&pool, &[1.0, 2.0]), [1.0, 2.0]);
        drop(long);
        assert_eq!(Buffer::stale(&pool, 129).len(), 129);
    }
}
