// Rotary position embeddings. With x = (x1, x2) in halves, likewise cos and sin, and rot(x) = (-x2, x1):
//   y = x cos + rot(x) sin;   transposed, as from gy to gx: y = x cos + rotᵀ(x sin), rotᵀ(x) = (x2, -x1).
//   sums: gcos = Σ gy x, gsin = Σ gy rot(x), over heads, and over the batch where all examples share cos and sin.

#pragma once

#include "nn/kernels.h"
#include "nn/lanes.h"

namespace mgd {
namespace {

// Rows [begin, end) of [batch, heads, length].
void rotary(const Rotary& r, int64_t begin, int64_t end) {
    const int64_t half = r.width / 2;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t b = row / (r.heads * r.length), h = row / r.length % r.heads, l = row % r.length;
        const int64_t angle = ((r.shared ? 0 : b) * r.length + l) * r.width;
        const float *x = r.x + r.strides.at(b, h, l), *cos = r.cos + angle, *sin = r.sin + angle;
        float* y = r.y + row * r.width;
        const float* first = r.transposed ? sin + half : sin;  // what the halves are multiplied by when they cross over
        const float* second = r.transposed ? sin : sin + half;
        const float sign = r.transposed ? 1 : -1;
        for_lanes(half, [&](int64_t at, auto lanes) MGD_INLINE {
            const V x1 = lanes.load(x + at), x2 = lanes.load(x + half + at);
            lanes.store(y + at, x1 * lanes.load(cos + at) + sign * x2 * lanes.load(first + at));
            lanes.store(y + half + at, x2 * lanes.load(cos + half + at) - sign * x1 * lanes.load(second + at));
        });
    }
}

// Rows [begin, end) of cos and sin. Heads add up in float, examples in double.
void rotary_sums(const RotarySums& r, int64_t begin, int64_t end) {
    const int64_t half = r.width / 2;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t l = row % r.length, first = r.shared ? 0 : row / r.length;
        const int64_t last = r.shared ? r.batch : first + 1;
        float *cos = r.gcos + row * r.width, *sin = r.gsin + row * r.width;
        for_lanes(half, [&](int64_t at, auto lanes) MGD_INLINE {
            double totals[4][kWidth] = {};
            for (int64_t b = first; b < last; ++b) {
                V sums[4] = {};
                for (int64_t h = 0; h < r.heads; ++h) {
                    const float *gy = r.gy + r.gy_strides.at(b, h, l), *x = r.x + r.x_strides.at(b, h, l);
                    const V x1 = lanes.load(x + at), x2 = lanes.load(x + half + at);
                    const V g1 = lanes.load(gy + at), g2 = lanes.load(gy + half + at);
                    sums[0] += g1 * x1;
                    sums[1] += g2 * x2;
                    sums[2] -= g1 * x2;
                    sums[3] += g2 * x1;
                }
                for (int s = 0; s < 4; ++s)
                    for (int64_t i = 0; i < kWidth; ++i) totals[s][i] += sums[s][i];
            }
            float* const to[4] = {cos, cos + half, sin, sin + half};
            for (int s = 0; s < 4; ++s) {
                V sum{};
                for (int64_t i = 0; i < kWidth; ++i) sum[i] = totals[s][i];
                lanes.store(to[s] + at, sum);
            }
        });
    }
}

}  // namespace
}  // namespace mgd
