"""Rematerialisation policies and depth, in small versions of epic compiled for one H200."""

import json
import math
import re
import subprocess
import sys
from dataclasses import asdict
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from analyses import array_shapes
from recipes import IS_NEWEST, attention_calls, recipe

from consyn_jax.distributed.compiled import Instruction, instructions, kernels
from consyn_jax.flags import flat
from consyn_jax.model.parameters import layout
from consyn_jax.model_config import ModelConfig
from consyn_jax.planning import aot

pytestmark = pytest.mark.usefixtures("cuda_packages")

# At this length no activation has as many elements as the weights that a test looks for.
ALL = {"num_layers": 4, "batch_size": 2, "max_tokens": 3584, "gradient_accumulation_steps": 1}
POLICIES = ("none", "minimal", "attention", "full", "offload")
FULL = {"gradient_checkpointing": "full"}
# The blocks of all policies are in a loop: up to 24 layers those of "none" are unrolled.
DEEP = {policy: {"gradient_checkpointing": policy, "num_layers": 28} for policy in POLICIES}
VERSIONS: dict[str, dict[str, Any]] = {
    "none, 4 layers": {"gradient_checkpointing": "none"},
    "full, 4 layers": FULL,
    "full, 48 layers": FULL | {"num_layers": 48},
    "full, 4 layers, two micro-batches": FULL | {"gradient_accumulation_steps": 2},
    **DEEP,
}

COMPILE = """
import json, sys, time
from consyn_jax.model_config import ModelConfig
from consyn_jax.planning import aot
from consyn_jax.planning.topology import parse_topology
from consyn_jax.resolve import resolve

for model, values in json.load(sys.stdin):
    run, _ = resolve(values)
    built = aot.build(ModelConfig(**model), run, parse_topology("h200:1x1"))
    lowered = aot.lower(built, run)
    began = time.process_time()
    compiled = lowered.compile()
    seconds, temporary = time.process_time() - began, compiled.memory_analysis().temp_size_in_bytes
    print(json.dumps({"seconds": seconds, "temporary": temporary, "text": compiled.as_text()}))
"""


@cache
def versions() -> dict[str, dict[str, Any]]:
    """Processor time, temporary bytes and text of each of `VERSIONS`, compiled in one process."""
    recipes = (recipe("epic-64xh200", ALL | changes) for changes in VERSIONS.values())
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        input=json.dumps([(asdict(model), flat(run)) for model, run in recipes]),
        env=aot.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(zip(VERSIONS, map(json.loads, done.stdout.splitlines()), strict=True))


@cache
def program(version: str) -> list[Instruction]:
    return instructions(versions()[version]["text"])


def model_of(version: str) -> ModelConfig:
    return recipe("epic-64xh200", ALL | VERSIONS[version])[0]


# Bytes per token and layer that each policy saves of those that the one before holds. The last two
# each save one array of the model's width, which has 10,240 bytes. With JAX 0.12 recomputing all of
# a layer needs more at once, 300 MB in total.
SAVED = (70_000, 85_000, 8_500, 10_240) if IS_NEWEST else (70_000, 85_000, 10_240, 10_240)


def test_each_policy_holds_less_than_the_one_before() -> None:
    tokens = 28 * ALL["batch_size"] * ALL["max_tokens"]
    held = [versions()[policy]["temporary"] / tokens for policy in POLICIES]
    saved = [more - less for more, less in pairwise(held)]
    assert all(found >= expected for found, expected in zip(saved, SAVED, strict=True)), saved


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "none"])
def test_there_is_no_second_copy_of_all_weights(policy: str) -> None:
    """Weights are cast one layer at a time, and the casts are not kept for the backward pass.

    Unrolled layers, which recompute nothing, are cast all at once.
    """
    model = model_of(policy)
    D, L = model.hidden_dim, model.num_layers
    weights = {
        L * D * model.mlp_dim,
        L * D * model.num_heads * model.head_dim,
        L * D * model.num_kv_heads * model.head_dim,
    }
    shapes = array_shapes(program(policy))["bf16"]
    assert not [shape for shape in shapes if math.prod(shape) in weights]


@pytest.mark.parametrize("version", ["none, 4 layers", *POLICIES])
def test_attention_runs_once_per_layer_and_again_only_with_full_recomputation(version: str) -> None:
    """The other policies keep its output and the sums of its softmax."""
    layers = model_of(version).num_layers
    forward = 2 * layers if version == "full" else layers
    assert attention_calls(kernels(program(version))) == (forward, layers, layers)


def test_micro_batches_are_added_up_without_another_copy_of_the_gradients() -> None:
    """A second copy would be that of four layers.

    With JAX 0.12 the gradients of one layer are added up only at the end of its backward pass.
    """
    model = model_of("full, 4 layers")
    embeddings = 2 * model.padded_vocab_size * model.hidden_dim * 4
    parameters = layout(model).num_parameters * 4
    layer = (parameters - embeddings) / model.num_layers if IS_NEWEST else 0
    one, two = (
        versions()[version]["temporary"]
        for version in ("full, 4 layers", "full, 4 layers, two micro-batches")
    )
    assert two <= one + 1.05 * embeddings + layer


@pytest.mark.parametrize("version", ["none, 4 layers", "full, 4 layers"])
def test_a_step_never_calls_the_host(version: str) -> None:
    operations = {each.operation for each in program(version)} | kernels(program(version)).keys()
    assert "fusion" in operations
    host = re.compile(r"infeed|outfeed|^send|^recv|callback|host", re.IGNORECASE)
    assert not list(filter(host.search, operations))


def test_48_layers_compile_like_4() -> None:
    """In processor time, and in the length of the compiled program."""
    deep, shallow = versions()["full, 48 layers"], versions()["full, 4 layers"]
    assert deep["seconds"] <= 1.3 * shallow["seconds"]
    assert len(deep["text"]) <= 1.3 * len(shallow["text"])
