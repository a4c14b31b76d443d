//! Scores of a task: accuracies, perplexities and their standard errors, by lm-evaluation-harness's definitions.

use liger_model::{Error, Result, Tokenizer};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::tasks::{Item, Metric, Task};
use crate::writer::{Until, generate_until};
use crate::{Cache, Likelihood, Request, Subject, loglikelihood};

/// One figure of a task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// As lm-evaluation-harness names it: acc, acc_norm, perplexity.
    pub metric: String,
    /// The figure; accuracies from 0 to 1.
    pub value: f64,
    /// Standard error of a mean over the items; that of a perplexity by the delta method.
    pub standard_error: Option<f64>,
}

impl Score {
    /// Whether it is a share of right answers, of which more is better.
    pub fn is_accuracy(&self) -> bool {
        self.metric.starts_with("acc") || self.metric == "exact_match"
    }
}

/// What a model scored in a task.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TaskScores {
    /// The task.
    pub task: String,
    /// Number of items.
    pub items: usize,
    /// Requests whose context did not fit and lost its beginning.
    pub cut: usize,
    /// The figures, in the task's order: the headline first.
    pub scores: Vec<Score>,
    /// Of each item.
    #[serde(skip)]
    pub answers: Vec<Answer>,
}

/// What a model answered to an item.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// Of every choice, or of the whole text.
    Likelihoods(Vec<Likelihood>),
    /// What it wrote, without what is around the answer.
    Text(String),
}

/// Everything about a model that evaluation needs besides itself.
pub struct Surroundings<'a> {
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The token that begins a text.
    pub first: u32,
    /// Tokens that end one.
    pub last: &'a [u32],
}

/// Scores `items` of a task. `tell(requests done)` is called as it goes.
///
/// # Errors
/// If the tokenizer or the device fails, or the cache cannot be written.
pub fn evaluate(
    subject: &Subject<'_>,
    around: &Surroundings<'_>,
    task: &Task,
    items: &[Item],
    cache: Option<&mut Cache>,
    tell: &mut dyn FnMut(usize),
) -> Result<TaskScores> {
    if matches!(items.first(), Some(Item::Answer { .. })) {
        return written(subject, around, task, items, cache, tell);
    }
    let limit = subject.decoder.config().max_position_embeddings;
    // Tokenizing is most of the host's work.
    let requests: Vec<Vec<Request>> =
        items.par_iter().map(|item| requests_of(item, around, limit)).collect::<Result<_>>()?;
    let counts: Vec<usize> = requests.iter().map(Vec::len).collect();
    let requests = requests.concat();
    let scores = loglikelihood(subject, &requests, cache, tell)?;
    let cut = scores.iter().filter(|score| score.cut).count();
    let mut rest = scores.as_slice();
    let mut answers = Vec::with_capacity(items.len());
    for (item, count) in items.iter().zip(counts) {
        let (own, after) = rest.split_at(count);
        rest = after;
        answers.push(match item {
            // A text's pieces make one.
            Item::Text { .. } => vec![Likelihood {
                log: own.iter().map(|x| x.log).sum(),
                greedy: own.iter().all(|x| x.greedy),
                cut: false,
            }],
            _ => own.to_vec(),
        });
    }
    let pairs: Vec<(&Item, &[Likelihood])> = items.iter().zip(&answers).map(|(i, a)| (i, a.as_slice())).collect();
    let scores = task.metrics.iter().map(|&metric| score(metric, &pairs)).collect();
    let answers = answers.into_iter().map(Answer::Likelihoods).collect();
    Ok(TaskScores { task: task.name.clone(), items: items.len(), cut, scores, answers })
}

fn requests_of(item: &Item, around: &Surroundings<'_>, limit: usize) -> Result<Vec<Request>> {
    match item {
        Item::Choices { pairs, .. } => pairs
            .iter()
            .map(|(context, continuation)| Request::new(around.tokenizer, context, continuation, around.first))
            .collect(),
        Item::Text { text, .. } => Ok(Request::rolling(&around.tokenizer.encode(text, true)?, around.first, limit)),
        Item::Answer { .. } => Ok(Vec::new()),
    }
}

fn written(
    subject: &Subject<'_>,
    around: &Surroundings<'_>,
    task: &Task,
    items: &[Item],
    cache: Option<&mut Cache>,
    tell: &mut dyn FnMut(usize),
) -> Result<TaskScores> {
    let extraction = task.extraction().map_err(Error::Refused)?;
    let of = |item: &Item| match item {
        Item::Answer { context, answer } => (context.clone(), answer.clone()),
        _ => Default::default(),
    };
    let (prompts, right): (Vec<String>, Vec<String>) = items.iter().map(of).unzip();
    let (strings, max_tokens) = task.writing();
    let until = Until { strings, ids: around.last, max_tokens };
    let (texts, cut) = generate_until(subject, around.tokenizer, &prompts, &until, cache, tell)?;
    let found: Vec<String> = texts
        .into_iter()
        .map(|text| match &extraction {
            Some(regex) => regex.captures(&text).and_then(|c| c.get(1)).map_or("", |m| m.as_str()).trim().to_owned(),
            None => text.trim().to_owned(),
        })
        .collect();
    let matches = found.iter().zip(&right).filter(|(found, right)| found == right).count();
    let (value, standard_error) = share(matches, items.len());
    let scores = vec![Score { metric: Metric::ExactMatch.name().into(), value, standard_error }];
    let answers = found.into_iter().map(Answer::Text).collect();
    Ok(TaskScores { task: task.name.clone(), items: items.len(), cut, scores, answers })
}

/// The mean of zeros and ones, and its standard error with the sample's variance (n - 1).
pub(crate) fn share(right: usize, of: usize) -> (f64, Option<f64>) {
    let n = of as f64;
    let mean = right as f64 / n;
    (mean, (of > 1).then(|| (mean * (1.0 - mean) / (n - 1.0)).sqrt()))
}

/// Whether an item is answered right: characters of its choices, number of the right one, what the model says of each.
type Right<'a> = dyn Fn(&[usize], usize, &[Likelihood]) -> bool + 'a;

fn score(metric: Metric, answers: &[(&Item, &[Likelihood])]) -> Score {
    let choices = answers.iter().filter_map(|(item, own)| match item {
        Item::Choices { lengths, gold, .. } => Some((lengths, *gold, *own)),
        _ => None,
    });
    let count = |right: &Right<'_>| {
        let matches = choices.clone().filter(|(lengths, gold, own)| right(lengths, *gold, own)).count();
        share(matches, answers.len())
    };
    let over = |size: &dyn Fn(&Item) -> usize| {
        let total: usize = answers.iter().map(|(item, _)| size(item)).sum();
        -answers.iter().map(|(_, own)| own[0].log).sum::<f64>() / total.max(1) as f64
    };
    let words = |item: &Item| if let Item::Text { words, .. } = item { *words } else { 0 };
    let bytes = |item: &Item| if let Item::Text { bytes, .. } = item { *bytes } else { 0 };
    let (value, standard_error) = match metric {
        Metric::Acc => count(&|_, gold, own| best(own.iter().map(|x| x.log)) == gold),
        Metric::AccNorm => count(&|lengths, gold, own| {
            best(own.iter().zip(lengths).map(|(x, &length)| x.log / length.max(1) as f64)) == gold
        }),
        Metric::Greedy => count(&|_, gold, own| own[gold].greedy),
        Metric::Perplexity => {
            let logs: Vec<f64> = choices.clone().map(|(_, gold, own)| own[gold].log).collect();
            let n = logs.len() as f64;
            let mean = logs.iter().sum::<f64>() / n;
            let variance = logs.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0);
            let value = (-mean).exp();
            (value, (n > 1.0).then(|| value * (variance / n).sqrt()))
        }
        Metric::WordPerplexity => (over(&words).exp(), None),
        Metric::BytePerplexity => (over(&bytes).exp(), None),
        Metric::BitsPerByte => (over(&bytes) / std::f64::consts::LN_2, None),
        Metric::ExactMatch => (f64::NAN, None),
    };
    Score { metric: metric.name().into(), value, standard_error }
}

/// The first of the largest.
fn best(values: impl Iterator<Item = f64>) -> usize {
    let take_larger = |best: (usize, f64), (i, x): (usize, f64)| if x > best.1 { (i, x) } else { best };
    values.enumerate().fold((0, f64::NEG_INFINITY), take_larger).0
}
