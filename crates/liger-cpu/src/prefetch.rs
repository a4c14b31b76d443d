//! Memory that is asked for before it is needed. CPUs foresee loads within a page and after a few misses; what a decoding step reads
//! goes over many short stretches, each once.

/// Starts to load some elements into the nearest cache; a hint, whatever the address.
#[inline(always)]
pub(crate) fn prefetch<T>(from: *const T, count: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..count * size_of::<T>()).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: no access, so it may be any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast::<i8>().wrapping_add(line)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (from, count);
}

/// The same into the second cache: more of such loads can be under way at once.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn prefetch_far<T>(from: *const T, count: usize) {
    for line in (0..count * size_of::<T>()).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: no access, so it may be any address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast::<i8>().wrapping_add(line)) };
    }
}
