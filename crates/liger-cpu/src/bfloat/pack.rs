//! Operands of products in the order that kernels read them: 16 rows times 32 terms at a time, rounded to bfloat16, with zeros
//! where a matrix ends.

use std::arch::x86_64::{
    __m256i, __m512bh, __m512i, _mm256_maskz_loadu_epi16, _mm512_cvtepu16_epi32, _mm512_cvtne2ps_pbh,
    _mm512_cvtneps_pbh, _mm512_maskz_loadu_epi16, _mm512_maskz_loadu_ps, _mm512_or_si512, _mm512_setzero_si512,
    _mm512_shuffle_i32x4, _mm512_slli_epi32, _mm512_storeu_si512, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64,
    _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};
use std::ops::Range;

use half::bf16;

use super::STEP;
use crate::gemm::Matrix;

/// Rows of a block.
pub(crate) const ROWS: usize = 16;

/// Two neighbouring terms of one row.
pub(crate) type Pair = u32;

/// How the 16 vectors of a block lie.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// A row each: its 32 terms.
    Rows,
    /// Two terms each: those of the 16 rows.
    Pairs,
}

/// The order of a packed matrix `[rows, terms]`.
#[derive(Clone, Copy)]
pub(super) enum Layout {
    /// `[rows / together, terms / 32, together, 32]`; together are 1 or 16.
    Rows { together: usize },
    /// `[rows / width, terms / 2, width, 2]`, the width a multiple of 16.
    Panels { width: usize },
}

impl Layout {
    fn form(self) -> Form {
        match self {
            Self::Rows { .. } => Form::Rows,
            Self::Panels { .. } => Form::Pairs,
        }
    }

    /// Where the first vector of a block begins and how far apart its vectors are, of so many blocks of terms in all.
    fn block(self, steps: usize, row: usize, step: usize) -> (usize, usize) {
        const LINE: usize = STEP / 2;
        match self {
            Self::Rows { together: 1 } => ((row * ROWS * steps + step) * LINE, steps * LINE),
            Self::Rows { .. } => ((row * steps + step) * ROWS * LINE, LINE),
            Self::Panels { width } => {
                let (panel, inside) = (row * ROWS / width, row * ROWS % width);
                ((panel * steps + step) * LINE * width + inside, width)
            }
        }
    }
}

/// Numbers that are bfloat16, or rounded to it.
pub(crate) trait Source: Copy + Sync {
    /// The numbers as pairs of neighbours, if they are bfloat16 already.
    fn as_pairs(data: &[Self]) -> Option<&[Pair]>;

    /// The neighbours that the mask names.
    ///
    /// # Safety
    /// AVX-512 with BW, VL and BF16; what the mask names must be readable.
    unsafe fn terms(from: *const Self, mask: u32) -> __m512i;

    /// The neighbours that the masks name, each of `low` beside that of `high`.
    ///
    /// # Safety
    /// As [`Source::terms`].
    unsafe fn pairs(low: (*const Self, u16), high: (*const Self, u16)) -> __m512i;
}

impl Source for bf16 {
    fn as_pairs(data: &[Self]) -> Option<&[Pair]> {
        bytemuck::try_cast_slice(data).ok()
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    #[inline]
    unsafe fn terms(from: *const Self, mask: u32) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { _mm512_maskz_loadu_epi16(mask, from.cast()) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    #[inline]
    unsafe fn pairs(low: (*const Self, u16), high: (*const Self, u16)) -> __m512i {
        // SAFETY: the caller's promise.
        let load = |(from, mask): (*const Self, u16)| unsafe { _mm256_maskz_loadu_epi16(mask, from.cast()) };
        side_by_side(load(low), load(high))
    }
}

impl Source for f32 {
    fn as_pairs(_: &[Self]) -> Option<&[Pair]> {
        None
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    #[inline]
    unsafe fn terms(from: *const Self, mask: u32) -> __m512i {
        // SAFETY: the caller's promise; what is behind a mask of nothing is not read.
        unsafe {
            let low = _mm512_maskz_loadu_ps(mask as u16, from);
            let high = _mm512_maskz_loadu_ps((mask >> 16) as u16, from.wrapping_add(16));
            std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    #[inline]
    unsafe fn pairs(low: (*const Self, u16), high: (*const Self, u16)) -> __m512i {
        // SAFETY: the caller's promise; both types are any 32 bytes.
        let load = |(from, mask): (*const Self, u16)| unsafe {
            std::mem::transmute::<_, __m256i>(_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, from)))
        };
        side_by_side(load(low), load(high))
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn side_by_side(low: __m256i, high: __m256i) -> __m512i {
    _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(high)))
}

/// A matrix `[rows, terms]` that is packed a block at a time.
pub(crate) trait Blocks: Copy + Sync {
    fn covers(self, rows: usize, terms: usize) -> bool;

    /// Whether the next block in memory is that of the next terms, not of the next rows.
    fn lies_by_rows(self) -> bool;

    /// The numbers of at most 16 rows and 32 terms, in bfloat16; the rest are zeros.
    ///
    /// # Safety
    /// AVX-512 with BW, VL and BF16; the matrix must cover them, and the first of them are multiples of 16 and 32 where it lies
    /// in blocks of its own.
    unsafe fn block(self, rows: Range<usize>, terms: Range<usize>) -> ([__m512i; ROWS], Form);
}

impl<S: Source> Blocks for Matrix<'_, S> {
    fn covers(self, rows: usize, terms: usize) -> bool {
        let has_neighbours = self.column_stride == 1 || self.row_stride == 1;
        has_neighbours && Matrix::covers(&self, rows, terms)
    }

    fn lies_by_rows(self) -> bool {
        self.column_stride == 1
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    #[inline]
    unsafe fn block(self, rows: Range<usize>, terms: Range<usize>) -> ([__m512i; ROWS], Form) {
        let from = self.data.as_ptr().wrapping_add(rows.start * self.row_stride + terms.start * self.column_stride);
        // Loops of constant length leave a whole block in registers.
        if rows.len() == ROWS && terms.len() == STEP {
            let mut x = [_mm512_setzero_si512(); ROWS];
            if self.column_stride == 1 {
                for (row, x) in x.iter_mut().enumerate() {
                    // SAFETY: the matrix covers these terms.
                    *x = unsafe { S::terms(from.wrapping_add(row * self.row_stride), u32::MAX) };
                }
                return (x, Form::Rows);
            }
            for (pair, x) in x.iter_mut().enumerate() {
                let low = from.wrapping_add(2 * pair * self.column_stride);
                // SAFETY: as above.
                *x = unsafe { S::pairs((low, u16::MAX), (low.wrapping_add(self.column_stride), u16::MAX)) };
            }
            return (x, Form::Pairs);
        }
        let mut x = [_mm512_setzero_si512(); ROWS];
        if self.column_stride == 1 {
            let mask = u32::MAX >> (STEP - terms.len());
            for (row, x) in x[..rows.len()].iter_mut().enumerate() {
                // SAFETY: the matrix covers these terms.
                *x = unsafe { S::terms(from.wrapping_add(row * self.row_stride), mask) };
            }
            return (x, Form::Rows);
        }
        let mask = u16::MAX >> (ROWS - rows.len());
        for (pair, x) in x[..terms.len().div_ceil(2)].iter_mut().enumerate() {
            let low = from.wrapping_add(2 * pair * self.column_stride);
            let high = if 2 * pair + 1 < terms.len() { mask } else { 0 };
            // SAFETY: as above.
            *x = unsafe { S::pairs((low, mask), (low.wrapping_add(self.column_stride), high)) };
        }
        (x, Form::Pairs)
    }
}

/// Rows `rows` of a matrix in this order, `terms` of each. What lies behind the last row, up to a multiple of 16, may be anything.
///
/// # Safety
/// AVX-512 with BW, VL and BF16; the first row and term as [`Blocks::block`] wants them.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn pack(
    to: &mut [Pair],
    layout: Layout,
    matrix: impl Blocks,
    rows: Range<usize>,
    terms: Range<usize>,
) {
    assert!(matrix.covers(rows.end, terms.end), "a matrix of too few numbers, or without neighbours");
    let (row_blocks, steps) = (rows.len().div_ceil(ROWS), terms.len().div_ceil(STEP));
    for i in 0..row_blocks * steps {
        // In the order in which the matrix lies.
        let (row, step) = if matrix.lies_by_rows() { (i / steps, i % steps) } else { (i % row_blocks, i / row_blocks) };
        let (first_row, first_term) = (rows.start + row * ROWS, terms.start + step * STEP);
        let (last_row, last_term) = (rows.end.min(first_row + ROWS), terms.end.min(first_term + STEP));
        // SAFETY: the matrix covers these terms; the rest is the caller's promise.
        let (mut x, lies) = unsafe { matrix.block(first_row..last_row, first_term..last_term) };
        if lies != layout.form() {
            x = transposed(x);
        }
        let (first, stride) = layout.block(steps, row, step);
        let to = &mut to[first..][..(ROWS - 1) * stride + STEP / 2];
        for (i, x) in x.into_iter().enumerate() {
            // SAFETY: `to` was cut to hold all of them.
            unsafe { _mm512_storeu_si512(to.as_mut_ptr().add(i * stride).cast(), x) };
        }
    }
}

/// 16 x 16 pairs.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn transposed(mut x: [__m512i; 16]) -> [__m512i; 16] {
    // Twos, fours, then whole quarters of vectors change places.
    let mut y = x;
    for i in (0..16).step_by(2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for i in (0..16).step_by(4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
    for i in 0..4 {
        for four in [0, 8] {
            y[four + i] = _mm512_shuffle_i32x4::<0b10_00_10_00>(x[four + i], x[four + 4 + i]);
            y[four + 4 + i] = _mm512_shuffle_i32x4::<0b11_01_11_01>(x[four + i], x[four + 4 + i]);
        }
    }
    for i in 0..8 {
        x[i] = _mm512_shuffle_i32x4::<0b10_00_10_00>(y[i], y[8 + i]);
        x[8 + i] = _mm512_shuffle_i32x4::<0b11_01_11_01>(y[i], y[8 + i]);
    }
    x
}
