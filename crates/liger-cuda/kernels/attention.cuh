// Sizes of softmax attention, which keys a window shows, and where a cache keeps them. KEPT: with a window that moves in
// stretches of its own size, and slots before the cache's ring (kept.cuh).

// A window, or a reach, without end.
#define EVERYTHING 0x7fffffff

struct AttentionSizes {
    int heads, kv;
    int window;      // of all keys: EVERYTHING
    int sinks;
    int cache_rows;  // 0 without a cache
    int ring;        // whether the cache is a ring after the sinks
    float scale;
    int slots;       // KEPT: rows of the cache before the ring
    int per_block;   // KEPT: tokens of a block at most; none goes across the border of two stretches
    int reach;       // KEPT: of a key before the window, or EVERYTHING
};

#if KEPT
__device__ __forceinline__ int cache_row(const AttentionSizes& s, int position) {
    return s.slots + position % (2 * s.window);
}

__device__ __forceinline__ bool in_window(const AttentionSizes& s, int row, int key) {
    return key <= row && row / s.window - key / s.window <= 1;
}
#else
__device__ __forceinline__ int cache_row(const AttentionSizes& s, int position) {
    return s.ring && position >= s.sinks ? s.sinks + (position - s.sinks) % s.window : position;
}

__device__ __forceinline__ bool in_window(const AttentionSizes& s, int row, int key) {
    return key <= row && row - key < s.window;
}
#endif
