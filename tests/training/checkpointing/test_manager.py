import errno
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from consyn_jax.distributed.mesh import build_mesh
from consyn_jax.errors import UserError
from consyn_jax.training.checkpointing import commit, orbax_writes
from consyn_jax.training.checkpointing import manager as module
from consyn_jax.training.checkpointing.checkpoint_files import damage, file_hash, file_names
from consyn_jax.training.checkpointing.manager import Checkpoints
from consyn_jax.training.checkpointing.orbax_writes import WithoutAbandonedWork, refusal
from consyn_jax.training.checkpointing.ownership import RunRecord
from consyn_jax.training.step import TrainState

ROWS = PartitionSpec(("data", "fsdp"))


def state_of(step: int, width: int = 8, dtype: Any = jnp.float32, **mesh: int) -> TrainState:
    """A state whose values tell the step, split over a mesh."""
    sizes = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | mesh
    where = build_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    values = jax.device_put(
        (jnp.arange(width * 2.0).reshape(width, 2) + step).astype(dtype), NamedSharding(where, ROWS)
    )
    number = jax.device_put(jnp.int32(step), NamedSharding(where, PartitionSpec()))
    return TrainState(number, {"w": values}, ({"mu": values * 2},), number + 0)


def like(state: TrainState) -> TrainState:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def checkpoints(tmp_path: Path, warnings: list[str]) -> Iterator[Checkpoints]:
    found = Checkpoints(tmp_path / "checkpoints", keep_last=2, keep_every=4, warn=warnings.append)
    yield found
    found.close()


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        assert checkpoints.save(step, state_of(step), {"step": step})
    checkpoints.wait()


def test_the_newest_stay_and_every_fourth(checkpoints: Checkpoints) -> None:
    save(checkpoints, 1, 3, 4, 5, 6, 7)
    assert checkpoints.steps() == [4, 6, 7]
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["4", "6", "7"]


def test_a_checkpoint_that_cannot_be_removed_goes_with_the_next_save(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    save(checkpoints, 1, 2)
    with monkeypatch.context() as patch:
        refused = OSError(errno.EACCES, os.strerror(errno.EACCES), str(checkpoints.directory))
        patch.setattr(module, "rotate", Mock(side_effect=refused))
        save(checkpoints, 3)
    assert checkpoints.steps() == [1, 2, 3]
    save(checkpoints, 5)
    assert checkpoints.steps() == [3, 5]
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["3", "5"]
    assert len(warnings) == 1


def test_what_was_saved_comes_back_on_another_mesh(checkpoints: Checkpoints) -> None:
    record = {"step": 3, "tokens": 2**40, "best_loss": None, "tracker_id": "a1", "scale": 0.1}
    checkpoints.save(3, state_of(3, fsdp=4), record)
    checkpoints.wait()
    for mesh in ({"fsdp": 4}, {"data": 2, "fsdp": 4}, {"data": 1}):
        wanted = state_of(3, **mesh)
        state, run = checkpoints.restore(3, like(wanted))
        assert run == record
        assert isinstance(state, TrainState)
        jax.tree.map(np.testing.assert_array_equal, state, wanted)
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(
            lambda leaf: leaf.sharding, wanted
        )


def test_a_saved_state_does_not_change_with_the_run(checkpoints: Checkpoints) -> None:
    """The step donates its state right after the save began."""
    state = state_of(2)
    checkpoints.save(2, state, {})
    state = jax.jit(lambda s: jax.tree.map(lambda leaf: leaf * 0, s), donate_argnums=0)(state)
    checkpoints.wait()
    jax.tree.map(
        np.testing.assert_array_equal, checkpoints.restore(2, like(state_of(2)))[0], state_of(2)
    )


def test_writing_goes_on_while_the_run_does(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    released, finish = threading.Event(), Checkpoints._finish
    monkeypatch.setattr(
        Checkpoints, "_finish", lambda *arguments: released.wait() and finish(*arguments)
    )
    assert checkpoints.save(1, state_of(1), {})
    assert checkpoints.saving
    assert checkpoints.steps() == []
    assert not (checkpoints.directory / "1").exists()
    released.set()
    checkpoints.wait()
    assert not checkpoints.saving
    assert checkpoints.steps() == [1]


def test_a_running_event_loop_is_no_obstacle(checkpoints: Checkpoints) -> None:
    """As in a notebook."""
    import asyncio

    async def cell() -> None:
        save(checkpoints, 1)
        checkpoints.restore(1, like(state_of(1)))

    asyncio.run(cell())


def test_threads_that_write_give_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorStore's threads and the one that takes checksums, and no others: they might hold the
    interpreter's lock."""
    lowered: dict[str, int] = {}

    def note(which: int, thread: int, priority: int) -> None:
        pythons = {known.native_id: known.name for known in threading.enumerate()}
        lowered[pythons.get(thread) or Path(f"/proc/self/task/{thread}/comm").read_text()] = (
            priority
        )

    monkeypatch.setattr(os, "setpriority", note)
    with ThreadedCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1, width=1 << 20), {})
        checkpoints.wait()
    assert {name.split("_")[0] for name in lowered} == {"ts", "CHECKSUMS"}
    assert all(priority > 10 for priority in lowered.values())


class ThreadedCheckpoints(Checkpoints):
    def __enter__(self) -> "ThreadedCheckpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def test_deleted_checkpoints_do_not_count_and_are_said(
    checkpoints: Checkpoints, warnings: list[str]
) -> None:
    save(checkpoints, 1, 2)
    shutil.rmtree(checkpoints.directory)
    save(checkpoints, 3)
    assert checkpoints.steps() == [3]
    assert damage(checkpoints.directory / "3") is None
    (said,) = warnings
    assert said.startswith("2 checkpoints of this run, up to step 2, were deleted from")


def test_a_directory_that_is_deleted_during_a_save_is_no_defect(
    checkpoints: Checkpoints, warnings: list[str]
) -> None:
    assert checkpoints.save(1, state_of(1), {})
    shutil.rmtree(checkpoints.directory, ignore_errors=True)
    checkpoints.wait()
    assert checkpoints.steps() in ([], [1])
    assert not checkpoints.steps() or not warnings


def test_later_steps_are_removed(checkpoints: Checkpoints) -> None:
    save(checkpoints, 4, 8, 9)
    checkpoints.delete_after(4)
    assert checkpoints.steps() == [4]
    assert [path.name for path in checkpoints.directory.iterdir()] == ["4"]
    checkpoints.save(8, state_of(80), {})
    checkpoints.wait()
    np.testing.assert_array_equal(
        checkpoints.restore(8, like(state_of(8)))[0].params["w"], state_of(80).params["w"]
    )


def test_a_step_that_is_not_there_is_named_with_those_that_are(checkpoints: Checkpoints) -> None:
    with pytest.raises(UserError, match=r"has no checkpoint of step 5\. Saved steps: none\."):
        checkpoints.restore(5, like(state_of(5)))
    save(checkpoints, 4)
    with pytest.raises(UserError, match=r"has no checkpoint of step 5\. Saved steps: 4\."):
        checkpoints.restore(5, like(state_of(5)))


def test_reading_makes_nothing(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.newest() is None
    checkpoints.close()
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 2, 4 and 6."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(directory)
    save(checkpoints, 2, 4, 6)
    checkpoints.close()
    return directory


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "checkpoints")


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


HARM: dict[str, Callable[[Path], object]] = {
    "flipped": flipped,
    "cut short": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "gone": lambda file: file.unlink(),
    "a directory": lambda file: (file.unlink(), file.mkdir()),
    "a link": lambda file: (file.unlink(), file.symlink_to("/dev/zero")),
}
FILES = {
    "arrays": "state/ocdbt.process_0/d/*",
    "index": "state/d/*",
    "manifest": "state/manifest.ocdbt",
    "tree": "state/_METADATA",
    "record": "run.json",
    "sums": "CHECKSUMS",
}


@pytest.mark.slow
@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_one_is_named_and_the_one_before_it_is_used(
    file: str, harm: str, copied: Path, warnings: list[str]
) -> None:
    victim = max((copied / "6").glob(FILES[file]), key=lambda path: path.stat().st_size)
    HARM[harm](victim)
    checkpoints, before = Checkpoints(copied, warn=warnings.append), contents(copied)
    assert checkpoints.newest() == 4
    assert contents(copied) == before
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{copied / '6'} is damaged and is skipped: ")
    assert file == "sums" or str(victim.relative_to(copied / "6")) in warnings[0]
    with pytest.raises(
        UserError, match=r"/6 is damaged: .*\. Resume from another checkpoint with --resume STEP\."
    ):
        checkpoints.restore(6, like(state_of(6)))
    jax.tree.map(
        np.testing.assert_array_equal, checkpoints.restore(4, like(state_of(4)))[0], state_of(4)
    )
    checkpoints.close()


def test_a_file_of_holes_is_not_read(copied: Path) -> None:
    """A stranger's terabyte without content would take an hour."""
    victim = next((copied / "6").glob(FILES["arrays"]))
    os.truncate(victim, 1 << 40)
    assert damage(copied / "6") == f"{victim.relative_to(copied / '6')} is not what was written"


def test_a_damaged_one_is_set_aside_when_the_run_goes_on(
    saved: Path, copied: Path, warnings: list[str]
) -> None:
    for again in (1, 2):
        flipped(copied / "6" / "run.json")
        spoilt = contents(copied / "6")
        checkpoints = Checkpoints(copied, keep_last=2, warn=warnings.append)
        assert checkpoints.newest() == 4
        checkpoints.delete_after(4)
        assert checkpoints.steps() == [2, 4]
        assert contents(copied / f"6.damaged-{again}") == spoilt
        save(checkpoints, 6)
        assert checkpoints.steps() == [4, 6]  # of the last two, none is the damaged one
        save(checkpoints, 8, 10)
        assert checkpoints.newest() == 10
        checkpoints.delete_after(8)
        save(checkpoints, 10)
        flipped(copied / "10" / "run.json")
        with pytest.raises(UserError, match="/10 is damaged"):
            checkpoints.restore(10, like(state_of(10)))
        checkpoints.close()
        aside = [f"6.damaged-{number}" for number in range(1, again + 1)]
        assert sorted(path.name for path in copied.iterdir()) == ["10", *aside, "8"]
        for step in (8, 10):
            shutil.rmtree(copied / str(step))
        for step in (2, 4, 6):
            shutil.copytree(saved / str(step), copied / str(step))


def test_when_all_are_damaged_nothing_is_touched(copied: Path, warnings: list[str]) -> None:
    (copied / "2" / "run.json").unlink()
    flipped(copied / "4" / "state" / "_METADATA")
    (copied / "6" / "CHECKSUMS").unlink()
    (copied / "8.orbax-checkpoint-tmp").mkdir()
    before = contents(copied)
    checkpoints = Checkpoints(copied, warn=warnings.append)
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            checkpoints.newest()
        for part in (
            "2: run.json is missing",
            "4: state/_METADATA is not what was written",
            "6: CHECKSUMS is missing",
        ):
            assert part in str(caught.value)
    checkpoints.close()
    assert contents(copied) == before
    assert (copied / "8.orbax-checkpoint-tmp").exists()
    said = [warning.partition(" is damaged")[0] for warning in warnings]
    assert said == [str(copied / "6"), str(copied / "4")]  # the error names them all


def test_only_damage_that_was_found_counts_and_a_good_one_is_read_once(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flipped(copied / "2" / "run.json")
    checkpoints = Checkpoints(copied)
    assert checkpoints.newest() == 6
    monkeypatch.setattr(module, "damage", lambda *_: pytest.fail("verified twice"))
    checkpoints._handler.metadata(module.epath.Path(copied / "6" / "state"))
    assert checkpoints.newest() == 6
    checkpoints.close()


def test_files_of_file_managers_and_network_file_systems_are_no_damage(copied: Path) -> None:
    for name in (".DS_Store", ".nfs0001"):
        (copied / "6" / "state" / name).write_text("")
    checkpoints = Checkpoints(copied)
    assert checkpoints.newest() == 6
    (copied / "4" / "note.txt").write_text("")
    with pytest.raises(UserError, match=r"note\.txt is not in CHECKSUMS"):
        checkpoints.restore(4, like(state_of(4)))
    checkpoints.close()


def test_a_file_that_cannot_be_read_is_named(
    copied: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    original = Path.open

    def broken(self: Path, *arguments: Any, **more: Any) -> Any:
        if self.name == "_METADATA" and "/6/" in str(self):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return original(self, *arguments, **more)

    monkeypatch.setattr(Path, "open", broken)
    checkpoints = Checkpoints(copied, warn=warnings.append)
    assert checkpoints.newest() == 4
    assert warnings[0].endswith(
        "/6 is damaged and is skipped: _METADATA cannot be read (Input/output error)."
    )
    checkpoints.close()


def test_the_record_alone_is_verified_alone(copied: Path) -> None:
    flipped(max((copied / "6" / "state" / "ocdbt.process_0" / "d").iterdir()))
    checkpoints = Checkpoints(copied)
    assert checkpoints.record(6) == {"step": 6}
    flipped(copied / "6" / "run.json")
    with pytest.raises(UserError, match=r"/6 is damaged: run\.json is not what was written\."):
        checkpoints.record(6)
    checkpoints.close()


def forged(checkpoint: Path, name: str, content: bytes) -> None:
    """Another content, with the checksum that belongs to it."""
    (checkpoint / name).write_bytes(content)
    digests = {name: file_hash(checkpoint / name) for name in file_names(checkpoint)}
    (checkpoint / "CHECKSUMS").write_text(
        "".join(f"{value}  {name}\n" for name, value in digests.items())
    )


@pytest.mark.parametrize("content", [b"", b"5", b'{"step": ', b"\xff", b"[" * 100_000, b"9" * 5000])
def test_a_record_of_a_stranger_is_answered(content: bytes, copied: Path) -> None:
    forged(copied / "6", "run.json", content)
    checkpoints = Checkpoints(copied)
    assert checkpoints.newest() == 6
    with pytest.raises(
        UserError, match=rf"^{copied}/6/run\.json (cannot be read|is not the record)"
    ):
        checkpoints.restore(6, like(state_of(6)))
    checkpoints.close()


@pytest.mark.parametrize(
    "name",
    [
        "state/_METADATA",
        "state/array_metadatas/process_0",
        "state/_sharding",
        "state/manifest.ocdbt",
    ],
)
def test_arrays_of_a_stranger_are_answered(
    name: str, copied: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(copied)
    trees = (b'{"tree_metadata": 5}', b'{"tree_metadata": {"a": {}}}')
    for content in (b"", b"{}", b"[1]", *trees, b"[" * 100_000):
        forged(copied / "6", name, content)
        try:
            checkpoints.restore(6, like(state_of(6)))
        except UserError as error:
            assert str(error).startswith(f"{copied / '6'} ")  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
    checkpoints.close()
    assert capfd.readouterr() == ("", "")


def test_xxhsum_reads_the_checksums(copied: Path) -> None:
    """What a person would check by hand: `xxh128sum --check CHECKSUMS`."""
    import xxhash

    lines = (copied / "6" / "CHECKSUMS").read_text().splitlines()
    assert {line[34:] for line in lines} == contents(copied / "6").keys() - {"CHECKSUMS"}
    for line in lines:
        assert xxhash.xxh3_128_hexdigest((copied / "6" / line[34:]).read_bytes()) == line[:32]


@given(st.data())
@example(None)
def test_no_checksums_are_too_odd_to_be_answered(saved: Path, data: Any) -> None:
    file = saved / "6" / "CHECKSUMS"
    original = file.read_bytes()
    if data is None:
        changed = original.replace(b"run.json", b"../4/run.json")
    else:
        at, length, fresh = data.draw(
            st.tuples(st.integers(0, len(original)), st.integers(0, 80), st.binary(max_size=60))
        )
        changed = original[:at] + fresh + original[at + length :]
    try:
        file.write_bytes(changed)
        reason = damage(saved / "6")
    finally:
        file.write_bytes(original)
    assert (
        reason or changed.split() == original.split()
    )  # white space may be what it likes, where it can be read


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        (
            state_of(4, width=16),
            r"opt_state/0/mu is float32 \[8, 2\] in the checkpoint and float32 \[16, 2\] in the model; params/w is",
        ),
        (
            state_of(4, dtype=jnp.bfloat16),
            r"opt_state/0/mu is float32 \[8, 2\] in the checkpoint and bfloat16 \[8, 2\] in the model",
        ),
        (
            state_of(4)._replace(params={"w": state_of(4).params["w"], "more": jnp.zeros(2)}),
            r"params/more is missing in the checkpoint and float32 \[2\] in the model\.",
        ),
        (
            state_of(4)._replace(opt_state=()),
            r"opt_state/0/mu is float32 \[8, 2\] in the checkpoint and missing in the model\.",
        ),
    ],
    ids=["shape", "dtype", "more", "less"],
)
def test_another_models_checkpoint_is_told_from_a_damaged_one(
    wanted: TrainState, told: str, saved: Path
) -> None:
    checkpoints = Checkpoints(saved)
    with pytest.raises(UserError, match=rf"^{saved}/4 holds another model: {told}"):
        checkpoints.restore(4, like(wanted))
    assert checkpoints.damaged == {}
    checkpoints.close()


# ---------------------------------------------------------------------------------- what goes wrong


def test_a_save_that_was_cut_off_is_no_checkpoint_and_goes_with_the_next(copied: Path) -> None:
    shutil.copytree(copied / "6", copied / "8.orbax-checkpoint-tmp")
    shutil.copytree(copied / "6", copied / "0.orbax-checkpoint-tmp")
    checkpoints = Checkpoints(copied)
    assert checkpoints.steps() == [2, 4, 6]
    assert checkpoints.newest() == 6
    save(checkpoints, 8)
    checkpoints.close()
    assert sorted(path.name for path in copied.iterdir()) == ["4", "6", "8"]


def test_without_room_a_save_is_not_begun(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    save(checkpoints, 4)
    usage = shutil.disk_usage(checkpoints.directory)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=500_000))
        for step in (5, 6):
            assert not checkpoints.save(step, state_of(step), {})
        checkpoints.wait()
        assert not checkpoints.save(7, state_of(7), {})
    told = "The checkpoint of step 5 could not be written to {}: it needs 1 MB, and 0 MB are free. The newest checkpoint is of step 4."
    assert warnings == [told.format(checkpoints.directory)]
    assert [path.name for path in checkpoints.directory.iterdir()] == ["4"]
    save(checkpoints, 8)
    assert checkpoints.steps() == [4, 8]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
        assert not checkpoints.save(9, state_of(9), {})
    assert len(warnings) == 2  # there was a good one in between


def refusing(patch: pytest.MonkeyPatch, directory: Path, at: int, code: int) -> list[str]:
    """Let the operating system refuse the `at`-th and every later change below `directory`; the
    changes that were asked for."""
    asked: list[str] = []

    def failing(call: Callable[..., Any], changes: Callable[..., bool]) -> Callable[..., Any]:
        def instead(what: Any, *arguments: Any, **more: Any) -> Any:
            path = (
                str(Path(f"/proc/self/fd/{what}").readlink())
                if isinstance(what, int)
                else os.fspath(what)
            )
            if path.startswith(str(directory)) and changes(*arguments, **more):
                asked.append(f"{call.__name__} {path}")
                if len(asked) > at:
                    raise OSError(code, os.strerror(code), path)
            return call(what, *arguments, **more)

        return instead

    def always(*_: Any, **__: Any) -> bool:
        return True

    for name in ("fsync", "mkdir", "rename", "rmdir", "unlink"):
        patch.setattr(os, name, failing(getattr(os, name), always))
    patch.setattr(Path, "open", failing(Path.open, lambda mode="r", *_, **__: mode[0] in "wax"))
    return asked


def test_whatever_the_system_refuses_the_run_goes_on_and_the_last_good_one_stays(
    checkpoints: Checkpoints,
    monkeypatch: pytest.MonkeyPatch,
    warnings: list[str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    save(checkpoints, 1, 2)
    step = 3
    with monkeypatch.context() as patch:
        asked = refusing(patch, checkpoints.directory, 1000, errno.EIO)
        save(checkpoints, step)
    total = len(asked)
    assert total > 15
    for at in sorted({*range(6), *range(6, total, 3), *range(total - 9, total)}):
        step, good, before = step + 1, checkpoints.steps()[-1], len(warnings)
        code = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO)[at % 4]
        with monkeypatch.context() as patch:
            asked = refusing(patch, checkpoints.directory, at, code)
            checkpoints.save(step, state_of(step), {"step": step})
            checkpoints.wait()
        if len(asked) <= at:  # TensorStore wrote a file less
            continue
        assert len(warnings) == before + 1, asked[at]
        assert os.strerror(code) in warnings[-1]
        steps = checkpoints.steps()
        assert steps[-1] == (step if "A checkpoint from before" in warnings[-1] else good), asked[
            at
        ]
        again = Checkpoints(checkpoints.directory)  # what another process would find
        assert again.newest() in (steps[-1], step), asked[at]
        again.close()
        step += 1
        save(checkpoints, step)
        assert len(warnings) == before + 1
    assert any(" could not be removed from " in warning for warning in warnings)
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == sorted(
        map(str, checkpoints.steps())
    )
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("where", ["metadata", "finalize", "file_hash"])
def test_a_defect_ends_the_run(
    where: str, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise TypeError("a defect")

    save(checkpoints, 1)
    with monkeypatch.context() as patch:
        if where == "file_hash":
            patch.setattr(commit, "file_hash", broken)
        else:
            patch.setattr(
                checkpoints._handler, {"metadata": "async_save"}.get(where, where), broken
            )
        checkpoints.save(2, state_of(2), {})
        with pytest.raises(TypeError, match="a defect"):
            checkpoints.save(3, state_of(3), {})
    checkpoints.wait()  # told once
    assert checkpoints.steps() == [1]
    assert warnings == []


def test_what_tensorstore_says_of_the_system_is_understood() -> None:
    full = "RESOURCE_EXHAUSTED: Error writing \"p1/0\": Failed to write 41979904 bytes to file 4: No space left on device [os_error_code='28']"
    assert refusal(ValueError(full)) == "No space left on device"
    assert refusal(OSError(errno.EROFS, "Read-only file system")) == "Read-only file system"
    assert refusal(ValueError("shapes do not match")) is None
    assert refusal(None) is None


def test_older_ones_that_cannot_be_removed_are_tried_again(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    save(checkpoints, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(
            shutil,
            "rmtree",
            lambda *_, **__: (_ for _ in ()).throw(
                PermissionError(errno.EACCES, "Permission denied")
            ),
        )
        save(checkpoints, 3)
    assert warnings == [
        f"A checkpoint from before step 3 could not be removed from {checkpoints.directory}: Permission denied."
    ]
    save(checkpoints, 5)
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["3", "5"]
    assert json.loads((checkpoints.directory / "5" / "run.json").read_text()) == {"step": 5}


def test_a_directory_that_somebody_removed_is_made_again(
    checkpoints: Checkpoints, warnings: list[str]
) -> None:
    save(checkpoints, 1, 2)
    shutil.rmtree(checkpoints.directory)
    save(checkpoints, 3)
    assert [path.name for path in checkpoints.directory.iterdir()] == ["3"]
    (said,) = warnings
    assert said.startswith("2 checkpoints of this run")


def test_closing_waits(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    began = time.monotonic()
    checkpoints.save(1, state_of(1), {})
    handler = checkpoints._handler = Mock(wraps=checkpoints._handler)
    checkpoints.close()
    assert handler.close.call_count == 1
    assert (tmp_path / "1" / "CHECKSUMS").exists()
    assert time.monotonic() - began < 60


def test_a_run_that_ends_leaves_the_hook_to_those_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sys.__unraisablehook__
    monkeypatch.setattr(sys, "unraisablehook", before)
    first, second = Checkpoints(tmp_path / "1"), Checkpoints(tmp_path / "2")
    first.close()
    assert isinstance(sys.unraisablehook, WithoutAbandonedWork)
    third = Checkpoints(tmp_path / "3")
    second.close()
    assert isinstance(sys.unraisablehook, WithoutAbandonedWork)
    third.close()
    assert sys.unraisablehook is before


@pytest.mark.parametrize("failing", ["write", "read", "defect", "begun", None])
def test_what_orbax_abandoned_ends_unheard_after_the_run(
    failing: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    """Its threads may raise errors until Python ends, whatever is saved after they were abandoned:
    the hook stays, and closing waits for them."""
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    waits = Mock(wraps=module.outlast_abandoned_work)
    monkeypatch.setattr(module, "outlast_abandoned_work", waits)
    monkeypatch.setattr(orbax_writes, "ABANDONED_S", 0.01)
    checkpoints = Checkpoints(tmp_path, warn=warnings.append)
    save(checkpoints, 1)
    with monkeypatch.context() as patch:
        if failing == "write":
            refusing(patch, tmp_path, 3, errno.ENOSPC)
            checkpoints.save(2, state_of(2), {})
            checkpoints.wait()
        elif failing == "read":
            patch.setattr(module, "read_state", Mock(side_effect=ValueError("another version")))
            with pytest.raises(UserError, match="cannot be restored: another version"):
                checkpoints.restore(1, like(state_of(1)))
        elif failing == "defect":
            patch.setattr(commit, "file_hash", Mock(side_effect=TypeError("a defect")))
            checkpoints.save(2, state_of(2), {})
            with pytest.raises(TypeError, match="a defect"):
                checkpoints.wait()
        elif failing == "begun":
            with pytest.raises(KeyboardInterrupt):
                checkpoints.save(2, state_of(2), {}, begun=Mock(side_effect=KeyboardInterrupt))
    save(checkpoints, 3)
    checkpoints.close()
    assert len(warnings) == (failing == "write")
    assert waits.call_count == (failing is not None)
    assert isinstance(sys.unraisablehook, WithoutAbandonedWork) == (failing is not None)


def test_each_attempt_of_each_start_has_a_directory_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    """A failed one may still be writing to its own."""
    targets: list[Path] = []

    def refuse(target: Path, size: int) -> None:
        targets.append(target)
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    monkeypatch.setattr(module, "outlast_abandoned_work", lambda: None)
    monkeypatch.setattr(module, "prepare", refuse)
    first = RunRecord.new()
    for owner in (first, first.started_again()):
        checkpoints = Checkpoints(tmp_path, owner=owner, warn=warnings.append)
        assert not any(checkpoints.save(3, state_of(3), {}) for _ in range(2))
        checkpoints.close()
    assert len(targets) == len({*targets}) == 4
    told = f"The checkpoint of step 3 could not be written to {tmp_path}: Read-only file system"
    assert warnings == [f"{told}. There is no checkpoint yet."] * 2


def test_the_files_of_a_refused_checkpoint_are_removed_at_once(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    save(checkpoints, 1)
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        patch.setattr(module, "give_name", Mock(side_effect=full))
        save(checkpoints, 2)
    assert [path.name for path in checkpoints.directory.iterdir()] == ["1"]
    assert len(warnings) == 1


def test_the_last_two_writes_are_measured(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, by the seconds that their files take to reach the disk."""
    monkeypatch.setattr(commit, "_hash_and_flush", lambda file: (file_hash(file), 100.0))
    for step in (1, 2, 3):
        checkpoints.save(step, state_of(step, width=8**step), {})
    checkpoints.wait()
    sizes = [
        [file.stat().st_size for file in own.rglob("*") if file.is_file()]
        for own in (checkpoints.directory / step / "state/ocdbt.process_0" for step in "23")
    ]
    assert sum(sizes[0]) < sum(sizes[1])
    assert checkpoints.written == tuple(
        commit.Written(sum(files), 100.0 * len(files)) for files in sizes
    )


def test_checkpoints_of_another_run_are_refused(saved: Path, tmp_path: Path) -> None:
    own = RunRecord.new()
    during = Checkpoints(tmp_path, owner=own)
    shutil.copytree(saved / "6", tmp_path / "6")
    after = Checkpoints(tmp_path, owner=own)
    for refused in (
        lambda: during.save(1, state_of(1), {"run": own.run}),
        lambda: after.record(6),
        lambda: after.restore(6, like(state_of(6))),
    ):
        with pytest.raises(UserError, match="/6 is a checkpoint of another run"):
            refused()
    during.close()
    after.close()


def test_a_step_that_is_being_saved_is_not_saved_twice(checkpoints: Checkpoints) -> None:
    """A signal that comes right behind a save asks for one."""
    checkpoints.save(1, state_of(1), {"step": 1})
    assert checkpoints.save(1, state_of(100), {"step": 100})
    assert checkpoints.restore(1, like(state_of(1)))[1] == {"step": 1}


def test_a_renamed_checkpoint_is_refused_with_both_steps(copied: Path) -> None:
    (copied / "6").rename(copied / "12")
    checkpoints = Checkpoints(copied)
    assert checkpoints.newest() == 12  # it is whole
    for refused in (
        lambda: checkpoints.record(12),
        lambda: checkpoints.restore(12, like(state_of(6))),
    ):
        with pytest.raises(
            UserError, match="the name of step 12, but contains the state of step 6"
        ):
            refused()
    checkpoints.close()


def test_a_checkpoint_that_is_renamed_under_a_run_ends_it(tmp_path: Path) -> None:
    own = RunRecord.new()
    checkpoints = Checkpoints(tmp_path, owner=own, warn=lambda text: None)
    checkpoints.save(1, state_of(1), {"step": 1, "run": own.run})
    checkpoints.wait()
    (tmp_path / "1").rename(tmp_path / "2")
    with pytest.raises(UserError, match="the name of step 2, but contains the state of step 1"):
        checkpoints.save(2, state_of(2), {"step": 2, "run": own.run})
    checkpoints.close()


def test_another_process_may_look_while_one_writes(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(checkpoints, 1)
    released, finish = threading.Event(), Checkpoints._finish
    monkeypatch.setattr(
        Checkpoints, "_finish", lambda *arguments: released.wait() and finish(*arguments)
    )
    checkpoints.save(2, state_of(2), {})
    other = Checkpoints(checkpoints.directory)
    assert other.newest() == 1
    other.restore(1, like(state_of(1)))
    other.close()
    released.set()
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]
