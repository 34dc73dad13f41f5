"""Files of a resumable run that were damaged, forged, or taken from elsewhere: the right number, or an error."""

from __future__ import annotations

import random
import runpy
import shutil
import struct
import time
from collections import Counter
from pathlib import Path

import pytest

WRITER = runpy.run_path(str(Path(__file__).parents[1] / "mgd_kernels" / "store" / "hostile_stores" / "generate.py"))
KINDS = ["MGD_STORE", "LOCK", "text-run", "text-checkpoint", "text-trained", "gradient", "snapshot"]
ERRORS = {"CorruptState", "ForeignEntry", "UnknownFormat", "StoreIOError", "StaleRun", "StoreFull"}
EVALUATIONS = 10  # of a run of 7 steps that is in the middle of its reverse sweep
MEMORY = 128 << 20  # bytes that reading a damaged file of a few kB may take, the metagradient included


@pytest.fixture(scope="module")
def runs(tmp_path_factory, victim):
    """Directories of runs that were killed: two moments of one, another, and one that began when the first was done."""
    base = tmp_path_factory.mktemp("runs")
    for name, request in {
        "run": {"stop": EVALUATIONS},
        "other": {"stop": EVALUATIONS, "other": True},
        "early": {"stop": 6},
    }.items():
        assert victim.run(base / name, **request)["signal"] == 9
    shutil.copytree(base / "early", base / "late")
    assert victim.run(base / "late", stop=4)["signal"] == 9  # the same run, four evaluations on
    shutil.copytree(base / "run", base / "next")
    assert victim.run(base / "next")["outcome"] == "right"
    assert victim.run(base / "next", stop=EVALUATIONS)["signal"] == 9
    return base


def of_kind(directory: Path, kind: str) -> list[Path]:
    return sorted(path for path in directory.iterdir() if kind in path.name)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A few bits, bytes, pages or fields changed, cut off or added; half of the time under a right checksum."""
    mutant = bytearray(data)
    for _ in range(rng.choice([1, 1, 2])):
        at = rng.randrange(min(400, len(mutant))) if rng.random() < 0.6 else rng.randrange(len(mutant))
        action = rng.randrange(7)
        if action <= 1:
            mutant[at] ^= 1 << rng.randrange(8)
        elif action == 2:
            value = rng.choice([0, 1, 2, 3, 10, 80, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1, 4096, 8192])
            at -= at % 8
            mutant[at : at + 8] = struct.pack("<Q", value)
        elif action == 3:
            other = 8 * rng.randrange(min(400, len(mutant)) // 8 + 1)  # two fields change places
            at -= at % 8
            mutant[at : at + 8], mutant[other : other + 8] = mutant[other : other + 8], mutant[at : at + 8]
        elif action == 4:
            del mutant[max(1, at) :]
        elif action == 5:
            mutant[at:at] = mutant[: rng.choice([1, 100, 4096])]
        else:
            mutant[at : at + 4096] = bytes(len(mutant[at : at + 4096]))
    if len(mutant) >= 4096 and rng.random() < 0.5:
        mutant[:4096] = WRITER["sealed"](bytes(mutant[:4096]))
    return bytes(mutant)


def attempt(victim, directory: Path) -> str:
    """What comes of continuing the run; never a wrong number, a raw exception, a crash or a waste."""
    begin = time.monotonic()
    answer = victim.run(directory)
    assert answer["signal"] == 0 and answer["outcome"] in {"right", *ERRORS}, answer
    if answer["outcome"] != "right":
        assert "expected" in answer["text"] or answer["outcome"] == "StoreIOError", answer
        assert str(directory) in answer["text"], answer
    assert answer["peak"] < MEMORY and time.monotonic() - begin < 20, answer
    return answer["outcome"]


@pytest.mark.parametrize("kind", KINDS)
def test_mutations(tmp_path, victim, full, runs, kind):
    rng = random.Random(kind)
    outcomes: Counter[str] = Counter()
    for _ in range(300 if full else 5):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(runs / "run", tmp_path / "run")
        path = rng.choice(of_kind(tmp_path / "run", kind))
        path.write_bytes(mutated(path.read_bytes(), rng))
        outcomes[attempt(victim, tmp_path / "run")] += 1
    if kind in ("MGD_STORE", "text-run"):  # what nothing can replace
        assert outcomes.total() > outcomes["right"], outcomes


def test_entries_of_another_run_are_refused(tmp_path, victim, full, runs):
    """Whole, with right checksums, and fitting in every shape: only the run that wrote them is another one."""
    files = [path for kind in KINDS[2:] for path in of_kind(runs / "other", kind)[: None if full else 1]]
    for file in files:
        shutil.copytree(runs / "run", tmp_path / file.name)
        shutil.copy(file, tmp_path / file.name)
        answer = victim.run(tmp_path / file.name)
        assert answer["outcome"] == "ForeignEntry" and file.name in answer["text"], answer
        assert (tmp_path / file.name / file.name).read_bytes() == file.read_bytes(), "it is left alone"
        (tmp_path / file.name / file.name).unlink()
        if (runs / "run" / file.name).exists():
            shutil.copy(runs / "run" / file.name, tmp_path / file.name)
        assert victim.run(tmp_path / file.name)["outcome"] == "right", "what the error says to do helps"


def test_entries_of_a_finished_run_are_never_seen(tmp_path, victim, runs):
    """A backup of the run before, restored into the directory in which the next one has begun."""
    shutil.copytree(runs / "next", tmp_path / "run")
    for path in (runs / "run").glob("*.mgd"):
        shutil.copy(path, tmp_path / "run")
    assert victim.run(tmp_path / "run")["outcome"] == "right"


def test_a_marker_of_another_run(tmp_path, victim, runs):
    shutil.copytree(runs / "run", tmp_path / "run")
    shutil.copy(runs / "other" / "MGD_STORE", tmp_path / "run")
    assert victim.run(tmp_path / "run")["outcome"] == "ForeignEntry"


@pytest.mark.parametrize("place, source", [("late", "early"), ("early", "late")])
def test_entries_of_another_moment_of_the_same_run(tmp_path, victim, full, runs, place, source):
    """They hold what this run computed: the right number, or an error where what they need is gone."""
    rng = random.Random(place)
    files = list((runs / source).glob("*.mgd"))
    assert (runs / "early" / "MGD_STORE").read_bytes() == (runs / "late" / "MGD_STORE").read_bytes()
    for i in range(40 if full else 4):
        directory = tmp_path / str(i)
        shutil.copytree(runs / place, directory)
        some = files if i == 0 else [runs / source / "text-checkpoint.mgd"]
        for file in some if i < 2 else rng.sample(files, rng.randrange(1, len(files))):
            shutil.copy(file, directory)
        attempt(victim, directory)


def test_files_are_for_their_user_alone(runs):
    for path in [runs / "run", *(runs / "run").iterdir()]:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_entries_of_the_next_run_are_refused(tmp_path, victim, runs):
    """The run that began in the directory when the one before was finished has an id of its own."""
    shutil.copytree(runs / "run", tmp_path / "run")
    shutil.copy(runs / "next" / "text-checkpoint.mgd", tmp_path / "run")
    assert victim.run(tmp_path / "run")["outcome"] == "ForeignEntry"


def forged(data: bytes, tensor: int, dtype: int) -> bytes:
    """The entry with another dtype of the same size for one tensor, under a right checksum."""
    at = WRITER["FIXED"].size + -(-struct.unpack_from("<I", data, 48)[0] // 8) * 8
    for _ in range(tensor):
        at += 24 + 8 * struct.unpack_from("<I", data, at + 4)[0]
    header = data[:at] + struct.pack("<I", dtype) + data[at + 4 : 4096]
    return WRITER["sealed"](header) + data[4096:]


@pytest.mark.parametrize("kind, tensor, dtype", [("gradient", 0, 7), ("gradient", 1, 5), ("snapshot", 0, 7)])
def test_numbers_are_not_taken_for_those_of_another_type(tmp_path, victim, runs, kind, tensor, dtype):
    shutil.copytree(runs / "run", tmp_path / "run")
    for path in of_kind(tmp_path / "run", kind):
        path.write_bytes(forged(path.read_bytes(), tensor, dtype))
    answer = victim.run(tmp_path / "run")
    assert answer["outcome"] == "CorruptState" and "expected tensors of" in answer["text"], answer


RECORDS = [("text-run", 0, 10, "CorruptState"), ("text-checkpoint", 0, 10, "right"), ("text-checkpoint", 1, 5, "right")]


@pytest.mark.parametrize("kind, tensor, dtype, outcome", RECORDS)
def test_a_record_of_another_type(tmp_path, victim, runs, kind, tensor, dtype, outcome):
    """A checkpoint that is not one is as none: the run begins again."""
    shutil.copytree(runs / "run", tmp_path / "run")
    (path,) = of_kind(tmp_path / "run", kind)
    path.write_bytes(forged(path.read_bytes(), tensor, dtype))
    answer = victim.run(tmp_path / "run")
    assert answer["outcome"] == outcome, answer
