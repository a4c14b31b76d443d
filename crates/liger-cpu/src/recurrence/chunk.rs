//! The three sums over pairs of tokens of a chunk that the gated recurrence is made of, forward and backward.
//!
//! With E_ijd = exp(g_{j+1,d} + ... + g_{i,d}) for j <= i, else 0, and rows x [C, G, D], columns y [C, D]:
//! - [`Chunk::scores`]     A_igj = sum_d x_igd y_jd E_ijd
//! - [`Chunk::to_rows`]    o_igd = sum_j A_igj y_jd E_ijd
//! - [`Chunk::to_columns`] z_jd  = sum_ig A_igj x_igd E_ijd
//!
//! No two large sums are subtracted, and no exponential of a large number is ever taken: a chunk is cut into sub-chunks of 16
//! tokens. Between two of them the decay factors at their border into two that are each at most 1, and the sum over pairs is a
//! matrix product. Inside one, where its gates add up to little in every dimension ([`MILD`]), the decay of a pair factors at the
//! sub-chunk's first token, into one factor of at most 1 and one of at most exp(-[`MILD`]), which is a matrix product too; else the
//! exponent is summed up pair by pair. A chunk that is mild as a whole is one sub-chunk.

use crate::gemm::{Alone, rows};
use crate::math::{add_scaled, dot, exp};
use crate::parallel::vectorized;

/// Tokens of a chunk.
pub(crate) const CHUNK: usize = 64;
const SUB: usize = 16;
/// The lowest sum of gates whose inverse decay is taken: factors keep their relative precision (the sum's rounding is some 2e-6),
/// and none comes near float32's largest number.
const MILD: f32 = -30.0;

/// The decays of one chunk, from its log gates `[C, D]`, which are at least -40.
pub(crate) struct Chunk<'a> {
    gates: &'a [f32],
    len: usize,
    dim: usize,
    group: usize,
    alone: Alone,
    /// Tokens of a sub-chunk.
    sub_len: usize,
    /// Whether each sub-chunk is mild.
    is_mild: Vec<bool>,
    /// exp(gates summed from the row's sub-chunk's first token to the row), `[C, D]`.
    row_decay: Vec<f32>,
    /// The inverse, in mild sub-chunks.
    inverse_decay: Vec<f32>,
    /// Gates summed from after the row to the end of its sub-chunk, `[C, D]`.
    to_sub_end: Vec<f32>,
    /// Gates summed over each sub-chunk, `[subs, D]`.
    totals: Vec<f32>,
}

/// Whether gates `[tokens, D]` add up to little in every dimension.
#[inline(always)]
fn is_mild(gates: &[f32], dim: usize) -> bool {
    let mut sum = vec![0.0f32; dim];
    gates.chunks_exact(dim).for_each(|row| add_scaled(&mut sum, 1.0, row));
    sum.iter().all(|&sum| sum >= MILD)
}

/// Sets `a [rows, G, columns]`, whose first row is that of token `first`, to zero where the column's token is later than the row's.
pub(super) fn hide_later(a: &mut [f32], first: usize, columns: usize, group: usize) {
    vectorized!(|| {
        for (row, a) in a.chunks_exact_mut(columns).enumerate() {
            let i = (first + row / group) as u32;
            (0u32..).zip(a).for_each(|(j, a)| *a = if j > i { 0.0 } else { *a });
        }
    },);
}

/// `x [C, G, D] * decay [C, D]`.
pub(super) fn times_decay(x: &[f32], decay: &[f32], dim: usize, group: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    vectorized!(|| {
        for (x, decay) in x.chunks_exact(group * dim).zip(decay.chunks_exact(dim)) {
            for x in x.chunks_exact(dim) {
                out.extend(x.iter().zip(decay).map(|(x, e)| x * e));
            }
        }
    },);
    out
}

impl<'a> Chunk<'a> {
    pub(crate) fn new(gates: &'a [f32], dim: usize, group: usize, alone: Alone) -> Self {
        let len = gates.len() / dim;
        let sub_len = if vectorized!(|| is_mild(gates, dim)) { CHUNK } else { SUB };
        let subs = len.div_ceil(sub_len);
        let mut chunk = Self {
            gates,
            len,
            dim,
            group,
            alone,
            sub_len,
            is_mild: vectorized!(|| gates.chunks(sub_len * dim).map(|gates| is_mild(gates, dim)).collect()),
            row_decay: vec![0.0; gates.len()],
            inverse_decay: vec![0.0; gates.len()],
            to_sub_end: vec![0.0; gates.len()],
            totals: vec![0.0; subs * dim],
        };
        vectorized!(|| {
            for sub in 0..subs {
                let range = sub * sub_len..len.min((sub + 1) * sub_len);
                let total = &mut chunk.totals[sub * dim..(sub + 1) * dim];
                for i in range.clone() {
                    add_scaled(total, 1.0, &gates[i * dim..(i + 1) * dim]);
                    chunk.row_decay[i * dim..(i + 1) * dim].copy_from_slice(total);
                }
                for i in range.clone().rev().skip(1) {
                    let (now, after) = chunk.to_sub_end[i * dim..(i + 2) * dim].split_at_mut(dim);
                    for d in 0..dim {
                        now[d] = after[d] + gates[(i + 1) * dim + d];
                    }
                }
                if chunk.is_mild[sub] {
                    let of_sub = range.start * dim..range.end * dim;
                    let sums = &chunk.row_decay[of_sub.clone()];
                    chunk.inverse_decay[of_sub].iter_mut().zip(sums).for_each(|(inverse, sum)| *inverse = exp(-sum));
                }
            }
            chunk.row_decay.iter_mut().for_each(|sum| *sum = exp(*sum));
        },);
        chunk
    }

    fn sub(&self, i: usize) -> std::ops::Range<usize> {
        i * self.sub_len..self.len.min((i + 1) * self.sub_len)
    }

    fn subs(&self) -> usize {
        self.len.div_ceil(self.sub_len)
    }

    /// Gates summed over sub-chunks `range`.
    fn between(&self, range: std::ops::Range<usize>) -> Vec<f32> {
        let mut sum = vec![0.0f32; self.dim];
        for sub in range {
            add_scaled(&mut sum, 1.0, &self.totals[sub * self.dim..(sub + 1) * self.dim]);
        }
        sum
    }

    /// exp(gates summed from the chunk's first token to each row), `[C, D]`: the decay of the state before the chunk.
    pub(crate) fn start_decay(&self) -> Vec<f32> {
        let mut decay = self.row_decay.clone();
        vectorized!(|| {
            for sub in 1..self.subs() {
                let before: Vec<f32> = self.between(0..sub).iter().map(|&sum| exp(sum)).collect();
                for i in self.sub(sub) {
                    decay[i * self.dim..(i + 1) * self.dim].iter_mut().zip(&before).for_each(|(x, b)| *x *= b);
                }
            }
        },);
        decay
    }

    /// exp(gates summed from after each row to the chunk's end), `[C, D]`.
    pub(crate) fn end_decay(&self) -> Vec<f32> {
        self.column_decay(self.subs())
    }

    /// Decay of columns `0..first of sub` from themselves to just before sub-chunk `sub`.
    fn column_decay(&self, sub: usize) -> Vec<f32> {
        let columns = self.len.min(sub * self.sub_len);
        let mut decay = vec![0.0f32; columns * self.dim];
        vectorized!(|| {
            for column_sub in 0..sub {
                let between = self.between(column_sub + 1..sub);
                for j in self.sub(column_sub) {
                    let range = j * self.dim..(j + 1) * self.dim;
                    for ((x, s), b) in decay[range.clone()].iter_mut().zip(&self.to_sub_end[range]).zip(&between) {
                        *x = exp(s + b);
                    }
                }
            }
        },);
        decay
    }

    /// Rows of `x [C, G, D]` that belong to sub-chunk `sub`, times their row decay.
    fn decayed_rows(&self, x: &[f32], sub: usize) -> Vec<f32> {
        let (dim, width, range) = (self.dim, self.group * self.dim, self.sub(sub));
        let decay = &self.row_decay[range.start * dim..range.end * dim];
        times_decay(&x[range.start * width..range.end * width], decay, dim, self.group)
    }

    fn decay_rows(&self, x: &mut [f32], sub: usize) {
        vectorized!(|| {
            for (row, x) in x.chunks_exact_mut(self.dim).enumerate() {
                let i = sub * self.sub_len + row / self.group;
                let decay = &self.row_decay[i * self.dim..(i + 1) * self.dim];
                x.iter_mut().zip(decay).for_each(|(x, e)| *x *= e);
            }
        },);
    }

    /// Columns of `y [C, D]` that a matrix product of sub-chunk `sub` takes: those before it, decayed to its start, and if it is mild its
    /// own, with the inverse of their decay.
    fn columns(&self, y: &[f32], sub: usize) -> Vec<f32> {
        let (dim, range) = (self.dim, self.sub(sub));
        let mut columns = self.column_decay(sub);
        vectorized!(|| columns.iter_mut().zip(y).for_each(|(c, y)| *c *= y),);
        if self.is_mild[sub] {
            let own = range.start * dim..range.end * dim;
            let (y, inverse) = (&y[own.clone()], &self.inverse_decay[own]);
            vectorized!(|| columns.extend(y.iter().zip(inverse).map(|(y, e)| y * e)));
        }
        columns
    }

    /// Calls `f(i, j, decay of the pair [D])` for the pairs j <= i inside sub-chunk `sub`.
    #[inline(always)]
    fn for_pairs(&self, sub: usize, mut f: impl FnMut(usize, usize, &[f32])) {
        let dim = self.dim;
        let (mut sum, mut decay) = (vec![0.0f32; dim], vec![0.0f32; dim]);
        for i in self.sub(sub) {
            sum.fill(0.0);
            decay.fill(1.0);
            f(i, i, &decay);
            for j in (sub * self.sub_len..i).rev() {
                let gates = &self.gates[(j + 1) * dim..(j + 2) * dim];
                for d in 0..dim {
                    sum[d] += gates[d];
                    decay[d] = exp(sum[d]);
                }
                f(i, j, &decay);
            }
        }
    }

    /// A `[C, G, C]`, zero where j > i.
    pub(crate) fn scores(&self, x: &[f32], y: &[f32]) -> Vec<f32> {
        let (dim, group, len) = (self.dim, self.group, self.len);
        let mut a = vec![0.0f32; len * group * len];
        for sub in 0..self.subs() {
            let range = self.sub(sub);
            let first = range.start * group * len;
            if sub > 0 || self.is_mild[sub] {
                let columns = self.columns(y, sub);
                let scaled_rows = self.decayed_rows(x, sub);
                let sizes = (scaled_rows.len() / dim, columns.len() / dim, dim);
                let (x_rows, y_columns) = (rows(&scaled_rows, dim), rows(&columns, dim).t());
                self.alone.matmul((&mut a[first..], len), sizes, (x_rows, y_columns), 1.0, false);
            }
            if self.is_mild[sub] {
                // Behind the sub-chunk nothing was written.
                hide_later(&mut a[range.start * group * len..range.end * group * len], range.start, len, group);
                continue;
            }
            vectorized!(|| {
                let mut scaled = vec![0.0f32; dim];
                self.for_pairs(sub, |i, j, decay| {
                    for d in 0..dim {
                        scaled[d] = decay[d] * y[j * dim + d];
                    }
                    for g in 0..group {
                        let row = i * group + g;
                        a[row * len + j] = dot(&x[row * dim..(row + 1) * dim], &scaled);
                    }
                });
            },);
        }
        a
    }

    /// o `[C, G, D]`.
    pub(crate) fn to_rows(&self, a: &[f32], y: &[f32]) -> Vec<f32> {
        let (dim, group, len) = (self.dim, self.group, self.len);
        let mut out = vec![0.0f32; len * group * dim];
        for sub in 0..self.subs() {
            let range = self.sub(sub);
            let first = range.start * group;
            if sub > 0 || self.is_mild[sub] {
                let columns = self.columns(y, sub);
                let sizes = (range.len() * group, dim, columns.len() / dim);
                let block = &mut out[first * dim..range.end * group * dim];
                self.alone.matmul(
                    (&mut *block, dim),
                    sizes,
                    (rows(&a[first * len..], len), rows(&columns, dim)),
                    1.0,
                    false,
                );
                self.decay_rows(block, sub);
            }
            if self.is_mild[sub] {
                continue;
            }
            vectorized!(|| {
                self.for_pairs(sub, |i, j, decay| {
                    let y = &y[j * dim..(j + 1) * dim];
                    for g in 0..group {
                        let row = i * group + g;
                        let weight = a[row * len + j];
                        let out = &mut out[row * dim..(row + 1) * dim];
                        for d in 0..dim {
                            out[d] += weight * decay[d] * y[d];
                        }
                    }
                });
            },);
        }
        out
    }

    /// z `[C, D]`.
    pub(crate) fn to_columns(&self, a: &[f32], x: &[f32]) -> Vec<f32> {
        let (dim, group, len) = (self.dim, self.group, self.len);
        let mut out = vec![0.0f32; len * dim];
        for sub in 0..self.subs() {
            let range = self.sub(sub);
            if sub > 0 || self.is_mild[sub] {
                let scaled_rows = self.decayed_rows(x, sub);
                let mut decay = self.column_decay(sub);
                if self.is_mild[sub] {
                    decay.extend(&self.inverse_decay[range.start * dim..range.end * dim]);
                }
                let mut block = vec![0.0f32; decay.len()];
                let weights = rows(&a[range.start * group * len..], len).t();
                let sizes = (decay.len() / dim, dim, scaled_rows.len() / dim);
                self.alone.matmul((&mut block, dim), sizes, (weights, rows(&scaled_rows, dim)), 1.0, false);
                vectorized!(|| {
                    for ((z, b), e) in out.iter_mut().zip(&block).zip(&decay) {
                        *z += b * e;
                    }
                },);
            }
            if self.is_mild[sub] {
                continue;
            }
            vectorized!(|| {
                self.for_pairs(sub, |i, j, decay| {
                    let z = &mut out[j * dim..(j + 1) * dim];
                    for g in 0..group {
                        let row = i * group + g;
                        let weight = a[row * len + j];
                        let x = &x[row * dim..(row + 1) * dim];
                        for d in 0..dim {
                            z[d] += weight * decay[d] * x[d];
                        }
                    }
                });
            },);
        }
        out
    }
}
