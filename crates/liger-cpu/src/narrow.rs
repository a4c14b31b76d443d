//! Float32 products with a matrix of few columns, such as LoRA's. They read or write a tall matrix once and do little with it, so
//! what counts is that every number of it is loaded once; the small matrix stays in registers.

use pulp::{Simd, WithSimd};

use crate::dots;
use crate::element::Element;
use crate::parallel::{Disjoint, for_tasks, threads};

/// Most columns of the small matrix.
pub(crate) const FEW: usize = 32;
/// Rows of the tall matrix from which it pays.
pub(crate) const TALL: usize = 64;
/// Terms that one pass keeps in registers.
const TERMS: usize = 8;
/// Rows that one task goes through before the next columns.
const ROWS: usize = 32;

/// A matrix `[rows, terms]` with rows filled up with zeros to whole passes.
fn padded(data: &[f32], (rows, terms): (usize, usize)) -> (Vec<f32>, usize) {
    let width = terms.next_multiple_of(TERMS);
    let mut out = vec![0.0; rows * width];
    for row in 0..rows {
        for term in 0..terms {
            out[row * width + term] = data[row * terms + term];
        }
    }
    (out, width)
}

pub(crate) fn transposed(data: &[f32], (rows, columns): (usize, usize)) -> Vec<f32> {
    (0..columns * rows).map(|i| data[i % rows * columns + i / rows]).collect()
}

/// `c [m, n] = scale a [m, k] b [k, n] (+ c)` for a small k.
pub(crate) fn few_terms(
    c: &mut [f32],
    a: &[f32],
    b: &[f32],
    (m, n, k): (usize, usize, usize),
    scale: f32,
    accumulate: bool,
) {
    assert!(c.len() == m * n && a.len() == m * k && b.len() == k * n, "product of few terms {m} x {k} x {n}");
    let (mut a, width) = padded(a, (m, k));
    a.iter_mut().for_each(|a| *a *= scale);
    let c = &Disjoint::new(c);
    for_tasks(m.div_ceil(ROWS), |task| {
        let rows = task * ROWS..m.min((task + 1) * ROWS);
        // SAFETY: tasks have distinct rows.
        let c = unsafe { c.slice(rows.start * n, rows.len() * n) };
        if !accumulate {
            c.fill(0.0);
        }
        let a = &a[rows.start * width..rows.end * width];
        for first in (0..k).step_by(TERMS) {
            let b = &b[first * n..k.min(first + TERMS) * n];
            pulp::Arch::new().dispatch(Spread { c, a: &a[first..], width, b, n });
        }
    });
}

/// `c [m, n] = scale a [m, k] w^T (+ c)` for a small n, with `w [n, k]`.
pub(crate) fn few_outputs<T: Element>(
    c: &mut [f32],
    a: &[T],
    w: &[f32],
    (m, n, k): (usize, usize, usize),
    scale: f32,
    accumulate: bool,
) {
    assert!(c.len() == m * n && a.len() == m * k && w.len() == n * k, "product of few outputs {m} x {k} x {n}");
    let c = &Disjoint::new(c);
    for_tasks(m.div_ceil(ROWS), |task| {
        let rows = task * ROWS..m.min((task + 1) * ROWS);
        // SAFETY: tasks have distinct rows.
        let c = unsafe { c.slice(rows.start * n, rows.len() * n) };
        let mut scratch = Vec::new();
        let a = T::widened(&a[rows.start * k..rows.end * k], &mut scratch);
        dots::product_alone(c, a, w, (rows.len(), n, k), scale, accumulate);
    });
}

/// `c [m, n] = scale a^T b (+ c)` for a small m, with `a [k, m]` and `b [k, n]`.
pub(crate) fn few_rows<T: Element>(
    c: &mut [f32],
    a: &[f32],
    b: &[T],
    (m, n, k): (usize, usize, usize),
    scale: f32,
    accumulate: bool,
) {
    assert!(c.len() == m * n && a.len() == m * k && b.len() == k * n, "product of few rows {m} x {k} x {n}");
    let (mut a, width) = padded(a, (k, m));
    a.iter_mut().for_each(|a| *a *= scale);
    // Each task sums some rows of both, as they lie in memory; its sums are added up afterwards, in order.
    let rows = k.div_ceil(2 * threads()).next_multiple_of(ROWS);
    let tasks = k.div_ceil(rows);
    let mut parts = vec![0.0f32; tasks * m * n];
    let all = Disjoint::new(&mut parts);
    for_tasks(tasks, |task| {
        // SAFETY: each task has its own.
        let part = unsafe { all.slice(task * m * n, m * n) };
        let end = k.min((task + 1) * rows);
        let mut scratch = Vec::new();
        for row in (task * rows..end).step_by(ROWS) {
            let rows = row..end.min(row + ROWS);
            let b = T::widened(&b[rows.start * n..rows.end * n], &mut scratch);
            for first in (0..m).step_by(TERMS) {
                let terms = first..m.min(first + TERMS);
                let c = &mut part[terms.start * n..terms.end * n];
                let a = &a[rows.start * width + first..];
                pulp::Arch::new().dispatch(Gather { c, a, width, b, n });
            }
        }
    });
    if !accumulate {
        c.fill(0.0);
    }
    for part in parts.chunks_exact(m * n) {
        c.iter_mut().zip(part).for_each(|(c, part)| *c += part);
    }
}

/// `c [rows, n] += a b`, with rows of `a` so far apart and up to [`TERMS`] rows of `b`.
struct Spread<'a> {
    c: &'a mut [f32],
    a: &'a [f32],
    width: usize,
    b: &'a [f32],
    n: usize,
}

impl WithSimd for Spread<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let whole = self.n / (2 * S::F32_LANES) * 2 * S::F32_LANES;
        let mut rows = [&[0.0f32; 0][..]; TERMS];
        for (row, b) in rows.iter_mut().zip(self.b.chunks_exact(self.n)) {
            *row = b;
        }
        for column in (0..whole).step_by(2 * S::F32_LANES) {
            let mut b = [[simd.splat_f32s(0.0); 2]; TERMS];
            for (b, row) in b.iter_mut().zip(rows) {
                if let [first, second] = S::as_simd_f32s(row.get(column..column + 2 * S::F32_LANES).unwrap_or(&[])).0 {
                    *b = [*first, *second];
                }
            }
            for (c, a) in self.c.chunks_exact_mut(self.n).zip(self.a.chunks(self.width)) {
                let Some(a) = a.first_chunk::<TERMS>() else { continue };
                let c = S::as_mut_simd_f32s(&mut c[column..column + 2 * S::F32_LANES]).0;
                let [first, second] = c else { continue };
                // Added up through the references, sums would be written after every term.
                let mut sums = [*first, *second];
                for term in 0..TERMS {
                    let a = simd.splat_f32s(a[term]);
                    sums = [simd.mul_add_f32s(a, b[term][0], sums[0]), simd.mul_add_f32s(a, b[term][1], sums[1])];
                }
                [*first, *second] = sums;
            }
        }
        for (c, a) in self.c.chunks_exact_mut(self.n).zip(self.a.chunks(self.width)) {
            for (a, b) in a.iter().zip(self.b.chunks_exact(self.n)) {
                c[whole..].iter_mut().zip(&b[whole..]).for_each(|(c, b)| *c += a * b);
            }
        }
    }
}

/// `c [terms, n] += a^T b` over some rows of `a` and `b`, up to [`TERMS`] of the former's columns.
struct Gather<'a> {
    c: &'a mut [f32],
    a: &'a [f32],
    width: usize,
    b: &'a [f32],
    n: usize,
}

impl WithSimd for Gather<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { c, a, width, b, n } = self;
        let rows = b.len() / n;
        let step = 2 * S::F32_LANES;
        let whole = n / step * step;
        for column in (0..whole).step_by(step) {
            let mut sums = [[simd.splat_f32s(0.0); 2]; TERMS];
            for row in 0..rows {
                let b = S::as_simd_f32s(&b[row * n + column..][..step]).0;
                let (Some(a), [first, second]) = (a[row * width..].first_chunk::<TERMS>(), b) else { continue };
                for term in 0..TERMS {
                    let a = simd.splat_f32s(a[term]);
                    sums[term][0] = simd.mul_add_f32s(a, *first, sums[term][0]);
                    sums[term][1] = simd.mul_add_f32s(a, *second, sums[term][1]);
                }
            }
            for (c, sums) in c.chunks_exact_mut(n).zip(sums) {
                for (c, sum) in S::as_mut_simd_f32s(&mut c[column..column + step]).0.iter_mut().zip(sums) {
                    *c = simd.add_f32s(*c, sum);
                }
            }
        }
        for row in 0..rows {
            for (c, a) in c.chunks_exact_mut(n).zip(&a[row * width..]) {
                let b = &b[row * n + whole..(row + 1) * n];
                c[whole..].iter_mut().zip(b).for_each(|(c, b)| *c += a * b);
            }
        }
    }
}
