"""A command takes up what an earlier one finished, and nothing else."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from segment_stores import Stops, by_many, by_one, files, stopped, watched

from consyn_jax.data.preparation.build import Preparation
from consyn_jax.data.preparation.journal import Journal
from consyn_jax.data.preparation.segments import engines, many_writers, phases
from consyn_jax.data.preparation.segments.job import Draft
from consyn_jax.data.preparation.segments.shard_tasks import write_shard
from consyn_jax.data.store import store_writer
from consyn_jax.data.store.shard_writer import ShardWriter
from consyn_jax.errors import UserError


@pytest.mark.slow
def test_a_stopped_preparation_repeats_no_task(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = by_one(corpus, tmp_path / "one")
    ran = list[tuple[str, int]]()
    for after in [*range(1, 200, 9), 10_000]:
        tasks = Stops(after)
        monkeypatch.setattr(engines, "TasksHere", lambda tasks=tasks: tasks)
        try:
            found = by_many(corpus, tmp_path / "many")
        except KeyboardInterrupt:
            assert not (tmp_path / "many" / "manifest.json").exists()
        ran += [(phase, number) for phase, numbers in tasks.ran.items() for number in numbers]
        if tasks.left:
            break
    assert found == expected
    assert len(ran) == len(set(ran))
    assert {phase for phase, _ in ran} > {"cuts", "segments", "exact", "near", "kept", "shards"}


@pytest.mark.slow
def test_bad_rows_stop_and_may_be_skipped_then(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"c\.jsonl:6 holds a number") as many:
        by_many(corpus, tmp_path / "many", on_bad_rows="error")
    with pytest.raises(UserError) as one:
        by_one(corpus, tmp_path / "one", on_bad_rows="error")
    assert str(many.value) == str(one.value)
    tasks = watched(monkeypatch)
    assert by_many(corpus, tmp_path / "many") == by_one(corpus, tmp_path / "one")
    assert min(tasks.ran["segments"]) > 0


@pytest.mark.slow
def test_another_command_takes_over(corpus: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """One writer after many, and many after one; other data in the same directory is refused."""
    monkeypatch.setattr(engines, "TasksHere", lambda: Stops(20))
    with pytest.raises(KeyboardInterrupt):
        by_many(corpus, tmp_path / "many")
    with pytest.raises(UserError, match="an unfinished token store, made from other data"):
        by_one(corpus / "c.jsonl", tmp_path / "many")
    expected = by_one(corpus, tmp_path / "one")
    assert by_one(corpus, tmp_path / "many") == expected


def stopped_in_shards(
    monkeypatch: pytest.MonkeyPatch, corpus: Path, tmp_path: Path, after: int
) -> tuple[Path, Path, dict[str, bytes]]:
    """Stop many writers after so many shards; return the data, the output, and one writer's store."""
    path, output = corpus / "c.jsonl", tmp_path / "many"
    stopped(monkeypatch, path, output, after, "shards")
    return path, output, by_one(path, tmp_path / "one")


def test_shards_that_are_gone_are_made_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, output, expected = stopped_in_shards(monkeypatch, corpus, tmp_path, 3)
    (output / "train-00000.tokens").unlink()
    with (output / "train-00001.index").open("ab") as file:
        file.truncate(8)
    tasks = watched(monkeypatch)
    assert by_many(path, output) == expected
    assert tasks.ran["shards"][:2] == [0, 1]
    assert 2 not in tasks.ran["shards"]
    assert tasks.ran.keys() == {"shards"}


def test_a_kill_while_a_result_is_forgotten_leaves_no_half_of_it(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, output, expected = stopped_in_shards(monkeypatch, corpus, tmp_path, 1)
    (output / "train-00000.tokens").unlink()
    rmtree = shutil.rmtree

    def killed(place: Path, **more: Any) -> None:
        if (result := Path(place) / "result.json").exists():
            result.unlink()
            raise KeyboardInterrupt
        rmtree(place, **more)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            by_many(path, output)
    assert list((tmp_path / "shared").glob("*/*/shards/0000000")) == []
    assert by_many(path, output) == expected


def test_damaged_results_are_made_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, output, expected = stopped_in_shards(monkeypatch, corpus, tmp_path, 3)
    wanted = {"segments": [0, 1, 2], "kept": [1, 2, 3], "shards": [0, 1]}
    for phase, numbers in wanted.items():
        for number, content in zip(numbers, ("", "{}", "{"), strict=False):
            (result,) = (tmp_path / "shared").glob(f"*/*/{phase}/{number:07d}/result.json")
            result.write_text(content) if content else result.unlink()
    tasks = watched(monkeypatch)
    assert by_many(path, output) == expected
    assert {phase: tasks.ran[phase][: len(numbers)] for phase, numbers in wanted.items()} == wanted
    assert tasks.ran.keys() == wanted.keys()
    assert 2 not in tasks.ran["shards"]


def test_damaged_beginnings_of_segments_are_found_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, output, expected = stopped_in_shards(monkeypatch, corpus, tmp_path, 0)
    (starts,) = (tmp_path / "shared").glob("*/*/starts.json")
    starts.write_text("{")
    (cut,) = (tmp_path / "shared").glob("*/*/cuts/0000000/result.json")
    cut.write_text("{}")
    tasks = watched(monkeypatch)
    assert by_many(path, output) == expected
    assert tasks.ran.keys() == {"cuts", "shards"}


def test_a_refused_command_keeps_the_shards(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, output, expected = stopped_in_shards(monkeypatch, corpus, tmp_path, 2)
    with pytest.raises(UserError, match="--on_bad_rows skip"):
        by_many(path, output, on_bad_rows="error")
    tasks = watched(monkeypatch)
    assert by_many(path, output) == expected
    assert tasks.ran.keys() == {"shards"}
    assert tasks.ran["shards"][0] == 2


def test_shards_that_one_writer_wrote_again_are_not_taken_up(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be killed when they have their sizes, but not yet their content, on the disk."""
    path, output, expected = stopped_in_shards(monkeypatch, corpus, tmp_path, 2)
    shards = {shard: shard.stat().st_size for shard in output.glob("*-0*.*")}
    assert len(shards) >= 6

    def killed(self: Preparation, publish: object) -> None:
        for shard, size in shards.items():
            shard.write_bytes(bytes(size))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Preparation, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            by_one(path, output)
    tasks = watched(monkeypatch)
    assert by_many(path, output) == expected
    assert tasks.ran.keys() == {"shards"}
    assert tasks.ran["shards"][0] == 0


def test_another_working_directory_goes_on(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = corpus / "c.jsonl"
    stopped(monkeypatch, path, tmp_path / "many", 1, "kept")
    monkeypatch.chdir(corpus)
    tasks = watched(monkeypatch)
    assert by_many(path, tmp_path / "many") == by_one(path, tmp_path / "one")
    assert tasks.ran.keys() == {"kept", "shards"}
    assert 0 not in tasks.ran["kept"]


def test_stricter_rules_are_refused_at_the_start(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = corpus / "c.jsonl"
    stopped(monkeypatch, path, tmp_path / "many", 0, "kept")
    tasks = watched(monkeypatch)
    with pytest.raises(UserError, match=r"c\.jsonl:6 holds a number.*--on_bad_rows skip"):
        by_many(path, tmp_path / "many", on_bad_rows="error")
    assert tasks.ran == {}
    assert by_many(path, tmp_path / "many") == by_one(path, tmp_path / "one")
    assert tasks.ran.keys() == {"kept", "shards"}


def test_a_task_of_an_earlier_command_finds_no_place(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, output = corpus / "c.jsonl", tmp_path / "many"
    old = stopped(monkeypatch, path, output, 1, "shards")
    late = old.writing("kept", 900)
    late.__enter__()
    new = stopped(monkeypatch, path, output, 0, "shards")
    with pytest.raises(FileNotFoundError):
        late.__exit__(None, None, None)
    assert new.root == old.root
    assert new.generation != old.generation
    assert not old.results.exists()
    assert 900 not in new.done("kept")
    before = files(output)
    for phase in ("segments", "exact", "groups", "kept"):
        with pytest.raises(FileNotFoundError):
            phases.PHASES[phase](old, 0)
    # A task that has read all it needs, and ends now.
    monkeypatch.setattr(type(old), "results", new.results)
    with pytest.raises(FileNotFoundError):
        write_shard(old, 1)
    assert files(output) == before


def test_a_full_disk_at_the_end_keeps_the_segments(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write = corpus / "c.jsonl", store_writer.write_whole

    def full(path: Path, content: str) -> None:
        if path.name == "manifest.json":
            raise OSError(28, "No space left on device", str(path))
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(store_writer, "write_whole", full)
        with pytest.raises(UserError, match="No space left"):
            by_many(path, tmp_path / "many")
    tasks = watched(monkeypatch)
    assert by_many(path, tmp_path / "many") == by_one(path, tmp_path / "one")
    assert tasks.ran == {}


def test_nothing_is_kept_of_data_without_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("  \n")
    with pytest.raises(UserError, match="There is no text in"):
        by_many(path, tmp_path / "many")
    assert list((tmp_path / "shared").iterdir()) == []


def test_segments_are_removed_with_a_store_that_one_writer_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some text")
    stopped(monkeypatch, path, tmp_path / "many", 0, "kept")
    monkeypatch.setattr(Preparation, "_fault", lambda self, key: "The files changed.")
    with pytest.raises(UserError, match=r"^The files changed\.$"):
        by_one(path, tmp_path / "many")
    assert list((tmp_path / "shared").iterdir()) == []
    assert not (tmp_path / "many").exists()


@pytest.mark.parametrize(
    ("place", "name", "says"),
    [
        (Journal, "write", "{0}/many cannot be written: No space left on device. Make room, and"),
        (many_writers, "write_whole", "--shared_directory {0}/shared cannot be written: No space"),
    ],
)
def test_the_full_directory_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, says: str
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some text")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(place, name, full)
    with pytest.raises(UserError) as fault:
        by_many(path, tmp_path / "many")
    assert str(fault.value).startswith(says.format(tmp_path))


@pytest.mark.parametrize(
    ("patched", "says"),
    [
        ((ShardWriter, "append"), "{0}/many cannot be read or written on node "),
        ((Draft, "save"), "A file in {0}/shared/consyn-"),
    ],
)
def test_the_full_directory_of_a_task_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patched: tuple[Any, str], says: str
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some text")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*patched, full)
    with pytest.raises(UserError, match="No space left on device") as fault:
        by_many(path, tmp_path / "many")
    assert str(fault.value).startswith(says.format(tmp_path))


@pytest.mark.parametrize("lost", ["dropped-exact", "dropped-near"])
def test_lost_duplicates_are_an_error(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    job = stopped(monkeypatch, corpus / "c.jsonl", tmp_path / "many", 0, "kept")
    shutil.rmtree(job.place(lost, 0))
    fault, _ = phases.work(str(job.root), job.identity, "kept", 0)
    assert fault.startswith(f"{job.place(lost, 0)}/arrays.bin cannot be read or written on node ")


@pytest.mark.slow
def test_a_full_disk_is_named(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from consyn_jax.data.preparation.segments import job as jobs

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "shared"))

    with monkeypatch.context() as patch:
        patch.setattr(jobs.Draft, "finish", full)
        with pytest.raises(UserError, match="No space left") as fault:
            by_many(corpus, tmp_path / "many")
    assert "Make room, and run the same command again; it continues." in str(fault.value)
    assert not list((tmp_path / "shared").glob("*/*/*/.*"))
    assert by_many(corpus, tmp_path / "many") == by_one(corpus, tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("content", [None, "{", '{"root": "/"}'])
def test_the_files_of_a_damaged_job_are_not_used(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    path = corpus / "c.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(engines, "TasksHere", lambda: Stops(12))
        with pytest.raises(KeyboardInterrupt):
            by_many(path, tmp_path / "many")
    (job,) = (tmp_path / "shared").glob("*/job.json")
    for damaged in (tmp_path / "shared").glob("*/*/segments/*/arrays.bin"):
        damaged.write_bytes(b"0")
    job.unlink() if content is None else job.write_text(content)
    assert by_many(path, tmp_path / "many") == by_one(path, tmp_path / "one")
