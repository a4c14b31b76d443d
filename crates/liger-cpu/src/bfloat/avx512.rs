//! By AVX-512's dot products of two terms: tiles of up to 8 rows times 48 outputs or 12 rows times 32, 24 sums of 16 in registers.
//! The former load less for as many products; the latter are for outputs that would fill panels of 48 badly.

// Loops of constant length over the registers of a tile are unrolled as they stand.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::{_mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps};

use std::ops::Range;

use super::output::Output;
use super::{Block, Work, as_bfloat16};
use crate::prefetch::prefetch;

/// Floats of a register.
const LANES: usize = 16;
/// Registers of sums in a tile.
pub(super) const SUMS: usize = 24;

/// Bytes of rows that stay in a core's second cache while the panels go by, one after the other.
const CACHED: usize = 512 << 10;

/// Outputs of a panel, 32 or 48, for so many in all: 48, unless a thirtieth more would be multiplied for nothing.
pub(super) fn panel(outputs: usize) -> usize {
    let [narrow, wide] = [2 * LANES, 3 * LANES];
    if 30 * outputs.next_multiple_of(wide) > 31 * outputs.next_multiple_of(narrow) { narrow } else { wide }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) fn multiply<C: Output>(work: Work<'_, C>, rows: Range<usize>) {
    // A multiple of the rows of both tiles.
    let stretch = (CACHED / (2 * work.terms)).next_multiple_of(SUMS);
    for row in rows.clone().step_by(stretch) {
        let rows = row..rows.end.min(row + stretch);
        for panel in work.panels() {
            match work.panel / LANES {
                2 => block::<C, 2>(&panel, rows.clone()),
                _ => block::<C, 3>(&panel, rows.clone()),
            }
        }
    }
}

/// A panel of V registers.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn block<C: Output, const V: usize>(p: &Block<'_, C>, rows: Range<usize>) {
    let mut row = rows.start;
    while row < rows.end {
        // What is left is cut evenly: 13 rows are tiles of 7 and 6.
        let left = rows.end - row;
        let count = left.div_ceil(left.div_ceil(SUMS / V));
        match count {
            1 => tile::<C, 1, V>(p, row),
            2 => tile::<C, 2, V>(p, row),
            3 => tile::<C, 3, V>(p, row),
            4 => tile::<C, 4, V>(p, row),
            5 => tile::<C, 5, V>(p, row),
            6 => tile::<C, 6, V>(p, row),
            7 => tile::<C, 7, V>(p, row),
            8 => tile::<C, 8, V>(p, row),
            9 if V == 2 => tile::<C, 9, 2>(p, row),
            10 if V == 2 => tile::<C, 10, 2>(p, row),
            11 if V == 2 => tile::<C, 11, 2>(p, row),
            _ if V == 2 => tile::<C, 12, 2>(p, row),
            _ => unreachable!("more rows than a tile has"),
        }
        row += count;
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
fn tile<C: Output, const R: usize, const V: usize>(p: &Block<'_, C>, row: usize) {
    let (pairs, panel) = (p.terms / 2, V * LANES);
    assert!(
        p.panel == panel && p.b.len() >= pairs * panel && p.a.len() >= (row + R - 1) * p.stride + pairs,
        "rows of a tile"
    );
    let out = p.outputs_from(row..row + R);
    let mut a = [p.a.as_ptr(); R];
    for r in 0..R {
        // SAFETY: inside, as asserted.
        a[r] = unsafe { p.a.as_ptr().add((row + r) * p.stride) };
    }
    let mut sums = [[_mm512_setzero_ps(); V]; R];
    // Where the sums go has mostly left the caches: it is asked for in the first half, a row at a time, so that other loads do not wait.
    let piece = pairs.div_ceil(2 * R);
    let (mut pair, mut asked) = (0, 0);
    while pair < pairs {
        let end = if asked < R { pairs.min(pair + piece) } else { pairs };
        prefetch(out.wrapping_add(asked * p.width), panel);
        asked += 1;
        while pair < end {
            let mut b = [as_bfloat16(_mm512_set1_epi32(0)); V];
            for v in 0..V {
                // SAFETY: a panel has that many pairs for each two terms.
                b[v] = as_bfloat16(unsafe { _mm512_loadu_si512(p.b.as_ptr().add(pair * panel + v * LANES).cast()) });
            }
            for r in 0..R {
                // SAFETY: two terms of a row that was asserted to have them.
                let terms = as_bfloat16(_mm512_set1_epi32(unsafe { a[r].add(pair).read() } as i32));
                for v in 0..V {
                    sums[r][v] = _mm512_dpbf16_ps(sums[r][v], terms, b[v]);
                }
            }
            pair += 1;
        }
    }
    // Of the last panel some outputs may not be there. With a check of each row the loop stays a loop, and the sums go through memory.
    let (scale, is_whole) = (_mm512_set1_ps(p.scale), p.count == panel);
    for v in 0..V {
        let mask = if is_whole { u16::MAX } else { (((1u64 << p.count) - 1) >> (v * LANES)) as u16 };
        for r in 0..R {
            // SAFETY: the panel's outputs of one of these rows, which are the task's own.
            unsafe { C::store(out.add(r * p.width + v * LANES), mask, scale, sums[r][v], p.accumulate) };
        }
    }
}
