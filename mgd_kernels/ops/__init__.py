"""The fused steps and their vector-Jacobian products as operators of torch: `torch.ops.mgd_kernels.*`.

They work under any autograd graph and under `torch.compile`, and run on whichever backend fits their tensors. The
functional steps are differentiable in params, slots, grad and the hyperparameter table; their backward pass is one
VJP kernel, whose own derivative is that of the torch reference, so higher derivatives work too. (`torch.func`
transforms do not reach through operators with an autograd formula; `torch.autograd` does.)

Everywhere: params, slots and their adjoints `[n]` in one dtype; grad `[n]` in that dtype or a 16-bit one; hyper
float64 `[G, H]` with the columns of the rule (`mgd_kernels.rules`); k the number of the step, 1, 2, ...; segments
int64 `[R, 3]` on the CPU, rows `(start, stop, group)` (`Segments.table`); elements outside every segment stay.

Importing this package defines the operators. It looks into `mgd_kernels.backends` (the reference), `dispatch`, `arena`,
`buffers`, `rules` and `errors`.
"""

from mgd_kernels.ops.adam import adam_step, adam_step_, adam_step_vjp, adam_step_vjp_
from mgd_kernels.ops.sgd import sgd_step, sgd_step_, sgd_step_vjp, sgd_step_vjp_

__all__ = [
    "adam_step",
    "adam_step_",
    "adam_step_vjp",
    "adam_step_vjp_",
    "sgd_step",
    "sgd_step_",
    "sgd_step_vjp",
    "sgd_step_vjp_",
]
