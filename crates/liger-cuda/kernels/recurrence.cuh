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

struct ChunkInfo {
    int start;     // first row of the batch
    int len;       // tokens
    int sequence;  // which sequence
    int first;     // index of the sequence's first chunk
    int count;     // chunks of the sequence
};

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
