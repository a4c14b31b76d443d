// LoRA's products with matrices of few columns, for up to three projections that share their input x [N, inputs]:
// low_i = x a_i^T with a_i [RANK, inputs], and their gradients. Each reads the large matrix once for all of them, where one
// product a projection reads it again each time. PROJECTIONS projections; adapters are float32, products bfloat16. The float32
// device, which is for parity, uses products alone.

#ifdef ACT_BF16

#define THREADS 256
#define COLUMNS (RANK * PROJECTIONS)
#define TILES (COLUMNS / 8)
// Columns as the rows of a left factor.
#define PADDED ((COLUMNS + 15) / 16 * 16)
#define ROWS 64
#define ACROSS 128

// The projection's of three addresses.
template <class T> __device__ __forceinline__ T* choose(int i, T* first, T* second, T* third) {
    return i == 0 ? first : i == 1 ? second : third;
}

// low_i [N, RANK]. A warp takes every eighth 32 of the inputs for 64 rows; a thread's 16 bytes of a row are the inputs that two
// steps of mma want of it, in another order, which is the same for both factors. Grid (ceil(N / 64)).
extern "C" __global__ void __launch_bounds__(THREADS)
    low_rank_forward(act* low0, act* low1, act* low2, const float* a0, const float* a1, const float* a2, const act* x,
                     int rows, int inputs) {
    int group = LANE >> 2, quad = LANE & 3, first = blockIdx.x * ROWS;
    float sums[ROWS / 16][TILES][4];
#pragma unroll
    for (int m = 0; m < ROWS / 16; m++) set_zero(sums[m]);
#pragma unroll 2
    for (int k = WARP * 32 + quad * 8; k < inputs; k += 8 * 32) {
        uint4 left[ROWS / 8];
#pragma unroll
        for (int m = 0; m < ROWS / 8; m++) {
            int row = first + 8 * m + group;
            left[m] = make_uint4(0, 0, 0, 0);
            if (row < rows) left[m] = *reinterpret_cast<const uint4*>(x + static_cast<long long>(row) * inputs + k);
        }
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            const float* a = choose(n * 8 / RANK, a0, a1, a2) + static_cast<long long>(n * 8 % RANK + group) * inputs + k;
            float4 low = load4(a), high = load4(a + 4);
            FragmentB right[2];
            right[0].x[0] = pack(low.x, low.y), right[0].x[1] = pack(low.z, low.w);
            right[1].x[0] = pack(high.x, high.y), right[1].x[1] = pack(high.z, high.w);
#pragma unroll
            for (int m = 0; m < ROWS / 16; m++) {
                uint4 upper = left[2 * m], lower = left[2 * m + 1];
                mma(sums[m][n], FragmentA{{upper.x, lower.x, upper.y, lower.y}}, right[0]);
                mma(sums[m][n], FragmentA{{upper.z, lower.z, upper.w, lower.w}}, right[1]);
            }
        }
    }
    // The warps' sums: half of them at a time, for room.
    __shared__ float parts[4][ROWS][COLUMNS + 1];
    for (int half = 1; half >= 0; half--) {
        __syncthreads();
        if (WARP / 4 == half) {
#pragma unroll
            for (int m = 0; m < ROWS / 16; m++) {
#pragma unroll
                for (int n = 0; n < TILES; n++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        float* at = &parts[WARP % 4][16 * m + group + i / 2 * 8][8 * n + 2 * quad + i % 2];
                        *at = half == 1 ? sums[m][n][i] : *at + sums[m][n][i];
                    }
                }
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * COLUMNS; i += THREADS) {
        int r = i / COLUMNS, column = i % COLUMNS;
        if (first + r >= rows) continue;
        float sum = parts[0][r][column] + parts[1][r][column] + parts[2][r][column] + parts[3][r][column];
        act* low = choose(column / RANK, low0, low1, low2);
        low[static_cast<long long>(first + r) * RANK + column % RANK] = from_float<act>(sum);
    }
}

// Rows first.. of d_i [N, RANK] side by side into a tile [ROWS, PADDED + PAD], zero past `last`.
__device__ __forceinline__ void load_low(elem* tile, const act* d0, const act* d1, const act* d2, int first, int last) {
    constexpr int PER_ROW = PADDED / 8;
    for (int i = threadIdx.x; i < ROWS * PER_ROW; i += THREADS) {
        int r = i / PER_ROW, column = i % PER_ROW * 8;
        uint4 value = make_uint4(0, 0, 0, 0);
        if (first + r < last && column < COLUMNS) {
            const act* low = choose(column / RANK, d0, d1, d2) + static_cast<long long>(first + r) * RANK + column % RANK;
            value = *reinterpret_cast<const uint4*>(low);
        }
        *reinterpret_cast<uint4*>(tile + r * (PADDED + PAD) + column) = value;
    }
}

// dx [N, inputs] += sum_i dlow_i a_i, unless it is null, and parts [splits, COLUMNS, inputs]: dlow_i^T x of the rows of each
// split. Grid (ceil(inputs / 128), splits); a block takes 64 rows at a time, a warp 16 of its columns.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    low_rank_backward(float* parts, act* dx, const act* d0, const act* d1, const act* d2, const float* a0, const float* a1,
                      const float* a2, const act* x, int rows, int inputs) {
    Carver carve;
    elem* xt = carve.tile(ROWS, ACROSS);
    elem* dt = carve.tile(ROWS, PADDED);
    elem* at = carve.tile(PADDED, ACROSS);
    int group = LANE >> 2, quad = LANE & 3, first_column = blockIdx.x * ACROSS, own = WARP * 16;
    for (int i = threadIdx.x; i < PADDED * ACROSS; i += THREADS) {
        int r = i / ACROSS, column = first_column + i % ACROSS;
        float value = 0.0f;
        if (r < COLUMNS && column < inputs) {
            value = choose(r / RANK, a0, a1, a2)[static_cast<long long>(r % RANK) * inputs + column];
        }
        at[r * (ACROSS + PAD) + i % ACROSS] = from_float<elem>(value);
    }
    int blocks = (rows + ROWS - 1) / ROWS, each = (blocks + gridDim.y - 1) / gridDim.y;
    int begin = blockIdx.y * each * ROWS, end = min(rows, begin + each * ROWS);
    float sums[PADDED / 16][2][4];
#pragma unroll
    for (int m = 0; m < PADDED / 16; m++) set_zero(sums[m]);
    constexpr int PER_ROW = ACROSS / 8, EACH = ROWS * PER_ROW / THREADS;
    uint4 next[EACH];
    auto fetch = [&](int first) {
#pragma unroll
        for (int n = 0; n < EACH; n++) {
            int i = threadIdx.x + n * THREADS, r = first + i / PER_ROW, column = first_column + i % PER_ROW * 8;
            next[n] = make_uint4(0, 0, 0, 0);
            if (r < end && column < inputs) {
                next[n] = *reinterpret_cast<const uint4*>(x + static_cast<long long>(r) * inputs + column);
            }
        }
    };
    if (begin < end) fetch(begin);
    for (int first = begin; first < end; first += ROWS) {
        __syncthreads();
#pragma unroll
        for (int n = 0; n < EACH; n++) {
            int i = threadIdx.x + n * THREADS;
            *reinterpret_cast<uint4*>(xt + i / PER_ROW * (ACROSS + PAD) + i % PER_ROW * 8) = next[n];
        }
        load_low(dt, d0, d1, d2, first, end);
        __syncthreads();
        // On its way during the products.
        if (first + ROWS < end) fetch(first + ROWS);
        u32 old[ROWS / 16][2][2];
        auto place = [&](int m, int n, int half) {
            int r = first + 16 * m + 8 * half + group, column = first_column + own + 8 * n + 2 * quad;
            bool inside = r < end && column < inputs;
            return inside ? reinterpret_cast<u32*>(dx + static_cast<long long>(r) * inputs + column) : nullptr;
        };
        if (dx != nullptr) {
#pragma unroll
            for (int i = 0; i < ROWS / 4; i++) {
                const u32* from = place(i / 4, i / 2 % 2, i % 2);
                old[i / 4][i / 2 % 2][i % 2] = from == nullptr ? 0 : *from;
            }
        }
#pragma unroll
        for (int m = 0; m < PADDED / 16; m++) {
            product<ROWS, true, false>(sums[m], dt, PADDED + PAD, m * 16, xt, ACROSS + PAD, own);
        }
        if (dx == nullptr) continue;
#pragma unroll
        for (int m = 0; m < ROWS / 16; m++) {
            float added[2][4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                u32 pair = old[m][i / 2][i % 2];
                added[i / 2][2 * (i % 2)] = __uint_as_float(pair << 16);
                added[i / 2][2 * (i % 2) + 1] = __uint_as_float(pair & 0xffff0000u);
            }
            product<PADDED, false, false>(added, dt, PADDED + PAD, m * 16, at, ACROSS + PAD, own);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                u32* to = place(m, i / 2, i % 2);
                if (to != nullptr) *to = pack(added[i / 2][2 * (i % 2)], added[i / 2][2 * (i % 2) + 1]);
            }
        }
    }
#pragma unroll
    for (int m = 0; m < PADDED / 16; m++) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int r = 16 * m + group + i / 2 % 2 * 8, column = first_column + own + i / 4 * 8 + 2 * quad + i % 2;
            if (r >= COLUMNS || column >= inputs) continue;
            parts[(static_cast<long long>(blockIdx.y) * COLUMNS + r) * inputs + column] = sums[m][i / 4][i % 4];
        }
    }
}

// da_i [RANK, inputs] += the sum of the parts. Grid (ceil(COLUMNS * inputs / 256)).
extern "C" __global__ void low_rank_add(float* da0, float* da1, float* da2, const float* parts, int splits, int inputs) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, length = COLUMNS * inputs;
    if (i >= length) return;
    float sum = 0.0f;
    for (int n = 0; n < splits; n++) sum += parts[static_cast<long long>(n) * length + i];
    int of_one = RANK * inputs;
    choose(i / of_one, da0, da1, da2)[i % of_one] += sum;
}

#endif
