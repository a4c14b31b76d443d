//! Blocks of quantised weights in bfloat16, for products of many rows: unpacked a few panels at a time into a core's cache.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm256_load_si256, _mm512_and_si512, _mm512_cvtepi32_ps, _mm512_cvtne2ps_pbh,
    _mm512_cvtph_ps, _mm512_fmadd_ps, _mm512_load_si512, _mm512_loadu_si512, _mm512_mul_ps, _mm512_permutexvar_epi16,
    _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_si512, _mm512_srli_epi16, _mm512_srli_epi32,
};
use std::ops::Range;

use liger_tensor::DType;
use liger_tensor::quantize::BLOCK;

use super::{LANES, Quantized, Sixteen};
use crate::bfloat::pack::{Blocks, Form, ROWS};

impl Blocks for &Quantized {
    fn covers(self, rows: usize, terms: usize) -> bool {
        rows <= self.rows && terms <= self.columns
    }

    fn lies_by_rows(self) -> bool {
        true
    }

    /// `scale (quant - zero) + offset`, rounded once; rows that fill the last group up are zeros and stay so.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    #[inline]
    unsafe fn block(self, rows: Range<usize>, terms: Range<usize>) -> ([__m512i; ROWS], Form) {
        let at = rows.start / LANES * (self.columns / BLOCK) + terms.start / BLOCK;
        let lines = &self.quants[at * self.lines()..][..self.lines()];
        let scale = numbers(&self.scales[at]);
        let offset = match self.offsets.get(at) {
            Some(offset) => numbers(offset),
            None => _mm512_mul_ps(scale, _mm512_set1_ps(-(self.zero() as f32))),
        };
        let mut x = [_mm512_setzero_si512(); ROWS];
        for (i, x) in x.as_chunks_mut().0.iter_mut().enumerate() {
            // SAFETY: 64 bytes that are aligned by their type.
            let line = unsafe { _mm512_load_si512(lines[i % lines.len()].0.as_ptr().cast()) };
            let low = _mm512_set1_epi8(15);
            let quants = match (self.dtype, i < lines.len()) {
                (DType::Q8_0, _) => line,
                (_, true) => _mm512_and_si512(line, low),
                (_, false) => _mm512_and_si512(_mm512_srli_epi16::<4>(line), low),
            };
            *x = pairs(quants, scale, offset);
        }
        (x, Form::Pairs)
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn numbers(n: &Sixteen) -> __m512 {
    // SAFETY: 32 bytes that are aligned by their type.
    unsafe { _mm512_cvtph_ps(_mm256_load_si256(n.0.as_ptr().cast())) }
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
    use liger_tensor::quantize::quantize;

    use super::super::tests::{numbers, symmetric};
    use super::*;
    use crate::bfloat;

    #[test]
    fn products_are_those_of_the_rounded_weights() {
        for (m, n, k) in [(1, 1, 32), (5, 33, 96), (33, 70, 160), (40, 100, 2080)] {
            for form in 0..3 {
                let dtype = if form == 0 { DType::Q8_0 } else { DType::Q4_1 };
                let (x, mut blocks) = (numbers(m * k, 1), quantize(&numbers(n * k, 2), dtype));
                if form == 2 {
                    symmetric(&mut blocks);
                }
                let weights = Quantized::pack(&blocks, (n, k), dtype);
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
