"""Small segments, and a corpus of every dataset type."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from segment_stores import SEGMENT_BYTES, SHARD_TOKENS, texts

from consyn_jax.data.preparation import build
from consyn_jax.data.preparation.segments import many_writers
from consyn_jax.data.preparation.workers import worker
from consyn_jax.data.sources import chunking, json_reader, reader, text_reader
from consyn_jax.data.store import TokenStoreWriter
from consyn_jax.tokenization import BPETokenizer


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks, segments and shards; the ids of the tokenizer "bytes", quickly."""
    monkeypatch.setattr(
        BPETokenizer,
        "encode_batch",
        lambda self, texts, after=None: [list(text.encode()) for text in texts],
    )
    monkeypatch.setattr(chunking, "PART_BYTES", 8000)
    for module in (chunking, text_reader, worker):
        monkeypatch.setattr(module, "LIMIT", 9000)
    for module in (reader, text_reader, json_reader):
        monkeypatch.setattr(module, "BLOCK_BYTES", 6000)
    monkeypatch.setattr(
        build,
        "TokenStoreWriter",
        lambda *given, **named: TokenStoreWriter(*given, **named, shard_tokens=SHARD_TOKENS),
    )
    monkeypatch.setattr(many_writers, "SHARD_TOKENS", SHARD_TOKENS)
    monkeypatch.setattr(many_writers, "LEAST_SEGMENT_BYTES", SEGMENT_BYTES)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Files of every dataset type, with exact and near duplicates and texts of several segments."""
    place = tmp_path / "corpus"
    place.mkdir()
    (place / "a.md").write_bytes(b"broken \xff bytes\n\n\n\n\n" + texts(1, 90)[0].encode())
    (place / "b.txt.gz").write_bytes(
        gzip.compress("\n\n\n".join(texts(150, 40, 2)).encode(), mtime=0)
    )
    rows = texts(400, 40, 3)
    rows += rows[100:150] + [row + " nearly" for row in rows[:100]]
    lines = [json.dumps({"text": row, f"key{n % 150}": n}) for n, row in enumerate(rows)]
    for at in (5, 300, 301, 500):
        lines[at] = '{"text": 5}'
    (place / "c.jsonl").write_text("\n".join(lines))
    (place / "d.json").write_text(
        json.dumps([{"text": row} for row in texts(250, 40, 4)], indent=1)
    )
    chats = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer or "no"}]
        for prompt, answer in zip(texts(100, 9, 5), texts(100, 30, 6), strict=True)
    ]
    (place / "e.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps({"messages": c}) + "\n" for c in chats).encode(), mtime=0)
    )
    pairs = [{"prompt": row[:9], "completion": row[9:] or "."} for row in texts(150, 30, 7)]
    (place / "f.ndjson").write_text("".join(json.dumps(pair) + "\n" for pair in pairs + pairs[:50]))
    table = pyarrow.table({"text": texts(300, 40, 8), "other": list(range(300))})
    pyarrow.parquet.write_table(table, place / "g.parquet", 50, compression="none")
    with (place / "h.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "n"), *((row, 1) for row in texts(300, 40, 9) if row)])
    long = "\n".join(texts(300, 60, 10))
    (place / "i.txt").write_text(long)
    (place / "j.txt").write_text(long)  # a duplicate in parts
    (place / "k.txt").write_text("some\n\n\n" + long + " nearly\n\n\n" + long[:1000])
    return place
