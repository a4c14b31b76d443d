// Liger Attention for one token of each text, from the projections to what goes into o_proj: head norms, RoPE, the cache,
// the window, feature maps and gates, the recurrence, the mix. One block a text and key/value head; the query heads of the
// group share its keys and its state. Where many keys are kept, a cluster of blocks shares the rows of the cache: each looks at
// its part, and what they found is merged through their shared memory.
//
// DIM: head size; GROUP: query heads of a key/value head; SLOTS: gsa's memory slots, 0 for a structure with feature maps;
// KEPT: whether slots keep keys, in the place of a recurrence; SPLITS: blocks of a cluster, 1 where it keeps none.
// Scores and weighted values are products on tensor cores, with the keys as the left factor and up to eight query heads as its
// columns. Every state element is read and written once, by the same thread.

#define THREADS 256
#define LOWEST_GATE (-40.0f)
#define WIDEST (SLOTS > DIM ? SLOTS : DIM)
#define WIDTH ((DIM + 15) / 16 * 16)
// Leading dimension of queries, keys and values in shared memory.
#define ROW (WIDTH + PAD)
// Columns of a product.
#define HEADS 8
// Blocks that a multiprocessor should have room for: with keys to look at, many short ones hide each other's waiting.
#define RESIDENT (!KEPT ? 1 : DIM > 64 ? 4 : 5)

struct StepSizes {
    int heads, kv, texts;
    int window, sinks, cache_rows;
    // KEPT: rows of the cache before a ring of two windows; those whose keys stay for their scores; farthest before the window.
    int kept_slots, by_score, reach;
    int together;  // whether keys and values are in shared memory at once, or the values after the keys
    int query_map, key_map, gate;
    float divisor, longest, alpha, beta, scale, rope_factor, epsilon;
};

struct __align__(16) StepShared {
    float q[GROUP][DIM], k[DIM], v[DIM];  // before RoPE
    float cosine[DIM / 2], sine[DIM / 2];
    float window[GROUP][DIM], best[GROUP], total[GROUP];
    __align__(16) elem rope_q[HEADS][ROW];
#if !KEPT
    float query[GROUP][WIDEST], key[WIDEST], decay[WIDEST], out[GROUP][WIDEST];
    float parts[THREADS * 4][GROUP];
#endif
};

#if SPLITS > 1
#define CLUSTER __cluster_dims__(SPLITS)
__device__ __forceinline__ void wait_for_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same for blocks that have only read what others wrote.
__device__ __forceinline__ void leave_cluster() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// What stands at the place of `own`, in shared memory, in another block of the cluster.
__device__ __forceinline__ float of_block(const float* own, int rank) {
    u32 at;
    float x;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(static_cast<u32>(__cvta_generic_to_shared(own))), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(at) : "memory");
    return x;
}
#else
#define CLUSTER
__device__ __forceinline__ void wait_for_cluster() { __syncthreads(); }
__device__ __forceinline__ void leave_cluster() {}
__device__ __forceinline__ float of_block(const float* own, int) { return *own; }
#endif

// Softmax, times a factor, or 1 - sigmoid of a row by one warp.
template <int LENGTH> __device__ __forceinline__ void map_row(float* to, const float* from, int map, float factor = 1.0f) {
    int lane = threadIdx.x & 31;
    if (map == MAP_ONE_MINUS_SIGMOID) {
        for (int d = lane; d < LENGTH; d += 32) to[d] = sigmoid(-from[d]);
        return;
    }
    float best = NEGATIVE_INFINITY, sum = 0.0f;
    for (int d = lane; d < LENGTH; d += 32) best = fmaxf(best, from[d]);
    best = warp_max(best);
    for (int d = lane; d < LENGTH; d += 32) sum += expf(from[d] - best);
    sum = warp_sum(sum);
    for (int d = lane; d < LENGTH; d += 32) to[d] = expf(from[d] - best) / sum * factor;
}

__device__ __forceinline__ float decay_of(float log_gate) { return expf(fmaxf(log_gate, LOWEST_GATE)); }

// The log gate of a head that has one for all of it, by one warp, from the key before RoPE.
__device__ __forceinline__ float head_gate(const float* k, int head, const StepSizes& s) {
    float mean = 0.0f;
    for (int d = threadIdx.x & 31; d < DIM; d += 32) mean += k[d];
    return gate_of_mean(warp_sum(mean) / DIM, s.gate, head_divisor(s.divisor, s.longest, head, s.kv));
}

// Decays of the head by one warp.
__device__ __forceinline__ void gate_row(float* decay, const float* k, int head, const StepSizes& s) {
    float of_mean = is_gate_of_mean(s.gate) ? head_gate(k, head, s) : 0.0f;
    for (int d = threadIdx.x & 31; d < DIM; d += 32) {
        float g = of_mean;
        if (s.gate == GATE_LOG_SIGMOID) g = -softplus(-k[d]) / s.divisor;
        else if (s.gate == GATE_NEGATIVE_EXP) g = -expf(k[d]);
        decay[d] = decay_of(g);
    }
}

// Four columns of every PARTS-th row of a state [ROWS, COLUMNS].
template <int ROWS, int COLUMNS> struct StatePart {
    static constexpr int ACROSS = COLUMNS / 4, PARTS = THREADS / ACROSS, COUNT = (ROWS + PARTS - 1) / PARTS;
    float4 x[COUNT];

    __device__ __forceinline__ bool is_used() const { return static_cast<int>(threadIdx.x) < ACROSS * PARTS; }
    __device__ __forceinline__ int column() const { return threadIdx.x % ACROSS * 4; }
    __device__ __forceinline__ int row(int i) const { return threadIdx.x / ACROSS + i * PARTS; }

    __device__ __forceinline__ void load(const float* state) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            if (is_used() && row(i) < ROWS) x[i] = load4(state + row(i) * COLUMNS + column());
        }
    }

    // S := decay S + key^T value, out [GROUP, COLUMNS] = query S. LATE: the decay is that of a column.
    template <bool LATE>
    __device__ __forceinline__ void step(float* state, const float (*query)[WIDEST], const float* key, const float* value,
                                         const float* decay, float (*out)[WIDEST], float (*parts)[GROUP]) {
        float4 acc[GROUP];
#pragma unroll
        for (int g = 0; g < GROUP; g++) acc[g] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (is_used()) {
            float4 v = load4(value + column());
            float4 late = LATE ? load4(decay + column()) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                if (row(i) >= ROWS) break;
                float k = key[row(i)], early = LATE ? 0.0f : decay[row(i)];
                float4 y = make_float4((LATE ? late.x : early) * x[i].x + k * v.x, (LATE ? late.y : early) * x[i].y + k * v.y,
                                       (LATE ? late.z : early) * x[i].z + k * v.z, (LATE ? late.w : early) * x[i].w + k * v.w);
                store4(state + row(i) * COLUMNS + column(), y);
#pragma unroll
                for (int g = 0; g < GROUP; g++) {
                    float q = query[g][row(i)];
                    acc[g].x += q * y.x, acc[g].y += q * y.y, acc[g].z += q * y.z, acc[g].w += q * y.w;
                }
            }
            // parts [PARTS, COLUMNS][GROUP]
            int at = threadIdx.x / ACROSS * COLUMNS + column();
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                parts[at][g] = acc[g].x, parts[at + 1][g] = acc[g].y, parts[at + 2][g] = acc[g].z, parts[at + 3][g] = acc[g].w;
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < GROUP * COLUMNS; i += THREADS) {
            int g = i % GROUP, column = i / GROUP;
            float sum = 0.0f;
            for (int p = 0; p < (PARTS < ROWS ? PARTS : ROWS); p++) sum += parts[p * COLUMNS + column][g];
            out[g][column] = sum;
        }
        __syncthreads();
    }
};

// Rows of the cache are as in attention.cuh: the sinks, then a ring over the window; or slots, then a ring of two windows.
__device__ __forceinline__ int cache_row(const StepSizes& s, int position) {
    if (KEPT) return s.kept_slots + position % (2 * s.window);
    return position < s.sinks ? position : s.sinks + (position - s.sinks) % s.window;
}

// Every SPLITS-th row of one head of a cache into shared memory, without waiting for them; zeros up to row `padded` and column
// WIDTH.
__device__ __forceinline__ void fetch_rows(elem* to, const act* from, int rows, int padded) {
    constexpr int PER_ROW = WIDTH / 8;
    for (int i = threadIdx.x; i < padded * PER_ROW; i += THREADS) {
        int r = i / PER_ROW, d = i % PER_ROW * 8;
        bool inside = r < rows && d < DIM;
        u32 at = static_cast<u32>(__cvta_generic_to_shared(to + r * ROW + d));
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     ::"r"(at), "l"(inside ? from + r * SPLITS * DIM + d : from), "r"(inside ? 16 : 0) : "memory");
    }
}

// Keys of one head that stay: when a stretch begins, the slots take in the one before the last, whose rows of the ring are
// about to be written over. `shared` has room for a Choice.
__device__ __forceinline__ void keep(act* keys, act* values, float* cached_scores, float* cached_positions,
                                     const float* query_sum, const float* frequencies, void* shared, int position,
                                     const StepSizes& s) {
    if (position % s.window != 0 || position < 2 * s.window) return;
    int slots = s.kept_slots, window = s.window, all = slots + window;
    Choice choice(shared, all);
    int taken = position / window - 2, filled = min(slots, taken * window), ring = slots + taken % 2 * window;
    for (int i = threadIdx.x; i < GROUP * DIM; i += THREADS) choice.queries[i] = query_sum[i];
    for (int i = threadIdx.x; i < slots; i += THREADS) {
        choice.held[i] = EMPTY;
        choice.scores[i] = i < filled ? cached_scores[i] : NEGATIVE_INFINITY;
        choice.positions[i] = i < filled ? static_cast<int>(cached_positions[i]) : 0;
    }
    for (int j = threadIdx.x; j < window; j += THREADS) {
        int of_token = taken * window + j;
        choice.held[slots + j] = ring + j;
        choice.scores[slots + j] = of_token < s.sinks ? -NEGATIVE_INFINITY : cached_scores[ring + j];
        choice.positions[slots + j] = of_token;
    }
    __syncthreads();
    int nearest = nearest_of(position / window, window, s.reach);
    auto key_of = [&](int e) -> const act* {
        if (e >= slots) return keys + (ring + e - slots) * DIM;
        return e < filled ? keys + e * DIM : nullptr;
    };
    auto turn_of = [&](int e) { return nearest - choice.positions[e]; };
    likings(choice.liked, all, key_of, turn_of, choice.queries, GROUP, s.scale / window, frequencies);
    choice.take_in(slots, window, s.by_score);
    for (int i = threadIdx.x; i < slots * DIM; i += THREADS) {
        int slot = i / DIM, from = choice.held[slot] * DIM + i % DIM;
        if (choice.held[slot] != EMPTY) keys[i] = keys[from], values[i] = values[from];
    }
    for (int i = threadIdx.x; i < slots; i += THREADS) {
        if (choice.held[i] == EMPTY) continue;
        cached_scores[i] = choice.scores[i], cached_positions[i] = static_cast<float>(choice.positions[i]);
    }
    __syncthreads();
}

// The score of a key by one warp, as key_scores of kept.cu has it; its direction is added to the sum of all.
__device__ __forceinline__ float novelty(const float* k, float* sum) {
    float norm = 0.0f, along = 0.0f, length = 0.0f;
    for (int d = threadIdx.x & 31; d < DIM; d += 32) norm += k[d] * k[d];
    norm = warp_sum(norm);
    float scale = norm > 0.0f ? rsqrtf(norm) : 0.0f;
    for (int d = threadIdx.x & 31; d < DIM; d += 32) {
        float now = sum[d] + scale * k[d];
        sum[d] = now, along += now * k[d], length += now * now;
    }
    along = warp_sum(along), length = warp_sum(length) * norm;
    return length > 0.0f ? -along * rsqrtf(length) : 0.0f;
}

// RMS norm of a head by one warp (Qwen3).
__device__ __forceinline__ void norm_head(float* x, const float* weight, float epsilon) {
    float sum = 0.0f;
    for (int d = threadIdx.x & 31; d < DIM; d += 32) sum += x[d] * x[d];
    float scale = rsqrtf(warp_sum(sum) / DIM + epsilon);
    for (int d = threadIdx.x & 31; d < DIM; d += 32) x[d] = to_float(from_float<act>(x[d] * scale * weight[d]));
}

#ifdef ACT_BF16
// tokens: ids, slots and positions, `texts` each. frequencies: see `revolutions`.
// Grid (K * SPLITS, texts).
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) CLUSTER
    liger_step(act* mixed, const act* q, const act* k, const act* v, const float* q_norm, const float* k_norm,
               const float* frequencies, act* cached_k, act* cached_v, float* cached_scores, float* cached_positions,
               float* first_state, float* second_state, float* key_sum, float* query_sum, const int* tokens, StepSizes s) {
    StepShared& m = *reinterpret_cast<StepShared*>(shared_memory);
    int most = (s.cache_rows + SPLITS - 1) / SPLITS, padded = (most + 15) / 16 * 16;
    float* scores = reinterpret_cast<float*>(&m + 1);                    // [GROUP, padded]
    elem* shares = reinterpret_cast<elem*>(scores + GROUP * padded);     // exponentials of them, [HEADS, padded + PAD]
    elem* keys = shares + HEADS * (padded + PAD);                        // [padded, ROW]
    elem* values = s.together ? keys + padded * ROW : keys;
    int head = blockIdx.x / SPLITS, part = blockIdx.x % SPLITS, text = blockIdx.y;
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    int slot = tokens[s.texts + text], position = tokens[2 * s.texts + text];
    long long place = static_cast<long long>(slot) * s.kv + head;
    cached_k += place * s.cache_rows * DIM, cached_v += place * s.cache_rows * DIM;
    bool begins = KEPT && position % s.window == 0;  // a stretch
    if (KEPT) {
        cached_scores += place * s.cache_rows, cached_positions += place * s.kept_slots;
        key_sum += place * DIM, query_sum += place * GROUP * DIM;
        if (part == 0) keep(cached_k, cached_v, cached_scores, cached_positions, query_sum, frequencies, keys, position, s);
        if (SPLITS > 1 && begins) wait_for_cluster();
    }
    // This block has row `part` of the cache and every SPLITS-th after it: slots, whose keys are turned, are shared evenly.
    int valid = KEPT ? s.cache_rows : min(position + 1, s.sinks + s.window), rows = (valid - part + SPLITS - 1) / SPLITS;
    int own_row = cache_row(s, position), own = own_row / SPLITS;
    bool has_own = own_row % SPLITS == part;
    cached_k += part * DIM, cached_v += part * DIM;
    fetch_rows(keys, cached_k, rows, padded);
    asm volatile("cp.async.commit_group;" ::: "memory");
    if (s.together) fetch_rows(values, cached_v, rows, padded);
    asm volatile("cp.async.commit_group;" ::: "memory");
#if SLOTS > 0
    typedef StatePart<DIM, SLOTS> First;
    typedef StatePart<SLOTS, DIM> Second;
    first_state += place * DIM * SLOTS, second_state += place * DIM * SLOTS;
    First first;
    Second second;
    first.load(first_state);
    second.load(second_state);
#elif !KEPT
    typedef StatePart<DIM, DIM> First;
    First first;
    if (first_state != nullptr) {
        first_state += place * DIM * DIM;
        first.load(first_state);
    }
#endif
    for (int i = threadIdx.x; i < DIM / 2; i += THREADS) {
        float sine, cosine;
        revolve(position, revolutions(frequencies, i), &sine, &cosine);
        m.cosine[i] = cosine * s.rope_factor, m.sine[i] = sine * s.rope_factor;
    }
    for (int i = threadIdx.x; i < GROUP * DIM; i += THREADS) {
        m.q[i / DIM][i % DIM] = to_float(q[(static_cast<long long>(text) * s.heads + head * GROUP) * DIM + i]);
    }
    for (int i = threadIdx.x; i < DIM; i += THREADS) {
        long long at = (static_cast<long long>(text) * s.kv + head) * DIM + i;
        m.k[i] = to_float(k[at]), m.v[i] = to_float(v[at]);
    }
    // Keys; values may be still on their way.
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncthreads();
    if (q_norm != nullptr) {
        for (int r = warp; r <= GROUP; r += THREADS / 32) {
            norm_head(r < GROUP ? m.q[r] : m.k, r < GROUP ? q_norm : k_norm, s.epsilon);
        }
        __syncthreads();
    }
    if (DIM < WIDTH) {
        for (int i = threadIdx.x; i < HEADS * WIDTH; i += THREADS) m.rope_q[i / WIDTH][i % WIDTH] = from_float<elem>(0.0f);
        __syncthreads();
    }
    for (int i = threadIdx.x; i < (GROUP + 1) * DIM; i += THREADS) {
        int r = i / DIM, d = i % DIM, half = d < DIM / 2 ? d : d - DIM / 2;
        const float* x = r < GROUP ? m.q[r] : m.k;
        float other = d < DIM / 2 ? -x[half + DIM / 2] : x[half];
        float y = x[d] * m.cosine[half] + other * m.sine[half];
        if (r < GROUP) {
            elem rounded = m.rope_q[r][d] = from_float<elem>(y);
            if (KEPT && part == 0) {
                // An addition that nobody waits for.
                if (begins) query_sum[i] = to_float(rounded);
                else atomicAdd(query_sum + i, to_float(rounded));
            }
        } else if (has_own) {
            keys[own * ROW + d] = cached_k[own * SPLITS * DIM + d] = from_float<act>(y);
            cached_v[own * SPLITS * DIM + d] = from_float<act>(m.v[d]);
        }
    }
    if (KEPT) {
        // Slots alone: the ring's own row is being written.
        int nearest = nearest_of(position / s.window, s.window, s.reach), slots = filled_slots(position, s.window, s.kept_slots);
        auto turn_of = [&](int j) { return nearest - static_cast<int>(cached_positions[j * SPLITS + part]); };
        if (nearest > 0) turn_keys(keys, ROW, (slots - part + SPLITS - 1) / SPLITS, frequencies, turn_of);
    }
#if !KEPT
    // Feature maps beside it.
    if (s.alpha != 0.0f) {
#if SLOTS > 0
        for (int slot_at = threadIdx.x; slot_at < SLOTS; slot_at += THREADS) {
            int from = slot_at * DIM / SLOTS, to = ((slot_at + 1) * DIM + SLOTS - 1) / SLOTS;
            float pooled = 0.0f;
            for (int d = from; d < to; d++) pooled += m.k[d];
            float g = -softplus(-pooled / (to - from)) / GSA_DIVISOR;
            m.decay[slot_at] = decay_of(g), m.key[slot_at] = -expm1f(g);
        }
        for (int i = threadIdx.x; i < GROUP * DIM; i += THREADS) m.query[i / DIM][i % DIM] = m.q[i / DIM][i % DIM];
#else
        for (int r = warp; r < GROUP + 2; r += THREADS / 32) {
            if (r < GROUP) map_row<DIM>(m.query[r], m.q[r], s.query_map);
            else if (r > GROUP) gate_row(m.decay, m.k, head, s);
            else if (s.key_map == MAP_SHARE) map_row<DIM>(m.key, m.k, s.key_map, -expm1f(head_gate(m.k, head, s)) * DIM);
            else map_row<DIM>(m.key, m.k, s.key_map);
        }
#endif
    }
#endif
    __syncthreads();
    // Scores of 16 rows a warp at a time.
    int group = lane >> 2, quad = lane & 3;
    for (int first = warp * 16; first < padded; first += THREADS / 32 * 16) {
        float c[1][4];
        set_zero(c);
        product<WIDTH, false, true>(c, keys, ROW, first, m.rope_q[0], ROW, 0);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int j = first + group + (i >> 1) * 8, g = 2 * quad + (i & 1);
            bool seen = j < rows && (!KEPT || row_in_use(position, j * SPLITS + part, s.window, s.kept_slots));
            if (g < GROUP) scores[g * padded + j] = seen ? c[0][i] * s.scale : NEGATIVE_INFINITY;
        }
    }
    __syncthreads();
    // Values take the place of the keys, which nobody reads any more.
    if (!s.together) fetch_rows(values, cached_v, rows, padded);
    for (int g = warp; g < GROUP; g += THREADS / 32) {
        float best = NEGATIVE_INFINITY, total = 0.0f;
        for (int j = lane; j < padded; j += 32) best = fmaxf(best, scores[g * padded + j]);
        best = warp_max(best);
        for (int j = lane; j < padded; j += 32) {
            float x = scores[g * padded + j], p = x == NEGATIVE_INFINITY ? 0.0f : expf(x - best);
            shares[g * (padded + PAD) + j] = from_float<elem>(p), total += p;
        }
        total = warp_sum(total);
        if (lane == 0) m.best[g] = best, m.total[g] = total;
    }
    if (KEPT && has_own && warp == THREADS / 32 - 1) {
        float score = novelty(m.k, key_sum);
        if (lane == 0) cached_scores[own_row] = score;
    }
    wait_for_tiles();
    __syncthreads();
    if (has_own) {
        for (int d = threadIdx.x; d < DIM; d += THREADS) values[own * ROW + d] = from_float<act>(m.v[d]);
        __syncthreads();
    }
    // Values, 16 columns a warp at a time.
    for (int first = warp * 16; first < WIDTH; first += THREADS / 32 * 16) {
        float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
        for (int k = 0; k < padded; k += K_STEP) {
            FragmentA left;
            FragmentB right;
            load_a<true>(left, values, ROW, first, k);
            load_b<true>(right, shares, padded + PAD, k, 0);
            mma(c, left, right);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int d = first + group + (i >> 1) * 8, g = 2 * quad + (i & 1);
            if (d < DIM && g < GROUP) m.window[g][d] = c[i];
        }
    }
#if !KEPT
    // The recurrence.
    if (s.alpha != 0.0f) {
#if SLOTS > 0
        first.step<true>(first_state, m.query, m.k, m.key, m.decay, m.out, m.parts);
        for (int g = warp; g < GROUP; g += THREADS / 32) map_row<SLOTS>(m.query[g], m.out[g], MAP_SOFTMAX);
        __syncthreads();
        second.step<false>(second_state, m.query, m.key, m.v, m.decay, m.out, m.parts);
#else
        first.step<false>(first_state, m.query, m.key, m.v, m.decay, m.out, m.parts);
#endif
    }
#endif
    wait_for_cluster();
    for (int i = part * THREADS + threadIdx.x; i < GROUP * DIM; i += SPLITS * THREADS) {
        int g = i / DIM, d = i % DIM;
        float top = NEGATIVE_INFINITY, sum = 0.0f, total = 0.0f;
#pragma unroll
        for (int r = 0; r < SPLITS; r++) top = fmaxf(top, of_block(&m.best[g], r));
#pragma unroll
        for (int r = 0; r < SPLITS; r++) {
            // A block may have no row in use: exp(-infinity) is 0.
            float weight = expf(of_block(&m.best[g], r) - top);
            sum += weight * of_block(&m.window[g][d], r), total += weight * of_block(&m.total[g], r);
        }
        float y = s.beta * sum / total;
#if !KEPT
        if (s.alpha != 0.0f) y += s.alpha * m.out[g][d];
#endif
        mixed[(static_cast<long long>(text) * s.heads + head * GROUP) * DIM + i] = from_float<act>(y);
    }
    // Nobody leaves while another block still reads its memory.
    leave_cluster();
}
#endif
