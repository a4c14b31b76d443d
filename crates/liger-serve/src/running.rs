//! A text in a slot: from its prompt to its end.

use std::time::Instant;

use liger_model::{Chooser, Result, State, StopStrings, TextStream, Tokenizer};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::engine::{Event, Failure, Finish, Work};
use crate::metrics::Metrics;
use crate::scores::{Asked, TokenScore};

/// A text that is being read or written.
pub(crate) struct Running<'a> {
    pub(crate) work: Work,
    /// Tokens of the prompt that the state has taken in, and how many of them it had from the start.
    pub(crate) read: usize,
    pub(crate) cached: usize,
    /// Where the state of the prompt's beginning is worth keeping.
    pub(crate) marks: Vec<usize>,
    /// Prompt and what was written.
    seen: Vec<u32>,
    rng: ChaCha8Rng,
    tokenizer: &'a Tokenizer,
    stream: TextStream<'a>,
    stop: StopStrings,
    last_token: Option<Instant>,
    metrics: &'a Metrics,
}

impl<'a> Running<'a> {
    pub(crate) fn new(work: Work, tokenizer: &'a Tokenizer, metrics: &'a Metrics) -> Self {
        Self {
            read: 0,
            cached: 0,
            marks: Vec::new(),
            seen: work.prompt.clone(),
            rng: ChaCha8Rng::seed_from_u64(work.options.seed),
            tokenizer,
            stream: TextStream::new(tokenizer, &work.prompt),
            stop: StopStrings::new(&work.stop),
            last_token: None,
            metrics,
            work,
        }
    }

    pub(crate) fn is_read(&self) -> bool {
        self.read == self.work.prompt.len()
    }

    /// The token that the state takes in next.
    pub(crate) fn last(&self) -> Option<u32> {
        self.seen.last().copied()
    }

    fn written(&self) -> &[u32] {
        &self.seen[self.work.prompt.len()..]
    }

    pub(crate) fn chooser(&mut self) -> Chooser<'_> {
        let shows_logits = self.work.scores.is_some();
        Chooser { sampling: &self.work.options.sampling, seen: &self.seen, rng: &mut self.rng, shows_logits }
    }

    /// Scores the prompt's tokens after `from`, given the logits `[., V]` of what comes after it and after those behind it.
    pub(crate) fn score_prompt(&self, from: usize, logits: &[f32], vocabulary: usize, asked: Asked) -> Result<()> {
        let Work { prompt, events, .. } = &self.work;
        if from == 0 {
            let _ = events.send(Event::Score(TokenScore::first(self.tokenizer, prompt[0])?));
        }
        for (row, id) in logits.chunks_exact(vocabulary).zip(&prompt[from + 1..]) {
            let _ = events.send(Event::Score(TokenScore::of(self.tokenizer, row, *id, asked.top)?));
        }
        Ok(())
    }

    /// The first token, from the logits `[V]` after the prompt.
    pub(crate) fn begin(&mut self, logits: &[f32]) -> Result<Option<Finish>> {
        if self.work.options.max_tokens == 0 {
            return Ok(Some(self.finish(true)));
        }
        let id = self.work.options.sampling.pick(&mut logits.to_vec(), &self.seen, &mut self.rng);
        self.take(id, Some(logits))
    }

    /// Takes a token, with the logits `[V]` that it was chosen from where they are at hand; how the text ended, if it did.
    pub(crate) fn take(&mut self, id: u32, logits: Option<&[f32]>) -> Result<Option<Finish>> {
        match self.last_token.replace(Instant::now()) {
            None => self.metrics.first_token.add(self.work.asked_at.elapsed()),
            Some(before) => self.metrics.between_tokens.add(before.elapsed()),
        }
        let Work { options, events, scores, .. } = &self.work;
        if let (Some(asked), Some(logits)) = (scores, logits) {
            let _ = events.send(Event::Score(TokenScore::of(self.tokenizer, logits, id, asked.top)?));
        }
        if options.stop_ids.contains(&id) {
            return Ok(Some(self.finish(false)));
        }
        let most = options.max_tokens;
        self.seen.push(id);
        Metrics::add(&self.metrics.written_tokens, 1);
        let (piece, stopped) = self.stop.push(&self.stream.push(id)?);
        let _ = self.work.events.send(Event::Text(piece));
        let is_over = stopped || self.written().len() == most;
        Ok(is_over.then(|| self.finish(!stopped)))
    }

    /// The text is over.
    pub(crate) fn finish(&self, at_limit: bool) -> Finish {
        Finish { at_limit, tokens: self.written().len(), cached: self.cached }
    }

    /// Tells the client the end; `state` is what is kept of it.
    pub(crate) fn end(mut self, finish: Finish, state: Option<State>) {
        let events = self.work.events.clone();
        let _ = events.send(Event::Text(self.stop.finish()));
        if let Some(state) = state {
            let _ = events.send(Event::Kept { state: Box::new(state), written: self.written().to_vec() });
        }
        let _ = events.send(Event::Done(finish));
    }

    pub(crate) fn fail(self, failure: Failure) {
        Metrics::add(&self.metrics.failed, 1);
        let _ = self.work.events.send(Event::Failed(failure));
    }
}
