//! By the matrix units: 16 rows times 16 outputs at once, a block of terms at a time, whose sums are then scaled and added up by
//! AVX-512. Rows that fill no tile go to [`avx512`](super::avx512); all get the same sums, to the bit.

use std::arch::asm;
use std::arch::x86_64::{
    __m512, _mm512_add_epi32, _mm512_and_si512, _mm512_cvtepi32_ps, _mm512_fmadd_ps, _mm512_load_si512, _mm512_mul_ps,
    _mm512_mullo_epi32, _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_slli_epi32,
    _mm512_srli_epi16, _mm512_store_si512, _mm512_storeu_ps, _mm512_sub_epi32,
};

use super::super::unpack::{offset, scale};
use super::{BLOCK, Form, Group, LANES, Line, Piece, STEP, avx512, by_form};
use crate::tiles::{self, SIDE};

/// Lines of a block of bytes: what a tile of weights holds.
const LINES: usize = BLOCK / STEP;

/// Sums of 16 rows and outputs, of the high bytes and of the low ones.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Sums([[[i32; LANES]; SIDE]; 2]);

/// # Safety
/// The CPU must have the tiles' products of bytes, and AVX-512 with VNNI.
pub(super) unsafe fn piece(p: &Piece<'_>) {
    // A tile's sums are of a whole block, which must have one scale.
    let of_tiles = by_form!(p.w, F => F::PARTS) == 1;
    let whole = p.rows.start + if of_tiles { p.rows.len() / SIDE * SIDE } else { 0 };
    if whole > p.rows.start {
        // Tiles 0 and 1 are sums, 2 rows, 3 outputs.
        let shapes = [(SIDE as u8, 64), (SIDE as u8, 64), (SIDE as u8, BLOCK as u16), (LINES as u8, 64)];
        let tiled = Piece { rows: p.rows.start..whole, groups: p.groups.clone(), ..*p };
        // SAFETY: the caller's promise.
        unsafe {
            tiles::configure(&shapes);
            by_form!(p.w, F => all::<F>(&tiled));
            tiles::release();
        }
    }
    if whole < p.rows.end {
        // SAFETY: the caller's promise.
        unsafe { avx512::piece(&Piece { rows: whole..p.rows.end, groups: p.groups.clone(), ..*p }) };
    }
}

/// # Safety
/// As [`piece`], with the tiles configured.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn all<F: Form>(p: &Piece<'_>) {
    for group in p.groups.clone() {
        let w = p.group(group);
        for row in p.rows.clone().step_by(SIDE) {
            // SAFETY: as this function's.
            let totals = unsafe { tile::<F>(p, &w, row) };
            for r in 0..SIDE {
                let mut sums = [0.0f32; LANES];
                // SAFETY: 16 floats, no alignment needed.
                unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), totals[r]) };
                p.store(row + r, group, &sums);
            }
        }
    }
}

/// Sums of 16 rows and the outputs of a group. While those of one block are scaled, the next one's are under way.
///
/// # Safety
/// As [`all`].
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
unsafe fn tile<F: Form>(p: &Piece<'_>, w: &Group<'_>, row: usize) -> [__m512; SIDE] {
    let blocks = p.blocks();
    let x = [p.row(row), p.row(row + SIDE - 1)];
    w.check::<F>(blocks);
    assert!(
        x.iter().all(|x| x.bytes.len() == 2 * blocks * BLOCK && x.scales.len() == blocks && x.sums.len() == blocks)
    );
    let [x, _] = x;
    let mut sums = [Sums([[[0; LANES]; SIDE]; 2]); 2];
    let mut totals = [_mm512_setzero_ps(); SIDE];
    // SAFETY: 16 rows of so many blocks, the first and the last of which were looked at.
    unsafe { products::<F>(&mut sums[0], &w.quants[..F::BITS], x.bytes.as_ptr(), 2 * blocks * BLOCK) };
    for b in 0..blocks {
        if b + 1 < blocks {
            let next = b + 1;
            // SAFETY: as above.
            unsafe {
                let bytes = x.bytes.as_ptr().add(2 * next * BLOCK);
                products::<F>(
                    &mut sums[next % 2],
                    &w.quants[next * F::BITS..(next + 1) * F::BITS],
                    bytes,
                    2 * blocks * BLOCK,
                );
            }
        }
        let (weights_scale, Sums([high, low])) = (scale::<F>(w, b, 0), &sums[b % 2]);
        for r in 0..SIDE {
            // SAFETY: as asserted for the first and the last of the rows, which follow each other; 64 bytes that are aligned by their type.
            let (x_scale, x_sums, high, low) = unsafe {
                (
                    _mm512_set1_ps(*x.scales.as_ptr().add(r * blocks + b)),
                    *x.sums.as_ptr().add(r * blocks + b),
                    _mm512_load_si512(high[r].as_ptr().cast()),
                    _mm512_load_si512(low[r].as_ptr().cast()),
                )
            };
            let x_sum = _mm512_set1_epi32(x_sums[0].wrapping_add(x_sums[1]));
            let sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(high), low);
            let sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(x_sum, _mm512_set1_epi32(F::ZERO)));
            totals[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(weights_scale, x_scale), totals[r]);
            if F::OFFSETS {
                let sum = _mm512_mul_ps(x_scale, _mm512_cvtepi32_ps(x_sum));
                totals[r] = _mm512_fmadd_ps(offset::<F>(w, b), sum, totals[r]);
            }
        }
    }
    totals
}

/// Of one block: `sums [high and low, 16 rows, 16 outputs]`.
///
/// # Safety
/// As [`all`]; from `x` on there must be 16 rows, `stride` bytes apart, of 32 high and 32 low bytes.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
unsafe fn products<F: Form>(sums: &mut Sums, quants: &[Line], x: *const i8, stride: usize) {
    let mut unpacked = [Line([0; 64]); LINES];
    let weights = if F::BITS == 4 {
        let low = _mm512_set1_epi8(15);
        for (line, quants) in quants.iter().enumerate() {
            // SAFETY: 64 bytes each that are aligned by their type.
            unsafe {
                let both = _mm512_load_si512(quants.0.as_ptr().cast());
                let to = unpacked.as_mut_ptr().add(line);
                _mm512_store_si512(to.cast(), _mm512_and_si512(both, low));
                let high = _mm512_and_si512(_mm512_srli_epi16::<4>(both), low);
                _mm512_store_si512(to.add(LINES / 2).cast(), high);
            }
        }
        unpacked.as_ptr()
    } else {
        quants.as_ptr()
    };
    let [high, low] = &mut sums.0;
    // SAFETY: the caller's promise; the tiles have the shapes that `piece` gave them.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tileloadd tmm3, [{weights} + {line}*1]",
            "tileloadd tmm2, [{x} + {stride}*1]",
            "tdpbsud tmm0, tmm2, tmm3",
            "tileloadd tmm2, [{x} + {stride}*1 + 32]",
            "tdpbsud tmm1, tmm2, tmm3",
            "tilestored [{high} + {line}*1], tmm0",
            "tilestored [{low} + {line}*1], tmm1",
            weights = in(reg) weights,
            x = in(reg) x,
            stride = in(reg) stride,
            line = in(reg) 64usize,
            high = in(reg) high.as_mut_ptr(),
            low = in(reg) low.as_mut_ptr(),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            options(nostack),
        );
    }
}
