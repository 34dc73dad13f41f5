// The operators with fused second derivatives: what the dispatcher (`nn.cpp`) and the unit compiled once per
// instruction set (`kernels.cpp`) share.
//
// Names: gy, gx, gw, gb are the cotangents of y, x, weight, bias that a backward pass takes and gives; c, cw, cb are
// the cotangents of gx, gw, gb that a double backward pass takes, and ggy that of gy which it gives. Everything is
// float32 (max pooling: or float64) and contiguous. A null pointer stands for zeros in an input, ones in `weight`, and
// for "not wanted".

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

// Rows [rows, width], normalised; weight and bias [width], mean and rstd [rows]. centred: by mean and variance (layer
// norm), otherwise by the mean of the squares (RMS norm), where `mean` is 0.
struct LayerNorm {
    int64_t rows, width;
    float eps;
    bool centred;
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

// Of [batch, heads, length, width], whose last stride is 1.
struct Strides {
    int64_t batch, head, row;

    int64_t at(int64_t b, int64_t h, int64_t l) const { return b * batch + h * head + l * row; }
};

// What is added to the logits of attention [batch, heads, length, width]; null: nothing. A row of nothing but minus
// infinity sees nothing, and its softmax is 0.
struct Mask {
    const float* first;
    int64_t heads, length;
    Strides strides;

    const float* of(int64_t i) const {
        return first + strides.at(i / (heads * length), i / length % heads, i % length);
    }
};

// y = softmax(scale x + mask) over rows [rows, width]. causal: row i sees the columns up to i % period.
struct Softmax {
    int64_t rows, width, period;
    float scale;
    Mask mask;
    const float *x, *gy, *c;
    float *y, *gx, *ggy, *gp;  // the backward passes read y; gp: the cotangent of y that the double backward gives
};

// losses [rows] = log sum exp(x) - x[target] over rows [rows, width]; those of ignored rows are 0. statistics
// [rows, 2]: the row's maximum and log sum exp(x - maximum). forward: gx too, where wanted. double_backward: gx is the
// cotangent of x, and `first`, where wanted, what the backward pass gives. gx may be x, and `first` may be c.
struct CrossEntropy {
    int64_t rows, width, ignored;
    const float *x, *gy, *c;
    const int64_t* target;
    float *losses, *statistics, *gx, *ggy, *first;
};

// y [batch, heads, length, width] = x cos + rot(x) sin, or the transposed map (see rotary.h). cos, sin [1 or batch,
// length, width]. shared: by all examples.
struct Rotary {
    int64_t batch, heads, length, width;
    bool shared, transposed;
    Strides strides;
    const float *x, *cos, *sin;
    float* y;
};

// gcos, gsin [1 or batch, length, width]: the cotangents of cos and sin, from x and that of y.
struct RotarySums {
    int64_t batch, heads, length, width;
    bool shared;
    Strides gy_strides, x_strides;
    const float *gy, *x;
    float *gcos, *gsin;
};

// The largest elements of windows of planes x [planes, height, width], y [planes, rows, columns], and `which` of its
// window's elements each is. forward: y and which of x; backward: x as the sum of y at these places; double_backward: y
// as the elements of x there.
template <class T>
struct MaxPool {
    int64_t planes, height, width, kernel, stride, padding;  // kernel and stride: 2 and 2, 3 and 2, or 3 and 1
    T *x, *y;
    uint8_t* which;
    int64_t rows = (height + 2 * padding - kernel) / stride + 1, columns = (width + 2 * padding - kernel) / stride + 1;

    int64_t scratch() const { return (2 * kernel + 1 + stride) * (columns + 2); }
};

// One instruction set's kernels, over the items [begin, end): elements, rows, row blocks, sets, or planes.
struct NnKernels {
    void (*activation)(Pass, const Activation&, int64_t begin, int64_t end);
    void (*layer_norm)(Pass, const LayerNorm&, int64_t begin, int64_t end);
    void (*channel_norm)(Pass, const ChannelNorm&, int64_t begin, int64_t end);
    void (*softmax)(Pass, const Softmax&, int64_t begin, int64_t end);
    void (*cross_entropy)(Pass, const CrossEntropy&, int64_t begin, int64_t end);
    void (*rotary)(const Rotary&, int64_t begin, int64_t end);
    void (*rotary_sums)(const RotarySums&, int64_t begin, int64_t end);
    void (*max_pool)(Pass, const MaxPool<float>&, float* scratch, int64_t begin, int64_t end);
    void (*max_pool_wide)(Pass, const MaxPool<double>&, double* scratch, int64_t begin, int64_t end);
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
