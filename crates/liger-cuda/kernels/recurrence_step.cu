// The gated recurrence for one token of each sequence.

#define STEP_COLUMNS 32

// One token a sequence: S := gate S + k^T v, o = q S, for 32 columns of S; 256 threads are 32 columns x 8 parts of Dk.
// Grid (ceil(Dv / 32), K, sequences).
extern "C" __global__ void __launch_bounds__(256)
    recurrence_step(act* out, const act* q, const act* k, const act* v, const float* gates, float* states,
                    const int* slots, Sizes s) {
    __shared__ float sums[8][GROUP][STEP_COLUMNS + 1];
    int column = threadIdx.x % STEP_COLUMNS, part = threadIdx.x / STEP_COLUMNS;
    int b = blockIdx.x * STEP_COLUMNS + column, head = blockIdx.y;
    long long row = blockIdx.z;
    float* state = states + (static_cast<long long>(slots[row]) * s.kv + head) * DK * DV;
    float sum[GROUP];
#pragma unroll
    for (int g = 0; g < GROUP; g++) sum[g] = 0.0f;
    if (b < DV) {
        float value = to_float(v[(row * s.kv + head) * DV + b]);
        float late = AXIS == 1 ? expf(gates[(row * s.kv + head) * DV + b]) : 0.0f;
        for (int a = part; a < DK; a += 8) {
            float decay = AXIS == 1 ? late : expf(gates[(row * s.kv + head) * DK + a]);
            float x = decay * state[a * DV + b] + to_float(k[(row * s.kv + head) * DK + a]) * value;
            state[a * DV + b] = x;
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                sum[g] += to_float(q[(row * s.heads + head * GROUP + g) * DK + a]) * x;
            }
        }
    }
#pragma unroll
    for (int g = 0; g < GROUP; g++) sums[part][g][column] = sum[g];
    __syncthreads();
    for (int g = part; g < GROUP; g += 8) {
        float total = 0.0f;
        for (int p = 0; p < 8; p++) total += sums[p][g][column];
        if (b < DV) out[(row * s.heads + head * GROUP + g) * DV + b] = from_float<act>(total);
    }
}
