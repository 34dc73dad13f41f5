// The CPU kernels: what the dispatcher (`cpu.cpp`) and the unit compiled once per instruction set (`cpu_kernels.cpp`)
// share.

#pragma once

#include <cstdint>

#include "optim/codes.h"

namespace mgd {

// Elements that are reduced together: the partition is fixed, so that sums depend on neither threads nor machine.
constexpr int64_t kTile = 16384;
constexpr int kPass = 16;  // elements that are folded to four, which are added to a sum's four accumulators

// The tensors that a stretch of elements lies in. Each result lies where its input was, or apart from everything.
// A null pointer stands for zeros in state, grads and adjoint, and in new_adjoint for a cotangent that is not wanted.
struct Tensors {
    const void* state[3];
    void* new_state[3];  // written by a replay
    const void* adjoint[3];
    void* new_adjoint[3];  // written by a VJP, as is u
    void* u;
    const void* const* grads;  // one for each step
    // Of a JVP: [directions][slots + 1], in place, and [directions].
    void* const* tangents;
    const void* const* grad_tangents;
};

// A step, a replay of several, a VJP or a JVP over all tiles.
struct Task {
    RuleId rule;
    DType dtype;       // of state, adjoint and u
    DType grad_dtype;  // dtype, bf16 or f16
    bool update;       // the first result is p' - p in the place of p', of one step
    int64_t steps;
    int64_t groups;
    const void* coefficients;  // [steps][groups] of the rule's Coefficients<dtype>
    int64_t directions;        // of a JVP
    const void* tangents;      // [directions][groups] of the rule's Tangents<dtype>
    Wanted wanted;             // of a VJP's sums
};

struct Dot {
    DType x_dtype, y_dtype;
    const void *x, *y;
};

// One instruction set's kernels, each over the elements [begin, end) of one tile. `sums`: kMaxSums places, of
// which a VJP writes those that its task wants.
struct Kernels {
    void (*replay)(const Task&, const Tensors&, int64_t group, int64_t begin, int64_t end);
    void (*vjp)(const Task&, const Tensors&, int64_t group, int64_t begin, int64_t end, double* sums);
    // Along all directions; then the step, where there is a new_state.
    void (*jvp)(const Task&, const Tensors&, int64_t group, int64_t begin, int64_t end);
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
