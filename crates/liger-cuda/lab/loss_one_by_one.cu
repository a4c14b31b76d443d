// Losses over rows of logits, each row's gradient written over its logits, and the optimizer. One block a row.

__device__ __forceinline__ float log_sum_exp(const act* row, int vocabulary) {
    float best = NEGATIVE_INFINITY, sum = 0.0f;
    for (int i = threadIdx.x; i < vocabulary; i += blockDim.x) {
        float x = to_float(row[i]);
        if (x > best) {
            sum *= expf(best - x);
            best = x;
        }
        if (x > NEGATIVE_INFINITY) sum += expf(x - best);
    }
    float all = block_max(best);
    sum = block_sum(best == NEGATIVE_INFINITY ? 0.0f : sum * expf(best - all));
    return all + logf(sum);
}

// Index of the largest of a row, the last of equals.
extern "C" __global__ void argmax(u32* found, const act* logits, int vocabulary) {
    __shared__ float values[32];
    __shared__ int places[32];
    const act* row = logits + static_cast<long long>(blockIdx.x) * vocabulary;
    float best = NEGATIVE_INFINITY;
    int place = 0;
    for (int i = threadIdx.x; i < vocabulary; i += blockDim.x) {
        float x = to_float(row[i]);
        if (x >= best) best = x, place = i;
    }
    for (int offset = 16; offset > 0; offset >>= 1) {
        float x = __shfl_xor_sync(0xffffffffu, best, offset);
        int i = __shfl_xor_sync(0xffffffffu, place, offset);
        if (x > best || (x == best && i > place)) best = x, place = i;
    }
    if ((threadIdx.x & 31) == 0) values[threadIdx.x >> 5] = best, places[threadIdx.x >> 5] = place;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int w = 1; w < static_cast<int>(blockDim.x >> 5); w++) {
        if (values[w] > best || (values[w] == best && places[w] > place)) best = values[w], place = places[w];
    }
    found[blockIdx.x] = place;
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
    for (int i = threadIdx.x; i < vocabulary; i += blockDim.x) {
        float p = expf(to_float(row[i]) - total);
        row[i] = from_float<act>(scale * (i == label ? p - 1.0f : p));
    }
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

// Part of the sum of squares of each block.
extern "C" __global__ void sum_of_squares(double* parts, const float* x, long long n) {
    __shared__ double sums[8];
    double sum = 0.0;
    long long step = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
        sum += static_cast<double>(x[i]) * x[i];
    }
    for (int offset = 16; offset > 0; offset >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if ((threadIdx.x & 31) == 0) sums[threadIdx.x >> 5] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < static_cast<int>(blockDim.x >> 5); i++) sum += sums[i];
        parts[blockIdx.x] = sum;
    }
}

// PyTorch's AdamW; `first_scale` and `second_scale` are 1 / (1 - beta^step).
extern "C" __global__ void adamw(float* parameter, const float* gradient, float* first, float* second,
                                 float learning_rate, float beta1, float beta2, float epsilon, float decay,
                                 float first_scale, float second_scale, float gradient_scale, long long n) {
    long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float g = gradient[i] * gradient_scale;
    float m = beta1 * first[i] + (1.0f - beta1) * g;
    float v = beta2 * second[i] + (1.0f - beta2) * g * g;
    first[i] = m, second[i] = v;
    float w = parameter[i];
    parameter[i] = w - learning_rate * (m * first_scale / (sqrtf(v * second_scale) + epsilon) + decay * w);
}
