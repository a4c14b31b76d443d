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

// log sum over `group` heads of exp(mean query . key * scale), by one warp; means [group, dim] in shared memory.
__device__ __forceinline__ float liking(const act* key, const float* means, int group, int dim, float scale) {
    int lane = threadIdx.x & 31;
    float best = NEGATIVE_INFINITY, sum = 0.0f;
    for (int g = 0; g < group; g++) {
        float dot = 0.0f;
        for (int d = lane; d < dim; d += 32) dot += means[g * dim + d] * to_float(key[d]);
        dot = warp_sum(dot) * scale;
        float top = fmaxf(best, dot);
        sum = sum * expf(best - top) + expf(dot - top), best = top;
    }
    return best + logf(sum);
}

// For each of `count` values, whether it is among the `most` largest. Of equal ones the held come first, the last slot before
// the first one, then the new in their order.
__device__ __forceinline__ bool is_among(const float* values, int slots, int count, int e, int most) {
    float own = values[e];
    bool is_held = e < slots;
    int better = 0;
    for (int i = 0; i < slots; i++) better += values[i] > own || (values[i] == own && (!is_held || i > e));
    for (int j = slots; j < slots + count; j++) better += values[j] > own || (values[j] == own && !is_held && j < e);
    return better < most;
}

// Of `slots` keys that are held and `count` new ones, `by_score` stay for their scores [slots + count], the others for
// `liked [slots + count]`, which is overwritten; those that come in take the places of those that go, in order. held [slots +
// count]: what the slots hold, and then what is new. All arrays are in shared memory; the whole block calls it.
__device__ __forceinline__ void take_in(float* scores, float* liked, int* held, int slots, int count, int by_score, int* stays) {
    __syncthreads();
    for (int e = threadIdx.x; e < slots + count; e += blockDim.x) stays[e] = is_among(scores, slots, count, e, by_score);
    __syncthreads();
    for (int e = threadIdx.x; e < slots + count; e += blockDim.x) {
        if (stays[e]) liked[e] = -NEGATIVE_INFINITY;
    }
    __syncthreads();
    for (int e = threadIdx.x; e < slots + count; e += blockDim.x) stays[e] = is_among(liked, slots, count, e, slots);
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
        scores[slot] = scores[slots + j], held[slot] = held[slots + j];
    }
    __syncthreads();
}
