// The gated recurrence in chunks: outputs, the gradient of q, and the states between chunks. recurrence.cuh has the method.

// states [chunks, K, DK, DV]: what the chunk's own tokens leave behind; totals [chunks, K, DG]: its log gates summed. With
// q == nullptr forward (k, v), else backward (q, dout). Grid (chunks, K).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    chunk_states(float* states, float* totals, const act* k, const act* v, const act* q, const act* dout,
                 const float* gates, const ChunkInfo* chunks, Sizes s) {
    ChunkInfo chunk = chunks[blockIdx.x];
    int head = blockIdx.y;
    long long item = static_cast<long long>(blockIdx.x) * s.kv + head;
    Carver carve;
    float* state = carve.floats(PK, PV);
    float* from_start = carve.floats(STEP, PG);
    float* to_end = carve.floats(STEP, PG);
    float* b = carve.floats(STEP, PG);
    elem* x = carve.tile(ROWS, PK);
    elem* y = carve.tile(ROWS, PV);
    load_state(state, nullptr);
    float total = 0.0f;
    int steps = (chunk.len + STEP - 1) / STEP;
    for (int i = 0; i < steps; i++) {
        int step = q == nullptr ? i : steps - 1 - i;
        int start = chunk.start + step * STEP, count = min(STEP, chunk.len - step * STEP);
        __syncthreads();
        load_gates(from_start, to_end, b, gates, start, count, s, head);
        if (q == nullptr) {
            load_tokens<PK, DK>(x, k, start, count, s.kv, head);
            load_tokens<PV, DV>(y, v, start, count, s.kv, head);
            __syncthreads();
            decay_tile<STEP, 1>(AXIS == 0 ? x : y, to_end);
            __syncthreads();
            update_state<STEP>(state, x, y, from_start, true);
        } else {
            for (int first_g = 0; first_g < GROUP; first_g += SLICE) {
                __syncthreads();
                load_rows<PK, DK>(x, q, start, count, s, head, first_g);
                load_rows<PV, DV>(y, dout, start, count, s, head, first_g);
                __syncthreads();
                decay_tile<ROWS, SLICE>(AXIS == 0 ? x : y, from_start);
                __syncthreads();
                update_state<ROWS>(state, x, y, from_start, first_g == 0);
            }
        }
        if (threadIdx.x < PG) total += b[(STEP - 1) * FG + threadIdx.x];
    }
    __syncthreads();
    store_state(states + item * DK * DV, state);
    if (threadIdx.x < DG) totals[item * DG + threadIdx.x] = total;
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

// A step token by token, for gates too strong for exp(-b): S is moved on through it, and outputs (or dq) are written.
template <bool GRADIENT>
__device__ __noinline__ void rows_one_by_one(act* out, const act* x, const elem* kt, const elem* vt, float* state, const float* b,
                                int start, int count, const Sizes& s, int head) {
    constexpr int DX = GRADIENT ? DV : DK, DZ = GRADIENT ? DK : DV;
    for (int t = 0; t < count; t++) {
        for (int i = threadIdx.x; i < PK * PV; i += THREADS) {
            int a = i / PV, c = i % PV, d = AXIS == 0 ? a : c;
            float gate = b[t * FG + d] - (t > 0 ? b[(t - 1) * FG + d] : 0.0f);
            float* at = state + a * FV + c;
            *at = *at * __expf(gate) + to_float(kt[t * EK + a]) * to_float(vt[t * EV + c]);
        }
        __syncthreads();
        for (int i = threadIdx.x; i < GROUP * DZ; i += THREADS) {
            int g = i / DZ, z = i % DZ;
            long long row = static_cast<long long>(start + t) * s.heads + head * GROUP + g;
            float sum = 0.0f;
            for (int d = 0; d < DX; d++) sum += to_float(x[row * DX + d]) * (GRADIENT ? state[z * FV + d] : state[d * FV + z]);
            out[row * DZ + z] = from_float<act>(sum);
        }
        __syncthreads();
    }
}

// Rows of out from x = q, or of dq from x = dout. Grid (chunks, K).
template <bool GRADIENT>
__device__ __forceinline__ void rows_of_chunk(act* out, const act* x, const act* k, const act* v, const float* gates,
                                              const float* states, const ChunkInfo* chunks, const Sizes& s) {
    constexpr bool EARLY = (AXIS == 0) != GRADIENT;
    constexpr int DX = GRADIENT ? DV : DK, PX = GRADIENT ? PV : PK, EX = PX + PAD;
    constexpr int DZ = GRADIENT ? DK : DV, PZ = GRADIENT ? PK : PV, EZ = PZ + PAD;
    ChunkInfo chunk = chunks[blockIdx.x];
    int head = blockIdx.y;
    Carver carve;
    float* state = carve.floats(PK, PV);
    float* from_start = carve.floats(STEP, PG);
    float* to_end = carve.floats(STEP, PG);
    float* b = carve.floats(STEP, PG);
    elem* kt = carve.tile(STEP, PK);
    elem* vt = carve.tile(STEP, PV);
    elem* undecayed = carve.tile(STEP, PG);
    elem* xt = carve.tile(ROWS, PX);
    elem* scores = carve.tile(ROWS, STEP);
    elem* narrow = carve.tile(PK, PV);
    load_state(state, states + (static_cast<long long>(blockIdx.x) * s.kv + head) * DK * DV);
#pragma unroll 1
    for (int first = 0; first < chunk.len; first += STEP) {
        int start = chunk.start + first, count = min(STEP, chunk.len - first);
        __syncthreads();
        bool safe = load_gates(from_start, to_end, b, gates, start, count, s, head);
        load_tokens<PK, DK>(kt, k, start, count, s.kv, head);
        load_tokens<PV, DV>(vt, v, start, count, s.kv, head);
        if (!__syncthreads_and(safe)) {
            rows_one_by_one<GRADIENT>(out, x, kt, vt, state, b, start, count, s, head);
            continue;
        }
        const elem* s_tile = narrow_state(narrow, state);
        // The gated one of y (early) or z (late) is that of k and v which the gate's axis names.
        undecay_tile(undecayed, AXIS == 0 ? kt : vt, b);
        const elem* y = EARLY ? undecayed : GRADIENT ? vt : kt;
        const elem* z = EARLY ? (GRADIENT ? kt : vt) : undecayed;
        for (int first_g = 0; first_g < GROUP; first_g += SLICE) {
            __syncthreads();
            load_rows<PX, DX>(xt, x, start, count, s, head, first_g);
            if (EARLY) {
                __syncthreads();
                decay_tile<ROWS, SLICE>(xt, from_start);
            }
            __syncthreads();
            for_tiles<ROWS, STEP>(
                [&](auto& c, int row, int column) { product<PX, false, true>(c, xt, EX, row, y, EX, column); },
                [&](int i, int j, float left, float right) {
                    scores[i * ES + j] = from_float<elem>(j <= i / SLICE ? left : 0.0f);
                    scores[i * ES + j + 1] = from_float<elem>(j + 1 <= i / SLICE ? right : 0.0f);
                });
            __syncthreads();
            for_tiles<ROWS, PZ>(
                [&](auto& c, int row, int column) {
                    product<PX, false, GRADIENT>(c, xt, EX, row, s_tile, EV, column);
                    product<STEP, false, false>(c, scores, ES, row, z, EZ, column);
                },
                [&](int i, int j, float left, float right) {
                    int row = row_of(start, count, s, head, first_g, i);
                    if (row < 0 || j >= DZ) return;
                    if (!EARLY) {
                        const float* decay = from_start + i / SLICE * FG + j;
                        left *= decay[0], right *= decay[1];
                    }
                    store2(out + static_cast<long long>(row) * DZ + j, left, right);
                });
        }
        if (first + STEP < chunk.len) {
            __syncthreads();
            decay_tile<STEP, 1>(AXIS == 0 ? kt : vt, to_end);
            __syncthreads();
            update_state<STEP>(state, kt, vt, from_start, true);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    chunk_rows(act* out, const act* q, const act* k, const act* v, const float* gates, const float* states,
               const ChunkInfo* chunks, Sizes s) {
    rows_of_chunk<false>(out, q, k, v, gates, states, chunks, s);
}

extern "C" __global__ void __launch_bounds__(THREADS, ROWS_GRADIENT_BLOCKS)
    chunk_rows_gradient(act* dq, const act* dout, const act* k, const act* v, const float* gates, const float* states,
                        const ChunkInfo* chunks, Sizes s) {
    rows_of_chunk<true>(dq, dout, k, v, gates, states, chunks, s);
}
