//! The cache of keys and values: float32, or bfloat16 where it grows with the text and weights are bfloat16 too.

use std::ops::Range;

use half::bf16;
use liger_tensor::checks::{Heads, grown_cache_rows};
use liger_tensor::{Error, KeyValueCache, Result, Sequences, Storage, Tensor};

use crate::element::Element;
use crate::parallel::vectorized;

/// Keys or values, `[slots, K, rows, D]`.
#[derive(Clone, Copy)]
pub(super) enum Rows<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

impl<'a> Rows<'a> {
    pub(super) fn of(tensor: &'a Tensor) -> Result<Self> {
        match tensor.storage() {
            Storage::F32(rows) => Ok(Self::F32(rows)),
            Storage::Bf16(rows) => Ok(Self::Bf16(rows)),
            Storage::Device(_) => Err(not_here()),
        }
    }

    /// Appends elements as float32.
    pub(super) fn append(self, range: Range<usize>, to: &mut Vec<f32>) {
        match self {
            Self::F32(rows) => to.extend_from_slice(&rows[range]),
            Self::Bf16(rows) => to.extend(rows[range].iter().map(|x| x.widen())),
        }
    }
}

fn not_here() -> Error {
    Error::Storage { operation: "attention_forward", found: "a cache on a device", expected: "the CPU's own" }
}

/// Grows a cache without a window to hold the positions to come.
pub(super) fn reserve(cache: &mut KeyValueCache, sequences: &Sequences, heads: Heads) -> Result<()> {
    fn grown<T: Copy + Default>(old: &[T], blocks: usize, len: usize) -> Vec<T> {
        let mut grown = vec![T::default(); blocks * len];
        let have = old.len() / blocks.max(1);
        if have > 0 {
            grown
                .chunks_exact_mut(len)
                .zip(old.chunks_exact(have))
                .for_each(|(to, from)| to[..have].copy_from_slice(from));
        }
        grown
    }
    let Some(rows) = grown_cache_rows(cache, sequences) else { return Ok(()) };
    let (slots, len) = (cache.keys.dim(0), rows * heads.dim);
    for tensor in [&mut cache.keys, &mut cache.values] {
        let storage = match tensor.storage() {
            Storage::F32(old) => Storage::F32(grown(old, slots * heads.kv, len).into()),
            Storage::Bf16(old) => Storage::Bf16(grown(old, slots * heads.kv, len).into()),
            Storage::Device(_) => return Err(not_here()),
        };
        *tensor = Tensor::host(&[slots, heads.kv, rows, heads.dim], storage);
    }
    Ok(())
}

/// Puts the new keys, values and scores in; of more rows than the ring holds, only the last stay.
pub(super) fn insert(
    cache: &mut KeyValueCache,
    k: &[f32],
    v: &[f32],
    scores: Option<&Tensor>,
    sequences: &Sequences,
    heads: Heads,
) -> Result<()> {
    let (spec, cache_rows, d) = (cache.spec, cache.keys.dim(2), heads.dim);
    let mut targets = vec![(&mut cache.keys, k, d), (&mut cache.values, v, d)];
    if let (Some(kept), Some(scores)) = (&mut cache.kept, scores) {
        targets.push((&mut kept.scores, scores.as_f32()?, 1));
    }
    // Where each new row of each head goes, and where it comes from.
    let mut moves = Vec::new();
    for s in sequences.list() {
        let end = s.position + s.len;
        for position in s.position..end {
            let is_sink = spec.kept == 0 && position < spec.sinks;
            if !is_sink && position < spec.window_start(end - 1) {
                continue;
            }
            for head in 0..heads.kv {
                let to = (s.slot * heads.kv + head) * cache_rows + spec.cache_row(position);
                moves.push((to, (s.start + position - s.position) * heads.kv + head));
            }
        }
    }
    for (tensor, new, width) in targets {
        let rows = |(to, from): (usize, usize)| (to * width..(to + 1) * width, &new[from * width..(from + 1) * width]);
        if let Storage::Bf16(_) = tensor.storage() {
            let held = tensor.as_bf16_mut()?;
            vectorized!(|| {
                for (to, from) in moves.iter().copied().map(rows) {
                    held[to].iter_mut().zip(from).for_each(|(to, from)| *to = bf16::narrow(*from));
                }
            },);
        } else {
            let held = tensor.as_f32_mut()?;
            for (to, from) in moves.iter().copied().map(rows) {
                held[to].copy_from_slice(from);
            }
        }
    }
    Ok(())
}
