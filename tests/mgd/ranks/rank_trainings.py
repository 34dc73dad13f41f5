"""The trainings of the tests of several processes, and ways to interrupt them."""

from __future__ import annotations

from typing import Any

import cases
import torch
import torch.nn.functional as F
from torch import nn

import mgd
from mgd import errors
from mgd_kernels import AdamW, Muon, RMSprop

V = 4


def outcome(result: Any) -> dict[str, Any]:
    return {
        "value": result.value,
        "grads": result.grads,
        "losses": result.losses,
        "model": result.model_state,
        "adjoint norms": result.report.adjoint_norms,
    }


def weighted(case: cases.Case, **changes: Any) -> cases.Case:
    """With a weight for every example, a temperature that all microbatches read, learning rates and initial weights."""
    examples, steps = 20, len(case)
    z = {
        "weights": torch.linspace(0.5, 1.5, examples, dtype=torch.float64),
        "temperature": torch.tensor(1.1, dtype=torch.float64),
        "lr": torch.full((steps,), 1e-2, dtype=torch.float64),
        "init": {name: p.detach().clone() for name, p in case.model.named_parameters()},
    }
    options = {
        "trace": False,
        "microbatches": V,
        "per_example": {"weights": lambda batch: batch[2]},
        "max_grad_norm": 0.5,
    }
    return case.but(z=z, loss=weighted_loss, **options | changes)


def weighted_loss(model, batch, z):
    x, y, _ = batch
    return (z["weights"] * F.cross_entropy(model(x) * z["temperature"], y, reduction="none")).mean()


def mlp(steps: int = 6, **changes: Any) -> cases.Case:
    model = nn.Sequential(nn.Linear(5, 24), nn.Tanh(), nn.Dropout(0.1), nn.Linear(24, cases.CLASSES))
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return weighted(cases.supervised(model, (5,), steps), **changes)


def convnet() -> cases.Case:
    """Its running statistics are part of the training, and both objectives read them."""
    case = cases.supervised(cases.convnet(), (1, 6, 6), steps=6)

    def objectives(model: nn.Module) -> torch.Tensor:
        return torch.stack([case.objective(model), model[1].running_var.square().sum()])

    return weighted(case, objective=objectives)


def captured() -> cases.Case:
    """As graphs, which keep residuals. Microbatches are as long as each other: there is one graph."""
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, cases.CLASSES))
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return weighted(cases.supervised(model, (5,), steps=3, batch=8), trace=True)


def gpt() -> cases.Case:
    return cases.language().but(trace=False, microbatches=V, max_grad_norm=0.5)


class Counting(nn.Module):
    """Counts what it sees, which has no mean over microbatches."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += (x[:, 0] > 0).sum()
        return self.linear(x)


def several(model: nn.Module) -> torch.Tensor:
    """Two objectives."""
    return torch.stack([p.double().square().sum() for p in model.parameters()][:2]).to(next(model.parameters()))


TRAININGS = {
    "mlp": lambda: mlp().to(torch.float32),
    "mlp in float64": lambda: mlp(),
    "convnet": lambda: convnet().to(torch.float32),
    "convnet in float64": lambda: convnet(),
    "gpt with dropout": lambda: gpt().to(torch.float32),
    "captured": lambda: captured().to(torch.float32),
    "parameter groups": lambda: mlp(
        optimizer=AdamW(lr=1e-2, eps_root=1e-4, param_groups=[{"params": "*.bias", "weight_decay": 0.0}])
    ).to(torch.float32),
    "matrices": lambda: mlp(optimizer=Muon()).to(torch.float32),
    "a torch update": lambda: mlp(optimizer=RMSprop(eps_root=1e-4)).to(torch.float32),
    "two objectives": lambda: mlp(objective=several).to(torch.float32),
    "replays on a small budget": lambda: mlp(budget=mgd.Budget(host="40kB")).to(torch.float32),
}


def told(call: Any) -> tuple[str, str]:
    """The error of a call, and that it came from `mgd.errors`."""
    try:
        call()
    except Exception as error:
        assert type(error).__name__ in errors.__all__, error
        return type(error).__name__, str(error)
    return "none", ""


class Interrupted:
    """Batches whose `stop`-th access raises, or does something else; counts accesses."""

    def __init__(self, batches: list[Any], stop: int, act: Any):
        self.batches, self.stop, self.act, self.count = batches, stop, act, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, t: int) -> Any:
        self.count += 1
        if self.count == self.stop:
            self.act()
        return self.batches[t]


def interrupt() -> None:
    raise KeyboardInterrupt
