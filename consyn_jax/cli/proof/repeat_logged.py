"""`consyn-train --replay_step`: repeat a logged step, compare it, and list its documents."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consyn_jax.cli.proof.documents_page import SourceChanges, as_json, lines, write_out
from consyn_jax.config import RunConfig
from consyn_jax.errors import Differs, UserError, counted, in_line
from consyn_jax.flags import flat
from consyn_jax.resolve import resolve

if TYPE_CHECKING:
    from consyn_jax.data.learned_documents import LearnedDocument
    from consyn_jax.training.diagnostics.logged_step import Comparison, RepeatedRun
    from consyn_jax.training.trainer import ConsynTrainer

CLOSE = 1e-5  # accepted relative difference between devices or versions


def settings_of_run(
    config: RunConfig, origins: dict[str, str]
) -> tuple[RunConfig, dict[str, str], Path]:
    """Resolve the configuration of the run in `--output`, overridden by the user's other flags.

    Returns:
        The configuration, the origins of its values, and the run directory.

    Raises:
        UserError: there is no run.
    """
    from consyn_jax.config_file import read_config_file
    from consyn_jax.training.run.directory import CONFIG
    from consyn_jax.training.run.identity import read_run_config

    place = Path(config.saving.output)
    read_run_config(place / CONFIG)
    given = {name: value for name, value in flat(config).items() if origins[name] == "flag"}
    given.pop("output", None)  # with --decay_from, config.yaml has the --output of the first run
    run, found = resolve(given, read_config_file(place / CONFIG), file_name=str(place / CONFIG))
    return run, found, place


def replay(trainer: ConsynTrainer, place: Path) -> None:
    """Repeat the step of `--replay_step`, compare it with the log, and print its documents.

    Args:
        trainer: trainer of the run in `place`.

    Raises:
        UserError: data, model or flags differ from the run's, or there is no such step.
        Differs: loss or gradient norm differ from the log.
    """
    from consyn_jax.training.diagnostics.logged_step import repeat_logged_step
    from consyn_jax.training.preference.reference import make_ready

    step = trainer.run.proof.replay_step
    assert step is not None
    _check(trainer, place, step)
    inputs = trainer.run_inputs()
    make_ready(inputs, trainer.run, place, None, {})
    again = repeat_logged_step(
        place,
        step,
        inputs.run,
        inputs.program,
        inputs.train_source,
        inputs.make_parameters,
        inputs.make_base,
        inputs.compile_train_step,
    )
    documents, why, changed = _documents(trainer, step)
    others = _surroundings(place, step, again.mesh)
    agrees, verdict = _verdict(again, others)
    if trainer.run.proof.json:
        page = _as_json(again, agrees, verdict, others, documents)
        page["changed_sources"] = changed
        write_out([json.dumps(page, ensure_ascii=False, allow_nan=False)])
    else:
        answer = _page(again, place, verdict)
        write_out([*answer, *(lines(step, documents) if documents is not None else [why])])
    if not agrees:
        raise Differs(f"step {step:,} of {place} does not match its log.")


def _check(trainer: ConsynTrainer, place: Path, step: int) -> None:
    from consyn_jax.config_file import DERIVED
    from consyn_jax.training.run.directory import CONFIG
    from consyn_jax.training.run.identity import differences, read_run_config

    if not 1 <= step <= trainer.total_steps:
        raise UserError(
            f"--replay_step {step}: the run in {place} has {trainer.total_steps} steps. Give a "
            "step from 1 to this number."
        )
    old = read_run_config(place / CONFIG)
    changes = differences(old, trainer.run, trainer.derived())
    if trainer.total_steps != old[DERIVED].get("total_steps"):
        changes.append("the number of steps changed")
    if changes:
        raise UserError(
            f"--replay_step {step}: the run in {place} differs: {'; '.join(changes)}. Restore "
            "the run's data and weights, and leave out flags that change the computation."
        )


def _documents(
    trainer: ConsynTrainer, step: int
) -> tuple[list[LearnedDocument] | None, str, list[str]]:
    """Find the documents of a step.

    Returns:
        The documents (None if they are unknown), the reason why they are unknown (otherwise ""),
        and the names of source files that have changed.
    """
    from consyn_jax.data.learned_documents import DocumentFinder

    order = trainer.train_source.order
    if order is None:
        return (
            None,
            (
                "The documents of the step are unknown, because the data does not record document "
                "positions."
            ),
            [],
        )
    finder = DocumentFinder(order, trainer.sequences_per_step)
    try:
        documents = finder.documents(step)
    except UserError as error:
        return None, str(error), []
    return documents, "", SourceChanges(finder).among(documents)


def _surroundings(place: Path, step: int, mesh: dict[str, int]) -> list[str]:
    """Names of recorded facts (code, devices, mesh) that changed since the step was first run."""
    import jax

    from consyn_jax.training.provenance.code_files import code_digests, combined
    from consyn_jax.training.provenance.run_facts import read_facts, record_start

    facts = read_facts(place)
    starts = [start for start in (facts or {}).get("starts", []) if start["step"] < step]
    if not starts or "mesh" not in starts[-1]:
        return ["the record of the start is missing"]
    then = starts[-1]
    now = record_start(0, combined(code_digests()), mesh, jax.devices())
    return [
        name.replace("_", " ") for name in now if name != "step" and then.get(name) != now[name]
    ]


def _verdict(again: RepeatedRun, others: list[str]) -> tuple[bool, str]:
    """Whether the repeated numbers agree with the log, and a sentence about the comparison."""
    import jax

    compared = [step for step in again.steps if step.logged is not None]
    if not compared:
        return True, "The run logged none of the repeated steps, so nothing can be compared."
    worst, which = max(step.difference for step in compared), _which(compared, again.steps[-1])
    if worst == 0 and all(step.is_finite for step in compared):
        return True, f"{which} with the log, bit for bit."
    if worst == 0:
        return True, f"{which} with the log. Values that are not finite have no digits to compare."
    changed = f"  Different from the run: {', '.join(others)}." if others else ""
    if worst <= CLOSE and (others or jax.default_backend() != "cpu"):
        return True, f"{which} with the log within {worst:.1g}.{changed}"
    how = f"by up to {worst:.2g}" if math.isfinite(worst) else "about which values are finite"
    return False, f"{which.replace('agree', 'disagree')} with the log {how}.{changed}"


def _which(compared: list[Comparison], last: Comparison) -> str:
    """Name the compared steps, as the beginning of a sentence that ends in "agree"."""
    if last.logged is None:
        about = f"The run did not log step {last.step:,}; the logged steps before that "
        return f"{about}({', '.join(f'{step.step:,}' for step in compared)}) agree"
    others = f", and of {counted(len(compared) - 1, 'step')} before it," if compared[1:] else ""
    return f"Loss and gradient norm of step {last.step:,}{others} agree"


def _page(again: RepeatedRun, place: Path, verdict: str) -> list[str]:
    last = again.steps[-1]
    begun = f"the checkpoint of step {again.start:,}" if again.start else "the beginning"
    page = [in_line(sentence) for sentence in again.skipped]
    page.append(f"Step {last.step:,} of {in_line(str(place))}, repeated from {begun}")
    for name, value in last.repeated.items():
        page.append(f"{name:<9}  {value!r}; {_then(last, name)}")
    return [*page, verdict]


def _then(step: Comparison, name: str) -> str:
    if step.logged is None:
        return "not logged"
    logged = step.logged[name]
    return f"in the run {logged!r}" if math.isfinite(logged) else "in the run: not finite"


def _as_json(
    again: RepeatedRun,
    agrees: bool,
    verdict: str,
    others: list[str],
    documents: list[LearnedDocument] | None,
) -> dict[str, Any]:
    return {
        "step": again.steps[-1].step,
        "from": again.start,
        "agrees": agrees,
        "verdict": verdict,
        "changed": others,
        "skipped": again.skipped,
        "steps": [
            {
                "step": step.step,
                "logged": None if step.logged is None else _finite(step.logged),
                "repeated": _finite(step.repeated),
            }
            for step in again.steps
        ],
        "documents": None if documents is None else as_json(documents),
    }


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    """Replace NaN and infinity by None, because JSON has neither."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
