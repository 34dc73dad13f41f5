// Pointwise functions with two derivatives.

#pragma once

#include "nn/kernels.h"
#include "nn/lanes.h"

namespace mgd {
namespace {

struct Slopes {
    V first, second;
};

// x Phi(x)
struct Gelu {
    MGD_HD V value(V x) { return x * normal(x).cumulative; }
    MGD_HD Slopes slopes(V x) {
        const Normal n = normal(x);
        x = clamp(x, -20.0f, 20.0f);  // 0 * infinity
        return {n.cumulative + x * n.density, n.density * (2.0f - x * x)};
    }
};

// x s(u), u = 2 sqrt(2 / pi) (x + 0.044715 x³)
struct GeluTanh {
    static constexpr float k = 1.5957691216057308f, cubic = k * 0.044715f;
    MGD_HD V bounded(V x) { return clamp(x, -15.0f, 15.0f); }  // s is 0 or 1 beyond
    MGD_HD V value(V x) {
        const V z = bounded(x);
        return x * logistic(z * (k + cubic * (z * z))).value;
    }
    MGD_HD Slopes slopes(V x) {
        x = bounded(x);
        const V square = x * x, du = k + 3.0f * cubic * square, ddu = 6.0f * cubic * x;
        const Logistic s = logistic(x * (k + cubic * square));
        const V first = s.slope * du, second = s.slope * (ddu + du * du * (s.complement - s.value));
        return {s.value + x * first, 2.0f * first + x * second};
    }
};

// x s(x)
struct Silu {
    MGD_HD V value(V x) { return x * logistic(x).value; }
    MGD_HD Slopes slopes(V x) {
        const Logistic s = logistic(x);
        x = clamp(x, -120.0f, 120.0f);  // 0 * infinity
        return {s.value + x * s.slope, s.slope * (2.0f + x * (s.complement - s.value))};
    }
};

struct Tanh {
    MGD_HD V value(V x) { return hyperbolic_tangent(x); }
    MGD_HD Slopes slopes(V x) {
        const V slope = 4.0f * logistic(2.0f * x).slope;
        return {slope, -2.0f * hyperbolic_tangent(x) * slope};
    }
};

struct Sigmoid {
    MGD_HD V value(V x) { return logistic(x).value; }
    MGD_HD Slopes slopes(V x) {
        const Logistic s = logistic(x);
        return {s.slope, s.slope * (s.complement - s.value)};
    }
};

template <class F>
void activate(Pass pass, const Activation& a, int64_t begin, int64_t end) {
    const int64_t n = end - begin;
    const float *x = a.x + begin, *gy = a.gy + begin, *c = a.c + begin;
    float *y = a.y + begin, *gx = a.gx + begin, *ggy = a.ggy + begin;
    switch (pass) {
        case Pass::forward:
            return for_lanes(n, [&](int64_t at, auto lanes)
                                    MGD_INLINE { lanes.store(y + at, F::value(lanes.load(x + at))); });
        case Pass::backward:
            return for_lanes(n, [&](int64_t at, auto lanes) MGD_INLINE {
                lanes.store(gx + at, lanes.load(gy + at) * F::slopes(lanes.load(x + at)).first);
            });
        case Pass::double_backward:
            return for_lanes(n, [&](int64_t at, auto lanes) MGD_INLINE {
                const Slopes f = F::slopes(lanes.load(x + at));
                const V cotangent = lanes.load(c + at);
                lanes.store(gx + at, cotangent * lanes.load(gy + at) * f.second);
                lanes.store(ggy + at, cotangent * f.first);
            });
    }
}

void activation(Pass pass, const Activation& a, int64_t begin, int64_t end) {
    switch (a.function) {
        case Function::gelu:
            return activate<Gelu>(pass, a, begin, end);
        case Function::gelu_tanh:
            return activate<GeluTanh>(pass, a, begin, end);
        case Function::silu:
            return activate<Silu>(pass, a, begin, end);
        case Function::tanh:
            return activate<Tanh>(pass, a, begin, end);
        case Function::sigmoid:
            return activate<Sigmoid>(pass, a, begin, end);
    }
}

}  // namespace
}  // namespace mgd
