"""`mgd bench gpu`: a GPU from its first number to the throughput table, in one command of under ten minutes.

Correctness first: nothing is timed on a device that gives wrong numbers, or other ones each time. Then the kernels
against copies, metagradients against plain training, what the host does per step, how busy second derivatives keep the
device, and what deterministic algorithms cost. The list of GPUs that were tested is extended by this command alone.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.utils.flop_counter import FlopCounterMode

from mgd.autodiff import device_graphs
from mgd.bench import kernels, overhead, shared, throughput, timing
from mgd.bench.cases import Case, load
from mgd.bench.kernel_cases import RULES, Problem
from mgd.bench.methods import differences, training
from mgd.check import in_double
from mgd.errors import BadArgument, KernelError, MetagradientError
from mgd.plan.budget import Budget
from mgd.results import Metagradient
from mgd.step.batches import to_dtype
from mgd.step.determinism import deterministic_on
from mgd.ui.options import Device, Json
from mgd.util.devices import checked_device

GATE = ("small", "convnet-batch", "gpt")  # workloads, a few steps of each
GATE_STEPS = 6
DOUBLE, SINGLE = 1e-9, 1e-3  # relative differences of metagradients from those of the CPU in float64
TABLE = ("mlp", "gpt", "convnet-group")
METHODS = ("unrolled", "eager", "captured", "objectives")
BEGIN, END = "<!-- GPUs tested: only `make bench-gpu` writes below -->", "<!-- GPUs tested: end -->"

Tick = Callable[[str], None]


def _quiet(_: str) -> None:
    pass


# --- the gate ------------------------------------------------------------------------------------------------------


def gate(device: str, tick: Tick = _quiet) -> list[dict[str, Any]]:
    """Every check that must hold before anything is timed: `{check, value, limit, holds}`."""
    checks = []
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # which rounds more coarsely than float32
            for name, value, limit in _checks(device, tick):
                checks.append({"check": name, "value": value, "limit": limit, "holds": value <= limit})
    except (MetagradientError, KernelError) as error:
        checks.append({"check": f"it ends by {error!r}", "value": 1.0, "limit": 0.0, "holds": False})
    return checks


def _checks(device: str, tick: Tick) -> Iterator[tuple[str, float, float]]:
    """Name, value and limit. A value of 0 or 1 says whether bits differ."""
    from mgd_kernels.dispatch import PREFERENCE
    from mgd_kernels.dispatch import load as backend

    for name in PREFERENCE.get(torch.device(device).type, ()):
        module = backend(name)[0]
        if module is None or name == "reference":
            continue
        for rule in RULES:
            tick(f"{name}, {rule}")
            for pass_, error in Problem(rule, module, kernels.CHECKED, device).errors().items():
                yield f"{name}, {rule}, {pass_}: error against float64", error, kernels.PRECISE
    for source in GATE:
        here, there = load(source, GATE_STEPS), load(source, GATE_STEPS, device)
        tick(f"{source}: float64")
        exact = _in_double(here)
        yield f"{source}: float64 against the CPU", _difference(_in_double(there), exact), DOUBLE
        expected = there.function.replaced(trace=False).metagradient(there.z)
        yield f"{source}: float32 against the CPU's float64", _difference(expected, exact), SINGLE
        with tempfile.TemporaryDirectory() as folder:
            small = _a_third(there)
            ways: dict[str, dict[str, Any]] = {
                "once more": {},
                "in little device memory": {"budget": Budget(device=small, host="4GB")},
                "through the host": {"budget": Budget(host="4GB")},
                "through the disk": {"budget": Budget(disk=(folder, "4GB"))},
            }
            for way, options in ways.items():
                tick(f"{source}: {way}")
                found = there.function.replaced(trace=False, **options).metagradient(there.z)
                yield f"{source}: other bits {way}", float(not _same(found, expected)), 0.0
            tick(f"{source}: resumable")
            found = there.function.replaced(trace=False).metagradient(there.z, resume=Path(folder) / "run")
            yield f"{source}: other bits of a resumable run", float(not _same(found, expected)), 0.0
        tick(f"{source}: captured")
        captured = there.function.replaced(trace=True)
        found = captured.metagradient(there.z)
        yield f"{source}: captured against the CPU's float64", _difference(found, exact), SINGLE
        tick(f"{source}: as device graphs")
        again = captured.metagradient(there.z)
        with device_graphs.switched(False):
            plain = captured.metagradient(there.z)
        other = not (_same(found, plain) and _same(again, plain))
        yield f"{source}: other bits as device graphs", float(other), 0.0


def _in_double(case: Case) -> Metagradient:
    return in_double(case.function).metagradient(to_dtype(dict(case.z), torch.float64))


def _a_third(case: Case) -> int:
    """Bytes with which a third of the training's log fits."""
    sizes = case.function.plan().sizes
    return 2 * sizes.snapshot + len(case) * sizes.gradient // 3


def _difference(found: Metagradient, exact: Metagradient) -> float:
    ours = {key: gradient.cpu() for key, gradient in found.grads.items()}
    return max(differences(ours, exact.grads).values())


def _same(x: Metagradient, y: Metagradient) -> bool:
    same = torch.equal(x.value, y.value) and torch.equal(x.losses, y.losses)
    return same and all(torch.equal(x.grads[key], y.grads[key]) for key in y.grads)


# --- what is timed -------------------------------------------------------------------------------------------------


def utilisation(case: Case, rounds: int = 3) -> dict[str, float]:
    """Floating-point operations of matrix products and convolutions per second: of plain training, of a metagradient,
    and the second in units of the first."""
    train = training(case)[0]
    rates = {}
    for name, run in (("training", train), ("metagradient", lambda: case.function.metagradient(case.z))):
        run()
        with FlopCounterMode(display=False) as counter:
            run()
        rates[name] = counter.get_total_flops() / timing.least(rounds, run, device=case.device)[0]
    return {**rates, "ratio": rates["metagradient"] / rates["training"]}


def determinism(case: Case, rounds: int = 5) -> dict[str, Any]:
    """Seconds of plain training with deterministic algorithms, and in units of those without them."""
    train, device = training(case)[0], torch.device(case.device)

    def repeatable() -> None:
        with deterministic_on(device):
            train()

    train()
    repeatable()
    plain, samples = timing.alternate(rounds, train, {"deterministic": repeatable}, case.device)
    return {"seconds": timing.quantiles(plain), **samples["deterministic"].summary()}


def host(device: str, steps: int = 512, rounds: int = 3) -> dict[str, dict[str, float]]:
    """Microseconds per step of a network so small that the host is what takes the time: of a training, of a
    metagradient, which makes two passes over it, and of the two parts of its captured graph; as device graphs, where
    the device has them, and launched one by one."""
    found: dict[str, dict[str, float]] = {}
    for way, on in (("device graphs", True), ("one by one", False)):
        with device_graphs.switched(on):
            function, z = overhead.smallest(steps, device=device)
            runs: dict[str, Callable[[], Any]] = {
                "training": functools.partial(function.train, z),
                "metagradient": functools.partial(function.metagradient, z),
            }
            for run in runs.values():
                run()
            runs |= overhead.parts_of(function, z)
            seconds = timing.least(rounds, *runs.values(), device=device)
            found[way] = {name: 1e6 * value / steps for name, value in zip(runs, seconds, strict=True)}
    return found


def measure(
    device: str,
    parameters: int = 32 << 20,
    rounds: int = 3,
    steps: int | None = None,
    table: tuple[str, ...] = TABLE,
    tick: Tick = _quiet,
) -> dict[str, Any]:
    """All times, in JSON's types. The gate has been passed."""
    found: dict[str, Any] = {"kernels": kernels.measure(parameters, device, rounds, None, tick=tick), "workloads": []}
    for source in table:
        measured = throughput.measure(source, METHODS, rounds, steps, device, None, False, tick)
        case = load(source, steps, device)
        tick(f"{source}: utilisation, determinism")
        measured |= {"flops_per_second": utilisation(case, rounds), "deterministic": determinism(case, rounds)}
        found["workloads"].append(measured)
    tick("host")
    return found | {"host_microseconds_per_step": host(device, steps or 512, rounds)}


# --- the list ------------------------------------------------------------------------------------------------------


def driver() -> str | None:
    """The version of NVIDIA's kernel module."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return None
    return next((word for word in words if word[:1].isdigit() and "." in word), None)


def enlist(page: Path, where: dict[str, Any], results: str) -> None:
    """Add a line to the list of GPUs that were tested. results: the file of its numbers."""
    text = page.read_text("utf-8")
    if BEGIN not in text or END not in text:
        raise BadArgument(f"expected a page with the lines {BEGIN!r} and {END!r}; {page} has none")
    versions = where["versions"]
    cells = [where["accelerators"][0], where["driver"], versions["torch"], versions.get("triton"), where["date"]]
    line = f"| {' | '.join(str(cell) for cell in cells)} | `{results}` |\n"
    page.write_text(text.replace(END, line + END), "utf-8")


def command(
    device: Device = "cuda",
    rounds: shared.Rounds = 3,
    json: Json = None,
    listed: Annotated[
        Path | None,
        typer.Option("--list", metavar="FILE", help="Enter the GPU in this list of those that were tested."),
    ] = None,
) -> None:
    """Check a GPU's numbers, and only then time kernels and metagradients on it."""
    if checked_device(device).type == "cpu":
        raise BadArgument("expected a GPU; `mgd bench throughput` and `mgd bench kernels` measure the CPU")
    if listed is not None and json is None:
        raise BadArgument("expected --json with --list, which names the file of the numbers")
    session, where = shared.begin("bench gpu", None, json)
    where |= {"driver": driver(), "device": device}
    start = time.perf_counter()
    with session.status() as tick:
        checks = gate(device, tick)
    failed = [check for check in checks if not check["holds"]]
    session.print(f"{len(checks) - len(failed)} of {len(checks)} checks hold")
    for check in failed:
        session.print(f"{check['check']}: {check['value']:.3g}, more than {check['limit']:g}", style="bold red")
    found: dict[str, Any] = {"machine": where, "gate": checks}
    if not failed:
        with session.status() as tick:
            found |= measure(device, rounds=rounds, tick=tick)
        session.table("Optimizer kernels", kernels.rows(found["kernels"]), kernels.CAPTION)
        for measured in found["workloads"]:
            throughput.display(session, measured)
        for way, columns in found["host_microseconds_per_step"].items():
            shown = ", ".join(f"{name} {value:.0f}" for name, value in columns.items())
            session.print(f"host, {way}: {shown} µs per step")
    session.write(None, found | {"seconds": time.perf_counter() - start})
    if failed or throughput.disagreeing(found["workloads"]):
        raise typer.Exit(1)
    if listed is not None:
        assert json is not None
        enlist(listed, where, json.name)
