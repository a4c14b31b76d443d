// The gated recurrence's gradients of k, v and the gates. recurrence.cuh has the method.

#define ROWS (STEP * SLICE)
// Rows that a warp meets at once: as many as registers have room for.
#define AT_ONCE (SLICE % 2 == 0 ? 32 : 16)

// Gradients of k, v, and each chunk's own part of the gates' gradient: local[t] = sum over the chunk's tokens from t on of
// sum_g(x dx) - y dy, where x, dx are q, dq (AXIS 0) or out, do (AXIS 1), and y, dy are k, dk or v, dv; the whole chunk's
// goes to chunk_sums [chunks, K, DG]. `dstates`: gradient of the state after each chunk.
//
// Of k and v, y is the gated one, with the rows x (q or dout), and `plain` the other, with the rows `others`. Four warps
// gather the gradient of y, late sums weighed by plain . others; four that of plain, sums of others weighed by y . x. A
// warp has one step's tokens and meets the rows of that step and all later ones, those of the last step first. Grid
// (chunks, K).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    chunk_columns(act* dk, act* dv, float* local, float* chunk_sums, const act* q, const act* k, const act* v,
                  const act* dout, const act* dq_or_out, const float* gates, const float* dstates,
                  const ChunkInfo* chunks, Sizes s) {
    constexpr int DP = AXIS == 0 ? DV : DK, PP = AXIS == 0 ? PV : PK, EP = PP + PAD;
    constexpr int WIDEST = PG > PP ? PG : PP;
    __shared__ int strong[STEPS];
    const act *x = AXIS == 0 ? q : dout, *y = AXIS == 0 ? k : v;
    const act *others = AXIS == 0 ? dout : q, *plain = AXIS == 0 ? v : k;
    ChunkInfo chunk = chunks[blockIdx.x];
    int head = blockIdx.y, own = step_of_warp(), group = LANE >> 2, quad = LANE & 3;
    bool late = WARP < STEPS;
    long long item = static_cast<long long>(blockIdx.x) * s.kv + head;
    Carver carve;
    float* c = carve.floats(CHUNK, PG);
    float* edge = carve.floats(STEPS, PG);  // log gates from a step's first token to the chunk's end
    elem* xt = carve.tile(ROWS, PG);
    elem* ot = carve.tile(ROWS, PP);
    elem* pt = carve.tile(CHUNK, PP);
    elem* seen = carve.tile(SEEN, PG);
    elem* narrow = carve.tile(STATE_ROWS, PV);
    const elem* dstate = load_state(narrow, dstates + item * DK * DV);
    fetch_tile<CHUNK, PP, DP, THREADS>(pt, [&](int t) { return token_row(plain, chunk, t, s.kv, head, DP); });
    load_gates(c, strong, gates, chunk, s, head);
    for (int d = threadIdx.x; d < PG; d += THREADS) {
        float sum = 0.0f;
        for (int i = STEPS - 1; i >= 0; i--) {
            sum += of_step(c, i, d);
            edge[i * FG + d] = sum;
        }
    }
    __syncthreads();
    // What flows through the state after the chunk. `seen` holds y as the chunk's end sees it, for now.
    load_scaled<CHUNK, PG, DG>(
        seen, [&](int t) { return token_row(y, chunk, t, s.kv, head, DG); },
        [&](int t, int d) { return __expf(edge[t / STEP * FG + d] - c[t * FG + d]); });
    wait_for_tiles();
    __syncthreads();
    float acc[WIDEST / 8][4];
    set_zero(acc);
    auto& late_sums = reinterpret_cast<float(&)[PG / 8][4]>(acc);
    auto& early_sums = reinterpret_cast<float(&)[PP / 8][4]>(acc);
    if (late) {
        product<PP, false, AXIS == 0>(late_sums, pt, EP, own * STEP, dstate, STATE_LD, 0);
    } else {
        product<PG, false, AXIS == 1>(early_sums, seen, EG, own * STEP, dstate, STATE_LD, 0);
    }
    __syncthreads();
    load_seen(seen, y, c, strong, chunk, s, head);
    bool one_by_one = strong[own];
#pragma unroll 1
    for (int i = STEPS - 1; i >= 0; i--) {
        if (i * STEP >= chunk.len) continue;
#pragma unroll 1
        for (int first_g = 0; first_g < GROUP; first_g += SLICE) {
            // Row r is token r / SLICE of the step, head r % SLICE of the slice.
            auto row_of = [=](const act* rows, int length, int r) {
                int g = first_g + r % SLICE;
                return g < GROUP ? token_row(rows, chunk, i * STEP + r / SLICE, s.heads, head * GROUP + g, length) : nullptr;
            };
            __syncthreads();
            fetch_tile<ROWS, PP, DP, THREADS>(ot, [&](int r) { return row_of(others, DP, r); });
            load_scaled<ROWS, PG, DG>(
                xt, [&](int r) { return row_of(x, DG, r); },
                [&](int r, int d) { return __expf(c[(i * STEP + r / SLICE) * FG + d]); });
            wait_for_tiles();
            __syncthreads();
            if (own > i) continue;
            bool strong_step = one_by_one && own == i;
            if (late && first_g == 0) {
                // From the beginning of step i + 1 to that of step i, or to the tokens themselves.
#pragma unroll
                for (int n = 0; n < PG / 8; n++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        int d = 8 * n + 2 * quad + e % 2;
                        float own_gates = strong_step ? c[(own * STEP + group + e / 2 * 8) * FG + d] : 0.0f;
                        late_sums[n][e] *= __expf(of_step(c, i, d) - own_gates);
                    }
                }
            }
#pragma unroll 1
            for (int first = 0; first < ROWS; first += AT_ONCE) {
                float weights[AT_ONCE / 8][4];
                set_zero(weights);
                if (late) {
                    product<PP, false, true>(weights, pt, EP, own * STEP, ot + first * EP, EP, 0);
                } else {
                    product<PG, false, true>(weights, seen, EG, FIRST_SEEN(i) + own * STEP, xt + first * EG, EG, 0);
                }
                if (own == i) {
#pragma unroll
                    for (int n = 0; n < AT_ONCE / 8; n++) {
#pragma unroll
                        for (int e = 0; e < 4; e++) {
                            int token = group + e / 2 * 8, r = first + 8 * n + 2 * quad + e % 2, t = r / SLICE;
                            if (t < token) weights[n][e] = 0.0f;
                            if (!late && strong_step && t >= token) {
                                const act* y_row = token_row(y, chunk, own * STEP + token, s.kv, head, DG);
                                const float* c_step = c + own * STEP * FG;
                                weights[n][e] =
                                    decayed_product<DG>(row_of(x, DG, r), y_row, c_step + t * FG, c_step + token * FG);
                            }
                        }
                    }
                }
                if (!late) {
                    product_of_sums(early_sums, weights, ot + first * EP, EP);
                } else if (!strong_step) {
                    product_of_sums(late_sums, weights, xt + first * EG, EG);
                } else {
                    // Copies, so that the others stay in registers.
                    float sums[PG / 8][4], of_rows[AT_ONCE / 8][4];
                    copy_sums(sums, late_sums);
                    copy_sums(of_rows, weights);
                    auto vector = [=](int r) { return row_of(x, DG, first + r); };
                    auto token = [=](int r) { return (first + r) / SLICE; };
                    add_one_by_one<true, DG>(sums, of_rows, c + own * STEP * FG, vector, token);
                    copy_sums(late_sums, sums);
                }
            }
        }
    }
    __syncthreads();
    // `seen` has done its work: its memory takes what the tokens add to the gates' gradient.
    float* terms = reinterpret_cast<float*>(seen);
    act *dy = AXIS == 0 ? dk : dv, *dplain = AXIS == 0 ? dv : dk;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int t = own * STEP + group + 8 * i;
        if (t >= chunk.len) continue;
        long long row = static_cast<long long>(chunk.start + t) * s.kv + head;
        if (late) {
#pragma unroll
            for (int n = 0; n < PG / 8; n++) {
                int d = 8 * n + 2 * quad;
                if (d >= DG) continue;
                float left = late_sums[n][2 * i], right = late_sums[n][2 * i + 1];
                if (!one_by_one) left *= __expf(-c[t * FG + d]), right *= __expf(-c[t * FG + d + 1]);
                store2(dy + row * DG + d, left, right);
                terms[t * FG + d] = -to_float(y[row * DG + d]) * left;
                terms[t * FG + d + 1] = -to_float(y[row * DG + d + 1]) * right;
            }
        } else {
#pragma unroll
            for (int n = 0; n < PP / 8; n++) {
                int d = 8 * n + 2 * quad;
                if (d < DP) store2(dplain + row * DP + d, early_sums[n][2 * i], early_sums[n][2 * i + 1]);
            }
        }
    }
    __syncthreads();
    // dq_or_out belongs to x: q has dq, dout has out.
    for (int n = threadIdx.x; n < CHUNK * PG / VECTOR; n += THREADS) {
        int t = n / (PG / VECTOR), d = n % (PG / VECTOR) * VECTOR;
        float sum[VECTOR], left[VECTOR], right[VECTOR];
#pragma unroll
        for (int e = 0; e < VECTOR; e++) sum[e] = t < chunk.len && d + e < DG ? terms[t * FG + d + e] : 0.0f;
#pragma unroll 2
        for (int g = 0; g < GROUP; g++) {
            load_vector<DG>(left, token_row(x, chunk, t, s.heads, head * GROUP + g, DG), d);
            load_vector<DG>(right, token_row(dq_or_out, chunk, t, s.heads, head * GROUP + g, DG), d);
#pragma unroll
            for (int e = 0; e < VECTOR; e++) sum[e] += left[e] * right[e];
        }
#pragma unroll
        for (int e = 0; e < VECTOR; e++) terms[t * FG + d + e] = sum[e];
    }
    __syncthreads();
    // Sums from each token to its step's end, then with the later steps.
    for (int n = threadIdx.x; n < STEPS * PG; n += THREADS) {
        int first = n / PG * STEP, d = n % PG;
        float sum = 0.0f;
#pragma unroll
        for (int t = STEP - 1; t >= 0; t--) {
            sum += terms[(first + t) * FG + d];
            terms[(first + t) * FG + d] = sum;
        }
    }
    __syncthreads();
    for (int n = threadIdx.x; n < STEPS * PG; n += THREADS) {
        int step = n / PG, d = n % PG;
        if (d >= DG) continue;
        float later = 0.0f;
        for (int i = step + 1; i < STEPS; i++) later += terms[i * STEP * FG + d];
        for (int t = step * STEP; t < min(chunk.len, (step + 1) * STEP); t++) {
            local[(static_cast<long long>(chunk.start + t) * s.kv + head) * DG + d] = terms[t * FG + d] + later;
        }
        if (step == 0) chunk_sums[item * DG + d] = terms[d] + later;
    }
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
