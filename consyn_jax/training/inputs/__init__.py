"""Data that a Python caller passes; data of a store is read by `indexed_batches`."""
