"""Small trainings for the tests, each a description that can be cast to float64 or float32.

The settings are well conditioned on purpose. Adam's derivative divides by sqrt(v + eps_root) + eps: where an element's
second moment is as small as its rounding error, a float32 metagradient has no correct digits whatever computes it. With
eps_root = 1e-4 (gradients here are of order 0.1) the float32 error stays near its unit roundoff times a few hundred, so
that 1e-4 separates rounding from a wrong formula. beta2 = 0.95, since at 0.999 its derivative is the small difference
of two large terms (the average and its bias correction), of which float32 keeps three digits. In float64 nothing of
the kind is needed: 1e-10 is 1e6 unit roundoffs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from unrolled import Unrolled, unrolled

from mgd import Metagradient, TrainingFunction
from mgd_kernels import AdamW, Optimizer

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
CLASSES = 3


@dataclass
class Case:
    """A training with its metaparameters; `options` are further arguments of TrainingFunction."""

    model: nn.Module
    loss: Callable[..., Tensor]
    batches: list[Any]
    optimizer: Optimizer
    objective: Callable[[nn.Module], Tensor]
    z: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.batches)

    def to(self, dtype: torch.dtype) -> Case:
        def cast(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        model = copy.deepcopy(self.model).to(dtype)
        return replace(self, model=model, batches=tree_map(cast, self.batches), z=tree_map(cast, self.z))

    def but(self, z: dict[str, Any] | None = None, **changes: Any) -> Case:
        """The same with further metaparameters or other parts; names that are no parts are options."""
        parts = {k: changes.pop(k) for k in list(changes) if k in self.__dataclass_fields__}
        return replace(self, z=self.z | (z or {}), options=self.options | changes, **parts)

    def function(self, **options: Any) -> TrainingFunction:
        return TrainingFunction(
            self.model,
            self.loss,
            self.batches,
            optimizer=self.optimizer,
            objective=self.objective,
            **self.options | options,
        )

    def metagradient(self, **options: Any) -> Metagradient:
        return self.function(**options).metagradient(self.z)

    def unrolled(self) -> Unrolled:
        return unrolled(
            self.model,
            self.loss,
            self.batches,
            self.z,
            optimizer=self.optimizer,
            objective=self.objective,
            **{k: v for k, v in self.options.items() if k not in ("budget", "schedule", "trace")},
        )


def relative_error(got: Any, expected: Any) -> float:
    """Distance of two pytrees as vectors, relative to the length of the second."""
    a = torch.cat([x.detach().double().reshape(-1) for x in tree_leaves(got)])
    b = torch.cat([x.detach().double().reshape(-1) for x in tree_leaves(expected)])
    assert a.shape == b.shape
    difference = (a - b).norm().item()
    return difference if difference == 0 else difference / b.norm().item()


def errors(result: Metagradient, expected: Unrolled) -> dict[str, float]:
    """The relative error of the value and of the gradient of every key."""
    assert list(result.grads) == list(expected.grads)
    found = {key: relative_error(result.grads[key], expected.grads[key]) for key in expected.grads}
    return {"value": relative_error(result.value, expected.value)} | found


def assert_exact(
    case: Case, dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32), **options: Any
) -> Metagradient:
    """The metagradient in these dtypes agrees with the float64 unrolled reference. Returns the last one."""
    expected = case.to(torch.float64).unrolled()
    for dtype in dtypes:
        result = case.to(dtype).metagradient(**options)
        for key, value in case.to(dtype).z.items():
            tree_map(_same_kind(result.value.shape), result.grads[key], value)
        found = errors(result, expected)
        assert all(error <= TOLERANCE[dtype] for error in found.values()), (dtype, found)
        for key, gradient in expected.grads.items():
            assert any(leaf.norm() > 0 for leaf in tree_leaves(gradient)), f"a vacuous case: {key}"
    return result


def _same_kind(objectives: torch.Size) -> Callable[[Tensor, Any], None]:
    def check(gradient: Tensor, value: Any) -> None:
        assert gradient.shape == objectives + value.shape and gradient.dtype == value.dtype

    return check


# --- data, losses and models ------------------------------------------------------------------------------------


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def indices(steps: int, batch: int, examples: int) -> list[Tensor]:
    g = generator(1)
    return [torch.randint(0, examples, (batch,), generator=g) for _ in range(steps)]


def supervised(
    model: nn.Module,
    shape: tuple[int, ...],
    steps: int = 8,
    batch: int = 6,
    examples: int = 20,
    optimizer: Optimizer | None = None,
    **options: Any,
) -> Case:
    """Classification of random inputs `[examples, *shape]`; each batch is (x, y, index)."""
    g = generator()
    x = torch.randn(examples, *shape, generator=g, dtype=torch.float64)
    y = torch.randint(0, CLASSES, (examples,), generator=g)
    held_x = torch.randn(7, *shape, generator=g, dtype=torch.float64)
    held_y = torch.randint(0, CLASSES, (7,), generator=g)
    batches = [(x[i], y[i], i) for i in indices(steps, batch, examples)]
    optimizer = optimizer or adamw()
    z = {"lr": torch.linspace(2e-2, 1e-2, steps, dtype=torch.float64)}
    return Case(model.double(), cross_entropy, batches, optimizer, held_out(held_x, held_y), z, options)


def adamw(**changes: Any) -> AdamW:
    return AdamW(**{"lr": 1e-2, "eps": 1e-3, "eps_root": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.02} | changes)


def cross_entropy(model: nn.Module, batch: Any, z: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def weighted(model: nn.Module, batch: Any, z: Any) -> Tensor:
    """Cross-entropy with the data weights of all examples in z."""
    x, y, index = batch
    return (z["data_weights"][index] * F.cross_entropy(model(x), y, reduction="none")).mean()


def held_out(x: Tensor, y: Tensor) -> Callable[[nn.Module], Tensor]:
    def objective(model: nn.Module) -> Tensor:
        model.eval()
        dtype = next(model.parameters()).dtype
        return F.cross_entropy(model(x.to(dtype) if x.is_floating_point() else x), y)

    return objective


def weights(examples: int = 20) -> Tensor:
    return 1 + 0.2 * torch.randn(examples, generator=generator(2), dtype=torch.float64)


def initial(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def seeded(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The factory with the same random initialisation every time, and without touching the global generator."""

    def build(*args: Any, **kwargs: Any) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return make(*args, **kwargs).double()

    return build


@seeded
def mlp(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, CLASSES))


@seeded
def convnet() -> nn.Module:
    """Input `[B, 1, 6, 6]`; its objective in eval mode reads the running statistics."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, CLASSES)
    )


class _Recurrent(nn.Module):
    def __init__(self, cell: Callable[..., nn.Module]):
        super().__init__()
        self.cell = cell(5, 6, batch_first=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


@seeded
def lstm() -> nn.Module:
    """Input `[B, L, 5]`."""
    return _Recurrent(nn.LSTM)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        b, length, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(b, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(attended.transpose(1, 2).reshape(b, length, width)))
        return x + self.dropout(self.mlp(self.norms[1](x)))


class _GPT(nn.Module):
    """Causal transformer whose output matrix is its embedding."""

    def __init__(self, vocabulary: int, width: int, length: int, dropout: float):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.1 * torch.randn(length, width))
        self.blocks = nn.Sequential(*[_Block(width, 2, dropout) for _ in range(2)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(tokens) + self.position[: tokens.shape[1]])))


@seeded
def gpt(dropout: float = 0.1) -> nn.Module:
    return _GPT(11, 8, 6, dropout)


def language(steps: int = 6, batch: int = 4, **options: Any) -> Case:
    """The GPT on random tokens; each batch is (tokens `[B, 7]`, index)."""

    def loss(model: nn.Module, batch: Any, z: Any) -> Tensor:
        tokens, index = batch
        logits = model(tokens[:, :-1])
        each = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)
        return (z["data_weights"][index] * each).mean()

    tokens = torch.randint(0, 11, (12, 7), generator=generator())
    held = torch.randint(0, 11, (5, 7), generator=generator(4))

    def objective(model: nn.Module) -> Tensor:
        return F.cross_entropy(model.eval()(held[:, :-1]).transpose(1, 2), held[:, 1:])

    z = {"lr": torch.full((steps,), 1e-2, dtype=torch.float64), "data_weights": weights(12)}
    batches = [(tokens[i], i) for i in indices(steps, batch, 12)]
    return Case(gpt(), loss, batches, adamw(), objective, z, options)
