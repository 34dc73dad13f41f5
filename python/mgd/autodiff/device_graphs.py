"""Captured steps as device graphs: the hundreds of kernels of a part of a step are recorded, and launched at once.

A recording is kernels with their arguments as they were: addresses, and numbers. It stands for a call where everything
is the same that these follow from, and what has changed is in the memory that they read:

- A call belongs to a recording by the shapes, strides, dtypes and alignment of its inputs, by the stream, and by the
  settings that choose kernels. Others run as they are, or get recordings of their own.
- An input that was at one address in all calls so far is read there, as long as it is there. Every other one is copied
  into memory of the recording at each call.
- Every output is copied out of the memory of the recording into new memory. So nothing that anybody holds is written by
  a later call. Outputs that are held for different times are in different memory.
- Only what computes with what it was given is recorded, by operators of torch and of this package, on one device,
  without a number or a shape that depends on data. Random numbers come from the device's generator, as it is at each
  call.
- The first call of a recording, after the one that was recorded, runs both ways, and all bits have to be the same. If
  they are not, no recording is used any more.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mgd.autodiff.cuda_graphs import CudaRecorder
from mgd.autodiff.device_recording import Layout, NotRecorded, Packed, Recorder, Recording, Run, Watch
from mgd.autodiff.execution import direct, reason
from mgd.util.text import format_bytes

RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}  # by the type of the device
CALLS = 3  # of a kind, the last of which is recorded: to record one takes about as long
KINDS = 4  # of calls of one part that may be recorded
MOVES = 2  # times that a part is recorded again since an input has moved; then all of them are copied
MOST = 64  # recordings of one evaluator
# Bytes of all results of one part, above which the device takes longer than the host; and of all recordings.
LARGEST, TOGETHER = 256 << 20, 1 << 30

_on = os.environ.get("MGD_DEVICE_GRAPHS", "1") != "0"


@contextlib.contextmanager
def switched(on: bool) -> Iterator[None]:
    """In the block device graphs are used, or are not."""
    global _on
    before, _on = _on, on
    try:
        yield
    finally:
        _on = before


class DeviceGraphs:
    """The recordings of one evaluator. made: how many there are. left_out: why some part has none. given_up: why none
    is used any more."""

    def __init__(self) -> None:
        self.made = 0
        self.left_out: str | None = None
        self.given_up: str | None = None
        self._bytes = 0
        self._recorders: dict[torch.device, Recorder] = {}

    @staticmethod
    def serve(device: torch.device) -> bool:
        return device.type in RECORDERS

    def direct(self, module: fx.GraphModule, *pieces: int, packs: bool = False) -> Run:
        """As `execution.direct`. pieces: how many of the outputs, one after another, are held for the same time. packs:
        those of the last piece may be one `Packed`, which another part takes in their place."""
        constants = [_attribute(module, str(n.target)) for n in module.graph.nodes if n.op == "get_attr"]
        return DeviceGraph(self, direct(module), pieces, [x for x in constants if isinstance(x, Tensor)], packs)

    @property
    def bytes(self) -> int:
        """What the recordings take."""
        return self._bytes + sum([recorder.held for recorder in self._recorders.values()])

    def describe(self) -> str:
        """For the report; empty where there is nothing to say."""
        if self.given_up:
            return f"; launched one by one: {self.given_up}"
        made = f"; {self.made} device graphs, {format_bytes(self.bytes)}" if self.made else ""
        return f"{made}; some parts launched one by one: {self.left_out}" if self.left_out else made

    def recorder(self, device: torch.device) -> Recorder:
        if device not in self._recorders:
            self._recorders[device] = RECORDERS[device.type](device)
        return self._recorders[device]

    def check_room(self, needed: int) -> None:
        """Raises NotRecorded where there is none for another recording, of so many bytes of results."""
        if self.made >= MOST:
            raise NotRecorded(f"expected at most {MOST} recordings")
        if needed > LARGEST or self.bytes + needed > TOGETHER:
            most, all_, now = map(format_bytes, (LARGEST, TOGETHER, self.bytes))
            raise NotRecorded(
                f"expected results of at most {most}, and of {all_} with all others; "
                f"got {format_bytes(needed)}, beside {now}"
            )

    def add(self, recording: Recording, sign: int = 1) -> None:
        self.made, self._bytes = self.made + sign, self._bytes + sign * recording.bytes

    def give_up(self, why: str) -> None:
        self.given_up = why
        warnings.warn(f"mgd launches the kernels of captured steps one by one: {why}", RuntimeWarning, stacklevel=2)


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


class DeviceGraph:
    """A part of a step, a function of tensors, which runs by its recordings.

    recordings: by all that a call has in common with those that they stand for, but for addresses. refused: whether it
    has none, and gets none.
    """

    def __init__(
        self, owner: DeviceGraphs, run: Run, pieces: Sequence[int], constants: Sequence[Tensor], packs: bool = False
    ):
        self.owner, self.run, self.pieces, self.constants, self.packs = owner, run, pieces, constants, packs
        self.recordings: dict[Hashable, Recording] = {}
        self.refused = False
        self._calls: dict[Hashable, int] = {}
        self._addresses: list[int] = []  # of the latest call that was launched one by one
        self._moving: set[int] = set()  # inputs, by number, that have been at several addresses
        self._moves = 0
        self._unpacking: dict[Layout, DeviceGraph] = {}

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        if type(inputs[-1]) is Packed:
            return self._of(inputs[-1].layout)(*inputs[:-1], inputs[-1].memory)
        if self.refused or self.owner.given_up or not _on:
            return self.run(*inputs)
        if not self._calls and not all([isinstance(x, Tensor) for x in inputs]):
            return self._refuse("expected tensors; got a number among the inputs", inputs)
        recorder = self.owner.recorder(inputs[0].device)
        addresses, low = [x.data_ptr() for x in inputs], recorder.alignment - 1
        each = [(x.shape, x.stride(), x.dtype, a & low) for x, a in zip(inputs, addresses, strict=True)]
        key = recorder.settings(), *each
        recording = self.recordings.get(key)
        if recording is not None and recording.stands_for(addresses):
            return recording(inputs) if recording.confirmed else self._confirm(recording, recorder, inputs)
        if recording is not None:
            self._drop(key, addresses)
        elif self._addresses:
            self._moving |= {i for i, (a, b) in enumerate(zip(self._addresses, addresses, strict=True)) if a != b}
        self._addresses = addresses
        return self._one_by_one(key, recorder, inputs)

    def _of(self, layout: Layout) -> DeviceGraph:
        """The same part, given the memory of its last inputs."""
        if layout not in self._unpacking:

            def run(*inputs: Tensor) -> Sequence[Any]:
                return self.run(*inputs[:-1], *layout.views(inputs[-1]))

            self._unpacking[layout] = DeviceGraph(self.owner, run, self.pieces, self.constants)
        return self._unpacking[layout]

    def _refuse(self, why: str, inputs: Sequence[Any]) -> Sequence[Any]:
        self.refused, self.owner.left_out = True, why
        return self.run(*inputs)

    def _drop(self, key: Hashable, addresses: Sequence[int]) -> None:
        """An input is not where the recording reads it. It is copied from now on."""
        recording = self.recordings.pop(key)
        self.owner.add(recording, -1)
        self._moves += 1
        self._moving |= {i for i, address in recording.still if addresses[i] != address}
        if self._moves > MOVES:
            self._moving = set(range(len(addresses)))

    def _one_by_one(self, key: Hashable, recorder: Recorder, inputs: Sequence[Tensor]) -> Sequence[Any]:
        """A call that no recording stands for; after some of its kind, it is recorded."""
        if key not in self._calls and len(self._calls) >= KINDS:
            self.owner.left_out = f"expected calls of at most {KINDS} shapes, strides, alignments and settings"
            return self.run(*inputs)
        self._calls[key] = self._calls.get(key, 0) + 1
        if self._calls[key] < CALLS:
            return self.run(*inputs)
        with _repeated(recorder, self.run, inputs) as (outputs, _):
            try:
                self.recordings[key] = self._record(recorder, inputs)
            except Exception as error:  # what cannot be recorded runs as it is
                self.refused = True
                self.owner.left_out = str(error) if isinstance(error, NotRecorded) else reason(error)
        return outputs

    def _record(self, recorder: Recorder, inputs: Sequence[Tensor]) -> Recording:
        with Watch([*inputs, *self.constants]) as watch:
            outputs = self.run(*inputs)
        copied = sorted(self._moving)
        self.owner.check_room(watch.bytes + sum([inputs[i].nbytes for i in copied]))
        recording = Recording(recorder, self.run, inputs, outputs, copied, self.pieces, self.packs)
        self.owner.add(recording)
        return recording

    def _confirm(self, recording: Recording, recorder: Recorder, inputs: Sequence[Tensor]) -> Sequence[Any]:
        """The first call of a recording, both ways."""
        with _repeated(recorder, self.run, inputs) as (outputs, after):
            found = recording(inputs)
            if type(found[-1]) is Packed:
                found = [*found[:-1], *found[-1].tensors()]
            recording.confirmed = torch.equal(recorder.random_state(), after) and all(map(_same_bits, found, outputs))
        if not recording.confirmed:
            self.owner.give_up("a device graph gave other bits than the same step without it")
        return outputs


@contextlib.contextmanager
def _repeated(recorder: Recorder, run: Run, inputs: Sequence[Tensor]) -> Iterator[tuple[Sequence[Any], Tensor]]:
    """The outputs, for a block in which the device's generator is as it was before; at its end it is as after."""
    before = recorder.random_state()
    outputs = run(*inputs)
    after = recorder.random_state()
    recorder.set_random_state(before)
    try:
        yield outputs, after
    finally:
        recorder.set_random_state(after)


def _same_bits(x: Any, y: Any) -> bool:
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return x is y
    if (x.shape, x.stride(), x.dtype) != (y.shape, y.stride(), y.dtype):
        return False
    return torch.equal(*[each.contiguous().reshape(-1).view(torch.uint8) for each in (x, y)])
