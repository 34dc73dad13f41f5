"""The kernels, one module per backend: `reference` (torch, the specification), `cpu` (C++), `triton`, `cuda`.

Every backend has the functions of `interface.Backend`; `mgd_kernels.dispatch` loads and chooses one, and nothing else
should need to. `addresses.py` is private: the checks of the backends that hand addresses to compiled code. It
looks into `mgd_kernels.arena`, `rules` and `errors`.
"""
