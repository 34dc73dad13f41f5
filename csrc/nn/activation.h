// Pointwise functions with two derivatives.

#pragma once

#include "nn/kernels.h"
#include "nn/lanes.h"

namespace mgd {
namespace {

struct Point {
    V value, slope;
};

// x Phi(x)
struct Gelu {
    MGD_HD V value(V x) { return x * normal(x).cumulative; }
    MGD_HD Point point(V x) {
        const Normal n = normal(x);
        return {x * n.cumulative, n.cumulative + clamp(x, -20.0f, 20.0f) * n.density};  // never infinity * 0
    }
    MGD_HD V second(V x) {
        x = clamp(x, -20.0f, 20.0f);
        return normal_density(x) * (2.0f - x * x);
    }
};

// x s(u), u = 2 sqrt(2 / pi) (x + 0.044715 x³)
struct GeluTanh {
    static constexpr float k = 1.5957691216057308f, cubic = k * 0.044715f;
    MGD_HD V bounded(V x) { return clamp(x, -15.0f, 15.0f); }  // s is 0 or 1 beyond
    MGD_HD Logistic gate(V z) { return logistic(z * (k + cubic * (z * z))); }
    MGD_HD V value(V x) { return x * gate(bounded(x)).value; }
    MGD_HD Point point(V x) {
        const V z = bounded(x);
        const Logistic s = gate(z);
        return {x * s.value, s.value + z * s.slope * (k + 3.0f * cubic * (z * z))};
    }
    MGD_HD V second(V x) {
        x = bounded(x);
        const V du = k + 3.0f * cubic * (x * x), ddu = 6.0f * cubic * x;
        const Logistic s = gate(x);
        return s.slope * (2.0f * du + x * (ddu + du * du * (s.complement - s.value)));
    }
};

// x s(x)
struct Silu {
    MGD_HD V value(V x) { return x * logistic(x).value; }
    MGD_HD Point point(V x) {
        const Logistic s = logistic(x);
        return {x * s.value, s.value + clamp(x, -120.0f, 120.0f) * s.slope};
    }
    MGD_HD V second(V x) {
        const Logistic s = logistic(x);
        return s.slope * (2.0f + clamp(x, -120.0f, 120.0f) * (s.complement - s.value));
    }
};

struct Tanh {
    MGD_HD V value(V x) { return hyperbolic_tangent(x); }
    MGD_HD Point point(V x) { return {hyperbolic_tangent(x), 4.0f * logistic(2.0f * x).slope}; }
    MGD_HD V second(V x) { return -8.0f * hyperbolic_tangent(x) * logistic(2.0f * x).slope; }
};

struct Sigmoid {
    MGD_HD V value(V x) { return logistic(x).value; }
    MGD_HD Point point(V x) {
        const Logistic s = logistic(x);
        return {s.value, s.slope};
    }
    MGD_HD V second(V x) {
        const Logistic s = logistic(x);
        return s.slope * (s.complement - s.value);
    }
};

template <class F>
void activate(Pass pass, const Activation& a, int64_t begin, int64_t end) {
    const int64_t n = end - begin;
    const float *x = a.x + begin, *gy = a.gy + begin, *c = a.c + begin;
    float *y = a.y + begin, *slope = a.slope + begin, *gx = a.gx + begin, *ggy = a.ggy + begin;
    if (pass == Pass::double_backward) {
        for_lanes(n, [&](int64_t at, auto lanes) MGD_INLINE {
            const V cotangent = lanes.load(c + at);
            lanes.store(gx + at, cotangent * lanes.load(gy + at) * F::second(lanes.load(x + at)));
            lanes.store(ggy + at, cotangent * lanes.load(slope + at));
        });
    } else if (a.slope) {
        for_lanes(n, [&](int64_t at, auto lanes) MGD_INLINE {
            const Point f = F::point(lanes.load(x + at));
            lanes.store(y + at, f.value);
            lanes.store(slope + at, f.slope);
        });
    } else {
        for_lanes(n, [&](int64_t at, auto lanes) MGD_INLINE { lanes.store(y + at, F::value(lanes.load(x + at))); });
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
