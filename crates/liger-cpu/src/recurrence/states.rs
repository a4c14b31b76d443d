//! States between chunks: what each chunk adds to them, in any order, and passing them on, one chunk after the other.

use std::ops::Range;

use liger_tensor::GateAxis;

use super::Problem;
use crate::gemm::rows;
use crate::math::{add_scaled, exp};
use crate::parallel::{Disjoint, vectorized};

/// What a chunk adds to the state `[Dk, Dv]`: k^T v with the gated one decayed to the chunk's end. `total_decay` gets the decay of what
/// was there before.
pub(super) fn added(to: &mut [f32], total_decay: &mut [f32], p: &Problem<'_>, head: usize, range: Range<usize>) {
    let (dk, dv, len) = (p.sizes.heads.dim, p.sizes.value_dim, range.len());
    let mut k = p.kv_rows(p.k, dk, head, range.clone());
    let mut v = p.kv_rows(p.v, dv, head, range.clone());
    let gates = p.gates(head, range);
    let gated = if p.axis == GateAxis::Key { &mut k[..] } else { &mut v[..] };
    let mut decays = vec![0.0f32; gates.len()];
    total_decay.fill(0.0);
    // Sums of gates first, then the decays they are the logarithms of.
    vectorized!(|| {
        let dim = total_decay.len();
        for (decay, gates) in decays.chunks_exact_mut(dim).zip(gates.chunks_exact(dim)).rev() {
            decay.copy_from_slice(total_decay);
            add_scaled(total_decay, 1.0, gates);
        }
        total_decay.iter_mut().for_each(|sum| *sum = exp(*sum));
        decays.iter_mut().for_each(|sum| *sum = exp(*sum));
        gated.iter_mut().zip(&decays).for_each(|(x, decay)| *x *= decay);
    },);
    p.alone.matmul((to, dv), (dk, dv, len), (rows(&k, dk).t(), rows(&v, dv)), 1.0, false);
}

/// What a chunk adds to the gradient of the state before it: q^T do with the gated one decayed from the chunk's start.
pub(super) fn added_gradient(to: &mut [f32], dout: &[f32], p: &Problem<'_>, head: usize, range: Range<usize>) {
    let (dk, dv, group) = (p.sizes.heads.dim, p.sizes.value_dim, p.sizes.heads.group());
    let (mut q, mut dout) = (p.query_rows(p.q, dk, head, range.clone()), p.query_rows(dout, dv, head, range.clone()));
    let (gates, count) = (p.gates(head, range), q.len() / dk);
    let gated = if p.axis == GateAxis::Key { &mut q[..] } else { &mut dout[..] };
    let (mut sum, mut decays) = (vec![0.0f32; p.sizes.gate_dim], gates);
    // Gates, their sums, then the decays these are the logarithms of.
    vectorized!(|| {
        let dim = sum.len();
        for decay in decays.chunks_exact_mut(dim) {
            add_scaled(&mut sum, 1.0, decay);
            decay.copy_from_slice(&sum);
        }
        decays.iter_mut().for_each(|sum| *sum = exp(*sum));
        for (x, decay) in gated.chunks_exact_mut(group * dim).zip(decays.chunks_exact(dim)) {
            for x in x.chunks_exact_mut(dim) {
                x.iter_mut().zip(decay).for_each(|(x, e)| *x *= e);
            }
        }
    },);
    p.alone.matmul((to, dv), (dk, dv, count), (rows(&q, dk).t(), rows(&dout, dv)), 1.0, false);
}

/// Moves the state over a chunk, or its gradient from the chunk's end to its start. `place` holds what the chunk adds, and afterwards
/// what was there before it was moved.
pub(super) fn pass(state: &mut [f32], place: &mut [f32], total_decay: &[f32], axis: GateAxis, dv: usize) {
    vectorized!(|| {
        for (d, (row, place)) in state.chunks_exact_mut(dv).zip(place.chunks_exact_mut(dv)).enumerate() {
            let both = row.iter_mut().zip(place);
            match axis {
                GateAxis::Key => {
                    for (state, place) in both {
                        (*state, *place) = (total_decay[d] * *state + *place, *state);
                    }
                }
                GateAxis::Value => {
                    for ((state, place), decay) in both.zip(total_decay) {
                        (*state, *place) = (decay * *state + *place, *state);
                    }
                }
            }
        }
    },);
}

/// `[chunks, K, len]`, of which tasks write each their own.
pub(super) struct OfChunks<'a> {
    data: Disjoint<'a>,
    kv: usize,
    len: usize,
}

impl<'a> OfChunks<'a> {
    pub(super) fn new(data: &'a mut [f32], kv: usize, len: usize) -> Self {
        Self { data: Disjoint::new(data), kv, len }
    }

    /// # Safety
    /// No two tasks may have the same (chunk, head) at the same time.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn at(&self, chunk: usize, head: usize) -> &mut [f32] {
        // SAFETY: the caller's promise.
        unsafe { self.data.slice((chunk * self.kv + head) * self.len, self.len) }
    }
}
