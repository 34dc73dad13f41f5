"""Disks that fill up or fail in the middle of either sweep, and directories that cannot be used."""

from __future__ import annotations

import errno
import random
import shutil
import time

import pytest
from interruptions import CHECKPOINT_EVERY, T, same, training
from watched import Watched

from mgd import Budget
from mgd.errors import BudgetTooSmall, CorruptState, KernelError, StaleRun, StoreIOError, UnknownFormat
from mgd.step.step import StepFunction
from mgd.util.progress import Progress
from mgd_kernels import _core

ALWAYS = 1 << 40


@pytest.fixture(autouse=True)
def no_fault_left_armed():
    yield
    _core.store_inject("none")


@pytest.fixture
def fault(monkeypatch):
    """Arms a fault of the disk at the n-th evaluation of a step, of the reverse sweep or of the first; counts them."""

    def arm(kind: str, n: int, reverse: bool, times: int = ALWAYS) -> dict[str, int]:
        counts = {"gradient": 0, "second_derivatives": 0}

        def counted(name: str):
            original = getattr(StepFunction, name)

            def method(*args, **kwargs):
                counts[name] += 1
                armed = reverse == (name == "second_derivatives")
                if armed and counts[name] == n:
                    _core.store_inject(kind, 1, times)
                if armed and counts[name] >= n:
                    time.sleep(0.002)  # as if the step took some time
                return original(*args, **kwargs)

            monkeypatch.setattr(StepFunction, name, method)

        counted("gradient")
        counted("second_derivatives")
        return counts

    yield arm
    monkeypatch.undo()


class Case:
    """What `Watched` looks at."""

    def __init__(self, f, z):
        self.model, self.z = f.model, z


# Kind, the sweep it strikes, the schedule (those without a log write in the reverse sweep, too), errno.
FAULTS = [
    ("no_space", False, "log", errno.ENOSPC),
    ("write_error", False, "log", errno.EIO),
    ("zero_write", False, "all", errno.EIO),
    ("rename_error", False, "log", errno.EIO),
    ("read_error", True, "log", errno.EIO),
    ("read_error", True, "revolve", errno.EIO),
    ("no_space", True, "revolve", errno.ENOSPC),
    ("write_error", True, "revolve", errno.EIO),
]


def room(f, schedule: str, tmp_path) -> Budget:
    """So little that a schedule without a log must drop and save again in the reverse sweep."""
    snapshot = f.replaced(budget=Budget(disk=(tmp_path, "1MB"))).plan().sizes.snapshot
    return Budget(disk=(tmp_path / "log", 5 * snapshot if schedule == "revolve" else "1MB"))


@pytest.mark.parametrize("kind, reverse, schedule, number", FAULTS)
def test_a_scratch_disk_that_fails(tmp_path, fault, kind, reverse, schedule, number):
    f, z = training(schedule=schedule, trace=False)
    f = f.replaced(budget=room(f, schedule, tmp_path))
    reference, watched = f.metagradient(z), Watched(Case(f, z))
    counts = fault(kind, 6, reverse)
    with pytest.raises(StoreIOError, match=r"the (gradient|snapshot) of step \d+: ") as told:
        f.metagradient(z)
    error = told.value
    assert error.errno == number and f"step {error.step}:" in str(error) and error.key[1] == error.step
    if reverse:
        assert counts["gradient"] >= T and counts["second_derivatives"] < T - 1
        assert error.step <= T - 6
    else:
        assert counts["gradient"] < T, "the training does not go on for a log that cannot be written"
        assert error.step <= counts["gradient"]
    watched.check()
    assert list((tmp_path / "log").iterdir()) == [], "the scratch directory is gone"
    _core.store_inject("none")
    assert same(f.metagradient(z), reference)


@pytest.mark.parametrize("kind, reverse, schedule, number", FAULTS)
def test_a_resumable_run_continues_when_the_fault_is_gone(tmp_path, fault, often, kind, reverse, schedule, number):
    f, z = training(schedule=schedule, trace=False)
    reference, watched = f.metagradient(z), Watched(Case(f, z))
    disk = "1MB"
    if schedule == "revolve":
        with pytest.raises(BudgetTooSmall) as refused:
            f.replaced(budget=Budget(disk=(tmp_path, 1))).metagradient(z, resume=tmp_path / "run")
        disk = refused.value.needs["disk"] + 4 * 12288
    f = f.replaced(budget=Budget(disk=(tmp_path, disk)))
    counts = fault(kind, 6, reverse)
    with pytest.raises(StoreIOError) as told:
        f.metagradient(z, resume=tmp_path / "run")
    assert told.value.errno == number and str(tmp_path / "run") in str(told.value)
    watched.check()
    with pytest.raises(StoreIOError):  # it is let go of: the second call meets the fault, not StoreBusy
        f.metagradient(z, resume=tmp_path / "run")
    _core.store_inject("none")
    before = counts["gradient"]
    assert same(f.metagradient(z, resume=tmp_path / "run"), reference)
    if reverse and schedule == "log":
        assert counts["gradient"] == before, "it did not begin again"
    watched.check()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", ["short_read", "short_write", "interrupted", "refuse_direct"])
def test_faults_that_are_recovered(tmp_path, fault, kind, reverse):
    f, z = training(trace=False)
    f = f.replaced(budget=room(f, "log", tmp_path), schedule="log")
    reference = f.metagradient(z)
    fault(kind, 6, reverse, times=7)
    assert same(f.metagradient(z), reference)


def test_an_interruption_is_heard_of_although_the_disk_failed_as_well(tmp_path, fault, interrupt):
    """Closing the store tells of the failed write, and must not hide what ended the run."""
    f, z = training(trace=False)
    _core.store_inject("write_error", 12, ALWAYS)
    result, evaluations = interrupt(lambda: f.metagradient(z, resume=tmp_path / "run"), 2)
    assert result is None and evaluations == 2
    _core.store_inject("none")
    assert same(f.metagradient(z, resume=tmp_path / "run"), f.metagradient(z))


# --- directories


def begun(directory, interrupt, n: int):
    f, z = training(trace=False)
    interrupt(lambda: f.metagradient(z, resume=directory), n)
    return f, z


@pytest.mark.parametrize("n", [pytest.param(T - 2, marks=pytest.mark.slow), T + 9])
def test_any_file_cut_short_or_gone(tmp_path, often, interrupt, n):
    """A clear error or the right number, for every kind of file: at a random length, empty, and removed."""
    f, z = begun(tmp_path / "run", interrupt, n)
    reference, rng = f.metagradient(z), random.Random(n)
    outcomes = {"recovered": 0, "refused": 0}
    names = {path.name for path in (tmp_path / "run").iterdir()}
    others = {name for name in names if not name.startswith("step-")}
    assert others >= {"LOCK", "MGD_STORE", "text-run.mgd", "text-checkpoint.mgd"}
    steps = sorted(names - others)
    first = {name for name in steps if name.startswith("step-0-") or name == "step-27-gradient.mgd"}
    for name in sorted(others | first | set(rng.sample(steps, 6))):
        for damage in ("short", "empty", "gone"):
            shutil.rmtree(tmp_path / "copy", ignore_errors=True)
            shutil.copytree(tmp_path / "run", tmp_path / "copy")
            path = tmp_path / "copy" / name
            content = path.read_bytes()
            path.unlink()
            if damage != "gone":
                path.write_bytes(content[: rng.randrange(len(content)) if damage == "short" and content else 0])
            try:
                result = f.metagradient(z, resume=tmp_path / "copy")
            except (CorruptState, UnknownFormat) as error:
                assert str(path.parent) in str(error)
                if isinstance(error, CorruptState):
                    assert "delete the directory, and start again" in str(error)
                outcomes["refused"] += 1
                with pytest.raises(type(error)):  # not StoreBusy: the failed call let go of it
                    f.metagradient(z, resume=tmp_path / "copy")
            else:
                assert same(result, reference), (name, damage)
                outcomes["recovered"] += 1
    assert min(outcomes.values()) > 5, outcomes


def test_directories_of_other_versions(tmp_path, often, interrupt, monkeypatch):
    f, z = begun(tmp_path / "run", interrupt, T + 3)
    marker = tmp_path / "run" / "MGD_STORE"
    text = marker.read_text()
    marker.write_text(text.replace("format 2", "format 3"))
    with pytest.raises(UnknownFormat, match="not that of a store of format 2"):
        f.metagradient(z, resume=tmp_path / "run")
    marker.write_text(text)
    with monkeypatch.context() as patch:
        patch.setattr("mgd.identity.version", lambda _: "99.0")  # its plans may differ
        with pytest.raises(StaleRun, match="the version of mgd"):
            f.metagradient(z, resume=tmp_path / "run")
    assert same(f.metagradient(z, resume=tmp_path / "run"), f.metagradient(z))


@pytest.mark.parametrize(
    "what, resume",
    [(what, resume) for what in ("file", "below a file", "read-only") for resume in (False, True)] + [("theirs", True)],
)
def test_places_that_cannot_be_used(tmp_path, interrupt, what, resume):
    """An error before the first step."""
    f, z = training(trace=False)
    path, text = tmp_path / "place", "directory"
    if what == "read-only":  # as told by the system: the tests may run as root, who may write anywhere
        _core.store_inject("open_read_only", 1, ALWAYS)
        text = "Read-only file system"
    elif what == "theirs":
        path.mkdir()
        (path / "thesis.tex").write_text("theirs")
        text = "not empty"
    else:
        path.write_text("theirs")
        path = path / "below" if what == "below a file" else path
    g = f if resume else f.replaced(budget=Budget(disk=(path, "1MB")))

    def run():
        with pytest.raises((StoreIOError, UnknownFormat), match=text) as told:
            g.metagradient(z, resume=path if resume else None)
        assert str(path) in str(told.value) and isinstance(told.value, KernelError)

    _, evaluations = interrupt(run, None)
    assert evaluations == 0
    kept = [p.read_text() for p in tmp_path.rglob("*") if p.is_file()]
    assert kept == (["theirs"] if what != "read-only" else kept)


def test_a_failed_backward_leaves_nothing(tmp_path, fault):
    """The differentiable call keeps its log until backward."""
    f, z = training(trace=False)
    f = f.replaced(budget=room(f, "log", tmp_path), schedule="log")
    z = z | {"lr": z["lr"].clone().requires_grad_()}
    value = f(z)
    (scratch,) = (tmp_path / "log").iterdir()
    assert any(scratch.iterdir())
    fault("read_error", 6, True)
    with pytest.raises(StoreIOError, match=r"the (gradient|snapshot) of step \d+: read of"):
        value.backward()
    assert list((tmp_path / "log").iterdir()) == [] and z["lr"].grad is None


# --- the progress bar


@pytest.mark.parametrize("n", [T - 2, T + 2 * CHECKPOINT_EVERY + 1])
def test_the_progress_bar_begins_where_the_run_continues(tmp_path, often, interrupt, monkeypatch, n):
    f, z = begun(tmp_path, interrupt, n)
    ticks: list[tuple[str, int]] = []
    monkeypatch.setattr(Progress, "tick", lambda self, phase, steps=1: ticks.append((phase, steps)))
    f.metagradient(z, resume=tmp_path)
    done = {phase: [steps for p, steps in ticks if p == phase] for phase in ("train", "reverse")}
    assert sum(done["train"]) == T and sum(done["reverse"]) == T
    if n < T:
        assert done["train"][0] == (n - 1) // CHECKPOINT_EVERY * CHECKPOINT_EVERY and set(done["reverse"]) == {1}
    else:
        assert done["train"] == [T]
        assert done["reverse"][0] >= CHECKPOINT_EVERY and set(done["reverse"][1:]) == {1}
