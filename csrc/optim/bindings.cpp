// What Python sees of the optimizer kernels: addresses in, the interpreter lock released. `backends/cpu.py` checks
// dtypes, lengths and devices; the rest that memory safety needs (the segment table) is checked here.

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

Task task(int rule, int dtype, int grad_dtype, int64_t steps, int64_t groups, bool update) {
    Task made{};
    made.rule = static_cast<RuleId>(rule);
    made.dtype = static_cast<DType>(dtype);
    made.grad_dtype = static_cast<DType>(grad_dtype);
    made.update = update;
    made.steps = steps;
    made.groups = groups;
    return made;
}

// `count` addresses from the place `row` of a list of rows on: what is not in the list is null.
template <class P>
void set(P (&pointers)[3], const Addresses& addresses, size_t row = 0, size_t count = 3) {
    for (size_t i = 0; i < count && i < 3 && row * count + i < addresses.size(); ++i)
        pointers[i] = reinterpret_cast<P>(addresses[row * count + i]);
}

const void* const* pointers(const Addresses& addresses, size_t at = 0) {
    return reinterpret_cast<const void* const*>(addresses.data() + at);
}

Problem flat(int64_t n, Address segments, int64_t rows, int64_t groups, Address hyper, int64_t k, int threads,
             const Tensors& tensors) {
    const auto* table = reinterpret_cast<const int64_t*>(segments);
    for (int64_t r = 0, end = 0; r < rows; ++r) {
        const int64_t start = table[3 * r], stop = table[3 * r + 1], group = table[3 * r + 2];
        if (start < end || stop < start || stop > n || group < 0 || group >= groups)
            throw std::invalid_argument("expected sorted, disjoint segments inside [0, " + std::to_string(n) +
                                        ") of groups below " + std::to_string(groups) + "; got row " +
                                        std::to_string(r) + ", (" + std::to_string(start) + ", " +
                                        std::to_string(stop) + ", " + std::to_string(group) + ")");
        end = stop;
    }
    return {table, rows, &tensors, false, reinterpret_cast<const double*>(hyper), k, threads};
}

// Leaves that lie apart: [leaves] tensors, each a stretch of its own from 0 to its size.
struct Leaves {
    std::vector<Tensors> tensors;
    std::vector<int64_t> segments;

    Leaves(const std::vector<int64_t>& sizes, const std::vector<int64_t>& group_of, int64_t groups)
        : tensors(sizes.size()) {
        for (size_t i = 0; i < sizes.size(); ++i) {
            const int64_t group = i < group_of.size() ? group_of[i] : -1;
            if (sizes[i] < 0 || group < 0 || group >= groups)
                throw std::invalid_argument("expected a group below " + std::to_string(groups) + " for every leaf");
            segments.insert(segments.end(), {0, sizes[i], group});
        }
    }
    Problem problem(Address hyper, int64_t k, int threads) const {
        return {segments.data(),
                static_cast<int64_t>(tensors.size()),
                tensors.data(),
                true,
                reinterpret_cast<const double*>(hyper),
                k,
                threads};
    }
};

}  // namespace

void bind_optim(py::module_& m) {
    const auto code = [](auto id) { return static_cast<int>(id); };
    m.attr("DTYPES") = py::dict(py::arg("float32") = code(DType::f32), py::arg("float64") = code(DType::f64),
                                py::arg("bfloat16") = code(DType::bf16), py::arg("float16") = code(DType::f16));
    m.attr("RULES") = py::dict(py::arg("adam") = code(RuleId::adam), py::arg("sgd_plain") = code(RuleId::sgd_plain),
                               py::arg("sgd_momentum") = code(RuleId::sgd_momentum),
                               py::arg("sgd_nesterov") = code(RuleId::sgd_nesterov));
    m.def("isas", &isas, "Instruction sets that this machine can run, best last.");
    m.def("isa", &isa, "The instruction set in use.");
    m.def("use_isa", &use_isa, py::arg("name"), "Use another instruction set.");
    m.def(
        "optim_replay",
        [](int rule, int dtype, int grad_dtype, int64_t n, const Addresses& state, const Addresses& grads,
           const std::vector<double>& grad_scales, Address hypers, int64_t groups, int64_t k, Address segments,
           int64_t rows, const Addresses& new_state, int threads) {
            Tensors tensors{};
            set(tensors.state, state);
            set(tensors.new_state, new_state);
            tensors.grads = pointers(grads);
            const Problem all = flat(n, segments, rows, groups, hypers, k, threads, tensors);
            py::gil_scoped_release release;
            run_replay(task(rule, dtype, grad_dtype, grads.size(), groups, false), all, grad_scales.data());
        },
        "Steps k, k + 1, ..., one for each gradient, from state to new_state (which may be the same); hypers: address "
        "of float64 [steps, groups, columns].");
    m.def(
        "optim_vjp",
        [](int rule, int dtype, int grad_dtype, int64_t n, const Addresses& state, Address grad, double grad_scale,
           Address hyper, int64_t groups, int64_t k, Address segments, int64_t rows, const Addresses& adjoint,
           const Addresses& new_adjoint, Address u, Address out, int wanted, int threads) {
            const Addresses grads{grad};
            Tensors tensors{};
            set(tensors.state, state);
            set(tensors.adjoint, adjoint);
            set(tensors.new_adjoint, new_adjoint);
            tensors.u = reinterpret_cast<void*>(u);
            tensors.grads = pointers(grads);
            const Problem all = flat(n, segments, rows, groups, hyper, k, threads, tensors);
            py::gil_scoped_release release;
            Task made = task(rule, dtype, grad_dtype, 1, groups, false);
            made.wanted = static_cast<Wanted>(wanted);
            run_vjp(made, all, grad_scale, reinterpret_cast<double*>(out));
        },
        "The VJP of step k, from adjoint to new_adjoint (which may be the same) and u; out: address of float64 "
        "[groups, columns + 1]; wanted: which of them, 0 none, 1 those of learning rate and weight decay, 2 all.");
    m.def(
        "optim_jvp",
        [](int rule, int dtype, int grad_dtype, int64_t n, const Addresses& state, Address grad, double grad_scale,
           Address hyper, int64_t groups, int64_t k, Address segments, int64_t rows, const Addresses& tangents,
           const Addresses& grad_tangents, Address hyper_tangents, bool advance, int threads) {
            const Addresses grads{grad};
            Tensors tensors{};
            set(tensors.state, state);
            if (advance) set(tensors.new_state, state);
            tensors.grads = pointers(grads);
            tensors.tangents = reinterpret_cast<void* const*>(tangents.data());
            tensors.grad_tangents = pointers(grad_tangents);
            const Problem all = flat(n, segments, rows, groups, hyper, k, threads, tensors);
            Task made = task(rule, dtype, grad_dtype, 1, groups, false);
            made.directions = grad_tangents.size();
            py::gil_scoped_release release;
            run_jvp(made, all, reinterpret_cast<const double*>(hyper_tangents), grad_scale);
        },
        "The JVP of step k in place, one direction for each of grad_tangents; tangents: addresses, direction by "
        "direction; hyper_tangents: address of float64 [directions, groups, columns]; advance: the state makes the "
        "step.");
    m.def(
        "optim_update",
        [](int rule, int dtype, int grad_dtype, const std::vector<int64_t>& sizes, const std::vector<int64_t>& group_of,
           size_t tensors, const Addresses& state, const Addresses& grads, Address hyper, int64_t groups, int64_t k,
           const Addresses& new_state, int threads) {
            Leaves leaves(sizes, group_of, groups);
            for (size_t i = 0; i < sizes.size(); ++i) {
                set(leaves.tensors[i].state, state, i, tensors);
                set(leaves.tensors[i].new_state, new_state, i, tensors);
                leaves.tensors[i].grads = pointers(grads, i);
            }
            py::gil_scoped_release release;
            const double scale = 1;
            run_replay(task(rule, dtype, grad_dtype, 1, groups, true), leaves.problem(hyper, k, threads), &scale);
        },
        "Step k of leaves that lie apart, with p' - p in the place of p'; state, new_state: addresses, leaf by leaf, "
        "`tensors` of each, 0 for a state of zeros.");
    m.def(
        "optim_update_vjp",
        [](int rule, int dtype, int grad_dtype, const std::vector<int64_t>& sizes, const std::vector<int64_t>& group_of,
           size_t tensors, const Addresses& state, const Addresses& grads, Address hyper, int64_t groups, int64_t k,
           const Addresses& adjoint, const Addresses& new_adjoint, const Addresses& u, Address out, int threads) {
            Leaves leaves(sizes, group_of, groups);
            for (size_t i = 0; i < sizes.size(); ++i) {
                set(leaves.tensors[i].state, state, i, tensors);
                set(leaves.tensors[i].adjoint, adjoint, i, tensors);
                set(leaves.tensors[i].new_adjoint, new_adjoint, i, tensors);
                leaves.tensors[i].u = reinterpret_cast<void*>(u[i]);
                leaves.tensors[i].grads = pointers(grads, i);
            }
            py::gil_scoped_release release;
            Task made = task(rule, dtype, grad_dtype, 1, groups, true);
            made.wanted = out ? Wanted::all : Wanted::none;
            run_vjp(made, leaves.problem(hyper, k, threads), 1, reinterpret_cast<double*>(out));
        },
        "The VJP of optim_update; 0 in adjoint for zeros, in new_adjoint and out for a cotangent that is not wanted.");
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
