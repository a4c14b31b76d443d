// Softmax attention over everything before, or over a window and the first tokens of the text ("sinks"), or with KEPT over a
// window that moves in stretches of its own size and over the keys that slots hold (kept.cu).
//
// One block takes 64 rows, that is tokens times the query heads of one key/value head, and walks over the keys that any
// of them sees, FORWARD_KEYS at a time (a window of 64 and four sinks in one go), with a running maximum and sum. The backward
// has one kernel over rows (dq) and one over keys (dk, dv), with KEPT one over slots besides, so that every element is written by one block and the result does not depend on timing.

// DIM, GROUP (query heads of a key/value head) and KEPT are fixed when the kernels are compiled.
#define ROWS 64
#define KEYS 64
#define FORWARD_KEYS 96
#define QUERIES 32
#define THREADS 128
// Blocks that share a multiprocessor where 128 registers a thread are enough.
#if defined(ACT_BF16) && DIM <= 64 && __CUDA_ARCH__ >= 900
#define BLOCKS 4
#else
#define BLOCKS 1
#endif
#define WIDTH ((DIM + 15) / 16 * 16)
#define LD (WIDTH + PAD)
#define TOKENS (ROWS / GROUP)

// The keys that tokens from..to of a text see: first sinks from `oldest`, or what slots hold, then those from `low`.
struct Visible {
    int oldest, low, first, count;
    int nearest;  // kept keys before this position are moved on to it
    const int* list;
    __device__ Visible(const AttentionSizes& s, int oldest_, int from, int to, const int* list_) {
        oldest = oldest_, list = list_;
#if KEPT
        low = max(from / s.window - 1, 0) * s.window;
        first = filled_slots(from, s.window, s.slots);
        nearest = nearest_of(from / s.window, s.window, s.reach);
#else
        low = s.window == EVERYTHING ? oldest : max(from + 1 - s.window, oldest);
        first = max(min(s.sinks, low) - oldest, 0);
#endif
        count = first + to - low;
    }
    __device__ int position(int i) const { return i < first ? oldest + i : low + i - first; }
    // Row in the sequence, or -2 - row in the cache.
    __device__ int place(const AttentionSizes& s, const BlockInfo& b, int i) const {
#if KEPT
        if (i < first) return list[i];
#endif
        int at = position(i), t = at - b.position;
        return t >= 0 ? t : -2 - cache_row(s, at);
    }
#if KEPT
    // By how many tokens key i is moved on.
    __device__ int turn(const AttentionSizes& s, int i) const { return i < first ? nearest - list[s.slots + i] : 0; }
#endif
    __device__ bool sees(const AttentionSizes& s, int row, int i) const {
#if KEPT
        return i < first || (i < count && position(i) <= row);
#else
        int key = position(i);
        return i < count && (in_window(s, row, key) || (key <= row && key < s.sinks));
#endif
    }
};

__device__ __forceinline__ int tokens_of(const BlockInfo& b, const AttentionSizes& s) {
#if KEPT
    return min(min(s.per_block, b.len - b.first), s.window - (b.position + b.first) % s.window);
#else
    return min(TOKENS, b.len - b.first);
#endif
}

// Row of [N, H] that query row r = (token, head of the group) of a block is.
__device__ __forceinline__ long long row_of(const BlockInfo& b, const AttentionSizes& s, int head, int first, int r) {
    return static_cast<long long>(b.start + first + r / GROUP) * s.heads + head * GROUP + r % GROUP;
}

// COUNT query rows from token `first` into a tile, zero from token `tokens` on.
template <int COUNT>
__device__ __forceinline__ void fetch_queries(elem* tile, const act* x, const BlockInfo& b, int first, int tokens, int head,
                                             const AttentionSizes& s) {
    fetch_tile<COUNT, WIDTH, DIM, THREADS>(
        tile, [&](int r) { return r / GROUP < tokens ? x + row_of(b, s, head, first, r) * DIM : nullptr; });
}

#if KEPT
// What the slots hold for the stretch of a block; see kept.cuh.
__device__ __forceinline__ const int* list_of(const int* lists, int stretch, int head, const AttentionSizes& s) {
    return lists + (static_cast<long long>(stretch) * s.kv + head) * 2 * s.slots;
}
#define LIST list_of(lists, stretches[blockIdx.x], head, s)
#else
#define LIST nullptr
#endif

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
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    attention_forward(act* out, float* lse, const act* q, const act* k, const act* v, const act* cached_k,
                      const act* cached_v, const float* frequencies, const BlockInfo* blocks, const int* lists,
                      const int* stretches, AttentionSizes s) {
    BlockInfo b = blocks[blockIdx.x];
    int head = blockIdx.y;
    int tokens = tokens_of(b, s), from = b.position + b.first;
    Visible visible(s, s.cache_rows > 0 ? 0 : b.position, from, from + tokens, LIST);
    Carver carve;
    elem* qt = carve.tile(ROWS, WIDTH);
    elem* kt = carve.tile(FORWARD_KEYS, WIDTH);
    elem* vt = carve.tile(FORWARD_KEYS, WIDTH);
    fetch_queries<ROWS>(qt, q, b, b.first, tokens, head, s);
    int group = LANE >> 2, quad = LANE & 3, rows[2] = {WARP * 16 + group, WARP * 16 + group + 8};
    float best[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, sum[2] = {0.0f, 0.0f}, acc[WIDTH / 8][4];
    set_zero(acc);
    for (int first = 0; first < visible.count; first += FORWARD_KEYS) {
        __syncthreads();
        auto key_row = [&](const act* fresh, const act* cached, int j) -> const act* {
            if (first + j >= visible.count) return nullptr;
            int place = visible.place(s, b, first + j);
            if (place >= 0) return fresh + (static_cast<long long>(b.start + place) * s.kv + head) * DIM;
            return cached + ((static_cast<long long>(b.slot) * s.kv + head) * s.cache_rows - 2 - place) * DIM;
        };
        fetch_tile<FORWARD_KEYS, WIDTH, DIM, THREADS>(kt, [&](int j) { return key_row(k, cached_k, j); });
        fetch_tile<FORWARD_KEYS, WIDTH, DIM, THREADS>(vt, [&](int j) { return key_row(v, cached_v, j); });
        wait_for_tiles();
        __syncthreads();
#if KEPT
        if (visible.nearest > 0 && first < visible.first) {
            turn_keys(kt, LD, FORWARD_KEYS, frequencies, [&](int j) { return visible.turn(s, first + j); });
            __syncthreads();
        }
#endif
        float scores[FORWARD_KEYS / 8][4];
        set_zero(scores);
        product<WIDTH, false, true>(scores, qt, LD, WARP * 16, kt, LD, 0);
        float top[2] = {best[0], best[1]}, shrink[2], added[2] = {0.0f, 0.0f};
#pragma unroll
        for (int n = 0; n < FORWARD_KEYS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int j = first + 8 * n + 2 * quad + (i & 1);
                bool there = visible.sees(s, from + rows[i >> 1] / GROUP, j);
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
        for (int n = 0; n < FORWARD_KEYS / 8; n++) {
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

// inner [N * H] = sum over D of out dout; eight threads a row.
extern "C" __global__ void attention_inner(float* inner, const act* out, const act* dout, int rows) {
    int row = (blockIdx.x * blockDim.y + threadIdx.y) * 4 + threadIdx.x / 8;
    bool inside = row < rows;
    long long at = static_cast<long long>(inside ? row : 0) * DIM;
    float sum = 0.0f;
    if constexpr (DIM % 4 == 0) {
#pragma unroll
        for (int d = threadIdx.x % 8 * 4; d < DIM; d += 32) {
            float4 x = load4(out + at + d), y = load4(dout + at + d);
            sum += x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
        }
    } else {
        for (int d = threadIdx.x % 8; d < DIM; d += 8) sum += to_float(out[at + d]) * to_float(dout[at + d]);
    }
#pragma unroll
    for (int offset = 4; offset > 0; offset >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (inside && threadIdx.x % 8 == 0) inner[row] = sum;
}

// dq, and what the rows of each block give to the gradients of the sinks: parts [blocks, K, 2, 16, D] (dk, dv), if there are
// sinks; at most 16. Grid (blocks, K).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    attention_backward_rows(act* dq, float* parts, const act* q, const act* k, const act* v, const act* dout,
                            const float* lse, const float* inner, const float* frequencies, const BlockInfo* blocks,
                            const int* lists, const int* stretches, AttentionSizes s) {
    BlockInfo b = blocks[blockIdx.x];
    int head = blockIdx.y;
    int tokens = tokens_of(b, s), from = b.position + b.first;
    Visible visible(s, b.position, from, from + tokens, LIST);
    Carver carve;
    elem* qt = carve.tile(ROWS, WIDTH);
    elem* dot = carve.tile(ROWS, WIDTH);
    elem* keys = carve.tile(2 * QUERIES, WIDTH);  // those at work, and the next ones on their way
    elem* values = carve.tile(2 * QUERIES, WIDTH);
    elem* p_sinks = carve.tile(ROWS, 16);
    elem* ds_sinks = carve.tile(ROWS, 16);
    fetch_queries<ROWS>(qt, q, b, b.first, tokens, head, s);
    fetch_queries<ROWS>(dot, dout, b, b.first, tokens, head, s);
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
    auto fetch_keys = [&](int first, int half) {
        auto key_row = [&](const act* x, int j) -> const act* {
            if (first + j >= visible.count) return nullptr;
            return x + (static_cast<long long>(b.start + visible.place(s, b, first + j)) * s.kv + head) * DIM;
        };
        fetch_tile<QUERIES, WIDTH, DIM, THREADS>(keys + half * QUERIES * LD, [&](int j) { return key_row(k, j); });
        fetch_tile<QUERIES, WIDTH, DIM, THREADS>(values + half * QUERIES * LD, [&](int j) { return key_row(v, j); });
    };
    fetch_keys(0, 0);
    for (int first = 0, half = 0; first < visible.count; first += QUERIES, half ^= 1) {
        wait_for_tiles();
        __syncthreads();
        if (first + QUERIES < visible.count) fetch_keys(first + QUERIES, half ^ 1);
        elem *kt = keys + half * QUERIES * LD, *vt = values + half * QUERIES * LD;
#if KEPT
        if (visible.nearest > 0 && first < visible.first) {
            turn_keys(kt, LD, QUERIES, frequencies, [&](int j) { return visible.turn(s, first + j); });
            __syncthreads();
        }
#endif
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
                bool there = t < tokens && visible.sees(s, from + t, j);
                p[n][i] = there ? __expf(p[n][i] * s.scale - row_lse[i >> 1]) : 0.0f;
                ds[n][i] = p[n][i] * (ds[n][i] - row_inner[i >> 1]) * s.scale;
#if !KEPT
                // Sinks that the row's window does not reach: their gradients are this kernel's. The key of a sink is
                // number `position - oldest` of those visible.
                if (first == 0 && n < 2) {
                    int at = rows[i >> 1] * (16 + PAD) + 8 * n + 2 * quad + (i & 1);
                    int position = visible.position(j);
                    bool sink = there && position < s.sinks && from + t - position >= s.window;
                    p_sinks[at] = from_float<elem>(sink ? p[n][i] : 0.0f);
                    ds_sinks[at] = from_float<elem>(sink ? ds[n][i] : 0.0f);
                }
#endif
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

// Keys and values at work, their gradients' sums, and rows that come by. A warp has 16 keys; scores are taken transposed, so
// that they can be the left factor of both gradients. `key_row(x, j)` is where key j begins, or null; `sees(token, key)` says
// whether a token of the sequence sees a key of the block; `prepare(keys)` is called when they are there; `store(key, d, sums of k and v)` takes two columns.
template <class KeyRow, class Prepare, class Sees, class Skips, class Store>
__device__ __forceinline__ void gradients_of_keys(const act* q, const act* k, const act* v, const act* dout, const float* lse,
                                                  const float* inner, const BlockInfo& b, int head, const AttentionSizes& s,
                                                  int from, int last, KeyRow key_row, Prepare prepare, Sees sees,
                                                  Skips skips, Store store) {
    __shared__ float all_lse[2][QUERIES], all_inner[2][QUERIES];
    constexpr int PER_LOAD = QUERIES >= GROUP ? QUERIES / GROUP : 1;
    Carver carve;
    elem* kt = carve.tile(KEYS, WIDTH);
    elem* vt = carve.tile(KEYS, WIDTH);
    elem* queries = carve.tile(2 * QUERIES, WIDTH);  // those at work, and the next ones on their way
    elem* gradients = carve.tile(2 * QUERIES, WIDTH);
    fetch_tile<KEYS, WIDTH, DIM, THREADS>(kt, [&](int j) { return key_row(k, j); });
    fetch_tile<KEYS, WIDTH, DIM, THREADS>(vt, [&](int j) { return key_row(v, j); });
    int group = LANE >> 2, quad = LANE & 3, keys[2] = {WARP * 16 + group, WARP * 16 + group + 8};
    float acc_k[WIDTH / 8][4], acc_v[WIDTH / 8][4];
    set_zero(acc_k);
    set_zero(acc_v);
    auto fetch_rows = [&](int first, int half) {
        int tokens = min(PER_LOAD, last - first);
        fetch_queries<QUERIES>(queries + half * QUERIES * LD, q, b, first, tokens, head, s);
        fetch_queries<QUERIES>(gradients + half * QUERIES * LD, dout, b, first, tokens, head, s);
        if (threadIdx.x < QUERIES) {
            bool inside = threadIdx.x / GROUP < tokens;
            long long at = row_of(b, s, head, first, threadIdx.x);
            fetch_float(&all_lse[half][threadIdx.x], inside ? lse + at : nullptr);
            fetch_float(&all_inner[half][threadIdx.x], inside ? inner + at : nullptr);
        }
    };
    fetch_rows(from, 0);
    for (int first = from, half = 0; first < last; first += PER_LOAD, half ^= 1) {
        int tokens = min(PER_LOAD, last - first);
        wait_for_tiles();
        __syncthreads();
        if (first == from) prepare(kt);
        if (first + PER_LOAD < last) fetch_rows(first + PER_LOAD, half ^ 1);
        if (skips(first, tokens)) continue;
        const elem *qt = queries + half * QUERIES * LD, *dot = gradients + half * QUERIES * LD;
        const float *row_lse = all_lse[half], *row_inner = all_inner[half];
        float p[QUERIES / 8][4], ds[QUERIES / 8][4];
        set_zero(p);
        set_zero(ds);
        product<WIDTH, false, true>(p, kt, LD, WARP * 16, qt, LD, 0);
        product<WIDTH, false, true>(ds, vt, LD, WARP * 16, dot, LD, 0);
#pragma unroll
        for (int n = 0; n < QUERIES / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int r = 8 * n + 2 * quad + (i & 1), t = r / GROUP;
                bool there = t < tokens && sees(first + t, keys[i >> 1]);
                p[n][i] = there ? __expf(p[n][i] * s.scale - row_lse[r]) : 0.0f;
                ds[n][i] = p[n][i] * (ds[n][i] - row_inner[r]) * s.scale;
            }
        }
        product_of_sums(acc_v, p, dot, LD);
        product_of_sums(acc_k, ds, qt, LD);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int n = 0; n < WIDTH / 8; n++) {
            int d = 8 * n + 2 * quad;
            if (d < DIM) store(keys[i], d, acc_k[n][2 * i], acc_k[n][2 * i + 1], acc_v[n][2 * i], acc_v[n][2 * i + 1]);
        }
    }
}

// dk, dv of what the window reaches (of everything without one). Grid (blocks of KEYS keys, K).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS > 1 ? 3 : 1)
    attention_backward_keys(act* dk, act* dv, const act* q, const act* k, const act* v, const act* dout,
                            const float* lse, const float* inner, const BlockInfo* blocks, AttentionSizes s) {
    BlockInfo b = blocks[blockIdx.x];
    int head = blockIdx.y, count = min(KEYS, b.len - b.first);
#if KEPT
    int reach = 2 * s.window, last = min(b.len, ((b.first + count - 1) / s.window + 2) * s.window);
#else
    int reach = s.window, last = s.window == EVERYTHING ? b.len : min(b.len, b.first + count - 1 + s.window);
#endif
    auto at = [&](int key) { return (static_cast<long long>(b.start + b.first + key) * s.kv + head) * DIM; };
    gradients_of_keys(
        q, k, v, dout, lse, inner, b, head, s, b.first, last,
        [&](const act* x, int j) -> const act* { return j < count ? x + at(j) : nullptr; }, [](elem*) {},
        [&](int token, int key) { return key < count && in_window(s, token, b.first + key); },
        [&](int first, int tokens) {
            // No pair of these rows with the warp's keys is seen.
            int nearest = first + tokens - 1 - b.first - WARP * 16, farthest = first - b.first - WARP * 16 - 15;
            return nearest < 0 || farthest >= reach;
        },
        [&](int key, int d, float k0, float k1, float v0, float v1) {
            if (key >= count) return;
            store2(dk + at(key) + d, k0, k1);
            store2(dv + at(key) + d, v0, v1);
        });
}

#if KEPT
// What the queries of each stretch give to the gradients of what the slots hold, moved on as they are: parts [stretches, K, 2, slots, D] (dk, dv).
// Grid (stretches, K, blocks of KEYS slots).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS > 1 ? 3 : 1)
    attention_backward_slots(float* parts, const act* q, const act* k, const act* v, const act* dout, const float* lse,
                             const float* inner, const float* frequencies, const BlockInfo* blocks, const int* lists,
                             AttentionSizes s) {
    BlockInfo b = blocks[blockIdx.x];
    int head = blockIdx.y, offset = blockIdx.z * KEYS, count = filled_slots(b.first, s.window, s.slots) - offset;
    if (count <= 0) return;
    const int* list = list_of(lists, blockIdx.x, head, s) + offset;
    float* part = parts + ((static_cast<long long>(blockIdx.x) * s.kv + head) * 2 * s.slots + offset) * DIM;
    gradients_of_keys(
        q, k, v, dout, lse, inner, b, head, s, b.first, min(b.len, b.first + s.window),
        [&](const act* x, int j) -> const act* {
            return j < count ? x + (static_cast<long long>(b.start + list[j]) * s.kv + head) * DIM : nullptr;
        },
        [&](elem* keys) {
            int nearest = nearest_of(b.first / s.window, s.window, s.reach);
            if (nearest <= 0) return;
            turn_keys(keys, LD, min(count, KEYS), frequencies, [&](int j) { return nearest - list[s.slots + j]; });
            __syncthreads();
        },
        [&](int, int key) { return key < count; }, [](int, int) { return false; },
        [&](int key, int d, float k0, float k1, float v0, float v1) {
            if (key >= count) return;
            float *to_k = part + key * DIM + d, *to_v = to_k + s.slots * DIM;
            to_k[0] = k0, to_k[1] = k1, to_v[0] = v0, to_v[1] = v1;
        });
}
#endif

// Adds the parts of the sinks' gradients, one from each of a text's blocks. SHARES groups of DIM threads look at every
// SHARES-th block. Grid (sequences, K * sinks).
#define SHARES (1024 / DIM)
extern "C" __global__ void __launch_bounds__(1024)
    attention_add_sinks(act* dk, act* dv, const float* parts, const BlockInfo* blocks, int block_count, AttentionSizes s) {
    __shared__ float sums[2][SHARES][DIM];
    int head = blockIdx.y / s.sinks, j = blockIdx.y % s.sinks;
    int d = threadIdx.x % DIM, share = threadIdx.x / DIM;
    BlockInfo own = blocks[blockIdx.x];  // the first blocks of all texts come first
    if (own.position + j >= s.sinks || j >= own.len) return;
    float sum_k = 0.0f, sum_v = 0.0f;
    if (share < SHARES) {
        for (int i = share; i < block_count; i += SHARES) {
            if (blocks[i].start != own.start) continue;
            const float* part = parts + (static_cast<long long>(i) * s.kv + head) * 2 * 16 * DIM;
            sum_k += part[j * DIM + d], sum_v += part[(16 + j) * DIM + d];
        }
        sums[0][share][d] = sum_k, sums[1][share][d] = sum_v;
    }
    __syncthreads();
    if (share != 0) return;
    for (int other = 1; other < SHARES; other++) sum_k += sums[0][other][d], sum_v += sums[1][other][d];
    long long at = (static_cast<long long>(own.start + j) * s.kv + head) * DIM + d;
    dk[at] = from_float<act>(to_float(dk[at]) + sum_k);
    dv[at] = from_float<act>(to_float(dv[at]) + sum_v);
}
