"""Digests of code: the same in every process, and others for other code."""

from __future__ import annotations

import functools
import subprocess
import sys

from torch import nn

from mgd.util.fingerprint import code_digest, source_digest

SOURCE = """
from mgd.util.fingerprint import code_digest
print(code_digest(lambda x: x in {"a", "b", "c", "d", "e"}))
"""


def scaled(inner, by):
    return lambda x: by(inner(x))


class Twice:
    def __call__(self, x):
        return 2 * x


class Thrice:
    def __call__(self, x):
        return 3 * x


def test_other_code_has_another_digest():
    functions = [
        lambda x: x + 1,
        lambda x: x + 2,
        lambda x: x - 1,
        scaled(lambda x: x, lambda x: 2 * x),
        scaled(lambda x: x, lambda x: 3 * x),
        functools.partial(lambda x, y: x, y=1),
        functools.partial(lambda x, y: x, y=2),
        Twice(),
        Thrice(),
        nn.Linear(1, 1).forward,
        nn.Conv1d(1, 1, 1).forward,
    ]
    digests = [code_digest(function) for function in functions]
    assert len(set(digests)) == len(functions)
    assert code_digest(lambda x: x + 1) == digests[0]


def test_what_refers_to_itself_has_a_digest():
    def even(n):
        return n == 0 or odd(n - 1)

    def odd(n):
        return n > 0 and even(n - 1)

    assert code_digest(even) != code_digest(odd)


def test_the_order_of_a_set_does_not_count():
    command = [sys.executable, "-W", "ignore", "-c", SOURCE]
    found = {subprocess.run(command, env={"PYTHONHASHSEED": str(seed)}, capture_output=True).stdout for seed in (1, 2)}
    assert len(found) == 1 and len(found.pop()) == 33


def test_the_source_of_a_package_has_a_digest():
    assert source_digest("mgd.util") == source_digest("mgd.util") != source_digest("mgd.plan")
