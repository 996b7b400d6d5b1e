"""Read a token store, or several stores as one. `manifest.py` describes the files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from consyn_jax.data.store.manifest import PAIRS_VERSION, PREPARE_ANEW, read_manifest
from consyn_jax.data.store.shards import Shard
from consyn_jax.data.store.store_split import StoreSplit
from consyn_jax.errors import UserError
from consyn_jax.tokenization import BPETokenizer


class TokenStore:
    """A token store on disk.

    The constructor reads the manifest and the sizes of the files, but no tokens.

    Attributes:
        holds_pairs: whether each document is a pair of answers, in the format of `manifest.py`.

    Raises:
        UserError: the directory is not a token store, has an unknown version, or is damaged. The
            message names the file.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        self.vocab_size: int = self.manifest["vocab_size"]
        self.holds_pairs = self.manifest["version"] == PAIRS_VERSION
        self.splits = {
            name: StoreSplit(
                [
                    Shard(self.directory, entry, self.vocab_size, self.holds_pairs)
                    for entry in split["shards"]
                ]
            )
            for name, split in self.manifest["splits"].items()
        }

    def split(self, name: str) -> StoreSplit:
        """Return the split `name`; an empty split if the store does not have it."""
        return self.splits.get(name, StoreSplit([]))

    @cached_property
    def tokenizer(self) -> BPETokenizer:
        """The tokenizer that made the tokens, loaded from the copy in the store."""
        tokenizer = BPETokenizer.from_file(self.directory / "tokenizer")
        if tokenizer.sha256 != self.manifest["tokenizer_sha256"]:
            raise UserError(
                f"The tokenizer in {self.directory} does not match the hash in its "
                f"manifest. {PREPARE_ANEW}"
            )
        return tokenizer

    @property
    def fingerprint(self) -> str:
        """Hash of everything that determines the tokens and their order.

        Equal stores have equal fingerprints in any directory.
        """
        return fingerprint_of(self.manifest)


def fingerprint_of(manifest: dict[str, Any]) -> str:
    """Compute the fingerprint of the token store with this manifest."""
    keys = ("tokens", "sha256", "index_sha256", "targets_sha256")
    content = {
        "tokenizer": manifest["tokenizer_sha256"],
        "dtype": manifest["dtype"],
        "splits": {
            name: [[s.get(key) for key in keys] for s in split["shards"]]
            for name, split in manifest["splits"].items()
        },
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class JoinedStores:
    """Several token stores, read as the concatenation of their documents.

    Raises:
        UserError: the tokenizers differ, or only some stores contain pairs of answers.
    """

    def __init__(self, stores: Sequence[TokenStore]) -> None:
        self.stores = tuple(stores)
        first = stores[0]
        self.holds_pairs = first.holds_pairs
        for store in stores:
            if store.holds_pairs != first.holds_pairs:
                one, other = (store, first) if store.holds_pairs else (first, store)
                raise UserError(
                    f"{one.directory} contains pairs of answers, but {other.directory} does "
                    "not. Train on them in separate runs."
                )
            if store.manifest["tokenizer_sha256"] != first.manifest["tokenizer_sha256"]:
                raise UserError(
                    f"{first.directory} and {store.directory} were made with different "
                    "tokenizers. Prepare one store again with the tokenizer of the other."
                )
        names = sorted({name for store in stores for name in store.splits})
        self.splits = {
            name: StoreSplit([shard for store in stores for shard in store.split(name).shards])
            for name in names
        }

    def split(self, name: str) -> StoreSplit:
        """Return the split `name` of all stores; an empty split if no store has it."""
        return self.splits.get(name, StoreSplit([]))

    @property
    def tokenizer(self) -> BPETokenizer:
        """The common tokenizer of the stores."""
        return self.stores[0].tokenizer

    @property
    def fingerprint(self) -> str:
        """Hash of everything that determines the tokens and their order."""
        joined = " ".join(store.fingerprint for store in self.stores)
        return hashlib.sha256(joined.encode()).hexdigest()
