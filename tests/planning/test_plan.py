"""Plans by arithmetic: the page, what would fit, and whether `--mesh auto` is near the best mesh."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from consyn_jax.cli.plan import _vocabulary
from consyn_jax.cli.train import main
from consyn_jax.config import OPTIMIZERS, RunConfig, UserError, architecture, flags, with_flags
from consyn_jax.data.store import TokenStoreWriter
from consyn_jax.distributed.auto_mesh import FITS, Machine
from consyn_jax.distributed.mesh import AXES, check_batch, check_model
from consyn_jax.model.arithmetic import LOGITS_AT_ONCE, chunk_tokens, logits_at_once
from consyn_jax.model.parameters import layout
from consyn_jax.planning import aot
from consyn_jax.planning.compiled import Collective
from consyn_jax.planning.page import page
from consyn_jax.planning.plan import Plan, alternatives, estimate, fit
from consyn_jax.planning.roofline import all_reduce_seconds, estimate_step, network_of, ring_seconds, workload
from consyn_jax.planning.topology import parse_topology
from consyn_jax.resolve import preset_architecture, resolve
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training.optimizer import configured_optimizer, moment_bytes
from consyn_jax.training.program import mesh_of, this_machine


def planned(model: str, topology: str, **changes: Any) -> Plan:
    run, _ = resolve({"model": model, **changes})
    return estimate(architecture(run.model, vocab_size=49_152), run, parse_topology(topology))


def meshes(devices: int) -> Iterator[dict[str, int]]:
    """Every factorization over the four axes."""
    divisors = [d for d in range(1, devices + 1) if devices % d == 0]
    for data in divisors:
        for fsdp in (d for d in divisors if devices // data % d == 0):
            rest = devices // data // fsdp
            yield from ({"data": data, "fsdp": fsdp, "context": c, "tensor": rest // c} for c in divisors if rest % c == 0)


# model, topology, sequences of a micro-batch on each GPU, flags
PAIRS = [
    ("verse", "rtx4090:1x1", 4, {}),
    ("verse", "rtx4090:1x4", 4, {}),
    ("verse", "h200:1x8", 16, {}),
    ("verse", "a100:2x8", 16, {}),
    ("verse", "h200:8x8", 16, {}),
    ("verse", "h200:64x8", 8, {}),
    ("verse", "h200:128x8", 4, {}),
    ("stanza", "h200:1x1", 4, {}),
    ("stanza", "rtx4090:1x8", 1, {"gradient_checkpointing": "full"}),
    ("stanza", "b200:1x8", 4, {}),
    ("stanza", "a100:4x8", 2, {"gradient_accumulation_steps": 4}),
    ("stanza", "h200:8x8", 4, {}),
    ("stanza", "h200:64x8", 2, {}),
    ("stanza", "h200:128x8", 2, {}),
    ("epic", "h200:1x8", 2, {"gradient_checkpointing": "full"}),
    ("epic", "b200:2x8", 2, {"gradient_checkpointing": "attention"}),
    ("epic", "h100:4x8", 1, {"gradient_checkpointing": "full"}),
    ("epic", "a100:16x8", 1, {"gradient_checkpointing": "full"}),
    ("epic", "h200:8x8", 2, {"gradient_checkpointing": "attention"}),
    ("epic", "h200:64x8", 2, {"gradient_checkpointing": "full"}),
    ("epic", "h200:128x8", 1, {"gradient_checkpointing": "full"}),
    # fewer sequences than GPUs; docs/planning.md has three more, which are beyond
    ("verse", "h200:1x8", 0.5, {}),
    ("epic", "h200:1x8", 0.5, {"gradient_checkpointing": "full"}),
    ("epic", "h200:1x8", 0.5, {"gradient_checkpointing": "full", "max_tokens": 32_768, "context": 32_768}),
    ("epic", "h200:8x8", 0.25, {"gradient_checkpointing": "full", "max_tokens": 32_768, "context": 32_768}),
]


@pytest.mark.parametrize(("model", "topology", "each", "changes"), PAIRS)
def test_the_mesh_that_is_chosen_is_within_a_twentieth_of_the_best(model: str, topology: str, each: float, changes: dict[str, Any]) -> None:
    """Of all meshes that the model and the batch allow and that fit, by the estimator."""
    devices = parse_topology(topology).num_devices
    plan = planned(model, topology, batch_size=int(each * devices), **changes)
    dimensions = {name: getattr(plan.model, name) for name in ("hidden_dim", "num_heads", "num_kv_heads", "mlp_dim")}

    def seconds(sizes: dict[str, int]) -> float:
        try:
            check_model(sizes, dimensions)
            check_batch(sizes, int(each * devices), plan.work.length)
        except UserError:
            return math.inf
        work = workload(plan.model, plan.run, sizes)
        fits = work.memory.total <= FITS * plan.topology.gpu.memory_bytes
        return estimate_step(work, plan.topology).total if fits else math.inf

    assert plan.fits
    assert plan.time.total <= 1.05 * min(map(seconds, meshes(devices)))


def test_the_page_says_what_a_plan_is() -> None:
    text = page(planned("stanza", "h200:2x8", batch_size=64, gradient_accumulation_steps=2, total_tokens=26e9))
    assert "pip install 'consyn_jax[cuda13]'" in text
    for line in (
        "stanza: 1,333,895,168 parameters, 24 layers",
        "2 x 8 NVIDIA H200",
        "data=2, fsdp=8 (weights split inside each of 2 hosts, and copied over them)",
        "524,288 tokens: 64 sequences of 4,096, 2 micro-batches; recomputed: none",
        "% of its peak",
        "49,592 steps, 26.00 billion tokens: ",
        "16.01 GB on disk, 48.0 GB for the 3 that are kept",
    ):
        assert line in text
    assert "; fits (at most 90% may be planned)" in text
    assert "what would fit" not in text


def test_days_and_gpu_hours_are_those_of_the_estimated_step() -> None:
    plan = planned("verse", "h200:1x4", max_steps=1000)
    days = 1000 * plan.time.total / 86_400
    assert f"{days:,.2f} days, {days * 24 * 4:,.0f} GPU-hours" in page(plan)
    assert "epochs of data that is not read here" in page(planned("verse", "h200:1x4"))


def test_what_does_not_fit_is_told_what_would() -> None:
    """On a 24 GB card stanza wants its state split, and smaller micro-batches or recomputation: all with the same result."""
    plan = planned("stanza", "rtx4090:1x8", batch_size=64)
    text = page(plan)
    assert "DOES NOT FIT" in text
    told = text[text.index("what would fit") :].splitlines()[1:]
    assert [line.partition(": ")[2] for line in told] == [
        "--gradient_checkpointing attention",
        "--batch_size 16 --gradient_accumulation_steps 4",
    ]
    assert "nothing on these GPUs" in page(planned("epic", "rtx4090:1x1"))


def test_alternatives_come_in_order_of_cost_and_keep_the_step() -> None:
    plan = planned("stanza", "rtx4090:1x8", batch_size=64)
    found = alternatives(plan)
    assert [way.cost for way in found] == sorted(way.cost for way in found)
    assert {way.plan.work.tokens for way in found} == {plan.work.tokens}
    assert all(way.plan.fits for way in found)
    other_results = ["moment_dtype" in way.changes for way in found]
    assert other_results == sorted(other_results)
    assert any(other_results)


def test_fit_takes_the_fastest_that_fits_where_the_run_fits_already() -> None:
    """Larger micro-batches gather the weights less often."""
    plan = planned("stanza", "h200:1x8", batch_size=8, gradient_accumulation_steps=8, gradient_checkpointing="full")
    best = fit(plan, "h200:1x8", compile=False)
    assert plan.fits
    assert best.changes["gradient_checkpointing"] == "none"
    assert best.plan.time.total < 0.85 * plan.time.total
    with pytest.raises(UserError, match=r"No micro-batch, .* fit rtx4090:1x1"):
        fit(planned("epic", "rtx4090:1x1"), "rtx4090:1x1", compile=False)


def test_exchanges_of_a_compiled_step_take_the_time_of_their_kind_and_axes() -> None:
    topology, sizes = parse_topology("h200:2x8"), dict(zip(AXES, (2, 8, 1, 1), strict=True))
    exchanged = [
        Collective("all-gather", "bf16", ("fsdp",), 2, 2 * 10**9),
        Collective("all-reduce", "f32", ("data",), 1, 10**9),
        Collective("all-reduce", "f32", (), 1, 10**3),
    ]
    found = network_of(exchanged, sizes, topology)
    assert found["fsdp",] == pytest.approx(2 * ring_seconds(1e9, ("fsdp",), sizes, topology))
    assert found["data",] == pytest.approx(all_reduce_seconds(1e9, ("data",), sizes, topology))
    assert found["data", "fsdp"] > 0, "axes that are not known are all"


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moments_take_the_bytes_that_the_optimizer_keeps(name: str, dtype: str) -> None:
    """Muon's are counted as if all parameters were in blocks, where nearly all of a large model's are."""
    run, _ = resolve({"model": "haiku", "optimizer": name, "moment_dtype": dtype, "lr": 1e-3})
    parameters = layout(replace(preset_architecture("haiku"), vocab_size=256, num_layers=8))
    rule = configured_optimizer(run.optimizer, lambda count: 1e-3, parameters.logical_axes)
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(rule.init, parameters.shapes)))
    assert kept / parameters.num_parameters == pytest.approx(moment_bytes(run.optimizer), abs=0.2)


@pytest.mark.parametrize(
    ("tokens", "words", "logits", "expected"), [(65_536, 49_152, 2**27, 2048), (100, 64, 2**26, 100), (1000, 64, 19_200, 250), (7, 64, 1, 1)]
)
def test_a_chunk_of_tokens_is_whole_tiles_where_that_divides_them(tokens: int, words: int, logits: int, expected: int) -> None:
    assert chunk_tokens(tokens, words, logits) == expected


def test_a_small_head_leaves_room_for_more_logits() -> None:
    assert logits_at_once(2 * 49_152 * 768) > 2**27 > logits_at_once(2 * 131_072 * 2048) > LOGITS_AT_ONCE == logits_at_once(2**31)


def test_the_command_prints_the_page_and_writes_a_recipe_that_it_reads_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(aot, "packages_are_there", lambda: False)
    recipe = tmp_path / "recipe.yaml"
    asked = ["--dry_run", "--topology", "rtx4090:1x8"]
    given = [*asked, "--model", "stanza", "--batch_size", "64", "--data", str(tmp_path / "not there"), "--output", str(tmp_path / "run")]
    assert main([*given, "--fit", str(recipe)]) == 0
    assert "DOES NOT FIT" in capsys.readouterr().out
    assert main(["--config", str(recipe), *asked]) == 0
    assert "; fits" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert main([*given, "--fit", str(recipe)]) == 2
    assert "--fit would overwrite" in capsys.readouterr().err


def test_the_vocabulary_is_that_of_a_token_store_of_ours(tmp_path: Path) -> None:
    def vocabulary(**data: Any) -> int:
        config, _ = resolve({"model": "haiku", "data": [str(tmp_path)]})
        return _vocabulary(replace(config, data=replace(config.data, **data)))

    default = vocabulary(data=())
    (tmp_path / "manifest.json").write_text('{"name": "my web page"}')
    assert vocabulary() == default == 49_152
    with TokenStoreWriter(tmp_path / "tokens", BPETokenizer.bytes()) as writer:
        writer.add("train", [1, 2], 2)
    assert vocabulary(data=(str(tmp_path / "tokens"),)) == 259


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--topology", "h200:1x8"], "--topology belongs to --dry_run"),
        (["--dry_run", "--fit"], "--fit wants the GPUs to fit"),
        (["--dry_run", "--topology", "h200:3"], "is not of the form GPU:HOSTSxGPUS"),
        (["--dry_run", "--topology", "h200:1x3"], "--batch_size 8 does not divide over 3 devices"),
        (["--dry_run", "--topology", "h200:1x8", "--mesh", "fsdp=4"], "--mesh fsdp=4 is for 4 devices, and there are 8"),
    ],
)
def test_mistakes_are_a_sentence(given: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(aot, "packages_are_there", lambda: False)
    assert main(given) == 2
    assert sentence in capsys.readouterr().err


def test_flags_change_the_run_that_they_name() -> None:
    run: RunConfig = with_flags(resolve({"model": "haiku"})[0], {"batch_size": 2, "moment_dtype": "bfloat16"})
    assert (run.budget.batch_size, run.optimizer.moment_dtype) == (2, "bfloat16")


def test_the_mesh_of_auto_batch_stays_while_the_batch_shrinks() -> None:
    """Large micro-batches would ask for another mesh, and the state lies on the mesh that was chosen first."""
    machine = Machine(16, 8, 60 * 2**30)
    meshes_of = []
    for batch, number in ((4096, 1), (2048, 2), (1024, 4)):
        run, _ = resolve({"model": "stanza", "batch_size": batch, "gradient_accumulation_steps": number, "auto_batch": True})
        meshes_of.append(mesh_of(preset_architecture("stanza"), run, machine).sizes)
    assert meshes_of == [meshes_of[0]] * 3
    run, _ = resolve({"model": "stanza", "batch_size": 4096})
    assert mesh_of(preset_architecture("stanza"), run, machine).sizes != meshes_of[0]


@pytest.mark.parametrize("policy", flags()["gradient_checkpointing"].choices)
def test_every_policy_has_its_arithmetic(policy: str) -> None:
    kept, recomputed = planned("stanza", "h200:1x8", batch_size=32), planned("stanza", "h200:1x8", batch_size=32, gradient_checkpointing=policy)
    assert recomputed.work.memory.total <= kept.work.memory.total
    assert recomputed.time.total >= kept.time.total


def test_this_machine_is_one_host_with_all_its_devices() -> None:
    here = this_machine()
    assert (here.hosts, here.per_host) == (1, jax.device_count())
    assert here.memory_bytes > 2**28
