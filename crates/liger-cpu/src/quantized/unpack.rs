//! Quants and scales of quantised weights by AVX-512, for all its products with them; and blocks of them in bfloat16, for products of many
//! rows: unpacked a few panels at a time into a core's cache.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm_load_si128, _mm256_load_si256, _mm512_and_si512, _mm512_cvtepi8_epi32,
    _mm512_cvtepi32_ps, _mm512_cvtepu8_epi32, _mm512_cvtne2ps_pbh, _mm512_cvtph_ps, _mm512_fmadd_ps, _mm512_load_si512,
    _mm512_loadu_si512, _mm512_mul_ps, _mm512_or_si512, _mm512_permutexvar_epi16, _mm512_set1_epi8, _mm512_set1_epi32,
    _mm512_set1_ps, _mm512_setzero_si512, _mm512_slli_epi16, _mm512_srli_epi16, _mm512_srli_epi32,
};
use std::ops::Range;

use liger_tensor::quantize::BLOCK;

use super::form::by_form;
use super::kernels::Group;
use super::{Fine, LANES, Line, Quantized, Sixteen};
use crate::bfloat::pack::{Blocks, Form, ROWS};

impl Blocks for &Quantized {
    fn covers(self, rows: usize, terms: usize) -> bool {
        rows <= self.rows && terms <= self.columns
    }

    fn lies_by_rows(self) -> bool {
        true
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    #[inline]
    unsafe fn block(self, rows: Range<usize>, terms: Range<usize>) -> ([__m512i; ROWS], Form) {
        by_form!(self, F => (weights::<F>(self, rows.start / LANES, terms.start / BLOCK), Form::Pairs))
    }
}

/// A block of a group of outputs: `scale (quant - zero) + offset`, rounded once; rows that fill the last group up are zeros and stay so.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
fn weights<F: super::Form>(w: &Quantized, group: usize, block: usize) -> [__m512i; ROWS] {
    let of_row = w.columns / BLOCK;
    let at = group * of_row + block;
    let fine = w.fine.get(at);
    let lines = &w.quants[at * F::BITS..(at + 1) * F::BITS];
    let mut out = [_mm512_setzero_si512(); ROWS];
    for part in 0..F::PARTS {
        let scale = with_fine::<F>(&w.scales[F::number(at)], fine, part);
        let offset = match F::OFFSETS {
            true => with_fine::<F>(&w.offsets[F::number(at)], fine, 1),
            false => _mm512_mul_ps(scale, _mm512_set1_ps(-(F::ZERO as f32))),
        };
        for i in 0..F::STEPS {
            let step = F::step(part, i);
            [out[2 * step], out[2 * step + 1]] = pairs(quants::<F>(lines, step), scale, offset);
        }
    }
    out
}

/// Quants of a step, `[16 outputs, 4 terms]`.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
pub(super) fn quants<F: super::Form>(lines: &[Line], step: usize) -> __m512i {
    let load = |line: usize| -> __m512i {
        // SAFETY: 64 bytes that are aligned by their type.
        unsafe { _mm512_load_si512(lines[line].0.as_ptr().cast()) }
    };
    if F::BITS == 8 {
        return load(step);
    }
    let both = load(step % 4);
    let low = _mm512_and_si512(if step < 4 { both } else { _mm512_srli_epi16::<4>(both) }, _mm512_set1_epi8(15));
    if F::BITS == 4 {
        return low;
    }
    let top = load(4 + step / 4);
    let top = match step % 4 {
        0 => _mm512_slli_epi16::<4>(top),
        1 => _mm512_slli_epi16::<2>(top),
        2 => top,
        _ => _mm512_srli_epi16::<2>(top),
    };
    _mm512_or_si512(low, _mm512_and_si512(top, _mm512_set1_epi8(0x30)))
}

/// Scales of a part of block `b`.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
pub(super) fn scale<F: super::Form>(w: &Group<'_>, b: usize, part: usize) -> __m512 {
    with_fine::<F>(&w.scales[F::number(b)], w.fine.get(b), part)
}

/// Offsets of block `b`, where there are such.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
pub(super) fn offset<F: super::Form>(w: &Group<'_>, b: usize) -> __m512 {
    with_fine::<F>(&w.offsets[F::number(b)], w.fine.get(b), 1)
}

/// Float16 numbers, where scales are fine times the first or the last bytes of a block. Where a block has two scales these are signed.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn with_fine<F: super::Form>(numbers: &Sixteen, fine: Option<&Fine>, part: usize) -> __m512 {
    // SAFETY: 32 bytes that are aligned by their type.
    let numbers = unsafe { _mm512_cvtph_ps(_mm256_load_si256(numbers.0.as_ptr().cast())) };
    let (true, Some(fine)) = (F::FINE, fine) else { return numbers };
    // SAFETY: 16 bytes from 0 or 16 on of 32 that are aligned by their type.
    let bytes = unsafe { _mm_load_si128(fine.0.as_ptr().add(part * LANES).cast()) };
    let bytes = if F::PARTS == 2 { _mm512_cvtepi8_epi32(bytes) } else { _mm512_cvtepu8_epi32(bytes) };
    _mm512_mul_ps(numbers, _mm512_cvtepi32_ps(bytes))
}

/// Of `[16 outputs, 4 terms]` the first two terms of every output, and the last two.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
fn pairs(quants: __m512i, scale: __m512, offset: __m512) -> [__m512i; 2] {
    let byte = _mm512_set1_epi32(0xff);
    let weights = |quants| _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_and_si512(quants, byte)), scale, offset);
    let low = [weights(quants), weights(_mm512_srli_epi32::<16>(quants))];
    let high = [weights(_mm512_srli_epi32::<8>(quants)), weights(_mm512_srli_epi32::<24>(quants))];
    [side_by_side(low[0], high[0]), side_by_side(low[1], high[1])]
}

/// Both rounded, number by number beside each other.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
fn side_by_side(low: __m512, high: __m512) -> __m512i {
    // SAFETY: both types are any 64 bytes.
    let one_after_the_other = unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) };
    _mm512_permutexvar_epi16(order(), one_after_the_other)
}

/// 0, 16, 1, 17 and so on.
#[target_feature(enable = "avx512f")]
#[inline]
fn order() -> __m512i {
    const ORDER: [u16; 2 * LANES] = {
        let mut order = [0; 2 * LANES];
        let mut i = 0;
        while i < LANES {
            order[2 * i] = i as u16;
            order[2 * i + 1] = (LANES + i) as u16;
            i += 1;
        }
        order
    };
    // SAFETY: 64 bytes, no alignment needed.
    unsafe { _mm512_loadu_si512(ORDER.as_ptr().cast()) }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use liger_tensor::quantize::SUPER_BLOCK;

    use super::super::tests::{blocks, numbers, packed};
    use crate::bfloat;

    #[test]
    fn products_are_those_of_the_rounded_weights() {
        for (m, n, k) in [(1, 1, 32usize), (5, 33, 96), (33, 70, 160), (40, 100, 2080)] {
            for form in 0..5 {
                let k = if form < 3 { k } else { k.next_multiple_of(SUPER_BLOCK) };
                let (dtype, blocks) = blocks(form, n * k, 2);
                let (x, weights) = (numbers(m * k, 1), packed(&blocks, (n, k), dtype));
                let mut rows = vec![0.0f32; n * k];
                rows.chunks_exact_mut(k).enumerate().for_each(|(i, row)| weights.row(i, row));
                let round = |x: f32| f64::from(bf16::from_f32(x).to_f32());
                for kernel in bfloat::available() {
                    let mut c = vec![1.0; m * n];
                    bfloat::product(kernel, &mut c, &x, bfloat::Weights::AsTheyLie(&weights), (m, n, k), 0.5, true);
                    for (at, c) in c.iter().enumerate() {
                        let terms = x[at / n * k..][..k].iter().zip(&rows[at % n * k..][..k]);
                        let expected = 1.0 + 0.5 * terms.map(|(x, w)| round(*x) * round(*w)).sum::<f64>();
                        let off = (f64::from(*c) - expected).abs();
                        assert!(
                            off < 2e-5 * (k as f64).sqrt(),
                            "{kernel:?}, {m} {n} {k}, form {form}, at {at}: {c}, not {expected}"
                        );
                    }
                }
            }
        }
    }
}
