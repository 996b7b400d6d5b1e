"""Lines of the header: what was read for what, and where the weights come from."""

import json
from pathlib import Path
from typing import Any

import pytest

from consyn_jax.cli.choices.model_choice import file_notes, weights_note
from consyn_jax.cli.choices.training_data import training_data
from consyn_jax.data.preparation.cached_store import prepare
from consyn_jax.errors import UserError
from consyn_jax.prepare_config import CorpusOptions
from consyn_jax.resolve import resolve
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.tokenization.chat.plain_template import PLAIN

BYTES = BPETokenizer.bytes()
CHAT = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSYN_CACHE", str(tmp_path / "cache"))


def write(file: Path, *rows: dict[str, Any]) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def made(data: Path, **flags: Any) -> tuple[dict[str, list[str]], BPETokenizer]:
    """The header's lines about the data, by name, and the tokenizer that is exported."""
    given = {"model": "haiku", "tokenizer": "bytes", "data": [str(data)], "max_tokens": 32}
    with training_data(resolve({**given, **flags}), BYTES, None) as found:
        lines: dict[str, list[str]] = {}
        for name, text in found.notes:
            lines.setdefault(name, []).append(text)
        if flags.get("streaming"):
            found.training.corpus.close()
        return lines, found.tokenizer


def test_rows_are_described_while_they_are_streamed(tmp_path: Path) -> None:
    file = write(tmp_path / "chats.jsonl", *[CHAT] * 30)
    whole, _ = made(file)
    streamed, tokenizer = made(file, streaming=True, max_steps=1)
    for name in ("rows", "chat template", "prompt", "target"):
        assert streamed[name][0] == whole[name][0]
    assert streamed["rows"][0] == "read 30 as messages"
    assert streamed["target"] == ['"So.<|eos|>"']
    assert tokenizer.chat_template == PLAIN, "final/ answers chats as they were trained on"


def test_training_files_are_named_before_validation_files(tmp_path: Path) -> None:
    for name in ("train", "validation"):
        write(tmp_path / "data" / f"{name}.jsonl", *[{"text": f"{name} {i}"} for i in range(9)])
    lines, _ = made(tmp_path / "data")
    text = lines["data"][0]
    assert text.index("train.jsonl") < text.index("validation.jsonl")
    assert "by name" in lines["validation"][0]


def test_what_is_not_read_and_what_is_cut_is_said(tmp_path: Path) -> None:
    long, short = ({"prompt": "p" * size, "completion": "c", "id": 1} for size in (40, 4))
    lines, _ = made(write(tmp_path / "rows.jsonl", long, *[short] * 9), validation_fraction=0.0)
    assert lines["not read"] == [
        "fields that no option uses, with the number of rows that have them: id (10)"
    ]
    assert lines["long rows"] == [
        "1 longer than 32 tokens: truncated, 10 tokens (10.4%) left out, 2 of them training targets"
    ]


def test_a_chat_template_without_conversations_is_said_to_have_no_effect(tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    file = write(tmp_path / "texts.jsonl", *[{"text": f"text {i}"} for i in range(9)])
    for given in (str(template), "plain"):
        lines, _ = made(file, chat_template=given)
        assert lines["chat template"] == [
            f"--chat_template {given} has no effect, because the data has no conversations"
        ]
    assert "chat template" not in made(file)[0]


def test_a_template_that_writes_the_day_writes_the_same_and_says_so(tmp_path: Path) -> None:
    template = tmp_path / "day.jinja"
    template.write_text(
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    lines, _ = made(write(tmp_path / "chats.jsonl", CHAT, CHAT), chat_template=str(template))
    assert lines["prompt"] == ['"26 Jul 2024Why?"']
    assert any("writes today's date; all rows get 26 Jul 2024" in text for text in lines["noticed"])


def test_the_weights_that_a_run_begins_with_are_named(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"")
    (model / "config.json").write_text("{}")

    def note(**flags: Any) -> str:
        config, origins = resolve(flags)
        return weights_note(config.model, origins["checkpoint"], config.budget.seed)[1]

    alone = f"; to use only its architecture, give --model {model}/config.json"
    assert note(model=str(model)) == f"initial weights from {model}{alone}"
    assert note(checkpoint=str(model)) == f"initial weights from {model}"
    assert note(model=f"{model}/config.json", seed=3) == "new, drawn with seed 3"
    assert note(model="haiku") == "new, drawn with seed 42"


def test_sizes_and_budgets_of_a_file_are_named_where_a_flag_names_the_model() -> None:
    file = {"model": "haiku", "hidden_dim": 192, "max_steps": 50, "lr": 0.1}
    said = file_notes(*resolve({"model": "verse"}, file, file_name="a.yaml"))
    assert said == [("config", "a.yaml sets hidden_dim 192, max_steps 50, also for verse")]
    assert file_notes(*resolve({}, file, file_name="a.yaml")) == []
    tuned = {"max_tokens": 64, "batch_size": 2}  # chosen from rows, for another checkpoint
    said = file_notes(*resolve({"checkpoint": "there"}, tuned, file_name="a.yaml"))
    assert said == [("config", "a.yaml sets batch_size 2, max_tokens 64, also for there")]
    assert file_notes(*resolve({"model": "verse"}, {"lr": 0.1}, file_name="a.yaml")) == []


def test_a_token_store_is_answered_with_advice_that_works_with_it(tmp_path: Path) -> None:
    """A store's splits were made with it: the remedy is to prepare it again."""
    texts = write(tmp_path / "texts.jsonl", *[{"text": f"A text, number {i}."} for i in range(40)])
    stores = {}
    for share in (0.0, 0.2):
        stores[share] = tmp_path / f"store{share}"
        options = CorpusOptions(data=(str(texts),), tokenizer="bytes", validation_fraction=share)
        prepare(options, output=stores[share])
    lines, _ = made(stores[0.0])
    assert lines["validation"] == [
        "none: the validation split has no document; prepare the data again with consyn-prepare "
        "--validation PATH or a larger --validation_fraction"
    ]
    assert "validation" not in made(stores[0.2])[0]
    with pytest.raises(UserError, match=r"a token store.*--validation_fraction 0\.3 has no"):
        made(stores[0.2], validation_fraction=0.3)
    lines, _ = made(stores[0.2], validation_fraction=0)
    assert lines["validation"] == ["none: --validation_fraction is 0"]
    assert (
        "give --validation PATH or a larger"
        in made(texts, validation_fraction=0)[0]["validation"][0]
    )


def test_pairs_are_counted_with_what_long_ones_lose(tmp_path: Path) -> None:
    pair = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    rows = [pair] * 30 + [pair | {"chosen": "so " * 40}]
    lines, _ = made(
        write(tmp_path / "pairs.jsonl", *rows), objective="dpo", validation_fraction=0.0
    )
    assert lines["pairs"][0].startswith("31; a row is a pair: two sequences of up to 32 tokens")
    assert lines["long pairs"][0].startswith("1 with a sequence of more than 32 tokens: truncated")


def test_a_mixture_has_the_weight_of_each_item(tmp_path: Path) -> None:
    files = []
    for name, text in (("a", "one "), ("b", "two ")):
        files.append(tmp_path / f"{name}.txt")
        files[-1].write_text(text * 2000)
    given = {"model": "haiku", "tokenizer": "bytes", "max_tokens": 32, "data_weights": [1, 3]}
    given |= {"data": list(map(str, files)), "validation_fraction": 0.1}
    with training_data(resolve(given), BYTES, None) as found:
        for mixed in (found.training, found.validation):
            assert list(mixed.sources) == given["data"]
            assert list(mixed.weights) == [1, 3]
