import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consyn_jax.errors import UserError
from consyn_jax.training.logging.trackers import Trackers, build_trackers


class Recorder:
    def __init__(self, fail_on: str = "") -> None:
        self.calls: list[Any] = []
        self.fail_on = fail_on

    def _note(self, name: str, *arguments: Any) -> None:
        self.calls.append((name, *arguments))
        if name == self.fail_on:
            raise RuntimeError(f"no {name}\ntoday")

    def start(self, config: Mapping[str, Any]) -> None:
        self._note("start", dict(config))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._note("log", step, dict(values))

    def sample(self, step: int, text: str) -> None:
        self._note("sample", step, text)

    def close(self) -> None:
        self._note("close")


class TestTrackers:
    @pytest.mark.parametrize("method", ["start", "log", "sample", "close"])
    def test_a_failing_tracker_is_reported_once_and_the_others_continue(self, method: str) -> None:
        good, bad, warnings = Recorder(), Recorder(method), []
        trackers = Trackers({"bad": bad, "good": good}, {"lr": 1e-3}, warnings.append)
        for step in (1, 2):
            trackers.log(
                step, {"train/loss": np.float32(1.5), "event": "save", "flag": True, "none": None}
            )
            trackers.sample(step, "text")
        trackers.close()
        trackers.close()
        assert good.calls == [
            ("start", {"lr": 1e-3}),
            ("log", 1, {"train/loss": 1.5}),
            ("sample", 1, "text"),
            ("log", 2, {"train/loss": 1.5}),
            ("sample", 2, "text"),
            ("close",),
        ]
        assert [call[0] for call in bad.calls].count(method) == 1
        assert bad.calls[-1][0] == method
        assert len(warnings) == 1
        assert f"RuntimeError: no {method} today." in warnings[0]

    def test_a_tracker_that_cannot_start_is_reported_and_an_interrupt_is_not_swallowed(
        self,
    ) -> None:
        class Missing(Recorder):
            def start(self, config: Mapping[str, Any]) -> None:
                raise ImportError("no such library")

        warnings: list[str] = []
        Trackers({"bad": Missing()}, {}, warnings.append).log(1, {"a": 1.0})
        assert "no such library" in warnings[0]

        class Interrupting(Recorder):
            def log(self, step: int, values: Mapping[str, float]) -> None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Trackers({"it": Interrupting()}, {}, warnings.append).log(1, {"a": 1.0})

    def test_an_unknown_backend_is_a_user_error(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="Known: tensorboard, wandb, both, none"):
            build_trackers("tensorbord", directory=tmp_path, project="p", warn=print)
        trackers = build_trackers("none", directory=tmp_path, project="p", warn=pytest.fail)
        trackers.log(1, {"a": 1.0})
        assert trackers.run_id is None
        assert not list(tmp_path.iterdir())


def tensorboard_events(path: Path) -> list[Any]:
    from tensorboardX.crc32c import crc32c
    from tensorboardX.proto.event_pb2 import Event

    def masked(data: bytes) -> int:
        crc = crc32c(data)
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    data, events, at = path.read_bytes(), [], 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 8], "little")
        assert int.from_bytes(data[at + 8 : at + 12], "little") == masked(data[at : at + 8])
        payload = data[at + 12 : at + 12 + length]
        assert int.from_bytes(data[at + 12 + length : at + 16 + length], "little") == masked(
            payload
        )
        events.append(Event.FromString(payload))
        at += 16 + length
    return events


class TestTensorBoard:
    def test_events_are_on_disk_at_once_and_can_be_read(self, tmp_path: Path) -> None:
        trackers = build_trackers("tensorboard", directory=tmp_path, project="p", warn=pytest.fail)
        trackers.log(7, {"train/loss": 2.5, "eval/loss": math.nan})
        trackers.sample(7, "To be\n# or not")
        (path,) = (tmp_path / "logs").iterdir()
        assert path.name.startswith("events.out.tfevents.")
        version, scalars, sample = tensorboard_events(path)
        assert version.file_version == "brain.Event:2"
        assert scalars.step == 7
        assert scalars.summary.value[0].tag == "train/loss"
        assert scalars.summary.value[0].simple_value == 2.5
        assert math.isnan(scalars.summary.value[1].simple_value)
        assert sample.summary.value[0].tensor.string_val[0] == b"    To be\n    # or not"
        trackers.close()

    def test_a_resume_writes_a_new_file_that_purges_later_steps(self, tmp_path: Path) -> None:
        for resume_step in (None, 5, 5):
            trackers = build_trackers(
                "tensorboard",
                directory=tmp_path,
                project="p",
                resume_step=resume_step,
                warn=pytest.fail,
            )
            trackers.log(6, {"train/loss": 1.0})
            trackers.close()
        files = sorted((tmp_path / "logs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        assert len(files) == 3
        first, second, third = map(tensorboard_events, files)
        assert len(first) == 2
        for events in (second, third):
            assert (events[1].step, events[1].session_log.status) == (
                6,
                1,
            )  # SessionLog.START: forget from step 6 on

    def test_a_directory_that_cannot_be_written_is_a_warning(self, tmp_path: Path) -> None:
        (tmp_path / "logs").write_text("in the way")
        warnings: list[str] = []
        trackers = build_trackers(
            "tensorboard", directory=tmp_path, project="p", warn=warnings.append
        )
        trackers.log(1, {"a": 1.0})
        trackers.close()
        assert len(warnings) == 1
        assert "TensorBoard failed and is switched off" in warnings[0]


WANDB = """if True:
    import sys
    from pathlib import Path
    from consyn_jax.training.logging.trackers import build_trackers
    warnings = []
    directory, run_id = Path(sys.argv[1]), sys.argv[2] or None
    about = {"project": "p", "run_name": "name", "config": {"lr": 1e-3}, "run_id": run_id}
    trackers = build_trackers("wandb", directory=directory, **about, warn=warnings.append)
    trackers.log(1, {"train/loss": 2.5})
    trackers.sample(1, "<b>To be</b>")
    print(trackers.run_id, file=sys.stderr)
    trackers.close()
    print(len(warnings), *warnings, file=sys.stderr)
"""


class TestWandb:
    def run(self, directory: Path, run_id: str = "", **environment: str) -> tuple[str, list[str]]:
        keep = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
        done = subprocess.run(
            [sys.executable, "-c", WANDB, str(directory), run_id],
            env={**keep, "HOME": str(directory), "WANDB__DISABLE_STATS": "true", **environment},
            capture_output=True,
            text=True,
            check=True,
            timeout=100,
        )
        return done.stdout, done.stderr.splitlines()

    @pytest.mark.slow
    def test_offline_needs_no_network_and_no_key_and_continues_the_same_run(
        self, tmp_path: Path
    ) -> None:
        out, err = self.run(tmp_path, WANDB_MODE="offline")
        assert out == ""
        assert err[-1] == "0"
        (run_id,) = (
            line
            for line in err
            if any(
                path.name.endswith(f"-{line}")
                for path in (tmp_path / "wandb").glob("offline-run-*")
            )
        )
        (directory,) = (tmp_path / "wandb").glob("offline-run-*")
        assert (directory / f"run-{run_id}.wandb").stat().st_size > 100
        assert [b"&lt;b&gt;To be" in page.read_bytes() for page in directory.rglob("*.html")] == [
            True
        ]
        out, err = self.run(tmp_path, run_id=run_id, WANDB_MODE="offline")
        assert out == ""
        assert run_id in err

    def test_without_a_key_the_run_is_kept_offline_with_a_warning(self, tmp_path: Path) -> None:
        out, err = self.run(tmp_path)
        assert out == ""
        assert err[-1].startswith("1 Weights & Biases: ")
        assert "wandb sync" in err[-1]
        assert list((tmp_path / "wandb").glob("offline-run-*"))
