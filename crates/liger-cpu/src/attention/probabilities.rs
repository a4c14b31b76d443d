//! Softmax of a block's scores over the keys that each query sees.

// Loops of constant length over the lanes of a vector become its instructions as they stand.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use liger_tensor::AttentionSpec;
use liger_tensor::checks::Heads;

use super::{Key, Seen};
use crate::gemm::{Alone, rows};
use crate::math::{exp, largest, reduce};
use crate::parallel::vectorized;

/// Columns of a vector.
const LANES: usize = 16;

/// Columns of a block: as many as are seen, and some more that hold nothing, so that rows are whole vectors and tiles.
pub(super) fn columns(seen: &[Seen]) -> usize {
    seen.len().next_multiple_of(LANES)
}

/// Columns that a row looks at: the first ones, which are the sinks that its window does not reach, and the window's.
struct Visible {
    sinks: usize,
    window: Range<usize>,
}

impl Visible {
    /// Whole vectors that hold all of them, one range of columns for each part.
    #[inline(always)]
    fn vectors(&self) -> [Range<usize>; 2] {
        let sinks = self.sinks.next_multiple_of(LANES);
        [0..sinks, sinks.max(self.window.start / LANES * LANES)..self.window.end.next_multiple_of(LANES)]
    }

    /// What else is in these vectors is to count for nothing.
    #[inline(always)]
    fn hide_others(&self, row: &mut [f32]) {
        let [sinks, window] = self.vectors();
        row[self.sinks..self.window.start.min(sinks.end)].fill(f32::NEG_INFINITY);
        row[window.start..self.window.start.max(window.start)].fill(f32::NEG_INFINITY);
        row[self.window.end..window.end].fill(f32::NEG_INFINITY);
    }
}

/// Row (i, g) of one block of queries `q [Q, G, D]` against the visible keys `k [columns, D]`.
pub(super) fn probabilities(
    (q, k): (&[f32], &[f32]),
    spec: AttentionSpec,
    from: usize,
    seen: &[Seen],
    h: Heads,
    alone: Alone,
) -> Vec<f32> {
    let (group, n) = (h.group(), columns(seen));
    let count = q.len() / h.dim;
    let mut scores = vec![0.0f32; count * n];
    alone.matmul((&mut scores, n), (count, n, h.dim), (rows(q, h.dim), rows(k, h.dim).t()), 1.0, false);
    // The last keys are those of neighbouring tokens, up to the block's last one; all that stand before them are seen by all.
    let to = from + count / group;
    let window_keys = seen.iter().rev().zip((0..to).rev()).take_while(|(seen, t)| seen.key == Key::At(*t)).count();
    let column = |position: usize| seen.len() - (to - position).min(window_keys);
    // Of a block within one stretch all queries see the same kept keys and the same window.
    let window = spec.window.filter(|_| spec.kept == 0);
    let visible = |position: usize| {
        let end = column(position) + 1;
        let start = window.map_or(0, |w| (position + 1).saturating_sub(w));
        match spec.sinks < start {
            true => Visible { sinks: column(spec.sinks), window: column(start)..end },
            false => Visible { sinks: 0, window: 0..end },
        }
    };
    let visible: Vec<Visible> = (0..count).map(|row| visible(from + row / group)).collect();
    softmax(&mut scores, n, 1.0 / (h.dim as f32).sqrt(), &visible);
    scores
}

/// Softmax of `scale` times what each row looks at, in place; the rest is 0. What a row takes in turn, maximum, exponentials and sum,
/// each waits for the one before: done for all rows at a time, rows do not wait for one another.
fn softmax(scores: &mut [f32], n: usize, scale: f32, visible: &[Visible]) {
    let mut maxima = vec![0.0f32; visible.len()];
    let mut sums = maxima.clone();
    vectorized!(|| {
        for ((row, visible), max) in scores.chunks_exact_mut(n).zip(visible).zip(&mut maxima) {
            visible.hide_others(row);
            let mut lanes = [f32::NEG_INFINITY; LANES];
            for part in visible.vectors() {
                for x in row[part].chunks_exact(LANES) {
                    for lane in 0..LANES {
                        lanes[lane] = if x[lane] > lanes[lane] { x[lane] } else { lanes[lane] };
                    }
                }
            }
            *max = largest(lanes);
        }
        for (((row, visible), &max), sum) in scores.chunks_exact_mut(n).zip(visible).zip(&maxima).zip(&mut sums) {
            let [sinks, window] = visible.vectors();
            let lanes = exponentials(&mut row[sinks], max, scale, [0.0; LANES]);
            *sum = reduce(exponentials(&mut row[window], max, scale, lanes));
        }
        for ((row, visible), sum) in scores.chunks_exact_mut(n).zip(visible).zip(&sums) {
            let [sinks, window] = visible.vectors();
            row[sinks.end..window.start].fill(0.0);
            row[window.end..].fill(0.0);
            let scale = 1.0 / *sum;
            for part in [sinks, window] {
                row[part].iter_mut().for_each(|x| *x *= scale);
            }
        }
    },);
}

/// e^(scale (x - max)) in place of each, whole vectors; their sums by lanes, added to others.
#[inline(always)]
fn exponentials(x: &mut [f32], max: f32, scale: f32, mut sums: [f32; LANES]) -> [f32; LANES] {
    for x in x.chunks_exact_mut(LANES) {
        let mut y = [0.0f32; LANES];
        for lane in 0..LANES {
            y[lane] = exp(scale * (x[lane] - max));
        }
        for lane in 0..LANES {
            sums[lane] += y[lane];
        }
        x.copy_from_slice(&y);
    }
    sums
}
