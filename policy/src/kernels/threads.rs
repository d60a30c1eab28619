//! A thread pool that runs one parallel loop at a time: each free thread takes the next part of it.
//!
//! Made for loops of some ten microseconds, thousands of them a second: a token of a small model is some tens of them. Between
//! two loops a worker spins, and sleeps only after a pause. Invariant: every part of a loop runs exactly once, and no part
//! runs after the loop has returned.

use std::any::Any;
use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Most parts of a loop: the `parts` field of [`Claims`] has 16 bits. Longer loops have larger parts.
const PARTS_MAX: usize = u16::MAX as usize;

/// Checks between two yields of the processor while a thread spins.
const SPINS: usize = 64;

/// Time that a worker spins before it sleeps. Between two products of a forward pass lie a few microseconds, between two
/// tokens up to a few hundred; waking a thread costs about fifty.
const SPIN_TIME: Duration = Duration::from_micros(300);

/// Most threads of a pool, against a mistake in the configuration.
const THREADS_MAX: usize = 1024;

/// A thread pool. Cheap to clone; its threads end with the last clone.
#[derive(Debug, Clone)]
pub struct Threads {
    pool: Arc<Pool>,
}

#[derive(Debug)]
struct Pool {
    shared: Arc<SharedLoop>,
    workers: Vec<JoinHandle<()>>,
    /// Held by the thread whose loop the workers run.
    turn: Mutex<()>,
}

/// The newest loop, as the workers see it.
#[derive(Debug, Default)]
struct SharedLoop {
    /// [`Claims`] of the newest loop.
    claims: AtomicU64,
    /// Body of that loop; valid until all its parts are finished.
    body: AtomicPtr<Body<'static>>,
    /// Number of finished parts.
    done: AtomicUsize,
    /// Panic of the first part that failed.
    failure: Mutex<Option<Box<dyn Any + Send>>>,
    ended: AtomicBool,
    asleep: AtomicUsize,
    sleep_lock: Mutex<()>,
    wake: Condvar,
}

/// A loop's body behind a thin pointer.
struct Body<'a> {
    run: &'a (dyn Fn(usize) + Sync),
}

/// Number of a loop, its parts and the parts taken. They share one word, so that a thread cannot take a part of another loop
/// than the one it saw.
#[derive(Clone, Copy)]
struct Claims {
    number: u32,
    parts: u16,
    taken: u16,
}

impl Claims {
    fn read(word: u64) -> Self {
        Self {
            number: (word >> 32) as u32,
            parts: (word >> 16) as u16,
            taken: word as u16,
        }
    }

    fn word(self) -> u64 {
        u64::from(self.number) << 32 | u64::from(self.parts) << 16 | u64::from(self.taken)
    }
}

impl Threads {
    /// A pool of `count` threads, including the caller's.
    pub fn new(count: NonZeroUsize) -> Self {
        let shared = Arc::new(SharedLoop::default());
        let workers = (1..count.get().min(THREADS_MAX)).map_while(|_| {
            let shared = Arc::clone(&shared);
            // If the system starts no more threads, the pool works with fewer.
            let thread = std::thread::Builder::new().name("muster-kernel".to_owned());
            thread.spawn(move || shared.work()).ok()
        });
        let pool = Pool {
            workers: workers.collect(),
            shared,
            turn: Mutex::new(()),
        };
        Self {
            pool: Arc::new(pool),
        }
    }

    /// The caller's thread alone.
    pub fn one() -> Self {
        Self::new(NonZeroUsize::MIN)
    }

    /// One for each processor that this process may use.
    pub fn all() -> Self {
        Self::new(std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN))
    }

    /// Number of threads, including the caller's.
    pub fn count(&self) -> NonZeroUsize {
        NonZeroUsize::MIN.saturating_add(self.pool.workers.len())
    }

    /// Calls `body` with consecutive ranges of `grain` items that cover `0..items`, on all threads. Returns when all calls have
    /// returned. A second caller at the same time runs its loop alone.
    pub(crate) fn share(&self, items: usize, grain: usize, body: impl Fn(Range<usize>) + Sync) {
        let grain = grain.max(items.div_ceil(PARTS_MAX)).max(1);
        let parts = items.div_ceil(grain);
        let run = |part: usize| body(part * grain..((part + 1) * grain).min(items));
        let turn = if parts > 1 && !self.pool.workers.is_empty() {
            match self.pool.turn.try_lock() {
                Ok(turn) => Some(turn),
                // A loop panicked; the lock guards no data.
                Err(TryLockError::Poisoned(failed)) => Some(failed.into_inner()),
                Err(TryLockError::WouldBlock) => None,
            }
        } else {
            None
        };
        match turn {
            Some(_turn) => self.pool.shared.lead(parts as u16, &run),
            None => (0..parts).for_each(run),
        }
    }

    /// Calls `body` on all threads with `grain` consecutive rows of `values` `[rows, width]` and the index of the first.
    pub(crate) fn share_rows<T: Send>(
        &self,
        values: &mut [T],
        width: usize,
        grain: usize,
        body: impl Fn(usize, &mut [T]) + Sync,
    ) {
        self.share_rows_of_two(
            (values, width),
            (&mut [(); 0], 0),
            grain,
            |first, rows, _| {
                body(first, rows);
            },
        );
    }

    /// [`Threads::share_rows`] over the same rows of two matrices.
    #[allow(unsafe_code)]
    pub(crate) fn share_rows_of_two<T: Send, U: Send>(
        &self,
        (one, one_width): (&mut [T], usize),
        (other, other_width): (&mut [U], usize),
        grain: usize,
        body: impl Fn(usize, &mut [T], &mut [U]) + Sync,
    ) {
        let rows = one.len() / one_width.max(1);
        let (one, other) = (Split::new(one), Split::new(other));
        self.share(rows, grain, |range| {
            // Safety: ranges of a loop do not overlap, so neither do their rows.
            let (one, other) = unsafe {
                (
                    one.range(range.start * one_width..range.end * one_width),
                    other.range(range.start * other_width..range.end * other_width),
                )
            };
            body(range.start, one, other);
        });
    }
}

impl SharedLoop {
    /// Publishes a loop, takes part in it and waits for its end.
    fn lead(&self, parts: u16, run: &(dyn Fn(usize) + Sync)) {
        let body = Body { run };
        self.done.store(0, Ordering::Relaxed);
        self.body.store(
            (&raw const body).cast_mut().cast::<Body<'static>>(),
            Ordering::Relaxed,
        );
        let number = Claims::read(self.claims.load(Ordering::Relaxed)).number;
        let claims = Claims {
            number: number.wrapping_add(1),
            parts,
            taken: 0,
        };
        self.claims.store(claims.word(), Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst) > 0 {
            let sleepers = self
                .sleep_lock
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            self.wake.notify_all();
            drop(sleepers);
        }
        while self.take_part() {}
        let mut spins = 0;
        while self.done.load(Ordering::Acquire) < usize::from(parts) {
            spin(&mut spins);
        }
        let failure = self
            .failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(failure) = failure {
            resume_unwind(failure);
        }
    }

    /// Takes the next part of the loop and runs it. False if none is left.
    #[allow(unsafe_code)]
    fn take_part(&self) -> bool {
        let mut word = self.claims.load(Ordering::Acquire);
        loop {
            let claims = Claims::read(word);
            if claims.taken == claims.parts {
                return false;
            }
            let body = self.body.load(Ordering::Relaxed);
            let next = Claims {
                taken: claims.taken + 1,
                ..claims
            };
            match self.claims.compare_exchange_weak(
                word,
                next.word(),
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Err(newer) => word = newer,
                Ok(_) => {
                    // Safety: the exchange has shown that this loop still had an untaken part, and `lead` changes `body`
                    // only after all parts of the loop before are finished: so `body` is this loop's, and it lives
                    // until the part taken here is counted as done.
                    let run = || unsafe { ((*body).run)(usize::from(claims.taken)) };
                    if let Err(failure) = catch_unwind(AssertUnwindSafe(run)) {
                        let mut first = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
                        first.get_or_insert(failure);
                    }
                    self.done.fetch_add(1, Ordering::AcqRel);
                    return true;
                }
            }
        }
    }

    fn has_work(&self) -> bool {
        let claims = Claims::read(self.claims.load(Ordering::SeqCst));
        claims.taken < claims.parts || self.ended.load(Ordering::SeqCst)
    }

    /// Main loop of a worker.
    fn work(&self) {
        while !self.ended.load(Ordering::Acquire) {
            while self.take_part() {}
            let (start, mut spins) = (Instant::now(), 0);
            while !self.has_work() && (spins % SPINS != 0 || start.elapsed() < SPIN_TIME) {
                spin(&mut spins);
            }
            if !self.has_work() {
                self.sleep();
            }
        }
    }

    fn sleep(&self) {
        let mut sleepers = self
            .sleep_lock
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // Counted before the last check: a leader reads the count after it has published its loop, so one of them sees the
        // other.
        self.asleep.fetch_add(1, Ordering::SeqCst);
        while !self.has_work() {
            sleepers = self
                .wake
                .wait(sleepers)
                .unwrap_or_else(PoisonError::into_inner);
        }
        self.asleep.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Spins once. Every [`SPINS`] calls it yields, since the thread it waits for may need the processor.
fn spin(spins: &mut usize) {
    *spins += 1;
    if spins.is_multiple_of(SPINS) {
        std::thread::yield_now();
    } else {
        std::hint::spin_loop();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        let sleepers = self
            .shared
            .sleep_lock
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.shared.wake.notify_all();
        drop(sleepers);
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its parts, so join returns nothing of interest.
            drop(worker.join());
        }
    }
}

/// A slice that several threads write, each its own elements.
#[derive(Debug)]
pub(crate) struct Split<'a, T> {
    start: *mut T,
    len: usize,
    borrowed: PhantomData<&'a mut [T]>,
}

// Safety: elements are handed out by `unsafe` calls alone, whose callers promise not to hand one out twice.
#[allow(unsafe_code)]
unsafe impl<T: Send> Sync for Split<'_, T> {}

impl<'a, T> Split<'a, T> {
    pub(crate) fn new(values: &'a mut [T]) -> Self {
        Self {
            start: values.as_mut_ptr(),
            len: values.len(),
            borrowed: PhantomData,
        }
    }

    /// The elements of `range`.
    ///
    /// # Safety
    /// No other reference to an element of `range` may exist while the result does.
    #[allow(unsafe_code, clippy::mut_from_ref)]
    pub(crate) unsafe fn range(&self, range: Range<usize>) -> &mut [T] {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "a part lies within the whole"
        );
        // Safety: within the slice that is borrowed for as long as `self`; the caller keeps parts apart.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn threads(count: usize) -> Threads {
        Threads::new(NonZeroUsize::new(count).unwrap())
    }

    #[test]
    fn every_item_is_visited_once_whatever_the_number_of_threads() {
        for count in [1, 2, 3, 8] {
            let threads = threads(count);
            for round in 0..2_000 {
                let items = round % 97;
                let visits: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                threads.share(items, 1 + round % 5, |range| {
                    for item in range {
                        visits[item].fetch_add(1, Ordering::Relaxed);
                    }
                });
                assert!(
                    visits
                        .iter()
                        .all(|visits| visits.load(Ordering::Relaxed) == 1)
                );
            }
        }
    }

    #[test]
    fn a_loop_of_more_parts_than_the_claims_hold_has_larger_parts() {
        let visited = AtomicUsize::new(0);
        threads(2).share(200_000, 1, |range| {
            visited.fetch_add(range.len(), Ordering::Relaxed);
        });
        assert_eq!(visited.load(Ordering::Relaxed), 200_000);
    }

    #[test]
    fn workers_that_sleep_wake_for_the_next_loop() {
        let threads = threads(3);
        for _ in 0..3 {
            let mut asleep = 0;
            while asleep < 2 {
                std::thread::yield_now();
                asleep = threads.pool.shared.asleep.load(Ordering::SeqCst);
            }
            // Ends only if three threads run it at once.
            let barrier = std::sync::Barrier::new(3);
            threads.share(3, 1, |_| {
                barrier.wait();
            });
        }
    }

    #[test]
    fn callers_at_the_same_time_and_loops_within_loops_all_finish() {
        let threads = threads(3);
        let visited = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        threads.share(8, 1, |_| {
                            threads.share(2, 1, |range| {
                                visited.fetch_add(range.len(), Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(visited.load(Ordering::Relaxed), 4 * 200 * 8 * 2);
    }

    #[test]
    fn a_part_that_panics_fails_its_caller_and_no_later_loop() {
        let threads = threads(2);
        let failed = catch_unwind(AssertUnwindSafe(|| {
            threads.share(8, 1, |range| assert!(range.start != 5, "the fifth part"));
        }));
        assert!(failed.is_err());
        let visited = AtomicUsize::new(0);
        threads.share(8, 1, |_| {
            visited.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(visited.load(Ordering::Relaxed), 8);
    }
}
