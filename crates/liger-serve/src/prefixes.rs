//! Beginnings of prompts whose states are at hand, so that a system prompt or an earlier turn is not read again.
//!
//! States are kept at multiples of a chunk, where reading without the cache stops too: what follows is computed from the same
//! numbers in the same pieces, so cached and uncached answers are equal bit by bit. Their memory is taken at the start.

use liger_model::{Decoder, Result, State};

struct Entry {
    tokens: Vec<u32>,
    state: State,
    last_use: u64,
}

/// A bounded set of states by the tokens that lead to them; the one that was used longest ago goes first.
pub(crate) struct Prefixes {
    entries: Vec<Entry>,
    chunk: usize,
    uses: u64,
}

impl Prefixes {
    /// Room for `count` states.
    pub(crate) fn new(decoder: &Decoder, count: usize, chunk: usize) -> Result<Self> {
        let empty = || Ok(Entry { tokens: Vec::new(), state: decoder.new_state(1)?, last_use: 0 });
        Ok(Self { entries: (0..count).map(|_| empty()).collect::<Result<_>>()?, chunk, uses: 0 })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.entries.iter().map(|entry| entry.state.bytes()).sum()
    }

    /// The longest beginning of `prompt` that is at hand, short of its last token, which has to be read for what comes next.
    pub(crate) fn longest(&mut self, prompt: &[u32]) -> Option<&State> {
        let fits = |entry: &&mut Entry| {
            !entry.tokens.is_empty() && entry.tokens.len() < prompt.len() && prompt.starts_with(&entry.tokens)
        };
        let found = self.entries.iter_mut().filter(fits).max_by_key(|entry| entry.tokens.len())?;
        self.uses += 1;
        found.last_use = self.uses;
        Some(&found.state)
    }

    /// Where states of this prompt are worth keeping: at its last whole chunk, and where it leaves the beginning that it has in
    /// common with another, such as a system prompt.
    pub(crate) fn marks(&self, prompt: &[u32]) -> Vec<usize> {
        if self.entries.is_empty() {
            return Vec::new();
        }
        let whole = |tokens: usize| tokens / self.chunk * self.chunk;
        let common = |entry: &Entry| entry.tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        let branch = self.entries.iter().map(common).max().unwrap_or(0);
        let mut marks = vec![whole(branch), whole(prompt.len() - 1)];
        marks.retain(|&mark| mark > 0);
        marks.dedup();
        marks
    }

    /// Keeps the state of a slot that has read exactly `tokens`.
    pub(crate) fn keep(&mut self, tokens: &[u32], slot: usize, state: &State, decoder: &Decoder) -> Result<()> {
        if self.entries.iter().any(|entry| entry.tokens == tokens) {
            return Ok(());
        }
        let Some(oldest) = self.entries.iter_mut().min_by_key(|entry| entry.last_use) else { return Ok(()) };
        self.uses += 1;
        // A copy that fails must not be found.
        oldest.tokens.clear();
        state.take(slot, &mut oldest.state, decoder.ops())?;
        (oldest.tokens, oldest.last_use) = (tokens.to_vec(), self.uses);
        Ok(())
    }
}
