"""Plans by arithmetic: the page, what would fit, and how near the best `--mesh auto` is."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from consyn_jax.cli.dry_run import _vocabulary
from consyn_jax.cli.train import main
from consyn_jax.config import REMAT_POLICIES, RunConfig, architecture
from consyn_jax.data.store import TokenStoreWriter
from consyn_jax.distributed.auto_mesh import FITS
from consyn_jax.distributed.compiled import Collective
from consyn_jax.distributed.hardware import DESCRIBED
from consyn_jax.distributed.mesh import AXES, check_batch, check_model
from consyn_jax.errors import UserError
from consyn_jax.flags import with_flags
from consyn_jax.integers import divisors
from consyn_jax.model.arithmetic import LOGITS_AT_ONCE, chunk_tokens, logit_bytes, logits_at_once
from consyn_jax.model.parameters import layout
from consyn_jax.optimizer_config import OPTIMIZERS
from consyn_jax.planning import aot
from consyn_jax.planning.network import all_reduce_seconds, network_of, ring_seconds
from consyn_jax.planning.plan import Plan, adapter_that_fits, alternatives, estimate, fit
from consyn_jax.planning.plan_page import page
from consyn_jax.planning.roofline import estimate_step
from consyn_jax.planning.topology import parse_topology
from consyn_jax.planning.workload import workload
from consyn_jax.resolve import preset_architecture, resolve
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training.optim.optimizers import build_optimizer


def planned(model: str, topology: str, **changes: Any) -> Plan:
    run, _ = resolve({"model": model, **changes})
    return estimate(architecture(run.model, vocab_size=49_152), run, parse_topology(topology))


def meshes(devices: int) -> Iterator[dict[str, int]]:
    """Every factorization over the four axes."""
    for data in divisors(devices):
        for fsdp in divisors(devices // data):
            rest = devices // data // fsdp
            for context in divisors(rest):
                tensor = rest // context
                yield {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}


FULL = {"gradient_checkpointing": "full"}
LONG = FULL | {"max_tokens": 32_768, "context": 32_768}
# model, topology, sequences of a micro-batch per GPU, flags
PAIRS = [
    ("verse", "rtx4090:1x1", 4, {}),
    ("verse", "rtx4090:1x4", 4, {}),
    ("verse", "h200:1x8", 16, {}),
    ("verse", "a100:2x8", 16, {}),
    ("verse", "h200:8x8", 16, {}),
    ("verse", "h200:64x8", 8, {}),
    ("verse", "h200:128x8", 4, {}),
    ("stanza", "h200:1x1", 4, {}),
    ("stanza", "rtx4090:1x8", 1, FULL),
    ("stanza", "b200:1x8", 4, {}),
    ("stanza", "a100:4x8", 2, {"gradient_accumulation_steps": 4}),
    ("stanza", "h200:8x8", 4, {}),
    ("stanza", "h200:64x8", 2, {}),
    ("stanza", "h200:128x8", 2, {}),
    ("epic", "h200:1x8", 2, FULL),
    ("epic", "b200:2x8", 2, {"gradient_checkpointing": "attention"}),
    ("epic", "h100:4x8", 1, FULL),
    ("epic", "a100:16x8", 1, FULL),
    ("epic", "h200:8x8", 2, {"gradient_checkpointing": "attention"}),
    ("epic", "h200:64x8", 2, FULL),
    ("epic", "h200:128x8", 1, FULL),
    # Fewer sequences than GPUs; docs/planning.md has three more, which miss the limit.
    ("verse", "h200:1x8", 0.5, {}),
    ("epic", "h200:1x8", 0.5, FULL),
    ("epic", "h200:1x8", 0.5, LONG),
    ("epic", "h200:8x8", 0.25, LONG),
]


@pytest.mark.parametrize(("model", "topology", "each", "changes"), PAIRS)
def test_the_chosen_mesh_is_within_a_twentieth_of_the_best(
    model: str, topology: str, each: float, changes: dict[str, Any]
) -> None:
    """Of all meshes that fit and that model and batch allow, by the estimator."""
    devices = parse_topology(topology).num_devices
    plan = planned(model, topology, batch_size=int(each * devices), **changes)
    dimensions = {
        name: getattr(plan.model, name)
        for name in ("hidden_dim", "num_heads", "num_kv_heads", "mlp_dim")
    }

    def seconds(sizes: dict[str, int]) -> float:
        try:
            check_model(sizes, dimensions)
            check_batch(sizes, int(each * devices), plan.work.length)
        except UserError:
            return math.inf
        work = workload(plan.model, plan.run, sizes)
        fits = work.memory.total <= FITS * plan.topology.device.memory_bytes
        return estimate_step(work, plan.topology).total if fits else math.inf

    assert plan.fits
    assert plan.time.total <= 1.05 * min(map(seconds, meshes(devices)))


def test_the_page_of_a_plan() -> None:
    text = page(
        planned(
            "stanza", "h200:2x8", batch_size=64, gradient_accumulation_steps=2, total_tokens=26e9
        )
    )
    assert "pip install 'consyn_jax[cuda13]'" in text
    for line in (
        "stanza: 1,333,895,168 parameters, 24 layers",
        "2 x 8 NVIDIA H200",
        "data=2, fsdp=8 (each of 2 hosts has a copy of the weights, split over its devices)",
        "524,288 tokens: 64 sequences of 4,096, 2 micro-batches; recomputed: none",
        "% of its peak",
        "49,592 steps, 26.00 billion tokens: ",
        "16.01 GB on disk, 48.0 GB for the 3 that are kept",
    ):
        assert line in text
    assert "; fits (a plan may use at most 90%)" in text
    assert re.match(
        r"Fits \(\d+% of the memory\); [\d,]+ tokens/s; [\d.,]+ hours for 26 billion", text
    )
    assert "assumed  " not in text
    assert "what would fit" not in text


def test_the_verdict_comes_first_and_the_assumptions_when_asked() -> None:
    small = page(planned("epic", "rtx4090:1"), assumptions=True)
    assert small.startswith("DOES NOT FIT (")
    assert "assumed    bfloat16" in small
    assert small.index("what would fit") < small.index("memory of one GPU")
    assert "billion tokens a day" in page(planned("verse", "h200:1x4")).splitlines()[0]


def test_days_and_gpu_hours_are_those_of_the_estimated_step() -> None:
    plan = planned("verse", "h200:1x4", max_steps=1000)
    days = 1000 * plan.time.total / 86_400
    assert f"{days:,.2f} days, {days * 24 * 4:,.0f} GPU-hours" in page(plan)
    assert "unknown, because epochs need the data" in page(planned("verse", "h200:1x4"))


def test_the_page_shows_what_would_fit() -> None:
    """On 24 GB cards stanza needs smaller micro-batches or recomputation."""
    plan = planned("stanza", "rtx4090:1x8", batch_size=64)
    text = page(plan)
    assert "DOES NOT FIT" in text
    ways = text[text.index("what would fit") :].partition("\n\n")[0].splitlines()[1:]
    assert [line.partition(": ")[2] for line in ways] == [
        "--gradient_checkpointing attention",
        "--batch_size 16 --gradient_accumulation_steps 4",
    ]
    assert "what would fit: nothing here" in page(planned("epic", "rtx4090:1x1"))


@pytest.mark.parametrize(
    ("gpu", "given", "dtype"),
    [
        ("rtx4090:1x1", {}, "int8"),
        ("l40s:1x1", {"checkpoint": "there"}, None),
        ("l4:1x1", {"lora_rank": 8, "optimizer_memory": "host"}, "int8"),
    ],
)
def test_where_nothing_fits_an_adapter_that_would_is_named_with_its_memory(
    gpu: str, given: dict[str, Any], dtype: str | None
) -> None:
    plan = planned("epic", gpu, **given)
    found = adapter_that_fits(plan)
    assert found is not None
    assert found.changes.get("lora_base_dtype") == dtype
    assert found.changes.get("lora_rank") == (None if "lora_rank" in given else 16)
    again = planned("epic", gpu, **{**given, **found.changes})
    assert again.fits
    needs = f"{again.total_bytes / 2**30:.1f} GiB by arithmetic"
    with pytest.raises(UserError, match=rf"a smaller model, or train only an adapter: .*{needs}"):
        fit(plan, gpu, compile=False)
    (line,) = [line for line in page(plan).splitlines() if line.startswith("an adapter would fit")]
    assert needs in line
    assert line.endswith("over the weights that --checkpoint names") == ("checkpoint" not in given)


def test_no_adapter_is_named_where_none_fits_or_another_flag_rules_it_out() -> None:
    for plan in (
        planned("epic", "rtx4090:1x1", mixed_precision="fp8"),
        planned("epic", "rtx4090:1x1", max_tokens=4096, num_layers=160),
    ):
        assert adapter_that_fits(plan) is None
        assert "nothing here" in page(plan)
        assert "adapter" not in page(plan)


def test_alternatives_are_sorted_by_cost_and_keep_the_step() -> None:
    plan = planned("stanza", "rtx4090:1x8", batch_size=64)
    found = alternatives(plan)
    assert [way.cost for way in found] == sorted(way.cost for way in found)
    assert {way.plan.work.tokens for way in found} == {plan.work.tokens}
    assert all(way.plan.fits for way in found)
    other_results = ["moment_dtype" in way.changes for way in found]
    assert other_results == sorted(other_results)
    assert any(other_results)


def test_fit_takes_the_fastest_even_where_the_run_already_fits() -> None:
    """Larger micro-batches gather the weights fewer times."""
    plan = planned(
        "stanza",
        "h200:1x8",
        batch_size=8,
        gradient_accumulation_steps=8,
        gradient_checkpointing="full",
    )
    best = fit(plan, "h200:1x8", compile=False)
    assert plan.fits
    assert best.changes["gradient_checkpointing"] == "none"
    assert best.plan.time.total < 0.85 * plan.time.total
    with pytest.raises(UserError, match=r"does not fit rtx4090:1x1 with any micro-batch size"):
        fit(planned("epic", "rtx4090:1x1"), "rtx4090:1x1", compile=False)


def test_compiled_collectives_take_the_time_of_their_kind_and_axes() -> None:
    topology, sizes = parse_topology("h200:2x8"), dict(zip(AXES, (2, 8, 1, 1), strict=True))
    communicated = [
        Collective("all-gather", "bf16", ("fsdp",), 2, 2 * 10**9),
        Collective("all-reduce", "f32", ("data",), 1, 10**9),
        Collective("all-reduce", "f32", (), 1, 10**3),
    ]
    found = network_of(communicated, sizes, topology)
    assert found["fsdp",] == pytest.approx(2 * ring_seconds(1e9, ("fsdp",), sizes, topology))
    assert found["data",] == pytest.approx(all_reduce_seconds(1e9, ("data",), sizes, topology))
    assert found["data", "fsdp"] > 0, "unknown axes count as all axes"


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moment_bytes_are_those_that_the_optimizer_keeps(name: str, dtype: str) -> None:
    """Muon's are counted as if all parameters were in blocks, as most of a large model are."""
    run, _ = resolve({"model": "haiku", "optimizer": name, "moment_dtype": dtype, "lr": 1e-3})
    parameters = layout(replace(preset_architecture("haiku"), vocab_size=256, num_layers=8))
    rule = build_optimizer(run.optimizer, lambda count: 1e-3, parameters.logical_axes)
    kept = sum(
        leaf.size * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(jax.eval_shape(rule.init, parameters.shapes))
    )
    assert kept / parameters.num_parameters == pytest.approx(run.optimizer.moment_bytes, abs=0.2)


@pytest.mark.parametrize(
    ("tokens", "words", "logits", "expected"),
    [(65_536, 49_152, 2**27, 2048), (100, 64, 2**26, 100), (1000, 64, 19_200, 250), (7, 64, 1, 1)],
)
def test_a_chunk_of_tokens_is_whole_tiles_if_these_divide_it(
    tokens: int, words: int, logits: int, expected: int
) -> None:
    assert chunk_tokens(tokens, words, logits) == expected


def test_a_small_head_leaves_room_for_more_logits() -> None:
    assert (
        logits_at_once(2 * 49_152 * 768)
        > 2**27
        > logits_at_once(2 * 131_072 * 2048)
        > LOGITS_AT_ONCE
        == logits_at_once(2**31)
    )


def test_a_large_gpu_holds_more_logits_at_once() -> None:
    """A twentieth of its memory, up to 8,192 tokens; never less than on an unknown one."""
    head, words, h200 = 2 * 49_152 * 768, 49_152, DESCRIBED["h200"].memory_bytes
    large = logits_at_once(head, words=words, gpu_bytes=h200)
    assert large == 8192 * words
    assert chunk_tokens(65_536, words, large) == 8192
    small = logits_at_once(head, words=words, gpu_bytes=8 * 2**30)
    assert small == logits_at_once(head, words=words) == logits_at_once(head)
    assert logits_at_once(2**31, words=2**18, gpu_bytes=h200) * 6 + 2**31 <= 0.05 * h200


@pytest.mark.parametrize("gpu", ["rtx4090", "rtx3090"])
def test_chunks_on_24_gb_have_2048_tokens(gpu: str) -> None:
    """131,072 words of 2,048: 5 % of the memory would give chunks of 512 tokens."""
    words, width, memory = 131_072, 2048, DESCRIBED[gpu].memory_bytes
    head = 2 * words * width
    logits = logits_at_once(head, words=words, gpu_bytes=memory)
    assert (0.05 * memory - head) / (6 * words) < 1024
    assert chunk_tokens(16_384, words, logits) == 2048
    assert 6 * logits + head <= memory / 8
    # A GPU of 8 GB has not the memory, and an unknown one may not have it.
    for known in (8 * 2**30, 0):
        less = logits_at_once(head, words=words, gpu_bytes=known)
        assert chunk_tokens(16_384, words, less) == 512
        assert 6 * less + head <= 2**30


def test_logits_in_bf16_take_a_third_of_the_memory() -> None:
    """Their gradients overwrite them. Small GPUs get larger chunks instead.

    The step needs almost as much less: after that, its peak is in a block.
    """
    peaks = [
        planned("verse", "h200:1x1", batch_size=32, logits_dtype=dtype).work.memory.total
        for dtype in ("float32", "bfloat16")
    ]
    assert 0.9 < (peaks[0] - peaks[1]) / (4 * 8192 * 49_152) <= 1
    head, words, small = 2 * 131_072 * 2048, 131_072, 8 * 2**30
    wide, narrow = (
        logits_at_once(head, each, words=words, gpu_bytes=small)
        for each in (logit_bytes(4), logit_bytes(2))
    )
    assert narrow > 2 * wide
    assert narrow * 2 + head <= 2**30
    # Kernels count the elements of a chunk in 32 bits.
    head, h200 = 2 * 300_032 * 768, DESCRIBED["h200"].memory_bytes
    most = logits_at_once(head, logit_bytes(2), words=300_032, gpu_bytes=h200)
    assert most == 2**31 - 1
    assert chunk_tokens(65_536, 300_032, most) * 300_032 < 2**31


def test_the_command_prints_the_page_and_can_read_the_recipe_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(aot, "packages_are_there", lambda compiler: False)
    recipe = tmp_path / "recipe.yaml"
    asked = ["--dry_run", "--topology", "rtx4090:1x8"]
    given = [
        *asked,
        "--model",
        "stanza",
        "--batch_size",
        "64",
        "--data",
        str(tmp_path / "not there"),
        "--output",
        str(tmp_path / "run"),
    ]
    assert main([*given, "--fit", str(recipe)]) == 0
    assert "DOES NOT FIT" in capsys.readouterr().out
    assert main(["--config", str(recipe), *asked]) == 0
    assert "; fits" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert main([*given, "--fit", str(recipe)]) == 2
    assert "--fit would overwrite" in capsys.readouterr().err


def test_the_vocabulary_is_that_of_the_token_store(tmp_path: Path) -> None:
    def vocabulary(**data: Any) -> int:
        config, _ = resolve({"model": "haiku", "data": [str(tmp_path)]})
        return _vocabulary(replace(config, data=replace(config.data, **data)))

    default = vocabulary(data=())
    (tmp_path / "manifest.json").write_text('{"name": "my web page"}')
    assert vocabulary() == default == 49_152
    with TokenStoreWriter(tmp_path / "tokens", BPETokenizer.bytes()) as writer:
        writer.add("train", [1, 2], 2)
    assert vocabulary(data=(str(tmp_path / "tokens"),)) == 259


NARROW, ON_HOST = ["--logits_dtype", "bfloat16"], ["--optimizer_memory", "host"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--topology", "h200:1x8"], "--topology needs --dry_run"),
        (["--dry_run", "--fit"], "--fit needs --topology, the devices to fit"),
        (["--dry_run", "--topology", "h200:3x"], "is not of the form GPU:HOSTSxGPUS"),
        (["--dry_run", "--topology", "h200:1x3"], "--batch_size 8 does not divide over 3 devices"),
        (
            ["--dry_run", "--topology", "h200:1x8", "--mesh", "fsdp=4"],
            "--mesh fsdp=4 is for 4 devices, and there are 8",
        ),
        *(
            (
                ["--dry_run", "--topology", "h200:1x8", "--mixed_precision", precision, *NARROW],
                f"--logits_dtype bfloat16 needs a run that computes in bfloat16, but this one "
                f"computes in {dtype}. Use --mixed_precision bf16",
            )
            for precision, dtype in (("fp16", "float16"), ("no", "float32"))
        ),
        (
            ["--dry_run", "--topology", "a100:1x8", "--mixed_precision", "fp8"],
            "--mixed_precision fp8 needs an NVIDIA GPU of compute capability 8.9 or later",
        ),
        (
            ["--dry_run", "--topology", "h200:1x8", "--mixed_precision", "fp16", *ON_HOST],
            "--optimizer_memory host does not work with float16",
        ),
    ],
)
def test_mistakes_are_one_sentence(
    given: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(aot, "packages_are_there", lambda compiler: False)
    assert main(given) == 2
    assert sentence in capsys.readouterr().err


def test_with_flags_changes_the_named_values() -> None:
    run: RunConfig = with_flags(
        resolve({"model": "haiku"})[0], {"batch_size": 2, "moment_dtype": "bfloat16"}
    )
    assert (run.budget.batch_size, run.optimizer.moment_dtype) == (2, "bfloat16")


@pytest.mark.parametrize("policy", REMAT_POLICIES)
def test_every_policy_trades_memory_for_time(policy: str) -> None:
    kept, recomputed = (
        planned("stanza", "h200:1x8", batch_size=32),
        planned("stanza", "h200:1x8", batch_size=32, gradient_checkpointing=policy),
    )
    assert recomputed.work.memory.total <= kept.work.memory.total
    assert recomputed.time.total >= kept.time.total
