// Linear layers of a few rows, at the speed of reading the weights: y [rows, outputs] = x [rows, inputs] w^T with bfloat16
// x and w [outputs, inputs]. A norm before and a SwiGLU or an addition behind are part of it.
//
// A block of 8 warps has 16 outputs or a few times as many; its warps share the inputs, 32 at a time. Products are m16n8k16
// with the weights as the left factor: a thread reads 8 neighbouring inputs of its rows of w and x, and counts them as those
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

__device__ __forceinline__ void multiply(float (&c)[4], const Eight& upper, const Eight& lower, const Eight& x) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(upper.x[i]), "r"(lower.x[i]), "r"(upper.x[i + 1]), "r"(lower.x[i + 1]), "r"(x.x[i]), "r"(x.x[i + 1]));
    }
}

// 16 bytes of shared memory, without waiting for them; zeros if they are not wanted.
__device__ __forceinline__ void fetch16(uint4* to, const void* from, bool wanted) {
    u32 at = static_cast<u32>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(wanted ? 16 : 0) : "memory");
}

// x times the norm's weight.
__device__ __forceinline__ void normalize(Eight& x, float4 first, float4 second) {
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

// What a thread sums: outputs of TILES of 8 rows and GROUPS of 16 outputs, and the rows' squares.
template <int TILES, int GROUPS> struct Sums {
    // Tiles whose sums are in shared memory at once, and floats that they take there.
    static constexpr int TOGETHER = TILES < 4 ? TILES : 4, FLOATS = WARPS * GROUPS * TOGETHER * 8 * BLOCK_OUTPUTS;
    float c[GROUPS][TILES][4] = {}, squares[(TILES + 1) / 2][4] = {};

    // Takes in 8 inputs of one tile's rows; `norm(half)` are four of the norm's weights of these, where there is a norm.
    template <class Norm>
    __device__ __forceinline__ void add(int t, Eight x, const Eight (&upper)[GROUPS], const Eight (&lower)[GROUPS],
                                        bool has_norm, Norm norm) {
        const Eight nothing = {{0, 0, 0, 0}};
        if (has_norm) {
            // x x^T, whose diagonal are the squares: of even tiles in the upper half, of odd ones in the lower.
            if (t % 2 == 0) multiply(squares[t / 2], x, nothing, x);
            else multiply(squares[t / 2], nothing, x, x);
            normalize(x, norm(0), norm(1));
        }
#pragma unroll
        for (int m = 0; m < GROUPS; m++) multiply(c[m][t], upper[m], lower[m], x);
    }

    // finish(row, i, sums) for every row and i < 16, with the sum of output i of each group over all warps. `memory` has room
    // for FLOATS.
    template <class Finish>
    __device__ __forceinline__ void finish_rows(float* memory, bool normalizes, const FewRows& s, Finish finish) {
        __shared__ float squares_of[WARPS][TILES * 8];
        auto sums = reinterpret_cast<float(*)[GROUPS][TOGETHER][8][BLOCK_OUTPUTS]>(memory);
        int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = lane >> 2, quad = lane & 3;
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            if (group >> 1 == quad) {
                squares_of[warp][8 * t + group] = group & 1 ? squares[t / 2][t % 2 * 2 + 1] : squares[t / 2][t % 2 * 2];
            }
        }
#pragma unroll
        for (int first = 0; first < TILES; first += TOGETHER) {
            if (first > 0) __syncthreads();
#pragma unroll
            for (int t = 0; t < TOGETHER; t++) {
#pragma unroll
                for (int m = 0; m < GROUPS; m++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        sums[warp][m][t][2 * quad + (i & 1)][group + (i >> 1) * 8] = c[m][first + t][i];
                    }
                }
            }
            __syncthreads();
            for (int i = threadIdx.x; i < TOGETHER * 8 * BLOCK_OUTPUTS; i += 32 * WARPS) {
                int t = i / (8 * BLOCK_OUTPUTS), r = i / BLOCK_OUTPUTS % 8, o = i % BLOCK_OUTPUTS, n = (first + t) * 8 + r;
                if (n >= s.rows) continue;
                float scale = 1.0f;
                if (normalizes) {
                    float total = 0.0f;
                    for (int k = 0; k < WARPS; k++) total += squares_of[k][n];
                    scale = rsqrtf(total / s.inputs + s.epsilon);
                }
                float result[GROUPS];
#pragma unroll
                for (int m = 0; m < GROUPS; m++) {
                    result[m] = 0.0f;
#pragma unroll
                    for (int k = 0; k < WARPS; k++) result[m] += sums[k][m][t][r][o];
                    result[m] *= scale;
                }
                finish(n, o, result);
            }
        }
    }
};

// A thread's inputs of its first row of weights of each group; the second lies `below`. Rows past the end read others that are
// there, and are not written.
template <int GROUPS> struct OwnWeights {
    const bf16* first[GROUPS];
    int below[GROUPS];
    __device__ __forceinline__ OwnWeights(const Outputs (&groups)[GROUPS], const FewRows& s) {
        int group = (threadIdx.x & 31) >> 2, quad = threadIdx.x & 3;
#pragma unroll
        for (int m = 0; m < GROUPS; m++) {
            int row = groups[m].first + group, count = groups[m].count;
            first[m] = groups[m].w + static_cast<long long>(min(row, count - 1)) * s.inputs + quad * 8;
            below[m] = row + 8 < count ? 8 * s.inputs : 0;
        }
    }
};

// Stages of all that a thread needs for 8 of its inputs: as many as let two blocks share a multiprocessor, or of more than 32
// rows, one.
__host__ __device__ constexpr int stages(int tiles, int groups) {
    int fit = (tiles == 8 ? 224 : 96) / (4 * (2 * groups + tiles));
    return fit < 8 ? fit : 8;
}

// TILES of 8 rows; GROUPS of outputs, of one layer or of two that belong together. What is under way goes into shared memory, in
// slots that nobody but its thread touches. A row's sums are taken in the same order however many rows there are.
template <int TILES, int GROUPS, class Finish>
__device__ __forceinline__ void few_rows(const Outputs (&groups)[GROUPS], const act* x, const float* norm, const FewRows& s,
                                         Finish finish) {
    constexpr int STAGES = stages(TILES, GROUPS);
    constexpr int STRIDE = 32 * WARPS, SLOTS = 2 * GROUPS + TILES;
    typedef Sums<TILES, GROUPS> AllSums;
    extern __shared__ uint4 staged[];  // [STAGES][SLOTS][threads]: weights, rows of x
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = lane >> 2, quad = lane & 3;
    OwnWeights<GROUPS> own(groups, s);
    x += group * s.inputs + quad * 8;
    AllSums sums;
    auto slot = [&](int stage, int i) { return staged + (stage * SLOTS + i) * 32 * WARPS + threadIdx.x; };
    auto fetch = [&](int stage, int k) {
        bool inside = k + quad * 8 < s.inputs;
        if (k < s.inputs) {
#pragma unroll
            for (int m = 0; m < GROUPS; m++) {
                fetch16(slot(stage, 2 * m), own.first[m] + k, inside);
                fetch16(slot(stage, 2 * m + 1), own.first[m] + k + own.below[m], inside);
            }
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                fetch16(slot(stage, 2 * GROUPS + t), x + 8 * t * s.inputs + k, inside && 8 * t + group < s.rows);
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    auto eight = [&](int stage, int i) -> Eight {
        uint4 raw = *slot(stage, i);
        return {{raw.x, raw.y, raw.z, raw.w}};
    };
#pragma unroll
    for (int a = 0; a < STAGES - 1; a++) fetch(a, warp * 32 + a * STRIDE);
    int stage = 0, next = STAGES - 1;
    for (int k = warp * 32; k < s.inputs; k += STRIDE) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        Eight upper[GROUPS], lower[GROUPS];
#pragma unroll
        for (int m = 0; m < GROUPS; m++) upper[m] = eight(stage, 2 * m), lower[m] = eight(stage, 2 * m + 1);
        // Through the L1 cache, which cp.async goes past: all blocks want the same few at once.
        float4 weights[2] = {};
        if (norm != nullptr && k + quad * 8 < s.inputs) {
            weights[0] = load4(norm + quad * 8 + k), weights[1] = load4(norm + quad * 8 + k + 4);
        }
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            Eight row = eight(stage, 2 * GROUPS + t);
            sums.add(t, row, upper, lower, norm != nullptr, [&](int half) { return weights[half]; });
        }
        fetch(next, k + (STAGES - 1) * STRIDE);
        stage = stage + 1 == STAGES ? 0 : stage + 1, next = next + 1 == STAGES ? 0 : next + 1;
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    sums.finish_rows(reinterpret_cast<float*>(staged), norm != nullptr, s, finish);
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
    few_rows<TILES, GROUPS>(groups, x, norm, s, [&](int n, int i, const float (&sums)[GROUPS]) {
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

// y = silu(x gate^T) (x up^T), 16 PAIRS outputs a block. Grid (blocks).
template <int TILES, int PAIRS>
__device__ __forceinline__ void swiglu(act* y, const bf16* gate, const bf16* up, const act* x, const float* norm,
                                       const FewRows& s) {
    int first = blockIdx.x * PAIRS * BLOCK_OUTPUTS, count = s.outputs[0];
    Outputs groups[2 * PAIRS];
#pragma unroll
    for (int m = 0; m < PAIRS; m++) {
        groups[m] = {gate, first + m * BLOCK_OUTPUTS, count}, groups[PAIRS + m] = {up, first + m * BLOCK_OUTPUTS, count};
    }
    few_rows<TILES, 2 * PAIRS>(groups, x, norm, s, [&](int n, int i, const float (&sums)[2 * PAIRS]) {
#pragma unroll
        for (int m = 0; m < PAIRS; m++) {
            int o = groups[m].first + i;
            if (o >= count) break;
            float y_gate = sums[m];
            y[static_cast<long long>(n) * count + o] = from_float<act>(y_gate * sigmoid(y_gate) * sums[PAIRS + m]);
        }
    });
}

#define LINEARS(TILES, GROUPS)                                                                                            \
    extern "C" __global__ void __launch_bounds__(256, TILES == 8 ? 1 : 2)                                                 \
        linears_##TILES##_##GROUPS(void* y0, void* y1, void* y2, const bf16* w0, const bf16* w1, const bf16* w2,          \
                                   const float* b0, const float* b1, const float* b2, const act* x, const float* norm,    \
                                   FewRows s) {                                                                           \
        void* y[3] = {y0, y1, y2};                                                                                        \
        const bf16* w[3] = {w0, w1, w2};                                                                                  \
        const float* bias[3] = {b0, b1, b2};                                                                              \
        linears<TILES, GROUPS>(y, w, bias, x, norm, s);                                                                   \
    }
#define SWIGLU(TILES, PAIRS)                                                                                              \
    extern "C" __global__ void __launch_bounds__(256, TILES == 8 ? 1 : 2)                                                 \
        swiglu_##TILES##_##PAIRS(act* y, const bf16* gate, const bf16* up, const act* x, const float* norm, FewRows s) {  \
        swiglu<TILES, PAIRS>(y, gate, up, x, norm, s);                                                                    \
    }

#ifdef ACT_BF16
LINEARS(1, 1)
LINEARS(2, 1)
LINEARS(4, 1)
LINEARS(8, 1)
LINEARS(1, 2)
LINEARS(2, 2)
LINEARS(4, 2)
LINEARS(8, 2)
LINEARS(8, 4)
SWIGLU(1, 1)
SWIGLU(2, 1)
SWIGLU(4, 1)
SWIGLU(8, 1)
SWIGLU(8, 2)
#endif
