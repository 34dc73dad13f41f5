"""Whose a directory and its files are: forks, links, left-overs, clearing, and threads that cannot be made."""

from __future__ import annotations

import os
import signal
import subprocess
import textwrap
import time

import pytest
import torch
from forked import run_python
from store_helpers import MB, pattern, small_disk_store

from mgd_kernels.errors import CorruptState, StoreBusy, StoreIOError, UnknownFormat
from mgd_kernels.store import Store


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    imports = "import os, sys, time, torch\nfrom mgd_kernels.store import Store\n"
    return run_python(imports + textwrap.dedent(code), *arguments)


# --- forks


def test_a_fork_does_not_hold_the_lock_of_its_parent(tmp_path):
    done = run(
        """
        store = Store.open(sys.argv[1])
        store.put("x", torch.arange(5))
        store.flush()
        pid = os.fork()
        if pid == 0:
            os.closerange(0, 3)  # so that nobody waits for us
            time.sleep(60)
        print(pid, flush=True)
        os._exit(9)
        """,
        tmp_path / "s",
    )
    child = int(done.stdout)
    try:
        os.kill(child, 0)  # it is there, and has everything of its parent's but the lock
        with Store.open(tmp_path / "s") as store:
            assert store.get("x").tolist() == [0, 1, 2, 3, 4]
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_lock_of_which_no_running_process_is_known(tmp_path):
    """Who shares the open file holds the lock; the process that wrote its id may be gone."""
    with Store.open(tmp_path / "s"):
        (tmp_path / "s" / "LOCK").write_text(f"{2**22 + 1}\n")  # above any process id
        with pytest.raises(StoreBusy, match="process unknown"):
            Store.open(tmp_path / "s")


def test_a_fork_may_drop_what_its_parent_had(tmp_path):
    """While the parent's threads work, whose locks nobody in the fork would ever release."""
    done = run(
        """
        store = Store.open(sys.argv[1], host=1 << 22, threads=4)
        for i in range(60):
            store.put(("x", i), torch.arange(4096))
            held = [store.reserve([64], torch.float32), store.view(("x", i))]
            pid = os.fork()
            if pid == 0:
                del held
                store.close()
                del store
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
            del held
        for i in range(60):
            assert torch.equal(store.get(("x", i)), torch.arange(4096))
        store.close()
        """,
        tmp_path / "s",
    )
    assert done.returncode == 0, done.stderr


# --- links


def test_nothing_is_written_through_a_link(tmp_path):
    """Whoever may write to the directory cannot make the store change a file elsewhere."""
    theirs = tmp_path / "theirs"
    for place in ("LOCK", "MGD_STORE.tmp"):
        for make in (os.symlink, os.link):
            theirs.write_text("theirs")
            directory = tmp_path / f"{place}-{make.__name__}"
            directory.mkdir()
            make(theirs, directory / place)
            try:
                Store.open(directory).close()
            except (StoreIOError, UnknownFormat) as error:
                assert place == "LOCK" and str(directory) in str(error)
            assert theirs.read_text() == "theirs" and theirs.stat().st_nlink <= 2
    theirs.write_text("1234\n")  # as a lock file reads
    for make in (os.symlink, os.link):
        with Store.open(tmp_path / f"s-{make.__name__}"):
            pass
        lock = tmp_path / f"s-{make.__name__}" / "LOCK"
        lock.unlink()
        make(theirs, lock)
        with pytest.raises(StoreIOError, match="LOCK"):
            Store.open(lock.parent)
    assert theirs.read_text() == "1234\n"


def test_files_are_for_their_user_alone(tmp_path):
    before = os.umask(0)
    try:
        with Store.open(tmp_path / "a" / "s") as store, small_disk_store(tmp_path / "b") as scratch:
            store.put("x", pattern(10))
            scratch.put("x", pattern(10))
            store.flush()
            scratch.flush()
            modes = {p.relative_to(tmp_path): (p.is_dir(), p.stat().st_mode & 0o777) for p in tmp_path.rglob("*")}
    finally:
        os.umask(before)
    assert len(modes) == 10 and set(modes.values()) == {(True, 0o700), (False, 0o600)}, modes


# --- left-overs


def test_scratch_directories_of_a_crash_are_removed(tmp_path):
    """Also those of a power failure before the marker, and those whose files NFS still kept when they were removed."""
    mine = {
        "mgd-scratch-aaaaaa": [],
        "mgd-scratch-bbbbbb": ["LOCK"],
        "mgd-scratch-cccccc": ["LOCK", "MGD_STORE.tmp"],
        "mgd-scratch-dddddd": [".nfs000000000012ab0500000001"],
    }
    theirs = {
        "mgd-scratch-eeeeee": ["notes.txt"],
        "mgd-scratch-ffffff": ["LOCK", ".nfs-notes"],
        "mgd-scratch-gggggg": ["text-x.mgd"],
        "mgd-scratch-of-mine": [],
    }
    for name, files in (mine | theirs).items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).touch()
    with small_disk_store(tmp_path) as store:
        store.put("x", pattern(10))
        store.flush()
        (own,) = {p.name for p in tmp_path.iterdir()} - set(mine) - set(theirs)
        (tmp_path / own / ".nfs000000000012ab0500000002").touch()
    assert {p.name for p in tmp_path.iterdir()} == set(theirs)
    kept = {name: sorted(p.name for p in (tmp_path / name).iterdir()) for name in theirs}
    assert kept == {name: sorted(files) for name, files in theirs.items()}


def test_stores_that_begin_at_once_leave_each_other_alone(tmp_path):
    """A new scratch directory has no marker yet: a sweep of another process may take it for a left-over."""
    done = run(
        """
        children = []
        for _ in range(3):
            children.append(os.fork())
            if children[-1] == 0:
                for i in range(40):
                    with Store(host=1 << 20, disk=(sys.argv[1], 1 << 30)) as store:
                        store.put("x", torch.full((9,), i))
                        assert store.get("x")[0] == i
                os._exit(0)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


# --- clearing


def test_clear_removes_everything(tmp_path):
    with Store.open(tmp_path / "s") as store:
        for i in range(5):
            store.put(("x", i), pattern(MB, i))  # some are still being written
        store.clear()
        assert store.keys() == [] and len(store) == 0
        with pytest.raises(KeyError):
            store.get(("x", 0))
        store.put("y", pattern(100))
        store.flush()
        assert store.stats()["disk"]["used"] == 2 * 4096
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["LOCK", "MGD_STORE", "text-y.mgd"]
    with Store.open(tmp_path / "s") as store:
        assert torch.equal(store.get("y"), pattern(100))
    with Store(host=MB, staging=MB // 2, disk=(tmp_path, MB)) as store:
        store.put("x", pattern(100), tier="host")
        store.put("y", pattern(100), tier="disk")
        store.clear()
        assert store.keys() == [] and store.stats()["host"]["used"] == 0


def test_what_was_cleared_never_comes_back(tmp_path):
    """The files of a store whose process died after the marker was replaced, before any was removed."""
    with Store.open(tmp_path / "s") as store:
        store.put("x", pattern(100))
        store.flush()
        data = (tmp_path / "s" / "text-x.mgd").read_bytes()
        store.clear()
    (tmp_path / "s" / "text-x.mgd").write_bytes(data)
    with Store.open(tmp_path / "s") as store:
        assert store.keys() == []
        assert not (tmp_path / "s" / "text-x.mgd").exists()


def test_a_clear_that_fails_changes_nothing(inject, tmp_path):
    with Store.open(tmp_path / "s") as store:
        store.put("x", pattern(100))
        store.flush()
        inject("rename_error")
        with pytest.raises(StoreIOError, match="marker"):
            store.clear()
        assert torch.equal(store.get("x"), pattern(100))
        store.put("y", pattern(100, 1))
    with Store.open(tmp_path / "s") as store:
        assert torch.equal(store.get("x"), pattern(100)) and torch.equal(store.get("y"), pattern(100, 1))


# --- threads, lists, bounds


def test_a_thread_that_cannot_be_made(inject, tmp_path):
    """An error, no thread of the others is left, and signals arrive as before."""
    before, threads = signal.pthread_sigmask(signal.SIG_BLOCK, ()), len(os.listdir("/proc/self/task"))
    for nth in (1, 3):
        inject("thread_error", nth)
        with pytest.raises(StoreIOError, match="cannot start a thread") as told:
            Store.open(tmp_path / "s", threads=4)
        assert "ulimit -u" in str(told.value) and str(tmp_path / "s") in str(told.value)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
        assert len(os.listdir("/proc/self/task")) == threads
    Store.open(tmp_path / "s", threads=4).close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user with a limit of processes")
def test_a_user_who_may_have_no_more_threads(tmp_path):
    os.chmod(tmp_path, 0o777)
    done = run(
        """
        import resource
        from mgd_kernels.errors import StoreIOError
        from mgd_kernels import _core
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        try:
            Store.open(sys.argv[1], threads=64)
        except StoreIOError as error:
            print(error.errno)
        """,
        tmp_path / "s",
    )
    assert (done.returncode, done.stdout) == (0, "11\n"), done.stderr


def test_a_directory_that_cannot_be_listed_is_not_empty(inject, tmp_path):
    with Store.open(tmp_path / "s") as store:
        store.put("x", pattern(100))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("theirs")
    for name in ("s", "theirs"):
        inject("list_error", 1, 9)
        with pytest.raises(StoreIOError, match="list"):
            Store.open(tmp_path / name)
    inject("list_error", 1, 9)
    with pytest.raises(StoreIOError, match="list"):
        Store(host=MB, disk=(tmp_path, MB))
    inject("none")
    assert [p.name for p in (tmp_path / "theirs").iterdir()] == ["thesis.tex"]
    with Store.open(tmp_path / "s") as store:
        assert torch.equal(store.get("x"), pattern(100))


def test_opening_costs_what_the_files_are_worth(tmp_path):
    """A header states its length; nothing believes it beyond the bound of the format."""
    with Store.open(tmp_path / "s") as store:
        store.put("x", pattern(100))
    for i in range(8):
        with (tmp_path / "s" / f"step-{i}-x.mgd").open("wb") as file:
            file.write(b"MGDSTATE" + (2).to_bytes(4, "little") + bytes(4) + (2 << 30).to_bytes(8, "little"))
            file.truncate(3 << 30)
    begin = time.process_time()
    with Store.open(tmp_path / "s") as store:
        assert time.process_time() - begin < 2
        for i in range(8):
            with pytest.raises(CorruptState, match="header of whole pages"):
                store.get(("x", i))


def test_names_that_spell_no_key_are_no_entries(tmp_path):
    with Store.open(tmp_path / "s") as store:
        store.put(("x", 7), pattern(100))
    for name in ("text-%FF", "text-%C0%80", "text-%ED%A0%80", "step-007-x", "step--0-x", "step-7-%FF", "text-a%2"):
        (tmp_path / "s" / f"{name}.mgd").write_bytes(b"theirs")
    with Store.open(tmp_path / "s") as store:
        assert store.keys() == [("x", 7)]
    assert len(list((tmp_path / "s").glob("*.mgd"))) == 8


@pytest.mark.parametrize("name", [b"\xff", "ü".encode(), b"a\nb"])
def test_directories_of_any_name(tmp_path, name):
    """A name is bytes; it comes back in errors and in the statistics."""
    place = os.fsencode(tmp_path) + b"/" + name
    with Store.open(os.fsdecode(place)) as store:
        assert os.fsencode(store.stats()["disk"]["directory"]) == place
        with pytest.raises(StoreBusy) as told:
            Store.open(os.fsdecode(place))
        assert os.fsencode(told.value.path) == place
        store.put("x", pattern(100))
        store.flush()
        (tmp_path / os.fsdecode(name) / "text-x.mgd").write_bytes(b"")
        with pytest.raises(CorruptState):
            store.get("x")
