//! By the matrix units: 32 rows times 16 outputs in two tiles of 16 x 16 sums, 32 terms at a time.
//!
//! Four tiles of sums would need a third fewer loads, but they take all eight tiles. Where another program runs on the other half of
//! the core, a product then takes four times as long, with four tiles in use twice as long (docs/experiments.md): as if a thread
//! had few more than eight to rename, so that loads wait for products.
//!
//! All panels go by 32 rows before the next 32 are looked at, some terms at a time: those of the rows stay in the first cache, and
//! the sums of neighbouring panels are neighbours.

use std::arch::asm;
use std::arch::x86_64::{_mm512_loadu_ps, _mm512_set1_ps};
use std::ops::Range;

use super::output::Output;
use super::{Block, STEP, STRIP, Work};
use crate::tiles::{self, SIDE};

/// Terms of 32 rows that stay in the first cache while panels go by, also where two threads share it.
const DEPTH: usize = 320;

/// # Safety
/// The CPU must have the tiles' products of bfloat16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn multiply<C: Output>(work: Work<'_, C>, rows: Range<usize>) {
    let (terms, together) = (work.terms, work.rows_together);
    let groups = rows.end.div_ceil(together);
    assert!(
        terms.is_multiple_of(STEP)
            && rows.start.is_multiple_of(SIDE)
            && (together == SIDE || rows.end.is_multiple_of(SIDE))
            && (groups == 0 || work.a.len() >= together * ((groups - 1) * work.stride + terms / 2))
    );
    let mut apart = [0.0f32; 2 * SIDE * SIDE];
    // Each stretch of terms goes through the sums again: where there are many, or outputs are narrower, sums of 32 rows are added up
    // in a strip that stays near.
    let in_place = terms <= 2 * DEPTH && C::as_sums(std::ptr::null_mut()).is_some();
    // Rows of the strip are an odd number of lines apart, so that those of a tile find a place each in the first cache.
    let (mut strip, strip_width) = (STRIP.take(), (work.count.div_ceil(SIDE) | 1) * SIDE);
    if !in_place {
        strip.reserve::<f32>(2 * SIDE * strip_width);
    }
    // Terms are cut evenly.
    let depth = terms.div_ceil(terms.div_ceil(DEPTH).max(1)).next_multiple_of(STEP);
    // Tiles 0 and 1 are sums, 2 rows, 3 outputs.
    // SAFETY: as this function's.
    unsafe { tiles::configure(&[(SIDE as u8, 64); 4]) };
    for row in rows.clone().step_by(2 * SIDE) {
        let rows = row..rows.end.min(row + 2 * SIDE);
        for from in (0..terms).step_by(depth) {
            let terms = from..terms.min(from + depth);
            for p in (Work { accumulate: work.accumulate || from > 0, ..work }).panels() {
                let Some(out) = C::as_sums(p.outputs_from(rows.clone())).filter(|_| in_place) else {
                    let to = strip.as_mut_slice::<f32>()[p.first - work.first..].as_mut_ptr();
                    // SAFETY: as this function's; the strip has place for all outputs of 32 rows.
                    unsafe { sums(&p, rows.clone(), terms.clone(), (to, strip_width), from > 0) };
                    continue;
                };
                // Sums of whole tiles go straight to where they belong.
                if p.scale == 1.0 && p.count == SIDE && rows.len() == 2 * SIDE {
                    // SAFETY: as this function's; the tiles write the panel's outputs of these rows.
                    unsafe { sums(&p, rows.clone(), terms.clone(), (out, p.width), p.accumulate) };
                } else {
                    // SAFETY: as above.
                    unsafe { sums(&p, rows.clone(), terms.clone(), (apart.as_mut_ptr(), SIDE), false) };
                    apart.chunks_exact(SIDE).zip(rows.clone()).for_each(|(sums, row)| p.store(row, sums));
                }
            }
        }
        if !in_place {
            for (row, sums) in rows.zip(strip.as_slice::<f32>().chunks_exact(strip_width)) {
                // SAFETY: as this function's.
                unsafe { write(&work, row, sums) };
            }
        }
    }
    STRIP.set(strip);
    // SAFETY: as above.
    unsafe { tiles::release() };
}

/// The outputs of a row from its sums, which are there up to a multiple of 16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn write<C: Output>(work: &Work<'_, C>, row: usize, sums: &[f32]) {
    let out = work.c.pointer(row * work.width + work.first, work.count);
    let scale = _mm512_set1_ps(work.scale);
    for (at, sums) in (0..work.count).step_by(SIDE).zip(sums.chunks_exact(SIDE)) {
        let mask = u16::MAX >> SIDE.saturating_sub(work.count - at);
        // SAFETY: the task's outputs of a row, of which the mask names those that are there.
        unsafe { C::store(out.add(at), mask, scale, _mm512_loadu_ps(sums.as_ptr()), work.accumulate) };
    }
}

/// Sums `[32, 16]` of two tiles of rows, to `c` with rows so many floats apart, or added to what is there. Rows behind `rows` are
/// whatever lies there.
///
/// # Safety
/// The tiles must be configured; `p` must hold the tiles of these rows and terms, and `c` have place for two tiles.
unsafe fn sums<C: Output>(
    p: &Block<'_, C>,
    rows: Range<usize>,
    terms: Range<usize>,
    (c, c_width): (*mut f32, usize),
    accumulate: bool,
) {
    // Where there is no second tile of rows, it is the first one again.
    let second = if rows.len() > SIDE { SIDE } else { 0 };
    let a = p.a[rows.start * p.stride + terms.start / 2 * p.rows_together..].as_ptr();
    // Bytes from a row of a tile to the next, and from a tile to that of the next terms.
    let (a_line, a_step) = if p.rows_together == 1 { (4 * p.stride, 2 * STEP) } else { (64, 2 * STEP * SIDE) };
    // SAFETY: the caller's promises.
    unsafe {
        asm!(
            "test {accumulate}, {accumulate}", "jnz 3f",
            "tilezero tmm0", "tilezero tmm1",
            "jmp 2f",
            "3:",
            "tileloadd tmm0, [{c} + {c_stride}*1]",
            "tileloadd tmm1, [{c2} + {c_stride}*1]",
            "2:",
            "tileloadd tmm3, [{b} + {line}*1]",
            "tileloadd tmm2, [{a} + {a_line}*1]",
            "tdpbf16ps tmm0, tmm2, tmm3",
            "tileloadd tmm2, [{a2} + {a_line}*1]",
            "tdpbf16ps tmm1, tmm2, tmm3",
            "add {a}, {a_step}", "add {a2}, {a_step}", "add {b}, 1024",
            "dec {steps}", "jnz 2b",
            "tilestored [{c} + {c_stride}*1], tmm0",
            "tilestored [{c2} + {c_stride}*1], tmm1",
            accumulate = in(reg) usize::from(accumulate),
            a = inout(reg) a => _,
            a2 = inout(reg) a.add(second * p.stride) => _,
            b = inout(reg) p.b[terms.start / 2 * SIDE..].as_ptr() => _,
            a_line = in(reg) a_line,
            a_step = in(reg) a_step,
            // Bytes of a row of a tile that lies in one piece.
            line = in(reg) 64usize,
            steps = inout(reg) terms.len() / STEP => _,
            c = in(reg) c,
            c2 = in(reg) c.add(SIDE * c_width),
            c_stride = in(reg) 4 * c_width,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            options(nostack),
        );
    }
}
