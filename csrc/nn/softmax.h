// Softmax and cross-entropy over rows.

#pragma once

#include <math.h>

#include "nn/kernels.h"
#include "nn/lanes.h"

namespace mgd {
namespace {

// The largest of logit(at, lanes) over [0, n).
template <class F>
MGD_HD float maximum(int64_t n, F logit) {
    float most = -INFINITY;
    const int64_t lanes = n < kWidth ? n : kWidth;
    V all = n < kWidth ? logit(0, Part{n}) : logit(0, Whole{});
    for (int64_t at = kWidth; at < n; at += kWidth) {  // the last register overlaps the one before
        const V v = logit(at + kWidth <= n ? at : n - kWidth, Whole{});
        all = all > v ? all : v;
    }
    for (int64_t i = 0; i < lanes; ++i) most = most > all[i] ? most : all[i];
    return most;
}

// y = e^(logit - maximum); the sum of y.
template <class F>
MGD_HD double exponentials(float* y, int64_t n, float most, F logit) {
    double sum = 0;
    add_sums<1>(n, &sum, [&](int64_t at, auto lanes, V* term) MGD_INLINE {
        term[0] = exponential(logit(at, lanes) - most);
        lanes.store(y + at, term[0]);
    });
    return sum;
}

template <class F>
MGD_HD void normalised_exponentials(float* y, int64_t n, float most, F logit) {
    const float inverse = 1.0 / exponentials(y, n, most, logit);
    for_lanes(n, [&](int64_t at, auto lanes) MGD_INLINE { lanes.store(y + at, lanes.load(y + at) * inverse); });
}

void softmax(Pass pass, const Softmax& s, int64_t begin, int64_t end) {
    const float scale = s.scale;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t first = row * s.width, seen = s.period ? row % s.period + 1 : s.width;
        const int64_t n = seen < s.width ? seen : s.width, hidden = sizeof(float) * (s.width - n);
        const float *x = s.x + first, *gy = s.gy + first, *c = s.c + first;
        float *y = s.y + first, *gx = s.gx + first, *ggy = s.ggy + first, *gp = s.gp + first;
        if (pass == Pass::forward) {
            const float* mask = s.mask.first ? s.mask.of(row) : nullptr;
            // Plus zero, so that the maximum is subtracted from a rounded product, as where a mask is added to it.
            const auto scaled = [&](int64_t at, auto lanes) MGD_INLINE { return lanes.load(x + at) * scale + V{}; };
            const auto masked = [&](int64_t at, auto lanes)
                                    MGD_INLINE { return lanes.load(x + at) * scale + lanes.load(mask + at); };
            if (!mask)
                normalised_exponentials(y, n, maximum(n, scaled), scaled);
            else {
                const float most = maximum(n, masked);  // without NaN, as far as a later one is larger
                const bool visible = most > -INFINITY || exponentials(y, n, 0, masked) != 0;
                if (visible) normalised_exponentials(y, n, most, masked);
            }
            __builtin_memset(y + n, 0, hidden);
        } else if (pass == Pass::backward) {
            double sum = 0;
            add_sums<1>(n, &sum, [&](int64_t at, auto lanes, V* term) MGD_INLINE {
                term[0] = lanes.load(y + at) * lanes.load(gy + at);
            });
            const float d = sum;
            for_lanes(n, [&](int64_t at, auto lanes) MGD_INLINE {
                lanes.store(gx + at, scale * lanes.load(y + at) * (lanes.load(gy + at) - d));
            });
            __builtin_memset(gx + n, 0, hidden);
        } else {
            double sums[2] = {};
            add_sums<2>(n, sums, [&](int64_t at, auto lanes, V* term) MGD_INLINE {
                const V p = lanes.load(y + at);
                term[0] = p * lanes.load(gy + at);
                term[1] = p * lanes.load(c + at);
            });
            const float d = sums[0], e = sums[1];
            for_lanes(n, [&](int64_t at, auto lanes) MGD_INLINE {
                const V cotangent = lanes.load(c + at), g = lanes.load(gy + at);
                lanes.store(ggy + at, scale * lanes.load(y + at) * (cotangent - e));
                lanes.store(gp + at, scale * (cotangent * (g - d) - g * e));
            });
            __builtin_memset(ggy + n, 0, hidden);
            __builtin_memset(gp + n, 0, hidden);
        }
    }
}

void cross_entropy(Pass pass, const CrossEntropy& e, int64_t begin, int64_t end) {
    const int64_t n = e.width;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t target = e.target[row];
        const bool ignored = target == e.ignored, twice = pass == Pass::double_backward;
        const float *x = e.x + row * n, *c = e.c + row * n;
        float *gx = e.gx ? e.gx + row * n : nullptr, *first = e.first ? e.first + row * n : nullptr;
        float* statistics = e.statistics + 2 * row;
        if (pass == Pass::forward) {
            const float most = maximum(n, [&](int64_t at, auto lanes) MGD_INLINE { return lanes.load(x + at); });
            double sum = 0;
            add_sums<1>(n, &sum, [&](int64_t at, auto lanes, V* term) MGD_INLINE {
                term[0] = exponential(lanes.load(x + at) - most);
            });
            const double log_sum = log(sum);
            statistics[0] = most;
            statistics[1] = log_sum;
            e.losses[row] = ignored ? 0.0 : log_sum + (double(most) - x[target]);
            if (!gx) continue;
        }
        if (ignored) {
            __builtin_memset(gx, 0, sizeof(float) * n);
            if (first) __builtin_memset(first, 0, sizeof(float) * n);
            if (twice) e.ggy[row] = 0;
            continue;
        }
        const float most = statistics[0], log_sum = statistics[1], gy = e.gy[row];
        const auto probability = [&](int64_t at, auto lanes)
                                     MGD_INLINE { return exponential(lanes.load(x + at) - most - log_sum); };
        if (!twice) {
            for_lanes(n, [&](int64_t at, auto lanes) MGD_INLINE { lanes.store(gx + at, gy * probability(at, lanes)); });
            gx[target] -= gy;
            continue;
        }
        double mean = 0;
        add_sums<1>(n, &mean, [&](int64_t at, auto lanes, V* term) MGD_INLINE {
            const V p = probability(at, lanes);
            lanes.store(gx + at, p);
            term[0] = p * lanes.load(c + at);
        });
        e.ggy[row] = mean - c[target];
        const float center = mean;
        for_lanes(n, [&](int64_t at, auto lanes) MGD_INLINE {
            const V scaled = gy * lanes.load(gx + at);
            lanes.store(gx + at, scaled * (lanes.load(c + at) - center));
            if (first) lanes.store(first + at, scaled);
        });
        if (first) first[target] -= gy;
    }
}

}  // namespace
}  // namespace mgd
