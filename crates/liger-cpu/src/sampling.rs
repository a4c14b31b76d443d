//! Choosing the next token from rows of logits: the largest, or one drawn.

use liger_tensor::{Draw, Error, Result, Tensor};

use crate::math::{exp, maximum, reduce};
use crate::parallel::{Disjoint, for_tasks, vectorized};

/// What cannot be drawn, as a share of the most likely token's probability.
const NOTHING: f32 = 1e-9;
/// Tokens whose weights are added up at once where one of them is looked for.
const STRETCH: usize = 512;

/// Logits and how many of them a row has.
fn rows_of(logits: &Tensor) -> Result<(&[f32], usize)> {
    Ok((logits.as_f32()?, logits.shape().last().copied().unwrap_or(1).max(1)))
}

/// What `choose(row number, row)` says of each row.
fn of_rows(logits: &[f32], vocabulary: usize, choose: impl Fn(usize, &[f32]) -> u32 + Sync) -> Vec<u32> {
    let rows = logits.len() / vocabulary;
    let mut chosen = vec![0; rows];
    let all = Disjoint::new(&mut chosen);
    for_tasks(rows, |i| {
        // SAFETY: each task has a number of its own.
        let chosen = unsafe { all.slice(i, 1) };
        chosen[0] = choose(i, &logits[i * vocabulary..(i + 1) * vocabulary]);
    });
    chosen
}

pub(crate) fn argmax(logits: &Tensor) -> Result<Vec<u32>> {
    let (logits, vocabulary) = rows_of(logits)?;
    Ok(of_rows(logits, vocabulary, |_, row| {
        let largest = vectorized!(|| maximum(row));
        row.iter().rposition(|x| *x == largest).unwrap_or(0) as u32
    }))
}

pub(crate) fn sample(logits: &Tensor, how: Draw, draws: &[f32]) -> Result<Vec<u32>> {
    let (all, vocabulary) = rows_of(logits)?;
    if all.len() != draws.len() * vocabulary {
        let expected = format!("{} rows", draws.len());
        return Err(Error::Shape { operation: "sample", found: logits.shape().to_vec(), expected });
    }
    Ok(of_rows(all, vocabulary, |i, row| draw_one(row, how, draws[i])))
}

fn draw_one(logits: &[f32], how: Draw, draw: f32) -> u32 {
    let weights = weights(logits, how);
    if how.top_k == 0 && how.top_p >= 1.0 {
        return draw_any(&weights, draw);
    }
    let likely = most_likely(&weights, how);
    let mut left = draw * likely.iter().map(|c| c.1).sum::<f32>();
    let chosen = likely.iter().find(|(_, weight)| {
        left -= weight;
        left <= 0.0
    });
    chosen.or(likely.last()).map_or(0, |c| c.0)
}

/// Probabilities in units of the largest; 0 for tokens that `min_p` leaves out.
fn weights(logits: &[f32], how: Draw) -> Vec<f32> {
    let mut weights = vec![0.0; logits.len()];
    vectorized!(|| {
        // Of the smallest temperatures the inverse is infinite, and times the largest's 0 no number.
        let inverse = (1.0 / how.temperature).min(f32::MAX);
        let (largest, least) = (maximum(logits), how.min_p.max(NOTHING));
        for (weight, x) in weights.iter_mut().zip(logits) {
            let e = exp((x - largest) * inverse);
            *weight = if e >= least { e } else { 0.0 };
        }
    },);
    weights
}

/// Number and sum of the weights that are at least so large.
fn of_at_least(weights: &[f32], least: f32) -> (usize, f32) {
    vectorized!(|| {
        let (mut counts, mut sums) = ([0u32; 16], [0.0f32; 16]);
        let chunks = weights.as_chunks::<16>();
        for chunk in chunks.0 {
            for lane in 0..16 {
                let is_in = chunk[lane] >= least;
                counts[lane] += u32::from(is_in);
                sums[lane] += if is_in { chunk[lane] } else { 0.0 };
            }
        }
        let rest = chunks.1.iter().filter(|weight| **weight >= least);
        let (count, sum) = rest.fold((0, 0.0), |(count, sum), weight| (count + 1, sum + weight));
        (count + counts.iter().sum::<u32>() as usize, sum + reduce(sums))
    },)
}

fn draw_any(weights: &[f32], draw: f32) -> u32 {
    let sum = |weights: &[f32]| of_at_least(weights, 0.0).1;
    let sums: Vec<f32> = weights.chunks(STRETCH).map(sum).collect();
    let mut left = draw * sums.iter().sum::<f32>();
    let mut last = 0;
    for (i, sum) in sums.iter().enumerate().filter(|(_, sum)| **sum > 0.0) {
        // Rounding may leave the last stretch a little short.
        last = i;
        if left <= *sum {
            break;
        }
        left -= sum;
    }
    let first = last * STRETCH;
    let mut chosen = first;
    for (i, weight) in weights[first..].iter().take(STRETCH).enumerate().filter(|(_, weight)| **weight > 0.0) {
        chosen = first + i;
        left -= weight;
        if left <= 0.0 {
            break;
        }
    }
    chosen as u32
}

/// What `top_k` and `top_p` leave, with their weights, largest first. Only as many as are surely enough are sorted: a vocabulary is
/// long, and few of it nearly always suffice.
fn most_likely(weights: &[f32], how: Draw) -> Vec<(u32, f32)> {
    let all = of_at_least(weights, 0.0).1;
    let is_enough = |least: &f32| {
        let (count, sum) = of_at_least(weights, *least);
        if how.top_k > 0 { count >= how.top_k } else { sum >= how.top_p * all }
    };
    let least = [1e-2, 1e-3, 1e-4, 1e-5, 1e-6].into_iter().find(is_enough).unwrap_or(f32::MIN_POSITIVE);
    let mut likely = Vec::new();
    for (first, chunk) in (0..).step_by(16).zip(weights.chunks(16)) {
        // Nearly all are skipped, sixteen at once.
        if chunk.iter().fold(false, |any, weight| any | (*weight >= least)) {
            let ids = first..first + chunk.len() as u32;
            likely.extend(ids.zip(chunk.iter().copied()).filter(|(_, weight)| *weight >= least));
        }
    }
    likely.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if let Some((_, smallest)) = how.top_k.checked_sub(1).and_then(|last| likely.get(last).copied()) {
        likely.truncate(likely.partition_point(|(_, weight)| *weight >= smallest));
    }
    let total = if how.top_k > 0 { likely.iter().map(|c| c.1).sum() } else { all };
    let (mass, mut sum) = (how.top_p * total, 0.0);
    let enough = likely.iter().position(|(_, weight)| {
        sum += weight;
        sum >= mass
    });
    likely.truncate(enough.map_or(likely.len(), |last| last + 1));
    likely
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_temperature_takes_the_most_likely() {
        for top_p in [1.0, 0.9] {
            let how = Draw { temperature: 1e-40, top_k: 0, top_p, min_p: 0.0 };
            assert_eq!(draw_one(&[1.0, -2.0, 3.0, 0.5], how, 0.99), 2);
        }
    }
}
