"""Keep the kernels that XLA chose by timing on a GPU, so that a resumed run uses them again.

XLA times several kernels for each matmul and fusion of a program. JAX keeps each choice in a small
file beside the compiled programs. Another kernel sums in another order, so a run that is resumed
with an empty cache, or on another machine, would differ in the last bits. The run directory
therefore has a copy of the choices in kernels.json, which contains no code.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jaxlib.version

from consyn_jax.errors import UserError
from consyn_jax.files import make_directory, read_whole, write_whole

KERNELS = "kernels.json"
# JAX's name for the directory of choices, which is inside its directory of compiled programs.
CHOICES = "xla_gpu_per_fusion_autotune_cache_dir"
LARGEST, LARGEST_CHOICE, MOST_CHOICES = 1 << 28, 1 << 20, 50_000  # bytes, bytes, files
# Paths are device/version/name, or just name with an older XLA. The names of unfinished files begin
# with a dot, or the files are in tmp/.
_NAME = re.compile(r"([\w=+-][\w=+.-]*/){0,2}[\w=+-][\w=+.-]*\.(textproto|pb)")


@dataclass(frozen=True)
class KernelChoices:
    """The kernel choices of a run.

    Attributes:
        made_with: Device and versions with which the choices were made, in the form of `made_here`.
        files: Content of each file, by path in the directory of choices.
    """

    made_with: Mapping[str, str]
    files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Hash of all files."""
        found = hashlib.sha256()
        for name in sorted(self.files):
            found.update(f"{name}\n{len(self.files[name])}\n".encode() + self.files[name])
        return found.hexdigest()

    def conflicts(self, directory: Path) -> bool:
        """Whether `directory` has a different choice for a matmul or fusion of this run."""
        found = _read_files(directory)
        return any(found.get(name, content) != content for name, content in self.files.items())

    def put(self, directory: Path) -> None:
        """Write the choices that a directory lacks.

        Raises:
            OSError: The directory cannot be written.
        """
        found = _read_files(directory)
        for name, content in self.files.items():
            if name not in found:
                make_directory((directory / name).parent)
                write_whole(directory / name, content)


def made_here() -> dict[str, str]:
    """Return this process's device and versions, on which its kernel choices depend."""
    device = jax.local_devices()[0]
    return {
        "device": device.device_kind,
        "jaxlib": jaxlib.version.__version__,
        "platform": str(device.client.platform_version),
    }


def _read_files(directory: Path) -> dict[str, bytes]:
    return dict(sorted(_files(directory)))


def _files(directory: Path) -> Iterator[tuple[str, bytes]]:
    for path in directory.rglob("*"):
        name = path.relative_to(directory).as_posix()
        if _is_choice(name):
            with suppress(OSError):  # another process may be tidying
                yield name, read_whole(path, LARGEST_CHOICE)


def _is_choice(name: str) -> bool:
    return _NAME.fullmatch(name) is not None and not name.startswith("tmp/")


def names_of_choices() -> set[str]:
    """Return the names of the choices in this machine's cache."""
    options: Any = jax.config
    programs = options.jax_compilation_cache_dir
    return {name for name, _ in _files(Path(programs) / CHOICES)} if programs else set()


def keep_kernels(run_directory: Path) -> None:
    """Write the kernel choices in this machine's cache to kernels.json, if they have changed.

    Raises:
        UserError: The file cannot be written, or is damaged.
    """
    options: Any = jax.config
    programs = options.jax_compilation_cache_dir
    files = _read_files(Path(programs) / CHOICES) if programs else {}
    before = read_kernels(run_directory)
    if not files or (before is not None and before.files == files):
        return
    text = json.dumps(
        {
            "made_with": made_here(),
            "choices": {name: base64.b64encode(files[name]).decode() for name in files},
        },
        indent=1,
    )
    path = run_directory / KERNELS
    try:
        write_whole(path, text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error


def read_kernels(run_directory: Path) -> KernelChoices | None:
    """Read the kernel choices in a run directory; None if it has none.

    Raises:
        UserError: The file is damaged or cannot be read.
    """
    path = run_directory / KERNELS
    try:
        found: Any = json.loads(read_whole(path, LARGEST))
        made_with, choices = found["made_with"], found["choices"]
        files = {name: base64.b64decode(text, validate=True) for name, text in choices.items()}
        made_with = {name: str(made_with[name]) for name in made_with}
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, TypeError, KeyError, AttributeError, binascii.Error, RecursionError):
        files, made_with = {"": b""}, {}
    if len(files) > MOST_CHOICES or not all(map(_is_choice, files)):
        raise UserError(
            f"{path} is damaged. Delete it: kernels are then chosen anew, and the run may differ "
            "in the last bits from here on."
        )
    return KernelChoices(made_with, files)
