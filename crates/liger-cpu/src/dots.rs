//! `x w^T` as dot products: both operands are contiguous along the sum, so nothing is packed or transposed.
//!
//! A tile keeps 4 weight rows times up to 6 rows of `x` in registers. Weights are read once for every block of rows of
//! `x`, from memory once a call: what a decoding step needs, and good for tall `x` too.

use pulp::{Simd, WithSimd};

use crate::element::Element;
use crate::parallel::{Disjoint, for_tasks, threads};

/// Weight rows of a tile.
const COLUMNS: usize = 4;
/// Rows of `x` that are gone through with one group of weight rows before the next.
const ROW_BLOCK: usize = 48;
/// Terms of the sum per pass, so that a tile's operands stay in the nearest cache.
const DEPTH: usize = 1024;

/// `c [m, n] = scale * x [m, k] w [n, k]^T (+ c)`.
pub(crate) fn product<W: Element>(
    c: &mut [f32],
    x: &[f32],
    w: &[W],
    (m, n, k): (usize, usize, usize),
    scale: f32,
    accumulate: bool,
) {
    assert!(c.len() == m * n && x.len() == m * k && w.len() == n * k, "dot products {m} x {k} x {n}");
    let c = Disjoint::new(c);
    // Enough pieces to share evenly, each of enough work to be worth handing over.
    let smallest = (1usize << 16).div_ceil(m * k.max(1)).next_multiple_of(COLUMNS);
    let piece = n.div_ceil(4 * threads()).next_multiple_of(COLUMNS).max(smallest);
    for_tasks(n.div_ceil(piece), |i| {
        let columns = i * piece..n.min((i + 1) * piece);
        pulp::Arch::new().dispatch(Piece { c: &c, x, w, columns, m, n, k, scale, accumulate });
    });
}

/// The same on this thread alone.
pub(crate) fn product_alone<W: Element>(
    c: &mut [f32],
    x: &[f32],
    w: &[W],
    (m, n, k): (usize, usize, usize),
    scale: f32,
    accumulate: bool,
) {
    assert!(c.len() == m * n && x.len() == m * k && w.len() == n * k, "dot products {m} x {k} x {n}");
    let c = &Disjoint::new(c);
    pulp::Arch::new().dispatch(Piece { c, x, w, columns: 0..n, m, n, k, scale, accumulate });
}

/// `out [m, d] = p [m, n] v [n, d]`: sums of value rows, for a few rows of weights.
pub(crate) fn weighted_sums<W: Element>(out: &mut [f32], p: &[f32], v: &[W], (m, n, d): (usize, usize, usize)) {
    /// Value rows that stay in the nearest cache for all rows of weights.
    const ROWS: usize = 64;
    assert!(out.len() == m * d && p.len() == m * n && v.len() == n * d, "weighted sums {m} x {n} x {d}");
    out.fill(0.0);
    let mut scratch = Vec::new();
    for first in (0..n).step_by(ROWS) {
        let count = ROWS.min(n - first);
        let v = W::widened(&v[first * d..(first + count) * d], &mut scratch);
        for (out, p) in out.chunks_exact_mut(d).zip(p.chunks_exact(n)) {
            pulp::Arch::new().dispatch(WeightedSum { out, p: &p[first..first + count], v, d });
        }
    }
}

/// `out [d] += p [n] v [n, d]`.
struct WeightedSum<'a> {
    out: &'a mut [f32],
    p: &'a [f32],
    v: &'a [f32],
    d: usize,
}

impl WithSimd for WeightedSum<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { out, p, v, d } = self;
        const REGISTERS: usize = 4;
        let block = REGISTERS * S::F32_LANES;
        let whole = d / block * block;
        for first in (0..whole).step_by(block) {
            let out = S::as_mut_simd_f32s(&mut out[first..first + block]).0;
            let mut sums: [S::f32s; REGISTERS] = std::array::from_fn(|i| out[i]);
            for (weight, v) in p.iter().zip(v.chunks_exact(d)) {
                let weight = simd.splat_f32s(*weight);
                for (sum, v) in sums.iter_mut().zip(S::as_simd_f32s(&v[first..first + block]).0) {
                    *sum = simd.mul_add_f32s(weight, *v, *sum);
                }
            }
            out.copy_from_slice(&sums);
        }
        for (weight, v) in p.iter().zip(v.chunks_exact(d)) {
            for (out, v) in out[whole..].iter_mut().zip(&v[whole..]) {
                *out += weight * v;
            }
        }
    }
}

struct Piece<'a, W> {
    c: &'a Disjoint<'a>,
    x: &'a [f32],
    w: &'a [W],
    columns: std::ops::Range<usize>,
    m: usize,
    n: usize,
    k: usize,
    scale: f32,
    accumulate: bool,
}

impl<W: Element> WithSimd for Piece<'_, W> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let mut scratch = Vec::new();
        for first_row in (0..self.m).step_by(ROW_BLOCK) {
            let rows = first_row..self.m.min(first_row + ROW_BLOCK);
            for group in self.columns.clone().step_by(COLUMNS) {
                let count = COLUMNS.min(self.columns.end - group);
                let weights = W::widened(&self.w[group * self.k..(group + count) * self.k], &mut scratch);
                for depth in (0..self.k).step_by(DEPTH) {
                    let depth = depth..self.k.min(depth + DEPTH);
                    // A short last group repeats its last row; the surplus is not stored.
                    let w: [&[f32]; COLUMNS] = std::array::from_fn(|i| {
                        let row = i.min(count - 1) * self.k;
                        &weights[row + depth.start..row + depth.end]
                    });
                    self.row_block(simd, rows.clone(), group, count, depth, w);
                }
            }
        }
    }
}

impl<W: Element> Piece<'_, W> {
    #[inline(always)]
    fn row_block<S: Simd>(
        &self,
        simd: S,
        rows: std::ops::Range<usize>,
        group: usize,
        count: usize,
        depth: std::ops::Range<usize>,
        w: [&[f32]; COLUMNS],
    ) {
        let mut row = rows.start;
        while row < rows.end {
            // Six rows and four columns fill the 32 registers of AVX-512; with 16 registers two rows do. What is left
            // is cut evenly: 8 rows are two tiles of 4, not one of 6 and one of 2.
            let most = if S::F32_LANES >= 16 { 6 } else { 2 };
            let left = rows.end - row;
            let count_rows = left.div_ceil(left.div_ceil(most));
            let depth = depth.clone();
            match count_rows {
                1 => self.tile::<S, 1>(simd, row, group, count, depth, w),
                2 => self.tile::<S, 2>(simd, row, group, count, depth, w),
                3 => self.tile::<S, 3>(simd, row, group, count, depth, w),
                4 => self.tile::<S, 4>(simd, row, group, count, depth, w),
                5 => self.tile::<S, 5>(simd, row, group, count, depth, w),
                _ => self.tile::<S, 6>(simd, row, group, count, depth, w),
            }
            row += count_rows;
        }
    }

    #[inline(always)]
    fn tile<S: Simd, const R: usize>(
        &self,
        simd: S,
        row: usize,
        group: usize,
        count: usize,
        depth: std::ops::Range<usize>,
        w: [&[f32]; COLUMNS],
    ) {
        let x: [&[f32]; R] = std::array::from_fn(|r| &self.x[(row + r) * self.k..][depth.clone()]);
        let whole = depth.len() / S::F32_LANES;
        let mut x_lanes: [&[S::f32s]; R] = [&[]; R];
        for r in 0..R {
            x_lanes[r] = &S::as_simd_f32s(x[r]).0[..whole];
        }
        let mut w_lanes: [&[S::f32s]; COLUMNS] = [&[]; COLUMNS];
        for column in 0..COLUMNS {
            w_lanes[column] = &S::as_simd_f32s(w[column]).0[..whole];
        }
        let mut sums = [[simd.splat_f32s(0.0); COLUMNS]; R];
        for i in 0..whole {
            for r in 0..R {
                // SAFETY: all slices were cut to `whole` above, and i is below it. A check here would cost more than
                // the arithmetic.
                let x = unsafe { *x_lanes[r].get_unchecked(i) };
                for column in 0..COLUMNS {
                    // SAFETY: as above.
                    let w = unsafe { *w_lanes[column].get_unchecked(i) };
                    sums[r][column] = simd.mul_add_f32s(x, w, sums[r][column]);
                }
            }
        }
        for r in 0..R {
            // SAFETY: pieces have distinct columns, and this is the only slice of them alive.
            let out = unsafe { self.c.slice((row + r) * self.n + group, count) };
            for (column, out) in out.iter_mut().enumerate() {
                let mut sum = simd.reduce_sum_f32s(sums[r][column]);
                for i in whole * S::F32_LANES..depth.len() {
                    sum += x[r][i] * w[column][i];
                }
                let keep = self.accumulate || depth.start > 0;
                *out = self.scale * sum + if keep { *out } else { 0.0 };
            }
        }
    }
}
