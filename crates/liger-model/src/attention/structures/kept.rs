//! Slots that keep one key and value each: those of the tokens least like the others, and those that the last queries like. The
//! window's softmax reads them, so the structure is attention with kept keys (`liger_tensor::AttentionSpec`) and scores of keys
//! (`Ops::key_novelty`), and needs no recurrence beside it. Formula: `novelty` and `kept_attention` in
//! `tests/golden/reference.py`; the idea of the score: KeyDiff, arXiv 2504.15364.

/// Slots if the model does not say: with a window of 64, four sinks and heads of 64, all of it in bfloat16 is twice the bytes of
/// the paper's window of 64 and its float32 state.
pub(crate) const SLOTS: usize = 114;
