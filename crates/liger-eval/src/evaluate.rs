//! Scores of a task: accuracies and their standard errors, by lm-evaluation-harness's definitions.

use liger_model::{Result, Tokenizer};
use serde::Serialize;

use crate::tasks::{Item, Metric, Task};
use crate::{Likelihood, Request, Subject, loglikelihood};

/// One figure of a task.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Score {
    /// As lm-evaluation-harness names it: acc, acc_norm, perplexity.
    pub metric: &'static str,
    /// The figure; accuracies from 0 to 1.
    pub value: f64,
    /// Standard error of a mean over the items; perplexities have none.
    pub standard_error: Option<f64>,
}

/// What a model scored in a task.
#[derive(Debug, Clone, Serialize)]
pub struct TaskScores {
    /// The task.
    pub task: String,
    /// Number of items.
    pub items: usize,
    /// Requests whose context did not fit and lost its beginning.
    pub cut: usize,
    /// The figures, in the task's order.
    pub scores: Vec<Score>,
    /// Of each item's choices.
    #[serde(skip)]
    pub likelihoods: Vec<Vec<Likelihood>>,
}

/// Scores `items` of a task; `first` is the token that begins a text.
///
/// # Errors
/// If the tokenizer or the device fails.
pub fn evaluate(
    subject: &Subject<'_>,
    tokenizer: &Tokenizer,
    first: u32,
    task: &Task,
    items: &[Item],
    tell: &mut dyn FnMut(usize),
) -> Result<TaskScores> {
    let pairs = items.iter().flat_map(|item| &item.pairs);
    let requests: Vec<Request> = pairs
        .map(|(context, continuation)| Request::new(tokenizer, context, continuation, first))
        .collect::<Result<_>>()?;
    let scores = loglikelihood(subject, &requests, tell)?;
    let cut = scores.iter().filter(|score| score.cut).count();
    let mut rest = scores.as_slice();
    let answers: Vec<(&Item, &[Likelihood])> = items
        .iter()
        .map(|item| {
            let (own, after) = rest.split_at(item.pairs.len());
            rest = after;
            (item, own)
        })
        .collect();
    let scores = task.metrics.iter().map(|&metric| score(metric, &answers)).collect();
    let likelihoods = answers.iter().map(|(_, own)| own.to_vec()).collect();
    Ok(TaskScores { task: task.name.clone(), items: items.len(), cut, scores, likelihoods })
}

fn score(metric: Metric, answers: &[(&Item, &[Likelihood])]) -> Score {
    let share = |right: &dyn Fn(&Item, &[Likelihood]) -> bool| {
        let n = answers.len() as f64;
        let mean = answers.iter().filter(|(item, own)| right(item, own)).count() as f64 / n;
        // Of a mean of zeros and ones, with the sample's variance (n - 1).
        (mean, (n > 1.0).then(|| (mean * (1.0 - mean) / (n - 1.0)).sqrt()))
    };
    let (metric, (value, standard_error)) = match metric {
        Metric::Acc => ("acc", share(&|item, own| best(own.iter().map(|x| x.log)) == item.gold)),
        Metric::AccNorm => {
            let by_length = |item: &Item, own: &[Likelihood]| {
                best(own.iter().zip(&item.lengths).map(|(x, &length)| x.log / length.max(1) as f64)) == item.gold
            };
            ("acc_norm", share(&by_length))
        }
        Metric::Greedy => ("acc", share(&|item, own| own[item.gold].greedy)),
        Metric::Perplexity => {
            let sum: f64 = answers.iter().map(|(item, own)| own[item.gold].log).sum();
            ("perplexity", ((-sum / answers.len() as f64).exp(), None))
        }
    };
    Score { metric, value, standard_error }
}

/// The first of the largest.
fn best(values: impl Iterator<Item = f64>) -> usize {
    let take_larger = |best: (usize, f64), (i, x): (usize, f64)| if x > best.1 { (i, x) } else { best };
    values.enumerate().fold((0, f64::NEG_INFINITY), take_larger).0
}
