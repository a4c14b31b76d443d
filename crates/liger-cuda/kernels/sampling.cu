// Choosing the next token from rows of logits: the largest, or one drawn.

// An integer that is ordered as the numbers are.
__device__ __forceinline__ u32 ordered(float x) {
    u32 bits = __float_as_uint(x);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

// Index of the largest of a row, the last of equals, in the lower half of `found`, which must be 0 before. Grid (shares, rows).
extern "C" __global__ void argmax(u64* found, const act* logits, int vocabulary) {
    const act* row = logits + static_cast<long long>(blockIdx.y) * vocabulary;
    u64 best = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < vocabulary; i += gridDim.x * blockDim.x) {
        u64 key = static_cast<u64>(ordered(to_float(row[i]))) << 32 | static_cast<u32>(i);
        best = key > best ? key : best;
    }
    for (int offset = 16; offset > 0; offset >>= 1) {
        u64 other = __shfl_xor_sync(0xffffffffu, best, offset);
        best = other > best ? other : best;
    }
    if ((threadIdx.x & 31) == 0) atomicMax(found + blockIdx.y, best);
}

#define THREADS 512
#define WARPS (THREADS / 32)
#define BINS 2048

struct Draw {
    int vocabulary, top_k;
    float temperature, top_p, min_p;
};

// A row and what is left of it: logits of at least `floor` whose key is at least `lowest`. Probabilities are weights
// exp((x - max) / temperature) in units of 2^-32: sums of integers do not depend on their order.
struct Row {
    const act* logits;
    int vocabulary;
    float top, floor, temperature;
    u32 lowest;

    // Weight of token i, 0 if it is out.
    __device__ __forceinline__ u64 weight(int i, u32& key_of) const {
        float x = to_float(logits[i]);
        key_of = ordered(x);
        if (!(x >= floor) || key_of < lowest) return 0;
        return static_cast<u64>(__expf((x - top) / temperature) * 4294967296.0f) + 1;
    }
};

__device__ __forceinline__ u64 warp_total(u64 x) {
    for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// total times p, from 0 to 1.
__device__ __forceinline__ u64 share_of(u64 total, float p) {
    return __umul64hi(total, static_cast<u64>(p * 9223372036854775808.0f)) * 2;
}

// The largest key above which, itself included, `wanted` weight (or as many tokens) lies: eleven bits of it at a time, from
// a histogram each. Every thread gets it.
template <bool COUNTS> __device__ __forceinline__ u32 lowest_key(const Row& row, u64 wanted, u64* bins) {
    __shared__ u32 prefix;
    __shared__ u64 missing;
    if (threadIdx.x == 0) prefix = 0, missing = wanted;
    for (int pass = 0; pass < 3; pass++) {
        int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0, bits = pass == 2 ? 10 : 11;
        for (int i = threadIdx.x; i < BINS; i += THREADS) bins[i] = 0;
        __syncthreads();
        u32 above = prefix;
        for (int i = threadIdx.x; i < row.vocabulary; i += THREADS) {
            u32 key;
            u64 weight = row.weight(i, key);
            if (weight == 0 || (pass > 0 && key >> (shift + bits) != above)) continue;
            atomicAdd(&bins[key >> shift & ((1u << bits) - 1)], COUNTS ? 1ull : weight);
        }
        __syncthreads();
        if (threadIdx.x < 32) {
            // Lane 0 has the highest bins.
            int own = (1 << bits) / 32, first = (1 << bits) - own * (threadIdx.x + 1);
            u64 sum = 0;
            for (int i = 0; i < own; i++) sum += bins[first + i];
            u64 before = sum;
            for (int offset = 1; offset < 32; offset <<= 1) {
                u64 other = __shfl_up_sync(0xffffffffu, before, offset);
                if (threadIdx.x >= offset) before += other;
            }
            u64 need = missing;
            u32 reached = __ballot_sync(0xffffffffu, before >= need);
            // Rounding may leave the last a little short: then everything is kept.
            int lane = reached == 0 ? 31 : __ffs(reached) - 1;
            __syncwarp();
            if (static_cast<int>(threadIdx.x) == lane) {
                u64 passed = before - sum;
                int bin = first + own - 1;
                while (bin > first && passed + bins[bin] < need) passed += bins[bin--];
                prefix = above << bits | bin;
                missing = need - min(need, passed);
            }
        }
        __syncthreads();
    }
    return prefix;
}

// One token a row by the weights that are left after min_p, top_k and top_p, in this order. draws [rows] from 0 to 1.
// Grid (rows).
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    sample(u32* chosen, const act* logits, const float* draws, Draw how) {
    __shared__ u64 bins[BINS];
    __shared__ u64 weights[WARPS];
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    Row row = {logits + static_cast<long long>(blockIdx.x) * how.vocabulary, how.vocabulary, NEGATIVE_INFINITY, 0.0f,
               how.temperature, 0};
    for (int i = threadIdx.x; i < how.vocabulary; i += THREADS) row.top = fmaxf(row.top, to_float(row.logits[i]));
    row.top = block_max(row.top);
    row.floor = row.top + how.temperature * logf(fmaxf(how.min_p, 1e-9f));
    if (how.top_k > 0 && how.top_k < how.vocabulary) row.lowest = lowest_key<true>(row, how.top_k, bins);
    // A stretch of the row a warp; what each weighs.
    int stretch = (how.vocabulary + WARPS * 32 - 1) / (WARPS * 32) * 32, first = warp * stretch;
    auto weigh = [&]() {
        u64 sum = 0;
        for (int i = first + lane; i < min(first + stretch, how.vocabulary); i += 32) {
            u32 key;
            sum += row.weight(i, key);
        }
        sum = warp_total(sum);
        __syncthreads();
        if (lane == 0) weights[warp] = sum;
        __syncthreads();
        u64 total = 0;
        for (int w = 0; w < WARPS; w++) total += weights[w];
        return total;
    };
    u64 total = weigh();
    if (how.top_p < 1.0f) {
        u64 wanted = max(share_of(total, how.top_p), 1ull);
        row.lowest = max(row.lowest, lowest_key<false>(row, wanted, bins));
        total = weigh();
    }
    u64 target = min(share_of(total, draws[blockIdx.x]), total - 1);
    u64 before = 0;
    for (int w = 0; w < warp; w++) before += weights[w];
    if (target < before || target >= before + weights[warp]) return;
    // This warp's stretch holds it.
    for (int i = first; i < min(first + stretch, how.vocabulary); i += 32) {
        u32 key;
        u64 own = i + lane < how.vocabulary ? row.weight(i + lane, key) : 0, upto = own;
        for (int offset = 1; offset < 32; offset <<= 1) {
            u64 other = __shfl_up_sync(0xffffffffu, upto, offset);
            if (lane >= offset) upto += other;
        }
        u32 reached = __ballot_sync(0xffffffffu, before + upto > target);
        if (reached != 0) {
            if (lane == __ffs(reached) - 1) chosen[blockIdx.x] = i + lane;
            return;
        }
        before += __shfl_sync(0xffffffffu, upto, 31);
    }
}
