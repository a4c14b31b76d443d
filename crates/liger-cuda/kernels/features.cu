// Feature maps of query and key, and the gates that come out of the key. One warp a row of a head.

#define MAP_SOFTMAX 0
#define GATE_LOG_SIGMOID 0
#define GATE_MEAN_LOG_SIGMOID 1
#define GATE_MEAN_NEGATIVE_SOFTPLUS 2
#define GATE_NEGATIVE_EXP 3

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
                                            int dim, int rows) {
    int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    long long at = static_cast<long long>(row) * dim;
    x += at, y += at;
    float best = 0.0f, scale = 0.0f;
    if (map == MAP_SOFTMAX) row_softmax_statistics(x, dim, best, scale);
    float mean = 0.0f;
    if (gates != nullptr && (gate == GATE_MEAN_LOG_SIGMOID || gate == GATE_MEAN_NEGATIVE_SOFTPLUS)) {
        mean = row_mean(x, dim);
    }
    for (int i = threadIdx.x; i < dim; i += 32) {
        float v = to_float(x[i]);
        y[i] = from_float<act>(map == MAP_SOFTMAX ? expf(v - best) * scale : sigmoid(-v));
        if (gates == nullptr) continue;
        float g;
        if (gate == GATE_LOG_SIGMOID) g = -softplus(-v) / divisor;
        else if (gate == GATE_NEGATIVE_EXP) g = -expf(v);
        else g = -softplus(gate == GATE_MEAN_LOG_SIGMOID ? -mean : mean);
        gates[at + i] = g;
    }
}

// Overwrites dy, the gradient of map(x), by that of x; with `dgates` the gates' part is added.
extern "C" __global__ void features_backward(act* dy, const float* dgates, const act* x, int map, int gate,
                                             float divisor, int dim, int rows) {
    int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    long long at = static_cast<long long>(row) * dim;
    x += at, dy += at;
    float best = 0.0f, scale = 0.0f, inner = 0.0f;
    if (map == MAP_SOFTMAX) {
        row_softmax_statistics(x, dim, best, scale);
        for (int i = threadIdx.x; i < dim; i += 32) inner += to_float(dy[i]) * expf(to_float(x[i]) - best) * scale;
        inner = warp_sum(inner);
    }
    float share = 0.0f;
    if (dgates != nullptr && (gate == GATE_MEAN_LOG_SIGMOID || gate == GATE_MEAN_NEGATIVE_SOFTPLUS)) {
        // d logsigmoid(m) = sigmoid(-m); d -softplus(m) = -sigmoid(m); the mean spreads it over the head.
        float mean = row_mean(x, dim), sum = 0.0f;
        for (int i = threadIdx.x; i < dim; i += 32) sum += dgates[at + i];
        share = (gate == GATE_MEAN_LOG_SIGMOID ? sigmoid(-mean) : -sigmoid(mean)) * warp_sum(sum) / dim;
    }
    for (int i = threadIdx.x; i < dim; i += 32) {
        float v = to_float(x[i]), d = to_float(dy[i]);
        if (map == MAP_SOFTMAX) {
            d = expf(v - best) * scale * (d - inner);
        } else {
            float s = sigmoid(-v);
            d *= -s * (1.0f - s);
        }
        if (dgates != nullptr) {
            float dg = dgates[at + i];
            if (gate == GATE_LOG_SIGMOID) d += dg * sigmoid(-v) / divisor;
            // Below the clamp the gate's gradient is exactly 0, and exp(v) may be infinite.
            else if (gate == GATE_NEGATIVE_EXP) d -= dg == 0.0f ? 0.0f : dg * expf(v);
            else d += share;
        }
        dy[i] = from_float<act>(d);
    }
}

#define GSA_DIVISOR 16.0f

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
