//! Frozen weights of 8 or 4 bits, and their products with activations that are rounded to 16 bits a block as they come (8 bits
//! cost a model of 135 M parameters half a percent of perplexity).
//!
//! Of a block of 32 terms the sum is one of integers, `sum q_w q_x`; scales are applied to it in float32. Weights lie so that
//! one vector of 64 bytes holds four terms for each of 16 outputs, as VNNI's dot products take them. Where the CPU multiplies
//! bfloat16, products of many rows go that way instead, and weights are unpacked to it as they are needed.

mod kernels;
mod rounded;
#[cfg(target_arch = "x86_64")]
mod unpack;

use std::any::Any;
use std::cell::Cell;

use half::f16;
use liger_tensor::quantize::BLOCK;
use liger_tensor::{DType, DeviceMemory};

pub(crate) use self::kernels::Outputs;
use self::rounded::Rounded;
use crate::element::Element;
use crate::parallel::{Disjoint, for_tasks, pieces};

/// Outputs (rows of the matrix) that lie together.
const LANES: usize = 16;
/// Terms of a block that one vector holds.
const STEP: usize = 4;

/// One vector of weights: `[16 outputs, 4 terms]`, of 4 bits two such vectors in one.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line([u8; 64]);

/// Float16 numbers of one block, of 16 outputs.
#[derive(Clone, Copy)]
#[repr(align(32))]
struct Sixteen([u16; LANES]);

/// A matrix `[rows, columns]`: `weight = scale (quant - zero) + offset`, where there are offsets.
pub(crate) struct Quantized {
    rows: usize,
    columns: usize,
    dtype: DType,
    /// `[rows / 16, columns / 32, 8 steps (4 of 4 bits)]`; rows are filled up with zeros.
    quants: Vec<Line>,
    /// `[rows / 16, columns / 32]`.
    scales: Vec<Sixteen>,
    /// As scales. Weights of 4 bits whose minimum is always -8 scales (ggml's `Q4_0`) have none.
    offsets: Vec<Sixteen>,
}

impl DeviceMemory for Quantized {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }

    fn bytes(&self) -> usize {
        size_of_val(&*self.quants) + size_of_val(&*self.scales) + size_of_val(&*self.offsets)
    }
}

impl Quantized {
    /// Out of ggml's blocks, row by row; `columns` is a multiple of 32.
    pub(crate) fn pack(blocks: &[u8], (rows, columns): (usize, usize), dtype: DType) -> Self {
        let (of_row, size) = (columns / BLOCK, dtype.bytes(BLOCK));
        assert_eq!(blocks.len(), rows * of_row * size, "blocks of {rows} x {columns}");
        let lines = if dtype == DType::Q8_0 { BLOCK / STEP } else { BLOCK / STEP / 2 };
        let groups = rows.div_ceil(LANES);
        let mut quants = vec![Line([0; 64]); groups * of_row * lines];
        let mut scales = vec![Sixteen([0; LANES]); groups * of_row];
        let mut offsets = vec![Sixteen([0; LANES]); if dtype == DType::Q8_0 { 0 } else { groups * of_row }];
        let half_at = |block: &[u8], at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
        let fill = |group: usize, quants: &mut [Line], scales: &mut [Sixteen], offsets: &mut [Sixteen]| {
            for lane in 0..LANES.min(rows - group * LANES) {
                let row = &blocks[(group * LANES + lane) * of_row * size..][..of_row * size];
                for (b, block) in row.chunks_exact(size).enumerate() {
                    scales[b].0[lane] = half_at(block, 0);
                    let packed = if dtype == DType::Q8_0 { &block[2..] } else { &block[4..] };
                    if let Some(offset) = offsets.get_mut(b) {
                        offset.0[lane] = half_at(block, 2);
                    }
                    for (line, terms) in quants[b * lines..(b + 1) * lines].iter_mut().zip(packed.chunks_exact(STEP)) {
                        for (to, from) in line.0[lane * STEP..(lane + 1) * STEP].iter_mut().zip(terms) {
                            // Signed bytes become unsigned ones with their zero at 128.
                            *to = if dtype == DType::Q8_0 { from ^ 0x80 } else { *from };
                        }
                    }
                }
            }
        };
        let all = (Disjoint::new(&mut quants), Disjoint::new(&mut scales), Disjoint::new(&mut offsets));
        for_tasks(groups, |group| {
            let of_offsets = if dtype == DType::Q8_0 { (0, 0) } else { (group * of_row, of_row) };
            // SAFETY: groups have distinct lines and numbers.
            let (quants, scales, offsets) = unsafe {
                (
                    all.0.slice(group * of_row * lines, of_row * lines),
                    all.1.slice(group * of_row, of_row),
                    all.2.slice(of_offsets.0, of_offsets.1),
                )
            };
            fill(group, quants, scales, offsets);
        });
        let minimum = |scale: u16| f16::from_f32(-8.0 * f16::from_bits(scale).to_f32()).to_bits() & 0x7fff;
        let symmetric = |(scale, offset): (&Sixteen, &Sixteen)| {
            scale.0.iter().zip(offset.0).all(|(s, o)| minimum(*s) == o & 0x7fff && (o == 0 || (s ^ o) >> 15 == 1))
        };
        if scales.iter().zip(&offsets).all(symmetric) {
            offsets = Vec::new();
        }
        Self { rows, columns, dtype, quants, scales, offsets }
    }

    /// Number of rows and columns.
    pub(crate) fn shape(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    fn lines(&self) -> usize {
        if self.dtype == DType::Q8_0 { BLOCK / STEP } else { BLOCK / STEP / 2 }
    }

    /// What an unsigned quant of 0 stands for, in scales.
    fn zero(&self) -> i32 {
        match (self.dtype, self.offsets.is_empty()) {
            (DType::Q8_0, _) => 128,
            (_, true) => 8,
            (_, false) => 0,
        }
    }

    /// Row `row` as float32.
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        let (group, lane, of_row, lines) = (row / LANES, row % LANES, self.columns / BLOCK, self.lines());
        for (b, out) in out.chunks_exact_mut(BLOCK).enumerate() {
            let at = group * of_row + b;
            let number = |all: &[Sixteen]| all.get(at).map_or(0.0, |n| f16::from_bits(n.0[lane]).to_f32());
            let (scale, offset) = (number(&self.scales), number(&self.offsets));
            for (i, out) in out.iter_mut().enumerate() {
                let byte = self.quants[at * lines + i / STEP % lines].0[lane * STEP + i % STEP];
                let quant = match (self.dtype, i < BLOCK / 2) {
                    (DType::Q8_0, _) => byte,
                    (_, true) => byte & 15,
                    (_, false) => byte >> 4,
                };
                *out = scale * (i32::from(quant) - self.zero()) as f32 + offset;
            }
        }
    }
}

/// Number of rows from which weights are unpacked to bfloat16, where the CPU multiplies that. It is faster from some 24 on, but a step of
/// many texts must give each what it gives that text alone, and those are few.
#[cfg(target_arch = "x86_64")]
pub(crate) const UNPACKED: usize = 96;

/// Rows of `x` that are gone through with one group of outputs before the next: what the nearest caches hold.
const ROW_BLOCK: usize = 192;

/// `c [m, n] = scale x [m, k] w [n, k]^T (+ c)` by integers: for fewer rows than `UNPACKED`, or any where the CPU does not multiply bfloat16.
pub(crate) fn product<A: Element>(
    c: Outputs<'_>,
    x: &[A],
    w: &Quantized,
    (m, n, k): (usize, usize, usize),
    scale: f32,
    accumulate: bool,
) {
    assert!(
        (n, k) == w.shape() && c.len() == m * n && x.len() == m * k,
        "quantised product {m} x {k} x {n} with {:?}",
        w.shape()
    );
    let kernel = kernels::best();
    let mut rounded = ROUNDED.take();
    let x = rounded.fill(x, kernel.takes_bytes());
    let groups = n.div_ceil(LANES);
    let piece = groups.div_ceil(pieces(m * n * k));
    for_tasks(groups.div_ceil(piece), |i| {
        let groups = i * piece..groups.min((i + 1) * piece);
        for first in (0..m).step_by(ROW_BLOCK) {
            let rows = first..m.min(first + ROW_BLOCK);
            kernels::piece(kernel, &kernels::Piece { c: &c, x, w, rows, groups: groups.clone(), scale, accumulate });
        }
    });
    ROUNDED.set(rounded);
}

thread_local! {
    /// Activations of a product that this thread asked for.
    static ROUNDED: Cell<Rounded> = Cell::default();
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use liger_tensor::quantize::quantize;
    use liger_tensor::{Buffer, Gemm, Ops, Storage, Tensor};

    use super::*;
    use crate::Cpu;
    use crate::gemm::gemm;

    pub(super) fn numbers(count: usize, seed: u64) -> Vec<f32> {
        let next = |state: &mut u64| {
            *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (*state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let mut state = seed;
        (0..count).map(|_| next(&mut state) + 0.5 * next(&mut state)).collect()
    }

    /// ggml's Q4_0 in the form of Q4_1: the minimum is -8 scales.
    pub(super) fn symmetric(blocks: &mut [u8]) {
        for block in blocks.chunks_exact_mut(DType::Q4_1.bytes(BLOCK)) {
            let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
            block[2..4].copy_from_slice(&f16::from_f32(-8.0 * scale).to_le_bytes());
        }
    }

    #[test]
    fn every_kernel_gives_the_products_of_what_was_packed() {
        let found = kernels::available();
        crate::tell_untested(kernels::ALL, &found);
        for (m, n, k) in
            [(1, 1, 32), (1, 100, 64), (2, 64, 576), (5, 33, 96), (13, 16, 32), (30, 70, 160), (200, 40, 64)]
        {
            for form in 0..3 {
                let dtype = if form == 0 { DType::Q8_0 } else { DType::Q4_1 };
                let (x, w, old) = (numbers(m * k, 1), numbers(n * k, 2), numbers(m * n, 3));
                let mut blocks = quantize(&w, dtype);
                if form == 2 {
                    symmetric(&mut blocks);
                }
                let packed = Quantized::pack(&blocks, (n, k), dtype);
                assert_eq!(packed.offsets.is_empty(), form != 1);
                let mut rows = vec![0.0f32; n * k];
                rows.chunks_exact_mut(k).enumerate().for_each(|(i, row)| packed.row(i, row));
                if form < 2 {
                    let bound = if form == 0 { 0.01 } else { 0.12 };
                    let worst = rows.iter().zip(&w).fold(0.0f32, |worst, (a, b)| worst.max((a - b).abs()));
                    assert!(worst < bound, "form {form}: {worst} off what was packed");
                }
                // Sixteen bits are as good as exact here.
                let expected = |i: usize, j: usize| -> f64 {
                    let terms = x[i * k..(i + 1) * k].iter().zip(&rows[j * k..(j + 1) * k]);
                    terms.map(|(x, w)| f64::from(*x) * f64::from(*w)).sum()
                };
                // Those that take bytes give the same bits: a text's tokens do not depend on how many texts there are.
                let mut of_bytes: Option<Vec<u32>> = None;
                for &kernel in &found {
                    let mut rounded = Rounded::default();
                    let mut c = old.clone();
                    let (groups, scale, accumulate) = (0..n.div_ceil(LANES), 0.5, true);
                    let (x, outputs) = (rounded.fill(&x, kernel.takes_bytes()), Outputs::F32(Disjoint::new(&mut c)));
                    kernels::piece(
                        kernel,
                        &kernels::Piece { c: &outputs, x, w: &packed, rows: 0..m, groups, scale, accumulate },
                    );
                    for (at, c) in c.iter().enumerate() {
                        let expected = f64::from(old[at]) + 0.5 * expected(at / n, at % n);
                        let off = (f64::from(*c) - expected).abs();
                        assert!(
                            off < 1e-4 * (k as f64).sqrt(),
                            "{kernel:?}, {m} {n} {k}, form {form}, at {at}: {c}, not {expected}"
                        );
                    }
                    if kernel.takes_bytes() {
                        let bits: Vec<u32> = c.iter().map(|c| c.to_bits()).collect();
                        assert!(of_bytes.is_none_or(|other| other == bits), "{kernel:?}, {m} {n} {k}, form {form}");
                        of_bytes = Some(bits);
                    }
                }
                let weights = Cpu::new().upload_blocks(&blocks, &[n, k], dtype).unwrap();
                let mut c = Tensor::host(&[m, n], Storage::F32(Buffer::Owned(old.clone())));
                let given = Tensor::host(&[m, k], Storage::F32(Buffer::Owned(x.clone())));
                gemm(&mut c, &given, &weights, Gemm::LINEAR).unwrap();
                let sums = c.as_f32().unwrap();
                // Many rows may have been rounded to bfloat16, and the weights with them.
                let bound = if m < 96 { 1e-4 } else { 1e-2 };
                let worst = sums
                    .iter()
                    .enumerate()
                    .fold(0.0f64, |worst, (at, c)| worst.max((f64::from(*c) - expected(at / n, at % n)).abs()));
                assert!(worst < bound * (k as f64).sqrt(), "{m} {n} {k}, form {form}: {worst} off");
                // Operands in bfloat16 give what the same numbers in float32 do, rounded.
                let given: Vec<bf16> = x.iter().copied().map(bf16::from_f32).collect();
                let wide = given.iter().map(|x| x.to_f32()).collect();
                let given = Tensor::host(&[m, k], Storage::Bf16(Buffer::Owned(given)));
                let wide = Tensor::host(&[m, k], Storage::F32(Buffer::Owned(wide)));
                let mut narrow = Tensor::host(&[m, n], Storage::Bf16(Buffer::Owned(vec![bf16::NAN; m * n])));
                gemm(&mut c, &wide, &weights, Gemm::LINEAR).unwrap();
                gemm(&mut narrow, &given, &weights, Gemm::LINEAR).unwrap();
                let rounded: Vec<bf16> = c.as_f32().unwrap().iter().copied().map(bf16::from_f32).collect();
                assert!(*narrow.as_bf16_mut().unwrap() == rounded[..], "{m} {n} {k}, form {form}: in bfloat16");
            }
        }
    }
}
