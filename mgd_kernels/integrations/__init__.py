"""The kernels under other people's loops: `torchopt` (its transformations, fused), `torch_optim` (its checkpoints).

Each module imports the package that it serves on its own; none is imported by `mgd_kernels` itself.
"""
