"""Text generation with a KV cache of fixed size, in slots that each extend one text."""
