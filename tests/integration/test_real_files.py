"""Files as people have them go in by one command each with nothing but `--data`."""

import csv
import gzip
import itertools
import json
import lzma
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .conftest import Run
from .nursery import MODEL

SHARED = Path("../shared/data")
# Long enough for the prompts of the rows; the same for all, so that one program is compiled.
SHORT = [*MODEL, "--max_steps", "2", "--max_tokens", "512", "--batch_size", "2"]
SHORT += ["--logging_steps", "1", "--validation_fraction", "0.2", "--logging_backend", "none"]
ROWS = 60
BYTES = 60_000


def questions() -> list[dict[str, Any]]:
    with (SHARED / "jsonl" / "gsm8k_train.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in itertools.islice(lines, ROWS)]


def texts() -> list[str]:
    return [row["question"] for row in questions()]


def jsonl(rows: Sequence[object]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def text_rows() -> bytes:
    return jsonl([{"text": text} for text in texts()]).encode()


def prose() -> str:
    return (SHARED / "gutenberg" / "carroll-alice.txt").read_text(encoding="utf-8")[:BYTES]


def tokens() -> np.ndarray:
    """Ids of the byte tokenizer's vocabulary."""
    return np.frombuffer(prose().encode("ascii", "replace"), np.uint8)


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def table(path: Path, **dialect: Any) -> Path:
    """A table of the module csv, with quotes, delimiters and newlines in its cells."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, **dialect)
        writer.writerow(["id", "text"])
        writer.writerows(
            [i, f'{text}\nShe said: "one, two; three".'] for i, text in enumerate(texts())
        )
    return path


def comma(place: Path) -> Path:
    return table(place / "rows.csv")


def semicolon(place: Path) -> Path:
    return table(place / "export.csv", delimiter=";", quoting=csv.QUOTE_ALL)


def tabs(place: Path) -> Path:
    return table(place / "rows.tsv", delimiter="\t")


def pandas_parquet(place: Path) -> Path:
    import pandas as pd  # type: ignore[import-untyped]

    frame = pd.DataFrame({"text": texts(), "score": 0.5}, index=range(7, 7 + ROWS))
    frame.to_parquet(place / "frame.parquet")
    return place / "frame.parquet"


def arrow_parquet(place: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pa.table({"text": pa.array(texts(), pa.large_string())})
    pq.write_table(rows, place / "part-0.parquet", compression="zstd", row_group_size=9)
    return place / "part-0.parquet"


def saved_to_disk(place: Path) -> Path:
    from datasets import Dataset

    Dataset.from_dict({"text": texts()}).save_to_disk(place / "saved")
    return place / "saved"


def dataset_to_json(place: Path) -> Path:
    from datasets import Dataset

    Dataset.from_dict({"text": texts()}).to_json(place / "rows.json")
    return place / "rows.json"


def gzipped(place: Path) -> Path:
    return written(place / "rows.jsonl.gz", gzip.compress(text_rows()))


def zstandard(place: Path) -> Path:
    import pyarrow

    with pyarrow.CompressedOutputStream(str(place / "rows.jsonl.zst"), "zstd") as file:
        file.write(text_rows())
    return place / "rows.jsonl.zst"


def xz(place: Path) -> Path:
    return written(place / "rows.jsonl.xz", lzma.compress(text_rows()))


def windows_rows(place: Path) -> Path:
    content = text_rows().decode().replace("\n", "\r\n")
    return written(place / "rows.jsonl", content.encode("utf-8-sig"))


def openai_messages(place: Path) -> Path:
    rows = [
        {
            "messages": [
                {"role": "system", "content": "You are brief."},
                {"role": "user", "content": row["question"][:99]},
                {"role": "assistant", "content": row["answer"][:99]},
            ]
        }
        for row in questions()
    ]
    return written(place / "chat.jsonl", jsonl(rows))


def sharegpt(place: Path) -> Path:
    rows = [
        {
            "id": f"identity_{i}",
            "conversations": [
                {"from": "human", "value": row["question"][:99]},
                {"from": "gpt", "value": row["answer"][:99]},
            ],
        }
        for i, row in enumerate(questions())
    ]
    return written(place / "sharegpt.json", json.dumps(rows, indent=2))


def alpaca(place: Path) -> Path:
    rows = json.loads((SHARED / "jsonl" / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    rows = sorted(rows, key=lambda row: len(str(row)))[:ROWS]
    return written(place / "alpaca.json", json.dumps(rows, indent=2))


def prompt_completion(place: Path) -> Path:
    rows = [
        {"prompt": row["question"][:99], "completion": " " + row["answer"][:99]}
        for row in questions()
    ]
    return written(place / "pairs.jsonl", jsonl(rows))


def hub_layout(place: Path) -> Path:
    directory = place / "download"
    (directory / "data").mkdir(parents=True)
    parts = {"train": texts()[:40], "validation": texts()[40:50], "test": texts()[50:]}
    for split, part in parts.items():
        written(directory / "data" / f"{split}.jsonl", jsonl([{"text": text} for text in part]))
    written(directory / "README.md", "---\nlicense: mit\n---\n# Questions\n")
    return directory


def splits_of_text(place: Path) -> Path:
    directory = place / "wikitext"
    directory.mkdir()
    for name in ("train", "valid", "test"):
        text = (SHARED / "wikitext-2" / f"{name}.txt").read_text(encoding="utf-8")
        written(directory / f"{name}.txt", text[: BYTES // 3])
    return directory


def notebook(place: Path) -> Path:
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": [text], "id": f"{i}"}
        for i, text in enumerate(texts())
    ]
    content = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    return written(place / "study.ipynb", json.dumps(content, indent=1))


def separated_stories(place: Path) -> Path:
    stories = (SHARED / "tinystories" / "tiny_stories.txt").read_text(encoding="utf-8")
    parts = [stories[start : start + 3000] for start in (0, 3000, 6000)]
    return written(place / "stories.txt", "\n<|endoftext|>\n".join(parts))


def book(place: Path) -> Path:
    return SHARED / "gutenberg" / "shakespeare-macbeth.txt"


def utf16(place: Path) -> Path:
    return written(place / "notepad.txt", prose().replace("\n", "\r\n").encode("utf-16"))


def enwik8(place: Path) -> Path:
    with gzip.open(SHARED / "enwik8" / "enwik8.gz") as file:
        return written(place / "enwik8.gz", gzip.compress(file.read(BYTES)))


def token_bin(place: Path) -> Path:
    """As nanoGPT's prepare.py writes them."""
    tokens()[:40_000].astype(np.uint16).tofile(place / "train.bin")
    tokens()[40_000:].astype(np.uint16).tofile(place / "val.bin")
    return place


def token_npy(place: Path) -> Path:
    np.save(place / "ids.npy", tokens().astype(np.int64))
    return place / "ids.npy"


TEXT_ROWS = r"rows +read 60 as text\n"
ONE_DOCUMENT = r": train [\d,]+ tokens of 1 document, validation [\d,]+ tokens"
KINDS: list[tuple[Callable[[Path], Path], tuple[str, ...]]] = [
    (comma, (TEXT_ROWS,)),
    (semicolon, (TEXT_ROWS,)),
    (tabs, (TEXT_ROWS,)),
    (pandas_parquet, (TEXT_ROWS,)),
    (arrow_parquet, (TEXT_ROWS,)),
    (saved_to_disk, (TEXT_ROWS,)),
    (dataset_to_json, (TEXT_ROWS,)),
    (gzipped, (TEXT_ROWS,)),
    (zstandard, (TEXT_ROWS,)),
    (xz, (TEXT_ROWS,)),
    (windows_rows, (TEXT_ROWS,)),
    (openai_messages, (r"rows +read 60 as messages",)),
    (sharegpt, (r"rows +read 60 as sharegpt",)),
    (alpaca, (r"rows +read 60 as alpaca",)),
    (prompt_completion, (r"rows +read 60 as prompt_completion",)),
    (
        hub_layout,
        (
            r"rows +read 50 as text\n",
            r"validation +1 file by name: .*validation\.jsonl",
            r"README\.md \(accompanies the data",
            r"test\.jsonl \(is named as test data",
        ),
    ),
    (
        splits_of_text,
        (r"validation +1 file by name: .*valid\.txt", r"test\.txt \(is named as test data"),
    ),
    (notebook, (r"study\.ipynb is read as plain text, with the JSON of a notebook",)),
    (separated_stories, (r"stories\.txt is read as one document, although '<\|endoftext\|>'",)),
    (book, (r"macbeth\.txt" + ONE_DOCUMENT,)),
    (utf16, (r"notepad\.txt" + ONE_DOCUMENT,)),
    (enwik8, (r"enwik8\.gz" + ONE_DOCUMENT,)),
    (token_bin, (r"data +.*: train 40,000 tokens",)),
    (token_npy, (r"ids\.npy: train [\d,]+ tokens",)),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "said"), [pytest.param(*kind, id=kind[0].__name__) for kind in KINDS]
)
def test_a_real_file_goes_in_with_nothing_but_data(
    make: Callable[[Path], Path],
    said: tuple[str, ...],
    here: Callable[..., Run],
    tmp_path: Path,
) -> None:
    (tmp_path / "files").mkdir()
    run = here(tmp_path / "run", "--data", make(tmp_path / "files"), *SHORT)
    assert run.code == 0, run.said
    for pattern in said:
        assert re.search(pattern, run.said), run.said
    losses = [line["train/loss"] for line in run.lines if "train/loss" in line]
    assert len(losses) == 2, run.said
    assert np.isfinite(losses).all()
