//! The gated recurrence o_t = q_t S_t over chunks of 64 tokens, its backward, and its one-token step.
//!
//! Definition and derivation: `tests/golden/reference.py` and `tests/golden/chunked.py`. The state belongs to the
//! key/value head; the query heads of its group are stacked as rows. The states before the chunks are a chain, shared by
//! (sequence, key/value head); all else is shared by (chunk, key/value head).
//!
//! With the gate on the key axis, A_ij = q_i E_ij k_j weighs the values; on the value axis A_ij = q_i k_j weighs
//! gated values, which is the same three sums of [`chunk`] with query and output gradient, key and value exchanged.

mod chunk;
mod states;

use std::ops::Range;

use liger_tensor::checks::RecurrenceSizes;
use liger_tensor::{GateAxis, Recurrence, RecurrenceGradients, Result, Sequence, Tensor};

use crate::gemm::{Alone, Matrix, rows};
use crate::math::{add_scaled, exp};
use crate::parallel::{Disjoint, for_tasks, vectorized};
use crate::prefetch::prefetch;
use chunk::{CHUNK, Chunk, hide_later, times_decay};
use states::{OfChunks, added, added_gradient, pass};

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
    alone: Alone,
}

impl<'a> Problem<'a> {
    fn new(operation: &'static str, inputs: Recurrence<'a>, alone: Alone) -> Result<Self> {
        let sizes = RecurrenceSizes::of(operation, &inputs)?;
        Ok(Self {
            q: inputs.q.as_f32()?,
            k: inputs.k.as_f32()?,
            v: inputs.v.as_f32()?,
            gate: inputs.log_gate.as_f32()?,
            axis: inputs.axis,
            sizes,
            alone,
        })
    }

    /// Rows `range` of one head of `x [N, K, width]`.
    fn kv_rows(&self, x: &[f32], width: usize, head: usize, range: Range<usize>) -> Vec<f32> {
        let mut out = Vec::with_capacity(range.len() * width);
        for t in range {
            let at = (t * self.sizes.heads.kv + head) * width;
            out.extend_from_slice(&x[at..at + width]);
        }
        out
    }

    /// Rows `range` of the query group of one head of `x [N, H, width]`.
    fn query_rows(&self, x: &[f32], width: usize, head: usize, range: Range<usize>) -> Vec<f32> {
        let count = self.sizes.heads.group() * width;
        let mut out = Vec::with_capacity(range.len() * count);
        for t in range {
            let at = (t * self.sizes.heads.query + head * self.sizes.heads.group()) * width;
            out.extend_from_slice(&x[at..at + count]);
        }
        out
    }

    /// Log gates of one head, none below [`LOWEST_GATE`].
    fn gates(&self, head: usize, range: Range<usize>) -> Vec<f32> {
        let mut gates = self.kv_rows(self.gate, self.sizes.gate_dim, head, range);
        vectorized!(|| gates.iter_mut().for_each(|g| *g = g.max(LOWEST_GATE)),);
        gates
    }

    /// `a [m, k] b [k, n]`.
    fn product(&self, sizes: (usize, usize, usize), a: Matrix<'_>, b: Matrix<'_>) -> Vec<f32> {
        let mut c = vec![0.0f32; sizes.0 * sizes.1];
        self.alone.matmul((&mut c, sizes.1), sizes, (a, b), 1.0, false);
        c
    }

    /// `a [m, k] b [k, n]`, added to `c`.
    fn add_product(&self, c: &mut [f32], sizes: (usize, usize, usize), a: Matrix<'_>, b: Matrix<'_>) {
        self.alone.matmul((c, sizes.1), sizes, (a, b), 1.0, true);
    }

    fn load(&self, head: usize, range: Range<usize>) -> Loaded {
        let gates = self.gates(head, range.clone());
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

/// `to + x [C, G, D] * decay [C, D]`.
fn plus_decayed(mut to: Vec<f32>, x: &[f32], decay: &[f32], dim: usize, group: usize) -> Vec<f32> {
    vectorized!(|| {
        for (row, (to, x)) in to.chunks_exact_mut(dim).zip(x.chunks_exact(dim)).enumerate() {
            let i = row / group;
            to.iter_mut().zip(x).zip(&decay[i * dim..(i + 1) * dim]).for_each(|((to, x), e)| *to += x * e);
        }
    },);
    to
}

/// q_i k_j for j <= i, else 0: `[C, G, C]`.
fn ungated_scores(x: &[f32], y: &[f32], dim: usize, group: usize, alone: Alone) -> Vec<f32> {
    let (len, count) = (y.len() / dim, x.len() / dim);
    let mut a = vec![0.0f32; count * len];
    alone.matmul((&mut a, len), (count, len, dim), (rows(x, dim), rows(y, dim).t()), 1.0, false);
    hide_later(&mut a, 0, len, group);
    a
}

/// Output `[C, G, Dv]` of one chunk given the state before it.
fn chunk_output(c: &Loaded, chunk: &Chunk<'_>, state: &[f32], p: &Problem<'_>) -> Vec<f32> {
    let (dk, dv, group) = (p.sizes.heads.dim, p.sizes.value_dim, p.sizes.heads.group());
    let (len, count) = (c.k.len() / dk, c.q.len() / dk);
    let from_start = chunk.start_decay();
    match p.axis {
        GateAxis::Key => {
            let a = chunk.scores(&c.q, &c.k);
            let mut out = p.product((count, dv, len), rows(&a, len), rows(&c.v, dv));
            let q = times_decay(&c.q, &from_start, dk, group);
            p.add_product(&mut out, (count, dv, dk), rows(&q, dk), rows(state, dv));
            out
        }
        GateAxis::Value => {
            let out = p.product((count, dv, dk), rows(&c.q, dk), rows(state, dv));
            let inner = chunk.to_rows(&ungated_scores(&c.q, &c.k, dk, group, p.alone), &c.v);
            plus_decayed(inner, &out, &from_start, dv, group)
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

pub(crate) fn forward(
    out: &mut Tensor,
    inputs: Recurrence<'_>,
    state: Option<&mut Tensor>,
    alone: Alone,
) -> Result<()> {
    let p = Problem::new("gated_recurrence_forward", inputs, alone)?;
    let (dv, group, kv, len) = (p.sizes.value_dim, p.sizes.heads.group(), p.sizes.heads.kv, p.sizes.state_len());
    let sequences = inputs.sequences.list();
    p.sizes.check_out("gated_recurrence_forward", out, inputs.sequences)?;
    p.sizes.check_state("gated_recurrence_forward", state.as_deref(), inputs.sequences)?;
    let states = match state {
        Some(state) => Some(Disjoint::new(state.as_f32_mut()?)),
        None => None,
    };
    let out = Disjoint::new(out.as_f32_mut()?);
    let width = group * dv;
    let out_at = |t: usize, head: usize| (t * p.sizes.heads.query + head * group) * dv;
    // SAFETY: each (token, head) belongs to exactly one task.
    let out_row = |t: usize, head: usize| unsafe { out.slice(out_at(t, head), width) };
    // What every chunk adds to the state, in any order; the state before every chunk, one after the other; the chunks' outputs, in any
    // order again. A lone token is a step.
    let mut chunks: Vec<ChunkAt> = Vec::new();
    let firsts: Vec<usize> = sequences.iter().map(|s| list_chunks(&mut chunks, *s, s.len > 1)).collect();
    let mut befores = vec![0.0f32; chunks.len() * kv * len];
    let mut total_decays = vec![0.0f32; chunks.len() * kv * p.sizes.gate_dim];
    let places = OfChunks::new(&mut befores, kv, len);
    let decays = OfChunks::new(&mut total_decays, kv, p.sizes.gate_dim);
    for_tasks(chunks.len() * kv, |task| {
        let (chunk, head) = (task / kv, task % kv);
        // SAFETY: each (chunk, head) has one task.
        let (place, decay) = unsafe { (places.at(chunk, head), decays.at(chunk, head)) };
        added(place, decay, &p, head, chunks[chunk].range());
    });
    let total_decay =
        |chunk: usize, head: usize| &total_decays[(chunk * kv + head) * p.sizes.gate_dim..][..p.sizes.gate_dim];
    for_tasks(sequences.len() * kv, |task| {
        let (index, head) = (task / kv, task % kv);
        let s = sequences[index];
        let mut scratch;
        let state = match &states {
            // SAFETY: slots differ between sequences, so each (slot, head) has one task.
            Some(states) => unsafe { states.slice((s.slot * kv + head) * len, len) },
            None => {
                scratch = vec![0.0f32; len];
                &mut scratch[..]
            }
        };
        if s.len == 1 {
            let c = p.load(head, s.start..s.start + 1);
            return step(out_row(s.start, head), state, &c, &p);
        }
        for chunk in firsts[index]..firsts[index] + s.len.div_ceil(CHUNK) {
            // SAFETY: each (chunk, head) belongs to one sequence.
            pass(state, unsafe { places.at(chunk, head) }, total_decay(chunk, head), p.axis, dv);
        }
    });
    for_tasks(chunks.len() * kv, |task| {
        let (range, head) = (chunks[task / kv].range(), task % kv);
        range.clone().for_each(|t| prefetch(out.pointer(out_at(t, head), width), width));
        let c = p.load(head, range.clone());
        let chunk = Chunk::new(&c.gates, p.sizes.gate_dim, group, p.alone);
        let block = chunk_output(&c, &chunk, &befores[task * len..(task + 1) * len], &p);
        for (t, row) in range.zip(block.chunks_exact(width)) {
            out_row(t, head).copy_from_slice(row);
        }
    });
    Ok(())
}

/// Tokens of a batch that are one chunk.
#[derive(Clone, Copy)]
struct ChunkAt {
    start: usize,
    len: usize,
}

impl ChunkAt {
    fn range(self) -> Range<usize> {
        self.start..self.start + self.len
    }
}

/// Adds the chunks of a sequence, if it has any; where they begin in the list.
fn list_chunks(list: &mut Vec<ChunkAt>, s: Sequence, has_chunks: bool) -> usize {
    let first = list.len();
    let starts = (0..if has_chunks { s.len } else { 0 }).step_by(CHUNK);
    list.extend(starts.map(|start| ChunkAt { start: s.start + start, len: CHUNK.min(s.len - start) }));
    first
}

pub(crate) fn backward(
    gradients: RecurrenceGradients<'_>,
    inputs: Recurrence<'_>,
    initial: Option<&Tensor>,
    dout: &Tensor,
    alone: Alone,
) -> Result<()> {
    let p = Problem::new("gated_recurrence_backward", inputs, alone)?;
    p.sizes.check_state("gated_recurrence_backward", initial, inputs.sequences)?;
    let (dv, group, kv, len) = (p.sizes.value_dim, p.sizes.heads.group(), p.sizes.heads.kv, p.sizes.state_len());
    let sequences = inputs.sequences.list();
    let initial = initial.map(Tensor::as_f32).transpose()?;
    let dout = dout.as_f32()?;
    let out = Outputs {
        q: Disjoint::new(gradients.q.as_f32_mut()?),
        k: Disjoint::new(gradients.k.as_f32_mut()?),
        v: Disjoint::new(gradients.v.as_f32_mut()?),
        gate: Disjoint::new(gradients.log_gate.as_f32_mut()?),
    };
    let dstates = gradients.state.map(Tensor::as_f32_mut).transpose()?;
    // Of the states after the sequences; in the end `dstates` is of those before them.
    let dlast = dstates.as_deref().map(<[f32]>::to_vec);
    let dstates = dstates.map(Disjoint::new);
    let mut chunks: Vec<ChunkAt> = Vec::new();
    let firsts: Vec<usize> = sequences.iter().map(|s| list_chunks(&mut chunks, *s, true)).collect();
    // By (chunk, head): the state before it, and the gradient of the state after it. Both are chains, one from each end.
    let mut befores = vec![0.0f32; chunks.len() * kv * len];
    let mut dafters = vec![0.0f32; chunks.len() * kv * len];
    let mut total_decays = vec![0.0f32; chunks.len() * kv * p.sizes.gate_dim];
    // By (sequence, head): the gate's gradient after the last token.
    let mut gate_sums = vec![0.0f64; sequences.len() * kv * p.sizes.gate_dim];
    let (places, dplaces) = (OfChunks::new(&mut befores, kv, len), OfChunks::new(&mut dafters, kv, len));
    let decays = OfChunks::new(&mut total_decays, kv, p.sizes.gate_dim);
    let all_gate_sums = Disjoint::new(&mut gate_sums);
    for_tasks(chunks.len() * kv, |task| {
        let (chunk, head) = (task / kv, task % kv);
        // SAFETY: each (chunk, head) has one task.
        let (place, dplace, decay) =
            unsafe { (places.at(chunk, head), dplaces.at(chunk, head), decays.at(chunk, head)) };
        added(place, decay, &p, head, chunks[chunk].range());
        added_gradient(dplace, dout, &p, head, chunks[chunk].range());
    });
    let total_decay =
        |chunk: usize, head: usize| &total_decays[(chunk * kv + head) * p.sizes.gate_dim..][..p.sizes.gate_dim];
    for_tasks(2 * sequences.len() * kv, |task| {
        let (index, head) = (task / 2 / kv, task / 2 % kv);
        let s = sequences[index];
        let mut state = vec![0.0f32; len];
        let own = firsts[index]..firsts[index] + s.len.div_ceil(CHUNK);
        if task % 2 == 0 {
            if let Some(initial) = initial {
                state.copy_from_slice(&initial[(s.slot * kv + head) * len..][..len]);
            }
            for chunk in own {
                // SAFETY: each (chunk, head) has one such task.
                pass(&mut state, unsafe { places.at(chunk, head) }, total_decay(chunk, head), p.axis, dv);
            }
            if let Some(dlast) = &dlast {
                // SAFETY: each (sequence, head) has one such task.
                let gate_sum = unsafe { all_gate_sums.slice((index * kv + head) * p.sizes.gate_dim, p.sizes.gate_dim) };
                let dlast = &dlast[(index * kv + head) * len..][..len];
                for (i, (state, d)) in state.iter().zip(dlast).enumerate() {
                    let gated = if p.axis == GateAxis::Key { i / dv } else { i % dv };
                    gate_sum[gated] += f64::from(state * d);
                }
            }
        } else {
            if let Some(dlast) = &dlast {
                state.copy_from_slice(&dlast[(index * kv + head) * len..][..len]);
            }
            for chunk in own.rev() {
                // SAFETY: each (chunk, head) has one such task.
                pass(&mut state, unsafe { dplaces.at(chunk, head) }, total_decay(chunk, head), p.axis, dv);
            }
            if let Some(dstates) = &dstates {
                // SAFETY: as above.
                unsafe { dstates.slice((index * kv + head) * len, len) }.copy_from_slice(&state);
            }
        }
    });
    for_tasks(chunks.len() * kv, |task| {
        let (range, head) = (chunks[task / kv].range(), task % kv);
        let c = p.load(head, range.clone());
        let chunk = Chunk::new(&c.gates, p.sizes.gate_dim, group, p.alone);
        let dout = p.query_rows(dout, dv, head, range.clone());
        out.prefetch(&p, head, range.clone());
        let at = task * len..(task + 1) * len;
        let g = chunk_gradients(&c, &chunk, &befores[at.clone()], &dafters[at], &dout, &p);
        out.store(&p, &g, head, range);
    });
    for_tasks(sequences.len() * kv, |task| {
        let (index, head) = (task / kv, task % kv);
        out.sum_gates(&p, sequences[index], head, &gate_sums[task * p.sizes.gate_dim..][..p.sizes.gate_dim]);
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

/// From the state before the chunk and the gradient of the state after it.
fn chunk_gradients(
    c: &Loaded,
    chunk: &Chunk<'_>,
    state: &[f32],
    dstate: &[f32],
    dout: &[f32],
    p: &Problem<'_>,
) -> ChunkGradients {
    let (dk, dv, group) = (p.sizes.heads.dim, p.sizes.value_dim, p.sizes.heads.group());
    let (len, count) = (c.k.len() / dk, c.q.len() / dk);
    let (from_start, to_end) = (chunk.start_decay(), chunk.end_decay());
    match p.axis {
        GateAxis::Key => {
            let da = ungated_scores(dout, &c.v, dv, group, p.alone);
            // dq = exp(b) (do S^T) + sum_j dA k E
            let dq = p.product((count, dk, dv), rows(dout, dv), rows(state, dv).t());
            let dq = plus_decayed(chunk.to_rows(&da, &c.k), &dq, &from_start, dk, group);
            // dk = exp(e - b) (v dS^T) + sum_i dA q E
            let dkey = p.product((len, dk, dv), rows(&c.v, dv), rows(dstate, dv).t());
            let dkey = plus_decayed(chunk.to_columns(&da, &c.q), &dkey, &to_end, dk, 1);
            // dv = (k exp(e - b)) dS + A^T do
            let k = times_decay(&c.k, &to_end, dk, 1);
            let mut dvalue = p.product((len, dv, dk), rows(&k, dk), rows(dstate, dv));
            let a = chunk.scores(&c.q, &c.k);
            p.add_product(&mut dvalue, (len, dv, count), rows(&a, len).t(), rows(dout, dv));
            let gate = gate_terms((&c.q, &dq), (&c.k, &dkey), dk, group);
            ChunkGradients { q: dq, k: dkey, v: dvalue, gate }
        }
        GateAxis::Value => {
            let a = ungated_scores(&c.q, &c.k, dk, group, p.alone);
            let da = chunk.scores(dout, &c.v);
            let dout_decayed = times_decay(dout, &from_start, dv, group);
            let v = times_decay(&c.v, &to_end, dv, 1);
            // dv = exp(e - b) (k dS) + sum_i A do E
            let dvalue = p.product((len, dv, dk), rows(&c.k, dk), rows(dstate, dv));
            let dvalue = plus_decayed(chunk.to_columns(&a, dout), &dvalue, &to_end, dv, 1);
            // dq = (do exp(b)) S^T + dA k
            let mut dq = p.product((count, dk, dv), rows(&dout_decayed, dv), rows(state, dv).t());
            p.add_product(&mut dq, (count, dk, len), rows(&da, len), rows(&c.k, dk));
            // dk = (v exp(e - b)) dS^T + dA^T q
            let mut dkey = p.product((len, dk, dv), rows(&v, dv), rows(dstate, dv).t());
            p.add_product(&mut dkey, (len, dk, count), rows(&da, len).t(), rows(&c.q, dk));
            let out = chunk_output(c, chunk, state, p);
            let gate = gate_terms((&out, dout), (&c.v, &dvalue), dv, group);
            ChunkGradients { q: dq, k: dkey, v: dvalue, gate }
        }
    }
}

/// Each token's part of the gate's gradient: sum over the group of x dx, less y dy.
fn gate_terms((x, dx): (&[f32], &[f32]), (y, dy): (&[f32], &[f32]), dim: usize, group: usize) -> Vec<f32> {
    let mut terms: Vec<f32> = y.iter().zip(dy).map(|(y, dy)| -y * dy).collect();
    vectorized!(|| {
        for (row, (x, dx)) in x.chunks_exact(dim).zip(dx.chunks_exact(dim)).enumerate() {
            let terms = &mut terms[row / group * dim..(row / group + 1) * dim];
            for ((term, x), dx) in terms.iter_mut().zip(x).zip(dx) {
                *term += x * dx;
            }
        }
    },);
    terms
}

struct Outputs<'a> {
    q: Disjoint<'a>,
    k: Disjoint<'a>,
    v: Disjoint<'a>,
    gate: Disjoint<'a>,
}

impl Outputs<'_> {
    /// Where a token's gradients of one head go, and how many numbers they are: those of queries, keys, values and the gate.
    fn places(&self, p: &Problem<'_>, head: usize, t: usize) -> [(&Disjoint<'_>, usize, usize); 4] {
        let (heads, row) = (p.sizes.heads, t * p.sizes.heads.kv + head);
        let place = |to, width: usize| (to, row * width, width);
        [
            place(&self.q, heads.group() * heads.dim),
            place(&self.k, heads.dim),
            place(&self.v, p.sizes.value_dim),
            place(&self.gate, p.sizes.gate_dim),
        ]
    }

    /// Asks for what [`Outputs::store`] will write.
    fn prefetch(&self, p: &Problem<'_>, head: usize, range: Range<usize>) {
        for (to, at, width) in range.flat_map(|t| self.places(p, head, t)) {
            prefetch(to.pointer(at, width), width);
        }
    }

    /// Scatters a chunk's gradients: of the gate, each token's own term.
    fn store(&self, p: &Problem<'_>, g: &ChunkGradients, head: usize, range: Range<usize>) {
        for (i, t) in range.enumerate() {
            for ((to, at, width), from) in self.places(p, head, t).into_iter().zip([&g.q, &g.k, &g.v, &g.gate]) {
                // SAFETY: each (token, head) belongs to exactly one task.
                unsafe { to.slice(at, width) }.copy_from_slice(&from[i * width..(i + 1) * width]);
            }
        }
    }

    /// Turns each token's own term into the gate's gradient: the sum of it, those of the later tokens, and `last`. In float64, for
    /// it runs over many tokens.
    fn sum_gates(&self, p: &Problem<'_>, s: Sequence, head: usize, last: &[f64]) {
        let (kv, gate_dim) = (p.sizes.heads.kv, p.sizes.gate_dim);
        let mut sum = last.to_vec();
        vectorized!(|| {
            for t in (s.start..s.start + s.len).rev() {
                let at = (t * kv + head) * gate_dim;
                // SAFETY: each (token, head) belongs to exactly one task.
                let terms = unsafe { self.gate.slice(at, gate_dim) };
                for ((term, sum), gate) in terms.iter_mut().zip(&mut sum).zip(&p.gate[at..at + gate_dim]) {
                    *sum += f64::from(*term);
                    // A clamped gate forgets everything: its true gradient is far below float32's noise.
                    *term = if *gate <= LOWEST_GATE { 0.0 } else { *sum as f32 };
                }
            }
        },);
    }
}
