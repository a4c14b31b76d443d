//! Softmax attention: sizes and blocks for `kernels/attention.cu`.

use liger_tensor::checks::{self, Heads, same_length};
use liger_tensor::{Attention, AttentionGradients, AttentionSpec, DType, Error, KeyValueCache, Result, Tensor};

use crate::compile::{Source, Variant};
use crate::driver::{Arg, Launch};
use crate::kept::{Kept, reach_word};
use crate::{Cuda, shared_bytes, typed};

/// Rows and keys of a block, and of what it loads at once in the backward: `ROWS`, `KEYS`, `FORWARD_KEYS`, `QUERIES` of the
/// kernels; the backward has two of what it loads, one on its way.
const ROWS: usize = 64;
const KEYS: usize = 64;
const FORWARD_KEYS: usize = 96;
const QUERIES: usize = 32;
/// Query heads that one token's rows have room for.
pub(crate) const LARGEST_GROUP: usize = QUERIES;
/// Threads of a block.
const THREADS: u32 = 128;
/// Sinks that the backward has room for.
const MOST_SINKS: usize = 16;
/// Largest head: `STEP_DIMS` times a warp; in float32 what a block's shared memory has room for.
fn largest_head(activations: DType) -> usize {
    if activations == DType::Bf16 { 256 } else { 192 }
}

fn taken(operation: &'static str, q: &Tensor, heads: Heads, activations: DType) -> Result<Heads> {
    let largest = largest_head(activations);
    if heads.group() <= LARGEST_GROUP && heads.dim <= largest && heads.dim.is_multiple_of(2) {
        return Ok(heads);
    }
    let name = activations.name();
    let expected =
        format!("groups of at most {LARGEST_GROUP} heads, each of an even size of at most {largest} in {name}");
    Err(Error::Shape { operation, found: q.shape().to_vec(), expected })
}

/// Tokens of a block of rows at most: whole stretches are cut into equal blocks where keys are kept.
fn tokens_of_a_block(heads: Heads, spec: AttentionSpec) -> usize {
    let most = ROWS / heads.group();
    match spec.window {
        Some(window) if spec.kept > 0 => window.div_ceil(window.div_ceil(most)),
        _ => most,
    }
}

/// `AttentionSizes` of the kernels.
pub(crate) fn words(heads: Heads, spec: AttentionSpec, cache_rows: usize) -> [i32; 10] {
    let window = spec.window.map_or(i32::MAX, |w| w as i32);
    let scale = (1.0 / (heads.dim as f32).sqrt()).to_bits() as i32;
    let ring = i32::from(spec.window.is_some());
    let [query, kv, sinks, cache_rows] = [heads.query, heads.kv, spec.sinks, cache_rows].map(|x| x as i32);
    let [slots, per_block] = [spec.slots(), tokens_of_a_block(heads, spec)].map(|x| x as i32);
    [query, kv, window, sinks, cache_rows, ring, scale, slots, per_block, reach_word(spec)]
}

/// Inputs of a call, and what they have in common.
pub(crate) struct Call<'a> {
    pub(crate) inputs: Attention<'a>,
    pub(crate) heads: Heads,
    pub(crate) kept: Option<Kept>,
}

impl<'a> Call<'a> {
    fn new(cuda: &Cuda, operation: &'static str, inputs: Attention<'a>, cache: Option<&KeyValueCache>) -> Result<Self> {
        let heads = checks::attention(operation, &inputs, cache.is_some())?;
        let heads = taken(operation, inputs.q, heads, cuda.activations)?;
        let spec = inputs.spec;
        let kept = match (spec.window, inputs.keeping) {
            (Some(window), Some(keeping)) if spec.kept > 0 => {
                let per_block = tokens_of_a_block(heads, spec);
                Some(Kept::select(cuda, &inputs, keeping, (window, heads), per_block, cache)?)
            }
            _ => None,
        };
        Ok(Self { inputs, heads, kept })
    }

    /// RoPE's frequencies, blocks of rows and their number, what the slots hold, and the stretch of each block.
    fn row_blocks(&self, cuda: &Cuda) -> Result<([Arg<'static>; 4], usize)> {
        if let Some(Kept { stretches, lists, frequencies, .. }) = &self.kept {
            let [blocks, lists, of_block] = [&stretches.blocks, lists, &stretches.of_block].map(|b| b.pointer);
            return Ok(([*frequencies, blocks, lists, of_block].map(Arg::Pointer), stretches.block_count));
        }
        let blocks = cuda.batch(self.inputs.sequences)?.blocks(&cuda.gpu, ROWS / self.heads.group())?;
        // The batch keeps its arrays.
        Ok(([0, blocks.0.pointer, 0, 0].map(Arg::Pointer), blocks.1))
    }
}

pub(crate) fn forward(
    cuda: &Cuda,
    out: &mut Tensor,
    inputs: Attention<'_>,
    mut cache: Option<&mut KeyValueCache>,
    statistics: Option<&mut Tensor>,
) -> Result<()> {
    let Attention { q, k, sequences, .. } = inputs;
    let call = Call::new(cuda, "attention_forward", inputs, cache.as_deref())?;
    same_length("attention_forward", out, q)?;
    if let Some(cache) = cache.as_deref_mut() {
        cuda.reserve(cache, sequences, Heads::of("attention_forward", q, k, sequences)?)?;
    }
    match cache {
        Some(cache) if sequences.list().iter().all(|s| s.len == 1) => {
            cuda.insert(cache, &call)?;
            cuda.attention_step(out, cache, &call)
        }
        Some(cache) => {
            cuda.attention_blocks(out, &call, Some(cache), 0)?;
            cuda.insert(cache, &call)
        }
        None => {
            let lse = statistics.map_or(Ok(0), |lse| typed("attention_forward", lse, DType::F32))?;
            cuda.attention_blocks(out, &call, None, lse)
        }
    }
}

/// One kernel by rows and one by keys, and one by slots where keys are kept. Without the rows' log-sum-exp the forward runs
/// once more.
pub(crate) fn backward(
    cuda: &Cuda,
    gradients: AttentionGradients<'_>,
    inputs: Attention<'_>,
    (out, statistics): (&Tensor, Option<&Tensor>),
    dout: &Tensor,
) -> Result<()> {
    const NAME: &str = "attention_backward";
    let AttentionGradients { q: dq, k: dk, v: dv } = gradients;
    let Attention { q, k, v, sequences, spec, .. } = inputs;
    let call = Call::new(cuda, NAME, inputs, None)?;
    let heads = call.heads;
    for (a, b) in [(&*dq, q), (&*dk, k), (&*dv, v), (dout, q), (out, q)] {
        same_length(NAME, a, b)?;
    }
    let rows = q.dim(0) * heads.query;
    let inner = cuda.gpu.allocate(rows * 4)?;
    let own;
    let lse = match statistics {
        Some(lse) => typed(NAME, lse, DType::F32)?,
        None => {
            own = cuda.gpu.allocate(rows * 4)?;
            let again = cuda.tensor(q.shape(), cuda.activations)?;
            cuda.attention_blocks(&again, &call, None, own.pointer)?;
            own.pointer
        }
    };
    let args = [Arg::Pointer(inner.pointer), cuda.act(NAME, out)?, cuda.act(NAME, dout)?, Arg::Int(rows as i32)];
    cuda.attention_kernel("attention_inner", &call, Launch::warp_rows(rows.div_ceil(4)), &args)?;

    let batch = cuda.batch(sequences)?;
    let (words, padded) = (self::words(heads, spec, 0), heads.dim.next_multiple_of(16));
    let inputs = [cuda.act(NAME, q)?, cuda.act(NAME, k)?, cuda.act(NAME, v)?, cuda.act(NAME, dout)?];
    let [lse, inner] = [Arg::Pointer(lse), Arg::Pointer(inner.pointer)];
    // Sinks that a window does not reach get their gradients from the kernel by rows, one part a block.
    let sinks = if spec.window.is_some() && spec.kept == 0 { spec.sinks } else { 0 };
    if sinks > MOST_SINKS {
        let expected = format!("at most {MOST_SINKS} sinks, found {sinks}");
        return Err(Error::Shape { operation: NAME, found: k.shape().to_vec(), expected });
    }
    let (by_rows, row_blocks) = call.row_blocks(cuda)?;
    let part = heads.kv * 2 * MOST_SINKS * heads.dim * 4;
    let parts = if sinks > 0 { Some(cuda.gpu.allocate(row_blocks * part)?) } else { None };
    let parts = Arg::Pointer(parts.as_ref().map_or(0, |p| p.pointer));
    let run = |name, outputs: &[Arg<'static>], arrays: &[Arg<'static>], grid: [usize; 2], tiles: &[(usize, usize)]| {
        let mut args = outputs.to_vec();
        args.extend(inputs);
        args.extend([lse, inner]);
        args.extend(arrays);
        args.push(Arg::Words(&words));
        let shared = shared_bytes(cuda.activations, tiles, &[]);
        let launch = Launch { grid: (grid[0] as u32, heads.kv as u32, grid[1] as u32), block: (THREADS, 1), shared };
        cuda.attention_kernel(name, &call, launch, &args)
    };
    let tiles = [(2 * ROWS + 4 * QUERIES, padded), (2 * ROWS, MOST_SINKS)];
    run("attention_backward_rows", &[cuda.act(NAME, dq)?, parts], &by_rows, [row_blocks, 1], &tiles)?;
    let (dk, dv) = (cuda.act(NAME, dk)?, cuda.act(NAME, dv)?);
    let by_keys = batch.blocks(&cuda.gpu, KEYS)?;
    let tiles = [(2 * KEYS + 4 * QUERIES, padded)];
    run("attention_backward_keys", &[dk, dv], &[Arg::Pointer(by_keys.0.pointer)], [by_keys.1, 1], &tiles)?;
    if let Some(kept) = &call.kept {
        let (count, slots) = (kept.stretches.count, spec.slots());
        let parts = cuda.gpu.allocate(count * heads.kv * 2 * slots * heads.dim * 4)?;
        let arrays = [kept.frequencies, kept.stretches.starts.pointer, kept.lists.pointer].map(Arg::Pointer);
        let outputs = [Arg::Pointer(parts.pointer)];
        run("attention_backward_slots", &outputs, &arrays, [count, slots.div_ceil(KEYS)], &tiles)?;
        return kept.add_gradients(cuda, dk, dv, &parts);
    }
    if sinks == 0 {
        return Ok(());
    }
    let args = [dk, dv, parts, by_rows[1], Arg::Int(row_blocks as i32), Arg::Words(&words)];
    let grid = (sequences.list().len() as u32, (heads.kv * sinks) as u32, 1);
    cuda.attention_kernel("attention_add_sinks", &call, Launch { grid, block: (1024, 1), shared: 0 }, &args)
}

impl Cuda {
    /// `lse` is where the rows' log-sum-exp goes, 0 for nowhere.
    fn attention_blocks(&self, out: &Tensor, call: &Call<'_>, cache: Option<&KeyValueCache>, lse: u64) -> Result<()> {
        const NAME: &str = "attention_forward";
        let (Attention { q, k, v, spec, .. }, heads) = (call.inputs, call.heads);
        let (cached, cache_rows) = match cache {
            Some(cache) => ([self.act(NAME, &cache.keys)?, self.act(NAME, &cache.values)?], cache.keys.dim(2)),
            None => ([Arg::Pointer(0); 2], 0),
        };
        let (arrays, blocks) = call.row_blocks(self)?;
        let words = self::words(heads, spec, cache_rows);
        let padded = heads.dim.next_multiple_of(16);
        let shared = shared_bytes(self.activations, &[(ROWS + 2 * FORWARD_KEYS, padded)], &[]);
        let launch = Launch { grid: (blocks as u32, heads.kv as u32, 1), block: (THREADS, 1), shared };
        let mut args = vec![self.act(NAME, out)?, Arg::Pointer(lse)];
        args.extend([self.act(NAME, q)?, self.act(NAME, k)?, self.act(NAME, v)?, cached[0], cached[1]]);
        args.extend(arrays);
        args.push(Arg::Words(&words));
        self.attention_kernel(NAME, call, launch, &args)
    }

    fn attention_kernel(&self, name: &'static str, call: &Call<'_>, launch: Launch, args: &[Arg<'_>]) -> Result<()> {
        let (heads, kept) = (call.heads, usize::from(call.kept.is_some()));
        let sizes = [heads.dim, heads.group(), kept, 0, 0];
        self.gpu.launch((Source::Attention, name), Variant { activations: self.activations, sizes }, launch, args)
    }
}
