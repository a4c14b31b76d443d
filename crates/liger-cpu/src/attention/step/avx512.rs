//! Products of a few queries with many keys, and of their weights with the values, by AVX-512. Keys and values are read once, and widened in
//! registers; sums over a key's elements are added up for 16 keys at once.

// Loops of constant length over registers are unrolled as they stand.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::{
    __m512, _mm512_add_ps, _mm512_and_si512, _mm512_castpd_ps, _mm512_castps_pd, _mm512_castsi512_ps, _mm512_fmadd_ps,
    _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mask_storeu_ps, _mm512_mul_ps, _mm512_permutex2var_ps,
    _mm512_set_epi32, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_shuffle_f32x4, _mm512_slli_epi32,
    _mm512_storeu_ps, _mm512_unpackhi_pd, _mm512_unpackhi_ps, _mm512_unpacklo_pd, _mm512_unpacklo_ps,
};

use half::bf16;

use crate::element::Element;
use crate::prefetch::prefetch;

/// Elements of a row that are widened together.
const STEP: usize = 32;
/// Queries that share what was widened.
const MOST_QUERIES: usize = 4;
/// Keys whose sums are added up at once.
const KEYS: usize = 16;
/// Rows by which memory is asked for before it is needed.
const AHEAD: usize = 32;

/// Whether the CPU has the instructions, and rows the length.
pub(super) fn suits(d: usize) -> bool {
    d.is_multiple_of(STEP) && is_x86_feature_detected!("avx512f")
}

/// Keys or values, as they are held.
pub(in crate::attention) trait Row: Element {
    /// Widened elements of 32 neighbours, in the order of [`Row::ordered`].
    ///
    /// # Safety
    /// AVX-512; 32 elements must be readable.
    unsafe fn widened_step(from: *const Self) -> [__m512; 2];

    /// Two vectors of 32 neighbours in that order.
    ///
    /// # Safety
    /// AVX-512.
    unsafe fn ordered(x: [__m512; 2]) -> [__m512; 2];

    /// The neighbours again.
    ///
    /// # Safety
    /// AVX-512.
    unsafe fn restored(x: [__m512; 2]) -> [__m512; 2];
}

impl Row for f32 {
    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn widened_step(from: *const Self) -> [__m512; 2] {
        // SAFETY: the caller's promise.
        unsafe { [_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(16))] }
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn ordered(x: [__m512; 2]) -> [__m512; 2] {
        x
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn restored(x: [__m512; 2]) -> [__m512; 2] {
        x
    }
}

/// A vector of pairs is widened to one of the even elements and one of the odd ones.
impl Row for bf16 {
    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn widened_step(from: *const Self) -> [__m512; 2] {
        // SAFETY: the caller's promise.
        let pairs = unsafe { _mm512_loadu_si512(from.cast()) };
        let odd = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32));
        [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)), _mm512_castsi512_ps(odd)]
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn ordered([low, high]: [__m512; 2]) -> [__m512; 2] {
        let even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
        let odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
        [_mm512_permutex2var_ps(low, even, high), _mm512_permutex2var_ps(low, odd, high)]
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn restored([even, odd]: [__m512; 2]) -> [__m512; 2] {
        let low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        let high = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
        [_mm512_permutex2var_ps(even, low, odd), _mm512_permutex2var_ps(even, high, odd)]
    }
}

/// `scores [m, n] = scale q [m, d] keys [n, d]^T`.
///
/// # Safety
/// [`suits`] must have said so of d.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn products<W: Row>(
    scores: &mut [f32],
    q: &[f32],
    keys: &[W],
    (m, n, d): (usize, usize, usize),
    scale: f32,
) {
    assert!(scores.len() == m * n && q.len() == m * d && keys.len() == n * d, "scores {m} x {d} x {n}");
    let mut ordered = vec![0.0f32; q.len()];
    for (to, from) in ordered.chunks_exact_mut(STEP).zip(q.chunks_exact(STEP)) {
        // SAFETY: both are 32 floats; the rest is the caller's promise.
        unsafe {
            let x = W::ordered([_mm512_loadu_ps(from.as_ptr()), _mm512_loadu_ps(from.as_ptr().add(16))]);
            _mm512_storeu_ps(to.as_mut_ptr(), x[0]);
            _mm512_storeu_ps(to.as_mut_ptr().add(16), x[1]);
        }
    }
    for first in (0..m).step_by(MOST_QUERIES) {
        let count = MOST_QUERIES.min(m - first);
        let (q, scores) = (&ordered[first * d..(first + count) * d], &mut scores[first * n..(first + count) * n]);
        // SAFETY: as this function's.
        unsafe {
            match count {
                1 => some_products::<W, 1>(scores, q, keys, n, d, scale),
                2 => some_products::<W, 2>(scores, q, keys, n, d, scale),
                3 => some_products::<W, 3>(scores, q, keys, n, d, scale),
                _ => some_products::<W, MOST_QUERIES>(scores, q, keys, n, d, scale),
            }
        }
    }
}

/// # Safety
/// As [`products`], with all lengths as there.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn some_products<W: Row, const M: usize>(
    scores: &mut [f32],
    q: &[f32],
    keys: &[W],
    n: usize,
    d: usize,
    scale: f32,
) {
    for first in (0..n).step_by(KEYS) {
        let mut partial = [[_mm512_setzero_ps(); 4]; M];
        for four in 0..4 {
            // Where there are no more keys, the last one stands for them.
            let mut key = [keys.as_ptr(); 4];
            for i in 0..4 {
                // SAFETY: one of the n keys.
                key[i] = unsafe { keys.as_ptr().add((first + 4 * four + i).min(n - 1) * d) };
                prefetch(key[i].wrapping_add(AHEAD * d), d);
            }
            let mut sums = [[_mm512_setzero_ps(); 4]; M];
            for at in (0..d).step_by(STEP) {
                let mut x = [[_mm512_setzero_ps(); 2]; 4];
                for i in 0..4 {
                    // SAFETY: 32 elements of a key.
                    x[i] = unsafe { W::widened_step(key[i].add(at)) };
                }
                for half in 0..2 {
                    for row in 0..M {
                        // SAFETY: 16 elements of a query.
                        let q = unsafe { _mm512_loadu_ps(q.as_ptr().add(row * d + at + 16 * half)) };
                        for i in 0..4 {
                            sums[row][i] = _mm512_fmadd_ps(x[i][half], q, sums[row][i]);
                        }
                    }
                }
            }
            for row in 0..M {
                partial[row][four] = quarters(sums[row]);
            }
        }
        let there = u16::MAX >> (KEYS - KEYS.min(n - first));
        for row in 0..M {
            let sums = _mm512_mul_ps(totals(partial[row]), _mm512_set1_ps(scale));
            // SAFETY: as many as there are scores of this row left.
            unsafe { _mm512_mask_storeu_ps(scores.as_mut_ptr().add(row * n + first), there, sums) };
        }
    }
}

/// Of four vectors the sums of each quarter, of four elements: `[quarter, vector]`.
#[target_feature(enable = "avx512f")]
#[inline]
fn quarters(x: [__m512; 4]) -> __m512 {
    let pairs = |a, b| _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    let (a, b) = (_mm512_castps_pd(pairs(x[0], x[1])), _mm512_castps_pd(pairs(x[2], x[3])));
    _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)))
}

/// Sums over the quarters of four of these: those of 16 vectors, in order.
#[target_feature(enable = "avx512f")]
#[inline]
fn totals(x: [__m512; 4]) -> __m512 {
    let added =
        |a, b| _mm512_add_ps(_mm512_shuffle_f32x4::<0b10_00_10_00>(a, b), _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b));
    added(added(x[0], x[1]), added(x[2], x[3]))
}

/// `sums [m, d] = p [m, n] values [n, d]`.
///
/// # Safety
/// [`suits`] must have said so of d.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn weighted_sums<W: Row>(
    sums: &mut [f32],
    p: &[f32],
    values: &[W],
    (m, n, d): (usize, usize, usize),
) {
    assert!(sums.len() == m * d && p.len() == m * n && values.len() == n * d, "weighted sums {m} x {n} x {d}");
    for first in (0..m).step_by(MOST_QUERIES) {
        let count = MOST_QUERIES.min(m - first);
        let (p, sums) = (&p[first * n..(first + count) * n], &mut sums[first * d..(first + count) * d]);
        // SAFETY: as this function's.
        unsafe {
            match count {
                1 => some_sums::<W, 1>(sums, p, values, n, d),
                2 => some_sums::<W, 2>(sums, p, values, n, d),
                3 => some_sums::<W, 3>(sums, p, values, n, d),
                _ => some_sums::<W, MOST_QUERIES>(sums, p, values, n, d),
            }
        }
    }
}

/// # Safety
/// As [`weighted_sums`], with all lengths as there.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn some_sums<W: Row, const M: usize>(sums: &mut [f32], p: &[f32], values: &[W], n: usize, d: usize) {
    // SAFETY: of the d elements of each row those from `at` on, as many as the second number says.
    unsafe {
        for at in (0..d / (2 * STEP)).map(|i| i * 2 * STEP) {
            columns::<W, M, 2>(sums, p, values, n, d, at);
        }
        if !d.is_multiple_of(2 * STEP) {
            columns::<W, M, 1>(sums, p, values, n, d, d - STEP);
        }
    }
}

/// Columns `at..at + 32 STEPS` of [`weighted_sums`].
///
/// # Safety
/// As [`weighted_sums`], with all lengths as there, and the columns must be inside d.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn columns<W: Row, const M: usize, const STEPS: usize>(
    sums: &mut [f32],
    p: &[f32],
    values: &[W],
    n: usize,
    d: usize,
    at: usize,
) {
    let mut all = [[[_mm512_setzero_ps(); 2]; STEPS]; M];
    for i in 0..n {
        prefetch(values.as_ptr().wrapping_add((i + AHEAD) * d + at), STEPS * STEP);
        for step in 0..STEPS {
            // SAFETY: 32 elements of a value.
            let x = unsafe { W::widened_step(values.as_ptr().add(i * d + at + step * STEP)) };
            for row in 0..M {
                // SAFETY: one of the n numbers of a row.
                let p = _mm512_set1_ps(unsafe { *p.as_ptr().add(row * n + i) });
                for half in 0..2 {
                    all[row][step][half] = _mm512_fmadd_ps(p, x[half], all[row][step][half]);
                }
            }
        }
    }
    for row in 0..M {
        for step in 0..STEPS {
            // SAFETY: 32 of the d elements of a row.
            unsafe {
                let [low, high] = W::restored(all[row][step]);
                let to = sums.as_mut_ptr().add(row * d + at + step * STEP);
                _mm512_storeu_ps(to, low);
                _mm512_storeu_ps(to.add(16), high);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    fn check<W: Row>(narrow: impl Fn(f32) -> W, wide: impl Fn(W) -> f32) {
        for (m, n, d) in [(1, 1, 32), (3, 15, 64), (2, 16, 96), (4, 17, 128), (5, 40, 64), (9, 33, 32)] {
            let (q, p) = (numbers(m * d, 1), numbers(m * n, 2));
            let rows: Vec<W> = numbers(n * d, 3).into_iter().map(&narrow).collect();
            let at = |i: usize, x: usize| f64::from(wide(rows[i * d + x]));
            let (mut scores, mut sums) = (vec![f32::NAN; m * n], vec![f32::NAN; m * d]);
            // SAFETY: only called where the instructions are there; d is a multiple of 32.
            unsafe {
                products(&mut scores, &q, &rows, (m, n, d), 0.5);
                weighted_sums(&mut sums, &p, &rows, (m, n, d));
            }
            for row in 0..m {
                for i in 0..n {
                    let expected: f64 = (0..d).map(|x| 0.5 * f64::from(q[row * d + x]) * at(i, x)).sum();
                    let found = scores[row * n + i];
                    assert!((f64::from(found) - expected).abs() < 1e-5, "{m} {n} {d}, {row} {i}: {found}, {expected}");
                }
                for x in 0..d {
                    let expected: f64 = (0..n).map(|i| f64::from(p[row * n + i]) * at(i, x)).sum();
                    let found = sums[row * d + x];
                    assert!((f64::from(found) - expected).abs() < 1e-5, "{m} {n} {d}, {row} {x}: {found}, {expected}");
                }
            }
        }
    }

    #[test]
    fn both_products_agree_with_float64_for_either_type_of_row() {
        if !suits(STEP) {
            return crate::tell_untested(&["AVX-512"], &[]);
        }
        check(|x| x, |x| x);
        check(bf16::from_f32, bf16::to_f32);
    }
}
