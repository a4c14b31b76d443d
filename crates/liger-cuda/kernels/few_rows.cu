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

// x times the norm's weight; adds its squares to `squares`.
__device__ __forceinline__ void normalize(Eight& x, const float* norm, float& squares) {
    float4 first = load4(norm), second = load4(norm + 4);
    float weight[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float low = __uint_as_float(x.x[i] << 16), high = __uint_as_float(x.x[i] & 0xffff0000u);
        squares += low * low + high * high;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x.x[i]) : "f"(high * weight[2 * i + 1]), "f"(low * weight[2 * i]));
    }
}

// TILES of 8 rows; MATRICES 1, or 2 whose sums `finish` takes together. `first` is the first of the block's outputs,
// `outputs` how many the matrices have. finish(row, output, sums) is called once for each.
template <int TILES, int MATRICES, class Finish>
__device__ __forceinline__ void few_rows(const bf16* const (&w)[MATRICES], const act* x, const float* norm, const FewRows& s,
                                         int first, int outputs, Finish finish) {
    constexpr int AHEAD = 2 * MATRICES + TILES <= 4 ? 4 : 2, STRIDE = 32 * WARPS;
    __shared__ float sums[WARPS][MATRICES][TILES][8][BLOCK_OUTPUTS];
    __shared__ float squares_of[WARPS][TILES * 8];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = lane >> 2, quad = lane & 3;
    long long upper_row = static_cast<long long>(min(first + group, outputs - 1)) * s.inputs;
    long long lower_row = static_cast<long long>(min(first + group + 8, outputs - 1)) * s.inputs;
    float c[MATRICES][TILES][4] = {}, squares[TILES] = {};
    bool waited = false;
    for (int base = warp * 32; base < s.inputs; base += AHEAD * STRIDE) {
        Eight upper[AHEAD][MATRICES], lower[AHEAD][MATRICES], row[AHEAD][TILES];
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            int k = base + a * STRIDE + quad * 8;
#pragma unroll
            for (int m = 0; m < MATRICES; m++) {
                upper[a][m] = lower[a][m] = {{0, 0, 0, 0}};
                if (k >= s.inputs) continue;
                upper[a][m] = load_weights(w[m] + upper_row + k);
                lower[a][m] = load_weights(w[m] + lower_row + k);
            }
        }
        // The first weights are under way before the step's earlier kernels are done.
        if (!waited) wait_for_earlier();
        waited = true;
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            int k = base + a * STRIDE + quad * 8;
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                int n = 8 * t + group;
                row[a][t] = {{0, 0, 0, 0}};
                if (k < s.inputs && n < s.rows) row[a][t] = load_eight(x + n * s.inputs + k);
            }
        }
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            int k = base + a * STRIDE + quad * 8;
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                if (norm != nullptr && k < s.inputs) normalize(row[a][t], norm + k, squares[t]);
#pragma unroll
                for (int m = 0; m < MATRICES; m++) multiply(c[m][t], upper[a][m], lower[a][m], row[a][t]);
            }
        }
    }
    if (!waited) wait_for_earlier();
#pragma unroll
    for (int t = 0; t < TILES; t++) {
#pragma unroll
        for (int m = 0; m < MATRICES; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) sums[warp][m][t][2 * quad + (i & 1)][group + (i >> 1) * 8] = c[m][t][i];
        }
        float total = squares[t];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        if (quad == 0) squares_of[warp][8 * t + group] = total;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < TILES * 8 * BLOCK_OUTPUTS; i += 32 * WARPS) {
        int n = i / BLOCK_OUTPUTS, o = i % BLOCK_OUTPUTS;
        if (n >= s.rows || first + o >= outputs) continue;
        float scale = 1.0f;
        if (norm != nullptr) {
            float total = 0.0f;
            for (int k = 0; k < WARPS; k++) total += squares_of[k][n];
            scale = rsqrtf(total / s.inputs + s.epsilon);
        }
        float result[MATRICES];
#pragma unroll
        for (int m = 0; m < MATRICES; m++) {
            result[m] = 0.0f;
#pragma unroll
            for (int k = 0; k < WARPS; k++) result[m] += sums[k][m][n / 8][n % 8][o];
            result[m] *= scale;
        }
        finish(n, first + o, result);
    }
}

// Up to three layers of one input, y := x w^T + bias, or y += x w^T. Grid (blocks of all layers).
template <int TILES>
__device__ __forceinline__ void linears(void* const (&y)[MOST_OUTPUTS], const bf16* const (&w)[MOST_OUTPUTS],
                                        const float* const (&bias)[MOST_OUTPUTS], const act* x, const float* norm,
                                        const FewRows& s) {
    let_later_start();
    int block = blockIdx.x, part = 0;
#pragma unroll
    for (int i = 0; i < MOST_OUTPUTS - 1; i++) {
        int blocks = (s.outputs[i] + BLOCK_OUTPUTS - 1) / BLOCK_OUTPUTS;
        if (part == i && i + 1 < s.parts && block >= blocks) block -= blocks, part++;
    }
    // Chosen by hand: an index known only here would put the arrays into local memory.
    const bf16* weights[1] = {part == 0 ? w[0] : part == 1 ? w[1] : w[2]};
    const float* own_bias = part == 0 ? bias[0] : part == 1 ? bias[1] : bias[2];
    void* out = part == 0 ? y[0] : part == 1 ? y[1] : y[2];
    int outputs = part == 0 ? s.outputs[0] : part == 1 ? s.outputs[1] : s.outputs[2];
    few_rows<TILES, 1>(weights, x, norm, s, block * BLOCK_OUTPUTS, outputs, [&](int n, int o, const float (&sum)[1]) {
        float value = sum[0] + (own_bias != nullptr ? own_bias[o] : 0.0f);
        long long at = static_cast<long long>(n) * outputs + o;
        if (s.wide) {
            float* to = static_cast<float*>(out) + at;
            *to = s.add ? *to + value : value;
        } else {
            act* to = static_cast<act*>(out) + at;
            *to = from_float<act>(s.add ? to_float(*to) + value : value);
        }
    });
}

// y = silu(x gate^T) (x up^T). Grid (blocks).
template <int TILES>
__device__ __forceinline__ void swiglu(act* y, const bf16* gate, const bf16* up, const act* x, const float* norm,
                                       const FewRows& s) {
    let_later_start();
    const bf16* w[2] = {gate, up};
    few_rows<TILES, 2>(w, x, norm, s, blockIdx.x * BLOCK_OUTPUTS, s.outputs[0],
                       [&](int n, int o, const float (&sum)[2]) {
                           y[static_cast<long long>(n) * s.outputs[0] + o] =
                               from_float<act>(sum[0] * sigmoid(sum[0]) * sum[1]);
                       });
}

#define LINEARS(TILES)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(256)                                                                     \
        linears_##TILES(void* y0, void* y1, void* y2, const bf16* w0, const bf16* w1, const bf16* w2, const float* b0,    \
                        const float* b1, const float* b2, const act* x, const float* norm, FewRows s) {                   \
        void* y[3] = {y0, y1, y2};                                                                                        \
        const bf16* w[3] = {w0, w1, w2};                                                                                  \
        const float* bias[3] = {b0, b1, b2};                                                                              \
        linears<TILES>(y, w, bias, x, norm, s);                                                                           \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256)                                                                     \
        swiglu_##TILES(act* y, const bf16* gate, const bf16* up, const act* x, const float* norm, FewRows s) {            \
        swiglu<TILES>(y, gate, up, x, norm, s);                                                                           \
    }

#ifdef ACT_BF16
LINEARS(1)
LINEARS(2)
LINEARS(4)
#endif
