// What Python sees of the optimizer kernels: addresses in, the interpreter lock released. `backends/cpu.py` checks
// dtypes, lengths and devices; what memory safety hangs on beyond that (the segment table) is checked here.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "optim/optim.h"

namespace py = pybind11;

namespace mgd {
namespace {

using Address = uintptr_t;
using Addresses = std::vector<Address>;

Task task(int rule, int dtype, int grad_dtype, const Addresses& state, const Addresses& grads, int64_t groups) {
    Task made{};
    made.rule = static_cast<RuleId>(rule);
    made.dtype = static_cast<DType>(dtype);
    made.grad_dtype = static_cast<DType>(grad_dtype);
    for (size_t i = 0; i < state.size() && i < 3; ++i) made.state[i] = reinterpret_cast<void*>(state[i]);
    made.grads = reinterpret_cast<const void* const*>(grads.data());
    made.steps = static_cast<int64_t>(grads.size());
    made.groups = groups;
    return made;
}

Problem problem(int64_t n, Address segments, int64_t rows, int64_t groups, Address hyper, int64_t k, int threads) {
    const auto* table = reinterpret_cast<const int64_t*>(segments);
    for (int64_t r = 0, end = 0; r < rows; ++r) {
        const int64_t start = table[3 * r], stop = table[3 * r + 1], group = table[3 * r + 2];
        if (start < end || stop < start || stop > n || group < 0 || group >= groups)
            throw std::invalid_argument("expected sorted, disjoint segments inside [0, " + std::to_string(n) +
                                        ") of groups below " + std::to_string(groups) + "; row " + std::to_string(r) +
                                        " is (" + std::to_string(start) + ", " + std::to_string(stop) + ", " +
                                        std::to_string(group) + ")");
        end = stop;
    }
    return {n, table, rows, reinterpret_cast<const double*>(hyper), k, threads};
}

}  // namespace

void bind_optim(py::module_& m) {
    m.def("isas", &isas, "Instruction sets that this machine can run, best last.");
    m.def("isa", &isa, "The instruction set in use.");
    m.def("use_isa", &use_isa, py::arg("name"), "Use another instruction set.");
    m.def(
        "optim_replay",
        [](int rule, int dtype, int grad_dtype, int64_t n, const Addresses& state, const Addresses& grads,
           const std::vector<double>& grad_scales, Address hypers, int64_t groups, int64_t k, Address segments,
           int64_t rows, int threads) {
            const Problem all = problem(n, segments, rows, groups, hypers, k, threads);
            py::gil_scoped_release release;
            run_replay(task(rule, dtype, grad_dtype, state, grads, groups), all, grad_scales.data());
        },
        "Steps k, k + 1, ... in place, one for each gradient; hypers: address of float64 [steps, groups, columns].");
    m.def(
        "optim_vjp",
        [](int rule, int dtype, int grad_dtype, int64_t n, const Addresses& state, Address grad, double grad_scale,
           Address hyper, int64_t groups, int64_t k, Address segments, int64_t rows, const Addresses& adjoint,
           Address u, Address out, int threads) {
            const Problem all = problem(n, segments, rows, groups, hyper, k, threads);
            py::gil_scoped_release release;
            const Addresses grads{grad};
            Task made = task(rule, dtype, grad_dtype, state, grads, groups);
            for (size_t i = 0; i < adjoint.size() && i < 3; ++i) made.adjoint[i] = reinterpret_cast<void*>(adjoint[i]);
            made.u = reinterpret_cast<void*>(u);
            run_vjp(made, all, grad_scale, reinterpret_cast<double*>(out));
        },
        "The VJP of step k, adjoints and u in place; out: address of float64 [groups, columns + 1].");
    m.def(
        "dot",
        [](int x_dtype, int y_dtype, int64_t n, Address x, Address y, int threads) {
            py::gil_scoped_release release;
            return run_dot({static_cast<DType>(x_dtype), static_cast<DType>(y_dtype), reinterpret_cast<const void*>(x),
                            reinterpret_cast<const void*>(y)},
                           n, threads);
        },
        "The inner product of two vectors, in double.");
}

}  // namespace mgd
