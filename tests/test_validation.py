"""Values that are out of range or contradict each other."""

import pytest

from consyn_jax.errors import UserError
from consyn_jax.resolve import resolve


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": "-3e-4"}, "--lr must be greater than 0, not -0.0003."),
        ({"seed": "-1"}, "--seed must not be negative, but is -1."),
        ({"seed": "4294967296"}, "--seed must be below 2**32, not 4294967296."),
        ({"beta1": "1"}, "--beta1 must be at least 0 and below 1, not 1.0."),
        ({"rope_theta": "0"}, "--rope_theta must be greater than 0, not 0.0."),
        ({"num_layers": "0"}, "--num_layers must be at least 1, not 0."),
        ({"context": "0"}, "--context must be at least 1, not 0."),
        ({"num_heads": "0"}, "--num_heads must be at least 1, not 0."),
        (
            {"head_dim": "3"},
            "--head_dim 3 is odd, but the rotary embedding rotates pairs of elements. "
            "Give an even number.",
        ),
        (
            {"num_kv_heads": "5"},
            "--num_heads 12 is not a multiple of --num_kv_heads 5. "
            "Set --num_kv_heads to 1, 2, 3, 4, 6, 12.",
        ),
        (
            {"max_tokens": "4096"},
            "--max_tokens 4096 is above the model's context of 2048 tokens. Lower --max_tokens, or "
            "raise --context.",
        ),
        (
            {"tokenizer": "train:12"},
            "--tokenizer train:SIZE must have a size from 260 to 1,000,000, not '12'.",
        ),
        (
            {"tokenizer": "train:²"},
            "--tokenizer train:SIZE must have a size from 260 to 1,000,000, not '²'.",
        ),
        ({"resume": "²"}, "--resume must be auto, never or a step of at most 15 digits, not '²'."),
        (
            {"resume": "maybe"},
            "--resume must be auto, never or a step of at most 15 digits, not 'maybe'.",
        ),
        (
            {"resume": "4", "overwrite": "true"},
            "--overwrite would delete the checkpoint that --resume 4 starts from. Leave one of the "
            "two flags out.",
        ),
        (
            {"warmup_steps": "9", "max_steps": "8"},
            "--warmup_steps 9 is more than --max_steps 8. Lower --warmup_steps.",
        ),
    ],
)
def test_an_invalid_value_is_named_with_its_flag(given: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(given)
    assert str(caught.value) == message
