// The CUDA kernels: the element functions of adam.h and sgd.h on a grid. A shared library of its own, without torch:
// addresses and a stream in, an error code out (`backends/cuda.py` calls it through ctypes).
//
// - A call only launches: no allocation, no copy, no synchronisation. Hyperparameters, the step number and the scale of
//   the gradient are read from device memory, so that a captured CUDA graph can be replayed with new values.
// - Tiles are fixed and never cross a row of the segment table; one block does one tile. Reductions go thread, warp,
//   block, then over the tiles of a row, in double and in one order: the same bits on every run.
// - A thread takes four neighbouring elements: 128-bit accesses where the addresses allow, element by element where
//   they do not, with the same elements in the same thread, so the sums are the same.
// - Compiled with --fmad=false: an element computes the same bits as on the CPU.

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "optim/adam.h"
#include "optim/sgd.h"

namespace {

using mgd::Adam;
using mgd::DType;
using mgd::kMaxSums;
using mgd::RuleId;
using mgd::SgdMomentum;
using mgd::SgdPlain;

constexpr int kThreads = 256;
constexpr int kVector = 4;
constexpr int kTile = 4096;
constexpr int kMaxSteps = 32;  // of one launch: their gradients' addresses travel as kernel arguments

// The arguments of every launch over the segments; all pointers are to device memory.
struct Launch {
    void* state[3];
    void* adjoint[3];              // JVP: the tangents
    void* u;                       // JVP: the tangent of the scaled gradient, which is read
    const void* grads[kMaxSteps];  // one for each step
    const int64_t* segments;       // [rows][3]: start, stop, group
    const int64_t* first_tile;     // [rows + 1]: of each row, then the number of tiles
    int64_t rows, groups, tiles;
    int64_t steps;        // of this launch, at most kMaxSteps
    int64_t step_offset;  // its first step is *k + step_offset
    const int64_t* k;
    const double* hyper;          // [steps][groups][columns]
    const double* grad_scale;     // [steps]
    double* out;                  // VJP: [groups][columns + 1]
    const double* hyper_tangent;  // JVP: [groups][columns]
    void* workspace;
    RuleId rule;
    DType dtype, grad_dtype;
    int advance;  // JVP: the state makes the step
};

struct DotLaunch {
    const void *x, *y;
    int64_t n;
    double* out;
    void* workspace;  // a double for each tile
    DType x_dtype, y_dtype;
};

// --- Loading and storing ------------------------------------------------------------------------------------------

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

__device__ __forceinline__ float value(float x) { return x; }
__device__ __forceinline__ double value(double x) { return x; }
__device__ __forceinline__ float value(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float value(f16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <class T>
struct alignas(sizeof(T) * kVector > 16 ? 16 : sizeof(T) * kVector) Four {
    T x[kVector];
};

template <class T>
__device__ __forceinline__ bool is_aligned(const T* address) {
    return reinterpret_cast<uintptr_t>(address) % alignof(Four<T>) == 0;
}

// Elements [0, count) of `from`, the rest zero.
template <class T>
__device__ __forceinline__ Four<T> load(const T* from, int count, bool aligned) {
    if (aligned && count == kVector) return *reinterpret_cast<const Four<T>*>(from);
    Four<T> four{};
#pragma unroll
    for (int e = 0; e < kVector; ++e)
        if (e < count) four.x[e] = from[e];
    return four;
}

template <class T>
__device__ __forceinline__ void store(T* to, const Four<T>& four, int count, bool aligned) {
    if (aligned && count == kVector) {
        *reinterpret_cast<Four<T>*>(to) = four;
        return;
    }
#pragma unroll
    for (int e = 0; e < kVector; ++e)
        if (e < count) to[e] = four.x[e];
}

// For a buffer that is only written: evicted first. (A plain store of it, the compiler splits into four.)
__device__ __forceinline__ void stream_whole(float* to, const Four<float>& four) {
    __stcs(reinterpret_cast<float4*>(to), make_float4(four.x[0], four.x[1], four.x[2], four.x[3]));
}
__device__ __forceinline__ void stream_whole(double* to, const Four<double>& four) {
    __stcs(reinterpret_cast<double2*>(to), make_double2(four.x[0], four.x[1]));
    __stcs(reinterpret_cast<double2*>(to) + 1, make_double2(four.x[2], four.x[3]));
}
template <class T>
__device__ __forceinline__ void stream(T* to, const Four<T>& four, int count, bool aligned) {
    if (aligned && count == kVector)
        stream_whole(to, four);
    else
        store(to, four, count, false);
}

// --- Tiles and sums -----------------------------------------------------------------------------------------------

struct Tile {
    int64_t begin, end, group;
};

__device__ __forceinline__ Tile find_tile(const Launch& a, int64_t tile) {
    int64_t low = 0, high = a.rows;  // the last row whose first tile is not beyond this one
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (a.first_tile[middle] <= tile)
            low = middle;
        else
            high = middle;
    }
    while (a.first_tile[low + 1] <= tile) ++low;  // past empty rows
    const int64_t* segment = a.segments + 3 * low;
    const int64_t begin = segment[0] + (tile - a.first_tile[low]) * kTile;
    return {begin, begin + kTile < segment[1] ? begin + kTile : segment[1], segment[2]};
}

// The sums over all threads of the block, in one order, in `out`, which all threads may read after the call.
template <int N>
__device__ void block_sums(double (&sums)[N], double* out) {
    __shared__ double of_warp[kThreads / 32][N];
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2)
            sums[i] += __shfl_down_sync(0xffffffffu, sums[i], distance);
    if (threadIdx.x % 32 == 0)
        for (int i = 0; i < N; ++i) of_warp[threadIdx.x / 32][i] = sums[i];
    __syncthreads();
    if (threadIdx.x < N) {
        double sum = 0;
        for (int warp = 0; warp < kThreads / 32; ++warp) sum += of_warp[warp][threadIdx.x];
        out[threadIdx.x] = sum;
    }
    __syncthreads();
}

template <int N>
struct ThreadSums {
    double (&sums)[N];
    template <class V>
    __device__ __forceinline__ void add(int i, V x) const {
        sums[i] += double(x);
    }
    template <class V>
    __device__ __forceinline__ void add(int i, V x, V y) const {
        sums[i] += double(x) * double(y);
    }
};

// --- The workspace: coefficients, then the sums of each tile --------------------------------------------------------

template <class R, class T>
using Coefficients = typename R::template Coefficients<T>;

__host__ __device__ __forceinline__ int64_t coefficient_bytes(int64_t steps, int64_t groups) {
    return (steps * groups * int64_t(sizeof(Adam::Coefficients<double>)) + 255) / 256 * 256;
}
template <class R, class T>
using Tangents = typename R::template Tangents<T>;

template <class R, class T>
__device__ __forceinline__ Coefficients<R, T>* coefficients(const Launch& a) {
    static_assert(sizeof(Coefficients<R, T>) <= sizeof(Adam::Coefficients<double>));
    return static_cast<Coefficients<R, T>*>(a.workspace);
}
// Of a JVP, where the coefficients of a second step would be.
template <class R, class T>
__device__ __forceinline__ Tangents<R, T>* tangents(const Launch& a) {
    static_assert(sizeof(Tangents<R, T>) <= sizeof(Adam::Coefficients<double>));
    return reinterpret_cast<Tangents<R, T>*>(static_cast<char*>(a.workspace) + coefficient_bytes(1, a.groups));
}
__device__ __forceinline__ double* tile_sums(const Launch& a, int64_t tile) {
    char* after = static_cast<char*>(a.workspace) + coefficient_bytes(a.steps, a.groups);
    return reinterpret_cast<double*>(after) + tile * kMaxSums;
}

// --- Kernels ------------------------------------------------------------------------------------------------------

template <class R, class T>
__global__ void prepare_kernel(const Launch a) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= a.steps * a.groups) return;
    const int64_t step = i / a.groups;
    const double* row = a.hyper + i * R::columns;
    const double k = double(*a.k + a.step_offset + step);
    coefficients<R, T>(a)[i] = R::template prepare<T>(row, k, a.grad_scale[step], a.rule);
}

template <class R, class T>
__global__ void prepare_tangents_kernel(const Launch a) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= a.groups) return;
    tangents<R, T>(a)[i] = R::template prepare_tangents<T>(a.hyper + i * R::columns, a.hyper_tangent + i * R::columns,
                                                           double(*a.k + a.step_offset));
}

// One block per multiprocessor is enough: otherwise the compiler spills registers to have room for more of them.
template <class R, class T, class G>
__global__ void __launch_bounds__(kThreads, 1) replay_kernel(const Launch a) {
    constexpr int tensors = R::slots + 1;
    const Tile tile = find_tile(a, blockIdx.x);
    T* state[tensors];
    bool aligned = true;
#pragma unroll
    for (int i = 0; i < tensors; ++i) {
        state[i] = static_cast<T*>(a.state[i]);
        aligned = aligned && is_aligned(state[i] + tile.begin);
    }
    for (int64_t at = tile.begin + kVector * threadIdx.x; at < tile.end; at += kVector * kThreads) {
        const int count = tile.end - at < kVector ? int(tile.end - at) : kVector;
        Four<T> now[tensors];
#pragma unroll
        for (int i = 0; i < tensors; ++i) now[i] = load(state[i] + at, count, aligned);
        for (int64_t step = 0; step < a.steps; ++step) {  // the state stays in registers
            const Coefficients<R, T> c = coefficients<R, T>(a)[step * a.groups + tile.group];
            const G* grads = static_cast<const G*>(a.grads[step]) + at;
            const Four<G> grad = load(grads, count, is_aligned(grads));
#pragma unroll
            for (int e = 0; e < kVector; ++e) {
                T one[tensors];
#pragma unroll
                for (int i = 0; i < tensors; ++i) one[i] = now[i].x[e];
                R::step(c, T(value(grad.x[e])), one);
#pragma unroll
                for (int i = 0; i < tensors; ++i) now[i].x[e] = one[i];
            }
        }
#pragma unroll
        for (int i = 0; i < tensors; ++i) store(state[i] + at, now[i], count, aligned);
    }
}

template <class R, class T, class G>
__global__ void __launch_bounds__(kThreads, 1) vjp_kernel(const Launch a) {
    constexpr int tensors = R::slots + 1;
    const Tile tile = find_tile(a, blockIdx.x);
    const Coefficients<R, T> c = coefficients<R, T>(a)[tile.group];
    const G* grads = static_cast<const G*>(a.grads[0]);
    T* u = static_cast<T*>(a.u);
    const T* state[tensors];
    T* adjoint[tensors];
    bool aligned = is_aligned(u + tile.begin) && is_aligned(grads + tile.begin);
#pragma unroll
    for (int i = 0; i < tensors; ++i) {
        state[i] = static_cast<const T*>(a.state[i]);
        adjoint[i] = static_cast<T*>(a.adjoint[i]);
        aligned = aligned && is_aligned(state[i] + tile.begin) && is_aligned(adjoint[i] + tile.begin);
    }
    double sums[R::sums] = {};
    for (int64_t at = tile.begin + kVector * threadIdx.x; at < tile.end; at += kVector * kThreads) {
        const int count = tile.end - at < kVector ? int(tile.end - at) : kVector;
        Four<T> before[tensors], cotangent[tensors], of_grad;
#pragma unroll
        for (int i = 0; i < tensors; ++i) {
            before[i] = load(state[i] + at, count, aligned);
            cotangent[i] = load(adjoint[i] + at, count, aligned);
        }
        const Four<G> grad = load(grads + at, count, aligned);
#pragma unroll
        for (int e = 0; e < kVector; ++e) {  // elements beyond the end are zero and add nothing
            T one[tensors], cotangents[tensors], du;
#pragma unroll
            for (int i = 0; i < tensors; ++i) {
                one[i] = before[i].x[e];
                cotangents[i] = cotangent[i].x[e];
            }
            R::vjp(c, T(value(grad.x[e])), one, cotangents, du, ThreadSums<R::sums>{sums});
#pragma unroll
            for (int i = 0; i < tensors; ++i) cotangent[i].x[e] = cotangents[i];
            of_grad.x[e] = du;
        }
#pragma unroll
        for (int i = 0; i < tensors; ++i) store(adjoint[i] + at, cotangent[i], count, aligned);
        stream(u + at, of_grad, count, aligned);
    }
    block_sums(sums, tile_sums(a, blockIdx.x));
}

template <class R, class T, class G>
__global__ void __launch_bounds__(kThreads, 1) jvp_kernel(const Launch a) {
    constexpr int tensors = R::slots + 1;
    const Tile tile = find_tile(a, blockIdx.x);
    const Coefficients<R, T> c = coefficients<R, T>(a)[tile.group];
    const Tangents<R, T> d = tangents<R, T>(a)[tile.group];
    const G* grads = static_cast<const G*>(a.grads[0]);
    const T* dgrads = static_cast<const T*>(a.u);
    T* state[tensors];
    T* tangent[tensors];
    bool aligned = is_aligned(dgrads + tile.begin) && is_aligned(grads + tile.begin);
#pragma unroll
    for (int i = 0; i < tensors; ++i) {
        state[i] = static_cast<T*>(a.state[i]);
        tangent[i] = static_cast<T*>(a.adjoint[i]);
        aligned = aligned && is_aligned(state[i] + tile.begin) && is_aligned(tangent[i] + tile.begin);
    }
    for (int64_t at = tile.begin + kVector * threadIdx.x; at < tile.end; at += kVector * kThreads) {
        const int count = tile.end - at < kVector ? int(tile.end - at) : kVector;
        Four<T> now[tensors], moved[tensors];
#pragma unroll
        for (int i = 0; i < tensors; ++i) {
            now[i] = load(state[i] + at, count, aligned);
            moved[i] = load(tangent[i] + at, count, aligned);
        }
        const Four<G> grad = load(grads + at, count, aligned);
        const Four<T> dgrad = load(dgrads + at, count, aligned);
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
            T one[tensors], tangents[tensors];
#pragma unroll
            for (int i = 0; i < tensors; ++i) {
                one[i] = now[i].x[e];
                tangents[i] = moved[i].x[e];
            }
            R::jvp(c, d, T(value(grad.x[e])), dgrad.x[e], one, tangents);
            R::step(c, T(value(grad.x[e])), one);  // a branch around it would cost registers
#pragma unroll
            for (int i = 0; i < tensors; ++i) {
                now[i].x[e] = one[i];
                moved[i].x[e] = tangents[i];
            }
        }
#pragma unroll
        for (int i = 0; i < tensors; ++i) {
            store(tangent[i] + at, moved[i], count, aligned);
            if (a.advance) store(state[i] + at, now[i], count, aligned);
        }
    }
}

// One block for each group: its rows in order, the tiles of a row over the threads in one order.
template <class R>
__global__ void __launch_bounds__(kThreads) finish_kernel(const Launch a) {
    const int64_t group = blockIdx.x;
    const double* row = a.hyper + group * R::columns;
    __shared__ double total[R::sums];
    double all[R::columns + 1] = {};
    for (int64_t r = 0; r < a.rows; ++r) {
        if (a.segments[3 * r + 2] != group) continue;
        double sums[R::sums] = {};
        for (int64_t tile = a.first_tile[r] + threadIdx.x; tile < a.first_tile[r + 1]; tile += kThreads)
#pragma unroll
            for (int i = 0; i < R::sums; ++i) sums[i] += tile_sums(a, tile)[i];
        block_sums(sums, total);
        if (threadIdx.x == 0) {
            double cotangents[R::columns + 1];
            R::cotangents(row, double(*a.k + a.step_offset), total, cotangents);
            for (int c = 0; c <= R::columns; ++c) all[c] += cotangents[c];
        }
        __syncthreads();
    }
    if (threadIdx.x == 0)
        for (int c = 0; c <= R::columns; ++c) a.out[group * (R::columns + 1) + c] = all[c];
}

template <class X, class Y>
__global__ void __launch_bounds__(kThreads) dot_kernel(const DotLaunch a) {
    const int64_t begin = int64_t(blockIdx.x) * kTile, end = begin + kTile < a.n ? begin + kTile : a.n;
    const X* x = static_cast<const X*>(a.x);
    const Y* y = static_cast<const Y*>(a.y);
    const bool aligned = is_aligned(x + begin) && is_aligned(y + begin);
    double sums[1] = {};
    for (int64_t at = begin + kVector * threadIdx.x; at < end; at += kVector * kThreads) {
        const int count = end - at < kVector ? int(end - at) : kVector;
        const Four<X> p = load(x + at, count, aligned);
        const Four<Y> q = load(y + at, count, aligned);
#pragma unroll
        for (int e = 0; e < kVector; ++e) sums[0] += double(value(p.x[e])) * double(value(q.x[e]));
    }
    block_sums(sums, static_cast<double*>(a.workspace) + blockIdx.x);
}

__global__ void __launch_bounds__(kThreads) dot_finish_kernel(const DotLaunch a) {
    const int64_t tiles = (a.n + kTile - 1) / kTile;
    double sums[1] = {};
    for (int64_t tile = threadIdx.x; tile < tiles; tile += kThreads)
        sums[0] += static_cast<const double*>(a.workspace)[tile];
    block_sums(sums, a.out);
}

// --- Launching ----------------------------------------------------------------------------------------------------

template <class A>
int launch(void (*kernel)(A), const A& a, int64_t blocks, void* stream) {
    if (blocks == 0) return cudaSuccess;
    if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
    void* arguments[] = {const_cast<A*>(&a)};
    return cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(kThreads), arguments, 0,
                            static_cast<cudaStream_t>(stream));
}

template <class T>
struct Type {
    using type = T;
};

template <class F>
int with_float(DType dtype, F f) {
    switch (dtype) {
        case DType::f32:
            return f(Type<float>{});
        case DType::f64:
            return f(Type<double>{});
        case DType::bf16:
            return f(Type<bf16>{});
        case DType::f16:
            return f(Type<f16>{});
    }
    return cudaErrorInvalidValue;
}

template <class F>
int with_rule(const Launch& a, F f) {
    switch (a.rule) {
        case RuleId::adam:
            return f(Type<Adam>{});
        case RuleId::sgd_plain:
            return f(Type<SgdPlain>{});
        case RuleId::sgd_momentum:
        case RuleId::sgd_nesterov:
            return f(Type<SgdMomentum>{});
    }
    return cudaErrorInvalidValue;
}

// f(rule, dtype of the state, dtype of the gradients)
template <class F>
int with_types(const Launch& a, F f) {
    return with_rule(a, [&](auto rule) -> int {
        const auto with_grad = [&](auto state) -> int {
            if (a.grad_dtype == a.dtype) return f(rule, state, state);
            if (a.grad_dtype == DType::bf16) return f(rule, state, Type<bf16>{});
            if (a.grad_dtype == DType::f16) return f(rule, state, Type<f16>{});
            return cudaErrorInvalidValue;
        };
        if (a.dtype == DType::f32) return with_grad(Type<float>{});
        if (a.dtype == DType::f64) return with_grad(Type<double>{});
        return cudaErrorInvalidValue;
    });
}

template <class R, class T>
int prepare(const Launch& a, void* stream) {
    return launch(prepare_kernel<R, T>, a, (a.steps * a.groups + kThreads - 1) / kThreads, stream);
}

}  // namespace

#define MGD_API extern "C" __attribute__((visibility("default")))

MGD_API int mgd_cuda_max_steps() { return kMaxSteps; }
MGD_API int mgd_cuda_tile() { return kTile; }
MGD_API int64_t mgd_cuda_launch_size() { return sizeof(Launch); }
MGD_API int64_t mgd_cuda_dot_launch_size() { return sizeof(DotLaunch); }
MGD_API int64_t mgd_cuda_workspace(int64_t steps, int64_t groups, int64_t tiles) {
    return coefficient_bytes(steps, groups) + tiles * int64_t(sizeof(double)) * kMaxSums;
}
MGD_API const char* mgd_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

// Whether this build's kernels run on the current device: the error of asking for one of them.
MGD_API int mgd_cuda_check() {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, dot_finish_kernel);
}

// Steps *k + step_offset, ... in place, one for each gradient. The workspace needs no room for sums.
MGD_API int mgd_cuda_replay(const Launch* a, void* stream) {
    if (a->steps < 1 || a->steps > kMaxSteps) return cudaErrorInvalidValue;
    return with_types(*a, [&](auto rule, auto state, auto grad) -> int {
        using R = typename decltype(rule)::type;
        using T = typename decltype(state)::type;
        const int error = prepare<R, T>(*a, stream);
        return error ? error : launch(replay_kernel<R, T, typename decltype(grad)::type>, *a, a->tiles, stream);
    });
}

// The VJP of step *k + step_offset: adjoint in place, u and out written.
MGD_API int mgd_cuda_vjp(const Launch* a, void* stream) {
    if (a->steps != 1) return cudaErrorInvalidValue;
    return with_types(*a, [&](auto rule, auto state, auto grad) -> int {
        using R = typename decltype(rule)::type;
        using T = typename decltype(state)::type;
        int error = prepare<R, T>(*a, stream);
        if (!error) error = launch(vjp_kernel<R, T, typename decltype(grad)::type>, *a, a->tiles, stream);
        return error ? error : launch(finish_kernel<R>, *a, a->groups, stream);
    });
}

// The JVP of step *k + step_offset along one direction: tangents in place; with `advance`, the step as well. The
// workspace is that of two steps without sums.
MGD_API int mgd_cuda_jvp(const Launch* a, void* stream) {
    if (a->steps != 1) return cudaErrorInvalidValue;
    return with_types(*a, [&](auto rule, auto state, auto grad) -> int {
        using R = typename decltype(rule)::type;
        using T = typename decltype(state)::type;
        int error = prepare<R, T>(*a, stream);
        if (!error) error = launch(prepare_tangents_kernel<R, T>, *a, (a->groups + kThreads - 1) / kThreads, stream);
        return error ? error : launch(jvp_kernel<R, T, typename decltype(grad)::type>, *a, a->tiles, stream);
    });
}

MGD_API int mgd_cuda_dot(const DotLaunch* a, void* stream) {
    return with_float(a->x_dtype, [&](auto x) -> int {
        return with_float(a->y_dtype, [&](auto y) -> int {
            using X = typename decltype(x)::type;
            using Y = typename decltype(y)::type;
            const int error = launch(dot_kernel<X, Y>, *a, (a->n + kTile - 1) / kTile, stream);
            return error ? error : launch(dot_finish_kernel, *a, 1, stream);
        });
    });
}
