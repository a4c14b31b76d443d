//! What softmax attention takes: which keys a query sees, inputs and gradients, and the cache of keys and values.

use std::ops::Range;

use crate::{Sequences, Tensor};

/// Which earlier keys a query sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionSpec {
    /// The last `window` keys, its own counted; all of them if `None`.
    pub window: Option<usize>,
    /// The first `sinks` keys of the text stay visible besides the window.
    pub sinks: usize,
    /// So many of the keys that have left the window stay visible too; 0 for none. The window then moves in stretches of its
    /// own size: a query sees its own stretch, the one before, and the keys kept of all earlier ones. When a stretch begins,
    /// of the keys that are held and those of the stretch before the last, sinks and half of the others stay for their
    /// scores; the rest for what the queries of the last stretch like best: log sum over the heads of a group of
    /// exp(mean query . key / sqrt(D)).
    pub kept: usize,
    /// A kept key (or sink beside such) that is more tokens before the first of the window counts as so many before it: its
    /// rotation by RoPE is moved on. For texts longer than the model was trained for.
    pub reach: Option<usize>,
}

impl AttentionSpec {
    /// A window and the first keys of the text.
    pub const fn window(window: usize, sinks: usize) -> Self {
        Self { window: Some(window), sinks, kept: 0, reach: None }
    }

    /// Attention to everything before.
    pub const EVERYTHING: Self = Self { window: None, sinks: 0, kept: 0, reach: None };

    /// Positions by which the kept key at `key` is moved on for the query at `query`.
    pub fn turn(self, query: usize, key: usize) -> usize {
        self.reach.map_or(0, |reach| self.window_start(query).saturating_sub(reach + key))
    }

    /// Rows of a cache before the ring: sinks and kept keys.
    pub fn slots(self) -> usize {
        self.sinks + self.kept
    }

    /// Keys that are kept for their scores: sinks and half of the others.
    pub fn kept_by_score(self) -> usize {
        self.sinks + self.kept / 2
    }

    /// Rows of a cache; 0 without a window: it grows.
    pub fn cache_rows(self) -> usize {
        self.window.map_or(0, |window| self.slots() + self.ring(window))
    }

    fn ring(self, window: usize) -> usize {
        if self.kept > 0 { 2 * window } else { window }
    }

    /// The row of a cache that the key at `position` goes to: the ring's, but for sinks without kept keys.
    pub fn cache_row(self, position: usize) -> usize {
        match self.window {
            Some(window) if self.kept > 0 => self.slots() + position % self.ring(window),
            Some(window) if position >= self.sinks => self.sinks + (position - self.sinks) % window,
            _ => position,
        }
    }

    /// Rows of a cache that the token at `position` sees, its own already there; some of the ranges may be empty.
    pub fn rows_in_use(self, position: usize) -> [Range<usize>; 3] {
        let Some(window) = self.window else { return [0..position + 1, 0..0, 0..0] };
        if self.kept == 0 {
            return [0..(position + 1).min(self.sinks + window), 0..0, 0..0];
        }
        let (stretch, own) = (position / window, position % window + 1);
        let start = |stretch: usize| self.slots() + stretch % 2 * window;
        let newest = start(stretch)..start(stretch) + own;
        match stretch.checked_sub(1) {
            Some(last) => [0..self.slots().min(last * window), start(last)..start(last) + window, newest],
            None => [0..0, 0..0, newest],
        }
    }

    /// First position of the window of the query at `position`.
    pub fn window_start(self, position: usize) -> usize {
        match self.window {
            Some(window) if self.kept > 0 => (position / window).saturating_sub(1) * window,
            Some(window) => (position + 1).saturating_sub(window),
            None => 0,
        }
    }
}

/// Inputs of softmax attention, after RoPE.
#[derive(Clone, Copy)]
pub struct Attention<'a> {
    /// `[N, H, D]`.
    pub q: &'a Tensor,
    /// `[N, K, D]`.
    pub k: &'a Tensor,
    /// `[N, K, D]`.
    pub v: &'a Tensor,
    /// Where keys are kept: what it takes to choose and to move them.
    pub keeping: Option<Keeping<'a>>,
    /// The sequences of the N rows.
    pub sequences: &'a Sequences,
    /// Which keys a query sees.
    pub spec: AttentionSpec,
}

/// Inputs of an attention that keeps keys, both in float32.
#[derive(Clone, Copy)]
pub struct Keeping<'a> {
    /// Of the keys, `[N, K]`: [`Ops::key_novelty`](crate::Ops::key_novelty).
    pub scores: &'a Tensor,
    /// Frequencies of RoPE in revolutions a token, `[2, D/2]`: the float32 nearest to each, and what is missing to its float64
    /// value.
    pub frequencies: &'a Tensor,
}

/// Gradients of the inputs of an [`Attention`], each overwritten. Scores have none: which keys stay is not differentiated.
pub struct AttentionGradients<'a> {
    /// `[N, H, D]`.
    pub q: &'a mut Tensor,
    /// `[N, K, D]`.
    pub k: &'a mut Tensor,
    /// `[N, K, D]`.
    pub v: &'a mut Tensor,
}

/// Keys (after RoPE) and values that later tokens may still see, for each slot of a decoding state.
#[derive(Debug)]
pub struct KeyValueCache {
    /// Which keys are ever needed again.
    pub spec: AttentionSpec,
    /// `[slots, K, rows, D]`; with a window the rows are sinks, kept keys, and a ring over positions;
    /// without one, row = position, and the cache grows.
    pub keys: Tensor,
    /// `[slots, K, rows, D]`.
    pub values: Tensor,
    /// Where keys are kept: what it takes to choose them.
    pub kept: Option<KeptKeys>,
}

/// What a cache remembers to choose the keys that stay, in float32.
#[derive(Debug)]
pub struct KeptKeys {
    /// Scores of all rows, `[slots, K, rows]`.
    pub scores: Tensor,
    /// Positions of what sinks and kept keys hold, `[slots, K, sinks + kept]`.
    pub positions: Tensor,
    /// Sums of the queries of the last stretch so far, `[slots, H, D]`.
    pub queries: Tensor,
}

impl KeyValueCache {
    /// Bytes of the memory held.
    pub fn bytes(&self) -> usize {
        let kept =
            self.kept.as_ref().map_or(0, |kept| kept.scores.bytes() + kept.positions.bytes() + kept.queries.bytes());
        self.keys.bytes() + self.values.bytes() + kept
    }
}
