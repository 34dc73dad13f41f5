"""The kernels under other people's loops: `torchopt` (its transformations, fused), `torch_optim` (its checkpoints).

Import these two modules. Each imports the package that it serves on its own, and `mgd_kernels` itself imports neither.
`leaves` and `flat` are private: fused updates of lists of tensors. It looks into `ops`, `dispatch`, `backends`,
`buffers`, `arena`, `optimizer`, `rules` and `errors`.
"""
