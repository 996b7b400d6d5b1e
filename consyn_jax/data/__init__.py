"""Training data: readers of sources, preparation of token stores, and batches from the stores."""
