"""Runs that end otherwise than they began: a decay started from a stable part, another number of
steps; and a look before either."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import MODEL, Run

FLAGS = [
    *MODEL,
    "--max_steps",
    "20",
    "--max_tokens",
    "32",
    "--batch_size",
    "8",
    "--logging_steps",
    "1",
    "--eval_steps",
    "10",
    "--save_steps",
    "5",
]
FLAGS += ["--keep_last", "9", "--logging_backend", "none", "--quiet"]
STABLE = [*FLAGS, "--scheduler", "wsd", "--warmup_steps", "3", "--decay_ratio", "0.25"]


def content(directory: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def by_step(run: Run, name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in run.numbers if name in line}


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_decay_starts_from_the_stable_part_and_leaves_the_run_alone(
    here: Callable[..., Run], corpus: Path, tmp_path: Path
) -> None:
    stable = here(tmp_path / "run", *STABLE, "--data", corpus)
    assert stable.code == 0, stable.said
    before = content(stable.path)
    said = here(tmp_path / "run", *STABLE, "--data", corpus, "--decay_from", "10")
    assert said.code == 0, said.said
    assert content(stable.path) == before
    decay = Run(tmp_path / "run-decay-10", said.code, said.said)
    rates, losses = by_step(decay, "train/learning_rate"), by_step(decay, "train/loss")
    assert sorted(rates) == [11, 12, 13], "a quarter of 13 steps, from step 10 on"
    assert losses[11] == by_step(stable, "train/loss")[11], "the same parameters on the same batch"
    assert rates[11] == pytest.approx(by_step(stable, "train/learning_rate")[11])
    assert rates[12] == pytest.approx(3e-3 * (0.1 + 0.9 * (1 - (1 / 3) ** 0.5)))
    assert decay.lines[-1]["tokens"] == next(
        line["tokens"] for line in stable.lines if line.get("step") == 13
    )
    again = here(tmp_path / "run", *STABLE, "--data", corpus, "--decay_from", "10")
    assert "This run is complete: 13 steps." in again.said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--decay_from", "7"], "has no checkpoint of that step. Saved steps: 5, 10, 15, 20."),
        (["--decay_from", "20"], "--decay_from 20: at this step the learning rate of the run"),
        (
            ["--decay_from", "10", "--seed", "1"],
            "has another run: --seed was 42 and is 1.",
        ),
        (
            ["--decay_from", "10", "--scheduler", "cosine"],
            "Use wsd, constant_with_warmup, constant.",
        ),
        (["--decay_from", "0"], "--decay_from must be at least 1, not 0."),
    ],
)
def test_a_decay_that_cannot_be(
    flags: list[str],
    words: str,
    here: Callable[..., Run],
    corpus: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    home = tmp_path_factory.getbasetemp() / "stable-run"
    if not home.exists():
        assert here(home, *STABLE, "--data", corpus).code == 0
    refused = here(home, *STABLE, "--data", corpus, *flags)
    assert refused.code == 2
    assert words in refused.said
    assert not home.with_name("stable-run-decay-10").exists()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_another_number_of_steps_must_be_asked_for(
    here: Callable[..., Run], corpus: Path, tmp_path: Path
) -> None:
    first = [*FLAGS, "--data", corpus, "--max_steps", "10"]
    assert here(tmp_path / "run", *first).code == 0
    longer = [*first, "--max_steps", "15"]
    refused = here(tmp_path / "run", *longer)
    assert refused.code == 2
    assert (
        "holds a run with another schedule: --max_steps was 10 and is 15; the learning rate would "
        "change from 0.00" in refused.said
    )
    assert "at step 10 of 15" in refused.said
    went_on = here(tmp_path / "run", *longer, "--overwrite_schedule")
    assert went_on.code == 0, went_on.said
    assert sorted(by_step(went_on, "train/loss")) == list(range(1, 16))
    assert "This run is complete: 15 steps." in here(tmp_path / "run", *longer).said, (
        "the new number of steps is the run's own now"
    )
    assert (
        "is already at step 15, past the 12 steps requested."
        in here(tmp_path / "run", *first, "--max_steps", "12", "--overwrite_schedule").said
    )


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_same_number_of_steps_in_other_words_is_the_same_run(
    here: Callable[..., Run], corpus: Path, tmp_path: Path
) -> None:
    assert here(tmp_path / "run", *FLAGS, "--data", corpus, "--max_steps", "10").code == 0
    again = here(
        tmp_path / "run",
        *FLAGS,
        "--data",
        corpus,
        "--max_steps",
        "99",
        "--total_tokens",
        str(10 * 8 * 32),
    )
    assert "This run is complete: 10 steps." in again.said


def test_a_dry_run_draws_the_rates_and_begins_nothing(
    here: Callable[..., Run], corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from consyn_jax.cli.train import main

    assert (
        main(
            [
                *map(str, STABLE),
                "--data",
                str(corpus),
                "--dry_run",
                "--output",
                str(tmp_path / "run"),
            ]
        )
        == 0
    )
    said = capfd.readouterr()
    assert "20 steps of 8 x 32 tokens" in said.err
    assert "0.003 ┤" in said.out
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["schedule.png"]
    assert (
        here(tmp_path / "run", *STABLE, "--data", corpus, "--dry_run", "--print_config").code == 2
    )
