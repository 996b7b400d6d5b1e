"""The roofline against numbers worked out by hand, and against published runs."""

from dataclasses import replace
from pathlib import Path

import pytest
from published_runs import RUNS, Published, table

from consyn_jax.config import architecture
from consyn_jax.distributed.hardware import DESCRIBED
from consyn_jax.model.arithmetic import matmul_parameters, num_parameters
from consyn_jax.model.parameters import layout
from consyn_jax.planning.network import HOP_SECONDS, LINK_EFFICIENCY, ring_seconds
from consyn_jax.planning.roofline import OWN, estimate_step, stretch_of
from consyn_jax.planning.topology import GpuTopology, parse_topology
from consyn_jax.planning.workload import Workload, workload
from consyn_jax.resolve import preset_architecture, resolve

DOCS = Path(__file__).parents[2] / "docs"
H200 = DESCRIBED["h200"]
ONE = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}


def stanza(**changes: int) -> Workload:
    return Workload(preset_architecture("stanza"), ONE | changes, 64, 1, 4096)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_published_runs_are_estimated_within_a_quarter(run: Published) -> None:
    assert run.tokens_per_s / run.estimate() == pytest.approx(1, abs=0.25)


def test_the_table_in_the_docs_is_the_one_that_the_code_gives() -> None:
    assert table() in (DOCS / "planning.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["haiku", "verse", "stanza", "epic"])
def test_the_parameter_count_is_that_of_the_model(name: str) -> None:
    assert (
        num_parameters(preset_architecture(name))
        == layout(preset_architecture(name)).num_parameters
    )


def test_a_ring_in_one_host_uses_its_links() -> None:
    expected = 7 / 8 * 1e9 / (H200.link_bandwidth * LINK_EFFICIENCY) + 7 * HOP_SECONDS[0]
    assert ring_seconds(
        1e9, ("fsdp",), ONE | {"fsdp": 8}, parse_topology("h200:1x8")
    ) == pytest.approx(expected)


def test_a_ring_over_hosts_shares_their_ports() -> None:
    """A ring with eight GPUs per host has eight ports; a ring with one GPU per host has one."""
    hosts = parse_topology("h200:8x8")
    wide = ring_seconds(1e12, ("fsdp",), ONE | {"fsdp": 64}, hosts)
    assert wide == pytest.approx(
        63 / 64 * 1e12 / (8 * H200.network_bandwidth * LINK_EFFICIENCY), rel=1e-3
    )
    narrow = ring_seconds(1e12, ("data",), ONE | {"data": 8, "fsdp": 8}, hosts)
    assert narrow == pytest.approx(
        7 / 8 * 1e12 / (H200.network_bandwidth * LINK_EFFICIENCY), rel=1e-3
    )


def test_split_work_takes_its_share_of_the_time_and_the_network_adds_what_is_not_hidden() -> None:
    alone = estimate_step(stanza(), GpuTopology(H200, 1, 1))
    shared = estimate_step(stanza(fsdp=8), GpuTopology(H200, 1, 8))
    assert alone.exposed == 0
    longer = stretch_of(stanza(), GpuTopology(H200, 1, 8)) / stretch_of(
        stanza(), GpuTopology(H200, 1, 1)
    )
    assert longer > 1, "several GPUs of this package have not been measured"
    assert 8 * shared.matmuls == pytest.approx(longer * alone.matmuls)
    assert 8 * (shared.total - shared.exposed - shared.optimizer) == pytest.approx(
        longer * (alone.total - alone.optimizer)
    )
    assert 0 < shared.exposed < shared.network["fsdp",]


@pytest.mark.parametrize(
    ("model", "layers", "width", "batch_size", "measured_s"),
    [
        ("verse", 12, 2048, 32, 0.1294),
        ("verse", 12, 2048, 32, 0.1290),
        ("stanza", 24, 4096, 4, 0.2816),
        ("stanza", 24, 4096, 4, 0.2853),
        ("epic", 4, 4096, 4, 0.2781),
    ],
)
def test_steps_measured_on_one_h200_take_the_estimated_time(
    model: str, layers: int, width: int, batch_size: int, measured_s: float
) -> None:
    """benchmarks/results/h200-2026-11-27.json and -28.json, the latter also in a training run."""
    run, _ = resolve(
        {
            "model": model,
            "num_layers": layers,
            "batch_size": batch_size,
            "max_tokens": width,
            "mixed_precision": "bf16",
        }
    )
    work = workload(architecture(run.model, vocab_size=49_152), run, ONE)
    assert estimate_step(work, GpuTopology(H200, 1, 1)).total == pytest.approx(measured_s, rel=0.05)


def test_the_kernels_of_a_traced_step_move_the_counted_bytes() -> None:
    """Verse's trace of 2026-11-28: norms, sums, rotations, SwiGLU and softmax take 23.8 ms."""
    work = Workload(preset_architecture("verse"), ONE, 32, 1, 2048)
    one = GpuTopology(H200, 1, 1)
    kernels_ms = [0.669, 0.665, 0.935, 0.771, 1.422, 2.448, 1.965, 1.686, 2.482, 3.771, 7.016]
    estimated_ms = 1e3 * estimate_step(work, one).memory / stretch_of(work, one)
    assert estimated_ms == pytest.approx(sum(kernels_ms), rel=0.02)


@pytest.mark.parametrize("remat", ["none", "minimal", "attention", "full"])
def test_every_matmul_of_a_block_but_the_last_is_recomputed(remat: str) -> None:
    """As in the compiled programs: nothing in the backward pass needs the block's output."""
    work, topology = replace(stanza(), remat=remat), GpuTopology(H200, 1, 1)
    c, tokens = work.model, 64 * 4096
    block = (matmul_parameters(c) - c.vocab_size * c.hidden_dim) // c.num_layers
    again = block - c.mlp_dim * c.hidden_dim if remat in ("attention", "full") else 0
    expected = (
        2
        * tokens
        * (c.num_layers * (3 * block + again) + 3 * c.padded_vocab_size * c.hidden_dim)
        / (H200.matmul_flops * OWN.matmul)
    )
    assert estimate_step(work, topology).matmuls == pytest.approx(
        stretch_of(work, topology) * expected
    )


def test_fp8_halves_the_matmuls_of_the_blocks_and_pays_for_quantising() -> None:
    eight = GpuTopology(H200, 1, 8)
    bf16, fp8 = (estimate_step(replace(stanza(fsdp=8), fp8=fp8), eight) for fp8 in (False, True))
    assert 1.6 < bf16.matmuls / fp8.matmuls < 2
    assert fp8.memory > bf16.memory
    assert fp8.network["fsdp",] < bf16.network["fsdp",]
    assert 1.15 < bf16.total / fp8.total < 1.6


def test_logits_in_bf16_move_fewer_bytes() -> None:
    """The softmax reads a logit twice: 4 bytes fewer. Its product is limited by arithmetic."""
    work, one = stanza(), parse_topology("h200:1x1")
    wide, narrow = (estimate_step(replace(work, logit_bytes=n), one).memory for n in (4, 2))
    saved = 4 * work.tokens * work.model.padded_vocab_size
    assert wide - narrow == pytest.approx(
        stretch_of(work, one) * saved / (H200.memory_bandwidth * OWN.memory)
    )


def test_the_workload_of_a_run() -> None:
    run, _ = resolve(
        {
            "model": "stanza",
            "batch_size": 16,
            "gradient_accumulation_steps": 4,
            "moment_dtype": "bfloat16",
        }
    )
    work = workload(preset_architecture("stanza"), run, ONE)
    assert (work.tokens, work.moment_bytes, work.remat, work.fp8) == (
        16 * 4 * 4096,
        4,
        "none",
        False,
    )
    assert workload(preset_architecture("stanza"), resolve({"mixed_precision": "fp8"})[0], ONE).fp8
    assert work.flops == pytest.approx(work.tokens * (6 * 1.233e9 + 6 * 24 * 4096 * 2048), rel=1e-3)
