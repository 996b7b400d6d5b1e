"""`consyn-train --lr_find` as a whole."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from consyn_jax.cli.train import main
from consyn_jax.training import trainer
from consyn_jax.training.diagnostics.lr_find import rising_rates

from .conftest import TINY, Run

Start = Callable[..., Run]


@pytest.fixture(autouse=True)
def fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "rising_rates", lambda optimizer: rising_rates(optimizer, 80))


@pytest.fixture(scope="module")
def flags(corpus: Path) -> list[Any]:
    return [*TINY, "--data", corpus, "--quiet"]


def found_in(path: Path) -> dict[str, Any]:
    return json.loads((path / "lr_find.json").read_text())


@pytest.mark.slow
def test_it_suggests_a_rate_and_begins_no_run(
    here: Start, flags: list[Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*map(str, flags), "--lr_find", "--output", str(tmp_path / "run")]) == 0
    said = capfd.readouterr()
    found = found_in(tmp_path / "run")
    assert 3e-4 < found["rate"] < 0.1
    assert f"Suggested: --lr {found['rate']:g}\n" in said.out
    assert found["rates"][0] == pytest.approx(1e-7)
    assert found["losses"][0] == pytest.approx(5.56, abs=0.1)
    assert min(found["smoothed"]) < found["losses"][0] - 2
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "lr_find.json",
        "lr_find.png",
    ]
    assert here(tmp_path / "run", *flags, "--lr", found["rate"], "--dry_run").code == 0


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_result_repeats_and_does_not_depend_on_the_runs_own_rate(
    here: Start, flags: list[Any], tmp_path: Path
) -> None:
    for name, own in (
        ("a", ("--lr", 1e-4)),
        ("b", ("--lr", 1.0, "--scheduler", "linear", "--warmup_steps", 5, "--max_steps", 9)),
    ):
        assert here(tmp_path / name, *flags, "--optimizer", "sgd", *own, "--lr_find").code == 0
    found = found_in(tmp_path / "a")
    assert found == found_in(tmp_path / "b")
    assert found["rates"][0] == pytest.approx(1e-5)
    assert 5e-3 < found["rate"] < 5


@pytest.mark.slow
@pytest.mark.exhaustive
def test_rates_without_effect_suggest_nothing(
    here: Start, flags: list[Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    still = ["--lr_multipliers", "embedding=0,attention=0,mlp=0,norms=0"]
    assert main([*map(str, flags), *still, "--lr_find", "--output", str(tmp_path)]) == 0
    assert "No rate up to 1 lowered the loss by more than its noise." in capfd.readouterr().out
    assert found_in(tmp_path)["rate"] is None


def test_incompatible_flags_are_refused(here: Start, flags: list[Any], tmp_path: Path) -> None:
    for other in ("--dry_run", "--print_config"):
        assert here(tmp_path, *flags, "--lr_find", other).code == 2
    (tmp_path / "file").touch()
    refused = here(tmp_path / "file", *flags, "--lr_find")
    assert refused.code == 2
    assert "is a file" in refused.said
