//! How many adoptions a peer is working on, so that work that can wait does not compete with them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A counter of the deltas being applied and the weights being verified. Clones share one count.
#[derive(Debug, Clone, Default)]
pub struct Adoptions(Arc<AtomicUsize>);

impl Adoptions {
    pub(crate) fn is_idle(&self) -> bool {
        self.0.load(Ordering::Relaxed) == 0
    }

    /// Counts one piece of work until the guard is dropped.
    pub(crate) fn begin(&self) -> AdoptionGuard {
        self.0.fetch_add(1, Ordering::Relaxed);
        AdoptionGuard(self.clone())
    }
}

/// One piece of work that [`Adoptions`] counts.
pub(crate) struct AdoptionGuard(Adoptions);

impl Drop for AdoptionGuard {
    fn drop(&mut self) {
        let before = self.0.0.fetch_sub(1, Ordering::Relaxed);
        debug_assert!(before > 0, "every adoption ends once");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_idle_again_when_its_last_adoption_ends() {
        let adoptions = Adoptions::default();
        let first = adoptions.begin();
        let shared = adoptions.clone();
        let second = shared.begin();
        drop(first);
        assert!(!adoptions.is_idle());
        drop(second);
        assert!(adoptions.is_idle());
    }
}
