//! Products of few rows of activations, such as a decoding step of several texts. The weights are read once, as they lie in memory:
//! packing them would take as long as multiplying by them.

// Loops of constant length over the registers of a tile are unrolled as they stand.
#![allow(clippy::needless_range_loop)]

use std::arch::asm;
use std::arch::x86_64::{
    __m512, _mm512_add_ps, _mm512_castsi512_ps, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_set1_ps,
    _mm512_setzero_ps, _mm512_setzero_si512, _mm512_shuffle_f32x4, _mm512_shuffle_ps, _mm512_unpackhi_ps,
    _mm512_unpacklo_ps,
};
use std::ops::Range;

use half::bf16;

use super::output::Output;
use super::pack::{Layout, Pair, Source, transposed};
use super::{Kernel, ROUNDED, STEP, as_bfloat16, packed_rows};
use crate::parallel::{Disjoint, for_tasks, pieces};
use crate::prefetch::prefetch;
use crate::tiles::{self, SIDE};

/// Outputs that are multiplied together at least, and whose number a task's is a multiple of.
const GROUP: usize = 16;

/// Rows up to which this pays.
const MOST: usize = 32;

/// Whether [`product`] takes these sizes: terms fill the kernels' steps, and outputs one group at least.
pub(crate) fn takes((m, n, k): (usize, usize, usize)) -> bool {
    m <= MOST && n >= GROUP && k.is_multiple_of(STEP)
}

struct Few<'a, C> {
    /// Rounded, `[rows, terms]` or for the matrix units `[rows / 16, terms / 2, 16, 2]`.
    a: &'a [Pair],
    rows: usize,
    /// `[outputs, terms]`.
    w: &'a [bf16],
    terms: usize,
    c: &'a Disjoint<'a, C>,
    /// Outputs of a row of `c`.
    width: usize,
    scale: f32,
    accumulate: bool,
}

impl<C> Few<'_, C> {
    fn weights(&self, output: usize, term: usize) -> *const bf16 {
        self.w.as_ptr().wrapping_add(output * self.terms + term)
    }
}

/// `c [m, n] = scale a [m, k] w [n, k]^T (+ c)` for sizes that [`takes`] says.
pub(crate) fn product<C: Output, A: Source>(
    kernel: Kernel,
    c: &mut [C],
    a: &[A],
    w: &[bf16],
    (m, n, k): (usize, usize, usize),
    scale: f32,
    accumulate: bool,
) {
    let fits = c.len() == m * n && a.len() == m * k && w.len() == n * k;
    assert!(fits && takes((m, n, k)), "bfloat16 product of few rows {m} x {k} x {n}");
    let layout = match kernel {
        Kernel::Amx => Layout::Panels { width: SIDE },
        Kernel::Avx512Bf16 => Layout::Rows { together: 1 },
    };
    let mut rounded = ROUNDED.take();
    let (a, c) = (packed_rows(layout, &mut rounded, a, (m, k)), &Disjoint::new(c));
    let work = Few { a, rows: m, w, terms: k, c, width: n, scale, accumulate };
    let (groups, pieces) = (n.div_ceil(GROUP), pieces(m * n * k));
    for_tasks(pieces, |piece| {
        let outputs = groups * piece / pieces * GROUP..n.min(groups * (piece + 1) / pieces * GROUP);
        match kernel {
            // SAFETY: `available` found the instructions.
            Kernel::Amx => unsafe { by_tiles(&work, outputs) },
            // SAFETY: as above.
            Kernel::Avx512Bf16 => unsafe { by_vectors(&work, outputs) },
        }
    });
    ROUNDED.set(rounded);
}

/// Outputs of a tile of vectors.
const COLUMNS: usize = 4;
/// Weights that are asked for before their turn: 8 KiB.
const AHEAD: usize = 4096;
/// Most rows of one: with four outputs, 24 sums of 16 in registers.
const MOST_ROWS: usize = 6;

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn by_vectors<C: Output>(p: &Few<'_, C>, outputs: Range<usize>) {
    for group in outputs.clone().step_by(GROUP) {
        let group = group..outputs.end.min(group + GROUP);
        let mut row = 0;
        while row < p.rows {
            // What is left is cut evenly: 8 rows are two tiles of 4.
            let left = p.rows - row;
            let count = left.div_ceil(left.div_ceil(MOST_ROWS));
            for output in group.clone().step_by(COLUMNS) {
                match count {
                    1 => tile::<C, 1>(p, row, output),
                    2 => tile::<C, 2>(p, row, output),
                    3 => tile::<C, 3>(p, row, output),
                    4 => tile::<C, 4>(p, row, output),
                    5 => tile::<C, 5>(p, row, output),
                    _ => tile::<C, 6>(p, row, output),
                }
            }
            row += count;
        }
    }
}

/// Sums of R rows and four outputs from `output` on.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
fn tile<C: Output, const R: usize>(p: &Few<'_, C>, row: usize, output: usize) {
    // The last outputs may be fewer than four: then some before them are multiplied once more, and not stored.
    let first = output.min(p.width - COLUMNS);
    assert!(p.a.len() >= (row + R) * p.terms / 2 && p.w.len() >= (first + COLUMNS) * p.terms, "rows of a tile");
    let (mut a, mut w) = ([p.a.as_ptr(); R], [p.w.as_ptr(); COLUMNS]);
    for r in 0..R {
        a[r] = p.a.as_ptr().wrapping_add((row + r) * p.terms / 2);
    }
    for column in 0..COLUMNS {
        w[column] = p.weights(first + column, 0);
    }
    let mut sums = [[_mm512_setzero_ps(); COLUMNS]; R];
    for term in (0..p.terms).step_by(STEP) {
        // In the order of memory, which is faster than that of the rows.
        if row == 0 {
            prefetch(p.weights(first, COLUMNS * term + AHEAD), COLUMNS * STEP);
        }
        let mut b = [as_bfloat16(_mm512_setzero_si512()); COLUMNS];
        for column in 0..COLUMNS {
            // SAFETY: the terms of an output that was asserted to be there.
            b[column] = as_bfloat16(unsafe { _mm512_loadu_si512(w[column].add(term).cast()) });
        }
        for r in 0..R {
            // SAFETY: likewise, of a row.
            let a = as_bfloat16(unsafe { _mm512_loadu_si512(a[r].add(term / 2).cast()) });
            for column in 0..COLUMNS {
                sums[r][column] = _mm512_dpbf16_ps(sums[r][column], a, b[column]);
            }
        }
    }
    // Not stored: what another task may be writing.
    let mask = 0b1111 & 0b1111 << (output - first);
    for r in 0..R {
        let out = p.c.pointer((row + r) * p.width + first, COLUMNS);
        // SAFETY: four outputs of this row, of which the mask names those of this task.
        unsafe { C::store(out, mask, _mm512_set1_ps(p.scale), totals(sums[r]), p.accumulate) };
    }
}

/// The sum of all elements of each of four registers, in the first four of one.
#[target_feature(enable = "avx512f")]
#[inline]
fn totals([a, b, c, d]: [__m512; COLUMNS]) -> __m512 {
    // In each quarter: a b a b and c d c d, then a b c d.
    let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    let all = _mm512_add_ps(_mm512_shuffle_ps::<0b01_00_01_00>(ab, cd), _mm512_shuffle_ps::<0b11_10_11_10>(ab, cd));
    let halves = _mm512_add_ps(all, _mm512_shuffle_f32x4::<0b01_00_11_10>(all, all));
    _mm512_add_ps(halves, _mm512_shuffle_f32x4::<0b10_11_00_01>(halves, halves))
}

/// 16 outputs times 16 rows at once: a tile of weights is rows of them as they lie in memory.
///
/// # Safety
/// The CPU must have the tiles' products of bfloat16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn by_tiles<C: Output>(p: &Few<'_, C>, outputs: Range<usize>) {
    let panel = SIDE * p.terms / 2;
    assert!(p.a.len() >= p.rows.div_ceil(SIDE) * panel && p.w.len() >= p.width * p.terms, "rows of a tile");
    // Tiles 0 and 1 are sums, 2 outputs, 3 rows.
    // SAFETY: as this function's.
    unsafe { tiles::configure(&[(SIDE as u8, 64); 4]) };
    let mut sums = [0.0f32; 2 * SIDE * SIDE];
    for output in outputs.clone().step_by(SIDE) {
        // The last ones may be fewer than 16: then some before them are multiplied once more, and not stored.
        let first = output.min(p.width - SIDE);
        for row in (0..p.rows).step_by(2 * SIDE) {
            // SAFETY: as this function's; all 16 outputs are there, and so are 32 rows, or 16 twice.
            unsafe { products(p, &mut sums, row, first, row == 0) };
            for (half, sums) in sums.chunks_exact(SIDE * SIDE).enumerate() {
                let rows = row + half * SIDE..p.rows.min(row + (half + 1) * SIDE);
                store_turned(p, sums, rows, first, output - first);
            }
        }
    }
    // SAFETY: as above.
    unsafe { tiles::release() };
}

/// `sums [2, 16 outputs, 16 rows]` of two tiles of rows; where there is no second one it is the first again.
///
/// # Safety
/// As [`by_tiles`], with the tiles configured; the outputs and the first 16 rows must be there.
unsafe fn products<C>(p: &Few<'_, C>, sums: &mut [f32; 2 * SIDE * SIDE], row: usize, output: usize, asks_ahead: bool) {
    let panel = SIDE * p.terms / 2;
    let second = if row + SIDE < p.rows { panel } else { 0 };
    let a = p.a.as_ptr().wrapping_add(row / SIDE * panel);
    // SAFETY: the caller's promise; tiles have 16 rows of 64 bytes.
    unsafe {
        asm!("tilezero tmm0", "tilezero tmm1", out("tmm0") _, out("tmm1") _, options(nostack, nomem));
        for term in (0..p.terms).step_by(STEP) {
            // In the order of memory, as above; a tile's first lines come from all of its rows.
            if asks_ahead {
                prefetch(p.weights(output + SIDE, SIDE * term), SIDE * STEP);
            }
            asm!(
                "tileloadd tmm2, [{w} + {stride}*1]",
                "tileloadd tmm3, [{a} + {line}*1]",
                "tdpbf16ps tmm0, tmm2, tmm3",
                "tileloadd tmm3, [{a2} + {line}*1]",
                "tdpbf16ps tmm1, tmm2, tmm3",
                w = in(reg) p.weights(output, term),
                stride = in(reg) 2 * p.terms,
                a = in(reg) a.wrapping_add(term / 2 * SIDE),
                a2 = in(reg) a.wrapping_add(second + term / 2 * SIDE),
                line = in(reg) 64usize,
                out("tmm2") _, out("tmm3") _,
                options(nostack, readonly),
            );
        }
        asm!(
            "tilestored [{sums} + {line}*1], tmm0",
            "tilestored [{sums2} + {line}*1], tmm1",
            sums = in(reg) sums.as_mut_ptr(),
            sums2 = in(reg) sums.as_mut_ptr().add(SIDE * SIDE),
            line = in(reg) 64usize,
            options(nostack),
        );
    }
}

/// Stores `sums [16 outputs, 16 rows]`, but not the first outputs, which another task may be writing.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn store_turned<C: Output>(p: &Few<'_, C>, sums: &[f32], rows: Range<usize>, first: usize, not_stored: usize) {
    let mut turned = [_mm512_setzero_si512(); SIDE];
    for (sums, turned) in sums.chunks_exact(SIDE).zip(&mut turned) {
        // SAFETY: 16 floats, no alignment needed.
        *turned = unsafe { _mm512_loadu_si512(sums.as_ptr().cast()) };
    }
    let turned = transposed(turned);
    let (mask, scale) = (u16::MAX << not_stored, _mm512_set1_ps(p.scale));
    for (row, sums) in rows.zip(turned) {
        let out = p.c.pointer(row * p.width + first, SIDE);
        // SAFETY: 16 outputs of a row, of which the mask names those of this task.
        unsafe { C::store(out, mask, scale, _mm512_castsi512_ps(sums), p.accumulate) };
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::numbers;
    use super::*;

    #[test]
    fn every_kernel_gives_each_row_what_it_gives_that_row_alone() {
        let round = |x: f32| f64::from(bf16::from_f32(x).to_f32());
        for (m, n, k) in [(1, 16, 32), (2, 33, 64), (7, 100, 96), (17, 50, 576), (23, 17, 160), (32, 79, 1056)] {
            let (a, w, old) = (numbers(m * k, 1), numbers(n * k, 2), numbers(m * n, 3));
            let w: Vec<bf16> = w.into_iter().map(bf16::from_f32).collect();
            for kernel in super::super::available() {
                for (scale, accumulate) in [(1.0, false), (0.5, true)] {
                    let mut c = old.clone();
                    product(kernel, &mut c, &a, &w, (m, n, k), scale, accumulate);
                    for (at, c) in c.iter().enumerate() {
                        let (i, j) = (at / n, at % n);
                        let sum: f64 = (0..k).map(|t| round(a[i * k + t]) * f64::from(w[j * k + t].to_f32())).sum();
                        let expected = f64::from(scale) * sum + if accumulate { f64::from(old[at]) } else { 0.0 };
                        let off = (f64::from(*c) - expected).abs();
                        assert!(
                            off < 2e-5 * (k as f64).sqrt(),
                            "{kernel:?}, {m} {n} {k}, at {i} {j}: {c}, not {expected}"
                        );
                    }
                    for i in 0..m {
                        let mut alone = old[i * n..(i + 1) * n].to_vec();
                        product(kernel, &mut alone, &a[i * k..(i + 1) * k], &w, (1, n, k), scale, accumulate);
                        let same = alone.iter().zip(&c[i * n..]).all(|(a, b)| a.to_bits() == b.to_bits());
                        assert!(same, "{kernel:?}, {m} {n} {k}, row {i}");
                    }
                }
            }
        }
    }
}
