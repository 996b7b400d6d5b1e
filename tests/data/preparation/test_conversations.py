"""Rows with prompts through a whole preparation: counts, templates, and what is left as it is."""

import json
from pathlib import Path

import numpy as np
import pytest

from consyn_jax.cli.choices.row_notes import row_notes
from consyn_jax.data.preparation.cached_store import Prepared, prepare
from consyn_jax.errors import UserError
from consyn_jax.prepare_config import CorpusOptions
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.tokenization.chat.plain_template import PLAIN

BYTES = BPETokenizer.bytes()
CHAT = {
    "messages": [
        {"role": "user", "content": "e\u0301?\x1b"},
        {"role": "assistant", "content": "yes"},
    ]
}


def made(
    tmp_path: Path, *rows: dict, tokenizer: BPETokenizer = BYTES, **options: object
) -> Prepared:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    chosen = CorpusOptions(data=(str(file),), validation_fraction=0.0, **options)  # type: ignore[arg-type]
    return prepare(chosen, tokenizer)


def texts(prepared: Prepared) -> list[str]:
    split = prepared.store.split("train")
    tokens = np.empty(split.num_tokens, split.dtype)
    split.read(0, tokens)
    starts = [int(start) for part in split.document_starts() for start in part]
    return [
        BYTES.decode(ids.tolist(), skip_special_tokens=False)
        for ids in np.split(tokens, starts[1:])
    ]


def test_a_conversation_is_written_as_it_is(tmp_path: Path) -> None:
    prepared = made(tmp_path, CHAT, CHAT)
    written = "<|bos|><|user|>\ne\u0301?\x1b<|eos|><|assistant|>\nyes<|eos|>"
    assert texts(prepared) == [written, written]  # neither cleaned nor deduplicated
    assert prepared.report.formats == {"messages": 2}
    assert prepared.report.example == ["messages", written[: -len("yes<|eos|>")], "yes<|eos|>"]
    assert prepared.store.tokenizer.chat_template == PLAIN
    assert prepared.store.split("train").num_targets == 2 * 4
    flags = made(
        tmp_path, CHAT, CHAT, deduplicate=True, normalize="nfc", control_characters="remove"
    )
    assert texts(flags) == [written.replace("e\u0301", "é").replace("\x1b", "")]


def test_what_is_left_out_of_rows_is_counted(tmp_path: Path) -> None:
    pair = {"prompt": "<|im_start|>q", "completion": "a", "source": "web", "id": 1}
    report = made(tmp_path, pair, {**CHAT, "id": 2}).report
    assert report.unread == {"id": 2, "source": 1}
    assert report.noticed == {"markers": 1}
    assert report.example == ["prompt_completion", "<|im_start|>q", "a<|eos|>"]


def test_texts_are_cleaned_and_deduplicated_beside_conversations(tmp_path: Path) -> None:
    text = {"text": "e\u0301\x1b <|im_start|>"}
    prepared = made(tmp_path, text, CHAT, text, CHAT)
    assert texts(prepared)[0] == "é <|im_start|><|eos|>"
    assert prepared.report.dropped == {"duplicate": 1}
    assert prepared.report.noticed == {"markers": 2}
    notes = dict(row_notes(prepared.report, CorpusOptions(), prepared.store.tokenizer))
    assert notes["rows"] == "read 2 as messages, 2 as text"
    assert (
        notes["chat template"]
        == "roles are marked by plain text; the template is exported with the model"
    )
    assert notes["noticed"].startswith("2 rows with a chat model's markers")
    assert json.loads(notes["prompt"]).endswith("<|assistant|>\n")
    assert json.loads(notes["target"]) == "yes<|eos|>"


def test_a_template_may_come_from_the_tokenizer_or_a_file(tmp_path: Path) -> None:
    source = "{% for m in messages %}{{ m.role + '=' + m.content }}{% generation %};{% endgeneration %}{% endfor %}"
    own = made(tmp_path, CHAT, tokenizer=BYTES.with_chat_template(source))
    assert texts(own) == ["user=e\u0301?\x1b;assistant=yes;"]
    assert own.store.tokenizer.chat_template == source
    (tmp_path / "other.jinja").write_text(source.replace("=", ":"), encoding="utf-8")
    other = made(tmp_path, CHAT, chat_template=str(tmp_path / "other.jinja"))
    assert texts(other) == ["user:e\u0301?\x1b;assistant:yes;"]
    plain = made(tmp_path, CHAT, tokenizer=BYTES.with_chat_template(source), chat_template="plain")
    assert plain.store.tokenizer.chat_template == PLAIN
    assert texts(plain)[0].startswith("<|bos|>")


def test_plain_text_gets_no_template(tmp_path: Path) -> None:
    assert made(tmp_path, {"text": "x"}).store.tokenizer.chat_template is None


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_write_the_same(tmp_path: Path, workers: int) -> None:
    prepared = made(tmp_path, CHAT, {"instruction": "a", "output": "b"}, num_workers=workers)
    assert prepared.report.formats == {"alpaca": 1, "messages": 1}
    assert len(texts(prepared)) == 2
    assert texts(prepared)[1].endswith("### Response:\nb<|eos|>")


def test_what_a_template_refuses_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ raise_exception('No system role') }}", encoding="utf-8")
    file = str(tmp_path / "t.jinja")
    with pytest.raises(
        UserError, match=r"rows\.jsonl:1 cannot be rendered.*: No system role\. Fix"
    ):
        made(tmp_path, CHAT, chat_template=file)
    kept = made(tmp_path, CHAT, {"text": "x"}, chat_template=file, on_bad_rows="skip")
    assert kept.report.dropped == {"bad row": 1}


@pytest.mark.parametrize("content", [None, b"\xff", b"{% if %}"])
def test_a_template_that_cannot_be_used_is_refused_first(
    tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "t.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"--chat_template"):
        made(tmp_path, CHAT, chat_template=str(file))
