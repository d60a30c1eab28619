//! A loop over blocks as compiled for the widest vectors that this machine has. The build's own target knows only the
//! oldest ones; two thirds of the time over weights that did not change is saved by asking the processor.

/// A loop of plain safe code. `run`, and what it calls per block, must be `#[inline(always)]`: only what is inlined is
/// compiled for the wider vectors.
pub(super) trait Loop {
    /// What comes of it.
    type Output;

    /// The loop.
    fn run(self) -> Self::Output;
}

/// Runs a loop in the version for this machine.
pub(super) fn widest<L: Loop>(work: L) -> L::Output {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi1,bmi2,popcnt,lzcnt")]
        fn avx512<L: Loop>(work: L) -> L::Output {
            work.run()
        }
        #[target_feature(enable = "avx2,bmi1,bmi2,popcnt,lzcnt")]
        fn avx2<L: Loop>(work: L) -> L::Output {
            work.run()
        }
        let has_avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("bmi1")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("popcnt")
            && is_x86_feature_detected!("lzcnt");
        let has_avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        // Safety: the processor was asked for these very features; the loop itself is safe code.
        #[allow(unsafe_code)]
        if has_avx2 && has_avx512 {
            return unsafe { avx512(work) };
        } else if has_avx2 {
            return unsafe { avx2(work) };
        }
    }
    work.run()
}
