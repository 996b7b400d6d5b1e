"""Training from and to buckets, with real servers on loopback: moto for S3, fake-gcs-server for GCS.

The machine is wiped after each kill: what comes back comes from the bucket alone. Times of leases
and of pauses are shorter than in use. The whole of it:

    CONSYN_BUCKET_KILLS=20 CONSYN_BUCKET_RECORD=buckets.json pytest -m slow tests/integration/test_buckets.py
"""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bucket_servers import Server, in_environment, missing, running

from consyn_jax.remote.bucket_clients import open_bucket
from consyn_jax.remote.urls import parse

from .conftest import MODEL, Run, cannot_run
from .nursery import Child, Nursery

KILLS = int(os.environ.get("CONSYN_BUCKET_KILLS", "2"))
RECORD = os.environ.get("CONSYN_BUCKET_RECORD")
STEPS = max(30, 8 * KILLS)
STEP_S = 0.04
NEVER = 1 << 30  # the loader reads ahead of the last step, so no hold may be there
FLAGS = [*MODEL, "--max_steps", STEPS, "--max_tokens", 32, "--batch_size", 8, "--dropout", 0.1]
FLAGS += ["--validation_fraction", 0.2, "--logging_steps", 1, "--eval_steps", 5, "--save_steps", 5]
FLAGS += ["--logging_backend", "none"]
BEFORE = """
import os, time
os.environ.update({environment!r})
from consyn_jax.data import loader
from consyn_jax.remote import lease
from consyn_jax.training.mirror import run_mirror
lease.LEASE_S, lease.RENEW_S, lease.MARGIN_S = 6.0, 0.4, 1.0
run_mirror.LOOK_S, run_mirror.FILES_S, run_mirror.LONGEST_PAUSE_S = 0.05, 0.3, 0.5
run_mirror.EXIT_S = {exit_s}
inner = loader.BatchLoader.batch
def batch(self, step):
    time.sleep({step_s})
    while step > {held} and not os.path.exists({go!r}):
        time.sleep(0.02)
    return inner(self, step)
loader.BatchLoader.batch = batch
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900 + 60 * KILLS)]
SCHEMES = ("s3", "gs")
WHEN = ("beginning", "step", "upload", "mark")


@pytest.fixture(scope="module")
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, corpus: Path
) -> Iterator[Server]:
    if reason := missing(request.param):
        cannot_run(reason)
    with running(request.param, tmp_path_factory.mktemp("server")) as found:
        store(found, "corpus/documents.jsonl", corpus)
        yield found


@pytest.fixture(autouse=True)
def open_gate(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").gate.mode = "open"


def store(server: Server, key: str, path: Path) -> None:
    """Upload a file, or all files of a directory."""
    with in_environment(server.environment):
        bucket = open_bucket(parse(server.url(key)))
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file():
                inside = "" if file == path else f"/{file.relative_to(path).as_posix()}"
                with file.open("rb") as opened:
                    bucket.upload(opened, f"{key}{inside}")


def there(server: Server, key: str) -> dict[str, int]:
    """Names below a key, with their sizes."""
    with in_environment(server.environment):
        found = open_bucket(parse(server.url(key))).find(f"{key}/")
    return {each.key.removeprefix(f"{key}/"): each.size for each in found}


def command(
    server: Server,
    machine: Path,
    key: str,
    *flags: object,
    step_s: float = STEP_S,
    exit_s: float = 120.0,
    environment: dict[str, str] | None = None,
    held: int = NEVER,
) -> dict[str, Any]:
    """The arguments of a nursery for the run on a machine: with its own cache, and nothing of another's.

    Args:
        held: it takes no data after this step before there is a file `go` on the machine.
    """
    machine.mkdir(exist_ok=True)
    shown = server.environment if environment is None else environment
    own = {**shown, "CONSYN_CACHE": str(machine / "cache")}
    go = str(machine / "go")
    before = BEFORE.format(environment=own, step_s=step_s, exit_s=exit_s, held=held, go=go)
    where = ["--data", server.url("corpus"), "--remote", server.url(key)]
    where += ["--output", machine / "run"]
    return {"flags": [*FLAGS, *where, *flags], "before": before}


def start(nursery: Nursery, *given: Any, **more: Any) -> Child:
    """Start the run on a machine; see `command`."""
    made = command(*given, **more)
    return nursery.start(*made["flags"], before=made["before"])


def last_step(path: Path) -> int:
    metrics = path / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines() if metrics.exists() else []
    whole = (line for line in reversed(lines) if line.endswith(b"}"))
    return next((json.loads(line)["step"] for line in whole), 0)


def await_step(child: Child, path: Path, step: int) -> None:
    deadline = time.monotonic() + 240
    while last_step(path) < step:
        assert child.alive, child.said
        assert time.monotonic() < deadline, child.said
        time.sleep(0.005)


def newest_mark(server: Server, key: str) -> int:
    """The newest marked step in the bucket; 0 if there is none."""
    return max([0, *(int(Path(name).stem) for name in there(server, f"{key}/markers"))])


def await_mark(child: Child, server: Server, key: str, step: int) -> None:
    deadline = time.monotonic() + 240
    while newest_mark(server, key) < step:
        assert child.alive, child.said
        assert time.monotonic() < deadline, child.said
        time.sleep(0.1)


def await_upload(child: Child, server: Server, key: str, marked: int) -> None:
    """Wait until a checkpoint after step `marked` is being uploaded, or until it just was."""
    deadline = time.monotonic() + 240
    while True:
        steps = [int(name.split("/")[0]) for name in there(server, f"{key}/checkpoints")]
        if max([0, *steps]) > marked:
            return
        assert child.alive, child.said
        assert time.monotonic() < deadline, child.said
        time.sleep(0.01)


def await_said(child: Child, text: str, times: int) -> None:
    deadline = time.monotonic() + 240
    while child.said.count(text) < times:
        assert child.alive, child.said
        assert time.monotonic() < deadline, child.said
        time.sleep(0.05)


@pytest.fixture(scope="module")
def whole(nursery: Nursery, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that nobody touched, from files to a directory."""
    path = tmp_path_factory.mktemp("whole") / "run"
    child = nursery.start(*FLAGS, "--data", corpus, "--output", path)
    assert child.wait() == 0, child.said
    return Run(path, 0, child.said)


@pytest.mark.parametrize("server", SCHEMES, indirect=True)
def test_killed_and_wiped_and_resumed_from_the_copy_alone(
    nursery: Nursery, server: Server, whole: Run, tmp_path: Path
) -> None:
    chance, moments, marked = random.Random(20), list[dict[str, Any]](), 0
    kills = KILLS if server.scheme == "s3" else max(1, KILLS // 4)
    for n in range(kills):
        machine = tmp_path / f"machine-{n}"
        # Held, as the kills would otherwise all come after its end.
        held = max(marked + 6, STEPS * (n + 1) // (kills + 1))
        child = start(nursery, server, machine, "killed", held=held)
        # Every third waits for a mark, so that the run gets on.
        when = chance.choice(WHEN) if n % 3 else "mark"
        match when:
            case "beginning":  # it waits for the lease, downloads, or compiles
                time.sleep(chance.uniform(0, 4))
            case "step":
                await_step(child, machine / "run", chance.randint(marked + 1, held))
            case "upload":
                await_upload(child, server, "killed", marked)
            case "mark":
                await_mark(child, server, "killed", min(held // 5 * 5, marked + 5))
        time.sleep(chance.uniform(0, 0.3))
        assert child.alive, child.said
        child.signal(signal.SIGKILL)
        child.wait()
        marked = newest_mark(server, "killed")
        step = last_step(machine / "run")
        moments.append({"when": when, "killed_at": step, "marked": marked})
        shutil.rmtree(machine)
    # They are spread over the run.
    assert len({moment["marked"] for moment in moments}) > kills // 3, moments
    assert 0 < marked < STEPS, moments
    child = start(nursery, server, tmp_path / "last", "killed")
    assert child.wait() == 0, child.said
    run = Run(tmp_path / "last" / "run", 0, child.said)
    assert run.numbers == whole.numbers
    assert run.weights == whole.weights
    assert "warning" not in run.said
    if RECORD:
        facts = {"kills": kills, "steps": STEPS, "moments": moments, "bit_identical": True}
        record = Path(RECORD)
        old = json.loads(record.read_text()) if record.exists() else {}
        record.write_text(json.dumps(old | {server.scheme: facts}, indent=1) + "\n")
    # All of it is there, so that another empty machine finds the run complete.
    shutil.rmtree(tmp_path / "last")
    child = start(nursery, server, tmp_path / "other", "killed")
    assert child.wait() == 0, child.said
    assert "This run is complete" in child.said
    assert Run(tmp_path / "other" / "run", 0, "").weights == whole.weights
    assert "lease.json" not in there(server, "killed")


class Enough(Exception):
    pass


@pytest.mark.parametrize("server", SCHEMES, indirect=True)
def test_an_upload_tells_how_much_it_has_sent_and_can_be_ended(
    server: Server, tmp_path: Path
) -> None:
    """Also in the middle of an object, and without a retry of the client."""
    size, totals = 40 << 20, list[int]()
    (tmp_path / "file").write_bytes(bytes(size))

    def end(total: int) -> None:
        totals.append(total)
        if total >= 10 << 20:
            raise Enough

    with in_environment(server.environment), (tmp_path / "file").open("rb") as file:
        bucket = open_bucket(parse(server.url("progress")))
        bucket.upload(file, "progress/whole", totals.append)
        assert totals == sorted(totals)
        assert len(totals) > 4
        assert max(totals) == size
        totals.clear()
        file.seek(0)
        with pytest.raises(Enough):
            bucket.upload(file, "progress/half", end)
        assert max(totals) < 20 << 20
        assert [each.key for each in bucket.find("progress/")] == ["progress/whole"]


@pytest.mark.parametrize("server", SCHEMES[:1], indirect=True)
def test_of_two_starts_one_is_refused(
    nursery: Nursery, server: Server, whole: Run, tmp_path: Path
) -> None:
    first = start(nursery, server, tmp_path / "one", "two")
    await_step(first, tmp_path / "one" / "run", 1)
    second = start(nursery, server, tmp_path / "two", "two")
    assert second.wait() == 2, second.said
    last = second.said.splitlines()[-1]
    assert last.startswith(f"consyn-train: --remote {server.url('two')} is in use by process ")
    assert "Traceback" not in second.said
    assert first.wait() == 0, first.said
    assert Run(tmp_path / "one" / "run", 0, "").numbers == whole.numbers
    third = start(nursery, server, tmp_path / "three", "two", "--seed", 7)
    assert third.wait() == 2
    assert f"--remote {server.url('two')} holds another run: --seed was" in third.said


@pytest.mark.parametrize("server", SCHEMES[:1], indirect=True)
def test_a_server_that_fails_for_a_while_costs_nothing_but_a_warning(
    nursery: Nursery, server: Server, whole: Run, tmp_path: Path
) -> None:
    key, path = "fails", tmp_path / "one" / "run"
    child = start(nursery, server, tmp_path / "one", key, step_s=0.2, held=20)
    await_step(child, path, 1)
    for number, mode in enumerate(("down", "busy", "denied")):
        server.gate.mode = mode
        await_step(child, path, 18)  # it does not wait for the server
        await_said(child, "uploads the rest later.", number + 1)
        server.gate.mode = "open"
        await_said(child, "succeed again.", number + 1)
    server.gate.mode = "slow"
    (tmp_path / "one" / "go").touch()
    await_step(child, path, STEPS)
    server.gate.mode = "open"
    assert child.wait() == 0, child.said
    assert Run(path, 0, "").numbers == whole.numbers
    warnings = [line for line in child.said.splitlines() if "warning" in line]
    assert [line.split("bucket/fails ")[1].split(". ")[0].split(" (")[0] for line in warnings] == [
        "cannot be reached",
        "does not answer now",
        "refuses these credentials",
    ]
    assert "Traceback" not in child.said
    for name, secret in server.environment.items():
        assert "KEY" not in name or secret not in child.said
    own = {
        file.relative_to(path).as_posix(): file.stat().st_size
        for file in path.rglob("*")
        if file.is_file() and file.name != "lock"
    }
    copy = there(server, key)
    assert own.items() <= copy.items()
    assert {name for name in copy if not name.startswith("markers/")} == own.keys()


@pytest.mark.parametrize("server", SCHEMES[:1], indirect=True)
def test_a_server_that_is_down_at_the_end_is_waited_for_and_not_for_ever(
    nursery: Nursery, server: Server, whole: Run, tmp_path: Path
) -> None:
    child = start(nursery, server, tmp_path / "one", "end", exit_s=1.0, held=11)
    await_mark(child, server, "end", 5)
    server.gate.mode = "down"
    (tmp_path / "one" / "go").touch()
    assert child.wait() == 0, child.said
    assert "To upload the rest, run the same command again on this machine." in child.said
    server.gate.mode = "open"
    assert newest_mark(server, "end") < STEPS
    again = start(nursery, server, tmp_path / "one", "end")
    assert again.wait() == 0, again.said
    assert newest_mark(server, "end") == STEPS
    assert "final/model.safetensors" in there(server, "end")


@pytest.mark.parametrize("server", SCHEMES, indirect=True)
@pytest.mark.parametrize("is_signalled", [False, True])
def test_a_server_that_hangs_at_the_end_holds_no_process(
    nursery: Nursery, server: Server, is_signalled: bool, tmp_path: Path
) -> None:
    """The clients' own limits are minutes. The limit of the wait is 2 s, or one signal."""
    key, exit_s = f"hang-{is_signalled}", 600.0 if is_signalled else 2.0
    child = start(nursery, server, tmp_path / "one", key, exit_s=exit_s, held=11)
    await_mark(child, server, key, 5)
    server.gate.mode = "hang"
    (tmp_path / "one" / "go").touch()
    await_said(child, "Everything is in", 1)
    began = time.monotonic()
    if is_signalled:
        time.sleep(1.0)
        child.signal(signal.SIGTERM)
    assert child.wait() == (75 if is_signalled else 0), child.said
    assert time.monotonic() - began < 30
    path = tmp_path / "one" / "run"
    said = f"not all files of {path} are there (newest complete checkpoint there: step "
    assert said in child.said
    if is_signalled:
        assert f"consyn-train: SIGTERM: the run in {path} is complete, and no longer" in child.said
        assert child.said.count("SIGTERM") == 1, child.said
    server.gate.mode = "open"
    again = start(nursery, server, tmp_path / "one", key)
    assert again.wait() == 0, again.said
    assert newest_mark(server, key) == STEPS


@pytest.mark.parametrize("server", SCHEMES[:1], indirect=True)
def test_a_signal_ends_both_processes_alike_while_one_of_them_uploads(
    nursery: Nursery, server: Server, tmp_path: Path
) -> None:
    key, path = "both", tmp_path / "one" / "run"
    made = command(server, tmp_path / "one", key, exit_s=600.0, held=11)
    two = nursery.together(*made["flags"], before=made["before"])
    await_mark(two[0], server, key, 5)
    server.gate.mode = "hang"
    (tmp_path / "one" / "go").touch()
    await_said(two[0], "Everything is in", 1)
    time.sleep(1.0)
    assert two[1].alive, two[1].said
    for child in reversed(two):
        child.signal(signal.SIGTERM)
    assert [child.wait() for child in two] == [75, 75], [child.said for child in two]
    said = f"SIGTERM: the run in {path} is complete, and no longer waits for --remote"
    assert f"consyn-train: {said}" in two[0].said
    assert f"consyn-train: process 0 (pid {two[0].pid} on " in two[1].said
    assert f"): {said}" in two[1].said


@pytest.mark.parametrize("server", SCHEMES, indirect=True)
def test_a_start_that_cannot_reach_its_bucket_is_a_sentence(
    nursery: Nursery, server: Server, tmp_path: Path
) -> None:
    cases: list[tuple[str, dict[str, str], str]] = [("denied", {}, "refuses these credentials")]
    if server.scheme == "s3":
        nowhere = {"AWS_SHARED_CREDENTIALS_FILE": "/nowhere", "AWS_CONFIG_FILE": "/nowhere"}
        cases += [("down", {}, "cannot be reached"), ("busy", {}, "does not answer now (")]
        cases += [("open", {"AWS_ACCESS_KEY_ID": "", **nowhere}, "needs credentials, and there")]
    for mode, change, said in cases:
        server.gate.mode = mode
        child = start(
            nursery, server, tmp_path / "one", "x", environment={**server.environment, **change}
        )
        assert child.wait() == 2, child.said
        assert said in child.said
        assert child.said.count("\n") == 1, child.said
        assert "Traceback" not in child.said
        assert not any(
            secret in child.said for name, secret in server.environment.items() if "KEY" in name
        )


@pytest.mark.parametrize("server", SCHEMES[:1], indirect=True)
def test_a_token_store_a_model_and_a_tokenizer_of_a_bucket(
    nursery: Nursery, server: Server, corpus: Path, tmp_path: Path
) -> None:
    def run(command: str, *flags: object, said: str = "") -> Child:
        own = server.environment | {"CONSYN_CACHE": str(tmp_path / "cache")}
        before = f"import os; os.environ.update({own!r})"
        child = nursery.start(*flags, command=command, before=before)
        assert child.wait() == 0, child.said
        assert said in child.said
        return child

    pattern = server.url("corpus/*.jsonl")
    run("prepare", "--data", pattern, "--tokenizer", "bytes", "--output", tmp_path / "tokens")
    store(server, "tokens", tmp_path / "tokens")
    few = [*FLAGS[: FLAGS.index("--max_steps")], "--max_steps", 2, "--max_tokens", 32]
    few = [flag for flag in few if flag not in ("--tokenizer", "bytes")]
    few += ["--logging_backend", "none"]
    run("train", *few, "--data", server.url("tokens"), "--output", tmp_path / "run")
    store(server, "model", tmp_path / "run" / "final")
    model = server.url("model")
    tuned = [*few[few.index("--max_steps") :], "--output", tmp_path / "tuned"]
    run("train", "--checkpoint", model, "--data", server.url("corpus"), *tuned)
    text = corpus.with_name("some.txt")
    text.write_text("Document 1 says so and ends. " * 20)
    run("evaluate", model, "--data", text, said=model.rpartition("/")[2])
    run("generate", model, "--prompt", "Document", "--max_tokens", 3)
    flags = ["--tokenizer", server.url("model/tokenizer.json"), "--data", corpus]
    run("prepare", *flags, "--output", tmp_path / "others")
    # A shard that differs from the manifest is found when it is read.
    shard = next((tmp_path / "tokens").glob("train-*.tokens"))
    damaged = bytearray(shard.read_bytes())
    damaged[0] ^= 1
    shard.write_bytes(damaged)
    store(server, f"tokens/{shard.name}", shard)
    own = server.environment | {"CONSYN_CACHE": str(tmp_path / "cache")}
    before = f"import os; os.environ.update({own!r})"
    flags = [*few, "--data", server.url("tokens"), "--output", tmp_path / "bad"]
    child = nursery.start(*flags, before=before)
    assert child.wait() == 2, child.said
    assert shard.name in child.said
