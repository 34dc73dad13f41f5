"""Data selection: the surrogate's mathematics, the two updates of the counts, bad input, and the recipe on digits."""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn

import mgd
from mgd.errors import BadArgument, BadData, BadLoss, NonFiniteState
from mgd.recipes import data
from mgd.recipes.data import Images
from mgd.recipes.select import Exchange, SelectionProblem, draw, report, select
from mgd.recipes.select import run as recipe
from mgd.recipes.select.images import COPIES, KINDS, ImageSetting, Settings, make_pool
from mgd.recipes.select.problem import WEIGHTS
from mgd.recipes.select.setting import Setting
from mgd.ui.console import show
from mgd.ui.page import write
from mgd_kernels import SGD, AdamW

N, STEPS, B, AT = 12, 9, 4, 5


def problem(**changes) -> SelectionProblem:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(N, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(N, generator=generator, dtype=torch.float64)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    arguments = {
        "model": model,
        "pool": (x, y),
        "losses": lambda model, examples: (model(examples[0])[:, 0] - examples[1]).square(),
        "objective": lambda model: model(x[:5]).square().mean(),
        "optimizer": AdamW(lr=0.05, eps_root=1e-6),
        "steps": STEPS,
        "batch_size": B,
        "at": AT,
    }
    return SelectionProblem(**(arguments | changes))


# --- the surrogate ---------------------------------------------------------------------------------------------------


def test_the_metagradient_of_a_candidate_is_what_its_weight_at_that_step_does():
    """Against central differences of a training written out here, in which one candidate gets a weight."""
    p, counts, candidates = problem(), torch.tensor([1.0, 2, 0] * 4), torch.tensor([2, 4, 7, 8, 9, 11])
    found = p.metagradient(counts, candidates, seed=1).grads[WEIGHTS]
    order = draw(counts, STEPS, B, torch.Generator().manual_seed(1))
    x, y = p.pool

    class Batches:
        def __len__(self):
            return STEPS

        def __getitem__(self, t):
            return x[order[t]], y[order[t]], torch.tensor(t)

    def value(candidate: int, weight: float) -> float:
        def loss(model, batch, z):
            own = p.losses(model, batch).mean()
            if int(batch[2]) != AT:
                return own
            return own + weight * p.losses(model, (x[[candidate]], y[[candidate]])).sum() / B

        f = mgd.TrainingFunction(p.model, loss, Batches(), optimizer=p.optimizer, objective=p.objective)
        return float(f.value())

    h = 1e-5
    for i, candidate in enumerate(candidates.tolist()):
        difference = (value(candidate, h) - value(candidate, -h)) / (2 * h)
        assert float(found[i]) == pytest.approx(difference, rel=1e-5, abs=1e-9)


def test_candidates_leave_the_training_as_it_is_and_the_sweep_ends_at_their_step():
    p, counts = problem(), torch.ones(N)
    with_candidates = p.metagradient(counts, torch.arange(N), seed=2)
    trained = p.train(counts, seed=2)
    for name, value in trained.parameters.items():
        assert torch.allclose(with_candidates.model_state[name], value, rtol=1e-12, atol=0)
    assert with_candidates.report.counts["hvps"] == STEPS - AT


def test_a_schedule_that_is_fixed_trains_as_one_in_z_and_lets_the_sweep_end_early():
    rate = torch.linspace(0.1, 0.01, STEPS, dtype=torch.float64)
    p = problem(fixed={"lr": rate})
    p.prepare(torch.ones(N), 0, torch.arange(N))
    z = {WEIGHTS: torch.zeros(N)}
    fixed, free = p.function.metagradient(z), problem_free(p).metagradient(z | {"lr": rate})
    assert torch.equal(fixed.value, free.value)
    assert torch.equal(fixed.grads[WEIGHTS], free.grads[WEIGHTS])
    assert (fixed.report.counts["hvps"], free.report.counts["hvps"]) == (STEPS - AT, STEPS - 1)
    # What z says overrides what is fixed.
    assert torch.equal(p.function.value(z | {"lr": 0 * rate + 0.05}), problem_free(p).value(z))
    with pytest.raises(mgd.errors.BadMetaparameter, match="fixed hyperparameters of AdamW"):
        p.function.replaced(fixed={"learning_rate": rate}).value(z)
    with pytest.raises(mgd.errors.BadMetaparameter, match=r"fixed\['lr'\] of shape"):
        p.function.replaced(fixed={"lr": rate[:3]}).value(z)


def problem_free(p: SelectionProblem) -> mgd.TrainingFunction:
    return p.function.replaced(fixed=None)


def test_batches_hold_every_example_as_often_as_its_count_an_epoch():
    counts = torch.tensor([2.0, 0, 1, 3])
    order = draw(counts, 4, 3, torch.Generator().manual_seed(0)).reshape(2, 6)
    for epoch in order:
        assert torch.bincount(epoch, minlength=4).tolist() == [2, 0, 1, 3]
    assert not torch.equal(order[0], order[1])
    with pytest.raises(BadArgument, match="no example to train on"):
        draw(torch.zeros(4), 4, 3, torch.Generator())


# --- updates of the counts -------------------------------------------------------------------------------------------


def test_without_a_budget_counts_move_by_one_against_the_sign_of_the_metagradient():
    p, seen = problem(), []
    found = select(p, 4, share=0.5, highest=2, seed=1, observe=lambda *told: seen.append(told))
    moved = 0
    for (_, result, before), after in zip(seen, [c for *_, c in seen[1:]] + [found.last], strict=True):
        change, gradient = after - before, result.grads[WEIGHTS]
        assert bool((change * gradient.sign() <= 0).all()) and float(change.abs().max()) <= 1
        assert 0 <= float(after.min()) and float(after.max()) <= 2
        moved += int((change != 0).sum())
    assert 0 < moved < 4 * N  # some, and not all
    assert torch.equal(found.counts, found.counts.round())
    again = select(problem(), 4, share=0.5, highest=2, seed=1)
    assert torch.equal(again.last, found.last)


def test_exchange_swaps_the_worst_kept_for_the_best_left_out_and_keeps_the_sum():
    x = torch.tensor([1.0, 1, 1, 0, 0, 0], requires_grad=True)
    x.grad = torch.tensor([3.0, -2, 1, -4, 2, 0])  # the last was no candidate
    Exchange([x], share=1.0).step()
    # 0 goes for 3; the next pair would be 2 (1.0) for 4 (2.0), which is worse.
    assert x.tolist() == [0, 1, 1, 1, 0, 0]
    x.grad = torch.tensor([-1.0, -2, 1, -4, 2, 0])
    Exchange([x], share=1.0).step()
    assert x.tolist() == [1, 1, 0, 1, 0, 0]


def test_exchange_averages_over_steps_where_it_has_a_memory():
    x = torch.tensor([1.0, 0], requires_grad=True)
    outer = Exchange([x], share=1.0, memory=0.9)
    x.grad = torch.tensor([-1.0, 1])  # for what is kept, strongly
    outer.step()
    x.grad = torch.tensor([0.5, -0.5])  # scaled, as strongly against it, and it is newer
    outer.step()
    assert x.tolist() == [0, 1]
    x.grad = torch.tensor([-0.5, 0.5])
    outer.step()
    assert x.tolist() == [1, 0]


def test_a_budget_is_kept_and_only_candidates_of_the_shard_move():
    p, seen = problem(), []
    found = select(p, 6, budget=7, shard=5, share=1.0, seed=0, observe=lambda *told: seen.append(told))
    counts = [c for *_, c in seen] + [found.last]
    changes = [(b - a).abs() for a, b in itertools.pairwise(counts)]
    assert all(int(c.sum()) == 7 for c in counts)
    assert all(float(change.sum()) <= 5 for change in changes) and sum(float(c.sum()) for c in changes) > 0
    assert {len(result.grads[WEIGHTS]) for _, result, _ in seen} == {5}


def test_selection_lowers_its_objective():
    """The pool's targets are 5 for half of the examples and 0 for the others; the objective wants 0."""
    x = torch.ones(20, 1)
    y = torch.tensor([0.0, 5.0] * 10)
    p = SelectionProblem(
        nn.Linear(1, 1),
        (x, y),
        lambda model, e: (model(e[0])[:, 0] - e[1]).square(),
        lambda model: model(torch.ones(1, 1)).square().mean(),
        SGD(lr=0.1),
        40,
        10,
    )
    for options in ({}, {"budget": 10}):
        found = select(p, 12, share=0.5, highest=1, **options)
        assert bool((found.counts[y == 5] == 0).all())
        assert min(found.descent.values) < 0.05 * found.descent.values[0]


def test_a_descent_is_resumed_from_its_directory(tmp_path):
    for options in ({}, {"budget": 7, "memory": 0.5}):
        whole = select(problem(), 5, share=0.5, highest=1, **options)
        folder = tmp_path / str(len(options))
        select(problem(), 2, share=0.5, highest=1, directory=folder, **options)
        resumed = select(problem(), 5, share=0.5, highest=1, directory=folder, **options)
        assert torch.equal(resumed.last, whole.last)


# --- what goes wrong -------------------------------------------------------------------------------------------------


def divergent() -> SelectionProblem:
    """Quadratic losses a_i (w - 1)²/2 under SGD with lr 0.5: steep ones (a = 40) make a training diverge once there
    are enough of them in a batch; the objective wants w = 1, so that every one of them is asked for."""
    a = torch.tensor([0.01] * 8 + [40.0] * 8)
    return SelectionProblem(
        nn.Linear(1, 1, bias=False),
        a,
        lambda model, a: a * (model.weight[0, 0] - 1).square() / 2,
        lambda model: (model.weight[0, 0] - 1).square(),
        SGD(lr=0.5),
        300,
        64,
        at=290,
    )


def test_a_divergent_training_is_said_with_its_step_and_fewer_counts_are_changed():
    start = torch.tensor([1.0] * 8 + [0.0] * 8)
    found = select(divergent(), 4, counts=start, share=1.0, highest=1)
    assert len(found.descent.history) == 4  # it went on
    assert found.descent.notes
    note = found.descent.notes[0]
    assert note.startswith("meta-step 1: ") and "at training step" in note and "with a share of 0.5" in note
    assert sum(step.diverged for step in found.descent.history) == len(found.descent.notes)
    assert torch.equal(found.last, found.last.round())  # counts stay whole
    with pytest.raises(NonFiniteState, match="at step"):
        select(divergent(), 2)  # the start itself


def test_dropping_everything_is_said():
    with pytest.raises(BadArgument, match="every example of the pool has been dropped"):
        select(problem(), 9, counts=torch.zeros(N))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"budget": 13}, "budget of 1..12: the pool has 12 examples"),
        ({"budget": 0}, "budget of 1..12"),
        ({"budget": 25, "highest": 2}, "budget of 1..24"),
        ({"highest": 0}, "no counts but 0 are in 0..0"),
        ({"shard": 13}, "shard of 1..12 candidates"),
        ({"shard": 0}, "shard of 1..12 candidates"),
        ({"share": 0.0}, "share of the"),
        ({"share": 1.5, "budget": 4}, "share of the"),
        ({"memory": 1.0, "budget": 4}, "memory in"),
        ({"counts": torch.ones(3)}, "a count for each of the 12 examples"),
        ({"counts": torch.full((N,), 0.5)}, "whole numbers"),
        ({"counts": torch.full((N,), 3.0), "highest": 2}, "at most 2; got 3"),
        ({"counts": torch.ones(N), "budget": 4}, "at most the budget of 4; got 12"),
    ],
)
def test_options_without_a_solution_are_refused(options, words):
    with pytest.raises(BadArgument, match=words):
        select(problem(), 1, **options)


def test_bad_problems_are_refused():
    with pytest.raises(BadData, match="the pool is empty"):
        problem(pool=torch.zeros(0, 3))
    with pytest.raises(BadData, match="one length"):
        problem(pool=(torch.zeros(4, 3), torch.zeros(5)))
    with pytest.raises(BadData, match="NaN"):
        problem(pool=torch.full((3,), float("nan")))
    with pytest.raises(BadData, match="hold tensors"):
        problem(pool=[])
    with pytest.raises(BadArgument, match=r"in 0\.\.8; got 9"):
        problem(at=STEPS)
    with pytest.raises(BadArgument, match="microbatches"):
        problem(options={"microbatches": 2})
    with pytest.raises(BadLoss, match="for each of 4 examples"):
        problem(losses=lambda model, e: model(e[0]).mean()).train(torch.ones(N))


def test_bad_images_are_refused():
    train, test, settings = data.digits(), data.digits(train=False), Settings().quick()
    one = train[train.labels == 3]
    with pytest.raises(BadData, match="all images of digits are of one class"):
        make_pool(one, test, settings)
    with pytest.raises(BadData, match="digits is empty"):
        make_pool(train[:0], test, settings)
    with pytest.raises(BadArgument, match="expected a pool and held-out images of"):
        make_pool(train, test, Settings())
    with pytest.raises(BadData, match=r"labels of x in 0\.\.1; got 0\.\.2"):
        Images("x", torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.arange(3), ("a", "b"))


# --- the recipe ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found():
    return recipe.run(ImageSetting(data.digits(), data.digits(train=False), Settings().quick()))


def test_the_pool_is_as_it_says():
    settings = Settings().quick()
    pool = make_pool(data.digits(), data.digits(train=False), settings)
    size = torch.bincount(pool.kind, minlength=4).tolist()
    assert sum(size) == settings.pool == len(pool.images) and size[2] % COPIES == 0
    ordinary = pool.kind < KINDS.index("duplicate")
    assert torch.equal(pool.kind[ordinary] == 1, pool.images.labels[ordinary] != pool.truth[ordinary])
    assert float((pool.kind[ordinary] == 1).double().mean()) == pytest.approx(0.4, abs=0.06)
    pairs = set(zip(pool.truth[pool.kind == 1].tolist(), pool.images.labels[pool.kind == 1].tolist(), strict=True))
    assert len(pairs) == 10
    uniform = make_pool(data.digits(), data.digits(train=False), replace(settings, uniform=True))
    wrong = uniform.kind == KINDS.index("wrong")
    assert bool((uniform.images.labels[wrong] != uniform.truth[wrong]).all()) and torch.equal(wrong, pool.kind == 1)
    assert len(set(zip(uniform.truth[wrong].tolist(), uniform.images.labels[wrong].tolist(), strict=True))) > 60
    copies = pool.images.images[pool.kind == 2]
    assert len({bytes(image.numpy().tobytes()) for image in copies}) == len(copies) // COPIES

    def keys(images):
        return {bytes(image.numpy().tobytes()) for image in images.images}

    assert not keys(pool.images) & keys(pool.held_out) and not keys(pool.test) & keys(pool.held_out)
    assert not keys(pool.images) & keys(pool.test)


def test_selection_beats_everything_chance_and_the_filters_on_test_images(found):
    assert found.gain(recipe.ALL) > 0.1 and found.gain(recipe.RANDOM) > 0.1
    assert found.gain(recipe.names(found.setting)[0]) > 0.05
    share = kept_by_kind(found)
    assert share[0] > 0.9 and share[1] < 0.5  # clean ones stay, wrong ones go
    assert found.choices[recipe.SELECTED].precision > float(found.setting.good.double().mean()) + 0.1


def kept_by_kind(found) -> list[float]:
    """The share of each kind's examples that is used."""
    counts, kind = found.selection.counts, found.setting.kind
    return [float((counts[kind == i] > 0).double().mean()) for i in range(len(found.setting.kinds))]


def test_the_json_is_complete(found):
    complete(found)


def complete(found) -> None:
    settings = found.setting.settings
    report = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert report["setting"] == found.setting.name
    assert len(report["trace"]) == settings.meta_steps
    assert sum(report["data"]["pool"].values()) == settings.pool
    assert set(report["choices"]) == set(found.choices) and len(report["choices"]) == 7
    for choice in report["choices"].values():
        assert len(choice["accuracies"]) == settings.repeats
        assert all(len(values) == settings.repeats for values in choice["further"].values())
    selected = report["choices"][recipe.SELECTED]
    kept = {kind: sum(numbers[1:]) for kind, numbers in report["counts_by_kind"].items()}
    assert sum(kept.values()) == selected["examples"] == len(found.selection.kept)
    assert report["gain_in_accuracy"][recipe.ALL] == pytest.approx(
        selected["accuracy"] - report["choices"][recipe.ALL]["accuracy"]
    )


def test_terminal_and_page_show_it(found, tmp_path):
    from matplotlib.image import imread

    console = Console(width=80, record=True, file=io.StringIO())
    page = report.page(found)
    show(page, console)
    text = console.export_text()
    assert "…" not in text and f"{found.choices[recipe.SELECTED].accuracy:.1%}" in text
    paths = write(page, tmp_path)
    assert {path.name for path in paths} == {
        "index.html",
        "accuracy.png",
        "precision.png",
        "counts.png",
        "dropped.png",
        "kept.png",
    }
    for path in paths[1:]:
        assert imread(path)[..., :3].std() > 0.02


def test_the_command_runs_with_a_budget_and_shards(tmp_path):
    from mgd.cli.main import main

    target = tmp_path / "found.json"
    arguments = "recipe select --quick --meta-steps 2 --budget 250 --shard 400 --json".split()
    with pytest.raises(SystemExit) as ended:
        main([*arguments, str(target)])
    assert ended.value.code == 0
    result = json.loads(target.read_text())
    assert [step["total"] for step in result["trace"]] == [250, 250] and result["command"] == "recipe select"
    assert replace(Settings(), **result["settings"]).shard == 400


# --- the other settings ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs():
    from mgd.recipes.data.emoji import load
    from mgd.recipes.select.emoji import EmojiSetting
    from mgd.recipes.select.emoji import Settings as EmojiSettings

    try:
        emoji = load()
    except BadData as error:
        pytest.skip(str(error))
    return EmojiSetting(emoji, EmojiSettings().quick())


def test_pairs_are_as_they_say(pairs):
    n = pairs.settings.pool
    matched = torch.tensor([given == true for given, true in zip(pairs.given, pairs.true, strict=True)])
    assert bool(matched[:n][pairs.kind == 0].all())
    assert int(matched[:n][pairs.kind == 1].sum()) <= 1  # two emoji share a name
    assert pairs.given.count("emoji") == 48 and int(matched[:n][pairs.kind == 2].sum()) == 48
    assert bool(matched[n:].all()) and pairs.numbers() == {"matched": 288, "mismatched": 256, "uninformative": 96}
    assert len(pairs.held[0]) + len(pairs._test[0]) + n <= len(pairs.true)
    assert len(pairs._test[0]) % 200 == 0


def test_contrastive_losses_and_ranks_are_those_of_the_definition(pairs, monkeypatch):
    from mgd.recipes.select.emoji import contrastive, features

    similar = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.arange(5)
    entropy = torch.nn.functional.cross_entropy
    both = entropy(similar, target, reduction="none") + entropy(similar.T, target, reduction="none")
    assert torch.allclose(contrastive(similar), both / 2)
    cosines = features(["red apple", "green apple", "zebra"]) @ features(["red apple"]).T
    assert cosines[0] == pytest.approx(1) and cosines[0] > cosines[1] > cosines[2]
    perfect, third = torch.eye(200), torch.eye(200).roll(1, 1) + torch.eye(200).roll(2, 1) + torch.eye(200) / 2
    monkeypatch.setattr(pairs, "call", lambda *_: perfect)
    assert pairs.test({}) == (1, 1)
    monkeypatch.setattr(pairs, "call", lambda *_: third)
    assert pairs.test({}) == (1, 0)


@pytest.fixture(scope="module")
def found_pairs(pairs):
    return recipe.run(pairs)


def test_selection_drops_mismatched_pairs(found_pairs, tmp_path):
    complete(found_pairs)
    matched, mismatched, _ = kept_by_kind(found_pairs)
    assert matched > mismatched + 0.15
    written(found_pairs, tmp_path, {"accuracy", "precision", "counts", "dropped", "kept"})


def written(found, folder, pictures: set[str]) -> None:
    from matplotlib.image import imread

    paths = write(report.page(found), folder)
    assert {path.stem for path in paths} == pictures | {"index"}
    assert all(imread(path)[..., :3].std() > 0.02 for path in paths[1:])


@pytest.fixture(scope="module")
def found_passages():
    from mgd.recipes.data.text import installed
    from mgd.recipes.models import encoder
    from mgd.recipes.select.lora import CLASSES, OTHERS, LoraSetting
    from mgd.recipes.select.lora import Settings as LoraSettings

    missing = [text for name, text in installed().items() if name in CLASSES + OTHERS and text]
    if missing or encoder.installed() is None:
        pytest.skip(f"needs `make data`: {missing or encoder.INSTALL}")
    return recipe.run(LoraSetting(LoraSettings().quick()))


def test_selection_drops_passages_with_wrong_labels(found_passages, tmp_path):
    complete(found_passages)
    clean, wrong, _ = kept_by_kind(found_passages)
    assert clean > wrong + 0.1
    written(found_passages, tmp_path, {"accuracy", "precision", "counts"})
    assert "is from" in (tmp_path / "index.html").read_text()


def test_layers_below_lora_computed_once_are_the_whole_encoder(found_passages):
    setting = found_passages.setting
    tokens = torch.zeros(3, 16, dtype=torch.int64)
    tokens[:, :9] = torch.randint(1, 2000, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        upper = setting.problem.model(setting._below(tokens), tokens != 0)
        assert torch.allclose(upper, setting.whole(tokens), atol=1e-5)


def test_bad_sizes_of_the_other_settings_are_refused(pairs):
    from mgd.recipes.data.emoji import Captioned
    from mgd.recipes.select import emoji, lora

    few = Captioned(pairs.images[:300], tuple(pairs.true[:300]), ("",) * 300)
    with pytest.raises(BadArgument, match="and at most 100 together, as 200 of the 300 test; got 640 and 280"):
        emoji.EmojiSetting(few, pairs.settings)
    with pytest.raises(BadArgument, match=r"1\.\.6 layers; got 7"):
        lora.LoraSetting(lora.Settings(layers=7))
    with pytest.raises(BadArgument, match=r"at least a batch \(16\)"):
        lora.LoraSetting(lora.Settings(held_out=4))


def test_a_setting_says_what_it_lacks():
    with pytest.raises(TypeError, match="abstract"):
        Setting()


def test_the_command_refuses_what_another_setting_wants(capsys):
    from mgd.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main("recipe select --setting lora --uniform".split())
    assert ended.value.code != 0
