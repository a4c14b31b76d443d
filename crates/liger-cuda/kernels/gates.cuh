// Feature maps and gates by number, as `features.rs` hands them over.

#define MAP_SOFTMAX 0
#define MAP_ONE_MINUS_SIGMOID 1
#define MAP_SHARE 2
#define GATE_LOG_SIGMOID 0
#define GATE_MEAN_LOG_SIGMOID 1
#define GATE_MEAN_NEGATIVE_SOFTPLUS 2
#define GATE_NEGATIVE_EXP 3
#define GATE_MEAN_LOG_SIGMOID_OVER 4
#define GATE_NONE 5
#define GSA_DIVISOR 16.0f

__device__ __forceinline__ bool is_gate_of_mean(int gate) {
    return gate == GATE_MEAN_LOG_SIGMOID || gate == GATE_MEAN_LOG_SIGMOID_OVER || gate == GATE_MEAN_NEGATIVE_SOFTPLUS;
}

// `longest` is 0 for gates whose divisor is the same for all heads.
__device__ __forceinline__ float head_divisor(float divisor, float longest, int head, int heads) {
    if (longest == 0.0f) return divisor;
    return divisor * powf(longest / divisor, heads > 1 ? static_cast<float>(head) / (heads - 1) : 0.5f);
}

__device__ __forceinline__ float gate_of_mean(float mean, int gate, float divisor) {
    return -softplus(gate == GATE_MEAN_NEGATIVE_SOFTPLUS ? mean : -mean) / divisor;
}

// d logsigmoid(m) = sigmoid(-m); d -softplus(m) = -sigmoid(m).
__device__ __forceinline__ float gate_of_mean_slope(float mean, int gate, float divisor) {
    return (gate == GATE_MEAN_NEGATIVE_SOFTPLUS ? -sigmoid(mean) : sigmoid(-mean)) / divisor;
}
