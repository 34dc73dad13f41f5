// What the headers of the update rules share. `adam.h` and `sgd.h` hold the element-wise mathematics once, for the
// CPU's vector units (`cpu_kernels.cpp`) and for CUDA (`cuda.cu`).
//
// Element functions are templated on `V`, the type of one element or of a vector register of elements, and on `T`,
// the scalar type of the coefficients: everything they need is + - * / > ?:, `root` and `maximum`, which must be
// declared before they are (`simd.h` declares them for vector registers).

#pragma once

#include <math.h>

#include "optim/codes.h"

// Static and inlined by force: a copy of an inline function that was compiled for AVX-512 must never be what the
// linker picks for a unit that runs without.
#if defined(__CUDACC__)
#define MGD_HD static __host__ __device__ __forceinline__
#else
#define MGD_HD static inline __attribute__((always_inline))
#endif

namespace mgd {

MGD_HD float root(float x) { return sqrtf(x); }
MGD_HD double root(double x) { return sqrt(x); }

// y where x is NaN.
MGD_HD float maximum(float x, float y) { return x > y ? x : y; }
MGD_HD double maximum(double x, double y) { return x > y ? x : y; }

}  // namespace mgd
