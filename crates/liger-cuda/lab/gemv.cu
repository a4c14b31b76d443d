// y [n, out] = x [n, in] w^T with w [out, in] in bfloat16, for a few rows: one pass over the weights at memory speed.

// sum[n] += eight weights times x[n].
template <int N>
__device__ __forceinline__ void add_eight(float (&sum)[N], uint4 raw, const act* x, int inputs) {
    float weights[8] = {
        __uint_as_float(raw.x << 16), __uint_as_float(raw.x & 0xffff0000u), __uint_as_float(raw.y << 16),
        __uint_as_float(raw.y & 0xffff0000u), __uint_as_float(raw.z << 16), __uint_as_float(raw.z & 0xffff0000u),
        __uint_as_float(raw.w << 16), __uint_as_float(raw.w & 0xffff0000u)};
#pragma unroll
    for (int n = 0; n < N; n++) {
        float4 a = load4(x + static_cast<long long>(n) * inputs), b = load4(x + static_cast<long long>(n) * inputs + 4);
        sum[n] += a.x * weights[0] + a.y * weights[1] + a.z * weights[2] + a.w * weights[3] + b.x * weights[4] +
                  b.y * weights[5] + b.z * weights[6] + b.w * weights[7];
    }
}

// One warp an output; x is short enough to stay in the caches. `in` is a multiple of 8. ACCUMULATE adds to y.
template <int N, class Out>
__device__ __forceinline__ void gemv_rows(Out* y, const bf16* w, const act* x, int inputs, int outputs, float scale,
                                          int accumulate) {
    int output = blockIdx.x * blockDim.y + threadIdx.y;
    if (output >= outputs) return;
    w += static_cast<long long>(output) * inputs;
    float sum[N];
#pragma unroll
    for (int n = 0; n < N; n++) sum[n] = 0.0f;
    // Four loads of 16 bytes are under way before the first is used: a block alone must keep the memory busy.
    int i = threadIdx.x * 8;
    for (; i + 3 * 256 < inputs; i += 4 * 256) {
        uint4 raw[4];
#pragma unroll
        for (int u = 0; u < 4; u++) raw[u] = __ldcs(reinterpret_cast<const uint4*>(w + i + u * 256));
#pragma unroll
        for (int u = 0; u < 4; u++) add_eight<N>(sum, raw[u], x + i + u * 256, inputs);
    }
    for (; i < inputs; i += 256) add_eight<N>(sum, __ldcs(reinterpret_cast<const uint4*>(w + i)), x + i, inputs);
#pragma unroll
    for (int n = 0; n < N; n++) {
        float total = warp_sum(sum[n]) * scale;
        if (threadIdx.x == 0) {
            Out* at = y + static_cast<long long>(n) * outputs + output;
            *at = from_float<Out>(accumulate ? to_float(*at) + total : total);
        }
    }
}

template <class Out>
__device__ __forceinline__ void gemv_any(Out* y, const bf16* w, const act* x, int rows, int inputs, int outputs,
                                         float scale, int accumulate) {
    if (rows == 1) gemv_rows<1>(y, w, x, inputs, outputs, scale, accumulate);
    else if (rows == 2) gemv_rows<2>(y, w, x, inputs, outputs, scale, accumulate);
    else if (rows == 3) gemv_rows<3>(y, w, x, inputs, outputs, scale, accumulate);
    else gemv_rows<4>(y, w, x, inputs, outputs, scale, accumulate);
}

extern "C" __global__ void gemv(act* y, const bf16* w, const act* x, int rows, int inputs, int outputs, float scale,
                                int accumulate) {
    gemv_any(y, w, x, rows, inputs, outputs, scale, accumulate);
}

// Logits keep float32.
extern "C" __global__ void gemv_to_f32(float* y, const bf16* w, const act* x, int rows, int inputs, int outputs,
                                       float scale, int accumulate) {
    gemv_any(y, w, x, rows, inputs, outputs, scale, accumulate);
}
