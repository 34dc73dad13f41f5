"""What a benchmark measures: a workload of the package, or a user's own training function."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mgd import TrainingFunction
from mgd.bench.workloads import WORKLOADS
from mgd.errors import BadArgument


@dataclass
class Case:
    """source, device: what `load` was given. objectives: makes an objective of k components, where one is known.
    held_out: the batch of a workload's objective."""

    source: str
    function: TrainingFunction
    z: dict[str, Any]
    device: str = "cpu"
    objectives: Callable[[int], Callable[..., Tensor]] | None = None
    note: str = ""
    held_out: Any = None

    def __len__(self) -> int:
        return len(self.function)

    def shortened(self, steps: int) -> Case:
        """The same training ended after `steps` steps: fewer batches, and the head of every schedule in `z`."""
        function, total = self.function, len(self.function)
        if steps >= total:
            return self
        names = {*function.optimizer.hyper_names}
        z = {
            key: value[:steps]
            if key in names and isinstance(value, Tensor) and value.ndim and len(value) == total
            else value
            for key, value in self.z.items()
        }
        batches = [function.batches[t] for t in range(steps)]
        return replace(self, function=function.replaced(batches=batches), z=z)


def load(source: str, steps: int | None = None, device: str = "cpu") -> Case:
    """A workload by name, or `SCRIPT.py:FUNCTION`, where FUNCTION returns `(TrainingFunction, z)`.

    steps: of a workload, the length of its training; a script's training is shortened to it.
    """
    if ":" in source:
        case = _script(source)
        return case if steps is None else case.shortened(steps)
    if source not in WORKLOADS:
        raise BadArgument(f"expected a workload among {', '.join(WORKLOADS)}, or SCRIPT.py:FUNCTION; got {source!r}")
    workload = WORKLOADS[source](**({} if steps is None else {"steps": steps})).to(device)
    return Case(
        source, workload.function(), workload.z(), device, workload.objectives, workload.note, workload.held_out
    )


def _script(source: str) -> Case:
    path, _, name = source.rpartition(":")
    file = Path(path).resolve()
    if not file.is_file():
        raise BadArgument(f"expected SCRIPT.py:FUNCTION; there is no file {path!r}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise BadArgument(f"expected a Python file ending in .py; got {path!r}")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent))  # as for a script: its neighbours can be imported
    sys.modules[file.stem] = module
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent))
    build = getattr(module, name, None)
    if not callable(build):
        raise BadArgument(f"expected {path} to define a function {name!r} that returns (TrainingFunction, z)")
    made = build()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], TrainingFunction)):
        raise BadArgument(f"expected {name}() to return (TrainingFunction, z); got {type(made).__name__}")
    function, z = made
    device = next((str(p.device) for p in function.model.parameters()), "cpu")
    return Case(f"{file}:{name}", function, dict(z), device)
