// The chunked recurrence step by step: 16 tokens after one another in a block, the state in shared memory between them.
// README.md has the figures. With the sizes of Llama 3 at 1B, the gate on the key axis.
#define DK 64
#define DV 64
#define SLICE 4
#define AXIS 0

// The gated recurrence S_t = gate_t S_{t-1} + k_t^T v_t, o_t = q_t S_t, forward and backward.
//
// A text is cut into chunks of CHUNK tokens, worked on in parallel, and a chunk into steps of 16 tokens, one after the
// other in a block. In recurrence_chunks.cu:
//   chunk_states   what each chunk adds to the state (forward), or to the state's gradient (backward)
//   scan_states    the state before (backward: the gradient after) every chunk, from those
//   chunk_rows     outputs, or the gradient of q: a row reads the state and the tokens before it in its step
// In recurrence_gradients.cu:
//   chunk_columns  gradients of k, v and the gates: a token gathers from the rows after it
//   finish_gates   the gates' gradient is one sum from the end of the text: adds what later chunks hold
//
// Inside a step let b be the log gates summed from its first token. The decay of a pair of tokens, exp(b_i - b_j), is taken
// as exp(b_i) times exp(-b_j), one on each side of a matrix product, as long as no sum of a step is below SAFE: both then
// are finite, and their product is exact up to rounding. A step with stronger gates goes token by token instead. Decays to
// and from the border of a step are at most 1 in any case. tests/golden/chunked.py derives the gradients.
//
// AXIS 0: the gate decays the key axis of S [DK, DV]; AXIS 1: the value axis. "Early" is a product whose decayed dimension
// is summed over, "late" one whose result has it. Heads of a query group are stacked as rows, SLICE of them at a time. DK,
// DV, GROUP, SLICE and AXIS are fixed when the kernels are compiled.

#define CHUNK 64
#define STEP 16
#define ROWS (STEP * SLICE)
#define LOWEST_GATE (-40.0f)
#define SAFE (-80.0f)
#define THREADS 256

// Blocks that share a multiprocessor, where states leave room and 128 registers a thread are enough.
#if defined(ACT_BF16) && DK <= 64 && DV <= 64 && AXIS == 0 && __CUDA_ARCH__ >= 900
#define BLOCKS 2
#else
#define BLOCKS 1
#endif
// Slices of three heads leave the gradient by rows a register short.
#define ROWS_GRADIENT_BLOCKS (SLICE == 4 ? BLOCKS : 1)

#define PK ((DK + 15) / 16 * 16)
#define PV ((DV + 15) / 16 * 16)
#define DG (AXIS == 0 ? DK : DV)
#define PG (AXIS == 0 ? PK : PV)
// Leading dimensions of tiles of elements and of float32.
#define EK (PK + PAD)
#define EV (PV + PAD)
#define EG (PG + PAD)
#define FK (PK + FLOAT_PAD)
#define FV (PV + FLOAT_PAD)
#define FG (PG + FLOAT_PAD)
#define ES (STEP + PAD)

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

struct Sizes {
    int heads, kv;
};

// Rows start..start + rows of x [N, heads, LENGTH] at one head into a tile [STEP, ACROSS + PAD], zero past the end.
template <int ACROSS, int LENGTH>
__device__ __forceinline__ void load_tokens(elem* tile, const act* x, int start, int rows, int heads, int head) {
    load_tile<STEP, ACROSS, LENGTH, THREADS>(
        tile, [&](int t) { return t < rows ? x + (static_cast<long long>(start + t) * heads + head) * LENGTH : nullptr; });
}

// Row of [N, H] that tile row r = (token, head of the slice) is, or -1.
__device__ __forceinline__ int row_of(int start, int rows, const Sizes& s, int head, int first_g, int r) {
    int t = r / SLICE, g = first_g + r % SLICE;
    return t < rows && g < GROUP ? (start + t) * s.heads + head * GROUP + g : -1;
}

template <int ACROSS, int LENGTH>
__device__ __forceinline__ void load_rows(elem* tile, const act* x, int start, int rows, const Sizes& s, int head,
                                          int first_g) {
    load_tile<ROWS, ACROSS, LENGTH, THREADS>(tile, [&](int r) {
        int row = row_of(start, rows, s, head, first_g, r);
        return row < 0 ? nullptr : x + static_cast<long long>(row) * LENGTH;
    });
}

// Decays of a step from log gates [N, K, DG], tiles [STEP, FG] of float32: from the step's first token to each, that and its
// own gate included; from after each to the step's end; b itself. Tokens past the end have gate 0. Whether all are SAFE.
__device__ __forceinline__ bool load_gates(float* from_start, float* to_end, float* b, const float* gates, int start,
                                           int rows, const Sizes& s, int head) {
    bool safe = true;
    for (int d = threadIdx.x; d < PG; d += THREADS) {
        float g[STEP], sum = 0.0f;
#pragma unroll
        for (int t = 0; t < STEP; t++) {
            bool inside = t < rows && d < DG;
            g[t] = inside ? fmaxf(gates[(static_cast<long long>(start + t) * s.kv + head) * DG + d], LOWEST_GATE) : 0.0f;
        }
#pragma unroll
        for (int t = 0; t < STEP; t++) {
            sum += g[t];
            b[t * FG + d] = sum;
            from_start[t * FG + d] = __expf(sum);
        }
        safe = sum >= SAFE;
        sum = 0.0f;
#pragma unroll
        for (int t = STEP - 1; t >= 0; t--) {
            to_end[t * FG + d] = __expf(sum);
            sum += g[t];
        }
    }
    return safe;
}

// tile [COUNT, PG] *= factor of token r / PER.
template <int COUNT, int PER> __device__ __forceinline__ void decay_tile(elem* tile, const float* factor) {
    for (int i = threadIdx.x; i < COUNT * PG; i += THREADS) {
        int r = i / PG, d = i % PG;
        elem* at = tile + r * EG + d;
        *at = from_float<elem>(to_float(*at) * factor[r / PER * FG + d]);
    }
}

// to [STEP, PG] = from exp(-b): the other half of a pair's decay.
__device__ __forceinline__ void undecay_tile(elem* to, const elem* from, const float* b) {
    for (int i = threadIdx.x; i < STEP * PG; i += THREADS) {
        int at = i / PG * EG + i % PG;
        to[at] = from_float<elem>(to_float(from[at]) * __expf(-b[i / PG * FG + i % PG]));
    }
}

// Shares [M, N] among 8 warps: accumulate(c, row, column) adds products, epilogue(i, j, x, y) takes elements (i, j), (i, j + 1).
template <int M, int N, class Accumulate, class Epilogue>
__device__ __forceinline__ void for_tiles(Accumulate accumulate, Epilogue epilogue) {
    constexpr int TAKEN = tile_width(M, N), ACROSS = N / 8 / TAKEN;
    int group = LANE >> 2, quad = LANE & 3;
    for (int task = WARP; task < M / 16 * ACROSS; task += 8) {
        int row = task / ACROSS * 16, column = task % ACROSS * TAKEN * 8;
        float c[TAKEN][4];
#pragma unroll
        for (int w = 0; w < TAKEN; w++) c[w][0] = c[w][1] = c[w][2] = c[w][3] = 0.0f;
        accumulate(c, row, column);
#pragma unroll
        for (int w = 0; w < TAKEN; w++) {
            int j = column + 8 * w + 2 * quad;
            epilogue(row + group, j, c[w][0], c[w][1]);
            epilogue(row + group + 8, j, c[w][2], c[w][3]);
        }
    }
}

// S := decay S + x^T y over COUNT rows; with `decays` false only the product is added.
template <int COUNT>
__device__ __forceinline__ void update_state(float* state, const elem* x, const elem* y, const float* from_start,
                                             bool decays) {
    const float* total = from_start + (STEP - 1) * FG;
    for_tiles<PK, PV>(
        [&](auto& c, int row, int column) { product<COUNT, true, false>(c, x, EK, row, y, EV, column); },
        [&](int a, int b, float left, float right) {
            float2* at = reinterpret_cast<float2*>(state + a * FV + b);
            float2 old = *at;
            float decay_left = !decays ? 1.0f : total[AXIS == 0 ? a : b];
            float decay_right = !decays ? 1.0f : total[AXIS == 0 ? a : b + 1];
            *at = make_float2(old.x * decay_left + left, old.y * decay_right + right);
        });
}

// The state in the tiles' element type.
__device__ __forceinline__ const elem* narrow_state(elem* narrow, const float* state) {
#ifdef ACT_BF16
    for (int i = threadIdx.x; i < PK * PV / 2; i += THREADS) {
        int a = i / (PV / 2), b = i % (PV / 2) * 2;
        float2 x = *reinterpret_cast<const float2*>(state + a * FV + b);
        *reinterpret_cast<u32*>(narrow + a * EV + b) = pack(x.x, x.y);
    }
    return narrow;
#else
    return state;
#endif
}

__device__ __forceinline__ void load_state(float* tile, const float* state) {
    for (int i = threadIdx.x; i < PK * PV; i += THREADS) {
        int a = i / PV, b = i % PV;
        tile[a * FV + b] = state != nullptr && a < DK && b < DV ? state[a * DV + b] : 0.0f;
    }
}

__device__ __forceinline__ void store_state(float* state, const float* tile) {
    for (int i = threadIdx.x; i < DK * DV; i += THREADS) state[i] = tile[i / DV * FV + i % DV];
}

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
