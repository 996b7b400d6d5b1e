"""Kernels of this package for the GPUs that people have: which run, and that none spills."""

import importlib.util
import math
import os
import re
import subprocess
from pathlib import Path
from unittest import mock

import pytest
from analyses import RESOURCES, array_shapes
from recipes import IS_NEWEST, ONE_LAYER, STANZA, STEPS, VERSE, dumped, dumping, recipe, run_apart

from consyn_jax.distributed.auto_mesh import FITS
from consyn_jax.planning.plan import estimate
from consyn_jax.planning.topology import parse_topology

pytestmark = pytest.mark.usefixtures("cuda_packages")

# Executions in a step of one layer, but for the chunks of the loss.
OURS = {
    "document_attention_forward": 1,
    "document_attention_queries": 1,
    "document_attention_keys": 1,
    "branched_norm_forward": 1,
    "added_norm_forward": 1,
    "branched_norm_backward": 2,
    "norm_rope_forward": 2,
    "norm_rope_backward": 2,
    "softmax_gradient": None,
}
IN_FP8 = {
    "eight_bit_norm": 1,
    "added_eight_bit_norm": 1,
    "eight_bit_swiglu_forward": 1,
    "eight_bit_swiglu_backward": 1,
    "eight_bit_norm_backward": 2,
    "eight_bit_norm_rope_backward": 2,
}
# Bytes that kernels spill all the same, with JAX 0.10 and with 0.12: those for heads of 128, whose
# tiles are the fastest on an H200.
FORWARD, KEYS = "document_attention_forward", "document_attention_keys"
SPILLED = {
    (STANZA, "h200", FORWARD): (68, 4),
    (STANZA, "b200", FORWARD): (352, 340),
    (STANZA, "b200", KEYS): (80, 80),
    (STANZA, "a100", FORWARD): (372, 320),
    (STANZA, "a100", KEYS): (28, 28),
    **{(STANZA, gpu, FORWARD): (432, 416) for gpu in ("rtx4090", "rtx3090", "l40s")},
    **{(STANZA, gpu, KEYS): (12, 12) for gpu in ("rtx4090", "rtx3090", "l40s")},
}
# The same in fp8, where these kernels also write 8 bits.
SPILLED_IN_FP8 = {
    ("h200", FORWARD): (52, 0),
    ("b200", FORWARD): (348, 328),
    ("b200", KEYS): (56, 56),
    **{(gpu, FORWARD): (424, 964) for gpu in ("rtx4090", "l40s")},
    **{(gpu, KEYS): (8, 0) for gpu in ("rtx4090", "l40s")},
}


def ptxas() -> Path:
    """The assembler of the CUDA packages."""
    found = importlib.util.find_spec("nvidia")
    assert found is not None
    [path] = (
        p
        for place in found.submodule_search_locations or ()
        for p in Path(place).glob("*/bin/ptxas")
    )
    return path


def resources(ptx: str, tmp_path: Path) -> tuple[int, int, int]:
    """Bytes of the stack frame, bytes that are spilled, and registers of a kernel."""
    (tmp_path / "kernel.ptx").write_text(ptx)
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None
    command = [ptxas(), "-v", f"-arch={target[1]}", "kernel.ptx", "-o", "kernel.cubin"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    found = RESOURCES.search(done.stderr)
    assert found is not None, done.stderr
    stack, spilled, registers = map(int, found.groups())
    return stack, spilled, registers


@pytest.mark.parametrize(("name", "gpu"), STEPS)
def test_the_step_runs_this_packages_kernels_and_none_spills(
    name: str, gpu: str, tmp_path: Path
) -> None:
    program, _, ptx = dumped(name, gpu)
    assert program.attention.startswith("fused: ")
    for kernel, times in OURS.items():
        assert program.kernels[kernel] == (times or program.kernels[kernel]), kernel
        stack, spilled, registers = resources(ptx[kernel], tmp_path)
        most = SPILLED.get((name, gpu, kernel), (0, 0))[IS_NEWEST]
        assert spilled <= most, (kernel, spilled)
        assert stack <= 2 * most, (kernel, stack)
        assert registers <= 255
    check_softmax(ptx["softmax_gradient"], recipe(name, {})[0].padded_vocab_size, 4)


def check_softmax(ptx: str, words: int, logit_bytes: int) -> None:
    """It reads every logit once, computes one exponential for each, and has no atomics.

    All is one straight piece of code, so what a thread executes can be counted in the text.
    """
    code = ptx.partition(".entry softmax_gradient(")[2]
    threads = int(re.findall(r"\.(?:reqntid|maxntid) (\d+)", code)[0])
    assert not re.search(r"\bbra\b", code)
    assert len(re.findall(r"\bex2\.approx", code)) * threads == words
    assert 16 * len(re.findall(r"ld\.global\.v4\.b32", code)) * threads == words * logit_bytes
    assert not re.search(r"\b(atom|red)\.", code)


@pytest.mark.parametrize(("name", "gpu"), STEPS)
def test_the_step_needs_the_memory_that_arithmetic_says(name: str, gpu: str) -> None:
    needed = dumped(name, gpu).program.total_bytes
    topology = parse_topology(f"{gpu}:1x1")
    assert needed <= FITS * topology.device.memory_bytes
    plan = estimate(*recipe(name, ONE_LAYER), topology)
    assert plan.work.memory.total == pytest.approx(needed, rel=0.1)


def test_logits_in_bf16_are_overwritten_by_their_gradients(tmp_path: Path) -> None:
    """There are no float32 logits and no copy, and 2 bytes a logit in memory instead of 6.

    The kernel reads the label's logit before its threads first wait for each other, and stores
    gradients only after that. It never reads logits through the cache for constants.
    """
    (wide, _, _), (narrow, program, ptx) = (
        dumped(VERSE, "h200", logits=dtype) for dtype in ("float32", "bfloat16")
    )
    words = recipe(VERSE, {})[0].padded_vocab_size
    shapes = array_shapes(program)
    chunk = (4 * 2048, words)
    assert chunk in shapes["bf16"]
    assert chunk not in shapes["f32"]
    saved = wide.temporary_bytes - narrow.temporary_bytes
    assert 0.9 < saved / (4 * math.prod(chunk)) <= 1  # less than 1 where the peak moves elsewhere
    assert narrow.kernels == wide.kernels
    code = ptx["softmax_gradient"].partition(".entry softmax_gradient(")[2]
    alone, _, rest = code.partition("bar.sync")
    assert "ld.global.b16" in alone
    assert "st.global" not in alone
    assert "st.global.v4.b32" in rest
    assert "ld.global.nc" not in code
    check_softmax(ptx["softmax_gradient"], words, 2)
    stack, spilled, _ = resources(ptx["softmax_gradient"], tmp_path)
    assert (stack, spilled) == (0, 0)


SOFTMAX = """
import json
import jax, jax.numpy as jnp
from consyn_jax.distributed.mesh import AXES, build_mesh, sharding
from consyn_jax.model.kernels.softmax_gradient import softmax_gradient
from consyn_jax.planning.topology import parse_topology

def compile(gpu, words, vocab_size, logits, gradient, extras):
    mesh = build_mesh(dict.fromkeys(AXES, 1), parse_topology(gpu + ":1x1").described_devices())
    shapes = ((64, words), logits), ((64,), "int32"), ((64,), "float32")
    given = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, (None,) * len(shape)))
        for shape, dtype in shapes
    ]
    def kernel(*arrays):
        return softmax_gradient(*arrays, vocab_size, *extras, jnp.dtype(gradient))
    with jax.set_mesh(mesh):
        jax.jit(kernel, donate_argnums=0 if logits == gradient else ()).lower(*given).compile()

compile(*{arguments})
"""


@pytest.mark.parametrize(
    ("words", "vocab_size", "logits", "gradient", "extras"),
    [
        (131_072, 131_072, "float32", "bfloat16", (0.0, 0.0)),
        (131_072, 131_072, "bfloat16", "bfloat16", (0.0, 0.0)),
        (50_304, 50_257, "float32", "bfloat16", (0.1, 1e-3)),
        (49_152, 49_152, "float32", "float32", (0.0, 1e-3)),
    ],
)
@pytest.mark.parametrize(
    "gpu",
    [
        "h200",
        *(
            pytest.param(gpu, marks=[pytest.mark.slow, pytest.mark.exhaustive])
            for gpu in ("b200", "a100", "rtx4090")
        ),
    ],
)
def test_the_softmax_of_other_sizes_does_not_spill(
    gpu: str,
    words: int,
    vocab_size: int,
    logits: str,
    gradient: str,
    extras: tuple[float, float],
    tmp_path: Path,
) -> None:
    arguments = repr((gpu, words, vocab_size, logits, gradient, extras))
    with mock.patch.dict(os.environ, XLA_FLAGS=dumping(tmp_path / "dump")):
        run_apart(SOFTMAX.replace("{arguments}", arguments))
    [ptx] = (
        text
        for path in tmp_path.glob("dump/*.ptx")
        if ".entry softmax_gradient(" in (text := path.read_text())
    )
    stack, spilled, registers = resources(ptx, tmp_path)
    assert (stack, spilled) == (0, 0)
    assert registers <= 128


@pytest.mark.parametrize(
    "gpu",
    [
        "h200",
        *(
            pytest.param(gpu, marks=[pytest.mark.slow, pytest.mark.exhaustive])
            for gpu in ("b200", "rtx4090", "l40s")
        ),
    ],
)
def test_the_kernels_of_fp8_write_both_layouts_without_spilling(gpu: str, tmp_path: Path) -> None:
    """They store 16 bytes at once, in the transposed layout, too; that of rotation, 8 bytes.

    Attention for heads of 128 spills as without 8 bits, or less, but on Ada with JAX 0.12.
    """
    program, _, ptx = dumped(STANZA, gpu, "fp8")
    for kernel, times in (IN_FP8 | {FORWARD: 1, KEYS: 1}).items():
        assert program.kernels[kernel] == times, kernel
        most = SPILLED_IN_FP8.get((gpu, kernel), (0, 0))[IS_NEWEST]
        stack, spilled, registers = resources(ptx[kernel], tmp_path)
        assert spilled <= most, (kernel, spilled)
        assert stack <= 2 * most, (kernel, stack)
        assert registers <= 255
        code = ptx[kernel].partition(f".entry {kernel}(")[2]
        stores = re.findall(r"st\.global\.(\S+)", code)
        of_arrays = "v2.b32" if "rope" in kernel else "v4.b32"
        assert set(stores) == {of_arrays, "b32"}  # arrays, and numbers of rows or programs
