"""Text generation with a KV cache of fixed size; each slot of the cache holds one text."""
