//! ARM's dot products of bytes (`sdot`), which every server and desktop core since about 2018 has.

use std::arch::aarch64::{
    float32x4_t, int8x16_t, int32x4_t, uint8x16_t, uint16x4_t, vaddq_s32, vandq_u8, vcvtq_f32_s32, vdupq_n_f32,
    vdupq_n_s32, vdupq_n_u8, veorq_u8, vfmaq_f32, vfmaq_n_f32, vld1_u16, vld1q_f32, vld1q_u8, vmulq_f32, vmulq_n_f32,
    vorrq_u8, vreinterpretq_s8_s32, vreinterpretq_s8_u8, vshlq_n_s32, vshlq_n_u8, vshrq_n_u8, vst1q_f32,
};
use std::arch::asm;

use super::{BLOCK, Fine, Form, LANES, Line, Piece, Q8_0, STEP, Sixteen, by_form};

/// Vectors of four outputs in a group.
const QUARTERS: usize = LANES / 4;

#[target_feature(enable = "neon,dotprod")]
pub(super) fn piece(p: &Piece<'_>) {
    tiles!(p, tile, "neon,dotprod", 1 2);
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

/// Bytes of four outputs from place `first` on, in float32.
#[target_feature(enable = "neon")]
#[inline]
fn bytes(fine: &Fine, first: usize, are_signed: bool) -> float32x4_t {
    let bytes: &[u8; 4] = fine.0[first..].first_chunk().unwrap_or(&[0; 4]);
    let numbers = bytes.map(|byte| if are_signed { f32::from(byte as i8) } else { f32::from(byte) });
    // SAFETY: four floats.
    unsafe { vld1q_f32(numbers.as_ptr()) }
}

/// Quants of four outputs of a step, signed.
#[target_feature(enable = "neon")]
#[inline]
fn quants<F: Form>(lines: &[Line], step: usize, quarter: usize) -> int8x16_t {
    let line = |line: usize| -> uint8x16_t {
        // SAFETY: 16 of 64 bytes.
        unsafe { vld1q_u8(lines[line].0.as_ptr().add(16 * quarter)) }
    };
    if F::BITS == 8 {
        return vreinterpretq_s8_u8(veorq_u8(line(step), vdupq_n_u8(0x80)));
    }
    let both = line(step % 4);
    let low = if step < 4 { vandq_u8(both, vdupq_n_u8(15)) } else { vshrq_n_u8::<4>(both) };
    if F::BITS == 4 {
        return vreinterpretq_s8_u8(low);
    }
    let top = line(4 + step / 4);
    let top = match step % 4 {
        0 => vshlq_n_u8::<4>(top),
        1 => vshlq_n_u8::<2>(top),
        2 => top,
        _ => vshrq_n_u8::<2>(top),
    };
    vreinterpretq_s8_u8(vorrq_u8(low, vandq_u8(top, vdupq_n_u8(0x30))))
}

#[target_feature(enable = "neon,dotprod")]
#[inline]
fn tile<const R: usize, F: Form>(p: &Piece<'_>, row: usize, group: usize) {
    let mut x = [p.row(row); R];
    for r in 1..R {
        x[r] = p.row(row + r);
    }
    let blocks = p.blocks();
    // Unsigned bytes become signed ones, so that their zero is 0; of fewer bits they are signed as they are.
    let zero = if F::BITS == 8 { 0 } else { F::ZERO };
    assert!(x.iter().all(|x| x.bytes.len() == 2 * blocks * BLOCK));
    let w = p.group(group);
    w.check::<F>(blocks);
    let mut totals = [[vdupq_n_f32(0.0); QUARTERS]; R];
    for b in 0..blocks {
        for part in 0..F::PARTS {
            // Sums of the high bytes and of the low ones.
            let mut sums = [[[vdupq_n_s32(0); QUARTERS]; R]; 2];
            for r in 0..R {
                sums[1][r] = [vdupq_n_s32((-zero).wrapping_mul(x[r].sum::<F>(b, part))); QUARTERS];
            }
            for i in 0..F::STEPS {
                let step = F::step(part, i);
                let mut weights = [vreinterpretq_s8_u8(vdupq_n_u8(0)); QUARTERS];
                for quarter in 0..QUARTERS {
                    weights[quarter] = quants::<F>(&w.quants[b * F::BITS..(b + 1) * F::BITS], step, quarter);
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
                let mut scale = numbers(&w.scales[F::number(b)], quarter);
                if F::FINE {
                    scale = vmulq_f32(scale, bytes(&w.fine[b], part * LANES + 4 * quarter, F::PARTS == 2));
                }
                for r in 0..R {
                    let sum = vaddq_s32(vshlq_n_s32::<8>(sums[0][r][quarter]), sums[1][r][quarter]);
                    let scale = vmulq_n_f32(scale, x[r].scales[b]);
                    totals[r][quarter] = vfmaq_f32(totals[r][quarter], vcvtq_f32_s32(sum), scale);
                }
            }
        }
        if F::OFFSETS {
            for quarter in 0..QUARTERS {
                let mut offset = numbers(&w.offsets[F::number(b)], quarter);
                if F::FINE {
                    offset = vmulq_f32(offset, bytes(&w.fine[b], LANES + 4 * quarter, false));
                }
                for r in 0..R {
                    let sum = x[r].scales[b] * x[r].sum::<Q8_0>(b, 0) as f32;
                    totals[r][quarter] = vfmaq_n_f32(totals[r][quarter], offset, sum);
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
        p.store(row + r, group, &sums);
    }
}
