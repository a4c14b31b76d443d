//! Activations as the kernels take them: rounded to 16 bits, in blocks as the weights are.

use std::ops::Range;

use liger_tensor::Lines;
use liger_tensor::quantize::BLOCK;

use super::LANES;
use super::form::Form;
use crate::element::Element;
use crate::parallel::{Disjoint, for_tasks, vectorized};

/// 127 times 256, so that both bytes of a quant are signed ones.
const LARGEST: f32 = 32_512.0;

/// Memory for activations `[m, k]`, kept from call to call.
#[derive(Default)]
pub(super) struct Rounded {
    /// Words; or of each block, in a line, the 32 high bytes and then the 32 low ones: tiles take six times as long to load rows that
    /// cross lines.
    quants: Lines,
    /// float32, `[m, k / 32]`.
    scales: Lines,
    /// Of the quants: 32-bit integers, `[m, k / 16]`.
    sums: Lines,
}

/// Some blocks of activations.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    /// Whole quants, or none.
    pub(super) words: &'a [i16],
    /// Of each block the high bytes, then the low ones, or none. A quant is 256 times the high byte and the low one, both signed.
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), expect(dead_code, reason = "for VNNI"))]
    pub(super) bytes: &'a [i8],
    /// By block.
    pub(super) scales: &'a [f32],
    /// By half a block, those of its quants.
    pub(super) sums: &'a [[i32; 2]],
}

impl Rows<'_> {
    /// Sum of the quants of a part of a block.
    #[inline(always)]
    pub(super) fn sum<F: Form>(&self, block: usize, part: usize) -> i32 {
        let [first, last] = self.sums[block];
        match F::PARTS {
            1 => first.wrapping_add(last),
            _ if part == 0 => first,
            _ => last,
        }
    }

    #[inline]
    pub(super) fn blocks(&self, blocks: Range<usize>) -> Self {
        let of = |size: usize, len: usize| if len == 0 { 0..0 } else { blocks.start * size..blocks.end * size };
        Self {
            words: &self.words[of(BLOCK, self.words.len())],
            bytes: &self.bytes[of(2 * BLOCK, self.bytes.len())],
            scales: &self.scales[blocks.clone()],
            sums: &self.sums[blocks.clone()],
        }
    }
}

impl Rounded {
    /// Rounds `x [m, k]`, to bytes or to words; what was there before is lost.
    pub(super) fn fill<A: Element>(&mut self, x: &[A], in_bytes: bool) -> Rows<'_> {
        let blocks = x.len() / BLOCK;
        self.quants.reserve::<i16>(x.len());
        self.scales.reserve::<f32>(blocks);
        self.sums.reserve::<[i32; 2]>(blocks);
        let (quants, scales, sums) = (
            self.quants.as_mut_slice::<i16>(),
            self.scales.as_mut_slice::<f32>(),
            self.sums.as_mut_slice::<[i32; 2]>(),
        );
        let all = (Disjoint::new(quants), Disjoint::new(scales), Disjoint::new(sums));
        const TOGETHER: usize = 64;
        for_tasks(blocks.div_ceil(TOGETHER), |i| {
            let (first, count) = (i * TOGETHER, TOGETHER.min(blocks - i * TOGETHER));
            let mut wide = Vec::new();
            let x = A::widened(&x[first * BLOCK..(first + count) * BLOCK], &mut wide);
            // SAFETY: tasks have distinct blocks.
            let (quants, scales, sums) = unsafe {
                (all.0.slice(first * BLOCK, count * BLOCK), all.1.slice(first, count), all.2.slice(first, count))
            };
            if in_bytes {
                let bytes = bytemuck::cast_slice_mut::<i16, i8>(quants).as_chunks_mut::<{ 2 * BLOCK }>().0;
                round(x, scales, sums, bytes, |bytes, quants| {
                    let (high, low) = bytes.split_at_mut(BLOCK);
                    for ((high, low), quant) in high.iter_mut().zip(low).zip(quants) {
                        *low = *quant as i8;
                        *high = (quant.wrapping_sub(i32::from(*low)) >> 8) as i8;
                    }
                });
            } else {
                round(x, scales, sums, quants.as_chunks_mut::<BLOCK>().0, |words, quants| {
                    words.iter_mut().zip(quants).for_each(|(word, quant)| *word = *quant as i16);
                });
            }
        });
        let (words, bytes) = if in_bytes { (0, 2 * x.len()) } else { (x.len(), 0) };
        Rows {
            words: &self.quants.as_slice()[..words],
            bytes: &self.quants.as_slice()[..bytes],
            scales: &self.scales.as_slice()[..blocks],
            sums: &self.sums.as_slice()[..blocks],
        }
    }
}

/// Scale, sum and quants of every block; `put` writes the latter.
fn round<const N: usize, T>(
    x: &[f32],
    scales: &mut [f32],
    sums: &mut [[i32; 2]],
    out: &mut [[T; N]],
    put: impl Fn(&mut [T; N], &[i32; BLOCK]),
) {
    vectorized!(|| {
        let blocks = x.as_chunks::<BLOCK>().0.iter().zip(out.iter_mut());
        for (((x, out), scale), sum) in blocks.zip(scales.iter_mut()).zip(sums.iter_mut()) {
            let mut largest = [0.0f32; LANES];
            for half in x.chunks_exact(LANES) {
                for (largest, x) in largest.iter_mut().zip(half) {
                    let x = x.abs();
                    *largest = if x > *largest { x } else { *largest };
                }
            }
            let largest = largest.iter().fold(0.0f32, |a, b| if *b > a { *b } else { a });
            let inverse = if largest > 0.0 { LARGEST / largest } else { 0.0 };
            *scale = largest / LARGEST;
            // Adding it leaves the nearest integer in the low bits.
            const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23
            let mut quants = [0; BLOCK];
            for (quant, x) in quants.iter_mut().zip(x) {
                *quant = (x * inverse + ROUND).to_bits().wrapping_sub(ROUND.to_bits()) as i32;
            }
            // Of what is no number there is no sum; it must not stop the program either.
            *sum = quants.as_chunks::<{ BLOCK / 2 }>().0.first_chunk().map_or([0; 2], |halves: &[_; 2]| {
                halves.map(|half| half.iter().fold(0, |sum: i32, quant| sum.wrapping_add(*quant)))
            });
            put(out, &quants);
        }
    },);
}
