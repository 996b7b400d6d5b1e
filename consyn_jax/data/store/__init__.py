"""Token stores: reading and writing of token ids in shards on disk."""

from consyn_jax.data.store.store_writer import TokenStoreWriter
from consyn_jax.data.store.token_store import TokenStore

__all__ = ["TokenStore", "TokenStoreWriter"]
