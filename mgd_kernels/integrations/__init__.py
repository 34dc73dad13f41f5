"""The kernels under other people's loops: `torchopt` (its transformations, fused), `torch_optim` (its checkpoints),
`huggingface` (the loss of a language model).

Import these three modules. Each needs no more than the package that it serves, and `mgd_kernels` itself imports none.
`leaves` and `flat` are private: fused updates of lists of tensors. It looks into `ops`, `dispatch`, `backends`,
`buffers`, `arena`, `optimizer`, `rules`, `functional` and `errors`.
"""
