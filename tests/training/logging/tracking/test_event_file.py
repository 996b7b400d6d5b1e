"""A file of events has each event at once, and says so if the disk is full."""

import errno
from pathlib import Path
from typing import Any

import pytest
from tensorboard_files import read_back
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary

from consyn_jax.training.logging.tracking.event_file import EventFile


def test_an_event_can_be_read_before_the_file_is_closed(tmp_path: Path) -> None:
    file = EventFile(tmp_path)
    file.write(Event(step=3, summary=Summary(value=[Summary.Value(tag="a", simple_value=1.5)])))
    assert read_back(tmp_path) == {"a": {3: 1.5}}
    file.close()
    file.close()


def test_a_write_that_the_disk_cuts_short_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        closed = True

        def write(self, data: bytes) -> int:
            return len(data) - 1

    file: Any = EventFile(tmp_path)
    file.close()
    monkeypatch.setattr(file, "_file", Full())
    with pytest.raises(OSError, match="No space left") as refused:
        file.write(Event(step=1))
    assert refused.value.errno == errno.ENOSPC
