// Row-wise and element-wise operations around the matrix products.

// y = a x + b y; b = 0 never reads y.
extern "C" __global__ void axpby(act* y, const act* x, float a, float b, long long n) {
    long long i = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    if (i + 4 <= n) {
        float4 v = load4(x + i);
        v.x *= a, v.y *= a, v.z *= a, v.w *= a;
        if (b != 0.0f) {
            float4 old = load4(y + i);
            v.x += b * old.x, v.y += b * old.y, v.z += b * old.z, v.w += b * old.w;
        }
        store4(y + i, v);
        return;
    }
    for (; i < n; i++) {
        float v = a * to_float(x[i]);
        if (b != 0.0f) v += b * to_float(y[i]);
        y[i] = from_float<act>(v);
    }
}

// out = a x + b y.
extern "C" __global__ void combine(act* out, float a, const act* x, float b, const act* y, long long n) {
    long long i = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    if (i + 4 <= n) {
        float4 u = load4(x + i), v = load4(y + i);
        store4(out + i, make_float4(a * u.x + b * v.x, a * u.y + b * v.y, a * u.z + b * v.z, a * u.w + b * v.w));
        return;
    }
    for (; i < n; i++) out[i] = from_float<act>(a * to_float(x[i]) + b * to_float(y[i]));
}

// Between the two element types.
extern "C" __global__ void narrow(bf16* y, const float* x, long long n) {
    long long i = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    if (i + 4 <= n) {
        store4(y + i, load4(x + i));
        return;
    }
    for (; i < n; i++) y[i] = from_float<bf16>(x[i]);
}

extern "C" __global__ void widen(float* y, const bf16* x, long long n) {
    long long i = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    if (i + 4 <= n) {
        store4(y + i, load4(x + i));
        return;
    }
    for (; i < n; i++) y[i] = to_float(x[i]);
}

extern "C" __global__ void add_bias(act* x, const float* bias, int width, long long n) {
    long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) x[i] = from_float<act>(to_float(x[i]) + bias[i % width]);
}

// x weight / rms(x) for `rows` rows; one warp a row (blockDim.y rows a block), or the whole block if blockDim.y is 1. Rows of
// a multiple of four elements are read four at a time.
extern "C" __global__ void rms_norm_forward(act* out, const act* x, const float* weight, float epsilon, int width,
                                            int rows) {
    int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    x += static_cast<long long>(row) * width;
    out += static_cast<long long>(row) * width;
    int fours = width % 4 == 0 ? width : 0;
    float sum = 0.0f;
    for (int i = threadIdx.x * 4; i < fours; i += blockDim.x * 4) {
        float4 v = load4(x + i);
        sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    for (int i = fours + threadIdx.x; i < width; i += blockDim.x) {
        float v = to_float(x[i]);
        sum += v * v;
    }
    sum = blockDim.x > 32 ? block_sum(sum) : warp_sum(sum);
    float r = rsqrtf(sum / width + epsilon);
    for (int i = threadIdx.x * 4; i < fours; i += blockDim.x * 4) {
        float4 v = load4(x + i), w = load4(weight + i);
        store4(out + i, make_float4(v.x * r * w.x, v.y * r * w.y, v.z * r * w.z, v.w * r * w.w));
    }
    for (int i = fours + threadIdx.x; i < width; i += blockDim.x) out[i] = from_float<act>(to_float(x[i]) * r * weight[i]);
}

// With r = 1 / rms(x): dx += r w dy - x r^3 / n sum(w dy x).
extern "C" __global__ void rms_norm_backward(act* dx, const act* x, const float* weight, float epsilon, const act* dy,
                                             int width, int rows) {
    int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    long long at = static_cast<long long>(row) * width;
    x += at, dx += at, dy += at;
    int fours = width % 4 == 0 ? width : 0;
    float sum = 0.0f, inner = 0.0f;
    for (int i = threadIdx.x * 4; i < fours; i += blockDim.x * 4) {
        float4 v = load4(x + i), w = load4(weight + i), d = load4(dy + i);
        sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        inner += v.x * w.x * d.x + v.y * w.y * d.y + v.z * w.z * d.z + v.w * w.w * d.w;
    }
    for (int i = fours + threadIdx.x; i < width; i += blockDim.x) {
        float v = to_float(x[i]);
        sum += v * v;
        inner += v * weight[i] * to_float(dy[i]);
    }
    sum = blockDim.x > 32 ? block_sum(sum) : warp_sum(sum);
    inner = blockDim.x > 32 ? block_sum(inner) : warp_sum(inner);
    float r = rsqrtf(sum / width + epsilon);
    float pull = r * r * r * inner / width;
    for (int i = threadIdx.x * 4; i < fours; i += blockDim.x * 4) {
        float4 v = load4(x + i), w = load4(weight + i), d = load4(dy + i), old = load4(dx + i);
        store4(dx + i, make_float4(old.x + r * w.x * d.x - v.x * pull, old.y + r * w.y * d.y - v.y * pull,
                                   old.z + r * w.z * d.z - v.z * pull, old.w + r * w.w * d.w - v.w * pull));
    }
    for (int i = fours + threadIdx.x; i < width; i += blockDim.x) {
        float d = r * weight[i] * to_float(dy[i]) - to_float(x[i]) * pull;
        dx[i] = from_float<act>(to_float(dx[i]) + d);
    }
}

// out = keep out + scale x turned by cos, sin [N, D/2]; x [N, heads, D], one thread a pair. What is not kept is not read.
extern "C" __global__ void rope(act* out, const act* x, const float* cosines, const float* sines, int heads, int dim, float sign,
                                float scale, float keep, long long pairs) {
    long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= pairs) return;
    int half = dim / 2;
    int d = i % half;
    long long head = i / half;
    long long token = head / heads;
    float c = scale * cosines[token * half + d], s = sign * scale * sines[token * half + d];
    long long low = head * dim + d, high = low + half;
    float a = to_float(x[low]), b = to_float(x[high]);
    float left = a * c - b * s, right = b * c + a * s;
    if (keep != 0.0f) left += keep * to_float(out[low]), right += keep * to_float(out[high]);
    out[low] = from_float<act>(left);
    out[high] = from_float<act>(right);
}

// The same where D is a multiple of 8: one thread four pairs.
extern "C" __global__ void rope_fours(act* out, const act* x, const float* cosines, const float* sines, int heads, int dim,
                                      float sign, float scale, float keep, long long pairs) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x, half = dim / 2, fours = half / 4;
    if (i >= pairs / 4) return;
    u32 d = i % fours * 4, head = i / fours, token = head / heads;
    float4 c = load4(cosines + static_cast<long long>(token) * half + d);
    float4 s = load4(sines + static_cast<long long>(token) * half + d);
    long long low = static_cast<long long>(head) * dim + d, high = low + half;
    float4 a = load4(x + low), b = load4(x + high);
    float4 left = make_float4(0.0f, 0.0f, 0.0f, 0.0f), right = left;
    if (keep != 0.0f) {
        left = load4(out + low), right = load4(out + high);
        left.x *= keep, left.y *= keep, left.z *= keep, left.w *= keep;
        right.x *= keep, right.y *= keep, right.z *= keep, right.w *= keep;
    }
    float turn = sign * scale;
    left.x += a.x * (scale * c.x) - b.x * (turn * s.x), right.x += b.x * (scale * c.x) + a.x * (turn * s.x);
    left.y += a.y * (scale * c.y) - b.y * (turn * s.y), right.y += b.y * (scale * c.y) + a.y * (turn * s.y);
    left.z += a.z * (scale * c.z) - b.z * (turn * s.z), right.z += b.z * (scale * c.z) + a.z * (turn * s.z);
    left.w += a.w * (scale * c.w) - b.w * (turn * s.w), right.w += b.w * (scale * c.w) + a.w * (turn * s.w);
    store4(out + low, left);
    store4(out + high, right);
}

// The gate of a feed-forward layer goes through x sigmoid(a x + b x^3); from `SATURATED` on a sigmoid is 0 or 1.
#define SATURATED 100.0f
__device__ __forceinline__ float within_saturation(float x) { return fminf(fmaxf(x, -SATURATED), SATURATED); }

__device__ __forceinline__ float glu(float g, float u, float a, float b) {
    float x = within_saturation(g);
    return g * sigmoid(x * (a + b * x * x)) * u;
}

extern "C" __global__ void glu_forward(act* out, const act* gate, const act* up, float a, float b, long long n) {
    long long i = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    if (i + 4 <= n) {
        float4 g = load4(gate + i), u = load4(up + i);
        store4(out + i, make_float4(glu(g.x, u.x, a, b), glu(g.y, u.y, a, b), glu(g.z, u.z, a, b), glu(g.w, u.w, a, b)));
        return;
    }
    for (; i < n; i++) out[i] = from_float<act>(glu(to_float(gate[i]), to_float(up[i]), a, b));
}

__device__ __forceinline__ void glu_gradient(float& g, float& u, float d, float a, float b) {
    float x = within_saturation(g), s = sigmoid(x * (a + b * x * x));
    float dg = d * u * s * (1.0f + x * (a + 3.0f * b * x * x) * (1.0f - s));
    u = d * g * s;
    g = dg;
}

// Overwrites gate and up by their gradients.
extern "C" __global__ void glu_backward(act* gate, act* up, const act* dout, float a, float b, long long n) {
    long long i = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    if (i + 4 <= n) {
        float4 g = load4(gate + i), u = load4(up + i), d = load4(dout + i);
        glu_gradient(g.x, u.x, d.x, a, b);
        glu_gradient(g.y, u.y, d.y, a, b);
        glu_gradient(g.z, u.z, d.z, a, b);
        glu_gradient(g.w, u.w, d.w, a, b);
        store4(gate + i, g);
        store4(up + i, u);
        return;
    }
    for (; i < n; i++) {
        float g = to_float(gate[i]), u = to_float(up[i]);
        glu_gradient(g, u, to_float(dout[i]), a, b);
        gate[i] = from_float<act>(g);
        up[i] = from_float<act>(u);
    }
}

// Rows `ids` of a table of either type; one block a row.
extern "C" __global__ void embedding(act* out, const void* table, int table_is_bf16, const u32* ids, int width) {
    long long from = static_cast<long long>(ids[blockIdx.x]) * width, to = static_cast<long long>(blockIdx.x) * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float x = table_is_bf16 ? to_float(static_cast<const bf16*>(table)[from + i])
                                : static_cast<const float*>(table)[from + i];
        out[to + i] = from_float<act>(x);
    }
}

// splitmix64 of element i of the stream `seed`, as on the CPU.
__device__ __forceinline__ u64 splitmix(u64 seed, u64 i) {
    u64 z = seed + (i + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// Numbers drawn evenly from -bound to bound.
extern "C" __global__ void uniform(act* x, float bound, u64 seed, long long n) {
    long long step = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
        float unit = static_cast<float>(splitmix(seed, i) >> 40) * (2.0f / (1 << 24)) - 1.0f;
        x[i] = from_float<act>(bound * unit);
    }
}

extern "C" __global__ void dropout(act* x, u64 threshold, float keep, u64 seed, long long n) {
    long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= n) return;
    x[i] = splitmix(seed, i) < threshold ? from_float<act>(0.0f) : from_float<act>(to_float(x[i]) * keep);
}

// One warp a row, in place.
extern "C" __global__ void softmax_forward(act* x, int width, int rows) {
    int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    x += static_cast<long long>(row) * width;
    float best = NEGATIVE_INFINITY, sum = 0.0f;
    for (int i = threadIdx.x; i < width; i += 32) best = fmaxf(best, to_float(x[i]));
    best = warp_max(best);
    for (int i = threadIdx.x; i < width; i += 32) sum += expf(to_float(x[i]) - best);
    float scale = 1.0f / warp_sum(sum);
    for (int i = threadIdx.x; i < width; i += 32) x[i] = from_float<act>(expf(to_float(x[i]) - best) * scale);
}

// dx = y (dy - sum(y dy)), over dy.
extern "C" __global__ void softmax_backward(act* dy, const act* y, int width, int rows) {
    int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    dy += static_cast<long long>(row) * width;
    y += static_cast<long long>(row) * width;
    float inner = 0.0f;
    for (int i = threadIdx.x; i < width; i += 32) inner += to_float(dy[i]) * to_float(y[i]);
    inner = warp_sum(inner);
    for (int i = threadIdx.x; i < width; i += 32) dy[i] = from_float<act>(to_float(y[i]) * (to_float(dy[i]) - inner));
}
