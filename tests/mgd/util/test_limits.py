"""Free memory under every kind of limit, read from file systems made for the test."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from mgd.util.system import free_memory

GB = 10**9
V2 = "30 23 0:26 {top} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 23 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
    "32 23 0:28 {top} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch):
    """What malloc holds in this process counts as free, once a test has made it hold on to it."""
    monkeypatch.setattr("mgd.util.system._unused_heap", lambda: 0)


class System:
    """A root file system with 64 GB of free memory."""

    def __init__(self, root: Path):
        self.root = root
        self.write("proc/meminfo", f"MemTotal: 90000000 kB\nMemAvailable: {64 * GB // 1024} kB\n")
        self.write("proc/self/status", "Name:\tpython\nVmSize:\t 1000000 kB\nVmData:\t 400000 kB\n")

    def write(self, path: str, text: object) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(str(text))

    def place(self, group: str, mounts: str, top: str = "/") -> None:
        self.write("proc/self/cgroup", group + "\n")
        self.write("proc/self/mountinfo", "23 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + mounts.format(top=top))

    def v2(self, group: str, limit: object, used: int, **other: object) -> None:
        for name, value in {"max": limit, "current": used, **other}.items():
            self.write(f"sys/fs/cgroup{group}/memory.{name}", value)

    def v1(self, group: str, limit: int, used: int) -> None:
        self.write(f"sys/fs/cgroup/memory{group}/memory.limit_in_bytes", limit)
        self.write(f"sys/fs/cgroup/memory{group}/memory.usage_in_bytes", used)

    def free(self) -> int:
        return free_memory(self.root)


@pytest.fixture
def system(tmp_path, monkeypatch):
    set_limits(monkeypatch)
    return System(tmp_path)


def set_limits(monkeypatch, **limits: int) -> None:
    by_number = {getattr(resource, name): value for name, value in limits.items()}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (by_number.get(which, resource.RLIM_INFINITY), -1))


def test_without_limits(system):
    assert system.free() == pytest.approx(64 * GB, rel=1e-6)


@pytest.mark.parametrize("limited", ["", "/system.slice", "/system.slice/job_7", "/system.slice/job_7/task_0"])
def test_a_limit_on_any_level_of_version_2(system, limited):
    group = "/system.slice/job_7/task_0"
    system.place(f"0::{group}", V2)
    for level in ("/system.slice", "/system.slice/job_7", group):
        system.v2(level, "max", 5 * GB)
    system.v2(limited, 8 * GB, 5 * GB)
    assert system.free() == 3 * GB


def test_each_level_has_a_usage_of_its_own(system):
    system.place("0::/a/b", V2)
    system.v2("/a", 20 * GB, 19 * GB)  # others in it have taken most
    system.v2("/a/b", 8 * GB, 2 * GB)
    assert system.free() == 1 * GB


def test_the_limit_above_which_a_group_is_slowed_counts_and_read_files_do_not(system):
    system.place("0::/a", V2)
    system.v2("/a", 9 * GB, 6 * GB, high=7 * GB, stat=f"anon {GB}\ninactive_file {4 * GB}\nactive_file {GB}\n")
    assert system.free() == 5 * GB


@pytest.mark.parametrize("limited", ["", "/slurm", "/slurm/job_7"])
def test_a_limit_on_any_level_of_version_1(system, limited):
    system.place("5:cpu,cpuacct:/elsewhere\n4:memory:/slurm/job_7\n0::/", V1)
    for level in ("", "/slurm", "/slurm/job_7"):
        system.v1(level, 0x7FFFFFFFFFFFF000, 2 * GB)
    system.v1(limited, 6 * GB, 2 * GB)
    assert system.free() == 4 * GB


@pytest.mark.parametrize(("group", "top"), [("/docker/1f/inner", "/docker/1f"), ("/../../other", "/")])
def test_a_container_sees_a_part_of_the_tree(system, group, top):
    system.place(f"0::{group}", V2, top)
    system.v2("", 6 * GB, 2 * GB)
    assert system.free() == 4 * GB


def test_more_in_use_than_a_limit_allows(system):
    system.place("0::/a", V2)
    system.v2("/a", 2 * GB, 3 * GB)
    assert system.free() == 0


@pytest.mark.parametrize(("name", "used"), [("RLIMIT_AS", 1_000_000 * 1024), ("RLIMIT_DATA", 400_000 * 1024)])
def test_limits_of_the_shell(system, monkeypatch, name, used):
    set_limits(monkeypatch, **{name: 4 * GB})
    assert system.free() == 4 * GB - used
