//! The gated recurrence o_t = q_t S_t over chunks of 64 tokens, its backward, and its one-token step.
//!
//! Definition and derivation: `tests/golden/reference.py` and `tests/golden/chunked.py`. The state belongs to the
//! key/value head; the query heads of its group are stacked as rows. Work is shared by (sequence, key/value head).
//!
//! With the gate on the key axis, A_ij = q_i E_ij k_j weighs the values; on the value axis A_ij = q_i k_j weighs
//! gated values, which is the same three sums of [`chunk`] with query and output gradient, key and value exchanged.

mod chunk;

use liger_tensor::checks::RecurrenceSizes;
use liger_tensor::{GateAxis, Recurrence, RecurrenceGradients, Result, Tensor};

use crate::gemm::{matmul, rows};
use crate::math::{add_scaled, exp};
use crate::parallel::{Disjoint, for_tasks, vectorized};
use chunk::{CHUNK, Chunk};

const ALONE: gemm::Parallelism = gemm::Parallelism::None;
/// exp(-40) is nothing beside any sum in float32; below it a chunk's sums would swallow the small gates.
const LOWEST_GATE: f32 = -40.0;

/// Sizes and borrowed inputs.
#[derive(Clone, Copy)]
struct Problem<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    gate: &'a [f32],
    axis: GateAxis,
    sizes: RecurrenceSizes,
}

impl<'a> Problem<'a> {
    fn new(operation: &'static str, inputs: Recurrence<'a>) -> Result<Self> {
        let sizes = RecurrenceSizes::of(operation, &inputs)?;
        Ok(Self {
            q: inputs.q.as_f32()?,
            k: inputs.k.as_f32()?,
            v: inputs.v.as_f32()?,
            gate: inputs.log_gate.as_f32()?,
            axis: inputs.axis,
            sizes,
        })
    }

    /// Rows `range` of one head of `x [N, K, width]`.
    fn kv_rows(&self, x: &[f32], width: usize, head: usize, range: std::ops::Range<usize>) -> Vec<f32> {
        let mut out = Vec::with_capacity(range.len() * width);
        for t in range {
            let at = (t * self.sizes.heads.kv + head) * width;
            out.extend_from_slice(&x[at..at + width]);
        }
        out
    }

    /// Rows `range` of the query group of one head of `x [N, H, width]`.
    fn query_rows(&self, x: &[f32], width: usize, head: usize, range: std::ops::Range<usize>) -> Vec<f32> {
        let count = self.sizes.heads.group() * width;
        let mut out = Vec::with_capacity(range.len() * count);
        for t in range {
            let at = (t * self.sizes.heads.query + head * self.sizes.heads.group()) * width;
            out.extend_from_slice(&x[at..at + count]);
        }
        out
    }

    fn load(&self, head: usize, range: std::ops::Range<usize>) -> Loaded {
        let mut gates = self.kv_rows(self.gate, self.sizes.gate_dim, head, range.clone());
        gates.iter_mut().for_each(|g| *g = g.max(LOWEST_GATE));
        Loaded {
            q: self.query_rows(self.q, self.sizes.heads.dim, head, range.clone()),
            k: self.kv_rows(self.k, self.sizes.heads.dim, head, range.clone()),
            v: self.kv_rows(self.v, self.sizes.value_dim, head, range),
            gates,
        }
    }
}

/// One chunk of one head, contiguous: q `[C, G, Dk]`, k `[C, Dk]`, v `[C, Dv]`, gates.
struct Loaded {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    gates: Vec<f32>,
}

/// `x [C, G, D] * decay [C, D]`.
fn times_decay(x: &[f32], decay: &[f32], dim: usize, group: usize) -> Vec<f32> {
    let mut out = x.to_vec();
    vectorized!(|| {
        for (row, x) in out.chunks_exact_mut(dim).enumerate() {
            let i = row / group;
            x.iter_mut().zip(&decay[i * dim..(i + 1) * dim]).for_each(|(x, e)| *x *= e);
        }
    },);
    out
}

/// `a [m, k] b [k, n]`, added to `c`.
fn add_product(c: &mut [f32], sizes: (usize, usize, usize), a: crate::gemm::Matrix<'_>, b: crate::gemm::Matrix<'_>) {
    let n = sizes.1;
    matmul(c, n, sizes, a, b, 1.0, true, ALONE);
}

/// q_i k_j for j <= i, else 0: `[C, G, C]`.
fn ungated_scores(x: &[f32], y: &[f32], dim: usize, group: usize) -> Vec<f32> {
    let (len, count) = (y.len() / dim, x.len() / dim);
    let mut a = vec![0.0f32; count * len];
    matmul(&mut a, len, (count, len, dim), rows(x, dim), rows(y, dim).t(), 1.0, false, ALONE);
    for (row, a) in a.chunks_exact_mut(len).enumerate() {
        a[row / group + 1..].fill(0.0);
    }
    a
}

/// S := decay on `axis` of S, then + k^T v with the gated one decayed to the chunk's end.
fn advance(state: &mut [f32], c: &Loaded, chunk: &Chunk<'_>, axis: GateAxis, dk: usize, dv: usize) {
    let (total, to_end) = (chunk.total_decay(), chunk.end_decay());
    let len = c.k.len() / dk;
    decay_state(state, &total, axis, dv);
    match axis {
        GateAxis::Key => {
            let k = times_decay(&c.k, &to_end, dk, 1);
            add_product(state, (dk, dv, len), rows(&k, dk).t(), rows(&c.v, dv));
        }
        GateAxis::Value => {
            let v = times_decay(&c.v, &to_end, dv, 1);
            add_product(state, (dk, dv, len), rows(&c.k, dk).t(), rows(&v, dv));
        }
    }
}

fn decay_state(state: &mut [f32], total: &[f32], axis: GateAxis, dv: usize) {
    for (d, row) in state.chunks_exact_mut(dv).enumerate() {
        match axis {
            GateAxis::Key => row.iter_mut().for_each(|s| *s *= total[d]),
            GateAxis::Value => row.iter_mut().zip(total).for_each(|(s, e)| *s *= e),
        }
    }
}

/// Output `[C, G, Dv]` of one chunk given the state before it.
fn chunk_output(c: &Loaded, chunk: &Chunk<'_>, state: &[f32], p: &Problem<'_>) -> Vec<f32> {
    let (dk, dv, group) = (p.sizes.heads.dim, p.sizes.value_dim, p.sizes.heads.group());
    let (len, count) = (c.k.len() / dk, c.q.len() / dk);
    let from_start = chunk.start_decay();
    match p.axis {
        GateAxis::Key => {
            let mut out = vec![0.0f32; count * dv];
            let a = chunk.scores(&c.q, &c.k);
            add_product(&mut out, (count, dv, len), rows(&a, len), rows(&c.v, dv));
            let q = times_decay(&c.q, &from_start, dk, group);
            add_product(&mut out, (count, dv, dk), rows(&q, dk), rows(state, dv));
            out
        }
        GateAxis::Value => {
            let mut out = vec![0.0f32; count * dv];
            add_product(&mut out, (count, dv, dk), rows(&c.q, dk), rows(state, dv));
            let mut out = times_decay(&out, &from_start, dv, group);
            let inner = chunk.to_rows(&ungated_scores(&c.q, &c.k, dk, group), &c.v);
            add_scaled(&mut out, 1.0, &inner);
            out
        }
    }
}

/// One token: S := gate S + k^T v; o = q S.
fn step(out: &mut [f32], state: &mut [f32], c: &Loaded, p: &Problem<'_>) {
    let (dk, dv) = (p.sizes.heads.dim, p.sizes.value_dim);
    vectorized!(|| {
        let decay: Vec<f32> = c.gates.iter().map(|&g| exp(g)).collect();
        out.fill(0.0);
        for (d, row) in state.chunks_exact_mut(dv).enumerate() {
            let k = c.k[d];
            match p.axis {
                GateAxis::Key => row.iter_mut().zip(&c.v).for_each(|(s, v)| *s = decay[d] * *s + k * v),
                GateAxis::Value => {
                    row.iter_mut().zip(&c.v).zip(&decay).for_each(|((s, v), e)| *s = e * *s + k * v);
                }
            }
            for (g, out) in out.chunks_exact_mut(dv).enumerate() {
                add_scaled(out, c.q[g * dk + d], row);
            }
        }
    },);
}

pub(crate) fn forward(out: &mut Tensor, inputs: Recurrence<'_>, state: Option<&mut Tensor>) -> Result<()> {
    let p = Problem::new("gated_recurrence_forward", inputs)?;
    let (dk, dv, group, kv) = (p.sizes.heads.dim, p.sizes.value_dim, p.sizes.heads.group(), p.sizes.heads.kv);
    let sequences = inputs.sequences.list();
    p.sizes.check_out("gated_recurrence_forward", out, inputs.sequences)?;
    p.sizes.check_state("gated_recurrence_forward", state.as_deref(), inputs.sequences)?;
    let states = match state {
        Some(state) => Some(Disjoint::new(state.as_f32_mut()?)),
        None => None,
    };
    let out = Disjoint::new(out.as_f32_mut()?);
    for_tasks(sequences.len() * kv, |task| {
        let (s, head) = (sequences[task / kv], task % kv);
        let mut scratch;
        let state = match &states {
            // SAFETY: slots differ between sequences, so each (slot, head) has one task.
            Some(states) => unsafe { states.slice((s.slot * kv + head) * p.sizes.state_len(), p.sizes.state_len()) },
            None => {
                scratch = vec![0.0f32; p.sizes.state_len()];
                &mut scratch[..]
            }
        };
        for first in (0..s.len).step_by(CHUNK) {
            let range = s.start + first..s.start + s.len.min(first + CHUNK);
            let c = p.load(head, range.clone());
            let width = group * dv;
            // SAFETY: each (token, head) belongs to exactly one task.
            let out_row = |t: usize| unsafe { out.slice((t * p.sizes.heads.query + head * group) * dv, width) };
            if s.len == 1 {
                step(out_row(s.start), state, &c, &p);
                continue;
            }
            let chunk = Chunk::new(&c.gates, p.sizes.gate_dim, group);
            let block = chunk_output(&c, &chunk, state, &p);
            for (t, row) in range.zip(block.chunks_exact(width)) {
                out_row(t).copy_from_slice(row);
            }
            advance(state, &c, &chunk, p.axis, dk, dv);
        }
    });
    Ok(())
}

pub(crate) fn backward(
    gradients: RecurrenceGradients<'_>,
    inputs: Recurrence<'_>,
    initial: Option<&Tensor>,
    dout: &Tensor,
) -> Result<()> {
    let p = Problem::new("gated_recurrence_backward", inputs)?;
    p.sizes.check_state("gated_recurrence_backward", initial, inputs.sequences)?;
    let (dk, dv, group, kv) = (p.sizes.heads.dim, p.sizes.value_dim, p.sizes.heads.group(), p.sizes.heads.kv);
    let (sequences, len) = (inputs.sequences.list(), p.sizes.state_len());
    let initial = initial.map(Tensor::as_f32).transpose()?;
    let dout = dout.as_f32()?;
    let out = Outputs {
        q: Disjoint::new(gradients.q.as_f32_mut()?),
        k: Disjoint::new(gradients.k.as_f32_mut()?),
        v: Disjoint::new(gradients.v.as_f32_mut()?),
        gate: Disjoint::new(gradients.log_gate.as_f32_mut()?),
    };
    let dstates = match gradients.state {
        Some(state) => Some(Disjoint::new(state.as_f32_mut()?)),
        None => None,
    };
    for_tasks(sequences.len() * kv, |task| {
        let (s, head) = (sequences[task / kv], task % kv);
        let range = |n: usize| s.start + n * CHUNK..s.start + s.len.min((n + 1) * CHUNK);
        let chunks = s.len.div_ceil(CHUNK);

        // The state before every chunk, and after the last.
        let mut states = vec![0.0f32; (chunks + 1) * len];
        if let Some(initial) = initial {
            let at = (s.slot * kv + head) * len;
            states[..len].copy_from_slice(&initial[at..at + len]);
        }
        for n in 0..chunks {
            let c = p.load(head, range(n));
            let (before, after) = states[n * len..(n + 2) * len].split_at_mut(len);
            after.copy_from_slice(before);
            advance(after, &c, &Chunk::new(&c.gates, p.sizes.gate_dim, group), p.axis, dk, dv);
        }

        let mut dstate = vec![0.0f32; len];
        // The gate's gradient is one sum from the end of the sequence, kept in float64: it runs over many tokens.
        let mut gate_sum = vec![0.0f64; p.sizes.gate_dim];
        if let Some(dstates) = &dstates {
            // SAFETY: each (sequence, head) has one task.
            dstate.copy_from_slice(unsafe { dstates.slice(task * len, len) });
            for (i, (state, d)) in states[chunks * len..].iter().zip(&dstate).enumerate() {
                let gated = if p.axis == GateAxis::Key { i / dv } else { i % dv };
                gate_sum[gated] += f64::from(state * d);
            }
        }
        for n in (0..chunks).rev() {
            let c = p.load(head, range(n));
            let chunk = Chunk::new(&c.gates, p.sizes.gate_dim, group);
            let dout = p.query_rows(dout, dv, head, range(n));
            let g = chunk_gradients(&c, &chunk, &states[n * len..(n + 1) * len], &mut dstate, &dout, &p);
            out.store(&p, &g, &c, head, range(n), &mut gate_sum);
        }
        if let Some(dstates) = &dstates {
            // SAFETY: each (sequence, head) has one task.
            unsafe { dstates.slice(task * len, len) }.copy_from_slice(&dstate);
        }
    });
    Ok(())
}

/// Gradients of one chunk; `gate` holds each token's own term, `[C, D]`, before the sum over the later ones.
struct ChunkGradients {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    gate: Vec<f32>,
}

/// Also turns the gradient of the state after the chunk into that of the state before it.
fn chunk_gradients(
    c: &Loaded,
    chunk: &Chunk<'_>,
    state: &[f32],
    dstate: &mut [f32],
    dout: &[f32],
    p: &Problem<'_>,
) -> ChunkGradients {
    let (dk, dv, group) = (p.sizes.heads.dim, p.sizes.value_dim, p.sizes.heads.group());
    let (len, count) = (c.k.len() / dk, c.q.len() / dk);
    let (from_start, to_end, total) = (chunk.start_decay(), chunk.end_decay(), chunk.total_decay());
    let product = |sizes: (usize, usize, usize), a, b| {
        let mut c = vec![0.0f32; sizes.0 * sizes.1];
        add_product(&mut c, sizes, a, b);
        c
    };
    match p.axis {
        GateAxis::Key => {
            let da = ungated_scores(dout, &c.v, dv, group);
            // dq = exp(b) (do S^T) + sum_j dA k E
            let dq = product((count, dk, dv), rows(dout, dv), rows(state, dv).t());
            let mut dq = times_decay(&dq, &from_start, dk, group);
            add_scaled(&mut dq, 1.0, &chunk.to_rows(&da, &c.k));
            // dk = exp(e - b) (v dS^T) + sum_i dA q E
            let dkey = product((len, dk, dv), rows(&c.v, dv), rows(dstate, dv).t());
            let mut dkey = times_decay(&dkey, &to_end, dk, 1);
            add_scaled(&mut dkey, 1.0, &chunk.to_columns(&da, &c.q));
            // dv = (k exp(e - b)) dS + A^T do
            let k = times_decay(&c.k, &to_end, dk, 1);
            let mut dvalue = product((len, dv, dk), rows(&k, dk), rows(dstate, dv));
            let a = chunk.scores(&c.q, &c.k);
            add_product(&mut dvalue, (len, dv, count), rows(&a, len).t(), rows(dout, dv));
            // dS = exp(e) dS + (q exp(b))^T do
            let q = times_decay(&c.q, &from_start, dk, group);
            decay_state(dstate, &total, p.axis, dv);
            add_product(dstate, (dk, dv, count), rows(&q, dk).t(), rows(dout, dv));
            let gate = gate_terms((&c.q, &dq), (&c.k, &dkey), dk, group);
            ChunkGradients { q: dq, k: dkey, v: dvalue, gate }
        }
        GateAxis::Value => {
            let a = ungated_scores(&c.q, &c.k, dk, group);
            let da = chunk.scores(dout, &c.v);
            let dout_decayed = times_decay(dout, &from_start, dv, group);
            let v = times_decay(&c.v, &to_end, dv, 1);
            // dv = exp(e - b) (k dS) + sum_i A do E
            let dvalue = product((len, dv, dk), rows(&c.k, dk), rows(dstate, dv));
            let mut dvalue = times_decay(&dvalue, &to_end, dv, 1);
            add_scaled(&mut dvalue, 1.0, &chunk.to_columns(&a, dout));
            // dq = (do exp(b)) S^T + dA k
            let mut dq = product((count, dk, dv), rows(&dout_decayed, dv), rows(state, dv).t());
            add_product(&mut dq, (count, dk, len), rows(&da, len), rows(&c.k, dk));
            // dk = (v exp(e - b)) dS^T + dA^T q
            let mut dkey = product((len, dk, dv), rows(&v, dv), rows(dstate, dv).t());
            add_product(&mut dkey, (len, dk, count), rows(&da, len).t(), rows(&c.q, dk));
            // dS = dS exp(e) + q^T (do exp(b))
            decay_state(dstate, &total, p.axis, dv);
            add_product(dstate, (dk, dv, count), rows(&c.q, dk).t(), rows(&dout_decayed, dv));
            let out = chunk_output(c, chunk, state, p);
            let gate = gate_terms((&out, dout), (&c.v, &dvalue), dv, group);
            ChunkGradients { q: dq, k: dkey, v: dvalue, gate }
        }
    }
}

/// Each token's part of the gate's gradient: sum over the group of x dx, less y dy.
fn gate_terms((x, dx): (&[f32], &[f32]), (y, dy): (&[f32], &[f32]), dim: usize, group: usize) -> Vec<f32> {
    let mut terms: Vec<f32> = y.iter().zip(dy).map(|(y, dy)| -y * dy).collect();
    for (row, (x, dx)) in x.chunks_exact(dim).zip(dx.chunks_exact(dim)).enumerate() {
        let terms = &mut terms[row / group * dim..(row / group + 1) * dim];
        for d in 0..dim {
            terms[d] += x[d] * dx[d];
        }
    }
    terms
}

struct Outputs<'a> {
    q: Disjoint<'a>,
    k: Disjoint<'a>,
    v: Disjoint<'a>,
    gate: Disjoint<'a>,
}

impl Outputs<'_> {
    /// Scatters a chunk's gradients; walks its tokens from the last to the first to finish the gate's sums.
    fn store(
        &self,
        p: &Problem<'_>,
        g: &ChunkGradients,
        c: &Loaded,
        head: usize,
        range: std::ops::Range<usize>,
        gate_sum: &mut [f64],
    ) {
        let (kv, group, gate_dim) = (p.sizes.heads.kv, p.sizes.heads.group(), p.sizes.gate_dim);
        for (i, t) in range.enumerate().rev() {
            let write = |to: &Disjoint<'_>, from: &[f32], width: usize, at: usize| {
                // SAFETY: each (token, head) belongs to exactly one task.
                unsafe { to.slice(at * width, width) }.copy_from_slice(&from[i * width..(i + 1) * width]);
            };
            write(&self.q, &g.q, group * p.sizes.heads.dim, t * kv + head);
            write(&self.k, &g.k, p.sizes.heads.dim, t * kv + head);
            write(&self.v, &g.v, p.sizes.value_dim, t * kv + head);
            // SAFETY: as above.
            let gate = unsafe { self.gate.slice((t * kv + head) * gate_dim, gate_dim) };
            for d in 0..gate_dim {
                gate_sum[d] += f64::from(g.gate[i * gate_dim + d]);
                // A clamped gate forgets everything: its true gradient is far below float32's noise.
                gate[d] = if c.gates[i * gate_dim + d] <= LOWEST_GATE { 0.0 } else { gate_sum[d] as f32 };
            }
        }
    }
}
