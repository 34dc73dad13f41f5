// Group norm and batch norm: `layer_norm.h` with weights that are constant over each piece of a set, so that the sums
// over pieces hold everything that the cotangents of weight and bias need. Batch norm gives out mean and (biased)
// variance too; their cotangents gmean and gvar join gx, as gmean / d + gvar 2 (x - mean) / d for sets of d elements.

#pragma once

#include <math.h>

#include "nn/kernels.h"
#include "nn/lanes.h"
#include "nn/passes.h"

namespace mgd {
namespace {

struct ChannelNormSet {
    const ChannelNorm& a;
    int64_t set, pieces, inner;
    double d;

    ChannelNormSet(const ChannelNorm& task, int64_t s)
        : a(task), set(s), pieces(task.pieces()), inner(task.inner), d(double(task.pieces()) * task.inner) {}

    // body(piece, offset of its elements, weight, channel)
    template <class F>
    MGD_LANES void each(F body) const {
        for (int64_t i = 0; i < pieces; ++i) {
            const int64_t piece = a.piece(set, i), channel = a.groups ? piece % a.channels : set;
            body(piece, piece * inner, a.weight ? a.weight[channel] : 1.0f, channel);
        }
    }

    void forward() const {
        double sum = 0, squares = 0;
        each([&](int64_t, int64_t offset, float, int64_t) MGD_INLINE {
            const float* x = a.x + offset;
            add_sums<1>(inner, &sum, [&](int64_t at, auto lanes, V* t) MGD_INLINE { t[0] = lanes.load(x + at); });
        });
        const float mean = sum / d;
        each([&](int64_t, int64_t offset, float, int64_t) MGD_INLINE {
            const float* x = a.x + offset;
            add_sums<1>(inner, &squares, [&](int64_t at, auto lanes, V* t) MGD_INLINE {
                const V centered = lanes.load(x + at) - mean;
                t[0] = centered * centered;
            });
        });
        const double var = squares / d, rstd = 1.0 / sqrt(var + a.eps);
        each([&](int64_t, int64_t offset, float weight, int64_t channel) MGD_INLINE {
            const float *x = a.x + offset, scale = weight * rstd, shift = a.bias ? a.bias[channel] : 0.0f;
            float* y = a.y + offset;
            for_lanes(inner, [&](int64_t at, auto lanes)
                                 MGD_INLINE { lanes.store(y + at, (lanes.load(x + at) - mean) * scale + shift); });
        });
        a.mean[set] = mean;
        if (a.var) a.var[set] = var;
        a.rstd[set] = rstd;
    }

    void backward() const {
        const float mean = a.mean[set];
        const double r = a.rstd[set];
        double g0 = 0, g1 = 0;
        each([&](int64_t piece, int64_t offset, float weight, int64_t) MGD_INLINE {
            const float *x = a.x + offset, *gy = a.gy + offset;
            double sums[2] = {};
            add_sums<2>(inner, sums, [&](int64_t at, auto lanes, V* t) MGD_INLINE {
                t[0] = lanes.load(gy + at);
                t[1] = t[0] * (lanes.load(x + at) - mean);
            });
            a.partial[kPieceSums * piece] = r * sums[1];
            a.partial[kPieceSums * piece + 1] = sums[0];
            g0 += weight * sums[0];
            g1 += weight * r * sums[1];
        });
        const double gmean = a.gmean ? a.gmean[set] : 0, gvar = a.gvar ? a.gvar[set] : 0;
        const float constant = (gmean - r * g0) / d, along = (2 * gvar - r * r * g1) / d;
        each([&](int64_t, int64_t offset, float weight, int64_t) MGD_INLINE {
            const float *x = a.x + offset, *gy = a.gy + offset, scale = weight * r;
            float* gx = a.gx + offset;
            for_lanes(inner, [&](int64_t at, auto lanes) MGD_INLINE {
                lanes.store(gx + at, lanes.load(gy + at) * scale + constant + (lanes.load(x + at) - mean) * along);
            });
        });
    }

    void double_backward() const {
        const float mean = a.mean[set];
        const double r = a.rstd[set];
        double c0 = 0, c1 = 0, g0 = 0, g1 = 0, cg = 0, w0 = 0, w1 = 0;  // means over the set
        each([&](int64_t piece, int64_t offset, float weight, int64_t channel) MGD_INLINE {
            const float *x = a.x + offset, *gy = a.gy + offset, *c = a.c + offset;
            double* sums = a.partial + kPieceSums * piece;
            for (int s = 0; s < kPieceSums; ++s) sums[s] = 0;
            add_sums<5>(inner, sums, [&](int64_t at, auto lanes, V* t) MGD_INLINE {
                const V centered = lanes.load(x + at) - mean;
                t[0] = lanes.load(c + at);
                t[1] = t[0] * centered;
                t[2] = lanes.load(gy + at);
                t[3] = t[2] * centered;
                t[4] = t[0] * t[2];
            });
            const double cw = a.cw ? a.cw[channel] : 0;
            c0 += sums[0] / d;
            c1 += r * sums[1] / d;
            g0 += weight * sums[2] / d;
            g1 += weight * r * sums[3] / d;
            cg += weight * sums[4] / d;
            w0 += cw * sums[2] / d;
            w1 += cw * r * sums[3] / d;
        });
        const double gvar = a.gvar ? a.gvar[set] : 0;
        const double q0 = w0 - r * (c0 * g1 + g0 * c1);
        const double q1 = w1 - 2 * r * c1 * g1 + r * (cg - c0 * g0 - c1 * g1);
        const float constant = -r * q0 - 2 * gvar * c0 / d, along = -r * r * q1;
        const float from_c = 2 * gvar / d - r * r * g1, mean_c = c0, along_c = r * c1;
        each([&](int64_t piece, int64_t offset, float weight, int64_t channel) MGD_INLINE {
            const float *x = a.x + offset, *gy = a.gy + offset, *c = a.c + offset;
            float *gx = a.gx + offset, *ggy = a.ggy + offset;
            const double cw = a.cw ? a.cw[channel] : 0;
            const float from_gy = r * (cw - r * weight * c1), scale = weight * r, rcw = r * cw;
            const float shift = a.cb ? a.cb[channel] : 0;
            for_lanes(inner, [&](int64_t at, auto lanes) MGD_INLINE {
                const V u = lanes.load(c + at), centered = lanes.load(x + at) - mean;
                lanes.store(gx + at, u * from_c + lanes.load(gy + at) * from_gy + constant + centered * along);
                lanes.store(ggy + at, (u - mean_c - centered * along_c) * scale + centered * rcw + shift);
            });
            double* sums = a.partial + kPieceSums * piece;
            sums[0] = r * (sums[4] - c0 * sums[2] - r * c1 * sums[3]);
        });
        if (a.ggmean) a.ggmean[set] = c0;
        if (a.ggvar) a.ggvar[set] = 2 * c1 / r;
    }
};

void channel_norm(Pass pass, const ChannelNorm& task, int64_t begin, int64_t end) {
    each_pass<ChannelNormSet>(pass, task, begin, end);
}

}  // namespace
}  // namespace mgd
