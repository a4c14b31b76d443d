//! Softmax attention: sizes and blocks for `kernels/attention.cu`, and the key/value cache.

use liger_tensor::checks::{Heads, grown_cache_rows, same_length};
use liger_tensor::{AttentionSpec, DType, Error, KeyValueCache, Result, Sequences, Tensor};

use crate::compile::{Source, Variant};
use crate::driver::{Arg, Block, Launch};
use crate::{Cuda, pointer, shared_bytes, typed};

/// Rows and keys of a block, and of what it loads at once in the backward: `ROWS`, `KEYS`, `FORWARD_KEYS`, `QUERIES` of the
/// kernels; the backward has two of what it loads, one on its way.
const ROWS: usize = 64;
const KEYS: usize = 64;
const FORWARD_KEYS: usize = 96;
const QUERIES: usize = 32;
/// Threads of a block.
const THREADS: u32 = 128;
/// Sinks that the backward has room for.
const MOST_SINKS: usize = 16;
/// Query heads that one block of the one-token kernel takes: `STEP_HEADS`.
const STEP_HEADS: usize = 4;
/// Keys that a block of the one-token kernel looks at before the text is split over several.
const KEYS_PER_SPLIT: usize = 512;
/// Largest head: `STEP_DIMS` times a warp.
const LARGEST_HEAD: usize = 256;

/// The heads of q and k, if the kernels take them.
pub(crate) fn heads(operation: &'static str, q: &Tensor, k: &Tensor, sequences: &Sequences) -> Result<Heads> {
    let heads = Heads::of(operation, q, k, sequences)?;
    if heads.group() <= QUERIES && heads.dim <= LARGEST_HEAD && heads.dim.is_multiple_of(2) {
        return Ok(heads);
    }
    let expected = format!("groups of at most {QUERIES} heads, each of an even size of at most {LARGEST_HEAD}");
    Err(Error::Shape { operation, found: q.shape().to_vec(), expected })
}

/// `AttentionSizes` of the kernels.
fn words(heads: Heads, spec: AttentionSpec, cache_rows: usize) -> [i32; 7] {
    let window = spec.window.map_or(i32::MAX, |w| w as i32);
    let scale = (1.0 / (heads.dim as f32).sqrt()).to_bits() as i32;
    let ring = i32::from(spec.window.is_some());
    let [query, kv, sinks, cache_rows] = [heads.query, heads.kv, spec.sinks, cache_rows].map(|x| x as i32);
    [query, kv, window, sinks, cache_rows, ring, scale]
}

#[allow(clippy::too_many_arguments)]
pub(crate) fn forward(
    cuda: &Cuda,
    out: &mut Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    sequences: &Sequences,
    spec: AttentionSpec,
    mut cache: Option<&mut KeyValueCache>,
    statistics: Option<&mut Tensor>,
) -> Result<()> {
    let heads = self::heads("attention_forward", q, k, sequences)?;
    same_length("attention_forward", out, q)?;
    same_length("attention_forward", v, k)?;
    if let Some(cache) = cache.as_deref_mut() {
        cuda.reserve(cache, sequences, heads)?;
    }
    match cache {
        Some(cache) if sequences.list().iter().all(|s| s.len == 1) => {
            cuda.insert(cache, k, v, sequences, heads)?;
            cuda.attention_step(out, q, cache, sequences, heads)
        }
        Some(cache) => {
            cuda.attention_blocks(out, (q, k, v), sequences, spec, Some(cache), 0)?;
            cuda.insert(cache, k, v, sequences, heads)
        }
        None => {
            let lse = statistics.map_or(Ok(0), |lse| typed("attention_forward", lse, DType::F32))?;
            cuda.attention_blocks(out, (q, k, v), sequences, spec, None, lse)
        }
    }
}

/// One kernel by rows and one by keys. Without the rows' log-sum-exp the forward runs once more.
#[allow(clippy::too_many_arguments)]
pub(crate) fn backward(
    cuda: &Cuda,
    (dq, dk, dv): (&mut Tensor, &mut Tensor, &mut Tensor),
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    (out, statistics): (&Tensor, Option<&Tensor>),
    dout: &Tensor,
    sequences: &Sequences,
    spec: AttentionSpec,
) -> Result<()> {
    const NAME: &str = "attention_backward";
    let heads = self::heads(NAME, q, k, sequences)?;
    for (a, b) in [(&*dq, q), (&*dk, k), (&*dv, v), (dout, q), (out, q), (v, k)] {
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
            cuda.attention_blocks(&again, (q, k, v), sequences, spec, None, own.pointer)?;
            own.pointer
        }
    };
    let args = [Arg::Pointer(inner.pointer), cuda.act(NAME, out)?, cuda.act(NAME, dout)?, Arg::Int(rows as i32)];
    cuda.attention_kernel("attention_inner", heads, Launch::warp_rows(rows.div_ceil(4)), &args)?;

    let batch = cuda.batch(sequences)?;
    let (words, padded) = (self::words(heads, spec, 0), heads.dim.next_multiple_of(16));
    let inputs = [cuda.act(NAME, q)?, cuda.act(NAME, k)?, cuda.act(NAME, v)?, cuda.act(NAME, dout)?];
    let [lse, inner] = [Arg::Pointer(lse), Arg::Pointer(inner.pointer)];
    // Sinks that a window does not reach get their gradients from the kernel by rows, one part a block.
    let sinks = if spec.window.is_some() { spec.sinks } else { 0 };
    if sinks > MOST_SINKS {
        let expected = format!("at most {MOST_SINKS} sinks, found {sinks}");
        return Err(Error::Shape { operation: NAME, found: k.shape().to_vec(), expected });
    }
    let by_rows = batch.blocks(&cuda.gpu, ROWS / heads.group())?;
    let part = heads.kv * 2 * MOST_SINKS * heads.dim * 4;
    let parts = if sinks > 0 { Some(cuda.gpu.allocate(by_rows.1 * part)?) } else { None };
    let parts = Arg::Pointer(parts.as_ref().map_or(0, |p| p.pointer));
    let run = |name: &'static str, outputs: [Arg<'static>; 2], blocks: &(Block, usize), tiles: &[(usize, usize)]| {
        let mut args = outputs.to_vec();
        args.extend(inputs);
        args.extend([lse, inner, Arg::Pointer(blocks.0.pointer), Arg::Words(&words)]);
        let shared = shared_bytes(cuda.activations, tiles, &[]);
        let launch = Launch { grid: (blocks.1 as u32, heads.kv as u32, 1), block: (THREADS, 1), shared };
        cuda.attention_kernel(name, heads, launch, &args)
    };
    let tiles = [(2 * ROWS + 4 * QUERIES, padded), (2 * ROWS, MOST_SINKS)];
    run("attention_backward_rows", [cuda.act(NAME, dq)?, parts], &by_rows, &tiles)?;
    let (dk, dv) = (cuda.act(NAME, dk)?, cuda.act(NAME, dv)?);
    let by_keys = batch.blocks(&cuda.gpu, KEYS)?;
    run("attention_backward_keys", [dk, dv], &by_keys, &[(2 * KEYS + 4 * QUERIES, padded)])?;
    if sinks == 0 {
        return Ok(());
    }
    let args = [dk, dv, parts, Arg::Pointer(by_rows.0.pointer), Arg::Int(by_rows.1 as i32), Arg::Words(&words)];
    let grid = (sequences.list().len() as u32, (heads.kv * sinks) as u32, 1);
    cuda.attention_kernel("attention_add_sinks", heads, Launch { grid, block: (1024, 1), shared: 0 }, &args)
}

impl Cuda {
    /// `lse` is where the rows' log-sum-exp goes, 0 for nowhere.
    fn attention_blocks(
        &self,
        out: &Tensor,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        sequences: &Sequences,
        spec: AttentionSpec,
        cache: Option<&KeyValueCache>,
        lse: u64,
    ) -> Result<()> {
        const NAME: &str = "attention_forward";
        let heads = self::heads(NAME, q, k, sequences)?;
        let (cached, cache_rows) = match cache {
            Some(cache) => ([self.act(NAME, &cache.keys)?, self.act(NAME, &cache.values)?], cache.keys.dim(2)),
            None => ([Arg::Pointer(0); 2], 0),
        };
        let blocks = self.batch(sequences)?.blocks(&self.gpu, ROWS / heads.group())?;
        let words = self::words(heads, spec, cache_rows);
        let padded = heads.dim.next_multiple_of(16);
        let shared = shared_bytes(self.activations, &[(ROWS + 2 * FORWARD_KEYS, padded)], &[]);
        let launch = Launch { grid: (blocks.1 as u32, heads.kv as u32, 1), block: (THREADS, 1), shared };
        let args = [
            self.act(NAME, out)?,
            Arg::Pointer(lse),
            self.act(NAME, q)?,
            self.act(NAME, k)?,
            self.act(NAME, v)?,
            cached[0],
            cached[1],
            Arg::Pointer(blocks.0.pointer),
            Arg::Words(&words),
        ];
        self.attention_kernel(NAME, heads, launch, &args)
    }

    fn attention_kernel(&self, name: &'static str, heads: Heads, launch: Launch, args: &[Arg<'_>]) -> Result<()> {
        self.gpu.launch(
            (Source::Attention, name),
            Variant { activations: self.activations, sizes: [heads.dim, heads.group(), 0, 0, 0] },
            launch,
            args,
        )
    }

    /// Grows a cache without a window to hold the positions to come.
    fn reserve(&self, cache: &mut KeyValueCache, sequences: &Sequences, heads: Heads) -> Result<()> {
        let Some(grown_rows) = grown_cache_rows(cache, sequences) else { return Ok(()) };
        let (slots, have) = (cache.keys.dim(0), cache.keys.dim(2));
        for tensor in [&mut cache.keys, &mut cache.values] {
            let grown = self.tensor(&[slots, heads.kv, grown_rows, heads.dim], tensor.dtype())?;
            self.gpu.clear(pointer("cache", &grown)?, grown.bytes())?;
            let n = slots * heads.kv * have * heads.dim;
            let args = [
                Arg::Pointer(pointer("cache", &grown)?),
                Arg::Pointer(if n > 0 { pointer("cache", tensor)? } else { 0 }),
                Arg::Int(have as i32),
                Arg::Int(grown_rows as i32),
                Arg::Long(n as i64),
            ];
            self.attention_kernel("cache_grow", heads, Launch::over(n, 1), &args)?;
            *tensor = grown;
        }
        Ok(())
    }

    fn insert(
        &self,
        cache: &mut KeyValueCache,
        k: &Tensor,
        v: &Tensor,
        sequences: &Sequences,
        heads: Heads,
    ) -> Result<()> {
        let batch = self.batch(sequences)?;
        let words = self::words(heads, cache.spec, cache.keys.dim(2));
        let args = [
            self.act("cache_insert", &cache.keys)?,
            self.act("cache_insert", &cache.values)?,
            self.act("cache_insert", k)?,
            self.act("cache_insert", v)?,
            Arg::Pointer(batch.rows.pointer),
            Arg::Words(&words),
        ];
        let launch = Launch { grid: (sequences.rows() as u32, 1, 1), block: (256, 1), shared: 0 };
        self.attention_kernel("cache_insert", heads, launch, &args)
    }

    fn attention_step(
        &self,
        out: &Tensor,
        q: &Tensor,
        cache: &KeyValueCache,
        sequences: &Sequences,
        heads: Heads,
    ) -> Result<()> {
        const NAME: &str = "attention_step";
        let rows = sequences.rows();
        let most = match cache.spec.window {
            Some(window) => cache.spec.sinks + window,
            None => sequences.list().iter().map(|s| s.position + 1).max().unwrap_or(1),
        };
        let splits = most.div_ceil(KEYS_PER_SPLIT).min(64);
        let per_split = most.div_ceil(splits);
        let parts = self.gpu.allocate(rows * heads.query * splits * (heads.dim + 2) * 4)?;
        let words = self::words(heads, cache.spec, cache.keys.dim(2));
        let batch = self.batch(sequences)?;
        let args = [
            self.act(NAME, out)?,
            Arg::Pointer(parts.pointer),
            self.act(NAME, q)?,
            self.act(NAME, &cache.keys)?,
            self.act(NAME, &cache.values)?,
            Arg::Pointer(batch.rows.pointer),
            Arg::Int(per_split as i32),
            Arg::Words(&words),
        ];
        let slices = heads.kv * heads.group().div_ceil(STEP_HEADS);
        let launch = Launch { grid: (splits as u32, slices as u32, rows as u32), block: (256, 1), shared: 0 };
        self.attention_kernel(NAME, heads, launch, &args)?;
        if splits == 1 {
            return Ok(());
        }
        let args = [self.act(NAME, out)?, Arg::Pointer(parts.pointer), Arg::Int(splits as i32)];
        let launch = Launch { grid: ((rows * heads.query) as u32, 1, 1), block: (128, 1), shared: 0 };
        self.attention_kernel("attention_merge", heads, launch, &args)
    }
}
