// Softmax attention over everything before, or over a window and the first tokens of the text ("sinks").
//
// One block takes 64 rows, that is tokens times the query heads of one key/value head, and walks over the keys that any
// of them sees, KEYS at a time, with a running maximum and sum. The backward has one kernel over rows (dq) and one over
// keys (dk, dv), so that every element is written by one block and the result does not depend on timing.

// DIM and GROUP (query heads of a key/value head) are fixed when the kernels are compiled.
#define ROWS 64
#define KEYS 64
#define QUERIES 32
#define THREADS 128
#define WIDTH ((DIM + 15) / 16 * 16)
#define LD (WIDTH + PAD)
#define TOKENS (ROWS / GROUP)

// The keys that tokens from..to of a text see: `sinks` first ones from `oldest`, then those from `low`.
struct Visible {
    int oldest, low, sinks, count;
    __device__ Visible(const AttentionSizes& s, int oldest_, int from, int to) {
        oldest = oldest_;
        low = s.window == EVERYTHING ? oldest : max(from + 1 - s.window, oldest);
        sinks = max(min(s.sinks, low) - oldest, 0);
        count = sinks + to - low;
    }
    __device__ int position(int i) const { return i < sinks ? oldest + i : low + i - sinks; }
};

__device__ __forceinline__ bool sees(const AttentionSizes& s, int row, int key) {
    return key <= row && (row - key < s.window || key < s.sinks);
}

// Rows of `LENGTH` activations into a tile [COUNT, ACROSS + PAD]; source(r) is where row r begins, or null for zeros.
template <int COUNT, int ACROSS, int LENGTH, int BLOCK, class Source>
__device__ __forceinline__ void load_tile(elem* tile, Source source) {
    constexpr int VECTOR = 16 / sizeof(act);
    if constexpr (LENGTH % VECTOR == 0) {
        constexpr int PER_ROW = ACROSS / VECTOR;
#pragma unroll 4
        for (int i = threadIdx.x; i < COUNT * PER_ROW; i += BLOCK) {
            int r = i / PER_ROW, d = i % PER_ROW * VECTOR;
            const act* row = source(r);
            uint4 value = make_uint4(0, 0, 0, 0);
            if (row != nullptr && d < LENGTH) value = *reinterpret_cast<const uint4*>(row + d);
            *reinterpret_cast<uint4*>(tile + r * (ACROSS + PAD) + d) = value;
        }
    } else {
        for (int i = threadIdx.x; i < COUNT * ACROSS; i += BLOCK) {
            int r = i / ACROSS, d = i % ACROSS;
            const act* row = source(r);
            tile[r * (ACROSS + PAD) + d] = row != nullptr && d < LENGTH ? row[d] : from_float<act>(0.0f);
        }
    }
}

// Row of [N, H] that query row r = (token, head of the group) of a block is.
__device__ __forceinline__ long long row_of(const BlockInfo& b, const AttentionSizes& s, int head, int first, int r) {
    return static_cast<long long>(b.start + first + r / GROUP) * s.heads + head * GROUP + r % GROUP;
}

// COUNT query rows from token `first` into a tile, zero from token `tokens` on.
template <int COUNT>
__device__ __forceinline__ void load_queries(elem* tile, const act* x, const BlockInfo& b, int first, int tokens, int head,
                                             const AttentionSizes& s) {
    load_tile<COUNT, WIDTH, DIM, THREADS>(
        tile, [&](int r) { return r / GROUP < tokens ? x + row_of(b, s, head, first, r) * DIM : nullptr; });
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// out [N, H, D]; lse [N, H] (may be null): log of the sum of exponentials. A warp has 16 rows, whose scores and sums stay in
// its registers. Grid (blocks, K).
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_forward(act* out, float* lse, const act* q, const act* k, const act* v, const act* cached_k,
                      const act* cached_v, const BlockInfo* blocks, AttentionSizes s) {
    BlockInfo b = blocks[blockIdx.x];
    int head = blockIdx.y;
    int tokens = min(TOKENS, b.len - b.first), from = b.position + b.first;
    Visible visible(s, s.cache_rows > 0 ? 0 : b.position, from, from + tokens);
    Carver carve;
    elem* qt = carve.tile(ROWS, WIDTH);
    elem* kt = carve.tile(KEYS, WIDTH);
    elem* vt = carve.tile(KEYS, WIDTH);
    load_queries<ROWS>(qt, q, b, b.first, tokens, head, s);
    int group = LANE >> 2, quad = LANE & 3, rows[2] = {WARP * 16 + group, WARP * 16 + group + 8};
    float best[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, sum[2] = {0.0f, 0.0f}, acc[WIDTH / 8][4];
    set_zero(acc);
    for (int first = 0; first < visible.count; first += KEYS) {
        __syncthreads();
        auto key_row = [&](const act* fresh, const act* cached, int j) -> const act* {
            if (first + j >= visible.count) return nullptr;
            int position = visible.position(first + j), t = position - b.position;
            if (t >= 0) return fresh + (static_cast<long long>(b.start + t) * s.kv + head) * DIM;
            return cached + ((static_cast<long long>(b.slot) * s.kv + head) * s.cache_rows + cache_row(s, position)) * DIM;
        };
        load_tile<KEYS, WIDTH, DIM, THREADS>(kt, [&](int j) { return key_row(k, cached_k, j); });
        load_tile<KEYS, WIDTH, DIM, THREADS>(vt, [&](int j) { return key_row(v, cached_v, j); });
        __syncthreads();
        float scores[KEYS / 8][4];
        set_zero(scores);
        product<WIDTH, false, true>(scores, qt, LD, WARP * 16, kt, LD, 0);
        float top[2] = {best[0], best[1]}, shrink[2], added[2] = {0.0f, 0.0f};
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int j = first + 8 * n + 2 * quad + (i & 1);
                bool there = j < visible.count && sees(s, from + rows[i >> 1] / GROUP, visible.position(j));
                scores[n][i] = there ? scores[n][i] * s.scale : NEGATIVE_INFINITY;
                top[i >> 1] = fmaxf(top[i >> 1], scores[n][i]);
            }
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            top[i] = quad_max(top[i]);
            shrink[i] = top[i] == NEGATIVE_INFINITY ? 1.0f : __expf(best[i] - top[i]);
            best[i] = top[i];
        }
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float p = top[i >> 1] == NEGATIVE_INFINITY ? 0.0f : __expf(scores[n][i] - top[i >> 1]);
                scores[n][i] = p;
                added[i >> 1] += p;
            }
        }
        sum[0] = sum[0] * shrink[0] + quad_sum(added[0]);
        sum[1] = sum[1] * shrink[1] + quad_sum(added[1]);
#pragma unroll
        for (int n = 0; n < WIDTH / 8; n++) {
            acc[n][0] *= shrink[0], acc[n][1] *= shrink[0], acc[n][2] *= shrink[1], acc[n][3] *= shrink[1];
        }
        product_of_sums(acc, scores, vt, LD);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (rows[i] / GROUP >= tokens) continue;
        long long at = row_of(b, s, head, b.first, rows[i]);
        float scale = 1.0f / sum[i];
        if (lse != nullptr && quad == 0) lse[at] = best[i] + logf(sum[i]);
#pragma unroll
        for (int n = 0; n < WIDTH / 8; n++) {
            int d = 8 * n + 2 * quad;
            // DIM is even: RoPE turns pairs.
            if (d < DIM) store2(out + at * DIM + d, acc[n][2 * i] * scale, acc[n][2 * i + 1] * scale);
        }
    }
}

// inner [N * H] = sum over D of out dout; one warp a row.
extern "C" __global__ void attention_inner(float* inner, const act* out, const act* dout, int rows) {
    int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    long long at = static_cast<long long>(row) * DIM;
    float sum = 0.0f;
    for (int d = threadIdx.x; d < DIM; d += 32) sum += to_float(out[at + d]) * to_float(dout[at + d]);
    sum = warp_sum(sum);
    if (threadIdx.x == 0) inner[row] = sum;
}

// dq, and what the rows of each block give to the gradients of the sinks: parts [blocks, K, 2, 16, D] (dk, dv), if there are
// sinks; at most 16. Grid (blocks, K).
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_backward_rows(act* dq, float* parts, const act* q, const act* k, const act* v, const act* dout,
                            const float* lse, const float* inner, const BlockInfo* blocks, AttentionSizes s) {
    BlockInfo b = blocks[blockIdx.x];
    int head = blockIdx.y;
    int tokens = min(TOKENS, b.len - b.first), from = b.position + b.first;
    Visible visible(s, b.position, from, from + tokens);
    Carver carve;
    elem* qt = carve.tile(ROWS, WIDTH);
    elem* dot = carve.tile(ROWS, WIDTH);
    elem* kt = carve.tile(QUERIES, WIDTH);
    elem* vt = carve.tile(QUERIES, WIDTH);
    elem* p_sinks = carve.tile(ROWS, 16);
    elem* ds_sinks = carve.tile(ROWS, 16);
    load_queries<ROWS>(qt, q, b, b.first, tokens, head, s);
    load_queries<ROWS>(dot, dout, b, b.first, tokens, head, s);
    int group = LANE >> 2, quad = LANE & 3, rows[2] = {WARP * 16 + group, WARP * 16 + group + 8};
    float row_lse[2], row_inner[2], acc[WIDTH / 8][4];
    set_zero(acc);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        bool inside = rows[i] / GROUP < tokens;
        long long at = row_of(b, s, head, b.first, rows[i]);
        row_lse[i] = inside ? lse[at] : 0.0f;
        row_inner[i] = inside ? inner[at] : 0.0f;
    }
    for (int first = 0; first < visible.count; first += QUERIES) {
        __syncthreads();
        auto key_row = [&](const act* x, int j) -> const act* {
            if (first + j >= visible.count) return nullptr;
            return x + (static_cast<long long>(b.start + visible.position(first + j) - b.position) * s.kv + head) * DIM;
        };
        load_tile<QUERIES, WIDTH, DIM, THREADS>(kt, [&](int j) { return key_row(k, j); });
        load_tile<QUERIES, WIDTH, DIM, THREADS>(vt, [&](int j) { return key_row(v, j); });
        __syncthreads();
        float p[QUERIES / 8][4], ds[QUERIES / 8][4];
        set_zero(p);
        set_zero(ds);
        product<WIDTH, false, true>(p, qt, LD, WARP * 16, kt, LD, 0);
        product<WIDTH, false, true>(ds, dot, LD, WARP * 16, vt, LD, 0);
#pragma unroll
        for (int n = 0; n < QUERIES / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int j = first + 8 * n + 2 * quad + (i & 1), t = rows[i >> 1] / GROUP;
                bool there = t < tokens && j < visible.count && sees(s, from + t, visible.position(j));
                p[n][i] = there ? __expf(p[n][i] * s.scale - row_lse[i >> 1]) : 0.0f;
                ds[n][i] = p[n][i] * (ds[n][i] - row_inner[i >> 1]) * s.scale;
                // Sinks that the row's window does not reach: their gradients are this kernel's. The key of a sink is
                // number `position - oldest` of those visible.
                if (first == 0 && n < 2) {
                    int at = rows[i >> 1] * (16 + PAD) + 8 * n + 2 * quad + (i & 1);
                    int position = visible.position(j);
                    bool sink = there && position < s.sinks && from + t - position >= s.window;
                    p_sinks[at] = from_float<elem>(sink ? p[n][i] : 0.0f);
                    ds_sinks[at] = from_float<elem>(sink ? ds[n][i] : 0.0f);
                }
            }
        }
        product_of_sums(acc, ds, kt, LD);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (rows[i] / GROUP >= tokens) continue;
        long long at = row_of(b, s, head, b.first, rows[i]) * DIM;
#pragma unroll
        for (int n = 0; n < WIDTH / 8; n++) {
            int d = 8 * n + 2 * quad;
            if (d < DIM) store2(dq + at + d, acc[n][2 * i], acc[n][2 * i + 1]);
        }
    }
    if (parts == nullptr) return;
    __syncthreads();
    float* part = parts + (static_cast<long long>(blockIdx.x) * s.kv + head) * 2 * 16 * DIM;
    // [16, D] twice: warps share the columns.
    for (int column = WARP * 8; column < WIDTH; column += THREADS / 32 * 8) {
        float dk[1][4], dv[1][4];
        set_zero(dk);
        set_zero(dv);
        product<ROWS, true, false>(dk, ds_sinks, 16 + PAD, 0, qt, LD, column);
        product<ROWS, true, false>(dv, p_sinks, 16 + PAD, 0, dot, LD, column);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int j = group + (i >> 1) * 8, d = column + 2 * quad + (i & 1);
            if (d < DIM) part[j * DIM + d] = dk[0][i], part[(16 + j) * DIM + d] = dv[0][i];
        }
    }
}

// dk, dv of what the window reaches (of everything without one). A warp has 16 keys; scores are taken transposed, so that
// they can be the left factor of both gradients. Grid (blocks of KEYS keys, K).
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_backward_keys(act* dk, act* dv, const act* q, const act* k, const act* v, const act* dout,
                            const float* lse, const float* inner, const BlockInfo* blocks, AttentionSizes s) {
    __shared__ float row_lse[QUERIES], row_inner[QUERIES];
    BlockInfo b = blocks[blockIdx.x];
    int head = blockIdx.y;
    int count = min(KEYS, b.len - b.first);
    constexpr int PER_LOAD = QUERIES >= GROUP ? QUERIES / GROUP : 1;
    Carver carve;
    elem* kt = carve.tile(KEYS, WIDTH);
    elem* vt = carve.tile(KEYS, WIDTH);
    elem* qt = carve.tile(QUERIES, WIDTH);
    elem* dot = carve.tile(QUERIES, WIDTH);
    auto key_row = [&](const act* x, int j) -> const act* {
        return j < count ? x + (static_cast<long long>(b.start + b.first + j) * s.kv + head) * DIM : nullptr;
    };
    load_tile<KEYS, WIDTH, DIM, THREADS>(kt, [&](int j) { return key_row(k, j); });
    load_tile<KEYS, WIDTH, DIM, THREADS>(vt, [&](int j) { return key_row(v, j); });
    int group = LANE >> 2, quad = LANE & 3, keys[2] = {WARP * 16 + group, WARP * 16 + group + 8};
    float acc_k[WIDTH / 8][4], acc_v[WIDTH / 8][4];
    set_zero(acc_k);
    set_zero(acc_v);
    int last = s.window == EVERYTHING ? b.len : min(b.len, b.first + count - 1 + s.window);
    for (int first = b.first; first < last; first += PER_LOAD) {
        int tokens = min(PER_LOAD, last - first);
        __syncthreads();
        load_queries<QUERIES>(qt, q, b, first, tokens, head, s);
        load_queries<QUERIES>(dot, dout, b, first, tokens, head, s);
        if (threadIdx.x < QUERIES) {
            bool inside = threadIdx.x / GROUP < tokens;
            long long at = row_of(b, s, head, first, threadIdx.x);
            row_lse[threadIdx.x] = inside ? lse[at] : 0.0f;
            row_inner[threadIdx.x] = inside ? inner[at] : 0.0f;
        }
        __syncthreads();
        float p[QUERIES / 8][4], ds[QUERIES / 8][4];
        set_zero(p);
        set_zero(ds);
        product<WIDTH, false, true>(p, kt, LD, WARP * 16, qt, LD, 0);
        product<WIDTH, false, true>(ds, vt, LD, WARP * 16, dot, LD, 0);
#pragma unroll
        for (int n = 0; n < QUERIES / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int r = 8 * n + 2 * quad + (i & 1), t = r / GROUP, key = b.first + keys[i >> 1], distance = first + t - key;
                bool there = t < tokens && keys[i >> 1] < count && distance >= 0 && distance < s.window;
                p[n][i] = there ? __expf(p[n][i] * s.scale - row_lse[r]) : 0.0f;
                ds[n][i] = p[n][i] * (ds[n][i] - row_inner[r]) * s.scale;
            }
        }
        product_of_sums(acc_v, p, dot, LD);
        product_of_sums(acc_k, ds, qt, LD);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (keys[i] >= count) continue;
        long long at = (static_cast<long long>(b.start + b.first + keys[i]) * s.kv + head) * DIM;
#pragma unroll
        for (int n = 0; n < WIDTH / 8; n++) {
            int d = 8 * n + 2 * quad;
            if (d < DIM) {
                store2(dk + at + d, acc_k[n][2 * i], acc_k[n][2 * i + 1]);
                store2(dv + at + d, acc_v[n][2 * i], acc_v[n][2 * i + 1]);
            }
        }
    }
}

// Adds the parts of the sinks' gradients. `stride` blocks lie between two of one text, whose first is `place`; a text has
// `count` of them. Grid (sequences, K * sinks).
extern "C" __global__ void attention_add_sinks(act* dk, act* dv, const float* parts, const BlockInfo* blocks, int block_count,
                                               AttentionSizes s) {
    int head = blockIdx.y / s.sinks, j = blockIdx.y % s.sinks;
    BlockInfo own = blocks[blockIdx.x];  // the first blocks of all texts come first
    if (own.position + j >= s.sinks || j >= own.len) return;
    for (int d = threadIdx.x; d < DIM; d += blockDim.x) {
        float sum_k = 0.0f, sum_v = 0.0f;
        for (int i = 0; i < block_count; i++) {
            if (blocks[i].start != own.start) continue;
            const float* part = parts + (static_cast<long long>(i) * s.kv + head) * 2 * 16 * DIM;
            sum_k += part[j * DIM + d], sum_v += part[(16 + j) * DIM + d];
        }
        long long at = (static_cast<long long>(own.start + j) * s.kv + head) * DIM + d;
        dk[at] = from_float<act>(to_float(dk[at]) + sum_k);
        dv[at] = from_float<act>(to_float(dv[at]) + sum_v);
    }
}

// Puts new keys and values [N, K, D] into a cache; of more than the ring holds, only the last stay. Grid (N, 1).
extern "C" __global__ void cache_insert(act* cached_k, act* cached_v, const act* k, const act* v, const BlockInfo* rows,
                                        AttentionSizes s) {
    // `first` is the row's place in its sequence.
    BlockInfo b = rows[blockIdx.x];
    int position = b.position + b.first;
    if (s.ring && position >= s.sinks && b.len - b.first > s.window) return;
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
    attention_step(act* out, float* parts, const act* q, const act* cached_k, const act* cached_v, const BlockInfo* rows,
                   int per_split, AttentionSizes s) {
    __shared__ float shared_best[8][STEP_HEADS], shared_sum[8][STEP_HEADS];
    __shared__ float shared_acc[8][STEP_HEADS][32 * STEP_DIMS];
    BlockInfo b = rows[blockIdx.z];
    int slices = (GROUP + STEP_HEADS - 1) / STEP_HEADS;
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
            long long at = (static_cast<long long>(b.start) * s.heads + head * GROUP + first_g + g) * DIM + d;
            query[g][i] = first_g + g < GROUP && d < DIM ? to_float(q[at]) * s.scale : 0.0f;
            acc[g][i] = 0.0f;
        }
    }
    long long base = (static_cast<long long>(b.slot) * s.kv + head) * s.cache_rows;
    for (int j = begin + warp; j < end; j += 8) {
        const act* key = cached_k + (base + j) * DIM;
        const act* value = cached_v + (base + j) * DIM;
        float kd[STEP_DIMS], vd[STEP_DIMS];
#pragma unroll
        for (int i = 0; i < STEP_DIMS; i++) {
            int d = lane + 32 * i;
            kd[i] = d < DIM ? to_float(key[d]) : 0.0f;
            vd[i] = d < DIM ? to_float(value[d]) : 0.0f;
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
