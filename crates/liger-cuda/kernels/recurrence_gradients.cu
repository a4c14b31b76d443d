// The gated recurrence's gradients of k, v and the gates. recurrence.cuh has the method.

// A step of the gradients of k and v token by token from its end; dS is moved back through it.
__device__ __noinline__ void columns_one_by_one(float* dkt, float* dvt, const act* q, const act* dout, const elem* kt, const elem* vt,
                                   float* state, const float* b, int start, int count, const Sizes& s, int head) {
    for (int t = count - 1; t >= 0; t--) {
        long long row = static_cast<long long>(start + t) * s.heads + head * GROUP;
        for (int i = threadIdx.x; i < DK * DV; i += THREADS) {
            int a = i / DV, c = i % DV;
            float sum = state[a * FV + c];
            for (int g = 0; g < GROUP; g++) sum += to_float(q[(row + g) * DK + a]) * to_float(dout[(row + g) * DV + c]);
            state[a * FV + c] = sum;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < DK + DV; i += THREADS) {
            float sum = 0.0f;
            if (i < DK) {
                for (int c = 0; c < DV; c++) sum += to_float(vt[t * EV + c]) * state[i * FV + c];
                dkt[t * FK + i] = sum;
            } else {
                for (int a = 0; a < DK; a++) sum += to_float(kt[t * EK + a]) * state[a * FV + i - DK];
                dvt[t * FV + i - DK] = sum;
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < PK * PV; i += THREADS) {
            int a = i / PV, c = i % PV, d = AXIS == 0 ? a : c;
            state[a * FV + c] *= __expf(b[t * FG + d] - (t > 0 ? b[(t - 1) * FG + d] : 0.0f));
        }
        __syncthreads();
    }
}

// Gradients of k, v, and each chunk's own part of the gates' gradient: local[t] = sum over the chunk's tokens from t on of
// sum_g(x dx) - y dy, where x, dx are q, dq (AXIS 0) or out, do (AXIS 1), and y, dy are k, dk or v, dv; the whole chunk's
// goes to chunk_sums [chunks, K, DG]. `dstates`: gradient of the state after each chunk. Grid (chunks, K).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    chunk_columns(act* dk_out, act* dv_out, float* local, float* chunk_sums, const act* q, const act* k, const act* v,
                  const act* dout, const act* dq_or_out, const float* gates, const float* dstates,
                  const ChunkInfo* chunks, Sizes s) {
    ChunkInfo chunk = chunks[blockIdx.x];
    int head = blockIdx.y;
    long long item = static_cast<long long>(blockIdx.x) * s.kv + head;
    Carver carve;
    float* state = carve.floats(PK, PV);
    float* from_start = carve.floats(STEP, PG);
    float* to_end = carve.floats(STEP, PG);
    float* b = carve.floats(STEP, PG);
    float* dkt = carve.floats(STEP, PK);
    float* dvt = carve.floats(STEP, PV);
    elem* kt = carve.tile(STEP, PK);
    elem* vt = carve.tile(STEP, PV);
    elem* at_end = carve.tile(STEP, PG);
    elem* undecayed = carve.tile(STEP, PG);
    elem* qt = carve.tile(ROWS, PK);
    elem* dot = carve.tile(ROWS, PV);
    elem* scores = carve.tile(ROWS, STEP);
    elem* dscores = carve.tile(ROWS, STEP);
    elem* narrow = carve.tile(PK, PV);
    load_state(state, dstates + item * DK * DV);
    float carried = 0.0f;  // of dimension threadIdx.x
    for (int step = (chunk.len - 1) / STEP; step >= 0; step--) {
        int start = chunk.start + step * STEP, count = min(STEP, chunk.len - step * STEP);
        __syncthreads();
        bool safe = load_gates(from_start, to_end, b, gates, start, count, s, head);
        load_tokens<PK, DK>(kt, k, start, count, s.kv, head);
        load_tokens<PV, DV>(vt, v, start, count, s.kv, head);
        if (!__syncthreads_and(safe)) {
            columns_one_by_one(dkt, dvt, q, dout, kt, vt, state, b, start, count, s, head);
        } else {
            const elem* s_tile = narrow_state(narrow, state);
            undecay_tile(undecayed, AXIS == 0 ? kt : vt, b);
            for (int i = threadIdx.x; i < STEP * PG; i += THREADS) {
                int at = i / PG * EG + i % PG;
                at_end[at] = from_float<elem>(to_float((AXIS == 0 ? kt : vt)[at]) * to_end[i / PG * FG + i % PG]);
            }
            __syncthreads();
            // What flows through the state after the step: dv = (k to_end) dS and dk = to_end (v dS^T), or with the gate on
            // the value axis dk = (v to_end) dS^T and dv = to_end (k dS).
            for_tiles<STEP, PV>(
                [&](auto& c, int row, int column) {
                    product<PK, false, false>(c, AXIS == 0 ? at_end : kt, EK, row, s_tile, EV, column);
                },
                [&](int i, int j, float left, float right) {
                    const float* decay = to_end + i * FG + j;
                    dvt[i * FV + j] = AXIS == 0 ? left : left * decay[0];
                    dvt[i * FV + j + 1] = AXIS == 0 ? right : right * decay[1];
                });
            for_tiles<STEP, PK>(
                [&](auto& c, int row, int column) {
                    product<PV, false, true>(c, AXIS == 0 ? vt : at_end, EV, row, s_tile, EV, column);
                },
                [&](int i, int j, float left, float right) {
                    const float* decay = to_end + i * FG + j;
                    dkt[i * FK + j] = AXIS == 1 ? left : left * decay[0];
                    dkt[i * FK + j + 1] = AXIS == 1 ? right : right * decay[1];
                });
            for (int first_g = 0; first_g < GROUP; first_g += SLICE) {
                __syncthreads();
                load_rows<PK, DK>(qt, q, start, count, s, head, first_g);
                load_rows<PV, DV>(dot, dout, start, count, s, head, first_g);
                __syncthreads();
                decay_tile<ROWS, SLICE>(AXIS == 0 ? qt : dot, from_start);
                __syncthreads();
                auto store_scores = [&](elem* to) {
                    return [=](int i, int j, float left, float right) {
                        to[i * ES + j] = from_float<elem>(j <= i / SLICE ? left : 0.0f);
                        to[i * ES + j + 1] = from_float<elem>(j + 1 <= i / SLICE ? right : 0.0f);
                    };
                };
                for_tiles<ROWS, STEP>(
                    [&](auto& c, int row, int column) {
                        product<PK, false, true>(c, qt, EK, row, AXIS == 0 ? undecayed : kt, EK, column);
                    },
                    store_scores(scores));
                for_tiles<ROWS, STEP>(
                    [&](auto& c, int row, int column) {
                        product<PV, false, true>(c, dot, EV, row, AXIS == 0 ? vt : undecayed, EV, column);
                    },
                    store_scores(dscores));
                __syncthreads();
                for_tiles<STEP, PV>(
                    [&](auto& c, int row, int column) {
                        product<ROWS, true, false>(c, scores, ES, row, dot, EV, column);
                    },
                    [&](int i, int j, float left, float right) {
                        const float* sums = b + i * FG + j;
                        dvt[i * FV + j] += AXIS == 0 ? left : left * __expf(-sums[0]);
                        dvt[i * FV + j + 1] += AXIS == 0 ? right : right * __expf(-sums[1]);
                    });
                for_tiles<STEP, PK>(
                    [&](auto& c, int row, int column) {
                        product<ROWS, true, false>(c, dscores, ES, row, qt, EK, column);
                    },
                    [&](int i, int j, float left, float right) {
                        const float* sums = b + i * FG + j;
                        dkt[i * FK + j] += AXIS == 1 ? left : left * __expf(-sums[0]);
                        dkt[i * FK + j + 1] += AXIS == 1 ? right : right * __expf(-sums[1]);
                    });
            }
            // dS before the step. Rows of a group of one slice are still there, and decayed.
            for (int first_g = 0; step > 0 && first_g < GROUP; first_g += SLICE) {
                if (GROUP > SLICE) {
                    __syncthreads();
                    load_rows<PK, DK>(qt, q, start, count, s, head, first_g);
                    load_rows<PV, DV>(dot, dout, start, count, s, head, first_g);
                    __syncthreads();
                    decay_tile<ROWS, SLICE>(AXIS == 0 ? qt : dot, from_start);
                    __syncthreads();
                }
                update_state<ROWS>(state, qt, dot, from_start, first_g == 0);
            }
            __syncthreads();
        }
        for (int i = threadIdx.x; i < STEP * DK; i += THREADS) {
            int t = i / DK, d = i % DK;
            if (t < count) {
                dk_out[(static_cast<long long>(start + t) * s.kv + head) * DK + d] = from_float<act>(dkt[t * FK + d]);
            }
        }
        for (int i = threadIdx.x; i < STEP * DV; i += THREADS) {
            int t = i / DV, d = i % DV;
            if (t < count) {
                dv_out[(static_cast<long long>(start + t) * s.kv + head) * DV + d] = from_float<act>(dvt[t * FV + d]);
            }
        }
        // The gates: from_start's memory takes the terms of the tokens.
        const act* rows = AXIS == 0 ? q : dout;
        const elem* y = AXIS == 0 ? kt : vt;
        const float* dy = AXIS == 0 ? dkt : dvt;
        for (int i = threadIdx.x; i < STEP * DG; i += THREADS) {
            int t = i / DG, d = i % DG;
            if (t >= count) continue;
            long long row = static_cast<long long>(start + t) * s.heads + head * GROUP;
            float sum = -to_float(y[t * EG + d]) * dy[t * FG + d];
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                sum += to_float(rows[(row + g) * DG + d]) * to_float(dq_or_out[(row + g) * DG + d]);
            }
            from_start[t * FG + d] = sum;
        }
        __syncthreads();
        if (threadIdx.x < DG) {
            for (int t = count - 1; t >= 0; t--) {
                carried += from_start[t * FG + threadIdx.x];
                local[(static_cast<long long>(start + t) * s.kv + head) * DG + threadIdx.x] = carried;
            }
        }
    }
    if (threadIdx.x < DG) chunk_sums[item * DG + threadIdx.x] = carried;
}

// final_terms [sequences, K, DG]: sum of S dS over the other axis, for a text whose final state has a gradient; `states`
// are those after the last chunk [sequences, K, DK, DV]. Grid (K, sequences).
extern "C" __global__ void final_gate_terms(float* final_terms, const float* states, const float* dstates, Sizes s) {
    long long item = static_cast<long long>(blockIdx.y) * s.kv + blockIdx.x;
    constexpr int dim = DG, other = AXIS == 0 ? DV : DK;
    const float* state = states + item * DK * DV;
    const float* dstate = dstates + item * DK * DV;
    for (int d = threadIdx.x; d < dim; d += blockDim.x) {
        float sum = 0.0f;
        for (int e = 0; e < other; e++) {
            int at = AXIS == 0 ? d * DV + e : e * DV + d;
            sum += state[at] * dstate[at];
        }
        final_terms[item * dim + d] = sum;
    }
}

// dgates: adds what later chunks of the text hold; 0 where the gate is clamped. Grid (chunks, K).
extern "C" __global__ void __launch_bounds__(THREADS)
    finish_gates(float* dgates, const float* gates, const float* chunk_sums,
                                        const float* final_terms, const ChunkInfo* chunks, Sizes s) {
    constexpr int dim = DG, SHARES = THREADS / dim;
    __shared__ double sums[SHARES][dim];
    ChunkInfo chunk = chunks[blockIdx.x];
    int d = threadIdx.x % dim, share = threadIdx.x / dim;
    double later = 0.0;
    for (int n = blockIdx.x + 1 + share; n < chunk.first + chunk.count && share < SHARES; n += SHARES) {
        later += chunk_sums[(static_cast<long long>(n) * s.kv + blockIdx.y) * dim + d];
    }
    if (share < SHARES) sums[share][d] = later;
    __syncthreads();
    if (share >= SHARES) return;
    later = 0.0;
    for (int i = 0; i < SHARES; i++) later += sums[i][d];
    if (final_terms != nullptr) later += final_terms[(static_cast<long long>(chunk.sequence) * s.kv + blockIdx.y) * dim + d];
    for (int t = chunk.start + share; t < chunk.start + chunk.len; t += SHARES) {
        long long at = (static_cast<long long>(t) * s.kv + blockIdx.y) * dim + d;
        // A clamped gate forgets everything: its true gradient is far below float32's noise.
        dgates[at] = gates[at] <= LOWEST_GATE ? 0.0f : static_cast<float>(dgates[at] + later);
    }
}
