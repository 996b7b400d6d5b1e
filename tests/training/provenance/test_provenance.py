"""A run that can be proved: its records, what differs from them, and a step repeated."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from consyn_jax.cli.train import main
from consyn_jax.training.provenance import code_files, verification
from consyn_jax.training.provenance.run_facts import read_facts
from consyn_jax.training.provenance.verification import verify_directory
from consyn_jax.training.run.model_manifest import disagreement

pytestmark = pytest.mark.slow

SMALL = "--model haiku --hidden_dim 32 --num_heads 2 --num_layers 1 --tokenizer bytes --quiet"
RUN = f"{SMALL} --max_tokens 32 --batch_size 8 --validation_fraction 0.2 --logging_backend none"
STEPS = "--save_steps 4 --logging_steps 3 --eval_steps 6"


def command(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with data, a cache, and a run of 14 steps that was stopped after step 8."""
    place = tmp_path_factory.mktemp("proof")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONSYN_CACHE", str(place / "cache"))
        for name in ("a", "b"):
            rows = [{"text": f"{name} {n} " + "and so on " * (n % 9)} for n in range(90)]
            (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = [*RUN.split(), *STEPS.split(), "--data", place / "a.jsonl", place / "b.jsonl"]
        flags += ["--data_weights", 2, 1, "--max_steps", 14, "--output", place / "run"]
        assert command(*flags) == 0
        shutil.rmtree(place / "run" / "final")  # its end is done again, from step 8
        assert command(*flags, "--resume", 8, "--mesh", "data=8") == 0
    return place


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, with the data where it was."""
    monkeypatch.setenv("CONSYN_CACHE", str(made / "cache"))
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path / "run"


def state_of(place: Path) -> dict[Path, Any]:
    return {
        path: (path.stat().st_mtime_ns, path.stat().st_ino, path.is_file() and path.read_bytes())
        for path in place.rglob("*")
    }


def test_every_checkpoint_and_model_has_a_record_of_the_run(run: Path) -> None:
    whole = read_facts(run)
    assert whole is not None
    assert [start["step"] for start in whole["starts"]] == [0, 8]
    assert [start["mesh"]["data"] for start in whole["starts"]] == [1, 8]
    assert [store["num_sources"] for s in whole["data"]["sources"] for store in s["stores"]] == [
        1,
        1,
    ]
    assert whole["code"]["files"]["config.py"]
    for place in (*(run / "checkpoints").iterdir(), run / "final"):
        found = read_facts(place)
        assert found is not None
        assert found["run"] == whole["run"]
        assert found["starts"] == whole["starts"][: len(found["starts"])]
        assert len(found["starts"]) == (1 if place.name == "8" else 2)
    assert read_facts(run / "final")["step"] == 14  # type: ignore[index]
    assert disagreement(run / "final") is None  # the manifest covers the record
    assert "provenance.json" in (run / "final" / "consyn_manifest.json").read_text()


def test_a_run_and_its_models_agree_with_their_records(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = state_of(run)
    assert command("--verify", run) == 0
    said = capsys.readouterr().out
    assert "differs" not in said
    for part in ("configuration", "tokenizer", "weights", "data", "code"):
        assert f"agrees       {part}: " in said
    assert command("--verify", run / "final", "--json") == 0
    assert json.loads(capsys.readouterr().out)["differs"] == []
    assert state_of(run) == before


def test_a_run_that_goes_on_elsewhere_agrees_with_its_records(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONSYN_CACHE", str(made / "cache"))
    shutil.copytree(made / "run" / "final", tmp_path / "base")
    data = [tmp_path / name for name in ("one.jsonl", "other.jsonl")]
    for file in data:
        shutil.copy(made / "a.jsonl", file)
    short = "--max_tokens 32 --batch_size 8 --save_steps 2 --quiet --logging_backend none"
    flags = [*short.split(), "--validation_fraction", 0.2, "--eval_steps", 2, "--max_steps", 4]
    monkeypatch.chdir(tmp_path)
    run = ["--output", tmp_path / "run", *flags]
    assert command("--checkpoint", "base", "--data", data[0], *run) == 0
    first = read_facts(tmp_path / "run")
    assert first is not None
    assert first["initial_weights"]["from"] == str(tmp_path / "base")
    shutil.rmtree(tmp_path / "run" / "final")
    monkeypatch.setenv("CONSYN_CACHE", str(tmp_path / "cache"))  # its stores are others
    assert command("--checkpoint", "base", "--data", data[1], *run, "--resume", 2) == 0
    shutil.move(tmp_path / "base", tmp_path / "moved")
    facts = read_facts(tmp_path / "run")
    assert facts is not None
    assert facts["data"]["sources"] != first["data"]["sources"]
    assert facts["initial_weights"] == first["initial_weights"]
    found = verify_directory(tmp_path / "run")
    assert found.differs == []
    assert f"initial weights: {tmp_path / 'base'} cannot be read here" in found.unchecked
    edit(tmp_path / "run", lambda facts: facts["data"].update(digest="0", seed=7))
    (only,) = {
        line.partition(" differ in ")[2] for line in verify_directory(tmp_path / "run").differs
    }
    assert only == "data"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def one_of(place: Path, pattern: str) -> Path:
    return max(place.glob(pattern), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(
    ("pattern", "kind"),
    [
        ("checkpoints/12/state/ocdbt.process_0/d/*", "weights"),
        ("checkpoints/12/provenance.json", "weights"),
        ("final/model.safetensors", "weights"),
        ("final/provenance.json", "weights"),
        ("final/config.json", "weights"),
        ("best/tokenizer.json", "weights"),
        ("tokenizer/tokenizer.json", "tokenizer"),
    ],
)
def test_one_byte_of_a_run_that_changed_is_named(run: Path, pattern: str, kind: str) -> None:
    path = one_of(run, pattern)
    flip(path)
    found = verify_directory(run)
    assert len(found.differs) == 1
    assert found.differs[0].startswith(f"{kind}: ")
    assert str(path) in found.differs[0]


@pytest.mark.parametrize(
    "pattern", ["cache/stores/*/train-*.tokens", "cache/stores/*/*.origins", "a.jsonl"]
)
def test_one_byte_of_the_data_that_changed_is_named(made: Path, run: Path, pattern: str) -> None:
    path = one_of(made, pattern)
    content = path.read_bytes()
    try:
        flip(path)
        (only,) = verify_directory(run / "final").differs
    finally:
        path.write_bytes(content)
    assert only == f"data: {path} has changed"


def test_a_changed_value_of_the_configuration_is_named(run: Path) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("\nlr: 0.003", "\nlr: 0.004"))
    (only,) = verify_directory(run).differs
    assert "config.yaml has lr 0.004, but the run had 0.003" in only
    config.write_text(
        (run / "config.yaml").read_text().replace("\nlr: 0.004", "\nlr: 0.003") + "\n"
    )
    (only,) = verify_directory(run).differs
    assert "its text has changed" in only


def test_one_byte_of_the_code_that_changed_is_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(code_files.PACKAGE, tmp_path / "consyn_jax", ignore=ignored)
    flip(tmp_path / "consyn_jax" / "training" / "step.py")
    (tmp_path / "consyn_jax" / "other.py").touch()
    monkeypatch.setattr(code_files, "PACKAGE", tmp_path / "consyn_jax")
    monkeypatch.setattr(verification, "code_digests", code_files.code_digests.__wrapped__)
    monkeypatch.setattr(verification, "library_versions", lambda: {"jax": "9"})
    found = verify_directory(run / "final").differs
    assert found[:2] == [
        "code: consyn_jax/other.py is new",
        "code: consyn_jax/training/step.py has changed",
    ]
    assert any(line.startswith("library: jax is 9, and was ") for line in found)


def test_a_link_in_a_store_is_named_and_all_else_is_compared(
    made: Path, run: Path, tmp_path: Path
) -> None:
    store = one_of(made, "cache/stores/*/manifest.json").parent
    link = store / "train-00009.tokens"
    link.symlink_to(tmp_path)
    try:
        found = verify_directory(run / "final")
    finally:
        link.unlink()
    (only,) = found.differs
    assert only.startswith(f"data: {link} is a link to {tmp_path}, outside its directory")
    assert any(line.endswith(f"of {store}") for line in found.agrees)


def test_links_and_pipes_are_not_followed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("x")
    (run / "best" / "merges.txt").symlink_to(tmp_path / "elsewhere")
    assert verify_directory(run).differs == [
        f"weights: {run / 'best/merges.txt'} is not in consyn_manifest.json"
    ]
    (run / "best" / "merges.txt").unlink()
    os.mkfifo(tmp_path / "pipe")
    edit(run, lambda facts: facts["data"].update(sources=[{**FILES, "files": [pipe(tmp_path)]}]))
    assert f"data: {tmp_path / 'pipe'} is not a regular file" in verify_directory(run).differs


FILES = {"item": "", "length": 8, "bos_id": None, "pad_id": 0, "packing": "cut", "on_long": None}


def pipe(place: Path) -> dict[str, Any]:
    return {"path": str(place / "pipe"), "sha256": "0", "tokens": [0, 9]}


def edit(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    facts = json.loads((run / "provenance.json").read_text())
    change(facts)
    (run / "provenance.json").write_text(json.dumps(facts))


def test_a_record_of_the_run_that_was_edited_is_not_that_of_its_models(run: Path) -> None:
    edit(run, lambda facts: facts["initial_weights"].update({"from": "seed 7"}))
    found = verify_directory(run).differs
    assert any(
        "final/provenance.json and the run's record differ in initial weights" in f for f in found
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts.update(starts={}),
        lambda facts: facts["data"].update(sources=[{}]),
        lambda facts: facts["data"].update(seed="x"),
        lambda facts: facts["data"].update(weights=[0, 0]),
        lambda facts: facts["data"]["sources"][0].update(length=0),
        lambda facts: facts.pop("configuration"),
    ],
)
def test_a_record_of_a_stranger_is_answered_with_a_sentence(
    run: Path, change: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(run, change)
    assert command("--output", run, "--documents_of", 3) == 2
    assert "provenance.json is damaged" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- the questions


@pytest.mark.parametrize("step", [12, 14])
def test_a_repeated_step_has_the_logged_numbers_bit_for_bit(
    run: Path, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = state_of(run)
    assert command("--output", run, "--replay_step", step, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert state_of(run) == before
    assert found["agrees"]
    assert found["from"] == (8 if step == 12 else 12)
    assert found["changed"] == []
    last = found["steps"][-1]
    assert last["step"] == step
    assert last["logged"] == last["repeated"]
    assert command("--output", run, "--documents_of", step, "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["documents"] == found["documents"]


def test_a_step_that_is_not_what_the_log_says(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = run / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
        if line["step"] == 9 and "train/loss" in line:
            line["train/loss"] += 0.001
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert command("--output", run, "--replay_step", 10) == 4
    told = capsys.readouterr()
    assert "The run did not log step 10; the logged steps before that (9) disagree" in told.out
    assert "a.jsonl, row " in told.out
    assert "does not match its log" in told.err


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_source_that_changed_since_is_named(
    is_gone: bool, run: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows that are named may be others by now."""
    source = made / "a.jsonl"
    content = source.read_bytes()
    try:
        source.write_bytes(content[1:])
        if is_gone:
            source.unlink()
        assert command("--output", run, "--documents_of", "3:4", "--json") == 0
    finally:
        source.write_bytes(content)
    told = capsys.readouterr()
    steps = [json.loads(line) for line in told.out.splitlines()]
    assert [step["changed_sources"] for step in steps] == 2 * [[str(source)]]
    said = "does not exist here" if is_gone else "has changed since the data was prepared"
    assert told.err.count("warning: ") == 1
    assert f"warning: {source} {said}" in told.err
    assert command("--output", run, "--documents_of", "3:4", "--json") == 0
    told = capsys.readouterr()
    assert not json.loads(told.out.splitlines()[0])["changed_sources"]
    assert told.err == ""


def test_documents_need_no_device(run: Path, made: Path) -> None:
    program = (
        "import sys; from consyn_jax.cli.train import main; "
        f"code = main(['--output', {str(run)!r}, '--documents_of', '2:3']); "
        "sys.exit(code or 'jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("training targets") == 2
    assert f"{made / 'b.jsonl'}, row " in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--documents_of 15", "the run in RUN has 14 steps"),
        ("--documents_of 0", "neither a step nor a range"),
        ("--documents_of 5:3", "neither a step nor a range"),
        ("--documents_of x", "neither a step nor a range"),
        (f"--documents_of {10**30}", "have at most 15 digits"),
        (f"--documents_of 3:{5001 * '1'}", "have at most 15 digits"),
        (f"--replay_step {5001 * '1'}", "--replay_step must be below 2**63"),
        ("--replay_step 15", "has 14 steps"),
        ("--replay_step 0", "has 14 steps"),
        ("--replay_step 3 --seed 4", "--seed was 42 and is 4"),
    ],
)
def test_a_step_that_cannot_be_asked_for(
    run: Path, words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--output", run, *words.split()) == 2
    assert said.replace("RUN", str(run)) in capsys.readouterr().err


def test_a_run_on_data_without_places_says_so(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(run, lambda facts: facts["data"].update(order="unknown"))
    assert command("--output", run, "--documents_of", 3) == 2
    assert "its data was streamed, or passed in Python" in capsys.readouterr().err


def test_a_store_that_is_gone_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(run, lambda facts: facts["data"]["sources"][0]["stores"][0].update(directory="/gone"))
    assert command("--output", run, "--documents_of", 3) == 2
    assert "The token store /gone of this run no longer exists" in capsys.readouterr().err


def test_a_step_of_an_adapter_is_repeated_on_its_base(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CONSYN_CACHE", str(made / "cache"))
    base = ["--checkpoint", made / "run" / "final", "--lora_rank", 2, "--data", made / "a.jsonl"]
    flags = "--max_tokens 32 --batch_size 8 --max_steps 4 --save_steps 2 --logging_steps 1 --quiet"
    flags += " --logging_backend none --validation_fraction 0"
    assert command(*base, *flags.split(), "--output", tmp_path / "run") == 0
    capsys.readouterr()
    assert command("--output", tmp_path / "run", "--replay_step", 3, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["from"] == 2
    assert found["steps"][-1]["logged"] == found["steps"][-1]["repeated"]
    assert command("--verify", tmp_path / "run") == 0
    assert f"agrees       initial weights: {made / 'run' / 'final'}" in capsys.readouterr().out
