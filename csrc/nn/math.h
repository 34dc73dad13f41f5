// Elementary functions of a register of floats, to 1 or 2 units in the last place. NaN stays NaN; results below the
// normal range are flushed no earlier than the hardware does.

#pragma once

#include "optim/simd.h"

namespace mgd {

using V = FloatPack;
typedef int32_t IntPack __attribute__((vector_size(kRegister)));

MGD_HD V splat(float a) { return V{} + a; }
MGD_HD V absolute(V x) { return (V)((IntPack)x & 0x7fffffff); }
MGD_HD V clamp(V x, float low, float high) {
    x = x < low ? splat(low) : x;
    return x > high ? splat(high) : x;
}

// e^(a + b), where |b| is small beside |a|: a sum that one float could not hold.
MGD_HD V exp_of_sum(V a, V b) {
    constexpr float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    a = clamp(a, -110.0f, 90.0f);
    V shifted = a * 1.44269504f + to_integer;
    const IntPack n = (IntPack)shifted - (IntPack)splat(to_integer);
    shifted -= to_integer;
    V r = a - shifted * 0.693359375f;  // ln 2 in two parts, the first exact in any product that occurs
    r = r + shifted * 2.12194440e-4f + b;
    V p = splat(1.9875691500e-4f);  // Moshier, Cephes expf
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const IntPack half = n >> 1;  // 2^n in two factors reaches subnormal numbers and infinity
    return p * (V)((half + 127) << 23) * (V)((n - half + 127) << 23);
}
MGD_HD V exponential(V x) { return exp_of_sum(x, V{}); }

// The standard normal distribution: phi(x) = e^(-x²/2) / sqrt(2 pi), Phi(x) its integral up to x.
struct Normal {
    V density, cumulative;
};
// e^(-z²/2) for z >= 0
MGD_HD V bell(V z) {
    z = z > 15.0f ? splat(15.0f) : z;                                        // 0 in float from 14.5 on
    const V high = (V)((IntPack)z & ~0xfff), low = (z - high) * (z + high);  // z² = high² + low, high² exact
    return exp_of_sum(-0.5f * (high * high), -0.5f * low);
}
constexpr float kBellScale = 0.398942280401432678f;
MGD_HD V normal_density(V x) { return bell(absolute(x)) * kBellScale; }
MGD_HD Normal normal(V x) {
    V z = absolute(x);
    z = z > 15.0f ? splat(15.0f) : z;
    const V e = bell(z);
    // Phi(-z) / e is smooth: P(u) / (z + 3), u = (z - 3) / (z + 3), with a relative error of 1e-9.
    const V t = 1.0f / (z + 3.0f), u = (z - 3.0f) * t;
    V p = splat(5.4487285524373874e-05f);
    p = p * u + 0.00013132693129591644f;
    p = p * u + -0.00024472945369780064f;
    p = p * u + -0.0010325700277462602f;
    p = p * u + 0.0010247547179460526f;
    p = p * u + 0.006969309877604246f;
    p = p * u + -0.010462513193488121f;
    p = p * u + -0.04726268723607063f;
    p = p * u + 0.23001770675182343f;
    p = p * u + -0.509332001209259f;
    p = p * u + 0.7290837168693542f;
    const V tail = e * (p * t);
    return {e * kBellScale, x < 0.0f ? tail : 1.0f - tail};
}

// The logistic function s(x) = 1 / (1 + e^-x), 1 - s, and s' = s (1 - s), none of them by cancellation.
struct Logistic {
    V value, complement, slope;
};
MGD_HD Logistic logistic(V x) {
    const V e = exponential(-absolute(x)), large = 1.0f / (1.0f + e), small = e * large;
    return {x < 0.0f ? small : large, x < 0.0f ? large : small, small * large};
}

MGD_HD V hyperbolic_tangent(V x) {
    const V z = absolute(x), s = z * z;
    V p = splat(-5.70498872745e-3f);  // Moshier, Cephes tanhf, for |x| < 0.625
    p = p * s + 2.06390887954e-2f;
    p = p * s + -5.37397155531e-2f;
    p = p * s + 1.33314422036e-1f;
    p = p * s + -3.33332819422e-1f;
    const V near = z + z * (s * p), e = exponential(-2.0f * z), far = 1.0f - 2.0f * e / (1.0f + e);
    const V value = z < 0.625f ? near : far;
    return x < 0.0f ? -value : value;
}

}  // namespace mgd
