//! The key/value cache of softmax attention, and one token of each sequence: sizes for `kernels/attention_step.cu`.

use liger_tensor::checks::{Heads, grown_cache_rows};
use liger_tensor::{Attention, DType, Keeping, KeyValueCache, Result, Sequences, Tensor};

use crate::attention::{Call, words};
use crate::compile::{Source, Variant};
use crate::driver::{Arg, Launch};
use crate::kept::Remembered;
use crate::{Cuda, pointer, typed};

/// Query heads that one block of the one-token kernel takes: `STEP_HEADS`.
const STEP_HEADS: usize = 4;
/// Keys that a block of the one-token kernel looks at before the text is split over several.
const KEYS_PER_SPLIT: usize = 512;

impl Cuda {
    /// Grows a cache without a window to hold the positions to come.
    pub(crate) fn reserve(&self, cache: &mut KeyValueCache, sequences: &Sequences, heads: Heads) -> Result<()> {
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
            self.step_kernel("cache_grow", heads, false, Launch::over(n, 1), &args)?;
            *tensor = grown;
        }
        Ok(())
    }

    /// What stays goes into the slots, what is new into the ring.
    pub(crate) fn insert(&self, cache: &KeyValueCache, call: &Call<'_>) -> Result<()> {
        const NAME: &str = "cache_insert";
        let Attention { k, v, keeping, sequences, .. } = call.inputs;
        let batch = self.batch(sequences)?;
        let words = words(call.heads, cache.spec, cache.keys.dim(2));
        let (mut held, mut new) = (0, 0);
        if let (Some(kept), Some(Keeping { scores, .. })) = (&call.kept, keeping) {
            kept.store(self, cache, k, v)?;
            (held, new) = (Remembered::of(cache)?.scores, typed(NAME, scores, DType::F32)?);
        }
        let args = [
            self.act(NAME, &cache.keys)?,
            self.act(NAME, &cache.values)?,
            Arg::Pointer(held),
            self.act(NAME, k)?,
            self.act(NAME, v)?,
            Arg::Pointer(new),
            Arg::Pointer(batch.rows.pointer),
            Arg::Words(&words),
        ];
        let launch = Launch { grid: (sequences.rows() as u32, 1, 1), block: (256, 1), shared: 0 };
        self.step_kernel(NAME, call.heads, call.kept.is_some(), launch, &args)
    }

    pub(crate) fn attention_step(&self, out: &Tensor, cache: &KeyValueCache, call: &Call<'_>) -> Result<()> {
        const NAME: &str = "attention_step";
        let (Attention { q, sequences, .. }, heads) = (call.inputs, call.heads);
        let rows = sequences.rows();
        let most = match cache.spec.window {
            Some(_) => cache.spec.cache_rows(),
            None => sequences.list().iter().map(|s| s.position + 1).max().unwrap_or(1),
        };
        let splits = most.div_ceil(KEYS_PER_SPLIT).min(64);
        let per_split = most.div_ceil(splits);
        let parts = self.gpu.allocate(rows * heads.query * splits * (heads.dim + 2) * 4)?;
        let words = self::words(heads, cache.spec, cache.keys.dim(2));
        let batch = self.batch(sequences)?;
        let (positions, frequencies) = match &call.kept {
            Some(kept) => (Remembered::of(cache)?.positions, kept.frequencies),
            None => (0, 0),
        };
        let args = [
            self.act(NAME, out)?,
            Arg::Pointer(parts.pointer),
            self.act(NAME, q)?,
            self.act(NAME, &cache.keys)?,
            self.act(NAME, &cache.values)?,
            Arg::Pointer(positions),
            Arg::Pointer(frequencies),
            Arg::Pointer(batch.rows.pointer),
            Arg::Int(per_split as i32),
            Arg::Words(&words),
        ];
        let slices = heads.kv * heads.group().div_ceil(STEP_HEADS);
        let launch = Launch { grid: (splits as u32, slices as u32, rows as u32), block: (256, 1), shared: 0 };
        self.step_kernel(NAME, call.heads, call.kept.is_some(), launch, &args)?;
        if splits == 1 {
            return Ok(());
        }
        let args = [self.act(NAME, out)?, Arg::Pointer(parts.pointer), Arg::Int(splits as i32)];
        let launch = Launch { grid: ((rows * heads.query) as u32, 1, 1), block: (128, 1), shared: 0 };
        self.step_kernel("attention_merge", call.heads, call.kept.is_some(), launch, &args)
    }

    fn step_kernel(
        &self,
        name: &'static str,
        heads: Heads,
        kept: bool,
        launch: Launch,
        args: &[Arg<'_>],
    ) -> Result<()> {
        let sizes = [heads.dim, heads.group(), usize::from(kept), 0, 0];
        self.gpu.launch((Source::AttentionStep, name), Variant { activations: self.activations, sizes }, launch, args)
    }
}
