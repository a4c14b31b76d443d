//! Matrix products: which of this crate's a product goes to. What has none of its own is done by `gemm-f32`, the `gemm` crate's part
//! for float32.

use half::bf16;
use liger_tensor::{Buffer, DType, Error, Gemm, Result, Storage, Tensor};

#[cfg(target_arch = "x86_64")]
use crate::bfloat;
use crate::dots;
use crate::element::Element;
use crate::narrow;
use crate::parallel::{Disjoint, for_rows, threads, vectorized};
use crate::quantized::{self, Quantized};

/// A matrix read through strides.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a, T = f32> {
    pub(crate) data: &'a [T],
    pub(crate) row_stride: usize,
    pub(crate) column_stride: usize,
}

/// `[rows, stride]`, row by row.
pub(crate) fn rows<T>(data: &[T], stride: usize) -> Matrix<'_, T> {
    Matrix { data, row_stride: stride, column_stride: 1 }
}

impl<T> Matrix<'_, T> {
    /// The transpose, without moving anything.
    pub(crate) fn t(self) -> Self {
        Self { row_stride: self.column_stride, column_stride: self.row_stride, ..self }
    }

    pub(crate) fn covers(&self, rows: usize, columns: usize) -> bool {
        rows == 0 || columns == 0 || (rows - 1) * self.row_stride + (columns - 1) * self.column_stride < self.data.len()
    }
}

/// How one thread multiplies what is small enough to stay in its caches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Alone {
    /// In float32.
    #[default]
    Full,
    /// Operands rounded to bfloat16, sums in float32.
    #[cfg(target_arch = "x86_64")]
    Rounded(bfloat::Kernel),
}

impl Alone {
    /// Rounded, if this CPU multiplies bfloat16.
    pub(crate) fn rounded() -> Self {
        #[cfg(target_arch = "x86_64")]
        if let Some(kernel) = bfloat::best() {
            return Self::Rounded(kernel);
        }
        Self::Full
    }

    /// `c = scale a b (+ c)`; c `[m, n]` with rows `c_stride` apart, a `[m, k]`, b `[k, n]`.
    pub(crate) fn matmul(
        self,
        (c, c_stride): (&mut [f32], usize),
        sizes: (usize, usize, usize),
        (a, b): (Matrix<'_>, Matrix<'_>),
        scale: f32,
        accumulate: bool,
    ) {
        match self {
            Self::Full => matmul(c, c_stride, sizes, a, b, scale, accumulate, gemm_common::Parallelism::None),
            #[cfg(target_arch = "x86_64")]
            Self::Rounded(kernel) => bfloat::product_alone(kernel, (c, c_stride), sizes, (a, b), scale, accumulate),
        }
    }
}

/// `c = scale a b (+ c)`; c `[m, n]` with rows `c_stride` apart, a `[m, k]`, b `[k, n]`.
#[allow(clippy::too_many_arguments)]
fn matmul(
    c: &mut [f32],
    c_stride: usize,
    (m, n, k): (usize, usize, usize),
    a: Matrix<'_>,
    b: Matrix<'_>,
    scale: f32,
    accumulate: bool,
    parallelism: gemm_common::Parallelism,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(rows(c, c_stride).covers(m, n) && a.covers(m, k) && b.covers(k, n), "matrix product {m} x {k} x {n}");
    // SAFETY: the assertion puts every element that the strides reach inside its slice, and `c` is borrowed alone.
    unsafe {
        gemm_f32::gemm::f32::get_gemm_fn()(
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
fn share(work: usize) -> gemm_common::Parallelism {
    if work < 1 << 18 { gemm_common::Parallelism::None } else { gemm_common::Parallelism::Rayon(threads()) }
}

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
    #[cfg(target_arch = "x86_64")]
    if let (Storage::Bf16(weights), false, Some(kernel)) = (b.storage(), how.transpose_a, bfloat::best()) {
        let product = Bfloat16Product { kernel, b: weights, panels: b.beside(), sizes: (m, n, k), how };
        let is_done = match (a.storage(), c.dtype()) {
            (Storage::Bf16(a), DType::Bf16) => product.run(c.as_bf16_mut()?, a),
            (Storage::Bf16(a), _) => product.run(c.as_f32_mut()?, a),
            (_, DType::Bf16) => product.run(c.as_bf16_mut()?, a.as_f32()?),
            _ => product.run(c.as_f32_mut()?, a.as_f32()?),
        };
        if is_done {
            return Ok(());
        }
    }
    if let (Storage::Device(_), true, false) = (b.storage(), how.transpose_b, how.transpose_a) {
        return with_blocks(c, a, b, (m, n, k), how);
    }
    if a.dtype() == DType::Bf16 || c.dtype() == DType::Bf16 {
        return by_widening(c, a, b, how);
    }
    let a_data = a.as_f32()?;
    if let Storage::F32(b) = b.storage()
        && with_few(c.as_f32_mut()?, a_data, b, (m, n, k), how)
    {
        return Ok(());
    }
    if how.transpose_b && !how.transpose_a {
        let c = c.as_f32_mut()?;
        match (b.storage(), m >= TALL) {
            (Storage::F32(b), false) => dots::product(c, a_data, b, (m, n, k), how.scale, how.accumulate),
            (Storage::Bf16(b), false) => dots::product(c, a_data, b, (m, n, k), how.scale, how.accumulate),
            (Storage::F32(b), true) => tall(c, a_data, b, (m, n, k), how),
            (Storage::Bf16(b), true) => tall(c, a_data, b, (m, n, k), how),
            // `with_blocks` did these.
            (Storage::Device(_), _) => return Err(Error::NO_BLOCKS),
        }
        return Ok(());
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
        Storage::Bf16(b_data) if !how.transpose_b => {
            let row = |i: usize, wide: &mut [f32]| {
                vectorized!(|| wide.iter_mut().zip(&b_data[i * n..(i + 1) * n]).for_each(|(w, x)| *w = x.to_f32()),);
            };
            widened(c.as_f32_mut()?, a_matrix, row, (m, n, k), how);
        }
        Storage::Device(_) if !how.transpose_b => {
            let weights = quantized_of(b)?;
            widened(c.as_f32_mut()?, a_matrix, |i, wide| weights.row(i, wide), (m, n, k), how);
        }
        Storage::Bf16(_) | Storage::Device(_) => {
            let (found, expected) = ("narrow weights", "float32 where both operands are transposed");
            return Err(Error::Storage { operation: "gemm", found, expected });
        }
    }
    Ok(())
}

/// A product with bfloat16 weights on a CPU that multiplies bfloat16.
#[cfg(target_arch = "x86_64")]
struct Bfloat16Product<'a> {
    kernel: bfloat::Kernel,
    b: &'a [bf16],
    panels: Option<&'a bfloat::Panels>,
    sizes: (usize, usize, usize),
    how: Gemm,
}

#[cfg(target_arch = "x86_64")]
impl Bfloat16Product<'_> {
    /// Whether there is such a product for these sizes, and it was done.
    fn run<C: bfloat::Output, A: bfloat::Source>(&self, c: &mut [C], a: &[A]) -> bool {
        let Self { kernel, b, panels, sizes: (m, n, k), how } = *self;
        if how.transpose_b && bfloat::few::takes((m, n, k)) {
            bfloat::few::product(kernel, c, a, b, (m, n, k), how.scale, how.accumulate);
        } else if m >= PACKED {
            let b = if how.transpose_b { rows(b, k) } else { rows(b, n).t() };
            let b = match panels {
                Some(panels) => bfloat::Weights::Packed(panels.of(kernel, b, (n, k), how.transpose_b)),
                None => bfloat::Weights::AsTheyLie(b),
            };
            bfloat::product(kernel, c, a, b, (m, n, k), how.scale, how.accumulate);
        } else {
            return false;
        }
        true
    }
}

/// The product with quantised weights. Many rows are multiplied in bfloat16, where the CPU does that.
fn with_blocks(c: &mut Tensor, a: &Tensor, b: &Tensor, (m, n, k): (usize, usize, usize), how: Gemm) -> Result<()> {
    let (w, Gemm { scale, accumulate, .. }) = (quantized_of(b)?, how);
    #[cfg(target_arch = "x86_64")]
    if let (true, Some(kernel)) = (m >= quantized::UNPACKED, bfloat::best()) {
        if a.dtype() == DType::Bf16 || c.dtype() == DType::Bf16 {
            return by_widening(c, a, b, how);
        }
        let w = bfloat::Weights::AsTheyLie(w);
        bfloat::product(kernel, c.as_f32_mut()?, a.as_f32()?, w, (m, n, k), scale, accumulate);
        return Ok(());
    }
    let outputs = match c.dtype() {
        DType::Bf16 => quantized::Outputs::Bf16(Disjoint::new(c.as_bf16_mut()?)),
        _ => quantized::Outputs::F32(Disjoint::new(c.as_f32_mut()?)),
    };
    match a.storage() {
        Storage::Bf16(a) => quantized::product(outputs, a, w, (m, n, k), scale, accumulate),
        _ => quantized::product(outputs, a.as_f32()?, w, (m, n, k), scale, accumulate),
    }
    Ok(())
}

/// Operands in bfloat16 where no product takes such: by way of float32.
fn by_widening(c: &mut Tensor, a: &Tensor, b: &Tensor, how: Gemm) -> Result<()> {
    let wide = |t: &Tensor| -> Result<Tensor> {
        let mut wide = Vec::new();
        match t.storage() {
            Storage::Bf16(data) => _ = bf16::widened(data, &mut wide),
            _ => wide.extend_from_slice(t.as_f32()?),
        }
        Ok(Tensor::host(t.shape(), Storage::F32(Buffer::Owned(wide))))
    };
    let mut sums = if how.accumulate {
        wide(c)?
    } else {
        Tensor::host(c.shape(), Storage::F32(Buffer::Owned(vec![0.0; c.len()])))
    };
    gemm(&mut sums, &wide(a)?, b, how)?;
    match c.storage() {
        Storage::Bf16(_) => {
            let sums = sums.as_f32()?;
            c.as_bf16_mut()?.iter_mut().zip(sums).for_each(|(c, sum)| *c = bf16::narrow(*sum));
        }
        _ => *c = sums,
    }
    Ok(())
}

/// The product, if one of its sides is short and the matrix that is read or written a tall one.
fn with_few(c: &mut [f32], a: &[f32], b: &[f32], (m, n, k): (usize, usize, usize), how: Gemm) -> bool {
    let Gemm { transpose_a, transpose_b, scale, accumulate } = how;
    match (transpose_a, transpose_b) {
        (false, _) if k <= narrow::FEW && m >= narrow::TALL => {
            let across = if transpose_b { &narrow::transposed(b, (n, k)) } else { b };
            narrow::few_terms(c, a, across, (m, n, k), scale, accumulate);
        }
        (false, _) if n <= narrow::FEW && m >= narrow::TALL => {
            let along = if transpose_b { b } else { &narrow::transposed(b, (k, n)) };
            narrow::few_outputs(c, a, along, (m, n, k), scale, accumulate);
        }
        (true, false) if m <= narrow::FEW && k >= narrow::TALL => {
            narrow::few_rows(c, a, b, (m, n, k), scale, accumulate);
        }
        (true, false) if n <= narrow::FEW && k >= narrow::TALL => {
            let mut across = vec![0.0; n * m];
            narrow::few_rows(&mut across, b, a, (n, m, k), scale, false);
            for (i, c) in c.iter_mut().enumerate() {
                *c = across[i % n * m + i / n] + if accumulate { *c } else { 0.0 };
            }
        }
        _ => return false,
    }
    true
}

/// The weights of a tensor that is not in plain host memory.
pub(crate) fn quantized_of(tensor: &Tensor) -> Result<&Quantized> {
    let Storage::Device(memory) = tensor.storage() else { return Err(Error::NO_BLOCKS) };
    let foreign = || Error::Storage { operation: "gemm", found: "another device", expected: "the CPU" };
    memory.as_any().downcast_ref().ok_or_else(foreign)
}

/// Rows from which packing bfloat16 weights for the CPU's own bfloat16 products pays.
#[cfg(target_arch = "x86_64")]
const PACKED: usize = 8;

/// Rows of `x` from which transposing the weights first pays: the crate is much faster on rows that lie along n.
const TALL: usize = 96;

/// `c [m, n] = scale x [m, k] w [n, k]^T (+ c)`, the weights transposed a panel of rows at a time.
fn tall<W: Element>(c: &mut [f32], x: &[f32], w: &[W], (m, n, k): (usize, usize, usize), how: Gemm) {
    const PANEL: usize = 512;
    const STRIP: usize = 16;
    let mut panel = vec![0.0f32; PANEL.min(n) * k];
    for first in (0..n).step_by(PANEL) {
        let count = PANEL.min(n - first);
        let transposed = crate::parallel::Disjoint::new(&mut panel[..count * k]);
        crate::parallel::for_tasks(count.div_ceil(STRIP), |strip| {
            let strip = strip * STRIP..count.min((strip + 1) * STRIP);
            let mut scratch = Vec::new();
            let source = W::widened(&w[(first + strip.start) * k..(first + strip.end) * k], &mut scratch);
            for i in 0..k {
                // SAFETY: strips are distinct columns of the panel.
                let out = unsafe { transposed.slice(i * count + strip.start, strip.len()) };
                for (column, out) in out.iter_mut().enumerate() {
                    *out = source[column * k + i];
                }
            }
        });
        let (x, panel) = (rows(x, k), rows(&panel[..count * k], count));
        matmul(&mut c[first..], n, (m, count, k), x, panel, how.scale, how.accumulate, share(m * count * k));
    }
}

/// Narrow weights not transposed: widened a panel of rows at a time, so that no full float32 copy ever exists.
fn widened(
    c: &mut [f32],
    a: Matrix<'_>,
    row: impl Fn(usize, &mut [f32]) + Sync,
    (m, n, k): (usize, usize, usize),
    how: Gemm,
) {
    const PANEL: usize = 1024;
    let mut panel = vec![0.0f32; PANEL.min(k) * n];
    for first in (0..k).step_by(PANEL) {
        let count = PANEL.min(k - first);
        let panel = &mut panel[..count * n];
        for_rows(panel, n, |start, rows| {
            rows.chunks_exact_mut(n).enumerate().for_each(|(i, wide)| row(first + start + i, wide));
        });
        let a = Matrix { data: &a.data[first * a.column_stride..], ..a };
        let accumulate = how.accumulate || first > 0;
        matmul(c, n, (m, n, count), a, rows(panel, n), how.scale, accumulate, share(m * n * count));
    }
}
