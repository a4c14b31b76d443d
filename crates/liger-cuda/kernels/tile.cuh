// Matrix products of float32 tiles in shared memory on tensor cores (tf32), by a block of 8 warps.
//
// PRECISE splits every operand into two tf32 numbers and adds three products: about float32's accuracy, for the
// float32 mode. Leading dimensions should be 4 more than a multiple of 32: the 32 loads of a fragment then hit 32 banks.

#ifdef ACT_BF16
#define PRECISE 0
#else
#define PRECISE 1
#endif

#define BLOCK_WARPS 8
#define BLOCK_THREADS 256

__device__ __forceinline__ u32 to_tf32(float x) {
    u32 y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}

// c [16, 8] += a [16, 8] b [8, 8]
__device__ __forceinline__ void mma_tf32(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// A matrix in shared memory: element (i, j) at data[i * row + j * column].
struct Tile {
    const float* data;
    int row, column;
};

// For every element (i, j) of a [m, k] b [k, n]: epilogue(i, j, value). m is a multiple of 16, n of 8 * WIDTH, k of 8.
// No barrier inside: the caller synchronises before and after.
template <int WIDTH, class Epilogue>
__device__ __forceinline__ void tile_product(int m, int n, int k, Tile a, Tile b, Epilogue epilogue) {
    int lane = threadIdx.x & 31, group = lane >> 2, quad = lane & 3;
    int strips = n / (8 * WIDTH), tasks = m / 16 * strips;
    for (int task = threadIdx.x >> 5; task < tasks; task += BLOCK_WARPS) {
        int row = task / strips * 16, column = task % strips * 8 * WIDTH;
        float c[WIDTH][4];
#pragma unroll
        for (int w = 0; w < WIDTH; w++) c[w][0] = c[w][1] = c[w][2] = c[w][3] = 0.0f;
        const float* a_low = a.data + (row + group) * a.row + quad * a.column;
        const float* b_low = b.data + quad * b.row + (column + group) * b.column;
        for (int l = 0; l < k; l += 8) {
            const float* x = a_low + l * a.column;
            float values[4] = {x[0], x[8 * a.row], x[4 * a.column], x[8 * a.row + 4 * a.column]};
            u32 high[4], low[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                high[i] = to_tf32(values[i]);
                if (PRECISE) low[i] = to_tf32(values[i] - __uint_as_float(high[i]));
            }
#pragma unroll
            for (int w = 0; w < WIDTH; w++) {
                const float* y = b_low + l * b.row + w * 8 * b.column;
                float y0 = y[0], y1 = y[4 * b.row];
                u32 right[2] = {to_tf32(y0), to_tf32(y1)};
                if (PRECISE) {
                    u32 rest[2] = {to_tf32(y0 - __uint_as_float(right[0])), to_tf32(y1 - __uint_as_float(right[1]))};
                    mma_tf32(c[w], low, right);
                    mma_tf32(c[w], high, rest);
                }
                mma_tf32(c[w], high, right);
            }
        }
#pragma unroll
        for (int w = 0; w < WIDTH; w++) {
            int i = row + group, j = column + w * 8 + 2 * quad;
            epilogue(i, j, c[w][0]);
            epilogue(i, j + 1, c[w][1]);
            epilogue(i + 8, j, c[w][2]);
            epilogue(i + 8, j + 1, c[w][3]);
        }
    }
}

// The leading dimension of a tile of `width` columns.
__device__ __forceinline__ int leading(int width) { return width + 4; }
