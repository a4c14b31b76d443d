//! Softmax attention of one token a sequence, whose own key is already in the cache. Caches are cut into chunks for several threads,
//! whose parts are merged by their maxima.

#[cfg(target_arch = "x86_64")]
mod avx512;

use liger_tensor::checks::Heads;
use liger_tensor::{KeyValueCache, Result, Sequences};

#[cfg(target_arch = "x86_64")]
use self::avx512::Row;
use super::kept::Turns;
use super::query_at;
use crate::dots;
#[cfg(not(target_arch = "x86_64"))]
use crate::element::Element as Row;
use crate::math::{add_scaled, exp, exponentials};
use crate::parallel::{Disjoint, for_tasks, vectorized};

/// Keys that one task looks at.
const CHUNK: usize = 512;

/// Attention of every sequence's one token, to `out [T, H, D]`.
pub(super) fn step<W: Row>(
    out: &mut [f32],
    q: &[f32],
    (keys, values): (&[W], &[W]),
    cache: &KeyValueCache,
    turns: &Turns,
    sequences: &Sequences,
    heads: Heads,
) -> Result<()> {
    let positions = cache.kept.as_ref().map_or(Ok(&[][..]), |kept| kept.positions.as_f32())?;
    let (cache_rows, d, group, slots) = (cache.keys.dim(2), heads.dim, heads.group(), cache.spec.slots());
    let scale = 1.0 / (d as f32).sqrt();
    let mut tasks = Vec::new();
    for s in sequences.list() {
        let in_use = cache.spec.rows_in_use(s.position);
        for head in 0..heads.kv {
            for rows in &in_use {
                let chunks = rows.clone().step_by(CHUNK);
                tasks.extend(chunks.map(|first| (*s, head, first, rows.end.min(first + CHUNK))));
            }
        }
    }
    // Per task and head of the group: the maximum, the sum of exponentials, the weighted sum of values.
    let part = d + 2;
    let mut parts = vec![0.0f32; tasks.len() * group * part];
    let shared = Disjoint::new(&mut parts);
    for_tasks(tasks.len(), |task| {
        let (s, head, first, last) = tasks[task];
        let base = (s.slot * heads.kv + head) * cache_rows;
        let range = (base + first) * d..(base + last) * d;
        let (keys, values) = (&keys[range.clone()], &values[range]);
        let turn = |row: usize| match positions.get((s.slot * heads.kv + head) * slots + row) {
            Some(&position) if row < slots => cache.spec.turn(s.position, position as usize),
            _ => 0,
        };
        // SAFETY: a task has its own part.
        let parts = unsafe { shared.slice(task * group * part, group * part) };
        let count = last - first;
        let at = query_at(heads, s.start, head);
        let mut scores = vec![0.0f32; group * count];
        let (queries, sizes) = (&q[at..at + group * d], (group, count, d));
        if (first..last).any(|row| turn(row) > 0) {
            let mut moved = W::widened(keys, &mut Vec::new()).to_vec();
            for (row, key) in (first..last).zip(moved.chunks_exact_mut(d)) {
                turns.turn(key, turn(row) as i64);
            }
            products(&mut scores, queries, &moved, sizes, scale);
        } else {
            products(&mut scores, queries, keys, sizes, scale);
        }
        let mut sums = vec![0.0f32; group * d];
        for (scores, part) in scores.chunks_exact_mut(count).zip(parts.chunks_exact_mut(part)) {
            (part[0], part[1]) = vectorized!(|| exponentials(scores));
        }
        weighted_sums(&mut sums, &scores, values, sizes);
        for (sum, part) in sums.chunks_exact(d).zip(parts.chunks_exact_mut(part)) {
            part[2..].copy_from_slice(sum);
        }
    });
    let mut at = 0;
    while at < tasks.len() {
        let (s, head, ..) = tasks[at];
        let count = tasks[at..].iter().take_while(|t| (t.0.start, t.1) == (s.start, head)).count();
        for g in 0..group {
            let part_of = |i: usize| &parts[((at + i) * group + g) * part..((at + i) * group + g + 1) * part];
            let max = (0..count).map(|i| part_of(i)[0]).fold(f32::NEG_INFINITY, f32::max);
            let row = query_at(heads, s.start, head) + g * d;
            let out = &mut out[row..row + d];
            out.fill(0.0);
            vectorized!(|| {
                let mut sum = 0.0;
                for i in 0..count {
                    let weight = exp(part_of(i)[0] - max);
                    sum += weight * part_of(i)[1];
                    add_scaled(out, weight, &part_of(i)[2..]);
                }
                out.iter_mut().for_each(|x| *x /= sum);
            },);
        }
        at += count;
    }
    Ok(())
}

/// `scores [m, n] = scale q [m, d] keys [n, d]^T`.
fn products<W: Row>(scores: &mut [f32], q: &[f32], keys: &[W], sizes: (usize, usize, usize), scale: f32) {
    #[cfg(target_arch = "x86_64")]
    if avx512::suits(sizes.2) {
        // SAFETY: `suits` found the instructions.
        return unsafe { avx512::products(scores, q, keys, sizes, scale) };
    }
    dots::product_alone(scores, q, keys, sizes, scale, false);
}

/// `sums [m, d] = p [m, n] values [n, d]`.
fn weighted_sums<W: Row>(sums: &mut [f32], p: &[f32], values: &[W], sizes: (usize, usize, usize)) {
    #[cfg(target_arch = "x86_64")]
    if avx512::suits(sizes.2) {
        // SAFETY: `suits` found the instructions.
        return unsafe { avx512::weighted_sums(sums, p, values, sizes) };
    }
    dots::weighted_sums(sums, p, values, sizes);
}
