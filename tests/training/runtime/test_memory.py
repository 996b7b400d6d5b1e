import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from consyn_jax.config import RunConfig
from consyn_jax.distributed.mesh import check_batch, parse_mesh
from consyn_jax.errors import UserError
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model_config import ModelConfig
from consyn_jax.resolve import resolve
from consyn_jax.training import ConsynTrainer
from consyn_jax.training.runtime import memory
from consyn_jax.training.runtime.memory import (
    OutOfMemory,
    compile_to_fit,
    explain_out_of_memory,
    step_memory,
)

TINY = ModelConfig(
    vocab_size=256,
    hidden_dim=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=64,
    context=32,
    bos_token_id=0,
    eos_token_id=0,
)


class Compiled:
    """A program with 1000 bytes of state, most of it moments, and 100 bytes a sequence.

    The latter are halved by gradient checkpointing.
    """

    def __init__(self, run: RunConfig) -> None:
        self.temporary = (
            100
            * run.budget.batch_size
            // (2 if run.hardware.gradient_checkpointing == "full" else 1)
        )
        self.state = (
            400
            if run.hardware.optimizer_memory == "host"
            else 700
            if run.optimizer.moment_dtype == "bfloat16"
            else 1000
        )

    def memory_analysis(self) -> Any:
        class Sizes:
            argument_size_in_bytes = output_size_in_bytes = alias_size_in_bytes = self.state
            temp_size_in_bytes = self.temporary

        return Sizes()


def fitted(limit: int, monkeypatch: pytest.MonkeyPatch, **flags: Any) -> tuple[int, int]:
    monkeypatch.setattr(memory, "device_bytes", lambda: limit)
    run, _ = compile_to_fit(
        resolve({"model": "haiku", "batch_size": 12, "gradient_accumulation_steps": 2, **flags})[0],
        Compiled,
    )
    return run.budget.batch_size, run.budget.gradient_accumulation_steps


def test_a_step_that_fits_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fitted(2200, monkeypatch) == fitted(2200, monkeypatch, auto_batch=True) == (12, 2)


def test_micro_batches_are_halved_until_the_step_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fitted(2199, monkeypatch, auto_batch=True) == (6, 4)
    assert fitted(1300, monkeypatch, auto_batch=True) == (3, 8)


def test_a_step_that_does_not_fit_lists_what_each_alternative_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "_gib", str)
    with pytest.raises(UserError) as caught:
        fitted(1500, monkeypatch)
    assert str(caught.value) == (
        "The train step needs 2200 on each device (1000 of state, 1200 of activations and "
        "gradients), but a device has 1500. Instead, "
        "--batch_size 6 --gradient_accumulation_steps 4 (same result; --auto_batch finds it) "
        "needs 1600; --gradient_checkpointing (same result, slower) needs 1600; "
        "--optimizer_memory host (same result, slower) needs 1600; "
        "--moment_dtype bfloat16 needs 1900."
    )
    with pytest.raises(UserError, match="needs 1300"):
        fitted(1200, monkeypatch, auto_batch=True)


def test_a_half_that_the_mesh_does_not_divide_is_no_alternative(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def on_six_devices(run: RunConfig) -> Compiled:
        check_batch(parse_mesh("fsdp=6", 6), run.budget.batch_size, 32)
        return Compiled(run)

    monkeypatch.setattr(memory, "device_bytes", lambda: 1500)
    with pytest.raises(
        UserError, match=r"^The train step needs .* of activations.*--gradient_checkpointing"
    ) as caught:
        compile_to_fit(
            resolve({"model": "haiku", "batch_size": 6, "auto_batch": True})[0], on_six_devices
        )
    assert "--batch_size" not in str(caught.value)


def test_the_compilers_figures_match_the_arrays() -> None:
    state = jnp.zeros((256, 256))
    compiled = (
        jax.jit(lambda x, y: (x + (y @ y.T) @ y, jnp.sum(y)), donate_argnums=0)
        .lower(state, state)
        .compile()
    )
    found = step_memory(compiled)
    assert 2 * state.nbytes <= found.state <= 2 * state.nbytes + 64
    assert state.nbytes <= found.temporary <= 2 * state.nbytes + 1024


MEASURED = """
import json, re
from pathlib import Path

import jax
import numpy as np

from consyn_jax.model_config import ModelConfig
from consyn_jax.resolve import resolve
from consyn_jax.distributed.mesh import sharding
from consyn_jax.model.parameters import initial_parameters
from consyn_jax.training.runtime.memory import step_memory
from consyn_jax.training.program import TRAIN_AXES, build_program

def held(name):
    return 1024 * int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

B, T = 4, 256
config = ModelConfig(
    vocab_size=1024, hidden_dim=128, num_layers=32, num_heads=4, num_kv_heads=4, head_dim=32,
    mlp_dim=512, context=T,
)
run, _ = resolve({"model": "haiku", "max_tokens": T, "batch_size": B, "lr": 1e-3})
program = build_program(
    config, run.budget, run.hardware, run.optimizer, run.regularisation,
    length=run.length, schedule=lambda count: 1e-3, devices=jax.devices(),
).program
step = program.lower_train_step(1, B, T).compile()
before = held("VmRSS")
state = jax.block_until_ready(program.initial_state(initial_parameters(config, 1, program.mesh)))
ids = np.random.default_rng(0).integers(1, 1000, (1, B, T)).astype(np.int32)
ones = np.ones_like(ids)
batch = {"input_ids": ids, "labels": ids, "segment_ids": ones, "loss_mask": ones.astype(bool)}
where = sharding(program.mesh, TRAIN_AXES)
batch = {name: jax.device_put(values, where) for name, values in batch.items()}
for _ in range(2):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    state, _ = jax.block_until_ready(step(state, batch))
print(json.dumps([step_memory(step).total, held("VmHWM") - before]))
"""


@pytest.mark.slow
@pytest.mark.users_compiler
@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the system's account of memory is read"
)
def test_the_compilers_figure_is_what_a_process_holds() -> None:
    """State and temporaries of a step on a CPU, against the growth of resident memory to its peak.

    The model is deep and narrow, as XLA's CPU kernels take extra memory for one product at a time.
    """
    one = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED], env=one, capture_output=True, text=True, check=True
    )
    estimated, measured = json.loads(done.stdout)
    print(f"{estimated / 2**20:.1f} MiB by the compiler, {measured / 2**20:.1f} MiB measured")
    assert measured == pytest.approx(estimated, rel=0.05)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_in_half_batches_is_the_same_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = [list(map(int, np.random.default_rng(i).integers(1, 250, 33))) for i in range(32)]

    def trained(name: str, **flags: Any) -> dict[str, float]:
        model = ConsynLMHeadModel.from_config(TINY, seed=1)
        settings = {
            "max_tokens": 32,
            "batch_size": 8,
            "logging_backend": "none",
            "mesh": "data=1,fsdp=2,context=2,tensor=2",
            "quiet": True,
            **flags,
        }
        return ConsynTrainer(
            model, data, output_dir=tmp_path / name, num_epochs=None, max_steps=2, **settings
        ).train()

    whole = trained("whole")
    tries = iter([2, 0])
    monkeypatch.setattr(memory, "device_bytes", lambda: 1)
    monkeypatch.setattr(memory, "step_memory", lambda compiled: memory.Memory(0, next(tries)))
    halves = trained("halves", auto_batch=True)
    assert next(tries, None) is None
    assert halves["train/loss"] == pytest.approx(whole["train/loss"], rel=1e-6)


def test_out_of_memory_is_a_user_error_and_other_errors_stay() -> None:
    with (
        pytest.raises(
            OutOfMemory,
            match=r"A device ran out of its .* of memory \(RESOURCE_EXHAUSTED: Out of memory",
        ),
        explain_out_of_memory(),
    ):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes."
        )
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), explain_out_of_memory():
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
