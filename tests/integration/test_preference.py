"""`consyn-train --objective dpo` on a real model and pairs of real text."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from stories_model import stories_model

from consyn_jax.cli.train import main
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.training import trainer
from consyn_jax.training.diagnostics.lr_find import rising_rates

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def story_model(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stories_model(shared_data, tmp_path_factory.mktemp("stories"))


@pytest.fixture(scope="module")
def pairs(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Beginnings of stories with their own words, and with the same words in another order."""
    words = (shared_data / "tinystories" / "tiny_stories.txt").read_text().split()
    draw, rows = random.Random(5), []
    for i in range(0, 240 * 60, 60):
        answer = words[i + 6 : i + 6 + draw.randint(6, 14)]
        rows.append(
            {
                "prompt": " ".join(words[i : i + 6]),
                "chosen": " " + " ".join(answer),
                "rejected": " " + " ".join(draw.sample(answer, len(answer))),
            }
        )
    folder, files = tmp_path_factory.mktemp("pairs"), {}
    for name, part in (("train", rows[:200]), ("held_out", rows[200:])):
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in part))
    return files


def command(story_model: Path, pairs: dict[str, Path], output: Path, *more: str) -> list[str]:
    return [
        *("--checkpoint", str(story_model), "--objective", "dpo", "--output", str(output)),
        *("--data", str(pairs["train"]), "--validation", str(pairs["held_out"])),
        *("--max_tokens", "64", "--batch_size", "4", "--lr", "5e-5", "--eval_steps", "50"),
        *("--logging_backend", "none", "--quiet", *more),
    ]


def test_lr_find_trains_on_pairs(
    story_model: Path,
    pairs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rates rise over the loss of the pairs, with the reference of the model before step 1."""
    monkeypatch.setattr(trainer, "rising_rates", lambda name: rising_rates(name, 40))
    assert main([*command(story_model, pairs, tmp_path), "--lr_find"]) == 0
    found = json.loads((tmp_path / "lr_find.json").read_text())
    assert found["losses"][0] == pytest.approx(math.log(2), rel=1e-2)


def test_100_steps_raise_the_margin_of_held_out_pairs(
    story_model: Path, pairs: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    assert main(command(story_model, pairs, output, "--max_steps", "100")) == 0
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    found: list[dict[str, Any]] = [
        line for line in lines if "eval/loss" in line and "event" not in line
    ]
    assert [line["step"] for line in found] == [50, 100]
    assert found[1]["eval/rewards/margins"] > found[0]["eval/rewards/margins"] > 0.1
    assert found[1]["eval/rewards/accuracies"] > 0.9
    assert found[1]["eval/loss"] < 0.6
    assert found[1]["eval/pairs"] == 40
    ConsynLMHeadModel.from_pretrained(str(output / "final"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--packing", "whole"), "--packing whole packs single sequences, but --objective dpo"),
        (("--streaming", "--max_steps", "2"), "--streaming and --objective dpo do not work"),
        (("--z_loss", "1e-4"), "--z_loss 0.0001 cannot be used with --objective dpo"),
        (("--logits_dtype", "bfloat16"), "--logits_dtype bfloat16 cannot be used with --objective"),
        (("--row_format", "messages"), "--objective dpo needs rows with a chosen and"),
        (("--metric_for_best_model", "eval/perplexity"), "Known: eval/loss, eval/rewards/margins"),
        (("--objective", "next_token"), "which needs --objective dpo"),
        (("--objective", "next_token", "--dpo_beta", "0.2"), "--dpo_beta 0.2 has no effect"),
        (("--on_long_rows", "error", "--max_tokens", "8"), "A pair has a sequence of"),
    ],
)
def test_what_does_not_make_sense_is_refused_in_a_sentence(
    flags: tuple[str, ...],
    said: str,
    story_model: Path,
    pairs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(command(story_model, pairs, tmp_path / "run", *flags)) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_new_weights_and_rows_without_pairs_are_refused(
    story_model: Path, pairs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = ["--model", "haiku", "--objective", "dpo", "--data", str(pairs["train"])]
    assert main([*new, "--output", str(tmp_path / "run")]) == 2
    assert "--model haiku has new weights. Give --checkpoint" in capsys.readouterr().err
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "text.txt").write_text("Once upon a time")
    for file, said in ((rows, "has no key 'chosen'"), (tmp_path / "text.txt", "is plain text")):
        given = {"train": file, "held_out": pairs["held_out"]}
        assert main(command(story_model, given, tmp_path / "run")) == 2
        assert said in " ".join(capsys.readouterr().err.split())
