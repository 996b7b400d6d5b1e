"""Judge JAX, its CUDA plugin, CUDA's packages, and the attention kernel of training."""

from __future__ import annotations

import re

from consyn_jax.doctor.machine_findings import FAIL, INFO, PASS, WARN, Finding
from consyn_jax.doctor.software_facts import Software
from consyn_jax.errors import listed

INSTALL = "pip install -U 'jax[cuda{cuda}]'"


def check_software(software: Software, num_gpus: int) -> list[Finding]:
    """Judge the versions, and whether JAX uses the machine's GPUs.

    Args:
        num_gpus: number of GPUs that the driver shows.
    """
    found = [Finding("JAX", INFO, _versions(software))]
    if software.plugins or num_gpus:
        found.append(_plugin(software))
    if software.cuda_packages:
        found.append(_packages(software))
    if software.plugins:
        found.append(_cudnn(software))
    return [*found, _devices(software, num_gpus)]


def _versions(software: Software) -> str:
    return f"{software.jax}, jaxlib {software.jaxlib}, Python {software.python}"


def _install(software: Software) -> str:
    return INSTALL.format(cuda=software.cuda or 13)


def _plugin(software: Software) -> Finding:
    if not software.plugins:
        advice = f"Install it: {_install(software)}."
        return Finding("CUDA plugin", FAIL, "none is installed, so JAX does not see GPUs", advice)
    shown = listed([f"{name} {version}" for name, version in software.plugins.items()])
    if len(software.plugins) > 1:
        spare = list(software.plugins)[1]
        advice = f"Keep one plugin: pip uninstall {spare} {spare.replace('plugin', 'pjrt')}."
        return Finding("CUDA plugin", FAIL, f"two are installed: {shown}", advice)
    (version,) = software.plugins.values()
    if _numbers(version) != _numbers(software.jaxlib):
        advice = f"Install both in one version: {_install(software)}."
        found = f"{shown}; jaxlib {software.jaxlib} ignores it because the versions differ"
        return Finding("CUDA plugin", FAIL, found, advice)
    return Finding("CUDA plugin", PASS, shown)


def _numbers(version: str) -> tuple[int, ...]:
    """Parse the dotted numbers at the start of a version; jaxlib compares only these."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _packages(software: Software) -> Finding:
    packages = software.cuda_packages
    missing = [package.name for package in packages if not package.installed]
    wrong = [
        f"{package.name} {package.installed} (needs {package.wanted})"
        for package in packages
        if package.installed and not package.fits
    ]
    if len(missing) == len(packages):
        return Finding("CUDA packages", INFO, "none from pip; JAX uses the system's CUDA")
    if missing or wrong:
        found = "; ".join(
            f"{word} {listed(names)}"
            for word, names in (("missing:", missing), ("wrong:", wrong))
            if names
        )
        return Finding("CUDA packages", FAIL, found, f"Install them again: {_install(software)}.")
    return Finding("CUDA packages", PASS, f"all {len(packages)} packages that the plugin requires")


def _cudnn(software: Software) -> Finding:
    path = software.environment.get("LD_LIBRARY_PATH", "")
    install = f"{_install(software)}{', and unset LD_LIBRARY_PATH' if path else ''}"
    if software.cudnn is None:
        found = "it cannot be loaded, and JAX needs it to use a GPU"
        return Finding("cuDNN", FAIL, found, f"Install it: {install}.")
    version = _cudnn_version(software.cudnn)
    if software.cudnn_built is None:
        return Finding("cuDNN", INFO, f"{version}; the plugin does not say which version it needs")
    built = _cudnn_version(software.cudnn_built)
    found = f"{version}; JAX is built with {built}"
    # A different major version has a different interface; an older minor may lack functions.
    new, old = (tuple(map(int, text.split(".")[:2])) for text in (version, built))
    if new[0] != old[0] or new < old:
        return Finding("cuDNN", FAIL, found, f"Install a matching version: {install}.")
    return Finding("cuDNN", PASS, found)


def _cudnn_version(number: int) -> str:
    """Format cuDNN's version number as text.

    The number is 10,000 x major + 100 x minor + patch. Before cuDNN 9, the factor of
    major was 1,000.

    >>> _cudnn_version(92801), _cudnn_version(8907)
    ('9.28.1', '8.9.7')
    """
    unit = 10_000 if number >= 10_000 else 1_000
    return f"{number // unit}.{number % unit // 100}.{number % 100}"


def _devices(software: Software, num_gpus: int) -> Finding:
    if software.problem:
        advice = "Correct what is reported above, or check JAX_PLATFORMS."
        return Finding("devices", FAIL, f"JAX finds no device: {software.problem}", advice)
    count, kinds = len(software.device_kinds), sorted(set(software.device_kinds))
    found = f"{count} x {listed(kinds)} ({software.platform})"
    limits = [
        f"{name}={software.environment[name]}"
        for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES")
        if name in software.environment
    ]
    seen = 0 if software.platform == "cpu" else count
    if num_gpus > seen:
        found += f", and the driver shows {num_gpus} GPU{'' if num_gpus == 1 else 's'}"
        if limits:
            advice = f"Unset {limits[0].partition('=')[0]} if the run should use all GPUs."
            return Finding("devices", WARN, f"{found}; {', '.join(limits)}", advice)
        advice = (
            "Correct what fails above. If no other check fails, the output of "
            "python -c 'import jax; jax.devices()' says why JAX finds no GPU."
        )
        return Finding("devices", FAIL, found, advice)
    return Finding("devices", PASS, found)


def check_attention(software: Software) -> list[Finding]:
    """Judge the attention kernel that training would use for the usual head size, 128."""
    if not software.platform:
        return []
    import jax.numpy as jnp

    from consyn_jax.model.attention import choose_attention
    from consyn_jax.training.precision import choose_precision

    platform, capability = software.platform, software.compute_capability
    dtype = choose_precision("auto", platform, capability).dtype
    choice = choose_attention(platform, dtype, 128, capability)
    found = f"{choice.backend} in {jnp.dtype(dtype).name}: {choice.reason}"
    if choice.backend == "xla" and platform != "cpu":
        advice = "Use a GPU of compute capability 8.0 (Ampere) or newer, or shorter sequences."
        return [Finding("attention", WARN, found, advice)]
    return [Finding("attention", PASS, found)]
