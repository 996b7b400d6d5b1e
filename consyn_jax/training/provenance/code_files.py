"""The code that determines a run's numbers: this package and the libraries it computes with."""

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
    """SHA-256 of each Python file of this package, by its path in the package."""
    return {
        file.relative_to(PACKAGE).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(PACKAGE.rglob("*.py"))
    }


def combined(digests: dict[str, str]) -> str:
    """One digest for several files: the SHA-256 of the lines that `sha256sum` would print.

    >>> combined({"b": "22", "a": "11"}) == combined({"a": "11", "b": "22"})
    True
    """
    lines = [f"{digest}  {name}\n" for name, digest in sorted(digests.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of Python, of this package and of the libraries that compute."""
    found = {"python": platform.python_version(), "consyn_jax": consyn_jax.__version__}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def commit() -> str | None:
    """The commit of this package's code; None if it does not come from a repository.

    `direct_url.json` (PEP 610) names it if the package was installed from a repository, and `.git`
    does in a working tree. Uncommitted changes show only in the digests of the files.
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
    """The commit that a repository has checked out.

    Args:
        git: the path `.git`; in a linked working tree it is a file that names the directory.
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
