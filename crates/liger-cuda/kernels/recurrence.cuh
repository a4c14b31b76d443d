// The gated recurrence S_t = gate_t S_{t-1} + k_t^T v_t, o_t = q_t S_t, forward and backward.
//
// A text is cut into chunks of CHUNK tokens, each worked on by one block. In recurrence_chunks.cu:
//   chunk_states   what each chunk adds to the state (forward), or to the state's gradient (backward)
//   scan_states    the state before (backward: the gradient after) every chunk, from those
//   chunk_rows     outputs, or the gradient of q: a row reads the state and the tokens before it in its chunk
// In recurrence_gradients.cu:
//   chunk_columns  gradients of k, v and the gates: a token gathers from the rows after it
//   finish_gates   the gates' gradient is one sum from the end of the text: adds what later chunks hold
//
// Decays. A chunk has STEPS steps of 16 tokens. With c_t the log gates summed from the first token of t's step, and B_i all
// those before step i, the decay from token s to row t of step i is exp(c_t) on the row's side of a matrix product times
// exp(B_i - (log gates to s)) on the token's side. For tokens of earlier steps both are at most 1. Inside a step the token's
// side is exp(-c_s), which is finite and exact up to rounding as long as no sum of a step is below SAFE; pairs inside a
// step with stronger gates are taken one by one. tests/golden/chunked.py derives the gradients.
//
// AXIS 0: the gate decays the key axis of S [DK, DV]; AXIS 1: the value axis. "Early" is a product whose decayed dimension
// is summed over, "late" one whose result has it. Rows of SLICE heads of a query group are in shared memory at a time. DK,
// DV, GROUP, SLICE and AXIS are fixed when the kernels are compiled.

#define CHUNK 64
#define STEP 16
#define STEPS (CHUNK / STEP)
#define LOWEST_GATE (-40.0f)
#define SAFE (-80.0f)
#define THREADS 256

// Blocks that share a multiprocessor, where shared memory leaves room and 128 registers a thread are enough.
#if defined(ACT_BF16) && DK <= 64 && DV <= 64
#define BLOCKS 2
#else
#define BLOCKS 1
#endif

#define PK ((DK + 15) / 16 * 16)
#define PV ((DV + 15) / 16 * 16)
#define DG (AXIS == 0 ? DK : DV)
#define PG (AXIS == 0 ? PK : PV)
// Leading dimensions of tiles of elements and of float32.
#define EK (PK + PAD)
#define EV (PV + PAD)
#define EG (PG + PAD)
#define FG (PG + FLOAT_PAD)

// Tokens that the rows of a chunk's steps see, step by step: those of step i begin at FIRST_SEEN(i).
#define FIRST_SEEN(i) (STEP * (i) * ((i) + 1) / 2)
#define SEEN FIRST_SEEN(STEPS)

struct Sizes {
    int heads, kv;
};

// Row t of x [N, heads, length] at one head; null past the chunk's end.
__device__ __forceinline__ const act* token_row(const act* x, const ChunkInfo& chunk, int t, int heads, int head, int length) {
    return t < chunk.len ? x + (static_cast<long long>(chunk.start + t) * heads + head) * length : nullptr;
}

#define VECTOR static_cast<int>(16 / sizeof(act))

// 16 bytes of a row (null: zeros) from d on, zero past LENGTH.
template <int LENGTH> __device__ __forceinline__ void load_vector(float (&x)[VECTOR], const act* row, int d) {
    if constexpr (LENGTH % VECTOR == 0) {
        uint4 raw = make_uint4(0, 0, 0, 0);
        if (row != nullptr && d < LENGTH) raw = *reinterpret_cast<const uint4*>(row + d);
#ifdef ACT_BF16
        u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int e = 0; e < VECTOR; e++) x[e] = __uint_as_float(e % 2 == 0 ? words[e / 2] << 16 : words[e / 2] & 0xffff0000u);
#else
        x[0] = __uint_as_float(raw.x), x[1] = __uint_as_float(raw.y);
        x[2] = __uint_as_float(raw.z), x[3] = __uint_as_float(raw.w);
#endif
    } else {
#pragma unroll
        for (int e = 0; e < VECTOR; e++) x[e] = row != nullptr && d + e < LENGTH ? to_float(row[d + e]) : 0.0f;
    }
}

__device__ __forceinline__ void store_vector(elem* at, const float (&x)[VECTOR]) {
#ifdef ACT_BF16
    *reinterpret_cast<uint4*>(at) = make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
#else
    store4(at, make_float4(x[0], x[1], x[2], x[3]));
#endif
}

// Rows of `LENGTH` activations times factor(r, d) into a tile [COUNT, ACROSS + PAD], as `fetch_tile`, but at once.
template <int COUNT, int ACROSS, int LENGTH, class Source, class Factor>
__device__ __forceinline__ void load_scaled(elem* tile, Source source, Factor factor) {
    constexpr int PER_ROW = ACROSS / VECTOR;
#pragma unroll 2
    for (int i = threadIdx.x; i < COUNT * PER_ROW; i += THREADS) {
        int r = i / PER_ROW, d = i % PER_ROW * VECTOR;
        float x[VECTOR];
        load_vector<LENGTH>(x, source(r), d);
#pragma unroll
        for (int e = 0; e < VECTOR; e++) x[e] *= factor(r, d + e);
        store_vector(tile + r * (ACROSS + PAD) + d, x);
    }
}

// c [CHUNK, FG] from log gates [N, K, DG]; tokens past the end have gate 0. `strong` [STEPS]: whether a step is not SAFE.
__device__ __forceinline__ void load_gates(float* c, int* strong, const float* gates, const ChunkInfo& chunk, const Sizes& s,
                                           int head) {
    if (threadIdx.x < STEPS) strong[threadIdx.x] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < STEPS * PG; i += THREADS) {
        int first = i / PG * STEP, d = i % PG;
        float g[STEP], sum = 0.0f;
#pragma unroll
        for (int t = 0; t < STEP; t++) {
            long long row = chunk.start + first + t;
            bool inside = first + t < chunk.len && d < DG;
            g[t] = inside ? fmaxf(gates[(row * s.kv + head) * DG + d], LOWEST_GATE) : 0.0f;
        }
#pragma unroll
        for (int t = 0; t < STEP; t++) {
            sum += g[t];
            c[(first + t) * FG + d] = sum;
        }
        if (sum < SAFE) strong[i / PG] = 1;
    }
    __syncthreads();
}

// Log gates of a whole step, one by one for one dimension.
__device__ __forceinline__ float of_step(const float* c, int step, int d) { return c[(step * STEP + STEP - 1) * FG + d]; }

// The gated one of k and v, y [N, K, DG], as each step sees it: row t at FIRST_SEEN(i) + t for every step i from its own on,
// times its decay to the beginning of step i (within its own step: exp(-c), or 0 if the step is not SAFE).
__device__ __forceinline__ void load_seen(elem* seen, const act* y, const float* c, const int* strong, const ChunkInfo& chunk,
                                          const Sizes& s, int head) {
    constexpr int PER_ROW = PG / VECTOR;
    for (int n = threadIdx.x; n < CHUNK * PER_ROW; n += THREADS) {
        int t = n / PER_ROW, d = n % PER_ROW * VECTOR, step = t / STEP;
        float x[VECTOR], scaled[VECTOR], decay[VECTOR];
        load_vector<DG>(x, token_row(y, chunk, t, s.kv, head, DG), d);
#pragma unroll
        for (int e = 0; e < VECTOR; e++) {
            float own = c[t * FG + d + e];
            scaled[e] = strong[step] ? 0.0f : x[e] * __expf(-own);
            decay[e] = __expf(of_step(c, step, d + e) - own);
        }
        store_vector(seen + (FIRST_SEEN(step) + t) * EG + d, scaled);
        for (int i = step + 1; i < STEPS; i++) {
#pragma unroll
            for (int e = 0; e < VECTOR; e++) {
                scaled[e] = x[e] * decay[e];
                decay[e] *= __expf(of_step(c, i, d + e));
            }
            store_vector(seen + (FIRST_SEEN(i) + t) * EG + d, scaled);
        }
    }
}

// Steps of the warps, so that each of the four parts of a multiprocessor has as much to do: 0 to 3, then 3 to 0.
__device__ __forceinline__ int step_of_warp() { return WARP < STEPS ? WARP : 2 * STEPS - 1 - WARP; }

// A state [DK, DV] as a factor of products: in float32 where it is, if it needs no padding, else copied to `tile`.
#if !defined(ACT_BF16) && DK % 16 == 0 && DV % 16 == 0
#define STATE_LD DV
#define STATE_ROWS 0
__device__ __forceinline__ const elem* load_state(elem*, const float* state) { return state; }
#else
#define STATE_LD EV
#define STATE_ROWS PK
__device__ __forceinline__ const elem* load_state(elem* tile, const float* state) {
    for (int i = threadIdx.x; i < PK * PV / 4; i += THREADS) {
        int a = i / (PV / 4), b = i % (PV / 4) * 4;
        float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (DV % 4 == 0 && a < DK && b < DV) {
            x = load4(state + a * DV + b);
        } else if (a < DK) {
            const float* row = state + a * DV;
            if (b < DV) x.x = row[b];
            if (b + 1 < DV) x.y = row[b + 1];
            if (b + 2 < DV) x.z = row[b + 2];
            if (b + 3 < DV) x.w = row[b + 3];
        }
        store4(tile + a * EV + b, x);
    }
    return tile;
}
#endif

// One pair of tokens of a step that is not SAFE: sum over d of row token exp(c_row - c_token); null rows give 0.
template <int LENGTH>
__device__ __forceinline__ float decayed_product(const act* row, const act* token, const float* c_row, const float* c_token) {
    if (row == nullptr || token == nullptr) return 0.0f;
    float sum = 0.0f;
#pragma unroll 1
    for (int d = 0; d < LENGTH; d++) sum += to_float(row[d]) * to_float(token[d]) * __expf(c_row[d] - c_token[d]);
    return sum;
}

// The same for sums whose decayed dimension stays: adds to sums [16, 8 N] of a step, for each of 8 L others, weight [16, 8 L]
// times vector(other) times the decay between the two; `c` is that of the step, token(other) a token of it. OTHERS_LATER:
// the others are rows that come after. Weights of pairs in the wrong order are 0.
template <bool OTHERS_LATER, int LENGTH, int N, int L, class Vector, class Token>
__device__ __noinline__ void add_one_by_one(float (&sums)[N][4], const float (&weights)[L][4], const float* c, Vector vector,
                                            Token token) {
    int group = LANE >> 2, quad = LANE & 3;
    for (int other = 0; other < 8 * L; other++) {
        const act* row = vector(other);
        const float* c_other = c + token(other) * FG;
        for (int i = 0; i < 2; i++) {
            float own = weights[other / 8][2 * i + other % 2];
            float weight = __shfl_sync(0xffffffffu, own, (LANE & 28) + other % 8 / 2);
            const float* c_own = c + (group + 8 * i) * FG;
            if (row == nullptr || weight == 0.0f) continue;
            for (int n = 0; n < N; n++) {
                for (int e = 0; e < 2; e++) {
                    int d = 8 * n + 2 * quad + e;
                    if (d >= LENGTH) continue;
                    float gates = OTHERS_LATER ? c_other[d] - c_own[d] : c_own[d] - c_other[d];
                    sums[n][2 * i + e] += weight * to_float(row[d]) * __expf(gates);
                }
            }
        }
    }
}

template <int N> __device__ __forceinline__ void copy_sums(float (&to)[N][4], const float (&from)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) to[n][i] = from[n][i];
    }
}
