//! The gated recurrence: sizes and order of the kernels of `kernels/recurrence.cuh`, which explains the method.

use liger_tensor::checks::{RecurrenceSizes, same_length};
use liger_tensor::{DType, Error, GateAxis, Recurrence, RecurrenceGradients, Result, Tensor};

use crate::attention::LARGEST_GROUP;
use crate::batch::{Batch, CHUNK};
use crate::compile::{Source, Variant};
use crate::driver::{Arg, Block, Kernel, Launch};
use crate::{Cuda, shared_bytes, typed};

/// Tokens of a step, steps of a chunk, and the tokens that the rows of all its steps see: `STEP`, `STEPS` and `SEEN` of the
/// kernels.
const STEP: usize = 16;
const STEPS: usize = CHUNK / STEP;
const SEEN: usize = STEP * STEPS * (STEPS + 1) / 2;
/// Query heads of a group whose rows of a step are in shared memory at once, at most: `SLICE` of the kernels.
const LARGEST_SLICE: usize = 4;
/// Largest Dk and Dv: beyond, a state does not fit a block's shared memory.
const LARGEST_HEAD: usize = 128;
/// Columns of the state that a block of the one-token kernel takes: `STEP_COLUMNS`.
const STEP_COLUMNS: usize = 32;

/// Sizes and inputs of one call.
struct Problem<'a> {
    inputs: Recurrence<'a>,
    sizes: RecurrenceSizes,
    words: [i32; 2],
}

impl<'a> Problem<'a> {
    fn new(operation: &'static str, inputs: Recurrence<'a>) -> Result<Self> {
        let sizes = RecurrenceSizes::of(operation, &inputs)?;
        let dims = [sizes.heads.dim, sizes.value_dim];
        let fits = dims.iter().all(|dim| *dim <= LARGEST_HEAD && dim.is_multiple_of(2));
        if !fits || sizes.heads.group() > LARGEST_GROUP {
            let expected = format!("groups of at most {LARGEST_GROUP} heads, of even sizes of at most {LARGEST_HEAD}");
            return Err(Error::Shape { operation, found: inputs.v.shape().to_vec(), expected });
        }
        let words = [sizes.heads.query, sizes.heads.kv].map(|x| x as i32);
        Ok(Self { inputs, sizes, words })
    }

    fn padded(&self) -> [usize; 3] {
        let (pk, pv) = (self.sizes.heads.dim.next_multiple_of(16), self.sizes.value_dim.next_multiple_of(16));
        [pk, pv, if self.inputs.axis == GateAxis::Key { pk } else { pv }]
    }

    /// Shared memory of a kernel that has, besides gates and a state, tiles of so many rows and columns, and one of what the
    /// steps see.
    fn shared(&self, activations: DType, tiles: &[(usize, usize)]) -> usize {
        let [pk, pv, pg] = self.padded();
        // In float32 a state without padding stays where it is.
        let in_place = activations == DType::F32 && (pk, pv) == (self.sizes.heads.dim, self.sizes.value_dim);
        let mut tiles = tiles.to_vec();
        tiles.extend([(SEEN, pg), (if in_place { 0 } else { pk }, pv)]);
        shared_bytes(activations, &tiles, &[(CHUNK + STEPS, pg)])
    }

    /// Of `chunk_rows`, or `chunk_rows_gradient`.
    fn rows_bytes(&self, activations: DType, slice: usize, gradient: bool) -> usize {
        let [pk, pv, pg] = self.padded();
        let (px, pz) = if gradient { (pv, pk) } else { (pk, pv) };
        let early = (self.inputs.axis == GateAxis::Key) != gradient;
        debug_assert_eq!(pg, if early { px } else { pz });
        self.shared(activations, &[(slice.min(2) * CHUNK, px), (CHUNK, if early { pz } else { px })])
    }

    fn columns_bytes(&self, activations: DType, slice: usize) -> usize {
        let [pk, pv, pg] = self.padded();
        let plain = if self.inputs.axis == GateAxis::Key { pv } else { pk };
        self.shared(activations, &[(STEP * slice, pg), (STEP * slice + CHUNK, plain)])
    }

    /// As many heads at once as shared memory has room for.
    fn slice(&self, cuda: &Cuda) -> usize {
        let most = self.sizes.heads.group().min(LARGEST_SLICE);
        let fits = |&slice: &usize| {
            let rows = |gradient: bool| self.rows_bytes(cuda.activations, slice, gradient);
            let bytes = rows(false).max(rows(true)).max(self.columns_bytes(cuda.activations, slice));
            bytes <= cuda.gpu.largest_shared
        };
        (1..=most).rev().find(fits).unwrap_or(1)
    }
}

/// States of all chunks, and the sums of their log gates.
struct States {
    pointer: u64,
    totals: Block,
    /// The states' memory, where it is not the caller's.
    _own: Option<Block>,
}

/// Where the caller keeps the states of all chunks.
fn kept_states(p: &Problem<'_>, batch: &Batch, kept: &Tensor) -> Result<u64> {
    let items = batch.chunk_count * p.sizes.heads.kv;
    if kept.len() == items * p.sizes.state_len() {
        return typed("recurrence_states", kept, DType::F32);
    }
    let expected = format!("{items} states of {} elements", p.sizes.state_len());
    Err(Error::Shape { operation: "recurrence_states", found: kept.shape().to_vec(), expected })
}

/// Where a scan begins and ends: states `[., K, Dk, Dv]`, and which of them belongs to a sequence.
#[derive(Clone, Copy)]
struct Border {
    states: u64,
    index: u64,
    write: bool,
}

pub(crate) fn forward(
    cuda: &Cuda,
    out: &mut Tensor,
    inputs: Recurrence<'_>,
    state: Option<&mut Tensor>,
    kept: Option<&mut Tensor>,
) -> Result<()> {
    const NAME: &str = "gated_recurrence_forward";
    let p = Problem::new(NAME, inputs)?;
    p.sizes.check_out(NAME, out, inputs.sequences)?;
    p.sizes.check_state(NAME, state.as_deref(), inputs.sequences)?;
    let batch = cuda.batch(inputs.sequences)?;
    if let Some(state) = &state
        && inputs.sequences.list().iter().all(|s| s.len == 1)
    {
        return cuda.recurrence_step(out, &p, state, &batch);
    }
    let border = match &state {
        Some(state) => {
            let states = typed(NAME, state, DType::F32)?;
            Some(Border { states, index: batch.slots.pointer, write: true })
        }
        None => None,
    };
    let states = cuda.chunk_states(&p, &batch, None, kept.as_deref())?;
    cuda.scan(&p, &batch, &states, border, false)?;
    cuda.chunk_rows(out, inputs.q, &p, &batch, states.pointer, false)
}

pub(crate) fn backward(
    cuda: &Cuda,
    gradients: RecurrenceGradients<'_>,
    inputs: Recurrence<'_>,
    (initial, kept): (Option<&Tensor>, Option<&Tensor>),
    dout: &Tensor,
) -> Result<()> {
    const NAME: &str = "gated_recurrence_backward";
    let p = Problem::new(NAME, inputs)?;
    p.sizes.check_state(NAME, initial, inputs.sequences)?;
    let pairs = [(&*gradients.q, inputs.q), (&*gradients.k, inputs.k), (&*gradients.v, inputs.v)];
    for (a, b) in pairs.into_iter().chain([(&*gradients.log_gate, inputs.log_gate)]) {
        same_length(NAME, a, b)?;
    }
    let batch = cuda.batch(inputs.sequences)?;
    let sequences = inputs.sequences.list();

    // The states before every chunk; those after the last too, if the final ones have a gradient.
    let kept = if gradients.state.is_none() { kept } else { None };
    let own = if kept.is_none() { Some(cuda.chunk_states(&p, &batch, None, None)?) } else { None };
    let before = match (&own, kept) {
        (Some(own), _) => own.pointer,
        (None, Some(kept)) => kept_states(&p, &batch, kept)?,
        (None, None) => 0,
    };
    let bytes = p.sizes.heads.kv * p.sizes.state_len() * 4;
    let mut final_terms = None;
    match (&gradients.state, &own) {
        (_, None) => {}
        (Some(dstate), Some(states)) => {
            let dfinal = typed(NAME, dstate, DType::F32)?;
            let finals = cuda.gpu.allocate(sequences.len() * bytes)?;
            cuda.gpu.clear(finals.pointer, sequences.len() * bytes)?;
            if let Some(initial) = initial {
                let from = typed(NAME, initial, DType::F32)?;
                for (i, s) in sequences.iter().enumerate() {
                    cuda.gpu.copy(finals.pointer + (i * bytes) as u64, from + (s.slot * bytes) as u64, bytes)?;
                }
            }
            let border = Border { states: finals.pointer, index: batch.order.pointer, write: true };
            cuda.scan(&p, &batch, states, Some(border), false)?;
            let terms = cuda.gpu.allocate(sequences.len() * p.sizes.heads.kv * p.sizes.gate_dim * 4)?;
            let args =
                [Arg::Pointer(terms.pointer), Arg::Pointer(finals.pointer), Arg::Pointer(dfinal), Arg::Words(&p.words)];
            let grid = (p.sizes.heads.kv as u32, sequences.len() as u32, 1);
            let launch = Launch { grid, block: (128, 1), shared: 0 };
            cuda.recurrence_kernel((Source::RecurrenceGradients, "final_gate_terms"), &p, launch, &args)?;
            final_terms = Some(terms);
        }
        (None, Some(states)) => {
            let border = match initial {
                Some(initial) => {
                    let states = typed(NAME, initial, DType::F32)?;
                    Some(Border { states, index: batch.slots.pointer, write: false })
                }
                None => None,
            };
            cuda.scan(&p, &batch, states, border, false)?;
        }
    }
    cuda.chunk_rows(gradients.q, dout, &p, &batch, before, true)?;
    // On the value axis the gates' gradient needs the output.
    let out = match inputs.axis {
        GateAxis::Key => None,
        GateAxis::Value => {
            let out = cuda.tensor(&[inputs.q.dim(0), p.sizes.heads.query, p.sizes.value_dim], cuda.activations)?;
            cuda.chunk_rows(&out, inputs.q, &p, &batch, before, false)?;
            Some(out)
        }
    };
    drop(own);

    let dstates = cuda.chunk_states(&p, &batch, Some(dout), None)?;
    let border = match &gradients.state {
        Some(dstate) => {
            let states = typed(NAME, dstate, DType::F32)?;
            Some(Border { states, index: batch.order.pointer, write: true })
        }
        None => None,
    };
    cuda.scan(&p, &batch, &dstates, border, true)?;
    cuda.chunk_columns(&gradients, &p, &batch, &dstates, (dout, out.as_ref()), final_terms.as_ref())
}

impl Cuda {
    fn recurrence_step(&self, out: &Tensor, p: &Problem<'_>, state: &Tensor, batch: &Batch) -> Result<()> {
        const NAME: &str = "recurrence_step";
        let Recurrence { q, k, v, log_gate, sequences, .. } = p.inputs;
        let args = [
            self.act(NAME, out)?,
            self.act(NAME, q)?,
            self.act(NAME, k)?,
            self.act(NAME, v)?,
            self.f32(NAME, log_gate)?,
            self.f32(NAME, state)?,
            Arg::Pointer(batch.slots.pointer),
            Arg::Words(&p.words),
        ];
        let columns = p.sizes.value_dim.div_ceil(STEP_COLUMNS) as u32;
        let launch =
            Launch { grid: (columns, p.sizes.heads.kv as u32, sequences.rows() as u32), block: (256, 1), shared: 0 };
        self.recurrence_kernel((Source::RecurrenceStep, NAME), p, launch, &args)
    }

    /// What each chunk adds to the state, or with `dout` to the state's gradient.
    fn chunk_states(
        &self,
        p: &Problem<'_>,
        batch: &Batch,
        dout: Option<&Tensor>,
        kept: Option<&Tensor>,
    ) -> Result<States> {
        const NAME: &str = "chunk_states";
        let items = batch.chunk_count * p.sizes.heads.kv;
        let own = if kept.is_none() { Some(self.gpu.allocate(items * p.sizes.state_len() * 4)?) } else { None };
        let pointer = match (&own, kept) {
            (Some(own), _) => own.pointer,
            (None, Some(kept)) => kept_states(p, batch, kept)?,
            (None, None) => 0,
        };
        let totals = self.gpu.allocate(items * p.sizes.gate_dim * 4)?;
        let (q, dout) = match dout {
            Some(dout) => (self.act(NAME, p.inputs.q)?, self.act(NAME, dout)?),
            None => (Arg::Pointer(0), Arg::Pointer(0)),
        };
        let args = [
            Arg::Pointer(pointer),
            Arg::Pointer(totals.pointer),
            self.act(NAME, p.inputs.k)?,
            self.act(NAME, p.inputs.v)?,
            q,
            dout,
            self.f32(NAME, p.inputs.log_gate)?,
            Arg::Pointer(batch.chunks.pointer),
            Arg::Words(&p.words),
        ];
        let [pk, pv, pg] = p.padded();
        let shared = shared_bytes(self.activations, &[(CHUNK, pk), (CHUNK, pv)], &[(CHUNK + STEPS, pg)]);
        self.recurrence_kernel((Source::RecurrenceChunks, NAME), p, self.per_chunk(p, batch, shared), &args)?;
        Ok(States { pointer, totals, _own: own })
    }

    fn recurrence_kernel(&self, kernel: Kernel, p: &Problem<'_>, launch: Launch, args: &[Arg<'_>]) -> Result<()> {
        let axis = usize::from(p.inputs.axis == GateAxis::Value);
        let sizes = [p.sizes.heads.dim, p.sizes.value_dim, p.sizes.heads.group(), p.slice(self), axis];
        let variant = Variant { activations: self.activations, sizes };
        self.gpu.launch(kernel, variant, launch, args)
    }

    fn per_chunk(&self, p: &Problem<'_>, batch: &Batch, shared: usize) -> Launch {
        Launch { grid: (batch.chunk_count as u32, p.sizes.heads.kv as u32, 1), block: (256, 1), shared }
    }

    fn scan(
        &self,
        p: &Problem<'_>,
        batch: &Batch,
        states: &States,
        border: Option<Border>,
        reverse: bool,
    ) -> Result<()> {
        let border = border.unwrap_or(Border { states: 0, index: 0, write: false });
        let args = [
            Arg::Pointer(states.pointer),
            Arg::Pointer(states.totals.pointer),
            Arg::Pointer(border.states),
            Arg::Int(i32::from(border.write)),
            Arg::Pointer(border.index),
            Arg::Pointer(batch.firsts.pointer),
            Arg::Int(i32::from(reverse)),
            Arg::Words(&p.words),
        ];
        let sequences = p.inputs.sequences.list().len() as u32;
        let grid = (p.sizes.state_len().div_ceil(256) as u32, p.sizes.heads.kv as u32, sequences);
        self.recurrence_kernel(
            (Source::RecurrenceChunks, "scan_states"),
            p,
            Launch { grid, block: (256, 1), shared: 0 },
            &args,
        )
    }

    /// Outputs from `x = q`, or with `gradient` dq from `x = dout`.
    fn chunk_rows(
        &self,
        out: &Tensor,
        x: &Tensor,
        p: &Problem<'_>,
        batch: &Batch,
        states: u64,
        gradient: bool,
    ) -> Result<()> {
        let name = if gradient { "chunk_rows_gradient" } else { "chunk_rows" };
        let args = [
            self.act(name, out)?,
            self.act(name, x)?,
            self.act(name, p.inputs.k)?,
            self.act(name, p.inputs.v)?,
            self.f32(name, p.inputs.log_gate)?,
            Arg::Pointer(states),
            Arg::Pointer(batch.chunks.pointer),
            Arg::Words(&p.words),
        ];
        let shared = p.rows_bytes(self.activations, p.slice(self), gradient);
        self.recurrence_kernel((Source::RecurrenceChunks, name), p, self.per_chunk(p, batch, shared), &args)
    }

    fn chunk_columns(
        &self,
        gradients: &RecurrenceGradients<'_>,
        p: &Problem<'_>,
        batch: &Batch,
        dstates: &States,
        (dout, out): (&Tensor, Option<&Tensor>),
        final_terms: Option<&Block>,
    ) -> Result<()> {
        const NAME: &str = "chunk_columns";
        let sums = self.gpu.allocate(batch.chunk_count * p.sizes.heads.kv * p.sizes.gate_dim * 4)?;
        let gate = self.f32(NAME, gradients.log_gate)?;
        let Recurrence { q, k, v, log_gate, .. } = p.inputs;
        let args = [
            self.act(NAME, gradients.k)?,
            self.act(NAME, gradients.v)?,
            gate,
            Arg::Pointer(sums.pointer),
            self.act(NAME, q)?,
            self.act(NAME, k)?,
            self.act(NAME, v)?,
            self.act(NAME, dout)?,
            self.act(NAME, out.unwrap_or(gradients.q))?,
            self.f32(NAME, log_gate)?,
            Arg::Pointer(dstates.pointer),
            Arg::Pointer(batch.chunks.pointer),
            Arg::Words(&p.words),
        ];
        let shared = p.columns_bytes(self.activations, p.slice(self));
        self.recurrence_kernel((Source::RecurrenceGradients, NAME), p, self.per_chunk(p, batch, shared), &args)?;
        let args = [
            gate,
            self.f32(NAME, log_gate)?,
            Arg::Pointer(sums.pointer),
            Arg::Pointer(final_terms.map_or(0, |terms| terms.pointer)),
            Arg::Pointer(batch.chunks.pointer),
            Arg::Words(&p.words),
        ];
        let launch = self.per_chunk(p, batch, 0);
        self.recurrence_kernel((Source::RecurrenceGradients, "finish_gates"), p, launch, &args)
    }
}
