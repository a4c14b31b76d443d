// What Liger Attention makes of query and key before its branches, in one pass: RoPE for the window, feature maps and gates
// for the recurrence.

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

// The rows of one of the two inputs: [tokens, heads, dim] at `x`. What lies in global memory is found from the row.
struct Side {
    int map, heads;
    bool has_gate;  // the key's
};

struct FeatureSizes {
    int query_map, key_map, gate;
    float divisor, longest;
    int heads, kv, dim, tokens;
    float recurrent, window;  // factors of the branches' gradients
};

__device__ __forceinline__ Side side_of(const FeatureSizes& s, bool key) {
    return {key ? s.key_map : s.query_map, key ? s.kv : s.heads, key};
}

// RoPE forward and features, for query and key at once: one warp a row of a head, the query's rows first. rope_q, query, q
// [tokens, heads, dim]; rope_k, key, gates, k [tokens, kv, dim]; cosines and sines [tokens, dim / 2].
extern "C" __global__ void features_forward(act* rope_q, act* query, const act* q, act* rope_k, act* key, float* gates,
                                            const act* k, const float* cosines, const float* sines, FeatureSizes s) {
    int row = blockIdx.x * blockDim.y + threadIdx.y, of_query = s.tokens * s.heads, half = s.dim / 2;
    bool is_key = row >= of_query;
    if (is_key) row -= of_query;
    if (row >= s.tokens * s.kv && is_key) return;
    Side side = side_of(s, is_key);
    long long at = static_cast<long long>(row) * s.dim, angles = static_cast<long long>(row / side.heads) * half;
    const act* x = (is_key ? k : q) + at;
    act *y = (is_key ? key : query) + at, *turned = (is_key ? rope_k : rope_q) + at;
    float best = 0.0f, scale = 0.0f;
    if (side.map != MAP_ONE_MINUS_SIGMOID) row_softmax_statistics(x, s.dim, best, scale);
    float of_mean = 0.0f;
    if (side.has_gate && is_gate_of_mean(s.gate)) {
        float own = head_divisor(s.divisor, s.longest, row % side.heads, side.heads);
        of_mean = gate_of_mean(row_mean(x, s.dim), s.gate, own);
    }
    if (side.map == MAP_SHARE) scale *= -expm1f(of_mean) * s.dim;
    for (int i = threadIdx.x; i < s.dim; i += 32) {
        float v = to_float(x[i]);
        y[i] = from_float<act>(side.map == MAP_ONE_MINUS_SIGMOID ? sigmoid(-v) : expf(v - best) * scale);
        if (!side.has_gate) continue;
        float g = of_mean;
        if (s.gate == GATE_LOG_SIGMOID) g = -softplus(-v) / s.divisor;
        else if (s.gate == GATE_NEGATIVE_EXP) g = -expf(v);
        gates[at + i] = g;
    }
    for (int i = threadIdx.x; i < half; i += 32) {
        float a = to_float(x[i]), b = to_float(x[i + half]), cosine = cosines[angles + i], sine = sines[angles + i];
        turned[i] = from_float<act>(a * cosine - b * sine);
        turned[i + half] = from_float<act>(b * cosine + a * sine);
    }
}

// Overwrites dq and dk, the gradients of f(q) and of the write key, by those of q and k: `recurrent` times what comes through
// these and the gates, and `window` times the gradients after RoPE turned back.
extern "C" __global__ void features_backward(act* dq, const act* drope_q, const act* q, act* dk, const float* dgates,
                                             const act* drope_k, const act* k, const float* cosines, const float* sines,
                                             FeatureSizes s) {
    int row = blockIdx.x * blockDim.y + threadIdx.y, of_query = s.tokens * s.heads, half = s.dim / 2;
    bool is_key = row >= of_query;
    if (is_key) row -= of_query;
    if (row >= s.tokens * s.kv && is_key) return;
    Side side = side_of(s, is_key);
    long long at = static_cast<long long>(row) * s.dim, angles = static_cast<long long>(row / side.heads) * half;
    const act *x = (is_key ? k : q) + at, *turned = (is_key ? drope_k : drope_q) + at;
    act* dy = (is_key ? dk : dq) + at;
    float best = 0.0f, scale = 0.0f, inner = 0.0f;
    if (side.map != MAP_ONE_MINUS_SIGMOID) {
        row_softmax_statistics(x, s.dim, best, scale);
        for (int i = threadIdx.x; i < s.dim; i += 32) inner += to_float(dy[i]) * expf(to_float(x[i]) - best) * scale;
        inner = warp_sum(inner);
    }
    float each = 0.0f, share = 1.0f;
    if (side.has_gate && is_gate_of_mean(s.gate)) {
        float mean = row_mean(x, s.dim), own = head_divisor(s.divisor, s.longest, row % side.heads, side.heads), sum = 0.0f;
        for (int i = threadIdx.x; i < s.dim; i += 32) sum += dgates[at + i];
        sum = warp_sum(sum);
        if (side.map == MAP_SHARE) {
            // d (1 - exp(g)) = -exp(g).
            float g = gate_of_mean(mean, s.gate, own);
            share = -expm1f(g) * s.dim, sum -= expf(g) * s.dim * inner;
        }
        // The mean spreads it over the head.
        each = gate_of_mean_slope(mean, s.gate, own) * sum / s.dim;
    }
    for (int i = threadIdx.x; i < s.dim; i += 32) {
        float v = to_float(x[i]), d = to_float(dy[i]);
        if (side.map != MAP_ONE_MINUS_SIGMOID) {
            d = expf(v - best) * scale * (d - inner) * share;
        } else {
            float f = sigmoid(-v);
            d *= -f * (1.0f - f);
        }
        if (side.has_gate) {
            float dg = dgates[at + i];
            if (s.gate == GATE_LOG_SIGMOID) d += dg * sigmoid(-v) / s.divisor;
            // Below the clamp the gate's gradient is exactly 0, and exp(v) may be infinite.
            else if (s.gate == GATE_NEGATIVE_EXP) d -= dg == 0.0f ? 0.0f : dg * expf(v);
            else d += each;
        }
        bool low = i < half;
        float cosine = cosines[angles + i % half], sine = sines[angles + i % half];
        float own = to_float(turned[i]), other = to_float(turned[low ? i + half : i - half]);
        dy[i] = from_float<act>(s.recurrent * d + s.window * (own * cosine + (low ? other : -other) * sine));
    }
}

// The same for heads of 4 * LANES elements, LANES a power of two from 2 to 32: a thread has four elements, a warp 32 / LANES
// rows. The blocks of the query come first.
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
    if (gate == GATE_LOG_SIGMOID) return -softplus(-v) / divisor;
    return gate == GATE_NONE ? 0.0f : -expf(v);
}

__device__ __forceinline__ float one_gate_gradient(float v, float dg, int gate, float divisor) {
    if (gate == GATE_LOG_SIGMOID) return dg * sigmoid(-v) / divisor;
    return gate == GATE_NONE || dg == 0.0f ? 0.0f : -dg * expf(v);
}

// Where a thread's four elements are. Counted in 32 bits: divisions of 64 would take longer than the rest.
struct Fours {
    Side side;
    u32 head, d;
    bool inside;
    long long element;
    const float *cosines, *sines;
    __device__ Fours(const FeatureSizes& s, const float* all_cosines, const float* all_sines) {
        u32 threads = blockDim.x * blockDim.y, lanes = s.dim / 4, rows = s.tokens * s.heads;
        u32 query_blocks = (rows * lanes + threads - 1) / threads, block = blockIdx.x;
        bool is_key = block >= query_blocks;
        side = side_of(s, is_key);
        u32 four = (is_key ? block - query_blocks : block) * threads + threadIdx.y * 32 + threadIdx.x;
        // LANES is a power of two.
        u32 row = four >> (31 - __clz(lanes)), token = row / static_cast<u32>(side.heads);
        inside = token < static_cast<u32>(s.tokens);
        head = row - token * side.heads, d = (four & (lanes - 1)) * 4;
        element = static_cast<long long>(four) * 4;
        long long angles = inside ? static_cast<long long>(token) * (s.dim / 2) + (d & (s.dim / 2 - 1)) : 0;
        cosines = all_cosines + angles, sines = all_sines + angles;
    }
    // x turned by the angles, or back.
    __device__ float4 turned(float4 x, int dim, bool back) const {
        float4 c = load4(cosines), t = load4(sines);
        float sign = (static_cast<int>(d) < dim / 2) == back ? 1.0f : -1.0f;
        int partner = dim / 8;
        float4 y;
        y.x = x.x * c.x + sign * t.x * __shfl_xor_sync(0xffffffffu, x.x, partner);
        y.y = x.y * c.y + sign * t.y * __shfl_xor_sync(0xffffffffu, x.y, partner);
        y.z = x.z * c.z + sign * t.z * __shfl_xor_sync(0xffffffffu, x.z, partner);
        y.w = x.w * c.w + sign * t.w * __shfl_xor_sync(0xffffffffu, x.w, partner);
        return y;
    }
};

extern "C" __global__ void features_forward_fours(act* rope_q, act* query, const act* q, act* rope_k, act* key,
                                                  float* gates, const act* k, const float* cosines, const float* sines,
                                                  FeatureSizes s) {
    Fours at(s, cosines, sines);
    int lanes = s.dim / 4, map = at.side.map;
    bool is_key = at.side.has_gate;
    float4 v = at.inside ? load4((is_key ? k : q) + at.element) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float4 y = at.turned(v, s.dim, false);
    float4 f = map == MAP_ONE_MINUS_SIGMOID ? make_float4(sigmoid(-v.x), sigmoid(-v.y), sigmoid(-v.z), sigmoid(-v.w))
                                            : softmax4(v, lanes);
    float4 g = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (is_key && is_gate_of_mean(s.gate)) {
        float own = head_divisor(s.divisor, s.longest, at.head, s.kv);
        float one = gate_of_mean(lanes_sum(sum4(v), lanes) / s.dim, s.gate, own);
        g = make_float4(one, one, one, one);
        if (map == MAP_SHARE) {
            float share = -expm1f(one) * s.dim;
            f = make_float4(f.x * share, f.y * share, f.z * share, f.w * share);
        }
    } else if (is_key) {
        g = make_float4(one_gate(v.x, s.gate, s.divisor), one_gate(v.y, s.gate, s.divisor),
                        one_gate(v.z, s.gate, s.divisor), one_gate(v.w, s.gate, s.divisor));
    }
    if (!at.inside) return;
    store4((is_key ? rope_k : rope_q) + at.element, y);
    store4((is_key ? key : query) + at.element, f);
    if (is_key) store4(gates + at.element, g);
}

extern "C" __global__ void features_backward_fours(act* dq, const act* drope_q, const act* q, act* dk, const float* dgates,
                                                   const act* drope_k, const act* k, const float* cosines,
                                                   const float* sines, FeatureSizes s) {
    Fours at(s, cosines, sines);
    int lanes = s.dim / 4, map = at.side.map;
    bool is_key = at.side.has_gate;
    float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    act* dy = (is_key ? dk : dq) + at.element;
    float4 v = at.inside ? load4((is_key ? k : q) + at.element) : zero, d = at.inside ? load4(dy) : zero;
    float4 y = at.turned(at.inside ? load4((is_key ? drope_k : drope_q) + at.element) : zero, s.dim, true);
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
    if (is_key) {
        float4 dg = at.inside ? load4(dgates + at.element) : zero;
        if (is_gate_of_mean(s.gate)) {
            float mean = lanes_sum(sum4(v), lanes) / s.dim, sum = lanes_sum(sum4(dg), lanes);
            float own = head_divisor(s.divisor, s.longest, at.head, s.kv);
            if (map == MAP_SHARE) {
                // d (1 - exp(g)) = -exp(g).
                float g = gate_of_mean(mean, s.gate, own), share = -expm1f(g) * s.dim;
                sum -= expf(g) * s.dim * inner;
                d.x *= share, d.y *= share, d.z *= share, d.w *= share;
            }
            float each = gate_of_mean_slope(mean, s.gate, own) * sum / s.dim;
            d.x += each, d.y += each, d.z += each, d.w += each;
        } else {
            d.x += one_gate_gradient(v.x, dg.x, s.gate, s.divisor), d.y += one_gate_gradient(v.y, dg.y, s.gate, s.divisor);
            d.z += one_gate_gradient(v.z, dg.z, s.gate, s.divisor), d.w += one_gate_gradient(v.w, dg.w, s.gate, s.divisor);
        }
    }
    if (!at.inside) return;
    store4(dy, make_float4(s.recurrent * d.x + s.window * y.x, s.recurrent * d.y + s.window * y.y,
                           s.recurrent * d.z + s.window * y.z, s.recurrent * d.w + s.window * y.w));
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
