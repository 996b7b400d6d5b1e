"""A directory has one study, in one storage, and only trials of this study with these values."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from consyn_jax.config_file import DERIVED, describe
from consyn_jax.distributed.process_group import CONTINUE_ADVICE
from consyn_jax.errors import UserError, advised
from consyn_jax.resolve import resolve
from consyn_jax.training.run import opening
from consyn_jax.tuning.ladder.ladder_run import delete_ladder
from consyn_jax.tuning.ladder.rung_run import RungRun
from consyn_jax.tuning.optuna_study import OptunaStudy
from consyn_jax.tuning.search_space import Dimension
from consyn_jax.tuning.study_directory import best_directory, check_output, delete_study
from consyn_jax.tuning.study_identity import check_study, identify, mark_trial
from consyn_jax.tuning.tune_options import StudyOptions

if not os.environ.get("CI"):  # where the extra must be installed
    pytest.importorskip("optuna", reason="needs the extra tune")


def study(output: Path, low: float = 1e-3, **options: Any) -> OptunaStudy:
    space = [Dimension("lr", low, 10 * low)]
    given = StudyOptions(**{"sampler": "random", **options})
    what: dict[str, Any] = {"maximize": False, "num_evaluations": 4, "seed": 1}
    return OptunaStudy(output, given, space, {}, **what)


def train(opened: OptunaStudy, output: Path) -> Path:
    """Train one more trial, which writes only its log."""
    claim = opened.claim(9)
    assert claim is not None
    path = output / "trials" / f"{claim.number:04}"
    mark_trial(path, opened.identity, claim.values)
    (path / "metrics.jsonl").touch()
    opened.tell(claim, 1.0)
    claim.release()
    return path


def files(output: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}


@pytest.mark.parametrize("delete", [delete_study, delete_ladder])
def test_once_the_old_trials_are_deleted_the_watchdog_does_not_advise_to_overwrite(
    delete: Callable[[Path], None], tmp_path: Path
) -> None:
    """Runs of a study have no --overwrite of their own."""
    delete(tmp_path)
    assert "without --overwrite" in advised(CONTINUE_ADVICE)


def test_a_study_goes_on_with_its_own_trials(tmp_path: Path) -> None:
    first = study(tmp_path)
    train(first, tmp_path)
    (tmp_path / "trials" / "0001").mkdir()  # a kill before the first file
    (tmp_path / "trials" / "0001" / ".trial.json.0123456789abcdef.new").touch()
    (tmp_path / "trials" / "notes").mkdir()
    (tmp_path / "trials" / "notes" / "mine.txt").touch()
    again = study(tmp_path)
    assert again.identity == first.identity
    assert train(again, tmp_path).name == "0001"
    assert len(study(tmp_path).trials) == 2


@pytest.mark.parametrize("lost", ["study", "study/study.json"])
def test_trials_of_a_deleted_study_are_not_results_of_another(tmp_path: Path, lost: str) -> None:
    train(study(tmp_path), tmp_path)
    place = tmp_path / lost
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink()
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"has trials of another study: .*trials/0000\. Name anoth"):
        check_study(tmp_path, None)
    assert files(tmp_path) == before
    with pytest.raises(UserError, match="has trials of another study"):
        study(tmp_path, 1e-5)


def test_an_emptied_journal_does_not_begin_the_study_anew(tmp_path: Path) -> None:
    train(study(tmp_path), tmp_path)
    journal = tmp_path / "study" / "journal.log"
    journal.write_text("")
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"trials/0000 of a study that is no longer in .*journal"):
        study(tmp_path, 1e-5)
    assert files(tmp_path) == before


def test_a_journal_that_has_lost_a_trial_is_refused(tmp_path: Path) -> None:
    opened, journal = study(tmp_path), tmp_path / "study" / "journal.log"
    begun = journal.read_text()
    train(opened, tmp_path)
    journal.write_text(begun)
    with pytest.raises(UserError, match="trials/0000 belongs to a trial that the study does"):
        study(tmp_path)


def test_another_trial_of_the_same_study_is_refused(tmp_path: Path) -> None:
    opened = study(tmp_path)
    path = train(opened, tmp_path)
    with pytest.raises(UserError, match=r"trials/0000 has a trial with lr 0\.00\d+, but tr"):
        mark_trial(path, opened.identity, {"lr": 0.5})
    foreign = json.loads((path / "trial.json").read_text()) | {"values": {"lr": 0.5}}
    (path / "trial.json").write_text(json.dumps(foreign))
    with pytest.raises(UserError) as raised:
        study(tmp_path)
    (own,) = (trial.params["lr"] for trial in opened.trials)
    assert str(raised.value) == (
        f"{path} has a trial with lr 0.5, but trial 0000 of the study has lr {own}. Name another "
        "--output, or delete that study with --overwrite."
    )
    (path / "trial.json").write_text(json.dumps(foreign | {"values": None}))
    with pytest.raises(UserError, match="trials/0000 has a trial with unknown values, but trial"):
        study(tmp_path)
    (path / "trial.json").unlink()
    with pytest.raises(UserError, match="has trials of another study"):
        mark_trial(path, opened.identity, {"lr": 0.5})


def test_another_storage_is_refused_and_both_are_named(tmp_path: Path) -> None:
    output, url = tmp_path / "output", f"sqlite:///{tmp_path / 'x.db'}"
    study(output)
    with pytest.raises(UserError, match=rf"has a study in .*journal\.log, but the .* is {url}\. U"):
        check_study(output, url)
    with pytest.raises(UserError, match=rf"has a study in .*journal\.log, but the .* is {url}\. U"):
        study(output, storage=url)


def test_a_storage_does_not_lend_its_study_to_another_directory(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'x.db'}"
    train(study(tmp_path / "a" / "study", storage=url), tmp_path / "a" / "study")
    with pytest.raises(UserError, match=r"x\.db has a study that was not begun in --output .*/b/s"):
        study(tmp_path / "b" / "study", storage=url)


def test_no_password_is_written(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    identify(tmp_path, "postgresql://me:secret@db/studies", None, False)
    assert "secret" not in (tmp_path / "study" / "study.json").read_text()
    check_study(tmp_path, "postgresql://you:changed@db/studies")
    with pytest.raises(UserError, match="but the storage given is postgresql://other/studies"):
        check_study(tmp_path, "postgresql://me:secret@other/studies")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:pa55/pa55@db/studies", "postgresql://db/studies"),
        ("postgresql://me:pa55@pa55@db:5432/studies", "postgresql://db:5432/studies"),
        ("postgresql://db/studies?user=me&password=pa55", "postgresql://db/studies"),
        ("postgresql://db/studies?password=se@pa55", "postgresql://"),
        ("postgresql://me:pa55?pa55@db/studies", "postgresql://"),
        ("sqlite:////home/me@lab/study.db", "sqlite:////home/me@lab/study.db"),
    ],
)
def test_no_password_of_a_url_is_written_or_told(url: str, shown: str, tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    identify(tmp_path, url, None, False)
    text = (tmp_path / "study" / "study.json").read_text()
    assert json.loads(text)["storage"] == shown
    with pytest.raises(UserError, match="the storage given is mysql://") as raised:
        check_study(tmp_path, url.replace(url.partition(":")[0], "mysql"))
    assert "pa55" not in str(raised.value)
    with pytest.raises(UserError, match=r"--storage nothing://.* cannot be used") as raised:
        study(tmp_path / "other", storage=f"nothing{url[url.index(':') :]}")
    assert "pa55" not in str(raised.value)


def test_a_query_that_an_earlier_version_wrote_goes_and_the_study_goes_on(tmp_path: Path) -> None:
    plain = f"sqlite:///{tmp_path / 'x.db'}"
    url, record = f"{plain}?timeout=5", tmp_path / "study" / "study.json"
    assert study(tmp_path, storage=url).address == plain
    record.write_text(json.dumps(json.loads(record.read_text()) | {"storage": url}))
    study(tmp_path, storage=url)
    assert json.loads(record.read_text())["storage"] == plain


@pytest.mark.parametrize("text", ["[1]", "{", '{"study": 1}', "[" * 9999])
def test_a_damaged_record_is_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.json").write_text(text)
    with pytest.raises(UserError, match=r"study\.json is .*Name another --output"):
        check_study(tmp_path, None)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("study/study.json", "a study"),
        ("ladder.json", "a ladder"),
        ("sizes/6784/config.yaml", "a ladder"),
    ],
)
def test_runs_and_studies_keep_out_of_a_study(tmp_path: Path, name: str, kind: str) -> None:
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.touch()
    run, _ = resolve({"output": str(tmp_path / "out")})
    with pytest.raises(UserError, match=f"out contains {kind} of consyn-tune, but a run needs its"):
        opening.check_output(run)
    with pytest.raises(UserError, match=f"best-0007 is inside .*out, which contains {kind} of"):
        check_output(tmp_path / "out" / "best-0007", overwrite=False)
    check_output(tmp_path / "out", overwrite=False)


def test_the_best_trial_gets_a_directory_without_another_run(tmp_path: Path) -> None:
    def made(name: str, **flags: Any) -> None:
        run, origins = resolve({"max_steps": 10, "lr": 1e-3, **flags})
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"{describe(run, origins)}{DERIVED}: {{}}\n")

    run, _ = resolve({"max_steps": 10, "lr": 1e-3})
    assert best_directory(tmp_path, 7, run).name == "best-0007"
    made("best-0007", max_steps=20)
    made("best-0007-2", seed=5)
    assert best_directory(tmp_path, 7, run).name == "best-0007-3"
    made("best-0007-3", logging_steps=3)
    assert best_directory(tmp_path, 7, run).name == "best-0007-3", "the same run goes on"
    assert best_directory(tmp_path, 8, run).name == "best-0008"


def test_short_runs_of_a_ladder_do_not_outlive_the_long_one(tmp_path: Path) -> None:
    short = tmp_path / "6784-decay-5"
    short.mkdir()
    line = {"step": 8, "tokens": 1, "time_s": 1.0, "event": "finish"}
    (short / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    rung: Any = SimpleNamespace(parameters=6784, starts=(5, 10))
    unused: Any = None
    with pytest.raises(UserError, match="6784-decay-5 continued a run that is no longer in"):
        RungRun(rung, tmp_path / "6784", unused, unused).run()
