"""AdamW under an autograd graph: TorchOpt's transformation against the fused drop-in, the operator, the bare kernels.

One training step and its VJP, as a reverse sweep over stored states runs them: `update`, `apply_updates`, then the
gradient with respect to the parameters, the moments and the gradients, given cotangents of the new parameters and
moments. 4 M parameters in float32, in one tensor and as the leaves of a small GPT; one thread. Times are medians of
repetitions in alternation, of that thread's CPU time. "operator" is the same in one flat tensor by
`torch.ops.mgd_kernels.adam_step`, which gives the new parameters themselves; "kernels" the same step and VJP without a
graph (`step_`, `step_vjp_` on an arena, which give the cotangents of the hyperparameters too).

Memory is what the graph of one step keeps for its backward pass, in tensors of the parameters' size: counted once a
storage (what is really held), and once a saved tensor (TorchOpt saves the gradient twice). "resident" is the same as a
user sees it: by how much the process grows a step while steps are chained, in tensors of the parameters' size.

`python benchmarks/bench_torchopt.py` prints the figures as JSON.
"""

from __future__ import annotations

import json
import mmap
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchopt
from torch import Tensor

import mgd_kernels.ops  # noqa: F401  # defines torch.ops.mgd_kernels
from mgd_kernels import AdamW, Arena, buffers
from mgd_kernels.arena import Segments
from mgd_kernels.integrations import torchopt as fused

N = 4_000_000
SETTINGS = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.01, "eps_root": 1e-8}


def one_tensor(n: int = N) -> list[torch.Size]:
    return [torch.Size([n])]


def gpt_leaves(n: int = N) -> list[torch.Size]:
    """Shapes of a GPT of about n parameters: width 256, a vocabulary of 1024, as many blocks as it takes."""
    width, shapes = 256, [(1024, 256), (128, 256)]
    block = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,), (width,), (width,)]
    block += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    while sum(torch.Size(s).numel() for s in shapes) < n:
        shapes += block
    return [torch.Size(s) for s in shapes]


class Step:
    """One step and its VJP under a transformation: `run()` returns the cotangents of parameters, gradients, moments."""

    def __init__(self, module, shapes: list[torch.Size], k: int = 10):
        self.module, self.transformation = module, module.adamw(**SETTINGS)
        torch.manual_seed(0)
        draw = lambda: [torch.randn(shape) for shape in shapes]
        self.params, self.grads = ([t.requires_grad_() for t in draw()] for _ in range(2))
        self.state = self.transformation.init(self.params)
        for _ in range(k):  # moments as a training leaves them, lying where the transformation puts them
            grads = draw()
            _, self.state = self.transformation.update(grads, self.state, params=self.params, inplace=True)
        self.moments = [t for t in torchopt.pytree.tree_leaves(self.state) if t.is_floating_point()]
        for moment in self.moments:
            moment.requires_grad_()
        self.cotangents = [torch.randn_like(t) for t in (*self.params, *self.moments)]

    def forward(self) -> list[Tensor]:
        updates, state = self.transformation.update(self.grads, self.state, params=self.params, inplace=False)
        params = torchopt.apply_updates(self.params, updates, inplace=False)
        return [*params, *(t for t in torchopt.pytree.tree_leaves(state) if t.is_floating_point())]

    def run(self) -> tuple[Tensor, ...]:
        inputs = [*self.params, *self.grads, *self.moments]
        return torch.autograd.grad(self.forward(), inputs, self.cotangents)

    def held(self) -> tuple[float, float]:
        """Tensors that the graph holds, in units of the parameters: by storage, and by saved tensor."""
        storages: dict[int, int] = {}
        saved = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.nbytes
            # The storage may be shared: count only what the tensor itself covers of it.
            storages[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = self.forward()
        size = sum(p.nbytes for p in self.params)
        del out
        return sum(storages.values()) / size, saved / size


def resident_in_a_process(module, n: int = N, steps: int = 16) -> float:
    """By how many tensors of the parameters' size a process of its own grows a step, over steps in one graph."""
    name = "torchopt" if module is torchopt else "fused"
    code = f"import bench_torchopt as bench; print(bench.growth(bench.{name}, {n}, {steps}))"
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=here, check=True, capture_output=True, text=True)
    return float(done.stdout)


def growth(module, n: int, steps: int) -> float:
    """As `resident_in_a_process`, in this process: chained steps whose gradients `p / 2` save nothing themselves.
    (Of resident memory, on Linux. The peak that `getrusage` gives is inherited from the parent.)"""
    torch.set_num_threads(1)
    params = [torch.randn(n, requires_grad=True)]
    transformation = module.adamw(**SETTINGS)
    state = transformation.init(params)
    sizes = []
    for _ in range(steps + 4):
        updates, state = transformation.update([p / 2 for p in params], state, params=params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
        del updates
        sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE)
    return (sizes[-1] - sizes[3]) / steps / params[0].nbytes


class Operator:
    """The same in flat tensors, by the operator."""

    def __init__(self, n: int):
        torch.manual_seed(0)
        self.inputs = [torch.randn(n), torch.zeros(n), torch.zeros(n), torch.randn(n)]
        self.table = AdamW(**SETTINGS).table()
        self.segments = Segments.single(n).table
        for k in range(1, 11):
            self.inputs[:3] = self.step([*self.inputs[:3], torch.randn(n)], k)
        for tensor in self.inputs:
            tensor.requires_grad_()
        self.cotangents = [torch.randn(n) for _ in range(3)]

    def step(self, inputs: list[Tensor], k: int = 11) -> list[Tensor]:
        return torch.ops.mgd_kernels.adam_step(*inputs, self.table, k, self.segments)

    def run(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.step(self.inputs), self.inputs, self.cotangents)


class Kernels:
    """The same without a graph."""

    def __init__(self, shapes: list[torch.Size]):
        torch.manual_seed(0)
        tensors = {str(i): torch.randn(shape) for i, shape in enumerate(shapes)}
        arena = Arena(tensors)
        self.optimizer = AdamW(**SETTINGS)
        self.state = self.optimizer.init(arena.flatten(tensors), arena)
        self.grad = torch.randn(arena.numel)
        for _ in range(10):
            self.optimizer.step_(self.state, self.grad)
        self.before = self.state.clone()
        self.adjoint = self.state.zeros_like()
        self.adjoint.params.normal_()
        self.u = torch.zeros(arena.numel)

    def run(self) -> None:
        self.optimizer.step_(self.state, self.grad)
        self.optimizer.step_vjp_(self.before, self.grad, None, self.adjoint, self.u)


def alternate(rounds: int, *functions: Callable[[], object]) -> list[float]:
    """The median CPU time of each in seconds, all of them run in turn, after one round of warming up."""
    times: list[list[float]] = [[] for _ in functions]
    for i in range(rounds + 1):
        for function, found in zip(functions, times, strict=True):
            start = time.thread_time()
            function()
            if i:
                found.append(time.thread_time() - start)
    return [statistics.median(found) for found in times]


def measure(n: int = N, rounds: int = 9) -> dict[str, dict[str, float]]:
    """Times in seconds, their ratios to TorchOpt's, and the memory held, for both layouts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {}
    try:
        for name, shapes in (("one_tensor", one_tensor(n)), ("gpt_leaves", gpt_leaves(n))):
            theirs, ours, kernels = Step(torchopt, shapes), Step(fused, shapes), Kernels(shapes)
            operator = Operator(sum(shape.numel() for shape in shapes))
            check(theirs, ours)
            buffers.release()
            t_theirs, t_ours, t_operator, t_kernels = alternate(rounds, theirs.run, ours.run, operator.run, kernels.run)
            (storage_theirs, saved_theirs), (storage_ours, saved_ours) = theirs.held(), ours.held()
            found[name] = {
                "parameters": sum(shape.numel() for shape in shapes),
                "leaves": len(shapes),
                "torchopt_seconds": t_theirs,
                "fused_seconds": t_ours,
                "operator_seconds": t_operator,
                "kernels_seconds": t_kernels,
                "speedup_fused": t_theirs / t_ours,
                "speedup_operator": t_theirs / t_operator,
                "speedup_kernels": t_theirs / t_kernels,
                "held_torchopt": storage_theirs,
                "held_fused": storage_ours,
                "saved_torchopt": saved_theirs,
                "saved_fused": saved_ours,
            }
        resident_theirs, resident_ours = resident_in_a_process(torchopt, n), resident_in_a_process(fused, n)
        found["one_tensor"] |= {"resident_torchopt": resident_theirs, "resident_fused": resident_ours}
    finally:
        torch.set_num_threads(threads)
        buffers.release()
    return found


def check(theirs: Step, ours: Step) -> None:
    """What is timed is the same mathematics, to the float32 rounding of TorchOpt's bias corrections (6e-5)."""
    for a, b in zip(theirs.run(), ours.run(), strict=True):
        if not (a - b).norm() < 1e-3 * a.norm():
            raise AssertionError(f"the cotangents differ by {float((a - b).norm() / a.norm()):.1e}")


def test_step_and_vjp(benchmark):
    found = measure()
    benchmark.extra_info.update(found)
    step = Step(fused, one_tensor())
    benchmark.pedantic(step.run, rounds=3, warmup_rounds=1)
    for figures in found.values():  # measured 6.4 and 2.9; 9.5 and 5.6
        assert figures["speedup_fused"] > 2 and figures["speedup_operator"] > 4
        assert figures["held_fused"] < figures["held_torchopt"]


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
