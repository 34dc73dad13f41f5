// The extension module: raw pointers in, no torch.

#include <pybind11/pybind11.h>

namespace mgd {
void bind_nn(pybind11::module_&);
void bind_optim(pybind11::module_&);
void bind_store(pybind11::module_&);
}  // namespace mgd

PYBIND11_MODULE(_core, m) {
    m.doc() = "Native kernels and state store of mgd_kernels.";
    mgd::bind_optim(m);
    mgd::bind_nn(m);
    mgd::bind_store(m);
}
