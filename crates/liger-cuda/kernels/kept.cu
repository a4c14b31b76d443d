// Which keys stay when they leave the window, the scores that say so, their move into the cache, and their gradients.
//
// DIM is fixed when the kernels are compiled.

struct KeptSizes {
    int heads, kv;
    int window, sinks, slots;  // slots: sinks and kept keys
    int cache_rows;            // 0 without a cache
    int by_score;              // slots whose keys stay for their scores
    int reach;                 // of a key before the window, or EVERYTHING
    float scale;               // of the sum of a stretch's queries times a key
};

#define CHUNK 64
#define WARPS 8
#define LANE static_cast<int>(threadIdx.x & 31)
#define WARP static_cast<int>(threadIdx.x >> 5)

// One over the length of a key, by one warp; 0 for a key that is 0.
__device__ __forceinline__ float over_length(const act* key) {
    float sum = 0.0f;
    for (int d = LANE; d < DIM; d += 32) sum += to_float(key[d]) * to_float(key[d]);
    sum = warp_sum(sum);
    return sum > 0.0f ? rsqrtf(sum) : 0.0f;
}

__device__ __forceinline__ const act* key_at(const act* k, const ChunkInfo& c, int t, int head, const KeptSizes& s) {
    return k + (static_cast<long long>(c.start + t) * s.kv + head) * DIM;
}

// sums [chunks, K, D]: of the directions of a chunk's keys. Grid (chunks, K); shared [WARPS, D].
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    key_sums(float* sums, const act* k, const ChunkInfo* chunks, KeptSizes s) {
    extern __shared__ float shared[];
    ChunkInfo c = chunks[blockIdx.x];
    int head = blockIdx.y;
    for (int d = LANE; d < DIM; d += 32) shared[WARP * DIM + d] = 0.0f;
    for (int t = WARP; t < c.len; t += WARPS) {
        const act* key = key_at(k, c, t, head, s);
        float scale = over_length(key);
        for (int d = LANE; d < DIM; d += 32) shared[WARP * DIM + d] += scale * to_float(key[d]);
    }
    __syncthreads();
    for (int d = threadIdx.x; d < DIM; d += blockDim.x) {
        float sum = 0.0f;
        for (int w = 0; w < WARPS; w++) sum += shared[w * DIM + d];
        sums[(static_cast<long long>(blockIdx.x) * s.kv + head) * DIM + d] = sum;
    }
}

// scores [N, K] of the keys, from the sums of the chunks and the state [slots, K, 1, D] before them (may be null).
// Grid (chunks, K); shared [CHUNK, D].
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    key_scores(float* scores, const act* k, const float* sums, const float* state, const int* slots, const ChunkInfo* chunks,
               KeptSizes s) {
    extern __shared__ float so_far[];
    ChunkInfo c = chunks[blockIdx.x];
    int head = blockIdx.y;
    for (int t = WARP; t < c.len; t += WARPS) {
        const act* key = key_at(k, c, t, head, s);
        float scale = over_length(key);
        for (int d = LANE; d < DIM; d += 32) so_far[t * DIM + d] = scale * to_float(key[d]);
    }
    __syncthreads();
    for (int d = threadIdx.x; d < DIM; d += blockDim.x) {
        float sum = state == nullptr ? 0.0f : state[(static_cast<long long>(slots[c.sequence]) * s.kv + head) * DIM + d];
        for (int i = c.first; i < static_cast<int>(blockIdx.x); i++) {
            sum += sums[(static_cast<long long>(i) * s.kv + head) * DIM + d];
        }
        for (int t = 0; t < c.len; t++) so_far[t * DIM + d] = sum += so_far[t * DIM + d];
    }
    __syncthreads();
    for (int t = WARP; t < c.len; t += WARPS) {
        const act* key = key_at(k, c, t, head, s);
        float along = 0.0f, length = 0.0f, norm = 0.0f;
        for (int d = LANE; d < DIM; d += 32) {
            float x = to_float(key[d]), sum = so_far[t * DIM + d];
            along += x * sum, length += sum * sum, norm += x * x;
        }
        along = warp_sum(along), length = warp_sum(length) * warp_sum(norm);
        if (LANE == 0) scores[static_cast<long long>(c.start + t) * s.kv + head] = length > 0.0f ? -along * rsqrtf(length) : 0.0f;
    }
}

// Adds the sums of a sequence's chunks to its state. `firsts`: the first chunk of every sequence. Grid (sequences, K).
extern "C" __global__ void key_state(float* state, const float* sums, const int* slots, const ChunkInfo* firsts, KeptSizes s) {
    ChunkInfo c = firsts[blockIdx.x];
    int head = blockIdx.y;
    for (int d = threadIdx.x; d < DIM; d += blockDim.x) {
        float sum = 0.0f;
        for (int i = c.first; i < c.first + c.count; i++) sum += sums[(static_cast<long long>(i) * s.kv + head) * DIM + d];
        state[(static_cast<long long>(slots[c.sequence]) * s.kv + head) * DIM + d] += sum;
    }
}

// sums [stretches, H, D] of the queries of every stretch; the first of a sequence goes on with what the cache remembers
// [slots, H, D] (may be null). Grid (stretches, H).
extern "C" __global__ void query_sums(float* sums, const act* q, const float* remembered, const BlockInfo* stretches, KeptSizes s) {
    BlockInfo b = stretches[blockIdx.x];
    int head = blockIdx.y, position = b.position + b.first, tokens = min(b.len - b.first, s.window - position % s.window);
    for (int d = threadIdx.x; d < DIM; d += blockDim.x) {
        bool goes_on = remembered != nullptr && position % s.window != 0;
        float sum = goes_on ? remembered[(static_cast<long long>(b.slot) * s.heads + head) * DIM + d] : 0.0f;
        const act* from = q + (static_cast<long long>(b.start + b.first) * s.heads + head) * DIM + d;
        for (int t = 0; t < tokens; t++) sum += to_float(from[static_cast<long long>(t) * s.heads * DIM]);
        sums[(static_cast<long long>(blockIdx.x) * s.heads + head) * DIM + d] = sum;
    }
}

// lists [stretches, K, 2, slots]: what the slots hold for the queries of every stretch, and the positions of those tokens. The
// scores and positions of a cache's slots become those of the last stretch. scores [N, K], sums [stretches, H, D]; what begins
// with `cached` and `remembered` is the cache's, null without one. `bases`: number of the first stretch of every sequence.
// Grid (sequences, K); shared: a Choice.
extern "C" __global__ void __launch_bounds__(768, 1)
    kept_select(int* lists, float* cached_scores, float* cached_positions, const float* fresh_scores, const float* sums,
                const float* remembered, const act* k, const act* cached_k, const float* frequencies,
                const BlockInfo* sequences, const int* bases, KeptSizes s) {
    extern __shared__ float shared[];
    BlockInfo b = sequences[blockIdx.x];
    int head = blockIdx.y, group = s.heads / s.kv, all = s.slots + s.window;
    Choice choice(shared, all);
    long long place = static_cast<long long>(b.slot) * s.kv + head;
    float *scores_there = cached_scores + place * s.cache_rows, *positions_there = cached_positions + place * s.slots;
    int taken = max(max(b.position - 1, 0) / s.window - 1, 0), before = min(s.slots, taken * s.window);
    for (int i = threadIdx.x; i < s.slots; i += blockDim.x) {
        bool there = i < before;
        choice.held[i] = there ? -2 - i : EMPTY;
        choice.scores[i] = there ? scores_there[i] : NEGATIVE_INFINITY;
        choice.positions[i] = there ? static_cast<int>(positions_there[i]) : 0;
    }
    int first = b.position / s.window, last = (b.position + b.len - 1) / s.window;
    for (int stretch = first; stretch <= last; stretch++) {
        if (taken + 1 < stretch) {
            __syncthreads();
            for (int j = threadIdx.x; j < s.window; j += blockDim.x) {
                int position = taken * s.window + j, t = position - b.position, row = s.slots + position % (2 * s.window);
                float score = t >= 0 ? fresh_scores[static_cast<long long>(b.start + t) * s.kv + head] : scores_there[row];
                choice.scores[s.slots + j] = position < s.sinks ? -NEGATIVE_INFINITY : score;
                choice.held[s.slots + j] = t >= 0 ? t : -2 - row;
                choice.positions[s.slots + j] = position;
            }
            const float* sum = stretch > first
                ? sums + (static_cast<long long>(bases[blockIdx.x] + stretch - 1 - first) * s.kv + head) * group * DIM
                : remembered + place * group * DIM;
            for (int i = threadIdx.x; i < group * DIM; i += blockDim.x) choice.queries[i] = sum[i];
            __syncthreads();
            int nearest = nearest_of(stretch, s.window, s.reach);
            auto key_of = [&](int e) -> const act* {
                int at = choice.held[e];
                if (at == EMPTY) return nullptr;
                return at >= 0 ? k + (static_cast<long long>(b.start + at) * s.kv + head) * DIM
                               : cached_k + (place * s.cache_rows - 2 - at) * DIM;
            };
            auto turn_of = [&](int e) { return nearest - choice.positions[e]; };
            likings(choice.liked, all, key_of, turn_of, choice.queries, group, s.scale, frequencies);
            choice.take_in(s.slots, s.window, s.by_score);
            taken++;
        }
        __syncthreads();
        int* list = lists + (static_cast<long long>(bases[blockIdx.x] + stretch - first) * s.kv + head) * 2 * s.slots;
        for (int i = threadIdx.x; i < s.slots; i += blockDim.x) {
            list[i] = choice.held[i], list[s.slots + i] = choice.positions[i];
        }
    }
    if (s.cache_rows == 0) return;
    for (int i = threadIdx.x; i < s.slots; i += blockDim.x) {
        if (choice.held[i] == EMPTY) continue;
        scores_there[i] = choice.scores[i], positions_there[i] = static_cast<float>(choice.positions[i]);
    }
}

// Moves what the last stretch keeps into the cache's slots, before the ring takes in what is new, and remembers the sum of its
// queries. Grid (sequences, K).
extern "C" __global__ void kept_store(act* cached_k, act* cached_v, float* remembered, const act* k, const act* v,
                                      const float* sums, const int* lists, const BlockInfo* sequences, const int* bases,
                                      KeptSizes s) {
    BlockInfo b = sequences[blockIdx.x];
    int head = blockIdx.y;
    int stretch = bases[blockIdx.x] + (b.position + b.len - 1) / s.window - b.position / s.window;
    const int* list = lists + (static_cast<long long>(stretch) * s.kv + head) * 2 * s.slots;
    int width = s.heads / s.kv * DIM;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        remembered[(static_cast<long long>(b.slot) * s.kv + head) * width + i] =
            sums[(static_cast<long long>(stretch) * s.kv + head) * width + i];
    }
    long long base = (static_cast<long long>(b.slot) * s.kv + head) * s.cache_rows;
    for (int i = threadIdx.x; i < s.slots * DIM; i += blockDim.x) {
        int slot = i / DIM, d = i % DIM, from = list[slot];
        if (from == EMPTY || from == -2 - slot) continue;
        long long to = (base + slot) * DIM + d;
        if (from >= 0) {
            long long at = (static_cast<long long>(b.start + from) * s.kv + head) * DIM + d;
            cached_k[to] = k[at], cached_v[to] = v[at];
        } else {
            long long at = (base - 2 - from) * DIM + d;
            cached_k[to] = cached_k[at], cached_v[to] = cached_v[at];
        }
    }
}

// Adds the gradients of what a slot held, parts [stretches, K, 2, slots, D] (dk, dv), to those of the tokens. A token has one
// slot for as long as it stays, so that it is one thread's. Grid (sequences, K, slots).
extern "C" __global__ void kept_add_gradients(act* dk, act* dv, const float* parts, const int* lists,
                                              const float* frequencies, const BlockInfo* sequences, const int* bases,
                                              KeptSizes s) {
    BlockInfo b = sequences[blockIdx.x];
    int head = blockIdx.y, slot = blockIdx.z, count = (b.len + s.window - 1) / s.window;
    for (int d = threadIdx.x; d < DIM; d += blockDim.x) {
        float sum_k = 0.0f, sum_v = 0.0f;
        int token = EMPTY;
        for (int stretch = 0; stretch <= count; stretch++) {
            long long at = static_cast<long long>(bases[blockIdx.x] + stretch) * s.kv + head;
            int now = stretch < count ? lists[at * 2 * s.slots + slot] : EMPTY;
            if (now != token && token != EMPTY) {
                long long to = (static_cast<long long>(b.start + token) * s.kv + head) * DIM + d;
                dk[to] = from_float<act>(to_float(dk[to]) + sum_k);
                dv[to] = from_float<act>(to_float(dv[to]) + sum_v);
                sum_k = sum_v = 0.0f;
            }
            token = now;
            if (token == EMPTY) continue;
            const float* part = parts + (at * 2 * s.slots + slot) * DIM;
            // The key was moved on: its gradient goes back.
            int turn = nearest_of(stretch, s.window, s.reach) - token;
            float x = part[d];
            if (turn > 0) {
                float other = part[d < HALF ? d + HALF : d - HALF], sine, cosine;
                revolve(turn, revolutions(frequencies, d % HALF), &sine, &cosine);
                x = x * cosine + (d < HALF ? other : -other) * sine;
            }
            sum_k += x;
            sum_v += part[s.slots * DIM + d];
        }
    }
}
