// The gated recurrence in chunks: outputs, the gradient of q, and the states between chunks. recurrence.cuh has the method.

// Blocks of `chunk_states` that share a multiprocessor: it waits for memory, and its sums are few.
#if defined(ACT_BF16) && DK <= 64 && DV <= 64
#define STATES_BLOCKS 3
#else
#define STATES_BLOCKS 1
#endif

// states [chunks, K, DK, DV]: what the chunk's own tokens leave behind; totals [chunks, K, DG]: its log gates summed. With
// q == nullptr forward (k, v), else backward (q, dout). Grid (chunks, K).
extern "C" __global__ void __launch_bounds__(THREADS, STATES_BLOCKS)
    chunk_states(float* states, float* totals, const act* k, const act* v, const act* q, const act* dout,
                 const float* gates, const ChunkInfo* chunks, Sizes s) {
    __shared__ int strong[STEPS];  // all decays are at most 1 here
    ChunkInfo chunk = chunks[blockIdx.x];
    int head = blockIdx.y;
    long long item = static_cast<long long>(blockIdx.x) * s.kv + head;
    bool reverse = q != nullptr;
    Carver carve;
    float* c = carve.floats(CHUNK, PG);
    float* outside = carve.floats(STEPS, PG);  // log gates between a step and the border, its own counted forward
    elem* xt = carve.tile(CHUNK, PK);
    elem* yt = carve.tile(CHUNK, PV);
    load_gates(c, strong, gates, chunk, s, head);
    for (int d = threadIdx.x; d < PG; d += THREADS) {
        float sum = 0.0f;
        for (int n = 0; n < STEPS; n++) {
            int step = reverse ? n : STEPS - 1 - n;
            if (!reverse) sum += of_step(c, step, d);
            outside[step * FG + d] = sum;
            if (reverse) sum += of_step(c, step, d);
        }
        if (d < DG) totals[item * DG + d] = sum;
    }
    __syncthreads();
    auto decay = [&](int t, int d) {
        float own = c[t * FG + d];
        return __expf(outside[t / STEP * FG + d] + (reverse ? own : -own));
    };
    constexpr int TAKEN = tile_width(PK, PV), ACROSS = PV / 8 / TAKEN, TASKS = PK / 16 * ACROSS, EACH = (TASKS + 7) / 8;
    float sums[EACH][TAKEN][4];
#pragma unroll
    for (int n = 0; n < EACH; n++) set_zero(sums[n]);
    for (int g = 0; g < (reverse ? GROUP : 1); g++) {
        if (g > 0) __syncthreads();
        int heads = reverse ? s.heads : s.kv, own = reverse ? head * GROUP + g : head;
        auto x = [&](int t) { return token_row(reverse ? q : k, chunk, t, heads, own, DK); };
        auto y = [&](int t) { return token_row(reverse ? dout : v, chunk, t, heads, own, DV); };
        if constexpr (AXIS == 0) {
            fetch_tile<CHUNK, PV, DV, THREADS>(yt, y);
            load_scaled<CHUNK, PK, DK>(xt, x, decay);
        } else {
            fetch_tile<CHUNK, PK, DK, THREADS>(xt, x);
            load_scaled<CHUNK, PV, DV>(yt, y, decay);
        }
        wait_for_tiles();
        __syncthreads();
#pragma unroll
        for (int n = 0; n < EACH; n++) {
            int task = WARP + 8 * n;
            if (task < TASKS) {
                product<CHUNK, true, false>(sums[n], xt, EK, task / ACROSS * 16, yt, EV, task % ACROSS * TAKEN * 8);
            }
        }
    }
    float* state = states + item * DK * DV;
    int group = LANE >> 2, quad = LANE & 3;
#pragma unroll
    for (int n = 0; n < EACH; n++) {
        int task = WARP + 8 * n, row = task / ACROSS * 16 + group;
#pragma unroll
        for (int w = 0; w < TAKEN; w++) {
            int column = (task % ACROSS * TAKEN + w) * 8 + 2 * quad;
            if (task >= TASKS || column >= DV) continue;
            if (row < DK) *reinterpret_cast<float2*>(state + row * DV + column) = make_float2(sums[n][w][0], sums[n][w][1]);
            if (row + 8 < DK) {
                *reinterpret_cast<float2*>(state + (row + 8) * DV + column) = make_float2(sums[n][w][2], sums[n][w][3]);
            }
        }
    }
}

// Replaces what each chunk adds by the state before it (reverse: after it); the last one goes to `border`, which holds
// the first one: [slots or sequences, K, DK, DV], found by `index`. Grid (elements / 256, K, sequences).
extern "C" __global__ void scan_states(float* states, const float* totals, float* border, int write_border,
                                       const int* index, const ChunkInfo* firsts, int reverse, Sizes s) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    int len = DK * DV;
    if (i >= len) return;
    ChunkInfo info = firsts[blockIdx.z];
    int head = blockIdx.y, gate = AXIS == 0 ? i / DV : i % DV, dim = DG;
    float* at_border = border == nullptr ? nullptr
                                         : border + (static_cast<long long>(index[blockIdx.z]) * s.kv + head) * len + i;
    float state = at_border == nullptr ? 0.0f : *at_border;
    // Eight chunks are read ahead: a chunk's own wait would be most of its time.
    for (int n = 0; n < info.count; n += 8) {
        float added[8], decay[8];
#pragma unroll
        for (int a = 0; a < 8; a++) {
            if (n + a >= info.count) break;
            long long item = static_cast<long long>(info.first + (reverse ? info.count - 1 - n - a : n + a)) * s.kv + head;
            added[a] = states[item * len + i];
            decay[a] = expf(totals[item * dim + gate]);
        }
#pragma unroll
        for (int a = 0; a < 8; a++) {
            if (n + a >= info.count) break;
            long long item = static_cast<long long>(info.first + (reverse ? info.count - 1 - n - a : n + a)) * s.kv + head;
            states[item * len + i] = state;
            state = state * decay[a] + added[a];
        }
    }
    if (at_border != nullptr && write_border) *at_border = state;
}

// Heads whose rows are in shared memory at once; four warps take the steps of each.
#define HEADS (SLICE > 1 ? 2 : 1)

// Rows of out from x = q, or of dq from x = dout. Each row x meets the rows y before it in the chunk, and their products
// weigh the rows z. A warp has one step of one head at a time. Grid (chunks, K).
template <bool GRADIENT>
__device__ __forceinline__ void rows_of_chunk(act* out, const act* x, const act* k, const act* v, const float* gates,
                                              const float* states, const ChunkInfo* chunks, const Sizes& s) {
    constexpr bool EARLY = (AXIS == 0) != GRADIENT;
    constexpr int DX = GRADIENT ? DV : DK, PX = GRADIENT ? PV : PK, EX = PX + PAD;
    constexpr int DZ = GRADIENT ? DK : DV, PZ = GRADIENT ? PK : PV, EZ = PZ + PAD;
    __shared__ int strong[STEPS];
    ChunkInfo chunk = chunks[blockIdx.x];
    int head = blockIdx.y, slot = WARP / STEPS, step = step_of_warp(), group = LANE >> 2, quad = LANE & 3;
    // The gated one of y (early) or z (late) is that of k and v which the gate's axis names.
    const act *y = GRADIENT ? v : k, *z = GRADIENT ? k : v;
    Carver carve;
    float* c = carve.floats(CHUNK, PG);
    float* before = carve.floats(STEPS, PG);  // decay from the chunk's beginning to each step's
    elem* xt = carve.tile(HEADS * CHUNK, PX);
    elem* plain = carve.tile(CHUNK, EARLY ? PZ : PX);
    elem* seen = carve.tile(SEEN, PG);
    elem* narrow = carve.tile(STATE_ROWS, PV);
    const elem* state = load_state(narrow, states + (static_cast<long long>(blockIdx.x) * s.kv + head) * DK * DV);
    if constexpr (EARLY) {
        fetch_tile<CHUNK, PZ, DZ, THREADS>(plain, [&](int t) { return token_row(z, chunk, t, s.kv, head, DZ); });
    } else {
        fetch_tile<CHUNK, PX, DX, THREADS>(plain, [&](int t) { return token_row(y, chunk, t, s.kv, head, DX); });
    }
    load_gates(c, strong, gates, chunk, s, head);
    load_seen(seen, EARLY ? y : z, c, strong, chunk, s, head);
    for (int d = threadIdx.x; d < PG; d += THREADS) {
        float sum = 0.0f;
        for (int i = 0; i < STEPS; i++) {
            before[i * FG + d] = __expf(sum);
            sum += of_step(c, i, d);
        }
    }
    for (int first_g = 0; first_g < GROUP; first_g += HEADS) {
        __syncthreads();
        auto row = [&](int r) {
            int g = first_g + r / CHUNK;
            return g < GROUP ? token_row(x, chunk, r % CHUNK, s.heads, head * GROUP + g, DX) : nullptr;
        };
        if constexpr (EARLY) {
            load_scaled<HEADS * CHUNK, PX, DX>(xt, row, [&](int r, int d) { return __expf(c[r % CHUNK * FG + d]); });
        } else {
            fetch_tile<HEADS * CHUNK, PX, DX, THREADS>(xt, row);
        }
        wait_for_tiles();
        __syncthreads();
        int g = first_g + slot, head_of_x = head * GROUP + g;
        if (slot >= HEADS || g >= GROUP || step * STEP >= chunk.len) continue;
        const elem* rows = xt + slot * CHUNK * EX;
        bool one_by_one = strong[step];
        float acc[PZ / 8][4];
        set_zero(acc);
        // What the rows read from the state before the chunk.
#pragma unroll
        for (int at = 0; at < PX; at += K_STEP) {
            FragmentA left;
            load_a<false>(left, rows, EX, step * STEP, at);
            if (EARLY) scale_columns(left, before + step * FG + at);
#pragma unroll
            for (int n = 0; n < PZ / 8; n++) {
                FragmentB right;
                load_b<GRADIENT>(right, state, STATE_LD, at, 8 * n);
                mma(acc[n], left, right);
            }
        }
        if (!EARLY) {
#pragma unroll
            for (int n = 0; n < PZ / 8; n++) {
                float2 decay = *reinterpret_cast<const float2*>(before + step * FG + 8 * n + 2 * quad);
                acc[n][0] *= decay.x, acc[n][1] *= decay.y, acc[n][2] *= decay.x, acc[n][3] *= decay.y;
            }
        }
        // Late sums stand at the step's beginning until all of it that can has been added.
        auto decay_to_rows = [&] {
#pragma unroll
            for (int n = 0; n < PZ / 8; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    acc[n][i] *= __expf(c[(step * STEP + group + i / 2 * 8) * FG + 8 * n + 2 * quad + i % 2]);
                }
            }
        };
        for (int j = 0; j <= step; j++) {
            const elem* tokens = EARLY ? seen + (FIRST_SEEN(step) + j * STEP) * EG : plain + j * STEP * EX;
            float scores[STEP / 8][4];
            set_zero(scores);
            product<PX, false, true>(scores, rows, EX, step * STEP, tokens, EX, 0);
            if (j == step) {
#pragma unroll
                for (int n = 0; n < STEP / 8; n++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        int t = step * STEP + group + i / 2 * 8, other = step * STEP + 8 * n + 2 * quad + i % 2;
                        if (other > t) scores[n][i] = 0.0f;
                        if (EARLY && one_by_one && other <= t) {
                            const act* own = token_row(x, chunk, t, s.heads, head_of_x, DX);
                            const act* token = token_row(y, chunk, other, s.kv, head, DX);
                            scores[n][i] = decayed_product<DX>(own, token, c + t * FG, c + other * FG);
                        }
                    }
                }
                if (!EARLY && one_by_one) {
                    decay_to_rows();
                    // Copies, so that the others stay in registers.
                    float sums[PZ / 8][4], weights[STEP / 8][4];
                    copy_sums(sums, acc);
                    copy_sums(weights, scores);
                    auto token = [=](int t) { return token_row(z, chunk, step * STEP + t, s.kv, head, DZ); };
                    add_one_by_one<false, DZ>(sums, weights, c + step * STEP * FG, token, [](int t) { return t; });
                    copy_sums(acc, sums);
                    break;
                }
            }
            product_of_sums(acc, scores, EARLY ? plain + j * STEP * EZ : seen + (FIRST_SEEN(step) + j * STEP) * EG, EZ);
        }
        if (!EARLY && !one_by_one) decay_to_rows();
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int t = step * STEP + group + 8 * i;
            if (t >= chunk.len) continue;
            act* to = out + (static_cast<long long>(chunk.start + t) * s.heads + head_of_x) * DZ;
#pragma unroll
            for (int n = 0; n < PZ / 8; n++) {
                int d = 8 * n + 2 * quad;
                if (d < DZ) store2(to + d, acc[n][2 * i], acc[n][2 * i + 1]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    chunk_rows(act* out, const act* q, const act* k, const act* v, const float* gates, const float* states,
               const ChunkInfo* chunks, Sizes s) {
    rows_of_chunk<false>(out, q, k, v, gates, states, chunks, s);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    chunk_rows_gradient(act* dq, const act* dout, const act* k, const act* v, const float* gates, const float* states,
                        const ChunkInfo* chunks, Sizes s) {
    rows_of_chunk<true>(dq, dout, k, v, gates, states, chunks, s);
}
