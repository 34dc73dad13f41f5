// Max pooling over windows of K x K at steps of S, and its transpose, for K <= 3.
//
// As torch has it: of equal values the first in the window's order is taken, of NaN the last; and the gradients of
// windows that overlap add up in the order of the windows. Only the offset in the window is remembered, a byte.
//
// The columns of a row that windows meet at the same offset are every S-th. So a row is first split into S stretches,
// then each window's part of a row is reduced, then the rows of a window: all with stride 1. The transpose and the
// gradient of that touch one element a window, and are as quick element by element.

#pragma once

#include <math.h>

#include <type_traits>

#include "nn/kernels.h"
#include "nn/lanes.h"

namespace mgd {
namespace {

template <class T, int K, int S>
struct Windows {
    using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;  // as wide as T, so that selects vectorise

    const MaxPool<T>& m;

    // The offsets of a window that lie inside: [low(window), high(window, size)).
    MGD_LANES int64_t low(int64_t window) const {
        const int64_t outside = m.padding - window * S;
        return outside > 0 ? outside : 0;
    }
    MGD_LANES int64_t high(int64_t window, int64_t size) const {
        const int64_t inside = size + m.padding - window * S;
        return inside < K ? inside : K;
    }
    MGD_LANES int64_t stretch() const { return m.columns + (K - 1) / S; }

    // --- Values and places ---------------------------------------------------------------------------------------

    static MGD_LANES void take(T value, Int place, T& best, Int& at) {
        const bool replaces = (value > best) | (value != value);
        best = replaces ? value : best;
        at = replaces ? place : at;
    }

    // One plane. Scratch: split; values and offsets of the last K rows; places of a row of windows.
    void reduce(const T* x, T* y, uint8_t* which, T* scratch) const {
        const int64_t n = m.columns;
        T *split = scratch, *values = split + S * stretch();
        Int* offsets = reinterpret_cast<Int*>(values + K * n);
        int64_t ready = 0;  // rows
        for (int64_t r = 0; r < m.rows; ++r, y += n, which += n) {
            const int64_t begin = low(r), end = high(r, m.height), top = r * S - m.padding;
            if (ready < top + begin) ready = top + begin;
            for (; ready < top + end; ++ready) {
                split_row(x + ready * m.width, split);
                reduce_row(split, values + ready % K * n, offsets + ready % K * n);
            }
            reduce_rows(begin, end, top, values, offsets, y, offsets + K * n);
            const Int* places = offsets + K * n;
            for (int64_t c = 0; c < n; ++c) which[c] = places[c];
        }
    }

    // split[f][t] = row[t S + f - padding], minus infinity outside
    MGD_LANES void split_row(const T* __restrict row, T* __restrict split) const {
        const int64_t length = stretch();
        for (int f = 0; f < S; ++f, split += length) {
            const int64_t shift = f - m.padding, inside = (m.width - 1 - shift) / S + 1;
            const int64_t begin = shift < 0 ? (S - 1 - shift) / S : 0, end = inside < length ? inside : length;
            for (int64_t t = 0; t < begin; ++t) split[t] = -INFINITY;
            for (int64_t t = begin; t < end; ++t) split[t] = row[t * S + shift];
            for (int64_t t = end; t < length; ++t) split[t] = -INFINITY;
        }
    }

    MGD_LANES void reduce_row(const T* __restrict split, T* __restrict value, Int* __restrict offset) const {
        const T *second = split + 1 % S * stretch() + 1 / S, *third = split + 2 % S * stretch() + 2 / S;
        const int64_t n = m.columns;
        for (int64_t c = 0; c < n; ++c) {
            T best = split[c];
            Int at = 0;
            take(second[c], 1, best, at);
            if constexpr (K > 2) take(third[c], 2, best, at);
            value[c] = best;
            offset[c] = at;
        }
        for (int64_t c = 0; c < n && low(c); ++c)  // of minus infinity alone, the first that is inside
            if (offset[c] < low(c)) offset[c] = low(c);
    }

    MGD_LANES void reduce_rows(int64_t begin, int64_t end, int64_t top, const T* values, const Int* offsets,
                               T* __restrict y, Int* __restrict places) const {
        const int64_t n = m.columns;
        for (int64_t i = begin; i < end; ++i) {
            const T* __restrict value = values + (top + i) % K * n;
            const Int* __restrict offset = offsets + (top + i) % K * n;
            const Int code = i * K;
            if (i == begin) {
                for (int64_t c = 0; c < n; ++c) y[c] = value[c];
                for (int64_t c = 0; c < n; ++c) places[c] = code + offset[c];
                continue;
            }
            for (int64_t c = 0; c < n; ++c) {
                T best = y[c];
                Int at = places[c];
                take(value[c], code + offset[c], best, at);
                y[c] = best;
                places[c] = at;
            }
        }
    }

    // --- The map from y to x that `which` defines, and its transpose ----------------------------------------------

    // body(window, element) over the windows of a plane in order. A byte that is no offset inside of its window counts
    // as one: memory is safe whatever `which` holds.
    template <class F>
    MGD_LANES void each_window(const uint8_t* which, F body) const {
        const int64_t n = m.columns;
        int64_t begin = 0, end = n;
        while (begin < n && low(begin)) ++begin;
        while (end > begin && high(end - 1, m.width) < K) --end;
        for (int64_t r = 0; r < m.rows; ++r, which += n) {
            const int64_t first = low(r), last = high(r, m.height) - 1;
            const int64_t start = (r * S - m.padding) * m.width - m.padding;
            int64_t places[16];
            for (int64_t w = 0; w < 16; ++w) {
                const int64_t i = w / K < first ? first : w / K > last ? last : w / K;
                places[w] = start + i * m.width + w % K;
            }
            const auto at_edge = [&](int64_t c) {
                const int64_t least = low(c), most = high(c, m.width) - 1, w = which[c] & 15, j = w % K;
                return places[w] - j + (j < least ? least : j > most ? most : j) + c * S;
            };
            for (int64_t c = 0; c < begin; ++c) body(r * n + c, at_edge(c));
            for (int64_t c = begin; c < end; ++c) body(r * n + c, places[which[c] & 15] + c * S);
            for (int64_t c = end; c < n; ++c) body(r * n + c, at_edge(c));
        }
    }

    void each(Pass pass, T* scratch, int64_t begin, int64_t end) const {
        const int64_t input = m.height * m.width, output = m.rows * m.columns;
        for (int64_t plane = begin; plane < end; ++plane) {
            T *x = m.x + plane * input, *y = m.y + plane * output;
            uint8_t* which = m.which + plane * output;
            if (pass == Pass::forward) {
                reduce(x, y, which, scratch);
            } else if (pass == Pass::backward) {
                __builtin_memset(x, 0, sizeof(T) * input);
                each_window(which, [&](int64_t window, int64_t element) MGD_INLINE { x[element] += y[window]; });
            } else {
                each_window(which, [&](int64_t window, int64_t element) MGD_INLINE { y[window] = x[element]; });
            }
        }
    }
};

template <class T>
void max_pool(Pass pass, const MaxPool<T>& m, T* scratch, int64_t begin, int64_t end) {
    if (m.kernel == 2)
        Windows<T, 2, 2>{m}.each(pass, scratch, begin, end);
    else if (m.stride == 2)
        Windows<T, 3, 2>{m}.each(pass, scratch, begin, end);
    else
        Windows<T, 3, 1>{m}.each(pass, scratch, begin, end);
}

}  // namespace
}  // namespace mgd
