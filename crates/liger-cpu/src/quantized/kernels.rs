//! The sums of one piece of a product, by the instructions that the CPU has.

// Loops of constant length over the registers of a tile are unrolled as they stand.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use half::bf16;
use liger_tensor::DType;
use liger_tensor::quantize::BLOCK;

use super::rounded::Rows;
use super::{LANES, Line, Quantized, STEP, Sixteen};
use crate::element::Element;
use crate::parallel::Disjoint;
#[cfg(target_arch = "x86_64")]
use crate::{prefetch::prefetch, tiles};

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
struct Group<'a> {
    quants: &'a [Line],
    scales: &'a [Sixteen],
    offsets: &'a [Sixteen],
}

#[cfg(target_arch = "x86_64")]
impl Group<'_> {
    /// Asks for a block of weights that lies so many blocks behind the group's first: of a group that this thread most likely comes to.
    #[inline(always)]
    fn ask_ahead(&self, block: usize, lines: usize, has_offsets: bool) {
        prefetch(self.quants.as_ptr().wrapping_add(block * lines), lines);
        prefetch(self.scales.as_ptr().wrapping_add(block), 1);
        if has_offsets {
            prefetch(self.offsets.as_ptr().wrapping_add(block), 1);
        }
    }
}

impl Piece<'_> {
    fn blocks(&self) -> usize {
        self.w.columns / BLOCK
    }

    fn group(&self, group: usize) -> Group<'_> {
        let (blocks, lines) = (self.blocks(), self.w.lines());
        let of = |all: &'_ [Sixteen]| group * blocks..((group + 1) * blocks).min(all.len());
        let quants = &self.w.quants[group * blocks * lines..(group + 1) * blocks * lines];
        let offsets = if self.w.offsets.is_empty() { &[][..] } else { &self.w.offsets[of(&self.w.offsets)] };
        Group { quants, scales: &self.w.scales[of(&self.w.scales)], offsets }
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
    let (lines, zero) = (p.w.lines(), p.w.zero());
    for group in p.groups.clone() {
        let w = p.group(group);
        for row in p.rows.clone() {
            let Rows { words, scales, sums, .. } = p.row(row);
            let mut total = [0.0f32; LANES];
            for (b, x) in words.chunks_exact(BLOCK).enumerate() {
                let mut sum = [(-zero).wrapping_mul(sums[b]); LANES];
                for (step, x) in x.chunks_exact(STEP).enumerate() {
                    let line = &w.quants[b * lines + step % lines].0;
                    for (sum, w) in sum.iter_mut().zip(line.chunks_exact(STEP)) {
                        for (w, x) in w.iter().zip(x) {
                            let w = match p.w.dtype {
                                DType::Q8_0 => *w,
                                _ if step < lines => w & 15,
                                _ => w >> 4,
                            };
                            *sum = sum.wrapping_add(i32::from(w) * i32::from(*x));
                        }
                    }
                }
                let number = |n: u16| half::f16::from_bits(n).to_f32();
                for (lane, (total, sum)) in total.iter_mut().zip(sum).enumerate() {
                    *total += number(w.scales[b].0[lane]) * scales[b] * sum as f32;
                    if let Some(offsets) = w.offsets.get(b) {
                        *total += number(offsets.0[lane]) * (scales[b] * sums[b] as f32);
                    }
                }
            }
            p.store(row, group, &total);
        }
    }
}

/// Walks through a piece in tiles of some groups times some rows: few rows want many groups, so that enough sums are under
/// way at once. After `$features` come numbers of groups, most first, each with the numbers of rows that go with it, from 1.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! tiles {
    ($p:expr, $tile:ident, $features:literal, $([$groups:literal: $($rows:literal)*])*) => {{
        #[target_feature(enable = $features)]
        fn all<const FOUR: bool, const OFFSETS: bool>(p: &Piece<'_>) {
            let mut group = p.groups.start;
            'next: while group < p.groups.end {
                $(
                    let most = [$($rows),*].len();
                    if p.groups.end - group >= $groups && (p.rows.len() <= most || $groups == 1) {
                        let mut row = p.rows.start;
                        while row < p.rows.end {
                            // What is left is cut evenly: 13 rows are tiles of 7 and 6, not of 12 and 1.
                            let left = p.rows.end - row;
                            let count = left.div_ceil(left.div_ceil(most));
                            match count {
                                $($rows => $tile::<$rows, $groups, FOUR, OFFSETS>(p, row, group),)*
                                _ => unreachable!("rows of a tile"),
                            }
                            row += count;
                        }
                        group += $groups;
                        continue 'next;
                    }
                )*
            }
        }
        match ($p.w.dtype == DType::Q8_0, $p.w.offsets.is_empty()) {
            (true, _) => all::<false, false>($p),
            (false, true) => all::<true, false>($p),
            (false, false) => all::<true, true>($p),
        }
    }};
}

#[cfg(target_arch = "x86_64")]
mod amx;

#[cfg(target_arch = "aarch64")]
mod neon;

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        _mm512_add_epi32, _mm512_and_si512, _mm512_cvtepi32_ps, _mm512_dpbusd_epi32, _mm512_fmadd_ps,
        _mm512_load_si512, _mm512_mul_ps, _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps,
        _mm512_setzero_si512, _mm512_slli_epi32, _mm512_srli_epi16, _mm512_storeu_ps,
    };

    use super::super::unpack::numbers;
    use super::{BLOCK, DType, LANES, Piece, STEP};

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) fn piece(p: &Piece<'_>) {
        tiles!(p, tile, "avx512f,avx512bw,avx512vnni", [4: 1 2] [2: 1 2 3 4] [1: 1 2 3 4 5 6 7 8]);
    }

    // No closures here: what the standard library calls with them is compiled without these instructions.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    #[inline]
    fn tile<const R: usize, const G: usize, const FOUR: bool, const OFFSETS: bool>(
        p: &Piece<'_>,
        row: usize,
        group: usize,
    ) {
        let (mut w, mut x) = ([p.group(group); G], [p.row(row); R]);
        for g in 1..G {
            w[g] = p.group(group + g);
        }
        for r in 1..R {
            x[r] = p.row(row + r);
        }
        let (blocks, zero) = (p.blocks(), p.w.zero());
        let lines = if FOUR { BLOCK / STEP / 2 } else { BLOCK / STEP };
        assert!(w.iter().all(|w| w.quants.len() == blocks * lines && w.scales.len() == blocks));
        assert!(x.iter().all(|x| x.bytes.len() == 2 * blocks * BLOCK));
        let low = _mm512_set1_epi8(15);
        let mut totals = [[_mm512_setzero_ps(); G]; R];
        for b in 0..blocks {
            if row == p.rows.start {
                for g in 0..G {
                    w[g].ask_ahead(G * blocks + b, lines, OFFSETS);
                }
            }
            // Sums of the high bytes and of the low ones.
            let mut sums = [[[_mm512_setzero_si512(); G]; R]; 2];
            for r in 0..R {
                sums[1][r] = [_mm512_set1_epi32((-zero).wrapping_mul(x[r].sums[b])); G];
            }
            for line in 0..lines {
                let mut quants = [_mm512_setzero_si512(); G];
                for g in 0..G {
                    // SAFETY: 64 bytes that are aligned by their type; as many as asserted.
                    quants[g] = unsafe { _mm512_load_si512(w[g].quants.as_ptr().add(b * lines + line).cast()) };
                }
                for half in 0..BLOCK / STEP / lines {
                    let mut halves = quants;
                    for g in 0..G {
                        halves[g] = match (FOUR, half) {
                            (false, _) => quants[g],
                            (true, 0) => _mm512_and_si512(quants[g], low),
                            (true, _) => _mm512_and_si512(_mm512_srli_epi16::<4>(quants[g]), low),
                        };
                    }
                    for byte in 0..2 {
                        for r in 0..R {
                            let at = (2 * b + byte) * BLOCK + (half * lines + line) * STEP;
                            // SAFETY: four bytes, no alignment needed; as many as asserted.
                            let terms = unsafe { x[r].bytes.as_ptr().add(at).cast::<i32>().read_unaligned() };
                            let terms = _mm512_set1_epi32(terms);
                            for g in 0..G {
                                sums[byte][r][g] = _mm512_dpbusd_epi32(sums[byte][r][g], halves[g], terms);
                            }
                        }
                    }
                }
            }
            for g in 0..G {
                let scale = numbers(&w[g].scales[b]);
                for r in 0..R {
                    let scale = _mm512_mul_ps(scale, _mm512_set1_ps(x[r].scales[b]));
                    let sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(sums[0][r][g]), sums[1][r][g]);
                    totals[r][g] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, totals[r][g]);
                }
                if OFFSETS {
                    let offset = numbers(&w[g].offsets[b]);
                    for r in 0..R {
                        let sum = _mm512_set1_ps(x[r].scales[b] * x[r].sums[b] as f32);
                        totals[r][g] = _mm512_fmadd_ps(offset, sum, totals[r][g]);
                    }
                }
            }
        }
        for r in 0..R {
            for g in 0..G {
                let mut sums = [0.0f32; LANES];
                // SAFETY: 16 floats, no alignment needed.
                unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), totals[r][g]) };
                p.store(row + r, group + g, &sums);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        __m256, _mm_and_si128, _mm_load_si128, _mm_set1_epi8, _mm_srli_epi16, _mm256_add_epi32, _mm256_cvtepi32_ps,
        _mm256_cvtepu8_epi16, _mm256_cvtph_ps, _mm256_fmadd_ps, _mm256_hadd_epi32, _mm256_madd_epi16, _mm256_mul_ps,
        _mm256_permute4x64_epi64, _mm256_set1_epi32, _mm256_set1_epi64x, _mm256_set1_ps, _mm256_setzero_ps,
        _mm256_setzero_si256, _mm256_storeu_ps,
    };

    use super::{BLOCK, DType, LANES, Piece, STEP};

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn piece(p: &Piece<'_>) {
        tiles!(p, tile, "avx2,fma,f16c", [1: 1 2 3]);
    }

    /// Eight outputs' float16 numbers.
    #[target_feature(enable = "avx,f16c")]
    fn numbers(n: &[u16; LANES], half: usize) -> __m256 {
        // SAFETY: 16 bytes from 0 or 16 on of 32, aligned by their type.
        unsafe { _mm256_cvtph_ps(_mm_load_si128(n.as_ptr().add(8 * half).cast())) }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
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
        let (lines, zero) = (if FOUR { BLOCK / STEP / 2 } else { BLOCK / STEP }, p.w.zero());
        let low = _mm_set1_epi8(15);
        for g in 0..G {
            let w = p.group(group + g);
            let mut totals = [[_mm256_setzero_ps(); 2]; R];
            for b in 0..p.blocks() {
                // Of four outputs each, two sums of even and odd pairs of terms.
                let mut sums = [[_mm256_setzero_si256(); 4]; R];
                for step in 0..BLOCK / STEP {
                    let line = &w.quants[b * lines + step % lines].0;
                    let mut words = [_mm256_setzero_si256(); 4];
                    for quarter in 0..4 {
                        // SAFETY: 16 bytes of 64 that are aligned by their type.
                        let bytes = unsafe { _mm_load_si128(line.as_ptr().add(16 * quarter).cast()) };
                        words[quarter] = _mm256_cvtepu8_epi16(match (FOUR, step < lines) {
                            (false, _) => bytes,
                            (true, true) => _mm_and_si128(bytes, low),
                            (true, false) => _mm_and_si128(_mm_srli_epi16::<4>(bytes), low),
                        });
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
                for r in 0..R {
                    for half in 0..2 {
                        // Neighbours are added; then the outputs are 0 1 4 5 2 3 6 7.
                        let pairs = _mm256_hadd_epi32(sums[r][2 * half], sums[r][2 * half + 1]);
                        let sum = _mm256_permute4x64_epi64::<0b11_01_10_00>(pairs);
                        let sum = _mm256_add_epi32(sum, _mm256_set1_epi32((-zero).wrapping_mul(x[r].sums[b])));
                        let scale = _mm256_mul_ps(numbers(&w.scales[b].0, half), _mm256_set1_ps(x[r].scales[b]));
                        totals[r][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, totals[r][half]);
                        if OFFSETS {
                            let sum = _mm256_set1_ps(x[r].scales[b] * x[r].sums[b] as f32);
                            totals[r][half] = _mm256_fmadd_ps(numbers(&w.offsets[b].0, half), sum, totals[r][half]);
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
                p.store(row + r, group + g, &sums);
            }
        }
    }
}
