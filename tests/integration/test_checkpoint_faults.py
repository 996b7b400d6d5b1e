"""Checkpoints that are killed, out of room, damaged or written by two processes: a run always finds
a whole one, and says in a sentence what it lost.

In CI a short version; with CONSYN_TEST_FULL=1 twenty random moments and every chosen one.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from free_ports import free_port
from jax.sharding import NamedSharding, PartitionSpec

from consyn_jax.distributed.mesh import build_mesh
from consyn_jax.training.checkpointing.checkpoint_files import damage
from consyn_jax.training.checkpointing.manager import Checkpoints
from consyn_jax.training.step import TrainState

from .conftest import cannot_run

FULL = os.environ.get("CONSYN_TEST_FULL") == "1"

# What every process below begins with. The state tells its step in every element.
BEGIN = """
import json, os, random, resource, shutil, signal, sys, time
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from consyn_jax.errors import UserError
from consyn_jax.training.checkpointing import commit
from consyn_jax.training.checkpointing.manager import Checkpoints
from consyn_jax.training.step import TrainState

def state(step, size):
    small = {str(i): jnp.full((i + 1, 7), step, jnp.float32) for i in range(6)}
    large = [jnp.full((size // 4,), step, jnp.float32) for _ in range(4)]
    return TrainState(jnp.int32(step), {"large": large, "small": small}, (), jnp.int32(step))

def check(checkpoints, step, size):
    found, run = checkpoints.restore(step, jax.eval_shape(lambda: state(step, size)))
    assert run == {"step": step}, run
    assert all((np.asarray(leaf) == step).all() for leaf in jax.tree.leaves(found)), step
"""


def python(
    code: str, *arguments: object, before: tuple[str, ...] = (), **env: str
) -> "subprocess.Popen[str]":
    command = [*before, sys.executable, "-c", BEGIN + code, *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1", **env},
    )


def said(process: "subprocess.Popen[str]") -> str:
    out, err = process.communicate(timeout=600)
    assert err == ""
    assert process.returncode == 0, out
    return out


# -------------------------------------------------------------------------------------------- kills

# Attempts are forked from one process that has imported everything and has started no thread, so
# that the time goes into what is tested.
ATTEMPTS = """
SIZE = 10_000_000  # elements

def attempt(directory, tell, saves, at=0):
    def die(reason):
        raise AssertionError(reason)
    counted = [0]
    def hook(event, arguments):
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and "checkpoint" in str(arguments[0]):
            counted[0] += 1
            if counted[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)
    try:
        checkpoints = Checkpoints(directory, keep_last=2, warn=die)
        step = checkpoints.newest() or 0
        assert step == max(checkpoints.steps(), default=0)
        if step:
            check(checkpoints, step, SIZE)
        checkpoints.delete_after(step)
        tell(f"resumed {step}")
        for step in range(step + 1, step + 1 + saves):
            new = jax.block_until_ready(state(step, SIZE))
            tell(f"begin {step}")
            if step % 3 == 0:
                sys.addaudithook(hook)
            checkpoints.save(step, new, {"step": step})
            checkpoints.wait()
            tell(f"done {step}")
        tell(f"counted {counted[0]}")
        checkpoints.close()
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

def forked(directory, saves, at=0, kill=None):
    # (what it told, whether it was killed); kill = (step of the save, seconds after its beginning)
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(read)
        attempt(directory, lambda line: os.write(write, line.encode() + b"\\n"), saves, at)
    os.close(write)
    told = []
    with os.fdopen(read) as lines:
        for line in lines:
            told.append((*line.split(), time.monotonic()))
            if kill and told[-1][0] == "begin" and sum(word == "begin" for word, *_ in told) == kill[0]:
                time.sleep(kill[1])
                os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -9), code
    return told, code == -9

class Chain:
    # one run, killed again and again: it never goes back behind what was done, nor ahead of what was begun
    def __init__(self, directory):
        self.directory, self.done, self.begun = directory, 0, 0
    def go(self, saves, **how):
        told, killed = forked(self.directory, saves, **how)
        for word, number, _ in told:
            number = int(number)
            if word == "resumed":
                assert self.done <= number <= self.begun, (self.done, number, self.begun)
                self.begun = self.done = number
            elif word != "counted":
                self.begun, self.done = max(self.begun, number), number if word == "done" else self.done
        return told, killed
"""

RANDOM_MOMENTS = """
chain, rng, kills, wanted = Chain(Path(sys.argv[1]) / "checkpoints"), random.Random(5), 0, int(sys.argv[2])
times = [at for *_, at in chain.go(2)[0]]
spans = [times[2] - times[1], times[4] - times[3]]  # of the first save, in which everything is met for the first time, and of another
while kills < wanted:
    number = rng.choice((1, 2))
    kills += chain.go(3, kill=(number, rng.uniform(0, spans[number - 1])))[1]
chain.go(1)
print(kills, *sorted(path.name for path in chain.directory.iterdir()), chain.done)
"""


@pytest.mark.slow
def test_killed_inside_a_save_at_random_moments(tmp_path: Path) -> None:
    wanted = 20 if FULL else 3
    kills, *names, done = said(python(ATTEMPTS + RANDOM_MOMENTS, tmp_path, wanted)).split()
    assert int(kills) == wanted
    assert names == sorted((str(int(done) - 1), done))


CHOSEN_MOMENTS = """
chain, some, kills = Chain(Path(sys.argv[1]) / "checkpoints"), int(sys.argv[2]), 0
told, _ = chain.go(3)
total = int(told[-1][1]) - 2  # a save has a file more or less than another one
moments = range(1, total + 1) if not some else sorted({total, total - 1, *random.Random(1).sample(range(1, total + 1), some)})
for at in moments:
    kills += chain.go(3, at=at)[1]
chain.go(1)
print(total, kills, len(moments), *sorted(path.name for path in chain.directory.iterdir()), chain.done)
"""


@pytest.mark.slow
@pytest.mark.exhaustive
def test_killed_between_any_two_changes_on_the_disk(tmp_path: Path) -> None:
    total, kills, moments, *names, done = said(
        python(ATTEMPTS + CHOSEN_MOMENTS, tmp_path, 0 if FULL else 3)
    ).split()
    assert int(total) > 30  # and what TensorStore does lies in between
    assert kills == moments
    assert names == sorted((str(int(done) - 1), done))


# ------------------------------------------------------------------------------------------ no room

DISK_FULL = """
directory, SIZE, told = Path(sys.argv[1]) / "checkpoints", 500_000, []
checkpoints, filler = Checkpoints(directory, keep_last=2, warn=told.append), directory.parent / "filler"
bytes_of_arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(state(0, SIZE)))
real, step, refused, full = shutil.disk_usage, 0, 0, 0

def save():
    global step
    step += 1
    begun = checkpoints.save(step, state(step, SIZE), {"step": step})
    checkpoints.wait()
    return begun

def leave(free):
    filler.unlink(missing_ok=True)
    with filler.open("wb") as file:
        file.truncate(0)
        os.posix_fallocate(file.fileno(), 0, real(directory).free - free)

def whole():
    reader = Checkpoints(directory)
    assert reader.newest() == checkpoints.steps()[-1]
    reader.close()

assert save() and save()
for lies in (False, True):  # a quota does not show in the free space, and others may fill the disk meanwhile
    shutil.disk_usage = (lambda path: real(path)._replace(free=1 << 40)) if lies else real
    for free in [0, bytes_of_arrays // 2, *(bytes_of_arrays + 4096 * pages for pages in range(0, 40, 3))]:
        leave(free)
        good, before = checkpoints.steps(), len(told)
        begun = save()
        if checkpoints.steps()[-1] != step:
            refused, full = refused + (not begun), full + ("No space left on device" in told[-1])
            assert len(told) == before + 1, told[before:]
            assert checkpoints.steps() == good
            save()  # told once, whether or not a few bytes less are enough
            assert len(told) == before + 1, told[before:]
        whole()
        filler.unlink()
        assert save()
        assert checkpoints.steps()[-1] == step
        whole()
check(checkpoints, step, SIZE)
checkpoints.close()
print(refused, full, *sorted(path.name for path in directory.iterdir()), step)
print(told[-1])
"""


@pytest.mark.slow
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """A real one, of 16 MB, which only this process sees."""
    alone = ("unshare", "-m") if os.geteuid() == 0 else ("unshare", "-rm")
    mount = (*alone, "sh", "-c", f'mount -t tmpfs -o size=16m none {tmp_path} && exec "$@"', "sh")
    if subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        cannot_run("this machine lets no process mount a file system of its own")
    lines = said(python(DISK_FULL, tmp_path, before=mount)).splitlines()
    refused, full, *names, step = lines[0].split()
    assert int(refused) > 3  # seen beforehand
    assert int(full) > 3  # met on the way
    assert names == sorted((str(int(step) - 1), step))
    assert lines[1].startswith("The checkpoint of step ")
    assert "No space left on device. The newest checkpoint is of step" in lines[1]


FILES_LIMITED = """
directory, SIZE, told = Path(sys.argv[1]) / "checkpoints", 500_000, []
checkpoints = Checkpoints(directory, keep_last=2, warn=told.append)
checkpoints.save(1, state(1, SIZE), {"step": 1})
step, (_, hard) = 1, resource.getrlimit(resource.RLIMIT_FSIZE)
for limit in (0, 30, 300, 3_000, 1_000_000):
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # the kernel answers EFBIG wherever a file grows beyond it
    step += 1
    assert checkpoints.save(step, state(step, SIZE), {"step": step})
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert checkpoints.steps() == [1]
    reader = Checkpoints(directory)
    assert reader.newest() == 1
    reader.close()
assert len(told) == 1, told
checkpoints.save(step + 1, state(step + 1, SIZE), {"step": step + 1})
checkpoints.close()
print(told[0], sorted(path.name for path in directory.iterdir()))
"""


@pytest.mark.slow
def test_files_that_may_not_grow(tmp_path: Path) -> None:
    told = said(python(FILES_LIMITED, tmp_path))
    assert told.startswith("The checkpoint of step 2 could not be written to ")
    assert told.endswith(": File too large. The newest checkpoint is of step 1. ['1', '7']\n")


# ------------------------------------------------------------------------------------ two processes

TWO = """
directory, number, port = Path(sys.argv[1]) / "checkpoints", int(sys.argv[2]), sys.argv[3]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, number)
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
mesh = jax.make_mesh((4,), ("fsdp",))
rows, everywhere = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
shardings = TrainState(everywhere, {"w": rows}, {"copies": everywhere}, everywhere)
values = lambda step: TrainState(step, {"w": step + jnp.arange(40_000.0)}, {"copies": step + jnp.arange(10_000.0)}, step)
build = jax.jit(values, out_shardings=shardings)
like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), build(0))
told = []

def save(step):
    begun = checkpoints.save(step, build(step), {"step": step})
    checkpoints.wait()
    return begun

def check(step):
    found, run = checkpoints.restore(step, like)
    assert run == {"step": step}
    for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(build(step))):
        for shard, other in zip(leaf.addressable_shards, wanted.addressable_shards):
            np.testing.assert_array_equal(shard.data, other.data)

checkpoints = Checkpoints(directory, keep_last=2, warn=told.append)
assert save(1) and save(2) and save(3)
assert checkpoints.steps() == [2, 3]
check(2)
checkpoints.close()

# a file of the other process is damaged
if number == 0:
    victim = max((directory / "3/state/ocdbt.process_1/d").iterdir(), key=lambda path: path.stat().st_size)
    content = victim.read_bytes()
    victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
multihost_utils.sync_global_devices("damaged")
checkpoints = Checkpoints(directory, keep_last=2, warn=told.append)
assert checkpoints.newest() == 2
check(2)
checkpoints.delete_after(2)
assert checkpoints.steps() == [2]
assert len(told) == 1 and "/3 is damaged and is skipped: state/ocdbt.process_1/d/" in told.pop(), told

# one process cannot write its part, then the other not the whole; nobody waits for anybody
for which in (0, 1):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if number == which:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    assert save(4 + which)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoints.steps() == [2]
assert len(told) == 1 and "step 4" in told[0] and "File too large" in told.pop(), told
flush = commit.flush
def full(path):
    raise OSError(28, "No space left on device")
if number == 0:
    commit.flush = full
assert save(6)
commit.flush = flush
assert checkpoints.steps() == [2]
real = shutil.disk_usage
if number == 0:
    shutil.disk_usage = lambda path: real(path)._replace(free=0)
assert not save(7)
shutil.disk_usage = real
assert told == []
assert save(8)
assert checkpoints.steps() == [2, 8]

# a defect in one ends both
if number == 1:
    checkpoints._handler.async_save = None
try:
    save(9)
except (TypeError, RuntimeError) as error:
    told.append(f"{type(error).__name__}: {error}")
assert checkpoints.steps() == [2, 8]
checkpoints.close()
print(json.dumps(told))
sys.stdout.flush()
multihost_utils.sync_global_devices("end")
"""


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    """What two processes of two devices each wrote, and what they said."""
    place = tmp_path_factory.mktemp("two")
    port = free_port()
    processes = [python(TWO, place, number, port, JAX_NUM_CPU_DEVICES="2") for number in (0, 1)]
    done = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(
        err for _, err in done
    )
    return place / "checkpoints", [json.loads(out.splitlines()[-1]) for out, _ in done]


@pytest.mark.slow
def test_two_processes_agree_on_every_fault(by_two: tuple[Path, list[list[str]]]) -> None:
    directory, (first, second) = by_two
    assert second == ["TypeError: 'NoneType' object is not callable"]
    assert first == [
        "RuntimeError: the checkpoint of step 9 failed in process 1: TypeError(\"'NoneType' object is not callable\")"
    ]
    assert {"2", "3.damaged-1", "8"} <= {path.name for path in directory.iterdir()}


@pytest.mark.slow
def test_what_two_processes_wrote_one_reads_on_another_mesh(
    by_two: tuple[Path, list[list[str]]], tmp_path: Path
) -> None:
    directory = shutil.copytree(by_two[0], tmp_path / "checkpoints")
    mesh = build_mesh({"data": 2, "fsdp": 4, "context": 1, "tensor": 1}, jax.devices())

    def array(shape: tuple[int, ...], axis: str | None = None, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(
            shape,
            dtype,
            sharding=NamedSharding(mesh, PartitionSpec(axis) if axis else PartitionSpec()),
        )

    like = TrainState(
        array((), dtype=jnp.int32),
        {"w": array((40_000,), "fsdp")},
        {"copies": array((10_000,), "data")},
        array((), dtype=jnp.int32),
    )
    checkpoints = Checkpoints(directory)
    assert checkpoints.newest() == 8
    found, record = checkpoints.restore(8, like)
    assert record == {"step": 8}
    assert (found.step, found.nonfinite) == (8, 8)
    np.testing.assert_array_equal(found.params["w"], 8 + np.arange(40_000.0))
    np.testing.assert_array_equal(found.opt_state["copies"], 8 + np.arange(10_000.0))
    checkpoints.close()
    assert damage(directory / "3.damaged-1")
