import jax

from consyn_jax.distributed.auto_mesh import Machine
from consyn_jax.resolve import preset_architecture, resolve
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


def test_this_machine_is_one_host_with_all_its_devices() -> None:
    here = this_machine()
    assert (here.hosts, here.per_host) == (1, jax.device_count())
    assert here.memory_bytes > 2**28
