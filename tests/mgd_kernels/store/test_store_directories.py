"""Directories of the state store: reopened, refused while another process holds them, swept after a crash."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from forked import run_python
from store_helpers import pattern, small_disk_store

from mgd_kernels.errors import StoreBusy, StoreClosed
from mgd_kernels.store import Store

IMPORTS = "import os, sys, torch\nfrom mgd_kernels.store import Store\n"


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run_python(IMPORTS + textwrap.dedent(code), *arguments)


def test_reopened_by_a_later_process(tmp_path):
    done = run(
        """
        store = Store.open(sys.argv[1], host=1 << 20, staging=1 << 18)
        store.put(("state", 1), [torch.arange(100_000), torch.ones(3).bfloat16()])
        store.put("late", torch.ones(7), tier="host")
        store.flush()
        os._exit(9)  # a crash: nothing is closed
        """,
        tmp_path / "s",
    )
    assert done.returncode == 9, done.stderr
    (tmp_path / "s" / "text-y.mgd.3.tmp").write_bytes(b"unfinished")
    (tmp_path / "s" / "notes.txt").write_bytes(b"the user's")
    with Store.open(tmp_path / "s") as store:
        assert store.keys() == [("state", 1)]
        numbers, ones = store.get(("state", 1))
        assert torch.equal(numbers, torch.arange(100_000)) and torch.equal(ones, torch.ones(3).bfloat16())
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["LOCK", "MGD_STORE", "notes.txt", "step-1-state.mgd"]


def test_a_second_store_is_refused_and_told_who_holds_it(tmp_path):
    with Store.open(tmp_path / "s"):
        with pytest.raises(StoreBusy, match=str(os.getpid())) as busy:
            Store.open(tmp_path / "s")
        assert busy.value.pid == os.getpid()
        other = run("Store.open(sys.argv[1])", tmp_path / "s")
        assert "StoreBusy" in other.stderr and f"process {os.getpid()} has it open" in other.stderr
    Store.open(tmp_path / "s").close()


def test_scratch_directories_come_and_go(tmp_path):
    with small_disk_store(tmp_path) as one, small_disk_store(tmp_path) as two:
        one.put("x", pattern(1000))
        two.put("x", pattern(1000, 1))
        assert len(list(tmp_path.iterdir())) == 2
        assert torch.equal(one.get("x"), pattern(1000))
    assert list(tmp_path.iterdir()) == []
    dropped = small_disk_store(tmp_path)
    dropped.put("x", pattern(1000))
    del dropped
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    script = IMPORTS + "s = Store(host=1 << 20, disk=(sys.argv[1], 1 << 20)); s.put('x', torch.ones(9))"
    left = subprocess.run([sys.executable, "-c", script, tmp_path])
    assert left.returncode == 0 and list(tmp_path.iterdir()) == []  # the interpreter's end closes it


def test_only_our_own_stale_directories_are_swept(tmp_path):
    crash = run(
        """
        s = Store(host=1 << 20, staging=1 << 20, disk=(sys.argv[1], 1 << 20))
        s.put('x', torch.ones(9)); s.flush(); os._exit(9)
        """,
        tmp_path,
    )
    assert crash.returncode == 9, crash.stderr
    (stale,) = tmp_path.iterdir()
    assert (stale / "text-x.mgd").exists()

    scratch = "mgd-kernels state store\nformat {}\n{}\nid " + "1" * 32 + "\ncleared " + "0" * 32 + "\n"
    kept = {
        "mgd-scratch-nomarker": {"data": "the user's"},
        "mgd-scratch-version3": {"MGD_STORE": scratch.format(3, "scratch")},
        "mgd-scratch-persistent": {"MGD_STORE": scratch.format(2, "persistent")},
        "mgd-scratch-mixed": {"MGD_STORE": scratch.format(2, "scratch"), "thesis.tex": "the user's"},
        "elsewhere": {"MGD_STORE": scratch.format(2, "scratch"), "text-a.mgd": "reached by a link only"},
    }
    for name, files in kept.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
    (tmp_path / "mgd-scratch-link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "mgd-scratch-file").write_text("a file")
    with small_disk_store(tmp_path) as running:
        running.put("x", pattern(10))
        with small_disk_store(tmp_path):  # sweeps again: the running one is left alone
            assert torch.equal(running.get("x"), pattern(10))
        running.flush()
        assert not stale.exists()
    for name, files in kept.items():
        assert {file: (tmp_path / name / file).read_text() for file in files} == files
    assert (tmp_path / "mgd-scratch-link").is_symlink() and (tmp_path / "mgd-scratch-file").exists()


@pytest.mark.filterwarnings("ignore:os.fork", "ignore::pytest.PytestUnraisableExceptionWarning")  # of JAX's fork hook
def test_closed_and_forked_stores_say_so(tmp_path):
    store = small_disk_store(tmp_path)
    store.put("x", pattern(10))
    pid = os.fork()
    if pid == 0:  # the child reports through its exit status and runs none of pytest's
        try:
            store.put("y", pattern(10))
        except StoreClosed as error:
            store.close()  # must neither hang nor remove the parent's files
            os._exit(7 if "fork" in str(error) else 1)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert torch.equal(store.get("x"), pattern(10))
    store.close()
    store.close()
    for call in (store.keys, store.flush, store.stats, lambda: store.get("x"), lambda: store.put("x", pattern(1))):
        with pytest.raises(StoreClosed):
            call()
