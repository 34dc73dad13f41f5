"""The peers by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from mgd.bench.cases import Case
from mgd.bench.methods import METHODS, Outcome

WORKLOADS = (
    "mlp", "gpt", "convnet-group", "convnet-batch", "lora", "gpt2-no-dropout", "llama", "bert-no-dropout", "llama-lora",
)  # fmt: skip
QUICK = ("mlp", "llama-lora")


@dataclass(frozen=True)
class Peer:
    """what: for people. home: of `prepare(case)`, `module:function` in this package, or a name of METHODS. packages:
    whose versions are told. compiles: which may take minutes."""

    what: str
    home: str
    packages: tuple[str, ...] = ()
    compiles: bool = False

    def prepare(self, case: Case) -> Callable[[], Outcome]:
        module, _, function = self.home.partition(":")
        if not function:
            return METHODS[module].prepare(case)
        return getattr(importlib.import_module(f"mgd.bench.peers.{module}"), function)(case)


PEERS: dict[str, Peer] = {
    "unrolled": Peer("plain torch, one autograd graph through all steps", "unrolled"),
    "torchopt": Peer("TorchOpt's functional optimizers, unrolled", "libraries:torchopt", ("torchopt",)),
    "higher": Peer("higher's patched modules, unrolled", "libraries:higher", ("higher",)),
    "bergson": Peer("bergson's MAGIC trainer, from checkpoints on disk", "bergson", ("bergson",)),
    "mgd": Peer("this package with its default arguments", "mgd"),
    "jax": Peer(
        "JAX and optax, one program of scans with sqrt(T) checkpoints", "jax_optax:prepare", ("jax", "optax"), True
    ),
    "recipe": Peer(
        "a step of torch.func compiled by torch.compile, under reentrant checkpoints of sqrt(T) steps",
        "recipe:prepare",
        compiles=True,
    ),
}
