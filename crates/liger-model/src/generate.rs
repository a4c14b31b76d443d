//! Writing text: prefill in chunks of bounded memory, then one token at a time.

use liger_tensor::{Ops, Sequences, StepOps, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::adapter::Adapter;
use crate::decoder::Decoder;
use crate::error::{Error, Result};
use crate::sampling::{Chooser, Sampling, choose};
use crate::state::State;

/// Tokens that a prefill runs at once: enough to fill the device, few enough for bounded memory.
fn prefill_chunk(ops: &dyn Ops) -> usize {
    if ops.memory().is_some() { 4096 } else { 512 }
}

/// A model that writes.
#[derive(Clone, Copy)]
pub struct Generator<'a> {
    /// The model.
    pub decoder: &'a Decoder,
    /// Its adapter.
    pub adapter: Option<&'a Adapter>,
}

impl Generator<'_> {
    /// Takes tokens into a slot of the state; the logits `[V]` of what comes next.
    ///
    /// # Errors
    /// [`Error::Refused`] if the text would be longer than a model with softmax layers was trained for, or if there
    /// are no tokens.
    pub fn prefill(&self, state: &mut State, slot: usize, ids: &[u32]) -> Result<Vec<f32>> {
        self.check_length(state.position(slot), ids.len())?;
        let mut last = None;
        for chunk in ids.chunks(prefill_chunk(self.decoder.ops())) {
            let mut sequences = Sequences::default();
            sequences.push(chunk.len(), state.position(slot), slot);
            let hidden = self.decoder.forward(chunk, &sequences, Some(state), self.adapter)?;
            last = Some((hidden, chunk.len() - 1));
        }
        let (hidden, row) = last.ok_or_else(|| Error::Refused("nothing to go on: the prompt is empty".into()))?;
        let ops = self.decoder.ops();
        let mut one = ops.empty(&[1, hidden.dim(1)])?;
        ops.copy_rows(&mut one, &hidden, row)?;
        Ok(ops.download(&self.decoder.logits(&one)?)?)
    }

    /// The same in one piece, with the logits `[ids, V]` of what comes after every token: their memory grows with `ids`.
    ///
    /// # Errors
    /// As [`Generator::prefill`].
    pub fn prefill_scoring(&self, state: &mut State, slot: usize, ids: &[u32]) -> Result<Vec<f32>> {
        self.check_length(state.position(slot), ids.len())?;
        let mut sequences = Sequences::default();
        sequences.push(ids.len(), state.position(slot), slot);
        let hidden = self.decoder.forward(ids, &sequences, Some(state), self.adapter)?;
        Ok(self.decoder.ops().download(&self.decoder.logits(&hidden)?)?)
    }

    /// One token for each of these slots; logits `[slots, V]`.
    ///
    /// # Errors
    /// As [`Generator::prefill`].
    pub fn step<'s>(&self, state: &'s mut State, tokens: &[(usize, u32)]) -> Result<&'s Tensor> {
        for (slot, _) in tokens {
            self.check_length(state.position(*slot), 1)?;
        }
        self.decoder.step(state, tokens, self.adapter)
    }

    /// Does once the most that a server does: reads `chunk` tokens, with and without the logits of all, and writes with every
    /// number of texts. A device with memory of its own has taken all that it needs then, recorded its steps, and
    /// [settles](Ops::settle_memory). Slots are empty afterwards.
    ///
    /// # Errors
    /// If that memory cannot be had.
    pub fn warm_up(&self, state: &mut State, chunk: usize) -> Result<()> {
        let ops = self.decoder.ops();
        if ops.memory().is_none() {
            return Ok(());
        }
        ops.trim();
        let ids = vec![0; chunk.min(self.decoder.context_limit().unwrap_or(chunk))];
        self.prefill(state, 0, &ids)?;
        state.reset(0, ops)?;
        self.prefill_scoring(state, 0, &ids)?;
        let most = ops.steps().map_or(1, StepOps::most_texts).min(state.slots());
        for slot in 0..most {
            state.reset(slot, ops)?;
        }
        for texts in 1..=most {
            let tokens: Vec<(usize, u32)> = (0..texts).map(|slot| (slot, 0)).collect();
            // Once to load, once to record.
            for _ in 0..2 {
                ops.argmax(self.decoder.step(state, &tokens, self.adapter)?)?;
            }
        }
        for slot in 0..most {
            state.reset(slot, ops)?;
        }
        ops.settle_memory();
        Ok(())
    }

    fn check_length(&self, seen: usize, more: usize) -> Result<()> {
        match self.decoder.context_limit() {
            Some(limit) if seen + more > limit => Err(Error::Refused(format!(
                "{} tokens are more than this model's context of {limit}: it has softmax attention over everything; \
                 shorten the text, or convert the model (`liger linearize`): a Liger model has no such limit",
                seen + more
            ))),
            _ => Ok(()),
        }
    }

    /// Writes after `prompt` until `tell` says stop, a token of `stop_ids` comes, or `max_tokens` are out. The stop
    /// token is not told.
    ///
    /// # Errors
    /// As [`Generator::prefill`], or what `tell` returns.
    pub fn generate(
        &self,
        state: &mut State,
        prompt: &[u32],
        options: &GenerateOptions,
        tell: &mut dyn FnMut(u32) -> Result<bool>,
    ) -> Result<Vec<u32>> {
        let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
        let mut seen = prompt.to_vec();
        let mut logits = self.prefill(state, 0, prompt)?;
        let mut id = options.sampling.pick(&mut logits, &seen, &mut rng);
        for produced in 1..=options.max_tokens {
            if options.stop_ids.contains(&id) {
                break;
            }
            seen.push(id);
            if !tell(id)? || produced == options.max_tokens {
                break;
            }
            let logits = self.step(state, &[(0, id)])?;
            let (sampling, seen) = (&options.sampling, &seen);
            let text = Chooser { sampling, seen, rng: &mut rng, shows_logits: false };
            let (chosen, _) = choose(self.decoder.ops(), logits, &mut [text])?;
            id = chosen.first().copied().unwrap_or_default();
        }
        Ok(seen.split_off(prompt.len()))
    }
}

/// Settings of [`Generator::generate`].
#[derive(Debug, Clone)]
pub struct GenerateOptions {
    /// Tokens at most.
    pub max_tokens: usize,
    /// How each is chosen.
    pub sampling: Sampling,
    /// The same seed gives the same text.
    pub seed: u64,
    /// Tokens that end the text.
    pub stop_ids: Vec<u32>,
}

/// Finds stop strings in text that arrives in pieces.
#[derive(Debug, Default)]
pub struct StopStrings {
    strings: Vec<String>,
    held: String,
}

impl StopStrings {
    /// Watches for these; empty ones are ignored.
    pub fn new(strings: &[String]) -> Self {
        Self { strings: strings.iter().filter(|s| !s.is_empty()).cloned().collect(), held: String::new() }
    }

    /// Takes text in; gives back what is certainly before any stop string, and whether one was found. Text that may be
    /// the beginning of one waits.
    ///
    /// ```
    /// let mut stop = liger_model::StopStrings::new(&["END".into()]);
    /// assert_eq!(stop.push("one E"), ("one ".into(), false));
    /// assert_eq!(stop.push("ND two"), ("".into(), true));
    /// ```
    pub fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        if let Some(at) = self.strings.iter().filter_map(|s| self.held.find(s.as_str())).min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let keep = self
            .held
            .char_indices()
            .map(|(at, _)| at)
            .find(|&at| self.strings.iter().any(|s| s.starts_with(&self.held[at..])))
            .unwrap_or(self.held.len());
        let waiting = self.held.split_off(keep);
        (std::mem::replace(&mut self.held, waiting), false)
    }

    /// What still waited when the text ended.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}
