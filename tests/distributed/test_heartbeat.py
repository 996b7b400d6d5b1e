"""The file that shows an orchestrator that a process is alive."""

import os
import time
from pathlib import Path

import pytest

from consyn_jax.cli import train
from consyn_jax.distributed import heartbeat
from consyn_jax.errors import UserError


def touched_again(file: Path) -> bool:
    os.utime(file, (0, 0))
    deadline = time.monotonic() + 120
    while file.stat().st_mtime == 0:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_the_file_is_touched_while_the_process_is_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "heartbeat"
    monkeypatch.setenv(heartbeat.VARIABLE, str(file))
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.01)
    with heartbeat.heartbeat():
        assert file.exists()
        assert touched_again(file)
    os.utime(file, (0, 0))
    time.sleep(0.1)
    assert file.stat().st_mtime == 0


def test_a_failing_touch_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.setenv(heartbeat.VARIABLE, str(place / "heartbeat"))
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.01)
    with heartbeat.heartbeat():
        place.rename(tmp_path / "gone")
        said, deadline = "", time.monotonic() + 120
        while "heartbeat cannot be written" not in said and time.monotonic() < deadline:
            time.sleep(0.01)
            said += capfd.readouterr().err
        time.sleep(0.1)  # for more of them, if there are
        (tmp_path / "gone").rename(place)
        assert touched_again(place / "heartbeat")
    assert (said + capfd.readouterr().err).count("heartbeat cannot be written") == 1


def test_consyn_train_has_a_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(heartbeat.VARIABLE, str(tmp_path / "none" / "heartbeat"))
    with pytest.raises(UserError, match="CONSYN_HEARTBEAT"), heartbeat.heartbeat():
        pass
    assert train.main(["--model", "haiku", "--output", str(tmp_path / "run")]) == 2
    assert "CONSYN_HEARTBEAT" in capfd.readouterr().err
