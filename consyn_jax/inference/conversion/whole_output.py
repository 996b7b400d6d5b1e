"""Write an output atomically, and report a failed write in one sentence."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote

from consyn_jax.errors import UserError
from consyn_jax.files import flush
from consyn_jax.training.run.model_manifest import seal

IO_ERROR = re.compile(r"I/O error: (.+) \(os error \d+\)")  # in messages of safetensors
SYSTEM_ERROR = re.compile(r"\[os_error_code='(\d+)'\]")  # in messages of TensorStore
SPARE_BYTES = 16 << 20  # space besides the weights: vocabulary, configuration, card


def check_target(output: Path, size: int, hub_name: str | None = None) -> None:
    """Check, before slow work, that `output` can be made and has room for `size` bytes.

    Args:
        hub_name: Hub repository to which the output will be uploaded; None for no upload. If the
            output exists already, the error message has the command that uploads it.

    Raises:
        UserError: The output exists or cannot be created, or the disk is too full.
    """
    if os.path.lexists(output):
        move = ", or move it away first"
        if hub_name is not None:  # after an interrupted upload, the output is complete
            upload = f"hf upload {hub_name} {quote(str(output))}"
            move = f", move it away first, or upload it with `{upload}`"
        raise UserError(f"--output {output} exists. Name another{move}.")
    above = (parent for parent in output.absolute().parents if parent.exists())
    there = next(above)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "no permission" if there.is_dir() else "it is a file"
        raise UserError(
            f"--output {output} cannot be created in {there}: {why}. Give another path."
        )
    free = shutil.disk_usage(there).free
    if free < size + SPARE_BYTES:
        raise UserError(
            f"--output {output} needs {size / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free "
            "there. Free some space, or give another path."
        )


@contextmanager
def written_aside(output: Path) -> Iterator[Path]:
    """Yield a hidden path beside `output` to write to, and rename it to `output` on success.

    Before the renaming, a directory gets a manifest, and the files are flushed to the disk. An
    error removes the path. If the process is killed, the hidden path remains. No command accepts it
    as a model, and the next conversion to `output` removes it.

    Raises:
        UserError: The output cannot be written.
    """
    aside = output.with_name(f".{output.name}.new")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove(aside)
        yield aside
        _flush_all(aside)
        _give_name(aside, output)
    except BaseException as error:
        _remove(aside)
        reason = _refusal(error)
        if reason is None:
            raise
        raise UserError(
            f"--output {output} could not be written: {reason}. Once that is fixed, run the same "
            "command again."
        ) from error


def _give_name(aside: Path, output: Path) -> None:
    if os.path.lexists(output):
        raise UserError(
            f"--output {output} was created by another process in the meantime. Give another path."
        )
    aside.rename(output)
    flush(output.parent)


def _refusal(error: BaseException) -> str | None:
    """Return the operating system's reason for an error; None for an error of another kind."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if found := IO_ERROR.search(str(error)):
        return found[1]
    if found := SYSTEM_ERROR.search(str(error)):
        return os.strerror(int(found[1]))
    return None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush_all(path: Path) -> None:
    """Flush a file to the disk; for a directory, write a manifest and flush all its files."""
    if path.is_dir():
        seal(path)
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
