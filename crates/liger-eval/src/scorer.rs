//! Log-likelihoods of continuations, by lm-evaluation-harness's definitions.

use liger_model::{Result, Tokenizer};
use liger_tensor::Sequences;

use crate::Subject;

/// A continuation to score after a context, in tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// What is given; not empty.
    pub context: Vec<u32>,
    /// What is scored; not empty.
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

/// Tokens of one pass: enough to keep the products busy, few enough for any memory.
const TOKENS: usize = 4096;
/// Rows whose logits are in memory at once.
const ROWS: usize = 256;

impl Request {
    /// The continuation's tokens are those of the whole text after as many as the context alone has. Spaces at the context's
    /// end count to the continuation. An empty context is the token `first`, which begins a text.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn new(tokenizer: &Tokenizer, context: &str, continuation: &str, first: u32) -> Result<Self> {
        let mut given = tokenizer.encode(context.trim_end(), false)?;
        let mut whole = tokenizer.encode(&format!("{context}{continuation}"), false)?;
        let continuation = whole.split_off(given.len().min(whole.len()));
        if given.is_empty() {
            given.push(first);
        }
        Ok(Self { context: given, continuation })
    }

    fn len(&self) -> usize {
        self.context.len() + self.continuation.len()
    }
}

/// Scores requests, the longest ones first; `tell(requests done)` is called as it goes.
///
/// # Errors
/// If the device fails or a token is not the model's.
pub fn loglikelihood(
    subject: &Subject<'_>,
    requests: &[Request],
    tell: &mut dyn FnMut(usize),
) -> Result<Vec<Likelihood>> {
    let mut order: Vec<usize> = (0..requests.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(requests[i].len()));
    let mut scores = vec![Likelihood { log: 0.0, greedy: true, cut: false }; requests.len()];
    let mut done = 0;
    while done < order.len() {
        let mut tokens = 0;
        let fits = order[done..].iter().take_while(|&&i| {
            tokens += requests[i].len();
            tokens <= TOKENS
        });
        let count = fits.count().max(1);
        let batch = &order[done..done + count];
        for (&i, score) in batch.iter().zip(score_batch(subject, batch.iter().map(|&i| &requests[i]))?) {
            scores[i] = score;
        }
        done += count;
        tell(done);
    }
    Ok(scores)
}

/// The texts side by side, without padding; logits of the rows that predict a continuation.
fn score_batch<'a>(subject: &Subject<'_>, requests: impl Iterator<Item = &'a Request>) -> Result<Vec<Likelihood>> {
    let (decoder, ops) = (subject.decoder, subject.decoder.ops());
    let limit = decoder.context_limit().unwrap_or(usize::MAX);
    let (mut ids, mut lengths, mut spans, mut labels) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut scores = Vec::new();
    for request in requests {
        let whole: Vec<u32> = request.context.iter().chain(&request.continuation).copied().collect();
        // The last token is only predicted.
        let rows = (whole.len() - 1).min(limit);
        let scored = request.continuation.len().min(rows);
        let from = whole.len() - 1 - rows;
        spans.push((ids.len() + rows - scored, scored));
        labels.extend(whole[whole.len() - scored..].iter().map(|&id| i64::from(id)));
        ids.extend_from_slice(&whole[from..whole.len() - 1]);
        lengths.push(rows);
        scores.push(Likelihood { log: 0.0, greedy: true, cut: from > 0 });
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
    for first in (0..labels.len()).step_by(ROWS) {
        let count = ROWS.min(labels.len() - first);
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
