import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consyn_jax.errors import UserError
from consyn_jax.training.logging.metrics import MetricsLog, read_metrics


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
    def test_a_line_begins_with_step_tokens_and_time_and_is_there_at_once(
        self, tmp_path: Path
    ) -> None:
        log = MetricsLog(tmp_path)
        line = log.write(3, 1200, {"train/loss": np.float32(2.5), "train/epoch": 1})
        log.write(3, 1200, {"file": "a\nb\ud800ü"}, event="save")
        first, second = strict(log.path)
        assert list(first) == ["step", "tokens", "time_s", "train/loss", "train/epoch"]
        assert (
            first
            == line
            == {
                "step": 3,
                "tokens": 1200,
                "time_s": line["time_s"],
                "train/loss": 2.5,
                "train/epoch": 1,
            }
        )
        assert list(second) == ["step", "tokens", "time_s", "event", "file"]
        assert second["file"] == "a\nb\ud800ü"
        log.close()

    def test_nonfinite_values_are_strict_json_and_come_back_as_floats_after_a_rewrite(
        self, tmp_path: Path
    ) -> None:
        with MetricsLog(tmp_path) as log:
            log.write(
                1,
                10,
                {"train/loss": math.nan, "train/grad_norm": np.float32("-inf"), "train/epoch": 0.1},
            )
            log.write(2, 20, {"train/loss": math.inf})
            log.truncate_from(1)
        (line,) = strict(log.path)
        assert line["train/loss"] is None
        assert line["nonfinite"] == {"train/loss": "nan", "train/grad_norm": "-inf"}
        (read,) = read_metrics(log.path)
        assert math.isnan(read["train/loss"])
        assert read["train/grad_norm"] == -math.inf
        assert "nonfinite" not in read

    def test_resuming_drops_what_came_after_the_state_and_nothing_else(
        self, tmp_path: Path
    ) -> None:
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

    def test_minus_one_drops_everything(self, tmp_path: Path) -> None:
        with MetricsLog(tmp_path) as log:
            log.write(0, 0, event="start")
            assert log.truncate_from(-1) == 0.0
        assert log.path.read_bytes() == b""

    @pytest.mark.parametrize(
        "torn",
        [
            b'{"step": 7, "tok',
            b"{",
            b"\x00" * 40,
            b"\x00" * 40 + b"\n",
            b'{"step": 7}\n',
            b"null\n",
            b'{"step": 7, "tokens": 1, "time_s": NaN}\n',
        ],
    )
    def test_readers_skip_a_torn_last_line_and_the_next_writer_cuts_it_off(
        self, tmp_path: Path, torn: bytes
    ) -> None:
        fill(tmp_path, range(1, 4))
        path = tmp_path / "metrics.jsonl"
        before = path.read_bytes()
        path.write_bytes(before + torn)
        assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
        with MetricsLog(tmp_path) as log:
            log.write(4, 400)
        assert path.read_bytes().startswith(before)
        assert [line["step"] for line in strict(path)] == [1, 2, 3, 4]

    def test_damage_in_the_middle_is_reported_and_left_alone(self, tmp_path: Path) -> None:
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

    def test_the_clock_adds_up_over_resumes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
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

    def test_a_full_disk_is_a_user_error_and_leaves_whole_lines(self, tmp_path: Path) -> None:
        # A file size limit stops a write as a full disk does: after a part of it.
        code = """if True:
            import resource, signal, sys
            from pathlib import Path
            from consyn_jax.errors import UserError
            from consyn_jax.training.logging.metrics import MetricsLog
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            log = MetricsLog(Path(sys.argv[1]))
            log.write(1, 10)
            limit, unlimited = log.path.stat().st_size + 10, resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited))
            try:
                log.write(2, 20)
            except UserError as error:
                assert "cannot be written" in str(error), error
            else:
                raise AssertionError("written")
            resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
            log.write(3, 30)
        """
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
        assert [line["step"] for line in strict(tmp_path / "metrics.jsonl")] == [1, 3]


def test_a_log_of_any_size_is_not_read_whole(tmp_path: Path) -> None:
    """Found by the search for trees of strangers: a MemoryError."""
    with (tmp_path / "metrics.jsonl").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="cannot be read: it has 1,099,511,627,776 bytes, too many"):
        MetricsLog(tmp_path)


def test_the_clock_counts_from_the_beginning_of_each_start(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, began=time.perf_counter() - 100) as log:
        assert 100 <= log.write(1, 1)["time_s"] < 160
    with MetricsLog(tmp_path, began=time.perf_counter() - 1000) as log:
        assert 100 <= log.truncate_from(1) < 160
        assert 1100 <= log.write(2, 2)["time_s"] < 1220
        end = log.write(2, 2, event="finish")["time_s"]
        log.write(3, 3)
        assert log.truncate_from(2) == end, "the work after the last step took time, too"
        assert [line.get("event") for line in read_metrics(log.path)] == [None, None]
