//! Slots that keep one key and value each: those of the tokens least like the others, and those that the last queries like. The
//! window's softmax reads them, so the structure is attention with kept keys (`liger_tensor::AttentionSpec`) and scores of keys
//! (`Ops::key_novelty`), and needs no recurrence beside it. Formula: `novelty` and `kept_attention` in
//! `tests/golden/reference.py`; the idea of the score: KeyDiff, arXiv 2504.15364.

/// The paper's window.
const PAPER_WINDOW: usize = 64;

/// Slots where there is room for fewer, or none, by [`slots`].
const FEWEST: usize = 16;

/// Slots if the model does not say, for `group` query heads of `head_dim` on a key/value head: as many as make the state, in
/// bfloat16, at most twice the bytes of the paper's form, a window of 64 in bfloat16 and a float32 matrix. 114 for SmolLM2's three
/// heads of 64.
pub(crate) fn slots(head_dim: usize, group: usize, window: usize, sinks: usize) -> usize {
    let key_and_value = 4 * head_dim;
    let paper = 4 * head_dim * head_dim + PAPER_WINDOW * key_and_value;
    // With its score; sinks and slots have a position besides. In float32: the sum of the last queries, that of the directions.
    let row = key_and_value + 4;
    let rest = (sinks + 2 * window) * row + 4 * sinks + 4 * (group + 1) * head_dim;
    ((2 * paper).saturating_sub(rest) / (row + 4)).max(FEWEST)
}

#[cfg(test)]
mod tests {
    use super::slots;

    #[test]
    fn the_state_has_twice_the_papers_bytes() {
        assert_eq!(
            [slots(64, 3, 64, 4), slots(64, 4, 64, 4), slots(128, 4, 64, 4), slots(256, 4, 64, 4)],
            [114, 113, 242, 498]
        );
        assert_eq!(slots(16, 2, 512, 4), super::FEWEST);
    }
}
