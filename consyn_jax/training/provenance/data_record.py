"""Record the training data of a run as JSON, and rebuild the order of sequences from the record.

JAX is not imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from consyn_jax.data.loader import Order, Shuffled
from consyn_jax.data.mixture import Mixture
from consyn_jax.data.packing import PackedDataset, PackedSequences, WholeDocuments
from consyn_jax.data.pairs import PairDataset
from consyn_jax.data.store.file_hashes import FileHashes
from consyn_jax.data.store.manifest import read_manifest, read_sources
from consyn_jax.data.store.raw_tokens import RawShard, raw_split
from consyn_jax.data.store.shards import Shard, Tokens
from consyn_jax.data.store.store_split import StoreSplit
from consyn_jax.data.store.token_store import TokenStore, fingerprint_of
from consyn_jax.errors import UserError, with_urls
from consyn_jax.training.checkpointing.checkpoint_files import PROVENANCE

LISTED_SOURCES = 200  # at most this many sources per store are recorded; sources.json lists all
# Kinds of order: one shuffled dataset, a mixture of several, or an order that is not recorded.
ONE, MIXTURE, UNKNOWN = "one", "mixture", "unknown"


def record_order(order: Order | None) -> dict[str, Any]:
    """Record an order of sequences for `open_order`, with fingerprints and hashes of the data."""
    if isinstance(order, Shuffled) and isinstance(order.dataset, PackedSequences):
        datasets, kind = {"": order.dataset}, ONE
    elif isinstance(order, Mixture):
        packed_only = {n: d for n, d in order.datasets.items() if isinstance(d, PackedSequences)}
        datasets, kind = packed_only, MIXTURE
    else:
        return {"order": UNKNOWN}
    found = [(name, packed, _record_split(packed.split)) for name, packed in datasets.items()]
    is_partial = isinstance(order, Mixture) and len(found) < len(order.datasets)
    if is_partial or not all(record for *_, record in found):
        return {"order": UNKNOWN}
    weights = list(order.weights) if isinstance(order, Mixture) else None
    sources = [
        {
            "item": name,
            **record,
            "length": packed.block_size,
            "bos_id": packed.bos_id,
            "pad_id": packed.pad_id,
            "packing": _packing(packed),
            "on_long": getattr(packed, "on_long", None),
        }
        for name, packed, record in found
    ]
    return {"order": kind, "seed": order.seed, "weights": weights, "sources": sources}


def _packing(packed: PackedSequences) -> str:
    if isinstance(packed, PairDataset):
        return "pairs"
    return "whole" if isinstance(packed, WholeDocuments) else "cut"


def _record_split(split: StoreSplit) -> dict[str, Any]:
    """Record a split of token stores or token files; return {} for tokens in memory."""
    shards = split.shards
    if shards and all(isinstance(shard, Shard) for shard in shards):
        return _record_stores([shard for shard in shards if isinstance(shard, Shard)])
    if shards and all(isinstance(shard, RawShard) for shard in shards):
        return _record_files([shard for shard in shards if isinstance(shard, RawShard)])
    return {}


def _record_stores(shards: Sequence[Shard]) -> dict[str, Any]:
    stores = []
    for directory in dict.fromkeys(shard.directory for shard in shards):
        manifest, sources = read_manifest(directory), read_sources(directory)
        listed = [[source["name"], source["sha256"]] for source in sources[:LISTED_SOURCES]]
        stores.append(
            {
                "directory": str(directory.resolve()),
                **_url_of(directory),
                "fingerprint": fingerprint_of(manifest),
                "sources_sha256": manifest.get("sources_sha256"),
                "num_sources": len(sources),
                "sources": listed,
            }
        )
    return {"split": shards[0].split_name, "stores": stores}


def _url_of(path: Path) -> dict[str, str]:
    """The entry `url` with the URL of a copy from a bucket; {} if `path` is not such a copy."""
    url = with_urls(str(path))
    return {} if url == str(path) else {"url": url}


def _record_files(shards: Sequence[RawShard]) -> dict[str, Any]:
    with FileHashes() as file_hash:
        files = [
            {
                "path": str(shard.path.resolve()),
                **_url_of(shard.path),
                "sha256": file_hash(shard.path),
                "tokens": [shard.first, shard.first + shard.num_tokens],
            }
            for shard in shards
        ]
    about = {"vocab_size": shards[0].vocab_size, "eos_id": shards[0].delimiter}
    return {"files": files, **about}


def open_order(record: dict[str, Any], place: Path) -> Order:
    """Rebuild the order of the training sequences from the record of `record_order`.

    Args:
        place: Directory with the record, for messages.

    Raises:
        UserError: The data is missing or has changed, or the record names no data.
    """
    if record["order"] not in (ONE, MIXTURE):
        raise UserError(
            f"{place} has no record of the documents that a step learned from, because its data "
            "was streamed, or passed in Python as batches or token lists. Use --documents_of with "
            "a run on prepared data."
        )
    try:
        datasets = {source["item"]: _open_packed(source) for source in record["sources"]}
        if record["order"] == MIXTURE:
            return Mixture(datasets, record["weights"], record["seed"])
        (only,) = datasets.values()
        return Shuffled(only, record["seed"])
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:  # a record that was edited
        raise UserError(
            f"{place / PROVENANCE} is damaged ({type(error).__name__}: {str(error)[:100]}). "
            "Restore it from a copy."
        ) from error


def _open_packed(source: dict[str, Any]) -> PackedSequences:
    split = _open_stores(source) if "stores" in source else _open_files(source)
    arguments = (split, source["length"], source["bos_id"], source["pad_id"])
    if source["packing"] == "pairs":
        return PairDataset(*arguments, source["on_long"])
    if source["packing"] == "whole":
        return WholeDocuments(*arguments, source["on_long"])
    return PackedDataset(*arguments)


def _open_stores(source: dict[str, Any]) -> StoreSplit:
    shards: list[Tokens] = []
    for entry in source["stores"]:
        directory = Path(entry["directory"])
        if not directory.is_dir():
            raise UserError(
                f"The token store {directory} of this run no longer exists. Restore it, or make "
                "it again with the command of the run and --dry_run."
            )
        store = TokenStore(directory)
        if store.fingerprint != entry["fingerprint"]:
            raise UserError(
                f"The token store {directory} has changed since the run: its fingerprint was "
                f"{entry['fingerprint'][:16]}, and is now {store.fingerprint[:16]}. Restore the "
                "store of the run."
            )
        shards += store.split(source["split"]).shards
    return StoreSplit(shards)


def _open_files(source: dict[str, Any]) -> StoreSplit:
    with FileHashes() as file_hash:
        for entry in source["files"]:
            if file_hash(Path(entry["path"])) != entry["sha256"]:
                raise UserError(
                    f"{entry['path']} has changed since the run began. Restore the original file."
                )
    parts = [(Path(entry["path"]), *entry["tokens"]) for entry in source["files"]]
    return raw_split(parts, source["vocab_size"], source["eos_id"])
