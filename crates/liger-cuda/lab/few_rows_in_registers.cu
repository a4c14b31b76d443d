// Linear layers of a few rows, at the speed of reading the weights: y [rows, outputs] = x [rows, inputs] w^T with bfloat16
// x and w [outputs, inputs]. A norm before and a SwiGLU or an addition behind are part of it.
//
// A block of 8 warps has 16 outputs; its warps share the inputs, 32 at a time. Products are m16n8k16 with the weights as the
// left factor, straight from memory: a thread reads 8 neighbouring inputs of its rows of w and x, and counts them as those
// that the product's layout gives it, which is the same order of inputs on both sides.
//
// The norm: its weight multiplies x as it is read, its 1 / rms the sums at the end.

#define MOST_OUTPUTS 3
#define BLOCK_OUTPUTS 16
#define WARPS 8

struct FewRows {
    int rows, inputs, parts;
    int outputs[MOST_OUTPUTS];
    float epsilon;
    int add;   // to what y holds
    int wide;  // y is float32
};

struct Eight {
    u32 x[4];
};

__device__ __forceinline__ Eight load_weights(const bf16* at) {
    Eight r;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r.x[0]), "=r"(r.x[1]), "=r"(r.x[2]), "=r"(r.x[3]) : "l"(at));
    return r;
}

__device__ __forceinline__ Eight load_eight(const act* at) {
    uint4 raw = *reinterpret_cast<const uint4*>(at);
    return {{raw.x, raw.y, raw.z, raw.w}};
}

__device__ __forceinline__ void multiply(float (&c)[4], const Eight& upper, const Eight& lower, const Eight& x) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(upper.x[i]), "r"(lower.x[i]), "r"(upper.x[i + 1]), "r"(lower.x[i + 1]), "r"(x.x[i]), "r"(x.x[i + 1]));
    }
}

// x times the norm's weight.
__device__ __forceinline__ void normalize(Eight& x, const float* norm) {
    float4 first = load4(norm), second = load4(norm + 4);
    float weight[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float low = __uint_as_float(x.x[i] << 16), high = __uint_as_float(x.x[i] & 0xffff0000u);
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x.x[i]) : "f"(high * weight[2 * i + 1]), "f"(low * weight[2 * i]));
    }
}

// Sixteen outputs of a layer: its weights [outputs, inputs], the first output, and how many there are.
struct Outputs {
    const bf16* w;
    int first, count;
};

// TILES of 8 rows; GROUPS of outputs, of one layer or of two that belong together. finish(row, i, sums) is called for every
// row and i < 16, with the sum of output i of each group. AHEAD loads of each row of weights are under way at once.
template <int TILES, int GROUPS, int AHEAD, class Finish>
__device__ __forceinline__ void few_rows(const Outputs (&groups)[GROUPS], const act* x, const float* norm, const FewRows& s,
                                         Finish finish) {
    constexpr int STRIDE = 32 * WARPS;
    __shared__ float sums[WARPS][GROUPS][TILES][8][BLOCK_OUTPUTS];
    __shared__ float squares_of[WARPS][TILES * 8];
    const Eight nothing = {{0, 0, 0, 0}};
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = lane >> 2, quad = lane & 3;
    // The thread's inputs of its first row of weights; the second lies `below`. Rows past the end read others that are there,
    // and are not written.
    const bf16* own[GROUPS];
    int below[GROUPS];
#pragma unroll
    for (int m = 0; m < GROUPS; m++) {
        int first = groups[m].first + group, count = groups[m].count;
        own[m] = groups[m].w + static_cast<long long>(min(first, count - 1)) * s.inputs + quad * 8;
        below[m] = first + 8 < count ? 8 * s.inputs : 0;
    }
    x += group * s.inputs + quad * 8;
    float c[GROUPS][TILES][4] = {}, squares[(TILES + 1) / 2][4] = {};
    Eight upper[AHEAD][GROUPS], lower[AHEAD][GROUPS], row[AHEAD][TILES];
    auto load_w = [&](int a, int k) {
#pragma unroll
        for (int m = 0; m < GROUPS; m++) {
            upper[a][m] = lower[a][m] = nothing;
            if (k + quad * 8 >= s.inputs) continue;
            upper[a][m] = load_weights(own[m] + k);
            lower[a][m] = load_weights(own[m] + k + below[m]);
        }
    };
    auto load_x = [&](int a, int k) {
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            row[a][t] = nothing;
            if (k + quad * 8 < s.inputs && 8 * t + group < s.rows) row[a][t] = load_eight(x + 8 * t * s.inputs + k);
        }
    };
#pragma unroll
    for (int a = 0; a < AHEAD; a++) load_w(a, warp * 32 + a * STRIDE), load_x(a, warp * 32 + a * STRIDE);
    for (int base = warp * 32; base < s.inputs; base += AHEAD * STRIDE) {
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            int k = base + a * STRIDE;
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                if (norm != nullptr) {
                    // x x^T, whose diagonal are the squares: of even tiles in the upper half, of odd ones in the lower.
                    if (t % 2 == 0) multiply(squares[t / 2], row[a][t], nothing, row[a][t]);
                    else multiply(squares[t / 2], nothing, row[a][t], row[a][t]);
                    if (k + quad * 8 < s.inputs) normalize(row[a][t], norm + quad * 8 + k);
                }
#pragma unroll
                for (int m = 0; m < GROUPS; m++) multiply(c[m][t], upper[a][m], lower[a][m], row[a][t]);
            }
            load_w(a, k + AHEAD * STRIDE);
            load_x(a, k + AHEAD * STRIDE);
        }
    }
#pragma unroll
    for (int t = 0; t < TILES; t++) {
#pragma unroll
        for (int m = 0; m < GROUPS; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) sums[warp][m][t][2 * quad + (i & 1)][group + (i >> 1) * 8] = c[m][t][i];
        }
        if (group >> 1 == quad) {
            squares_of[warp][8 * t + group] = group & 1 ? squares[t / 2][t % 2 * 2 + 1] : squares[t / 2][t % 2 * 2];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < TILES * 8 * BLOCK_OUTPUTS; i += 32 * WARPS) {
        int n = i / BLOCK_OUTPUTS, o = i % BLOCK_OUTPUTS;
        if (n >= s.rows) continue;
        float scale = 1.0f;
        if (norm != nullptr) {
            float total = 0.0f;
            for (int k = 0; k < WARPS; k++) total += squares_of[k][n];
            scale = rsqrtf(total / s.inputs + s.epsilon);
        }
        float result[GROUPS];
#pragma unroll
        for (int m = 0; m < GROUPS; m++) {
            result[m] = 0.0f;
#pragma unroll
            for (int k = 0; k < WARPS; k++) result[m] += sums[k][m][n / 8][n % 8][o];
            result[m] *= scale;
        }
        finish(n, o, result);
    }
}

// Up to three layers of one input, y := x w^T + bias, or y += x w^T, GROUPS * 16 outputs a block. Grid (blocks of all layers).
template <int TILES, int GROUPS>
__device__ __forceinline__ void linears(void* const (&y)[MOST_OUTPUTS], const bf16* const (&w)[MOST_OUTPUTS],
                                        const float* const (&bias)[MOST_OUTPUTS], const act* x, const float* norm,
                                        const FewRows& s) {
    constexpr int ACROSS = GROUPS * BLOCK_OUTPUTS;
    int block = blockIdx.x, part = 0;
#pragma unroll
    for (int i = 0; i < MOST_OUTPUTS - 1; i++) {
        int blocks = (s.outputs[i] + ACROSS - 1) / ACROSS;
        if (part == i && i + 1 < s.parts && block >= blocks) block -= blocks, part++;
    }
    // Chosen by hand: an index known only here would put the arrays into local memory.
    const bf16* weights = part == 0 ? w[0] : part == 1 ? w[1] : w[2];
    const float* own_bias = part == 0 ? bias[0] : part == 1 ? bias[1] : bias[2];
    void* out = part == 0 ? y[0] : part == 1 ? y[1] : y[2];
    int count = part == 0 ? s.outputs[0] : part == 1 ? s.outputs[1] : s.outputs[2];
    Outputs groups[GROUPS];
#pragma unroll
    for (int m = 0; m < GROUPS; m++) groups[m] = {weights, block * ACROSS + m * BLOCK_OUTPUTS, count};
    few_rows<TILES, GROUPS, TILES * GROUPS == 1 ? 4 : TILES * GROUPS == 8 ? 1 : 2>(groups, x, norm, s, [&](int n, int i, const float (&sums)[GROUPS]) {
#pragma unroll
        for (int m = 0; m < GROUPS; m++) {
            int o = groups[m].first + i;
            if (o >= count) break;
            float value = sums[m] + (own_bias != nullptr ? own_bias[o] : 0.0f);
            long long at = static_cast<long long>(n) * count + o;
            if (s.wide) {
                float* to = static_cast<float*>(out) + at;
                *to = s.add ? *to + value : value;
            } else {
                act* to = static_cast<act*>(out) + at;
                *to = from_float<act>(s.add ? to_float(*to) + value : value);
            }
        }
    });
}

// y = silu(x gate^T) (x up^T). Grid (blocks).
template <int TILES>
__device__ __forceinline__ void swiglu(act* y, const bf16* gate, const bf16* up, const act* x, const float* norm,
                                       const FewRows& s) {
    int first = blockIdx.x * BLOCK_OUTPUTS, count = s.outputs[0];
    const Outputs groups[2] = {{gate, first, count}, {up, first, count}};
    few_rows<TILES, 2, TILES == 4 ? 1 : 2>(groups, x, norm, s, [&](int n, int i, const float (&sums)[2]) {
        if (first + i >= count) return;
        y[static_cast<long long>(n) * count + first + i] = from_float<act>(sums[0] * sigmoid(sums[0]) * sums[1]);
    });
}

// As many blocks as registers allow: what is under way at once is what hides the memory's latency.
#define LINEARS(TILES, GROUPS, BLOCKS)                                                                                    \
    extern "C" __global__ void __launch_bounds__(256, BLOCKS)                                                             \
        linears_##TILES##_##GROUPS(void* y0, void* y1, void* y2, const bf16* w0, const bf16* w1, const bf16* w2,          \
                                   const float* b0, const float* b1, const float* b2, const act* x, const float* norm,    \
                                   FewRows s) {                                                                           \
        void* y[3] = {y0, y1, y2};                                                                                        \
        const bf16* w[3] = {w0, w1, w2};                                                                                  \
        const float* bias[3] = {b0, b1, b2};                                                                              \
        linears<TILES, GROUPS>(y, w, bias, x, norm, s);                                                                   \
    }
#define SWIGLU(TILES, BLOCKS)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256, BLOCKS)                                                             \
        swiglu_##TILES(act* y, const bf16* gate, const bf16* up, const act* x, const float* norm, FewRows s) {            \
        swiglu<TILES>(y, gate, up, x, norm, s);                                                                           \
    }

#ifdef ACT_BF16
LINEARS(1, 1, 2)
LINEARS(2, 1, 3)
LINEARS(4, 1, 2)
LINEARS(1, 2, 3)
LINEARS(2, 2, 2)
LINEARS(4, 2, 2)
SWIGLU(1, 3)
SWIGLU(2, 2)
SWIGLU(4, 2)
#endif
