"""Training data: sources, their preparation into token stores, and batches from the stores."""
