"""The last step is reversed where the training reaches it: no mode computes it twice, and the bits stay the same."""

from __future__ import annotations

import pytest
import torch
from cases import initial, mlp, supervised
from counting import STEPS, counted
from interruptions import T, same, training

from mgd import Budget
from mgd.plan import training as planning

# Schedule, and room for so many snapshots and gradients.
ROOMS = {
    "one snapshot": ("revolve", 1, 0),
    "revolve": ("revolve", 3, 0),
    "every state": ("all", STEPS - 1, 0),
    "segments": ("auto", 2, 3),
    "log": ("log", 1, STEPS - 1),
}


def performed(f, z, **options):
    """The metagradient, if it did exactly what its plan said."""
    result = f.metagradient(z, **options)
    report = result.report
    assert report.counts["model steps"] == report.plan["model_steps"]
    assert report.counts.get("rebuilt steps", 0) == report.plan["update_steps"]
    return result


def in_room(made, name: str, directory=None):
    """The training within one of ROOMS, in memory or in a directory."""
    schedule, snapshots, gradients = ROOMS[name]

    def budget(size: int) -> Budget:
        return Budget(host=size) if directory is None else Budget(disk=(directory, size))

    sizes = made.function(budget=budget(1 << 30)).plan().sizes
    return made.function(schedule=schedule, budget=budget(snapshots * sizes.snapshot + gradients * sizes.gradient))


def two_objectives(model):
    total = sum(p.square().sum() for p in model.parameters())
    return torch.stack([total, total.sin()])


@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("objective", [None, two_objectives], ids=["one", "two"])
@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("room", ROOMS)
def test_steps_are_those_planned(tmp_path, room, tier, objective, microbatches):
    made, counter = counted(microbatches=microbatches)
    made = made.but({"init": initial(made.model)}, objective=objective or made.objective)
    f = in_room(made, room, tmp_path if tier == "disk" else None)
    layout = f.plan().layout
    assert (layout.segments == 1, layout.length == 1) == (room == "log", room not in ("log", "segments"))
    result = performed(f, made.z)
    assert counter.calls.count(STEPS - 1) == 2 * microbatches, "once to train, once for the second derivatives"
    assert same(result, made.metagradient(schedule="log"))


@pytest.mark.parametrize("room", ["one snapshot", "log"])
def test_captured_steps(room):
    made = supervised(mlp(), (5,), STEPS, trace=True)
    assert same(performed(in_room(made, room), made.z), made.metagradient(schedule="log"))


@pytest.mark.parametrize("room", ["revolve", "log"])
def test_a_sweep_that_stops_early(room):
    """Step 4 is the first that reads a metaparameter, and the plan knows."""

    def loss(model, batch, z):
        scale = z["temperature"] if batch[3] >= 4 else 1.0
        return torch.nn.functional.cross_entropy(scale * model(batch[0]), batch[1])

    made, _ = counted(loss)
    made.z = {"temperature": torch.tensor(1.2, dtype=torch.float64)}
    expected = made.metagradient(schedule="log")
    f = in_room(made.but(since=STEPS - 4), room)
    assert f.plan().stop_at == 4
    assert same(performed(f, made.z), expected)


def test_a_single_step_keeps_nothing():
    f, z = training(steps=1, budget=Budget(host=0))
    assert same(performed(f, z), f.replaced(budget=None).metagradient(z))


@pytest.mark.parametrize("schedule", ["log", "revolve"])
def test_resumable_runs_do_what_is_planned(tmp_path, schedule):
    f, z = training(schedule=schedule)
    assert same(performed(f, z, resume=tmp_path), f.metagradient(z))


@pytest.mark.parametrize("n", [T, T + 1, T + 2])
def test_an_interruption_between_the_last_step_and_its_reversal(tmp_path, monkeypatch, interrupt, n):
    """With a checkpoint after each step: the last is trained anew, since only its state is in the checkpoint."""
    monkeypatch.setattr(planning, "CHECKPOINT_EVERY", 1)
    f, z = training(schedule="log")
    assert interrupt(lambda: f.metagradient(z, resume=tmp_path), n)[0] is None
    result, rest = interrupt(lambda: f.metagradient(z, resume=tmp_path), None)
    assert rest == {T: T + 1, T + 1: T + 1, T + 2: T - 1}[n]
    assert same(result, f.metagradient(z))


def test_an_objective_that_fails_once(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "CHECKPOINT_EVERY", 1)
    f, z = training(schedule="revolve")
    objective, failing = f.objective, True

    def fails_once(model):
        nonlocal failing
        if failing:
            failing = False
            raise KeyboardInterrupt
        return objective(model)

    g = f.replaced(objective=fails_once)
    with pytest.raises(KeyboardInterrupt):
        g.metagradient(z, resume=tmp_path)
    assert same(g.metagradient(z, resume=tmp_path), f.metagradient(z))
