"""Muon's iteration in steps compiled for GPUs that are not here."""

from typing import Any

import pytest
from analyses import unordered
from recipes import VERSE, compiled_instructions, dumped

from consyn_jax.distributed.compiled import Instruction, collectives_of
from consyn_jax.training.optim.muon import ITERATIONS

pytestmark = pytest.mark.usefixtures("cuda_packages")

CHANGES: dict[str, Any] = {
    "optimizer": "muon",
    "num_layers": 2,
    "batch_size": 8,
    "gradient_accumulation_steps": 1,
}
WIDTH, MLP = 768, 2048


def step(topology: str) -> list[Instruction]:
    """One layer for one GPU, whose kernels `test_exactness` reads, and two for more."""
    if topology == "h200:1x1":
        return dumped(VERSE, "h200", optimizer="muon").instructions
    return compiled_instructions(VERSE, topology, CHANGES)


def of_optimizer(topology: str) -> list[Instruction]:
    return [each for each in step(topology) if "/optimizer/" in each.rest]


@pytest.mark.parametrize("topology", ["h200:1x1", "h200:1x8"])
def test_its_products_are_in_bfloat16_and_shared_by_matrices_of_a_shape(topology: str) -> None:
    """Seven matrices a layer have two shapes, of [768, 768] and [768, 2048]."""
    products = [each for each in of_optimizer(topology) if each.operation == "dot"]
    assert len(products) == 2 * 3 * ITERATIONS
    arrays = {each.name: each.arrays for each in step(topology)}
    for product in products:
        assert {arrays[name][0][0] for name in product.operands[:2]} == {"bf16"}
        assert set(product.arrays[0][1][-2:]) <= {WIDTH, MLP}


def test_each_device_has_its_share_of_the_matrices() -> None:
    """They are exchanged once in each direction, in bfloat16, and not at each product."""
    here = of_optimizer("h200:1x8")
    moved = [one for each in here for one in collectives_of(each)]
    large = [one for one in moved if one.payload_bytes > 1e6]
    assert {one.kind for one in large} == {"all-to-all"}
    assert {one.dtype for one in large} == {"bf16"}
    # Eight matrices of one shape, and six padded to eight of the other, there and back. The start of
    # an exchange lists its operands, too.
    own_bytes = 2 * (WIDTH * WIDTH + WIDTH * MLP)
    assert sum(one.payload_bytes for one in large) <= 1.2 * 2 * 2 * own_bytes


def test_its_step_on_eight_devices_scatters_in_order() -> None:
    assert unordered(step("h200:1x8")) == []
