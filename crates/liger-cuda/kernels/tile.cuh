// Matrix products of tiles in shared memory on tensor cores.
//
// With bfloat16 activations a tile holds bfloat16 and a product runs on m16n8k16. With float32 activations a tile holds
// float32, every operand is split into two tf32 numbers and three products of m16n8k8 are added: about float32's
// accuracy. Sums are float32 in either. A tile's leading dimension is its width (a multiple of 16) plus PAD, which puts
// the rows that one load of a fragment touches into different banks.

#ifdef ACT_BF16
typedef bf16 elem;
#define PAD 8
#define K_STEP 16
#else
typedef float elem;
#define PAD 4
#define K_STEP 8
#endif
#define FLOAT_PAD 4

#define LANE static_cast<int>(threadIdx.x & 31)
#define WARP static_cast<int>(threadIdx.x >> 5)

struct FragmentA {
    u32 x[4];
#ifndef ACT_BF16
    u32 low[4];
#endif
};

struct FragmentB {
    u32 x[2];
#ifndef ACT_BF16
    u32 low[2];
#endif
};

#ifdef ACT_BF16

__device__ __forceinline__ u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

// Rows row..row + 16, k..k + 16 of a matrix that is stored [m][k], or [k][m] if TRANSPOSED.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_a(FragmentA& a, const elem* tile, int ld, int row, int k) {
    int lane = LANE;
    if (TRANSPOSED) {
        u32 at = shared_address(tile + (k + (lane & 7) + (lane >> 4) * 8) * ld + row + ((lane >> 3) & 1) * 8);
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(a.x[0]), "=r"(a.x[1]), "=r"(a.x[2]), "=r"(a.x[3]) : "r"(at));
    } else {
        u32 at = shared_address(tile + (row + (lane & 15)) * ld + k + (lane >> 4) * 8);
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(a.x[0]), "=r"(a.x[1]), "=r"(a.x[2]), "=r"(a.x[3]) : "r"(at));
    }
}

// k..k + 16, columns n..n + 8 of a matrix that is stored [k][n], or [n][k] if BY_COLUMN.
template <bool BY_COLUMN>
__device__ __forceinline__ void load_b(FragmentB& b, const elem* tile, int ld, int k, int n) {
    int lane = LANE & 15;
    if (BY_COLUMN) {
        u32 at = shared_address(tile + (n + (lane & 7)) * ld + k + (lane >> 3) * 8);
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(b.x[0]), "=r"(b.x[1]) : "r"(at));
    } else {
        u32 at = shared_address(tile + (k + lane) * ld + n);
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(b.x[0]), "=r"(b.x[1]) : "r"(at));
    }
}

__device__ __forceinline__ void mma(float (&c)[4], const FragmentA& a, const FragmentB& b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]));
}

__device__ __forceinline__ u32 scale_pair(u32 x, float low, float high) {
    return pack(__uint_as_float(x << 16) * low, __uint_as_float(x & 0xffff0000u) * high);
}

// Every column times a factor: those of the fragment's columns begin at `factors`.
__device__ __forceinline__ void scale_columns(FragmentA& a, const float* factors) {
    int at = 2 * (LANE & 3);
    a.x[0] = scale_pair(a.x[0], factors[at], factors[at + 1]);
    a.x[1] = scale_pair(a.x[1], factors[at], factors[at + 1]);
    a.x[2] = scale_pair(a.x[2], factors[at + 8], factors[at + 9]);
    a.x[3] = scale_pair(a.x[3], factors[at + 8], factors[at + 9]);
}

// Sums [16, n] as the left factor of another product: the K_STEP columns from `k` of c.
template <int N> __device__ __forceinline__ void sums_as_a(FragmentA& a, const float (&c)[N][4], int k) {
    int n = k / 8;
    a.x[0] = pack(c[n][0], c[n][1]);
    a.x[1] = pack(c[n][2], c[n][3]);
    a.x[2] = pack(c[n + 1][0], c[n + 1][1]);
    a.x[3] = pack(c[n + 1][2], c[n + 1][3]);
}

// The right factor that goes with `sums_as_a`, of a matrix stored [k][n].
__device__ __forceinline__ void load_b_for_sums(FragmentB& b, const elem* tile, int ld, int k, int n) {
    load_b<false>(b, tile, ld, k, n);
}

#else

__device__ __forceinline__ u32 to_tf32(float x) {
    u32 y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ void split(float x, u32& high, u32& low) {
    high = to_tf32(x);
    low = to_tf32(x - __uint_as_float(high));
}

__device__ __forceinline__ void scale_columns(FragmentA& a, const float* factors) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float x = __uint_as_float(a.x[i]) + __uint_as_float(a.low[i]);
        split(x * factors[(LANE & 3) + (i >> 1) * 4], a.x[i], a.low[i]);
    }
}

template <bool TRANSPOSED>
__device__ __forceinline__ void load_a(FragmentA& a, const elem* tile, int ld, int row, int k) {
    int group = LANE >> 2, quad = LANE & 3;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int m = row + group + (i & 1) * 8, l = k + quad + (i >> 1) * 4;
        split(TRANSPOSED ? tile[l * ld + m] : tile[m * ld + l], a.x[i], a.low[i]);
    }
}

template <bool BY_COLUMN>
__device__ __forceinline__ void load_b(FragmentB& b, const elem* tile, int ld, int k, int n) {
    int group = LANE >> 2, quad = LANE & 3;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int l = k + quad + i * 4, c = n + group;
        split(BY_COLUMN ? tile[c * ld + l] : tile[l * ld + c], b.x[i], b.low[i]);
    }
}

__device__ __forceinline__ void mma_tf32(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma(float (&c)[4], const FragmentA& a, const FragmentB& b) {
    mma_tf32(c, a.low, b.x);
    mma_tf32(c, a.x, b.low);
    mma_tf32(c, a.x, b.x);
}

// A thread holds columns 2 quad and 2 quad + 1 of a sum, but quad and quad + 4 of a left factor: the products are taken in
// that other order of k, and `load_b_for_sums` reads the rows in it.
template <int N> __device__ __forceinline__ void sums_as_a(FragmentA& a, const float (&c)[N][4], int k) {
    int n = k / 8;
    split(c[n][0], a.x[0], a.low[0]);
    split(c[n][2], a.x[1], a.low[1]);
    split(c[n][1], a.x[2], a.low[2]);
    split(c[n][3], a.x[3], a.low[3]);
}

__device__ __forceinline__ void load_b_for_sums(FragmentB& b, const elem* tile, int ld, int k, int n) {
    int group = LANE >> 2, quad = LANE & 3;
#pragma unroll
    for (int i = 0; i < 2; i++) split(tile[(k + 2 * quad + i) * ld + n + group], b.x[i], b.low[i]);
}

#endif

// c [16, 8 * N] += rows row.. of a [., K] times columns column.. of b [K, .].
template <int K, bool A_TRANSPOSED, bool B_BY_COLUMN, int N>
__device__ __forceinline__ void product(float (&c)[N][4], const elem* a, int lda, int row, const elem* b, int ldb,
                                        int column) {
#pragma unroll
    for (int k = 0; k < K; k += K_STEP) {
        FragmentA left;
        load_a<A_TRANSPOSED>(left, a, lda, row, k);
#pragma unroll
        for (int n = 0; n < N; n++) {
            FragmentB right;
            load_b<B_BY_COLUMN>(right, b, ldb, k, column + 8 * n);
            mma(c[n], left, right);
        }
    }
}

template <int N> __device__ __forceinline__ void set_zero(float (&c)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.0f;
}

// c [16, 8 * N] += sums [16, 8 * L] times b [8 * L, .], which is stored [k][n].
template <int N, int L>
__device__ __forceinline__ void product_of_sums(float (&c)[N][4], const float (&sums)[L][4], const elem* b, int ldb) {
#pragma unroll
    for (int k = 0; k < 8 * L; k += K_STEP) {
        FragmentA left;
        sums_as_a(left, sums, k);
#pragma unroll
        for (int n = 0; n < N; n++) {
            FragmentB right;
            load_b_for_sums(right, b, ldb, k, 8 * n);
            mma(c[n], left, right);
        }
    }
}

// Columns of 8 that a warp takes at once, so that 8 warps share [M, N] evenly where that is possible.
__host__ __device__ constexpr int tile_width(int m, int n) {
    int width = 8;
    while (width > 1 && (n / 8 % width != 0 || m / 16 * (n / 8 / width) < 8)) width /= 2;
    return width;
}

// Starts to load rows of `LENGTH` activations into a tile [COUNT, ACROSS + PAD]; source(r) is where row r begins, or null for
// zeros. They are there after `wait_for_tiles` and a barrier.
template <int COUNT, int ACROSS, int LENGTH, int BLOCK, class Source>
__device__ __forceinline__ void fetch_tile(elem* tile, Source source) {
    constexpr int VECTOR = 16 / sizeof(act);
    if constexpr (LENGTH % VECTOR == 0) {
        constexpr int PER_ROW = ACROSS / VECTOR;
        const void* anywhere = tile;
        for (int i = threadIdx.x; i < COUNT * PER_ROW; i += BLOCK) {
            int r = i / PER_ROW, d = i % PER_ROW * VECTOR;
            const act* row = source(r);
            bool inside = row != nullptr && d < LENGTH;
            u32 to = static_cast<u32>(__cvta_generic_to_shared(tile + r * (ACROSS + PAD) + d));
            // Of nothing, zeros are written and the address is not looked at.
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                         :: "r"(to), "l"(inside ? row + d : anywhere), "r"(inside ? 16 : 0) : "memory");
        }
    } else {
        for (int i = threadIdx.x; i < COUNT * ACROSS; i += BLOCK) {
            int r = i / ACROSS, d = i % ACROSS;
            const act* row = source(r);
            tile[r * (ACROSS + PAD) + d] = row != nullptr && d < LENGTH ? row[d] : from_float<act>(0.0f);
        }
    }
}

// A float of shared memory, likewise; 0 where there is none.
__device__ __forceinline__ void fetch_float(float* to, const float* from) {
    u32 at = static_cast<u32>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 :: "r"(at), "l"(from == nullptr ? to : from), "r"(from == nullptr ? 0 : 4) : "memory");
}

__device__ __forceinline__ void wait_for_tiles() { asm volatile("cp.async.wait_all;" ::: "memory"); }

extern __shared__ uint4 shared_memory[];

// Cuts the block's shared memory into tiles.
struct Carver {
    char* next;
    __device__ Carver() : next(reinterpret_cast<char*>(shared_memory)) {}
    __device__ elem* tile(int rows, int width) {
        elem* tile = reinterpret_cast<elem*>(next);
        next += rows * (width + PAD) * sizeof(elem);
        return tile;
    }
    __device__ float* floats(int rows, int width) {
        float* tile = reinterpret_cast<float*>(next);
        next += rows * (width + FLOAT_PAD) * sizeof(float);
        return tile;
    }
};

// Two neighbouring elements to global memory.
__device__ __forceinline__ void store2(act* at, float x, float y) {
#ifdef ACT_BF16
    *reinterpret_cast<u32*>(at) = pack(x, y);
#else
    *reinterpret_cast<float2*>(at) = make_float2(x, y);
#endif
}
