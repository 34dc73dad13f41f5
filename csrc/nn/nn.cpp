// Which instruction set runs, what is one thread's work, and how sums over rows and examples are put together.

#include "nn/nn.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "optim/optim.h"
#include "optim/threads.h"

namespace mgd {
namespace {

// A set's own list of kernels is code for that set: it is asked for only where it runs.
const NnKernels& current() {
#if defined(MGD_X86)
    const bool fused = __builtin_cpu_supports("fma");
    const std::string name = isa();
    if (fused && name == "avx512") {
        static const NnKernels widest = avx512::nn_kernels();
        return widest;
    }
    if (fused && name == "avx2") {
        static const NnKernels wide = avx2::nn_kernels();
        return wide;
    }
#endif
    static const NnKernels slow = baseline::nn_kernels();
    return slow;
}

// Calls body(begin, end) over [0, items), on several threads where there is enough to do. What is computed for an item
// depends on nothing else, so the partition does not show in the results.
template <class F>
void parallel(int threads, int64_t items, int64_t elements, F body) {
    constexpr int64_t wanted = 16384;  // elements that are worth waking a thread
    const int64_t each = std::max<int64_t>(1, elements / std::max<int64_t>(1, items));
    const int64_t chunk = (wanted + each - 1) / each, chunks = (items + chunk - 1) / chunk;
    if (threads <= 1 || chunks < 4) return body(int64_t{0}, items);
    auto one = [&](int64_t i) { body(i * chunk, std::min((i + 1) * chunk, items)); };
    using One = decltype(one);
    parallel_for(threads, chunks, [](void* f, int64_t i) { (*static_cast<One*>(f))(i); }, &one);
}

// out[i] = Σ_j from[j * stride + i * step], in order, in double.
template <class T>
void column_sums(const T* from, int64_t rows, int64_t stride, int64_t columns, int64_t step, float* out) {
    static thread_local std::vector<double> sums;  // allocated only where larger than ever before
    sums.assign(columns, 0.0);
    for (int64_t j = 0; j < rows; ++j)
        for (int64_t i = 0; i < columns; ++i) sums[i] += from[j * stride + i * step];
    std::copy(sums.begin(), sums.end(), out);
}

template <class T>
T* workspace(int64_t size) {
    static thread_local std::vector<T> kept;
    if (static_cast<int64_t>(kept.size()) < size) kept.resize(size);
    return kept.data();
}

template <class T, class Kernel>
void run_max_pool(Kernel kernel, Pass pass, const MaxPool<T>& task, int threads) {
    parallel(threads, task.planes, task.planes * task.height * task.width,
             [&](int64_t begin, int64_t end) { kernel(pass, task, workspace<T>(task.scratch()), begin, end); });
}

}  // namespace

void run_activation(Pass pass, const Activation& task, int threads) {
    const NnKernels& kernels = current();
    constexpr int64_t tile = 4096;  // a multiple of every register: whole registers but for the last
    parallel(threads, (task.n + tile - 1) / tile, task.n, [&](int64_t begin, int64_t end) {
        kernels.activation(pass, task, begin * tile, std::min(end * tile, task.n));
    });
}

void run_layer_norm(Pass pass, LayerNorm task, int threads) {
    const NnKernels& kernels = current();
    const int64_t blocks = (task.rows + kRowBlock - 1) / kRowBlock, width = task.width;
    const int64_t outputs = pass == Pass::forward ? 0 : pass == Pass::backward ? 2 : 1;
    task.partial = workspace<float>(outputs * blocks * width);
    parallel(threads, blocks, task.rows * width,
             [&](int64_t begin, int64_t end) { kernels.layer_norm(pass, task, begin, end); });
    if (outputs > 0) column_sums(task.partial, blocks, outputs * width, width, 1, task.gw);
    if (outputs > 1) column_sums(task.partial + width, blocks, outputs * width, width, 1, task.gb);
}

void run_channel_norm(Pass pass, ChannelNorm task, int threads) {
    const NnKernels& kernels = current();
    const int64_t pieces = task.batch * task.channels;
    task.partial = workspace<double>(pass == Pass::forward ? 0 : pieces * kPieceSums);
    parallel(threads, task.sets(), pieces * task.inner,
             [&](int64_t begin, int64_t end) { kernels.channel_norm(pass, task, begin, end); });
    const auto over_examples = [&](const double* from, float* out) {
        column_sums(from, task.batch, task.channels * kPieceSums, task.channels, kPieceSums, out);
    };
    if (pass != Pass::forward) over_examples(task.partial, task.gw);
    if (pass == Pass::backward) over_examples(task.partial + 1, task.gb);
}

void run_softmax(Pass pass, const Softmax& task, int threads) {
    const NnKernels& kernels = current();
    parallel(threads, task.rows, task.rows * task.width,
             [&](int64_t begin, int64_t end) { kernels.softmax(pass, task, begin, end); });
}

void run_cross_entropy(Pass pass, const CrossEntropy& task, int threads) {
    for (int64_t row = 0; row < task.rows; ++row) {
        const int64_t target = task.target[row];
        if (target != task.ignored && (target < 0 || target >= task.width))
            throw std::out_of_range("Target " + std::to_string(target) + " is out of bounds: expected a class in [0, " +
                                    std::to_string(task.width) + ") or ignore_index=" + std::to_string(task.ignored));
    }
    const NnKernels& kernels = current();
    parallel(threads, task.rows, task.rows * task.width,
             [&](int64_t begin, int64_t end) { kernels.cross_entropy(pass, task, begin, end); });
}

void run_rotary(const Rotary& task, int threads) {
    const NnKernels& kernels = current();
    const int64_t rows = task.batch * task.heads * task.length;
    parallel(threads, rows, rows * task.width, [&](int64_t begin, int64_t end) { kernels.rotary(task, begin, end); });
}

void run_rotary_sums(const RotarySums& task, int threads) {
    const NnKernels& kernels = current();
    const int64_t rows = task.length * (task.shared ? 1 : task.batch);
    parallel(threads, rows, task.batch * task.heads * task.length * task.width,
             [&](int64_t begin, int64_t end) { kernels.rotary_sums(task, begin, end); });
}

void run_max_pool(Pass pass, const MaxPool<float>& task, int threads) {
    run_max_pool(current().max_pool, pass, task, threads);
}

void run_max_pool(Pass pass, const MaxPool<double>& task, int threads) {
    run_max_pool(current().max_pool_wide, pass, task, threads);
}

}  // namespace mgd
