//! Element types that sums are stored as.

use std::arch::x86_64::{
    __m256bh, __m256i, __m512, _mm256_mask_storeu_epi16, _mm256_maskz_loadu_epi16, _mm512_castsi512_ps,
    _mm512_cvtepu16_epi32, _mm512_cvtneps_pbh, _mm512_fmadd_ps, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps,
    _mm512_slli_epi32,
};

use half::bf16;

use crate::element::Element;

/// A type that sums are stored as.
pub(crate) trait Output: Element {
    /// Where sums may be added up in place.
    fn as_sums(pointer: *mut Self) -> Option<*mut f32>;

    /// `scale sums (+ what is there)` for the elements that the mask names.
    ///
    /// # Safety
    /// AVX-512 with BW, VL and BF16; what the mask names must be the caller's to write.
    unsafe fn store(to: *mut Self, mask: u16, scale: __m512, sums: __m512, accumulate: bool);
}

impl Output for f32 {
    fn as_sums(pointer: *mut Self) -> Option<*mut f32> {
        Some(pointer)
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    #[inline]
    unsafe fn store(to: *mut Self, mask: u16, scale: __m512, sums: __m512, accumulate: bool) {
        let keep = if accumulate { mask } else { 0 };
        // SAFETY: the caller's promise; what is behind a mask is neither read nor written.
        unsafe { _mm512_mask_storeu_ps(to, mask, _mm512_fmadd_ps(scale, sums, _mm512_maskz_loadu_ps(keep, to))) };
    }
}

impl Output for bf16 {
    fn as_sums(_: *mut Self) -> Option<*mut f32> {
        None
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    #[inline]
    unsafe fn store(to: *mut Self, mask: u16, scale: __m512, sums: __m512, accumulate: bool) {
        let keep = if accumulate { mask } else { 0 };
        // SAFETY: as above; both types of the transmutation are any 32 bytes.
        unsafe {
            let old = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(keep, to.cast()));
            let old = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(old));
            let new = _mm512_cvtneps_pbh(_mm512_fmadd_ps(scale, sums, old));
            _mm256_mask_storeu_epi16(to.cast(), mask, std::mem::transmute::<__m256bh, __m256i>(new));
        }
    }
}
