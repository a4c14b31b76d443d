//! By AVX-512's dot products of two terms: tiles of up to 12 rows times 32 outputs, 24 sums of 16 in registers.

// Loops of constant length over the registers of a tile are unrolled as they stand.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::{
    __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_set1_epi32,
    _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_storeu_ps,
    _mm512_storeu_si512, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};

use std::ops::Range;

use half::bf16;

use super::{Block, PANEL, Pair, Work};

const MOST_ROWS: usize = 12;

/// Bytes of rows that stay in a core's second cache while the panels go by, one after the other.
const CACHED: usize = 512 << 10;

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) fn multiply(work: Work<'_>) {
    let stretch = (CACHED / (2 * work.terms)).next_multiple_of(PANEL);
    for row in (0..work.rows).step_by(stretch) {
        for panel in work.panels() {
            block(&panel, row..work.rows.min(row + stretch));
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn block(p: &Block<'_>, rows: Range<usize>) {
    let mut row = rows.start;
    while row < rows.end {
        // What is left is cut evenly: 13 rows are tiles of 7 and 6.
        let left = rows.end - row;
        let count = left.div_ceil(left.div_ceil(MOST_ROWS));
        match count {
            1 => tile::<1>(p, row),
            2 => tile::<2>(p, row),
            3 => tile::<3>(p, row),
            4 => tile::<4>(p, row),
            5 => tile::<5>(p, row),
            6 => tile::<6>(p, row),
            7 => tile::<7>(p, row),
            8 => tile::<8>(p, row),
            9 => tile::<9>(p, row),
            10 => tile::<10>(p, row),
            11 => tile::<11>(p, row),
            _ => tile::<12>(p, row),
        }
        row += count;
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn numbers(bits: __m512i) -> __m512bh {
    // SAFETY: both are any 64 bytes.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(bits) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
fn tile<const R: usize>(p: &Block<'_>, row: usize) {
    let pairs = p.terms / 2;
    assert!(p.b.len() >= pairs * PANEL && p.a.len() >= (row + R - 1) * p.stride + 2 * pairs, "rows of a tile");
    let mut a = [p.a.as_ptr().cast::<i32>(); R];
    for r in 0..R {
        // SAFETY: inside, as asserted; a row begins at a multiple of two elements.
        a[r] = unsafe { p.a.as_ptr().add((row + r) * p.stride).cast() };
    }
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    for pair in 0..pairs {
        // SAFETY: a panel has 32 pairs for each two terms.
        let b = unsafe {
            let at = p.b.as_ptr().add(pair * PANEL);
            [numbers(_mm512_loadu_si512(at.cast())), numbers(_mm512_loadu_si512(at.add(PANEL / 2).cast()))]
        };
        for r in 0..R {
            // SAFETY: two terms of a row that was asserted to have them.
            let terms = numbers(_mm512_set1_epi32(unsafe { a[r].add(pair).read_unaligned() }));
            for half in 0..2 {
                sums[r][half] = _mm512_dpbf16_ps(sums[r][half], terms, b[half]);
            }
        }
    }
    let scale = _mm512_set1_ps(p.scale);
    for r in 0..R {
        let mut last = [0.0f32; PANEL];
        // The last panel may be narrower than 32 outputs.
        let out = if p.count == PANEL { p.outputs(row + r) } else { &mut last };
        assert!(out.len() == PANEL);
        for half in 0..2 {
            // SAFETY: 16 floats of 32, no alignment needed.
            unsafe {
                let at = out.as_mut_ptr().add(half * PANEL / 2);
                let add = p.accumulate && p.count == PANEL;
                let before = if add { _mm512_loadu_ps(at) } else { _mm512_setzero_ps() };
                let factor = if p.count == PANEL { scale } else { _mm512_set1_ps(1.0) };
                _mm512_storeu_ps(at, _mm512_fmadd_ps(factor, sums[r][half], before));
            }
        }
        if p.count < PANEL {
            p.store(row + r, &last);
        }
    }
}

/// Pairs `[16 outputs, 16]`, rows `stride` apart, into `[16, 16 outputs]` of rows of a panel.
///
/// # Safety
/// `from` must have 16 rows of 16 pairs, `to` as many rows of a panel.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn transpose(to: *mut Pair, from: *const bf16, stride: usize) {
    let mut x = [_mm512_setzero_si512(); 16];
    for i in 0..16 {
        // SAFETY: the caller's promise.
        x[i] = unsafe { _mm512_loadu_si512(from.add(i * stride).cast()) };
    }
    // Twos, fours, then whole quarters of vectors change places.
    let mut y = x;
    for i in (0..16).step_by(2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for i in (0..16).step_by(4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
    for i in 0..4 {
        for four in [0, 8] {
            y[four + i] = _mm512_shuffle_i32x4::<0b10_00_10_00>(x[four + i], x[four + 4 + i]);
            y[four + 4 + i] = _mm512_shuffle_i32x4::<0b11_01_11_01>(x[four + i], x[four + 4 + i]);
        }
    }
    for i in 0..8 {
        x[i] = _mm512_shuffle_i32x4::<0b10_00_10_00>(y[i], y[8 + i]);
        x[8 + i] = _mm512_shuffle_i32x4::<0b11_01_11_01>(y[i], y[8 + i]);
    }
    for i in 0..16 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_storeu_si512(to.add(i * PANEL).cast(), x[i]) };
    }
}
