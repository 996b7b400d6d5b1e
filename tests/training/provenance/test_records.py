"""Records and questions, without a run."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from consyn_jax.cli.proof.questions import asked
from consyn_jax.cli.proof.repeat_logged import _as_json, _page, _verdict
from consyn_jax.cli.proof.verify_record import verify
from consyn_jax.errors import Differs, UserError
from consyn_jax.resolve import resolve
from consyn_jax.training.checkpointing.checkpoint_files import file_hash
from consyn_jax.training.checkpointing.ownership import RunRecord
from consyn_jax.training.diagnostics.logged_step import RepeatedRun, _compared
from consyn_jax.training.provenance import code_files
from consyn_jax.training.provenance.run_facts import RunFacts, digests_of, record_code
from consyn_jax.training.provenance.verification import verify_directory
from consyn_jax.training.run.model_manifest import seal


def test_what_is_neither_a_run_nor_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run, nor a checkpoint, nor an exported model"):
        verify_directory(tmp_path)


def small_run(place: Path) -> Path:
    """Directories and records of a run with a checkpoint and a model, without arrays."""
    run, origin = place / "run", place / "origin"
    for directory in (
        run / "tokenizer",
        run / "checkpoints" / "2" / "state",
        run / "final",
        origin,
    ):
        directory.mkdir(parents=True)
    for file in (run / "config.yaml", run / "tokenizer" / "t.json", place / "tokens.bin"):
        file.write_text("x: 1\n")
    OWN.write(run)
    start = {"step": 0, "tokens": 0, "time_s": 0, "event": "start", "run": OWN.run}
    save = {"step": 2, "tokens": 2, "time_s": 1, "event": "save"}
    (run / "metrics.jsonl").write_text(f"{json.dumps(start)}\n{json.dumps(save)}\n")
    weights = hashlib.sha256(b"weights").hexdigest()
    (origin / "model.safetensors").write_bytes(b"weights")
    packed = {"item": "", "length": 8, "bos_id": None, "pad_id": 0, "packing": "cut"}
    files = [{"path": str(place / "tokens.bin"), "sha256": SHA256, "tokens": [0, 9]}]
    facts = RunFacts(
        {
            "run": OWN.run,
            "code": record_code(),
            "data": {
                "digest": None,
                "order": "one",
                "sequences_per_step": 1,
                "sources": [{**packed, "on_long": None, "files": files}],
            },
            "tokenizer": {"digest": None, "files": {"t.json": SHA256}},
            "initial_weights": {
                "from": str(origin),
                "digest": hashlib.sha256(weights.encode()).hexdigest(),
            },
            "configuration": {"digest": SHA256, "total_steps": 2, "values": {}},
            "starts": [{**START, "identity": {"start": OWN.start, "unsigned_until": -1}}],
        }
    )
    (run / "provenance.json").write_text(facts.text())
    step = run / "checkpoints" / "2"
    (step / "state" / "array").write_text("array")
    state = {"state/array": file_hash(step / "state" / "array")}
    (step / "provenance.json").write_text(facts.of_checkpoint(2, state))
    (step / "run.json").write_text(json.dumps({"step": 2, "run": OWN.run}))
    others = ("provenance.json", "run.json")
    sums = state | {name: file_hash(step / name) for name in others}
    (step / "CHECKSUMS").write_text("".join(f"{sums[name]}  {name}\n" for name in sums))
    (run / "final" / "model.safetensors").write_bytes(b"weights")
    seal(run / "final", lambda files: facts.of_model(2, files))
    return run


OWN = RunRecord.new()
START = {"step": 0, "code": None}
SHA256 = hashlib.sha256(b"x: 1\n").hexdigest()
# `Path.exists` raises an OSError for it, as it does below a directory without access.
TOO_LONG = "/" + 300 * "x"


def as_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("x")


def with_a_long_path(name: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        place = str(path.parents[1] / name)
        path.write_text(path.read_text().replace(place, TOO_LONG))

    return change


@pytest.mark.parametrize(
    ("name", "change", "lines"),
    [
        ("run/config.yaml", as_directory, {"configuration"}),
        ("run/tokenizer", as_file, {"tokenizer"}),
        ("run/checkpoints", as_file, {"weights"}),
        ("run/checkpoints/2", as_file, {"weights"}),
        ("run/run.json", as_directory, {"identity"}),
        ("run/metrics.jsonl", as_directory, {"identity"}),
        ("run/checkpoints/2/CHECKSUMS", as_directory, {"weights"}),
        ("run/checkpoints/2/provenance.json", as_directory, {"weights"}),
        ("run/final", as_file, {"weights", "record"}),
        ("run/final/consyn_manifest.json", as_directory, {"weights"}),
        ("run/final/provenance.json", as_directory, {"weights"}),
        ("run/provenance.json", as_directory, {"record", "code, data, configuration"}),
        ("origin", as_file, {"initial weights"}),
        ("origin/model.safetensors", as_directory, {"initial weights"}),
        ("tokens.bin", as_directory, {"data"}),
        ("run/provenance.json", with_a_long_path("origin"), {"initial weights", "record"}),
        ("run/provenance.json", with_a_long_path("tokens.bin"), {"data", "record"}),
    ],
)
def test_what_cannot_be_read_is_a_line_and_all_else_is_compared(
    name: str, change: Callable[[Path], None], lines: set[str], tmp_path: Path
) -> None:
    run = small_run(tmp_path)
    kinds = {"configuration", "tokenizer", "weights", "data", "code", "initial weights", "identity"}
    sound = verify_directory(run)
    assert sound.differs == sound.unchecked == []
    assert {line.partition(":")[0] for line in sound.agrees} == kinds
    change(tmp_path / name)
    found = verify_directory(run)
    told = [line.partition(":")[0] for line in found.differs + found.unchecked]
    assert set(told) == lines
    assert found.agrees


def test_links_and_pipes_are_named_and_all_else_is_compared(tmp_path: Path) -> None:
    """Each is one line; nothing is read through it, and nothing hangs."""
    run, outside = small_run(tmp_path), tmp_path / "outside"
    shutil.copytree(run / "checkpoints" / "2", outside)
    (run / "config.yaml").unlink()
    os.mkfifo(run / "config.yaml")
    (run / "checkpoints" / "4").symlink_to(outside)
    (run / "best").symlink_to(run / "final")
    (run / "logs").mkdir()
    (run / "logs" / "events").symlink_to(outside)
    (run / "tokenizer" / "more").symlink_to(outside / "run.json")
    os.mkfifo(run / "tokenizer" / "pipe")
    (run / "final" / "link").symlink_to(outside / "run.json")
    found = verify_directory(run)
    assert sorted(found.differs) == [
        f"configuration: {run / 'config.yaml'} is a pipe, so it is not read",
        f"record: {run / 'logs/events'} is a link, so it is not read",
        f"tokenizer: {run / 'tokenizer/more'} is a link, so it is not read",
        f"tokenizer: {run / 'tokenizer/pipe'} is a pipe, so it is not read",
        f"weights: {run / 'best'} is a link, so it is not read",
        f"weights: {run / 'checkpoints/4'} is a link, so it is not read",
        f"weights: {run / 'final/link'} is not in consyn_manifest.json",
    ]
    assert [line.partition(":")[0] for line in found.agrees] == [
        *("identity", "tokenizer", "weights", "code", "data", "initial weights")
    ]


@pytest.mark.parametrize("name", ["run.json", "provenance.json", "metrics.jsonl", "tokenizer"])
@pytest.mark.parametrize("is_pipe", [False, True])
def test_a_link_or_pipe_in_the_place_of_a_record(is_pipe: bool, name: str, tmp_path: Path) -> None:
    run = small_run(tmp_path)
    (run / name).rename(tmp_path / "moved")
    if is_pipe:
        os.mkfifo(run / name)
    else:
        (run / name).symlink_to(tmp_path / "moved")
    found = verify_directory(run)
    assert len(found.differs) == 1
    assert str(run / name) in found.differs[0]
    assert f"weights: {run / 'checkpoints/2'}" in found.agrees


def replaced(file: Path, old: str, new: str) -> None:
    file.write_text(file.read_text().replace(old, new))


def changed(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values) + "\n")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda run: changed(run / "run.json", run="0" * 32),
            ["identity: RUN/run.json is of run 00000000, but provenance.json is of run "],
        ),
        (
            lambda run: changed(run / "run.json", start="0" * 32),
            ["identity: RUN/run.json has another start than provenance.json"],
        ),
        (
            lambda run: changed(run / "run.json", unsigned_until=9),
            ["identity: RUN/run.json has another unsigned_until than provenance.json"],
        ),
        (lambda run: (run / "run.json").unlink(), ["identity: RUN/run.json is missing"]),
        (
            lambda run: replaced(run / "metrics.jsonl", OWN.run, "0" * 32),
            ["identity: RUN/metrics.jsonl is the log of another run"],
        ),
        (
            lambda run: (run / "metrics.jsonl").write_text(""),
            [
                "identity: RUN/metrics.jsonl has no start event of the run",
                "identity: RUN/metrics.jsonl ends at step 0, but the newest checkpoint is of step 2",
            ],
        ),
        (
            lambda run: (run / "metrics.jsonl").unlink(),
            ["identity: RUN/metrics.jsonl does not exist"],
        ),
        (
            lambda run: (run / "provenance.json").unlink(),
            ["record: RUN/provenance.json is missing"],
        ),
        (
            lambda run: changed(run / "provenance.json", starts=[{**START, "identity": []}]),
            ["record: RUN/provenance.json is damaged: starts[0].identity is []"],
        ),
        (
            lambda run: os.truncate(run / "checkpoints/2/run.json", 1 << 40),
            ["weights: RUN/checkpoints/2/run.json is not what was written"],
        ),
        (
            lambda run: (run / "final/consyn_manifest.json").unlink(),
            ["weights: RUN/final/consyn_manifest.json is missing"],
        ),
        (
            lambda run: os.truncate(run / "final/model.safetensors", 1 << 40),
            ["weights: RUN/final/model.safetensors is a large sparse file"],
        ),
        (
            lambda run: os.truncate(run / "tokenizer/t.json", 1 << 40),
            ["tokenizer: RUN/tokenizer/t.json is a large sparse file, so it is not read"],
        ),
        (
            lambda run: os.truncate(run / "metrics.jsonl", 1 << 40),
            ["identity: RUN/metrics.jsonl is a large sparse file, so it is not read"],
        ),
        (
            lambda run: (run / "checkpoints/2").rename(run / "checkpoints/20"),
            [
                "weights: RUN/checkpoints/20 has the name of step 20, but contains the state of step 2"
            ],
        ),
        (
            lambda run: (run / "checkpoints/02").mkdir(),
            ["weights: RUN/checkpoints/02 is not a checkpoint of a step"],
        ),
        (
            lambda run: (run / "final/README.md").touch(),
            ["weights: RUN/final/README.md is not in consyn_manifest.json"],
        ),
    ],
)
def test_whose_run_it_is_and_what_was_added_or_renamed(
    change: Callable[[Path], object], said: list[str], tmp_path: Path
) -> None:
    run = small_run(tmp_path)
    change(run)
    found = verify_directory(run).differs
    assert len(found) == len(said)
    for line, begin in zip(found, said, strict=True):
        assert line.startswith(begin.replace("RUN", str(run)))


def test_a_checkpoint_alone(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    place = run / "checkpoints" / "2"
    found = verify_directory(place)
    assert found.differs == []
    assert f"weights: {place}" in found.agrees
    (place / "state" / "array").write_text("other")
    assert verify_directory(place).differs == [
        f"weights: {place / 'state/array'} is not what was written"
    ]


def test_no_name_of_a_file_adds_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = small_run(tmp_path)
    (run / "final" / "x\nagrees       y\x1b[2J").touch()
    with pytest.raises(Differs):
        verify(resolve({"verify": str(run)})[0])
    first, *others = capsys.readouterr().out.splitlines()
    assert r"x\nagrees       y\x1b[2J is not in consyn_manifest.json" in first
    assert not any(line.endswith("y") for line in others)


def test_what_a_run_or_a_file_manager_leaves_is_no_difference(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    for name in ("2.damaged-1", "4.orbax-checkpoint-tmp-x-1", ".hidden"):
        (run / "checkpoints" / name).mkdir()
    (run / "final" / ".DS_Store").touch()
    (run / "notes.txt").touch()
    assert verify_directory(run).differs == []


@pytest.mark.parametrize(
    ("flags", "mode", "said"),
    [
        ({"json": True}, "", "--json needs"),
        ({"verify": "x", "documents_of": "3"}, "", "do not work together"),
        ({"replay_step": 3}, "dry_run", "--replay_step and --dry_run do not work together"),
    ],
)
def test_questions_that_do_not_go_together(flags: dict[str, Any], mode: str, said: str) -> None:
    config, _ = resolve(flags)
    with pytest.raises(UserError, match=said):
        asked(config, mode)


def test_the_commit_of_a_working_tree(tmp_path: Path) -> None:
    first, second = "1" * 40, "2" * 40
    git = tmp_path / ".git"
    (git / "refs/heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "packed-refs").write_text(f"# pack-refs\n{first} refs/heads/main\n")
    assert code_files._commit_of_tree(git) == first
    (git / "refs/heads/main").write_text(f"{second}\n")
    assert code_files._commit_of_tree(git) == second
    linked = git / "worktrees/other"
    linked.mkdir(parents=True)
    (linked / "HEAD").write_text("ref: refs/heads/main\n")
    (linked / "commondir").write_text("../..\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/.git").write_text(f"gitdir: {linked}\n")
    assert code_files._commit_of_tree(tmp_path / "other/.git") == second
    (git / "HEAD").write_text(f"{first}\n")
    assert code_files._commit_of_tree(git) == first


LOGGED = {"step": 12, "train/learning_rate": 0.1}


@pytest.mark.parametrize(
    ("line", "repeated", "difference"),
    [
        ({"train/loss": 2.0, "train/grad_norm": 1.0}, (2.0, 1.0), 0.0),
        ({"train/loss": 2.0, "train/grad_norm": 1.0}, (2.0, 1.5), 0.5),
        ({"train/loss": 2.0, "train/grad_norm": 1.0}, (math.nan, 1.0), math.inf),
        ({"train/loss": 2.0, "train/grad_norm": 1.0}, (2.0, -math.inf), math.inf),
        ({"train/loss": 2.0}, (2.0, 1.0), math.inf),  # the log leaves out what is not finite
        ({"train/loss": 2.0}, (2.0, math.inf), 0.0),
        ({}, (math.nan, math.nan), 0.0),
        ({}, (math.nan, 0.0), math.inf),
        ({"train/loss": 0.0, "train/grad_norm": 0.0}, (0.0, 0.0), 0.0),
    ],
)
def test_a_repeated_step_whose_values_may_not_be_finite(
    line: dict[str, float], repeated: tuple[float, float], difference: float
) -> None:
    values = dict(zip(("loss", "grad_norm"), repeated, strict=True))
    again = RepeatedRun(8, [_compared(12, LOGGED | line, values)], {"data": 1})
    assert again.steps[-1].difference == difference
    agrees, verdict = _verdict(again, [])
    assert agrees == (difference == 0)
    is_exact = agrees and all(map(math.isfinite, repeated))
    assert ("bit for bit" in verdict) == is_exact
    assert ("finite" in verdict) == (not is_exact and difference != 0.5)
    page = json.dumps(_as_json(again, agrees, verdict, [], None), allow_nan=False)
    (told,) = json.loads(page)["steps"]
    finite = [value if math.isfinite(value) else None for value in repeated]
    assert list(told["repeated"].values()) == finite
    assert told["logged"] == {key: line.get(f"train/{key}") for key in ("loss", "grad_norm")}
    assert ("in the run: not finite" in "".join(_page(again, Path("run"), ""))) == (len(line) < 2)


def test_the_steps_before_a_repeated_one_are_counted() -> None:
    values = {"loss": 2.0, "grad_norm": 1.0}
    line = LOGGED | {f"train/{name}": value for name, value in values.items()}
    steps = [_compared(step, line, values) for step in (9, 10, 11, 12)]
    assert _verdict(RepeatedRun(8, steps, {}), []) == (
        True,
        "Loss and gradient norm of step 12, and of 3 steps before it, agree with the log, "
        "bit for bit.",
    )
    worse = [*steps[:3], _compared(12, line, values | {"loss": 3.0})]
    assert "disagree with the log by up to 0.5" in _verdict(RepeatedRun(8, worse, {}), [])[1]
    silent = _verdict(RepeatedRun(8, [*steps[:2], _compared(12, None, values)], {}), [])[1]
    assert "did not log step 12; the logged steps before that (9, 10) agree" in silent


def test_a_large_sparse_file_is_not_hashed(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with (tmp_path / "z.npy").open("wb") as file:
        file.truncate(1 << 32)
    assert list(digests_of(tmp_path)) == ["tokenizer.json"]
