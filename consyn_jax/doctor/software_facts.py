"""Read the installed versions of JAX, its plugins and CUDA's packages, and the loaded cuDNN."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")


@dataclass(frozen=True)
class CudaPackage:
    """A package that JAX's plugin requires; `installed` is empty if it is missing."""

    name: str
    wanted: str
    installed: str
    fits: bool


@dataclass(frozen=True)
class Software:
    """Versions, and the platform and devices that JAX finds.

    Attributes:
        plugins: versions of JAX's CUDA plugins by name.
        cuda_packages: packages that the first plugin requires if CUDA comes from pip.
        platform: the platform that JAX uses, such as "cpu" or "gpu"; empty if JAX finds none.
        problem: why JAX finds no device; empty if it finds one.
        device_kinds: the kind of each device of this process.
        cudnn: version of the loaded cuDNN as a number (92801 is 9.28.1); None if not loaded.
        cudnn_built: version of cuDNN that the plugin was built with; None if unknown.
        environment: variables that select devices and libraries, with their values.
    """

    python: str = ""
    jax: str = ""
    jaxlib: str = ""
    plugins: Mapping[str, str] = field(default_factory=dict)
    cuda_packages: tuple[CudaPackage, ...] = ()
    platform: str = ""
    problem: str = ""
    device_kinds: tuple[str, ...] = ()
    compute_capability: str = ""
    cudnn: int | None = None
    cudnn_built: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def cuda(self) -> int | None:
        """The major version of CUDA that the first plugin needs."""
        found = re.search(r"cuda(\d+)", next(iter(self.plugins), ""))
        return int(found[1]) if found else None


VARIABLES = ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH")


def read_software() -> Software:
    """Read all versions and JAX's devices; this loads CUDA's libraries."""
    import jax
    import jaxlib.version

    plugins = {name: version for name in PLUGINS if (version := installed_version(name))}
    found, problem = [], ""
    try:
        found = jax.local_devices()
    except RuntimeError as error:
        problem = " ".join(str(error).split())
    plugin = next(iter(plugins), "")
    return Software(
        platform.python_version(),
        jax.__version__,
        jaxlib.version.__version__,
        plugins,
        cuda_packages(plugin) if plugin else (),
        found[0].platform if found else "",
        problem,
        tuple(device.device_kind for device in found),
        str(getattr(found[0], "compute_capability", "")) if found else "",
        *_cudnn(plugin),
        {name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
    )


def installed_version(package: str) -> str:
    """Return the version of a package; empty if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def cuda_packages(plugin: str) -> tuple[CudaPackage, ...]:
    """List the packages that the plugin's extra `with-cuda` requires."""
    from packaging.requirements import Requirement

    found = []
    for line in importlib.metadata.requires(plugin) or []:
        asked = Requirement(line)
        if asked.marker is None or asked.marker.evaluate({"extra": ""}):
            continue
        if not asked.marker.evaluate({"extra": "with-cuda"}):
            continue
        version = installed_version(asked.name)
        fits = bool(version) and asked.specifier.contains(version, prereleases=True)
        found.append(CudaPackage(asked.name, str(asked.specifier), version, fits))
    return tuple(found)


def _cudnn(plugin: str) -> tuple[int | None, int | None]:
    """Return cuDNN's loaded version, and the version that the plugin was built with."""
    if not plugin:
        return None, None
    try:
        versions: Any = importlib.import_module(f"{plugin.replace('-', '_')}._versions")
    except ImportError:
        return None, None
    built = int(versions.cudnn_build_version())
    try:
        return int(versions.cudnn_get_version()), built
    except RuntimeError:  # raised by the plugin if cuDNN cannot be loaded
        return None, built
