"""Installations in which something is missing, old or doubled."""

import dataclasses
from typing import Any

import pytest

from consyn_jax.doctor.machine_findings import FAIL, INFO, PASS, WARN, Finding
from consyn_jax.doctor.software_checks import check_attention, check_software
from consyn_jax.doctor.software_facts import CudaPackage, Software, cuda_packages, read_software

PACKAGES = tuple(
    CudaPackage(name, wanted, version, True)
    for name, wanted, version in (
        ("nvidia-cublas", ">=13.0.0.19", "13.10.0.20"),
        ("nvidia-cudnn-cu13", "<10.0,>=9.12", "9.28.1.4"),
        ("nvidia-nccl-cu13", ">=2.27.7", "2.32.3"),
    )
)
GOOD = Software(
    "3.11.7",
    "0.10.2",
    "0.10.2",
    {"jax-cuda13-plugin": "0.10.2"},
    PACKAGES,
    "gpu",
    "",
    ("NVIDIA H100 80GB HBM3",) * 8,
    "9.0",
    92801,
    91200,
)


def check(num_gpus: int = 8, **changes: Any) -> dict[str, Finding]:
    found = check_software(dataclasses.replace(GOOD, **changes), num_gpus)
    return {each.name: each for each in found}


def bad(found: dict[str, Finding]) -> dict[str, str]:
    return {name: each.status for name, each in found.items() if each.advice}


def test_a_good_installation_passes() -> None:
    found = check()
    assert bad(found) == {}
    assert found["JAX"].found == "0.10.2, jaxlib 0.10.2, Python 3.11.7"
    assert found["cuDNN"].found == "9.28.1; JAX is built with 9.12.0"
    assert found["CUDA packages"].found == "all 3 packages that the plugin requires"
    assert found["devices"].found == "8 x NVIDIA H100 80GB HBM3 (gpu)"


def test_a_missing_cudnn_is_named() -> None:
    packages = (*PACKAGES[:1], CudaPackage("nvidia-cudnn-cu13", ">=9.12", "", False), PACKAGES[2])
    found = check(cudnn=None, cuda_packages=packages, platform="cpu", device_kinds=("cpu",))
    assert bad(found) == {"cuDNN": FAIL, "CUDA packages": FAIL, "devices": FAIL}
    assert found["CUDA packages"].found == "missing: nvidia-cudnn-cu13"
    assert "it cannot be loaded" in found["cuDNN"].found
    assert found["cuDNN"].advice == "Install it: pip install -U 'jax[cuda13]'."
    assert "the driver shows 8 GPUs" in found["devices"].found


@pytest.mark.parametrize(
    ("version", "status"),
    [(8907, FAIL), (91100, FAIL), (91201, PASS), (92801, PASS), (100000, FAIL)],
)
def test_versions_of_cudnn(version: int, status: str) -> None:
    assert check(cudnn=version)["cuDNN"].status == status


def test_another_cudnn_on_the_library_path() -> None:
    found = check(cudnn=8907, environment={"LD_LIBRARY_PATH": "/usr/local/cuda/lib64"})
    assert found["cuDNN"].found == "8.9.7; JAX is built with 9.12.0"
    assert "unset LD_LIBRARY_PATH" in found["cuDNN"].advice


@pytest.mark.parametrize(
    ("plugins", "words"),
    [
        ({}, "none is installed"),
        ({"jax-cuda13-plugin": "0.9.1"}, "jaxlib 0.10.2 ignores it"),
        ({"jax-cuda13-plugin": "0.10.2", "jax-cuda12-plugin": "0.10.2"}, "two are installed"),
    ],
)
def test_plugins(plugins: dict[str, str], words: str) -> None:
    found = check(plugins=plugins)["CUDA plugin"]
    assert found.status == FAIL
    assert words in found.found


def test_packages_of_a_wrong_version_and_of_the_system() -> None:
    old = CudaPackage("nvidia-nccl-cu13", ">=2.27.7", "2.20.5", False)
    found = check(cuda_packages=(*PACKAGES[:2], old))
    assert bad(found) == {"CUDA packages": FAIL}
    assert found["CUDA packages"].found == "wrong: nvidia-nccl-cu13 2.20.5 (needs >=2.27.7)"
    none = [dataclasses.replace(each, installed="", fits=False) for each in PACKAGES]
    assert check(cuda_packages=tuple(none))["CUDA packages"].status == INFO


def test_devices_that_jax_does_not_use() -> None:
    few = {"device_kinds": GOOD.device_kinds[:2], "environment": {"CUDA_VISIBLE_DEVICES": "0,1"}}
    found = check(**few)
    assert bad(found) == {"devices": WARN}
    assert "the driver shows 8 GPUs; CUDA_VISIBLE_DEVICES=0,1" in found["devices"].found
    assert check(platform="", device_kinds=(), problem="no cuda")["devices"].status == FAIL


def test_attention() -> None:
    (fused,) = check_attention(GOOD)
    assert (fused.status, fused.found[:18]) == (PASS, "fused in bfloat16:")
    (old,) = check_attention(dataclasses.replace(GOOD, compute_capability="7.0"))
    assert old.status == WARN
    assert old.found.startswith("xla in ")
    assert check_attention(dataclasses.replace(GOOD, platform="")) == []


def test_this_installation_is_read() -> None:
    import jax

    found = read_software()
    assert (found.jax, found.platform, len(found.device_kinds)) == (jax.__version__, "cpu", 8)
    assert (found.cudnn, found.cudnn_built, found.problem) == (None, None, "")
    assert found.environment["JAX_PLATFORMS"] == "cpu"
    (attention,) = check_attention(found)
    assert attention.found == "xla in float32: the cpu has no fused kernel"
    assert bad(check(num_gpus=0, plugins={}, cuda_packages=())) == {}


def test_what_a_plugin_asks_for_is_read_from_its_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    import numpy

    asked = [
        "jax-cuda13-pjrt==0.10.2",
        'numpy>=1.0; extra == "with-cuda"',
        'numpy>=99; extra == "with-cuda"',
        'nvidia-of-nobody>=9; extra == "with-cuda"',
        'nvidia-other; extra == "else"',
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda plugin: asked)
    version = numpy.__version__
    assert cuda_packages("jax-cuda13-plugin") == (
        CudaPackage("numpy", ">=1.0", version, True),
        CudaPackage("numpy", ">=99", version, False),
        CudaPackage("nvidia-of-nobody", ">=9", "", False),
    )
