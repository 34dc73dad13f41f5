"""The ranks of a process group of `torch.distributed`, as far as a training talks to them.

Each pair of ranks has a connection that no other group uses. A rank whose call fails says why in the group's key-value
store and closes its connections, so that the others hear of it at once, wherever they wait; a process that dies closes
them, too. One that stalls is noticed when the timeout of the process group has passed.
"""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import socket
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mgd.errors import BadArgument, RankFailed
from mgd.ranks.ranks import Made, Ranks, check_facts
from mgd.util.system import free_memory
from mgd_kernels.memory import as_bytes

GRACE = 5.0  # seconds in which the others say what they know of a failure
_connections: Counter[str] = Counter()  # made so far, by the name of the process group
LEFT = "a failure of another rank"  # what a rank says that only saw a connection close


def ranks_of(process_group: Any) -> Ranks:
    """The ranks of a process group of `torch.distributed`, or these ranks; None: this process alone."""
    if isinstance(process_group, Ranks):
        return process_group
    if process_group is not None:
        return ProcessRanks(process_group)
    started = int(os.environ.get("WORLD_SIZE", 1)) if dist.is_available() and dist.is_torchelastic_launched() else 1
    if started > 1 and not dist.is_initialized():  # then torch.distributed.group.WORLD is None
        warnings.warn(
            f"torchrun started {started} processes, and each makes the whole training: none of them has called "
            "torch.distributed.init_process_group, without which there is no process_group to give",
            RuntimeWarning,
            stacklevel=2,
        )
    return Ranks()


class ProcessRanks(Ranks):
    """The ranks of `process_group`, numbered as in it."""

    def __init__(self, process_group: Any):
        if not (dist.is_available() and dist.is_initialized()):
            raise BadArgument(
                "expected an initialised process group; call torch.distributed.init_process_group before the training "
                "function is made"
            )
        if not isinstance(process_group, dist.ProcessGroup):
            raise BadArgument(
                "expected process_group to be a group of torch.distributed of which this process is a member, such as "
                f"torch.distributed.group.WORLD; got {type(process_group).__name__}"
            )
        backend = dist.get_backend_config(process_group)
        if "gloo" not in backend:
            raise BadArgument(f"expected a process group with Gloo, which serves the CPU; got {backend!r}")
        self._name: str = process_group.group_name
        self._own: Any = None  # the connections
        self.sent = 0  # bytes so far, to other ranks
        self._key = ""  # of what ranks say of a failure, in the store
        self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
        options: Any = process_group._get_backend(torch.device("cpu")).options
        self._timeout, self._store = options._timeout, process_group.get_group_store()

    # --- calls and failures ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        if self._own is None:
            self._connect()
        try:
            yield
            self.objects(None)  # nobody leaves before all are done
        except RankFailed:
            raise
        except BaseException as error:
            self._leave(f"{type(error).__name__}: {error}".removesuffix(": "))
            raise

    def _connect(self) -> None:
        """Connect with every rank, in a group that is this object's own."""
        name = self._name
        _connections[name] += 1  # as often as the other ranks, which make the same calls
        self._key = f"mgd/{name}/{_connections[name]}"
        with self._failing():
            self._store.set(f"{self._key}/{self.rank} is here", "")
            store = dist.PrefixStore(self._key, self._store)
            self._own = dist.ProcessGroupGloo(store, self.rank, self.size, self._timeout)

    def _leave(self, reason: str) -> None:
        """Say why, and close the connections, as the end of the group does."""
        with contextlib.suppress(Exception):  # the store may be gone
            self._store.set(f"{self._key}/{self.rank}", reason)
        self._own = None

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Errors of the block become RankFailed, with what can be found out about the reason."""
        connecting = self._own is None
        try:
            yield
        except (RuntimeError, ValueError) as error:
            self._leave(LEFT)
            silent, reasons = self._found_out(connecting)
            seen = str(error).partition("\n")[0].partition(". This is")[0]
            raise RankFailed(silent, reasons, seen) from error

    def _found_out(self, connecting: bool) -> tuple[list[int], dict[int, str]]:
        """Ranks that say nothing within the time of grace, and what the others say, by rank. connecting: to be there is
        to say something."""
        silent, reasons = set(range(self.size)) - {self.rank}, {}
        end = time.monotonic() + GRACE
        with contextlib.suppress(Exception):  # the store may be gone with the process that has it
            while silent:
                for rank in sorted(silent):
                    if self._store.check([f"{self._key}/{rank}"]):
                        silent.discard(rank)
                        reasons[rank] = self._store.get(f"{self._key}/{rank}").decode()
                    elif connecting and self._store.check([f"{self._key}/{rank} is here"]):
                        silent.discard(rank)
                if time.monotonic() > end:
                    break
                time.sleep(0.05)
        return sorted(silent), {rank: text for rank, text in reasons.items() if text != LEFT}

    # --- what is exchanged -------------------------------------------------------------------------------------

    def exchange(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        send = parts[0] if self.size == 1 else torch.cat(list(parts))
        received = self._exchanged(send, [part.numel() for part in parts], sizes)
        return list(received.split(list(sizes)))

    def _exchanged(self, send: Tensor, lengths: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """As bytes, so that every dtype has one way."""
        width, received = send.element_size(), send.new_empty(sum(sizes))
        self.sent += width * (sum(lengths) - lengths[self.rank])
        assert self._own is not None, "collectives belong into a call"
        with self._failing():
            self._own.alltoall_base(
                as_bytes(received),
                as_bytes(send.contiguous()),
                [size * width for size in sizes],
                [length * width for length in lengths],
            ).wait()
        return received

    def joined(self, own: Tensor, sizes: Sequence[int]) -> Tensor:
        return self._exchanged(own.repeat(self.size), [own.numel()] * self.size, sizes)

    def objects(self, value: Any) -> list[Any]:
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = self.numbers(torch.tensor([len(data)], device="cpu")).tolist()
        return [pickle.loads(bytes(part.numpy())) for part in self.joined(data, sizes).split(sizes)]

    def numbers(self, own: Tensor) -> Tensor:
        flat = own.reshape(-1)
        received = self.joined(flat, [flat.numel()] * self.size)
        return received.reshape(self.size * own.shape[0], *own.shape[1:])

    def split(self, count: int) -> tuple[Ranks, int]:
        self._check_split(count)
        each = self.size // count
        index = self.rank // each
        if each == 1:
            return Ranks(), index
        # No group of torch's: a second one of the same members finds the first one's addresses, and waits for them.
        part = copy.copy(self)
        part._own, part.sent, part._name = None, 0, f"{self._name}/{index} of {count}"
        part.rank, part.size = self.rank % each, each
        return part, index

    def check_same(self, facts: Callable[[], Mapping[str, Any]]) -> None:
        check_facts(self.objects(dict(facts())))

    def first(self, make: Callable[[], Made]) -> Made:
        return self.objects(make() if self.rank == 0 else None)[0]

    def memory(self) -> int | None:
        found = self.objects((socket.gethostname(), free_memory()))
        hosts = [host for host, _ in found]
        return min(free // hosts.count(host) for host, free in found)
