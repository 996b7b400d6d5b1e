"""DPO of a real small model: training raises the margin of pairs that it has not seen."""

import json
import random
from pathlib import Path

import pytest
from stories_model import stories_model

from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.tokenization import load_tokenizer
from consyn_jax.training import ConsynTrainer
from consyn_jax.training.dataset import get_dataset

PAIRS, STEPS = 200, 100


def write_pairs(stories: str, file: Path) -> Path:
    """Beginnings of stories as they go on, and with the same words in another order."""
    words, draw = stories.split(), random.Random(0)
    with file.open("w") as out:
        for at in range(0, 40 * PAIRS, 40):
            answer = words[at + 8 : at + 24]
            other = draw.sample(answer, len(answer))
            row = {"prompt": " ".join(words[at : at + 8])}
            row |= {"chosen": " " + " ".join(answer), "rejected": " " + " ".join(other)}
            out.write(json.dumps(row) + "\n")
    return file


@pytest.mark.slow
@pytest.mark.exhaustive  # CI has four steps, of a smaller model, in test_reference.py
@pytest.mark.timeout(1200)
def test_100_steps_raise_the_margin_of_held_out_pairs(shared_data: Path, tmp_path: Path) -> None:
    model = stories_model(shared_data, tmp_path / "model")
    stories = (shared_data / "tinystories" / "tiny_stories.txt").read_text()
    file = write_pairs(stories, tmp_path / "pairs.jsonl")
    pairs, held_out = (
        get_dataset(
            file,
            load_tokenizer(str(model)),
            64,
            split=split,
            row_format="preference",
            validation_fraction=0.25,
        )
        for split in ("train", "validation")
    )
    ConsynTrainer(
        ConsynLMHeadModel.from_pretrained(model),
        pairs,
        held_out,
        output_dir=tmp_path / "run",
        objective="dpo",
        max_steps=STEPS,
        batch_size=8,
        learning_rate=1e-4,
        eval_steps=STEPS // 2,
        save_steps=STEPS,
        logging_backend="none",
        quiet=True,
    ).train()
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    found = [line for line in lines if "eval/rewards/margins" in line and "event" not in line]
    assert [line["step"] for line in found] == [STEPS // 2, STEPS]
    margins = [line["eval/rewards/margins"] for line in found]
    accuracies = [line["eval/rewards/accuracies"] for line in found]
    print(f"{len(held_out)} held-out pairs: margins {margins}, accuracies {accuracies}")
    assert 0.1 < margins[0] < margins[1]  # it is 0 before step 1, where the model is the reference
    assert accuracies[1] > 0.8
