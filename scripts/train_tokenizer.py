"""Train the bundled vocabulary on a weighted mixture, and compare its compression with GPT-2's.

    python scripts/train_tokenizer.py --data ../shared/data \\
        --output consyn_jax/tokenization/default.json.gz

The same data, Python and package versions give the same file, byte for byte. Some text is held out
from training so that the table is fair: WikiText-2 valid and test, the last tenth of tiny
Shakespeare, enwik8 from byte 90,000,000, every tenth file of the standard library, and the language
reference in pydoc_data. UDHR is in the training set and in the table, because it is the only text
here for most of its languages.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sysconfig
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from consyn_jax.tokenization import SPLIT_PATTERN, BPETokenizer
from consyn_jax.tokenization.merges import count_words

VOCAB_SIZE = 49_152
WEIGHTS = {
    "prose": 4,
    "wikitext": 6,
    "enwik8": 1,
    "instructions": 1,
    "python": 2,
    "packages": 1,
    "headers": 1,
    "languages": 3,
}

# BSD, MIT, Apache-2.0 and PSF packages of the development environment.
PERMISSIVE = (
    "absl",
    "click",
    "flax",
    "jax",
    "matplotlib",
    "networkx",
    "numpy",
    "optax",
    "packaging",
    "pandas",
    "pygments",
    "rich",
    "scipy",
    "yaml",
)
SOURCE_SUFFIXES = {".py", ".pyi", ".h", ".c", ".js", ".css", ".html"}
TESTS = {"test", "tests", "testing"}
LEFT_OUT = {"site-packages", "encodings", "pydoc_data", "lib2to3", "idlelib"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the corpora")
    parser.add_argument(
        "--output",
        type=Path,
        help="file for the vocabulary; without it, the bundled one is measured",
    )
    parser.add_argument("--vocab_size", type=int, default=VOCAB_SIZE)
    parser.add_argument(
        "--weights",
        type=json.loads,
        default={},
        help=f"JSON object that overrides {json.dumps(WEIGHTS)}",
    )
    parser.add_argument(
        "--min_count",
        type=int,
        default=2,
        help="leave out words that are rarer, after weighting",
    )
    args = parser.parse_args()
    tokenizer = (
        BPETokenizer()
        if args.output is None
        else make(args.data, args.vocab_size, WEIGHTS | args.weights, args.min_count)
    )
    if args.output is not None:
        # A fixed time in the gzip header keeps the file the same from run to run.
        args.output.write_bytes(
            gzip.compress(tokenizer.to_json().encode("utf-8"), compresslevel=9, mtime=0)
        )
        size = args.output.stat().st_size
        print(f"{args.output}: {size:,} bytes, sha256 of the content {tokenizer.sha256}")
    print_table(args.data, tokenizer)


def make(data: Path, vocab_size: int, weights: dict[str, int], min_count: int) -> BPETokenizer:
    """Count the words of every source, weight them and learn the merges; print the times."""
    total: Counter[bytes] = Counter()
    for name, weight in weights.items():
        start = time.perf_counter()
        counts = count_words(SOURCES[name](data), SPLIT_PATTERN)
        size = sum(len(word) * count for word, count in counts.items())
        for word, count in counts.items():
            total[word] += weight * count
        seconds = time.perf_counter() - start
        print(
            f"{name:14} {size / 1e6:7.1f} MB x {weight}  {len(counts):9,} words  {seconds:5.1f} s",
            flush=True,
        )
    kept = Counter({word: count for word, count in total.items() if count >= min_count})
    start = time.perf_counter()
    tokenizer = BPETokenizer.train_from_counts(kept, vocab_size)
    seconds, size = time.perf_counter() - start, tokenizer.vocab_size
    print(
        f"{len(kept):,} of {len(total):,} words, {size:,} tokens learned in {seconds:.1f} s",
        flush=True,
    )
    return tokenizer


# ------------------------------------------------------------------------------------ training text


def prose(data: Path) -> Iterator[str]:
    for path in sorted((data / "gutenberg").glob("*.txt")):
        yield path.read_text(encoding="utf-8", errors="replace")
    yield (data / "tinystories/tiny_stories.txt").read_text(encoding="utf-8")
    shakespeare = (data / "tinyshakespeare/input.txt").read_text(encoding="utf-8")
    yield shakespeare[: len(shakespeare) * 9 // 10]


def wikitext(data: Path) -> Iterator[str]:
    yield (data / "wikitext-2/train.txt").read_text(encoding="utf-8")


def enwik8(data: Path) -> Iterator[str]:
    with gzip.open(data / "enwik8/enwik8.gz") as file:
        yield file.read(90_000_000).decode("utf-8", errors="ignore")


def instructions(data: Path) -> Iterator[str]:
    for line in (data / "jsonl/gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield f"{row['question']}\n{row['answer']}\n"
    for row in json.loads((data / "jsonl/alpaca_en_demo.json").read_text(encoding="utf-8")):
        yield f"{row['instruction']}\n{row['input']}\n{row['output']}\n"


def python(data: Path) -> Iterator[str]:
    for index, path in enumerate(standard_library()):
        if index % 10:
            yield path.read_text(encoding="utf-8", errors="replace")


def packages(data: Path) -> Iterator[str]:
    root = Path(sysconfig.get_path("purelib"))
    for package in PERMISSIVE:
        for path in sorted((root / package).rglob("*")):
            if path.suffix in SOURCE_SUFFIXES and not TESTS & set(path.relative_to(root).parts):
                yield path.read_text(encoding="utf-8", errors="replace")


def headers(data: Path) -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_path("include")).rglob("*.h")):
        yield path.read_text(encoding="utf-8", errors="replace")
    for path in sorted((Path(sysconfig.get_path("purelib")) / "torch/include/c10").rglob("*.h")):
        yield path.read_text(encoding="utf-8", errors="replace")


def languages(data: Path) -> Iterator[str]:
    yield from udhr(data)


SOURCES = {
    source.__name__: source
    for source in (prose, wikitext, enwik8, instructions, python, packages, headers, languages)
}


def standard_library() -> list[Path]:
    """The source files of the running Python in a fixed order, without tests and tables."""
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(
        path
        for path in root.rglob("*.py")
        if not (TESTS | LEFT_OUT) & set(path.relative_to(root).parts)
    )


def udhr(data: Path) -> list[str]:
    """The Universal Declaration of Human Rights, one text per language."""
    return [
        json.loads(line)["text"]
        for line in (data / "jsonl/udhr.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def is_latin(text: str) -> bool:
    """Whether most letters of a text belong to the Latin script."""
    letters = Counter(character for character in text if character.isalpha())
    latin = sum(
        count
        for letter, count in letters.items()
        if unicodedata.name(letter, "").startswith("LATIN")
    )
    return 2 * latin > letters.total()


# ---------------------------------------------------------------------------------------- measuring


def held_out(data: Path) -> Iterator[tuple[str, list[str]]]:
    """The texts of the table by name, with `(trained on)` if they are part of the mixture."""
    shakespeare = (data / "tinyshakespeare/input.txt").read_text(encoding="utf-8")
    files = [path.read_text(encoding="utf-8", errors="replace") for path in standard_library()]
    rows = udhr(data)
    yield "WikiText-2 test", [(data / "wikitext-2/test.txt").read_text(encoding="utf-8")]
    yield "tiny Shakespeare (90 % trained on)", [shakespeare]
    yield "tiny Shakespeare, last 10 %", [shakespeare[len(shakespeare) * 9 // 10 :]]
    yield "Python, held-out files", files[::10]
    yield "Python, all (90 % trained on)", files
    yield "pydoc_data.topics (`--data sample`)", list(topics.values())
    yield "UDHR, non-Latin (trained on)", [text for text in rows if not is_latin(text)]
    yield "UDHR, Latin (trained on)", [text for text in rows if is_latin(text)]
    with gzip.open(data / "enwik8/enwik8.gz") as file:
        file.seek(95_000_000)
        yield "enwik8, last 5 MB", [file.read().decode("utf-8", errors="ignore")]


def print_table(data: Path, tokenizer: BPETokenizer) -> None:
    gpt2 = BPETokenizer.from_file(data / "tokenizers/gpt2/tokenizer.json")
    print("| text | bytes | tokens | GPT-2's | ratio | bytes/token | GPT-2's |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, texts in held_out(data):
        size = sum(len(text.encode("utf-8")) for text in texts)
        ours, theirs = (
            sum(map(len, candidate.encode_batch(texts))) for candidate in (tokenizer, gpt2)
        )
        print(
            f"| {name} | {size:,} | {ours:,} | {theirs:,} | {ours / theirs:.3f} "
            f"| {size / ours:.2f} | {size / theirs:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
