"""What the graph of a function is given, without running it, and whether that is all the function does.

The code that Dynamo made looks up what its graph reads, calls the graph, and then repeats what the function does
beside (attributes, counters, lists). A call of the graph that raises leaves all of that undone.
"""

from __future__ import annotations

import dis
import functools
import itertools
import types
from typing import Any

from torch import Tensor


class NotRecorded(Exception):
    """Why an evaluation cannot be made together with others. told: whether the user has heard of it."""

    def __init__(self, why: str, told: bool = False):
        super().__init__(why)
        self.told = told


class Gathered(BaseException):
    """What the graph of a call was given. No handler of errors is meant to see it."""

    def __init__(self, graph: Any, given: list[Tensor]):
        super().__init__()
        self.graph, self.given = graph, given


BESIDE = "{} changes something beside (an attribute, a counter, a list)"

# What looks things up, calls a function, and makes something of its own. Anything else writes somewhere, or may.
_LOOKS_UP = {
    *"NOP RESUME CACHE EXTENDED_ARG PUSH_NULL PRECALL KW_NAMES COPY SWAP POP_TOP ROT_TWO ROT_THREE DUP_TOP".split(),
    *"BINARY_SUBSCR BINARY_SLICE BUILD_LIST BUILD_TUPLE LIST_EXTEND UNPACK_SEQUENCE".split(),
    *"RETURN_VALUE MAKE_CELL COPY_FREE_VARS NOT_TAKEN CALL CALL_FUNCTION".split(),
}
_OF_ITS_OWN = ("LOAD_", "STORE_FAST", "DELETE_FAST")  # and names that begin so
_CALLS = ("CALL", "CALL_FUNCTION")
_GLOBALS = ("__compiled_fn", "__import_")  # graphs, and modules
_DYNAMO = "__import_torch_dot__dynamo"  # of whose functions these may be called: lengths, where a graph takes several
_SIZES = {"call_size", "call_stride", "call_storage_offset"}
_SETS, _MODE = "object_setattr_ignore_descriptor", "training"  # which whoever evaluates an objective puts back


@functools.lru_cache(maxsize=256)
def does_nothing_beside(code: types.CodeType, modes: bool = False) -> bool:
    """Whether code of Dynamo's does nothing but call its graph. modes: it may also set the modes of modules.

    What is called for its effect is called without a look at its result.
    """
    instructions = [each for each in dis.get_instructions(code) if each.opname not in ("CACHE", "PRECALL")]
    effects = set_modes = 0
    for each, following in itertools.pairwise(instructions):
        name, value = each.opname, each.argval
        subscript = name == "BINARY_OP" and each.argrepr == "[]"  # since Python 3.14
        if not (name.startswith(_OF_ITS_OWN) or name in _LOOKS_UP or subscript):
            return False
        if name == "LOAD_GLOBAL":
            if not value.startswith(_GLOBALS):
                return False
            allowed = _SIZES | ({_SETS} if modes else set())
            if value.startswith(_DYNAMO) and following.argval not in allowed:
                return False
        effects += name in _CALLS and following.opname == "POP_TOP"
        set_modes += name == "LOAD_CONST" and value == _MODE
    return effects == (set_modes if modes else 0)
