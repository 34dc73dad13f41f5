// The optimizer kernels on whole tensors.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "optim/cpu.h"

namespace mgd {

// A table of hyperparameters and the stretches that its rows govern: of flat buffers, or each of tensors of its own.
struct Problem {
    const int64_t* segments;  // [rows][3]: start, stop, group
    int64_t rows;
    const Tensors* tensors;  // [rows] where they lie apart, else those of all rows
    bool apart;
    const double* hyper;  // [steps][groups][columns]
    int64_t first_step;   // k of the first step: 1, 2, ...
    int threads;
};

// Steps first_step, first_step + 1, ... of `task`; grad_scales: one for each step.
void run_replay(Task task, const Problem& problem, const double* grad_scales);

// The VJP of one step; out: [groups][columns + 1], overwritten unless task.wanted is `none`; 0 is what is not wanted.
void run_vjp(Task task, const Problem& problem, double grad_scale, double* out);

// The JVP of one step along task.directions, and where there is a new_state, which is the state, the step itself;
// hyper_tangents: [directions][groups][columns].
void run_jvp(Task task, const Problem& problem, const double* hyper_tangents, double grad_scale);

double run_dot(const Dot& task, int64_t n, int threads);

// Instruction sets that this machine can run, best last; the one in use; choosing another (std::invalid_argument where
// it cannot run here). The first choice is the environment variable MGD_KERNELS_ISA, else the best.
std::vector<std::string> isas();
std::string isa();
void use_isa(const std::string& name);

}  // namespace mgd
