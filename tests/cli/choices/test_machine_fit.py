"""A model that a machine without a GPU cannot train is refused by arithmetic, with what fits."""

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from consyn_jax.cli.choices import machine_fit
from consyn_jax.cli.choices.fine_tuning import shortest
from consyn_jax.cli.choices.machine_fit import check_machine
from consyn_jax.cli.choices.model_choice import ModelChoice, choose_model, with_sequence_length
from consyn_jax.cli.train import read_arguments
from consyn_jax.config import architecture
from consyn_jax.errors import UserError
from consyn_jax.resolve import preset_architecture, resolve
from consyn_jax.training.runtime.step_memory import cpu_step_bytes

# Bytes of a step that XLA's compiler found on a CPU, 2026-12-01: state and temporaries.
COMPILED = [
    ({"model": "haiku"}, 49152, 448_164_800),
    ({"model": "haiku", "batch_size": 4}, 49152, 373_860_096),
    ({"model": "haiku", "max_tokens": 512}, 49152, 681_801_088),
    ({"model": "haiku"}, 4096, 240_073_396),
    ({"model": "haiku", "gradient_accumulation_steps": 4}, 49152, 459_170_832),
    (
        {"model": "haiku", "max_tokens": 1024, "gradient_checkpointing": "full"},
        49152,
        1_387_428_224,
    ),
    ({"model": "verse", "batch_size": 1, "max_tokens": 256}, 49152, 3_195_745_396),
    ({"model": "verse", "batch_size": 2, "max_tokens": 1024}, 49152, 5_956_108_672),
    (
        {"model": "verse", "batch_size": 1, "gradient_accumulation_steps": 8},
        49152,
        8_052_040_976,
    ),
    ({"model": "verse"}, 49152, 41_237_983_104),
    (
        {"model": "haiku", "batch_size": 4, "max_tokens": 512, "lora_rank": 16},
        8192,
        377_627_340,
    ),
    (
        {"model": "verse", "batch_size": 1, "max_tokens": 256, "lora_rank": 16},
        49152,
        1_316_494_348,
    ),
    (
        {
            "model": "verse",
            "batch_size": 1,
            "max_tokens": 256,
            "lora_rank": 16,
            "lora_base_dtype": "int8",
        },
        49152,
        1_067_739_148,
    ),
]


@pytest.mark.parametrize(("flags", "vocab_size", "compiled"), COMPILED)
def test_the_arithmetic_is_within_a_tenth_of_the_compiler(
    flags: dict[str, Any], vocab_size: int, compiled: int
) -> None:
    run, _ = resolve(flags)
    found = cpu_step_bytes(
        architecture(run.model, None, vocab_size=vocab_size),
        run.budget.batch_size,
        run.budget.gradient_accumulation_steps,
        run.length,
        run.optimizer.moment_bytes,
        run.lora,
    )
    assert found == pytest.approx(compiled, rel=0.1)


def check(*argv: str) -> None:
    config, origins, _ = read_arguments(argv)
    check_machine(config, origins, choose_model(config.model), None)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """16 GB, four cores and no GPU."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(machine_fit, "_machine_bytes", lambda: 16 * 10**9)
    monkeypatch.setattr(machine_fit, "_cores", lambda: 4)
    return monkeypatch


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("Some text that is long enough to count. " * 50_000)
    return str(tmp_path / "text.txt")


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["--model", "verse"],
        ["--model", "stanza"],
        ["--model", "epic", "--batch_size", "1"],
        ["--batch_size", "6", "--max_tokens", "2000"],
        ["--gradient_checkpointing"],
        ["--max_steps", "10"],
        ["--total_tokens", "1e12"],
    ],
)
def test_what_is_suggested_passes_the_same_check(
    given: list[str], machine: pytest.MonkeyPatch, text: str
) -> None:
    given = [*given, "--data", text]
    with pytest.raises(
        UserError, match=r"needs about [\d.]+ GB of memory, .*16.0 GB and no GPU"
    ) as e:
        check(*given)
    advice = str(e.value).partition(" Add ")[2]
    options = re.findall(r"(--[^(]+) \(about ([\d.]+) GB", advice)
    assert options
    for flags, gigabytes in options:
        assert float(gigabytes) < 8
        check(*given, *flags.split())


def test_a_suggestion_keeps_the_shape_of_a_study(machine: pytest.MonkeyPatch, text: str) -> None:
    words = ["--model", "haiku", "--hidden_dim", "65536", "--num_heads", "512", "--data", text]
    config, origins, _ = read_arguments(words)
    origins |= dict.fromkeys(("hidden_dim", "num_heads"), "search")
    with pytest.raises(UserError, match=r"Use a smaller model, or a machine with a GPU\.$"):
        check_machine(config, origins, ModelChoice(None), None)


def test_the_default_model_needs_a_day_at_most_and_a_chosen_one_any_time(
    machine: pytest.MonkeyPatch, text: str
) -> None:
    machine.setattr(machine_fit, "_machine_bytes", lambda: 10**12)
    Path(text).write_text("Some text. " * 10_000_000)
    with pytest.raises(
        UserError,
        match=r"takes about \d+ days on this machine.* or give --model verse to train this model",
    ):
        check("--data", text)
    check("--data", text, "--model", "verse")
    check("--data", text, "--max_steps", "5")


@pytest.mark.parametrize(("size", "fits"), [("haiku", True), ("epic", False)])
def test_a_checkpoint_is_checked_before_the_rows_decide_its_length(
    size: str, fits: bool, machine: pytest.MonkeyPatch, text: str
) -> None:
    config, origins, _ = read_arguments(["--checkpoint", "some/model", "--data", text])
    model = preset_architecture(size)
    settings = shortest((config, origins), model.context)
    if fits:
        check_machine(*settings, ModelChoice(model, model), None)
        return
    machine.setattr(machine_fit, "_machine_bytes", lambda: 10**9)
    with pytest.raises(UserError, match=r"^A step of --checkpoint some/model with 1 x 128 tokens"):
        check_machine(*settings, ModelChoice(model, model), None)


@pytest.mark.parametrize("advice", [" Add --max_tokens 512 ", " Use a smaller model"])
def test_a_config_file_that_does_not_fit_is_answered_like_a_preset(
    advice: str, machine: pytest.MonkeyPatch, text: str
) -> None:
    config, origins, _ = read_arguments(["--model", "some/config.json", "--data", text])
    model = preset_architecture("verse")
    config = with_sequence_length(config, model)
    if "smaller" in advice:
        machine.setattr(machine_fit, "_machine_bytes", lambda: 10**9)
    with pytest.raises(UserError, match=rf"some/config.json with .*{advice}"):
        check_machine(config, origins, ModelChoice(model), None)


def test_a_gpu_is_not_refused(machine: pytest.MonkeyPatch) -> None:
    machine.setenv("JAX_PLATFORMS", "cuda,cpu")
    check("--model", "epic")


def test_the_answer_comes_before_jax_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom consyn_jax.cli import train\nfrom consyn_jax.cli.choices import machine_fit\n"
        "machine_fit._machine_bytes = lambda: 16 * 10**9\n"
        "code = train.main(sys.argv[1:])\nprint(code, 'jax' in sys.modules)"
    )
    began = time.process_time(), time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={"JAX_PLATFORMS": "cpu", "PATH": "", "PYTHONPATH": ":".join(sys.path)},
        cwd=tmp_path,
        check=False,
    )
    assert done.stdout == "2 False\n"
    assert "Add --model haiku (about 0.4 GB" in done.stderr
    assert time.monotonic() - began[1] < 30  # 0.5 s on an idle machine
    assert not (tmp_path / "out").exists()
