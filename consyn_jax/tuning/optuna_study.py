"""Optuna's part of a study: storage, sampler, pruner, and the trials that a process works on.

Optuna stores the states of the trials. A process that works on a trial also holds a file lock. The
operating system releases the lock if the process is killed; another process then continues the
trial under its number. Optuna's heartbeats, in contrast, would mark the trial as failed and start
another one (docs/design/libraries.md).
"""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consyn_jax.errors import UserError
from consyn_jax.files import make_directory
from consyn_jax.training.run.lock import RunLock, is_held
from consyn_jax.tuning.search_space import Dimension
from consyn_jax.tuning.space.untried_points import UntriedPoints, num_points
from consyn_jax.tuning.study_directory import CLAIMS, JOURNAL, STUDY
from consyn_jax.tuning.study_identity import (
    check_values,
    identify,
    public_url,
    trial_directories,
)
from consyn_jax.tuning.study_journal import check_trials, open_journal, refuse_links
from consyn_jax.tuning.tune_options import StudyOptions

# User attributes of the study: the settings that all its trials share, and its identity.
DEFINITION, IDENTITY = "definition", "identity"
ASKING_S = 0.05  # seconds between two attempts to acquire the lock of `_asking`
LARGEST_SEED = 2**32
Definition = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """A trial that this process works on, until `release`.

    Attributes:
        number: number of the trial in the study.
        values: values of the varied flags, by flag name.
        trial: Optuna's trial object.
        reported: value of each evaluation reported so far, by the number of the evaluation from 0.
            Reports of earlier processes are included.
    """

    number: int
    values: dict[str, Any]
    trial: Any
    reported: dict[int, float]
    lock: RunLock

    def release(self) -> None:
        """Release the trial's lock, so that another process may continue it."""
        self.lock.release()


class OptunaStudy:
    """The study in a directory; several processes may work on it at the same time.

    Args:
        output: the directory of the study.
        definition: settings common to all trials, which must be the same at every start.
        num_evaluations: number of evaluations of a trial that is not pruned.
        seed: the sampler's seed.
        overwrite: whether to delete an existing study with the same name from `--storage`.

    Raises:
        UserError: Optuna is not installed, the storage cannot be used, or the directory contains
            another study.
    """

    def __init__(
        self,
        output: Path,
        options: StudyOptions,
        space: Sequence[Dimension],
        definition: Definition,
        *,
        maximize: bool,
        num_evaluations: int,
        seed: int,
        overwrite: bool = False,
    ) -> None:
        self._optuna = import_optuna()
        self._place, self._space, self._options = output / STUDY, space, options
        self._evaluations, self._seed = num_evaluations, seed
        refuse_links(output)
        with _usable(self._place):
            make_directory(self._place)
        storage = self._storage(options.storage)
        name = "consyn" if options.storage is None else output.resolve().name
        with self._asking():
            if overwrite and options.storage is not None:
                with suppress(KeyError):  # there is no such study
                    self._optuna.delete_study(study_name=name, storage=storage)
            self.identity = self._identify(storage, name, output)
            self.study = self._optuna.create_study(
                study_name=name,
                storage=storage,
                direction="maximize" if maximize else "minimize",
                pruner=self._pruner(options.pruner),
                load_if_exists=True,
            )
            if IDENTITY not in self.study.user_attrs:
                self.study.set_user_attr(IDENTITY, self.identity)
            _check_definition(self.study, definition, output)
        # First the directories: the storage has a trial before the trial's directory is made.
        directories = trial_directories(output)
        check_trials(self.trials, space, f"The study in {self.address}")
        check_values(directories, [trial.params for trial in self.trials])

    def _identify(self, storage: Any, name: str, output: Path) -> str:
        """Return the identity of the study, which its storage and its directory must share."""
        stored, has_trials = None, False
        with suppress(KeyError):  # the storage does not have the study yet
            found = self._optuna.load_study(study_name=name, storage=storage)
            stored = found.user_attrs.get(IDENTITY)
            has_trials = bool(found.get_trials(deepcopy=False))
        with _usable(output):
            return identify(output, self._options.storage, stored, has_trials)

    @property
    def trials(self) -> list[Any]:
        """All trials so far, as Optuna's `FrozenTrial` objects."""
        found: list[Any] = self.study.get_trials(deepcopy=False)
        return found

    def tell(self, claim: Claim, value: float | None) -> None:
        """Report the end of a trial to Optuna.

        Args:
            value: the result; None if there is no result. Samplers treat such a trial as a bad one.
        """
        state = self._optuna.trial.TrialState
        try:
            ended = state.PRUNED if value is None else state.COMPLETE
            self.study.tell(claim.trial, value, state=ended)
        except RuntimeError:
            # After its last point, GridSampler tries to stop Optuna's `optimize` loop, which is not
            # used here.
            if self._options.sampler != "grid":
                raise

    def importance(self) -> dict[str, float]:
        """Importance of each flag, as a share; empty if too few trials are done."""
        importance = self._optuna.importance
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the evaluator is marked as experimental
            with suppress(ValueError, RuntimeError, ImportError):
                found: dict[str, float] = importance.get_param_importances(
                    self.study, evaluator=importance.PedAnovaImportanceEvaluator()
                )
                return found
        return {}

    @property
    def address(self) -> str:
        """The storage's address, as `optuna-dashboard` takes it; a password must be added."""
        return public_url(self._options.storage) or str(self._place / JOURNAL)

    def claim(self, limit: float) -> Claim | None:
        """Claim a trial that was interrupted, or begin a new trial.

        Args:
            limit: number of trials after which no new trial begins.

        Returns:
            The claim; None if there is no trial to continue or begin. Other processes may still be
            working on trials.
        """
        with self._asking():
            trials = self.trials
            for frozen in trials:
                if self._is_running(frozen) and not is_held(self._claims(frozen.number)):
                    found = self._claimed(frozen.number, frozen._trial_id)
                    if found is not None:
                        return found
            return self._claimed(len(trials), None) if len(trials) < limit else None

    def _is_running(self, frozen: Any) -> bool:
        running: bool = frozen.state == self._optuna.trial.TrialState.RUNNING
        return running

    def _claimed(self, number: int, known: int | None) -> Claim | None:
        """Acquire the lock of a trial, and read its values.

        A process reports the end of its trial to Optuna before it releases the lock. If Optuna says
        that a trial is running, but its lock is free, the trial was interrupted.

        Args:
            known: Optuna's id of a trial that was running; None for a new trial.

        Returns:
            The claim; None if another process has ended the trial meanwhile.
        """
        place = self._claims(number)
        with _usable(place):
            make_directory(place)
            lock, kept = RunLock(place), False
        try:
            reported = {}
            if known is not None:
                frozen = self.trials[number]
                if not self._is_running(frozen):
                    return None
                reported = dict(frozen.intermediate_values)
            # The seed depends on the trial's number, so that a continued study does not draw the
            # same values again.
            self.study.sampler = self._sampler_of_new_points(number)
            if known is None:
                trial = self.study.ask()
            else:  # the interrupted process may have drawn some or all values
                trial = self._optuna.trial.Trial(self.study, known)
            assert trial.number == number
            values = {dimension.name: self._suggest(trial, dimension) for dimension in self._space}
            kept = True
            return Claim(number, values, trial, reported, lock)
        finally:
            if not kept:
                lock.release()

    def _suggest(self, trial: Any, dimension: Dimension) -> Any:
        if dimension.choices:
            return trial.suggest_categorical(dimension.name, dimension.choices)
        suggest = trial.suggest_int if dimension.is_whole else trial.suggest_float
        return suggest(dimension.name, dimension.low, dimension.high, log=dimension.is_log)

    def _claims(self, number: int) -> Path:
        return self._place / CLAIMS / f"{number:04}"

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Hold a lock while this process counts the trials, and claims or begins a trial."""
        place = self._place / "asking"
        with _usable(place):
            make_directory(place)
            while True:
                try:
                    lock = RunLock(place)
                    break
                except UserError:  # another process has the lock for a moment
                    time.sleep(ASKING_S)
        try:
            yield
        finally:
            lock.release()

    def _storage(self, url: str | None) -> Any:
        if url is None:
            return open_journal(self._optuna, self._place)
        try:
            return self._optuna.storages.get_storage(url)
        except Exception as error:
            shown = public_url(url)
            reason = " ".join(str(error).replace(url, shown).split())[:200] or type(error).__name__
            raise UserError(
                f"--storage {shown} cannot be used ({reason}). Give a database URL such as "
                "sqlite:///study.db."
            ) from error

    def _sampler_of_new_points(self, number: int) -> Any:
        """The sampler of a trial, which repeats no point of a finite search space."""
        sampler = self._sampler(number)
        if self._options.sampler == "grid" or num_points(self._space) is None:
            return sampler
        of_values, distributions = self._optuna.distributions, dict[str, Any]()
        for d in self._space:
            distributions[d.name] = (
                of_values.CategoricalDistribution(d.choices)
                if d.choices
                else of_values.IntDistribution(d.low, d.high, log=d.is_log)
            )
        seed = self._seed + number
        return UntriedPoints(sampler, self._space, distributions, lambda: self.trials, seed)

    def _sampler(self, number: int) -> Any:
        samplers, seed = self._optuna.samplers, (self._seed + 7919 * number) % LARGEST_SEED
        match self._options.sampler:
            case "random":
                return samplers.RandomSampler(seed)
            case "qmc":  # all trials share one sequence; the storage keeps the position in it
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # it is marked as experimental
                    return samplers.QMCSampler(seed=self._seed, warn_independent_sampling=False)
            case "grid":  # all trials need the same seed, because it orders the points
                grid = {d.name: list(d.choices) for d in self._space}
                return samplers.GridSampler(grid, self._seed)
        # The sampler treats other processes' running trials as bad results, so that no values are
        # tried twice.
        return samplers.TPESampler(seed=seed, constant_liar=True)

    def _pruner(self, name: str) -> Any:
        pruners, most = self._optuna.pruners, self._evaluations
        match name:
            case "halving":
                return pruners.SuccessiveHalvingPruner()
            case "hyperband":
                return pruners.HyperbandPruner(max_resource=most)
            case "none":
                return pruners.NopPruner()
        # Pruning begins after 4 trials and a twentieth of a trial's evaluations. Measured with
        # benchmarks/search_quality.py: with 3 trials and a tenth, pruning saves as many steps, but
        # loses the best trial twice as often. With 5 trials (Optuna's default) and a fifth, it
        # saves fewer steps.
        return pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=most // 20)


@contextmanager
def _usable(place: Path) -> Iterator[None]:
    """Turn errors about files in the study's directory into a `UserError` that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or place} cannot be used: {error.strerror}. Name another --output."
        ) from error


def import_optuna() -> Any:
    """Import Optuna, and let it log only warnings.

    Raises:
        UserError: Optuna is not installed.
    """
    try:
        optuna = importlib.import_module("optuna")
    except ImportError as error:
        raise UserError(
            "consyn-tune needs Optuna. Run pip install 'consyn_jax[tune]', or pip install optuna."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _check_definition(study: Any, definition: Definition, output: Path) -> None:
    """Write the definition into a new study, or compare it with an existing study's."""
    old: Mapping[str, Any] | None = study.user_attrs.get(DEFINITION)
    if not isinstance(old, Mapping):
        study.set_user_attr(DEFINITION, definition)
        return

    def written(values: Mapping[str, Any], name: str) -> str:
        return "left out" if values.get(name) is None else str(values[name])

    changes = [
        f"{name} was {written(old, name)} and is {written(definition, name)}"
        for name in {**old, **definition}
        if old.get(name) != definition.get(name)
    ]
    if changes:
        raise UserError(
            f"--output {output} contains another study: {'; '.join(changes)}. Give another "
            "directory, use the old values, or delete that study with --overwrite."
        )
