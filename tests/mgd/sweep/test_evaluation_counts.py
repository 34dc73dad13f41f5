"""How often the model is called: T times for the training, once a step for the second derivatives, and no more.

By autograd it is not called again where the graph of the step's gradient was kept.
"""

import pytest
import torch
import torch.nn.functional as F
from cases import assert_exact, initial
from counting import STEPS, counted

from mgd.autodiff.kept_graph import KeptGraphs


@pytest.fixture
def no_graphs(monkeypatch):
    """None is kept."""
    monkeypatch.setattr(KeptGraphs, "pays", lambda self, held: False)


def test_kept_graphs_leave_two_steps_to_evaluate_again():
    """The first one, which was measured, unless another training of the function did that; and the last one, which
    shows whether steps repeat themselves."""
    made, counter = counted()
    made = made.but({"init": initial(made.model)})
    f = made.function(schedule="log")
    assert f.metagradient(made.z).report.counts["hvps"] == STEPS
    assert counter.calls == [*range(STEPS), STEPS - 1, 0]
    counter.calls.clear()
    f.metagradient(made.z)
    assert counter.calls == [*range(STEPS), STEPS - 1]


def test_a_full_log_evaluates_the_model_once_a_step(no_graphs):
    made, counter = counted()
    report = made.but({"init": initial(made.model)}).metagradient(schedule="log").report
    assert report.counts["model steps"] == STEPS and report.counts["hvps"] == STEPS
    assert counter.calls == [*range(STEPS), *reversed(range(STEPS))]


def test_hyperparameters_alone_need_no_second_derivative_at_step_0(no_graphs):
    made, counter = counted()
    report = made.metagradient(schedule="log").report
    assert report.counts["hvps"] == STEPS - 1
    assert counter.calls == [*range(STEPS), *reversed(range(1, STEPS))]


@pytest.mark.parametrize("count", [2, 3])
def test_microbatches_are_evaluated_once_each(count, no_graphs):
    made, counter = counted(microbatches=count)
    made.metagradient(schedule="log")
    assert len(counter.calls) == count * (STEPS + STEPS - 1)


def test_a_training_without_gradient():
    made, counter = counted()
    made.function().train(made.z)
    assert counter.calls == list(range(STEPS))


def late(start):
    """The loss reads z["temperature"] from step `start` on."""

    def loss(model, batch, z):
        logits = model(batch[0])
        if batch[3] >= start:
            logits = z["temperature"] * logits
        return F.cross_entropy(logits, batch[1])

    return loss


@pytest.mark.parametrize("start", [1, 4, STEPS - 1])
def test_the_sweep_ends_where_the_first_metaparameter_enters(start, no_graphs):
    made, counter = counted(late(start))
    made.z = {"temperature": torch.tensor(1.2, dtype=torch.float64)}
    report = made.metagradient(schedule="log").report
    assert report.counts["hvps"] == STEPS - start
    assert counter.calls == [*range(STEPS), *reversed(range(start, STEPS))]
    assert_exact(made)


def test_a_late_metaparameter_beside_a_schedule(no_graphs):
    """The learning rates need the whole sweep, but no second derivative at step 0, which reads nothing else."""
    made, counter = counted(late(4))
    made = made.but({"temperature": torch.tensor(1.2, dtype=torch.float64)})
    assert made.metagradient(schedule="log").report.counts["hvps"] == STEPS - 1
    assert counter.calls == [*range(STEPS), *reversed(range(1, STEPS))]
    assert_exact(made)


def test_a_second_key_that_enters_earlier():
    def loss(model, batch, z):
        scale = z["temperature"] if batch[3] >= 6 else 1.0
        shift = z["shift"] if batch[3] >= 3 else 0.0
        return F.cross_entropy(scale * model(batch[0]) + shift, batch[1])

    made, _ = counted(loss)
    made.z = {
        "temperature": torch.tensor(1.2, dtype=torch.float64),
        "shift": torch.tensor([0.1, -0.2, 0.0], dtype=torch.float64),
    }
    assert made.metagradient(schedule="log").report.counts["hvps"] == STEPS - 3
    assert_exact(made)
