//! Checks of shapes that every device makes before it runs an operation. Each names the operation in its error.

use crate::{Attention, Error, GateAxis, Keeping, KeyValueCache, Recurrence, Result, Sequences, Tensor};

fn refused<T>(operation: &'static str, found: &Tensor, expected: String) -> Result<T> {
    Err(Error::Shape { operation, found: found.shape().to_vec(), expected })
}

/// Both have the same number of elements.
pub fn same_length(operation: &'static str, a: &Tensor, b: &Tensor) -> Result<()> {
    if a.len() == b.len() { Ok(()) } else { refused(operation, a, format!("as many elements as {:?}", b.shape())) }
}

/// `x` is rows of `width` elements; how many.
pub fn whole_rows(operation: &'static str, x: &Tensor, width: usize) -> Result<usize> {
    if width > 0 && x.len().is_multiple_of(width) {
        return Ok(x.len() / width);
    }
    refused(operation, x, format!("rows of {width}"))
}

/// `logits` are `rows` rows; the size of the vocabulary.
pub fn logit_rows(operation: &'static str, logits: &Tensor, rows: usize) -> Result<usize> {
    let vocabulary = logits.shape().last().copied().unwrap_or(0);
    if logits.len() == rows * vocabulary { Ok(vocabulary) } else { refused(operation, logits, format!("{rows} rows")) }
}

/// First element and number of elements of rows `start..` of `large` that `small` covers.
pub fn row_range(operation: &'static str, large: &Tensor, small: &Tensor, start: usize) -> Result<(usize, usize)> {
    let width = large.len() / large.dim(0).max(1);
    let count = small.dim(0);
    if small.len() == count * width && start + count <= large.dim(0) {
        return Ok((start * width, count * width));
    }
    refused(operation, small, format!("rows {start}.. of {:?}", large.shape()))
}

/// `out` has a row of `table [vocabulary, D]` for every id, and the table has them all; its two sizes.
pub fn embedding(out: &Tensor, table: &Tensor, ids: &[u32]) -> Result<(usize, usize)> {
    let (vocabulary, width) = (table.dim(0), table.dim(1));
    if out.len() != ids.len() * width {
        return refused("embedding", out, format!("{} rows of {width}", ids.len()));
    }
    match ids.iter().find(|&&id| id as usize >= vocabulary) {
        Some(&id) => Err(Error::TokenOutOfRange { id: i64::from(id), vocabulary }),
        None => Ok((vocabulary, width)),
    }
}

/// Head size D and number of slots M of gsa's gates `[N, K, M]` and keys `[N, K, D]`.
pub fn slots(operation: &'static str, gates: &Tensor, k: &Tensor) -> Result<(usize, usize)> {
    let (dim, slots) = (k.dim(2), gates.dim(2));
    if gates.len() * dim == k.len() * slots {
        return Ok((dim, slots));
    }
    refused(operation, gates, format!("the rows and heads of {:?}", k.shape()))
}

/// x `[N, heads, 2 half]` and the angles of its rows `[N, half]`.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<()> {
    if x.dim(2) == 2 * cos.dim(1) && x.dim(0) == cos.dim(0) && cos.len() == sin.len() {
        return Ok(());
    }
    refused("rope", x, format!("rows and half a head as in {:?}", cos.shape()))
}

/// Heads of q `[N, H, D]` and k `[N, K, D]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// H.
    pub query: usize,
    /// K, a divisor of H.
    pub kv: usize,
    /// D.
    pub dim: usize,
}

impl Heads {
    /// The heads of `q` and `k`, whose rows are those of `sequences`.
    ///
    /// # Errors
    /// If H is no multiple of K, or rows or sizes differ.
    pub fn of(operation: &'static str, q: &Tensor, k: &Tensor, sequences: &Sequences) -> Result<Self> {
        let heads = Self { query: q.dim(1), kv: k.dim(1), dim: q.dim(2) };
        let fits = heads.kv > 0 && heads.query.is_multiple_of(heads.kv) && k.dim(2) == heads.dim;
        if fits && q.dim(0) == k.dim(0) && q.dim(0) == sequences.rows() {
            return Ok(heads);
        }
        refused(
            operation,
            q,
            format!("{} rows of query heads that are a multiple of {:?}'s", sequences.rows(), k.shape()),
        )
    }

    /// Query heads that read one key/value head.
    pub fn group(self) -> usize {
        self.query / self.kv
    }
}

/// Sizes of a [`Recurrence`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecurrenceSizes {
    /// H, K and Dk.
    pub heads: Heads,
    /// Dv.
    pub value_dim: usize,
    /// Dk or Dv, whichever the gate decays.
    pub gate_dim: usize,
}

impl RecurrenceSizes {
    /// The sizes of `inputs`.
    ///
    /// # Errors
    /// If they do not fit together.
    pub fn of(operation: &'static str, inputs: &Recurrence<'_>) -> Result<Self> {
        let heads = Heads::of(operation, inputs.q, inputs.k, inputs.sequences)?;
        let value_dim = inputs.v.dim(2);
        let gate_dim = if inputs.axis == GateAxis::Key { heads.dim } else { value_dim };
        for (tensor, d) in [(inputs.v, value_dim), (inputs.log_gate, gate_dim)] {
            if tensor.shape() != [inputs.sequences.rows(), heads.kv, d] {
                return refused(operation, tensor, format!("[{}, {}, {d}]", inputs.sequences.rows(), heads.kv));
            }
        }
        Ok(Self { heads, value_dim, gate_dim })
    }

    /// Elements of the state of one head.
    pub fn state_len(&self) -> usize {
        self.heads.dim * self.value_dim
    }

    /// `out` is `[N, H, Dv]`.
    pub fn check_out(&self, operation: &'static str, out: &Tensor, sequences: &Sequences) -> Result<()> {
        let expected = [sequences.rows(), self.heads.query, self.value_dim];
        if out.len() == expected.iter().product() { Ok(()) } else { refused(operation, out, format!("{expected:?}")) }
    }

    /// `state` is `[slots, K, Dk, Dv]` with the slots of all sequences.
    pub fn check_state(&self, operation: &'static str, state: Option<&Tensor>, sequences: &Sequences) -> Result<()> {
        let Some(state) = state else { return Ok(()) };
        let slots = sequences.list().iter().map(|s| s.slot + 1).max().unwrap_or(0);
        if state.dim(0) >= slots && state.len() == state.dim(0) * self.heads.kv * self.state_len() {
            return Ok(());
        }
        let [kv, dk, dv] = [self.heads.kv, self.heads.dim, self.value_dim];
        refused(operation, state, format!("[at least {slots}, {kv}, {dk}, {dv}]"))
    }
}

/// The heads of an attention whose tensors fit together. Where keys are kept there are scores of all rows and heads, and
/// frequencies; without a cache, texts begin at position 0 then.
///
/// # Errors
/// If they do not fit.
pub fn attention(operation: &'static str, inputs: &Attention<'_>, has_cache: bool) -> Result<Heads> {
    let Attention { q, k, v, keeping, sequences, spec } = *inputs;
    let heads = Heads::of(operation, q, k, sequences)?;
    same_length(operation, v, k)?;
    if spec.kept == 0 {
        return Ok(heads);
    }
    let rows = sequences.rows();
    let fits = |Keeping { scores, frequencies }: Keeping<'_>| {
        scores.len() == rows * heads.kv && frequencies.len() == heads.dim / 2 * 2
    };
    if spec.window.unwrap_or(0) == 0 || !keeping.is_some_and(fits) {
        let scores = keeping.map_or(k, |keeping| keeping.scores);
        let expected = format!("a window, {rows} scores of {} heads, and frequencies for {}", heads.kv, heads.dim);
        return refused(operation, scores, expected);
    }
    if !has_cache && sequences.list().iter().any(|s| s.position > 0) {
        return refused(operation, q, "sequences from position 0".to_owned());
    }
    Ok(heads)
}

/// Rows that a cache must be grown to before `sequences` are added, if it is too small.
pub fn grown_cache_rows(cache: &KeyValueCache, sequences: &Sequences) -> Option<usize> {
    let need = match cache.spec.window {
        Some(_) => cache.spec.cache_rows(),
        None => sequences.list().iter().map(|s| s.position + s.len).max().unwrap_or(0),
    };
    // An eighth on top keeps the copying linear over a long generation, at little unused memory.
    let grown = if cache.spec.window.is_some() { need } else { need + (need / 8).max(64) };
    (need > cache.keys.dim(2)).then_some(grown)
}
