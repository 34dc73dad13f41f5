"""Trainings on 2 and 4 processes: the bits of one process, what is refused, and what failures lead to."""

from __future__ import annotations

import multiprocessing

import cases
import pytest
import rank_checks
import rank_resuming
import rank_trainings
import torch
from torch.utils._pytree import tree_flatten

SAME = [*rank_trainings.TRAININGS, "other_calls", "parts", "on_disk", "jvps", "queries", "users"]
CHECKS = {
    2: [
        *("mlp", "convnet", "gpt with dropout", "captured", "parameter groups", "a torch update"),
        *("two objectives", "replays on a small budget", "other_calls", "parts", "on_disk", "users", "directories"),
        *("attributions", "sizes", "traffic", "refusals", "resumed", "stalled", "died"),
    ],
    4: [
        *("mlp", "mlp in float64", "convnet", "convnet in float64", "gpt with dropout", "matrices"),
        *("parts", "jvps", "queries", "sizes", "traffic", "shares", "resharded", "halfway", "trains"),
    ],
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What each rank found, by the number of processes. They are started together, once for all tests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rank_checks"])
    folders, processes = {}, []
    for size, names in CHECKS.items():
        folders[size] = tmp_path_factory.mktemp(f"ranks-{size}")
        ranks = [
            context.Process(target=rank_checks.everything, args=(rank, size, folders[size], names), daemon=True)
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        processes += ranks
    for process in processes:
        process.join(240)
        if process.is_alive():
            process.kill()
    return {
        size: [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]
        for size, folder in folders.items()
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process finds."""
    folder = tmp_path_factory.mktemp("alone")
    return {name: rank_checks.check(name, None, folder) for name in [*SAME, "sizes", "shares"]}


def same(found, expected):
    (ours, spec), (theirs, other) = tree_flatten(found), tree_flatten(expected)
    return spec == other and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(ours, theirs, strict=True)
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("size", "name"), [(size, name) for size in CHECKS for name in SAME if name in CHECKS[size]])
def test_the_bits_are_those_of_one_process(launched, alone, size, name):
    expected = {key: x for key, x in alone[name].items() if key != "asked"}
    for found in launched[size]:
        assert same({key: x for key, x in found[name].items() if key != "asked"}, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mlp in float64", "convnet in float64"])
def test_exact_in_float64(launched, name):
    case = rank_trainings.TRAININGS[name]()
    expected = case.unrolled()
    for found in launched[4]:
        grads = found[name]["grads"]
        assert max(cases.relative_error(grads[key], expected.grads[key]) for key in case.z) <= 1e-10


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", CHECKS)
def test_each_rank_has_its_share(launched, alone, size):
    for found in launched[size]:
        for name, number in found["sizes"].items():
            assert number <= (1 / size + 0.05) * alone["sizes"][name], name


@pytest.mark.parametrize("size", CHECKS)
def test_the_forecast_of_what_is_sent(launched, size):
    for found in launched[size]:
        sent, forecast = found["traffic"]
        assert forecast <= sent <= 1.25 * forecast


@pytest.mark.parametrize("size", CHECKS)
def test_a_rank_loads_its_own_microbatches_alone(launched, size):
    stretches = [(0, 2), (2, 4), (4, 5), (5, 6)]  # of 6 examples
    each = len(stretches) // size
    for rank, found in enumerate(launched[size]):
        assert found["parts"]["asked"] == stretches[rank * each : (rank + 1) * each]


@pytest.mark.parametrize(
    "name, error, words",
    [
        ("z", "RanksDisagree", "z['temperature']"),
        ("batches", "RanksDisagree", "batches[3]"),
        ("order", "RanksDisagree", "batches[0]"),
        ("length", "RanksDisagree", "the number of steps"),
        ("seed", "RanksDisagree", "the seed"),
        ("code", "RanksDisagree", "the code of the loss"),
        ("objective", "RanksDisagree", "the objective's value"),
        ("divides", "BadArgument", "microbatches=3 and 2 processes"),
        ("buffers", "BadArgument", "leave 'seen' alike"),
        ("resume", "RanksDisagree", "the call"),
        ("calls", "RanksDisagree", "the call"),
        ("jvp", "RanksDisagree", "dz[0]['lr']"),
        ("other queries", "RanksDisagree", "the code of the objective"),
        ("groups", "BadArgument", "divide 2 processes; got 3"),
        ("afterwards", "none", ""),
    ],
)
def test_refused_on_every_rank(launched, name, error, words):
    for found in launched[2]:
        kind, text = found["refusals"][name]
        assert kind == error and words in text, text


def test_the_error_of_one_group_is_told_by_the_others(launched):
    (other, text), (own, _) = (found["refusals"]["one group"] for found in launched[2])
    assert (other, own) == ("RankFailed", "BadObjective") and "rank 1 raised BadObjective" in text


def test_the_error_of_one_rank_is_told_by_the_others(launched):
    (other, text), (own, _) = (found["refusals"]["one rank"] for found in launched[2])
    assert (other, own) == ("RankFailed", "BadBatch") and "rank 1 raised BadBatch" in text


@pytest.mark.filterwarnings("ignore")
def test_resumed_to_the_same_bits(launched, alone):
    for rank, found in enumerate(ranks["resumed"] for ranks in launched[2]):
        assert same({key: found[key] for key in alone["mlp"]}, alone["mlp"])
        if rank == 1:
            assert found["ends"] == ["interrupted"] * 2 and found["left"] == []
        else:
            assert all("rank 1 raised KeyboardInterrupt" in end for end in found["ends"])
        steps = 6
        assert found["accesses"] < 3 * steps + 2  # of which the digests of the run read all but the rest


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "chain"), rank_resuming.RESHARDED)
def test_resumed_by_another_number_of_processes_to_the_same_bits(launched, alone, name, chain):
    found = launched[4][0]["resharded"][name, chain]
    reached = zip(rank_resuming.CHAINS[chain], rank_resuming.REACHED, strict=False)
    assert found["ends"] == [(size, *steps) for size, steps in reached]
    assert same(found["outcome"], alone["mlp" if "snapshots" in name else name])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mlp", "matrices"])
def test_shares_of_all_ranks_are_the_whole(launched, alone, name):
    found, expected = [ranks["shares"][name] for ranks in launched[4]], alone["shares"][name]
    for kind, tensors in expected["parts"].items():
        for key, whole in tensors.items():
            places = [rank["share"][key] for rank in found if key in rank["share"]]
            parts = [rank["parts"][kind][key] for rank in found if key in rank["share"]]
            assert [0, *(stop for _, stop in places)] == [*(start for start, _ in places), len(whole)]
            assert torch.equal(torch.cat(parts), whole), (kind, key)
    assert all(same(rank["whole"], expected["whole"]) for rank in found)


@pytest.mark.filterwarnings("ignore")
def test_a_process_that_ends_while_a_run_changes_hands(launched, alone):
    for found in (ranks["halfway"] for ranks in launched[4]):
        assert found["missing"][0] == "StaleRun" and "what rank 1 of 2 kept is not in" in found["missing"][1]
    found = launched[4][0]["halfway"]
    twos, fours = ({f"rank {i} of {size}" for i in range(size)} for size in (2, 4))
    assert twos | fours <= set(found["4 commit"]) and twos <= set(found["2 discard"])
    assert fours | {"rank 0 of 2"} <= set(found["4 discard"])
    assert same(found["outcome"], alone["mlp"]) and found["left"] == []
    assert found["accesses"] < 3 * 6 + 1, "it goes on at the checkpoint"


@pytest.mark.filterwarnings("ignore")
def test_a_training_is_resumed_by_another_number_of_processes(launched, alone):
    found = launched[4][0]["trains"]
    assert same(found["train"], alone["other_calls"]["train"])
    assert max(found["accesses"]) <= 7 + 2, "the digests, and the steps since the last checkpoint"
    assert found["left"] == []


@pytest.mark.filterwarnings("ignore")
def test_a_descent_and_a_rater_are_continued_in_directories(launched, alone):
    for rank, found in enumerate(launched[2]):
        found = found["directories"]
        assert same(
            {key: found[key] for key in ("descent", "rater")}, {k: alone["users"][k] for k in ("descent", "rater")}
        )
        assert found["trained"] == 2
        assert found["other"][0] == ("RankFailed" if rank else "StaleRun") and "the start of 'lr'" in found["other"][1]


@pytest.mark.filterwarnings("ignore")
def test_attributions_in_directories(launched, alone):
    expected = alone["queries"]
    for rank, found in enumerate(ranks["attributions"] for ranks in launched[2]):
        assert same(found["found"]["groups"], expected["exact"] | {"kept": 3})
        assert same(found["found"]["one"], expected["exact"] | {"kept": 3})
        assert same(found["found"]["estimate"], expected["estimate"] | {"kept": 2})
        refused = found["refused"]
        assert refused["other z"][0] == "RanksDisagree" and "z['lr']" in refused["other z"][1]
        kind, text = refused["other run"]
        assert kind == ("RankFailed" if rank else "StaleRun") and "z['lr']" in text
        for kind, text in (refused["other places"], refused["one place"]):
            assert kind == "RanksDisagree" and "differ in out:" in text
        assert refused["blind"][0] == "BadArgument" and "rank 1 does not see mine" in refused["blind"][1]
    found = launched[2][0]["attributions"]
    assert same(found["found"]["run"], expected["exact"] | {"kept": 2})
    assert found["ends"][0] == "RankFailed" and "rank 1 raised KeyboardInterrupt" in found["ends"][1]
    assert "queries-4" in found["left"] and "queries-2" not in found["left"]


def test_a_rank_that_stalls_is_named(launched):
    kind, text, seconds = launched[2][0]["stalled"]
    assert kind == "RankFailed" and "rank 1 died, stalled" in text
    assert seconds < rank_checks.STALL + 20


def test_a_rank_that_died_is_named(launched):
    kind, text, seconds = launched[2][0]["died"]
    assert kind == "RankFailed" and "rank 1 died, stalled" in text and "died" not in launched[2][1]
    assert seconds < 30
