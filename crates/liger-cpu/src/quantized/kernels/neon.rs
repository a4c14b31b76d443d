//! ARM's dot products of bytes (`sdot`), which every server and desktop core since about 2018 has.

use std::arch::aarch64::{
    float32x4_t, int8x16_t, int32x4_t, uint16x4_t, vaddq_s32, vandq_u8, vcvtq_f32_s32, vdupq_n_f32, vdupq_n_s32,
    vdupq_n_u8, veorq_u8, vfmaq_f32, vfmaq_n_f32, vld1_u16, vld1q_u8, vmulq_n_f32, vreinterpretq_s8_s32,
    vreinterpretq_s8_u8, vshlq_n_s32, vshrq_n_u8, vst1q_f32,
};
use std::arch::asm;

use super::{BLOCK, DType, LANES, Piece, STEP, Sixteen};

/// Vectors of four outputs in a group.
const QUARTERS: usize = LANES / 4;

#[target_feature(enable = "neon,dotprod")]
pub(super) fn piece(p: &Piece<'_>) {
    tiles!(p, tile, "neon,dotprod", [1: 1 2]);
}

/// `sums` of four outputs and the products of four terms of each. The intrinsic is not stable yet.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn dot(mut sums: int32x4_t, weights: int8x16_t, terms: int8x16_t) -> int32x4_t {
    // SAFETY: registers alone; the feature is enabled.
    unsafe {
        asm!(
            "sdot {sums:v}.4s, {weights:v}.16b, {terms:v}.16b",
            sums = inout(vreg) sums, weights = in(vreg) weights, terms = in(vreg) terms,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

/// Four of a group's float16 numbers. Float16 vectors are not stable yet.
#[target_feature(enable = "neon")]
#[inline]
fn numbers(n: &Sixteen, quarter: usize) -> float32x4_t {
    // SAFETY: four of 16 numbers.
    let narrow: uint16x4_t = unsafe { vld1_u16(n.0.as_ptr().add(4 * quarter)) };
    let wide: float32x4_t;
    // SAFETY: registers alone; every such CPU converts float16.
    unsafe {
        asm!(
            "fcvtl {wide:v}.4s, {narrow:v}.4h", wide = out(vreg) wide, narrow = in(vreg) narrow,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    wide
}

#[target_feature(enable = "neon,dotprod")]
#[inline]
fn tile<const R: usize, const G: usize, const FOUR: bool, const OFFSETS: bool>(
    p: &Piece<'_>,
    row: usize,
    group: usize,
) {
    let mut x = [p.row(row); R];
    for r in 1..R {
        x[r] = p.row(row + r);
    }
    let (blocks, lines) = (p.blocks(), if FOUR { BLOCK / STEP / 2 } else { BLOCK / STEP });
    // Unsigned bytes become signed ones, so that their zero is 0; of 4 bits they are signed as they are.
    let (zero, sign) = (if FOUR { p.w.zero() } else { 0 }, vdupq_n_u8(if FOUR { 0 } else { 0x80 }));
    assert!(x.iter().all(|x| x.bytes.len() == 2 * blocks * BLOCK));
    for g in 0..G {
        let w = p.group(group + g);
        assert!(w.quants.len() == blocks * lines && w.scales.len() == blocks);
        let mut totals = [[vdupq_n_f32(0.0); QUARTERS]; R];
        for b in 0..blocks {
            // Sums of the high bytes and of the low ones.
            let mut sums = [[[vdupq_n_s32(0); QUARTERS]; R]; 2];
            for r in 0..R {
                sums[1][r] = [vdupq_n_s32((-zero).wrapping_mul(x[r].sums[b])); QUARTERS];
            }
            for step in 0..BLOCK / STEP {
                let line = &w.quants[b * lines + step % lines].0;
                let mut weights = [vreinterpretq_s8_u8(sign); QUARTERS];
                for quarter in 0..QUARTERS {
                    // SAFETY: 16 of 64 bytes.
                    let bytes = unsafe { vld1q_u8(line.as_ptr().add(16 * quarter)) };
                    weights[quarter] = vreinterpretq_s8_u8(match (FOUR, step < lines) {
                        (false, _) => veorq_u8(bytes, sign),
                        (true, true) => vandq_u8(bytes, vdupq_n_u8(15)),
                        (true, false) => vshrq_n_u8::<4>(bytes),
                    });
                }
                for byte in 0..2 {
                    for r in 0..R {
                        let at = (2 * b + byte) * BLOCK + step * STEP;
                        // SAFETY: four bytes, no alignment needed; as many as asserted.
                        let terms = unsafe { x[r].bytes.as_ptr().add(at).cast::<i32>().read_unaligned() };
                        let terms = vreinterpretq_s8_s32(vdupq_n_s32(terms));
                        for quarter in 0..QUARTERS {
                            sums[byte][r][quarter] = dot(sums[byte][r][quarter], weights[quarter], terms);
                        }
                    }
                }
            }
            for quarter in 0..QUARTERS {
                let scale = numbers(&w.scales[b], quarter);
                for r in 0..R {
                    let sum = vaddq_s32(vshlq_n_s32::<8>(sums[0][r][quarter]), sums[1][r][quarter]);
                    let scale = vmulq_n_f32(scale, x[r].scales[b]);
                    totals[r][quarter] = vfmaq_f32(totals[r][quarter], vcvtq_f32_s32(sum), scale);
                    if OFFSETS {
                        let offset = numbers(&w.offsets[b], quarter);
                        totals[r][quarter] =
                            vfmaq_n_f32(totals[r][quarter], offset, x[r].scales[b] * x[r].sums[b] as f32);
                    }
                }
            }
        }
        for r in 0..R {
            let mut sums = [0.0f32; LANES];
            for quarter in 0..QUARTERS {
                // SAFETY: four of 16 floats.
                unsafe { vst1q_f32(sums.as_mut_ptr().add(4 * quarter), totals[r][quarter]) };
            }
            p.store(row + r, group + g, &sums);
        }
    }
}
