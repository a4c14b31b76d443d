//! Perplexity and KL to the teacher by the position of the token in its text: where a model's memory ends shows here,
//! and in no average.

use liger_model::{Adapter, Decoder, Result};
use liger_tensor::{Sequences, Tensor};
use serde::Serialize;

/// Positions `from..to`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Bucket {
    /// First position.
    pub from: usize,
    /// One past the last.
    pub to: usize,
}

/// Inside the window; just outside; four windows; a page or more.
pub const BUCKETS: [Bucket; 4] = [
    Bucket { from: 0, to: 64 },
    Bucket { from: 64, to: 256 },
    Bucket { from: 256, to: 1024 },
    Bucket { from: 1024, to: 2048 },
];

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
#[derive(Debug, Clone, Serialize)]
pub struct PositionScores {
    /// The model.
    pub name: String,
    /// exp of the mean cross-entropy.
    pub perplexity: Vec<Option<f64>>,
    /// Mean KL(teacher || model), in nats.
    pub kl: Vec<Option<f64>>,
    /// Tokens that the means are over.
    pub tokens: Vec<usize>,
}

/// Rows whose logits are in memory at once, for teacher and model each.
const CHUNK: usize = 256;

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
    for (done, text) in texts.iter().enumerate() {
        let sequences = Sequences::fresh([text.len()]);
        let hidden_of = |s: &Subject<'_>| s.decoder.forward(text, &sequences, None, s.adapter);
        let teacher_hidden = hidden_of(teacher)?;
        let mut hidden = Vec::with_capacity(students.len());
        for student in students {
            hidden.push(hidden_of(student)?);
        }
        let targets = text.len().saturating_sub(1);
        for first in (0..targets).step_by(CHUNK) {
            let count = CHUNK.min(targets - first);
            let labels: Vec<i64> = text[first + 1..=first + count].iter().map(|&id| i64::from(id)).collect();
            let logits_of = |s: &Subject<'_>, hidden: &Tensor| -> Result<Tensor> {
                let mut rows = ops.empty(&[count, hidden.dim(1)])?;
                ops.copy_rows(&mut rows, hidden, first)?;
                s.decoder.logits(&rows)
            };
            let mut target = logits_of(teacher, &teacher_hidden)?;
            let losses = ops.cross_entropy(&mut target, &labels, None)?;
            // The token at position p is predicted at row p - 1.
            add(&mut sums[0], buckets, first + 1, &losses, &vec![0.0; count]);
            for ((student, hidden), sums) in students.iter().zip(&hidden).zip(&mut sums[1..]) {
                let mut logits = logits_of(student, hidden)?;
                let losses = ops.cross_entropy(&mut logits, &labels, None)?;
                let kl = ops.kl_divergence(&mut logits, &target, &vec![true; count], None)?;
                add(sums, buckets, first + 1, &losses, &kl);
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
    count: usize,
}

fn add(sums: &mut [Sums], buckets: &[Bucket], first_position: usize, losses: &[f32], kl: &[f32]) {
    for (i, (loss, kl)) in losses.iter().zip(kl).enumerate() {
        let position = first_position + i;
        if let Some(at) = buckets.iter().position(|b| (b.from..b.to).contains(&position)) {
            sums[at].loss += f64::from(*loss);
            sums[at].kl += f64::from(*kl);
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
        tokens: sums.iter().map(|s| s.count).collect(),
    }
}
