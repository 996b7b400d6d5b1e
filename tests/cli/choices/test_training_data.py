"""From `--data` and its flags to datasets: what is checked early, and what each item becomes."""

from pathlib import Path
from typing import Any

import jax
import pytest

from consyn_jax.cli.choices.training_data import _num_devices, check_data, training_data
from consyn_jax.config import DataOptions
from consyn_jax.data.preparation.cached_store import prepare
from consyn_jax.errors import UserError
from consyn_jax.prepare_config import CorpusOptions
from consyn_jax.resolve import resolve
from consyn_jax.tokenization import BPETokenizer

BYTES = BPETokenizer.bytes()


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two files of 60 short texts, and a token store of each."""
    home = tmp_path_factory.mktemp("corpora")
    found = {}
    for name in ("one", "two"):
        file, store = home / f"{name}.jsonl", home / f"{name}-store"
        file.write_text("".join(f'{{"text": "{name} {i}"}}\n' for i in range(60)))
        options = CorpusOptions(data=(str(file),), tokenizer="bytes", validation_fraction=0.2)
        prepare(options, output=store)
        found |= {name: str(file), f"{name}-store": str(store)}
    return found


def options(**flags: Any) -> DataOptions:
    return resolve({"model": "haiku", "tokenizer": "bytes", "max_tokens": 16} | flags)[0].data


@pytest.mark.parametrize(
    ("items", "flags", "is_tokenised"),
    [
        (["one"], {}, False),
        (["one-store"], {}, True),
        (["one-store", "two-store"], {}, True),
        (["one", "two-store"], {"data_weights": [1, 1]}, False),
        (["one-store"], {"num_workers": 2, "validation_fraction": 0}, True),
        (["one-store"], {"objective": "dpo", "checkpoint": "there"}, True),
        (["one", "one"], {}, False),
    ],
)
def test_data_is_tokenised_if_all_of_it_is(
    items: list[str], flags: dict[str, Any], is_tokenised: bool, corpora: dict[str, str]
) -> None:
    data = options(data=[corpora[item] for item in items], **flags)
    assert check_data(data) is is_tokenised


def test_flags_that_data_does_not_use_are_refused(corpora: dict[str, str], tmp_path: Path) -> None:
    store, bad = corpora["one-store"], tmp_path / "bad.txt"
    for flag, value in (("min_chars", 3), ("text_key", "body"), ("row_format", "text")):
        with pytest.raises(UserError, match=f"is tokenised already, so --{flag} has no effect"):
            check_data(options(data=[store], **{flag: value}))
    with pytest.raises(UserError, match="--min_chars has no effect"):
        check_data(options(data=[store], objective="dpo", checkpoint="there", min_chars=3))
    with pytest.raises(UserError, match="twice, but a mixture has one weight for each item"):
        check_data(options(data=[store, store], data_weights=[1, 2]))
    bad.write_bytes(b"a text\xff of one byte too many")
    for flag in ("data", "validation"):
        given = {"data": [corpora["one"]], flag: [str(bad)]}
        with pytest.raises(UserError, match=r"bad\.txt.*UTF-8"):
            check_data(options(**given))
        assert not check_data(options(invalid_utf8="replace", **given))
    with pytest.raises(UserError, match=r"^gone in --validation"):
        check_data(options(data=[store], validation=["gone"]))


def made(corpora: dict[str, str], items: list[str], **flags: Any) -> tuple[Any, Any]:
    given = {"model": "haiku", "tokenizer": "bytes", "max_tokens": 16, "seed": 9}
    given |= {"data": [corpora[item] for item in items]}
    with training_data(resolve(given | flags), BYTES, None) as found:
        return found.training, found.validation


def test_a_store_and_a_file_may_be_mixed(corpora: dict[str, str]) -> None:
    """A fraction to hold out is for the file alone, since the store has its splits."""
    training, validation = made(
        *(corpora, ["one-store", "two"]), data_weights=[1, 3], validation_fraction=0.5
    )
    assert training.order.seed == 9
    assert [list(part.sources) for part in (training, validation)] == [
        [corpora["one-store"], corpora["two"]]
    ] * 2
    assert list(validation.weights) == [1, 3]
    store, file = (part.num_documents for part in training.sources.values())
    assert store > 1.3 * file


def test_validation_files_are_read_once_for_all_items(
    corpora: dict[str, str], tmp_path: Path
) -> None:
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("a text to evaluate on " * 9)
    training, validation = made(
        *(corpora, ["two", "one"]), data_weights=[1, 2], validation=[str(held_out)]
    )
    assert list(training.sources) == [corpora["two"], corpora["one"]]
    assert list(validation.sources) == [corpora["two"]]
    assert validation.num_tokens == len(held_out.read_text()) + 1


@pytest.mark.parametrize("items", [["one-store"], ["one-store", "two-store"]])
def test_no_validation_is_no_dataset(items: list[str], corpora: dict[str, str]) -> None:
    weights = {"data_weights": [1, 2]} if len(items) > 1 else {}
    assert made(corpora, items, validation_fraction=0, **weights)[1] is None
    training, validation = made(corpora, items, **weights)
    assert 0 < validation.num_tokens < training.num_tokens
    parts = [getattr(split, "sources", {"": split}).values() for split in (training, validation)]
    assert [{part.shuffle for part in split} for split in parts] == [{True}, {False}]


def test_as_many_devices_share_a_batch_as_the_mesh_has() -> None:
    """A mesh that is given is checked against the batch later."""
    for mesh, number in (("auto", jax.device_count()), ("data=2", 1)):
        assert _num_devices(resolve({"mesh": mesh})[0]) == number
