//! The thread that owns the model: continuous batching over the slots of one state.

use std::sync::Arc;

use liger_model::{
    Adapter, Decoder, Error, GenerateOptions, Generator, Result, State, StopStrings, TextStream, Tokenizer,
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tokio::sync::mpsc::{Receiver, UnboundedSender};

use crate::scores::{Asked, TokenScore};

/// Tokens of a prompt that are read between two steps of the others: what they wait for at most.
const CHUNK: usize = 256;

/// A text to write.
pub(crate) struct Work {
    /// Not empty.
    pub(crate) prompt: Vec<u32>,
    pub(crate) options: GenerateOptions,
    pub(crate) stop: Vec<String>,
    /// Log-probabilities, if they are asked for.
    pub(crate) scores: Option<Asked>,
    /// A receiver that is gone ends the work.
    pub(crate) events: UnboundedSender<Event>,
}

/// What comes of it.
#[derive(Debug)]
pub(crate) enum Event {
    Text(String),
    /// Of the next token of the prompt or of the answer, a token that ends it included.
    Score(TokenScore),
    Done(Finish),
    Failed(Failure),
}

/// Why there is no text.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The request asks for what the model cannot do.
    Refused(String),
    /// The device or the tokenizer failed.
    Broken(String),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Refused(message) => Self::Refused(message),
            Error::Device(e @ liger_tensor::Error::TokenOutOfRange { .. }) => Self::Refused(e.to_string()),
            other => Self::Broken(other.to_string()),
        }
    }
}

/// How a text ended, and the tokens written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Finish {
    pub(crate) at_limit: bool,
    pub(crate) tokens: usize,
}

pub(crate) struct Engine {
    pub(crate) decoder: Decoder,
    pub(crate) adapter: Option<Adapter>,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) state: State,
    pub(crate) queue: Receiver<Work>,
}

/// A text in a slot.
struct Running<'a> {
    work: Work,
    /// Tokens of the prompt that the state has taken in.
    read: usize,
    /// Prompt and what was written.
    seen: Vec<u32>,
    written: usize,
    rng: ChaCha8Rng,
    tokenizer: &'a Tokenizer,
    stream: TextStream<'a>,
    stop: StopStrings,
}

impl<'a> Running<'a> {
    fn new(work: Work, tokenizer: &'a Tokenizer) -> Self {
        Self {
            read: 0,
            seen: work.prompt.clone(),
            written: 0,
            rng: ChaCha8Rng::seed_from_u64(work.options.seed),
            tokenizer,
            stream: TextStream::new(tokenizer, &work.prompt),
            stop: StopStrings::new(&work.stop),
            work,
        }
    }

    fn is_read(&self) -> bool {
        self.read == self.work.prompt.len()
    }

    /// Scores the prompt's tokens after `from`, given the logits `[., V]` of what comes after it and after those behind it.
    fn score_prompt(&self, from: usize, logits: &[f32], vocabulary: usize, asked: Asked) -> Result<()> {
        let Work { prompt, events, .. } = &self.work;
        if from == 0 {
            let _ = events.send(Event::Score(TokenScore::first(self.tokenizer, prompt[0])?));
        }
        for (row, id) in logits.chunks_exact(vocabulary).zip(&prompt[from + 1..]) {
            let _ = events.send(Event::Score(TokenScore::of(self.tokenizer, row, *id, asked.top)?));
        }
        Ok(())
    }

    /// The next token of logits `[V]`; whether the text goes on.
    fn take(&mut self, logits: &mut [f32]) -> Result<bool> {
        let Work { options, events, scores, .. } = &self.work;
        if options.max_tokens == 0 {
            self.end(true);
            return Ok(false);
        }
        let as_given = scores.map(|asked| (asked.top, logits.to_vec()));
        let id = options.sampling.pick(logits, &self.seen, &mut self.rng);
        if let Some((top, logits)) = as_given {
            let _ = events.send(Event::Score(TokenScore::of(self.tokenizer, &logits, id, top)?));
        }
        if options.stop_ids.contains(&id) {
            self.end(false);
            return Ok(false);
        }
        self.seen.push(id);
        self.written += 1;
        let (piece, stopped) = self.stop.push(&self.stream.push(id)?);
        let is_heard = events.send(Event::Text(piece)).is_ok();
        if stopped || self.written == options.max_tokens {
            self.end(!stopped);
            return Ok(false);
        }
        Ok(is_heard)
    }

    fn end(&mut self, at_limit: bool) {
        let rest = self.stop.finish();
        let _ = self.work.events.send(Event::Text(rest));
        let _ = self.work.events.send(Event::Done(Finish { at_limit, tokens: self.written }));
    }
}

impl Engine {
    /// Works until nobody can send work any more.
    pub(crate) fn run(self) {
        let Self { decoder, adapter, tokenizer, mut state, mut queue } = self;
        let generator = Generator { decoder: &decoder, adapter: adapter.as_ref() };
        let mut slots: Vec<Option<Running<'_>>> = (0..state.slots()).map(|_| None).collect();
        let mut turn = 0;
        loop {
            while let Some(slot) = slots.iter().position(Option::is_none) {
                let is_idle = slots.iter().all(Option::is_none);
                let Some(work) = (if is_idle { queue.blocking_recv() } else { queue.try_recv().ok() }) else {
                    if is_idle {
                        return;
                    }
                    break;
                };
                if work.events.is_closed() {
                    continue;
                }
                match state.reset(slot, decoder.ops()) {
                    Ok(()) => slots[slot] = Some(Running::new(work, &tokenizer)),
                    Err(e) => drop(work.events.send(Event::Failed(e.into()))),
                }
            }
            // One chunk of one prompt, in turns, so that a long one holds up nobody.
            turn += 1;
            let reading = (0..slots.len()).map(|i| (turn + i) % slots.len());
            let reading = reading.into_iter().find(|&slot| slots[slot].as_ref().is_some_and(|r| !r.is_read()));
            if let Some(slot) = reading {
                settle(&mut slots[slot], |running| read_chunk(running, &generator, &mut state, slot));
            }
            step(&mut slots, &generator, &mut state);
        }
    }
}

/// Does something with a text, and empties its slot if it ends or fails.
fn settle(slot: &mut Option<Running<'_>>, act: impl FnOnce(&mut Running<'_>) -> Result<bool>) {
    let Some(running) = slot else { return };
    match act(running) {
        Ok(true) => {}
        Ok(false) => *slot = None,
        Err(e) => {
            let _ = running.work.events.send(Event::Failed(e.into()));
            *slot = None;
        }
    }
}

fn read_chunk(running: &mut Running<'_>, generator: &Generator<'_>, state: &mut State, slot: usize) -> Result<bool> {
    if running.work.events.is_closed() {
        return Ok(false);
    }
    let end = running.work.prompt.len().min(running.read + CHUNK);
    let ids = &running.work.prompt[running.read..end];
    let mut logits = match running.work.scores.filter(|asked| asked.echo) {
        None => generator.prefill(state, slot, ids)?,
        Some(asked) => {
            let mut rows = generator.prefill_scoring(state, slot, ids)?;
            let vocabulary = generator.decoder.config().vocab_size;
            running.score_prompt(running.read, &rows, vocabulary, asked)?;
            rows.split_off(rows.len() - vocabulary)
        }
    };
    running.read = end;
    if running.is_read() { running.take(&mut logits) } else { Ok(true) }
}

/// One token for every text that has been read.
fn step(slots: &mut [Option<Running<'_>>], generator: &Generator<'_>, state: &mut State) {
    // A model with softmax attention has a context, and a text at its end is over; the others go on.
    let limit = generator.decoder.context_limit().unwrap_or(usize::MAX);
    for (slot, place) in slots.iter_mut().enumerate() {
        if state.position(slot) >= limit
            && let Some(mut running) = place.take_if(|running| running.is_read())
        {
            running.end(true);
        }
    }
    let last = |slot: &Option<Running<'_>>| slot.as_ref().filter(|r| r.is_read()).and_then(|r| r.seen.last().copied());
    let tokens: Vec<(usize, u32)> = slots.iter().enumerate().filter_map(|(i, s)| Some((i, last(s)?))).collect();
    if tokens.is_empty() {
        return;
    }
    let ops = generator.decoder.ops();
    let logits = generator.step(state, &tokens).and_then(|logits| Ok(ops.download(logits)?));
    match logits {
        Ok(mut logits) => {
            let rows = logits.chunks_mut(generator.decoder.config().vocab_size);
            for (&(slot, _), row) in tokens.iter().zip(rows) {
                settle(&mut slots[slot], |running| running.take(row));
            }
        }
        Err(e) => {
            let message = e.to_string();
            for &(slot, _) in &tokens {
                if let Some(running) = slots[slot].take() {
                    let _ = running.work.events.send(Event::Failed(Failure::Broken(message.clone())));
                }
            }
        }
    }
}
