// The key/value cache of softmax attention, and one token of each sequence that looks at it.
//
// DIM, GROUP (query heads of a key/value head) and KEPT are fixed when the kernels are compiled.

// Puts new keys and values [N, K, D] into a cache; of more than the ring holds, only the last stay. Grid (N, 1).
extern "C" __global__ void cache_insert(act* cached_k, act* cached_v, float* cached_scores, const act* k, const act* v,
                                        const float* scores, const BlockInfo* rows, AttentionSizes s) {
    // `first` is the row's place in its sequence.
    BlockInfo b = rows[blockIdx.x];
    int position = b.position + b.first;
#if KEPT
    if (!in_window(s, b.position + b.len - 1, position)) return;
    if (threadIdx.x < s.kv) {
        long long to = (static_cast<long long>(b.slot) * s.kv + threadIdx.x) * s.cache_rows + cache_row(s, position);
        cached_scores[to] = scores[static_cast<long long>(b.start + b.first) * s.kv + threadIdx.x];
    }
#else
    if (s.ring && position >= s.sinks && b.len - b.first > s.window) return;
#endif
    for (int i = threadIdx.x; i < s.kv * DIM; i += blockDim.x) {
        int head = i / DIM, d = i % DIM;
        long long to = ((static_cast<long long>(b.slot) * s.kv + head) * s.cache_rows + cache_row(s, position)) * DIM + d;
        long long from = static_cast<long long>(b.start + b.first) * s.kv * DIM + i;
        cached_k[to] = k[from], cached_v[to] = v[from];
    }
}

// Copies [heads, old_rows, D] into the front of [heads, new_rows, D].
extern "C" __global__ void cache_grow(act* grown, const act* old, int old_rows, int new_rows, long long n) {
    long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= n) return;
    long long head = i / (static_cast<long long>(old_rows) * DIM), rest = i % (static_cast<long long>(old_rows) * DIM);
    grown[head * new_rows * DIM + rest] = old[i];
}

#define STEP_HEADS 4
#define STEP_DIMS ((DIM + 31) / 32)

// One token a sequence, its own key already in the cache: keys `split * per_split ..` of it by 8 warps, one key a warp at a
// time. With one split `out` is written, else parts [sequences, H, splits, D + 2]: maximum, sum, weighted values.
// Grid (splits, K * ceil(group / STEP_HEADS), sequences).
extern "C" __global__ void __launch_bounds__(256)
    attention_step(act* out, float* parts, const act* q, const act* cached_k, const act* cached_v,
                   const float* cached_positions, const float* frequencies, const BlockInfo* rows, int per_split,
                   AttentionSizes s) {
    __shared__ float shared_best[8][STEP_HEADS], shared_sum[8][STEP_HEADS];
    __shared__ float shared_acc[8][STEP_HEADS][32 * STEP_DIMS];
    BlockInfo b = rows[blockIdx.z];
    int slices = (GROUP + STEP_HEADS - 1) / STEP_HEADS;
    int head = blockIdx.y / slices, first_g = blockIdx.y % slices * STEP_HEADS;
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#if KEPT
    int valid = s.cache_rows, nearest = nearest_of(b.position / s.window, s.window, s.reach);
    const float* positions = cached_positions + (static_cast<long long>(b.slot) * s.kv + head) * s.slots;
#else
    int valid = b.position + 1;
    if (s.ring) valid = min(valid, s.sinks + s.window);
#endif
    int begin = blockIdx.x * per_split, end = min(valid, begin + per_split);
    float query[STEP_HEADS][STEP_DIMS], acc[STEP_HEADS][STEP_DIMS], best[STEP_HEADS], sum[STEP_HEADS];
#pragma unroll
    for (int g = 0; g < STEP_HEADS; g++) {
        best[g] = NEGATIVE_INFINITY, sum[g] = 0.0f;
#pragma unroll
        for (int i = 0; i < STEP_DIMS; i++) {
            int d = lane + 32 * i;
            long long at = (static_cast<long long>(b.start) * s.heads + head * GROUP + first_g + g) * DIM + d;
            query[g][i] = first_g + g < GROUP && d < DIM ? to_float(q[at]) * s.scale : 0.0f;
            acc[g][i] = 0.0f;
        }
    }
    long long base = (static_cast<long long>(b.slot) * s.kv + head) * s.cache_rows;
    for (int j = begin + warp; j < end; j += 8) {
#if KEPT
        if (!row_in_use(b.position, j, s.window, s.slots)) continue;
#endif
        const act* key = cached_k + (base + j) * DIM;
        const act* value = cached_v + (base + j) * DIM;
        float kd[STEP_DIMS], vd[STEP_DIMS];
#pragma unroll
        for (int i = 0; i < STEP_DIMS; i++) {
            int d = lane + 32 * i;
            kd[i] = d < DIM ? to_float(key[d]) : 0.0f;
            vd[i] = d < DIM ? to_float(value[d]) : 0.0f;
        }
#if KEPT
        if (j < s.slots && nearest > 0) {
            int turn = nearest - static_cast<int>(positions[j]);
#pragma unroll
            for (int i = 0; i < STEP_DIMS; i++) {
                int d = lane + 32 * i;
                if (turn <= 0 || d >= DIM) continue;
                float other = to_float(key[d < HALF ? d + HALF : d - HALF]), sine, cosine;
                revolve(turn, revolutions(frequencies, d % HALF), &sine, &cosine);
                kd[i] = kd[i] * cosine + (d < HALF ? -other : other) * sine;
            }
        }
#endif
#pragma unroll
        for (int g = 0; g < STEP_HEADS; g++) {
            float score = 0.0f;
#pragma unroll
            for (int i = 0; i < STEP_DIMS; i++) score += query[g][i] * kd[i];
            score = warp_sum(score);
            float top = fmaxf(best[g], score), shrink = expf(best[g] - top), p = expf(score - top);
            sum[g] = sum[g] * shrink + p;
            best[g] = top;
#pragma unroll
            for (int i = 0; i < STEP_DIMS; i++) acc[g][i] = acc[g][i] * shrink + p * vd[i];
        }
    }
#pragma unroll
    for (int g = 0; g < STEP_HEADS; g++) {
        if (lane == 0) shared_best[warp][g] = best[g], shared_sum[warp][g] = sum[g];
#pragma unroll
        for (int i = 0; i < STEP_DIMS; i++) shared_acc[warp][g][lane + 32 * i] = acc[g][i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < STEP_HEADS * DIM; i += blockDim.x) {
        int g = i / DIM, d = i % DIM;
        if (first_g + g >= GROUP) continue;
        float top = NEGATIVE_INFINITY, total = 0.0f, value = 0.0f;
        for (int w = 0; w < 8; w++) top = fmaxf(top, shared_best[w][g]);
        for (int w = 0; w < 8; w++) {
            float weight = shared_best[w][g] == NEGATIVE_INFINITY ? 0.0f : expf(shared_best[w][g] - top);
            total += weight * shared_sum[w][g];
            value += weight * shared_acc[w][g][d];
        }
        long long row = static_cast<long long>(b.start) * s.heads + head * GROUP + first_g + g;
        if (gridDim.x == 1) {
            out[row * DIM + d] = from_float<act>(value / total);
            continue;
        }
        float* part = parts + (row * gridDim.x + blockIdx.x) * (DIM + 2);
        if (d == 0) part[0] = top, part[1] = total;
        part[2 + d] = value;
    }
}

// Merges the splits; one block a row of [sequences * H].
extern "C" __global__ void attention_merge(act* out, const float* parts, int splits) {
    const float* part = parts + static_cast<long long>(blockIdx.x) * splits * (DIM + 2);
    float top = NEGATIVE_INFINITY, total = 0.0f;
    for (int i = 0; i < splits; i++) top = fmaxf(top, part[i * (DIM + 2)]);
    for (int i = 0; i < splits; i++) total += expf(part[i * (DIM + 2)] - top) * part[i * (DIM + 2) + 1];
    for (int d = threadIdx.x; d < DIM; d += blockDim.x) {
        float value = 0.0f;
        for (int i = 0; i < splits; i++) value += expf(part[i * (DIM + 2)] - top) * part[i * (DIM + 2) + 2 + d];
        out[static_cast<long long>(blockIdx.x) * DIM + d] = from_float<act>(value / total);
    }
}
