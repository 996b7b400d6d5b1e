"""Token stores: shards of token ids on disk, with what writes and reads them."""

from consyn_jax.data.store.store_writer import TokenStoreWriter
from consyn_jax.data.store.token_store import TokenStore

__all__ = ["TokenStore", "TokenStoreWriter"]
