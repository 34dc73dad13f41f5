"""What a training and a metagradient give back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mgd.report import Report


@dataclass
class Trained:
    """The end of a training: parameters and buffers by name, and optimizer state, slot -> name -> tensor."""

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    optimizer_state: dict[str, Any]
    losses: Tensor

    @property
    def model_state(self) -> dict[str, Tensor]:
        """For `model.load_state_dict(..., strict=False)`."""
        return {**self.parameters, **self.buffers}


@dataclass
class Metagradient:
    """value: `[]` or `[k]`. grads: the keys and shapes of z, `[k, ...]` for k objectives. model_state: the trained
    model's parameters and buffers. losses: float64 `[T]`, each step's. report: what it cost.
    optimizer_state: of the trained model, as in `Trained`, where the training was given that of its beginning."""

    value: Tensor
    grads: dict[str, Any]
    model_state: dict[str, Tensor]
    losses: Tensor
    report: Report
    optimizer_state: dict[str, Any] | None = None
