"""The model of a run: its architecture, its sequence length, and where its weights come from."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from consyn_jax.cli.choices.model_choice import (
    ModelChoice,
    check_start,
    context_of,
    deferred_model,
    with_sequence_length,
)
from consyn_jax.errors import UserError
from consyn_jax.model import parameters
from consyn_jax.model.pretrained import safetensors_files, weights
from consyn_jax.model_config import FileFormat
from consyn_jax.resolve import preset_architecture, resolve

LLAMA = replace(
    preset_architecture("haiku"),
    context=64,
    files=FileFormat("llama", "bfloat16", has_tied_head=True, config='{"a": 1}'),
)


@pytest.mark.parametrize(
    ("flags", "base", "context", "length"),
    [
        ({"model": "haiku"}, None, None, 256),
        ({"model": "/own/config.json"}, LLAMA, 64, 64),
        ({"model": "/own/config.json", "context": 48}, LLAMA, 48, 48),
        ({"model": "/own/config.json", "max_tokens": 16}, LLAMA, 64, 16),
        ({"checkpoint": "there"}, LLAMA, 64, 64),
    ],
)
def test_the_length_of_a_sequence_follows_from_the_model(
    flags: dict[str, Any], base: Any, context: int | None, length: int
) -> None:
    run, _ = resolve(flags)
    assert context_of(run, base) == context
    assert with_sequence_length(run, base).length == length
    found = with_sequence_length(run, base, from_rows=True).data.max_tokens
    assert found == (None if "checkpoint" in flags else length)


def test_a_sequence_is_not_longer_than_the_context() -> None:
    run, _ = resolve({"model": "/own/config.json", "max_tokens": 65})
    with pytest.raises(UserError, match="--max_tokens 65 is above the model's context of 64"):
        with_sequence_length(run, LLAMA)


@pytest.mark.parametrize(
    ("flags", "is_planned", "words"),
    [
        ({"model": "haiku"}, False, None),
        ({"model": "haiku", "lora_rank": 4}, False, "--lora_rank 4 adapts trained weights"),
        ({"model": "haiku", "lora_rank": 4}, True, None),
        ({"checkpoint": "there", "lora_rank": 4}, False, None),
        ({"model": "haiku", "objective": "dpo"}, False, "--objective dpo tunes a model that can"),
        ({"model": "haiku", "objective": "dpo"}, True, "--objective dpo tunes a model that can"),
        ({"checkpoint": "there", "objective": "dpo"}, False, None),
    ],
    ids=str,
)
def test_what_is_tuned_has_weights(
    flags: dict[str, Any], is_planned: bool, words: str | None
) -> None:
    run, _ = resolve(flags)
    more = {"is_planned": True} if is_planned else {}
    with nullcontext() if words is None else pytest.raises(UserError, match=words):
        check_start(run, **more)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """What makes and loads weights, none of which does anything."""
    parts = Mock()
    parts.weights_hash.return_value = "hash"
    for place, name in (
        (parameters, "initial_parameters"),
        (weights, "load_parameters"),
        (safetensors_files, "weights_hash"),
    ):
        monkeypatch.setattr(place, name, getattr(parts, name))
    return parts


def with_ids(config: Any) -> Any:
    return replace(config, bos_token_id=7)


def test_new_weights_are_drawn_with_seed_and_base(made: Mock) -> None:
    """Their files are of the family of --model, in float32."""
    given = {"model": "/own/config.json", "seed": 9, "parametrization": "mup", "num_layers": 3}
    run, _ = resolve(given)
    model = deferred_model(run, ModelChoice(LLAMA), 300, with_ids)
    files = FileFormat("llama", config='{"a": 1}')
    changes: dict[str, Any] = {"num_layers": 3, "bos_token_id": 7, "vocab_size": 300}
    assert model.config == replace(LLAMA, **changes, files=files)
    assert (model.weights, model.name) == (None, None)
    mesh: Any = object()
    model.make(mesh, Mock())
    made.initial_parameters.assert_called_once_with(model.config, 9, mesh, run.optimizer.base)


@pytest.mark.parametrize("is_directory", [True, False])
def test_a_checkpoint_is_loaded_as_it_is(
    is_directory: bool, made: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files keep their format; a directory is named whole, and a model of the Hub by its id."""
    monkeypatch.chdir(tmp_path)
    place = Path("there") if is_directory else Path("cache") / "there"
    place.mkdir(parents=True)
    name = "there" if is_directory else "org/there"
    run, _ = resolve({"checkpoint": name, "model": "haiku"})
    stored = replace(LLAMA, vocab_size=300)
    model = deferred_model(run, ModelChoice(stored, stored, place), 5, with_ids)
    assert (model.config.vocab_size, model.config.files) == (300, stored.files)
    assert model.weights == "hash"
    assert model.name == (str(tmp_path / "there") if is_directory else "org/there")
    made.weights_hash.assert_called_once_with(place)
    mesh: Any = object()
    convert: Callable[..., Any] = Mock()
    model.make(mesh, convert)
    made.load_parameters.assert_called_once_with(place, model.config, mesh, convert=convert)
