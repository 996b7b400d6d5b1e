"""Readers of what comes with a model, of conversations, prompts and requests, as in `targets`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from consyn_jax.errors import UserError
from consyn_jax.inference.text_generation.prompts import given_prompts
from consyn_jax.scoring.request_rows import read_tasks
from consyn_jax.tokenization.chat.known_templates import marked
from consyn_jax.tokenization.chat.sandbox import ChatTemplate, TemplateFault
from consyn_jax.tokenization.sentencepiece_model import sentencepiece_json
from consyn_jax.tokenization.tokenizer_files import read_tokenizer
from consyn_jax.tokenization.tokenizer_json import parse
from consyn_jax.training.checkpointing.ownership import RUN_JSON, RunRecord
from consyn_jax.training.run.model_manifest import MANIFEST, disagreement, seal

MESSAGES = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
TEMPLATES = [
    "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "{%- set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% elif ns.n > 9 %}{{ raise_exception('too long') }}{% else %}{{ m | tojson }}{% endif %}"
    "{% endfor %}",
]


def chat_template(data: bytes, here: Path) -> None:
    """The Jinja template of a model."""
    try:
        template = ChatTemplate(marked(data.decode("utf-8", "replace")), {"bos_token": "<s>"})
        template.render(MESSAGES)
        template.render(MESSAGES[:1], generation_prompt=True)
    except TemplateFault as fault:
        raise UserError(f"The template fails: {fault}") from fault


def sentencepiece(data: bytes, here: Path) -> None:
    """tokenizer.model."""
    parse(sentencepiece_json(data)[0])


def tokenizer_config(data: bytes, here: Path) -> None:
    """tokenizer_config.json."""
    from consyn_jax.tokenization import BPETokenizer

    if not (here / "tokenizer.json").exists():
        (here / "tokenizer.json").write_text(BPETokenizer.bytes().to_json())
    (here / "tokenizer_config.json").write_bytes(data)
    read_tokenizer(here)
    BPETokenizer.from_file(here)


def request_rows(data: bytes, here: Path) -> None:
    """Requests to score."""
    (here / "requests.jsonl").write_bytes(data)
    read_tasks((str(here / "requests.jsonl"),))


def prompt_rows(data: bytes, here: Path) -> None:
    """Prompts and conversations to continue."""
    (here / "prompts.jsonl").write_bytes(data)
    given_prompts([], str(here / "prompts.jsonl"))


def model_manifest(data: bytes, here: Path) -> None:
    """consyn_manifest.json of an exported model."""
    (here / "config.json").write_text("{}")
    (here / MANIFEST).write_bytes(data)
    disagreement(here)


def run_record(data: bytes, here: Path) -> None:
    """run.json of a run."""
    (here / RUN_JSON).write_bytes(data)
    RunRecord.read(here)


MODEL_TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    f.__name__: f
    for f in (
        chat_template,
        sentencepiece,
        tokenizer_config,
        request_rows,
        prompt_rows,
        model_manifest,
        run_record,
    )
}


def _varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + _varint(number >> 7)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _pieces() -> bytes:
    """A SentencePiece model of a few pieces: https://github.com/google/sentencepiece, its .proto."""
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3, "\u2581a": 1, "a": 1, "\u2581": 1, "<0x41>": 6}
    pieces = b"".join(
        _field(1, _field(1, text.encode()) + b"\x15\x00\x00\x80\xbf" + b"\x18" + bytes([kind]))
        for text, kind in kinds.items()
    )
    return pieces + _field(2, b"\x18\x02")  # a trainer that made a BPE


def model_seeds(here: Path) -> dict[str, list[bytes]]:
    """Valid inputs for each target."""
    model = here / "sealed"
    model.mkdir()
    (model / "config.json").write_text("{}")
    seal(model)
    request = {"context": "2 + 2 =", "continuation": " 4"}
    choices = {"context": "The sky is", "choices": [" blue", " a"], "gold": 0}
    prompts = [{"prompt": "Once"}, {"messages": MESSAGES[:1]}]
    config = {
        "add_bos_token": True,
        "bos_token": {"content": "<|bos|>"},
        "model_max_length": 64,
        "chat_template": TEMPLATES[0],
        "added_tokens_decoder": {"257": {"content": "<|bos|>", "special": True}},
    }
    record = RunRecord.new()
    record.write(here)
    return {
        "chat_template": [text.encode() for text in TEMPLATES],
        "sentencepiece": [_pieces()],
        "tokenizer_config": [json.dumps(config).encode()],
        "request_rows": [json.dumps(request).encode(), json.dumps(choices).encode()],
        "prompt_rows": [b"\n".join(json.dumps(row).encode() for row in prompts)],
        "model_manifest": [(model / MANIFEST).read_bytes()],
        "run_record": [(here / RUN_JSON).read_bytes()],
    }
