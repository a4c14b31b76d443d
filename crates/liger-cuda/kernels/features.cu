// Feature maps of query and key, and the gates that come out of the key. One warp a row of a head.

__device__ __forceinline__ float row_mean(const act* x, int dim) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < dim; i += 32) sum += to_float(x[i]);
    return warp_sum(sum) / dim;
}

__device__ __forceinline__ void row_softmax_statistics(const act* x, int dim, float& best, float& scale) {
    best = NEGATIVE_INFINITY;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < dim; i += 32) best = fmaxf(best, to_float(x[i]));
    best = warp_max(best);
    for (int i = threadIdx.x; i < dim; i += 32) sum += expf(to_float(x[i]) - best);
    scale = 1.0f / warp_sum(sum);
}

// y = map(x); with `gates`, the log gates of x too.
extern "C" __global__ void features_forward(act* y, float* gates, const act* x, int map, int gate, float divisor,
                                            float longest, int heads, int dim, int rows) {
    int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    long long at = static_cast<long long>(row) * dim;
    x += at, y += at;
    float best = 0.0f, scale = 0.0f;
    if (map != MAP_ONE_MINUS_SIGMOID) row_softmax_statistics(x, dim, best, scale);
    float of_mean = 0.0f;
    if (gates != nullptr && is_gate_of_mean(gate)) {
        of_mean = gate_of_mean(row_mean(x, dim), gate, head_divisor(divisor, longest, row % heads, heads));
    }
    if (map == MAP_SHARE) scale *= -expm1f(of_mean) * dim;
    for (int i = threadIdx.x; i < dim; i += 32) {
        float v = to_float(x[i]);
        y[i] = from_float<act>(map == MAP_ONE_MINUS_SIGMOID ? sigmoid(-v) : expf(v - best) * scale);
        if (gates == nullptr) continue;
        float g = of_mean;
        if (gate == GATE_LOG_SIGMOID) g = -softplus(-v) / divisor;
        else if (gate == GATE_NEGATIVE_EXP) g = -expf(v);
        gates[at + i] = g;
    }
}

// Overwrites dy, the gradient of map(x), by that of x; with `dgates` the gates' part is added.
extern "C" __global__ void features_backward(act* dy, const float* dgates, const act* x, int map, int gate,
                                             float divisor, float longest, int heads, int dim, int rows) {
    int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    long long at = static_cast<long long>(row) * dim;
    x += at, dy += at;
    float best = 0.0f, scale = 0.0f, inner = 0.0f;
    if (map != MAP_ONE_MINUS_SIGMOID) {
        row_softmax_statistics(x, dim, best, scale);
        for (int i = threadIdx.x; i < dim; i += 32) inner += to_float(dy[i]) * expf(to_float(x[i]) - best) * scale;
        inner = warp_sum(inner);
    }
    float each = 0.0f, share = 1.0f;
    if (dgates != nullptr && is_gate_of_mean(gate)) {
        float mean = row_mean(x, dim), own = head_divisor(divisor, longest, row % heads, heads), sum = 0.0f;
        for (int i = threadIdx.x; i < dim; i += 32) sum += dgates[at + i];
        sum = warp_sum(sum);
        if (map == MAP_SHARE) {
            // d (1 - exp(g)) = -exp(g).
            float g = gate_of_mean(mean, gate, own);
            share = -expm1f(g) * dim, sum -= expf(g) * dim * inner;
        }
        // The mean spreads it over the head.
        each = gate_of_mean_slope(mean, gate, own) * sum / dim;
    }
    for (int i = threadIdx.x; i < dim; i += 32) {
        float v = to_float(x[i]), d = to_float(dy[i]);
        if (map != MAP_ONE_MINUS_SIGMOID) {
            d = expf(v - best) * scale * (d - inner) * share;
        } else {
            float s = sigmoid(-v);
            d *= -s * (1.0f - s);
        }
        if (dgates != nullptr) {
            float dg = dgates[at + i];
            if (gate == GATE_LOG_SIGMOID) d += dg * sigmoid(-v) / divisor;
            // Below the clamp the gate's gradient is exactly 0, and exp(v) may be infinite.
            else if (gate == GATE_NEGATIVE_EXP) d -= dg == 0.0f ? 0.0f : dg * expf(v);
            else d += each;
        }
        dy[i] = from_float<act>(d);
    }
}

// The same for heads of 4 * LANES elements, LANES a power of two up to 32: a thread has four elements, a warp 32 / LANES rows.
__device__ __forceinline__ float lanes_sum(float x, int lanes) {
    for (int offset = lanes / 2; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

__device__ __forceinline__ float lanes_max(float x, int lanes) {
    for (int offset = lanes / 2; offset > 0; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

__device__ __forceinline__ float sum4(float4 v) { return v.x + v.y + v.z + v.w; }

__device__ __forceinline__ float4 softmax4(float4 v, int lanes) {
    float best = lanes_max(fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w)), lanes);
    float4 e = make_float4(__expf(v.x - best), __expf(v.y - best), __expf(v.z - best), __expf(v.w - best));
    float scale = 1.0f / lanes_sum(sum4(e), lanes);
    return make_float4(e.x * scale, e.y * scale, e.z * scale, e.w * scale);
}

__device__ __forceinline__ float one_gate(float v, int gate, float divisor) {
    return gate == GATE_LOG_SIGMOID ? -softplus(-v) / divisor : -expf(v);
}

__device__ __forceinline__ float one_gate_gradient(float v, float dg, int gate, float divisor) {
    if (gate == GATE_LOG_SIGMOID) return dg * sigmoid(-v) / divisor;
    return dg == 0.0f ? 0.0f : -dg * expf(v);
}

extern "C" __global__ void features_forward_fours(act* y, float* gates, const act* x, int map, int gate, float divisor,
                                                  float longest, int heads, int dim, int rows) {
    int lanes = dim / 4;
    long long element = (static_cast<long long>(blockIdx.x) * blockDim.x * blockDim.y + threadIdx.y * 32 + threadIdx.x) * 4;
    // Every lane takes part in the sums.
    bool inside = element < static_cast<long long>(rows) * dim;
    float4 v = inside ? load4(x + element) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float4 f = map == MAP_ONE_MINUS_SIGMOID ? make_float4(sigmoid(-v.x), sigmoid(-v.y), sigmoid(-v.z), sigmoid(-v.w))
                                            : softmax4(v, lanes);
    float4 g = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (gates != nullptr && is_gate_of_mean(gate)) {
        int head = static_cast<int>(element / dim) % heads;
        float one = gate_of_mean(lanes_sum(sum4(v), lanes) / dim, gate, head_divisor(divisor, longest, head, heads));
        g = make_float4(one, one, one, one);
        if (map == MAP_SHARE) {
            float share = -expm1f(one) * dim;
            f = make_float4(f.x * share, f.y * share, f.z * share, f.w * share);
        }
    }
    if (inside) store4(y + element, f);
    if (gates == nullptr) return;
    if (!is_gate_of_mean(gate)) {
        g = make_float4(one_gate(v.x, gate, divisor), one_gate(v.y, gate, divisor), one_gate(v.z, gate, divisor),
                        one_gate(v.w, gate, divisor));
    }
    if (inside) store4(gates + element, g);
}

extern "C" __global__ void features_backward_fours(act* dy, const float* dgates, const act* x, int map, int gate,
                                                   float divisor, float longest, int heads, int dim, int rows) {
    int lanes = dim / 4;
    long long element = (static_cast<long long>(blockIdx.x) * blockDim.x * blockDim.y + threadIdx.y * 32 + threadIdx.x) * 4;
    bool inside = element < static_cast<long long>(rows) * dim;
    float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float4 v = inside ? load4(x + element) : zero, d = inside ? load4(dy + element) : zero;
    float inner = 0.0f;
    if (map != MAP_ONE_MINUS_SIGMOID) {
        float4 f = softmax4(v, lanes);
        inner = lanes_sum(d.x * f.x + d.y * f.y + d.z * f.z + d.w * f.w, lanes);
        d = make_float4(f.x * (d.x - inner), f.y * (d.y - inner), f.z * (d.z - inner), f.w * (d.w - inner));
    } else {
        float4 f = make_float4(sigmoid(-v.x), sigmoid(-v.y), sigmoid(-v.z), sigmoid(-v.w));
        d.x *= -f.x * (1.0f - f.x), d.y *= -f.y * (1.0f - f.y);
        d.z *= -f.z * (1.0f - f.z), d.w *= -f.w * (1.0f - f.w);
    }
    if (dgates != nullptr) {
        float4 dg = inside ? load4(dgates + element) : zero;
        if (is_gate_of_mean(gate)) {
            float mean = lanes_sum(sum4(v), lanes) / dim, sum = lanes_sum(sum4(dg), lanes);
            float own = head_divisor(divisor, longest, static_cast<int>(element / dim) % heads, heads);
            if (map == MAP_SHARE) {
                // d (1 - exp(g)) = -exp(g).
                float g = gate_of_mean(mean, gate, own), share = -expm1f(g) * dim;
                sum -= expf(g) * dim * inner;
                d.x *= share, d.y *= share, d.z *= share, d.w *= share;
            }
            float each = gate_of_mean_slope(mean, gate, own) * sum / dim;
            d.x += each, d.y += each, d.z += each, d.w += each;
        } else {
            d.x += one_gate_gradient(v.x, dg.x, gate, divisor), d.y += one_gate_gradient(v.y, dg.y, gate, divisor);
            d.z += one_gate_gradient(v.z, dg.z, gate, divisor), d.w += one_gate_gradient(v.w, dg.w, gate, divisor);
        }
    }
    if (inside) store4(dy + element, d);
}

__device__ __forceinline__ float pooled(const act* k, int m, int slots, int dim, int& first, int& last) {
    first = m * dim / slots, last = ((m + 1) * dim + slots - 1) / slots;
    float sum = 0.0f;
    for (int i = first; i < last; i++) sum += to_float(k[i]);
    return sum / (last - first);
}

// log gate = log sigmoid(pool(k)) / 16, write = 1 - gate; one thread a slot.
extern "C" __global__ void slot_gates_forward(float* gates, act* write, const act* k, int dim, int slots,
                                              long long count) {
    long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    int first, last;
    float g = -softplus(-pooled(k + i / slots * dim, i % slots, slots, dim, first, last)) / GSA_DIVISOR;
    gates[i] = g;
    write[i] = from_float<act>(-expm1f(g));
}

// Adds to dk; one thread an element of k, which sums the slots whose stretch it is in.
extern "C" __global__ void slot_gates_backward(act* dk, const float* dgates, const act* dwrite, const act* k, int dim,
                                               int slots, long long count) {
    long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    long long row = i / dim;
    int d = i % dim;
    float sum = 0.0f;
    int begin = max(0, d * slots / dim - 1);
    for (int m = begin; m < slots && m * dim / slots <= d; m++) {
        int first, last;
        float mean = pooled(k + row * dim, m, slots, dim, first, last);
        if (d < first || d >= last) continue;
        float gate = expf(-softplus(-mean) / GSA_DIVISOR);
        float total = dgates[row * slots + m] - gate * to_float(dwrite[row * slots + m]);
        sum += total * sigmoid(-mean) / GSA_DIVISOR / (last - first);
    }
    dk[i] = from_float<act>(to_float(dk[i]) + sum);
}
