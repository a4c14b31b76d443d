// Softmax attention over everything before, or over a window and the first tokens of the text ("sinks").
//
// One block takes 64 rows, that is tokens times the query heads of one key/value head, and walks over the keys that any
// of them sees, KEYS at a time, with a running maximum and sum. The backward has one kernel over rows (dq) and one over
// keys (dk, dv), so that every element is written by one block and the result does not depend on timing.

#define ROWS 64
#define KEYS 32
#define LOG_2E 1.4426950408889634f

struct AttentionSizes {
    int heads, kv, group, dim, padded;
    int window;      // of all keys: INT_MAX
    int sinks;
    int cache_rows;  // 0 without a cache
    int ring;        // whether the cache is a ring after the sinks
    float scale;
};

struct BlockInfo {
    int start, len, position, slot;  // the sequence: first row, rows, position of the first, slot
    int first;                       // first token (or key) of this block, counted in the sequence
};

// The keys that tokens from..to of a text see: `sinks` first ones from `oldest`, then those from `low`.
struct Visible {
    int oldest, low, sinks, count;
    __device__ Visible(const AttentionSizes& s, int oldest_, int from, int to) {
        oldest = oldest_;
        low = s.window == 0x7fffffff ? oldest : max(from + 1 - s.window, oldest);
        sinks = max(min(s.sinks, low) - oldest, 0);
        count = sinks + to - low;
    }
    __device__ int position(int i) const { return i < sinks ? oldest + i : low + i - sinks; }
};

__device__ __forceinline__ bool sees(const AttentionSizes& s, int row, int key) {
    return key <= row && (row - key < s.window || key < s.sinks);
}

__device__ __forceinline__ int cache_row(const AttentionSizes& s, int position) {
    return s.ring && position >= s.sinks ? s.sinks + (position - s.sinks) % s.window : position;
}

// Query rows r = (token, head of the group) of a block into a tile, zero where there is none.
__device__ void load_queries(float* tile, const act* x, const BlockInfo& b, int first, int tokens, int head,
                             const AttentionSizes& s) {
    int ld = leading(s.padded);
    for (int i = threadIdx.x; i < ROWS * s.padded; i += BLOCK_THREADS) {
        int r = i / s.padded, d = i % s.padded, t = r / s.group;
        long long at = (static_cast<long long>(b.start + first + t) * s.heads + head * s.group + r % s.group) * s.dim + d;
        tile[r * ld + d] = t < tokens && d < s.dim ? to_float(x[at]) : 0.0f;
    }
}

extern __shared__ float4 shared_memory[];

struct Carver {
    float* next;
    __device__ Carver() : next(reinterpret_cast<float*>(shared_memory)) {}
    __device__ float* tile(int rows, int padded) {
        float* tile = next;
        next += rows * leading(padded);
        return tile;
    }
};

// out [N, H, D]; lse [N, H] (may be null): log of the sum of exponentials. Grid (blocks, K).
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1)
    attention_forward(act* out, float* lse, const act* q, const act* k, const act* v, const act* cached_k,
                      const act* cached_v, const BlockInfo* blocks, AttentionSizes s) {
    BlockInfo b = blocks[blockIdx.x];
    int head = blockIdx.y, ld = leading(s.padded), per_block = ROWS / s.group;
    int tokens = min(per_block, b.len - b.first), from = b.position + b.first;
    Visible visible(s, s.cache_rows > 0 ? 0 : b.position, from, from + tokens);
    Carver carve;
    float* qt = carve.tile(ROWS, s.padded);
    float* ot = carve.tile(ROWS, s.padded);
    float* kt = carve.tile(KEYS, s.padded);
    float* vt = carve.tile(KEYS, s.padded);
    float* scores = carve.tile(ROWS, KEYS);
    load_queries(qt, q, b, b.first, tokens, head, s);
    for (int i = threadIdx.x; i < ROWS * ld; i += BLOCK_THREADS) ot[i] = 0.0f;
    // Four threads share a row.
    int row = threadIdx.x / 4, part = threadIdx.x % 4, own = from + row / s.group;
    float best = NEGATIVE_INFINITY, sum = 0.0f;
    for (int first = 0; first < visible.count; first += KEYS) {
        __syncthreads();
        for (int i = threadIdx.x; i < KEYS * s.padded; i += BLOCK_THREADS) {
            int j = i / s.padded, d = i % s.padded;
            float key = 0.0f, value = 0.0f;
            if (first + j < visible.count && d < s.dim) {
                int position = visible.position(first + j), t = position - b.position;
                if (t >= 0) {
                    long long at = (static_cast<long long>(b.start + t) * s.kv + head) * s.dim + d;
                    key = to_float(k[at]), value = to_float(v[at]);
                } else {
                    long long at = (static_cast<long long>(b.slot) * s.kv + head) * s.cache_rows + cache_row(s, position);
                    key = to_float(cached_k[at * s.dim + d]), value = to_float(cached_v[at * s.dim + d]);
                }
            }
            kt[j * ld + d] = key, vt[j * ld + d] = value;
        }
        __syncthreads();
        tile_product<2>(ROWS, KEYS, s.padded, Tile{qt, ld, 1}, Tile{kt, 1, ld},
                        [&](int i, int j, float x) { scores[i * (KEYS + 4) + j] = x * s.scale; });
        __syncthreads();
        float mine[KEYS / 4], top = best;
#pragma unroll
        for (int i = 0; i < KEYS / 4; i++) {
            int j = part + 4 * i;
            bool visible_here = first + j < visible.count && sees(s, own, visible.position(first + j));
            mine[i] = visible_here ? scores[row * (KEYS + 4) + j] : NEGATIVE_INFINITY;
            top = fmaxf(top, mine[i]);
        }
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        float shrink = top == NEGATIVE_INFINITY ? 1.0f : expf(best - top), added = 0.0f;
#pragma unroll
        for (int i = 0; i < KEYS / 4; i++) {
            float p = top == NEGATIVE_INFINITY ? 0.0f : expf(mine[i] - top);
            scores[row * (KEYS + 4) + part + 4 * i] = p;
            added += p;
        }
        added += __shfl_xor_sync(0xffffffffu, added, 1);
        added += __shfl_xor_sync(0xffffffffu, added, 2);
        sum = sum * shrink + added;
        best = top;
        for (int d = part; d < s.padded; d += 4) ot[row * ld + d] *= shrink;
        __syncthreads();
        tile_product<4>(ROWS, s.padded, KEYS, Tile{scores, KEYS + 4, 1}, Tile{vt, ld, 1},
                        [&](int i, int j, float x) { ot[i * ld + j] += x; });
    }
    __syncthreads();
    if (row / s.group < tokens) {
        long long at = static_cast<long long>(b.start + b.first + row / s.group) * s.heads + head * s.group + row % s.group;
        for (int d = part; d < s.dim; d += 4) out[at * s.dim + d] = from_float<act>(ot[row * ld + d] / sum);
        if (lse != nullptr && part == 0) lse[at] = best + logf(sum);
    }
}

// inner [N * H] = sum over D of out dout; one warp a row.
extern "C" __global__ void attention_inner(float* inner, const act* out, const act* dout, int dim, int rows) {
    int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    long long at = static_cast<long long>(row) * dim;
    float sum = 0.0f;
    for (int d = threadIdx.x; d < dim; d += 32) sum += to_float(out[at + d]) * to_float(dout[at + d]);
    sum = warp_sum(sum);
    if (threadIdx.x == 0) inner[row] = sum;
}

// Probabilities and score gradients of a tile: P = exp(scale q k - lse), dS = P (do v - inner) scale. Both tiles hold the
// products before.
__device__ void score_gradients(float* p, float* ds, const float* lse, const float* inner, const BlockInfo& b, int first,
                                int tokens, int head, const Visible& visible, int first_key, const AttentionSizes& s) {
    for (int i = threadIdx.x; i < ROWS * KEYS; i += BLOCK_THREADS) {
        int r = i / KEYS, j = i % KEYS, t = r / s.group, at = r * (KEYS + 4) + j;
        bool inside = t < tokens && first_key + j < visible.count &&
                      sees(s, b.position + first + t, visible.position(first_key + j));
        float weight = 0.0f, slope = 0.0f;
        if (inside) {
            long long row = static_cast<long long>(b.start + first + t) * s.heads + head * s.group + r % s.group;
            weight = expf(p[at] * s.scale - lse[row]);
            slope = weight * (ds[at] - inner[row]) * s.scale;
        }
        p[at] = weight, ds[at] = slope;
    }
}

// dq; grid (blocks of rows, K).
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1)
    attention_backward_rows(act* dq, const act* q, const act* k, const act* v, const act* dout, const float* lse,
                            const float* inner, const BlockInfo* blocks, AttentionSizes s) {
    BlockInfo b = blocks[blockIdx.x];
    int head = blockIdx.y, ld = leading(s.padded), per_block = ROWS / s.group;
    int tokens = min(per_block, b.len - b.first), from = b.position + b.first;
    Visible visible(s, b.position, from, from + tokens);
    Carver carve;
    float* qt = carve.tile(ROWS, s.padded);
    float* dot = carve.tile(ROWS, s.padded);
    float* dqt = carve.tile(ROWS, s.padded);
    float* kt = carve.tile(KEYS, s.padded);
    float* vt = carve.tile(KEYS, s.padded);
    float* p = carve.tile(ROWS, KEYS);
    float* ds = carve.tile(ROWS, KEYS);
    load_queries(qt, q, b, b.first, tokens, head, s);
    load_queries(dot, dout, b, b.first, tokens, head, s);
    for (int i = threadIdx.x; i < ROWS * ld; i += BLOCK_THREADS) dqt[i] = 0.0f;
    for (int first = 0; first < visible.count; first += KEYS) {
        __syncthreads();
        for (int i = threadIdx.x; i < KEYS * s.padded; i += BLOCK_THREADS) {
            int j = i / s.padded, d = i % s.padded;
            bool inside = first + j < visible.count && d < s.dim;
            int t = visible.position(first + j) - b.position;
            long long at = (static_cast<long long>(b.start + t) * s.kv + head) * s.dim + d;
            kt[j * ld + d] = inside ? to_float(k[at]) : 0.0f;
            vt[j * ld + d] = inside ? to_float(v[at]) : 0.0f;
        }
        __syncthreads();
        tile_product<2>(ROWS, KEYS, s.padded, Tile{qt, ld, 1}, Tile{kt, 1, ld},
                        [&](int i, int j, float x) { p[i * (KEYS + 4) + j] = x; });
        tile_product<2>(ROWS, KEYS, s.padded, Tile{dot, ld, 1}, Tile{vt, 1, ld},
                        [&](int i, int j, float x) { ds[i * (KEYS + 4) + j] = x; });
        __syncthreads();
        score_gradients(p, ds, lse, inner, b, b.first, tokens, head, visible, first, s);
        __syncthreads();
        tile_product<4>(ROWS, s.padded, KEYS, Tile{ds, KEYS + 4, 1}, Tile{kt, ld, 1},
                        [&](int i, int j, float x) { dqt[i * ld + j] += x; });
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tokens * s.group * s.dim; i += BLOCK_THREADS) {
        int r = i / s.dim, d = i % s.dim;
        long long row = static_cast<long long>(b.start + b.first + r / s.group) * s.heads + head * s.group + r % s.group;
        dq[row * s.dim + d] = from_float<act>(dqt[r * ld + d]);
    }
}

// dk, dv; grid (blocks of KEYS keys, K). The first block of a text with sinks is looked at by every later token.
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1)
    attention_backward_keys(act* dk, act* dv, const act* q, const act* k, const act* v, const act* dout,
                            const float* lse, const float* inner, const BlockInfo* blocks, AttentionSizes s) {
    BlockInfo b = blocks[blockIdx.x];
    int head = blockIdx.y, ld = leading(s.padded), per_block = ROWS / s.group;
    int keys = min(KEYS, b.len - b.first), position = b.position + b.first;
    Carver carve;
    float* kt = carve.tile(KEYS, s.padded);
    float* vt = carve.tile(KEYS, s.padded);
    float* dkt = carve.tile(KEYS, s.padded);
    float* dvt = carve.tile(KEYS, s.padded);
    float* qt = carve.tile(ROWS, s.padded);
    float* dot = carve.tile(ROWS, s.padded);
    float* p = carve.tile(ROWS, KEYS);
    float* ds = carve.tile(ROWS, KEYS);
    // The keys of this block as if they were all that is visible.
    Visible visible(s, position, position, position + keys);
    visible.low = position, visible.sinks = 0, visible.count = keys;
    for (int i = threadIdx.x; i < KEYS * s.padded; i += BLOCK_THREADS) {
        int j = i / s.padded, d = i % s.padded;
        bool inside = j < keys && d < s.dim;
        long long at = (static_cast<long long>(b.start + b.first + j) * s.kv + head) * s.dim + d;
        kt[j * ld + d] = inside ? to_float(k[at]) : 0.0f;
        vt[j * ld + d] = inside ? to_float(v[at]) : 0.0f;
        dkt[j * ld + d] = 0.0f, dvt[j * ld + d] = 0.0f;
    }
    bool to_the_end = s.window == 0x7fffffff || position < s.sinks;
    int last = to_the_end ? b.len : min(b.len, b.first + keys - 1 + s.window);
    for (int first = b.first; first < last; first += per_block) {
        int tokens = min(per_block, last - first);
        __syncthreads();
        load_queries(qt, q, b, first, tokens, head, s);
        load_queries(dot, dout, b, first, tokens, head, s);
        __syncthreads();
        tile_product<2>(ROWS, KEYS, s.padded, Tile{qt, ld, 1}, Tile{kt, 1, ld},
                        [&](int i, int j, float x) { p[i * (KEYS + 4) + j] = x; });
        tile_product<2>(ROWS, KEYS, s.padded, Tile{dot, ld, 1}, Tile{vt, 1, ld},
                        [&](int i, int j, float x) { ds[i * (KEYS + 4) + j] = x; });
        __syncthreads();
        score_gradients(p, ds, lse, inner, b, first, tokens, head, visible, 0, s);
        __syncthreads();
        tile_product<4>(KEYS, s.padded, ROWS, Tile{p, 1, KEYS + 4}, Tile{dot, ld, 1},
                        [&](int i, int j, float x) { dvt[i * ld + j] += x; });
        tile_product<4>(KEYS, s.padded, ROWS, Tile{ds, 1, KEYS + 4}, Tile{qt, ld, 1},
                        [&](int i, int j, float x) { dkt[i * ld + j] += x; });
    }
    __syncthreads();
    for (int i = threadIdx.x; i < keys * s.dim; i += BLOCK_THREADS) {
        int j = i / s.dim, d = i % s.dim;
        long long at = (static_cast<long long>(b.start + b.first + j) * s.kv + head) * s.dim + d;
        dk[at] = from_float<act>(dkt[j * ld + d]);
        dv[at] = from_float<act>(dvt[j * ld + d]);
    }
}

// Puts new keys and values [N, K, D] into a cache; of more than the ring holds, only the last stay. Grid (N, 1).
extern "C" __global__ void cache_insert(act* cached_k, act* cached_v, const act* k, const act* v, const BlockInfo* rows,
                                        AttentionSizes s) {
    // `first` is the row's place in its sequence.
    BlockInfo b = rows[blockIdx.x];
    int position = b.position + b.first;
    if (s.ring && position >= s.sinks && b.len - b.first > s.window) return;
    for (int i = threadIdx.x; i < s.kv * s.dim; i += blockDim.x) {
        int head = i / s.dim, d = i % s.dim;
        long long to = ((static_cast<long long>(b.slot) * s.kv + head) * s.cache_rows + cache_row(s, position)) * s.dim + d;
        long long from = static_cast<long long>(b.start + b.first) * s.kv * s.dim + i;
        cached_k[to] = k[from], cached_v[to] = v[from];
    }
}

// Copies [heads, old_rows, D] into the front of [heads, new_rows, D].
extern "C" __global__ void cache_grow(act* grown, const act* old, int old_rows, int new_rows, int dim, long long n) {
    long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= n) return;
    long long head = i / (static_cast<long long>(old_rows) * dim), rest = i % (static_cast<long long>(old_rows) * dim);
    grown[head * new_rows * dim + rest] = old[i];
}

#define STEP_HEADS 4
#define STEP_DIMS 8

// One token a sequence, its own key already in the cache: keys `split * per_split ..` of it by 8 warps, one key a warp at a
// time. With one split `out` is written, else parts [sequences, H, splits, D + 2]: maximum, sum, weighted values.
// Grid (splits, K * ceil(group / STEP_HEADS), sequences).
extern "C" __global__ void __launch_bounds__(256)
    attention_step(act* out, float* parts, const act* q, const act* cached_k, const act* cached_v, const BlockInfo* rows,
                   int per_split, AttentionSizes s) {
    __shared__ float shared_best[8][STEP_HEADS], shared_sum[8][STEP_HEADS];
    __shared__ float shared_acc[8][STEP_HEADS][32 * STEP_DIMS];
    BlockInfo b = rows[blockIdx.z];
    int slices = (s.group + STEP_HEADS - 1) / STEP_HEADS;
    int head = blockIdx.y / slices, first_g = blockIdx.y % slices * STEP_HEADS;
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    int valid = b.position + 1;
    if (s.ring) valid = min(valid, s.sinks + s.window);
    int begin = blockIdx.x * per_split, end = min(valid, begin + per_split);
    float query[STEP_HEADS][STEP_DIMS], acc[STEP_HEADS][STEP_DIMS], best[STEP_HEADS], sum[STEP_HEADS];
#pragma unroll
    for (int g = 0; g < STEP_HEADS; g++) {
        best[g] = NEGATIVE_INFINITY, sum[g] = 0.0f;
#pragma unroll
        for (int i = 0; i < STEP_DIMS; i++) {
            int d = lane + 32 * i;
            long long at = (static_cast<long long>(b.start) * s.heads + head * s.group + first_g + g) * s.dim + d;
            query[g][i] = first_g + g < s.group && d < s.dim ? to_float(q[at]) * s.scale : 0.0f;
            acc[g][i] = 0.0f;
        }
    }
    long long base = (static_cast<long long>(b.slot) * s.kv + head) * s.cache_rows;
    for (int j = begin + warp; j < end; j += 8) {
        const act* key = cached_k + (base + j) * s.dim;
        const act* value = cached_v + (base + j) * s.dim;
        float kd[STEP_DIMS], vd[STEP_DIMS];
#pragma unroll
        for (int i = 0; i < STEP_DIMS; i++) {
            int d = lane + 32 * i;
            kd[i] = d < s.dim ? to_float(key[d]) : 0.0f;
            vd[i] = d < s.dim ? to_float(value[d]) : 0.0f;
        }
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
    for (int i = threadIdx.x; i < STEP_HEADS * s.dim; i += blockDim.x) {
        int g = i / s.dim, d = i % s.dim;
        if (first_g + g >= s.group) continue;
        float top = NEGATIVE_INFINITY, total = 0.0f, value = 0.0f;
        for (int w = 0; w < 8; w++) top = fmaxf(top, shared_best[w][g]);
        for (int w = 0; w < 8; w++) {
            float weight = shared_best[w][g] == NEGATIVE_INFINITY ? 0.0f : expf(shared_best[w][g] - top);
            total += weight * shared_sum[w][g];
            value += weight * shared_acc[w][g][d];
        }
        long long row = static_cast<long long>(b.start) * s.heads + head * s.group + first_g + g;
        if (gridDim.x == 1) {
            out[row * s.dim + d] = from_float<act>(value / total);
            continue;
        }
        float* part = parts + (row * gridDim.x + blockIdx.x) * (s.dim + 2);
        if (d == 0) part[0] = top, part[1] = total;
        part[2 + d] = value;
    }
}

// Merges the splits; one block a row of [sequences * H].
extern "C" __global__ void attention_merge(act* out, const float* parts, int splits, int dim) {
    const float* part = parts + static_cast<long long>(blockIdx.x) * splits * (dim + 2);
    float top = NEGATIVE_INFINITY, total = 0.0f;
    for (int i = 0; i < splits; i++) top = fmaxf(top, part[i * (dim + 2)]);
    for (int i = 0; i < splits; i++) total += expf(part[i * (dim + 2)] - top) * part[i * (dim + 2) + 1];
    for (int d = threadIdx.x; d < dim; d += blockDim.x) {
        float value = 0.0f;
        for (int i = 0; i < splits; i++) value += expf(part[i * (dim + 2)] - top) * part[i * (dim + 2) + 2 + d];
        out[static_cast<long long>(blockIdx.x) * dim + d] = from_float<act>(value / total);
    }
}
