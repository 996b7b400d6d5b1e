from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import jax
import pytest

from consyn_jax.distributed.auto_mesh import Machine, MeshChoice
from consyn_jax.distributed.mesh import AXES
from consyn_jax.resolve import preset_architecture, resolve
from consyn_jax.training import run_mesh as module
from consyn_jax.training.run_mesh import choose_run_mesh, this_machine


def sizes(**flags: object) -> dict[str, int]:
    """The mesh of a run of stanza on 16 hosts of 8 devices with 60 GiB each."""
    run, _ = resolve({"model": "stanza", **flags})
    machine, model = Machine(16, 8, 60 * 2**30), preset_architecture("stanza")
    return choose_run_mesh(
        model, run.budget, run.hardware, run.optimizer, run.length, machine
    ).sizes


def test_auto_batch_keeps_its_mesh_as_the_batch_shrinks() -> None:
    """The state is already placed when a batch turns out not to fit."""
    found = [
        sizes(batch_size=batch, gradient_accumulation_steps=number, auto_batch=True)
        for batch, number in ((4096, 1), (2048, 2), (1024, 4))
    ]
    assert found == [found[0]] * 3
    assert sizes(batch_size=4096) != found[0]


@pytest.mark.parametrize(
    ("flags", "batch", "moments"),
    [
        ({}, (4, 3), 8),
        ({"optimizer_memory": "host"}, (4, 3), 0),
        ({"moment_dtype": "bfloat16"}, (4, 3), 4),
        ({"auto_batch": True}, (6, 2), 8),
    ],
)
def test_a_mesh_is_chosen_by_the_memory_of_the_run(
    flags: dict[str, Any],
    batch: tuple[int, int],
    moments: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What decides the memory of a step, and how far its sizes can be divided."""
    estimate, choose, check = Mock(), Mock(), Mock()
    estimate.return_value.total = 5
    one = dict.fromkeys(AXES, 1)
    choose.return_value = MeshChoice(one, "")
    for name, part in (("estimate_memory", estimate), ("choose_mesh", choose)):
        monkeypatch.setattr(module, name, part)
    monkeypatch.setattr(module, "check_batch", check)
    own = {"gradient_checkpointing": "minimal", "logits_dtype": "bfloat16", "lora_rank": 4}
    own |= {"mixed_precision": "bf16"}
    own |= {"batch_size": 4, "gradient_accumulation_steps": 3, "model": "haiku", "checkpoint": "x"}
    run, machine = resolve(own | flags)[0], Machine(2, 3, 60)
    model = replace(preset_architecture("haiku"), num_heads=12, num_kv_heads=6, mlp_dim=20)
    parts = run.budget, run.hardware, run.optimizer, 512, machine, run.lora, 2
    assert choose_run_mesh(model, *parts) is choose.return_value
    given, width, needs, batch_size, splits = choose.call_args.args
    assert (given, width, batch_size) == (machine, model.hidden_dim, batch[0])
    assert splits == {"context": 512, "tensor": 2}
    assert needs(one) == 5
    asked = model, one, *batch, 512, "minimal", moments, run.lora, 60, 2
    estimate.assert_called_once_with(*asked)
    check.assert_called_once_with(one, 4, 256, 2)


def test_this_machine_is_one_host_with_all_its_devices() -> None:
    here = this_machine()
    assert (here.hosts, here.per_host) == (1, jax.device_count())
    assert here.memory_bytes > 2**28
