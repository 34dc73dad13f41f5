// The operators with fused second derivatives: what the dispatcher (`nn.cpp`) and the unit compiled once per
// instruction set (`kernels.cpp`) share.
//
// Names: gy, gx, gw, gb are the cotangents of y, x, weight, bias that a backward pass takes and gives; c, cw, cb are
// the cotangents of gx, gw, gb that a double backward pass takes, and ggy that of gy which it gives. Everything is
// float32 and contiguous. A null pointer stands for zeros in an input, ones in `weight`, and for "not wanted".

#pragma once

#include <cstdint>

namespace mgd {

enum class Pass : int { forward, backward, double_backward };
enum class Function : int { gelu, gelu_tanh, silu, tanh, sigmoid };

// forward: y = f(x) and, where wanted, slope = f'(x). The backward pass, gy slope, is a product that torch has.
// double_backward: (ggy, gx) = (c slope, c gy f''(x)).
struct Activation {
    Function function;
    int64_t n;
    const float *x, *gy, *c;
    float *y, *slope, *gx, *ggy;
};

// Rows [rows, width], normalised; weight and bias [width], mean and rstd [rows].
struct LayerNorm {
    int64_t rows, width;
    float eps;
    const float *x, *weight, *bias, *gy, *c, *cw, *cb;
    float *mean, *rstd, *y, *gx, *ggy;
    float* partial;  // [blocks, 2, width]: gw and gb of each block of kRowBlock rows
    float *gw, *gb;  // [width]
};
constexpr int64_t kRowBlock = 64;

// x [batch, channels, inner]. A set of `pieces` (of `inner` elements each) is normalised together: the channels of one
// group in one example (group norm), or one channel in all examples (batch norm).
struct ChannelNorm {
    int64_t batch, channels, inner, groups;  // groups: 0 for batch norm
    float eps;
    const float *x, *weight, *bias, *gy, *c, *cw, *cb, *gmean, *gvar;
    float *mean, *var, *rstd, *y, *gx, *ggy;  // mean, var (biased), rstd: one for each set
    float *ggmean, *ggvar;                    // batch norm: cotangents of gmean and gvar
    double* partial;                          // [pieces of all sets, 5]
    float *gw, *gb;                           // [channels]

    int64_t sets() const { return groups ? batch * groups : channels; }
    int64_t pieces() const { return groups ? channels / groups : batch; }
    int64_t piece(int64_t set, int64_t i) const { return groups ? set * pieces() + i : i * channels + set; }
};
constexpr int kPieceSums = 5;

// y = softmax(scale x) over rows [rows, width]. causal: row i sees the columns up to i % period.
struct Softmax {
    int64_t rows, width, period;
    float scale;
    const float *x, *gy, *c;
    float *y, *gx, *ggy, *gp;  // the backward passes read y; gp: the cotangent of y that the double backward gives
};

// losses [rows] = log sum exp(x) - x[target] over rows [rows, width]; those of ignored rows are 0. statistics
// [rows, 2]: the row's maximum and log sum exp(x - maximum).
struct CrossEntropy {
    int64_t rows, width, ignored;
    const float *x, *gy, *c;
    const int64_t* target;
    float *losses, *statistics, *gx, *ggy;
};

// One instruction set's kernels, over the items [begin, end): elements, rows, row blocks, or sets.
struct NnKernels {
    void (*activation)(Pass, const Activation&, int64_t begin, int64_t end);
    void (*layer_norm)(Pass, const LayerNorm&, int64_t begin, int64_t end);
    void (*channel_norm)(Pass, const ChannelNorm&, int64_t begin, int64_t end);
    void (*softmax)(Pass, const Softmax&, int64_t begin, int64_t end);
    void (*cross_entropy)(Pass, const CrossEntropy&, int64_t begin, int64_t end);
};

namespace baseline {
NnKernels nn_kernels();
}
namespace avx2 {
NnKernels nn_kernels();
}
namespace avx512 {
NnKernels nn_kernels();
}

}  // namespace mgd
