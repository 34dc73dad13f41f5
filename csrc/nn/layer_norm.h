// Layer norm and RMS norm over rows. With x̂ = (x - mean) rstd, g = gy weight, and <> the mean over a row:
//   backward:         gx = rstd (g - <g> - x̂ <g x̂>); gw = Σ gy x̂; gb = Σ gy, over all rows.
//   double backward:  of S = Σ c gx + cw gw + cb gb, with h = rstd (c - <c> - x̂ <c x̂>):
//     ggy = h weight + cw x̂ + cb;   gw = Σ h gy, over all rows;
//     gx  = rstd (q - <q> - x̂ (<q x̂> + rstd A)), where q = cw gy - rstd (c <g x̂> + g <c x̂>) is the cotangent of x̂
//           and A = <c g> - <c><g> - <c x̂><g x̂> that of rstd, a row's share of it.
// RMS norm takes nothing from x: mean, <g>, <c> and <q> are 0 in its formulas.

#pragma once

#include "nn/kernels.h"
#include "nn/lanes.h"
#include "nn/passes.h"

namespace mgd {
namespace {

struct LayerNormBlock {
    const LayerNorm& a;
    int64_t block, begin, end;
    double d;

    LayerNormBlock(const LayerNorm& task, int64_t b)
        : a(task),
          block(b),
          begin(b * kRowBlock),
          end(begin + kRowBlock < task.rows ? begin + kRowBlock : task.rows),
          d(task.width) {}

    template <class Lanes>
    static MGD_LANES V or_else(const float* from, int64_t at, Lanes lanes, float value) {
        return from ? lanes.load(from + at) : splat(value);
    }

    // Of a row, where that is taken from its elements.
    double average(double sum) const { return a.centred ? sum / d : 0; }

    void forward() const {
        for (int64_t row = begin; row < end; ++row) {
            const float* x = a.x + row * a.width;
            float* y = a.y + row * a.width;
            double sum = 0, squares = 0;
            if (a.centred)
                add_sums<1>(a.width, &sum, [&](int64_t at, auto lanes, V* t) MGD_INLINE { t[0] = lanes.load(x + at); });
            const float mean = sum / d;
            add_sums<1>(a.width, &squares, [&](int64_t at, auto lanes, V* t) MGD_INLINE {
                const V centered = lanes.load(x + at) - mean;
                t[0] = centered * centered;
            });
            const float rstd = 1.0 / sqrt(squares / d + a.eps);
            for_lanes(a.width, [&](int64_t at, auto lanes) MGD_INLINE {
                const V normalised = (lanes.load(x + at) - mean) * rstd;
                lanes.store(y + at, normalised * or_else(a.weight, at, lanes, 1) + or_else(a.bias, at, lanes, 0));
            });
            a.mean[row] = mean;
            a.rstd[row] = rstd;
        }
    }

    void backward() const {
        float *gw = a.partial + 2 * block * a.width, *gb = gw + a.width;
        __builtin_memset(gw, 0, 2 * sizeof(float) * a.width);
        for (int64_t row = begin; row < end; ++row) {
            const float *x = a.x + row * a.width, *gy = a.gy + row * a.width;
            float* gx = a.gx + row * a.width;
            const float mean = a.mean[row], rstd = a.rstd[row];
            double sums[2] = {};
            add_sums<2>(a.width, sums, [&](int64_t at, auto lanes, V* t) MGD_INLINE {
                t[0] = lanes.load(gy + at) * or_else(a.weight, at, lanes, 1);
                t[1] = t[0] * (lanes.load(x + at) - mean);
            });
            const float g = average(sums[0]), gn = sums[1] / d * rstd;
            for_lanes(a.width, [&](int64_t at, auto lanes) MGD_INLINE {
                const V cotangent = lanes.load(gy + at), normalised = (lanes.load(x + at) - mean) * rstd;
                const V weighted = cotangent * or_else(a.weight, at, lanes, 1);
                lanes.store(gx + at, rstd * (weighted - g - normalised * gn));
                lanes.store(gw + at, lanes.load(gw + at) + cotangent * normalised);
                lanes.store(gb + at, lanes.load(gb + at) + cotangent);
            });
        }
    }

    void double_backward() const {
        float* gw = a.partial + block * a.width;
        __builtin_memset(gw, 0, sizeof(float) * a.width);
        for (int64_t row = begin; row < end; ++row) {
            const float *x = a.x + row * a.width, *gy = a.gy + row * a.width, *c = a.c + row * a.width;
            float *gx = a.gx + row * a.width, *ggy = a.ggy + row * a.width;
            const float mean = a.mean[row], rstd = a.rstd[row];
            const double r = rstd;
            double sums[7] = {};
            add_sums<7>(a.width, sums, [&](int64_t at, auto lanes, V* t) MGD_INLINE {
                const V cotangent = lanes.load(gy + at), centered = lanes.load(x + at) - mean;
                const V g = cotangent * or_else(a.weight, at, lanes, 1);
                t[0] = lanes.load(c + at);
                t[1] = t[0] * centered;
                t[2] = g;
                t[3] = g * centered;
                t[4] = t[0] * g;
                t[5] = cotangent * or_else(a.cw, at, lanes, 0);
                t[6] = t[5] * centered;
            });
            const double c0 = average(sums[0]), c1 = r * sums[1] / d, g0 = average(sums[2]), g1 = r * sums[3] / d;
            const double share = sums[4] / d - c0 * g0 - c1 * g1;
            const float q0 = average(sums[5]) - r * (c0 * g1 + g0 * c1);
            const float q1 = r * sums[6] / d - 2 * r * c1 * g1 + r * share;
            const float mean_c = c0, along_c = c1, rg1 = r * g1, rc1 = r * c1;
            for_lanes(a.width, [&](int64_t at, auto lanes) MGD_INLINE {
                const V cotangent = lanes.load(gy + at), normalised = (lanes.load(x + at) - mean) * rstd;
                const V w = or_else(a.weight, at, lanes, 1), cw = or_else(a.cw, at, lanes, 0), u = lanes.load(c + at);
                const V h = rstd * (u - mean_c - normalised * along_c);
                const V q = cotangent * (cw - w * rc1) - u * rg1;
                lanes.store(ggy + at, h * w + cw * normalised + or_else(a.cb, at, lanes, 0));
                lanes.store(gx + at, rstd * (q - q0 - normalised * q1));
                lanes.store(gw + at, lanes.load(gw + at) + h * cotangent);
            });
        }
    }
};

void layer_norm(Pass pass, const LayerNorm& task, int64_t begin, int64_t end) {
    each_pass<LayerNormBlock>(pass, task, begin, end);
}

}  // namespace
}  // namespace mgd
