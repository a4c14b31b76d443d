//! Keys that stay when they leave the window: which ones, the scores that say so, and how far they are from a query.

use liger_tensor::checks::Heads;
use liger_tensor::{Attention, AttentionSpec, Error, Keeping, KeptKeys, KeyValueCache, Result, Sequences, Tensor};

use super::{Rows, Source, kv_at, query_at};
use crate::math::{add_scaled, dot, sin_cos_of_revolutions};
use crate::parallel::{Disjoint, for_tasks, vectorized};

/// A key that a query sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Key {
    /// That of the token at this position.
    At(usize),
    /// What a slot of the cache has held since before this batch.
    Slot(usize),
}

/// What a slot holds.
#[derive(Debug, Clone, Copy)]
pub(super) struct Held {
    pub(super) key: Key,
    pub(super) position: usize,
    score: f32,
}

/// The keys kept for one head of a sequence.
pub(super) struct Kept {
    first_stretch: usize,
    /// By stretch: what the slots hold for its queries.
    stretches: Vec<Vec<Held>>,
    /// Sum of the queries of the last stretch, `[group, D]`.
    queries: Vec<f32>,
}

/// RoPE's frequencies in revolutions a token: how keys are moved on.
#[derive(Default)]
pub(super) struct Turns(Vec<f64>);

impl Turns {
    pub(super) fn of(frequencies: &Tensor) -> Result<Self> {
        let (nearest, missing) = frequencies.as_f32()?.split_at(frequencies.len() / 2);
        Ok(Self(nearest.iter().zip(missing).map(|(a, b)| f64::from(*a) + f64::from(*b)).collect()))
    }

    /// Rotates a key after RoPE as if its position were `by` larger (or smaller).
    pub(super) fn turn(&self, key: &mut [f32], by: i64) {
        let (first, second) = key.split_at_mut(self.0.len());
        vectorized!(|| {
            for ((x, y), frequency) in first.iter_mut().zip(second.iter_mut()).zip(&self.0) {
                let (sin, cos) = sin_cos_of_revolutions(by as f64 * frequency);
                (*x, *y) = (*x * cos - *y * sin, *y * cos + *x * sin);
            }
        },);
    }
}

/// What a cache remembers of one head of a sequence.
#[derive(Clone, Copy)]
struct Remembered<'a> {
    /// Of the cache's rows.
    scores: &'a [f32],
    /// Of the slots.
    positions: &'a [f32],
    /// Sum of the queries of the stretch that the token before this batch is in.
    queries: &'a [f32],
}

/// Where scores, keys and queries of one head of a sequence come from.
struct Candidates<'a> {
    window: usize,
    new_scores: &'a [f32],
    remembered: Option<Remembered<'a>>,
    keys: Source<'a>,
    q: &'a [f32],
    turns: &'a Turns,
}

impl Candidates<'_> {
    fn score(&self, position: usize) -> f32 {
        let Source { spec, sequence: s, heads, head, .. } = self.keys;
        match (position.checked_sub(s.position), self.remembered) {
            _ if position < spec.sinks => f32::INFINITY,
            (Some(t), _) => self.new_scores[(s.start + t) * heads.kv + head],
            (None, Some(held)) => held.scores[spec.cache_row(position)],
            (None, None) => f32::NEG_INFINITY,
        }
    }

    /// Sum of the queries of a stretch.
    fn queries(&self, stretch: usize) -> Vec<f32> {
        let Source { sequence: s, heads, head, .. } = self.keys;
        let width = heads.group() * heads.dim;
        let mut sum = vec![0.0f32; width];
        if let (Some(held), Some(last)) = (self.remembered, s.position.checked_sub(1))
            && last / self.window == stretch
        {
            sum.copy_from_slice(held.queries);
        }
        let rows = (stretch * self.window).max(s.position)..((stretch + 1) * self.window).min(s.position + s.len);
        for position in rows {
            let at = query_at(heads, s.start + position - s.position, head);
            add_scaled(&mut sum, 1.0, &self.q[at..at + width]);
        }
        sum
    }

    /// How much the mean query of each head of the group likes a key that is moved on by `turn`.
    fn liking(&self, key: Key, turn: usize, queries: &[f32]) -> f32 {
        let d = self.keys.heads.dim;
        let mut row = Vec::with_capacity(d);
        self.keys.append(key, &mut row);
        if turn > 0 {
            self.turns.turn(&mut row, turn as i64);
        }
        let scale = 1.0 / ((d as f32).sqrt() * self.window as f32);
        let mut scores = vec![0.0f32; queries.len() / d];
        vectorized!(|| {
            for (score, q) in scores.iter_mut().zip(queries.chunks_exact(d)) {
                *score = scale * dot(q, &row);
            }
        },);
        let best = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        best + scores.iter().map(|score| (score - best).exp()).sum::<f32>().ln()
    }

    fn choose(&self) -> Kept {
        let (Source { spec, sequence: s, .. }, window) = (&self.keys, self.window);
        // Stretches taken in before this batch: all but the last two of the tokens so far.
        let mut taken = (s.position.saturating_sub(1) / window).saturating_sub(1);
        let mut slots: Vec<Held> = self.remembered.map_or(Vec::new(), |held| {
            let slots = held.scores.iter().zip(held.positions).take(taken * window).enumerate();
            slots
                .map(|(slot, (&score, &position))| Held { key: Key::Slot(slot), position: position as usize, score })
                .collect()
        });
        let (first_stretch, last) = (s.position / window, (s.position + s.len - 1) / window);
        let mut stretches = Vec::with_capacity(last + 1 - first_stretch);
        for stretch in first_stretch..=last {
            if taken + 1 < stretch {
                let queries = self.queries(stretch - 1);
                let coming = (taken * window..(taken + 1) * window).map(|position| Held {
                    key: Key::At(position),
                    position,
                    score: self.score(position),
                });
                let turn = |held: &Held| spec.turn(stretch * window, held.position);
                take_in(*spec, &mut slots, &coming.collect::<Vec<_>>(), |held| {
                    self.liking(held.key, turn(held), &queries)
                });
                taken += 1;
            }
            stretches.push(slots.clone());
        }
        Kept { first_stretch, stretches, queries: self.queries(last) }
    }
}

impl Kept {
    /// The slots of a stretch.
    pub(super) fn at(&self, stretch: usize) -> &[Held] {
        &self.stretches[stretch - self.first_stretch]
    }
}

/// Those that come in take the places of those that go, in order.
fn take_in(spec: AttentionSpec, slots: &mut Vec<Held>, new: &[Held], liking: impl Fn(&Held) -> f32) {
    let held = slots.len();
    let all: Vec<Held> = slots.iter().chain(new).copied().collect();
    let mut stays = vec![false; all.len()];
    let scores: Vec<f32> = all.iter().map(|held| held.score).collect();
    best(&scores, held, spec.kept_by_score()).for_each(|i| stays[i] = true);
    let liked: Vec<f32> =
        all.iter().zip(&stays).map(|(held, &stays)| if stays { f32::INFINITY } else { liking(held) }).collect();
    best(&liked, held, spec.slots()).for_each(|i| stays[i] = true);
    let free: Vec<usize> = (0..held).filter(|&i| !stays[i]).chain(held..spec.slots()).collect();
    let coming = (0..new.len()).filter(|&j| stays[held + j]);
    for (slot, j) in free.into_iter().zip(coming) {
        if slot == slots.len() {
            slots.push(new[j]);
        } else {
            slots[slot] = new[j];
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
pub(super) fn select(
    inputs: &Attention<'_>,
    heads: Heads,
    turns: &Turns,
    cache: Option<&KeyValueCache>,
) -> Result<Vec<Kept>> {
    let Attention { q, k, keeping, sequences, spec, .. } = *inputs;
    let (Some(window), Some(Keeping { scores, .. })) = (spec.window.filter(|_| spec.kept > 0), keeping) else {
        return Ok(Vec::new());
    };
    let (q, new, new_scores) = (q.as_f32()?, k.as_f32()?, scores.as_f32()?);
    let held = match cache {
        Some(cache) => {
            let KeptKeys { scores, positions, queries } = remembered(cache)?;
            Some((Rows::of(&cache.keys)?, [scores.as_f32()?, positions.as_f32()?, queries.as_f32()?]))
        }
        None => None,
    };
    let (cache_rows, width) = (spec.cache_rows(), heads.group() * heads.dim);
    let mut kept: Vec<Option<Kept>> = (0..sequences.list().len() * heads.kv).map(|_| None).collect();
    let all = Disjoint::new(&mut kept);
    for_tasks(sequences.list().len() * heads.kv, |task| {
        let (sequence, head) = (sequences.list()[task / heads.kv], task % heads.kv);
        let place = sequence.slot * heads.kv + head;
        let keys = Source { new, past: held.map(|h| h.0), cache_rows, spec, sequence, heads, head };
        let of_head = |rows: usize| place * rows..(place + 1) * rows;
        let remembered = held.map(|(_, [scores, positions, queries])| Remembered {
            scores: &scores[of_head(cache_rows)],
            positions: &positions[of_head(spec.slots())],
            queries: &queries[of_head(width)],
        });
        let chosen = Candidates { window, new_scores, remembered, keys, q, turns }.choose();
        // SAFETY: each task has its own.
        let own = unsafe { all.slice(task, 1) };
        own[0] = Some(chosen);
    });
    Ok(kept.into_iter().flatten().collect())
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
        let place = sequence.slot * heads.kv + head;
        for (tensor, new) in [(&mut cache.keys, k), (&mut cache.values, v)] {
            let held = tensor.as_f32_mut()?;
            for (slot, Held { key, .. }) in last.iter().enumerate() {
                if let Key::At(_) = key {
                    let past = Some(Rows::F32(held));
                    let mut row = Vec::with_capacity(d);
                    Source { new, past, cache_rows, spec, sequence, heads, head }.append(*key, &mut row);
                    held[(place * cache_rows + slot) * d..][..d].copy_from_slice(&row);
                }
            }
        }
        if let Some(KeptKeys { scores, positions, queries }) = &mut cache.kept {
            let (scores, positions) = (scores.as_f32_mut()?, positions.as_f32_mut()?);
            for (slot, held) in last.iter().enumerate() {
                scores[place * cache_rows + slot] = held.score;
                positions[place * spec.slots() + slot] = held.position as f32;
            }
            let width = kept.queries.len();
            queries.as_f32_mut()?[place * width..][..width].copy_from_slice(&kept.queries);
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
