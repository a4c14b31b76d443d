//! The sums of one piece of a product, by the instructions that the CPU has.

// Loops of constant length over the registers of a tile are unrolled as they stand.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use half::bf16;
use liger_tensor::quantize::BLOCK;

use super::form::{Form, Q8_0, by_form};
use super::rounded::Rows;
use super::{Block, Fine, LANES, Line, Quantized, STEP, Sixteen, pack};
use crate::element::Element;
use crate::parallel::Disjoint;
#[cfg(target_arch = "x86_64")]
use crate::{prefetch::prefetch_far, tiles};

/// Outputs `groups` of `rows`.
pub(super) struct Piece<'a> {
    pub(super) c: &'a Outputs<'a>,
    pub(super) x: Rows<'a>,
    pub(super) w: &'a Quantized,
    pub(super) rows: Range<usize>,
    pub(super) groups: Range<usize>,
    pub(super) scale: f32,
    pub(super) accumulate: bool,
}

/// Where sums are stored, `[m, n]`.
pub(crate) enum Outputs<'a> {
    F32(Disjoint<'a>),
    Bf16(Disjoint<'a, bf16>),
}

impl Outputs<'_> {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::F32(c) => c.len(),
            Self::Bf16(c) => c.len(),
        }
    }
}

/// Instructions for sums of products of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kernel {
    /// Matrix units: 16 x 16 x 32 bytes at once.
    #[cfg(target_arch = "x86_64")]
    Amx,
    /// AVX-512 with VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    /// AVX2: products of 16-bit integers.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// ARM's dot products of bytes.
    #[cfg(target_arch = "aarch64")]
    NeonDot,
    /// Plain loops.
    Portable,
}

impl Kernel {
    /// Whether it takes activations as high and low bytes.
    pub(super) fn takes_bytes(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx | Self::Avx512Vnni => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => false,
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot => true,
            Self::Portable => false,
        }
    }
}

/// Those of this architecture.
#[cfg(test)]
pub(super) const ALL: &[Kernel] = &[
    #[cfg(target_arch = "x86_64")]
    Kernel::Amx,
    #[cfg(target_arch = "x86_64")]
    Kernel::Avx512Vnni,
    #[cfg(target_arch = "x86_64")]
    Kernel::Avx2,
    #[cfg(target_arch = "aarch64")]
    Kernel::NeonDot,
    Kernel::Portable,
];

/// Those that this CPU has, best first.
pub(crate) fn available() -> Vec<Kernel> {
    let mut list = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512bw") {
            if tiles::are_there(tiles::Products::Bytes) {
                list.push(Kernel::Amx);
            }
            list.push(Kernel::Avx512Vnni);
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
            list.push(Kernel::Avx2);
        }
    }
    #[cfg(target_arch = "aarch64")]
    if std::arch::is_aarch64_feature_detected!("dotprod") {
        list.push(Kernel::NeonDot);
    }
    list.push(Kernel::Portable);
    list
}

pub(super) fn best() -> Kernel {
    static BEST: std::sync::OnceLock<Kernel> = std::sync::OnceLock::new();
    *BEST.get_or_init(|| available()[0])
}

pub(super) fn piece(kernel: Kernel, p: &Piece<'_>) {
    match kernel {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `available` found the features.
        Kernel::Amx => unsafe { amx::piece(p) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Kernel::Avx512Vnni => unsafe { avx512::piece(p) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Kernel::Avx2 => unsafe { avx2::piece(p) },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: as above.
        Kernel::NeonDot => unsafe { neon::piece(p) },
        Kernel::Portable => portable(p),
    }
}

/// What a tile reads of one group of outputs.
#[derive(Clone, Copy)]
pub(super) struct Group<'a> {
    quants: &'a [Line],
    pub(super) scales: &'a [Sixteen],
    pub(super) offsets: &'a [Sixteen],
    pub(super) fine: &'a [Fine],
}

impl Group<'_> {
    /// Panics unless it has so many blocks.
    #[inline(always)]
    fn check<F: Form>(&self, blocks: usize) {
        let numbers = F::number(blocks);
        assert!(self.quants.len() == blocks * F::BITS && self.scales.len() == numbers);
        assert!(self.offsets.len() == if F::OFFSETS { numbers } else { 0 });
        assert!(self.fine.len() == if F::FINE { blocks } else { 0 });
    }

    /// Asks for the block that comes some blocks later, in this group or the next one: of few bits, more is computed for each line than the
    /// CPU looks ahead over.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn ask_ahead<F: Form>(&self, block: usize) {
        const AHEAD: usize = 24;
        prefetch_far(self.quants.as_ptr().wrapping_add((block + AHEAD) * F::BITS), F::BITS);
        if F::FINE {
            prefetch_far(self.fine.as_ptr().wrapping_add(block + AHEAD), 1);
        }
    }
}

impl Piece<'_> {
    fn blocks(&self) -> usize {
        self.w.columns / BLOCK
    }

    fn group(&self, group: usize) -> Group<'_> {
        // Where a matrix has none of something, so has its group.
        fn of<T>(all: &[T], group: usize, width: usize) -> &[T] {
            if all.is_empty() { all } else { &all[group * width..(group + 1) * width] }
        }
        let (w, blocks) = (self.w, self.blocks());
        let numbers = w.columns / w.dtype.block();
        Group {
            quants: of(&w.quants, group, blocks * pack::lines(w.dtype)),
            scales: of(&w.scales, group, numbers),
            offsets: of(&w.offsets, group, numbers),
            fine: of(&w.fine, group, blocks),
        }
    }

    fn row(&self, row: usize) -> Rows<'_> {
        self.x.blocks(row * self.blocks()..(row + 1) * self.blocks())
    }

    fn store(&self, row: usize, group: usize, sums: &[f32; LANES]) {
        let n = self.w.rows;
        let (first, sums) = (row * n + group * LANES, &sums[..LANES.min(n - group * LANES)]);
        match self.c {
            Outputs::F32(c) => self.put(c, first, sums),
            Outputs::Bf16(c) => self.put(c, first, sums),
        }
    }

    fn put<C: Element>(&self, c: &Disjoint<'_, C>, first: usize, sums: &[f32]) {
        // SAFETY: pieces have distinct rows and groups, and this is the only slice of them alive.
        let out = unsafe { c.slice(first, sums.len()) };
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = C::narrow(self.scale * sum + if self.accumulate { out.widen() } else { 0.0 });
        }
    }
}

fn portable(p: &Piece<'_>) {
    by_form!(p.w, F => portable_of::<F>(p));
}

fn portable_of<F: Form>(p: &Piece<'_>) {
    let blocks = p.blocks();
    for group in p.groups.clone() {
        for row in p.rows.clone() {
            let x = p.row(row);
            let mut total = [0.0f32; LANES];
            for b in 0..blocks {
                let w = Block::<F>::at(p.w, group * blocks + b);
                for part in 0..F::PARTS {
                    let mut sum = [(-F::ZERO).wrapping_mul(x.sum::<F>(b, part)); LANES];
                    for i in 0..F::STEPS {
                        let step = F::step(part, i);
                        let terms = &x.words[b * BLOCK + step * STEP..b * BLOCK + (step + 1) * STEP];
                        for (lane, sum) in sum.iter_mut().enumerate() {
                            for (i, x) in terms.iter().enumerate() {
                                *sum = sum.wrapping_add(w.quant(step, lane * STEP + i) * i32::from(*x));
                            }
                        }
                    }
                    for (lane, (total, sum)) in total.iter_mut().zip(sum).enumerate() {
                        *total += w.scale(part, lane) * x.scales[b] * sum as f32;
                    }
                }
                if F::OFFSETS {
                    let sum = x.scales[b] * x.sum::<Q8_0>(b, 0) as f32;
                    total.iter_mut().enumerate().for_each(|(lane, total)| *total += w.offset(lane) * sum);
                }
            }
            p.store(row, group, &total);
        }
    }
}

/// Walks through a piece in tiles of one group times some rows: weights are read one after another, as fast as memory gives them (two and
/// four groups side by side are slower there). After `$features` come the numbers of rows that a tile may have, from 1.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! tiles {
    ($p:expr, $tile:ident, $features:literal, $($rows:literal)*) => {{
        #[target_feature(enable = $features)]
        fn all<F: Form>(p: &Piece<'_>) {
            let most = [$($rows),*].len();
            for group in p.groups.clone() {
                let mut row = p.rows.start;
                while row < p.rows.end {
                    // What is left is cut evenly: 13 rows are tiles of 7 and 6, not of 12 and 1.
                    let left = p.rows.end - row;
                    let count = left.div_ceil(left.div_ceil(most));
                    match count {
                        $($rows => $tile::<$rows, F>(p, row, group),)*
                        _ => unreachable!("rows of a tile"),
                    }
                    row += count;
                }
            }
        }
        by_form!($p.w, F => all::<F>($p))
    }};
}

#[cfg(target_arch = "x86_64")]
mod amx;

#[cfg(target_arch = "aarch64")]
mod neon;

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        _mm512_add_epi32, _mm512_cvtepi32_ps, _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_mul_ps, _mm512_set1_epi32,
        _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512, _mm512_slli_epi32, _mm512_storeu_ps,
    };

    use super::super::unpack::{offset, quants, scale};
    use super::{BLOCK, Form, LANES, Piece, Q8_0, STEP, by_form};

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) fn piece(p: &Piece<'_>) {
        tiles!(p, tile, "avx512f,avx512bw,avx512vnni", 1 2 3 4 5 6 7 8);
    }

    // No closures here: what the standard library calls with them is compiled without these instructions.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    #[inline]
    fn tile<const R: usize, F: Form>(p: &Piece<'_>, row: usize, group: usize) {
        let (w, mut x) = (p.group(group), [p.row(row); R]);
        for r in 1..R {
            x[r] = p.row(row + r);
        }
        let blocks = p.blocks();
        w.check::<F>(blocks);
        assert!(x.iter().all(|x| x.bytes.len() == 2 * blocks * BLOCK));
        let mut totals = [_mm512_setzero_ps(); R];
        for b in 0..blocks {
            if row == p.rows.start {
                w.ask_ahead::<F>(b);
            }
            let lines = &w.quants[b * F::BITS..(b + 1) * F::BITS];
            for part in 0..F::PARTS {
                // Sums of the high bytes and of the low ones.
                let mut sums = [[_mm512_setzero_si512(); R]; 2];
                for r in 0..R {
                    sums[1][r] = _mm512_set1_epi32((-F::ZERO).wrapping_mul(x[r].sum::<F>(b, part)));
                }
                for i in 0..F::STEPS {
                    let step = F::step(part, i);
                    let weights = quants::<F>(lines, step);
                    for byte in 0..2 {
                        for r in 0..R {
                            let at = (2 * b + byte) * BLOCK + step * STEP;
                            // SAFETY: four bytes, no alignment needed; as many as asserted.
                            let terms = unsafe { x[r].bytes.as_ptr().add(at).cast::<i32>().read_unaligned() };
                            sums[byte][r] = _mm512_dpbusd_epi32(sums[byte][r], weights, _mm512_set1_epi32(terms));
                        }
                    }
                }
                let scale = scale::<F>(&w, b, part);
                for r in 0..R {
                    let scale = _mm512_mul_ps(scale, _mm512_set1_ps(x[r].scales[b]));
                    let sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(sums[0][r]), sums[1][r]);
                    totals[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, totals[r]);
                }
            }
            if F::OFFSETS {
                let offset = offset::<F>(&w, b);
                for r in 0..R {
                    let sum = _mm512_set1_ps(x[r].scales[b] * x[r].sum::<Q8_0>(b, 0) as f32);
                    totals[r] = _mm512_fmadd_ps(offset, sum, totals[r]);
                }
            }
        }
        for r in 0..R {
            let mut sums = [0.0f32; LANES];
            // SAFETY: 16 floats, no alignment needed.
            unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), totals[r]) };
            p.store(row + r, group, &sums);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        __m128i, __m256, _mm_and_si128, _mm_load_si128, _mm_loadl_epi64, _mm_or_si128, _mm_set1_epi8, _mm_slli_epi16,
        _mm_srli_epi16, _mm256_add_epi32, _mm256_cvtepi8_epi32, _mm256_cvtepi32_ps, _mm256_cvtepu8_epi16,
        _mm256_cvtepu8_epi32, _mm256_cvtph_ps, _mm256_fmadd_ps, _mm256_hadd_epi32, _mm256_madd_epi16, _mm256_mul_ps,
        _mm256_permute4x64_epi64, _mm256_set1_epi32, _mm256_set1_epi64x, _mm256_set1_ps, _mm256_setzero_ps,
        _mm256_setzero_si256, _mm256_storeu_ps,
    };

    use super::{BLOCK, Fine, Form, LANES, Line, Piece, Q8_0, STEP, by_form};

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn piece(p: &Piece<'_>) {
        tiles!(p, tile, "avx2,fma,f16c", 1 2 3);
    }

    /// Eight outputs' float16 numbers.
    #[target_feature(enable = "avx,f16c")]
    fn numbers(n: &[u16; LANES], half: usize) -> __m256 {
        // SAFETY: 16 bytes from 0 or 16 on of 32, aligned by their type.
        unsafe { _mm256_cvtph_ps(_mm_load_si128(n.as_ptr().add(8 * half).cast())) }
    }

    /// Eight outputs' bytes from place `first` on, in float32.
    #[target_feature(enable = "avx2")]
    fn bytes(fine: &Fine, first: usize, are_signed: bool) -> __m256 {
        // SAFETY: 8 bytes from at most 24 on of 32.
        let bytes = unsafe { _mm_loadl_epi64(fine.0.as_ptr().add(first).cast()) };
        _mm256_cvtepi32_ps(if are_signed { _mm256_cvtepi8_epi32(bytes) } else { _mm256_cvtepu8_epi32(bytes) })
    }

    /// Quants of four outputs of a step.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn quants<F: Form>(lines: &[Line], step: usize, quarter: usize) -> __m128i {
        let line = |line: usize| -> __m128i {
            // SAFETY: 16 bytes of 64 that are aligned by their type.
            unsafe { _mm_load_si128(lines[line].0.as_ptr().add(16 * quarter).cast()) }
        };
        if F::BITS == 8 {
            return line(step);
        }
        let both = line(step % 4);
        let low = _mm_and_si128(if step < 4 { both } else { _mm_srli_epi16::<4>(both) }, _mm_set1_epi8(15));
        if F::BITS == 4 {
            return low;
        }
        let top = line(4 + step / 4);
        let top = match step % 4 {
            0 => _mm_slli_epi16::<4>(top),
            1 => _mm_slli_epi16::<2>(top),
            2 => top,
            _ => _mm_srli_epi16::<2>(top),
        };
        _mm_or_si128(low, _mm_and_si128(top, _mm_set1_epi8(0x30)))
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn tile<const R: usize, F: Form>(p: &Piece<'_>, row: usize, group: usize) {
        let mut x = [p.row(row); R];
        for r in 1..R {
            x[r] = p.row(row + r);
        }
        let w = p.group(group);
        w.check::<F>(p.blocks());
        let mut totals = [[_mm256_setzero_ps(); 2]; R];
        for b in 0..p.blocks() {
            for part in 0..F::PARTS {
                // Of four outputs each, two sums of even and odd pairs of terms.
                let mut sums = [[_mm256_setzero_si256(); 4]; R];
                for i in 0..F::STEPS {
                    let step = F::step(part, i);
                    let mut words = [_mm256_setzero_si256(); 4];
                    for quarter in 0..4 {
                        let quants = quants::<F>(&w.quants[b * F::BITS..(b + 1) * F::BITS], step, quarter);
                        words[quarter] = _mm256_cvtepu8_epi16(quants);
                    }
                    for r in 0..R {
                        let terms = &x[r].words[b * BLOCK + step * STEP..b * BLOCK + (step + 1) * STEP];
                        // SAFETY: eight bytes, no alignment needed.
                        let terms = unsafe { terms.as_ptr().cast::<i64>().read_unaligned() };
                        let terms = _mm256_set1_epi64x(terms);
                        for quarter in 0..4 {
                            let products = _mm256_madd_epi16(words[quarter], terms);
                            sums[r][quarter] = _mm256_add_epi32(sums[r][quarter], products);
                        }
                    }
                }
                for half in 0..2 {
                    let mut scale = numbers(&w.scales[F::number(b)].0, half);
                    if F::FINE {
                        let fine = bytes(&w.fine[b], part * LANES + 8 * half, F::PARTS == 2);
                        scale = _mm256_mul_ps(scale, fine);
                    }
                    for r in 0..R {
                        // Neighbours are added; then the outputs are 0 1 4 5 2 3 6 7.
                        let pairs = _mm256_hadd_epi32(sums[r][2 * half], sums[r][2 * half + 1]);
                        let sum = _mm256_permute4x64_epi64::<0b11_01_10_00>(pairs);
                        let zeros = (-F::ZERO).wrapping_mul(x[r].sum::<F>(b, part));
                        let sum = _mm256_add_epi32(sum, _mm256_set1_epi32(zeros));
                        let scale = _mm256_mul_ps(scale, _mm256_set1_ps(x[r].scales[b]));
                        totals[r][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, totals[r][half]);
                    }
                }
            }
            if F::OFFSETS {
                for half in 0..2 {
                    let mut offset = numbers(&w.offsets[F::number(b)].0, half);
                    if F::FINE {
                        offset = _mm256_mul_ps(offset, bytes(&w.fine[b], LANES + 8 * half, false));
                    }
                    for r in 0..R {
                        let sum = _mm256_set1_ps(x[r].scales[b] * x[r].sum::<Q8_0>(b, 0) as f32);
                        totals[r][half] = _mm256_fmadd_ps(offset, sum, totals[r][half]);
                    }
                }
            }
        }
        for r in 0..R {
            let mut sums = [0.0f32; LANES];
            for half in 0..2 {
                // SAFETY: eight floats of 16, no alignment needed.
                unsafe { _mm256_storeu_ps(sums.as_mut_ptr().add(8 * half), totals[r][half]) };
            }
            p.store(row + r, group, &sums);
        }
    }
}
