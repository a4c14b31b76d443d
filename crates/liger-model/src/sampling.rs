//! Choosing the next token from logits.

use liger_tensor::{Draw, Ops, Tensor};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::error::Result;

/// How the next token is chosen; the names are those of Hugging Face's `generate`.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f32,
    /// Only the `top_k` most likely tokens; 0 for all.
    pub top_k: usize,
    /// Only the most likely tokens that together reach this probability.
    pub top_p: f32,
    /// Only tokens of at least this probability, as a share of the most likely one's.
    pub min_p: f32,
    /// Positive logits of tokens seen before are divided by this, negative ones multiplied.
    pub repetition_penalty: f32,
}

impl Default for Sampling {
    /// Greedy.
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0 }
    }
}

/// A text whose next token is to be chosen.
pub struct Chooser<'a> {
    /// How.
    pub sampling: &'a Sampling,
    /// Tokens that the repetition penalty counts.
    pub seen: &'a [u32],
    /// Of this text: what is drawn does not depend on the others.
    pub rng: &'a mut ChaCha8Rng,
    /// Whether the logits are asked for besides.
    pub shows_logits: bool,
}

/// The next token of each text, from `logits [texts, V]`; and the logits, if one of them had to be chosen here and not on the
/// device. Where a token is chosen depends on its text's settings alone, so that a seed gives the same text in any company.
///
/// # Errors
/// If the device fails.
pub fn choose(ops: &dyn Ops, logits: &Tensor, texts: &mut [Chooser<'_>]) -> Result<(Vec<u32>, Option<Vec<f32>>)> {
    let mut chosen: Vec<Option<u32>> = vec![None; texts.len()];
    let on_device = |text: &Chooser<'_>| text.sampling.repetition_penalty == 1.0 && !text.shows_logits;
    if texts.iter().any(|text| on_device(text) && text.sampling.temperature <= 0.0) {
        let best = ops.argmax(logits)?;
        for ((chosen, text), id) in chosen.iter_mut().zip(&*texts).zip(best) {
            *chosen = (on_device(text) && text.sampling.temperature <= 0.0).then_some(id);
        }
    }
    for first in 0..texts.len() {
        if chosen[first].is_some() || !on_device(&texts[first]) {
            continue;
        }
        let sampling = texts[first].sampling.clone();
        let alike = |text: &Chooser<'_>| on_device(text) && *text.sampling == sampling;
        let draws: Vec<f32> = texts.iter_mut().map(|text| if alike(text) { text.rng.random() } else { 0.0 }).collect();
        let Sampling { temperature, top_k, top_p, min_p, .. } = sampling;
        let ids = ops.sample(logits, Draw { temperature, top_k, top_p, min_p }, &draws)?;
        for ((chosen, text), id) in chosen.iter_mut().zip(&*texts).zip(ids) {
            if alike(text) {
                *chosen = Some(id);
            }
        }
    }
    let all = if chosen.contains(&None) { Some(ops.download(logits)?) } else { None };
    let width = logits.len() / texts.len().max(1);
    if let Some(all) = &all {
        let rows = all.par_chunks_exact(width.max(1)).zip(texts).zip(&mut chosen);
        rows.filter(|(_, chosen)| chosen.is_none()).for_each(|((row, text), chosen)| {
            *chosen = Some(text.sampling.pick(&mut row.to_vec(), text.seen, text.rng));
        });
    }
    let ids = chosen.into_iter().flatten().collect();
    Ok((ids, all))
}

impl Sampling {
    /// Picks a token; `seen` are those that the repetition penalty counts.
    pub fn pick(&self, logits: &mut [f32], seen: &[u32], rng: &mut ChaCha8Rng) -> u32 {
        if self.repetition_penalty != 1.0 {
            let mut seen = seen.to_vec();
            seen.sort_unstable();
            seen.dedup();
            for id in seen {
                if let Some(logit) = logits.get_mut(id as usize) {
                    *logit *= if *logit > 0.0 { 1.0 / self.repetition_penalty } else { self.repetition_penalty };
                }
            }
        }
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap_or(0);
        if self.temperature <= 0.0 {
            return best as u32;
        }
        let max = logits[best];
        // Far below the best: cannot be drawn, and would only be sorted.
        let floor = max + self.temperature * self.min_p.max(1e-9).ln();
        let mut candidates: Vec<(u32, f32)> = Vec::new();
        for (id, &logit) in logits.iter().enumerate() {
            if logit >= floor {
                candidates.push((id as u32, ((logit - max) / self.temperature).exp()));
            }
        }
        if self.top_k > 0 && candidates.len() > self.top_k {
            candidates.select_nth_unstable_by(self.top_k - 1, |a, b| b.1.total_cmp(&a.1));
            candidates.truncate(self.top_k);
        }
        let mut total: f32 = candidates.iter().map(|c| c.1).sum();
        if self.top_p < 1.0 {
            total = nucleus(&mut candidates, self.top_p * total);
        }
        let mut draw = rng.random::<f32>() * total;
        for (id, p) in &candidates {
            draw -= p;
            if draw <= 0.0 {
                return *id;
            }
        }
        candidates.last().map_or(best as u32, |c| c.0)
    }
}

/// Keeps the most likely candidates that together reach `mass`; their sum. Only as many as are surely enough are sorted:
/// a vocabulary is long, and few of it nearly always suffice.
fn nucleus(candidates: &mut Vec<(u32, f32)>, mass: f32) -> f32 {
    let (mut sorted, mut held) = (0, 0.0);
    for least in [1e-2, 1e-3, 1e-4, 1e-5, 0.0] {
        let from = sorted;
        for i in from..candidates.len() {
            if candidates[i].1 >= least {
                held += candidates[i].1;
                candidates.swap(i, sorted);
                sorted += 1;
            }
        }
        if held >= mass {
            break;
        }
    }
    candidates[..sorted].sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let (mut sum, mut keep) = (0.0, 0);
    while keep < candidates.len() && sum < mass {
        sum += candidates[keep].1;
        keep += 1;
    }
    candidates.truncate(keep.max(1));
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    fn draw(sampling: &Sampling, logits: &[f32], seen: &[u32]) -> Vec<u32> {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut drawn: Vec<u32> = (0..400).map(|_| sampling.pick(&mut logits.to_vec(), seen, &mut rng)).collect();
        drawn.sort_unstable();
        drawn.dedup();
        drawn
    }

    #[test]
    fn each_filter_keeps_what_it_says() {
        let logits = [0.0, 2.0, 1.0, -1.0];
        let all = Sampling { temperature: 1.0, ..Sampling::default() };
        assert_eq!(draw(&Sampling::default(), &logits, &[]), [1]);
        assert_eq!(draw(&all, &logits, &[]), [0, 1, 2, 3]);
        assert_eq!(draw(&Sampling { top_k: 2, ..all.clone() }, &logits, &[]), [1, 2]);
        // Probabilities 0.09, 0.64, 0.24, 0.03.
        assert_eq!(draw(&Sampling { top_p: 0.9, ..all.clone() }, &logits, &[]), [0, 1, 2]);
        assert_eq!(draw(&Sampling { top_p: 0.6, ..all.clone() }, &logits, &[]), [1]);
        assert_eq!(draw(&Sampling { min_p: 0.3, ..all.clone() }, &logits, &[]), [1, 2]);
        let penalised = Sampling { repetition_penalty: 10.0, ..Sampling::default() };
        assert_eq!(draw(&penalised, &logits, &[1, 1]), [2]);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let sampling = Sampling { temperature: 0.5, ..Sampling::default() };
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let logits = [0.0, 0.5 * 3.0f32.ln()]; // at temperature 0.5: one to three
        let ones = (0..20_000).filter(|_| sampling.pick(&mut logits.to_vec(), &[], &mut rng) == 1).count();
        assert!((ones as f32 / 20_000.0 - 0.75).abs() < 0.01, "{ones}");
    }
}
