"""Python code in a process of its own, forked from one that has imported torch and the package, which takes seconds."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import traceback
from pathlib import Path
from typing import Any, NoReturn


def run_python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """As `python -c code arguments...` with these variables, but that nothing runs at the interpreter's end."""
    with tempfile.TemporaryDirectory() as folder:
        request = {"code": textwrap.dedent(code), "arguments": [*map(str, arguments)], "environment": environment}
        server = _server()
        assert server.stdin is not None and server.stdout is not None
        print(json.dumps(request | {"folder": folder}), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        out, err = ((Path(folder) / name).read_text() for name in ("out", "err"))
    return subprocess.CompletedProcess(code, status, out, err)


@functools.cache
def _server() -> subprocess.Popen[str]:
    """It ends when this process does."""
    command = [sys.executable, "-W", "ignore", __file__]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _child(code: str, arguments: list[str], environment: dict[str, str], folder: str) -> NoReturn:
    status: Any = 1
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT, 0o600), number)
        os.environ.update(environment)
        sys.argv[1:] = arguments
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _serve() -> None:
    import torch  # noqa: F401

    import mgd_kernels.backends.cpu
    import mgd_kernels.store  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _child(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
