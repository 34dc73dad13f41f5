// From the pass that is asked for to the member function that computes it.

#pragma once

#include "nn/kernels.h"

namespace mgd {
namespace {

// Work(task, i) for each item i of [begin, end), and on it the pass.
template <class Work, class Task>
void each_pass(Pass pass, const Task& task, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const Work work(task, i);
        if (pass == Pass::forward)
            work.forward();
        else if (pass == Pass::backward)
            work.backward();
        else
            work.double_backward();
    }
}

}  // namespace
}  // namespace mgd
