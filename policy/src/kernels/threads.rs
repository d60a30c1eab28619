//! Threads that share one loop at a time: whoever is free takes the next part of it.
//!
//! Made for loops of some ten microseconds, thousands of them a second, which is what one token of a small model is: between
//! two of them a member waits at the ready and sleeps only when nothing has come for a while. Knows nothing of what a part
//! does. Invariant: every part of a loop runs exactly once, and none is touched after the loop has returned.

use std::any::Any;
use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Parts of one loop, at most: what the bits of a [`Claims`] hold. Longer loops have larger parts.
const PARTS_MAX: usize = u16::MAX as usize;

/// Looks at the board before a member lets others have its processor and looks again.
const LOOKS: usize = 64;

/// How long a member waits at the ready. Between two products of a forward pass lie a few microseconds, between two
/// tokens up to a few hundred; to wake a sleeper costs about fifty.
const READY: Duration = Duration::from_micros(300);

/// Members of a team, at most: a bound against a slip of the configuration.
const THREADS_MAX: usize = 1024;

/// Threads that work together. Cheap to clone; the threads end with the last clone.
#[derive(Debug, Clone)]
pub struct Threads {
    team: Arc<Team>,
}

#[derive(Debug)]
struct Team {
    board: Arc<Board>,
    members: Vec<JoinHandle<()>>,
    /// Held by the thread whose loop the members work on.
    turn: Mutex<()>,
}

/// What the members look at.
#[derive(Debug, Default)]
struct Board {
    /// [`Claims`] of the newest loop.
    claims: AtomicU64,
    /// Its body, valid as long as one of its parts is unfinished.
    body: AtomicPtr<Body<'static>>,
    /// Parts finished.
    done: AtomicUsize,
    /// Why the first of the failed parts failed.
    failure: Mutex<Option<Box<dyn Any + Send>>>,
    ended: AtomicBool,
    asleep: AtomicUsize,
    bed: Mutex<()>,
    alarm: Condvar,
}

/// A loop's body in a place of its own, so that one pointer leads to it.
struct Body<'a> {
    run: &'a (dyn Fn(usize) + Sync),
}

/// Which loop it is, how many parts it has, and how many of them are taken; in one word, so that a part is taken only of
/// the loop that was meant.
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
    /// So many threads, the caller's own being one of them.
    pub fn new(count: NonZeroUsize) -> Self {
        let board = Arc::new(Board::default());
        let members = (1..count.get().min(THREADS_MAX)).map_while(|_| {
            let board = Arc::clone(&board);
            // Where the system gives no more threads, those that there are do the work.
            let thread = std::thread::Builder::new().name("muster-kernel".to_owned());
            thread.spawn(move || board.work()).ok()
        });
        let team = Team {
            members: members.collect(),
            board,
            turn: Mutex::new(()),
        };
        Self {
            team: Arc::new(team),
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

    /// How many there are, the caller's own included.
    pub fn count(&self) -> NonZeroUsize {
        NonZeroUsize::MIN.saturating_add(self.team.members.len())
    }

    /// Calls `body` with consecutive ranges of `grain` items that cover `0..items`, on all threads; returns when all have
    /// returned. A second caller at the same time does its loop alone. `body` must not depend on who runs which range.
    pub(crate) fn share(&self, items: usize, grain: usize, body: impl Fn(Range<usize>) + Sync) {
        let grain = grain.max(items.div_ceil(PARTS_MAX)).max(1);
        let parts = items.div_ceil(grain);
        let run = |part: usize| body(part * grain..((part + 1) * grain).min(items));
        let turn = if parts > 1 && !self.team.members.is_empty() {
            match self.team.turn.try_lock() {
                Ok(turn) => Some(turn),
                // A loop failed; there is nothing that it could have left half done.
                Err(TryLockError::Poisoned(failed)) => Some(failed.into_inner()),
                Err(TryLockError::WouldBlock) => None,
            }
        } else {
            None
        };
        match turn {
            Some(_turn) => self.team.board.lead(parts as u16, &run),
            None => (0..parts).for_each(run),
        }
    }

    /// Calls `body` with consecutive rows of `values` `[rows, width]`, `grain` of them at a time, and the number of the
    /// first; on all threads.
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

    /// The same with the same rows of two matrices.
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

impl Board {
    /// Puts a loop on the board, takes part in it and waits for its end.
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
            let bed = self.bed.lock().unwrap_or_else(PoisonError::into_inner);
            self.alarm.notify_all();
            drop(bed);
        }
        while self.take_part() {}
        let mut looks = 0;
        while self.done.load(Ordering::Acquire) < usize::from(parts) {
            look_again(&mut looks);
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

    /// Takes the next part of the loop on the board and runs it; false when none is left.
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

    /// What a member does all day.
    fn work(&self) {
        while !self.ended.load(Ordering::Acquire) {
            while self.take_part() {}
            let (start, mut looks) = (Instant::now(), 0);
            while !self.has_work() && (looks % LOOKS != 0 || start.elapsed() < READY) {
                look_again(&mut looks);
            }
            if !self.has_work() {
                self.sleep();
            }
        }
    }

    fn sleep(&self) {
        let mut bed = self.bed.lock().unwrap_or_else(PoisonError::into_inner);
        // Counted before the last look: a leader looks at the count after it has put its loop on the board, so one of the
        // two sees the other.
        self.asleep.fetch_add(1, Ordering::SeqCst);
        while !self.has_work() {
            bed = self.alarm.wait(bed).unwrap_or_else(PoisonError::into_inner);
        }
        self.asleep.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Waits a moment; now and then others get the processor, which they may need to finish what is waited for.
fn look_again(looks: &mut usize) {
    *looks += 1;
    if looks.is_multiple_of(LOOKS) {
        std::thread::yield_now();
    } else {
        std::hint::spin_loop();
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.board.ended.store(true, Ordering::SeqCst);
        let bed = self
            .board
            .bed
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.board.alarm.notify_all();
        drop(bed);
        for member in self.members.drain(..) {
            // A member catches whatever a part throws, so that there is nothing left to hear from it.
            drop(member.join());
        }
    }
}

/// A slice whose elements several threads write, each its own.
#[derive(Debug)]
pub(crate) struct Split<'a, T> {
    start: *mut T,
    len: usize,
    borrowed: PhantomData<&'a mut [T]>,
}

// Safety: it hands out elements by `unsafe` calls only, whose callers promise that no element is handed out twice.
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
    /// No element of `range` may be in use by anybody else as long as the result is.
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
    fn a_loop_longer_than_the_board_can_count_has_larger_parts() {
        let visited = AtomicUsize::new(0);
        threads(2).share(200_000, 1, |range| {
            visited.fetch_add(range.len(), Ordering::Relaxed);
        });
        assert_eq!(visited.load(Ordering::Relaxed), 200_000);
    }

    #[test]
    fn members_that_fell_asleep_wake_for_the_next_loop() {
        let threads = threads(3);
        for _ in 0..3 {
            let mut asleep = 0;
            while asleep < 2 {
                std::thread::yield_now();
                asleep = threads.team.board.asleep.load(Ordering::SeqCst);
            }
            // Ends only if two threads are in it at once.
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
