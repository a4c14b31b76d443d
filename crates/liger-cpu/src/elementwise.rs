//! Norms, RoPE, SwiGLU, embedding, dropout and sums.

use liger_tensor::checks::{self, same_length, whole_rows};
use liger_tensor::{Activation, Result, Storage, Tensor};

use crate::element::Element;
use crate::gemm::quantized_of;
use crate::math::{dot, exp, sigmoid, softmax};
use crate::parallel::{Disjoint, for_rows, vectorized};

pub(crate) fn add_bias(x: &mut Tensor, bias: &Tensor) -> Result<()> {
    whole_rows("add_bias", x, bias.len())?;
    let bias = bias.as_f32()?;
    for_rows(x.as_f32_mut()?, bias.len(), |_, rows| {
        for row in rows.chunks_exact_mut(bias.len()) {
            row.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
        }
    });
    Ok(())
}

pub(crate) fn axpby(y: &mut Tensor, a: f32, x: &Tensor, b: f32) -> Result<()> {
    same_length("axpby", y, x)?;
    match x.storage() {
        Storage::Bf16(x) => axpby_of(y.as_f32_mut()?, a, x, b),
        _ => axpby_of(y.as_f32_mut()?, a, x.as_f32()?, b),
    }
    Ok(())
}

fn axpby_of<T: Element>(y: &mut [f32], a: f32, x: &[T], b: f32) {
    for_rows(y, 1, |start, y| {
        let x = &x[start..start + y.len()];
        // `b = 0` must not read: the old elements may be anything.
        vectorized!(|| {
            if b == 0.0 {
                y.iter_mut().zip(x).for_each(|(y, x)| *y = a * x.widen());
            } else {
                y.iter_mut().zip(x).for_each(|(y, x)| *y = a * x.widen() + b * *y);
            }
        },);
    });
}

pub(crate) fn rms_norm_forward(out: &mut Tensor, x: &Tensor, weight: &Tensor, epsilon: f32) -> Result<()> {
    same_length("rms_norm_forward", out, x)?;
    whole_rows("rms_norm_forward", x, weight.len())?;
    let (x, weight) = (x.as_f32()?, weight.as_f32()?);
    match out.storage() {
        Storage::Bf16(_) => rms_norm_of(out.as_bf16_mut()?, x, weight, epsilon),
        _ => rms_norm_of(out.as_f32_mut()?, x, weight, epsilon),
    }
    Ok(())
}

fn rms_norm_of<T: Element>(out: &mut [T], x: &[f32], weight: &[f32], epsilon: f32) {
    let d = weight.len();
    for_rows(out, d, |first, out| {
        let x = &x[first * d..first * d + out.len()];
        vectorized!(|| {
            for (out, x) in out.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
                let scale = 1.0 / (dot(x, x) / d as f32 + epsilon).sqrt();
                for i in 0..d {
                    out[i] = T::narrow(x[i] * scale * weight[i]);
                }
            }
        },);
    });
}

/// With r = 1 / rms and h = weight dy: dx += r (h - x r^2 mean(h x)).
pub(crate) fn rms_norm_backward(dx: &mut Tensor, x: &Tensor, weight: &Tensor, epsilon: f32, dy: &Tensor) -> Result<()> {
    same_length("rms_norm_backward", dx, x)?;
    same_length("rms_norm_backward", dy, x)?;
    whole_rows("rms_norm_backward", x, weight.len())?;
    let (x, weight, dy) = (x.as_f32()?, weight.as_f32()?, dy.as_f32()?);
    let d = weight.len();
    for_rows(dx.as_f32_mut()?, d, |first, dx| {
        let range = first * d..first * d + dx.len();
        let (x, dy) = (&x[range.clone()], &dy[range]);
        vectorized!(|| {
            let mut h = vec![0.0f32; d];
            for ((dx, x), dy) in dx.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(dy.chunks_exact(d)) {
                for i in 0..d {
                    h[i] = weight[i] * dy[i];
                }
                let r = 1.0 / (dot(x, x) / d as f32 + epsilon).sqrt();
                let pull = r * r * dot(&h, x) / d as f32;
                for i in 0..d {
                    dx[i] += r * (h[i] - x[i] * pull);
                }
            }
        },);
    });
    Ok(())
}

pub(crate) fn rope(out: &mut Tensor, x: &Tensor, angles: (&Tensor, &Tensor)) -> Result<()> {
    turn(out, 0.0, (1.0, 1.0), x, angles)
}

/// `dx = keep dx + scale dy`, with `dy` turned back.
pub(crate) fn rope_backward(
    dx: &mut Tensor,
    keep: f32,
    scale: f32,
    dy: &Tensor,
    angles: (&Tensor, &Tensor),
) -> Result<()> {
    turn(dx, keep, (scale, -scale), dy, angles)
}

/// `out = keep out` plus `x` turned by the angles, cosines and sines times their factors.
fn turn(out: &mut Tensor, keep: f32, factors: (f32, f32), x: &Tensor, angles: (&Tensor, &Tensor)) -> Result<()> {
    same_length("rope", out, x)?;
    let (angles, width) = (Angles::of(x, angles)?, x.dim(1) * x.dim(2));
    let x = x.as_f32()?;
    for_rows(out.as_f32_mut()?, width, |first, rows| {
        let x = &x[first * width..first * width + rows.len()];
        vectorized!(|| {
            for (t, (row, x)) in rows.chunks_exact_mut(width).zip(x.chunks_exact(width)).enumerate() {
                angles.turn(first + t, row, keep, factors, x);
            }
        },);
    });
    Ok(())
}

/// Cosines and sines of token rows, `[N, D / 2]`.
#[derive(Clone, Copy)]
pub(crate) struct Angles<'a> {
    cos: &'a [f32],
    sin: &'a [f32],
    half: usize,
}

impl<'a> Angles<'a> {
    /// Those of `x [N, heads, D]`.
    pub(crate) fn of(x: &Tensor, (cos, sin): (&'a Tensor, &'a Tensor)) -> Result<Self> {
        checks::rope(x, cos, sin)?;
        Ok(Self { cos: cos.as_f32()?, sin: sin.as_f32()?, half: cos.dim(1) })
    }

    /// `out = keep out` plus `x` turned, for the heads of token `t`. What is not kept may be anything.
    #[inline(always)]
    pub(crate) fn turn(self, t: usize, out: &mut [f32], keep: f32, factors: (f32, f32), x: &[f32]) {
        let Self { cos, sin, half } = self;
        let (cos, sin) = (&cos[t * half..(t + 1) * half], &sin[t * half..(t + 1) * half]);
        let kept = |old: f32| if keep == 0.0 { 0.0 } else { keep * old };
        for (out, x) in out.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half)) {
            let ((out1, out2), (x1, x2)) = (out.split_at_mut(half), x.split_at(half));
            for i in 0..half {
                let (c, s) = (factors.0 * cos[i], factors.1 * sin[i]);
                out1[i] = kept(out1[i]) + x1[i] * c - x2[i] * s;
                out2[i] = kept(out2[i]) + x2[i] * c + x1[i] * s;
            }
        }
    }
}

/// From here on a sigmoid is 0 or 1; its argument's third power stays finite.
const SATURATED: f32 = 100.0;

pub(crate) fn glu_forward(out: &mut Tensor, gate: &Tensor, up: &Tensor, activation: Activation) -> Result<()> {
    same_length("glu_forward", out, gate)?;
    same_length("glu_forward", up, gate)?;
    match gate.storage() {
        Storage::Bf16(gate) => glu_of(out.as_bf16_mut()?, gate, up.as_bf16()?, activation),
        _ => glu_of(out.as_f32_mut()?, gate.as_f32()?, up.as_f32()?, activation),
    }
    Ok(())
}

fn glu_of<T: Element>(out: &mut [T], gate: &[T], up: &[T], activation: Activation) {
    #[inline(always)]
    fn run<T: Element>(out: &mut [T], gate: &[T], up: &[T], argument: impl Fn(f32) -> f32) {
        for ((out, g), u) in out.iter_mut().zip(gate).zip(up) {
            let g = g.widen();
            *out = T::narrow(g * sigmoid(argument(g)) * u.widen());
        }
    }
    let [a, b] = activation.coefficients();
    for_rows(out, 1, |start, out| {
        let (gate, up) = (&gate[start..start + out.len()], &up[start..start + out.len()]);
        // SiLU's argument has no third power that could be infinite.
        if b == 0.0 {
            vectorized!(|| run(out, gate, up, |g| a * g));
        } else {
            vectorized!(|| run(out, gate, up, |g| {
                let x = g.clamp(-SATURATED, SATURATED);
                x * (a + b * x * x)
            }));
        }
    });
}

/// The activation's derivative is s (1 + g (a + 3 b g^2) (1 - s)), s = sigmoid(a g + b g^3).
pub(crate) fn glu_backward(gate: &mut Tensor, up: &mut Tensor, dout: &Tensor, activation: Activation) -> Result<()> {
    same_length("glu_backward", gate, dout)?;
    same_length("glu_backward", up, dout)?;
    match dout.storage() {
        Storage::Bf16(dout) => glu_gradients(gate.as_bf16_mut()?, up.as_bf16_mut()?, dout, activation),
        _ => glu_gradients(gate.as_f32_mut()?, up.as_f32_mut()?, dout.as_f32()?, activation),
    }
    Ok(())
}

fn glu_gradients<T: Element>(gate: &mut [T], up: &mut [T], dout: &[T], activation: Activation) {
    /// With the sigmoid's argument and `g` times its derivative.
    #[inline(always)]
    fn run<T: Element>(gate: &mut [T], up: &mut [T], dout: &[T], argument: impl Fn(f32) -> (f32, f32)) {
        for ((gate, up), d) in gate.iter_mut().zip(up).zip(dout) {
            let (g, u, d) = (gate.widen(), up.widen(), d.widen());
            let (x, slope) = argument(g);
            let s = sigmoid(x);
            let ds = d * s;
            (*gate, *up) = (T::narrow(ds * u * (1.0 + slope * (1.0 - s))), T::narrow(ds * g));
        }
    }
    let [a, b] = activation.coefficients();
    let up = Disjoint::new(up);
    for_rows(gate, 1, |start, gate| {
        let dout = &dout[start..start + gate.len()];
        // SAFETY: the pieces of `gate` do not overlap, and `up` is cut at the same places.
        let up = unsafe { up.slice(start, gate.len()) };
        if b == 0.0 {
            vectorized!(|| run(gate, up, dout, |g| (a * g, a * g)));
        } else {
            vectorized!(|| run(gate, up, dout, |g| {
                let x = g.clamp(-SATURATED, SATURATED);
                (x * (a + b * x * x), x * (a + 3.0 * b * x * x))
            }));
        }
    });
}

pub(crate) fn embedding(out: &mut Tensor, table: &Tensor, ids: &[u32]) -> Result<()> {
    let (_, d) = checks::embedding(out, table, ids)?;
    for (row, &id) in out.as_f32_mut()?.chunks_exact_mut(d.max(1)).zip(ids) {
        let range = id as usize * d..(id as usize + 1) * d;
        match table.storage() {
            Storage::F32(table) => row.copy_from_slice(&table[range]),
            Storage::Bf16(table) => row.iter_mut().zip(&table[range]).for_each(|(x, t)| *x = t.to_f32()),
            Storage::Device(_) => quantized_of(table)?.row(id as usize, row),
        }
    }
    Ok(())
}

/// splitmix64 of element `index` of the stream `seed`.
fn splitmix(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// From -1 to 1.
pub(crate) fn uniform(seed: u64, index: u64) -> f32 {
    (splitmix(seed, index) >> 40) as f32 * (2.0 / (1u64 << 24) as f32) - 1.0
}

/// A hash of (seed, index) decides each element, so that the mask needs no memory and can be made again.
pub(crate) fn dropout(x: &mut Tensor, p: f32, seed: u64) -> Result<()> {
    let threshold = (f64::from(p) * u64::MAX as f64) as u64;
    let keep = 1.0 / (1.0 - p);
    for_rows(x.as_f32_mut()?, 1, |start, x| {
        for (i, x) in x.iter_mut().enumerate() {
            *x = if splitmix(seed, (start + i) as u64) < threshold { 0.0 } else { *x * keep };
        }
    });
    Ok(())
}

pub(crate) fn softmax_forward(x: &mut Tensor) -> Result<()> {
    let d = x.shape().last().copied().unwrap_or(1).max(1);
    for_rows(x.as_f32_mut()?, d, |_, rows| {
        vectorized!(|| {
            for row in rows.chunks_exact_mut(d) {
                softmax(row);
            }
        },);
    });
    Ok(())
}

/// dx = y (dy - sum(y dy)).
pub(crate) fn softmax_backward(dy: &mut Tensor, y: &Tensor) -> Result<()> {
    same_length("softmax_backward", dy, y)?;
    let (d, y) = (y.shape().last().copied().unwrap_or(1).max(1), y.as_f32()?);
    for_rows(dy.as_f32_mut()?, d, |first, dy| {
        let y = &y[first * d..first * d + dy.len()];
        vectorized!(|| {
            for (dy, y) in dy.chunks_exact_mut(d).zip(y.chunks_exact(d)) {
                softmax_backward_row(dy, y);
            }
        },);
    });
    Ok(())
}

#[inline(always)]
pub(crate) fn softmax_backward_row(dy: &mut [f32], y: &[f32]) {
    let inner = dot(dy, y);
    for (dy, y) in dy.iter_mut().zip(y) {
        *dy = y * (*dy - inner);
    }
}

/// Row statistics that both losses need: the maximum and the sum of exponentials above it.
#[inline(always)]
pub(crate) fn log_sum_exp(row: &[f32]) -> f32 {
    let max = crate::math::maximum(row);
    let mut lanes = [0.0f32; 16];
    let chunks = row.chunks_exact(16);
    let mut sum: f32 = chunks.remainder().iter().map(|&x| exp(x - max)).sum();
    for chunk in chunks {
        for lane in 0..16 {
            lanes[lane] += exp(chunk[lane] - max);
        }
    }
    sum += crate::math::reduce(lanes);
    max + sum.ln()
}
