// Loops over contiguous floats: whole registers, then one that is partly filled; and sums in a fixed order.

#pragma once

#include "nn/math.h"

namespace mgd {

// Members inlined by force, for the reason given at MGD_HD.
#define MGD_LANES inline __attribute__((always_inline))

constexpr int64_t kWidth = Pack<float>::width;

struct Whole {
    MGD_LANES V load(const float* from) const { return mgd::load<V>(from); }
    MGD_LANES void store(float* to, V x) const { mgd::store(to, x); }
};

// The first `count` lanes. Others load as 0, are never stored, and `add` leaves them as they are: it adds before it
// selects, so that a product is contracted into the sum as in whole registers.
struct Part {
    int64_t count;
#if defined(__AVX512F__)
    MGD_LANES __mmask16 mask() const { return static_cast<__mmask16>((1u << count) - 1); }
    MGD_LANES V load(const float* from) const { return (V)_mm512_maskz_loadu_ps(mask(), from); }
    MGD_LANES void store(float* to, V x) const { _mm512_mask_storeu_ps(to, mask(), (__m512)x); }
    MGD_LANES V add(V sum, V x) const { return (V)_mm512_mask_mov_ps((__m512)sum, mask(), (__m512)(sum + x)); }
#else
    MGD_LANES V load(const float* from) const {
        V x{};
        for (int64_t i = 0; i < count; ++i) x[i] = from[i];
        return x;
    }
    MGD_LANES void store(float* to, V x) const {
        for (int64_t i = 0; i < count; ++i) to[i] = x[i];
    }
    MGD_LANES V add(V sum, V x) const {
        const V both = sum + x;
        for (int64_t i = 0; i < count; ++i) sum[i] = both[i];
        return sum;
    }
#endif
};

// body(at, lanes) over [0, n).
template <class F>
MGD_HD void for_lanes(int64_t n, F body) {
    int64_t at = 0;
    for (; at + kWidth <= n; at += kWidth) body(at, Whole{});
    if (at < n) body(at, Part{n - at});
}

MGD_HD double total(V x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    double sum = 0;
    for (int64_t i = 0; i < kWidth; ++i) sum += x[i];
    return sum;
#endif
}

// sums[s] += the sum over [0, n) of the s-th of the terms that terms(at, lanes, out) gives. Registers add up in float
// over kRun registers at most, in two interleaved chains, then in double. Zeros behind the terms change no bit of a
// sum: a row that ends early has that of a row whose last columns are hidden.
constexpr int64_t kRun = 64;

template <int S, class F>
MGD_HD void add_sums(int64_t n, double* sums, F terms) {
    for (int64_t begin = 0; begin < n; begin += kRun * kWidth) {
        const int64_t end = n - begin < kRun * kWidth ? n : begin + kRun * kWidth;
        V even[S] = {}, odd[S] = {}, term[S];
        int64_t at = begin;
        for (; at + 2 * kWidth <= end; at += 2 * kWidth) {
            terms(at, Whole{}, term);
#pragma GCC unroll 8
            for (int s = 0; s < S; ++s) even[s] += term[s];
            terms(at + kWidth, Whole{}, term);
#pragma GCC unroll 8
            for (int s = 0; s < S; ++s) odd[s] += term[s];
        }
        V* chain = even;
        if (at + kWidth <= end) {
            terms(at, Whole{}, term);
#pragma GCC unroll 8
            for (int s = 0; s < S; ++s) even[s] += term[s];
            at += kWidth;
            chain = odd;
        }
        if (at < end) {
            const Part part{end - at};
            terms(at, part, term);
#pragma GCC unroll 8
            for (int s = 0; s < S; ++s) chain[s] = part.add(chain[s], term[s]);
        }
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s) sums[s] += total(even[s] + odd[s]);
    }
}

// A lambda that for_lanes and add_sums inline.
#define MGD_INLINE __attribute__((always_inline))

}  // namespace mgd
