//! Keys that stay when they leave the window: which ones, and the scores that say so.

use liger_tensor::checks::Heads;
use liger_tensor::{Attention, AttentionSpec, Error, KeptKeys, KeyValueCache, Result, Sequences, Tensor};

use super::{Source, kv_at, query_at};
use crate::math::add_scaled;
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
    /// Sum of the queries of the last stretch, `[group, D]`.
    queries: Vec<f32>,
}

/// Where scores, keys and queries of one head of a sequence come from.
struct Candidates<'a> {
    window: usize,
    new_scores: &'a [f32],
    /// Of the cache's rows.
    held_scores: Option<&'a [f32]>,
    keys: Source<'a>,
    q: &'a [f32],
    /// Sum of the queries of the stretch that the token before this batch is in.
    held_queries: Option<&'a [f32]>,
}

impl Candidates<'_> {
    fn score(&self, position: usize) -> f32 {
        let Source { spec, sequence: s, heads, head, .. } = self.keys;
        match (position.checked_sub(s.position), self.held_scores) {
            _ if position < spec.sinks => f32::INFINITY,
            (Some(t), _) => self.new_scores[(s.start + t) * heads.kv + head],
            (None, Some(held)) => held[spec.cache_row(position)],
            (None, None) => f32::NEG_INFINITY,
        }
    }

    /// Sum of the queries of a stretch.
    fn queries(&self, stretch: usize) -> Vec<f32> {
        let Source { sequence: s, heads, head, .. } = self.keys;
        let width = heads.group() * heads.dim;
        let mut sum = vec![0.0f32; width];
        if let (Some(held), Some(last)) = (self.held_queries, s.position.checked_sub(1))
            && last / self.window == stretch
        {
            sum.copy_from_slice(held);
        }
        let rows = (stretch * self.window).max(s.position)..((stretch + 1) * self.window).min(s.position + s.len);
        for position in rows {
            let at = query_at(heads, s.start + position - s.position, head);
            add_scaled(&mut sum, 1.0, &self.q[at..at + width]);
        }
        sum
    }

    /// How much the mean query of each head of the group likes a key.
    fn liking(&self, key: Key, queries: &[f32]) -> f32 {
        let d = self.keys.heads.dim;
        let row = self.keys.row(key);
        let scale = 1.0 / ((d as f32).sqrt() * self.window as f32);
        let scores = queries.chunks_exact(d).map(|q| scale * q.iter().zip(row).map(|(q, k)| q * k).sum::<f32>());
        let scores: Vec<f32> = scores.collect();
        let best = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        best + scores.iter().map(|score| (score - best).exp()).sum::<f32>().ln()
    }

    fn choose(&self) -> Kept {
        let (Source { spec, sequence: s, .. }, window) = (&self.keys, self.window);
        // Stretches taken in before this batch: all but the last two of the tokens so far.
        let mut taken = (s.position.saturating_sub(1) / window).saturating_sub(1);
        let filled = spec.slots().min(taken * window);
        let mut keys: Vec<Key> = (0..filled).map(Key::Slot).collect();
        let mut scores: Vec<f32> = self.held_scores.map_or(Vec::new(), |held| held[..filled].to_vec());
        let (first_stretch, last) = (s.position / window, (s.position + s.len - 1) / window);
        let mut stretches = Vec::with_capacity(last + 1 - first_stretch);
        for stretch in first_stretch..=last {
            if taken + 1 < stretch {
                let queries = self.queries(stretch - 1);
                let new: Vec<(Key, f32)> =
                    (taken * window..(taken + 1) * window).map(|p| (Key::At(p), self.score(p))).collect();
                take_in(*spec, &mut keys, &mut scores, &new, |key| self.liking(key, &queries));
                taken += 1;
            }
            stretches.push(keys.clone());
        }
        Kept { first_stretch, stretches, scores, queries: self.queries(last) }
    }
}

impl Kept {
    /// The slots of a stretch.
    pub(super) fn at(&self, stretch: usize) -> &[Key] {
        &self.stretches[stretch - self.first_stretch]
    }
}

/// Those that come in take the places of those that go, in order.
fn take_in(
    spec: AttentionSpec,
    keys: &mut Vec<Key>,
    scores: &mut Vec<f32>,
    new: &[(Key, f32)],
    liking: impl Fn(Key) -> f32,
) {
    let (held, count) = (keys.len(), keys.len() + new.len());
    let score = |i: usize| if i < held { scores[i] } else { new[i - held].1 };
    let mut stays = vec![false; count];
    best(&(0..count).map(score).collect::<Vec<_>>(), held, spec.kept_by_score()).for_each(|i| stays[i] = true);
    let key = |i: usize| if i < held { keys[i] } else { new[i - held].0 };
    let liked: Vec<f32> = (0..count).map(|i| if stays[i] { f32::INFINITY } else { liking(key(i)) }).collect();
    best(&liked, held, spec.slots()).for_each(|i| stays[i] = true);
    let free: Vec<usize> = (0..held).filter(|&i| !stays[i]).chain(held..spec.slots()).collect();
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

/// The `most` largest. Of equal ones the held come first, the last slot before the first one, then the new in their order.
fn best(values: &[f32], held: usize, most: usize) -> impl Iterator<Item = usize> + use<> {
    let place = |i: usize| if i < held { held - 1 - i } else { i };
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]).then(place(a).cmp(&place(b))));
    order.into_iter().take(most)
}

/// What is kept for every head of every sequence, `[sequences, K]`; nothing where the spec keeps none.
pub(super) fn select(inputs: &Attention<'_>, heads: Heads, cache: Option<&KeyValueCache>) -> Result<Vec<Kept>> {
    let Attention { q, k, scores, sequences, spec, .. } = *inputs;
    let (Some(window), Some(scores)) = (spec.window.filter(|_| spec.kept > 0), scores) else { return Ok(Vec::new()) };
    let (q, new, new_scores) = (q.as_f32()?, k.as_f32()?, scores.as_f32()?);
    let held = match cache {
        Some(cache) => {
            let KeptKeys { scores, queries } = remembered(cache)?;
            Some((cache.keys.as_f32()?, scores.as_f32()?, queries.as_f32()?))
        }
        None => None,
    };
    let (cache_rows, width) = (spec.cache_rows(), heads.group() * heads.dim);
    let mut kept = Vec::with_capacity(sequences.list().len() * heads.kv);
    for &sequence in sequences.list() {
        for head in 0..heads.kv {
            let place = sequence.slot * heads.kv + head;
            let keys = Source { new, past: held.map(|h| h.0), cache_rows, spec, sequence, heads, head };
            let held_scores = held.map(|h| &h.1[place * cache_rows..][..cache_rows]);
            let held_queries = held.map(|h| &h.2[place * width..][..width]);
            kept.push(Candidates { window, new_scores, held_scores, keys, q, held_queries }.choose());
        }
    }
    Ok(kept)
}

fn remembered(cache: &KeyValueCache) -> Result<&KeptKeys> {
    const NAME: &str = "attention_forward";
    let missing = Error::Storage { operation: NAME, found: "no scores", expected: "a cache with scores and queries" };
    cache.kept.as_ref().ok_or(missing)
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
        if let Some(KeptKeys { scores, queries }) = &mut cache.kept {
            scores.as_f32_mut()?[base..base + kept.scores.len()].copy_from_slice(&kept.scores);
            let width = kept.queries.len();
            queries.as_f32_mut()?[(sequence.slot * heads.kv + head) * width..][..width].copy_from_slice(&kept.queries);
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
