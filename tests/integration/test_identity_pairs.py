"""Whatever is put in the place of a run that is running: the run ends, and writes nothing to it."""

import shutil
import signal
import time
from pathlib import Path

import pytest

from consyn_jax.training.checkpointing.ownership import RunRecord
from consyn_jax.training.run.lock import LOCK, RunLock

from .nursery import FLAGS, Child, Nursery, held, slow, trained

pytestmark = pytest.mark.slow

SAVING = [*FLAGS, "--save_steps", "2"]
# Held until something has been done to it; then slow, and quick to look at its directory.
OFTEN = """
from consyn_jax.training.runtime import watchdog
watchdog.POLL_S = 0.2
"""
SAVES = """
import time, pathlib
from consyn_jax.training.checkpointing import manager
finish = manager.Checkpoints._finish
def slow(self, step, *rest):
    if step >= 6:
        pathlib.Path({mark!r}).touch()
        while not pathlib.Path({done!r}).exists():
            time.sleep(0.02)
    return finish(self, step, *rest)
manager.Checkpoints._finish = slow
"""


@pytest.fixture(scope="module")
def other(nursery: Nursery, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another run, which is complete."""
    path = tmp_path_factory.mktemp("other") / "run"
    child = nursery.start(*SAVING, "--seed", "7", "--data", corpus, "--output", path)
    assert child.wait() == 0, child.said
    return path


def content(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def of_a_save(name: str) -> bool:
    """Of the run's own save that was cut off; and the lock's file, which its holder removes."""
    return ".orbax-checkpoint-tmp" in name or name == LOCK or name.startswith(".best.")


def await_moment(path: Path, moment: str, children: list[Child], mark: Path) -> None:
    if moment == "stepping":
        trained(path, 7, children[0])
        return
    deadline = time.monotonic() + 240
    while not mark.exists():
        assert children[0].alive, children[0].said
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("moment", ["stepping", "saving"])
@pytest.mark.parametrize(
    ("what", "said", "processes"),
    [
        pytest.param(
            what,
            said,
            processes,
            marks=[pytest.mark.exhaustive] if "copied" in what and processes == 2 else [],
        )
        for what, said in (
            ("directory replaced", "now has another run"),
            ("lock removed", "is now used by another process"),
            ("checkpoint copied in", "500 is a checkpoint of another run"),
            ("metrics copied in", "was changed by another program"),
        )
        for processes in (1, 2)
    ],
)
def test_it_ends_and_touches_nothing_more(
    what: str,
    said: str,
    processes: int,
    moment: str,
    other: Path,
    nursery: Nursery,
    corpus: Path,
    tmp_path: Path,
) -> None:
    path, mark, done = tmp_path / "run", tmp_path / "mark", tmp_path / "done"
    saves = SAVES.format(mark=str(mark), done=str(done))
    before = OFTEN + (slow(0.5, after=7) + held(7, done) if moment == "stepping" else saves)
    flags = [*SAVING, "--data", corpus, "--output", path]
    children = (
        [nursery.start(*flags, before=before)]
        if processes == 1
        else nursery.together(*flags, before=before)
    )
    await_moment(path, moment, children, mark)
    for child in children:
        child.stop()
    lock = None
    if what == "directory replaced":
        path.rename(tmp_path / "moved")
        shutil.copytree(other, path)
    elif what == "lock removed":  # and a second start of the same run, as far as its files go
        (path / LOCK).unlink()
        lock = RunLock(path)
        record = RunRecord.read(path)
        assert record is not None
        record.started_again().write(path)
    elif what == "checkpoint copied in":
        shutil.copytree(other / "checkpoints" / "16", path / "checkpoints" / "500")
    else:
        shutil.copyfile(other / "metrics.jsonl", path / "metrics.jsonl")
    then = content(path)
    done.touch()
    for child in children:
        child.signal(signal.SIGCONT)
    assert [child.wait() for child in children] == [2] * processes, [c.said for c in children]
    for child in children:
        assert said in child.said
        assert "Traceback" not in child.said
    after = content(path)
    if what == "checkpoint copied in":
        # The run is in its own directory, and goes on up to its next save.
        assert {name: data for name, data in after.items() if "/500/" in name} == {
            name: data for name, data in then.items() if "/500/" in name
        }
        (again,) = [nursery.start(*flags)]
        assert again.wait() == 2
        assert said in again.said
        shutil.rmtree(path / "checkpoints" / "500")
        again = nursery.start(*flags)
        assert again.wait() == 0, again.said
        return
    if what == "metrics copied in":  # in its own directory; the save of the step before may end
        assert after["metrics.jsonl"] == then["metrics.jsonl"]
        return
    assert {n: d for n, d in after.items() if not of_a_save(n)} == {
        n: d for n, d in then.items() if not of_a_save(n)
    }
    if lock is not None:
        assert (path / LOCK).exists(), "the second start keeps its lock"
        lock.release()
