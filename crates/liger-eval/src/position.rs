//! Perplexity and KL to the teacher by the position of the token in its text: where a model's memory ends shows here,
//! and in no average.

use liger_model::{Adapter, Decoder, Result};
use liger_tensor::{Sequences, Tensor};
use serde::{Deserialize, Serialize};

use crate::scorer::rows_at_once;

/// Positions `from..to`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bucket {
    /// First position.
    pub from: usize,
    /// One past the last.
    pub to: usize,
}

impl Bucket {
    /// The buckets of texts of `length` tokens: inside a window of 64; just outside; a page; then doubling.
    pub fn up_to(length: usize) -> Vec<Self> {
        let mut edges = vec![0, 64, 256, 1024];
        while edges.last().is_some_and(|&edge| edge < length) {
            edges.extend(edges.last().map(|edge| 2 * edge));
        }
        edges.windows(2).filter(|w| w[0] < length).map(|w| Self { from: w[0], to: w[1] }).collect()
    }
}

impl std::fmt::Display for Bucket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let short = |n: usize| if n >= 1024 { format!("{}K", n / 1024) } else { n.to_string() };
        write!(f, "{}-{}", short(self.from), short(self.to))
    }
}

/// A model to score.
pub struct Subject<'a> {
    /// For the table.
    pub name: String,
    /// The model.
    pub decoder: &'a Decoder,
    /// Its adapter.
    pub adapter: Option<&'a Adapter>,
}

/// Scores of one model, by bucket; `None` where the texts have no such position.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PositionScores {
    /// The model.
    pub name: String,
    /// exp of the mean cross-entropy.
    pub perplexity: Vec<Option<f64>>,
    /// Mean KL(teacher || model), in nats.
    pub kl: Vec<Option<f64>>,
    /// Share of tokens where the model's most likely one is the teacher's.
    pub agreement: Vec<Option<f64>>,
    /// Tokens that the means are over.
    pub tokens: Vec<usize>,
}

/// Scores models on texts; the teacher is the first row of the result. `tell(tokens done)` is called as it goes.
///
/// # Errors
/// If a device fails or a token is not the model's.
pub fn scores_by_position(
    teacher: &Subject<'_>,
    students: &[Subject<'_>],
    texts: &[Vec<u32>],
    buckets: &[Bucket],
    tell: &mut dyn FnMut(usize),
) -> Result<Vec<PositionScores>> {
    let mut sums = vec![vec![Sums::default(); buckets.len()]; students.len() + 1];
    let ops = teacher.decoder.ops();
    let chunk = rows_at_once(teacher.decoder);
    for (done, text) in texts.iter().enumerate() {
        let sequences = Sequences::fresh([text.len()]);
        let hidden_of = |s: &Subject<'_>| s.decoder.forward(text, &sequences, None, s.adapter);
        let teacher_hidden = hidden_of(teacher)?;
        let mut hidden = Vec::with_capacity(students.len());
        for student in students {
            hidden.push(hidden_of(student)?);
        }
        let targets = text.len().saturating_sub(1);
        for first in (0..targets).step_by(chunk) {
            let count = chunk.min(targets - first);
            let labels: Vec<i64> = text[first + 1..=first + count].iter().map(|&id| i64::from(id)).collect();
            let logits_of = |s: &Subject<'_>, hidden: &Tensor| -> Result<Tensor> {
                let mut rows = ops.empty(&[count, hidden.dim(1)])?;
                ops.copy_rows(&mut rows, hidden, first)?;
                s.decoder.logits(&rows)
            };
            let mut target = logits_of(teacher, &teacher_hidden)?;
            let best = ops.argmax(&target)?;
            let losses = ops.cross_entropy(&mut target, &labels, None)?;
            // The token at position p is predicted at row p - 1.
            add(&mut sums[0], buckets, first + 1, losses.iter().map(|&loss| (loss, 0.0, true)));
            for ((student, hidden), sums) in students.iter().zip(&hidden).zip(&mut sums[1..]) {
                let mut logits = logits_of(student, hidden)?;
                let own = ops.argmax(&logits)?;
                let losses = ops.cross_entropy(&mut logits, &labels, None)?;
                let kl = ops.kl_divergence(&mut logits, &target, &vec![true; count], None)?;
                let same = own.iter().zip(&best).map(|(a, b)| a == b);
                add(
                    sums,
                    buckets,
                    first + 1,
                    losses.into_iter().zip(kl).zip(same).map(|((l, kl), same)| (l, kl, same)),
                );
            }
        }
        tell((done + 1) * text.len());
    }
    let names = std::iter::once(teacher).chain(students).map(|s| s.name.clone());
    Ok(names.zip(sums).map(|(name, sums)| finish(name, &sums)).collect())
}

#[derive(Debug, Clone, Default)]
struct Sums {
    loss: f64,
    kl: f64,
    same: usize,
    count: usize,
}

/// Loss, KL and whether the most likely token is the teacher's, of one row after the other.
fn add(sums: &mut [Sums], buckets: &[Bucket], first_position: usize, rows: impl Iterator<Item = (f32, f32, bool)>) {
    for (i, (loss, kl, same)) in rows.enumerate() {
        let position = first_position + i;
        if let Some(at) = buckets.iter().position(|b| (b.from..b.to).contains(&position)) {
            sums[at].loss += f64::from(loss);
            sums[at].kl += f64::from(kl);
            sums[at].same += usize::from(same);
            sums[at].count += 1;
        }
    }
}

fn finish(name: String, sums: &[Sums]) -> PositionScores {
    let mean = |sum: f64, count: usize| (count > 0).then(|| sum / count as f64);
    PositionScores {
        name,
        perplexity: sums.iter().map(|s| mean(s.loss, s.count).map(f64::exp)).collect(),
        kl: sums.iter().map(|s| mean(s.kl, s.count)).collect(),
        agreement: sums.iter().map(|s| mean(s.same as f64, s.count)).collect(),
        tokens: sums.iter().map(|s| s.count).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::Bucket;

    #[test]
    fn buckets_hold_every_position() {
        for length in [1, 64, 65, 256, 257, 512, 1024, 1025, 2048, 5000, 32_768] {
            let buckets = Bucket::up_to(length);
            assert_eq!(buckets[0].from, 0);
            assert!(buckets.windows(2).all(|pair| pair[0].to == pair[1].from));
            let last = buckets[buckets.len() - 1];
            assert!((last.from..last.to).contains(&(length - 1)), "{length}: {last}");
        }
    }
}
