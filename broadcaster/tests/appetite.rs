//! Applying a delta allocates the result, which is as long as the parent, and a bounded rest, whatever the delta's bytes are: a
//! delta is not trusted before the result's root was compared.
#![allow(clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};

use muster_broadcaster::codec::delta::{apply, encode};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha12Rng;

/// Bytes allocated now, and the largest value so far.
static ALLOCATED: AtomicUsize = AtomicUsize::new(0);
static ALLOCATED_MAX: AtomicUsize = AtomicUsize::new(0);

struct CountingAllocator;

// SAFETY: every call is passed on to the system's allocator unchanged.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = ALLOCATED.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        ALLOCATED_MAX.fetch_max(now, Ordering::Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        ALLOCATED.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const ELEMENTS: usize = 500_000;
const THREADS: NonZeroUsize = NonZeroUsize::new(2).unwrap();
/// Tables of the slices in progress, the directory, and each thread's own bytes.
const REST_BYTES: usize = 768 << 10;

/// A safetensors file of one tensor of 16-bit weights and one of 32-bit.
fn file(half: &[u8], full: &[u8]) -> Vec<u8> {
    let (middle, end) = (half.len(), half.len() + full.len());
    let (a, b) = (half.len() / 2, full.len() / 4);
    let header = format!(
        r#"{{"a":{{"dtype":"BF16","shape":[{a}],"data_offsets":[0,{middle}]}},"b":{{"dtype":"F32","shape":[{b}],"data_offsets":[{middle},{end}]}}}}"#
    );
    let length = (header.len() as u64).to_le_bytes();
    [&length[..], header.as_bytes(), half, full].concat()
}

/// The most bytes allocated at once while a delta was applied, and whether it could be applied.
fn allocated_while_applying(parent: &[u8], delta: &[u8]) -> (usize, bool) {
    let before = ALLOCATED.load(Ordering::Relaxed);
    ALLOCATED_MAX.store(before, Ordering::Relaxed);
    let is_applied = apply(parent, delta, THREADS).is_ok();
    (ALLOCATED_MAX.load(Ordering::Relaxed) - before, is_applied)
}

#[test]
fn applying_any_delta_allocates_the_result_and_a_bounded_rest() {
    let mut rng = ChaCha12Rng::seed_from_u64(7);
    let (mut half, mut full) = (vec![0; 2 * ELEMENTS], vec![0; 4 * ELEMENTS / 10]);
    rng.fill(&mut half[..]);
    rng.fill(&mut full[..]);
    let parent = file(&half, &full);
    half.chunks_mut(2).step_by(50).for_each(|w| w[0] ^= 1);
    full.chunks_mut(4).for_each(|w| w[0] ^= 0x15);
    let honest = encode(&parent, &file(&half, &full), THREADS).unwrap().bytes;
    let most = parent.len() + REST_BYTES;

    let (allocated, is_applied) = allocated_while_applying(&parent, &honest);
    assert!(is_applied && allocated >= parent.len() && allocated <= most);
    // The directory and the tables come first; there a byte can demand the most memory.
    for round in 0..600 {
        let mut delta = honest.clone();
        let front = if round % 2 == 0 { 64 } else { delta.len() };
        for _ in 0..rng.random_range(1..4) {
            delta[rng.random_range(4..front)] = rng.random();
        }
        if round % 3 == 0 {
            delta.truncate(rng.random_range(4..delta.len()));
        }
        if round % 5 == 0 {
            // The longest encoding of a number.
            let at = rng.random_range(4..16);
            delta.splice(at..at, [0xff; 8]);
        }
        let (allocated, _) = allocated_while_applying(&parent, &delta);
        assert!(allocated <= most, "round {round}: {allocated} of {most}");
    }
}
