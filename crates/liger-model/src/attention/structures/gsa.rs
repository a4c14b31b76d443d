//! Liger-GSA: two gated passes around a softmax over M memory slots; gate sigmoid(pool k)^(1/16), write 1 - gate.
//! Formula: `gsa` in `tests/golden/reference.py`.
//!
//! Pass 1 writes keys into the slots and reads a score a slot; pass 2 writes values and reads them by the soft-maxed
//! scores. The first decays the value axis of its state [D, M], the second the key axis of its state [M, D].

use liger_tensor::{GateAxis, Ops, Recurrence, RecurrenceGradients, Sequences, Tensor};

use crate::error::Result;

/// Activations of the two passes.
pub(crate) struct Slots {
    /// `[N, K, M]`.
    pub(crate) log_gate: Tensor,
    /// `[N, K, M]`.
    write: Tensor,
    /// Soft-maxed scores `[N, H, M]`.
    weights: Tensor,
    /// States between chunks of the two passes.
    states: [Option<Tensor>; 2],
}

/// Where the gradients of q, k, v go, each overwritten.
pub(crate) struct SlotsGradients<'a> {
    pub(crate) q: &'a mut Tensor,
    pub(crate) k: &'a mut Tensor,
    pub(crate) v: &'a mut Tensor,
}

impl Slots {
    pub(crate) fn forward(
        ops: &dyn Ops,
        out: &mut Tensor,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        slots: usize,
        sequences: &Sequences,
        states: Option<&mut [Tensor]>,
        trains: bool,
    ) -> Result<Self> {
        let (n, heads, kv) = (q.dim(0), q.dim(1), k.dim(1));
        let (mut first_state, mut second_state) = (None, None);
        if let Some([first, second]) = states {
            (first_state, second_state) = (Some(first), Some(second));
        }
        let mut log_gate = ops.empty_f32(&[n, kv, slots])?;
        let mut write = ops.empty(&[n, kv, slots])?;
        ops.slot_gates_forward(&mut log_gate, &mut write, k)?;
        let mut weights = ops.empty(&[n, heads, slots])?;
        let first = Recurrence { q, k, v: &write, log_gate: &log_gate, axis: GateAxis::Value, sequences };
        let room = |inputs| if trains { ops.recurrence_states(inputs) } else { Ok(None) };
        let mut first_kept = room(first)?;
        ops.gated_recurrence_forward(&mut weights, first, first_state, first_kept.as_mut())?;
        ops.softmax_forward(&mut weights)?;
        let second = Recurrence { q: &weights, k: &write, v, log_gate: &log_gate, axis: GateAxis::Key, sequences };
        let mut second_kept = room(second)?;
        ops.gated_recurrence_forward(out, second, second_state, second_kept.as_mut())?;
        let states = [first_kept, second_kept];
        Ok(Self { log_gate, write, weights, states })
    }

    pub(crate) fn backward(
        &self,
        ops: &dyn Ops,
        d: SlotsGradients<'_>,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        sequences: &Sequences,
        dout: &Tensor,
    ) -> Result<()> {
        let Self { log_gate, write, weights, states: [first_kept, second_kept] } = self;
        let mut dweights = ops.empty(weights.shape())?;
        let mut dwrite = ops.empty(write.shape())?;
        let mut dgate = ops.empty_f32(write.shape())?;
        let second = Recurrence { q: weights, k: write, v, log_gate, axis: GateAxis::Key, sequences };
        let gradients =
            RecurrenceGradients { q: &mut dweights, k: &mut dwrite, v: d.v, log_gate: &mut dgate, state: None };
        ops.gated_recurrence_backward(gradients, second, None, second_kept.as_ref(), dout)?;
        ops.softmax_backward(&mut dweights, weights)?;

        let mut first_dwrite = ops.empty(write.shape())?;
        let mut first_dgate = ops.empty_f32(write.shape())?;
        let first = Recurrence { q, k, v: write, log_gate, axis: GateAxis::Value, sequences };
        let gradients =
            RecurrenceGradients { q: d.q, k: &mut *d.k, v: &mut first_dwrite, log_gate: &mut first_dgate, state: None };
        ops.gated_recurrence_backward(gradients, first, None, first_kept.as_ref(), &dweights)?;
        ops.axpby(&mut dwrite, 1.0, &first_dwrite, 1.0)?;
        ops.axpby(&mut dgate, 1.0, &first_dgate, 1.0)?;
        Ok(ops.slot_gates_backward(d.k, &dgate, &dwrite, k)?)
    }
}
