/// One sequence inside a batch of token rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sequence {
    /// First row of the sequence in the batch.
    pub start: usize,
    /// Number of rows.
    pub len: usize,
    /// Position of its first row, counted from the beginning of the text: how many tokens the state has seen.
    pub position: usize,
    /// Slot of the decoding state that it continues; without a state, any number.
    pub slot: usize,
}

/// Which rows of a batch belong together.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sequences {
    list: Vec<Sequence>,
    rows: usize,
}

impl Sequences {
    /// Sequences of these lengths, each from its beginning, sequence `i` in slot `i`. Empty ones are left out.
    ///
    /// ```
    /// let batch = liger_tensor::Sequences::fresh([3, 2]);
    /// assert_eq!((batch.rows(), batch.list()[1].start), (5, 3));
    /// ```
    pub fn fresh(lengths: impl IntoIterator<Item = usize>) -> Self {
        let mut batch = Self::default();
        for (slot, len) in lengths.into_iter().enumerate() {
            batch.push(len, 0, slot);
        }
        batch
    }

    /// Adds a sequence of `len` rows that continues slot `slot` at `position`.
    pub fn push(&mut self, len: usize, position: usize, slot: usize) {
        if len > 0 {
            self.list.push(Sequence { start: self.rows, len, position, slot });
            self.rows += len;
        }
    }

    /// The sequences in the order of their rows.
    pub fn list(&self) -> &[Sequence] {
        &self.list
    }

    /// Rows of the batch.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Position of every row.
    pub fn positions(&self) -> Vec<usize> {
        self.list.iter().flat_map(|s| s.position..s.position + s.len).collect()
    }
}
