//! What a delta makes its reader allocate: the result, which is as long as the parent, and a bounded rest. Whatever its bytes
//! say, since they are believed only after the result's root was compared.
#![allow(clippy::unwrap_used, missing_docs)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};

use muster_broadcaster::codec::delta::{apply, encode};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha12Rng;

/// Bytes that are allocated now, and the most there were.
static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

struct Counted;

// SAFETY: every call goes to the system's allocator as it came.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        MOST.fetch_max(now, Ordering::Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counted = Counted;

const ELEMENTS: usize = 500_000;
const THREADS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(1);
/// Tables of the slices in work, the directory, and a thread's own.
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

/// What applying a delta allocated at most, at once.
fn appetite(parent: &[u8], delta: &[u8]) -> (usize, bool) {
    let before = NOW.load(Ordering::Relaxed);
    MOST.store(before, Ordering::Relaxed);
    let is_applied = apply(parent, delta, THREADS).is_ok();
    (MOST.load(Ordering::Relaxed) - before, is_applied)
}

#[test]
fn no_delta_makes_its_reader_allocate_more_than_the_result_and_a_bounded_rest() {
    let mut rng = ChaCha12Rng::seed_from_u64(7);
    let (mut half, mut full) = (vec![0; 2 * ELEMENTS], vec![0; 4 * ELEMENTS / 10]);
    rng.fill(&mut half[..]);
    rng.fill(&mut full[..]);
    let parent = file(&half, &full);
    half.chunks_mut(2).step_by(50).for_each(|w| w[0] ^= 1);
    full.chunks_mut(4).for_each(|w| w[0] ^= 0x15);
    let honest = encode(&parent, &file(&half, &full), THREADS).unwrap().bytes;
    let most = parent.len() + REST_BYTES;

    let (allocated, is_applied) = appetite(&parent, &honest);
    assert!(is_applied && allocated >= parent.len() && allocated <= most);
    // The directory and the tables lie in front, and there a byte can ask for most.
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
            // Numbers that go on for as long as a number may.
            let at = rng.random_range(4..16);
            delta.splice(at..at, [0xff; 8]);
        }
        let (allocated, _) = appetite(&parent, &delta);
        assert!(allocated <= most, "round {round}: {allocated} of {most}");
    }
}
