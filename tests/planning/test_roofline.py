"""The roofline against numbers that can be worked out by hand, and against runs that others have published."""

from dataclasses import replace
from pathlib import Path

import pytest
from published import RUNS, Published, table

from consyn_jax.config import architecture
from consyn_jax.model.arithmetic import matmul_parameters, num_parameters
from consyn_jax.model.parameters import layout
from consyn_jax.planning.roofline import HOP_SECONDS, LINK_EFFICIENCY, Workload, estimate_step, ring_seconds, stretch_of, workload
from consyn_jax.planning.topology import GPUS, Topology, parse_topology
from consyn_jax.resolve import preset_architecture, resolve

DOCS = Path(__file__).parents[2] / "docs"
ONE = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}


def stanza(**changes: int) -> Workload:
    return Workload(preset_architecture("stanza"), ONE | changes, 64, 1, 4096)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_published_runs_are_estimated_within_a_quarter(run: Published) -> None:
    assert run.tokens_per_s / run.estimate() == pytest.approx(1, abs=0.25)


def test_the_table_in_the_docs_is_what_the_code_gives() -> None:
    assert table() in (DOCS / "planning.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["haiku", "verse", "stanza", "epic"])
def test_parameters_are_counted_as_the_model_has_them(name: str) -> None:
    assert num_parameters(preset_architecture(name)) == layout(preset_architecture(name)).num_parameters


def test_a_ring_in_one_host_goes_over_its_links() -> None:
    h200 = GPUS["h200"]
    expected = 7 / 8 * 1e9 / (h200.link_bandwidth * LINK_EFFICIENCY) + 7 * HOP_SECONDS[0]
    assert ring_seconds(1e9, ("fsdp",), ONE | {"fsdp": 8}, parse_topology("h200:1x8")) == pytest.approx(expected)


def test_a_ring_over_hosts_shares_their_ports() -> None:
    """All eight GPUs of a host in one ring have all eight ports; a ring with one GPU a host has one."""
    hosts, h200 = parse_topology("h200:8x8"), GPUS["h200"]
    wide = ring_seconds(1e12, ("fsdp",), ONE | {"fsdp": 64}, hosts)
    assert wide == pytest.approx(63 / 64 * 1e12 / (8 * h200.network_bandwidth * LINK_EFFICIENCY), rel=1e-3)
    narrow = ring_seconds(1e12, ("data",), ONE | {"data": 8, "fsdp": 8}, hosts)
    assert narrow == pytest.approx(7 / 8 * 1e12 / (h200.network_bandwidth * LINK_EFFICIENCY), rel=1e-3)


def test_work_split_over_gpus_takes_its_share_of_the_time_and_the_network_what_is_not_hidden() -> None:
    alone = estimate_step(stanza(), Topology(GPUS["h200"], 1, 1))
    shared = estimate_step(stanza(fsdp=8), Topology(GPUS["h200"], 1, 8))
    assert alone.exposed == 0
    longer = stretch_of(stanza(), Topology(GPUS["h200"], 1, 8)) / stretch_of(stanza(), Topology(GPUS["h200"], 1, 1))
    assert longer > 1, "several GPUs of this package have not been measured"
    assert 8 * shared.products == pytest.approx(longer * alone.products)
    assert 8 * (shared.total - shared.exposed - shared.optimizer) == pytest.approx(longer * (alone.total - alone.optimizer))
    assert 0 < shared.exposed < shared.network["fsdp",]


@pytest.mark.parametrize(
    ("model", "layers", "width", "batch_size", "measured_s"),
    [("verse", 12, 2048, 32, 0.1294), ("stanza", 24, 4096, 4, 0.2816), ("epic", 4, 4096, 4, 0.2781)],
)
def test_steps_measured_on_one_h200_take_what_was_estimated(model: str, layers: int, width: int, batch_size: int, measured_s: float) -> None:
    """benchmarks/results/h200-2026-11-27.json"""
    run, _ = resolve({"model": model, "num_layers": layers, "batch_size": batch_size, "max_tokens": width, "mixed_precision": "bf16"})
    work = workload(architecture(run.model, vocab_size=49_152), run, ONE)
    assert estimate_step(work, Topology(GPUS["h200"], 1, 1)).total == pytest.approx(measured_s, rel=0.1)


@pytest.mark.parametrize("remat", ["none", "minimal", "attention", "full"])
def test_what_is_recomputed_is_every_product_of_a_block_but_its_last(remat: str) -> None:
    """As the compiled programs have it (tests/planning/test_aot.py): nothing in the backward pass asks for what the block adds up to."""
    work, topology = replace(stanza(), remat=remat), Topology(GPUS["h200"], 1, 1)
    c, tokens = work.model, 64 * 4096
    block = (matmul_parameters(c) - c.vocab_size * c.hidden_dim) // c.num_layers
    again = block - c.mlp_dim * c.hidden_dim if remat in ("attention", "full") else 0
    expected = 2 * tokens * (c.num_layers * (3 * block + again) + 3 * c.padded_vocab_size * c.hidden_dim) / GPUS["h200"].matmul_flops
    assert estimate_step(work, topology).products == pytest.approx(stretch_of(work, topology) * expected)


def test_fp8_halves_the_products_of_the_blocks_and_pays_for_the_digits() -> None:
    eight = Topology(GPUS["h200"], 1, 8)
    bf16, fp8 = (estimate_step(replace(stanza(fsdp=8), fp8=fp8), eight) for fp8 in (False, True))
    assert 1.6 < bf16.products / fp8.products < 2
    assert fp8.memory > bf16.memory
    assert fp8.network["fsdp",] < bf16.network["fsdp",]
    assert 1.15 < bf16.total / fp8.total < 1.6


def test_a_run_says_what_its_work_is() -> None:
    run, _ = resolve({"model": "stanza", "batch_size": 16, "gradient_accumulation_steps": 4, "moment_dtype": "bfloat16"})
    work = workload(preset_architecture("stanza"), run, ONE)
    assert (work.tokens, work.moment_bytes, work.remat, work.fp8) == (16 * 4 * 4096, 4, "none", False)
    assert workload(preset_architecture("stanza"), resolve({"mixed_precision": "fp8"})[0], ONE).fp8
    assert work.flops == pytest.approx(work.tokens * (6 * 1.233e9 + 6 * 24 * 4096 * 2048), rel=1e-3)
