// The CPU kernels: what the dispatcher (`cpu.cpp`) and the unit compiled once per instruction set (`cpu_kernels.cpp`)
// say to each other, and what Python calls.

#pragma once

#include <cstdint>

namespace mgd {

enum class DType : int { f32, f64, bf16, f16 };
enum class RuleId : int { adam, sgd_plain, sgd_momentum, sgd_nesterov };

// Elements that are reduced together: the partition is fixed, so that sums depend on neither threads nor machine.
constexpr int64_t kTile = 16384;
constexpr int kLanes = 16;  // virtual accumulators of a reduction: element i of a tile goes to lane i % kLanes
constexpr int kMaxSums = 9;

// A step, a replay of several, or a VJP over all tiles. Pointers to tensors of `n` elements.
struct Task {
    RuleId rule;
    DType dtype;       // of state, adjoint and u
    DType grad_dtype;  // dtype, bf16 or f16
    void* state[3];
    void* adjoint[3];
    void* u;
    const void* const* grads;  // one for each step
    int64_t steps;
    int64_t groups;
    const void* coefficients;  // [steps][groups] of the rule's Coefficients<dtype>
};

struct Dot {
    DType x_dtype, y_dtype;
    const void *x, *y;
};

// One instruction set's kernels, each over the elements [begin, end) of one tile. `sums`: kMaxSums places.
struct Kernels {
    void (*replay)(const Task&, int64_t group, int64_t begin, int64_t end);
    void (*vjp)(const Task&, int64_t group, int64_t begin, int64_t end, double* sums);
    void (*dot)(const Dot&, int64_t begin, int64_t end, double* sums);
};

namespace baseline {
Kernels kernels();
}
namespace avx2 {
Kernels kernels();
}
namespace avx512 {
Kernels kernels();
}

}  // namespace mgd
