"""The default: by autograd until a capture pays, with the same bits before and after."""

from __future__ import annotations

import gc
import random
import time
import weakref
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from cases import mlp, supervised
from same_bits import cases, same

import mgd
from mgd.autodiff import payoff
from mgd.autodiff.capture import evaluator_for
from mgd.autodiff.payoff import FIRST, SAVED, Payoff
from mgd.step.evaluator import Evaluation


class Clock:
    """Evaluations that take stated seconds."""

    def __init__(self, monkeypatch, nodes: int, per_node: float):
        self.now, self.residuals = 0.0, None
        self.known: set[int] = set()  # kinds that were captured
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(payoff, "_rate", payoff.Rate(per_node))
        monkeypatch.setattr(payoff, "graph_of", lambda loss: range(nodes))
        monkeypatch.setattr(payoff, "_bytes", lambda node: 0)

    def train(
        self, chosen: Payoff, steps: int, gradient: float = 1.0, second: float = 2.0, kinds: int = 1, room: int = 0
    ) -> int:
        """One metagradient; steps cycle through `kinds` shapes. Returns the number of steps that were captured."""
        chosen.begin(steps, room)
        captured = [t for t in range(steps) if self._captured(chosen, t % kinds, gradient)]
        for t in set(range(steps)) - set(captured):
            chosen.second(t % kinds, lambda: self._pass(second))
        return len(captured)

    def _captured(self, chosen: Payoff, kind: int, seconds: float) -> bool:
        if kind in self.known or chosen.pays(kind):
            self.known.add(kind)
            return True
        chosen.gradient(kind, lambda look: self._evaluation(look, seconds))
        return False

    def _evaluation(self, look, seconds: float) -> Evaluation:
        if look:
            look(torch.ones(()))
        self._pass(seconds)
        return Evaluation(torch.ones(()), [], {}, residuals=self.residuals)

    def _pass(self, seconds: float) -> None:
        self.now += seconds


def test_a_long_training_is_captured_as_soon_as_its_steps_are_measured(monkeypatch):
    clock, chosen = Clock(monkeypatch, nodes=100, per_node=1.0), Payoff()
    assert clock.train(chosen, steps=1000) == 1000 - FIRST


def test_a_short_one_is_captured_when_it_would_have_paid(monkeypatch):
    """Ski rental: what a graph would have saved, with what it saves in this training, exceeds its cost."""
    clock, chosen = Clock(monkeypatch, nodes=100, per_node=1.0), Payoff()
    calls = 1
    while not clock.train(chosen, steps=10):
        calls += 1
    paid = calls * 10 * SAVED * 3.0
    assert 1.0 < paid / (payoff.CAUTION * 100) < 1.2


def test_without_room_for_residuals_a_graph_saves_less(monkeypatch):
    clock, chosen = Clock(monkeypatch, nodes=100, per_node=1.0), Payoff()
    monkeypatch.setattr(payoff, "_bytes", lambda node: 10)
    steps = round(2 * payoff.CAUTION * 100 / (SAVED * 3.0))
    assert not clock.train(chosen, steps, room=0)
    assert clock.train(Payoff(), steps, room=1000 * steps)


def test_where_autograd_keeps_graphs_a_capture_saves_less(monkeypatch):
    clock, chosen = Clock(monkeypatch, nodes=100, per_node=1.0), Payoff()
    clock.residuals = object()
    steps = round(1.2 * payoff.CAUTION * 100 / (SAVED * 3.0))
    assert not clock.train(chosen, steps)
    calls = 2
    while not clock.train(chosen, steps):
        calls += 1
    assert 0.9 < calls * steps * payoff.SAVED_OF_KEPT * 3.0 / (payoff.CAUTION * 100) < 2


@pytest.mark.parametrize(("seconds", "prefers"), [(0.8, True), (0.97, False), (1.2, False)])
def test_where_autograd_was_faster_it_goes_on(seconds, prefers, monkeypatch):
    """Whose graphs are kept, and as long as they are."""
    clock, chosen = Clock(monkeypatch, nodes=1, per_node=1.0), Payoff()
    chosen.begin(9, 0)
    assert not chosen.pays(0) and not chosen.prefers_autograd(0)
    clock.residuals = object()
    chosen.gradient(0, lambda look: clock._evaluation(look, seconds))
    chosen.second(0, lambda: clock._pass(2 * seconds), kept=True)
    assert not chosen.prefers_autograd(0)
    for _ in range(20):
        chosen.by_graph(0, 0, lambda: clock._pass(1.0))
        chosen.by_graph(0, 1, lambda: clock._pass(2.0))
    assert chosen.prefers_autograd(0) == chosen.preferred == prefers
    clock.residuals = None
    chosen.gradient(0, lambda look: clock._evaluation(look, seconds))
    assert not chosen.prefers_autograd(0)


def test_a_step_with_a_graph_that_goes_by_autograd_has_its_bits(monkeypatch):
    monkeypatch.setattr(payoff, "CAUTION", 0.0)
    for name in ("convnet", "gpt"):
        case = cases()[name].to(torch.float32)
        f = case.function()
        expected = f.metagradient(case.z)
        assert expected.report.execution == "captured", name
        monkeypatch.setattr(payoff, "FASTER", 1e9)
        found = f.metagradient(case.z)
        monkeypatch.undo()
        monkeypatch.setattr(payoff, "CAUTION", 0.0)
        assert found.report.execution == "captured; by autograd where that is faster", name
        assert same(found, expected), name


def test_trainings_without_a_way_back_promise_nothing(monkeypatch):
    clock, chosen = Clock(monkeypatch, nodes=1, per_node=0.1), Payoff()
    chosen.begin(0, 0)
    assert not any(clock._captured(chosen, 0, 1.0) for _ in range(1000))


@pytest.mark.parametrize("seed", range(20))
def test_no_number_of_calls_costs_much_more_than_the_better_way(seed, monkeypatch):
    draw = random.Random(seed)
    nodes, steps, kinds = draw.randint(1, 500), draw.randint(3, 60), draw.choice([1, 1, 2, 7])
    clock, chosen = Clock(monkeypatch, nodes, per_node=1.0), Payoff()
    total = 0.0
    for calls in range(1, 200):
        known = len(clock.known)
        captured = clock.train(chosen, steps, kinds=kinds)
        total += 3.0 * (steps - captured) + 3.0 * (1 - SAVED) * captured + nodes * (len(clock.known) - known)
        eager = 3.0 * steps * calls
        at_once = 3.0 * (1 - SAVED) * steps * calls + nodes * min(kinds, steps)
        assert total <= 1.35 * min(eager, at_once) + 3.0 * FIRST * kinds


def test_the_default_changes_over_without_changing_a_bit(monkeypatch):
    monkeypatch.setattr(payoff, "CAUTION", 0.0)
    for name, case in cases().items():
        case = case.to(torch.float32)
        f = case.function()
        default, eager = f.metagradient(case.z), case.metagradient(trace=False)
        assert default.report.execution == "captured", name
        assert 0 < default.report.seconds["capture"] and "capture" not in f.metagradient(case.z).report.seconds
        assert same(default, eager), name
        assert same(f.metagradient(case.z), eager), name


def test_what_rounds_differently_is_captured_only_where_that_was_asked_for(monkeypatch):
    monkeypatch.setattr(payoff, "CAUTION", 0.0)
    monkeypatch.setattr(mgd.autodiff.derived, "same_bits", lambda *_: False)
    with pytest.warns(RuntimeWarning, match="rounds differently"):
        report = supervised(mlp(), (5,)).metagradient().report
    assert report.execution.startswith("eager, since capture was given up")
    assert supervised(mlp(), (5,)).metagradient(trace=True).report.execution == "captured"


def test_the_report_says_why_nothing_was_captured():
    report = supervised(mlp(), (5,)).metagradient().report
    assert "a capture would take about" in report.execution and "capture" not in report.seconds


def test_trainings_of_one_model_and_loss_share_their_graphs():
    case = supervised(mlp(), (5,))
    first = case.metagradient(trace=True)
    again = case.but(batches=case.batches[:2]).function(trace=True)
    z = case.z | {"lr": case.z["lr"][:2]}
    assert "capture" in first.report.seconds and "capture" not in again.metagradient(z).report.seconds
    other = case.but(loss=lambda model, batch, z: case.loss(model, batch, z))
    assert "capture" in other.metagradient(trace=True).report.seconds


def test_sharing_keeps_nothing_alive():
    case = supervised(mlp(), (5,))
    case = case.but(loss=lambda model, batch, z: F.cross_entropy(model(batch[0]), batch[1]), per_example={})
    case.z = {"lr": case.z["lr"]}
    case.metagradient(trace=True)
    model, loss = weakref.ref(case.model), weakref.ref(case.loss)
    del case
    gc.collect()
    assert model() is None and loss() is None


def test_methods_and_objects_without_weak_references_or_hashes_are_losses():
    class Trainer:
        def loss(self, model, batch, z):
            return model(batch).sum()

    class Slotted:
        __slots__ = ()

        def __call__(self, model, batch, z):
            return model(batch).sum()

    @dataclass
    class Settings:  # comparable by value, and so not hashable
        scale: float = 1.0

        def __call__(self, model, batch, z):
            return self.scale * model(batch).sum()

        loss = __call__

    model, trainer, settings = torch.nn.Linear(2, 1), Trainer(), Settings()
    assert evaluator_for(model, trainer.loss, None) is evaluator_for(model, trainer.loss, None)
    assert evaluator_for(model, Slotted(), None) is not evaluator_for(model, Slotted(), None)
    assert evaluator_for(model, settings, None) is evaluator_for(model, settings, None)
    assert evaluator_for(model, settings.loss, None) is evaluator_for(model, settings.loss, None)
    other = Settings()
    assert evaluator_for(model, settings, None) is not evaluator_for(model, other, None)
