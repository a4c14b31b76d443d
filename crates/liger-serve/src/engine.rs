//! The thread that owns the model: continuous batching over the slots of one state.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use liger_model::{Adapter, Chooser, Decoder, Error, GenerateOptions, Generator, Result, State, Tokenizer, choose};
use tokio::sync::mpsc::{Receiver, UnboundedSender};

use crate::metrics::Metrics;
use crate::prefixes::Prefixes;
use crate::running::Running;
use crate::scores::{Asked, TokenScore};

/// Tokens of a prompt that are read between two steps of the others: what they wait for at most.
pub(crate) const CHUNK: usize = 256;
/// The longest that a request waits for a slot.
const PATIENCE: Duration = Duration::from_secs(120);

/// A text to write.
pub(crate) struct Work {
    /// Not empty.
    pub(crate) prompt: Vec<u32>,
    pub(crate) options: GenerateOptions,
    pub(crate) stop: Vec<String>,
    /// Log-probabilities, if they are asked for.
    pub(crate) scores: Option<Asked>,
    /// What goes before the prompt; a text of its own without.
    pub(crate) start: Option<Arc<State>>,
    /// Whether the state in the end is sent back.
    pub(crate) keeps: bool,
    pub(crate) asked_at: Instant,
    /// A receiver that is gone ends the work.
    pub(crate) events: UnboundedSender<Event>,
}

/// What comes of it.
#[derive(Debug)]
pub(crate) enum Event {
    Text(String),
    /// Of the next token of the prompt or of the answer, a token that ends it included.
    Score(TokenScore),
    /// The state that has taken in prompt and answer, and the answer's tokens.
    Kept {
        state: Box<State>,
        written: Vec<u32>,
    },
    Done(Finish),
    Failed(Failure),
}

/// Why there is no text.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The request asks for what the model cannot do.
    Refused(String),
    /// It waited for a slot too long.
    Late,
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

/// How a text ended, the tokens written, and those of the prompt that were not read again.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Finish {
    pub(crate) at_limit: bool,
    pub(crate) tokens: usize,
    pub(crate) cached: usize,
}

pub(crate) struct Engine {
    pub(crate) decoder: Decoder,
    pub(crate) adapter: Option<Adapter>,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) state: State,
    pub(crate) prefixes: Prefixes,
    pub(crate) queue: Receiver<Work>,
    pub(crate) metrics: Arc<Metrics>,
}

/// The slots and what works on them.
struct Batch<'a> {
    generator: Generator<'a>,
    tokenizer: &'a Tokenizer,
    metrics: &'a Metrics,
    state: State,
    prefixes: Prefixes,
    slots: Vec<Option<Running<'a>>>,
}

impl Engine {
    /// Works until nobody can send work any more.
    pub(crate) fn run(self) {
        let Self { decoder, adapter, tokenizer, state, prefixes, mut queue, metrics } = self;
        let generator = Generator { decoder: &decoder, adapter: adapter.as_ref() };
        let slots = (0..state.slots()).map(|_| None).collect();
        let mut batch = Batch { generator, tokenizer: &tokenizer, metrics: &metrics, state, prefixes, slots };
        let mut turn = 0;
        loop {
            while let Some(slot) = batch.slots.iter().position(Option::is_none) {
                let is_idle = batch.slots.iter().all(Option::is_none);
                if is_idle {
                    metrics.slots_in_use.store(0, Ordering::Relaxed);
                    metrics.waiting.store(0, Ordering::Relaxed);
                }
                let work = if is_idle { queue.blocking_recv() } else { queue.try_recv().ok() };
                match work {
                    Some(work) => batch.admit(work, slot),
                    None if is_idle => return,
                    None => break,
                }
            }
            metrics.slots_in_use.store(batch.slots.iter().flatten().count() as u64, Ordering::Relaxed);
            metrics.waiting.store(queue.len() as u64, Ordering::Relaxed);
            // One chunk of one prompt, in turns, so that a long one holds up nobody.
            turn += 1;
            batch.read(turn);
            batch.step();
        }
    }
}

impl<'a> Batch<'a> {
    fn admit(&mut self, work: Work, slot: usize) {
        if work.events.is_closed() {
            return;
        }
        let mut running = Running::new(work, self.tokenizer, self.metrics);
        if running.work.asked_at.elapsed() > PATIENCE {
            return running.fail(Failure::Late);
        }
        match self.place(&mut running, slot) {
            Ok(()) => self.slots[slot] = Some(running),
            Err(e) => running.fail(e.into()),
        }
    }

    /// Brings the slot's state to where reading begins.
    fn place(&mut self, running: &mut Running<'a>, slot: usize) -> Result<()> {
        let Work { prompt, start, scores, .. } = &running.work;
        let ops = self.generator.decoder.ops();
        Metrics::add(&self.metrics.prompt_tokens, prompt.len());
        if let Some(start) = start {
            return self.state.put(slot, start, ops);
        }
        // An echo has the log-probabilities of the whole prompt: all of it is read.
        if scores.is_none_or(|asked| !asked.echo) {
            running.marks = self.prefixes.marks(prompt);
            if let Some(known) = self.prefixes.longest(prompt) {
                self.state.put(slot, known, ops)?;
                (running.read, running.cached) = (known.position(0), known.position(0));
                Metrics::add(&self.metrics.cached_tokens, running.cached);
                return Ok(());
            }
        }
        self.state.reset(slot, ops)
    }

    /// Does something with a text, and empties its slot if it ends, fails, or nobody waits for it.
    fn settle(&mut self, slot: usize, act: impl FnOnce(&mut Self, &mut Running<'a>) -> Result<Option<Finish>>) {
        let Some(mut running) = self.slots[slot].take() else { return };
        if running.work.events.is_closed() {
            return;
        }
        let ended = act(self, &mut running).and_then(|finish| {
            let Some(finish) = finish else { return Ok(None) };
            let state = if running.work.keeps { Some(self.final_state(slot, &running)?) } else { None };
            Ok(Some((finish, state)))
        });
        match ended {
            Ok(None) => self.slots[slot] = Some(running),
            Ok(Some((finish, state))) => running.end(finish, state),
            Err(e) => running.fail(e.into()),
        }
    }

    /// The state with all of the answer: its last token is still to be taken in, unless a stop token came after it.
    fn final_state(&mut self, slot: usize, running: &Running<'a>) -> Result<State> {
        let decoder = self.generator.decoder;
        let before = running.work.start.as_ref().map_or(0, |start| start.position(0));
        let finish = running.finish(true);
        if let Some(last) = running.last()
            && self.state.position(slot) < before + running.work.prompt.len() + finish.tokens
        {
            self.generator.step(&mut self.state, &[(slot, last)])?;
        }
        let mut one = decoder.new_state(1)?;
        self.state.take(slot, &mut one, decoder.ops())?;
        Ok(one)
    }

    fn read(&mut self, turn: usize) {
        let count = self.slots.len();
        let mut order = (0..count).map(|i| (turn + i) % count);
        let Some(slot) = order.find(|&slot| self.slots[slot].as_ref().is_some_and(|r| !r.is_read())) else { return };
        self.settle(slot, |batch, running| batch.read_chunk(running, slot));
    }

    fn read_chunk(&mut self, running: &mut Running<'a>, slot: usize) -> Result<Option<Finish>> {
        let (generator, state) = (self.generator, &mut self.state);
        // Chunks end at multiples, wherever reading began.
        let end = running.work.prompt.len().min((running.read / CHUNK + 1) * CHUNK);
        let ids = &running.work.prompt[running.read..end];
        let logits = match running.work.scores.filter(|asked| asked.echo) {
            None => generator.prefill(state, slot, ids)?,
            Some(asked) => {
                let mut rows = generator.prefill_scoring(state, slot, ids)?;
                let vocabulary = generator.decoder.config().vocab_size;
                running.score_prompt(running.read, &rows, vocabulary, asked)?;
                rows.split_off(rows.len() - vocabulary)
            }
        };
        running.read = end;
        if running.marks.contains(&end) {
            self.prefixes.keep(&running.work.prompt[..end], slot, state, generator.decoder)?;
        }
        if running.is_read() { running.begin(&logits) } else { Ok(None) }
    }

    /// One token for every text that has been read.
    fn step(&mut self) {
        let decoder = self.generator.decoder;
        // A model with softmax attention has a context, and a text at its end is over; the others go on.
        let limit = decoder.context_limit().unwrap_or(usize::MAX);
        let is_written = |slot: &Option<Running<'_>>| slot.as_ref().is_some_and(Running::is_read);
        for slot in 0..self.slots.len() {
            if self.state.position(slot) >= limit && is_written(&self.slots[slot]) {
                self.settle(slot, |_, running| Ok(Some(running.finish(true))));
            }
        }
        let last = |slot: &Option<Running<'_>>| slot.as_ref().filter(|r| r.is_read()).and_then(Running::last);
        let tokens: Vec<(usize, u32)> =
            self.slots.iter().enumerate().filter_map(|(i, slot)| Some((i, last(slot)?))).collect();
        if tokens.is_empty() {
            return;
        }
        // Equal groups of as many as the device has whole steps for.
        let most = decoder.ops().steps().map_or(tokens.len(), |steps| steps.most_texts());
        let groups = tokens.len().div_ceil(most);
        for group in tokens.chunks(tokens.len().div_ceil(groups)) {
            self.step_group(group);
        }
    }

    fn step_group(&mut self, tokens: &[(usize, u32)]) {
        let decoder = self.generator.decoder;
        let texts = self.slots.iter_mut().enumerate().filter(|(i, _)| tokens.iter().any(|(slot, _)| slot == i));
        let mut choosers: Vec<Chooser<'_>> = texts.filter_map(|(_, text)| Some(text.as_mut()?.chooser())).collect();
        let chosen = self
            .generator
            .step(&mut self.state, tokens)
            .and_then(|logits| choose(decoder.ops(), logits, &mut choosers));
        drop(choosers);
        match chosen {
            Ok((ids, logits)) => {
                let vocabulary = decoder.config().vocab_size;
                for (i, (&(slot, _), id)) in tokens.iter().zip(ids).enumerate() {
                    let row = logits.as_ref().map(|all| &all[i * vocabulary..(i + 1) * vocabulary]);
                    self.settle(slot, |_, running| running.take(id, row));
                }
            }
            Err(e) => {
                let message = e.to_string();
                for &(slot, _) in tokens {
                    if let Some(running) = self.slots[slot].take() {
                        running.fail(Failure::Broken(message.clone()));
                    }
                }
            }
        }
    }
}
