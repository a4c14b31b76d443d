//! Frozen weights of 8, 6 or 4 bits, and their products with activations that are rounded to 16 bits a block as they come (8 bits
//! cost a model of 135 M parameters half a percent of perplexity).
//!
//! Of a block of 32 terms the sum is one of integers, `sum q_w q_x`; scales are applied to it in float32. Weights lie so that
//! one vector of 64 bytes holds four terms for each of 16 outputs, as VNNI's dot products take them. Where the CPU multiplies
//! bfloat16, products of many rows go that way instead, and weights are unpacked to it as they are needed.

mod form;
mod kernels;
mod pack;
mod rounded;
#[cfg(target_arch = "x86_64")]
mod unpack;

use std::any::Any;
use std::cell::Cell;
use std::marker::PhantomData;

use bytemuck::{Pod, Zeroable};
use half::f16;
use liger_tensor::quantize::BLOCK;
use liger_tensor::{DType, DeviceMemory};

use self::form::{Form, by_form};
pub(crate) use self::kernels::Outputs;
use self::rounded::Rounded;
use crate::element::Element;
use crate::pages::Pages;
use crate::parallel::{for_tasks, pieces};

/// Outputs (rows of the matrix) that lie together.
const LANES: usize = 16;
/// Terms of a block that one vector holds.
const STEP: usize = 4;

/// One vector of weights: `[16 outputs, 4 terms]`, of 4 bits two such vectors in one.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Float16 numbers of 16 outputs.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(32))]
struct Sixteen([u16; LANES]);

/// Two bytes of one block, of 16 outputs each: scales and minima (`Q4_K`), or signed scales of the first and the last 16 terms (`Q6_K`).
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(32))]
struct Fine([u8; 2 * LANES]);

/// A matrix `[rows, columns]`: `weight = scale (quant - zero) + offset`, where there are offsets.
pub(crate) struct Quantized {
    rows: usize,
    columns: usize,
    dtype: DType,
    /// `[rows / 16, columns / 32, lines]`, see [`Form`]; rows are filled up with zeros. Of 4 bits the first 16 terms of a block are the
    /// low halves of its lines, the last 16 the high ones; of 6 so are their lowest four bits, and the other two lie in two more lines.
    quants: Pages<Line>,
    /// `[rows / 16, columns / 32]`, where scales are fine `[rows / 16, columns / 256]`.
    scales: Pages<Sixteen>,
    /// As scales. Weights of 4 bits whose minimum is always -8 scales (ggml's `Q4_0`) have none.
    offsets: Pages<Sixteen>,
    /// `[rows / 16, columns / 32]`: what scales and offsets are multiplied with, where they are fine.
    fine: Pages<Fine>,
}

impl DeviceMemory for Quantized {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }

    fn bytes(&self) -> usize {
        size_of_val(&*self.quants) + size_of_val(&*self.scales) + size_of_val(&*self.offsets) + size_of_val(&*self.fine)
    }
}

impl Quantized {
    /// Number of rows and columns.
    pub(crate) fn shape(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    /// Row `row` as float32.
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        by_form!(self, F => self.row_of::<F>(row, out));
    }

    fn row_of<F: Form>(&self, row: usize, out: &mut [f32]) {
        let (group, lane, of_row) = (row / LANES, row % LANES, self.columns / BLOCK);
        for (b, out) in out.chunks_exact_mut(BLOCK).enumerate() {
            let block = Block::<F>::at(self, group * of_row + b);
            for part in 0..F::PARTS {
                let (scale, offset) = (block.scale(part, lane), block.offset(lane));
                let terms = F::STEPS * STEP;
                for (i, out) in out[part * terms..(part + 1) * terms].iter_mut().enumerate() {
                    let quant = block.quant(part * F::STEPS + i / STEP, lane * STEP + i % STEP);
                    *out = scale * (quant - F::ZERO) as f32 + offset;
                }
            }
        }
    }
}

/// A block of 32 terms of 16 outputs, number by number.
struct Block<'a, F> {
    lines: &'a [Line],
    scales: &'a Sixteen,
    offsets: Option<&'a Sixteen>,
    fine: Option<&'a Fine>,
    form: PhantomData<F>,
}

impl<'a, F: Form> Block<'a, F> {
    fn at(w: &'a Quantized, at: usize) -> Self {
        let number = F::number(at);
        Self {
            lines: &w.quants[at * F::BITS..(at + 1) * F::BITS],
            scales: &w.scales[number],
            offsets: w.offsets.get(number),
            fine: w.fine.get(at),
            form: PhantomData,
        }
    }

    /// Byte `at` of the vector of a step.
    fn quant(&self, step: usize, at: usize) -> i32 {
        let byte = |line: usize| i32::from(self.lines[line].0[at]);
        match F::BITS {
            8 => byte(step),
            4 => byte(step % 4) >> (step / 4 * 4) & 15,
            _ => byte(step % 4) >> (step / 4 * 4) & 15 | (byte(4 + step / 4) >> (step % 4 * 2) & 3) << 4,
        }
    }

    fn scale(&self, part: usize, lane: usize) -> f32 {
        let fine = |fine: &Fine| match F::PARTS {
            1 => f32::from(fine.0[lane]),
            _ => f32::from(fine.0[part * LANES + lane] as i8),
        };
        f16::from_bits(self.scales.0[lane]).to_f32() * self.fine.map_or(1.0, fine)
    }

    fn offset(&self, lane: usize) -> f32 {
        let fine = self.fine.map_or(1.0, |fine| f32::from(fine.0[LANES + lane]));
        self.offsets.map_or(0.0, |offsets| f16::from_bits(offsets.0[lane]).to_f32() * fine)
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
    use std::ops::Range;

    use half::bf16;
    use liger_tensor::quantize::{SUPER_BLOCK, quantize};
    use liger_tensor::{Buffer, Gemm, Ops, Storage, Tensor};

    use super::*;
    use crate::Cpu;
    use crate::gemm::gemm;
    use crate::parallel::Disjoint;

    pub(super) fn numbers(count: usize, seed: u64) -> Vec<f32> {
        let next = |state: &mut u64| {
            *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (*state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let mut state = seed;
        (0..count).map(|_| next(&mut state) + 0.5 * next(&mut state)).collect()
    }

    /// Blocks of `count` elements of a form: Q8_0, Q4_1, Q4_0 as Q4_1, Q4_K and Q6_K.
    pub(super) fn blocks(form: usize, count: usize, seed: u64) -> (DType, Vec<u8>) {
        let mut values = numbers(count, seed);
        let dtype = [DType::Q8_0, DType::Q4_1, DType::Q4_1, DType::Q4K, DType::Q6K][form];
        if form < 3 {
            let mut blocks = quantize(&values, dtype);
            for block in blocks.chunks_exact_mut(DType::Q4_1.bytes(BLOCK)).filter(|_| form == 2) {
                let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
                block[2..4].copy_from_slice(&f16::from_f32(-8.0 * scale).to_le_bytes());
            }
            return (dtype, blocks);
        }
        // Any bytes are blocks, if their float16 numbers are of a size like the others'.
        values.resize(dtype.bytes(count), 0.3);
        let mut blocks: Vec<u8> = values.iter().map(|x| (x * 5000.0) as i32 as u8).collect();
        for block in blocks.chunks_exact_mut(dtype.bytes(dtype.block())) {
            let (places, size): (&[usize], f32) = if dtype == DType::Q4K { (&[0, 2], 1e-3) } else { (&[208], 2e-4) };
            let scale = f16::from_f32(size * (1.0 + f32::from(block[5]) / 256.0)).to_le_bytes();
            places.iter().for_each(|&at| block[at..at + 2].copy_from_slice(&scale));
        }
        (dtype, blocks)
    }

    pub(super) fn packed(blocks: &[u8], (n, k): (usize, usize), dtype: DType) -> Quantized {
        let row = dtype.bytes(k);
        Quantized::pack(&|rows| Ok(blocks[rows.start * row..rows.end * row].to_vec()), (n, k), dtype).unwrap()
    }

    #[test]
    fn a_file_that_cannot_be_read_is_an_error() {
        let read = |rows: Range<usize>| match rows.start {
            0 => Ok(vec![0; rows.len() * DType::Q8_0.bytes(8192)]),
            _ => Err(std::io::ErrorKind::UnexpectedEof.into()),
        };
        let found = Cpu::new().upload_blocks(&read, &[1000, 8192], DType::Q8_0);
        assert!(matches!(found, Err(liger_tensor::Error::Read(_))));
        // Rows of 8,224 are blocks of 32, but not of 256.
        let found = Cpu::new().upload_blocks(&read, &[16, 8224], DType::Q6K);
        assert!(matches!(found, Err(liger_tensor::Error::Shape { .. })));
    }

    #[test]
    fn every_kernel_gives_the_products_of_what_was_packed() {
        let found = kernels::available();
        crate::tell_untested(kernels::ALL, &found);
        for (m, n, k) in
            [(1, 1, 32usize), (1, 100, 64), (2, 64, 576), (5, 33, 96), (13, 16, 32), (30, 70, 160), (200, 40, 64)]
        {
            for form in 0..5 {
                // Whole blocks of 256.
                let k = if form < 3 { k } else { k.next_multiple_of(SUPER_BLOCK) };
                let (x, w, old) = (numbers(m * k, 1), numbers(n * k, 2), numbers(m * n, 3));
                let (dtype, blocks) = blocks(form, n * k, 2);
                let packed = packed(&blocks, (n, k), dtype);
                assert_eq!(packed.offsets.is_empty(), ![1, 3].contains(&form));
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
                let row = dtype.bytes(k);
                let read = |rows: Range<usize>| Ok(blocks[rows.start * row..rows.end * row].to_vec());
                let weights = Cpu::new().upload_blocks(&read, &[n, k], dtype).unwrap();
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
