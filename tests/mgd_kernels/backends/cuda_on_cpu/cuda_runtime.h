// Just enough of CUDA to run csrc/optim/cuda.cu on the CPU: each thread of a block is a fiber, blocks run one after
// another. Numbers, partition, tails and the order of reductions are those of the GPU; its memory model is not, save
// that a barrier which not all threads of a block reach aborts.

#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // one block at a time
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x;
    explicit dim3(unsigned size = 1) : x(size) {}
};
using cudaStream_t = void*;
enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
struct cudaFuncAttributes {};
template <class F>
int cudaFuncGetAttributes(cudaFuncAttributes*, F*) {
    return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "error of the emulation"; }

inline dim3 threadIdx(0), blockIdx(0);

namespace emulation {

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(64 * 1024);
    bool done = false;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned running, block_size;
inline void (*entry)(void*);
inline void* entry_argument;

inline void start() {
    entry(entry_argument);
    fibers[running].done = true;
}

inline void run_block(unsigned threads, void (*body)(void*), void* argument) {
    entry = body;
    entry_argument = argument;
    block_size = threads;
    if (fibers.size() < threads) fibers.resize(threads);
    for (unsigned t = 0; t < threads; ++t) {
        fibers[t].done = false;
        getcontext(&fibers[t].context);
        fibers[t].context.uc_stack.ss_sp = fibers[t].stack.data();
        fibers[t].context.uc_stack.ss_size = fibers[t].stack.size();
        fibers[t].context.uc_link = &scheduler;
        makecontext(&fibers[t].context, start, 0);
    }
    for (unsigned finished = 0; finished < threads;) {
        finished = 0;
        for (unsigned t = 0; t < threads; ++t) {
            if (fibers[t].done) continue;
            running = t;
            threadIdx.x = t;
            swapcontext(&scheduler, &fibers[t].context);
        }
        for (unsigned t = 0; t < threads; ++t) finished += fibers[t].done;
        if (finished != 0 && finished != threads) {
            std::fprintf(stderr, "%u of %u threads left before a barrier that the others reached\n", finished, threads);
            std::abort();
        }
    }
}

}  // namespace emulation

// Every thread of the block comes here before any goes on.
inline void __syncthreads() {
    emulation::Fiber& fiber = emulation::fibers[emulation::running];
    swapcontext(&fiber.context, &emulation::scheduler);
}

inline double __shfl_down_sync(unsigned, double value, unsigned distance) {
    static double lanes[1024];
    const unsigned thread = threadIdx.x, from = thread % 32 + distance < 32 ? thread + distance : thread;
    lanes[thread] = value;
    __syncthreads();
    const double found = lanes[from];
    __syncthreads();
    return found;
}

inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) double2 {
    double x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
template <class V>
void __stcs(V* to, V value) {
    if (reinterpret_cast<uintptr_t>(to) % sizeof(V) != 0) std::abort();  // a GPU would fault
    *to = value;
}

template <class A>
int cudaLaunchKernel(void (*kernel)(A), dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
    struct Call {
        void (*kernel)(A);
        void* argument;
    } call{kernel, arguments[0]};
    for (unsigned b = 0; b < grid.x; ++b) {
        blockIdx.x = b;
        emulation::run_block(
            block.x, [](void* c) { static_cast<Call*>(c)->kernel(*static_cast<A*>(static_cast<Call*>(c)->argument)); },
            &call);
    }
    return cudaSuccess;
}
