"""Load the user's callback classes, which `--logging_backend` names as module:Class."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from consyn_jax.config import LoggingOptions
from consyn_jax.errors import UserError, nearest
from consyn_jax.training.logging.tracking.callbacks import Maker, check_methods, shown_place

TYPED = ("flag", "keyword")  # origins of values that the user typed


def own_classes(backends: Sequence[str]) -> list[str]:
    """The user's classes among the backends, as module:Class."""
    return [name for name in backends if ":" in name]


def load_classes(backends: Sequence[str], origin: str) -> dict[str, type[Any]]:
    """Import the user's classes among the backends, and return them by name.

    Importing runs code, so a name is imported only if the user typed it, not if it comes from a
    file. Modules are searched on Python's path, then in the working directory.

    Args:
        origin: origin of the value of --logging_backend, from `resolve`.

    Raises:
        UserError: a class cannot be imported, needs arguments, or is not a callback.
    """
    names = own_classes(backends)
    if names and origin not in TYPED:
        raise UserError(
            f"logging_backend ({origin}) names the class {names[0]}, but a class named only in a "
            f"file is not imported. Add --logging_backend {' '.join(backends)} to the command."
        )
    return {name: _load(name) for name in names}


def user_makers(
    options: LoggingOptions, origins: Mapping[str, str], callbacks: Sequence[Any]
) -> tuple[Maker, ...]:
    """Name and constructor of each callback that the user has chosen.

    Args:
        options: the options with `--logging_backend`. The classes that it names come first.
        origins: origin of each value of the run, by flag name.
        callbacks: callbacks that exist already.

    Raises:
        UserError: a class cannot be imported, needs arguments, or is not a callback.
    """
    made = [(type(callback).__name__, partial(_itself, callback)) for callback in callbacks]
    classes = load_classes(options.logging_backend, origins["logging_backend"]).values()
    return (*((kind.__name__, kind) for kind in classes), *made)


def _itself(callback: Any) -> Any:
    return callback


def _load(name: str) -> type[Any]:
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", name):
        raise UserError(
            f"--logging_backend {name} must be module:Class, as in my_trackers:Mlflow for the "
            "class Mlflow of my_trackers.py."
        )
    module_name, _, class_name = name.partition(":")
    module = _imported(module_name, name)
    kind = getattr(module, class_name, None)
    if not isinstance(kind, type):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        where = getattr(module, "__file__", None) or module_name
        raise UserError(
            f"--logging_backend {name}: {where} has no class {class_name}"
            f"{nearest(class_name, classes)}"
        )
    check_methods(kind, f"--logging_backend {name}")
    try:
        inspect.signature(kind).bind()
    except TypeError as error:
        raise UserError(
            f"--logging_backend {name} must work without arguments, but {error}. Give each of "
            "its arguments a default."
        ) from error
    return kind


def _imported(module: str, name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # at the end, so that no file here hides an installed package
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise _failed(name, error) from error
        raise UserError(
            f"--logging_backend {name}: there is no module {error.name}, neither installed nor in "
            f"the working directory {here}. Check the name, or run the command in the module's "
            "directory."
        ) from error
    # The user's module may raise any exception.
    except (Exception, SystemExit) as error:
        raise _failed(name, error) from error


def _failed(name: str, error: BaseException) -> UserError:
    outside = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and "importlib" not in frame.filename
    ]
    place = f" ({shown_place(outside[-1])})" if outside else ""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return UserError(
        f"--logging_backend {name} cannot be imported: {text}{place}. Correct the module, or leave "
        "the class out."
    )
