// Keys that stay when they leave the window. What a slot holds is written as one number: a row of the sequence at work, or
// -2 - row of the cache, or EMPTY.

#define EMPTY (-1)

// Slots that are filled when queries of the stretch of `position` look at them: two stretches are still the window's.
__device__ __forceinline__ int filled_slots(int position, int window, int slots) {
    return min(slots, max(position / window - 1, 0) * window);
}

// Whether the token at `position`, its own key already there, sees a row of the cache: slots, then a ring of two stretches.
__device__ __forceinline__ bool row_in_use(int position, int row, int window, int slots) {
    if (row < slots) return row < filled_slots(position, window, slots);
    int stretch = position / window, half = (row - slots) / window;
    return half == stretch % 2 ? (row - slots) % window <= position % window : stretch > 0;
}

// Of `slots` keys that are held and `count` new ones the best stay; those that come in take the places of those that go, in
// order. Of equal scores the held come first, the last slot before the first one, then the new in their order. All arrays are
// in shared memory, `stays [slots + count]`; the whole block calls it.
__device__ __forceinline__ void take_in(float* scores, int* held, int slots, const float* new_scores, const int* fresh, int count,
                                        int* stays) {
    __syncthreads();
    for (int e = threadIdx.x; e < slots + count; e += blockDim.x) {
        bool is_held = e < slots;
        float own = is_held ? scores[e] : new_scores[e - slots];
        int better = 0;
        for (int i = 0; i < slots; i++) better += scores[i] > own || (scores[i] == own && (!is_held || i > e));
        for (int j = 0; j < count; j++) better += new_scores[j] > own || (new_scores[j] == own && !is_held && j < e - slots);
        stays[e] = better < slots;
    }
    __syncthreads();
    // One warp counts the slots that become free, another what comes in: over `stays` go their lists, never ahead of what is
    // still to be read.
    __shared__ int moving[2];
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (warp < 2) {
        int begin = warp == 0 ? 0 : slots, length = warp == 0 ? slots : count, found = 0;
        for (int at = 0; at < length; at += 32) {
            bool there = at + lane < length && (stays[begin + min(at + lane, length - 1)] != 0) == (warp == 1);
            u32 mask = __ballot_sync(0xffffffffu, there);
            if (there) stays[begin + found + __popc(mask & ((1u << lane) - 1))] = at + lane;
            found += __popc(mask);
        }
        if (lane == 0) moving[warp] = found;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < min(moving[0], moving[1]); i += blockDim.x) {
        int slot = stays[i], j = stays[slots + i];
        scores[slot] = new_scores[j], held[slot] = fresh[j];
    }
    __syncthreads();
}
