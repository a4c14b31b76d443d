//! Matrix products: the `gemm` crate for tall operands, dot products over the weight rows for a few tokens.

use half::bf16;
use liger_tensor::{Error, Gemm, Result, Storage, Tensor};
use rayon::prelude::*;

use crate::parallel::{Disjoint, for_tasks, vectorized};

/// A matrix read through strides.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    data: &'a [f32],
    row_stride: usize,
    column_stride: usize,
}

/// `[rows, stride]`, row by row.
pub(crate) fn rows(data: &[f32], stride: usize) -> Matrix<'_> {
    Matrix { data, row_stride: stride, column_stride: 1 }
}

impl Matrix<'_> {
    /// The transpose, without moving anything.
    pub(crate) fn t(self) -> Self {
        Self { row_stride: self.column_stride, column_stride: self.row_stride, ..self }
    }

    fn covers(&self, rows: usize, columns: usize) -> bool {
        rows == 0 || columns == 0 || (rows - 1) * self.row_stride + (columns - 1) * self.column_stride < self.data.len()
    }
}

/// `c = scale a b (+ c)`; c `[m, n]` with rows `c_stride` apart, a `[m, k]`, b `[k, n]`.
#[allow(clippy::too_many_arguments)]
pub(crate) fn matmul(
    c: &mut [f32],
    c_stride: usize,
    (m, n, k): (usize, usize, usize),
    a: Matrix<'_>,
    b: Matrix<'_>,
    scale: f32,
    accumulate: bool,
    parallelism: gemm::Parallelism,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(rows(c, c_stride).covers(m, n) && a.covers(m, k) && b.covers(k, n), "matrix product {m} x {k} x {n}");
    // SAFETY: the assertion puts every element that the strides reach inside its slice, and `c` is borrowed alone.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            c_stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            if accumulate { 1.0 } else { 0.0 },
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// All threads of the pool, or this one alone where the product is too small to share.
fn share(work: usize) -> gemm::Parallelism {
    if work < 1 << 18 { gemm::Parallelism::None } else { gemm::Parallelism::Rayon(rayon::current_num_threads()) }
}

/// Tokens up to which the dot-product kernel is used: it reads each weight once and never packs.
const FEW_ROWS: usize = 8;

pub(crate) fn gemm(c: &mut Tensor, a: &Tensor, b: &Tensor, how: Gemm) -> Result<()> {
    let matrix = |t: &Tensor, transposed: bool| {
        let (r, w) = (t.dim(0), t.len() / t.dim(0).max(1));
        if transposed { (w, r) } else { (r, w) }
    };
    let ((m, k), (k_b, n)) = (matrix(a, how.transpose_a), matrix(b, how.transpose_b));
    if k != k_b || c.len() != m * n {
        let found = c.shape().to_vec();
        return Err(Error::Shape { operation: "gemm", found, expected: format!("{m} x {k} times {k_b} x {n}") });
    }
    if n == 0 || m == 0 {
        return Ok(());
    }
    let a_data = a.as_f32()?;
    if how.transpose_b && !how.transpose_a && m <= FEW_ROWS {
        return few_rows(c.as_f32_mut()?, a_data, b, (m, n, k), how);
    }
    let a_matrix = rows(a_data, if how.transpose_a { m } else { k });
    let a_matrix = if how.transpose_a { a_matrix.t() } else { a_matrix };
    match b.storage() {
        Storage::F32(b_data) => {
            let b_matrix = rows(b_data, if how.transpose_b { k } else { n });
            let b_matrix = if how.transpose_b { b_matrix.t() } else { b_matrix };
            let c_data = c.as_f32_mut()?;
            matmul(c_data, n, (m, n, k), a_matrix, b_matrix, how.scale, how.accumulate, share(m * n * k));
        }
        Storage::Bf16(b_data) => widened(c.as_f32_mut()?, a_matrix, b_data, (m, n, k), how),
        Storage::Device(_) => b.as_f32().map(|_| ())?,
    }
    Ok(())
}

/// bfloat16 weights: widened a panel of rows at a time, so that no full float32 copy ever exists.
fn widened(c: &mut [f32], a: Matrix<'_>, b: &[bf16], (m, n, k): (usize, usize, usize), how: Gemm) {
    const PANEL: usize = 1024;
    let (b_rows, b_width) = if how.transpose_b { (n, k) } else { (k, n) };
    let mut panel = vec![0.0f32; PANEL.min(b_rows) * b_width];
    for first in (0..b_rows).step_by(PANEL) {
        let count = PANEL.min(b_rows - first);
        let source = &b[first * b_width..(first + count) * b_width];
        panel[..source.len()].par_chunks_mut(1 << 14).zip(source.par_chunks(1 << 14)).for_each(|(wide, narrow)| {
            vectorized(|| wide.iter_mut().zip(narrow).for_each(|(w, x)| *w = x.to_f32()));
        });
        let panel = rows(&panel[..source.len()], b_width);
        if how.transpose_b {
            matmul(&mut c[first..], n, (m, count, k), a, panel.t(), how.scale, how.accumulate, share(m * count * k));
        } else {
            let a = Matrix { data: &a.data[first * a.column_stride..], ..a };
            let accumulate = how.accumulate || first > 0;
            matmul(c, n, (m, n, count), a, panel, how.scale, accumulate, share(m * n * count));
        }
    }
}

trait Element: Copy + Sync {
    fn wide(self) -> f32;
}

impl Element for f32 {
    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn wide(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

fn few_rows(c: &mut [f32], x: &[f32], w: &Tensor, sizes: (usize, usize, usize), how: Gemm) -> Result<()> {
    match w.storage() {
        Storage::F32(w) => few_rows_of(c, x, w, sizes, how),
        Storage::Bf16(w) => few_rows_of(c, x, w, sizes, how),
        Storage::Device(_) => w.as_f32().map(|_| ())?,
    }
    Ok(())
}

/// `c [m, n] = x [m, k] w [n, k]^T` for small m.
fn few_rows_of<E: Element>(c: &mut [f32], x: &[f32], w: &[E], (m, n, k): (usize, usize, usize), how: Gemm) {
    let c = Disjoint::new(c);
    let per_task = (1usize << 16).div_ceil(k.max(1)).max(n.div_ceil(8 * rayon::current_num_threads()));
    for_tasks(n.div_ceil(per_task), |task| {
        let columns = task * per_task..n.min((task + 1) * per_task);
        vectorized(|| {
            for column in columns {
                let weights = &w[column * k..(column + 1) * k];
                let mut sums = [0.0f32; FEW_ROWS];
                match m {
                    1 => dots::<1, E>(&mut sums, weights, x),
                    2 => dots::<2, E>(&mut sums, weights, x),
                    3..=4 => dots::<4, E>(&mut sums, weights, x),
                    _ => dots::<8, E>(&mut sums, weights, x),
                }
                for (row, sum) in sums[..m].iter().enumerate() {
                    // SAFETY: tasks take distinct columns, so no two of them write the same element.
                    let out = unsafe { &mut c.slice(row * n + column, 1)[0] };
                    *out = how.scale * sum + if how.accumulate { *out } else { 0.0 };
                }
            }
        });
    });
}

/// Dot products of one weight row with up to M rows of `x`; rows past the last of `x` repeat it.
#[inline(always)]
fn dots<const M: usize, E: Element>(sums: &mut [f32; FEW_ROWS], weights: &[E], x: &[f32]) {
    const LANES: usize = 16;
    let k = weights.len();
    let last = x.len() / k - 1;
    let x_rows: [&[f32]; M] = std::array::from_fn(|row| &x[row.min(last) * k..(row.min(last) + 1) * k]);
    let mut lanes = [[0.0f32; LANES]; M];
    let whole = k / LANES * LANES;
    for start in (0..whole).step_by(LANES) {
        let w: &[E] = &weights[start..start + LANES];
        for (lanes, x) in lanes.iter_mut().zip(&x_rows) {
            let x = &x[start..start + LANES];
            for lane in 0..LANES {
                lanes[lane] += w[lane].wide() * x[lane];
            }
        }
    }
    for (sum, (lanes, x)) in sums.iter_mut().zip(lanes.iter().zip(&x_rows)) {
        *sum = lanes.iter().sum::<f32>();
        for i in whole..k {
            *sum += weights[i].wide() * x[i];
        }
    }
}
