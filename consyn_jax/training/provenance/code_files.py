"""The code that determines the results of a run: this package and the libraries that it uses."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import consyn_jax

PACKAGE = Path(consyn_jax.__file__).parent
LIBRARIES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "tokenizers",
    "safetensors",
)
_COMMIT = re.compile(r"[0-9a-f]{40,64}")


@cache
def code_digests() -> dict[str, str]:
    """Return the SHA-256 of each Python file in this package, by path."""
    return {
        file.relative_to(PACKAGE).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(PACKAGE.rglob("*.py"))
    }


def combined(digests: dict[str, str]) -> str:
    """Combine the hashes of several files: the SHA-256 of the lines that `sha256sum` would print.

    >>> combined({"b": "22", "a": "11"}) == combined({"a": "11", "b": "22"})
    True
    """
    lines = [f"{digest}  {name}\n" for name, digest in sorted(digests.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """Return the versions of Python, of this package, and of the numerical libraries."""
    found = {"python": platform.python_version(), "consyn_jax": consyn_jax.__version__}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def commit() -> str | None:
    """Return the Git commit of this package's code; None if unknown.

    If the package was installed from a repository, `direct_url.json` (PEP 610) has the commit. In a
    working tree, `.git` has it. Uncommitted changes are visible only in the hashes of the files.
    """
    with suppress(PackageNotFoundError, OSError, ValueError, AttributeError):
        text = distribution("consyn_jax").read_text("direct_url.json") or "{}"
        found = json.loads(text).get("vcs_info", {}).get("commit_id")
        if isinstance(found, str):
            return found
    with suppress(OSError, UnicodeDecodeError):
        return _commit_of_tree(PACKAGE.parent / ".git")
    return None


def _commit_of_tree(git: Path) -> str | None:
    """Return the commit that is checked out in a repository.

    Args:
        git: The path `.git`. In a linked working tree, it is a file with the path of the Git
            directory.
    """
    if git.is_file():
        git = (git.parent / git.read_text().strip().removeprefix("gitdir: ")).resolve()
    head = (git / "HEAD").read_text().strip()
    if _COMMIT.fullmatch(head):
        return head
    name = head.removeprefix("ref: ")
    common = git / "commondir"
    shared = (git / common.read_text().strip()).resolve() if common.is_file() else git
    for place in (git / name, shared / name):
        if place.is_file() and _COMMIT.fullmatch(found := place.read_text().strip()):
            return found
    for line in (shared / "packed-refs").read_text().splitlines():
        if line.endswith(f" {name}"):
            return line.split()[0]
    return None
