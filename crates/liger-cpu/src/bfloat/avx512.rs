//! By AVX-512's dot products of two terms: tiles of up to 12 rows times 32 outputs, 24 sums of 16 in registers.

// Loops of constant length over the registers of a tile are unrolled as they stand.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::{
    __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_si512, _mm512_maskz_loadu_ps, _mm512_set1_epi32,
    _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
};

use std::ops::Range;

use super::{Block, Work};

/// Outputs of a panel.
pub(super) const PANEL: usize = 32;
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
    assert!(p.b.len() >= pairs * PANEL && p.a.len() >= (row + R - 1) * p.stride + pairs, "rows of a tile");
    let mut a = [p.a.as_ptr(); R];
    for r in 0..R {
        // SAFETY: inside, as asserted.
        a[r] = unsafe { p.a.as_ptr().add((row + r) * p.stride) };
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
            let terms = numbers(_mm512_set1_epi32(unsafe { a[r].add(pair).read() } as i32));
            for half in 0..2 {
                sums[r][half] = _mm512_dpbf16_ps(sums[r][half], terms, b[half]);
            }
        }
    }
    // The last panel may be narrower than 32 outputs.
    if p.count < PANEL {
        let mut rows = [[0.0f32; PANEL]; R];
        for r in 0..R {
            for half in 0..2 {
                // SAFETY: 16 floats of 32, no alignment needed.
                unsafe { _mm512_storeu_ps(rows[r].as_mut_ptr().add(half * PANEL / 2), sums[r][half]) };
            }
        }
        rows.iter().enumerate().for_each(|(r, sums)| p.store(row + r, sums));
        return;
    }
    // With a check of each row the loop stays a loop, and the sums go through memory.
    let out = p.outputs_from(row..row + R);
    let (scale, keep) = (_mm512_set1_ps(p.scale), if p.accumulate { u16::MAX } else { 0 });
    for r in 0..R {
        for half in 0..2 {
            // SAFETY: the whole panel's outputs of one of these rows; a task has panels of its own.
            unsafe {
                let at = out.add(r * p.width + half * PANEL / 2);
                _mm512_storeu_ps(at, _mm512_fmadd_ps(scale, sums[r][half], _mm512_maskz_loadu_ps(keep, at)));
            }
        }
    }
}
