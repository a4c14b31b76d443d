//! LoRA's products for projections that share their input: the input, a tall matrix, and its gradient go through memory once for all
//! of them.

use liger_tensor::{Result, Storage, Tensor};

use crate::narrow::{self, FEW, TALL};

/// Whether adapters go together: they are short together, and the input is tall.
pub(crate) fn go_together(a: &[&Tensor], x: &Tensor) -> bool {
    a.len() > 1 && ranks(a).iter().sum::<usize>() <= FEW && x.dim(0) >= TALL
}

fn ranks(a: &[&Tensor]) -> Vec<usize> {
    a.iter().map(|a| a.dim(0)).collect()
}

/// All of `a`, `[ranks, inputs]`.
fn stacked(a: &[&Tensor]) -> Result<Vec<f32>> {
    a.iter().map(|a| a.as_f32()).collect::<Result<Vec<_>>>().map(|a| a.concat())
}

/// `low[i] = x a[i]^T`.
pub(crate) fn forward(low: &mut [Tensor], x: &Tensor, a: &[&Tensor]) -> Result<()> {
    let ranks = ranks(a);
    let (rows, width) = (x.dim(0), ranks.iter().sum());
    let (a, sizes) = (stacked(a)?, (rows, width, x.len() / rows));
    let mut all = vec![0.0; rows * width];
    match x.storage() {
        Storage::Bf16(x) => narrow::few_outputs(&mut all, x, &a, sizes, 1.0, false),
        _ => narrow::few_outputs(&mut all, x.as_f32()?, &a, sizes, 1.0, false),
    }
    let mut first = 0;
    for (low, rank) in low.iter_mut().zip(ranks) {
        for (low, all) in low.as_f32_mut()?.chunks_exact_mut(rank).zip(all.chunks_exact(width)) {
            low.copy_from_slice(&all[first..first + rank]);
        }
        first += rank;
    }
    Ok(())
}

/// `da[i] += dlow[i]^T x` and `dx += sum dlow[i] a[i]`.
pub(crate) fn backward(
    dx: Option<&mut Tensor>,
    da: &mut [&mut Tensor],
    dlow: &[Tensor],
    x: &Tensor,
    a: &[&Tensor],
) -> Result<()> {
    let ranks = ranks(a);
    let (rows, width) = (x.dim(0), ranks.iter().sum());
    let inputs = x.len() / rows;
    let mut all = vec![0.0; rows * width];
    let mut first = 0;
    for (dlow, &rank) in dlow.iter().zip(&ranks) {
        for (all, dlow) in all.chunks_exact_mut(width).zip(dlow.as_f32()?.chunks_exact(rank)) {
            all[first..first + rank].copy_from_slice(dlow);
        }
        first += rank;
    }
    let mut gradients = vec![0.0; width * inputs];
    match x.storage() {
        Storage::Bf16(x) => narrow::few_rows(&mut gradients, &all, x, (width, inputs, rows), 1.0, false),
        _ => narrow::few_rows(&mut gradients, &all, x.as_f32()?, (width, inputs, rows), 1.0, false),
    }
    let mut rest = gradients.as_slice();
    for (da, rank) in da.iter_mut().zip(ranks) {
        let (own, after) = rest.split_at(rank * inputs);
        rest = after;
        da.as_f32_mut()?.iter_mut().zip(own).for_each(|(da, own)| *da += own);
    }
    if let Some(dx) = dx {
        narrow::few_terms(dx.as_f32_mut()?, &all, &stacked(a)?, (rows, inputs, width), 1.0, true);
    }
    Ok(())
}
