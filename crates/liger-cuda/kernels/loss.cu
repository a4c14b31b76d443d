// Losses over rows of logits, each row's gradient written over its logits, and the optimizer. One block a row.

// Eight neighbours of a row at once where rows begin at multiples of 16 bytes, else one: f(x, first, count) with count
// values in x, which it may change; `stored` says whether they go back.
template <bool STORED, class F> __device__ __forceinline__ void for_each(act* row, int vocabulary, F f) {
    if (vocabulary % 8 == 0) {
        for (int i = threadIdx.x * 8; i < vocabulary; i += blockDim.x * 8) {
            float4 a = load4(row + i), b = load4(row + i + 4);
            float x[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
            f(x, i, 8);
            if (!STORED) continue;
            store4(row + i, make_float4(x[0], x[1], x[2], x[3]));
            store4(row + i + 4, make_float4(x[4], x[5], x[6], x[7]));
        }
        return;
    }
    for (int i = threadIdx.x; i < vocabulary; i += blockDim.x) {
        float x[8] = {to_float(row[i])};
        f(x, i, 1);
        if (STORED) row[i] = from_float<act>(x[0]);
    }
}

__device__ __forceinline__ float log_sum_exp(const act* row, int vocabulary) {
    float best = NEGATIVE_INFINITY, sum = 0.0f;
    for_each<false>(const_cast<act*>(row), vocabulary, [&](float (&x)[8], int, int count) {
        float top = x[0];
#pragma unroll
        for (int k = 1; k < 8; k++) top = k < count ? fmaxf(top, x[k]) : top;
        if (top > best) {
            sum *= __expf(best - top);
            best = top;
        }
        if (best == NEGATIVE_INFINITY) return;
#pragma unroll
        for (int k = 0; k < 8; k++) sum += k < count ? __expf(x[k] - best) : 0.0f;
    });
    float all = block_max(best);
    sum = block_sum(best == NEGATIVE_INFINITY ? 0.0f : sum * __expf(best - all));
    return all + logf(sum);
}

// label < 0: loss 0. With `has_scale`, logits become scale (softmax - onehot).
extern "C" __global__ void cross_entropy(float* losses, act* logits, const int* labels, int vocabulary, int has_scale,
                                         float scale) {
    act* row = logits + static_cast<long long>(blockIdx.x) * vocabulary;
    int label = labels[blockIdx.x];
    if (label < 0) {
        if (threadIdx.x == 0) losses[blockIdx.x] = 0.0f;
        if (has_scale) {
            for (int i = threadIdx.x; i < vocabulary; i += blockDim.x) row[i] = from_float<act>(0.0f);
        }
        return;
    }
    float total = log_sum_exp(row, vocabulary);
    if (threadIdx.x == 0) losses[blockIdx.x] = total - to_float(row[label]);
    __syncthreads();
    if (!has_scale) return;
    for_each<true>(row, vocabulary, [&](float (&x)[8], int first, int count) {
#pragma unroll
        for (int k = 0; k < 8; k++) {
            if (k < count) x[k] = scale * (__expf(x[k] - total) - (first + k == label ? 1.0f : 0.0f));
        }
    });
}

// KL(p || q) = sum p (log p - log q); its gradient by the student's logits is q - p.
extern "C" __global__ void kl_divergence(float* losses, act* student, const act* teacher, const int* count,
                                         int vocabulary, int has_scale, float scale) {
    long long at = static_cast<long long>(blockIdx.x) * vocabulary;
    student += at, teacher += at;
    if (count[blockIdx.x] == 0) {
        if (threadIdx.x == 0) losses[blockIdx.x] = 0.0f;
        if (has_scale) {
            for (int i = threadIdx.x; i < vocabulary; i += blockDim.x) student[i] = from_float<act>(0.0f);
        }
        return;
    }
    float total_q = log_sum_exp(student, vocabulary), total_p = log_sum_exp(teacher, vocabulary);
    float sum = 0.0f;
    for (int i = threadIdx.x; i < vocabulary; i += blockDim.x) {
        float log_q = to_float(student[i]) - total_q, log_p = to_float(teacher[i]) - total_p;
        float p = expf(log_p);
        if (p > 0.0f) sum += p * (log_p - log_q);
        if (has_scale) student[i] = from_float<act>(scale * (expf(log_q) - p));
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) losses[blockIdx.x] = sum;
}

// Tensors of float32 that one launch works on: grid (shares, tensors).
struct Squared {
    const float* x;
    long long n;
};

// parts [tensors, shares].
extern "C" __global__ void sum_of_squares(double* parts, const Squared* tensors) {
    __shared__ double sums[8];
    Squared own = tensors[blockIdx.y];
    double sum = 0.0;
    long long step = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < own.n; i += step) {
        sum += static_cast<double>(own.x[i]) * own.x[i];
    }
    for (int offset = 16; offset > 0; offset >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if ((threadIdx.x & 31) == 0) sums[threadIdx.x >> 5] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < static_cast<int>(blockDim.x >> 5); i++) sum += sums[i];
        parts[static_cast<long long>(blockIdx.y) * gridDim.x + blockIdx.x] = sum;
    }
}

struct Updated {
    float* parameter;
    const float* gradient;
    float *first, *second;
    long long n;
};

// PyTorch's AdamW; `first_scale` and `second_scale` are 1 / (1 - beta^step).
extern "C" __global__ void adamw(const Updated* tensors, float learning_rate, float beta1, float beta2, float epsilon,
                                 float decay, float first_scale, float second_scale, float gradient_scale) {
    Updated own = tensors[blockIdx.y];
    long long step = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < own.n; i += step) {
        float g = own.gradient[i] * gradient_scale;
        float m = beta1 * own.first[i] + (1.0f - beta1) * g;
        float v = beta2 * own.second[i] + (1.0f - beta2) * g * g;
        own.first[i] = m, own.second[i] = v;
        float w = own.parameter[i];
        own.parameter[i] = w - learning_rate * (m * first_scale / (sqrtf(v * second_scale) + epsilon) + decay * w);
    }
}
