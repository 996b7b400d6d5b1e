"""The copy of a run in a bucket: what is uploaded in which order, and what comes back."""

import dataclasses
import json
import os
import signal
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from memory_bucket import MemoryBucket

from consyn_jax.config import RunConfig
from consyn_jax.config_file import describe
from consyn_jax.errors import Interrupted, Unsaved, UserError
from consyn_jax.remote import lease
from consyn_jax.remote.bucket import BucketError
from consyn_jax.resolve import resolve
from consyn_jax.training.checkpointing.checkpoint_files import file_hash, file_names
from consyn_jax.training.checkpointing.ownership import RunRecord
from consyn_jax.training.mirror import remote_run, run_mirror
from consyn_jax.training.mirror.remote_run import RemoteRun, check_remote, open_remote
from consyn_jax.training.mirror.run_mirror import RunMirror
from consyn_jax.training.run.directory import RunDirectory
from consyn_jax.training.run.model_manifest import MANIFEST, disagreement, seal

URL = "s3://bucket/runs/one"
TOP = "runs/one/"
WAITS_S = 120.0


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in [
        (run_mirror, "LOOK_S", 0.01),
        (run_mirror, "FILES_S", 0.05),
        (run_mirror, "LONGEST_PAUSE_S", 0.05),
        (run_mirror, "ABANDON_S", 0.3),
        (lease, "LEASE_S", 2.0),
        (lease, "RENEW_S", 0.1),
        (lease, "MARGIN_S", 0.2),
    ]:
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> MemoryBucket:
    found = MemoryBucket()
    monkeypatch.setattr(remote_run, "open_bucket", lambda place: found)
    return found


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    flags = {"output": str(tmp_path / "run"), "remote": URL, "max_steps": 100, "lr": 1e-3}
    return resolve(flags)[0]


@pytest.fixture
def directory(config: RunConfig) -> RunDirectory:
    return made(Path(config.saving.output), config)


def made(path: Path, config: RunConfig) -> RunDirectory:
    """The directory of a run at its beginning."""
    path.mkdir()
    record = RunRecord.new()
    record.write(path)
    lasting = describe(config, dict.fromkeys(vars(config), "flag") | _origins())
    (path / "config.yaml").write_text(lasting + "derived: {total_steps: 100}\n")
    (path / "metrics.jsonl").write_text('{"event": "start", "step": 0}\n')
    return RunDirectory(path, False, record)


def _origins() -> dict[str, str]:
    from consyn_jax.flags import flags

    return dict.fromkeys(flags(RunConfig), "flag")


def checkpoint(directory: RunDirectory, step: int, content: str = "array") -> Path:
    """A checkpoint as `commit` leaves it."""
    fresh = directory.checkpoints / f"{step}.orbax-checkpoint-tmp"
    (fresh / "state" / "d").mkdir(parents=True)
    (fresh / "state" / "d" / "0").write_text(f"{content} of {step}")
    (fresh / "run.json").write_text(json.dumps({"run": directory.record.run, "step": step}))
    sums = [f"{file_hash(fresh / name)}  {name}\n" for name in file_names(fresh)]
    (fresh / "CHECKSUMS").write_text("".join(sums))
    with (directory.path / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"step": step}) + "\n")
    return fresh.rename(directory.checkpoints / str(step))


def model(directory: RunDirectory, name: str, content: str) -> None:
    fresh = directory.path / f".{name}.0123456789abcdef.new"
    fresh.mkdir()
    (fresh / "config.json").write_text(content)
    (fresh / "model.safetensors").write_text(content)
    seal(fresh)
    target = directory.path / name
    if target.exists():
        target.rename(directory.path / f".{name}.0123456789abcdef.old")
    fresh.rename(target)


class Mirrored:
    """A running mirror, and what it has said."""

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        moved: Callable[[], None] = lambda: None,
    ) -> None:
        self.warned: list[str] = []
        self.noted: list[str] = []
        remote = RemoteRun(URL)
        remote.lease.acquire()
        remote.lease.start()
        self.remote = remote
        told = self.warned.append, self.noted.append, moved
        self.mirror = RunMirror(remote, directory, config.saving, *told)


@pytest.fixture
def start(config: RunConfig) -> Iterator[Callable[[RunDirectory], Mirrored]]:
    with ExitStack() as stack:

        def begin(directory: RunDirectory) -> Mirrored:
            found = Mirrored(config, directory)
            stack.callback(found.mirror.close)
            return found

        yield begin


def wait(until: Callable[[], Any]) -> None:
    end = time.monotonic() + WAITS_S
    while not until():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.005)


def marked(bucket: MemoryBucket) -> list[int]:
    names = [key for key in list(bucket.objects) if key.startswith(f"{TOP}markers/")]
    return sorted(int(Path(name).stem) for name in names)


def fetched(config: RunConfig, path: Path) -> list[str]:
    """What an empty machine gets, and what is said."""
    said: list[str] = []
    path.mkdir()
    elsewhere = dataclasses.replace(
        config, saving=dataclasses.replace(config.saving, output=str(path))
    )
    remote = RemoteRun(URL)
    try:
        remote.begin(path, elsewhere, {"total_steps": 100}, said.append)
    finally:
        remote.release()
    return said


def files(path: Path) -> dict[str, str]:
    return {
        file.relative_to(path).as_posix(): file.read_text()
        for file in path.rglob("*")
        if file.is_file()
    }


def test_an_empty_machine_gets_the_run_at_its_newest_marked_step(
    bucket: MemoryBucket,
    directory: RunDirectory,
    config: RunConfig,
    start: Callable[[RunDirectory], Mirrored],
    tmp_path: Path,
) -> None:
    running = start(directory)
    for step in (10, 20):
        checkpoint(directory, step)
        wait(lambda step=step: step in marked(bucket))
    model(directory, "best", "of 20")
    running.mirror.close()
    said = fetched(config, tmp_path / "other")
    own = files(directory.path)
    assert files(tmp_path / "other") == {
        name: text for name, text in own.items() if not name.startswith("checkpoints/10")
    }
    assert disagreement(tmp_path / "other" / "best") is None
    assert said == [f"The run up to step 20 was downloaded from {URL}."]
    assert running.warned == []
    assert f"{TOP}lease.json" not in bucket.objects


def test_a_marker_comes_last_and_goes_first(
    bucket: MemoryBucket,
    directory: RunDirectory,
    start: Callable[[RunDirectory], Mirrored],
) -> None:
    running = start(directory)
    for step in (10, 20, 30, 40):  # three are kept
        checkpoint(directory, step)
        wait(lambda step=step: step in marked(bucket))
    running.mirror.close()
    assert marked(bucket) == [20, 30, 40]
    order = [(what, key.removeprefix(TOP)) for what, key in bucket.requests]
    assert order[0] == ("upload", "run.json")
    for step in (10, 20, 30, 40):
        mark = order.index(("upload", f"markers/{step}.json"))
        own = [i for i, each in enumerate(order) if each[1].startswith(f"checkpoints/{step}/")]
        uploads = [i for i in own if order[i][0] == "upload"]
        assert len(uploads) == 3
        assert max(uploads) < mark
        log = [i for i in range(mark) if order[i] == ("upload", "metrics.jsonl")]
        assert log, "the log precedes the marker"
    removed = [key for what, key in order if what == "delete" and "10" in key]
    assert removed[0] == "markers/10.json"
    assert len(removed) == 4
    assert not any(key.startswith(f"{TOP}checkpoints/10/") for key in bucket.objects)


def test_a_store_that_fails_is_a_warning_and_nothing_is_lost(
    bucket: MemoryBucket,
    directory: RunDirectory,
    start: Callable[[RunDirectory], Mirrored],
) -> None:
    is_down = threading.Event()

    def fail(name: str, key: str) -> None:
        if is_down.is_set():
            raise BucketError("cannot be reached (refused)")

    bucket.before = fail
    running = start(directory)
    checkpoint(directory, 10)
    wait(lambda: 10 in marked(bucket))
    is_down.set()
    checkpoint(directory, 20)
    wait(lambda: running.warned)
    checkpoint(directory, 30)
    time.sleep(0.2)
    assert len(running.warned) == 1
    assert running.warned[0].startswith(f"--remote {URL} cannot be reached (refused). The run goes")
    is_down.clear()
    wait(lambda: marked(bucket) == [10, 20, 30])
    wait(lambda: running.noted == [f"Uploads to {URL} succeed again."])


def test_the_end_waits_for_a_store_that_is_down_and_not_for_ever(
    bucket: MemoryBucket,
    directory: RunDirectory,
    start: Callable[[RunDirectory], Mirrored],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_mirror, "EXIT_S", 0.3)
    running = start(directory)
    checkpoint(directory, 10)
    wait(lambda: 10 in marked(bucket))

    def fail(name: str, key: str) -> None:
        raise BucketError("does not answer now (SlowDown)")

    bucket.before = fail
    checkpoint(directory, 20)
    began = time.monotonic()
    running.mirror.close()
    assert 0.3 <= time.monotonic() - began < 60
    assert running.warned[-1] == (
        f"--remote {URL} still does not answer now (SlowDown), so not all files of "
        f"{directory.path} are there (newest complete checkpoint there: step 10). To upload the "
        "rest, run the same command again on this machine."
    )
    bucket.before = lambda name, key: None
    start(directory).mirror.close()  # the same command, which waits for the end of the lease
    assert marked(bucket) == [10, 20]


def test_a_writer_that_lost_its_lease_uploads_nothing_more(
    bucket: MemoryBucket,
    directory: RunDirectory,
    start: Callable[[RunDirectory], Mirrored],
) -> None:
    running = start(directory)
    wait(lambda: f"{TOP}metrics.jsonl" in bucket.objects)
    bucket.objects[f"{TOP}lease.json"] = b'{"holder": "another"}', "w1"
    wait(lambda: running.remote.lease.lost)
    checkpoint(directory, 10)
    wait(lambda: running.warned)
    assert running.warned == [
        f"Another process has taken --remote {URL}, so this one uploads nothing more. The run "
        "goes on in its own directory."
    ]
    running.mirror.close()
    assert marked(bucket) == []
    assert bucket.objects[f"{TOP}lease.json"][1] == "w1"


def test_a_model_that_is_replaced_while_it_is_read_is_never_a_mixture(
    bucket: MemoryBucket,
    directory: RunDirectory,
    start: Callable[[RunDirectory], Mirrored],
) -> None:
    model(directory, "best", "one")
    done = threading.Event()
    mixtures = []

    def replace(name: str, key: str) -> None:
        if key == f"{TOP}best/model.safetensors" and not done.is_set():
            done.set()
            model(directory, "best", "two")
        if (mark := bucket.objects.get(f"{TOP}best/{MANIFEST}")) and name == "list":
            mixtures.append((mark[0], bucket.objects[f"{TOP}best/config.json"][0]))

    bucket.before = replace
    running = start(directory)
    wait(lambda: f"{TOP}best/{MANIFEST}" in bucket.objects)
    running.mirror.close()
    manifest = (directory.path / "best" / MANIFEST).read_bytes()
    assert bucket.objects[f"{TOP}best/{MANIFEST}"][0] == manifest
    assert bucket.objects[f"{TOP}best/config.json"][0] == b"two"
    assert {content for mark, content in mixtures if mark == manifest} <= {b"two"}


def test_a_model_that_is_gone_here_goes_there(
    bucket: MemoryBucket,
    directory: RunDirectory,
    start: Callable[[RunDirectory], Mirrored],
) -> None:
    model(directory, "best", "one")
    start(directory).mirror.close()
    assert f"{TOP}best/{MANIFEST}" in bucket.objects
    (directory.path / "best").rename(directory.path / ".best.0123456789abcdef.gone")
    start(directory).mirror.close()
    assert not any(key.startswith(f"{TOP}best/") for key in bucket.objects)


def test_a_run_that_went_back_takes_the_later_steps_from_the_bucket_before_its_log(
    bucket: MemoryBucket,
    directory: RunDirectory,
    start: Callable[[RunDirectory], Mirrored],
) -> None:
    for step in (10, 20):
        checkpoint(directory, step)
    start(directory).mirror.close()
    assert marked(bucket) == [10, 20]
    (directory.checkpoints / "20").rename(directory.path / ".gone")
    (directory.path / "metrics.jsonl").write_text('{"step": 10}\n')
    bucket.requests.clear()
    start(directory).mirror.close()
    assert marked(bucket) == [10]
    order = [key for _, key in bucket.requests]
    assert order.index(f"{TOP}markers/20.json") < order.index(f"{TOP}metrics.jsonl")


def test_a_step_that_is_taken_again_replaces_the_one_in_the_bucket(
    bucket: MemoryBucket,
    directory: RunDirectory,
    start: Callable[[RunDirectory], Mirrored],
) -> None:
    for step in (10, 20):
        checkpoint(directory, step)
    running = start(directory)
    wait(lambda: marked(bucket) == [10, 20])
    (directory.checkpoints / "20").rename(directory.path / ".gone")
    bucket.requests.clear()
    checkpoint(directory, 20, "another array")
    array = f"{TOP}checkpoints/20/state/d/0"
    wait(lambda: bucket.objects.get(array, (b"",))[0] == b"another array of 20")
    wait(lambda: marked(bucket) == [10, 20])
    running.mirror.close()
    order = [(what, key.removeprefix(TOP)) for what, key in bucket.requests]
    removed = order.index(("delete", "markers/20.json"))
    assert removed < order.index(("upload", "metrics.jsonl"))
    assert removed < order.index(("upload", "checkpoints/20/state/d/0"))


def test_half_uploads_and_damage_are_passed_over(
    bucket: MemoryBucket,
    directory: RunDirectory,
    config: RunConfig,
    start: Callable[[RunDirectory], Mirrored],
    tmp_path: Path,
) -> None:
    for step in (10, 20, 30):
        checkpoint(directory, step)
    model(directory, "best", "one")
    start(directory).mirror.close()
    del bucket.objects[f"{TOP}markers/30.json"]  # killed before it
    bucket._write(f"{TOP}checkpoints/20/state/d/0", b"xrray of 20")
    del bucket.objects[f"{TOP}best/{MANIFEST}"]
    said = fetched(config, tmp_path / "other")
    assert said == [
        f"warning: {URL}/checkpoints/20 is damaged and is skipped: state/d/0 is not what was written.",
        f"The run up to step 10 was downloaded from {URL}.",
    ]
    assert not (tmp_path / "other" / "best").exists()
    assert not any(key.startswith(f"{TOP}checkpoints/30/") for key in bucket.objects)


def test_a_fetch_that_is_killed_is_done_again(
    bucket: MemoryBucket,
    directory: RunDirectory,
    config: RunConfig,
    start: Callable[[RunDirectory], Mirrored],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint(directory, 10)
    start(directory).mirror.close()
    names = len(list(directory.path.iterdir()))
    other, moved = tmp_path / "other", Path.rename
    for count in range(names):
        left = [count]

        def fail_later(self: Path, target: Path, left: list[int] = left) -> Path:
            if target.parent == other:
                if left[0] == 0:
                    raise KeyboardInterrupt
                left[0] -= 1
            return moved(self, target)

        monkeypatch.setattr(Path, "rename", fail_later)
        other.mkdir(exist_ok=True)
        remote = RemoteRun(URL)
        here = dataclasses.replace(
            config, saving=dataclasses.replace(config.saving, output=str(other))
        )
        with pytest.raises(KeyboardInterrupt):
            remote.begin(other, here, {"total_steps": 100}, print)
        remote.release()
        monkeypatch.setattr(Path, "rename", moved)
        remote = RemoteRun(URL)
        remote.begin(other, here, {"total_steps": 100}, print)
        remote.release()
        assert files(other) == files(directory.path), count
        for entry in list(other.iterdir()):
            os.system(f"rm -rf {entry}")


def test_whoever_is_ahead_decides(
    bucket: MemoryBucket,
    directory: RunDirectory,
    config: RunConfig,
    start: Callable[[RunDirectory], Mirrored],
) -> None:
    for step in (10, 20):
        checkpoint(directory, step)
    start(directory).mirror.close()
    checkpoint(directory, 30)
    remote = RemoteRun(URL)
    before = files(directory.path)
    remote.begin(directory.path, config, {"total_steps": 100}, print)
    remote.release()
    assert files(directory.path) == before
    for step in (20, 30):
        (directory.checkpoints / str(step)).rename(directory.path / f".gone-{step}")
    remote = RemoteRun(URL)
    remote.begin(directory.path, config, {"total_steps": 100}, print)
    remote.release()
    assert sorted(p.name for p in directory.checkpoints.iterdir()) == ["20"]


def test_another_run_is_refused_by_name_and_overwritten_when_asked(
    bucket: MemoryBucket,
    directory: RunDirectory,
    config: RunConfig,
    start: Callable[[RunDirectory], Mirrored],
    tmp_path: Path,
) -> None:
    checkpoint(directory, 10)
    start(directory).mirror.close()
    check_remote(config)

    def with_(**flags: Any) -> RunConfig:
        return resolve({"remote": URL, "max_steps": 100, "lr": 1e-3} | flags)[0]

    empty = str(tmp_path / "empty")
    check_remote(with_(output=empty))
    with pytest.raises(UserError, match=rf"^--remote {URL} holds another run: --seed was 42 and"):
        check_remote(with_(output=empty, seed=7))
    with pytest.raises(UserError, match=rf"^--remote {URL} already holds a run"):
        check_remote(with_(output=empty, resume="never"))
    other = with_(output=str(tmp_path / "other"))
    checkpoint(made(tmp_path / "other", other), 10)
    with pytest.raises(UserError, match=r"holds another run \(its identity is [0-9a-f]{8}, and"):
        check_remote(other)
    (tmp_path / "other" / "run.json").unlink()  # of a version without identities
    with pytest.raises(UserError, match=r"identity of the run in .*other is none"):
        check_remote(other)
    inside = with_(output=empty, overwrite=True, data=f"{URL}/final")
    with pytest.raises(UserError, match=rf"--overwrite would delete --data {URL}/final"):
        check_remote(inside)
    anew = with_(output=str(tmp_path / "other"), overwrite=True)
    bucket.requests.clear()
    with ExitStack() as stack:
        remote, fetch = open_remote(anew, {}, stack)
        fetch(tmp_path / "other")
        assert set(bucket.objects) == {f"{TOP}lease.json"}
    order = [key.removeprefix(TOP) for _, key in bucket.requests]
    assert order[0] == "markers/10.json"
    assert order[-2:] == ["run.json", "lease.json"]
    assert bucket.objects == {}
    assert remote is not None


def test_what_is_no_run_is_refused(bucket: MemoryBucket, config: RunConfig) -> None:
    bucket._write(f"{TOP}corpus.txt", b"text")
    with pytest.raises(UserError, match=r"holds corpus.txt, but no run of consyn-train"):
        check_remote(config)
    bucket._write(f"{TOP}run.json", b"{}")
    with pytest.raises(UserError, match=r"run.json is damaged"):
        check_remote(config)


def test_a_store_that_does_not_answer_at_the_start_is_a_sentence(
    bucket: MemoryBucket, config: RunConfig
) -> None:
    def fail(name: str, key: str) -> None:
        raise BucketError("cannot be reached (refused)")

    bucket.before = fail
    with pytest.raises(
        UserError, match=rf"^--remote {URL} cannot be reached \(refused\)\. Check .* again\.$"
    ):
        check_remote(config)


def test_a_defect_in_the_thread_is_raised_at_the_end_and_not_before(
    bucket: MemoryBucket, config: RunConfig, directory: RunDirectory
) -> None:
    def break_(name: str, key: str) -> None:
        if name == "upload":
            raise ZeroDivisionError

    bucket.before = break_
    running = Mirrored(config, directory)
    with pytest.raises(ZeroDivisionError):
        running.mirror.close()


@pytest.fixture
def hanging(bucket: MemoryBucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While this event is set, the store accepts requests and answers none of them."""
    monkeypatch.setattr(remote_run, "RELEASE_S", 0.1)
    hangs, released = threading.Event(), threading.Event()

    def hang(name: str, key: str) -> None:
        if hangs.is_set():
            released.wait(WAITS_S)
            raise BucketError("cannot be reached (Read timeout)")

    bucket.before = hang
    yield hangs
    hangs.clear()
    released.set()


def test_the_end_of_the_wait_does_not_depend_on_the_client_s_timeouts(
    hanging: threading.Event,
    bucket: MemoryBucket,
    directory: RunDirectory,
    config: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The thread hangs in one request for longer than the run waits for all of them."""
    monkeypatch.setattr(run_mirror, "EXIT_S", 0.3)
    checkpoint(directory, 10)
    running = Mirrored(config, directory)
    wait(lambda: 10 in marked(bucket))
    hanging.set()
    checkpoint(directory, 20)
    began = time.monotonic()
    running.mirror.close(is_complete=True)
    running.remote.release()  # the callback of the stack
    assert 0.3 <= time.monotonic() - began < 30
    assert running.warned == [
        f"--remote {URL} has taken nothing for 0.3 seconds, so not all files of {directory.path} "
        "are there (newest complete checkpoint there: step 10). To upload the rest, run the same "
        "command again on this machine."
    ]
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "mirror")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The mirror's clock, which only the test moves. The run waits 1 s without progress."""
    now = [0.0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep)
    monkeypatch.setattr(run_mirror, "time", clock)
    monkeypatch.setattr(run_mirror, "EXIT_S", 1.0)
    return now


def test_a_slow_upload_is_waited_for_while_its_bytes_are_sent(
    clock: list[float],
    bucket: MemoryBucket,
    directory: RunDirectory,
    config: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also if uploads have failed since before the end, and begin anew twice."""
    upload, attempts, looks = bucket.upload, [0], [0]
    (directory.path / "loss.png").write_bytes(bytes(10))
    checkpoint(directory, 10)

    def fail(name: str, key: str) -> None:
        if name == "upload":
            raise BucketError("does not answer now (SlowDown)")

    def slowly(file: Any, key: str, sent: Any) -> None:
        if key.endswith("loss.png"):
            attempts[0] += 1
            for total in range(10 if attempts[0] == 3 else 4):
                clock[0] += 0.5
                sent(total + 1)
                seen = looks[0]
                wait(lambda seen=seen: looks[0] >= seen + 2)
            if attempts[0] < 3:
                raise BucketError("cannot be reached (reset)")
        upload(file, key, sent)

    def look() -> None:
        looks[0] += 1

    bucket.before = fail
    running = Mirrored(config, directory, look)
    wait(lambda: running.warned)
    clock[0] += 500
    monkeypatch.setattr(bucket, "upload", slowly)
    closing = threading.Thread(target=running.mirror.close)
    closing.start()
    wait(lambda: looks[0])
    bucket.before = lambda name, key: None
    closing.join(WAITS_S)
    assert attempts == [3]
    assert len(running.warned) == 1, running.warned
    assert running.noted == [f"Uploads to {URL} succeed again."]
    assert marked(bucket) == [10]


@pytest.mark.parametrize("last", ["checkpoints/10/run.json", "markers/10.json"])
def test_what_is_sent_again_does_not_prolong_the_wait_for_ever(
    last: str,
    clock: list[float],
    bucket: MemoryBucket,
    directory: RunDirectory,
    config: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server takes all bytes of a checkpoint, but always refuses one of its objects."""
    upload, attempts = bucket.upload, [0]

    def refuse(file: Any, key: str, sent: Any) -> None:
        clock[0] += 0.1
        sent(5)
        if key == f"{TOP}{last}":
            attempts[0] += 1
            raise BucketError("refuses the request (QuotaExceeded: full)")
        upload(file, key, sent)

    monkeypatch.setattr(run_mirror, "ABANDON_S", WAITS_S)
    monkeypatch.setattr(bucket, "upload", refuse)
    running = Mirrored(config, directory)
    checkpoint(directory, 10)
    running.mirror.close()
    assert attempts[0] > run_mirror.COUNTED_ATTEMPTS
    assert running.warned[-1].startswith(f"--remote {URL} still refuses the request (QuotaExceeded")
    assert f"{TOP}lease.json" not in bucket.objects, "the thread has ended, so it is released"


def test_an_abandoned_thread_sends_no_more_of_an_object(
    bucket: MemoryBucket,
    directory: RunDirectory,
    config: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The lease is released once the thread has ended, so that the next start need not wait."""
    upload, total = bucket.upload, [0]
    checkpoint(directory, 10)
    sends = threading.Event()

    def endlessly(file: Any, key: str, sent: Any) -> None:
        while key.endswith("state/d/0"):
            total[0] += 1
            sent(total[0])
            sends.set()
            time.sleep(0.001)
        upload(file, key, sent)

    def come() -> None:
        sends.wait(WAITS_S)
        raise Unsaved(signal.SIGTERM)

    monkeypatch.setattr(run_mirror, "ABANDON_S", WAITS_S)
    monkeypatch.setattr(bucket, "upload", endlessly)
    running = Mirrored(config, directory, come)
    with pytest.raises(Interrupted, match=r"^SIGTERM: the run in .* is complete, and no longer"):
        running.mirror.close(is_complete=True)
    assert not running.mirror._thread.is_alive()
    assert f"{TOP}lease.json" not in bucket.objects


def test_a_signal_while_the_lease_is_released_does_not_say_that_files_are_missing(
    bucket: MemoryBucket,
    directory: RunDirectory,
    config: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint(directory, 10)
    running = Mirrored(config, directory)
    dropped: list[int] = []

    def come() -> None:
        raise Unsaved(signal.SIGTERM, dropped.append)

    monkeypatch.setattr(running.remote, "release", come)
    running.mirror.close(is_complete=True)
    assert marked(bucket) == [10]
    assert running.warned == dropped == []


@pytest.mark.parametrize(
    ("flags", "command"),
    [
        ({"overwrite": True}, "the same command without --overwrite"),
        ({"resume": "10"}, "the same command with --resume auto"),
        ({"resume": "never"}, "the same command with --resume auto"),
    ],
)
def test_the_command_that_uploads_the_rest_deletes_nothing(
    flags: dict[str, Any],
    command: str,
    hanging: threading.Event,
    directory: RunDirectory,
    config: RunConfig,
) -> None:
    def come() -> None:
        raise Unsaved(signal.SIGTERM)

    own = dataclasses.replace(config, saving=dataclasses.replace(config.saving, **flags))
    running = Mirrored(own, directory, come)
    hanging.set()
    checkpoint(directory, 10)  # the thread may have uploaded all that was there before
    with pytest.raises(Interrupted) as stopped:
        running.mirror.close(is_complete=True)
    said = f"To upload the rest, run {command} again on this machine."
    assert str(stopped.value).endswith(said)


@pytest.mark.parametrize("is_complete", [True, False])
def test_a_signal_ends_the_wait(
    is_complete: bool, hanging: threading.Event, config: RunConfig, directory: RunDirectory
) -> None:
    """A complete run exits with 75; after another end, its own exit code remains."""

    def come() -> None:
        raise Unsaved(signal.SIGTERM, dropped.append)

    dropped: list[int] = []
    running = Mirrored(config, directory, come)
    hanging.set()
    checkpoint(directory, 10)  # the thread may have uploaded all that was there before
    began = time.monotonic()
    rest = f"not all files of {directory.path} are there (newest complete checkpoint there: none). "
    if is_complete:
        with pytest.raises(Interrupted) as stopped:
            running.mirror.close(is_complete)
        assert str(stopped.value).startswith(
            f"SIGTERM: the run in {directory.path} is complete, and no longer waits for --remote "
            f"{URL}: {rest}"
        )
    else:
        running.mirror.close(is_complete)
        said = f"After a signal, the run no longer waits for --remote {URL}: {rest}"
        assert running.warned[-1].startswith(said)
    running.remote.release()
    assert time.monotonic() - began < 30
    assert dropped == []


def test_a_release_that_hangs_ends(hanging: threading.Event) -> None:
    remote = RemoteRun(URL)
    remote.lease.acquire()
    remote.lease.start()
    hanging.set()
    began = time.monotonic()
    remote.release()
    assert time.monotonic() - began < 30


def test_decay_from_has_no_copy(tmp_path: Path) -> None:
    flags = {"decay_from": 10, "scheduler": "wsd", "remote": URL, "output": str(tmp_path / "x")}
    with pytest.raises(UserError, match="--remote does not work with --decay_from"):
        check_remote(resolve(flags)[0])
