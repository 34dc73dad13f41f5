"""Attribution: the exact influence of every training example on every test loss (MAGIC, arXiv 2504.16430).

For a deterministic training with a weight on each example, score `[q, i]` is the derivative of the loss of query q
after training with respect to the weight of training example i. Leaving example i out changes that loss by about minus
its score times its weight. All queries of a chunk share one training and one reverse sweep.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from mgd.attribution import combined
from mgd.attribution import scores as files
from mgd.attribution.result import Attribution, AttributionReport
from mgd.attribution.shared import HeldScores, SharedScores
from mgd.attribution.sweeps import Objectives, Part, Sweeps, objective_of
from mgd.errors import BadArgument, BadBatch, BadMetaparameter
from mgd.function import TrainingFunction
from mgd.identity import code_of
from mgd.step.batches import loaded
from mgd.util.files import path_of
from mgd.util.fingerprint import digest
from mgd.util.system import free_memory
from mgd.util.text import describe, parse_bytes
from mgd_kernels import Arena

SHARE = 0.25  # of the free memory for a chunk, if no size is given: the log of the training needs memory too
MOST = 128  # queries per chunk, if no number is given: the training is then below 1% of a query's cost


def attribute(
    f: TrainingFunction,
    z: Mapping[str, Any],
    queries: int | Sequence[int] | Tensor,
    objectives: Objectives,
    *,
    weights: str = "data_weights",
    names: Sequence[str] | None = None,
    chunk: int | None = None,
    memory: int | str | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    query_groups: int = 1,
    combine: int | None = None,
    probes: int = 4,
    progress: bool = False,
) -> Attribution:
    """The exact influence of every training example on the loss of every query.

    f: the training; its own objective is not used. z: its metaparameters, with `z[weights]` of shape `[n]`.
    queries: k, for the queries 0 to k-1, or a list of their numbers, each once.
    objectives: `objectives(model, index) -> [len(index)]`, the trained model's losses on the queries whose numbers are
        in `index` (int64, on the CPU).
    weights: the metaparameter that holds a weight for each training example. Name it in `per_example` of the training
        function too: a step then costs what its batch costs, and it is known which examples no step reads.
    names: a title for each query, stored in the index.
    chunk: the number of queries that share a training and a reverse sweep. By default as many as fit in `memory`
        (bytes, or text such as "2GB"; by default a quarter of what is free), which holds their adjoints and scores; or
        what an interrupted call in the same directory began with.
    out: a directory for `scores.npy`, with a digest of every chunk. The scores are then never in memory as a whole, and
        a repeated call after an interruption keeps the chunks that are done; all that they depend on is compared (see
        `TrainingFunction.identity`). Without it the scores are an array in memory.
    resume: a directory in which the sweeps of a chunk keep their log, so that an interrupted chunk continues as well,
        to the same bits (see `TrainingFunction.metagradient`). If `out` is not given, the scores are there too.
    query_groups: where f has several processes, so many groups of them take turns at the chunks, each with trainings of
        its own. It divides their number. Scores are whole on every process, and have the bits of one group with the
        same `chunk`, which by default is at most the number of queries per group. The report is that of the own group.
    combine: c: for queries by the hundred. Estimate the scores of all queries from c reverse sweeps, one for each
        principal direction of the queries' gradients (`mgd.attribution.combined`). `.estimate` has their error, as so
        many forward passes (`probes`) measure it, and RoughEstimate warns of queries whose error is large. What the
        sweeps give, `[c, n]`, is in memory as a whole, and so is one evaluation of all queries. A chunk is one of
        combinations, and groups take turns at these. `out` keeps each chunk that is done until the scores are there,
        and `resume` the log of a sweep; an interrupted forward pass begins anew.

    On several processes, rank 0 fills the directory of scores, which all of them must see, as on a shared file system.
    Any number of processes and of groups continues it.

    The training is run once in advance, and every chunk's training must repeat it bit by bit. If one does not,
    ReplayDivergence names the first step that differs, and nothing more is written.

    Raises BadArgument, BadMetaparameter, BadBatch or BadObjective for arguments that do not fit. For a directory:
    StaleRun if it holds other scores, UnknownFormat if something else, StoreBusy if another process fills it,
    CorruptScores or CorruptState if it is damaged.
    """
    start = time.perf_counter()
    if not f.gather:
        f = f.replaced(gather=True)
    directory = out if out is not None else resume
    with f.ranks.call():
        numbers = _numbers(queries)
        if names is not None and len(names) != len(numbers):
            raise BadArgument(f"expected a name for each of the {len(numbers)} queries; got {len(names)}")
        weight = _weights(z, weights)
        visits = _visits(f, weights, len(weight))
        for path in (out, resume):
            if path is not None:
                path_of(path)
        if combine is not None:
            combined.check(len(numbers), combine, probes)
        call: dict[str, Any] = {"queries": numbers, "names": names and list(names), "weights": weights}
        call |= {"query_groups": query_groups, "combine": combine, "probes": probes}
        call |= {"out": out and os.fspath(out), "resume": resume and os.fspath(resume)}
        f.ranks.check_same(
            lambda: code_of(f.model, f.loss, objectives) | {name: digest(value) for name, value in call.items()}
        )
        f.ranks.split(query_groups)  # or it is refused
        given, swept = chunk, combine or len(numbers)
        chunk = f.ranks.first(lambda: _chunk(f, z, swept, query_groups, given, memory, directory))
    unvisited = 0 if visits is None else int((visits == 0).sum())
    report = AttributionReport(len(numbers), len(weight), len(f), chunk, unvisited)

    parts = {first: numbers[first : first + chunk] for first in range(0, len(numbers), chunk)}
    dtype, titles = str(weight.dtype).removeprefix("torch."), None if names is None else list(names)
    how = weights, numbers, titles, chunk, unvisited, combine, None if combine is None else probes
    index = files.Index([len(numbers), len(weight)], dtype, *how)
    with contextlib.ExitStack() as stack:
        scores: combined.Scores
        if directory is None:
            scores = HeldScores(index)
        else:
            identity = f.identity(z, (objective_of(objectives, part) for part in parts.values()))
            scores = stack.enter_context(SharedScores(f.ranks, directory, index, identity))

        begin = time.perf_counter()
        rehearsal = f.train(z, progress=progress)
        report.training_seconds = report.seconds["rehearsal"] = time.perf_counter() - begin
        scores.begin(rehearsal, weight, visits)

        place = None if resume is None else path_of(resume)
        sweeps = Sweeps(f, z, weights, query_groups, place, rehearsal, report, progress)
        estimate = None
        if combine is None:
            objective = functools.partial(objective_of, objectives)
            rows = [Part(first, len(part), functools.partial(objective, part)) for first, part in parts.items()]
            sweeps.run("queries", rows, scores.done, scores.write)
        else:
            estimate = combined.estimated(sweeps, scores, objectives)
        report.total_seconds = time.perf_counter() - start
        found = scores.finish(report, estimate)
    if estimate is not None:
        combined.warn_if_rough(estimate)
    return found


def _numbers(queries: int | Sequence[int] | Tensor) -> list[int]:
    """The numbers of the queries."""
    if isinstance(queries, int) and not isinstance(queries, bool):
        numbers = list(range(queries))
    else:
        values = torch.as_tensor(queries)
        if values.ndim != 1 or values.is_floating_point() or values.dtype == torch.bool:
            raise BadArgument(f"expected queries to be their count or a list of their numbers; got {describe(values)}")
        numbers = values.tolist()
    if not numbers:
        raise BadArgument("expected at least one query; got none")
    if repeats := [number for number, times in Counter(numbers).items() if times > 1]:
        raise BadArgument(f"expected every query once; query {repeats[0]} is there {numbers.count(repeats[0])} times")
    return numbers


def _weights(z: Mapping[str, Any], key: str) -> Tensor:
    """The weights `[n]` of the training examples."""
    if key not in z:
        raise BadMetaparameter(f"expected z[{key!r}], a weight for each training example; got z with keys {list(z)}")
    weight = z[key]
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not weight.is_floating_point():
        raise BadMetaparameter(
            f"expected z[{key!r}] to be floating-point of shape [n], one weight per example; got {describe(weight)}"
        )
    if weight.dtype == torch.bfloat16:
        raise BadMetaparameter(
            f"expected z[{key!r}] in float32 or float64; got {weight.dtype}: scores would be rounded"
        )
    return weight


def _visits(f: TrainingFunction, key: str, n: int) -> Tensor | None:
    """How often the training reads each example, int64 `[n]`; None if `per_example` does not tell."""
    if key not in f.per_example:
        return None
    visits = torch.zeros(n, dtype=torch.int64, device="cpu")
    for step in range(len(f)):
        index = torch.as_tensor(f.per_example[key](loaded(f.batches[step]))).reshape(-1).cpu()
        if len(index) and not -n <= int(index.min()) <= int(index.max()) < n:
            raise BadBatch(
                f"expected indices of training examples in 0..{n - 1}, because z[{key!r}] has {n} entries; "
                f"batch {step} has {int(index.min())}..{int(index.max())}"
            )
        visits.index_put_((index % n,), torch.ones_like(index), accumulate=True)
    return visits


def _chunk(
    f: TrainingFunction,
    z: Mapping[str, Any],
    count: int,
    groups: int,
    chunk: int | None,
    memory: int | str | None,
    directory: str | os.PathLike[str] | None,
) -> int:
    """How many queries, or combinations of them, share a sweep. count: of all of them. directory: where an attribution
    may have begun, which then goes on with its own number."""
    if chunk is not None:
        if chunk < 1 or memory is not None:
            raise BadArgument(f"expected chunk >= 1, or memory in its place; got chunk={chunk} and memory={memory!r}")
        return min(chunk, count)
    if directory is not None and memory is None and (begun := files.chunk_of(directory)):
        return begun
    room = int(SHARE * free_memory()) if memory is None else parse_bytes(memory)
    each = query_bytes(f, z)
    if memory is not None and room < each:
        raise BadArgument(f"expected memory for one query at least, which takes {each:,} bytes; got {room:,} bytes")
    k = -(-count // groups)
    most = max(1, min(k, MOST, room // each))
    return -(-k // -(-k // most))  # chunks of about the same size, rather than a small last one


def query_bytes(f: TrainingFunction, z: Mapping[str, Any]) -> int:
    """Bytes per query of a chunk: adjoints of parameters and optimizer state, a direction, and scores."""
    arena = Arena.of(f.model)
    adjoint = (2 + len(f.optimizer.slots)) * arena.numel * arena.dtype.itemsize
    leaves = [x for x in tree_flatten(dict(z))[0] if isinstance(x, Tensor)]
    # The scores, and 2.5 times as much again while they are checked to be finite.
    return adjoint + int(3.5 * sum(x.numel() * x.element_size() for x in leaves))
