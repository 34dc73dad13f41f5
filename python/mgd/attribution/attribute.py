"""Attribution: the exact influence of every training example on every test loss (MAGIC, arXiv 2504.16430).

For a deterministic training with a weight on each example, score `[q, i]` is the derivative of the loss of query q
after training with respect to the weight of training example i. Leaving example i out changes that loss by about minus
its score times its weight. All queries of a chunk share one training and one reverse sweep.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from mgd.attribution import combined
from mgd.attribution import scores as files
from mgd.attribution.repeating import Objectives, objective_of, repeated
from mgd.attribution.result import Attribution, AttributionReport
from mgd.attribution.shared import SharedScores
from mgd.errors import BadArgument, BadBatch, BadMetaparameter
from mgd.function import TrainingFunction
from mgd.identity import code_of
from mgd.ranks.ranks import Ranks
from mgd.step.batches import loaded
from mgd.util.files import path_of
from mgd.util.fingerprint import digest
from mgd.util.progress import tracked
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
        many forward passes (`probes`) measure it, and RoughEstimate warns of queries whose error is large. The scores
        are in memory as a whole, and so is one evaluation of all queries.

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
            others = {"out": out is not None, "resume": resume is not None, "query_groups": query_groups != 1}
            combined.check(f, len(numbers), combine, probes, others)
        call: dict[str, Any] = {"queries": numbers, "names": names and list(names), "weights": weights}
        call |= {"query_groups": query_groups, "combine": combine, "probes": probes}
        call |= {"out": out and os.fspath(out), "resume": resume and os.fspath(resume)}
        f.ranks.check_same(
            lambda: code_of(f.model, f.loss, objectives) | {name: digest(value) for name, value in call.items()}
        )
        f.ranks.split(query_groups)  # or it is refused
        given, each = chunk, combine or -(-len(numbers) // query_groups)
        chunk = f.ranks.first(lambda: _chunk(f, z, len(numbers), each, given, memory, directory))
    unvisited = 0 if visits is None else int((visits == 0).sum())
    report = AttributionReport(len(numbers), len(weight), len(f), chunk, unvisited)

    dtype, titles = str(weight.dtype).removeprefix("torch."), None if names is None else list(names)
    parts = [numbers[first : first + chunk] for first in range(0, len(numbers), chunk)]
    chunks = list(zip(range(0, len(numbers), chunk), parts, strict=True))
    file, rows, values = None, None, torch.zeros(len(numbers), dtype=torch.float64, device="cpu")
    with contextlib.ExitStack() as stack:
        if directory is None:
            rows = np.zeros((len(numbers), len(weight)), dtype)
        else:
            index = files.Index([len(numbers), len(weight)], dtype, weights, numbers, titles, chunk, unvisited)
            identity = f.identity(z, (objective_of(objectives, part) for part in parts))
            file = stack.enter_context(SharedScores(f.ranks, directory, index, identity))

        begin = time.perf_counter()
        rehearsal = f.train(z, progress=progress)
        report.training_seconds = report.seconds["rehearsal"] = time.perf_counter() - begin
        if file is not None:
            file.begin(rehearsal.losses, digest(rehearsal.losses, rehearsal.model_state), weight, visits)

        if combine is not None:
            tick = stack.enter_context(tracked("combinations", combine, enabled=progress))
            told = functools.partial(_each, tick)
            how = combine, probes, report, rehearsal, told
            table, values, estimate = combined.estimated(f, z, numbers, objectives, weights, *how)
            report.total_seconds = time.perf_counter() - start
            known = numbers, weight.detach().cpu(), visits, report, titles
            return Attribution(table.numpy(), values, *known, estimate=estimate)

        group = stack.enter_context(_Group.of(f, query_groups))
        shared = group.function
        # If there is one chunk, the bars of its two sweeps are shown instead.
        bar = progress and len(chunks) > 1
        todo = [each for each in chunks if file is None or each[0] not in file.done]
        report.chunks_kept = len(chunks) - len(todo)
        kept = len(numbers) - sum(len(part) for _, part in todo)
        tick = stack.enter_context(tracked("queries", len(numbers), kept, enabled=bar))
        for turn in (todo[i : i + query_groups] for i in range(0, len(todo), query_groups)):
            found: list[tuple[int, Any, Tensor]] = []
            for first, part in turn[group.index : group.index + 1]:
                shared.objective = objective_of(objectives, part)
                place = None if resume is None else path_of(resume) / f"queries-{first}"
                result = repeated(shared, z, place, rehearsal, progress and not bar)
                report.add(result)
                found.append((first, result.grads[weights].cpu().numpy(), result.value.double().cpu()))
                del result
            begin = time.perf_counter()
            for each in group.exchanged(found):
                if file is not None:
                    file.write(*each)
                else:
                    assert rows is not None
                    first, scores, losses = each
                    rows[first : first + len(losses)], values[first : first + len(losses)] = scores, losses
            report.seconds["scores"] = report.seconds.get("scores", 0.0) + time.perf_counter() - begin
            for first, part in turn:
                if resume is not None:  # what its sweeps kept there is not needed any more
                    shutil.rmtree(path_of(resume) / f"queries-{first}", ignore_errors=True)
                _each(tick, len(part))
        report.total_seconds = time.perf_counter() - start
        if file is not None:
            return file.finish(report.to_dict())
    assert rows is not None
    return Attribution(rows, values, numbers, weight.detach().cpu(), visits, report, titles)


def _each(tick: Callable[[str], None], count: int) -> None:
    for _ in range(count):
        tick("")


@dataclass
class _Group:
    """The group of ranks to which this one belongs. function: its own training, which has the traces of f. all_ranks:
    those of all groups, if there are several."""

    function: TrainingFunction
    index: int = 0
    count: int = 1
    all_ranks: Ranks | None = None

    @classmethod
    @contextlib.contextmanager
    def of(cls, f: TrainingFunction, count: int) -> Iterator[_Group]:
        ranks, index = f.ranks.split(count)
        if count == 1:
            yield cls(copy.copy(f))
            return
        with f.ranks.call():  # an error of one group ends the others, too
            yield cls(f.replaced(process_group=ranks), index, count, f.ranks)

    def exchanged(self, found: list[Any]) -> Iterator[Any]:
        """What all groups have found, that of one group at a time."""
        if self.all_ranks is None:
            yield from found
            return
        own = found if self.function.ranks.rank == 0 else []
        for index in range(self.count):
            yield from (one for each in self.all_ranks.objects(own if index == self.index else []) for one in each)


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
    k: int,
    chunk: int | None,
    memory: int | str | None,
    directory: str | os.PathLike[str] | None,
) -> int:
    """How many queries share a sweep. count: of all queries. k: of those of a group. directory: where an attribution
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
    most = max(1, min(k, MOST, room // each))
    return -(-k // -(-k // most))  # chunks of about the same size, rather than a small last one


def query_bytes(f: TrainingFunction, z: Mapping[str, Any]) -> int:
    """Bytes per query of a chunk: adjoints of parameters and optimizer state, a direction, and scores."""
    arena = Arena.of(f.model)
    adjoint = (2 + len(f.optimizer.slots)) * arena.numel * arena.dtype.itemsize
    leaves = [x for x in tree_flatten(dict(z))[0] if isinstance(x, Tensor)]
    # The scores, and 2.5 times as much again while they are checked to be finite.
    return adjoint + int(3.5 * sum(x.numel() * x.element_size() for x in leaves))
