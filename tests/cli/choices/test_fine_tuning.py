"""The defaults of a fine-tune: rate, length and batch."""

import numpy as np
import pytest

from consyn_jax.cli.choices.fine_tuning import Settings, with_batch, with_length
from consyn_jax.data.packing import WholeDocuments, pack
from consyn_jax.data.store.shards import MemoryShard
from consyn_jax.data.store.store_split import StoreSplit
from consyn_jax.errors import UserError
from consyn_jax.resolve import resolve
from consyn_jax.training.optim.optimizers import lr_warning


def settings(**given: object) -> Settings:
    return resolve({"model": "model", "checkpoint": "model", **given})


def split(lengths: list[int], learned: bool = True) -> StoreSplit:
    """Documents of so many tokens, EOS included."""
    ids = [np.full(length - 1, 5) for length in lengths]
    targets = [
        np.append(np.zeros(length // 2), np.ones(length - 1 - length // 2)) for length in lengths
    ]
    return StoreSplit([MemoryShard(ids, 0, targets if learned else None)])


def test_a_checkpoint_has_the_recipe_of_a_fine_tune() -> None:
    config, origins = settings()
    recipe = ("lr", "weight_decay", "beta2", "warmup_ratio")
    assert [getattr(config.optimizer, name) for name in recipe] == [2e-5, 0.0, 0.999, 0.03]
    assert {origins[name] for name in recipe} == {"fine-tuning"}
    assert config.budget.epochs == 3
    given, _ = settings(lr=1e-4, warmup_ratio=0.1)
    assert (given.optimizer.lr, given.optimizer.warmup_ratio) == (1e-4, 0.1)
    lion, _ = settings(optimizer="lion")
    assert lion.optimizer.lr == pytest.approx(4e-6)
    preset, _ = resolve({"model": "haiku"})
    assert preset.optimizer.lr == 3e-3


def test_the_warning_about_a_high_rate_can_fire() -> None:
    """At 3e-4, the rate that a checkpoint had by default."""
    for optimizer in ("adamw", "muon", "cautious_adamw", "adafactor"):
        assert lr_warning(2e-5, optimizer, from_weights=True) is None
        assert "high for fine-tuning" in (lr_warning(3e-4, optimizer, from_weights=True) or "")


@pytest.mark.parametrize(
    ("lengths", "context", "chosen"),
    [
        ([100] * 99 + [5000], 4096, 128),
        ([100] * 90 + [700] * 10, 4096, 768),
        ([9000] * 10, 4096, 4096),
        ([20] * 10, 64, 64),
    ],
)
def test_the_length_covers_99_percent_of_the_rows(
    lengths: list[int], context: int, chosen: int
) -> None:
    (config, origins), why = with_length(settings(), [split(lengths)], context)
    assert (config.length, origins["max_tokens"]) == (chosen, "the rows")
    assert f"{chosen:,} tokens" in why
    given = settings(max_tokens=32)
    assert with_length(given, [split(lengths)], context) == (given, "")


def test_text_without_prompts_does_not_take_the_whole_context() -> None:
    (config, _), _ = with_length(settings(), [split([90_000] * 3, learned=False)], 32_768)
    assert config.length == 2048


@pytest.mark.parametrize(
    ("length", "sequences", "devices", "batch"),
    [
        (512, 10**6, 1, (32, 4)),
        (2048, 10**6, 8, (8, 4)),
        (32_768, 10**6, 1, (1, 2)),
        (512, 320, 1, (10, 1)),
        (512, 3, 1, (1, 1)),
        (512, 3, 8, (8, 1)),
    ],
)
def test_the_batch_is_counted_in_tokens(
    length: int, sequences: int, devices: int, batch: tuple[int, int]
) -> None:
    config, _ = with_batch(settings(max_tokens=length), sequences, devices)
    assert (config.budget.batch_size, config.budget.gradient_accumulation_steps) == batch
    given = settings(max_tokens=length, batch_size=2)
    assert with_batch(given, sequences, devices) == given


def test_rows_with_prompts_stay_whole_and_are_truncated() -> None:
    rows = split([5, 30, 8])
    packed = pack(rows, 16, 1, 0)
    assert isinstance(packed, WholeDocuments)
    assert (packed.num_long, packed.lost_tokens, packed.num_tokens) == (1, 14, 29)
    assert packed.num_targets + packed.lost_targets == rows.num_targets
    items = packed.rows(range(len(packed)))
    assert int(items["loss_mask"].sum()) == packed.num_targets
    assert int((items["segment_ids"] > 0).sum()) == packed.num_tokens
    dropped = pack(rows, 16, 1, 0, on_long="drop")
    assert (dropped.num_tokens, dropped.num_documents) == (13, 2)
    assert len(dropped) == 1
    with pytest.raises(UserError, match=r"30 tokens, more than the 16.*--max_tokens"):
        pack(rows, 16, 1, 0, on_long="error")
    assert not isinstance(pack(split([5, 30], learned=False), 16, 1, 0), WholeDocuments)
    assert not isinstance(pack(rows, 16, 1, 0, "cut"), WholeDocuments)


def test_long_rows_need_whole_packing() -> None:
    with pytest.raises(UserError, match="no effect with --packing cut"):
        resolve({"packing": "cut", "on_long_rows": "drop"})
