"""Estimate whether a machine without a GPU can train a model, before JAX is imported."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consyn_jax.config import PRESETS, DataOptions, RunConfig, architecture
from consyn_jax.errors import UserError
from consyn_jax.flags import flat
from consyn_jax.model.arithmetic import CPU_UNROLLED_LAYERS, cpu_step_flops
from consyn_jax.model_config import ModelConfig
from consyn_jax.remote.urls import is_bucket_url
from consyn_jax.resolve import resolve
from consyn_jax.training.runtime.step_memory import cpu_step_bytes

if TYPE_CHECKING:
    from consyn_jax.cli.choices.model_choice import ModelChoice
    from consyn_jax.tokenization import BPETokenizer

CORE_FLOPS = 60e9  # per second and core in a train step; docs/design/cpu.md: 73e9 with AVX-512
ESTIMATE_SHARE = 0.9  # an estimate may be 10 % too high, and must not refuse a run that fits
# Largest share of the memory for a suggested run; malloc may keep three times a step's memory.
COMFORT_SHARE = 0.3
DAY_S, HALF_HOUR_S = 86_400, 1_800
FEWEST_STEPS = 200  # fewest steps of a suggested run
BYTES_PER_TOKEN = 4  # of text
DEFAULT_VOCABULARY = 49_152  # of the bundled tokenizer
LENGTHS = (1024, 512, 256)
GIVEN = ("flag", "the rows", "fine-tuning")  # origins of values that a suggestion keeps
DEVICES = (Path("/proc/driver/nvidia"), Path("/dev/dxg"), Path("/dev/kfd"), Path("/dev/accel0"))


@dataclass(frozen=True)
class Need:
    """Estimated memory and time of a run on a CPU.

    Attributes:
        memory: memory of a step, in bytes.
        steps: number of steps of the run; None if unknown.
    """

    memory: float
    step_s: float
    steps: float | None

    @property
    def run_s(self) -> float:
        """Duration of the run in seconds; infinite if its number of steps is unknown."""
        return self.step_s * (self.steps or float("inf"))


def check_machine(
    config: RunConfig,
    origins: Mapping[str, str],
    choice: ModelChoice,
    tokenizer: BPETokenizer | str | None,
) -> None:
    """Check that a run fits the memory of a machine without a GPU.

    If the user did not choose the model, the run must also finish within a day.

    Raises:
        UserError: the run needs too much memory or time. The message suggests flags that help, or
            a smaller model or a GPU.
    """
    is_unknown = config.data.max_tokens is None  # the rows decide it, and they are not read yet
    if is_unknown or _has_accelerator() or config.hardware.distributed:
        return
    memory = _machine_bytes()
    vocab_size = _vocab_size(config, choice, tokenizer)
    is_default = origins["model"] == "default"
    if config.hardware.gradient_checkpointing != "none" and _has_loop(config, choice):
        return
    need = _need(config, choice.base, vocab_size)
    fits = ESTIMATE_SHARE * need.memory <= memory
    if fits and not is_default:
        return
    tokens = _data_tokens(config.data)
    need = _need(config, choice.base, vocab_size, tokens)
    if fits and need.run_s <= DAY_S:
        return
    flag = "checkpoint" if origins["model"] == "checkpoint" else "model"
    if fits:
        problem = (
            f"Training --model {config.model.model} takes about {_duration(need.run_s)} on this "
            "machine, which has no GPU"
        )
    else:
        problem = (
            f"A step of --{flag} {config.model.model} with {config.budget.batch_size} x "
            f"{config.length:,} tokens needs about {_gib(need.memory)} of memory, and this machine "
            f"has {_gib(memory)} and no GPU"
        )
    about = (_given(config, origins), choice, vocab_size, memory, tokens)
    found = [] if fits else _suggestion(_batches(config, {}), *about)
    if is_default or not found:
        found = _suggestion(_smaller_models(config, choice), *about) + found
    raise UserError(f"{problem}. {_advice(found, fits, config)}")


def _given(config: RunConfig, origins: Mapping[str, str]) -> dict[str, Any]:
    """The user's settings, which a suggestion must not change, by flag name."""
    given = {
        name: value
        for name, value in flat(config).items()
        if origins[name] in GIVEN or origins[name].startswith(("file ", "search"))
    }
    if config.model.model not in PRESETS:  # its sequence length is not a default of any preset
        given["max_tokens"] = config.length
    return given


def _advice(found: list[tuple[dict[str, Any], Need]], fits: bool, config: RunConfig) -> str:
    """Write the suggestions `found` as one sentence of advice."""
    if not found:
        return "Use a smaller model, or a machine with a GPU."
    texts = [
        f"{' '.join(f'--{name} {value}' for name, value in changes.items())} (about "
        f"{_gib(need.memory)} and {_duration(need.run_s)})"
        for changes, need in found
    ]
    more = f", or give --model {config.model.model} to train this model anyway" if fits else ""
    return f"Add {' or '.join(texts)}{more}."


def _suggestion(
    candidates: Iterable[dict[str, Any]],
    given: dict[str, Any],
    choice: ModelChoice,
    vocab_size: int,
    memory: int,
    tokens: float | None,
) -> list[tuple[dict[str, Any], Need]]:
    """Find the first of `candidates` that fits the memory, and estimate its needs.

    A candidate is a set of changed flags. A run that would take more than a day is limited to about
    half an hour by `max_steps`.

    Returns:
        A list with one candidate and its needs; empty if no candidate fits.
    """
    for changes in filter(None, candidates):
        with suppress(UserError):  # the user's dimensions may not fit another preset
            need = _need(resolve(given | changes)[0], choice.base, vocab_size, tokens)
            if need.memory > COMFORT_SHARE * memory:
                continue
            if need.run_s <= DAY_S:
                return [(changes, need)]
            steps = int(HALF_HOUR_S / need.step_s) // 100 * 100
            if steps >= FEWEST_STEPS:
                limited = changes | {"max_steps": steps}
                return [(limited, dataclasses.replace(need, steps=steps))]
    return []


def _batches(config: RunConfig, changes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Candidate sequence lengths and micro-batch sizes; for each length, large batches first."""
    length = PRESETS[changes["model"]]["max_tokens"] if changes else config.length
    for max_tokens in (length, *(short for short in LENGTHS if short < length)):
        shorter = changes | ({} if max_tokens == length else {"max_tokens": max_tokens})
        batch_size = config.budget.batch_size
        accumulation = config.budget.gradient_accumulation_steps
        yield shorter
        while batch_size % 2 == 0:
            batch_size, accumulation = batch_size // 2, 2 * accumulation
            smaller = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
            yield shorter | smaller


def _smaller_models(config: RunConfig, choice: ModelChoice) -> Iterator[dict[str, Any]]:
    """Candidates with smaller presets, the largest first; none if the run loads weights."""
    names = list(PRESETS)
    if config.model.model in names and choice.weights is None:
        for name in reversed(names[: names.index(config.model.model)]):
            yield from _batches(config, {"model": name})


def _need(
    config: RunConfig, base: ModelConfig | None, vocab_size: int, tokens: float | None = None
) -> Need:
    """Estimate the memory and time of a run.

    Args:
        tokens: number of tokens in the data; None if unknown.
    """
    base = None if config.model.model in PRESETS else base
    model = architecture(config.model, base, vocab_size=vocab_size)
    budget, length = config.budget, config.row_length
    batch_size = 1 if config.hardware.auto_batch else budget.batch_size
    moments, lora = config.optimizer.moment_bytes, config.lora
    memory = cpu_step_bytes(
        model, batch_size, budget.gradient_accumulation_steps, length, moments, lora
    )
    in_step = budget.batch_size * budget.gradient_accumulation_steps * length
    limits: list[float] = [] if budget.max_steps is None else [budget.max_steps]
    if budget.total_tokens is not None:
        limits.append(budget.total_tokens / in_step)
    if budget.epochs is not None and tokens is not None:
        limits.append(max(1, budget.epochs * tokens / in_step))
    seconds = cpu_step_flops(model, in_step, length, lora) / (CORE_FLOPS * _cores())
    return Need(memory, seconds, min(limits) if limits else None)


def _has_loop(config: RunConfig, choice: ModelChoice) -> bool:
    """Whether the model has so many layers that its blocks run in a loop.

    If they do, recomputation saves memory, so the estimate of `_need` is too high.
    """
    base = None if config.model.model in PRESETS else choice.base
    return architecture(config.model, base, vocab_size=1).num_layers > CPU_UNROLLED_LAYERS


def _has_accelerator() -> bool:
    """Whether JAX will find a device other than a CPU, judged without importing JAX."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0] != "cpu"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    plugin = importlib.util.find_spec("jax_plugins") or importlib.util.find_spec("libtpu")
    return plugin is not None and any(device.exists() for device in DEVICES)


def _machine_bytes() -> int:
    """Memory in bytes of this machine, or of the container that this process runs in."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # without cgroups, or "max"
        machine = min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return machine


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _vocab_size(
    config: RunConfig, choice: ModelChoice, tokenizer: BPETokenizer | str | None
) -> int:
    if choice.stored is not None:
        return choice.stored.vocab_size
    if isinstance(tokenizer, str):  # "train:SIZE"
        return int(tokenizer.partition(":")[2])
    if tokenizer is not None:
        return tokenizer.vocab_size
    from consyn_jax.data.store.manifest import is_store, read_manifest
    from consyn_jax.remote.local_copy import local_copy

    name = config.data.data[0]
    path = local_copy(name) if is_bucket_url(name) else Path(name)
    if path.is_dir() and is_store(path):
        return int(read_manifest(path)["vocab_size"])
    return DEFAULT_VOCABULARY


def _data_tokens(data: DataOptions) -> float | None:
    """Number of tokens in the data; None if it is not downloaded yet.

    For text, the number is estimated from the size in bytes.
    """
    from consyn_jax.data.sources.discovery import find_sources
    from consyn_jax.data.store.manifest import read_manifest, totals

    tokens = 0.0
    corpus = find_sources(data.data, data.dataset_type, invalid_utf8=data.invalid_utf8)
    for source in corpus.sources:
        if source.is_store:
            manifest = read_manifest(Path(source.name))
            tokens += totals(manifest["splits"].get("train", {}).get("shards", []))["tokens"]
        elif source.num_bytes:
            tokens += source.num_bytes / (2 if source.kind == "sharded" else BYTES_PER_TOKEN)
        else:
            return None
    return tokens


def _gib(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3600)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}" if seconds < float("inf") else "weeks"
    return f"{max(1, seconds / 60):.0f} minutes"
