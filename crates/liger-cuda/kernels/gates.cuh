// Feature maps and gates by number, as `features.rs` hands them over.

#define MAP_SOFTMAX 0
#define GATE_LOG_SIGMOID 0
#define GATE_MEAN_LOG_SIGMOID 1
#define GATE_MEAN_NEGATIVE_SOFTPLUS 2
#define GATE_NEGATIVE_EXP 3
#define GSA_DIVISOR 16.0f
