// What kernels are told of the sequences of a batch: `batch.rs` writes it.

// A block of rows (or a row, a stretch, a sequence).
struct BlockInfo {
    int start, len, position, slot;  // the sequence: first row, rows, position of the first, slot
    int first;                       // first token (or key) of this block, counted in the sequence
};

// A chunk of a recurrence.
struct ChunkInfo {
    int start;     // first row of the batch
    int len;       // tokens
    int sequence;  // which sequence
    int first;     // index of the sequence's first chunk
    int count;     // chunks of the sequence
};
