// What Python sees of the operators with fused second derivatives: addresses in (0 for none), the interpreter lock
// released. `mgd_kernels/functional` checks dtypes, shapes and layouts.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "nn/nn.h"

namespace py = pybind11;

namespace mgd {
namespace {

using Address = uintptr_t;

float* at(Address address) { return reinterpret_cast<float*>(address); }

using Shape = std::array<int64_t, 4>;  // or the strides of a tensor of four dimensions, whose last is 1

Strides outer(const Shape& strides) { return {strides[0], strides[1], strides[2]}; }

template <class T>
MaxPool<T> max_pool(const std::array<int64_t, 6>& sizes, Address x, Address y, Address which) {
    const auto [planes, height, width, kernel, stride, padding] = sizes;
    return {planes,
            height,
            width,
            kernel,
            stride,
            padding,
            reinterpret_cast<T*>(x),
            reinterpret_cast<T*>(y),
            reinterpret_cast<uint8_t*>(which)};
}

}  // namespace

void bind_nn(py::module_& m) {
    m.def(
        "nn_activation",
        [](int pass, int function, int64_t n, Address x, Address gy, Address c, Address y, Address slope, Address gx,
           Address ggy, int threads) {
            py::gil_scoped_release release;
            run_activation(
                static_cast<Pass>(pass),
                {static_cast<Function>(function), n, at(x), at(gy), at(c), at(y), at(slope), at(gx), at(ggy)}, threads);
        },
        "A pointwise function (with its slope), or the gradient of its gradient; n elements.");
    m.def(
        "nn_layer_norm",
        [](int pass, int64_t rows, int64_t width, float eps, bool centred, Address x, Address weight, Address bias,
           Address gy, Address c, Address cw, Address cb, Address mean, Address rstd, Address y, Address gx,
           Address ggy, Address gw, Address gb, int threads) {
            py::gil_scoped_release release;
            run_layer_norm(static_cast<Pass>(pass),
                           {rows, width, eps, centred, at(x), at(weight), at(bias), at(gy), at(c), at(cw), at(cb),
                            at(mean), at(rstd), at(y), at(gx), at(ggy), nullptr, at(gw), at(gb)},
                           threads);
        },
        "Layer norm, or RMS norm where it is not centred, over rows [rows, width].");
    m.def(
        "nn_channel_norm",
        [](int pass, int64_t batch, int64_t channels, int64_t inner, int64_t groups, float eps, Address x,
           Address weight, Address bias, Address gy, Address c, Address cw, Address cb, Address gmean, Address gvar,
           Address mean, Address var, Address rstd, Address y, Address gx, Address ggy, Address ggmean, Address ggvar,
           Address gw, Address gb, int threads) {
            py::gil_scoped_release release;
            run_channel_norm(static_cast<Pass>(pass),
                             {batch,  channels, inner,      groups,    eps,      at(x),    at(weight), at(bias), at(gy),
                              at(c),  at(cw),   at(cb),     at(gmean), at(gvar), at(mean), at(var),    at(rstd), at(y),
                              at(gx), at(ggy),  at(ggmean), at(ggvar), nullptr,  at(gw),   at(gb)},
                             threads);
        },
        "Group norm (groups > 0) or batch norm (groups = 0) of [batch, channels, inner].");
    m.def(
        "nn_softmax",
        [](int pass, int64_t rows, int64_t width, int64_t period, float scale, Address mask,
           const std::array<int64_t, 5>& strides, Address x, Address gy, Address c, Address y, Address gx, Address ggy,
           Address gp, int threads) {
            py::gil_scoped_release release;
            const auto [heads, length, batch, head, row] = strides;
            run_softmax(static_cast<Pass>(pass),
                        {rows,
                         width,
                         period,
                         scale,
                         {at(mask), heads, length, {batch, head, row}},
                         at(x),
                         at(gy),
                         at(c),
                         at(y),
                         at(gx),
                         at(ggy),
                         at(gp)},
                        threads);
        },
        "softmax(scale x + mask) over rows; period > 0: row i sees the columns up to i % period. The mask's heads and "
        "length, and its strides along batch, heads and length.");
    m.def(
        "nn_cross_entropy",
        [](int pass, int64_t rows, int64_t width, int64_t ignored, Address x, Address gy, Address c, Address target,
           Address losses, Address statistics, Address gx, Address ggy, Address first, int threads) {
            py::gil_scoped_release release;
            run_cross_entropy(static_cast<Pass>(pass),
                              {rows, width, ignored, at(x), at(gy), at(c), reinterpret_cast<const int64_t*>(target),
                               at(losses), at(statistics), at(gx), at(ggy), at(first)},
                              threads);
        },
        "Cross-entropy of rows with class indices; IndexError where one is out of bounds.");
    m.def(
        "nn_rotary",
        [](const Shape& shape, bool shared, bool transposed, const Shape& strides, Address x, Address cos, Address sin,
           Address y, int threads) {
            py::gil_scoped_release release;
            const auto [batch, heads, length, width] = shape;
            run_rotary(
                {batch, heads, length, width, shared, transposed, outer(strides), at(x), at(cos), at(sin), at(y)},
                threads);
        },
        "Rotary position embeddings of [batch, heads, length, width], or the transposed map.");
    m.def(
        "nn_rotary_sums",
        [](const Shape& shape, bool shared, const Shape& gy_strides, const Shape& x_strides, Address gy, Address x,
           Address gcos, Address gsin, int threads) {
            py::gil_scoped_release release;
            const auto [batch, heads, length, width] = shape;
            run_rotary_sums({batch, heads, length, width, shared, outer(gy_strides), outer(x_strides), at(gy), at(x),
                             at(gcos), at(gsin)},
                            threads);
        },
        "The cotangents of cos and sin.");
    m.def(
        "nn_max_pool",
        [](int pass, bool wide, const std::array<int64_t, 6>& sizes, Address x, Address y, Address which, int threads) {
            py::gil_scoped_release release;
            if (wide)
                run_max_pool(static_cast<Pass>(pass), max_pool<double>(sizes, x, y, which), threads);
            else
                run_max_pool(static_cast<Pass>(pass), max_pool<float>(sizes, x, y, which), threads);
        },
        "Max pooling; the sum at the places of the largest; or the elements there. sizes: planes, height, width, "
        "kernel, stride, padding. wide: of float64.");
}

}  // namespace mgd
