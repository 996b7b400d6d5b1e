"""Disks and limits: this machine's figures are the system's own, and bad ones are named."""

import dataclasses
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest

from consyn_jax.doctor import system_facts
from consyn_jax.doctor.machine_findings import FAIL, INFO, PASS, WARN, Finding
from consyn_jax.doctor.system_checks import check_limits, check_storage
from consyn_jax.doctor.system_facts import (
    EXCLUSIVE,
    MISSING,
    SHARED_BY_ALL,
    Limits,
    Storage,
    file_system,
    read_limits,
    read_storage,
)

DISK = Storage("/data", "ext4", 10**12, 5 * 10**11, 10**7, "", 1e9, 2e9, EXCLUSIVE)
LIMITS = Limits(1024, 524_288, 64, 10**12, 1 << 36, 1 << 36)


def storage(**changes: Any) -> dict[str, Finding]:
    return {each.name: each for each in check_storage(dataclasses.replace(DISK, **changes))}


def limits(num_gpus: int = 8, **changes: Any) -> dict[str, Finding]:
    found = check_limits(dataclasses.replace(LIMITS, **changes), num_gpus)
    return {each.name: each for each in found}


def test_good_ones_pass() -> None:
    assert {each.status for each in storage().values()} == {PASS}
    assert {name: each.status for name, each in limits().items()} == {
        "machine": INFO,
        "open files": PASS,
        "shared memory": PASS,
    }


@pytest.mark.parametrize(
    ("changes", "name", "status", "words"),
    [
        ({"free": 0, "refusal": "No space left"}, "disk space", FAIL, "0 bytes free of 1.0 TB"),
        ({"free": 10**8}, "disk space", FAIL, "100.0 MB free"),
        ({"free": 10**10}, "disk space", WARN, "10.0 GB free"),
        ({"free_files": 0}, "disk files", FAIL, "0 more files"),
        ({"free_files": 5_000}, "disk files", WARN, "5,000 more files"),
        ({"kind": "tmpfs"}, "file system", WARN, "do not outlive a reboot"),
        ({"kind": "overlay"}, "file system", WARN, "do not outlive the container"),
        ({"write_rate": 2e7}, "disk speed", WARN, "writes 20.0 MB/s"),
        ({"locks": MISSING}, "file locks", WARN, "none"),
        ({"locks": SHARED_BY_ALL}, "file locks", FAIL, "got a lock that was held"),
    ],
)
def test_each_fault_of_a_disk_is_named_and_nothing_else(
    changes: dict[str, Any], name: str, status: str, words: str
) -> None:
    found = storage(**changes)
    assert found[name].status == status
    assert words in found[name].found
    assert {each.status for other, each in found.items() if other != name} <= {PASS}


def test_a_directory_that_cannot_be_written_is_one_line() -> None:
    found = storage(refusal="Permission denied", locks=None, write_rate=None, read_rate=None)
    assert [(each.name, each.status) for each in found.values()] == [("output directory", FAIL)]
    assert "Permission denied" in found["output directory"].found


@pytest.mark.parametrize(
    ("soft", "hard", "status", "advice"),
    [
        (64, 64, FAIL, "Ask the administrator"),
        (64, 4096, FAIL, "Run ulimit -n 4096"),
        (512, float("inf"), WARN, "Run ulimit -n 65536"),
        (1024, 1024, PASS, ""),
        (float("inf"), float("inf"), PASS, ""),
    ],
)
def test_open_files(soft: float, hard: float, status: str, advice: str) -> None:
    found = limits(open_files=soft, most_open_files=hard)["open files"]
    assert found.status == status
    assert advice in found.advice


@pytest.mark.parametrize(
    ("total", "free", "num_gpus", "status"),
    [
        (64 << 20, 60 << 20, 8, WARN),  # Docker's default
        (64 << 20, 60 << 20, 1, PASS),
        (64 << 20, 1 << 20, 8, FAIL),
        (None, None, 8, FAIL),
        (None, None, 0, INFO),
    ],
)
def test_shared_memory(total: int | None, free: int | None, num_gpus: int, status: str) -> None:
    found = limits(num_gpus, shared_memory=total, shared_memory_free=free)
    assert found["shared memory"].status == status


# -------------------------------------------------------------------------------------- this machine


def test_the_limits_of_this_machine_are_the_systems_own() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
    try:
        found = read_limits()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    hard = float("inf") if before[1] == resource.RLIM_INFINITY else before[1]
    assert (found.open_files, found.most_open_files) == (200, hard)
    assert found.cores == len(os.sched_getaffinity(0))
    assert found.memory <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert found.shared_memory == shutil.disk_usage("/dev/shm").total
    assert check_limits(found, 0)[1].status == FAIL


@pytest.mark.parametrize(("text", "most"), [("150000 100000\n", 2), ("max 100000\n", 10**6)])
def test_the_quota_of_a_container_counts(text: str, most: int, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert system_facts._cores(tmp_path / "cpu.max") == min(most, len(os.sched_getaffinity(0)))


def test_the_disk_of_this_machine(tmp_path: Path) -> None:
    found = read_storage(tmp_path / "no" / "such", measure=True, probe_bytes=16 << 20)
    usage = shutil.disk_usage(tmp_path)
    assert found.directory == str(tmp_path)
    assert found.total == usage.total
    assert abs(found.free - usage.free) < 1 << 30
    assert (found.locks, found.refusal) == (EXCLUSIVE, "")
    assert found.write_rate is not None
    assert found.write_rate > 1e5
    assert list(tmp_path.iterdir()) == []


def test_without_measuring_nothing_large_is_written(tmp_path: Path) -> None:
    found = read_storage(tmp_path, measure=False)
    assert (found.write_rate, found.read_rate, found.locks) == (None, None, EXCLUSIVE)


def test_a_disk_that_fills_up_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, num_bytes: int) -> tuple[float, float]:
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr(system_facts, "_rates", full)
    found = read_storage(tmp_path, measure=True, probe_bytes=1)
    assert found.refusal == "No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_the_innermost_mount_counts(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    inside = tmp_path / "a b"
    inside.mkdir()
    mounts.write_text(
        "22 1 0:1 / / rw shared:1 - overlay overlay rw\n"
        f"23 22 0:2 / {tmp_path} rw - ext4 /dev/sda rw\n"
        f"24 22 0:3 / {tmp_path}/a\\040b rw shared:2 master:3 - nfs4 server:/x rw\n"
    )
    assert file_system(inside, mounts) == "nfs4"
    assert file_system(tmp_path, mounts) == "ext4"
    assert file_system(Path("/"), mounts) == "overlay"
    assert file_system(tmp_path, tmp_path / "none") == ""
