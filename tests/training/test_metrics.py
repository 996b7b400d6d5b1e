import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consyn_jax.config import UserError
from consyn_jax.training.metrics import MetricsLog, Trackers, build_trackers, read_metrics


def strict(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def fill(directory: Path, steps: range) -> None:
    with MetricsLog(directory) as log:
        for step in steps:
            log.write(step, 100 * step, {"train/loss": 5 - step / 10})
            if step % 5 == 0:
                log.write(step, 100 * step, {"eval/loss": 5 - step / 10})
                log.write(step, 100 * step, event="save")


class TestLog:
    def test_a_line_begins_with_step_tokens_and_time_and_is_there_at_once(self, tmp_path: Path) -> None:
        log = MetricsLog(tmp_path)
        line = log.write(3, 1200, {"train/loss": np.float32(2.5), "train/epoch": 1})
        log.write(3, 1200, {"file": "a\nb\ud800ü"}, event="save")
        first, second = strict(log.path)
        assert list(first) == ["step", "tokens", "time_s", "train/loss", "train/epoch"]
        assert first == line == {"step": 3, "tokens": 1200, "time_s": line["time_s"], "train/loss": 2.5, "train/epoch": 1}
        assert list(second) == ["step", "tokens", "time_s", "event", "file"]
        assert second["file"] == "a\nb\ud800ü"
        log.close()

    def test_not_finite_is_strict_json_and_comes_back_as_float_through_a_rewrite(self, tmp_path: Path) -> None:
        with MetricsLog(tmp_path) as log:
            log.write(1, 10, {"train/loss": math.nan, "train/grad_norm": np.float32("-inf"), "train/epoch": 0.1})
            log.write(2, 20, {"train/loss": math.inf})
            log.truncate_from(1)
        (line,) = strict(log.path)
        assert line["train/loss"] is None
        assert line["nonfinite"] == {"train/loss": "nan", "train/grad_norm": "-inf"}
        (read,) = read_metrics(log.path)
        assert math.isnan(read["train/loss"])
        assert read["train/grad_norm"] == -math.inf
        assert "nonfinite" not in read

    def test_resuming_drops_what_lies_after_the_state_and_nothing_else(self, tmp_path: Path) -> None:
        fill(tmp_path, range(1, 11))
        whole = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        with MetricsLog(tmp_path) as log:
            log.write(10, 1000, event="signal")
            log.truncate_from(10)
            assert log.path.read_bytes() == b"".join(whole)
            log.truncate_from(5)
        assert log.path.read_bytes() == b"".join(whole[:7])
        assert [line.get("event") for line in read_metrics(log.path)][-1] == "save"
        assert list(tmp_path.iterdir()) == [log.path]

    def test_resuming_again_and_again_never_duplicates(self, tmp_path: Path) -> None:
        fill(tmp_path, range(1, 9))
        for _ in range(3):
            with MetricsLog(tmp_path) as log:
                log.truncate_from(4)
                log.write(4, 400, event="resume")
            fill(tmp_path, range(5, 9))
        lines = read_metrics(tmp_path / "metrics.jsonl")
        steps = [line["step"] for line in lines if "train/loss" in line]
        assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
        assert sum(line.get("event") == "resume" for line in lines) == 1

    def test_minus_one_empties(self, tmp_path: Path) -> None:
        with MetricsLog(tmp_path) as log:
            log.write(0, 0, event="start")
            assert log.truncate_from(-1) == 0.0
        assert log.path.read_bytes() == b""

    @pytest.mark.parametrize(
        "torn", [b'{"step": 7, "tok', b"{", b"\x00" * 40, b"\x00" * 40 + b"\n", b'{"step": 7}\n', b"null\n", b'{"step": 7, "tokens": 1, "time_s": NaN}\n']
    )
    def test_a_torn_last_line_is_left_out_by_readers_and_cut_off_by_the_next_writer(self, tmp_path: Path, torn: bytes) -> None:
        fill(tmp_path, range(1, 4))
        path = tmp_path / "metrics.jsonl"
        before = path.read_bytes()
        path.write_bytes(before + torn)
        assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
        with MetricsLog(tmp_path) as log:
            log.write(4, 400)
        assert path.read_bytes().startswith(before)
        assert [line["step"] for line in strict(path)] == [1, 2, 3, 4]

    def test_damage_in_the_middle_is_named_and_kept(self, tmp_path: Path) -> None:
        fill(tmp_path, range(1, 4))
        path = tmp_path / "metrics.jsonl"
        rows = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(rows[0] + rows[1][:9] + b"\n" + rows[2])
        for use in (lambda: MetricsLog(tmp_path), lambda: read_metrics(path)):
            with pytest.raises(UserError, match=r"metrics\.jsonl:2 is damaged"):
                use()
        assert path.read_bytes().splitlines(keepends=True)[2] == rows[2]
        with pytest.raises(UserError, match="does not exist"):
            read_metrics(tmp_path / "nothing")

    def test_time_adds_up_over_resumes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        now = 1000.0
        monkeypatch.setattr("time.perf_counter", lambda: now)
        with MetricsLog(tmp_path) as log:
            now += 30
            log.write(1, 10)
            now += 30
            log.write(2, 20)
        now = 7.0  # another process, another clock
        with MetricsLog(tmp_path) as log:
            assert log.time_s == 60.0
            assert log.truncate_from(1) == 30.0
            now += 12.5
            log.write(2, 20)
        assert [line["time_s"] for line in read_metrics(log.path)] == [30.0, 42.5]

    def test_a_full_disk_is_one_sentence_and_leaves_whole_lines(self, tmp_path: Path) -> None:
        # A file size limit stops a write as a full disk does: after a part of it.
        code = """if True:
            import resource, signal, sys
            from pathlib import Path
            from consyn_jax.config import UserError
            from consyn_jax.training.metrics import MetricsLog
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            log = MetricsLog(Path(sys.argv[1]))
            log.write(1, 10)
            resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 10, resource.RLIM_INFINITY))
            try:
                log.write(2, 20)
            except UserError as error:
                assert "cannot be written" in str(error), error
            else:
                raise AssertionError("written")
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            log.write(3, 30)
        """
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
        assert [line["step"] for line in strict(tmp_path / "metrics.jsonl")] == [1, 3]


class Recorder:
    def __init__(self, fail_on: str = "") -> None:
        self.calls: list[Any] = []
        self.fail_on = fail_on

    def _note(self, name: str, *arguments: Any) -> None:
        self.calls.append((name, *arguments))
        if name == self.fail_on:
            raise RuntimeError(f"no {name}\ntoday")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._note("log", step, dict(values))

    def sample(self, step: int, text: str) -> None:
        self._note("sample", step, text)

    def close(self) -> None:
        self._note("close")


class TestTrackers:
    @pytest.mark.parametrize("method", ["log", "sample", "close"])
    def test_a_failing_tracker_is_reported_once_and_the_others_go_on(self, method: str) -> None:
        good, bad, warnings = Recorder(), Recorder(method), []
        trackers = Trackers({"bad": lambda: bad, "good": lambda: good}, warnings.append)
        for step in (1, 2):
            trackers.log(step, {"train/loss": np.float32(1.5), "event": "save", "flag": True, "none": None})
            trackers.sample(step, "text")
        trackers.close()
        trackers.close()
        assert good.calls == [("log", 1, {"train/loss": 1.5}), ("sample", 1, "text"), ("log", 2, {"train/loss": 1.5}), ("sample", 2, "text"), ("close",)]
        assert [call[0] for call in bad.calls].count(method) == 1
        assert bad.calls[-1][0] == method
        assert len(warnings) == 1
        assert f"RuntimeError: no {method} today." in warnings[0]

    def test_a_tracker_that_cannot_start_is_reported_and_an_interrupt_is_not_swallowed(self) -> None:
        def broken() -> Recorder:
            raise ImportError("no such library")

        warnings: list[str] = []
        Trackers({"bad": broken}, warnings.append).log(1, {"a": 1.0})
        assert "no such library" in warnings[0]

        class Interrupting(Recorder):
            def log(self, step: int, values: Mapping[str, float]) -> None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Trackers({"it": Interrupting}, warnings.append).log(1, {"a": 1.0})

    def test_an_unknown_backend_is_the_users_mistake(self, tmp_path: Path) -> None:
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
        assert int.from_bytes(data[at + 12 + length : at + 16 + length], "little") == masked(payload)
        events.append(Event.FromString(payload))
        at += 16 + length
    return events


class TestTensorBoard:
    def test_events_are_on_disk_at_once_and_read_back(self, tmp_path: Path) -> None:
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

    def test_a_resume_gets_a_file_of_its_own_that_purges_later_steps(self, tmp_path: Path) -> None:
        for resume_step in (None, 5, 5):
            trackers = build_trackers("tensorboard", directory=tmp_path, project="p", resume_step=resume_step, warn=pytest.fail)
            trackers.log(6, {"train/loss": 1.0})
            trackers.close()
        files = sorted((tmp_path / "logs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        assert len(files) == 3
        first, second, third = map(tensorboard_events, files)
        assert len(first) == 2
        for events in (second, third):
            assert (events[1].step, events[1].session_log.status) == (6, 1)  # SessionLog.START: forget from step 6 on

    def test_a_place_that_cannot_be_written_is_a_warning(self, tmp_path: Path) -> None:
        (tmp_path / "logs").write_text("in the way")
        warnings: list[str] = []
        trackers = build_trackers("tensorboard", directory=tmp_path, project="p", warn=warnings.append)
        trackers.log(1, {"a": 1.0})
        trackers.close()
        assert len(warnings) == 1
        assert "TensorBoard failed and is switched off" in warnings[0]


WANDB = """if True:
    import sys
    from pathlib import Path
    from consyn_jax.training.metrics import build_trackers
    warnings = []
    directory, run_id = Path(sys.argv[1]), sys.argv[2] or None
    trackers = build_trackers("wandb", directory=directory, project="p", run_name="name", config={"lr": 1e-3}, run_id=run_id, warn=warnings.append)
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

    def test_offline_needs_no_network_and_no_key_and_goes_on_with_the_same_run(self, tmp_path: Path) -> None:
        out, err = self.run(tmp_path, WANDB_MODE="offline")
        assert out == ""
        assert err[-1] == "0"
        (run_id,) = (line for line in err if any(path.name.endswith(f"-{line}") for path in (tmp_path / "wandb").glob("offline-run-*")))
        (directory,) = (tmp_path / "wandb").glob("offline-run-*")
        assert (directory / f"run-{run_id}.wandb").stat().st_size > 100
        assert [b"&lt;b&gt;To be" in page.read_bytes() for page in directory.rglob("*.html")] == [True]
        out, err = self.run(tmp_path, run_id=run_id, WANDB_MODE="offline")
        assert out == ""
        assert run_id in err

    def test_without_a_key_the_run_is_kept_offline_with_a_word(self, tmp_path: Path) -> None:
        out, err = self.run(tmp_path)
        assert out == ""
        assert err[-1].startswith("1 Weights & Biases: ")
        assert "wandb sync" in err[-1]
        assert list((tmp_path / "wandb").glob("offline-run-*"))
