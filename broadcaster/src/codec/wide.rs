//! Compiles a loop over blocks several times, and runs the version for the widest vectors that this processor has. The build's
//! target allows only the oldest vector instructions; the wider ones save two thirds of the time over unchanged weights.

/// A loop of safe code. `run` and the functions that it calls for each block must be `#[inline(always)]`: only inlined code is
/// compiled for the wider vectors.
pub(super) trait Loop {
    type Output;

    fn run(self) -> Self::Output;
}

/// Runs the version of a loop for this processor.
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
        // SAFETY: the processor has exactly these features; the loop itself is safe code.
        #[allow(unsafe_code)]
        if has_avx2 && has_avx512 {
            return unsafe { avx512(work) };
        } else if has_avx2 {
            return unsafe { avx2(work) };
        }
    }
    work.run()
}
