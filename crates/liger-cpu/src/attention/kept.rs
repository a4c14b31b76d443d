//! Keys that stay when they leave the window: which ones, and the scores that say so.

use liger_tensor::checks::Heads;
use liger_tensor::{AttentionSpec, Error, KeyValueCache, Result, Sequence, Sequences, Tensor};

use super::{Source, kv_at};
use crate::parallel::{Disjoint, for_tasks};

/// A key that a query sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Key {
    /// That of the token at this position.
    At(usize),
    /// What a slot of the cache has held since before this batch.
    Slot(usize),
}

/// The keys kept for one head of a sequence.
pub(super) struct Kept {
    first_stretch: usize,
    /// By stretch: the keys in the slots that its queries see.
    stretches: Vec<Vec<Key>>,
    /// Scores of the slots in the end.
    scores: Vec<f32>,
}

impl Kept {
    /// `score` is that of a position, `held` the scores of the cache's slots.
    fn of(spec: AttentionSpec, window: usize, s: Sequence, score: impl Fn(usize) -> f32, held: Option<&[f32]>) -> Self {
        // Stretches taken in before this batch: all but the last two of the tokens so far.
        let mut taken = s.position.saturating_sub(1) / window;
        taken = taken.saturating_sub(1);
        let filled = spec.slots().min(taken * window);
        let mut keys: Vec<Key> = (0..filled).map(Key::Slot).collect();
        let mut scores: Vec<f32> = held.map_or(Vec::new(), |held| held[..filled].to_vec());
        let first_stretch = s.position / window;
        let last = (s.position + s.len - 1) / window;
        let mut stretches = Vec::with_capacity(last + 1 - first_stretch);
        for stretch in first_stretch..=last {
            while taken + 1 < stretch {
                let new: Vec<(Key, f32)> = (taken * window..(taken + 1) * window)
                    .map(|p| (Key::At(p), if p < spec.sinks { f32::INFINITY } else { score(p) }))
                    .collect();
                take_in(spec.slots(), &mut keys, &mut scores, &new);
                taken += 1;
            }
            stretches.push(keys.clone());
        }
        Self { first_stretch, stretches, scores }
    }

    /// The slots of a stretch.
    pub(super) fn at(&self, stretch: usize) -> &[Key] {
        &self.stretches[stretch - self.first_stretch]
    }
}

/// The best of what is held and what is new stay; those that come in take the places of those that go, in order.
fn take_in(slots: usize, keys: &mut Vec<Key>, scores: &mut Vec<f32>, new: &[(Key, f32)]) {
    let held = keys.len();
    let score = |i: usize| if i < held { scores[i] } else { new[i - held].1 };
    let mut order: Vec<usize> = (0..held + new.len()).collect();
    // Of equal ones the held come first, the last slot before the first one, then the new in their order.
    let place = |i: usize| if i < held { held - 1 - i } else { i };
    order.sort_by(|&a, &b| score(b).total_cmp(&score(a)).then(place(a).cmp(&place(b))));
    let mut stays = vec![false; held + new.len()];
    order.iter().take(slots).for_each(|&i| stays[i] = true);
    let free: Vec<usize> = (0..held).filter(|&i| !stays[i]).chain(held..slots).collect();
    let coming = (0..new.len()).filter(|&j| stays[held + j]);
    for (slot, j) in free.into_iter().zip(coming) {
        if slot == keys.len() {
            keys.push(new[j].0);
            scores.push(new[j].1);
        } else {
            (keys[slot], scores[slot]) = new[j];
        }
    }
}

/// What is kept for every head of every sequence, `[sequences, K]`; nothing where the spec keeps none.
pub(super) fn select(
    spec: AttentionSpec,
    heads: Heads,
    scores: Option<&Tensor>,
    sequences: &Sequences,
    cache: Option<&KeyValueCache>,
) -> Result<Vec<Kept>> {
    let (Some(window), Some(scores)) = (spec.window.filter(|_| spec.kept > 0), scores) else { return Ok(Vec::new()) };
    let new = scores.as_f32()?;
    let held = match cache {
        Some(cache) => Some(cached_scores(cache)?.as_f32()?),
        None => None,
    };
    let rows = spec.cache_rows();
    let mut kept = Vec::with_capacity(sequences.list().len() * heads.kv);
    for s in sequences.list() {
        for head in 0..heads.kv {
            let held = held.map(|held| &held[(s.slot * heads.kv + head) * rows..][..rows]);
            let score = |position: usize| match (position.checked_sub(s.position), held) {
                (Some(t), _) => new[(s.start + t) * heads.kv + head],
                (None, Some(held)) => held[spec.cache_row(position)],
                (None, None) => f32::NEG_INFINITY,
            };
            kept.push(Kept::of(spec, window, *s, score, held));
        }
    }
    Ok(kept)
}

fn cached_scores(cache: &KeyValueCache) -> Result<&Tensor> {
    let missing =
        Error::Storage { operation: "attention_forward", found: "no scores", expected: "a cache with scores" };
    cache.scores.as_ref().ok_or(missing)
}

/// Moves what was kept in the end into the cache's slots: before the ring takes in what is new.
pub(super) fn store(
    cache: &mut KeyValueCache,
    kept: &[Kept],
    (k, v): (&[f32], &[f32]),
    sequences: &Sequences,
    heads: Heads,
) -> Result<()> {
    let (spec, cache_rows, d) = (cache.spec, cache.keys.dim(2), heads.dim);
    for (i, kept) in kept.iter().enumerate() {
        let (sequence, head) = (sequences.list()[i / heads.kv], i % heads.kv);
        let Some(last) = kept.stretches.last() else { continue };
        let base = (sequence.slot * heads.kv + head) * cache_rows;
        for (tensor, new) in [(&mut cache.keys, k), (&mut cache.values, v)] {
            let held = tensor.as_f32_mut()?;
            for (slot, key) in last.iter().enumerate() {
                if let Key::At(_) = key {
                    let source = Source { new, past: Some(held), cache_rows, spec, sequence, heads, head };
                    let row = source.row(*key).to_vec();
                    held[(base + slot) * d..][..d].copy_from_slice(&row);
                }
            }
        }
        if let Some(scores) = &mut cache.scores {
            scores.as_f32_mut()?[base..base + kept.scores.len()].copy_from_slice(&kept.scores);
        }
    }
    Ok(())
}

/// See `Ops::key_novelty`.
pub(crate) fn novelty(
    scores: &mut Tensor,
    k: &Tensor,
    sequences: &Sequences,
    state: Option<&mut Tensor>,
) -> Result<()> {
    let heads = Heads::of("key_novelty", k, k, sequences)?;
    let d = heads.dim;
    if scores.len() != sequences.rows() * heads.kv {
        let expected = format!("[{}, {}]", sequences.rows(), heads.kv);
        return Err(Error::Shape { operation: "key_novelty", found: scores.shape().to_vec(), expected });
    }
    let k = k.as_f32()?;
    let mut sums = vec![0.0f32; sequences.list().len() * heads.kv * d];
    if let Some(state) = state.as_deref() {
        let state = state.as_f32()?;
        for (s, sums) in sequences.list().iter().zip(sums.chunks_exact_mut(heads.kv * d)) {
            sums.copy_from_slice(&state[s.slot * heads.kv * d..][..heads.kv * d]);
        }
    }
    let (out, all) = (Disjoint::new(scores.as_f32_mut()?), Disjoint::new(&mut sums));
    for_tasks(sequences.list().len() * heads.kv, |task| {
        let (s, head) = (sequences.list()[task / heads.kv], task % heads.kv);
        // SAFETY: a task has its own sum.
        let sum = unsafe { all.slice(task * d, d) };
        for t in 0..s.len {
            let key = &k[kv_at(heads, s.start + t, head)..][..d];
            let norm = key.iter().map(|x| x * x).sum::<f32>().sqrt();
            let scale = if norm > 0.0 { 1.0 / norm } else { 0.0 };
            let (mut along, mut length) = (0.0f32, 0.0f32);
            for (sum, x) in sum.iter_mut().zip(key) {
                *sum += scale * x;
                along += scale * x * *sum;
                length += *sum * *sum;
            }
            let score = if length > 0.0 { -along / length.sqrt() } else { 0.0 };
            // SAFETY: each (token, head) belongs to one task.
            let own = unsafe { out.slice((s.start + t) * heads.kv + head, 1) };
            own[0] = score;
        }
    });
    if let Some(state) = state {
        let state = state.as_f32_mut()?;
        for (s, sums) in sequences.list().iter().zip(sums.chunks_exact(heads.kv * d)) {
            state[s.slot * heads.kv * d..][..heads.kv * d].copy_from_slice(sums);
        }
    }
    Ok(())
}
