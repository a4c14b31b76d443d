//! Products with bfloat16 weights on CPUs that multiply bfloat16 themselves: activations are rounded to it, sums are float32.
//!
//! The weights are cut into panels of 32 outputs. A task packs some panels, some terms of the sum at a time, into memory that
//! stays in its cache, and goes through all rows of the activations with them, in the order that suits the kernel: packing
//! costs as much as one or two rows. Memory for all that is kept from call to call: fresh pages cost more than the work.

mod amx;
mod avx512;

use std::cell::Cell;

use bytemuck::{Pod, Zeroable};
use half::bf16;
use liger_tensor::{Gemm, Lines};

use crate::parallel::{Disjoint, for_tasks, threads, vectorized};

/// Tasks that each thread gets at least, where there are so many panels.
const TASKS: usize = 2;
/// Outputs of a panel.
const PANEL: usize = 32;
/// Terms that one step of a kernel takes at most: what is packed is filled up to it with zeros.
const STEP: usize = 32;

/// Instructions for sums of products of bfloat16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kernel {
    /// Matrix units: 16 x 16 x 32 at once.
    Amx,
    /// AVX-512 with BF16: 16 sums of two products.
    Avx512Bf16,
}

impl Kernel {
    /// Terms that are packed at once, and bytes of panels that stay in a core's second cache beside what else has to.
    fn depth_and_cached(self) -> (usize, usize) {
        match self {
            Self::Amx => (2048, 1 << 20),
            Self::Avx512Bf16 => (4096, 512 << 10),
        }
    }
}

/// Those that this CPU has, best first.
pub(crate) fn available() -> Vec<Kernel> {
    let mut list = Vec::new();
    if amx::is_there() {
        list.push(Kernel::Amx);
    }
    if is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512bw") {
        list.push(Kernel::Avx512Bf16);
    }
    list
}

/// The best one, if there is any.
pub(crate) fn best() -> Option<Kernel> {
    static BEST: std::sync::OnceLock<Option<Kernel>> = std::sync::OnceLock::new();
    *BEST.get_or_init(|| available().first().copied())
}

/// What a kernel adds up: `c [m, count] (+)= scale a [m, terms] b [terms, count]`.
#[derive(Clone, Copy)]
struct Work<'a> {
    /// `[m, stride]` bfloat16, from the first term on; `terms` of each row are read, filled up to a multiple of [`STEP`].
    a: &'a [bf16],
    stride: usize,
    rows: usize,
    /// Panels `[terms / 2, PANEL, 2]`, one after the other.
    b: &'a [Pair],
    terms: usize,
    /// Where the outputs of the first row are, and how far apart rows are.
    c: &'a Disjoint<'a>,
    first: usize,
    width: usize,
    count: usize,
    scale: f32,
    accumulate: bool,
}

impl<'a> Work<'a> {
    /// That of each panel.
    fn panels(self) -> impl Iterator<Item = Block<'a>> {
        let panels = self.b.chunks_exact(self.terms / 2 * PANEL).zip((0..self.count).step_by(PANEL));
        panels.map(move |(b, first)| {
            Block(Work { b, first: self.first + first, count: PANEL.min(self.count - first), ..self })
        })
    }
}

/// Work with one panel.
struct Block<'a>(Work<'a>);

impl<'a> std::ops::Deref for Block<'a> {
    type Target = Work<'a>;

    fn deref(&self) -> &Work<'a> {
        &self.0
    }
}

/// Two neighbouring terms of one output.
#[derive(Clone, Copy, Default, Pod, Zeroable)]
#[repr(transparent)]
struct Pair(u32);

impl Block<'_> {
    /// The panel's outputs of a row.
    #[allow(clippy::mut_from_ref)]
    fn outputs(&self, row: usize) -> &mut [f32] {
        // SAFETY: tasks have distinct panels, and a kernel holds one row of its panel at a time.
        unsafe { self.c.slice(row * self.width + self.first, self.count) }
    }

    /// Sums of up to 32 outputs of a row.
    fn store(&self, row: usize, sums: &[f32]) {
        for (out, sum) in self.outputs(row).iter_mut().zip(sums) {
            *out = self.scale * sum + if self.accumulate { *out } else { 0.0 };
        }
    }
}

/// `c [m, n] = scale a [m, k] op(b) (+ c)`; b is `[n, k]` where `how` transposes it, else `[k, n]`.
pub(crate) fn product(kernel: Kernel, c: &mut [f32], a: &[f32], b: &[bf16], sizes: (usize, usize, usize), how: Gemm) {
    let (m, n, k) = sizes;
    assert!(c.len() == m * n && a.len() == m * k && b.len() == n * k, "bfloat16 product {m} x {k} x {n}");
    let stride = k.next_multiple_of(STEP);
    let mut rounded = ROUNDED.take();
    rounded.reserve::<bf16>(m * stride);
    let narrow = &mut rounded.as_mut_slice()[..m * stride];
    round(narrow, a, k, stride);
    let (a, c) = (&*narrow, &Disjoint::new(c));
    let (depth, cached) = kernel.depth_and_cached();
    let depth = depth.min(stride);
    // As many panels together as stay in the cache, if that leaves every thread some tasks.
    let panels = n.div_ceil(PANEL);
    let together = (cached / (2 * depth * PANEL)).min(panels / (TASKS * threads())).max(1);
    for_tasks(panels.div_ceil(together), |task| {
        let panels = task * together..panels.min((task + 1) * together);
        let mut panels_memory = PACKED.take();
        panels_memory.reserve::<Pair>(together * depth / 2 * PANEL);
        let packed = panels_memory.as_mut_slice::<Pair>();
        let first = panels.start * PANEL;
        let count = n.min(panels.end * PANEL) - first;
        for from in (0..k).step_by(depth) {
            let terms = depth.min(k - from);
            let panel_len = terms.next_multiple_of(STEP) / 2 * PANEL;
            for (panel, packed) in panels.clone().zip(packed.chunks_exact_mut(panel_len)) {
                let (first, count) = (panel * PANEL, PANEL.min(n - panel * PANEL));
                if how.transpose_b {
                    pack_rows(packed, &b[first * k..(first + count) * k], k, from, terms);
                } else {
                    pack_columns(packed, &b[from * n..(from + terms) * n], n, first, count);
                }
            }
            let (a, b) = (&a[from..], &packed[..panels.len() * panel_len]);
            let (terms, scale, accumulate) = (terms.next_multiple_of(STEP), how.scale, how.accumulate || from > 0);
            let work = Work { a, stride, rows: m, b, terms, c, first, width: n, count, scale, accumulate };
            match kernel {
                // SAFETY: `available` found the instructions.
                Kernel::Amx => unsafe { amx::multiply(work) },
                // SAFETY: as above.
                Kernel::Avx512Bf16 => unsafe { avx512::multiply(work) },
            }
        }
        PACKED.set(panels_memory);
    });
    ROUNDED.set(rounded);
}

thread_local! {
    /// Activations of a product that this thread asked for.
    static ROUNDED: Cell<Lines> = Cell::default();
    /// Panels of a task.
    static PACKED: Cell<Lines> = Cell::default();
}

/// Rows of `k` as bfloat16 rows of `stride`, the nearest ones; zeros behind.
fn round(narrow: &mut [bf16], a: &[f32], k: usize, stride: usize) {
    let m = narrow.len() / stride.max(1);
    let all = Disjoint::new(narrow);
    const TOGETHER: usize = 16;
    for_tasks(m.div_ceil(TOGETHER), |i| {
        let rows = i * TOGETHER..m.min((i + 1) * TOGETHER);
        // SAFETY: tasks have distinct rows.
        let narrow = unsafe { all.slice(rows.start * stride, rows.len() * stride) };
        vectorized!(|| {
            for (row, narrow) in rows.clone().zip(narrow.chunks_exact_mut(stride)) {
                let (narrow, behind) = narrow.split_at_mut(k);
                behind.fill(bf16::ZERO);
                for (to, from) in narrow.iter_mut().zip(&a[row * k..(row + 1) * k]) {
                    // To the nearest, ties to even; what is not a number stays none, for its top bit is set.
                    let bits = from.to_bits();
                    let up = 0x7fff + (bits >> 16 & 1);
                    let rounded = if from.is_nan() { bits | 0x0040_0000 } else { bits.wrapping_add(up) };
                    *to = bf16::from_bits((rounded >> 16) as u16);
                }
            }
        },);
    });
}

/// Terms `from..from + terms` of weights `[count, k]`.
fn pack_rows(packed: &mut [Pair], b: &[bf16], k: usize, from: usize, terms: usize) {
    const SIDE: usize = 16;
    let (count, pairs) = (b.len() / k, terms / 2 / SIDE * SIDE);
    if count < PANEL || pairs * 2 < terms {
        packed.fill(Pair::default());
    }
    let squares = count / SIDE;
    for square in 0..squares {
        for pair in (0..pairs).step_by(SIDE) {
            let source = &b[square * SIDE * k + from + 2 * pair..][..(SIDE - 1) * k + 2 * SIDE];
            let to = &mut packed[pair * PANEL + square * SIDE..][..(SIDE - 1) * PANEL + SIDE];
            // SAFETY: the slices have 16 rows of 16 pairs; who packs has AVX-512.
            unsafe { avx512::transpose(to.as_mut_ptr(), source.as_ptr(), k) };
        }
    }
    for (output, row) in b.chunks_exact(k).enumerate() {
        let done = if output < squares * SIDE { pairs } else { 0 };
        let column = packed[output..].iter_mut().step_by(PANEL).skip(done);
        for (pair, terms) in column.zip(row[from + 2 * done..from + terms].chunks(2)) {
            let high = terms.get(1).map_or(0, |x| u32::from(x.to_bits()) << 16);
            *pair = Pair(u32::from(terms[0].to_bits()) | high);
        }
    }
}

/// Outputs `first..first + count` of weights `[terms, n]`.
fn pack_columns(packed: &mut [Pair], b: &[bf16], n: usize, first: usize, count: usize) {
    packed.fill(Pair::default());
    vectorized!(|| {
        for (pairs, rows) in packed.chunks_exact_mut(PANEL).zip(b.chunks(2 * n)) {
            let (low, high) = rows.split_at(n);
            let low = &low[first..first + count];
            match high.get(first..first + count) {
                Some(high) => {
                    for ((pair, low), high) in pairs.iter_mut().zip(low).zip(high) {
                        *pair = Pair(u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16);
                    }
                }
                None => {
                    for (pair, low) in pairs.iter_mut().zip(low) {
                        *pair = Pair(u32::from(low.to_bits()));
                    }
                }
            }
        }
    },);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    #[test]
    fn every_kernel_gives_the_products_of_rounded_numbers() {
        let found = available();
        println!("kernels on this CPU: {found:?}");
        let sizes = [
            (1, 1, 1),
            (5, 33, 31),
            (12, 32, 64),
            (13, 70, 65),
            (17, 16, 96),
            (33, 100, 40),
            (64, 31, 1100),
            (100, 64, 2049),
        ];
        for (m, n, k) in sizes {
            let (a, b, old) = (numbers(m * k, 1), numbers(n * k, 2), numbers(m * n, 3));
            let b: Vec<bf16> = b.into_iter().map(bf16::from_f32).collect();
            let round = |x: f32| f64::from(bf16::from_f32(x).to_f32());
            for transpose_b in [true, false] {
                let expected = |i: usize, j: usize| -> f64 {
                    let b = |t: usize| f64::from(if transpose_b { b[j * k + t] } else { b[t * n + j] }.to_f32());
                    (0..k).map(|t| round(a[i * k + t]) * b(t)).sum()
                };
                for &kernel in &found {
                    for (scale, accumulate) in [(1.0, false), (0.5, true)] {
                        let how = Gemm { transpose_a: false, transpose_b, scale, accumulate };
                        let mut c = old.clone();
                        product(kernel, &mut c, &a, &b, (m, n, k), how);
                        for (at, c) in c.iter().enumerate() {
                            let before = if accumulate { f64::from(old[at]) } else { 0.0 };
                            let expected = before + f64::from(scale) * expected(at / n, at % n);
                            let off = (f64::from(*c) - expected).abs();
                            assert!(
                                off < 2e-5 * (k as f64).sqrt(),
                                "{kernel:?}, {m} {n} {k}, transposed {transpose_b}, at {at}: {c}, not {expected}"
                            );
                        }
                    }
                }
            }
        }
    }
}
