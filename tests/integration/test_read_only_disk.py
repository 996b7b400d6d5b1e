"""A file system that the kernel turns read-only under a run: one sentence, the first error, and 2.

ext4 does so by itself when it meets an error (`errors=remount-ro`); here it is told of one.
"""

import os
import time
from pathlib import Path

import pytest

from .conftest import Run, cannot_run
from .nursery import FLAGS, Nursery, held
from .test_power_cuts import copied, mounted, refusal

pytestmark = pytest.mark.slow

IMAGE_BYTES = 64 << 20


def loop_of(place: Path) -> Path:
    """Where the file system mounted at `place` is told of an error."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        device, where, *_ = line.split()
        if where == str(place):
            return Path("/sys/fs/ext4") / Path(device).name / "trigger_fs_error"
    raise AssertionError(f"{place} is not mounted")


def test_it_ends_with_one_sentence_and_goes_on_once_it_can_be_written(
    nursery: Nursery, corpus: Path, tmp_path: Path
) -> None:
    if reason := refusal():
        cannot_run(reason)
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    assert os.system(f"mkfs.ext4 -q -F -e remount-ro {image}") == 0
    run = [*FLAGS, "--save_steps", "3", "--data", corpus, "--max_steps", "30"]
    with mounted(image, tmp_path / "disk") as place:
        trigger = loop_of(place)
        if not os.access(trigger, os.W_OK):
            cannot_run(f"{trigger} cannot be written here")
        path = place / "run"
        told = tmp_path / "told"
        child = nursery.start(*run, "--output", path, before=held(6, told))
        deadline = time.monotonic() + 240
        while not (path / "checkpoints" / "6").is_dir():
            assert child.alive, child.said
            assert time.monotonic() < deadline
            time.sleep(0.05)
        trigger.write_text("1")
        told.touch()
        assert child.wait() == 2, child.said
        said = child.said.strip().splitlines()
        assert "Read-only file system" in said[-1], child.said
        assert sum(line.startswith("consyn-train: ") for line in said) == 1
        assert "Traceback" not in child.said
    # Another process's mount namespace may still hold the first file system.
    with mounted(copied(image, tmp_path / "again"), tmp_path / "disk") as place:
        child = nursery.start(*run, "--output", place / "run")
        assert child.wait() == 0, child.said
        found = Run(place / "run", 0, child.said)
        assert [line["step"] for line in found.lines if "train/loss" in line] == list(range(1, 31))
        assert "resume" in found.events
