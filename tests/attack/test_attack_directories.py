"""Directories of descents, raters, attributions and searches that were damaged, forged, shared, or left by a kill.

Whatever happens to one, the same call gives the right bits or an error of this package, and never a wrong number.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from directory_runs import RUNS, STEPS, WEIGHTS, Enough, killed_after, killed_at, loaded, outcome, training

import mgd
from mgd.errors import StaleRun, StoreBusy, UnknownFormat
from mgd.util.run_directory import RunDirectory
from mgd_kernels import Store

FULL = os.environ.get("MGD_ATTACK", "") == "full"
pytestmark = pytest.mark.timeout(3600 if FULL else 600)
MUTATIONS = 300 if FULL else 4  # of each kind of file
ERRORS = {"CorruptState", "ForeignEntry", "CorruptScores", "UnknownFormat", "StaleRun", "StoreIOError", "BadData"}
PARTS = {"descent": 2, "rater": 2, "attribution": 3, "estimate": 2, "search": 3}  # how far the interrupted runs go


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """For each kind of run: a directory of one that was interrupted, of one that is whole, and of another one."""
    base = tmp_path_factory.mktemp("runs")
    for kind, run in RUNS.items():
        run(base / f"{kind}-part", PARTS[kind])
        right = run(base / f"{kind}-whole")
        (base / f"{kind}.json").write_text(json.dumps(right))
    return base


def right(base: Path, kind: str):
    return json.loads((base / f"{kind}.json").read_text())


def mutated(data: bytes, rng: random.Random) -> bytes:
    mutant = bytearray(data)
    # Most of a file of one page is padding: half of the changes go where it is not.
    used = max(1, len(data.rstrip(b"\0")))
    at = rng.randrange(min(used, 600)) if rng.random() < 0.5 else rng.randrange(len(data))
    action = rng.randrange(8)
    if action <= 3:
        mutant[at] ^= 1 << rng.randrange(8)
    elif action == 4:
        mutant[at : at + 8] = rng.randbytes(8)
    elif action == 5:
        del mutant[at:]
    elif action == 6:
        mutant[at:at] = rng.randbytes(rng.choice([1, 64, 4096]))
    else:
        mutant[at : at + 512] = bytes(len(mutant[at : at + 512]))
    return bytes(mutant)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.is_file())


def attacked(base: Path, tmp_path: Path, kind: str, state: str, run=None) -> None:
    rng, outcomes = random.Random(f"{kind} {state}"), Counter()
    run, reference = run or RUNS[kind], right(base, kind)
    source = base / f"{kind}-{state}"
    for name in names(source):
        data = (source / name).read_bytes()
        for _ in range(MUTATIONS):
            if not data:
                continue
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            shutil.copytree(source, tmp_path / "run")
            (tmp_path / "run" / name).write_bytes(mutated(data, rng))
            found = outcome(run, tmp_path / "run", reference)
            assert found in {"right", *ERRORS}, (name, found)
            outcomes[name, found] += 1
    seen = {name for name, found in outcomes if found != "right"}
    assert any(name.startswith("text-") for name in seen), outcomes  # the attack reaches what matters


@pytest.mark.parametrize("kind", RUNS)
def test_damaged_files(base, tmp_path, kind):
    attacked(base, tmp_path, kind, "part")


@pytest.mark.parametrize("kind", ["attribution", "estimate"])
def test_damaged_files_of_a_whole_attribution_that_is_loaded(base, tmp_path, kind):
    attacked(base, tmp_path, kind, "whole", loaded)


def test_every_bit_of_the_scores_counts(base, tmp_path):
    """Whichever bit of `scores.npy` is another one, header included."""
    file = tmp_path / "run" / "scores.npy"
    shutil.copytree(base / "attribution-whole", tmp_path / "run")
    data = file.read_bytes()
    bits = range(8 * len(data)) if FULL else random.Random(0).sample(range(8 * len(data)), 100)
    for bit in bits:
        mutant = bytearray(data)
        mutant[bit // 8] ^= 1 << bit % 8
        file.write_bytes(mutant)
        assert outcome(loaded, tmp_path / "run", right(base, "attribution")) == "CorruptScores", bit


PLANTED = {
    "gone": lambda file, precious: None,
    "empty": lambda file, precious: file.touch(),
    "folder": lambda file, precious: file.mkdir(),
    "link": lambda file, precious: file.symlink_to(precious),
    "dangling": lambda file, precious: file.symlink_to(precious.with_name("nowhere")),
    "hard link": lambda file, precious: os.link(precious, file),
    "pipe": lambda file, precious: os.mkfifo(file),
}


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("how", PLANTED)
def test_files_that_are_something_else(base, tmp_path, kind, how):
    """A link is never followed to what it points to, and nothing of others is overwritten."""
    precious = tmp_path / "precious"
    for name in names(base / f"{kind}-part"):
        directory, file = tmp_path / name, tmp_path / name / name
        shutil.copytree(base / f"{kind}-part", directory)
        precious.write_bytes(file.read_bytes())
        kept = precious.read_bytes()
        file.unlink()
        PLANTED[how](file, precious)
        found = outcome(RUNS[kind], directory, right(base, kind))
        assert found in {"right", "BadArgument", *ERRORS}, (name, found)
        assert precious.read_bytes() == kept or name == "LOCK", name  # the lock is the store's: see its own attacks
        assert not (tmp_path / "nowhere").exists() or name == "LOCK", name


@pytest.mark.parametrize("kind", RUNS)
def test_entries_of_another_run_are_not_taken_for_its_own(base, tmp_path, kind):
    """Each is whole and has its right name, but the run that wrote it was another one of the same call."""
    run = RUNS[kind]
    run(tmp_path / "other", PARTS[kind])
    for file in sorted((tmp_path / "other").glob("*.mgd")):
        directory = tmp_path / file.name
        shutil.copytree(base / f"{kind}-part", directory)
        shutil.copy(file, directory)
        assert outcome(run, directory, right(base, kind)) in ("CorruptState", "ForeignEntry"), file.name


@pytest.mark.parametrize("kind", RUNS)
def test_directories_of_something_else_are_left_alone(base, tmp_path, kind):
    """Files of anybody, somebody's own store, and the runs of other kinds."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "scores.npy").write_text("mine")
    with Store.open(tmp_path / "store") as store:
        store.put("state", torch.ones(3))
    interrupted(tmp_path / "metagradient")
    others = [tmp_path / "metagradient", *(base / f"{other}-part" for other in RUNS if other != kind)]
    for directory in (tmp_path / "files", tmp_path / "store", *others):
        before = {name: (directory / name).read_bytes() for name in names(directory) if name != "LOCK"}
        assert outcome(RUNS[kind], directory, []) in ("UnknownFormat", "StaleRun"), directory
        assert before == {name: (directory / name).read_bytes() for name in names(directory) if name != "LOCK"}
    (tmp_path / "file").write_text("mine")
    assert outcome(RUNS[kind], tmp_path / "file", []) == "StoreIOError"


@pytest.mark.parametrize("kind", RUNS)
def test_two_at_once(base, tmp_path, kind):
    """The second call is told who has the directory, and the first is not disturbed."""
    shutil.copytree(base / f"{kind}-part", tmp_path / "run")
    with Store.open(tmp_path / "run"):
        with pytest.raises(StoreBusy, match=str(os.getpid())):
            RUNS[kind](tmp_path / "run")
    assert outcome(RUNS[kind], tmp_path / "run", right(base, kind)) == "right"


def test_a_store_that_was_cleared_is_no_run(tmp_path):
    with pytest.raises(UnknownFormat, match="no directory of a run"):
        RunDirectory.existing(tmp_path, "descent")
    Store.open(tmp_path).close()
    with pytest.raises(UnknownFormat, match="something else"):
        RunDirectory.existing(tmp_path, "descent")


# --- kills -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have everything imported already."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the server that they are forked from looks nowhere else
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["directory_runs"])

    def run(target, *arguments) -> int:
        process = context.Process(target=target, args=arguments)
        process.start()
        process.join(60)
        assert process.exitcode is not None
        return process.exitcode

    yield run
    patch.undo()


@pytest.mark.parametrize("kind", RUNS)
def test_a_kill_at_every_operation(base, tmp_path, processes, kind):
    """The same call then comes to the same bits, and leaves a directory that can be used again."""
    number, step = 1, 1 if FULL else 61
    while True:
        directory = tmp_path / str(number)
        code = processes(killed_at, kind, str(directory), number)
        assert outcome(RUNS[kind], directory, right(base, kind)) == "right", number
        assert outcome(RUNS[kind], directory, right(base, kind)) == "right", number
        if code == 0:
            break
        assert code == -9
        number += step
    assert number > 10 or not FULL


@pytest.mark.parametrize("kind", RUNS)
def test_kills_at_random_moments_of_one_run(base, tmp_path, processes, kind):
    rng = random.Random(kind)
    for _ in range(60 if FULL else 1):
        assert processes(killed_after, kind, str(tmp_path), rng.uniform(0.001, 0.25)) in (0, -14)
    assert outcome(RUNS[kind], tmp_path, right(base, kind)) == "right"


def test_files_are_for_their_user_alone(base):
    for name in ("scores.npy", "index.json"):
        assert (base / "attribution-whole" / name).stat().st_mode & 0o777 == 0o600
    assert (base / "descent-whole" / "history.json").stat().st_mode & 0o777 == 0o600


def test_no_pickle_is_made(base):
    """Nothing in a directory could run code: no file begins as a pickle or an archive of them does."""
    for directory in base.iterdir():
        for name in names(directory) if directory.is_dir() else ():
            assert (directory / name).read_bytes()[:2] not in (b"\x80\x02", b"\x80\x04", b"PK"), name


def test_no_pickle_is_read():
    """But by the reader of CIFAR-10, whose unpickler makes arrays alone (`test_data.py`), between the processes of one
    training, as `torch.distributed` does it, and between those of a benchmark, as tensors alone."""
    root = Path(__file__).parents[2]
    unpickles = re.compile(r"import pickle|torch\.load\(|np\.load\(|import (marshal|shelve|joblib|dill)")
    sources = [*(root / "python").rglob("*.py"), *(root / "mgd_kernels").rglob("*.py")]
    found = [path.relative_to(root).as_posix() for path in sources if unpickles.search(path.read_text("utf-8"))]
    assert len(sources) > 100 and sorted(found) == [
        "python/mgd/bench/peers/alone.py",
        "python/mgd/ranks/processes.py",
        "python/mgd/recipes/data/images.py",
    ]


def interrupted(directory: Path) -> mgd.TrainingFunction:
    """The training of a metagradient that ended in its reverse sweep."""
    f = training()
    calls = 0

    def until_reversed(model, batch, z):
        nonlocal calls
        calls += 1
        if calls == 1 + STEPS + 2:  # the look at the first step, the training, and two steps of the reverse sweep
            raise Enough
        return f.loss(model, batch, z)

    with pytest.raises(Enough):
        f.replaced(loss=until_reversed).metagradient(WEIGHTS, resume=directory)
    return f


def test_an_old_result_of_another_objective_is_not_returned(tmp_path):
    """The reverse sweep has begun, so the value of the objective is in the directory: it is not that of another one."""
    f = interrupted(tmp_path)
    with pytest.raises(StaleRun, match="the objective"):
        f.replaced(objective=lambda model: 2 * f.objective(model)).metagradient(WEIGHTS, resume=tmp_path)
    again = f.metagradient(WEIGHTS, resume=tmp_path)
    assert torch.equal(again.grads["weights"], f.metagradient(WEIGHTS).grads["weights"])
