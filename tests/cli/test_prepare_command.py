"""`consyn-prepare` from the command line."""

import errno
import fcntl
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from consyn_jax.cli.prepare import main
from consyn_jax.cli.progress_bar import Bar
from consyn_jax.data.preparation import build
from consyn_jax.data.preparation.journal import Journal
from consyn_jax.data.store import manifest
from consyn_jax.data.store.manifest import delete_store
from consyn_jax.errors import AGAIN

TINY = ["--tokenizer", "bytes", "--num_workers", "1", "--output", "tokens"]


@pytest.fixture(autouse=True)
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that the cases below name."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"text": f"Row {number} of a hundred, which is number {number * number}."}
        for number in range(100)
    ]
    rows[50] = rows[3]
    rows[60]["text"] = "x"
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("corpus").mkdir()
    Path("corpus/a.txt").write_text("one text " * 30)
    Path("corpus/b.txt").write_text("another text " * 30)
    Path("corpus/picture.png").write_bytes(b"\x89PNG\0")


def prepared(*argv: str) -> None:
    assert main([*TINY, *argv]) == 0


def refused(capfd: pytest.CaptureFixture[str], *argv: str) -> str:
    """Check that `consyn-prepare` refuses `argv` with one line and exit code 2; return the line."""
    capfd.readouterr()
    assert main([*TINY, *argv]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return err.removeprefix("consyn-prepare: ").rstrip("\n")


def files(directory: str = "tokens") -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(Path(directory).rglob("*"))
        if path.is_file()
    }


class TestMessages:
    def test_header_summary_and_next_command(self, capfd: pytest.CaptureFixture[str]) -> None:
        prepared(
            "--data",
            "rows.jsonl",
            "--min_chars",
            "5",
            "--validation_fraction",
            "0.2",
            "--test_fraction",
            "0.2",
        )
        out, err = capfd.readouterr()
        assert out == ""
        assert "5 characters or more" in err
        assert re.search(r"documents +100 read, 98 kept; left out: 1 too short, 1 duplicate\n", err)
        for split in ("train", "validation", "test"):
            assert re.search(
                rf"{split} +\d+ documents, [\d,]+ tokens, 1\.00 bytes per token\n", err
            ), split
        assert re.search(r"report +tokens/report\.html\n", err)
        assert err.endswith("Train on it with: consyn-train --data tokens\n")

    def test_files_that_were_left_out(self, capfd: pytest.CaptureFixture[str]) -> None:
        prepared("--data", "corpus", "--validation_fraction", "1e-9")
        err = capfd.readouterr().err
        assert re.search(r"read +2 text files\n", err)
        assert re.search(r"left out +1 file: corpus/picture\.png \(is binary", err)
        assert re.search(r"validation +empty: ", err)

    def test_learned_tokens_of_fine_tuning_rows(self, capfd: pytest.CaptureFixture[str]) -> None:
        Path("pairs.json").write_text(
            json.dumps(
                [
                    {"prompt": "One and one?", "completion": "Two."},
                    {"prompt": "Two and two?", "completion": "Four."},
                ]
            )
        )
        prepared("--data", "pairs.json", "--validation_fraction", "0")
        err = capfd.readouterr().err
        assert re.search(
            r"train +2 documents, 35 tokens \(11 of them training targets\), 1\.00 bytes per token\n",
            err,
        )
        assert "read       1 file of JSON rows\n" in err
        assert "empty" not in err, "no validation was wanted"

    def test_quiet_is_one_line(self, capfd: pytest.CaptureFixture[str]) -> None:
        prepared("--data", "rows.jsonl", "--quiet")
        assert capfd.readouterr().err == "Train on it with: consyn-train --data tokens\n"

    def test_the_next_command_is_quoted_for_the_shell(
        self, capfd: pytest.CaptureFixture[str]
    ) -> None:
        assert (
            main(
                ["--tokenizer", "bytes", "--data", "rows.jsonl", "--output", "my tokens", "--quiet"]
            )
            == 0
        )
        assert capfd.readouterr().err.endswith("--data 'my tokens'\n")


class TestTheStore:
    def test_a_store_has_a_report(self) -> None:
        prepared("--data", "rows.jsonl")
        report = json.loads(Path("tokens/report.json").read_text())
        assert report["documents"] == 100
        assert report["dropped"] == {"duplicate": 1}
        page = Path("tokens/report.html").read_text()
        assert "rows.jsonl" in page
        assert "number 9." in page, "a sample of the dropped documents"

    def test_the_bytes_do_not_depend_on_place_or_workers(self) -> None:
        prepared("--data", "rows.jsonl")
        prepared("--data", "rows.jsonl", "--output", "elsewhere", "--num_workers", "2")
        assert files("tokens") == files("elsewhere")

    def test_a_finished_store_is_left_as_it_is(self, capfd: pytest.CaptureFixture[str]) -> None:
        prepared("--data", "rows.jsonl")
        before = files()
        prepared("--data", "rows.jsonl", "--num_workers", "2")
        assert "tokens is already complete; there was nothing to do." in capfd.readouterr().err
        assert files() == before

    def test_a_kill_while_the_preparation_files_were_removed(
        self, capfd: pytest.CaptureFixture[str]
    ) -> None:
        prepared("--data", "rows.jsonl")
        before = files()
        Path("tokens/preparing").mkdir()
        Path("tokens/preparing/journal.json").touch()  # the lock went first
        prepared("--data", "rows.jsonl")
        assert "tokens is already complete; there was nothing to do." in capfd.readouterr().err
        assert files() == before

    def test_an_empty_directory_can_be_the_output(self) -> None:
        Path("tokens").mkdir()
        prepared("--data", "rows.jsonl")

    @pytest.mark.slow
    @pytest.mark.exhaustive
    def test_consyn_train_trains_on_the_store(self) -> None:
        from consyn_jax.cli.train import main as train

        prepared("--data", "rows.jsonl", "--validation_fraction", "0.2")
        tiny = "--model haiku --hidden_dim 32 --num_heads 2 --num_layers 1 --max_tokens 32"
        run = "--max_steps 1 --quiet --data tokens --output run"
        assert train([*tiny.split(), *run.split()]) == 0


class TestRefusals:
    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            ("--data god.txt", "god.txt in --data does not exist"),
            ("--output rows.jsonl", "--output rows.jsonl is a file. Name a directory."),
            ("--output rows.jsonl/x", "rows.jsonl is a file. Name another directory."),
            ("--output /proc/tokens", "/proc/tokens cannot be"),
            (
                "--output corpus",
                "--output corpus is not a token store: it contains a.txt, b.txt, picture.png. Give "
                "another directory.",
            ),
            (
                "--output corpus --overwrite",
                "--output corpus is not a token store: it contains a.txt, b.txt, picture.png. Give "
                "another directory.",
            ),
            ("--tokenizer nope", "There is no tokenizer at nope."),
        ],
    )
    def test_wrong_input(self, argv: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
        before = files(".")
        assert message in refused(capfd, "--data", "rows.jsonl", *argv.split())
        assert files(".") == before
        assert not Path("tokens").exists()

    def test_another_store(self, capfd: pytest.CaptureFixture[str]) -> None:
        prepared("--data", "rows.jsonl")
        before = files()
        message = refused(capfd, "--data", "corpus")
        assert "tokens" in message
        assert "--overwrite" in message
        assert files() == before

    def test_a_manifest_of_another_program(self, capfd: pytest.CaptureFixture[str]) -> None:
        Path("tokens").mkdir()
        Path("tokens/manifest.json").write_text('{"name": "my web page"}')
        for flags in ((), ("--overwrite",)):
            assert "--output tokens is not a token store: it contains manifest.json." in refused(
                capfd, "--data", "rows.jsonl", *flags
            )
        assert Path("tokens/manifest.json").read_text() == '{"name": "my web page"}'


class TestOverwrite:
    def test_the_new_store_replaces_the_old_one(self) -> None:
        prepared("--data", "corpus")
        prepared("--data", "rows.jsonl", "--overwrite")
        new = files()
        prepared("--data", "rows.jsonl", "--output", "fresh")
        assert new == files("fresh")

    def test_validation_data_that_are_not_utf_8(self) -> None:
        Path("latin1.txt").write_bytes("caf\xe9".encode("latin-1") * 10)
        prepared(
            "--data",
            "rows.jsonl",
            "--validation",
            "latin1.txt",
            "--invalid_utf8",
            "replace",
            "--overwrite",
        )

    def test_without_an_old_store(self) -> None:
        prepared("--data", "rows.jsonl", "--overwrite")

    def test_the_input_of_the_new_store_is_not_deleted(
        self, capfd: pytest.CaptureFixture[str]
    ) -> None:
        prepared("--data", "corpus")
        Path("rows.jsonl").rename("tokens/rows.jsonl")
        for data in ("tokens/rows.jsonl", "tokens/*.jsonl"):
            message = refused(capfd, "--data", data, "--overwrite")
            assert message.startswith(
                "--overwrite would delete --data tokens/rows.jsonl, which is in --output tokens."
            )
        assert "--overwrite would delete --tokenizer tokens/tokenizer" in refused(
            capfd, "--data", "corpus", "--tokenizer", "tokens/tokenizer", "--overwrite"
        )
        assert Path("tokens/rows.jsonl").exists()

    def test_other_files_are_not_deleted(self, capfd: pytest.CaptureFixture[str]) -> None:
        prepared("--data", "corpus")
        Path("tokens/notes.md").write_text("mine")
        message = refused(capfd, "--data", "rows.jsonl", "--overwrite")
        assert (
            message
            == "--output tokens contains notes.md, which is not part of a token store. Move it "
            "elsewhere, because --overwrite would delete it."
        )
        assert Path("tokens/notes.md").exists()

    def test_a_store_as_data_deletes_nothing(self, capfd: pytest.CaptureFixture[str]) -> None:
        prepared("--data", "corpus")
        prepared("--data", "rows.jsonl", "--output", "other")
        before = files()
        assert "is tokenised already" in refused(capfd, "--data", "other", "--overwrite")
        assert files() == before

    def test_a_store_that_another_process_is_making(
        self, capfd: pytest.CaptureFixture[str]
    ) -> None:
        Path("tokens/preparing").mkdir(parents=True)
        with Path("tokens/preparing/lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert "--output tokens is in use by another process." in refused(
                capfd, "--data", "rows.jsonl", "--overwrite"
            )
        prepared("--data", "rows.jsonl", "--overwrite")

    def test_the_lock_is_held_during_the_deletion(self, monkeypatch: pytest.MonkeyPatch) -> None:
        prepared("--data", "corpus")

        def delete(path: Path) -> None:
            with (path / "preparing/lock").open() as lock, pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            delete_store(path)

        with monkeypatch.context() as patch:
            patch.setattr(manifest, "delete_store", delete)
            prepared("--data", "rows.jsonl", "--overwrite")
        assert not Path("tokens/preparing").exists()

    def test_a_link_in_place_of_the_lock_is_not_followed(self) -> None:
        prepared("--data", "corpus")
        Path("elsewhere").mkdir()
        Path("tokens/preparing").symlink_to("../elsewhere")
        prepared("--data", "rows.jsonl", "--overwrite")
        assert list(Path("elsewhere").iterdir()) == []
        Path("tokens/preparing").write_text("a file")
        prepared("--data", "corpus", "--overwrite")

    @pytest.mark.parametrize("flags", [[], ["--overwrite"]])
    def test_a_full_disk_says_how_to_continue(
        self, flags: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(build, "JOURNAL_SECONDS", 0)
        monkeypatch.setattr(Journal, "write", full)
        again = "run the same command again without --overwrite" if flags else AGAIN
        assert refused(capfd, "--data", "rows.jsonl", "--quiet", *flags).endswith(
            f"No space left on device. Make room, and {again}; it continues."
        )

    def test_an_unfinished_preparation(self) -> None:
        Path("tokens/preparing").mkdir(parents=True)
        Path("tokens/preparing/lock").touch()
        Path("tokens/preparing/journal.json").write_text('{"key": "of something else"}')
        prepared("--data", "rows.jsonl", "--overwrite")

    def test_missing_data_deletes_nothing(self, capfd: pytest.CaptureFixture[str]) -> None:
        prepared("--data", "corpus")
        before = files()
        assert "god.txt in --data does not exist" in refused(
            capfd, "--data", "god.txt", "--overwrite"
        )
        assert files() == before


class TestSignals:
    @pytest.mark.parametrize("flags", [[], ["--overwrite"]])
    def test_a_stop_says_how_to_continue(
        self, flags: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        def stopped(*_: Any, **__: Any) -> None:
            Path("tokens").mkdir()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

        monkeypatch.setattr("consyn_jax.data.preparation.cached_store.prepare", stopped)
        assert main([*TINY, "--data", "rows.jsonl", *flags]) == 75
        again = "again without --overwrite" if flags else "again"
        assert (
            capfd.readouterr().err
            == f"consyn-prepare: interrupted; finished work is kept in tokens. Run the same "
            f"command {again} to continue.\n"
        )

    def test_a_stop_before_the_first_document(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        def stopped(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("consyn_jax.data.preparation.cached_store.prepare", stopped)
        assert main([*TINY, "--data", "rows.jsonl"]) == 75
        assert (
            capfd.readouterr().err
            == "consyn-prepare: interrupted before anything was written. Run the same command "
            "again.\n"
        )

    @pytest.mark.slow
    @pytest.mark.exhaustive
    @pytest.mark.parametrize(
        "number", [pytest.param(signal.SIGTERM, marks=pytest.mark.exhaustive), signal.SIGINT]
    )
    def test_a_stopped_process_continues_to_the_same_bytes(self, number: signal.Signals) -> None:
        many = "".join(json.dumps({"text": f"{i} " * 500}) + "\n" for i in range(4_500))
        Path("many.jsonl").write_text(many)
        command = [
            sys.executable,
            "-m",
            "consyn_jax.cli.prepare",
            *TINY,
            "--data",
            "many.jsonl",
            "--output",
            "stopped",
        ]
        running = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        while not Path("stopped/preparing/journal.json").exists() and running.poll() is None:
            time.sleep(0.02)
        running.send_signal(number)
        _, err = running.communicate(timeout=240)
        assert running.returncode == 75, err
        assert err.endswith("Run the same command again to continue.\n")
        assert "Traceback" not in err
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        prepared("--data", "many.jsonl", "--output", "straight")
        assert files("stopped") == files("straight")


class Clock:
    """A clock that the test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class TestBar:
    def make(self, clock: Callable[[], float], **options: Any) -> tuple[Bar, list[str]]:
        introduced: list[str] = []
        return Bar(lambda: introduced.append("header"), clock=clock, **options), introduced

    def test_without_a_terminal_it_prints_a_line_now_and_then(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        clock = Clock()
        bar, introduced = self.make(clock)
        for second in range(31):
            clock.now = 100.0 + second
            bar("tokenize", 50_000_000 + second * 1_000_000, 100_000_000)
        assert introduced == ["header"]
        # Earlier work does not count for the speed.
        assert capsys.readouterr().err.splitlines() == [
            "tokenize: 60.0 MB of 100.0 MB, 1.0 MB/s, 0:00:40 left",
            "tokenize: 70.0 MB of 100.0 MB, 1.0 MB/s, 0:00:30 left",
            "tokenize: 80.0 MB of 100.0 MB, 1.0 MB/s, 0:00:20 left",
        ]

    def test_without_a_total(self, capsys: pytest.CaptureFixture[str]) -> None:
        clock = Clock()
        bar, _ = self.make(clock)
        bar("tokenize", 0, 0)
        clock.now += 20
        bar("tokenize", 40_000_000, 0)
        assert capsys.readouterr().err == "tokenize: 40.0 MB, 2.0 MB/s\n"

    def test_quiet(self, capsys: pytest.CaptureFixture[str]) -> None:
        bar, introduced = self.make(Clock(), quiet=True, every_s=0.0)
        bar("tokenize", 1, 2)
        assert (introduced, capsys.readouterr().err) == ([], "")

    def test_on_a_terminal_the_bar_is_gone_at_the_end(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        bar, introduced = self.make(time.monotonic)
        with bar:
            bar("hash", 5, 10)
            assert introduced == []
            bar("tokenize", 0, 0)
            bar("tokenize", 10, 20)
        assert introduced == ["header"]
        assert "hash" in terminal.getvalue()
        assert "tokenize" in terminal.getvalue()
        assert terminal.getvalue().endswith("\x1b[2K")
        bar.close()


def test_a_separator_that_separates_nothing_is_noted(capfd: pytest.CaptureFixture[str]) -> None:
    """Also when the store is complete already."""
    Path("corpus/a.txt").write_bytes(b"one\r\n---\r\ntwo\r\n")
    Path("corpus/b.txt").write_text("three\n---\nfour\n")
    for _ in range(2):
        prepared(
            "--data", "corpus", "--document_separator", r"\n---\n", "--validation_fraction", "0"
        )
        said = " ".join(capfd.readouterr().err.split())
        assert r"--document_separator $'\n---\n' separates no documents in corpus/a.txt. " in said
        assert r"Lines end with CRLF in corpus/a.txt, so write the separator as $'\r\n---" in said
