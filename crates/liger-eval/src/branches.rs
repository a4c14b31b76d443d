//! What each branch of Liger Attention does: how large it is, and how long its gates remember.

use liger_model::{Branches, Result};
use liger_tensor::{Sequences, Tensor};
use serde::{Deserialize, Serialize};

use crate::Subject;

/// One layer's branches over a text.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BranchScores {
    /// The layer.
    pub layer: usize,
    /// Root mean square of `alpha * recurrent`; 0 where it is off.
    pub recurrent: f64,
    /// Root mean square of `beta * window`.
    pub window: f64,
    /// Half-life of each key/value head's state in tokens: the median over its dimensions of ln 2 / mean(-log gate).
    pub half_lives: Vec<f64>,
}

/// Runs a text through a Liger model and looks at every layer; empty for a model that has no such layers.
///
/// # Errors
/// If the device fails.
pub fn branch_scores(subject: &Subject<'_>, text: &[u32]) -> Result<Vec<BranchScores>> {
    let ops = subject.decoder.ops();
    let mut scores = Vec::new();
    let mut failed = None;
    let mut look = |branches: Branches| {
        let rms = |tensor: &Tensor, weight: f32| -> Result<f64> {
            let values = ops.download(tensor)?;
            let sum: f64 = values.iter().map(|x| f64::from(*x).powi(2)).sum();
            Ok(f64::from(weight) * (sum / values.len() as f64).sqrt())
        };
        let score = || -> Result<BranchScores> {
            Ok(BranchScores {
                layer: branches.layer,
                recurrent: branches.recurrent.as_ref().map_or(Ok(0.0), |r| rms(r, branches.alpha))?,
                window: rms(&branches.window, branches.beta)?,
                half_lives: match &branches.log_gate {
                    Some(gates) => half_lives(&ops.download(gates)?, gates.dim(1), gates.dim(2)),
                    None => Vec::new(),
                },
            })
        };
        match score() {
            Ok(score) => scores.push(score),
            Err(e) => failed = Some(e),
        }
    };
    subject.decoder.forward_with_branches(text, &Sequences::fresh([text.len()]), None, subject.adapter, &mut look)?;
    failed.map_or(Ok(scores), Err)
}

/// Of log gates `[N, heads, dims]`.
fn half_lives(gates: &[f32], heads: usize, dims: usize) -> Vec<f64> {
    let mut sums = vec![0.0f64; heads * dims];
    for row in gates.chunks_exact(heads * dims) {
        sums.iter_mut().zip(row).for_each(|(sum, gate)| *sum -= f64::from(*gate));
    }
    let rows = (gates.len() / (heads * dims)).max(1) as f64;
    let median = |own: &[f64]| {
        let mut lives: Vec<f64> = own.iter().map(|sum| std::f64::consts::LN_2 / (sum / rows).max(1e-9)).collect();
        lives.sort_by(f64::total_cmp);
        lives[lives.len() / 2]
    };
    sums.chunks_exact(dims).map(median).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_gate_of_one_half_halves_in_a_token() {
        let half = 0.5f32.ln();
        let found = super::half_lives(&[half, half, half / 8.0, half / 8.0], 2, 2);
        assert!((found[0] - 1.0).abs() < 1e-6 && (found[1] - 8.0).abs() < 1e-5, "{found:?}");
    }
}
