//! Log-likelihoods of continuations, by lm-evaluation-harness's definitions.

use std::collections::HashMap;

use liger_model::{Decoder, Result, Tokenizer};
use liger_tensor::{Ops, Sequences};

use crate::{Cache, Subject};

/// A continuation to score after a context, in tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// What is given; not empty.
    pub context: Vec<u32>,
    /// What is scored.
    pub continuation: Vec<u32>,
}

/// What a model says of a request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Likelihood {
    /// Sum of the log-probabilities of the continuation's tokens.
    pub log: f64,
    /// Whether each of them is the model's most likely one.
    pub greedy: bool,
    /// Whether the context did not fit, and lost its beginning.
    pub cut: bool,
}

/// Tokens of one pass: enough to keep the products busy, few enough for the device's memory.
fn tokens_of_a_pass(ops: &dyn Ops) -> usize {
    if ops.memory().is_some() { 32_768 } else { 4096 }
}

/// Rows whose logits are in memory at once.
pub(crate) fn rows_at_once(decoder: &Decoder) -> usize {
    if decoder.ops().memory().is_some() { ((1 << 27) / decoder.config().vocab_size).max(256) } else { 256 }
}

impl Request {
    /// The continuation's tokens are those of the whole text after as many as the context alone has. Spaces at the context's
    /// end count to the continuation. An empty context is the token `first`, which begins a text.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn new(tokenizer: &Tokenizer, context: &str, continuation: &str, first: u32) -> Result<Self> {
        // With what the tokenizer puts before a text, as the harness does since 0.4.10.
        let mut given = if context.is_empty() { Vec::new() } else { tokenizer.encode(context.trim_end(), true)? };
        let mut whole = tokenizer.encode(&format!("{context}{continuation}"), !context.is_empty())?;
        let continuation = whole.split_off(given.len().min(whole.len()));
        if given.is_empty() {
            given.push(first);
        }
        Ok(Self { context: given, continuation })
    }

    /// A whole text as requests that fit into `limit` tokens: each token is predicted once, after as many tokens of what
    /// comes before it as a full last piece has room for, the first one after the token `first`.
    pub fn rolling(ids: &[u32], first: u32, limit: usize) -> Vec<Self> {
        let mut requests = Vec::new();
        let mut done = 0;
        while done < ids.len() {
            let end = ids.len().min(done + limit);
            // A last piece reaches back until it is full.
            let context = if done == 0 { vec![first] } else { ids[end - limit - 1..done].to_vec() };
            requests.push(Self { context, continuation: ids[done..end].to_vec() });
            done = end;
        }
        requests
    }

    /// Tokens of context and continuation.
    pub fn tokens(&self) -> usize {
        self.context.len() + self.continuation.len()
    }

    /// What the model reads: all but the last token, which is only predicted.
    fn read(&self) -> Vec<u32> {
        let mut ids = [&self.context[..], &self.continuation[..]].concat();
        ids.pop();
        ids
    }
}

/// Scores requests, the longest ones first, and those that differ in the last token only together; answers that `cache` has are taken from it. `tell(requests done)` is called
/// as it goes.
///
/// # Errors
/// If the device fails, a token is not the model's, or the cache cannot be written.
pub fn loglikelihood(
    subject: &Subject<'_>,
    requests: &[Request],
    mut cache: Option<&mut Cache>,
    tell: &mut dyn FnMut(usize),
) -> Result<Vec<Likelihood>> {
    let mut scores = vec![Likelihood { log: 0.0, greedy: true, cut: false }; requests.len()];
    let mut order = Vec::with_capacity(requests.len());
    for (i, request) in requests.iter().enumerate() {
        match cache.as_ref().and_then(|cache| cache.likelihood(request)) {
            Some(known) => scores[i] = known,
            // Nothing is certain.
            None if request.continuation.is_empty() => {}
            None => order.push(i),
        }
    }
    let known = requests.len() - order.len();
    let room = tokens_of_a_pass(subject.decoder.ops());
    let texts = texts(requests, &order);
    let mut rest = texts.as_slice();
    let mut done = known;
    while !rest.is_empty() {
        let mut tokens = 0;
        let fits = rest.iter().take_while(|text| {
            tokens += text.ids.len();
            tokens <= room
        });
        let (batch, after) = rest.split_at(fits.count().max(1));
        rest = after;
        let owners = || batch.iter().flat_map(|text| text.owners.iter().copied());
        let answers = score_batch(subject, batch, requests)?;
        for (i, score) in owners().zip(&answers) {
            scores[i] = *score;
        }
        done += answers.len();
        if let Some(cache) = cache.as_deref_mut() {
            cache.keep(owners().map(|i| &requests[i]).zip(answers))?;
        }
        tell(done);
    }
    Ok(scores)
}

/// What the model reads at once for all requests that differ in the last token only, as MMLU's four letters do.
struct Text {
    ids: Vec<u32>,
    /// Numbers of the requests.
    owners: Vec<usize>,
}

/// The texts of the requests `order`, the longest first.
fn texts(requests: &[Request], order: &[usize]) -> Vec<Text> {
    let mut texts: Vec<Text> = Vec::with_capacity(order.len());
    let mut places: HashMap<Vec<u32>, usize> = HashMap::with_capacity(order.len());
    for &i in order {
        let ids = requests[i].read();
        match places.get(&ids) {
            Some(&place) => texts[place].owners.push(i),
            None => {
                places.insert(ids.clone(), texts.len());
                texts.push(Text { ids, owners: vec![i] });
            }
        }
    }
    texts.sort_by_key(|text| std::cmp::Reverse(text.ids.len()));
    texts
}

/// The texts side by side, without padding; logits of the rows that predict a continuation. Answers are in the order of the
/// texts and their owners.
fn score_batch(subject: &Subject<'_>, texts: &[Text], requests: &[Request]) -> Result<Vec<Likelihood>> {
    let (decoder, ops) = (subject.decoder, subject.decoder.ops());
    let limit = decoder.context_limit().unwrap_or(usize::MAX);
    let (mut ids, mut lengths, mut spans, mut labels) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut scores = Vec::new();
    for text in texts {
        let rows = text.ids.len().min(limit);
        let cut = text.ids.len() - rows;
        ids.extend_from_slice(&text.ids[cut..]);
        lengths.push(rows);
        for &owner in &text.owners {
            let continuation = &requests[owner].continuation;
            let scored = continuation.len().min(rows);
            spans.push((ids.len() - scored, scored));
            labels.extend(continuation[continuation.len() - scored..].iter().map(|&id| i64::from(id)));
            scores.push(Likelihood { log: 0.0, greedy: true, cut: cut > 0 });
        }
    }
    let hidden = decoder.forward(&ids, &Sequences::fresh(lengths), None, subject.adapter)?;
    let mut rows = ops.empty(&[labels.len(), hidden.dim(1)])?;
    let mut at = 0;
    let mut owners = Vec::with_capacity(labels.len());
    for (owner, &(first, count)) in spans.iter().enumerate() {
        let mut part = ops.empty(&[count, hidden.dim(1)])?;
        ops.copy_rows(&mut part, &hidden, first)?;
        ops.write_rows(&mut rows, &part, at)?;
        at += count;
        owners.extend(std::iter::repeat_n(owner, count));
    }
    let step = rows_at_once(decoder);
    for first in (0..labels.len()).step_by(step) {
        let count = step.min(labels.len() - first);
        let mut part = ops.empty(&[count, hidden.dim(1)])?;
        ops.copy_rows(&mut part, &rows, first)?;
        let mut logits = decoder.logits(&part)?;
        let best = ops.argmax(&logits)?;
        let losses = ops.cross_entropy(&mut logits, &labels[first..first + count], None)?;
        for (i, (loss, best)) in losses.iter().zip(best).enumerate() {
            let score = &mut scores[owners[first + i]];
            score.log -= f64::from(*loss);
            score.greedy &= i64::from(best) == labels[first + i];
        }
    }
    Ok(scores)
}
