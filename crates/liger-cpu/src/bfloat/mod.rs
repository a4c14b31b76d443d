//! Products on CPUs that multiply bfloat16 themselves: float32 operands are rounded to it, sums are float32. [`product`] is that of
//! activations with weights in bfloat16, or unpacked to it, by all threads; [`few::product`] the same for few rows; [`product_alone`] that of two float32 matrices which stay in a thread's caches.
//!
//! But for few rows the weights are cut into panels of 16, 32 or 48 outputs. As many as stay in the threads' caches are packed at a time, some terms of
//! the sum, and all rows of the activations go by them, in the order that suits the kernel: packing costs as much as a few rows. A thread begins
//! with the panels that it packed itself; one that is done takes rows of the others. Memory for all that is kept from call to call: fresh
//! pages cost more than the work. Weights of products that come again and again are packed once (`packed.rs`).

mod amx;
mod avx512;
pub(crate) mod few;
mod output;
pub(crate) mod pack;
mod packed;

use std::arch::x86_64::{__m512bh, __m512i};
use std::cell::Cell;
use std::ops::Range;

use liger_tensor::Lines;

pub(crate) use self::output::Output;
pub(crate) use self::pack::Source;
use self::pack::{Blocks, Layout, Pair, ROWS, pack};
pub(crate) use self::packed::{Panels, Weights};
use crate::gemm::{Matrix, rows};
use crate::parallel::{Disjoint, for_tasks, threads};
use crate::tiles::{self, SIDE};

/// Terms that one step of a kernel takes: what is packed is filled up to it with zeros.
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
    /// Outputs of a panel, for so many in all.
    fn panel(self, outputs: usize) -> usize {
        match self {
            Self::Amx => SIDE,
            Self::Avx512Bf16 => avx512::panel(outputs),
        }
    }

    /// Rows of `a [m, k]` that lie together: one where the kernel takes them as they are, or would if they were bfloat16.
    fn rows_together<A: Source>(self, a: &[A], (m, k): (usize, usize)) -> usize {
        let begins_with_a_line = A::as_pairs(a).is_some_and(|a| a.as_ptr().addr().is_multiple_of(64));
        match self {
            Self::Avx512Bf16 => 1,
            // A tile reads lines of 16 rows. If these are multiples of 2 KiB apart, they push one another out of the first cache.
            Self::Amx if begins_with_a_line && m.is_multiple_of(SIDE) && k.is_multiple_of(STEP) && k % 1024 > 0 => 1,
            Self::Amx => SIDE,
        }
    }

    /// Terms that are packed at once, and bytes of panels that stay in a core's second cache beside what else has to.
    fn depth_and_cached(self) -> (usize, usize) {
        match self {
            Self::Amx => (2048, 1 << 20),
            Self::Avx512Bf16 => (4096, 512 << 10),
        }
    }

    /// Rows that a task's are a multiple of.
    fn rows(self) -> usize {
        match self {
            Self::Amx => 2 * SIDE,
            Self::Avx512Bf16 => avx512::SUMS,
        }
    }
}

/// Those that this CPU has, best first.
pub(crate) fn available() -> Vec<Kernel> {
    let has_vectors = is_x86_feature_detected!("avx512bf16")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl");
    let mut list = Vec::new();
    if has_vectors && tiles::are_there(tiles::Products::Bfloat16) {
        list.push(Kernel::Amx);
    }
    if has_vectors {
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
struct Work<'a, C> {
    /// As [`Layout::Rows`] has so many rows together, from the first term on; a row has `stride` pairs in all.
    a: &'a [Pair],
    rows_together: usize,
    stride: usize,
    /// Panels `[terms / 2, panel]`, one after the other.
    b: &'a [Pair],
    panel: usize,
    terms: usize,
    /// `[m, width]`, of which some outputs are meant.
    c: &'a Disjoint<'a, C>,
    first: usize,
    width: usize,
    count: usize,
    scale: f32,
    accumulate: bool,
}

impl<'a, C: Output> Work<'a, C> {
    /// That of each panel.
    fn panels(self) -> impl Iterator<Item = Block<'a, C>> {
        let panels = self.b.chunks_exact(self.terms / 2 * self.panel).zip((0..self.count).step_by(self.panel));
        panels.map(move |(b, first)| {
            Block(Work { b, first: self.first + first, count: self.panel.min(self.count - first), ..self })
        })
    }
}

/// Work with one panel.
struct Block<'a, C>(Work<'a, C>);

impl<'a, C> std::ops::Deref for Block<'a, C> {
    type Target = Work<'a, C>;

    fn deref(&self) -> &Work<'a, C> {
        &self.0
    }
}

impl<C: Output> Block<'_, C> {
    /// The panel's outputs of a row.
    #[allow(clippy::mut_from_ref)]
    fn outputs(&self, row: usize) -> &mut [C] {
        // SAFETY: tasks have distinct rows of a panel, and a kernel holds one of them at a time.
        unsafe { self.c.slice(row * self.width + self.first, self.count) }
    }

    /// Where the panel's outputs of the first of some rows begin; those of the others are `width` apart, and all are there.
    fn outputs_from(&self, rows: Range<usize>) -> *mut C {
        self.c.pointer(rows.start * self.width + self.first, (rows.len() - 1) * self.width + self.count)
    }

    /// The panel's sums of a row.
    fn store(&self, row: usize, sums: &[f32]) {
        for (out, sum) in self.outputs(row).iter_mut().zip(sums) {
            *out = C::narrow(self.scale * sum + if self.accumulate { out.widen() } else { 0.0 });
        }
    }
}

/// `c [m, n] = scale a [m, k] b [n, k]^T (+ c)`. Outputs in bfloat16 are rounded once for each stretch of terms (2,048 or 4,096).
pub(crate) fn product<C: Output, A: Source, B: Blocks>(
    kernel: Kernel,
    c: &mut [C],
    a: &[A],
    b: Weights<'_, B>,
    (m, n, k): (usize, usize, usize),
    scale: f32,
    accumulate: bool,
) {
    assert!(c.len() == m * n && a.len() == m * k && b.fit(kernel, (n, k)), "bfloat16 product {m} x {k} x {n}");
    let (stride, panel) = (k.next_multiple_of(STEP) / 2, kernel.panel(n));
    let mut rounded = ROUNDED.take();
    let rows_together = kernel.rows_together(a, (m, k));
    let a = packed_rows(Layout::Rows { together: rows_together }, &mut rounded, a, (m, k));
    let c = &Disjoint::new(c);
    let (depth, cached) = kernel.depth_and_cached();
    // As many panels together as stay in a core's cache, cut evenly.
    let panels = n.div_ceil(panel);
    let together = (cached / (2 * depth.min(2 * stride) * panel)).min(panels.div_ceil(threads())).max(1);
    let groups = panels.div_ceil(together).next_multiple_of(threads()).min(panels);
    let outputs_before = |group: usize| n.min(panels * group / groups * panel);
    // Four tasks a group: were they smaller, one would be taken over also from a thread that is hardly slower, and its panels would come
    // from that core's cache for little work.
    let rows_of_a_task = m.div_ceil(4).next_multiple_of(kernel.rows());
    let row_blocks = m.div_ceil(rows_of_a_task);
    let multiply_groups = |groups: Range<usize>| {
        let outputs = outputs_before(groups.start)..outputs_before(groups.end);
        let mut packed = PACKED.take();
        for from in (0..k).step_by(depth) {
            let terms = from..k.min(from + depth);
            let b = match b {
                Weights::AsTheyLie(b) => {
                    packed_panels(panel, &mut packed, b, outputs.clone(), terms.clone(), 4 * threads())
                }
                Weights::Packed(packed) => packed.panels(outputs.start, terms.clone()),
            };
            let (a, terms) = (&a[from / 2 * rows_together..], terms.len().next_multiple_of(STEP));
            let accumulate = accumulate || from > 0;
            for_tasks(groups.len() * row_blocks, |task| {
                let group = groups.start + task / row_blocks;
                let (first, end) = (outputs_before(group), outputs_before(group + 1));
                let row = task % row_blocks * rows_of_a_task;
                let rows = row..m.min(row + rows_of_a_task);
                let b = &b[(first - outputs.start) * terms / 2..];
                let count = end - first;
                let work =
                    Work { a, rows_together, stride, b, panel, terms, c, first, width: n, count, scale, accumulate };
                multiply(kernel, work, rows);
            });
        }
        PACKED.set(packed);
    };
    // Where there are many groups, a thread that is faster takes more of them. Few are packed and multiplied by all threads: as many at a
    // time as there are threads, or, if they were packed before, all.
    if groups >= 8 * threads() {
        for_tasks(groups, |group| multiply_groups(group..group + 1));
    } else if matches!(b, Weights::Packed(_)) {
        multiply_groups(0..groups);
    } else {
        (0..groups).step_by(threads()).for_each(|first| multiply_groups(first..groups.min(first + threads())));
    }
    ROUNDED.set(rounded);
}

/// `c [m, n] = scale a [m, k] b [k, n] (+ c)` by this thread alone, both operands rounded; rows of c are `width` apart.
pub(crate) fn product_alone(
    kernel: Kernel,
    (c, width): (&mut [f32], usize),
    (m, n, k): (usize, usize, usize),
    (a, b): (Matrix<'_>, Matrix<'_>),
    scale: f32,
    accumulate: bool,
) {
    if m == 0 || n == 0 {
        return;
    }
    let (stride, panel) = (k.next_multiple_of(STEP) / 2, kernel.panel(n));
    let rows_together = kernel.rows_together(a.data, (m, k));
    let (mut rounded, mut packed) = (ROUNDED.take(), PACKED.take());
    rounded.reserve::<Pair>(m.next_multiple_of(ROWS) * stride);
    let narrow = rounded.as_mut_slice::<Pair>();
    // SAFETY: `available` found the instructions.
    unsafe { pack(narrow, Layout::Rows { together: rows_together }, a, 0..m, 0..k) };
    let b = packed_panels(panel, &mut packed, b.t(), 0..n, 0..k, 1);
    let (a, c, terms) = (&*narrow, &Disjoint::new(c), 2 * stride);
    let work = Work { a, rows_together, stride, b, panel, terms, c, first: 0, width, count: n, scale, accumulate };
    multiply(kernel, work, 0..m);
    PACKED.set(packed);
    ROUNDED.set(rounded);
}

/// `a [m, k]` rounded, in this order, by all threads; itself, if it lies so.
fn packed_rows<'a, A: Source>(layout: Layout, memory: &'a mut Lines, a: &'a [A], (m, k): (usize, usize)) -> &'a [Pair] {
    if let (Layout::Rows { together: 1 }, true, Some(pairs)) = (layout, k.is_multiple_of(STEP), A::as_pairs(a)) {
        return pairs;
    }
    let block_len = ROWS * k.next_multiple_of(STEP) / 2;
    let len = m.div_ceil(ROWS) * block_len;
    memory.reserve::<Pair>(len);
    let all = Disjoint::new(&mut memory.as_mut_slice::<Pair>()[..len]);
    for_tasks(m.div_ceil(ROWS), |block| {
        // SAFETY: tasks have distinct blocks, and `available` found the instructions.
        unsafe {
            let to = all.slice(block * block_len, block_len);
            pack(to, layout, rows(a, k), block * ROWS..m.min((block + 1) * ROWS), 0..k);
        }
    });
    &memory.as_slice::<Pair>()[..len]
}

/// Panels of some outputs of `b [outputs, terms]`, packed in so many tasks.
fn packed_panels(
    panel: usize,
    memory: &mut Lines,
    b: impl Blocks,
    outputs: Range<usize>,
    terms: Range<usize>,
    tasks: usize,
) -> &[Pair] {
    let (panels, panel_len) = (outputs.len().div_ceil(panel), panel * terms.len().next_multiple_of(STEP) / 2);
    memory.reserve::<Pair>(panels * panel_len);
    pack_panels(panel, &mut memory.as_mut_slice::<Pair>()[..panels * panel_len], b, outputs, terms, tasks);
    &memory.as_slice::<Pair>()[..panels * panel_len]
}

/// The same, into memory of their number.
fn pack_panels(
    panel: usize,
    to: &mut [Pair],
    b: impl Blocks,
    outputs: Range<usize>,
    terms: Range<usize>,
    tasks: usize,
) {
    let (panels, panel_len) = (outputs.len().div_ceil(panel), panel * terms.len().next_multiple_of(STEP) / 2);
    let all = Disjoint::new(to);
    for_tasks(tasks, |task| {
        let part = panels * task / tasks..panels * (task + 1) / tasks;
        let outputs = outputs.start + part.start * panel..outputs.end.min(outputs.start + part.end * panel);
        // SAFETY: tasks have distinct panels, and `available` found the instructions.
        unsafe {
            let to = all.slice(part.start * panel_len, part.len() * panel_len);
            pack(to, Layout::Panels { width: panel }, b, outputs, terms.clone());
        }
    });
}

/// A register as the instructions take it.
#[target_feature(enable = "avx512f")]
#[inline]
fn as_bfloat16(bits: __m512i) -> __m512bh {
    // SAFETY: both are any 64 bytes.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(bits) }
}

fn multiply<C: Output>(kernel: Kernel, work: Work<'_, C>, rows: Range<usize>) {
    match kernel {
        // SAFETY: `available` found the instructions.
        Kernel::Amx => unsafe { amx::multiply(work, rows) },
        // SAFETY: as above.
        Kernel::Avx512Bf16 => unsafe { avx512::multiply(work, rows) },
    }
}

thread_local! {
    /// Activations of a product that this thread asked for.
    static ROUNDED: Cell<Lines> = Cell::default();
    /// Panels of a product that this thread asked for, or of its tasks.
    static PACKED: Cell<Lines> = Cell::default();
    /// Sums of some rows and a task's outputs, where they are not added up in place.
    static STRIP: Cell<Lines> = Cell::default();
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::packed::Packed;
    use super::*;
    use crate::element::Element;

    pub(super) fn numbers(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    /// Products of activations of this type, written as that one, against sums in float64.
    fn check<A: Source + Element + bytemuck::Pod, C: Output + bytemuck::Pod>((m, n, k): (usize, usize, usize)) {
        let (given, b) = (numbers(m * k, 1), numbers(n * k, 2));
        let [a, b] = [&given, &b].map(|x| x.iter().copied().map(bf16::from_f32).collect::<Vec<_>>());
        // As a model has them: memory that begins with a line.
        let mut lines = Lines::zeroed::<A>(m * k);
        lines.as_mut_slice::<A>().iter_mut().zip(given).for_each(|(a, x)| *a = A::narrow(x));
        let given = lines.as_slice::<A>();
        let old: Vec<C> = numbers(m * n, 3).into_iter().map(C::narrow).collect();
        for transpose_b in [true, false] {
            let sum = |i: usize, j: usize| -> f64 {
                let b = |t: usize| f64::from(if transpose_b { b[j * k + t] } else { b[t * n + j] }.to_f32());
                (0..k).map(|t| f64::from(a[i * k + t].to_f32()) * b(t)).sum()
            };
            let sums: Vec<f64> = (0..m * n).map(|at| sum(at / n, at % n)).collect();
            let matrix = if transpose_b { rows(&b, k) } else { rows(&b, n).t() };
            for (kernel, (scale, accumulate)) in available()
                .into_iter()
                .flat_map(|kernel| [(1.0, false), (0.5, false), (0.5, true)].map(|how| (kernel, how)))
            {
                let mut c = old.clone();
                product(kernel, &mut c, given, Weights::AsTheyLie(matrix), (m, n, k), scale, accumulate);
                let (packed, mut again) = (Packed::new(kernel, matrix, (n, k)), old.clone());
                let packed = Weights::<Matrix<'_, bf16>>::Packed(&packed);
                product(kernel, &mut again, given, packed, (m, n, k), scale, accumulate);
                assert_eq!(bytemuck::cast_slice::<C, u8>(&c), bytemuck::cast_slice::<C, u8>(&again), "packed before");
                for (at, (c, sum)) in c.iter().zip(&sums).enumerate() {
                    let before = if accumulate { f64::from(old[at].widen()) } else { 0.0 };
                    let expected = before + f64::from(scale) * sum;
                    // Once for each stretch of terms.
                    let roundings = if size_of::<C>() == 2 { k.div_ceil(kernel.depth_and_cached().0) } else { 0 };
                    let rounding = expected.abs().max(1.0) / 256.0 * roundings as f64;
                    let off = (f64::from(c.widen()) - expected).abs();
                    assert!(
                        off <= 2e-5 * (k as f64).sqrt() + rounding,
                        "{kernel:?}, {m} {n} {k}, transposed {transpose_b}, at {at}: {}, not {expected}",
                        c.widen()
                    );
                }
            }
        }
    }

    #[test]
    fn every_kernel_gives_the_products_of_rounded_numbers() {
        crate::tell_untested(&[Kernel::Amx, Kernel::Avx512Bf16], &available());
        let sizes = [
            (1, 1, 1),
            (5, 33, 31),
            (12, 32, 64),
            (13, 70, 65),
            (17, 16, 96),
            (33, 100, 40),
            (40, 96, 200),
            (48, 50, 672),
            (64, 31, 1100),
            (100, 64, 2049),
            (3, 600, 2049),
            (1, 4200, 2049),
        ];
        for sizes in sizes {
            check::<f32, f32>(sizes);
            check::<bf16, f32>(sizes);
            check::<f32, bf16>(sizes);
            check::<bf16, bf16>(sizes);
        }
    }

    #[test]
    fn a_thread_alone_takes_matrices_as_they_lie() {
        let round = |x: f32| f64::from(bf16::from_f32(x).to_f32());
        for (m, n, k) in [(1, 1, 1), (7, 40, 33), (16, 16, 32), (35, 17, 64), (64, 100, 70), (192, 130, 64)] {
            let (a, b, old) = (numbers(m * k, 1), numbers(n * k, 2), numbers(m * (n + 3), 3));
            for (kernel, a_across, b_across) in
                available().into_iter().flat_map(|kernel| [0, 1, 2, 3].map(|i| (kernel, i & 1 > 0, i & 2 > 0)))
            {
                let a_at = |i: usize, t: usize| if a_across { t * m + i } else { i * k + t };
                let b_at = |t: usize, j: usize| if b_across { j * k + t } else { t * n + j };
                let a_matrix = if a_across { rows(&a, m).t() } else { rows(&a, k) };
                let b_matrix = if b_across { rows(&b, k).t() } else { rows(&b, n) };
                for (scale, accumulate) in [(1.0, false), (1.0, true), (0.5, true)] {
                    let mut c = old.clone();
                    product_alone(kernel, (&mut c, n + 3), (m, n, k), (a_matrix, b_matrix), scale, accumulate);
                    for (at, c) in c.iter().enumerate() {
                        let (i, j) = (at / (n + 3), at % (n + 3));
                        let sum: f64 =
                            (0..if j < n { k } else { 0 }).map(|t| round(a[a_at(i, t)]) * round(b[b_at(t, j)])).sum();
                        let before = if accumulate || j >= n { f64::from(old[at]) } else { 0.0 };
                        let expected = before + f64::from(scale) * sum;
                        assert!(
                            (f64::from(*c) - expected).abs() < 2e-5,
                            "{kernel:?}, {m} {n} {k}, at {i} {j}: {c}, not {expected}"
                        );
                    }
                }
            }
        }
    }
}
