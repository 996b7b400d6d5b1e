"""The documents of a step by arithmetic, compared with a walk through its batches."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from consyn_jax.data.learned_documents import DocumentFinder, LearnedDocument
from consyn_jax.data.loader import BatchLoader, Shuffled
from consyn_jax.data.mixture import Mixture
from consyn_jax.data.packing import PackedSequences, pack
from consyn_jax.data.preparation.cached_store import prepare
from consyn_jax.data.store import TokenStore, TokenStoreWriter
from consyn_jax.data.store.raw_tokens import RawTokens
from consyn_jax.errors import UserError
from consyn_jax.prepare_config import CorpusOptions
from consyn_jax.tokenization import BPETokenizer

TOKENIZER = BPETokenizer()
EOS, BOS = TOKENIZER.eos_token_id, 7
SOURCES, DOCUMENTS, LENGTH = 3, 150, 48
FIRST = 1000  # the ids of the documents: each consists of its own, so a label says whose it is


def written(directory: Path, source: int, targets: bool) -> TokenStore:
    """A store whose document d has the tokens FIRST + source * DOCUMENTS + d, and then EOS."""
    rng = np.random.default_rng(source)
    with TokenStoreWriter(directory, TOKENIZER, shard_tokens=2000) as writer:
        for document in range(DOCUMENTS):
            length = int(rng.integers(2, 120))
            ids = np.full(length, FIRST + source * DOCUMENTS + document, np.uint16)
            ids[-1] = EOS
            if targets and document % 4 == 0:  # brings its own beginning
                ids[0] = BOS
            marks = (np.arange(length) > length // 3).astype(np.uint8) if targets else None
            writer.append("train", ids, np.array([length]), np.array([length]), marks)
    return TokenStore(directory)


def walked(order: Shuffled | Mixture, size: int, step: int) -> dict[int, tuple[int, int]]:
    """By the id of a document, its positions and its targets in the batch of a step."""
    batch = BatchLoader(order, size).batch(step - 1)
    inputs, labels, segments, mask = (
        batch[name].reshape(-1) for name in ("input_ids", "labels", "segment_ids", "loss_mask")
    )
    found: dict[int, tuple[int, int]] = {}
    for at in np.flatnonzero(segments):
        of = labels[at] if labels[at] >= FIRST else inputs[at]
        if of < FIRST:  # the first token of a document that is BOS: the next label is its own
            of = labels[at + 1]
        tokens, targets = found.get(int(of), (0, 0))
        found[int(of)] = tokens + 1, targets + int(mask[at])
    return found


def computed(found: list[LearnedDocument], names: list[str]) -> dict[int, tuple[int, int]]:
    assert all(document.document is not None for document in found)
    return {
        FIRST + names.index(each.data) * DOCUMENTS + (each.document or 0): (
            sum(stop - first for _, first, stop in each.parts),
            each.targets,
        )
        for each in found
    }


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["cut", "whole"])
@pytest.mark.parametrize("bos", [True, False])
def test_documents_of_a_mixture_are_those_of_a_walk_through_200_batches(
    tmp_path: Path, packing: str, bos: bool
) -> None:
    stores = [written(tmp_path / str(n), n, targets=n == 1) for n in range(3)]
    names = [f"source {n}" for n in range(SOURCES)]
    packed: dict[str, PackedSequences] = {
        name: pack(store.split("train"), LENGTH, BOS if bos else None, 0, packing)
        for name, store in zip(names, stores, strict=True)
    }
    order = Mixture(packed, [5, 2, 1], seed=7)
    finder, size = DocumentFinder(order, 12), 12
    compared = 0
    for step in np.random.default_rng(0).integers(1, 5000, 400).tolist():
        if (BatchLoader(order, size).batch(step - 1)["labels"][..., -1] == BOS).any():
            continue  # whose BOS it is only the next sequence says
        found, compared = finder.documents(step), compared + 1
        assert computed(found, names) == walked(order, size, step)
        assert sum(document.share for document in found) == pytest.approx(1)
        if compared == 200:
            break
    assert compared == 200


def test_two_packings_in_one_mixture(tmp_path: Path) -> None:
    stores = [written(tmp_path / str(n), n, targets=False) for n in range(2)]
    packed = {
        "source 0": pack(stores[0].split("train"), LENGTH, BOS, 0, "cut"),
        "source 1": pack(stores[1].split("train"), LENGTH, BOS, 0, "whole", "drop"),
    }
    order = Mixture(packed, [1, 1], seed=1)
    for step in range(1, 60):
        found = DocumentFinder(order, 8).documents(step)
        assert computed(found, list(packed)) == walked(order, 8, step)


def options(*paths: Path, **more: object) -> CorpusOptions:
    return CorpusOptions(data=tuple(map(str, paths)), tokenizer="bytes", **more)  # type: ignore[arg-type]


def every_document(store: TokenStore, split: str = "train") -> dict[str, LearnedDocument]:
    """The documents of a split by their text."""
    bytes_ = store.tokenizer
    packed = pack(store.split(split), 64, bytes_.first_id, bytes_.fill_id, "cut")
    found = DocumentFinder(Shuffled(packed, 0), len(packed)).documents(1)
    texts = {}
    for document in found:
        ids = np.empty(document.length, np.int64)
        start = np.concatenate(list(store.split(split).document_starts()))[document.document]
        store.split(split).read(int(start), ids)
        texts[bytes_.decode(ids[:-1].tolist())] = document
        assert sum(stop - first for _, first, stop in document.parts) == document.length
    return texts


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSYN_CACHE", str(tmp_path / "cache"))


def test_rows_and_bytes_are_those_of_the_files(tmp_path: Path) -> None:
    rows, zipped, text = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", tmp_path / "c.txt"
    rows.write_text("".join(json.dumps({"text": f"row {n} é"}) + "\n" for n in range(40)) + "\n")
    with gzip.open(zipped, "wt") as file:
        file.write("".join(json.dumps({"text": f"zipped {n // 2}"}) + "\n" for n in range(60)))
    long = "a long one " * 110_000
    text.write_text("\n\n".join([*(f"part {n} ö" for n in range(30)), long, "last"]))
    prepared = prepare(options(rows, zipped, text, document_separator="\\n\\n"))
    assert isinstance(prepared.store, TokenStore)
    content, zipped_lines = text.read_bytes(), gzip.decompress(zipped.read_bytes())
    for split in ("train", "validation"):
        if not prepared.store.split(split).num_tokens:
            continue
        for found, document in every_document(prepared.store, split).items():
            if document.source == str(text):
                assert document.bytes is not None
                assert document.row is None
                assert content[slice(*document.bytes)].decode() == found
                continue
            lines = (zipped_lines if document.source == str(zipped) else rows.read_bytes()).split(
                b"\n"
            )
            assert document.row is not None
            assert json.loads(lines[document.row - 1])["text"] == found


def test_a_corpus_of_one_text_is_two_ranges_of_bytes(tmp_path: Path) -> None:
    text = tmp_path / "one.txt"
    text.write_text("some text é " * 95_000)
    prepared = prepare(options(text, validation_fraction=0.1))
    assert isinstance(prepared.store, TokenStore)
    content = text.read_bytes()
    for split in ("train", "validation"):
        ((found, document),) = every_document(prepared.store, split).items()
        assert document.bytes is not None
        assert content[slice(*document.bytes)].decode() == found


def test_token_files_are_answered_by_ranges_of_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        ids = rng.integers(FIRST, 2000, 500)
        ids[rng.integers(0, 499, 20)] = EOS
        ids.astype(np.uint16).tofile(tmp_path / f"{name}.bin")
    raw = RawTokens([tmp_path / "a.bin", tmp_path / "b.bin"], TOKENIZER, validation_fraction=0.1)
    packed = pack(raw.split("train"), 64, BOS, 0, "cut")
    found = DocumentFinder(Shuffled(packed, 0), len(packed)).documents(1)
    by_place = sorted(found, key=lambda document: (document.source, document.bytes))
    read = np.concatenate(
        [
            np.fromfile(d.source, np.uint16)[slice(*(b // 2 for b in d.bytes or ()))]
            for d in by_place
        ]
    )
    whole = np.empty(raw.split("train").num_tokens, np.uint16)
    raw.split("train").read(0, whole)
    assert np.array_equal(read, whole)
    assert sum(document.share for document in found) == pytest.approx(1)


def test_what_has_no_places_is_refused(tmp_path: Path) -> None:
    class Other:
        def at(self, positions: object) -> None: ...

        def passes(self, position: int) -> dict[str, int]:
            return {}

    with pytest.raises(UserError, match="without --streaming"):
        DocumentFinder(Other(), 2).documents(1)  # type: ignore[arg-type]

    class Rows:
        def __len__(self) -> int:
            return 5

        def rows(self, indices: object) -> dict[str, np.ndarray]:
            return {}

    with pytest.raises(UserError, match="given in Python"):
        DocumentFinder(Shuffled(Rows(), 0), 2).documents(1)
