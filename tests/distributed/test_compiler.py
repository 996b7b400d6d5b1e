"""Which settings the compiler gets, and which are left to users and to other versions of XLA."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from consyn_jax.distributed import compiler
from consyn_jax.distributed.compiler import (
    CPU,
    GENERATIONS,
    SETTINGS,
    Setting,
    compiler_options,
    generation_of,
    traced_options,
)

KNOWN, UNKNOWN = (
    Setting("xla_gpu_reduce_scatter_combine_threshold_bytes", 7, ""),
    Setting("xla_gpu_no_such_thing", True, "", ("Hopper",)),
)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Pretend that the device is a Hopper; the CPU compiler knows the same settings."""
    monkeypatch.setattr(compiler, "generation_of", lambda device: "Hopper")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("platform", "capability", "generation"),
    [
        ("gpu", "9.0", "Hopper"),
        ("cuda", "8.0", "Ampere"),
        ("gpu", "8.9", "Ada"),
        ("gpu", "10.0", "Blackwell"),
        ("gpu", "7.5", None),
        ("cpu", "", "CPU"),
        ("tpu", "", None),
    ],
)
def test_the_generation_of_a_device(platform: str, capability: str, generation: str | None) -> None:
    assert (
        generation_of(SimpleNamespace(platform=platform, compute_capability=capability))
        == generation
    )


@pytest.mark.parametrize("generation", [*GENERATIONS, CPU])
def test_every_setting_has_a_reason_and_the_installed_compiler_knows_it(
    generation: str, on_hopper: pytest.MonkeyPatch
) -> None:
    on_hopper.setattr(compiler, "generation_of", lambda device: generation)
    own = [setting for setting in SETTINGS if generation in setting.generations]
    assert compiler_options(jax.devices()) == {setting.name: setting.value for setting in own} != {}
    assert all(
        setting.reason.endswith(".") and set(setting.generations) <= {*GENERATIONS, CPU}
        for setting in own
    )


def test_unknown_settings_are_left_out(on_hopper: pytest.MonkeyPatch) -> None:
    on_hopper.setattr(compiler, "SETTINGS", (UNKNOWN, KNOWN))
    assert compiler_options(jax.devices()) == {KNOWN.name: 7}
    on_hopper.setattr(compiler, "SETTINGS", (UNKNOWN,))
    assert compiler_options(jax.devices()) == {}


def test_a_generation_gets_only_its_own_settings(on_hopper: pytest.MonkeyPatch) -> None:
    on_hopper.setattr(
        compiler, "SETTINGS", (KNOWN, Setting("xla_gpu_enable_triton_gemm", False, "", ("Ada",)))
    )
    assert compiler_options(jax.devices()) == {KNOWN.name: 7}


def test_a_traced_program_of_a_gpu_has_no_command_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    option = "xla_gpu_enable_command_buffer"
    gpu: Any = SimpleNamespace(platform="gpu")
    monkeypatch.setattr(compiler, "_known", lambda device, options: options)
    assert traced_options([gpu]) == {option: ""}
    assert traced_options(jax.devices()) == {}
    monkeypatch.setenv("XLA_FLAGS", f"--{option}=FUSION")
    assert traced_options([gpu]) == {}
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setattr(compiler, "_known", lambda device, options: ())
    assert traced_options([gpu]) == {}


@pytest.mark.parametrize("in_a_file", [False, True])
def test_settings_in_xla_flags_are_left_to_the_user(
    in_a_file: bool, on_hopper: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flags = f"--xla_gpu_autotune_level=0 --{KNOWN.name}=3"
    (tmp_path / "flags").write_text(flags.replace(" ", "\n"))
    on_hopper.setattr(compiler, "SETTINGS", (KNOWN,))
    on_hopper.setenv("XLA_FLAGS", str(tmp_path / "flags") if in_a_file else flags)
    assert compiler_options(jax.devices()) == {}
    on_hopper.setenv("XLA_FLAGS", str(tmp_path / "absent"))
    assert compiler_options(jax.devices()) == {KNOWN.name: 7}
