//! Loops over slices of f32 and f64 that the compiler turns into the widest vectors of the machine.
//!
//! The code fixes the order of every sum: sixteen partial sums, then a tree. Only bodies that name `FMA` give results that
//! depend on whether the machine contracts a multiplication with an addition.

/// Lanes of the partial sums: one AVX-512 register of f32.
pub(crate) const LANES: usize = 16;

/// Compiles a body for some features of the processor, and returns what it returns to the enclosing function.
macro_rules! with_features {
    ($features:literal, $body:ident, ($($arg:ident: $kind:ty),*) $(-> $out:ty)?) => {{
        #[target_feature(enable = $features)]
        #[allow(clippy::too_many_arguments)]
        fn compiled($($arg: $kind),*) $(-> $out)? {
            $body::<true>($($arg),*)
        }
        // Safety: the caller has matched on `width`, which found these features; the body itself is safe code.
        #[allow(unsafe_code)]
        return unsafe { compiled($($arg),*) };
    }};
}
pub(crate) use with_features;

/// Defines a function whose body is compiled three times, for AVX-512, for AVX2 and for any machine. Each call picks one.
///
/// The body may use `FMA`, a constant that tells whether [`multiply_add`] should contract. After `wide` the body is
/// compiled for AVX-512 alone, and the function panics elsewhere; after `narrow` machines with AVX-512 run the AVX2 body.
/// Every body that is left out saves seconds of compile time.
macro_rules! vectorised {
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident($($arg:ident: $kind:ty),* $(,)?)
        $(-> $out:ty)? $body:block
    ) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name($($arg: $kind),*) $(-> $out)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn portable<const FMA: bool>($($arg: $kind),*) $(-> $out)? $body
            #[cfg(target_arch = "x86_64")]
            match $crate::kernels::simd::width() {
                $crate::kernels::simd::Width::Avx512 => $crate::kernels::simd::with_features!(
                    "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma", portable, ($($arg: $kind),*) $(-> $out)?
                ),
                $crate::kernels::simd::Width::Avx2 => $crate::kernels::simd::with_features!(
                    "avx2,fma", portable, ($($arg: $kind),*) $(-> $out)?
                ),
                $crate::kernels::simd::Width::Portable => {}
            }
            portable::<false>($($arg),*)
        }
    };
    (wide $(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $kind:ty),* $(,)?) $body:block) => {
        $(#[$meta])*
        $vis fn $name($($arg: $kind),*) {
            #[inline(always)]
            #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
            fn portable<const FMA: bool>($($arg: $kind),*) $body
            #[cfg(target_arch = "x86_64")]
            if $crate::kernels::simd::width() == $crate::kernels::simd::Width::Avx512 {
                $crate::kernels::simd::with_features!(
                    "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma", portable, ($($arg: $kind),*)
                )
            }
            unreachable!("wide panels exist only on machines with AVX-512")
        }
    };
    (narrow $(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $kind:ty),* $(,)?) $body:block) => {
        $(#[$meta])*
        $vis fn $name($($arg: $kind),*) {
            #[inline(always)]
            fn portable<const FMA: bool>($($arg: $kind),*) $body
            #[cfg(target_arch = "x86_64")]
            if $crate::kernels::simd::width() != $crate::kernels::simd::Width::Portable {
                $crate::kernels::simd::with_features!("avx2,fma", portable, ($($arg: $kind),*))
            }
            portable::<false>($($arg),*)
        }
    };
}
pub(crate) use vectorised;

/// Width of the vectors of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub(crate) enum Width {
    Avx512,
    Avx2,
    Portable,
}

/// The widest vectors of this machine; the standard library caches the answer.
#[inline]
#[cfg(target_arch = "x86_64")]
pub(crate) fn width() -> Width {
    let has_avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let has_avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    match (has_avx2, has_avx512) {
        (true, true) => Width::Avx512,
        (true, false) => Width::Avx2,
        (false, _) => Width::Portable,
    }
}

/// The widest vectors of this machine.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn width() -> Width {
    Width::Portable
}

/// `eˣ` for x ≤ 88, to about one unit in the last place; below −87 it is 0.
///
/// Cody–Waite reduction and the polynomial of Cephes' `expf`, in plain arithmetic that vectorises; results of the
/// system's `exp` differ from one C library to the next.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5·2²³: adding and taking it off rounds to an integer
    let clamped = x.clamp(-87.0, 88.0);
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (clamped - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_2e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let value = p * (r * r) + r + 1.0;
    // The low bits of `shifted` hold n itself; a conversion that checks its range would not vectorise.
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { value * power }
}

/// Hyperbolic tangent, to about three units in the last place: an odd polynomial over an even one, the coefficients of
/// Eigen's `ptanh`. One made of [`exp`] would lose the small results to cancellation.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    // From here on the nearest f32 is 1.
    let x = x.clamp(-7.905_311, 7.905_311);
    let square = x * x;
    let p = -2.760_768_5e-16;
    let p = p * square + 2.000_188e-13;
    let p = p * square - 8.604_672e-11;
    let p = p * square + 5.122_297e-8;
    let p = p * square + 1.485_722_4e-5;
    let p = p * square + 6.372_619_3e-4;
    let p = p * square + 4.893_524_6e-3;
    let q = 1.198_258_4e-6;
    let q = q * square + 1.185_347_1e-4;
    let q = q * square + 2.268_434_6e-3;
    let q = q * square + 4.893_525e-3;
    x * p / q
}

/// `eˣ` in f64 for x ≤ 0, to about one unit in the last place; below −700 it is 0.
#[inline(always)]
pub(crate) fn exp_f64(x: f64) -> f64 {
    const ROUND: f64 = 6_755_399_441_055_744.0; // 1.5·2⁵²
    let clamped = x.clamp(-700.0, 0.0);
    let shifted = clamped * std::f64::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (clamped - n * 6.931_471_803_691_238e-1) - n * 1.908_214_929_270_587_7e-10;
    // Taylor up to r¹³: |r| ≤ ln 2 / 2, so the rest is below 5e-18.
    let p = 1.0 / 6_227_020_800.0;
    let p = p * r + 1.0 / 479_001_600.0;
    let p = p * r + 1.0 / 39_916_800.0;
    let p = p * r + 1.0 / 3_628_800.0;
    let p = p * r + 1.0 / 362_880.0;
    let p = p * r + 1.0 / 40_320.0;
    let p = p * r + 1.0 / 5_040.0;
    let p = p * r + 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let value = p * (r * r) + r + 1.0;
    let power = f64::from_bits((shifted.to_bits().wrapping_add(1023)) << 52);
    if x < -700.0 { 0.0 } else { value * power }
}

/// Adds sixteen partial sums as a tree.
#[inline(always)]
pub(crate) fn tree(partial: [f32; LANES]) -> f32 {
    let mut sums = partial;
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            sums[lane] += sums[lane + half];
        }
        half /= 2;
    }
    sums[0]
}

/// `Σ aᵢ bᵢ`; the shorter slice rules.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a_chunks, a_rest) = a.as_chunks::<LANES>();
    let (b_chunks, b_rest) = b.as_chunks::<LANES>();
    let mut partial = [0.0; LANES];
    for (x, y) in a_chunks.iter().zip(b_chunks) {
        for lane in 0..LANES {
            partial[lane] += x[lane] * y[lane];
        }
    }
    for (lane, (x, y)) in a_rest.iter().zip(b_rest).enumerate() {
        partial[lane] += x * y;
    }
    tree(partial)
}

/// Largest element, or −∞ of nothing.
#[inline(always)]
pub(crate) fn largest(values: &[f32]) -> f32 {
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut partial = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for lane in 0..LANES {
            partial[lane] = if chunk[lane] > partial[lane] {
                chunk[lane]
            } else {
                partial[lane]
            };
        }
    }
    for (lane, &value) in partial.iter_mut().zip(rest) {
        *lane = if value > *lane { value } else { *lane };
    }
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            partial[lane] = if partial[lane + half] > partial[lane] {
                partial[lane + half]
            } else {
                partial[lane]
            };
        }
        half /= 2;
    }
    partial[0]
}

/// Replaces every x by `exp((x − shift)·scale)` and returns the sum.
#[inline(always)]
pub(crate) fn exp_shifted(values: &mut [f32], shift: f32, scale: f32) -> f32 {
    let (chunks, rest) = values.as_chunks_mut::<LANES>();
    let mut partial = [0.0; LANES];
    for chunk in chunks {
        for lane in 0..LANES {
            chunk[lane] = exp((chunk[lane] - shift) * scale);
            partial[lane] += chunk[lane];
        }
    }
    // The rest as one more vector, filled up with what adds nothing.
    let mut last = [f32::NEG_INFINITY; LANES];
    last[..rest.len()].copy_from_slice(rest);
    for lane in 0..LANES {
        last[lane] = exp((last[lane] - shift) * scale);
        partial[lane] += last[lane];
    }
    rest.copy_from_slice(&last[..rest.len()]);
    tree(partial)
}

/// `a·b + c`, rounded once where the machine does that in one instruction.
#[inline(always)]
pub(crate) fn multiply_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    // Without the instruction `mul_add` would be a call into the C library.
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// `out += a·x`
#[inline(always)]
pub(crate) fn add_scaled(out: &mut [f32], a: f32, x: &[f32]) {
    let (out_chunks, out_rest) = out.as_chunks_mut::<8>();
    let (x_chunks, x_rest) = x.as_chunks::<8>();
    for (out, x) in out_chunks.iter_mut().zip(x_chunks) {
        for lane in 0..8 {
            out[lane] += a * x[lane];
        }
    }
    for (out, x) in out_rest.iter_mut().zip(x_rest) {
        *out += a * x;
    }
}

/// `outⱼ = Σₚ aₚ bₚⱼ`, `b` having rows of `stride` elements of which the first `out.len()` count.
#[inline(always)]
pub(crate) fn row_product(out: &mut [f32], a: &[f32], b: &[f32], stride: usize) {
    let mut column = 0;
    while column + 32 <= out.len() {
        columns::<32>(out, a, b, stride, column);
        column += 32;
    }
    if column + 16 <= out.len() {
        columns::<16>(out, a, b, stride, column);
        column += 16;
    }
    if column + 8 <= out.len() {
        columns::<8>(out, a, b, stride, column);
        column += 8;
    }
    while column < out.len() {
        columns::<1>(out, a, b, stride, column);
        column += 1;
    }
}

#[inline(always)]
fn columns<const C: usize>(out: &mut [f32], a: &[f32], b: &[f32], stride: usize, column: usize) {
    let mut sums = [0.0; C];
    for (p, &scale) in a.iter().enumerate() {
        let row = &b[p * stride + column..][..C];
        for lane in 0..C {
            sums[lane] += scale * row[lane];
        }
    }
    out[column..column + C].copy_from_slice(&sums);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn exponentials_agree_with_the_standard_library(x in -86.0f32..88.0, y in -690.0f64..0.0) {
            prop_assert!((exp(x) / x.exp() - 1.0).abs() < 3e-7);
            prop_assert!((exp_f64(y) / y.exp() - 1.0).abs() < 1e-15);
        }

        #[test]
        fn tangents_agree_with_the_standard_library(x in -12.0f32..12.0, small in -1e-3f32..1e-3) {
            for x in [x, small] {
                let plain = f64::from(x).tanh();
                let error = (f64::from(tanh(x)) - plain).abs();
                prop_assert!(error <= 4e-7 * plain.abs(), "{x}: {error:e}");
            }
        }

        #[test]
        fn sums_agree_with_plain_loops(values in prop::collection::vec(-2.0f32..2.0, 0..70)) {
            let plain: f64 = values.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
            prop_assert!((f64::from(dot(&values, &values)) - plain).abs() < 1e-4);
            let largest_plain = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            prop_assert_eq!(largest(&values), largest_plain);
        }

        #[test]
        fn a_row_product_agrees_with_a_plain_loop(width in 1usize..80, depth in 0usize..9) {
            let a: Vec<f32> = (0..depth).map(|p| p as f32 - 3.0).collect();
            let b: Vec<f32> = (0..depth * width).map(|i| (i % 13) as f32).collect();
            let mut out = vec![9.0; width];
            row_product(&mut out, &a, &b, width);
            for (j, value) in out.iter().enumerate() {
                let plain: f32 = (0..depth).map(|p| a[p] * b[p * width + j]).sum();
                prop_assert_eq!(*value, plain);
            }
        }
    }

    #[test]
    fn far_tails_vanish_and_zero_is_one() {
        assert_eq!(
            (exp(-1e9), exp(f32::NEG_INFINITY), exp(0.0)),
            (0.0, 0.0, 1.0)
        );
        assert_eq!(
            (exp_f64(-1e9), exp_f64(f64::NEG_INFINITY), exp_f64(0.0)),
            (0.0, 0.0, 1.0)
        );
    }
}
