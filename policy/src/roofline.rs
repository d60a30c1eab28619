//! The roofline of this machine, measured: its memory bandwidth and its arithmetic throughput.
//!
//! They bound a decoder's speed: a single row decodes as fast as the weights are read, many rows as fast as they are
//! multiplied. Knows no model.

use std::hint::black_box;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crate::kernels::matmul::{Matrix, Onto, multiply};
use crate::kernels::simd::vectorised;
use crate::kernels::threads::Threads;

/// Measurements of each kind. The best one counts, since a disturbance makes a machine slower and never faster.
const REPEATS: usize = 5;

/// Elements that a thread reads before it takes the next part, 1 MiB.
const PART: usize = 1 << 17;

/// Rows and columns of the matrices multiplied: two of them fit the second level of most caches.
const SIDE: usize = 384;

/// Products for each thread.
const PRODUCTS: usize = 8;

/// Upper bounds of a machine's speed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Roofline {
    /// Bytes that all threads together read from memory in a second.
    pub read_bytes_per_second: f64,
    /// Multiply-adds of all threads in a second, in products of f32 matrices that fit into cache.
    pub multiply_adds_per_second: f64,
}

impl Roofline {
    /// Measures both. `bytes` of memory are read several times; they should exceed every cache by far.
    pub fn measure(threads: &Threads, bytes: usize) -> Self {
        Self {
            read_bytes_per_second: read(threads, bytes),
            multiply_adds_per_second: multiply_adds(threads),
        }
    }
}

fn read(threads: &Threads, bytes: usize) -> f64 {
    let parts = (bytes / size_of::<u64>()).div_ceil(PART).max(1);
    // Ones, since untouched zeros would all be the same page of memory.
    let memory = vec![1u64; parts * PART];
    let seconds = best(|| {
        threads.share(parts, 1, |range| {
            black_box(sum(&memory[range.start * PART..range.end * PART]));
        });
    });
    size_of_val(&memory[..]) as f64 / seconds
}

vectorised! {
/// Sums in four registers, so that no addition waits for the one before.
fn sum(values: &[u64]) -> u64 {
    let mut sums = [0u64; 32];
    for values in values.as_chunks::<32>().0 {
        for lane in 0..32 {
            sums[lane] = sums[lane].wrapping_add(values[lane]);
        }
    }
    sums.iter().fold(0, |sum, value| sum.wrapping_add(*value))
}
}

fn multiply_adds(threads: &Threads) -> f64 {
    let products = threads.count().get() * PRODUCTS;
    let matrix = vec![0.5; SIDE * SIDE];
    let outs: Vec<_> = (0..products)
        .map(|_| Mutex::new(vec![0.0; SIDE * SIDE]))
        .collect();
    let seconds = best(|| {
        threads.share(products, 1, |range| {
            for out in &outs[range] {
                let mut out = out.lock().unwrap_or_else(PoisonError::into_inner);
                let factor = Matrix::new(&matrix, SIDE, SIDE);
                multiply(&mut out, factor, factor, Onto::Nothing);
            }
        });
    });
    (products * SIDE * SIDE * SIDE) as f64 / seconds
}

fn best(mut work: impl FnMut()) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..REPEATS {
        let start = Instant::now();
        work();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_reads_and_multiplies_at_a_finite_speed() {
        let roofline = Roofline::measure(&Threads::one(), 1 << 20);
        for speed in [
            roofline.read_bytes_per_second,
            roofline.multiply_adds_per_second,
        ] {
            assert!(speed > 1e6 && speed.is_finite(), "{speed}");
        }
    }

    #[test]
    fn every_element_is_read() {
        let values: Vec<u64> = (0..320).collect();
        assert_eq!(sum(&values), 319 * 320 / 2);
    }
}
