// What Python sees of the optimizer kernels.

#include <pybind11/pybind11.h>

namespace mgd {

void bind_optim(pybind11::module_&) {}

}  // namespace mgd
