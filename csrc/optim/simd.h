// A native vector register of floats or doubles for the instruction set this unit is compiled for: `Pack<T>`.
// Arithmetic, comparison and ?: are the compiler's own on vector types (GCC and Clang); this header adds loading,
// storing, widening to double, and conversion from 16-bit floats.

#pragma once

#include <cstdint>
#include <type_traits>

#include "optim/element.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace mgd {

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

#if defined(__AVX512F__)
constexpr int kRegister = 64;
#elif defined(__AVX2__)
constexpr int kRegister = 32;
#elif defined(__SSE2__)
constexpr int kRegister = 16;
#else
constexpr int kRegister = 8;  // one double, or two floats that the compiler treats as it can
#endif

typedef float FloatPack __attribute__((vector_size(kRegister)));
typedef double DoublePack __attribute__((vector_size(kRegister)));

template <class T>
struct Pack;
template <>
struct Pack<float> {
    using type = FloatPack;
    static constexpr int width = kRegister / 4;
};
template <>
struct Pack<double> {
    using type = DoublePack;
    static constexpr int width = kRegister / 8;
};

// Unaligned loads and stores.
template <class V>
MGD_HD V load(const void* from) {
    V x;
    __builtin_memcpy(&x, from, sizeof x);
    return x;
}
template <class V>
MGD_HD void store(void* to, V x) {
    __builtin_memcpy(to, &x, sizeof x);
}

// Past the caches, for a buffer that is only written; `to` is aligned to a register. `fence` orders such stores.
template <class V>
MGD_HD void stream(void* to, V x) {
#if defined(__AVX512F__)
    _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)x);
#elif defined(__AVX2__)
    _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)x);
#elif defined(__SSE2__)
    _mm_stream_si128(static_cast<__m128i*>(to), (__m128i)x);
#else
    store(to, x);
#endif
}
MGD_HD void fence() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

#if defined(__AVX512F__)
MGD_HD FloatPack root(FloatPack x) { return (FloatPack)_mm512_sqrt_ps((__m512)x); }
MGD_HD DoublePack root(DoublePack x) { return (DoublePack)_mm512_sqrt_pd((__m512d)x); }
MGD_HD FloatPack maximum(FloatPack x, FloatPack y) { return (FloatPack)_mm512_max_ps((__m512)x, (__m512)y); }
MGD_HD DoublePack maximum(DoublePack x, DoublePack y) { return (DoublePack)_mm512_max_pd((__m512d)x, (__m512d)y); }
#elif defined(__AVX2__)
MGD_HD FloatPack root(FloatPack x) { return (FloatPack)_mm256_sqrt_ps((__m256)x); }
MGD_HD DoublePack root(DoublePack x) { return (DoublePack)_mm256_sqrt_pd((__m256d)x); }
MGD_HD FloatPack maximum(FloatPack x, FloatPack y) { return (FloatPack)_mm256_max_ps((__m256)x, (__m256)y); }
MGD_HD DoublePack maximum(DoublePack x, DoublePack y) { return (DoublePack)_mm256_max_pd((__m256d)x, (__m256d)y); }
#elif defined(__SSE2__)
MGD_HD FloatPack root(FloatPack x) { return (FloatPack)_mm_sqrt_ps((__m128)x); }
MGD_HD DoublePack root(DoublePack x) { return (DoublePack)_mm_sqrt_pd((__m128d)x); }
MGD_HD FloatPack maximum(FloatPack x, FloatPack y) { return (FloatPack)_mm_max_ps((__m128)x, (__m128)y); }
MGD_HD DoublePack maximum(DoublePack x, DoublePack y) { return (DoublePack)_mm_max_pd((__m128d)x, (__m128d)y); }
#else
MGD_HD FloatPack root(FloatPack x) { return FloatPack{sqrtf(x[0]), sqrtf(x[1])}; }
MGD_HD DoublePack root(DoublePack x) { return DoublePack{sqrt(x[0])}; }
MGD_HD FloatPack maximum(FloatPack x, FloatPack y) { return x > y ? x : y; }
MGD_HD DoublePack maximum(DoublePack x, DoublePack y) { return x > y ? x : y; }
#endif

struct Widened {
    DoublePack low, high;
};
MGD_HD Widened widen(FloatPack x) {
#if defined(__AVX512F__)
    return {(DoublePack)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x)),
            (DoublePack)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1))};
#elif defined(__AVX2__)
    return {(DoublePack)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x)),
            (DoublePack)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1))};
#elif defined(__SSE2__)
    return {(DoublePack)_mm_cvtps_pd((__m128)x), (DoublePack)_mm_cvtps_pd(_mm_movehl_ps((__m128)x, (__m128)x))};
#else
    return {DoublePack{x[0]}, DoublePack{x[1]}};
#endif
}

// Four elements, whatever the register width.
typedef float Four __attribute__((vector_size(16)));
typedef double Quad __attribute__((vector_size(32)));

// 2^k registers to four elements, half added to half: the order is that of memory, whatever the register width.
MGD_HD auto fold(FloatPack x) {
#if defined(__AVX512F__)
    const __m256 half = _mm512_castps512_ps256((__m512)x) + _mm512_extractf32x8_ps((__m512)x, 1);
    return (Four)(_mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
    return (Four)(_mm256_castps256_ps128((__m256)x) + _mm256_extractf128_ps((__m256)x, 1));
#else
    return x;
#endif
}
MGD_HD auto fold(DoublePack x) {
#if defined(__AVX512F__)
    return (Quad)(_mm512_castpd512_pd256((__m512d)x) + _mm512_extractf64x4_pd((__m512d)x, 1));
#else
    return x;
#endif
}
template <class V, int n>
MGD_HD auto fold(const V (&x)[n]) {
    if constexpr (n == 1) {
        return fold(x[0]);
    } else if constexpr (n * sizeof(V) == 4 * sizeof(x[0][0])) {
        std::conditional_t<sizeof(x[0][0]) == 4, Four, Quad> four;
        __builtin_memcpy(&four, x, sizeof four);
        return four;
    } else {
        V half[n / 2];
#pragma GCC unroll 16
        for (int i = 0; i < n / 2; ++i) half[i] = x[i] + x[i + n / 2];
        return fold(half);
    }
}

MGD_HD Quad doubles(Four x) {
#if defined(__AVX2__)
    return (Quad)_mm256_cvtps_pd((__m128)x);
#else
    return Quad{x[0], x[1], x[2], x[3]};
#endif
}
MGD_HD Quad doubles(Quad x) { return x; }

// 16-bit floats to float, exactly, in registers.
typedef uint16_t Bits16 __attribute__((vector_size(kRegister / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(kRegister)));

MGD_HD FloatPack convert(Bits16 bits, bf16) { return (FloatPack)(__builtin_convertvector(bits, Bits32) << 16); }

MGD_HD FloatPack convert(Bits16 bits, f16) {
    const Bits32 h = __builtin_convertvector(bits, Bits32), zero = Bits32{};
    const Bits32 magnitude = (h & 0x7fffu) << 13, exponent = magnitude & (0x7c00u << 13);
    const Bits32 rebiased = magnitude + (112u << 23);
    // A subnormal half is 2^-14 * 0.fraction: lend it a leading one, then take that away again.
    const FloatPack lent = (FloatPack)(rebiased + (1u << 23)), leading = (FloatPack)(zero + (113u << 23));
    const Bits32 finite = exponent == zero ? (Bits32)(lent - leading) : rebiased;
    const Bits32 value = exponent == zero + (0x7c00u << 13) ? rebiased + (112u << 23) : finite;
    return (FloatPack)(value | ((h & 0x8000u) << 16));
}

// A register of gradients, converted to the dtype of the state.
MGD_HD FloatPack load_as(const float* from, FloatPack) { return load<FloatPack>(from); }
MGD_HD DoublePack load_as(const double* from, DoublePack) { return load<DoublePack>(from); }
MGD_HD DoublePack load_as(const float* from, DoublePack) {
    FloatPack x{};
    __builtin_memcpy(&x, from, sizeof x / 2);
    return widen(x).low;
}
template <class Half>
MGD_HD FloatPack load_as(const Half* from, FloatPack) {
    return convert(load<Bits16>(from), Half{});
}
template <class Half>
MGD_HD DoublePack load_as(const Half* from, DoublePack) {
    Bits16 bits{};
    __builtin_memcpy(&bits, from, sizeof bits / 2);
    return widen(convert(bits, Half{})).low;
}

}  // namespace mgd
