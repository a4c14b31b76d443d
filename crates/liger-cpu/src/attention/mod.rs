//! Softmax attention over everything before, or over a window, the first tokens ("sinks"), and keys that are kept.
//!
//! Forward and backward work on blocks of query rows of one key/value head: the visible keys are gathered, and each
//! block is two (backward: five) matrix products with a row-wise softmax between. The query heads of a group are
//! stacked as rows. Cost is linear in the length with a window.

mod cache;
mod kept;
mod probabilities;
mod step;

use liger_tensor::checks::{self, Heads, same_length};
use liger_tensor::{
    Attention, AttentionGradients, AttentionSpec, Error, Keeping, KeyValueCache, Result, Sequence, Tensor,
};

use self::cache::Rows;
pub(crate) use self::kept::novelty;
use self::kept::{Held, Kept, Key, Turns};
use self::probabilities::{columns, probabilities};
use self::step::step;
use crate::elementwise::softmax_backward_row;
use crate::gemm::{Alone, rows};
use crate::math::add_scaled;
use crate::parallel::{Disjoint, for_tasks, threads, vectorized};
use crate::prefetch::prefetch;

/// Most queries of a block.
const BLOCK: usize = 64;

/// Where row `t` of the query group of key/value head `head` begins; its `group * dim` elements are contiguous.
fn query_at(heads: Heads, t: usize, head: usize) -> usize {
    (t * heads.query + head * heads.group()) * heads.dim
}

fn kv_at(heads: Heads, t: usize, head: usize) -> usize {
    (t * heads.kv + head) * heads.dim
}

/// Keys or values of one head: those of this batch, and before them those of a cache.
struct Source<'a> {
    new: &'a [f32],
    past: Option<Rows<'a>>,
    cache_rows: usize,
    spec: AttentionSpec,
    sequence: Sequence,
    heads: Heads,
    head: usize,
}

impl Source<'_> {
    /// Appends the row of a key.
    fn append(&self, key: Key, to: &mut Vec<f32>) {
        let d = self.heads.dim;
        let row = match key {
            Key::At(position) => match position.checked_sub(self.sequence.position) {
                Some(t) => {
                    let at = kv_at(self.heads, self.sequence.start + t, self.head);
                    return to.extend_from_slice(&self.new[at..at + d]);
                }
                None => self.spec.cache_row(position),
            },
            Key::Slot(slot) => slot,
        };
        let at = ((self.sequence.slot * self.heads.kv + self.head) * self.cache_rows + row) * d;
        if let Some(past) = self.past {
            past.append(at..at + d, to);
        }
    }

    /// Rows of all that is seen, and zeros up to the number of [`columns`].
    fn gather(&self, seen: &[Seen]) -> Vec<f32> {
        let count = columns(seen) * self.heads.dim;
        let mut rows = Vec::with_capacity(count);
        for seen in seen {
            self.append(seen.key, &mut rows);
        }
        rows.resize(count, 0.0);
        rows
    }

    /// Keys as the queries see them.
    fn gather_keys(&self, seen: &[Seen], turns: &Turns) -> Vec<f32> {
        let mut rows = self.gather(seen);
        for (row, seen) in rows.chunks_exact_mut(self.heads.dim).zip(seen).filter(|(_, seen)| seen.turn > 0) {
            turns.turn(row, seen.turn as i64);
        }
        rows
    }
}

/// A key that queries see, and the positions by which it is moved on.
#[derive(Debug, Clone, Copy)]
struct Seen {
    key: Key,
    turn: usize,
}

/// Rows of a sequence that one task takes, `first..last` of each: none goes across the border of two stretches where keys
/// are kept.
fn blocks(spec: AttentionSpec, s: Sequence) -> Vec<(usize, usize)> {
    let mut blocks = Vec::new();
    let mut first = 0;
    // With a window a block multiplies more keys than its queries see: as many as it has queries.
    let most = spec.window.map_or(BLOCK, |w| (w / 2).clamp(BLOCK / 4, BLOCK));
    while first < s.len {
        let stretch = spec.window.filter(|_| spec.kept > 0).map_or(most, |w| w - (s.position + first) % w);
        let last = s.len.min(first + most.min(stretch));
        blocks.push((first, last));
        first = last;
    }
    blocks
}

/// Keys that any of the queries `from..to` sees.
fn visible(spec: AttentionSpec, kept: Option<&Kept>, oldest: usize, from: usize, to: usize) -> Vec<Seen> {
    let low = spec.window_start(from).max(oldest);
    let as_it_is = |position| Seen { key: Key::At(position), turn: 0 };
    if let (Some(kept), Some(window)) = (kept, spec.window) {
        let moved_on = |held: &Held| Seen { key: held.key, turn: spec.turn(from, held.position) };
        return kept.at(from / window).iter().map(moved_on).chain((low..to).map(as_it_is)).collect();
    }
    (oldest..spec.sinks.min(low).max(oldest)).chain(low..to).map(as_it_is).collect()
}

/// What moves kept keys on; nothing where none are kept.
fn turns_of(inputs: &Attention<'_>) -> Result<Turns> {
    inputs.keeping.map_or(Ok(Turns::default()), |Keeping { frequencies, .. }| Turns::of(frequencies))
}

fn gather_queries(x: &[f32], heads: Heads, head: usize, range: std::ops::Range<usize>) -> Vec<f32> {
    let width = heads.group() * heads.dim;
    let mut rows = Vec::with_capacity(range.len() * width);
    for t in range {
        let at = query_at(heads, t, head);
        rows.extend_from_slice(&x[at..at + width]);
    }
    rows
}

pub(crate) fn forward(
    out: &mut Tensor,
    inputs: Attention<'_>,
    mut cache: Option<&mut KeyValueCache>,
    alone: Alone,
) -> Result<()> {
    let Attention { q, k, v, keeping, sequences, spec } = inputs;
    let heads = checks::attention("attention_forward", &inputs, cache.is_some())?;
    same_length("attention_forward", out, q)?;
    let turns = turns_of(&inputs)?;
    let kept = kept::select(&inputs, heads, &turns, cache.as_deref())?;
    let scores = keeping.map(|keeping| keeping.scores);
    let (q, k, v) = (q.as_f32()?, k.as_f32()?, v.as_f32()?);
    if let Some(cache) = cache.as_deref_mut() {
        cache::reserve(cache, sequences, heads)?;
    }
    if let (Some(cache), true) = (cache.as_deref_mut(), sequences.list().iter().all(|s| s.len == 1)) {
        kept::store(cache, &kept, (k, v), sequences, heads)?;
        cache::insert(cache, k, v, scores, sequences, heads)?;
        let out = out.as_f32_mut()?;
        return match (Rows::of(&cache.keys)?, Rows::of(&cache.values)?) {
            (Rows::F32(k), Rows::F32(v)) => step(out, q, (k, v), cache, &turns, sequences, heads),
            (Rows::Bf16(k), Rows::Bf16(v)) => step(out, q, (k, v), cache, &turns, sequences, heads),
            _ => {
                let (found, expected) = ("keys and values of two types", "one");
                Err(Error::Storage { operation: "attention_forward", found, expected })
            }
        };
    }

    let mut tasks = Vec::new();
    for (index, sequence) in sequences.list().iter().enumerate() {
        for head in 0..heads.kv {
            let kept = kept.get(index * heads.kv + head);
            tasks.extend(blocks(spec, *sequence).into_iter().map(|block| (*sequence, head, kept, block)));
        }
    }
    let past = match cache.as_deref() {
        Some(cache) => Some((Rows::of(&cache.keys)?, Rows::of(&cache.values)?, cache.keys.dim(2))),
        None => None,
    };
    let out = Disjoint::new(out.as_f32_mut()?);
    for_tasks(tasks.len(), |task| {
        let (sequence, head, kept, (first, last)) = tasks[task];
        let source = |new, past, cache_rows| Source { new, past, cache_rows, spec, sequence, heads, head };
        let (keys, values) = match past {
            Some((keys, values, rows)) => (source(k, Some(keys), rows), source(v, Some(values), rows)),
            None => (source(k, None, 0), source(v, None, 0)),
        };
        let (from, to) = (sequence.position + first, sequence.position + last);
        let oldest = if past.is_some() { 0 } else { sequence.position };
        let seen = visible(spec, kept, oldest, from, to);
        let queries = gather_queries(q, heads, head, sequence.start + first..sequence.start + last);
        let p = probabilities((&queries, &keys.gather_keys(&seen, &turns)), spec, from, &seen, heads, alone);
        let (count, d, n) = (queries.len() / heads.dim, heads.dim, columns(&seen));
        let mut block = queries; // its memory takes the result
        let values = values.gather(&seen);
        let width = heads.group() * d;
        for t in 0..last - first {
            prefetch(out.pointer(query_at(heads, sequence.start + first + t, head), width), width);
        }
        alone.matmul((&mut block, d), (count, d, n), (rows(&p, n), rows(&values, d)), 1.0, false);
        for (t, row) in block.chunks_exact(width).enumerate() {
            // SAFETY: each (token, head) belongs to exactly one task.
            unsafe { out.slice(query_at(heads, sequence.start + first + t, head), width) }.copy_from_slice(row);
        }
    });
    if let Some(cache) = cache {
        kept::store(cache, &kept, (k, v), sequences, heads)?;
        cache::insert(cache, k, v, scores, sequences, heads)?;
    }
    Ok(())
}

/// With P the probabilities: dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(P dP)), dQ = scale dS K, dK = scale dS^T Q.
pub(crate) fn backward(
    gradients: AttentionGradients<'_>,
    inputs: Attention<'_>,
    dout: &Tensor,
    alone: Alone,
) -> Result<()> {
    const NAME: &str = "attention_backward";
    let Attention { q, k, v, sequences, spec, .. } = inputs;
    let AttentionGradients { q: dq, k: dk, v: dv } = gradients;
    let heads = checks::attention(NAME, &inputs, false)?;
    for (a, b) in [(&*dq, q), (&*dk, k), (&*dv, v), (dout, q)] {
        same_length(NAME, a, b)?;
    }
    let turns = turns_of(&inputs)?;
    let kept = kept::select(&inputs, heads, &turns, None)?;
    let (q, k, v, dout) = (q.as_f32()?, k.as_f32()?, v.as_f32()?, dout.as_f32()?);
    let (dq, dk, dv) =
        (Disjoint::new(dq.as_f32_mut()?), Disjoint::new(dk.as_f32_mut()?), Disjoint::new(dv.as_f32_mut()?));
    let d = heads.dim;
    let (width, scale) = (heads.group() * d, 1.0 / (d as f32).sqrt());
    // Blocks of one head add to the gradients of the same keys: where there are few heads, several runs of blocks do so apart.
    let pairs = sequences.list().len() * heads.kv;
    let runs = (4 * threads()).div_ceil(pairs.max(1));
    let mut parts: Vec<[Vec<f32>; 2]> = (0..pairs * runs).map(|_| Default::default()).collect();
    let all_parts = Disjoint::new(&mut parts);
    for_tasks(pairs * runs, |task| {
        let (pair, run) = (task / runs, task % runs);
        let (sequence, head) = (sequences.list()[pair / heads.kv], pair % heads.kv);
        let start = sequence.position;
        let source = |new| Source { new, past: None, cache_rows: 0, spec, sequence, heads, head };
        let blocks = blocks(spec, sequence);
        let own = &blocks[blocks.len() * run / runs..blocks.len() * (run + 1) / runs];
        // Gradients of this head's keys and values that the run sees, [keys, D].
        let len = own.last().map_or(0, |&(_, last)| last) * d;
        let (mut all_dk, mut all_dv) = (vec![0.0f32; len], vec![0.0f32; len]);
        for &(first, last) in own {
            let seen = visible(spec, kept.get(pair), start, start + first, start + last);
            let (keys, values) = (source(k).gather_keys(&seen, &turns), source(v).gather(&seen));
            let block = sequence.start + first..sequence.start + last;
            let queries = gather_queries(q, heads, head, block.clone());
            let dblock = gather_queries(dout, heads, head, block);
            let (count, n) = (queries.len() / d, columns(&seen));
            let p = probabilities((&queries, &keys), spec, start + first, &seen, heads, alone);

            let mut block_dv = vec![0.0f32; n * d];
            alone.matmul((&mut block_dv, d), (n, d, count), (rows(&p, n).t(), rows(&dblock, d)), 1.0, false);
            let mut ds = vec![0.0f32; count * n];
            alone.matmul((&mut ds, n), (count, n, d), (rows(&dblock, d), rows(&values, d).t()), 1.0, false);
            vectorized!(|| {
                ds.chunks_exact_mut(n).zip(p.chunks_exact(n)).for_each(|(ds, p)| softmax_backward_row(ds, p));
            },);
            for t in first..last {
                prefetch(dq.pointer(query_at(heads, sequence.start + t, head), width), width);
            }
            let mut block_dq = vec![0.0f32; count * d];
            alone.matmul((&mut block_dq, d), (count, d, n), (rows(&ds, n), rows(&keys, d)), 1.0, false);
            let mut block_dk = vec![0.0f32; n * d];
            alone.matmul((&mut block_dk, d), (n, d, count), (rows(&ds, n).t(), rows(&queries, d)), 1.0, false);

            vectorized!(|| {
                for (i, seen) in seen.iter().enumerate() {
                    let Key::At(position) = seen.key else { continue };
                    if seen.turn > 0 {
                        turns.turn(&mut block_dk[i * d..(i + 1) * d], -(seen.turn as i64));
                    }
                    let to = (position - start) * d..(position - start + 1) * d;
                    add_scaled(&mut all_dk[to.clone()], scale, &block_dk[i * d..(i + 1) * d]);
                    add_scaled(&mut all_dv[to], 1.0, &block_dv[i * d..(i + 1) * d]);
                }
                for (t, row) in block_dq.chunks_exact(width).enumerate() {
                    // SAFETY: each (token, head) belongs to exactly one task.
                    let to = unsafe { dq.slice(query_at(heads, sequence.start + first + t, head), width) };
                    to.iter_mut().zip(row).for_each(|(to, x)| *to = scale * x);
                }
            },);
        }
        // SAFETY: each task has its own.
        let part = unsafe { all_parts.slice(task, 1) };
        part[0] = [all_dk, all_dv];
    });
    for_tasks(2 * pairs, |task| {
        let (pair, which) = (task / 2, task % 2);
        let (sequence, head) = (sequences.list()[pair / heads.kv], pair % heads.kv);
        let to = [&dk, &dv][which];
        let Some((last, earlier)) = parts[pair * runs..(pair + 1) * runs].split_last() else { return };
        vectorized!(|| {
            for t in 0..sequence.len {
                // SAFETY: each (token, head) of keys or values belongs to exactly one task.
                let row = unsafe { to.slice(kv_at(heads, sequence.start + t, head), d) };
                // The last run sees all keys.
                row.copy_from_slice(&last[which][t * d..(t + 1) * d]);
                for part in earlier.iter().map(|part| &part[which]).filter(|part| part.len() > t * d) {
                    add_scaled(row, 1.0, &part[t * d..(t + 1) * d]);
                }
            }
        },);
    });
    Ok(())
}
