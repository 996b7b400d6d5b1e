"""Optuna's side of a study: trials that nobody works on are taken up, and none is done twice."""

import gc
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from consyn_jax.errors import UserError
from consyn_jax.tuning.optuna_study import OptunaStudy, import_optuna
from consyn_jax.tuning.search_space import Dimension
from consyn_jax.tuning.study_journal import cut_torn_line
from consyn_jax.tuning.tune_options import StudyOptions

if not os.environ.get("CI"):  # where the extra must be installed
    pytest.importorskip("optuna", reason="needs the extra tune")

SPACE = [Dimension("lr", 1e-4, 1e-2, True), Dimension("optimizer", choices=("adamw", "muon"))]


def study(
    output: Path,
    definition: dict[str, Any] | None = None,
    overwrite: bool = False,
    num_evaluations: int = 10,
    **options: Any,
) -> OptunaStudy:
    given = StudyOptions(**options)
    what = {"--epochs": 3.0} if definition is None else definition
    more: dict[str, Any] = {"maximize": False, "num_evaluations": num_evaluations, "seed": 1}
    return OptunaStudy(output, given, SPACE, what, overwrite=overwrite, **more)


def done(opened: OptunaStudy, limit: float = 5) -> int:
    """Work through trials, and return the number of the last one."""
    claim = opened.claim(limit)
    assert claim is not None
    opened.tell(claim, claim.values["lr"])
    claim.release()
    return claim.number


def test_trials_are_numbered_and_end_at_the_limit(tmp_path: Path) -> None:
    opened = study(tmp_path)
    assert [done(opened, 3) for _ in range(3)] == [0, 1, 2]
    assert opened.claim(3) is None
    assert opened.claim(4) is not None, "a higher limit goes on"


def test_a_trial_is_taken_up_with_its_values_after_a_kill(tmp_path: Path) -> None:
    first = study(tmp_path).claim(5)
    assert first is not None
    first.trial.report(3.0, 0)
    first.release()  # as the system does for a process that is killed
    again = study(tmp_path).claim(5)
    assert again is not None
    assert (again.number, again.values) == (first.number, first.values)
    assert again.reported == {0: 3.0}


def test_a_trial_that_another_process_works_on_is_left_alone(tmp_path: Path) -> None:
    one, other = study(tmp_path), study(tmp_path)
    mine, theirs = one.claim(2), other.claim(2)
    assert mine is not None
    assert theirs is not None
    assert (mine.number, theirs.number) == (0, 1)
    assert other.claim(2) is None
    mine.release()
    taken = other.claim(2)
    assert taken is not None
    assert taken.number == 0


def test_a_study_draws_the_same_values_with_and_without_a_break(tmp_path: Path) -> None:
    whole, parts = study(tmp_path / "a"), tmp_path / "b"
    for _ in range(12):
        done(whole, 12)
        done(study(parts), 12)
    assert [t.params for t in whole.trials] == [t.params for t in study(parts).trials]
    assert len({t.params["lr"] for t in whole.trials}) == 12


@pytest.mark.parametrize("sampler", ["random", "qmc", "tpe"])
def test_every_sampler_draws_different_values(tmp_path: Path, sampler: str) -> None:
    for _ in range(4):
        done(study(tmp_path, sampler=sampler))
    values = [trial.params["lr"] for trial in study(tmp_path, sampler=sampler).trials]
    assert len(set(values)) == 4
    assert all(1e-4 <= value <= 1e-2 for value in values)


def test_the_grid_has_every_point_once(tmp_path: Path) -> None:
    space = [Dimension("lr", choices=(0.1, 0.2)), Dimension("beta1", choices=(0.8, 0.9, 0.95))]
    seen = set()
    for _ in range(6):
        options = StudyOptions(sampler="grid")
        opened = OptunaStudy(
            tmp_path, options, space, {}, maximize=False, num_evaluations=2, seed=1
        )
        claim = opened.claim(6)
        assert claim is not None
        seen.add(tuple(claim.values.values()))
        opened.tell(claim, 1.0)
        claim.release()
    assert len(seen) == 6


def test_another_study_is_refused_and_named(tmp_path: Path) -> None:
    study(tmp_path)
    with pytest.raises(UserError, match=r"contains another study: --epochs was 3\.0 and is 4\.0"):
        study(tmp_path, {"--epochs": 4.0})


def test_a_database_may_hold_the_study(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    assert done(study(tmp_path / "run", storage=url)) == 0
    opened = study(tmp_path / "run", storage=url)
    assert [trial.number for trial in opened.trials] == [0]
    assert opened.address == url
    assert study(tmp_path / "run", storage=url, overwrite=True).trials == []
    del opened
    with warnings.catch_warnings():  # Optuna leaves closing its connections to the collector
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def test_a_storage_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--storage nothing://here cannot be used"):
        study(tmp_path, storage="nothing://here")


def test_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    done(study(tmp_path))
    journal = tmp_path / "study" / "journal.log"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 5, "wor')
    assert done(study(tmp_path)) == 1
    assert journal.read_bytes().startswith(whole)
    lock = import_optuna().storages.journal.JournalFileSymlinkLock(str(journal))
    before = journal.read_bytes()
    cut_torn_line(journal, lock)
    assert journal.read_bytes() == before
    left = sorted(path.name for path in journal.parent.iterdir())
    assert left == ["asking", "claims", "journal.log", "study.json"]


def test_bad_trials_are_pruned_at_evaluations(tmp_path: Path) -> None:
    opened = study(tmp_path, num_evaluations=40)
    for _ in range(4):  # the median pruner watches these first
        claim = opened.claim(10)
        assert claim is not None
        for number in range(4):
            claim.trial.report(1.0, number)
        assert not claim.trial.should_prune()
        opened.tell(claim, 1.0)
        claim.release()
    bad = opened.claim(10)
    assert bad is not None
    for number in range(2):
        bad.trial.report(5.0, number)
        assert not bad.trial.should_prune(), "the first evaluations are for warm-up"
    bad.trial.report(5.0, 2)
    assert bad.trial.should_prune()


# ------------------------------------------------------------------- a directory of somebody else


@pytest.mark.parametrize("name", ["study", "study/journal.log", "study/claims", "trials"])
def test_a_link_is_named_and_what_it_leads_to_is_left_alone(tmp_path: Path, name: str) -> None:
    """The journal's was followed: the file that it led to was cut at its last line, and grew."""
    output, elsewhere = tmp_path / "output", tmp_path / "elsewhere"
    done(study(output))
    (output / "trials").mkdir()
    (output / name).rename(elsewhere)
    (output / name).symlink_to(elsewhere)
    if elsewhere.is_file():
        elsewhere.write_text("precious, without an end of line")
    before = sorted(elsewhere.rglob("*")), elsewhere.is_file() and elsewhere.read_text()
    with pytest.raises(UserError, match=f"{output / name} is a link, but a study must contain"):
        study(output)
    assert before == (sorted(elsewhere.rglob("*")), elsewhere.is_file() and elsewhere.read_text())


@pytest.mark.parametrize(
    ("name", "makes"),
    [
        ("study", Path.touch),
        ("study/asking", Path.touch),
        ("study/asking/lock", Path.mkdir),
        ("study/claims", Path.touch),
        ("study/claims/0001", Path.touch),
        ("study/journal.log", Path.mkdir),
    ],
)
def test_a_file_for_a_directory_and_the_other_way_round_are_named(
    tmp_path: Path, name: str, makes: Callable[[Path], None]
) -> None:
    """Found by the search for trees of strangers: a FileExistsError."""
    done(study(tmp_path))
    place = tmp_path / name
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    makes(place)
    with pytest.raises(UserError, match=f"{place}.* cannot be used: .*Name another --output"):
        study(tmp_path).claim(5)


def test_a_hard_link_to_another_file_is_not_written_to(tmp_path: Path) -> None:
    done(study(tmp_path / "output"))
    journal, elsewhere = tmp_path / "output" / "study" / "journal.log", tmp_path / "elsewhere"
    journal.unlink()
    elsewhere.write_text("precious, without an end of line")
    journal.hardlink_to(elsewhere)
    with pytest.raises(UserError, match=r"journal\.log cannot be used: it has a hard link"):
        study(tmp_path / "output")
    assert elsewhere.read_text() == "precious, without an end of line"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("target", ["/nowhere/study/journal.log", "journal.log.lock", None])
def test_a_lock_that_was_left_is_removed(tmp_path: Path, target: str | None) -> None:
    """Optuna waits for a link to nowhere for ever, as one is after a kill and a move."""
    done(study(tmp_path))
    lock = tmp_path / "study" / "journal.log.lock"
    lock.touch() if target is None else lock.symlink_to(target)
    assert done(study(tmp_path)) == 1


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('"op_code":4', '"op_code":99', "is damaged"),
        ('"op_code":4', '"op":4', r"is damaged \('op_code'\)"),
        ('"trial_id":0', '"trial_id":[]', "is damaged"),
        ('"values":[', '"values"', "is damaged"),  # in the last line, which Optuna passes over
        ('"op_code":4', '"op_code":4,"-":' + "[" * 9999 + "]" * 9999, "is damaged"),
        ('"values":[', '"values":["x",', "trial 0 has no value, or several"),
        ('"values":[', '"values":["x"],"-":[', "trial 0 has a value that is not a number"),
        ('"param_name":"lr"', '"param_name":"rate"', "trial 0 has parameters of another search"),
        ('"low\\": 0.0001', '"low\\": \\"x\\"', "is damaged"),
        ('"steps":9', '"steps":"many"', "trial 0 has no number as its step or steps"),
        ('"steps":9', '"outcome":"great"', "trial 0 has an unknown outcome"),
        ('"intermediate_value":1.5', '"intermediate_value":{}', "a value that is not a number"),
        ('"step":0', '"step":"first"', "trial 0 has evaluations without a number"),
    ],
)
def test_a_journal_that_no_study_wrote_is_refused(
    tmp_path: Path, old: str, new: str, fault: str
) -> None:
    claim = study(tmp_path).claim(1)
    assert claim is not None
    claim.trial.report(1.5, 0)
    claim.trial.set_user_attr("steps", 9)
    study(tmp_path).tell(claim, 1.0)
    claim.release()
    journal = tmp_path / "study" / "journal.log"
    text = journal.read_text()
    assert old in text
    journal.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=fault):
        study(tmp_path)


def test_a_journal_of_any_size_is_not_read_whole(tmp_path: Path) -> None:
    done(study(tmp_path))
    os.truncate(tmp_path / "study" / "journal.log", 1 << 40)
    with pytest.raises(UserError, match=r"it has 1,099,511,627,776 bytes, too many for"):
        study(tmp_path)
