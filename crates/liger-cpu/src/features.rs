//! Feature maps of query and key, and the gates that come out of the key.

use liger_tensor::checks::{self, same_length};
use liger_tensor::{FeatureGradients, FeatureMap, FeatureSpec, Features, Gate, Result, Tensor};

use crate::elementwise::{Angles, rope_backward, softmax_backward_row};
use crate::math::{dot, exp, sigmoid, softmax, softplus};
use crate::parallel::{Disjoint, for_rows, vectorized};

/// `map(x)` of heads of `d`. A share is scaled when its gate is there.
#[inline(always)]
fn map_heads(out: &mut [f32], x: &[f32], d: usize, map: FeatureMap) {
    match map {
        FeatureMap::Softmax | FeatureMap::Share => {
            for (out, x) in out.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
                out.copy_from_slice(x);
                softmax(out);
            }
        }
        // 1 - sigmoid(x) = sigmoid(-x), without the cancellation.
        FeatureMap::OneMinusSigmoid => out.iter_mut().zip(x).for_each(|(y, x)| *y = sigmoid(-x)),
    }
}

/// Overwrites the gradient of `map(x)` by that of `x`, for heads of `scratch.len()`.
#[inline(always)]
fn map_heads_backward(dy: &mut [f32], x: &[f32], scratch: &mut [f32], map: FeatureMap) {
    let d = scratch.len();
    match map {
        FeatureMap::Softmax | FeatureMap::Share => {
            for (dy, x) in dy.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
                scratch.copy_from_slice(x);
                softmax(scratch);
                softmax_backward_row(dy, scratch);
            }
        }
        FeatureMap::OneMinusSigmoid => {
            for (dy, x) in dy.iter_mut().zip(x) {
                let s = sigmoid(-x);
                *dy *= -s * (1.0 - s);
            }
        }
    }
}

/// RoPE and feature map of `x [N, heads, D]`, in one pass over it.
fn turn_and_map(
    (turned, mapped): (&mut Tensor, &mut Tensor),
    x: &Tensor,
    angles: (&Tensor, &Tensor),
    map: FeatureMap,
) -> Result<()> {
    same_length("features_forward", turned, x)?;
    same_length("features_forward", mapped, x)?;
    let (angles, d, width) = (Angles::of(x, angles)?, x.dim(2), x.dim(1) * x.dim(2));
    let (x, turned) = (x.as_f32()?, Disjoint::new(turned.as_f32_mut()?));
    for_rows(mapped.as_f32_mut()?, width, |first, mapped| {
        let x = &x[first * width..first * width + mapped.len()];
        // SAFETY: cut at the places where `mapped` is.
        let turned = unsafe { turned.slice(first * width, mapped.len()) };
        vectorized!(|| {
            let rows = turned.chunks_exact_mut(width).zip(mapped.chunks_exact_mut(width));
            for (t, ((turned, mapped), x)) in rows.zip(x.chunks_exact(width)).enumerate() {
                angles.turn(first + t, turned, 0.0, (1.0, 1.0), x);
                map_heads(mapped, x, d, map);
            }
        },);
    });
    Ok(())
}

/// The log gate of a head whose gate is one of the mean of its key.
fn mean_gate(gate: Gate, k: &[f32], divisor: f32) -> f32 {
    let sign = if gate == Gate::MeanNegativeSoftplus { 1.0 } else { -1.0 };
    -softplus(sign * mean(k)) / divisor
}

/// The factor `D (1 - a)` of a [`FeatureMap::Share`].
fn share(log_gate: f32, d: usize) -> f32 {
    -log_gate.exp_m1() * d as f32
}

fn mean(row: &[f32]) -> f32 {
    row.iter().sum::<f32>() / row.len() as f32
}

pub(crate) fn forward(
    out: Features<'_>,
    (q, k): (&Tensor, &Tensor),
    angles: (&Tensor, &Tensor),
    spec: FeatureSpec,
) -> Result<()> {
    let Features { rope_q, rope_k, query, key, log_gate } = out;
    turn_and_map((rope_q, query), q, angles, spec.query)?;
    turn_and_map((rope_k, key), k, angles, spec.key)?;
    same_length("features_forward", log_gate, k)?;
    let (heads, d, k) = (k.dim(1), k.dim(2), k.as_f32()?);
    for_rows(log_gate.as_f32_mut()?, d, |first, out| {
        let k = &k[first * d..first * d + out.len()];
        match spec.gate {
            Gate::LogSigmoid { divisor } => {
                vectorized!(|| out.iter_mut().zip(k).for_each(|(g, k)| *g = -softplus(-k) / divisor),);
            }
            Gate::NegativeExp => vectorized!(|| out.iter_mut().zip(k).for_each(|(g, k)| *g = -exp(*k)),),
            Gate::None => out.fill(0.0),
            Gate::MeanLogSigmoid | Gate::MeanLogSigmoidOver { .. } | Gate::MeanNegativeSoftplus => {
                for (row, (out, k)) in out.chunks_exact_mut(d).zip(k.chunks_exact(d)).enumerate() {
                    out.fill(mean_gate(spec.gate, k, spec.gate.head_divisor((first + row) % heads, heads)));
                }
            }
        }
    });
    if spec.key == FeatureMap::Share {
        let log_gate = log_gate.as_f32()?;
        for_rows(key.as_f32_mut()?, d, |first, key| {
            for (row, key) in key.chunks_exact_mut(d).enumerate() {
                let factor = share(log_gate[(first + row) * d], d);
                key.iter_mut().for_each(|key| *key *= factor);
            }
        });
    }
    Ok(())
}

pub(crate) fn backward(
    gradients: FeatureGradients<'_>,
    (q, k): (&Tensor, &Tensor),
    angles: (&Tensor, &Tensor),
    spec: FeatureSpec,
) -> Result<()> {
    let FeatureGradients { q: dq, k: dk, log_gate, rope_q, rope_k, recurrent, window } = gradients;
    query_backward(dq, q, spec.query, (recurrent, window), rope_q, angles)?;
    key_backward(dk, log_gate, k, spec)?;
    rope_backward(dk, recurrent, window, rope_k, angles)
}

/// `dq = recurrent` times its gradient through the feature map, plus `window` times that through RoPE.
fn query_backward(
    dq: &mut Tensor,
    q: &Tensor,
    map: FeatureMap,
    (recurrent, window): (f32, f32),
    dturned: &Tensor,
    angles: (&Tensor, &Tensor),
) -> Result<()> {
    same_length("features_backward", dq, q)?;
    same_length("features_backward", dturned, q)?;
    let (angles, d, width) = (Angles::of(q, angles)?, q.dim(2), q.dim(1) * q.dim(2));
    let (q, dturned) = (q.as_f32()?, dturned.as_f32()?);
    for_rows(dq.as_f32_mut()?, width, |first, dq| {
        let range = first * width..first * width + dq.len();
        let (q, dturned) = (&q[range.clone()], &dturned[range]);
        vectorized!(|| {
            let mut scratch = vec![0.0f32; d];
            let rows = dq.chunks_exact_mut(width).zip(q.chunks_exact(width)).zip(dturned.chunks_exact(width));
            for (t, ((dq, q), dturned)) in rows.enumerate() {
                map_heads_backward(dq, q, &mut scratch, map);
                angles.turn(first + t, dq, recurrent, (window, -window), dturned);
            }
        },);
    });
    Ok(())
}

/// Overwrites the gradients of write key and log gate: `dkey` by that of `k`.
fn key_backward(dkey: &mut Tensor, dlog_gate: &Tensor, k: &Tensor, spec: FeatureSpec) -> Result<()> {
    let through_share = share_backward(dkey, k, spec)?;
    same_length("features_backward", dkey, k)?;
    same_length("features_backward", dlog_gate, k)?;
    let (heads, d, k, dlog_gate) = (k.dim(1), k.dim(2), k.as_f32()?, dlog_gate.as_f32()?);
    for_rows(dkey.as_f32_mut()?, d, |first, dk| {
        let range = first * d..first * d + dk.len();
        let (k, dg) = (&k[range.clone()], &dlog_gate[range]);
        vectorized!(|| map_heads_backward(dk, k, &mut vec![0.0f32; d], spec.key));
        vectorized!(|| match spec.gate {
            Gate::None => {}
            Gate::LogSigmoid { divisor } => {
                for ((dk, k), dg) in dk.iter_mut().zip(k).zip(dg) {
                    *dk += dg * sigmoid(-k) / divisor;
                }
            }
            Gate::NegativeExp => {
                for ((dk, k), dg) in dk.iter_mut().zip(k).zip(dg) {
                    // Below the clamp the gate's gradient is exactly 0, and exp(k) may be infinite.
                    *dk -= if *dg == 0.0 { 0.0 } else { dg * exp(*k) };
                }
            }
            Gate::MeanLogSigmoid | Gate::MeanLogSigmoidOver { .. } | Gate::MeanNegativeSoftplus => {
                let rows = dk.chunks_exact_mut(d).zip(k.chunks_exact(d)).zip(dg.chunks_exact(d));
                for (row, ((dk, k), dg)) in rows.enumerate() {
                    // d logsigmoid(m) = sigmoid(-m); d -softplus(m) = -sigmoid(m); the mean spreads it over the head.
                    let m = mean(k);
                    let slope = if spec.gate == Gate::MeanNegativeSoftplus { -sigmoid(m) } else { sigmoid(-m) };
                    let slope = slope / spec.gate.head_divisor((first + row) % heads, heads);
                    let through_share = through_share.get(first + row).copied().unwrap_or(0.0);
                    let each = slope * (dg.iter().sum::<f32>() + through_share) / d as f32;
                    dk.iter_mut().for_each(|dk| *dk += each);
                }
            }
        },);
    });
    Ok(())
}

/// Of a [`FeatureMap::Share`]: makes the gradient of the write key that of the softmax, and returns that of each head's log
/// gate; empty for other maps.
fn share_backward(dkey: &mut Tensor, k: &Tensor, spec: FeatureSpec) -> Result<Vec<f32>> {
    if spec.key != FeatureMap::Share {
        return Ok(Vec::new());
    }
    same_length("features_backward", dkey, k)?;
    let (heads, d, k) = (k.dim(1), k.dim(2), k.as_f32()?);
    let dkey = dkey.as_f32_mut()?;
    let mut through_share = vec![0.0f32; k.len() / d];
    let gates = Disjoint::new(&mut through_share);
    for_rows(dkey, d, |first, dkey| {
        // SAFETY: one element a row, cut where `dkey` is.
        let gates = unsafe { gates.slice(first, dkey.len() / d) };
        let mut softmaxed = vec![0.0f32; d];
        for (row, (dkey, gate)) in dkey.chunks_exact_mut(d).zip(gates).enumerate() {
            let k = &k[(first + row) * d..(first + row + 1) * d];
            softmaxed.copy_from_slice(k);
            softmax(&mut softmaxed);
            let log_gate = mean_gate(spec.gate, k, spec.gate.head_divisor((first + row) % heads, heads));
            // d (1 - exp(g)) = -exp(g).
            *gate = -log_gate.exp() * d as f32 * dot(dkey, &softmaxed);
            let factor = share(log_gate, d);
            dkey.iter_mut().for_each(|dkey| *dkey *= factor);
        }
    });
    Ok(through_share)
}

/// Stretch of the head that slot `m` of `slots` is the mean of: PyTorch's adaptive average pooling.
fn stretch(m: usize, slots: usize, d: usize) -> std::ops::Range<usize> {
    m * d / slots..((m + 1) * d).div_ceil(slots)
}

const GSA_DIVISOR: f32 = 16.0;

pub(crate) fn slot_gates_forward(log_gate: &mut Tensor, write: &mut Tensor, k: &Tensor) -> Result<()> {
    same_length("slot_gates_forward", write, log_gate)?;
    let (d, slots) = checks::slots("slot_gates_forward", log_gate, k)?;
    let k = k.as_f32()?;
    let write = Disjoint::new(write.as_f32_mut()?);
    for_rows(log_gate.as_f32_mut()?, slots, |first, log_gate| {
        // SAFETY: cut at the places where `log_gate` is.
        let write = unsafe { write.slice(first * slots, log_gate.len()) };
        let rows = log_gate.chunks_exact_mut(slots).zip(write.chunks_exact_mut(slots));
        for ((gates, writes), k) in rows.zip(k[first * d..].chunks_exact(d)) {
            for m in 0..slots {
                gates[m] = -softplus(-mean(&k[stretch(m, slots, d)])) / GSA_DIVISOR;
                writes[m] = -gates[m].exp_m1();
            }
        }
    });
    Ok(())
}

/// write = 1 - exp(g), so both gradients meet in g: dg - exp(g) dwrite.
pub(crate) fn slot_gates_backward(dk: &mut Tensor, dlog_gate: &Tensor, dwrite: &Tensor, k: &Tensor) -> Result<()> {
    same_length("slot_gates_backward", dk, k)?;
    same_length("slot_gates_backward", dwrite, dlog_gate)?;
    let (d, slots) = checks::slots("slot_gates_backward", dlog_gate, k)?;
    let (k, dlog_gate, dwrite) = (k.as_f32()?, dlog_gate.as_f32()?, dwrite.as_f32()?);
    for_rows(dk.as_f32_mut()?, d, |first, dk| {
        for (row, dk) in dk.chunks_exact_mut(d).enumerate() {
            let k = &k[(first + row) * d..(first + row + 1) * d];
            for m in 0..slots {
                let range = stretch(m, slots, d);
                let pooled = mean(&k[range.clone()]);
                let gate = (-softplus(-pooled) / GSA_DIVISOR).exp();
                let at = (first + row) * slots + m;
                let total = (dlog_gate[at] - gate * dwrite[at]) * sigmoid(-pooled) / GSA_DIVISOR;
                let share = total / range.len() as f32;
                dk[range].iter_mut().for_each(|dk| *dk += share);
            }
        }
    });
    Ok(())
}
