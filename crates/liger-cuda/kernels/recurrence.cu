// The gated recurrence S_t = gate_t S_{t-1} + k_t^T v_t, o_t = q_t S_t, forward and backward.
//
// A text is cut into chunks of CHUNK tokens, worked on in parallel, and a chunk into steps of 16 tokens, one after the
// other in a block:
//   chunk_states   what each chunk adds to the state (forward), or to the state's gradient (backward)
//   scan_states    the state before (backward: the gradient after) every chunk, from those
//   chunk_rows     outputs, or the gradient of q: a row reads the state and the tokens before it in its step
//   chunk_columns  gradients of k, v and the gates: a token gathers from the rows after it
//   finish_gates   the gates' gradient is one sum from the end of the text: adds what later chunks hold
//
// Inside a step, the decay of a pair of tokens is exp(b_i - b_j) with b the sum of log gates from the step's first token:
// at most 0 in the exponent, and b is at most 16 * 40. Decays to and from the border of a step are at most 1 as well.
//
// AXIS 0: the gate decays the key axis of S [Dk, Dv]; AXIS 1: the value axis. Dimensions are padded to multiples of 32
// in shared memory. Heads of a query group are stacked as rows, SLICE of them at a time.

#define CHUNK 64
#define STEP 16
#define SLICE 4
#define LOWEST_GATE (-40.0f)

struct ChunkInfo {
    int start;     // first row of the batch
    int len;       // tokens
    int sequence;  // which sequence
    int first;     // index of the sequence's first chunk
    int count;     // chunks of the sequence
};

struct Sizes {
    int heads, kv, group;  // query heads, key/value heads, heads / kv
    int dk, dv;            // true dimensions
    int pk, pv;            // padded ones
    int axis;
};

__device__ __forceinline__ int gate_dim(const Sizes& s) { return s.axis == 0 ? s.dk : s.dv; }
__device__ __forceinline__ int padded_gate_dim(const Sizes& s) { return s.axis == 0 ? s.pk : s.pv; }

// Rows start..start + rows of x [N, heads, dim] at one head into a tile [STEP, padded], zero past the end.
__device__ void load_tokens(float* tile, const act* x, int start, int rows, int heads, int head, int dim, int padded) {
    int ld = leading(padded);
    for (int i = threadIdx.x; i < STEP * padded; i += BLOCK_THREADS) {
        int t = i / padded, d = i % padded;
        bool inside = t < rows && d < dim;
        tile[t * ld + d] = inside ? to_float(x[(static_cast<long long>(start + t) * heads + head) * dim + d]) : 0.0f;
    }
}

// Query rows (t, g) with g of the slice: tile row t * SLICE + g - first_g.
__device__ void load_rows(float* tile, const act* x, int start, int rows, const Sizes& s, int head, int first_g, int dim,
                          int padded) {
    int ld = leading(padded);
    for (int i = threadIdx.x; i < STEP * SLICE * padded; i += BLOCK_THREADS) {
        int r = i / padded, d = i % padded;
        int t = r / SLICE, g = first_g + r % SLICE;
        bool inside = t < rows && d < dim && g < s.group;
        long long at = (static_cast<long long>(start + t) * s.heads + head * s.group + g) * dim + d;
        tile[r * ld + d] = inside ? to_float(x[at]) : 0.0f;
    }
}

// From log gates [N, K, D]: b [STEP, D], the sum from the step's first token to each, and `to_end`, that from after each
// token to the step's end. Tokens past the end have gate 0.
__device__ void load_gates(float* from_start, float* to_end, const float* gates, int start, int rows, const Sizes& s,
                           int head) {
    int dim = gate_dim(s), padded = padded_gate_dim(s), ld = leading(padded);
    for (int d = threadIdx.x; d < padded; d += BLOCK_THREADS) {
        float sum = 0.0f;
        float g[STEP];
#pragma unroll
        for (int t = 0; t < STEP; t++) {
            bool inside = t < rows && d < dim;
            g[t] = inside ? fmaxf(gates[(static_cast<long long>(start + t) * s.kv + head) * dim + d], LOWEST_GATE) : 0.0f;
        }
#pragma unroll
        for (int t = 0; t < STEP; t++) {
            sum += g[t];
            from_start[t * ld + d] = sum;
        }
        sum = 0.0f;
#pragma unroll
        for (int t = STEP - 1; t >= 0; t--) {
            to_end[t * ld + d] = sum;
            sum += g[t];
        }
    }
}

// S := decay S + k^T v, the gated one of k and v (tiles that are overwritten) decayed to the step's end.
__device__ void advance(float* state, float* k, float* v, const float* from_start, const float* to_end, const Sizes& s) {
    int lk = leading(s.pk), lv = leading(s.pv), lg = leading(padded_gate_dim(s));
    float* gated = s.axis == 0 ? k : v;
    int padded = padded_gate_dim(s);
    for (int i = threadIdx.x; i < STEP * padded; i += BLOCK_THREADS) {
        int at = i / padded * lg + i % padded;
        gated[at] *= expf(to_end[at]);
    }
    __syncthreads();
    const float* total = from_start + (STEP - 1) * lg;
    tile_product<4>(s.pk, s.pv, STEP, Tile{k, 1, lk}, Tile{v, lv, 1}, [&](int a, int b, float x) {
        float* at = state + a * lv + b;
        *at = *at * expf(total[s.axis == 0 ? a : b]) + x;
    });
}

// dS := decay dS + q^T do, the gated one of q and do (tiles that are overwritten) decayed from the step's first token.
// With `scale_state` 0 the state is only added to: of a later slice.
__device__ void retreat(float* state, float* q, float* dout, const float* from_start, const Sizes& s, int decays) {
    int lk = leading(s.pk), lv = leading(s.pv), lg = leading(padded_gate_dim(s));
    float* gated = s.axis == 0 ? q : dout;
    int padded = padded_gate_dim(s);
    for (int i = threadIdx.x; i < STEP * SLICE * padded; i += BLOCK_THREADS) {
        int r = i / padded, d = i % padded;
        gated[r * lg + d] *= expf(from_start[r / SLICE * lg + d]);
    }
    __syncthreads();
    const float* total = from_start + (STEP - 1) * lg;
    tile_product<4>(s.pk, s.pv, STEP * SLICE, Tile{q, 1, lk}, Tile{dout, lv, 1}, [&](int a, int b, float x) {
        float* at = state + a * lv + b;
        *at = (decays ? *at * expf(total[s.axis == 0 ? a : b]) : *at) + x;
    });
}

// Reads or writes a state [Dk, Dv] of global memory.
__device__ void load_state(float* tile, const float* state, const Sizes& s) {
    for (int i = threadIdx.x; i < s.pk * s.pv; i += BLOCK_THREADS) {
        int a = i / s.pv, b = i % s.pv;
        tile[a * leading(s.pv) + b] = state != nullptr && a < s.dk && b < s.dv ? state[a * s.dv + b] : 0.0f;
    }
}

__device__ void store_state(float* state, const float* tile, const Sizes& s) {
    for (int i = threadIdx.x; i < s.dk * s.dv; i += BLOCK_THREADS) {
        state[i] = tile[i / s.dv * leading(s.pv) + i % s.dv];
    }
}

extern __shared__ float4 shared_memory[];

// Cuts the block's shared memory into tiles.
struct Carver {
    float* next;
    __device__ Carver() : next(reinterpret_cast<float*>(shared_memory)) {}
    __device__ float* tile(int rows, int padded) {
        float* tile = next;
        next += rows * leading(padded);
        return tile;
    }
};

// states [chunks, K, Dk, Dv]: what the chunk's own tokens leave behind; totals [chunks, K, Dg]: its log gates summed.
// With q == nullptr forward (k, v), else backward (q, dout). Grid (chunks, K).
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1)
    chunk_states(float* states, float* totals, const act* k, const act* v, const act* q, const act* dout,
                 const float* gates, const ChunkInfo* chunks, Sizes s) {
    ChunkInfo chunk = chunks[blockIdx.x];
    int head = blockIdx.y, padded = padded_gate_dim(s);
    long long item = static_cast<long long>(blockIdx.x) * s.kv + head;
    Carver carve;
    float* state = carve.tile(s.pk, s.pv);
    float* from_start = carve.tile(STEP, padded);
    float* to_end = carve.tile(STEP, padded);
    int rows = q == nullptr ? STEP : STEP * SLICE;
    float* x = carve.tile(rows, s.pk);
    float* y = carve.tile(rows, s.pv);
    load_state(state, nullptr, s);
    float total = 0.0f;
    int steps = (chunk.len + STEP - 1) / STEP;
    for (int i = 0; i < steps; i++) {
        int step = q == nullptr ? i : steps - 1 - i;
        int start = chunk.start + step * STEP, count = min(STEP, chunk.len - step * STEP);
        __syncthreads();
        load_gates(from_start, to_end, gates, start, count, s, head);
        if (q == nullptr) {
            load_tokens(x, k, start, count, s.kv, head, s.dk, s.pk);
            load_tokens(y, v, start, count, s.kv, head, s.dv, s.pv);
            __syncthreads();
            advance(state, x, y, from_start, to_end, s);
        } else {
            for (int first_g = 0; first_g < s.group; first_g += SLICE) {
                __syncthreads();
                load_rows(x, q, start, count, s, head, first_g, s.dk, s.pk);
                load_rows(y, dout, start, count, s, head, first_g, s.dv, s.pv);
                __syncthreads();
                retreat(state, x, y, from_start, s, first_g == 0);
            }
        }
        if (threadIdx.x < padded) total += from_start[(STEP - 1) * leading(padded) + threadIdx.x];
    }
    __syncthreads();
    store_state(states + item * s.dk * s.dv, state, s);
    if (totals != nullptr && threadIdx.x < gate_dim(s)) totals[item * gate_dim(s) + threadIdx.x] = total;
}

// Replaces what each chunk adds by the state before it (reverse: after it); the last one goes to `border`, which holds
// the first one: [slots or sequences, K, Dk, Dv], found by `index`. Grid (elements / 256, K, sequences).
extern "C" __global__ void scan_states(float* states, const float* totals, float* border, int write_border,
                                       const int* index, const ChunkInfo* firsts, int reverse, Sizes s) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    int len = s.dk * s.dv;
    if (i >= len) return;
    ChunkInfo info = firsts[blockIdx.z];
    int head = blockIdx.y, gate = s.axis == 0 ? i / s.dv : i % s.dv, dim = gate_dim(s);
    float* at_border = border == nullptr ? nullptr
                                         : border + (static_cast<long long>(index[blockIdx.z]) * s.kv + head) * len + i;
    float state = at_border == nullptr ? 0.0f : *at_border;
    for (int n = 0; n < info.count; n++) {
        long long item = static_cast<long long>(info.first + (reverse ? info.count - 1 - n : n)) * s.kv + head;
        float added = states[item * len + i];
        states[item * len + i] = state;
        state = state * expf(totals[item * dim + gate]) + added;
    }
    if (at_border != nullptr && write_border) *at_border = state;
}

// scores [STEP * SLICE, STEP + 4]: x_i y_j for j <= i, decayed pair by pair if `decayed`, else 0.
__device__ void pair_scores(float* scores, const float* x, const float* y, const float* from_start, int padded,
                            int decayed) {
    int ld = leading(padded);
    for (int task = threadIdx.x; task < STEP * STEP * 2; task += BLOCK_THREADS) {
        // Two neighbouring threads share a pair, each with every other block of four dimensions.
        int i = task / (STEP * 2), j = task / 2 % STEP, part = task & 1;
        float sum[SLICE];
#pragma unroll
        for (int g = 0; g < SLICE; g++) sum[g] = 0.0f;
        if (j <= i) {
            for (int d = part * 4; d < padded; d += 8) {
                float4 right = *reinterpret_cast<const float4*>(y + j * ld + d);
                if (decayed) {
                    float4 bi = *reinterpret_cast<const float4*>(from_start + i * ld + d);
                    float4 bj = *reinterpret_cast<const float4*>(from_start + j * ld + d);
                    right.x *= expf(bi.x - bj.x), right.y *= expf(bi.y - bj.y);
                    right.z *= expf(bi.z - bj.z), right.w *= expf(bi.w - bj.w);
                }
#pragma unroll
                for (int g = 0; g < SLICE; g++) {
                    float4 left = *reinterpret_cast<const float4*>(x + (i * SLICE + g) * ld + d);
                    sum[g] += left.x * right.x + left.y * right.y + left.z * right.z + left.w * right.w;
                }
            }
        }
#pragma unroll
        for (int g = 0; g < SLICE; g++) {
            sum[g] += __shfl_xor_sync(0xffffffffu, sum[g], 1);
            if (part == 0) scores[(i * SLICE + g) * (STEP + 4) + j] = sum[g];
        }
    }
}

// Rows of out or of dq. Forward: x = q, y = k, z = v, out [N, H, Dv]; gradient: x = do, y = v, z = k, out = dq [N, H, Dk].
// The gate is on x's and y's dimension ("early": decay, then product) or on z's ("late"). Grid (chunks, K).
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1)
    chunk_rows(act* out, const act* x, const act* k, const act* v, const float* gates, const float* states,
               const ChunkInfo* chunks, int gradient, Sizes s) {
    ChunkInfo chunk = chunks[blockIdx.x];
    int head = blockIdx.y, padded = padded_gate_dim(s);
    bool early = (s.axis == 0) != (gradient != 0);
    int dx = gradient ? s.dv : s.dk, px = gradient ? s.pv : s.pk;
    int dz = gradient ? s.dk : s.dv, pz = gradient ? s.pk : s.pv;
    int lx = leading(px), lz = leading(pz), lv = leading(s.pv), lg = leading(padded);
    Carver carve;
    float* state = carve.tile(s.pk, s.pv);
    float* from_start = carve.tile(STEP, padded);
    float* to_end = carve.tile(STEP, padded);
    float* kt = carve.tile(STEP, s.pk);
    float* vt = carve.tile(STEP, s.pv);
    float* xt = carve.tile(STEP * SLICE, px);
    float* ot = carve.tile(STEP * SLICE, pz);
    float* scores = carve.tile(STEP * SLICE, STEP);
    const float* y = gradient ? vt : kt;
    const float* z = gradient ? kt : vt;
    // S for x [., Dk], its transpose for x [., Dv].
    Tile memory = gradient ? Tile{state, 1, lv} : Tile{state, lv, 1};
    load_state(state, states + (static_cast<long long>(blockIdx.x) * s.kv + head) * s.dk * s.dv, s);
    for (int first = 0; first < chunk.len; first += STEP) {
        int start = chunk.start + first, count = min(STEP, chunk.len - first);
        __syncthreads();
        load_gates(from_start, to_end, gates, start, count, s, head);
        load_tokens(kt, k, start, count, s.kv, head, s.dk, s.pk);
        load_tokens(vt, v, start, count, s.kv, head, s.dv, s.pv);
        for (int first_g = 0; first_g < s.group; first_g += SLICE) {
            __syncthreads();
            load_rows(xt, x, start, count, s, head, first_g, dx, px);
            __syncthreads();
            pair_scores(scores, xt, y, from_start, px, early);
            __syncthreads();
            if (early) {
                for (int i = threadIdx.x; i < STEP * SLICE * px; i += BLOCK_THREADS) {
                    int r = i / px, d = i % px;
                    xt[r * lx + d] *= expf(from_start[r / SLICE * lg + d]);
                }
                __syncthreads();
                tile_product<4>(STEP * SLICE, pz, px, Tile{xt, lx, 1}, memory,
                                [&](int i, int j, float value) { ot[i * lz + j] = value; });
                __syncthreads();
                tile_product<4>(STEP * SLICE, pz, STEP, Tile{scores, STEP + 4, 1}, Tile{z, lz, 1},
                                [&](int i, int j, float value) { ot[i * lz + j] += value; });
            } else {
                tile_product<4>(STEP * SLICE, pz, px, Tile{xt, lx, 1}, memory, [&](int i, int j, float value) {
                    ot[i * lz + j] = value * expf(from_start[i / SLICE * lg + j]);
                });
                __syncthreads();
                // sum_j A_ij z_j exp(b_i - b_j): one thread a token and dimension, all heads of the slice.
                for (int task = threadIdx.x; task < STEP * pz; task += BLOCK_THREADS) {
                    int i = task / pz, d = task % pz;
                    float sum[SLICE];
#pragma unroll
                    for (int g = 0; g < SLICE; g++) sum[g] = 0.0f;
                    float bi = from_start[i * lg + d];
                    for (int j = 0; j <= i; j++) {
                        float value = z[j * lz + d] * expf(bi - from_start[j * lg + d]);
#pragma unroll
                        for (int g = 0; g < SLICE; g++) sum[g] += scores[(i * SLICE + g) * (STEP + 4) + j] * value;
                    }
#pragma unroll
                    for (int g = 0; g < SLICE; g++) ot[(i * SLICE + g) * lz + d] += sum[g];
                }
            }
            __syncthreads();
            for (int i = threadIdx.x; i < STEP * SLICE * dz; i += BLOCK_THREADS) {
                int r = i / dz, d = i % dz, t = r / SLICE, g = first_g + r % SLICE;
                if (t < count && g < s.group) {
                    long long at = (static_cast<long long>(start + t) * s.heads + head * s.group + g) * dz + d;
                    out[at] = from_float<act>(ot[r * lz + d]);
                }
            }
        }
        if (first + STEP < chunk.len) {
            __syncthreads();
            advance(state, kt, vt, from_start, to_end, s);
        }
    }
}

// Adds to a token tile [STEP, pz] of gradients: sum over rows i >= j of score(x_i, y_j) w_i; `late` puts the pair's decay
// on w's dimension (else it is in the scores).
__device__ void gather_columns(float* tile, const float* scores, const float* w, const float* from_start, int pz,
                               bool late) {
    int lz = leading(pz);
    for (int task = threadIdx.x; task < STEP * pz; task += BLOCK_THREADS) {
        int j = task / pz, d = task % pz;
        float sum = 0.0f, bj = late ? from_start[j * lz + d] : 0.0f;
        for (int i = j; i < STEP; i++) {
            float part = 0.0f;
#pragma unroll
            for (int g = 0; g < SLICE; g++) {
                part += scores[(i * SLICE + g) * (STEP + 4) + j] * w[(i * SLICE + g) * lz + d];
            }
            sum += late ? part * expf(from_start[i * lz + d] - bj) : part;
        }
        tile[j * lz + d] += sum;
    }
}

// Gradients of k, v, and each chunk's own part of the gates' gradient: local[t] = sum over the chunk's tokens from t on
// of sum_g(x dx) - y dy, where x, dx are q, dq (AXIS 0) or out, do (AXIS 1), and y, dy are k, dk or v, dv; the whole
// chunk's goes to chunk_sums [chunks, K, Dg]. `dstates`: gradient of the state after each chunk. Grid (chunks, K).
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1)
    chunk_columns(act* dk_out, act* dv_out, float* local, float* chunk_sums, const act* q, const act* k, const act* v,
                  const act* dout, const act* dq_or_out, const float* gates, const float* dstates,
                  const ChunkInfo* chunks, Sizes s) {
    ChunkInfo chunk = chunks[blockIdx.x];
    int head = blockIdx.y, padded = padded_gate_dim(s), dim = gate_dim(s);
    int lk = leading(s.pk), lv = leading(s.pv), lg = leading(padded);
    long long item = static_cast<long long>(blockIdx.x) * s.kv + head;
    Carver carve;
    float* state = carve.tile(s.pk, s.pv);
    float* from_start = carve.tile(STEP, padded);
    float* to_end = carve.tile(STEP, padded);
    float* kt = carve.tile(STEP, s.pk);
    float* vt = carve.tile(STEP, s.pv);
    float* dkt = carve.tile(STEP, s.pk);
    float* dvt = carve.tile(STEP, s.pv);
    float* terms = carve.tile(STEP, padded);
    float* qt = carve.tile(STEP * SLICE, s.pk);
    float* dot = carve.tile(STEP * SLICE, s.pv);
    float* scores = carve.tile(STEP * SLICE, STEP);
    float* dscores = carve.tile(STEP * SLICE, STEP);
    load_state(state, dstates + item * s.dk * s.dv, s);
    float carried = 0.0f;  // of dimension threadIdx.x
    int steps = (chunk.len + STEP - 1) / STEP;
    for (int step = steps - 1; step >= 0; step--) {
        int start = chunk.start + step * STEP, count = min(STEP, chunk.len - step * STEP);
        __syncthreads();
        load_gates(from_start, to_end, gates, start, count, s, head);
        load_tokens(kt, k, start, count, s.kv, head, s.dk, s.pk);
        load_tokens(vt, v, start, count, s.kv, head, s.dv, s.pv);
        __syncthreads();
        // What flows through the state after the step: dv = (k to_end) dS, dk = to_end (v dS^T), or the other way round.
        float* decayed = s.axis == 0 ? kt : vt;
        for (int i = threadIdx.x; i < STEP * padded; i += BLOCK_THREADS) {
            int at = i / padded * lg + i % padded;
            terms[at] = decayed[at];  // kept to undo: to_end may be 0
            decayed[at] *= expf(to_end[at]);
        }
        __syncthreads();
        if (s.axis == 0) {
            tile_product<2>(STEP, s.pv, s.pk, Tile{kt, lk, 1}, Tile{state, lv, 1},
                            [&](int i, int j, float x) { dvt[i * lv + j] = x; });
            tile_product<2>(STEP, s.pk, s.pv, Tile{vt, lv, 1}, Tile{state, 1, lv},
                            [&](int i, int j, float x) { dkt[i * lk + j] = x * expf(to_end[i * lg + j]); });
        } else {
            tile_product<2>(STEP, s.pk, s.pv, Tile{vt, lv, 1}, Tile{state, 1, lv},
                            [&](int i, int j, float x) { dkt[i * lk + j] = x; });
            tile_product<2>(STEP, s.pv, s.pk, Tile{kt, lk, 1}, Tile{state, lv, 1},
                            [&](int i, int j, float x) { dvt[i * lv + j] = x * expf(to_end[i * lg + j]); });
        }
        __syncthreads();
        for (int i = threadIdx.x; i < STEP * padded; i += BLOCK_THREADS) {
            int at = i / padded * lg + i % padded;
            decayed[at] = terms[at];
            terms[at] = 0.0f;
        }
        for (int first_g = 0; first_g < s.group; first_g += SLICE) {
            __syncthreads();
            load_rows(qt, q, start, count, s, head, first_g, s.dk, s.pk);
            load_rows(dot, dout, start, count, s, head, first_g, s.dv, s.pv);
            __syncthreads();
            pair_scores(scores, qt, kt, from_start, s.pk, s.axis == 0);
            pair_scores(dscores, dot, vt, from_start, s.pv, s.axis == 1);
            __syncthreads();
            gather_columns(dvt, scores, dot, from_start, s.pv, s.axis == 1);
            gather_columns(dkt, dscores, qt, from_start, s.pk, s.axis == 0);
            // The rows' part of the gate terms.
            const float* rows = s.axis == 0 ? qt : dot;
            for (int i = threadIdx.x; i < STEP * dim; i += BLOCK_THREADS) {
                int t = i / dim, d = i % dim;
                if (t >= count) continue;
                float sum = 0.0f;
                for (int g = 0; g < SLICE && first_g + g < s.group; g++) {
                    long long at = (static_cast<long long>(start + t) * s.heads + head * s.group + first_g + g) * dim + d;
                    sum += rows[(t * SLICE + g) * lg + d] * to_float(dq_or_out[at]);
                }
                terms[t * lg + d] += sum;
            }
        }
        __syncthreads();
        // dS before the step. The rows are still there if they fit one slice.
        if (step > 0) {
            for (int first_g = 0; first_g < s.group; first_g += SLICE) {
                if (s.group > SLICE) {
                    __syncthreads();
                    load_rows(qt, q, start, count, s, head, first_g, s.dk, s.pk);
                    load_rows(dot, dout, start, count, s, head, first_g, s.dv, s.pv);
                    __syncthreads();
                }
                retreat(state, qt, dot, from_start, s, first_g == 0);
            }
        }
        for (int i = threadIdx.x; i < STEP * s.dk; i += BLOCK_THREADS) {
            int t = i / s.dk, d = i % s.dk;
            if (t < count) {
                dk_out[(static_cast<long long>(start + t) * s.kv + head) * s.dk + d] = from_float<act>(dkt[t * lk + d]);
            }
        }
        for (int i = threadIdx.x; i < STEP * s.dv; i += BLOCK_THREADS) {
            int t = i / s.dv, d = i % s.dv;
            if (t < count) {
                dv_out[(static_cast<long long>(start + t) * s.kv + head) * s.dv + d] = from_float<act>(dvt[t * lv + d]);
            }
        }
        const float* y = s.axis == 0 ? kt : vt;
        const float* dy = s.axis == 0 ? dkt : dvt;
        if (threadIdx.x < dim) {
            for (int t = count - 1; t >= 0; t--) {
                int at = t * lg + threadIdx.x;
                carried += terms[at] - y[at] * dy[at];
                local[(static_cast<long long>(start + t) * s.kv + head) * dim + threadIdx.x] = carried;
            }
        }
    }
    if (threadIdx.x < dim) chunk_sums[item * dim + threadIdx.x] = carried;
}

// final_terms [sequences, K, Dg]: sum of S dS over the other axis, for a text whose final state has a gradient; `states`
// are those after the last chunk [sequences, K, Dk, Dv]. Grid (K, sequences).
extern "C" __global__ void final_gate_terms(float* final_terms, const float* states, const float* dstates, Sizes s) {
    long long item = static_cast<long long>(blockIdx.y) * s.kv + blockIdx.x;
    int dim = gate_dim(s), other = s.axis == 0 ? s.dv : s.dk;
    const float* state = states + item * s.dk * s.dv;
    const float* dstate = dstates + item * s.dk * s.dv;
    for (int d = threadIdx.x; d < dim; d += blockDim.x) {
        float sum = 0.0f;
        for (int e = 0; e < other; e++) {
            int at = s.axis == 0 ? d * s.dv + e : e * s.dv + d;
            sum += state[at] * dstate[at];
        }
        final_terms[item * dim + d] = sum;
    }
}

// dgates: adds what later chunks of the text hold; 0 where the gate is clamped. Grid (chunks, K).
extern "C" __global__ void finish_gates(float* dgates, const float* gates, const float* chunk_sums,
                                        const float* final_terms, const ChunkInfo* chunks, Sizes s) {
    ChunkInfo chunk = chunks[blockIdx.x];
    int dim = gate_dim(s), d = threadIdx.x;
    if (d >= dim) return;
    double later = 0.0;
    for (int n = chunk.first + chunk.count - 1; n > static_cast<int>(blockIdx.x); n--) {
        later += chunk_sums[(static_cast<long long>(n) * s.kv + blockIdx.y) * dim + d];
    }
    if (final_terms != nullptr) later += final_terms[(static_cast<long long>(chunk.sequence) * s.kv + blockIdx.y) * dim + d];
    for (int t = chunk.start; t < chunk.start + chunk.len; t++) {
        long long at = (static_cast<long long>(t) * s.kv + blockIdx.y) * dim + d;
        // A clamped gate forgets everything: its true gradient is far below float32's noise.
        dgates[at] = gates[at] <= LOWEST_GATE ? 0.0f : static_cast<float>(dgates[at] + later);
    }
}

#define STEP_COLUMNS 32

// One token a sequence: S := gate S + k^T v, o = q S, for 32 columns of S; 256 threads are 32 columns x 8 parts of Dk.
// Grid (ceil(Dv / 32), K, sequences). group <= 16.
extern "C" __global__ void __launch_bounds__(256)
    recurrence_step(act* out, const act* q, const act* k, const act* v, const float* gates, float* states,
                    const int* slots, Sizes s) {
    __shared__ float sums[8][16][STEP_COLUMNS + 1];
    int column = threadIdx.x % STEP_COLUMNS, part = threadIdx.x / STEP_COLUMNS;
    int b = blockIdx.x * STEP_COLUMNS + column, head = blockIdx.y;
    long long row = blockIdx.z;
    float* state = states + (static_cast<long long>(slots[row]) * s.kv + head) * s.dk * s.dv;
    float sum[16];
#pragma unroll
    for (int g = 0; g < 16; g++) sum[g] = 0.0f;
    if (b < s.dv) {
        float value = to_float(v[(row * s.kv + head) * s.dv + b]);
        float late = s.axis == 1 ? expf(gates[(row * s.kv + head) * s.dv + b]) : 0.0f;
        for (int a = part; a < s.dk; a += 8) {
            float decay = s.axis == 1 ? late : expf(gates[(row * s.kv + head) * s.dk + a]);
            float x = decay * state[a * s.dv + b] + to_float(k[(row * s.kv + head) * s.dk + a]) * value;
            state[a * s.dv + b] = x;
#pragma unroll
            for (int g = 0; g < 16; g++) {
                if (g < s.group) sum[g] += to_float(q[(row * s.heads + head * s.group + g) * s.dk + a]) * x;
            }
        }
    }
#pragma unroll
    for (int g = 0; g < 16; g++) sums[part][g][column] = sum[g];
    __syncthreads();
    for (int g = part; g < s.group; g += 8) {
        float total = 0.0f;
        for (int p = 0; p < 8; p++) total += sums[p][g][column];
        if (b < s.dv) out[(row * s.heads + head * s.group + g) * s.dv + b] = from_float<act>(total);
    }
}
