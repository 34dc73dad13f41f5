// The CPU dispatcher: which instruction set runs, which tiles there are, and how their sums are put together.

#include "optim/cpu.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "optim/adam.h"
#include "optim/optim.h"
#include "optim/sgd.h"
#include "optim/threads.h"

namespace mgd {
namespace {

// --- Instruction sets ---------------------------------------------------------------------------------------------

struct Isa {
    const char* name;
    Kernels kernels;
    bool runs_here;
};

const std::vector<Isa>& table() {
    static const std::vector<Isa> all = [] {
        std::vector<Isa> found{{"baseline", baseline::kernels(), true}};
#if defined(MGD_X86)
        __builtin_cpu_init();
        found.push_back({"avx2", avx2::kernels(), bool(__builtin_cpu_supports("avx2"))});
        found.push_back({"avx512", avx512::kernels(),
                         __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")});
#endif
        return found;
    }();
    return all;
}

const Isa& find(const std::string& name) {
    for (const Isa& isa : table())
        if (isa.runs_here && isa.name == name) return isa;
    std::string known;
    for (const std::string& other : isas()) known += (known.empty() ? "" : ", ") + other;
    throw std::invalid_argument("expected an instruction set that this machine runs (" + known + "); got '" + name +
                                "': correct or unset MGD_KERNELS_ISA");
}

std::atomic<const Isa*> chosen{nullptr};

const Isa& current() {
    const Isa* isa = chosen.load();
    if (!isa) {
        const char* wanted = std::getenv("MGD_KERNELS_ISA");
        isa = &find(wanted && *wanted ? wanted : isas().back());
        chosen.store(isa);
    }
    return *isa;
}

// --- Workspaces: kept by the calling thread, so that a call allocates only when it is larger than any before it ----

template <class T>
T* workspace(std::vector<T>& kept, size_t size) {
    if (kept.size() < size) kept.resize(size);
    return kept.data();
}

// Tiles never cross a row of the segment table: tile_of[r] is the first tile of row r, tile_of[rows] their number.
struct Tiles {
    const Problem& problem;
    const int64_t* first;

    explicit Tiles(const Problem& p) : problem(p) {
        static thread_local std::vector<int64_t> kept;
        int64_t* offsets = workspace(kept, p.rows + 1);
        offsets[0] = 0;
        for (int64_t r = 0; r < p.rows; ++r)
            offsets[r + 1] = offsets[r] + (p.segments[3 * r + 1] - p.segments[3 * r] + kTile - 1) / kTile;
        first = offsets;
    }
    int64_t count() const { return first[problem.rows]; }
    int64_t row(int64_t tile) const { return std::upper_bound(first, first + problem.rows + 1, tile) - first - 1; }
    template <class F>
    void visit(int64_t tile, F f) const {
        const int64_t r = row(tile), *segment = problem.segments + 3 * r;
        const int64_t begin = segment[0] + (tile - first[r]) * kTile;
        f(problem.tensors[problem.apart ? r : 0], segment[2], begin, std::min(begin + kTile, segment[1]));
    }
};

template <class F>
void parallel(int threads, int64_t items, F body) {
    // Below a few tiles, waking threads costs more than they save.
    parallel_for(items < 4 ? 1 : threads, items, [](void* f, int64_t i) { (*static_cast<F*>(f))(i); }, &body);
}

// --- Coefficients -------------------------------------------------------------------------------------------------

template <class F>
auto with_rule(RuleId rule, F f) {
    switch (rule) {
        case RuleId::sgd_plain:
            return f(SgdPlain{});
        case RuleId::sgd_momentum:
        case RuleId::sgd_nesterov:
            return f(SgdMomentum{});
        default:
            return f(Adam{});
    }
}

template <class T, class R>
const void* prepare(R, const Task& task, const Problem& problem, const double* grad_scales) {
    using Coefficients = typename R::template Coefficients<T>;
    static thread_local std::vector<Coefficients> kept;
    Coefficients* out = workspace(kept, task.steps * task.groups);
    for (int64_t i = 0; i < task.steps; ++i)
        for (int64_t g = 0; g < task.groups; ++g) {
            const double* row = problem.hyper + (i * task.groups + g) * R::columns;
            const double k = static_cast<double>(problem.first_step + i);
            Coefficients& c = out[i * task.groups + g];
            c = R::template prepare<T>(row, k, grad_scales[i], task.rule);
            if (task.update) c.decay = T(-row[R::lr] * row[R::weight_decay]);
        }
    return out;
}

void set_coefficients(Task& task, const Problem& problem, const double* grad_scales) {
    task.coefficients = with_rule(task.rule, [&](auto rule) {
        return task.dtype == DType::f64 ? prepare<double>(rule, task, problem, grad_scales)
                                        : prepare<float>(rule, task, problem, grad_scales);
    });
}

template <class T, class R>
const void* prepare_tangents(R, const Task& task, const Problem& problem, const double* tangents) {
    using Tangents = typename R::template Tangents<T>;
    static thread_local std::vector<Tangents> kept;
    Tangents* out = workspace(kept, task.directions * task.groups);
    for (int64_t i = 0; i < task.directions * task.groups; ++i)
        out[i] = R::template prepare_tangents<T>(problem.hyper + i % task.groups * R::columns,
                                                 tangents + i * R::columns, static_cast<double>(problem.first_step));
    return out;
}

}  // namespace

void run_replay(Task task, const Problem& problem, const double* grad_scales) {
    set_coefficients(task, problem, grad_scales);
    const Tiles tiles(problem);
    const Kernels& kernels = current().kernels;
    parallel(problem.threads, tiles.count(), [&](int64_t tile) {
        tiles.visit(tile, [&](const Tensors& tensors, int64_t group, int64_t begin, int64_t end) {
            kernels.replay(task, tensors, group, begin, end);
        });
    });
}

void run_vjp(Task task, const Problem& problem, double grad_scale, double* out) {
    set_coefficients(task, problem, &grad_scale);
    const Tiles tiles(problem);
    const Kernels& kernels = current().kernels;
    static thread_local std::vector<double> kept;
    double* const partial = workspace(kept, tiles.count() * kMaxSums);
    parallel(problem.threads, tiles.count(), [&](int64_t tile) {
        tiles.visit(tile, [&](const Tensors& tensors, int64_t group, int64_t begin, int64_t end) {
            kernels.vjp(task, tensors, group, begin, end, partial + tile * kMaxSums);
        });
    });
    if (task.wanted == Wanted::none) return;
    const bool all = task.wanted == Wanted::all;
    with_rule(task.rule, [&](auto rule) {
        using R = decltype(rule);
        std::fill(out, out + task.groups * (R::columns + 1), 0.0);
        for (int64_t r = 0; r < problem.rows; ++r) {  // tiles in order: the sums depend on nothing else
            double sums[R::sums] = {}, cotangents[R::columns + 1];
            for (int64_t tile = tiles.first[r]; tile < tiles.first[r + 1]; ++tile)
                for (int i = 0; i < (all ? R::sums : kRates); ++i) sums[i] += partial[tile * kMaxSums + i];
            const int64_t group = problem.segments[3 * r + 2];
            const double* row = problem.hyper + group * R::columns;
            R::cotangents(row, static_cast<double>(problem.first_step), sums, cotangents);
            for (int c = 0; c < (all ? R::columns + 1 : kRates); ++c)
                out[group * (R::columns + 1) + c] += cotangents[c];
        }
    });
}

void run_jvp(Task task, const Problem& problem, const double* hyper_tangents, double grad_scale) {
    set_coefficients(task, problem, &grad_scale);
    task.tangents = with_rule(task.rule, [&](auto rule) {
        return task.dtype == DType::f64 ? prepare_tangents<double>(rule, task, problem, hyper_tangents)
                                        : prepare_tangents<float>(rule, task, problem, hyper_tangents);
    });
    const Tiles tiles(problem);
    const Kernels& kernels = current().kernels;
    parallel(problem.threads, tiles.count(), [&](int64_t tile) {
        tiles.visit(tile, [&](const Tensors& tensors, int64_t group, int64_t begin, int64_t end) {
            kernels.jvp(task, tensors, group, begin, end);
        });
    });
}

double run_dot(const Dot& task, int64_t n, int threads) {
    const int64_t tiles = (n + kTile - 1) / kTile;
    static thread_local std::vector<double> kept;
    double* const partial = workspace(kept, tiles);
    const Kernels& kernels = current().kernels;
    parallel(threads, tiles,
             [&](int64_t tile) { kernels.dot(task, tile * kTile, std::min((tile + 1) * kTile, n), partial + tile); });
    double sum = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) sum += partial[tile];
    return sum;
}

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const Isa& isa : table())
        if (isa.runs_here) names.push_back(isa.name);
    return names;
}
std::string isa() { return current().name; }
void use_isa(const std::string& name) { chosen.store(&find(name)); }

}  // namespace mgd
